"""Times between CUDA events, of contenders in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
#: A sample is long beside the grain of an event, half a microsecond.
LEAST_SAMPLE = 2e-4
ROUNDS = range(5, 101)


def warmed(call: Call) -> Call:
    """The call after three runs, or one where that is slow, on a stream beside the current one,
    which is what a graph's capture wants."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            started = time.monotonic()
            call()
            torch.cuda.synchronize()
            if time.monotonic() - started > 1.0:
                break
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return call


def recorded(call: Call) -> Call:
    """A replay of the call, which must be warm."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    torch.cuda.synchronize()
    return graph.replay


def seconds_of(call: Call) -> float:
    """One call by the host's clock, to know how much to measure."""
    torch.cuda.synchronize()
    started = time.monotonic()
    call()
    torch.cuda.synchronize()
    return max(time.monotonic() - started, 1e-5)


def sample(call: Call, repeats: int) -> float:
    """Milliseconds a call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def in_turn(
    calls: dict[Any, Call], seconds: float, before: Callable[[Any], None]
) -> dict[Any, list[float]]:
    """Samples of each call, a round of one each after another, for some seconds a call.

    Slow ones are measured less: three rounds from half a second a call on, one from three seconds.
    before: told whose turn it is.
    """
    repeats: dict[Any, int] = {}
    slowest = 0.0
    for key, call in calls.items():
        before(key)
        once = seconds_of(call)
        slowest = max(slowest, once)
        repeats[key] = max(1, int(LEAST_SAMPLE / once))
    least = 1 if slowest > 3 else 3 if slowest > 0.5 else ROUNDS.start
    samples: dict[Any, list[float]] = {key: [] for key in calls}
    deadline = time.monotonic() + seconds * len(calls)
    for done in range(ROUNDS.stop - 1):
        if done >= least and time.monotonic() > deadline:
            break
        for key, call in calls.items():
            before(key)
            samples[key].append(sample(call, repeats[key]))
    return samples


def figures(samples: list[float]) -> dict[str, Any]:
    """As a row has them: the median, the best, and of how many."""
    median, best = statistics.median(samples), min(samples)
    return {"ms": f"{median:.5g}", "best_ms": f"{best:.5g}", "samples": len(samples)}
