"""One picture of benchmark results: ``python -m bench.plot [--all] [--out PNG] [FILE]``.

The grids of shapes are left out, unless ``--all`` asks for them or nothing else was measured. A
GPU's pictures are drawn by ``python -m bench.rule --gpu``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cuda_results import Point
from .table import ROOT, Results, newest, provenance, read, sign, speedup

FORWARD, TRAINING = "#8fb8de", "#1f5a92"
GRIDS = ("small-", "peers-", "streaming-", "types-", "grid-")
Factors = dict[str, dict[str, float]]  # workload -> way -> times faster


def draw(results: Results, path: Path, everything: bool = False) -> None:
    """Bars of the speed-up over torch.nn, a pair for each workload, on a logarithmic axis."""
    factors: Factors = {}
    marks: dict[str, str] = {}
    for case in results["benchmarks"]:
        info = case["extra_info"]
        factor = speedup(info)
        marks[info["workload"]] = sign(info) or marks.get(info["workload"], "")
        if factor is not None:
            factors.setdefault(info["workload"], {})[info["way"]] = factor
    names = list(factors) if everything else named(factors)
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars(axes, names, factors)
    axes.set_yticks(range(len(names)), [name + marks[name] for name in names], fontsize=8)
    axes.set_title("fastseq against torch.nn: times faster, CPU, float32", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    save(figure, path, provenance(results).replace("**", ""))


def draw_gpu(measured: dict[str, list[Point]], path: Path, caption: str) -> None:
    """Bars of the speed-up over cuDNN in plain calls, a panel for each type and backend of ours.

    Points whose tests were not green are left out.
    """
    panels: dict[str, Factors] = {}
    for contender, points in measured.items():
        for point in points:
            row, factor = point.row, point.ratio("calls")
            if point.green and factor and isfinite(factor):
                panel = f"{contender}, {row.type}" if len(measured) > 1 else row.type
                panels.setdefault(panel, {}).setdefault(row.name, {})[row.way] = factor
    names = named(dict.fromkeys(name for factors in panels.values() for name in factors))
    columns = max(1, len(panels))
    size = (3 + 4 * columns, 1.6 + 0.3 * max(2, len(names)))
    figure = Figure(figsize=size, layout="constrained")
    for axes, (kind, factors) in zip(
        figure.subplots(1, columns, squeeze=False, sharey=True)[0], panels.items(), strict=False
    ):
        bars(axes, names, factors)
        axes.set_title(kind, fontsize=9, loc="left")
        axes.legend(frameon=False, fontsize=8, loc="upper right")
    ours = " and ".join(measured)
    figure.suptitle(f"fastseq's {ours} against cuDNN: times faster, plain calls", fontsize=11)
    save(figure, path, caption)


def named(workloads: Iterable[str]) -> list[str]:
    """Without the grids of shapes, unless there is nothing else."""
    every = list(workloads)
    return [name for name in every if not name.startswith(GRIDS)] or every


def bars(axes: Axes, names: list[str], factors: Factors) -> None:
    """A pair of bars for each name, from 1 to the factor."""
    for way, colour, shift in (("forward", FORWARD, -0.2), ("training", TRAINING, 0.2)):
        rows = [k for k, name in enumerate(names) if way in factors.get(name, {})]
        values = [factors[names[k]][way] for k in rows]
        axes.barh(
            [k + shift for k in rows],
            [value - 1 for value in values],
            left=1,
            height=0.38,
            color=colour,
            label=way,
        )
        for k, value in zip(rows, values, strict=True):
            text = f" {value:.2g}x " if value < 10 else f" {value:.0f}x "
            side = "left" if value >= 1 else "right"
            axes.text(value, k + shift, text, ha=side, va="center", fontsize=7, color="#333333")
    every = [value for name in names for value in factors.get(name, {}).values()]
    axes.set_xscale("log")
    axes.set_xlim(min(0.8, *every) / 1.3, max(2, *every) * 1.4)
    ticks = [t for t in (0.25, 0.5, 1, 2, 5, 10, 20, 50, 100) if _inside(t, axes.get_xlim())]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color="#333333", linewidth=1)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def save(figure: Figure, path: Path, caption: str) -> None:
    figure.supxlabel(caption, fontsize=7, color="#666666")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _inside(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="results; the newest if left out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "speed.png")
    parser.add_argument("--all", action="store_true", help="the grids of shapes too")
    options = parser.parse_args(argv)
    try:
        draw(read(options.file or newest()), options.out, options.all)
    except (OSError, KeyError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
