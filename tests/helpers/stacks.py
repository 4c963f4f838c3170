"""A stack of layers in one call beside its layers one by one: the same bits."""

import pytest
import torch

from fastseq.ops import whole


def flat(state):
    return state if isinstance(state, tuple) else (state,)


def states_of(m, batch, dtype=torch.float32):
    """h_0, and c_0 of an LSTM, that want gradients."""
    rows = m.num_layers * (2 if m.bidirectional else 1)
    sizes = [m.proj_size or m.hidden_size] + [m.hidden_size] * (m._fastseq_cell == "lstm")
    made = [torch.randn(rows, *batch, n, dtype=dtype, requires_grad=True) for n in sizes]
    return tuple(made) if len(made) > 1 else made[0]


def outputs_and_gradients(m, x, hx, run=None):
    """By the module or ``run``: y, final states, and the gradients of all that has one."""
    torch.manual_seed(7)
    y, state = (run or m)(x, hx)
    outputs = [y.data if hasattr(y, "batch_sizes") else y, *flat(state)]
    leaves = [t for t in (*m.parameters(), *(flat(hx) if hx is not None else ()))]
    leaves += [x.data if hasattr(x, "batch_sizes") else x]
    leaves = [t for t in leaves if t.requires_grad]
    torch.manual_seed(8)
    cotangents = [torch.randn(o.shape, dtype=o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, cotangents)]


def layer_by_layer(function, *arguments):
    """Runs a call with the way of whole stacks closed."""
    with pytest.MonkeyPatch.context() as closed:
        closed.setattr(whole, "run", lambda *call, **given: None)
        return function(*arguments)


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        assert torch.equal(a, b)


def is_whole(y):
    function = y.grad_fn
    if "Transpose" in function.name():
        function = function.next_functions[0][0]
    return "StackFunction" in function.name()
