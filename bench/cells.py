"""docs/cells.md, written from the declarations of the cells and from what the backends say they
serve: ``python -m bench.cells [--write]``.

Nothing is measured and nothing asked of the machine: each backend's ``supports`` is asked about
problems on the device that it is for. A section written by hand stands behind the mark of the end.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import fastseq
from fastseq import cells
from fastseq.backends import choice, imported
from fastseq.backends.contract import Problem
from fastseq.cells import CELLS, Cell, Phase

PAGE = Path(__file__).parent.parent / "docs" / "cells.md"
END = "<!-- cells: end; what follows is written by hand -->"
INTRODUCTION = """# Cells

The recurrent cells of the library: equations, parameters, source, and which backend serves what.
`python -m bench.cells --write` writes this page from the declarations in
[fastseq/cells](../fastseq/cells) and from each backend's `supports`, and a test writes it again.
How to add a cell stands [at its end](#a-cell-of-your-own).

$x_t$ is the input of a step, (I,), and $h_t$ the hidden state, (H,), or (P,) where it is projected.
$\\sigma$ is the logistic function and $\\odot$ the elementwise product. $W_{ig}$ are the rows of
`weight_ih` for gate $g$ and $W_{hg}$ those of `weight_hh`; the biases $b_{ig}$ and $b_{hg}$ go with
them. In a weight the gates lie one behind the other in the order given here, H rows each. A layer's
parameters have `_l0` behind their names, and in the second direction `_l0_reverse`.
"""


class Public(NamedTuple):
    """What users call: names in ``fastseq``, and the options with which they are this cell."""

    layer: str
    cell: str
    function: str
    options: dict[str, Any] = {}  # noqa: RUF012  (nobody writes to it)


#: The public names of each cell of the library; what stands here with None has none.
PUBLIC: dict[str, Public | None] = {
    "rnn_tanh": Public("RNN", "RNNCell", "rnn"),
    "rnn_relu": Public("RNN", "RNNCell", "rnn", {"nonlinearity": "relu"}),
    "lstm": Public("LSTM", "LSTMCell", "lstm"),
    "gru": Public("GRU", "GRUCell", "gru"),
    "gru_reset_before": Public("GRU", "GRUCell", "gru", {"reset_after": False}),
    "rnn_sigmoid": Public("RNN", "RNNCell", "rnn", {"nonlinearity": "sigmoid"}),
    "peephole_lstm": Public("PeepholeLSTM", "PeepholeLSTMCell", "peephole_lstm"),
    "coupled_lstm": Public("CoupledLSTM", "CoupledLSTMCell", "coupled_lstm"),
    "mgu": Public("MGU", "MGUCell", "mgu"),
    "indrnn": Public("IndRNN", "IndRNNCell", "indrnn"),
    "leaky_integrator": None,
    "indrnn_tanh": Public("IndRNN", "IndRNNCell", "indrnn", {"nonlinearity": "tanh"}),
}
#: Layers of several cells. Their equations, and their source, are those of the class's docstring.
COMPOSED = (Public("SCRN", "SCRNCell", "scrn", {"context_size": 4}),)
#: backend -> the devices that it is asked about
DEVICES = {
    "native": ("cpu",),
    "numba": ("cpu",),
    "cuda": ("cuda",),
    "triton": ("cuda",),
    "torch": ("cpu", "cuda"),
    "eager": ("cpu", "cuda"),
    "reference": ("cpu",),
}
COLUMNS = [(name, device) for name, devices in DEVICES.items() for device in devices]
#: what is asked -> how its problem differs from a plain one that is trained
QUESTIONS: dict[str, dict[str, Any]] = {
    "training": {},
    "inference": {"training": False},
    "both directions": {"R": 2},
    "packed rows, `lengths=`": {"ragged": True},
    "a step of a cell's module": {"single": True, "T": 1},
    "a projected state (`proj_size=`)": {"projected": True, "P": 8},
    "`reset=`": {"reset": True},
    "`recurrent_dropout=`": {"h_mask": True},
    "`zoneout=`": {"zoneout": (0.1,)},
    "`all_states=True`": {"trajectory": True},
    '`memory="lean"`': {"memory": "lean"},
    "`deterministic=True`": {"deterministic": True},
    "float64": {"dtype": torch.float64},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "`torch.compile`, `torch.export`": {"mode": "compile"} | dict.fromkeys("TBIHP"),
    "`torch.jit.trace`": {"mode": "trace"} | dict.fromkeys("TB"),
    "`torch.func` (vmap, grad)": {"mode": "transform"},
    "forward-mode derivatives": {"mode": "dual"},
}


class Missing(RuntimeError):
    """A backend cannot be imported here, so it cannot be asked."""


def library() -> list[Cell]:
    """The cells of the library, without those that a program has registered."""
    return [cell for name, cell in CELLS.items() if name in cells._LIBRARY]


# Equations


def equations(cell: Cell, units: dict[str, str] | None = None) -> str:
    """The forward texts as LaTeX, a line for each assignment. units: what to call parameters."""
    lines = [line for phase in cell.phases for line in _lines(cell, phase, units or {})]
    body = " \\\\\n".join(f"{left} &= {right}" for left, right in lines)
    return f"\\begin{{aligned}}\n{body}\n\\end{{aligned}}"


def _lines(cell: Cell, phase: Phase, units: dict[str, str]) -> Iterator[tuple[str, str]]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(phase.forward)))
    meaning = {name: (text, _SUM) for name, text in _parts(cell, phase).items()}
    meaning |= {name: (text, _VALUE) for name, text in units.items()}
    for statement in tree.body[0].body:  # type: ignore[attr-defined]
        if isinstance(statement, ast.Assign):
            (target,) = statement.targets
            yield _name(cell, target.id), _expression(cell, statement.value, meaning)[0]


def _parts(cell: Cell, phase: Phase) -> dict[str, str]:
    """What the parts of gates that a phase takes stand for."""
    operand = _name(cell, phase.operand)
    found = {}
    for gate in cell.gates:
        x = f"W_{{i{gate}}} x_t + b_{{i{gate}}}"
        s = f"W_{{h{gate}}} {operand} + b_{{h{gate}}}"
        found |= {f"x_{gate}": x, f"s_{gate}": s, f"a_{gate}": f"{x} + {s}"}
    return found


_WORDS = {
    "sigmoid": "\\sigma({})",
    "tanh": "\\tanh({})",
    "relu": "\\mathrm{{relu}}({})",
    "exp": "\\exp({})",
    "sqrt": "\\sqrt{{{}}}",
    "reciprocal": "\\frac{{1}}{{{}}}",
    "maximum": "\\max({})",
    "logsigmoid": "\\log \\sigma({})",
}
_SUM, _PRODUCT, _VALUE = range(3)  # how tightly an expression holds together
_GREEK = ("alpha", "beta", "gamma", "delta", "lambda")


def _expression(cell: Cell, node: ast.AST, meaning: dict[str, tuple[str, int]]) -> tuple[str, int]:
    if isinstance(node, ast.Name):
        if node.id in meaning:
            return meaning[node.id]
        return _name(cell, node.id), _VALUE
    if isinstance(node, ast.Call):
        given = ", ".join(_expression(cell, argument, meaning)[0] for argument in node.args)
        return _WORDS[node.func.id].format(given), _VALUE  # type: ignore[attr-defined]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return f"-{_held(_expression(cell, node.operand, meaning), _PRODUCT)}", _SUM
    if not isinstance(node, ast.BinOp):
        raise ValueError(f"{cell.name}: {ast.unparse(node)} is no sum, product or word")
    left, right = (_expression(cell, side, meaning) for side in (node.left, node.right))
    if isinstance(node.op, ast.Mult):
        return f"{_held(left, _PRODUCT)} \\odot {_held(right, _PRODUCT)}", _PRODUCT
    sign, least = ("+", _SUM) if isinstance(node.op, ast.Add) else ("-", _PRODUCT)
    return f"{left[0]} {sign} {_held(right, least)}", _SUM


def _held(expression: tuple[str, int], least: int) -> str:
    text, holds = expression
    return text if holds >= least else f"({text})"


def _name(cell: Cell, name: str) -> str:
    """A value of the step has an index of time, a parameter none."""
    time = "" if name in cell.unit_parameters else "t"
    if name.endswith("_prev"):
        name, time = name.removesuffix("_prev"), "t-1"
    letter, _, index = name.partition("_")
    if letter in _GREEK:
        letter = f"\\{letter}"
    elif len(letter) > 1:
        letter = f"\\mathit{{{letter}}}"
    below = ",".join(part for part in (index, time) if part)
    return letter if not below else f"{letter}_{below if len(below) == 1 else f'{{{below}}}'}"


# What there is of a cell


def module(public: Public, kind: str = "layer", **more: Any) -> Any:
    """With sizes that tell each other apart: I = 3, H = 5, P = 2 and C = 4."""
    return getattr(fastseq, getattr(public, kind))(3, 5, **public.options, **more)


def parameters(cell: Cell, public: Public | None) -> str:
    """Names and shapes: of the layer that users make, else of what the functions take."""
    if public is None:
        own = len(cell.recurrent_gates)
        found = {"w_ih": (cell.G * 5, 3), "w_hh": (own * 5, 5)}
        found |= {"b_ih": (cell.G * 5,), "b_hh": (own * 5,)}
        found |= dict.fromkeys(cell.unit_parameters, (5,))
        return _listed({name: shape for name, shape in found.items() if shape[0]})
    plain = _shapes(module(public))
    try:
        projected = _shapes(module(public, proj_size=2))
    except ValueError:  # it has no such argument
        return _listed(plain)
    other = {name: shape for name, shape in projected.items() if plain.get(name) != shape}
    return f"{_listed(plain)}; with `proj_size=P` {_listed(other)}"


def units(cell: Cell, public: Public | None) -> dict[str, str]:
    """The letters of the parameters of a unit, which stand last in a layer: weight_ci is w_{ci}."""
    if public is None or not cell.unit_parameters:
        return {}
    own = list(_shapes(module(public)))[-len(cell.unit_parameters) :]
    letters = [f"w_{{{name.removeprefix('weight_')}}}" for name in own]
    return dict(zip(cell.unit_parameters, letters, strict=True))


def _shapes(layer: Any) -> dict[str, tuple[int, ...]]:
    """Of the first layer's parameters."""
    return {
        name.removesuffix("_l0"): tuple(getattr(layer, name).shape)
        for name in layer._all_weights[0]
    }


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"`{name}` ({', '.join(map(_size, shape))})" for name, shape in shapes.items())


