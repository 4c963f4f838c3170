"""A stack of recurrent layers, time-major: the way from checked tensors to a backend and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor

from ..backends import choice, cuda_rule, eager
from ..backends import torch as torch_backend
from ..backends.contract import Memory, Mode, Problem, Weights
from ..cells import CELLS
from . import autograd, masks, onnx, whole
from .checks import autocasts
from .library import make_call
from .padding import Padding, spread_reset

Trajectory = list[Tensor]


@dataclass
class Stack:
    """What a user asks for: layers x directions of one cell over one input.

    x: (T, B, I), or packed (N, I) with ``batch_sizes``.
    states: empty, or per state of the cell a tensor (layers * D, B, ...).
    weights: layers * D of them, the directions of a layer side by side.
    lengths: (B,) or None: x is padded, and so is y, with zeros.
    reset: (T, B) bool or None; where it holds a new sequence begins, in either direction.
    h_mask: (layers * D, B, P) or None; multiplies h_{t-1} before its product with w_hh.
    input_masks: one a layer, (B, its input size), or None; multiplies its input at every step.
    zoneout: which states stay as they were, or None.
    first_layer: which layer of a deeper stack the first one is, for the masks of its zoneout.
    trajectory: whether the states other than h are returned at every step (of the last layer).
    """

    cell: str
    x: Tensor
    states: Sequence[Tensor]
    weights: Sequence[Weights]
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    directions: int = 1
    dropout: float = 0.0
    training: bool = False
    reset: Tensor | None = None
    h_mask: Tensor | None = None
    input_masks: Sequence[Tensor] | None = None
    zoneout: masks.Zoneout | None = None
    first_layer: int = 0
    trajectory: bool = False
    memory: Memory = "full"
    deterministic: bool = False
    backend: choice.Backend = None

    @property
    def layers(self) -> int:
        return len(self.weights) // self.directions

    @property
    def H(self) -> int:
        return self.weights[0].w_ih.shape[0] // CELLS[self.cell].G

    @property
    def P(self) -> int:
        w_hr = self.weights[0].w_hr
        return self.H if w_hr is None else w_hr.shape[0]

    @property
    def batch(self) -> int:
        if self.batch_sizes is None:
            return self.x.shape[1]
        if self.states:
            return self.states[0].shape[1]
        return int(self.batch_sizes[0]) if len(self.batch_sizes) else 0

    def needs_grad(self) -> bool:
        # an exported program records the operator alone, which has no autograd formula
        if not torch.is_grad_enabled() or is_exporting():
            return False
        if autograd.in_transform():  # the tensors' own word is that of the innermost transform
            every = [self.x, *self.states, *(w for ws in self.weights for w in ws.flat())]
            return any(w is not None and autograd.tracked(w) for w in every)
        if self.x.requires_grad or any(s.requires_grad for s in self.states):
            return True
        return any(w is not None and w.requires_grad for ws in self.weights for w in ws.flat())


def is_exporting() -> bool:
    """Whether torch.export traces us. torch.compiler.is_exporting() is true under torch.compile as
    well, in torch 2.10 and 2.11, whose compiled layers would then have no gradients."""
    return torch.compiler._is_exporting_flag


def mode() -> Mode:
    """What runs us: plain eager code, a tracer, a functional transform, or forward-mode AD."""
    if torch.compiler.is_compiling():
        if not autograd.in_transform() and torch.autograd.forward_ad._current_level < 0:
            return "compile"
        # In the graph our operators, which have no derivative, would give zeros.
        torch._dynamo.graph_break(
            msg="fastseq's layers run torch.func's transforms outside of a compiled graph; compile "
            "the layer without the transform, or do without fullgraph=True"
        )
        return "dual"
    if torch.jit.is_tracing():
        return "trace"
    if torch.autograd.forward_ad._current_level >= 0:
        return "dual"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "transform"
    return "eager"


def problem(stack: Stack) -> Problem:
    """What the choice of a backend depends on."""
    now = mode()
    ragged = stack.batch_sizes is not None or stack.lengths is not None
    traced = now in ("compile", "trace")
    T = B = width = H = P = None
    if now != "compile":
        width, H, P = stack.weights[0].w_ih.shape[1], stack.H, stack.P
        if traced:  # there a size is a tensor
            width, H, P = int(width), int(H), int(P)
    if not traced:
        T = len(stack.batch_sizes) if stack.batch_sizes is not None else stack.x.shape[0]
        B = stack.batch
    device = stack.x.device
    capability, tf32, recording = None, False, False
    if device.type == "cuda":
        capability = cuda_rule.capability(device)
        tf32 = cuda_rule.uses_tf32(stack.x.dtype)
        recording = ragged and now == "eager" and torch.cuda.is_current_stream_capturing()
    return Problem(
        cell=stack.cell,
        dtype=stack.x.dtype,
        device=device.type,
        T=T,
        B=B,
        I=width,
        H=H,
        P=P,
        R=stack.directions,
        layers=stack.layers,
        bias=stack.weights[0].b_ih is not None,
        projected=stack.weights[0].w_hr is not None,
        ragged=ragged,
        reset=stack.reset is not None,
        h_mask=stack.h_mask is not None,
        zoneout=stack.zoneout is not None,
        trajectory=stack.trajectory,
        memory=stack.memory,
        deterministic=stack.deterministic,
        training=stack.needs_grad(),
        # spelled out: compared alone, Dynamo makes a symbol of it, which no choice can read
        dropout=True if stack.training and stack.dropout > 0 else False,
        threads=1 if traced else torch.get_num_threads(),
        mode=now,
        capability=capability,
        tf32=tf32,
        recording=recording,
    )


def settle_batch(stack: Stack, *known: Tensor | None) -> None:
    """The batch of a packed input while a graph is traced, held by states from then on.

    It is batch_sizes[0], which a graph does not know. ``known`` may: tensors with the batch in
    their second dimension, or in their only one. What they say is checked when the graph runs.
    """
    sizes = stack.batch_sizes
    if sizes is None or sizes.shape[0] == 0:  # len() would make it a constant of an export
        return
    shapes = [t.shape for t in (*known, *stack.states) if isinstance(t, Tensor) and t.dim()]
    batch: Any = shapes[-1][min(len(shapes[-1]), 2) - 1] if shapes else sizes[0].item()
    torch._assert_async(
        (sizes.max() == batch) & (sizes.sum() == stack.x.shape[0]),
        "batch_sizes: expected the batch of the states as their greatest, and the rows of the "
        "packed input as their sum",
    )
    if not stack.states:
        stack.states = zero_states(stack, batch)


def step(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    backend: choice.Backend,
) -> list[Tensor] | None:
    """The short way of one step of one layer: torch's cell function, where that is the choice.

    None where it is not, and the long way is due. It saves a cell 15 us a call: more than it costs.
    """
    if backend not in (None, "torch") or autocasts(x) or autograd.in_transform():
        return None
    return torch_backend.cell_step(cell, x, states, weights)


def run(stack: Stack) -> tuple[Tensor, list[Tensor], Trajectory]:
    """y, final states (layers * D, B, ...), and the trajectory of the last layer."""
    if stack.input_masks is not None:
        return _run_masked(stack, stack.input_masks)
    if not autocasts(stack.x):
        return _run_as_given(stack)
    _autocast(stack)
    # off inside: the backends choose their types, and float32 is meant where they say so
    with torch.autocast(stack.x.device.type, enabled=False):
        return _run_as_given(stack)


def _run_masked(
    stack: Stack, input_masks: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor], Trajectory]:
    """Each layer as a stack of its own, on its masked input."""
    D, x = stack.directions, stack.x
    finals: list[list[Tensor]] = []
    along: Trajectory = []
    for layer, mask in enumerate(input_masks):
        part = slice(layer * D, (layer + 1) * D)
        if layer and stack.training and stack.dropout > 0:
            x = torch.dropout(x, stack.dropout, True)
        one = replace(
            stack,
            x=masks.mask_input(x, mask, stack.batch_sizes),
            states=[s[part] for s in stack.states],
            weights=stack.weights[part],
            h_mask=None if stack.h_mask is None else stack.h_mask[part],
            input_masks=None,
            first_layer=layer,
            trajectory=stack.trajectory and layer == stack.layers - 1,
        )
        x, last, along = run(one)
        finals.append(last)
    return x, [torch.cat(s) for s in zip(*finals, strict=True)], along


def _run_as_given(stack: Stack) -> tuple[Tensor, list[Tensor], Trajectory]:
    if is_exporting() and onnx.is_exporting():
        reason = onnx.reason_against(stack)
        if reason is None:
            return onnx.run(stack)
        if stack.backend != "eager":
            raise NotImplementedError(
                f"torch.onnx.export: {reason}. With backend='eager' the layer is exported step by "
                "step, for one number of steps."
            )
    task = problem(stack)
    if task.mode == "compile":
        name = choice.select_constant(stack.backend, *task)
    else:
        name = choice.select(task, stack.backend)
    if stack.lengths is not None:
        padding = Padding(stack.lengths, stack.x.shape[0], stack.x.shape[1])
        stack.x = padding.pack(stack.x)
        stack.batch_sizes = padding.batch_sizes
        stack.states = [padding.sort(s) for s in stack.states]
        if not stack.states:  # the longest sequence may not tell the batch: lengths may be zero
            stack.states = zero_states(stack, padding.B)
        if stack.h_mask is not None:
            stack.h_mask = padding.sort(stack.h_mask)
        if stack.zoneout is not None:
            stack.zoneout = stack.zoneout.sorted(padding.order)
        if stack.reset is not None:
            stack.reset = stack.reset.index_select(1, padding.order)
        y, states, along = _run(stack, task, name)
        return (
            padding.unpack(y),
            [padding.unsort(s) for s in states],
            [padding.unpack(c) for c in along],
        )
    return _run(stack, task, name)


def _run(stack, task, name) -> tuple[Tensor, list[Tensor], Trajectory]:
    if name == "torch" and torch_backend.stacks(task):
        states = stack.states or zero_states(stack, stack.batch)
        flat = [w for ws in stack.weights for w in ws.flat() if w is not None]
        dropout = stack.dropout if stack.training else 0.0
        whole = torch_backend.step if torch_backend.single_step(task) else torch_backend.stack
        y, last = whole(
            torch_backend.Stack(
                stack.cell,
                stack.x,
                stack.batch_sizes,
                states,
                flat,
                stack.layers,
                stack.directions,
                stack.weights[0].b_ih is not None,
                dropout,
                stack.training,
            )
        )
        return y, last, []

    if name == "native" and task.mode == "eager":
        out = _whole(stack, task)
        if out is not None:
            return out
    D, n = stack.directions, len(CELLS[stack.cell].states)
    reset = None
    if stack.reset is not None:
        reset = spread_reset(stack.reset, stack.batch_sizes, D, stack.x.shape[0])
    sizes = [stack.P, *[stack.H] * (n - 1)]
    x = stack.x
    finals: list[list[Tensor]] = []
    along: Trajectory = []
    for layer in range(stack.layers):
        part = slice(layer * D, (layer + 1) * D)
        if layer and stack.training and stack.dropout > 0:
            x = torch.dropout(x, stack.dropout, True)
        h_mask = None if stack.h_mask is None else stack.h_mask.narrow(0, layer * D, D)
        stay = None
        if stack.zoneout is not None:
            place = stack.first_layer + layer
            stay = stack.zoneout.of_layer(place, D, x, stack.batch_sizes, sizes)
        outputs = _layer(
            stack,
            name,
            task.training,
            x,
            [s.narrow(0, layer * D, D) for s in stack.states] if stack.layers > 1 else stack.states,
            stack.weights[part],
            reset,
            h_mask,
            stay,
            stack.trajectory and layer == stack.layers - 1,
        )
        x = outputs[0]
        finals.append(list(outputs[1 : 1 + n]))
        along = list(outputs[1 + n :])
    if task.training and task.mode == "compile":
        # Backward reads these, and in a graph nothing notices when they are edited in place. Where
        # they are not, inductor takes the copies out.
        x, finals[-1], along = (
            x.clone(),
            [s.clone() for s in finals[-1]],
            [c.clone() for c in along],
        )
    if stack.layers == 1:
        return x, finals[0], along
    return x, [torch.cat(s) for s in zip(*finals, strict=True)], along


def _whole(stack: Stack, task: Problem) -> tuple[Tensor, list[Tensor], Trajectory] | None:
    """All layers in one call of the C++ kernels; None where they are run one by one."""
    if task.reset or task.h_mask or task.zoneout or task.trajectory or not whole.is_plain():
        return None
    if (task.training and task.memory != "full") or not whole.serves(stack.cell):
        return None
    if task.dtype not in whole.DTYPES:
        return None
    shape = whole.Shape(
        stack.cell,
        stack.layers,
        stack.directions,
        task.bias,
        task.projected,
        whole.TIME_FIRST,
        stack.deterministic,
        stack.dropout if stack.training and stack.layers > 1 else 0.0,
    )
    weights = tuple([w for ws in stack.weights for w in ws.flat() if w is not None])
    if len(weights) != len(stack.weights) * (2 + 2 * task.bias + task.projected):
        return None
    out = whole.run(shape, stack.x, stack.batch_sizes, tuple(stack.states), weights)
    return None if out is None else (out[0], list(out[1]), [])


def _layer(
    stack, name, training, x, states, weights, reset, h_mask, stay, trajectory
) -> Sequence[Tensor]:
    """y, final states and trajectory of one layer by a backend of our own."""
    reverse = (False, True)[: stack.directions]
    flat = [w for ws in weights for w in ws.flat()]
    if name == "eager":

        def forward(x, states, flat):
            call = make_call(
                stack.cell, x, stack.batch_sizes, states, flat, reverse, reset, h_mask, stack.memory
            )
            result = eager.forward(call, trajectory=trajectory, stay=stay)
            return (result.y, *result.states, *result.trajectory)

        if training and stack.memory == "lean":
            return torch.utils.checkpoint.checkpoint(
                forward, x, states, flat, use_reentrant=False, preserve_rng_state=False
            )
        return forward(x, states, flat)

    layout = autograd.Layout(
        stack.cell,
        name,
        reverse,
        stack.memory,
        stack.deterministic,
        trajectory,
        len(states),
        len(flat),
    )
    arguments = (layout, x, stack.batch_sizes, reset, h_mask, *states, *flat)
    if training:
        return autograd.differentiable_recurrence(*arguments)
    return autograd.recurrence(*arguments, save=False)


def zero_states(stack: Stack, batch: int) -> list[Tensor]:
    """The initial states where none were given, as the stack takes them."""
    others = len(CELLS[stack.cell].states) - 1
    count = stack.layers * stack.directions
    return [stack.x.new_zeros((count, batch, size)) for size in (stack.P, *[stack.H] * others)]


def _autocast(stack: Stack) -> None:
    """Under autocast all tensors take its dtype; gates and carried states stay float32 inside."""
    dtype = torch.get_autocast_dtype(stack.x.device.type)
    stack.x = stack.x.to(dtype)
    stack.states = [s.to(dtype) for s in stack.states]
    if stack.h_mask is not None:
        stack.h_mask = stack.h_mask.to(dtype)
    stack.weights = [ws.map(lambda w: w.to(dtype)) for ws in stack.weights]
