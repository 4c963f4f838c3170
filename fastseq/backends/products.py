"""Matrix products outside of a loop over time, on our own kernel where it beats torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import load

#: Floating-point operations from which our own product repays its call, 15 us, and its packing.
#: (64, 150) by (150, 450) in float32, 8.6e6, on one thread of Zen 5: 53 us and 86 with torch's; of
#: 16 rows 24 and 26; from 1000 rows on it is twice as fast.
LEAST = 4e6


@cache
def _own() -> Callable[..., Tensor] | None:
    backend = load("numba")
    return None if isinstance(backend, str) else backend.product


def product(a: Tensor, b: Tensor, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a b for two matrices, each of which may be a transposed view.

    Args:
        out: where it goes; the numbers of a row stand side by side.
        add: whether it is added to what is there.
    """
    if _is_own(a, b):
        own: Any = _own()
        if own is not None:
            return own(a, b, torch.get_num_threads(), out, add)
    return out.addmm_(a, b) if out is not None and add else torch.mm(a, b, out=out)


def _is_own(a: Tensor, b: Tensor) -> bool:
    return (
        2.0 * a.shape[0] * a.shape[1] * b.shape[1] >= LEAST
        and a.dtype in (torch.float32, torch.float64)
        and a.device.type == "cpu"
        and not (a.is_neg() or b.is_neg())
        and not torch._C._len_torch_dispatch_stack()  # as of what counts operations
    )
