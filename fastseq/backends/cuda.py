"""Fused loops over time for NVIDIA GPUs in CUDA C++, from ``csrc/cuda/``: the extension module
``fastseq._cuda``, which carries them as binaries for the driver.

One GEMM (torch's) makes the input product of all steps. A CTA then owns eight sequences of one
recurrence and walks all of time, its weights in registers and shared memory
(:mod:`.cuda_plan` says which problems it holds, and how). Backward walks once more and leaves the
gate gradients, from which large GEMMs make the gradients of x and of the weights.

Numerics. float16 and bfloat16: y, the states at the ends, saved gates and gate gradients in that
type; gate arithmetic, sums, and the carried and saved states other than h, in float32. float32
obeys ``torch.backends.cudnn.rnn.fp32_precision`` in the products of the loop and around it: TF32,
or four products of TF32 parts, right to 2^-22 of each. No atomics: two identical calls agree bit
for bit.

Memory. Training keeps, per row and recurrence, G*H gates (Elman's cells none), each further saved
value and each state other than h; with ``memory="lean"`` y alone, and backward walks forward again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cells import Cell
from . import faults
from .contract import Abilities, Call, Gradients, OutputGradients, Problem, Result, Wanted
from .cuda_kernels import (
    H100,
    MOST_OF_A_CLUSTER,
    PREVIOUS_THREADS,
    TEAMS,
    Device,
    Kernel,
    Regime,
    Way,
    device_of,
    kernel_of,
    rows_of_a_cta,
    unit_tiles,
)
from .cuda_plan import Precision, decline, plan, regime_of
from .cuda_teams import Arrangement, arrange, declined
from .gpu_layer import Layer
from .layout import declined_anywhere
from .layout import side_by_side as saved_layout
from .stacked import in_one_call

FOLDER = Path(__file__).parents[1]
try:
    from .. import _cuda  # type: ignore[attr-defined]

    if not (FOLDER.is_dir() and FOLDER.samefile(Path(_cuda.__file__).parent)):
        raise ImportError(f"{_cuda.__file__} belongs to another fastseq")
except ImportError as error:
    note = FOLDER / "_cuda.txt"  # setup.py's
    why = note.read_text().strip() if note.exists() else error
    raise ImportError(f"fastseq was built without its CUDA kernels: {why}") from error

__all__ = ["backward", "explain", "forward", "saved_layout", "supports", "unavailable"]

ABILITIES = Abilities()
#: What a kernel is given, in this order: csrc/cuda/arguments.h.
FIELDS = (
    "T B R H rows tile first start team reverse save lengths offsets gates extra y c_all h_0 c_0 "
    "h_n c_n w_hh b_hh unit reset h_mask dy dc_all dh_n dc_n dh_0 dc_0 dgates dproduct dbias dunit "
    "packets fault code patience"
).split()
#: What the extension's functions say of themselves: one that was built from other sources may take
#: and give something else.
SIGNATURES = {
    "launch": "(name, device, stream, (x, y, z), threads, shared, arguments, cluster, together)",
    "occupancy": "(name, device, threads, shared) -> CTAs of a multiprocessor",
    "clusters": "(name, device, size, threads, shared) -> clusters on the device at once",
}
#: The driver that runs what nvcc 13 makes.
DRIVER = 580
DEVICES = ("cuda", "meta")
#: Steps' directions are bits of one number.
_DIRECTIONS = 32
#: How often a CTA looks for what others hand to it before it gives up: some seconds.
_patience = {"cluster": 1 << 20, "grid": 1 << 24}
#: In which regime all layers run, of tests and measurements; None: as planned.
_asked: Regime | None = None
_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
_pack = struct.Struct(f"<{len(FIELDS)}q").pack


def unavailable() -> str | None:
    found = {name: getattr(getattr(_cuda, name, None), "__doc__", None) for name in SIGNATURES}
    if _cuda.fields().split() != FIELDS or found != SIGNATURES:
        return (
            "the CUDA kernels were built from the sources of another version of fastseq; build them"
            " again: make build, or pip install ."
        )
    driver = _cuda.driver()
    if isinstance(driver, str):
        return f"{driver}; an NVIDIA driver of {DRIVER} or newer is needed"
    if driver // 1000 < _cuda.toolkit() // 1000:
        return (
            f"the NVIDIA driver runs CUDA {driver // 1000}.{driver % 1000 // 10}, and the kernels "
            f"were built with CUDA {_cuda.toolkit() // 1000}; a driver of {DRIVER} or newer is "
            "needed"
        )
    if torch.version.hip is not None or not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def supports(problem: Problem) -> str | None:
    if problem.device not in DEVICES:
        return f"cuda's kernels run on NVIDIA GPUs, not on {problem.device}"
    return declined_anywhere("cuda", problem) or decline(
        problem, device_at_hand(), _precision(problem.tf32)
    )


def explain(problem: Problem) -> str:
    """How a problem that it supports runs."""
    return str(plan(problem, device_at_hand(), _precision(problem.tf32), regime=_asked))


@contextmanager
def larger_as(regime: Regime) -> Iterator[None]:
    """Layers run in this regime, whatever the plan says; for tests and measurements.

    A layer that the regime does not hold raises where it is launched.
    """
    global _asked
    before, _asked = _asked, regime
    try:
        yield
    finally:
        _asked = before


@contextmanager
def patience(looks: int) -> Iterator[None]:
    """How often a CTA of a team looks for what others hand to it before it gives up."""
    before = dict(_patience)
    _patience.update(dict.fromkeys(_patience, looks))
    try:
        yield
    finally:
        _patience.update(before)


def _precision(tf32: bool) -> Precision:
    return "tf32" if tf32 else "ieee"


@lru_cache(maxsize=64)
def _device(index: int) -> Device:
    found = device_of(torch.cuda.get_device_properties(index))
    limits = _cuda.limits(index)
    if found.capability >= (9, 0):
        # whatever the cell, a team's CTA has a multiprocessor to itself
        kernel = TEAMS["forward_lstm_bfloat16_cluster"]
        given = kernel.threads, found.shared_memory
        counts = [_clusters(kernel.name, index, n, *given) for n in range(1, MOST_OF_A_CLUSTER + 1)]
        found = replace(found, clusters=(0, *counts))
    return replace(found, mps=bool(limits["mps"]), cooperative=bool(limits["cooperative"]))


def _clusters(name: str, index: int, size: int, threads: int, shared: int) -> int:
    """How many clusters of a size the device holds; 0 where the driver refuses that size."""
    try:
        return _cuda.clusters(name, index, size, threads, shared)
    except RuntimeError:
        return 0


def device_at_hand(index: int | None = None) -> Device:
    """What a problem is planned for: a device, else the current one; what is traced where there is
    none, an H100."""
    if index is not None:
        return _device(index)
    if not torch.cuda.is_available():
        return H100
    return _device(torch.cuda.current_device())


def launch(
    name: str,
    device: torch.device,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    values: dict[str, int | Tensor | None],
    cluster: int = 1,
    together: bool = False,
) -> None:
    """One kernel on torch's current stream of a device. cluster: CTAs in x that are one; together:
    whether all CTAs are on the device at once."""
    if min(grid) == 0:
        return
    numbers = [
        v if type(v) is int else 0 if v is None else v.data_ptr()  # type: ignore[union-attr]
        for v in map(values.get, FIELDS)
    ]
    _cuda.launch(name, *_queue(device), grid, threads, shared, _pack(*numbers), cluster, together)


def _queue(device: torch.device) -> tuple[int, int]:
    """A device's number, and torch's current stream there."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return index, torch.cuda.current_stream(index).cuda_stream


