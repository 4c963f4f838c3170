"""Two checkouts beside each other: ``python -m bench.compare OTHER --workloads "small-* peers-*"``.

Two processes run each tree's fastseq on the workloads of this one, and take turns, in an order that
each round reverses. A time is the median of a turn's calls, a figure the median over rounds. Below
stands this tree's over the other's: above 1, this one is slower. The noise is how far two processes
of one tree are apart, as a part of the time, the worse of both trees. What exceeds ``--tolerance``
beyond the noise is measured for twice as many rounds more, and marked where all of them together
say the same; where one is slower the exit status is 1. Beside it stands the ratio of the fastest
turns, which other work on the machine disturbs less. A workload of one step a call is timed as
calls of the module and as steps of the handle of fastseq.streaming, a call each.

``--unlaunched`` compares what a call of the backend cuda costs the host, without a GPU: tensors lie
on the CPU, whose small operations stand for torch's launches, and kernels of ours are not launched.

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
from functools import lru_cache, partial
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
    "from bench.compare import serve; serve({threads}, {backend!r}, {unlaunched})"
)
Row = tuple[list[str], float, bool]
QUIET = 0.01  # OpenMP's threads of the process before spin for up to 8 ms


def ways(workload: Workload) -> list[str]:
    steps = workload.mode != "layer"
    return ["call", "handle"] if steps else ["forward", "training"][: 1 + workload.training]


@lru_cache(1)
def call(workload: Workload, way: str, backend: str | None) -> tuple[Callable[[], Any], str | None]:
    """What is timed, and the backend that is chosen."""
    import fastseq

    module: Any = workload.module(fastseq, "layer" if way == "handle" else None)
    getattr(module, "fastseq", module).backend = backend  # older commits had no namespace
    module.train(way == "training")
    if way == "handle":
        return Walk(workload, fastseq.streaming(module, workload.B), "handle"), None
    x: Any = workload.input()
    run: Callable[[], Any] = partial(workload.run, module, x)
    if way == "call":
        run = Walk(workload, module, workload.form)
        x = run.steps[0]
    elif way == "training":
        leaf = x if isinstance(x, torch.Tensor) else x.data
        inputs, dy = [leaf.requires_grad_(), *module.parameters()], output_gradient(workload)
        run = lambda: torch.autograd.grad(workload.run(module, x), inputs, dy)  # noqa: E731
    with redirect_stdout(io.StringIO()), torch.set_grad_enabled(way == "training"):
        return run, fastseq.explain(module, x)


def unlaunch() -> None:
    """The backend cuda takes tensors of the CPU, and launches nothing."""
    from fastseq.backends import cuda

    cuda.DEVICES, cuda.unavailable = ("cpu",), lambda: None
    cuda._queue = lambda device: (0, 0)  # type: ignore[assignment]
    cuda._cuda.launch = lambda *arguments: None  # type: ignore[attr-defined]


def serve(threads: int, backend: str | None, unlaunched: bool = False) -> None:
    """Answers a line of JSON, [workload, way, seconds], with the median of a call's seconds."""
    torch.set_num_threads(threads)
    if unlaunched:
        unlaunch()
    print(json.dumps({"file": sys.modules["fastseq"].__file__}), flush=True)
    for line in sys.stdin:
        name, way, seconds = json.loads(line)
        workload, samples = by_name(name), []
        mode = torch.inference_mode if way in ("call", "handle") else torch.set_grad_enabled
        run, chosen = call(workload, way, backend)
        with mode(way != "forward"):
            run()  # the threads have slept
            end = time.perf_counter() + seconds
            while time.perf_counter() < end or not samples:
                before = time.perf_counter()
                run()
                samples.append(time.perf_counter() - before)
        calls = 1 if workload.mode == "layer" else workload.T
        print(json.dumps({"seconds": median(samples) / calls, "chosen": chosen}), flush=True)


class Tree:
    """A process that runs one checkout's fastseq."""

    def __init__(self, tree: Path, threads: int, backend: str | None, unlaunched: bool) -> None:
        how = {"threads": threads, "backend": backend, "unlaunched": unlaunched}
        code = SERVE.format(tree=str(tree), root=str(ROOT), **how)
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


def row(trees: list[Tree], name: str, way: str, options: argparse.Namespace) -> Row:
    """The cells, the ratio, and whether this tree is slower."""
    samples: list[list[float]] = [[] for _ in trees]
    chosen = [tree.sample(name, way, 0)["chosen"] for tree in trees]  # which compiles
    ratio, noise, mark = 1.0, 0.0, "more"
    for rounds in (options.rounds, 2 * options.rounds):
        for n in range(rounds if mark else 0):
            for k in (range(4), range(3, -1, -1))[n % 2]:
                time.sleep(QUIET)
                samples[k].append(trees[k].sample(name, way, options.seconds)["seconds"])
        ratio, noise, mark = verdict(samples, options.tolerance)
    ours, theirs = samples[0] + samples[1], samples[2] + samples[3]
    backends = " / ".join(dict.fromkeys(str(name or "") for name in chosen))
    times = [f"{median(found) * 1e6:.4g}" for found in (ours, theirs)]
    cells = [f"{name} {way}", backends, *times, f"{ratio:.3f}", f"{noise:.1%}"]
    return [*cells, f"{min(ours) / min(theirs):.3f}", mark], ratio, mark == "slower"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("other", type=Path, help="the root of the other checkout, kernels built")
    parser.add_argument("--workloads", default="small-* peers-* streaming-*", help="patterns")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--backend", help="who runs both; the choice of each tree if left out")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each process")
    parser.add_argument("--seconds", type=float, default=0.05, help="of a turn, one call at least")
    parser.add_argument("--tolerance", type=float, default=0.03, help="beyond the noise")
    parser.add_argument("--unlaunched", action="store_true", help="the host's part of cuda alone")
    options = parser.parse_args(argv)
    if options.unlaunched:
        if options.backend not in (None, "cuda"):
            parser.error(f"--unlaunched is of the backend cuda, not of {options.backend}")
        options.backend = "cuda"
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
    rows = []
    try:
        for folder in folders:
            unlaunched = options.unlaunched
            trees.append(Tree(folder, options.threads, options.backend, unlaunched))
        for name, way in ((workload.name, way) for workload in found for way in ways(workload)):
            rows.append(row(trees, name, way, options))
            print("  ".join(rows[-1][0]), flush=True)
    finally:
        for tree in trees:
            tree.process.communicate()
    header = ["workload", "backend", "this us", "other us", "this / other", "noise"]
    print(f"\n{markdown([*header, 'of the fastest', ''], [cells for cells, *_ in rows])}\n")
    slower = sum(worse for *_, worse in rows)
    names = f"this {commit(ROOT)}, other {commit(options.other)}"
    print(f"{names}, {options.threads} thread(s), {options.rounds} rounds of 2 processes each.")
    mean = geometric_mean(ratio for _, ratio, _ in rows)
    print(f"Geometric mean {mean:.3f}; slower: {slower} of {len(rows)}.")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
