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

What no other program writes is asked for a step ahead, but where rows start anywhere: there every
number takes an address of its own. So the latency of memory passes while the step before is
computed. :mod:`.triton_text` says what the names and the buffers are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any

from ..cells import Cell, Phase, arguments
from .triton_text import (
    EARLIER,
    HANDED,
    HIDDEN,
    HIDDEN_ARE_UNITS,
    KEPT,
    KEPT_IN_STEPS,
    LATER,
    PLACE,
    ROWS,
    UNZONED,
    Load,
    Part,
    Pieces,
    Steps,
    Term,
    Zoned,
    apart,
    backward_text,
    comma,
    forward_text,
    gate_mask,
    gate_place,
    grid_kernel,
    groups,
    indent,
    load,
    load_columns,
    load_gates,
    load_one,
    load_previous,
    rounded,
    shared,
    step_kernel,
    store,
    store_gates,
    together,
    walk_kernel,
)


def _hidden(projected: bool) -> str:
    return HIDDEN if projected else HIDDEN_ARE_UNITS


#: The same at every step: loaded once.
_MASK = "h_mask = load_or_zero(h_mask_ptr, state * P + hidden, (batch < B) & is_hidden, WIDE)"


class _Names:
    """Where the values of a cell live in memory, and which of its gates are one tile."""

    def __init__(
        self, cell: Cell, projected: bool, zoned: Zoned = UNZONED, joint: bool = True
    ) -> None:
        self.cell, self.projected, self.joint = cell, projected, joint
        self.zoned = zoned
        self.keeps_gates = cell.keeps_gates(projected)

    def slots(self, pointer: str) -> tuple[str, ...]:
        """The values that stand side by side in a row of a buffer."""
        return self.cell.saved[: self.cell.G] if pointer == "gates" else self.cell.extras

    def place(self, name: str) -> tuple[str, str]:
        """Buffer and place of a value that forward saves, or of h and the other states."""
        if name == "h" and self.projected:
            return "m", "at * H + units"
        if name in self.zoned.states:
            return f"{name}_unzoned", "at * H + units"
        if name == "h":
            return "y", "at * P + units"
        for pointer in ("gates", "extra"):
            slots = self.slots(pointer)
            if name in slots:
                return pointer, gate_place(len(slots), slots.index(name))
        return f"{name}_all", "at * H + units"  # another state

    def runs(self, gates: Iterable[str], order: Sequence[str]) -> list[tuple[str, ...]]:
        """The gates that are one tile, neighbours in ``order``."""
        return groups(gates, order) if self.joint else [(g,) for g in order if g in set(gates)]

    def load_saved(self, names: Iterable[str]) -> list[Load]:
        """Loads of what forward left, neighbours together."""
        wanted, found = list(names), []
        for pointer in ("gates", "extra"):
            slots = self.slots(pointer)
            own = {n for n in wanted if self.place(n)[0] == pointer}
            for run in self.runs(own, slots):
                found.append(load_gates("", run, pointer, len(slots), slots.index(run[0])))
        found += [
            load_one(n, *self.place(n))
            for n in wanted
            if self.place(n)[0] not in ("gates", "extra")
        ]
        return found

    def store_saved(self, names: Iterable[str]) -> list[str]:
        """Stores of what backward wants, neighbours together."""
        wanted, found = set(names), []
        for pointer in ("gates", "extra"):
            slots = self.slots(pointer)
            for run in self.runs(wanted & set(slots), slots):
                first = slots.index(run[0])
                found.append(store_gates(pointer, len(slots), first, run))
        return found

    def waiting(self, value: str) -> tuple[str, str]:
        """Where the gradient of a value that is handed on waits for its phase: beside it, which in
        dgates is where its gate's gradient will be."""
        pointer, place = self.place(value)
        return f"d{pointer}", place

    def weight(self, gate: str) -> int:
        return self.cell.recurrent_gates.index(gate)

    def product_groups(self, phase: Phase) -> list[tuple[str, ...]]:
        """The gates whose products are one: neighbours whose parts enter in the same way."""
        gates, taken = self.cell.product_gates(phase), arguments(phase.forward)
        return [
            group
            for kind in ("a", "s")
            for group in self.runs([g for g in gates if f"{kind}_{g}" in taken], self.cell.gates)
        ]

    def row(self, group: tuple[str, ...]) -> str:
        """The number of the first of some gates' blocks of w_hh."""
        return f"recurrence * {self.cell.G_hh} + {self.weight(group[0])}"


def _tile(kind: str, group: tuple[str, ...]) -> str:
    """The name of a tile of gates: s_i_f_g_o."""
    return f"{kind}_{'_'.join(group)}"


# Zoneout: a text gives what a state would be, and a unit of it, or a part of it, stays


