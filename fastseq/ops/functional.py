"""The functional layers: one layer, one or two directions, dense, padded or packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backends.contract import Backend, Memory, Request
from ..cells import CELLS, Cell
from .checks import check_layer, check_lengths, check_mask, check_reset, check_states
from .geometry import Packed, Padded, beside, geometry_of, values_of
from .run import run
from .stack import Stack

LayerWeights = Sequence[Tensor] | Sequence[Sequence[Tensor]]

_ARGUMENTS = """
    Args:
        input: (T, B, I), or (T, I) for one sequence, or a PackedSequence; any floating dtype.
        weights: {weights}.
            For two directions a pair of these, as ``module.all_weights`` holds them.
        hx: {state}; zeros if None.
        lengths: (B,) integers or None. The input is then padded: the output is zero behind each
            sequence's end, the final state is that of its last step, and a sequence of length 0
            keeps its initial state.
        reset: (T, B) bool or None. True where a step begins a new sequence: no state crosses from
            the step before, in either direction.
{h_mask}{all_states}\
        memory: 'full' keeps the gates for backward; 'lean' keeps the output alone and
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


def peephole_lstm(
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
    r"""One long short-term memory layer whose gates see the cell, in one or two directions.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi} + w_{ci} \odot c_{t-1}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf} + w_{cf} \odot c_{t-1}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho} + w_{co} \odot c_t) \\
        h_t &= o_t \odot \tanh(c_t), \quad \text{or } W_{hr} (o_t \odot \tanh(c_t))
    """
    options = (all_states, memory, deterministic, backend)
    return _layer("peephole_lstm", input, weights, hx, lengths, reset, h_mask, *options)


def coupled_lstm(
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
    r"""One long short-term memory layer that admits as much as it forgets, in one or two
    directions.

    .. math::
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot g_t \\
        h_t &= o_t \odot \tanh(c_t), \quad \text{or } W_{hr} (o_t \odot \tanh(c_t))
    """
    options = (all_states, memory, deterministic, backend)
    return _layer("coupled_lstm", input, weights, hx, lengths, reset, h_mask, *options)


def gru(
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Tensor | None = None,
    *,
    reset_after: bool = True,
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

    ``reset_after=False`` puts the reset gate before the product, as in the paper:
    :math:`n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})`. Of the two
    conventions of z this is that in which z keeps :math:`h_{t-1}`, see :class:`fastseq.GRU`.
    """
    if not isinstance(reset_after, bool):
        raise TypeError(f"reset_after should be of type bool, got: {type(reset_after).__name__}")
    cell = "gru" if reset_after else "gru_reset_before"
    options = (False, memory, deterministic, backend)
    return _layer(cell, input, weights, hx, lengths, reset, h_mask, *options)


def mgu(
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
    r"""One layer of minimal gated units, in one or two directions.

    .. math::
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + W_{hn} (f_t \odot h_{t-1}) + b_{hn}) \\
        h_t &= (1 - f_t) \odot h_{t-1} + f_t \odot n_t
    """
    options = (False, memory, deterministic, backend)
    return _layer("mgu", input, weights, hx, lengths, reset, h_mask, *options)


def indrnn(
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "relu",
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    memory: Memory = "full",
    deterministic: bool = False,
    backend: Backend = None,
):
    r"""One independently recurrent layer, in one or two directions; ``nonlinearity`` is 'relu' or
    'tanh'.

    .. math::
        h_t = \phi(W_{ih} x_t + b_{ih} + w_u \odot h_{t-1})
    """
    check_nonlinearity(nonlinearity, ("relu", "tanh"))
    cell = "indrnn" if nonlinearity == "relu" else "indrnn_tanh"
    options = (False, memory, deterministic, backend)
    return _layer(cell, input, weights, hx, lengths, reset, None, *options)


def scrn(
    input: Tensor | PackedSequence,
    weights: LayerWeights,
    hx: Sequence[Tensor] | None = None,
    *,
    alpha: float | Tensor | Sequence[float | Tensor] = 0.95,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    h_mask: Tensor | None = None,
    memory: Memory = "full",
    deterministic: bool = False,
    backend: Backend = None,
):
    r"""One layer of the structurally constrained network, in one or two directions: a recurrence of
    leaky integrators, and one of sigmoid units on :math:`[x_t, s_t]`.

    .. math::
        s_t &= (1 - \alpha) B x_t + \alpha s_{t-1} \\
        h_t &= \sigma(A x_t + P s_t + b_{ih} + R h_{t-1} + b_{hh})

    Args:
        input: (T, B, I), or (T, I) for one sequence, or a PackedSequence; any floating dtype.
        weights: ``([A, P], R, B)`` or ``([A, P], R, b_ih, b_hh, B)``; shapes (H, I + C), (H, H),
            (H,), (H,), (C, I). For two directions a pair of these.
        hx: a pair (h_0, s_0), (D, B, H) and (D, B, C); zeros if None.
        alpha: how much of s stays in a step: a number between 0 and 1, or a tensor (C,); for two
            directions also a pair of these.
        lengths, reset, memory, deterministic, backend: as :func:`fastseq.gru`.
        h_mask: (D, B, H) or None; multiplies :math:`h_{t-1}` before its product with R.

    Returns:
        ``output, (h_n, s_n)``: the output (T, B, D * (H + C)), in each direction h and then s, or a
        PackedSequence, and the state after the last step.

    Memory: training keeps an element per step, sequence and unit of both kinds.

    Raises:
        ValueError, TypeError, RuntimeError, NotImplementedError: as :func:`fastseq.gru`.

    Source: Mikolov et al. 2014, Learning Longer Memory in Recurrent Neural Networks
    """
    given = (input, weights, hx, alpha, lengths, reset, h_mask, memory, deterministic, backend)
    return scrn_layer(*given)


def scrn_layer(
    input: Any,
    weights: Any,
    hx: Any,
    alpha: Any,
    lengths: Any,
    reset: Any,
    h_mask: Any,
    memory: Memory,
    deterministic: bool,
    backend: Backend,
    nested: bool = False,
    mask: Callable[[Stack], None] | None = None,
) -> Any:
    """:func:`scrn`. nested: whether a NestedTensor is taken. mask: gives each of the two stacks its
    masks, before it runs."""
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError(
            "weights: expected a sequence (w_ih, w_hh[, b_ih, b_hh], w_ic), or a pair of them, got "
            f"{type(weights).__name__}"
        )
    ways: Any = [weights] if isinstance(weights[0], Tensor) else list(weights)
    D = len(ways)
    for way in ways:
        if len(way) not in (3, 5) or not all(isinstance(w, Tensor) for w in way):
            raise ValueError(
                "weights: expected 3 or 5 tensors (w_ih, w_hh[, b_ih, b_hh], w_ic) a direction, "
                f"got {len(way)} of {_kinds(way)}"
            )
    if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
        raise TypeError(f"hx: expected a tuple of tensors (h_0, s_0), got {_kinds(hx)}")
    h_0, s_0 = (None, None) if hx is None else hx
    context, hidden = scrn_weights(ways, alpha if isinstance(alpha, (tuple, list)) else [alpha] * D)
    shared = (False, memory, deterministic, backend, nested)
    time = (lengths, reset)
    s, s_n = _layer("leaky_integrator", input, context, s_0, *time, None, *shared, mask=mask)
    x = beside(input, input, s)
    h, h_n = _layer("rnn_sigmoid", x, hidden, h_0, *time, h_mask, *shared, mask=mask)
    pairs = zip(values_of(h).chunk(D, -1), values_of(s).chunk(D, -1), strict=True)
    return beside(h, *[part for pair in pairs for part in pair]), (h_n, s_n)


def scrn_weights(
    ways: Sequence[Sequence[Tensor]], alphas: Sequence[Tensor | float]
) -> tuple[list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
    """Of each direction the weights of the leaky integrators, and of the hidden units, whose input
    is that of the layer and the context of both directions."""
    context: list[tuple[Tensor, ...]] = []
    hidden: list[tuple[Tensor, ...]] = []
    D = len(ways)
    for d, ((w_ih, *others, w_ic), alpha) in enumerate(zip(ways, alphas, strict=True)):
        C = w_ic.shape[0]
        if not isinstance(alpha, Tensor):
            alpha = torch.full((C,), alpha, dtype=w_ic.dtype, device=w_ic.device)
        context.append((w_ic, alpha))
        before, after = w_ih.new_zeros(w_ih.shape[0], d * C), (D - 1 - d) * C
        I = w_ih.shape[1] - C  # noqa: E741  (the field's letter)
        parts = [w_ih[:, :I], before, w_ih[:, I:], w_ih.new_zeros(w_ih.shape[0], after)]
        hidden.append((torch.cat(parts, 1) if D > 1 else w_ih, *others))
    return context, hidden


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
    r"""One Elman layer, in one or two directions; ``nonlinearity`` is 'tanh', 'relu' or 'sigmoid'.

    .. math::
        h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})
    """
    check_nonlinearity(nonlinearity, ("tanh", "relu", "sigmoid"))
    cell = f"rnn_{nonlinearity}"
    options = (False, memory, deterministic, backend)
    return _layer(cell, input, weights, hx, lengths, reset, h_mask, *options)


_ALL_STATES = """        all_states: also return c at every step, as a third value shaped like the
            output with D*H features; gradients flow through it.
