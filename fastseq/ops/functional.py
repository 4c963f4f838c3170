"""The functional layers: one layer, one or two directions, dense, padded or packed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backends.contract import Backend, Memory, Request
from ..cells import CELLS
from .checks import check_layer, check_lengths, check_mask, check_reset, check_states
from .geometry import Dense, Geometry, Packed, Padded
from .run import run
from .stack import Stack

LayerWeights = Sequence[Tensor] | Sequence[Sequence[Tensor]]

_ARGUMENTS = """
    Args:
        input: (T, B, I), or (T, I) for one sequence, or a PackedSequence; any floating dtype.
        weights: ``(w_ih, w_hh)``, ``(w_ih, w_hh, b_ih, b_hh)``{projection}; shapes (G*H, I),
            (G*H, {hidden}), (G*H,), (G*H,){projection_shape}, with G = {gates} gates in the order
            {order}. For two directions a pair of these, as ``module.all_weights`` holds them.
        hx: {state}; zeros if None.
        lengths: (B,) integers or None. The input is then padded: the output is zero behind each
            sequence's end, the final state is that of its last step, and a sequence of length 0
            keeps its initial state.
        reset: (T, B) bool or None. True where a step begins a new sequence: no state crosses from
            the step before, in either direction.
        h_mask: (D, B, {hidden}) or None; multiplies h_{{t-1}} before its product with w_hh. Gets
            no gradient.
{all_states}        memory: 'full' keeps the gates for backward; 'lean' keeps the output alone and
            computes them again.
        deterministic: True takes the C++ kernels alone, whose bits depend neither on the batch
            around a sequence nor on the number of threads.
        backend: None chooses; else a name of :func:`fastseq.backends`, or several in order.

    Returns:
        ``{returns}``: the output (T, B, D*{hidden}) or a PackedSequence, and the state after the
        last step.

    Numerics: float32 and float64 throughout in that type; float16 and bfloat16 store that type and
        compute gates{carried} in float32.

    Memory: training keeps {kept} elements per step, sequence and hidden unit ('full'), or {lean}
        ('lean').

    Raises:
        ValueError, TypeError: an argument of the wrong kind, rank, dtype or size.
        RuntimeError: input or state of the wrong size; T = 0; a backend that is not available.
        NotImplementedError: a named backend that declines, with its reason.

    Source: {source}
"""


def lstm(
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Sequence[Tensor] | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    h_mask: Tensor | None = None,
    all_states: bool = False,
    memory: Memory = "full",
    deterministic: bool = False,
    backend: Backend = None,
):
    r"""One long short-term memory layer, in one or two directions.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \quad \text{or } W_{hr} (o_t \odot \tanh(c_t))
    """
    options = (all_states, memory, deterministic, backend)
    return _layer("lstm", input, weights, hx, lengths, reset, h_mask, *options)


def gru(
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    h_mask: Tensor | None = None,
    memory: Memory = "full",
    deterministic: bool = False,
    backend: Backend = None,
):
    r"""One gated recurrent unit layer, in one or two directions.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}
    """
    options = (False, memory, deterministic, backend)
    return _layer("gru", input, weights, hx, lengths, reset, h_mask, *options)


def rnn(
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    h_mask: Tensor | None = None,
    memory: Memory = "full",
    deterministic: bool = False,
    backend: Backend = None,
):
    r"""One Elman layer, in one or two directions; ``nonlinearity`` is 'tanh' or 'relu'.

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})
    """
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
    cell = f"rnn_{nonlinearity}"
    options = (False, memory, deterministic, backend)
    return _layer(cell, input, weights, hx, lengths, reset, h_mask, *options)


_ALL_STATES = """        all_states: also return c at every step, as a third value shaped like the
            output with D*H features; gradients flow through it.
