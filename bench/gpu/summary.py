"""The page at the end, in Markdown: what is printed last, and what a job's page shows."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastseq.backends.cuda_kernels import H100, Device

from . import forms
from .points import CTA, FIRST_TYPES, HOWS, TEAMS, contender, is_fault, is_persistent
from .results import Results

#: What is printed fits where only the end of an output is kept.
MOST_ROWS, MOST_FAILURES, MOST_LETTERS = 60, 15, 11_000
WAYS = ("forward", "backward")
WINDOW = ("outside", "inside")
PLANNED = "as planned"


@dataclass
class Stage:
    """What became of one. passed: None where it says nothing either way."""

    name: str
    seconds: float
    passed: bool | None
    text: str


@dataclass
class Run:
    """All that the page speaks of. device: what cuda plans for."""

    results: Results
    about: dict[str, str]
    device: Device | None = None
    stages: list[Stage] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(stage.passed is not False for stage in self.stages)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(header)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def page(run: Run) -> str:
    """The whole of it."""
    columns = run.results.columns
    parts = [f"# fastseq on {columns['device']}", _versions(columns)]
    stages = [
        (s.name, f"{s.seconds:.0f}", {True: "passed", False: "FAILED", None: "-"}[s.passed], s.text)
        for s in run.stages
    ]
    parts.append(table(("stage", "s", "", "what"), stages))
    if run.failures:
        shown = run.failures[:MOST_FAILURES]
        more = len(run.failures) - len(shown)
        lines = [f"- {_cell(text)[:200]}" for text in shown]
        parts.append("## Failures\n\n" + "\n".join(lines + [f"- and {more} more"] * (more > 0)))
    teams = of_teams(run.results.rows, run.results, run.device or H100)
    if teams:
        parts.append("## cuda beside cuDNN, by teams\n\n" + teams)
    cta = of_cta(run.results.rows, run.results)
    if cta:
        parts.append("## cuda beside cuDNN, where one CTA holds a layer\n\n" + cta)
    speeds = speed_ups(run.results.rows, run.results)
    if speeds:
        parts.append("## Speed beside cuDNN\n\n" + speeds)
    parts += [text for text in (_forms(run.results), _meetings(run.results.smoke)) if text]
    smoke = speed_ups(run.results.smoke, run.results)
    if smoke:
        parts.append("## Smoke: beside cuDNN\n\n" + smoke)
    return "\n\n".join(parts) + "\n"


def printed(run: Run) -> str:
    """As much of the page as is kept of an output: what says most stands first."""
    text = page(run)
    if len(text) <= MOST_LETTERS:
        return text
    cut = text[: MOST_LETTERS - 100].rpartition("\n")[0]
    return f"{cut}\n\n(cut here: summary.md has all of it)\n"


def _versions(columns: dict[str, str]) -> str:
    named = ("torch", "triton", "cudnn", "fastseq", "commit")
    text = ", ".join(f"{name} {columns[name]}" for name in named)
    return f"Compute capability {columns['capability']}, {text}."


def _forms(results: Results) -> str:
    """Whose tests are green, by form, cell and type."""
    found = results.verdicts()
    cells = sorted({launch.split(" / ")[0] for launch in found})
    if not found:
        return ""
    names = (*FIRST_TYPES, "float32", "float64")
    rows = []
    for cell in cells:
        for form in forms.FORMS:
            states = []
            for name in names:
                both = [found.get(f"{cell} / {way} / {form} / {name}") for way in WAYS]
                states.append("RED" if "no" in both else "green" if "yes" in both else "")
            if any(states):
                rows.append((cell, f"{contender(form)} {form}", *states))
    return "## Tests, by what they launched\n\n" + table(("cell", "form", *names), rows)


def _meetings(rows: list[dict[str, Any]]) -> str:
    found = [r for r in rows if r["name"].startswith("barrier-")]
    if not found:
        return ""
    cells = [(r["H"], f"{float(r['ms']) * 1e3:.2f}" if r["ms"] else r["error"]) for r in found]
    return "## A meeting of a grid's programs\n\n" + table(("programs", "us"), cells)


def speed_ups(rows: list[dict[str, Any]], results: Results) -> str:
    """cuDNN's time over ours, by point and form; none where the form's tests are not green."""
    verdicts = results.verdicts()
    times: dict[tuple[str, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        if not row["name"].startswith("barrier-"):
            key = (row["name"], row["shape"], row["type"], row["way"])
            who = f"{row['contender']} {row['form']}".strip()
            times.setdefault(key, {})[who, row["how"]] = row
    lines = []
    for key, found in times.items():
        named = dict.fromkeys(who for who, _ in found if who != "cudnn")
        for who in named or [""]:
            cells = [key[0], key[2], key[3], who]
            for how in ("graph", "calls"):
                theirs, ours = found.get(("cudnn", how)), found.get((who, how))
                cells += [_ms(theirs), _ms(ours), _times(theirs, ours, verdicts)]
            lines.append(cells)
    if not lines:
        return ""
    header = ["", "type", "way", "ours", "graph: cuDNN ms", "ours ms", "times"]
    header += ["calls: cuDNN ms", "ours ms", "times"]
    more = len(lines) - MOST_ROWS
    end = f"\n\n{more} more rows are in the CSV." if more > 0 else ""
    return table(header, lines[:MOST_ROWS]) + end


def of_cta(rows: list[dict[str, Any]], results: Results) -> str:
    """cuDNN's time over cuda's at the points of cuda's target: the geometric mean and the least, in
    and out of cuDNN's persistent window; and the least time of a step of one sequence, H = 128."""
    ours = [row for row in rows if row["name"].startswith("cta-") and row["form"] == CTA]
    ratios, unseen = _ratios(rows, ours, results.verdicts())
    parts = [table(HEADER, lines)] if (lines := list(_means(ratios))) else []
    if steps := _steps(ours):
        parts.append("Least time of a step, B = 1, H = 128, forward in a graph: " + steps)
    return "\n\n".join(parts + _unseen(unseen))


