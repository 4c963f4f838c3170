"""The contract of a backend: what a call is made of, and what it gives back.

:class:`Implementation` is what a backend's module has, and :func:`fault` holds a module to it when
it is loaded. Forward and backward neither write to what they are given nor return views of it;
backward, called twice with the same arguments, gives the same bits.

A backend may also run a whole stack, all layers in one call: :class:`WholeStacks`; single steps on
packed weights: :class:`Streams`; draw masks: :class:`Draws`; have kernels of attention:
:class:`Attends`; and say how it runs a problem: :class:`Explains`.

Rows. ``x`` is ``(T, B, I)`` with ``batch_sizes=None``, or packed ``(N', I)`` with ``batch_sizes``
as in ``PackedSequence``: sequences sorted by decreasing length, the rows of one step side by side.
``N' >= N = sum(batch_sizes)``; rows from N on are padding, which is never read; their outputs and
gradients are zero. The batch of the states may be larger than ``batch_sizes[0]``: the sequences
beyond it are empty, and keep their state.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..cells import CELLS, Cell

Memory = Literal["full", "lean"]
#: What runs a call: plain code, a graph that is compiled, torch.jit's tracer, torch.func, or
#: forward-mode AD.
Mode = Literal["plain", "compile", "trace", "transform", "dual"]
Shape = tuple[int, ...]
#: (shape, dtype) of each tensor that is saved; a size of None is known when the kernel has run.
Layout = list[tuple[tuple[int | None, ...], torch.dtype]]
Backend = str | tuple[str, ...] | None

#: How a dense x is laid out: (T, B, I) or (T, I); (B, T, I); (B, I), one step of a cell.
TIME_FIRST, BATCH_FIRST, ONE_STEP = range(3)


class Request(NamedTuple):
    """What a caller asks for, besides tensors: layers x directions of one cell.

    dropout: what torch.dropout does between the layers of this call, 0 where it does nothing.
    trajectory: whether the states other than h are wanted at every step, of the last layer.
    editable: whether the caller may edit y in place before backward: torch.nn's LSTM has no such
        output, all else has.
    """

    cell: str
    layers: int = 1
    directions: int = 1
    biased: bool = True
    projected: bool = False
    order: int = TIME_FIRST
    deterministic: bool = False
    dropout: float = 0  # no 0.0: a float that Dynamo reads makes it trace twice
    training: bool = False
    trajectory: bool = False
    memory: Memory = "full"
    backend: Backend = None
    editable: bool = True

    @property
    def definition(self) -> Cell:
        return CELLS[self.cell]

    @property
    def per_recurrence(self) -> int:
        """How many tensors a recurrence's weights are."""
        units = len(CELLS[self.cell].unit_parameters)
        recurrent = bool(CELLS[self.cell].recurrent_gates)
        return (1 + recurrent) * (1 + self.biased) + self.projected + units


class Problem(NamedTuple):
    """What the choice of a backend may depend on. No tensors: it is hashable and testable.

    ``T`` is the longest sequence and ``B`` the batch. While a graph is traced both are None, so
    that no choice can depend on them; torch.compile knows no size at all. ``single`` is a step of a
    module that makes one. ``input_product`` says that x is the input product already, ``heads`` how
    many blocks on its diagonal w_hh has, ``zoneout`` the rates of the states, or none.
    ``capability`` is that of the CUDA device at hand, '9.0' say, in which the devices of one
    process may differ; ``tf32`` says whether torch multiplies float32 in TF32 there, and
    ``recording`` whether a ragged call is recorded into a CUDA graph.
    """

    cell: str
    dtype: torch.dtype
    device: str
    T: int | None
    B: int | None
    I: int | None  # noqa: E741  (the field's letter)
    H: int | None
    P: int | None
    R: int = 1
    layers: int = 1
    bias: bool = True
    projected: bool = False
    ragged: bool = False
    single: bool = False
    reset: bool = False
    h_mask: bool = False
    zoneout: tuple[float, ...] = ()
    input_product: bool = False
    heads: int = 1
    trajectory: bool = False
    memory: Memory = "full"
    deterministic: bool = False
    training: bool = False
    threads: int = 1
    mode: Mode = "plain"
    capability: str | None = None
    tf32: bool = False
    recording: bool = False


