"""The OpenMP runtime that torch uses, so that our kernels run on its threads."""

from __future__ import annotations

import ctypes
import os
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
def functions() -> tuple[Any, Any, Any] | None:
    """GOMP_parallel, omp_get_thread_num and omp_get_num_threads, where they can be had.

    They are looked up in torch's library and in what it depends on, so they are torch's and of no
    other runtime in the process. macOS and Windows have none by these names.
    """
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        found = ctypes.CDLL(str(library))
        parallel = found.GOMP_parallel
        numbers = found.omp_get_thread_num, found.omp_get_num_threads
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


def addresses() -> tuple[int, int, int]:
    """The addresses of :func:`functions`; zeros where there are none."""
    found = functions()
    if found is None:
        return (0, 0, 0)
    first, second, third = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found)
    return (first, second, third)
