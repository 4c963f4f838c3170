"""Which declarations of a cell are refused: those that a backend would misread.

A name says what a value is and where it lives, so two meanings of one name, or a value that is
written where another is still to be read, would give wrong numbers in some backend and none in
another. Each text is run on plain numbers besides, which shows what it returns, and whether its
backward is its derivative: by the complex step, f(x + i e) = f(x) + i e f'(x), in which nothing
cancels.
"""

from __future__ import annotations

import cmath
import itertools
import keyword
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from .program import Unreadable, read
from .text import WORDS, Text, arguments, count_of, is_word, number_of

Cell: TypeAlias = Any  # of declaration.py, which imports this file
Phase: TypeAlias = Any


def check(cell: Cell) -> None:
    """Raise ValueError where a declaration is not sound: the cell, the fault, the remedy."""
    _names(cell)
    for phase in cell.phases:
        for text in (phase.forward, phase.backward):
            if text is not None:
                _form(cell, text)
        if phase.backward is None:
            _source(cell, phase.forward)
    _places(cell)
    for k, phase in enumerate(cell.phases):
        _forward(cell, k, phase)
        if phase.backward is None:
            _need(cell, not phase.gradients, "gradients", "names gradients without a backward text")
        else:
            _backward(cell, k, phase)
    _numbers(cell)


def _need(cell: Cell, holds: Any, what: str, fault: str) -> None:
    if not holds:
        raise ValueError(f"{cell.called}: {what} {fault}")


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [n for n in names if n in seen or seen.add(n)]  # type: ignore[func-returns-value]


# Names


def parts_of(cell: Cell) -> dict[str, str]:
    """Name of a gate's part -> the gate."""
    return {f"{part}_{gate}": gate for gate in cell.gates for part in "axs"}


def _names(cell: Cell) -> None:
    """Every name has one meaning."""
    plain = isinstance(cell.name, str) and cell.name.isidentifier()
    if not plain or keyword.iskeyword(cell.name):
        raise ValueError(f"{cell.name!r}: a cell's name is a Python identifier; choose another")
    listed = {
        "gates": cell.gates,
        "states": cell.states,
        "saved": cell.saved,
        "unit_parameters": cell.unit_parameters,
    }
    _need(cell, isinstance(cell.phases, tuple) and cell.phases, "phases", "is a tuple of Phases")
    for k, phase in enumerate(cell.phases):
        listed[f"returns of phase {k}"] = phase.returns
        listed[f"gradients of phase {k}"] = phase.gradients
        listed[f"normal of phase {k}"] = tuple(itertools.chain(*phase.normal))
    for what, names in listed.items():
        good = isinstance(names, tuple) and all(isinstance(n, str) for n in names)
        _need(cell, good, what, f"is a tuple of names, not {names!r}")
        bad = [n for n in names if not n.isidentifier() or keyword.iskeyword(n)]
        _need(cell, not bad, what, f"has {bad}, which no argument can be called; rename them")
        twice = _repeated(names)
        _need(cell, not twice, what, f"names {twice} twice; name each once")
    _need(cell, cell.gates, "gates", "is empty; a cell has at least one, with rows in w_ih")
    _need(
        cell,
        cell.states[:1] == ("h",),
        f"states {cell.states}",
        "must begin with 'h', the hidden state, which products and the next layer read",
    )
    _need(
        cell,
        len(cell.saved) >= cell.G,
        f"saved {cell.saved}",
        f"must name at least {cell.G} values, one to write over each gate's input product",
    )

    parts = parts_of(cell)
    before = [f"{state}_prev" for state in cell.states]
    values = dict.fromkeys(n for phase in cell.phases for n in phase.returns)
    own = [n for n in values if n not in cell.states and n not in parts]
    normal = [f"n{n}" for phase in cell.phases for group in phase.normal for n in group]
    every = [*parts, *before, *cell.states, *cell.unit_parameters, *own, *normal]
    twice = _repeated(every)
    _need(
        cell,
        not twice,
        f"{twice}",
        "would each mean two things, of a gate's part (a_g, x_g, s_g), a state, a state before the "
        "step, a unit parameter and a value; rename one",
    )
    words = [n for n in every if is_word(n)]
    _need(cell, not words, f"{words}", "are words of the vocabulary; rename the values")
    prev = [n for n in (*cell.gates, *every) if n.endswith("_prev") and n not in before]
    _need(cell, not prev, f"{prev}", "end in _prev, as states before the step alone do; rename")
    slopes = [n for n in every if n[0] == "d" and n[1:] in every]
    _need(
        cell,
        not slopes,
        f"{slopes}",
        f"would be read as gradients, of {[n[1:] for n in slopes]}; rename the values",
    )