def _stay(names: _Names, state: str) -> list[Load]:
    """Where a state stays as it was, if that is drawn."""
    zoned = names.zoned
    if state not in zoned.states or not zoned.drawn:
        return []
    width, columns, exists = ("P", "hidden", "is_hidden") if state == "h" else _OF_UNITS
    name, place = f"stay_{state}", f"(recurrence * capacity + rows) * {width} + {columns}"
    return [Load(f"{name}_ahead", name, place, f"live & {exists}", f"{name} = {name}_ahead != 0")]


_OF_UNITS = "H", "units", "is_unit"


def _parts(names: _Names) -> list[str]:
    """How much of each state stays: once."""
    zoned = names.zoned
    if zoned.drawn:
        return []
    at = names.cell.states.index
    return [f"part_{s} = tl.load(part_ptr + {at(s)})" for s in zoned.states]


def _zoned(names: _Names, state: str, before: str) -> str:
    """The state that goes on to the next step."""
    if state not in names.zoned.states:
        return state
    if names.zoned.drawn:
        return f"tl.where(stay_{state}, {before}, {state})"
    return f"{state} + part_{state} * ({before} - {state})"


def _unzoned(names: _Names, phase: Phase) -> list[str]:
    """The states that a phase gives and texts take, whose own buffer has them as they were given:
    h, projected, has m for that."""
    cell = names.cell
    taken = {*compress(cell.states, cell.taken_back), *handed_states(cell)}
    own = [s for s in names.zoned.states if s in taken and s in phase.returns]
    return [s for s in own if not (s == "h" and names.projected)]


def handed_states(cell: Cell) -> set[str]:
    """The states that one phase returns and a later one takes."""
    return {n for p in cell.phases for n in (*p.takes, p.operand) if n in cell.states}


def _split(names: _Names, state: str) -> list[str]:
    """The gradient of a state that goes on: of what the text gave, and of the state before."""
    if state not in names.zoned.states:
        return []
    d, stays = f"d{state}", f"d{state}_stays"
    if names.zoned.drawn:
        there = f"stay_{state}"
        return [f"{stays} = tl.where({there}, {d}, 0.0)", f"{d} = tl.where({there}, 0.0, {d})"]
    return [f"{stays} = part_{state} * {d}", f"{d} = {d} - {stays}"]


# Forward


def _apart_biases(cell: Cell) -> list[str]:
    """b_hh of the gates whose recurrent part stands apart; the others' is in the input product."""
    return [
        f"b_hh_{g} = load_or_zero(b_hh_ptr, (recurrence * {cell.G_hh} + {at}) * H + units, "
        "is_unit, WIDE)"
        for at, g in enumerate(cell.recurrent_gates)
        if g in cell.apart_gates
    ]


def _units(cell: Cell) -> list[str]:
    U = len(cell.unit_parameters)
    return [
        f"{u} = {load('unit', f'(recurrence * {U} + {k}) * H + units', 'is_unit')}"
        for k, u in enumerate(cell.unit_parameters)
    ]


def _input(names: _Names, phase: Phase) -> list[Load]:
    """The input products of the gates that a phase takes, as one tile where they are added to
    one."""
    cell, gates, taken = names.cell, names.cell.gates, arguments(phase.forward)
    loads = [
        load_gates("x_", (g,), "gates", cell.G, gates.index(g)) for g in gates if f"x_{g}" in taken
    ]
    return loads + [
        load_columns(_tile("x", group), len(group), "gates", cell.G, gates.index(group[0]))
        for group in names.product_groups(phase)
        if f"a_{group[0]}" in taken
    ]


def _gate_sums(phase: Phase, group: tuple[str, ...]) -> list[str]:
    """What the text takes of some gates, out of their product and input product."""
    tile, kind = _tile("s", group), "s"
    lines = []
    if f"a_{group[0]}" in arguments(phase.forward):
        tile, kind = _tile("a", group), "a"
        lines.append(f"{tile} = {_tile('x', group)} + {_tile('s', group)}")
    if len(group) > 1:
        lines.append(apart([f"{kind}_{g}" for g in group], tile, "PAIRED"))
    return lines


def _text(cell: Cell, k: int) -> list[str]:
    """What stands apart gets its bias; and the text of phase k."""
    phase = cell.phases[k]
    names = arguments(phase.forward)
    lines = [f"s_{g} = s_{g} + b_hh_{g}" for g in cell.gates if f"s_{g}" in names]
    given = ", ".join("h_prev.to(WIDE)" if name == "h_prev" else name for name in names)
    lines.append(f"{comma(phase.returns)} = {forward_text(k)}({given})")
    return lines + _finite(phase.forward, phase.returns)


#: Words that may make infinity of the zeros beyond the last unit, at once or in some steps.
_GROW = {"exp", "reciprocal", "dsqrt"}


