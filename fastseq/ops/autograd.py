"""The only autograd of the library: one Function over the operators, and one for its backward.

The backward of the backward recomputes the layer in the eager form and differentiates that twice,
so second and higher derivatives exist for every backend.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends import DIFFERENTIABLE, load
from ..cells import CELLS
from . import batching, library
from .library import Layout, make_call
from .modes import in_transform, only_default_devices

#: The form that autograd sees through, from which derivatives of every order come.
eager = load(DIFFERENTIABLE)


def needs_no_operator(*tensors: Tensor | None) -> bool:
    """Whether nobody but the kernels has to see a call: then the operator, 15 us, is left out.

    No tracer, profile, transform or mode is active, and no tensor stands for something else, or for
    nothing, as on the meta device.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.autograd._profiler_enabled()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not only_default_devices())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or tensors[0].is_meta  # type: ignore[union-attr]
    ) and _PLAIN.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def parts_of(layout: Layout, tensors: Sequence[Any]) -> tuple[Any, Any, Any]:
    """States, weights, and where the states stay."""
    n, last = layout.n_states, layout.n_states + layout.n_weights
    return tensors[:n], tensors[n:last], tensors[last:]


def operator(
    layout: Layout,
    x: Tensor,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h_mask: Tensor | None,
    *tensors: Tensor | None,
) -> list[Tensor]:
    """The operator: y, final states, trajectory and what it saves."""
    states, weights, stay = parts_of(layout, tensors)
    run: Any = library.recurrence
    if not needs_no_operator(x, *tensors):
        run = library.overload(torch.ops.fastseq.recurrence, layout, x)
    return run(
        layout.cell,
        layout.backend,
        x,
        batch_sizes,
        states,
        weights,
        layout.reverse,
        reset,
        h_mask,
        stay,
        layout.part,
        layout.memory,
        layout.deterministic,
        layout.save,
        layout.trajectory,
    )


def takes_anything(function: Any) -> Any:
    """Spare Function.apply the reading of a signature: 25 us a call, and no defaults to fill in."""
    anything = inspect.Parameter("args", inspect.Parameter.VAR_POSITIONAL)
    function.__signature__ = inspect.Signature([anything])
    return function


class RecurrenceFunction(torch.autograd.Function):
    """(layout, x, batch_sizes, reset, h_mask, *states, *weights, *stay)
    -> (y, *states, *trajectory, *saved)"""

    @staticmethod
    @takes_anything
    def forward(layout, x, batch_sizes, reset, h_mask, *tensors):
        return tuple(operator(layout, x, batch_sizes, reset, h_mask, *tensors))

    @staticmethod
    def vmap(info: Any, in_dims: Any, layout: Layout, *tensors: Any) -> Any:
        run = beneath(RecurrenceFunction, tensors)
        return batching.forward(run, layout, info.batch_size, in_dims[1:], tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layout = inputs[0]
        ctx.layout = layout
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[layout.n_outputs :])
        ctx.save_for_backward(*inputs[1:], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        layout = ctx.layout
        saved = ctx.saved_tensors
        inputs, outputs = saved[: layout.n_inputs], saved[layout.n_inputs :]
        used = grads[: layout.n_outputs]
        if all(g is None for g in used):
            return (None,) * (1 + layout.n_inputs)
        if not torch.compiler.is_compiling():
            if any(map(is_batched, used)):
                # for is_grads_batched, whose vmap knows torch's operations alone
                eagerly = partial(eager_outputs, layout)
                return (None, *gradients_again(eagerly, inputs, ctx.needs_input_grad[1:], used))
            if torch.autograd.forward_ad._current_level >= 0:  # a kernel would lose the tangents
                return (None, *eager_gradients(layout, inputs, ctx.needs_input_grad[1:], used))
        need = ctx.needs_input_grad
        first_weight = 5 + layout.n_states
        wanted = (need[1], any(need[5:first_weight]), any(need[first_weight:]))
        # without create_graph nobody differentiates further: no second Function, 30 us less
        function = RecurrenceBackwardFunction
        within = torch.is_grad_enabled() or in_transform()
        differentiate = function.apply if within else function.forward
        flat = differentiate(layout, wanted, *inputs, *used, *outputs)
        return (None, *spread(layout, wanted, inputs, flat))


def beneath(function: Any, tensors: Sequence[Any]) -> Any:
    """How a vmap rule calls its Function: without autograd's record where nobody follows."""
    follows = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in tensors
    )
    return function.apply if follows or in_transform() else function.forward


