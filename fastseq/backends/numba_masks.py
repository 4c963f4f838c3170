# ruff: noqa: F821  (the free names of the loop are bound by _kernel)
"""Masks drawn by Philox on SIMD vectors, for machines without the compiled kernels.

The words are those of ops/masks.py, bit for bit. A lane of 64 bits holds a word of 32, so that a
product of two words is one instruction. With AVX-512 a vector of 8 counters gives 32 units.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from torch import Tensor

from ..cells import bind
from . import openmp
from .numba_loops import Kernel
from .numba_simd import digest
from .numba_vectors import (
    I32,
    I64,
    INTEGERS,
    called,
    first_lanes,
    intrinsic,
    splatted,
    vector_bytes,
)

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
#: Units that a core of Zen 5 draws in about 80 us: less is not worth handing out.
_SHARE = 250_000


def _keep_loop(data):
    """(rows, units) of one site: bytes, 1 where a unit's word is at least the threshold."""
    tasks = load_int(data, 1)
    task = take(data)
    while task < tasks:
        p = data + (2 + task * 10) * 8
        out, ids, steps = load_int(p, 0), load_int(p, 1), load_int(p, 2)
        first, last, units, site = load_int(p, 3), load_int(p, 4), load_int(p, 5), load_int(p, 6)
        key_0, key_1, threshold = load_int(p, 7), load_int(p, 8), load_int(p, 9)
        for row in range(first, last):
            name = load_int(ids, row)
            step = load_int(steps, row) if steps else 0
            place = site | (name >> 32 & 0xFFFF) << 16
            for unit in range(0, units, 4 * LANES):
                draw(
                    out + row * units + unit,
                    unit >> 2,
                    name,
                    place,
                    step,
                    key_0,
                    key_1,
                    threshold,
                    units - unit,
                )
        task = take(data)


def _draw(lanes: int) -> Any:
    """The bytes of ``lanes`` counters side by side, of which the first n are stored."""
    wide = ir.VectorType(I64, lanes)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(wide, [value] * lanes)

    def words(b: ir.IRBuilder, counter: list[ir.Value], keys: list[ir.Value]) -> list[ir.Value]:
        """Philox4x32-10. What stands above a word's 32 bits is cut off where it would be seen."""
        c_0, c_1, c_2, c_3 = counter
        for k in range(_ROUNDS):
            k_0, k_1 = (
                splatted(b, b.add(key, I64(k * weyl)), lanes)
                for key, weyl in zip(keys, _WEYL, strict=True)
            )
            p_0, p_1 = (
                b.mul(b.and_(c, constant(_WORD)), constant(m))
                for c, m in zip((c_0, c_2), _MULTIPLIERS, strict=True)
            )
            high_0, high_1 = (b.lshr(p, constant(32)) for p in (p_0, p_1))
            c_0, c_1 = b.xor(b.xor(high_1, c_1), k_0), p_1
            c_2, c_3 = b.xor(b.xor(high_0, c_3), k_1), p_0
        return [b.and_(c, constant(_WORD)) for c in (c_0, c_1, c_2, c_3)]

    @intrinsic
    def draw(
        typingctx: Any,
        out: types.Type,
        block: types.Type,
        name: types.Type,
        place: types.Type,
        step: types.Type,
        key_0: types.Type,
        key_1: types.Type,
        threshold: types.Type,
        n: types.Type,
    ) -> Any:
        def lower(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            out, *counter, key_0, key_1, threshold, n = args
            counter = [splatted(b, c, lanes) for c in counter]
            counter[0] = b.add(counter[0], ir.Constant(wide, list(range(lanes))))
            limit = splatted(b, threshold, lanes)
            kept = [
                b.zext(b.icmp_unsigned(">=", w, limit), ir.VectorType(ir.IntType(8), lanes))
                for w in words(b, counter, [key_0, key_1])
            ]

            def order(count: int, places: list[int]) -> ir.Constant:
                return ir.Constant(ir.VectorType(I32, count), places)

            side_by_side = order(2 * lanes, list(range(2 * lanes)))
            pairs = [b.shuffle_vector(*kept[k : k + 2], side_by_side) for k in (0, 2)]
            of_unit = [u % 4 * lanes + u // 4 for u in range(4 * lanes)]
            found = b.shuffle_vector(*pairs, order(4 * lanes, of_unit))
            pointer = b.inttoptr(out, found.type.as_pointer())
            whole = b.icmp_signed(">=", n, I64(4 * lanes))
            with b.if_else(whole) as (all_of_them, some):
                with all_of_them:
                    b.store(found, pointer, align=1)
                with some:
                    _store_first(b, found, pointer, n)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 9), lower

    return draw


def _store_first(b: ir.IRBuilder, found: ir.Value, pointer: ir.Value, n: ir.Value) -> None:
    """The first n of a vector of bytes."""
    count = found.type.count
    name, mask = f"llvm.masked.store.v{count}i8.p0", first_lanes(b, n, count)
    called(b, name, ir.VoidType(), found, pointer, I32(1), mask)


@cache
def _kernel() -> Kernel:
    lanes = vector_bytes() // 8
    names = {"LANES": lanes, "draw": _draw(lanes), "range": range}
    names |= {name: INTEGERS[name] for name in ("load_int", "take")}
    return Kernel(bind(_keep_loop, f"x{lanes}_{digest(__name__)[:16]}", **names))


def keep(
    seed: Tensor,
    sites: Sequence[int],
    ids: Tensor,
    steps: Tensor | None,
    units: int,
    threshold: int,
) -> Tensor | None:
    """Masks on the CPU: see :class:`.contract.Draws`."""
    given = [t for t in (seed, ids, steps) if t is not None]
    if any(t.device.type != "cpu" or t.dtype is not torch.int64 for t in given):
        return None
    rows, key, threads = ids.shape[0], int(seed), min(torch.get_num_threads(), openmp.cores())
    out = torch.empty((len(sites), rows, units), dtype=torch.bool, device="cpu")
    ids, steps = ids.contiguous(), None if steps is None else steps.contiguous()
    shares = max(1, min(threads, out.numel() // _SHARE))
    parts = max(1, min(rows, -(-shares // max(1, len(sites)))))
    tasks = [
        (
            out.data_ptr() + k * rows * units,
            ids.data_ptr(),
            0 if steps is None else steps.data_ptr(),
            rows * part // parts,
            rows * (part + 1) // parts,
            units,
            site,
            key & _WORD,
            key >> 32 & _WORD,
            threshold,
        )
        for k, site in enumerate(sites)
        for part in range(parts)
    ]
    if out.numel():
        _kernel().run(tasks, shares)
    return out
