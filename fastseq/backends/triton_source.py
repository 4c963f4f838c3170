"""The text of the Triton kernels, written from a cell's declaration.

Tiles carry the names of the maths: ``a_i``, ``h_prev``, ``da_i``. Three forms of a loop over time:

- *walk*: one program owns a tile of the batch in one recurrence and walks all of time. The weights
  stand on the chip and the states are carried in registers: nothing that a step writes is read by a
  later step. A tile holds all hidden units, or, in a walk without products, some of them.
- *step*: one launch for each step and part of it (a phase of the cell, the projection) over tiles
  of the batch and of the hidden units. The product is made in the kernel, on operands that earlier
  launches have written.
- *grid*: the same parts in one launch, whose programs walk all of time together. Those that share a
  tile of the batch meet before each part. What a part writes nobody reads before the next meeting:
  each step has rows of its own, or one of two (``operand``). What programs write in the same launch
  is read by ``shared`` alone, past the first-level cache.

Indices, as tiles: ``batch`` (BLOCK_B, 1) sequences, ``units`` (1, BLOCK_H) hidden units, ``hidden``
components of h (in a walk all, (1, BLOCK_P), else a tile as of units), ``rows`` and ``at``
(BLOCK_B, 1) packed rows and rows times recurrences. Masks: ``live`` sequences that this step
belongs to, ``is_unit``, ``is_hidden``.

Buffers, a row for each of the input: gates, dgates (N, R, G, H); dproduct, s (N, R, G_hh, H);
extra (N, R, E, H); m and the states other than h (N, R, H); y, dh_all (N, R, P). operand (2, R, B,
P): h, masked, as the products of even and odd steps take it, h_0 at first. Weights: w_hh (R, G_hh,
H, P), w_hr (R, P, H), b_hh (R, G_hh, H), unit (R, U, H).
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cells import Cell, Phase, arguments
from .triton_tiling import ahead_of

#: In the order of a kernel's arguments; a kernel has those that its text names.
POINTERS = (
    "gates s w_hh w_hr b_hh unit h_0 h_mask reset reverse lengths offsets y extra m h_n "
    "operand dgates dproduct dh_all dy dh dunit counter"
).split()
SIZES = ("step", "tiles", "patience", "T", "B", "R", "H", "P", "capacity")
CONSTANTS = ("SAVE", "WIDE", "PRECISION", "BLOCK_B", "BLOCK_H", "BLOCK_P", "BLOCK_K")


def state_pointers(cell: Cell) -> list[str]:
    """Of the states other than h: first, at every step, last; and their gradients."""
    return [
        name
        for state in cell.states[1:]
        for name in (f"{state}_0", f"{state}_all", f"{state}_n", f"d{state}", f"d{state}_all")
    ]


def _indent(text: str, levels: int) -> str:
    return textwrap.indent(text, "    " * levels)


def _kernel(cell: Cell, name: str, body: str) -> str:
    pointers = [f"{pointer}_ptr" for pointer in (*POINTERS, *state_pointers(cell))]

    def used(names: list[str] | tuple[str, ...]) -> list[str]:
        return [n for n in names if re.search(rf"\b{n}\b", body)]

    signature = [*used(pointers), *(n for n in used(SIZES) if f"for {n} in" not in body)]
    signature += [f"{constant}: tl.constexpr" for constant in used(CONSTANTS)]
    lines = textwrap.fill(", ".join(signature), 96, break_long_words=False)
    return f"def {name}(\n{_indent(lines, 1)}\n):\n{_indent(body, 1)}\n"


_UNITS = """\
recurrence = tl.program_id(1).to(tl.int64)
units = (tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
is_unit = units < H
reverse = tl.load(reverse_ptr + recurrence) != 0"""

_BATCH = """\
batch = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
length = lengths_of(lengths_ptr, batch, B, T)
state = recurrence * B + batch"""

_PLACE = f"{_UNITS}\ntile = tl.program_id(0)\n{_BATCH}"

_HIDDEN = """\
hidden = tl.arange(0, BLOCK_P)[None, :]
is_hidden = hidden < P"""

_HIDDEN_ARE_UNITS = """\
hidden = units
is_hidden = is_unit"""

_HIDDEN_TILE = """\
hidden = units
is_hidden = hidden < P"""

_ROWS = """\
live = within(time, length)
rows = first_row(offsets_ptr, time, T, B) + batch
at = rows * R + recurrence"""

#: The row before this one in the recurrence's own direction, and whether there is one.
_EARLIER = """\
earlier = tl.where(reverse, time + 1, time - 1)
known = live & within(earlier, length)
at_earlier = (first_row(offsets_ptr, earlier, T, B) + batch) * R + recurrence
fresh = live & (known == 0)"""

#: Sequences whose state goes on from the step before.
_KEPT = """\
if reset_ptr is not None:
    kept = (tl.load(reset_ptr + recurrence * capacity + rows, mask=live, other=0) == 0)"""

_KEPT_IN_STEPS = "kept = live\n" + _KEPT.replace("kept =", "kept = live &")

#: The row after this one, and whether a gradient comes from it, and passes through its product.
_LATER = """\
later = tl.where(reverse, time - 1, time + 1)
comes = within(later, length)
rows_later = first_row(offsets_ptr, later, T, B) + batch
at_later = rows_later * R + recurrence
passes = comes
if reset_ptr is not None:
    reset = tl.load(reset_ptr + recurrence * capacity + rows_later, mask=comes, other=0)
    passes = comes & (reset == 0)"""


def _hidden(projected: bool) -> str:
    return _HIDDEN if projected else _HIDDEN_ARE_UNITS


def _load(pointer: str, place: str, mask: str = "live & is_unit") -> str:
    return f"load({pointer}_ptr, {place}, {mask}, WIDE)"


def _shared(pointer: str, place: str, mask: str = "live & is_unit") -> str:
    """Of a buffer that programs write in the same launch."""
    return f"shared({pointer}_ptr, {place}, {mask}, WIDE)"


def _store(pointer: str, place: str, value: str, mask: str = "live & is_unit") -> str:
    return f"tl.store({pointer}_ptr + {place}, {value}, mask={mask})"


def _gate(count: int, k: int) -> str:
    return f"(at * {count} + {k}) * H + units"


class _Names:
    """Where the values of a cell live in memory."""

    def __init__(self, cell: Cell, projected: bool) -> None:
        self.cell, self.projected = cell, projected
        self.G_hh = len(cell.recurrent_gates)
        self.keeps_gates = projected or cell.saved != cell.states[:1]

    def place(self, name: str) -> tuple[str, str]:
        """Buffer and place of a value that forward saves, or of h and the other states."""
        cell = self.cell
        if name == "h" and not self.projected:
            return "y", "at * P + units"
        if name in cell.saved[: cell.G]:
            return "gates", _gate(cell.G, cell.saved.index(name))
        if name in cell.extras:
            return "extra", _gate(len(cell.extras), cell.extras.index(name))
        if name in cell.states[1:]:
            return f"{name}_all", "at * H + units"
        raise NotImplementedError(f"{cell.name}: {name} is used in another phase and not saved")

    def weight(self, gate: str) -> int:
        return self.cell.recurrent_gates.index(gate)

    def weight_row(self, gate: str) -> str:
        """Where the first of a gate's rows of w_hh is; to be ended by '+ row) * width'."""
        return f"w_hh_ptr + ((recurrence * {self.G_hh} + {self.weight(gate)}) * H"


