"""What all recurrent layers share: calling, packing, states, dropout, and torch.nn's manners."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends.choice import Backend
from ..backends.contract import Memory, Weights
from ..cells import CELLS
from ..ops.autograd import RecurrenceFunction
from ..ops.checks import (
    autocasts,
    check_feature_size,
    check_lengths,
    check_reset,
    check_states,
    check_steps,
)
from ..ops.stack import Stack, run, settle_batch


def check_memory(memory: Memory) -> None:
    if memory not in ("full", "lean"):
        raise ValueError(f"memory: expected 'full' or 'lean', got {memory!r}")


def editable(outputs: Sequence[Tensor]) -> list[Tensor]:
    """Outputs that the caller may edit in place before backward, as torch.nn's GRU, RNN and cells.

    Backward reads the output of a kernel of ours, so the caller gets a copy: of a layer's y,
    1/(G+2) of the bytes that training moves through memory.
    """
    if torch.compiler.is_compiling():
        return list(outputs)
    return [
        o.clone() if getattr(o.grad_fn, "_forward_cls", None) is RecurrenceFunction else o
        for o in outputs
    ]


def described(hx: Any) -> str:
    """A state that is none, in words."""
    if isinstance(hx, Tensor):
        return f"a tensor of shape {tuple(hx.shape)}"
    return f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__


class quiet_tracing(warnings.catch_warnings):
    """Checks compare shapes, of which torch.jit.trace warns outside of torch's own files."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", torch.jit.TracerWarning)


