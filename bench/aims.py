"""The aims beside what was measured: ``python -m bench.aims [--write] [RESULTS [PEERS ...]]``.

RESULTS is a file of ``python -m bench``, PEERS those of comparisons with other libraries, one for
each count of threads; what is left out is the newest under bench/results. ``--write`` puts the
table between its marks in docs/performance.md. Each layer belongs to one row; a workload of one
step a call, streaming or a cell, to none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from . import pages
from .measure import Way
from .table import OURS, Results, fraction, markdown, newest, newest_with_peers, note, read, speedup
from .workloads import WORKLOADS, Workload, by_name

WAYS: tuple[Way, Way] = ("forward", "training")


@dataclass(frozen=True)
class Aim:
    """Of a geometric mean, and of each workload alone."""

    mean: float
    each: float | None = None

    def __str__(self) -> str:
        return f"{self.mean}" + ("" if self.each is None else f", each {self.each}")


FEW_LSTM = "LSTM, B <= 4, H <= 512"
PRODUCTS_LSTM = "LSTM, B >= 32, H >= 256"
REST_LSTM = "LSTM, the rest"
FEW = "GRU and Elman, B <= 4"
REST = "GRU and Elman, the rest"
PROJECTED = "LSTM with a projection"
TYPED = {
    torch.float64: "LSTM and GRU in float64",
    torch.float16: "LSTM and GRU in float16",
    torch.bfloat16: "GRU in bfloat16",
}

#: times faster than torch.nn: forward, training
AIMS: dict[str, tuple[Aim, Aim]] = {
    FEW_LSTM: (Aim(2.5, 1.3), Aim(2.5, 1.5)),
    PRODUCTS_LSTM: (Aim(1.0), Aim(1.1, 0.97)),
    REST_LSTM: (Aim(1.15, 1.0), Aim(1.3, 1.0)),
    FEW: (Aim(6), Aim(12)),
    REST: (Aim(1.4, 1.0), Aim(1.6, 1.0)),
    PROJECTED: (Aim(2), Aim(2)),
    **{name: (Aim(2), Aim(2)) for name in TYPED.values()},
}
RAGGED_COST = 1.1  # at most: a token's, over that of the dense twin
FRACTION = 0.6  # of the limit
OTHERS = Aim(1.2, 1.0)  # times faster than the best other library,
NEAR, NEAR_EACH = 1.25, 0.95  # each but where that one is within 1.25 of the limit


def group(workload: Workload) -> str | None:
    """The key of AIMS; None for one step a call and for ragged input, which has a row apart."""
    if workload.mode != "layer" or workload.lengths != "equal":
        return None
    if workload.dtype in TYPED:
        return TYPED[workload.dtype]
    if workload.proj:
        return PROJECTED
    if workload.cell != "lstm":
        return FEW if workload.B <= 4 else REST
    if workload.B <= 4 and workload.H <= 512:
        return FEW_LSTM
    return PRODUCTS_LSTM if workload.B >= 32 and workload.H >= 256 else REST_LSTM


def layers(results: Results, way: Way) -> Iterator[tuple[Workload, dict[str, Any]]]:
    """The cases that are one call of a layer, and what was recorded of them."""
    for case in results["benchmarks"]:
        info = case["extra_info"]
        workload = by_name(info["workload"])
        if info["way"] == way and workload.mode == "layer":
            yield workload, info


def factors(results: Results, way: Way) -> dict[str, list[float]]:
    """Times faster than torch.nn, by group."""
    found: dict[str, list[float]] = {name: [] for name in AIMS}
    for workload, info in layers(results, way):
        name, factor = group(workload), speedup(info)
        if name is not None and factor is not None:
            found[name].append(factor)
    return found


def dense_twin(workload: Workload) -> Workload | None:
    """The same layer with all sequences of the full length."""
    dense = replace(workload, lengths="equal")
    return next(
        (w for w in WORKLOADS if replace(w, name=dense.name, source=dense.source) == dense), None
    )


def ragged_costs(results: Results, way: Way) -> dict[str, float]:
    """Milliseconds a token over those of the dense twin, by cell."""
    times = {w: info["median_ms"][OURS] / w.N for w, info in layers(results, way)}
    twins = {w: dense_twin(w) for w in times if w.lengths != "equal"}
    return {w.cell: times[w] / times[dense] for w, dense in twins.items() if dense in times}


def fractions(results: Results, way: Way) -> list[float]:
    """Of the limit, where there is one."""
    shares = (fraction(info, OURS) for _, info in layers(results, way))
    return [share for share in shares if share is not None]


def beside_others(results: Results, way: Way) -> tuple[list[float], list[float]]:
    """Times faster than the best other library: where that one is near the limit, and elsewhere."""
    near, elsewhere = [], []
    for _, info in layers(results, way):
        times = info["median_ms"]
        best = min((times[name] for name in results["peers"] if name in times), default=None)
        if best is not None:
            where = near if best <= NEAR * info["limit_ms"] else elsewhere
            where.append(best / times[OURS])
    return near, elsewhere


def marked(value: float, reached: bool) -> str:
    digits = 3 if value < 1 else 2 if value < 10 else 1
    return f"{value:.{digits}f}" if reached else f"**{value:.{digits}f}**"


def at_least(value: float, aim: float | None) -> str:
    """Bold where it falls short."""
    return marked(value, aim is None or value >= aim)


def mean_and_least(values: list[float], aim: Aim) -> str:
    if not values:
        return "not measured"
    return f"{at_least(geometric_mean(values), aim.mean)}, least {at_least(min(values), aim.each)}"


def costs(found: dict[str, float]) -> str:
    shown = (f"{cell.upper()} {marked(cost, cost <= RAGGED_COST)}" for cell, cost in found.items())
    return ", ".join(shown) or "not measured"


def middle(values: list[float]) -> str:
    return at_least(median(values), FRACTION) if values else "not measured"


def near_and_elsewhere(near: list[float], elsewhere: list[float]) -> str:
    if not near + elsewhere:
        return "not measured"
    text = at_least(geometric_mean(near + elsewhere), OTHERS.mean)
    text += f", least {at_least(min(elsewhere), OTHERS.each)}" if elsewhere else ""
    return text + (f", near the limit {at_least(min(near), NEAR_EACH)}" if near else "")


def rows(results: Results, others: Iterable[Results] = ()) -> list[list[str]]:
    """Name, aim and figure forward, aim and figure in training."""
    forward, training = (factors(results, way) for way in WAYS)
    found = [
        [
            name,
            *(str(aims[0]), mean_and_least(forward[name], aims[0])),
            *(str(aims[1]), mean_and_least(training[name], aims[1])),
        ]
        for name, aims in AIMS.items()
    ]

    def row(name: str, aim: str, figures: Iterable[str]) -> None:
        found.append([name, *(text for figure in figures for text in (aim, figure))])

    row(
        "ragged: a token's cost over dense",
        f"at most {RAGGED_COST}",
        (costs(ragged_costs(results, way)) for way in WAYS),
    )
    row(
        "fraction of the limit, median",
        str(FRACTION),
        (middle(fractions(results, way)) for way in WAYS),
    )
    for other in others:
        machine = other["machine_info"]
        threads, model = machine["threads"], machine["cpu_model"]
        row(
            f"the best other library, {threads} thread{'s' * (threads > 1)}, {model}",
            f"{OTHERS}, near the limit {NEAR_EACH}",
            (near_and_elsewhere(*beside_others(other, way)) for way in WAYS),
        )
    return found


def block(path: Path, others: Iterable[Path] = ()) -> str:
    """The table, and where each of its figures is from."""
    results, beside = read(path), [(read(other), other) for other in others]
    header = ["", "aim, forward", "forward", "aim, training", "training"]
    parts = [markdown(header, rows(results, [other for other, _ in beside])), note(results, path)]
    parts += [f"Other libraries. {note(other, found)}" for other, found in beside]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aims", description=__doc__)
    parser.add_argument("results", nargs="?", type=Path, help="results; the newest if left out")
    parser.add_argument("peers", nargs="*", type=Path, help="with peers; the newest if left out")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    try:
        text = block(options.results or newest(), options.peers or newest_with_peers())
    except (OSError, KeyError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if options.write:
        return pages.write("aims", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
