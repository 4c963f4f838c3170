r"""Floor 1: the truth. Recurrences in NumPy float64, forward and backward through time.

A recurrence reads the input one step at a time and carries its states along (Elman 1990):

.. math::
    (h_t, c_t, ...) = \text{cell}(W_{ih} x_t + b_{ih},\; W_{hh} h_{t-1} + b_{hh},\;
        h_{t-1}, c_{t-1}, ...)

The cells are the LSTM (Hochreiter and Schmidhuber 1997), the GRU (Cho et al. 2014) and others from
:mod:`fastseq.cells`; a hidden state may be projected to fewer features, :math:`h_t = W_{hr} m_t`
(Sak et al. 2014). With ``reverse`` time runs backwards, and two such recurrences side by side make
a bidirectional layer (Schuster and Paliwal 1997). Gradients are backpropagation through time
(Werbos 1990).

Zoneout (Krueger et al. 2017) leaves some units of a state, or in expectation a part of each, as
they were before the step: :math:`s_t = d \odot s_{t-1} + (1 - d) \odot \tilde s_t`.

Sequences of different lengths are packed as in ``torch.nn.utils.rnn.PackedSequence``: sorted by
decreasing length, the rows of step 0 first, then those of step 1; ``batch_sizes[t]`` counts the
sequences that are still alive at step ``t``, so they are always a prefix of the batch.

Nothing here is fast. Everything here is checked against torch.nn in float64 to 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .cells import Cell, arguments, bind
from .cells.text import Text

Array = NDArray[np.float64]
#: d of a state: a row for each of the input's, one number for all, or None where nothing stays.
Stay = NDArray[np.bool_] | float | None


class Weights(NamedTuple):
    """The parameters of one recurrence; G_hh counts the gates that have a recurrent product."""

    w_ih: Array  # (G*H, I)
    w_hh: Array | None = None  # (G_hh*H, P)
    b_ih: Array | None = None  # (G*H,)
    b_hh: Array | None = None  # (G_hh*H,)
    w_hr: Array | None = None  # (P, H)
    units: tuple[Array, ...] = ()  # the cell's unit_parameters, (H,) each


@dataclass
class Tape:
    """What forward keeps for backward: a row per packed row of the input."""

    values: dict[str, Array] = field(default_factory=dict)  # saved values and states, (N, H)
    operands: dict[str, Array] = field(default_factory=dict)  # what w_hh and w_hr multiplied
    previous: dict[str, Array] = field(default_factory=dict)  # states before each step
    after: dict[str, Array] = field(default_factory=dict)  # other states as the next step gets them
    reset: NDArray[np.bool_] | None = None


def sigmoid(x: Array) -> Array:
    # exp of a negative number alone: no overflow, full relative accuracy at both ends
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


VOCABULARY = {
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "relu": lambda x: np.where(x <= 0, 0.0, x),  # NaN passes, as in torch
    "exp": np.exp,
    "reciprocal": lambda x: 1 / x,
    "maximum": np.maximum,
    "logsigmoid": lambda x: np.minimum(x, 0.0) - np.log1p(np.exp(-np.abs(x))),
    "sqrt": np.sqrt,
    "dsigmoid": lambda y: y * (1 - y),
    "dtanh": lambda y: 1 - y * y,
    "drelu": lambda y: np.where(y <= 0, 0.0, 1.0),
    "dmaximum": lambda a, b: np.where(a < b, 0.0, np.where(a == b, 0.5, 1.0)),
    "dlogsigmoid": lambda y: -np.expm1(y),
    "dsqrt": lambda y: 0.5 / y,
}


@cache
def texts(cell: Cell) -> list[tuple[Text, Text]]:
    def bound(text: Text | None) -> Text:
        if text is None:
            raise NotImplementedError(cell.beyond())
        return bind(text, "reference", **VOCABULARY)

    return [(bound(phase.forward), bound(phase.backward)) for phase in cell.phases]


def steps(batch_sizes: NDArray[np.int64], reverse: bool) -> Iterator[slice]:
    """The packed rows of each time step, in the order in which the recurrence visits them."""
    ends = np.cumsum(batch_sizes)
    order = range(len(batch_sizes))
    for t in reversed(order) if reverse else order:
        yield slice(int(ends[t] - batch_sizes[t]), int(ends[t]))


def _rows(stay: Stay, rows: slice) -> Stay:
    return stay[rows] if isinstance(stay, np.ndarray) else stay


def zoned(new: Array, old: Array, stay: Stay) -> Array:
    """d s_{t-1} + (1 - d) s_t; infinity does not reach a unit that it is not taken by."""
    if stay is None:
        return new
    if isinstance(stay, np.ndarray):
        return np.where(stay, old, new)
    return stay * old + (1 - stay) * new


def zoned_gradients(d: Array, stay: Stay) -> tuple[Array, Array]:
    """Of the new state and of the one before the step."""
    zero = np.zeros_like(d)
    return zoned(d, zero, stay), zoned(zero, d, stay)


def forward(
    cell: Cell,
    x: Array,
    batch_sizes: NDArray[np.int64],
    states: tuple[Array, ...],
    weights: Weights,
    reverse: bool = False,
    reset: NDArray[np.bool_] | None = None,
    h_mask: Array | None = None,
    stay: Sequence[Stay] = (),
) -> tuple[Array, tuple[Array, ...], Tape]:
    """One recurrence over packed rows.

    x: (N, I). batch_sizes: (T,). states: h_0 (B, P), then the others, (B, H) each.
    reset: (N,) or None; where it holds, the states that enter the row are zeroed.
    h_mask: (B, P) or None; multiplies h_{t-1} before its product.
    stay: empty, or of each state where it stays as it was before the step, (N, size) bool, the part
        of it that does, or None.

    Returns y (N, P), the final states, and the tape for :func:`backward`.
    """
    H = weights.w_ih.shape[0] // cell.G
    tape = Tape(reset=reset)

    def keep(where: dict[str, Array], name: str, rows: slice, value: Array) -> None:
        where.setdefault(name, np.zeros((len(x), value.shape[1])))[rows] = value

    with np.errstate(all="ignore"):  # infinities and NaN flow through
        gates = x @ weights.w_ih.T
        if weights.b_ih is not None:
            gates = gates + weights.b_ih
        carried = [np.array(state) for state in states]
        y = np.zeros((len(x), carried[0].shape[1]))

        for rows in steps(batch_sizes, reverse):
            B_t = rows.stop - rows.start
            now = {f"{s}_prev": carried[k][:B_t] for k, s in enumerate(cell.states)}
            if reset is not None:
                now = {name: np.where(reset[rows, None], 0.0, now[name]) for name in now}
            now |= dict(zip(cell.unit_parameters, weights.units, strict=True))
            for k, gate in enumerate(cell.gates):
                now[f"x_{gate}"] = gates[rows, k * H : (k + 1) * H]
            for name, value in now.items():
                if name.endswith("_prev"):
                    keep(tape.previous, name, rows, value)

            for phase, (text, _) in zip(cell.phases, texts(cell), strict=True):
                first, last = cell.product_rows(phase)
                if last and weights.w_hh is not None:
                    operand = now[phase.operand]
                    if h_mask is not None and phase.operand == "h_prev":
                        operand = operand * h_mask[:B_t]
                    keep(tape.operands, phase.operand, rows, operand)
                    product = operand @ weights.w_hh[first * H : last * H].T
                    if weights.b_hh is not None:
                        product = product + weights.b_hh[first * H : last * H]
                    for k, gate in enumerate(cell.product_gates(phase)):
                        now[f"s_{gate}"] = product[:, k * H : (k + 1) * H]
                        now[f"a_{gate}"] = now[f"x_{gate}"] + now[f"s_{gate}"]
                results = text(*(now[name] for name in arguments(phase.forward)))
                now |= dict(zip(phase.returns, results, strict=True))

            for name in (*cell.saved, *cell.states):
                keep(tape.values, name, rows, now[name])
            if weights.w_hr is not None:
                keep(tape.operands, "m", rows, now["h"])
                now["h"] = now["h"] @ weights.w_hr.T
            for k, state in enumerate(cell.states):
                if stay:
                    left = _rows(stay[k], rows)
                    now[state] = zoned(now[state], now[f"{state}_prev"], left)
                carried[k][:B_t] = now[state]
                if state != "h":
                    keep(tape.after, state, rows, now[state])
            y[rows] = now["h"]
    return y, tuple(carried), tape


class Gradients(NamedTuple):
    x: Array
    states: tuple[Array, ...]
    weights: Weights


def backward(
    cell: Cell,
    x: Array,
    batch_sizes: NDArray[np.int64],
    weights: Weights,
    tape: Tape,
    dy: Array,
    dstates: tuple[Array, ...],
    dtrajectory: dict[str, Array] | None = None,
    reverse: bool = False,
    h_mask: Array | None = None,
    stay: Sequence[Stay] = (),
) -> Gradients:
    """The gradients of one recurrence: backpropagation through time.

    dy: (N, P). dstates: the gradients of the final states.
    dtrajectory: the gradients of a state's value at every step, (N, H), by state name.
    reverse, h_mask, stay: as in :func:`forward`.
    """
    H = weights.w_ih.shape[0] // cell.G
    with np.errstate(all="ignore"):
        carried = [np.array(d) for d in dstates]
        dgates = np.zeros((len(x), cell.G * H))  # of the input part
        dproduct = np.zeros((len(x), cell.G_hh * H))  # of the recurrent part
        dunits = [np.zeros_like(u) for u in weights.units]
        dw_hr = None if weights.w_hr is None else np.zeros_like(weights.w_hr)

        handed_on = {*cell.states, *cell.handed_on}  # may have gradients from several phases
        for rows in reversed(list(steps(batch_sizes, reverse))):
            B_t = rows.stop - rows.start
            now = {name: value[rows] for name, value in tape.values.items()}
            now |= {name: value[rows] for name, value in tape.previous.items()}
            now |= dict(zip(cell.unit_parameters, weights.units, strict=True))
            d = {f"d{s}": carried[k][:B_t] for k, s in enumerate(cell.states)}
            d["dh"] = d["dh"] + dy[rows]
            for state, value in (dtrajectory or {}).items():
                d[f"d{state}"] = d[f"d{state}"] + value[rows]
            dprevious = {
                f"d{s}_prev": np.zeros_like(carried[k][:B_t]) for k, s in enumerate(cell.states)
            }
            for state, left in zip(cell.states, stay, strict=False):
                both = zoned_gradients(d[f"d{state}"], _rows(left, rows))
                d[f"d{state}"], dprevious[f"d{state}_prev"] = both
            if weights.w_hr is not None:
                dw_hr += d["dh"].T @ tape.operands["m"][rows]
                d["dh"] = d["dh"] @ weights.w_hr

            for phase, (_, text) in zip(reversed(cell.phases), reversed(texts(cell)), strict=True):
                results = text(*((now | d)[name] for name in arguments(text)))
                for name, value in zip(phase.gradients, results, strict=True):
                    if name in dprevious:
                        dprevious[name] = dprevious[name] + value
                    elif name[1:] in handed_on:
                        d[name] = d.get(name, 0) + value
                    else:
                        d[name] = value
                for k, gate in enumerate(cell.gates):
                    for part in (f"da_{gate}", f"dx_{gate}"):
                        if part in phase.gradients:
                            dgates[rows, k * H : (k + 1) * H] = d[part]
                for k, name in enumerate(cell.unit_parameters):
                    if f"d{name}" in phase.gradients:
                        dunits[k] = dunits[k] + d[f"d{name}"].sum(axis=0)
                first, last = cell.product_rows(phase)
                if last and weights.w_hh is not None:
                    parts = [
                        d[f"ds_{g}"] if f"ds_{g}" in phase.gradients else d[f"da_{g}"]
                        for g in cell.product_gates(phase)
                    ]
                    dproduct[rows, first * H : last * H] = np.concatenate(parts, axis=1)
                    doperand = np.concatenate(parts, axis=1) @ weights.w_hh[first * H : last * H]
                    if phase.operand == "h_prev":
                        if h_mask is not None:
                            doperand = doperand * h_mask[:B_t]
                        dprevious["dh_prev"] = dprevious["dh_prev"] + doperand
                    else:
                        d[f"d{phase.operand}"] = d.get(f"d{phase.operand}", 0) + doperand

            for k, state in enumerate(cell.states):
                value = dprevious[f"d{state}_prev"]
                if tape.reset is not None:
                    value = np.where(tape.reset[rows, None], 0.0, value)
                carried[k][:B_t] = value

        dw_hh = None if weights.w_hh is None else np.zeros_like(weights.w_hh)
        for phase in cell.phases:
            first, last = cell.product_rows(phase)
            if last and dw_hh is not None and phase.operand in tape.operands:
                block = slice(first * H, last * H)
                dw_hh[block] = dproduct[:, block].T @ tape.operands[phase.operand]
        dweights = Weights(
            w_ih=dgates.T @ x,
            w_hh=dw_hh,
            b_ih=None if weights.b_ih is None else dgates.sum(axis=0),
            b_hh=None if weights.b_hh is None else dproduct.sum(axis=0),
            w_hr=dw_hr,
            units=tuple(dunits),
        )
        return Gradients(dgates @ weights.w_ih, tuple(carried), dweights)
