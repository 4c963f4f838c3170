"""What a kernel that waited in vain tells the host: the flag of a device, and who raises it. The
kernels themselves write it in helpers/triton_cases.py and test_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

import fastseq
from fastseq.backends import faults, imported

CPU = torch.device("cpu")
META = torch.device("meta")  # as another device: its flag is an ordinary number, too


@pytest.fixture(autouse=True)
def afresh(monkeypatch):
    monkeypatch.setattr(faults, "_flags", {})
    monkeypatch.setattr(faults, "_kernels", [])


def fail(device=CPU, kernel="triton's kernel lstm_forward_grid"):
    """As a kernel does it."""
    faults.flag(device)[0] = faults.code(kernel)


def test_a_device_has_one_flag():
    flag = faults.flag(CPU)
    assert flag.dtype is torch.int32 and flag.tolist() == [0] and flag.device == CPU
    assert faults.flag(torch.device("cpu")) is flag
    assert faults.flag(META).data_ptr() != flag.data_ptr()


def test_a_kernel_has_one_code():
    assert [faults.code(name) for name in ("one", "two", "one", "three")] == [1, 2, 1, 3]


@pytest.mark.parametrize("tell", [lambda: faults.raise_if_set(CPU), fastseq.check])
def test_nothing_is_told_where_nothing_went_wrong(tell):
    tell()  # nor without a flag
    faults.flag(CPU)
    faults.code("a kernel")
    tell()


@pytest.mark.parametrize(
    "tell",
    [
        lambda: faults.raise_if_set(CPU),
        fastseq.check,
        lambda: fastseq.check("cpu"),
        lambda: fastseq.check(CPU),
    ],
)
def test_a_fault_is_told_once(tell):
    faults.code("another kernel")
    fail()
    with pytest.raises(RuntimeError) as told:
        tell()
    for word in ("lstm_forward_grid", "on cpu", "in vain", "NaN", "'torch' or 'eager'", "step"):
        assert word in str(told.value)
    tell()
    fail()
    with pytest.raises(RuntimeError, match="lstm_forward_grid"):
        tell()


def test_each_device_has_its_own():
    fail(META, "the other's")
    faults.flag(CPU)
    faults.raise_if_set(CPU)
    fastseq.check("cpu")
    fail(CPU, "this one's")
    with pytest.raises(RuntimeError, match=r"(?s)the other's.*\n.*this one's"):
        fastseq.check()
    fastseq.check()


def test_a_device_that_ran_nothing_has_nothing_to_tell():
    fail()
    fastseq.check("meta")
    with pytest.raises(RuntimeError, match="in vain"):
        fastseq.check()


def test_while_a_graph_is_captured_nothing_is_told(monkeypatch):
    fail()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    faults.raise_if_set(CPU)
    with pytest.raises(RuntimeError, match="CUDA graph cannot record"):
        fastseq.check()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(RuntimeError, match="in vain"):
        faults.raise_if_set(CPU)


@pytest.mark.parametrize("within", [torch.inference_mode, torch.no_grad])
def test_a_flag_made_in_a_mode_is_read_outside(within):
    with within():
        fail()
    with pytest.raises(RuntimeError, match="in vain"):
        faults.raise_if_set(CPU)
    faults.raise_if_set(CPU)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_backends_look_before_anything_else(name):
    module = imported(name)
    if isinstance(module, str):
        pytest.skip(module)
    call = SimpleNamespace(x=torch.zeros(1))
    for run in (module.forward, module.backward):
        fail()
        with pytest.raises(RuntimeError, match="in vain"):
            run(call, *[None] * (run.__wrapped__.__code__.co_argcount - 1))
