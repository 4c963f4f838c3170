"""Declarations of a cell that a backend would misread are refused, with the cell, the fault and the
remedy; and what is derived from a sound one."""

# ruff: noqa: F821  (the free names of a text are bound by each backend)
from dataclasses import replace

import pytest
from problems import draw

from fastseq.backends import load
from fastseq.cells import CELLS, GRU, INDRNN, LSTM, WORDS, Cell, Phase, register, unregister
from fastseq.cells.check import MEANING
from fastseq.ops.stack import problem


def first(a_p, c_prev, h_prev, u):
    p = sigmoid(a_p)
    c = p * c_prev + u * h_prev
    k = c * p
    return c, p, k


def first_backward(dc, dk, p, c, c_prev, h_prev, u):
    dc_total = dc + dk * p
    da_p = (dk * c + dc_total * c_prev) * dsigmoid(p)
    dc_prev = dc_total * p
    dh_prev = dc_total * u
    du = dc_total * h_prev
    return da_p, dc_prev, dh_prev, du


def last(a_q, x_r, s_r, c, k):
    q = tanh(a_q)
    r = sigmoid(x_r + k * s_r)
    h = r * q + c
    return h, q, r


def last_backward(dh, q, r, k, s_r):
    dx_r = dh * q * dsigmoid(r)
    da_q = dh * r * dtanh(q)
    dk = dx_r * s_r
    ds_r = dx_r * k
    return da_q, dx_r, ds_r, dh, dk


FIRST = Phase(
    first,
    ("c", "p", "k"),
    first_backward,
    ("da_p", "dc_prev", "dh_prev", "du"),
)
LAST = Phase(
    last,
    ("h", "q", "r"),
    last_backward,
    ("da_q", "dx_r", "ds_r", "dc", "dk"),
    operand="k",
)
SOUND = Cell(
    name="made_up",
    gates=("p", "q", "r"),
    states=("h", "c"),
    saved=("p", "q", "r", "k", "s_r"),
    phases=(FIRST, LAST),
    source="nowhere",
    unit_parameters=("u",),
)


def changed(one=None, other=None, **fields):
    """SOUND with other fields: of the cell, of its first phase, and of its last."""
    phases = (replace(FIRST, **(one or {})), replace(LAST, **(other or {})))
    return replace(SOUND, **({"phases": phases} | fields))


def test_what_is_derived():
    assert SOUND.other_states == ("c",) and SOUND.extras == ("k", "s_r") and SOUND.G == 3
    assert SOUND.recurrent_gates == ("p", "q", "r") and SOUND.G_hh == 3
    assert SOUND.apart_gates == ("r",) and SOUND.parts_differ
    assert SOUND.handed_on == ("k",)
    assert SOUND.reads_h and SOUND.masks_h and not SOUND.can_project
    assert SOUND.keeps_gates(False) and not CELLS["rnn_tanh"].keeps_gates(False)
    assert CELLS["rnn_tanh"].keeps_gates(True)
    assert [SOUND.product_rows(p) for p in SOUND.products] == [(0, 1), (1, 3)]
    assert {n for n, cell in CELLS.items() if cell.can_project} == {
        *("lstm", "peephole_lstm", "coupled_lstm", "rnn_tanh", "rnn_relu", "rnn_sigmoid")
    }
    assert not LSTM.parts_differ and GRU.parts_differ and not INDRNN.parts_differ
    assert all(cell.beyond() is None for cell in CELLS.values())
    assert {name for name, cell in CELLS.items() if cell.scans} == {"leaky_integrator"}
    assert set(MEANING) == set(WORDS)


