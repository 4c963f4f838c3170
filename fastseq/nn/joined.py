"""Neighbouring layers of a stack that are of one kind and width, as one call of several layers.

What such layers ask for together is what one layer with ``num_layers`` of them asks for, and a
backend that takes a whole stack takes it in one call (:mod:`..ops.whole`). The layers stay modules
of their own: their weights and options are read when they are called.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence

from . import recurrent, short
from .options import options
from .recurrent import Recurrent

#: Where a module keeps what a call of it runs besides its forward.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Joined:
    """Layers one on another, seen as one layer: what differs from the first is here."""

    _fastseq_put = None

    def __init__(self, layers: Sequence[Any], dropout: float) -> None:
        self.layers, self.dropout = layers, dropout
        self.num_layers = sum([layer.num_layers for layer in layers])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layers[0], name)

    def plain(self) -> bool:
        """Whether all weights are parameters; ``_parameters`` are these, from now on."""
        try:
            self._parameters: Sequence[Tensor] = [
                layer._parameters[name]
                for layer in self.layers
                for names in layer._all_weights
                for name in names
            ]
        except KeyError:  # parametrized, or replaced by a tensor
            return False
        self._all_weights = [range(len(self._parameters))]
        return True

    @property
    def _flat_weights_names(self) -> list[str]:
        """For what is said of a weight that does not fit."""
        return [
            f"{name} of layer {k} of those in one call"
            for k, layer in enumerate(self.layers)
            for names in layer._all_weights
            for name in names
        ]


def runs(
    layers: Sequence[Any], connected: Sequence[bool], dropout: float, training: bool
) -> Iterator[slice]:
    """Parts of a stack, in order: each is one layer, or several that are made one call.

    connected: of each layer, whether it is more than put on the one beneath. dropout: between them,
    where it does something.
    """
    if torch.compiler.is_compiling() or _has_any_global_hook():  # a graph has a call for each
        yield from [slice(k, k + 1) for k in range(len(layers))]
        return
    begin, kind = 0, None
    for k, layer in enumerate(layers):
        own = None if connected[k] else _kind(layer, dropout, training)
        if k and (own is None or own != kind):
            yield slice(begin, k)
            begin = k
        kind = own
    yield slice(begin, len(layers))


def _kind(layer: Any, dropout: float, training: bool) -> tuple[Any, ...] | None:
    """What layers of one call have in common; None for one that is called by itself: where it has
    masks, a learned state, hooks or a forward of its own, or other dropout between its layers."""
    if not isinstance(layer, Recurrent) or type(layer).forward is not Recurrent.forward:
        return None
    state = layer.__dict__
    if "forward" in state or any([state[hooks] for hooks in _HOOKS]):
        return None
    own = options(layer)
    if not own.plain or layer._fastseq_put is not None:
        return None
    if layer.num_layers > 1 and dropout:
        return None
    if layer.training != training:
        return None
    return (
        type(layer),
        layer._fastseq_cell,
        layer.hidden_size,
        layer.proj_size,
        layer.bias,
        layer.bidirectional,
        layer.batch_first,
        own.backend,
        own.memory,
        own.deterministic,
    )


def call(
    layers: Sequence[Any],
    dropout: float,
    input: Any,
    states: Sequence[Any],
    given: dict[str, Any],
) -> tuple[Any, list[Any]] | None:
    """The output and each layer's final state; None where the layers are to be called one by one,
    which says what is wrong with an argument. given: the keywords of a layer's call."""
    joined = Joined(layers, dropout)
    hx: Any = None
    if any([state is not None for state in states]):
        hx = _states(joined, input, states)
        if hx is None:
            return None
    out = None
    if all([value is None for value in given.values()]) and joined.plain():
        out = short.layers(joined, input, hx)
    if out is None:
        weights = [w for layer in layers for w in recurrent.call_weights(layer)]
        if weights[0].is_cuda or not _is_plain(joined, input, hx, weights):
            return None  # cuDNN wants the weights of a call in one chunk
        out = recurrent.call(joined, input, hx, weights, options(joined).backend, **given)
    y, finals = out
    return y, _of_each(layers, finals)


def _is_plain(joined: Joined, input: Any, hx: Any, weights: Sequence[Any]) -> bool:
    """Whether all is plain tensors: others see each layer's own call."""
    none = {"lengths": None, "reset": None}
    return not recurrent._is_torchs(joined, input, hx, list(weights), False, none)


def _states(joined: Joined, input: Any, states: Sequence[Any]) -> Any:
    """The layers' states in one; None where one is not what its layer takes."""
    first, names = joined.layers[0], joined._fastseq_states
    D, batch = 2 if first.bidirectional else 1, _batch(input, first.batch_first)
    parts: list[list[Tensor]] = [[] for _ in names]
    for layer, given in zip(joined.layers, states, strict=True):
        own = (given,) if len(names) == 1 else given
        if not isinstance(own, (tuple, list)) or len(own) != len(names):
            return None
        for k, (part, state) in enumerate(zip(parts, own, strict=True)):
            shape = (layer.num_layers * D, *batch, first._fastseq_size(k))
            if type(state) is not Tensor or state.shape != shape:
                return None
            part.append(state)
    found = [torch.cat(part) for part in parts]
    return found[0] if len(found) == 1 else tuple(found)


def _batch(input: Any, batch_first: bool) -> tuple[int, ...]:
    """The batch of the states, () of an unbatched input."""
    if isinstance(input, PackedSequence):
        sizes = input.batch_sizes
        return (int(sizes[0]) if sizes.dim() == 1 and len(sizes) else 0,)
    if input.dim() != 3:
        return ()
    return (input.shape[0 if batch_first or input.is_nested else 1],)


def _of_each(layers: Sequence[Any], finals: Any) -> list[Any]:
    """The final state of each layer, in its own form."""
    D, begin = 2 if layers[0].bidirectional else 1, 0
    found: list[Any] = []
    for layer in layers:
        end = begin + layer.num_layers * D
        if isinstance(finals, Tensor):
            found.append(finals[begin:end])
        else:
            found.append(tuple([state[begin:end] for state in finals]))
        begin = end
    return found
