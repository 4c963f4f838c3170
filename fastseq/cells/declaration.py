"""What a cell declares, so that every backend can be generic over it.

A cell's equations are *texts*: plain functions of one hidden unit at one time step, made of
assignments, ``+ - *`` and a small vocabulary of free names (``sigmoid``, ``tanh``, ``dtanh``, ...),
with no literal numbers. :func:`bind` gives the free names their meaning, so the same text runs on
NumPy arrays, torch tensors, and inside Numba and Triton kernels.

The names of a text's arguments say what they are:

========== ============================================================================
``a_g``     pre-activation of gate ``g``: input part plus recurrent part
``x_g``     the input part of gate ``g`` alone
``s_g``     the recurrent part of gate ``g`` alone (``s`` for state)
``c_prev``  the state ``c`` before the step;  ``c`` in a backward text: after the step
``u``       a parameter per hidden unit, if the cell lists it in ``unit_parameters``
``z``       a value that the step saved, or that an earlier phase returned
``d...``    in a backward text: the gradient of the loss with respect to ``...``
========== ============================================================================
"""

from __future__ import annotations

import hashlib
import numbers
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Text = Callable[..., Any]


def arguments(text: Text) -> tuple[str, ...]:
    """The names of a text's arguments, in order."""
    code = text.__code__
    return code.co_varnames[: code.co_argcount]


@dataclass(frozen=True)
class Phase:
    """One recurrent product and the pointwise text that follows it.

    The product multiplies ``operand`` by the rows of ``w_hh`` that belong to the gates which the
    forward text takes as ``a_g`` or ``s_g``; a text that takes neither has no product.

    forward, backward: the two texts.
    returns, gradients: what each of them returns, by name. ``gradients`` of the same name from
        several phases add up (``dh_prev``).
    operand: ``h_prev``, or a value returned by an earlier phase, whose gradient the backward text
        of that earlier phase then takes.
    """

    forward: Text
    returns: tuple[str, ...]
    backward: Text
    gradients: tuple[str, ...]
    operand: str = "h_prev"


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: its gates, states, phases, and what backward needs.

    name: as users write it.
    gates: in the order of the rows of ``w_ih``.
    states: the first is the hidden state ``h``, which recurrent products and the next layer read.
    saved: values kept from forward for backward. The first G are written over the input product,
        gate by gate; each further one has a buffer of its own. States other than ``h`` need not be
        listed: their value at every step is kept anyway.
    phases: in the order in which forward runs them; backward runs them in reverse.
    unit_parameters: names of parameters of shape (H,).
    source: the paper.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    phases: tuple[Phase, ...]
    source: str
    unit_parameters: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = {f"{state}_prev" for state in self.states} | set(self.unit_parameters)
        known |= {f"{part}_{gate}" for part in "axs" for gate in self.gates}
        for phase in self.phases:
            unknown = [name for name in arguments(phase.forward) if name not in known]
            if unknown or (phase.operand not in known):
                raise ValueError(
                    f"{self.name}: {phase.forward.__name__} takes {unknown or phase.operand}, "
                    "which is no gate part (a_g, x_g, s_g), previous state, unit parameter or "
                    "value of an earlier phase"
                )
            known |= set(phase.returns)
        missing = [name for name in (*self.states, *self.saved) if name not in known]
        if missing or len(self.saved) < len(self.gates):
            raise ValueError(
                f"{self.name}: saved {self.saved} must name at least {len(self.gates)} values that "
                f"the phases take or return, and every state must be returned; missing {missing}"
            )

    @property
    def G(self) -> int:
        return len(self.gates)

    @cached_property
    def recurrent_gates(self) -> tuple[str, ...]:
        """The gates that own rows of ``w_hh``, in its order."""
        taken = {name for phase in self.phases for name in arguments(phase.forward)}
        return tuple(g for g in self.gates if f"a_{g}" in taken or f"s_{g}" in taken)

    @cached_property
    def apart_gates(self) -> tuple[str, ...]:
        """The gates whose recurrent part enters apart from the input part (``s_g``)."""
        taken = {name for phase in self.phases for name in arguments(phase.forward)}
        return tuple(g for g in self.gates if f"s_{g}" in taken)

    @cached_property
    def extras(self) -> tuple[str, ...]:
        """Saved values beyond the first G, each with a buffer of its own."""
        return self.saved[self.G :]

    def product_gates(self, phase: Phase) -> tuple[str, ...]:
        """The gates whose recurrent part the product of this phase gives."""
        names = arguments(phase.forward)
        return tuple(g for g in self.gates if f"a_{g}" in names or f"s_{g}" in names)

    def product_rows(self, phase: Phase) -> tuple[int, int]:
        """First and last+1 row block (in units of H) of ``w_hh`` that the phase multiplies.

        The gates of one phase stand side by side in ``w_hh``, so a product is one slice of it.
        """
        gates = self.product_gates(phase)
        if not gates:
            return (0, 0)
        first = self.recurrent_gates.index(gates[0])
        if self.recurrent_gates[first : first + len(gates)] != gates:
            raise ValueError(f"{self.name}: gates {gates} of one phase must be neighbours in w_hh")
        return (first, first + len(gates))


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

    label: cell, backend and dtype. It becomes part of ``__qualname__`` together with a hash of all
    that is bound in, because Numba's disk cache keys on file, qualified name and bytecode but not
    on globals: without the hash a second vocabulary would run the first one's machine code.
    """
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
