"""On a machine with a GPU and no network: build, test, sanitize, cudnn, bench, each in a budget.

    python -m bench.gpu [--stages "build test sanitize cudnn bench"] [--budget SECONDS]
                        [--workloads ..]

It needs torch and Triton; the tests need pytest. The results go to bench/results/<device>/gpu.csv
(or to $OUT), one row a measured point, written as it is measured: a run that is stopped, or whose
budget is spent, goes on where it was (from either folder). What fails is said, and fails the run;
``bench`` does not run after a red test, ``cudnn``, which measures none of our code, does.

``build`` compiles the kernels of the workloads, in many processes. ``cudnn`` times cuDNN alone over
the workloads in each type. ``bench`` times cuDNN and triton in turn on the same input and
parameters: the workloads, then a fixed sample of 80 points of a grid, then all of it. Where no
single program holds a recurrence, triton runs in both its forms for that (column ``form``: grid,
one launch, and step, one a step). A time is the median between two events over replays of a CUDA
graph, and over calls (column ``how``).
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
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.backends import load
from fastseq.backends.triton_tiling import Form, tiling
from fastseq.cells import CELLS

from .version import commit
from .workloads import TEXTS, Workload, matching

ROOT = Path(__file__).parents[1]
STAGES = {"build": 180.0, "test": 420.0, "sanitize": 120.0, "cudnn": 240.0, "bench": 540.0}
TYPES = {"tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
FIELDS = (
    "name shape type way pass contender form how ms best_ms samples error device torch triton "
    "fastseq commit date"
).split()


backend: Any = load("triton")
#: Side by side, on one GPU.
PROCESSES = max(1, min(12, (os.cpu_count() or 1) - 2))


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


def points(stage: str, patterns: str | None) -> Iterator[tuple[Workload, str]]:
    """(workload, type) in the order in which a stage measures them.

    Each workload runs in all types, so that those of another type than float32 are left out.
    """
    yield from ((w, t) for w in matching(patterns) if w.dtype is torch.float32 for t in TYPES)
    if patterns is None and stage == "bench":
        every = [(w, t) for w in grid() for t in TYPES]
        sample = random.Random(0).sample(every, 80)
        yield from sample
        yield from (point for point in every if point not in sample)


class Clock:
    """Seconds that are left of a stage's budget."""

    def __init__(self, budget: float) -> None:
        self.end = time.monotonic() + budget

    @property
    def left(self) -> float:
        return self.end - time.monotonic()


def milliseconds(call: Callable[[], Any], how: str, seconds: float) -> tuple[float, float, int]:
    """Median, best and number of samples, of replays of a graph of the call, or of calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    run: Callable[[], Any] = call
    if how == "graph":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
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
    return statistics.median(samples), min(samples), len(samples)


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


def forms(workload: Workload) -> list[Form]:
    """The forms that triton's forward can take: both of what no single program holds."""
    device = torch.device("cuda", torch.cuda.current_device())
    found: list[Form] = []
    for larger in ("grid", "step"):
        plan = tiling(
            CELLS[TEXTS.get(workload.cell, workload.cell)],
            workload.H,
            workload.proj or None,
            workload.dtype,
            backend._precision(workload.dtype, device),
            workload.B,
            workload.D,
            backend._properties(device),
            larger,
        )
        if plan.form not in found:
            found.append(plan.form)
    return found


