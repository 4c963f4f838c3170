"""What all recurrent layers share: calling, packing, states, dropout, and torch.nn's manners."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends.choice import Backend
from ..backends.contract import Memory, Weights
from ..cells import CELLS
from ..ops import masks
from ..ops.autograd import RecurrenceFunction
from ..ops.checks import (
    autocasts,
    check_feature_size,
    check_lengths,
    check_reset,
    check_row_ids,
    check_seed,
    check_states,
    check_steps,
)
from ..ops.padding import Jagged
from ..ops.stack import Stack, run, settle_batch, zero_states
from . import direct


def check_memory(memory: Memory) -> None:
    if memory not in ("full", "lean"):
        raise ValueError(f"memory: expected 'full' or 'lean', got {memory!r}")


def check_rate(name: str, value: float) -> None:
    """A probability, as torch.nn asks of its ``dropout``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Number) or not 0 <= value <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of an "
            f"element being zeroed, got {value!r}"
        )


def _rate(name: str) -> Any:
    """An option of the layers that may change between calls, checked as it is set."""

    def get(self: Recurrent) -> float:
        return getattr(self._rates or masks.Rates(), name)

    def put(self: Recurrent, value: float) -> None:
        check_rate(name, value)
        self._set_rates(**{name: float(value)})

    return property(get, put)


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
    deterministic: True takes the C++ kernels alone, and keeps the bits of the output, the states
        and the gradients of input and initial state independent of the batch around a sequence
        and of the number of threads. Two identical calls give the same bits without it, too.
    recurrent_dropout: in training, the probability with which a unit of :math:`h_{t-1}` is dropped
        where the recurrent weights multiply it, the same units at every step of a sequence
        (Gal and Ghahramani 2016). What is kept is scaled by 1/(1-p), here and in the next two.
    input_dropout: the same of each layer's input, one mask for both directions.
    weight_dropout: in training, the probability with which an element of the recurrent weights is
        dropped, in all sequences and steps of a call (DropConnect; Merity et al. 2018).
    zoneout: in training, the probability with which a unit's state stays as it was, anew at each
        step; in evaluation that part of it stays (Krueger et al. 2017). For the LSTM also a pair,
        of h and of c. It runs the eager form.

    These masks are a pure function of a seed, the layer, the direction, the sequence's row id, the
    unit (and for zoneout the step): the same on every backend, however the batch is ordered and
    split. ``dropout`` between the layers is torch's own.
    """

    backend: Backend = None
    memory: Memory = "full"
    deterministic: bool = False
    #: None where nothing is masked: torch.compile need not look at numbers that may change.
    _rates: masks.Rates | None = None
    recurrent_dropout = _rate("recurrent_dropout")
    input_dropout = _rate("input_dropout")
    weight_dropout = _rate("weight_dropout")

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

    def _set_options(
        self,
        backend: Backend,
        memory: Memory,
        deterministic: bool,
        recurrent_dropout: float,
        input_dropout: float,
        weight_dropout: float,
        zoneout: float | tuple[float, ...],
    ) -> None:
        check_memory(memory)
        self.backend = backend
        if not isinstance(deterministic, bool):
            raise TypeError(f"deterministic: expected a bool, got {type(deterministic).__name__}")
        self.memory = memory
        self.deterministic = deterministic
        self.recurrent_dropout = recurrent_dropout
        self.input_dropout = input_dropout
        self.weight_dropout = weight_dropout
        self.zoneout = zoneout

    @property
    def zoneout(self) -> float | tuple[float, ...]:
        rates = (self._rates or masks.Rates()).zoneout or (0.0,)
        return rates[0] if len(set(rates)) == 1 else rates

    @zoneout.setter
    def zoneout(self, value: float | tuple[float, ...]) -> None:
        states = CELLS[self.cell].states
        rates = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(states)
        if len(rates) != len(states):
            raise ValueError(
                f"zoneout: expected a number, or one for each of {', '.join(states)}, got {value!r}"
            )
        for rate in rates:
            check_rate("zoneout", rate)
        self._set_rates(zoneout=tuple(float(rate) for rate in rates) if any(rates) else ())

    def _set_rates(self, **changed: Any) -> None:
        rates = (self._rates or masks.Rates())._replace(**changed)
        self._rates = rates if any(rates) else None

    def extra_repr(self) -> str:
        s = super().extra_repr()
        if self.backend is not None:
            s += f", backend={self.backend!r}"
        if self.memory != "full":
            s += f", memory={self.memory!r}"
        if self.deterministic:
            s += ", deterministic=True"
        for name in masks.Rates._fields if self._rates else ():
            if value := getattr(self, name):
                s += f", {name}={value}"
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
        row_ids: Tensor | Sequence[int] | None = None,
        seed: Tensor | int | None = None,
    ) -> Any:
        """Run the layers over a sequence.

        Args:
            input: (T, I), (T, B, I), (B, T, I) with ``batch_first``, a PackedSequence, or a
                NestedTensor (B, jagged, I), whatever ``batch_first`` says.
            hx: the initial state, (num_layers * D, B, ...) a tensor (two for the LSTM, as a tuple
                or list), without B for unbatched input; zeros if None.
            lengths: (B,) integers or None. The input is then padded: outputs behind a sequence's
                end are zero, its final state is that of its last step, and a sequence of length 0
                keeps its initial state.
            reset: (T, B) bool or None, (B, T) with ``batch_first``. True where a step begins a new
                sequence: no state crosses from the step before, in either direction.
            all_states: also return, as a third value shaped like the output, the cell state of
                every step of the last layer (LSTM).
            row_ids: (B,) integers from 0 to 2^48 - 1 that name the sequences, of which the masks of
                ``recurrent_dropout``, ``input_dropout`` and ``zoneout`` depend; their places in the
                batch if None.
            seed: 64 bits, an int or a tensor, that these masks and ``weight_dropout``'s depend on.
                If None it is drawn from torch's default generator, once a call in training.

        Returns:
            ``output, h_n`` (LSTM: ``output, (h_n, c_n)``), as torch.nn. Of a NestedTensor the
            output is one with the same offsets, and a sequence of length 0 keeps its initial state.
        """
        if (
            not torch.compiler.is_compiling()
            and lengths is None
            and reset is None
            and not all_states
            and (out := direct.run(self, input, hx)) is not None
        ):
            return out
        if torch.jit.is_tracing():
            with quiet_tracing():
                return self._forward(input, hx, lengths, reset, all_states, row_ids, seed)
        return self._forward(input, hx, lengths, reset, all_states, row_ids, seed)

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: Any,
        lengths: Tensor | Sequence[int] | None,
        reset: Tensor | None,
        all_states: bool,
        row_ids: Any,
        seed: Any,
    ) -> Any:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, all_states, row_ids, seed)
        if not isinstance(input, Tensor):
            raise TypeError(
                f"input: expected a Tensor or PackedSequence, got {type(input).__name__}"
            )
        if input.is_nested:
            return self._forward_nested(input, hx, lengths, reset, all_states, row_ids, seed)
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
        self._mask(stack, B, row_ids, seed)
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
        row_ids: Any,
        seed: Any,
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
        self._mask(stack, B, row_ids, seed, sorted_indices)
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

    def _forward_nested(
        self,
        input: Any,
        hx: Any,
        lengths: Any,
        reset: Tensor | None,
        all_states: bool,
        row_ids: Any,
        seed: Any,
    ) -> Any:
        self._check_nested(input)
        for name, value in (("lengths", lengths), ("reset", reset)):
            if value is not None:
                raise ValueError(
                    f"{name}: not taken with a NestedTensor; pass the padded tensor, "
                    "torch.nested.to_padded_tensor(input, 0.0), and lengths"
                )
        values, offsets = input.values(), input.offsets()
        jagged = Jagged(offsets, values.shape[0])
        states = self._states(hx, True)
        stack = self._stack(values, jagged.batch_sizes, states, all_states)
        check_states(stack, batch=jagged.B)
        stack.x = jagged.pack(values)
        stack.states = [jagged.sort(s) for s in states or zero_states(stack, jagged.B)]
        self._mask(stack, jagged.B, row_ids, seed, jagged.order)
        y, finals, along = run(stack)
        finals = [jagged.unsort(s) for s in finals]

        def nested(rows: Tensor) -> Tensor:
            return torch.nested.nested_tensor_from_jagged(jagged.unpack(rows), offsets)

        state = tuple(finals) if len(finals) > 1 else finals[0]
        return (nested(y), state, nested(along[0])) if all_states else (nested(y), state)

    def _check_nested(self, input: Any) -> None:
        """Its rows are those of the sequences, one behind the other."""
        if input.layout is not torch.jagged:
            raise TypeError(
                f"input: expected a NestedTensor of layout torch.jagged, got {input.layout}; make "
                "it with torch.nested.as_nested_tensor(list(input.unbind()), layout=torch.jagged)"
            )
        if input.dim() != 3:
            raise ValueError(
                f"{self._get_name()}: Expected a NestedTensor input to be 3D, got {input.dim()}D "
                "instead"
            )
        if input._ragged_idx != 1:
            raise ValueError(
                "input: expected a NestedTensor (B, jagged, I), got the jagged dimension as number "
                f"{input._ragged_idx}; transpose it back"
            )
        if input.lengths() is not None:
            raise ValueError(
                "input: expected a NestedTensor without holes, as input.contiguous() makes it; or "
                "pass the padded tensor and lengths"
            )

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
            deterministic=self.deterministic,
            backend=self.backend,
        )
        check_steps(stack)
        return stack

    def _mask(
        self, stack: Stack, B: int, row_ids: Any, seed: Any, order: Tensor | None = None
    ) -> None:
        """Masks for a stack whose batch is the caller's in ``order``."""
        if row_ids is not None:
            row_ids = check_row_ids(row_ids, B)
        if seed is not None:
            check_seed(seed)
        rates = self._rates
        if rates is None or not (self.training or rates.zoneout):
            return
        device = stack.x.device
        ids = torch.arange(B, device=device) if row_ids is None else row_ids.to(device)
        if order is not None:
            ids = ids.index_select(0, order.to(device))
        masks.apply(stack, rates, seed, ids)

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
