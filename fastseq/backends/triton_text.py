"""What the text of a Triton kernel is made of: indices, loads, products, and the parts of a step.

Indices, as tiles: ``batch`` (BLOCK_B, 1) sequences, ``units`` (1, BLOCK_H) hidden units, ``hidden``
components of h (in a walk all, (1, BLOCK_P), else a tile as of units), ``rows`` and ``at``
(BLOCK_B, 1) packed rows and rows times recurrences. Masks: ``live`` sequences that this step
belongs to, ``is_unit``, ``is_hidden``.

Buffers, a row for each of the input: gates, dgates (N, R, G, H); dproduct, s (N, R, G_hh, H);
extra, dextra (N, R, E, H); m and the states other than h (N, R, H); y, dh_all (N, R, P). operand
(2, R, B, P): h, masked, as the products of even and odd steps take it, h_0 at first. Weights: w_hh
(R, G_hh, H, P), w_hr (R, P, H), b_hh (R, G_hh, H), unit (R, U, H).

With zoneout, for a state ``c``: ``stay_c`` (R, capacity, H), not 0 where it stays as it was, or
``part`` (states), how much of each does; ``c_unzoned`` (N, R, H), what the text gave.

Gates that are neighbours in a buffer are one tile (BLOCK_B, n * BLOCK_H), n two or four: one load
or store, one product, and one change of layout where there would be n. ``side_n`` and ``of_n``
(1, n * BLOCK_H) say which gate and unit a column of it belongs to, ``gate_n`` and ``unit_n`` those
of a product.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..cells import Cell

#: In the order of a kernel's arguments; a kernel has those that its text names.
POINTERS = (
    "gates s w_hh w_hr b_hh unit h_0 h_mask reset reverse lengths offsets y extra m h_n "
    "operand dgates dextra dproduct handed dh_all dy dh dunit part counter fault"
).split()
SIZES = ("step", "tiles", "patience", "fault", "T", "B", "R", "H", "P", "capacity")
CONSTANTS = ("SAVE", "WIDE", "PRECISION", "PAIRED", "BLOCK_B", "BLOCK_H", "BLOCK_P", "BLOCK_K")


class Zoned(NamedTuple):
    """The states that zoneout keeps: unit by unit, as was drawn, or in part."""

    states: tuple[str, ...] = ()
    drawn: bool = True


UNZONED = Zoned()


def state_pointers(cell: Cell) -> list[str]:
    """Of the states other than h: first, at every step, last; and their gradients. Of all states
    what zoneout wants."""
    others = [
        name
        for state in cell.other_states
        for name in (f"{state}_0", f"{state}_all", f"{state}_n", f"d{state}", f"d{state}_all")
    ]
    return others + [
        name
        for state in cell.states
        for name in (f"stay_{state}", f"{state}_unzoned", f"d{state}_later")
    ]


def forward_text(k: int) -> str:
    """How a kernel calls the forward text of phase k."""
    return f"forward_{k}"


def backward_text(k: int) -> str:
    return f"backward_{k}"


#: What kernels call their own values and helpers, and how those names begin or end that are made
#: from a cell's. A cell that has one of them is declined.
OWN_NAMES = frozenset(
    """afresh ahead apart2 apart4 arrive at at_earlier at_later batch capacity columns comes
    counter done dot dot_apart down dy earlier fault first first_row float fresh goal h_mask handed
    handed_later hidden hidden_down inner is_hidden is_unit kept known later length lengths_of
    live load load_or_zero masked operand passes patience poison range recurrence reset reverse
    rounded rows rows_later shared sliced_dot slices state step steps sum_of_slices tile tiles
    time tl together2 together4 units units_down wait within""".split()
)
MADE_NAMES = (
    r"(w_hh|b_hh|total|dproduct|stay|part)_\w+|w_hr\w*|"
    r"(side|of|gate|unit|operand|forward|backward)_\d+|"
    r"\w+_(ahead|next|last|first|all|ptr|zoned|stays|later|of_\d+)|[A-Z_\d]+"
)


def taken_names(cell: Cell) -> list[str]:
    """Names of a cell's values that a kernel uses for something else."""
    values = {n for p in cell.phases for n in (*p.takes, *p.returns)} | set(cell.states)
    values |= {f"d{name}" for name in values}
    tiles = {
        f"{part}_{'_'.join(cell.gates[i:j])}"
        for part in "axs"
        for i in range(cell.G)
        for j in range(i + 2, cell.G + 1)
    }
    states = {f"{name}_ptr" for name in POINTERS} & {f"{n}_ptr" for n in state_pointers(cell)}
    found = {n for n in values if n in OWN_NAMES | tiles or re.fullmatch(MADE_NAMES, n)}
    return sorted(found | states)


