"""What is measured, in which order; the columns of a row."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastseq.backends.cuda_plan import H100, any_holds, largest

from ..workloads import TEXTS, Workload, matching

#: The most informative first. Two are float32's products: TF32, and as right as float32 is.
TYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "tf32": torch.float32,
    "float32": torch.float32,
}
FIRST_TYPES = ("bfloat16", "float16", "tf32")
HEADLINE = "flashrnn-point char-rnn-h512* small-b1-h128* speaker-encoder ptb-medium"
NEXT = "peers-* tagger* rl-* deepspeech2*"
LAST = "long-*"
#: The sizes for which cuda has a target, those that say most first; patterns name them as cta-*.
CTA_SIZES = {"T": (512, 2048, 128, 32), "H": (128, 64, 32), "B": (1, 8, 32, 128, 512)}
SAMPLE = 80
HOWS = ("graph", "calls")
#: The sizes for which cuda's teams have a target, the most telling first; patterns name them as
#: team-*. Hidden units and sequences, each at both numbers of steps.
TEAM_SIZES = (
    *((512, 16), (256, 1), (768, 16), (1024, 64), (256, 16), (512, 1), (512, 64), (1024, 16)),
    *((768, 1), (768, 64), (1024, 1), (2048, 16), (256, 64), (2048, 1), (2048, 64)),
    *((512, 256), (1024, 256), (256, 256), (768, 256), (2048, 256)),
)
TEAM_STEPS = (1024, 64)
#: And beside LSTM and GRU of one layer in one direction: cell, hidden units, sequences, layers,
#: whether in both directions.
TEAM_OTHERS = (
    ("lstm", 512, 16, 1, True),
    ("lstm", 256, 16, 2, False),
    ("lstm", 256, 1, 2, False),
    ("lstm", 512, 16, 2, False),
    ("gru", 1024, 16, 1, True),
    ("gru", 256, 64, 2, False),
    *(("rnn", H, B, 1, False) for H, B in ((512, 16), (1024, 64), (2048, 1))),
)
#: Our backends.
CONTENDERS = ("cuda", "triton")
#: The forms in which cuda runs: one CTA owns some sequences for all of time; a team of CTAs does, a
#: cluster or part of a grid that is on the GPU all at once; the teams of a stack's layers do, side
#: by side in one cluster.
CTA, CLUSTER, GRID, WAVE = "cta", "team-cluster", "team-grid", "team-wave"
TEAMS = (CLUSTER, GRID, WAVE)

FIELDS = (
    "name shape cell T B I H layers directions ragged type way contender form how ms best_ms "
    "samples tested error device capability torch triton cudnn fastseq commit date"
).split()


def contender(form: str) -> str:
    """The backend that a form belongs to."""
    return "cuda" if form in (CTA, *TEAMS) else "triton"


class Unit(NamedTuple):
    """One time of a point. form: of ours alone. how: replays of a graph, or calls."""

    contender: str
    form: str
    how: str


@dataclass(frozen=True)
class Point:
    """A workload in a type, forward or with all gradients."""

    workload: Workload
    type: str
    way: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.workload.name, self.type, self.way

    @property
    def typed(self) -> Workload:
        return replace(self.workload, dtype=TYPES[self.type])

    @property
    def training(self) -> bool:
        return self.way == "training"

    def fields(self) -> dict[str, Any]:
        w = self.workload
        sizes = {"T": w.T, "B": w.B, "I": w.I, "H": w.H, "layers": w.layers, "directions": w.D}
        return {
            "name": w.name,
            "shape": w.shape,
            "cell": w.cell,
            **sizes,
            "ragged": "yes" if w.lengths != "equal" else "no",
            "type": self.type,
            "way": self.way,
        }


def grid() -> list[Workload]:
    """1,080 of them: cells, sizes, batches, lengths, and layers."""
    points = itertools.product(
        ("lstm", "gru", "rnn"),
        (64, 128, 256, 512, 1024, 2048),
        (1, 8, 32, 128, 512),
        (32, 128, 512, 2048),
        ((1, False), (1, True), (2, False)),
    )
    return [
        Workload(
            f"grid-{cell}-t{T}-b{B}-h{H}-x{layers}{'-both' if both else ''}",
            cell,  # type: ignore[arg-type]
            T=T,
            B=B,
            I=H,
            H=H,
            layers=layers,
            bidirectional=both,
            source="fastseq: a grid",
        )
        for cell, H, B, T, (layers, both) in points
    ]


def cta() -> list[Workload]:
    """Where one CTA holds the weights of one layer in one direction: LSTM and GRU at every size,
    Elman's cell at some of them."""
    found = []
    for T, H in itertools.product(CTA_SIZES["T"], CTA_SIZES["H"]):
        for cell, B in itertools.product(("lstm", "gru", "rnn"), CTA_SIZES["B"]):
            if cell != "rnn" or (T in (512, 2048) and B in (1, 32, 512)):
                name, source = f"cta-{cell}-h{H}-b{B}-t{T}", "fastseq: what one CTA holds"
                found.append(Workload(name, cell, T=T, B=B, I=H, H=H, source=source))  # type: ignore[arg-type]
    return found