NAMES = [
    ({"name": "made-up"}, "identifier"),
    ({"name": "class"}, "identifier"),
    ({"gates": ["p", "q", "r"]}, "gates is a tuple of names"),
    ({"saved": "pqr"}, "saved is a tuple of names"),
    ({"phases": ()}, "tuple of Phases"),
    ({"gates": ("p", "q", "r", "a b")}, "no argument can be called"),
    ({"states": ("h", "c", "lambda")}, "no argument can be called"),
    ({"gates": ("p", "q", "q", "r")}, "twice"),
    ({"states": ("h", "c", "c")}, "twice"),
    ({"saved": ("p", "q", "r", "k", "k")}, "twice"),
    ({"unit_parameters": ("u", "u")}, "twice"),
    ({"one": {"returns": ("c", "p", "p")}}, r"returns of phase 0 names \['p'\] twice"),
    ({"other": {"gradients": ("da_q", "da_q")}}, "gradients of phase 1"),
    ({"gates": ()}, "gates is empty"),
    ({"states": ()}, "must begin with 'h'"),
    ({"states": ("c", "h")}, "must begin with 'h'"),
    ({"saved": ("p", "q")}, "at least 3"),
    # one name, two meanings
    ({"unit_parameters": ("u", "a_p")}, "two things"),
    ({"unit_parameters": ("u", "h")}, "two things"),
    ({"unit_parameters": ("u", "k")}, "two things"),
    ({"unit_parameters": ("u", "c_prev")}, "two things"),
    ({"states": ("h", "c", "x_p")}, "two things"),
    ({"gates": ("p", "q", "r", "prev"), "states": ("h", "c", "a")}, "two things"),
    ({"unit_parameters": ("u", "tanh")}, "words of the vocabulary"),
    ({"unit_parameters": ("u", "w_prev")}, "end in _prev"),
    ({"gates": ("p", "q", "r", "z_prev")}, "end in _prev"),
    ({"unit_parameters": ("u", "du")}, "read as gradients"),
    ({"states": ("h", "c", "dc")}, "read as gradients"),
    ({"unit_parameters": ("u", "da_p")}, "read as gradients"),
]


def _outer(u):
    def inner(a_p, c_prev, h_prev):
        return (a_p * u, c_prev, h_prev)

    return inner


def _default(a_p, c_prev, h_prev, u=None):
    return a_p, c_prev, h_prev


def _keyword(a_p, c_prev, h_prev, *, u):
    return a_p, c_prev, h_prev


def _positional(a_p, c_prev, /, h_prev, u):
    return a_p, c_prev, h_prev


def _every(*a_p):
    return a_p


def _generator(a_p, c_prev, h_prev, u):
    yield a_p


def _unknown_word(a_p, c_prev, h_prev, u):
    return erf(a_p), c_prev, h_prev


def _method(a_p, c_prev, h_prev, u):
    return a_p.sigmoid(), c_prev, h_prev


def _loop(a_p, c_prev, h_prev, u):
    for _ in range(3):
        a_p = a_p + u
    return a_p, c_prev, h_prev


def _literal(a_p, c_prev, h_prev, u):
    return 2.0 * a_p, c_prev, h_prev


def _literal_in_a_sum(a_p, c_prev, h_prev, u):
    return a_p + 1, c_prev, h_prev


def _literal_returned(a_p, c_prev, h_prev, u):
    return a_p, c_prev, 1.0


def _branch(a_p, c_prev, h_prev, u):
    return a_p if a_p else u, c_prev, h_prev


def _comparison(a_p, c_prev, h_prev, u):
    return a_p == u, c_prev, h_prev


def _division(a_p, c_prev, h_prev, u):
    return a_p / u, c_prev, h_prev


def _power(a_p, c_prev, h_prev, u):
    return a_p**u, c_prev, h_prev


def _two_arguments(a_p, c_prev, h_prev, u):
    return sigmoid(a_p, u), c_prev, h_prev


def _bare(a_p, c_prev, h_prev, u):
    return a_p


def _too_few(a_p, c_prev, h_prev, u):
    return a_p, c_prev * h_prev * u