def _size(size: int) -> str:
    letters = {2: "P", 3: "I", 4: "C", 5: "H", 7: "I + C"}
    return letters.get(size) or (f"{size // 5}H" if size % 5 == 0 else str(size))


def names(public: Public) -> str:
    options = ", ".join(f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}"
                        for k, v in public.options.items())  # fmt: skip
    called = f"({options})" if options else ""
    return ", ".join(f"`fastseq.{name}{called}`" for name in public[:3] if name)


def section(cell: Cell) -> str:
    public = PUBLIC[cell.name]
    gates = f"gates {', '.join(cell.gates)}" if cell.G > 1 else f"gate {cell.gates[0]}"
    if cell.recurrent_gates and cell.recurrent_gates != cell.gates:
        gates += f" (`weight_hh`: {', '.join(cell.recurrent_gates)})"
    states = f"states {', '.join(cell.states)}" if cell.other_states else "state h"
    used = names(public) if public else f'No public name; `fastseq.cells.CELLS["{cell.name}"]`'
    lines = [
        f"### {cell.name}",
        f"{used}. {gates.capitalize()}; {states}.",
        f"```math\n{equations(cell, units(cell, public))}\n```",
        f"Parameters: {parameters(cell, public)}.",
        f"Source: {cell.source}.",
    ]
    return "\n\n".join(lines)


