"""A stack as ONNX's standard operators LSTM, GRU and RNN, while torch.onnx.export captures it.

The graph then holds one operator a layer, which every ONNX runtime has a kernel for, in place of an
operator of ours. torch runs nothing of it: the symbolic operator gives shapes and types alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..backends.contract import Weights
from ..cells import CELLS

if TYPE_CHECKING:
    from .stack import Stack


class Standard(NamedTuple):
    """ONNX's operator for a cell: the order of its gates, in our letters, and its attributes."""

    operator: str
    gates: str
    attributes: dict[str, int]
    activation: str | None = None


STANDARDS = {
    "lstm": Standard("LSTM", "iofg", {}),
    "gru": Standard("GRU", "zrn", {"linear_before_reset": 1}),
    "gru_reset_before": Standard("GRU", "zrn", {"linear_before_reset": 0}),
    "rnn_tanh": Standard("RNN", "h", {}, "Tanh"),
    "rnn_relu": Standard("RNN", "h", {}, "Relu"),
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
    if stack.cell not in STANDARDS:
        return f"ONNX has no operator for {stack.cell}"
    if stack.weights[0].w_hr is not None:
        return "ONNX's LSTM has no projection (proj_size)"
    if stack.batch_sizes is not None:
        return "ONNX's operators take no packed rows; pass the padded tensor and lengths="
    if stack.reset is not None:
        return "ONNX's operators cannot reset a state in mid-sequence (reset=)"
    if stack.h_mask is not None:
        return "ONNX's operators cannot mask the recurrent operand (h_mask)"
    if stack.zoneout is not None:
        return "ONNX's operators blend no states (zoneout)"
    if stack.trajectory:
        return "ONNX's LSTM gives no cell state but the last (all_states=True)"
    return None


def run(stack: Stack) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y and final states (layers * D, B, H), as :func:`.stack.run`."""
    D = stack.directions
    x, lengths = stack.x, stack.lengths
    finals: list[list[Tensor]] = []
    for layer in range(stack.layers):
        part = slice(layer * D, (layer + 1) * D)
        if layer and stack.training and stack.dropout > 0:
            x = torch.dropout(x, stack.dropout, True)
        states = [s[part] for s in stack.states]
        x, last = _layer(stack.cell, x, lengths, states, stack.weights[part])
        finals.append(last)
    final = [torch.cat(s) for s in zip(*finals, strict=True)]
    if lengths is not None:  # ONNX says nothing of what is behind an end, nor of empty sequences
        lengths = lengths.to(x.device)
        inside = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
        x = torch.where(inside[:, :, None], x, 0)
        starts = stack.states or [torch.zeros_like(s) for s in final]
        some = (lengths > 0)[:, None]
        final = [torch.where(some, s, start) for s, start in zip(final, starts, strict=True)]
    return x, final, []


def _layer(
    cell: str, x: Tensor, lengths: Tensor | None, states: list[Tensor], weights: Sequence[Weights]
) -> tuple[Tensor, list[Tensor]]:
    """One layer. ONNX's shapes: W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), Y (T, D, B, H)."""
    standard, gates = STANDARDS[cell], CELLS[cell].gates
    T, B, D = x.shape[0], x.shape[1], len(weights)
    H = weights[0].w_ih.shape[0] // len(gates)
    order = [gates.index(gate) for gate in standard.gates]

    def ordered(w: Tensor) -> Tensor:
        return torch.cat([w[k * H : (k + 1) * H] for k in order]) if len(order) > 1 else w

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
    n = len(CELLS[cell].states)
    y, *last = torch.onnx.ops.symbolic_multi_out(
        standard.operator,
        [x, W, R, biases, None if lengths is None else lengths.to(torch.int32), *states],
        attributes,
        dtypes=[x.dtype] * (1 + n),
        shapes=[(T, D, B, H), *[(D, B, H)] * n],
    )
    return y.transpose(1, 2).reshape(T, B, D * H), last
