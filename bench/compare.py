"""Two checkouts beside each other: ``python -m bench.compare OTHER --workloads "small-* peers-*"``.

Two processes run each tree's fastseq on the workloads of this one, and take turns, in an order that
each round reverses. A time is the median of a turn's calls, a figure the median over rounds. Below
stands this tree's over the other's: above 1, this one is slower. The noise is how far two processes
of one tree are apart, as a part of the time, the worse of both trees. What exceeds ``--tolerance``
beyond the noise is measured for twice as many rounds more, and marked where all of them together
say the same; where one is slower the exit status is 1. Beside it stands the ratio of the fastest
turns, which other work on the machine disturbs less. A workload of one step a call is timed as
calls of the module and as steps of the handle of fastseq.streaming, a call each.

Both trees need their C++ kernels built; where they choose different backends, the row says so.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch

from .peers import output_gradient
from .table import markdown
from .version import commit
from .workloads import Walk, Workload, by_name, matching

ROOT = Path(__file__).parent.parent
# fastseq is another tree's, the benchmark this one's
SERVE = (
    "import sys; sys.path[0] = {tree!r}; import fastseq; sys.path[0] = {root!r}; "
    "from bench.compare import serve; serve({threads})"
)
QUIET = 0.01  # OpenMP's threads of the process before spin for up to 8 ms


def ways(workload: Workload) -> list[str]:
    if workload.mode != "layer":
        return ["call", "handle"]
    return ["forward", "training"][: 1 + workload.training]


def call(fastseq: Any, workload: Workload, way: str) -> tuple[Callable[[], Any], str | None]:
    """What is timed, and the backend that is chosen."""
    if way == "handle":
        layer = workload.module(fastseq, "layer").eval()
        return Walk(workload, fastseq.streaming(layer, workload.B), "handle"), None
    training = way == "training"
    module = workload.module(fastseq).train(training)
    x: Any = workload.input()
    run: Callable[[], Any] = partial(workload.run, module, x)
    if way == "call":
        run = Walk(workload, module, workload.form)
        x = run.steps[0]
    elif training:
        (x if isinstance(x, torch.Tensor) else x.data).requires_grad_()
        inputs = [x if isinstance(x, torch.Tensor) else x.data, *module.parameters()]
        dy = output_gradient(workload)
        run = lambda: torch.autograd.grad(workload.run(module, x), inputs, dy)  # noqa: E731
    with redirect_stdout(io.StringIO()), torch.set_grad_enabled(training):
        return run, fastseq.explain(module, x)


def serve(threads: int) -> None:
    """Answers a line of JSON, [workload, way, seconds], with the median of a call's seconds."""
    import fastseq

    torch.set_num_threads(threads)
    made: dict[str, Any] = {}
    print(json.dumps({"file": fastseq.__file__}), flush=True)
    for line in sys.stdin:
        name, way, seconds = json.loads(line)
        workload = by_name(name)
        if made.get("key") != (name, way):
            made = {"key": (name, way), "call": call(fastseq, workload, way)}
        run, chosen = made["call"]
        samples: list[float] = []
        with (
            torch.inference_mode(way in ("call", "handle")),
            torch.set_grad_enabled(way == "training"),
        ):
            run()  # the threads have slept
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not samples:
                before = time.perf_counter()
                run()
                samples.append(time.perf_counter() - before)
        calls = 1 if workload.mode == "layer" else workload.T
        answer = {"seconds": median(samples) / calls, "chosen": chosen}
        print(json.dumps(answer), flush=True)


