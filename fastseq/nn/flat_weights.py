"""torch.nn's ``_flat_weights``: the list that a layer of torch.nn computes with.

Users read it, set it whole for a call (DropConnect, quantizers) and set its items (tied weights).
Here it is made from the attributes each time it is read, and what is put into it is kept apart.
As in torch.nn that holds until an attribute of the layer is another tensor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node


class Put(NamedTuple):
    """What was put into the list, and the attributes at that time."""

    values: tuple[Tensor | None, ...]
    attributes: tuple[Tensor | None, ...]


class FlatWeights(list[Tensor | None]):
    """The list as a user sees it: its layer computes with what is set in it."""

    def __init__(self, module: Any, weights: Sequence[Tensor | None]) -> None:
        super().__init__(weights)
        self._module = module

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _live(name: str) -> Callable[..., Any]:
    """A method of a list that changes it, and with it what the layer computes with."""
    change = getattr(list, name)

    @functools.wraps(change)
    def method(self: FlatWeights, *args: Any, **keywords: Any) -> Any:
        now = _now(self._module)
        found = change(now, *args, **keywords)
        put(self._module, now)
        list.__setitem__(self, slice(None), now)
        return self if found is now else found

    return method


for _name in (
    *("__setitem__", "__delitem__", "__iadd__", "__imul__"),
    *("append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"),
):
    setattr(FlatWeights, _name, _live(_name))


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
    same = len(value) == len(attributes)
    same = same and all(v is a for v, a in zip(value, attributes, strict=True))
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


def check(module: Any, weights: Sequence[Any]) -> None:
    """A call can compute with them: a list may be filled bit by bit before."""
    names = module._flat_weights_names
    if len(weights) != len(names):
        raise RuntimeError(
            f"_flat_weights: expected {len(names)} tensors, {', '.join(names)}, got {len(weights)}"
        )
    for name, weight in zip(names, weights, strict=True):
        if not isinstance(weight, Tensor):
            raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")


def state(module: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What is pickled and copied, as torch.nn does it: with the list if it differs."""
    state.pop("_fastseq_put", None)
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