def _comma(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) + ("," if len(names) == 1 else "")


# Forward


def _apart_biases(cell: Cell) -> list[str]:
    """b_hh of the gates whose recurrent part stands apart; the others' is in the input product."""
    G_hh = len(cell.recurrent_gates)
    return [
        f"b_{g} = load_or_zero(b_hh_ptr, (recurrence * {G_hh} + {cell.recurrent_gates.index(g)}) "
        "* H + units, is_unit, WIDE)"
        for g in cell.apart_gates
    ]


def _units(cell: Cell) -> list[str]:
    U = len(cell.unit_parameters)
    return [
        f"{u} = {_load('unit', f'(recurrence * {U} + {k}) * H + units', 'is_unit')}"
        for k, u in enumerate(cell.unit_parameters)
    ]


def _input(cell: Cell, phase: Phase) -> list[str]:
    """The input products of the gates that a phase takes."""
    gates = [name[2:] for name in arguments(phase.forward) if name[:2] in ("a_", "x_")]
    return [f"x_{g} = {_shared('gates', _gate(cell.G, cell.gates.index(g)))}" for g in gates]


def _text(cell: Cell, phase: Phase) -> list[str]:
    """The arguments from the input product and the recurrent one, and the text."""
    lines, given = [], []
    for name in arguments(phase.forward):
        kind, _, gate = name.partition("_")
        given.append("h_prev.to(WIDE)" if name == "h_prev" else name)
        if gate in cell.gates and kind == "a":
            lines.append(f"a_{gate} = x_{gate} + s_{gate}")
        elif gate in cell.gates and kind == "s":
            lines.append(f"s_{gate} = s_{gate} + b_{gate}")
    lines.append(f"{_comma(phase.returns)} = {phase.forward.__name__}({', '.join(given)})")
    return lines