def _finite(text: Callable[..., Any], values: Sequence[str]) -> list[str]:
    """Zeros where there is no unit: a product would add up infinity times its zero weight."""
    if not _GROW & set(text.__code__.co_names):
        return []
    return [f"{name} = tl.where(is_unit, {name}, 0.0)" for name in values]


def _saved_by(names: _Names, phase: Phase) -> list[str]:
    """What backward wants of a phase's values, and perhaps a later phase."""
    cell = names.cell
    known = dict.fromkeys((*phase.returns, *arguments(phase.forward)))
    return [
        n
        for n in known
        if n in cell.saved
        and (n in phase.returns or n in cell.extras)
        and (n != "h" or names.keeps_gates)
    ]


def _keep(names: _Names, phase: Phase, handed_on: set[str]) -> list[str]:
    """Stores of what backward wants, where it will run, but for what is stored already."""
    wanted = [n for n in _saved_by(names, phase) if n not in handed_on]
    return [f"if SAVE:\n    {line}" for line in names.store_saved(wanted)]


def _carry(names: _Names, phase: Phase, suffix: str) -> list[str]:
    """The other states that a phase gives, on to the next step, and stores of them at every step:
    of what is carried, so that the change of layout for the store comes no sooner."""
    lines = []
    for s in names.cell.other_states:
        if s in phase.returns:
            carried = f"{s}_{suffix}"
            before = carried if suffix == "prev" else f"tl.where(kept, {carried}, 0.0)"
            every = store(f"{s}_all", "at * H + units", carried)
            lines.append(f"{carried} = tl.where(live, {_zoned(names, s, before)}, {carried})")
            lines.append(f"if {s}_all_ptr is not None:\n    {every}")
    return lines


def _keep_unzoned(names: _Names, states: Iterable[str]) -> list[str]:
    """Stores of what a text gave, where backward will run."""
    return [f"if {s}_unzoned_ptr is not None:\n    {store(*names.place(s), s)}" for s in states]


def _resident(names: _Names, backward: bool) -> list[str]:
    """Loads of all weights, one tile for gates that are neighbours, that stay on the chip: padded
    to tiles by the host.

    Forward: (inner, gates and units), what a product of the operand's rows multiplies. Backward:
    (gates and units, inner), what the gates' gradients multiply.
    """
    lines = ["units_down = tl.trans(units)", "hidden_down = tl.trans(hidden)"]
    found = [(p, group) for p in names.cell.phases for group in names.product_groups(p)]
    for phase, group in found:
        n, of_h = len(group), phase.operand == "h_prev"
        if backward:
            inner = "hidden" if of_h else "units"
            rows = f"tl.arange(0, {n} * BLOCK_H)[:, None]" if n > 1 else "units_down"
            place = f"(({names.row(group)}) * BLOCK_H + {rows}) * BLOCK_P + {inner}"
        else:
            inner = "hidden_down" if of_h else "units_down"
            gate, unit = (f" + gate_{n}", f"unit_{n}") if n > 1 else ("", "units")
            place = f"(({names.row(group)}{gate}) * BLOCK_H + {unit}) * BLOCK_P + {inner}"
        lines.append(f"{_tile('w_hh', group)} = tl.load(w_hh_ptr + {place})")
    if names.projected:
        place = f"(recurrence * BLOCK_P + {'hidden_down' if backward else 'hidden'}) * BLOCK_H"
        lines.append(
            f"w_hr = tl.load(w_hr_ptr + {place} + {'units' if backward else 'units_down'})"
        )
    return lines


def _reset(carried: list[str]) -> str:
    zeros = [f"{name} = tl.where(kept, {name}, 0.0).to({name}.dtype)" for name in carried]
    return KEPT + "\n" + indent(zeros)