"""
_H_MASK = """        h_mask: (D, B, {hidden}) or None; multiplies h_{{t-1}} before its product with
            w_hh. Gets no gradient.
"""
_WEIGHTS = """``(w_ih, w_hh)`` or ``(w_ih, w_hh, b_ih, b_hh)``{projection}{units};
            shapes (G*H, I), (G*H, {hidden}), (G*H,), (G*H,){projection_shape}{units_shape}, with
            G = {gates} gates in the order {order}"""


def _document(function: Any, cell: str, source: str = "", weights: str = "") -> None:
    """Add what a function takes and gives, as the declaration of its cell has it."""
    definition = CELLS[cell]
    pair, units = bool(definition.other_states), definition.unit_parameters
    projects = pair and definition.can_project
    own = ", ".join(f"w_{u}" for u in units)
    line = ",\n            "
    words = {
        "hidden": "P" if projects else "H",
        "projection": f"{line}``w_hr`` behind them for a projected state" if projects else "",
        "projection_shape": ", (P, H)" if projects else "",
        "units": f"{line}and last ``{own}``" if units else "",
        "units_shape": ", (H,) each" if units else "",
        "gates": definition.G,
        "order": ", ".join(definition.gates),
    }
    function.__doc__ = (function.__doc__ or "") + _ARGUMENTS.format(
        weights=weights or _WEIGHTS.format(**words),
        h_mask=_H_MASK.format(**words) if definition.masks_h else "",
        all_states=_ALL_STATES if pair else "",
        state=f"(h_0, c_0), (D, B, {words['hidden']}) and (D, B, H)" if pair else "h_0 (D, B, H)",
        returns="output, (h_n, c_n)" if pair else "output, h_n",
        hidden=words["hidden"],
        carried=" and c" if pair else "",
        kept=len({*definition.saved, *definition.states}),
        lean="1",
        source=definition.source + source,
    )


_document(lstm, "lstm", "; Sak et al. 2014 for the projection")
_document(peephole_lstm, "peephole_lstm", "; Sak et al. 2014 for the projection")
_document(coupled_lstm, "coupled_lstm", "; Sak et al. 2014 for the projection")
_document(gru, "gru")
_document(mgu, "mgu")
_document(rnn, "rnn_tanh")
_document(
    indrnn,
    "indrnn",
    weights="``(w_ih, w_u)`` or ``(w_ih, b_ih, w_u)``, of which a layer calls the last weight_hh;\n"
    "            shapes (H, I), (H,), (H,)",
)


def check_nonlinearity(name: Any, known: Sequence[str]) -> None:
    """As torch.nn.RNN checks it."""
    if name not in known:
        *most, last = map(repr, known)
        raise ValueError(f"Unknown nonlinearity '{name}'. Select from {', '.join(most)} or {last}.")


def layer_weights(cell: str, weights: LayerWeights) -> tuple[list[Tensor], int, bool, bool]:
    """One or two directions' weights in one list, the directions, and whether there are biases and
    a projection."""
    definition = CELLS[cell]
    matrices = 1 + bool(definition.recurrent_gates)  # and with biases as many of these
    bare = matrices + len(definition.unit_parameters)
    if not isinstance(weights, (tuple, list)) or not weights:
        raise TypeError(
            f"weights: expected a sequence {_listed(definition)}, or a pair of them, "
            f"got {type(weights).__name__}"
        )
    ways = [weights] if isinstance(weights[0], Tensor) else list(weights)
    if len(ways) > 2:
        raise ValueError(f"weights: expected one or two directions, got {len(ways)}")
    projects = matrices == 2  # what does not is told below
    forms = {bare + projected: (False, projected) for projected in (False, True)[: 1 + projects]}
    forms |= {count + matrices: (True, projected) for count, (_, projected) in forms.items()}
    found = []
    for way in ways:
        if not all(isinstance(w, Tensor) for w in way) or len(way) not in forms:
            raise ValueError(
                f"weights: expected {min(forms)} to {max(forms)} tensors {_listed(definition)} a "
                f"direction, got {len(way)} of {[type(w).__name__ for w in way]}"
            )
        found.append(forms[len(way)])
        if found[-1][1] != found[0][1]:
            raise ValueError("weights: both directions must have the same sizes")
    biased, projected = any(b for b, _ in found), found[0][1]
    flat: list[Tensor] = []
    for way, (has_biases, _) in zip(ways, found, strict=True):
        tensors = list(way)
        if biased and not has_biases:  # those of this direction are zero
            tensors[matrices:matrices] = [w.new_zeros(w.shape[:1]) for w in tensors[:matrices]]
        flat += tensors
    if projected and not definition.other_states:
        raise ValueError("weights: a projection w_hr is for lstm only")
    return flat, len(ways), biased, projected


def _listed(cell: Cell) -> str:
    """What a direction's weights are."""
    both = bool(cell.recurrent_gates)
    hr = "[, w_hr]" if both else ""
    units = "".join(f", w_{u}" for u in cell.unit_parameters)
    return f"(w_ih{', w_hh' * both}[, b_ih{', b_hh' * both}]{hr}{units})"


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


