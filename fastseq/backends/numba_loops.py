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
whose places are named in :data:`SLOTS`. A buffer that is not wanted is one row of scratch with row
stride 0.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections.abc import Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numba
import numpy as np

from ..cells import Cell, Phase, arguments, bind
from .numba_simd import JIT, simd
from .numba_threads import run

_SIZES = (
    # steps, batch, rows [first, last) of it; sizes and offsets of the steps (0: dense); reset or 0
    "T B first_row last_row H P reverse sizes offsets reset"
)
_STRIDES = "y_stride c_stride"
_FORWARD = (
    # addresses; w_in: packed input weights, 0: the input product is in x already; x_kept: x has a
    # row for each of the input, else for each of the task's; w_k: the packed weights of phase k, 0:
    # the product is in s already
    "input I w_in x x_kept bias s s_stride w_0 w_1 w_hr m m_stride y h h_mask operand b_hh unit_0 "
    "c c_all extra_0 extra_0_stride"
)
_BACKWARD = (
    "dgates dproduct h_0 c_0 zeros dy dy_stride dh dc dc_all dc_all_stride dh_all dm dq dunit_0"
)
#: name -> place in the array of a kernel's arguments
SLOTS = {
    name: place for place, name in enumerate(f"{_SIZES} {_STRIDES} {_FORWARD} {_BACKWARD}".split())
}

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

#: A sum over rows is a sum of chains: one chain over all of them would round too often.
CHAIN = 256
_SUM_OF_CHAINS = f"""\
chain += 1
if chain == {CHAIN}:
    chain = 0
    for i in range(H):
        store1(dunit_0, H + i, load1(dunit_0, H + i) + load1(dunit_0, i))
        store1(dunit_0, i, ZERO)
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
        self.others = cell.states[1:]
        if len(self.others) > 1 or len(cell.unit_parameters) > 1 or len(cell.extras) > 1:
            raise NotImplementedError(
                f"{cell.name}: the Numba loops hold one state beside h, one unit parameter and "
                "one extra saved value"
            )

    def saved(self, name: str) -> str | None:
        """The load of a saved value, if it is one."""
        if name not in self.cell.saved:
            return None
        k = self.cell.saved.index(name)
        return _load("x_row", _gate(k)) if k < self.cell.G else _load("extra_0_row")

    def is_kept(self, name: str) -> bool:
        return name in self.cell.saved or name in self.cell.states


def _values(text: Any) -> str:
    """The arguments of a text as the kernel names them: v_ sets them apart from addresses."""
    return ", ".join(f"v_{name}" for name in arguments(text))


def _forward_phase(cell: Cell, k: int, phase: Phase) -> str:
    names = _Names(cell)
    first, last = cell.product_rows(phase)
    code = []
    if last:
        if phase.operand == "h_prev":
            code.append(
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
    gemm(source + first_row * P * ITEMSIZE, P, 1, w_{k}, s + {first} * H * ITEMSIZE, s_stride,
         rows, P, {last - first} * H, False)"""
            )
        else:
            code.append(
                f"gemm(extra_0 + (base + first_row) * extra_0_stride * ITEMSIZE, extra_0_stride, "
                f"1, w_{k}, s + {first} * H * ITEMSIZE, s_stride, "
                f"rows, H, {last - first} * H, False)"
            )
    lines = []
    for name in arguments(phase.forward):
        kind, _, gate = name.partition("_")
        if gate in cell.gates and kind in ("a", "x", "s"):
            at = cell.gates.index(gate)
            if kind != "x":
                place = cell.recurrent_gates.index(gate)
                product = _load("s_row", _gate(place))
            given = f"{_load('x_row', _gate(at))} + {_load('bias', _gate(at))}"
            if kind == "a":
                lines.append(f"v_{name} = {given} + {product}")
            elif kind == "x":
                lines.append(f"v_{name} = {given}")
            else:
                lines.append(f"v_{name} = {product} + {_load('b_hh', _gate(place))}")
        elif name == "h_prev":
            lines.append(f"v_{name} = {_load('h_row')}")
        elif name.endswith("_prev"):
            lines.append(f"v_{name} = {_load('c_row')}")
        elif name in cell.unit_parameters:
            lines.append(f"v_{name} = {_load('unit_0')}")
        else:
            lines.append(f"v_{name} = {names.saved(name)}")
    results = ", ".join(f"new_{name}" for name in phase.returns)
    comma = "," if len(phase.returns) == 1 else ""
    lines.append(f"{results}{comma} = text_{k}({_values(phase.forward)})")
    for name in (*phase.returns, *arguments(phase.forward)):
        value = f"new_{name}" if name in phase.returns else f"v_{name}"
        if name in cell.saved and (name in phase.returns or name in cell.extras):
            at = cell.saved.index(name)
            if at < cell.G:
                lines.append(_store("x_row", _gate(at), value))
            else:
                lines.append(_store("extra_0_row", "j", value))
        if name in phase.returns and name == "h":
            lines.append(_store("m_row", "j", value))
            lines.append(_store("y_row", "j", value))
        elif name in phase.returns and name in cell.states:
            lines.append(_store("c_row", "j", value))
            lines.append(_store("c_all_row", "j", value))
    rows = [
        _row("x", "(x_base + b)", f"({cell.G} * H)"),
        "if s_given:",
        "    s_row = s + (base + b) * s_stride * ITEMSIZE",
        "else:",
        "    s_row = s + (b - first_row) * s_stride * ITEMSIZE",
        _row("h", "b", "P"),
        _row("c", "b", "H"),
        _row("c_all", "(base + b)", "c_stride"),
        _row("extra_0", "(base + b)", "extra_0_stride"),
        # without projection the new h goes to the carried state and to y, with it to m alone
        "m_row = m + (base + b) * m_stride * ITEMSIZE if w_hr else h_row",
        "y_row = m_row if w_hr else y + (base + b) * y_stride * ITEMSIZE",
    ]
    code.append("for b in range(first_row, first_row + rows):")
    code.append(_indent("\n".join(rows), 1))
    code.append(_indent(_block_of_units(lines), 1))
    return "\n".join(code)


