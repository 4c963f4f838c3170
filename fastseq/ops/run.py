"""The way from a stack of layers, its tensors checked, to a backend and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import _VF, Tensor
from torch.nn.utils.rnn import pack_padded_sequence

from ..backends import DIFFERENTIABLE, STEPPING, choice, load
from ..backends.contract import NOTHING, TIME_FIRST, Given, Problem, Weights, ways
from ..backends.stacked import dropped, one_by_one
from ..backends.tracing import is_tracing
from . import autograd, masks, modes, onnx, whole
from .autograd import RecurrenceFunction
from .geometry import Packed, Padded, spread_reset
from .library import make_call
from .stack import Stack, problem, zero_states

#: In a graph that is traced a step of a cell is this backend's, or no call of a whole stack.
STEPS = load(STEPPING)
#: y, the final states (layers * D, B, ...), and the other states of the last layer at every step
Outputs = tuple[Tensor, list[Tensor], list[Tensor]]


def run(stack: Stack) -> tuple[Any, list[Tensor], list[Any]]:
    """The output, the final states, and if asked for the other states at every step, in the
    caller's form."""
    if not modes.autocasts(stack.data):
        return _run(stack)
    _autocast(stack)
    # off inside: the backends choose their types, and float32 is meant where they say so
    with torch.autocast(stack.data.device.type, enabled=False):
        return _run(stack)


def _autocast(stack: Stack) -> None:
    """Under autocast all tensors take its dtype; gates and carried states stay float32 inside."""
    dtype = torch.get_autocast_dtype(stack.data.device.type)
    stack.x = stack.geometry.cast(stack.x, dtype)
    stack.data = stack.geometry.numbers(stack.x)
    stack.states = [s.to(dtype) for s in stack.states]
    stack.weights = [w.to(dtype) for w in stack.weights]
    if stack.h_mask is not None:
        stack.h_mask = stack.h_mask.to(dtype)
    stack.cast = True


def _run(stack: Stack) -> tuple[Any, list[Tensor], list[Any]]:
    request, geometry = stack.request, stack.geometry
    if is_tracing() and isinstance(geometry, Padded):
        return _run_padded(stack, geometry)
    single = stack.single
    if not single and modes.is_exporting() and onnx.is_exporting():
        reason = onnx.reason_against(stack)
        if reason is None:
            return onnx.run(stack)
        if request.backend != DIFFERENTIABLE:
            raise NotImplementedError(
                f"torch.onnx.export: {reason}. With backend={DIFFERENTIABLE!r} the layer is "
                "exported step by step, for one number of steps."
            )
    task = problem(stack)
    if task.mode == "compile":
        name = choice.select_constant(request.backend, *task)
        steps = single and choice.in_one_call_constant(name, *task)
        module = STEPS if steps else None
    else:
        name = choice.select(task, request.backend)
        module = choice.in_one_call(name, task)
    if single and module is not None and not hasattr(module, "layers_backward"):
        return _one_step(stack, module)
    _to_rows(stack)
    outputs = None if module is None else _in_one_call(stack, name, module)
    y, finals, along = outputs or _one_by_one(stack, task, name, module)
    if task.training and not geometry.copies:
        finals = editable(finals)
        if request.editable:
            y = editable([y])[0]
    return (
        geometry.output(y),
        [geometry.final(s) for s in finals],
        [geometry.output(c) for c in along],
    )


def _run_padded(stack: Stack, geometry: Padded) -> tuple[Any, list[Tensor], list[Any]]:
    """A padded input, of whose lengths torch.jit.trace records no value, by torch's way to packed
    rows and back. That takes no empty sequence: one step of it runs, and is thrown away."""
    lengths, first = geometry.lengths, geometry.batch_first
    full = (lengths != 0).to(stack.data.device)
    rows = full[:, None, None] if first else full[:, None]
    steps = torch.where(lengths != 0, lengths, 1).to("cpu")
    data = torch.where(rows, stack.data, 0)
    x = pack_padded_sequence(data, steps, first, enforce_sorted=False)
    starts: Sequence[Any] = stack.states
    stack.x, stack.data, stack.geometry = x, x.data, Packed(x, first, None, ())
    if stack.reset is not None:
        stack.reset = stack.reset[: stack.geometry.T]
    y, finals, along = _run(stack)

    def padded(y: Any) -> Tensor:
        # pad_packed_sequence, but that compares the T of the example
        dense, _ = _VF._pad_packed_sequence(y.data, y.batch_sizes, first, 0.0, geometry.T)
        dense = dense.index_select(0 if first else 1, y.unsorted_indices)
        return torch.where(rows, dense, 0)

    kept = [
        torch.where(full[:, None], final, start)
        for final, start in zip(finals, starts or [0] * len(finals), strict=True)
    ]
    return padded(y), kept, [padded(c) for c in along]


