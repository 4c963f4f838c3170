"""Calls of the modules: what torch.nn accepts, returns and refuses, on every backend."""

import copy
import itertools

import pytest
import torch
from rules import check_close, same_bits
from torch import nn
from torch.nn.utils.rnn import (
    pack_sequence,
    pad_packed_sequence,
)
from twins import (
    BACKENDS,
    CELLS,
    KINDS,
    LAYERS,
    assert_same,
    assert_same_gradients,
    cast,
    caught,
    compare,
    needs,
    pair,
    state_for,
    tensors,
)

import fastseq

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

layers = pytest.mark.parametrize("kind", LAYERS)
cells = pytest.mark.parametrize("kind", CELLS)
kinds = pytest.mark.parametrize("kind", KINDS)
backends = pytest.mark.parametrize("backend", BACKENDS)

SHAPES = {"dense": (5, 3, 4), "batch of one": (5, 1, 4), "one step": (1, 3, 4), "unbatched": (5, 4)}


@layers
@backends
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("with_state", [False, True])
def test_dense(kind, backend, shape, with_state):
    theirs, ours = pair(kind, 4, 6, num_layers=2, bidirectional=True, backend=backend)
    x = torch.randn(SHAPES[shape])
    hx = state_for(kind, 4, *x.shape[1:-1], 6) if with_state else None
    out, state = compare(ours, theirs, x, hx)
    assert out.shape == (*x.shape[:-1], 12)
    assert isinstance(state, tuple) == (kind == "LSTM")


@layers
@backends
@pytest.mark.parametrize("unbatched", [False, True])
def test_batch_first(kind, backend, unbatched):
    """Input and output are batch first; the state never is; unbatched input has no batch."""
    theirs, ours = pair(kind, 4, 6, num_layers=2, batch_first=True, backend=backend)
    x = torch.randn(5, 4) if unbatched else torch.randn(3, 5, 4)
    hx = state_for(kind, 2, 6) if unbatched else state_for(kind, 2, 3, 6)
    compare(ours, theirs, x, hx)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
@backends
def test_rnn_options(nonlinearity, bias, backend):
    theirs, ours = pair("RNN", 4, 6, nonlinearity=nonlinearity, bias=bias, backend=backend)
    compare(ours, theirs, torch.randn(5, 3, 4), torch.randn(1, 3, 6))


@backends
@pytest.mark.parametrize("bias", [True, False])
def test_projection(backend, bias):
    theirs, ours = pair(
        "LSTM", 4, 6, 2, bias=bias, bidirectional=True, proj_size=3, backend=backend
    )
    hx = torch.randn(4, 3, 3), torch.randn(4, 3, 6)
    compare(ours, theirs, torch.randn(5, 3, 4), hx)


