"""The benchmarks: ``python -m bench``, or ``make bench``, which sets up all it needs.

Each case times torch.nn, fastseq as it chooses, and each other backend, in turn and round by
round. The results are printed as a table and kept as pytest-benchmark's JSON,
bench/results/<machine>/<date>-<commit>.json.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import measure, table
from .workloads import matching

HERE = Path(__file__).parent


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Time fastseq against torch.nn on named workloads."
    )
    parser.add_argument("--workloads", help="patterns of names: 'small* ptb-medium'; default all")
    parser.add_argument("--backends", help="backends beside the chosen one; default all there are")
    parser.add_argument("--threads", type=int, help="threads of torch; default torch's own")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of a case at most")
    parser.add_argument("--seconds", type=float, default=1.5, help="what a case may take in rounds")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="a case that would take longer is skipped"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE / "results", help="where the JSON goes"
    )
    parser.add_argument("--list", action="store_true", help="name the workloads and stop")
    options = parser.parse_args(argv)
    for name in ("threads", "rounds", "seconds", "limit"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            parser.error(f"--{name}: expected more than 0, got {value}")
    try:
        options.found = matching(options.workloads)
        measure.available_backends(options.backends)
    except ValueError as error:
        parser.error(str(error))
    return options


def commit() -> str:
    """The short commit, with '-dirty' where files differ from it; 'unversioned' without git."""
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"],
            cwd=HERE,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"
    return name or "unversioned"


def result_path(folder: Path) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", measure.cpu_name().lower()).strip("-")
    moment = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M")
    name = f"{moment}-{commit()}.json"
    return folder / f"{slug}-{torch.get_num_threads()}-threads" / name


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.list:
        for workload in options.found:
            print(f"{workload.name:24} {workload.shape:40} {workload.source}")
        return 0
    if options.threads:
        torch.set_num_threads(options.threads)
    path = result_path(options.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(HERE / "bench_layers.py"),
        f"--rootdir={HERE.parent}",
        *("-c", str(HERE.parent / "pyproject.toml")),
        *("-p", "no:xdist", "-p", "no:cacheprovider", "-q", "-rs"),
        *("--benchmark-only", "--benchmark-quiet", f"--benchmark-json={path}"),
    ]
    for name in ("workloads", "backends", "threads", "rounds", "seconds", "limit"):
        value = getattr(options, name)
        if value is not None:
            command.append(f"--{name}={value}")
    code = pytest.main(command)
    if path.exists() and path.stat().st_size:
        results = table.read(path)
        print()
        print(table.full(results))
        print(f"\n{table.provenance(results)}\nResults: {path}")
    else:
        path.unlink(missing_ok=True)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
