"""The command line, and the stages one after another: see :mod:`bench.gpu` and docs/gpu.md."""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..version import state
from . import (
    STARTED,
    budget,
    build,
    crew,
    machine,
    points,
    results,
    sanitize,
    smoke,
    summary,
    testing,
    timings,
)
from .budget import Clock
from .points import Point, Unit
from .summary import Run, Stage
from .suspects import Suspects

DEFAULT_STAGES = "smoke build core test bench sanitize"
DEFAULT_MINUTES = 15.0
#: What a check of the sanitizer may take: so many times what a hang is.
CHECK = 8


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="python3 -m bench.gpu",
        description="Check and measure the kernels on a GPU; docs/gpu.md says how and what.",
        epilog="Exit status: 0 where nothing is wrong, however far the time reached; 1 where a "
        "test is red or lost, a kernel does not compile, hangs, errs or is wrong, or the sanitizer "
        "found something; 2 for a mistake on the command line.",
    )
    found.add_argument(
        "--stages",
        default=DEFAULT_STAGES,
        help=f"in this order; all: {DEFAULT_STAGES}",
    )
    found.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="for all of it; default 15"
    )
    found.add_argument(
        "--workloads", help="patterns of names, such as 'rl-* long-*', or headline; no grid then"
    )
    found.add_argument(
        "--contenders",
        default=" ".join(points.CONTENDERS),
        help=f"of ours, beside cuDNN, in all but the tests: {' '.join(points.CONTENDERS)}",
    )
    found.add_argument("--types", help=f"of numbers, some of: {' '.join(points.TYPES)}")
    found.add_argument("--out", type=Path, help="where the files go: $OUT, else out/gpu")
    found.add_argument(
        "--keep", type=Path, default=results.DEFAULT, help="copies for the next run: out/gpu"
    )
    found.add_argument("--commit", help="what is measured, where there is no git: $FASTSEQ_COMMIT")
    found.add_argument("--again", action="store_true", help="measure anew what is known")
    found.add_argument("--processes", type=int, default=machine.PROCESSES, help="side by side")
    found.add_argument(
        "--hang", type=float, default=12.0, help="seconds that a step may show no sign"
    )
    found.add_argument("--seconds", type=float, default=0.12, help="of samples, a contender")
    found.add_argument("--test-limit", type=float, default=60.0, help="seconds a test")
    found.add_argument("--select", default="", help="some of the tests, by name: as pytest's -k")
    found.add_argument("--tests", default=testing.FILES, help="files of tests")
    found.add_argument(
        "--start", choices=("fork", "spawn"), default="fork", help="how children start"
    )
    found.add_argument("--preload", help="a module that every process imports first")
    found.add_argument("--exercise", choices=sanitize.EXERCISES, help=argparse.SUPPRESS)
    return found


