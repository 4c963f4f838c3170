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
order. So the bits of a result
do not depend on where in the row, the tile or the batch it sits. `a * b + c` is a product and a
sum, each rounded.
"""

from __future__ import annotations

import functools
import hashlib
import operator
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numba
import numba.extending
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import register_model

__all__ = ["JIT", "Vec", "simd"]

# The options of every kernel. No fast-math: the bits are those of the text.
JIT: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": False,
    "boundscheck": False,
}

# Untyped on purpose: an intrinsic declares its arguments as types, and its callers pass values.
intrinsic: Any = numba.extending.intrinsic

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class Vec(types.Type):
    """The Numba type of a SIMD vector: `lanes` values of a float type."""

    def __init__(self, dtype: types.Float, lanes: int) -> None:
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(name=f"Vec({dtype}, {lanes})")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, _llvm_vector(fe_type))


def _llvm_scalar(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def _llvm_vector(vec: Vec) -> ir.VectorType:
    return ir.VectorType(_llvm_scalar(vec.dtype), vec.lanes)


@functools.cache
def _target_features() -> frozenset[str]:
    """The features that Numba compiles for: the host's, or what its NUMBA_CPU_* options say."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


def _vector_bytes() -> int:
    features = _target_features()
    if "avx512f" in features:
        return 64
    return 32 if "avx" in features else 16


def _is_arm64() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _has_fma() -> bool:
    # Without the instruction, llvm.fma calls libm once for every lane.
    return "fma" in _target_features() or _is_arm64()


def _has_32_registers() -> bool:
    return "avx512f" in _target_features() or _is_arm64()


