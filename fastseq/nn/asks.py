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
    """(method, class) of each isinstance in the methods of ``kind`` that names one of ``layers``.

    torch's own classes are passed over. So are names that a call or a local variable stands for:
    an isinstance that is not found goes without a hint, and nothing else depends on it.
    """
    for owner in kind.__mro__:
        if owner is object or owner.__module__.startswith(("torch.", "fastseq.")):
            continue
        for name, value in vars(owner).items():
            for function in _functions(value):
                for found in _named(function.__code__, function.__globals__, layers):
                    yield f"{owner.__qualname__}.{name}", found


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


def _named(code: CodeType, names: dict[str, Any], layers: tuple[type, ...]) -> Iterator[type]:
    within, value = False, None
    for instruction in dis.get_instructions(code):
        operation, name = instruction.opname, instruction.argval
        if operation in ("LOAD_GLOBAL", "LOAD_NAME"):
            within |= name == "isinstance"
            value = names.get(name)
        elif operation in ("LOAD_ATTR", "LOAD_METHOD"):  # of modules alone: it runs no user's code
            value = vars(value).get(name) if isinstance(value, ModuleType) else None
        else:
            within &= not operation.startswith(_ENDS)
            value = None
        if within and isinstance(value, type) and value in layers:
            yield value
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _named(constant, names, layers)
