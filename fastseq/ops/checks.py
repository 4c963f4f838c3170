"""Every mistake a caller can make raises here, before anything is computed.

Where torch.nn raises for the same mistake, the class and the leading words are torch.nn's.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.contract import ways
from ..backends.tracing import numbers, unrecorded
from ..cells import Cell
from .modes import autocasts, in_transform
from .stack import Stack


@unrecorded
def check_layer(stack: Stack) -> None:
    """Input and weights of one layer fit together."""
    request, x = stack.request, stack.data
    cell = request.definition
    if request.memory not in ("full", "lean"):
        raise ValueError(f"memory: expected 'full' or 'lean', got {request.memory!r}")
    if not isinstance(request.trajectory, bool):
        raise TypeError(f"all_states: expected a bool, got {type(request.trajectory).__name__}")
    if not isinstance(request.deterministic, bool):
        raise TypeError(
            f"deterministic: expected a bool, got {type(request.deterministic).__name__}"
        )
    G = cell.G
    first = None
    for way in ways(request, stack.weights):
        w_ih, w_hr = way.w_ih, way.w_hr
        if w_ih.dim() != 2 or w_ih.shape[0] % G:
            raise ValueError(f"w_ih: expected ({G}*H, input_size), got {tuple(w_ih.shape)}")
        rows, width = w_ih.shape
        H = P = rows // G
        if w_hr is not None:
            if w_hr.dim() != 2 or w_hr.shape[1] != H:
                raise ValueError(f"w_hr: expected (proj_size, {H}), got {tuple(w_hr.shape)}")
            P = w_hr.shape[0]
        shapes = weight_shapes(cell, request.biased, width, H, P if request.projected else 0)
        for (name, shape), w in zip(shapes.items(), way.given(), strict=True):
            check_shape(name, w, shape)
            check_kind(x, w, name)
        if (H, P) != (first or (H, P)):
            raise ValueError("weights: both directions must have the same sizes")
        first = H, P
        check_feature_size(x, width)
    check_steps(stack)


def weight_shapes(
    cell: Cell, biased: bool, input_size: int, hidden_size: int, proj_size: int = 0
) -> dict[str, tuple[int, ...]]:
    """What the weights of one recurrence are called and their shapes, in their order: those of a
    :class:`.contract.Weights` that there are, and ``w_v`` for a unit parameter v of the cell."""
    rows, recurrent = cell.G * hidden_size, cell.G_hh * hidden_size
    shapes: dict[str, tuple[int, ...]] = {"w_ih": (rows, input_size)}
    if recurrent:
        shapes["w_hh"] = recurrent, proj_size or hidden_size
    if biased:
        shapes["b_ih"] = (rows,)
        if recurrent:
            shapes["b_hh"] = (recurrent,)
    if proj_size:
        shapes["w_hr"] = proj_size, hidden_size
    return shapes | {f"w_{name}": (hidden_size,) for name in cell.unit_parameters}


@unrecorded
def check_weights(
    stack: Stack, names: Sequence[str], input_size: int, hidden_size: int, proj_size: int = 0
) -> None:
    """A module's parameters have its sizes: kernels read them by these, and a user may put others.

    names: of the weights, in their order.
    """
    request, cell = stack.request, stack.cell
    D, P = request.directions, proj_size or hidden_size
    expected: list[tuple[int, ...]] = []
    for width, layers in ((input_size, 1), (D * P, request.layers - 1)):
        shapes = weight_shapes(cell, request.biased, width, hidden_size, proj_size)
        expected += [*shapes.values()] * (D * layers)
    found = [w.shape for w in stack.weights]
    if found != expected:
        k = next(k for k, shape in enumerate(expected) if found[k] != shape)
        raise RuntimeError(f"{names[k]}: expected {expected[k]}, got {tuple(found[k])}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tensor.shape != expected:
        raise ValueError(f"{name}: expected {expected}, got {tuple(tensor.shape)}")


def check_kind(x: Tensor, weight: Tensor, name: str) -> None:
    """It has the input's dtype and device."""
    if x.dtype != weight.dtype and not autocasts(x):
        raise ValueError(
            f"RNN input dtype ({x.dtype}) does not match weight dtype ({weight.dtype}) of {name}. "
            f"Convert input: input.to({weight.dtype}), or convert model: model.to({x.dtype})"
        )
    if x.device != weight.device:
        raise RuntimeError(
            f"Input and parameter tensors are not at the same device, found input tensor at "
            f"{x.device} and {name} at {weight.device}"
        )


