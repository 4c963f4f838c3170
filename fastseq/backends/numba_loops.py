"""The loops over time for Numba, written from a cell's declaration.

One kernel walks forward, one backward. A call of a kernel is one *task*: one recurrence and a range
of the batch's rows, from step to step, with nobody to wait for. A task owns its rows of every
buffer, the states it carries (``h``, ``c``: at the end they are the final states), and scratch.

A time step of forward is, for each phase of the cell,

- the input product, where a task has rows enough to make it here, while its gates are in cache,
  and not before for all steps at once;
- the product: ``s[rows] = operand[rows] @ w_hh.T``, on packed weights (`numba_simd.gemm`), and
- the pointwise text, a vector of hidden units at a time: it reads ``x`` (the input product) and
  ``s``, and writes the saved values over ``x``, the further ones into buffers of their own.

A step of backward runs the phases in reverse: the pointwise text gives the gate gradients, and the
product adds ``dgates @ w_hh`` to the carried gradient of h.

A kernel takes the address of a list of tasks; addresses and sizes stand in a row of integers each,
whose places are named by :func:`slots`. A buffer that is not wanted is one row of scratch with row
stride 0.

Zoneout has kernels of its own, compiled when they are first asked for, so that those of plain calls
are what they would be without. Where the text of a plain kernel stores a state, theirs stores what
:class:`Zone` makes of it and of the state before, and what backward wants as the text gave it goes
to a buffer besides. Backward splits the gradient of a state first: one part goes to the text, the
other to what is left for the step before.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any, Literal, NamedTuple

import numba
import numpy as np

from ..cells import Cell, Phase, arguments, bind
from .numba_simd import JIT, digest, simd
from .numba_threads import run

_SIZES = (
    # steps, batch, rows [first, last) of it; sizes and offsets of the steps (0: dense); reset or 0
    "T B first_row last_row H P reverse sizes offsets reset y_stride"
)
_FORWARD = (
    # addresses; w_in: packed input weights, 0: the input product is in x already; x_kept: x has a
    # row for each of the input, else for each of the task's; s_given: the product is in s already,
    # for each row of the input
    "input I w_in x x_kept bias s s_stride s_given w_hr m m_stride y h h_mask operand b_hh"
)
_BACKWARD = "dgates dproduct h_0 zeros dy dy_stride dh dh_all dm dunit"
#: For each phase its packed weights (0: it has no product, or that is made elsewhere), for each
#: unit parameter, extra value, value handed on (its gradient, a row for each of the task's), and
#: state other than h: as it is carried, its value at every step, its first, and the gradients.
_NUMBERED = {
    "phase": "w_{}",
    "unit": "unit_{}",
    "extra": "extra_{0} extra_{0}_stride",
    "handed": "dhanded_{}",
    "state": "c_{0} c_{0}_all c_{0}_stride c_{0}_0 dc_{0} dc_{0}_all dc_{0}_all_stride",
}


#: Of zoneout: of each state (h is 0) where it stays, bytes, its value as the text gave it, and the
#: part of a gradient that is the state's before; the parts that stay, and those that do not.
_ZONED = "stay_{0} stay_{0}_stride made_{0} made_{0}_stride left_{0}"


class Zone(NamedTuple):
    """What a kernel of zoneout is written for: states that stay where a mask says so, or of which a
    part stays; h as it is, or projected, which is zoned after the text."""

    kind: Literal["stay", "part"]
    projected: bool

    def blended(self, k: int, new: str, old: str) -> str:
        """State k from the one that the text gave and the one before the step."""
        if self.kind == "stay":
            return f"BLEND(stay_{k}_row, j, {old}, {new};N)"
        return f"{new} + part_{k} * ({old} - {new})"

    def split(self, k: int, total: str) -> tuple[str, str]:
        """The gradients of both from that of the state."""
        if self.kind == "part":
            return f"rest_{k} * {total}", f"part_{k} * {total}"
        return self.blended(k, total, "NOTHING"), self.blended(k, "NOTHING", total)

    def start(self, cell: Cell) -> list[str]:
        """What a task loads once."""
        if self.kind == "stay":
            return ["NOTHING = splat(ZERO)"]
        n = range(len(cell.states))
        return [f"{name}_{k} = splat(load1({name}s, {k}))" for name in ("part", "rest") for k in n]

    def keeps(self, cell: Cell, k: int) -> bool:
        """Whether anything takes state k as the text gave it: backward, a later phase, or the
        projection."""
        handed = any(cell.states[k] in phase.takes for phase in cell.phases)
        return cell.taken_back[k] or handed or (k == 0 and self.projected)

    def rows(self, cell: Cell) -> list[str]:
        """The rows of its buffers at (step, b)."""
        made = [k for k in range(len(cell.states)) if self.keeps(cell, k)]
        lines = [_row(f"made_{k}", "(base + b)", f"made_{k}_stride") for k in made]
        if self.kind == "stay":
            lines += [
                f"stay_{k}_row = stay_{k} + (base + b) * stay_{k}_stride"
                for k in range(len(cell.states))
            ]
        return lines


@cache
def slots(cell: Cell, zoned: bool = False) -> dict[str, int]:
    """Name -> place in the row of a task's arguments."""
    counts = {
        "phase": len(cell.phases),
        "unit": len(cell.unit_parameters),
        "extra": len(cell.extras),
        "handed": len(cell.handed_on),
        "state": len(cell.other_states),
    }
    names = f"{_SIZES} {_FORWARD} {_BACKWARD}".split()
    for kind, count in counts.items():
        names += [n for k in range(count) for n in _NUMBERED[kind].format(k).split()]
    if zoned:
        names += [n for k in range(len(cell.states)) for n in _ZONED.format(k).split()]
        names += ["parts", "rests"]
    return {name: place for place, name in enumerate(names)}