class Weights(NamedTuple):
    """The parameters of one recurrence; G_hh counts the gates that have a recurrent product."""

    w_ih: Any  # Tensor (G*H, I), or None: x is the input product already
    w_hh: Tensor | None  # (G_hh*H, P), or (G_hh*H, P/heads): blocks on the diagonal
    b_ih: Tensor | None  # (G*H,)
    b_hh: Tensor | None  # (G_hh*H,)
    w_hr: Tensor | None  # (P, H)
    units: tuple[Tensor, ...] = ()  # the cell's unit_parameters, (H,) each

    def flat(self) -> list[Tensor | None]:
        return [self.w_ih, self.w_hh, self.b_ih, self.b_hh, self.w_hr, *self.units]

    def given(self) -> list[Tensor]:
        """Those that there are."""
        return [w for w in self.flat() if w is not None]

    def map(self, function: Callable[[Tensor], Tensor]) -> Weights:
        """The same of every tensor that is there."""
        first: list[Any] = [None if w is None else function(w) for w in self[:5]]
        return Weights._make([*first, tuple(function(u) for u in self.units)])


def weights_per_recurrence(cell: Cell) -> int:
    return 5 + len(cell.unit_parameters)


def unflatten(cell: Cell, flat: Sequence[Tensor | None]) -> list[Weights]:
    """The weights of R recurrences from one flat list (ops carry flat lists)."""
    size = weights_per_recurrence(cell)
    return [
        Weights(*flat[k : k + 5], tuple(flat[k + 5 : k + size]))  # type: ignore[arg-type, call-arg]
        for k in range(0, len(flat), size)
    ]


def ways(request: Request, weights: Sequence[Tensor]) -> list[Weights]:
    """The weights of each layer and direction, from those that there are, in one list."""
    size, recurrent = request.per_recurrence, bool(CELLS[request.cell].recurrent_gates)
    each = [weights[first : first + size] for first in range(0, len(weights), size)]
    if recurrent and request.biased and not request.projected:
        return [Weights(w[0], w[1], w[2], w[3], None, tuple(w[4:])) for w in each]
    found = []
    for way in each:
        rest = list(way)
        w_ih, w_hh = rest.pop(0), rest.pop(0) if recurrent else None
        b_ih = rest.pop(0) if request.biased else None
        b_hh = rest.pop(0) if request.biased and recurrent else None
        w_hr = rest.pop(0) if request.projected else None
        found.append(Weights(w_ih, w_hh, b_ih, b_hh, w_hr, tuple(rest)))
    return found


@dataclass
class Call:
    """One layer: R independent recurrences over one input.

    states: empty (zeros), or h_0 (R, B, P) and then each other state, (R, B, H).
    reverse: for each recurrence, whether time runs backwards.
    reset: (R, N') bool or None; where it holds, the states that enter the row are zeroed.
    h_mask: (R, B, P) or None; multiplies h_{t-1} before its product with w_hh.
    stay: empty, or for each state (R, N', size) bool, where it stays as it was before the step
        (zoneout), or None where it never does.
    part: empty, or for each state the part of it that stays, outside of training. One of the two
        is empty.
    deterministic: the bits of y, of the states and of their gradients and that of x depend on
        nothing but a sequence and the weights: not on the batch around it, nor on the threads.
    """

    cell: str
    x: Tensor
    batch_sizes: Tensor | None
    states: Sequence[Tensor]
    weights: list[Weights]
    reverse: tuple[bool, ...]
    reset: Tensor | None = None
    h_mask: Tensor | None = None
    memory: Memory = "full"
    deterministic: bool = False
    stay: Sequence[Tensor | None] = ()
    part: tuple[float, ...] = ()

    @property
    def definition(self) -> Cell:
        return CELLS[self.cell]

    @property
    def H(self) -> int:
        w_ih = self.weights[0].w_ih
        rows = self.x.shape[-1] if w_ih is None else w_ih.shape[0]
        return rows // self.definition.G

    @property
    def P(self) -> int:
        w_hr = self.weights[0].w_hr
        return self.H if w_hr is None else w_hr.shape[0]

    @property
    def B(self) -> int:
        if self.states:
            return self.states[0].shape[1]
        if self.batch_sizes is None:
            return self.x.shape[1]
        return int(self.batch_sizes[0]) if len(self.batch_sizes) else 0

    def zero_states(self) -> list[Tensor]:
        """The initial states where none were given."""
        R, B, others = len(self.weights), self.B, len(self.definition.states) - 1
        sizes = [self.P, *[self.H] * others]
        return [self.x.new_zeros((R, B, size)) for size in sizes]


@dataclass
class Result:
    """What forward gives.

    y: (..., R*P), rows as x. states: as in the call, after the last step.
    trajectory: if asked for, the states other than h at every step, (..., R*H) each.
    saved: if asked for, what the backend's own backward wants beyond these and the call.
    """

    y: Tensor
    states: list[Tensor]
    trajectory: list[Tensor]
    saved: list[Tensor]


