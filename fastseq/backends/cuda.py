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
from collections.abc import Callable, Iterator, Sequence
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
from .cuda_plan import Precision, decline, is_wave_faster, plan, regime_of, wave_of
from .cuda_teams import Arrangement, arranged, declined
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
    "T B R H rows tile first start team layers reverse save lengths offsets gates extra y c_all "
    "h_0 c_0 h_n c_n w_hh w_ih b_ih b_hh unit reset h_mask dy dc_all dh_n dc_n dh_0 dc_0 dgates "
    "dproduct dbias dunit packets fault code patience"
).split()
#: What the extension's functions say of themselves: one that was built from other sources may take
#: and give something else.
SIGNATURES = {
    "launch": "(name, device, stream, (x, y, z), threads, shared, arguments, cluster, together)",
    "occupancy": "(name, device, threads, shared) -> CTAs of a multiprocessor",
    "clusters": "(name, device, size, threads, shared) -> clusters on the device at once",
    "limits": "(device) -> {mps, cooperative}",
}
#: The driver that runs what nvcc 13 makes.
DRIVER = 580
DEVICES = ("cuda", "meta")
#: Steps' directions are bits of one number.
_DIRECTIONS = 32
#: How often a CTA looks for what others hand to it before it gives up: some seconds.
_patience: dict[str, int] = {"cluster": 1 << 20, "wave": 1 << 20, "grid": 1 << 24}
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
    asked = None if _asked == "wave" else _asked
    found = str(plan(problem, device_at_hand(), _precision(problem.tf32), regime=asked))
    wave = wave_of(problem, device_at_hand(), _precision(problem.tf32))
    return found if wave is None else f"{found}\n{wave}"


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
        with torch.cuda.device(index):
            torch.empty(1, device="cuda")  # the driver counts where there is a context
            sizes = range(1, MOST_OF_A_CLUSTER + 1)
            counts = [_clusters(kernel.name, index, size, *given) for size in sizes]
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


def _type_of(call: Call) -> tuple[str, str]:
    """How the kernels name a call's numbers, and the precision of its large products."""
    kind = _TYPES.get(call.x.dtype, "float32")
    if kind != "float32":
        return kind, "ieee"
    tf32 = torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
    if tf32:
        return ("tf32" if call.definition.recurrent_gates else kind), "tf32"
    return kind, "tf32x3"


