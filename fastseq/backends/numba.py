"""Fused loops over time for the CPU, compiled by Numba: no compiler needed on the machine.

A kernel of :mod:`.numba_loops` walks time and writes the gates over the input product, which it
makes step by step, or finds made for all steps by one GEMM. Backward walks once more and leaves the
gate gradients, from which large GEMMs make the gradients of x and of the weights.

16-bit types compute in float32: their tensors are widened at the door and narrowed on the way out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..cells import Cell
from . import openmp
from .contract import (
    Abilities,
    Call,
    Gradients,
    OutputGradients,
    Problem,
    Result,
    Wanted,
    Weights,
)
from .layout import as_made, declined, wide, zoned
from .layout import by_recurrence as saved_layout
from .numba_loops import LEVELS, Kernel, Zone, backward_kernel, forward_kernel, slots
from .numba_masks import keep
from .numba_products import NUMPY, Room, product
from .numba_simd import simd
from .numba_threads import row_ranges

__all__ = ["backward", "forward", "keep", "saved_layout", "supports", "unavailable"]

ABILITIES = Abilities(zoneout=True)

_NO_ROWS = np.zeros(0, np.int64)


def unavailable() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    return declined("numba", problem)


class _Kept(NamedTuple):
    """What one recurrence keeps for backward; a row for each of the input."""

    gates: Tensor | None  # (N, G*H), the saved values written over the input product
    extras: tuple[Tensor | None, ...]  # (N, H) each
    m: Tensor | None  # (N, H), the hidden state before its projection, or before it is zoned out
    made: tuple[Tensor | None, ...]  # (N, H) each, the other states before they are

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.gates, *self.extras, self.m, *self.made) if t is not None]


def _kept(call: Call, saved: list[Tensor]) -> _Kept:
    """What a forward that saves has left of one recurrence, taken from the front of ``saved``."""
    cell, projected = call.definition, call.weights[0].w_hr is not None
    h, *others = as_made(call)
    gates = saved.pop(0) if cell.keeps_gates(projected) else None
    extras = tuple(saved.pop(0) for _ in cell.extras)
    m = saved.pop(0) if projected or h else None
    return _Kept(gates, extras, m, tuple(saved.pop(0) if made else None for made in others))


class _Rows:
    """Which rows of the flat input belong to which step."""

    def __init__(self, call: Call) -> None:
        self.ragged = call.batch_sizes is not None
        if call.batch_sizes is not None:
            self.sizes = np.ascontiguousarray(call.batch_sizes.numpy(), np.int64)
            self.T = len(self.sizes)
            ends = np.cumsum(self.sizes)
            self.offsets = ends - self.sizes
            self.N = int(ends[-1]) if self.T else 0
            self.capacity = call.x.shape[0]
            self.alive = int(self.sizes[0]) if self.T else 0
        else:
            self.T, self.alive = call.x.shape[:2]
            self.sizes = self.offsets = _NO_ROWS
            self.N = self.capacity = self.T * self.alive

    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """The step and the sequence of each row, and the sizes and offsets of all steps."""
        sizes = self.sizes if self.ragged else np.full(self.T, self.alive)
        offsets = np.cumsum(sizes) - sizes
        step = np.repeat(np.arange(self.T), sizes)
        return step, np.arange(self.N) - offsets[step], sizes, offsets

    def previous(self, reverse: bool) -> Tensor:
        """For each row the row before it in its recurrence, or N + b where that is h_0's."""
        step, sequence, sizes, offsets = self.places()
        before = step + 1 if reverse else step - 1
        exists = (before >= 0) & (before < self.T)
        before = np.where(exists, before, 0)
        known = exists & (sequence < sizes[before])
        return torch.from_numpy(np.where(known, offsets[before], self.N) + sequence)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