_STEP = """\
def {name}(data):
    tasks = load_int(data, 1)
    task = take(data)
    while task < tasks:
        p = data + (2 + task * {count}) * 8
{slots}
        for step in range(T):
            t = {walk}
            if sizes:
                alive = load_int(sizes, t)
                base = load_int(offsets, t)
            else:
                alive = B
                base = t * B
            rows = min(alive, last_row) - first_row
            if rows > 0:
{body}
        task = take(data)
"""

#: A sum over rows is a sum of sums of chains: one chain over all of them would round too often.
CHAIN, LEVELS = 32, 3
_SUM_OF_CHAINS = """\
chain += 1
span = {CHAIN}
for level in range({LEVELS} - 1):
    if chain % span == 0:
        for i in range(level * {U} * H, (level + 1) * {U} * H):
            store1(dunit, {U} * H + i, load1(dunit, {U} * H + i) + load1(dunit, i))
            store1(dunit, i, ZERO)
    span *= {CHAIN}
"""

_ZERO_WHERE_RESET = """\
if reset:
    for b in range(first_row, first_row + rows):
        if load_byte(reset, base + b):
{zero}
"""


def _indent(text: str, levels: int) -> str:
    return textwrap.indent(text, "    " * levels)


def _block_of_units(lines: list[str], units: str = "H", whole: str = "whole") -> str:
    """Pointwise code over all hidden units: whole vectors, then the tail of one masked vector.

    In ``lines`` ``load(..)``, ``store(..)`` and ``blend(..)`` address unit j; the tail's take n
    lanes.
    """
    main = tail = "\n".join(lines)
    for name in ("LOAD(", "STORE(", "BLEND("):
        tail = tail.replace(name, f"{name[:-1].lower()}_part(")
        main = main.replace(name, name.lower())
    tail = tail.replace(";N)", f", {units} - {whole})")
    main = main.replace(";N)", ")")
    return "\n".join(
        [
            f"for j in range(0, {whole}, LANES):",
            _indent(main, 1),
            f"if {whole} < {units}:",
            f"    j = {whole}",
            _indent(tail, 1),
        ]
    )


def _load(pointer: str, offset: str = "j") -> str:
    return f"LOAD({pointer}, {offset};N)"


def _store(pointer: str, offset: str, value: str) -> str:
    return f"STORE({pointer}, {offset}, {value};N)"