def of_teams(rows: list[dict[str, Any]], results: Results, device: Device) -> str:
    """The same of the points that teams hold: in the form that is planned, then in each; and what a
    step takes at two sizes."""
    ours = [row for row in rows if row["name"].startswith("team-") and row["form"] in TEAMS]
    planned = [row for row in ours if row["form"] == forms.planned(row, device)]
    verdicts = results.verdicts()
    parts: list[str] = []
    lines: list[tuple[str, ...]] = []
    for name in (PLANNED, *TEAMS):
        some = planned if name == PLANNED else [row for row in ours if row["form"] == name]
        ratios, _ = _ratios(rows, some, verdicts)
        lines += [(name, *line) for line in _means(ratios)]
    if lines:
        parts.append(table(("form", *HEADER), lines))
    for H, B in ((768, 16), (256, 1)):
        if steps := _steps_of_teams(ours, H, B):
            parts.append(f"us a step, T = 1024, B = {B}, H = {H}, in a graph: {steps}")
    _, unseen = _ratios(rows, ours, verdicts)
    return "\n\n".join(parts + _unseen(unseen))


HEADER = ("way", "how", "cuDNN's window", "geometric mean", "least", "at", "1x or more")
#: (way, how, whether inside of cuDNN's window) -> ratios, and of which point.
Ratios = dict[tuple[str, ...], list[tuple[float, str]]]


