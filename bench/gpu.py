"""On a machine with a GPU and no network: build, test, sanitize, bench, each within a budget.

    python -m bench.gpu [--stages "build test sanitize bench"] [--budget SECONDS] [--workloads ..]

It needs torch and Triton; the tests need pytest. The results go to bench/results/<device>/gpu.csv
(or to $OUT), one row a measured point, written as it is measured: a run that is stopped, or whose
budget is spent, goes on where it was (from either folder). A stage that fails ends the run: no
speed is reported without a green test.

The points: the workloads in each type, cuDNN alone first; then cuDNN and triton in turn on the same
input and parameters; then a fixed sample of 80 points of a grid, then all of it. A time is the
median over replays of a CUDA graph between two events, or, where a call cannot be captured, over
calls (column ``how``).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

import fastseq

from .__main__ import commit
from .workloads import Workload, matching

ROOT = Path(__file__).parents[1]
STAGES = {"build": 180.0, "test": 300.0, "sanitize": 60.0, "bench": 480.0}
TYPES = {"tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIELDS = (
    "name shape type way pass contender ms best_ms samples how error device torch triton fastseq "
    "commit date"
).split()


def say(text: str) -> None:
    print(text, flush=True)


def grid() -> list[Workload]:
    """3,240 points: cells, sizes, batches, lengths, and layers; times the three types."""
    points = itertools.product(
        ("lstm", "gru", "rnn"),
        (64, 128, 256, 512, 1024, 2048),
        (1, 8, 32, 128, 512),
        (32, 128, 512, 2048),
        ((1, False), (1, True), (2, False)),
    )
    return [
        Workload(
            f"grid-{cell}-t{T}-b{B}-h{H}-x{layers}{'-both' if both else ''}",
            cell,  # type: ignore[arg-type]
            T=T,
            B=B,
            I=H,
            H=H,
            layers=layers,
            bidirectional=both,
            source="fastseq: a grid",
        )
        for cell, H, B, T, (layers, both) in points
    ]


def points(patterns: str | None) -> Iterator[tuple[str, Workload, str]]:
    """(pass, workload, type) in the order in which they are measured.

    Each workload runs in all types, so that those of another type than float32 are left out.
    """
    listed = [(w, t) for w in matching(patterns) if w.dtype is torch.float32 for t in TYPES]
    yield from (("cudnn", w, t) for w, t in listed)
    yield from (("both", w, t) for w, t in listed)
    if patterns is None:
        every = [(w, t) for w in grid() for t in TYPES]
        sample = random.Random(0).sample(every, 80)
        yield from (("both", w, t) for w, t in sample)
        yield from (("both", w, t) for w, t in every if (w, t) not in sample)


class Clock:
    """Seconds that are left of a stage's budget."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def milliseconds(call: Callable[[], Any], seconds: float) -> tuple[float, float, int, str]:
    """Median, best, samples, and how: replays of a graph of the call, or calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    run, how = call, "calls"
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        run, how = graph.replay, "graph"
    except RuntimeError:  # batch_sizes on the CPU, say
        torch.cuda.synchronize()
    started = time.monotonic()
    run()
    torch.cuda.synchronize()
    once = max(time.monotonic() - started, 1e-5)
    repeats = max(1, int(2e-4 / once))  # so that a sample is long beside an event's grain
    samples: list[float] = []
    deadline = time.monotonic() + seconds
    while len(samples) < 200 and (len(samples) < 5 or time.monotonic() < deadline):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) / repeats)
    return statistics.median(samples), min(samples), len(samples), how


def caller(workload: Workload, way: str, module: torch.nn.Module, x: Any) -> Callable[[], Any]:
    """What is timed: forward without autograd, or forward and all gradients."""
    data = x.data if isinstance(x, PackedSequence) else x
    if way == "forward":

        def forward() -> Any:
            with torch.no_grad():
                return workload.run(module, x)

        return forward
    leaves = [data.requires_grad_(), *module.parameters()]
    dy = torch.randn_like(workload.run(module, x))

    def training() -> Any:
        return torch.autograd.grad(workload.run(module, x), leaves, dy)

    return training


def measure(workload: Workload, way: str, contenders: list[str], seconds: float) -> list[dict]:
    """A row for each contender; they hold the same parameters and get the same input."""
    theirs = workload.module().cuda().train(way == "training")
    x = workload.input()
    x = x.to("cuda")
    rows = []
    for contender in contenders:
        row: dict[str, Any] = {"contender": contender}
        try:
            module = theirs
            if contender != "cudnn":
                module = workload.module(fastseq, backend=contender).cuda()
                module.load_state_dict(theirs.state_dict())
                module.train(way == "training")
                _same(workload, theirs, module, x)
            median, best, samples, how = milliseconds(caller(workload, way, module, x), seconds)
            row |= {"ms": f"{median:.4f}", "best_ms": f"{best:.4f}"}
            row |= {"samples": samples, "how": how}
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            row["error"] = " ".join(str(error).split())[:200]
            torch.cuda.synchronize()
        rows.append(row)
    return rows


def _same(workload: Workload, theirs: torch.nn.Module, ours: torch.nn.Module, x: Any) -> None:
    """Their first call, and its numbers, before any clock runs."""
    with torch.no_grad():
        expected, found = workload.run(theirs, x), workload.run(ours, x)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def build(clock: Clock, results: Path, patterns: str | None) -> bool:
    """The first call of each cell, type and form of loop compiles its kernels."""
    for cell, H in itertools.product(("LSTM", "GRU", "RNN"), (64, 128, 512)):
        for name, dtype in TYPES.items():
            if clock.left < 0:
                say("build: the budget is spent; the rest compiles when it is called")
                return True
            started = time.monotonic()
            module = getattr(fastseq, cell)(
                16, H, bidirectional=True, device="cuda", dtype=dtype, backend="triton"
            )
            x = torch.randn(3, 2, 16, device="cuda", dtype=dtype)
            module(x)[0].float().sum().backward()
            torch.cuda.synchronize()
            say(f"build: {cell} H={H} {name}: {time.monotonic() - started:.1f} s")
    return True


def test(clock: Clock, results: Path, patterns: str | None) -> bool:
    try:
        import pytest  # noqa: F401
    except ImportError:
        say("test: pytest is missing here; pip install pytest, or bring its wheel")
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--noconftest", "tests/test_gpu.py"]
    command += ["-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    return _run("test", command, clock, results)


def sanitize(clock: Clock, results: Path, patterns: str | None) -> bool:
    """A few shapes under compute-sanitizer's memcheck, where there is one that works."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        say("sanitize: no compute-sanitizer on this machine; the stage is left out")
        return True
    probe = "import torch; torch.zeros(1, device='cuda').add_(1).cpu()"
    try:
        working = subprocess.run(
            [tool, "--error-exitcode", "9", sys.executable, "-c", probe],
            capture_output=True,
            timeout=max(clock.left, 1),
        )
    except subprocess.TimeoutExpired:
        say("sanitize: compute-sanitizer did not end a probe within the budget; left out")
        return True
    if working.returncode:
        say("sanitize: compute-sanitizer does not work on this device; the stage is left out")
        return True
    script = (
        "import torch, fastseq\n"
        "for cell in (fastseq.LSTM, fastseq.GRU):\n"
        "    for H in (63, 64, 200):\n"
        "        m = cell(5, H, bidirectional=True, device='cuda', backend='triton')\n"
        "        x = torch.randn(4, 3, 5, device='cuda')\n"
        "        m(x, lengths=torch.tensor([4, 0, 2]))[0].sum().backward()\n"
        "torch.cuda.synchronize()\n"
    )
    command = [tool, "--error-exitcode", "9", sys.executable, "-c", script]
    return _run("sanitize", command, clock, results)


