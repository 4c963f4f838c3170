"""Matrix products around the loops, on the same packed kernel as the recurrent one.

On this kernel a core of Zen 5 does 250 GFLOP/s in float32, torch's mm (MKL) 40 to 110.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from ..cells import bind
from .numba_simd import JIT, simd
from .numba_threads import run

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}

#: k is cut into pieces whose packed block (piece x BLOCK columns) stays in L2 beside the rows
_PIECE = 512
#: fewer rows than this do not repay the packing of the right-hand side
_FEW_ROWS = 8
#: floating-point operations that take a core about 100 us: less is not worth handing out
_SHARE = 2e7


def _product_loop(
    a, a_stride, a_step, b, b_stride, transposed, out, out_stride, rows, inner, columns, room
):
    """out = a b in pieces of k. b[k, j] is at k * b_stride + j, or j * b_stride + k (transposed)."""
    for k in range(0, inner, PIECE):  # noqa: F821
        n = min(PIECE, inner - k)  # noqa: F821
        b_k = b + (k if transposed else k * b_stride) * ITEMSIZE  # noqa: F821
        pack(b_k, b_stride, n, columns, transposed, room)  # noqa: F821
        a_k = a + k * a_step * ITEMSIZE  # noqa: F821
        gemm(a_k, a_stride, a_step, room, out, out_stride, rows, n, columns, k > 0)  # noqa: F821


@cache
def _kernel(dtype: torch.dtype) -> Any:
    s = simd(NUMPY[dtype])
    names = {"pack": s.pack, "gemm": s.gemm, "ITEMSIZE": s.ITEMSIZE, "PIECE": _PIECE}
    text = bind(_product_loop, s.fingerprint, min=min, range=range, **names)
    return numba.njit(cache=True, **JIT)(text)


class Room:
    """Scratch of ``count`` elements at an address that is a multiple of 64."""

    __slots__ = ("address", "tensor")

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(count + 16, dtype=dtype)
        self.address = (self.tensor.data_ptr() + 63) & -64


def product(a: Tensor, b: Tensor, threads: int) -> Tensor:
    """a b for two matrices, each of which may be a transposed view. Rows are shared by threads."""
    (rows, inner), columns = a.shape, b.shape[1]
    if rows < _FEW_ROWS or inner == 0 or columns == 0:
        return torch.mm(a, b)
    out = torch.empty((rows, columns), dtype=a.dtype)
    s = simd(NUMPY[a.dtype])
    kernel = _kernel(a.dtype)
    transposed = b.stride(1) != 1
    if transposed and b.stride(0) != 1:
        b, transposed = b.contiguous(), False
    b_stride = b.stride(1) if transposed else b.stride(0)
    a_stride, a_step = a.stride()
    size = s.packed_size(min(inner, _PIECE), columns)
    itemsize = s.ITEMSIZE

    def share(first: int, last: int) -> None:
        room = Room(size, a.dtype)
        kernel(
            a.data_ptr() + first * a_stride * itemsize,
            a_stride,
            a_step,
            b.data_ptr(),
            b_stride,
            transposed,
            out.data_ptr() + first * columns * itemsize,
            columns,
            last - first,
            inner,
            columns,
            room.address,
        )

    flops = 2.0 * rows * inner * columns
    parts = max(1, min(threads, int(flops / _SHARE), rows // 6))
    if parts == 1:
        share(0, rows)
    else:
        edges = [rows * k // parts for k in range(parts + 1)]
        run([partial(share, *pair) for pair in zip(edges, edges[1:], strict=False)])
    return out