class _Task:
    """One call in the kernels' own type, and the addresses that its kernels get."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.cell: Cell = call.definition
        self.dtype = wide(call.x.dtype)
        self.np_dtype = NUMPY[self.dtype]
        self.itemsize = 8 if self.dtype is torch.float64 else 4
        self.rows = _Rows(call)
        self.R, self.H, self.P, self.B = len(call.weights), call.H, call.P, call.B
        self.x = _wide(call.x, self.dtype).reshape(-1, call.x.shape[-1])[: self.rows.N]
        self.weights = [ws.map(lambda w: _wide(w, self.dtype)) for ws in call.weights]
        self.states = [_wide(s, self.dtype) for s in call.states] or [
            self.x.new_zeros((self.R, self.B, size))
            for size in [self.P, *[self.H] * len(self.cell.other_states)]
        ]
        self.reset = None if call.reset is None else call.reset.contiguous()
        self.h_mask = None if call.h_mask is None else _wide(call.h_mask, self.dtype)
        self.threads = min(torch.get_num_threads(), openmp.cores())
        self.zone: Zone | None = None
        self.made = as_made(call)
        if any(zoned(call)):
            projected = call.weights[0].w_hr is not None
            self.zone = Zone("part" if call.part else "stay", projected)
            self.stay = [None if s is None else s.contiguous() for s in call.stay]
            self.nowhere = (
                np.zeros(max(self.H, self.P), np.uint8)
                if any(s is None for s in self.stay)
                else _NO_ROWS
            )
            self.parts = np.array([*call.part, *(1 - part for part in call.part)], self.np_dtype)

    def zone_slots(self, r: int) -> dict[str, int]:
        """Where the states of a recurrence stay as they were, or what part of them does."""
        parts = self.parts.ctypes.data
        own = {"parts": parts, "rests": parts + len(self.call.part) * self.itemsize}
        for k, stay in enumerate(self.stay):
            if stay is None:
                own[f"stay_{k}"], own[f"stay_{k}_stride"] = self.nowhere.ctypes.data, 0
            else:
                own[f"stay_{k}"] = stay.data_ptr() + r * stay.stride(0)
                own[f"stay_{k}_stride"] = stay.shape[2]
        return own

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="cpu")

    def bias(self, r: int) -> Tensor:
        """What simply adds to the input product, (G*H): b_ih, and b_hh of the gates not apart."""
        w, H, cell = self.weights[r], self.H, self.cell
        if w.b_hh is None:
            return self.x.new_zeros(cell.G * H) if w.b_ih is None else w.b_ih
        if not cell.parts_differ and cell.recurrent_gates:
            return w.b_hh if w.b_ih is None else w.b_ih + w.b_hh
        bias = self.x.new_zeros(cell.G * H) if w.b_ih is None else w.b_ih.clone()
        for place, gate in enumerate(cell.recurrent_gates):
            if gate not in cell.apart_gates:
                at = cell.gates.index(gate)
                bias[at * H : (at + 1) * H] += w.b_hh[place * H : (place + 1) * H]
        return bias

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        return product(a, b, self.threads)

    def packed(self, matrix: Tensor, transposed: bool) -> Room:
        """Weights in the layout of the kernels' product: (k, columns), columns in blocks.

        transposed: columns are the rows of ``matrix``.
        """
        s = simd(self.np_dtype)
        rows, stride = matrix.shape
        inner, columns = (stride, rows) if transposed else (rows, stride)
        room = Room(s.packed_size(inner, columns), self.dtype)
        s.pack(matrix.data_ptr(), matrix.stride(0), inner, columns, transposed, room.address)
        return room

    def products(self, r: int, forward: bool) -> list[Room | None]:
        """The packed rows of w_hh of each phase."""
        w_hh = self.weights[r].w_hh
        packed: list[Room | None] = []
        for phase in self.cell.phases:
            first, last = self.cell.product_rows(phase)
            if last and w_hh is not None:
                part = w_hh[first * self.H : last * self.H]
                packed.append(self.packed(part, transposed=forward))
            else:
                packed.append(None)
        return packed

    def ranges(self) -> list[tuple[int, int, int]]:
        flops = 2.0 * self.H * (self.cell.G_hh * self.P + 30 * self.cell.G)
        return row_ranges(self.R, self.rows.alive, self.rows.T, flops, self.threads)

    def input_in_loop(self) -> bool:
        """Whether the loop makes the input product, step by step, and not one GEMM before it.

        It saves a pass of the gates through memory, and in inference the memory itself (forward GRU
        T128 B2048 I64 H64: 51 ms, not 105), but wants rows enough for the product, and weights that
        stay in cache beside the recurrent ones, or rows enough to pay for reading them each step.
        """
        rows = min((last - first for _, first, last in self.ranges()), default=0)
        size = self.cell.G * self.H * (self.x.shape[1] + self.P) * self.itemsize
        return rows >= 6 and (size <= 2**20 or rows >= 64)

    def run(self, kernel: Kernel, fill: Any) -> None:
        """Run a kernel over all recurrences and rows. ``fill(r, first, last)`` gives its slots."""
        rows, T, B = self.rows, self.rows.T, self.rows.alive
        if not T or not B:
            return
        places = slots(self.cell, self.zone is not None)
        common = [0] * len(places)
        for name, value in (("T", T), ("B", B), ("H", self.H), ("P", self.P)):
            common[places[name]] = value
        if rows.ragged:
            common[places["sizes"]] = rows.sizes.ctypes.data
            common[places["offsets"]] = rows.offsets.ctypes.data
        tasks, keep = [], []
        for r, first, last in self.ranges():
            own, buffers = fill(r, first, last)
            keep.append(buffers)  # they live until the kernel is done
            task = common.copy()
            for name, value in own.items():
                task[places[name]] = value
            task[places["first_row"]], task[places["last_row"]] = first, last
            task[places["reverse"]] = self.call.reverse[r]
            task[places["reset"]] = 0 if self.reset is None else self.reset[r].data_ptr()
            tasks.append(task)
        kernel.run(tasks, self.threads)

    def previous_h(self, r: int, y: Tensor) -> Tensor:
        """The operand of the recurrent product at every row: h_{t-1}, reset and masked, (N, P)."""
        columns = y[: self.rows.N, r * self.P : (r + 1) * self.P]
        index = self.rows.previous(self.call.reverse[r])
        h = torch.cat([columns, self.states[0][r]]).index_select(0, index)
        if self.reset is not None:
            h.masked_fill_(self.reset[r, : self.rows.N, None], 0)
        if self.h_mask is not None and self.rows.ragged:
            row = torch.from_numpy(self.rows.places()[1])
            h *= self.h_mask[r].index_select(0, row)
        elif self.h_mask is not None:
            h.view(self.rows.T, self.B, self.P).mul_(self.h_mask[r])
        return h


def _address(buffer: Tensor | Room | None) -> int:
    if isinstance(buffer, Room):
        return buffer.address
    return 0 if buffer is None else buffer.data_ptr()


def forward(call: Call, save: bool, trajectory: bool) -> Result:
    task = _Task(call)
    lead = tuple(call.x.shape[:-1])
    full = save and call.memory == "full"
    y = task.new(*lead, task.R * task.P)
    flat = y.view(task.rows.capacity, task.R * task.P)
    if task.rows.capacity > task.rows.N:
        flat[task.rows.N :] = 0
    finals = [s.clone() for s in task.states]
    others = task.cell.other_states if full or trajectory else ()
    along = [task.new(*lead, task.R * task.H) for _ in others]
    flat_along = [c.view(task.rows.capacity, task.R * task.H) for c in along]
    if task.rows.capacity > task.rows.N:
        for c in flat_along:
            c[task.rows.N :] = 0
    kept = _walk_forward(task, flat, finals, flat_along, full)

    dtype = call.x.dtype
    result = Result(y, finals, [], [])
    if dtype is not task.dtype:
        result.y, result.states = result.y.to(dtype), [s.to(dtype) for s in finals]
    if full:
        result.saved = [tensor for each in kept for tensor in each.tensors()]
    if trajectory:
        result.trajectory = [c.to(dtype) for c in along]
    if full and not (trajectory and dtype is task.dtype):
        result.saved += along
    return result


def _walk_forward(
    task: _Task,
    y: Tensor,
    finals: list[Tensor],
    along: list[Tensor],
    full: bool,
    products: list[Tensor | None] | None = None,
) -> list[_Kept]:
    """Run all recurrences; y, finals and along are filled. Returns what each one keeps.

    products: h_{t-1} W_hh^T of all rows, where it is known already.
    """
    cell, N, H, P = task.cell, task.rows.N, task.H, task.P
    capacity, G_H = task.rows.capacity, task.cell.G * task.H
    G_hh = cell.G_hh
    in_loop = task.input_in_loop()
    h_made, *others_made = task.made
    handed = [any(state in phase.takes for phase in cell.phases) for state in cell.states]
    kept, inputs, given = [], [], []
    for r, w in enumerate(task.weights):
        projected = w.w_hr is not None
        keeps = full and cell.keeps_gates(projected)
        gates = task.new(capacity, G_H) if in_loop and keeps else None
        if task.R == 1 and not cell.keeps_gates(projected) and capacity == N:
            gates = y  # one gate, whose value is h: the product may stand where y will
        if not in_loop:
            gates = product(task.x, w.w_ih.t(), task.threads, out=gates)
            if capacity > N:
                gates = torch.cat([gates, gates.new_zeros((capacity - N, G_H))])
        inputs.append(gates)
        kept.append(
            _Kept(
                gates if keeps else None,
                tuple(
                    task.new(capacity, H) if full or name in cell.handed_on else None
                    for name in cell.extras
                ),
                task.new(capacity, H) if projected or (full and h_made) else None,
                tuple(task.new(capacity, H) if full and made else None for made in others_made),
            )
        )
        given.append(products[r] if products else _given_product(task, r))
    packed = [
        [None] * len(cell.phases) if given[r] is not None else task.products(r, True)
        for r in range(task.R)
    ]
    w_in = [task.packed(w.w_ih, transposed=True) if in_loop else None for w in task.weights]
    projections = [
        None if w.w_hr is None else task.packed(w.w_hr, transposed=True) for w in task.weights
    ]

    def fill(r: int, first: int, last: int) -> tuple[dict[str, int], Any]:
        w = task.weights[r]
        rows = last - first
        s = given[r] if given[r] is not None else task.new(max(rows, 1), G_hh * H)
        row = task.new(max(H, 1))
        b_hh = w.b_hh if w.b_hh is not None else task.x.new_zeros(G_hh * H)
        operand = None if task.h_mask is None else task.new(task.B, P)
        bias = task.bias(r)
        gates = inputs[r]
        x = task.new(rows, G_H) if gates is None else gates
        m = kept[r].m
        own = {
            "input": _address(task.x),
            "I": task.x.shape[1],
            "w_in": _address(w_in[r]),
            "x": _address(x),
            "x_kept": gates is not None,
            "bias": _address(bias),
            "s": _address(s),
            "s_stride": G_hh * H,
            "s_given": given[r] is not None,
            "w_hr": _address(projections[r]),
            "m": _address(m),
            "m_stride": H,
            "y": _address(y) + r * P * task.itemsize,
            "y_stride": task.R * P,
            "h": _address(finals[0][r]),
            "h_mask": 0 if task.h_mask is None else _address(task.h_mask[r]),
            "operand": _address(operand),
            "b_hh": _address(b_hh),
        }
        for k, extra in enumerate(kept[r].extras):
            own[f"extra_{k}"] = _address(row if extra is None else extra)
            own[f"extra_{k}_stride"] = 0 if extra is None else H
        for k, weight in enumerate(packed[r]):
            own[f"w_{k}"] = _address(weight)
        for k, unit in enumerate(w.units):
            own[f"unit_{k}"] = _address(unit)
        for k, final in enumerate(finals[1:]):
            own[f"c_{k}"] = _address(final[r])
            own[f"c_{k}_all"] = _address(row)
            if along:
                own[f"c_{k}_all"] = _address(along[k]) + r * H * task.itemsize
                own[f"c_{k}_stride"] = task.R * H
        made = []
        if task.zone:
            made = [
                # where nobody takes it as the text gave it, or a later phase alone
                (task.new(capacity, H) if to_later else row) if buffer is None else buffer
                for buffer, to_later in zip((m, *kept[r].made), handed, strict=True)
            ]
            for k, buffer in enumerate(made):
                own[f"made_{k}"] = _address(buffer)
                own[f"made_{k}_stride"] = 0 if buffer is row else H
            own |= task.zone_slots(r)
        return own, (s, x, row, bias, b_hh, operand, made)

    task.run(forward_kernel(cell, task.np_dtype, task.zone), fill)
    return kept


def _given_product(task: _Task, r: int) -> Tensor | None:
    """h_0 W_hh^T of a single step: torch's product reads the weights once, packing them twice."""
    w_hh = _single_step_weight(task, r)
    return None if w_hh is None else torch.mm(task.states[0][r], w_hh.t())