def _ratios(
    rows: list[dict[str, Any]], ours: list[dict[str, Any]], verdicts: dict[str, str]
) -> tuple[Ratios, int]:
    """cuDNN's time over ours, and how many do not count."""
    keys = ("name", "type", "way", "how")
    theirs = {tuple(r[k] for k in keys): r for r in rows if r["contender"] == "cudnn" and r["ms"]}
    found: Ratios = {}
    unseen = 0
    for row in ours:
        other = theirs.get(tuple(row[k] for k in keys))
        if other is None or not row["ms"]:
            continue
        if row["error"] or Results.tested(row, verdicts) != "yes":
            unseen += 1
            continue
        window = "inside" if is_persistent(row) else "outside"
        point = f"{row['name'].partition('-')[2]} {row['type']}"
        key = (row["way"], row["how"], window)
        found.setdefault(key, []).append((float(other["ms"]) / float(row["ms"]), point))
    return found, unseen


def _means(found: Ratios) -> Iterator[tuple[str, ...]]:
    for way, how, window in itertools.product(("forward", "training"), HOWS, WINDOW):
        if ratios := found.get((way, how, window)):
            mean = math.exp(statistics.fmean(math.log(ratio) for ratio, _ in ratios))
            ahead = sum(ratio >= 1 for ratio, _ in ratios)
            worst, where = min(ratios)
            count = f"{ahead} of {len(ratios)}"
            yield way, how, window, f"{mean:.2f}x", f"{worst:.2f}x", where, count


def _unseen(count: int) -> list[str]:
    if not count:
        return []
    return [f"{count} times are not counted: their tests are not green, or did not run."]


def _steps_of_teams(ours: list[dict[str, Any]], H: int, B: int) -> str:
    """Forward and training, by cell, type and form."""
    found: dict[str, dict[str, str]] = {}
    for row in ours:
        sizes = tuple(row[name] for name in ("T", "B", "H", "layers", "directions"))
        if sizes == ("1024", str(B), str(H), "1", "1") and row["how"] == "graph" and row["ms"]:
            if not row["error"]:
                us = float(row["ms"]) * 1e3 / 1024
                found.setdefault(f"{row['cell']} {row['type']} {row['form']}", {})[row["way"]] = (
                    f"{us:.2f}"
                )
    return "; ".join(
        f"{key} {', '.join(f'{way} {us}' for way, us in ways.items())}"
        for key, ways in found.items()
    )


def _steps(ours: list[dict[str, Any]]) -> str:
    """By cell and type."""
    least: dict[str, tuple[float, str]] = {}
    for row in ours:
        told = row["way"], row["how"], row["B"], row["H"], row["error"]
        if row["ms"] and told == ("forward", "graph", "1", "128", ""):
            us = float(row["ms"]) * 1e3 / int(row["T"])
            key = f"{row['cell']} {row['type']}"
            least[key] = min(least.get(key, (math.inf, "")), (us, f"T = {row['T']}"))
    return "; ".join(f"{key} {us:.3f} us ({where})" for key, (us, where) in least.items())


def _ms(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["ms"]:
        return "left out" if row["error"].startswith("left out") else "error"
    return f"{float(row['ms']):.3g}"


def _times(
    theirs: dict[str, Any] | None, ours: dict[str, Any] | None, verdicts: dict[str, str]
) -> str:
    """How many times faster; the reason where that is not said."""
    if not theirs or not ours or not theirs["ms"] or not ours["ms"]:
        return ""
    if ours["error"]:
        return "numbers off"
    tested = Results.tested(ours, verdicts)
    if tested != "yes":
        return "tests red" if tested == "no" else "not tested"
    return f"{float(theirs['ms']) / float(ours['ms']):.2f}x"


def faults(rows: list[dict[str, Any]]) -> list[str]:
    """What went wrong in measuring, a line for each point, form and reason."""
    found: dict[tuple[str, ...], list[str]] = {}
    for row in filter(is_fault, rows):
        key = (row["name"], row["type"], row["way"], row["form"], row["error"])
        found.setdefault(key, []).append(row["how"])
    return [f"{' '.join(k[:4])} {' and '.join(hows)}: {k[4]}" for k, hows in found.items()]
