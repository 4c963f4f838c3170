"""Explicit SIMD for Numba: vectors on raw addresses, a cell's vocabulary on them, packed products.

Why not LLVM's auto-vectoriser: whether it vectorises a loop that calls exp depends on the LLVM
build, on SVML and on the loop's shape. Here the code that runs is the code that was written.

    s = simd(numpy.float32)
    kernel = numba.njit(**JIT)(bind(text, **vars(s)))

`simd` returns the names that a kernel's text uses freely; its docstring lists them.

A `Vec` is a value in a register: it lives in local variables, arguments, results and tuples. It
cannot be returned to Python, nor kept in a list or an array (Numba's heap is aligned to 16 bytes).

Addresses are integers (`tensor.data_ptr()`, `array.ctypes.data`), because unboxing twenty arrays
costs more than a time step. Offsets and strides count elements, in 64 bits. Nothing is checked.
Elements are aligned, vectors need not be, though for packed weights 64 bytes are worth having: a
load that crosses a cache line counts as two.
The caller keeps every buffer alive during the call; nothing here allocates or keeps an address.

Numerics: every lane, those of a masked tail included, runs the same instructions, and each output
of `gemm` is chains of fused multiply-adds over k in increasing order, 256 long, added up in that
order. So the bits of a result do not depend on where in the row, the tile or the batch it sits.
`a * b + c` is a product and a sum, each rounded.
"""

from __future__ import annotations

import functools
import hashlib
import marshal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import types

from . import numba_tiles, numba_vectors
from .numba_tiles import BLOCK_VECTORS, products
from .numba_vectors import INTEGERS, JIT, VOCABULARY, Vec, memory, vector_bytes

__all__ = ["JIT", "Vec", "simd"]

#: A change of any of them must not find the kernels that were compiled before.
_SOURCES = (__name__, numba_vectors.__name__, numba_tiles.__name__)


def digest(*modules: str) -> str:
    """A hash of the modules' texts, or of their code where they have no file, as in an archive."""
    found = hashlib.sha256()
    for name in modules:
        spec = sys.modules[name].__spec__
        assert spec is not None and spec.origin is not None
        loader: Any = spec.loader
        file = Path(spec.origin)
        found.update(file.read_bytes() if file.is_file() else marshal.dumps(loader.get_code(name)))
    return found.hexdigest()


@functools.cache
def simd(dtype: Any, lanes: int | None = None) -> SimpleNamespace:
    """The names for kernels in `dtype`, to be put into a kernel's globals.

    dtype: float32 or float64. lanes: a power of two; None takes the widest vectors of the CPU that
    Numba compiles for (64 bytes with AVX-512, 32 with AVX, else 16).

    `ptr` is an address, `i` an offset in elements, `n` a count of lanes (all int64), `v` a Vec.

    LANES                       lanes of a Vec
    ITEMSIZE                    bytes of an element
    BLOCK                       columns of a block of packed weights
    load(ptr, i), store(ptr, i, v)
    load_part(ptr, i, n), store_part(ptr, i, v, n)
                                only the first n lanes touch memory, the others load as 0; n may be
                                below 1 (nothing) or above LANES (everything)
    load1(ptr, i), store1(ptr, i, scalar), splat(scalar)
    blend(ptr, i, v, v), blend_part(ptr, i, v, v, n)
                the first where the byte at ptr + i + lane is not 0, the second where it is
    load_int(ptr, i), load_byte(ptr, i)
                                of int64 and of uint8, whatever the dtype
    take(ptr)                   the int64 there, which it then counts up, atomically
    v + v, v - v, v * v, -v, fma(v, v, v)
    sigmoid, tanh, exp, relu, reciprocal, logsigmoid, sqrt, maximum
                                of v, maximum of two; NaN stays NaN
    dsigmoid, dtanh, drelu, dlogsigmoid, dsqrt
                                derivatives, of the output y; drelu(NaN) is 1: as in torch, a
                                gradient passes where y <= 0 is false
    dmaximum                    of maximum(a, b) in a, of both; a half where they are equal

    number(value)               for `bind`: the word that gives a number, all lanes the same

    gemm(a_ptr, a_stride, a_step, w_ptr, out_ptr, out_stride, rows, inner, columns, accumulate)
        out[r, j] = sum_k a[r, k] w[k, j], added to the old out[r, j] if accumulate. w is packed;
        the rows of a and out lie a_stride and out_stride elements apart; out overlaps neither a
        nor w. To share the columns among threads, split at a multiple of BLOCK: block b begins
        b * inner * BLOCK elements into w. On one core of Zen 5 in float32, weights 128 x 512:
        95 GFLOP/s for one row (190 bytes/ns from L2), 250 of 265 from three rows on.
    pack(src_ptr, src_stride, inner, columns, transposed, out_ptr)
        Packs w[k, j] = src[k, j], or src[j, k] if transposed; (inner, columns) is the shape of w,
        src_stride the elements between rows of src. 64k float32 take 3 us, transposed 4.
    packed_size(inner, columns)
        Elements of packed weights. For the host, not for kernels.
    fingerprint
        Names the dtype, the lanes and the text of the vectors' files: Numba's disk cache sees none
        of them, so a kernel with cache=True must carry it in its __qualname__.
    """
    dtype = np.dtype(dtype)
    numba_types: dict[Any, Any] = {
        np.dtype(np.float32): types.float32,
        np.dtype(np.float64): types.float64,
    }
    if dtype not in numba_types:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    vec = Vec(numba_types[dtype], lanes or vector_bytes() // dtype.itemsize)
    fingerprint = f"{dtype}x{vec.lanes}_{digest(*_SOURCES)[:16]}"
    on_memory = memory(vec)
    splat = on_memory["splat"]

    def number(value: float) -> Any:
        scalar = dtype.type(value)  # a literal would be of float64, and what it meets, too

        def given() -> Any:
            return splat(scalar)

        return numba.njit(**JIT, forceinline=True)(given)

    return SimpleNamespace(
        LANES=vec.lanes,
        ITEMSIZE=dtype.itemsize,
        BLOCK=BLOCK_VECTORS * vec.lanes,
        fingerprint=fingerprint,
        number=number,
        **on_memory,
        **INTEGERS,
        **VOCABULARY,
        **products(vec, fingerprint),
    )
