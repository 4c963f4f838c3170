"""How a call under torch.func.vmap becomes calls without it: the rules of the two Functions.

A batched tensor has one dimension more, of V members. Three ways to run V calls:

- *fold*: the members share their weights. They enter the batch, sequence b of member v as sequence
  b*V + v, which keeps the rows of one step side by side for dense and packed rows alike: one call.
- *ensemble*: the members share the input (and in backward nobody asks for its gradient, which a
  call sums over its recurrences). A call may hold any number of recurrences: one call with V*R.
- *loop*: V calls, stacked. Members with both their own input and their own weights; and gradients
  of shared weights for each member, which a call would sum.

What a backend saves is taken to be laid out so: rows in front, as in x or flat; first the
same tensors of each recurrence in turn, then tensors with all recurrences side by side in columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS
from .library import Layout, make_call, saved_layout

Tensors = Sequence[Any]  # of Tensor or None
Dims = Sequence[Any]  # of int or None: which dimension of a tensor is the members'
Batched = tuple[tuple[Tensor, ...], tuple[int, ...]]  # tuples: autograd takes a list for a value
Apply = Callable[..., Sequence[Any]]

_REFUSAL = (
    "vmap over lengths: the kernels need the same batch_sizes for every member; "
    "call the layer in a loop, or give all sequences in one batch with lengths="
)


def forward(apply: Apply, layout: Layout, V: int, dims: Dims, tensors: Tensors) -> Batched:
    """The outputs of RecurrenceFunction and their dimensions. tensors: all inputs."""
    _check(dims)
    batch_sizes = tensors[1]
    lead = 2 if batch_sizes is None else 1
    own_weights = any(d is not None for d in dims[_weights(layout)])
    own_x = dims[0] is not None
    if not own_weights:
        outputs = apply(layout, *_folded_inputs(layout, V, dims, tensors))
        axes = _output_axes(layout, [t.dim() for t in outputs])
        return _unfold(outputs, axes, V)
    if not own_x:
        many, inputs = _ensemble_inputs(layout, V, dims, tensors)
        outputs = apply(many, *inputs)
        return _split_ensemble(layout, V, lead, outputs, _joined(layout, V, inputs))
    return _loop(lambda *one: apply(layout, *one), V, dims, tensors)


def backward(
    apply: Apply, layout: Layout, wanted: Sequence[bool], V: int, dims: Dims, tensors: Tensors
) -> Batched:
    """The flat gradients of RecurrenceBackwardFunction and their dimensions.

    tensors: all inputs, the gradients of the outputs, all outputs.
    """
    _check(dims)
    n = layout.n_inputs
    inputs, rest = tensors[:n], tensors[n:]
    rest_dims = dims[n:]
    lead = 2 if tensors[1] is None else 1
    seen = layout.n_outputs
    own_weights = any(d is not None for d in dims[_weights(layout)])
    if not wanted[2] and not own_weights:
        ranks = [
            t.dim() - (d is not None) for t, d in zip(rest[seen:], rest_dims[seen:], strict=True)
        ]
        axes = _output_axes(layout, ranks)
        folded = [
            _fold(t, d, axis, V)
            for t, d, axis in zip(rest, rest_dims, [*axes[:seen], *axes], strict=True)
        ]
        flat = apply(layout, wanted, *_folded_inputs(layout, V, dims[:n], inputs), *folded)
        first = [lead - 1] if wanted[0] else []
        return _unfold(flat, first + [1] * (len(flat) - len(first)), V)
    if dims[0] is None and not wanted[0]:
        many, call = _ensemble_inputs(layout, V, dims[:n], inputs)
        joined = _joined(layout, V, call)
        grads = _join_ensemble(layout, V, lead, rest[:seen], rest_dims[:seen], 0)
        outputs = _join_ensemble(layout, V, lead, rest[seen:], rest_dims[seen:], joined)
        flat = list(apply(many, wanted, *call, *grads, *outputs))
        n_states = len(CELLS[layout.cell].states) if wanted[1] else 0
        states = [s.unflatten(0, (V, -1)) for s in flat[:n_states]]
        weights = flat[n_states:]
        each = len(weights) // V
        stacked = [torch.stack(weights[k::each]) for k in range(each)] if each else []
        found = states + stacked
        return tuple(found), (0,) * len(found)
    return _loop(lambda *one: apply(layout, wanted, *one), V, dims, tensors)


def _weights(layout: Layout) -> slice:
    """Where the weights stand among the inputs; behind them is where the states stay."""
    first = 4 + layout.n_states
    return slice(first, first + layout.n_weights)


def _check(dims: Dims) -> None:
    if dims[1] is not None:
        raise NotImplementedError(_REFUSAL)


def _loop(function: Apply, V: int, dims: Dims, tensors: Tensors) -> Batched:
    # kernels read what was saved by its address: no strides
    each = [
        [t] * V if d is None else t.movedim(d, 0).contiguous().unbind(0)
        for t, d in zip(tensors, dims, strict=True)
    ]
    members = [function(*one) for one in zip(*each, strict=True)]
    found = tuple(torch.stack(parts) for parts in zip(*members, strict=True))
    return found, (0,) * len(found)


# Fold: the members beside the batch. ``axis`` is where a tensor has its rows or its batch.


def _fold(tensor: Any, dim: int | None, axis: int, V: int) -> Any:
    if tensor is None:
        return None
    if dim is None:
        size = [*tensor.shape[: axis + 1], V, *tensor.shape[axis + 1 :]]
        apart = tensor.unsqueeze(axis + 1).expand(size)
    else:
        apart = tensor.movedim(dim, axis + 1)
    return apart.flatten(axis, axis + 1).contiguous()


def _unfold(tensors: Sequence[Tensor], axes: list[int], V: int) -> Batched:
    apart = tuple(
        t.unflatten(axis, (t.shape[axis] // V, V)) for t, axis in zip(tensors, axes, strict=True)
    )
    return apart, tuple(axis + 1 for axis in axes)


def _folded_inputs(layout: Layout, V: int, dims: Dims, tensors: Tensors) -> Tensors:
    x, batch_sizes, reset, h_mask, *rest = tensors
    n, last = layout.n_states, layout.n_states + layout.n_weights
    return [
        _fold(x, dims[0], 1 if batch_sizes is None else 0, V),
        None if batch_sizes is None else batch_sizes * V,
        _fold(reset, dims[2], 1, V),
        _fold(h_mask, dims[3], 1, V),
        *(_fold(s, d, 1, V) for s, d in zip(rest[:n], dims[4 : 4 + n], strict=True)),
        *rest[n:last],
        *(_fold(s, d, 1, V) for s, d in zip(rest[last:], dims[4 + last :], strict=True)),
    ]


def _output_axes(layout: Layout, ranks: list[int]) -> list[int]:
    """Where y, the states, the trajectory and what was saved (flat or not) have their rows."""
    last = 1 + len(CELLS[layout.cell].states)
    return [1 if 0 < k < last else rank - 2 for k, rank in enumerate(ranks)]


# Ensemble: the members beside the directions, in the columns of y and of the trajectory.


def _in_front(tensor: Any, dim: int | None, V: int) -> Any:
    """(V, ...)"""
    return tensor.expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def _ensemble_inputs(
    layout: Layout, V: int, dims: Dims, tensors: Tensors
) -> tuple[Layout, Tensors]:
    """One call of V*R recurrences over the one x."""
    own = _weights(layout)

    def together(k: int) -> Any:
        t = tensors[k]
        return None if t is None else _in_front(t, dims[k], V).flatten(0, 1).contiguous()

    members = [
        [None] * V if t is None else _in_front(t, d, V).unbind(0)
        for t, d in zip(tensors[own], dims[own], strict=True)
    ]
    weights = [w for member in zip(*members, strict=True) for w in member]
    many = layout._replace(reverse=layout.reverse * V, n_weights=len(weights))
    middle = [together(k) for k in range(2, own.start)]
    stay = [together(k) for k in range(own.stop, len(tensors))]
    return many, [*tensors[:2], *middle, *weights, *stay]


def _joined(layout: Layout, V: int, inputs: Tensors) -> int:
    """How many of the saved tensors hold all recurrences. inputs: those of the ensemble."""
    if not layout.save or V == 1:
        return 0
    x, batch_sizes, reset, h_mask, *rest = inputs
    n = layout.n_states
    each = layout.n_weights
    stay = rest[n + V * each :]

    def count(members: int) -> int:
        R = len(layout.reverse) * members
        call = make_call(
            layout.cell,
            x,
            batch_sizes,
            [s[:R] for s in rest[:n]],
            rest[n : n + each * members],
            layout.reverse * members,
            reset,
            h_mask,
            [None if s is None else s[:R] for s in stay],
            layout.part,
            layout.memory,
        )
        return len(saved_layout(layout.backend, call, x.shape[:-1], layout.trajectory))

    one = count(1)
    return one - (count(V) - one) // (V - 1)


def _split_ensemble(
    layout: Layout, V: int, lead: int, outputs: Sequence[Tensor], joined: int
) -> Batched:
    """The outputs of V members, from those of the one call."""
    n = len(CELLS[layout.cell].states)
    seen = layout.n_outputs
    last = len(outputs) - joined
    own = outputs[seen:last]
    each = len(own) // V

    def columns(t: Tensor) -> Tensor:
        return t.unflatten(-1, (V, t.shape[-1] // V))

    found = [columns(outputs[0])]
    found += [s.unflatten(0, (V, s.shape[0] // V)) for s in outputs[1 : 1 + n]]
    found += [columns(c) for c in outputs[1 + n : seen]]
    found += [torch.stack(tuple(own[k::each])) for k in range(each)]
    found += [columns(c) for c in outputs[last:]]
    dims = [lead] + [0] * n + [lead] * (seen - 1 - n) + [0] * each + [lead] * joined
    return tuple(found), tuple(dims)


def _join_ensemble(
    layout: Layout, V: int, lead: int, tensors: Sequence[Any], dims: Dims, joined: int
) -> Tensors:
    """The inverse: outputs, or their gradients, as the one call has them."""
    n = len(CELLS[layout.cell].states)
    seen = layout.n_outputs
    last = len(tensors) - joined

    def columns(k: int) -> Any:
        t = tensors[k]
        if t is None:
            return None
        return _in_front(t, dims[k], V).movedim(0, lead).flatten(lead, lead + 1).contiguous()

    found = [columns(0)]
    for k in range(1, 1 + n):
        t = tensors[k]
        found.append(None if t is None else _in_front(t, dims[k], V).flatten(0, 1).contiguous())
    found += [columns(k) for k in range(1 + n, seen)]
    own = [_in_front(tensors[k], dims[k], V) for k in range(seen, last)]
    found += [t[v].contiguous() for v in range(V) for t in own]
    found += [columns(k) for k in range(last, len(tensors))]
    return found
