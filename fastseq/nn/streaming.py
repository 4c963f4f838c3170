"""Step by step, with the state, the output and packed weights at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backends import choice
from ..cells import CELLS
from .options import options
from .recurrent import Recurrent, call_request, call_weights


class Streaming:
    """A module run one step at a time, for inference: made by :func:`streaming`."""

    def __init__(self, module: Recurrent, batch: int) -> None:
        if not isinstance(module, Recurrent):
            raise TypeError(f"module: expected a layer of fastseq, got {type(module).__name__}")
        if module.bidirectional:
            raise ValueError(
                "module: a bidirectional layer needs the whole sequence, so it cannot be streamed"
            )
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: expected an int of at least 1, got {batch!r}")
        self.module = module
        self.batch = batch
        weight = call_weights(module)[0]
        self._names = CELLS[module._fastseq_cell].states
        size = module.proj_size or module.hidden_size
        layers = module.num_layers
        self._h = weight.new_zeros((2, layers, batch, size), requires_grad=False)
        self._c = None
        if len(self._names) > 1:
            self._c = weight.new_zeros((layers, batch, module.hidden_size))
        self._outputs = (self._h[0, -1], self._h[1, -1])
        self._turn = 0
        self._steps = self._backend(weight)
        self.refresh()

    def _backend(self, weight: Tensor) -> Any:
        """The backend that runs single steps on packed weights of this module; else None."""
        if options(self.module).zoneout:  # its kernels hand the state on by themselves
            return None
        kind = self.module._fastseq_cell, weight.dtype, weight.device.type
        return choice.streams(*kind, self.batch, options(self.module).backend)

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the module's weights again, after they were changed. The state stays."""
        self._handle = None
        if self._steps is not None:
            if self._turn:  # a new handle begins with the first buffer
                self._h[0] = self._h[1]
                self._turn = 0
            self._handle = self._steps.stream(
                call_request(self.module),
                [w.detach().resolve_neg().contiguous() for w in call_weights(self.module)],
                self._h,
                () if self._c is None else (self._c,),
                self._outputs,
            )

    def step(self, x: Tensor) -> Tensor:
        """One step of all layers.

        Args:
            x: (batch, input_size).

        Returns:
            y, (batch, hidden_size or proj_size), without a gradient. It is the handle's own buffer:
            the step after the next one writes over it.

        Raises:
            ValueError: another shape, dtype or device.
        """
        if self._handle is not None and not (type(x) is Tensor and x.is_neg()):
            y = self._steps.stream_step(self._handle, x, torch.get_num_threads())
            if y is not None:
                self._turn ^= 1
                return y
        return self._checked_step(x)

    @torch.no_grad()
    def _checked_step(self, x: Tensor) -> Tensor:
        shape = (self.batch, self.module.input_size)
        if not isinstance(x, Tensor) or tuple(x.shape) != shape:
            got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected (batch, input_size) = {shape}, got {got}")
        if x.dtype != self._h.dtype or x.device != self._h.device:
            raise ValueError(
                f"x: expected {self._h.dtype} on {self._h.device}, got {x.dtype} on {x.device}"
            )
        if self._handle is not None:
            x = x.resolve_neg().contiguous()
            y = self._steps.stream_step(self._handle, x, torch.get_num_threads())
            self._turn ^= 1
            return y
        h = self._h[self._turn]
        state = h if self._c is None else (h, self._c)
        training = self.module.training
        self.module.eval()
        try:
            sequence = x.unsqueeze(1 if self.module.batch_first else 0)
            _, new = self.module(sequence, state)
        finally:
            self.module.train(training)
        self._turn ^= 1
        self._h[self._turn] = new if self._c is None else new[0]
        if self._c is not None:
            self._c.copy_(new[1])
        return self._outputs[self._turn]

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        """A copy of the state as the module takes and returns it: h, or (h, c) of an LSTM."""
        h = self._h[self._turn].clone()
        return h if self._c is None else (h, self._c.clone())

    @state.setter
    def state(self, value: Tensor | tuple[Tensor, Tensor]) -> None:
        with torch.no_grad():
            if self._c is None:
                self._h[self._turn].copy_(value)
            else:
                h, c = value
                self._h[self._turn].copy_(h)
                self._c.copy_(c)

    def reset(self, rows: Tensor | list[int] | None = None) -> None:
        """Zero the state of ``rows``, indices or a boolean mask, or of all: new sequences begin."""
        where: Any = slice(None) if rows is None else torch.as_tensor(rows)
        if rows is not None and not where.numel():
            return
        with torch.no_grad():
            self._h[:, :, where] = 0
            if self._c is not None:
                self._c[:, where] = 0


def streaming(module: Recurrent, batch: int = 1) -> Streaming:
    """A handle that runs ``module`` step by step and keeps its state, for inference.

    It owns the state, two output buffers that take turns, and a packed copy of the weights, which
    makes a step of one layer cost microseconds. The copy is made now, and again by
    ``handle.refresh()``: call it after changing the weights.

    Args:
        module: a layer of fastseq that is not bidirectional. Dropout between layers is off.
        batch: how many sequences run side by side.

    Returns:
        A handle with ``step(x)``, ``reset(rows)``, ``refresh()`` and ``state``.

    Numerics: as the module's own step, up to rounding: the packed product sums in another order.

    Memory: the weights once more.

    Example::

        handle = fastseq.streaming(layer, batch=8)
        for x in frames:            # (8, input_size)
            y = handle.step(x)      # (8, hidden_size)
            handle.reset(ended)     # rows whose sequence has ended
    """
    return Streaming(module, batch)
