"""How the gradient of a loss flows back through time: :func:`gradient_flow` and its picture."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..backends.contract import Request, ways
from ..ops.checks import check_lengths
from ..ops.functional import scrn_weights
from ..ops.geometry import Dense, OneStep, reversed_in_time
from ..ops.run import run
from ..ops.stack import Stack, Zoneout, zero_states
from . import learned
from .container import Stacked
from .convert import replace
from .options import options
from .recurrent import Recurrent, call_stack
from .scrn import SCRN

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Trace:
    """One state of one recurrence: (B, size) behind each step, in the caller's order of time, or
    from each sequence's last step on."""

    state: str
    steps: list[Tensor]
    backwards: bool = False


@dataclass
class Walk:
    """What a layer returns, made step by step.

    last: the hidden states that it ends with, of its last layer.
    """

    output: Tensor
    state: Any
    traces: list[Trace]
    last: list[Tensor]


@torch.inference_mode(False)
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
    state with the others; but with s of an SCRN, which h of that step is made of, h moves.

    The layer computes as in evaluation, without dropout. Neither its parameters nor x get a
    gradient. Each step is one call of the layer's own backend, with all layers and directions one
    after another.

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
    x, hx, lengths = _recordable(x), _recordable(hx), _recordable(lengths)
    with _in_evaluation(module):
        lengths = _checked(module, x, hx, lengths)
        known = _states(module)
        if state not in known:
            raise ValueError(f"state: expected one of {', '.join(known)}, got {state!r}")
        with torch.enable_grad():
            walk = _walk(module, x.detach(), hx, lengths)
    with torch.enable_grad():
        if loss_fn is None:
            loss = torch.stack([h.sum() for h in walk.last]).sum()
        else:
            loss = loss_fn(walk.output, walk.state)
            _check_loss(loss)
    traces = [trace for trace in walk.traces if trace.state == state]
    nodes = [step for trace in traces for step in trace.steps]
    found = iter(torch.autograd.grad(loss, nodes, allow_unused=True, materialize_grads=True))
    rows = []
    for trace in traces:
        norms = torch.stack([norm(next(found)) for _ in trace.steps])  # (T, B)
        if trace.backwards:
            norms = reversed_in_time(norms[..., None], False, lengths)[..., 0]
        rows.append(norms)
    norms = torch.stack(rows)
    return norms if per_sequence and x.dim() == 3 else norm(norms)


def _recordable(value: Any) -> Any:
    """With copies of tensors that torch.inference_mode() made, which autograd does not take."""
    if isinstance(value, tuple):
        return tuple(map(_recordable, value))
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def norm(x: Tensor) -> Tensor:
    """Over the last dimension, in float32 at least. The square of a vanishing gradient is zero in
    that type long before the gradient is."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not x.numel():
        return x.new_zeros(x.shape[:-1])
    scale = x.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    return torch.linalg.vector_norm(x / scale, dim=-1) * scale.squeeze(-1)


def plot_gradient_flow(
    norms: Tensor | Mapping[str, Tensor], *, bidirectional: bool = False, title: str = ""
) -> Figure:
    """A picture of what :func:`gradient_flow` returns, with a logarithmic axis of the norms.

    Args:
        norms: (layers, T), or (T,) of one; or several of these by name, as of layers to compare.
        bidirectional: whether every other row is of a reverse direction, for its name.
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
            of = ""
            if len(rows) > 1:
                of = f"layer {layer // 2}" if bidirectional else f"layer {layer}"
                of += ", reverse" if bidirectional and layer % 2 else ""
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
    known = next((k for k in (Recurrent, SCRN, Stacked) if isinstance(layer, k)), None)
    if known is None:
        kind = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
        raise TypeError(f"layer: expected a recurrent layer of fastseq or torch.nn, got {kind}")
    if type(layer).forward is not known.forward:
        kind = type(layer).__name__
        raise TypeError(f"layer: {kind} has a forward of its own, which may compute something else")
    return layer


