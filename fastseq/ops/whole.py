"""A whole stack, layers by directions with dropout between, as one call of a backend of our own.

Through checks, the choice of a backend and an operator a call takes 40 us a layer, and a step of an
LSTM with H = 128 takes 5. Here the backend looks at the tensors itself, and declines whatever is
not plain: the long way then runs it, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.choice import is_outer_product
from ..backends.contract import (
    BATCH_FIRST,
    NOTHING,
    ONE_STEP,
    Given,
    Request,
    Wanted,
    Weights,
    given_again,
    ways,
)
from ..backends.stacked import of_layer, one_by_one
from . import steps
from .autograd import Layout, differentiable_recurrence, gradients_again, is_batched
from .masks import mask_input
from .modes import is_plain


class Declined(Exception):
    """The backend does not take these tensors."""


def run(
    backend: tuple[str, Any],
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    step: bool = False,
    given: Given = NOTHING,
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """y, time first, and the final states (layers * D, B, ...), behind them those of the
    trajectory; None where the long way is due.

    Of a call that :func:`.modes.is_plain`. backend: its name and module, a
    :class:`.contract.WholeStacks` with ``layers_backward``, which says what the tensors are. states
    and weights are tuples. step: whether it is one step of one layer, which a loop may call
    (:mod:`.steps`).
    """
    if request.dropout and not x.is_cpu:
        return None  # what is dropped is drawn on the CPU
    if x.is_neg():
        return None  # the kernels read memory, where a lazy negation has another sign
    for state in states:
        if state.is_neg():
            return None
    follows = torch.is_grad_enabled() and (
        x.requires_grad
        or any([w.requires_grad for w in weights])
        or any([s.requires_grad for s in states])
    )
    of = None  # the first step of a loop has no state that autograd follows
    if follows and step and states and states[0].grad_fn is not None:
        rows = states[0].numel() // max(1, states[0].shape[-1])
        of = steps.weights_of(weights) if steps.pays(weights, rows) else None
    if (
        follows
        and of is None
        and x.dim()
        and x.numel() == x.shape[-1]
        and is_outer_product(request.cell, weights[0].shape[0] // request.definition.G)
    ):
        return None
    drawn = torch.get_rng_state() if request.dropout else None
    if follows:
        try:
            if of is None:
                y, *finals = StackFunction.apply(
                    backend,
                    request,
                    given,
                    len(states),
                    None,
                    None,
                    x,
                    batch_sizes,
                    *states,
                    *weights,
                )
            else:
                y, *finals = StackFunction.apply(
                    backend, request, given, len(states), of, of.token, x, None, *states
                )
            # A node of its own, 5 us: else a hook on a state that nothing uses is called with None.
            # In a loop of a cell that is the last c; each h is used.
            kept = 1 if request.order == ONE_STEP else 0
            return y, (*finals[:kept], *[f.view_as(f) for f in finals[kept:]])
        except Declined:
            out = None
    else:
        if request.dropout:
            given = given._replace(dropout=_draw(request, x, batch_sizes, weights))
        out = backend[1].layers(request, x, batch_sizes, states, weights, given, False)
    if out is None and drawn is not None:
        torch.set_rng_state(drawn)  # as if nothing had been drawn
    return out and out[:2]


def _draw(
    request: Request, x: Tensor, batch_sizes: Tensor | None, weights: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What torch.dropout would draw: which numbers of its input each layer but the first takes."""
    if not request.dropout or request.layers == 1:
        return ()
    way = ways(request, weights)[0]
    H = weights[0].shape[0] // request.definition.G
    width = request.directions * (H if way.w_hr is None else way.w_hr.shape[0])
    lead = list(x.shape[:-1])
    if request.order == BATCH_FIRST and batch_sizes is None and len(lead) == 2:
        lead.reverse()
    kept = 1.0 - request.dropout
    return tuple(
        torch.empty((*lead, width), dtype=torch.bool, device="cpu").bernoulli_(kept)
        for _ in range(request.layers - 1)
    )


