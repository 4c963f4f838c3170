"""The short way of inference: a plain call of a module becomes one call of the C++ kernels.

The long way, through checks, the choice of a backend and an operator, costs 35 us a call, and a
step of an LSTM with H = 128 takes 5. Here the extension looks at the tensors itself, and declines
whatever is not plain: the long way then runs it, or says what is wrong.
"""

from __future__ import annotations

from typing import Any

import torch

from ..backends import load

#: cell -> number in the extension, or None where the extension is not there
_numbers: dict[str, int] | None = None
_layers: Any = None


def _load() -> None:
    global _numbers, _layers
    native = load("native")
    _numbers = {} if isinstance(native, str) else native.NUMBER
    _layers = None if isinstance(native, str) else native.layers


def _is_plain() -> bool:
    """Whether nobody but the kernels has to see a call: no tracer, transform, mode, profile."""
    return not (
        torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.autograd._profiler_enabled()
        or torch.jit.is_tracing()
    )


def run(module: Any, input: Any, hx: Any) -> Any | None:
    """What ``module(input, hx)`` returns, without gradients; None where the long way is due."""
    if _numbers is None:
        _load()
    number = _numbers.get(module.cell)  # type: ignore[union-attr]
    if number is None or module.backend not in (None, "native") or module._rates is not None:
        return None
    if type(input) is not torch.Tensor or input.is_neg():  # else its data are its numbers
        return None
    layers = module.num_layers
    if (layers > 1 and module.dropout and module.training) or not _is_plain():
        return None
    parameters = module._parameters
    try:
        weights = tuple([parameters[name] for names in module._all_weights for name in names])
    except KeyError:  # parametrized, or replaced by a tensor
        return None
    out = _layers(
        number,
        input,
        hx,
        weights,
        layers,
        2 if module.bidirectional else 1,
        module.bias,
        module.proj_size > 0,
        module.batch_first,
        torch.get_num_threads(),
        module.deterministic,
    )
    if out is None or not module.batch_first or input.dim() == 2:
        return out
    return out[0].transpose(0, 1), out[1]
