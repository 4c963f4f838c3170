"""What the backends of GPUs ask of torch around their launches, where there is no GPU: a device
that is not there, and torch's setting of products, which any build has."""

import pytest
import torch

from fastseq.backends import gpu_layer
from fastseq.backends.contract import Call, Weights

HERE = torch.device("cuda", 0)


@pytest.fixture
def layer():
    weights = Weights(torch.zeros(12, 3), torch.zeros(12, 4), None, None, None, ())
    return gpu_layer.Layer(Call("gru", torch.zeros(2, 1, 3), None, [], [weights], (False,)), "ieee")


def test_the_current_device_is_the_tensors(layer, monkeypatch):
    current = [0]

    class Device:
        def __init__(self, device):
            self.index = device.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "device", Device)
    for index in (0, 1, 0):
        layer.device = torch.device("cuda", index)
        with layer.on_device():
            assert current == [index]
        assert current == [0]


@pytest.fixture(params=["ieee", "tf32"])
def before(request):
    matmul = torch.backends.cuda.matmul
    found, matmul.fp32_precision = matmul.fp32_precision, request.param
    yield request.param
    matmul.fp32_precision = found


def test_products_around_the_loop_are_the_loop_s(before):
    matmul = torch.backends.cuda.matmul
    for precision, device, expected in (
        ("tf32", HERE, "tf32"),
        ("tf32x3", HERE, before),
        ("ieee", HERE, before),
        ("tf32", torch.device("cpu"), before),
    ):
        with pytest.raises(KeyError), gpu_layer.products_as(precision, device):
            assert matmul.fp32_precision == expected
            raise KeyError
        assert matmul.fp32_precision == before


def test_how_many_sequences_there_are_at_a_step(layer):
    assert layer.sizes == [1, 1] and layer.flat(layer.call.x).shape == (2, 3)
