"""One step at a time: the handle of fastseq.streaming, and the short way of a module."""

import copy

import pytest
import torch
from problems import full
from rules import check_close
from twins import cast

import fastseq
from fastseq.backends import load
from fastseq.nn import short as short_way

LAYERS = {"LSTM": fastseq.LSTM, "GRU": fastseq.GRU, "RNN": fastseq.RNN}
OPTIONS = [
    {},
    {"num_layers": 2},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "dropout": 0.5},
]


def states(state):
    return state if isinstance(state, tuple) else (state,)


def close(ours, theirs, dtype, truth=None):
    """By the rule, with the same numbers in float64 where they are given."""
    assert ours.dtype == dtype
    check_close(ours, theirs, (theirs if truth is None else truth).double(), dtype, "")


@pytest.fixture(params=["native", "eager"])
def backend(request):
    """A handle of packed weights, and one that runs the module."""
    if isinstance(load(request.param), str):
        pytest.skip(load(request.param))
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "layers", "unbiased", "dropout"])
@pytest.mark.parametrize("kind", LAYERS)
def test_steps_are_those_of_the_module(kind, options, dtype, backend):
    m = LAYERS[kind](5, 7, dtype=dtype, backend=backend, **options)
    handle = fastseq.streaming(m, batch=3)
    assert m.training
    x = torch.randn(6, 3, 5, dtype=dtype)
    steps = torch.stack([handle.step(row).clone() for row in x])
    m.eval()
    with torch.no_grad():
        y, state = m(x.transpose(0, 1) if m.batch_first else x)
    close(steps, y.transpose(0, 1) if m.batch_first else y, dtype)
    for ours, theirs in zip(states(handle.state), states(state), strict=True):
        close(ours, theirs, dtype)


def test_projection(backend):
    m = fastseq.LSTM(5, 7, proj_size=3, num_layers=2, backend=backend)
    handle = fastseq.streaming(m)
    x = torch.randn(4, 1, 5)
    with torch.no_grad():
        y, _ = m(x)
    steps = torch.stack([handle.step(row).clone() for row in x])
    close(steps, y, torch.float32, copy.deepcopy(m).double()(x.double())[0])


def test_rows_begin_anew(backend):
    m = fastseq.LSTM(5, 7, backend=backend)
    x = torch.randn(5, 4, 5)
    reset = torch.zeros(5, 4, dtype=torch.bool)
    reset[2, 1] = reset[2, 3] = reset[4, 0] = True
    with torch.no_grad():
        y, _ = m(x, reset=reset)
    handle = fastseq.streaming(m, batch=4)
    for t in range(5):
        handle.reset(reset[t] if t % 2 else reset[t].nonzero()[:, 0].tolist())
        close(handle.step(x[t]), y[t], torch.float32)
    handle.reset()
    close(handle.step(x[0]), y[0], torch.float32)


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([True, False, True, False]), None])
@pytest.mark.parametrize("kind", LAYERS)
def test_all_layers_of_a_row_begin_anew(kind, rows, backend):
    """h and c of every layer are zero in the rows that are named, and as they were in all others;
    so it is with the steps that follow."""
    m = LAYERS[kind](5, 7, num_layers=3, backend=backend)
    for steps in (1, 2):  # either of the two buffers holds the state
        handle = fastseq.streaming(m, batch=4)
        for x in torch.randn(steps, 4, 5):
            handle.step(x)
        before = states(handle.state)
        assert all(bool(s.all(-1).all()) for s in before)
        handle.reset(rows)
        gone = [0, 2] if rows is not None else [0, 1, 2, 3]
        expected = [s.index_fill(1, torch.tensor(gone), 0.0) for s in before]
        for found, wanted in zip(states(handle.state), expected, strict=True):
            assert found.shape[0] == 3
            assert torch.equal(found, wanted)
        x = torch.randn(4, 5)
        with torch.no_grad():
            y, _ = m(x[None], tuple(expected) if kind == "LSTM" else expected[0])
        close(handle.step(x), y[0], torch.float32)


def test_the_state_is_handed_over(backend):
    for kind, layer in LAYERS.items():
        m = layer(5, 7, num_layers=2, backend=backend)
        x = torch.randn(6, 2, 5)
        with torch.no_grad():
            y, _ = m(x)
            _, state = m(x[:3])
        handle = fastseq.streaming(m, batch=2)
        handle.state = state
        for t in range(3, 6):
            close(handle.step(x[t]), y[t], torch.float32)
            copy = handle.state
            before = states(copy)[0].clone()
            handle.step(x[t])
            assert torch.equal(states(copy)[0], before), kind
            handle.state = copy


def test_weights_are_read_again_when_told(backend):
    m = fastseq.GRU(5, 7, backend=backend)
    handle = fastseq.streaming(m, batch=2)
    x = torch.randn(3, 2, 5)
    handle.step(x[0])
    with torch.no_grad():
        for p in m.parameters():
            p.mul_(0.5)
    handle.refresh()
    state = handle.state
    with torch.no_grad():
        y, _ = m(x[1:2], state)
    close(handle.step(x[1]), y[0], torch.float32)
    handle.refresh()
    with torch.no_grad():
        y, _ = m(x[2:], handle.state)
    close(handle.step(x[2]), y[0], torch.float32)


def test_the_output_stays_for_one_more_step():
    m = fastseq.LSTM(5, 7)
    handle = fastseq.streaming(m, batch=2)
    first = handle.step(torch.randn(2, 5))
    kept = first.clone()
    second = handle.step(torch.randn(2, 5))
    assert torch.equal(first, kept) and not torch.equal(first, second)


