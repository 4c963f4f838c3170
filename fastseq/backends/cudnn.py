"""One recurrent layer as torch runs it on a GPU, behind the contract: on cuDNN, or by torch's loop
over time where cuDNN does not serve.

cuDNN reads all weights from one buffer, its *weight space*, which each call fills anew: the
caller's tensors stay where they are. For backward cuDNN keeps a *reserve*, bytes whose number it
alone knows. Its backward writes to them, so it is handed a copy.

torch's loop saves nothing, which an empty reserve says, and runs again in backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import _VF, Tensor

from . import eager
from .contract import Call, Gradients, OutputGradients, Result, Wanted, Weights

#: cudnnRNNMode_t
_MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
#: cuDNN refuses more steps than these.
_LONGEST = 65535
#: The first cuDNN that has recurrent layers in bfloat16, from compute capability 8.0 on.
_BFLOAT16 = 91300


def serves(x: Tensor, steps: int) -> bool:
    """Whether cuDNN runs ``steps`` steps over ``x``: where torch takes cuDNN, and it takes them."""
    if steps > _LONGEST or not torch.cudnn_is_acceptable(x):
        return False
    if x.dtype is torch.bfloat16:
        version = torch.backends.cudnn.version() or 0
        return version >= _BFLOAT16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.dtype in (torch.float16, torch.float32, torch.float64)


@torch.no_grad()
def forward(call: Call, save: bool, trajectory: bool) -> Result:
    """The directions of ``call`` are (False,) or (False, True). Saves the reserve."""
    live = _live(call)
    states = call.states or call.zero_states()
    reserve = call.x.new_empty(0, dtype=torch.uint8)
    if live is None:
        y = call.x.new_zeros((*call.x.shape[:-1], len(call.weights) * call.P))
        finals = [s.clone() for s in states]
    else:
        if serves(live.x, _steps(live)) and _narrows(live):
            rows, finals, reserve = _cudnn_forward(live, save)
        else:
            rows, *finals = _loop(live, save)
        y = _with_padding(rows, call)
        finals = [_with_rest(new, old) for new, old in zip(finals, states, strict=True)]
    return Result(y, finals, [], [reserve] if save else [])


@torch.no_grad()
def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    live, (reserve,) = _live(call), result.saved
    given = [
        torch.zeros_like(s) if g is None else g
        for s, g in zip(result.states, grads.states, strict=True)
    ]
    if live is None:
        return Gradients(
            torch.zeros_like(call.x, memory_format=torch.contiguous_format) if wanted.x else None,
            [g.clone() for g in given] if wanted.states else None,
            [w.map(torch.zeros_like) for w in call.weights] if wanted.weights else None,
        )
    y = result.y[: live.x.shape[0]].contiguous()
    dy = torch.zeros_like(y) if grads.y is None else grads.y[: len(y)].contiguous()
    dfinals = [g[:, : live.B].contiguous() for g in given]
    run = _cudnn_backward if reserve.numel() else _loop_backward
    found = run(live, y, dy, dfinals, wanted, reserve)
    if found.x is not None:
        found.x = _with_padding(found.x, call)
    if found.states is not None:
        found.states = [_with_rest(d, g) for d, g in zip(found.states, given, strict=True)]
    return found


def _live(call: Call) -> Call | None:
    """The rows before the padding, of the sequences that have a step; None where none has one."""
    x, sizes, alive = call.x, call.batch_sizes, call.B
    if sizes is not None:
        sizes = sizes[sizes > 0]
        x, alive = x[: int(sizes.sum())], int(sizes[0]) if len(sizes) else 0
    if x.shape[0] == 0 or alive == 0:
        return None
    states = [s[:, :alive].contiguous() for s in call.states or call.zero_states()]
    return replace(call, x=x.contiguous(), batch_sizes=sizes, states=states)


def _steps(call: Call) -> int:
    return len(call.x if call.batch_sizes is None else call.batch_sizes)


def _narrows(call: Call) -> bool:
    """Whether a projection is to fewer features, as torch's layers take it."""
    return call.weights[0].w_hr is None or call.P < call.H


def _with_padding(rows: Tensor, call: Call) -> Tensor:
    """As many rows as the call's input has, of which those behind ``rows`` are zero."""
    missing = call.x.shape[0] - rows.shape[0]
    return torch.cat([rows, rows.new_zeros((missing, *rows.shape[1:]))]) if missing else rows


def _with_rest(new: Tensor, old: Tensor) -> Tensor:
    """``new`` of the sequences that have a step, and behind them ``old`` of the empty ones."""
    alive = new.shape[1]
    return new if alive == old.shape[1] else torch.cat([new, old[:, alive:]], 1)


def _given(call: Call) -> list[Tensor]:
    """The weights, without the Nones."""
    return [w for weights in call.weights for w in weights.flat() if w is not None]


def _in_places(call: Call, values: Sequence[Tensor]) -> list[Weights]:
    """The inverse of :func:`_given`."""
    rest = iter(values)
    return [weights.map(lambda _: next(rest)) for weights in call.weights]


# On cuDNN


def _options(call: Call) -> tuple[int, int, int, int, bool]:
    """mode, H, P (0 without projection), layers, batch_first."""
    return _MODES[call.cell], call.H, 0 if call.weights[0].w_hr is None else call.P, 1, False


