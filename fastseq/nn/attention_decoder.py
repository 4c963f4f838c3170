"""A recurrent decoder that attends over a memory, with teacher forcing or its own choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..cells import CELLS
from ..ops.attention import kernels_of
from ..ops.attention_loop import Loop, loop
from . import short
from .attention import Attention, PreparedKeys
from .cells import RecurrentCell
from .options import options
from .recurrent import Recurrent
from .scrn import SCRN, SCRNCell

State = Tensor | tuple[Tensor, ...]


class Sampled(NamedTuple):
    """What :meth:`AttentionDecoder.forward_sampling` returns.

    logits: (U, B, N). tokens: (U, B), those that were fed. state: the last one. weights: (U, B, S).
    With ``batch_first`` B stands before U.
    """

    logits: Tensor
    tokens: Tensor
    state: State
    weights: Tensor


class AttentionDecoder(nn.Module):
    r"""A recurrent decoder over a memory of S vectors.

    With ``feed_context=True`` what the state before asks for is part of the input:

    .. math::
        c_u = \mathrm{attention}(h_{u-1}, m), \qquad h_u = f([x_u; c_u], h_{u-1}), \qquad
        y_u = [h_u; c_u]

    With ``feed_context=False`` the layer runs over all steps in one call, and attention is that of
    all steps at once:

    .. math::
        h_u = f(x_u, h_{u-1}), \qquad c_u = \mathrm{attention}(h_u, m), \qquad y_u = [h_u; c_u]

    Args:
        recurrent: f. A cell or layer of fastseq or torch.nn that is made already; a layer has one
            direction and no ``batch_first`` of its own, and h is the output of its last layer.
            ``feed_context=True`` is best served by a cell; its input_size is that of x and c
            together. ``feed_context=False`` needs a layer.
        attention: an :class:`Attention` whose query_size is the size of f's output. Its
            ``batch_first`` is the decoder's.
        feed_context: which of the two.

    Raises:
        TypeError: ``recurrent`` or ``attention`` is something else. ValueError: sizes or options
            that do not go together.

    Source: feed_context=True: Bahdanau, Cho and Bengio 2015, whose output reads x_u, too. False:
    the global attention of Luong, Pham and Manning 2015, whose attentional vector is
    tanh(W [c_u; h_u]).
    """

    def __init__(
        self, recurrent: nn.Module, attention: Attention, *, feed_context: bool = True
    ) -> None:
        super().__init__()
        if not isinstance(attention, Attention):
            raise TypeError(f"attention: expected a fastseq.Attention, got {_kind(attention)}")
        if not is_cell(recurrent) and not isinstance(recurrent, (Recurrent, SCRN, nn.RNNBase)):
            raise TypeError(
                f"recurrent: expected a cell or layer of fastseq or torch.nn, got "
                f"{_kind(recurrent)}; it is made before: AttentionDecoder(fastseq.LSTMCell(I, H), "
                "attention)"
            )
        if is_cell(recurrent):
            if not feed_context:
                raise ValueError(
                    "recurrent: feed_context=False runs all steps in one call of a layer, got the "
                    f"cell {_kind(recurrent)}; give the layer of its kind"
                )
        elif recurrent.bidirectional or recurrent.batch_first:
            raise ValueError(
                "recurrent: expected a layer of one direction and batch_first=False, which is the "
                f"attention's to say, got bidirectional={recurrent.bidirectional}, "
                f"batch_first={recurrent.batch_first}"
            )
        if output_size(recurrent) != attention.query_size:
            raise ValueError(
                f"attention: expected query_size = {output_size(recurrent)}, the size of "
                f"{_kind(recurrent)}'s output, got {attention.query_size}"
            )
        self.recurrent, self.attention, self.feed_context = recurrent, attention, feed_context

    def extra_repr(self) -> str:
        return f"feed_context={self.feed_context}"

    def prepare(
        self,
        memory: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> PreparedKeys:
        """The memory projected, for :meth:`step`: as :meth:`Attention.prepare`."""
        return self.attention.prepare(memory, values, lengths=lengths, mask=mask)

    def forward(
        self,
        inputs: Tensor,
        memory: Tensor | PreparedKeys,
        state: State | None = None,
        *,
        values: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State, Tensor]:
        """All steps, each with the given input: teacher forcing.

        Args:
            inputs: (U, B, I), (B, U, I) with ``batch_first``.
            memory: (S, B, K), (B, S, K) with ``batch_first``, or what :meth:`prepare` returned.
            state: the first one, as ``recurrent`` takes it; zeros, or what it learned, if None.
            values, lengths, mask: of the memory, as :meth:`Attention.prepare` takes them.

        Returns:
            outputs [h; c] (U, B, H + V), the last state, and the weights (U, B, S); with
            ``batch_first`` B stands before U.

        Raises:
            ValueError, RuntimeError: another shape, as ``recurrent`` and :class:`Attention` say it.
        """
        inputs, prepared = self._begin(inputs, memory, values, lengths, mask)
        if self.feed_context:
            outputs, state, weights = self._loop(inputs, prepared, state)
        else:
            h, state = self.recurrent(inputs, state)
            outputs, weights = self._beside(h, prepared)
        return self._turned(outputs), state, self._turned(weights)

    def step(
        self, input: Tensor, memory: Tensor | PreparedKeys, state: State | None = None
    ) -> tuple[Tensor, State, Tensor]:
        """One step.

        Args:
            input: (B, I).
            memory: what :meth:`prepare` returned, or the memory itself, which is then projected at
                each step.
            state: of the step before; zeros, or what was learned, if None.

        Returns:
            output [h; c] (B, H + V), the state, and the weights (B, S).
        """
        if not isinstance(input, Tensor) or input.dim() != 2:
            got = tuple(input.shape) if isinstance(input, Tensor) else _kind(input)
            raise ValueError(f"input: expected one step (B, I), got {got}")
        prepared = memory if isinstance(memory, PreparedKeys) else self.prepare(memory)
        check_batch("input", input.shape[0], prepared)
        if self.feed_context:
            if state is None:
                state = self._initial(input)
            return self._fed_step(input, prepared, state)
        h, state = self.recurrent(input.unsqueeze(0), state)
        outputs, weights = self._beside(h, prepared)
        return outputs.squeeze(0), state, weights.squeeze(0)

    def forward_sampling(
        self,
        tokens: Tensor,
        embed: Callable[[Tensor], Tensor],
        readout: Callable[[Tensor], Tensor],
        memory: Tensor | PreparedKeys,
        state: State | None = None,
        *,
        teacher_forcing: float | Tensor = 1.0,
        choice: Literal["argmax", "sample"] = "argmax",
        values: Tensor | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Sampled:
        """Scheduled sampling: all steps, each with the given token or with the model's own choice.

        The first token is the given one. Each later one is, in each sequence by itself, the given
        one with probability ``teacher_forcing``, and else what the logits of the step before
        choose, through which no gradient goes.

        Args:
            tokens: (U, B) integers, (B, U) with ``batch_first``; the first is what begins a
                sequence.
            embed: tokens (...,) to inputs (..., I), as an nn.Embedding.
            readout: outputs (..., H + V) to logits (..., N), as an nn.Linear.
            memory, state, values, lengths, mask: as :meth:`forward`.
            teacher_forcing: a probability, or one for each step, a tensor (U,);
                :mod:`fastseq.schedules` has some that fall while one trains.
            choice: the likeliest token, or one that is drawn from the softmax of the logits.
            generator: of the draws.

        Returns:
            :class:`Sampled`: logits, tokens that were fed, state and weights.

        Raises:
            ValueError: a probability outside of [0, 1], an unknown choice, another shape.

        Source: Bengio, Vinyals, Jaitly and Shazeer 2015, Scheduled Sampling for Sequence Prediction
        with Recurrent Neural Networks.
        """
        if choice not in ("argmax", "sample"):
            raise ValueError(f"choice: expected 'argmax' or 'sample', got {choice!r}")
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
            got = f"{tokens.dtype} {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else tokens
            raise ValueError(f"tokens: expected integers (U, B), got {got}")
        given = tokens.transpose(0, 1) if self.attention.batch_first else tokens
        U, B = given.shape
        if not U:
            raise RuntimeError("Expected sequence length to be larger than 0 in AttentionDecoder")
        rate = _rates(teacher_forcing, U)
        prepared = self._prepared(memory, values, lengths, mask)
        check_batch("tokens", B, prepared)
        if bool((rate == 1).all()):
            outputs, state, weights = self._run(embed(given), prepared, state)
            logits = readout(outputs)
            fed = given
        else:
            forced = torch.rand((U, B), generator=generator) < rate.unsqueeze(1)
            forced = forced.to(given.device)
            fed_list, logits_list, weights_list = [given[0]], [], []
            for u in range(U):
                output, state, weight = self.step(embed(fed_list[-1]), prepared, state)
                logits_list.append(readout(output))
                weights_list.append(weight)
                if u + 1 < U:
                    own = _choose(logits_list[-1].detach(), choice, generator)
                    fed_list.append(torch.where(forced[u + 1], given[u + 1], own.to(given.dtype)))
            logits, weights = torch.stack(logits_list), torch.stack(weights_list)
            fed = torch.stack(fed_list)
        last: Any = state  # U >= 1, so there is one
        return Sampled(self._turned(logits), self._turned(fed), last, self._turned(weights))

    def _turned(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.attention.batch_first else x

    def _prepared(self, memory: Any, values: Any, lengths: Any, mask: Any) -> PreparedKeys:
        if not isinstance(memory, PreparedKeys):
            return self.prepare(memory, values, lengths=lengths, mask=mask)
        if values is not None or lengths is not None or mask is not None:
            raise ValueError(
                "memory: values, lengths and mask were given to prepare(), and are not given "
                "beside what it returned"
            )
        return memory

    def _begin(
        self, inputs: Any, memory: Any, values: Any, lengths: Any, mask: Any
    ) -> tuple[Tensor, PreparedKeys]:
        """Inputs (U, B, I) and the prepared memory, which go together."""
        letters = "(B, U, I)" if self.attention.batch_first else "(U, B, I)"
        if not isinstance(inputs, Tensor) or inputs.dim() != 3:
            got = tuple(inputs.shape) if isinstance(inputs, Tensor) else _kind(inputs)
            raise ValueError(f"inputs: expected {letters}, got {got}")
        inputs = self._turned(inputs)
        if not inputs.shape[0]:
            raise RuntimeError("Expected sequence length to be larger than 0 in AttentionDecoder")
        prepared = self._prepared(memory, values, lengths, mask)
        check_batch("inputs", inputs.shape[1], prepared)
        return inputs, prepared

    def _run(
        self, inputs: Tensor, prepared: PreparedKeys, state: State | None
    ) -> tuple[Tensor, State, Tensor]:
        """Outputs (U, B, .), state and weights (U, B, S) of inputs (U, B, I)."""
        if self.feed_context:
            return self._loop(inputs, prepared, state)
        h, last = self.recurrent(inputs, state)
        outputs, weights = self._beside(h, prepared)
        return outputs, last, weights

    def _beside(self, h: Tensor, prepared: PreparedKeys) -> tuple[Tensor, Tensor]:
        """[h; c] of the outputs (U, B, H) of all steps, and the weights."""
        context, weights = self.attention(self._turned(h), prepared)
        return torch.cat([h, self._turned(context)], -1), self._turned(weights)

    def _loop(
        self, inputs: Tensor, prepared: PreparedKeys, state: State | None
    ) -> tuple[Tensor, State, Tensor]:
        _check_read(self.recurrent, inputs, prepared)
        if state is None:
            state = self._initial(inputs[0])
        fused = self._fused(inputs, prepared, state)
        if fused is not None:
            return fused
        outputs, weights = [], []
        for x in inputs.unbind():
            output, state, weight = self._fed_step(x, prepared, state)
            outputs.append(output)
            weights.append(weight)
        return torch.stack(outputs), state, torch.stack(weights)

    def _fused(
        self, inputs: Tensor, prepared: PreparedKeys, state: State
    ) -> tuple[Tensor, State, Tensor] | None:
        """The loop as one node of the graph, where kernels take it; else None."""
        cell, attention = self.recurrent, self.attention
        if not (isinstance(cell, RecurrentCell) and is_bare(cell) and is_bare(attention)):
            return None
        pair = isinstance(state, (tuple, list))
        states: Any = tuple(state) if pair else (state,)
        sizes = [(inputs.shape[1], size) for size in state_sizes(cell)]
        if [getattr(s, "shape", None) for s in states] != sizes or not inputs.shape[1]:
            return None  # the cell says what is wrong
        w_query: Any = attention.weight_query
        v: Any = attention.weight_score
        kernels = kernels_of(inputs, *prepared, w_query, v, *states)
        found = None if kernels is None else short.of_steps(cell, inputs)
        if found is None:
            return None
        by = Loop(*found[:2], kernels, attention.scale, len(states))
        states = [s.contiguous() for s in states]
        out = loop(by, inputs, *prepared, w_query, v, states, found[2])
        if out is None:
            return None
        outputs, weights, finals = out
        return outputs, tuple(finals) if pair else finals[0], weights

    def _fed_step(
        self, x: Tensor, prepared: PreparedKeys, state: State
    ) -> tuple[Tensor, State, Tensor]:
        _check_read(self.recurrent, x, prepared)
        context, weight = self.attention(_output(self.recurrent, state), prepared)
        read = torch.cat([x, context], -1)
        if is_cell(self.recurrent):
            state = self.recurrent(read, state)
        else:
            state = self.recurrent(read.unsqueeze(0), state)[1]
        return torch.cat([_output(self.recurrent, state), context], -1), state, weight

    def _initial(self, x: Tensor) -> State:
        """The state that ``recurrent`` begins with, for inputs (B, I)."""
        module: Any = self.recurrent
        B = x.shape[0]
        sizes = state_sizes(module)
        if is_cell(module):
            found = [x.new_zeros(B, size) for size in sizes]
        elif isinstance(module, (Recurrent, SCRN)) and options(module).learn_state:
            names = (f"{name}_0" for name in module._fastseq_states)
            found = [getattr(module, name).expand(-1, B, -1).contiguous() for name in names]
        else:
            found = [x.new_zeros(module.num_layers, B, size) for size in sizes]
        return tuple(found) if len(found) > 1 else found[0]


def is_cell(module: Any) -> bool:
    """Whether it makes one step; else it is a layer."""
    return isinstance(module, (RecurrentCell, SCRNCell, nn.RNNCellBase))


def is_bare(module: nn.Module) -> bool:
    """Whether a call of it is fastseq's own forward and nothing else."""
    return (
        "forward" not in module.__dict__
        and type(module).forward.__module__.startswith("fastseq.")
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
    )


