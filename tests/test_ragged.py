"""Sequences of different length in calls of the modules: packed, and padded with ``lengths=``.

Kernels on ragged rows: test_parity.py. What holds for every such batch: test_properties.py. Jagged
tensors: test_nested.py.
"""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)
from twins import (
    BACKENDS,
    LAYERS,
    assert_same,
    assert_same_gradients,
    compare,
    detached,
    needs,
    pair,
    sequences,
    state_for,
    tensors,
)

import fastseq

layers = pytest.mark.parametrize("kind", LAYERS)
backends = pytest.mark.parametrize("backend", BACKENDS)


@layers
@backends
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_state", [False, True])
def test_packed(kind, backend, batch_first, with_state):
    """batch_first says nothing of packed input; states are in the order of the sequences."""
    theirs, ours = pair(kind, 4, 6, 2, bidirectional=True, batch_first=batch_first, backend=backend)
    packed = pack_sequence(sequences(), enforce_sorted=False)
    hx = state_for(kind, 4, 3, 6) if with_state else None
    out, _ = compare(ours, theirs, packed, hx)
    assert isinstance(out, PackedSequence)
    assert out.batch_sizes is packed.batch_sizes
    assert out.sorted_indices is packed.sorted_indices
    assert out.unsorted_indices is packed.unsorted_indices


