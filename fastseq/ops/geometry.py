"""How a caller's sequences lie, and the way to the rows that backends take, and back.

Rows are time-major: dense (T, B, ...), or packed (N, ...) with ``batch_sizes`` as in
``PackedSequence``, the sequences sorted by decreasing length. A :class:`Geometry` alone knows how
to transpose, pack and sort, and how to put back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..backends.contract import BATCH_FIRST, ONE_STEP, TIME_FIRST
from ..backends.tracing import is_tracing


class Geometry:
    """Sequences of one length, each a row of a dense tensor: the form that the others start from.

    T, B: steps of the longest sequence, and sequences.
    batch_sizes: of the rows, where they are packed.
    order: sequence k of the rows is the caller's number order[k]; None where they are the same.
    copies: whether what the caller gets is a copy of the rows.
    hides_batch: whether the rows do not tell B: where sequences may be empty, or a graph is traced.
    """

    batch_sizes: Tensor | None = None
    order: Tensor | None = None
    copies = False
    hides_batch = False
    batched = True
    T: int
    B: Any  # a number, or while a graph is traced what stands for it

    @property
    def is_ragged(self) -> bool:
        return self.batch_sizes is not None

    def numbers(self, x: Any) -> Tensor:
        """The caller's input as a plain tensor."""
        return x

    def cast(self, x: Any, dtype: torch.dtype) -> Any:
        """The caller's input in another type."""
        return x.to(dtype)

    def pack(self) -> None:
        """Find the rows, where that takes time: they are wanted now."""

    def rows(self, x: Any) -> Tensor:
        """The caller's input, or what is laid out like it, as rows."""
        raise NotImplementedError

    def output(self, y: Tensor) -> Any:
        """Rows as the caller has them."""
        raise NotImplementedError

    def state(self, state: Tensor) -> Tensor:
        """A state of the caller's as (layers * D, B, ...), in the order of the rows."""
        return self.sorted(state, 1)

    def final(self, state: Tensor) -> Tensor:
        """The inverse of :meth:`state`."""
        return state

    def sorted(self, tensor: Tensor, dim: int) -> Tensor:
        """What has the caller's sequences in a dimension, in the order of the rows."""
        return tensor if self.order is None else tensor.index_select(dim, _on(tensor, self.order))

    def times(self, value: Tensor) -> Tensor:
        """(T, B) from the caller's; what has another rank, as it is."""
        return value


