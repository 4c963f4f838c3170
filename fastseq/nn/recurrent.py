"""What all recurrent layers share: calling, packing, states, dropout, and torch.nn's manners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends import DIFFERENTIABLE
from ..backends.contract import Backend, Request, Weights, ways
from ..backends.tracing import unrecorded
from ..cells import CELLS
from ..ops import masks
from ..ops.checks import (
    check_feature_size,
    check_lengths,
    check_reset,
    check_row_ids,
    check_seed,
    check_states,
    check_steps,
    check_weights,
)
from ..ops.geometry import Packed, Padded, geometry_of
from ..ops.modes import autocasts, foreign, overridden
from ..ops.run import run
from ..ops.stack import Stack
from . import counterparts, flat_weights, graph, learned, short
from .options import LayerOptions, of_today, options


def described(hx: Any) -> str:
    """What was given as a state, in words."""
    if isinstance(hx, Tensor):
        return f"a tensor of shape {tuple(hx.shape)}"
    return f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__


class Recurrent(learned.HasState, nn.Module):
    """A stack of recurrent layers around the operations.

    Subclasses say what their cell is and register parameters named as torch.nn's; everything
    about calling them is here. Options of fastseq's own are keyword-only in every layer, and are
    changed later as ``layer.fastseq.<name>``; every other attribute is the user's:

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
    init: a function of the layer, or several in order, that ``reset_parameters`` ends with, after
        torch.nn's initial values; :mod:`fastseq.init` has some.
    learn_state: True makes the initial state a parameter for each state of the cell, ``h_0`` and of
        an LSTM ``c_0``, (num_layers * D, 1, size) and zero at first, which a call without ``hx``
        begins with. The state behind a ``reset`` is zero with it, too.

    These masks are a pure function of a seed, the layer, the direction, the sequence's row id, the
    unit (and for zoneout the step): the same on every backend, however the batch is ordered and
    split. ``dropout`` between the layers is torch's own.
    """

    #: the name of the cell in :mod:`fastseq.cells`
    _fastseq_cell: str
    #: torch.nn's class of this name; None where there is none
    _fastseq_torch: type[nn.Module] | None
    #: torch.nn's LSTM does not let its output be edited in place before backward; the others do.
    _fastseq_editable = True
    #: what was put into ``_flat_weights``
    _fastseq_put: flat_weights.Put | None = None

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

    def _fastseq_options(self, **given: Any) -> LayerOptions:
        return LayerOptions(CELLS[self._fastseq_cell], **given)

    @property
    def _fastseq_states(self) -> tuple[str, ...]:
        return CELLS[self._fastseq_cell].states

    def _fastseq_size(self, k: int) -> int:
        return self.hidden_size if k else self.proj_size or self.hidden_size

    @property
    def _fastseq_beyond(self) -> str | None:
        """Why torch.nn computes nothing of the kind; None where it does."""
        return None

    def extra_repr(self) -> str:
        return ", ".join([super().extra_repr(), *options(self).given()])

    def flatten_parameters(self) -> None:
        """As torch.nn's: on CUDA the parameters become one chunk, where cuDNN has the cell."""
        if self._fastseq_beyond is None:
            super().flatten_parameters()  # type: ignore[misc]

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript compiles no custom kernels: it gets torch.nn's layer with our parameters."""
        return counterparts.to_torch(self)

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        """As torch.nn's list, and like it to be read, set, and set item by item.

        It is made anew from the attributes: a list that is kept goes stale when a weight is
        replaced, and holds derived weights, which cannot be copied.
        """
        return flat_weights.read(self)

    @_flat_weights.setter
    def _flat_weights(self, value: Sequence[Tensor | None]) -> None:
        flat_weights.put(self, value)

    def __getstate__(self) -> dict[str, Any]:
        return flat_weights.state(self, super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        state, put = flat_weights.split(state)
        super().__setstate__(of_today(self, state))
        if put is not None:
            self._flat_weights = put

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
                or list), without B for unbatched input; zeros if None, or what ``learn_state``
                learned.
            lengths: (B,) integers or None. The input is then padded: outputs behind a sequence's
                end are zero, its final state is that of its last step, and a sequence of length 0
                keeps its initial state.
            reset: (T, B) bool or None, (B, T) with ``batch_first``. True where a step begins a new
                sequence: no state crosses from the step before, in either direction.
            all_states: also return, as a third value shaped like the output, the cell state of
                every step of the last layer (LSTM), or a tuple of each state but h, where there
                are several.
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
            and row_ids is None
            and seed is None
            and (out := short.layers(self, input, hx, reset, all_states)) is not None
        ):
            return out
        weights, backend = None, options(self).backend
        given: dict[str, Any] = {
            "lengths": lengths,
            "reset": reset,
            "row_ids": row_ids,
            "seed": seed,
        }
        if not torch.compiler.is_compiling():
            node = graph.leaf(self, Recurrent.forward, input, hx, all_states=all_states, **given)
            if node is not None:
                return node
            weights = call_weights(self)
            if _is_torchs(self, input, hx, weights, all_states, given):
                if self._fastseq_beyond is None:
                    return self._fastseq_torch.forward(self, input, hx)  # type: ignore[union-attr]
                backend = DIFFERENTIABLE
        return call(self, input, hx, weights, backend, all_states=all_states, **given)