def state_sizes(module: Any) -> list[int]:
    """Of each state, h first."""
    if isinstance(module, (SCRN, SCRNCell)):
        return [module.hidden_size, module.context_size]
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        count = 2
    else:
        name = getattr(module, "_fastseq_cell", None)  # torch's own have one state
        count = 1 if name is None else len(CELLS[name].states)
    first = getattr(module, "proj_size", 0) or module.hidden_size
    return [first] + [module.hidden_size] * (count - 1)


def output_size(module: Any) -> int:
    sizes = state_sizes(module)
    return sum(sizes) if isinstance(module, (SCRN, SCRNCell)) else sizes[0]


def _output(module: Any, state: State) -> Tensor:
    """Of the last layer, (B, H), as it stands in a state."""
    own: Sequence[Tensor] = state if isinstance(state, (tuple, list)) else (state,)
    if not is_cell(module):
        own = [part[-1] for part in own]
    if isinstance(module, (SCRN, SCRNCell)):
        return torch.cat([own[0], own[1]], -1)
    return own[0]


def check_batch(name: str, B: int, prepared: PreparedKeys) -> None:
    if prepared.keys.shape[0] != B:
        raise ValueError(
            f"{name}: expected the batch of the memory, {prepared.keys.shape[0]}, got {B}"
        )


