"""The structurally constrained recurrent network: two recurrences a layer, one of leaky units."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends import DIFFERENTIABLE, choice
from ..backends.contract import Backend, Memory, Request
from ..ops import masks
from ..ops.checks import check_row_ids, check_seed
from ..ops.functional import layer_stack, scrn_layer
from ..ops.geometry import beside, geometry_of, values_of
from ..ops.modes import foreign
from ..ops.stack import Stack
from . import counterparts, graph, learned
from .declared import begin_layer, register, register_layers
from .options import CellOptions, HasOptions, Init, LayerOptions, initialize, options
from .recurrent import check_nested, described


class ContextOptions(LayerOptions):
    """The options of an SCRN, which it has as ``layer.fastseq``: :class:`LayerOptions`, with
    ``zoneout`` a number or a pair, of h and of s."""

    states = ("h", "s")


def _check(context_size: Any, alpha: Any, learn_alpha: Any) -> float:
    """alpha as a float."""
    if isinstance(context_size, bool) or not isinstance(context_size, int):
        raise TypeError(f"context_size should be of type int, got: {type(context_size).__name__}")
    if context_size <= 0:
        raise ValueError("context_size must be greater than zero")
    if not isinstance(learn_alpha, bool):
        raise TypeError(f"learn_alpha should be of type bool, got: {type(learn_alpha).__name__}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1:
        raise ValueError(f"alpha should be a number between 0 and 1, got {alpha!r}")
    return float(alpha)


class _Context(HasOptions):
    """What SCRN and SCRNCell share."""

    _fastseq_torch = None
    _fastseq_beyond = "torch.nn has no structurally constrained network"
    #: the cell of the hidden units, whose weights fastseq.init sets
    _fastseq_hidden = "rnn_sigmoid"

    alpha: float
    learn_alpha: bool
    hidden_size: int
    context_size: int
    bias: bool

    def __prepare_scriptable__(self) -> nn.Module:
        return counterparts.to_torch(self)  # type: ignore[arg-type]

    def _fastseq_parameters(self, width: int) -> dict[str, tuple[int, ...]]:
        """Name -> shape, in the order of a call. width: of the input."""
        H, C = self.hidden_size, self.context_size
        shapes: dict[str, tuple[int, ...]] = {"weight_ih": (H, width + C), "weight_hh": (H, H)}
        shapes |= {"bias_ih": (H,), "bias_hh": (H,)} if self.bias else {}
        shapes |= {"weight_ic": (C, width)}
        return shapes | ({"alpha_logit": (C,)} if self.learn_alpha else {})

    def reset_parameters(self) -> None:
        """The initial values again, and what ``init`` says."""
        self._fastseq_draw()
        initialize(self)

    def _fastseq_draw(self) -> None:
        """Draw the weights from U(-1/sqrt(H), 1/sqrt(H)) in their order; a learned alpha begins at
        ``alpha``."""
        bound, logit = 1 / math.sqrt(self.hidden_size), math.log(self.alpha / (1 - self.alpha))
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            if name.startswith("alpha_logit"):
                nn.init.constant_(parameter, logit)
            else:
                nn.init.uniform_(parameter, -bound, bound)

    def _fastseq_ways(
        self, names: Sequence[Sequence[str]]
    ) -> tuple[list[list[Tensor]], list[Tensor | float]]:
        """The weights of each direction and its alpha, from the parameters as they are now."""
        ways: list[list[Tensor]] = []
        alphas: list[Tensor | float] = []
        for way in names:
            *weights, last = [getattr(self, name) for name in way]
            if self.learn_alpha:
                alphas.append(torch.sigmoid(last))
            else:
                weights.append(last)
                alphas.append(self.alpha)
            ways.append(weights)
        return ways, alphas

    def _fastseq_call(self, names: Sequence[Sequence[str]], x: Any, hx: Any, **given: Any) -> Any:
        """One layer: ``scrn`` with the parameters as they are now."""
        ways, alphas = self._fastseq_ways(names)
        if given["backend"] is None and not torch.compiler.is_compiling():
            if foreign((values_of(x), *(hx or ()), *[w for way in ways for w in way])):
                given["backend"] = DIFFERENTIABLE
        return scrn_layer(x, ways, hx, alphas, h_mask=None, **given)

    def _fastseq_stacks(self, x: Any, D: int, **given: Any) -> list[Stack]:
        """What the operations run of the first layer, of weights of its sizes: the context units,
        and the hidden ones. x: time first."""
        like = next(self.parameters())  # type: ignore[attr-defined]
        H, C = self.hidden_size, self.context_size
        data = values_of(x)
        both = beside(x, x, data.new_zeros(*data.shape[:-1], D * C))

        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(shape).requires_grad_(like.requires_grad)

        I = data.shape[-1]  # noqa: E741  (the field's letter)
        context = [(zeros(C, I), zeros(C))] * D
        biases = (zeros(H), zeros(H)) if self.bias else ()
        hidden = [(zeros(H, I + D * C), zeros(H, H), *biases)] * D
        rest: tuple[Any, ...] = (None, given["lengths"], given["reset"], None, False)
        rest += (given["memory"], given["deterministic"], given["backend"], True)
        return [
            layer_stack("leaky_integrator", x, context, *rest),
            layer_stack("rnn_sigmoid", both, hidden, *rest),
        ]

    def _fastseq_shown(self, shown: str, C: int) -> str:
        more = f", context_size={C}"
        more += f", alpha={self.alpha}" if self.alpha != 0.95 else ""
        return shown + more + (", learn_alpha=True" if self.learn_alpha else "")


def _pair(module: Any, hx: Any) -> Any:
    """The state, checked to be a pair of tensors."""
    if hx is None:
        return None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        raise RuntimeError(
            f"hx: {module._get_name()} takes a pair (h, s) as its state, got {described(hx)}"
        )
    for name, state in zip("hs", hx, strict=True):
        if not isinstance(state, Tensor):
            raise AttributeError(f"hx: expected a tensor {name}, got {type(state).__name__}")
    return tuple(hx)


class ContextStream:
    """The layers of an SCRN, each two streams of a backend: of context units and of hidden ones."""

    def __init__(
        self, layers: Sequence[tuple[tuple[Any, Any], tuple[Any, Any]]], width: int
    ) -> None:
        self.layers, self.width = layers, width

    def stream_step(self, stream: Any, x: Tensor, out: Tensor | None, threads: int) -> Any:
        """As a backend's: y (batch, H + C), or None, and nothing is done, for an x that has no
        memory of its own, and for what does not fit."""
        if out is not None and (tuple(out.shape), out.dtype) != ((len(x), self.width), x.dtype):
            return None
        for (units, first), (hidden, second) in self.layers:
            s = units.stream_step(first, x, None, threads)
            if s is None:
                return None
            h = hidden.stream_step(second, torch.cat([x, s], 1), None, threads)
            x = torch.cat([h, s], 1)
        return x if out is None else out.copy_(x)


class SCRN(learned.HasState, _Context, nn.RNNBase):
    r"""The structurally constrained recurrent network (Mikolov et al. 2014): hidden units beside
    context units, which forget slowly.

    .. math::
        s_t &= (1 - \alpha) B x_t + \alpha s_{t-1} \\
        h_t &= \sigma(A x_t + P s_t + b_{ih} + R h_{t-1} + b_{hh})

    The output is :math:`[h_t, s_t]`, (T, B, D * (H + C)) with C for ``context_size``, and so is the
    input of the next layer; of two directions the forward one's pair stands first. The state is a
    pair (h, s), (num_layers * D, B, H) and (num_layers * D, B, C).

    Args:
        input_size to dtype: as torch.nn.GRU's.
        context_size: the number of context units.
        alpha: how much of a context unit stays in a step, between 0 and 1.
        learn_alpha: True makes alpha a parameter of each context unit, which begins at ``alpha``.
        backend to learn_state: see :class:`fastseq.nn.Recurrent`. ``recurrent_dropout`` and
            ``weight_dropout`` mask the product with R; ``zoneout`` may be a pair, of h and of s;
            ``learn_state`` adds ``h_0`` and ``s_0``.

    A layer is two recurrences: of leaky integrators, and of sigmoid units over :math:`[x_t, s_t]`.

    Parameters, for each layer k and direction: ``weight_ih_l{k}`` (H, I + C), which is
    :math:`[A, P]`, ``weight_hh_l{k}`` (H, H), which is R, ``bias_ih_l{k}`` and ``bias_hh_l{k}``
    (H,), ``weight_ic_l{k}`` (C, I), which is B; with ``learn_alpha`` also ``alpha_logit_l{k}``
    (C,), of which :math:`\alpha` is the logistic function. The paper has no biases.

    Source: Mikolov et al. 2014, Learning Longer Memory in Recurrent Neural Networks.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        context_size: int,
        alpha: float = 0.95,
        learn_alpha: bool = False,
        backend: Backend = None,
        memory: Memory = "full",
        deterministic: bool = False,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        init: Init = (),
        learn_state: bool = False,
    ) -> None:
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        begin_layer(self, "SCRN", *arguments)
        self.alpha = _check(context_size, alpha, learn_alpha)
        self.context_size, self.learn_alpha = context_size, learn_alpha
        kind = {"device": device, "dtype": dtype}
        register_layers(self, self._fastseq_parameters, hidden_size + context_size, kind)
        self.reset_parameters()
        self._fastseq_begin(
            backend=backend,
            memory=memory,
            deterministic=deterministic,
            recurrent_dropout=recurrent_dropout,
            input_dropout=input_dropout,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            init=init,
            learn_state=learn_state,
        )

    def _fastseq_options(self, **given: Any) -> ContextOptions:
        return ContextOptions(**given)

    @property
    def _fastseq_states(self) -> tuple[str, ...]:
        return ContextOptions.states

    def _fastseq_size(self, k: int) -> int:
        return self.context_size if k else self.hidden_size

    def _fastseq_mask(self, layer: int, row_ids: Any, seed: Any) -> Callable[[Stack], None] | None:
        """What gives the two stacks of a layer their masks; None where nothing is masked. seed: of
        the call, of which each stack has another, or None outside of training."""
        rates = options(self).rates
        if row_ids is None and (rates is None or not (self.training or rates.zoneout)):
            return None

        def mask(stack: Stack) -> None:
            B, device = stack.geometry.B, stack.data.device
            if row_ids is None:
                ids = torch.arange(B, device=device)
            else:
                ids = check_row_ids(row_ids, B).to(device)
            if rates is None:
                return
            hidden = stack.request.cell == self._fastseq_hidden
            stays = rates.zoneout and rates.zoneout[0 if hidden else 1]
            own = masks.Rates(zoneout=(stays,) if stays else ())
            if hidden:
                dropped = rates.recurrent_dropout, rates.weight_dropout
                own = own._replace(recurrent_dropout=dropped[0], weight_dropout=dropped[1])
            stack.request = stack.request._replace(training=self.training)
            if any(own):
                masks.apply(stack, own, masks.of_part(seed, 2 * layer + hidden), ids)
            if seed is not None and (p := rates.input_dropout):
                D, dtype = stack.request.directions, stack.data.dtype
                context = D * self.context_size if hidden else 0
                kept = masks.of_input(seed, layer, ids, stack.width - context, p, dtype)
                ones = kept.new_ones(kept.shape[0], context)
                stack.input_masks = [torch.cat([kept, ones], 1) if hidden else kept]

        return mask

    @torch.no_grad()
    def _fastseq_stream(self, h: Tensor, s: Tensor, backend: Backend) -> ContextStream | None:
        """Single steps on packed weights, which write the states; None where no backend has them.

        h, s: (num_layers, batch, H) and (num_layers, batch, C).
        """
        kind = (h.dtype, h.device.type, h.shape[1], backend)
        units = choice.streams("leaky_integrator", *kind)
        hidden = choice.streams("rnn_sigmoid", *kind)
        if units is None or hidden is None:
            return None
        layers = []
        for k, names in enumerate(self._all_weights):
            *weights, last = [getattr(self, name).resolve_neg().contiguous() for name in names]
            if self.learn_alpha:
                alpha, context = torch.sigmoid(last), weights.pop()
            else:
                alpha, context = last.new_full((self.context_size,), self.alpha), last
            first = Request("leaky_integrator", biased=False)
            second = Request("rnn_sigmoid", biased=self.bias)
            layers.append(
                (
                    (units, units.stream(first, [context, alpha], s[k : k + 1], ())),
                    (hidden, hidden.stream(second, weights, h[k : k + 1], ())),
                )
            )
        return ContextStream(layers, self.hidden_size + self.context_size)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: Sequence[Tensor | None]) -> None:
        if any(given is not own for given, own in zip(value, self._flat_weights, strict=True)):
            raise TypeError("_flat_weights: an SCRN computes with its parameters; set these")

    def flatten_parameters(self) -> None:
        """Nothing: cuDNN, which wants the parameters in one chunk, has no such layer."""

    def extra_repr(self) -> str:
        shown = self._fastseq_shown(nn.RNNBase.extra_repr(self), self.context_size)
        return ", ".join([shown, *options(self).given()])

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        row_ids: Tensor | Sequence[int] | None = None,
        seed: Tensor | int | None = None,
    ) -> Any:
        """Run the layers over a sequence.

        Args:
            input: (T, I), (T, B, I), (B, T, I) with ``batch_first``, a PackedSequence, or a
                NestedTensor (B, jagged, I), whatever ``batch_first`` says.
            hx: the initial state, a pair (h_0, s_0) of (num_layers * D, B, H) and
                (num_layers * D, B, C), without B for unbatched input; zeros if None, or what
                ``learn_state`` learned.
            lengths, row_ids, seed: as :class:`fastseq.GRU`'s.
            reset: (T, B) bool or None, (B, T) with ``batch_first``, as :class:`fastseq.GRU`'s.

        Returns:
            ``output, (h_n, s_n)``.
        """
        if not torch.compiler.is_compiling():
            given = {"lengths": lengths, "reset": reset, "row_ids": row_ids, "seed": seed}
            node = graph.leaf(self, SCRN.forward, input, hx, **given)
            if node is not None:
                return node
        hx = _pair(self, hx)
        if not isinstance(input, (Tensor, PackedSequence)):
            kind = type(input).__name__
            raise TypeError(f"input: expected a Tensor or PackedSequence, got {kind}")
        x: Any = input
        dense = isinstance(input, Tensor) and not input.is_nested
        if isinstance(input, Tensor) and not dense:
            check_nested(self, input, lengths, reset)
        turned = self.batch_first and dense and x.dim() == 3
        if turned:
            x = x.transpose(0, 1)
        if turned and isinstance(reset, Tensor) and reset.dim() == 2:
            reset = reset.transpose(0, 1)
        D, own = 2 if self.bidirectional else 1, options(self)
        if hx is None and own.learn_state:
            hx = learned.states(self, geometry_of(x, False, reset))
        if seed is not None:
            check_seed(seed)
        if own.rates is not None:
            seed = masks.seed_of_call(self.training, seed, values_of(x))
        if hx is not None:
            for k, state in enumerate(hx):
                if not state.dim() or state.shape[0] != self.num_layers * D:
                    raise RuntimeError(
                        f"Expected hidden[{k}] size ({self.num_layers * D}, ...), got "
                        f"{list(state.shape)}; it is (num_layers * num_directions, batch, "
                        f"{('hidden_size', 'context_size')[k]})"
                    )
        finals = []
        for layer in range(self.num_layers):
            first = layer * D
            if layer and self.dropout and self.training:
                x = beside(x, torch.dropout(values_of(x), self.dropout, True))
            x, final = self._fastseq_call(
                self._all_weights[first : first + D],
                x,
                None if hx is None else tuple(state[first : first + D] for state in hx),
                lengths=lengths,
                reset=reset,
                memory=own.memory,
                deterministic=own.deterministic,
                backend=own.backend,
                nested=True,
                mask=self._fastseq_mask(layer, row_ids, seed),
            )
            finals.append(final)
        h_n, s_n = (torch.cat(states) for states in zip(*finals, strict=True))
        return x.transpose(0, 1) if turned else x, (h_n, s_n)


