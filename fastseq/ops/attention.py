"""Attention of queries (B, U, A) over keys (B, S, A): scores, weights, contexts.

The scores of a query q and a key k, which are projected already, are

    additive    v . tanh(q + k)    with v (A,)
    dot         scale q . k

Kernels make them, the softmax and the contexts in one go, and in backward the tanh again: of S30
B32 A256 V256 in float32 one query a sequence takes 0.19 ms on one core with AVX-512, and 0.24 ms
backward, where the tanh of torch's operations alone takes 0.8 ms and keeps (B, U, S, A). The dot
product of many queries is left to torch, whose products of matrices are faster.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from .autograd import gradients_again
from .modes import is_ordinary, is_plain, overridden

KERNELS = (torch.float32, torch.float64)


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


def seen_of(mask: Tensor | None, causal: bool, U: int, S: int, device: Any) -> Tensor | None:
    """Which keys a query sees, of a shape that expands to (B, U, S); None for all."""
    seen = None if mask is None else mask.unsqueeze(1)
    if not causal:
        return seen
    before = torch.ones((U, S), dtype=torch.bool, device=device).tril()
    return before if seen is None else before & seen


def plain_attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    v: Tensor | None,
    scale: float = 1.0,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`attend` by torch's operations, on every device and in every mode."""
    seen = seen_of(mask, causal, queries.shape[1], keys.shape[1], queries.device)
    weights = masked_softmax(scores(queries, keys, v, scale), seen)
    return weights.to(values.dtype) @ values, weights


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    v: Tensor | None,
    scale: float = 1.0,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Contexts (B, U, V) and weights (B, U, S) of values (B, S, V).

    mask: (B, S) bool, true where there is a key; or None. causal: query u sees keys up to the u-th.
    scale: 1 where there is a v.
    """
    few = v is not None or queries.shape[1] == 1
    if few and not causal:
        backend = kernels_of(queries, keys, values, mask, v)
        if backend is not None:
            return AttendFunction.apply(backend, mask, scale, queries, keys, values, v)
    return plain_attend(queries, keys, values, mask, v, scale, causal)


def kernels_of(*tensors: Tensor | None) -> Any | None:
    """The backend whose kernels take these tensors; None where there is none."""
    if torch.compiler.is_compiling() or not is_plain() or overridden(tensors):
        return None
    there = [t for t in tensors if t is not None]
    first = there[0]
    kinds = {t.dtype for t in there if t.dtype is not torch.bool}
    if first.dtype not in KERNELS or len(kinds) > 1:
        return None
    if any(t.is_neg() or not t.numel() for t in there):
        return None
    return choice.attends(first.device.type)


class AttendFunction(torch.autograd.Function):
    """(backend, mask, scale, queries, keys, values, v) -> (contexts, weights)"""

    @staticmethod
    def forward(ctx: Any, backend: Any, mask: Any, scale: float, *tensors: Any) -> Any:
        queries, keys, values, v = map(_dense, tensors)
        B, U, S = *queries.shape[:2], keys.shape[1]
        context, weights = values.new_empty(B, U, values.shape[2]), values.new_empty(B, U, S)
        mask = None if mask is None else mask.contiguous()
        threads = torch.get_num_threads()
        _take(backend.attend(queries, keys, values, v, mask, scale, weights, context, threads))
        ctx.backend, ctx.scale = backend, scale
        ctx.save_for_backward(*tensors, mask, weights)
        return context, weights

    @staticmethod
    def backward(ctx: Any, dcontext: Any, dweights: Any) -> Any:  # type: ignore[override]
        *tensors, mask, weights = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        if torch.is_grad_enabled() or not is_ordinary(dcontext, dweights) or not is_plain():

            def again(inputs: Any) -> Any:
                *rest, v = inputs
                return plain_attend(*rest, mask, v, ctx.scale)

            return None, None, None, *gradients_again(again, tensors, need, (dcontext, dweights))
        queries, keys, values, v = map(_dense, tensors)
        dcontext, dweights = _dense(dcontext), _dense(dweights)
        dqueries, dkeys = torch.empty_like(queries), torch.zeros_like(keys)
        dv = None if v is None else keys.new_zeros(keys.shape[0], keys.shape[2])
        _take(
            ctx.backend.attend_backward(
                queries,
                keys,
                values,
                v,
                mask,
                ctx.scale,
                weights,
                dcontext,
                dweights,
                dqueries,
                dkeys,
                dv,
                torch.get_num_threads(),
            )
        )
        dvalues = weights.transpose(1, 2) @ dcontext if need[2] else None
        return None, None, None, dqueries, dkeys, dvalues, None if dv is None else dv.sum(0)


def _dense(tensor: Any) -> Any:
    return None if tensor is None else tensor.detach().resolve_neg().contiguous()


def _take(done: bool | None) -> None:
    if done is None:
        raise RuntimeError("fastseq: the tensors of attention have another shape, type or device")
