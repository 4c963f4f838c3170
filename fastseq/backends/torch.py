"""torch's own implementation as a backend: oneDNN, cuDNN, and torch's composite loops elsewhere.

It is called as torch.nn calls it, a whole stack at a time, and autograd is torch's, with two
exceptions, in which a layer stands behind the same contract as our kernels. One is the training of
an LSTM on oneDNN, whose layer backward torch cannot differentiate again: second derivatives come
from the eager form. The other is a graph that is compiled or exported for a GPU, where torch.nn's
layers are no operator: there :mod:`.cudnn` runs a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import _VF, Tensor

from ..cells import CELLS
from . import cudnn, layout
from .contract import (
    ONE_STEP,
    Abilities,
    Call,
    Given,
    Gradients,
    OutputGradients,
    Problem,
    Request,
    Result,
    Wanted,
    Weights,
    ways,
)
from .layout import opaque as saved_layout
from .stacked import one_by_one
from .tracing import is_tracing

__all__ = ["backward", "forward", "layers", "saved_layout", "stacks", "supports", "unavailable"]

ABILITIES = Abilities()

_CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_STEPS: dict[str, Any] = {cell: getattr(_VF, f"{cell}_cell") for cell in _CELLS}
#: Of these cells torch projects the state, and those oneDNN runs.
_PROJECTED = _ON_ONEDNN = frozenset(("lstm",))
_LSTM_MODE = 2  # at::native's number for LSTM in mkldnn_rnn_layer


def unavailable() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    if problem.cell not in _CELLS:
        return f"torch has no {CELLS[problem.cell].called}; its cells are {', '.join(_CELLS)}"
    if problem.projected and problem.cell not in _PROJECTED:
        return "torch projects the hidden state of an LSTM only"
    P, H = problem.P, problem.H
    if problem.projected and P is not None and H is not None and P >= H:
        return "torch projects to fewer features only"
    if problem.T == 0:
        return "torch takes no sequence of length 0"
    if problem.R > 2:
        return "torch runs one or two directions, not an ensemble"
    if problem.reset:
        return "torch cannot reset single rows in mid-sequence (reset=)"
    if problem.h_mask:
        return "torch cannot mask the recurrent operand (h_mask, recurrent_dropout)"
    if problem.trajectory:
        return "torch gives no cell state but the last (all_states=True)"
    if problem.memory == "lean" and problem.training and problem.mode != "trace":
        return "torch keeps all gates for backward, so memory='lean' cannot be had of it"
    if problem.mode == "transform":
        return "torch's kernels have no rules for torch.func"
    if problem.single:  # its cell functions are made of operations
        return None
    if problem.mode == "dual":
        return "torch's kernels have no forward-mode derivative"
    if problem.mode == "compile" and problem.device != "cuda":
        return "torch's recurrent layers break a compiled graph"
    return None


def uses_onednn(problem: Problem) -> bool:
    """Whether torch runs this on oneDNN, as at::native::use_mkldnn decides."""
    if (
        problem.cell not in _ON_ONEDNN
        or problem.device != "cpu"
        or problem.projected
        or problem.ragged
    ):
        return False
    if problem.B == 0 or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled:
        return False
    if problem.dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if problem.dtype is torch.float16:
        return not problem.training and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return problem.dtype is torch.float32


def single_step(problem: Problem) -> bool:
    """Whether torch's cell functions serve: one step, which oneDNN would pack all weights for.

    LSTM at B = 1, I = H = 1024: 22 ms a call on oneDNN, 1 ms by the cell function.
    """
    return (
        problem.T == 1
        and not problem.ragged
        and not problem.projected
        and problem.device == "cpu"
        and problem.mode != "trace"
    )


def stacks(problem: Problem) -> bool:
    """Whether autograd is torch's own: always for a step of a cell; for a layer but in a graph that
    is compiled, and but for an LSTM trained on oneDNN."""
    if problem.single:
        return True
    if problem.mode == "compile":
        return False
    if problem.mode == "trace" or single_step(problem):
        return True
    return not (problem.training and uses_onednn(problem))


def layers(
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    given: Given,
    save: bool,
) -> tuple[Tensor, list[Tensor], tuple[()]]:
    """All layers, as torch.nn calls them; torch draws what dropout keeps."""
    if request.order == ONE_STEP:
        finals = _step(request.cell, x, states, weights)
        return finals[0], finals, ()
    if not states:
        states = _zero_states(request, x, batch_sizes, weights)
    traced = is_tracing()
    one = not traced and batch_sizes is None and x.shape[0] == 1 and not request.projected
    if one and x.device.type == "cpu":
        y, finals = _one_step(request, x[0], states, weights)
        return y.unsqueeze(0), finals, ()
    function = getattr(_VF, request.cell)
    training = request.training or (not traced and _keeps(x, states, weights))
    tail = (request.biased, request.layers, request.dropout, training, request.directions == 2)
    hidden: Any = states if len(states) > 1 else states[0]
    if batch_sizes is None:
        y, *finals = function(x, hidden, weights, *tail, False)
        return y, finals, ()
    if traced:
        y, *finals = function(x, batch_sizes, hidden, weights, *tail)
        return y, finals, ()
    # torch wants as many states as sequences of length > 0, and one such sequence at least
    alive = int(batch_sizes[0]) if len(batch_sizes) else 0
    if alive == 0:
        width = request.directions * states[0].shape[-1]
        nothing = sum((w.sum() for w in weights), x.sum())  # leads to every gradient
        return x.new_zeros((0, width)) + nothing, [s.clone() for s in states], ()
    some: Any = [s.narrow(1, 0, alive) for s in states]
    y, *finals = function(x, batch_sizes, some if len(some) > 1 else some[0], weights, *tail)
    finals = [
        new
        if alive == old.shape[1]
        else torch.cat([new, old.narrow(1, alive, old.shape[1] - alive)], 1)
        for new, old in zip(finals, states, strict=True)
    ]
    return y, finals, ()


def _keeps(x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether torch has to be told that it trains: cuDNN keeps what backward wants where it does
    and nowhere else, so torch.nn's backward raises in eval mode. Nothing is dropped then: outside
    of training the rate of dropout is zero."""
    if x.is_cpu or not torch.is_grad_enabled():
        return False
    return any(t.requires_grad for t in (x, *states, *weights))


