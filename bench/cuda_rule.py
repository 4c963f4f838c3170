"""From a GPU's results to the choice of a backend there: ``python -m bench.rule --gpu [CSV ...]``.

Reads bench/results/<device>/gpu.csv of every device (or the files that are named) and writes what
follows from them: the measurements in fastseq/backends/measured_cuda.py, by which
``fastseq.backends.cuda_rule`` chooses between cuda, triton and torch; the GPU's section of
docs/performance.md; and a picture of each device. ``--check`` writes nothing, and fails where a
file is not what it would write.

Devices of one compute capability are one rule: a class counts for a backend of ours only where none
of those that measured it says otherwise.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from math import floor, isinf
from pathlib import Path

from fastseq.backends import measured_cuda
from fastseq.backends.cuda_rule import Entry, kind_of, size_of, width_of

from . import table
from .cuda_results import (
    FORMS,
    ROOT,
    Device,
    Point,
    Regimes,
    Tested,
    committed,
    devices,
    latest,
    points,
    regimes,
    shown,
)
from .workloads import TEXTS

RULE = Path(measured_cuda.__file__)
DOCS = ROOT / "docs"

#: (cell, type, way) -> kind -> size
Classes = dict[tuple[str, str, str], dict[str, dict[str, Entry]]]

_TEXT = '''\
"""Ours beside cuDNN on a GPU. ``python -m bench.rule --gpu`` writes this file; edit nothing here.

It was written from {origin}. :mod:`.cuda_rule` reads it.
"""

{imports}#: kind -> size -> a cuda_rule.Entry
Kinds = dict[str, dict[str, tuple[float, float | None, int, bool]]]

#: compute capability -> device -> (results, versions, commits and dates)
SOURCES: dict[str, dict[str, tuple[str, str, str]]] = {sources}

#: Of triton: compute capability -> device -> (cell, type, way)
MEASURED: dict[str, dict[str, dict[tuple[str, str, str], Kinds]]] = {triton}

#: Of triton: compute capability -> (cell, type) -> the widths at which every form passed its tests
GREEN: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {triton_green}

#: The same of cuda.
MEASURED_CUDA: dict[str, dict[str, dict[tuple[str, str, str], Kinds]]] = {cuda}
GREEN_CUDA: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {cuda_green}

#: Of cuda's teams: compute capability -> (cell, type, way) -> cuda_rule.team_size_of -> the regime
#: that was measured to be faster there.
MEASURED_REGIMES: dict[str, dict[tuple[str, str, str], dict[str, str]]] = {regimes}
'''


def classes(device: Device, contender: str, chosen: Regimes | None = None) -> Classes:
    """What the points of each class show at the least. chosen: of cuda's teams.

    A point that lacks a row is not measured yet. One at which neither side has a time says nothing
    about speed, and no rule chooses for a cell: its step is torch's own function. Graphs of ragged
    sequences count for nothing: torch runs what is recorded of those.
    """
    measured: Classes = {}
    for point in points(device.rows, contender, chosen):
        row, calls = point.row, point.ratio("calls")
        if row.mode == "cell" or not point.is_complete() or calls is None:
            continue
        graph = None if row.ragged else point.ratio("graph")
        entry = Entry(_down(calls), None if graph is None else _down(graph), point.T, point.green)
        kind = kind_of(row.layers * row.directions, row.ragged, row.projected)
        size = size_of(row.H, row.B, point.T)
        kinds = measured.setdefault((_cell(row.cell), row.type, row.way), {})
        sizes = kinds.setdefault(kind, {})
        sizes[size] = _least(sizes[size], entry) if size in sizes else entry
    return {
        key: {
            kind: {size: sizes[size] for size in sorted(sizes, key=_place)}
            for kind, sizes in sorted(kinds.items())
        }
        for key, kinds in sorted(measured.items())
    }


def _cell(name: str) -> str:
    """As fastseq.cells names it."""
    return TEXTS.get(name, name)


def _down(ratio: float) -> float:
    """Rounded down, so that what is not ahead does not become so."""
    return ratio if isinf(ratio) else floor(ratio * 1000 + 1e-6) / 1000


def _least(a: Entry, b: Entry) -> Entry:
    graphs = [entry.graph for entry in (a, b) if entry.graph is not None]
    graph = min(graphs, default=None)
    return Entry(min(a.calls, b.calls), graph, min(a.T, b.T), a.green and b.green)


def _place(size: str) -> tuple[list[int], str]:
    """Sizes in the order of their numbers."""
    return [int(digits) for digits in re.findall(r"\d+", size)], size


def green(given: Sequence[Device], contender: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The widths that ran of each cell and type, where all of its forms passed their tests and no
    point failed: of cuda, whose forms are kernels apart, all of those that ran at that width."""
    widths: dict[tuple[str, str], dict[int, set[str]]] = {}
    red: dict[tuple[str, str], set[str]] = {}
    for device in given:
        tested = Tested(device.rows)
        for row in latest(device.rows):
            if row.contender == contender:
                key, form = (_cell(row.cell), row.type), row.form if contender == "cuda" else ""
                widths.setdefault(key, {}).setdefault(row.H, set()).add(form)
                if row.failed or not tested.is_green(row):
                    red.setdefault(key, set()).add(form)
    found = {}
    for key, sizes in sorted(widths.items()):
        ran: dict[str, set[str]] = {}
        for H in sorted(sizes):
            ran.setdefault(width_of(H), set()).update(sizes[H])
        green = tuple(name for name, of in ran.items() if not of & red.get(key, set()))
        if green:
            found[key] = green
    return found