def _gate(k: int) -> str:
    return f"{k} * H + j" if k else "j"


def _row(buffer: str, index: str, stride: str) -> str:
    return f"{buffer}_row = {buffer} + {index} * {stride} * ITEMSIZE"


class _Names:
    """Where the values of a cell live."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def state(self, name: str) -> str:
        """The buffers of a state other than h."""
        return f"c_{self.cell.other_states.index(name)}"

    def unit(self, name: str) -> str:
        return _load(f"unit_{self.cell.unit_parameters.index(name)}")

    def saved(self, name: str) -> tuple[str, str]:
        """Row and offset of a saved value."""
        k = self.cell.saved.index(name)
        return ("x_row", _gate(k)) if k < self.cell.G else (f"extra_{k - self.cell.G}_row", "j")

    def gradient(self, name: str) -> str:
        """The buffer of the gradient of a value that is handed on."""
        return f"dhanded_{self.cell.handed_on.index(name)}"

    def rows(self) -> list[str]:
        """The rows that forward and backward both read."""
        lines = [_row("x", "(x_base + b)", f"({self.cell.G} * H)")]
        for k in range(len(self.cell.extras)):
            lines.append(_row(f"extra_{k}", "(base + b)", f"extra_{k}_stride"))
        for k in range(len(self.cell.other_states)):
            lines.append(_row(f"c_{k}_all", "(base + b)", f"c_{k}_stride"))
        return lines


def _call(k: int, takes: Sequence[str], returns: Sequence[str]) -> str:
    """The call of a text. v_ and new_ set a cell's names apart from addresses."""
    results = ", ".join(f"new_{name}" for name in returns)
    given = ", ".join(f"v_{name}" for name in takes)
    return f"{results}{',' if len(returns) == 1 else ''} = text_{k}({given})"


def _zero_states(cell: Cell, buffers: Sequence[str]) -> str:
    """h and the other states, or their gradients, are zero in row b."""
    lines = []
    for k, buffer in enumerate(buffers):
        width = "H" if k else "P"
        lines.append(f"for i in range({width}):")
        lines.append(f"    store1({buffer}, b * {width} + i, ZERO)")
    return _ZERO_WHERE_RESET.format(zero=_indent("\n".join(lines), 3))


def _operand(cell: Cell, phase: Phase) -> tuple[str, str]:
    """Address and row stride of what an earlier phase has saved for a product."""
    k = cell.saved.index(phase.operand)
    if k < cell.G:
        first = f"((x_base + first_row) * {cell.G} + {k}) * H"
        return f"x + {first} * ITEMSIZE", f"{cell.G} * H"
    extra = f"extra_{k - cell.G}"
    return f"{extra} + (base + first_row) * {extra}_stride * ITEMSIZE", f"{extra}_stride"


def _masked_rows(source: str, out: str, added: str) -> str:
    """The rows of a step, (rows, P) side by side, times those of h_mask."""
    value, last = (
        f"{of}({source}, j) * {of}(h_mask, j)" + (f" + {of}({added}, j)" if added else "")
        for of in ("load", "load1")
    )
    return f"""\
end = (first_row + rows) * P
for j in range(first_row * P, end - LANES + 1, LANES):
    store({out}, j, {value})
for j in range(end - rows * P % LANES, end):
    store1({out}, j, {last})"""


def _forward_product(cell: Cell, k: int, phase: Phase) -> list[str]:
    first, last = cell.product_rows(phase)
    if not last:
        return []
    out = f"s + {first} * H * ITEMSIZE, s_stride"
    if phase.operand != "h_prev":
        address, stride = _operand(cell, phase)
        return [f"gemm({address}, {stride}, 1, w_{k}, {out}, rows, H, {last - first} * H, False)"]
    return [
        f"""\
if w_{k}:
    if h_mask:
{_indent(_masked_rows("h", "operand", ""), 2)}
        source = operand
    else:
        source = h
    gemm(source + first_row * P * ITEMSIZE, P, 1, w_{k}, {out},
         rows, P, {last - first} * H, False)"""
    ]