class Dense(Geometry):
    """(T, B, I); (B, T, I) with ``batch_first``; (T, I) of one sequence, whatever that says."""

    def __init__(self, x: Tensor, batch_first: bool) -> None:
        self.batched = x.dim() == 3
        self.batch_first = batch_first and self.batched
        self.T = x.shape[1 if self.batch_first else 0]
        self.B = x.shape[0 if self.batch_first else 1] if self.batched else 1

    @property
    def layout(self) -> int:
        """How the caller's input lies, as :class:`.contract.Request` says it."""
        return BATCH_FIRST if self.batch_first else TIME_FIRST

    def dense(self, x: Tensor) -> Tensor:
        """(T, B, ...) from the caller's."""
        if not self.batched:
            return x.unsqueeze(1)
        return x.transpose(0, 1) if self.batch_first else x

    def undo(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`dense`."""
        if not self.batched:
            return y.squeeze(1)
        return y.transpose(0, 1) if self.batch_first else y

    def rows(self, x: Tensor) -> Tensor:
        return self.dense(x)

    def output(self, y: Tensor) -> Tensor:
        return self.undo(y)

    def state(self, state: Tensor) -> Tensor:
        return state if self.batched else state.unsqueeze(1)

    def final(self, state: Tensor) -> Tensor:
        return state if self.batched else state.squeeze(1)

    def times(self, value: Tensor) -> Tensor:
        if not self.batched:
            return value.unsqueeze(1) if value.dim() == 1 else value
        return value.transpose(0, 1) if self.batch_first and value.dim() == 2 else value


class OneStep(Geometry):
    """One step of each sequence: (B, I) with states (B, H), or (I,) with states (H,)."""

    T = 1
    layout = ONE_STEP

    def __init__(self, x: Tensor) -> None:
        self.batched = x.dim() == 2
        self.B = x.shape[0] if self.batched else 1

    def rows(self, x: Tensor) -> Tensor:
        return self.batch(x).unsqueeze(0)

    def output(self, y: Tensor) -> Tensor:
        return self.single(y.squeeze(0))

    def state(self, state: Tensor) -> Tensor:
        return self.rows(state)

    def final(self, state: Tensor) -> Tensor:
        return self.output(state)

    def batch(self, value: Tensor) -> Tensor:
        """Input or state as (B, ...)."""
        return value if self.batched else value.unsqueeze(0)

    def single(self, value: Tensor) -> Tensor:
        """The inverse of :meth:`batch`."""
        return value if self.batched else value.squeeze(0)


class Packed(Geometry):
    """A PackedSequence.

    reset, known: tensors that know the batch: as the caller gives it; and in their second dimension
        or in their only one. A graph that is traced does not read it off ``batch_sizes``; what they
        say is checked when it runs.
    """

    def __init__(
        self, x: PackedSequence, batch_first: bool, reset: Any, known: Sequence[Tensor | None]
    ) -> None:
        data, self.batch_sizes, self.order, self.restore = x
        self.batch_first = batch_first
        sizes = self.batch_sizes
        self.T = sizes.shape[0] if sizes.dim() else 0
        self.hides_batch = torch.compiler.is_compiling()
        if self.hides_batch:
            first = self.times(reset) if isinstance(reset, Tensor) else None
            self.B = _settled(data, sizes, [self.order, first, *known])
        elif sizes.dim() == 1 and is_tracing():  # which records a tensor, as of shapes
            self.B = sizes[0]
        else:  # whether it is what it must be, is checked later
            self.B = int(sizes[0]) if sizes.dim() == 1 and len(sizes) else 0

    def numbers(self, x: PackedSequence) -> Tensor:
        return x.data

    def cast(self, x: PackedSequence, dtype: torch.dtype) -> PackedSequence:
        return PackedSequence(x.data.to(dtype), self.batch_sizes, self.order, self.restore)

    def rows(self, x: PackedSequence) -> Tensor:
        return x.data

    def output(self, y: Tensor) -> PackedSequence:
        return PackedSequence(y, self.batch_sizes, self.order, self.restore)

    def final(self, state: Tensor) -> Tensor:
        return state if self.restore is None else state.index_select(1, self.restore)

    def times(self, value: Tensor) -> Tensor:
        return value.transpose(0, 1) if self.batch_first and value.dim() == 2 else value


class Padded(Dense):
    """A dense tensor with ``lengths`` (B,): padding behind each end.

    While a graph is traced the packed form keeps all T*B rows, the padding last, so that no shape
    depends on the lengths' values.
    """

    copies = True
    hides_batch = True

    def __init__(self, x: Tensor, batch_first: bool, lengths: Tensor) -> None:
        super().__init__(x, batch_first)
        self.lengths = lengths

    @property
    def is_ragged(self) -> bool:
        return True

    def pack(self) -> None:
        T, B, lengths = self.T, self.B, self.lengths
        traced = torch.compiler.is_compiling()
        lengths = lengths if traced else lengths.to(device="cpu")
        sorted_lengths, order = torch.sort(lengths, descending=True, stable=True)
        valid = torch.arange(T, device=lengths.device)[:, None] < sorted_lengths[None, :]
        self.batch_sizes = valid.sum(1).cpu()
        self.order = order
        self.restore = torch.argsort(order)
        rows = (torch.arange(T, device=lengths.device)[:, None] * B + order[None, :]).reshape(-1)
        self.exact = not traced
        if self.exact:
            self.places = rows[valid.reshape(-1)]
        else:
            self.places = rows[torch.argsort((~valid.reshape(-1)).to(torch.int8), stable=True)]

    def rows(self, x: Tensor) -> Tensor:
        flat = self.dense(x).reshape(self.T * self.B, *x.shape[2:])
        return flat.index_select(0, _on(x, self.places))

    def output(self, y: Tensor) -> Tensor:
        return self.undo(self.padded(y))

    def padded(self, y: Tensor) -> Tensor:
        """(T, B, ...) from packed rows, with zeros behind the ends."""
        shape = (self.T * self.B, *y.shape[1:])
        if self.exact:
            full, places = y.new_zeros(shape), _on(y, self.places)
            if torch._C._functorch.peek_interpreter_stack() is None:
                full = full.index_copy_(0, places, y)  # a copy of a large tensor less
            else:
                full = full.index_copy(0, places, y)
        else:
            full = y.index_select(0, _on(y, torch.argsort(self.places)))
        return full.reshape(self.T, self.B, *y.shape[1:])

    def state(self, state: Tensor) -> Tensor:
        return self.sorted(state, 1)

    def final(self, state: Tensor) -> Tensor:
        return state.index_select(1, _on(state, self.restore))


class Jagged(Geometry):
    """A NestedTensor (B, jagged, I), sequence behind sequence, whatever ``batch_first`` says.

    While a graph is traced nobody knows the longest sequence: there are as many steps as rows, of
    which those behind its end hold no sequence.
    """

    copies = True
    hides_batch = True

    def __init__(self, x: Any) -> None:
        rows, offsets = x.values().shape[0], x.offsets()
        traced = torch.compiler.is_compiling()
        self.offsets = offsets
        self.bounds = _bounds(x)
        offsets = offsets if traced else offsets.cpu()
        sorted_lengths, self.order = torch.sort(offsets.diff(), descending=True, stable=True)
        self.restore = torch.argsort(self.order)
        self.B = self.order.shape[0]
        longest = rows if traced or self.B == 0 else int(sorted_lengths[0])
        steps = torch.arange(max(longest, 1), device=offsets.device)
        ended = torch.searchsorted(sorted_lengths.flip(0), steps, right=True)
        self.batch_sizes = (self.B - ended).cpu()
        self.T = self.batch_sizes.shape[0]
        step, sequence = packed_positions(self.batch_sizes, rows, self.B)
        starts = offsets[:-1].index_select(0, self.order)
        on = _on(offsets, sequence)
        self.places = starts.index_select(0, on) + _on(offsets, step)

    def numbers(self, x: Any) -> Tensor:
        return x.values()

    def rows(self, x: Any) -> Tensor:
        values = x.values()
        return values.index_select(0, _on(values, self.places))

    def output(self, y: Tensor) -> Tensor:
        values = torch.empty_like(y).index_copy(0, _on(y, self.places), y)
        return _nested(values, self.offsets, self.bounds)

    def final(self, state: Tensor) -> Tensor:
        return state.index_select(1, _on(state, self.restore))


def geometry_of(
    x: Any, batch_first: bool, reset: Any = None, known: Sequence[Tensor | None] = ()
) -> Geometry:
    """Of a caller's sequences. reset, known: as :class:`Packed`'s."""
    if isinstance(x, PackedSequence):
        return Packed(x, batch_first, reset, known)
    return Jagged(x) if x.is_nested else Dense(x, batch_first)


def values_of(x: Any) -> Tensor:
    """Of a caller's sequences, as a plain tensor."""
    if isinstance(x, PackedSequence):
        return x.data
    return x.values() if x.is_nested else x


def beside(like: Any, *parts: Any) -> Any:
    """The features of the parts side by side, in sequences that lie as ``like``'s."""
    return with_values(like, torch.cat([values_of(part) for part in parts], -1))


def with_values(like: Any, values: Tensor) -> Any:
    """The inverse of :func:`values_of`: sequences that lie as ``like``'s."""
    if isinstance(like, PackedSequence):
        _, *lie = like
        return PackedSequence(values, *lie)  # of _replace Dynamo makes an empty one
    return _nested(values, like.offsets(), _bounds(like)) if like.is_nested else values


def reversed_in_time(x: Any, batch_first: bool, lengths: Tensor | None = None) -> Any:
    """Each of a caller's sequences with its last step first; the inverse of itself.

    lengths: (B,) of a padded input, whose padding stays where it is.
    """
    if isinstance(x, PackedSequence):
        rows = _reversed_rows(x.batch_sizes, x.data.shape[0])
        return with_values(x, x.data.index_select(0, _on(x.data, rows)))
    if x.is_nested:
        values, offsets = x.values(), x.offsets()
        row = torch.arange(values.shape[0], device=offsets.device)
        sequence = torch.searchsorted(offsets, row, right=True) - 1
        ends = offsets.index_select(0, sequence + 1) + offsets.index_select(0, sequence)
        return with_values(x, values.index_select(0, _on(values, ends - 1 - row)))
    first = batch_first and x.dim() == 3
    if lengths is None:
        return x.flip(1 if first else 0)
    T, B = (x.shape[1], x.shape[0]) if first else (x.shape[0], x.shape[1])
    step = torch.arange(T, device=x.device)[:, None]
    ends = lengths.to(x.device)[None, :]
    step = torch.where(step < ends, ends - 1 - step, step)
    sequence = torch.arange(B, device=x.device)
    rows = (sequence * T + step).t() if first else step * B + sequence
    return x.reshape(T * B, x.shape[2]).index_select(0, rows.reshape(-1)).reshape(x.shape)


def _reversed_rows(batch_sizes: Tensor, rows: int) -> Tensor:
    """Of each packed row the one that stands in its place when its sequence is reversed."""
    ends = batch_sizes.cumsum(0)
    starts = ends - batch_sizes
    row = torch.arange(rows, device=batch_sizes.device)
    step = torch.searchsorted(ends, row, right=True)
    sequence = row - starts.index_select(0, step)
    other = packed_lengths(batch_sizes, sequence) - 1 - step
    return starts.index_select(0, other) + sequence


def packed_lengths(batch_sizes: Tensor, sequence: Tensor) -> Tensor:
    """Of sequences in the order of the rows: how many steps have at least as many."""
    shorter = torch.searchsorted(batch_sizes.flip(0), sequence, right=True)
    return batch_sizes.shape[0] - shorter


def reversed_reset(
    reset: Tensor, x: Any, batch_first: bool, lengths: Tensor | None = None
) -> Tensor:
    """``reset`` of sequences x that were :func:`reversed_in_time`: the cut in front of a step is,
    seen from the other end, the one in front of the step before it."""
    if reset.dim() == 1:
        return reversed_reset(reset[:, None], x, False)[:, 0]
    if batch_first:
        return reversed_reset(reset.t(), x, False, lengths).t()
    T, B = reset.shape
    if isinstance(x, PackedSequence):
        lengths = packed_lengths(x.batch_sizes, torch.arange(B, device=x.batch_sizes.device))
        if x.unsorted_indices is not None:
            lengths = lengths.index_select(0, _on(lengths, x.unsorted_indices))
    step = torch.arange(T, device=reset.device)[:, None]
    ends: Any = T if lengths is None else lengths.to(reset.device)[None, :]
    before = (ends - step).clamp(0, T - 1).expand(T, B)
    return reset.gather(0, before) & (step > 0) & (step < ends)


def _bounds(x: Any) -> tuple[int | None, int | None]:
    """The shortest and longest of a NestedTensor where it knows them. Dynamo knows no source of
    these numbers."""
    if torch.compiler.is_compiling():
        return None, None
    return x._maybe_min_seqlen, x._maybe_max_seqlen


def _nested(values: Tensor, offsets: Tensor, bounds: tuple[int | None, int | None]) -> Tensor:
    """Without its bounds ``to_padded_tensor`` would pad it to as many steps as it has rows."""
    least, most = bounds
    return torch.nested.nested_tensor_from_jagged(
        values, offsets, min_seqlen=least, max_seqlen=most
    )


def _on(tensor: Tensor, index: Tensor) -> Tensor:
    return index.to(tensor.device)


def _settled(x: Tensor, batch_sizes: Tensor, known: Sequence[Tensor | None]) -> Any:
    """The batch of packed rows while a graph is traced: batch_sizes[0], which it does not know."""
    if batch_sizes.shape[0] == 0:  # len() would make it a constant of an export
        return 0
    shapes = [t.shape for t in known if isinstance(t, Tensor) and t.dim()]
    batch: Any = shapes[-1][min(len(shapes[-1]), 2) - 1] if shapes else batch_sizes[0].item()
    torch._assert_async(
        (batch_sizes.max() == batch) & (batch_sizes.sum() == x.shape[0]),
        "batch_sizes: expected the batch of the states as their greatest, and the rows of the "
        "packed input as their sum",
    )
    return batch


def packed_positions(batch_sizes: Tensor, rows: int, B: int) -> tuple[Tensor, Tensor]:
    """Step and sequence of each packed row, for sequences that are sorted already.

    Rows behind the last one get any that there are. No shape depends on a value.
    """
    ends = batch_sizes.cumsum(0)
    row = torch.arange(rows, device=batch_sizes.device)
    step = torch.searchsorted(ends, row, right=True).clamp(max=batch_sizes.shape[0] - 1)
    sequence = row - (ends - batch_sizes).index_select(0, step)
    return step, sequence.clamp(max=B - 1)


def packed_places(batch_sizes: Tensor, rows: int, B: int) -> Tensor:
    """Index into (T*B) of each packed row."""
    step, sequence = packed_positions(batch_sizes, rows, B)
    return step * B + sequence


def spread_reset(reset: Tensor, batch_sizes: Tensor | None, directions: int, rows: int) -> Tensor:
    """(D, rows) bool from (T, B): where the state that enters a row is zeroed.

    ``reset[t]`` says that step t begins a new sequence: forward in time the state before step t is
    zeroed, backward in time the one that leaves step t, that is, enters step t - 1.
    """
    T, B = reset.shape
    if batch_sizes is not None:  # nothing begins behind the end of a sequence
        alive = torch.arange(B, device=reset.device) < batch_sizes.to(reset.device)[:, None]
        reset = reset & alive
    ways = [reset]
    if directions == 2:
        last = torch.arange(T, device=reset.device) == T - 1
        ways.append(reset.roll(-1, 0) & ~last[:, None])
    if batch_sizes is None:
        return torch.stack([way.reshape(-1) for way in ways])
    places = packed_places(batch_sizes, rows, B).to(reset.device)
    return torch.stack([way.reshape(-1).index_select(0, places) for way in ways])
