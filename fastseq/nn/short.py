"""The short way of a module: a plain call becomes one call of a backend, by :mod:`..ops.whole`.

It is the long way but for the checks: the same request, the same choice
(:func:`..backends.choice.short_way`), the same Function. What is not plain goes the long way, which
says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.choice import short_way
from ..backends.contract import BATCH_FIRST, ONE_STEP, Request
from ..ops import whole
from ..ops.modes import autocasts, is_plain


def _made(asked: tuple[Any, ...]) -> Request:
    """A Request of all its values; 0.2 us less than by its name."""
    return tuple.__new__(Request, asked)


def _backend(module: Any, input: Any, lean: bool, single: bool) -> tuple[str, Any] | None:
    """Name and module of the backend, where a call may go the short way."""
    if type(input) is not torch.Tensor or input.is_nested:
        return None
    device = "cpu" if input.is_cpu else input.device.type  # its type alone takes 0.2 us more
    try:
        found = short_way(module.cell, input.dtype, device, module.backend, lean, single)
    except (TypeError, ValueError):  # no backend is called so, which the long way says
        return None
    if found is None or not hasattr(found[1], "layers_backward") or not is_plain():
        return None
    return found


def layers(module: Any, input: Any, hx: Any) -> Any | None:
    """What ``module(input, hx)`` returns; None where the long way is due."""
    if module._rates is not None:
        return None
    lean = module.memory != "full" and torch.is_grad_enabled()
    found = _backend(module, input, lean, False)
    if found is None:
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
    request = _made(module._call_values(False))
    out = whole.run(found, request, input, None, states, weights)
    if out is None:
        return None
    y, finals = out
    if request.order == BATCH_FIRST and input.dim() == 3:
        y = y.transpose(0, 1)
    return y, finals if len(finals) > 1 else finals[0]


def step(cell: Any, input: Any, hx: Any) -> tuple[torch.Tensor, ...] | None:
    """The states after one step of a cell; None where the long way is due. hx: as many, or none."""
    found = _backend(cell, input, False, True)
    if found is None or input.dim() != 2:
        return None
    try:
        request, weights = _of_cell(cell)
    except KeyError:
        return None
    out = whole.run(found, request, input, None, tuple(hx) if hx else (), weights)
    return None if out is None else out[1]


def checked_step(cell: Any, input: Tensor, hx: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The same by a backend whose autograd is torch's, of an input (B, I) and states (B, H) that
    were checked. A call by the long way costs 8 us more, and torch's cell function 20."""
    if torch._C._functorch.peek_interpreter_stack() is not None or autocasts(input):
        return None
    device = "cpu" if input.is_cpu else input.device.type
    found = short_way(cell.cell, input.dtype, device, cell.backend, False, True)
    if found is None or hasattr(found[1], "layers_backward"):
        return None
    try:
        request, weights = _of_cell(cell)
    except KeyError:
        return None
    return found[1].layers(request, input, None, hx, weights, (), False)[1]


def _of_cell(cell: Any) -> tuple[Request, tuple[Any, ...]]:
    """What a cell asks for, and its weights. Raises KeyError where one is no parameter."""
    bias, own = cell.bias, cell._parameters
    request = _made(
        (cell.cell, 1, 1, bias, False, ONE_STEP, False, 0.0, False, False, "full", None, False)
    )
    if not bias:
        return request, (own["weight_ih"], own["weight_hh"])
    return request, (own["weight_ih"], own["weight_hh"], own["bias_ih"], own["bias_hh"])
