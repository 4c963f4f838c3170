"""The stages ``core`` and ``test``: the GPU's tests side by side, whatever some of them do.

pytest-xdist gives them to processes and puts new ones in the place of those that ended; where it is
missing they run one after another in one process, which is started again. What became of each test
is read from what the processes themselves wrote (:mod:`.plugin`), so nothing that is known is lost
with a process, pytest's own included.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from .budget import Clock
from .crew import end_with_parent
from .junit import Case
from .plugin import SUSPECTS

ROOT = Path(__file__).parents[2]
FILES = "tests/test_gpu*.py"
#: A lost test takes its whole limit: what this many of them launched is launched no more.
ENOUGH = 3
#: Seconds between two looks at the records.
LOOK = 0.5
#: Seconds between two lines about how far it is.
NEWS = 15.0


@dataclass
class Records:
    """What the processes of a run have written so far."""

    folder: Path
    cases: dict[str, Case] = field(default_factory=dict)
    collected: list[str] = field(default_factory=list)
    _read: dict[Path, int] = field(default_factory=dict)
    _at: dict[Path, Case] = field(default_factory=dict)
    _since: dict[Path, float] = field(default_factory=dict)

    def look(self) -> None:
        """Read what is new."""
        for file in sorted(self.folder.glob("*.jsonl")):
            with file.open() as lines:
                lines.seek(self._read.get(file, 0))
                while (line := lines.readline()).endswith("\n"):
                    self._line(file, json.loads(line))
                    self._read[file] = lines.tell()

    def _line(self, file: Path, line: dict) -> None:
        if "collected" in line:
            self.collected += [n for n in line["collected"] if n not in set(self.collected)]
        elif "collect" in line:
            self.cases[line["collect"]] = Case(line["collect"], "failed", text=line["text"])
        elif "start" in line:
            self._at[file] = Case(line["start"], "lost")
            self._since[file] = time.monotonic()
        elif "launched" in line:
            self._at[file].launched.append(line["launched"])
        elif "refused" in line:
            self._at[file].launched.remove(line["refused"])
        elif "end" in line:
            case = self._at.pop(file)
            case.outcome, case.seconds, case.text = line["outcome"], line["seconds"], line["text"]
            self.cases[case.nodeid] = case

    def lose(self, reason: str = "") -> list[Case]:
        """Those that began and whose process is gone: with a reason, all that began."""
        gone = [file for file in self._at if reason or not _alive(file)]
        self.look()  # a process may have written its last line before it went
        lost = []
        for file in gone:
            if file not in self._at:
                continue
            case = self._at[file]
            stacks = file.with_suffix(".stacks")
            where = stacks.read_text()[:5000] if stacks.exists() else ""  # the last call is first
            case.seconds = round(time.monotonic() - self._since[file], 3)
            ended = "it ran past its limit" if "Timeout" in where else "its process ended"
            case.text = f"{where}\nlost: {reason or ended}"
            self.cases[case.nodeid] = case
            lost.append(self._at.pop(file))
        return lost

    def suspect(self) -> None:
        """Tell the processes what so many lost tests launched that no other is to launch it."""
        count = Counter(x for c in self.cases.values() if c.outcome == "lost" for x in c.launched)
        text = "\n".join(launch for launch, lost in count.items() if lost >= ENOUGH)
        part = self.folder / "part.txt"
        part.write_text(text)
        os.replace(part, self.folder / SUSPECTS)

    def stopped(self) -> list[str]:
        """Those that ran when the time was over: nothing is known of them."""
        names = [case.nodeid for case in self._at.values()]
        self._at.clear()
        return names

    def remaining(self) -> list[str]:
        return [name for name in self.collected if name not in self.cases]


def _alive(file: Path) -> bool:
    """Whether the process whose records these are still runs; a zombie does not."""
    try:
        status = Path("/proc", file.stem.rsplit("-", 1)[1], "stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in ("Z", "X")


@dataclass(frozen=True)
class Options:
    """mark: 'core', or 'gpu' for all. limit: seconds a test. preload: imported in every process.
    select: of their names, as pytest's -k."""

    mark: str
    files: tuple[str, ...] = (FILES,)
    processes: int = 1
    limit: float = 60.0
    preload: str | None = None
    select: str = ""


