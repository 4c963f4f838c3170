"""The stage ``smoke``: in about a minute, whether each form runs and its numbers are right, how
fast it is beside cuDNN, and what a meeting of programs costs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..workloads import Workload
from . import barrier, forms, timings
from .budget import Clock
from .build import Built
from .crew import crew
from .points import FIRST_TYPES, WAVE, Point, Unit

T, B = 128, 16
#: Sizes tried for a form, the most telling first; of triton's multiples of 128, and 16 rows, where
#: cuDNN keeps the weights of an LSTM in float16 on the chip.
SIZES = {
    "cta": (128, 64),
    "team-cluster": (512,),
    "team-grid": (768,),
    "team-wave": (256,),
    "walk": (128, 64, 32),
    "grid-resident": (512, 256, 128),
    "grid": (1024, 1280, 512, 256),
    "step": (512, 256),
}


def listed(kinds: forms.Kinds) -> list[Point]:
    """LSTM and GRU in each type and form that this device has, forward and then training."""
    found: dict[Point, None] = {}
    for way in ("forward", "training"):
        for kind in FIRST_TYPES:
            for cell in ("lstm", "gru"):
                for form, sizes in SIZES.items():
                    for H in sizes:
                        layers = 2 if form == WAVE else 1
                        point = Point(_workload(cell, H, layers), kind, way)
                        if form in forms.forms(point.typed, kind, kinds):
                            found[point] = None
                            break
    return list(found)


def _workload(cell: str, H: int, layers: int) -> Workload:
    name = f"smoke-{cell}-h{H}" + f"-x{layers}" * (layers > 1)
    sizes = {"T": T, "B": B, "I": H, "H": H, "layers": layers}
    return Workload(name, cell, source="fastseq: each form", **sizes)  # type: ignore[arg-type]


def run(
    kinds: forms.Kinds,
    built: Built,
    clock: Clock,
    options: timings.Options,
    keep: timings.Keep,
    say: Callable[[str], None],
) -> int:
    """How many points are left. Meetings first, which a grid cannot do without."""
    every = listed(kinds)
    half = len(every) // 2
    quick = timings.Options(options.silence, options.log, seconds=0.04)
    if "triton" in kinds.contenders:
        _meetings(kinds, Clock(clock.left / 3), options, keep)
    left = timings.run(every[:half], {}, kinds, built, clock, quick, keep, say)
    return left + timings.run(every[half:], {}, kinds, built, clock, quick, keep, say)


def _meetings(
    kinds: forms.Kinds, clock: Clock, options: timings.Options, keep: timings.Keep
) -> None:
    """A row for each number of programs; its H is that number."""
    waiting = iter(barrier.counts(kinds))
    work = partial(barrier.microseconds, silence=4 * options.silence)
    for event in crew(lambda: next(waiting, None), work, clock, log=options.log):
        programs = event.task
        meeting = Workload(
            f"barrier-{programs}", "rnn", T=1, B=1, I=1, H=programs, source="fastseq: a meeting"
        )
        fields: dict[str, Any] = {}
        if event.kind == "told":
            ms = f"{event.message / 1e3:.5g}"
            fields = {"ms": ms, "best_ms": ms, "samples": 7}
        elif event.kind in ("lost", "failed"):
            fields = {"error": f"{event.text} ({event.doing})"}
        if fields:
            fields |= {"shape": f"{programs} programs meet", "cell": "", "type": ""}
            keep(Point(meeting, "float32", "forward"), Unit("triton", "grid", "calls"), fields)
