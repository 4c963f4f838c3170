"""One step at a time: the handle of fastseq.streaming, and the short way of a module."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy
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


def edited(y):
    """What users do to an output."""
    torch.relu_(y).mul_(0.5).add_(1.0)
    return y


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_are_the_callers(kind, layers, B, backend):
    """They keep their numbers, and may be edited, which no later step notices."""
    m = LAYERS[kind](5, 7, num_layers=layers, backend=backend).eval()
    xs = torch.randn(5, B, 5)
    with torch.no_grad():
        y, state = m(xs)
    handle = fastseq.streaming(m, B)
    kept = [handle.step(x) for x in xs]
    close(torch.stack(kept), y, torch.float32)
    again = fastseq.streaming(m, B)
    for x, row in zip(xs, y, strict=True):
        found = again.step(x)
        close(found, row, torch.float32)
        edited(found)
    for ours, theirs in zip(states(again.state), states(state), strict=True):
        close(ours, theirs, torch.float32)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_buffer_of_the_callers(kind, backend):
    """Contiguous or not, negated lazily, the input itself: it takes the step's output."""
    m = LAYERS[kind](7, 7, num_layers=2, backend=backend).eval()
    x = torch.randn(3, 7)
    expected, following = fastseq.streaming(m, 3), torch.randn(3, 7)
    first, second = expected.step(x), expected.step(following)
    for make in (
        lambda: torch.empty(3, 7),
        lambda: torch.empty(3, 14)[:, ::2],
        lambda: torch._neg_view(torch.empty(3, 7)),
        lambda: torch.empty(4, 7)[1:],
        lambda: torch.empty(3, 7).as_subclass(torch.nn.Buffer),
    ):
        handle, out = fastseq.streaming(m, 3), make()
        version = out._version
        assert handle.step(x, out=out) is out
        assert torch.equal(out, first)
        assert out._version > version
        edited(out)
        assert torch.equal(handle.step(following, out), second)
    handle, itself = fastseq.streaming(m, 3), x.clone()
    assert torch.equal(handle.step(itself, out=itself), first)
    assert torch.equal(handle.step(following), second)
    for given in (
        torch.empty(3, 6),
        torch.empty(7),
        torch.empty(1, 3, 7),
        torch.empty(3, 7, dtype=torch.float64),
        torch.empty(3, 7, device="meta"),
        [0.0],
        torch.empty(3, 7, requires_grad=True),
    ):
        handle = fastseq.streaming(m, 3)
        with pytest.raises(ValueError, match="out: "):
            handle.step(x, out=given)
        assert torch.equal(handle.step(x), first)  # nothing was done


def test_a_buffer_that_backward_needs():
    """Autograd is told that it was written to."""
    handle = fastseq.streaming(fastseq.LSTM(5, 7), 2)
    out, w = torch.zeros(2, 7), torch.ones(7, requires_grad=True)
    loss = (out * w).sum()
    handle.step(torch.randn(2, 5), out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_mode_and_outside(kind, backend):
    m = LAYERS[kind](5, 7, backend=backend)
    xs = torch.randn(4, 2, 5)
    whole = fastseq.streaming(m, 2)
    expected = [whole.step(x) for x in xs]
    for made, first, then in ((True, True, False), (True, False, True), (False, True, False)):
        with torch.inference_mode(made):
            handle = fastseq.streaming(m, 2)
            handle.refresh()
        for mode, two in ((first, (0, 1)), (then, (2, 3))):
            with torch.inference_mode(mode):
                handle.refresh()
                for t in two:
                    out = torch.empty(2, 7) if t % 2 else None
                    assert torch.equal(handle.step(xs[t], out), expected[t])
                handle.state = handle.state
                handle.reset([])
    with torch.inference_mode():
        inside = torch.empty(2, 7)
    handle.reset()
    assert torch.equal(handle.step(xs[0], inside), expected[0])
    with torch.inference_mode():
        again = copy.deepcopy(handle)
    assert torch.equal(again.step(xs[1]), expected[1])
    again.reset(1)


class Server(torch.nn.Module):
    def __init__(self, kind, backend):
        super().__init__()
        self.rnn = LAYERS[kind](5, 7, num_layers=2, backend=backend)
        self.live = fastseq.streaming(self.rnn, 2)


class Circle(fastseq.GRU):
    """A layer that holds its own handle."""


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))


