"""The short way of a module: a plain call becomes one of the C++ kernels, by :mod:`..ops.whole`."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import whole


def _may(module: Any, input: Any) -> bool:
    return (
        whole.serves(module.cell)
        and module.backend in (None, "native")
        and type(input) is torch.Tensor
        and input.is_cpu
        and input.dtype in whole.DTYPES
        and not input.is_nested
        and not input.is_neg()  # else its data are its numbers
        and whole.is_plain()
    )


def run(module: Any, input: Any, hx: Any) -> Any | None:
    """What ``module(input, hx)`` returns; None where the long way is due."""
    if not _may(module, input):
        return None
    if module._rates is not None:
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
        whole.BATCH_FIRST if batch_first else whole.TIME_FIRST,
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


def step(cell: Any, input: Any, hx: Any) -> tuple[torch.Tensor, ...] | None:
    """The states after one step of a cell; None where the long way is due. hx: as many, or none."""
    if not _may(cell, input) or input.dim() != 2:
        return None
    parameters = cell._parameters
    try:
        weights = [parameters["weight_ih"], parameters["weight_hh"]]
        if cell.bias:
            weights += [parameters["bias_ih"], parameters["bias_hh"]]
    except KeyError:
        return None
    shape = whole.Shape(cell.cell, 1, 1, cell.bias, False, whole.ONE_STEP, False, 0.0)
    out = whole.run(shape, input, None, tuple(hx) if hx else (), tuple(weights))
    return None if out is None else out[1]
