"""Layers of different kinds and widths, one on another: :class:`Stacked`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..ops.checks import check_lengths, check_seed
from ..ops.geometry import (
    beside,
    geometry_of,
    reversed_in_time,
    reversed_reset,
    values_of,
    with_values,
)
from . import graph, joined
from .options import HasOptions, check_rate
from .recurrent import check_input, described
from .scrn import SCRN, SCRNCell

CONNECTIONS = ("plain", "residual", "highway")


class Plain(nn.Module):
    """What stands around a layer is a module of its input x and its output f(x), and gives the
    input of the next layer: here f(x)."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y


class Residual(nn.Module):
    """f(x) + x; where the widths differ f(x) + W_s x, ``carry.weight`` (out, in)."""

    def __init__(self, input_size: int, output_size: int, **kind: Any) -> None:
        super().__init__()
        self.carry = _carry(input_size, output_size, kind)

    def reset_parameters(self) -> None:
        _reset(self.carry)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.carry(x).to(y.dtype)


class Highway(nn.Module):
    """T f(x) + (1 - T) x with T = sigmoid(W_T x + b_T), ``transform``; where the widths differ W_s
    x, ``carry.weight``, is in the place of x."""

    def __init__(
        self, input_size: int, output_size: int, transform_bias: float, **kind: Any
    ) -> None:
        super().__init__()
        self.transform_bias = transform_bias
        self.transform = nn.Linear(input_size, output_size, **kind)
        self.carry = _carry(input_size, output_size, kind)
        nn.init.constant_(self.transform.bias, transform_bias)

    def reset_parameters(self) -> None:
        self.transform.reset_parameters()
        _reset(self.carry)
        nn.init.constant_(self.transform.bias, self.transform_bias)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        gate = torch.sigmoid(self.transform(x)).to(y.dtype)
        return torch.lerp(self.carry(x).to(y.dtype), y, gate)


def _carry(input_size: int, output_size: int, kind: dict[str, Any]) -> nn.Module:
    if input_size == output_size:
        return nn.Identity()
    return nn.Linear(input_size, output_size, bias=False, **kind)


def _reset(carry: nn.Module) -> None:
    if isinstance(carry, nn.Linear):
        carry.reset_parameters()