@lru_cache(maxsize=256)
def _places(
    shapes: tuple[torch.Size, ...],
    directions: int,
    options: tuple[int, int, int, int, bool],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[int, tuple[int, ...]]:
    """How many numbers the weight space has, and where in it each tensor of ``shapes`` begins."""
    fresh = [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    per, inputs = len(shapes) // directions, shapes[0][1]
    # torch moves the tensors that it is given into the space
    space = torch._cudnn_rnn_flatten_weight(fresh, per, inputs, *options, directions == 2)
    return space.numel(), tuple(int(w.storage_offset()) for w in fresh)


def _weight_space(call: Call) -> tuple[Tensor, list[Tensor]]:
    """The weights in cuDNN's order, and the part that each of them is in it.

    Two launches, where moving copies of the weights into the space takes one for each, twice.
    """
    weights = _given(call)
    shapes = tuple(w.shape for w in weights)
    size, places = _places(shapes, len(call.weights), _options(call), call.x.dtype, call.x.device)
    space = call.x.new_zeros(size)
    parts = [
        space[place : place + shape.numel()].view(shape)
        for place, shape in zip(places, shapes, strict=True)
    ]
    torch._foreach_copy_(parts, weights)
    return space, parts


def _tail(call: Call, training: bool) -> tuple[Any, ...]:
    """dropout, train, bidirectional, batch_sizes, dropout_state."""
    sizes = [] if call.batch_sizes is None else call.batch_sizes.tolist()
    return 0.0, training, len(call.weights) == 2, sizes, None


def _h_and_c(states: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    return states[0], states[1] if len(states) == 2 else None


def _cudnn_forward(call: Call, save: bool) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, the final states and the reserve."""
    space, parts = _weight_space(call)
    y, h_n, c_n, reserve, _ = torch.ops.aten._cudnn_rnn(
        call.x,
        parts,
        len(parts) // len(call.weights),
        space,
        *_h_and_c(call.states),
        *_options(call),
        *_tail(call, save),
    )
    return y, [h_n, c_n][: len(call.states)], reserve


def _cudnn_backward(
    call: Call, y: Tensor, dy: Tensor, dfinals: list[Tensor], wanted: Wanted, reserve: Tensor
) -> Gradients:
    space, parts = _weight_space(call)
    n = len(call.states)
    dx, dh_0, dc_0, dweights = torch.ops.aten._cudnn_rnn_backward(
        call.x,
        parts,
        len(parts) // len(call.weights),
        space,
        *_h_and_c(call.states),
        y,
        dy,
        *_h_and_c(dfinals),
        *_options(call),
        *_tail(call, True),
        reserve.clone(),
        [wanted.x, wanted.states, wanted.states and n == 2, wanted.weights],
    )
    return Gradients(
        dx if wanted.x else None,
        [dh_0, dc_0][:n] if wanted.states else None,
        # cuDNN's are parts of one buffer; each is given memory of its own
        _in_places(call, [d.clone() for d in dweights]) if wanted.weights else None,
    )


# By torch's loop


def _loop(call: Call, training: bool) -> list[Tensor]:
    """y and the final states."""
    if not _narrows(call):
        result = eager.forward(call)
        return [result.y, *result.states]
    function = getattr(_VF, call.cell)
    hidden = call.states if len(call.states) > 1 else call.states[0]
    tail = (call.weights[0].b_ih is not None, 1, 0.0, training, len(call.weights) == 2)
    with without_cudnn() if _steps(call) > _LONGEST else nullcontext():
        if call.batch_sizes is None:
            return list(function(call.x, hidden, _given(call), *tail, False))
        return list(function(call.x, call.batch_sizes, hidden, _given(call), *tail))


def _loop_backward(
    call: Call, y: Tensor, dy: Tensor, dfinals: list[Tensor], wanted: Wanted, reserve: Tensor
) -> Gradients:
    def leaf(tensor: Tensor, want: bool) -> Tensor:
        return tensor.detach().requires_grad_(want)

    with _recorded():
        again = replace(
            call,
            x=leaf(call.x, wanted.x),
            states=[leaf(s, wanted.states) for s in call.states],
            weights=_in_places(call, [leaf(w, wanted.weights) for w in _given(call)]),
        )
        leaves = [again.x, *again.states, *_given(again)]
        found = iter(
            torch.autograd.grad(
                _loop(again, True), [t for t in leaves if t.requires_grad], [dy, *dfinals]
            )
        )
    return Gradients(
        next(found) if wanted.x else None,
        [next(found) for _ in call.states] if wanted.states else None,
        _in_places(call, list(found)) if wanted.weights else None,
    )


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd on. Where a compiled graph calls, not only its mode is off but its dispatch keys."""
    keys = torch._C.DispatchKey
    with (
        torch.enable_grad(),
        torch._C._SetExcludeDispatchKeyGuard(keys.AutogradFunctionality, False),
        torch._C._SetExcludeDispatchKeyGuard(keys.ADInplaceOrView, False),
    ):
        yield


@contextmanager
def without_cudnn() -> Iterator[None]:
    """The setting is the process's: what other threads run meanwhile does without cuDNN too."""
    before = torch.backends.cudnn.enabled
    torch._C._set_cudnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(before)