# Texts


def _form(cell: Cell, text: Text) -> None:
    """A text is a plain function of positional arguments, and calls words alone."""
    _need(cell, isinstance(text, types.FunctionType), f"{text!r}", "is no Python function")
    what, code = f"{text.__name__}:", text.__code__
    _need(
        cell, what != "<lambda>:", what, "has no name by which kernels call it; write it as a def"
    )
    other = (
        text.__defaults__ or text.__kwdefaults__ or code.co_posonlyargcount
        or code.co_kwonlyargcount or code.co_flags & 0x2AC
    )  # fmt: skip
    _need(cell, not other, what, "takes plain positional arguments alone, without defaults")
    _need(
        cell,
        not code.co_freevars,
        what,
        f"reads {list(code.co_freevars)} of the function around it; take them as unit parameters",
    )
    unknown = [n for n in code.co_names if not is_word(n)]
    _need(
        cell,
        not unknown,
        what,
        f"uses {unknown}; a text is made of its arguments, + - * and the words {', '.join(WORDS)}",
    )


def _source(cell: Cell, text: Text) -> None:
    """The backward text is derived from the source: what no text may have is refused by line."""
    try:
        read(text)
    except Unreadable:
        pass
    except ValueError as error:
        raise ValueError(f"{cell.called}: {error}") from None


# Where values live


