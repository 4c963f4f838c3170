"""A cell of a user's own, from its forward equations alone.

The names of the arguments say what they are (:mod:`.declaration`), what is returned are the states,
and ``U_g(v)`` is the recurrent product of gate ``g`` with a value ``v`` of the same step. All else
that a declaration says is read off the equations: a phase begins at each such product, and what
backward needs, and cannot make again of what is kept anyway, is saved.
"""

from __future__ import annotations

import ast
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FunctionType

from .declaration import Cell, Phase
from .derive import SLOPES, compiled
from .equations import Equations, gate_of, is_number, unique
from .program import Line, Unreadable, definition, fresh, is_docstring
from .text import WORDS, Text


def own_cell(text: Text, source: str = "") -> Cell:
    """The cell of forward equations. Its name carries a hash of them, so that cells of one name and
    other equations never meet, in a process or among kernels that are kept on disk.

    Raises ValueError with the line and the reason for equations that are no cell's.
    """
    if not isinstance(text, FunctionType) or text.__name__ == "<lambda>":
        raise TypeError(f"cell: expected a function with the equations of a step, got {text!r}")
    try:
        function = definition(text)
    except Unreadable as reason:
        raise ValueError(f"{text.__name__}: {reason}") from None
    equations = Equations(text, function)
    equations.read()
    name = f"{text.__name__}_{_digest(function, source)}"
    return _Declaration(equations).cell(name, text.__name__, source)


def _digest(function: ast.FunctionDef, source: str) -> str:
    """A hash of the equations, whatever stands around them and in comments."""
    body = [line for line in function.body if not is_docstring(line)]
    written = [ast.unparse(function.args), *map(ast.unparse, body), source]
    return hashlib.sha256("\n".join(written).encode()).hexdigest()[:12]


@dataclass
class _Step:
    """A phase on its way. Values are named as in the equations; ``names`` has how the phase takes
    those that it does not make."""

    operand: str
    lines: list[Line] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    #: name -> value
    returns: dict[str, str] = field(default_factory=dict)

    def written(self, value: str) -> str:
        return self.names.get(value, value)

    def needs(self) -> list[str]:
        """The values of which backward makes the gradients of the phase's operands."""
        found = []
        for line in self.lines:
            if line.operation == "*":
                a, b = line.operands
                found += [other for mine, other in ((a, b), (b, a)) if not is_number(mine)]
            for mine, slope in zip(line.operands, SLOPES.get(line.operation, ()), strict=False):
                names = {"y": line.value, "a": line.operands[0], "b": line.operands[-1]}
                if not is_number(mine):
                    found += [value for n, value in names.items() if f"{{{n}}}" in slope]
        return [value for value in unique(found) if not is_number(value)]


