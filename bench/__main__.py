"""The benchmarks: ``python -m bench``, or ``make bench``, which sets up all it needs.

Each case times torch.nn, fastseq as it chooses, and each other backend, in turn and round by
round, and with ``--peers`` other libraries on the same weights (`bench.peers`). The results are
printed as a table and kept as pytest-benchmark's JSON, one file for each count of threads:
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
from .peers import named
from .version import commit
from .workloads import PEER_WORKLOADS, matching

HERE = Path(__file__).parent
SHARED = ("workloads", "backends", "peers", "rounds", "seconds", "limit")  # by a run's parts


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Time fastseq against torch.nn on named workloads."
    )
    parser.add_argument(
        "--workloads",
        help=f"patterns of names: 'small* ptb-medium'; default all, with peers '{PEER_WORKLOADS}'",
    )
    parser.add_argument("--backends", help="backends beside the chosen one; default all there are")
    parser.add_argument("--peers", help="other libraries: 'onnxruntime jax', or all; default none")
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        help="counts of threads, one run each; default torch's own, with peers 1 and torch's own",
    )
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
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number <= 0:
                parser.error(f"--{name}: expected more than 0, got {number}")
    try:
        peers = named(options.peers)
        if peers and options.workloads is None:
            options.workloads = PEER_WORKLOADS
        if peers and options.backends is None:  # one that is many times slower costs rounds
            fast = [name for name in measure.available_backends(None) if name != "eager"]
            options.backends = " ".join(fast)
        options.found = matching(options.workloads)
        measure.available_backends(options.backends)
    except ValueError as error:
        parser.error(str(error))
    if options.threads is None:
        own = torch.get_num_threads()
        options.threads = sorted({1, own}) if peers else [own]
    options.results = options.results.absolute()
    return options


def as_arguments(options: argparse.Namespace, *names: str) -> list[str]:
    """Those that are set, as they were given."""
    values = ((name, getattr(options, name)) for name in names)
    return [f"--{name}={value}" for name, value in values if value is not None]


def result_path(folder: Path, peers: bool = False) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", measure.cpu_name().lower()).strip("-")
    moment = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d-%H%M")
    name = f"{moment}-{commit()}{'-peers' if peers else ''}.json"
    return folder / f"{slug}-{torch.get_num_threads()}-threads" / name


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    if options.list:
        for workload in options.found:
            print(f"{workload.name:24} {workload.shape:40} {workload.source}")
        return 0
    if len(options.threads) > 1:  # XLA and OpenMP take a count once in a process
        return max(
            subprocess.run(
                [
                    *(sys.executable, "-m", "bench", f"--threads={threads}"),
                    *as_arguments(options, *SHARED, "results"),
                ],
                cwd=HERE.parent,
            ).returncode
            for threads in options.threads
        )
    (threads,) = options.threads
    torch.set_num_threads(threads)
    path = result_path(options.results, bool(options.peers))
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [
        str(HERE / "bench_layers.py"),
        f"--rootdir={HERE.parent}",
        *("-c", str(HERE.parent / "pyproject.toml")),
        *("-p", "no:xdist", "-p", "no:cacheprovider", "-q", "-rs"),
        *("--benchmark-only", "--benchmark-quiet", f"--benchmark-json={path}"),
    ]
    command += [f"--threads={threads}", *as_arguments(options, *SHARED)]
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
