"""Who runs a call: plain code, a tracer, a functional transform, forward-mode AD, autocast."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._device import DeviceContext

from ..backends.contract import Mode
from ..backends.tracing import is_tracing

F = TypeVar("F", bound=Callable[..., Any])


def is_exporting() -> bool:
    """Whether torch.export traces us. torch.compiler.is_exporting() is true under torch.compile as
    well, in torch 2.10 and 2.11, whose compiled layers would then have no gradients."""
    return torch.compiler._is_exporting_flag


def outside_graphs(method: F) -> F:
    """As torch.compiler.disable, which imports Dynamo at once: seconds of ``import fastseq``."""
    disabled: list[Any] = []

    @wraps(method)
    def run(*args: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return method(*args)
        if not disabled:
            disabled.append(torch.compiler.disable(method))
        return disabled[0](*args)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    return run  # type: ignore[return-value]


def in_transform() -> bool:
    """Whether torch.func runs us: only a Function has rules for its tensors."""
    if torch.compiler.is_compiling():
        return _transform_is_traced()
    return torch._C._functorch.peek_interpreter_stack() is not None


def _transform_is_traced() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


# for Dynamo a constant, as backends.choice.select_constant
_transform_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def mode() -> Mode:
    """As :class:`.contract.Problem` takes it."""
    if torch.compiler.is_compiling():
        if not in_transform() and torch.autograd.forward_ad._current_level < 0:
            return "compile"
        # In the graph our operators, which have no derivative, would give zeros.
        torch._dynamo.graph_break(
            msg="fastseq's layers run torch.func's transforms outside of a compiled graph; compile "
            "the layer without the transform, or do without fullgraph=True"
        )
        return "dual"
    if is_tracing():
        return "trace"
    if torch.autograd.forward_ad._current_level >= 0:
        return "dual"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "transform"
    return "plain"


def tracked(tensor: Tensor) -> bool:
    """Whether autograd or torch.func.grad follows a tensor, beneath any number of vmaps."""
    while True:
        if tensor.requires_grad:
            return True
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)


def is_plain() -> bool:
    """Whether nobody but the kernels has to see a call: no tracer, transform, mode, profile."""
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not only_default_devices())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or is_tracing()
    )


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether tensors are numbers in memory and nothing else, and no tracer or transform has to see
    what is made of them."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_tracing()
    ) and _ORDINARY.issuperset(map(type, tensors))


_PLAIN = frozenset((Tensor, torch.nn.Parameter, torch.nn.Buffer))
_ORDINARY = frozenset((Tensor, type(None)))


def only_default_devices() -> bool:
    """Whether all that sees torch's functions is ``torch.set_default_device`` and
    ``with torch.device``, which fill in the device of a new tensor. Ours say it themselves."""
    return all(
        type(torch._C._get_function_stack_at(k)) is DeviceContext
        for k in range(torch._C._len_torch_function_stack())
    )


class without_default_devices:
    """Nobody sees torch's functions inside: each attribute of a tensor would take 1 us more."""

    def __enter__(self) -> None:
        count = torch._C._len_torch_function_stack()
        self.modes = [torch._C._pop_torch_function_stack() for _ in range(count)]

    def __exit__(self, *_: Any) -> None:
        while self.modes:
            torch._C._push_on_torch_function_stack(self.modes.pop())


def overridden(tensors: Sequence[Any]) -> bool:
    """Whether a tensor is of a subclass that sees what torch's functions do
    (``__torch_function__``)."""
    # 0.1 us; true as well where a mode sees everything, and no answer where a checkpoint runs again
    if not torch._C._has_torch_function(tensors) and torch._C._is_torch_function_enabled():
        return False
    return any(
        type(t) not in _PLAIN
        and isinstance(t, Tensor)
        and type(t).__torch_function__ is not torch._C._disabled_torch_function_impl
        for t in tensors
    )


def foreign(tensors: Sequence[Any]) -> bool:
    """Whether one is no plain run of numbers in memory, as kernels want: overridden, or sparse."""
    return overridden(tensors) or any(
        isinstance(t, Tensor) and t.layout is not torch.strided for t in tensors
    )


def autocasts(x: Tensor) -> bool:
    """Whether autocast takes ``x`` to its dtype."""
    # the question below takes 0.3 us more, and is the one that a tracer knows
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return False
    device = x.device.type
    return (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and x.dtype is not torch.float64
        and x.is_floating_point()
    )
