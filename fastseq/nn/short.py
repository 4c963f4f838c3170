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
from ..backends.contract import BATCH_FIRST, NOTHING, ONE_STEP, TIME_FIRST, Given, Request
from ..ops import masks, whole
from ..ops.geometry import spread_reset
from ..ops.masks import Rates
from ..ops.modes import (
    autocasts,
    foreign,
    is_plain,
    only_default_devices,
    overridden,
    without_default_devices,
)
from . import flat_weights, learned
from .options import LayerOptions, options


def asked(module: Any, own: LayerOptions, all_states: bool = False) -> tuple[Any, ...]:
    """What a call of a layer asks for besides tensors: the values of a Request."""
    layers, training = module.num_layers, module.training
    return (
        module._fastseq_cell,
        layers,
        2 if module.bidirectional else 1,
        module.bias,
        module.proj_size > 0,
        BATCH_FIRST if module.batch_first else TIME_FIRST,
        own.deterministic,
        # a float that Dynamo reads makes it trace twice where dynamic=True
        module.dropout if layers > 1 and training else 0.0,
        training,
        all_states,
        own.memory,
        own.backend,
        module._fastseq_editable,
    )


def _made(values: tuple[Any, ...]) -> Request:
    """A Request of all its values; 0.2 us less than by its name."""
    return tuple.__new__(Request, values)


def _backend(
    module: Any,
    own: Any,
    input: Any,
    lean: bool,
    single: bool,
    rates: Rates | None = None,
    reset: bool = False,
    all_states: bool = False,
) -> tuple[str, Any] | None:
    """Name and module of the backend, where a call may go the short way. rates: what it masks."""
    if type(input) is not torch.Tensor or input.is_nested:
        return None
    device = "cpu" if input.is_cpu else input.device.type  # its type alone takes 0.2 us more
    ask: tuple[Any, ...] = (module._fastseq_cell, input.dtype, device, own.backend, lean, single)
    if rates is not None or reset or all_states:
        masks = (False, ()) if rates is None else (rates.recurrent_dropout > 0, rates.zoneout)
        ask = (*ask, *masks, reset, all_states)
    try:
        found = short_way(*ask)
    except (TypeError, ValueError):  # no backend is called so, which the long way says
        return None
    if found is None or not hasattr(found[1], "layers_backward") or not is_plain():
        return None
    return found


def _run(
    found: tuple[str, Any],
    request: Request,
    input: Tensor,
    states: Any,
    weights: Any,
    single: bool,
    given: Given = NOTHING,
) -> Any | None:
    """One call of the backend; a second with states copied where they are, say, expanded."""
    try:
        out = whole.run(found, request, input, None, states, weights, single, given)
        if out is None and states:
            dense = tuple([s.contiguous() for s in states])
            if any(d is not s for d, s in zip(dense, states, strict=True)):
                out = whole.run(found, request, input, None, dense, weights, single, given)
    except (AttributeError, RuntimeError):
        tensors = (input, *states, *weights)
        if foreign(tensors) or not all(isinstance(t, Tensor) for t in tensors):
            return None
        raise
    return out


def _is_a_step(request: Request, input: Tensor) -> bool:
    """Whether one layer runs one step, as in a decoder that calls it for each of its own."""
    if request.layers > 1 or request.directions > 1 or request.projected:
        return False
    rank = input.dim()
    return rank in (2, 3) and input.shape[request.order == BATCH_FIRST and rank == 3] == 1


def layers(
    module: Any, input: Any, hx: Any, reset: Any = None, all_states: Any = False
) -> Any | None:
    """What ``module(input, hx, reset=reset, all_states=all_states)`` returns; None where the long
    way is due."""
    if torch._C._len_torch_function_stack():
        if not only_default_devices():
            return None
        with without_default_devices():
            return layers(module, input, hx, reset, all_states)
    all_states = all_states or False
    own = module._fastseq or options(module)
    begin: Any = ()
    rates = None
    if not own.plain:
        if own.rates is not None and (module.training or own.rates.zoneout):
            rates = own.rates
        if hx is None and own.learn_state:
            begin = learned.plain_states(module, input)
            if begin is None:
                return None
    lean = own.memory != "full" and torch.is_grad_enabled()
    resets = reset is not None
    found = _backend(module, own, input, lean, False, rates, resets, all_states)
    if found is None:
        return None
    parameters = module._parameters
    try:
        weights = tuple([parameters[name] for names in module._all_weights for name in names])
    except KeyError:  # parametrized, or replaced by a tensor
        return None
    if module._fastseq_put is not None and (put := flat_weights.valid(module)) is not None:
        if len(put) != len(weights):
            return None
        weights = put
    if overridden(weights):
        return None
    if hx is None:
        states: tuple[Any, ...] = begin
    elif type(hx) is torch.Tensor:
        states = (hx,)
    elif type(hx) in (tuple, list) and len(hx) == 2 and type(hx[0]) is type(hx[1]) is torch.Tensor:
        states = tuple(hx)
    else:
        return None
    request = _made(asked(module, own, all_states))
    if rates is not None or resets or all_states:
        return _given(found, request, rates, reset, input, states, weights)
    single = torch.is_grad_enabled() and _is_a_step(request, input)
    out = _run(found, request, input, states, weights, single)
    if out is None:
        return None
    y, finals = out
    if request.order == BATCH_FIRST and input.dim() == 3:
        y = y.transpose(0, 1)
    return y, finals if len(finals) > 1 else finals[0]


