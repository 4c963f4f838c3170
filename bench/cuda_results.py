"""What ``make gpu`` measured: bench/results/<device>/gpu.csv, read into points.

A row is one time of one contender, or why there is none. A point is what the rows of one workload,
type and way on one device say together: cuDNN beside one of ours, in plain calls and in graphs.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import fsum, inf, isfinite, log
from pathlib import Path

from fastseq.backends.cuda_kernels import A100, H100
from fastseq.backends.cuda_rule import team_size_of
from fastseq.backends.cuda_teams import declined

from .gpu.points import CLUSTER, CTA, GRID
from .gpu.points import FIELDS as COLUMNS
from .workloads import TEXTS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

_ALLOWED = {
    "cell": ("lstm", "gru", "rnn"),
    "type": ("tf32", "float32", "float16", "bfloat16"),
    "way": ("forward", "training"),
    "contender": ("cudnn", "triton", "cuda"),
    "how": ("graph", "calls"),
    "tested": ("yes", "no", ""),
}
Key = tuple[str | int, ...]
_YES, _NO = ("yes", "true", "1"), ("no", "false", "0", "")
#: Of each backend of ours; those that it takes when nobody asks for another come first
#: (triton_tiling.tiling). Of cuda's teams a measurement says which (:func:`regimes`).
FORMS = {"triton": ("walk", "grid-resident", "grid", "step"), "cuda": (CTA, CLUSTER, GRID)}
#: The regimes of cuda's teams, as its planner names them.
TEAMS = {CLUSTER: "cluster", GRID: "grid"}
#: (cell, type, way) -> cuda_rule.team_size_of -> a regime.
Regimes = dict[tuple[str, str, str], dict[str, str]]


@dataclass(frozen=True)
class Row:
    """ms is None where ``error`` says why. B: sequences; I, H: sizes; T: steps.

    projected and mode ('layer', 'streaming' or 'cell') stand in the words of ``shape``.
    """

    name: str
    shape: str
    cell: str
    T: int
    B: int
    I: int  # noqa: E741  (the field's letter)
    H: int
    layers: int
    directions: int
    ragged: bool
    type: str
    way: str
    contender: str
    form: str
    how: str
    ms: float | None
    tested: str
    error: str
    device: str
    capability: str
    torch: str
    triton: str
    cudnn: str
    commit: str
    date: str

    @property
    def projected(self) -> bool:
        return re.search(r"\bP\d+\b", self.shape) is not None

    @property
    def failed(self) -> bool:
        """Whether there is an error that is not a choice of make gpu's, which says 'left out'."""
        return bool(self.error) and not self.error.startswith("left out")

    @property
    def mode(self) -> str:
        words = self.shape.split()
        return next((mode for mode in ("streaming", "cell") if mode in words), "layer")


def committed(folder: Path = RESULTS) -> list[Path]:
    """The results of every device that there are some of."""
    return sorted(folder.glob("*/gpu.csv"))


