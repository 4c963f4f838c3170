"""The C++ vocabulary on every instruction set of this machine: errors in ULP, tails, NaN."""

import numpy as np
import pytest
import torch
from vocabulary import ENDS, F32, F64, PAIRS, TRUTH, held_at_the_ends, samples, ulp_error

from fastseq.backends import load
from fastseq.cells import WORDS

native = load("native")
if isinstance(native, str):
    pytest.skip(native, allow_module_level=True)

_cpu = native._cpu
NUMBER = (
    *("exp", "sigmoid", "tanh", "relu", "dsigmoid", "dtanh", "drelu", "reciprocal", "logsigmoid"),
    *("sqrt", "dlogsigmoid", "dsqrt", "maximum", "dmaximum"),
    "log",  # no word of the cells
)
SETS = _cpu.instruction_sets()

each_set = pytest.mark.parametrize("instruction_set", SETS)
each_dtype = pytest.mark.parametrize("dtype", [F32, F64])


def apply(name, x, instruction_set, out=None):
    out = np.full_like(x, np.nan) if out is None else out
    before = _cpu.use_instruction_set(instruction_set)
    try:
        _cpu.vocabulary(NUMBER.index(name), torch.from_numpy(x), torch.from_numpy(out))
    finally:
        _cpu.use_instruction_set(before)
    return out


