"""What the backends of fused kernels on a GPU share: a call as rows, and the large products around
the loop over time, which are torch's.

One GEMM makes the input product of all steps before the walk; large GEMMs make the gradients of x
and of the weights from the gate gradients that the walk back leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from ..cells import Cell
from .contract import Call, Result, Wanted, Weights
from .layout import wide

Precision = Literal["ieee", "tf32", "tf32x3"]


@contextmanager
def products_as(precision: Precision, device: torch.device) -> Iterator[None]:
    """torch's own products in the precision of the loop's, as in cuDNN.

    The setting is the process's: products that another thread makes meanwhile follow it too.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    if device.type != "cuda" or precision != "tf32" or before == "tf32":
        yield
        return
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Layer:
    """One call as kernels take it.

    N: rows of all sequences; capacity: those of x, with padding behind. sizes: sequences at each
    step. lengths, offsets: of a ragged call, on the device, (B,) and the first row of each step.
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
            self.sizes = [B] * self.T
        else:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "sequences of different lengths: batch_sizes lives on the CPU, so a CUDA graph "
                    "cannot record the call; pad to one length, or call outside of the capture"
                )
            sizes = call.batch_sizes
            self.T, self.N, self.sizes = len(sizes), int(sizes.sum()), sizes.tolist()
            # sequence b is as long as there are steps with more than b sequences
            counts = torch.searchsorted(-sizes, -torch.arange(self.B, device=sizes.device))
            tables = torch.cat([sizes.cumsum(0) - sizes, counts]).to(self.device)
            self.offsets, self.lengths = tables[: self.T], tables[self.T :]
        self.x = call.x.reshape(self.capacity, call.x.shape[-1])[: self.N]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                yield
        else:
            yield

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

    def w_ih(self) -> Tensor:
        """(R*G*H, I)"""
        weights = [w.w_ih for w in self.call.weights]
        return weights[0] if self.R == 1 else torch.cat(weights)

    def input_product(self) -> Tensor:
        """x W_ih^T + bias of all recurrences, (..., R*G*H); a row for each of the input."""
        gates = self.rows(self.R * self.cell.G * self.H)
        flat = gates.view(self.capacity, gates.shape[-1])[: self.N]
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
        for place, gate in enumerate(cell.recurrent_gates):
            if gate not in cell.apart_gates:
                at = cell.gates.index(gate) * H
                bias[at : at + H] += w.b_hh[place * H : (place + 1) * H]
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
                flat = dx.view(self.capacity, x.shape[-1])[: self.N]
                torch.mm(dgates.view(self.N, self.R * self.cell.G * self.H), self.w_ih(), out=flat)
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