def _run(stage: str, command: list[str], clock: Clock, results: Path) -> bool:
    """A process of its own, its output also in a file. A spent budget is no failure of the code,
    but no success either."""
    log = results / f"{stage}.log"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code: int | None = process.wait(max(clock.left, 1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    tail = log.read_text()[-3000:]
    say(tail)
    if code is None:
        say(f"{stage}: the budget was spent before it ended; give more with BUDGET=seconds")
    return code == 0


def bench(clock: Clock, results: Path, patterns: str | None) -> bool:
    import triton

    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    file = results / "gpu.csv"
    done = measured(file) | measured(folder() / "gpu.csv")
    common = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "fastseq": fastseq.__version__,
        "commit": commit(),
    }
    new = not file.exists()
    with file.open("a", newline="") as sink:
        rows = csv.DictWriter(sink, FIELDS, restval="")
        if new:
            rows.writeheader()
        for stage, workload, kind in points(patterns):
            ways = ("forward", "training") if workload.training else ("forward",)
            typed = replace(workload, dtype=TYPES[kind])
            contenders = ["cudnn"] if stage == "cudnn" else ["cudnn", "triton"]
            for way in ways:
                if (workload.name, kind, way, stage) in done:
                    continue
                if clock.left < 0:
                    say("bench: the budget is spent; the next run goes on from here")
                    return True
                if typed.bytes(way == "training") * 3 > torch.cuda.mem_get_info()[0]:
                    say(f"{workload.name} {kind} {way}: not enough memory")
                    continue
                for row in measure(typed, way, contenders, 0.3):
                    row |= {"name": workload.name, "shape": workload.shape, "type": kind}
                    row |= {"way": way, "pass": stage, "date": time.strftime("%Y-%m-%d %H:%M")}
                    rows.writerow(common | row)
                    sink.flush()
                    time_or_error = f"{row['ms']} ms" if "ms" in row else row["error"]
                    say(
                        f"{workload.name} {workload.shape} {kind} {way} {row['contender']}: "
                        f"{time_or_error}"
                    )
                torch.cuda.empty_cache()
    return True


def folder() -> Path:
    """Where the results of this device are kept."""
    return ROOT / "bench/results" / torch.cuda.get_device_name().lower().replace(" ", "-")


def measured(file: Path) -> set[tuple[str, ...]]:
    """The points that a file holds."""
    if not file.exists():
        return set()
    with file.open(newline="") as given:
        return {(r["name"], r["type"], r["way"], r["pass"]) for r in csv.DictReader(given)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--stages", default=" ".join(STAGES), help="of: " + " ".join(STAGES))
    parser.add_argument("--budget", type=float, help="seconds that each stage may take")
    parser.add_argument("--workloads", default=None, help="patterns of names; no grid then")
    given = parser.parse_args()
    stages = given.stages.replace(",", " ").split()
    for stage in stages:
        if stage not in STAGES:
            parser.error(f"--stages: expected some of {', '.join(STAGES)}, got {stage!r}")
    if not torch.cuda.is_available():
        say("make gpu: torch sees no CUDA device on this machine; there is nothing to run it on")
        return 1
    if fastseq.backends()["triton"] != "available":
        say(f"make gpu: triton is {fastseq.backends()['triton']}")
        return 1
    results = Path(os.environ.get("OUT") or folder())
    results.mkdir(parents=True, exist_ok=True)
    run = {"build": build, "test": test, "sanitize": sanitize, "bench": bench}
    for stage in stages:
        say(f"--- {stage}")
        if not run[stage](Clock(given.budget or STAGES[stage]), results, given.workloads):
            say(f"make gpu: {stage} did not pass; what comes after it does not run")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
