"""One time step as a module, in place of torch.nn.RNNCell, LSTMCell and GRUCell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.contract import ONE_STEP, Backend, Request
from ..backends.tracing import unrecorded
from ..cells import CELLS
from ..ops.geometry import OneStep
from ..ops.modes import autocasts
from ..ops.run import run
from ..ops.stack import Stack
from . import counterparts, short
from .recurrent import described


class RecurrentCell(nn.Module):
    """What the cells share. ``backend`` is fastseq's own option, keyword-only."""

    backend: Backend = None
    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor

    @property
    def cell(self) -> str:
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        return counterparts.to_torch(self)

    def extra_repr(self) -> str:
        s = super().extra_repr()
        return s if self.backend is None else f"{s}, backend={self.backend!r}"

    def _step(self, input: Tensor, hx: Sequence[Tensor] | None) -> list[Tensor]:
        """The states after one step; ``hx`` holds as many tensors as the cell has states."""
        if not torch.compiler.is_compiling():
            finals = short.step(self, input, hx)
            if finals is not None:
                return list(finals)
        return self._checked_step(input, hx or ())

    def _checked_step(self, input: Tensor, hx: Sequence[Tensor]) -> list[Tensor]:
        rank = input.dim()
        if rank not in (1, 2):
            raise ValueError(
                f"{self._get_name()}: Expected input to be 1D or 2D, got {rank}D instead"
            )
        for k, state in enumerate(hx):
            if state.dim() not in (1, 2):
                label = f"hx[{k}]" if len(hx) > 1 else "hidden"
                raise ValueError(
                    f"{self._get_name()}: Expected {label} to be 1D or 2D, "
                    f"got {state.dim()}D instead"
                )
        x, states = input, hx
        if rank == 1:
            x, states = input.unsqueeze(0), [s.unsqueeze(0) for s in hx]
        self._check_sizes(x, states)
        weight = self.weight_ih
        dtype, device = weight.dtype, weight.device
        for tensor in (x, *states):
            if tensor.dtype != dtype or tensor.device != device:
                self._check_kinds(x, states)
                break
        if not torch.compiler.is_compiling():
            finals = short.checked_step(self, x, states)
            if finals is not None:
                return list(finals) if rank == 2 else [s.squeeze(0) for s in finals]
        return run(self._call_stack(input, hx))[1]

    def _call_stack(self, input: Tensor, hx: Sequence[Tensor]) -> Stack:
        own: Any = self
        weights = [own.weight_ih, own.weight_hh]
        if self.bias:
            weights += [own.bias_ih, own.bias_hh]
        request = Request(
            self.cell,
            biased=self.bias,
            order=ONE_STEP,
            training=self.training,
            backend=self.backend,
        )
        return Stack(request, input, list(hx), weights, OneStep(input))

    @unrecorded
    def _check_sizes(self, x: Tensor, states: Sequence[Tensor]) -> None:
        B, size = x.shape
        if size != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {size} expected {self.input_size}"
            )
        for k, state in enumerate(states):
            if state.dim() != 2:
                raise RuntimeError(
                    f"hidden{k}: expected the rank of the input; for one sequence both are 1-D, "
                    f"for a batch both are 2-D"
                )
            if state.shape[0] != B:
                raise RuntimeError(
                    f"Input batch size {B} doesn't match hidden{k} batch size {state.shape[0]}"
                )
            if state.shape[1] != self.hidden_size:
                raise RuntimeError(
                    f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, "
                    f"expected {self.hidden_size}"
                )

    def _check_kinds(self, x: Tensor, states: Sequence[Tensor]) -> None:
        dtype, device = self.weight_ih.dtype, self.weight_ih.device
        labels = ("input", *(f"{name}_0" for name in CELLS[self.cell].states))
        for label, tensor in zip(labels, (x, *states), strict=False):
            if tensor.device != device:
                raise RuntimeError(
                    f"{label}: expected it on the weights' device {device}, got {tensor.device}"
                )
            if tensor.dtype != dtype and not autocasts(x):
                raise RuntimeError(
                    f"{label}: expected the weights' dtype {dtype}, got {tensor.dtype}; "
                    f"convert it: {label}.to({dtype})"
                )


class RNNCell(RecurrentCell, nn.RNNCellBase):
    r"""One step of Elman's network, :math:`h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`.

    Arguments, parameters, shapes and errors are torch.nn.RNNCell's; ``backend`` is fastseq's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device=None,
        dtype=None,
        *,
        backend: Backend = None,
    ) -> None:
        nn.RNNCellBase.__init__(
            self, input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype
        )
        self.nonlinearity = nonlinearity
        self.backend = backend

    torch_class = nn.RNNCell

    @property
    def cell(self) -> str:
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) of input (B, I) and h (B, H), or all without B; zeros if ``hx`` is None."""
        return self._step(input, _one_state(self, hx))[0]


class LSTMCell(RecurrentCell, nn.RNNCellBase):
    """One step of the long short-term memory; see :class:`fastseq.LSTM` for the equations.

    Arguments, parameters, shapes and errors are torch.nn.LSTMCell's; ``backend`` is fastseq's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: Backend = None,
    ) -> None:
        nn.RNNCellBase.__init__(
            self, input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype
        )
        self.backend = backend

    cell = "lstm"
    torch_class = nn.LSTMCell

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h', c') of input (B, I) and a pair (h, c) of (B, H), or all without B."""
        if hx is not None and (not isinstance(hx, (tuple, list)) or len(hx) != 2):
            raise RuntimeError(
                f"hx: {self._get_name()} takes a pair (h, c) as its state, got {described(hx)}"
            )
        h, c = self._step(input, hx)
        return h, c


class GRUCell(RecurrentCell, nn.RNNCellBase):
    """One step of the gated recurrent unit; see :class:`fastseq.GRU` for the equations.

    Arguments, parameters, shapes and errors are torch.nn.GRUCell's; ``backend`` is fastseq's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: Backend = None,
    ) -> None:
        nn.RNNCellBase.__init__(
            self, input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype
        )
        self.backend = backend

    cell = "gru"
    torch_class = nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) of input (B, I) and h (B, H), or all without B; zeros if ``hx`` is None."""
        return self._step(input, _one_state(self, hx))[0]


def _one_state(module: RecurrentCell, hx: Tensor | None) -> list[Tensor] | None:
    if hx is None:
        return None
    if not isinstance(hx, Tensor):
        raise AttributeError(
            f"hx: {module._get_name()} takes one tensor h as its state, got {described(hx)}"
        )
    return [hx]
