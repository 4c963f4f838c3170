"""The cells are written twice, in fastseq/cells and csrc/cells: both are held to one text."""

import dataclasses
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastseq.backends import load
from fastseq.backends.contract import Problem
from fastseq.cells import CELLS

HEADERS = sorted((Path(__file__).parents[1] / "csrc" / "cells").glob("*.h"))
SOURCE = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in HEADERS)
SIGNATURE = r"Values<T, (\d+)> (\w+)\(([^)]*)\)\s*\{(.*?)\n\}"
STRUCT = r"struct (\w+)(?: : (\w+))? \{(.*?)\n\};"
CONSTANT = r"(\w+)(?:\[\])? = (\{[^}]*\}|[^,;]+)[,;]"


def of_cpp():
    """Name -> (arguments, lines, how many values it returns), without what only C++ needs."""
    texts = {}
    for count, name, arguments, body in re.findall(SIGNATURE, SOURCE, re.S):
        lines = [re.sub(r"^const T ", "", line.strip()) for line in body.split(";")]
        *lines, last = [" ".join(line.split()) for line in lines if line]
        lines.append(re.sub(r"^return \{(.*)\}$", r"return \1", last))
        given = tuple(re.sub(r"^T ", "", part.strip()) for part in arguments.split(","))
        texts[name] = given, lines, int(count)
    return texts


def of_python(text):
    source = inspect.getsource(text).splitlines()
    *lines, last = [line.strip() for line in source[1:]]
    lines.append(re.sub(r"^return \((\w+),\)$", r"return \1", last))
    return tuple(inspect.signature(text).parameters), lines, len(last.strip("(,)").split(","))


def structs():
    """A cell's name -> its constants in C++; a struct has those of its base, too."""
    found, by_struct = {}, {}
    for name, base, body in re.findall(STRUCT, SOURCE, re.S):
        constants = dict(by_struct.get(base, {}))
        for line in re.findall(r"static constexpr [^;]*;", body):
            line = line.removeprefix("static constexpr ")
            constants |= dict(re.findall(CONSTANT, line.split(" ", 1)[1]))
        by_struct[name] = constants
        if "NAME" in constants:
            found[constants["NAME"].strip('"')] = constants
    return found


TEXTS = [t for cell in CELLS.values() for p in cell.phases for t in (p.forward, p.backward)]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text.__name__)
def test_both_writings_are_one(text):
    cpp = of_cpp()
    assert text.__name__ in cpp
    assert cpp[text.__name__] == of_python(text)


def test_no_text_stands_in_cpp_alone():
    assert set(of_cpp()) == {text.__name__ for text in TEXTS}
    assert set(structs()) == set(CELLS)


def first_gates(cell):
    """FIRST: phase k multiplies gates FIRST[k] to FIRST[k + 1] of w_hh."""
    rows = [cell.product_rows(phase) for phase in cell.phases]
    assert all(a[1] == b[0] for a, b in pairwise(rows))
    return [rows[0][0], *(last for _, last in rows)]


def names(some):
    return f'"{" ".join(some)}"'


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_constants(cell):
    constants = structs()[cell.name]
    flags = {True: "true", False: "false"}
    assert constants == {
        "NAME": f'"{cell.name}"',
        "GATES": names(cell.gates),
        "STATES": names(cell.states),
        "EXTRAS": names(cell.extras),
        "UNITS": names(cell.unit_parameters),
        "G": str(cell.G),
        "C": str(len(cell.states) - 1),
        "E": str(len(cell.extras)),
        "U": str(len(cell.unit_parameters)),
        "PHASES": str(len(cell.phases)),
        "FIRST": "{" + ", ".join(map(str, first_gates(cell))) + "}",
        "APART": str(len(cell.apart_gates)),
        "KEEPS_GATES": flags[cell.keeps_gates(False)],
        "READS_H": flags[cell.reads_h],
    }
    # the gates that take x and s apart are the last ones; a second phase multiplies the first extra
    assert cell.apart_gates == cell.gates[cell.G - len(cell.apart_gates) :]
    assert [p.operand for p in cell.phases] == ["h_prev", *cell.extras][: len(cell.phases)]


def extension():
    native = load("native")
    if isinstance(native, str):
        pytest.skip(native)
    return native


def test_the_extension_knows_the_same_cells():
    native = extension()
    assert {row[0]: row for row in native._cpu.CELLS} == {
        name: native.row_of(cell) for name, cell in CELLS.items()
    }


def of_two_units(x_h, u, v, h_prev):
    h = relu(x_h + u * v * h_prev)  # noqa: F821  (bound by each backend)
    return (h,)


def doubled_unit(cell):
    """The same gates and states, and a text that takes one unit parameter more."""
    phase = dataclasses.replace(cell.phases[0], forward=of_two_units, backward=None, gradients=())
    return dataclasses.replace(cell, phases=(phase,), unit_parameters=("u", "v"))


OTHERS = {
    "native has no kernel of ugrnn, only of ": dataclasses.replace(CELLS["gru"], name="ugrnn"),
    "extras 's_n' where this cell has 's_n h'": dataclasses.replace(
        CELLS["gru"], saved=("r", "z", "n", "s_n", "h")
    ),
    "unit parameters 'u' where this cell has 'u v'": doubled_unit(CELLS["indrnn"]),
}


@pytest.mark.parametrize("said", OTHERS)
def test_a_cell_that_was_not_compiled_is_declined(monkeypatch, said):
    """By what it declares: another name, or the name of one that was and another declaration."""
    native, cell = extension(), OTHERS[said]
    problem = Problem(cell.name, torch.float32, "cpu", 3, 2, 4, 5, 5)
    monkeypatch.setitem(CELLS, cell.name, cell)
    assert said in native.supports(problem)
    monkeypatch.undo()
    assert cell.name == "ugrnn" or native.supports(problem) is None
