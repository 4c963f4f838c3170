"""What a cell declares, so that every backend can be generic over it.

A cell's equations are texts (:mod:`.text`). The names of a text's arguments say what they are:

========== ============================================================================
``a_g``     pre-activation of gate ``g``: input part plus recurrent part
``x_g``     the input part of gate ``g`` alone
``s_g``     the recurrent part of gate ``g`` alone (``s`` for state)
``c_prev``  the state ``c`` before the step;  ``c`` in a backward text: after the step
``u``       a parameter per hidden unit, if the cell lists it in ``unit_parameters``
``z``       a value that the step saved, or that an earlier phase returned
``nv``      the value ``v`` normalised over its row, if the phase lists it in ``normal``
``d...``    in a backward text: the gradient of the loss with respect to ``...``
========== ============================================================================

A declaration that a backend would misread is refused when it is made (:mod:`.check`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

from .check import check
from .derive import derived
from .text import Text, arguments


@dataclass(frozen=True)
class Phase:
    """One recurrent product and the pointwise text that follows it.

    The product multiplies ``operand`` by the rows of ``w_hh`` that belong to the gates which the
    forward text takes as ``a_g`` or ``s_g``; a text that takes neither has no product.

    forward, backward: the two texts. backward: None leaves it to the cell, which derives it from
        the forward text (:mod:`.derive`).
    returns, gradients: what each of them returns, by name. ``gradients`` has that of every argument
        of the forward text; those of the same name from several phases add up. It comes with the
        backward text, written or derived.
    operand: ``h_prev``, or a value returned by an earlier phase, whose gradient the backward text
        of that earlier phase then takes.
    normal: groups of values that are normalised together over a row; the forward text takes ``nv``
        for each ``v``, and the backward text gives ``dnv``.
    """

    forward: Text
    returns: tuple[str, ...]
    backward: Text | None = None
    gradients: tuple[str, ...] = ()
    operand: str = "h_prev"
    normal: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def takes(self) -> tuple[str, ...]:
        """What the forward text takes, a normalised value by the name that it has before."""
        grouped = {f"n{name}": name for group in self.normal for name in group}
        return tuple(grouped.get(name, name) for name in arguments(self.forward))

    @cached_property
    def takes_back(self) -> tuple[str, ...]:
        """What the backward text takes."""
        return () if self.backward is None else arguments(self.backward)


@dataclass(frozen=True)
class Cell:
    """A recurrent cell: its gates, states, phases, and what backward needs.

    name: as users write it, and by which backends keep their kernels.
    gates: in the order of the rows of ``w_ih``.
    states: the first is the hidden state ``h``, which recurrent products and the next layer read.
    saved: values kept from forward for backward, and those that one phase hands on to a later one.
        The first G are written over the input product, gate by gate: the k-th is a value that the
        phase of gate k returns, or a later one. Each further one has a buffer of its own. States
        other than ``h`` need not be listed: their value at every step is kept anyway.
    phases: in the order in which forward runs them; backward runs them in reverse.
    unit_parameters: names of parameters of shape (H,).
    scans: whether ``h = a h_prev + b`` with a and b of x alone, so that time may go in parallel.
    source: the paper.
    title: as users write it, where ``name`` has more.

    Raises ValueError for a declaration that a backend would misread.
    """

    name: str
    gates: tuple[str, ...]
    states: tuple[str, ...]
    saved: tuple[str, ...]
    phases: tuple[Phase, ...]
    source: str
    unit_parameters: tuple[str, ...] = ()
    scans: bool = False
    title: str = ""
    #: Why a backward text that was not written could not be derived; the eager form alone, which
    #: autograd sees through, runs such a cell.
    underived: str | None = field(default=None, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        check(self)
        if any(phase.backward is None for phase in self.phases):
            phases, why = derived(self)
            object.__setattr__(self, "phases", phases)
            object.__setattr__(self, "underived", why)
            check(self)

    @property
    def called(self) -> str:
        """What a user is told of."""
        return self.title or self.name

    @property
    def G(self) -> int:
        return len(self.gates)

    @cached_property
    def other_states(self) -> tuple[str, ...]:
        """The states but for ``h``."""
        return self.states[1:]

    @cached_property
    def extras(self) -> tuple[str, ...]:
        """Saved values beyond the first G, each with a buffer of its own."""
        return self.saved[self.G :]

    @cached_property
    def recurrent_gates(self) -> tuple[str, ...]:
        """The gates that own rows of ``w_hh``, in its order."""
        taken = {name for phase in self.phases for name in phase.takes}
        return tuple(g for g in self.gates if f"a_{g}" in taken or f"s_{g}" in taken)

    @cached_property
    def G_hh(self) -> int:
        return len(self.recurrent_gates)

    @cached_property
    def apart_gates(self) -> tuple[str, ...]:
        """The gates whose recurrent part enters apart from the input part (``s_g``)."""
        taken = {name for phase in self.phases for name in phase.takes}
        return tuple(g for g in self.gates if f"s_{g}" in taken)

    @cached_property
    def parts_differ(self) -> bool:
        """Whether the gates' recurrent parts have gradients of their own: some enter apart, or
        some gates have none."""
        own = self.recurrent_gates
        return bool(self.apart_gates) or bool(own and own != self.gates)

    @cached_property
    def handed_on(self) -> tuple[str, ...]:
        """What one phase returns and a later one takes or multiplies, but for states."""
        found: dict[str, None] = {}
        for k, phase in enumerate(self.phases):
            later = {n for p in self.phases[k + 1 :] for n in (*p.takes, p.operand)}
            found |= dict.fromkeys(n for n in phase.returns if n in later)
        return tuple(n for n in found if n not in self.states)

    @cached_property
    def reads_h(self) -> bool:
        """Whether a text takes ``h_prev`` itself, beside its product."""
        return any("h_prev" in phase.takes for phase in self.phases)

    @cached_property
    def taken_back(self) -> tuple[bool, ...]:
        """Of each state whether a backward text takes its value after the step."""
        taken = {name for phase in self.phases for name in phase.takes_back}
        return tuple(state in taken for state in self.states)

    @cached_property
    def can_project(self) -> bool:
        """Whether h may have another size than the gates: nothing pointwise meets h, and w_hh
        multiplies nothing else."""
        return not self.reads_h and all(phase.operand == "h_prev" for phase in self.phases)

    @property
    def unprojectable(self) -> str | None:
        """Why h may have no other size, in words."""
        if self.can_project:
            return None
        if self.reads_h:
            return f"{self.called} adds h_prev to gates of another size; it cannot be projected"
        return f"{self.called} multiplies values of the gates' size by w_hh; it cannot be projected"

    @cached_property
    def masks_h(self) -> bool:
        """Whether a product takes h, which may be masked."""
        return any(self.product_gates(p) and p.operand == "h_prev" for p in self.phases)

    def keeps_gates(self, projected: bool) -> bool:
        """Whether backward wants the saved values of the gates: of a cell whose one saved value is
        ``h`` it wants the output alone, which holds h where it is not projected."""
        return projected or self.saved != self.states[:1]

    def beyond(self, autograd: bool = False) -> str | None:
        """What the declaration has that no backend runs; None where there is nothing.

        autograd: of a backend whose derivatives are torch's, which wants no backward text.
        """
        if any(phase.normal for phase in self.phases):
            return f"{self.called} normalises values over a row, for which no backend has a loop"
        if not autograd and self.underived:
            return (
                f"{self.called} has no backward text, and none can be derived ({self.underived}); "
                "write one, or choose eager, which needs none"
            )
        return None

    def product_gates(self, phase: Phase) -> tuple[str, ...]:
        """The gates whose recurrent part the product of this phase gives."""
        return tuple(g for g in self.gates if f"a_{g}" in phase.takes or f"s_{g}" in phase.takes)

    def product_rows(self, phase: Phase) -> tuple[int, int]:
        """First and last+1 row block (in units of H) of ``w_hh`` that the phase multiplies.

        The gates of one phase stand side by side in ``w_hh``, so a product is one slice of it.
        """
        gates = self.product_gates(phase)
        if not gates:
            return (0, 0)
        first = self.recurrent_gates.index(gates[0])
        return (first, first + len(gates))

    @cached_property
    def products(self) -> tuple[Phase, ...]:
        """The phases that have a product, in the order of their rows of ``w_hh``."""
        found = [p for p in self.phases if self.product_gates(p)]
        return tuple(sorted(found, key=self.product_rows))