"""
_PLAIN = {
    "projection": "",
    "projection_shape": "",
    "hidden": "H",
    "all_states": "",
    "state": "h_0 (D, B, H)",
    "returns": "output, h_n",
    "carried": "",
    "lean": "1",
}
lstm.__doc__ = (lstm.__doc__ or "") + _ARGUMENTS.format(
    projection=", and a last ``w_hr`` for a projected state",
    projection_shape=", (P, H)",
    hidden="P",
    all_states=_ALL_STATES,
    gates=4,
    order="i, f, g, o",
    state="(h_0, c_0), (D, B, P) and (D, B, H)",
    returns="output, (h_n, c_n)",
    carried=" and c",
    kept="6",
    lean="1",
    source=CELLS["lstm"].source + "; Sak et al. 2014 for the projection",
)
gru.__doc__ = (gru.__doc__ or "") + _ARGUMENTS.format(
    **_PLAIN, gates=3, order="r, z, n", kept="5", source=CELLS["gru"].source
)
rnn.__doc__ = (rnn.__doc__ or "") + _ARGUMENTS.format(
    **_PLAIN, gates=1, order="h", kept="1", source=CELLS["rnn_tanh"].source
)


def layer_weights(cell: str, weights: LayerWeights) -> tuple[list[Tensor], int, bool, bool]:
    """One or two directions' weights in one list, the directions, and whether there are biases and
    a projection."""
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError(
            "weights: expected a sequence (w_ih, w_hh[, b_ih, b_hh][, w_hr]), or a pair of them, "
            f"got {type(weights).__name__}"
        )
    ways = [weights] if isinstance(weights[0], Tensor) else list(weights)
    if len(ways) > 2:
        raise ValueError(f"weights: expected one or two directions, got {len(ways)}")
    counts = [len(way) for way in ways]
    flat: list[Tensor] = []
    for way in ways:
        tensors = list(way)
        if not all(isinstance(w, Tensor) for w in tensors) or len(tensors) not in (2, 3, 4, 5):
            raise ValueError(
                "weights: expected 2 to 5 tensors (w_ih, w_hh[, b_ih, b_hh][, w_hr]) a direction, "
                f"got {len(tensors)} of {[type(w).__name__ for w in tensors]}"
            )
        if len(tensors) % 2 != counts[0] % 2:
            raise ValueError("weights: both directions must have the same sizes")
        if len(tensors) < 4 <= max(counts):  # one direction has no biases, so they are zero
            tensors[2:2] = [w.new_zeros(w.shape[:1]) for w in tensors[:2]]
        flat += tensors
    each = len(flat) // len(ways)
    if each % 2 and not CELLS[cell].other_states:
        raise ValueError("weights: a projection w_hr is for lstm only")
    return flat, len(ways), each >= 4, each % 2 == 1


def given_states(cell: str, hx: Any) -> list[Tensor]:
    """What was given as the initial state, in a list."""
    if hx is None:
        return []
    names = CELLS[cell].states
    states = [hx] if len(names) == 1 or isinstance(hx, Tensor) else hx
    if isinstance(states, (tuple, list)) and all(isinstance(s, Tensor) for s in states):
        return list(states)
    takes = "a tensor h_0" if len(names) == 1 else "a tuple of tensors (h_0, c_0)"
    raise TypeError(f"hx: expected {takes}, got {type(hx).__name__} of {_kinds(hx)}")


def _kinds(values: Any) -> str:
    return str([type(v).__name__ for v in values] if isinstance(values, (tuple, list)) else values)


def _layer(
    cell: str,
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Tensor | Sequence[Tensor] | None,
    lengths: Tensor | Sequence[int] | None,
    reset: Tensor | None,
    h_mask: Tensor | None,
    all_states: bool,
    memory: Memory,
    deterministic: bool,
    backend: Backend,
):
    flat, D, biased, projected = layer_weights(cell, weights)
    pair = len(CELLS[cell].states) > 1
    states = given_states(cell, hx)
    geometry: Geometry
    if isinstance(input, PackedSequence):
        geometry = Packed(input, False, reset, (h_mask, *states))
    elif not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or PackedSequence, got {type(input).__name__}")
    elif input.is_nested:
        raise TypeError(
            "input: expected a dense tensor or a PackedSequence, got a NestedTensor, which the "
            "layers take; pass torch.nested.to_padded_tensor(input, 0.0) and lengths"
        )
    elif input.dim() not in (2, 3):
        raise ValueError(f"{cell}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    else:
        geometry = Dense(input, False)
    request = Request(
        cell,
        1,
        D,
        biased,
        projected,
        deterministic=deterministic,
        trajectory=all_states,
        memory=memory,
        backend=backend,
        editable=not pair,
    )
    stack = Stack(request, input, states, flat, geometry)
    check_layer(stack)
    check_states(stack)
    packed, batched = isinstance(geometry, Packed), geometry.batched
    ends = check_lengths(lengths, geometry.T, geometry.B, packed, batched)
    if ends is not None:
        stack.geometry = Padded(stack.data, False, ends)
    stack.reset = check_reset(reset, stack)
    stack.h_mask = check_mask(h_mask, stack)
    y, finals, along = run(stack)
    state = tuple(finals) if pair else finals[0]
    return (y, state, along[0]) if all_states else (y, state)
