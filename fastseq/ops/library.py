"""The two operators of the library, for any cell and any raw backend, and one that copies.

The two take the cell's name and flat lists of tensors, neither mutate nor alias what they are
given, and have no autograd formula: that is :mod:`.autograd`'s.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import OPAQUE, imported, load
from ..backends.contract import (
    Call,
    OutputGradients,
    Result,
    Wanted,
    unflatten,
)
from ..cells import CELLS, named

F = TypeVar("F", bound=Callable[..., Any])

_LAYER = (
    "str cell, str backend, Tensor x, Tensor? batch_sizes, Tensor[] states, Tensor?[] weights, "
    "bool[] reverse, Tensor? reset, Tensor? h_mask, Tensor?[] stay, float[] part, str memory, "
    "bool deterministic"
)

#: The overload for what saves something of a size that is known when it has run: inductor, which
#: records CUDA graphs around such operators, takes what they return into one and then misses it.
UNSIZED = "unsized"
_FORWARD = f"({_LAYER}, bool save, bool trajectory) -> Tensor[]"
_BACKWARD = (
    f"({_LAYER}, Tensor[] outputs, Tensor? dy, Tensor?[] dstates, "
    "Tensor?[] dtrajectory, bool trajectory, bool[] wanted) -> Tensor[]"
)

library = torch.library.Library("fastseq", "DEF")
library.define(f"recurrence{_FORWARD}")
library.define(f"recurrence_backward{_BACKWARD}")
library.define(f"recurrence.{UNSIZED}{_FORWARD}", tags=(torch.Tag.cudagraph_unsafe,))
library.define(f"recurrence_backward.{UNSIZED}{_BACKWARD}", tags=(torch.Tag.cudagraph_unsafe,))
library.define("copies(Tensor[] tensors) -> Tensor[]")


class Layout(NamedTuple):
    """What a call has besides tensors."""

    cell: str
    backend: str
    reverse: tuple[bool, ...]
    memory: str
    deterministic: bool
    trajectory: bool
    n_states: int  # how many of the tensors are initial states
    n_weights: int  # and how many are weights
    n_stay: int = 0  # and how many say where a state stays
    part: tuple[float, ...] = ()  # of each state, that stays
    save: bool = True  # whether forward keeps what backward wants

    @property
    def n_inputs(self) -> int:
        """x, batch_sizes, reset, h_mask, states, weights and where the states stay."""
        return 4 + self.n_states + self.n_weights + self.n_stay

    @property
    def n_outputs(self) -> int:
        """How many outputs a caller sees: y, the states, the trajectory."""
        n = len(CELLS[self.cell].states)
        return 1 + n + (n - 1 if self.trajectory else 0)


def as_given() -> AbstractContextManager[Any]:
    """Autocast off: a backward may be called under it, and kernels get raw addresses."""
    if torch._C._is_any_autocast_enabled():
        return torch._C._DisableAutocast()
    return nullcontext()


def refuse_tangents(operator: str = "recurrence") -> None:
    """Under forward-mode AD our own layers take the eager form. What calls the operator as it is,
    as an exported program does, would get tangents of zero: a kernel does not see that there are
    any."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"fastseq::{operator}: the operator has no forward-mode derivative; "
            "call the layer itself, not a program that was exported from it"
        )


def named_range(cell: str, backend: str, way: str = "") -> AbstractContextManager[Any]:
    """A range of its own in a profile, as ``fastseq::lstm native``; 0.3 us where none is made."""
    if torch.autograd._profiler_enabled():
        return torch.autograd.profiler.record_function(f"fastseq::{cell}{way} {backend}")
    return nullcontext()


def negated(*tensors: Tensor | None) -> bool:
    """Whether one of them is a lazy negation: in memory its numbers have another sign."""
    for tensor in tensors:  # a loop: 0.3 us less than any()
        if tensor is not None and tensor.is_neg():
            return True
    return False


