"""What a caller asks of a stack of layers, in one record that every floor below reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends import cuda_rule
from ..backends.contract import ONE_STEP, Problem, Request
from ..backends.tracing import unrecorded
from ..cells import CELLS, Cell
from . import modes
from .geometry import Geometry


@dataclass
class Zoneout:
    """How states stay as they were.

    rates: of each state. seed: 64 bits, or None outside of training, where that part of a state
        stays. ids: (B,), the sequences' names; None: they are numbered.
    """

    rates: tuple[float, ...]
    seed: Tensor | None
    ids: Tensor | None


@dataclass
class Stack:
    """Layers x directions of one cell over one input.

    x: the caller's input, which ``geometry`` reads.
    states: empty, or per state of the cell a tensor (layers * D, B, ...) as the caller has it.
    weights: of each layer and direction, side by side, w_ih, w_hh, b_ih, b_hh, w_hr and the cell's
        unit parameters, but for those it has not.
    reset: (T, B) bool or None; where it holds a new sequence begins, in either direction.
    h_mask: (layers * D, B, P) or None; multiplies h_{t-1} before its product with w_hh.
    input_masks: one a layer, (B, its input size), or None; multiplies its input at every step.
    zoneout: which states stay as they were, or None.

    Of reset and the masks the batch is in the order of the caller's.
    """

    request: Request
    x: Any
    states: Sequence[Tensor]
    weights: Sequence[Tensor]
    geometry: Geometry
    reset: Tensor | None = None
    h_mask: Tensor | None = None
    input_masks: Sequence[Tensor] | None = None
    zoneout: Zoneout | None = None
    #: Whether autocast took the tensors to another type.
    cast: bool = False
    #: The numbers of the input, however they lie.
    data: Tensor = field(init=False)
    #: Of the weights, once they were asked for.
    sizes: tuple[int, int, int] | None = field(init=False, default=None)

    cell: Cell = field(init=False)

    def __post_init__(self) -> None:
        self.data = self.geometry.numbers(self.x)
        self.cell = CELLS[self.request.cell]

    @property
    def single(self) -> bool:
        """Whether it is a cell's step, and not one under autocast, where gates want float32."""
        return self.request.order == ONE_STEP and not self.cast

    @property
    def width(self) -> int:
        """Of the input of the first layer."""
        return self._of_weights()[0]

    @property
    def H(self) -> int:
        return self._of_weights()[1]

    @property
    def P(self) -> int:
        return self._of_weights()[2]

    def _of_weights(self) -> tuple[int, int, int]:
        if self.sizes is None:
            self.sizes = sizes_of(self.weights, self.cell)
        return self.sizes

    def needs_grad(self) -> bool:
        # an exported program records the operator alone, which has no autograd formula
        if not torch.is_grad_enabled() or modes.is_exporting():
            return False
        x = self.data
        if modes.in_transform():  # the tensors' own word is that of the innermost transform
            return any(modes.tracked(t) for t in (x, *self.states, *self.weights))
        if x.requires_grad or any(s.requires_grad for s in self.states):
            return True
        return any(w.requires_grad for w in self.weights)


@unrecorded
def sizes_of(weights: Sequence[Tensor], cell: Cell) -> tuple[int, int, int]:
    """The width of the first layer's input, H and P."""
    rows, width = weights[0].shape
    H = rows // len(cell.gates)
    return width, H, weights[1].shape[1] if cell.recurrent_gates else H


def problem(stack: Stack) -> Problem:
    """What the choice of a backend depends on."""
    mode = modes.mode()
    request, geometry, x = stack.request, stack.geometry, stack.data
    traced = mode in ("compile", "trace")
    T = B = width = H = P = None
    if mode != "compile":
        width, H, P = stack.width, stack.H, stack.P
    if not traced:
        T, B = geometry.T, geometry.B
        sizes = (T, B, width, H, P)
        if torch.SymInt in map(type, sizes):  # of a symbolic trace, as torch.compile's
            T, B, width, H, P = [None if type(s) is torch.SymInt else s for s in sizes]
    ragged = geometry.is_ragged
    device, capability, tf32, recording = "cpu", None, False, False
    if not x.is_cpu:
        device = x.device.type
    if device == "cuda":
        capability = cuda_rule.capability(x.device)
        tf32 = cuda_rule.uses_tf32(x.dtype)
        if ragged and mode == "plain":
            recording = torch.cuda.is_current_stream_capturing()
    return Problem(  # in the fields' order: their names would take a microsecond
        request.cell,
        x.dtype,
        device,
        T,
        B,
        width,
        H,
        P,
        request.directions,
        request.layers,
        request.biased,
        request.projected,
        ragged,
        stack.single,
        stack.reset is not None,
        stack.h_mask is not None,
        () if stack.zoneout is None else stack.zoneout.rates,
        False,  # input_product
        1,  # heads
        request.trajectory,
        request.memory,
        request.deterministic,
        stack.needs_grad(),
        1 if traced else torch.get_num_threads(),
        mode,
        capability,
        tf32,
        recording,
    )


def zero_states(stack: Stack, like: Tensor) -> list[Tensor]:
    """The initial states where none were given, (layers * D, B, ...)."""
    request = stack.request
    count = request.layers * request.directions
    sizes = (stack.P, *[stack.H] * len(stack.cell.other_states))
    return [like.new_zeros((count, stack.geometry.B, size)) for size in sizes]