@dataclass
class OutputGradients:
    """Gradients of a Result; None stands for zeros."""

    y: Tensor | None
    states: list[Tensor | None]
    trajectory: list[Tensor | None]


@dataclass
class Wanted:
    """Which gradients a caller needs. The rest is not computed."""

    x: bool
    states: bool
    weights: bool


@dataclass
class Gradients:
    """Gradients of a Call's tensors; None where not wanted or where the tensor is None."""

    x: Tensor | None
    states: list[Tensor] | None
    weights: list[Weights] | None


class Given(NamedTuple):
    """What a stack is given besides its input, states and weights.

    dropout: what torch's dropout keeps of the input of each layer but the first, as x lies; empty
        where there is none, or where the backend draws itself.
    input_masks: empty, or for each layer (B, size of its input), which multiplies its input at
        every step.
    reset, h_mask, stay, part: as in :class:`Call`; ``reset`` of one layer's recurrences, which is
        that of every layer, ``h_mask`` and ``stay`` of all layers * D.
    """

    dropout: Sequence[Tensor] = ()
    input_masks: Sequence[Tensor] = ()
    reset: Tensor | None = None
    h_mask: Tensor | None = None
    stay: Sequence[Tensor | None] = ()
    part: tuple[float, ...] = ()

    def taken(self) -> tuple[list[Tensor | None], tuple[Any, ...]]:
        """All tensors that there are, and what :func:`given_again` makes the same of them by."""
        tensors = [*self.dropout, *self.input_masks, *self.stay, self.reset, self.h_mask]
        return tensors, (len(self.dropout), len(self.input_masks), self.part)


def given_again(tensors: Sequence[Any], by: tuple[Any, ...]) -> Given:
    """The same as :meth:`Given.taken` took apart."""
    a, b, part = by
    reset, h_mask = tensors[-2:]
    masks, stay = tensors[a : a + b], tensors[a + b : -2]
    return Given(tuple(tensors[:a]), tuple(masks), reset, h_mask, tuple(stay), part)


NOTHING = Given()


class Abilities(NamedTuple):
    """What a backend can do that not every one can; what it cannot is declined in its name.

    differentiable: autograd and torch.func see through ``forward``, so there is no ``backward``.
    deterministic: its bits depend neither on the batch around a sequence nor on the threads.
    zoneout: it takes a call's ``stay`` and ``part``. input_product, heads: as in :class:`Problem`.
    """

    differentiable: bool = False
    deterministic: bool = False
    zoneout: bool = False
    input_product: bool = False
    heads: bool = False


