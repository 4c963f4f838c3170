"""What ``deterministic=True`` costs in inference: ``python -m bench.deterministic [--write]``.

It makes a difference for calls of few rows, T times B of them, which read the weights as they are
where it has them packed, so that a sum over k has the same order as in a large batch.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

import torch

import fastseq

from . import table
from .measure import ROUNDS, in_turn
from .pages import note, write

SHAPES = (  # T, B, H = I
    (1, 1, 128),
    (1, 8, 128),
    (4, 2, 256),
    (8, 1, 512),
    (64, 1, 128),
    (50, 64, 512),
)
HEADER = ["inference", "microseconds", "deterministic", "ratio"]


def row(cell: str, T: int, B: int, H: int, seconds: float) -> list[str]:
    ways = [getattr(fastseq, cell)(H, H, deterministic=d).eval() for d in (False, True)]
    x = torch.randn(T, B, H)
    with torch.inference_mode():
        found = in_turn([partial(module, x) for module in ways], seconds)
    plain, fixed = (1e6 * time for time in found)
    shape = f"{cell} T{T} B{B} I{H} H{H}"
    return [shape, f"{plain:.3g}", f"{fixed:.3g}", f"{fixed / plain:.2f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.deterministic", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for cell in ("LSTM", "GRU"):
        for T, B, H in SHAPES:
            rows.append(row(cell, T, B, H, options.seconds))
            print("  ".join(rows[-1]), flush=True)
    how = f"Medians of at least {ROUNDS} rounds of calls in turn, float32."
    text = f"{table.markdown(HEADER, rows)}\n\n{note(how)}"
    return write("deterministic", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
