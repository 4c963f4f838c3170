"""A text as a program: single operations, one after the other, read from its source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from .text import WORDS, Text, arguments, count_of, is_word

SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*"}


class Unreadable(Exception):
    """Why a text has no source."""


@dataclass(frozen=True)
class Line:
    """One operation: a word, or ``+``, ``-``, ``*`` of two values, ``-`` of one."""

    value: str
    operation: str
    operands: tuple[str, ...]

    def written(self, operands: Sequence[str]) -> str:
        if self.operation not in SIGNS.values():
            return f"{self.operation}({', '.join(operands)})"
        return f" {self.operation} ".join(operands) if len(operands) > 1 else f"-{operands[0]}"


@dataclass(frozen=True)
class Program:
    """A text in single operations, and the values that it returns."""

    lines: tuple[Line, ...]
    returned: tuple[str, ...]


def read(text: Text) -> Program:
    """Raises ValueError with the line and the reason for what no text may have.

    Raises Unreadable where there is no source.
    """
    return Reader(text, definition(text)).program()


def definition(text: Text) -> ast.FunctionDef:
    """The source of a text. Raises Unreadable where there is none."""
    try:
        source = textwrap.dedent(inspect.getsource(text))
        function = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError):
        raise Unreadable(
            f"the source of {text.__name__} cannot be read; define it in a file or a notebook"
        ) from None
    if not isinstance(function, ast.FunctionDef):
        raise Unreadable(f"the source of {text.__name__} is not that of a def")
    return function


class Reader:
    """Of a text: its expressions, one after the other, as lines of single operations."""

    def __init__(self, text: Text, function: ast.FunctionDef) -> None:
        self.text, self.function = text, function
        self.before = text.__code__.co_firstlineno - 1  # lines of the file before the source
        self.values = {name: name for name in arguments(text)}  # name -> the value it stands for
        self.lines: list[Line] = []
        self.used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}

    def refuse(self, node: ast.stmt | ast.expr | ast.arg, why: str) -> ValueError:
        line = self.before + node.lineno
        return ValueError(f"{self.text.__name__}, line {line}: {ast.unparse(node)!r}: {why}")

    def program(self) -> Program:
        body = [line for line in self.function.body if not is_docstring(line)]
        for node in body[:-1]:
            self.assign(node)
        last = body[-1]
        if not (isinstance(last, ast.Return) and isinstance(last.value, ast.Tuple)):
            raise self.refuse(last, "a text ends with the tuple that it returns")
        returned = tuple(self.value(v) for v in last.value.elts)  # which may add lines
        return Program(tuple(self.lines), returned)

    def assign(self, node: ast.stmt) -> None:
        if not isinstance(node, ast.Assign):
            raise self.refuse(node, "a text is assignments, and a return at its end")
        target = node.targets[0]
        if len(node.targets) > 1 or not isinstance(target, ast.Name):
            raise self.refuse(node, "assign one name a line")
        if target.id in self.values:
            raise self.refuse(node, f"{target.id} has a value already; take another name")
        self.values[target.id] = self.value(node.value, target.id)

    def value(self, node: ast.expr, name: str | None = None) -> str:
        """The value of an expression; its operations are added to the lines."""
        if isinstance(node, ast.Name):
            if node.id not in self.values:
                raise self.refuse(node, f"{node.id} is no argument, and has no value before")
            return self.values[node.id]
        parts: Sequence[ast.expr]
        if isinstance(node, ast.BinOp) and type(node.op) in SIGNS:
            operation, parts = SIGNS[type(node.op)], (node.left, node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            operation, parts = "-", (node.operand,)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
            operation, parts = node.func.id, node.args
            if not is_word(operation):
                raise self.refuse(node, f"{operation} is none of the words {', '.join(WORDS)}")
            if len(parts) != count_of(operation):
                raise self.refuse(node, f"{operation} takes {count_of(operation)} values")
        elif isinstance(node, ast.Constant):
            raise self.refuse(node, "the literal would widen float32; take a unit parameter")
        else:
            raise self.refuse(node, f"a text is made of + - * and the words {', '.join(WORDS)}")
        return self.line(node, operation, tuple(self.value(part) for part in parts), name)

    def line(
        self, node: ast.expr, operation: str, operands: tuple[str, ...], name: str | None = None
    ) -> str:
        """The value of an operation, under ``name`` where it has one."""
        name = name or fresh("t", self.used)
        self.lines.append(Line(name, operation, operands))
        return name


def is_docstring(line: ast.stmt) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant)


def fresh(stem: str, used: set[str]) -> str:
    """A name that is not used yet."""
    name = next(n for k in range(len(used) + 1) if (n := f"{stem}{k}") not in used)
    used.add(name)
    return name
