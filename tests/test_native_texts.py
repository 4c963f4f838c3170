"""The cells are written twice, in fastseq/cells and csrc/cells: both are held to one text."""

import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest

from fastseq.backends import load
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


@pytest.mark.parametrize("cell", CELLS.values(), ids=lambda cell: cell.name)
def test_constants(cell):
    constants = structs()[cell.name]
    flags = {True: "true", False: "false"}
    assert constants == {
        "NAME": f'"{cell.name}"',
        "G": str(cell.G),
        "PHASES": str(len(cell.phases)),
        "FIRST": "{" + ", ".join(map(str, first_gates(cell))) + "}",
        "APART": str(len(cell.apart_gates)),
        "HAS_C": flags[cell.states[1:] == ("c",)],
        "HAS_EXTRA": flags[bool(cell.extras)],
        "HAS_UNIT": flags[bool(cell.unit_parameters)],
        "KEEPS_GATES": flags[cell.keeps_gates(False)],
        "READS_H": flags[cell.reads_h],
    }
    # the gates that take x and s apart are the last ones, and there is room for one extra value
    assert cell.apart_gates == cell.gates[cell.G - len(cell.apart_gates) :]
    assert len(cell.extras) <= 1 and len(cell.unit_parameters) <= 1 and len(cell.states) <= 2


def test_the_extension_knows_the_same_cells():
    native = load("native")
    if isinstance(native, str):
        pytest.skip(native)
    for name, G, G_hh, has_c, has_extra, has_unit, keeps, apart in native._cpu.CELLS:
        cell = CELLS[name]
        assert (G, G_hh) == (cell.G, len(cell.recurrent_gates))
        assert (has_c, has_extra) == (len(cell.states) - 1, len(cell.extras))
        assert (has_unit, apart) == (len(cell.unit_parameters), len(cell.apart_gates))
        assert bool(keeps) == cell.keeps_gates(False)
    assert {row[0] for row in native._cpu.CELLS} == set(CELLS)
