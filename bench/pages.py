"""Measured text in docs/performance.md, between marks that name who writes it."""

from __future__ import annotations

import datetime
import os
import platform
from pathlib import Path

import torch

from .measure import cpu_name, instructions
from .version import CHANGED, commit

PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin (python -m bench.{name} --write) -->", f"<!-- {name}: end -->"


def note(how: str) -> str:
    """Where and when a figure was measured."""
    threads = torch.get_num_threads()
    version = f"commit {commit()}"
    if version.endswith("-dirty"):
        version = f"**{version.removesuffix('-dirty')} {CHANGED}**"
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        f"{how} {cpu_name()}, {os.cpu_count()} cores, {threads} thread{'s' * (threads > 1)}, "
        f"{instructions()}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, {version}, {today}."
    )


def write(name: str, text: str, page: Path = PAGE) -> int:
    """Put ``text`` between the marks of ``name``; 0, as a main function returns."""
    begin, end = marks(name)
    old = page.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{page}: expected one line {begin} and after it one line {end}")
    before, rest = old.split(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}")
    return 0