@unrecorded
def check_feature_size(x: Tensor, input_size: int) -> None:
    if x.shape[-1] != input_size:
        raise RuntimeError(
            f"input.size(-1) must be equal to input_size. Expected {input_size}, got {x.shape[-1]}"
        )


@unrecorded
def check_steps(stack: Stack) -> None:
    """There is a step, and packed rows are what ``batch_sizes`` says: kernels trust it."""
    sizes, x = stack.geometry.batch_sizes, stack.data
    if sizes is None:
        if stack.geometry.T == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        return
    if torch.compiler.is_compiling():
        return
    if sizes.device.type != "cpu" or sizes.dtype is not torch.int64 or sizes.dim() != 1:
        raise RuntimeError(
            "batch_sizes: expected a 1-D int64 tensor on the CPU, as pack_padded_sequence makes "
            f"it, got {sizes.dim()}-D {sizes.dtype} on {sizes.device}"
        )
    values = sizes.numpy()
    if len(values) and ((values[1:] > values[:-1]).any() or values[-1] < 0):
        raise RuntimeError(
            f"batch_sizes: expected sizes that do not increase, got {sizes.tolist()}"
        )
    if values.sum() != x.shape[0]:
        raise RuntimeError(
            f"batch_sizes: expected a sum of {x.shape[0]}, the rows of the packed input, got "
            f"{values.sum()}"
        )


@unrecorded
def check_states(stack: Stack) -> None:
    """Given states have the right number, rank, size, dtype and device."""
    request, x = stack.request, stack.data
    names = request.definition.states
    if not stack.states:
        return
    if len(stack.states) != len(names):
        raise ValueError(
            f"hx: expected {len(names)} states ({', '.join(names)}), got {len(stack.states)}"
        )
    batched, (B,) = stack.geometry.batched, numbers(stack.geometry.B)
    for k, state in enumerate(stack.states):
        size = stack.H if k else stack.P
        layers = request.layers * request.directions
        expected = (layers, B, size) if batched else (layers, size)
        label = f"hidden[{k}] size" if len(names) > 1 else "hidden size"
        if state.shape != expected:
            raise RuntimeError(
                f"Expected {label} {expected}, got {list(state.shape)}; it is "
                f"(num_layers * num_directions, {'batch, ' if batched else ''}"
                f"{'proj_size or hidden_size' if k == 0 else 'hidden_size'})"
            )
        if state.device != x.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{x.device} and hidden tensor at {state.device}"
            )
        if state.dtype != x.dtype and not autocasts(x):
            raise RuntimeError(
                f"Expected hidden state of dtype {x.dtype}, the input's, got {state.dtype}; "
                f"convert it: {names[k]}_0.to({x.dtype})"
            )


def check_lengths(
    lengths: Tensor | Sequence[int] | None, T: int, B: int, packed: bool, batched: bool
) -> Tensor | None:
    """As an int64 tensor (B,) with values from 0 to T."""
    if lengths is None:
        return None
    if packed:
        raise ValueError("lengths: a PackedSequence has its own lengths; pass the padded tensor")
    if not batched:
        raise ValueError("lengths: expected a batched 3-D input, got an unbatched 2-D one")
    if isinstance(lengths, Tensor) and torch._C._functorch.is_batchedtensor(lengths):
        raise NotImplementedError("lengths: all members of a vmap have the same; got some for each")
    lengths = check_integers("lengths", lengths, B)
    _check_ends(lengths, T, B)
    return lengths


@unrecorded
def _check_ends(lengths: Tensor, T: int, B: int) -> None:
    T, B = numbers(T, B)
    if torch.compiler.is_compiling():
        within = ((lengths >= 0) & (lengths <= T)).all()
        torch._assert_async(within, "lengths: expected values from 0 to T")
    elif B:
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > T:
            raise ValueError(f"lengths: expected values from 0 to T = {T}, got {low} to {high}")


