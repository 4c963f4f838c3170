"""What hung or failed so often that it is not tried again: time is short, and a hang takes much."""

from __future__ import annotations

from .points import Point

#: What a fault weighs, and from what weight on a suspect is left alone.
HANG, ERROR, ENOUGH = 2, 1, 4


class Suspects:
    """Cells in a form and a type, and what they did."""

    def __init__(self) -> None:
        self.weights: dict[tuple[str, str, str], int] = {}
        self.first: dict[tuple[str, str, str], str] = {}

    def blame(self, point: Point, form: str, error: str) -> None:
        key = (point.workload.cell, form, point.type)
        weight = HANG if error.startswith("hang") else ERROR
        self.weights[key] = self.weights.get(key, 0) + weight
        self.first.setdefault(key, f"{point.workload.name}: {error}")

    def reason(self, point: Point, form: str) -> str:
        """Why it is not tried; '' where it is."""
        key = (point.workload.cell, form, point.type)
        if self.weights.get(key, 0) < ENOUGH:
            return ""
        return f"left out: {' '.join(key)} failed too often, first at {self.first[key]}"