def _saves(names: _Names, phase: Phase) -> dict[str, str]:
    """name -> store of what backward wants, and perhaps a later phase."""
    cell, stores = names.cell, {}
    for name in dict.fromkeys((*phase.returns, *arguments(phase.forward))):
        if name not in cell.saved or not (name in phase.returns or name in cell.extras):
            continue
        if name == "h" and not names.keeps_gates:
            continue
        k = cell.saved.index(name)
        if k < cell.G:
            stores[name] = _store("gates", _gate(cell.G, k), name)
        else:
            stores[name] = _store("extra", _gate(len(cell.extras), k - cell.G), name)
    return stores


def _keep(names: _Names, phase: Phase, handed_on: set[str]) -> list[str]:
    """Stores of what backward wants, where it will run, but for what is stored already."""
    lines = [
        f"if SAVE:\n    {store}"
        for name, store in _saves(names, phase).items()
        if name not in handed_on
    ]
    for name in phase.returns:
        if name in names.cell.states[1:]:
            store = _store(f"{name}_all", "at * H + units", name)
            lines.append(f"if {name}_all_ptr is not None:\n    {store}")
    return lines


def _resident(names: _Names, backward: bool) -> list[str]:
    """Loads of all weights, one tile a gate, that stay on the chip: padded to tiles by the host.

    Forward: (inner, units), what a product of the operand's rows multiplies. Backward: (units,
    inner), what the gates' gradients multiply.
    """
    lines = ["units_down = tl.trans(units)", "hidden_down = tl.trans(hidden)"]
    for phase in names.cell.phases:
        unit, inner = ("units_down", "{}") if backward else ("units", "{}_down")
        inner = inner.format("hidden" if phase.operand == "h_prev" else "units")
        lines += [
            f"w_{g} = tl.load(w_hh_ptr + ((recurrence * {names.G_hh} + {names.weight(g)}) "
            f"* BLOCK_H + {unit}) * BLOCK_P + {inner})"
            for g in names.cell.product_gates(phase)
        ]
    if names.projected:
        place = f"(recurrence * BLOCK_P + {'hidden_down' if backward else 'hidden'}) * BLOCK_H"
        lines.append(
            f"w_hr = tl.load(w_hr_ptr + {place} + {'units' if backward else 'units_down'})"
        )
    return lines


def _reset(carried: list[str]) -> str:
    zeros = [f"{name} = tl.where(kept, {name}, 0.0).to({name}.dtype)" for name in carried]
    return _KEPT + "\n" + _indent("\n".join(zeros), 1)


def forward_walk(cell: Cell, projected: bool, given: bool) -> str:
    """All steps in one launch.

    On the chip over time: w_hh and w_hr, the states. A step reads the gates' G*H input products and
    writes y and what is saved.

    given: the products of h with w_hh are known, in s, and so is y; what forward would have saved
        is made again, over any tile of the units.
    """
    names = _Names(cell, projected)
    others = cell.states[1:]
    carries_h = not (given and projected)
    start = [_PLACE, _hidden(projected), *_apart_biases(cell), *_units(cell)]
    if not given:
        start += _resident(names, backward=False)
    if carries_h:
        start.append(
            "h_prev = load_or_zero(h_0_ptr, state * P + hidden, (batch < B) & is_hidden, WIDE)"
            ".to(gates_ptr.dtype.element_ty)"
        )
    start += [
        f"{s}_prev = load_or_zero({s}_0_ptr, state * H + units, (batch < B) & is_unit, WIDE)"
        for s in others
    ]

    carried = [f"{s}_prev" for s in others] + (["h_prev"] if carries_h else [])
    body = ["time = tl.where(reverse, steps - 1 - done, done)", _ROWS]
    if carried:
        body.append(_reset(carried))
    for phase in cell.phases:
        gates = cell.product_gates(phase)
        if gates and given:
            body += [f"s_{g} = {_load('s', _gate(names.G_hh, names.weight(g)))}" for g in gates]
        elif gates:
            operand = phase.operand
            if operand == "h_prev":
                mask = "h_mask_ptr, state * P + hidden, live & is_hidden"
                operand = f"masked(h_prev.to(WIDE), {mask})"
            body.append(f"operand = {operand}.to(gates_ptr.dtype.element_ty)")
            body += [f"s_{g} = dot(operand, w_{g}, PRECISION, WIDE)" for g in gates]
        body += _input(cell, phase)
        body += _text(cell, phase)
        body += _keep(names, phase, set())
    body += [f"{s}_prev = tl.where(live, {s}, {s}_prev)" for s in others]
    if projected:
        body.append(f"if m_ptr is not None:\n    {_store('m', 'at * H + units', 'h')}")
        if not given:
            body.append("h = dot(h.to(h_prev.dtype), w_hr, PRECISION, WIDE)")
    if carries_h:
        body.append("h_prev = tl.where(live, h.to(h_prev.dtype), h_prev)")
    end = []
    if not given:
        body.append(_store("y", "at * P + hidden", "h_prev", "live & is_hidden"))
        end.append(_store("h_n", "state * P + hidden", "h_prev", "(batch < B) & is_hidden"))
        end += [
            _store(f"{s}_n", "state * H + units", f"{s}_prev", "(batch < B) & is_unit")
            for s in others
        ]
    text = [*start, "steps = tl.max(length)", "for done in range(steps):"]
    text += [_indent("\n".join(body), 1), *end]
    return _kernel(cell, f"{cell.name}_forward_{'given' if given else 'walk'}", "\n".join(text))


