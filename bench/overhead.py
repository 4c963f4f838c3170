"""What one call costs: ``python -m bench.overhead``.

A layer that is called with one step at a time, the state handed back, at B = 1: median microseconds
of a module call, for torch.nn, fastseq as it chooses, each backend, and the peers that are
installed, on one thread. A burst is all calls of a workload; bursts go in turn, and each is timed
after one that is not. Beside the times stands the fraction of the limit (bench/limit.py).
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import fastseq

from .limit import limit, possible
from .measure import OURS, TORCH, available_backends, cpu_name, quiet_collector
from .peers import PEERS, named
from .remote import QUIET, Remote
from .table import markdown
from .workloads import Workload, matching


@torch.inference_mode()
def burst(module: nn.Module, steps: list[Tensor], state: Any) -> Tensor:
    """The output of the last of the steps."""
    for step in steps:
        y, state = module(step, state)
    return y


def contenders(workload: Workload, backends: list[str]) -> dict[str, nn.Module]:
    """Modules of the same parameters; a backend that declines is left out."""
    theirs = workload.module().eval()
    found = {TORCH: theirs}
    for label, backend in ((OURS, None), *((name, name) for name in backends)):
        module = workload.module(fastseq, backend=backend).eval()
        module.load_state_dict(theirs.state_dict())
        try:
            with torch.inference_mode():
                module(workload.input()[:1])
        except (NotImplementedError, RuntimeError) as error:
            if backend is None or f"{backend}: " not in str(error):
                raise
            continue
        found[label] = module
    return found


def measure(
    workload: Workload, backends: list[str], peers: list[Remote], seconds: float
) -> dict[str, float]:
    """Median seconds of a call, by contender."""
    x = workload.input()
    assert isinstance(x, Tensor)
    steps = [x[t : t + 1] for t in range(workload.T)]
    zeros = torch.zeros(1, workload.B, workload.H)
    state = (zeros, zeros) if workload.cell == "lstm" else zeros
    modules = contenders(workload, backends)
    expected = burst(modules[TORCH], steps, state)
    for module in modules.values():
        torch.testing.assert_close(burst(module, steps, state), expected, rtol=1e-3, atol=1e-4)
    here = [peer for peer in peers if peer.prepare(workload, "forward") is None]
    samples: dict[str, list[float]] = {name: [] for name in (*modules, *(p.name for p in here))}
    deadline = time.perf_counter() + seconds
    with quiet_collector():
        while time.perf_counter() < deadline or len(samples[TORCH]) < 5:
            for label, module in modules.items():
                call = partial(burst, module, steps, state)
                call()
                start = time.perf_counter()
                call()
                samples[label].append(time.perf_counter() - start)
            time.sleep(QUIET if here else 0)
            for peer in here:
                samples[peer.name].append(peer.sample())
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
    labels = list(dict.fromkeys(label for row in times.values() for label in row))
    rows = []
    for workload, row in times.items():
        least = limit(workload, False, rates) / workload.T
        cells = [f"{row[k] * 1e6:.1f} ({least / row[k]:.0%})" if k in row else "" for k in labels]
        rows.append([f"{workload.cell.upper()} H{workload.H}", *cells, f"{least * 1e6:.1f}"])
    print(markdown(["us a call", *labels, "limit"], rows))
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    print(f"\n{cpu_name()}, {threads}, torch {torch.__version__}; peers:", end=" ")
    print(", ".join(f"{peer.name} {peer.version}" for peer in peers) or "none")
    return 0


if __name__ == "__main__":
    sys.exit(main())
