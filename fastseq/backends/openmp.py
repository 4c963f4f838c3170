"""The OpenMP runtime that torch uses, so that our kernels run on its threads; and how many threads
can run at a time."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@cache
def functions() -> tuple[Any, Any, Any, Any] | None:
    """GOMP_parallel, omp_get_thread_num, omp_get_num_threads and omp_get_num_procs, where they can
    be had.

    They are looked up in torch's library and in what it depends on, so they are torch's and of no
    other runtime in the process. macOS and Windows have none by these names.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library))
        parallel = found.GOMP_parallel
        numbers = found.omp_get_thread_num, found.omp_get_num_threads, found.omp_get_num_procs
    except (OSError, AttributeError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return (parallel, *numbers)


def parallel() -> Any | None:
    """``GOMP_parallel(function, data, threads, flags)``, or None.

    A forked child has none: it inherits the pool, but none of its threads.
    """
    found = None if _forked else functions()
    return None if found is None else found[0]


def addresses() -> tuple[int, int, int, int]:
    """The addresses of :func:`functions`; zeros where there are none."""
    found = functions()
    if found is None:
        return (0, 0, 0, 0)
    first, second, third, last = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found)
    return (first, second, third, last)


def cores() -> int:
    """How many threads of a call can run at a time: one on each processor, within the quota of
    their time. The affinity of a running process may change, so it is asked at each call."""
    limit = quota()
    return processors() if limit is None else min(processors(), limit)


def processors() -> int:
    """How many processors the threads of a call may run on.

    The runtime is asked, which knows when it has bound each thread to a processor of its own.
    """
    found = functions()
    if found is not None:
        return found[3]()
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def quota() -> int | None:
    """How many processors' time the process's control groups let it use, rounded up, as ``--cpus``
    sets it for a container; None for no limit.

    Affinity does not show it: more threads run until the time of a period is spent, and then all
    of them stand still. It is read once, 0.1 ms, as torch reads the number of its threads.
    """
    return processors_time(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))


def processors_time(membership: Path, mounted: Path) -> int | None:
    """The least quota of the groups that ``membership`` names and of those around them.

    membership: lines "number:controllers:/path", without a controller in version 2. mounted: where
    the groups are found. A container may see its own group as the root of all, and find nothing
    under the path that the host knows it by.
    """
    least = None
    for time, period in _quotas(membership, mounted):
        if time > 0 and period > 0:
            whole = max(1, -(-time // period))
            least = whole if least is None else min(least, whole)
    return least


def _quotas(membership: Path, mounted: Path) -> Iterator[tuple[int, int]]:
    """(microseconds, of so many) of each group that limits; -1 microseconds: it does not."""
    for line in _read(membership).splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not controllers:  # version 2
            folders = mounted, mounted / "unified"
            files: tuple[str, ...] = ("cpu.max",)
        elif "cpu" in controllers.split(","):
            folders = (mounted / "cpu", mounted / controllers)
            files = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        own = Path(path.lstrip("/"))
        for folder in folders:
            for group in (own, *own.parents):
                words = " ".join(_read(folder / group / file) for file in files).split()
                if len(words) == 2 and all(word.lstrip("-").isdigit() for word in words):
                    yield int(words[0]), int(words[1])


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
