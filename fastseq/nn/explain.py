"""Which backend will run a module on an input, and why the others will not."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..backends import BACKENDS, choice
from ..ops.padding import Jagged
from ..ops.stack import Stack, problem
from .cells import RecurrentCell
from .recurrent import Recurrent


def explain(
    module: nn.Module,
    input: Tensor | PackedSequence,
    *,
    lengths: Any = None,
    reset: Tensor | None = None,
    all_states: bool = False,
) -> str | None:
    """Print which backend will run ``module(input, ...)``, and why each other one will not.

    On CUDA, where no backend is named, the measurement behind the choice is printed too.

    Args:
        module: a layer or a cell of fastseq.
        input: as for the call; only its shape, dtype and device count, and whether a gradient is
            wanted (``torch.no_grad()`` around this call explains inference).
        lengths, reset, all_states: as for the call.

    Returns:
        The name of the backend, or None where those that ``module.backend`` names all decline.

    Raises:
        TypeError: the module is not one of fastseq's.
    """
    stack = _stack(module, input, lengths, reset, all_states)
    task = problem(stack)
    backend = stack.backend
    if backend is None and isinstance(module, RecurrentCell):
        backend = choice.of_a_cell(task)
    verdict = choice.judge(task, backend)
    size = f"T={task.T} B={task.B} I={task.I} H={task.H} layers={task.layers} directions={task.R}"
    purpose = "training" if task.training else "inference"
    print(f"{type(module).__name__} {size}, {task.dtype} on {task.device}, {purpose}")
    tried = choice.left_to_us(task) if backend is None else choice.names(backend)
    print(f"backend={stack.backend!r}: tries {', '.join(dict.fromkeys(tried))}")
    measured = choice.measured(task)
    if backend is None and measured is not None:
        print(f"measured: {measured}")
    for name in BACKENDS:
        reason = choice.reason_against(name, task)
        if name == verdict.chosen:
            print(f"  {name:<10} runs")
        elif reason is not None:
            print(f"  {name:<10} declines: {reason}")
        else:
            print(f"  {name:<10} could run it, is not asked first")
    return verdict.chosen


def _stack(
    module: nn.Module,
    input: Tensor | PackedSequence,
    lengths: Any,
    reset: Tensor | None,
    all_states: bool,
) -> Stack:
    if isinstance(module, RecurrentCell):
        if isinstance(input, PackedSequence):
            raise TypeError("input: a cell takes a Tensor, got a PackedSequence")
        return module._stack(input if input.dim() == 2 else input.unsqueeze(0), [])
    if not isinstance(module, Recurrent):
        raise TypeError(
            f"module: expected a layer or cell of fastseq, got {type(module).__name__}; "
            "fastseq.replace(model) swaps torch.nn's"
        )
    if isinstance(input, PackedSequence):
        stack = module._stack(input.data, input.batch_sizes, [], all_states)
    elif input.is_nested:
        module._check_nested(input)
        nested: Any = input  # offsets is no method of Tensor
        values = nested.values()
        jagged = Jagged(nested.offsets(), values.shape[0])
        stack = module._stack(values, jagged.batch_sizes, [], all_states)
    else:
        x = input if input.dim() == 3 else input.unsqueeze(1)
        if module.batch_first and input.dim() == 3:
            x = x.transpose(0, 1)
        stack = module._stack(x, None, [], all_states)
    stack.lengths, stack.reset = lengths, reset
    module._mask(stack, stack.batch, None, 0)  # a seed, so that none is drawn
    return stack