def by_capability(given: Iterable[Device]) -> dict[str, list[Device]]:
    found: dict[str, list[Device]] = {}
    for device in given:
        found.setdefault(device.capability, []).append(device)
    return found


def text(given: Sequence[Device]) -> str:
    """fastseq/backends/measured_cuda.py, as it follows from these devices' results."""
    groups = by_capability(given)
    tables = {}
    for name in FORMS:
        tables[name] = _literal(
            {
                number: {d.name: classes(d, name, _chosen(some)) for d in some}
                for number, some in groups.items()
            }
        )
        greens = {number: green(some, name) for number, some in groups.items()}
        tables[f"{name}_green"] = _literal(greens)
    chosen = {number: _chosen(some) for number, some in groups.items()}
    tables["regimes"] = _literal({number: found for number, found in chosen.items() if found})
    return _TEXT.format(
        origin="what SOURCES names" if given else "no results: none are under bench/results",
        imports="from math import inf\n\n" if "inf" in "".join(tables.values()) else "",
        sources=_literal(
            {
                number: {d.name: (d.files, d.versions, d.when) for d in some}
                for number, some in groups.items()
            }
        ),
        **tables,
    )


def _chosen(some: Iterable[Device]) -> Regimes:
    """Of cuda's teams, by all devices of one compute capability."""
    return regimes(row for device in some for row in device.rows)


def _literal(value: object, indent: str = "") -> str:
    """Python source in the form that ruff leaves as it is: a line for each item, but for keys and
    entries."""
    deeper = indent + "    "
    if isinstance(value, dict) and value:
        items = [f"{_literal(key)}: {_literal(item, deeper)}" for key, item in value.items()]
        return "{\n" + "".join(f"{deeper}{item},\n" for item in items) + indent + "}"
    if isinstance(value, tuple):
        if not indent or isinstance(value, Entry):
            return f"({', '.join(map(_literal, value))})"
        if len(value) == 1:  # a formatter keeps a comma to split at in longer ones alone
            return f"({_literal(value[0])},)"
        items = [_literal(item, deeper) for item in value]
        return "(\n" + "".join(f"{deeper}{item},\n" for item in items) + indent + ")"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def section(given: Sequence[Device]) -> str:
    """The GPU's part of docs/performance.md: what each device measured, and where ours run."""
    if not given:
        return "Not yet measured on a GPU: there are no results, and torch's own kernels run there."
    parts = []
    for device in given:
        parts += [
            f"### {device.name}",
            f"![Times faster than cuDNN, by workload]({picture(device).name})",
            *(table.gpu(some, name) for name, some in _measured(device, given).items()),
            f"Medians. Compute capability {device.capability}, {device.versions}, {device.when}. "
            f"From `{device.files}`.",
        ]
    for name in FORMS:
        if name == "triton" or any(name in _measured(device, given) for device in given):
            parts += [f"### Where {name} runs", *_where(given, name)]
    return "\n\n".join(parts)