class _Declaration:
    """Where each operation of the equations runs, and what goes from there to where."""

    def __init__(self, equations: Equations) -> None:
        self.equations = equations
        self.gates, self.arguments = equations.gates, list(equations.arguments)
        self.units = [n for n in self.arguments if not gate_of(n) and not n.endswith("_prev")]
        self.lines, self.states = equations.lines, equations.states
        self.products = dict(equations.products)
        self.parts = [n for n in self.arguments if gate_of(n)] + [f"s_{g}" for g in self.products]
        self.products |= {
            g: "h_prev" for g in self.gates if {f"a_{g}", f"s_{g}"} & set(self.arguments)
        }
        self._join_sums()
        self.made = {line.value: line for line in self.lines}
        self.handed: dict[str, str] = {}  # value -> its name from phase to phase
        self._place()
        self.steps = [_Step(operand) for operand in self.operands]
        self._fill()

    def _join_sums(self) -> None:
        """``x_g + s_g`` is ``a_g`` where neither enters otherwise: one gradient for both."""
        uses = Counter(value for line in self.lines for value in line.operands)
        uses.update([*self.states.values(), *self.products.values()])
        joined = {}
        for line in self.lines:
            gates = {gate_of(value) for value in line.operands if value in self.parts}
            if line.operation == "+" and len(gates) == 1:
                (gate,) = gates
                both = {f"x_{gate}", f"s_{gate}"}
                if set(line.operands) == both and all(uses[value] == 1 for value in both):
                    joined[line.value] = f"a_{gate}"
                    self.parts = [n for n in self.parts if n not in both] + [f"a_{gate}"]
        self.lines = [
            Line(one.value, one.operation, tuple(joined.get(v, v) for v in one.operands))
            for one in self.lines
            if one.value not in joined
        ]
        self.states = {name: joined.get(value, value) for name, value in self.states.items()}
        self.products = {gate: joined.get(value, value) for gate, value in self.products.items()}

    def _place(self) -> None:
        """The phase of each line, gate and state."""
        order = [*self.arguments, *(line.value for line in self.lines)]
        later = {v for v in self.products.values() if v != "h_prev"}
        self.operands = [
            "h_prev",
            *sorted(later, key=lambda v: order.index(v) if v in order else -1),
        ]
        self.of_gate = {g: self.operands.index(v) for g, v in self.products.items()}
        self.at: dict[str, int] = {}
        for line in self.lines:
            self.at[line.value] = max((self.when(v) for v in line.operands), default=0)
        for gate, value in self.products.items():
            if self.when(value) >= self.of_gate[gate] and value != "h_prev":
                raise self._refuse(
                    value,
                    f"the product of gate {gate} multiplies it, and x_{gate} enters it before",
                )
        for line in reversed(self.lines):
            self._put_off(line.value)
        for gate in self.gates:
            if gate not in self.of_gate:  # no product: where it enters first
                readers = [self.at[n.value] for n in self.lines if f"x_{gate}" in n.operands]
                passed_on = f"x_{gate}" in self.products.values()
                self.of_gate[gate] = 0 if passed_on else min(readers, default=0)
        last = len(self.operands) - 1
        self.ends = {}
        as_it_was = [v for v in self.states.values() if v.endswith("_prev")]
        for state, value in self.states.items():
            readers = [self.at[n.value] for n in self.lines if f"{state}_prev" in n.operands]
            readers += [last] if state == "h" or value in as_it_was else []
            readers += [last] if f"{state}_prev" in as_it_was else []
            self.ends[state] = max([self.when(value), *readers])
        own = [gate for gate in self.gates if gate in self.products]
        phases = [self.of_gate[gate] for gate in own]
        if len(unique(phases)) != sum(
            a != b for a, b in zip([None, *phases], phases, strict=False)
        ):
            raise ValueError(
                f"{self.equations.text.__name__}: gates {', '.join(own)} multiply "
                f"{', '.join(self.products[g] for g in own)}; order the arguments so that gates "
                "with one operand are neighbours, as their rows of w_hh are"
            )

    def _readers(self, value: str) -> list[str]:
        return [line.value for line in self.lines if value in line.operands]

    def _put_off(self, value: str) -> None:
        """Move a line to the phase that reads it, with those that it alone reads, where one value
        at most is handed on for it then, in the place of its own."""
        phase = min((self.at[v] for v in self._readers(value)), default=0)
        moved, taken = set[str](), set[str]()
        if phase > self.at[value] and self._moves(value, phase, moved, taken) and len(taken) <= 1:
            self.at |= dict.fromkeys(moved, phase)

    def _moves(self, value: str, phase: int, moved: set[str], taken: set[str]) -> bool:
        """Whether a value moves to a phase; what moves with it, and what is handed on for that."""
        there = {*self.states.values(), *self.products.values()}
        operands = self.made[value].operands
        if value in there or any(v in self.parts for v in operands):
            return False
        if any(self.at[v] < phase and v not in moved for v in self._readers(value)):
            return False
        moved.add(value)
        for operand in operands:
            early = operand in self.at and self.at[operand] < phase and operand not in there
            read = any(self.at[v] >= phase and v not in moved for v in self._readers(operand))
            if early and not read and not self._moves(operand, phase, moved, taken):
                taken.add(operand)
        return True

    def _refuse(self, value: str, why: str) -> ValueError:
        return self.equations.refuse(self.equations.nodes[value], why)

    def when(self, value: str) -> int:
        """The first phase in which a value is there."""
        if value in self.at:
            return self.at[value]
        gate = gate_of(value)
        return self.of_gate.get(gate, 0) if gate and value in self.parts else 0

    def _fill(self) -> None:
        """Lines, what they take of other phases, and what they return for others."""
        for line in self.lines:
            self.steps[self.at[line.value]].lines.append(line)
        for k, step in enumerate(self.steps):
            taken = [v for line in step.lines for v in line.operands]
            taken += [v for s, v in self.states.items() if self.ends[s] == k]
            for value in unique(taken):
                if not is_number(value) and self.at.get(value) != k:
                    step.names[value] = self._taken(value, k)
        for value in self.operands[1:]:
            self._hand_on(value)
        for value, name in self.handed.items():
            step = self.steps[self._home(value)]
            step.returns[name] = value
            if value not in self.at:
                step.names.setdefault(value, value)
        for state, value in self.states.items():
            self.steps[self.ends[state]].returns[state] = value

    def _home(self, value: str) -> int:
        """The phase that hands a value on."""
        gate = gate_of(value)
        return self.of_gate[gate] if gate and value in self.parts else self.when(value)

    def _taken(self, value: str, k: int) -> str:
        """The name under which phase k takes a value that it does not make."""
        if value in self.parts and self.of_gate[str(gate_of(value))] == k:
            return value
        if value not in self.at and value not in self.parts:  # states before, unit parameters
            return value
        for state, one in self.states.items():
            if one == value and self.ends[state] == self.at.get(value) and state != "h":
                return state
        return self._hand_on(value)

    def _hand_on(self, value: str) -> str:
        if value not in self.handed:
            plain = value in self.at and value not in self.states
            self.handed[value] = value if plain else fresh("v", self.equations.used)
        return self.handed[value]

    # Saving

    def _saved(self) -> tuple[str, ...]:
        """What is kept for backward; the first G are written over the input product."""
        wanted, spare, apart = [], [], []
        for k, step in enumerate(self.steps):
            at_hand = {v for v, name in step.names.items() if name not in self.parts}
            at_hand |= set(step.returns.values())
            needs = [v for v in step.needs() if v not in at_hand]
            words = [v for v in needs if v in self.at and self.made[v].operation in WORDS]
            others = [v for v in needs if v in self.at and v not in words]
            loose = [v for v in needs if v not in self.at]  # parts of gates
            apart += [(v, k) for v in loose]
            kept = [v for v in words if not self._made_of(v, at_hand, k)]
            at_hand |= {*kept, *loose}
            for value in others:
                if not self._made_of(value, at_hand, k):
                    kept.append(value)
                    at_hand.add(value)
            wanted += [(v, k) for v in kept]
            spare += [(v, k) for v in (*words, *others) if v not in kept]
        rank = {line.value: k for k, line in enumerate(self.lines)}
        pool = [(name, self._home(v), rank.get(v, -1)) for v, name in self.handed.items()]
        pool += [(v, k, rank[v]) for v, k in wanted]
        pool.sort(key=lambda one: one[1:])
        pads = [*spare, *apart, *((s, self.ends[s]) for s in self.states)]
        pads += [(v, k) for v, k in self.at.items() if v not in self.handed]
        pads += [(n, self.of_gate[str(gate_of(n))]) for n in self.parts]
        slots = self._slots(pool, pads)
        extras = [name for name, _, _ in pool if name not in slots]
        extras += [v for v, _ in apart if v not in slots]
        for value, k in [*wanted, *spare, *apart, *self.at.items(), *pads]:
            step = self.steps[k]
            if value in slots and value not in self.states:
                if value not in self.handed.values():
                    step.returns.setdefault(value, value)
                    if value not in self.at:
                        step.names.setdefault(value, value)
            elif value in extras and value in self.at:
                step.returns.setdefault(value, value)
        return (*slots, *extras)

    def _made_of(self, value: str, at_hand: set[str], k: int) -> bool:
        """Whether phase k can make a value again of what is there in backward."""
        if value in at_hand or is_number(value):
            return True
        if self.at.get(value) != k:
            return False
        return all(self._made_of(v, at_hand, k) for v in self.made[value].operands)

    def _slots(
        self, pool: Sequence[tuple[str, int, int]], pads: Sequence[tuple[str, int]]
    ) -> list[str]:
        """For each gate a value that its phase returns, or a later one; what must be kept first."""
        rest = list(pool)
        found: dict[str, str] = {}
        for gate in sorted(self.gates, key=lambda g: (self.of_gate[g], self.gates.index(g)))[::-1]:
            good = [one for one in rest if one[1] >= self.of_gate[gate]]
            if good:
                found[gate] = good[-1][0]
                rest.remove(good[-1])
                continue
            taken = {*found.values(), *(name for name, _, _ in pool)}
            found[gate] = next(
                name for name, k in pads if k >= self.of_gate[gate] and name not in taken
            )
        return [found[gate] for gate in self.gates]

    # Writing

    def cell(self, name: str, title: str, source: str) -> Cell:
        saved = self._saved()
        phases = []
        for k, step in enumerate(self.steps):
            label = title if len(self.steps) == 1 else f"{title}_{k}"
            text = compiled(f"{label}_forward", self._text(f"{label}_forward", step), __name__)
            operand = self.handed.get(step.operand, step.operand)
            phases.append(Phase(text, tuple(step.returns), operand=operand))
        units = tuple(self.units)
        gates, states = tuple(self.gates), tuple(self.states)
        made = Cell(name, gates, states, saved, tuple(phases), source, units, title=title)
        if made.underived:
            raise ValueError(f"{title}: no backward text can be derived: {made.underived}")
        return made

    def _text(self, name: str, step: _Step) -> str:
        order = [f"{part}_{gate}" for gate in self.gates for part in "axs"]
        takes = unique(step.names.values())
        takes.sort(key=lambda n: order.index(n) if n in order else len(order))
        values = [step.written(v) for v in step.returns.values()]
        lines = [f"{line.value} = {self._right(line, step)}" for line in self._shown(step)]
        lines.append(f"return {', '.join(values)}{',' if len(values) == 1 else ''}")
        return f"def {name}({', '.join(takes)}):\n" + "".join(f"    {line}\n" for line in lines)

    def _once(self, value: str, step: _Step) -> bool:
        """Whether a value without a name stands in one place alone."""
        uses = sum(line.operands.count(value) for line in step.lines)
        named = value in self.equations.named or value in step.returns.values()
        return (
            self.at.get(value) is not None and value not in step.names and not named and uses == 1
        )

    def _shown(self, step: _Step) -> list[Line]:
        return [line for line in step.lines if not self._once(line.value, step)]

    def _right(self, line: Line, step: _Step) -> str:
        def operand(value: str) -> str:
            if not self._once(value, step):
                return step.written(value)
            inner = self.made[value]
            text = self._right(inner, step)
            atom = inner.operation in WORDS or line.operation in WORDS
            return text if atom else f"({text})"

        return line.written([operand(value) for value in line.operands])