class Tree:
    """A process that runs one checkout's fastseq."""

    def __init__(self, tree: Path, threads: int) -> None:
        code = SERVE.format(tree=str(tree), root=str(ROOT), threads=threads)
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-c", code], cwd=tree, **pipes)
        found = Path(self._answer()["file"]).resolve()
        if not found.is_relative_to(tree.resolve()):
            self.process.communicate()
            raise RuntimeError(f"{tree}: the process imported {found}")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.communicate()
            raise RuntimeError("a process ended; what it said stands above")
        return json.loads(line)

    def sample(self, *question: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self._answer()


def verdict(samples: list[list[float]], tolerance: float) -> tuple[float, float, str]:
    """(ratio, noise, mark) of samples by process: this tree's two, then the other's two."""
    middle = [median(times) for times in samples]
    ratio = median(samples[0] + samples[1]) / median(samples[2] + samples[3])
    noise = max(max(a, b) / min(a, b) - 1 for a, b in (middle[:2], middle[2:]))
    allowed = 1 + tolerance + noise
    return ratio, noise, "slower" if ratio > allowed else "faster" if ratio < 1 / allowed else ""


def row(
    trees: list[Tree], workload: Workload, way: str, options: argparse.Namespace
) -> tuple[list[str], float, bool]:
    samples: list[list[float]] = [[] for _ in trees]
    chosen: list[str | None] = [None] * len(trees)

    def turn(seconds: float, order: int) -> None:
        for k in range(len(trees))[::order]:
            time.sleep(QUIET)
            found = trees[k].sample(workload.name, way, seconds)
            chosen[k] = found["chosen"]
            samples[k].append(found["seconds"])

    turn(0, 1)
    for times in samples:  # the first call compiles
        times.clear()
    mark = "more"
    for rounds in (options.rounds, 2 * options.rounds):
        for n in range(rounds if mark else 0):
            turn(options.seconds, 1 if n % 2 else -1)
        ratio, noise, mark = verdict(samples, options.tolerance)
    shown = (f"{median(a + b) * 1e6:.4g}" for a, b in (samples[:2], samples[2:]))
    backends = " / ".join(dict.fromkeys(str(name or "") for name in chosen))
    fastest = min(samples[0] + samples[1]) / min(samples[2] + samples[3])
    cells = [f"{workload.name} {way}", backends, *shown, f"{ratio:.3f}", f"{noise:.1%}"]
    cells += [f"{fastest:.3f}", mark]
    return cells, ratio, mark == "slower"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("other", type=Path, help="the root of the other checkout, kernels built")
    parser.add_argument("--workloads", default="small-* peers-* streaming-*", help="patterns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=12, help="turns of each process")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a turn, one call at least")
    parser.add_argument("--tolerance", type=float, default=0.03, help="beyond the noise")
    options = parser.parse_args(argv)
    if not (options.other / "fastseq" / "__init__.py").exists():
        parser.error(f"OTHER: no fastseq under {options.other}")
    try:
        found = matching(options.workloads)
    except ValueError as error:
        parser.error(str(error))
    folders = [ROOT, ROOT, options.other.absolute(), options.other.absolute()]
    built = [any(tree.glob("fastseq/_cpu*.so")) for tree in folders]
    if len(set(built)) > 1:
        parser.error(f"no C++ kernels in {folders[built.index(False)]}; make build makes them")
    trees: list[Tree] = []
    rows, ratios, slower = [], [], 0
    try:
        for folder in folders:
            trees.append(Tree(folder, options.threads))
        for workload in found:
            for way in ways(workload):
                cells, ratio, worse = row(trees, workload, way, options)
                rows.append(cells)
                ratios.append(ratio)
                slower += worse
                print("  ".join(cells), flush=True)
    finally:
        for tree in trees:
            tree.process.communicate()
    header = ["workload", "backend", "this us", "other us", "this / other", "noise"]
    header += ["of the fastest", ""]
    print(f"\n{markdown(header, rows)}\n")
    names = f"this {commit(ROOT)}, other {commit(options.other)}"
    print(f"{names}, {options.threads} thread(s), {options.rounds} rounds of 2 processes each.")
    print(f"Geometric mean {geometric_mean(ratios):.3f}; slower: {slower} of {len(ratios)}.")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
