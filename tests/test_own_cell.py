"""Cells of a user's own, in one file: a declaration, and every backend runs it or says why not.

Two cells that no other has the like of. ``slow_lstm`` is an LSTM with peepholes, a slow state that
follows c, and an output gate of the forgotten h: two phases, three states, two unit parameters, two
extra values, and values that two later readers share. ``early_gate`` has a phase without a product
before the one that has it, whose operand is written over an input product.

Triton's part runs under its interpreter, in a process of its own.
"""

# ruff: noqa: F821  (the free names of a text are bound by each backend)
import os

import independent
import pytest
import torch
from children import child
from independent import affine, blocks, masked, over_time
from pairwise import covering
from problems import against_the_independent, draw, full

from fastseq.backends import choice, load
from fastseq.cells import Cell, Phase, register, unregister
from fastseq.ops.stack import problem

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def slow_lstm_gates_forward(a_i, a_f, x_g, s_g, c_prev, v_prev, h_prev, p, k):
    i = sigmoid(a_i + p * c_prev)
    f = sigmoid(a_f)
    g = tanh(x_g + i * s_g)
    c = f * c_prev + i * g
    v = v_prev + k * (c - v_prev)
    q = f * h_prev
    return c, v, q, i, f, g


def slow_lstm_gates_backward(dc, dv, dq, df, i, f, g, s_g, c, c_prev, v_prev, h_prev, p, k):
    dc_total = dc + dv * k
    dx_g = dc_total * i * dtanh(g)
    ds_g = dx_g * i
    da_i = (dc_total * g + dx_g * s_g) * dsigmoid(i)
    da_f = (df + dc_total * c_prev + dq * h_prev) * dsigmoid(f)
    dc_prev = dc_total * f + da_i * p
    dv_prev = dv - dv * k
    dh_prev = dq * f
    dp = da_i * c_prev
    dk = dv * (c - v_prev)
    return da_i, da_f, dx_g, ds_g, dc_prev, dv_prev, dh_prev, dp, dk


def slow_lstm_output_forward(a_o, c, v, f, q, p):
    o = sigmoid(a_o + p * c)
    h = o * tanh(c + v) + f * q
    return h, o


def slow_lstm_output_backward(dh, o, c, v, f, q, p):
    t = tanh(c + v)
    da_o = dh * t * dsigmoid(o)
    dv = dh * o * dtanh(t)
    dc = dv + da_o * p
    df = dh * q
    dq = dh * f
    dp = da_o * c
    return da_o, dc, dv, df, dq, dp


SLOW_LSTM = Cell(
    name="slow_lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c", "v"),
    saved=("i", "f", "g", "o", "s_g", "q"),
    phases=(
        Phase(
            forward=slow_lstm_gates_forward,
            returns=("c", "v", "q", "i", "f", "g"),
            backward=slow_lstm_gates_backward,
            gradients=(
                *("da_i", "da_f", "dx_g", "ds_g", "dc_prev", "dv_prev", "dh_prev", "dp", "dk"),
            ),
        ),
        Phase(
            operand="q",
            forward=slow_lstm_output_forward,
            returns=("h", "o"),
            backward=slow_lstm_output_backward,
            gradients=("da_o", "dc", "dv", "df", "dq", "dp"),
        ),
    ),
    unit_parameters=("p", "k"),
    source="made up for this test",
)


def slow_lstm(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """The same once more, in matrices."""
    W_i, W_f, W_g, W_o = blocks(w_ih, 4)
    U_i, U_f, U_g, U_o = blocks(w_hh, 4)
    b_i, b_f, b_g, b_o = blocks(b_ih, 4)
    p_i, p_f, p_g, p_o = blocks(b_hh, 4)
    peep, leak = units

    def step(x_t, b, h, c, v):
        u = masked(h, h_mask, b)
        admit = torch.sigmoid(affine(W_i, x_t, b_i) + affine(U_i, u, p_i) + peep * c)
        forget = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, u, p_f))
        new = torch.tanh(affine(W_g, x_t, b_g) + admit * affine(U_g, u, p_g))
        c = admit * new + forget * c
        v = (1 - leak) * v + leak * c
        left = forget * h
        emit = torch.sigmoid(affine(W_o, x_t, b_o) + affine(U_o, left, p_o) + peep * c)
        return emit * torch.tanh(c + v) + forget * left, c, v

    return over_time(step, x, states, **time)


def early_gate_gate_forward(x_r, h_prev):
    r = sigmoid(x_r)
    q = r * h_prev
    return q, r


def early_gate_gate_backward(dq, r, h_prev):
    dx_r = dq * h_prev * dsigmoid(r)
    dh_prev = dq * r
    return dx_r, dh_prev


def early_gate_output_forward(a_n):
    h = tanh(a_n)
    return (h,)


def early_gate_output_backward(dh, h):
    da_n = dh * dtanh(h)
    return (da_n,)


EARLY_GATE = Cell(
    name="early_gate",
    gates=("r", "n"),
    states=("h",),
    saved=("q", "h", "r"),
    phases=(
        Phase(
            early_gate_gate_forward,
            ("q", "r"),
            early_gate_gate_backward,
            ("dx_r", "dh_prev"),
        ),
        Phase(
            early_gate_output_forward,
            ("h",),
            early_gate_output_backward,
            ("da_n",),
            operand="q",
        ),
    ),
    source="made up for this test",
)


