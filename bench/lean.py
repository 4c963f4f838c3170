"""What ``memory="lean"`` costs and spares: ``python -m bench.lean [--write]``.

Forward and backward of torch.nn, of fastseq with all gates kept and of fastseq with its output kept
alone, round by round in turn; and the bytes that each keeps between forward and backward. Both of
fastseq's run the same kernels, native where it was built: the ratio is that of the two ways.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch

import fastseq
from fastseq.backends import load

from . import table
from .measure import TORCH, Contender, Race, quiet_collector
from .pages import note, write
from .workloads import Workload, matching

WORKLOADS = (
    "char-rnn-h128-* char-rnn-h512-* tagger-* speaker-encoder rl-policy-b8 forecaster-* "
    "small-b4-h64-* ptb-medium"
)
HEADER = ["workload", "full ms", "lean ms", "lean / full", "spread"]
HEADER += ["full keeps MiB", "lean keeps MiB", "torch.nn keeps MiB"]


def kernels() -> str:
    return "numba" if isinstance(load("native"), str) else "native"


def race(workload: Workload) -> Race:
    """torch.nn, full and lean, their numbers compared."""
    found = Race(workload, "training", [], limit=60.0)
    del found.contenders[1:]  # what fastseq chooses may be torch's own, which has no lean form
    state = found.contenders[0].module.state_dict()
    for memory in ("full", "lean"):
        module = workload.module(fastseq, backend=kernels(), memory=memory)
        module.load_state_dict(state)
        found._enter(Contender(memory, module.train()))
    return found


def row(workload: Workload, seconds: float, rounds: int) -> list[str]:
    found = race(workload)
    kept = found.saved_bytes()
    found.warm_up()
    theirs, *ours = found.contenders
    with quiet_collector():
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(theirs.samples) < rounds:
            for contender in (theirs, *ours):
                contender.samples.append(found.sample(contender))
            ours.reverse()  # who comes behind torch.nn finds a colder cache
    times = {c.label: c.samples for c in found.contenders}
    full, lean = (statistics.median(times[way]) for way in ("full", "lean"))
    # how far the ratio of one round strays: the middle half of the rounds
    ratios = [b / a for a, b in zip(times["full"], times["lean"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return [
        f"{workload.name} ({workload.shape})",
        *(table.milliseconds(1e3 * t) for t in (full, lean)),
        f"{lean / full:.2f}",
        f"{low:.2f} to {high:.2f}",
        *(f"{kept[label] / 2**20:.3g}" for label in ("full", "lean", TORCH)),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.lean", description=__doc__)
    parser.add_argument("--workloads", default=WORKLOADS, help="patterns of names")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="what a workload takes")
    parser.add_argument("--rounds", type=int, default=15, help="rounds at least")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for workload in matching(options.workloads):
        if workload.training:
            rows.append(row(workload, options.seconds, options.rounds))
            print("  ".join(rows[-1]), flush=True)
    how = f"Medians of at least {options.rounds} interleaved rounds, float32."
    text = f"{table.markdown(HEADER, rows)}\n\n{note(how)}"
    return write("lean", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
