"""The short way of a module: a plain call becomes one of the C++ kernels, by :mod:`..ops.whole`."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import whole


def run(module: Any, input: Any, hx: Any) -> Any | None:
    """What ``module(input, hx)`` returns; None where the long way is due."""
    if not whole.serves(module.cell) or module.backend not in (None, "native"):
        return None
    if type(input) is not torch.Tensor or input.is_neg():  # else its data are its numbers
        return None
    if module._rates is not None or not whole.is_plain():
        return None
    if module.memory != "full" and torch.is_grad_enabled():
        return None
    parameters = module._parameters
    try:
        weights = tuple([parameters[name] for names in module._all_weights for name in names])
    except KeyError:  # parametrized, or replaced by a tensor
        return None
    if hx is None:
        states: tuple[Any, ...] = ()
    elif type(hx) is torch.Tensor:
        states = (hx,)
    elif type(hx) is tuple and len(hx) == 2 and type(hx[0]) is type(hx[1]) is torch.Tensor:
        states = hx
    else:
        return None
    layers, batch_first = module.num_layers, module.batch_first
    shape = whole.Shape(
        module.cell,
        layers,
        2 if module.bidirectional else 1,
        module.bias,
        module.proj_size > 0,
        batch_first,
        module.deterministic,
        module.dropout if layers > 1 and module.training else 0.0,
    )
    out = whole.run(shape, input, None, states, weights)
    if out is None:
        return None
    y, finals = out
    if batch_first and input.dim() == 3:
        y = y.transpose(0, 1)
    return y, finals if len(finals) > 1 else finals[0]