def _given(
    found: tuple[str, Any],
    request: Request,
    rates: Rates | None,
    reset: Any,
    input: Tensor,
    states: Any,
    weights: tuple[Tensor, ...],
) -> Any | None:
    """The same of a layer that masks, or of a call that resets or asks for all states. Where the
    answer is None nothing was drawn, so that the long way draws the same."""
    count = len(request.definition.states)
    if input.dim() != 3 or weights[0].dim() != 2 or input.shape[2] != weights[0].shape[1]:
        return None
    if request.trajectory is not False and (request.trajectory is not True or count == 1):
        return None
    first = request.order == BATCH_FIRST
    x = input
    if first:
        x, request = input.transpose(0, 1), request._replace(order=TIME_FIRST)
    given, before = NOTHING, None
    if reset is not None:
        if type(reset) is not torch.Tensor or reset.dtype is not torch.bool:
            return None
        if reset.shape != input.shape[:2] or reset.device != input.device:
            return None
        reset = spread_reset(reset.transpose(0, 1) if first else reset, None, request.directions, 0)
    if rates is not None:
        before = torch.get_rng_state()
        try:
            given, weights = masks.given_plainly(request, rates, x, weights)
        except (IndexError, RuntimeError, ValueError):  # weights that do not fit one another
            torch.set_rng_state(before)
            return None
    if reset is not None:
        given = given._replace(reset=reset)
    out = _run(found, request, x, states, weights, False, given)
    if out is None:
        if before is not None:
            torch.set_rng_state(before)
        return None
    y, finals = out
    finals, along = finals[:count], finals[count:]
    state = finals if count > 1 else finals[0]
    if first:
        y, along = y.transpose(0, 1), tuple([c.transpose(0, 1) for c in along])
    if not request.trajectory:
        return y, state
    return y, state, along if len(along) > 1 else along[0]


def step(cell: Any, input: Any, states: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """The states after one step of a cell; None where the long way is due. states: all, or none."""
    if torch._C._len_torch_function_stack():
        if not only_default_devices():
            return None
        with without_default_devices():
            return step(cell, input, states)
    for state in states:
        if type(state) is not torch.Tensor:
            return None
    found = _backend(cell, options(cell), input, False, True)
    if found is None or input.dim() != 2:
        return None
    try:
        request, weights = _of_cell(cell)
    except KeyError:
        return None
    if overridden(weights):
        return None
    out = _run(found, request, input, states, weights, True)
    return None if out is None else out[1]


def checked_step(cell: Any, input: Tensor, hx: Sequence[Tensor]) -> Sequence[Tensor] | None:
    """The same by a backend whose autograd is torch's, of an input (B, I) and states (B, H) that
    were checked. A call by the long way costs 8 us more, and torch's cell function 20."""
    if torch._C._functorch.peek_interpreter_stack() is not None or autocasts(input):
        return None
    device = "cpu" if input.is_cpu else input.device.type
    backend = options(cell).backend
    found = short_way(cell._fastseq_cell, input.dtype, device, backend, False, True)
    if found is None or hasattr(found[1], "layers_backward"):
        return None
    try:
        request, weights = _of_cell(cell)
    except KeyError:
        return None
    return found[1].layers(request, input, None, hx, weights, NOTHING, False)[1]


def of_steps(cell: Any, input: Tensor) -> tuple[tuple[str, Any], Request, tuple[Any, ...]] | None:
    """What a loop of a cell's steps runs by itself, as :func:`step` does: the backend and its name,
    the request, and the weights; None where the cell has to be called."""
    found = _backend(cell, options(cell), input, False, True)
    if found is None:
        return None
    try:
        request, weights = _of_cell(cell)
    except KeyError:
        return None
    return None if overridden(weights) else (found, request, weights)


def _of_cell(cell: Any) -> tuple[Request, tuple[Any, ...]]:
    """What a cell asks for, and its weights. Raises KeyError where one is no parameter."""
    bias, own, name = cell.bias, cell._parameters, cell._fastseq_cell
    request = _made(
        (name, 1, 1, bias, False, ONE_STEP, False, 0.0, False, False, "full", None, False)
    )
    return request, tuple([own[w] for w in cell._fastseq_weights[bool(bias)]])
