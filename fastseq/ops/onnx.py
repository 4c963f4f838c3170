"""A stack as ONNX's standard operators LSTM, GRU and RNN, while torch.onnx.export captures it.

The graph then holds one operator a layer, which every ONNX runtime has a kernel for, in place of an
operator of ours. torch runs nothing of it: the symbolic operator gives shapes and types alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Weights, ways
from ..backends.stacked import one_by_one
from ..cells import CELLS
from .geometry import Dense, Padded
from .stack import Stack


class Standard(NamedTuple):
    """ONNX's operator for a cell: the order of its gates, in our letters, and its attributes.

    gates: '-f' is a gate with the weights of f negated, which is 1 - f.
    peepholes: the unit parameters of its input P, in ONNX's order.
    """

    operator: str
    gates: tuple[str, ...]
    attributes: dict[str, int]
    activation: str | None = None
    peepholes: tuple[str, ...] = ()


STANDARDS = {
    "lstm": Standard("LSTM", ("i", "o", "f", "g"), {}),
    "peephole_lstm": Standard("LSTM", ("i", "o", "f", "g"), {}, peepholes=("ci", "co", "cf")),
    "coupled_lstm": Standard("LSTM", ("-f", "o", "f", "g"), {}),
    "gru": Standard("GRU", ("z", "r", "n"), {"linear_before_reset": 1}),
    "gru_reset_before": Standard("GRU", ("z", "r", "n"), {"linear_before_reset": 0}),
    "mgu": Standard("GRU", ("-f", "f", "n"), {"linear_before_reset": 0}),
    "rnn_tanh": Standard("RNN", ("h",), {}, "Tanh"),
    "rnn_relu": Standard("RNN", ("h",), {}, "Relu"),
    "rnn_sigmoid": Standard("RNN", ("h",), {}, "Sigmoid"),
}


def is_exporting() -> bool:
    """Whether torch.onnx.export (dynamo=True) captures us."""
    return torch.compiler.is_exporting() and _in_onnx_export()


def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


# Dynamo takes torch's own word for False, always
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason_against(stack: Stack) -> str | None:
    """Why ONNX's operators do not serve; None if they do."""
    request = stack.request
    if request.cell not in STANDARDS:
        return f"ONNX has no operator for {request.definition.called}"
    if request.projected:
        return "ONNX's LSTM has no projection (proj_size)"
    if not isinstance(stack.geometry, Dense):
        return "ONNX's operators take no packed rows; pass the padded tensor and lengths="
    if stack.reset is not None:
        return "ONNX's operators cannot reset a state in mid-sequence (reset=)"
    if stack.h_mask is not None:
        return "ONNX's operators cannot mask the recurrent operand (h_mask)"
    if stack.zoneout is not None:
        return "ONNX's operators blend no states (zoneout)"
    if request.trajectory:
        return "ONNX's LSTM gives no cell state but the last (all_states=True)"
    return None


def run(stack: Stack) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output and the final states, as :func:`.run.run`."""
    request, geometry = stack.request, stack.geometry
    assert isinstance(geometry, Dense)
    padded = isinstance(geometry, Padded)
    lengths = geometry.lengths if isinstance(geometry, Padded) else None
    given = [s if padded else geometry.state(s) for s in stack.states]

    def layer(
        number: int, x: Tensor, states: list[Tensor], weights: list[Weights]
    ) -> tuple[Tensor, list[Tensor]]:
        return _layer(request.cell, x, lengths, states, weights)

    x = geometry.dense(stack.x)
    y, final = one_by_one(request, x, given, ways(request, stack.weights), layer)
    if lengths is not None:  # ONNX says nothing of what is behind an end, nor of empty sequences
        lengths = lengths.to(y.device)
        inside = torch.arange(y.shape[0], device=y.device)[:, None] < lengths
        y = torch.where(inside[:, :, None], y, 0)
        starts = given or [torch.zeros_like(s) for s in final]
        some = (lengths > 0)[:, None]
        final = [torch.where(some, s, start) for s, start in zip(final, starts, strict=True)]
    if padded:
        return geometry.undo(y), final, []
    return geometry.output(y), [geometry.final(s) for s in final], []


def _layer(
    cell: str, x: Tensor, lengths: Tensor | None, states: list[Tensor], weights: Sequence[Weights]
) -> tuple[Tensor, list[Tensor]]:
    """One layer. ONNX's shapes: W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), P (D, 3*H),
    Y (T, D, B, H)."""
    standard, gates, units = STANDARDS[cell], CELLS[cell].gates, CELLS[cell].unit_parameters
    T, B, D = x.shape[0], x.shape[1], len(weights)
    H = weights[0].w_ih.shape[0] // len(gates)
    order = [(gates.index(gate.lstrip("-")), gate[0] == "-") for gate in standard.gates]

    def ordered(w: Tensor) -> Tensor:
        if len(order) == 1:
            return w
        parts = [(w[k * H : (k + 1) * H], negated) for k, negated in order]
        return torch.cat([-part if negated else part for part, negated in parts])

    W = torch.stack([ordered(way.w_ih) for way in weights])
    R = torch.stack([ordered(way.w_hh) for way in weights])  # type: ignore[arg-type]
    biases = None
    if weights[0].b_ih is not None:
        biases = torch.stack(
            [torch.cat([ordered(way.b_ih), ordered(way.b_hh)]) for way in weights]  # type: ignore
        )
    attributes: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if D == 2 else "forward",
        **standard.attributes,
    }
    if standard.activation is not None:
        attributes["activations"] = [standard.activation] * D
    n, ends = len(CELLS[cell].states), None if lengths is None else lengths.to(torch.int32)
    more: list[Tensor | None] = [*states]
    if standard.peepholes:
        places = [units.index(name) for name in standard.peepholes]
        P = torch.stack([torch.cat([way.units[k] for k in places]) for way in weights])
        more = [*(more or [None] * n), P]
    y, *last = torch.onnx.ops.symbolic_multi_out(
        standard.operator,
        [x, W, R, biases, ends, *more],
        attributes,
        dtypes=[x.dtype] * (1 + n),
        shapes=[(T, D, B, H), *[(D, B, H)] * n],
    )
    return y.transpose(1, 2).reshape(T, B, D * H), last
