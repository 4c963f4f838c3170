"""Fused loops over time for NVIDIA GPUs in CUDA C++, from ``csrc/cuda/``: the extension module
``fastseq._cuda``, which carries them as binaries for the driver.

One GEMM (torch's) makes the input product of all steps. A CTA then owns eight sequences of one
recurrence and walks all of time, its weights in registers and shared memory
(:mod:`.cuda_plan` says which problems it holds, and how). Backward walks once more and leaves the
gate gradients, from which large GEMMs make the gradients of x and of the weights.

Numerics. float16 and bfloat16: y, the states at the ends, saved gates and gate gradients in that
type; gate arithmetic, sums, and the carried and saved states other than h, in float32. float32 obeys
``torch.backends.cudnn.rnn.fp32_precision`` in the products of the loop and around it: TF32, or three
products of TF32 parts, right to 2^-22 of each. No atomics: two identical calls agree bit for bit.

Memory. Training keeps, per row and recurrence, G*H gates (Elman's cells none), each further saved
value and each state other than h; with ``memory="lean"`` y alone, and backward walks forward again.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..cells import CELLS
from .contract import Abilities, Call, Gradients, OutputGradients, Problem, Result, Wanted
from .cuda_plan import Device, Plan, declined_sizes, plan
from .gpu_layer import Layer, Precision, products_as
from .layout import declined_anywhere
from .layout import side_by_side as saved_layout

FOLDER = Path(__file__).parents[1]
try:
    from .. import _cuda  # type: ignore[attr-defined]

    if not (FOLDER.is_dir() and FOLDER.samefile(Path(_cuda.__file__).parent)):
        raise ImportError(f"{_cuda.__file__} belongs to another fastseq")
except ImportError as error:
    note = FOLDER / "_cuda.txt"  # setup.py's
    why = note.read_text().strip() if note.exists() else error
    raise ImportError(f"fastseq was built without its CUDA kernels: {why}") from error

__all__ = ["backward", "explain", "forward", "saved_layout", "supports", "unavailable"]

ABILITIES = Abilities()
#: What a kernel is given, in this order: csrc/cuda/arguments.h.
FIELDS = (
    "T B R H rows reverse save lengths offsets gates extra y c_all h_0 c_0 h_n c_n w_hh b_hh unit "
    "reset h_mask dy dc_all dh dc dgates dproduct dunit"
).split()
#: The driver that runs what nvcc 13 makes.
DRIVER = 580
_PACK = struct.Struct(f"<{len(FIELDS)}q").pack
_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def unavailable() -> str | None:
    if _cuda.fields().split() != FIELDS:
        return (
            "the CUDA kernels were built from the sources of another version of fastseq; build them"
            " again: make build, or pip install ."
        )
    driver = _cuda.driver()
    if isinstance(driver, str):
        return f"{driver}; an NVIDIA driver is needed, {DRIVER} or newer"
    if driver < _cuda.toolkit() // 1000 * 1000:
        return (
            f"the NVIDIA driver speaks CUDA {driver // 1000}.{driver % 1000 // 10}, the kernels were"
            f" built with {_cuda.toolkit() // 1000}; a driver of {DRIVER} or newer is needed"
        )
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def supports(problem: Problem) -> str | None:
    if problem.device not in ("cuda", "meta"):
        return f"cuda's kernels run on NVIDIA GPUs, not on {problem.device}"
    anywhere = declined_anywhere("cuda", problem)
    if anywhere is not None:
        return anywhere
    found = plan(problem, _device_of(problem), _type_of(problem.dtype, problem.tf32))
    return found if isinstance(found, str) else None


def explain(problem: Problem) -> str:
    """How a problem that it supports runs."""
    return str(plan(problem, _device_of(problem), _type_of(problem.dtype, problem.tf32)))


def _type_of(dtype: torch.dtype, is_tf32: bool) -> str:
    return _TYPES.get(dtype, "tf32" if is_tf32 else "float32")