class StackFunction(torch.autograd.Function):
    """((name, module), request, given, number of states, None, None, x, batch_sizes, *states,
    *weights) -> (y, *final states, *trajectory)

    Of one step, with its weights' :class:`.steps.Weights` and token: (..., of, token, x, None,
    *states), and what the gradient of the weights needs is left there.
    """

    @staticmethod
    def forward(ctx, backend, request, given, n, of, token, x, batch_sizes, *tensors):
        states, weights = tensors[:n], tensors[n:]
        if of is not None:
            weights = of.tensors
            tensors = states + weights
        if request.dropout:
            given = given._replace(dropout=_draw(request, x, batch_sizes, weights))
        out = backend[1].layers(request, x, batch_sizes, states, weights, given, True)
        if out is None:
            raise Declined
        y, finals, saved = out
        own: Sequence[Tensor | None] = ()
        by = None
        if given is not NOTHING:  # a graph that has let go of what it saved holds no masks either
            own, by = given.taken()
        ctx.call = backend, request, by, of, 2 + n, 2 + len(tensors), len(own)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, batch_sizes, *tensors, y, *own, *saved)
        return (y.clone() if request.editable else y, *finals)

    @staticmethod
    def backward(ctx, *grads):
        (name, module), request, by, of, end, last, count = ctx.call
        kept = ctx.saved_tensors
        x, batch_sizes, states, weights = kept[0], kept[1], kept[2:end], kept[end:last]
        y, saved = kept[last], kept[last + 1 + count :]
        given = NOTHING if by is None else given_again(kept[last + 1 : last + 1 + count], by)
        need = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(need)
        needs = need[6:]
        if of is not None:
            awaited = of.awaited()
            needs += tuple([awaited and n for n in of.needs])
        if torch.is_grad_enabled() or not all(map(_is_ordinary, grads)) or not is_plain():
            # the layers' own Functions have derivatives of every order, and in every mode

            def again(inputs):
                x, batch_sizes, *rest = inputs
                n = end - 2
                return differentiable(name, request, x, batch_sizes, rest[:n], rest[n:], given)

            inputs = (x, batch_sizes, *states, *weights)
            again_found = gradients_again(again, inputs, needs, grads)
            if of is not None and any(needs[end:]):
                of.now().add(again_found[end:])
            token = None if of is None else of.gradient
            return (None, None, None, None, None, token, *again_found[: len(need) - 6])
        dy, *dstates = [g if g is None else g.resolve_neg().contiguous() for g in grads]
        wanted = Wanted(needs[0], any(needs[2:end]), of is None and any(needs[end:]))
        found = module.layers_backward(
            request, x, batch_sizes, states, weights, given, y, saved, dy, tuple(dstates), wanted
        )
        if found is None:
            raise RuntimeError("fastseq: the saved tensors came back with another shape or type")
        dx, n = found[0], len(request.definition.states)
        dfinals, dweights = found[1 : 1 + len(states)], found[1 + n :]
        if dx is not None and request.order == BATCH_FIRST and dx.dim() == 3:
            dx = dx.transpose(0, 1)
        if of is not None:
            if any(needs[end:]):
                left = steps.Left(x, states, y, saved, dy, tuple(dstates))
                of.leave(module, request, weights, left)
            return (None, None, None, None, None, of.gradient, dx, None, *dfinals)
        dweights = dweights or (None,) * len(weights)
        return (None, None, None, None, None, None, dx, None, *dfinals, *dweights)


def _is_ordinary(gradient: Tensor | None) -> bool:
    return gradient is None or (type(gradient) is Tensor and not is_batched(gradient))


def differentiable(
    name: str,
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    given: Given,
) -> list[Tensor]:
    """What :class:`StackFunction` gives, of the same masks."""
    missing = None  # the dimension that a layer has and this call has not
    if request.order == ONE_STEP:
        missing = 0
    elif batch_sizes is None and x.dim() == 2:
        missing = 1
    elif request.order == BATCH_FIRST and batch_sizes is None:
        x = x.transpose(0, 1)
    if missing is not None:
        x, states = x.unsqueeze(missing), [s.unsqueeze(missing) for s in states]
    reverse, D = (False, True)[: request.directions], request.directions
    along: list[Tensor] = []

    def before(layer: int, x: Tensor) -> Tensor:
        if layer and given.dropout:
            mask = given.dropout[layer - 1].view(x.shape).to(x.dtype)
            x = x * (mask / (1.0 - request.dropout) if request.dropout < 1 else mask)
        if given.input_masks:
            x = mask_input(x, given.input_masks[layer], batch_sizes)
        return x

    def run(
        layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
    ) -> tuple[Tensor, list[Tensor]]:
        flat = [w for way in weights for w in way.flat()]
        own = of_layer(given, layer, D)
        trajectory = request.trajectory and layer == request.layers - 1
        layout = Layout(
            request.cell,
            name,
            reverse,
            "full",
            request.deterministic,
            trajectory,
            len(states),
            len(flat),
            len(own.stay),
            own.part,
        )
        y, *last = differentiable_recurrence(
            layout, x, batch_sizes, own.reset, own.h_mask, *states, *flat, *own.stay
        )
        n = len(request.definition.states)
        along.extend(last[n:])
        return y, last[:n]

    y, finals = one_by_one(request, x, states, ways(request, weights), run, before)
    outputs = [y, *finals, *along]
    return outputs if missing is None else [o.squeeze(missing) for o in outputs]
