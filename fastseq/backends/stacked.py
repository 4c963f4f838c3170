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
from .layout import side_by_side

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
    """``stacks``, ``layers`` and ``layers_backward`` of a backend that has these two, keeps what
    :func:`.layout.side_by_side` says, and whose backward does not read the final states. They take
    plain calls, whose tensors were checked, without masks of inputs; they save what each layer
    does, the output of all but the last, and the trajectory. A stack of layers that are frozen in
    part is declined: those need no backward."""

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
        tensors = (x, *states, *weights, *_tensors(given))
        if not _OURS.issuperset(map(type, tensors)):
            return None
        if any([w.is_neg() for w in weights]):
            return None
        saved: list[Tensor] = []
        along: list[Tensor] = []

        def run(
            layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
        ) -> tuple[Tensor, list[Tensor]]:
            own = of_layer(given, layer, request.directions)
            last = layer == count - 1
            call = _call(request, x, batch_sizes, states, weights, own)
            result = forward(call, save, request.trajectory and last)
            along.extend(result.trajectory)
            if save:
                saved.extend(result.saved)
                saved.extend(result.trajectory if last else [result.y])
            return result.y, result.states

        y, finals = one_by_one(request, x, states, ways(request, weights), run)
        return y, [*finals, *along], saved

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
        others = request.definition.other_states
        dfinals, dalong = dstates[: 1 + len(others)], list(dstates[1 + len(others) :])
        of_all = ways(request, weights)
        rest = list(saved)
        trajectory = _last(rest, len(others)) if request.trajectory else []
        found: list[Gradients] = []
        for layer in reversed(range(count)):
            here = slice(layer * D, (layer + 1) * D)
            own, after = states, list(dfinals)
            if count > 1:
                own = [s[here] for s in states]
                after = [d if d is None else d[here] for d in after]
            given_here = of_layer(given, layer, D)
            call = _call(request, x, batch_sizes, own, of_all[here], given_here)
            kept = _last(rest, len(side_by_side(call, (), bool(trajectory))))
            if layer:
                call.x = rest.pop()
            gradients = backward(
                call,
                Result(y, [], trajectory, kept),
                OutputGradients(dy, after, dalong),
                Wanted(wanted.x or layer > 0, wanted.states, wanted.weights),
            )
            found.append(gradients)
            y, dy, trajectory, dalong = call.x, gradients.x, [], []
        found.reverse()
        before: list[Tensor | None] = [None] * len(dfinals)
        if wanted.states:
            parts = zip(*[g.states for g in found if g.states is not None], strict=True)
            before = [torch.cat(part) if count > 1 else part[0] for part in parts]
        return [dy, *before, *[w for g in found for way in g.weights or () for w in way.given()]]

    return stacks, layers, layers_backward


def stacks(problem: Problem) -> bool:
    lean = problem.training and problem.memory == "lean"
    return problem.mode == "plain" and problem.H is not None and not lean


def _tensors(given: Given) -> list[Tensor]:
    own = (given.reset, given.h_mask, *given.stay)
    return [t for t in own if t is not None]


def _last(rest: list[Tensor], count: int) -> list[Tensor]:
    """The last ones of a list, taken out of it."""
    first = len(rest) - count
    found = rest[first:]
    del rest[first:]
    return found


def _call(
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: list[Weights],
    given: Given,
) -> Call:
    return Call(
        request.cell,
        x,
        batch_sizes,
        states,
        weights,
        _REVERSE[request.directions],
        given.reset,
        given.h_mask,
        deterministic=request.deterministic,
        stay=given.stay,
        part=given.part,
    )