def _forward_argument(names: _Names, name: str, zone: Zone | None) -> str:
    """The load of what a forward text takes."""
    cell = names.cell
    kind, _, gate = name.partition("_")
    if gate in cell.gates and kind in ("a", "x", "s"):
        place = _gate(cell.gates.index(gate))
        given = f"{_load('x_row', place)} + {_load('bias', place)}"
        if kind == "x":
            return given
        place = _gate(cell.recurrent_gates.index(gate))
        product = _load("s_row", place)
        return f"{given} + {product}" if kind == "a" else f"{product} + {_load('b_hh', place)}"
    if name == "h_prev":
        return _load("h_row")
    if name in cell.unit_parameters:
        return names.unit(name)
    state = name.removesuffix("_prev")  # the carried one, before its phase has run and after it
    if zone and name in cell.other_states:
        return _load(f"made_{cell.states.index(name)}_row")
    if state in cell.other_states:
        return _load(f"{names.state(state)}_row")
    return _load(*names.saved(name))


def _forward_phase(cell: Cell, k: int, phase: Phase, zone: Zone | None) -> str:
    names = _Names(cell)
    takes = arguments(phase.forward)
    lines = [f"v_{name} = {_forward_argument(names, name, zone)}" for name in takes]
    lines.append(_call(k, takes, phase.returns))
    for name in dict.fromkeys((*phase.returns, *takes)):
        value = f"new_{name}" if name in phase.returns else f"v_{name}"
        if name in cell.saved and (name in phase.returns or name in cell.extras):
            lines.append(_store(*names.saved(name), value))
        if name not in phase.returns:
            continue
        if zone and name in cell.states:
            place = cell.states.index(name)
            if zone.keeps(cell, place):
                lines.append(_store(f"made_{place}_row", "j", value))
            if name == "h" and zone.projected:
                continue
            old = _load("h_row" if name == "h" else f"{names.state(name)}_row")
            lines.append(f"now_{name} = {zone.blended(place, value, old)}")
            value = f"now_{name}"
        if name == "h":
            lines.append(_store("m_row", "j", value))
            lines.append(_store("y_row", "j", value))
        elif name in cell.states:
            lines.append(_store(f"{names.state(name)}_row", "j", value))
            lines.append(_store(f"{names.state(name)}_all_row", "j", value))
    rows = [
        *names.rows(),
        "if s_given:",
        "    s_row = s + (base + b) * s_stride * ITEMSIZE",
        "else:",
        "    s_row = s + (b - first_row) * s_stride * ITEMSIZE",
        _row("h", "b", "P"),
        *(_row(names.state(s), "b", "H") for s in cell.other_states),
        *(zone.rows(cell) if zone else ()),
        # without projection the new h goes to the carried state and to y, with it to m alone
        "m_row = m + (base + b) * m_stride * ITEMSIZE if w_hr else h_row",
        "y_row = m_row if w_hr else y + (base + b) * y_stride * ITEMSIZE",
    ]
    code = _forward_product(cell, k, phase)
    code.append("for b in range(first_row, first_row + rows):")
    code.append(_indent("\n".join(rows), 1))
    code.append(_indent(_block_of_units(lines), 1))
    return "\n".join(code)


def _projection(cell: Cell, zone: Zone | None) -> str:
    """h from what the text left in m."""
    source = "m + (base + first_row) * m_stride * ITEMSIZE, m_stride, 1, w_hr"
    if zone is None:
        return f"""\
if w_hr:
    gemm({source},
         h + first_row * P * ITEMSIZE, P, rows, H, P, False)
    for b in range(first_row, first_row + rows):
        for i in range(P):
            store1(y, (base + b) * y_stride + i, load1(h, b * P + i))"""
    lines = [
        f"now_h = {zone.blended(0, _load('y_row'), _load('h_row'))}",
        _store("h_row", "j", "now_h"),
        _store("y_row", "j", "now_h"),
    ]
    rows = [*zone.rows(cell), _row("h", "b", "P"), _row("y", "(base + b)", "y_stride")]
    return f"""\
gemm({source}, y + (base + first_row) * y_stride * ITEMSIZE, y_stride, rows, H, P, False)
for b in range(first_row, first_row + rows):
{_indent(chr(10).join(rows), 1)}
{_indent(_block_of_units(lines, "P", "whole_P"), 1)}"""