def call(
    module: Any,
    input: Any,
    hx: Any,
    weights: list[Any] | None,
    backend: Backend,
    lengths: Any = None,
    reset: Tensor | None = None,
    all_states: bool = False,
    row_ids: Any = None,
    seed: Any = None,
) -> Any:
    """What :meth:`Recurrent.forward` returns, with everything checked."""
    stack = call_stack(module, input, hx, lengths, reset, all_states, row_ids, seed, weights)
    if backend != stack.request.backend:
        stack.request = stack.request._replace(backend=backend)
    y, finals, along = run(stack)
    state = tuple(finals) if len(finals) > 1 else finals[0]
    if not all_states:
        return y, state
    return y, state, tuple(along) if len(along) > 1 else along[0]


def _is_torchs(
    module: Any, input: Any, hx: Any, weights: list[Any], all_states: bool, given: dict[str, Any]
) -> bool:
    """Whether a plain call is left to torch's own functions, as torch.nn's layer calls them: where
    a tensor of a subclass is to see them (``__torch_function__``), or where one is sparse."""
    data = input.data if isinstance(input, PackedSequence) else input
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    if not foreign((data, *states, *weights)) or all_states:
        return False
    own = options(module)
    if own.backend is not None or own.rates is not None or (own.learn_state and hx is None):
        return False
    nested = isinstance(data, Tensor) and data.is_nested
    return not nested and all(value is None for value in given.values())


def layer_weights(module: Any) -> list[Weights]:
    """The parameters as they are now, layers by directions."""
    return ways(call_request(module), call_weights(module))


def call_weights(module: Any) -> list[Any]:
    """The parameters as they are now, in one list.

    Read from the module's attributes, once a call: parametrizations, weight drop and
    functional_call put other tensors in their place, and a parametrization may draw random numbers
    or move on (spectral_norm) whenever it is read. What was put into ``_flat_weights`` stands
    before them.
    """
    if module._fastseq_put is not None and (put := flat_weights.valid(module)) is not None:
        flat_weights.check(module, put)
        return list(put)
    parameters, found = module._parameters, []
    for names in module._all_weights:
        for name in names:
            w = parameters.get(name)
            found.append(getattr(module, name) if w is None else w)
    flat_weights.check(module, found)
    if not torch.compiler.is_compiling() and not overridden(found) and found[0].is_cuda:
        module._update_flat_weights()  # one chunk, for cuDNN
    return found


def call_request(module: Any, all_states: bool = False) -> Request:
    """What a call asks for, besides tensors."""
    return Request(*short.asked(module, options(module), all_states))


def call_stack(
    module: Any,
    input: Any,
    hx: Any,
    lengths: Any = None,
    reset: Tensor | None = None,
    all_states: bool = False,
    row_ids: Any = None,
    seed: Any = None,
    weights: list[Any] | None = None,
) -> Stack:
    """What the operations run, with everything that a caller gives checked."""
    if not isinstance(all_states, bool):
        raise TypeError(f"all_states: expected a bool, got {type(all_states).__name__}")
    batched = check_input(module, input, lengths, reset)
    states = _states(module, hx, batched)
    geometry = geometry_of(input, module.batch_first, reset, states)
    if hx is None and options(module).learn_state:
        states = learned.states(module, geometry)
    if weights is None:
        weights = call_weights(module)
    stack = Stack(call_request(module, all_states), input, states, weights, geometry)
    _check_call_input(module, stack)
    check_states(stack)
    packed = isinstance(geometry, Packed)
    lengths = check_lengths(lengths, geometry.T, geometry.B, packed, batched)
    if lengths is not None:
        stack.geometry = Padded(input, module.batch_first, lengths)
    stack.reset = check_reset(reset, stack)
    _mask(module, stack, row_ids, seed)
    return stack


