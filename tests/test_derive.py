"""Backward texts that are derived: those of the library's cells beside the written ones, and what
cannot be derived."""

# ruff: noqa: F821  (the free names of a text are bound by each backend)
import inspect
from dataclasses import replace

import numpy as np
import pytest
from problems import draw, gradients
from wordy import registered

from fastseq import reference
from fastseq.cells import CELLS, LSTM, Cell, Phase, arguments, bind


def without_backward(cell):
    phases = tuple(replace(p, backward=None, gradients=()) for p in cell.phases)
    return replace(cell, phases=phases)


def run(text, names, values):
    results = bind(text, "test", **reference.VOCABULARY)(*(values[n] for n in arguments(text)))
    return dict(zip(names, results, strict=True))


WRITTEN = [
    pytest.param(cell, k, id=phase.backward.__name__)
    for cell in CELLS.values()
    for k, phase in enumerate(cell.phases)
    if not phase.backward.__code__.co_filename.startswith("<")
]
#: Those that add up or multiply in another order.
ROUNDED = frozenset({"peephole_lstm_backward"})


@pytest.mark.parametrize("cell, k", WRITTEN)
def test_what_is_written_is_what_is_derived(cell, k):
    """The same gradients of the same values, bit for bit unless ROUNDED says otherwise."""
    written, derived = cell.phases[k], without_backward(cell).phases[k]
    assert derived.backward is not written.backward
    assert sorted(derived.gradients) == sorted(written.gradients)
    assert set(arguments(derived.backward)) <= set(arguments(written.backward))
    random = np.random.default_rng(0)
    values = {n: random.uniform(-2, 2, 999) for n in arguments(written.forward)}
    values |= run(written.forward, written.returns, values)
    for name in arguments(written.backward):
        values.setdefault(name, random.normal(size=999))
    ours = run(derived.backward, derived.gradients, values)
    theirs = run(written.backward, written.gradients, values)
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, rtol=1e-13, atol=1e-15)
    same = all(np.array_equal(ours[n], theirs[n]) for n in theirs)
    assert same == (written.backward.__name__ not in ROUNDED)


def test_it_reads_as_a_text():
    """inspect finds it, as Triton and tools/write_cells.py do."""
    assert inspect.getsource(without_backward(LSTM).phases[0].backward) == (
        "def lstm_backward(dh, dc, i, f, g, o, c, c_prev):\n"
        "    t2 = tanh(c)\n"
        "    dt2 = dh * o\n"
        "    dc_total = dc + dt2 * dtanh(t2)\n"
        "    do = dh * t2\n"
        "    dg = dc_total * i\n"
        "    df = dc_total * c_prev\n"
        "    di = dc_total * g\n"
        "    da_i = di * dsigmoid(i)\n"
        "    da_f = df * dsigmoid(f)\n"
        "    da_g = dg * dtanh(g)\n"
        "    da_o = do * dsigmoid(o)\n"
        "    dc_prev = dc_total * f\n"
        "    return da_i, da_f, da_g, da_o, dc_prev\n"
    )


def test_two_equal_declarations_are_equal():
    assert without_backward(LSTM) == without_backward(LSTM) != LSTM


def signs_forward(a_p, u, h_prev):
    """Negative gradients, a name for an argument, and a value that is used three times."""
    before = h_prev
    k = -(a_p * u)
    h = k * k - tanh(before) * k
    return h, k


def signs(saved=("k",)):
    return Cell("signs", ("p",), ("h",), saved, (Phase(signs_forward, ("h", "k")),), "", ("u",))


def test_signs_and_names():
    """The declaration checks the gradients; u's needs a_p, which is saved."""
    cell = signs(("k", "a_p"))
    assert cell.underived is None and cell.beyond() is None
    source = inspect.getsource(cell.phases[0].backward)
    assert "return " in source and source.count("tanh(h_prev)") == 1
    assert "    da_p = -minus_da_p" in source and "    dh_prev = -minus_dh_prev" in source


