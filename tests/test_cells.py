"""The texts, their declaration, what binds them, and the vocabularies they are bound to."""

import ast
import inspect
import os
import subprocess
import sys
import textwrap

import mpmath
import numpy as np
import pytest
import torch
from rules import check_alike

from fastseq import reference
from fastseq.backends import eager
from fastseq.cells import CELLS, WORDS, Phase, arguments, bind
from fastseq.cells import text as words
from fastseq.cells.gru import gru_forward
from fastseq.cells.lstm import lstm_forward

PHASES = [
    pytest.param(cell, phase, id=phase.forward.__name__)
    for cell in CELLS.values()
    for phase in cell.phases
]
TEXTS = [
    pytest.param(text, id=text.__name__)
    for cell in CELLS.values()
    for phase in cell.phases
    for text in (phase.forward, phase.backward)
]

# The derivative of an analytic function is Im f(x + ih) / h, exact to rounding for a tiny h.
COMPLEX = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "relu": lambda x: np.where(np.real(x) > 0, x, 0),
}


def complex_step(text, returns, values, name):
    """d(each return)/d(argument ``name``)."""
    tiny = 1e-30
    moved = {k: v.astype(complex) for k, v in values.items()}
    moved[name] = moved[name] + 1j * tiny
    results = text(*(moved[argument] for argument in arguments(text)))
    return {r: np.imag(value) / tiny for r, value in zip(returns, results, strict=True)}


def assert_backward_is_the_derivative(cell, phase):
    random = np.random.default_rng(0)
    forward = bind(phase.forward, "complex", **COMPLEX)
    backward = bind(phase.backward, "real", **reference.VOCABULARY)
    takes = arguments(phase.forward)
    values = {name: random.uniform(-2, 2, 500) for name in takes}
    returned = [np.real(v) for v in forward(*(values[name].astype(complex) for name in takes))]
    known = values | dict(zip(phase.returns, returned, strict=True))
    given = [
        name[1:]
        for name in arguments(phase.backward)
        if name[0] == "d" and name not in known and name[1:] in phase.returns
    ]
    assert given, "the backward text takes no gradient of anything the forward text returns"
    d = {f"d{name}": random.normal(size=500) for name in given}
    results = backward(*((known | d)[name] for name in arguments(phase.backward)))
    gradients = dict(zip(phase.gradients, results, strict=True))
    for name in takes:
        slopes = complex_step(forward, phase.returns, values, name)
        truth = sum(d[f"d{r}"] * slopes[r] for r in given)
        # s_g enters a cell apart, a_g in a sum whose gradient is that of either part
        np.testing.assert_allclose(
            gradients.pop(f"d{name}"), truth, rtol=1e-13, atol=1e-14, err_msg=f"d{name}"
        )
    assert not gradients, f"gradients of what the forward text does not take: {list(gradients)}"


@pytest.mark.parametrize("cell, phase", PHASES)
def test_backward_is_the_complex_step_derivative(cell, phase):
    assert_backward_is_the_derivative(cell, phase)


def wrong_lstm_backward(dh, dc, i, f, g, o, c, c_prev):
    tanh_c = tanh(c)  # noqa: F821
    dc_total = dc + dh * o * dtanh(tanh_c)  # noqa: F821
    da_i = dc_total * g * dsigmoid(i)  # noqa: F821
    da_f = dc_total * c * dsigmoid(f)  # noqa: F821
    da_g = dc_total * i * dtanh(g)  # noqa: F821
    da_o = dh * tanh_c * dsigmoid(o)  # noqa: F821
    dc_prev = dc_total * f
    return da_i, da_f, da_g, da_o, dc_prev