def composed(public: Public) -> str:
    """The same of a layer of several cells."""
    text = inspect.getdoc(getattr(fastseq, public.layer)) or ""
    math = text.split(".. math::\n")[1].split("\n\n")[0]
    lines = [
        f"### {public.function}",
        f"{names(public._replace(options={}))}: a layer of several cells.",
        f"```math\n\\begin{{aligned}}\n{textwrap.dedent(math)}\n\\end{{aligned}}\n```",
        f"Parameters: {_listed(_shapes(module(public)))}.",
        f"Source: {' '.join(text.split('Source: ')[1].split())}",
    ]
    return "\n\n".join(lines)


# Who serves what


def reason(name: str, device: str, cell: Cell, question: dict[str, Any]) -> str | None:
    """Why a backend declines; None if it serves."""
    found = imported(name)
    if isinstance(found, str):
        raise Missing(f"{name}: {found}")
    plain = Problem(cell.name, torch.float32, device, 7, 4, 8, 16, 16, training=True)
    changes = dict(question)
    if "zoneout" in changes:
        changes["zoneout"] *= len(cell.states)
    return choice.declines(found, plain._replace(**changes))


def asked(question: str) -> list[Cell]:
    """The cells of which it can be asked."""
    return [c for c in library() if c.other_states or question != "`all_states=True`"]