def editable(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs that the caller may edit in place before backward: final states, as torch.nn's, and
    the output of all but the LSTM.

    Backward reads the output of a kernel of ours, so the caller gets a copy: of a layer's y,
    1/(G+2) of the bytes that training moves through memory.
    """
    if torch.compiler.is_compiling():
        return list(outputs)
    if modes.in_transform():  # whose levels hide the Function
        return [o.clone() if modes.tracked(o) else o for o in outputs]
    return [
        o.clone() if getattr(o.grad_fn, "_forward_cls", None) is RecurrenceFunction else o
        for o in outputs
    ]


def _one_step(stack: Stack, module: Any) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """One step of a cell by a backend whose autograd is torch's."""
    geometry: Any = stack.geometry
    x, states = geometry.batch(stack.x), [geometry.batch(s) for s in stack.states]
    _, finals, _ = module.layers(stack.request, x, None, states, stack.weights, NOTHING, False)
    finals = [geometry.single(s) for s in finals]
    return finals[0], finals, []


def _to_rows(stack: Stack) -> None:
    """All tensors of a stack as backends take them."""
    geometry = stack.geometry
    geometry.pack()
    stack.x = geometry.rows(stack.x)
    stack.states = [geometry.state(s) for s in stack.states]
    if stack.request.order != TIME_FIRST:
        stack.request = stack.request._replace(order=TIME_FIRST)
    if not stack.states and (geometry.hides_batch or is_tracing()):
        stack.states = zero_states(stack, stack.x)
    if geometry.order is None:
        return
    if stack.reset is not None:
        stack.reset = geometry.sorted(stack.reset, 1)
    if stack.h_mask is not None:
        stack.h_mask = geometry.sorted(stack.h_mask, 1)
    if stack.input_masks is not None:
        stack.input_masks = [geometry.sorted(mask, 0) for mask in stack.input_masks]
    if stack.zoneout is not None and stack.zoneout.ids is not None:
        stack.zoneout.ids = geometry.sorted(stack.zoneout.ids, 0)


def _in_one_call(stack: Stack, name: str, module: Any) -> Outputs | None:
    """All layers in one call; None where the backend does not take these tensors."""
    x, request, sizes = stack.x, stack.request, stack.geometry.batch_sizes
    if not hasattr(module, "layers_backward"):
        if stack.input_masks is not None:
            if request.layers > 1:
                return None
            x = masks.mask_input(x, stack.input_masks[0], sizes)
        y, finals, _ = module.layers(request, x, sizes, stack.states, stack.weights, NOTHING, False)
        return y, list(finals), []
    # the caller's own tensor: a view of a subclass may be none, as when a checkpoint runs again
    if not modes.is_plain() or type(stack.data) not in (Tensor, torch.nn.Parameter):
        return None
    states, weights = tuple(stack.states), tuple(stack.weights)
    out = whole.run((name, module), request, x, sizes, states, weights, given=_given(stack))
    if out is None:
        return None
    n = len(request.definition.states)
    return out[0], list(out[1][:n]), list(out[1][n:])


def _given(stack: Stack) -> Given:
    """What the stack has besides input, states and weights, as a backend takes it."""
    request, sizes, D = stack.request, stack.geometry.batch_sizes, stack.request.directions
    reset = None
    if stack.reset is not None:
        reset = spread_reset(stack.reset, sizes, D, stack.x.shape[0])
    stay, part = _stays(stack, range(request.layers), stack.x)
    return Given((), tuple(stack.input_masks or ()), reset, stack.h_mask, tuple(stay), part)


def _stays(
    stack: Stack, layers: Sequence[int], x: Tensor
) -> tuple[list[Tensor | None], tuple[float, ...]]:
    """Where the states of these layers stay as they were, and what part of them does."""
    if stack.zoneout is None:
        return [], ()
    widths = (stack.P, *(stack.H,) * len(stack.cell.other_states))
    sizes, D = stack.geometry.batch_sizes, stack.request.directions
    return masks.stays(stack.zoneout, layers, D, x, sizes, widths)


def _one_by_one(stack: Stack, task: Problem, name: str, module: Any) -> Outputs:
    """The layers one after another, each by a call of its own."""
    request, D, sizes = stack.request, stack.request.directions, stack.geometry.batch_sizes
    reset = None
    if stack.reset is not None:
        reset = spread_reset(stack.reset, sizes, D, stack.x.shape[0])
    along: list[Tensor] = []

    def masked(layer: int, x: Tensor) -> Tensor:
        if layer:
            x = dropped(request, x)
        return masks.mask_input(x, stack.input_masks[layer], sizes)  # type: ignore[index]

    def by_torch(
        layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
    ) -> tuple[Tensor, list[Tensor]]:
        one = request._replace(layers=1, dropout=0.0)
        flat = [w for way in weights for w in way.given()]
        y, finals, _ = module.layers(one, x, sizes, states, flat, NOTHING, False)
        return y, list(finals)

    def by_operator(
        layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
    ) -> tuple[Tensor, list[Tensor]]:
        nonlocal along
        h_mask = None if stack.h_mask is None else stack.h_mask.narrow(0, layer * D, D)
        stay, part = _stays(stack, (layer,), x)
        trajectory = request.trajectory and layer == request.layers - 1
        y, finals, along = _layer(
            stack, name, task.training, x, states, weights, reset, h_mask, stay, part, trajectory
        )
        return y, finals

    y, finals = one_by_one(
        request,
        stack.x,
        stack.states,
        ways(request, stack.weights),
        by_operator if module is None or hasattr(module, "layers_backward") else by_torch,
        None if stack.input_masks is None else masked,
    )
    if task.training and task.mode == "compile":
        # Backward reads these, and in a graph nothing notices when they are edited in place. Where
        # they are not, inductor takes the copies out, but not those of the states, which may be
        # edited behind the graph.
        y, along = y.clone(), [c.clone() for c in along]
        if request.layers == 1:
            finals = torch.ops.fastseq.copies(finals)
    return y, finals, along


def _layer(
    stack, name, training, x, states, weights, reset, h_mask, stay, part, trajectory
) -> Outputs:
    """One layer by a backend behind our own operator, or by one that autograd sees through."""
    request, sizes = stack.request, stack.geometry.batch_sizes
    reverse = (False, True)[: request.directions]
    flat = [w for way in weights for w in way.flat()]
    n = len(request.definition.states)
    if choice.sees_through(name):
        module = autograd.eager if name == DIFFERENTIABLE else load(name)

        def forward(x, states, flat):
            call = make_call(
                request.cell,
                x,
                sizes,
                states,
                flat,
                reverse,
                reset,
                h_mask,
                stay,
                part,
                request.memory,
            )
            result = module.forward(call, False, trajectory)
            return (result.y, *result.states, *result.trajectory)

        if training and request.memory == "lean":
            outputs = torch.utils.checkpoint.checkpoint(
                forward, x, states, flat, use_reentrant=False, preserve_rng_state=False
            )
        else:
            outputs = forward(x, states, flat)
    else:
        layout = autograd.Layout(
            request.cell,
            name,
            reverse,
            request.memory,
            request.deterministic,
            trajectory,
            len(states),
            len(flat),
            len(stay),
            part,
        )
        arguments = (layout, x, sizes, reset, h_mask, *states, *flat, *stay)
        if training:
            outputs = autograd.differentiable_recurrence(*arguments)
        else:
            outputs = autograd.recurrence(*arguments, save=False)
    return outputs[0], list(outputs[1 : 1 + n]), list(outputs[1 + n :])
