"""The layers of a stack one after another: the one loop over them in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .contract import Request, Weights

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
