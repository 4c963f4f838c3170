"""Where a model's own code asks ``isinstance(layer, nn.LSTM)``, read from its byte code."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from torch import nn

#: Where the arguments of a call to isinstance are over at the latest.
_ENDS = ("STORE_", "POP_JUMP", "JUMP", "RETURN", "YIELD", "POP_TOP")


def asked(kind: type[nn.Module], layers: tuple[type, ...]) -> Iterator[tuple[str, type]]:
    """(method, class) of each isinstance in the methods of ``kind`` that names one of ``layers``,
    and in the functions of the same package that a method names.

    torch's own classes are passed over. So are names that a call or a local variable stands for:
    an isinstance that is not found goes without a hint, and nothing else depends on it.
    """
    for owner in kind.__mro__:
        if owner is object or owner.__module__.startswith(("torch.", "fastseq.")):
            continue
        for name, value in vars(owner).items():
            for method in _functions(value):
                helpers: set[FunctionType] = set()
                found = list(_named(method, method.__code__, layers, helpers))
                for helper in helpers:
                    if _package(helper) == _package(method):
                        found += _named(helper, helper.__code__, layers, set())
                for layer in dict.fromkeys(found):
                    yield f"{owner.__qualname__}.{name}", layer


def _functions(value: Any) -> Iterator[FunctionType]:
    """What an attribute of a class runs, beneath its decorators."""
    if isinstance(value, property):
        inner = [value.fget, value.fset]
    else:
        inner = [getattr(value, "__func__", value)]
    for function in inner:
        if isinstance(function, FunctionType):
            found = inspect.unwrap(function)
            if isinstance(found, FunctionType):
                yield found


def _package(function: FunctionType) -> str:
    return function.__module__.partition(".")[0]


def _named(
    function: FunctionType, code: CodeType, layers: tuple[type, ...], helpers: set[FunctionType]
) -> Iterator[type]:
    """What an isinstance in ``code`` names; ``helpers`` gets the functions that the code names."""
    within, value = False, None
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            within |= name == "isinstance"
            value = function.__globals__.get(name)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):  # of modules alone: it runs no user's code
            value = vars(value).get(name) if isinstance(value, ModuleType) else None
        else:
            within &= not operation.startswith(_ENDS)
            continue
        if within:
            members = value if isinstance(value, tuple) else (value,)
            yield from (kind for kind in members if isinstance(kind, type) and kind in layers)
        if isinstance(value, FunctionType):
            helpers.add(value)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(function, constant, layers, helpers)