def forward_source(cell: Cell) -> str:
    """The text of a cell's forward kernel."""
    zero = "for i in range(P):\n    store1(h, b * P + i, ZERO)"
    if len(cell.states) > 1:
        zero += "\nfor i in range(H):\n    store1(c, b * H + i, ZERO)"
    body = [_ZERO_WHERE_RESET.format(zero=_indent(zero, 3))]
    body.append(
        f"""\
x_base = base if x_kept else -first_row
if w_in:
    gemm(input + (base + first_row) * I * ITEMSIZE, I, 1, w_in,
         x + (x_base + first_row) * {cell.G} * H * ITEMSIZE, {cell.G} * H, rows, I, {cell.G} * H,
         False)"""
    )
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
    wanted = f"{_SIZES} {_STRIDES} {_FORWARD}".split()
    slots = [f"{name} = load_int(p, {SLOTS[name]})" for name in wanted]
    slots += ["whole = H - H % LANES", "s_given = w_0 == 0"]
    return _STEP.format(
        name=f"{cell.name}_forward_loop",
        count=len(SLOTS),
        slots=_indent("\n".join(slots), 2),
        walk="T - 1 - step if reverse else step",
        body=_indent("\n".join(body), 4),
    )


def _backward_phase(cell: Cell, k: int, phase: Phase) -> str:
    names = _Names(cell)
    first, last = cell.product_rows(phase)
    is_last = k == len(cell.phases) - 1
    lines = []
    for name in arguments(phase.backward):
        if name == "dh":
            lines.append(f"v_dh = {_load('dh_row')} + {_load('dy_row')}")
        elif name.startswith("d") and name[1:] in cell.states:
            lines.append(f"v_{name} = {_load('dc_row')} + {_load('dc_all_row')}")
        elif name.startswith("d") and name[1:] in cell.extras:
            lines.append(f"v_{name} = {_load('dq_row')}")
        elif name.startswith("d") and name[1:] in cell.saved:
            # the gradient of a value of this phase waits where its gate's gradient will be
            lines.append(f"v_{name} = {_load('dgates_row', _gate(cell.saved.index(name[1:])))}")
        elif name == "h":  # y holds it, unless it is projected
            lines.append(f"v_h = {_load('h_row')}")
        elif (saved := names.saved(name)) is not None:
            lines.append(f"v_{name} = {saved}")
        elif name in cell.unit_parameters:
            lines.append(f"v_{name} = {_load('unit_0')}")
        elif name == "h_prev":
            lines.append(f"v_{name} = {_load('h_prev_row')}")
        elif name.endswith("_prev"):
            lines.append(f"v_{name} = {_load('c_prev_row')}")
        else:
            lines.append(f"v_{name} = {_load('c_all_row')}")
    results = ", ".join(f"new_{name}" for name in phase.gradients)
    comma = "," if len(phase.gradients) == 1 else ""
    lines.append(f"{results}{comma} = text_{k}({_values(phase.backward)})")
    for name in phase.gradients:
        value = f"new_{name}"
        kind, _, gate = name.partition("_")
        if kind in ("da", "dx", "ds") and gate in cell.gates:
            if kind != "ds":
                lines.append(_store("dgates_row", _gate(cell.gates.index(gate)), value))
            if kind != "dx" and cell.apart_gates:
                place = cell.recurrent_gates.index(gate)
                lines.append(_store("dproduct_row", _gate(place), value))
        elif name == "dh_prev":
            earlier = "" if is_last else f"{_load('dh_row')} + "
            lines.append(_store("dh_row", "j", earlier + value))
        elif name.endswith("_prev"):
            lines.append(_store("dc_row", "j", value))
        elif name[1:] in cell.unit_parameters:
            lines.append(_store("dunit_0", "j", f"{_load('dunit_0')} + {value}"))
        else:
            lines.append(_store("dgates_row", _gate(cell.saved.index(name[1:])), value))

    G_hh = len(cell.recurrent_gates)
    rows = [
        _row("x", "(base + b)", f"({cell.G} * H)"),
        _row("dgates", "(base + b)", f"({cell.G} * H)"),
        _row("dproduct", "(base + b)", f"({G_hh} * H)"),
        _row("extra_0", "(base + b)", "extra_0_stride"),
        _row("c_all", "(base + b)", "c_stride"),
        _row("dc_all", "(base + b)", "dc_all_stride"),
        _row("dc", "b", "H"),
        _row("dq", "(b - first_row)", "H"),
        """\
if w_hr:
    h_row = x_row
    dh_row = dm + (b - first_row) * H * ITEMSIZE
    dy_row = zeros
else:
    h_row = y + (base + b) * y_stride * ITEMSIZE
    dh_row = dh + b * P * ITEMSIZE
    dy_row = dy + (base + b) * dy_stride * ITEMSIZE
if reset and load_byte(reset, base + b):
    h_prev_row = zeros
    c_prev_row = zeros
elif b < alive_before:
    h_prev_row = y + (before + b) * y_stride * ITEMSIZE
    c_prev_row = c_all + (before + b) * c_stride * ITEMSIZE
else:
    h_prev_row = h_0 + b * P * ITEMSIZE
    c_prev_row = c_0 + b * H * ITEMSIZE""",
    ]
    code = ["for b in range(first_row, first_row + rows):"]
    code.append(_indent("\n".join(rows), 1))
    code.append(_indent(_block_of_units(lines), 1))
    if any(name[1:] in cell.unit_parameters for name in phase.gradients):
        code.append(_indent(_SUM_OF_CHAINS, 1))
    if last:
        gradient = "dproduct" if cell.apart_gates else "dgates"
        source = (
            f"gemm({gradient} + ((base + first_row) * {G_hh} + {first}) * H * ITEMSIZE, "
            f"{G_hh} * H, 1, w_{k}, "
        )
        if phase.operand == "h_prev":
            adds = any("dh_prev" in p.gradients for p in cell.phases)
            code.append(
                f"""\
if w_{k}:
    if h_mask:
        {source}operand + first_row * P * ITEMSIZE, P, rows, {last - first} * H, P, False)
        for b in range(first_row, first_row + rows):
            for i in range(P):
                value = load1(operand, b * P + i) * load1(h_mask, b * P + i)
                store1(dh, b * P + i, value{" + load1(dh, b * P + i)" if adds else ""})
    else:
        {source}dh + first_row * P * ITEMSIZE, P, rows, {last - first} * H, P, {adds})"""
            )
        else:
            code.append(f"{source}dq, H, rows, {last - first} * H, H, False)")
    return "\n".join(code)


