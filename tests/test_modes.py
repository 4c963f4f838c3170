"""Who watches torch's functions and operators sees a layer: modes, make_fx, fake tensors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq

I, H = 4, 6  # noqa: E741  (the field's letters)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self.seen.append(str(function))
        return function(*arguments, **(keywords or {}))


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.seen.append(str(operator))
        return operator(*arguments, **(keywords or {}))


MODULES = {
    "GRU": (fastseq.GRU, {}),
    "LSTM": (fastseq.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "LSTMCell": (fastseq.LSTMCell, {}),
}


@pytest.fixture(params=MODULES)
def module(request):
    kind, options = MODULES[request.param]
    return kind(I, H, **options)


def given(module, T=5, B=3):
    return torch.randn(B, I) if "Cell" in type(module).__name__ else torch.randn(T, B, I)


def gradients(module, x):
    """And the outputs."""
    outputs = flat(module(x))
    total = sum(o.square().sum() for o in outputs)
    return [*outputs, *torch.autograd.grad(total, list(module.parameters()))]


def check_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_a_mode_sees_each_layer(module, mode):
    x = given(module)
    expected = gradients(module, x)
    with mode() as watching:
        found = gradients(module, x)
    check_same(found, expected)
    layers = getattr(module, "num_layers", 1)
    assert sum("recurrence" in name and "backward" not in name for name in watching.seen) == layers
    with torch.no_grad(), mode() as watching:
        check_same(flat(module(x)), flat(module(x)))
    assert any("recurrence" in name for name in watching.seen)


def test_a_mode_sees_a_function():
    x, weights = torch.randn(5, 3, I), [torch.randn(3 * H, I), torch.randn(3 * H, H)]
    with Functions() as functions, Operators() as operators:
        y = fastseq.gru(x, weights)[0]
    check_same([y], [fastseq.gru(x, weights)[0]])
    assert any("recurrence" in name for name in functions.seen)
    assert operators.seen == ["fastseq.recurrence.default"]


def test_make_fx(module):
    """With symbols for sizes, one graph of forward and backward serves other ones."""

    def run(x):
        return gradients(module, x)

    graph = make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(given(module))
    names = [str(node.target) for node in graph.graph.nodes]
    assert "fastseq.recurrence_backward.default" in names
    for T, B in ((5, 3), (9, 2)):
        x = given(module, T, B)
        check_same(graph(x), run(x))


def test_fake_tensors(module):
    """Of a module that is fake, and of one whose parameters are not."""
    expected = [o.shape for o in gradients(module, given(module))]
    with FakeTensorMode(allow_non_fake_inputs=True):
        twin = type(module)(I, H, **MODULES[type(module).__name__][1])
        for either in (twin, module):
            found = gradients(either, given(module))
            assert [o.shape for o in found] == expected
            assert all(type(o) is FakeTensor for o in found)


def test_functionalize(module):
    x = given(module)
    check_same(flat(torch.func.functionalize(module)(x)), flat(module(x)))


def test_default_devices_are_no_mode():
    """They fill in the device of a new tensor: the kernels are called as they are without."""
    layer, x = fastseq.GRU(I, H), torch.randn(5, 3, I)
    expected = gradients(layer, x)
    with torch.device("cpu"):
        found = gradients(layer, x)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