def forward_source(cell: Cell, zone: Zone | None = None) -> str:
    """The text of a cell's forward kernel."""
    names = _Names(cell)
    body = [
        _zero_states(cell, ["h", *map(names.state, cell.other_states)]),
        f"""\
x_base = base if x_kept else -first_row
if w_in:
    gemm(input + (base + first_row) * I * ITEMSIZE, I, 1, w_in,
         x + (x_base + first_row) * {cell.G} * H * ITEMSIZE, {cell.G} * H, rows, I, {cell.G} * H,
         False)""",
    ]
    body += [_forward_phase(cell, k, phase, zone) for k, phase in enumerate(cell.phases)]
    if zone is None or zone.projected:
        body.append(_projection(cell, zone))
    return _loop(cell, "forward", "T - 1 - step if reverse else step", body, [], zone)


def _loop(
    cell: Cell, way: str, walk: str, body: list[str], start: list[str], zone: Zone | None
) -> str:
    """The text of a kernel, which loads of a task's arguments what it uses."""
    text = "\n".join(body)
    places = slots(cell, zone is not None)
    if zone is not None:
        way = f"{zone.kind}_{way}"
        start = [*start, *zone.start(cell), "whole_P = P - P % LANES"]
    used = set(re.findall(r"\w+", " ".join((text, walk, *start))))
    used |= {"T", "B", "sizes", "offsets", "first_row", "last_row", "H"}
    lines = [f"{name} = load_int(p, {at})" for name, at in places.items() if name in used]
    return _STEP.format(
        name=f"{cell.name}_{way}_loop",
        count=len(places),
        slots=_indent("\n".join([*lines, "whole = H - H % LANES", *start]), 2),
        walk=walk,
        body=_indent(text, 4),
    )


def _backward_argument(
    names: _Names, name: str, returns: tuple[str, ...], zone: Zone | None
) -> str:
    """The load of what a backward text takes."""
    cell = names.cell
    if name[0] == "d" and name[1:] in returns:
        value = name[1:]
        if zone and value in cell.states:  # split by the phase that runs first
            if value == "h" and zone.projected:
                return _load("dh_row")
            last = value in cell.phases[-1].returns
            return f"split_{value}" if last else _load(f"d{names.state(value)}_row")
        if value == "h":
            return f"{_load('dh_row')} + {_load('dy_row')}"
        if value in cell.states:
            buffer = f"d{names.state(value)}"
            return f"{_load(f'{buffer}_row')} + {_load(f'{buffer}_all_row')}"
        return _load(f"{names.gradient(value)}_row")
    if name == "h":  # y holds it, or m where it is projected
        return _load("made_0_row" if zone else "h_row")
    if name in cell.saved:
        return _load(*names.saved(name))
    if name in cell.unit_parameters:
        return names.unit(name)
    if name == "h_prev":
        return _load("h_prev_row")
    if zone and name in cell.states:
        return _load(f"made_{cell.states.index(name)}_row")
    if name in cell.states:
        return _load(f"{names.state(name)}_all_row")
    return _load(f"{names.state(name.removesuffix('_prev'))}_prev_row")


