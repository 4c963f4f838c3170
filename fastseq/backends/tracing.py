"""torch.jit.trace: what it does not record, and a loop over any number of steps.

The tracer would write out the steps of its example. So one step is traced by itself, and
TorchScript compiles a loop that calls it, which becomes a node of the caller's graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

#: Graphs hold the address of a function that they call, so that it has to stay. The same step has
#: the same loop: torch.jit.trace compares the graphs of two traces, and with them names.
_LOOPS: dict[tuple[str, str], Any] = {}
_UNIT = torch._C.CompilationUnit()

F = TypeVar("F", bound=Callable[..., Any])


@contextmanager
def paused() -> Iterator[None]:
    """The tracer records nothing meanwhile, and sizes are plain numbers."""
    tracer: Any = torch._C
    recording = tracer._get_tracing_state()
    tracer._set_tracing_state(None)
    try:
        yield
    finally:
        tracer._set_tracing_state(recording)


def unrecorded(function: F) -> F:
    """``function``, during which a tracer pauses: what it compares and converts is neither recorded
    nor warned of. For checks and for the sizes of weights. What a trace is given later, torch's
    kernels check."""

    @wraps(function)
    def run(*args: Any) -> Any:
        if not torch.jit.is_tracing():
            return function(*args)
        with paused():
            return function(*args)

    return run  # type: ignore[return-value]


def numbers(*sizes: Any) -> tuple[Any, ...]:
    """Sizes as numbers, while a tracer pauses: one that it recorded is a tensor."""
    return tuple([int(size) if isinstance(size, Tensor) else size for size in sizes])


def loop(
    step: Callable[..., Any],
    inputs: Sequence[Tensor],
    states: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """The states after every step, (T, ...) each, and after the last one.

    step: the new states of one step of each input, the states and the constants, all in a row; a
        tensor where there is one state, else a tuple. inputs: (T, ...) each.
    """
    with paused(), warnings.catch_warnings():
        # the caller, who traces, was told that it is deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        examples = [*(t[0] for t in inputs), *states, *constants]
        traced = torch.jit.trace(step, tuple(t.detach() for t in examples), check_trace=False)
        compiled = _compiled(traced, _source(len(inputs), len(states), len(constants)))
    found = compiled(*inputs, *states, *constants)
    return list(found[: len(states)]), list(found[len(states) :])


def _compiled(step: Any, source: str) -> Any:
    graph: Any = step.graph.copy()
    torch._C._jit_pass_erase_shape_information(graph)
    key = str(graph), source
    if key not in _LOOPS:
        unit: Any = torch._C.CompilationUnit()
        unit.define(source, {"step": step, "torch": torch}.get)
        # a saved graph finds by its full name what it calls
        name = f"__torch__.fastseq.loop_{len(_LOOPS)}"
        _LOOPS[key] = _UNIT.create_function(name, unit.find_function("loop").graph)
    return _LOOPS[key]


def _source(n_inputs: int, n_states: int, n_constants: int) -> str:
    """The loop in TorchScript, where a function takes a fixed number of tensors."""
    inputs, states, constants, along = (
        [f"{letter}{k}" for k in range(n)]
        for letter, n in (("x", n_inputs), ("s", n_states), ("w", n_constants), ("y", n_states))
    )
    takes = ", ".join([*inputs, *states, *constants])
    now = ", ".join([*(f"{x}[t]" for x in inputs), *states, *constants])
    lines = [f"def loop({takes}):"]
    lines += [f"    {y} = torch.jit.annotate(List[Tensor], [])" for y in along]
    lines += [f"    for t in range({inputs[0]}.size(0)):"]
    lines += [f"        {', '.join(states)} = step({now})"]
    lines += [f"        {y}.append({s})" for y, s in zip(along, states, strict=True)]
    gives = ", ".join([*(f"torch.stack({y})" for y in along), *states])
    lines += [f"    return {gives}"]
    return "\n".join([*lines, ""])
