"""Random layers with every option, one a seed, judged by the rule: ``make fuzz``.

    make fuzz                              the backends that are here, an hour, new seeds
    make fuzz MINUTES=300 BACKEND=native
    make fuzz BACKEND=native SEED=387      that one problem, with what is wrong with it

Each problem that fails is printed with the command that repeats it, and appended whole to
tests/fuzz_found.jsonl, which the ordinary tests run again.

A backend runs in a process of its own, and dies or hangs at the cost of one problem.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
import traceback
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest
import torch
from problems import KINKED, cotangents, draw, may_decline
from rules import check_all, same_bits

from fastseq.backends import choice, load
from fastseq.cells import CELLS
from fastseq.ops.stack import problem as problem_of

ROOT = Path(__file__).parents[2]
FOUND = ROOT / "tests" / "fuzz_found.jsonl"
BACKENDS = ("native", "numba", "eager", "torch", "reference", "triton")
PROBLEMS = 100_000  # of a backend, in one run
PATIENCE = 300  # seconds for one problem

DTYPES = ["float32", "float64", "float32", "float64", "bfloat16", "float16"]

FORMS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "batch first": lambda t: t.transpose(0, t.dim() // 2).contiguous().transpose(0, t.dim() // 2),
    "every other": lambda t: torch.repeat_interleave(t, 2, -1)[..., ::2],
    "middle of a wider": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
    "features first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows apart": lambda t: torch.repeat_interleave(t, 3, 0)[1::3],
    "negative": lambda t: torch._neg_view(-t),
    "off the alignment": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}
WANTED = ("all", "x", "states", "weights", "one", "none")


@dataclass
class Fuzzed:
    """One problem, in words that JSON keeps. drawn: what ``draw`` takes; options: of the call;
    forms: how x, the states, the weights and the gradients lie in memory."""

    drawn: dict
    options: dict = field(default_factory=dict)
    forms: dict = field(default_factory=dict)
    wanted: str = "all"
    threads: int = 1


def fuzzed(seed, cells=tuple(CELLS)):
    """The problem of a seed; small ones in float64 alone, where the rule needs no averages."""
    pick = random.Random(seed)

    def maybe(p):
        return pick.random() < p

    dtype = DTYPES[seed % len(DTYPES)]
    double = dtype == "float64"
    cell = pick.choice(cells)
    T = pick.choice([1, 1, 2, 3, 5, 9, 9, 26])
    B = pick.choice([1, 2, 3, 5, 7, 11, 17, 33, 70] if double else [3, 5, 7, 11, 17, 33, 70])
    H = pick.choice([1, 2, 7, 8, 15, 16, 17, 31, 33, 40, 65] if double else [8, 15, 16, 17, 33, 65])
    projected = cell == "lstm" and double and maybe(0.3)
    drawn = {
        "cell": cell,
        "dtype": dtype,
        "T": T,
        "B": B,
        "I": pick.choice([1, 2, 5, 16, 37] if double else [4, 5, 16, 37]),
        "H": H,
        "P": pick.choice([1, H // 2 + 1, H]) if projected else None,
        "layers": pick.choice([1, 1, 2, 3]),
        "directions": pick.choice([1, 2]),
        "bias": maybe(0.7),
        "state": maybe(0.7),
        "reset": maybe(0.3),
        "h_mask": maybe(0.3),
        "lengths": [pick.randint(0, T) for _ in range(B)] if maybe(0.5) else None,
        "seed": seed % 2**31,
    }
    options = {
        "trajectory": cell == "lstm" and maybe(0.4),
        "memory": pick.choice(["full", "full", "lean"]),
        "deterministic": maybe(0.2),  # which native alone takes
    }
    forms = {
        what: pick.choice(list(FORMS)) if maybe(0.3) else "plain"
        for what in ("x", "states", "weights", "gradients")
    }
    wanted = pick.choice(["all", *WANTED])
    if cell in KINKED and not double:  # judged in float64 alone
        wanted = "none"
    threads = pick.choice([1, 1, 2, 3])
    if maybe(0.25):
        drawn["zoneout"] = [pick.choice([0.0, 0.2, 0.5, 1.0]) for _ in CELLS[cell].states]
        drawn["evaluates"] = maybe(0.4)
    return Fuzzed(drawn, options, forms, wanted, threads)


def names_wanted(case, wanted):
    """Leaves that have a gradient; the others ask for none."""
    every = list(case.leaves())
    names = {
        "all": every,
        "x": ["x"],
        "states": [name for name in every if name.endswith("_0")] or ["x"],
        "weights": [name for name in every if "[" in name],
        "one": every[-1:],
        "none": [],
    }[wanted]
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name in names)
    return names


def laid_out(case, forms):
    """The same numbers, elsewhere in memory, as new leaves."""

    def move(tensor, form):
        value = FORMS[forms.get(form, "plain")](tensor.detach())
        return value.requires_grad_(tensor.requires_grad)

    return replace(
        case,
        x=move(case.x, "x"),
        states=[move(s, "states") for s in case.states],
        weights=[w.map(lambda t: move(t, "weights")) for w in case.weights],
    )


def values(case, backend, options, names, form="plain"):
    outputs = case.run(backend, **options)
    leaves = {name: leaf for name, leaf in case.leaves().items() if name in names}
    live = [name for name, value in outputs.items() if value.requires_grad]
    assert leaves or not names or not live, "nothing that was asked for has a graph"
    if not leaves or not live:  # of sequences that are all empty nothing need depend on a weight
        return outputs | {f"d{name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    given = {name: FORMS[form](d) for name, d in cotangents(outputs).items()}
    grads = torch.autograd.grad(
        [outputs[name] for name in live],
        list(leaves.values()),
        [given[name] for name in live],
        allow_unused=True,
        materialize_grads=True,
    )
    return outputs | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def declined(backend, case, options):
    """The reason of a backend that may decline this; None where it runs."""
    if options.get("deterministic") and backend != "native":
        return "deterministic=True takes native alone"
    task = problem_of(case.stack(backend, **options))
    verdict = choice.judge(task, backend)
    return None if verdict.chosen is not None else may_decline(backend, task, verdict)


def check(backend, fuzzed, what=""):
    """The worst error as a share of what the rule allows; the reason where the backend declines.

    The truth is the reference in float64, and torch's part is the eager form's, torch operations in
    the type. For those two themselves the independent writing stands in.
    """
    dtype = getattr(torch, fuzzed.drawn["dtype"])
    case = draw(**fuzzed.drawn | {"dtype": dtype})
    names = names_wanted(case, fuzzed.wanted)
    options = fuzzed.options
    before = torch.get_num_threads()
    torch.set_num_threads(fuzzed.threads)
    try:
        ours_case = laid_out(case, fuzzed.forms)
        reason = declined(backend, ours_case, options)
        if reason is not None:
            return reason
        ours = values(ours_case, backend, options, names, fuzzed.forms.get("gradients", "plain"))
        with torch.no_grad():
            bare = ours_case.run(backend, **options)
    finally:
        torch.set_num_threads(before)
    plain = options | {"deterministic": False}
    wide, same = case.to(torch.float64), case.to(dtype)
    if backend in ("eager", "reference"):
        truth, theirs = (by_the_independent(c, plain, names) for c in (wide, same))
    else:
        truth = values(wide, "reference", plain, names)
        theirs = values(same, "eager", plain, names)
    what = f"{backend}, {what}: {json.dumps(asdict(fuzzed))}:"
    worst = check_all(ours, theirs, truth, dtype, what)
    if backend == "torch":  # oneDNN infers by another kernel than it trains by
        shown = {name: theirs[name] for name in bare}
        return max(worst, check_all(bare, shown, {n: truth[n] for n in bare}, dtype, what))
    for name, value in bare.items():
        assert same_bits(value, ours[name]), f"{what} {name} without gradients"
    return worst


def by_the_independent(case, options, names):
    outputs = case.independent(options.get("trajectory", False))
    leaves = {name: leaf for name, leaf in case.leaves().items() if name in names}
    live = [name for name, value in outputs.items() if value.requires_grad]
    if not leaves or not live:
        return outputs | {f"d{name}": torch.zeros_like(leaf) for name, leaf in leaves.items()}
    given = cotangents(outputs)
    grads = torch.autograd.grad(
        [outputs[name] for name in live],
        list(leaves.values()),
        [given[name] for name in live],
        allow_unused=True,
        materialize_grads=True,
    )
    return outputs | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def found():
    """(backend, seed, problem) of each that failed once."""
    lines = FOUND.read_text().splitlines() if FOUND.exists() else []
    for line in filter(None, lines):
        kept = json.loads(line)
        yield kept.pop("backend"), kept.pop("seed"), Fuzzed(**kept)


# The long run


@dataclass
class Tally:
    problems: int = 0
    declined: int = 0
    failures: list = field(default_factory=list)
    worst: float = 0.0

    def __str__(self):
        return (
            f"{self.problems:,} problems, {self.declined:,} declined, {len(self.failures)} "
            f"failures, worst at {self.worst:.2f} of the limit"
        )


class Worker:
    """A process that runs one backend's problems, and is replaced when it dies or hangs."""

    def __init__(self, backend):
        self.backend, self.tally, self.process = backend, Tally(), None

    def start(self):
        ours, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        interpreted = "1" if self.backend == "triton" else "0"
        os.environ["TRITON_INTERPRET"] = interpreted
        self.process = context.Process(target=serve, args=(self.backend, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe = ours

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def run(self, seed):
        """What is wrong with a problem, None for nothing."""
        if self.process is None:
            self.start()
        try:
            self.pipe.send(seed)
            if not self.pipe.poll(PATIENCE):
                self.stop()
                return self.failed(seed, f"it was not done after {PATIENCE} s")
            kind, value = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            self.process = None
            return self.failed(seed, f"the process died, exit code {code}")
        if kind == "failed":
            return self.failed(seed, value)
        self.tally.problems += kind == "ran"
        self.tally.declined += kind == "declined"
        self.tally.worst = max(self.tally.worst, value)
        return None

    def failed(self, seed, text):
        self.tally.problems += 1
        self.tally.failures.append(seed)
        return text


def serve(backend, pipe):
    while True:
        seed = pipe.recv()
        pipe.send(outcome(backend, seed))


def outcome(backend, seed):
    """(kind, share of the limit or what is wrong)"""
    try:
        result = check(backend, fuzzed(seed), f"seed {seed}")
    except (Exception, pytest.fail.Exception) as error:
        expected = isinstance(error, AssertionError | pytest.fail.Exception)
        return "failed", str(error) if expected else traceback.format_exc()
    return ("declined", 0.0) if isinstance(result, str) else ("ran", result)


def keep(backend, seed):
    """A problem that failed, for the ordinary tests; each once."""
    line = json.dumps({"backend": backend, "seed": seed} | asdict(fuzzed(seed)))
    lines = FOUND.read_text().splitlines() if FOUND.exists() else []
    if line not in lines:
        FOUND.write_text("\n".join([*lines, line, ""]))


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def long_run(backends, minutes, first):
    """In turns, so that a short run meets every backend; the number of failures."""
    print(f"seeds from {first}, {PROBLEMS:,} a backend or {minutes:g} minutes in all", flush=True)
    workers = {backend: Worker(backend) for backend in backends}
    places = dict.fromkeys(backends, 0)
    began = time.monotonic()
    end = began + 60 * minutes
    try:
        while any(n < PROBLEMS for n in places.values()) and time.monotonic() < end:
            for backend, worker in workers.items():
                turn = time.monotonic() + 20
                start = places[backend]
                while places[backend] < PROBLEMS and time.monotonic() < min(turn, end):
                    seed = first + places[backend]
                    places[backend] += 1
                    wrong = worker.run(seed)
                    if wrong is not None:
                        keep(backend, seed)
                        print(f"FAILED  make fuzz BACKEND={backend} SEED={seed}\n{wrong}")
                if places[backend] > start:
                    done = 100 * places[backend] / PROBLEMS
                    rate = (places[backend] - start) / max(1e-9, time.monotonic() - turn + 20)
                    spent = clock(time.monotonic() - began)
                    print(
                        f"{spent} {backend:>9} {done:3.0f}% {rate:5.0f}/s  {worker.tally}",
                        flush=True,
                    )
    except KeyboardInterrupt:
        print("interrupted")
    finally:
        for worker in workers.values():
            worker.stop()
    print("\nbackend: result")
    for backend, worker in workers.items():
        print(f"{backend}: {worker.tally}")
    failed = [(b, seed) for b, w in workers.items() for seed in w.tally.failures]
    for backend, seed in failed:
        print(f"make fuzz BACKEND={backend} SEED={seed}")
    if failed:
        print(f"kept in {FOUND.relative_to(ROOT)}")
    return len(failed)


def here(names):
    """Those of the backends that this machine has; triton by its interpreter, if it is named."""
    if not names:
        return [b for b in BACKENDS if b != "triton" and not isinstance(load(b), str)]
    for name in names:
        if name not in BACKENDS:
            sys.exit(f"fuzz: BACKEND: expected some of {', '.join(BACKENDS)}, got {name!r}")
        if name != "triton" and isinstance(load(name), str):
            sys.exit(f"fuzz: {name}: {load(name)}")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--backend", nargs="*", default=[])
    parser.add_argument("--seed", type=int, help="this problem alone")
    parser.add_argument("--first", type=int, help="the first seed; else a random one")
    given = parser.parse_args(argv)
    backends = here(given.backend)
    if given.seed is None:
        first = random.SystemRandom().randrange(10**9) if given.first is None else given.first
        sys.exit(bool(long_run(backends, given.minutes, first)))
    failed = 0
    for backend in backends:
        worker = Worker(backend)
        wrong = worker.run(given.seed)
        worker.stop()
        failed += wrong is not None
        print(f"{backend}, {json.dumps(asdict(fuzzed(given.seed)))}:")
        print(wrong or str(worker.tally))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