def forward_walk(
    cell: Cell, projected: bool, ahead: bool, given: bool, zoned: Zoned = UNZONED
) -> str:
    """All steps in one launch.

    On the chip over time: w_hh and w_hr, the states. A step reads the gates' G*H input products and
    writes y and what is saved.

    ahead: as of ``walk_kernel``; where not, every gate is a tile of its own.
    given: the products of h with w_hh are known, in s, and so is y; what forward would have saved
        is made again, over any tile of the units.
    """
    names = _Names(cell, projected, zoned, joint=ahead and not given)
    others = cell.other_states
    carries_h = not (given and projected)
    start = [PLACE, _hidden(projected), *_apart_biases(cell), *_units(cell), *_parts(names)]
    if not given:
        start += _resident(names, backward=False)
        start += [_MASK] if cell.masks_h else []
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
    loads: list[Load] = []
    body = [_reset(carried)] if carried else []
    for k, phase in enumerate(cell.phases):
        own = _input(names, phase)
        gates = cell.product_gates(phase)
        if gates and given:
            for g in gates:
                own.append(load_gates("s_", (g,), "s", cell.G_hh, names.weight(g)))
                body += _gate_sums(phase, (g,))
        elif gates:
            operand = phase.operand
            if operand == "h_prev":
                operand = "masked(h_prev.to(WIDE), h_mask_ptr, h_mask)"
            body.append(f"operand = {rounded(f'{operand}.to(gates_ptr.dtype.element_ty)')}")
            for group in names.product_groups(phase):
                weights = _tile("w_hh", group)
                body.append(f"{_tile('s', group)} = dot(operand, {weights}, PRECISION, WIDE)")
                body += _gate_sums(phase, group)
        body += _text(cell, k)
        body += _keep(names, phase, set()) + _keep_unzoned(names, _unzoned(names, phase))
        body += _carry(names, phase, "prev")
        loads += own
    for s in carried:
        loads += _stay(names, s.removesuffix("_prev"))
    if projected:
        body.append(f"if m_ptr is not None:\n    {store('m', 'at * H + units', 'h')}")
        if not given:
            body.append(f"h = dot({rounded('h.to(h_prev.dtype)')}, w_hr, PRECISION, WIDE)")
    if carries_h:
        value = _zoned(names, "h", "h_prev.to(WIDE)")
        value = value if value == "h" else f"({value})"
        body.append(f"h_prev = tl.where(live, {value}.to(h_prev.dtype), h_prev)")
    end = []
    if not given:
        body.append(store("y", "at * P + hidden", "h_prev", "live & is_hidden"))
        end.append(store("h_n", "state * P + hidden", "h_prev", "(batch < B) & is_hidden"))
        end += [
            store(f"{s}_n", "state * H + units", f"{s}_prev", "(batch < B) & is_unit")
            for s in others
        ]
    step = ["time = tl.where(reverse, steps - 1 - done, done)", ROWS]
    name = f"forward_{'given' if given else 'walk'}"
    return walk_kernel(cell, name, start, step, loads, body, end, ahead)


def _forward(cell: Cell, projected: bool, zoned: Zoned = UNZONED) -> Steps:
    """Parts: the phases, and the projection."""
    others, names = cell.other_states, _Names(cell, projected, zoned)
    parts = [_forward_phase(names, k) for k in range(len(cell.phases))]
    if projected:
        operand = ("m", "at * H", "live")
        weight = "w_hr_ptr + (recurrence * P + hidden) * H + down"
        terms = [Term("h", operand, "w_hr", weight, "H", "is_hidden")]
        parts.append(Part(terms, _stay(names, "h"), *_hand_on_h(names)))
    step = ["time = tl.where(reverse, steps - 1 - step, step)", ROWS, KEPT_IN_STEPS]
    carried = {}
    if _carries_h(names):
        carried["h_last"] = ("h_n", "state * P + hidden", "(batch < B) & is_hidden")
    for s in others:
        carried[f"{s}_last"] = (f"{s}_n", "state * H + units", "(batch < B) & is_unit")
    start = [*_apart_biases(cell), *_units(cell), *_parts(names)]
    initial = [_MASK] if cell.masks_h else []
    return Steps(cell, "forward", start, initial, carried, step, parts)


#: Where h is, masked, as a step's product takes it, and where the next step's will.
_OPERAND = "((step % 2 * R + recurrence) * B + batch) * P"
_NEXT_OPERAND = "(((step + 1) % 2 * R + recurrence) * B + batch) * P + hidden"


def _carries_h(names: _Names) -> bool:
    """Whether the programs of steps in parts take h of the step before, beside their products."""
    return names.cell.reads_h or "h" in names.zoned.states


def _hand_on_h(names: _Names) -> tuple[list[str], list[str]]:
    """To the other programs, and what may come late."""
    h, value = "h", _zoned(names, "h", "tl.where(kept, h_last, 0.0)")
    if value != h:
        h, value = "h_zoned", f"({value})"
    lines = [f"{h} = {value}.to(y_ptr.dtype.element_ty)"]
    if names.cell.masks_h:
        value = rounded(f"masked({h}.to(WIDE), h_mask_ptr, h_mask)")
        lines.append(store("operand", _NEXT_OPERAND, value, "live & is_hidden"))
    late = [store("y", "at * P + hidden", h, "live & is_hidden")]
    if _carries_h(names):
        late.append(f"h_last = tl.where(live, {h}.to(WIDE), h_last)")
    else:
        late.append(store("h_n", "state * P + hidden", h, "live & is_hidden"))
    return lines, late