def test_the_complex_step_sees_a_wrong_term():
    phase = CELLS["lstm"].phases[0]
    broken = Phase(phase.forward, phase.returns, wrong_lstm_backward, phase.gradients)
    with pytest.raises(AssertionError, match="da_f"):
        assert_backward_is_the_derivative(CELLS["lstm"], broken)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_assignments_of_sums_and_products(text):
    tree = ast.parse(textwrap.dedent(inspect.getsource(text))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    assert not tree.decorator_list and not tree.args.defaults and not tree.args.kwonlyargs
    *steps, last = tree.body
    assert isinstance(last, ast.Return)
    assert isinstance(last.value, ast.Tuple)
    assert all(isinstance(name, ast.Name) for name in last.value.elts)
    assigned = set(arguments(text))
    for step in steps:
        assert isinstance(step, ast.Assign) and len(step.targets) == 1
        assert isinstance(step.targets[0], ast.Name)
        called = set()
        for node in ast.walk(step.value):
            if isinstance(node, ast.BinOp):
                assert isinstance(node.op, (ast.Add, ast.Sub, ast.Mult)), ast.dump(node)
            elif isinstance(node, ast.Call):
                assert isinstance(node.func, ast.Name) and node.func.id in WORDS, ast.dump(node)
                assert len(node.args) == 1 and not node.keywords
                called.add(node.func)
            elif isinstance(node, ast.Name):
                assert node in called or node.id in assigned, node.id
            else:
                assert isinstance(node, (ast.operator, ast.expr_context)), ast.dump(node)
        assigned.add(step.targets[0].id)
    assert {name.id for name in last.value.elts} <= assigned
    assert set(text.__code__.co_consts) <= {None}, "a text holds no literal"


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_a_backward_text_takes_what_is_there(cell):
    """Gradients of what its forward text returns, and values that are saved or given."""
    kept = {*cell.saved, *cell.states, *cell.unit_parameters, *(f"{s}_prev" for s in cell.states)}
    later: set[str] = set()
    for phase in reversed(cell.phases):
        slopes = {f"d{name}" for name in phase.returns}
        assert set(arguments(phase.backward)) <= kept | slopes
        # gradients of states and of what later phases took come in, nothing else
        taken = {name[1:] for name in arguments(phase.backward) if name in slopes - kept}
        assert taken <= {*cell.states, *later}
        later |= {name[1:] for name in phase.gradients} | {phase.operand}
        inputs = {f"d{name}" for name in arguments(phase.forward)}
        assert set(phase.gradients) == inputs
        assert cell.product_rows(phase)[1] <= len(cell.recurrent_gates)
    assert cell.source


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_gates_own_their_rows(cell):
    owned = [k for phase in cell.phases for k in range(*cell.product_rows(phase))]
    assert sorted(owned) == list(range(len(cell.recurrent_gates)))
    assert set(cell.apart_gates) <= set(cell.recurrent_gates) <= set(cell.gates)
    assert cell.saved == (*cell.saved[: cell.G], *cell.extras)


def test_bind_runs_the_text():
    text = bind(lstm_forward, "floats", sigmoid=lambda a: a, tanh=lambda a: a)
    assert text(1.0, 2.0, 3.0, 4.0, 5.0) == (52.0, 13.0, 1.0, 2.0, 3.0, 4.0)


def test_bind_names_what_is_missing():
    with pytest.raises(ValueError, match="lstm_forward: the vocabulary lacks tanh"):
        bind(lstm_forward, "reference", sigmoid=np.exp)


def twice(text=gru_forward, label="label", **vocabulary):
    sigmoid = vocabulary.pop("sigmoid", np.exp)
    return bind(text, label, sigmoid=sigmoid, tanh=np.tanh, **vocabulary).__qualname__


def edited_gru_forward(a_r, a_z, x_n, s_n, h_prev):
    r = sigmoid(a_r)  # noqa: F821
    z = sigmoid(a_z)  # noqa: F821
    n = tanh(x_n + r * s_n)  # noqa: F821
    h = n - z * (h_prev - n)
    return h, r, z, n


edited_gru_forward.__name__ = "gru_forward"


def scaled(number):
    return lambda x: x * number


def through(function):
    namespace = {"helper": function}
    exec("def sigmoid(x): return helper(x)", namespace)
    return namespace["sigmoid"]


@pytest.mark.parametrize(
    "one, other",
    [
        pytest.param({"label": "a"}, {"label": "b"}, id="label"),
        pytest.param({}, {"text": edited_gru_forward}, id="edited text"),
        pytest.param({"sigmoid": lambda x: x + 1}, {"sigmoid": lambda x: x + 2}, id="literal"),
        pytest.param({"sigmoid": lambda x: x + x}, {"sigmoid": lambda x: x * x}, id="operator"),
        pytest.param({"sigmoid": scaled(2.0)}, {"sigmoid": scaled(3.0)}, id="closure"),
        pytest.param(
            {"sigmoid": scaled(np.float32(2))}, {"sigmoid": scaled(np.float32(3))}, id="float32"
        ),
        pytest.param(
            {"sigmoid": through(lambda x: x + 1)},
            {"sigmoid": through(lambda x: x + 2)},
            id="callee",
        ),
        pytest.param(
            {"sigmoid": through(through(lambda x: x + 1))},
            {"sigmoid": through(through(lambda x: x + 2))},
            id="callee of a callee",
        ),
        pytest.param(
            {"sigmoid": scaled(scaled(2.0))}, {"sigmoid": scaled(scaled(3.0))}, id="deep closure"
        ),
    ],
)
def test_qualname_tells_what_is_bound(one, other):
    assert twice(**one) != twice(**other)
    assert twice(**one) == twice(**one)


def test_qualname_tells_the_constants_of_nested_functions():
    def first(x):
        return [y + 1 for y in x]

    def second(x):
        return [y + 2 for y in x]

    assert twice(sigmoid=first) != twice(sigmoid=second)


def test_qualname_ignores_names_that_the_text_does_not_use():
    assert twice() == twice(relu=np.abs)


COMPILES = """
import sys
from importlib.util import module_from_spec, spec_from_file_location
import numba
sys.dont_write_bytecode = True
spec = spec_from_file_location("words", sys.argv[2])  # alone, without torch
words = sys.modules["words"] = module_from_spec(spec)
spec.loader.exec_module(words)
import equations
number = float(sys.argv[1])
scale = numba.njit(lambda x: number * x)
text = numba.njit(cache=True)(words.bind(equations.text, "numba", scale=scale))
print(text(1.0), sum(text.stats.cache_hits.values()))
"""
EQUATIONS = """
def text(x):
    y = scale(x) {} x
    return y
"""


def test_numba_cache_is_never_another_vocabularys(tmp_path):
    """Fresh processes: one vocabulary, another, the edited text, and the first again."""
    pytest.importorskip("numba")
    script = tmp_path / "compiles.py"
    script.write_text(COMPILES)
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}

    def run(number, sign):
        (tmp_path / "equations.py").write_text(EQUATIONS.format(sign))
        command = [sys.executable, str(script), number, words.__file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        value, hits = done.stdout.split()
        return float(value), int(hits)

    assert run("2.0", "+") == (3.0, 0)
    assert run("2.0", "+") == (3.0, 1)
    assert run("5.0", "+") == (6.0, 0)
    assert run("5.0", "-") == (4.0, 0)


# Greatest error in units in the last place, over random and special points of a domain. For
# dtanh = 1 - y^2 next to |y| = 1 the unit is that of 1 (``of=1``): the relative error of a
# difference of near equals is the rounding of y, which no formula in y can undo.
WIDE = (-700.0, 700.0)
TABLE = [
    # vocabulary, function, dtype, domain, greatest error, unit
    ("reference", "sigmoid", "float64", (-700.0, 0.0), 2.0, None),
    ("reference", "sigmoid", "float64", (0.0, 700.0), 1.5, None),
    ("reference", "tanh", "float64", (-1e-3, 1e-3), 1.0, None),
    ("reference", "tanh", "float64", (-50.0, 50.0), 1.5, None),
    ("reference", "relu", "float64", WIDE, 0.0, None),
    ("reference", "dsigmoid", "float64", (0.0, 1.0), 1.5, None),
    ("reference", "dtanh", "float64", (-0.5, 0.5), 1.0, None),
    ("reference", "dtanh", "float64", (-1.0, 1.0), 0.5, 1.0),
    ("eager", "sigmoid", "float32", (-87.0, 0.0), 2.0, None),
    ("eager", "sigmoid", "float32", (0.0, 87.0), 1.5, None),
    ("eager", "sigmoid", "float64", (-700.0, 0.0), 2.5, None),
    ("eager", "sigmoid", "float64", (0.0, 700.0), 1.5, None),
    ("eager", "tanh", "float32", (-1e-3, 1e-3), 1.0, None),
    ("eager", "tanh", "float32", (-50.0, 50.0), 1.0, None),
    ("eager", "tanh", "float64", (-1e-3, 1e-3), 1.0, None),
    ("eager", "tanh", "float64", (-50.0, 50.0), 1.0, None),
    ("eager", "relu", "float32", WIDE, 0.0, None),
    ("eager", "dsigmoid", "float32", (0.0, 1.0), 1.5, None),
    ("eager", "dsigmoid", "float64", (0.0, 1.0), 1.5, None),
    ("eager", "dtanh", "float32", (-0.5, 0.5), 1.0, None),
    ("eager", "dtanh", "float32", (-1.0, 1.0), 0.5, 1.0),
    ("eager", "dtanh", "float64", (-0.5, 0.5), 1.0, None),
    ("eager", "dtanh", "float64", (-1.0, 1.0), 0.5, 1.0),
]
TRUTH = {
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "tanh": mpmath.tanh,
    "relu": lambda x: max(x, mpmath.mpf(0)),
    "dsigmoid": lambda y: y * (1 - y),
    "dtanh": lambda y: 1 - y * y,
}


def points(domain, dtype):
    """Even ones, ones that crowd at zero from either side, and the ends."""
    low, high = domain
    random = np.random.default_rng(0)
    even = random.uniform(low, high, 1500)
    small = np.concatenate(
        [-(10.0 ** random.uniform(-12, 0, 500)), 10.0 ** random.uniform(-12, 0, 500)]
    )
    small = small * max(abs(low), abs(high))
    small = small[(small >= low) & (small <= high)]
    return np.concatenate([even, small, [low, high, 0.0]]).astype(dtype)


def greatest_error(vocabulary, function, dtype, domain, of):
    x = points(domain, dtype)
    if vocabulary == "eager":
        got = eager.VOCABULARY[function](torch.from_numpy(x)).numpy()
    else:
        got = reference.VOCABULARY[function](x)
    assert got.dtype == dtype
    with mpmath.workprec(160):
        truth = [TRUTH[function](mpmath.mpf(float(value))) for value in x]
        nearest = np.array([float(value) for value in truth]).astype(dtype)
        unit = np.spacing(np.abs(nearest) if of is None else np.full_like(nearest, of))
        errors = [
            abs(mpmath.mpf(float(g)) - t) / float(u)
            for g, t, u in zip(got, truth, unit, strict=True)
        ]
        return float(max(errors))


@pytest.mark.parametrize("vocabulary, function, dtype, domain, limit, of", TABLE)
def test_vocabulary_error(vocabulary, function, dtype, domain, limit, of):
    assert greatest_error(vocabulary, function, dtype, domain, of) <= limit


@pytest.mark.parametrize("vocabulary", ["reference", "eager"])
@pytest.mark.parametrize("function", ["sigmoid", "tanh", "relu", "dsigmoid", "dtanh", "drelu"])
def test_vocabulary_at_the_edges(vocabulary, function):
    """NaN passes through, infinities saturate, signs of zero and the kink are torch's. The ends of
    the other words: tests/test_vocabulary.py."""
    x = torch.tensor(
        [-torch.inf, -50.0, -0.0, 0.0, 50.0, torch.inf, torch.nan], dtype=torch.float64
    )
    if function in ("dsigmoid", "dtanh"):
        x = torch.tensor([-1.0, 0.0, 1.0, torch.nan], dtype=torch.float64)
    truth = {
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "relu": torch.relu,
        "dsigmoid": lambda y: y - y * y,
        "dtanh": lambda y: 1 - y.square(),
        # the slope of relu, of relu's value: torch keeps a gradient where the value is NaN
        "drelu": lambda y: torch.where(y <= 0, 0.0, torch.ones_like(y)),
    }[function](x)
    with np.errstate(all="ignore"):
        got = (
            eager.VOCABULARY[function](x)
            if vocabulary == "eager"
            else torch.from_numpy(np.asarray(reference.VOCABULARY[function](x.numpy())))
        )
    torch.testing.assert_close(got, truth, rtol=1e-15, atol=1e-300, equal_nan=True)


def test_relu_of_nan_has_torchs_gradient():
    x = torch.tensor([torch.nan, 1.0, -1.0, 0.0], requires_grad=True)
    torch.relu(x).sum().backward()
    ours = eager.VOCABULARY["drelu"](torch.relu(x.detach()))
    check_alike(ours, x.grad)