class Stacked(nn.Module):
    r"""Recurrent layers of any kinds and widths, one on another, called like one layer.

    .. math::
        x_{k+1} = \begin{cases}
            f_k(d_k(x_k)) & \text{plain} \\
            f_k(d_k(x_k)) + x_k & \text{residual} \\
            T_k \odot f_k(d_k(x_k)) + (1 - T_k) \odot x_k,
            \quad T_k = \sigma(W_T x_k + b_T) & \text{highway}
        \end{cases}

    :math:`f_k` is layer k over the whole sequence and :math:`d_k` dropout in training, in front of
    each layer but the first: what a connection carries past a layer is not dropped. With plain
    connections it is that of torch.nn.LSTM's ``dropout``, from torch's own stream. Where a layer's
    output has another width than its input, :math:`W_s x_k`, a learned linear map without a bias,
    is in the place of :math:`x_k` (He et al. 2016, eq. 2).

    Neighbouring layers of one class, width and options with plain connections are made one call of
    several layers, as those of ``fastseq.LSTM(..., num_layers=3)`` are.

    Args:
        layers: the layers, from the input on: any of fastseq's, or torch.nn's, which
            :func:`fastseq.replace` turns into fastseq's in place. A layer with ``num_layers`` > 1
            counts as one, with no connection inside. Bidirectional ones hand on the outputs of both
            directions side by side, as in torch.nn.
        reverse: layers of a second stack that reads each sequence from its last step to its first;
            the outputs of both stacks stand side by side at the end, and nowhere before. A sequence
            of a ragged batch is reversed within its length.
        connections: 'plain', 'residual' or 'highway', or one of these for each layer, from the
            first on; for both stacks.
        dropout: the probability with which an element of the input of a layer but the first is
            zeroed in training.
        transform_bias: what :math:`b_T` begins with. Where it is negative a highway begins by
            carrying its input.

    Parameters, beside those of ``layers.{k}`` and ``reverse_layers.{k}``: of a residual connection
    whose widths differ ``connections.{k}.carry.weight`` (out, in), of a highway also
    ``connections.{k}.transform.weight`` (out, in) and ``.bias`` (out,); ``reverse_connections``
    alike. They begin as torch.nn.Linear's do, and the bias with ``transform_bias``.

    Raises:
        TypeError: no layer. ValueError: none at all; widths that do not meet; layers that differ in
            ``batch_first``, dtype or device, or have dropout of their own; no such connection; a
            bidirectional layer beside ``reverse``.

    Source: He et al. 2016, Deep Residual Learning for Image Recognition; Wu et al. 2016, Google's
    Neural Machine Translation System (residual connections between LSTMs); Srivastava et al. 2015,
    Highway Networks; Schuster and Paliwal 1997, Bidirectional Recurrent Neural Networks.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        *,
        reverse: Iterable[nn.Module] | None = None,
        connections: str | Sequence[str] = "plain",
        dropout: float = 0.0,
        transform_bias: float = -1.0,
    ) -> None:
        super().__init__()
        own = _listed("layers", layers)
        other = None if reverse is None else _listed("reverse", reverse)
        self.dropout = check_rate("dropout", dropout)
        if dropout and len(own) == 1:
            warnings.warn(
                "dropout stands in front of every layer but the first, so it does nothing with one "
                f"layer, got dropout={dropout}",
                stacklevel=2,
            )
        if isinstance(transform_bias, bool) or not isinstance(transform_bias, (int, float)):
            raise TypeError(
                f"transform_bias: expected a number, got {type(transform_bias).__name__}"
            )
        _check_stack("layers", own)
        words = _words(connections, len(own))
        if other is not None:
            _check_reverse(own, other)
        self.batch_first: bool = own[0].batch_first
        self.input_size: int = own[0].input_size
        self.output_size: int = sum(output_size(s[-1]) for s in (own, other) if s)
        self.layers = nn.ModuleList(own)
        self.connections = _connected(own, words, transform_bias)
        self.reverse_layers = None if other is None else nn.ModuleList(other)
        self.reverse_connections = (
            None if other is None else _connected(other, words, transform_bias)
        )

    @classmethod
    def of(
        cls,
        kind: Callable[..., nn.Module],
        input_size: int,
        widths: Sequence[int],
        *,
        connections: str | Sequence[str] = "plain",
        dropout: float = 0.0,
        bidirectional: bool | str = False,
        transform_bias: float = -1.0,
        **options: Any,
    ) -> Stacked:
        """A stack of layers of one kind.

        Args:
            kind: the class of the layers, fastseq's or torch.nn's.
            input_size: the width of the input.
            widths: each layer's ``hidden_size``.
            connections, dropout, transform_bias: see :class:`Stacked`.
            bidirectional: True makes each layer bidirectional, as torch.nn does; 'stacks' makes a
                stack for each direction, joined at the end alone.
            options: what each layer is made with, as ``batch_first=True``.
        """
        if not callable(kind):
            raise TypeError(f"kind: expected a class of layers, as fastseq.GRU, got {kind!r}")
        if not isinstance(widths, Sequence) or isinstance(widths, str) or not widths:
            raise ValueError(f"widths: expected the hidden sizes of the layers, got {widths!r}")
        if "num_layers" in options:
            raise TypeError("num_layers: there is one layer for each of widths")
        if not isinstance(bidirectional, bool) and bidirectional != "stacks":
            raise ValueError(f"bidirectional: expected a bool or 'stacks', got {bidirectional!r}")
        stacks = []
        for _ in range(2 if bidirectional == "stacks" else 1):
            width, layers = input_size, []
            for hidden_size in widths:
                both = bidirectional is True
                layers.append(kind(width, hidden_size, bidirectional=both, **options))
                width = output_size(layers[-1])
            stacks.append(layers)
        return cls(
            stacks[0],
            reverse=stacks[1] if len(stacks) == 2 else None,
            connections=connections,
            dropout=dropout,
            transform_bias=transform_bias,
        )

    def reset_parameters(self) -> None:
        """The initial values again, of the layers and the connections."""
        for part in self.modules():
            if isinstance(part, (nn.RNNBase, Residual, Highway)):
                part.reset_parameters()

    def flatten_parameters(self) -> None:
        """As torch.nn's, of each layer."""
        for part in self.modules():
            if isinstance(part, nn.RNNBase):
                part.flatten_parameters()

    def extra_repr(self) -> str:
        return f"dropout={self.dropout}" if self.dropout else ""

    def __prepare_scriptable__(self) -> nn.Module:
        raise TypeError(
            "torch.jit.script: a Stacked has no counterpart in torch.nn; use torch.jit.trace or "
            "torch.export"
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        row_ids: Tensor | Sequence[int] | None = None,
        seed: Tensor | int | None = None,
    ) -> tuple[Any, tuple[Any, ...]]:
        """Run the stack over a sequence.

        Args:
            input: as the layers take it, (T, I), (T, B, I), (B, T, I) with their ``batch_first``, a
                PackedSequence, or a NestedTensor (B, jagged, I).
            hx: the initial states, a tuple with one entry for each layer: what that layer takes, or
                None. With ``reverse`` a pair of such tuples, forward and reverse. Without them each
                layer begins as it does by itself.
            lengths, reset: as a layer of fastseq takes them.
            row_ids: as a layer of fastseq takes them.
            seed: as a layer takes it, 64 bits that the masks of all layers depend on; each has
                another of its own made of it.

        Returns:
            ``output, states``: the output (T, B, W) in the form of the input, with W
            ``output_size``, and a tuple with each layer's final state in that layer's own form.
            With ``reverse`` the output of the forward stack stands first, and the states are a pair
            of tuples, forward and reverse.
        """
        if not torch.compiler.is_compiling():
            own = {"lengths": lengths, "reset": reset, "row_ids": row_ids, "seed": seed}
            node = graph.leaf(self, Stacked.forward, input, hx, **own)
            if node is not None:
                return node  # type: ignore[return-value]
        forward, backward = self._states(hx)
        lengths = self._checked(input, lengths, reset, seed)
        given = {"lengths": lengths, "reset": reset, "row_ids": row_ids, "seed": seed}
        x = self._begun(input, lengths)
        y, states = self._through(self.layers, self.connections, x, forward, given, 0)
        if self.reverse_layers is None or self.reverse_connections is None:
            return y, states
        if reset is not None:
            given["reset"] = reversed_reset(reset, x, self.batch_first, lengths)
        x = reversed_in_time(x, self.batch_first, lengths)
        z, others = self._through(
            self.reverse_layers, self.reverse_connections, x, backward, given, len(self.layers)
        )
        z = reversed_in_time(z, self.batch_first, lengths)
        return beside(y, y, z), (states, others)

    def _states(self, hx: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """One for each layer, of the stack and of the reverse one; None where there is none."""
        forward, reverse = len(self.layers), len(self.reverse_layers or ())
        if hx is None:
            return (None,) * forward, (None,) * reverse
        if not reverse:
            return _states_of("hx", hx, forward), ()
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            raise RuntimeError(
                "hx: expected a pair of tuples, the states of the forward and of the reverse "
                f"stack, got {described(hx)}"
            )
        return _states_of("hx[0]", hx[0], forward), _states_of("hx[1]", hx[1], reverse)

    def _checked(self, input: Any, lengths: Any, reset: Any, seed: Any) -> Tensor | None:
        """``lengths`` as a tensor. What is used before a layer sees it is checked here."""
        if seed is not None:
            check_seed(seed)
        batched = check_input(self, input, lengths, reset)
        if lengths is None:
            return None
        geometry, packed = geometry_of(input, self.batch_first), isinstance(input, PackedSequence)
        return check_lengths(lengths, geometry.T, geometry.B, packed, batched)

    def _begun(self, input: Any, lengths: Tensor | None) -> Any:
        """The input, of whose padding nothing may go past a layer."""
        if lengths is None or not self._carries:
            return input
        T, first = input.shape[1 if self.batch_first else 0], self.batch_first
        steps, ends = torch.arange(T, device=input.device), lengths.to(input.device)
        inside = steps < ends[:, None] if first else steps[:, None] < ends
        return torch.where(inside[..., None], input, 0)

    @property
    def _carries(self) -> bool:
        """Whether anything goes past a layer."""
        return any(_is_more(connection) for connection in self.connections)

    def _fastseq_calls(self) -> Iterator[tuple[str, list[Any], slice]]:
        """The calls that one call of a plain input makes: of which stack, its layers, and which."""
        dropout = self.dropout if self.training else 0.0
        for name, layers, connections in (
            ("layers", self.layers, self.connections),
            ("reverse_layers", self.reverse_layers, self.reverse_connections),
        ):
            if layers is not None and connections is not None:
                own = list(layers)
                alone = [_is_more(connection) for connection in connections]
                for part in joined.runs(own, alone, dropout, self.training):
                    yield name, own, part

    def _through(
        self,
        layers: Iterable[nn.Module],
        connections: Iterable[nn.Module],
        x: Any,
        states: Sequence[Any],
        given: dict[str, Any],
        first: int,
    ) -> tuple[Any, tuple[Any, ...]]:
        """One stack over a sequence. first: the number of its first layer among both stacks'."""
        own, around = list(layers), list(connections)
        finals: list[Any] = []
        # a float that Dynamo reads makes it trace twice where dynamic=True
        dropout = self.dropout if self.training else 0.0
        alone = [_is_more(connection) for connection in around]
        for part in joined.runs(own, alone, dropout, self.training):
            found = None
            begin, end = part.start, part.stop
            inner = self._dropped(x) if begin else x
            if end - begin > 1:
                found = joined.call(own[part], dropout, inner, states[part], given)
            if found is None:
                y, last = _call(own[begin], begin, inner, states[begin], given, first)
                if alone[begin]:
                    y = with_values(y, around[begin](values_of(x), values_of(y)))
                found = y, [last]
                for k in range(begin + 1, end):
                    y, last = _call(own[k], k, self._dropped(found[0]), states[k], given, first)
                    found = y, [*found[1], last]
            x = found[0]
            finals += found[1]
        return x, tuple(finals)

    def _dropped(self, x: Any) -> Any:
        """x as a layer but the first reads it."""
        if not (self.training and self.dropout):
            return x
        return with_values(x, torch.dropout(values_of(x), self.dropout, True))


def _is_more(connection: nn.Module) -> bool:
    return not isinstance(connection, Plain)


def _call(
    layer: nn.Module, k: int, x: Any, hx: Any, given: dict[str, Any], first: int
) -> tuple[Any, Any]:
    """Layer k of a stack. first: see :meth:`Stacked._through`."""
    keywords = {name: value for name, value in given.items() if value is not None}
    if keywords and not isinstance(layer, HasOptions):
        name = next(iter(keywords))
        raise TypeError(
            f"{name}: layers[{k}] is torch.nn's {type(layer).__name__}, which takes none; "
            "fastseq.replace(stack) makes it fastseq's"
        )
    if "seed" in keywords:  # of a bit that neither a caller's small number nor an SCRN changes
        keywords["seed"] = keywords["seed"] ^ (first + k + 1 << 32)
    return layer(x, hx, **keywords)


def output_size(layer: Any) -> int:
    """The width of a layer's output, of both directions together."""
    width = layer.proj_size or layer.hidden_size
    if isinstance(layer, SCRN):
        width += layer.context_size
    return width * (2 if layer.bidirectional else 1)


def _states_of(name: str, hx: Any, count: int) -> Sequence[Any]:
    if not isinstance(hx, (tuple, list)) or len(hx) != count:
        raise RuntimeError(
            f"{name}: expected a tuple of {count} states, one for each layer, got {described(hx)}"
        )
    return hx


def _listed(name: str, layers: Any) -> list[Any]:
    if isinstance(layers, nn.Module) and not isinstance(layers, (nn.ModuleList, nn.Sequential)):
        raise TypeError(f"{name}: expected a list of layers, got a {type(layers).__name__}")
    try:
        found = list(layers)
    except TypeError:
        kind = type(layers).__name__
        raise TypeError(f"{name}: expected a list of layers, got {kind}") from None
    if not found:
        raise ValueError(f"{name}: expected at least one layer, got none")
    for k, layer in enumerate(found):
        _check_layer(f"{name}[{k}]", layer)
    return found


def _check_layer(name: str, layer: Any) -> None:
    if isinstance(layer, nn.RNNBase):
        if layer.num_layers > 1 and layer.dropout:
            raise ValueError(
                f"{name}: has dropout={layer.dropout} between layers of its own; give the stack "
                "single layers and its own dropout, or set the layer's to 0"
            )
        return
    got = f"the class {layer.__name__}" if isinstance(layer, type) else type(layer).__name__
    remedy = ""
    if isinstance(layer, (nn.RNNCellBase, SCRNCell)):
        remedy = ", which is one step; the layer of that cell runs over a sequence"
    elif isinstance(layer, type):
        remedy = "; make an instance of it first"
    elif isinstance(layer, Stacked):
        remedy = "; give its layers, list(stack.layers)"
    raise TypeError(f"{name}: expected a recurrent layer of fastseq or torch.nn, got {got}{remedy}")


def _kind(layer: Any) -> tuple[torch.dtype, torch.device]:
    parameter = next(layer.parameters())
    return parameter.dtype, parameter.device


def _check_stack(name: str, layers: Sequence[Any]) -> None:
    """Each layer takes what the one beneath gives."""
    first = layers[0]
    for k in range(1, len(layers)):
        layer, width = layers[k], output_size(layers[k - 1])
        if layer.input_size != width:
            raise ValueError(
                f"{name}[{k}]: expected input_size {width}, the width of the output of "
                f"{name}[{k - 1}], got {layer.input_size}"
            )
        _check_alike(f"{name}[{k}]", layer, f"{name}[0]", first)


def _check_alike(name: str, layer: Any, other: str, first: Any) -> None:
    if layer.batch_first != first.batch_first:
        raise ValueError(
            f"{name}: expected batch_first={first.batch_first}, as {other} has it, got "
            f"{layer.batch_first}"
        )
    if _kind(layer) != _kind(first):
        (dtype, device), (its, at) = _kind(first), _kind(layer)
        raise ValueError(
            f"{name}: expected parameters of {dtype} on {device}, as {other} has them, got {its} "
            f"on {at}"
        )


def _check_reverse(layers: Sequence[Any], reverse: Sequence[Any]) -> None:
    if len(reverse) != len(layers):
        raise ValueError(
            f"reverse: expected {len(layers)} layers, as many as the forward stack has, got "
            f"{len(reverse)}"
        )
    for name, stack in (("layers", layers), ("reverse", reverse)):
        for k, layer in enumerate(stack):
            if layer.bidirectional:
                raise ValueError(
                    f"{name}[{k}]: a bidirectional layer reads both ways, so it cannot stand in a "
                    "stack of one direction; leave out reverse, or make it with bidirectional=False"
                )
    if reverse[0].input_size != layers[0].input_size:
        raise ValueError(
            f"reverse[0]: expected input_size {layers[0].input_size}, that of layers[0], got "
            f"{reverse[0].input_size}"
        )
    _check_stack("reverse", reverse)
    _check_alike("reverse[0]", reverse[0], "layers[0]", layers[0])
    if shared := {id(m) for m in layers} & {id(m) for m in reverse}:
        k = next(k for k, layer in enumerate(reverse) if id(layer) in shared)
        raise ValueError(
            f"reverse[{k}]: stands in the forward stack, too; make a layer for each direction"
        )


def _words(connections: Any, count: int) -> list[str]:
    """What stands around each layer."""
    known = ", ".join(map(repr, CONNECTIONS))
    if isinstance(connections, str):
        words = [connections] * count
    elif isinstance(connections, Sequence):
        words = list(connections)
    else:
        raise TypeError(
            f"connections: expected one of {known}, or one for each layer, got "
            f"{type(connections).__name__}"
        )
    if len(words) != count:
        raise ValueError(f"connections: expected one for each of {count} layers, got {len(words)}")
    for word in words:
        if word not in CONNECTIONS:
            raise ValueError(f"connections: expected one of {known}, got {word!r}")
    return words


def _connected(layers: Sequence[Any], words: Sequence[str], bias: float) -> nn.ModuleList:
    found = nn.ModuleList()
    for layer, word in zip(layers, words, strict=True):
        dtype, device = _kind(layer)
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        sizes = layer.input_size, output_size(layer)
        if word == "residual":
            found.append(Residual(*sizes, **kind))
        elif word == "highway":
            found.append(Highway(*sizes, bias, **kind))
        else:
            found.append(Plain())
    return found