def check_input(module: Any, input: Any, lengths: Any, reset: Any) -> bool:
    """The input is one that a layer takes; whether it has a batch."""
    if isinstance(input, PackedSequence):
        if input.data.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.data.dim()}")
        return True
    if not isinstance(input, Tensor):
        raise TypeError(f"input: expected a Tensor or PackedSequence, got {type(input).__name__}")
    if input.is_nested:
        check_nested(module, input, lengths, reset)
        return True
    rank = input.dim()
    if rank not in (2, 3):
        raise ValueError(
            f"{module._get_name()}: Expected input to be 2D or 3D, got {rank}D instead"
        )
    return rank == 3


@unrecorded
def check_nested(module: Any, input: Any, lengths: Any, reset: Any) -> None:
    """Its rows are those of the sequences, one behind the other."""
    for name, value in (("lengths", lengths), ("reset", reset)):
        if value is not None:
            raise ValueError(
                f"{name}: not taken with a NestedTensor; pass the padded tensor, "
                "torch.nested.to_padded_tensor(input, 0.0), and lengths"
            )
    if input.layout is not torch.jagged:
        raise TypeError(
            f"input: expected a NestedTensor of layout torch.jagged, got {input.layout}; make "
            "it with torch.nested.as_nested_tensor(list(input.unbind()), layout=torch.jagged)"
        )
    if input.dim() != 3:
        raise ValueError(
            f"{module._get_name()}: Expected a NestedTensor input to be 3D, got {input.dim()}D "
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


@unrecorded
def _check_call_input(module: Any, stack: Stack) -> None:
    """The input fits the parameters."""
    x, weight = stack.data, stack.weights[0]
    if x.dtype != weight.dtype and not autocasts(x):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}). "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    check_feature_size(x, module.input_size)
    sizes = module.input_size, module.hidden_size, module.proj_size
    check_weights(stack, module._flat_weights_names, *sizes)
    if x.device != weight.device:
        raise RuntimeError(
            "Input and parameter tensors are not at the same device, found input tensor at "
            f"{x.device} and parameter tensor at {weight.device}"
        )
    if stack.request.trajectory and len(CELLS[module._fastseq_cell].states) == 1:
        raise ValueError(
            f"all_states: {module._get_name()} has no state but h, which the output holds"
        )
    check_steps(stack)


def _mask(module: Any, stack: Stack, row_ids: Any, seed: Any) -> None:
    """Give the stack its masks."""
    B = stack.geometry.B
    if row_ids is not None:
        row_ids = check_row_ids(row_ids, B)
    if seed is not None:
        check_seed(seed)
    rates = options(module).rates
    if rates is None or not (module.training or rates.zoneout):
        return
    device = stack.data.device
    ids = torch.arange(B, device=device) if row_ids is None else row_ids.to(device)
    masks.apply(stack, rates, seed, ids)


def _states(module: Any, hx: Any, batched: bool) -> list[Tensor]:
    """The given states as a list; empty if none."""
    if hx is None:
        return []
    rank = 3 if batched else 2
    names = CELLS[module._fastseq_cell].states
    if len(names) == 1:
        if not isinstance(hx, Tensor):
            raise AttributeError(
                f"hx: {module._get_name()} takes one tensor h_0 as its state, got {described(hx)}"
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
            wanted = "a pair" if len(names) == 2 else f"{len(names)} tensors"
            wanted += f" ({', '.join(f'{name}_0' for name in names)})"
            of = f"{rank}-D tensors" if len(names) == 2 else f"{rank}-D"
            raise RuntimeError(
                f"For {kind} input, hx should be {wanted} of {of}, got {described(hx)}"
            )
        states = list(hx)
        for name, state in zip(names, states, strict=True):
            if not isinstance(state, Tensor):
                raise AttributeError(
                    f"hx: expected a tensor {name}_0, got {type(state).__name__}; "
                    "torch.as_tensor makes one of an array"
                )
        if any(s.dim() != rank for s in states):
            kind = "batched 3-D" if batched else "unbatched 2-D"
            ranks = ", ".join(f"{s.dim()}-D" for s in states)
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {rank}-D but got ({ranks}) tensors"
            )
    return states