def check_integers(name: str, values: Any, B: int) -> Tensor:
    """One for each sequence, as an int64 tensor (B,)."""
    if not isinstance(values, Tensor):
        listed = isinstance(values, Sequence) and not isinstance(values, (str, bytes))
        if not listed and not hasattr(values, "__array__"):
            raise TypeError(
                f"{name}: expected a tensor or a sequence of integers, got {type(values).__name__}"
            )
        try:
            values = torch.as_tensor(
                values, dtype=None if len(values) else torch.int64, device="cpu"
            )
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected integers, got {values!r}") from error
    if not is_integral(values):
        raise TypeError(f"{name}: expected integers, got {values.dtype}")
    _check_count(name, values, B)
    return values.to(torch.int64)


@unrecorded
def _check_count(name: str, values: Tensor, B: int) -> None:
    (B,) = numbers(B)
    if tuple(values.shape) != (B,):
        raise ValueError(f"{name}: expected one a sequence, ({B},), got {tuple(values.shape)}")


def positive(name: str, value: Any, least: int = 1) -> int:
    """A count of at least 1, or another least, of Python's integers or NumPy's."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if found < least:
        raise ValueError(f"{name}: expected at least {least}, got {found}")
    return found


def check_reset(reset: Tensor | None, stack: Stack) -> Tensor | None:
    """As a bool tensor (T, B)."""
    if reset is None:
        return None
    if not isinstance(reset, Tensor):
        raise TypeError(f"reset: expected a bool tensor, got {type(reset).__name__}")
    if reset.dtype is not torch.bool:
        raise TypeError(f"reset: expected torch.bool, got {reset.dtype}; use reset.bool()")
    reset = stack.geometry.times(reset)
    _check_reset(reset, stack)
    return reset


@unrecorded
def _check_reset(reset: Tensor, stack: Stack) -> None:
    T, B = numbers(stack.geometry.T, stack.geometry.B)
    if tuple(reset.shape) != (T, B):
        raise ValueError(f"reset: expected (T, B) = ({T}, {B}), got {tuple(reset.shape)}")
    device = stack.data.device
    if reset.device != device:
        raise RuntimeError(f"reset: expected it on the input's device {device}, got {reset.device}")


def is_integral(tensor: Tensor) -> bool:
    """Whether it holds integers, which booleans are not."""
    kind = tensor.dtype
    return not (kind.is_floating_point or kind.is_complex or kind is torch.bool)


def check_row_ids(row_ids: Tensor | Sequence[int], B: int) -> Tensor:
    """As an int64 tensor (B,) with values from 0 to 2^48 - 1."""
    row_ids = check_integers("row_ids", row_ids, B)
    _check_ids(row_ids)
    return row_ids


@unrecorded
def _check_ids(row_ids: Tensor) -> None:
    low, high = 0, 2**48 - 1
    within = ((row_ids >= low) & (row_ids <= high)).all()
    if torch.compiler.is_compiling():
        torch._assert_async(within, "row_ids: expected values from 0 to 2**48 - 1")
    elif not in_transform() and not row_ids.is_meta and not within:
        raise ValueError(
            f"row_ids: expected values from 0 to 2**48 - 1, got {int(row_ids.min())} to "
            f"{int(row_ids.max())}"
        )


def check_seed(seed: Tensor | int) -> None:
    if isinstance(seed, Tensor):
        if seed.dim() or seed.dtype is not torch.int64:
            raise TypeError(
                f"seed: expected an int or an int64 tensor of no dimension, got {seed.dim()}-D "
                f"{seed.dtype}"
            )
    elif isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed: expected an int or a tensor, got {type(seed).__name__}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected 64 bits, from -2**63 to 2**63 - 1, got {seed}")


@unrecorded
def check_mask(h_mask: Tensor | None, stack: Stack) -> Tensor | None:
    if h_mask is None:
        return None
    if not isinstance(h_mask, Tensor):
        raise TypeError(f"h_mask: expected a tensor, got {type(h_mask).__name__}")
    request, dtype, device = stack.request, stack.data.dtype, stack.data.device
    expected = (request.layers * request.directions, *numbers(stack.geometry.B), stack.P)
    if tuple(h_mask.shape) != expected:
        raise ValueError(f"h_mask: expected {expected}, got {tuple(h_mask.shape)}")
    if h_mask.requires_grad:
        raise ValueError("h_mask: gets no gradient; pass h_mask.detach()")
    if h_mask.dtype != dtype:
        raise ValueError(f"h_mask: expected the input's dtype {dtype}, got {h_mask.dtype}")
    if h_mask.device != device:
        raise RuntimeError(
            f"h_mask: expected it on the input's device {device}, got {h_mask.device}"
        )
    return h_mask
