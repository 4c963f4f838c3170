"""Write the cells of fastseq/cells in C++: their texts, their structs, and the list of them.

    python tools/write_cells.py

It writes csrc/cells/generated.h and csrc/cells/list.h, and csrc/cuda/list.h, the kernels that are
compiled for GPUs. All are committed, and a test writes them again and compares. Run it after a
change of a cell or of that list, and build the extensions again. A cell that the loops of csrc/cpu
cannot walk is left out, with the reason, and ``native`` declines it.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fastseq.backends.cuda_kernels import KERNELS, PREVIOUS, TEAMS  # noqa: E402
from fastseq.cells import CELLS, Cell, Phase, arguments  # noqa: E402
from fastseq.cells.text import Text  # noqa: E402

FOLDER = ROOT / "csrc" / "cells"
NOTE = "// Written by tools/write_cells.py from fastseq/cells; change the cells there."
CUDA_LIST = ROOT / "csrc" / "cuda" / "list.h"
CUDA_NOTE = (
    "// Written by tools/write_cells.py from fastseq/backends/cuda_kernels.py; change the list "
    "there."
)
MOST_EACH = 4  # of csrc/cpu/call.h: other states, extras and unit parameters, of each
WIDTH = 100
#: Words of C++ that are names in Python; the gradient of an LSTM's o is called do.
KEYWORDS = frozenset(
    """alignas alignof asm auto bool case catch char char16_t char32_t char8_t concept const
    const_cast consteval constexpr constinit co_await co_return co_yield decltype default delete do
    double dynamic_cast else enum explicit export extern false float for friend goto if inline int
    long mutable namespace new noexcept nullptr operator private protected public register
    reinterpret_cast requires return short signed sizeof static static_assert static_cast struct
    switch template this thread_local throw true try typedef typeid typename union unsigned using
    virtual void volatile wchar_t while and and_eq bitand bitor compl not not_eq or or_eq xor xor_eq
    T""".split()
)


def why_not(cell: Cell) -> str | None:
    """What csrc/cpu has no place for in a cell; None where its loops walk it."""
    beyond = cell.beyond()
    if beyond:
        return beyond
    for what, names in (
        ("states beside h", cell.other_states),
        ("extras", cell.extras),
        ("unit parameters", cell.unit_parameters),
    ):
        if len(names) > MOST_EACH:
            return f"it has {len(names)} {what}, and the kernels have room for {MOST_EACH}"
    if len(cell.phases) > 2:
        return f"it has {len(cell.phases)} phases, and the kernels run two"
    if cell.recurrent_gates not in ((), cell.gates):
        return "some of its gates have a recurrent part and some have none"
    if cell.product_rows(cell.phases[0])[0] != 0:
        return "its phases do not multiply its gates in their order"
    if cell.apart_gates != cell.gates[cell.G - len(cell.apart_gates) :]:
        return "the gates that take x and s apart are not its last ones"
    if cell.apart_gates and len(cell.phases) > 1:
        return "it has two phases, and gates that take x and s apart"
    operands = ("h_prev", *cell.extras)[: len(cell.phases)]
    if tuple(phase.operand for phase in cell.phases) != operands:
        return "its second phase does not multiply its first extra"
    unread = [s for s in cell.other_states if not any(f"{s}_prev" in p.takes for p in cell.phases)]
    if unread:
        return f"no text of it takes {unread[0]}_prev"
    if not cell.recurrent_gates and not cell.reads_h:
        return "no step of it takes h_prev"
    for phase in cell.phases[1:]:
        earlier = {name for p in cell.phases[:-1] for name in p.returns}
        for name in phase.takes:
            saved = name in cell.saved[: cell.G] and name not in cell.states
            if name in earlier and not saved:
                return f"its second phase takes {name}, whose gradient would have no place"
    return None


# Texts


def text_of(text: Text) -> str:
    """A text as a function template of the number type."""
    function = ast.parse(textwrap.dedent(inspect.getsource(text))).body[0]
    assert isinstance(function, ast.FunctionDef)
    for node in ast.walk(function):
        if isinstance(node, ast.Name):
            node.id = _renamed(node.id)
    *body, last = (line for line in function.body if not _is_docstring(line))
    assert isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)
    values = [ast.unparse(value) for value in last.value.elts]
    given = ", ".join(f"T {_renamed(name)}" for name in arguments(text))
    lines = ["template <class T>"]
    lines += _broken(f"FASTSEQ_INLINE Values<T, {len(values)}> {text.__name__}({given}) {{")
    for line in body:
        lines += _broken(f"  const T {ast.unparse(line)};")
    return "\n".join([*lines, *_broken(f"  return {{{', '.join(values)}}};"), "}"])


def _renamed(name: str) -> str:
    return f"{name}_" if name in KEYWORDS else name


def _is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def _broken(line: str) -> list[str]:
    """A line of C++, broken at spaces where it is too long."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(
        line,
        WIDTH,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