class Session:
    """A run: its clock, files and stages."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given = given
        spent = time.monotonic() - STARTED
        self.clock = Clock(60 * given.minutes - budget.RESERVE - spent)
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log.txt"
        self.folder = folder

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a") as sink:
            sink.write(text + "\n")

    def ask(self) -> dict[str, Any]:
        return machine.ask(str(self.log), min(60.0, self.clock.left / 2))

    def run(self, stages: Sequence[str]) -> int:
        told = self.ask()
        if "missing" not in told and crew.start == "fork":
            importlib.import_module("torch._dynamo")  # else each child's first call imports it
            gc.freeze()  # children collect what is theirs alone
            told = self.ask()  # the import must not have touched the device
        if "missing" not in told and not self.contenders(told):
            told = {"missing": f"cuda is {told['backend']}"}
        if "missing" in told:
            self.say(f"make gpu: {told['missing']}")
            return 1
        columns = told["columns"] | {"commit": self.given.commit or state()}
        self.results = results.Results(self.folder, columns, self.given.keep, self.given.again)
        self.results.begin()
        self.kinds = told["kinds"]._replace(contenders=self.contenders(told))
        self.built = build.Built(
            self.kinds, self.given.processes, self.given.hang, str(self.log), Suspects()
        )
        self.options = timings.Options(self.given.hang, str(self.log), self.given.seconds)
        about = machine.tools() | {"CUDA": told["cuda"], "memory": told["memory"]}
        about["backend cuda"] = told["backend"]
        self.page = Run(self.results, about, self.kinds.cuda)
        self.say("\n".join(f"{k}: {v or 'none'}" for k, v in (columns | about).items()))
        rows, cases = self.results.carried
        if rows or cases:
            self.say(f"{rows} rows and {cases} tests of this code are known already; --again: anew")
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            for place, stage in enumerate(stages):
                seconds = budget.share(stage, stages[place + 1 :], self.clock.left)
                self.stage(stage, seconds)
        except KeyboardInterrupt:
            self.page.stages.append(Stage("interrupted", 0, False, "the files have what was known"))
        self.results.write_rows()
        self.results.write_summary(summary.page(self.page))
        gc.unfreeze()  # else extension modules complain of leaks, below the page
        print("\n" + summary.printed(self.page), flush=True)
        return int(not self.page.passed)

    def contenders(self, told: dict[str, Any]) -> tuple[str, ...]:
        """Those that are asked for and available."""
        wanted = self.given.contenders.replace(",", " ").split()
        return tuple(n for n in wanted if n != "cuda" or told["kinds"].cuda is not None)

    def stage(self, name: str, seconds: float) -> None:
        self.say(f"--- {name}: up to {seconds:.0f} s, {self.clock.left:.0f} s left in all")
        run: Callable[[Clock], tuple[bool | None, str]] = {
            "smoke": self.smoke,
            "build": self.build,
            "core": lambda clock: self.test("core", clock),
            "test": lambda clock: self.test("gpu", clock),
            "bench": self.bench,
            "sanitize": self.sanitize,
        }[name]
        started = time.monotonic()
        try:
            passed, text = run(Clock(seconds))
        except Exception as error:  # of this program's: the other stages go on
            passed, text = False, f"the stage itself failed: {crew.as_line(error)}"
            self.page.failures.append(f"{name}: {text}")
            self.say(_traceback())
        self.page.stages.append(Stage(name, time.monotonic() - started, passed, text))
        self.say(f"{name}: {text}")
        self.results.write_summary(summary.page(self.page))  # what is there if nothing comes after

    def smoke(self, clock: Clock) -> tuple[bool | None, str]:
        left = smoke.run(self.kinds, self.built, clock, self.options, self.keep_smoke, self.say)
        return self.judged(self.results.smoke, left, "smoke")

    def build(self, clock: Clock) -> tuple[bool | None, str]:
        listed = self.listed()
        done = self.built.compile(listed, clock, self.say)
        failed = [f"build: {what}: {error}" for what, error in self.built.failed.items()]
        self.page.failures += failed
        return not failed, f"{done} classes of kernels, {len(failed)} failures"

    def test(self, mark: str, clock: Clock) -> tuple[bool | None, str]:
        if reason := testing.missing():
            return False, reason
        given = self.given
        files = tuple(given.tests.split())
        options = testing.Options(
            mark, files, given.processes, given.test_limit, given.preload, given.select
        )
        known = list(self.results.cases)
        cases, left = testing.run(options, clock, known, self.say, self.log, self.results.set_cases)
        self.results.set_cases(cases)
        self.results.write_rows()
        every = list(self.results.cases.values())
        red = [case for case in every if case.red]
        fresh = [f"{c.outcome} {c.nodeid}: {_last_line(c.text)}" for c in red]
        self.page.failures = [f for f in self.page.failures if f not in fresh] + fresh
        if not every and not left:
            return False, "nothing was collected: log.txt says why"
        text = testing.counts(every) + (f"; {len(left)} not reached in time" if left else "")
        return not red, text

    def bench(self, clock: Clock) -> tuple[bool | None, str]:
        known = self.results.measured()
        left = timings.run(
            self.listed(), known, self.kinds, self.built, clock, self.options, self.keep, self.say
        )
        self.results.write_rows()
        return self.judged(self.results.rows, left, "bench")

    def sanitize(self, clock: Clock) -> tuple[bool | None, str]:
        log = self.folder / "sanitize.log"
        passed, text = sanitize.run(
            clock,
            log,
            CHECK * self.given.hang,
            self.given.preload,
            self.say,
            self.kinds.contenders,
        )
        if not passed:
            self.page.failures.append(f"sanitize: {text}; sanitize.log has the reports")
        return None if text.startswith("left out") else passed, text

    def listed(self) -> list[Point]:
        return list(points.points(self.given.workloads, self.given.types))

    def judged(self, rows: list[dict[str, Any]], left: int, name: str) -> tuple[bool, str]:
        faults = summary.faults(rows)
        self.page.failures += [f"{name}: {fault}" for fault in faults]
        timed = sum(bool(row["ms"]) for row in rows)
        text = f"{timed} times, {len(faults)} faults"
        return not faults, text + (f"; {left} points not reached in time" if left else "")

    def keep(self, point: Point, unit: Unit, fields: dict[str, Any]) -> None:
        row = self.results.row(point, unit, fields, timings.now())
        self.results.add(row)
        self.say(_line(row))

    def keep_smoke(self, point: Point, unit: Unit, fields: dict[str, Any]) -> None:
        row = self.results.row(point, unit, fields, timings.now()) | {"tested": ""}
        self.results.add_smoke(row)
        self.say(_line(row))


def _line(row: dict[str, Any]) -> str:
    who = " ".join(filter(None, (row["contender"], row["form"], row["how"])))
    what = f"{row['ms']} ms" if row["ms"] else ""
    return f"{row['name']} {row['type']} {row['way']} {who}: {what} {row['error']}".rstrip()


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def _traceback() -> str:
    import traceback

    return traceback.format_exc()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    asked = parser()
    given = asked.parse_args(argv)
    if given.preload:
        importlib.import_module(given.preload)
    crew.start, crew.preload = given.start, given.preload
    stages = given.stages.replace(",", " ").split()
    for stage in stages:
        if stage not in budget.SHARES:
            asked.error(f"--stages: expected some of {DEFAULT_STAGES}, got {stage!r}")
    if given.minutes <= 0:
        asked.error(f"--minutes: expected more than 0, got {given.minutes:g}")
    for name in given.contenders.replace(",", " ").split():
        if name not in points.CONTENDERS:
            expected = " ".join(points.CONTENDERS)
            asked.error(f"--contenders: expected some of {expected}, got {name!r}")
    if given.processes < 1:
        asked.error(f"--processes: expected 1 or more, got {given.processes}")
    try:
        list(points.points(given.workloads))
    except ValueError as error:
        asked.error(f"--workloads: {error}")
    try:
        points.points("headline", given.types)
    except ValueError as error:
        asked.error(f"--types: {error}")
    if given.exercise:
        sanitize.exercise(given.exercise)
        return 0
    # torch then asks for devices without touching them, so that this process can be forked
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    folder = given.out or Path(os.environ.get("OUT") or results.DEFAULT)
    return Session(given, folder).run(stages)


if __name__ == "__main__":
    sys.exit(main())