@dataclass(frozen=True)
class _Term:
    """``result += operand @ weight``. operand: at ``inner`` (1, BLOCK_K). weight: at ``down``
    (BLOCK_K, 1) and the columns."""

    result: str
    operand: str
    weight: str
    place: str


def _zeros(terms: list[_Term]) -> list[str]:
    """NaN where the step's operands never came."""
    results = dict.fromkeys(t.result for t in terms)
    return [f"{name} = tl.full((BLOCK_B, BLOCK_H), poison, WIDE)" for name in results]


def _weight(term: _Term, width: str, exists: str) -> str:
    return f"tl.load({term.place}, mask=(down < {width}) & {exists}, other=0.0)"


def _products(terms: list[_Term], width: str, exists: str) -> list[str]:
    """BLOCK_K of ``width`` at a time, from memory."""
    loop = ["inner = (first + tl.arange(0, BLOCK_K))[None, :]"]
    loop.append("down = (first + tl.arange(0, BLOCK_K))[:, None]")
    for t in terms:
        operand = f"operand = {t.operand}.to(y_ptr.dtype.element_ty)"
        if operand not in loop:
            loop.append(operand)
        loop.append(f"{t.result} += dot(operand, {_weight(t, width, exists)}, PRECISION, WIDE)")
    body = _indent("\n".join(loop), 1)
    return [*_zeros(terms), f"for first in range(0, {width}, BLOCK_K):", body]


def _resident_weights(terms: list[_Term], width: str, exists: str, pieces: int) -> list[str]:
    lines = []
    for k in range(pieces):
        lines.append(f"down = ({k} * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]")
        lines += [f"{t.weight}_{k} = {_weight(t, width, exists)}" for t in terms]
    return lines


def _resident_products(terms: list[_Term], pieces: int) -> list[str]:
    """With weights that are on the chip."""
    lines = _zeros(terms)
    for operand in dict.fromkeys(t.operand for t in terms):
        step = ahead_of(pieces)
        for first in range(0, pieces, step):
            ahead = range(first, min(first + step, pieces))
            for k in ahead:
                lines.append(f"inner = ({k} * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]")
                lines.append(f"operand_{k} = {operand}.to(y_ptr.dtype.element_ty)")
            lines += [
                f"{t.result} += dot(operand_{k}, {t.weight}_{k}, PRECISION, WIDE)"
                for k in ahead
                for t in terms
                if t.operand == operand
            ]
    return lines


def _previous(state: str, width: str, columns: str, exists: str) -> str:
    """A state before the step: from the row before, or the initial one; zero where reset."""
    along = "y" if state == "h" else f"{state}_all"
    return (
        f"previous({along}_ptr, {state}_0_ptr, at_earlier * {width} + {columns}, "
        f"state * {width} + {columns}, known & kept & {exists}, fresh & kept & {exists}, WIDE)"
    )


# Steps in parts: one launch each, or all in one


@dataclass(frozen=True)
class _Part:
    """A product of a step, and what follows it.

    weights: lines before the first step, where the product's are on the chip.
    early: loads that need not wait for the others.
    late: stores that the others need not wait for.
    """

    weights: list[str]
    early: list[str]
    body: list[str]
    late: list[str]


#: How many pieces of BLOCK_K cover P and H, where a grid's programs hold their weights.
Pieces = tuple[int, int] | None


def _part(
    terms: list[_Term],
    width: str,
    exists: str,
    own: list[str],
    body: list[str],
    late: list[str],
    pieces: Pieces,
) -> _Part:
    """The products, then the body.

    own: loads of what the loop does not write before, whichever program runs it. They come first
        where the weights are on the chip; beside pieces of weights they would take registers.
    """
    if not terms:
        return _Part([], own, body, late)
    if pieces is None:
        return _Part([], [], [*_products(terms, width, exists), *own, *body], late)
    count = pieces["PH".index(width)]
    weights = _resident_weights(terms, width, exists, count)
    return _Part(weights, own, [*_resident_products(terms, count), *body], late)


@dataclass(frozen=True)
class _Steps:
    """A loop over time in parts.

    start, step: lines before the first step, and before the first part of each.
    carried: name -> pointer, place and mask of what a program hands on to itself alone.
    count: how many steps of the longest sequence's ``steps`` there are.
    """

    cell: Cell
    name: str
    start: list[str]
    carried: dict[str, tuple[str, str, str]]
    step: list[str]
    parts: list[_Part]
    count: str = "steps"


