"""What stands in for a GPU where there is none: cuDNN's three calls on CPU tensors, and a device
guard for fake tensors that are said to be on CUDA.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import _VF

CELLS = ("rnn_relu", "rnn_tanh", "lstm", "gru")
GATES = {"rnn_relu": 1, "rnn_tanh": 1, "lstm": 4, "gru": 3}
MARK = 171


def places(I, mode, H, P, directions):  # noqa: E741
    """(offset, shape) of each tensor, a list a direction: matrices of all directions, biases, then
    projections; and how many numbers there are. Biases have room even where there are none."""
    G, size = GATES[CELLS[mode]], P or H
    shapes = [(G * H, I), (G * H, size), (G * H,), (G * H,)] + ([(P, H)] if P else [])
    found, end = [[None] * len(shapes) for _ in range(directions)], 3
    for k, shape in enumerate(shapes):
        for way in range(directions):
            found[way][k] = (end, shape)
            end += torch.Size(shape).numel() + 1
    return found, end


def parts(space, weights, per, *sizes):
    """The views of a weight space that belong to ``weights``, in their order."""
    found, end = places(*sizes)
    assert space.numel() == end and len(weights) == per * sizes[-1]
    views = []
    for ways in found:
        if per in (2, 3):  # no biases
            ways = ways[:2] + ways[4:]
        assert len(ways) == per
        views += [space[at : at + torch.Size(s).numel()].view(s) for at, s in ways]
    return views


def flatten(weights, per, I, mode, H, P, layers, batch_first, bidirectional):  # noqa: E741
    assert layers == 1 and not batch_first
    sizes = (I, mode, H, P, 1 + bidirectional)
    space = weights[0].new_zeros(places(*sizes)[1])
    for w, view in zip(weights, parts(space, weights, per, *sizes), strict=True):
        assert w.shape == view.shape
        w.set_(view.copy_(w))
    return space


class CuDNN:
    """The three calls, and what was seen of them. Numbers are those of torch's own loop."""

    def __init__(self):
        self.calls = []

    def forward(
        self, x, weight, per, space, hx, cx, mode, H, P, layers, batch_first, dropout, train,
        bidirectional, batch_sizes, dropout_state,
    ):  # fmt: skip
        self.calls.append("training" if train else "inference")
        assert (layers, batch_first, dropout, dropout_state) == (1, False, 0.0, None)
        given = self.inputs(x, weight, per, space, hx, cx, mode, H, P, bidirectional, batch_sizes)
        y, *finals = apart(self.run, given, mode, bidirectional, batch_sizes)
        reserve = x.new_full((7 * x.shape[0] + 5 if train else 0,), MARK, dtype=torch.uint8)
        c_n = finals[1] if cx is not None else x.new_empty(0)
        return y, finals[0], c_n, reserve, space

    def backward(
        self, x, weight, per, space, hx, cx, y, dy, dh, dc, mode, H, P, layers, batch_first,
        dropout, train, bidirectional, batch_sizes, dropout_state, reserve, mask,
    ):  # fmt: skip
        self.calls.append("backward")
        assert train, "cudnn RNN backward can only be called in training mode"
        assert (reserve == MARK).all() and reserve.numel() == 7 * x.shape[0] + 5
        reserve.zero_()
        assert y.is_contiguous() and dy.is_contiguous()
        given = self.inputs(x, weight, per, space, hx, cx, mode, H, P, bidirectional, batch_sizes)
        cotangents = [dy, dh] + ([dc] if cx is not None else [])

        def gradients():
            leaves = [t.detach().requires_grad_() for t in given]
            outputs = self.run(leaves, mode, bidirectional, batch_sizes)
            torch.testing.assert_close(outputs[0], y)
            return torch.autograd.grad(outputs, leaves, cotangents)

        dx, dh, *rest = apart(gradients)
        dc = rest.pop(0) if cx is not None else x.new_empty(0)
        buffer = torch.zeros_like(space)  # cuDNN's gradients of weights lie in one, too
        views = parts(buffer, weight, per, x.shape[-1], mode, H, P, 1 + bidirectional)
        for view, d in zip(views, rest, strict=True):
            view.copy_(d)
        nan = torch.full_like
        return (
            dx,  # made whether wanted or not
            dh if mask[1] else nan(dh, float("nan")),
            dc if mask[2] else nan(dc, float("nan")),
            views if mask[3] else [],
        )

    @staticmethod
    def inputs(x, weight, per, space, hx, cx, mode, H, P, bidirectional, batch_sizes):
        """x, states and weights; those of the space, which are what cuDNN reads."""
        states = [hx] if cx is None else [hx, cx]
        assert all(t.is_contiguous() for t in (x, space, *states))
        B = batch_sizes[0] if batch_sizes else x.shape[1]
        assert all(s.shape[:2] == (1 + bidirectional, B) for s in states)
        if batch_sizes:
            assert min(batch_sizes) > 0 and sum(batch_sizes) == x.shape[0]
        return [x, *states, *parts(space, weight, per, x.shape[-1], mode, H, P, 1 + bidirectional)]

    @staticmethod
    def run(given, mode, bidirectional, batch_sizes):
        cell = CELLS[mode]
        n = 2 if cell == "lstm" else 1
        x, states, weights = given[0], given[1 : 1 + n], given[1 + n :]
        hidden = states if n == 2 else states[0]
        bias = len(weights) // (1 + bidirectional) >= 4
        tail = (bias, 1, 0.0, False, bool(bidirectional))
        function = getattr(_VF, cell)
        if batch_sizes:
            return function(x, torch.tensor(batch_sizes), hidden, weights, *tail)
        return function(x, hidden, weights, *tail, False)


def apart(function, *arguments):
    """Called in a thread: of its caller's autograd and dispatch it inherits nothing."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


@contextmanager
def cudnn_on_cpu():
    """cuDNN's three calls take CPU tensors."""
    found = CuDNN()
    library = torch.library.Library("aten", "IMPL", "CPU")
    try:
        library.impl("_cudnn_rnn_flatten_weight", flatten)
        library.impl("_cudnn_rnn", found.forward)
        library.impl("_cudnn_rnn_backward", found.backward)
        yield found
    finally:
        library._destroy()


@contextmanager
def cuda_for_fakes():
    """torch's builds for the CPU have no device guard of CUDA, which indexing and copying a fake
    CUDA tensor ask for: meta's, which does nothing, stands in for it."""
    cuda, meta = 1, 14  # c10::DeviceType
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    try:
        registry = (ctypes.c_void_p * 20).in_dll(
            library, "_ZN3c104impl26device_guard_impl_registryE"
        )
    except (OSError, ValueError) as error:
        pytest.skip(f"torch's table of device guards: {error}")
    before, registry[cuda] = registry[cuda], registry[meta]
    try:
        yield
    finally:
        registry[cuda] = before