def _aligned(tensor: Tensor | None) -> Tensor | None:
    """As kernels read it: dense, and from a place that 16 divides."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


@lru_cache(maxsize=256)
def _bits(reverse: tuple[bool, ...]) -> int:
    first = reverse[:_DIRECTIONS]
    for start in range(0, len(reverse), _DIRECTIONS):
        group = reverse[start : start + _DIRECTIONS]
        if group != first[: len(group)]:
            raise NotImplementedError(
                f"directions of {len(reverse)} recurrences that do not repeat every {_DIRECTIONS}; "
                "choose triton"
            )
    return sum(1 << r for r, back in enumerate(first) if back)


class _Task(Layer):
    """One call as the kernels take it."""

    def __init__(self, call: Call, training: bool) -> None:
        kind, precision = _TYPES.get(call.x.dtype, "float32"), "ieee"
        if kind == "float32":
            tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
            precision = "tf32" if tf32 else "tf32x3"
        super().__init__(call, precision)  # type: ignore[arg-type]
        tf32 = precision == "tf32" and bool(self.cell.recurrent_gates)
        self.type = "tf32" if tf32 else kind
        self.values: dict[str, int | Tensor | None] = {
            "T": self.T,
            "B": self.B,
            "R": self.R,
            "H": self.H,
            "rows": self.capacity,
            "reverse": _bits(tuple(call.reverse)),
            "lengths": self.lengths,
            "offsets": self.offsets,
            "reset": None if call.reset is None else _aligned(call.reset.to(torch.uint8)),
            "h_mask": _aligned(call.h_mask),
            "b_hh": self.stacked([w.b_hh for w in call.weights]) if self.cell.apart_gates else None,
            "unit": self.units(),
        }
        for state, start in zip(self.cell.states, call.states, strict=False):
            self.values[f"{state}_0"] = _aligned(start)
        self.at_hand = device_at_hand(self.device.index)
        sizes = (self.cell.name, self.type, self.H, self.B, self.R)
        self.regime = _asked or regime_of(*sizes, training, self.at_hand)
        if _asked in ("cluster", "grid"):
            reason = declined(*sizes[:2], _asked, self.H, self.at_hand)
            if reason is not None:
                raise NotImplementedError(reason)
        self.unit_tiles = unit_tiles(self.cell, self.H)

    def tiles(self, way: Way) -> int:
        """Of the batch: how many CTAs, or teams, walk a recurrence."""
        if self.regime != "cta":
            return self.arrangement(way).tiles if self.B else 0
        return -(-self.B // self._rows())

    def _rows(self) -> int:
        others = self.R * self.unit_tiles
        return rows_of_a_cta(self.B, others, self.at_hand.multiprocessors)

    def arrangement(self, way: Way) -> Arrangement:
        """Of a team's way."""
        kernel = TEAMS[f"{way}_{self.cell.name}_{self.type}_{self.regime}"]
        return arrange(kernel, self.H, self.B, self.R, self.at_hand)

    def w_hh(self) -> Tensor | None:
        return self.stacked([w.w_hh for w in self.call.weights])

    def weights(self, kernel: Kernel) -> Tensor | None:
        """w_hh as a kernel of one CTA holds it, with zeros around."""
        w_hh = self.w_hh()
        if w_hh is None:
            return None
        H, HC, gates = self.H, kernel.HC, self.cell.G_hh
        w_hh = w_hh.view(self.R, gates, H, H)
        if kernel.way == "forward":
            return _aligned(w_hh if H == HC else pad(w_hh, (0, HC - H, 0, HC - H)))
        turned = w_hh.permute(0, 3, 1, 2)
        if H == HC:
            return turned.contiguous()
        padded = w_hh.new_zeros((self.R, HC, gates, HC))
        padded[:, :H, :, :H] = turned
        return padded

    def walk(self, way: Way, **values: Any) -> None:
        given = self.values | values
        if self.regime != "cta":
            return self._walk_by_teams(self.arrangement(way), given)
        kernel = kernel_of(way, self.cell.name, self.type, self.H)
        grid = (self.tiles(way), self.R, self.unit_tiles)
        given |= {"w_hh": self.weights(kernel), "tile": self._rows()}
        launch(kernel.name, self.device, grid, kernel.threads, kernel.shared, given)

    def _walk_by_teams(self, teams: Arrangement, given: dict[str, int | Tensor | None]) -> None:
        if not self.B:
            return
        kernel = teams.kernel
        given["w_hh"] = _aligned(self.w_hh())
        given |= {"tile": teams.sequences, "team": teams.team, "fault": faults.flag(self.device)}
        given |= {"code": faults.code(kernel.name), "patience": _patience[kernel.regime]}
        each = kernel.packets(self.H, teams.sequences)
        room = [each * one.tiles * self.R for one in teams.launches]
        # zeros: of no exchange; each launch has its own
        packets = torch.zeros(sum(room), dtype=torch.uint8, device=self.device)
        for one, part in zip(teams.launches, packets.split(room), strict=True):
            grid = (teams.team * one.tiles, one.recurrences, 1)
            given |= {"first": one.first, "start": one.start, "packets": part}
            sizes = (grid, kernel.threads, teams.shared)
            launch(kernel.name, self.device, *sizes, given, teams.cluster, teams.together)

    def previous_h(self, y: Tensor) -> Tensor:
        """What w_hh multiplied at every row, (N, R, H)."""
        out = torch.empty((self.N, self.R, self.H), dtype=self.dtype, device=self.device)
        pieces = min(64, -(-self.B * self.H // PREVIOUS_THREADS))
        values = self.values | {"y": y, "dproduct": out}
        type = str(self.dtype).removeprefix("torch.")
        name = f"previous_rows_{type}_{PREVIOUS_THREADS}"
        launch(name, self.device, (self.T, self.R, pieces), PREVIOUS_THREADS, 0, values)
        return out


def _walk_forward(
    task: _Task, y: Tensor, full: bool, trajectory: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Fill y; the final states, what backward wants beside them, and the other states' way."""
    cell, R, H = task.cell, task.R, task.H
    gates = task.input_product()
    extra = task.rows(len(cell.extras) * R * H) if full and cell.extras else None
    along = [task.rows(R * H, task.wide) for _ in cell.other_states if full or trajectory]
    for rows in along:
        task.padded(rows)
    finals = [task.state(H, task.dtype) for _ in cell.states]
    values: dict[str, Any] = {"save": int(full), "gates": gates, "extra": extra, "y": y}
    values |= {f"{state}_n": final for state, final in zip(cell.states, finals, strict=True)}
    values |= {f"{s}_all": rows for s, rows in zip(cell.other_states, along, strict=bool(along))}
    task.walk("forward", **values)
    saved = [gates] if full and cell.keeps_gates(False) else []
    return finals, saved + [extra] * (extra is not None), along  # type: ignore[list-item]


@torch.no_grad()
def forward(call: Call, save: bool, trajectory: bool) -> Result:
    faults.raise_if_set(call.x.device)
    task = _Task(call, save)
    full = save and call.memory == "full"
    with task.on_device():
        y = task.padded(task.rows(task.R * task.H))
        finals, saved, along = _walk_forward(task, y, full, trajectory)
    return task.result(y, finals, saved, along, full, trajectory)


@torch.no_grad()
def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    faults.raise_if_set(call.x.device)
    task = _Task(call, True)
    task.check(result, grads)
    with task.on_device():
        return _backward(task, result, grads, wanted)


stacks, layers, layers_backward = in_one_call(forward, backward)


def _backward(task: _Task, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    cell, R, H, N = task.cell, task.R, task.H, task.N
    y = _aligned(result.y)
    assert y is not None
    if task.call.memory == "lean":
        again = torch.empty_like(y)
        _, saved, along = _walk_forward(task, again, True, False)
    else:
        saved, along = task.kept(result)
    gates = saved.pop(0) if cell.keeps_gates(False) else None
    extra = saved.pop(0) if cell.extras else None

    def new(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=task.device)

    dgates = new(N, R, cell.G * H, dtype=task.dtype)
    apart = cell.parts_differ and bool(cell.recurrent_gates)
    dproduct = new(N, R, cell.G_hh * H, dtype=task.dtype) if apart else dgates
    tiles, w = task.tiles("backward"), task.call.weights[0]
    biased = w.b_ih is not None or w.b_hh is not None
    U, apart_gates = len(cell.unit_parameters), len(cell.apart_gates)
    dunit = new(tiles, R, U, H, dtype=task.wide) if U else None
    dbias = new(tiles, R, cell.G + apart_gates, H, dtype=task.wide) if biased else None
    values: dict[str, Any] = {
        "gates": gates,
        "extra": extra,
        "y": y,
        "dy": _aligned(grads.y),
        "dgates": dgates,
        "dproduct": dproduct if apart else None,
        "dbias": dbias,
        "dunit": dunit,
    }
    dstates = []
    for k, (state, given) in enumerate(zip(cell.states, grads.states, strict=True)):
        values[f"d{state}_n"] = _aligned(given)
        if wanted.states:
            dstates.append(task.state(H, task.dtype))
            values[f"d{state}_0"] = dstates[-1]
        if k:
            values[f"{state}_all"] = _aligned(along[k - 1])
            d = grads.trajectory[k - 1] if grads.trajectory else None
            values[f"d{state}_all"] = None if d is None else _aligned(d.to(task.wide))
    task.walk("backward", **values)

    dunits = None if dunit is None else dunit.sum(0).to(task.dtype)
    recurrent = _recurrent_gradient(task, y, dproduct) if wanted.weights else _none
    biases = None
    if dbias is not None and wanted.weights:
        sums = dbias.sum(0) if tiles != 1 else dbias[0]
        biases = _biases(cell, sums.to(task.dtype).view(R, -1))
    dx, dweights = task.gradients(wanted, dgates, biases, recurrent, _none, dunits)
    return Gradients(dx, dstates if wanted.states else None, dweights)


def _biases(cell: Cell, sums: Tensor) -> Callable[[int], tuple[Tensor, Tensor | None]]:
    """What makes those of b_ih and b_hh of a recurrence. sums: (R, (G + apart) * H)."""
    H = sums.shape[1] // (cell.G + len(cell.apart_gates))
    G, joint = cell.G, cell.G_hh - len(cell.apart_gates)

    def of(r: int) -> tuple[Tensor, Tensor | None]:
        db_ih = sums[r, : G * H].clone()
        if not cell.recurrent_gates:
            return db_ih, None
        if joint == G:
            return db_ih, db_ih.clone()
        return db_ih, torch.cat([sums[r, : joint * H], sums[r, G * H :]])

    return of


def _none(r: int) -> None:
    return None


def _recurrent_gradient(task: _Task, y: Tensor, dproduct: Tensor) -> Any:
    """What makes dw_hh of a recurrence: its products' gradients times what they multiplied."""
    if not task.cell.recurrent_gates:
        return _none
    call, B = task.call, task.B
    if task.lengths is None and call.reset is None and call.h_mask is None and task.T > 1:
        h = y.view(task.N, task.R, task.H)

        def beside(r: int) -> Tensor:
            """Of the steps but the first, h of the step before; the first has h_0."""
            first, rest, before = slice(0, B), slice(B, None), slice(None, -B)
            if call.reverse[r]:
                first, rest, before = slice(-B, None), slice(None, -B), slice(B, None)
            found = torch.mm(dproduct[rest, r].t(), h[before, r])
            if call.states:
                found.addmm_(dproduct[first, r].t(), call.states[0][r])
            return found

        return beside if B else lambda r: dproduct.new_zeros((dproduct.shape[2], task.H))
    h = task.previous_h(y)
    return lambda r: torch.mm(dproduct[:, r].t(), h[:, r])
