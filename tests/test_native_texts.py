"""The cells in C++, which tools/write_cells.py writes from fastseq/cells."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from wordy import wordy

from fastseq.backends import load
from fastseq.backends.contract import Problem
from fastseq.cells import CELLS, GRU, GRU_RESET_BEFORE, INDRNN, LSTM, Cell, Phase

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("write_cells", ROOT / "tools" / "write_cells.py")
write_cells = importlib.util.module_from_spec(spec)
spec.loader.exec_module(write_cells)


@pytest.mark.parametrize("file", ["cells/generated.h", "cells/list.h", "cuda/list.h"])
def test_what_is_committed_is_what_is_written(file):
    path = ROOT / "csrc" / file
    assert path.read_text() == write_cells.written()[path], "run tools/write_cells.py"


def test_no_other_cell_stands_in_cpp():
    kept = {path.name for path in (ROOT / "csrc" / "cells").iterdir()}
    assert kept == {"cell.h", "generated.h", "list.h"}


def extension():
    native = load("native")
    if isinstance(native, str):
        pytest.skip(native)
    return native


def test_the_extension_knows_the_same_cells():
    native = extension()
    assert {row[0]: row for row in native._cpu.CELLS} == {
        name: native.row_of(cell)
        for name, cell in CELLS.items()
        if write_cells.why_not(cell) is None
    }


# What is written of cells that the library has not


def add_forward(a_i, x_g, p, q, c_prev, n_prev):
    i = sigmoid(a_i + p * c_prev)  # noqa: F821  (bound by each backend)
    c = i * c_prev + (x_g - i * x_g)
    n = n_prev + q * c
    h = c * n
    return h, c, n, i


def add_backward(dh, dc, dn, i, x_g, c, n, c_prev, p, q):
    dn_prev = dn + dh * c
    dc_all = dc + dh * n + dn_prev * q
    dq = dn_prev * c
    dx_g = dc_all - dc_all * i
    da_i = dc_all * (c_prev - x_g) * dsigmoid(i)  # noqa: F821
    dp = da_i * c_prev
    dc_prev = dc_all * i + da_i * p
    return da_i, dx_g, dp, dq, dc_prev, dn_prev


def two_forward(a_r, z_prev):
    r = sigmoid(a_r) * z_prev  # noqa: F821
    q = r * r
    return q, r


def two_backward(dq, dr, r, a_r, z_prev):
    dr_all = dr + dq * r + dq * r
    s = sigmoid(a_r)  # noqa: F821
    da_r = dr_all * z_prev * dsigmoid(s)  # noqa: F821
    dz_prev = dr_all * s
    return da_r, dz_prev


def then_forward(a_n, r, z_prev):
    n = tanh(a_n)  # noqa: F821
    z = n * z_prev
    h = r * z
    return h, z, n


def then_backward(dh, dz, r, n, z, z_prev):
    dr = dh * z
    dz_all = dz + dh * r
    da_n = dz_all * z_prev * dtanh(n)  # noqa: F821
    dz_prev = dz_all * n
    return da_n, dr, dz_prev


#: Two other states, an extra that is taken, two unit parameters.
ADD = Cell(
    name="add",
    gates=("i", "g"),
    states=("h", "c", "n"),
    saved=("i", "c", "x_g"),
    phases=(
        Phase(
            forward=add_forward,
            returns=("h", "c", "n", "i"),
            backward=add_backward,
            gradients=("da_i", "dx_g", "dp", "dq", "dc_prev", "dn_prev"),
        ),
    ),
    unit_parameters=("p", "q"),
    source="none",
)
#: Two phases that both read a state, and hand a value on.
TWO = Cell(
    name="two_phased",
    gates=("r", "n"),
    states=("h", "z"),
    saved=("r", "n", "q", "a_r"),
    phases=(
        Phase(
            forward=two_forward,
            returns=("q", "r"),
            backward=two_backward,
            gradients=("da_r", "dz_prev"),
        ),
        Phase(
            operand="q",
            forward=then_forward,
            returns=("h", "z", "n"),
            backward=then_backward,
            gradients=("da_n", "dr", "dz_prev"),
        ),
    ),
    source="none",
)


def calls(cell, head):
    """The lines of a method of its struct that name `at`, without spaces at their ends."""
    lines = write_cells.struct_of(cell).split("\n")
    first = next(k for k, line in enumerate(lines) if f" {head}(At& at)" in line)
    body = lines[first + 1 : lines.index("  }", first)]
    return " ".join(line.strip() for line in body)


def test_states_extras_and_units():
    struct = write_cells.struct_of(TWO)
    assert "static constexpr int G = 2, C = 1, E = 2, U = 0, PHASES = 2;" in struct
    assert "FIRST[] = {0, 1, 2};" in struct
    assert calls(TWO, "forward") == (
        "if constexpr (PHASE == 0) { const auto a_r = at.a(0); "
        "const auto v = two_forward(a_r, at.c_prev(0)); "
        "at.save_extra(0, v[0]); at.save(0, v[1]); at.save_extra(1, a_r); "
        "} else { const auto v = then_forward(at.a(1), at.saved(0), at.c_prev(0)); "
        "at.h(v[0]); at.c(0, v[1]); at.save(1, v[2]); }"
    )
    assert calls(TWO, "backward") == (
        "if constexpr (PHASE == 0) { const auto v = two_backward(at.dvalue(), at.dz(0), "
        "at.saved(0), at.extra(1), at.c_prev(0)); at.da(0, v[0]); at.add_dc_prev(0, v[1]); "
        "} else { const auto v = then_backward(at.dvalue(), at.dc(0), at.saved(0), at.saved(1), "
        "at.c(0), at.c_prev(0)); at.da(1, v[0]); at.dz(0, v[1]); at.dc_prev(0, v[2]); }"
    )


def test_a_derived_backward_is_written_too():
    assert write_cells.why_not(wordy()) is None
    text = write_cells.generated([wordy()])
    assert "  const T before = logsigmoid(a_f) + m_prev;" in text
    assert "  const T dsize = minus_dsize" not in text and "dsqrt(size)" in text


def test_names_that_are_words_of_cpp():
    """A derived text calls the gradient of o so."""
    phase = without(LSTM.phases[0], backward=None, gradients=())
    text = write_cells.text_of(without(LSTM, phases=(phase,)).phases[0].backward)
    assert "  const T do_ = dh * t2;" in text and "  const T da_o = do_ * dsigmoid(o);" in text


def without(cell, **changed):
    return dataclasses.replace(cell, **changed)


def of_many(count):
    """A cell with so many unit parameters that do one thing."""
    names = [f"u{k}" for k in range(count)]
    source = f"def many_forward(x_h, {', '.join(names)}, h_prev):\n    h = x_h + h_prev * "
    source += f"({' + '.join(names)})\n    return (h,)\n"
    source += f"def many_backward(dh, {', '.join(names)}, h_prev):\n    du = dh * h_prev\n"
    source += f"    dh_prev = dh * ({' + '.join(names)})\n    return dh, {'du, ' * count}dh_prev\n"
    scope = {}
    exec(source, scope)
    phase = Phase(
        forward=scope["many_forward"],
        returns=("h",),
        backward=scope["many_backward"],
        gradients=("dx_h", *(f"d{n}" for n in names), "dh_prev"),
    )
    return Cell("many", ("h",), ("h",), ("h",), (phase,), "none", tuple(names))


def test_what_the_loops_have_no_place_for():
    """Each reason in words; a cell of the library's has none."""
    assert not any(write_cells.why_not(cell) for cell in CELLS.values())
    assert write_cells.why_not(TWO) is None
    assert "some of its gates have a recurrent part" in write_cells.why_not(ADD)
    assert write_cells.why_not(of_many(4)) is None
    assert "has 5 unit parameters, and the kernels have room for 4" in write_cells.why_not(
        of_many(5)
    )
    apart_first = without(GRU, gates=("n", "r", "z"), saved=("n", "r", "z", "s_n"))
    assert "the gates that take x and s apart are not its last" in write_cells.why_not(apart_first)
    extras = without(GRU_RESET_BEFORE, saved=("r", "z", "n", "a_r", "q"))
    assert "second phase does not multiply its first extra" in write_cells.why_not(extras)