def indent(lines: str | Iterable[str], levels: int = 1) -> str:
    text = lines if isinstance(lines, str) else "\n".join(lines)
    return textwrap.indent(text, "    " * levels)


#: Gate and unit of each column of a tile: as in the buffers, and as in a product.
COLUMNS = {
    f"{gate}_{n}": f"{gate}_{n}, {unit}_{n} = columns({n}, BLOCK_H, {paired})"
    for gate, unit, paired in (("side", "of", "False"), ("gate", "unit", "PAIRED"))
    for n in (2, 4)
}


def kernel_text(cell: Cell, name: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    body = "\n".join([*(c for g, c in COLUMNS.items() if re.search(rf"\b{g}\b", body)), body])
    pointers = [f"{pointer}_ptr" for pointer in (*POINTERS, *state_pointers(cell))]

    def used(names: Sequence[str]) -> list[str]:
        return [n for n in names if re.search(rf"\b{n}\b", body)]

    signature = [*used(pointers), *(n for n in used(SIZES) if f"for {n} in" not in body)]
    signature += [f"{constant}: tl.constexpr" for constant in used(CONSTANTS)]
    arguments = textwrap.fill(", ".join(signature), 96, break_long_words=False)
    return f"def {name}(\n{indent(arguments)}\n):\n{indent(body)}\n"


# Indices

UNITS = """\
recurrence = tl.program_id(1).to(tl.int64)
units = (tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
is_unit = units < H
reverse = tl.load(reverse_ptr + recurrence) != 0"""

_SEQUENCES = """\
batch = (tile * BLOCK_B + tl.arange(0, BLOCK_B))[:, None]
state = recurrence * B + batch"""

BATCH = f"{_SEQUENCES}\nlength = lengths_of(lengths_ptr, batch, B, T)"

AFRESH = f"tile = afresh(tile, patience)\n{_SEQUENCES}"

PLACE = f"{UNITS}\ntile = tl.program_id(0)\n{BATCH}"

HIDDEN = """\
hidden = tl.arange(0, BLOCK_P)[None, :]
is_hidden = hidden < P"""

HIDDEN_ARE_UNITS = """\
hidden = units
is_hidden = is_unit"""

HIDDEN_TILE = """\
hidden = units
is_hidden = hidden < P"""

ROWS = """\
live = within(time, length)
rows = first_row(offsets_ptr, time, T, B) + batch
at = rows * R + recurrence"""

#: The row before this one in the recurrence's own direction, and whether there is one.
EARLIER = """\
earlier = tl.where(reverse, time + 1, time - 1)
known = live & within(earlier, length)
at_earlier = (first_row(offsets_ptr, earlier, T, B) + batch) * R + recurrence
fresh = live & (known == 0)"""

#: Sequences whose state goes on from the step before.
KEPT = """\
if reset_ptr is not None:
    kept = (tl.load(reset_ptr + recurrence * capacity + rows, mask=live, other=0) == 0)"""

KEPT_IN_STEPS = "kept = live\n" + KEPT.replace("kept =", "kept = live &")

#: The row after this one, and whether a gradient comes from it, and passes through its product.
LATER = """\
later = tl.where(reverse, time - 1, time + 1)
comes = within(later, length)
rows_later = first_row(offsets_ptr, later, T, B) + batch
at_later = rows_later * R + recurrence
passes = comes
if reset_ptr is not None:
    reset = tl.load(reset_ptr + recurrence * capacity + rows_later, mask=comes, other=0)
    passes = comes & (reset == 0)"""


#: Where products find the gates' gradients of this step and of the one before.
HANDED = """\
if handed_ptr is not None:
    product_ptr = handed_ptr
    handed = (step % 2 * R + recurrence) * B + batch
    handed_later = ((step + 1) % 2 * R + recurrence) * B + batch
else:
    product_ptr = dproduct_ptr
    handed = at
    handed_later = at_later"""


def of_the_next_step(lines: Iterable[str], indices: Iterable[str], counter: str) -> str:
    """The lines, with the indices (lines that assign to names) of the step after this one.

    counter: what counts the steps.
    """
    needed = list(lines)
    statements = re.split(r"\n(?! )", "\n".join(indices))
    for statement in reversed(statements):
        names = re.findall(r"^\s*(\w+) = ", statement, re.MULTILINE)
        if any(re.search(rf"\b{name}\b", line) for name in names for line in needed):
            needed.insert(0, statement)
    names = re.findall(r"^\s*(\w+) = ", "\n".join(indices), re.MULTILINE)
    text = "\n".join(needed)
    text = re.sub(rf"\b({'|'.join(dict.fromkeys(names))})\b", r"\1_next", text)
    return re.sub(rf"\b{counter}\b", f"({counter} + 1)", text)


# Loads and stores


def comma(names: Sequence[str]) -> str:
    return ", ".join(names) + ("," if len(names) == 1 else "")


def load(pointer: str, place: str, mask: str = "live & is_unit") -> str:
    return f"load({pointer}_ptr, {place}, {mask}, WIDE)"


def shared(pointer: str, place: str, mask: str = "live & is_unit") -> str:
    """Of a buffer that programs write in the same launch."""
    return f"shared({pointer}_ptr, {place}, {mask}, WIDE)"


def store(pointer: str, place: str, value: str, mask: str = "live & is_unit") -> str:
    return f"tl.store({pointer}_ptr + {place}, {value}, mask={mask})"


def rounded(value: str) -> str:
    """What a product will take."""
    return f"rounded({value}, PRECISION)"


def groups(names: Iterable[str], order: Sequence[str]) -> list[tuple[str, ...]]:
    """Runs of neighbours in ``order``, of four, two or one."""
    found: list[tuple[str, ...]] = []
    run: list[str] = []
    for name in (*sorted(names, key=order.index), ""):
        if run and (not name or order.index(name) != order.index(run[-1]) + 1):
            while run:
                n = 4 if len(run) >= 4 else 2 if len(run) >= 2 else 1
                found.append(tuple(run[:n]))
                run = run[n:]
        run.append(name)
    return found


def gate_place(count: int, first: int, n: int = 1, at: str = "at") -> str:
    """Where n gates from the ``first`` of ``count`` on are in this step's row."""
    if n == 1:
        return f"({at} * {count} + {first}) * H + units"
    return f"({at} * {count} + {first} + side_{n}) * H + of_{n}"


def gate_mask(n: int) -> str:
    return "live & is_unit" if n == 1 else f"live & (of_{n} < H)"


def together(names: Sequence[str]) -> str:
    """The tile of some gates' values."""
    return names[0] if len(names) == 1 else f"together{len(names)}({', '.join(names)})"


def apart(names: Sequence[str], tile: str, paired: str = "False") -> str:
    """The values of the gates of a tile."""
    if len(names) == 1:
        return f"{names[0]} = {tile}"
    return f"{', '.join(names)} = apart{len(names)}({tile}, BLOCK_H, {paired})"


def store_gates(pointer: str, count: int, first: int, names: Sequence[str]) -> str:
    n = len(names)
    return store(pointer, gate_place(count, first, n), together(names), gate_mask(n))


@dataclass(frozen=True)
class Load:
    """What a step takes from memory that no program writes before. It is asked for a step ahead
    and carried, as it is stored, in ``raw``; ``take`` makes values of it where they are used."""

    raw: str
    pointer: str
    place: str
    mask: str
    take: str

    @property
    def ask(self) -> str:
        return f"{self.raw} = ahead({self.pointer}_ptr, {self.place}, {self.mask})"


def load_one(name: str, pointer: str, place: str, mask: str = "live & is_unit") -> Load:
    raw = f"{name}_ahead"
    return Load(raw, pointer, place, mask, f"{name} = {raw}.to(WIDE)")


def load_gates(kind: str, group: Sequence[str], pointer: str, count: int, first: int) -> Load:
    """Neighbours of a buffer, from the first on; as values kind + name."""
    n, raw = len(group), f"{kind}{'_'.join(group)}_ahead"
    take = apart([kind + name for name in group], f"{raw}.to(WIDE)")
    return Load(raw, pointer, gate_place(count, first, n), gate_mask(n), take)


def load_columns(tile: str, n: int, pointer: str, count: int, first: int) -> Load:
    """The same as one tile, in the columns of the product that it is added to."""
    if n == 1:
        place, mask = gate_place(count, first), gate_mask(1)
    else:
        place = f"(at * {count} + {first} + gate_{n}) * H + unit_{n}"
        mask = f"live & (unit_{n} < H)"
    return Load(f"{tile}_ahead", pointer, place, mask, f"{tile} = {tile}_ahead.to(WIDE)")


def load_previous(state: str) -> tuple[str, Load]:
    """A state before the step: the line that loads the initial one, once; and the load of the row
    before, which is zero where there is none, or the state is reset."""
    along, width = ("y", "P") if state == "h" else (f"{state}_all", "H")
    name, first = f"{state}_prev", f"{state}_first"
    initial = f"{state}_0_ptr, state * {width} + units, (batch < B) & is_unit, WIDE"
    value = f"tl.where(fresh, {first}, {name}_ahead.to(WIDE))"
    take = f"{name} = tl.where(kept, {value}, 0.0)"
    place, mask = f"at_earlier * {width} + units", "known & is_unit"
    one = Load(f"{name}_ahead", along, place, mask, take)
    return f"{first} = load_or_zero({initial})", one


# Products


@dataclass(frozen=True)
class Term:
    """``result += operand @ weight``, over an inner length of ``width``.

    rows: buffer, places and mask (BLOCK_B, 1) of the operand's rows, which programs write in the
        same launch.
    place: of the weights, at ``down`` (BLOCK_K, 1) and the columns, where ``exists`` holds.
    n: how many gates stand side by side in the result.
    sliced: where the weights are on the chip, each warp takes a part of the inner length, and none
        reads the operand of another. It pays where the result is narrow and the operand wide.
    """

    result: str
    rows: tuple[str, str, str]
    weight: str
    place: str
    width: str
    exists: str
    n: int = 1
    sliced: bool = False

    def zeros(self, lead: str = "") -> str:
        """NaN where the step's operands never came."""
        columns = "BLOCK_H" if self.n == 1 else f"{self.n} * BLOCK_H"
        return f"{self.result} = tl.full(({lead}BLOCK_B, {columns}), poison, WIDE)"

    def operand(self, whole: bool = False) -> str:
        """At ``inner``: (1, BLOCK_K), or (4, 1, BLOCK_K / 4) slices. whole: all within width."""
        pointer, place, mask = self.rows
        if self.sliced:
            place, mask = f"({place})[None, :, :]", f"({mask})[None, :, :]"
        found = shared(pointer, f"{place} + inner", mask + self._within("inner", whole))
        return f"{found}.to(y_ptr.dtype.element_ty)"

    def piece(self, whole: bool = False) -> str:
        mask = f"{self.exists}{self._within('down', whole)}"
        return f"tl.load({self.place}, mask={mask}, other=0.0)"

    def _within(self, index: str, whole: bool) -> str:
        return "" if whole else f" & ({index} < {self.width})"


def products(terms: list[Term]) -> list[str]:
    """BLOCK_K of the inner length at a time, from memory."""
    lines = list(dict.fromkeys(t.zeros() for t in terms))
    for width in dict.fromkeys(t.width for t in terms):
        loop = ["inner = (first + tl.arange(0, BLOCK_K))[None, :]"]
        loop.append("down = (first + tl.arange(0, BLOCK_K))[:, None]")
        for t in terms:
            if t.width != width:
                continue
            operand = f"operand = {rounded(replace(t, sliced=False).operand())}"
            if operand not in loop:
                loop.append(operand)
            loop.append(f"{t.result} += dot(operand, {t.piece()}, PRECISION, WIDE)")
        lines += [f"for first in range(0, {width}, BLOCK_K):", indent(loop)]
    return lines


@dataclass(frozen=True)
class Pieces:
    """How a grid's programs hold their weights: in how many pieces of BLOCK_K each inner length,
    and how many pieces of an operand are on their way at once."""

    counts: tuple[tuple[str, int], ...]
    ahead: int

    def of(self, width: str) -> int:
        return dict(self.counts)[width]


def resident_weights(terms: list[Term], pieces: Pieces) -> list[str]:
    lines = []
    for t in terms:
        count = pieces.of(t.width)
        for k in range(count):
            lines.append(f"down = ({k} * BLOCK_K + tl.arange(0, BLOCK_K))[:, None]")
            slices = ".reshape(4, BLOCK_K // 4, BLOCK_H)" if t.sliced else ""
            lines.append(f"{t.weight}_{k} = {t.piece(k < count - 1)}{slices}")
    return lines


def resident_products(terms: list[Term], pieces: Pieces) -> list[str]:
    """With weights that are on the chip, and the operand's pieces side by side on their way. All
    pieces but the last are within the width, and need no register for a mask."""
    lines = list(dict.fromkeys(t.zeros("4, " if t.sliced else "") for t in terms))
    shares: dict[str, list[Term]] = {}
    for t in terms:
        shares.setdefault(t.operand(), []).append(t)
    for sharing in shares.values():
        first = sharing[0]
        inner = "({} * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]"
        if first.sliced:
            inner = "slices({}, BLOCK_K)"
        count = pieces.of(first.width)
        step = -(-count // -(-count // pieces.ahead))
        for start in range(0, count, step):
            side_by_side = range(start, min(start + step, count))
            for k in side_by_side:
                lines.append(f"inner = {inner.format(k)}")
                lines.append(f"operand_{k} = {first.operand(k < count - 1)}")
            if len(sharing) > 1:
                # Triton 3.6 brings what two products share to the tensor cores right behind its
                # load, and the next load waits for that: so another value, behind all loads
                lines += [
                    f"operand_{k} = tl.where(batch < B, operand_{k}, 0.0).to(operand_{k}.dtype)"
                    for k in side_by_side
                ]
            lines += [
                f"{t.result} += {'sliced_dot' if t.sliced else 'dot'}"
                f"(operand_{k}, {t.weight}_{k}, PRECISION, WIDE)"
                for k in side_by_side
                for t in sharing
            ]
    sliced = dict.fromkeys(t.result for t in terms if t.sliced)
    return lines + [f"{result} = sum_of_slices({result})" for result in sliced]


# Steps in parts: one launch each, or all in one


@dataclass(frozen=True)
class Part:
    """A product of a step, and what follows it.

    loads: what it takes besides. body: from there to the stores that other programs read.
    late: stores that the others need not wait for.
    """

    terms: list[Term]
    loads: list[Load]
    body: list[str]
    late: list[str]


@dataclass(frozen=True)
class Steps:
    """A loop over time in parts.

    start, initial: lines before the first tile of the batch, and before the first step of each.
    step: lines before the first part of each step.
    carried: name -> pointer, place and mask of what a program hands on to itself alone.
    count: how many steps of the longest sequence's ``steps`` there are.
    afresh: whether what the end needs is computed there: Triton 3.6 spills without in backward, and
        with it in forward.
    """

    cell: Cell
    name: str
    start: list[str]
    initial: list[str]
    carried: dict[str, tuple[str, str, str]]
    step: list[str]
    parts: list[Part]
    count: str = "steps"
    afresh: bool = False


def _named(lines: list[str], text: str) -> list[str]:
    """Those assignments whose names occur in a text."""
    return [line for line in lines if re.search(rf"\b{line.split(' = ')[0]}\b", text)]


def step_kernel(steps: Steps, k: int) -> str:
    """One part of one step."""
    part = steps.parts[k]
    lines = ["steps = T", "poison = 0.0", *steps.step, *products(part.terms)]
    lines += [line for one in part.loads for line in (one.ask, one.take)]
    lines += part.body + part.late
    text = "\n".join(lines)
    carried = {n: place for n, place in steps.carried.items() if re.search(rf"\b{n}\b", text)}
    body = [PLACE, HIDDEN_TILE, *_named(steps.start + steps.initial, text)]
    body += [f"{name} = {load(*place)}" for name, place in carried.items()]
    body += [text, *(store(p, place, name, mask) for name, (p, place, mask) in carried.items())]
    return kernel_text(steps.cell, f"{steps.cell.name}_{steps.name}_step_{k}", body)


WAIT = """\
patience = wait(counter, goal, patience)
poison = tl.where(patience > 0, 0.0, float("nan"))"""

#: Behind a tile's steps, so that they carry nothing for it: patience that was lost stays 0.
FAULT = "tl.store(fault_ptr, fault, mask=patience <= 0)"

ARRIVE = """\
arrive(counter)
goal += tl.num_programs(2)"""


def grid_kernel(steps: Steps, pieces: Pieces | None) -> str:
    """All steps in one launch, of programs that are on the chip together.

    Those with one tile of the batch in one recurrence wait for one another between parts. On the
    chip over time: what is carried, and, if they are held in ``pieces``, the weights, beside which
    what the next step takes from memory is asked for a step ahead. A program that waited in vain
    goes on with NaN, and says so behind the tile's steps.
    """
    terms = [t for part in steps.parts for t in part.terms]
    loads = list(dict.fromkeys(one for part in steps.parts for one in part.loads))
    asks = [one.ask for one in loads]
    body, first = list(steps.step), ""
    if pieces:
        body += [one.take for one in loads]
        body.append(of_the_next_step(asks, steps.step, "step"))
        first = re.sub(r"\bstep\b", "0", "\n".join([*steps.step, *asks]))
    for part in steps.parts:
        own = [] if pieces else [line for one in part.loads for line in (one.ask, one.take)]
        made = resident_products(part.terms, pieces) if pieces else products(part.terms)
        body += [WAIT, *made, *own, *part.body, ARRIVE, *part.late]
    walk = [BATCH, *steps.initial]
    walk += [f"{name} = {load(*place)}" for name, place in steps.carried.items()]
    walk += ["steps = tl.max(length)", first, f"for step in range({steps.count}):", indent(body)]
    walk += [AFRESH] if steps.afresh else []
    walk += [store(p, place, name, mask) for name, (p, place, mask) in steps.carried.items()]
    walk += [FAULT]
    text = [UNITS, HIDDEN_TILE, *steps.start]
    text += resident_weights(terms, pieces) if pieces else []
    text += ["counter = counter_ptr + (tl.program_id(0) * R + recurrence) * 16  # 128 bytes apart"]
    text += ["goal = tl.full((), 0, tl.int64)"]
    text += ["for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):", indent(walk)]
    return kernel_text(steps.cell, f"{steps.cell.name}_{steps.name}_grid", text)


def walk_kernel(
    cell: Cell,
    name: str,
    start: list[str],
    step: list[str],
    loads: list[Load],
    body: list[str],
    end: list[str],
    ahead: bool,
) -> str:
    """All steps in one launch, of programs that need nobody.

    ahead: what the next step takes from memory is asked for before this one's products.
    """
    asks = [one.ask for one in loads]
    takes = [one.take for one in loads]
    text = [*start, "steps = tl.max(length)"]
    if ahead:
        text.append(re.sub(r"\bdone\b", "0", "\n".join([*step, *asks])))
        loop = [*step, *takes, of_the_next_step(asks, step, "done"), *body]
    else:
        loop = [*step, *(line for pair in zip(asks, takes, strict=True) for line in pair), *body]
    text += ["for done in range(steps):", indent(loop)]
    return kernel_text(cell, f"{cell.name}_{name}", [*text, *end])