@cells
@backends
@pytest.mark.parametrize("shape", [(3, 4), (1, 4), (4,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_state", [False, True])
def test_cells(kind, backend, shape, bias, with_state):
    theirs, ours = pair(kind, 4, 6, bias, backend=backend)
    hx = state_for(kind, *shape[:-1], 6) if with_state else None
    compare(ours, theirs, torch.randn(shape), hx)


@backends
def test_relu_cell(backend):
    theirs, ours = pair("RNNCell", 4, 6, nonlinearity="relu", backend=backend)
    compare(ours, theirs, torch.randn(3, 4), torch.randn(3, 6))


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_lstm_state_is_a_list_or_a_tuple(kind):
    _, ours = pair(kind, 4, 6)
    x = torch.randn(5, 3, 4) if kind == "LSTM" else torch.randn(3, 4)
    hx = state_for(kind, *([1] if kind == "LSTM" else []), 3, 6)
    a, b = ours(x, hx), ours(x, list(hx))
    assert all(torch.equal(p, q) for p, q in zip(tensors(a), tensors(b), strict=True))
    state = a[1] if kind == "LSTM" else a
    assert type(state) is tuple and type(b) is tuple


# -- empty batches


@layers
@backends
@pytest.mark.parametrize("with_state", [False, True])
def test_batch_of_none(kind, backend, with_state):
    theirs, ours = pair(kind, 4, 6, 2, bidirectional=True, backend=backend)
    hx = state_for(kind, 4, 0, 6) if with_state else None
    out, _ = compare(ours, theirs, torch.randn(5, 0, 4), hx)
    assert out.shape == (5, 0, 12)


@cells
@backends
def test_cell_batch_of_none(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    compare(ours, theirs, torch.randn(0, 4), state_for(kind, 0, 6))


@layers
@backends
def test_no_steps(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    for x in (torch.randn(0, 3, 4), torch.randn(0, 4)):
        same_error(lambda x=x: ours(x), lambda x=x: theirs(x), "Expected sequence length to be ")


# -- dropout


@layers
@backends
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_is_torchs_between_single_layers(kind, backend, bidirectional):
    """Bit for bit under one seed, and read from the module at each call; of one step, too, which
    torch's layers run by its cells."""
    options = {"bidirectional": bidirectional, "backend": backend}
    needs(backend)
    stack = getattr(fastseq, kind)(4, 6, 3, dropout=0.1, **options)
    stack.dropout = 0.5
    singles = []
    for k in range(3):
        width = 4 if k == 0 else 6 * (1 + bidirectional)
        singles.append(getattr(fastseq, kind)(width, 6, **options))
        singles[-1].load_state_dict(
            {
                name.replace(f"_l{k}", "_l0"): value
                for name, value in stack.state_dict().items()
                if f"_l{k}" in name
            }
        )
    for steps in (1, 5):
        x = torch.randn(steps, 3, 4)
        torch.manual_seed(11)
        out, state = stack(x)
        torch.manual_seed(11)
        y, finals = x, []
        for k, single in enumerate(singles):
            y, last = single(torch.dropout(y, 0.5, True) if k else y)
            finals.append(tensors(last))
        assert torch.equal(out, y)
        for whole, parts in zip(tensors(state), zip(*finals, strict=True), strict=True):
            assert torch.equal(whole, torch.cat(parts))
    stack.eval()
    again = stack(x)[0]
    assert torch.equal(again, stack(x)[0]) and not torch.equal(again, out)
    stack.train()
    stack.dropout = 0.0
    assert torch.equal(stack(x)[0], again)
    stack.dropout = 1.0
    torch.manual_seed(0)
    assert torch.equal(stack(x)[0], stack(x + 1)[0])  # nothing passes


@layers
def test_dropout_of_torch_nn(kind):
    """Under one seed, torch.nn's own numbers on the CPU."""
    theirs, ours = pair(kind, 4, 6, 3, dropout=0.5, backend="eager")
    x = torch.randn(5, 3, 4)
    torch.manual_seed(3)
    a = ours(x)
    torch.manual_seed(3)
    assert_same(a, theirs(x))


# -- backward


@kinds
@backends
def test_backward_in_eval_mode(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    theirs.eval()
    ours.eval()
    compare(ours, theirs, torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4))


@kinds
@backends
def test_nothing_that_is_given_is_written(kind, backend):
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, backend=backend)
    lead = (1,) if kind in LAYERS else ()
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    hx = state_for(kind, *lead, 3, 6)
    given = [x, *tensors(hx), *ours.parameters()]
    copies = [t.detach().clone() for t in given]
    versions = [t._version for t in given]
    out = tensors(ours(x, hx))
    grads = [torch.randn_like(t) for t in out]
    kept = [g.clone() for g in grads]
    torch.autograd.backward(out, grads)
    for before, after in zip(copies + kept, given + grads, strict=True):
        assert torch.equal(before, after)
    assert versions == [t._version for t in given]
    storages = {t.untyped_storage().data_ptr() for t in given}
    assert not storages & {t.untyped_storage().data_ptr() for t in out}


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
@backends
def test_on_meta(kind, backend):
    """Shapes without numbers, which a kernel must not look for."""
    _, ours = pair(kind, 4, 6, backend=backend)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    expected = tensors(ours(x))
    found = tensors(ours.to("meta")(x.to("meta")))
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
    assert all(t.is_meta for t in found)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_wrong_input_is_told_before_a_backend_that_declines(kind):
    m = getattr(fastseq, kind)(4, 6, backend="triton")  # which declines the CPU
    with pytest.raises(ValueError, match="Expected input to be"):
        m(torch.randn(5, 3, 2, 4))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTMCell", "GRUCell"])
@backends
def test_output_may_be_edited_before_backward(kind, backend):
    """Not nn.LSTM's nor nn.RNNCell's, on the CPU; those have a test of their own."""
    theirs, ours = pair(kind, 4, 6, backend=backend)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    for module in (ours, theirs):
        out = tensors(module(x))
        for tensor in out:
            tensor.mul_(2)
        sum(t.square().sum() for t in out).backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("kind", ["LSTM", "RNNCell"])
@backends
def test_output_edited_before_backward_is_right_or_an_error(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    x = torch.randn(5, 3, 4) if kind == "LSTM" else torch.randn(3, 4)
    (tensors(theirs(x))[0] * 2).sum().backward()
    out = tensors(ours(x))[0]
    error = caught(lambda: out.mul_(2).sum().backward())
    if error is None:
        assert_same_gradients(ours, theirs)
    else:
        assert "modified" in str(error) and "inplace" in str(error)


@layers
@backends
@pytest.mark.parametrize("T", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_states_are_memory_of_their_own(kind, backend, T, dtype):
    """Each may be edited before backward, and leaves the other as it was."""
    ours = pair(kind, 4, 6, backend=backend)[1].to(dtype)
    x = torch.randn(T, 3, 4, dtype=dtype)
    y, state = ours(x)
    finals, before = tensors(state), y.detach().clone()
    for final in finals:
        final.detach().fill_(9)
    assert torch.equal(y, before)
    y.float().sum().backward()
    edited = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    y, state = ours(x)
    y.float().sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(ours.parameters(), edited, strict=True))
    with torch.no_grad():
        y, state = ours(x)
        kept = [final.clone() for final in tensors(state)]
        y.fill_(9)
    assert all(map(torch.equal, tensors(state), kept))
    if kind != "LSTM":
        y, _ = ours(x)
        y.mul_(1).float().sum().backward()


@kinds
@pytest.mark.parametrize("training", [True, False])
def test_input_without_dimensions(kind, training):
    theirs, ours = pair(kind, 4, 6)
    for module in (theirs, ours):
        with torch.set_grad_enabled(training), pytest.raises(ValueError, match=r"to be .D or .D"):
            module(torch.tensor(1.0))


@kinds
@pytest.mark.parametrize("what", ["input", "state", "weight", "packed"])
def test_sparse_tensors(kind, what):
    """torch's own function says what it takes of them."""
    results = []
    for module in pair(kind, 4, 6):
        lead = (1, 3) if kind in LAYERS else (3,)
        x, hx = torch.ones(5, 3, 4), state_for(kind, *lead, 6)
        given = x if kind in LAYERS else x[0]
        hx = tuple(torch.ones_like(h) for h in hx) if isinstance(hx, tuple) else torch.ones_like(hx)
        if what == "input":
            given = given.to_sparse()
        elif what == "state":
            hx = tuple(h.to_sparse() for h in hx) if isinstance(hx, tuple) else hx.to_sparse()
        elif what == "packed" and kind in LAYERS:
            given = pack_sequence([x[:, 0], x[:3, 1], x[:1, 2]])
            given = given._replace(data=given.data.to_sparse())
        else:
            name = "weight_hh_l0" if kind in LAYERS else "weight_hh"
            setattr(module, name, nn.Parameter(getattr(module, name).detach().to_sparse()))
        error = caught(lambda m=module, x=given, hx=hx: results.append(m(x, hx)))
        if error is not None:
            results.append(type(error))
    if isinstance(results[0], type):
        assert results[1] is results[0]
    else:
        assert_same(results[1], results[0])


@layers
@backends
def test_strided_input(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    wide = torch.randn(3, 10, 8)
    x = wide.transpose(0, 1)[::2, :, ::2]
    hx = state_for(kind, 3, 1, 6)
    hx = tuple(s.transpose(0, 1) for s in hx) if kind == "LSTM" else hx.transpose(0, 1)
    assert not x.is_contiguous()
    assert_same(ours(x, hx), theirs(x, hx))


# -- reset


@layers
@pytest.mark.parametrize("backend", [None, "eager", "numba"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_reset(kind, backend, batch_first):
    """The pieces between resets are sequences of their own, in either direction."""
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, bidirectional=True, backend=backend)
    x = torch.randn(6, 2, 4)
    hx = state_for(kind, 2, 2, 6)
    reset = torch.zeros(6, 2, dtype=torch.bool)
    reset[2, 0] = reset[5, 0] = reset[4, 1] = True
    ours.batch_first = batch_first
    if batch_first:
        out, state = ours(x.transpose(0, 1), hx, reset=reset.transpose(0, 1))
        out = out.transpose(0, 1)
    else:
        out, state = ours(x, hx, reset=reset)
    finals = tensors(state)
    for k, cuts in enumerate(([0, 2, 5, 6], [0, 4, 6])):
        pieces = list(itertools.pairwise(cuts))
        for start, stop in pieces:
            own = [torch.zeros_like(s[:, k]) for s in tensors(hx)]
            for mine, given in zip(own, tensors(hx), strict=True):
                if start == 0:
                    mine[0] = given[0, k]  # forward in time begins with the state
                if stop == 6:
                    mine[1] = given[1, k]  # backward in time begins at the end
            alone, last = ours(x[start:stop, k], tuple(own) if kind == "LSTM" else own[0])
            assert_same(out[start:stop, k], alone)
            for whole, single in zip(finals, tensors(last), strict=True):
                if stop == 6:
                    assert_same(whole[0, k], single[0])
                if start == 0:
                    assert_same(whole[1, k], single[1])


@layers
def test_reset_unbatched_and_packed(kind):
    ours = getattr(fastseq, kind)(4, 6)
    x = torch.randn(6, 4)
    reset = torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool)
    out, _ = ours(x, reset=reset)
    assert_same(out, torch.cat([ours(x[:2])[0], ours(x[2:])[0]]))
    other = torch.randn(3, 4)
    packed = pack_sequence([other, x], enforce_sorted=False)
    both = torch.stack([torch.zeros_like(reset), reset], 1)
    packed_out, _ = pad_packed_sequence(ours(packed, reset=both)[0])
    assert_same(packed_out[:, 1], out)
    assert_same(packed_out[:3, 0], ours(other)[0])
    ours.batch_first = True  # which says how reset lies, and nothing of packed rows
    turned, _ = ours(packed, reset=both.t())
    assert torch.equal(pad_packed_sequence(turned)[0], packed_out)


@layers
def test_mistakes_in_reset(kind):
    ours = getattr(fastseq, kind)(4, 6, batch_first=True)
    x = torch.randn(3, 5, 4)
    with pytest.raises(TypeError, match="reset: expected a bool tensor, got list"):
        ours(x, reset=[[True] * 5] * 3)
    with pytest.raises(TypeError, match=r"reset: expected torch.bool, got torch.int64"):
        ours(x, reset=torch.zeros(3, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"reset: expected \(T, B\) = \(5, 3\), got \(3, 5\)"):
        ours(x, reset=torch.zeros(5, 3, dtype=torch.bool))


@pytest.mark.parametrize("backend", [None, "eager", "numba"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_all_states(backend, batch_first):
    """The cell state of every step, of the last layer, and gradients through it."""
    needs(backend)
    ours = fastseq.LSTM(4, 6, 2, batch_first=batch_first, backend=backend)
    x = torch.randn(5, 3, 4)
    out, (_, c_n), c = ours(x.transpose(0, 1) if batch_first else x, all_states=True)
    assert c.shape == out.shape
    c = c.transpose(0, 1) if batch_first else c
    assert_same(c[-1], c_n[-1])
    _, (_, c_2) = ours(x.transpose(0, 1)[:, :2] if batch_first else x[:2])
    assert_same(c[1], c_2[-1])
    c.sum().backward()
    assert ours.weight_hh_l1.grad.any()


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_all_states_is_for_the_lstm(kind):
    with pytest.raises(ValueError, match="all_states: "):
        getattr(fastseq, kind)(4, 6)(torch.randn(5, 3, 4), all_states=True)


# -- autocast


@layers
@backends
@pytest.mark.parametrize("form", ["dense", "packed", "unbatched"])
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
def test_autocast_of_layers(kind, backend, form, state):
    """All outputs in autocast's type, whatever the state's; parameters' gradients in theirs."""
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, 2, backend=backend)
    x = torch.randn(5, 3, 4)
    batch = () if form == "unbatched" else (3,)
    given = {
        "dense": x,
        "packed": pack_sequence(list(x.transpose(0, 1))),
        "unbatched": x[:, 0],
    }[form]
    hx = None if state is None else state_for(kind, 2, *batch, 6, dtype=state)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(given, hx)
    assert {t.dtype for t in tensors(out)} == {torch.bfloat16}
    tensors(out)[0].float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in ours.parameters())
    theirs = getattr(nn, kind)(4, 6, 2)
    theirs.load_state_dict(ours.state_dict())

    def by_torch(dtype):
        state = None if hx is None else cast(hx, dtype)
        return copy.deepcopy(theirs).to(dtype)(cast(given, dtype), state)

    assert_same(out, by_torch(torch.bfloat16), by_torch(torch.float64))


@cells
@backends
@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
def test_autocast_of_cells(kind, backend, state):
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, backend=backend)
    x = torch.randn(3, 4)
    hx = None if state is None else state_for(kind, 3, 6, dtype=state)
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x, hx)
    assert {t.dtype for t in tensors(out)} == {torch.bfloat16}


@kinds
@pytest.mark.parametrize("backend", [None, "eager", "numba"])
@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_float16_on_the_cpu(kind, backend, form):
    """Forward and backward, by the rule of float16."""
    theirs, ours = pair(kind, 4, 6, backend=backend)
    truth = copy.deepcopy(theirs).double()
    x = torch.randn(40, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    for module, dtype in ((truth, torch.float64), (theirs.half(), torch.float16)):
        tensors(module(x.to(dtype)))[0].to(torch.float64).square().sum().backward()
    if form == "weights":
        ours, x = ours.half(), x.half()
    with torch.autocast("cpu", torch.float16, enabled=form == "autocast"):
        out = tensors(ours(x))
    assert {t.dtype for t in out} == {torch.float16}
    out[0].float().square().sum().backward()
    for (name, p), same, exact in zip(
        ours.named_parameters(), theirs.parameters(), truth.parameters(), strict=True
    ):
        assert p.grad.dtype is p.dtype
        check_close(p.grad.half(), same.grad, exact.grad, torch.float16, name)


@pytest.mark.parametrize("backend", [None, "eager", "numba"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["autocast", "weights"])
def test_the_cell_state_is_carried_in_float32(form, dtype, backend):
    """Steps of 0.0005 add up, where a sum of 16 bits would stand still."""
    needs(backend)
    ours = fastseq.LSTM(1, 1, backend=backend)
    with torch.no_grad():
        for p in ours.parameters():
            p.zero_()
        ours.bias_ih_l0.copy_(torch.tensor([0.0, 20.0, 0.001, 0.0]))  # i = 1/2, f = 1, g = 0.001
        x = torch.zeros(3000, 1, 1)
        if form == "weights":
            ours, x = ours.to(dtype), x.to(dtype)
        with torch.autocast("cpu", dtype, enabled=form == "autocast"):
            _, (_, c_n) = ours(x)
        _, (_, exact) = ours.double()(x.double())
    assert 1.4 < float(exact) < 1.6
    # torch's own, in 16 bits, stands still: its error would allow anything
    check_close(c_n, exact.to(dtype), exact, dtype, "c_n")


@layers
@pytest.mark.parametrize("backend", [None, "numba"])
def test_more_steps_than_cudnn_takes(kind, backend):
    """65,536 and more; in one call as in two."""
    needs(backend)
    ours = getattr(fastseq, kind)(2, 3, backend=backend)
    x = torch.randn(70_000, 1, 2)
    ours, x = ours.double(), x.double()
    whole, last = ours(x)
    first, state = ours(x[:100])
    rest, again = ours(x[100:], state)
    assert_same([whole, last], [torch.cat([first, rest]), again])
    whole[-1].sum().backward()
    short, _ = ours(x[-200:], tuple(s.detach() for s in state) if kind == "LSTM" else state)
    found = [p.grad.clone() for p in ours.parameters()]
    ours.zero_grad()
    short[-1].sum().backward()  # what lies further back has decayed
    assert_same(found, [p.grad for p in ours.parameters()])


@kinds
@backends
def test_backward_under_autocast(kind, backend):
    """Not advised, and done: the kernels' own types stay what they are."""
    needs(backend)
    ours = getattr(fastseq, kind)(4, 6, backend=backend)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    gradients = []
    for inside in (True, False):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = tensors(ours(x))[0].float().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([p.grad for p in ours.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert a.dtype is torch.float32
        assert same_bits(a, b)


@kinds
def test_autocast_leaves_float64_alone(kind):
    ours = getattr(fastseq, kind)(4, 6, dtype=torch.float64)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert {t.dtype for t in tensors(ours(x.double()))} == {torch.float64}
        low = getattr(fastseq, kind)(4, 6)
        with pytest.raises((ValueError, RuntimeError), match=r"torch.float64"):
            low(x.double())


# -- mistakes


def same_error(ours, theirs, words):
    mine, yours = caught(ours), caught(theirs)
    assert type(mine) is type(yours), f"{mine!r} against {yours!r}"
    assert words in str(yours) and words in str(mine), f"{mine} against {yours}"


def state(kind, *shape, **kwargs):
    return state_for(kind, *shape, **kwargs)


LAYER_MISTAKES = {
    "rank 1": (lambda m, k: m(torch.randn(4)), "Expected input to be 2D or 3D, got 1D"),
    "rank 4": (lambda m, k: m(torch.randn(2, 3, 3, 4)), "Expected input to be 2D or 3D, got 4D"),
    "feature size": (
        lambda m, k: m(torch.randn(5, 3, 7)),
        "input.size(-1) must be equal to input_size. Expected 4, got 7",
    ),
    "feature size, unbatched": (
        lambda m, k: m(torch.randn(5, 7)),
        "input.size(-1) must be equal to input_size. Expected 4, got 7",
    ),
    "dtype": (
        lambda m, k: m(torch.randn(5, 3, 4).double()),
        "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). Convert "
        "input: input.to(torch.float32), or convert model: model.to(torch.float64)",
    ),
    "integers": (
        lambda m, k: m(torch.ones(5, 3, 4, dtype=torch.int64)),
        "RNN input dtype (torch.int64)",
    ),
    "state of rank 2": (
        lambda m, k: m(torch.randn(5, 3, 4), state(k, 2, 6)),
        "For batched 3-D input, hx ",
    ),
    "state of rank 3, unbatched": (
        lambda m, k: m(torch.randn(5, 4), state(k, 2, 3, 6)),
        "For unbatched 2-D input, hx ",
    ),
    "state of another batch": (
        lambda m, k: m(torch.randn(5, 3, 4), state(k, 2, 1, 6)),
        "size (2, 3, 6), got [2, 1, 6]",
    ),
    "state of another size": (
        lambda m, k: m(torch.randn(5, 3, 4), state(k, 2, 3, 7)),
        "size (2, 3, 6), got [2, 3, 7]",
    ),
    "state of other layers": (
        lambda m, k: m(torch.randn(5, 3, 4), state(k, 1, 3, 6)),
        "size (2, 3, 6), got [1, 3, 6]",
    ),
    "no steps": (
        lambda m, k: m(torch.randn(0, 3, 4)),
        "Expected sequence length to be larger than 0 in RNN",
    ),
}


@layers
@backends
@pytest.mark.parametrize("mistake", LAYER_MISTAKES)
def test_mistakes(kind, backend, mistake):
    if mistake in ("dtype", "integers") and torch.__version__.startswith("2.10."):
        pytest.skip("torch 2.10 has other words for it")
    theirs, ours = pair(kind, 4, 6, 2, backend=backend)
    call, words = LAYER_MISTAKES[mistake]
    same_error(lambda: call(ours, kind), lambda: call(theirs, kind), words)


def test_words_of_the_lstms_states():
    theirs, ours = pair("LSTM", 4, 6)
    x, good = torch.randn(5, 3, 4), torch.randn(1, 3, 6)
    for k in (0, 1):
        hx = [good, good]
        hx[k] = torch.randn(1, 3, 7)
        words = f"Expected hidden[{k}] size (1, 3, 6), got [1, 3, 7]"
        same_error(lambda hx=hx: ours(x, hx), lambda hx=hx: theirs(x, hx), words)


@layers
@backends
def test_state_of_another_dtype(kind, backend):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    x, hx = torch.randn(5, 3, 4), state_for(kind, 1, 3, 6, dtype=torch.float64)
    assert isinstance(caught(lambda: theirs(x, hx)), RuntimeError)
    with pytest.raises(RuntimeError, match=r"Expected hidden state of dtype torch.float32"):
        ours(x, hx)


@pytest.mark.parametrize("kind", ["RNN", "GRU", "RNNCell", "GRUCell"])
def test_a_tuple_as_the_one_state(kind):
    theirs, ours = pair(kind, 4, 6)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    hx = (torch.randn(1, 3, 6), torch.randn(1, 3, 6))
    assert type(caught(lambda: theirs(x, hx))) is AttributeError
    with pytest.raises(AttributeError, match=r"hx: .* takes one tensor h.* as its state, got 2 "):
        ours(x, hx)


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("count", [0, 1, 3, "tensor", "int"])
def test_no_pair_as_the_lstms_state(kind, count):
    _, ours = pair(kind, 4, 6)
    x = torch.randn(5, 3, 4) if kind == "LSTM" else torch.randn(3, 4)
    good = torch.randn(1, 3, 6) if kind == "LSTM" else torch.randn(3, 6)
    hx = {"tensor": good, "int": 3}.get(count, (good,) * (count if isinstance(count, int) else 0))
    with pytest.raises(RuntimeError, match=r"a pair \(h"):
        ours(x, hx)


@layers
def test_input_that_is_no_tensor(kind):
    for value in (None, [torch.randn(5, 3, 4)]):
        with pytest.raises(TypeError, match="input: expected a Tensor or PackedSequence"):
            getattr(fastseq, kind)(4, 6)(value)


CELL_MISTAKES = {
    "rank 3": (lambda m, k: m(torch.randn(2, 3, 4)), "Expected input to be 1D or 2D, got 3D"),
    "rank 0": (lambda m, k: m(torch.tensor(1.0)), "Expected input to be 1D or 2D, got 0D"),
    "state of rank 3": (
        lambda m, k: m(torch.randn(3, 4), state(k, 1, 3, 6)),
        " to be 1D or 2D, got 3D instead",
    ),
    "feature size": (
        lambda m, k: m(torch.randn(3, 7)),
        "input has inconsistent input_size: got 7 expected 4",
    ),
    "state of another batch": (
        lambda m, k: m(torch.randn(3, 4), state(k, 2, 6)),
        "Input batch size 3 doesn't match hidden0 batch size 2",
    ),
    "state of another size": (
        lambda m, k: m(torch.randn(3, 4), state(k, 3, 7)),
        "hidden0 has inconsistent hidden_size: got 7, expected 6",
    ),
    "unbatched state of another size": (
        lambda m, k: m(torch.randn(4), state(k, 7)),
        "hidden0 has inconsistent hidden_size: got 7, expected 6",
    ),
    "unbatched state": (lambda m, k: m(torch.randn(3, 4), state(k, 6)), "hidden0"),
    "batched state": (lambda m, k: m(torch.randn(4), state(k, 3, 6)), "hidden0"),
    "dtype": (lambda m, k: m(torch.randn(3, 4).double()), "dtype"),
    "dtype of the state": (
        lambda m, k: m(torch.randn(3, 4), state(k, 3, 6, dtype=torch.float64)),
        "dtype",
    ),
}


@cells
@backends
@pytest.mark.parametrize("mistake", CELL_MISTAKES)
def test_mistakes_of_cells(kind, backend, mistake):
    theirs, ours = pair(kind, 4, 6, backend=backend)
    call, words = CELL_MISTAKES[mistake]
    same_error(lambda: call(ours, kind), lambda: call(theirs, kind), words)


def test_second_state_of_the_lstm_cell():
    theirs, ours = pair("LSTMCell", 4, 6)
    x, hx = torch.randn(3, 4), (torch.randn(3, 6), torch.randn(3, 7))
    words = "hidden1 has inconsistent hidden_size: got 7, expected 6"
    same_error(lambda: ours(x, hx), lambda: theirs(x, hx), words)


@kinds
def test_unknown_backend(kind):
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"backend: expected one of .*, got 'cobol'"):
        getattr(fastseq, kind)(4, 6, backend="cobol")(x)
    with pytest.raises(TypeError, match="backend: expected None, a name, or a tuple"):
        getattr(fastseq, kind)(4, 6, backend=3)(x)


@kinds
def test_devices_that_differ(kind):
    ours = getattr(fastseq, kind)(4, 6)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="device"):
        ours(x.to("meta"))
    hx = state_for(kind, *([1] if kind in LAYERS else []), 3, 6, device="meta")
    with pytest.raises(RuntimeError, match="device"):
        ours(x, hx)


@layers
@backends
@pytest.mark.parametrize("memory", ["full", "lean"])
def test_memory(kind, backend, memory):
    needs(backend)
    theirs = getattr(nn, kind)(4, 6, 2, bidirectional=True)
    ours = getattr(fastseq, kind)(4, 6, 2, bidirectional=True, memory=memory, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    if backend == "torch" and memory == "lean":
        with pytest.raises(NotImplementedError, match="memory='lean'"):
            ours(torch.randn(5, 3, 4))
        return
    compare(ours, theirs, torch.randn(5, 3, 4))