def _named(lines: list[str], text: str) -> list[str]:
    """Those assignments whose names occur in a text."""
    return [line for line in lines if re.search(rf"\b{line.split(' = ')[0]}\b", text)]


def _step_kernel(steps: _Steps, k: int) -> str:
    """One part of one step."""
    part = "\n".join(["steps = T", "poison = 0.0", *steps.step, *steps.parts[k].early])
    part = "\n".join([part, *steps.parts[k].body, *steps.parts[k].late])
    carried = {n: place for n, place in steps.carried.items() if re.search(rf"\b{n}\b", part)}
    body = [_PLACE, _HIDDEN_TILE, *_named(steps.start, part)]
    body += [f"{name} = {_load(*place)}" for name, place in carried.items()]
    body += [part, *(_store(p, place, name, mask) for name, (p, place, mask) in carried.items())]
    return _kernel(steps.cell, f"{steps.cell.name}_{steps.name}_step_{k}", "\n".join(body))


_WAIT = """\
patience = wait(counter, goal, patience)
poison = tl.where(patience > 0, 0.0, float("nan"))"""

_ARRIVE = """\
arrive(counter)
goal += tl.num_programs(2)"""


def _grid_kernel(steps: _Steps) -> str:
    """All steps in one launch, of programs that are on the chip together.

    Those with one tile of the batch in one recurrence wait for one another between parts. On the
    chip over time: what is carried, and the weights where the parts hold them. A program that
    waited in vain goes on with NaN.
    """
    body = list(steps.step)
    for part in steps.parts:
        body += [*part.early, _WAIT, *part.body, _ARRIVE, *part.late]
    walk = [_BATCH]
    walk += [f"{name} = {_load(*place)}" for name, place in steps.carried.items()]
    walk += ["steps = tl.max(length)", f"for step in range({steps.count}):"]
    walk += [_indent("\n".join(body), 1)]
    walk += [_store(p, place, name, mask) for name, (p, place, mask) in steps.carried.items()]
    text = [_UNITS, _HIDDEN_TILE, *steps.start]
    text += [line for part in steps.parts for line in part.weights]
    text += ["counter = counter_ptr + (tl.program_id(0) * R + recurrence) * 16  # 128 bytes apart"]
    text += ["goal = tl.full((), 0, tl.int64)"]
    text += ["for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):"]
    text += [_indent("\n".join(walk), 1)]
    return _kernel(steps.cell, f"{steps.cell.name}_{steps.name}_grid", "\n".join(text))


def _forward(cell: Cell, projected: bool, pieces: Pieces) -> _Steps:
    """Parts: the phases, and the projection."""
    others = cell.states[1:]
    if others and len(cell.phases) > 1:
        raise NotImplementedError(
            f"{cell.name}: the steps hold a second state in cells of one phase alone"
        )
    parts = [_forward_phase(cell, projected, k, pieces) for k in range(len(cell.phases))]
    if projected:
        operand = _shared("m", "at * H + inner", "live & (inner < H)")
        weight = "w_hr_ptr + (recurrence * P + hidden) * H + down"
        terms = [_Term("h", operand, "w_hr", weight)]
        parts.append(_part(terms, "H", "is_hidden", [], *_hand_on_h(cell), pieces))
    step = ["time = tl.where(reverse, steps - 1 - step, step)", _ROWS, _KEPT_IN_STEPS]
    carried = {}
    if _takes_h(cell):
        carried["h_last"] = ("h_n", "state * P + hidden", "(batch < B) & is_hidden")
    for s in others:
        carried[f"{s}_last"] = (f"{s}_n", "state * H + units", "(batch < B) & is_unit")
    start = [*_apart_biases(cell), *_units(cell)]
    return _Steps(cell, "forward", start, carried, step, parts)


#: Where h is, masked, as a step's product takes it, and where the next step's will.
_OPERAND = "((step % 2 * R + recurrence) * B + batch) * P + inner"
_NEXT_OPERAND = "(((step + 1) % 2 * R + recurrence) * B + batch) * P + hidden"


def _hand_on_h(cell: Cell) -> tuple[list[str], list[str]]:
    """To the other programs, and what may come late."""
    lines = ["h = h.to(y_ptr.dtype.element_ty)"]
    if any(cell.product_gates(p) and p.operand == "h_prev" for p in cell.phases):
        value = "masked(h.to(WIDE), h_mask_ptr, state * P + hidden, live & is_hidden)"
        lines.append(_store("operand", _NEXT_OPERAND, value, "live & is_hidden"))
    late = [_store("y", "at * P + hidden", "h", "live & is_hidden")]
    if _takes_h(cell):
        late.append("h_last = tl.where(live, h.to(WIDE), h_last)")
    else:
        late.append(_store("h_n", "state * P + hidden", "h", "live & is_hidden"))
    return lines, late


