"""The backward text of a forward text, in the same form: reverse-mode differentiation of a
straight-line program.

What the backward text needs of forward it takes where forward saved it, and computes again where it
can be made of what was saved. Its source is kept where ``inspect`` finds it, as Triton and
``tools/write_cells.py`` do.
"""

from __future__ import annotations

import ast
import linecache
import textwrap
import types
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any, TypeAlias
from zlib import crc32

from .check import incoming
from .program import Line, Program, Unreadable, fresh, read
from .text import Text, arguments

Cell: TypeAlias = Any  # of declaration.py, which imports this file

#: A word -> its slope in each argument, made of the arguments ``a`` and ``b`` and the value ``y``.
#: A minus in front of it goes to the sum that the gradient enters.
SLOPES: dict[str, tuple[str, ...]] = {
    "sigmoid": ("dsigmoid({y})",),
    "tanh": ("dtanh({y})",),
    "relu": ("drelu({y})",),
    "exp": ("{y}",),
    "reciprocal": ("-{y} * {y}",),
    "maximum": ("dmaximum({a}, {b})", "dmaximum({b}, {a})"),
    "logsigmoid": ("dlogsigmoid({y})",),
    "sqrt": ("dsqrt({y})",),
}


class CannotDerive(Exception):
    """Why a text, though sound, has no backward text of ours."""


# Writing


class _Writer:
    """The lines of a backward text, from the end of its program to the start."""

    def __init__(self, program: Program, at_hand: dict[str, str], used: Iterable[str]) -> None:
        self.program = program
        self.made_by = {line.value: line for line in program.lines}
        self.at_hand = dict(at_hand)  # value -> its name in the backward text
        self.used = set(used)
        self.lines: list[str] = []
        self.terms: dict[
            str, list[tuple[int, str]]
        ] = {}  # value -> signs and terms of its gradient

    def forward(self, value: str) -> str:
        """A value of forward: as it was saved, or made again."""
        if value not in self.at_hand:
            line = self.made_by.get(value)
            if line is None:
                raise CannotDerive(f"backward needs {value}; add it to saved")
            if not line.operands:  # a number, which has no type until it meets a value
                return line.written(())
            lost = [v for v in line.operands if v not in self.at_hand and v not in self.made_by]
            if lost:
                raise CannotDerive(
                    f"backward needs {value} = {line.written(line.operands)}, and {lost[0]} is not "
                    f"saved; return {value} and save it"
                )
            operands = [self.forward(operand) for operand in line.operands]
            self.at_hand[value] = self.line(value, line.written(operands))
        return self.at_hand[value]

    def line(self, name: str, expression: str) -> str:
        if name in self.used and f"{name}_total" not in self.used:
            name = f"{name}_total"
        elif name in self.used:
            name = fresh(f"{name}_", self.used)
        self.used.add(name)
        self.lines.append(f"{name} = {expression}")
        return name

    def add(self, value: str, sign: int, term: str) -> None:
        self.terms.setdefault(value, []).append((sign, term))

    def total(self, value: str) -> tuple[int, str] | None:
        """Sign and name of a value's gradient: the sum of its terms, where they have one."""
        terms = sorted(self.terms.get(value, ()), key=lambda term: -term[0])  # first one that adds
        if not terms:
            return None
        sign, expression = terms[0]
        for other, term in terms[1:]:
            expression += f" {'+' if other == sign else '-'} {term}"
        if not expression.isidentifier():
            expression = self.line(f"{'' if sign > 0 else 'minus_'}d{value}", expression)
        self.terms[value] = [(sign, expression)]
        return sign, expression

    def back(self, line: Line, active: set[str]) -> None:
        """Hand the gradient of a line's value to those of its operands that lead to an argument."""
        found = self.total(line.value)
        if found is None:
            return
        sign, d = found
        if line.operation == "*":
            for mine, other in (line.operands, line.operands[::-1]):
                if mine in active:
                    self.add(mine, sign, f"{d} * {self.forward(other)}")
            return
        if line.operation in ("+", "-"):
            signs = (sign, sign) if line.operation == "+" else (sign, -sign)[-len(line.operands) :]
            for operand, own in zip(line.operands, signs, strict=True):
                if operand in active:
                    self.add(operand, own, d)
            return
        if not line.operands:  # a number
            return
        if line.operation not in SLOPES:
            raise CannotDerive(f"{line.operation} is a derivative, whose own is not known")
        for operand, slope in zip(line.operands, SLOPES[line.operation], strict=True):
            if operand in active:
                names = {"y": line.value, "a": line.operands[0], "b": line.operands[-1]}
                needed = {n: self.forward(v) for n, v in names.items() if f"{{{n}}}" in slope}
                own = -sign if slope[0] == "-" else sign
                self.add(operand, own, f"{d} * {slope.lstrip('-').format(**needed)}")