def as_numbers(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Tensors whose memory holds their numbers."""
    return [None if t is None else t.resolve_neg() for t in tensors]


def available(backend: str) -> ModuleType:
    """The backend's module. A program that another machine exported may name one that is not."""
    module = load(backend)
    if isinstance(module, str):
        raise RuntimeError(f"fastseq::recurrence: backend {backend!r} is not available: {module}")
    return module


def saved_layout(backend: str, call: Call, rows: tuple[int, ...], trajectory: bool) -> Any:
    """What a backend saves, whether or not it can run here."""
    module = imported(backend)
    if isinstance(module, str):
        raise RuntimeError(f"fastseq::recurrence: backend {backend!r} is not available: {module}")
    return module.saved_layout(call, rows, trajectory)


def make_call(
    cell: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    reverse: Sequence[bool],
    reset: Tensor | None,
    h_mask: Tensor | None,
    stay: Sequence[Tensor | None],
    part: Sequence[float],
    memory: str,
    deterministic: bool = False,
) -> Call:
    return Call(
        cell,
        x,
        batch_sizes,
        states,
        unflatten(named(cell), weights),
        tuple(reverse),
        reset,
        h_mask,
        memory,  # type: ignore[arg-type]
        deterministic,
        stay,
        tuple(part),
    )


def split_outputs(cell: str, outputs: Sequence[Tensor], trajectory: bool) -> Result:
    """y, states, trajectory and saved from the flat list that the operator returns."""
    n = len(CELLS[cell].states)
    m = n - 1 if trajectory else 0
    return Result(
        outputs[0],
        list(outputs[1 : 1 + n]),
        list(outputs[1 + n : 1 + n + m]),
        list(outputs[1 + n + m :]),
    )


def recurrence(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    reverse: Sequence[bool],
    reset: Tensor | None,
    h_mask: Tensor | None,
    stay: Sequence[Tensor | None],
    part: Sequence[float],
    memory: str,
    deterministic: bool,
    save: bool,
    trajectory: bool,
) -> list[Tensor]:
    refuse_tangents()
    states, stay, part = states or [], stay or [], part or []  # AOTInductor: None for an empty list
    if negated(x, h_mask, *states, *weights):
        x, h_mask = as_numbers((x, h_mask))
        states, weights = as_numbers(states), as_numbers(weights)
    call = make_call(
        cell,
        x,
        batch_sizes,
        states,
        weights,
        reverse,
        reset,
        h_mask,
        stay,
        part,
        memory,
        deterministic,
    )
    with as_given(), named_range(cell, backend):
        result = available(backend).forward(call, save, trajectory)
    return [result.y, *result.states, *result.trajectory, *result.saved]


def recurrence_backward(
    cell: str,
    backend: str,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    reverse: Sequence[bool],
    reset: Tensor | None,
    h_mask: Tensor | None,
    stay: Sequence[Tensor | None],
    part: Sequence[float],
    memory: str,
    deterministic: bool,
    outputs: Sequence[Tensor],
    dy: Tensor | None,
    dstates: Sequence[Tensor | None],
    dtrajectory: Sequence[Tensor | None],
    trajectory: bool,
    wanted: Sequence[bool],
) -> list[Tensor]:
    stay, part = stay or [], part or []
    if negated(x, h_mask, dy, *states, *weights, *dstates, *dtrajectory):
        x, h_mask, dy = as_numbers((x, h_mask, dy))
        states, weights = as_numbers(states), as_numbers(weights)
        dstates, dtrajectory = as_numbers(dstates), as_numbers(dtrajectory)
    call = make_call(
        cell,
        x,
        batch_sizes,
        states,
        weights,
        reverse,
        reset,
        h_mask,
        stay,
        part,
        memory,
        deterministic,
    )
    with as_given(), named_range(cell, backend, " backward"):
        gradients = available(backend).backward(
            call,
            split_outputs(cell, outputs, trajectory),
            OutputGradients(dy, list(dstates), list(dtrajectory)),
            Wanted(*wanted),
        )
    flat: list[Tensor] = []
    if wanted[0]:
        flat.append(gradients.x)
    if wanted[1]:
        flat.extend(gradients.states)
    if wanted[2]:
        flat.extend(g for w in gradients.weights for g in w.flat() if g is not None)
    return flat


for _overload in ("", f".{UNSIZED}"):
    library.impl(f"recurrence{_overload}", recurrence, "CompositeExplicitAutograd")
    library.impl(
        f"recurrence_backward{_overload}", recurrence_backward, "CompositeExplicitAutograd"
    )


def unknown_size() -> Any:
    """In a fake kernel, a size that is known when the kernel has run."""
    return torch.library.get_ctx().new_dynamic_size()


def overload(operator: Any, layout: Layout, x: Tensor) -> Any:
    """That of one of the two operators which takes such a call."""
    if layout.save and layout.backend == OPAQUE and x.device.type == "cuda":
        return operator.unsized
    return operator.default


def register_fake(name: str) -> Callable[[F], F]:
    """The kernel that gives the shapes of an operator, or one overload. Who compiles for inductor
    runs it, so it is where inductor is told of the operator, which then compiles where
    ``implicit_fallbacks`` is off, too; an import of inductor would take seconds of ``import
    fastseq``."""
    packet, _, which = name.partition(".")

    def register(kernel: F) -> F:
        @wraps(kernel)
        def fake(*args: Any) -> Any:
            lowering: Any = sys.modules.get("torch._inductor.lowering")
            if lowering is not None:
                _tell_inductor(
                    getattr(getattr(torch.ops.fastseq, packet), which or "default"), lowering
                )
            return kernel(*args)

        torch.library.register_fake(f"fastseq::{name}", fake, lib=library)
        return kernel

    return register


def _tell_inductor(operator: Any, lowering: Any) -> None:
    """That an operator is called as it is, with the layouts that it is traced with."""
    if operator not in lowering.lowerings:
        tag = torch._library.utils.get_layout_constraint_tag(operator, with_default=True)
        lowering.make_fallback(operator, lowering.tag_to_layout_constraint(tag))


@register_fake("recurrence")
@register_fake(f"recurrence.{UNSIZED}")
def recurrence_fake(
    cell,
    backend,
    x,
    batch_sizes,
    states,
    weights,
    reverse,
    reset,
    h_mask,
    stay,
    part,
    memory,
    deterministic,
    save,
    trajectory,
):
    call = make_call(
        cell,
        x,
        batch_sizes,
        states,
        weights,
        reverse,
        reset,
        h_mask,
        stay,
        part,
        memory,
        deterministic,
    )
    R, H, P = len(call.weights), call.H, call.P
    lead = tuple(x.shape[:-1])
    others = len(call.definition.states) - 1
    # a fake batch_sizes holds no number
    B = call.B if states or batch_sizes is None else unknown_size()
    outputs = [x.new_empty((*lead, R * P))]
    outputs += [x.new_empty((R, B, size)) for size in [P, *[H] * others]]
    if trajectory:
        outputs += [x.new_empty((*lead, R * H)) for _ in range(others)]
    if save:
        for shape, dtype in saved_layout(backend, call, lead, trajectory):
            known = [unknown_size() if size is None else size for size in shape]
            outputs.append(x.new_empty(known, dtype=dtype))
    return outputs


@register_fake("recurrence_backward")
@register_fake(f"recurrence_backward.{UNSIZED}")
def recurrence_backward_fake(
    cell,
    backend,
    x,
    batch_sizes,
    states,
    weights,
    reverse,
    reset,
    h_mask,
    stay,
    part,
    memory,
    deterministic,
    outputs,
    dy,
    dstates,
    dtrajectory,
    trajectory,
    wanted,
):
    flat = []
    if wanted[0]:
        flat.append(torch.empty_like(x, memory_format=torch.contiguous_format))
    if wanted[1]:
        flat += [s.new_empty(s.shape) for s in outputs[1 : 1 + len(CELLS[cell].states)]]
    if wanted[2]:
        flat += [w.new_empty(w.shape) for w in weights if w is not None]
    return flat


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies that a compiler does not take out, 3 us: a caller may edit them behind the graph."""
    return [t.clone() for t in tensors]


library.impl("copies", copies, "CompositeExplicitAutograd")


@register_fake("copies")
def copies_fake(tensors):
    return [torch.empty_like(t) for t in tensors]


torch.library.register_autograd("fastseq::copies", lambda ctx, grads: (grads,), lib=library)
