"""Fused loops over time for GPUs, in Triton.

One GEMM (torch's) makes the input product of all steps. Kernels of :mod:`.triton_kernels` then walk
time and write the gates over it: in one launch, of programs that need nobody where a recurrence's
weights fit on the chip beside a tile of the batch, of programs that wait for one another where not,
or in a launch for each step (:mod:`.triton_tiling`). Backward walks once more and leaves the gate
gradients, from which large GEMMs make the gradients of x and of the weights.

Numerics. float16 and bfloat16: y, the states at the ends, saved gates and gate gradients in that
type; gate arithmetic, and the carried and saved states other than h, in float32. float32 obeys
``torch.backends.cudnn.rnn.fp32_precision`` in the products of the loop and around it. No atomics on
numbers, only on a count of arrivals: two identical calls agree bit for bit.

Memory. Training keeps, per row and recurrence, G*H gates (Elman's cells none), each further saved
value and each state other than h; with ``memory="lean"`` y alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from itertools import compress
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from ..cells import CELLS, Cell
from . import faults, triton_masks
from .contract import Abilities, Call, Gradients, OutputGradients, Problem, Result, Wanted
from .gpu_layer import Layer, Precision, products_as
from .layout import as_made, declined_anywhere, zoned
from .layout import side_by_side as saved_layout
from .stacked import in_one_call
from .triton_kernels import INTERPRETED, PREVIOUS_H, ROUND, ROUNDS, kernel, unreadable
from .triton_source import handed_states
from .triton_text import Pieces, Zoned, taken_names
from .triton_tiling import (
    LEAST,
    Device,
    Form,
    Tiling,
    aligned,
    pieces_of,
    pointwise_tiling,
    programs,
    tiling,
)

__all__ = ["backward", "forward", "saved_layout", "supports", "unavailable"]

ABILITIES = Abilities(zoneout=True)
#: How often a program looks for the others at a meeting before it goes on with NaN: some seconds.
_PATIENCE = 1 << 24
_larger: Form = "grid"
_TL = {torch.float32: tl.float32, torch.float64: tl.float64}
#: Integers as wide as the layer's numbers. Triton lays out what a product takes for the narrowest
#: type that is loaded on the way to it, if only for a mask: for bytes, several numbers of float32
#: to a thread, more than 16 inner units are. Its products were wrong then, without a word.
_AS_WIDE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def unavailable() -> str | None:
    if INTERPRETED or torch.cuda.is_available():
        return None
    return (
        "torch sees no CUDA or ROCm device; TRITON_INTERPRET=1 runs the kernels in NumPy on the "
        "CPU, for tests alone"
    )


def supports(problem: Problem) -> str | None:
    if problem.device == "cpu" and not INTERPRETED:
        return (
            "triton's kernels run on a GPU, not on cpu; TRITON_INTERPRET=1 in the environment runs "
            "them there in NumPy, for tests alone"
        )
    if problem.device not in ("cpu", "cuda", "meta"):
        return f"triton's kernels run on CUDA and ROCm devices, not on {problem.device}"
    return declined_anywhere("triton", problem) or _unspeakable(CELLS[problem.cell])


@lru_cache(maxsize=256)
def _unspeakable(cell: Cell) -> str | None:
    """Why no kernel can be written from a declaration."""
    names = taken_names(cell)
    if names:
        return (
            f"triton's kernels call something of their own {', '.join(names)}, as {cell.called} "
            "does; rename it in the cell"
        )
    text = unreadable(cell)
    if text:
        return f"triton compiles from source, and that of {text} cannot be read; write it in a file"
    return None


@contextmanager
def larger_as(form: Form) -> Iterator[None]:
    """Sizes that no single program holds run as "grid" or "step", in the whole process: for tests
    and measurements."""
    global _larger
    before, _larger = _larger, form
    try:
        yield
    finally:
        _larger = before


@contextmanager
def patience(looks: int) -> Iterator[None]:
    """How often a program of a grid looks for the others before it gives up, in the whole process:
    for tests and measurements."""
    global _PATIENCE
    before, _PATIENCE = _PATIENCE, looks
    try:
        yield
    finally:
        _PATIENCE = before


def _flags(reverse: tuple[bool, ...], device: torch.device) -> Tensor:
    """(R,), not 0 where a recurrence runs backward.

    Written on the device, by each call: a CUDA graph records no copy from the host, and a tensor
    that outlives its call may lie in the memory of a graph that warms up, and be written over.
    """
    flags = torch.zeros(len(reverse), dtype=torch.int32, device=device)
    if reverse == (False, True) * (len(reverse) // 2):
        flags[1::2].fill_(1)
    else:
        for r in range(len(reverse)):
            if reverse[r]:
                flags[r].fill_(1)
    return flags


@lru_cache(maxsize=64)
def _properties(device: torch.device) -> Device:
    if device.type != "cuda":  # the interpreter: as the smallest
        return Device(65536)
    if torch.version.hip is not None:
        return Device(65536, 64)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        processors=properties.multi_processor_count,
        hopper=properties.major == 9,
    )


def _precision(dtype: torch.dtype, device: torch.device) -> Precision:
    """How float32 products are made: as torch.nn's layers make them on a GPU.

    "ieee" on tensor cores is three products of parts in TF32, right to 2^-22 of each product.
    """
    if dtype is not torch.float32:
        return "ieee"
    if torch.backends.cudnn.rnn.fp32_precision == "tf32":  # type: ignore[attr-defined]
        return "tf32"
    nvidia = device.type == "cuda" and torch.version.hip is None
    return "tf32x3" if nvidia and torch.cuda.get_device_capability(device) >= (8, 0) else "ieee"


class _Task(Layer):
    """One call as the kernels take it."""

    def __init__(self, call: Call) -> None:
        super().__init__(call, _precision(call.x.dtype, call.x.device))
        self.tiling = self.tiled(_larger)
        self.values: dict[str, Any] = {
            "T": self.T,
            "B": self.B,
            "R": self.R,
            "H": self.H,
            "P": self.P,
            "capacity": self.capacity,
            "WIDE": _TL[self.wide],
            "PRECISION": self.precision,
            "SAVE": False,
            **self.tiling.blocks(),
            "reverse_ptr": _flags(tuple(call.reverse), self.device),
            "lengths_ptr": self.lengths,
            "offsets_ptr": self.offsets,
            "h_mask_ptr": None if call.h_mask is None else call.h_mask.contiguous(),
            "reset_ptr": None
            if call.reset is None
            else call.reset.contiguous().to(_AS_WIDE[self.dtype.itemsize]),
            "w_hh_ptr": self.recurrent_weights(),
            "w_hr_ptr": self.projection_weights(),
            "b_hh_ptr": self.stacked([w.b_hh for w in call.weights]),
            "unit_ptr": self.units(),
        }
        for k, state in enumerate(self.cell.states):
            self.values[f"{state}_0_ptr"] = call.states[k].contiguous() if call.states else None
        which = tuple(compress(self.cell.states, zoned(call)))
        self.zoned = Zoned(which, not call.part)
        self.values["part_ptr"] = self.parts()
        for state, stay in zip(self.cell.states, call.stay, strict=False):
            bytes = None if stay is None else stay.contiguous().view(torch.uint8)
            self.values[f"stay_{state}_ptr"] = bytes

    def parts(self) -> Tensor | None:
        """(states,), how much of each stays; written on the device, as the flags are."""
        if not self.call.part:
            return None
        parts = torch.empty(len(self.call.part), dtype=self.wide, device=self.device)
        for k, part in enumerate(self.call.part):
            parts[k].fill_(part)
        return parts

    def tiled(self, larger: Form) -> Tiling:
        P = self.P if self.projected else None
        sizes = (self.H, P, self.dtype, self.precision, self.B, self.R)
        return tiling(self.cell, *sizes, _properties(self.device), larger)

    @property
    def aligned(self) -> bool:
        return aligned(self.H, self.P)

    def pieces(self, backward: bool) -> Pieces | None:
        """How the programs of a grid hold their weights, if they do."""
        if not self.tiling.resident:
            return None
        sizes = (self.H, self.P if self.projected else None, self.tiling, self.dtype.itemsize)
        return pieces_of(self.cell, *sizes, backward, _properties(self.device))

    def rounded(self, tensor: Tensor) -> Tensor:
        """A copy, to the nearest numbers of TF32, where products are made in that."""
        if self.precision != "tf32" or not ROUNDS:
            return tensor
        n, out = tensor.numel(), torch.empty_like(tensor)
        values = {"x_ptr": tensor, "out_ptr": out, "n": n, "PRECISION": "tf32", "BLOCK": 1024}
        ROUND((-(-n // 1024),), values, {})
        return out

    def recurrent_weights(self) -> Tensor | None:
        """(R, G_hh, H, P); for a walk (R, G_hh, BLOCK_H, BLOCK_P), with zeros around.

        Masks, and loads of single elements where H is odd, took more registers than there are.
        """
        t, w_hh = self.tiling, self.stacked([w.w_hh for w in self.call.weights])
        if w_hh is None:
            return None
        w_hh = self.rounded(w_hh)
        if t.form != "walk":
            return w_hh
        w_hh = w_hh.view(self.R, -1, self.H, self.P)
        return pad(w_hh, (0, t.block_p - self.P, 0, t.block_h - self.H))

    def projection_weights(self) -> Tensor | None:
        """(R, P, H); for a walk (R, BLOCK_P, BLOCK_H)."""
        t, w_hr = self.tiling, self.stacked([w.w_hr for w in self.call.weights])
        if w_hr is None:
            return None
        w_hr = self.rounded(w_hr)
        if t.form != "walk":
            return w_hr
        w_hr = w_hr.view(self.R, self.P, self.H)
        return pad(w_hr, (0, t.block_h - self.H, 0, t.block_p - self.P))

    def final_states(self) -> list[Tensor]:
        """Where the kernels leave the states, and, in parts, carry them, from the first on."""
        in_parts = self.tiling.form != "walk"
        finals = [self.state(self.P, self.dtype)]
        others = self.cell.other_states
        finals += [self.state(self.H, self.wide if in_parts else self.dtype) for _ in others]
        if in_parts:
            for final, state in zip(finals, self.cell.states, strict=True):
                start = self.values[f"{state}_0_ptr"]
                final.copy_(start) if start is not None else final.zero_()
            mask = self.values["h_mask_ptr"]
            h = finals[0] if mask is None else (finals[0] * mask).to(self.dtype)
            h = self.rounded(h)
            self.values["operand_ptr"] = torch.stack([h, h])
        return finals

    def launch(self, kind: str, grid: tuple[int, int, int], k: Any = None, **values: Any) -> None:
        if min(grid) == 0:
            return
        run = kernel(self.cell, kind, self.projected, k, self.zoned)
        run(grid, self.values | values, self.tiling.options())

    def tiles(self, B: int, width: int) -> tuple[int, int, int]:
        t = self.tiling
        return triton.cdiv(B, t.block_b), self.R, triton.cdiv(width, t.block_h)

    def walk_forward(self) -> None:
        if self.tiling.form == "walk":
            self.launch("forward_walk", self.tiles(self.B, self.H), self.aligned)
        elif self.tiling.form == "step" or not self.launch_together("forward_grid"):
            widths = [self.H] * len(self.cell.phases) + [self.P] * self.projected
            for step in range(self.T):
                rows = self.sizes[step]
                if any(self.call.reverse):
                    rows = max(rows, self.sizes[self.T - 1 - step])
                for k, width in enumerate(widths):
                    self.launch("forward_step", self.tiles(rows, width), k, step=step)

    def walk_backward(self) -> None:
        if self.tiling.form == "walk":
            self.launch("backward_walk", self.tiles(self.B, self.H), self.aligned)
        elif self.tiling.form == "step" or not self.launch_together("backward_grid"):
            widths = [self.P] * self.projected + [self.H] * len(self.cell.phases)
            for step in range(self.T + 1):
                around = self.sizes[max(step - 1, 0) : step + 1] if any(self.call.reverse) else []
                around = around + self.sizes[max(self.T - 1 - step, 0) : self.T + 1 - step]
                rows = max(around, default=0)
                # the last step gives the gradient of h_0, which the first part makes
                for k, width in enumerate(widths if step < self.T else widths[:1]):
                    self.launch("backward_step", self.tiles(rows, width), k, step=step)

    def launch_together(self, kind: str) -> bool:
        """One launch, of programs that wait for one another; whether the driver started them.

        The count of arrivals belongs to this launch alone, whatever runs beside it.
        """
        tiles, R, columns = self.tiles(self.B, max(self.H, self.P))
        grid = (programs(tiles, R * columns, _properties(self.device).processors), R, columns)
        counter = torch.zeros(grid[0] * R * 16, dtype=torch.int64, device=self.device)
        if self.T == 0:  # what is carried stays as it is
            return True
        try:
            values = {"tiles": tiles, "patience": _PATIENCE, "counter_ptr": counter}
            values["fault"] = faults.code(f"triton's kernel {self.cell.name}_{kind}")
            values["fault_ptr"] = faults.flag(self.device)
            self.launch(kind, grid, self.pieces(kind == "backward_grid"), **values)
        except RuntimeError as error:  # "too many blocks in cooperative launch": a part of a GPU
            if "cooperative" not in str(error):
                raise
            self.tiling = self.tiled("step")
            self.values |= self.tiling.blocks()
        return self.tiling.form == "grid"

    def previous_h(self, y: Tensor) -> Tensor:
        """What w_hh multiplied at every row, (N, R, P)."""
        out = torch.empty((self.N, self.R, self.P), dtype=self.dtype, device=self.device)
        tiles = triton.cdiv(max(self.sizes, default=0), LEAST)
        if tiles and self.P:
            values = {"out_ptr": out, "y_ptr": y, "tiles": tiles, "BLOCK_B": LEAST, "BLOCK_P": 64}
            PREVIOUS_H((self.T * tiles, self.R), self.values | values, {"num_warps": 4})
        return out


def _kept(task: _Task, full: bool) -> dict[str, Tensor]:
    """Buffers beside the gates, for backward, which the kernels are given. Parts of a step hand
    values on through them, and some through buffers that backward does not want."""
    cell, width = task.cell, task.R * task.H
    in_parts = task.tiling.form != "walk"
    kept: dict[str, Tensor] = {}
    handed: dict[str, Tensor] = {}
    if cell.extras and (full or (in_parts and len(cell.phases) > 1)):
        kept["extra"] = task.rows(len(cell.extras) * width)
    if task.projected and (full or in_parts):
        kept["m"] = task.rows(width)
    for state, wanted in zip(cell.states, as_made(task.call), strict=True):
        hands_on = in_parts and state in task.zoned.states and state in handed_states(cell)
        if ((full and wanted) or hands_on) and not _is_m(task, state):
            rows = task.rows(width, task.dtype if state == "h" else task.wide)
            (kept if wanted else handed)[f"{state}_unzoned"] = rows
    names = ("extra", "m", *(f"{state}_unzoned" for state in cell.states))
    task.values |= {f"{name}_ptr": (kept | handed).get(name) for name in names}
    return kept


def _is_m(task: _Task, state: str) -> bool:
    """Whether a state as the text gave it is m: h, where it is projected."""
    return state == "h" and task.projected


@torch.no_grad()
def forward(call: Call, save: bool, trajectory: bool) -> Result:
    faults.raise_if_set(call.x.device)
    task = _Task(call)
    full = save and call.memory == "full"
    others = task.cell.other_states
    with task.on_device():
        y = task.padded(task.rows(task.R * task.P))
        finals = task.final_states()
        along = []
        if full or trajectory:
            along = [task.rows(task.R * task.H, task.wide if full else task.dtype) for _ in others]
        kept = _walk_forward(task, y, finals, [task.padded(a) for a in along], full)

    return task.result(y, finals, kept, along, full, trajectory)


def _walk_forward(
    task: _Task, y: Tensor, finals: list[Tensor], along: list[Tensor], full: bool
) -> list[Tensor]:
    """Fill y, the final states and those along the way; what backward wants beside them."""
    cell = task.cell
    gates = task.input_product()
    kept = _kept(task, full)
    keeps_gates = cell.keeps_gates(task.projected)
    task.values |= {"gates_ptr": gates, "y_ptr": y, "SAVE": full and keeps_gates}
    for k, (state, final) in enumerate(zip(cell.states, finals, strict=True)):
        task.values[f"{state}_n_ptr"] = final
        if k:
            task.values[f"{state}_all_ptr"] = along[k - 1] if along else None
    task.walk_forward()
    if not full:
        return []
    return [gates, *kept.values()] if keeps_gates else list(kept.values())


def _rebuild(call: Call, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What 'full' would have saved, from y alone: all products in one GEMM, then a pointwise walk.

    A cell with a second product, which needs the result of the first, walks forward again.
    """
    task = _Task(call)
    cell, R, H = task.cell, task.R, task.H
    along = [task.rows(R * H, task.wide) for _ in cell.other_states]
    if not saved_layout(replace(call, memory="full"), task.lead, False):
        return [], []
    if len(cell.phases) > 1:
        y = task.rows(R * task.P)
        return _walk_forward(task, y, task.final_states(), along, True), along
    task.tiling = pointwise_tiling(H, task.dtype, _properties(task.device))
    task.values |= task.tiling.blocks()
    kept = _kept(task, True)
    gates = task.input_product()
    if cell.recurrent_gates:
        h = task.previous_h(y)
        with products_as(task.precision, task.device):
            parts = [
                torch.mm(h[:, r], w.w_hh.t())
                for r, w in enumerate(call.weights)
                if w.w_hh is not None
            ]
        task.values["s_ptr"] = parts[0] if R == 1 else torch.stack(parts, 1)
    task.values |= {"gates_ptr": gates, "SAVE": True}
    for state, every in zip(cell.other_states, along, strict=True):
        task.values[f"{state}_all_ptr"] = every
    task.launch("forward_given", task.tiles(task.B, H), task.aligned)
    keeps = [gates] if cell.keeps_gates(task.projected) else []
    return [*keeps, *kept.values()], along


