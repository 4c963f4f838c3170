"""What one call costs: ``python -m bench.overhead``.

A layer that is called with one step at a time, the state handed back, at B = 1: median microseconds
of a call, for torch.nn as a layer and as a cell, fastseq as it chooses and by the handle of
fastseq.streaming, each backend, and the peers that are installed, on one thread, in inference mode.
What runs is the streaming workloads' part of ``python -m bench``. Beside the times stands the
fraction of the limit (bench/limit.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from statistics import median

import torch

from .limit import limit, possible
from .measure import ROUNDS, Race, available_backends, quiet_collector
from .pages import note
from .peers import PEERS, named
from .remote import Remote
from .table import columns, markdown
from .workloads import Workload, matching


def measure(
    workload: Workload, backends: list[str], peers: list[Remote], seconds: float
) -> dict[str, float]:
    """Median seconds of a call, by contender."""
    race = Race(workload, "forward", backends, 60.0, peers)
    samples: dict[str, list[float]] = {}
    with quiet_collector():
        race.warm_up()
        end = time.perf_counter() + seconds
        rounds = 0
        while time.perf_counter() < end or rounds < ROUNDS:
            rounds += 1
            for contender in race.contenders:
                race.step(contender)  # a call is so short that caches decide
                samples.setdefault(contender.label, []).append(race.sample(contender))
            for peer, taken in zip(race.peers, race.sample_peers(), strict=True):
                samples.setdefault(peer.name, []).append(taken)
    return {label: median(found) / workload.T for label, found in samples.items()}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.overhead", description=__doc__)
    parser.add_argument("--workloads", default="streaming-*", help="patterns of streaming ones")
    parser.add_argument("--backends", help="backends beside the chosen one; default all there are")
    parser.add_argument("--peers", default="all", help="other libraries; '' for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="what a workload may take")
    options = parser.parse_args(argv)
    try:
        workloads = matching(options.workloads)
        backends = available_backends(options.backends)
        names = named(options.peers)
    except ValueError as error:
        parser.error(str(error))
    if any(workload.mode != "streaming" for workload in workloads):
        parser.error("--workloads: expected names of streaming workloads")
    torch.set_num_threads(options.threads)
    rates = possible(options.threads)
    peers = [Remote(n, options.threads) for n in names if PEERS[n].available() is None]
    try:
        times = {w: measure(w, backends, peers, options.seconds) for w in workloads}
    finally:
        for peer in peers:
            peer.close()
    labels = columns((label for row in times.values() for label in row), names)
    rows = []
    for workload, row in times.items():
        least = limit(workload, False, rates) / workload.T
        cells = [f"{row[k] * 1e6:.1f} ({least / row[k]:.0%})" if k in row else "" for k in labels]
        rows.append([f"{workload.cell.upper()} H{workload.H}", *cells, f"{least * 1e6:.1f}"])
    print(markdown(["us a call", *labels, "limit"], rows))
    print(f"\n{note(f'Medians of at least {ROUNDS} interleaved rounds.')} Peers:", end=" ")
    print(", ".join(f"{peer.name} {peer.version}" for peer in peers) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
