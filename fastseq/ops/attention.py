"""Attention of queries (B, U, A) over keys (B, S, A): scores, weights, contexts.

The scores of a query q and a key k, which are projected already, are

    additive    v . tanh(q + k)    with v (A,)
    dot         scale q . k
"""

from __future__ import annotations

import torch
from torch import Tensor


def scores(queries: Tensor, keys: Tensor, v: Tensor | None, scale: float = 1.0) -> Tensor:
    """(B, U, S): additive with ``v`` (A,), else the dot product times ``scale``."""
    if v is None:
        found = queries @ keys.transpose(1, 2)
        return found if scale == 1.0 else found * scale
    return torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1)) @ v


def masked_softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the last dimension, of the places where ``mask`` is true; zeros elsewhere, and where
    there is no place at all."""
    if mask is None:
        return scores.softmax(-1)
    # the least finite number, since a row of infinities alone would be NaN, and its gradient too
    least = torch.finfo(scores.dtype).min
    return scores.masked_fill(~mask, least).softmax(-1).masked_fill(~mask, 0.0)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    v: Tensor | None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Contexts (B, U, V) and weights (B, U, S) of values (B, S, V).

    mask: bool, of a shape that expands to (B, U, S), true where a query may look; or None.
    """
    weights = masked_softmax(scores(queries, keys, v, scale), mask)
    return weights.to(values.dtype) @ values, weights