class _Backward:
    """The steps of a backward kernel, the last phase first.

    The gradient of a state before the step, and of a value that is handed on, may come from several
    phases: the first writes it, the others add to it. With zoneout the first adds to what the split
    has left of the gradient of a state.
    """

    def __init__(self, cell: Cell, zone: Zone | None) -> None:
        self.cell, self.names, self.zone = cell, _Names(cell), zone
        self.written: set[str] = set()
        if zone and zone.projected:  # the split has left it there
            self.written.add("h_prev")
        phases = list(enumerate(cell.phases))
        self.code = [line for k, phase in reversed(phases) for line in self.phase(k, phase)]
        buffers = {"h_prev": ("dh", "P")}
        buffers |= {f"{s}_prev": (f"d{self.names.state(s)}", "H") for s in cell.other_states}
        for name, (buffer, width) in buffers.items():
            if name not in self.written:  # nothing of the step before enters
                self.code.append(
                    f"""\
for b in range(first_row, first_row + rows):
    for i in range({width}):
        store1({buffer}, b * {width} + i, ZERO)"""
                )

    def adds(self, name: str) -> bool:
        """Whether a gradient adds to what is there; from then on the next one does."""
        found = name in self.written
        self.written.add(name)
        return found

    def gradient(self, name: str) -> list[str]:
        """The stores of a gradient that a text gives."""
        cell, names, value = self.cell, self.names, f"new_{name}"
        kind, _, gate = name.partition("_")
        if kind in ("da", "dx", "ds") and gate in cell.gates:
            lines = []
            if kind != "ds":
                lines.append(_store("dgates_row", _gate(cell.gates.index(gate)), value))
            if kind != "dx" and gate in cell.recurrent_gates and cell.parts_differ:
                place = cell.recurrent_gates.index(gate)
                lines.append(_store("dproduct_row", _gate(place), value))
            return lines
        of = name[1:]
        if of in cell.unit_parameters:
            at = _gate(cell.unit_parameters.index(of))
            return [_store("dunit", at, f"{_load('dunit', at)} + {value}")]
        state = of.removesuffix("_prev")
        if state == "h":
            row = "dh_row"
        elif state in cell.states:
            row = f"d{names.state(state)}_row"
        else:
            row = f"{names.gradient(of)}_row"
        if self.zone and state in cell.states and of not in (state, *self.written):
            self.written.add(of)
            return [_store(row, "j", f"{self.left(state)} + {value}")]
        # what a later phase gives of a state adds to what the next step has left
        add = of in cell.states or self.adds(of)
        return [_store(row, "j", f"{_load(row)} + {value}" if add else value)]

    def split(self, phase: Phase) -> list[str]:
        """The gradients of all states, each in two."""
        cell, lines = self.cell, []
        assert self.zone is not None
        for k, state in enumerate(cell.states):
            if k == 0 and self.zone.projected:
                continue
            row = "dh_row" if k == 0 else f"d{self.names.state(state)}_row"
            more = "dy_row" if k == 0 else f"d{self.names.state(state)}_all_row"
            new, left = self.zone.split(k, f"total_{state}")
            lines.append(f"total_{state} = {_load(row)} + {_load(more)}")
            lines += [f"split_{state} = {new}", f"left_{state} = {left}"]
            if state not in phase.returns:
                lines.append(_store(row, "j", f"split_{state}"))
            if len(cell.phases) > 1:
                lines.append(_store(f"left_{k}_row", "j", f"left_{state}"))
        return lines

    def left(self, state: str) -> str:
        """What the split has left for the state before."""
        if len(self.cell.phases) == 1:
            return f"left_{state}"
        return _load(f"left_{self.cell.states.index(state)}_row")

    def passed_on(self, k: int, phase: Phase) -> list[str]:
        """The stores of what the split has left, before a product adds to it, or where nothing of
        the state before enters."""
        multiplies = self.cell.product_gates(phase) and phase.operand == "h_prev"
        lines = []
        for state in self.cell.states if k == 0 else self.cell.states[: bool(multiplies)]:
            if not self.adds(f"{state}_prev"):
                row = "dh_row" if state == "h" else f"d{self.names.state(state)}_row"
                lines.append(_store(row, "j", self.left(state)))
        return lines

    def product(self, k: int, phase: Phase) -> list[str]:
        """The gradient of a product's operand."""
        cell = self.cell
        first, last = cell.product_rows(phase)
        if not last:
            return []
        given = "dproduct" if cell.parts_differ else "dgates"
        inner = f"{last - first} * H"
        source = (
            f"gemm({given} + ((base + first_row) * {cell.G_hh} + {first}) * H * ITEMSIZE, "
            f"{cell.G_hh} * H, 1, w_{k}, "
        )
        adds = self.adds(phase.operand)
        if phase.operand != "h_prev":
            return [f"{source}{self.names.gradient(phase.operand)}, H, rows, {inner}, H, {adds})"]
        return [
            f"""\
if w_{k}:
    if h_mask:
        {source}operand + first_row * P * ITEMSIZE, P, rows, {inner}, P, False)
{_indent(_masked_rows("operand", "dh", "dh" if adds else ""), 2)}
    else:
        {source}dh + first_row * P * ITEMSIZE, P, rows, {inner}, P, {adds})"""
        ]

    def rows(self) -> list[str]:
        cell, names = self.cell, self.names
        states = [names.state(s) for s in cell.other_states]
        lines = names.rows()
        lines.append(_row("dgates", "(base + b)", f"({cell.G} * H)"))
        lines.append(_row("dproduct", "(base + b)", f"({cell.G_hh} * H)"))
        lines += [_row(names.gradient(n), "(b - first_row)", "H") for n in cell.handed_on]
        for c in states:
            lines.append(_row(f"d{c}_all", "(base + b)", f"d{c}_all_stride"))
            lines.append(_row(f"d{c}", "b", "H"))
        if self.zone:
            lines += self.zone.rows(cell)
            if len(cell.phases) > 1:
                lines += [
                    _row(f"left_{k}", "(b - first_row)", "H") for k in range(len(cell.states))
                ]
        lines.append(
            """\
if w_hr:
    h_row = m + (base + b) * H * ITEMSIZE
    dh_row = dm + (b - first_row) * H * ITEMSIZE
    dy_row = zeros
else:
    h_row = y + (base + b) * y_stride * ITEMSIZE
    dh_row = dh + b * P * ITEMSIZE
    dy_row = dy + (base + b) * dy_stride * ITEMSIZE"""
        )
        previous = {"h": ("y", "y_stride", "h_0", "P")}
        previous |= {c: (f"{c}_all", f"{c}_stride", f"{c}_0", "H") for c in states}
        lines.append("if reset and load_byte(reset, base + b):")
        lines += [f"    {c}_prev_row = zeros" for c in previous]
        lines.append("elif b < alive_before:")
        for c, (every, stride, _, _) in previous.items():
            lines.append(f"    {c}_prev_row = {every} + (before + b) * {stride} * ITEMSIZE")
        lines.append("else:")
        for c, (_, _, first, width) in previous.items():
            lines.append(f"    {c}_prev_row = {first} + b * {width} * ITEMSIZE")
        return lines

    def phase(self, k: int, phase: Phase) -> list[str]:
        takes = phase.takes_back
        lines = self.split(phase) if self.zone and k == len(self.cell.phases) - 1 else []
        for name in takes:
            load = _backward_argument(self.names, name, phase.returns, self.zone)
            lines.append(f"v_{name} = {load}")
        lines.append(_call(k, takes, phase.gradients))
        for name in phase.gradients:
            lines += self.gradient(name)
        if self.zone:
            lines += self.passed_on(k, phase)
        code = ["for b in range(first_row, first_row + rows):"]
        code.append(_indent("\n".join(self.rows()), 1))
        code.append(_indent(_block_of_units(lines), 1))
        if any(name[1:] in self.cell.unit_parameters for name in phase.gradients):
            counts = {"CHAIN": CHAIN, "LEVELS": LEVELS, "U": len(self.cell.unit_parameters)}
            code.append(_indent(_SUM_OF_CHAINS.format(**counts), 1))
        return code + self.product(k, phase)


