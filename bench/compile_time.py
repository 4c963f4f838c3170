"""Seconds to compile against T: ``python -m bench.compile_time [--write]``.

The first call of ``torch.compile(layer, fullgraph=True)`` with inductor, in a process of its own
with an empty cache, for torch.nn with ``torch._dynamo.config.allow_rnn`` and for fastseq. What both
need all the same comes before the clock: inductor's own start, and one call of the layer that is
not compiled, which loads fastseq's kernels. The seconds are the processor's, of this process and of
the C++ compiler's, so that what else the machine does counts little.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import table
from .pages import note, write

ROOT = Path(__file__).parent.parent
STEPS = (4, 16, 64, 256)
SIDES = ("torch.nn", "fastseq")
WAYS = ("forward", "training")
Found = dict[tuple[str, str, int, str], list[float | str]]


def compile_once(side: str, kind: str, way: str, T: int) -> float:
    """Processor seconds of the first call, in this process and those that it waits for."""
    import torch

    torch.set_num_threads(1)
    torch._dynamo.config.allow_rnn = True
    library = torch.nn
    if side == "fastseq":
        import fastseq as library  # type: ignore[no-redef]
    torch.manual_seed(0)
    layer = getattr(library, kind)(32, 64, num_layers=2)
    x = torch.randn(T, 8, 32)

    def call(function) -> None:
        with torch.set_grad_enabled(way == "training"):
            y, _ = function(x)
            if way == "training":
                y.sum().backward()

    leaf = torch.randn(3, requires_grad=True)
    torch.compile(lambda t: (t.sin() @ t.cos()).exp())(leaf).backward()
    call(layer)
    compiled = torch.compile(layer, fullgraph=True)
    start = os.times()
    call(compiled)
    return sum(os.times()[:4]) - sum(start[:4])


def measure(side: str, kind: str, way: str, T: int, limit: float) -> float | str:
    """Seconds, or why there are none."""
    command = [sys.executable, "-m", "bench.compile_time", "--one", side, kind, way, str(T)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        environment |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return f"> {limit:.0f} s"
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}"
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line or "Unsupp" in line]
        return (lines or ["failed"])[-1].strip()[:60]
    return float(done.stdout.split()[-1])


def shown(samples: list[float | str]) -> str:
    for sample in samples:
        if isinstance(sample, str):
            return sample
    times = [s for s in samples if isinstance(s, float)]
    spread = f" ({min(times):.1f} to {max(times):.1f})" if len(times) > 1 else ""
    return f"{statistics.median(times):.1f} s{spread}"


def short(samples: list[float | str]) -> str:
    """Of an error its class: the run prints its words."""
    return shown(samples).partition(":")[0]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compile_time", description=__doc__)
    parser.add_argument("--cells", default="LSTM GRU")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that one may take")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        side, kind, way, T = options.one
        print(compile_once(side, kind, way, int(T)))
        return 0
    found: Found = {}
    grid = list(itertools.product(options.cells.split(), WAYS, options.steps, SIDES))
    for _ in range(options.rounds):
        for kind, way, T, side in grid:
            samples = found.setdefault((kind, way, T, side), [])
            # what failed, or took long, is asked once
            if not samples or (isinstance(samples[-1], float) and samples[0] < 40):  # type: ignore
                samples.append(measure(side, kind, way, T, options.limit))
                print(kind, way, T, side, shown(samples), flush=True)
    text = table_of(found, options.cells.split(), options.steps, options.rounds)
    return write("compile_time", text) if options.write else 0


def table_of(found: Found, cells: list[str], steps: Sequence[int], rounds: int) -> str:
    rows = [
        [f"{kind}, {way}, {side}", *(short(found[kind, way, T, side]) for T in steps)]
        for kind in cells
        for way in WAYS
        for side in SIDES
    ]
    how = "Two layers of 64 units, batch 8, one thread; medians over processes in turn, "
    how += f"{rounds} rounds, and their spread; of one process where there is none."
    return f"{table.markdown(['first call', *(f'T = {T}' for T in steps)], rows)}\n\n{note(how)}"


if __name__ == "__main__":
    sys.exit(main())
