"""Every workload, forward and in training, by torch.nn, by fastseq, and by other libraries."""

from __future__ import annotations

from statistics import median

import pytest
import torch

from bench.limit import limit as least_seconds
from bench.limit import possible
from bench.measure import (
    OURS,
    Race,
    WrongNumbers,
    available_backends,
    planned_rounds,
    quiet_collector,
    reason_to_skip,
)


def test_speed(workload, way, benchmark, request, peers):
    """pytest-benchmark times fastseq; before each of its rounds all others are timed in turn."""
    option = request.config.getoption
    backends, limit = available_backends(option("--backends")), option("--limit")
    reason = reason_to_skip(workload, way, backends, limit)
    if reason is not None:
        benchmark.skipped = True
        pytest.skip(reason)
    race = Race(workload, way, backends, limit, peers)
    ours = next(c for c in race.contenders if c.label == OURS)
    others = [c for c in race.contenders if c is not ours]

    def the_others() -> None:
        for contender in others:
            contender.samples.append(race.sample(contender))
        for peer, seconds in zip(race.peers, race.sample_peers(), strict=True):
            peer.samples.append(seconds)
        race.ready(ours)

    with quiet_collector():
        seconds = race.warm_up()
        rounds = planned_rounds(option("--rounds"), option("--seconds"), limit, seconds)
        benchmark.pedantic(race.step, args=(ours,), setup=the_others, rounds=rounds)
    if benchmark.enabled:
        ours.samples = list(benchmark.stats.stats.data)
    timed = {c.label: c.samples for c in race.contenders if c.samples}
    timed |= {peer.name: peer.samples for peer in race.peers if peer.samples}
    least = None  # the rates of the limit are those of float32
    if workload.dtype is torch.float32:
        least = least_seconds(workload, way == "training", possible(torch.get_num_threads()))
    benchmark.group = way
    benchmark.extra_info.update(
        workload=workload.name,
        way=way,
        shape=workload.shape,
        source=workload.source,
        rounds=rounds,
        flops=workload.flops(way == "training"),
        chosen=ours.backend,
        limit_ms=None if least is None else milliseconds(least),
        median_ms={label: milliseconds(median(samples)) for label, samples in timed.items()},
        fastest_ms={label: milliseconds(min(samples)) for label, samples in timed.items()},
        declined=race.declined,
    )
    if way == "training":
        benchmark.extra_info["saved_bytes"] = race.saved_bytes()
    if race.wrong:  # the others keep their figures, and the run fails
        raise WrongNumbers("; ".join(race.wrong.values()))


def milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 5)
