"""Flop formulas, for torch.utils.flop_counter.FlopCounterMode.

As torch's own they count products, 2 flops a multiply-add, and nothing pointwise. The eager form
and torch's composite loops count by themselves; what has to be told is our operators, and
oneDNN's, which torch counts as nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from ..cells import CELLS
from . import library  # noqa: F401  (defines the operators)


def _multiplies(weights: Iterable[Tensor | None]) -> int:
    """Multiply-adds of each matrix with one row."""
    return sum(w.shape[0] * w.shape[1] for w in weights if w is not None and w.dim() == 2)


def _rows(x: Tensor, batch_sizes: Tensor | None) -> int:
    """The steps of all sequences; with the padding where a graph is traced and no length known."""
    if batch_sizes is None or type(batch_sizes) is not Tensor:
        return prod(x.shape[:-1])
    return int(batch_sizes.sum())


def recurrence_flops(cell, backend, x, batch_sizes, states, weights, *rest, **unused) -> int:
    """2 N (G H (I + P) + P H) for each recurrence, the last term with a projection."""
    return 2 * _rows(x, batch_sizes) * _multiplies(weights)


def recurrence_backward_flops(
    cell,
    backend,
    x,
    batch_sizes,
    states,
    weights,
    reverse,
    reset,
    h_mask,
    stay,
    part,
    memory,
    deterministic,
    outputs,
    dy,
    dstates,
    dtrajectory,
    trajectory,
    wanted,
    **unused,
) -> int:
    """Twice the forward's if all is wanted; 'lean' makes the gates' products once more, but for a
    cell whose backward reads its output alone."""
    per = len(weights) // len(reverse)
    w_ih, w_hh, w_hr = (_multiplies(weights[k::per]) for k in (0, 1, 4))
    total = w_hh + w_hr  # through time, for any gradient
    if wanted[0]:
        total += w_ih
    if wanted[2]:
        total += w_ih + w_hh + w_hr
    definition = CELLS[cell]
    if memory == "lean" and definition.keeps_gates(bool(w_hr)):
        total += w_ih + w_hh
    return 2 * _rows(x, batch_sizes) * total


def onednn_flops(x, w_ih, w_hh, *rest, **unused) -> int:
    return 2 * _rows(x, None) * _multiplies([w_ih, w_hh])


def onednn_backward_flops(x, w_ih, w_hh, *rest, **unused) -> int:
    """oneDNN makes every gradient, wanted or not."""
    return 2 * onednn_flops(x, w_ih, w_hh)


FORMULAS: list[tuple[Any, Callable[..., int]]] = [
    (torch.ops.fastseq.recurrence, recurrence_flops),
    (torch.ops.fastseq.recurrence_backward, recurrence_backward_flops),
    (torch.ops.aten.mkldnn_rnn_layer, onednn_flops),
    (torch.ops.aten.mkldnn_rnn_layer_backward, onednn_backward_flops),
]
for _operator, _formula in FORMULAS:
    if _operator not in flop_registry:  # a later torch may have its own for oneDNN's
        register_flop_formula(_operator, get_raw=True)(_formula)