def _single_step_weight(task: _Task, r: int) -> Tensor | None:
    """W_hh where its only product is that of a single dense step, else None."""
    single = (
        task.rows.T == 1
        and not task.rows.ragged
        and task.reset is None
        and task.h_mask is None
        and len(task.cell.phases) == 1
    )
    return task.weights[r].w_hh if single else None


def _rebuild(task: _Task, y: Tensor) -> tuple[list[_Kept], list[Tensor]]:
    """What 'full' would have saved, from y alone: all products in one GEMM, then a pointwise walk.

    A cell with a second product, which needs the result of the first, walks forward again.
    """
    finals = [s.clone() for s in task.states]
    along = [task.new(task.rows.capacity, task.R * task.H) for _ in task.cell.other_states]
    again = task.new(task.rows.capacity, task.R * task.P)
    products: list[Tensor | None] = [None] * task.R
    if len(task.cell.phases) == 1:
        for r, w in enumerate(task.weights):
            if w.w_hh is not None:
                products[r] = task.product(task.previous_h(r, y), w.w_hh.t())
    return _walk_forward(task, again, finals, along, True, products), along


def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    task = _Task(call)
    cell, N, H, P, R = task.cell, task.rows.N, task.H, task.P, task.R
    B, dtype, capacity = task.B, task.dtype, task.rows.capacity
    y = _wide(result.y, dtype).reshape(capacity, R * P)
    # an Elman cell keeps its output alone either way: nothing to make again
    projected = call.weights[0].w_hr is not None
    makes_again = cell.other_states or cell.keeps_gates(projected) or any(task.made)
    if call.memory == "lean" and makes_again:
        kept, along = _rebuild(task, y)
    else:
        rest = list(result.saved)
        kept = [_kept(call, rest) for _ in task.weights]
        along = [c.reshape(capacity, R * H) for c in rest or result.trajectory]

    dy = None if grads.y is None else _wide(grads.y, dtype).reshape(capacity, R * P)
    dalong = [
        None if g is None else _wide(g, dtype).reshape(capacity, R * H) for g in grads.trajectory
    ]
    dstates = [
        torch.zeros_like(s)
        if g is None
        else g.to(dtype).clone(memory_format=torch.contiguous_format)
        for s, g in zip(task.states, grads.states, strict=True)
    ]
    dgates = [task.new(N, cell.G * H) for _ in range(R)]
    dproduct = [task.new(N, cell.G_hh * H) if cell.parts_differ else dgates[r] for r in range(R)]
    dh_all = [None if w.w_hr is None else task.new(N, P) for w in task.weights]
    single = [_single_step_weight(task, r) for r in range(R)]
    packed = [
        [None] * len(cell.phases) if single[r] is not None else task.products(r, False)
        for r in range(R)
    ]
    projections = [
        None if w.w_hr is None else task.packed(w.w_hr, transposed=False) for w in task.weights
    ]
    dunits: list[list[Tensor]] = [[] for _ in range(R)]
    zeros = task.x.new_zeros(max(H, 1))

    def fill(r: int, first: int, last: int) -> tuple[dict[str, int], Any]:
        w = task.weights[r]
        rows = max(last - first, 1)
        dunit = task.x.new_zeros(LEVELS, len(w.units) * H) if w.units else None
        if dunit is not None:
            dunits[r].append(dunit)
        dm = task.new(rows, H) if w.w_hr is not None else None
        dhanded = [task.new(rows, H) for _ in cell.handed_on]
        operand = None if task.h_mask is None else task.new(B, P)
        left = [task.new(rows, H) for _ in cell.states if task.zone and len(cell.phases) > 1]
        own = {
            "x": _address(kept[r].gates),
            "w_hr": _address(projections[r]),
            "y": _address(y) + r * P * task.itemsize,
            "y_stride": R * P,
            "h_mask": 0 if task.h_mask is None else _address(task.h_mask[r]),
            "operand": _address(operand),
            "m": _address(kept[r].m),
            "dgates": _address(dgates[r]),
            "dproduct": _address(dproduct[r]),
            "h_0": _address(task.states[0][r]),
            "zeros": _address(zeros),
            "dy": _address(zeros) if dy is None else _address(dy) + r * P * task.itemsize,
            "dy_stride": 0 if dy is None else R * P,
            "dh": _address(dstates[0][r]),
            "dh_all": _address(dh_all[r]),
            "dm": _address(dm),
            "dunit": _address(dunit),
        }
        for k, extra in enumerate(kept[r].extras):
            own[f"extra_{k}"], own[f"extra_{k}_stride"] = _address(extra), H
        for k, d in enumerate(dhanded):
            own[f"dhanded_{k}"] = _address(d)
        for k, weight in enumerate(packed[r]):
            own[f"w_{k}"] = _address(weight)
        for k, unit in enumerate(w.units):
            own[f"unit_{k}"] = _address(unit)
        for k in range(len(cell.other_states)):
            d_all = dalong[k] if dalong else None
            own[f"c_{k}_0"] = _address(task.states[1 + k][r])
            own[f"c_{k}_all"] = _address(along[k]) + r * H * task.itemsize
            own[f"c_{k}_stride"] = R * H
            own[f"dc_{k}"] = _address(dstates[1 + k][r])
            own[f"dc_{k}_all"] = _address(zeros)
            if d_all is not None:
                own[f"dc_{k}_all"] = _address(d_all) + r * H * task.itemsize
                own[f"dc_{k}_all_stride"] = R * H
        if task.zone:
            own |= task.zone_slots(r)
            own |= {f"left_{k}": _address(buffer) for k, buffer in enumerate(left)}
            # a state that is not zoned out is as it was carried
            carried = [("y", "y_stride")]
            carried += [(f"c_{k}_all", f"c_{k}_stride") for k in range(len(cell.other_states))]
            for k, buffer in enumerate((kept[r].m, *kept[r].made)):
                place, stride = carried[k]
                own[f"made_{k}"] = own[place] if buffer is None else _address(buffer)
                own[f"made_{k}_stride"] = own[stride] if buffer is None else H
        return own, (dm, dhanded, operand, left)

    task.run(backward_kernel(cell, task.np_dtype, task.zone), fill)
    for r, w_hh in enumerate(single):
        if w_hh is not None:
            dh = torch.mm(dproduct[r], w_hh)
            dstates[0][r] = dstates[0][r] + dh if cell.reads_h or task.zone else dh

    out = call.x.dtype
    dx = None
    if wanted.x:
        total = task.product(dgates[0], task.weights[0].w_ih)
        for r in range(1, R):
            total += task.product(dgates[r], task.weights[r].w_ih)
        if capacity > N:
            total = torch.cat([total, total.new_zeros((capacity - N, total.shape[1]))])
        dx = total.view(call.x.shape).to(out)
    dweights = None
    if wanted.weights:
        dweights = [
            _weight_gradients(
                task, r, y, kept[r], dgates[r], dproduct[r], dh_all[r], dunits[r], out
            )
            for r in range(R)
        ]
    return Gradients(dx, [d.to(out) for d in dstates] if wanted.states else None, dweights)