def read(path: Path) -> list[Row]:
    """The rows of a file, in its order.

    Raises ValueError, in words that name the file and the line, where it is not what make gpu
    writes.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error.reason})") from error
    if not text.strip():
        raise ValueError(f"{path}: empty; expected at least a line of column names")
    table = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(table)
        missing = [name for name in COLUMNS if name not in header]
        if missing:
            raise ValueError(f"{path}: no column {', '.join(missing)}; found {', '.join(header)}")
        rows = []
        for values in table:
            place = f"{path}, line {table.line_num}"
            if len(values) != len(header):
                count = f"{len(values)} values for {len(header)} columns"
                raise ValueError(f"{place}: {count}; was it cut off there?")
            rows.append(_row(dict(zip(header, values, strict=True)), place))
    except csv.Error as error:
        raise ValueError(f"{path}, line {table.line_num}: {error}") from error
    return rows


def _row(values: dict[str, str], place: str) -> Row:
    for name, allowed in _ALLOWED.items():
        if values[name] not in allowed:
            found = f"{place}: {name}: expected one of {', '.join(allowed)}, got {values[name]!r}"
            raise ValueError(found)
    forms = FORMS.get(values["contender"])
    if forms is not None and values["form"] not in forms:
        raise ValueError(
            f"{place}: form: expected one of {', '.join(forms)}, got {values['form']!r}"
        )
    if values["ragged"].lower() not in _YES + _NO:
        raise ValueError(f"{place}: ragged: expected yes or no, got {values['ragged']!r}")
    if not re.fullmatch(r"\d+\.\d+", values["capability"]):
        raise ValueError(
            f"{place}: capability: expected a number such as 9.0, got {values['capability']!r}"
        )
    sizes = {
        name: _whole(values[name], name, place) for name in "T B I H layers directions".split()
    }
    ms = None
    if not values["error"]:
        ms = _time(values["ms"], place)
    texts = "name shape cell type way contender form how tested error device capability".split()
    texts += ["torch", "triton", "cudnn", "commit", "date"]
    ragged = values["ragged"].lower() in _YES
    return Row(**{name: values[name] for name in texts}, **sizes, ragged=ragged, ms=ms)  # type: ignore[arg-type]


def _whole(text: str, name: str, place: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise ValueError(f"{place}: {name}: expected a whole number from 1 on, got {text!r}")
    return int(text)


def _time(text: str, place: str) -> float:
    try:
        ms = float(text)
    except ValueError:
        ms = 0.0
    if not isfinite(ms) or ms <= 0:
        raise ValueError(f"{place}: ms: expected a time, or a reason under error, got {text!r}")
    return ms


@dataclass(frozen=True)
class Point:
    """cuDNN beside one of ours, in the form that runs where nobody asks for another.

    how -> the row of each; green: whether the tests of that form were.
    """

    cudnn: dict[str, Row]
    ours: dict[str, Row]
    green: bool

    @property
    def row(self) -> Row:
        """The workload and where it ran; the contender's columns are ours."""
        return next(iter(self.ours.values()))

    @property
    def T(self) -> int:
        """Steps of one call."""
        return self.row.T if self.row.mode == "layer" else 1

    def is_complete(self) -> bool:
        """Whether each side has a time or an error, in both ways to call that the rule asks for."""
        hows = ("calls",) if self.row.ragged else ("calls", "graph")
        return all(how in rows for rows in (self.cudnn, self.ours) for how in hows)

    def ratio(self, how: str) -> float | None:
        """cuDNN's time over ours: inf where cuDNN alone has an error, 0 where ours alone has, None
        where neither has a time, or one was not measured."""
        if how not in self.cudnn or how not in self.ours:
            return None
        theirs, ours = self.cudnn[how].ms, self.ours[how].ms
        if ours is None:
            return None if theirs is None else 0.0
        return inf if theirs is None else theirs / ours


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that measured the same, the last one."""
    found: dict[Key, Row] = {}
    for row in rows:
        key = (*_workload(row), row.contender, row.form, row.how)
        found[key] = row
    return list(found.values())


def _workload(row: Row) -> Key:
    sizes = row.T, row.B, row.I, row.H, row.layers, row.directions, row.ragged
    return row.device, row.capability, row.name, row.shape, row.cell, *sizes, row.type, row.way


def regimes(rows: Iterable[Row]) -> Regimes:
    """Which regime of cuda's teams is the faster in each class, of the devices of one compute
    capability: by the geometric mean over the points that have both, in graphs where there are any.
    One that failed, or whose tests were not green, counts where both did; one that alone was
    measured is taken."""
    rows = list(rows)
    tested, bad = Tested(rows), set()
    times: dict[tuple[tuple[str, str, str], str], dict[Key, dict[str, float | None]]] = {}
    for row in latest(rows):
        if row.form in TEAMS and row.mode == "layer":
            cell = TEXTS.get(row.cell, row.cell)
            key = (cell, row.type, row.way), team_size_of(row.H, row.B, row.directions)
            if row.failed or not tested.is_green(row):
                bad.add((key, row.form))
            times.setdefault(key, {}).setdefault((*_workload(row), row.how), {})[row.form] = row.ms
    found: Regimes = {}
    for key, measured in sorted(times.items()):
        every = [form for form in TEAMS if any(form in some for some in measured.values())]
        able = [form for form in every if (key, form) not in bad] or every
        by_how = {
            how: [
                log(some[CLUSTER] / some[GRID])  # type: ignore[operator]
                for at, some in measured.items()
                if at[-1] == how and some.get(CLUSTER) and some.get(GRID)
            ]
            for how in ("graph", "calls")
        }
        ratios = by_how["graph"] or by_how["calls"]
        faster = GRID if fsum(ratios) > 0 else CLUSTER
        found.setdefault(key[0], {})[key[1]] = TEAMS[faster if faster in able else able[0]]
    return found


def _form(contender: str, forms: dict[str, dict[str, Row]], chosen: Regimes) -> str | None:
    """Which of a point's forms runs where nobody asks for one; None where it was not measured."""
    first = min(forms, key=FORMS[contender].index)
    if first not in TEAMS:
        return first
    row = next(iter(forms[first].values()))
    cell = TEXTS.get(row.cell, row.cell)
    size = team_size_of(row.H, row.B, row.directions)
    regime = chosen.get((cell, row.type, row.way), {}).get(size)
    form = next((form for form, of in TEAMS.items() if of == regime), first)
    if form in forms:
        return form
    device = A100 if row.capability.startswith("8.") else H100
    held = declined(cell, row.type, TEAMS[form], row.H, device) is None  # type: ignore[arg-type]
    return None if held else first


