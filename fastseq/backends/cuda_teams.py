"""How ``cuda`` runs a layer that no single CTA holds: by teams of CTAs, each with a slice of the
hidden units (csrc/cuda/team.h). Pure functions of sizes and device, as :mod:`.cuda_plan`.

- ``cluster``: a team is a thread-block cluster, of up to 16 CTAs with 32 units each, which push
  what they hand on into each other's shared memory
- ``wave``: the teams of all layers of a stack are one cluster, and walk side by side: a layer takes
  a step one exchange after the layer below has
- ``grid``: a team is a part of a grid that is on the GPU all at once, of CTAs with 16 units each,
  which hand on through packets in the GPU's memory

A team owns some sequences of one recurrence. Teams beyond those that fit at once wait: a cluster's
until one is done, a grid's for a launch of their own.

The times are modelled: products, barriers and words from what bench/hardware/latency.cu measured on
an H100, each part alone; what is handed on was fitted to kernels on an H200.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from . import cuda_time
from .contract import Problem
from .cuda_kernels import (
    FRAGMENT,
    MOST_OF_A_CLUSTER,
    TEAMS,
    WAYS,
    Device,
    Regime,
    TeamKernel,
    Way,
)

#: What a step takes beside product, barriers and text: handing on, taking in what every CTA of a
#: team gave, and all that nobody waits for elsewhere. ns, and more for each KB taken in. Fitted to
#: LSTMs in bfloat16 on an H200, H 256 to 2048, 1 to 32 sequences a team, each met to within 15%.
EXCHANGE = {
    ("cluster", "forward"): (350.0, 49.0),
    ("cluster", "backward"): (1100.0, 30.0),
    ("grid", "forward"): (1030.0, 50.0),
    ("grid", "backward"): (870.0, 57.0),
    ("wide", "forward"): (1350.0, 36.0),
    ("wide", "backward"): (2000.0, 55.0),
}
EXCHANGE |= {("wave", way): EXCHANGE["cluster", way] for way in WAYS}
#: Barriers of a CTA in a step.
BARRIERS = {("cluster", "forward"): 1, ("wave", "forward"): 1}
#: Clocks of a page, 32 elements, beside its words: until the first is handed on, and of each that
#: follows in the same warp. Assumed.
PAGE, NEXT_PAGE = 250, 180


class Launch(NamedTuple):
    """Of all teams those that run at once: sequences from ``first`` on, ``tiles`` times so many,
    and ``recurrences`` from ``start`` on."""

    first: int
    tiles: int
    start: int
    recurrences: int


class Times(NamedTuple):
    """Nanoseconds of the parts of a team's step, one behind another."""

    product: float
    barriers: float
    text: float
    exchange: float


@dataclass(frozen=True)
class Arrangement:
    """How the teams of a way stand.

    team: CTAs of each. sequences: of each, at most. tiles: teams for one recurrence. at_once:
    teams that the device holds. shared: bytes of a CTA. times: of one team; step: modelled us of
    all. layers: of a wave, whose teams are one cluster.
    """

    kernel: TeamKernel
    H: int
    team: int
    sequences: int
    tiles: int
    at_once: int
    shared: int
    launches: tuple[Launch, ...]
    times: Times
    step: float
    layers: int = 1

    @property
    def cluster(self) -> int:
        return 1 if self.together else self.team * self.layers

    @property
    def together(self) -> bool:
        return self.kernel.regime == "grid"


def kernel_of(way: Way, cell: str, type: str, regime: Regime) -> TeamKernel | None:
    return TEAMS.get(f"{way}_{cell}_{type}_{regime}")


def kernels_of(way: Way, cell: str, type: str, regime: Regime, H: int) -> list[TeamKernel]:
    """All that may walk a layer of H units: a grid's slices are of one width or of two."""
    names = (f"{way}_{cell}_{type}_{kind}" for kind in (regime, *["wide"] * (regime == "grid")))
    return [TEAMS[name] for name in names if name in TEAMS and H <= TEAMS[name].most]


def most_sequences(kernel: TeamKernel, H: int, device: Device) -> int:
    """That one team can own; 0 where a CTA has no room for any."""
    found = 0
    while found < 256 and kernel.shared(H, found + 8) <= device.shared_memory:
        found += 8
    return found


