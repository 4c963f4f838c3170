"""What the loops over a chain say on vectors, besides the words of a cell.

exp(v)                      of numbers up to 88 (float64: 709); 0 in place of denormals, which took
                            a core of Zen 5 ten times as long
log(v)                      of normal, positive numbers, within 2 ULP; of others some number;
                            NaN stays NaN
larger(v, v), lesser(v, v)  where either is NaN, the first
largest(v), total(v)        of the lanes, joined in one order
has(v, x)                   whether any lane is the number x
unordered(v)                whether any lane is NaN
below(v, x, w)              whether any lane of v is below x where w is not -inf
missed(v, x, w)             the same where w is not 0
ratio(v, x, w)              w exp(-v); 0 where v is below x or w is 0
double(x), real(x)          from and to the vectors' own type
load_double(ptr, i), store_double(ptr, i, x), add_double(ptr, i, x)
add_doubles(ptr, i, v)      adds each lane to a double
store_int(ptr, i, n)        of int64
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from ..numba_vectors import _EXP, _LOG1P, I32, I64, Vec, Writer, _split_exp, intrinsic

DOUBLE = ir.DoubleType()


def _exp(w: Writer, x: ir.Value) -> ir.Value:
    e, one = _EXP[w.bits], w.constant(1.0)
    t, r, q = _split_exp(w, w.at_most(w.at_least(x, -e.sigmoid_limit), e.sigmoid_limit))
    # 2^n is 0 at the lower limit
    return w.mul(w.fma(w.fma(q, r, one), r, one), w.bit_operation("shl", t, e.mantissa))


def _log(w: Writer, x: ir.Value) -> ir.Value:
    """x = 2^n m with m from sqrt(1/2) to sqrt(2), so that n log 2 cancels nothing of log m."""
    b, e = w.builder, _EXP[w.bits]
    integers = ir.VectorType(ir.IntType(w.bits), w.lanes)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(integers, [value] * w.lanes)

    fraction = int((math.sqrt(2.0) - 1.0) * 2**e.mantissa)
    least = (e.bias - 1) << e.mantissa | fraction  # the bits of sqrt(1/2)
    bits = b.bitcast(x, integers)
    n = b.ashr(b.sub(bits, constant(least)), constant(e.mantissa))
    m = b.bitcast(b.sub(bits, b.shl(n, constant(e.mantissa))), w.type)
    n = b.sitofp(n, w.type)
    t = w.sub(m, w.constant(1.0))
    s = w.div(w.add(t, t), w.add(m, w.constant(1.0)))
    square = w.mul(s, s)
    rest = w.mul(w.mul(square, w.polynomial(square, _LOG1P[w.bits])), s)
    rest = w.fma(n, w.constant(e.ln2_low), rest)
    found = w.fma(n, w.constant(e.ln2_high), w.add(s, rest))
    return b.select(b.fcmp_unordered("uno", x, x), x, found)


def _larger(w: Writer, a: ir.Value, b: ir.Value) -> ir.Value:
    return w.builder.select(w.builder.fcmp_ordered("<", a, b), b, a)


def _lesser(w: Writer, a: ir.Value, b: ir.Value) -> ir.Value:
    return w.builder.select(w.builder.fcmp_ordered("<", b, a), b, a)


def _joined(w: Writer, x: ir.Value, join: Callable[[Any, Any], ir.Value]) -> ir.Value:
    """One half of the lanes with the other, until one is left."""
    n = w.lanes
    while n > 1:
        n //= 2
        order = ir.Constant(ir.VectorType(I32, w.lanes), [lane ^ n for lane in range(w.lanes)])
        x = join(x, w.builder.shuffle_vector(x, x, order))
    return w.builder.extract_element(x, I32(0))


def _largest(w: Writer, x: ir.Value) -> ir.Value:
    return _joined(w, x, lambda a, b: _larger(w, a, b))


def _total(w: Writer, x: ir.Value) -> ir.Value:
    return _joined(w, x, w.add)


def _any(w: Writer, lanes: ir.Value) -> ir.Value:
    bits = w.builder.bitcast(lanes, ir.IntType(w.lanes))
    return w.builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))


def _below(w: Writer, x: ir.Value, limit: ir.Value, other: ir.Value) -> ir.Value:
    low = w.builder.fcmp_ordered("<", x, w.broadcast(limit))
    there = w.builder.fcmp_unordered("!=", other, w.constant(-math.inf))
    return _any(w, w.builder.and_(low, there))


def _missed(w: Writer, x: ir.Value, limit: ir.Value, other: ir.Value) -> ir.Value:
    low = w.builder.fcmp_ordered("<", x, w.broadcast(limit))
    there = w.builder.fcmp_unordered("!=", other, w.constant(0.0))
    return _any(w, w.builder.and_(low, there))


def _ratio(w: Writer, x: ir.Value, limit: ir.Value, other: ir.Value) -> ir.Value:
    zero = w.constant(0.0)
    low = w.builder.fcmp_ordered("<", x, w.broadcast(limit))
    nothing = w.builder.or_(low, w.builder.fcmp_ordered("==", other, zero))
    return w.builder.select(nothing, zero, w.mul(other, _exp(w, w.builder.fneg(x))))


def _has(w: Writer, x: ir.Value, number: ir.Value) -> ir.Value:
    return _any(w, w.builder.fcmp_ordered("==", x, w.broadcast(number)))


def _unordered(w: Writer, x: ir.Value) -> ir.Value:
    return _any(w, w.builder.fcmp_unordered("uno", x, x))


def _double(w: Writer, x: ir.Value) -> ir.Value:
    return x if w.bits == 64 else w.builder.fpext(x, DOUBLE)


def _real(w: Writer, x: ir.Value) -> ir.Value:
    return x if w.bits == 64 else w.builder.fptrunc(x, w.scalar)


def _place(w: Writer, address: ir.Value, i: ir.Value, kind: ir.Type = DOUBLE) -> ir.Value:
    pointer = w.builder.inttoptr(address, DOUBLE.as_pointer())
    return w.builder.bitcast(w.builder.gep(pointer, [i]), kind.as_pointer())


def _load_double(w: Writer, address: ir.Value, i: ir.Value) -> ir.Value:
    return w.builder.load(_place(w, address, i), align=8)


def _store_double(w: Writer, address: ir.Value, i: ir.Value, x: ir.Value) -> None:
    w.builder.store(x, _place(w, address, i), align=8)


def _add_double(w: Writer, address: ir.Value, i: ir.Value, x: ir.Value) -> None:
    _store_double(w, address, i, w.add(_load_double(w, address, i), x))


def _add_doubles(w: Writer, address: ir.Value, i: ir.Value, x: ir.Value) -> None:
    wide = ir.VectorType(DOUBLE, w.lanes)
    place = _place(w, address, i, wide)
    x = x if w.bits == 64 else w.builder.fpext(x, wide)
    w.builder.store(w.add(w.builder.load(place, align=8), x), place, align=8)


def _store_int(w: Writer, address: ir.Value, i: ir.Value, n: ir.Value) -> None:
    pointer = w.builder.inttoptr(address, I64.as_pointer())
    w.builder.store(n, w.builder.gep(pointer, [i]))


def _apart(w: Writer) -> None:
    for attribute in ("noinline", "optsize"):
        w.builder.function.attributes.add(attribute)


def words(dtype: Any, lanes: int) -> dict[str, Any]:
    """The words above, of vectors of so many numbers."""
    vec = Vec(types.float32 if dtype is np.float32 else types.float64, lanes)

    def word(write: Callable[..., Any], result: Any, *given: Any) -> Any:
        def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
            found = write(Writer(builder, vec), *args)
            return context.get_dummy_value() if found is None else found

        def typer(typingctx: Any, *args: Any) -> Any:
            return result(*given), lower

        # Numba counts a word's arguments
        names = ["typingctx", *(f"x_{k}" for k in range(len(given)))]
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        typer.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        typer.__name__ = write.__name__.lstrip("_")
        return intrinsic(typer)

    number, flag = vec.dtype, types.boolean
    at, double = (types.int64, types.int64), types.float64
    made = [
        word(_exp, vec, vec),
        word(_log, vec, vec),
        word(_larger, vec, vec, vec),
        word(_lesser, vec, vec, vec),
        word(_largest, number, vec),
        word(_total, number, vec),
        word(_has, flag, vec, number),
        word(_unordered, flag, vec),
        word(_below, flag, vec, number, vec),
        word(_missed, flag, vec, number, vec),
        word(_ratio, vec, vec, number, vec),
        word(_double, double, number),
        word(_real, number, double),
        word(_load_double, double, *at),
        word(_store_double, types.void, *at, double),
        word(_add_double, types.void, *at, double),
        word(_add_doubles, types.void, *at, vec),
        word(_apart, types.void),
        word(_store_int, types.void, *at, types.int64),
    ]
    return {w._name: w for w in made}
