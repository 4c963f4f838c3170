"""Children that take tasks in turn, each watched: a task may hang, or end its child, and the next
goes on in a new one.

A child is forked from this process, which never touches the device: so it starts in milliseconds,
with all modules loaded. (Where :data:`start` says "spawn" it is a new process and loads them.) It
says what it is about to do and how long that may stay silent (:func:`doing`); one that stays silent
longer is killed.
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from .budget import Clock

#: How children start.
start = "fork"
#: A module that one which was not forked imports first.
preload: str | None = None
#: How long a killed child is waited for. One whose driver does not let it go is left behind.
DEATH = 5.0


class Event(NamedTuple):
    """What became of a task.

    kind: 'told', a message of its work; 'done'; 'failed', by an exception; 'lost', with its child;
    'stopped', since the time is over. text: the reason. doing: what the child was at.
    """

    kind: str
    task: Any
    message: Any = None
    text: str = ""
    doing: str = ""


class Leave(Exception):
    """Raised by a work: the task is done, and its process is not to be used again."""


class _Progress(ctypes.Structure):
    """Shared by a child and its parent."""

    _fields_ = (
        ("ticks", ctypes.c_long),
        ("silence", ctypes.c_double),
        ("text", ctypes.c_char * 200),
    )


_progress: Any = None


def doing(text: str, silence: float) -> None:
    """In a child: what comes now, and for how many seconds at most it shows no tick."""
    if _progress is not None:
        _progress.text = text.encode(errors="replace")[:199]
        _progress.silence = silence
        _progress.ticks += 1


def tick() -> None:
    """In a child: something went on."""
    if _progress is not None:
        _progress.ticks += 1


def end_with_parent() -> None:
    """On Linux, so that no child outlives a parent that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class _Child:
    def __init__(self, work: Callable[[Any], Iterator[Any]], log: str | None) -> None:
        context: Any = multiprocessing.get_context(start)
        self.progress: Any = context.RawValue(_Progress)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(work, theirs, self.progress, log, preload), daemon=True
        )
        with warnings.catch_warnings():
            # NumPy's BLAS keeps threads; they are idle, and it knows of forks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.process.start()
        theirs.close()
        self.task: Any = None
        self.busy = False
        self.seen, self.since, self.started = 0, 0.0, 0.0

    def give(self, task: Any, silence: float) -> None:
        self.task, self.busy = task, True
        self.progress.silence = silence
        self.progress.text = b""
        self.seen = self.progress.ticks
        self.since = self.started = time.monotonic()
        self.connection.send(task)

    @property
    def doing(self) -> str:
        return self.progress.text.decode(errors="replace")

    def overdue(self, limit: float) -> str:
        """Why it is to be killed; '' while it is not."""
        now = time.monotonic()
        if self.progress.ticks != self.seen:
            self.seen, self.since = self.progress.ticks, now
        allowed = self.progress.silence
        if now - self.since > allowed:
            return f"hang: no sign for {allowed:.0f} s"
        if now - self.started > limit:
            return f"hang: not ended after {limit:.0f} s"
        return ""

    def kill(self) -> None:
        if self.process.pid is not None:
            try:
                os.kill(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.join(DEATH)
        self.connection.close()

    def end(self) -> str:
        """How its process ended."""
        self.process.join(DEATH)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was ended by {signal.Signals(-code).name}"
        return f"its process ended with status {code}"


def crew(
    tasks: Callable[[], Any],
    work: Callable[[Any], Iterator[Any]],
    clock: Clock,
    *,
    processes: int = 1,
    silence: float = 60.0,
    limit: float = float("inf"),
    log: str | None = None,
) -> Iterator[Event]:
    """What becomes of the tasks, as it becomes known.

    tasks: gives the next one, or None; it is asked again after every event, and when it has none
        while no child works, all is done. It may give the same task again.
    work: in a child, what is done for a task; what it yields is told here.
    silence: seconds that a task may take before it says what it is doing.
    limit: seconds that a task may take in all.
    log: the file to which the children's own output goes.
    """
    children: list[_Child] = []
    try:
        while True:
            if clock.left <= 0:
                for child in [c for c in children if c.busy]:
                    children.remove(child)
                    child.kill()
                    yield Event("stopped", child.task, doing=child.doing)
                return
            if not _hand_out(tasks, work, children, processes, silence, log):
                return
            busy = [child for child in children if child.busy]
            ready = wait([child.connection for child in busy], min(0.1, max(clock.left, 0.0)))
            for child in busy:
                if child.connection in ready:
                    yield from _listen(child, children)
                elif reason := child.overdue(limit):
                    children.remove(child)
                    child.kill()
                    yield Event("lost", child.task, text=reason, doing=child.doing)
    finally:
        for child in children:
            child.kill()


def _hand_out(
    tasks: Callable[[], Any],
    work: Callable[[Any], Iterator[Any]],
    children: list[_Child],
    processes: int,
    silence: float,
    log: str | None,
) -> bool:
    """Give every child a task that has none; whether any works."""
    while sum(child.busy for child in children) < processes:
        task = tasks()
        if task is None:
            break
        idle = next((child for child in children if not child.busy), None)
        if idle is None:
            idle = _Child(work, log)
            children.append(idle)
        idle.give(task, silence)
    return any(child.busy for child in children)


def _listen(child: _Child, children: list[_Child]) -> Iterator[Event]:
    """One message of a child."""
    try:
        kind, message = child.connection.recv()
    except (EOFError, OSError):
        children.remove(child)
        doing = child.doing
        text = child.end()
        child.connection.close()
        yield Event("lost", child.task, text="lost: " + text, doing=doing)
        return
    if kind == "told":
        yield Event("told", child.task, message)
        return
    child.busy = False
    if kind != "done":  # 'failed' or 'left': its process ends by itself
        children.remove(child)
        child.end()
        child.connection.close()
    if kind == "failed":
        yield Event("failed", child.task, text=message, doing=child.doing)
    else:
        yield Event("done", child.task)


def _serve(
    work: Callable[[Any], Iterator[Any]],
    connection: Connection,
    progress: Any,
    log: str | None,
    first: str | None,
) -> None:
    """The child's side."""
    global _progress
    _progress = progress
    if first is not None:
        importlib.import_module(first)
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if log is not None:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            for message in work(task):
                connection.send(("told", message))
            connection.send(("done", None))
        except Leave:
            connection.send(("left", None))
            os._exit(0)  # a broken context is not to be taken down in order
        except Exception as error:
            connection.send(("failed", as_line(error)))
            os._exit(1)


def as_line(error: BaseException) -> str:
    """On one line, and not too long for a table."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