FORMS = [
    ({"one": {"forward": lambda a_p, c_prev, h_prev, u: (a_p, c_prev, u)}}, "write it as a def"),
    ({"one": {"forward": abs}}, "no Python function"),
    ({"one": {"forward": _outer(1)}}, "of the function around it"),
    ({"one": {"forward": _default}}, "plain positional arguments"),
    ({"one": {"forward": _keyword}}, "plain positional arguments"),
    ({"one": {"forward": _positional}}, "plain positional arguments"),
    ({"one": {"forward": _every}}, "plain positional arguments"),
    ({"one": {"forward": _generator}}, "plain positional arguments"),
    ({"one": {"forward": _unknown_word}}, r"uses \['erf'\]"),
    ({"one": {"forward": _method}}, "has no attribute"),
    ({"one": {"forward": _loop}}, r"uses \['range'\]"),
    ({"one": {"forward": _literal}}, "literal 2.0"),
    ({"one": {"forward": _literal_in_a_sum}}, "literal 1 "),
    ({"one": {"forward": _literal_returned}}, "must return a tuple of values"),
    ({"one": {"forward": _branch}}, "no branches"),
    ({"one": {"forward": _comparison}}, "no comparisons"),
    ({"one": {"forward": _division}}, "unsupported operand"),
    ({"one": {"forward": _power}}, "unsupported operand"),
    ({"one": {"forward": _two_arguments}}, "sigmoid takes 1 values, not 2"),
    ({"one": {"forward": _bare}}, "must return a tuple"),
    ({"one": {"forward": _too_few}}, "returns 2 values, and the declaration names 3"),
]


def _twice_p(a_p, x_p, c_prev, h_prev, u):
    return a_p * x_p, c_prev * h_prev, u * a_p


def _s_alone(s_p, c_prev, h_prev, u):
    return s_p * c_prev, h_prev * s_p, u * s_p


def _other_gate(a_p, a_r, c_prev, h_prev, u):
    return a_p * a_r, c_prev * h_prev, u * a_p


def _without_gate(c_prev, h_prev, u):
    return c_prev * h_prev, u * h_prev, u * c_prev


def _no_product(x_q, x_r, c, k):
    return x_q * c, k * x_r, x_q * x_r


def _hands_on_a_part(a_p, c_prev, h_prev, u):
    p = sigmoid(a_p)
    return p * c_prev + u * h_prev, p, a_p


def _takes_replaced(a_q, x_r, s_r, c_prev, k):
    return a_q * c_prev, k * x_r, a_q * s_r


def _takes_own(a_p, c_prev, h_prev, u, k):
    return a_p * c_prev, h_prev * u, a_p * k


def _idle_unit(a_p, c_prev, h_prev):
    return a_p * c_prev, h_prev * a_p, h_prev * h_prev


PLACES = [
    ({"one": {"forward": _twice_p}}, r"gate p enters as \['a_p', 'x_p'\]"),
    ({"one": {"forward": _s_alone}}, r"gate p enters as \['s_p'\]"),
    ({"one": {"forward": _other_gate}}, r"gate r enters in phases \[0, 1\]"),
    ({"one": {"forward": _without_gate}}, r"gate p enters in phases \[\]"),
    ({"gates": ("q", "p", "r")}, r"gates \('q', 'r'\) of one phase must be neighbours"),
    ({"other": {"returns": ("h", "q", "p")}}, r"phase 1 returns \['p'\], as an earlier phase"),
    ({"one": {"returns": ("c", "p", "a_q")}}, r"returns \['a_q'\], names of gates' parts"),
    ({"one": {"operand": "k"}}, "phase 0 multiplies k"),
    ({"other": {"operand": "c_prev"}}, "phase 1 multiplies c_prev"),
    ({"other": {"operand": "u"}}, "phase 1 multiplies u"),
    ({"other": {"operand": "c"}}, "phase 1 multiplies c"),
    ({"other": {"operand": "q"}}, "phase 1 multiplies q"),
    (
        {
            "one": {"forward": _hands_on_a_part, "returns": ("c", "p", "a_p")},
            "other": {"operand": "a_p"},
        },
        "phase 1 multiplies a_p",
    ),
    ({"other": {"forward": _no_product}}, "has the operand k, and takes no a_g or s_g"),
    ({"states": ("h", "c", "v")}, r"states \['v'\] are returned by no phase"),
    (
        {
            "one": {"returns": ("c", "p", "h")},
            "other": {"returns": ("k", "q", "r"), "operand": "p"},
        },
        "h is returned by phase 0; the last phase returns it",
    ),
    # saved[k] is written over gate k's input product
    ({"saved": ("p", "k", "r", "q", "s_r")}, r"saved\[1\], k, comes from phase 0 .* still to read"),
    ({"saved": ("p", "s_r", "r", "q", "k")}, r"saved\[1\], s_r, is written over .* by no phase"),
    ({"saved": ("p", "q", "r", "k", "nothing")}, r"saved \['nothing'\] are neither"),
    ({"saved": ("p", "q", "r", "k", "s_r", "c_prev")}, "are there in backward anyway"),
    ({"saved": ("p", "q", "r", "k", "s_r", "u")}, "are there in backward anyway"),
    ({"saved": ("p", "q", "r", "s_r")}, r"\['k'\] go from one phase to a later one"),
    ({"one": {"forward": _idle_unit}}, r"unit parameters \['u'\] are taken by no phase"),
    (
        {"other": {"forward": _takes_replaced}},
        r"takes \['c_prev'\], which an earlier phase has repl",
    ),
    ({"one": {"forward": _takes_own}}, r"_takes_own takes \['k'\], which are no gate's part"),
    ({"unit_parameters": ()}, r"first takes \['u'\], which are no gate's part"),
    ({"other": {"normal": (("c",),)}}, r"normalises \['c'\] and does not take \['nc'\]"),
]


