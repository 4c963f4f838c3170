"""How the gradient of a loss flows back through time: :func:`gradient_flow` and its picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends.contract import Weights, ways
from ..ops.geometry import OneStep
from ..ops.run import run
from ..ops.stack import Stack, zero_states
from .convert import replace
from .recurrent import Recurrent, call_stack

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The states of one recurrence behind every step, in the order of time.
Trace = list[list[Tensor]]


def gradient_flow(
    layer: nn.Module,
    x: Tensor,
    loss_fn: Callable[[Tensor, Any], Tensor] | None = None,
    *,
    hx: Any = None,
    lengths: Tensor | Sequence[int] | None = None,
    state: str = "h",
    per_sequence: bool = False,
) -> Tensor:
    r"""The norm of a loss's gradient with regard to the hidden state at every step.

    .. math::
        n_{l,t} = \left\lVert \frac{\partial L}{\partial h^{(l)}_t} \right\rVert_2, \qquad
        \frac{\partial L}{\partial h_t} = \frac{\partial L}{\partial h_T}
        \prod_{t < i \le T} \frac{\partial h_i}{\partial h_{i-1}}

    The product, for a loss of the last step, is why it vanishes or explodes as one goes back from
    the loss. The gradient is the whole of it: by the step behind, by the layer above, and by the
    loss. With regard to c of an LSTM it is taken with h of that step held fixed, and so of any
    state with the others. The layer computes as in evaluation, without dropout. Neither its
    parameters nor x get a gradient, and each step is one call of the layer's own backend: an
    LSTM(128, 128) of T = 100, B = 32 takes about as long as one step of training.

    Args:
        layer: a recurrent layer of fastseq or torch.nn, of any depth and both directions.
        x: (T, B, I), (B, T, I) with the layer's ``batch_first``, or (T, I) of one sequence.
        loss_fn: takes what ``layer(x)`` returns, the output and the final state, and returns a
            tensor of one number. Its parameters get no gradient. If None, the sum of the last
            layer's final hidden state: of each sequence's last step, and in the reverse direction
            of its first.
        hx: the initial state, as the layer takes it.
        lengths: (B,) integers or None, as the layer takes them.
        state: 'h', or another of the cell's states, as 'c' of an LSTM.
        per_sequence: whether each sequence has a norm of its own.

    Returns:
        (num_layers * D, T), the layers in torch.nn's order, forward before reverse; of the whole
        batch as one vector, or (num_layers * D, T, B) with ``per_sequence``. Behind a sequence's
        end it is zero.

    Raises:
        TypeError, ValueError, RuntimeError: no such layer, state, input or loss.

    Source: Bengio, Simard and Frasconi 1994, Learning Long-Term Dependencies with Gradient Descent
    is Difficult; Pascanu, Mikolov and Bengio 2013, On the Difficulty of Training Recurrent Neural
    Networks, equations 3 to 5.
    """
    if loss_fn is not None and not callable(loss_fn):
        raise TypeError(f"loss_fn: expected a function, got {type(loss_fn).__name__}")
    if not isinstance(per_sequence, bool):
        raise TypeError(f"per_sequence: expected a bool, got {type(per_sequence).__name__}")
    if not isinstance(x, Tensor) or x.is_nested:
        kind = "a NestedTensor" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: expected a tensor, padded and with lengths if need be, got {kind}")
    module = ours(layer)
    with _in_evaluation(module), torch.no_grad():
        stack = call_stack(module, x, hx, lengths)
    names = stack.cell.states
    if state not in names:
        raise ValueError(f"state: expected one of {', '.join(map(repr, names))}, got {state!r}")
    with torch.enable_grad():
        y, finals, traces = _unrolled(stack)
        if loss_fn is None:
            loss = finals[0][-stack.request.directions :].sum()
        else:
            loss = loss_fn(y, tuple(finals) if len(finals) > 1 else finals[0])
            _check_loss(loss)
    k = names.index(state)
    nodes = [states[k] for trace in traces for states in trace]
    found = torch.autograd.grad(loss, nodes, allow_unused=True, materialize_grads=True)
    gradients = torch.stack(found).unflatten(0, (len(traces), -1))  # (L * D, T, B, H)
    wide = torch.promote_types(gradients.dtype, torch.float32)
    over = -1 if per_sequence and stack.geometry.batched else (-2, -1)
    return torch.linalg.vector_norm(gradients, dim=over, dtype=wide)


def plot_gradient_flow(norms: Tensor | Mapping[str, Tensor], *, title: str = "") -> Figure:
    """A picture of what :func:`gradient_flow` returns, with a logarithmic axis of the norms.

    Args:
        norms: (layers, T), or (T,) of one; or several of these by name, as of layers to compare.
        title: stands above the picture.

    Returns:
        The figure, of matplotlib, to show or to save: ``figure.savefig("flow.png")``.

    Raises:
        TypeError, ValueError: norms are none of these.
        ImportError: matplotlib is not installed.
    """
    named = norms if isinstance(norms, Mapping) else {"": norms}
    for name, value in named.items():
        label = f"norms[{name!r}]" if name else "norms"
        if not isinstance(value, Tensor):
            raise TypeError(f"{label}: expected a tensor, got {type(value).__name__}")
        if value.dim() not in (1, 2):
            raise ValueError(f"{label}: expected (layers, T) or (T,), got {tuple(value.shape)}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_gradient_flow: matplotlib draws the picture and is not installed; "
            "pip install matplotlib"
        ) from error
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    count = 0
    for k, (name, value) in enumerate(named.items()):
        rows = value.detach().cpu().double().reshape(-1, value.shape[-1])
        rows = rows.masked_fill(rows == 0, torch.nan)  # has no logarithm, and is left out
        for layer, row in enumerate(rows):
            of = f"row {layer}" if len(rows) > 1 else ""
            axes.plot(
                row.numpy(),
                color=f"C{k}" if name else f"C{layer}",
                alpha=1 - 0.7 * layer / len(rows) if name else 1,
                label=", ".join(filter(None, (name, of))),
            )
            count += bool(name or of)
    axes.set_yscale("log")
    axes.set_xlabel("step t")
    axes.set_ylabel("norm of the gradient at step t")
    axes.set_title(title, fontsize=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.6)
    if count:
        axes.legend(frameon=False)
    return figure


def ours(layer: Any) -> Any:
    """A layer of fastseq that computes what ``layer`` does with its parameters."""
    if type(layer) in (nn.RNN, nn.LSTM, nn.GRU):
        twin = copy.copy(layer)
        if reason := next(iter(replace(twin).left.values()), None):
            raise TypeError(f"layer: torch.nn's {type(layer).__name__} was not taken: {reason}")
        return twin
    if not isinstance(layer, Recurrent):
        kind = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        raise TypeError(f"layer: expected a recurrent layer of fastseq or torch.nn, got {kind}")
    if type(layer).forward is not Recurrent.forward:
        kind = type(layer).__name__
        raise TypeError(f"layer: {kind} has a forward of its own, which may compute something else")
    return layer


@contextmanager
def _in_evaluation(module: Any) -> Iterator[None]:
    before = module.training
    module.training = False
    try:
        yield
    finally:
        module.training = before


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected it to return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn: expected it to return one number, got {tuple(loss.shape)}; take its sum"
        )
    if not loss.requires_grad:
        raise ValueError("loss_fn: what it returns depends on neither the output nor the state")


def _unrolled(stack: Stack) -> tuple[Tensor, list[Tensor], list[Trace]]:
    """The output and final states as the layer returns them, and each recurrence's states."""
    geometry: Any = stack.geometry
    request, D = stack.request, stack.request.directions
    x = geometry.dense(stack.x.detach())
    T = x.shape[0]
    states = stack.states or zero_states(stack, x)
    if not geometry.batched and stack.states:
        states = [s.unsqueeze(1) for s in states]
    inside = None
    lengths = getattr(geometry, "lengths", None)
    if lengths is not None:
        inside = (torch.arange(T, device=x.device)[:, None] < lengths.to(x.device))[..., None]
    traces: list[Trace] = []
    finals: list[list[Tensor]] = []
    weights = ways(request, [w.detach() for w in stack.weights])
    for layer in range(request.layers):
        outputs = []
        for r in range(layer * D, (layer + 1) * D):
            start = [s[r].detach() for s in states]
            trace, final = _recurrence(stack, weights[r], x, start, r % D == 1, inside)
            outputs.append(torch.stack([h for h, *_ in trace]))
            traces.append(trace)
            finals.append(final)
        x = torch.cat(outputs, -1)
        if inside is not None:
            x = torch.where(inside, x, 0.0)
    ends = [torch.stack(s) for s in zip(*finals, strict=True)]
    if not geometry.batched:
        ends = [s.squeeze(1) for s in ends]
    return geometry.undo(x), ends, traces


def _recurrence(
    stack: Stack,
    weights: Weights,
    x: Tensor,
    states: list[Tensor],
    reverse: bool,
    inside: Tensor | None,
) -> tuple[Trace, list[Tensor]]:
    """The states behind each step, and the final ones. Whatever reads a state reads the very tensor
    that is in the trace, so that its gradient is all that there is of it."""
    flat = list(weights.given())
    request = stack.request._replace(layers=1, directions=1, dropout=0, order=OneStep.layout)
    states = [s.requires_grad_() for s in states]
    trace: Trace = []
    for t in reversed(range(len(x))) if reverse else range(len(x)):
        step = Stack(request, x[t], states, flat, OneStep(x[t]), zoneout=stack.zoneout)
        new = [s.view_as(s) for s in run(step)[1]]
        trace.append(new)
        if inside is None:
            states = new
        else:
            states = [torch.where(inside[t], *pair) for pair in zip(new, states, strict=True)]
    if reverse:
        trace.reverse()
    return trace, states
