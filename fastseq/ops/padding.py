"""Between padded sequences with their lengths, jagged ones, and packed rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Padding:
    """The way from (T, B, ...) with lengths to packed rows, and back.

    Rows are sorted as in PackedSequence. While a graph is traced the packed form keeps all T*B
    rows, the padding last, so that no shape depends on the lengths' values.
    """

    def __init__(self, lengths: Tensor, T: int, B: int) -> None:
        self.T, self.B = T, B
        lengths = lengths.to(device="cpu") if not torch.compiler.is_compiling() else lengths
        sorted_lengths, order = torch.sort(lengths, descending=True, stable=True)
        valid = torch.arange(T, device=lengths.device)[:, None] < sorted_lengths[None, :]
        self.batch_sizes = valid.sum(1).cpu()
        self.order = order
        self.restore = torch.argsort(order)
        rows = (torch.arange(T, device=lengths.device)[:, None] * B + order[None, :]).reshape(-1)
        self.exact = not torch.compiler.is_compiling()
        if self.exact:
            self.rows = rows[valid.reshape(-1)]
        else:
            self.rows = rows[torch.argsort((~valid.reshape(-1)).to(torch.int8), stable=True)]

    def pack(self, x: Tensor) -> Tensor:
        return x.reshape(self.T * self.B, *x.shape[2:]).index_select(0, self._on(x, self.rows))

    def unpack(self, y: Tensor) -> Tensor:
        shape = (self.T * self.B, *y.shape[1:])
        if self.exact:
            padded, rows = y.new_zeros(shape), self._on(y, self.rows)
            if torch._C._functorch.peek_interpreter_stack() is None:
                padded = padded.index_copy_(0, rows, y)  # a copy of a large tensor less
            else:
                padded = padded.index_copy(0, rows, y)
        else:
            padded = y.index_select(0, self._on(y, torch.argsort(self.rows)))
        return padded.reshape(self.T, self.B, *y.shape[1:])

    def sort(self, state: Tensor) -> Tensor:
        return state.index_select(1, self._on(state, self.order))

    def unsort(self, state: Tensor) -> Tensor:
        return state.index_select(1, self._on(state, self.restore))

    @staticmethod
    def _on(tensor: Tensor, index: Tensor) -> Tensor:
        return index.to(tensor.device)


class Jagged(Padding):
    """The way from a jagged tensor's rows, sequence behind sequence, to packed rows, and back.

    While a graph is traced nobody knows the longest sequence: there are as many steps as rows, of
    which those behind its end hold no sequence.
    """

    def __init__(self, offsets: Tensor, rows: int) -> None:
        traced = torch.compiler.is_compiling()
        offsets = offsets if traced else offsets.cpu()
        sorted_lengths, self.order = torch.sort(offsets.diff(), descending=True, stable=True)
        self.restore = torch.argsort(self.order)
        self.B = self.order.shape[0]
        longest = rows if traced or self.B == 0 else int(sorted_lengths[0])
        steps = torch.arange(max(longest, 1), device=offsets.device)
        ended = torch.searchsorted(sorted_lengths.flip(0), steps, right=True)
        self.batch_sizes = (self.B - ended).cpu()
        step, sequence = packed_positions(self.batch_sizes, rows, self.B)
        starts = offsets[:-1].index_select(0, self.order)
        on = self._on(offsets, sequence)
        self.rows = starts.index_select(0, on) + self._on(offsets, step)

    def pack(self, x: Tensor) -> Tensor:
        return x.index_select(0, self._on(x, self.rows))

    def unpack(self, y: Tensor) -> Tensor:
        return torch.empty_like(y).index_copy(0, self._on(y, self.rows), y)


def packed_positions(batch_sizes: Tensor, rows: int, B: int) -> tuple[Tensor, Tensor]:
    """Step and sequence of each packed row, for sequences that are sorted already.

    Rows behind the last one get any that there are. No shape depends on a value.
    """
    ends = batch_sizes.cumsum(0)
    row = torch.arange(rows)
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
        ways.append(reset.roll(-1, 0).masked_fill(last[:, None], False))
    if batch_sizes is None:
        return torch.stack([way.reshape(-1) for way in ways])
    places = packed_places(batch_sizes, rows, B).to(reset.device)
    return torch.stack([way.reshape(-1).index_select(0, places) for way in ways])