def _unsaved(dc, dk, p, c, a_p, c_prev, h_prev, u):
    return a_p, c_prev, h_prev, u


def _not_given(dc, dk, dp, p, c, c_prev, h_prev, u):
    return dc, dk, dp, u


def _drops_dk(dc, p, c, c_prev, h_prev, u):
    return dc, c_prev, h_prev, u


def _wrong(dc, dk, p, c, c_prev, h_prev, u):
    dc_total = dc + dk * p
    da_p = dk * c + dc_total * c_prev * dsigmoid(p)
    return da_p, dc_total * p, dc_total * u, dc_total * h_prev


GRADIENTS = [
    ({"one": {"backward": _unsaved}}, r"takes \['a_p'\], which are neither saved"),
    ({"one": {"backward": _not_given}}, r"takes \['dp'\], which are neither saved"),
    ({"one": {"backward": _drops_dk}}, r"does not take \['dk'\]: gradients that would be lost"),
    ({"one": {"gradients": ("da_p", "dc_prev", "dh_prev")}}, "the gradients of what first takes"),
    (
        {"one": {"gradients": ("dx_p", "dc_prev", "dh_prev", "du")}},
        "the gradients of what first takes",
    ),
    ({"one": {"backward": _wrong}}, "gives da_p = .* where the derivative of first is"),
    # the same names in another order
    ({"one": {"gradients": ("da_p", "dh_prev", "dc_prev", "du")}}, "where the derivative of first"),
    ({"one": {"backward": None}}, "gradients names gradients without a backward text"),
    ({"scans": True}, "scans is set"),
]


