"""Floor 2: one room per way to run a cell. Raw tensors; no modules, and no autograd of ours.

:mod:`.contract` says what a backend is, :mod:`.choice` which one runs. Each is imported when it is
first asked for: a missing dependency is a reason in the table, not an ImportError.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, NamedTuple

from .contract import fault


class Entry(NamedTuple):
    """A backend before it is imported: what it is, how to get what it needs, and its module."""

    what: str
    remedy: str
    module: str


BACKENDS: dict[str, Entry] = {
    "torch": Entry(
        "torch's own: oneDNN, cuDNN, composite loops", "pip install torch", f"{__name__}.torch"
    ),
    "native": Entry(
        "fused loops over time for CPU, in C++",
        "install a C++ compiler, such as g++, and then fastseq again: pip install .",
        f"{__name__}.native",
    ),
    "numba": Entry(
        "fused loops over time for CPU, no compiler needed",
        "pip install numba",
        f"{__name__}.numba",
    ),
    "cuda": Entry(
        "fused loops over time for NVIDIA GPUs, in CUDA C++",
        "install the CUDA toolkit (nvcc) and then fastseq again: pip install .",
        f"{__name__}.cuda",
    ),
    "triton": Entry("fused loops over time for GPUs", "pip install triton", f"{__name__}.triton"),
    "eager": Entry(
        "torch operations step by step, every device and transform",
        "pip install torch",
        f"{__name__}.eager",
    ),
    "reference": Entry(
        "NumPy float64, the truth of the tests", "pip install numpy", f"{__name__}.reference"
    ),
}

#: The backend that autograd sees through: derivatives of every order come from it.
DIFFERENTIABLE = "eager"
#: The backend that saves, on a GPU, what has a size that only its library knows.
OPAQUE = "torch"
#: The backend whose single steps are torch's operations, which a graph that is traced can hold.
STEPPING = "torch"


@cache
def imported(name: str) -> Any:
    """The backend's module, an :class:`.contract.Implementation`; or why it cannot be imported.

    Raises:
        ValueError: no backend has this name.
        TypeError: the module is not what the contract asks for.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    try:
        module = importlib.import_module(BACKENDS[name].module)
    except ImportError as error:
        return f"{error}; {BACKENDS[name].remedy}"
    except Exception as error:  # as of compilers that want the sources of what they compile
        return f"{type(error).__name__}: {error}"
    wrong = fault(module)
    if wrong is not None:
        raise TypeError(f"backend {name!r} ({BACKENDS[name].module}): {wrong}")
    return module


@cache
def load(name: str) -> Any:
    """The backend's module, or why it cannot run here."""
    module = imported(name)
    return module if isinstance(module, str) else module.unavailable() or module
