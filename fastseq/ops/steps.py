"""The weights of a layer that is called step by step in training, as in a decoder with attention.

At each step the gradient of the weights is a product over few rows, whose result is as large as the
weights and is added to that of the other steps: of LSTMCell(768, 512) with B = 32 it is 0.4 of the
time of training. Here a step leaves what the product reads, and one product is made of many steps.

In the graph a *token*, a tensor of no elements, stands for the weights. Each step depends on it, so
its own backward runs when that of every step has run, as it is with the weights themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..backends.contract import NOTHING, ONE_STEP, Request, Wanted

#: Of how many rows a product is made, at least: with more it gets no faster, and they take memory.
ROWS = 1024
#: Of weights, in bytes, for which a loop does so; and for each row of a step.
LEAST, LEAST_EACH = 1_500_000, 80_000
#: How many calls of backward may be under way, or have failed, before the oldest is forgotten.
CALLS = 64


class Left(NamedTuple):
    """What a step leaves: what ``layers_backward`` makes the gradient of the weights of.

    Whatever others see is copied, since they may write to it, or free it, before it is read.
    """

    x: Tensor
    states: tuple[Tensor, ...]
    y: Tensor
    saved: tuple[Tensor, ...]
    dy: Tensor | None
    dstates: tuple[Tensor | None, ...]

    @property
    def rows(self) -> int:
        return self.y.numel() // self.y.shape[-1]

    def copied(self) -> Left:
        x, states, y, saved, dy, dstates = self
        own = _copy(x), tuple(map(_copy, states)), _copy(y)
        return Left(*own, saved, _copy(dy), tuple(map(_copy, dstates)))


def _copy(tensor: Any) -> Any:
    return None if tensor is None else tensor.clone()


class Pending:
    """Of one call of backward: what steps have left, and the gradient of what was multiplied."""

    def __init__(self) -> None:
        self.left: list[Left] = []
        self.rows = 0
        self.sums: list[Any] | None = None
        self.by: tuple[Any, Request, tuple[Tensor, ...]] | None = None

    def add(self, gradients: Sequence[Any]) -> None:
        if self.sums is None:
            self.sums = list(gradients)
        else:
            pairs = zip(self.sums, gradients, strict=True)
            self.sums = [a if b is None else b if a is None else a + b for a, b in pairs]

    def leave(self, module: Any, request: Request, weights: tuple[Tensor, ...], left: Left) -> None:
        if self.by is not None and self.by[:2] != (module, request):
            self.finish()
        self.by = module, request, weights
        at_once = not self.left and left.rows >= ROWS
        self.left.append(left if at_once else left.copied())
        self.rows += left.rows
        if self.rows >= ROWS:
            self.finish()

    def finish(self) -> list[Any] | None:
        if self.left and self.by is not None:
            self.add(multiply(*self.by, self.left))
            self.left, self.rows = [], 0
        return self.sums


class Weights:
    """The weights of a module in a graph: their token, and what is pending for them.

    It lives as long as a graph that uses it.
    """

    def __init__(self, weights: tuple[Tensor, ...]) -> None:
        self.tensors = weights
        self.needs = tuple([w.requires_grad for w in weights])
        self.pending: dict[int, Pending] = {}
        self.token = TokenFunction.apply(self.pending, *weights)
        self.gradient = self.token.detach()  # of the token

    def are(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether they are these, and still want the same gradients."""
        if len(weights) != len(self.tensors):
            return False
        for mine, theirs, needs in zip(self.tensors, weights, self.needs, strict=True):
            if mine is not theirs or theirs.requires_grad is not needs:
                return False
        return True

    def awaited(self) -> bool:
        """In a backward: whether it is to find their gradients."""
        # a backward that was compiled runs without the engine, and finds all
        if torch._C._current_graph_task_id() < 0:
            return True
        return torch._C._will_engine_execute_node(self.token.grad_fn)

    def now(self) -> Pending:
        """What is pending in the backward under way."""
        call = torch._C._current_graph_task_id()
        found = self.pending.get(call)
        if found is None:
            if len(self.pending) >= CALLS:
                del self.pending[next(iter(self.pending))]
            found = self.pending[call] = Pending()
        return found

    def leave(self, module: Any, request: Request, weights: tuple[Tensor, ...], left: Left) -> None:
        self.now().leave(module, request._replace(order=ONE_STEP), weights, left)


#: By the address of the recurrent weight; nobody else keeps them but the graphs.
_LIVE: WeakValueDictionary[int, Weights] = WeakValueDictionary()


def pays(weights: tuple[Tensor, ...], rows: int) -> bool:
    """Whether a loop of such steps is faster so. It spares to write the gradient of the weights and
    to add it at each step, and costs copies of the rows.

    LSTMCell, forward and backward, one thread of Zen 4, times faster: 0.7 MB of weights and 16 rows
    0.95; 2.6 MB and 8 rows 1.18, 32 rows 1.01; 3.1 MB and 64 rows 0.98; 5.5 MB and 16 rows 1.26;
    10.5 MB and 1, 8, 32 rows 3.3, 2.0, 1.2.
    """
    size = (weights[0].numel() + weights[1].numel()) * weights[0].element_size()
    return size >= LEAST and size >= LEAST_EACH * rows


def weights_of(weights: tuple[Tensor, ...]) -> Weights | None:
    """Those of a graph, if autograd is to find the gradient of any: the living ones, or new."""
    found = _LIVE.get(id(weights[1]))
    if found is not None and found.are(weights):
        return found
    if not all([w.is_leaf for w in weights]) or not any([w.requires_grad for w in weights]):
        return None
    found = _LIVE[id(weights[1])] = Weights(weights)
    return found


class TokenFunction(torch.autograd.Function):
    """(pending, *weights) -> the token"""

    @staticmethod
    def forward(ctx: Any, pending: dict[int, Pending], *weights: Tensor) -> Tensor:
        ctx.pending = pending
        ctx.set_materialize_grads(False)
        return weights[0].new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        pending = ctx.pending.pop(torch._C._current_graph_task_id(), None)
        found = None if pending is None else pending.finish()
        need = ctx.needs_input_grad
        if found is None:
            return (None,) * len(need)
        return (None, *[g if n else None for g, n in zip(found, need[1:], strict=True)])


def multiply(
    module: Any, request: Request, weights: tuple[Tensor, ...], left: Sequence[Left]
) -> Sequence[Any]:
    """The gradient of the weights over steps that were left, as of one step with all rows."""
    sizes = [one.rows for one in left]
    count = max(len(one.states) for one in left)
    dstates = tuple(_together(of, sizes) for of in zip(*[one.dstates for one in left], strict=True))
    found = module.layers_backward(
        request,
        _together([one.x for one in left], sizes),
        None,
        tuple(
            _together([one.states[k] if one.states else None for one in left], sizes)
            for k in range(count)
        ),
        weights,
        NOTHING,
        _together([one.y for one in left], sizes),
        tuple(_together(of, sizes) for of in zip(*[one.saved for one in left], strict=True)),
        _together([one.dy for one in left], sizes),
        dstates,
        Wanted(False, False, True),
    )
    return found[1 + len(dstates) :]


def _together(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    """The rows of all steps; of a step that has none, zeros."""
    there = next((part for part in parts if part is not None), None)
    if there is None:
        return None
    width = there.shape[-1]
    rows = [
        there.new_zeros((size, width)) if part is None else part.reshape(size, width)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return rows[0] if len(rows) == 1 else torch.cat(rows)