def _places(cell: Cell) -> None:
    """No value is written over another that is still to be read."""
    parts = parts_of(cell)
    of_gate: dict[str, int] = {}
    for gate in cell.gates:
        takers = [k for k, p in enumerate(cell.phases) if _taken_parts(cell, p, gate)]
        _need(
            cell,
            len(takers) == 1,
            f"gate {gate}",
            f"enters in phases {takers}; its parts are taken by one phase, which owns its rows",
        )
        taken = _taken_parts(cell, cell.phases[takers[0]], gate)
        _need(
            cell,
            taken in (["a"], ["x"], ["x", "s"]),
            f"gate {gate}",
            f"enters as {[f'{part}_{gate}' for part in taken]}; take a_{gate}, the sum, or "
            f"x_{gate}, or x_{gate} and s_{gate}",
        )
        of_gate[gate] = takers[0]

    made: dict[str, int] = {}
    for k, phase in enumerate(cell.phases):
        again = [n for n in phase.returns if n in made]
        _need(cell, not again, f"phase {k}", f"returns {again}, as an earlier phase does; rename")
        strange = [n for n in phase.returns if n in parts and n not in arguments(phase.forward)]
        _need(
            cell,
            not strange,
            f"phase {k}",
            f"returns {strange}, names of gates' parts that it does not take; rename",
        )
        made |= dict.fromkeys(phase.returns, k)
        gates = cell.product_gates(phase)
        first, last = cell.product_rows(phase)
        _need(
            cell,
            cell.recurrent_gates[first:last] == gates,
            f"gates {gates}",
            "of one phase must be neighbours in w_hh, of which a product is one slice; order gates "
            "by phases",
        )
        earlier = [n for n in made if n not in phase.returns and n not in cell.states]
        known = phase.operand == "h_prev" or phase.operand in earlier
        _need(
            cell,
            known and phase.operand not in parts,
            f"phase {k}",
            f"multiplies {phase.operand}; an operand is h_prev or a value of an earlier phase, "
            "other than a state",
        )
        _need(
            cell,
            gates or phase.operand == "h_prev",
            f"phase {k}",
            f"has the operand {phase.operand}, and takes no a_g or s_g that a product would give",
        )

    missing = [n for n in cell.states if n not in made]
    _need(cell, not missing, f"states {missing}", "are returned by no phase; return each once")
    _need(
        cell,
        made["h"] == len(cell.phases) - 1,
        "h",
        f"is returned by phase {made['h']}; the last phase returns it, since it ends the step",
    )
    for k, (name, gate) in enumerate(zip(cell.saved, cell.gates, strict=False)):
        _need(
            cell,
            name in made,
            f"saved[{k}], {name},",
            f"is written over the input product of gate {gate}, and returned by no phase; return "
            "it, or save it behind the gates' values",
        )
        _need(
            cell,
            made[name] >= of_gate[gate],
            f"saved[{k}], {name},",
            f"comes from phase {made[name]} and is written over the input product of gate {gate}, "
            f"which phase {of_gate[gate]} is still to read; order saved by the phases of the gates",
        )
    read = {n for phase in cell.phases for n in arguments(phase.forward)}
    lost = [n for n in cell.extras if n not in made and n not in read]
    _need(cell, not lost, f"saved {lost}", "are neither taken nor returned by a phase")
    kept = {f"{s}_prev" for s in cell.states} | set(cell.unit_parameters)
    spare = [n for n in cell.extras if n in kept]
    _need(cell, not spare, f"saved {spare}", "are there in backward anyway; save them not")
    unsaved = [n for n in cell.handed_on if n not in cell.saved]
    _need(
        cell,
        not unsaved,
        f"{unsaved}",
        "go from one phase to a later one, by way of what is saved; add them to saved",
    )
    idle = [u for u in cell.unit_parameters if u not in read]
    _need(cell, not idle, f"unit parameters {idle}", "are taken by no phase; list them not")


def _taken_parts(cell: Cell, phase: Phase, gate: str) -> list[str]:
    return [part for part in "axs" if f"{part}_{gate}" in phase.takes]


def _forward(cell: Cell, k: int, phase: Phase) -> None:
    what = f"{phase.forward.__name__}"
    replaced = {n for p in cell.phases[:k] for n in p.returns if n in cell.states}
    earlier = {n for p in cell.phases[:k] for n in p.returns}
    known = {*parts_of(cell), *(f"{s}_prev" for s in cell.states), *cell.unit_parameters, *earlier}
    unknown = [n for n in phase.takes if n not in known]
    _need(
        cell,
        not unknown,
        what,
        f"takes {unknown}, which are no gate's part (a_g, x_g, s_g), previous state, unit "
        "parameter or value of an earlier phase",
    )
    late = [f"{s}_prev" for s in replaced if f"{s}_prev" in phase.takes]
    _need(
        cell,
        not late,
        what,
        f"takes {late}, which an earlier phase has replaced; let the last phase that takes it "
        "return the state",
    )
    grouped = [n for group in phase.normal for n in group]
    loose = [n for n in grouped if f"n{n}" not in arguments(phase.forward)]
    _need(cell, not loose, what, f"normalises {loose} and does not take {[f'n{n}' for n in loose]}")


def incoming(cell: Cell, k: int) -> list[str]:
    """The values of phase k of which backward is given the gradient."""
    later = {n for p in cell.phases[k + 1 :] for n in (*p.takes, p.operand)}
    return [n for n in cell.phases[k].returns if n in cell.states or n in later]