def test_two_texts_of_one_name_are_refused():
    with pytest.raises(ValueError, match="another: another text is called lstm_forward, too"):
        other = without(LSTM, name="another", phases=(without(LSTM.phases[0], forward=renamed()),))
        write_cells.generated([LSTM, other])


def renamed():
    def lstm_forward(a_i, a_f, a_g, a_o, c_prev):
        i = sigmoid(a_i)  # noqa: F821
        f = sigmoid(a_f)  # noqa: F821
        g = tanh(a_g)  # noqa: F821
        o = sigmoid(a_o)  # noqa: F821
        c = f * c_prev + g * i
        h = o * tanh(c)  # noqa: F821
        return h, c, i, f, g, o

    return lstm_forward


# What native declines


def of_two_units(x_h, u, v, h_prev):
    h = relu(x_h + u * v * h_prev)  # noqa: F821  (bound by each backend)
    return (h,)


def doubled_unit(cell):
    """The same gates and states, and a text that takes one unit parameter more."""
    phase = dataclasses.replace(cell.phases[0], forward=of_two_units, backward=None, gradients=())
    return dataclasses.replace(cell, phases=(phase,), unit_parameters=("u", "v"))


OTHERS = {
    "native has no kernel of gru_like, only of rnn_tanh, ": without(GRU, name="gru_like"),
    "extras 's_n' where this cell has 's_n h'": without(GRU, saved=("r", "z", "n", "s_n", "h")),
    "unit parameters 'u' where this cell has 'u v'": doubled_unit(INDRNN),
}


@pytest.mark.parametrize("said", OTHERS)
def test_a_cell_that_was_not_compiled_is_declined(monkeypatch, said):
    """By what it declares: another name, or the name of one that was and another declaration."""
    native, cell = extension(), OTHERS[said]
    problem = Problem(cell.name, torch.float32, "cpu", 3, 2, 4, 5, 5)
    monkeypatch.setitem(CELLS, cell.name, cell)
    assert said in native.supports(problem)
    monkeypatch.undo()
    assert cell.name == "gru_like" or native.supports(problem) is None