def _of_cta(wanted: list[Workload]) -> Iterator[Point]:
    """By size and type, of those that cuda runs: all batches of a cell beside each other."""
    for T, H in itertools.product(CTA_SIZES["T"], CTA_SIZES["H"]):
        some = [w for w in wanted if (w.T, w.H) == (T, H)]
        for kind, cell in itertools.product(FIRST_TYPES, ("lstm", "gru", "rnn")):
            if H <= largest(TEXTS.get(cell, cell), kind, True, H100):
                for workload in [w for w in some if w.cell == cell]:
                    yield from _both_ways(workload, kind)


def _of_teams(wanted: list[Workload], kinds: tuple[str, ...], T: int) -> Iterator[Point]:
    """In the order of the sizes; LSTM and GRU beside each other, in each type."""
    sizes = {w.name: w for w in wanted if w.T == T}
    for workload, kind in itertools.product(sizes.values(), kinds):
        cell = TEXTS.get(workload.cell, workload.cell)
        if any_holds(cell, kind, workload.H, True, H100):
            yield from _both_ways(workload, kind)


def team() -> list[Workload]:
    """Where a team of CTAs shares the weights of a layer: LSTM and GRU at every size, then what has
    two directions or layers, and Elman's cell."""
    found = []

    def add(cell: str, T: int, H: int, B: int, layers: int = 1, both: bool = False) -> None:
        name = f"team-{cell}-h{H}-b{B}-t{T}" + f"-x{layers}" * (layers > 1) + "-both" * both
        given = {"T": T, "B": B, "I": H, "H": H, "layers": layers, "bidirectional": both}
        found.append(Workload(name, cell, **given, source="fastseq: what teams hold"))  # type: ignore[arg-type]

    for T in TEAM_STEPS:
        for H, B in TEAM_SIZES:
            for cell in ("lstm", "gru"):
                add(cell, T, H, B)
        for other, H, B, layers, both in TEAM_OTHERS:
            add(other, T, H, B, layers, both)
    return found


def is_persistent(row: dict[str, Any]) -> bool:
    """Whether torch 2.11 asks cuDNN to keep the weights on the chip, on an A100 or a later device
    of that kind: those of small layers; in float16 also those of larger ones whose sizes fit."""
    if row["ragged"] == "yes" or " P" in row["shape"] or row["type"] == "bfloat16":
        return False
    training, elman = row["way"] == "training", row["cell"] == "rnn"
    H, I, B = (int(row[name]) for name in ("H", "I", "B"))  # noqa: E741
    one = str(row["layers"]) == str(row["directions"]) == "1"
    if row["type"] == "float16" and one and row["cell"] != "gru":
        fits = H <= 1024 and H % 128 == I % 128 == B % 8 == 0 and B <= 128
        if fits and not (elman and B >= 96 and H >= 896):
            return True
    most = (256 if training else 384) if elman else (128 if training else 192)
    return H <= most


