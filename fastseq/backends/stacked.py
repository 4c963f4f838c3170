"""The layers of a stack one after another: the one loop over them in Python, and the stacks of a
backend that runs a layer a call (:class:`.contract.WholeStacks`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .contract import (
    NOTHING,
    TIME_FIRST,
    Call,
    Given,
    Gradients,
    OutputGradients,
    Problem,
    Request,
    Result,
    Wanted,
    Weights,
    ways,
)

#: (number of the layer, x, its states, its weights) -> (y, its final states)
RunLayer = Callable[[int, Tensor, list[Tensor], list[Weights]], tuple[Tensor, list[Tensor]]]


def one_by_one(
    request: Request,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Weights],
    run: RunLayer,
    before: Callable[[int, Tensor], Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """y of the last layer, and the final states (layers * D, B, ...).

    before: what becomes of the input of a layer first, given the layer's number; where it is None
        torch.dropout between the layers.
    """
    D, layers = request.directions, request.layers
    finals: list[list[Tensor]] = []
    for layer in range(layers):
        if before is not None:
            x = before(layer, x)
        elif layer:
            x = dropped(request, x)
        first = layer * D
        own = list(states) if layers == 1 else [s.narrow(0, first, D) for s in states]
        x, last = run(layer, x, own, list(weights[first : first + D]))
        finals.append(last)
    if layers == 1:
        return x, finals[0]
    return x, [torch.cat(s) for s in zip(*finals, strict=True)]


def dropped(request: Request, x: Tensor) -> Tensor:
    """x with torch's own dropout, as it stands between two layers."""
    return torch.dropout(x, request.dropout, True) if request.dropout > 0 else x


def of_layer(given: Given, layer: int, directions: int) -> Given:
    """What one layer has of it: reset, h_mask and where the states stay."""
    if given is NOTHING:
        return given
    rows = slice(layer * directions, (layer + 1) * directions)
    return Given(
        reset=given.reset,
        h_mask=None if given.h_mask is None else given.h_mask[rows],
        stay=[None if s is None else s[rows] for s in given.stay],
        part=given.part,
    )


_REVERSE = ((), (False,), (False, True))  # by the number of directions
_OURS = frozenset((Tensor, torch.nn.Parameter))


def in_one_call(
    forward: Callable[[Call, bool, bool], Result],
    backward: Callable[[Call, Result, OutputGradients, Wanted], Gradients],
) -> tuple[Any, Any, Any]:
    """``stacks``, ``layers`` and ``layers_backward`` of a backend that has these two, and whose
    backward does not read the final states. They take plain calls, whose tensors were checked,
    without what is a layer's own; they save what each layer does, and the output of all but the
    last. A stack of layers that are frozen in part is declined: those need no backward."""

    def layers(
        request: Request,
        x: Tensor,
        batch_sizes: Tensor | None,
        states: Sequence[Tensor],
        weights: Sequence[Tensor],
        given: Given,
        save: bool,
    ) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None:
        count = request.layers
        if request.order != TIME_FIRST or (count > 1 and request.dropout) or x.is_meta:
            return None
        if given.input_masks:
            return None
        if save and count > 1 and len({w.requires_grad for w in weights}) > 1:
            return None
        if not _OURS.issuperset(map(type, (x, *states, *weights))):
            return None
        if any([w.is_neg() for w in weights]):
            return None
        saved: list[Tensor] = []

        def run(
            layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
        ) -> tuple[Tensor, list[Tensor]]:
            result = forward(_call(request, x, batch_sizes, states, weights), save, False)
            if save:
                saved.extend(result.saved)
                if layer < count - 1:
                    saved.append(result.y)
            return result.y, result.states

        y, finals = one_by_one(request, x, states, ways(request, weights), run)
        return y, finals, saved

    def layers_backward(
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
        D, count = request.directions, request.layers
        each = (len(saved) - (count - 1)) // count
        of_all = ways(request, weights)
        found: list[Gradients] = []
        for layer in reversed(range(count)):
            here, first = slice(layer * D, (layer + 1) * D), layer * (each + 1)
            own, after = states, list(dstates)
            if count > 1:
                own = [s[here] for s in states]
                after = [d if d is None else d[here] for d in after]
            below = saved[first - 1] if layer else x
            gradients = backward(
                _call(request, below, batch_sizes, own, of_all[here]),
                Result(y, [], [], list(saved[first : first + each])),
                OutputGradients(dy, after, []),
                Wanted(wanted.x or layer > 0, wanted.states, wanted.weights),
            )
            found.append(gradients)
            y, dy = below, gradients.x
        found.reverse()
        before: list[Tensor | None] = [None] * len(dstates)
        if wanted.states:
            parts = zip(*[g.states for g in found if g.states is not None], strict=True)
            before = [torch.cat(part) if count > 1 else part[0] for part in parts]
        return [dy, *before, *[w for g in found for way in g.weights or () for w in way.given()]]

    return stacks, layers, layers_backward


def stacks(problem: Problem) -> bool:
    own = problem.reset or problem.h_mask or problem.trajectory or problem.zoneout
    lean = problem.training and problem.memory == "lean"
    return problem.mode == "plain" and problem.H is not None and not own and not lean


def _call(
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: list[Weights],
) -> Call:
    reverse, same = _REVERSE[request.directions], request.deterministic
    return Call(request.cell, x, batch_sizes, states, weights, reverse, deterministic=same)