def table() -> str:
    """A row for each question, a column for each backend and device; and the reasons."""
    titles = [
        f"{name}, {device.upper()}" if len(DEVICES[name]) > 1 else name for name, device in COLUMNS
    ]
    rows = [f"| | {' | '.join(titles)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    because = []
    for question, changes in QUESTIONS.items():
        entries = []
        reasons: dict[str, dict[str, None]] = {}
        for name, device in COLUMNS:
            answers = {
                cell.name: reason(name, device, cell, changes)
                for cell in asked(question)
                if reason(name, device, cell, {}) is None  # else it serves nothing of the cell
            }
            entries.append(_entry(answers))
            for cell, words in answers.items():
                if words is not None:
                    reasons.setdefault(_of_any(words, cell, name), {})[name] = None
        rows.append(f"| {question} | {' | '.join(entries)} |")
        because += [f"- {question} ({', '.join(those)}): {why}." for why, those in reasons.items()]
    return "\n".join(rows) + "\n\n" + "\n".join(because)


def _entry(answers: dict[str, str | None]) -> str:
    served = [name for name, answer in answers.items() if answer is None]
    declined = [name for name in answers if name not in served]
    if not declined:
        return "yes"
    if not served:
        return "no"
    if len(served) <= len(declined):
        return f"{', '.join(served)}"
    return f"not {', '.join(declined)}"


def _of_any(words: str, cell: str, name: str) -> str:
    """What a backend says of one cell, as it says it of any."""
    words = re.sub(rf"\bno {cell}\b", "no such cell", words)
    words = re.sub(rf"\b{cell}\b", "the cell", words)
    return re.sub(rf"\b{name}\b(?!\.)", "it", words).replace("it's", "its")


def overview() -> str:
    """A row for each cell: whether a backend serves it at all."""
    rows = [f"| | {' | '.join(DEVICES)} |", "|---" * (1 + len(DEVICES)) + "|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in library():
        entries = []
        for name, devices in DEVICES.items():
            words = reason(name, devices[0], cell, {})
            entries.append("yes" if words is None else "no")
            if words is not None:
                reasons.setdefault((name, _of_any(words, cell.name, name)), []).append(cell.name)
        rows.append(f"| [{cell.name}](#{cell.name}) | {' | '.join(entries)} |")
    because = [f"- {name}, {', '.join(those)}: {why}." for (name, why), those in reasons.items()]
    return "\n".join(rows) + "\n\n" + "\n".join(because)


SERVED = """## Which backend serves what

native is compiled C++ for the CPU, numba the same without a compiler, cuda CUDA C++ for NVIDIA GPUs
(H up to 128), triton for all GPUs, torch what torch has of its own (oneDNN, cuDNN), eager torch's
operations step by step, reference NumPy in float64. Where no backend is named, one that serves the
call is chosen. A `yes` says that the backend takes the problem, not that it is there:
`fastseq.backends()` tells that of a machine, and `fastseq.explain` of a call.
"""
OPTIONS = """### Options and modes

For the cells that a backend serves at all: `yes` for all of them, a list for these alone, `no` for
none. Asked with float32, sizes of T7 B4 I8 H16, in training unless the row says otherwise. What one
backend declines another runs.
"""


def page() -> str:
    """All that is written by this program."""
    parts = [INTRODUCTION, "## The cells"]
    parts += [*map(section, library()), *map(composed, COMPOSED)]
    parts += [SERVED, overview(), OPTIONS, table(), END]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def by_hand(text: str) -> str:
    """What stands behind the mark."""
    if text.count(END) != 1:
        raise ValueError(f"{PAGE}: expected one line {END}")
    return text.split(END)[1].removeprefix("\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.cells", description=__doc__)
    parser.add_argument("--write", action="store_true", help="make docs/cells.md")
    options = parser.parse_args(argv)
    if options.write:
        PAGE.write_text(page() + by_hand(PAGE.read_text()))
    else:
        print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
