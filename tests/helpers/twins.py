"""torch.nn's modules and fastseq's side by side, with the same parameters and the same inputs."""

import os
import shutil
import sys

import pytest
import torch
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


def detached(value):
    """A state that shares no graph with ``value`` and asks for gradients."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_()
    return tuple(detached(part) for part in value)


def assert_same(ours, theirs, tolerance=2e-6):
    """The same structure and shapes; numbers within ``tolerance`` (parity has its own tests)."""
    mine, yours = tensors(ours), tensors(theirs)
    assert len(mine) == len(yours)
    for a, b in zip(mine, yours, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_same_gradients(ours, theirs, tolerance=1e-5):
    for (name, mine), (_, yours) in zip(
        ours.named_parameters(), theirs.named_parameters(), strict=True
    ):
        assert (mine.grad is None) == (yours.grad is None), name
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, yours.grad, rtol=tolerance, atol=tolerance)


def caught(function):
    """The exception that a call raises."""
    try:
        function()
    except Exception as error:
        return error
    return None
