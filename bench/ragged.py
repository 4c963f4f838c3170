"""What a token of a ragged batch costs, over one of a dense batch: ``python -m bench.ragged``.

The taggers of the list of workloads, packed, and padded with ``lengths=``, beside dense twins;
fastseq alone, in turn. In the whole list each call follows one of torch.nn's, which takes a ragged
batch step by step on one thread, while the others fall asleep.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import torch

import fastseq

from . import table
from .measure import ROUNDS, in_turn
from .pages import note, write
from .workloads import by_name

HEADER = ["a token's cost over dense", "packed", "lengths="]


def calls(cell: str, training: bool) -> list[tuple[Callable[[], Any], int]]:
    """Dense, packed and padded: a call of each, and its tokens."""
    dense, ragged = by_name(f"tagger-dense-{cell}"), by_name(f"tagger-{cell}")
    module: Any = dense.module(fastseq)
    lengths = torch.tensor(ragged.sequence_lengths)

    def call(x: Any, **options: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.set_grad_enabled(training):
                y = module(x, **options)[0]
                if training:
                    (y.data if hasattr(y, "batch_sizes") else y).sum().backward()
            module.zero_grad(set_to_none=True)

        return run

    return [
        (call(dense.input()), dense.N),
        (call(ragged.input()), ragged.N),
        (call(dense.input(), lengths=lengths), ragged.N),
    ]


def row(cell: str, training: bool, seconds: float) -> list[str]:
    ways = calls(cell, training)
    times = in_turn([run for run, _ in ways], seconds)
    dense, *others = (time / tokens for time, (_, tokens) in zip(times, ways, strict=True))
    name = f"{cell.upper()}, {'training' if training else 'forward'}"
    return [name, *(f"{other / dense:.2f}" for other in others)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ragged", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for cell in ("lstm", "gru"):
        for training in (False, True):
            rows.append(row(cell, training, options.seconds))
            print("  ".join(rows[-1]), flush=True)
    how = f"Medians of at least {ROUNDS} rounds of calls in turn, float32."
    text = f"{table.markdown(HEADER, rows)}\n\n{note(how)}"
    return write("ragged", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
