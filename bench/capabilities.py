"""What works, asked of torch.nn and of fastseq: ``python -m bench.capabilities [--write]``.

Every probe of :mod:`bench.probes` runs for each of its layers on both sides, each time in a process
of its own with a time limit, so that a crash is an answer. ``--write`` makes docs/capabilities.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from . import probes
from .probes import PROBES, Probe, Side

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "capabilities.md"
SIDES = ("torch.nn", "fastseq")
START_SECONDS = 120
START = "forkserver"  # children without a thread, and with torch imported
INTRODUCTION = """# What works

Each row is a question that a program put to torch.nn and to fastseq, layer by layer, each in a
process of its own; each cell is what it saw. Values and gradients were compared with a loop over
time in float64. `make capabilities` asks again and writes this page; the questions are in
[bench/probes.py](../bench/probes.py).

- **yes**: it works, and the numbers are right.
- **no**: the class of the error and its first words, or what is missing.
- **wrong**: no error, and wrong numbers.
- **slow**: right, in that many times the time of doing without.

Where torch.nn says a thing in other words (packing instead of `lengths=`), it was asked in those.
The rows with `allow_rnn` set `torch._dynamo.config.allow_rnn`, which lets Dynamo trace torch.nn's
layers. What fastseq lacks, and why: [limits.md](limits.md).
"""


def _answer(name: str, library: str, kinds: tuple[str, ...], connection: Any) -> None:
    """In the child. What torch prints while it fails is nobody's."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    connection.send("ready")
    for kind in kinds:
        connection.send(probes.answer(name, Side(library, kind)))


def ask(probe: Probe, library: str) -> dict[str, str]:
    """What each layer answers. A crash, or the clock, ends a process; another asks the rest."""
    context = multiprocessing.get_context(START)
    multiprocessing.set_forkserver_preload(["bench.probes", "numba"])
    answers: dict[str, str] = {}
    while len(answers) < len(probe.kinds):
        rest = probe.kinds[len(answers) :]
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_answer, args=(probe.name, library, rest, sender))
        child.start()
        sender.close()
        kind = rest[0]
        try:
            if not receiver.poll(START_SECONDS):
                raise RuntimeError(f"no process started in {START_SECONDS} s")
            receiver.recv()
            for kind in rest:
                if not receiver.poll(probe.seconds):
                    answers[kind] = f"no: not done after {probe.seconds:.0f} s"
                    child.kill()
                    break
                answers[kind] = receiver.recv()
        except EOFError:
            child.join()
            code = child.exitcode or 0
            ended = signal.Signals(-code).name if code < 0 else code
            answers[kind] = f"no: the process ended by {ended}"
        finally:
            child.join(5)
            child.kill()
            child.join()
            receiver.close()
    return answers


def cell(answers: dict[str, str]) -> str:
    """One text of what the layers answered: those that answered alike stand together.

    Alike are two errors of one class, whose words name the layer; and equal words.
    """
    alike: dict[str, list[str]] = {}
    errors: dict[str, str] = {}
    for kind, words in answers.items():
        raised = re.match(r"no: \w+: ", words)
        if raised:
            words = errors.setdefault(raised.group(), words)
        alike.setdefault(words, []).append(kind)
    if len(alike) == 1:
        return next(iter(alike))
    return "; ".join(f"{', '.join(kinds)} {words}" for words, kinds in alike.items())


def escaped(text: str) -> str:
    return re.sub(r"([|<>*_`\\])", r"\\\1", text)


def rows(chosen: list[Probe], show: bool = False) -> list[tuple[Probe, list[str]]]:
    found = []
    for probe in chosen:
        cells = []
        for library in SIDES:
            cells.append(cell(ask(probe, library)))
        if show:
            print(f"{probe.group}: {probe.name}", *cells, sep="\n    ", flush=True)
        found.append((probe, cells))
    return found


def line(probe: Probe, cells: list[str]) -> str:
    return f"| {escaped(probe.name)} | {' | '.join(map(escaped, cells))} |"


def page(found: list[tuple[Probe, list[str]]], provenance: str) -> str:
    parts = [INTRODUCTION, provenance]
    for group in dict.fromkeys(probe.group for probe, _ in found):
        lines = [f"\n## {group}\n", f"| | {' | '.join(SIDES)} |", "|---|---|---|"]
        lines += [line(probe, cells) for probe, cells in found if probe.group == group]
        parts.append("\n".join(lines))
    return "\n".join(parts) + "\n"


def matching(patterns: list[str]) -> list[Probe]:
    found = [
        probe
        for probe in PROBES.values()
        if any(fnmatchcase(name, one) for one in patterns for name in (probe.name, probe.group))
    ]
    if not found:
        raise ValueError(f"no probe matches {patterns}; names: {', '.join(PROBES)}")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.capabilities", description=__doc__)
    parser.add_argument(
        "probes", nargs="*", default=["*"], help="patterns of names or of groups; default all"
    )
    parser.add_argument("--write", action="store_true", help="make docs/capabilities.md")
    options = parser.parse_args(argv)
    if options.write and options.probes != ["*"]:
        parser.error("--write: the page holds every probe")
    try:
        chosen = matching(options.probes)
    except ValueError as error:
        parser.error(str(error))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    found = rows(chosen, show=True)
    if options.write:
        from .pages import note  # it imports fastseq, and the children's parent need not

        PAGE.write_text(page(found, note("Seen on a CPU:")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
