"""The kernels' product: register tiles on packed weights, and what packs them.

Weights are packed as [block of BLOCK columns][k][BLOCK], the last block padded with zeros: one k of
a block is BLOCK_VECTORS vectors, which all rows of a tile share. :mod:`.numba_products` makes the
products around the loops of these.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils

from .numba_vectors import I32, I64, JIT, Vec, Writer, has_32_registers, intrinsic, llvm_vector

BLOCK_VECTORS = 4
_TILE_ARGUMENTS = 8  # a_ptr, a_stride, a_step, w_ptr, out_ptr, out_stride, inner, accumulate
# R = 1 reads every weight once. From L1 two blocks at a time hide the latency of the additions
# (456 against 300 bytes/ns on Zen 5); from L2 one block, prefetched this many k ahead, is faster
# (190 to 230 against 130 bytes/ns: the hardware's prefetcher does not keep up with L1 alone).
_PREFETCH_AHEAD = 8
_L1_BYTES = 48 * 1024
# A sum over more k than this is a sum of sums: a single chain over 4096 products rounds four times
# as much as MKL does. A piece of a block (64 KB) also stays in cache while all rows pass by.
_PIECE = 256


def _new_function(module: ir.Module, name: str, args: list[ir.Type]) -> ir.Function:
    """A function of its own beside the kernel, so that its registers are allocated apart."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), args), name)
    function.linkage = "internal"
    # optsize: LLVM unrolls the loops four times otherwise, which brings no speed and doubles the
    # time to compile.
    for attribute in ("noinline", "nounwind", "optsize"):
        function.attributes.add(attribute)
    return function


