"""Which backend will run a module on an input, and why the others will not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends import BACKENDS, choice
from ..backends.contract import Problem
from ..ops.geometry import values_of, with_values
from ..ops.stack import Stack, problem
from . import joined
from .cells import RecurrentCell, cell_stack, cell_weights
from .container import Stacked
from .options import HasOptions, options
from .recurrent import Recurrent, call_stack, call_weights
from .scrn import SCRN, SCRNCell, stacks


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    *,
    lengths: Any = None,
    reset: Tensor | None = None,
    all_states: bool = False,
) -> str | None:
    """Print which backend will run ``module(input, ...)``, whether all layers go in one call of it,
    and why each other backend will not run.

    On CUDA, where no backend is named, the measurement behind the choice is printed too. A backend
    that plans its kernels prints the plan.

    Args:
        module: a layer or a cell of fastseq, or a Stacked of layers, of which each call that it
            makes is printed.
        input: as for the call; only its shape, dtype and device count, and whether a gradient is
            wanted (``torch.no_grad()`` around this call explains inference).
        lengths, reset, all_states: as for the call.

    Returns:
        The name of the backend, of an SCRN that of its hidden units, of a Stacked that of its last
        call, or None where those that ``module.fastseq.backend`` names all decline.

    Raises:
        TypeError: the module is not one of fastseq's.
    """
    if isinstance(module, Stacked):
        return _of_stack(module, input, lengths=lengths, reset=reset)
    if isinstance(module, RecurrentCell):
        if isinstance(input, PackedSequence):
            raise TypeError("input: a cell takes a Tensor, got a PackedSequence")
        stack = cell_stack(module, input, [], cell_weights(module), options(module).backend)
    elif isinstance(module, Recurrent):  # with a seed, so that none is drawn
        stack = call_stack(module, input, None, lengths, reset, all_states, seed=0)
    elif isinstance(module, (SCRN, SCRNCell)):
        chosen = None
        for stack in stacks(module, input, lengths, reset):
            chosen = _printed(f"{type(module).__name__}, {stack.request.cell}", stack)
        return chosen
    else:
        raise TypeError(
            f"module: expected a layer or cell of fastseq, got {type(module).__name__}; "
            "fastseq.replace(model) swaps torch.nn's"
        )
    return _printed(type(module).__name__, stack)


def _of_stack(module: Stacked, input: Any, **given: Any) -> str | None:
    chosen = None
    for name, layers, part in module._fastseq_calls():
        here, width = layers[part], layers[part.start].input_size
        values = values_of(input)
        x = with_values(input, values.new_zeros(*values.shape[:-1], width)) if part.start else input
        first: Any = here[0]
        if not isinstance(first, HasOptions):
            print(f"{name}[{part.start}]: torch.nn's own {type(first).__name__}")
            chosen = None
        elif len(here) == 1:
            print(f"{name}[{part.start}]:")
            chosen = explain(first, x, **given)  # type: ignore[arg-type]
        else:
            print(f"{name}[{part.start}] to {name}[{part.stop - 1}]:")
            weights = [w for layer in here for w in call_weights(layer)]
            one = joined.Joined(here, module.dropout)
            stack = call_stack(one, x, None, **given, seed=0, weights=weights)
            chosen = _printed(type(here[0]).__name__, stack)
    return chosen


def _printed(what: str, stack: Stack) -> str | None:
    task, backend = problem(stack), stack.request.backend
    verdict = choice.judge(task, backend)
    size = f"T={task.T} B={task.B} I={task.I} H={task.H} layers={task.layers} directions={task.R}"
    purpose = "training" if task.training else "inference"
    print(f"{what} {size}, {task.dtype} on {task.device}, {purpose}")
    tried = choice.left_to_us(task) if backend is None else choice.names(backend)
    print(f"backend={backend!r}: tries {', '.join(dict.fromkeys(tried))}")
    measured = choice.measured(task)
    if backend is None and measured is not None:
        print(f"measured: {measured}")
    for name in BACKENDS:
        reason = choice.reason_against(name, task)
        if name == verdict.chosen:
            print(f"  {name:<10} runs, {_how(name, task)}")
            for line in (choice.explained(name, task) or "").splitlines():
                print(f"  {'':<10} {line}")
        elif reason is not None:
            print(f"  {name:<10} declines: {reason}")
        else:
            print(f"  {name:<10} could run it, is not asked first")
    return verdict.chosen


def _how(name: str, task: Problem) -> str:
    if task.single:
        return "one step"
    return "layer by layer" if choice.in_one_call(name, task) is None else "all layers in one call"
