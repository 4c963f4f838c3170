"""Loops over pieces of a call, each of more than one piece: every gradient, by the rule.

Native's backward goes by windows of about 1 MB of gate gradients, at least 768 rows: a test of
fewer rows cannot see what is left out of one. Its large products go by pieces of k, and so do
Numba's.
"""

import re
from itertools import product
from pathlib import Path

import pytest
import torch
from pairwise import covering
from problems import KINKED, draw, gradients
from rules import check_all, same_bits

from fastseq.cells import CELLS

ROOT = Path(__file__).parents[1]
#: Windows are the same for float32 as for float64, and those of pairs for bfloat16.
DTYPES = {"float64": torch.float64, "bfloat16": torch.bfloat16}
#: T, B
SIZES = {
    "dense": (39, 42),
    "strided": (39, 42),  # x is a view of (B, T, I)
    "ragged": (46, 78),
    "long": (401, 4),
    "tall": (3, 777),  # a step alone is more than a window
}
AXES = {
    "cell": [*CELLS, "lstm projected"],
    "layout": list(SIZES),
    "directions": [1, 2],
    "reset": [False, True],
    "h_mask": [False, True],
    "memory": ["full", "lean"],
    "dtype": list(DTYPES),
}
#: These go round.
THREADS, STATE = [1, 2, 4], [True, False]


def sensible(row):
    """Next to a ReLU's kink the gradient is whichever side the rounding falls."""
    return row["dtype"] == "float64" or row["cell"] not in KINKED


def name_of(row):
    flags = [name for name, value in row.items() if value is True]
    rest = [str(row[name]) for name in ("cell", "layout", "memory", "dtype")]
    return "-".join([*rest, f"{row['directions']}x{row['threads']}", *flags])


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        strength = 3 if metafunc.config.getoption("--full") else 2
        rows = [
            row | {"threads": THREADS[k % 3], "state": STATE[k % 2]}
            for k, row in enumerate(covering(AXES, sensible, strength))
        ]
        metafunc.parametrize("row", rows, ids=name_of)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def constant(name):
    """A constant of csrc/, as its only definition has it: the sizes below are made of them, so
    that a change of one cannot turn many pieces into one unseen."""
    texts = [p.read_text() for kind in ("*.h", "*.cpp") for p in (ROOT / "csrc").rglob(kind)]
    found = [m for text in texts for m in re.findall(rf"\b{name} = ([^;,]+)[;,]", text)]
    assert len(found) == 1, f"csrc/ defines {name} {len(found)} times"
    known = re.sub(r"\b[A-Z]+\b", lambda other: str(constant(other[0])), found[0])
    number = re.fullmatch(r"(?:index\()?(\d+)\)?(?: (\*|<<) (\d+))?", known)
    assert number, f"csrc/ has {name} = {found[0]}"
    first, sign, second = number.groups()
    return int(first) * (1 if sign is None else int(second) if sign == "*" else 1 << int(second))


def columns(cell):
    """What a row of the gate gradients holds, in units of H."""
    return CELLS[cell].G + len(CELLS[cell].apart_gates)


def least_width(cell, dtype):
    """The least even H with which a window has no more than its least rows."""
    itemsize = 8 if dtype is torch.float64 else 4
    row = columns(cell) * itemsize * constant("LEAST_ROWS")
    return constant("LEAST_BYTES") // row // 2 * 2 + 2


