# ruff: noqa: F821  (the free names of the loop are bound by _kernel)
"""Matrix products around the loops, on the same packed kernel as the recurrent one.

On this kernel a core of Zen 5 does 250 GFLOP/s in float32, torch's mm (MKL) 40 to 110.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from ..cells import bind
from .numba_loops import Kernel
from .numba_simd import simd

NUMPY = {torch.float32: np.float32, torch.float64: np.float64}

#: k is cut into pieces whose packed block (piece x BLOCK columns) stays in L2 beside the rows
_PIECE = 512
#: fewer rows than this do not repay the packing of the right-hand side
_FEW_ROWS = 8
#: floating-point operations that take a core about 35 us: less is not worth handing out
_SHARE = 8e6


def _product_loop(data):
    """out = a b in pieces of k, + out if add. b[k, j] is at k * b_stride + j, transposed at
    j * b_stride + k."""
    tasks = load_int(data, 1)
    task = take(data)
    while task < tasks:
        p = data + (2 + task * 13) * 8
        a, a_stride, a_step = load_int(p, 0), load_int(p, 1), load_int(p, 2)
        b, b_stride, transposed = load_int(p, 3), load_int(p, 4), load_int(p, 5) != 0
        out, out_stride = load_int(p, 6), load_int(p, 7)
        rows, inner, columns, room = (
            load_int(p, 8),
            load_int(p, 9),
            load_int(p, 10),
            load_int(p, 11),
        )
        add = load_int(p, 12) != 0
        for k in range(0, inner, PIECE):
            n = min(PIECE, inner - k)
            b_k = b + (k if transposed else k * b_stride) * ITEMSIZE
            pack(b_k, b_stride, n, columns, transposed, room)
            a_k = a + k * a_step * ITEMSIZE
            gemm(a_k, a_stride, a_step, room, out, out_stride, rows, n, columns, add or k > 0)
        task = take(data)


@cache
def _kernel(dtype: torch.dtype) -> Kernel:
    s = vars(simd(NUMPY[dtype]))
    names = {name: s[name] for name in ("pack", "gemm", "ITEMSIZE", "load_int", "take")}
    text = bind(_product_loop, s["fingerprint"], min=min, range=range, PIECE=_PIECE, **names)
    return Kernel(text)


class Room:
    """Scratch of ``count`` elements at an address that is a multiple of 64."""

    __slots__ = ("address", "tensor")

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        self.tensor = torch.empty(count + 16, dtype=dtype, device="cpu")
        self.address = (self.tensor.data_ptr() + 63) & -64


def product(
    a: Tensor, b: Tensor, threads: int, out: Tensor | None = None, add: bool = False
) -> Tensor:
    """a b for two matrices, each of which may be a transposed view. Rows are shared by threads.

    out: of any stride between its rows. add: whether what is there is added.
    """
    (rows, inner), columns = a.shape, b.shape[1]
    if rows < _FEW_ROWS or inner == 0 or columns == 0:
        return out.addmm_(a, b) if out is not None and add else torch.mm(a, b, out=out)
    if out is None:
        out = torch.empty((rows, columns), dtype=a.dtype, device="cpu")
    s = simd(NUMPY[a.dtype])
    kernel = _kernel(a.dtype)
    transposed = b.stride(1) != 1
    if transposed and b.stride(0) != 1:
        b, transposed = b.contiguous(), False
    b_stride = b.stride(1) if transposed else b.stride(0)
    a_stride, a_step = a.stride()
    out_stride = out.stride(0)
    size = s.packed_size(min(inner, _PIECE), columns)
    itemsize = s.ITEMSIZE
    parts = max(1, min(threads, int(2.0 * rows * inner * columns / _SHARE), rows // 6))
    tasks, rooms = [], []
    for part in range(parts):
        first, last = rows * part // parts, rows * (part + 1) // parts
        rooms.append(Room(size, a.dtype))
        tasks.append(
            (
                a.data_ptr() + first * a_stride * itemsize,
                a_stride,
                a_step,
                b.data_ptr(),
                b_stride,
                transposed,
                out.data_ptr() + first * out_stride * itemsize,
                out_stride,
                last - first,
                inner,
                columns,
                rooms[part].address,
                add,
            )
        )
    kernel.run(tasks, threads)
    return out
