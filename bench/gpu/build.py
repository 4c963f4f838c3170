"""Compile what will be called: a task is one class of kernels, two steps forward and backward.

Triton keeps what it compiled on disk, so that the process that measures finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

import fastseq

from . import forms
from .budget import Clock
from .crew import Leave, as_line, crew, doing, tick
from .points import Point

#: Seconds in which a kernel is compiled.
COMPILING = 60.0


@dataclass(frozen=True)
class Task:
    point: Point
    forms: tuple[str, ...]


def compile_point(task: Task) -> Iterator[tuple[str, str]]:
    """(form, what is wrong with it)"""
    point = task.point
    small = replace(point.typed, T=2)
    with forms.precision(point.type), forms.short_patience(), forms.heard(lambda *told: tick()):
        for form in task.forms:
            doing(f"{form} of {small.shape} {point.type}", COMPILING)
            try:
                with forms.as_form(form):
                    module, x = small.module(fastseq, backend="triton").cuda(), small.input()
                    x = x.to("cuda")
                    with torch.no_grad():
                        small.run(module, x)
                    if small.training:
                        small.run(module, x).float().sum().backward()
                    torch.cuda.synchronize()
            except Exception as error:  # the process may be broken
                yield form, as_line(error)
                raise Leave from error


class Built:
    """Which classes of kernels were compiled in this run, and what could not be."""

    def __init__(self, kinds: forms.Kinds, processes: int, log: str) -> None:
        self.kinds, self.processes, self.log = kinds, processes, log
        self.classes: set[Any] = set()
        self.failed: dict[str, str] = {}

    def __contains__(self, point: Point) -> bool:
        return self._class(point) in self.classes

    def _class(self, point: Point) -> Any:
        return (*forms.kernels(point.typed, point.type, self.kinds), point.workload.training)

    def compile(self, points: Iterable[Point], clock: Clock, say: Callable[[str], None]) -> int:
        """How many classes of those that the points need were compiled now, in many processes."""
        waiting: dict[Any, Task] = {}
        for point in points:
            found = tuple(forms.forms(point.typed, point.type, self.kinds))
            if point not in self:
                waiting.setdefault(self._class(point), Task(point, found))
        queue = iter(list(waiting.items()))
        classes = {task: name for name, task in waiting.items()}
        done = 0

        def following() -> Task | None:
            return next(queue, (None, None))[1]

        options = {"processes": self.processes, "silence": COMPILING, "log": self.log}
        for event in crew(following, compile_point, clock, **options):  # type: ignore[arg-type]
            task = event.task
            shape = f"{task.point.workload.shape} {task.point.type}"
            if event.kind == "told":
                form, error = event.message
                self._fail(f"{shape} {form}", error, say)
            elif event.kind in ("lost", "failed"):
                self._fail(f"{shape}", f"{event.text} ({event.doing})", say)
            if event.kind not in ("told", "stopped"):
                self.classes.add(classes[task])
                done += 1
        return done

    def _fail(self, what: str, error: str, say: Callable[[str], None]) -> None:
        self.failed[what] = error
        say(f"build: {what}: {error}")
