"""Floor 2: one room per way to run a cell. Raw tensors; no modules, and no autograd of ours.

:mod:`.contract` says what a backend is, :mod:`.choice` which one runs. Each is imported when it is
first asked for: a missing dependency is a reason in the table, not an ImportError.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

#: name -> (what it is, how to get what it needs)
BACKENDS: dict[str, tuple[str, str]] = {
    "torch": ("torch's own: oneDNN, cuDNN, composite loops", "pip install torch"),
    "native": (
        "fused loops over time for CPU, in C++",
        "install a C++ compiler, such as g++, and then fastseq again: pip install .",
    ),
    "numba": ("fused loops over time for CPU, no compiler needed", "pip install numba"),
    "triton": ("fused loops over time for GPUs", "pip install triton"),
    "eager": ("torch operations step by step, every device and transform", "pip install torch"),
    "reference": ("NumPy float64, the truth of the tests", "pip install numpy"),
}


@cache
def imported(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        return f"{error}; {BACKENDS[name][1]}"


@cache
def load(name: str) -> ModuleType | str:
    """The backend's module, or why it cannot run here."""
    module = imported(name)
    return module if isinstance(module, str) else module.unavailable() or module