def _forward_phase(names: _Names, k: int) -> Part:
    """A phase's product, and its text."""
    cell, projected, phase = names.cell, names.projected, names.cell.phases[k]
    later = {n for p in cell.phases[k + 1 :] for n in (*arguments(p.forward), p.operand)}
    if phase.operand == "h_prev":
        width = "P"
        operand = ("operand", _OPERAND, "kept")
    else:
        width = "H"
        buffer, place = names.place(phase.operand)
        operand = (buffer, place.removesuffix(" + units"), "live")
    terms, body = [], []
    for group in names.product_groups(phase):
        n = len(group)
        gate, unit = (f" + gate_{n}", f"unit_{n}") if n > 1 else ("", "units")
        place = f"w_hh_ptr + (({names.row(group)}{gate}) * H + {unit}) * {width} + down"
        exists = "is_unit" if n == 1 else f"(unit_{n} < H)"
        result, weights = _tile("s", group), _tile("w_hh", group)
        terms.append(Term(result, operand, weights, place, width, exists, n))
        body += _gate_sums(phase, group)
    earlier = {n for p in cell.phases[:k] for n in p.returns}
    for name in arguments(phase.forward):
        if name.endswith("_prev"):
            body.append(f"{name} = tl.where(kept, {name.removesuffix('_prev')}_last, 0.0)")
        elif name in earlier and name in cell.states and name not in names.zoned.states:
            body.append(f"{name} = {name}_last")
        elif name in earlier:
            body.append(f"{name} = {shared(*names.place(name))}")
    body += _text(cell, k)
    handed_on = [n for n in _saved_by(names, phase) if n in later]
    operands = {p.operand for p in cell.phases[k + 1 :]}
    body += [f"{n} = {rounded(n)}" for n in handed_on if n in operands]
    body += names.store_saved(handed_on)
    unzoned = _unzoned(names, phase)
    body += [store(*names.place(s), s) for s in unzoned if s in later]
    late = _keep(names, phase, later) + _carry(names, phase, "last")
    late += _keep_unzoned(names, [s for s in unzoned if s not in later])
    own = _input(names, phase)
    for s in cell.other_states:
        own += _stay(names, s) if s in phase.returns else []
    if "h" in phase.returns and projected:
        body.append(store("m", "at * H + units", rounded("h")))
    elif "h" in phase.returns:
        hand_on, last = _hand_on_h(names)
        own, body, late = own + _stay(names, "h"), body + hand_on, late + last
    return Part(terms, own, body, late)


# Backward


def _received(names: _Names, phase: Phase) -> tuple[list[str], list[Load]]:
    """The arguments of a backward text but for gradients, from what forward left: lines before the
    first step, and loads."""
    cell = names.cell
    start, previous, saved = [], [], []
    for name in phase.takes_back:
        if name.endswith("_prev"):
            line, one = load_previous(name.removesuffix("_prev"))
            start.append(line)
            previous.append(one)
        elif name in (*cell.saved, *cell.states):
            saved.append(name)
    return start, names.load_saved(saved) + previous


def _from_phase(name: str, k: int) -> str:
    """What phase k gives of a gradient that several phases may give parts of."""
    return f"{name}_of_{k}"


def _shares(cell: Cell, k: int) -> list[str]:
    """The gradients of phase k that several phases may give parts of: of states, before the step
    and after it, and of values that are handed on."""
    several = {*cell.states, *(f"{s}_prev" for s in cell.states), *cell.handed_on}
    return [name for name in cell.phases[k].gradients if name[1:] in several]


def _gradients(names: _Names, k: int, in_parts: bool) -> list[str]:
    """The backward text and the stores of the gates' gradients.

    Products in TF32 take rounded numbers, the sums that biases' gradients are do not. A grid that
    holds its weights cannot round what it loads without waiting for it: so there what programs hand
    on has a buffer of its own, of two steps in turn, and is rounded as it is written.
    """
    cell, phase = names.cell, names.cell.phases[k]
    shares = _shares(cell, k)
    results = [_from_phase(n, k) if n in shares else n for n in phase.gradients]
    assert phase.backward is not None
    lines = [f"{comma(results)} = {backward_text(k)}({', '.join(phase.takes_back)})"]
    lines += _finite(phase.backward, results)
    of_gate = {"da": {}, "dx": {}, "ds": {}}  # type: dict[str, dict[str, str]]
    for name in phase.gradients:
        kind, _, gate = name.partition("_")
        if kind in of_gate and gate in cell.gates:
            of_gate[kind][gate] = name
    inputs, recurrent = of_gate["da"] | of_gate["dx"], of_gate["da"] | of_gate["ds"]
    for run in names.runs(inputs, cell.gates):
        first = cell.gates.index(run[0])
        lines.append(store_gates("dgates", cell.G, first, [inputs[g] for g in run]))
    for run in names.runs(recurrent, cell.recurrent_gates):
        values, first = [recurrent[g] for g in run], names.weight(run[0])
        if cell.parts_differ:
            lines.append(store_gates("dproduct", cell.G_hh, first, values))
        if in_parts:
            place = gate_place(cell.G_hh, first, len(run), "handed")
            stored = store("handed", place, rounded(together(values)), gate_mask(len(run)))
            lines.append(f"if handed_ptr is not None:\n    {stored}")
    return lines