class Recurrent(nn.Module):
    """A stack of recurrent layers around the operations.

    Subclasses say what their cell is and register parameters named as torch.nn's; everything
    about calling them is here. Options of fastseq's own, keyword-only in every layer:

    backend: None chooses; else a name of :func:`fastseq.backends`, or several in order.
    memory: 'full' keeps the gates for backward; 'lean' keeps each layer's output alone and
        computes the gates again.
    """

    backend: Backend = None
    memory: Memory = "full"

    input_size: int
    hidden_size: int
    num_layers: int
    bias: bool
    batch_first: bool
    dropout: float
    bidirectional: bool
    proj_size: int
    _all_weights: list[list[str]]
    _flat_weights_names: list[str]

    @property
    def cell(self) -> str:
        """The name of the cell in :mod:`fastseq.cells`."""
        raise NotImplementedError

    def _set_options(self, backend: Backend, memory: Memory) -> None:
        check_memory(memory)
        self.backend = backend
        self.memory = memory

    def extra_repr(self) -> str:
        s = super().extra_repr()
        if self.backend is not None:
            s += f", backend={self.backend!r}"
        if self.memory != "full":
            s += f", memory={self.memory!r}"
        return s

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles no custom kernels: it gets torch.nn's layer with our parameters."""
        from .convert import to_torch

        return to_torch(self)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """As torch.nn's list, but made anew from the attributes.

        A list that is kept goes stale when a weight is replaced, and holds derived weights, which
        cannot be copied.
        """
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, value: list[Tensor | None]) -> None:
        """torch.nn's methods set the list after they set the attributes."""

    def weights(self) -> list[Weights]:
        """The parameters as they are now, layers by directions.

        Read from the module's attributes at each call: parametrizations, weight drop and
        functional_call put other tensors in their place.
        """
        parameters = self._parameters
        found: list[Weights] = []
        for names in self._all_weights:
            tensors: list[Any] = []
            for name in names:
                w = parameters.get(name)
                tensors.append(getattr(self, name) if w is None else w)
            b_ih, b_hh = tensors[2:4] if self.bias else (None, None)
            w_hr = tensors[-1] if self.proj_size > 0 else None
            found.append(Weights(tensors[0], tensors[1], b_ih, b_hh, w_hr))
        if found[0].w_ih.is_cuda and not torch.compiler.is_compiling():
            self._update_flat_weights()  # type: ignore[operator]  # one chunk, for cuDNN
        return found

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        reset: Tensor | None = None,
        all_states: bool = False,
    ) -> Any:
        """Run the layers over a sequence.

        Args:
            input: (T, I), (T, B, I), (B, T, I) with ``batch_first``, or a PackedSequence.
            hx: the initial state, (num_layers * D, B, ...) a tensor (two for the LSTM, as a tuple
                or list), without B for unbatched input; zeros if None.
            lengths: (B,) integers or None. The input is then padded: outputs behind a sequence's
                end are zero, its final state is that of its last step, and a sequence of length 0
                keeps its initial state.
            reset: (T, B) bool or None, (B, T) with ``batch_first``. True where a step begins a new
                sequence: no state crosses from the step before, in either direction.
            all_states: also return, as a third value shaped like the output, the cell state of
                every step of the last layer (LSTM).

        Returns:
            ``output, h_n`` (LSTM: ``output, (h_n, c_n)``), as torch.nn.
        """
        if torch.jit.is_tracing():
            with quiet_tracing():
                return self._forward(input, hx, lengths, reset, all_states)
        return self._forward(input, hx, lengths, reset, all_states)

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        all_states: bool,
    ) -> Any:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, all_states)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"input: expected a Tensor or PackedSequence, got {type(input).__name__}"
            )
        rank = input.dim()
        if rank not in (2, 3):
            raise ValueError(
                f"{self._get_name()}: Expected input to be 2D or 3D, got {rank}D instead"
            )
        batched = rank == 3
        x = input if batched else input.unsqueeze(1)
        if batched and self.batch_first:
            x = x.transpose(0, 1)
            reset = self._time_major(reset)
        states = self._states(hx, batched)
        stack = self._stack(x, None, states, all_states)
        check_states(stack, batched)
        T, B = x.shape[0], x.shape[1]
        stack.lengths = check_lengths(lengths, T, B, False, batched)
        stack.reset = check_reset(reset, T, B, batched, x.device)
        y, finals, along = run(stack)
        if self.cell != "lstm":  # nn.LSTM's output cannot be edited; ours keeps its memory instead
            y, *finals = editable([y, *finals])

        if not batched:
            y = y.squeeze(1)
            finals = [s.squeeze(1) for s in finals]
            along = [c.squeeze(1) for c in along]
        elif self.batch_first:
            y = y.transpose(0, 1)
            along = [c.transpose(0, 1) for c in along]
        state = tuple(finals) if len(finals) > 1 else finals[0]
        return (y, state, along[0]) if all_states else (y, state)

    def _forward_packed(
        self,
        input: PackedSequence,
        hx: Any,
        lengths: Any,
        reset: Tensor | None,
        all_states: bool,
    ) -> Any:
        x, batch_sizes, sorted_indices, unsorted_indices = input
        if x.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {x.dim()}")
        states = self._states(hx, True)
        if sorted_indices is not None:
            states = [s.index_select(1, sorted_indices) for s in states]
        if self.batch_first:
            reset = self._time_major(reset)
        stack = self._stack(x, batch_sizes, states, all_states)
        if torch.compiler.is_compiling():
            settle_batch(stack, sorted_indices, reset)
        check_states(stack)
        T, B = batch_sizes.shape[0], stack.batch
        check_lengths(lengths, T, B, True, True)
        reset = check_reset(reset, T, B, True, x.device)
        if reset is not None and sorted_indices is not None:
            reset = reset.index_select(1, sorted_indices)
        stack.reset = reset
        y, finals, along = run(stack)
        if self.cell != "lstm":
            y, *finals = editable([y, *finals])
        if unsorted_indices is not None:
            finals = [s.index_select(1, unsorted_indices) for s in finals]
        output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
        state = tuple(finals) if len(finals) > 1 else finals[0]
        if all_states:
            cells = PackedSequence(along[0], batch_sizes, sorted_indices, unsorted_indices)
            return output, state, cells
        return output, state

    def _stack(
        self, x: Tensor, batch_sizes: Tensor | None, states: list[Tensor], all_states: bool
    ) -> Stack:
        """What the operations run, with the input checked against the parameters."""
        weights = self.weights()
        weight = weights[0].w_ih
        if x.dtype != weight.dtype and not autocasts(x):
            raise ValueError(
                f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
            )
        check_feature_size(x, self.input_size)
        if x.device != weight.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found input tensor at "
                f"{x.device} and parameter tensor at {weight.device}"
            )
        if all_states and len(CELLS[self.cell].states) == 1:
            raise ValueError(
                f"all_states: {self._get_name()} has no state but h, which the output holds"
            )
        stack = Stack(
            self.cell,
            x,
            states,
            weights,
            batch_sizes,
            directions=2 if self.bidirectional else 1,
            # a float that Dynamo reads makes it trace twice where dynamic=True
            dropout=self.dropout if self.num_layers > 1 else 0.0,
            training=self.training,
            trajectory=all_states,
            memory=self.memory,
            backend=self.backend,
        )
        check_steps(stack)
        return stack

    def _states(self, hx: Any, batched: bool) -> list[Tensor]:
        """The given states as a list of 3-D tensors; empty if none."""
        if hx is None:
            return []
        rank = 3 if batched else 2
        names = CELLS[self.cell].states
        if len(names) == 1:
            if not isinstance(hx, Tensor):
                raise AttributeError(
                    f"hx: {self._get_name()} takes one tensor h_0 as its state, got {described(hx)}"
                )
            if hx.dim() != rank:
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(
                    f"For {kind} input, hx should also be {rank}-D but got {hx.dim()}-D tensor"
                )
            states = [hx]
        else:
            if not isinstance(hx, (tuple, list)) or len(hx) != len(names):
                kind = "batched 3-D" if batched else "unbatched 2-D"
                raise RuntimeError(
                    f"For {kind} input, hx should be a pair (h_0, c_0) of {rank}-D tensors, "
                    f"got {described(hx)}"
                )
            states = list(hx)
            if any(s.dim() != rank for s in states):
                kind = "batched 3-D" if batched else "unbatched 2-D"
                ranks = ", ".join(f"{s.dim()}-D" for s in states)
                raise RuntimeError(
                    f"For {kind} input, hx and cx should also be {rank}-D but got ({ranks}) tensors"
                )
        return states if batched else [s.unsqueeze(1) for s in states]

    @staticmethod
    def _time_major(reset: Tensor | None) -> Tensor | None:
        if isinstance(reset, Tensor) and reset.dim() == 2:
            return reset.transpose(0, 1)
        return reset
