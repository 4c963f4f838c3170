"""How ``cuda`` runs a problem on a device: a pure function to a frozen plan, or a decline in words.

:func:`plan` asks no GPU and reads no setting, so every size is planned, and tested, on any machine.
The kernels and what they take are in :mod:`.cuda_kernels`, the times in :mod:`.cuda_time`. The
times are modelled, fitted to calls that were measured on an H200.

The regimes in which a layer can run:

- ``cta``: one CTA owns 8 sequences of a recurrence for all of time, or 4 where every CTA then has a
  multiprocessor of its own, with all weights on the chip; where a layer fits, this one
- ``cluster`` and ``grid``: a team of CTAs shares the weights and hands h around
  (:mod:`.cuda_teams`); where one CTA does not hold a layer, the one that was measured to be faster
  on devices of that compute capability, else the one that is modelled to be
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from ..cells import CELLS, Cell
from . import cuda_rule, cuda_teams, cuda_time
from .contract import Problem
from .cuda_kernels import (
    A100,
    FRAGMENT,
    H100,
    H200,
    ITEMSIZE,
    KERNELS,
    LAPTOP,
    PARTS,
    POINTWISE_CELLS,
    POINTWISE_UNITS,
    PRODUCT_CELLS,
    ROWS,
    WAYS,
    Device,
    Kernel,
    Regime,
    Type,
    Way,
    classes,
    device_of,
    kernel_of,
    reads_y,
    rows_of_a_cta,
    unit_tiles,
)

__all__ = [
    "A100",
    "H100",
    "H200",
    "KERNELS",
    "LAPTOP",
    "Device",
    "Kernel",
    "Plan",
    "Walk",
    "binary",
    "classes",
    "decline",
    "device_of",
    "largest",
    "plan",
    "type_of",
]

#: Of float32's products, as torch.backends.cudnn.rnn.fp32_precision names them.
Precision = Literal["ieee", "tf32"]

_TEAMS: tuple[Regime, ...] = ("cluster", "grid")
#: What a grid may have in y and z, and in x.
_MOST_YZ, _MOST_X = 65535, 2**31 - 1
#: What a CTA takes of a multiprocessor's shared memory beside its own.
_RESERVED = 1024

_TYPES: dict[torch.dtype, Type] = {
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float32: "float32",
}
_DTYPES = {dtype: str(dtype).removeprefix("torch.") for dtype in _TYPES}


@dataclass(frozen=True)
class Walk:
    """One kernel of a plan, which walks all of time.

    shared: bytes of a CTA. registers: of a thread. per_multiprocessor: CTAs on one at once.
    weights_in_registers, weights_in_shared: bytes of a CTA's weights, zeros beyond H included; in
    registers both parts of a number that has two.
    row_read, row_written: bytes that a step moves for each sequence and recurrence. row_flops: of
    its recurrent product, two for each weight.
    alone: modelled us of a step where a CTA has a multiprocessor to itself. step: of all sequences,
    waves one after another; None where B is not known. total: of the launch and all steps; None
    where T is not known either. bound: what a step waits for, of the first wave.
    """

    kernel: Kernel
    shared: int
    registers: int
    per_multiprocessor: int
    weights_in_registers: int
    weights_in_shared: int
    row_read: int
    row_written: int
    row_flops: int
    cost: cuda_time.Cost
    alone: float
    step: float | None
    total: float | None
    waves: int | None
    bound: str

    @property
    def stages(self) -> int:
        return self.kernel.stages


@dataclass(frozen=True)
class Plan:
    """How one layer's loop over time runs. T, B: None where they are not known.

    grid: CTAs in x, the batch; y, recurrences; z, hidden units. binary: what of the module the
    device runs. backward: None where the device has not the room for it, and nobody trains.
    """

    regime: Regime
    device: Device
    binary: str
    cell: str
    type: Type
    T: int | None
    B: int | None
    R: int
    H: int
    HC: int
    threads: int
    rows: int
    grid: tuple[int, int, int] | None
    forward: Walk
    backward: Walk | None

    def __str__(self) -> str:
        """What :func:`fastseq.explain` prints."""
        return "\n".join(_lines(self))


def _lines(plan: Plan) -> Iterator[str]:
    yield (
        f"regime {plan.regime}: one CTA owns {plan.rows} sequences for all of time; H={plan.H} in "
        f"CTAs of {plan.HC}, {plan.type}, {plan.binary} on {plan.device.name}"
    )
    for walk in (plan.forward, plan.backward):
        if walk is not None:
            yield from _walk_lines(plan, walk)


def _walk_lines(plan: Plan, walk: Walk) -> Iterator[str]:
    kernel, cost = walk.kernel, walk.cost
    units = f"{kernel.each} hidden unit{'s' * (kernel.each > 1)} each"
    fit = walk.per_multiprocessor
    wide = f"{kernel.threads} threads with {units}, {fit} at once on a multiprocessor"
    if plan.grid is not None:
        waves = f"{walk.waves} wave{'s' * (walk.waves != 1)}"
        wide = f"{' x '.join(map(str, plan.grid))} CTAs of {wide}, {waves}"
    yield f"{kernel.name}: {wide}"
    yield (
        f"  of a CTA: weights {walk.weights_in_registers:,} bytes in registers, "
        f"{walk.weights_in_shared:,} in shared memory; shared memory {walk.shared:,} of "
        f"{plan.device.shared_memory:,} bytes, {walk.stages} steps in its ring"
    )
    rows, each = (1, " and sequence") if plan.B is None else (plan.B * plan.R, "")
    yield (
        f"  a step{each}: {walk.row_read * rows:,} bytes read, {walk.row_written * rows:,} "
        f"written, {walk.row_flops * rows:,} FLOP; a step of a CTA: {cost.mmas:,} mma of "
        f"{cost.instructions:,} instructions, "
        f"{cost.shared_read:,} bytes read from shared memory"
    )
    parts = ", ".join(f"{k} {v / 1000:.2f}" for k, v in cost.times._asdict().items())
    step = walk.alone if walk.step is None else walk.step
    total = "" if walk.total is None else f"; {walk.total:,.0f} us in all, without the GEMMs"
    yield (
        f"  modelled, not measured: {step:.2f} us a step, bound by {walk.bound} "
        f"(one CTA alone: {parts}){total}"
    )


def binary(capability: tuple[int, int]) -> str | None:
    """What of the module a device of this compute capability runs; None where nothing."""
    major = capability[0]
    if major < 8:
        return None
    if capability == (9, 0):
        return "sm_90a"
    return {8: "sm_80", 9: "PTX of compute_80", 10: "sm_100"}.get(major, "PTX of compute_100")


def type_of(problem: Problem, precision: Precision) -> Type | None:
    """How the kernels name a problem's numbers; None for a type that none takes."""
    found = _TYPES.get(problem.dtype)
    if found == "float32" and precision == "tf32" and CELLS[problem.cell].recurrent_gates:
        return "tf32"
    return found