def declined(
    cell: str, type: str, regime: Regime, H: int, device: Device, layers: int = 1
) -> str | None:
    """Why no team of a regime runs a layer, in words; None where one does. layers: of a wave."""
    forward = kernel_of("forward", cell, type, regime)
    if forward is None:
        return f"cuda's {regime}s have no kernel of {cell} in {type}"
    if H > forward.most:
        return f"H={H}: a {regime} holds up to H={forward.most} in {type}"
    if regime != "grid":
        team = forward.team(H) * layers
        if device.capability < (9, 0):
            return f"{device.name} has no clusters, which need compute capability 9.0"
        if team > MOST_OF_A_CLUSTER or device.at_once(team) == 0:
            return f"H={H}: {device.name} has no room for a cluster of {team} CTAs"
    else:
        if not device.cooperative:
            return f"{device.name} starts no grid all at once"
        if device.mps:
            return (
                f"{device.name} is shared by processes through MPS, where CTAs of a grid may wait "
                "for others that have no place"
            )
    for way in WAYS:
        reasons = [_no_room(k, H, device) for k in kernels_of(way, cell, type, regime, H)]
        if None not in reasons:
            return reasons[0]
    return None


def _no_room(kernel: TeamKernel, H: int, device: Device) -> str | None:
    """Why a device does not hold a team of a kernel; whether it holds its cluster is asked of the
    driver."""
    team = kernel.team(H)
    if kernel.regime == "grid" and team > device.multiprocessors:
        return (
            f"H={H}: a grid of {team} CTAs that wait for one another, and {device.name} has "
            f"{device.multiprocessors} multiprocessors"
        )
    if not most_sequences(kernel, H, device):
        return (
            f"H={H} in {kernel.type} of {kernel.cell}: {kernel.way} takes "
            f"{kernel.shared(H, 8):,} bytes of shared memory in a {kernel.regime}, and a CTA of "
            f"{device.name} has {device.shared_memory:,}"
        )
    return None