def early_gate(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    W_r, W_n = blocks(w_ih, 2)
    b_r, b_n = blocks(b_ih, 2)

    def step(x_t, b, h):
        reset = torch.sigmoid(affine(W_r, x_t, b_r))
        return (torch.tanh(affine(W_n, x_t, b_n) + affine(w_hh, reset * h, b_hh)),)

    return over_time(step, x, states, **time)


OWN = {"slow_lstm": (SLOW_LSTM, slow_lstm), "early_gate": (EARLY_GATE, early_gate)}


@pytest.fixture(autouse=True, scope="module")
def registered():
    for name, (cell, writing) in OWN.items():
        register(cell)
        independent.CELLS[name] = writing
    yield
    for name in OWN:
        unregister(name)
        del independent.CELLS[name]


SHAPES = {
    "plain": {},
    "two layers": {"layers": 2},
    "one step": {"T": 1},
    "bare": {"bias": False, "state": False},
}
GIVEN = {
    "nothing": {},
    "reset": {"reset": True},
    "both": {"reset": True, "h_mask": True},
    "zoneout": {"zoneout": (0.4, 0.3, 0.2), "reset": True, "h_mask": True},
    "zoneout of c": {"zoneout": (0.0, 0.5, 0.0)},
    "evaluation": {"zoneout": (0.4, 0.3, 0.2), "evaluates": True},
}
AXES = {
    "backend": (None, "numba", "eager", "reference"),
    "dtype": (torch.float32, torch.bfloat16),
    "lengths": (None, (2, 0, 4)),
    "directions": (1, 2),
    "shape": tuple(SHAPES),
    "given": tuple(GIVEN),
    "memory": ("full", "lean"),
    "trajectory": (False, True),
}


def _valid(row):
    return row["lengths"] is None or row["shape"] != "one step"


def rows(**changes):
    """Combinations in which every two values stand together; marked full in the other types."""
    other = covering(AXES | changes | {"dtype": (torch.float64, torch.float16)}, _valid)
    return [
        pytest.param(cell, row, id=f"{cell}-{_name_of(row)}", marks=marks)
        for some, marks in ((covering(AXES | changes, _valid), ()), (other, full))
        for cell in OWN
        for row in some
    ]


def _name_of(row):
    return "-".join(str(value).removeprefix("torch.") for value in row.values())


def run_row(cell, row):
    row = dict(row)
    backend, memory, along = (row.pop(name) for name in ("backend", "memory", "trajectory"))
    options = {"T": 4, **SHAPES[row.pop("shape")], **GIVEN[row.pop("given")], **row}
    case = draw(cell, I=3, H=18, **options)
    against_the_independent(case, backend, cell, memory=memory, trajectory=along)


@pytest.mark.skipif(INTERPRETED, reason="Triton's cases alone")
@pytest.mark.parametrize("cell, row", rows())
def test_on_the_cpu(cell, row):
    run_row(cell, row)


if INTERPRETED:
    from triton_cases import form  # noqa: F401

ALL_AT_ONCE = {"lengths": (2, 0, 3), "directions": 2, "reset": True, "h_mask": True}


@pytest.mark.skipif(not INTERPRETED, reason="test_under_tritons_interpreter runs it")
@pytest.mark.parametrize("cell", OWN)
@pytest.mark.parametrize(
    "form, dtype, options",
    [
        ("walk", torch.bfloat16, {"memory": "full", "trajectory": True}),
        ("grid", torch.float32, {"memory": "full", "trajectory": True}),
        pytest.param("walk", torch.float16, {"memory": "lean"}, marks=full),
        pytest.param("resident", torch.float32, {"memory": "full"}, marks=full),
        pytest.param("step", torch.float64, {"memory": "lean"}, marks=full),
        pytest.param("step", torch.float32, {"memory": "full", "trajectory": True}, marks=full),
    ],
    indirect=["form"],
    ids=str,
)
def test_on_triton(cell, form, dtype, options):
    case = draw(cell, T=3, I=3, H=18, dtype=dtype, **ALL_AT_ONCE)
    against_the_independent(case, "triton", cell, **options)


@pytest.mark.skipif(not INTERPRETED, reason="test_under_tritons_interpreter runs it")
@pytest.mark.parametrize(
    "form, cell, options",
    [
        ("step", "slow_lstm", {"zoneout": (0.4, 0.5, 0.3)}),
        pytest.param("walk", "slow_lstm", {"zoneout": 0.4, "evaluates": True}, marks=full),
        pytest.param("grid", "early_gate", {"zoneout": 0.4}, marks=full),
        pytest.param("resident", "slow_lstm", {"zoneout": (0.0, 0.5, 0.0)}, marks=full),
    ],
    indirect=["form"],
    ids=str,
)
def test_zoneout_on_triton(form, cell, options):
    """A later phase takes the states as an earlier one gave them, in a launch of its own."""
    case = draw(cell, T=3, I=3, H=18, dtype=torch.float32, **ALL_AT_ONCE, **options)
    against_the_independent(case, "triton", cell, trajectory=True)


def test_under_tritons_interpreter(request):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of older Tritons fails on NumPy 2.4")
    if INTERPRETED:
        pytest.skip("this is it")
    options = ["--full"] if request.config.getoption("--full") else []
    child(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", __file__, *options],
        TRITON_INTERPRET="1",
    )


def test_native_declines_in_a_sentence():
    case = draw("slow_lstm")
    with pytest.raises(NotImplementedError, match="native: native has no kernel of slow_lstm"):
        case.run("native")


def test_left_to_us_numba_runs_it_where_it_is_there():
    verdict = choice.judge(problem(draw("slow_lstm").stack()), None)
    assert verdict.chosen == ("eager" if isinstance(load("numba"), str) else "numba")


@pytest.mark.parametrize("backend", ["numba", "eager", "reference"])
@pytest.mark.parametrize("cell", OWN)
def test_it_cannot_be_projected(cell, backend):
    reason = load(backend).supports(problem(draw(cell, P=3).stack()))
    assert reason == f"{cell} adds h_prev to gates of another size; it cannot be projected"
