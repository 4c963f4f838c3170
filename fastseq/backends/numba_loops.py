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
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

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


@cache
def slots(cell: Cell) -> dict[str, int]:
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


def _block_of_units(lines: list[str]) -> str:
    """Pointwise code over all hidden units: whole vectors, then the tail of one masked vector.

    In ``lines`` ``load(..)`` and ``store(..)`` address unit j; the tail's take n lanes.
    """
    body = "\n".join(lines)
    tail = body.replace("LOAD(", "load_part(").replace("STORE(", "store_part(")
    tail = tail.replace(";N)", ", H - whole)")
    main = body.replace("LOAD(", "load(").replace("STORE(", "store(").replace(";N)", ")")
    return "\n".join(
        [
            "for j in range(0, whole, LANES):",
            _indent(main, 1),
            "if whole < H:",
            "    j = whole",
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
        for b in range(first_row, first_row + rows):
            for i in range(P):
                value = load1(h, b * P + i) * load1(h_mask, b * P + i)
                store1(operand, b * P + i, value)
        source = operand
    else:
        source = h
    gemm(source + first_row * P * ITEMSIZE, P, 1, w_{k}, {out},
         rows, P, {last - first} * H, False)"""
    ]


def _forward_argument(names: _Names, name: str) -> str:
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
    if state in cell.other_states:
        return _load(f"{names.state(state)}_row")
    return _load(*names.saved(name))


def _forward_phase(cell: Cell, k: int, phase: Phase) -> str:
    names = _Names(cell)
    takes = arguments(phase.forward)
    lines = [f"v_{name} = {_forward_argument(names, name)}" for name in takes]
    lines.append(_call(k, takes, phase.returns))
    for name in dict.fromkeys((*phase.returns, *takes)):
        value = f"new_{name}" if name in phase.returns else f"v_{name}"
        if name in cell.saved and (name in phase.returns or name in cell.extras):
            lines.append(_store(*names.saved(name), value))
        if name not in phase.returns:
            continue
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
        # without projection the new h goes to the carried state and to y, with it to m alone
        "m_row = m + (base + b) * m_stride * ITEMSIZE if w_hr else h_row",
        "y_row = m_row if w_hr else y + (base + b) * y_stride * ITEMSIZE",
    ]
    code = _forward_product(cell, k, phase)
    code.append("for b in range(first_row, first_row + rows):")
    code.append(_indent("\n".join(rows), 1))
    code.append(_indent(_block_of_units(lines), 1))
    return "\n".join(code)


def forward_source(cell: Cell) -> str:
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
    body += [_forward_phase(cell, k, phase) for k, phase in enumerate(cell.phases)]
    body.append(
        """\
if w_hr:
    gemm(m + (base + first_row) * m_stride * ITEMSIZE, m_stride, 1, w_hr,
         h + first_row * P * ITEMSIZE, P, rows, H, P, False)
    for b in range(first_row, first_row + rows):
        for i in range(P):
            store1(y, (base + b) * y_stride + i, load1(h, b * P + i))"""
    )
    return _loop(cell, "forward", "T - 1 - step if reverse else step", body, [])


def _loop(cell: Cell, way: str, walk: str, body: list[str], start: list[str]) -> str:
    """The text of a kernel, which loads of a task's arguments what it uses."""
    text = "\n".join(body)
    places = slots(cell)
    used = set(re.findall(r"\w+", f"{text} {walk}"))
    used |= {"T", "B", "sizes", "offsets", "first_row", "last_row", "H"}
    lines = [f"{name} = load_int(p, {at})" for name, at in places.items() if name in used]
    return _STEP.format(
        name=f"{cell.name}_{way}_loop",
        count=len(places),
        slots=_indent("\n".join([*lines, "whole = H - H % LANES", *start]), 2),
        walk=walk,
        body=_indent(text, 4),
    )


def _backward_argument(names: _Names, name: str, returns: tuple[str, ...]) -> str:
    """The load of what a backward text takes."""
    cell = names.cell
    if name[0] == "d" and name[1:] in returns:
        value = name[1:]
        if value == "h":
            return f"{_load('dh_row')} + {_load('dy_row')}"
        if value in cell.states:
            buffer = f"d{names.state(value)}"
            return f"{_load(f'{buffer}_row')} + {_load(f'{buffer}_all_row')}"
        return _load(f"{names.gradient(value)}_row")
    if name == "h":  # y holds it, or m where it is projected
        return _load("h_row")
    if name in cell.saved:
        return _load(*names.saved(name))
    if name in cell.unit_parameters:
        return names.unit(name)
    if name == "h_prev":
        return _load("h_prev_row")
    if name in cell.states:
        return _load(f"{names.state(name)}_all_row")
    return _load(f"{names.state(name.removesuffix('_prev'))}_prev_row")


class _Backward:
    """The steps of a backward kernel, the last phase first.

    The gradient of a state before the step, and of a value that is handed on, may come from several
    phases: the first writes it, the others add to it.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell, self.names = cell, _Names(cell)
        self.written: set[str] = set()
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
        # what a later phase gives of a state adds to what the next step has left
        add = of in cell.states or self.adds(of)
        return [_store(row, "j", f"{_load(row)} + {value}" if add else value)]

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
        for b in range(first_row, first_row + rows):
            for i in range(P):
                value = load1(operand, b * P + i) * load1(h_mask, b * P + i)
                store1(dh, b * P + i, value{" + load1(dh, b * P + i)" if adds else ""})
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
        lines = [f"v_{n} = {_backward_argument(self.names, n, phase.returns)}" for n in takes]
        lines.append(_call(k, takes, phase.gradients))
        for name in phase.gradients:
            lines += self.gradient(name)
        code = ["for b in range(first_row, first_row + rows):"]
        code.append(_indent("\n".join(self.rows()), 1))
        code.append(_indent(_block_of_units(lines), 1))
        if any(name[1:] in self.cell.unit_parameters for name in phase.gradients):
            counts = {"CHAIN": CHAIN, "LEVELS": LEVELS, "U": len(self.cell.unit_parameters)}
            code.append(_indent(_SUM_OF_CHAINS.format(**counts), 1))
        return code + self.product(k, phase)


def backward_source(cell: Cell) -> str:
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
    before = load_int(offsets, t - 1) if sizes else base - B
if w_hr:
    for b in range(first_row, first_row + rows):
        for i in range(P):
            value = load1(dh, b * P + i) + load1(dy, (base + b) * dy_stride + i)
            store1(dh_all, (base + b) * P + i, value)
    gemm(dh_all + (base + first_row) * P * ITEMSIZE, P, 1, w_hr, dm, H, rows, P, H, False)""",
        *_Backward(cell).code,
        _zero_states(cell, ["dh", *(f"d{names.state(s)}" for s in cell.other_states)]),
    ]
    return _loop(cell, "backward", "step if reverse else T - 1 - step", body, ["chain = 0"])


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
def forward_kernel(cell: Cell, dtype: Any) -> Kernel:
    return compile_loop(cell, forward_source(cell), False, dtype)


@cache
def backward_kernel(cell: Cell, dtype: Any) -> Kernel:
    return compile_loop(cell, backward_source(cell), True, dtype)