@layers
@backends
def test_packed_in_order(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    packed = pack_sequence(sequences((5, 3, 3, 1)))
    assert packed.sorted_indices is None
    out, _ = compare(ours, theirs, packed, state_for(kind, 1, 4, 6))
    assert out.sorted_indices is None and out.unsorted_indices is None
    assert out.batch_sizes is packed.batch_sizes


@layers
def test_each_packed_sequence_is_run_alone(kind):
    _, ours = pair(kind, 4, 6, 2, bidirectional=True)
    parts = sequences((4, 1, 6))
    out, state = ours(pack_sequence(parts, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(out)
    for k, part in enumerate(parts):
        alone, last = ours(part)
        assert_same(padded[: lengths[k], k], alone)
        for whole, single in zip(tensors(state), tensors(last), strict=True):
            assert_same(whole[:, k], single)


@layers
def test_packed_gradient_reaches_the_input(kind):
    theirs, ours = pair(kind, 4, 6)
    grads = []
    padded = torch.randn(5, 3, 4)
    for module in (ours, theirs):
        x = detached(padded)
        packed = pack_padded_sequence(x, torch.tensor([2, 5, 3]), enforce_sorted=False)
        module(packed)[0].data.square().sum().backward()
        grads.append(x.grad)
    assert_same(*grads)


@layers
@backends
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_lengths(kind, backend, batch_first, as_list):
    """Each sequence as if it ran alone; zeros behind its end; a length of 0 keeps the state."""
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, 2, bidirectional=True, backend=backend)
    ours.batch_first = batch_first
    lengths = [2, 0, 5, 3]
    x = torch.randn(5, 4, 4)
    hx = state_for(kind, 4, 4, 6)
    given = x.transpose(0, 1) if batch_first else x
    out, state = ours(given, hx, lengths=lengths if as_list else torch.tensor(lengths))
    assert isinstance(state, tuple) == (kind == "LSTM")
    out = out.transpose(0, 1) if batch_first else out
    assert out.shape == (5, 4, 12)
    for k, n in enumerate(lengths):
        assert not out[n:, k].any()
        own = [s[:, k] for s in tensors(hx)]
        if n == 0:
            last = own
        else:
            alone, last = ours(x[:n, k], tuple(own) if kind == "LSTM" else own[0])
            assert_same(out[:n, k], alone)
        for whole, single in zip(tensors(state), tensors(list(tensors(last))), strict=True):
            assert_same(whole[:, k], single)


@layers
@backends
def test_lengths_without_state_and_gradients(kind, backend):
    """As torch.nn with packing; no gradient comes from behind an end, whatever stands there."""
    theirs, ours = pair(kind, 4, 6, 2, backend=backend)
    lengths = torch.tensor([2, 5, 3])
    x = torch.randn(5, 3, 4)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    out, state = theirs(packed)
    padded, _ = pad_packed_sequence(out)
    x[2:, 0] = float("nan")
    x.requires_grad_()
    mine, mine_state = ours(x, lengths=lengths)
    assert_same([mine, mine_state], [padded, state])
    padded.square().sum().backward()
    mine.square().sum().backward()
    assert_same_gradients(ours, theirs)
    assert not x.grad[2:, 0].any() and not x.grad[3:, 2].any() and x.grad[:2, 0].any()


@layers
@backends
def test_all_lengths_zero(kind, backend):
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, backend=backend)
    hx = state_for(kind, 1, 3, 6)
    out, state = ours(torch.randn(5, 3, 4), hx, lengths=[0, 0, 0])
    assert out.shape == (5, 3, 6) and not out.any()
    assert_same(state, hx)
    out, state = ours(torch.randn(5, 3, 4), lengths=[0, 0, 0])
    assert not any(t.any() for t in tensors(state))


@layers
def test_mistakes_in_lengths(kind):
    ours = getattr(fastseq, kind)(4, 6)
    x = torch.randn(5, 3, 4)
    with pytest.raises(ValueError, match=r"lengths: expected one a sequence, \(3,\), got \(2,\)"):
        ours(x, lengths=[5, 5])
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to T = 5, got 1 to 6"):
        ours(x, lengths=[6, 1, 1])
    with pytest.raises(ValueError, match=r"lengths: expected values from 0 to T = 5, got -1 to 5"):
        ours(x, lengths=torch.tensor([5, -1, 5]))
    with pytest.raises(TypeError, match=r"lengths: expected integers, got torch.float32"):
        ours(x, lengths=torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="lengths: expected a batched 3-D input"):
        ours(x[:, 0], lengths=[5])
    with pytest.raises(ValueError, match="lengths: a PackedSequence has its own"):
        ours(pack_padded_sequence(x, torch.tensor([5, 3, 2])), lengths=[5, 3, 2])
    with pytest.raises(TypeError, match=r"lengths"):
        ours(x, lengths=[1.5, 2.0, 3.0])


PACKED_MISTAKES = {
    "feature size": (
        lambda m, k: m(pack_sequence(sequences((5, 2), 7))),
        RuntimeError,
        r"input.size\(-1\) must be equal to input_size. Expected 4, got 7",
    ),
    "dtype": (
        lambda m, k: m(pack_sequence([s.double() for s in sequences((5, 2))])),
        ValueError,
        r"RNN input dtype \(torch.float64\) does not match",
    ),
    "rank of the data": (
        lambda m, k: m(PackedSequence(torch.randn(3, 2, 4), torch.tensor([2, 1]))),
        RuntimeError,
        "input must have 2 dimensions, got 3",
    ),
    "rank of the state": (
        lambda m, k: m(pack_sequence(sequences((5, 2))), state_for(k, 2, 6)),
        RuntimeError,
        "For batched 3-D input, hx ",
    ),
    "batch of the state": (
        lambda m, k: m(pack_sequence(sequences((5, 2))), state_for(k, 2, 3, 6)),
        RuntimeError,
        r"size \(2, 2, 6\), got \[2, 3, 6\]",
    ),
    "batch of the state, smaller": (
        lambda m, k: m(pack_sequence(sequences((5, 2))), state_for(k, 2, 1, 6)),
        RuntimeError,
        r"size \(2, 2, 6\), got \[2, 1, 6\]",
    ),
    "size of the state": (
        lambda m, k: m(pack_sequence(sequences((5, 2))), state_for(k, 2, 2, 7)),
        RuntimeError,
        r"size \(2, 2, 6\), got \[2, 2, 7\]",
    ),
}


@layers
@pytest.mark.parametrize("mistake", PACKED_MISTAKES)
def test_mistakes_in_packed_calls(kind, mistake):
    """The same classes and words as of dense calls, where nn.LSTM fails in a product."""
    call, error, words = PACKED_MISTAKES[mistake]
    with pytest.raises(error, match=words):
        call(getattr(fastseq, kind)(4, 6, 2), kind)


@pytest.mark.parametrize("sizes", [[1, 2], [2, 2], [3, 1, -1], [2, 0, 1], [2]])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_a_packed_sequence_that_does_not_add_up(name, sizes):
    """torch.nn raises RuntimeError for most of these; kernels would read beyond the input."""
    m = getattr(fastseq, name)(3, 4)
    packed = nn.utils.rnn.PackedSequence(torch.randn(3, 3), torch.tensor(sizes))
    with pytest.raises(RuntimeError, match="batch_sizes: expected"):
        m(packed)
    with pytest.raises(RuntimeError, match="batch_sizes: expected a 1-D int64"):
        m(nn.utils.rnn.PackedSequence(torch.randn(3, 3), torch.tensor([2.0, 1.0])))


def jagged(parts):
    return torch.nested.as_nested_tensor(parts, layout=torch.jagged)


FORMS = {
    "packed": lambda parts: ((pack_sequence(parts, enforce_sorted=False),), {}),
    "packed in order": lambda parts: ((pack_sequence(parts),), {}),
    "padded": lambda parts: (
        (nn.utils.rnn.pad_sequence(parts),),
        {"lengths": [len(part) for part in parts]},
    ),
    "jagged": lambda parts: ((jagged(parts),), {}),
}


@pytest.mark.parametrize("memory", ["full", "lean"])  # lean: layer by layer
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
@backends
def test_what_is_returned_may_be_edited_before_backward(kind, backend, form, memory):
    if (backend, memory) == ("torch", "lean"):
        pytest.skip("torch keeps all gates")
    needs(backend)
    m = getattr(fastseq, kind)(4, 6, backend=backend, memory=memory)
    given, keywords = FORMS[form](sequences((5, 3, 1)))

    def gradients(edit):
        m.zero_grad()
        y, h = m(*given, **keywords)
        y = y.data if isinstance(y, PackedSequence) else y.values() if y.is_nested else y
        y, h = edit(y), edit(h)
        (y.square().sum() + h.square().sum()).backward()
        return [p.grad.clone() for p in m.parameters()]

    ours, expected = gradients(lambda t: t.mul_(2)), gradients(lambda t: t * 2)
    assert all(map(torch.equal, ours, expected))
