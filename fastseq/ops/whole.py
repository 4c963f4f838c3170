"""A whole stack, layers by directions with dropout between, as one call of the C++ kernels.

Through checks, the choice of a backend and an operator a call takes 40 us a layer, and a step of an
LSTM with H = 128 takes 5. Here the extension looks at the tensors itself, and declines whatever is
not plain: the long way then runs it, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import load
from ..backends.choice import is_outer_product
from .autograd import Layout, differentiable_recurrence, gradients_again, is_batched

#: cell -> number in the extension, or None where the extension is not there
_numbers: dict[str, int] | None = None
_native: Any = None


class Shape(NamedTuple):
    """What a call has besides tensors: as csrc/python/call.h reads it, but for the cell."""

    cell: str
    layers: int
    directions: int
    biased: bool
    projected: bool
    order: int  # how x is laid out, of the three below
    deterministic: bool
    dropout: float  # what is to be done: zero where nothing is dropped


TIME_FIRST, BATCH_FIRST, ONE_STEP = range(3)
_REVERSE = ((), (False,), (False, True))  # by the number of directions
DTYPES = (torch.float32, torch.float64)


class Declined(Exception):
    """The extension does not take these tensors."""


def serves(cell: str) -> bool:
    """Whether the extension is there and has the cell."""
    global _numbers, _native
    if _numbers is None:
        native = load("native")
        _numbers = {} if isinstance(native, str) else native.NUMBER
        _native = None if isinstance(native, str) else native
    return cell in _numbers


def is_plain() -> bool:
    """Whether nobody but the kernels has to see a call: no tracer, transform, mode, profile."""
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


def run(
    shape: Shape,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
) -> tuple[Tensor, tuple[Tensor, ...]] | None:
    """y, time first, and the final states (layers * D, B, ...); None where the long way is due.

    Of a call that :func:`is_plain`, of a cell that it :func:`serves`.

    x: (T, B, I) or (T, I); (B, T, I) if BATCH_FIRST; (B, I) if ONE_STEP; or packed (N, I) with
        batch_sizes.
    states: none, or per state of the cell (layers * D, B, ...), without B for (T, I); (B, ...) if
        ONE_STEP, of one layer and direction.
    weights: of each layer and direction w_ih, w_hh, b_ih, b_hh, w_hr, but for those it has not,
        then the cell's units.
    """
    follows = torch.is_grad_enabled() and (
        x.requires_grad
        or any([w.requires_grad for w in weights])
        or any([s.requires_grad for s in states])
    )
    if follows and x.numel() == x.shape[-1] and is_outer_product(shape.cell, weights[1].shape[1]):
        return None
    drawn = torch.get_rng_state() if shape.dropout else None
    if follows:
        try:
            y, *finals = StackFunction.apply(shape, len(states), x, batch_sizes, *states, *weights)
            return y, tuple(finals)
        except Declined:
            out = None
    else:
        masks = _draw(shape, x, batch_sizes, weights)
        out = _native.layers(
            *_arguments(shape, x, batch_sizes, states, weights, masks), False, False, None
        )
    if out is None and drawn is not None:
        torch.set_rng_state(drawn)  # as if nothing had been drawn
    return out and out[:2]


def _draw(
    shape: Shape, x: Tensor, batch_sizes: Tensor | None, weights: tuple[Tensor, ...]
) -> list[Tensor]:
    """What torch.dropout would draw: which numbers of its input each layer but the first takes."""
    if not shape.dropout or shape.layers == 1:
        return []
    size = weights[-1] if shape.projected else weights[1]  # (P, H) or (G*H, P)
    width = shape.directions * size.shape[0 if shape.projected else 1]
    lead = list(x.shape[:-1])
    if shape.order == BATCH_FIRST and batch_sizes is None and len(lead) == 2:
        lead.reverse()
    kept = 1.0 - shape.dropout
    return [
        torch.empty((*lead, width), dtype=torch.bool).bernoulli_(kept)
        for _ in range(shape.layers - 1)
    ]


def _arguments(
    shape: Shape,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    masks: list[Tensor],
) -> tuple[Any, ...]:
    return (
        _numbers[shape.cell],  # type: ignore[index]
        x,
        batch_sizes,
        states,
        weights,
        shape.layers,
        _REVERSE[shape.directions],
        shape.order,
        None,
        None,
        tuple(masks),
        1.0 - shape.dropout,
        torch.get_num_threads(),
        shape.deterministic,
        False,
    )


class StackFunction(torch.autograd.Function):
    """(shape, number of states, x, batch_sizes, *states, *weights) -> (y, *final states)"""

    @staticmethod
    def forward(ctx, shape, n, x, batch_sizes, *tensors):
        states, weights = tensors[:n], tensors[n:]
        masks = _draw(shape, x, batch_sizes, weights)
        out = _native.layers(
            *_arguments(shape, x, batch_sizes, states, weights, masks), True, False, None
        )
        if out is None:
            raise Declined
        y, finals, saved = out
        ctx.shape, ctx.n, ctx.n_weights, ctx.n_masks = shape, n, len(weights), len(masks)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, batch_sizes, *tensors, *masks, y, *saved)
        # torch.nn's LSTM does not let its output be edited, all other layers do
        return (y if shape.cell == "lstm" else y.clone(), *finals)

    @staticmethod
    def backward(ctx, *grads):
        shape, n = ctx.shape, ctx.n
        x, batch_sizes, *rest = ctx.saved_tensors
        states, weights = tuple(rest[:n]), tuple(rest[n : n + ctx.n_weights])
        masks = rest[n + ctx.n_weights : n + ctx.n_weights + ctx.n_masks]
        y, *saved = rest[n + ctx.n_weights + ctx.n_masks :]
        need = ctx.needs_input_grad
        if all(g is None for g in grads):
            return (None,) * len(need)
        if torch.is_grad_enabled() or not all(map(_is_ordinary, grads)) or not is_plain():
            # the layers' own Functions have derivatives of every order, and in every mode

            def one_by_one(inputs):
                x, batch_sizes, *rest = inputs
                return _layer_by_layer(shape, x, batch_sizes, rest[:n], rest[n:], masks)

            inputs = (x, batch_sizes, *states, *weights)
            return (None, None, *gradients_again(one_by_one, inputs, need[2:], grads))
        dy, *dstates = [g if g is None else g.resolve_neg().contiguous() for g in grads]
        found = _native.layers_backward(
            *_arguments(shape, x, batch_sizes, states, weights, masks),
            y,
            tuple(saved),
            dy,
            tuple(dstates),
            (),
            need[2],
            any(need[4 + n :]),
            any(need[4 : 4 + n]),
        )
        if found is None:
            raise RuntimeError("fastseq: the saved tensors came back with another shape or type")
        dx, finals, dweights = found[0], found[1 : 1 + len(dstates)], found[1 + len(dstates) :]
        if dx is not None and shape.order == BATCH_FIRST and batch_sizes is None and dx.dim() == 3:
            dx = dx.transpose(0, 1)
        return (None, None, dx, None, *finals[:n], *(dweights or (None,) * len(weights)))


def _is_ordinary(gradient: Tensor | None) -> bool:
    return gradient is None or (type(gradient) is Tensor and not is_batched(gradient))


def _layer_by_layer(
    shape: Shape,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: list[Tensor],
) -> list[Tensor]:
    """What :class:`StackFunction` gives, of the same masks."""
    D = shape.directions
    each = len(weights) // (shape.layers * D)
    missing = None  # the dimension that a layer has and this call has not
    if shape.order == ONE_STEP:
        missing = 0
    elif batch_sizes is None and x.dim() == 2:
        missing = 1
    elif shape.order == BATCH_FIRST and batch_sizes is None:
        x = x.transpose(0, 1)
    if missing is not None:
        x, states = x.unsqueeze(missing), [s.unsqueeze(missing) for s in states]
    reverse = (False, True)[:D]
    finals = []
    for layer in range(shape.layers):
        flat: list[Tensor | None] = []
        for first in range(layer * D * each, (layer + 1) * D * each, each):
            own = list(weights[first : first + each])
            biases = own[2:4] if shape.biased else (None, None)
            flat += [*own[:2], *biases, own[-1] if shape.projected else None]
        part = [s[layer * D : (layer + 1) * D] for s in states]
        layout = Layout(
            shape.cell, "native", reverse, "full", shape.deterministic, False, len(part), len(flat)
        )
        if layer and masks:
            mask = masks[layer - 1].view(x.shape).to(x.dtype)
            x = x * (mask / (1.0 - shape.dropout) if shape.dropout < 1 else mask)
        x, *last = differentiable_recurrence(layout, x, batch_sizes, None, None, *part, *flat)
        finals.append(last)
    outputs = [x, *(torch.cat(s) for s in zip(*finals, strict=True))]
    return outputs if missing is None else [o.squeeze(missing) for o in outputs]