# Structs


def struct_name(cell: Cell) -> str:
    """gru_reset_before -> GruResetBefore"""
    return "".join(part.capitalize() for part in cell.name.split("_"))


def struct_of(cell: Cell) -> str:
    """What cell.h says that a cell declares."""
    rows = [cell.product_rows(phase) for phase in cell.phases]
    first = ", ".join(map(str, (0, *(last for _, last in rows))))
    strings = {
        "GATES": cell.gates,
        "STATES": cell.states,
        "EXTRAS": cell.extras,
        "UNITS": cell.unit_parameters,
    }
    numbers = {
        "G": cell.G,
        "C": len(cell.other_states),
        "E": len(cell.extras),
        "U": len(cell.unit_parameters),
        "PHASES": len(cell.phases),
    }
    taken = ", ".join("true" if taken else "false" for taken in cell.taken_back)
    flags = {"KEEPS_GATES": cell.keeps_gates(False), "READS_H": cell.reads_h}
    return "\n".join(
        [
            *(f"// {line}" for line in textwrap.wrap(cell.source, WIDTH - 3)),
            f"struct {struct_name(cell)} {{",
            f'  static constexpr const char* NAME = "{cell.name}";',
            *(f'  static constexpr const char* {k} = "{" ".join(v)}";' for k, v in strings.items()),
            f"  static constexpr int {', '.join(f'{k} = {v}' for k, v in numbers.items())};",
            f"  static constexpr int FIRST[] = {{{first}}};",
            f"  static constexpr int APART = {len(cell.apart_gates)};",
            "  static constexpr bool "
            + ", ".join(f"{k} = {'true' if v else 'false'}" for k, v in flags.items())
            + ";",
            f"  static constexpr bool TAKEN_BACK[] = {{{taken}}};",
            "",
            *_method("forward", [list(_forward(cell, phase)) for phase in cell.phases]),
            "",
            *_method("backward", [list(_backward(cell, phase)) for phase in cell.phases]),
            "};",
        ]
    )


def _method(name: str, phases: list[list[str]]) -> Iterator[str]:
    yield "  template <int PHASE, class At>"
    yield f"  FASTSEQ_INLINE static void {name}(At& at) {{"
    for k, lines in enumerate(phases):
        indent = "    "
        if len(phases) > 1:
            yield "    } else {" if k else "    if constexpr (PHASE == 0) {"
            indent = "      "
        for line in lines:
            yield from _broken(indent + line)
    if len(phases) > 1:
        yield "    }"
    yield "  }"


def _part(cell: Cell, name: str) -> str | None:
    """a_g -> a(2), where g is the third gate."""
    kind, _, gate = name.partition("_")
    return f"{kind}({cell.gates.index(gate)})" if kind in "axs" and gate in cell.gates else None


def _value(cell: Cell, name: str) -> str:
    """Where a loop has a value that is no gate's part."""
    if name in ("h", "h_prev"):
        return f"{name}()"
    for state in (name, name.removesuffix("_prev")):
        if state in cell.other_states:
            return f"c{name[len(state) :]}({cell.other_states.index(state)})"
    for kind, names in (
        ("unit", cell.unit_parameters),
        ("saved", cell.saved[: cell.G]),
        ("extra", cell.extras),
    ):
        if name in names:
            return f"{kind}({names.index(name)})"
    raise ValueError(f"{cell.name}: {name} stands nowhere")


def _forward(cell: Cell, phase: Phase) -> Iterator[str]:
    takes = arguments(phase.forward)
    held = [n for n in takes if n in cell.extras and _part(cell, n) and n not in phase.returns]
    for name in held:
        yield f"const auto {name} = at.{_part(cell, name)};"
    given = [n if n in held else f"at.{_part(cell, n) or _value(cell, n)}" for n in takes]
    yield f"const auto v = {phase.forward.__name__}({', '.join(given)});"
    for k, name in enumerate(phase.returns):
        if name == "h":
            yield f"at.h(v[{k}]);"
        if name in cell.other_states:
            yield f"at.c({cell.other_states.index(name)}, v[{k}]);"
        if name in cell.saved[: cell.G]:
            yield f"at.save({cell.saved.index(name)}, v[{k}]);"
        if name in cell.extras:
            yield f"at.save_extra({cell.extras.index(name)}, v[{k}]);"
    for name in held:
        yield f"at.save_extra({cell.extras.index(name)}, {name});"


