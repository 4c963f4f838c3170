"""A peer in a process of its own, which stands still while others are timed.

Two thread pools in one process, or two that are awake on one machine, take the cores from each
other: ONNX Runtime's idle threads and OpenMP's spin for milliseconds. So a peer's process is
stopped (SIGSTOP) as soon as it has answered, and goes on (SIGCONT) when its turn comes; a process
that is stopped spins no more. The parent, whose OpenMP threads are awake after its own turn, sleeps
:data:`QUIET` seconds before the first peer's.

The protocol is a line of JSON each way. {"prepare": fields of a workload, "way": way} answers
{"declined": reason or null} or {"error": what is wrong}; {"sample": null} makes a call, then one
that is timed, and answers {"seconds": of that}.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .peers import PEERS, Call, Peer, check, environment, expected
from .workloads import Workload

ROOT = Path(__file__).parent.parent
#: libgomp's threads spin for 2 to 8 ms after the last parallel region
QUIET = 0.01


class Remote:
    """The parent's side: one peer, for a run."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.samples: list[float] = []
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.remote", name, str(threads)],
            cwd=ROOT,
            env=environment(name, threads),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.version: str = self._answer()["version"]
        self._stop()

    def prepare(self, workload: Workload, way: str) -> str | None:
        """Build, run once and compare with torch.nn; why it declines, None if it does not.

        Raises RuntimeError where the numbers are not torch.nn's, or the library fails.
        """
        self.samples = []
        if workload.dtype is not torch.float32:
            return "float32 is compared alone"
        fields = {k: v for k, v in asdict(workload).items() if k != "dtype"}
        return self._ask({"prepare": fields, "way": way})["declined"]

    def sample(self) -> float:
        """Seconds of a call that another one precedes."""
        return self._ask({"sample": None})["seconds"]

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.communicate()  # at the end of its input it ends
        self._errors.close()

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        self._stop()
        if "error" in answer:
            raise RuntimeError(f"{self.name}: {answer['error']}")
        return answer

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.communicate()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")[-2000:]
        self._errors.close()
        raise RuntimeError(f"{self.name}: its process ended\n{said}")


class Served:
    """The peer's side: what it answers to each question."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.call: Call | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, Any]:
        if "prepare" in question:
            return self._prepare(Workload(**question["prepare"]), question["way"])
        assert self.call is not None
        self.call()
        start = time.perf_counter()
        self.call()
        return {"seconds": time.perf_counter() - start}

    def _prepare(self, workload: Workload, way: str) -> dict[str, Any]:
        self.call = None
        gc.collect()
        try:
            call = getattr(self.peer, way)(workload)
            check(call(), expected(workload, way == "training"))
        except NotImplementedError as reason:
            return {"declined": str(reason)}
        except Exception as error:  # of the library, or of check: the case fails, not the run
            return {"error": f"{workload.name}, {way}: {error!r}"}
        self.call = call
        return {"declined": None}


def serve(name: str, threads: int) -> None:
    """Answer a line of JSON for each line of the input, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the errors
    _end_with_parent()

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    served = Served(PEERS[name](threads))
    say({"version": PEERS[name].version()})
    gc.disable()
    for line in sys.stdin:
        say(served.answer(json.loads(line)))


def _end_with_parent() -> None:
    """On Linux, so that a stopped process does not outlive a parent that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