def _backward(cell: Cell, k: int, phase: Phase) -> None:
    text = phase.backward
    assert text is not None
    what, takes = text.__name__, arguments(text)
    given = {f"d{n}" for n in incoming(cell, k)}
    kept = {*cell.saved, *cell.states, *cell.unit_parameters, *(f"{s}_prev" for s in cell.states)}
    kept |= {f"n{n}" for group in phase.normal for n in group}
    unknown = [n for n in takes if n not in given and n not in kept]
    _need(
        cell,
        not unknown,
        what,
        f"takes {unknown}, which are neither saved, nor a state, a unit parameter, or the gradient "
        f"of what {phase.forward.__name__} returns as a state or to a later phase",
    )
    dropped = sorted(given - set(takes))
    _need(cell, not dropped, what, f"does not take {dropped}: gradients that would be lost")
    wanted = [f"d{n}" for n in arguments(phase.forward)]
    _need(
        cell,
        sorted(wanted) == sorted(phase.gradients),
        what,
        f"gives {list(phase.gradients)}; the gradients of what {phase.forward.__name__} takes are "
        f"{wanted}",
    )


# Numbers


class _Number:
    """A number of a text that is run: its value, and how h_prev enters it (0: not at all, 1:
    linearly, 2: otherwise)."""

    __slots__ = ("degree", "value")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: complex, degree: int = 0) -> None:
        self.value, self.degree = complex(value), degree

    def __add__(self, other: Any) -> _Number:
        b = _number(other)
        return _Number(self.value + b.value, max(self.degree, b.degree))

    def __sub__(self, other: Any) -> _Number:
        b = _number(other)
        return _Number(self.value - b.value, max(self.degree, b.degree))

    def __mul__(self, other: Any) -> _Number:
        b = _number(other)
        return _Number(self.value * b.value, min(self.degree + b.degree, 2))

    def __neg__(self) -> _Number:
        return _Number(-self.value, self.degree)

    def __radd__(self, other: Any) -> _Number:
        return _number(other)

    __rsub__ = __rmul__ = __radd__

    def __bool__(self) -> bool:
        raise TypeError("a text has no branches")

    def __eq__(self, other: object) -> bool:
        raise TypeError("a text has no comparisons")


def _number(value: Any) -> _Number:
    if not isinstance(value, _Number):
        raise TypeError(f"the literal {value!r} would widen float32; take a unit parameter")
    return value


#: A word, of complex numbers.
MEANING: dict[str, Callable[..., complex]] = {
    "sigmoid": lambda x: 1 / (1 + cmath.exp(-x)),
    "tanh": cmath.tanh,
    "relu": lambda x: x if x.real > 0 else 0j,
    "exp": cmath.exp,
    "reciprocal": lambda x: 1 / x,
    "maximum": lambda a, b: a if a.real >= b.real else b,
    "logsigmoid": lambda x: -cmath.log(1 + cmath.exp(-x)),
    "sqrt": lambda x: cmath.sqrt(x) if x.real > 0 else complex(cmath.nan),
    "dsigmoid": lambda y: y * (1 - y),
    "dtanh": lambda y: 1 - y * y,
    "drelu": lambda y: complex(y.real > 0),
    "dmaximum": lambda a, b: complex(0.5 * (a.real > b.real) + 0.5 * (a.real >= b.real)),
    "dlogsigmoid": lambda y: 1 - cmath.exp(y),
    "dsqrt": lambda y: 0.5 / y,
}
_STEP = 1e-30


def _word(name: str) -> Callable[..., _Number]:
    number, count = number_of(name), count_of(name)
    meaning = MEANING[name] if number is None else lambda: complex(number)

    def call(*given: Any) -> _Number:
        if len(given) != count:
            raise TypeError(f"{name} takes {count} values, not {len(given)}")
        numbers = [_number(x) for x in given]
        try:
            value = meaning(*(x.value for x in numbers))
        except ArithmeticError:  # there is none
            value = complex(cmath.nan)
        return _Number(value, 2 if any(x.degree for x in numbers) else 0)

    return call


_VOCABULARY: dict[str, Any] = {"__builtins__": {}} | {name: _word(name) for name in WORDS}


