"""The stage ``bench``: points in their order, each measured in a child that may be lost.

Where a child is lost, what it was at becomes a row with the reason, what it had told stays, and the
rest of the point goes on in another. Kernels are compiled for some points ahead, side by side; one
process alone is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from . import forms, points
from .budget import Clock
from .build import Built
from .crew import Event, crew
from .measuring import Task, measure
from .points import Point, Unit
from .suspects import Suspects

#: Points whose kernels are compiled together, at first and at most: the first figures come soon.
AHEAD = (12, 108)
#: A point is not begun with less time than this.
LEAST = 4.0
#: What a point may take in all.
MOST = 60.0


@dataclass
class Options:
    """silence: seconds after which a step that shows no sign is a hang. log: of the children."""

    silence: float = 12.0
    log: str | None = None
    seconds: float = 0.12


@dataclass
class Open:
    """A point that is being measured: which units have no row yet, and what is known of them.

    before: how many had none when a child was given it. notes: what is wrong with a form's numbers.
    """

    point: Point
    todo: list[Unit]
    before: int = 0
    provisional: dict[Unit, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def task(self, options: Options, built: bool) -> Task:
        self.before = len(self.todo)
        return Task(self.point, tuple(self.todo), options.silence, built, options.seconds)

    def blamed(self, doing: str) -> list[Unit]:
        """The units that a child was at when it was lost: what it had said, else all."""
        said = (*doing.split(), "", "", "")[:3]
        exact = [u for u in self.todo if (u.contender, u.form or "-", u.how) == said]
        of_form = [u for u in self.todo if (u.contender, u.form or "-") == said[:2]]
        everything = list(self.todo) if len(self.todo) == self.before else []
        return exact or of_form or everything


Keep = Callable[[Point, Unit, dict[str, Any]], None]


def run(
    listed: Iterable[Point],
    known: dict[tuple[str, str, str], set[Unit]],
    kinds: forms.Kinds,
    built: Built,
    clock: Clock,
    options: Options,
    keep: Keep,
    say: Callable[[str], None],
) -> int:
    """Measure; each row is kept when it is known. How many points are left."""
    pending = [p for p in (_open(point, known, kinds) for point in listed) if p is not None]
    left = iter(pending)
    ended = 0
    size, most = AHEAD
    while clock.left > LEAST and (some := list(islice(left, size))):
        size = min(3 * size, most)
        new = [p.point for p in some if p.point not in built]
        if new:
            built.compile(new, Clock(clock.left / 2), say)
        ended += measured(some, built, clock, options, keep)
    return len(pending) - ended


def _open(
    point: Point, known: dict[tuple[str, str, str], set[Unit]], kinds: forms.Kinds
) -> Open | None:
    """What is to be measured of a point; None where nothing is, or none of ours runs it."""
    ours = forms.forms(point.typed, point.type, kinds)
    every = points.units(point, ours) if ours else []
    todo = [unit for unit in every if unit not in known.get(point.key, ())]
    return Open(point, todo) if todo else None


def measured(some: list[Open], built: Built, clock: Clock, options: Options, keep: Keep) -> int:
    """Measure these, one after another; how many ended."""
    queue = iter(some)
    again: list[Open] = []
    current: Open | None = None
    ended = 0

    def following() -> Task | None:
        nonlocal current, ended
        while True:
            if again:
                current = again.pop()
            elif clock.left < LEAST:
                return None
            else:
                current = next(queue, None)
            if current is None:
                return None
            for unit in list(current.todo):
                if reason := _left_out(current.point, unit, built.suspects):
                    _row(current, unit, {"error": reason}, keep)
            if current.todo:
                return current.task(options, current.point in built)
            ended += 1  # nothing of it is tried

    for event in crew(
        following, measure, clock, silence=2 * options.silence, limit=MOST, log=options.log
    ):
        assert current is not None
        if event.kind == "told":
            _told(current, event.message, built.suspects, keep)
            continue
        _settled(current, event, built.suspects, keep)
        if current.todo and event.kind != "stopped":
            again.append(current)
            continue
        for unit, fields in current.provisional.items():
            if unit in current.todo:
                _row(current, unit, fields, keep)
        ended += event.kind != "stopped"
    return ended


def _left_out(point: Point, unit: Unit, suspects: Suspects) -> str:
    return points.left_out(point, unit) or (suspects.reason(point, unit.form) if unit.form else "")


def _told(current: Open, message: Any, suspects: Suspects, keep: Keep) -> None:
    what, unit, fields = message
    if what == "provisional":
        current.provisional[unit] = fields
    elif what == "numbers":
        current.notes[unit.form] = fields["error"]
    else:
        _row(current, unit, fields, keep)
        error = fields.get("error", "")
        if unit.form and error and not error.startswith("left out"):
            suspects.blame(current.point, unit.form, error)


def _row(current: Open, unit: Unit, fields: dict[str, Any], keep: Keep) -> None:
    if unit not in current.todo:
        return
    current.todo.remove(unit)
    if "error" not in fields and unit.form in current.notes:
        fields = fields | {"error": current.notes[unit.form]}
    keep(current.point, unit, fields)


def _settled(current: Open, event: Event, suspects: Suspects, keep: Keep) -> None:
    """Rows for what ended a child. Each attempt leaves fewer units, so that a point ends."""
    if event.kind in ("lost", "failed"):
        reason = f"{event.text} ({event.doing or 'at its start'})"
        blamed = current.blamed(event.doing)
        for form in {unit.form for unit in blamed if unit.form}:
            suspects.blame(current.point, form, reason)
        for unit in blamed:
            _row(current, unit, {"error": reason}, keep)
    elif event.kind == "done" and len(current.todo) == current.before:
        for unit in list(current.todo):
            _row(current, unit, {"error": "its process left without a word"}, keep)


def now() -> str:
    return time.strftime("%Y-%m-%d %H:%M")