def eager_outputs(layout: Layout, inputs: Sequence[Any]) -> tuple[Tensor, ...]:
    """What :func:`recurrence` gives a caller, in the eager form. inputs: all but the layout."""
    x, batch_sizes, reset, h_mask, *rest = inputs
    states, weights, stay = parts_of(layout, rest)
    call = make_call(
        layout.cell,
        x,
        batch_sizes,
        states,
        weights,
        layout.reverse,
        reset,
        h_mask,
        stay,
        layout.part,
        layout.memory,
    )
    result = eager.forward(call, save=False, trajectory=layout.trajectory)
    return (result.y, *result.states, *result.trajectory)


def is_batched(gradient: Tensor | None) -> bool:
    return gradient is not None and torch._C._functorch.is_legacy_batchedtensor(gradient)


def gradients_again(
    outputs_of: Callable[[list[Any]], Sequence[Tensor]],
    inputs: Sequence[Any],
    need: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Those of another way to the same outputs: ``outputs_of(inputs)``, run once more."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # a view of each, so that a tensor that serves as two inputs has two gradients
        views = [t.view_as(t) if n else t for t, n in zip(inputs, need, strict=True)]
        outputs = outputs_of(views)
    live = [k for k, g in enumerate(grads) if g is not None]
    found = list(
        torch.autograd.grad(
            [outputs[k] for k in live],
            [t for t, n in zip(views, need, strict=True) if n],
            [grads[k] for k in live],
            allow_unused=True,
            create_graph=create_graph,
        )
    )
    return [found.pop(0) if n else None for n in need]


def eager_gradients(
    layout: Layout,
    inputs: Sequence[Any],
    need: Sequence[bool],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """For a backward under forward-mode AD: the eager form's, which carries tangents."""
    chosen = [k for k, n in enumerate(need) if n]
    live = [k for k, g in enumerate(grads) if g is not None]

    def outputs_of(*primals: Tensor) -> tuple[Tensor, ...]:
        full = list(inputs)
        for k, value in zip(chosen, primals, strict=True):
            full[k] = value
        outputs = eager_outputs(layout, full)
        return tuple(outputs[k] for k in live)

    _, pull = torch.func.vjp(outputs_of, *(inputs[k] for k in chosen))[:2]
    found = iter(pull(tuple(grads[k] for k in live)))
    return [next(found) if n else None for n in need]


def spread(
    layout: Layout, wanted: Sequence[bool], inputs: Sequence[Any], flat: Sequence[Tensor]
) -> list[Tensor | None]:
    """The operator's gradients in the places of the inputs they belong to."""
    rest = list(flat)
    grads: list[Tensor | None] = [rest.pop(0) if wanted[0] else None, None, None, None]
    n_states = len(CELLS[layout.cell].states)
    dstates = [rest.pop(0) for _ in range(n_states)] if wanted[1] else [None] * n_states
    grads += dstates[: layout.n_states]
    first = 4 + layout.n_states
    for weight in inputs[first : first + layout.n_weights]:
        grads.append(rest.pop(0) if wanted[2] and weight is not None else None)
    return grads + [None] * layout.n_stay


class RecurrenceBackwardFunction(torch.autograd.Function):
    """The wanted gradients, as a differentiable function of inputs and output gradients."""

    @staticmethod
    @takes_anything
    def forward(layout, wanted, *tensors):
        x, batch_sizes, reset, h_mask, *rest = tensors[: layout.n_inputs]
        states, weights, stay = parts_of(layout, rest)
        end = layout.n_inputs + layout.n_outputs
        dy, *others = tensors[layout.n_inputs : end]
        outputs = tensors[end:]
        n = len(CELLS[layout.cell].states)
        run: Any = library.recurrence_backward
        if not needs_no_operator(*tensors):
            run = library.overload(torch.ops.fastseq.recurrence_backward, layout, x)
        return tuple(
            run(
                layout.cell,
                layout.backend,
                x,
                batch_sizes,
                states,
                weights,
                layout.reverse,
                reset,
                h_mask,
                stay,
                layout.part,
                layout.memory,
                layout.deterministic,
                outputs,
                dy,
                others[:n],
                others[n:],
                layout.trajectory,
                wanted,
            )
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, layout: Layout, wanted: Any, *tensors: Any) -> Any:
        run = beneath(RecurrenceBackwardFunction, tensors)
        return batching.backward(run, layout, wanted, info.batch_size, in_dims[2:], tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layout, wanted, *tensors = inputs
        ctx.layout, ctx.wanted = layout, wanted
        end = layout.n_inputs + layout.n_outputs
        ctx.n_outputs = len(tensors) - end
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:end])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        layout = ctx.layout
        inputs = ctx.saved_tensors[: layout.n_inputs]
        grads = ctx.saved_tensors[layout.n_inputs :]
        last = layout.n_inputs - layout.n_stay
        live_inputs = [k for k in (0, *range(4, last)) if inputs[k] is not None]
        live_grads = [k for k, g in enumerate(grads) if g is not None]
        n_live = len(live_inputs)

        def outputs_of(*primals: Tensor) -> tuple[Tensor, ...]:
            """The layer in the eager form, of the inputs that can have a gradient."""
            full = list(inputs)
            for k, value in zip(live_inputs, primals, strict=True):
                full[k] = value
            outputs = eager_outputs(layout, full)
            return tuple(outputs[k] for k in live_grads)

        def gradients_of(*arguments: Tensor) -> tuple[Tensor, ...]:
            """What forward computed, the flat gradients that are wanted, differentiably."""
            _, pull = torch.func.vjp(outputs_of, *arguments[:n_live])[:2]
            placed: list[Any] = [None] * len(inputs)
            for k, gradient in zip(live_inputs, pull(arguments[n_live:]), strict=True):
                placed[k] = gradient
            states, weights, _ = parts_of(layout, placed[4:])
            flat = [placed[0]] if ctx.wanted[0] else []
            flat += states if ctx.wanted[1] else []
            flat += [w for w in weights if w is not None] if ctx.wanted[2] else []
            return tuple(flat)

        arguments = [inputs[k] for k in live_inputs] + [grads[k] for k in live_grads]
        values, pull = torch.func.vjp(gradients_of, *arguments)[:2]
        results = list(
            pull(
                tuple(
                    torch.zeros_like(value) if c is None else c
                    for value, c in zip(values, cotangents, strict=True)
                )
            )
        )
        placed: list[Tensor | None] = [None] * (len(inputs) + len(grads) + ctx.n_outputs)
        for k in live_inputs:
            placed[k] = results.pop(0)
        for k in live_grads:
            placed[len(inputs) + k] = results.pop(0)
        return (None, None, *placed)


def differentiable_recurrence(
    layout: Layout,
    x: Tensor,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h_mask: Tensor | None,
    *tensors: Tensor | None,
) -> tuple[Tensor, ...]:
    """y, final states and trajectory, with gradients of every order."""
    outputs = RecurrenceFunction.apply(layout, x, batch_sizes, reset, h_mask, *tensors)
    return outputs[: layout.n_outputs]


def recurrence(
    layout: Layout,
    x: Tensor,
    batch_sizes: Tensor | None,
    reset: Tensor | None,
    h_mask: Tensor | None,
    *tensors: Tensor | None,
    save: bool = False,
) -> Sequence[Tensor]:
    """The same without gradients."""
    layout = Layout(*layout[:-1], save)
    # under torch.func too it is the Function that knows what to do
    run = RecurrenceFunction.apply if in_transform() else operator
    return run(layout, x, batch_sizes, reset, h_mask, *tensors)
