"""One time step as a module, in place of torch.nn.RNNCell, LSTMCell and GRUCell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import DIFFERENTIABLE
from ..backends.contract import ONE_STEP, Backend, Request
from ..backends.tracing import unrecorded
from ..cells import CELLS
from ..ops.checks import check_weights
from ..ops.geometry import OneStep
from ..ops.modes import autocasts, foreign
from ..ops.run import run
from ..ops.stack import Stack
from . import counterparts, graph, short
from .layers import RESETS_AFTER, check_reset_after, nonlinearities
from .options import CellOptions, HasOptions, Init, initialize, of_today, options
from .recurrent import described


class RecurrentCell(HasOptions, nn.Module):
    """What the cells share. ``backend`` and ``init`` are fastseq's own options, keyword-only, as
    :class:`fastseq.nn.CellOptions` says."""

    #: the name of the cell in :mod:`fastseq.cells`
    _fastseq_cell: str
    #: torch.nn's class of this name; None where there is none
    _fastseq_torch: type[nn.Module] | None
    #: the names of the weights, with biases or without, in the order in which a call takes them
    _fastseq_weights: Mapping[bool, tuple[str, ...]] = {
        False: ("weight_ih", "weight_hh"),
        True: ("weight_ih", "weight_hh", "bias_ih", "bias_hh"),
    }

    input_size: int
    hidden_size: int
    bias: bool
    weight_ih: Tensor

    def _fastseq_options(self, **given: Any) -> CellOptions:
        return CellOptions(**given)

    def reset_parameters(self) -> None:
        """torch.nn's initial values, and what the option ``init`` says."""
        self._fastseq_draw()
        initialize(self)

    @property
    def _fastseq_beyond(self) -> str | None:
        """Why torch.nn computes nothing of the kind; None where it does."""
        return None

    def __prepare_scriptable__(self) -> nn.Module:
        return counterparts.to_torch(self)

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *options(self).given()])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(of_today(self, state))


def step(cell: Any, forward: Any, input: Any, hx: Any) -> Any:
    """What ``forward``, a cell's own, returns: the states after one step, h or (h, c)."""
    pair = len(CELLS[cell._fastseq_cell].states) > 1
    if not torch.compiler.is_compiling():
        if hx is None:
            states: tuple[Any, ...] = ()
        else:
            states = tuple(hx) if pair and isinstance(hx, (tuple, list)) else (hx,)
        if hx is None or len(states) == 1 + pair:
            finals = short.step(cell, input, states)
            if finals is not None:
                return finals if pair else finals[0]
        node = graph.leaf(cell, forward, input, hx)
        if node is not None:
            return node
    return _checked(cell, input, hx)


def _checked(cell: Any, input: Any, hx: Any) -> Any:
    states = _given_states(cell, hx)
    if not isinstance(input, Tensor):
        raise AttributeError(f"input: expected a Tensor, got {type(input).__name__}")
    pair = len(CELLS[cell._fastseq_cell].states) > 1
    weights = cell_weights(cell)
    backend = options(cell).backend
    if not torch.compiler.is_compiling():
        if backend is None and foreign((input, *states, *weights)):
            if cell._fastseq_beyond is None:
                return cell._fastseq_torch.forward(cell, input, hx)
            backend = DIFFERENTIABLE
    finals = checked_step(cell, input, states, weights, backend)
    return tuple(finals) if pair else finals[0]


def checked_step(
    cell: Any, input: Tensor, hx: Sequence[Tensor], weights: list[Tensor], backend: Backend
) -> Sequence[Tensor]:
    """The states after one step; ``hx`` holds as many tensors as the cell has states, or none."""
    rank = input.dim()
    if rank not in (1, 2):
        raise ValueError(f"{cell._get_name()}: Expected input to be 1D or 2D, got {rank}D instead")
    for k, state in enumerate(hx):
        if state.dim() not in (1, 2):
            label = f"hx[{k}]" if len(hx) > 1 else "hidden"
            raise ValueError(
                f"{cell._get_name()}: Expected {label} to be 1D or 2D, got {state.dim()}D instead"
            )
    x, states = input, hx
    if rank == 1:
        x, states = input.unsqueeze(0), [s.unsqueeze(0) for s in hx]
    _check_sizes(cell, x, states)
    weight = weights[0]
    dtype, device = weight.dtype, weight.device
    for tensor in (x, *states):
        if tensor.dtype != dtype or tensor.device != device:
            _check_kinds(cell, x, states, weight)
            break
    if not torch.compiler.is_compiling():
        finals = short.checked_step(cell, x, states)
        if finals is not None:
            return finals if rank == 2 else [s.squeeze(0) for s in finals]
    return run(cell_stack(cell, input, hx, weights, backend))[1]


def cell_stack(
    cell: Any, input: Tensor, hx: Sequence[Tensor], weights: list[Tensor], backend: Backend
) -> Stack:
    """What the operations run."""
    request = Request(
        cell._fastseq_cell,
        biased=cell.bias,
        order=ONE_STEP,
        training=cell.training,
        backend=backend,
    )
    stack = Stack(request, input, list(hx), weights, OneStep(input))
    names = cell._fastseq_weights[bool(cell.bias)]
    check_weights(stack, names, cell.input_size, cell.hidden_size)
    return stack