@contextmanager
def _in_evaluation(module: nn.Module) -> Iterator[None]:
    before = {part: part.training for part in module.modules()}
    for part in before:
        part.training = False
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


@torch.no_grad()
def _checked(module: Any, x: Tensor, hx: Any, lengths: Any) -> Tensor | None:
    """``lengths`` as a tensor; whatever does not fit raises, as in a call of the layer."""
    if isinstance(module, Recurrent):
        call_stack(module, x, hx, lengths)
    else:
        module(x, hx, lengths=lengths)
    geometry = Dense(x, module.batch_first)
    return check_lengths(lengths, geometry.T, geometry.B, False, geometry.batched)


def _states(module: Any) -> list[str]:
    """The states that all layers of a module have."""
    if not isinstance(module, Stacked):
        return list(module._fastseq_states)
    known = [_states(ours(layer)) for layer in module.layers]
    return [state for state in known[0] if all(state in others for others in known)]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn: expected it to return a tensor, got {type(loss).__name__}")
    if loss.numel() != 1:
        raise ValueError(
            f"loss_fn: expected it to return one number, got {tuple(loss.shape)}; take its sum"
        )
    if not loss.requires_grad:
        raise ValueError("loss_fn: what it returns depends on neither the output nor the state")


def _walk(module: Any, x: Tensor, hx: Any, lengths: Tensor | None) -> Walk:
    """A call of the layer, checked, step by step. Its parameters and hx get no gradient."""
    if isinstance(module, Stacked):
        return _walk_stacked(module, x, hx, lengths)
    geometry = Dense(x, module.batch_first)
    x = geometry.dense(x)
    inside = None
    if lengths is not None:
        steps = torch.arange(x.shape[0], device=x.device)
        inside = (steps[:, None] < lengths.to(x.device))[..., None]
        x = torch.where(inside, x, 0.0)  # NaN times the zero gradient of a padded step is NaN
    walk = _walk_scrn if isinstance(module, SCRN) else _walk_recurrent
    y, finals, traces = walk(module, x, geometry, hx, inside)
    D = 2 if module.bidirectional else 1
    states = [s if geometry.batched else s.squeeze(1) for s in finals]
    return Walk(
        geometry.undo(y),
        tuple(states) if len(states) > 1 else states[0],
        traces,
        list(finals[0][-D:]),
    )


#: The output (T, B, ...), the final states (num_layers * D, B, ...), and what was on the way.
Walked = tuple[Tensor, list[Tensor], list[Trace]]


def _walk_recurrent(
    module: Any, x: Tensor, geometry: Dense, hx: Any, inside: Tensor | None
) -> Walked:
    stack = call_stack(module, geometry.undo(x), hx)
    states = [geometry.state(s) for s in stack.states] or zero_states(stack, x)
    request, size = stack.request, stack.request.per_recurrence * stack.request.directions
    finals, traces = [], []
    for layer in range(request.layers):
        first = layer * request.directions
        start = [s[first : first + request.directions] for s in states]
        weights = stack.weights[layer * size : (layer + 1) * size]
        x, final, found = _walk_layer(request, weights, x, start, inside, stack.zoneout)
        finals.append(final)
        traces += found
    return x, [torch.cat(s) for s in zip(*finals, strict=True)], traces