def _run(
    cell: Cell, text: Text, names: tuple[str, ...], given: Mapping[str, _Number]
) -> dict[str, _Number]:
    """What a text returns, by the names that the declaration gives it."""
    what, code = f"{text.__name__}:", text.__code__
    meaning = _VOCABULARY | {n: _word(n) for n in code.co_names if number_of(n) is not None}
    try:
        results = types.FunctionType(code, meaning)(*(given[n] for n in arguments(text)))
    except (TypeError, AttributeError, NameError) as error:
        raise ValueError(
            f"{cell.called}: {what} {error}; a text is made of assignments, + - * and words"
        ) from None
    plain = isinstance(results, tuple) and all(isinstance(r, _Number) for r in results)
    _need(cell, plain, what, f"must return a tuple of values, not {results!r}")
    _need(
        cell,
        len(results) == len(names),
        what,
        f"returns {len(results)} values, and the declaration names {len(names)}: {list(names)}",
    )
    return dict(zip(names, results, strict=True))


def _numbers(cell: Cell) -> None:
    """The texts return what the declaration says, and each backward is its forward's derivative."""
    linear = not cell.recurrent_gates and len(cell.phases) == 1 and cell.states == ("h",)
    points = 0
    for seed in range(16):
        # spread over (-0.8, 0.8) by the golden section
        draw = (((0.45 * seed + 0.618 * k) % 1) * 1.6 - 0.8 for k in itertools.count(1))
        known: dict[str, complex] = {}
        slopes = []
        for phase in cell.phases:
            known |= {n: next(draw) for n in arguments(phase.forward) if n not in known}
            numbers = {n: _Number(known[n], n == "h_prev") for n in known}
            found = _run(cell, phase.forward, phase.returns, numbers)
            same = [n for n in phase.returns if n in known and found[n] is not numbers.get(n)]
            _need(
                cell,
                not same,
                phase.forward.__name__,
                f"returns another value as {same} than it takes; rename it",
            )
            linear = linear and max(v.degree for v in found.values()) < 2
            slopes.append(_slopes(cell, phase, known))
            known |= {n: v.value for n, v in found.items()}
        known |= {f"{s}_prev": next(draw) for s in cell.states if f"{s}_prev" not in known}
        if not all(map(cmath.isfinite, known.values())):
            continue  # outside of what a word is defined for: another point
        for k, phase in enumerate(cell.phases):
            if phase.backward is not None:
                d = {f"d{n}": next(draw) for n in incoming(cell, k)}
                _is_the_derivative(cell, phase, known, d, slopes[k])
        points += 1
        if points == 2:
            break
    _need(
        cell,
        linear or not cell.scans,
        "scans",
        "is set, and the text is not h = a h_prev + b with a and b of x alone; leave it out",
    )


def _slopes(cell: Cell, phase: Phase, known: dict[str, complex]) -> dict[str, dict[str, float]]:
    """Argument of the forward text -> returned value -> slope."""
    found = {}
    for name in arguments(phase.forward):
        numbers = {n: _Number(v + (1j * _STEP if n == name else 0)) for n, v in known.items()}
        results = _run(cell, phase.forward, phase.returns, numbers)
        found[name] = {n: r.value.imag / _STEP for n, r in results.items()}
    return found


def _is_the_derivative(
    cell: Cell,
    phase: Phase,
    known: dict[str, complex],
    d: dict[str, float],
    slopes: dict[str, dict[str, float]],
) -> None:
    assert phase.backward is not None
    numbers = {n: _Number(v) for n, v in (known | d).items()}
    found = _run(cell, phase.backward, phase.gradients, numbers)
    for name, slope in slopes.items():
        terms = [value * slope[n[1:]] for n, value in d.items()]
        got, size = found[f"d{name}"].value.real, 1 + sum(map(abs, terms))
        _need(
            cell,
            abs(got - sum(terms)) <= 1e-9 * size,
            phase.backward.__name__,
            f"gives d{name} = {got:.6g} where the derivative of {phase.forward.__name__} is "
            f"{sum(terms):.6g}",
        )