def _backward(cell: Cell, phase: Phase) -> Iterator[str]:
    assert phase.backward is not None
    later = cell.phases[cell.phases.index(phase) + 1 :]
    valued = {p.operand for p in later} or {"h"}  # what a product gives the gradient of

    def read(name: str) -> str:
        if name[0] == "d" and name[1:] in phase.returns:
            value = name[1:]
            if value in valued:
                return "dvalue()"
            if value in cell.other_states:
                return f"dc({cell.other_states.index(value)})"
            return f"dz({cell.saved.index(value)})"
        return _value(cell, name)

    given = ", ".join(f"at.{read(name)}" for name in arguments(phase.backward))
    yield f"const auto v = {phase.backward.__name__}({given});"
    for k, name in enumerate(phase.gradients):
        value = name[1:]
        part = _part(cell, value)
        if part:
            yield f"at.d{part[:-1]}, v[{k}]);"
        elif value in cell.unit_parameters:
            yield f"at.dunit({cell.unit_parameters.index(value)}, v[{k}]);"
        elif value.endswith("_prev"):
            again = "add_" if any(name in p.gradients for p in later) else ""
            where = _value(cell, value)[:-1]
            yield f"at.{again}d{where}{', ' if where[-1] != '(' else ''}v[{k}]);"
        else:
            yield f"at.dz({cell.saved.index(value)}, v[{k}]);"


# Files


def generated(cells: Iterable[Cell]) -> str:
    """csrc/cells/generated.h"""
    texts: dict[str, Text] = {}
    structs = []
    for cell in cells:
        for phase in cell.phases:
            for text in (phase.forward, phase.backward):
                assert text is not None
                if texts.setdefault(text.__name__, text) is not text:
                    raise ValueError(f"{cell.name}: another text is called {text.__name__}, too")
        structs.append(struct_of(cell))
    return "\n\n".join(
        [
            f'{NOTE}\n#pragma once\n#include "cell.h"',
            "namespace fastseq {\nnamespace FASTSEQ_ISA {",
            *map(text_of, texts.values()),
            *structs,
            "}  // namespace FASTSEQ_ISA\n}  // namespace fastseq\n",
        ]
    )


def listed(cells: Iterable[Cell]) -> str:
    """csrc/cells/list.h: what the enum, the dispatch and the tables of cells are made of."""
    rows = "".join(f" \\\n  X({cell.name.upper()}, {struct_name(cell)})" for cell in cells)
    return f"{NOTE}\n#pragma once\n\n#define FASTSEQ_CELLS(X){rows}\n"


def kernel_list(kernels: Iterable[tuple[str, str, str, int | str]]) -> str:
    """csrc/cuda/list.h: the units, which are compiled each on its own, and the kernels of each.

    ``kernels``: (way, name of the cell, type, hidden units or a team's regime) of each, in their
    order.
    """
    units: dict[str, list[str]] = {}
    for way, name, kind, width in kernels:
        struct = struct_name(CELLS[name]) if name in CELLS else name.capitalize()
        entry = f"X({way}, {name}, {struct}, {kind}, {width})"
        units.setdefault(name, []).append(entry)
    macros = {"FASTSEQ_UNITS": [f"X({name})" for name in units]}
    macros |= {f"FASTSEQ_KERNELS_{name}": entries for name, entries in units.items()}
    blocks = [
        f"#define {macro}(X)" + "".join(f" \\\n  {entry}" for entry in entries) + "\n"
        for macro, entries in macros.items()
    ]
    return "\n".join([f"{CUDA_NOTE}\n#pragma once\n", *blocks])


def written(cells: Iterable[Cell] = tuple(CELLS.values())) -> dict[Path, str]:
    """File -> what stands in it, of the cells that the kernels can walk."""
    walked = [cell for cell in cells if why_not(cell) is None]
    return {
        FOLDER / "generated.h": generated(walked),
        FOLDER / "list.h": listed(walked),
        CUDA_LIST: kernel_list(
            [
                *((k.way, k.cell, k.type, k.HC) for k in KERNELS.values()),
                *((k.way, k.cell, k.type, k.kind) for k in TEAMS.values()),
                *PREVIOUS,
            ]
        ),
    }


def main() -> None:
    for path, text in written().items():
        path.write_text(text)
    for cell in CELLS.values():
        reason = why_not(cell)
        if reason:
            print(f"left out {cell.name}: {reason}")


if __name__ == "__main__":
    main()