def _projection_back(zone: Zone | None) -> str:
    """The gradient of m from that of h."""
    gemm = "gemm(dh_all + (base + first_row) * P * ITEMSIZE, P, 1, w_hr, dm, H, rows, P, H, False)"
    if zone is None:
        return f"""\
if w_hr:
    for b in range(first_row, first_row + rows):
        for i in range(P):
            value = load1(dh, b * P + i) + load1(dy, (base + b) * dy_stride + i)
            store1(dh_all, (base + b) * P + i, value)
    {gemm}"""
    new, left = zone.split(0, "total_h")
    lines = [
        f"total_h = {_load('dh_row')} + {_load('dy_row')}",
        _store("dh_all_row", "j", new),
        _store("dh_row", "j", left),
    ]
    rows = [
        _row("dh", "b", "P"),
        _row("dy", "(base + b)", "dy_stride"),
        _row("dh_all", "(base + b)", "P"),
    ]
    if zone.kind == "stay":
        rows.append("stay_0_row = stay_0 + (base + b) * stay_0_stride")
    return f"""\
for b in range(first_row, first_row + rows):
{_indent(chr(10).join(rows), 1)}
{_indent(_block_of_units(lines, "P", "whole_P"), 1)}
{gemm}"""


def backward_source(cell: Cell, zone: Zone | None = None) -> str:
    """The text of a cell's backward kernel."""
    names = _Names(cell)
    body = [
        """\
# the rows of the step before this one in the recurrence's own direction
x_base = base
alive_before = 0
before = 0
if reverse:
    if t + 1 < T:
        alive_before = load_int(sizes, t + 1) if sizes else B
        before = load_int(offsets, t + 1) if sizes else base + B
elif t > 0:
    alive_before = alive
    before = load_int(offsets, t - 1) if sizes else base - B""",
        *([_projection_back(zone)] if zone is None or zone.projected else ()),
        *_Backward(cell, zone).code,
        _zero_states(cell, ["dh", *(f"d{names.state(s)}" for s in cell.other_states)]),
    ]
    return _loop(cell, "backward", "step if reverse else T - 1 - step", body, ["chain = 0"], zone)


