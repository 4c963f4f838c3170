"""Tables of benchmark results, in Markdown: ``python -m bench.table [--write | --weak] [FILE]``.

Without FILE it takes the newest under bench/results. ``--write`` puts the short table between the
marks of README.md and the full one between those of docs/performance.md, and there, between marks
of their own, the newest comparison with other libraries for each count of threads. ``--weak`` names
the cases with few rounds, and what was measured with changes to its commit. The GPU's tables
are made here and written by ``python -m bench.rule --gpu``.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Container, Iterable
from math import isinf
from pathlib import Path
from statistics import geometric_mean
from typing import Any

from .cuda_results import Point
from .version import CHANGED
from .workloads import WORKLOADS

ROOT = Path(__file__).parent.parent
TORCH, OURS = "torch.nn", "fastseq"
#: What a factor is over the best of: torch.nn's forms of a call of one step.
TORCHS = (TORCH, "torch.nn cell", "torch.nn layer")
HANDLE = "fastseq.streaming"
ROUNDS, FEW = 8, "†"  # a figure of fewer rounds has a mark
BEGIN, END = "<!-- speed: begin (make table) -->", "<!-- speed: end -->"
PEERS_BEGIN, PEERS_END = "<!-- peers: begin (make table) -->", "<!-- peers: end -->"
GPU_BEGIN, GPU_END = "<!-- gpu: begin (python -m bench.rule --gpu) -->", "<!-- gpu: end -->"

# The rows of README.md: what people run, the shapes where torch.nn is hard to beat among them.
HEADLINES = (
    "char-rnn-h128-gru",
    "char-rnn-h512-lstm",
    "tagger-lstm",
    "ptb-medium",
    "rl-policy-b8",
    "forecaster-gru",
    "deepspeech2-gru",
    "speaker-encoder",
    "vad-streaming",
    "long-gru",
)

# The rows of a GPU's table: a published point, what people run, and small and long calls.
GPU_HEADLINES = (
    "flashrnn-point",
    "char-rnn-h512-lstm",
    "char-rnn-h512-gru",
    "small-b1-h128-lstm",
    "small-b1-h128-gru",
    "small-b1-h128-rnn",
    "speaker-encoder",
    "ptb-medium",
    "tagger-lstm",
    "rl-policy-b8",
    "deepspeech2-gru",
    "long-gru",
)

RESULTS = ROOT / "bench" / "results"
Results = dict[str, Any]


def newest(folder: Path = RESULTS) -> Path:
    """The newest results without peers: file names begin with the date."""
    found = [path for path in folder.glob("*/*.json") if not path.stem.endswith("-peers")]
    if not found:
        raise FileNotFoundError(f"no results under {folder}; make bench measures some")
    return max(found, key=lambda path: path.name)


def newest_with_peers(folder: Path = RESULTS) -> list[Path]:
    """The newest comparison with other libraries of each machine and count of threads."""
    found = {path.parent: path for path in sorted(folder.glob("*/*-peers.json"))}
    return list(found.values())


def read(path: Path) -> Results:
    results = json.loads(path.read_text())
    order = {workload.name: k for k, workload in enumerate(WORKLOADS)}
    results["benchmarks"].sort(key=lambda b: order.get(b["extra_info"]["workload"], len(order)))
    return results


def provenance(results: Results) -> str:
    """Machine, versions, commit, date and rounds."""
    machine, commit = results["machine_info"], results["commit_info"]
    name = commit["id"][:7] if commit["id"] not in ("unversioned", "unknown") else commit["id"]
    name = f"**commit {name} {CHANGED}**" if dirty(results) else f"commit {name}"
    threads = f"{machine['threads']} thread" + "s" * (machine["threads"] > 1)
    return (
        f"{machine['cpu_model']}, {machine['cores']} cores, {threads}, "
        f"{machine['instructions'].replace('AVX512', 'AVX-512')}, torch {machine['torch']}, Python "
        f"{machine['python_version']}, {name}, {results['datetime'][:10]}. {rounds(results)}"
    )


def dirty(results: Results) -> bool:
    """Whether the tree differed from the commit that the results name."""
    commit = results["commit_info"]
    return bool(commit.get("dirty")) or commit["id"].endswith("-dirty")


def few(info: dict[str, Any]) -> bool:
    return info["rounds"] < ROUNDS


def sign(info: dict[str, Any]) -> str:
    return f" {FEW}" if few(info) else ""


def rounds(results: Results) -> str:
    """One sentence: how many rounds the cases have, and what the mark says."""
    infos = [case["extra_info"] for case in results["benchmarks"]]
    counts = [info["rounds"] for info in infos]
    if not counts:
        return "No rounds."
    text = f"{min(counts)} to {max(counts)} rounds"
    some = sum(map(few, infos))
    return (
        f"{text}; {FEW} fewer than {ROUNDS}, {some} of {len(infos)} cases." if some else f"{text}."
    )


def milliseconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def speedup(info: dict[str, Any], label: str = OURS) -> float | None:
    """How many times faster than torch.nn, in the form that is its fastest."""
    times = info["median_ms"]
    return best_of_torch(info) / times[label] if label in times else None


def best_of_torch(info: dict[str, Any]) -> float:
    times = info["median_ms"]
    return min(times[label] for label in TORCHS if label in times)


def stepwise(info: dict[str, Any]) -> bool:
    """Whether a call is one step."""
    return not {"streaming", "cell"}.isdisjoint(info.get("shape", "").split())


def _times(factor: float | None) -> str:
    return "" if factor is None else f"{factor:.2g}x" if factor < 10 else f"{factor:.0f}x"


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A table whose columns are aligned to the eye as well."""
    rows = list(rows)
    widths = [max(len(row[k]) for row in [header, *rows]) for k in range(len(header))]
    widths = [max(3, width) for width in widths]

    def line(cells: list[str]) -> str:
        padded = [
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(
        "-" * (width + 2) if k == 0 else "-" * (width + 1) + ":" for k, width in enumerate(widths)
    )
    return "\n".join([line(header), rule + "|", *map(line, rows)])


def full(results: Results) -> str:
    """Every case and every contender, then what was skipped and why.

    Beside each time stand the factor over torch.nn and, where the results hold it, the fraction of
    the limit (bench/limit.py).
    """
    infos = [b["extra_info"] for b in results["benchmarks"]]
    peers = results.get("peers", {})
    limited = any("limit_ms" in info for info in infos)
    peak = results["machine_info"]["sgemm_gflops"]
    parts = []
    for title in ("forward", "training", "one step a call"):
        some = [i for i in infos if title == ("one step a call" if stepwise(i) else i["way"])]
        labels = columns((label for info in some for label in info["median_ms"]), peers)
        rows = []
        for info in some:
            times = info["median_ms"]
            row = [info["workload"] + sign(info), info["shape"]]
            # a backend that declined or was chosen has no time of its own
            row += [_cell(info, label) if label in times else "" for label in labels]
            row[2 + labels.index(OURS)] += f" {info['chosen']}"
            if limited:
                row.append(milliseconds(info.get("limit_ms")))
            else:
                row.append(f"{info['flops'] / times[OURS] / 1e6 / peak:.0%}")
            if title == "training":
                saved = info["saved_bytes"]
                row.append(f"{saved[OURS] / 2**20:.3g} / {saved[TORCH] / 2**20:.3g}")
            rows.append(row)
        if rows:
            header = [title, "shape"]
            header += [f"{label} ms" for label in labels]
            header.append("limit ms" if limited else "of sgemm")
            if title == "training":
                header.append("kept MiB / torch.nn")
            parts.append(markdown(header, rows))
    if results.get("wrong"):
        lines = [f"- {name}: {reason}" for name, reason in results["wrong"].items()]
        parts.append("No figure, because the numbers are wrong:\n\n" + "\n".join(lines))
    if results.get("skipped"):
        lines = [f"- {name}: {reason}" for name, reason in results["skipped"].items()]
        parts.append("Skipped:\n\n" + "\n".join(lines))
    if peers:
        lines = [f"- {name}: {version}" for name, version in peers.items()]
        parts.append("Peers:\n\n" + "\n".join(lines))
    return "\n\n".join(parts)


def columns(labels: Iterable[str], peers: Container[str] = ()) -> list[str]:
    """Each once: torch.nn's forms, ours, other backends, peers."""
    found = set(labels)
    first = [label for label in (*TORCHS, OURS, HANDLE) if label in found]
    return first + sorted(found - set(first), key=lambda label: (label in peers, label))


def fraction(info: dict[str, Any], label: str) -> float | None:
    """Of the limit: 1 is as fast as the machine allows."""
    limit = info.get("limit_ms")
    return None if limit is None else limit / info["median_ms"][label]


def _cell(info: dict[str, Any], label: str) -> str:
    notes = [] if label in TORCHS else [_times(speedup(info, label))]
    share = fraction(info, label)
    if share is not None:
        notes.append(f"{share:.0%}")
    text = milliseconds(info["median_ms"][label])
    return f"{text} ({', '.join(notes)})" if notes else text


def short(results: Results, names: Iterable[str] = HEADLINES) -> str:
    """One row a workload: torch.nn -> fastseq, forward and in training."""
    infos = [b["extra_info"] for b in results["benchmarks"]]
    cases = {(info["workload"], info["way"]): info for info in infos}
    rows = []
    for name in names:
        row = []
        for way in ("forward", "training"):
            info = cases.get((name, way))
            if info is None:
                row += ["", ""]
                continue
            times = info["median_ms"]
            theirs, ours = (milliseconds(t) for t in (best_of_torch(info), times[OURS]))
            row.append(f"{theirs} → {ours} ms{sign(info)}")
            row.append(f"**{_times(speedup(info))}**")
            shape = info["shape"]
        if any(row):
            rows.append([f"{name} ({shape})", *row])
    if not rows:
        return "None of the rows of this table is among these results."
    return markdown(
        ["workload", "forward, torch.nn → fastseq", "", "training, torch.nn → fastseq", ""], rows
    )


def gpu(points: Iterable[Point], contender: str) -> str:
    """The headlines of a device, cuDNN beside one of ours, and what all of its points say together.

    No ratio stands beside a form of the kernels whose tests were not green.
    """
    points = list(points)
    headlines = [point for point in points if point.row.name in GPU_HEADLINES]
    place = {name: k for k, name in enumerate(GPU_HEADLINES)}
    headlines.sort(key=lambda point: place[point.row.name])
    rows = [
        [
            f"{point.row.name} ({point.row.shape})",
            point.row.type,
            point.row.way,
            point.row.form,
            _gpu_time(point.cudnn),
            _gpu_time(point.ours),
            *(_gpu_ratio(point, how) for how in ("calls", "graph")),
        ]
        for point in headlines
    ]
    ours = f"{contender} ms"
    header = ["workload", "type", "way", "form", "cuDNN ms", ours, "faster", "in a graph"]
    parts = [markdown(header, rows)] if rows else ["None of the headlines is among the results."]
    if points:
        parts.append(_gpu_summary(points))
    errors = [
        f"- {point.row.name}, {row.type}, {row.way}, {row.contender}, {how}: {row.error}"
        for point in headlines
        for rows_of in (point.cudnn, point.ours)
        for how, row in rows_of.items()
        if row.error
    ]
    if errors:
        parts.append("No time:\n\n" + "\n".join(errors))
    return "\n\n".join(parts)


def _gpu_time(rows: dict[str, Any]) -> str:
    row = rows.get("calls")
    return "" if row is None else "error" if row.error else milliseconds(row.ms)


def _gpu_ratio(point: Point, how: str) -> str:
    if not point.green:
        return "not tested"
    ratio = point.ratio(how)
    return "" if ratio is None or ratio == 0 or isinf(ratio) else _times(ratio)


def _gpu_summary(points: list[Point]) -> str:
    """All workloads and points of the grid, by cell, type and way."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in points:
        if point.green:
            groups.setdefault((point.row.cell, point.row.type, point.row.way), []).append(point)
    rows = []
    for key, some in sorted(groups.items()):
        row = [*key]
        for how in ("calls", "graph"):
            found = [point.ratio(how) for point in some]
            ratios = [ratio for ratio in found if ratio and not isinf(ratio)]
            ahead = sum(ratio > 1 for ratio in ratios)
            row += [f"{ahead} of {len(ratios)}", _times(geometric_mean(ratios)) if ratios else ""]
        rows.append(row)
    if not rows:
        return "No form of the kernels was tested."
    header = ["all points", "type", "way", "faster in calls", "mean", "in a graph", "mean"]
    return markdown(header, rows)


def inserted(path: Path, text: str, begin: str = BEGIN, end: str = END) -> str:
    """A file with ``text`` between its marks."""
    page = path.read_text()
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise ValueError(f"{path}: expected one line {begin} and after it one line {end}")
    before, rest = page.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{text}\n{end}{after}"


def insert(path: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put ``text`` between the marks of a file."""
    path.write_text(inserted(path, text, begin, end))


def note(results: Results, path: Path) -> str:
    """How and where the figures were measured, and the file that holds them."""
    source = path.resolve()
    shown = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source.name
    how = "Medians of interleaved rounds, float32 where no other type is named."
    return f"{how} {provenance(results)} From `{shown}`."


def weak() -> str:
    """What of the committed results and pages is to be measured again, and how.

    A table is made of one file, so a file is measured as a whole.
    """
    lines = []
    for path in [newest(RESULTS), *newest_with_peers(RESULTS)]:
        results = read(path)
        infos = [case["extra_info"] for case in results["benchmarks"]]
        named = [f"  {i['rounds']} rounds: {i['workload']} {i['way']}" for i in infos if few(i)]
        if named or dirty(results):
            lines += [f"{path.name}{f', {CHANGED}' if dirty(results) else ''}", *named]
            peers = " PEERS=all" if path.stem.endswith("-peers") else ""
            lines.append(f"  make bench THREADS={results['machine_info']['threads']}{peers}")
    page = (ROOT / "docs" / "performance.md").read_text()
    block = r"<!-- (\w+): begin \(python -m bench\.\1 --write\) -->(.*?)<!-- \1: end -->"
    for name, text in re.findall(block, page, re.DOTALL):
        counts = [int(count) for count in re.findall(r"(\d+) (?:interleaved )?rounds", text)]
        said = [CHANGED] if CHANGED in text else []
        said += [f"{min(counts)} rounds"] if counts and min(counts) < ROUNDS else []
        if said and name != "aims":  # which is made of the files above
            lines += [f"docs/performance.md, {name}: {', '.join(said)}"]
            lines += [f"  python -m bench.{name} --write"]
    return "\n".join(lines) or "Nothing."


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="results; the newest if left out")
    parser.add_argument("--write", action="store_true", help="into README.md and the docs")
    parser.add_argument("--weak", action="store_true", help="what is to be measured again")
    options = parser.parse_args(argv)
    if options.weak:
        print(weak())
        return 0
    try:
        path = options.file or newest(RESULTS)
        results = read(path)
    except (OSError, KeyError, ValueError) as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    table = f"{full(results)}\n\n{note(results, path)}"
    if not options.write:
        print(table)
        return 0
    picture = "![Times faster than torch.nn, by workload](speed.png)"
    insert(ROOT / "README.md", f"\n{short(results)}\n\n{note(results, path)}\n")
    page = ROOT / "docs" / "performance.md"
    insert(page, f"\n{picture}\n\n{table}\n")
    others = [(read(found), found) for found in newest_with_peers(RESULTS)]
    if others:
        tables = (f"{full(results)}\n\n{note(results, found)}\n" for results, found in others)
        insert(page, "\n" + "\n".join(tables), PEERS_BEGIN, PEERS_END)
    return 0


if __name__ == "__main__":
    sys.exit(main())