def backward_source(cell: Cell) -> str:
    """The text of a cell's backward kernel."""
    zero = "for i in range(P):\n    store1(dh, b * P + i, ZERO)"
    if len(cell.states) > 1:
        zero += "\nfor i in range(H):\n    store1(dc, b * H + i, ZERO)"
    body = [
        """\
# the rows of the step before this one in the recurrence's own direction
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
    gemm(dh_all + (base + first_row) * P * ITEMSIZE, P, 1, w_hr, dm, H, rows, P, H, False)"""
    ]
    phases = list(enumerate(cell.phases))
    body += [_backward_phase(cell, k, phase) for k, phase in reversed(phases)]
    body.append(_ZERO_WHERE_RESET.format(zero=_indent(zero, 3)))
    wanted = f"{_SIZES} {_STRIDES} {_FORWARD} {_BACKWARD}".split()
    slots = [f"{name} = load_int(p, {SLOTS[name]})" for name in wanted]
    slots += ["whole = H - H % LANES", "chain = 0"]
    return _STEP.format(
        name=f"{cell.name}_backward_loop",
        count=len(SLOTS),
        slots=_indent("\n".join(slots), 2),
        walk="step if reverse else T - 1 - step",
        body=_indent("\n".join(body), 4),
    )


@cache
def _digest() -> str:
    """Of this file: a change of it must not find the kernels that it wrote before."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


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
    label = f"{vocabulary['fingerprint']}_{_digest()}"
    names = dict(vocabulary)
    names["ZERO"] = np.dtype(dtype).type(0)
    for k, phase in enumerate(cell.phases):
        text = phase.backward if backward else phase.forward
        used = {n: vocabulary[n] for n in text.__code__.co_names if n in vocabulary}
        names[f"text_{k}"] = numba.njit(**JIT, forceinline=True)(bind(text, label, **used))
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