def _weight_gradients(
    task: _Task,
    r: int,
    y: Tensor,
    kept: _Kept,
    dgates: Tensor,
    dproduct: Tensor,
    dh_all: Tensor | None,
    dunits: list[Tensor],
    dtype: torch.dtype,
) -> Weights:
    """The large GEMMs and the reductions, once backward has walked."""
    cell, w, H, N = task.cell, task.weights[r], task.H, task.rows.N
    dw_hh = None
    if w.w_hh is not None:
        parts = []
        for phase in cell.products:
            first, last = cell.product_rows(phase)
            d = dproduct[:, first * H : last * H]
            if phase.operand == "h_prev":
                parts.append(_recurrent_gradient(task, r, y, d))
            else:
                parts.append(task.product(d.t(), _operand(cell, kept, phase.operand, H)[:N]))
        dw_hh = parts[0] if len(parts) == 1 else torch.cat(parts)
    # one accumulator a task, summed in the order of the tasks; none where there was no step
    sums = [d.sum(0).view(len(w.units), H) for d in dunits]
    units = tuple(
        sum((d[k] for d in sums), torch.zeros_like(u)).to(dtype) for k, u in enumerate(w.units)
    )
    db_ih = None if w.b_ih is None else dgates.sum(0).to(dtype)
    db_hh = None
    if w.b_hh is not None:
        same = dproduct is dgates and db_ih is not None
        db_hh = db_ih.clone() if same else dproduct.sum(0).to(dtype)  # type: ignore[union-attr]
    dw_hr = None
    if dh_all is not None and kept.m is not None:
        dw_hr = task.product(dh_all.t(), kept.m[:N]).to(dtype)
    return Weights(
        task.product(dgates.t(), task.x).to(dtype),
        None if dw_hh is None else dw_hh.to(dtype),
        db_ih,
        db_hh,
        dw_hr,
        units,
    )