def _takes_h(cell: Cell) -> bool:
    """Whether a text takes the last h itself, beside the product."""
    return any("h_prev" in arguments(phase.forward) for phase in cell.phases)


def _forward_phase(cell: Cell, projected: bool, k: int, pieces: Pieces) -> _Part:
    """A phase's product, and its text."""
    names, phase = _Names(cell, projected), cell.phases[k]
    gates = cell.product_gates(phase)
    later = {n for p in cell.phases[k + 1 :] for n in (*arguments(p.forward), p.operand)}
    if phase.operand == "h_prev":
        width = "P"
        operand = _shared("operand", _OPERAND, "kept & (inner < P)")
    else:
        width = "H"
        buffer, place = names.place(phase.operand)
        operand = _shared(buffer, place.replace("units", "inner"), "live & (inner < H)")
    terms = [
        _Term(f"s_{g}", operand, f"w_{g}", f"{names.weight_row(g)} + units) * {width} + down")
        for g in gates
    ]
    body = []
    for name in arguments(phase.forward):
        if name.endswith("_prev"):
            body.append(f"{name} = tl.where(kept, {name.removesuffix('_prev')}_last, 0.0)")
        elif name in cell.saved and name[2:] not in gates:  # an earlier phase's
            body.append(f"{name} = {_shared(*names.place(name))}")
    body += _text(cell, phase)
    body += [store for name, store in _saves(names, phase).items() if name in later]
    late = _keep(names, phase, later)
    late += [
        f"{s}_last = tl.where(live, {s}, {s}_last)" for s in cell.states[1:] if s in phase.returns
    ]
    if "h" in phase.returns and projected:
        body.append(_store("m", "at * H + units", "h"))
    elif "h" in phase.returns:
        hand_on, last = _hand_on_h(cell)
        body, late = body + hand_on, late + last
    return _part(terms, width, "is_unit", _input(cell, phase), body, late, pieces)


# Backward


def _received(names: _Names, phase: Phase) -> list[str]:
    """The arguments of a backward text but for gradients, from what forward left."""
    cell, lines = names.cell, []
    for name in arguments(phase.backward):
        if name == "h_prev":
            lines.append(f"h_prev = {_previous('h', 'P', 'units', 'is_unit')}")
        elif name.endswith("_prev"):
            state = name.removesuffix("_prev")
            lines.append(f"{name} = {_previous(state, 'H', 'units', 'is_unit')}")
        elif name in (*cell.saved, *cell.states):
            lines.append(f"{name} = {_load(*names.place(name))}")
    return lines


def _gradients(names: _Names, k: int) -> list[str]:
    """The backward text and the stores of the gates' gradients."""
    cell, phase = names.cell, names.cell.phases[k]
    results = [f"dh_prev_{k}" if n == "dh_prev" else n for n in phase.gradients]
    lines = [
        f"{_comma(results)} = {phase.backward.__name__}({', '.join(arguments(phase.backward))})"
    ]
    for name in phase.gradients:
        kind, _, gate = name.partition("_")
        if kind not in ("da", "dx", "ds") or gate not in cell.gates:
            continue
        if kind != "ds":
            lines.append(_store("dgates", _gate(cell.G, cell.gates.index(gate)), name))
        if kind != "dx" and cell.apart_gates:
            lines.append(_store("dproduct", _gate(names.G_hh, names.weight(gate)), name))
    return lines


def _product_gradients(cell: Cell, phase: Phase) -> list[str]:
    """The gradient of each gate's recurrent part."""
    return [
        f"ds_{g}" if f"ds_{g}" in phase.gradients else f"da_{g}" for g in cell.product_gates(phase)
    ]


def _sum_of_direct(cell: Cell) -> str:
    parts = [f"dh_prev_{k}" for k, p in enumerate(cell.phases) if "dh_prev" in p.gradients]
    return " + ".join(parts)


def _state_gradients(cell: Cell) -> list[str]:
    return [
        f"d{s} = d{s}_next + load_or_zero(d{s}_all_ptr, at * H + units, live & is_unit, WIDE)"
        for s in cell.states[1:]
    ]