class _Writer:
    """Writes arithmetic on values of one `Vec` type into the LLVM function being built."""

    def __init__(self, builder: ir.IRBuilder, vec: Vec) -> None:
        self.builder = builder
        self.lanes = vec.lanes
        self.bits = vec.dtype.bitwidth
        self.scalar = _llvm_scalar(vec.dtype)
        self.type = _llvm_vector(vec)
        self.suffix = f"v{self.lanes}f{self.bits}"
        self.add = builder.fadd
        self.sub = builder.fsub
        self.mul = builder.fmul
        self.div = builder.fdiv

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        function_type = ir.FunctionType(result, [arg.type for arg in args])
        function = cgutils.get_or_insert_function(self.builder.module, function_type, name)
        return self.builder.call(function, args)

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [value] * self.lanes)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        if not _has_fma():
            return self.add(self.mul(a, b), c)
        return self.call(f"llvm.fma.{self.suffix}", self.type, a, b, c)

    def polynomial(self, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
        result = self.constant(coefficients[-1])
        for coefficient in coefficients[-2::-1]:
            result = self.fma(result, x, self.constant(coefficient))
        return result

    def at_least(self, x: ir.Value, low: float) -> ir.Value:
        """max(x, low); NaN stays NaN."""
        bound = self.constant(low)
        return self.builder.select(self.builder.fcmp_ordered("<", x, bound), bound, x)

    def at_most(self, x: ir.Value, high: float) -> ir.Value:
        """min(x, high); NaN stays NaN."""
        bound = self.constant(high)
        return self.builder.select(self.builder.fcmp_ordered(">", x, bound), bound, x)

    def bit_operation(self, name: str, *args: ir.Value | int) -> ir.Value:
        """An integer operation of the builder on the bits of vectors and on constants."""
        int_type = ir.VectorType(ir.IntType(self.bits), self.lanes)
        operands = [
            ir.Constant(int_type, [arg] * self.lanes)
            if isinstance(arg, int)
            else self.builder.bitcast(arg, int_type)
            for arg in args
        ]
        return self.builder.bitcast(getattr(self.builder, name)(*operands), self.type)

    def broadcast(self, scalar: ir.Value) -> ir.Value:
        vector = ir.VectorType(scalar.type, self.lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, scalar, _I32(0))
        zeros = ir.Constant(ir.VectorType(_I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def pointer(self, address: ir.Value, index: ir.Value) -> ir.Value:
        """The pointer to element `index` after an integer address or a pointer."""
        if isinstance(address.type, ir.IntType):
            address = self.builder.inttoptr(address, self.scalar.as_pointer())
        return self.builder.gep(address, [index])

    def first(self, n: ir.Value) -> ir.Value:
        """The mask of the first n lanes: none of them where n < 1, all where n is large."""
        # 32-bit lanes: one comparison where 64-bit ones take two and a merge of their masks.
        most = _I64(self.lanes)
        n = self.builder.select(self.builder.icmp_signed("<", n, most), n, most)
        lane = ir.Constant(ir.VectorType(_I32, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lane, self.broadcast(self.builder.trunc(n, _I32)))

    def load(self, pointer: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        pointer = self.builder.bitcast(pointer, self.type.as_pointer())
        align = self.bits // 8
        if mask is None:
            return self.builder.load(pointer, align=align)
        name = f"llvm.masked.load.{self.suffix}.p0"
        return self.call(name, self.type, pointer, _I32(align), mask, self.constant(0.0))

    def store(self, value: ir.Value, pointer: ir.Value, mask: ir.Value | None = None) -> None:
        pointer = self.builder.bitcast(pointer, self.type.as_pointer())
        align = self.bits // 8
        if mask is None:
            self.builder.store(value, pointer, align=align)
        else:
            name = f"llvm.masked.store.{self.suffix}.p0"
            self.call(name, ir.VoidType(), value, pointer, _I32(align), mask)


# The arithmetic of Vec: + - * and unary minus.


class _VecBinary(AbstractTemplate):
    def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
        if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
            return signature(args[0], *args)
        return None


class _VecUnary(AbstractTemplate):
    def generic(self, args: tuple[types.Type, ...], kws: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], Vec):
            return signature(args[0], *args)
        return None


def _register_operator(function: Any, template: type, method: str, arity: int) -> None:
    # One subclass for each operator: Numba writes the operator into the class as its key.
    infer_global(function)(type(f"_Vec_{function.__name__}", (template,), {}))

    @lower_builtin(function, *[Vec] * arity)
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return getattr(builder, method)(*args)


_register_operator(operator.add, _VecBinary, "fadd", 2)
_register_operator(operator.sub, _VecBinary, "fsub", 2)
_register_operator(operator.mul, _VecBinary, "fmul", 2)
_register_operator(operator.neg, _VecUnary, "fneg", 1)


# The vocabulary. Errors in ULP stand in tests/test_numba_vocabulary.py.


@dataclass(frozen=True)
class _Exp:
    """The numbers behind exp, sigmoid and tanh in one float type.

    exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2, exp(r) = 1 + r + r^2 q(r).
    `q` is the minimax polynomial; what it adds to the relative error of exp(r) is 7e-9 in float32
    and 1.3e-17 in float64. n * ln2_high is exact even without a fused multiply-add.
    """

    mantissa: int
    bias: int
    ln2_high: float
    ln2_low: float
    exp_low: float
    exp_high: float
    sigmoid_limit: float
    tanh_limit: float
    q: tuple[float, ...]


_EXP = {
    32: _Exp(
        mantissa=23,
        bias=127,
        ln2_high=0.693359375,
        ln2_low=-2.12194440e-4,
        exp_low=-104.0,
        exp_high=89.0,
        sigmoid_limit=88.0,
        tanh_limit=20.0,
        q=(
            0.5,
            0.16666576266288757,
            0.04166637361049652,
            0.008363180793821812,
            0.0013941123615950346,
        ),
    ),
    64: _Exp(
        mantissa=52,
        bias=1023,
        ln2_high=6.93147180369123816490e-01,
        ln2_low=1.90821492927058770002e-10,
        exp_low=-746.0,
        exp_high=710.0,
        sigmoid_limit=709.0,
        tanh_limit=40.0,
        q=(
            0.5000000000000001,
            0.16666666666666674,
            0.04166666666662412,
            0.008333333333322208,
            0.0013888888917215384,
            0.00019841269886586277,
            2.4801521293745646e-05,
            2.755724234223733e-06,
            2.7620089361777497e-07,
            2.5110047746466714e-08,
        ),
    ),
}
_LOG2_E = 1.4426950408889634


def _split_exp(w: _Writer, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(t, r, q(r)) of exp(x): the low bits of t hold n + bias.

    Adding 1.5 * 2^mantissa leaves the rounded n in the low bits of the sum; with the bias added to
    it as well, one shift of t makes 2^n.
    """
    e = _EXP[w.bits]
    rounder = w.constant(1.5 * 2.0**e.mantissa + e.bias)
    t = w.fma(x, w.constant(_LOG2_E), rounder)
    n = w.sub(t, rounder)
    r = w.fma(n, w.constant(-e.ln2_high), x)
    r = w.fma(n, w.constant(-e.ln2_low), r)
    return t, r, w.polynomial(r, e.q)


def _exp(w: _Writer, x: ir.Value) -> ir.Value:
    e = _EXP[w.bits]
    x = w.at_most(w.at_least(x, e.exp_low), e.exp_high)
    t, r, q = _split_exp(w, x)
    one = w.constant(1.0)
    p = w.fma(w.fma(q, r, one), r, one)
    # 2^n in two factors, so that the result overflows to inf and underflows through denormals,
    # rounded once. n + bias is brought back from the low bits of t with its sign.
    spare = w.bits - e.mantissa + 1
    n = w.bit_operation("ashr", w.bit_operation("shl", t, spare), spare)
    n = w.bit_operation("sub", n, e.bias)
    half = w.bit_operation("ashr", n, 1)
    rest = w.bit_operation("sub", n, half)
    for part in (half, rest):
        biased = w.bit_operation("add", part, e.bias)
        p = w.mul(p, w.bit_operation("shl", biased, e.mantissa))
    return p


def _sigmoid(w: _Writer, x: ir.Value) -> ir.Value:
    # exp(x) / (1 + exp(x)). At the lower limit 2^n comes out as 0, so that what would be
    # denormal is 0; at the upper one exp(x) is finite.
    e = _EXP[w.bits]
    x = w.at_most(w.at_least(x, -e.sigmoid_limit), e.sigmoid_limit)
    t, r, q = _split_exp(w, x)
    one = w.constant(1.0)
    p = w.fma(w.fma(q, r, one), r, one)
    exp = w.mul(p, w.bit_operation("shl", t, e.mantissa))
    return w.div(exp, w.add(exp, one))


def _tanh(w: _Writer, x: ir.Value) -> ir.Value:
    # With m = exp(2|x|) - 1, tanh|x| = m / (m + 2). m = 2^n (exp(r) - 1) + (2^n - 1) with n >= 0,
    # so nothing cancels and near 0 the relative accuracy is kept.
    e = _EXP[w.bits]
    sign_bit = -(1 << (w.bits - 1))
    size = w.bit_operation("and_", x, ~sign_bit)
    t, r, q = _split_exp(w, w.at_most(w.add(size, size), e.tanh_limit))
    scale = w.bit_operation("shl", t, e.mantissa)
    p = w.fma(w.mul(r, r), q, r)
    m = w.fma(scale, p, w.sub(scale, w.constant(1.0)))
    y = w.div(m, w.add(m, w.constant(2.0)))
    return w.bit_operation("or_", y, w.bit_operation("and_", x, sign_bit))


def _relu(w: _Writer, x: ir.Value) -> ir.Value:
    return w.at_least(x, 0.0)


def _dsigmoid(w: _Writer, y: ir.Value) -> ir.Value:
    return w.mul(y, w.sub(w.constant(1.0), y))


def _dtanh(w: _Writer, y: ir.Value) -> ir.Value:
    # 1 - y * y, without its cancellation near |y| = 1 where there is no fused multiply-add.
    one = w.constant(1.0)
    return w.mul(w.sub(one, y), w.add(one, y))


def _drelu(w: _Writer, y: ir.Value) -> ir.Value:
    zero = w.constant(0.0)
    return w.builder.select(w.builder.fcmp_ordered("<=", y, zero), zero, w.constant(1.0))


def _unary(write: Callable[[_Writer, ir.Value], ir.Value]) -> Any:
    """The Numba function Vec -> Vec that `write` puts into LLVM."""

    def typer(typingctx: Any, x: types.Type) -> Any:
        return (x(x), lower) if isinstance(x, Vec) else None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return write(_Writer(builder, sig.return_type), *args)

    typer.__name__ = write.__name__.lstrip("_")
    return intrinsic(typer)


@intrinsic
def _fma(typingctx: Any, a: types.Type, b: types.Type, c: types.Type) -> Any:
    if not (isinstance(a, Vec) and a == b == c):
        return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return _Writer(builder, sig.return_type).fma(*args)

    return a(a, b, c), lower


_VOCABULARY = {
    "exp": _unary(_exp),
    "sigmoid": _unary(_sigmoid),
    "tanh": _unary(_tanh),
    "relu": _unary(_relu),
    "dsigmoid": _unary(_dsigmoid),
    "dtanh": _unary(_dtanh),
    "drelu": _unary(_drelu),
    "fma": _fma,
}


# Memory. An address is an int64, and the float type comes from the vocabulary.


def _memory(vec: Vec) -> dict[str, Any]:
    """load, store, their tails and scalars, and splat, of one Vec type."""
    i64, scalar = types.int64, vec.dtype

    @intrinsic
    def load(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = _Writer(builder, vec)
            return w.load(w.pointer(*args))

        return vec(i64, i64), lower

    @intrinsic
    def load_part(typingctx: Any, ptr: types.Type, i: types.Type, n: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = _Writer(builder, vec)
            return w.load(w.pointer(args[0], args[1]), w.first(args[2]))

        return vec(i64, i64, i64), lower

    @intrinsic
    def load1(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return builder.load(_Writer(builder, vec).pointer(*args), align=vec.dtype.bitwidth // 8)

        return scalar(i64, i64), lower

    @intrinsic
    def store(typingctx: Any, ptr: types.Type, i: types.Type, value: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = _Writer(builder, vec)
            w.store(args[2], w.pointer(args[0], args[1]))
            return context.get_dummy_value()

        return (types.void(i64, i64, vec), lower) if value == vec else None

    @intrinsic
    def store_part(
        typingctx: Any, ptr: types.Type, i: types.Type, value: types.Type, n: types.Type
    ) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = _Writer(builder, vec)
            w.store(args[2], w.pointer(args[0], args[1]), w.first(args[3]))
            return context.get_dummy_value()

        return (types.void(i64, i64, vec, i64), lower) if value == vec else None

    @intrinsic
    def store1(typingctx: Any, ptr: types.Type, i: types.Type, value: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            pointer = _Writer(builder, vec).pointer(args[0], args[1])
            builder.store(args[2], pointer, align=vec.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(i64, i64, scalar), lower

    @intrinsic
    def splat(typingctx: Any, value: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return _Writer(builder, vec).broadcast(args[0])

        return vec(scalar), lower

    return {
        "load": load,
        "load_part": load_part,
        "load1": load1,
        "store": store,
        "store_part": store_part,
        "store1": store1,
        "splat": splat,
    }


@intrinsic
def _load_int(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.int64(types.int64, types.int64), lower


@intrinsic
def _load_byte(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load(builder.gep(pointer, [args[1]])), _I64)

    return types.int64(types.int64, types.int64), lower


@intrinsic
def _take(typingctx: Any, ptr: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _I64(1), "monotonic")

    return types.int64(types.int64), lower


_INTEGERS = {"load_int": _load_int, "load_byte": _load_byte, "take": _take}


# Products. Weights are packed as [block of BLOCK columns][k][BLOCK], the last block padded with
# zeros: one k of a block is _BLOCK_VECTORS vectors, which all rows of a tile share.

_BLOCK_VECTORS = 4
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

    It owns its tile of out: rows * blocks * _BLOCK_VECTORS accumulators stay in registers for all
    k. It is a function of its own, not inlined, so that the registers of each tile are allocated
    apart from everything else.
    """
    name = f"fastseq_tile_f{vec.dtype.bitwidth}x{vec.lanes}_{rows}x{blocks}"
    if name in module.globals:
        return module.globals[name]
    function = _new_function(module, name, [_I64] * (_TILE_ARGUMENTS - 1) + [ir.IntType(1)])
    a_ptr, a_stride, a_step, w_ptr, out_ptr, out_stride, inner, accumulate = function.args

    start = function.append_basic_block("start")
    loop = function.append_basic_block("loop")
    body = function.append_basic_block("body")
    done = function.append_basic_block("done")
    add = function.append_basic_block("add")
    write = function.append_basic_block("write")
    builder = ir.IRBuilder(start)
    w = _Writer(builder, vec)
    width = _BLOCK_VECTORS * w.lanes
    tile = [(row, v) for row in range(rows) for v in range(blocks * _BLOCK_VECTORS)]
    a_row = [w.pointer(a_ptr, builder.mul(a_stride, _I64(row))) for row in range(rows)]
    out_row = [w.pointer(out_ptr, builder.mul(out_stride, _I64(row))) for row in range(rows)]
    block_size = builder.mul(inner, _I64(width))
    w_block = [w.pointer(w_ptr, builder.mul(block_size, _I64(b))) for b in range(blocks)]
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(_I64)
    sums = [builder.phi(w.type) for _ in tile]
    builder.cbranch(builder.icmp_signed("<", k, inner), body, done)

    builder.position_at_end(body)
    line = builder.mul(k, _I64(width))
    at = builder.mul(k, a_step)

    def weight(block: ir.Value, v: int) -> ir.Value:
        return w.pointer(block, builder.add(line, _I64(v * w.lanes)))

    if rows == blocks == 1:
        for v in range(_BLOCK_VECTORS):
            ahead = weight(w_block[0], v + _PREFETCH_AHEAD * _BLOCK_VECTORS)
            w.call("llvm.prefetch.p0", ir.VoidType(), ahead, _I32(0), _I32(3), _I32(1))

    def a_value(row: int) -> ir.Value:
        return w.broadcast(builder.load(w.pointer(a_row[row], at)))

    def w_value(v: int) -> ir.Value:
        return w.load(weight(w_block[v // _BLOCK_VECTORS], v % _BLOCK_VECTORS))

    # The shorter side of the tile is held in registers, the other is read next to its use. The
    # other way round, 6 rows spill 32 registers and 3 rows spill 16: 0.6 of the speed.
    sum_of = dict(zip(tile, sums, strict=True))
    new: dict[tuple[int, int], ir.Value] = {}
    if rows < _BLOCK_VECTORS:
        held = [a_value(row) for row in range(rows)]
        for v in range(blocks * _BLOCK_VECTORS):
            value = w_value(v)
            for row in range(rows):
                new[row, v] = w.fma(held[row], value, sum_of[row, v])
    else:
        held = [w_value(v) for v in range(blocks * _BLOCK_VECTORS)]
        for row in range(rows):
            value = a_value(row)
            for v in range(blocks * _BLOCK_VECTORS):
                new[row, v] = w.fma(value, held[v], sum_of[row, v])
    next_k = builder.add(k, _I64(1))
    builder.branch(loop)

    for phi, first, following in zip(
        [k, *sums],
        [_I64(0)] + [w.constant(0.0)] * len(tile),
        [next_k, *(new[key] for key in tile)],
        strict=True,
    ):
        phi.add_incoming(first, start)
        phi.add_incoming(following, body)

    builder.position_at_end(done)
    out = [w.pointer(out_row[row], _I64(v * w.lanes)) for row, v in tile]
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


def _products(vec: Vec, fingerprint: str) -> dict[str, Any]:
    """gemm, pack and packed_size of one Vec type."""
    i64, flag = types.int64, types.boolean
    itemsize = vec.dtype.bitwidth // 8
    tallest = 6 if _has_32_registers() else 3
    lanes = vec.lanes
    block = _BLOCK_VECTORS * lanes
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
                switch.add_case(_I64(i), case)
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
            room = ir.ArrayType(_llvm_vector(vec), tallest * _BLOCK_VECTORS)
            return builder.ptrtoint(cgutils.alloca_once(builder, room), _I64)

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
    function = _new_function(module, name, [_I64] * 6)
    src_ptr, src_stride, out_ptr, out_stride, rows, n = function.args
    start = function.append_basic_block("start")
    loop = function.append_basic_block("loop")
    body = function.append_basic_block("body")
    done = function.append_basic_block("done")
    builder = ir.IRBuilder(start)
    w = _Writer(builder, vec)
    offsets = [_I64(v * w.lanes) for v in range(_BLOCK_VECTORS)]
    masks = [w.first(builder.sub(n, offset)) for offset in offsets]
    builder.branch(loop)
    builder.position_at_end(loop)
    row = builder.phi(_I64)
    row.add_incoming(_I64(0), start)
    builder.cbranch(builder.icmp_signed("<", row, rows), body, done)
    builder.position_at_end(body)
    source = w.pointer(src_ptr, builder.mul(row, src_stride))
    target = w.pointer(out_ptr, builder.mul(row, out_stride))
    for offset, mask in zip(offsets, masks, strict=True):
        value = w.load(w.pointer(source, offset), mask)
        w.store(value, w.pointer(target, offset), mask if masked else None)
    row.add_incoming(builder.add(row, _I64(1)), body)
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
    function = _new_function(module, name, [_I64] * 5)
    src_ptr, src_stride, rows, columns, out_ptr = function.args

    start = function.append_basic_block("start")
    builder = ir.IRBuilder(start)
    w = _Writer(builder, vec)
    lanes = range(w.lanes)
    source = [w.pointer(src_ptr, builder.mul(src_stride, _I64(row))) for row in lanes]
    target = [w.pointer(out_ptr, _I64(c * _BLOCK_VECTORS * w.lanes)) for c in lanes]
    whole = builder.and_(
        builder.icmp_signed(">=", rows, _I64(w.lanes)),
        builder.icmp_signed(">=", columns, _I64(w.lanes)),
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
        inside = builder.icmp_signed("<", _I64(row), rows)
        part.append(w.load(source[row], w.first(builder.select(inside, columns, _I64(0)))))
    builder.branch(shuffle)

    builder.position_at_end(shuffle)
    values = [builder.phi(w.type) for _ in lanes]
    for phi, from_full, from_part in zip(values, full, part, strict=True):
        phi.add_incoming(from_full, read)
        phi.add_incoming(from_part, read_part)
    # Interleaving vector i with vector i + LANES / 2, log2(LANES) times, is the transpose.
    half = w.lanes // 2
    indices = ir.VectorType(_I32, w.lanes)
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
        builder.cbranch(builder.icmp_signed("<", _I64(c), columns), write, done)
        builder.position_at_end(write)
        w.store(values[c], target[c])
    builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


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
    load_int(ptr, i), load_byte(ptr, i)
                                of int64 and of uint8, whatever the dtype
    take(ptr)                   the int64 there, which it then counts up, atomically
    v + v, v - v, v * v, -v, fma(v, v, v)
    sigmoid, tanh, exp, relu    of v; NaN stays NaN
    dsigmoid, dtanh, drelu      derivatives, of the output y; drelu(NaN) is 1: as in torch, a
                                gradient passes where y <= 0 is false

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
        Names the dtype, the lanes and this file's text: Numba's disk cache sees none of them, so
        a kernel with cache=True must carry it in its __qualname__.
    """
    dtype = np.dtype(dtype)
    numba_types: dict[Any, Any] = {
        np.dtype(np.float32): types.float32,
        np.dtype(np.float64): types.float64,
    }
    if dtype not in numba_types:
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    vec = Vec(numba_types[dtype], lanes or _vector_bytes() // dtype.itemsize)
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    fingerprint = f"{dtype}x{vec.lanes}_{source[:16]}"
    return SimpleNamespace(
        LANES=vec.lanes,
        ITEMSIZE=dtype.itemsize,
        BLOCK=_BLOCK_VECTORS * vec.lanes,
        fingerprint=fingerprint,
        **_memory(vec),
        **_INTEGERS,
        **_VOCABULARY,
        **_products(vec, fingerprint),
    )