def _walk_scrn(module: SCRN, x: Tensor, geometry: Dense, hx: Any, inside: Tensor | None) -> Walked:
    """The two recurrences of each layer, the hidden one over the input and the context."""
    D, B = 2 if module.bidirectional else 1, x.shape[1]
    if hx is None and options(module).learn_state:
        hx = learned.states(module, geometry)
    sizes = module.hidden_size, module.context_size
    if hx is None:
        starts = [x.new_zeros(module.num_layers * D, B, size) for size in sizes]
    else:
        starts = [geometry.state(s) for s in hx]
    rates = options(module).rates
    h_rate, s_rate = rates.zoneout if rates is not None and rates.zoneout else (0.0, 0.0)
    finals, traces = [], []
    for first in range(0, module.num_layers * D, D):
        directions = slice(first, first + D)
        found = module._fastseq_ways(module._all_weights[directions])
        units, hidden = scrn_weights(*found)
        h_0, s_0 = (s[directions] for s in starts)
        request = Request("leaky_integrator", 1, D, biased=False, backend=module.fastseq.backend)
        flat = [w for way in units for w in way]
        stays = Zoneout((s_rate,), None, None) if s_rate else None
        s, (s_n,), of_s = _walk_layer(request, flat, x, [s_0], inside, stays)
        request = request._replace(cell=module._fastseq_hidden, biased=module.bias)
        flat = [w for way in hidden for w in way]
        stays = Zoneout((h_rate,), None, None) if h_rate else None
        h, (h_n,), of_h = _walk_layer(request, flat, torch.cat([x, s], -1), [h_0], inside, stays)
        for trace in of_s:
            trace.state = "s"
        pairs = zip(h.chunk(D, -1), s.chunk(D, -1), strict=True)
        x = torch.cat([part for pair in pairs for part in pair], -1)
        finals.append((h_n, s_n))
        traces += [*of_h, *of_s]
    return x, [torch.cat(s) for s in zip(*finals, strict=True)], traces


def _walk_layer(
    request: Request,
    weights: Sequence[Tensor],
    x: Tensor,
    states: Sequence[Tensor],
    inside: Tensor | None,
    zoneout: Zoneout | None,
) -> Walked:
    """One layer over x (T, B, I). inside: (T, B, 1), where a step is one of its sequence's."""
    outputs, finals, traces = [], [], []
    request = request._replace(layers=1)
    for d, way in enumerate(ways(request, [w.detach() for w in weights])):
        own = request._replace(directions=1, dropout=0, order=OneStep.layout)
        flat = list(way.given())
        now = [s[d].detach().requires_grad_() for s in states]
        steps: list[list[Tensor]] = []
        for t in reversed(range(len(x))) if d else range(len(x)):
            step = Stack(own, x[t], now, flat, OneStep(x[t]), zoneout=zoneout)
            # views: what comes behind the step reads them, all of it, and nothing within the step
            new = [s.view_as(s) for s in run(step)[1]]
            steps.append(new)
            if inside is None:
                now = new
            else:
                now = [torch.where(inside[t], *pair) for pair in zip(new, now, strict=True)]
        if d:
            steps.reverse()
        of_state = [list(s) for s in zip(*steps, strict=True)]
        outputs.append(torch.stack(of_state[0]))
        finals.append(now)
        names = request.definition.states
        traces += [Trace(name, found) for name, found in zip(names, of_state, strict=True)]
    y = torch.cat(outputs, -1)
    if inside is not None:
        y = torch.where(inside, y, 0.0)
    return y, [torch.stack(s) for s in zip(*finals, strict=True)], traces


def _walk_stacked(stack: Stacked, x: Tensor, hx: Any, lengths: Tensor | None) -> Walk:
    forward, backward = stack._states(hx)
    x = stack._begun(x, lengths)
    walk = _walk_through(stack.layers, stack.connections, x, forward, lengths)
    if stack.reverse_layers is None:
        return walk
    x = reversed_in_time(x, stack.batch_first, lengths)
    other = _walk_through(stack.reverse_layers, stack.reverse_connections, x, backward, lengths)
    for trace in other.traces:
        trace.backwards = True
    y = torch.cat([walk.output, reversed_in_time(other.output, stack.batch_first, lengths)], -1)
    traces = [*walk.traces, *other.traces]
    return Walk(y, (walk.state, other.state), traces, [*walk.last, *other.last])


def _walk_through(
    layers: Any, connections: Any, x: Tensor, states: Sequence[Any], lengths: Tensor | None
) -> Walk:
    finals, traces = [], []
    for layer, connection, hx in zip(layers, connections, states, strict=True):
        walk = _walk(ours(layer), x, hx, lengths)
        x = connection(x, walk.output)
        finals.append(walk.state)
        traces += walk.traces
    return Walk(x, tuple(finals), traces, walk.last)
