"""One time step as a module, in place of torch.nn.RNNCell, LSTMCell and GRUCell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.choice import Backend
from ..backends.contract import Weights
from ..cells import CELLS
from ..ops.checks import check_feature_size
from ..ops.stack import Stack, run


class RecurrentCell(nn.Module):
    """What the cells share. ``backend`` is fastseq's own option, keyword-only."""

    backend: Backend = None
    input_size: int
    hidden_size: int
    bias: bool

    @property
    def cell(self) -> str:
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        from .convert import to_torch

        return to_torch(self)

    def extra_repr(self) -> str:
        s = super().extra_repr()
        return s if self.backend is None else f"{s}, backend={self.backend!r}"

    def _step(self, input: Tensor, hx: Sequence[Tensor] | None) -> list[Tensor]:
        """The states after one step; ``hx`` holds as many tensors as the cell has states."""
        name = self._get_name()
        states = CELLS[self.cell].states
        if input.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
        for k, state in enumerate(hx or ()):
            if state.dim() not in (1, 2):
                label = f"hx[{k}]" if len(states) > 1 else "hidden"
                raise ValueError(
                    f"{name}: Expected {label} to be 1D or 2D, got {state.dim()}D instead"
                )
        batched = input.dim() == 2
        x = input if batched else input.unsqueeze(0)
        given = [s if batched else s.unsqueeze(0) for s in hx or ()]
        B = x.shape[0]
        if x.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {x.shape[-1]}, expected {self.input_size}"
            )
        for k, state in enumerate(given):
            if tuple(state.shape) != (B, self.hidden_size):
                raise RuntimeError(
                    f"hidden{k} has inconsistent shape: expected (batch, hidden_size) = "
                    f"{(B, self.hidden_size)}, got {tuple(state.shape)}"
                )
        weight = self.weight_ih
        autocast = torch.is_autocast_enabled(x.device.type)
        for label, tensor in (("input", x), *((f"{n}_0", s) for n, s in zip(states, given))):
            if tensor.dtype != weight.dtype and not autocast:
                raise RuntimeError(
                    f"{label}: expected the weights' dtype {weight.dtype}, got {tensor.dtype}; "
                    f"convert it: {label}.to({weight.dtype})"
                )
        weights = Weights(weight, self.weight_hh, self.bias_ih, self.bias_hh, None)  # type: ignore
        stack = Stack(
            self.cell,
            x.unsqueeze(0),
            [s.unsqueeze(0) for s in given],
            [weights],
            training=self.training,
            backend=self.backend,
        )
        _, finals, _ = run(stack)
        finals = [s.squeeze(0) for s in finals]
        return finals if batched else [s.squeeze(0) for s in finals]


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

    cell = "lstm"  # type: ignore[assignment]

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h', c') of input (B, I) and a pair (h, c) of (B, H), or all without B."""
        if hx is not None and (isinstance(hx, Tensor) or len(hx) != 2):
            raise RuntimeError(f"hx: LSTMCell takes a pair (h, c), got {_described(hx)}")
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

    cell = "gru"  # type: ignore[assignment]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) of input (B, I) and h (B, H), or all without B; zeros if ``hx`` is None."""
        return self._step(input, _one_state(self, hx))[0]


def _described(hx: Any) -> str:
    return f"a tensor of shape {tuple(hx.shape)}" if isinstance(hx, Tensor) else f"{len(hx)} values"


def _one_state(module: RecurrentCell, hx: Tensor | None) -> list[Tensor] | None:
    if hx is None:
        return None
    if not isinstance(hx, Tensor):
        raise AttributeError(
            f"hx: {module._get_name()} takes one tensor as its state, got a {type(hx).__name__}"
        )
    return [hx]
