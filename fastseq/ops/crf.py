"""Chains of tags for users: operators, gradients of every order, vmap, and the checks of values.

:mod:`fastseq.backends.crf` has the equations. Scores of 16 bits are computed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import crf as rooms
from ..backends.crf import Chain
from . import library
from .autograd import beneath, gradients_again, is_batched, needs_no_operator, takes_anything
from .library import as_given, as_numbers, negated, register_fake
from .modes import in_transform, mode

_SCORES = "Tensor emissions, Tensor? lengths, Tensor start, Tensor end, Tensor transitions"
library.library.define(f"crf(str backend, {_SCORES}, Tensor? tags, bool save) -> Tensor[]")
library.library.define(
    f"crf_backward(str backend, {_SCORES}, Tensor? tags, Tensor u, Tensor dvalue, "
    "bool wants_parameters) -> Tensor[]"
)
library.library.define(f"crf_viterbi(str backend, {_SCORES}, int n) -> (Tensor, Tensor)")
library.library.define("crf_lengths(Tensor mask) -> Tensor")

#: The room that autograd sees through.
eager = rooms.load(rooms.DIFFERENTIABLE)


def room_of(backend: str) -> Any:
    """A program that another machine exported may name a room that this one has not."""
    room = rooms.load(backend)
    if isinstance(room, str):
        raise RuntimeError(f"fastseq::crf: backend {backend!r} is not available: {room}")
    return room


def check_tags(tags: Tensor, lengths: Tensor | None, K: int) -> None:
    """Tags within the lengths are from 0 to K - 1. On a GPU the device asserts it, and nobody
    waits for it."""
    wrong = (tags < 0) | (tags >= K)
    if lengths is not None:
        steps = torch.arange(len(tags), device=tags.device)
        wrong &= steps[:, None] < lengths
    if tags.device.type == "cuda":
        torch._assert_async(~wrong.any(), f"tags: expected 0 to {K - 1} within the lengths")
    elif wrong.any():
        t, b = wrong.nonzero()[0].tolist()
        raise IndexError(
            f"tags: expected 0 to {K - 1}, got {int(tags[t, b])} at step {t} of sequence {b}"
        )


def crf(
    backend: str,
    emissions: Tensor,
    lengths: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    tags: Tensor | None,
    save: bool,
) -> list[Tensor]:
    """[value], and u where ``save``: as :meth:`.backends.crf.Room.forward`."""
    library.refuse_tangents("crf")
    if negated(emissions, start, end, transitions):
        emissions, start, end, transitions = as_numbers((emissions, start, end, transitions))
    room = room_of(backend)
    if tags is not None and not getattr(room, "CHECKS_TAGS", False):
        check_tags(tags, lengths, emissions.shape[2])
    with as_given(), library.named_range("crf", backend):
        value, u = room.forward(Chain(emissions, lengths, start, end, transitions), tags, save)
    return [value, u] if save else [value]


def crf_backward(
    backend: str,
    emissions: Tensor,
    lengths: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    tags: Tensor | None,
    u: Tensor,
    dvalue: Tensor,
    wants_parameters: bool,
) -> list[Tensor]:
    if negated(emissions, start, end, transitions, dvalue):
        given = (emissions, start, end, transitions, dvalue)
        emissions, start, end, transitions, dvalue = as_numbers(given)
    chain = Chain(emissions, lengths, start, end, transitions)
    with as_given(), library.named_range("crf", backend, " backward"):
        return list(room_of(backend).backward(chain, tags, u, dvalue, wants_parameters))


def crf_viterbi(
    backend: str,
    emissions: Tensor,
    lengths: Tensor | None,
    start: Tensor,
    end: Tensor,
    transitions: Tensor,
    n: int,
) -> tuple[Tensor, Tensor]:
    if negated(emissions, start, end, transitions):
        emissions, start, end, transitions = as_numbers((emissions, start, end, transitions))
    with as_given(), library.named_range("crf", backend, " viterbi"):
        return room_of(backend).viterbi(Chain(emissions, lengths, start, end, transitions), n)


def crf_lengths(mask: Tensor) -> Tensor:
    """The lengths (B,) of a mask (T, B), which is on and then off in each sequence."""
    on = mask != 0
    holes = on[1:] & ~on[:-1]
    if mask.device.type == "cuda":
        torch._assert_async(~holes.any(), "mask: expected every sequence to be on and then off")
    elif holes.any():
        t, b = holes.nonzero()[0].tolist()
        raise ValueError(
            f"mask: expected every sequence to be on and then off, but sequence {b} is off at step "
            f"{t} and on at step {t + 1}; leave such steps out of emissions and tags"
        )
    return on.sum(0)


for _operator in (crf, crf_backward, crf_viterbi, crf_lengths):
    library.library.impl(_operator.__name__, _operator, "CompositeExplicitAutograd")


@register_fake("crf")
def _crf_fake(backend, emissions, lengths, start, end, transitions, tags, save):
    value = emissions.new_empty(emissions.shape[1])
    return [value, emissions.new_empty(emissions.shape)] if save else [value]


@register_fake("crf_backward")
def _crf_backward_fake(
    backend, emissions, lengths, start, end, transitions, tags, u, dvalue, wants_parameters
):
    parameters = (start, end, transitions) if wants_parameters else ()
    return [p.new_empty(p.shape) for p in (emissions, *parameters)]


@register_fake("crf_viterbi")
def _crf_viterbi_fake(backend, emissions, lengths, start, end, transitions, n):
    T, B, _ = emissions.shape
    return emissions.new_empty((B, n)), emissions.new_empty((B, n, T), dtype=torch.int64)


@register_fake("crf_lengths")
def _crf_lengths_fake(mask):
    return mask.new_empty(mask.shape[1], dtype=torch.int64)


def _call(operator: Any, plain: Any, *args: Any) -> Any:
    tensors = [t for t in args if isinstance(t, Tensor)]
    return plain(*args) if needs_no_operator(*tensors) else operator(*args)


def eager_value(tags: Any, lengths: Any, *scores: Tensor) -> Tensor:
    """scores: emissions, start, end, transitions."""
    emissions, *parameters = scores
    return eager.forward(Chain(emissions, lengths, *parameters), tags, False)[0]


class ChainFunction(torch.autograd.Function):
    """(backend, tags, lengths, emissions, start, end, transitions) -> (value, u)"""

    @staticmethod
    @takes_anything
    def forward(backend, tags, lengths, emissions, *parameters):
        operator = torch.ops.fastseq.crf
        return tuple(_call(operator, crf, backend, emissions, lengths, *parameters, tags, True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.backend = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[1:], output[1])

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor | None, _: Any) -> Any:
        if dvalue is None:
            return (None,) * 7
        tags, lengths, *scores, u = ctx.saved_tensors
        need = ctx.needs_input_grad[3:]
        if not torch.compiler.is_compiling() and is_batched(dvalue):
            # for is_grads_batched, whose vmap knows torch's operations alone
            found = gradients_again(
                lambda given: (eager_value(tags, lengths, *given),), scores, need, (dvalue,)
            )
            return (None, None, None, *found)
        wants = any(need[1:])
        # without create_graph nobody differentiates further
        within = torch.is_grad_enabled() or in_transform()
        run = ChainBackwardFunction.apply if within else ChainBackwardFunction.forward
        flat = run(ctx.backend, wants, tags, lengths, *scores, dvalue, u)
        parameters = flat[1:] if wants else (None,) * 3
        return (None, None, None, flat[0] if need[0] else None, *parameters)

    @staticmethod
    def vmap(info: Any, dims: Any, backend: str, *tensors: Any) -> Any:
        run, V = beneath(ChainFunction, tensors), info.batch_size
        if all(d is None for d in dims[4:]):  # the members share the parameters: one call
            folded = [
                *(
                    _folded(t, d, V, axis)
                    for t, d, axis in zip(tensors[:3], dims[1:4], (1, 0, 1), strict=True)
                ),
                *tensors[3:],
            ]
            value, u = run(backend, *folded)
            return (value.unflatten(0, (V, -1)), u.unflatten(1, (V, -1))), (0, 1)
        return _looped(lambda *one: run(backend, *one), V, dims[1:], tensors)


class ChainBackwardFunction(torch.autograd.Function):
    """(backend, wants_parameters, tags, lengths, emissions, start, end, transitions, dvalue, u)
    -> the gradients of emissions, and where they are wanted of start, end and transitions"""

    @staticmethod
    @takes_anything
    def forward(backend, wants, tags, lengths, emissions, start, end, transitions, dvalue, u):
        given = backend, emissions, lengths, start, end, transitions, tags, u, dvalue, wants
        return tuple(_call(torch.ops.fastseq.crf_backward, crf_backward, *given))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.wants = inputs[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[2:-1])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        tags, lengths, *given = ctx.saved_tensors

        def gradients_of(*given: Tensor) -> tuple[Tensor, ...]:
            """What forward computed, in the form that autograd sees through."""
            *scores, dvalue = given
            _, pull = torch.func.vjp(lambda *s: eager_value(tags, lengths, *s), *scores)[:2]
            found = pull(dvalue)
            return found if ctx.wants else found[:1]

        values, pull = torch.func.vjp(gradients_of, *given)[:2]
        filled = tuple(
            torch.zeros_like(value) if c is None else c
            for value, c in zip(values, cotangents, strict=True)
        )
        return (None, None, None, None, *pull(filled), None)

    @staticmethod
    def vmap(info: Any, dims: Any, backend: str, wants: bool, *tensors: Any) -> Any:
        run, V = beneath(ChainBackwardFunction, tensors), info.batch_size
        if not wants and all(d is None for d in dims[5:8]):
            axes = (1, 0, 1, None, None, None, 0, 1)
            folded = [
                t if axis is None else _folded(t, d, V, axis)
                for t, d, axis in zip(tensors, dims[2:], axes, strict=True)
            ]
            (demissions,) = run(backend, wants, *folded)
            return (demissions.unflatten(1, (V, -1)),), (1,)
        return _looped(lambda *one: run(backend, wants, *one), V, dims[2:], tensors)


def _folded(tensor: Tensor | None, dim: int | None, V: int, axis: int) -> Tensor | None:
    """The V members' sequences side by side in ``axis``."""
    if tensor is None:
        return None
    many = tensor.unsqueeze(0).expand(V, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return many.movedim(0, axis).flatten(axis, axis + 1)


def _looped(run: Any, V: int, dims: Sequence[Any], tensors: Sequence[Any]) -> Any:
    """V calls, stacked: of members with parameters of their own, or gradients of these."""
    calls = [
        run(*(t if d is None else t.select(d, v) for t, d in zip(tensors, dims, strict=True)))
        for v in range(V)
    ]
    outputs = tuple(map(torch.stack, zip(*calls, strict=True)))
    return outputs, (0,) * len(outputs)


def computed_in(*tensors: Tensor) -> torch.dtype:
    """The type that scores of these types are computed in."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def prepared(chain: Chain, backend: Any) -> tuple[str, Chain]:
    """The room that runs a chain, and the chain as it takes it."""
    emissions, lengths, *parameters = chain
    dtype = computed_in(emissions, *parameters)
    scores = [t.to(dtype) for t in (emissions, *parameters)]
    if lengths is not None:
        lengths = lengths.to(emissions.device)
    name = rooms.select(dtype, emissions.device.type, parameters[0].shape[0], backend)
    if mode() == "dual":  # kernels see no tangents
        name = rooms.DIFFERENTIABLE
    return name, Chain(scores[0], lengths, *scores[1:])


def log_likelihood(chain: Chain, tags: Tensor | None, backend: Any = None) -> Tensor:
    """(B,): score(x, tags) - log Z(x), or log Z(x) where there are no tags."""
    name, (emissions, lengths, *parameters) = prepared(chain, backend)
    if name == rooms.DIFFERENTIABLE:
        if tags is not None and not (torch.compiler.is_compiling() or in_transform()):
            check_tags(tags, lengths, emissions.shape[2])
        with as_given():
            return eager_value(tags, lengths, emissions, *parameters)
    return ChainFunction.apply(name, tags, lengths, emissions, *parameters)[0]


def marginals(chain: Chain, backend: Any = None) -> Tensor:
    """(T, B, K): the probability of each tag at each step, zero beyond the lengths."""
    name, (emissions, lengths, *parameters) = prepared(chain, backend)
    if name == rooms.DIFFERENTIABLE:
        with as_given():
            value, pull = torch.func.vjp(
                lambda e: eager_value(None, lengths, e, *parameters), emissions
            )[:2]
            return pull(torch.ones_like(value))[0]
    value, u = ChainFunction.apply(name, None, lengths, emissions, *parameters)
    ones = torch.ones_like(value).detach()
    given = None, lengths, emissions, *parameters, ones, u.detach()
    return ChainBackwardFunction.apply(name, False, *given)[0]


@torch.no_grad()
def viterbi(chain: Chain, n: int = 1, backend: Any = None) -> tuple[Tensor, Tensor]:
    """As :meth:`.backends.crf.Room.viterbi`."""
    name, given = prepared(chain, backend)
    return _call(torch.ops.fastseq.crf_viterbi, crf_viterbi, name, *given, n)


def lengths_of(mask: Tensor) -> Tensor:
    """(B,) of a mask (T, B), which is on and then off in each sequence."""
    return _call(torch.ops.fastseq.crf_lengths, crf_lengths, mask)
