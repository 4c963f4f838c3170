"""From a sequence to a vector, from a vector to a sequence, and both: modules on any layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops.checks import check_lengths, positive
from ..ops.geometry import Dense, reversed_in_time
from . import container
from .layers import GRU, LSTM, RNN
from .learned import HasState
from .literature import MGU, CoupledLSTM, IndRNN, PeepholeLSTM
from .pooling import Pooling
from .scrn import SCRN

CELLS: dict[str, type[nn.Module]] = {
    "rnn": RNN,
    "lstm": LSTM,
    "gru": GRU,
    "mgu": MGU,
    "peephole_lstm": PeepholeLSTM,
    "coupled_lstm": CoupledLSTM,
    "indrnn": IndRNN,
    "scrn": SCRN,
}

Cell = str | type[nn.Module] | nn.Module
Lengths = Tensor | Sequence[int] | None


class Encoder(nn.Module):
    r"""A vector of each sequence: a recurrent layer, and its last state or a pooling over time.

    .. math::
        h_1, \dots, h_T = \operatorname{layer}(x_1, \dots, x_T), \qquad
        v = h_T \quad \text{or} \quad v = \operatorname{pool}(h_1, \dots, h_T)

    Of two directions the last states stand side by side: the forward one's of the last step, the
    reverse one's of the first.

    Args:
        input_size, hidden_size: as the layer's; left out where ``cell`` is a layer.
        cell: 'rnn', 'lstm', 'gru', 'mgu', 'peephole_lstm', 'coupled_lstm', 'indrnn' or 'scrn'; or a
            class of fastseq's layers, one of :func:`fastseq.cell` too; or such a layer.
        pool: 'last', a kind of :class:`fastseq.pooling.Pooling` that has no size, 'max' or
            'average', or a Pooling.
        options: the layer's other arguments, as ``num_layers``, ``bidirectional``, ``batch_first``
            or ``backend``.

    Attributes:
        layer: the layer. output_size: the width of v.

    Raises:
        TypeError, ValueError: an argument is none of these.
    """

    def __init__(
        self,
        input_size: int | None = None,
        hidden_size: int | None = None,
        *,
        cell: Cell = "lstm",
        pool: str | Pooling = "last",
        **options: Any,
    ) -> None:
        super().__init__()
        _check_pool(pool)
        self.layer: Any = _layer(cell, input_size, hidden_size, options)
        first: Any = self.layer.batch_first
        self.pool: Pooling | None = None
        if isinstance(pool, Pooling):
            if pool.batch_first != first:
                raise ValueError(
                    f"pool: expected batch_first={first}, as the layer has it, got "
                    f"{pool.batch_first}"
                )
            self.pool = pool
        elif pool != "last":
            self.pool = Pooling(pool, batch_first=first)
        size = 1 if self.pool is None else self.pool.size
        self.output_size = size * container.output_size(self.layer)

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None, *, lengths: Lengths = None
    ) -> tuple[Tensor, Any]:
        """Run the layer and take a vector of each sequence.

        Args:
            input, hx, lengths: as the layer takes them, but for NestedTensors.

        Returns:
            ``vector, state``: (B, output_size), or (output_size,) of one sequence without a batch,
            and the layer's final state. Of a sequence of length 0 the vector is the initial state,
            and pooled zeros.
        """
        if isinstance(input, Tensor) and input.is_nested:
            raise TypeError(
                "input: expected a padded tensor or a PackedSequence, got a NestedTensor; pass "
                "torch.nested.to_padded_tensor(input, 0.0) and lengths"
            )
        y, state = self.layer(input, hx, lengths=lengths)
        if self.pool is not None:
            return self.pool(y, lengths), state
        return _last(self.layer, state), state


class Decoder(nn.Module):
    r"""A sequence from a vector: a recurrent layer that begins with it, or reads it at each step.

    .. math::
        s_0 &= \tanh(V v + b_v), & s_t &= \operatorname{cell}(x_t, s_{t-1})
            && \text{feed='state'} \\
        s_0 &= 0, & s_t &= \operatorname{cell}([x_t, v], s_{t-1}) && \text{feed='input'} \\
        && o_t &= W h_t + b

    The inputs x are given, as in training (teacher forcing), or made of the outputs:
    :math:`x_1 = 0`, :math:`x_{t+1} = \operatorname{feedback}(o_t)`. With given inputs the layer
    runs over the whole sequence at once.

    Args:
        input_size: of x.
        hidden_size: of the layer.
        output_size: of o; ``input_size`` if None.
        vector_size: of v. None: there is no v, and the layer begins with ``hx``.
        feed: 'state' or 'input'.
        cell: as :class:`Encoder`'s, but no layer.
        options: the layer's other arguments, as ``num_layers`` or ``batch_first``.

    Parameters: those of ``layer``; ``readout`` (torch.nn.Linear), W and b; and with
    feed='state' and a ``vector_size`` ``initial`` (torch.nn.Linear), V and b_v, whose outputs are
    the states of the cell in turn, each of all layers.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder for
    Statistical Machine Translation (both ways to feed v; theirs does both); Williams and Zipser
    1989, A Learning Algorithm for Continually Running Fully Recurrent Neural Networks (teacher
    forcing).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        vector_size: int | None = None,
        feed: str = "state",
        cell: str | type[nn.Module] = "lstm",
        **options: Any,
    ) -> None:
        super().__init__()
        if feed not in ("state", "input"):
            raise ValueError(f"feed: expected 'state' or 'input', got {feed!r}")
        if feed == "input" and vector_size is None:
            raise ValueError("vector_size: expected the size of what feed='input' feeds, got None")
        input_size = positive("input_size", input_size)
        output_size = input_size if output_size is None else positive("output_size", output_size)
        if vector_size is not None:
            vector_size = positive("vector_size", vector_size)
        if options.get("bidirectional"):
            raise ValueError("bidirectional: a decoder has no steps ahead to read; leave it out")
        if isinstance(cell, nn.Module):
            raise TypeError("cell: expected a name or a class, got a layer; give its class")
        self.feed, self.vector_size, self.input_size = feed, vector_size, input_size
        self.output_size = output_size
        width = input_size + (vector_size or 0 if feed == "input" else 0)
        self.layer: Any = _layer(cell, width, hidden_size, options)
        kind: dict[str, Any] = {name: options.get(name) for name in ("device", "dtype")}
        layer: Any = self.layer
        self._sizes = [layer._fastseq_size(k) for k in range(len(layer._fastseq_states))]
        self.initial: nn.Linear | None = None
        if feed == "state" and vector_size is not None:
            total = self.layer.num_layers * sum(self._sizes)
            self.initial = nn.Linear(vector_size, total, **kind)
        self.readout = nn.Linear(container.output_size(self.layer), self.output_size, **kind)

    def forward(
        self,
        vector: Tensor | None = None,
        inputs: Tensor | None = None,
        *,
        hx: Any = None,
        steps: int | None = None,
        lengths: Lengths = None,
        feedback: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Make a sequence.

        Args:
            vector: v, (B, vector_size); None where there is none.
            inputs: x, (T, B, input_size), or (B, T, input_size) with ``batch_first``: the sequence
                that is to come out, one step later. None: the outputs are fed back.
            hx: the initial state, as the layer takes it, in the place of the one made of v. It says
                how many sequences there are where ``vector`` does not.
            steps: T, where ``inputs`` is None, at least 1.
            lengths: (B,) integers from 0 to T, or None: how many steps each sequence has. Outputs
                behind its end are zero.
            feedback: a function of o_t (B, output_size) that returns the next x (B, input_size), as
                the embedding of its greatest element; o_t itself if None.

        Returns:
            ``outputs, state``: (T, B, output_size), or (B, T, output_size) with ``batch_first``,
            and the layer's final state.

        Raises:
            TypeError, ValueError, RuntimeError: an argument is none of these.
        """
        B = self._checked(vector, inputs, hx, steps, feedback)
        if hx is None and self.initial is not None:
            hx = self._begin(vector)
        first = self.layer.batch_first
        if inputs is not None:
            geometry = Dense(inputs, first)
            lengths = check_lengths(lengths, geometry.T, B, False, True)
            x = self._beside(inputs, vector, 1 if first else 0)
            y, state = self.layer(x, hx, lengths=lengths)
            return self._read(y, lengths), state
        lengths = check_lengths(lengths, steps or 0, B, False, True)
        like = self.readout.weight
        x = like.new_zeros(B, self.input_size)
        state, outputs = hx, []
        for t in range(steps or 0):
            alive = None if lengths is None else (lengths > t).long()
            x = self._beside(x, vector, None).unsqueeze(1 if first else 0)
            y, state = self.layer(x, state, lengths=alive)
            outputs.append(self._read(y, alive))
            o = outputs[-1].squeeze(1 if first else 0)
            x = o if feedback is None else feedback(o)
        return torch.cat(outputs, 1 if first else 0), state

    def _checked(self, vector: Any, inputs: Any, hx: Any, steps: Any, feedback: Any) -> int:
        """How many sequences there are."""
        known: dict[str, int] = {}
        if vector is None:
            if self.vector_size is not None and (hx is None or self.feed == "input"):
                raise ValueError(f"vector: expected (B, {self.vector_size}), got None")
        elif self.vector_size is None:
            raise ValueError(
                "vector: expected None, since the decoder was made without a vector_size"
            )
        else:
            if not isinstance(vector, Tensor):
                raise TypeError(f"vector: expected a tensor, got {type(vector).__name__}")
            if vector.dim() != 2 or vector.shape[1] != self.vector_size:
                raise ValueError(
                    f"vector: expected (B, {self.vector_size}), got {tuple(vector.shape)}"
                )
            known["vector"] = vector.shape[0]
        if hx is not None:
            state = hx[0] if isinstance(hx, (tuple, list)) and hx else hx
            if not isinstance(state, Tensor) or state.dim() != 3:
                raise ValueError("hx: expected a state of the layer, (num_layers, B, ...)")
            known["hx"] = state.shape[1]
        if inputs is None:
            if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
                raise ValueError(f"steps: without inputs, expected at least 1, got {steps!r}")
            if feedback is None and self.output_size != self.input_size:
                raise ValueError(
                    f"feedback: an output of {self.output_size} is no input of {self.input_size}; "
                    "expected a function that makes one of the other"
                )
        else:
            if steps is not None or feedback is not None:
                name = "feedback" if steps is None else "steps"
                raise ValueError(f"{name}: expected None, since the inputs are given")
            if not isinstance(inputs, Tensor):
                raise TypeError(f"inputs: expected a tensor, got {type(inputs).__name__}")
            if inputs.dim() != 3 or inputs.shape[2] != self.input_size:
                first = "B, T" if self.layer.batch_first else "T, B"
                raise ValueError(
                    f"inputs: expected ({first}, {self.input_size}), got {tuple(inputs.shape)}"
                )
            known["inputs"] = inputs.shape[0 if self.layer.batch_first else 1]
        if not known:
            raise ValueError("hx: expected the initial state, since there is neither vector nor x")
        if len(set(known.values())) > 1:
            found = ", ".join(f"{B} of {name}" for name, B in known.items())
            raise ValueError(f"vector, inputs, hx: expected one number of sequences, got {found}")
        return next(iter(known.values()))

    def _begin(self, vector: Tensor | None) -> Any:
        """The initial state that v makes."""
        assert self.initial is not None and vector is not None
        L = self.layer.num_layers
        parts = torch.tanh(self.initial(vector)).split([L * size for size in self._sizes], 1)
        states = tuple(part.unflatten(1, (L, -1)).transpose(0, 1).contiguous() for part in parts)
        return states if len(states) > 1 else states[0]

    def _beside(self, x: Tensor, vector: Tensor | None, time: int | None) -> Tensor:
        """x, and with feed='input' the vector beside it at every step."""
        if self.feed != "input" or vector is None:
            return x
        if time is not None:
            vector = vector.unsqueeze(time).expand(*x.shape[:2], -1)
        return torch.cat([x, vector], -1)

    def _read(self, y: Tensor, lengths: Tensor | None) -> Tensor:
        outputs = self.readout(y)
        if lengths is None:
            return outputs
        T = y.shape[1 if self.layer.batch_first else 0]
        inside = torch.arange(T, device=y.device)[:, None] < lengths.to(y.device)
        inside = inside.t() if self.layer.batch_first else inside
        return torch.where(inside[..., None], outputs, 0.0)


class SequenceAutoencoder(nn.Module):
    r"""An encoder whose final state a decoder begins with, to make the sequence again.

    .. math::
        s = \operatorname{encoder}(x_1, \dots, x_T), \qquad
        \hat x_T, \dots, \hat x_1 = \operatorname{decoder}(s)

    The decoder makes the last step first (Srivastava et al.): what the state holds best comes
    first. With ``reverse=False`` it makes the first step first (Dai and Le). Each of its steps
    reads the true step before it (teacher forcing), or its own (``free_running``), the first one
    zeros. The states of an encoder of two directions stand side by side in a decoder of twice the
    width.

    Args:
        input_size, hidden_size: of the encoder's layer.
        output_size: of what comes out of each step, as of logits; ``input_size`` if None.
        cell: as :class:`Encoder`'s, but no layer.
        reverse: whether the decoder makes the sequence from its end on.
        bidirectional: of the encoder alone.
        options: other arguments of both layers, as ``num_layers`` or ``batch_first``.

    Attributes:
        encoder: an :class:`Encoder`. Its ``layer`` is what unsupervised training leaves to another
            task. decoder: a :class:`Decoder`.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: Srivastava, Mansimov and Salakhutdinov 2015, Unsupervised Learning of Video
    Representations using LSTMs; Dai and Le 2015, Semi-supervised Sequence Learning.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        output_size: int | None = None,
        *,
        cell: str | type[nn.Module] = "lstm",
        reverse: bool = True,
        bidirectional: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        for name, value in (("reverse", reverse), ("bidirectional", bidirectional)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if isinstance(cell, nn.Module):
            raise TypeError("cell: expected a name or a class, got a layer; give its class")
        if bidirectional and (options.get("proj_size") or options.get("context_size")):
            name = "proj_size" if options.get("proj_size") else "context_size"
            raise ValueError(f"bidirectional: not with {name}; leave one of them out")
        self.encoder = Encoder(
            input_size, hidden_size, cell=cell, bidirectional=bidirectional, **options
        )
        width = hidden_size * (2 if bidirectional else 1)
        self.decoder = Decoder(input_size, width, output_size, cell=cell, **options)
        self.reverse = reverse

    def extra_repr(self) -> str:
        return "" if self.reverse else "reverse=False"

    def forward(
        self,
        input: Tensor,
        *,
        lengths: Lengths = None,
        free_running: bool = False,
        feedback: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Any]:
        """Take a sequence in and make it again.

        Args:
            input: (T, B, input_size), or (B, T, input_size) with ``batch_first``.
            lengths: (B,) integers from 0 to T, or None.
            free_running: whether the decoder reads its own outputs in the place of the true steps.
            feedback: with ``free_running``, as :class:`Decoder` takes it.

        Returns:
            ``outputs, state``: (T, B, output_size), laid out as the input and in its order of time,
            zero behind the ends, so that a loss compares the two as they are; and the encoder's
            final state.
        """
        if not isinstance(input, Tensor) or input.is_nested or input.dim() != 3:
            got = f"{input.dim()}-D" if isinstance(input, Tensor) else type(input).__name__
            raise TypeError(f"input: expected a padded tensor of 3 dimensions, got {got}")
        if not isinstance(free_running, bool):
            raise TypeError(f"free_running: expected a bool, got {type(free_running).__name__}")
        if feedback is not None and not free_running:
            raise ValueError("feedback: with free_running=True alone, got False")
        first = self.encoder.layer.batch_first
        geometry = Dense(input, first)
        lengths = check_lengths(lengths, geometry.T, geometry.B, False, True)
        _, state = self.encoder(input, lengths=lengths)
        begin = _side_by_side(state) if self.encoder.layer.bidirectional else state
        if free_running:
            outputs, _ = self.decoder(
                hx=begin, steps=geometry.T, lengths=lengths, feedback=feedback
            )
        else:
            target = reversed_in_time(input, first, lengths) if self.reverse else input
            outputs, _ = self.decoder(
                inputs=_one_later(target, 1 if first else 0), hx=begin, lengths=lengths
            )
        if self.reverse:
            outputs = reversed_in_time(outputs, first, lengths)
        return outputs, state


def _layer(cell: Any, input_size: Any, hidden_size: Any, options: dict[str, Any]) -> nn.Module:
    if isinstance(cell, HasState):
        given = [
            name
            for name, size in (("input_size", input_size), ("hidden_size", hidden_size))
            if size is not None
        ]
        if given or options:
            name = next(iter([*given, *options]))
            raise TypeError(f"{name}: cell is a layer, which has its own; leave it out")
        return cell  # type: ignore[return-value]
    if isinstance(cell, str):
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(map(repr, CELLS))}, got {cell!r}")
        cell = CELLS[cell]
    if not isinstance(cell, type) or not issubclass(cell, HasState):
        kind = cell.__name__ if isinstance(cell, type) else type(cell).__name__
        raise TypeError(f"cell: expected a name, or a layer of fastseq or its class, got {kind}")
    if input_size is None or hidden_size is None:
        name = "input_size" if input_size is None else "hidden_size"
        raise TypeError(f"{name}: expected the layer's, got None")
    return cell(input_size, hidden_size, **options)  # type: ignore[call-arg,return-value]


def _check_pool(pool: Any) -> None:
    if not isinstance(pool, (str, Pooling)):
        raise TypeError(f"pool: expected a str or a Pooling, got {type(pool).__name__}")
    if isinstance(pool, str) and pool not in ("last", "max", "average"):
        raise ValueError(f"pool: expected 'last', 'max', 'average' or a Pooling, got {pool!r}")


def _last(layer: Any, state: Any) -> Tensor:
    """(B, output_size): the last layer's final state, laid out as its output."""
    D = 2 if layer.bidirectional else 1
    parts = (state if isinstance(state, tuple) else (state,))[: 2 if isinstance(layer, SCRN) else 1]
    return torch.cat([part[d - D] for d in range(D) for part in parts], -1)


def _side_by_side(state: Any) -> Any:
    """(num_layers, B, 2*H) of a state (2*num_layers, B, H), for each of the states."""
    if isinstance(state, tuple):
        return tuple(_side_by_side(s) for s in state)
    return torch.cat([state[0::2], state[1::2]], -1)


def _one_later(x: Tensor, time: int) -> Tensor:
    """Each step in the place of the next, and zeros in the first."""
    zeros = torch.zeros_like(x.narrow(time, 0, 1))
    return torch.cat([zeros, x.narrow(time, 0, x.shape[time] - 1)], time)
