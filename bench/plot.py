"""One picture of benchmark results: ``python -m bench.plot [--all] [--out PNG] [FILE]``.

The grids of shapes are left out, unless ``--all`` asks for them or nothing else was measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from .table import ROOT, Results, newest, provenance, read, speedup

FORWARD, TRAINING = "#8fb8de", "#1f5a92"


def draw(results: Results, path: Path, everything: bool = False) -> None:
    """Bars of the speed-up over torch.nn, a pair for each workload, on a logarithmic axis."""
    factors: dict[str, dict[str, float]] = {}
    for case in results["benchmarks"]:
        info = case["extra_info"]
        factor = speedup(info)
        if factor is not None:
            factors.setdefault(info["workload"], {})[info["way"]] = factor
    grids = ("small-", "peers-", "streaming-", "types-")
    named = [name for name in factors if not name.startswith(grids)]
    names = list(factors) if everything or not named else named
    figure = Figure(figsize=(9, 1.6 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    for way, colour, shift in (("forward", FORWARD, -0.2), ("training", TRAINING, 0.2)):
        rows = [k for k, name in enumerate(names) if way in factors[name]]
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
    every = [value for name in names for value in factors[name].values()]
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
    axes.set_title("fastseq against torch.nn: times faster, CPU, float32", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    figure.supxlabel(provenance(results), fontsize=7, color="#666666")
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