class Kernel:
    """Machine code that runs the tasks of a list: ``kernel(address of the list)``."""

    def __init__(self, text: Any) -> None:
        options = {k: v for k, v in JIT.items() if k != "nogil"}  # ctypes holds no lock anyway
        try:
            self.compiled = numba.cfunc("void(int64)", cache=True, **options)(text)
        except RuntimeError as error:  # neither the package's folder nor the user's can be written
            if "cannot cache" not in str(error):
                raise
            self.compiled = numba.cfunc("void(int64)", **options)(text)
        self.address: int = self.compiled.address
        self.call = self.compiled.ctypes

    def run(self, tasks: Sequence[Sequence[int]], threads: int) -> None:
        """Run tasks, each a row of integers as the text reads them."""
        data = np.array([0, len(tasks), *chain.from_iterable(tasks)], np.int64)
        run(self.call, self.address, data.ctypes.data, min(threads, len(tasks)))


def compile_loop(cell: Cell, source: str, backward: bool, dtype: Any) -> Kernel:
    """A loop's text, bound to its cell's texts and to vectors of ``dtype``, for Numba.

    Machine code is cached on disk under a name that hashes every text bound in, the code that
    writes the loops, and the vector width; Numba itself adds the processor.
    """
    vocabulary = vars(simd(dtype))
    # a change of this file must not find the kernels that it wrote before
    label = f"{vocabulary['fingerprint']}_{digest(__name__)[:8]}"
    names = dict(vocabulary)
    names["ZERO"] = np.dtype(dtype).type(0)
    for k, phase in enumerate(cell.phases):
        text = phase.backward if backward else phase.forward
        assert text is not None  # supports() has declined
        bound = bind(text, label, **vocabulary)
        names[f"text_{k}"] = numba.njit(**JIT, forceinline=True)(bound)
    scope: dict[str, Any] = {}
    exec(compile(source, __file__, "exec"), scope)  # the file is where Numba keeps its cache
    (text,) = (value for name, value in scope.items() if name.endswith("_loop"))
    used = {n: names[n] for n in text.__code__.co_names if n in names}
    loop = bind(text, label, **used)
    loop.__module__ = __name__
    return Kernel(loop)


@cache
def forward_kernel(cell: Cell, dtype: Any, zone: Zone | None) -> Kernel:
    return compile_loop(cell, forward_source(cell, zone), False, dtype)


@cache
def backward_kernel(cell: Cell, dtype: Any, zone: Zone | None) -> Kernel:
    return compile_loop(cell, backward_source(cell, zone), True, dtype)
