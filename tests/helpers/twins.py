"""torch.nn's modules and fastseq's side by side, with the same parameters and the same inputs."""

import copy
import io
import os
import pickle
import shutil
import sys

import pytest
import torch
from rules import check_alike, check_close, same_bits
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.backends import load

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
KINDS = (*LAYERS, *CELLS)

#: None chooses; reference is left to the parity tests
BACKENDS = (None, "eager", "torch", "numba")

#: inductor compiles C++ where the tensors are on a CPU, and takes CXX for a path
_CXX = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
compiles_cpp = pytest.mark.skipif(
    shutil.which(_CXX) is None, reason=f"inductor needs a C++ compiler, and there is no {_CXX}"
)


def needs(backend):
    if backend is not None and isinstance(load(backend), str):
        pytest.skip(load(backend))


def pair(kind, *args, backend=None, **kwargs):
    """torch.nn's module and fastseq's of one kind, with the same parameters."""
    needs(backend)
    theirs = getattr(nn, kind)(*args, **kwargs)
    ours = getattr(fastseq, kind)(*args, backend=backend, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def state_for(kind, *shape, **kwargs):
    """A random state, two tensors for the LSTM."""
    if kind.startswith("LSTM"):
        return torch.randn(*shape, **kwargs), torch.randn(*shape, **kwargs)
    return torch.randn(*shape, **kwargs)


def tensors(value):
    """All tensors in an output, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in tensors(part)]


def copied(module, way):
    """A copy by 'deepcopy', 'pickle' or 'torch.save'."""
    if way == "deepcopy":
        return copy.deepcopy(module)
    if way == "pickle":
        return pickle.loads(pickle.dumps(module))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def cast(value, dtype):
    """Tensors, packed ones too, of another type."""
    if isinstance(value, torch.Tensor | PackedSequence):
        return value.to(dtype)
    return tuple(cast(part, dtype) for part in value)


def detached(value):
    """A state that shares no graph with ``value`` and asks for gradients."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_()
    return tuple(detached(part) for part in value)


def assert_same(ours, theirs, truth=None):
    """The same structure, types and shapes; numbers by the rule, of float64 where it is given."""
    __tracebackhide__ = True
    mine, yours = tensors(ours), tensors(theirs)
    exact = [None] * len(yours) if truth is None else tensors(truth)
    assert len(mine) == len(yours) == len(exact) > 0
    for k, (a, b, wide) in enumerate(zip(mine, yours, exact, strict=True)):
        assert a.dtype == b.dtype and a.device == b.device
        if wide is None:
            check_alike(a, b, f"tensor {k}")
        else:
            check_close(a, b, wide, b.dtype, f"tensor {k}")


def assert_same_bits(ours, theirs):
    """The same structure, and every bit."""
    __tracebackhide__ = True
    mine, yours = tensors(ours), tensors(theirs)
    assert len(mine) == len(yours) > 0
    for k, (a, b) in enumerate(zip(mine, yours, strict=True)):
        assert same_bits(a, b), f"tensor {k}: they differ by up to {(a - b).abs().max():.3g}"


def assert_same_gradients(ours, theirs, truth=None):
    """Of each parameter, by the rule, of a module in float64 where one is given."""
    __tracebackhide__ = True
    exact = dict((theirs if truth is None else truth).named_parameters())
    yours = dict(theirs.named_parameters())
    mine = dict(ours.named_parameters())
    assert mine.keys() == yours.keys()
    for name, parameter in mine.items():
        assert (parameter.grad is None) == (yours[name].grad is None), name
        if parameter.grad is not None:
            wide = exact[name].grad.double()
            check_close(parameter.grad, yours[name].grad, wide, parameter.dtype, name)


def caught(function):
    """The exception that a call raises."""
    try:
        function()
    except Exception as error:
        return error
    return None


def compare(ours, theirs, x, hx=None):
    """Outputs and all gradients of one call, ours and torch.nn's, by the rule."""
    results = []
    truth = copy.deepcopy(theirs).double()
    for module in (ours, theirs, truth):
        module.zero_grad()
        given = cast(x, torch.float64) if module is truth else x
        given = detached(given) if isinstance(given, torch.Tensor) else given
        state = None if hx is None else detached(cast(hx, torch.float64) if module is truth else hx)
        out = module(given, state)
        torch.manual_seed(1)
        loss = sum((t * torch.randn(t.shape).to(t.dtype)).sum() for t in tensors(out))
        loss.backward()
        leaves = [t for t in (given, *(() if state is None else tensors(state)))]
        results.append((out, [t.grad for t in leaves if isinstance(t, torch.Tensor)]))
    (mine, dmine), (yours, dyours), (exact, dexact) = results
    assert type(mine) is type(yours)
    assert_same(mine, yours, exact)
    if dmine:  # a packed input has no gradient of its own
        assert_same(dmine, dyours, dexact)
    assert_same_gradients(ours, theirs, truth)
    return mine


def sequences(lengths=(2, 5, 3), size=4):
    return [torch.randn(n, size) for n in lengths]
