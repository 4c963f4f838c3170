"""The list of workloads: what it says of itself, and that every shape in it is right."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from rules import check_close
from torch.nn.utils.rnn import PackedSequence

import fastseq
from bench.measure import free_memory
from bench.workloads import WORKLOADS, by_name, matching

IDS = [w.name for w in WORKLOADS]


def test_the_list_is_sound():
    assert len(set(IDS)) == len(IDS)
    for workload in WORKLOADS:
        assert workload.source
        assert workload.mode == "layer" or not workload.training
        assert workload.mode == "layer" or workload.layers * workload.D == 1
        assert not workload.proj or workload.cell == "lstm"
    with pytest.raises(FrozenInstanceError):
        WORKLOADS[0].T = 1


@pytest.mark.parametrize("workload", WORKLOADS, ids=IDS)
def test_lengths_are_decreasing_and_give_the_rows(workload):
    lengths = workload.sequence_lengths
    assert len(lengths) == workload.B
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == workload.T and lengths[-1] >= 1
    assert sum(lengths) == workload.N


def test_the_rows_of_a_packed_input():
    workload = by_name("tagger-lstm")
    x = workload.input()
    assert isinstance(x, PackedSequence)
    assert x.data.shape == (workload.N, workload.I)


def test_flops_are_counted_as_torch_counts_products():
    """One LSTM layer: (T B, I) by (I, 4H), and T times (B, H) by (H, 4H)."""
    workload = by_name("flashrnn-point")
    T, B, I, H = workload.T, workload.B, workload.I, workload.H  # noqa: E741
    assert workload.flops(False) == 2 * T * B * I * 4 * H + 2 * T * B * H * 4 * H
    assert workload.flops(True) == 3 * workload.flops(False)


def test_a_shape_names_its_type():
    assert by_name("types-float16-b1-h64-gru").shape == "GRU T256 B1 I64 H64 float16"
    assert by_name("types-proj-b1-h64-lstm").shape == "LSTM T256 B1 I64 H64 P32"


def test_patterns():
    assert [w.name for w in matching("ptb-*")] == ["ptb-medium", "ptb-large"]
    assert [w.name for w in matching("ptb-large,ptb-*")] == ["ptb-large", "ptb-medium"]
    assert not any(w.name.startswith("tiny") for w in matching(None))
    with pytest.raises(ValueError, match="no workload matches 'nothing'"):
        matching("ptb-medium nothing")
    with pytest.raises(ValueError, match="no workload is named 'nothing'"):
        by_name("nothing")


def small(workload):
    """The same widths, layers and directions with few rows."""
    return replace(workload, T=min(workload.T, 6), B=min(workload.B, 3))


def agree(workload):
    """Output, and all gradients where the workload trains, by the rule of the tests."""
    x = workload.input()
    runs = []
    for library, dtype in ((fastseq, workload.dtype), (None, workload.dtype), (None, torch.double)):
        module = workload.module(library) if library else workload.module()
        module.to(dtype)
        data = x.data if isinstance(x, PackedSequence) else x
        leaf = data.to(dtype).detach().clone().requires_grad_(workload.training)
        given = x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf
        with torch.set_grad_enabled(workload.training):
            y = workload.run(module, given)
        values = {"output": y.detach()}
        if workload.training:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
            y.backward(dy.to(dtype))
            values["gradient of input"] = leaf.grad
            values |= {f"gradient of {n}": p.grad for n, p in module.named_parameters()}
        runs.append(values)
    ours, theirs, truth = runs
    assert ours.keys() == theirs.keys()
    for name in truth:
        check_close(ours[name], theirs[name], truth[name], workload.dtype, name)


@pytest.mark.parametrize("workload", WORKLOADS, ids=IDS)
def test_every_shape_with_few_rows(workload):
    agree(small(workload))


@pytest.mark.full
@pytest.mark.parametrize("workload", WORKLOADS, ids=IDS)
def test_every_shape_that_is_timed(workload):
    free = free_memory()
    if free is not None and 2 * workload.bytes(workload.training) > 0.45 * free:
        pytest.skip(f"float64 needs about {2 * workload.bytes(True) / 2**30:.0f} GiB")
    agree(workload)
