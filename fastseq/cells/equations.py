"""The equations of a user's own cell, read from their source.

More may stand in them than in a text: numbers, ``/`` and ``U_g(v)``, the recurrent product of gate
``g`` with a value ``v`` of the same step. What no cell can have is refused by line and reason.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from typing import TypeVar

from .check import MEANING
from .program import Reader, is_docstring
from .text import WORDS, Text, is_word, number_of, number_word

_T = TypeVar("_T")

_ARITHMETIC = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}


def is_number(value: str) -> bool:
    """Whether an operand is a number."""
    return value.endswith("()")


def gate_of(name: str) -> str | None:
    """The gate whose part an argument of this name is."""
    kind, _, gate = name.partition("_")
    return gate if kind in ("a", "x", "s") and gate and not name.endswith("_prev") else None


def unique(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))


class Equations(Reader):
    """The equations as single operations. Numbers stand in them as operands, ``number_0_5()``."""

    def __init__(self, text: Text, function: ast.FunctionDef) -> None:
        super().__init__(text, function)
        self.arguments = {one.arg: one for one in function.args.args}
        self.states: dict[str, str] = {}  # name -> its value
        self.products: dict[str, str] = {}  # gate -> the value that U_g multiplies
        self.nodes: dict[str, ast.expr] = {}  # value -> where it stands
        self.known: dict[tuple[str, tuple[str, ...]], str] = {}
        self.named: set[str] = set()
        self.used |= {*self.arguments, *WORDS}
        self.used |= {f"{part}_{gate}" for gate in self.gates for part in "axs"}

    @property
    def gates(self) -> list[str]:
        """In the order of their first arguments."""
        return unique(gate for gate in map(gate_of, self.arguments) if gate)

    def read(self) -> None:
        self._arguments()
        body = [line for line in self.function.body if not is_docstring(line)]
        if not body or not isinstance(body[-1], ast.Return):
            last = body[-1] if body else self.function.body[-1]
            raise self.refuse(last, "the equations end with a return of the states, h first")
        for node in body[:-1]:
            self.assign(node)
        self._returned(body[-1])
        self._all_is_used()

    def _arguments(self) -> None:
        given = self.function.args
        first = next(iter(self.arguments.values()), None)
        if given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg or given.defaults:
            line = self.before + self.function.lineno
            raise ValueError(
                f"{self.text.__name__}, line {line}: ({ast.unparse(given)}): a cell takes plain "
                "positional arguments alone, without defaults"
            )
        for name, node in self.arguments.items():
            self._free(node, name)
        if first is None or not self.gates:
            raise ValueError(
                f"{self.text.__name__}, line {self.before + self.function.lineno}: no argument is "
                "a gate's; take a_g for each gate g, or x_g"
            )

    def _free(self, node: ast.stmt | ast.arg, name: str) -> None:
        if is_word(name):
            raise self.refuse(node, f"{name} is a word of the vocabulary; take another name")
        if name.startswith("U_"):
            raise self.refuse(node, f"{name} is a recurrent product; take another name")

    def assign(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.For, ast.While)):
            raise self.refuse(node, "a step has no loops; the loop over time is fastseq's")
        if isinstance(node, ast.If):
            raise self.refuse(node, "a step has no branches; relu and maximum choose")
        if isinstance(node, ast.AugAssign):
            raise self.refuse(node, "a name has one value; take another name")
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            self._free(node, name)
            if gate_of(name) in self.gates:
                raise self.refuse(node, f"{name} is a part of gate {gate_of(name)}; rename it")
            if name.endswith("_prev"):
                raise self.refuse(node, f"{name} is a state before the step; rename it")
            self.named.add(name)
        super().assign(node)

    def value(self, node: ast.expr, name: str | None = None) -> str:
        number = self.number(node)
        if number is not None:
            return f"{number_word(number)}()"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            return self._quotient(node, name)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            raise self.refuse(node, "there are no powers; write the product")
        if isinstance(node, (ast.IfExp, ast.Compare, ast.BoolOp)):
            raise self.refuse(node, "a step has no branches; relu and maximum choose")
        if isinstance(node, ast.Subscript):
            raise self.refuse(node, "a unit sees no other unit; only products mix them")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id.startswith("U_"):
                return self._product(node, node.func.id.removeprefix("U_"))
        elif isinstance(node, ast.Name) and node.id not in self.values:
            raise self.refuse(node, self._unknown(node.id))
        return super().value(node, name)

    def _unknown(self, name: str) -> str:
        if is_word(name):
            return f"{name} is a word; call it"
        if name in self.text.__code__.co_freevars or name in self.text.__globals__:
            return (
                f"{name} is read from outside of the equations; write the number, or take a unit "
                "parameter"
            )
        return f"{name} is no argument, and has no value before"

    def number(self, node: ast.expr) -> float | None:
        """The number that an expression of numbers alone is."""
        if isinstance(node, ast.Constant):
            if isinstance(node.value, bool) or not isinstance(node.value, (int, float)):
                raise self.refuse(node, "a literal is a real number")
            return self._finite(node, node.value)
        if isinstance(node, ast.Name):
            value = self.values.get(node.id, "")
            return number_of(value.removesuffix("()")) if is_number(value) else None
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            found = self.number(node.operand)
            return None if found is None else -found
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = self.number(node.left), self.number(node.right)
            if left is None or right is None:
                return None
            if right == 0 and isinstance(node.op, ast.Div):
                raise self.refuse(node, "a division by zero")
            return self._finite(node, _ARITHMETIC[type(node.op)](left, right))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            given = [self.number(one) for one in node.args]
            if node.func.id in WORDS and None not in given:
                return self._finite(node, MEANING[node.func.id](*map(complex, given)).real)  # type: ignore[arg-type]
        return None

    def _finite(self, node: ast.expr, value: float) -> float:
        try:
            if math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
        raise self.refuse(node, "the number is not finite")

    def _quotient(self, node: ast.BinOp, name: str | None) -> str:
        below = self.number(node.right)
        if below == 0:
            raise self.refuse(node, "a division by zero")
        if below is not None:
            other = f"{number_word(1 / below)}()"
            return self.line(node, "*", (self.value(node.left), other), name)
        divisor = self.value(node.right)
        if self.number(node.left) == 1:
            return self.line(node, "reciprocal", (divisor,), name)
        above = self.value(node.left)
        return self.line(node, "*", (above, self.line(node, "reciprocal", (divisor,))), name)

    def _product(self, node: ast.Call, gate: str) -> str:
        """The recurrent part of a gate, which U_g(v) stands for."""
        if len(node.args) != 1 or node.keywords:
            raise self.refuse(node, f"U_{gate} takes one value")
        if gate not in self.gates or f"x_{gate}" not in self.arguments:
            raise self.refuse(node, f"U_{gate} is a product of gate {gate}; take x_{gate}")
        if f"s_{gate}" in self.arguments or f"a_{gate}" in self.arguments:
            raise self.refuse(node, f"gate {gate} has the product of h_prev; take x_{gate} alone")
        value = self.value(node.args[0])
        if is_number(value):
            raise self.refuse(node, "a product takes a value of each unit")
        if self.products.setdefault(gate, value) != value:
            raise self.refuse(
                node,
                f"gate {gate} has one product, of {self.products[gate]}; take another gate for "
                "another product",
            )
        return f"s_{gate}"

    def line(
        self, node: ast.expr, operation: str, operands: tuple[str, ...], name: str | None = None
    ) -> str:
        again = self.known.get((operation, operands))
        if again is not None:
            return again
        value = super().line(node, operation, operands, name)
        self.known[operation, operands] = value
        self.nodes[value] = node
        return value

    def _returned(self, last: ast.Return) -> None:
        given = last.value.elts if isinstance(last.value, ast.Tuple) else [last.value]
        for one in given:
            if not isinstance(one, ast.Name):
                raise self.refuse(last, "return the states by their names, h first")
            name = one.id
            if name in self.arguments or name not in self.values:
                raise self.refuse(last, f"{name} is no value of the step; assign each state a name")
            if name in self.states:
                raise self.refuse(last, f"{name} is returned twice")
            if is_number(self.values[name]):
                raise self.refuse(last, f"{name} is a number, and no state")
            self.states[name] = self.values[name]
        if next(iter(self.states), None) != "h":
            raise self.refuse(last, "the first state returned is h, which the next layer reads")
        for name in self.arguments:
            state = name.removesuffix("_prev")
            if state != name and state not in self.states:
                raise self.refuse(
                    last, f"{name} is a state before the step, and {state} is not returned"
                )

    def _all_is_used(self) -> None:
        """Every value and argument leads to a state."""
        made = {line.value: line for line in self.lines}
        alive: set[str] = set()
        waiting = [*self.states.values()]
        while waiting:
            value = waiting.pop()
            if value in alive:
                continue
            alive.add(value)
            waiting += made[value].operands if value in made else ()
            gate = gate_of(value)
            if value not in self.arguments and gate in self.products:
                waiting.append(self.products[gate])
        for line in self.lines:
            if line.value not in alive:
                raise self.refuse(
                    self.nodes[line.value], "leads to no state that is returned; take it out"
                )
        for name, node in self.arguments.items():
            if name not in alive:
                raise self.refuse(node, f"{name} leads to no state that is returned; take it out")
            if name.startswith("s_") and gate_of(name) and f"x{name[1:]}" not in self.arguments:
                raise self.refuse(
                    node, f"{name} is a part of gate {name[2:]}; take x{name[1:]}, too"
                )
