"""torch.nn's ``_flat_weights``: the list that a layer of torch.nn computes with.

Users read it, set it whole for a call (DropConnect, quantizers) and set its items (tied weights).
Here it is made from the attributes each time it is read, and what is put into it is kept apart.
As in torch.nn that holds until an attribute of the layer is another tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..ops import steps


class Put(NamedTuple):
    """What was put into the list, and the attributes at that time."""

    values: tuple[Tensor | None, ...]
    attributes: tuple[Tensor | None, ...]


class FlatWeights(list[Tensor | None]):
    """The list as a user sees it: its layer computes with what is set in it."""

    def __init__(self, module: Any, weights: Sequence[Tensor | None]) -> None:
        super().__init__(weights)
        self._module = module

    def __setitem__(self, place: Any, value: Any) -> None:
        super().__setitem__(place, value)
        now = _now(self._module)
        now[place] = value
        put(self._module, now)

    def __reduce__(self) -> Any:
        return list, (list(self),)


# to torch's trees, as to everyone, a list
register_pytree_node(
    FlatWeights,
    lambda weights: (list(weights), None),
    lambda weights, _: list(weights),
    serialized_type_name="fastseq.nn.flat_weights.FlatWeights",
)


def read(module: Any) -> list[Tensor | None]:
    now = _now(module)
    return now if torch.compiler.is_compiling() else FlatWeights(module, now)


def put(module: Any, value: Sequence[Tensor | None]) -> None:
    attributes = _attributes(module)
    if len(value) != len(attributes):
        raise ValueError(
            f"_flat_weights: expected {len(attributes)} tensors, "
            f"{', '.join(module._flat_weights_names)}, got {len(value)}"
        )
    same = all(v is a for v, a in zip(value, attributes, strict=True))
    module.__dict__["_fastseq_put"] = None if same else Put(tuple(value), tuple(attributes))


def adopt(module: Any, kept: Sequence[Tensor | None]) -> None:
    """Take over the list that torch.nn's layer kept, where it is not stale."""
    if not module._weights_have_changed():
        put(module, kept)


def valid(module: Any) -> tuple[Any, ...] | None:
    """What was put there, where it still holds."""
    kept = module._fastseq_put
    if kept is None:
        return None
    for name, then in zip(module._flat_weights_names, kept.attributes, strict=True):
        if getattr(module, name, None) is not then:
            if not torch.compiler.is_compiling():
                module.__dict__["_fastseq_put"] = None
            return None
    return kept.values


def state(module: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What is pickled and copied, as torch.nn does it: with the list if it differs."""
    for made in ("_fastseq_put", steps.KEY):
        state.pop(made, None)
    if (values := valid(module)) is not None:
        state["_flat_weights"] = list(values)
    return state


def split(state: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor | None] | None]:
    """The inverse: what is an attribute, and the list."""
    state = dict(state)
    return state, state.pop("_flat_weights", None)


def _now(module: Any) -> list[Tensor | None]:
    kept = valid(module)
    return _attributes(module) if kept is None else list(kept)


def _attributes(module: Any) -> list[Tensor | None]:
    return [getattr(module, name, None) for name in module._flat_weights_names]
