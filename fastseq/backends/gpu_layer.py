"""What the backends of fused kernels on a GPU share: a call as rows, and the large products around
the loop over time, which are torch's.

One GEMM makes the input product of all steps before the walk; large GEMMs make the gradients of x
and of the weights from the gate gradients that the walk back leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from ..cells import Cell
from .contract import Call, OutputGradients, Result, Wanted, Weights
from .layout import side_by_side, wide

Precision = Literal["ieee", "tf32", "tf32x3"]


_NOTHING: AbstractContextManager[Any] = nullcontext()


def products_as(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """torch's own products in the precision of the loop's, as in cuDNN.

    The setting is the process's: products that another thread makes meanwhile follow it too.
    """
    if precision != "tf32" or device.type != "cuda":
        return _NOTHING
    return _NOTHING if torch.backends.cuda.matmul.fp32_precision == "tf32" else _tf32()


@contextmanager
def _tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Layer:
    """One call as kernels take it.

    N: rows of all sequences; capacity: those of x, with padding behind. lengths, offsets: of a
    ragged call, on the device, (B,) and the first row of each step.
    """

    def __init__(self, call: Call, precision: Precision) -> None:
        self.call = call
        self.cell: Cell = call.definition
        self.precision = precision
        self.dtype, self.device = call.x.dtype, call.x.device
        self.wide = wide(self.dtype)
        self.R, self.H, self.P, self.B = len(call.weights), call.H, call.P, call.B
        self.projected = call.weights[0].w_hr is not None
        self.capacity = call.x.shape[0] * (call.x.shape[1] if call.batch_sizes is None else 1)
        self.lead = tuple(call.x.shape[:-1])
        self.lengths: Tensor | None = None
        self.offsets: Tensor | None = None
        if call.batch_sizes is None:
            self.T, B = call.x.shape[:2]
            self.N = self.T * B
        else:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "sequences of different lengths: batch_sizes lives on the CPU, so a CUDA graph "
                    "cannot record the call; pad to one length, or call outside of the capture"
                )
            sizes = call.batch_sizes
            self.T, self.N = len(sizes), int(sizes.sum())
            # sequence b is as long as there are steps with more than b sequences
            counts = torch.searchsorted(-sizes, -torch.arange(self.B, device=sizes.device))
            tables = torch.cat([sizes.cumsum(0) - sizes, counts]).to(self.device)
            self.offsets, self.lengths = tables[: self.T], tables[self.T :]
        self.x = self.flat(call.x)

    @cached_property
    def sizes(self) -> list[int]:
        """How many sequences there are at each step."""
        given = self.call.batch_sizes
        return [self.B] * self.T if given is None else given.tolist()

    def flat(self, rows: Tensor) -> Tensor:
        """(N, ...) of what has a row for each of the input."""
        flat = rows.reshape(self.capacity, rows.shape[-1])
        return flat if self.capacity == self.N else flat[: self.N]

    def on_device(self) -> AbstractContextManager[Any]:
        if self.device.type != "cuda" or self.device.index == torch.cuda.current_device():
            return _NOTHING
        return torch.cuda.device(self.device)

    @staticmethod
    def stacked(parts: list[Tensor | None]) -> Tensor | None:
        """(R, ...); of one recurrence the tensor itself."""
        if parts[0] is None:
            return None
        if len(parts) == 1:
            return parts[0].contiguous()
        return torch.stack(parts)  # type: ignore[arg-type]

    def units(self) -> Tensor | None:
        """The parameters per hidden unit, (R, U, H)."""
        return self.stacked([torch.stack(w.units) if w.units else None for w in self.call.weights])

    def rows(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer with a row of ``width`` for each of the input."""
        return torch.empty((*self.lead, width), dtype=dtype or self.dtype, device=self.device)

    def padded(self, tensor: Tensor) -> Tensor:
        """The same tensor; its rows of padding are zero from now on."""
        if self.capacity > self.N:
            tensor.view(self.capacity, -1)[self.N :] = 0
        return tensor

    def state(self, width: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((self.R, self.B, width), dtype=dtype, device=self.device)

    def result(
        self,
        y: Tensor,
        finals: list[Tensor],
        kept: list[Tensor],
        along: list[Tensor],
        full: bool,
        trajectory: bool,
    ) -> Result:
        """What forward gives. kept: what it saves; along: the other states at every step, which it
        saves too, unless the trajectory holds them in the same type."""
        result = Result(y, [final.to(self.dtype) for final in finals], [], [])
        if full:
            result.saved = [*kept, *along]
        if trajectory:
            result.trajectory = [a.to(self.dtype) for a in along]
            if full and self.dtype is self.wide:
                result.saved = kept
        return result

    def kept(self, result: Result) -> tuple[list[Tensor], list[Tensor]]:
        """Of what :meth:`result` gave, kept and along."""
        saved = [t.contiguous() for t in result.saved]
        saved_along = not result.trajectory or self.dtype is not self.wide
        count = len(saved) - saved_along * len(self.cell.other_states)
        return saved[:count], saved[count:] or [t.contiguous() for t in result.trajectory]

    def check(self, result: Result, grads: OutputGradients) -> None:
        """Raises where what forward saved came back otherwise, as hooks of saved tensors may bring
        it: kernels read addresses alone. That autograd brings gradients of the outputs' shapes
        tells where all came back alike."""
        call, R, B = self.call, self.R, self.B
        y = ((*self.lead, R * self.P), self.dtype)
        layout = side_by_side(call, self.lead, bool(result.trajectory))
        sizes = (self.P, *[self.H] * len(self.cell.other_states))
        states = [((R, B, size), self.dtype) for size in sizes]
        found = [(t.shape, t.dtype) for t in (result.y, *result.saved, *call.states)]
        right = found == [y, *layout, *(states if call.states else ())]
        for gradient, expected in zip((grads.y, *grads.states), (y, *states), strict=True):
            right &= gradient is None or (gradient.shape, gradient.dtype) == expected
        if not right:
            raise RuntimeError("fastseq: the saved tensors came back with another shape or type")

    def w_ih(self) -> Tensor:
        """(R*G*H, I)"""
        weights = [w.w_ih for w in self.call.weights]
        return weights[0] if self.R == 1 else torch.cat(weights)

    def input_product(self, gates: Tensor | None = None) -> Tensor:
        """x W_ih^T + bias of all recurrences, (..., R*G*H); a row for each of the input. gates:
        where it is put."""
        if gates is None:
            gates = self.rows(self.R * self.cell.G * self.H)
        flat = self.flat(gates)
        biases = [self.bias(w) for w in self.call.weights]
        with products_as(self.precision, self.device):
            if biases[0] is None:
                torch.mm(self.x, self.w_ih().t(), out=flat)
            else:
                bias = biases[0] if self.R == 1 else torch.cat(biases)  # type: ignore[arg-type]
                torch.addmm(bias, self.x, self.w_ih().t(), out=flat)
        return gates

    def bias(self, w: Weights) -> Tensor | None:
        """What adds to the input product, (G*H): b_ih, and b_hh of the gates not apart."""
        cell, H = self.cell, self.H
        if w.b_hh is None:
            return w.b_ih
        if not cell.parts_differ and cell.recurrent_gates:
            return w.b_hh if w.b_ih is None else w.b_ih + w.b_hh
        bias = w.b_hh.new_zeros(cell.G * H) if w.b_ih is None else w.b_ih.clone()
        for at, place, count in _joint_gates(cell):
            bias.narrow(0, at * H, count * H).add_(w.b_hh.narrow(0, place * H, count * H))
        return bias

    def gradients(
        self,
        wanted: Wanted,
        dgates: Tensor,
        biases: Callable[[int], tuple[Tensor | None, Tensor | None]] | None,
        recurrent: Callable[[int], Tensor | None],
        projection: Callable[[int], Tensor | None],
        dunits: Tensor | None,
    ) -> tuple[Tensor | None, list[Weights] | None]:
        """Those of x and of the weights that are wanted.

        dgates: (N, R, G*H), of the input products. biases, recurrent, projection: make those of
        b_ih and b_hh, of w_hh and of w_hr of a recurrence. dunits: (R, U, H).
        """
        dx = dweights = None
        with products_as(self.precision, self.device):
            if wanted.x:
                x = self.call.x
                dx = self.padded(torch.empty_like(x, memory_format=torch.contiguous_format))
                flat = dgates.view(self.N, self.R * self.cell.G * self.H)
                torch.mm(flat, self.w_ih(), out=self.flat(dx))
            if wanted.weights:
                dweights = []
                for r, w in enumerate(self.call.weights):
                    db_ih, db_hh = (None, None) if biases is None else biases(r)
                    dweights.append(
                        Weights(
                            torch.mm(dgates[:, r].t(), self.x),
                            None if w.w_hh is None else recurrent(r),
                            None if w.b_ih is None else db_ih,
                            None if w.b_hh is None else db_hh,
                            projection(r),
                            () if dunits is None else tuple(u.clone() for u in dunits[r]),
                        )
                    )
        return dx, dweights


@lru_cache(maxsize=256)
def _joint_gates(cell: Cell) -> tuple[tuple[int, int, int], ...]:
    """Runs of gates whose recurrent part joins the input part: the first one's place among all
    gates, and among those of w_hh, and how many follow one another in both."""
    runs: list[tuple[int, int, int]] = []
    for place, gate in enumerate(cell.recurrent_gates):
        if gate in cell.apart_gates:
            continue
        at = cell.gates.index(gate)
        if runs and (at, place) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
        else:
            runs.append((at, place, 1))
    return tuple(runs)
