"""The learned initial state of a layer that was made with ``learn_state=True``.

It is a parameter for each state, ``h_0``, of an LSTM ``c_0`` and of an SCRN ``s_0``, which a call
without ``hx`` expands over its batch: h_0 (num_layers * D, 1, proj_size or hidden_size), c_0
(num_layers * D, 1, hidden_size), s_0 (num_layers * D, 1, context_size).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..ops.geometry import Geometry
from .options import HasOptions, initialize


class HasState(HasOptions):
    """A layer that may have such parameters."""

    @property
    def _fastseq_states(self) -> tuple[str, ...]:
        """The names of the states, in the order of a call's."""
        raise NotImplementedError

    def _fastseq_size(self, k: int) -> int:
        """Of the k-th state."""
        raise NotImplementedError

    def _fastseq_begin(self, **given: Any) -> None:
        if given.get("learn_state"):
            register(self)
        super()._fastseq_begin(**given)

    def reset_parameters(self) -> None:
        """The initial values again, zeros for a learned state, and what ``init`` says."""
        reset(self, self._fastseq_draw)
        initialize(self)


def names(module: Any) -> list[str]:
    """The parameters' names, in the order of the cell's states."""
    return [f"{state}_0" for state in module._fastseq_states]


def register(module: Any) -> None:
    """Give a layer its parameters: zeros, with which it computes what it would without them."""
    weight = module.weight_ih_l0
    count = module.num_layers * (2 if module.bidirectional else 1)
    for k, name in enumerate(names(module)):
        size = module._fastseq_size(k)
        state = torch.zeros((count, 1, size), dtype=weight.dtype, device=weight.device)
        module.register_parameter(name, torch.nn.Parameter(state))


def reset(module: Any, draw: Callable[[], None]) -> None:
    """Initial values again: those of the weights drawn as if there were no others, and zeros."""
    if module._fastseq is None or not module._fastseq.learn_state:
        return draw()
    own = module._parameters
    states = {name: own.pop(name) for name in names(module) if name in own}
    try:
        draw()
    finally:
        own.update(states)
    for state in states.values():
        torch.nn.init.zeros_(state)


def states(module: Any, geometry: Geometry) -> list[Tensor]:
    """As a caller would give them, for the batch of a call."""
    found = [getattr(module, name).expand(-1, geometry.B, -1) for name in names(module)]
    return found if geometry.batched else [state.squeeze(1) for state in found]


def plain_states(module: Any, input: Any) -> tuple[Tensor, ...] | None:
    """The same for a dense input, laid out in full; None where the long way is due."""
    if type(input) is not Tensor or input.is_nested or (rank := input.dim()) not in (2, 3):
        return None
    parameters = module._parameters
    try:
        found = [parameters[name] for name in names(module)]
    except KeyError:  # parametrized, or replaced by a tensor
        return None
    if rank == 2:
        return tuple([state.squeeze(1) for state in found])
    B = input.shape[0 if module.batch_first else 1]
    return tuple([state.expand(-1, B, -1).contiguous() for state in found])
