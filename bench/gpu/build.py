"""Compile what will be called of triton: a task is one class of kernels, two steps forward and
backward. cuda's kernels are binaries.

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
from .points import Point, contender
from .suspects import Suspects


@dataclass(frozen=True)
class Task:
    """silence: seconds in which what was launched ends; to compile it may take longer."""

    point: Point
    forms: tuple[str, ...]
    silence: float


#: How much longer a kernel may take to compile.
COMPILING = 3


def compile_point(task: Task) -> Iterator[tuple[str, str]]:
    """(form, what is wrong with it)"""
    point = task.point
    small = replace(point.typed, T=2)
    with forms.precision(point.type), forms.short_patience(), forms.heard(lambda *told: tick()):
        for form in task.forms:
            try:
                with forms.as_form(form):
                    doing(f"{form}, compiling", COMPILING * task.silence)
                    module, x = small.module(fastseq, backend="triton").cuda(), small.input()
                    x = x.to("cuda")
                    with torch.no_grad():
                        small.run(module, x)
                    doing(f"{form}, running forward", task.silence)
                    torch.cuda.synchronize()
                    if small.training:
                        doing(f"{form}, compiling", COMPILING * task.silence)
                        small.run(module, x).float().sum().backward()
                        doing(f"{form}, running backward", task.silence)
                        torch.cuda.synchronize()
            except Exception as error:  # the process may be broken
                yield form, as_line(error)
                raise Leave from error


class Built:
    """Which classes of kernels were compiled in this run, and what could not be."""

    def __init__(
        self, kinds: forms.Kinds, processes: int, silence: float, log: str, suspects: Suspects
    ) -> None:
        self.kinds, self.processes, self.silence, self.log = kinds, processes, silence, log
        self.suspects = suspects
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
            every = forms.forms(point.typed, point.type, self.kinds)
            every = [form for form in every if contender(form) == "triton"]
            found = tuple(f for f in every if not self.suspects.reason(point, f))
            if found and point not in self:
                waiting.setdefault(self._class(point), Task(point, found, self.silence))
        classes = {task: name for name, task in waiting.items()}
        queue = iter(classes)
        done = 0
        for event in crew(
            lambda: next(queue, None),
            compile_point,
            clock,
            processes=self.processes,
            silence=2 * COMPILING * self.silence,
            log=self.log,
        ):
            task = event.task
            if event.kind == "told":
                self._fail(task, *event.message, say)
            elif event.kind in ("lost", "failed"):
                form, _, at = event.doing.partition(", ")
                self._fail(task, form, f"{event.text} ({at})", say)
            if event.kind not in ("told", "stopped"):
                self.classes.add(classes[task])
                done += 1
        return done

    def _fail(self, task: Task, form: str, error: str, say: Callable[[str], None]) -> None:
        what = f"{task.point.workload.shape} {task.point.type} {form}"
        self.failed[what] = error
        self.suspects.blame(task.point, form, error)
        say(f"build: {what}: {error}")
