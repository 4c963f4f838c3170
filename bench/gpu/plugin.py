"""For pytest, in every process that runs tests: what became of each test is on disk before the next
begins, none runs longer than its limit, and a process that met a CUDA error leaves.

    pytest -p bench.gpu.plugin --gpu-records FOLDER [--gpu-limit SECONDS] [--gpu-skip FILE]

The limit is kept by a thread of C that needs no lock of Python's (faulthandler's): it writes where
all threads are, and ends the process, also where a driver's call holds that lock. pytest-xdist then
puts another process in its place. Each process writes lines of JSON to a file of its own; nobody
else's report is needed to know what it did.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

#: After one of these nothing that the process asks of the device can be believed.
STICKY = "CUDA error", "CUDA driver error", "device-side assert", "illegal memory access"
#: How many limits a test may take that is marked ``compiles``: side by side compilers take long.
COMPILING = 4
#: How a process ends that leaves.
LEFT = 3
#: Among the records, what is to be launched no more: too many tests were lost that launched it.
SUSPECTS = "suspects.txt"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastseq on a GPU")
    group.addoption("--gpu-records", type=Path, help="the folder of the records")
    group.addoption("--gpu-limit", type=float, default=60.0, help="seconds that a test may take")
    group.addoption("--gpu-skip", type=Path, help="a file with names of tests that are left out")


def pytest_configure(config: pytest.Config) -> None:
    controller = getattr(config.option, "numprocesses", None) and not hasattr(config, "workerinput")
    if config.getoption("--gpu-records") is not None and not controller:
        config.pluginmanager.register(_Recorder(config), "fastseq-gpu-recorder")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Those of the core first: they say most."""
    skip = config.getoption("--gpu-skip")
    left = set(skip.read_text().splitlines()) if skip is not None else set()
    done = [item for item in items if item.nodeid in left]
    if done:
        config.hook.pytest_deselected(items=done)
    rest = [item for item in items if item.nodeid not in left]
    items[:] = sorted(rest, key=lambda item: "core" not in item.keywords)


def _here(text: str) -> str:
    """Without the place of this checkout: what is written down may be committed."""
    return text.replace(f"{Path(__file__).parents[2]}{os.sep}", "")


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        folder: Path = config.getoption("--gpu-records")
        self.suspects = folder / SUSPECTS
        stem = folder / f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}"
        self.limit: float = config.getoption("--gpu-limit")
        self.records = stem.with_suffix(".jsonl").open("a", buffering=1)
        self.stacks = stem.with_suffix(".stacks").open("a")
        self.poisoned = False
        self.listening: Any = None
        self.launched: set[str] = set()
        self.record(process=os.getpid())

    def record(self, **what: Any) -> None:
        self.records.write(json.dumps(what) + "\n")

    def watched(self, times: int = 1) -> None:
        """From now on the limit, or several, counts again."""
        faulthandler.dump_traceback_later(times * self.limit, exit=True, file=self.stacks)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.record(collect=report.nodeid, text=_here(str(report.longrepr))[-4000:])

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.record(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.launched.clear()
        self.seconds, self.outcome, self.text = 0.0, "passed", ""
        self.record(start=item.nodeid)
        yield
        faulthandler.cancel_dump_traceback_later()
        self.record(
            end=item.nodeid, outcome=self.outcome, seconds=round(self.seconds, 3), text=self.text
        )
        if self.poisoned:
            os._exit(LEFT)

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_setup(self) -> Any:
        self.watched()
        if self.listening is None and "fastseq" in sys.modules:
            self.listen()
        yield

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        self.watched(COMPILING if "compiles" in item.keywords else 1)
        yield

    @pytest.hookimpl(hookwrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self) -> Any:
        self.watched()  # pytest itself disarms it when a test fails
        yield

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Any:
        report = (yield).get_result()
        self.seconds += report.duration
        if report.skipped and self.outcome == "passed":
            self.outcome, self.text = "skipped", _here(str(report.longrepr))[-300:]
        if report.failed:
            self.outcome, self.text = "failed", (self.text + _here(report.longreprtext))[-6000:]
            self.poisoned = self.poisoned or (
                call.excinfo is not None and sticky(call.excinfo.value)
            )

    def listen(self) -> None:
        """Hear what is launched from now on."""
        try:
            from bench.gpu import forms
        except ImportError:  # no Triton: its tests will say so
            return
        self.listening = forms.heard(self.heard)
        self.listening.__enter__()

    def heard(self, launch: Any, refused: bool) -> None:
        """On disk before it is made: it may be the last that this process does."""
        text = str(launch)
        if refused:
            self.launched.discard(text)
            self.record(refused=text)
        elif text not in self.launched:
            self.launched.add(text)
            self.record(launched=text)
            if self.suspects.exists() and text in self.suspects.read_text().splitlines():
                pytest.fail(f"not launched: {text}, at which too many tests were lost")


def sticky(error: BaseException) -> bool:
    """Whether an error leaves the device of this process unusable."""
    if any(word in str(error) for word in STICKY):
        return True
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