def times(kernel: TeamKernel, H: int, sequences: int, device: Device) -> Times:
    cell, clock = kernel.definition, device.clock
    columns = -(-sequences // 8)  # tiles of them
    walked = kernel.walked(H)
    fragments = 2 * walked * (kernel.tiles if kernel.way == "forward" else kernel.pairs)
    mmas = fragments * kernel.warps * columns * kernel.matrices
    operand = kernel.operand(H, 8) * columns * kernel.warps * kernel.matrices
    if kernel.way == "forward":
        operand //= kernel.split  # each warp reads its part
    rest = kernel.weights(H)[1] * columns
    product = max(mmas * device.mma_clocks, (operand + rest) / cuda_time.SHARED_RATE)
    product += FRAGMENT / cuda_time.SHARED_RATE  # of the first
    barrier = cuda_time.BARRIER + cuda_time.BARRIER_THREAD * kernel.threads
    called, depth = cuda_time.words(cell, kernel.way)
    pages = -(-columns * 8 * kernel.units // 32)
    of_a_warp = -(-pages // kernel.warps)
    if kernel.way == "backward":
        depth += 1
    text = depth * cuda_time.WORD_LATENCY[1] + PAGE + (of_a_warp - 1) * (NEXT_PAGE + 10 * called)
    sums = float(cuda_time.EXCHANGE)
    if kernel.way == "backward":  # every CTA's part of each element
        parts = kernel.warps if kernel.regime == "grid" else kernel.team(H) * kernel.matrices
        sums += 4 * parts * kernel.units * columns * 8 / cuda_time.SHARED_RATE
    barriers = BARRIERS.get((kernel.regime, kernel.way), 2)
    base, each = EXCHANGE[kernel.kind, kernel.way]
    handed = kernel.handed(H, sequences) / 1024
    return Times(
        product / clock,
        barriers * barrier / clock,
        (text + sums) / clock,
        base + each * handed,
    )


@lru_cache(maxsize=1024)
def arrange(
    kernel: TeamKernel, H: int, B: int, R: int, device: Device, layers: int = 1
) -> Arrangement:
    """The sequences of a team are chosen by the modelled time of all steps. layers: of a wave."""
    team, most = kernel.team(H), most_sequences(kernel, H, device)
    most = min(most, max(8, (2**31 - 1) // (R * H) // 8 * 8))  # an element's place is an int
    if kernel.regime != "grid":
        at_once = device.at_once(team * layers)
    else:
        at_once = device.multiprocessors // team
    best: tuple[float, int, int] | None = None
    for limit in range(8, most + 8, 8):
        tiles = max(1, -(-B // limit))
        sequences = max(1, -(-B // tiles))
        step = sum(times(kernel, H, sequences, device))
        grid = kernel.regime == "grid"
        waves = _launches(tiles, R, at_once) if grid else -(-tiles * R // at_once)
        found = (waves * step, sequences, tiles)
        if best is None or found < best:
            best = found
        if tiles == 1:
            break
    assert best is not None
    step, sequences, tiles = best
    launches = tuple(_cut(kernel.regime, tiles, sequences, R, at_once))
    return Arrangement(
        kernel=kernel,
        H=H,
        team=team,
        sequences=sequences,
        tiles=tiles,
        at_once=at_once,
        shared=kernel.shared(H, sequences),
        launches=launches,
        times=times(kernel, H, sequences, device),
        step=step / 1000,
        layers=layers,
    )


def arranged(
    way: Way,
    cell: str,
    type: str,
    regime: Regime,
    H: int,
    B: int,
    R: int,
    device: Device,
    layers: int = 1,
) -> Arrangement:
    """Of the kernels of a regime that is not declined, that which is modelled to take the least
    time."""
    return min(
        (
            arrange(kernel, H, B, R, device, layers)
            for kernel in kernels_of(way, cell, type, regime, H)
            if _no_room(kernel, H, device) is None
        ),
        key=lambda found: found.step,
    )


@dataclass(frozen=True)
class Walk:
    """One kernel of a plan. row_read, row_written: bytes that a step moves for each sequence and
    recurrence, of all hidden units. step, total: modelled us, of all teams; total is None where T
    is not known."""

    teams: Arrangement
    row_read: int
    row_written: int
    step: float
    total: float | None


@dataclass(frozen=True)
class TeamPlan:
    """How one layer's loop over time runs by teams. T, B: None where they are not known; the plan
    is then of 8 sequences."""

    regime: Regime
    device: Device
    binary: str
    cell: str
    type: str
    T: int | None
    B: int | None
    R: int
    H: int
    forward: Walk
    backward: Walk

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def plan(
    problem: Problem,
    regime: Regime,
    type: str,
    binary: str,
    device: Device,
    forward: tuple[int, int],
    backward: tuple[int, int],
) -> TeamPlan:
    """forward, backward: bytes that a step reads and writes of each sequence and recurrence."""
    assert problem.H is not None
    B, R = 8 if problem.B is None else problem.B, problem.R

    def walk(way: Way, moved: tuple[int, int]) -> Walk:
        assert problem.H is not None
        teams = arranged(way, problem.cell, type, regime, problem.H, B, R, device)
        step = max(teams.step, sum(moved) * B * R / device.bandwidth / 1000)
        total = None
        if problem.T is not None and problem.B is not None:
            total = len(teams.launches) * cuda_time.LAUNCH + problem.T * step
        return Walk(teams, *moved, step, total)

    return TeamPlan(
        regime=regime,
        device=device,
        binary=binary,
        cell=problem.cell,
        type=type,
        T=problem.T,
        B=problem.B,
        R=R,
        H=problem.H,
        forward=walk("forward", forward),
        backward=walk("backward", backward),
    )


def _lines(plan: TeamPlan) -> Iterator[str]:
    teams = plan.forward.teams
    kind = "a cluster" if plan.regime == "cluster" else "part of a grid"
    yield (
        f"regime {plan.regime}: teams of {teams.team} CTAs, each {kind}, own up to "
        f"{teams.sequences} sequences for all of time; H={plan.H} in slices of "
        f"{teams.kernel.units}, {plan.type}, {plan.binary} on {plan.device.name}"
    )
    for walk in (plan.forward, plan.backward):
        teams = walk.teams
        kernel = teams.kernel
        registers, shared = kernel.weights(plan.H)
        launches = len(teams.launches)
        grid = "" if plan.B is None else f"{teams.tiles} x {plan.R} "
        yield (
            f"{kernel.name}: {grid}teams of up to {teams.sequences} sequences, {teams.at_once} at "
            f"once, in {launches} launch{'es' * (launches > 1)}, {kernel.threads} threads a CTA"
        )
        yield (
            f"  of a CTA: weights {registers:,} bytes in registers, {shared:,} in shared memory; "
            f"shared memory {teams.shared:,} of {plan.device.shared_memory:,} bytes"
        )
        rows, each = (1, " and sequence") if plan.B is None else (plan.B * plan.R, "")
        handed = kernel.handed(plan.H, teams.sequences)
        yield (
            f"  a step{each}: {walk.row_read * rows:,} bytes read, {walk.row_written * rows:,} "
            f"written; each CTA takes in {handed:,} bytes of "
            f"{'h' if kernel.way == 'forward' else 'sums'}"
        )
        parts = ", ".join(f"{k} {v / 1000:.2f}" for k, v in teams.times._asdict().items())
        total = "" if walk.total is None else f"; {walk.total:,.0f} us in all, without the GEMMs"
        yield f"  modelled, not measured: {walk.step:.2f} us a step (one team: {parts}){total}"


def _launches(tiles: int, R: int, at_once: int) -> int:
    """Of a grid, one behind another."""
    if at_once >= R:
        return -(-tiles // (at_once // R))
    return tiles * -(-R // at_once)


def _cut(regime: str, tiles: int, sequences: int, R: int, at_once: int) -> Iterator[Launch]:
    if regime != "grid":
        yield Launch(0, tiles, 0, R)
        return
    beside = max(1, at_once // R)
    together = min(R, at_once)
    for tile in range(0, tiles, beside):
        for start in range(0, R, together):
            yield Launch(
                tile * sequences, min(beside, tiles - tile), start, min(together, R - start)
            )
