"""The files of a run, written as things become known; what was measured before is not again.

gpu.csv and smoke.csv have a row a time, tests.xml the tests, log.txt all that was said and what
children printed, summary.md the page at the end, sanitize.log the sanitizer's reports.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..version import same_code
from . import forms, junit
from .junit import Case
from .points import FIELDS, Point, Unit

ROOT = Path(__file__).parents[2]
#: Where a run's files are where nothing else is asked for; where something is, copies of what is
#: not to be measured again. git ignores it.
DEFAULT = ROOT / "out/gpu"
KEPT = ROOT / "bench/results"
KEYS = ("name", "type", "way", "contender", "form", "how")


def folder_of(device: str) -> str:
    """Under bench/results."""
    return "-".join(device.lower().split())


class Results:
    """The files of one run, of one device and one state of the code.

    columns: those that say of what; rows and tests of other code are left alone. keep: a second
    folder for what the next run needs. again: nothing that was measured before counts.
    """

    def __init__(
        self, folder: Path, columns: dict[str, str], keep: Path = DEFAULT, again: bool = False
    ) -> None:
        self.folder, self.columns = folder, columns
        self._same_code = cache(partial(same_code, now=columns["commit"]))
        self.folders = list(dict.fromkeys([folder, keep]))
        for each in self.folders:
            each.mkdir(parents=True, exist_ok=True)
        kept = KEPT / folder_of(columns["device"])
        sources = [*self.folders, kept] if not again else []
        self.rows: list[dict[str, Any]] = _merged(sources, "gpu.csv", self._same)
        self.smoke: list[dict[str, Any]] = []
        self.cases: dict[str, Case] = {}
        for source in reversed(sources):
            cases, properties = junit.read(source / "tests.xml")
            if self._same(properties):
                self.cases |= {case.nodeid: case for case in cases}
        self.carried = len(self.rows), len(self.cases)
        self.write_rows()
        self.write_tests()

    def _same(self, row: dict[str, Any]) -> bool:
        """Whether it is of this device and this code."""
        return row.get("device") == self.columns["device"] and self._same_code(
            row.get("commit") or ""
        )

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def measured(self) -> dict[tuple[str, str, str], set[Unit]]:
        """The units of each point that have a row."""
        found: dict[tuple[str, str, str], set[Unit]] = {}
        for row in self.rows:
            key = (row["name"], row["type"], row["way"])
            found.setdefault(key, set()).add(Unit(row["contender"], row["form"], row["how"]))
        return found

    def row(self, point: Point, unit: Unit, fields: dict[str, Any], date: str) -> dict[str, Any]:
        found = dict.fromkeys(FIELDS, "") | point.fields() | unit._asdict() | fields
        found |= self.columns | {"date": date}
        return {k: str(v) for k, v in found.items()}

    def add(self, row: dict[str, Any]) -> None:
        """To the files at once."""
        row["tested"] = self.tested(row, self.verdicts())
        self.rows.append(row)
        for folder in self.folders:
            _append(folder / "gpu.csv", [row])

    def add_smoke(self, row: dict[str, Any]) -> None:
        self.smoke.append(row)
        _append(self.folder / "smoke.csv", [row])

    def verdicts(self) -> dict[str, str]:
        return junit.verdicts(self.cases.values())

    @staticmethod
    def tested(row: dict[str, Any], verdicts: dict[str, str]) -> str:
        if row["contender"] == "cudnn":
            return ""
        return junit.tested(map(str, forms.needed(row)), verdicts)

    def set_cases(self, cases: Iterable[Case]) -> None:
        self.cases |= {case.nodeid: case for case in cases}
        self.write_tests()

    def write_tests(self) -> None:
        if self.cases:
            for folder in self.folders:
                junit.write(folder / "tests.xml", self.cases.values(), self.columns)

    def write_rows(self) -> None:
        """All rows anew: what their tests say may be known only now."""
        verdicts = self.verdicts()
        for row in (*self.rows, *self.smoke):
            row["tested"] = self.tested(row, verdicts)
        if self.smoke:
            _replace(self.folder / "smoke.csv", self.smoke)
        if not self.rows:
            return
        for folder in self.folders:
            # a folder may hold other devices and states of the code; they stay
            others = [r for r in _read(folder / "gpu.csv") if not self._same(r)]
            _replace(folder / "gpu.csv", [*others, *self.rows])

    def begin(self) -> None:
        """smoke.csv is a run's own."""
        (self.folder / "smoke.csv").unlink(missing_ok=True)

    def write_summary(self, text: str) -> None:
        (self.folder / "summary.md").write_text(text)


def _append(file: Path, rows: list[dict[str, Any]]) -> None:
    new = not file.exists() or file.stat().st_size == 0
    with file.open("a", newline="") as sink:
        table = csv.DictWriter(sink, FIELDS, restval="", extrasaction="ignore")
        if new:
            table.writeheader()
        table.writerows(rows)


def _replace(file: Path, rows: list[dict[str, Any]]) -> None:
    """Whole: one that is read meanwhile, or whose writer is killed, is the old or the new."""
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    _append(part, rows)
    os.replace(part, file)


def _read(file: Path) -> list[dict[str, Any]]:
    """Its whole rows; none where there is no such file, or one of other columns."""
    if not file.exists():
        return []
    with file.open(newline="") as given:
        rows = list(csv.DictReader(given))
    # of one whose writer was killed the last may be half
    return [
        {k: row[k] for k in FIELDS} for row in rows if all(row.get(k) is not None for k in FIELDS)
    ]


def _merged(sources: list[Path], name: str, wanted: Any) -> list[dict[str, Any]]:
    """The rows that are wanted, each once: the first source's of two of the same."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for source in sources:
        for row in filter(wanted, _read(source / name)):
            found.setdefault(tuple(row[k] for k in KEYS), row)
    return list(found.values())