def _both_ways(workload: Workload, kind: str) -> Iterator[Point]:
    for way in ("forward", "training") if workload.training else ("forward",):
        yield Point(workload, kind, way)


def tiers(workloads: list[Workload]) -> list[list[Workload]]:
    """The headline, what comes next, the rest, and what takes longest."""
    patterns = (HEADLINE, NEXT, LAST)
    headline, following, last = ([w for w in matching(p) if w in workloads] for p in patterns)
    rest = [w for w in workloads if w not in (*headline, *following, *last)]
    return [headline, following, rest, last]


def points(patterns: str | None, types: str | None = None) -> Iterator[Point]:
    """In the order of what is learnt from them; without patterns the grid comes after the list.

    patterns: of names; 'headline' stands for those that are measured first.
    types: those of TYPES that are wanted; None for all.
    A workload runs in every type, so those of another type than float32 are left out.

    Raises:
        ValueError: a pattern matches nothing, or a type is none of TYPES.
    """
    wanted = list(TYPES) if types is None else types.split()
    for kind in wanted:
        if kind not in TYPES:
            raise ValueError(f"expected some of {' '.join(TYPES)}, got {kind!r}")
    return (point for point in _every(patterns) if point.type in wanted)


def _every(patterns: str | None) -> Iterator[Point]:
    named = HEADLINE if patterns == "headline" else patterns
    own = [*cta(), *team()]
    wanted = [*matching(None), *own] if named is None else matching(named, own)
    listed = [w for w in wanted if w not in own]
    of_cta = list(_of_cta([w for w in wanted if w.name.startswith("cta-")]))
    of_team = [w for w in wanted if w.name.startswith("team-")]
    *early, last = tiers([w for w in listed if w.dtype is torch.float32])
    for workload in early[0]:
        for kind in FIRST_TYPES:
            yield from _both_ways(workload, kind)
    long, short = TEAM_STEPS
    yield from _of_teams(of_team, ("bfloat16", "float16"), long)
    first = [p for p in of_cta if p.workload.T == CTA_SIZES["T"][0] and p.workload.H == 128]
    yield from first
    for workload in itertools.chain(*early[1:]):
        for kind in FIRST_TYPES:
            yield from _both_ways(workload, kind)
    for workload in itertools.chain(*early):
        yield from _both_ways(workload, "float32")
    for workload in last:
        for kind in TYPES:
            yield from _both_ways(workload, kind)
    yield from _of_teams(of_team, ("tf32",), long)
    yield from _of_teams(of_team, FIRST_TYPES, short)
    yield from (p for p in of_cta if p not in first)
    if patterns is None:
        every_size = [(w, kind) for w in grid() for kind in FIRST_TYPES]
        sample = random.Random(0).sample(every_size, SAMPLE)
        taken = set(sample)
        for workload, kind in (*sample, *(p for p in every_size if p not in taken)):
            yield from _both_ways(workload, kind)


def units(point: Point, forms: list[str]) -> list[Unit]:
    """cuDNN first: its time stands whatever becomes of ours."""
    found = [Unit("cudnn", "", how) for how in HOWS]
    return found + [Unit(contender(form), form, how) for form in forms for how in HOWS]


#: Launches from Python cost some 0.1 ms each, so a call of more of them says nothing new.
MOST_LAUNCHES = 4096


def left_out(point: Point, unit: Unit) -> str:
    """Why a unit is not tried; '' where it is."""
    w = point.workload
    if unit.contender == "cudnn":
        return ""
    if unit.how == "graph" and w.lengths != "equal":
        return "left out: a CUDA graph cannot record sequences of different lengths"
    if unit.form == "step" and w.T * w.layers > MOST_LAUNCHES:
        return f"left out: more than {MOST_LAUNCHES} launches a call"
    return ""


def is_fault(row: dict[str, Any]) -> bool:
    """Whether a row speaks of something wrong with our kernels."""
    error = row.get("error") or ""
    return row["contender"] != "cudnn" and bool(error) and not error.startswith("left out")