def by_torch(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_processes(value):
    """As torch.multiprocessing sends it, with tensors in memory that is shared."""
    return pickle.loads(bytes(ForkingPickler.dumps(value)))


WAYS = [copy.deepcopy, by_pickle, by_torch, by_processes]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", LAYERS)
def test_copies(kind, way, backend):
    """A copy goes on where the handle is, on weights and a state of its own."""
    server = Server(kind, backend)
    xs = torch.randn(4, 2, 5)
    server.live.step(xs[0])
    other = way(server)
    assert other.live.module is other.rnn and other.rnn is not server.rnn
    alone = way(server.live)
    expected = [server.live.step(x) for x in xs[1:]]
    server.live.reset()
    if way is not by_processes:  # which share the weights, as torch.multiprocessing has it
        with torch.no_grad():
            for w in server.rnn.parameters():
                w.zero_()
        server.live.refresh()
    for handle in (other.live, alone):
        for x, y in zip(xs[1:], expected, strict=True):
            assert torch.equal(handle.step(x), y)
    assert not any(s.any() for s in states(server.live.state))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_of_a_layer_that_holds_its_handle(way, backend):
    m = Circle(5, 7, backend=backend)
    m.live = fastseq.streaming(m, 2)
    x = torch.randn(2, 5)
    other = way(m)
    assert other.live.module is other
    assert torch.equal(other.live.step(x), m.live.step(x))


def test_a_copy_of_a_copy_that_has_not_stepped(backend):
    m = fastseq.GRU(5, 7, backend=backend)
    handle = fastseq.streaming(m, 2)
    x = torch.randn(2, 5)
    handle.step(x)
    other = copy.copy(copy.deepcopy(by_pickle(handle)))
    assert torch.equal(other.state, handle.state)
    other.state = other.state * 2
    other.reset(0)
    assert not torch.equal(other.state, handle.state)
    other.state = handle.state
    assert torch.equal(other.step(x), handle.step(x))


def test_devices_that_are_set():
    m = fastseq.LSTM(5, 7)
    x = torch.randn(2, 5)
    expected = fastseq.streaming(m, 2).step(x)
    with torch.device("meta"):
        handle = fastseq.streaming(m, 2)
        handle.refresh()
        assert torch.equal(handle.step(x), expected)
        handle.reset([0])
        handle.reset([True, True])
        assert torch.equal(handle.step(x), expected)
        again = copy.deepcopy(handle)
        again.reset()
        assert torch.equal(again.step(x), expected)
    assert all(s.device.type == "cpu" for s in handle.state)


def test_lazy_negation(backend):
    m = fastseq.LSTM(5, 7, backend=backend)
    x, h, c = torch.randn(2, 5), torch.randn(1, 2, 7), torch.randn(1, 2, 7)
    handle = fastseq.streaming(m, 2)
    handle.state = h, c
    expected = handle.step(x)
    handle.state = torch._neg_view(-h), torch._neg_view(-c)
    assert torch.equal(handle.step(torch._neg_view(-x)), expected)


def test_autocast(backend):
    """The step is made in the weights' type, of an input that autocast made."""
    m = fastseq.LSTM(5, 7, backend=backend)
    x = torch.randn(2, 5).bfloat16()
    handle, again = fastseq.streaming(m, 2), fastseq.streaming(m, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = handle.step(x)
        assert torch.equal(handle.step(x.float()), again.step(x.float()) * 0 + handle.state[0][-1])
    again.reset()
    assert y.dtype is torch.float32 and torch.equal(y, again.step(x.float()))
    with pytest.raises(ValueError, match=r"x: expected torch\.float32 on cpu, got torch\.bfloat16"):
        handle.step(x)


def test_weights_of_another_type_are_read_again(backend):
    m = fastseq.LSTM(5, 7, backend=backend)
    handle = fastseq.streaming(m, 2)
    x = torch.randn(2, 5)
    handle.step(x)
    m.double()
    handle.refresh()
    with torch.no_grad():
        y, _ = m(x.double()[None], handle.state)
    close(handle.step(x.double()), y[0], torch.float64)


class Doubled(fastseq.GRU):
    def forward(self, input, hx=None):
        y, h = super().forward(2 * input, hx)
        return y + 1, h


def test_a_forward_of_its_own():
    """A subclass's, the instance's, hooks, and options: a step is what the module makes of it."""
    x = torch.randn(3, 2, 5)

    def check(m, before=None):
        handle = before or fastseq.streaming(m, 2)
        with torch.no_grad():
            y, h = m.eval()(x, None)
        close(torch.stack([edited(handle.step(row)) for row in x]), edited(y), torch.float32)
        close(handle.state, h, torch.float32)

    check(Doubled(5, 7))
    m = fastseq.GRU(5, 7)
    own = m.forward
    m.forward = lambda input, hx=None: own(input + 1, hx)
    check(m)
    m = fastseq.GRU(5, 7)
    m.register_forward_pre_hook(lambda module, given: (-given[0], *given[1:]))
    check(m)
    m = fastseq.GRU(5, 7)
    m.register_forward_hook(lambda module, given, found: (found[0] * 3, found[1]))
    check(m)
    m = fastseq.GRU(5, 7)
    handle = fastseq.streaming(m, 2)
    m.fastseq.zoneout = 0.5
    handle.refresh()
    check(m, handle)


class OutputAlone(fastseq.GRU):
    def forward(self, input, hx=None):
        return super().forward(input, hx)[0]


def test_a_forward_that_gives_something_else():
    handle = fastseq.streaming(OutputAlone(5, 7), 2)
    with pytest.raises(TypeError, match=r"module: expected the forward of OutputAlone to return"):
        handle.step(torch.randn(2, 5))


def test_states_that_do_not_fit(backend):
    """Nothing is broadcast, and nothing is set in part."""
    lstm = fastseq.streaming(fastseq.LSTM(5, 7, num_layers=2, backend=backend), 3)
    gru = fastseq.streaming(fastseq.GRU(5, 7, num_layers=2, backend=backend), 3)
    lstm.step(torch.randn(3, 5)), gru.step(torch.randn(3, 5))
    fits, before = torch.randn(2, 3, 7), (*lstm.state, gru.state)
    wrong = (
        torch.randn(3, 7),
        torch.randn(7),
        torch.tensor(1.0),
        torch.randn(1, 3, 7),
        torch.randn(2, 1, 7),
        torch.randn(2, 3, 1),
        torch.randn(2, 3, 7, dtype=torch.float64),
        torch.randn(2, 3, 7).bfloat16(),
        torch.empty(2, 3, 7, device="meta"),
        0.0,
        None,
    )
    for bad in wrong:
        with pytest.raises(ValueError, match="state: h: expected"):
            gru.state = bad
        with pytest.raises(ValueError, match="state: h: expected"):
            lstm.state = bad, fits
        with pytest.raises(ValueError, match="state: c: expected"):
            lstm.state = fits, bad
    for bad in (fits, (fits,), (fits, fits, fits), None, torch.randn(2, 2, 3, 7)):
        with pytest.raises(TypeError, match=r"state: expected a pair \(h, c\), got"):
            lstm.state = bad
    with pytest.raises(ValueError, match="state: h: expected"):
        gru.state = (fits,)
    for now, then in zip((*lstm.state, gru.state), before, strict=True):
        assert torch.equal(now, then)
    lstm.state = [fits, fits]
    assert torch.equal(lstm.state[1], fits)
    gru.state = fits.clone().requires_grad_()
    assert torch.equal(gru.state, fits) and not gru.state.requires_grad


def test_rows_that_are_not_there():
    handle = fastseq.streaming(fastseq.LSTM(5, 7), 3)
    handle.step(torch.randn(3, 5))
    before = handle.state
    for rows in ([3], [0, -4], torch.tensor([1, 7]), 3):
        with pytest.raises(IndexError, match="rows: expected indices from -3 to 2, got"):
            handle.reset(rows)
    for rows in ([True], torch.ones(3, 1, dtype=torch.bool), True, [True] * 4):
        with pytest.raises(ValueError, match=r"rows: expected a mask \(batch,\) = \(3,\), got"):
            handle.reset(rows)
    for rows in ([0.0], torch.ones(3, dtype=torch.uint8), torch.tensor([1.5])):
        with pytest.raises(TypeError, match="rows: expected integers, or bools"):
            handle.reset(rows)
    for ours, then in zip(handle.state, before, strict=True):
        assert torch.equal(ours, then)
    for rows in (-1, torch.tensor(2), numpy.array([2]), torch.tensor([2], dtype=torch.int32)):
        handle.state = before
        handle.reset(rows)
        assert torch.equal(handle.state[0][:, :2], before[0][:, :2])
        assert not handle.state[0][:, 2].any() and not handle.state[1][:, 2].any()


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
    for batch in (0, -1):
        with pytest.raises(ValueError, match="batch: expected at least 1"):
            fastseq.streaming(m, batch)
    for batch in (1.5, True, None):
        with pytest.raises(TypeError, match="batch: expected an int"):
            fastseq.streaming(m, batch)
    with pytest.raises(
        TypeError, match=r"got LSTM of torch\.nn; call fastseq\.replace\(model\) first"
    ):
        fastseq.streaming(torch.nn.LSTM(5, 7))
    for cell in (fastseq.GRUCell(5, 7), torch.nn.GRUCell(5, 7)):
        with pytest.raises(TypeError, match="got GRUCell, which makes single steps itself"):
            fastseq.streaming(cell)
    with pytest.raises(TypeError, match="module: expected a layer of fastseq, got Linear"):
        fastseq.streaming(torch.nn.Linear(5, 7))


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
@pytest.mark.parametrize("first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", [*LAYERS, "PeepholeLSTM"])
def test_resets_and_all_states_have_the_bits_of_the_long_way(kind, directions, first):
    """The long way is taken by a call that names its rows."""
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": directions == 2, "batch_first": first}
    m = getattr(fastseq, kind)(5, 7, **options)
    x, reset = torch.randn(6, 3, 5), torch.rand(6, 3) < 0.3
    if first:
        x, reset = x.transpose(0, 1), reset.t()
    of_c = [True, False] if "LSTM" in kind else [False]
    for given in [
        (r, all_states) for r in (None, reset, reset.contiguous()) for all_states in of_c
    ]:
        assert short_way.layers(m, x, None, *given) is not None
        named = dict(zip(("reset", "all_states"), given, strict=True))
        found = []
        for rows in ({}, {"row_ids": [0, 1, 2]}):
            out = m(x, **named, **rows)
            outputs = [t for part in out for t in states(part)]
            loss = sum((o * o).sum() for o in outputs)
            found.append([*outputs, *torch.autograd.grad(loss, list(m.parameters()))])
        ours, theirs = found
        assert [o.shape for o in ours] == [o.shape for o in theirs]
        assert all(map(torch.equal, ours, theirs)), given


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
    r = torch.zeros(4, 3, dtype=torch.bool)
    assert short(m, x, None, r, True) is not None and short(m, x, None, r, None) is not None
    for given in (
        (r[:3],),
        (r.t(),),
        (r.float(),),
        (r.tolist(),),
        (r.to("meta"),),
        (r, 1),
        (r, "yes"),
    ):
        assert short(m, x, None, *given) is None, given
    assert short(m, x[:, 0], None, r[:, :1]) is None
    assert short(fastseq.GRU(5, 7), x, None, None, True) is None  # which has no other state
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
    m.fastseq.recurrent_dropout = 0.5
    assert short(m, x[0], None) is None  # masks are those of a batch
    assert short(m.eval(), x[0], None) is not None
    m.fastseq.recurrent_dropout = 0.0
    m.train()
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