# Greatest error in ULP of the result's type, on any instruction set. Below its domain sigmoid's
# result would be denormal (x < -87.3, -708.4): it may be 0, see test_limits.
ERRORS = [
    ("exp", F32, (-np.inf, np.inf), (-104.0, 89.0), 1.25),
    ("sigmoid", F32, (-87.3, np.inf), (-87.3, 20.0), 2.5),
    ("tanh", F32, (-np.inf, np.inf), (-10.0, 10.0), 2.5),
    ("relu", F32, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("drelu", F32, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("dsigmoid", F32, (0.0, 1.0), (0.0, 1.0), 1.51),
    ("dtanh", F32, (-1.0, 1.0), (-1.0, 1.0), 1.51),
    ("exp", F64, (-np.inf, np.inf), (-746.0, 710.0), 1.25),
    ("sigmoid", F64, (-708.3, np.inf), (-708.3, 40.0), 2.5),
    ("tanh", F64, (-np.inf, np.inf), (-20.0, 20.0), 2.5),
    ("relu", F64, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("drelu", F64, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("dsigmoid", F64, (0.0, 1.0), (0.0, 1.0), 1.51),
    ("dtanh", F64, (-1.0, 1.0), (-1.0, 1.0), 1.51),
    ("reciprocal", F32, (-np.inf, np.inf), (-4.0, 4.0), 0.5),
    ("logsigmoid", F32, (-np.inf, np.inf), (-20.0, 20.0), 3.0),
    ("sqrt", F32, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("dlogsigmoid", F32, (-np.inf, 0.0), (-10.0, 0.0), 2.0),
    ("dsqrt", F32, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("log", F32, (np.finfo(F32).tiny, np.finfo(F32).max), (0.5, 4.0), 2.0),
    ("reciprocal", F64, (-np.inf, np.inf), (-4.0, 4.0), 0.5),
    ("logsigmoid", F64, (-np.inf, np.inf), (-20.0, 20.0), 3.0),
    ("sqrt", F64, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("dlogsigmoid", F64, (-np.inf, 0.0), (-10.0, 0.0), 2.0),
    ("dsqrt", F64, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("log", F64, (np.finfo(F64).tiny, np.finfo(F64).max), (0.5, 4.0), 2.0),
]


@pytest.mark.parametrize(("name", "dtype", "domain", "curved", "limit"), ERRORS)
def test_error_in_ulp(name, dtype, domain, curved, limit):
    if dtype is F64 and np.finfo(np.longdouble).nmant <= np.finfo(F64).nmant:
        pytest.skip("this platform's long double is no more exact than float64")
    x = samples(dtype, domain, curved)
    if limit <= 0.5:  # one operation of the processor's, or a choice
        x = np.concatenate([x[::16], x[-9:]])
    with np.errstate(all="ignore"):
        truth = (TRUTH | {"log": np.log})[name](x.astype(F64 if dtype is F32 else np.longdouble))
        for instruction_set in SETS:
            error = ulp_error(apply(name, x, instruction_set), truth)
            assert np.isfinite(error).all(), instruction_set
            worst = error.argmax()
            assert error[worst] <= limit, (
                f"{instruction_set}: {error[worst]:.2f} ULP at {x[worst]!r}"
            )


@each_set
@each_dtype
def test_limits(dtype, instruction_set):
    x = np.array([-np.inf, -1000.0, -0.0, 0.0, 1000.0, np.inf], dtype)

    def of(name):
        return apply(name, x, instruction_set)

    np.testing.assert_array_equal(of("tanh"), [-1, -1, 0, 0, 1, 1])
    np.testing.assert_array_equal(np.signbit(of("tanh")), [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(of("sigmoid"), [0, 0, 0.5, 0.5, 1, 1])
    np.testing.assert_array_equal(of("exp"), [0, 0, 1, 1, np.inf, np.inf])
    np.testing.assert_array_equal(of("relu"), [0, 0, 0, 0, 1000, np.inf])
    np.testing.assert_array_equal(of("drelu"), [0, 0, 0, 0, 1, 1])
    # Where sigmoid should be denormal: off by less than the least normal number.
    x = np.linspace(*((-104, -87) if dtype is F32 else (-746, -708)), 1000).astype(dtype)
    y = of("sigmoid").astype(np.longdouble)
    assert (abs(y - TRUTH["sigmoid"](x.astype(np.longdouble))) < np.finfo(dtype).tiny).all()


@each_set
@each_dtype
@pytest.mark.parametrize("name", [*ENDS, *PAIRS])
def test_ends(name, dtype, instruction_set):
    def run(name, x, *other):  # y holds the second argument of a word of two
        return apply(name, x, instruction_set, *other)

    held_at_the_ends(run, name, dtype)


def test_every_word_is_there():
    assert set(NUMBER) - {"log"} == set(WORDS)


@each_set
@each_dtype
@pytest.mark.parametrize("name", [*NUMBER[:12], "log"])
def test_nan_flows(name, dtype, instruction_set):
    x = np.array([0.5, np.nan, 0.25], dtype)
    y = apply(name, x, instruction_set)
    assert np.isfinite(y[[0, 2]]).all()
    assert y[1] == 1 if name == "drelu" else np.isnan(y[1])


@each_set
@each_dtype
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "exp"])
def test_tails(name, dtype, instruction_set):
    """Any number of values at any address: each has its own bits, nothing beyond is touched."""
    whole = np.random.default_rng(1).uniform(-9, 9, 45).astype(dtype)
    truth = apply(name, whole, instruction_set)
    for start in range(4):
        for n in range(35):
            x = np.full(n + 3, np.nan, dtype)
            x[1 : n + 1] = whole[start : start + n]
            out = np.full_like(x, 7)
            apply(name, x[1 : n + 1], instruction_set, out[1 : n + 1])
            np.testing.assert_array_equal(out[1 : n + 1], truth[start : start + n])
            assert out[0] == 7
            assert (out[n + 1 :] == 7).all()


def test_an_instruction_set_is_chosen_by_name():
    before = _cpu.use_instruction_set("base")
    try:
        assert before in SETS and SETS[-1] == "base"
        with pytest.raises(ValueError, match="this machine cannot run 'sse9'"):
            _cpu.use_instruction_set("sse9")
        assert _cpu.use_instruction_set(SETS[0]) == "base"
    finally:
        _cpu.use_instruction_set(before)
