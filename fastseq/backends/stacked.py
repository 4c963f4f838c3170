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

#: (the layers, of which only the first has its x, save, trajectory of the last) -> their results
Together = Callable[[Sequence[Call], bool, bool], list[Result] | None]
#: (the layers, their results, their outputs' gradients, wanted) -> gradients
TogetherBackward = Callable[
    [Sequence[Call], Sequence[Result], Sequence[OutputGradients], Wanted], list[Gradients] | None
]
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
    together: tuple[Together, TogetherBackward] | None = None,
) -> tuple[Any, Any, Any]:
    """``stacks``, ``layers`` and ``layers_backward`` of a backend that has these two, keeps what
    :func:`.layout.side_by_side` says, and whose backward does not read the final states. They take
    plain calls, whose tensors were checked, without masks of inputs; they save what each layer
    does, the output of all but the last, and the trajectory. A stack of layers that are frozen in
    part is declined: those need no backward.

    together: what runs all layers of a stack at once, or gives None: then they run one by one."""

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

        def call_of(layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]) -> Call:
            own = of_layer(given, layer, request.directions)
            return _call(request, x, batch_sizes, states, weights, own)

        def keep(layer: int, result: Result) -> tuple[Tensor, list[Tensor]]:
            along.extend(result.trajectory)
            if save:
                saved.extend(result.saved)
                saved.extend(result.trajectory if layer == count - 1 else [result.y])
            return result.y, result.states

        def run(
            layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
        ) -> tuple[Tensor, list[Tensor]]:
            call = call_of(layer, x, states, weights)
            return keep(layer, forward(call, save, request.trajectory and layer == count - 1))

        of_all = ways(request, weights)
        results = None
        if together is not None and count > 1:
            calls = _calls(request, x, states, of_all, call_of)
            results = together[0](calls, save, request.trajectory)
        if results is None:
            y, finals = one_by_one(request, x, states, of_all, run)
        else:
            kept = [keep(layer, result) for layer, result in enumerate(results)]
            y = kept[-1][0]
            finals = [torch.cat(s) for s in zip(*(own for _, own in kept), strict=True)]
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
        # from the last layer to the first: what it was called with, gave, and is given
        found: list[Gradients] = []
        calls, results, gradients = [], [], []
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
            calls.append(call)
            results.append(Result(y, [], trajectory, kept))
            gradients.append(OutputGradients(dy if layer == count - 1 else None, after, dalong))
            y, trajectory, dalong = call.x, [], []
        at_once = None
        if together is not None and count > 1:
            at_once = together[1](calls[::-1], results[::-1], gradients[::-1], wanted)
        if at_once is not None:
            found, dx = at_once, at_once[0].x
        else:
            dx = dy
            for call, result, given_back in zip(calls, results, gradients, strict=True):
                given_back.y = dx
                is_first = len(found) == count - 1
                needs = Wanted(wanted.x or not is_first, wanted.states, wanted.weights)
                found.append(backward(call, result, given_back, needs))
                dx = found[-1].x
            found.reverse()
        before: list[Tensor | None] = [None] * len(dfinals)
        if wanted.states:
            parts = zip(*[g.states for g in found if g.states is not None], strict=True)
            before = [torch.cat(part) if count > 1 else part[0] for part in parts]
        return [dx, *before, *[w for g in found for way in g.weights or () for w in way.given()]]

    return stacks, layers, layers_backward


def _calls(
    request: Request,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Weights],
    call_of: Callable[[int, Tensor, list[Tensor], list[Weights]], Call],
) -> list[Call]:
    """Of all layers, as if each had the first one's x."""
    D = request.directions
    return [
        call_of(k, x, [s.narrow(0, k * D, D) for s in states], list(weights[k * D : (k + 1) * D]))
        for k in range(request.layers)
    ]


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