def cell_weights(cell: Any) -> list[Tensor]:
    """The parameters as they are now."""
    return [getattr(cell, name) for name in cell._fastseq_weights[bool(cell.bias)]]


def _given_states(cell: Any, hx: Any) -> list[Tensor]:
    """The given state as a list; empty if none."""
    if hx is None:
        return []
    names = CELLS[cell._fastseq_cell].states
    if len(names) == 1:
        if not isinstance(hx, Tensor):
            raise AttributeError(
                f"hx: {cell._get_name()} takes one tensor h as its state, got {described(hx)}"
            )
        return [hx]
    if not isinstance(hx, (tuple, list)) or len(hx) != len(names):
        raise RuntimeError(
            f"hx: {cell._get_name()} takes a pair (h, c) as its state, got {described(hx)}"
        )
    for name, state in zip(names, hx, strict=True):
        if not isinstance(state, Tensor):
            raise AttributeError(
                f"hx: expected a tensor {name}, got {type(state).__name__}; "
                "torch.as_tensor makes one of an array"
            )
    return list(hx)


@unrecorded
def _check_sizes(cell: Any, x: Tensor, states: Sequence[Tensor]) -> None:
    B, size = x.shape
    if size != cell.input_size:
        raise RuntimeError(
            f"input has inconsistent input_size: got {size} expected {cell.input_size}"
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
        if state.shape[1] != cell.hidden_size:
            raise RuntimeError(
                f"hidden{k} has inconsistent hidden_size: got {state.shape[1]}, "
                f"expected {cell.hidden_size}"
            )


def _check_kinds(cell: Any, x: Tensor, states: Sequence[Tensor], weight: Tensor) -> None:
    dtype, device = weight.dtype, weight.device
    labels = ("input", *(f"{name}_0" for name in CELLS[cell._fastseq_cell].states))
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

    ``nonlinearity`` is 'tanh', 'relu' or, which torch.nn lacks, 'sigmoid'. Arguments, parameters,
    shapes and errors are torch.nn.RNNCell's; ``backend`` and ``init`` are fastseq's.
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
        init: Init = (),
    ) -> None:
        nn.RNNCellBase.__init__(
            self, input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype
        )
        self.nonlinearity = nonlinearity
        self._fastseq_begin(backend=backend, init=init)

    _fastseq_torch = nn.RNNCell

    @property
    def _fastseq_cell(self) -> str:  # type: ignore[override]
        if self.nonlinearity not in nonlinearities(self):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return f"rnn_{self.nonlinearity}"

    @property
    def _fastseq_beyond(self) -> str | None:
        if self.nonlinearity != "sigmoid":
            return None
        return "torch.nn.RNNCell has no nonlinearity 'sigmoid'"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) of input (B, I) and h (B, H), or all without B; zeros if ``hx`` is None."""
        return step(self, RNNCell.forward, input, hx)


class LSTMCell(RecurrentCell, nn.RNNCellBase):
    """One step of the long short-term memory; see :class:`fastseq.LSTM` for the equations.

    Arguments, parameters, shapes and errors are torch.nn.LSTMCell's; ``backend`` and
    ``init`` are fastseq's.
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
        init: Init = (),
    ) -> None:
        nn.RNNCellBase.__init__(
            self, input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype
        )
        self._fastseq_begin(backend=backend, init=init)

    _fastseq_cell = "lstm"
    _fastseq_torch = nn.LSTMCell

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h', c') of input (B, I) and a pair (h, c) of (B, H), or all without B."""
        return step(self, LSTMCell.forward, input, hx)


class GRUCell(RecurrentCell, nn.RNNCellBase):
    """One step of the gated recurrent unit; see :class:`fastseq.GRU` for the equations, with the
    reset gate after the product or, with ``reset_after=False``, before it.

    Arguments, parameters, shapes and errors are torch.nn.GRUCell's; ``backend`` and
    ``init`` are fastseq's.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        reset_after: bool = True,
        backend: Backend = None,
        init: Init = (),
    ) -> None:
        check_reset_after(self, reset_after)
        nn.RNNCellBase.__init__(
            self, input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype
        )
        self._fastseq_reset_after = reset_after
        self._fastseq_begin(backend=backend, init=init)

    _fastseq_reset_after = True  # of a pickle without it
    _fastseq_torch = nn.GRUCell

    @property
    def _fastseq_cell(self) -> str:  # type: ignore[override]
        return "gru" if self._fastseq_reset_after else "gru_reset_before"

    @property
    def _fastseq_beyond(self) -> str | None:
        return None if self._fastseq_reset_after else RESETS_AFTER

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self._fastseq_reset_after else ", reset_after=False")

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h' (B, H) of input (B, I) and h (B, H), or all without B; zeros if ``hx`` is None."""
        return step(self, GRUCell.forward, input, hx)