def per_multiprocessor(threads: int, registers: int, shared: int, device: Device) -> int:
    """How many CTAs are on a multiprocessor at once."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256  # given in units of 256
    return min(
        device.ctas,
        device.threads // threads,
        device.registers // (of_a_warp * warps),
        device.shared_memory_total // (shared + _RESERVED),
    )


def _row_bytes(way: Way, cell: Cell, itemsize: int, H: int, problem: Problem) -> tuple[int, int]:
    """(read, written): what a step moves for each sequence and recurrence."""
    width, others = H * itemsize, len(cell.other_states) * H * 4
    kept = cell.keeps_gates(False)
    gates, extras = cell.G * width, len(cell.extras) * width
    reset = int(problem.reset)
    if way == "backward":
        read = kept * gates + extras + width + reads_y(cell) * width + others + reset
        read += others * problem.trajectory
        return read, gates + cell.parts_differ * cell.G_hh * width
    save = problem.training and problem.memory != "lean"
    written = width
    if save:
        written += kept * gates + extras
    if save or problem.trajectory:
        written += others
    return gates + reset, written


def _walk(
    kernel: Kernel, problem: Problem, H: int, device: Device, registers: Mapping[str, int]
) -> Walk:
    cell = kernel.definition
    shared = kernel.shared
    counted = registers.get(kernel.name, kernel.registers)
    fit = per_multiprocessor(kernel.threads, counted, shared, device)
    read, written = _row_bytes(kernel.way, cell, ITEMSIZE[kernel.type], H, problem)
    fragment = FRAGMENT * kernel.warps
    tiles = unit_tiles(cell, H)
    moved = -(-(read + written) // tiles)  # of one CTA's units

    rows = _rows(problem, cell, H, device)
    sequences = rows if problem.B is None else min(problem.B, rows)
    columns = 1 if sequences <= ROWS // 2 else 2
    put = sequences * written * min(kernel.HC, H) // H

    def limits(resident: int, running: int) -> dict[str, float]:
        return cuda_time.limits(kernel, device, resident, running * sequences * moved, columns, put)

    alone = limits(1, 1)
    step = total = waves = None
    bound = max(alone, key=alone.__getitem__)
    if problem.B is not None:
        ctas = -(-problem.B // rows) * problem.R * tiles
        wave = fit * device.multiprocessors
        full, left = divmod(ctas, wave)
        waves = full + bool(left)
        last = limits(-(-left // device.multiprocessors), left)
        first = limits(fit, wave) if full else last
        step = (full * max(first.values()) + bool(left) * max(last.values())) / 1000
        if ctas:
            bound = max(first, key=first.__getitem__)
        if problem.T is not None:
            total = cuda_time.LAUNCH + problem.T * step
    return Walk(
        kernel=kernel,
        shared=shared,
        registers=counted,
        per_multiprocessor=fit,
        weights_in_registers=kernel.held * PARTS[kernel.type] * fragment,
        weights_in_shared=kernel.rest * fragment,
        row_read=read,
        row_written=written,
        row_flops=2 * cell.G_hh * H * H,
        cost=cuda_time.cost(kernel, device, columns, put),
        alone=max(alone.values()) / 1000,
        step=step,
        total=total,
        waves=waves,
        bound=bound,
    )


def _rows(problem: Problem, cell: Cell, H: int, device: Device) -> int:
    """How many sequences a CTA has."""
    if problem.B is None:
        return ROWS
    return rows_of_a_cta(problem.B, problem.R * unit_tiles(cell, H), device.multiprocessors)


def _kernel(way: Way, cell: str, type: str, HC: int) -> Kernel:
    return KERNELS[f"{way}_{cell}_{type}_{HC}"]


def _fits(way: Way, cell: str, type: str, HC: int, device: Device) -> bool:
    kernel = _kernel(way, cell, type, HC)
    fit = per_multiprocessor(kernel.threads, kernel.registers, kernel.shared, device)
    return kernel.shared <= device.shared_memory and fit > 0


@lru_cache(maxsize=256)
def largest(cell: str, type: str, training: bool, device: Device) -> int:
    """The largest H that one CTA holds on a device; 0 where none."""
    ways = WAYS if training else WAYS[:1]
    sizes = classes(cell, type)
    return max((n for n in sizes if all(_fits(w, cell, type, n, device) for w in ways)), default=0)


def _unlike(problem: Problem) -> str | None:
    """What no kernel runs, whatever its size."""
    name, cell = problem.cell, CELLS[problem.cell]
    if problem.dtype not in _TYPES:
        dtype = str(problem.dtype).removeprefix("torch.")
        return (
            f"cuda's kernels take {', '.join(_DTYPES.values())}, not {dtype}; choose triton, whose "
            "kernels take float64 too"
        )
    if name not in (*PRODUCT_CELLS, *POINTWISE_CELLS):
        if len(cell.phases) > 1:
            return (
                f"{cell.called} has {len(cell.phases)} phases, and cuda's kernels run cells of "
                "one; choose triton"
            )
        if len(cell.other_states) > 1:
            return (
                f"{cell.called} has {len(cell.other_states)} states beside h, and cuda's kernels "
                "carry 1; choose triton"
            )
        return f"cuda's binary has no kernel of {cell.called}, a cell of your own; choose triton"
    if problem.projected:
        return f"cuda's kernels project no h (proj_size={problem.P}); choose triton"
    if problem.zoneout:
        return "cuda's kernels have no zoneout"
    if problem.heads > 1:
        return (
            f"cuda's kernels take one matrix w_hh, not {problem.heads} blocks on its diagonal; "
            "choose eager"
        )
    if problem.input_product:
        return "cuda makes the input product itself, and takes none made already; choose eager"
    return None


def decline(problem: Problem, device: Device, precision: Precision = "ieee") -> str | None:
    """Why ``cuda`` does not run a problem, in words that a user can act on; None where nothing that
    is known of the problem speaks against it. H may be None, while a graph is traced."""
    if binary(device.capability) is None:
        has = ".".join(map(str, device.capability))
        return (
            f"cuda's kernels need compute capability 8.0, and {device.name} has {has}; choose "
            "triton or torch"
        )
    reason = _unlike(problem)
    if reason is not None or problem.H is None:
        return reason
    cell, name, H = CELLS[problem.cell], problem.cell, problem.H
    type = type_of(problem, precision)
    assert type is not None
    return _too_large(problem, device, cell, type, H) or _too_many(problem, name, cell, H)


def _too_large(problem: Problem, device: Device, cell: Cell, type: Type, H: int) -> str | None:
    name = cell.name
    most = largest(name, type, problem.training, device)
    if H <= most or (most and not cell.recurrent_gates):
        return None
    if any(cuda_teams.declined(name, type, r, H, device) is None for r in _TEAMS):
        return None
    hint = "choose triton"
    if type == "float32" and any_holds(name, "tf32", H, problem.training, device):
        hint = "allow TF32 (torch.backends.cudnn.rnn.fp32_precision = 'tf32'), or choose triton"
    alike = "" if most == largest(name, type, False, device) else " in training"
    if H > max(classes(name, type)):
        why = [f"one CTA holds up to H={most} in {type} of {name}{alike} on {device.name}"]
        if type == "float32":
            why.append("clusters and grids multiply in TF32 or 16 bits")
        else:
            why += [f"{cuda_teams.declined(name, type, r, H, device)}" for r in _TEAMS]
        return "; ".join([f"H={H}: {why[0]}", *why[1:], hint])
    HC = min(n for n in classes(name, type) if n >= H)
    way: Way = "backward" if _fits("forward", name, type, HC, device) else "forward"
    fits = f"up to H={most} fits{alike}" if most else f"no H fits{alike}"
    return (
        f"H={H} in {type} of {name}: {way} takes {_kernel(way, name, type, HC).shared:,} bytes of "
        f"shared memory, and a CTA of {device.name} has {device.shared_memory:,}; {fits}; {hint}"
    )


def any_holds(cell: str, type: str, H: int, training: bool, device: Device) -> bool:
    """Whether a layer of H units runs in some regime."""
    if H <= largest(cell, type, training, device):
        return True
    return any(cuda_teams.declined(cell, type, r, H, device) is None for r in _TEAMS)


@lru_cache(maxsize=1024)
def regime_of(
    cell: str, type: str, H: int, B: int, R: int, training: bool, device: Device
) -> Regime:
    """In which regime a layer runs that some regime holds: that of one CTA where it does, else the
    one that was measured to be faster, or whose forward and backward are modelled to be."""
    if not CELLS[cell].recurrent_gates or H <= largest(cell, type, training, device):
        return "cta"
    able = [r for r in _TEAMS if cuda_teams.declined(cell, type, r, H, device) is None]

    capability, way = "{}.{}".format(*device.capability), "training" if training else "forward"
    measured = cuda_rule.measured_regime(capability, cell, type, way, H, B, R)
    for regime in able:
        if regime == measured:
            return regime

    def step(regime: Regime) -> float:
        found = [cuda_teams.arranged(way, cell, type, regime, H, B, R, device) for way in WAYS]
        return sum(one.step for one in found)

    return min(able, key=step)


@lru_cache(maxsize=1024)
def is_wave_faster(
    cell: str, type: str, H: int, layers: int, B: int, T: int, training: bool, device: Device
) -> bool:
    """Whether a stack of one direction is modelled to take less time where its layers walk side by
    side, forward and backward, than one after another. Not where one CTA holds a layer: that was
    measured, and a wave was not yet."""

    def step(regime: Regime, of: int = 1) -> float:
        return sum(
            cuda_teams.arranged(way, cell, type, regime, H, B, 1, device, of).step for way in WAYS
        )

    alone = regime_of(cell, type, H, B, 1, training, device)
    if alone == "cta":
        return False
    return step("wave", layers) * (T + layers - 1) < step(alone) * T * layers


def wave_of(problem: Problem, device: Device, precision: Precision) -> str | None:
    """In words, how the layers of a stack walk side by side; None where they do not."""
    p, type = problem, type_of(problem, precision)
    if p.layers < 2 or p.R != 1 or p.H is None or not p.B or not p.T or type is None:
        return None
    if p.mode != "plain" or p.memory == "lean":
        return None
    if cuda_teams.declined(p.cell, type, "wave", p.H, device, p.layers) is not None:
        return None
    if not is_wave_faster(p.cell, type, p.H, p.layers, p.B, p.T, p.training, device):
        return None
    steps = []
    for way in WAYS:
        sizes = (p.H, p.B, 1, device, p.layers)
        steps.append(cuda_teams.arranged(way, p.cell, type, "wave", *sizes))
    size = steps[0].cluster
    return (
        f"{p.layers} layers of this kind, with no dropout between them, walk side by side, in "
        f"regime wave: clusters of {size} CTAs, {p.T} + {p.layers - 1} steps in place of {p.T} x "
        f"{p.layers}; modelled, not measured: {steps[0].step:.2f} us forward and "
        f"{steps[1].step:.2f} backward"
    )


def _too_many(problem: Problem, name: str, cell: Cell, H: int) -> str | None:
    tiles = unit_tiles(cell, H)
    if tiles > _MOST_YZ:
        most = _MOST_YZ * POINTWISE_UNITS
        return f"H={H}: a launch holds up to H={most} of {name}; choose triton"
    if problem.R > _MOST_YZ:
        return f"{problem.R} recurrences in one call: a launch holds up to {_MOST_YZ}; choose eager"
    if problem.B is not None and -(-problem.B // ROWS) > _MOST_X:
        return f"B={problem.B}: a launch holds up to {_MOST_X * ROWS} sequences; split the batch"
    if problem.T is not None and problem.B is not None and problem.T * problem.B >= 2**31:
        return (
            f"T={problem.T}, B={problem.B}: {problem.T * problem.B:,} rows, and the kernels count "
            f"up to {2**31 - 1:,}; split the batch"
        )
    return None


def plan(
    problem: Problem,
    device: Device,
    precision: Precision = "ieee",
    registers: Mapping[str, int] | None = None,
    regime: Regime | None = None,
) -> Plan | cuda_teams.TeamPlan | str:
    """How ``cuda`` runs a problem on a device, or why it does not.

    registers: of a thread, by kernel name, as the compiler counted them; else those that the launch
        bounds allow. regime: the one that is asked for, held or declined; None for the planner's.

    Where T or B is not known the plan has no totals; where H is not there is none, and the text
    says so: :func:`decline` says whether anything else speaks against the problem.
    """
    reason = decline(problem, device, precision)
    if reason is not None:
        return reason
    if problem.H is None:
        return "H is not known while torch.compile traces; cuda plans when the operator runs"
    cell, H = CELLS[problem.cell], problem.H
    type = type_of(problem, precision)
    runs_on = binary(device.capability)
    assert type is not None and runs_on is not None
    B = 8 if problem.B is None else problem.B
    regime = regime or regime_of(cell.name, type, H, B, problem.R, problem.training, device)
    if regime != "cta":
        reason = cuda_teams.declined(cell.name, type, regime, H, device)
        if reason is not None:
            return reason
        moved = [_row_bytes(way, cell, ITEMSIZE[type], H, problem) for way in WAYS]
        return cuda_teams.plan(problem, regime, type, runs_on, device, *moved)
    forward = kernel_of("forward", cell.name, type, H)
    HC = forward.HC
    backward = None
    if _fits("backward", cell.name, type, HC, device):
        kernel = kernel_of("backward", cell.name, type, H)
        backward = _walk(kernel, problem, H, device, registers or {})
    rows, grid = _rows(problem, cell, H, device), None
    if problem.B is not None:
        grid = (-(-problem.B // rows), problem.R, unit_tiles(cell, H))
    return Plan(
        regime="cta",
        device=device,
        binary=runs_on,
        cell=cell.name,
        type=type,
        T=problem.T,
        B=problem.B,
        R=problem.R,
        H=H,
        HC=HC,
        threads=forward.threads,
        rows=rows,
        grid=grid,
        forward=_walk(forward, problem, H, device, registers or {}),
        backward=backward,
    )
