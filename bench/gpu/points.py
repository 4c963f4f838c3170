"""What is measured, in which order; the columns of a row."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from fastseq.backends.cuda_plan import H100, largest

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
#: Our backends, and the form in which cuda runs: one CTA owns some sequences for all of time.
CONTENDERS = ("cuda", "triton")
CTA = "cta"

FIELDS = (
    "name shape cell T B I H layers directions ragged type way contender form how ms best_ms "
    "samples tested error device capability torch triton cudnn fastseq commit date"
).split()


def contender(form: str) -> str:
    """The backend that a form belongs to."""
    return "cuda" if form == CTA else "triton"


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


def is_persistent(row: dict[str, Any]) -> bool:
    """Whether torch 2.11 asks cuDNN to keep the weights on the chip, as those of small layers."""
    if row["ragged"] == "yes" or " P" in row["shape"] or row["type"] == "bfloat16":
        return False
    training, elman = row["way"] == "training", row["cell"] == "rnn"
    most = (256 if training else 384) if elman else (128 if training else 192)
    return int(row["H"]) <= most


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
    own = cta()
    wanted = [*matching(None), *own] if named is None else matching(named, own)
    listed = [w for w in wanted if w not in own]
    of_cta = list(_of_cta([w for w in wanted if w in own]))
    *early, last = tiers([w for w in listed if w.dtype is torch.float32])
    for workload in early[0]:
        for kind in FIRST_TYPES:
            yield from _both_ways(workload, kind)
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
