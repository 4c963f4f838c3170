"""What a child does for a point: numbers first, then times; contenders in turn."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

import fastseq

from . import forms, numbers, timing
from .crew import Leave, as_line, doing, tick
from .points import HOWS, Point, Unit, contender


@dataclass(frozen=True)
class Task:
    """todo: the units that have no time yet. silence: seconds that a step may take without a sign.

    built: its kernels are compiled. seconds: of samples, for each contender and way to call.
    """

    point: Point
    todo: tuple[Unit, ...]
    silence: float
    built: bool = True
    seconds: float = 0.12


#: (what, unit, fields): a 'row'; a 'provisional' one, which a later row replaces; 'numbers', that
#: were found too far off in what a form computes.
Message = tuple[str, Unit, dict[str, Any]]

#: Of the memory that a workload is said to take: what all contenders and their gradients do.
HOLDERS = 4
#: The truth, in float64, beside them.
WITH_TRUTH = 7


def measure(task: Task) -> Iterator[Message]:
    """Rows for the units of a point. It leaves its process after an error, which may be broken."""
    with forms.precision(task.point.type), forms.short_patience():
        gc.disable()  # while times are taken
        yield from _Measured(task).rows()
    gc.collect()
    torch.cuda.empty_cache()  # the next point may want it in other pieces


class _Measured:
    def __init__(self, task: Task) -> None:
        self.task, self.point = task, task.point
        self.workload = task.point.typed
        self.training = task.point.training
        self.todo = list(task.todo)
        self.calls: dict[Unit, timing.Call] = {}

    def say(self, unit: Unit, what: str, silence: float | None = None) -> None:
        parts = (unit.contender, unit.form or "-", unit.how or "-", what)
        doing(" ".join(parts), silence or self.task.silence)

    def rows(self) -> Iterator[Message]:
        self.say(Unit("", "", ""), "inputs")
        needed = HOLDERS * self.workload.bytes(self.training)
        free = torch.cuda.mem_get_info()[0]
        if needed > free:
            text = f"left out: takes about {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"
            yield from (("row", unit, {"error": text}) for unit in self.todo)
            return
        self.theirs = self.workload.module().cuda().train(self.training)
        self.x = self.workload.input().to("cuda")
        for unit in [u for u in self.todo if u.contender == "cudnn"]:
            yield from self.prepared(unit, self.theirs)
            self.say(unit, "alone")  # what stays if ours ends this process
            samples = timing.in_turn({unit: self.calls[unit]}, 0.02, lambda unit: tick())
            yield "provisional", unit, timing.figures(samples[unit])
        modules: dict[str, torch.nn.Module] = {}
        for form in dict.fromkeys(u.form for u in self.todo if u.form):
            name = contender(form)
            ours = modules[name] = modules.get(name) or self.ours(name)
            yield from self.checked(form, ours)
            for unit in [u for u in self.todo if u.form == form]:
                yield from self.prepared(unit, ours)
        for how in HOWS:
            yield from self.timed({u: call for u, call in self.calls.items() if u.how == how})

    def ours(self, backend: str) -> torch.nn.Module:
        module = self.workload.module(fastseq, backend=backend).cuda()
        module.load_state_dict(self.theirs.state_dict())
        return module.train(self.training)

    def prepared(self, unit: Unit, module: torch.nn.Module) -> Iterator[Message]:
        """Its call is warm, or recorded."""
        self.say(unit, "first calls", 3 * self.task.silence)
        try:
            with self.form_of(unit):
                call = timing.warmed(caller(self.workload, self.training, module, self.x))
                self.say(unit, "capture", 3 * self.task.silence)
                self.calls[unit] = timing.recorded(call) if unit.how == "graph" else call
        except Exception as error:
            yield from self.given_up([unit], as_line(error))

    def given_up(self, units: list[Unit], text: str) -> Iterator[Message]:
        """Rows of an error; this process is left, and what remains is measured in another."""
        yield from (("row", unit, {"error": text}) for unit in units)
        raise Leave

    def form_of(self, unit: Unit) -> Any:
        return forms.as_form(unit.form) if unit.form else nullcontext()

    def checked(self, form: str, ours: torch.nn.Module) -> Iterator[Message]:
        """Its first call, and its numbers."""
        unit = Unit(contender(form), form, "")
        try:
            bad, far = self.judged(unit, ours)
        except Exception as error:
            bad, far = as_line(error), ""
        if bad:
            yield from self.given_up([u for u in self.todo if u.form == form], bad)
        if far:
            yield "numbers", unit, {"error": far}

    def judged(self, unit: Unit, ours: torch.nn.Module) -> tuple[str, str]:
        """Why no time is taken, and what is to be said beside one; '' for nothing."""
        launched: set[str] = set()

        def listener(launch: forms.Launch, refused: bool) -> None:
            tick()
            if not refused:
                launched.add(launch.form)

        # what is not compiled yet is compiled now: a launch is a sign
        compiled = self.task.built or unit.contender == "cuda"
        self.say(unit, "first call", (1 if compiled else 4) * self.task.silence)
        with self.form_of(unit), forms.heard(listener):
            found = outputs(self.workload, self.training, ours, self.x)
        self.say(unit, "first call's end")  # launches come back before they end
        torch.cuda.synchronize()
        if launched != {unit.form}:
            return f"{' and '.join(sorted(launched))} ran in its place", ""
        self.say(unit, "numbers", 4 * self.task.silence)
        theirs, truth = self.expected()
        bad = numbers.wrong(found, truth or theirs)
        if bad or truth is None:
            return bad, ""
        eps = numbers.TF32 if self.point.type == "tf32" else None
        return bad, numbers.too_far(found, theirs, truth, eps=eps)

    def expected(self) -> tuple[list[Tensor], list[Tensor] | None]:
        """Theirs, and in float64 by torch.nn where there is memory for it."""
        if not hasattr(self, "_expected"):
            theirs = self.as_torch(self.workload, self.theirs, self.x)
            truth = None
            if WITH_TRUTH * self.workload.bytes(self.training) < torch.cuda.mem_get_info()[0]:
                wide = replace(self.workload, dtype=torch.float64)
                module = wide.module().cuda().train(self.training)
                module.load_state_dict(self.theirs.state_dict())
                truth = self.as_torch(wide, module, self.x.to(torch.float64))
            self._expected = theirs, truth
        return self._expected

    def as_torch(self, workload: Any, module: torch.nn.Module, x: Any) -> list[Tensor]:
        """By cuDNN, or without it where it declines."""
        try:
            return outputs(workload, self.training, module, x)
        except RuntimeError:
            torch.cuda.synchronize()
            torch.backends.cudnn.enabled = False
            try:
                return outputs(workload, self.training, module, x)
            finally:
                torch.backends.cudnn.enabled = True

    def timed(self, calls: dict[Unit, timing.Call]) -> Iterator[Message]:
        """All of one way to call."""
        if not calls:
            return
        at: list[Unit] = []
        try:
            with ExitStack() as form:

                def before(unit: Unit) -> None:
                    """A layer reads its form when it is called; a replay has it in it."""
                    self.say(unit, "samples", 2 * self.task.silence)
                    at[:] = [unit]
                    form.close()
                    form.enter_context(self.form_of(unit))

                samples = timing.in_turn(calls, self.task.seconds, before)
        except Exception as error:
            yield from self.given_up(at, as_line(error))
        for unit, times in samples.items():
            yield "row", unit, timing.figures(times)


def caller(workload: Any, training: bool, module: torch.nn.Module, x: Any) -> Callable[[], Any]:
    """What is timed: forward without autograd, or forward and all gradients."""
    if not training:

        def forward() -> Any:
            with torch.no_grad():
                return workload.run(module, x)

        return forward
    leaves, dy = _leaves(workload, module, x)

    def step() -> Any:
        return torch.autograd.grad(workload.run(module, x), leaves, dy)

    return step


@lru_cache(maxsize=1)  # of large layers they take seconds to draw
def _numbers(shape: torch.Size) -> Tensor:
    random = torch.Generator().manual_seed(2)
    return torch.randn(shape, generator=random).to(torch.bfloat16)


def _leaves(workload: Any, module: torch.nn.Module, x: Any) -> tuple[list[Tensor], Tensor]:
    """What has a gradient, and the gradient of the output, the same numbers in any type."""
    data = x.data if isinstance(x, PackedSequence) else x
    with torch.no_grad():
        shape = workload.run(module, x).shape
    dy = _numbers(shape).to("cuda").to(data.dtype)
    return [data.requires_grad_(), *module.parameters()], dy


def outputs(workload: Any, training: bool, module: torch.nn.Module, x: Any) -> list[Tensor]:
    """The output of every step, and all gradients."""
    if not training:
        with torch.no_grad():
            return [workload.run(module, x)]
    leaves, dy = _leaves(workload, module, x)
    y = workload.run(module, x)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]