def _tile_function(module: ir.Module, vec: Vec, rows: int, blocks: int) -> ir.Function:
    """An LLVM function: out = a w, or += , for `rows` rows and `blocks` whole blocks of columns.

    It owns its tile of out: rows * blocks * BLOCK_VECTORS accumulators stay in registers for all
    k. It is a function of its own, not inlined, so that the registers of each tile are allocated
    apart from everything else.
    """
    name = f"fastseq_tile_f{vec.dtype.bitwidth}x{vec.lanes}_{rows}x{blocks}"
    if name in module.globals:
        return module.globals[name]
    function = _new_function(module, name, [I64] * (_TILE_ARGUMENTS - 1) + [ir.IntType(1)])
    a_ptr, a_stride, a_step, w_ptr, out_ptr, out_stride, inner, accumulate = function.args

    start = function.append_basic_block("start")
    loop = function.append_basic_block("loop")
    body = function.append_basic_block("body")
    done = function.append_basic_block("done")
    add = function.append_basic_block("add")
    write = function.append_basic_block("write")
    builder = ir.IRBuilder(start)
    w = Writer(builder, vec)
    width = BLOCK_VECTORS * w.lanes
    tile = [(row, v) for row in range(rows) for v in range(blocks * BLOCK_VECTORS)]
    a_row = [w.pointer(a_ptr, builder.mul(a_stride, I64(row))) for row in range(rows)]
    out_row = [w.pointer(out_ptr, builder.mul(out_stride, I64(row))) for row in range(rows)]
    block_size = builder.mul(inner, I64(width))
    w_block = [w.pointer(w_ptr, builder.mul(block_size, I64(b))) for b in range(blocks)]
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(I64)
    sums = [builder.phi(w.type) for _ in tile]
    builder.cbranch(builder.icmp_signed("<", k, inner), body, done)

    builder.position_at_end(body)
    line = builder.mul(k, I64(width))
    at = builder.mul(k, a_step)

    def weight(block: ir.Value, v: int) -> ir.Value:
        return w.pointer(block, builder.add(line, I64(v * w.lanes)))

    if rows == blocks == 1:
        for v in range(BLOCK_VECTORS):
            ahead = weight(w_block[0], v + _PREFETCH_AHEAD * BLOCK_VECTORS)
            w.call("llvm.prefetch.p0", ir.VoidType(), ahead, I32(0), I32(3), I32(1))

    def a_value(row: int) -> ir.Value:
        return w.broadcast(builder.load(w.pointer(a_row[row], at)))

    def w_value(v: int) -> ir.Value:
        return w.load(weight(w_block[v // BLOCK_VECTORS], v % BLOCK_VECTORS))

    # The shorter side of the tile is held in registers, the other is read next to its use. The
    # other way round, 6 rows spill 32 registers and 3 rows spill 16: 0.6 of the speed.
    sum_of = dict(zip(tile, sums, strict=True))
    new: dict[tuple[int, int], ir.Value] = {}
    if rows < BLOCK_VECTORS:
        held = [a_value(row) for row in range(rows)]
        for v in range(blocks * BLOCK_VECTORS):
            value = w_value(v)
            for row in range(rows):
                new[row, v] = w.fma(held[row], value, sum_of[row, v])
    else:
        held = [w_value(v) for v in range(blocks * BLOCK_VECTORS)]
        for row in range(rows):
            value = a_value(row)
            for v in range(blocks * BLOCK_VECTORS):
                new[row, v] = w.fma(value, held[v], sum_of[row, v])
    next_k = builder.add(k, I64(1))
    builder.branch(loop)

    for phi, first, following in zip(
        [k, *sums],
        [I64(0)] + [w.constant(0.0)] * len(tile),
        [next_k, *(new[key] for key in tile)],
        strict=True,
    ):
        phi.add_incoming(first, start)
        phi.add_incoming(following, body)

    builder.position_at_end(done)
    out = [w.pointer(out_row[row], I64(v * w.lanes)) for row, v in tile]
    builder.cbranch(accumulate, add, write)
    # What is there is added last: a sum over many blocks of k rounds once a block.
    builder.position_at_end(add)
    totals = [w.add(value, w.load(pointer)) for value, pointer in zip(sums, out, strict=True)]
    builder.branch(write)
    builder.position_at_end(write)
    results = [builder.phi(w.type) for _ in tile]
    for result, value, total in zip(results, sums, totals, strict=True):
        result.add_incoming(value, done)
        result.add_incoming(total, add)
    for result, pointer in zip(results, out, strict=True):
        w.store(result, pointer)
    builder.ret_void()
    return function


def _compiled(function: Any, fingerprint: str) -> Any:
    """``function`` for Numba, under a name that no other vector type shares.

    Kernels that were compiled in different processes and meet again from the disk cache are linked
    by name: float64's kernel called float32's gemm when both were named gemm.
    """
    function.__qualname__ = f"{function.__name__}_{fingerprint}"
    return numba.njit(**JIT)(function)


def products(vec: Vec, fingerprint: str) -> dict[str, Any]:
    """gemm, pack and packed_size of one Vec type."""
    i64, flag = types.int64, types.boolean
    itemsize = vec.dtype.bitwidth // 8
    tallest = 6 if has_32_registers() else 3
    lanes = vec.lanes
    block = BLOCK_VECTORS * lanes
    # (rows, blocks) of each tile, in the order of its number in `run_tile`.
    shapes = [(1, 2)] + [(rows, 1) for rows in range(1, tallest + 1)]

    @intrinsic
    def run_tile(
        typingctx: Any,
        number: types.Type,
        a_ptr: types.Type,
        a_stride: types.Type,
        a_step: types.Type,
        w_ptr: types.Type,
        out_ptr: types.Type,
        out_stride: types.Type,
        inner: types.Type,
        accumulate: types.Type,
    ) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            number, *rest = args
            done = builder.append_basic_block("done")
            switch = builder.switch(number, done)
            for i, shape in enumerate(shapes):
                case = builder.append_basic_block(f"tile_{i}")
                switch.add_case(I64(i), case)
                builder.position_at_end(case)
                builder.call(_tile_function(builder.module, vec, *shape), rest)
                builder.branch(done)
            builder.position_at_end(done)
            return context.get_dummy_value()

        return types.void(*[i64] * _TILE_ARGUMENTS, flag), lower

    @intrinsic
    def scratch(typingctx: Any) -> Any:
        """The address of room for one tile on the stack."""

        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            room = ir.ArrayType(llvm_vector(vec), tallest * BLOCK_VECTORS)
            return builder.ptrtoint(cgutils.alloca_once(builder, room), I64)

        return i64(), lower

    @intrinsic
    def transpose(
        typingctx: Any,
        src_ptr: types.Type,
        src_stride: types.Type,
        rows: types.Type,
        columns: types.Type,
        out_ptr: types.Type,
    ) -> Any:
        """out[c * BLOCK + r] = src[r * src_stride + c]; rows past `rows` count as zeros."""

        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            builder.call(_transpose_function(builder.module, vec), args)
            return context.get_dummy_value()

        return types.void(i64, i64, i64, i64, i64), lower

    copy_padded, copy_masked = _copy(vec, masked=False), _copy(vec, masked=True)

    def gemm(
        a_ptr: int,
        a_stride: int,
        a_step: int,
        w_ptr: int,
        out_ptr: int,
        out_stride: int,
        rows: int,
        inner: int,
        columns: int,
        accumulate: bool,
    ) -> None:
        block_bytes = inner * block * itemsize
        column = 0
        if rows == 1 and columns * inner * itemsize <= _L1_BYTES:
            while columns - column >= 2 * block:
                run_tile(0, a_ptr, a_stride, a_step, w_ptr, out_ptr, out_stride, inner, accumulate)
                w_ptr += 2 * block_bytes
                out_ptr += 2 * block * itemsize
                column += 2 * block
        while column < columns:
            n = columns - column
            k = 0
            while k == 0 or k < inner:
                piece = min(inner - k, _PIECE)
                add = accumulate or k > 0
                a = a_ptr + k * a_step * itemsize
                w = w_ptr + k * block * itemsize
                out = out_ptr
                left = rows
                while left > 0:
                    # Tiles as equal as can be: 8 rows run as 4 + 4, not as 6 + 2.
                    tiles = (left + tallest - 1) // tallest
                    size = (left + tiles - 1) // tiles
                    if n >= block:
                        run_tile(size, a, a_stride, a_step, w, out, out_stride, piece, add)
                    else:
                        room = scratch()
                        if add:
                            copy_padded(out, out_stride, room, block, size, n)
                        run_tile(size, a, a_stride, a_step, w, room, block, piece, add)
                        copy_masked(room, block, out, out_stride, size, n)
                    a += size * a_stride * itemsize
                    out += size * out_stride * itemsize
                    left -= size
                k += _PIECE
            w_ptr += block_bytes
            out_ptr += block * itemsize
            column += block

    def pack(
        src_ptr: int, src_stride: int, inner: int, columns: int, transposed: bool, out_ptr: int
    ) -> None:
        for column in range(0, columns, block):
            if transposed:
                for i in range(0, block, lanes):
                    for k in range(0, inner, lanes):
                        transpose(
                            src_ptr + ((column + i) * src_stride + k) * itemsize,
                            src_stride,
                            columns - column - i,
                            inner - k,
                            out_ptr + (k * block + i) * itemsize,
                        )
            else:
                src = src_ptr + column * itemsize
                copy_padded(src, src_stride, out_ptr, block, inner, columns - column)
            out_ptr += inner * block * itemsize

    def packed_size(inner: int, columns: int) -> int:
        return -(-columns // block) * block * inner

    return {
        "gemm": _compiled(gemm, fingerprint),
        "pack": _compiled(pack, fingerprint),
        "packed_size": packed_size,
    }


def _copy_function(module: ir.Module, vec: Vec, masked: bool) -> ir.Function:
    """An LLVM function that copies the first n columns of rows of one block.

    With `masked` nothing is written past the n columns, else zeros up to the block's width.
    """
    name = f"fastseq_copy_f{vec.dtype.bitwidth}x{vec.lanes}_{'masked' if masked else 'padded'}"
    if name in module.globals:
        return module.globals[name]
    function = _new_function(module, name, [I64] * 6)
    src_ptr, src_stride, out_ptr, out_stride, rows, n = function.args
    start = function.append_basic_block("start")
    loop = function.append_basic_block("loop")
    body = function.append_basic_block("body")
    done = function.append_basic_block("done")
    builder = ir.IRBuilder(start)
    w = Writer(builder, vec)
    offsets = [I64(v * w.lanes) for v in range(BLOCK_VECTORS)]
    masks = [w.first(builder.sub(n, offset)) for offset in offsets]
    builder.branch(loop)
    builder.position_at_end(loop)
    row = builder.phi(I64)
    row.add_incoming(I64(0), start)
    builder.cbranch(builder.icmp_signed("<", row, rows), body, done)
    builder.position_at_end(body)
    source = w.pointer(src_ptr, builder.mul(row, src_stride))
    target = w.pointer(out_ptr, builder.mul(row, out_stride))
    for offset, mask in zip(offsets, masks, strict=True):
        value = w.load(w.pointer(source, offset), mask)
        w.store(value, w.pointer(target, offset), mask if masked else None)
    row.add_incoming(builder.add(row, I64(1)), body)
    builder.branch(loop)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def _copy(vec: Vec, masked: bool) -> Any:
    """The Numba function that calls `_copy_function`."""
    i64 = types.int64

    @intrinsic
    def copy(
        typingctx: Any,
        src_ptr: types.Type,
        src_stride: types.Type,
        out_ptr: types.Type,
        out_stride: types.Type,
        rows: types.Type,
        n: types.Type,
    ) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            builder.call(_copy_function(builder.module, vec, masked), args)
            return context.get_dummy_value()

        return types.void(*[i64] * 6), lower

    return copy


def _transpose_function(module: ir.Module, vec: Vec) -> ir.Function:
    """An LLVM function that transposes one tile of LANES by LANES values in registers."""
    name = f"fastseq_transpose_f{vec.dtype.bitwidth}x{vec.lanes}"
    if name in module.globals:
        return module.globals[name]
    function = _new_function(module, name, [I64] * 5)
    src_ptr, src_stride, rows, columns, out_ptr = function.args

    start = function.append_basic_block("start")
    builder = ir.IRBuilder(start)
    w = Writer(builder, vec)
    lanes = range(w.lanes)
    source = [w.pointer(src_ptr, builder.mul(src_stride, I64(row))) for row in lanes]
    target = [w.pointer(out_ptr, I64(c * BLOCK_VECTORS * w.lanes)) for c in lanes]
    whole = builder.and_(
        builder.icmp_signed(">=", rows, I64(w.lanes)),
        builder.icmp_signed(">=", columns, I64(w.lanes)),
    )
    read = function.append_basic_block("read")
    read_part = function.append_basic_block("read_part")
    shuffle = function.append_basic_block("shuffle")
    builder.cbranch(whole, read, read_part)
    builder.position_at_end(read)
    full = [w.load(pointer) for pointer in source]
    builder.branch(shuffle)
    builder.position_at_end(read_part)
    part = []
    for row in lanes:
        inside = builder.icmp_signed("<", I64(row), rows)
        part.append(w.load(source[row], w.first(builder.select(inside, columns, I64(0)))))
    builder.branch(shuffle)

    builder.position_at_end(shuffle)
    values = [builder.phi(w.type) for _ in lanes]
    for phi, from_full, from_part in zip(values, full, part, strict=True):
        phi.add_incoming(from_full, read)
        phi.add_incoming(from_part, read_part)
    # Interleaving vector i with vector i + LANES / 2, log2(LANES) times, is the transpose.
    half = w.lanes // 2
    indices = ir.VectorType(I32, w.lanes)
    low = ir.Constant(indices, [i // 2 + w.lanes * (i % 2) for i in lanes])
    high = ir.Constant(indices, [i // 2 + w.lanes * (i % 2) + half for i in lanes])
    for _ in range(half.bit_length()):
        values = [
            builder.shuffle_vector(values[i], values[i + half], pick)
            for i in range(half)
            for pick in (low, high)
        ]
    done = function.append_basic_block("done")
    for c in lanes:
        write = function.append_basic_block("write")
        builder.cbranch(builder.icmp_signed("<", I64(c), columns), write, done)
        builder.position_at_end(write)
        w.store(values[c], target[c])
    builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return function
