"""Vectors in registers for Numba: the type, its arithmetic, a cell's vocabulary, and memory.

Each operation is written as LLVM IR, lane by lane the same instructions, those of a masked tail
included. :mod:`.numba_simd` puts the names together.
"""

from __future__ import annotations

import functools
import operator
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba.extending
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.imputils import lower_builtin
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import register_model

# The options of every kernel. No fast-math: the bits are those of the text.
JIT: dict[str, Any] = {
    "nogil": True,
    "error_model": "numpy",
    "fastmath": False,
    "boundscheck": False,
}

# Untyped on purpose: an intrinsic declares its arguments as types, and its callers pass values.
intrinsic: Any = numba.extending.intrinsic

I32 = ir.IntType(32)
I64 = ir.IntType(64)


class Vec(types.Type):
    """The Numba type of a SIMD vector: `lanes` values of a float type."""

    def __init__(self, dtype: types.Float, lanes: int) -> None:
        self.dtype = dtype
        self.lanes = lanes
        super().__init__(name=f"Vec({dtype}, {lanes})")


@register_model(Vec)
class _VecModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, llvm_vector(fe_type))


def _llvm_scalar(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def llvm_vector(vec: Vec) -> ir.VectorType:
    return ir.VectorType(_llvm_scalar(vec.dtype), vec.lanes)


@functools.cache
def _target_features() -> frozenset[str]:
    """The features that Numba compiles for: the host's, or what its NUMBA_CPU_* options say."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))


def vector_bytes() -> int:
    features = _target_features()
    if "avx512f" in features:
        return 64
    return 32 if "avx" in features else 16


def _is_arm64() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _has_fma() -> bool:
    # Without the instruction, llvm.fma calls libm once for every lane.
    return "fma" in _target_features() or _is_arm64()


def has_32_registers() -> bool:
    return "avx512f" in _target_features() or _is_arm64()


def called(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    """A call of one of LLVM's own functions."""
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    function = cgutils.get_or_insert_function(builder.module, function_type, name)
    return builder.call(function, args)


def splatted(builder: ir.IRBuilder, scalar: ir.Value, lanes: int) -> ir.Value:
    """A vector with the same number in every lane."""
    vector = ir.VectorType(scalar.type, lanes)
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(first, undefined, zeros)


def first_lanes(builder: ir.IRBuilder, n: ir.Value, lanes: int) -> ir.Value:
    """The mask of the first n lanes: none of them where n < 1, all where n is large."""
    # 32-bit lanes: one comparison where 64-bit ones take two and a merge of their masks.
    most = I64(lanes)
    n = builder.select(builder.icmp_signed("<", n, most), n, most)
    lane = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
    return builder.icmp_signed("<", lane, splatted(builder, builder.trunc(n, I32), lanes))


class Writer:
    """Writes arithmetic on values of one `Vec` type into the LLVM function being built."""

    def __init__(self, builder: ir.IRBuilder, vec: Vec) -> None:
        self.builder = builder
        self.lanes = vec.lanes
        self.bits = vec.dtype.bitwidth
        self.scalar = _llvm_scalar(vec.dtype)
        self.type = llvm_vector(vec)
        self.suffix = f"v{self.lanes}f{self.bits}"
        self.add = builder.fadd
        self.sub = builder.fsub
        self.mul = builder.fmul
        self.div = builder.fdiv

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        return called(self.builder, name, result, *args)

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
        return splatted(self.builder, scalar, self.lanes)

    def pointer(self, address: ir.Value, index: ir.Value) -> ir.Value:
        """The pointer to element `index` after an integer address or a pointer."""
        if isinstance(address.type, ir.IntType):
            address = self.builder.inttoptr(address, self.scalar.as_pointer())
        return self.builder.gep(address, [index])

    def first(self, n: ir.Value) -> ir.Value:
        return first_lanes(self.builder, n, self.lanes)

    def load(self, pointer: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        pointer = self.builder.bitcast(pointer, self.type.as_pointer())
        align = self.bits // 8
        if mask is None:
            return self.builder.load(pointer, align=align)
        name = f"llvm.masked.load.{self.suffix}.p0"
        return self.call(name, self.type, pointer, I32(align), mask, self.constant(0.0))

    def store(self, value: ir.Value, pointer: ir.Value, mask: ir.Value | None = None) -> None:
        pointer = self.builder.bitcast(pointer, self.type.as_pointer())
        align = self.bits // 8
        if mask is None:
            self.builder.store(value, pointer, align=align)
        else:
            name = f"llvm.masked.store.{self.suffix}.p0"
            self.call(name, ir.VoidType(), value, pointer, I32(align), mask)


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

#: log1p(t) = s + s w g(w) with s = 2 t / (2 + t), w = s^2, for 0 <= t <= 1. g is the minimax
#: polynomial; what it adds to the relative error is 5e-9 in float32 and 1.4e-18 in float64.
_LOG1P = {
    32: (0.08333301544189453, 0.01250678114593029, 0.0021874329540878534, 0.0005473527126014233),
    64: (
        0.08333333333333288,
        0.012500000000049144,
        0.0022321428553009983,
        0.00043402781190950303,
        8.877804650658325e-05,
        1.8782421773348337e-05,
        4.059135077360162e-06,
        9.236208645175118e-07,
        1.590751205243499e-07,
        8.115072007421204e-08,
    ),
}


def _split_exp(w: Writer, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
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


def _exp(w: Writer, x: ir.Value) -> ir.Value:
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


def _sigmoid(w: Writer, x: ir.Value) -> ir.Value:
    # exp(x) / (1 + exp(x)). At the lower limit 2^n comes out as 0, so that what would be
    # denormal is 0; at the upper one exp(x) is finite.
    e = _EXP[w.bits]
    x = w.at_most(w.at_least(x, -e.sigmoid_limit), e.sigmoid_limit)
    t, r, q = _split_exp(w, x)
    one = w.constant(1.0)
    p = w.fma(w.fma(q, r, one), r, one)
    exp = w.mul(p, w.bit_operation("shl", t, e.mantissa))
    return w.div(exp, w.add(exp, one))


def _tanh(w: Writer, x: ir.Value) -> ir.Value:
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


def _relu(w: Writer, x: ir.Value) -> ir.Value:
    return w.at_least(x, 0.0)


def _reciprocal(w: Writer, x: ir.Value) -> ir.Value:
    return w.div(w.constant(1.0), x)


def _maximum(w: Writer, a: ir.Value, b: ir.Value) -> ir.Value:
    """NaN where either is."""
    larger = w.builder.select(w.builder.fcmp_ordered("<", a, b), b, a)
    return w.builder.select(w.builder.fcmp_unordered("uno", b, b), b, larger)


def _logsigmoid(w: Writer, x: ir.Value) -> ir.Value:
    # min(x, 0) - log1p(exp(-|x|)). s is t where t is denormal.
    t = _exp(w, w.bit_operation("or_", x, -(1 << (w.bits - 1))))
    s = w.div(w.add(t, t), w.add(t, w.constant(2.0)))
    square = w.mul(s, s)
    log1p = w.fma(w.mul(square, w.polynomial(square, _LOG1P[w.bits])), s, s)
    return w.sub(w.at_most(x, 0.0), log1p)


def _sqrt(w: Writer, x: ir.Value) -> ir.Value:
    return w.call(f"llvm.sqrt.{w.suffix}", w.type, x)


def _dmaximum(w: Writer, a: ir.Value, b: ir.Value) -> ir.Value:
    equal = w.builder.fcmp_ordered("==", a, b)
    slope = w.builder.select(equal, w.constant(0.5), w.constant(1.0))
    return w.builder.select(w.builder.fcmp_ordered("<", a, b), w.constant(0.0), slope)


def _dlogsigmoid(w: Writer, y: ir.Value) -> ir.Value:
    # 1 - exp(y) = (1 - 2^n) - 2^n (exp(r) - 1) with n <= 0, so that nothing cancels.
    e = _EXP[w.bits]
    y = w.at_most(w.at_least(y, -e.sigmoid_limit), 0.0)
    t, r, q = _split_exp(w, y)
    scale = w.bit_operation("shl", t, e.mantissa)
    p = w.fma(w.mul(r, r), q, r)
    return w.sub(w.sub(w.constant(1.0), scale), w.mul(scale, p))


def _dsqrt(w: Writer, y: ir.Value) -> ir.Value:
    return w.div(w.constant(0.5), y)


def _dsigmoid(w: Writer, y: ir.Value) -> ir.Value:
    return w.mul(y, w.sub(w.constant(1.0), y))


def _dtanh(w: Writer, y: ir.Value) -> ir.Value:
    # 1 - y * y, without its cancellation near |y| = 1 where there is no fused multiply-add.
    one = w.constant(1.0)
    return w.mul(w.sub(one, y), w.add(one, y))


def _drelu(w: Writer, y: ir.Value) -> ir.Value:
    zero = w.constant(0.0)
    return w.builder.select(w.builder.fcmp_ordered("<=", y, zero), zero, w.constant(1.0))


def _unary(write: Callable[[Writer, ir.Value], ir.Value]) -> Any:
    """The Numba function Vec -> Vec that `write` puts into LLVM."""

    def typer(typingctx: Any, x: types.Type) -> Any:
        return (x(x), lower) if isinstance(x, Vec) else None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return write(Writer(builder, sig.return_type), *args)

    typer.__name__ = write.__name__.lstrip("_")
    return intrinsic(typer)


def _binary(write: Callable[[Writer, ir.Value, ir.Value], ir.Value]) -> Any:
    """The same of two vectors."""

    def typer(typingctx: Any, a: types.Type, b: types.Type) -> Any:
        return (a(a, b), lower) if isinstance(a, Vec) and a == b else None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return write(Writer(builder, sig.return_type), *args)

    typer.__name__ = write.__name__.lstrip("_")
    return intrinsic(typer)


@intrinsic
def _fma(typingctx: Any, a: types.Type, b: types.Type, c: types.Type) -> Any:
    if not (isinstance(a, Vec) and a == b == c):
        return None

    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return Writer(builder, sig.return_type).fma(*args)

    return a(a, b, c), lower


VOCABULARY = {
    "exp": _unary(_exp),
    "sigmoid": _unary(_sigmoid),
    "tanh": _unary(_tanh),
    "relu": _unary(_relu),
    "reciprocal": _unary(_reciprocal),
    "maximum": _binary(_maximum),
    "logsigmoid": _unary(_logsigmoid),
    "sqrt": _unary(_sqrt),
    "dsigmoid": _unary(_dsigmoid),
    "dtanh": _unary(_dtanh),
    "drelu": _unary(_drelu),
    "dmaximum": _binary(_dmaximum),
    "dlogsigmoid": _unary(_dlogsigmoid),
    "dsqrt": _unary(_dsqrt),
    "fma": _fma,
}


# Memory. An address is an int64, and the float type comes from the vocabulary.


def memory(vec: Vec) -> dict[str, Any]:
    """load, store, their tails and scalars, and splat, of one Vec type."""
    i64, scalar = types.int64, vec.dtype

    @intrinsic
    def load(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = Writer(builder, vec)
            return w.load(w.pointer(*args))

        return vec(i64, i64), lower

    @intrinsic
    def load_part(typingctx: Any, ptr: types.Type, i: types.Type, n: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = Writer(builder, vec)
            return w.load(w.pointer(args[0], args[1]), w.first(args[2]))

        return vec(i64, i64, i64), lower

    @intrinsic
    def load1(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return builder.load(Writer(builder, vec).pointer(*args), align=vec.dtype.bitwidth // 8)

        return scalar(i64, i64), lower

    @intrinsic
    def store(typingctx: Any, ptr: types.Type, i: types.Type, value: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = Writer(builder, vec)
            w.store(args[2], w.pointer(args[0], args[1]))
            return context.get_dummy_value()

        return (types.void(i64, i64, vec), lower) if value == vec else None

    @intrinsic
    def store_part(
        typingctx: Any, ptr: types.Type, i: types.Type, value: types.Type, n: types.Type
    ) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            w = Writer(builder, vec)
            w.store(args[2], w.pointer(args[0], args[1]), w.first(args[3]))
            return context.get_dummy_value()

        return (types.void(i64, i64, vec, i64), lower) if value == vec else None

    @intrinsic
    def store1(typingctx: Any, ptr: types.Type, i: types.Type, value: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            pointer = Writer(builder, vec).pointer(args[0], args[1])
            builder.store(args[2], pointer, align=vec.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(i64, i64, scalar), lower

    @intrinsic
    def splat(typingctx: Any, value: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return Writer(builder, vec).broadcast(args[0])

        return vec(scalar), lower

    def blended(builder: ir.IRBuilder, args: Any, n: ir.Value | None) -> ir.Value:
        """The first vector where a byte is not 0, the second where it is."""
        bytes_ = ir.VectorType(ir.IntType(8), vec.lanes)
        pointer = builder.inttoptr(builder.add(args[0], args[1]), bytes_.as_pointer())
        zero = ir.Constant(bytes_, [0] * vec.lanes)
        if n is None:
            found = builder.load(pointer, align=1)
        else:
            name, mask = f"llvm.masked.load.v{vec.lanes}i8.p0", first_lanes(builder, n, vec.lanes)
            found = called(builder, name, bytes_, pointer, I32(1), mask, zero)
        return builder.select(builder.icmp_unsigned("!=", found, zero), args[2], args[3])

    @intrinsic
    def blend(typingctx: Any, ptr: types.Type, i: types.Type, a: types.Type, b: types.Type) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return blended(builder, args, None)

        return (vec(i64, i64, vec, vec), lower) if a == b == vec else None

    @intrinsic
    def blend_part(
        typingctx: Any,
        ptr: types.Type,
        i: types.Type,
        a: types.Type,
        b: types.Type,
        n: types.Type,
    ) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            return blended(builder, args, args[4])

        return (vec(i64, i64, vec, vec, i64), lower) if a == b == vec else None

    return {
        "load": load,
        "load_part": load_part,
        "load1": load1,
        "store": store,
        "store_part": store_part,
        "store1": store1,
        "splat": splat,
        "blend": blend,
        "blend_part": blend_part,
    }


@intrinsic
def _load_int(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.load(builder.gep(pointer, [args[1]]))

    return types.int64(types.int64, types.int64), lower


@intrinsic
def _load_byte(typingctx: Any, ptr: types.Type, i: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        return builder.zext(builder.load(builder.gep(pointer, [args[1]])), I64)

    return types.int64(types.int64, types.int64), lower


@intrinsic
def _take(typingctx: Any, ptr: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", pointer, I64(1), "monotonic")

    return types.int64(types.int64), lower


INTEGERS = {"load_int": _load_int, "load_byte": _load_byte, "take": _take}