def backward_source(cell: Cell, k: int) -> tuple[str, str, tuple[str, ...]]:
    """Name, source and gradients of the backward text of a cell's k-th phase.

    Raises CannotDerive and Unreadable.
    """
    phase = cell.phases[k]
    program, takes = read(phase.forward), arguments(phase.forward)
    given = incoming(cell, k)
    inside = dict(zip(phase.returns, program.returned, strict=True))

    kept = [*cell.saved, *cell.states, *(f"{s}_prev" for s in cell.states), *cell.unit_parameters]
    kept += [f"n{n}" for group in phase.normal for n in group]
    kept = list(dict.fromkeys(kept))
    at_hand = {inside.get(n, n): n for n in reversed(kept) if n in inside or n in takes}

    active = set(takes)  # what leads to an argument
    for line in program.lines:
        if active & set(line.operands):
            active.add(line.value)
    writer = _Writer(program, at_hand, {*kept, *takes, *phase.returns, *(f"d{n}" for n in given)})
    for value in given:
        writer.add(inside[value], 1, f"d{value}")
    for line in reversed(program.lines):
        writer.back(line, active)

    results = []
    for name in takes:
        found = writer.total(name)
        if found is None:
            raise CannotDerive(f"nothing that {phase.forward.__name__} returns depends on {name}")
        sign, total = found
        results.append(total if sign > 0 else writer.line(f"d{name}", f"-{total}"))
    values = ", ".join(results) if len(results) > 1 else f"({results[0]},)"
    body = [*writer.lines, f"return {values}"]
    read_names = _names_in([*writer.lines, *results])
    own = [*(f"d{n}" for n in given), *(n for n in kept if n in read_names)]
    name = f"{phase.forward.__name__.removesuffix('_forward')}_backward"
    text = f"def {name}({', '.join(own)}):\n" + textwrap.indent("\n".join(body), "    ") + "\n"
    return name, text, tuple(f"d{n}" for n in takes)


def _names_in(expressions: Iterable[str]) -> set[str]:
    tree = ast.parse("\n".join(expressions))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def derived(cell: Cell) -> tuple[tuple[Any, ...], str | None]:
    """The cell's phases, each with a backward text; and why one has none, where it cannot."""
    phases, why = list(cell.phases), None
    for k, phase in enumerate(cell.phases):
        if phase.backward is None:
            try:
                name, source, gradients = backward_source(cell, k)
            except (CannotDerive, Unreadable) as reason:
                why = f"{phase.forward.__name__}: {reason}"
                continue
            text = compiled(name, source, phase.forward.__module__)
            phases[k] = replace(phase, backward=text, gradients=gradients)
    return tuple(phases), why


@cache
def compiled(name: str, source: str, module: str) -> Text:
    """The function. One source is one function, so that two equal declarations are equal."""
    file = f"<fastseq {name} {crc32(source.encode()):08x}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    scope: dict[str, Any] = {"__name__": module}
    exec(compile(source, file, "exec"), scope)
    text: types.FunctionType = scope[name]
    return text