def _layer(cell: str, *arguments: Any, mask: Callable[[Stack], None] | None = None) -> Any:
    stack = layer_stack(cell, *arguments)
    if mask is not None:
        mask(stack)
    y, finals, along = run(stack)
    state = tuple(finals) if stack.cell.other_states else finals[0]
    return (y, state, along[0]) if stack.request.trajectory else (y, state)


def layer_stack(
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
    nested: bool = False,
) -> Stack:
    """What the operations run for one layer, with everything that a caller gives checked. nested:
    whether a NestedTensor is taken."""
    flat, D, biased, projected = layer_weights(cell, weights)
    states = given_states(cell, hx)
    if not isinstance(input, (Tensor, PackedSequence)):
        raise TypeError(f"input: expected a Tensor or PackedSequence, got {type(input).__name__}")
    if isinstance(input, Tensor):
        if input.is_nested and not nested:
            raise TypeError(
                "input: expected a dense tensor or a PackedSequence, got a NestedTensor, which the "
                "layers take; pass torch.nested.to_padded_tensor(input, 0.0) and lengths"
            )
        if input.dim() not in (2, 3):
            raise ValueError(f"{cell}: Expected input to be 2D or 3D, got {input.dim()}D instead")
    geometry = geometry_of(input, False, reset, (h_mask, *states))
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
        editable=not CELLS[cell].other_states,
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
    return stack