def _check_read(module: Any, x: Tensor, prepared: PreparedKeys) -> None:
    I, V = x.shape[-1], prepared.values.shape[-1]  # noqa: E741  (the field's letter)
    if V > module.input_size:
        raise ValueError(
            f"memory: expected values of a size up to the input_size = {module.input_size} of "
            f"{_kind(module)}, which reads the inputs and a context, got {V}; without values= they "
            "are the memory"
        )
    if I + V != module.input_size:
        raise ValueError(
            f"inputs: expected a last size of {module.input_size - V}, which with a context of {V} "
            f"is the input_size = {module.input_size} of {_kind(module)}, got {I}"
        )


def _rates(teacher_forcing: Any, U: int) -> Tensor:
    """A probability for each step, on the CPU."""
    try:
        rate = torch.as_tensor(teacher_forcing, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"teacher_forcing: expected a number or a tensor (U,), got {teacher_forcing!r}"
        ) from None
    if rate.dim() and tuple(rate.shape) != (U,):
        raise ValueError(
            f"teacher_forcing: expected a number or (U,) = ({U},), got {tuple(rate.shape)}"
        )
    if not bool(((rate >= 0) & (rate <= 1)).all()):
        raise ValueError(
            f"teacher_forcing: expected probabilities from 0 to 1, got {teacher_forcing}"
        )
    return rate.expand(U)


def _choose(logits: Tensor, choice: str, generator: torch.Generator | None) -> Tensor:
    if choice == "argmax":
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


def _kind(value: Any) -> str:
    return type(value).__name__