def test_strided_input_and_gradients():
    m = fastseq.LSTM(5, 7)
    handle, again = fastseq.streaming(m, batch=2), fastseq.streaming(m, batch=2)
    wide = torch.randn(5, 2, requires_grad=True)
    y = handle.step(wide.t())
    assert not y.requires_grad
    close(y, again.step(wide.t().contiguous()), torch.float32)
    rows = torch.randn(2, 9)
    close(handle.step(rows[:, 2:7]), again.step(rows[:, 2:7].clone()), torch.float32)


def test_sixteen_bits_run_the_module():
    m = fastseq.LSTM(5, 7, dtype=torch.bfloat16)
    handle = fastseq.streaming(m, batch=2)
    x = torch.randn(3, 2, 5, dtype=torch.bfloat16)
    ys = [handle.step(row).clone() for row in x]
    assert ys[0].dtype is torch.bfloat16
    with torch.no_grad():
        close(torch.stack(ys), m(x)[0], torch.bfloat16)


def test_mistakes():
    m = fastseq.LSTM(5, 7)
    handle = fastseq.streaming(m, batch=2)
    with pytest.raises(
        ValueError, match=r"x: expected \(batch, input_size\) = \(2, 5\), got \(3, 5\)"
    ):
        handle.step(torch.randn(3, 5))
    with pytest.raises(ValueError, match=r"x: expected .*\(2, 5\), got \(2, 1, 5\)"):
        handle.step(torch.randn(2, 1, 5))
    with pytest.raises(ValueError, match="got list"):
        handle.step([1.0])
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 on cpu, got torch\.float64"):
        handle.step(torch.randn(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="bidirectional"):
        fastseq.streaming(fastseq.GRU(5, 7, bidirectional=True))
    for batch in (0, -1, 1.5, True, None):
        with pytest.raises(ValueError, match="batch: expected an int of at least 1"):
            fastseq.streaming(m, batch)
    with pytest.raises(TypeError, match="module: expected a layer of fastseq, got LSTM"):
        fastseq.streaming(torch.nn.LSTM(5, 7))


# The short way

needs_native = pytest.mark.skipif(isinstance(load("native"), str), reason=str(load("native")))


def short(module, *given):
    """What the short way returns, None where it leaves the call to the long one."""
    with torch.no_grad():
        return short_way.layers(module, *given)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_short_way_is_as_torch(kind, directions, T, dtype):
    options = {"num_layers": 2, "bidirectional": directions == 2, "dtype": dtype}
    for more in ({}, {"batch_first": True}, {"bias": False}):
        ours = LAYERS[kind](5, 7, **options, **more)
        theirs = getattr(torch.nn, kind)(5, 7, **options, **more)
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(T, 3, 5, dtype=dtype)
        x = x.transpose(0, 1) if ours.batch_first else x
        h = torch.randn(2 * directions, 3, 7, dtype=dtype)
        exact = copy.deepcopy(theirs).double()
        for hx in (None, (h, h.flip(0)) if kind == "LSTM" else h):
            got = short(ours, x, hx)
            with torch.no_grad():
                y, state = theirs(x, hx)
                wide, last = exact(x.double(), None if hx is None else cast(hx, torch.float64))
            close(got[0], y, dtype, wide)
            for a, b, c in zip(*map(states, (got[1], state, last)), strict=True):
                close(a, b, dtype, c)
        row = x[0] if ours.batch_first else x[:, 0]
        got = short(ours, row, None)
        with torch.no_grad():
            y, state = theirs(row)
            close(got[0], y, dtype, exact(row.double())[0])
        assert [s.shape for s in states(got[1])] == [s.shape for s in states(state)]


@needs_native
def test_what_is_not_plain_goes_the_long_way():
    m = fastseq.LSTM(5, 7, num_layers=2)
    x = torch.randn(4, 3, 5)
    h = torch.zeros(2, 3, 7)
    assert short(m, x, None) is not None
    for given in ((h, h), [h, h], (h[:, :1].expand(2, 3, 7), h)):
        assert short(m, x, given) is not None
    for given in (
        (x.double(), None),
        (x[..., :4], None),
        (x[:0], None),
        (x[:, :0], None),
        (x.to("meta"), None),
        (torch.randn(4, 3, 2, 5), None),
        (x, h),
        (x, [h]),
        (x, (h, h[:1])),
        (x, (h, h.double())),
        (x, (h, None)),
        (x.as_subclass(torch.nn.Buffer), None),
        (torch._neg_view(x), None),
        ("x", None),
    ):
        assert short(m, *given) is None, given
    with torch.autocast("cpu"):
        assert short(m, x, None) is None
    with torch.profiler.profile():
        assert short(m, x, None) is None
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        assert short(m, x, None) is None
    seen = []
    torch.func.vmap(lambda row: seen.append(short(m, row, None)) or row, in_dims=1)(x)
    assert seen == [None]
    m.fastseq.backend = "eager"
    assert short(m, x, None) is None
    m.fastseq.backend = None
    m.fastseq.memory = "lean"
    assert short_way.layers(m, x, None) is None  # wants gradients
    assert short(m, x, None) is not None
    m.fastseq.memory = "full"
    torch.nn.utils.parametrizations.weight_norm(m, "weight_hh_l0")
    assert short(m, x, None) is None


@needs_native
@full
def test_steps_keep_no_memory():
    """A long stream holds what it held at its start."""
    import resource

    m = fastseq.LSTM(64, 64)
    handle = fastseq.streaming(m)
    x = torch.randn(1, 64)
    for _ in range(1000):
        handle.step(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(200_000):
        handle.step(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KB
