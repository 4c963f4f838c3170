"""The contract of a backend: what a call is made of, and what it gives back.

A *raw* backend is a module with

- ``unavailable() -> str | None``: why it cannot run on this machine, and the remedy;
- ``supports(problem) -> str | None``: why it declines this problem, in words a user can act on;
- ``forward(call, save, trajectory) -> Result`` and
  ``backward(call, result, grads, wanted) -> Gradients``, which neither write to what they are given
  nor return views of it. ``backward`` may be called twice with the same arguments and then gives
  the same bits.

What its forward saves for backward, shapes and dtypes, is written in :mod:`.layout`: a graph can be
traced where the backend itself cannot run.

A backend that is made of torch operations may offer a way that autograd sees through, and is then
called without an autograd formula of ours:

- ``differentiable(problem) -> bool``: whether ``forward`` is such a way here (``eager``);
- ``stack(stack) -> (y, states)``: all layers in one call, where ``stacks(problem)`` (``torch``).

Rows. ``x`` is ``(T, B, I)`` with ``batch_sizes=None``, or packed ``(N', I)`` with ``batch_sizes``
as in ``PackedSequence``: sequences sorted by decreasing length, the rows of one step side by side.
``N' >= N = sum(batch_sizes)``; rows from N on are padding, which is never read; their outputs and
gradients are zero. The batch of the states may be larger than ``batch_sizes[0]``: the sequences
beyond it are empty, and keep their state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..cells import CELLS, Cell

Memory = Literal["full", "lean"]
Mode = Literal["eager", "compile", "trace", "transform", "dual"]
Shape = tuple[int, ...]


class Problem(NamedTuple):
    """What the choice of a backend may depend on. No tensors: it is hashable and testable.

    ``T`` is the longest sequence and ``B`` the batch. While a graph is traced both are None, so
    that no choice can depend on them; torch.compile knows no size at all. ``capability`` is that
    of the CUDA device at hand, '9.0' say, in which the devices of one process may differ; ``tf32``
    says whether torch multiplies float32 in TF32 there, and ``recording`` whether a ragged call
    is recorded into a CUDA graph.
    """

    cell: str
    dtype: torch.dtype
    device: str
    T: int | None
    B: int | None
    I: int | None  # noqa: E741  (the field's letter)
    H: int | None
    P: int | None
    R: int = 1
    layers: int = 1
    bias: bool = True
    projected: bool = False
    ragged: bool = False
    reset: bool = False
    h_mask: bool = False
    zoneout: bool = False
    trajectory: bool = False
    memory: Memory = "full"
    deterministic: bool = False
    training: bool = False
    dropout: bool = False
    threads: int = 1
    mode: Mode = "eager"
    capability: str | None = None
    tf32: bool = False
    recording: bool = False


class Weights(NamedTuple):
    """The parameters of one recurrence; G_hh counts the gates that have a recurrent product."""

    w_ih: Tensor  # (G*H, I)
    w_hh: Tensor | None  # (G_hh*H, P)
    b_ih: Tensor | None  # (G*H,)
    b_hh: Tensor | None  # (G_hh*H,)
    w_hr: Tensor | None  # (P, H)
    units: tuple[Tensor, ...] = ()  # the cell's unit_parameters, (H,) each

    def flat(self) -> list[Tensor | None]:
        return [self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr, *self.units]

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """The same of every tensor that is there."""

        def part(w: Tensor | None) -> Tensor | None:
            return None if w is None else function(w)

        return Weights(
            function(self.w_ih),
            part(self.w_hh),
            part(self.b_ih),
            part(self.b_hh),
            part(self.w_hr),
            tuple(function(u) for u in self.units),
        )


def weights_per_recurrence(cell: Cell) -> int:
    return 5 + len(cell.unit_parameters)


def unflatten(cell: Cell, flat: Sequence[Tensor | None]) -> list[Weights]:
    """The weights of R recurrences from one flat list (ops carry flat lists)."""
    size = weights_per_recurrence(cell)
    return [
        Weights(*flat[k : k + 5], tuple(flat[k + 5 : k + size]))  # type: ignore[arg-type, call-arg]
        for k in range(0, len(flat), size)
    ]


@dataclass
class Call:
    """One layer: R independent recurrences over one input.

    states: empty (zeros), or h_0 (R, B, P) and then each other state, (R, B, H).
    reverse: for each recurrence, whether time runs backwards.
    reset: (R, N') bool or None; where it holds, the states that enter the row are zeroed.
    h_mask: (R, B, P) or None; multiplies h_{t-1} before its product with w_hh.
    deterministic: the bits of y, of the states and of their gradients and that of x depend on
        nothing but a sequence and the weights: not on the batch around it, nor on the threads.
    """

    cell: str
    x: Tensor
    batch_sizes: Tensor | None
    states: Sequence[Tensor]
    weights: list[Weights]
    reverse: tuple[bool, ...]
    reset: Tensor | None = None
    h_mask: Tensor | None = None
    memory: Memory = "full"
    deterministic: bool = False

    @property
    def definition(self) -> Cell:
        return CELLS[self.cell]

    @property
    def H(self) -> int:
        return self.weights[0].w_ih.shape[0] // self.definition.G

    @property
    def P(self) -> int:
        w_hr = self.weights[0].w_hr
        return self.H if w_hr is None else w_hr.shape[0]

    @property
    def B(self) -> int:
        if self.states:
            return self.states[0].shape[1]
        if self.batch_sizes is None:
            return self.x.shape[1]
        return int(self.batch_sizes[0]) if len(self.batch_sizes) else 0

    def zero_states(self) -> list[Tensor]:
        """The initial states where none were given."""
        R, B, others = len(self.weights), self.B, len(self.definition.states) - 1
        sizes = [self.P, *[self.H] * others]
        return [self.x.new_zeros((R, B, size)) for size in sizes]


@dataclass
class Result:
    """What forward gives.

    y: (..., R*P), rows as x. states: as in the call, after the last step.
    trajectory: if asked for, the states other than h at every step, (..., R*H) each.
    saved: if asked for, what the backend's own backward wants beyond these and the call.
    """

    y: Tensor
    states: list[Tensor]
    trajectory: list[Tensor]
    saved: list[Tensor]


@dataclass
class OutputGradients:
    """Gradients of a Result; None stands for zeros."""

    y: Tensor | None
    states: list[Tensor | None]
    trajectory: list[Tensor | None]


@dataclass
class Wanted:
    """Which gradients a caller needs. The rest is not computed."""

    x: bool
    states: bool
    weights: bool


@dataclass
class Gradients:
    """Gradients of a Call's tensors; None where not wanted or where the tensor is None."""

    x: Tensor | None
    states: list[Tensor] | None
    weights: list[Weights] | None
