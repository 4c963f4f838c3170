"""The Numba vocabulary: errors in ULP, tails, NaN, packed products, the disk cache."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from vocabulary import ENDS, F32, F64, PAIRS, TRUTH, held_at_the_ends, samples, ulp_error

numba = pytest.importorskip("numba")
from fastseq.backends.numba_simd import JIT, simd  # noqa: E402
from fastseq.cells import WORDS  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


def bind(text: Any, **names: Any) -> Any:
    return numba.njit(**JIT)(FunctionType(text.__code__, names, text.__name__))


def map_text(x_ptr, out_ptr, n):
    whole = n - n % LANES  # noqa: F821
    for i in range(0, whole, LANES):  # noqa: F821
        store(out_ptr, i, f(load(x_ptr, i)))  # noqa: F821
    store_part(out_ptr, whole, f(load_part(x_ptr, whole, n - whole)), n - whole)  # noqa: F821


@functools.cache
def mapper(name: str, dtype: type, lanes: int | None = None) -> Any:
    names = simd(dtype, lanes)
    return bind(map_text, **{**vars(names), "f": getattr(names, name)})


def apply(name: str, x: np.ndarray, lanes: int | None = None) -> np.ndarray:
    out = np.full_like(x, np.nan)
    mapper(name, x.dtype.type, lanes)(x.ctypes.data, out.ctypes.data, x.size)
    return out


# Greatest error in ULP of the result's type. Below its domain sigmoid's result would be denormal
# (x < -87.3, -708.4): it may be 0, see test_limits.
ERRORS = [
    ("exp", F32, (-np.inf, np.inf), (-104.0, 89.0), 1.3),
    ("sigmoid", F32, (-87.3, np.inf), (-87.3, 20.0), 2.6),
    ("tanh", F32, (-np.inf, np.inf), (-10.0, 10.0), 2.6),
    ("relu", F32, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("drelu", F32, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("dsigmoid", F32, (0.0, 1.0), (0.0, 1.0), 1.5),
    ("dtanh", F32, (-1.0, 1.0), (-1.0, 1.0), 1.6),
    ("exp", F64, (-np.inf, np.inf), (-746.0, 710.0), 1.3),
    ("sigmoid", F64, (-708.3, np.inf), (-708.3, 40.0), 2.6),
    ("tanh", F64, (-np.inf, np.inf), (-20.0, 20.0), 2.6),
    ("dsigmoid", F64, (0.0, 1.0), (0.0, 1.0), 1.5),
    ("dtanh", F64, (-1.0, 1.0), (-1.0, 1.0), 1.6),
    ("reciprocal", F32, (-np.inf, np.inf), (-4.0, 4.0), 0.5),
    ("logsigmoid", F32, (-np.inf, np.inf), (-20.0, 20.0), 3.0),
    ("sqrt", F32, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("dlogsigmoid", F32, (-np.inf, 0.0), (-10.0, 0.0), 2.0),
    ("dsqrt", F32, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("reciprocal", F64, (-np.inf, np.inf), (-4.0, 4.0), 0.5),
    ("logsigmoid", F64, (-np.inf, np.inf), (-20.0, 20.0), 3.0),
    ("sqrt", F64, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("dlogsigmoid", F64, (-np.inf, 0.0), (-10.0, 0.0), 2.0),
    ("dsqrt", F64, (0.0, np.inf), (0.0, 4.0), 0.5),
]


@pytest.mark.parametrize(("name", "dtype", "domain", "curved", "limit"), ERRORS)
def test_error_in_ulp(name, dtype, domain, curved, limit):
    if dtype is F64 and np.finfo(np.longdouble).nmant <= np.finfo(F64).nmant:
        pytest.skip("this platform's long double is no more exact than float64")
    x = samples(dtype, domain, curved)
    if limit <= 0.5:  # one operation of the processor's, or a choice
        x = np.concatenate([x[::16], x[-9:]])
    with np.errstate(all="ignore"):
        truth = TRUTH[name](x.astype(F64 if dtype is F32 else np.longdouble))
        error = ulp_error(apply(name, x), truth)
    assert np.isfinite(error).all()
    worst = error.argmax()
    assert error[worst] <= limit, f"{error[worst]:.2f} ULP at {x[worst]!r}"


@pytest.mark.parametrize("dtype", [F32, F64])
def test_limits(dtype):
    x = np.array([-np.inf, -1000.0, -0.0, 0.0, 1000.0, np.inf], dtype)
    np.testing.assert_array_equal(apply("tanh", x), [-1, -1, 0, 0, 1, 1])
    np.testing.assert_array_equal(np.signbit(apply("tanh", x)), [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(apply("sigmoid", x), [0, 0, 0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(apply("exp", x), [0, 0, 1, 1, np.inf, np.inf])
    np.testing.assert_array_equal(apply("relu", x), [0, 0, 0, 0, 1000, np.inf])
    # Where sigmoid should be denormal: off by less than the least normal number.
    x = np.linspace(*((-104, -87) if dtype is F32 else (-746, -708)), 1000).astype(dtype)
    y = apply("sigmoid", x).astype(np.longdouble)
    assert (abs(y - TRUTH["sigmoid"](x.astype(np.longdouble))) < np.finfo(dtype).tiny).all()


def pair_text(x_ptr, y_ptr, out_ptr, n):
    for i in range(0, n, LANES):  # noqa: F821
        v = f(load_part(x_ptr, i, n - i), load_part(y_ptr, i, n - i))  # noqa: F821
        store_part(out_ptr, i, v, n - i)  # noqa: F821


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", [*ENDS, *PAIRS])
def test_ends(name, dtype):
    def run(name, x, *other):
        if not other:
            return apply(name, x)
        names, out = simd(dtype), np.full_like(x, 7)
        kernel = bind(pair_text, **{**vars(names), "f": getattr(names, name)})
        kernel(x.ctypes.data, other[0].ctypes.data, out.ctypes.data, x.size)
        return out

    held_at_the_ends(run, name, dtype)


def test_every_word_is_there():
    assert set(WORDS) <= set(vars(simd(F32)))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", sorted(TRUTH))
def test_nan_flows(name, dtype):
    x = np.array([0.5, np.nan, 0.25], dtype)
    y = apply(name, x)
    assert np.isfinite(y[[0, 2]]).all()
    assert y[1] == 1 if name == "drelu" else np.isnan(y[1])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_tails(dtype):
    lanes = simd(dtype).LANES
    for n in range(2 * lanes + 2):
        x = np.full(n + lanes + 2, np.nan, dtype)
        x[1 : n + 1] = np.arange(n) - n / 2
        out = np.full_like(x, 7)
        address = dtype().itemsize  # one element in: nothing is aligned
        mapper("relu", dtype)(x.ctypes.data + address, out.ctypes.data + address, n)
        np.testing.assert_array_equal(out[1 : n + 1], np.maximum(x[1 : n + 1], 0))
        assert out[0] == 7
        assert (out[n + 1 :] == 7).all()


def part_text(x_ptr, out_ptr, n, m):
    store_part(out_ptr, 0, load_part(x_ptr, 0, n), m)  # noqa: F821


@pytest.mark.parametrize("dtype", [F32, F64])
def test_part_counts(dtype):
    names = simd(dtype)
    kernel = bind(part_text, **vars(names))
    x = np.arange(1, names.LANES + 1).astype(dtype)
    for n in (-5, 0, 1, names.LANES - 1, names.LANES, names.LANES + 1, 2**33):
        for m in (-(2**33), 0, 1, names.LANES, 2**33):
            out = np.full_like(x, 7)
            kernel(x.ctypes.data, out.ctypes.data, n, m)
            lane = np.arange(names.LANES)
            np.testing.assert_array_equal(out, np.where(lane < m, np.where(lane < n, x, 0), 7))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ["sigmoid", "tanh"])
def test_bits_do_not_depend_on_the_place(name, dtype):
    x = np.random.default_rng(1).uniform(-9, 9, 77).astype(dtype)
    y = apply(name, x)
    for start in range(1, 20):
        np.testing.assert_array_equal(apply(name, x[start:]), y[start:])


def cell_text(a_i, a_g, c_prev):
    i = sigmoid(a_i)  # noqa: F821
    g = tanh(a_g)  # noqa: F821
    c = -i * c_prev + fma(i, g, c_prev) - g  # noqa: F821
    return i, c


def cell_kernel_text(x_ptr, out_ptr, n):
    scale = splat(load1(x_ptr, 3 * n))  # noqa: F821
    for h in range(0, n, LANES):  # noqa: F821
        a_i = load_part(x_ptr, h, n - h)  # noqa: F821
        a_g = load_part(x_ptr, n + h, n - h)  # noqa: F821
        c_prev = load_part(x_ptr, 2 * n + h, n - h)  # noqa: F821
        i, c = cell(a_i, a_g, c_prev)  # noqa: F821
        store_part(out_ptr, h, i * scale, n - h)  # noqa: F821
        store_part(out_ptr, n + h, c, n - h)  # noqa: F821
    store1(out_ptr, 2 * n, load1(x_ptr, 3 * n))  # noqa: F821


@pytest.mark.parametrize("dtype", [F32, F64])
def test_cell_text(dtype):
    names = vars(simd(dtype))
    kernel = bind(cell_kernel_text, **names, cell=bind(cell_text, **names))
    n = 37
    x = np.random.default_rng(2).standard_normal(3 * n + 1).astype(dtype)
    out = np.empty(2 * n + 1, dtype)
    kernel(x.ctypes.data, out.ctypes.data, n)
    a_i, a_g, c_prev = x[:-1].astype(F64).reshape(3, n)
    i, g = TRUTH["sigmoid"](a_i), np.tanh(a_g)
    truth = np.concatenate([i * x[-1], -i * c_prev + (i * g + c_prev) - g, x[-1:]])
    np.testing.assert_allclose(out, truth, rtol=0, atol=8 * np.finfo(dtype).eps)


def aligned(size: int, dtype: type) -> np.ndarray:
    raw = np.empty(size * dtype().itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    out = raw[start : start + size * dtype().itemsize].view(dtype)
    out.fill(np.nan)
    return out


def packed(names: Any, w: np.ndarray, transposed: bool) -> np.ndarray:
    """w (inner, columns), packed from rows two elements longer than needed."""
    inner, columns = w.shape
    rows = w.T if transposed else w
    src = np.full((rows.shape[0], rows.shape[1] + 2), np.nan, w.dtype)
    src[:, :-2] = rows
    size = names.packed_size(inner, columns)
    out = aligned(size + 64, w.dtype.type)
    names.pack(src.ctypes.data, src.shape[1], inner, columns, transposed, out.ctypes.data)
    assert np.isnan(out[size:]).all()
    return out[:size]


def product(names: Any, a: np.ndarray, w_packed: np.ndarray, old: np.ndarray, add: bool) -> Any:
    """a w, or old + a w, through rows that are longer than needed and must not be touched."""
    rows, inner = a.shape
    columns = old.shape[1]
    wide = np.full((rows, inner + 3), np.nan, a.dtype)
    wide[:, :inner] = a
    out = np.full((rows, columns + 5), 7, a.dtype)
    out[:, :columns] = old
    names.gemm(
        wide.ctypes.data,
        inner + 3,
        1,
        w_packed.ctypes.data,
        out.ctypes.data,
        columns + 5,
        rows,
        inner,
        columns,
        add,
    )
    assert (out[:, columns:] == 7).all()
    return out[:, :columns]


# Every number of rows up to two tall tiles and a remainder, whole and broken blocks, one block and
# several, weights that fit L1 and weights that do not.
SHAPES = [
    *[(rows, 17, 150) for rows in range(1, 15)],
    (1, 64, 128),
    (1, 100, 260),
    (1, 1, 1),
    (3, 0, 5),
    (0, 4, 4),
    (2, 63, 252),
    (5, 127, 65),
]


@pytest.mark.parametrize("size", [None, 16], ids=["widest", "16 bytes"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_gemm(dtype, size):
    names = simd(dtype, size and size // dtype().itemsize)
    rng = np.random.default_rng(3)
    for rows, inner, columns in SHAPES:
        a = rng.standard_normal((rows, inner)).astype(dtype)
        w = rng.standard_normal((inner, columns)).astype(dtype)
        old = rng.standard_normal((rows, columns)).astype(dtype)
        w_packed = packed(names, w, False)
        np.testing.assert_array_equal(packed(names, w, True), w_packed)
        blocks = w_packed.reshape(-(-columns // names.BLOCK), inner, names.BLOCK)
        padded = np.zeros((inner, blocks.shape[0] * names.BLOCK), dtype)
        padded[:, :columns] = w
        np.testing.assert_array_equal(np.concatenate([*blocks], 1), padded)

        truth = a.astype(F64) @ w.astype(F64)
        bound = (inner + 1) * np.finfo(dtype).eps * (abs(a) @ abs(w) + abs(old))
        y = product(names, a, w_packed, old, False)
        assert (abs(y - truth) <= bound).all()
        added = product(names, a, w_packed, old, True)
        assert (abs(added - old.astype(F64) - truth) <= bound).all()
        # A row alone has the bits that it has in any tile.
        for row in range(rows):
            one = slice(row, row + 1)
            np.testing.assert_array_equal(product(names, a[one], w_packed, old[one], False), y[one])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_gemm_of_a_transposed_operand(dtype):
    names = simd(dtype)
    rng = np.random.default_rng(4)
    a = rng.standard_normal((33, 10)).astype(dtype)
    w = rng.standard_normal((33, 70)).astype(dtype)
    w_packed = packed(names, w, False)
    out = np.empty((10, 70), dtype)
    addresses = a.ctypes.data, 1, 10, w_packed.ctypes.data, out.ctypes.data, 70
    names.gemm(*addresses, 10, 33, 70, False)
    np.testing.assert_array_equal(out, product(names, a.T.copy(), w_packed, out, False))


def test_simd_refuses_other_dtypes():
    with pytest.raises(TypeError, match="dtype: expected float32 or float64, got float16"):
        simd(np.float16)


def test_without_avx_and_fma():
    """The same on the least CPU: 16-byte vectors, no fused multiply-add, no masked moves."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    chosen = "float32 and (error_in_ulp or widest) or test_part"
    run = subprocess.run(
        [*command, "-k", chosen],
        env={**os.environ, "NUMBA_CPU_NAME": "generic"},
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr


CACHED = """
import sys
import numba, numpy
from fastseq.backends.numba_simd import JIT, simd
for name, value in vars(simd(numpy.float32)).items():
    globals()[name] = value

@numba.njit(cache=True, **JIT)
def kernel(x_ptr, w_ptr, out_ptr, n):
    pack(x_ptr, n, 1, n, False, w_ptr)
    gemm(x_ptr, 1, 1, w_ptr, out_ptr, n, 1, 1, n, False)
    for i in range(0, n, LANES):
        store_part(out_ptr, i, tanh(load_part(out_ptr, i, n - i)), n - i)

x, w, out = numpy.linspace(1, 2, 19, dtype="f"), numpy.empty(999, "f"), numpy.empty(19, "f")
kernel(x.ctypes.data, w.ctypes.data, out.ctypes.data, 19)
assert numpy.allclose(out, numpy.tanh(x))
print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def test_disk_cache_across_processes(tmp_path):
    script = tmp_path / "kernel.py"
    script.write_text(CACHED)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    for expected in ("0 1", "1 0"):
        run = subprocess.run(
            [sys.executable, script], env=env, capture_output=True, text=True, timeout=300
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == expected