def missing() -> str:
    """Why no test can run; '' where they can."""
    return "" if find_spec("pytest") else "pytest is missing here: pip install pytest pytest-xdist"


def command(options: Options, records: Path, skip: Path) -> list[str]:
    """Without the tests' own conftest.py, which asks for more than such a machine may have."""
    files = [
        str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
        for pattern in options.files
        for path in (sorted(ROOT.glob(pattern)) if not os.path.isabs(pattern) else [Path(pattern)])
    ]
    found = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--continue-on-collection-errors"]
    found += ["--noconftest", f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml")]
    found += ["-p", options.preload] if options.preload else []
    found += ["-p", "bench.gpu.plugin", "-p", "no:cacheprovider", "-o", "filterwarnings=default"]
    found += [f"--gpu-records={records}", f"--gpu-limit={options.limit:g}", f"--gpu-skip={skip}"]
    if find_spec("xdist"):
        found += ["-p", "xdist.plugin", "-n", str(options.processes), "--dist", "worksteal"]
        found += ["--max-worker-restart", "1000000"]
    found += ["-m", options.mark]
    found += ["-k", options.select] if options.select else []
    return found + files


def run(
    options: Options,
    clock: Clock,
    known: Sequence[str],
    say: Callable[[str], None],
    log: Path,
    keep: Callable[[list[Case]], None],
) -> tuple[list[Case], list[str]]:
    """What became of the tests, but of those that are ``known``; and those that time did not reach.

    keep: given all cases now and then, to write them down.
    """
    if not find_spec("xdist"):
        say("tests: pytest-xdist is missing here, so they run one after another")
    with tempfile.TemporaryDirectory(prefix="fastseq-tests-") as folder:
        records, skip = Records(Path(folder)), Path(folder) / "skip.txt"
        while True:
            before = len(records.cases)
            skip.write_text("\n".join([*known, *records.cases]))
            ended = _once(command(options, Path(folder), skip), records, clock, say, log, keep)
            if not ended:
                records.stopped()
                break
            for case in records.lose("its process ended"):
                say(f"tests: LOST {case.nodeid}")
            records.suspect()
            keep(list(records.cases.values()))
            if not records.remaining() or len(records.cases) == before or clock.left <= 0:
                break
            say(f"tests: pytest ended; {len(records.remaining())} go on in another")
        return list(records.cases.values()), records.remaining()


def _once(
    given: list[str],
    records: Records,
    clock: Clock,
    say: Callable[[str], None],
    log: Path,
    keep: Callable[[list[Case]], None],
) -> bool:
    """Run pytest and read along; whether it ended by itself."""
    with log.open("a") as sink:
        running = subprocess.Popen(
            given,
            cwd=ROOT,
            env=environment(),
            stdout=sink,
            stderr=subprocess.STDOUT,
            preexec_fn=_apart,
        )
    news, told = time.monotonic() + NEWS, 0
    try:
        while True:
            try:
                running.wait(min(LOOK, max(clock.left, 0.01)))
                ended = True
            except subprocess.TimeoutExpired:
                ended = False
            records.look()
            for case in records.lose():
                say(f"tests: LOST {case.nodeid}")
            cases = list(records.cases.values())
            for case in cases[told:]:
                if case.outcome == "failed":
                    say(f"tests: FAILED {case.nodeid}")
            if len(cases) > told:
                keep(cases)
                records.suspect()
            told = len(cases)
            if time.monotonic() > news and records.collected:
                news = time.monotonic() + NEWS
                say(f"tests: {told} of {len(records.collected)}, {clock.left:.0f} s left")
            if ended or clock.left <= 0:
                return ended
    finally:
        _end(running)


def _apart() -> None:
    """A group of its own, so that all of it can be ended, but no session of its own."""
    os.setpgrp()
    end_with_parent()


def _end(running: subprocess.Popen) -> None:
    """pytest and all its processes: some may be stuck."""
    try:
        os.killpg(running.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    running.wait(10)


def environment() -> dict[str, str]:
    """This tree's code, one thread a process, and no plugin but those that are named."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return outside | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def counts(cases: Sequence[Case]) -> str:
    found = Counter(case.outcome for case in cases)
    return ", ".join(f"{n} {outcome}" for outcome, n in sorted(found.items())) or "none"