class Implementation(Protocol):
    """A backend: a module with these, or anything else that has them."""

    ABILITIES: Abilities

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, and the remedy."""

    def supports(self, problem: Problem) -> str | None:
        """Why it declines this problem, in words that a user can act on. What its abilities say
        already need not be said again."""

    def saved_layout(self, call: Call, rows: Shape, trajectory: bool) -> Layout:
        """What forward saves for backward. ``rows`` is the shape of x but for the last. It asks
        nothing of the machine: a graph can be traced for another one."""

    def forward(self, call: Call, save: bool, trajectory: bool) -> Result: ...

    def backward(
        self, call: Call, result: Result, grads: OutputGradients, wanted: Wanted
    ) -> Gradients: ...


class WholeStacks(Protocol):
    """Of a backend that runs all layers in one call, with dropout between them.

    ``layers`` returns y, time first, the final states (layers * D, B, ...), and what it saves; None
    where it does not take these tensors, and the layers are run one by one. ``x`` is laid out as
    ``request.order`` says, or packed. The states of ONE_STEP are (B, ...), all others
    (layers * D, B, ...), without B where x has none. ``weights`` are those of each layer and
    direction, without the Nones. Where ``request.trajectory`` is set, the last layer's other states
    at every step stand behind the final states, and so do their gradients.

    Without ``layers_backward`` autograd is torch's own.
    """

    def stacks(self, problem: Problem) -> bool:
        """Whether it runs the layers of a problem that it supports in one call."""

    def layers(
        self,
        request: Request,
        x: Tensor,
        batch_sizes: Tensor | None,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        given: Given,
        save: bool,
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None: ...

    def layers_backward(
        self,
        request: Request,
        x: Tensor,
        batch_sizes: Tensor | None,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        given: Given,
        y: Tensor,
        saved: Sequence[Tensor],
        dy: Tensor | None,
        dstates: Sequence[Tensor | None],
        wanted: Wanted,
    ) -> Sequence[Tensor | None]:
        """[dx, *dstates, *dweights], None where not wanted; no dweights where none is."""


class Streams(Protocol):
    """Of a backend that runs a stack step by step on packed weights: see nn/streaming.py.

    h: (layers, B, P), others: of each other state (layers, B, H); both are kept, and each step
    writes the next state there. A step returns ``out``, (B, P), with its output in it, or a new
    tensor; None, and nothing is written, where it does not take the tensors as they are.
    """

    def streams(self, problem: Problem) -> bool:
        """Whether it does so for a problem of one step."""

    def stream(
        self,
        request: Request,
        weights: Sequence[Tensor],
        h: Tensor,
        others: Sequence[Tensor],
    ) -> Any: ...

    def stream_step(
        self, stream: Any, x: Tensor, out: Tensor | None, threads: int
    ) -> Tensor | None: ...


class Draws(Protocol):
    """Of a backend that draws masks: see ops/masks.py, whose ``keep`` has the same bits."""

    def keep(
        self,
        seed: Tensor,
        sites: Sequence[int],
        ids: Tensor,
        steps: Tensor | None,
        units: int,
        threshold: int,
    ) -> Tensor | None:
        """(sites, rows, units) bool on the device of ``ids``: whether a unit's word is at least
        ``threshold``, up to 2^32, which no word is. None where it does not take these tensors.

        seed: int64 of no dimension, perhaps on the CPU where the others are not. sites: of 16 bits.
        ids, steps: (rows,) int64; without steps they are 0.
        """


class Attends(Protocol):
    """Of a backend with kernels of attention: ops/attention.py says what they compute.

    queries: (B, U, A), keys (B, S, A), values (B, S, V), dense, of one floating-point type. v (A,):
    the score is additive; None: it is a dot product times ``scale``, which is 1 with v. mask (B, S)
    bool, true where there is a key; what is elsewhere is not read. Where a sequence has one query,
    all that has a dimension U may lack it. Both write to what they are given and return True; or
    None, with nothing written, where they do not take the tensors as they are.
    """

    def attend(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        v: Tensor | None,
        mask: Tensor | None,
        scale: float,
        weights: Tensor,
        context: Tensor,
        threads: int,
    ) -> bool | None:
        """Write weights (B, U, S) and context (B, U, V), whose rows may stand apart."""

    def attend_backward(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        v: Tensor | None,
        mask: Tensor | None,
        scale: float,
        weights: Tensor,
        dcontext: Tensor,
        dweights: Tensor | None,
        dqueries: Tensor,
        dkeys: Tensor,
        dv: Tensor | None,
        threads: int,
    ) -> bool | None:
        """Write dqueries (B, U, A); add to dkeys (B, S, A) and to dv (B, A), that of each sequence.
        The gradient of values is weights^T dcontext."""


class Explains(Protocol):
    """Of a backend that tells :func:`fastseq.explain` how it will run a problem."""

    def explain(self, problem: Problem) -> str:
        """Of a problem that it supports: some lines, in which what was measured and what is
        modelled are told apart."""


def fault(module: Any) -> str | None:
    """What a backend has not that the contract asks for; None if it has all."""
    abilities = getattr(module, "ABILITIES", None)
    if not isinstance(abilities, Abilities):
        return f"ABILITIES: expected contract.Abilities, got {type(abilities).__name__}"
    asked: list[tuple[Any, str]] = [
        (Implementation, name) for name in ("unavailable", "supports", "forward")
    ]
    if not abilities.differentiable:
        asked += [(Implementation, "saved_layout"), (Implementation, "backward")]
    if hasattr(module, "layers"):
        asked += [(WholeStacks, "stacks"), (WholeStacks, "layers")]
    if hasattr(module, "layers_backward"):
        asked.append((WholeStacks, "layers_backward"))
    if hasattr(module, "stream"):
        asked += [(Streams, name) for name in ("streams", "stream", "stream_step")]
    if hasattr(module, "keep"):
        asked.append((Draws, "keep"))
    if hasattr(module, "attend"):
        asked += [(Attends, name) for name in ("attend", "attend_backward")]
    if hasattr(module, "explain"):
        asked.append((Explains, "explain"))
    for protocol, name in asked:
        function = getattr(module, name, None)
        if not callable(function):
            return f"it has no function {name}"
        expected = list(inspect.signature(getattr(protocol, name)).parameters)[1:]  # no self
        try:
            found = list(inspect.signature(function).parameters)
        except ValueError:  # written in C
            continue
        if found != expected:
            taken, asked_for = ", ".join(found), ", ".join(expected)
            return f"{name} takes ({taken}), the contract asks for ({asked_for})"
    return None
