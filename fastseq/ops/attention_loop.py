"""A cell that is fed what attention finds with the state before, over all given inputs.

    c_u = attention(W h_{u-1}, keys, values)    h_u = cell([x_u, c_u], h_{u-1})

As one node of the graph. In backward the loop makes what the step before must know; behind it one
product each makes the gradients of the cell's weights (:func:`.steps.multiply`), of W and of the
values. Those of the keys are added up in place. Autograd's own loop writes each at every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import NOTHING, Request, Wanted
from .attention import plain_attend
from .autograd import gradients_again
from .modes import is_ordinary, is_plain
from .steps import Left, multiply
from .whole import Declined, differentiable


class Loop(NamedTuple):
    """What runs: the backend of the cell, with its name, what is asked of it, the backend of
    attention, the scale of its scores, and how many states the cell has."""

    backend: tuple[str, Any]
    request: Request
    attention: Any
    scale: float
    states: int


def loop(
    by: Loop,
    inputs: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    w_query: Tensor | None,
    v: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Sequence[Tensor]] | None:
    """Outputs [h; c] (U, B, H + V), attention weights (U, B, S) and the last states; None where a
    backend does not take the tensors as they are.

    inputs: (U, B, I). keys: (B, S, A), projected. values: (B, S, V). mask: (B, S) bool. w_query: W
    (A, H), or None for h itself. v: as :func:`.attention.attend`. weights: the cell's.
    """
    tensors = (inputs, keys, values, mask, w_query, v, *states, *weights)
    try:
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            outputs, looked, *finals = LoopFunction.apply(by, *tensors)
        else:
            outputs, looked, finals, _ = walk(by, tensors, save=False)
    except Declined:
        return None
    return outputs, looked, finals


class Walked(NamedTuple):
    """What backward reads: the cell's inputs ``reads`` (U, B, I + V), and lists with an entry for
    each step."""

    reads: Tensor
    queries: list[Tensor]
    states: list[Sequence[Tensor]]
    outputs: list[Tensor]
    saved: list[Sequence[Tensor]]


def walk(
    by: Loop, tensors: Sequence[Any], save: bool
) -> tuple[Tensor, Tensor, Sequence[Tensor], Walked]:
    inputs, keys, values, mask, w_query, v, *rest = tensors
    states, weights = tuple(rest[: by.states]), tuple(rest[by.states :])
    (U, B, I), V = inputs.shape, values.shape[2]  # noqa: E741  (the field's letter)
    reads = inputs.new_empty(U, B, I + V)
    reads[..., :I] = inputs
    looked = inputs.new_empty(U, B, keys.shape[1])
    found = Walked(reads, [], [], [], [])
    turned, threads = None if w_query is None else w_query.t(), torch.get_num_threads()
    steps = zip(reads.unbind(), reads[..., I:].unbind(), looked.unbind(), strict=True)
    for read, context, look in steps:
        query = states[0] if turned is None else torch.mm(states[0], turned)
        done = by.attention.attend(query, keys, values, v, mask, by.scale, look, context, threads)
        if done is None:
            raise Declined
        out = by.backend[1].layers(by.request, read, None, states, weights, NOTHING, save)
        if out is None:
            raise Declined
        if save:
            found.queries.append(query)
            found.states.append(states)
            found.saved.append(out[2])
        found.outputs.append(out[0])
        states = tuple(out[1])
    outputs = torch.cat([torch.stack(found.outputs), reads[..., I:]], 2)
    return outputs, looked, states, found


def plainly(by: Loop, tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """The same step by step, with derivatives of every order."""
    inputs, keys, values, mask, w_query, v, *rest = tensors
    states, weights = rest[: by.states], rest[by.states :]
    outputs, looked = [], []
    for x in inputs.unbind():
        query = states[0] if w_query is None else states[0] @ w_query.t()
        c, p = plain_attend(query.unsqueeze(1), keys, values, mask, v, by.scale)
        read = torch.cat([x, c.squeeze(1)], 1)
        _, *states = differentiable(by.backend[0], by.request, read, None, states, weights, NOTHING)
        outputs.append(torch.cat([states[0], c.squeeze(1)], 1))
        looked.append(p.squeeze(1))
    return torch.stack(outputs), torch.stack(looked), *states


class LoopFunction(torch.autograd.Function):
    """(by, inputs, keys, values, mask, w_query, v, *states, *weights)
    -> (outputs, attention weights, *last states)"""

    @staticmethod
    def forward(ctx: Any, by: Loop, *tensors: Any) -> Any:
        outputs, looked, finals, found = walk(by, tensors, save=True)
        ctx.by, ctx.kept = by, [len(saved) for saved in found.saved]
        U = len(found.outputs)
        ctx.save_for_backward(
            *tensors,
            found.reads,
            looked,
            *found.queries,
            *(s for states in found.states for s in states),
            *found.outputs,
            *(s for saved in found.saved for s in saved),
        )
        ctx.sizes = len(tensors), U
        return outputs, looked, *finals

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        by: Loop = ctx.by
        (count, U), n = ctx.sizes, by.states
        kept = list(ctx.saved_tensors)
        tensors, kept = kept[:count], kept[count:]
        need = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled() or not is_ordinary(*grads) or not is_plain():
            again = gradients_again(lambda inputs: plainly(by, inputs), tensors, need, grads)
            return None, *again
        inputs, keys, values, mask, w_query, v, *rest = tensors
        weights = tuple(rest[n:])
        (reads, looked), kept = kept[:2], kept[2:]
        queries, kept = kept[:U], kept[U:]
        states, kept = [tuple(kept[n * u : n * u + n]) for u in range(U)], kept[n * U :]
        outputs, kept = kept[:U], kept[U:]
        I, H = inputs.shape[2], states[0][0].shape[1]  # noqa: E741

        doutputs, dlooked, *dfinals = grads
        dys = doutputs[..., :H].contiguous().unbind()
        dcontexts = doutputs[..., H:].clone(memory_format=torch.contiguous_format)
        dlooks, looks, dcs = dlooked.contiguous().unbind(), looked.unbind(), dcontexts.unbind()
        dqueries = reads.new_empty(U, *queries[0].shape)
        dkeys = torch.zeros_like(keys)
        dv = None if v is None else keys.new_zeros(keys.shape[0], keys.shape[2])
        dstates = tuple(d.contiguous() for d in dfinals)
        dreads: list[Tensor] = []
        left: list[Left] = []
        threads, end = torch.get_num_threads(), len(kept)
        wanted = Wanted(x=True, states=True, weights=False)
        for u in range(U - 1, -1, -1):
            saved = tuple(kept[end - ctx.kept[u] : end])
            end -= ctx.kept[u]
            read, y = reads[u], outputs[u]
            left.append(Left(read, states[u], y, saved, dys[u], dstates))
            found = by.backend[1].layers_backward(
                by.request,
                read,
                None,
                states[u],
                weights,
                NOTHING,
                y,
                saved,
                dys[u],
                dstates,
                wanted,
            )
            dread, dh, dothers = found[0], found[1], found[2 : 1 + n]
            dreads.append(dread)
            dcs[u].add_(dread[:, I:])
            by.attention.attend_backward(
                queries[u],
                keys,
                values,
                v,
                mask,
                by.scale,
                looks[u],
                dcs[u],
                dlooks[u],
                dqueries[u],
                dkeys,
                dv,
                threads,
            )
            dq = dqueries[u]
            dh = dh + dq if w_query is None else torch.addmm(dh, dq, w_query)
            dstates = (dh, *dothers)
        dreads.reverse()
        left.reverse()
        dinputs = torch.stack(dreads)[..., :I] if need[0] else None
        dvalues = None
        if need[2]:  # (B, S, U) by (B, U, V)
            dvalues = torch.bmm(looked.permute(1, 2, 0), dcontexts.transpose(0, 1))
        dw_query = None
        if w_query is not None and need[4]:
            before = torch.cat([s[0] for s in states])
            dw_query = dqueries.reshape(-1, dqueries.shape[2]).t() @ before
        dweights: Sequence[Tensor | None] = (None,) * len(weights)
        if any(need[6 + n :]):
            dweights = multiply(by.backend[1], by.request, weights, left)
        dv = None if dv is None else dv.sum(0)
        return None, dinputs, dkeys, dvalues, None, dw_query, dv, *dstates, *dweights