def windows_of(alive, cell, H, dtype, directions):
    """How many windows a backward has, as Shared::window_end counts them; alive: rows a step."""
    itemsize = 8 if dtype is torch.float64 else 4
    row = columns(cell) * H * itemsize
    most = max(constant("LEAST_BYTES") // row, constant("LEAST_ROWS"))
    walks = [list(reversed(alive)), list(alive)][:directions]
    k = count = 0
    while k < len(alive):
        ends = []
        for walk in walks:
            end, rows = k, 0
            while end < len(walk) and (end == k or rows + walk[end] <= most):
                rows += walk[end]
                end += 1
            ends.append(end)
        k = min(ends)
        count += 1
    return count


def case_of(row, H=None):
    """The layers of a row, and the rows that are alive at each step."""
    cell, _, projected = row["cell"].partition(" ")
    T, B = SIZES[row["layout"]]
    dtype = DTYPES[row["dtype"]]
    H = H or least_width(cell, dtype)
    lengths = None
    if row["layout"] == "ragged":
        lengths = [(17 * b) % (T + 1) for b in range(B)]
        lengths[3] = T
    case = draw(
        cell,
        T,
        B,
        I=6,
        H=H,
        P=H // 2 + H // 2 % 2 if projected else None,
        directions=row["directions"],
        state=row["state"],
        lengths=lengths,
        reset=row["reset"],
        h_mask=row["h_mask"],
        dtype=dtype,
        seed=T,
    )
    if row["layout"] == "strided":
        x = case.x.detach().transpose(0, 1).contiguous().transpose(0, 1)
        case.x = x.requires_grad_()
    alive = [B] * T if lengths is None else [sum(n > t for n in lengths) for t in range(T)]
    return case, alive


def values(case, backend, memory="full"):
    outputs = case.run(backend, memory=memory)
    return outputs | gradients(outputs, case.leaves())


def check(case, backend, memory, what):
    """By the rule; truth is the eager form in float64, which is quick and has no pieces, torch's
    error that of the eager form in the same type. test_parity.py holds it to the independent."""
    case.settle(backend, memory=memory)
    dtype = case.x.dtype
    with torch.no_grad():
        bare = case.run(backend, memory=memory)
    ours = values(case, backend, memory)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    exact = values(case.to(torch.float64), "eager")
    theirs = None if dtype is torch.float64 else values(case.to(dtype), "eager")
    torch.set_num_threads(before)
    check_all(ours, theirs, exact, dtype, what)
    for name, value in bare.items():
        assert same_bits(value, ours[name]), f"{what}: {name} without gradients"


def test_windows(row):
    case, alive = case_of(row)
    count = windows_of(alive, case.cell, case.H, case.x.dtype, case.directions)
    assert count >= 3, f"{count} windows: more rows are needed"
    torch.set_num_threads(row["threads"])
    check(case, "native", row["memory"], name_of(row))


#: In the ordinary run two of the four.
ROWS = [
    pytest.param(cell, layout, dtype, marks=() if together else pytest.mark.full)
    for cell in CELLS
    for layout, dtype in product(("dense", "ragged"), DTYPES)
    if sensible({"cell": cell, "dtype": dtype})
    for together in [(layout, dtype) in (("dense", "float64"), ("ragged", "bfloat16"))]
]


def of_many_rows(cell, layout, dtype, H):
    row = {"cell": cell, "layout": layout, "dtype": dtype, "directions": 2}
    return case_of(row | dict.fromkeys(("reset", "h_mask", "state"), True), H)


@pytest.mark.parametrize(("cell", "layout", "dtype"), ROWS)
def test_many_rows(cell, layout, dtype):
    """Sums over the rows of one window go by chunks of them."""
    case, alive = of_many_rows(cell, layout, dtype, 16)
    assert windows_of(alive, cell, case.H, case.x.dtype, 2) == 1
    assert sum(alive) > 2 * constant("CHUNK")  # of pairs twice as many
    torch.set_num_threads(4)  # of either direction two share the rows
    check(case, "native", "lean", f"{cell} {layout}")


@pytest.mark.parametrize(("cell", "layout", "dtype"), ROWS)
def test_many_rows_of_numba(cell, layout, dtype, monkeypatch):
    """Its products go by pieces of rows, and its sums of units by chains of them and by tasks."""
    case, alive = of_many_rows(cell, layout, dtype, 96)
    case.settle("numba", memory="lean")
    from fastseq.backends import numba, numba_loops, numba_products

    ranges, found = numba.row_ranges, []
    monkeypatch.setattr(numba, "row_ranges", lambda *a: found.append(ranges(*a)) or found[-1])
    torch.set_num_threads(4)
    check(case, "numba", "lean", f"{cell} {layout}")
    assert sum(alive) > 2 * max(numba_products._PIECE, numba_loops.CHAIN)
    assert any(len(tasks) == 4 for tasks in found)


WIDE = {
    "units": {"T": 3, "B": 5, "I": 6, "H": 692},
    "input": {"T": 2, "B": 9, "I": 2100, "H": 8},
    "one sequence": {"T": 3, "B": 1, "I": 9, "H": 692},
}


@pytest.mark.parametrize("wide", WIDE)
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
@pytest.mark.parametrize("backend", ["native", "numba"])
def test_wide_products(backend, cell, wide):
    """Products go by pieces of their inner length: of units, gates or the input."""
    sizes = WIDE[wide]
    assert max(sizes["I"], CELLS[cell].G * sizes["H"]) > constant("DEPTH")
    check(draw(cell, **sizes), backend, "full", f"{backend} {cell} {wide}")