def measure(workload: Workload, way: str, stage: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for each contender, form and way to call; all on the same parameters and input."""
    theirs = workload.module().cuda().train(way == "training")
    x = workload.input().to("cuda")
    if stage == "cudnn":
        yield from timed({"contender": "cudnn"}, workload, way, theirs, x, seconds)
        return
    ours = workload.module(fastseq, backend="triton").cuda()
    ours.load_state_dict(theirs.state_dict())
    ours.train(way == "training")
    yield from timed({"contender": "cudnn"}, workload, way, theirs, x, seconds)
    for form in forms(workload):
        row = {"contender": "triton", "form": form}
        with backend.larger_as(form):
            try:
                _same(workload, theirs, ours, x)
            except Exception as error:  # one point's; the others go on
                torch.cuda.synchronize()
                yield row | {"error": as_line(error)}
            else:
                yield from timed(row, workload, way, ours, x, seconds)


def timed(
    row: dict[str, Any],
    workload: Workload,
    way: str,
    module: torch.nn.Module,
    x: Any,
    seconds: float,
) -> Iterator[dict[str, Any]]:
    for how in ("graph", "calls"):
        try:
            call = caller(workload, way, module, x)
            median, best, samples = milliseconds(call, how, seconds)
        except Exception as error:  # batch_sizes on the CPU, in a graph; one point's alone
            torch.cuda.synchronize()
            yield row | {"how": how, "error": as_line(error)}
        else:
            found = {"ms": f"{median:.4f}", "best_ms": f"{best:.4f}", "samples": samples}
            yield row | {"how": how} | found


def as_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _same(workload: Workload, theirs: torch.nn.Module, ours: torch.nn.Module, x: Any) -> None:
    """Their first call, and its numbers, before any clock runs."""
    with torch.no_grad():
        expected, found = workload.run(theirs, x), workload.run(ours, x)
    torch.testing.assert_close(found, expected, rtol=3e-2, atol=3e-2)


def build(clock: Clock, results: Path, patterns: str | None) -> bool:
    """Compile what will be called, a share in each process; Triton keeps it on disk."""
    n = PROCESSES
    command = [sys.executable, "-m", "bench.gpu"]
    command += ["--workloads", patterns] if patterns else []
    return _run("build", [[*command, "--compile", f"{k}/{n}"] for k in range(n)], clock, results)


def compile_share(share: str, patterns: str | None) -> int:
    """The k-th of n shares of the workloads, two steps of each, forward and backward."""
    k, n = map(int, share.split("/"))
    failed = 0
    _as_torch_nn()
    for workload, kind in list(points("cudnn", patterns))[k::n]:
        small = replace(workload, T=2, dtype=TYPES[kind])
        started = time.monotonic()
        for form in forms(small):
            try:
                with backend.larger_as(form):
                    module, x = small.module(fastseq, backend="triton").cuda(), small.input()
                    x = x.to("cuda")
                    with torch.no_grad():
                        small.run(module, x)
                    small.run(module, x).float().sum().backward()
                    torch.cuda.synchronize()
            except Exception as error:  # one point's; the others go on
                failed += 1
                say(f"build: {small.shape} {kind} {form}: {as_line(error)}")
        say(f"build: {small.shape} {kind}: {time.monotonic() - started:.1f} s")
    return int(failed > 0)


def test(clock: Clock, results: Path, patterns: str | None) -> bool:
    """The GPU's tests, a share in each process: most of their time is the compiler's."""
    try:
        import pytest  # noqa: F401
    except ImportError:
        say("test: pytest is missing here; pip install pytest, or bring its wheel")
        return False
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider"]
    command += ["-o", "filterwarnings=default"]
    listed = subprocess.run(
        [*command, "--collect-only", "tests/test_gpu.py"],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
    )
    tests = [line for line in listed.stdout.splitlines() if "::" in line]
    if listed.returncode or not tests:
        say(f"test: nothing was collected:\n{listed.stdout[-2000:]}{listed.stderr[-2000:]}")
        return False
    say(f"test: {len(tests)} tests in {PROCESSES} processes")
    shares = [tests[k::PROCESSES] for k in range(PROCESSES)]
    return _run("test", [[*command, "--maxfail=5", *t] for t in shares if t], clock, results)


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
    return _run("sanitize", [command], clock, results)


def _environment() -> dict[str, str]:
    """One thread for a process, of many at once."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _run(stage: str, commands: list[list[str]], clock: Clock, results: Path) -> bool:
    """Processes side by side, their output also in one file. A spent budget is no failure of the
    code, but no success either."""
    with ExitStack() as open_files:
        files = [open_files.enter_context(TemporaryFile("w+")) for _ in commands]
        running = [
            subprocess.Popen(
                command, cwd=ROOT, env=_environment(), stdout=file, stderr=subprocess.STDOUT
            )
            for command, file in zip(commands, files, strict=True)
        ]
        codes: list[int | None] = []
        for process in running:
            try:
                codes.append(process.wait(max(clock.left, 1)))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                codes.append(None)
        printed = []
        for file in files:
            file.seek(0)
            printed.append(file.read())
    (results / f"{stage}.log").write_text("\n".join(printed))
    for code, text in zip(codes, printed, strict=True):
        say(text[-3000:] if code else "".join(text.splitlines()[-1:]))
    if None in codes:
        say(f"{stage}: the budget was spent before it ended; give more with BUDGET=seconds")
    return not any(code != 0 for code in codes)


def _as_torch_nn() -> None:
    """float32 in TF32, on both sides."""
    torch.backends.cudnn.rnn.fp32_precision = "tf32"  # type: ignore[attr-defined]
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def cudnn(clock: Clock, results: Path, patterns: str | None) -> bool:
    return timings("cudnn", clock, results, patterns)


def bench(clock: Clock, results: Path, patterns: str | None) -> bool:
    return timings("bench", clock, results, patterns)


def timings(stage: str, clock: Clock, results: Path, patterns: str | None) -> bool:
    import triton

    _as_torch_nn()
    file = results / "gpu.csv"
    done = measured(file) | measured(folder() / "gpu.csv")
    common = {
        "pass": stage,
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
        for workload, kind in points(stage, patterns):
            typed = replace(workload, dtype=TYPES[kind])
            for way in ("forward", "training") if workload.training else ("forward",):
                if (workload.name, kind, way, stage) in done:
                    continue
                if clock.left < 0:
                    say(f"{stage}: the budget is spent; the next run goes on from here")
                    return True
                if typed.bytes(way == "training") * 3 > torch.cuda.mem_get_info()[0]:
                    say(f"{workload.name} {kind} {way}: not enough memory")
                    continue
                point = {"name": workload.name, "shape": workload.shape, "type": kind, "way": way}
                found = []
                for row in measure(typed, way, stage, 0.2):
                    found.append(common | point | row | {"date": time.strftime("%Y-%m-%d %H:%M")})
                    who = " ".join(row[k] for k in ("contender", "form", "how") if k in row)
                    what = f"{row['ms']} ms" if "ms" in row else row["error"]
                    say(f"{workload.name} {workload.shape} {kind} {way} {who}: {what}")
                rows.writerows(found)  # a point that was stopped half way is measured again
                sink.flush()
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
    parser.add_argument("--compile", metavar="K/N", help="what the stage build runs N times")
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
    if given.compile:
        return compile_share(given.compile, given.workloads)
    results = Path(os.environ.get("OUT") or folder())
    results.mkdir(parents=True, exist_ok=True)
    run = {"build": build, "test": test, "sanitize": sanitize, "cudnn": cudnn, "bench": bench}
    red = []
    for stage in stages:
        if stage == "bench" and {"test", "sanitize"}.intersection(red):
            say("make gpu: bench does not run: no speed is reported without a green test")
            continue
        say(f"--- {stage}")
        if not run[stage](Clock(given.budget or STAGES[stage]), results, given.workloads):
            say(f"make gpu: {stage} did not pass")
            red.append(stage)
    return int(bool(red))


if __name__ == "__main__":
    sys.exit(main())