def _of_units(cell: Cell, phase: Phase) -> list[str]:
    """The gradients of unit parameters that a phase gives."""
    return [f"d{u}" for u in cell.unit_parameters if f"d{u}" in phase.gradients]


def _takers(cell: Cell, value: str) -> list[int]:
    """The phases whose text takes a value that an earlier phase returns."""
    return [
        k
        for k, phase in enumerate(cell.phases)
        if value in phase.takes and value not in phase.returns
    ]


def _product_gradient(phase: Phase, group: tuple[str, ...]) -> str:
    """The tile of the gradients of some gates' recurrent parts, as a product takes it."""
    tile = together([f"ds_{g}" if f"ds_{g}" in phase.gradients else f"da_{g}" for g in group])
    return rounded(f"{tile}.to(y_ptr.dtype.element_ty)")


def _sum_of_direct(cell: Cell, state: str) -> str:
    """The gradient of a state before the step that the texts give; nothing where they take none."""
    name = f"d{state}_prev"
    return " + ".join(
        _from_phase(name, k) for k, p in enumerate(cell.phases) if name in p.gradients
    )


def _takes_later(cell: Cell, state: str) -> list[int]:
    """The phases that give a part of the gradient of a state that an earlier one returns."""
    return [k for k, phase in enumerate(cell.phases) if f"d{state}" in phase.gradients]


def _state_gradient(state: str) -> Load:
    """The gradient of a state at every step."""
    return load_one(f"d{state}_all", f"d{state}_all", "at * H + units")


_DY = load_one("dy", "dy", "at * P + hidden", "live & is_hidden")


def backward_walk(cell: Cell, projected: bool, ahead: bool, zoned: Zoned = UNZONED) -> str:
    """All steps in one launch, last to first.

    On the chip over time: w_hh and w_hr, the gradients of the states. A step reads dy and what was
    saved, and writes the gates' gradients.

    ahead: as in forward.
    """
    names = _Names(cell, projected, zoned, joint=ahead)
    others, U = cell.other_states, len(cell.unit_parameters)
    start = [PLACE, _hidden(projected), *_units(cell), *_resident(names, backward=True)]
    start += _parts(names) + ([_MASK] if cell.masks_h else [])
    start.append(f"dh_next = {load('dh', 'state * P + hidden', '(batch < B) & is_hidden')}")
    start += [
        f"d{s}_next = {load(f'd{s}', 'state * H + units', '(batch < B) & is_unit')}" for s in others
    ]
    start += [f"total_{u} = tl.zeros((BLOCK_B, BLOCK_H), WIDE)" for u in cell.unit_parameters]

    loads = [_DY, *_stay(names, "h")]
    body = ["dh = dh_next + dy", *_split(names, "h")]
    if projected:
        body.append(f"dh = {rounded('dh')}")
        body.append(store("dh_all", "at * P + hidden", "dh", "live & is_hidden"))
        body.append("dh = dot(dh.to(y_ptr.dtype.element_ty), w_hr, PRECISION, WIDE)")
    for s in others:
        loads += [_state_gradient(s), *_stay(names, s)]
        body += [f"d{s} = d{s}_next + d{s}_all", *_split(names, s)]
    sums: list[str] = []
    received: set[str] = set()  # values handed on, of which a part of the gradient is there
    for k, phase in reversed(list(enumerate(cell.phases))):
        first, own = _received(names, phase)
        start += [line for line in first if line not in start]
        loads += [one for one in own if one not in loads]
        body += _gradients(names, k, in_parts=False)
        body += [f"total_{n[1:]} += tl.where(live, {n}, 0.0)" for n in _of_units(cell, phase)]
        for n in _shares(cell, k):
            if not n.endswith("_prev"):
                first_share = n[1:] not in (*cell.states, *received)
                received.add(n[1:])
                body.append(f"{n} {'' if first_share else '+'}= {_from_phase(n, k)}")
        product = " + ".join(
            f"dot_apart({_product_gradient(phase, group)}, {_tile('w_hh', group)}, PRECISION, WIDE)"
            for group in names.product_groups(phase)
        )
        if product and phase.operand == "h_prev":
            sums.append(product)
        elif product:
            body.append(f"d{phase.operand} {'+' if phase.operand in received else ''}= {product}")
            received.add(phase.operand)
    direct = _sum_of_direct(cell, "h")
    if sums:
        body.append(f"dh_prev = masked({' + '.join(sums)}, h_mask_ptr, h_mask)")
    if direct:
        body.append(f"dh_prev {'+' if sums else ''}= {direct}")
    elif not sums:
        body.append("dh_prev = tl.zeros_like(dh_next)")
    for s in others:
        body.append(f"d{s}_prev = {_sum_of_direct(cell, s) or f'tl.zeros_like(d{s}_next)'}")
    body += [f"d{s}_prev += d{s}_stays" for s in zoned.states]
    body += [
        f"d{s}_next = tl.where(kept, d{s}_prev, tl.where(live, 0.0, d{s}_next))"
        for s in cell.states
    ]
    end = [store("dh", "state * P + hidden", "dh_next", "(batch < B) & is_hidden")]
    end += [
        store(f"d{s}", "state * H + units", f"d{s}_next", "(batch < B) & is_unit") for s in others
    ]
    end += [
        f"tl.store(dunit_ptr + ((tl.program_id(0) * R + recurrence) * {U} + {k}) * H + units, "
        f"tl.sum(total_{u}, 0)[None, :], mask=is_unit)"
        for k, u in enumerate(cell.unit_parameters)
    ]
    step = ["time = tl.where(reverse, done, steps - 1 - done)", ROWS, KEPT_IN_STEPS, EARLIER]
    return walk_kernel(cell, "backward_walk", start, step, loads, body, end, ahead)