def _measured(device: Device, given: Sequence[Device]) -> dict[str, list[Point]]:
    """The points of each backend of ours; triton's though there be none."""
    chosen = _chosen(d for d in given if d.capability == device.capability)
    found = {name: points(device.rows, name, chosen) for name in FORMS}
    return {name: some for name, some in found.items() if some or name == "triton"}


def _where(given: Sequence[Device], contender: str) -> Iterator[str]:
    others = "torch runs all others"
    if contender != "triton":
        others = "where triton is too, the one whose least ratio there is the greater runs"
    yield (
        f"Where no backend is named, {contender} runs the classes in which it is ahead on every "
        f"device of a compute capability that has measured them; {others}."
    )
    lines = []
    for number, some in by_capability(given).items():
        ahead: dict[tuple[str, str, str], dict[str, bool]] = {}
        for device in some:
            for key, kinds in classes(device, contender, _chosen(some)).items():
                names = ahead.setdefault(key, {})
                for kind, sizes in kinds.items():
                    for size, entry in sizes.items():
                        name = f"{kind} {size}"
                        names[name] = names.get(name, True) and entry.ahead
        for (cell, kind, way), names in sorted(ahead.items()):
            found = [name for name, is_ahead in names.items() if is_ahead]
            count = f"{len(found)} of {len(names)} classes"
            listed = f": {'; '.join(found)}" if found else ""
            lines.append(f"- {number}, {cell} in {kind}, {way}: {count}{listed}")
    yield "\n".join(lines)


def picture(device: Device) -> Path:
    name = re.sub(r"[^a-z0-9]+", "-", device.name.lower()).strip("-")
    return DOCS / f"speed-{name}.png"


def main(argv: list[str] | None = None) -> int:
    description = (__doc__ or "").split("\n\n", 1)[1]
    parser = argparse.ArgumentParser(prog="python -m bench.rule --gpu", description=description)
    parser.add_argument("files", nargs="*", type=Path, metavar="CSV", help="all, if left out")
    parser.add_argument("--check", action="store_true", help="write nothing, and compare")
    options = parser.parse_args(argv)
    page = DOCS / "performance.md"
    try:
        given = devices(options.files or committed())
        new = {
            RULE: text(given),
            page: table.inserted(page, f"\n{section(given)}\n", table.GPU_BEGIN, table.GPU_END),
        }
        stale = [shown(path) for path, wanted in new.items() if path.read_text() != wanted]
    except (OSError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    if options.check:
        if stale:
            files = ", ".join(device.files for device in given) or "no results"
            parser.exit(
                1, f"{parser.prog}: {', '.join(stale)}: not what {files} give; write it anew\n"
            )
        return 0
    for path, wanted in new.items():
        path.write_text(wanted)
        print(shown(path))
    if given:
        try:
            from . import plot  # here, since a rule needs no matplotlib
        except ImportError as error:
            parser.exit(1, f"{parser.prog}: no picture: {error}; pip install matplotlib\n")
        for device in given:
            caption = f"{device.name}, {device.versions}, {device.when}"
            plot.draw_gpu(_measured(device, given), picture(device), caption)
            print(shown(picture(device)))
    return 0