def points(rows: Iterable[Row], contender: str, chosen: Regimes | None = None) -> list[Point]:
    """One for each workload, type, way and device that a contender of ours has rows of.

    chosen: of cuda's teams, as :func:`regimes`; None: of these rows.
    """
    rows = list(rows)
    tested = Tested(rows)
    chosen = regimes(rows) if chosen is None else chosen
    cudnn: dict[Key, dict[str, Row]] = {}
    ours: dict[Key, dict[str, dict[str, Row]]] = {}
    for row in latest(rows):
        if row.contender == "cudnn":
            cudnn.setdefault(_workload(row), {})[row.how] = row
        elif row.contender == contender:
            ours.setdefault(_workload(row), {}).setdefault(row.form, {})[row.how] = row
    found = []
    for workload, forms in ours.items():
        form = _form(contender, forms, chosen)
        if form is not None:
            green = all(map(tested.is_green, forms[form].values()))
            found.append(Point(cudnn.get(workload, {}), forms[form], green))
    return found


class Tested:
    """Which forms of the kernels passed their tests.

    Tests are of a form, cell, type and way, and not of a point: a row that was measured before they
    ran takes the word of one that was measured after, of the same commit on the same device.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self._words: dict[tuple[str, ...], set[str]] = {}
        for row in rows:
            if row.contender in FORMS:
                self._words.setdefault(self._key(row), set()).add(row.tested)

    @staticmethod
    def _key(row: Row) -> tuple[str, ...]:
        return row.device, row.commit, row.cell, row.type, row.way, row.form

    def is_green(self, row: Row) -> bool:
        words = self._words[self._key(row)]
        return "yes" in words and "no" not in words


@dataclass(frozen=True)
class Device:
    """All that is known of one device: its rows, oldest first, and the files that hold them."""

    name: str
    capability: str
    rows: list[Row]
    files: str

    @property
    def versions(self) -> str:
        names = {"torch": "torch", "Triton": "triton", "cuDNN": "cudnn"}
        return ", ".join(
            f"{label} {listed(getattr(row, name) for row in self.rows)}"
            for label, name in names.items()
        )

    @property
    def when(self) -> str:
        """'commit 1234567, 2026-11-20'; of several commits how many, and the last."""
        days = sorted({row.date[:10] for row in self.rows})
        span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        commits = list(dict.fromkeys(row.commit for row in self.rows))
        count = "commit" if len(commits) == 1 else f"{len(commits)} commits, the last"
        return f"{count} {commits[-1]}, {span}"


def devices(paths: Iterable[Path]) -> list[Device]:
    """The devices of these files, by compute capability and name."""
    rows: dict[tuple[str, str], list[Row]] = {}
    files: dict[tuple[str, str], list[Path]] = {}
    for path in paths:
        for row in read(path):
            rows.setdefault((row.capability, row.device), []).append(row)
            files.setdefault((row.capability, row.device), []).append(path)
    return [
        Device(
            name,
            capability,
            sorted(rows[capability, name], key=lambda row: row.date),
            listed(shown(path) for path in files[capability, name]),
        )
        for capability, name in sorted(rows)
    ]


def shown(path: Path) -> str:
    """A path as the project's files name it."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def listed(values: Iterable[str]) -> str:
    """Each value once, in order."""
    return ", ".join(dict.fromkeys(values))
