"""Linear-chain conditional random fields: what a room for them is, and which one runs.

A *chain* scores every path y of tags through a sequence x,

    score(x, y) = start[y_0] + sum_t e_t[y_t] + sum_t transitions[y_{t-1}, y_t] + end[y_last]

and gives it the probability exp(score(x, y) - log Z(x)), where Z sums over all paths (Lafferty,
McCallum and Pereira 2001). A room walks the recursion over time

    u_0(j) = start(j) + e_0(j)
    u_t(j) = e_t(j) + log s_t(j),  s_t(j) = sum_i exp(u_{t-1}(i) - m_{t-1}) exp(transitions(i, j))
    m_t    = max_j u_t(j)
    log Z  = sum of m_t before the last step + log sum_j exp(u_last(j) + end(j))

whose numbers stay small however long the sequence is, and back, with p_t the probabilities of the
tags at step t, first p_last = softmax(u_last + end):

    r_t(j)     = p_t(j) / s_t(j)
    w_t(i, j)  = exp(u_{t-1}(i) - m_{t-1}) exp(transitions(i, j)) r_t(j)    of both tags
    p_{t-1}(i) = sum_j w_t(i, j)

This is reverse mode applied to log Z: d log Z / d e_t = p_t, d log Z / d transitions = sum_t w_t.

A room is a module with the functions of :class:`Room`. It gets raw tensors: float32 or float64, all
of one type and on one device, checked by :mod:`fastseq.ops.crf`. Scores may be -inf, for what is
forbidden. Rooms write to nothing that they are given.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Chain(NamedTuple):
    """The scores of B sequences. T and B may be 0; K is at least 1.

    emissions: (T, B, K), of any strides.
    lengths: (B,) int64 from 0 to T, on the device of emissions; None: all are T.
    start, end: (K,).
    transitions: (K, K), from a tag (row) to the next (column).
    """

    emissions: Tensor
    lengths: Tensor | None
    start: Tensor
    end: Tensor
    transitions: Tensor


class Room(Protocol):
    """The functions of a room. What is beyond a sequence's length is never read from tags or
    emissions (it may be NaN), and is zero in gradients."""

    def unavailable(self) -> str | None:
        """Why it cannot run on this machine, with the remedy."""

    def supports(self, dtype: torch.dtype, device: str, K: int) -> str | None:
        """Why it does not run such chains."""

    def forward(
        self, chain: Chain, tags: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """(value, u). value (B,): log Z, or with tags (T, B) int64 score(x, tags) - log Z; 0 for a
        sequence of length 0. u, where ``save``: (T, B, K) in the type of emissions, what backward
        reads of each step; its numbers are the room's own, and of any value beyond the lengths.
        """

    def backward(
        self,
        chain: Chain,
        tags: Tensor | None,
        u: Tensor,
        dvalue: Tensor,
        wants_parameters: bool,
    ) -> tuple[Tensor, ...]:
        """The gradients of emissions (T, B, K), and where they are wanted of start, end and
        transitions. dvalue: (B,)."""

    def viterbi(self, chain: Chain, n: int) -> tuple[Tensor, Tensor]:
        """(scores (B, n), tags (B, n, T) int64): the n best paths, the best first. Tags are -1
        beyond the length. Where there are fewer paths (of a score above -inf), the scores that are
        left are -inf, and their tags -1. A sequence of length 0 has one path, of score 0, and one
        that reads a NaN has one, of score NaN, whose tags are 0. Of paths of one score any may be
        first."""


#: Steps after which the rooms of Python put right what drifts or grows with time: the greatest of a
#: step's numbers is taken off, before float32 loses the rest, and probabilities sum up to 1 again.
OFTEN = 16

#: The rooms, and what each is.
ROOMS = {
    "native": "fused loops over time for CPU, in C++",
    "numba": "fused loops over time for CPU, no compiler needed",
    "triton": "fused loops over time for GPUs",
    "eager": "torch operations step by step, every device and transform",
}
#: The room whose forward autograd sees through.
DIFFERENTIABLE = "eager"
#: By the kind of device, in which order a call that names none takes them.
ORDER = {"cpu": ("native", "numba", "eager")}
ELSEWHERE = ("eager",)  # triton runs where it is named: it was not yet measured on a GPU


@cache
def load(name: str) -> Any:
    """The room, or why it cannot run here.

    Raises:
        ValueError: no room has this name.
    """
    if name not in ROOMS:
        raise ValueError(f"backend: expected one of {', '.join(ROOMS)}, got {name!r}")
    try:
        room = importlib.import_module(f"{__name__}.{name}")
    except ImportError as error:
        return str(error)
    return room.unavailable() or room


def as_order(backend: Any) -> str | tuple[str, ...] | None:
    """What a caller gives as ``backend``, checked: None, a name, or names in order.

    Raises:
        ValueError: there is no room of that name.
    """
    names = (backend,) if isinstance(backend, str) else backend
    for name in names or ():
        if name not in ROOMS:
            raise ValueError(f"backend: expected one of {', '.join(ROOMS)}, got {name!r}")
    return backend if backend is None or isinstance(backend, str) else tuple(backend)


def select(dtype: torch.dtype, device: str, K: int, backend: str | Sequence[str] | None) -> str:
    """The room that runs chains of K tags.

    Raises:
        RuntimeError: the room that was named is not available on this machine.
        NotImplementedError: it does not run such chains.
    """
    return _select(dtype, device, K, backend)


# for Dynamo a constant, as backends.choice.select_constant
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _select(dtype: torch.dtype, device: str, K: int, backend: str | Sequence[str] | None) -> str:
    names = (backend,) if isinstance(backend, str) else backend
    reasons = {}
    for name in ORDER.get(device, ELSEWHERE) if names is None else names:
        room = load(name)
        if isinstance(room, str):
            reasons[name] = f"not available: {room}"
        elif (reason := room.supports(dtype, device, K)) is None:
            return name
        else:
            reasons[name] = reason
    error = (
        RuntimeError
        if all(reason.startswith("not available") for reason in reasons.values())
        else NotImplementedError
    )
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise error(f"backend={backend!r} cannot run this: {listed}. backend=None always runs.")