def backward_walk(cell: Cell, projected: bool) -> str:
    """All steps in one launch, last to first.

    On the chip over time: w_hh and w_hr, the gradients of the states. A step reads dy and what was
    saved, and writes the gates' gradients.
    """
    names = _Names(cell, projected)
    others, U = cell.states[1:], len(cell.unit_parameters)
    start = [_PLACE, _hidden(projected), *_units(cell), *_resident(names, backward=True)]
    start.append(f"dh_next = {_load('dh', 'state * P + hidden', '(batch < B) & is_hidden')}")
    start += [
        f"d{s}_next = {_load(f'd{s}', 'state * H + units', '(batch < B) & is_unit')}"
        for s in others
    ]
    start += [f"total_{u} = tl.zeros((BLOCK_B, BLOCK_H), WIDE)" for u in cell.unit_parameters]

    body = ["time = tl.where(reverse, done, steps - 1 - done)", _ROWS, "kept = live"]
    body += [_KEPT.replace("kept =", "kept = live &"), _EARLIER]
    body.append("dh = dh_next + load_or_zero(dy_ptr, at * P + hidden, live & is_hidden, WIDE)")
    if projected:
        body.append(_store("dh_all", "at * P + hidden", "dh", "live & is_hidden"))
        body.append("dh = dot(dh.to(y_ptr.dtype.element_ty), w_hr, PRECISION, WIDE)")
    body += _state_gradients(cell)
    products = []
    for k, phase in reversed(list(enumerate(cell.phases))):
        body += _received(names, phase)
        body += _gradients(names, k)
        parts = _product_gradients(cell, phase)
        if not parts:
            continue
        product = " + ".join(
            f"dot({d}.to(y_ptr.dtype.element_ty), w_{g}, PRECISION, WIDE)"
            for d, g in zip(parts, cell.product_gates(phase), strict=True)
        )
        if phase.operand == "h_prev":
            products.append(product)
        else:
            body.append(f"d{phase.operand} = {product}")
    direct = _sum_of_direct(cell)
    if products:
        mask = "h_mask_ptr, state * P + hidden, live & is_hidden"
        body.append(f"dh_prev = masked({' + '.join(products)}, {mask})")
    if direct:
        body.append(f"dh_prev {'+' if products else ''}= {direct}")
    elif not products:
        body.append("dh_prev = tl.zeros_like(dh_next)")
    body += [
        f"d{s}_next = tl.where(kept, d{s}_prev, tl.where(live, 0.0, d{s}_next))"
        for s in cell.states
    ]
    body += [f"total_{u} += tl.where(live, d{u}, 0.0)" for u in cell.unit_parameters]
    end = [_store("dh", "state * P + hidden", "dh_next", "(batch < B) & is_hidden")]
    end += [
        _store(f"d{s}", "state * H + units", f"d{s}_next", "(batch < B) & is_unit") for s in others
    ]
    end += [
        f"tl.store(dunit_ptr + ((tl.program_id(0) * R + recurrence) * {U} + {k}) * H + units, "
        f"tl.sum(total_{u}, 0)[None, :], mask=is_unit)"
        for k, u in enumerate(cell.unit_parameters)
    ]
    text = [*start, "steps = tl.max(length)", "for done in range(steps):"]
    text += [_indent("\n".join(body), 1), *end]
    return _kernel(cell, f"{cell.name}_backward_walk", "\n".join(text))


def _backward(cell: Cell, projected: bool, pieces: Pieces) -> _Steps:
    """Parts: the gradient of the projected h, the phases from the last to the first.

    One step more than forward has: it leaves the gradient of h_0.
    """
    U = len(cell.unit_parameters)
    last = len(cell.phases) - 1
    parts = [_backward_phase(cell, projected, k, pieces) for k in range(last, -1, -1)]
    if projected:
        terms, own, body = _gradient_of_h(_Names(cell, True))
        body.append(_store("dh_all", "at * P + hidden", "dh", "live & is_hidden"))
        body.append("dh_next = tl.where(live, 0.0, dh_next)")
        parts.insert(0, _part(terms, "H", "is_hidden", own, body, [], pieces))
    step = ["time = tl.where(reverse, step, steps - 1 - step)", _ROWS, _KEPT_IN_STEPS, _EARLIER]
    carried = {"dh_next": ("dh", "state * P + hidden", "(batch < B) & is_hidden")}
    for s in cell.states[1:]:
        carried[f"d{s}_next"] = (f"d{s}", "state * H + units", "(batch < B) & is_unit")
    for k, u in enumerate(cell.unit_parameters):
        place = f"((tile * R + recurrence) * {U} + {k}) * H + units"
        carried[f"total_{u}"] = ("dunit", place, "is_unit")
    return _Steps(cell, "backward", _units(cell), carried, [*step, _LATER], parts, "steps + 1")