def _backward(cell: Cell, projected: bool, zoned: Zoned = UNZONED) -> Steps:
    """Parts: the gradient of the projected h, the phases from the last to the first.

    One step more than forward has: it leaves the gradient of h_0.
    """
    U = len(cell.unit_parameters)
    last = len(cell.phases) - 1
    initial = [_MASK] if cell.masks_h else []
    names = _Names(cell, projected, zoned)
    parts = [_backward_phase(names, k, initial) for k in range(last, -1, -1)]
    if projected:
        terms, own, body = _gradient_of_h(names)
        body.append(f"dh = {rounded('dh')}")
        body.append(store("dh_all", "at * P + hidden", "dh", "live & is_hidden"))
        rest = "tl.where(live, 0.0, dh_next)"
        stays = f"tl.where(kept, dh_stays, {rest})" if "h" in zoned.states else rest
        body.append(f"dh_next = {stays}")
        parts.insert(0, Part(terms, own, body, []))
    step = ["time = tl.where(reverse, step, steps - 1 - step)", ROWS, KEPT_IN_STEPS, EARLIER, LATER]
    step += [HANDED] if cell.products else []
    carried = {"dh_next": ("dh", "state * P + hidden", "(batch < B) & is_hidden")}
    for s in cell.other_states:
        carried[f"d{s}_next"] = (f"d{s}", "state * H + units", "(batch < B) & is_unit")
    for s in zoned.states:
        if _takes_later(cell, s):
            carried[f"d{s}_later"] = (f"d{s}_later", "state * H + units", "(batch < B) & is_unit")
    for k, u in enumerate(cell.unit_parameters):
        place = f"((tile * R + recurrence) * {U} + {k}) * H + units"
        carried[f"total_{u}"] = ("dunit", place, "is_unit")
    initial = list(dict.fromkeys(initial))
    start = _units(cell) + _parts(names)
    return Steps(cell, "backward", start, initial, carried, step, parts, "steps + 1", afresh=True)


def _gradient_of_h(names: _Names) -> tuple[list[Term], list[Load], list[str]]:
    """dh: what the step after this one hands back, or the gradient of the final state, and dy.

    The carried ``dh_next`` is the gradient of the final state until a sequence's last step has run,
    and the part that the text itself hands back (dh_prev) from then on. At a sequence's first
    step's predecessor it receives the whole sum, the gradient of h_0.
    """
    terms = [
        _from_gates(names, phase, "dproduct_h", "handed_later", "passes", "P", "hidden")
        for phase in names.cell.phases
        if phase.operand == "h_prev" and names.cell.product_gates(phase)
    ]
    body = []
    if terms:
        body.append("dh_next += masked(dproduct_h, h_mask_ptr, h_mask)")
    body += ["dh = dh_next + dy", *_split(names, "h"), *_with_later(names, "h")]
    return terms, [_DY, *_stay(names, "h")], body


def _with_later(names: _Names, state: str) -> list[str]:
    """What texts of later phases left of the gradient of a zoned state. They take what the text
    gave, so it is no part of what the step after this one left."""
    if state in names.zoned.states and _takes_later(names.cell, state):
        return [f"d{state} += d{state}_later"]
    return []


def _from_gates(
    names: _Names, phase: Phase, result: str, at: str, exists: str, width: str, columns: str
) -> Term:
    """The gradient of a phase's operand: the gates' gradients, which stand side by side in a row,
    times their rows of w_hh, which stand one below the other."""
    cell = names.cell
    first, end = cell.product_rows(phase)
    inner = "H" if end - first == 1 else f"{end - first} * H"
    weights = f"w_hh_ptr + ((recurrence * {cell.G_hh} + {first}) * H + down) * {width} + {columns}"
    return Term(
        result,
        ("product", f"({at} * {cell.G_hh} + {first}) * H", exists),
        _tile("w_hh", cell.product_gates(phase)),
        weights,
        inner,
        "is_hidden" if columns == "hidden" else "is_unit",
        sliced=True,
    )