class SCRNCell(_Context, nn.Module):
    """One step of :class:`fastseq.SCRN`.

    Arguments: ``input_size``, ``hidden_size``, ``bias``, ``device`` and ``dtype`` as torch.nn's
    cells have them; ``context_size``, ``alpha`` and ``learn_alpha`` as the layer. Parameters:
    ``weight_ih`` (H, I + C), ``weight_hh`` (H, H), ``bias_ih`` and ``bias_hh`` (H,), ``weight_ic``
    (C, I), and with ``learn_alpha`` ``alpha_logit`` (C,).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        context_size: int,
        alpha: float = 0.95,
        learn_alpha: bool = False,
        backend: Backend = None,
        init: Init = (),
    ) -> None:
        alpha = _check(context_size, alpha, learn_alpha)
        super().__init__()
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        self.context_size, self.alpha, self.learn_alpha = context_size, alpha, learn_alpha
        kind = {"device": device, "dtype": dtype}
        self._fastseq_names = register(self, self._fastseq_parameters(input_size), "", kind)
        if not bias:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()
        self._fastseq_begin(backend=backend, init=init)

    def _fastseq_options(self, **given: Any) -> CellOptions:
        return CellOptions(**given)

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}" + ("" if self.bias else ", bias=False")
        return ", ".join([self._fastseq_shown(shown, self.context_size), *options(self).given()])

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h', s') of input (B, I) and a pair (h, s) of (B, H) and (B, C), or all without B; zeros
        if ``hx`` is None."""
        if not torch.compiler.is_compiling():
            node = graph.leaf(self, SCRNCell.forward, input, hx)
            if node is not None:
                return node  # type: ignore[return-value]
        hx = _pair(self, hx)
        if not isinstance(input, Tensor):
            raise AttributeError(f"input: expected a Tensor, got {type(input).__name__}")
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{self._get_name()}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )
        states = None if hx is None else tuple(state.unsqueeze(0) for state in hx)
        given: dict[str, Any] = {"lengths": None, "reset": None}
        given |= {"memory": "full", "deterministic": False}
        names, backend = [self._fastseq_names], options(self).backend
        _, final = self._fastseq_call(names, input.unsqueeze(0), states, backend=backend, **given)
        h, s = (state.squeeze(0) for state in final)
        return h, s


def stacks(module: SCRN | SCRNCell, input: Any, lengths: Any, reset: Any) -> list[Stack]:
    """What ``module(input)`` asks of the operations in its first layer, for ``explain``."""
    own: Any = options(module)
    given = {
        "lengths": lengths,
        "reset": reset,
        "memory": getattr(own, "memory", "full"),
        "deterministic": getattr(own, "deterministic", False),
        "backend": own.backend,
    }
    if isinstance(module, SCRNCell):
        return module._fastseq_stacks(input.unsqueeze(0), 1, **given)
    dense = isinstance(input, Tensor) and not input.is_nested
    if module.batch_first and dense and input.dim() == 3:
        input = input.transpose(0, 1)
        given["reset"] = None if reset is None else reset.transpose(0, 1)
    found = module._fastseq_stacks(input, 2 if module.bidirectional else 1, **given)
    seed = torch.zeros((), dtype=torch.int64) if module.training else None  # so that none is drawn
    if (mask := module._fastseq_mask(0, None, seed)) is not None:
        for stack in found:
            mask(stack)
    return found
