"""Threads for the Numba kernels: torch's own pool.

A kernel gets the address of a list of tasks and takes the next one, by an atomic counter, until
none is left; so any number of threads may run it, one that comes late or alone included. They are
the threads of torch's OpenMP pool, entered by ``GOMP_parallel``. A pool beside it has to fight for
the cores: torch's threads spin for a while after each of its operations, and an LSTM of T50 B50
H128 took 3.4 ms between two layers of torch.nn where it took 1.8 ms alone.

Where torch's OpenMP runtime cannot be entered so (macOS, Windows), and in a forked child, which
inherits the pool but none of its threads, a pool of Python threads runs the kernels: they hold no
lock. Numba's own layers are out: its OpenMP one kills a forked child (DataLoader workers), its
workqueue refuses two callers at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import pairwise

from . import openmp

Kernel = Callable[[int], None]

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def _after_fork() -> None:
    global _lock, _pool, _size
    _lock, _pool, _size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def python_pool(threads: int) -> ThreadPoolExecutor:
    """The pool, made when first needed and again when more threads are asked for."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(threads, "fastseq"), threads
        return _pool


def run(kernel: Kernel, address: int, data: int, threads: int) -> None:
    """Run the tasks at ``data`` on up to ``threads`` threads, the caller's among them.

    kernel: as called from Python, without the interpreter's lock. address: of its machine code.
    """
    if threads <= 1:
        kernel(data)
        return
    gomp_parallel = openmp.parallel()
    if gomp_parallel is not None:
        gomp_parallel(address, data, threads, 0)
        return
    pool = python_pool(threads - 1)
    futures = [pool.submit(kernel, data) for _ in range(threads - 1)]
    kernel(data)
    wait(futures)


def row_ranges(
    recurrences: int, rows: int, steps: int, flops: float, threads: int
) -> list[tuple[int, int, int]]:
    """The tasks of a call: (recurrence, first row, last row).

    flops: of one row's step. Work of less than about 80 us stays whole: to wake a thread that
    sleeps takes 50 us and more here.
    """
    parts = 1
    if threads > 1 and flops * rows * steps * recurrences > 1.5e7:
        parts = max(1, min(rows, threads // recurrences))
    edges = [rows * k // parts for k in range(parts + 1)]
    return [(r, first, last) for r in range(recurrences) for first, last in pairwise(edges)]