def _gradient_of_h(names: _Names) -> tuple[list[_Term], list[str], list[str]]:
    """dh: what the step after this one hands back, or the gradient of the final state, and dy.

    The carried ``dh_next`` is the gradient of the final state until a sequence's last step has run,
    and the part that the text itself hands back (dh_prev) from then on. At a sequence's first
    step's predecessor it receives the whole sum, the gradient of h_0.
    """
    terms = [
        t
        for phase in names.cell.phases
        if phase.operand == "h_prev"
        for t in _from_gates(names, phase, "dproduct_h", "at_later", "passes", "P", "hidden")
    ]
    body = []
    if terms:
        mask = "h_mask_ptr, state * P + hidden, (batch < B) & is_hidden"
        body.append(f"dh_next += masked(dproduct_h, {mask})")
    body.append("dh = dh_next + dy")
    own = ["dy = load_or_zero(dy_ptr, at * P + hidden, live & is_hidden, WIDE)"]
    return terms, own, body


def _from_gates(
    names: _Names, phase: Phase, result: str, at: str, exists: str, width: str, columns: str
) -> list[_Term]:
    """The gradient of a phase's operand: the gates' gradients times their weights."""
    return [
        _Term(
            result,
            _shared(
                "dproduct",
                f"({at} * {names.G_hh} + {names.weight(g)}) * H + inner",
                f"{exists} & (inner < H)",
            ),
            f"w_{g}",
            f"{names.weight_row(g)} + down) * {width} + {columns}",
        )
        for g in names.cell.product_gates(phase)
    ]


def _backward_phase(cell: Cell, projected: bool, k: int, pieces: Pieces) -> _Part:
    """The product that a phase's incoming gradient is, and its backward text.

    The last phase's is of the gate gradients of the step that ran before, an earlier phase's of the
    gate gradients of the phase that multiplied its result.
    """
    names = _Names(cell, projected)
    phase, last = cell.phases[k], k == len(cell.phases) - 1
    terms: list[_Term] = []
    own: list[str] = []
    body: list[str] = []
    if "dh" in arguments(phase.backward):
        if projected:
            operand = _shared("dh_all", "at * P + inner", "live & (inner < P)")
            weight = "w_hr_ptr + (recurrence * P + down) * H + units"
            terms = [_Term("dh", operand, "w_hr", weight)]
        else:
            terms, own, body = _gradient_of_h(names)
    for p in cell.phases[k + 1 :]:
        if p.operand in phase.returns:
            terms += _from_gates(names, p, f"d{p.operand}", "at", "live", "H", "units")
    known = {"h", *(p.operand for p in cell.phases)}

    def waits(name: str) -> bool:
        """The gradient of another phase's value is where its gate's gradient will be."""
        return name[0] == "d" and name[1:] in cell.saved[: cell.G] and name[1:] not in known

    for name in arguments(phase.backward):
        if waits(name):
            body.append(f"{name} = {_shared('dgates', _gate(cell.G, cell.saved.index(name[1:])))}")
    own += _received(names, phase)
    if last:
        for s in cell.states[1:]:
            own.append(f"d{s} = load_or_zero(d{s}_all_ptr, at * H + units, live & is_unit, WIDE)")
            body.append(f"d{s} += d{s}_next")
    body += _gradients(names, k)
    for name in phase.gradients:
        if waits(name):
            body.append(_store("dgates", _gate(cell.G, cell.saved.index(name[1:])), name))
    if last:
        body += [
            f"d{s}_next = tl.where(kept, d{s}_prev, tl.where(live, 0.0, d{s}_next))"
            for s in cell.states[1:]
        ]
    if not projected:
        direct = f"tl.where(kept, dh_prev_{k}, 0.0)" if "dh_prev" in phase.gradients else "0.0"
        if last:
            body.append(f"dh_next = tl.where(live, {direct}, dh_next)")
        elif "dh_prev" in phase.gradients:
            body.append(f"dh_next += {direct}")
    body += [
        f"total_{u} += tl.sum(tl.where(live, d{u}, 0.0), 0)[None, :]"
        for u in cell.unit_parameters
        if f"d{u}" in phase.gradients
    ]
    return _part(terms, "P" if projected else "H", "is_unit", own, body, [], pieces)


#: The kinds of loop: text of (cell, projected, k). k: of a step the part, of a grid the pieces of P
#: and H in which its programs hold their weights, or None.
TEXTS: dict[str, Callable[[Cell, bool, Any], str]] = {
    "forward_walk": lambda cell, projected, k: forward_walk(cell, projected, given=False),
    "forward_given": lambda cell, projected, k: forward_walk(cell, projected, given=True),
    "forward_step": lambda cell, projected, k: _step_kernel(_forward(cell, projected, None), k),
    "forward_grid": lambda cell, projected, k: _grid_kernel(_forward(cell, projected, k)),
    "backward_walk": lambda cell, projected, k: backward_walk(cell, projected),
    "backward_step": lambda cell, projected, k: _step_kernel(_backward(cell, projected, None), k),
    "backward_grid": lambda cell, projected, k: _grid_kernel(_backward(cell, projected, k)),
}