@pytest.mark.parametrize(
    "changes, fault",
    [
        pytest.param(changes, fault, id=f"{k}-{fault}")
        for k, (changes, fault) in enumerate((*NAMES, *FORMS, *PLACES, *GRADIENTS))
    ],
)
def test_refused(changes, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        changed(**changes)
    message = str(caught.value)
    assert message.startswith("made_up: ") or "identifier" in message


def roots(a_p, u, h_prev):
    p = sqrt(a_p)
    r = reciprocal(p)
    h = maximum(u * h_prev, r)
    return h, p


def roots_backward(dh, p, u, h_prev):
    r = reciprocal(p)
    t = u * h_prev
    du = dh * dmaximum(t, r)
    dr = dh * dmaximum(r, t)
    da_p = -(dr * r * r) * dsqrt(p)
    return da_p, du * h_prev, du * u


def _roots_without_sqrt(dh, p, u, h_prev):
    r = reciprocal(p)
    t = u * h_prev
    du = dh * dmaximum(t, r)
    da_p = -(dh * dmaximum(r, t) * r * r) * p
    return da_p, du * h_prev, du * u


def _roots_other_side(dh, p, u, h_prev):
    r = reciprocal(p)
    t = u * h_prev
    du = dh * dmaximum(r, t)
    da_p = -(dh * dmaximum(r, t) * r * r) * dsqrt(p)
    return da_p, du * h_prev, du * u


@pytest.mark.parametrize(
    "backward, wrong",
    [(roots_backward, None), (_roots_without_sqrt, "da_p"), (_roots_other_side, "du")],
)
def test_the_gradient_that_is_wrong_is_named(backward, wrong):
    """At points where a word is defined: half of those that are drawn have no root."""
    phase = Phase(roots, ("h", "p"), backward, ("da_p", "du", "dh_prev"))
    fields = ("made_up", ("p",), ("h",), ("p",), (phase,), "nowhere", ("u",))
    if wrong is None:
        assert Cell(*fields).phases[0].backward is backward
    else:
        with pytest.raises(ValueError, match=f"gives {wrong} = .* where the derivative of roots"):
            Cell(*fields)


def _another_a_p(a_p, h_prev):
    return a_p * h_prev, a_p * a_p


def test_a_part_that_is_returned_is_the_part():
    """Backward may want a_p as it came; another value under its name would be read as it."""
    phase = Phase(_another_a_p, ("h", "a_p"))
    with pytest.raises(ValueError, match=r"returns another value as \['a_p'\]"):
        Cell("made_up", ("p",), ("h",), ("a_p",), (phase,), "nowhere")


def leak(x_p, u, h_prev):
    h = x_p + u * (h_prev - x_p)
    return h, x_p


def test_a_part_may_be_saved_as_it_came_and_a_scan_is_linear():
    cell = Cell("leak", ("p",), ("h",), ("x_p",), (Phase(leak, ("h", "x_p")),), "", ("u",), True)
    assert cell.scans and not cell.recurrent_gates


def normalised(x_p, ns_p, h_prev):
    h = tanh(x_p + ns_p) * h_prev
    return h, h


def not_kept(x_p, u, h_prev):
    h = x_p + u * (h_prev - x_p)
    return h, u


#: A cell without a backward text, whose x_p is not saved, and one that normalises.
BEYOND = {
    "leaky": (Phase(not_kept, ("h", "k")), ("u",), "leaky has no backward text, and none can be"),
    "normed": (Phase(normalised, ("h", "p"), normal=(("s_p",),)), (), "normalises values"),
}


@pytest.mark.parametrize("backend", ["native", "numba", "triton", "torch", "reference", "eager"])
@pytest.mark.parametrize("name", BEYOND)
def test_what_no_loop_runs_is_declined(name, backend):
    """In ``supports``, before a loop meets it; the eager form needs no backward text."""
    phase, units, words = BEYOND[name]
    module = load(backend)
    if isinstance(module, str):
        pytest.skip(module)
    register(Cell(name, ("p",), ("h",), phase.returns[1:], (phase,), "nowhere", units))
    try:
        reason = module.supports(problem(draw(name).stack()))
        if (name, backend) == ("leaky", "eager"):
            assert reason is None
            assert draw(name).run("eager")["y"].requires_grad
        elif backend in ("numba", "eager", "reference"):
            assert words in reason
        else:
            assert reason
    finally:
        unregister(name)


def test_a_name_stands_for_one_cell():
    with pytest.raises(ValueError, match="'gru': there is one of this name"):
        register(replace(GRU, source="another"))
    register(SOUND)
    try:
        with pytest.raises(ValueError, match="there is one of this name"):
            register(SOUND)
    finally:
        unregister("made_up")
    assert "made_up" not in CELLS
    with pytest.raises(ValueError, match="stood for another cell in this process"):
        register(replace(SOUND, source="another"))
    for name in ("made_up", "lstm"):
        with pytest.raises(ValueError, match=r"register\(\) was given"):
            unregister(name)
