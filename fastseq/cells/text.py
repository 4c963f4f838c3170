"""The texts of the equations: what they take, and what binds them to a backend's vocabulary.

A text is a plain function of one hidden unit at one time step, made of assignments, ``+ - *`` and
words of the vocabulary, which are its free names, with no literal numbers: Numba would widen
float32 with one. A number is a word that takes nothing, ``number_0_5()``. :func:`bind` gives the
words their meaning, so the same text runs on NumPy arrays, torch tensors, and inside Numba and
Triton kernels.
"""

from __future__ import annotations

import hashlib
import numbers
import re
import types
from collections.abc import Callable
from typing import Any

Text = Callable[..., Any]

#: What a text may call; every backend has all of them. The derivatives (``dsigmoid``, ...) take the
#: function's value, not its argument. But ``dmaximum(a, b)``, that of ``maximum(a, b)`` in a, takes
#: both, and is a half where they are equal, as torch's is.
WORDS = (
    *("sigmoid", "tanh", "relu", "exp", "reciprocal", "maximum", "logsigmoid", "sqrt"),
    *("dsigmoid", "dtanh", "drelu", "dmaximum", "dlogsigmoid", "dsqrt"),
)


def count_of(word: str) -> int:
    """How many values a word takes."""
    if number_of(word) is not None:
        return 0
    return 2 if word in ("maximum", "dmaximum") else 1


_NUMBER = re.compile(r"number_(m?)(\d+)(?:_(\d+))?(?:e(m?)(\d+))?")


def number_word(value: float) -> str:
    """The word that gives a number: ``number_0_5`` 0.5, ``number_m1em05`` -1e-05."""
    digits, _, power = repr(abs(float(value))).partition("e")
    exponent = f"e{power.replace('-', 'm').lstrip('+')}" if power else ""
    return f"number_{'m' if value < 0 else ''}{digits.replace('.', '_')}{exponent}"


def number_of(name: str) -> float | None:
    """The number that a word of this name gives; None for another name."""
    found = _NUMBER.fullmatch(name)
    if found is None:
        return None
    sign, whole, part, down, power = found.groups()
    value = float(f"{whole}.{part or 0}e{'-' if down else ''}{power or 0}")
    return -value if sign else value


def is_word(name: str) -> bool:
    """Whether every backend has it."""
    return name in WORDS or number_of(name) is not None


def _plain_number(value: float) -> Callable[[], float]:
    def number() -> float:
        return value

    return number


def arguments(text: Text) -> tuple[str, ...]:
    """The names of a text's arguments, in order."""
    code = text.__code__
    return code.co_varnames[: code.co_argcount]


def fingerprint(text: Text, vocabulary: dict[str, Any]) -> str:
    """A short hash of a text and of everything, however deep, that it is bound to.

    Line numbers and file names are left out. Objects that hold Python code (functions, and what
    Numba and Triton make of them) count by their code, all others by their ``repr``.
    """
    digest = hashlib.sha256()
    seen: set[int] = set()

    def add(value: Any) -> None:
        function = getattr(value, "py_func", value)
        function = getattr(function, "_defn", function)
        code = function if isinstance(function, types.CodeType) else None
        if code is None:
            code = getattr(function, "__code__", None)
        if code is None:
            if isinstance(value, types.ModuleType):
                digest.update(value.__name__.encode())
            elif isinstance(value, (str, numbers.Number, tuple, frozenset, type, type(None))):
                digest.update(repr(value).encode())
            else:
                digest.update(type(value).__qualname__.encode())
            return
        if id(function) in seen:
            return
        seen.add(id(function))
        digest.update(code.co_code)
        digest.update(repr((code.co_names, code.co_varnames)).encode())
        for constant in code.co_consts:
            add(constant)
        names = getattr(function, "__globals__", {})
        for name in code.co_names:
            if name in names:
                digest.update(name.encode())
                add(names[name])
        for cell in getattr(function, "__closure__", None) or ():
            add(cell.cell_contents)

    add(text.__code__)
    for name in sorted(vocabulary):
        digest.update(name.encode())
        add(vocabulary[name])
    return digest.hexdigest()[:16]


def bind(text: Text, label: str, /, **vocabulary: Any) -> Text:
    """The same text with its free names bound to ``vocabulary``.

    vocabulary: the words. ``number`` makes of a number the function that gives it; without one it
    is Python's.
    label: cell, backend and dtype. It becomes part of ``__qualname__`` together with a hash of all
    that is bound in, because Numba's disk cache keys on file, qualified name and bytecode but not
    on globals: without the hash a second vocabulary would run the first one's machine code.
    """
    maker = vocabulary.get("number", _plain_number)
    found = {name: number_of(name) for name in text.__code__.co_names}
    vocabulary |= {name: maker(value) for name, value in found.items() if value is not None}
    missing = [
        name
        for name in text.__code__.co_names
        if name not in vocabulary and name not in text.__globals__.get("__builtins__", {})
    ]
    if missing:
        raise ValueError(f"{text.__name__}: the vocabulary lacks {', '.join(missing)}")
    used = {name: vocabulary[name] for name in text.__code__.co_names if name in vocabulary}
    name = f"{text.__name__}_{label}_{fingerprint(text, used)}"
    bound = types.FunctionType(text.__code__, used, name)
    bound.__qualname__ = name
    bound.__module__ = text.__module__
    return bound
