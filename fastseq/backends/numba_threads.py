"""Threads for the Numba kernels: a pool of Python threads, because the kernels hold no lock.

Numba's own layers are out: its OpenMP one kills a forked child (DataLoader workers), its workqueue
refuses two callers at once. A Python pool costs about 15 us to hand out and collect a task.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import torch

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def _forget() -> None:
    """After a fork the child has the pool but none of its threads."""
    global _lock, _pool, _size
    _lock, _pool, _size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def pool(threads: int) -> ThreadPoolExecutor:
    """The pool, made when first needed and again when more threads are asked for."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(threads, "fastseq"), threads
        return _pool


def run(tasks: Sequence[Callable[[], Any]]) -> None:
    """Run all tasks, the last one on the calling thread; raise what any of them raises."""
    if len(tasks) == 1:
        tasks[0]()
        return
    executor = pool(max(len(tasks) - 1, torch.get_num_threads() - 1))
    futures = [executor.submit(task) for task in tasks[:-1]]
    try:
        tasks[-1]()
    finally:
        wait(futures)
    for future in futures:
        future.result()


def row_ranges(
    recurrences: int, rows: int, steps: int, flops: float, threads: int
) -> list[tuple[int, int, int]]:
    """The tasks of a call: (recurrence, first row, last row).

    flops: of one row's step. A task that takes less than about 100 us on its own is not worth
    handing out: the pool's 15 us, and two shared cores that wake up slowly.
    """
    whole = [(r, 0, rows) for r in range(recurrences)]
    if threads == 1 or rows == 0:
        return whole
    microseconds = flops * rows * steps * recurrences / 20e3  # 20 GFLOP/s
    if microseconds < 200:
        return whole
    parts = min(rows, max(1, threads // recurrences))
    edges = [rows * k // parts for k in range(parts + 1)]
    return [
        (r, first, last)
        for r in range(recurrences)
        for first, last in zip(edges, edges[1:], strict=False)
    ]