def _zero_states(
    request: Request, x: Tensor, batch_sizes: Tensor | None, weights: Sequence[Tensor]
) -> list[Tensor]:
    first = ways(request, weights)[0]
    H = first.w_ih.shape[0] // request.definition.G
    P = H if first.w_hr is None else first.w_hr.shape[0]
    if batch_sizes is None:
        B = x.shape[1]
    else:
        B = int(batch_sizes[0]) if len(batch_sizes) else 0
    sizes = (P, *[H] * (len(request.definition.states) - 1))
    return [x.new_zeros((request.layers * request.directions, B, size)) for size in sizes]


def _one_step(
    request: Request, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """All layers for one time step, x (B, I), by torch's cell functions.

    Of what they give y and the states are copies, as of torch's layers: each may be edited in place
    without changing the other, or what backward reads.
    """

    def run(
        layer: int, x: Tensor, states: list[Tensor], weights: list[Weights]
    ) -> tuple[Tensor, list[Tensor]]:
        ends = [
            _step(request.cell, x, [s[d] for s in states], way.given())
            for d, way in enumerate(weights)
        ]
        return torch.cat([end[0] for end in ends], -1), [
            torch.stack(s) for s in zip(*ends, strict=True)
        ]

    return one_by_one(request, x, states, ways(request, weights), run)


def _step(
    cell: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor]
) -> list[Tensor]:
    """The states (B, H) after one step of x (B, I), by torch's cell function."""
    if not states:
        zeros = x.new_zeros((x.shape[0], weights[1].shape[1]))
        states = [zeros] * len(CELLS[cell].states)
    if len(states) == 1:
        return [_STEPS[cell](x, states[0], *weights)]
    return list(_STEPS[cell](x, states, *weights))


def _layer_weights(call: Call, weights: Weights) -> list[Tensor]:
    G_H = weights.w_ih.shape[0]
    zeros = call.x.new_zeros(G_H) if weights.b_ih is None else None
    w_ih, w_hh, b_ih, b_hh = weights[:4]
    biases = [zeros if b is None else b for b in (b_ih, b_hh)]
    return [w.detach() for w in (w_ih, w_hh, *biases)]


def forward(call: Call, save: bool, trajectory: bool) -> Result:
    if save and layout.on_onednn(call):
        return _onednn_forward(call)
    return cudnn.forward(call, save, trajectory)


def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    run = _onednn_backward if layout.on_onednn(call) else cudnn.backward
    return run(call, result, grads, wanted)


def _onednn_forward(call: Call) -> Result:
    """One LSTM layer; saves a workspace for each direction."""
    h_0, c_0 = (s.detach() for s in call.states or call.zero_states())
    H, x = call.H, call.x.detach().contiguous()
    ys, hs, cs, saved = [], [], [], []
    for r, weights in enumerate(call.weights):
        with torch.enable_grad():  # without it oneDNN keeps no workspace
            y, h_n, c_n, workspace = torch.ops.aten.mkldnn_rnn_layer(
                x,
                *_layer_weights(call, weights),
                h_0[r].contiguous(),
                c_0[r].contiguous(),
                call.reverse[r],
                [],
                _LSTM_MODE,
                H,
                1,
                True,
                False,
                False,
                True,
            )
        ys.append(y)
        hs.append(h_n)
        cs.append(c_n)
        saved.append(workspace)
    y = ys[0] if len(ys) == 1 else torch.cat(ys, -1)
    return Result(y, [torch.stack(hs), torch.stack(cs)], [], saved)


def _onednn_backward(
    call: Call, result: Result, grads: OutputGradients, wanted: Wanted
) -> Gradients:
    h_0, c_0 = call.states or call.zero_states()
    H, x = call.H, call.x.contiguous()
    dx: Tensor | None = None
    dh, dc, dweights = [], [], []
    for r, weights in enumerate(call.weights):
        columns = slice(r * H, (r + 1) * H)
        dy = None if grads.y is None else grads.y[..., columns].contiguous()
        final = [None if g is None else g[r].contiguous() for g in grads.states]
        out = torch.ops.aten.mkldnn_rnn_layer_backward(
            x,
            *_layer_weights(call, weights),
            h_0[r].contiguous(),
            c_0[r].contiguous(),
            result.y[..., columns].contiguous(),
            result.states[0][r],
            result.states[1][r],
            dy,
            *final,
            call.reverse[r],
            _LSTM_MODE,
            H,
            1,
            True,
            True,
            False,
            [],
            False,
            result.saved[r],
        )
        dx = out[0] if dx is None else dx + out[0]
        dw_ih, dw_hh, db_ih, db_hh, dh_0, dc_0 = out[1:]
        biased = weights.b_ih is not None
        # torch returns one tensor for both biases' gradients
        dweights.append(
            Weights(
                dw_ih, dw_hh, db_ih if biased else None, db_hh.clone() if biased else None, None
            )
        )
        dh.append(dh_0)
        dc.append(dc_0)
    return Gradients(
        dx if wanted.x else None,
        [torch.stack(dh), torch.stack(dc)] if wanted.states else None,
        dweights if wanted.weights else None,
    )