@torch.no_grad()
def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    faults.raise_if_set(call.x.device)
    task = _Task(call)
    task.check(result, grads)
    with task.on_device():
        return _backward(task, result, grads, wanted)


stacks, layers, layers_backward = in_one_call(forward, backward)
keep = triton_masks.keep


def _backward(task: _Task, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    call, cell, R, H, N = task.call, task.cell, task.R, task.H, task.N
    G, G_hh, U = cell.G, cell.G_hh, len(cell.unit_parameters)
    y = result.y.contiguous()
    if call.memory == "lean":
        rest, along = _rebuild(call, y)
    else:
        rest, along = task.kept(result)
    gates = rest.pop(0) if cell.keeps_gates(task.projected) else None
    extra = rest.pop(0) if cell.extras else None
    m = rest.pop(0) if task.projected else None
    made = [s for s in compress(cell.states, as_made(call)) if not _is_m(task, s)]
    as_given = {f"{s}_unzoned_ptr": rest.pop(0) for s in made}

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=task.device)

    dgates = new(N, R, G * H, dtype=task.dtype)
    dproduct = new(N, R, G_hh * H, dtype=task.dtype) if cell.parts_differ else dgates
    handed = None
    if task.precision == "tf32" and task.tiling.resident:
        handed = new(2, R, task.B, G_hh * H, dtype=task.dtype)
    waits = any(name in cell.extras for name in cell.handed_on)
    dextra = new(N, R, len(cell.extras) * H, dtype=task.wide) if waits else None
    dh_all = new(N, R, task.P, dtype=task.dtype) if task.projected else None
    tiles = triton.cdiv(task.B, task.tiling.block_b)
    dunit = new(tiles, R, U, H, dtype=task.wide).zero_() if U else None
    task.values |= {
        "y_ptr": y,
        "gates_ptr": gates,
        "extra_ptr": extra,
        "m_ptr": m,
        "dextra_ptr": dextra,
        "dgates_ptr": dgates,
        "dproduct_ptr": dproduct,
        "handed_ptr": handed,
        "dh_all_ptr": dh_all,
        "dunit_ptr": dunit,
        "dy_ptr": None if grads.y is None else grads.y.contiguous(),
        **as_given,
    }
    for s in task.zoned.states if len(cell.phases) > 1 else ():
        task.values[f"d{s}_later_ptr"] = new(R, task.B, H, dtype=task.wide).zero_()
    dstates = []
    for k, (state, given) in enumerate(zip(cell.states, grads.states, strict=True)):
        # what the kernels carry: the gradient of the final state first, that of the initial last
        carried = new(R, task.B, H if k else task.P, dtype=task.wide)
        dstates.append(carried.copy_(given) if given is not None else carried.zero_())
        task.values[f"d{state}_ptr"] = dstates[-1]
        if k:
            d = grads.trajectory[k - 1] if grads.trajectory else None
            task.values[f"{state}_all_ptr"] = along[k - 1]
            task.values[f"d{state}_all_ptr"] = None if d is None else d.contiguous()
    task.walk_backward()

    biased = any(w.b_ih is not None or w.b_hh is not None for w in call.weights)
    operands: dict[str, Tensor] = {}
    if wanted.weights:
        operands = _operands(task, task.previous_h(y) if cell.masks_h else None, gates, extra)

    def recurrent(r: int) -> Tensor | None:
        product = dproduct[:, r]
        dw_hh = [
            torch.mm(product[:, first * H : last * H].t(), operands[phase.operand][:, r])
            for phase, (first, last) in ((p, cell.product_rows(p)) for p in cell.products)
        ]
        return torch.cat(dw_hh) if len(dw_hh) > 1 else dw_hh[0]

    def projection(r: int) -> Tensor | None:
        if dh_all is None or m is None:
            return None
        rows = m.view(task.capacity, R, H)[:N, r]
        return torch.mm(dh_all.view(N, R, task.P)[:, r].t(), rows)

    def biases(r: int) -> tuple[Tensor, Tensor]:
        db_ih = dgates[:, r].sum(0)
        # a gradient is nobody else's memory
        return db_ih, db_ih.clone() if dproduct is dgates else dproduct[:, r].sum(0)

    dunits = None if dunit is None else dunit.sum(0).to(task.dtype)
    dx, dweights = task.gradients(
        wanted, dgates, biases if biased else None, recurrent, projection, dunits
    )
    states = [d.to(task.dtype) for d in dstates] if wanted.states else None
    return Gradients(dx, states, dweights)


def _operands(
    task: _Task, h: Tensor | None, gates: Tensor | None, extra: Tensor | None
) -> dict[str, Tensor]:
    """What each phase's product multiplied, (N, R, ...)."""
    cell, lead = task.cell, (task.capacity, task.R)
    found = {} if h is None else {"h_prev": h}
    for phase in cell.phases:
        name = phase.operand
        if name in cell.extras and extra is not None:
            values = extra.view(*lead, len(cell.extras), task.H)
            found[name] = values[: task.N, :, cell.extras.index(name)]
        elif name in cell.saved and gates is not None:
            values = gates.view(*lead, cell.G, task.H)
            found[name] = values[: task.N, :, cell.saved.index(name)]
    return found