def _backward_phase(names: _Names, k: int, initial: list[str]) -> Part:
    """The product that a phase's incoming gradient is, and its backward text.

    The last phase's is of the gate gradients of the step that ran before, an earlier phase's of the
    gate gradients of the phase that multiplied its result.
    initial: takes up what stands before the first step.
    """
    cell, projected, phase = names.cell, names.projected, names.cell.phases[k]
    terms: list[Term] = []
    own: list[Load] = []
    body: list[str] = []
    if "h" in phase.returns:
        if projected:
            operand = ("dh_all", "at * P", "live")
            weight = "w_hr_ptr + (recurrence * P + down) * H + units"
            terms = [Term("dh", operand, "w_hr", weight, "P", "is_unit", sliced=True)]
        else:
            terms, own, body = _gradient_of_h(names)
    for p in cell.phases[k + 1 :]:
        if p.operand in phase.returns:
            terms.append(_from_gates(names, p, f"d{p.operand}", "handed", "live", "H", "units"))
    products = {term.result for term in terms}
    for value in phase.returns:  # what texts of later phases have left of its gradient
        if value in cell.handed_on and _takers(cell, value):
            sign = "+" if f"d{value}" in products else ""
            body.append(f"d{value} {sign}= {shared(*names.waiting(value))}")
    start, received = _received(names, phase)
    initial += start
    own = own + received
    for s in cell.other_states:
        if s in phase.returns:
            own += [_state_gradient(s), *_stay(names, s)]
            body += [f"d{s} = d{s}_next + d{s}_all", *_split(names, s), *_with_later(names, s)]
    body += _gradients(names, k, in_parts=True)
    for name in _shares(cell, k):
        value, share = name[1:], _from_phase(name, k)
        if value in cell.handed_on:
            place = names.waiting(value)
            if max(_takers(cell, value)) != k:
                share = f"{share} + {shared(*place)}"
            body.append(store(*place, share))
        elif value in names.zoned.states:
            sign = "" if max(_takes_later(cell, value)) == k else "+"
            body.append(f"d{value}_later {sign}= tl.where(live, {share}, 0.0)")
        elif value in cell.states:
            body.append(f"d{value}_next += tl.where(live, {share}, 0.0)")
    for s in cell.states:
        if s == "h" and projected:
            continue
        name, rest = f"d{s}_prev", f"tl.where(live, 0.0, d{s}_next)"
        share = _from_phase(name, k) if name in phase.gradients else ""
        if s in phase.returns:
            if s in names.zoned.states:
                share = f"{share} + d{s}_stays" if share else f"d{s}_stays"
            body.append(f"d{s}_next = {f'tl.where(kept, {share}, {rest})' if share else rest}")
        elif share:
            body.append(f"d{s}_next += tl.where(kept, {share}, 0.0)")
    body += [
        f"total_{n[1:]} += tl.sum(tl.where(live, {n}, 0.0), 0)[None, :]"
        for n in _of_units(cell, phase)
    ]
    return Part(terms, own, body, [])


def terms_of(cell: Cell, projected: bool, backward: bool) -> list[Term]:
    """The products of a step in parts: for the tiling, how wide they are and for how many gates."""
    steps = (_backward if backward else _forward)(cell, projected)
    return [term for part in steps.parts for term in part.terms]


def _forward_text(cell: Cell, projected: bool, k: Any, zoned: Zoned = UNZONED) -> str:
    return forward_walk(cell, projected, k, False, zoned)


def _given_text(cell: Cell, projected: bool, k: Any, zoned: Zoned = UNZONED) -> str:
    return forward_walk(cell, projected, k, True, zoned)


def _in_parts(kernel: Callable[[Steps, Any], str], steps: Callable[..., Steps]) -> Text:
    def text(cell: Cell, projected: bool, k: Any, zoned: Zoned = UNZONED) -> str:
        return kernel(steps(cell, projected, zoned), k)

    return text


#: The text of (cell, projected, k, zoned). k: of a step the part; of a grid the Pieces in which its
#: programs hold their weights, or None; of a walk whether it asks for a step's values in the step
#: before.
Text = Callable[..., str]
#: The kinds of loop.
TEXTS: dict[str, Text] = {
    "forward_walk": _forward_text,
    "forward_given": _given_text,
    "forward_step": _in_parts(step_kernel, _forward),
    "forward_grid": _in_parts(grid_kernel, _forward),
    "backward_walk": backward_walk,
    "backward_step": _in_parts(step_kernel, _backward),
    "backward_grid": _in_parts(grid_kernel, _backward),
}

__all__ = ["TEXTS", "Pieces", "terms_of"]