class _Task(Layer):
    """One call as the kernels take it."""

    def __init__(self, call: Call, training: bool) -> None:
        self.type, precision = _type_of(call)
        super().__init__(call, precision)  # type: ignore[arg-type]
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
        asked = None if _asked == "wave" else _asked
        self.regime: Regime = asked or regime_of(*sizes, training, self.at_hand)
        self.layers = 1
        if asked in ("cluster", "grid"):
            reason = declined(*sizes[:2], asked, self.H, self.at_hand)
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
        sizes = (self.H, self.B, self.R, self.at_hand, self.layers)
        return arranged(way, self.cell.name, self.type, self.regime, *sizes)

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
        w_hh = self.w_hh()
        assert w_hh is not None
        given["w_hh"] = self.in_vectors(w_hh)
        given |= {"tile": teams.sequences, "team": teams.team, "layers": teams.layers}
        given |= {"fault": faults.flag(self.device), "patience": _patience[kernel.regime]}
        given["code"] = faults.code(f"cuda's kernel {kernel.name}")
        each = kernel.packets(self.H, teams.sequences)
        room = [each * one.tiles * self.R for one in teams.launches]
        # zeros: of no exchange; each launch has its own
        packets = torch.zeros(sum(room), dtype=torch.uint8, device=self.device)
        for one, part in zip(teams.launches, packets.split(room), strict=True):
            grid = (teams.team * teams.layers * one.tiles, one.recurrences, 1)
            given |= {"first": one.first, "start": one.start, "packets": part}
            sizes = (grid, kernel.threads, teams.shared)
            launch(kernel.name, self.device, *sizes, given, teams.cluster, teams.together)

    def in_vectors(self, weights: Tensor) -> Tensor | None:
        """Rows of H numbers as teams read them: in whole vectors of 16 bytes."""
        return _aligned(pad(weights, (0, -self.H % (16 // weights.itemsize))))

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


class _Wave(_Task):
    """All layers of a stack of one direction as one kernel takes them. Rows, states and weights
    have the layers in front; ``task`` of a layer makes its large products."""

    def __init__(self, calls: Sequence[Call], training: bool) -> None:
        super().__init__(calls[0], training)
        self.regime, self.layers, self.calls = "wave", len(calls), calls
        cell = self.cell
        w_ih = torch.stack([call.weights[0].w_ih for call in calls[1:]])
        biases = [self.bias(call.weights[0]) for call in calls[1:]]
        self.values |= {
            "w_ih": self.in_vectors(w_ih),
            "b_ih": None if biases[0] is None else torch.stack(biases),  # type: ignore[arg-type]
            "b_hh": self.over([c.weights[0].b_hh for c in calls]) if cell.apart_gates else None,
            "h_mask": self.over([call.h_mask for call in calls]),
        }
        for k, state in enumerate(cell.states):
            starts = [call.states[k] if call.states else None for call in calls]
            self.values[f"{state}_0"] = self.over(starts)

    @staticmethod
    def over(parts: Sequence[Tensor | None]) -> Tensor | None:
        """(layers, ...); no copy of parts that stand one behind another."""
        if any(part is None for part in parts):
            return None
        given = [part.contiguous() for part in parts if part is not None]
        first, size = given[0], given[0].nbytes
        place, whole = first.data_ptr(), first.untyped_storage()
        if place % 16 == 0 and all(
            part.data_ptr() == place + k * size
            and part.untyped_storage().data_ptr() == whole.data_ptr()
            for k, part in enumerate(given)
        ):
            return first.as_strided((len(given), *first.shape), (first.numel(), *first.stride()))
        return torch.stack(given)

    def w_hh(self) -> Tensor | None:
        return self.over([call.weights[0].w_hh for call in self.calls])

    def of_all(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        """A buffer with a row of ``width`` for each of the input and each layer."""
        shape = (self.layers, *self.lead, width)
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    def of_the_last(self, width: int, dtype: torch.dtype | None = None) -> Tensor:
        return self.rows(width, dtype).unsqueeze(0)

    def states(self, dtype: torch.dtype) -> Tensor:
        shape = (self.layers, self.R, self.B, self.H)
        return torch.empty(shape, dtype=dtype, device=self.device)


@torch.no_grad()
def _wave_forward(calls: Sequence[Call], save: bool, trajectory: bool) -> list[Result] | None:
    """The results of all layers, walked side by side; None where they do not walk so."""
    if not _walks_as_wave(calls, save):
        return None
    faults.raise_if_set(calls[0].x.device)
    task = _Wave(calls, save)
    cell, H = task.cell, task.H
    with task.on_device():
        rows = task.of_all if save else task.of_the_last
        y = rows(H)
        gates = task.of_all(cell.G * H) if save else task.rows(cell.G * H).unsqueeze(0)
        task.input_product(gates[0])
        extra = task.of_all(len(cell.extras) * H) if save and cell.extras else None
        along = [rows(H, task.wide) for _ in cell.other_states if save or trajectory]
        for buffer in (y, *along):
            for of_layer in buffer:
                task.padded(of_layer)
        finals = [task.states(task.dtype) for _ in cell.states]
        values: dict[str, Any] = {"save": int(save), "gates": gates, "extra": extra, "y": y}
        values |= {f"{s}_n": final for s, final in zip(cell.states, finals, strict=True)}
        values |= {
            f"{s}_all": rows for s, rows in zip(cell.other_states, along, strict=bool(along))
        }
        task.walk("forward", **values)
    results = []
    for layer in range(task.layers):
        kept = [gates[layer]] if save and cell.keeps_gates(False) else []
        kept += [] if extra is None else [extra[layer]]
        at = layer if save else 0
        others, states = [a[at] for a in along], [final[layer] for final in finals]
        last = trajectory and layer == task.layers - 1
        results.append(task.result(y[at], states, kept, others, save, last))
    return results


@torch.no_grad()
def _wave_backward(
    calls: Sequence[Call],
    results: Sequence[Result],
    grads: Sequence[OutputGradients],
    wanted: Wanted,
) -> list[Gradients] | None:
    """Those of all layers. grads: y and the trajectory of the last one alone."""
    if not _walks_as_wave(calls, True):
        return None
    faults.raise_if_set(calls[0].x.device)
    tasks = [_Task(call, True) for call in calls]
    for one, result, gradients in zip(tasks, results, grads, strict=True):
        one.check(result, gradients)
    wave = _Wave(calls, True)
    with wave.on_device():
        return _backward_of_wave(wave, tasks, results, grads, wanted)


def _backward_of_wave(
    wave: _Wave,
    tasks: Sequence[_Task],
    results: Sequence[Result],
    grads: Sequence[OutputGradients],
    wanted: Wanted,
) -> list[Gradients]:
    cell, H, L = wave.cell, wave.H, wave.layers
    kept = [task.kept(result) for task, result in zip(tasks, results, strict=True)]
    saved = [parts for parts, _ in kept]
    gates = wave.over([parts[0] for parts in saved]) if cell.keeps_gates(False) else None
    extra = wave.over([parts[-1] for parts in saved]) if cell.extras else None
    ys = [_aligned(result.y) for result in results]
    dgates = torch.empty((L, wave.capacity, cell.G * H), dtype=wave.dtype, device=wave.device)
    apart = cell.parts_differ
    dproduct = torch.empty_like(dgates) if apart else dgates
    w, tiles = wave.call.weights[0], wave.tiles("backward")
    biased = w.b_ih is not None or w.b_hh is not None
    sums = (tiles, L, cell.G + len(cell.apart_gates), H)
    dbias = torch.empty(sums, dtype=wave.wide, device=wave.device) if biased else None
    last = grads[-1]
    values: dict[str, Any] = {
        "gates": gates,
        "extra": extra,
        "y": wave.over(ys),
        "dy": _aligned(last.y),
        "dgates": dgates,
        "dproduct": dproduct if apart else None,
        "dbias": dbias,
    }
    dstates = []
    for k, state in enumerate(cell.states):
        given = [one.states[k] for one in grads]
        if any(d is not None for d in given):
            zeros = [wave.state(H, wave.dtype).zero_() if d is None else d for d in given]
            values[f"d{state}_n"] = wave.over(zeros)
        if wanted.states:
            dstates.append(wave.states(wave.dtype))
            values[f"d{state}_0"] = dstates[-1]
        if k:
            values[f"{state}_all"] = wave.over([_aligned(along[k - 1]) for _, along in kept])
            d = last.trajectory[k - 1] if last.trajectory else None
            values[f"d{state}_all"] = None if d is None else _aligned(d.to(wave.wide))
    wave.walk("backward", **values)

    found = []
    for layer, task in enumerate(tasks):
        d = dgates[layer, : task.N].view(task.N, 1, -1)
        y, of_product = ys[layer], dproduct[layer, : task.N].view(task.N, 1, -1)
        assert y is not None
        recurrent = _recurrent_gradient(task, y, of_product) if wanted.weights else _none
        biases = None
        if dbias is not None and wanted.weights:
            biases = _biases(cell, dbias[:, layer].sum(0).to(task.dtype).view(1, -1))
        own = Wanted(wanted.x and layer == 0, wanted.states, wanted.weights)
        dx, dweights = task.gradients(own, d, biases, recurrent, _none, None)
        before = [state[layer] for state in dstates] if wanted.states else None
        found.append(Gradients(dx, before, dweights))
    return found


def _walks_as_wave(calls: Sequence[Call], training: bool) -> bool:
    """Whether a stack is modelled to take less time with its layers side by side."""
    first = calls[0]
    w = first.weights[0]
    type = _type_of(first)[0]
    if len(first.weights) != 1 or w.w_hh is None or w.w_hr is not None or first.memory == "lean":
        return False
    if not first.B or any(call.H != first.H for call in calls):
        return False
    if first.x.shape[:-1].numel() * len(calls) >= 2**31:  # rows, which the kernels count as int
        return False
    device = device_at_hand(first.x.device.index)
    sizes = (first.cell, type, first.H, len(calls), first.B)
    if declined(*sizes[:2], "wave", first.H, device, len(calls)) is not None:
        return False
    steps = len(first.batch_sizes) if first.batch_sizes is not None else first.x.shape[0]
    return _asked == "wave" or (_asked is None and is_wave_faster(*sizes, steps, training, device))


stacks, layers, layers_backward = in_one_call(forward, backward, (_wave_forward, _wave_backward))


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