@pytest.mark.parametrize("backend", ["reference", "numba"])
def test_a_backend_runs_it(backend):
    """As eager does, whose derivative is torch's."""
    with registered() as cell:
        assert cell.underived is None
        case = draw("wordy", T=3, H=5, directions=2, lengths=(3, 0, 2), reset=True)
        case.settle(backend)
        ours, theirs = case.run(backend), case.run("eager")
        ours |= gradients(ours, case.leaves())
        theirs |= gradients(theirs, case.leaves())
        for name, value in theirs.items():
            np.testing.assert_allclose(
                ours[name].detach(), value.detach(), rtol=1e-11, atol=1e-12, err_msg=name
            )


# What cannot be derived, though eager runs it


def _idle(a_p, u, h_prev):
    return h_prev * u, a_p


def _inner(a_p, u, h_prev):
    q = sigmoid(a_p)
    h = u * (q * q + h_prev)
    p = h + h
    return h, p


def _slope(a_p, u, h_prev):
    p = dtanh(a_p)
    return p * u * h_prev, a_p


def _of_no_file():
    scope = {}
    exec("def typed(a_p, u, h_prev):\n    return a_p * u * h_prev, a_p\n", scope)
    return scope["typed"]


@pytest.mark.parametrize(
    "text, saved, why",
    [
        (signs_forward, ("k",), "signs_forward: backward needs a_p; add it to saved"),
        (_idle, ("k",), "_idle: nothing that _idle returns depends on a_p"),
        (_inner, ("k",), "_inner: backward needs q = sigmoid(a_p), and a_p is not saved; return q"),
        (_slope, ("k",), "_slope: dtanh is a derivative, whose own is not known"),
        (_of_no_file(), ("k",), "typed: the source of typed cannot be read"),
    ],
    ids=["argument", "idle", "inner", "slope", "source"],
)
def test_why_there_is_none(text, saved, why):
    cell = Cell("none", ("p",), ("h",), saved, (Phase(text, ("h", "k")),), "", ("u",))
    assert cell.phases[0].backward is None and cell.phases[0].gradients == ()
    assert why in cell.beyond() and "choose eager" in cell.beyond()
    assert cell.beyond(autograd=True) is None


def _returned(a_p, u, h_prev):
    q = sigmoid(a_p)
    h = u * (q * q + h_prev)
    return h, h + h, q


def test_a_value_that_is_returned_and_not_saved_is_not_there():
    phase = Phase(_returned, ("h", "k", "q"))
    cell = Cell("none", ("p",), ("h",), ("k",), (phase,), "", ("u",))
    assert "backward needs q = sigmoid(a_p), and a_p is not saved" in cell.underived
    cell = Cell("none", ("p",), ("h",), ("k", "q"), (phase,), "", ("u",))
    assert cell.underived is None


# What no text may have


def _in_place(a_p, u, h_prev):
    p = tanh(a_p)
    p += h_prev
    return p * u, p


def _literal(a_p, u, h_prev):
    p = tanh(a_p)
    h = 2.0 * p + u * h_prev
    return h, p


def _division(a_p, u, h_prev):
    return a_p / u, h_prev


def _branch(a_p, u, h_prev):
    if u:
        a_p = h_prev
    return a_p, u


def _loop(a_p, u, h_prev):
    while u:
        pass
    return a_p, h_prev


def _again(a_p, u, h_prev):
    p = tanh(a_p)
    p = p * u
    return p + h_prev, p


def _chain(a_p, u, h_prev):
    p = q = tanh(a_p)
    return p * u + h_prev, q


@pytest.mark.parametrize(
    "text, line, why",
    [
        (_in_place, 2, r"'p \+= h_prev': a text is assignments, and a return at its end"),
        (_literal, 2, "'2.0': the literal would widen float32"),
        (_division, 1, r"'a_p / u': a text is made of \+ - \* and the words sigmoid, "),
        (_branch, 1, "a text is assignments"),
        (_loop, 1, "a text is assignments"),
        (_again, 2, "'p = p .* u': p has a value already"),
        (_chain, 1, "assign one name a line"),
    ],
)
def test_refused(text, line, why):
    """With the line of the file, and the reason."""
    at = text.__code__.co_firstlineno + line
    with pytest.raises(ValueError, match=rf"^made_up: {text.__name__}, line {at}: .*{why}"):
        Cell("made_up", ("p",), ("h",), ("k",), (Phase(text, ("h", "k")),), "", ("u",))