def _operand(cell: Cell, kept: _Kept, name: str, H: int) -> Tensor:
    """What a phase multiplied, of an earlier phase's values, (capacity, H)."""
    k = cell.saved.index(name)
    found = kept.extras[k - cell.G] if k >= cell.G else kept.gates
    assert found is not None
    return found if k >= cell.G else found[:, k * H : (k + 1) * H]


def _recurrent_gradient(task: _Task, r: int, y: Tensor, d: Tensor) -> Tensor:
    """d^T h_{t-1}. Dense rows need no copy: h_{t-1} is y one step away, and h_0 at the edge."""
    if task.rows.ragged or task.reset is not None or task.h_mask is not None:
        return task.product(d.t(), task.previous_h(r, y))
    h, B = y[:, r * task.P : (r + 1) * task.P], task.rows.alive
    h_0, last = task.states[0][r], len(d) - B
    edge, rest, past = slice(0, B), slice(B, None), h[:last]
    if task.call.reverse[r]:
        edge, rest, past = slice(last, None), slice(0, last), h[B:]
    if last and not task.call.states:  # h_0 is zero
        return task.product(d[rest].t(), past)
    gradient = torch.mm(d[edge].t(), h_0)
    return gradient.add_(task.product(d[rest].t(), past)) if last else gradient
