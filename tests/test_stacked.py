"""A stack in one call of a backend that runs a layer a call (backends/stacked.py), against its
layers one by one: the same bits. It is cuda's, whose kernels run on the host here;
tests/helpers/triton_cases.py has triton's."""

import cuda_on_host
import pytest
import torch
from spies import counted
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.backends import choice, load
from fastseq.backends.contract import Problem
from fastseq.nn.recurrent import call_stack
from fastseq.ops import run, whole

LAYERS = {"LSTM": fastseq.LSTM, "GRU": fastseq.GRU, "IndRNN": fastseq.IndRNN}
OPTIONS = {
    "one": {},
    "stack": {"num_layers": 3, "bidirectional": True},
    "batch first": {"num_layers": 2, "batch_first": True},
    "unbiased": {"num_layers": 2, "bias": False},
}


@pytest.fixture(scope="module", autouse=True)
def on_host():
    setting = torch.backends.cudnn.rnn
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    with cuda_on_host.use():
        yield
    setting.fp32_precision = before


@pytest.fixture
def one_by_one(monkeypatch):
    """Runs a call with the way of whole stacks closed."""

    def run(function, *arguments):
        with monkeypatch.context() as closed:
            closed.setattr(whole, "run", lambda *call: None)
            return function(*arguments)

    return run


def made(kind="LSTM", **options):
    torch.manual_seed(2)
    return LAYERS[kind](6, 8, backend="cuda", **options)


def flat(state):
    return state if isinstance(state, tuple) else (state,)


def states_of(m, batch):
    rows = m.num_layers * (2 if m.bidirectional else 1)
    count = 2 if isinstance(m, fastseq.LSTM) else 1
    found = tuple(torch.randn(rows, batch, 8, requires_grad=True) for _ in range(count))
    return found if count > 1 else found[0]


def outputs_and_gradients(m, x, hx=None):
    y, state = m(x, hx)
    outputs = [y.data if hasattr(y, "batch_sizes") else y, *flat(state)]
    leaves = [*m.parameters(), *(() if hx is None else flat(hx))]
    leaves += [x.data if hasattr(x, "batch_sizes") else x]
    torch.manual_seed(8)
    cotangents = [torch.randn(o.shape) for o in outputs]
    wanted = [t for t in leaves if t.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, cotangents)]


def same(ours, theirs):
    assert len(ours) == len(theirs)
    assert all(map(torch.equal, ours, theirs))


def is_whole(y):
    function = y.grad_fn
    if "Transpose" in function.name():
        function = function.next_functions[0][0]
    return "StackFunction" in function.name()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bits_of_layers_one_by_one(kind, options, one_by_one):
    m = made(kind, **OPTIONS[options])
    x = torch.randn(*((3, 4) if m.batch_first else (4, 3)), 6, requires_grad=True)
    assert is_whole(m(x)[0])
    for hx in (None, states_of(m, 3)):
        ours = outputs_and_gradients(m, x, hx)
        same(ours, one_by_one(outputs_and_gradients, m, x, hx))
        with torch.no_grad(), counted("cuda") as count:
            y, state = m(x, hx)
            same([y, *flat(state)], ours[: 1 + len(flat(state))])
        assert count == {"forward": 1, "backward": 0}


def test_packed(one_by_one):
    m = made(num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, 6)
    packed = pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False)
    assert "StackFunction" in m(packed)[0].data.grad_fn.name()
    for hx in (None, states_of(m, 3)):
        same(
            outputs_and_gradients(m, packed, hx),
            one_by_one(outputs_and_gradients, m, packed, hx),
        )


def test_one_output_alone(one_by_one):
    m = made(num_layers=2)
    x = torch.randn(4, 3, 6, requires_grad=True)
    (y, (h, c)), (y_too, (h_too, c_too)) = m(x), one_by_one(m, x)
    wanted = [x, *m.parameters()]
    for ours, theirs in ((y, y_too), (h, h_too), (c, c_too)):
        same(
            torch.autograd.grad(ours.sum(), wanted, retain_graph=True),
            torch.autograd.grad(theirs.sum(), wanted, retain_graph=True),
        )


def test_frozen_layers_have_no_backward():
    m = made("GRU", num_layers=3)
    for name, p in m.named_parameters():
        p.requires_grad_(name.endswith("l2"))
    with counted("cuda") as count:
        y, _ = m(torch.randn(4, 3, 6))
        y.sum().backward()
    assert not is_whole(y) and count == {"forward": 3, "backward": 1}


def test_what_goes_layer_by_layer():
    """Dropout is drawn where the numbers are, by torch; lean memory is a layer's own."""
    x = torch.randn(4, 3, 6)
    assert not is_whole(made(num_layers=2, dropout=0.5)(x)[0])
    assert not is_whole(made(num_layers=2, memory="lean")(x)[0])
    assert is_whole(made(num_layers=2, dropout=0.5).eval()(x)[0])
    problem = Problem("lstm", torch.float32, "cpu", 4, 3, 6, 8, 8)
    assert choice.in_one_call("cuda", problem)
    for own in ("reset", "h_mask", "trajectory"):
        assert not choice.in_one_call("cuda", problem._replace(**{own: True}))
    for mode in ("compile", "trace", "transform", "dual"):
        assert not choice.in_one_call("cuda", problem._replace(mode=mode))


def test_second_derivatives():
    m = made("GRU", num_layers=2)
    x = torch.randn(3, 2, 6, requires_grad=True)
    wanted = [x, *m.parameters()]

    def penalty(backend):
        m.fastseq.backend = backend
        y, _ = m(x)
        assert backend != "cuda" or is_whole(y)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), wanted)

    for ours, exact in zip(penalty("cuda"), penalty("eager"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-5)


def test_an_edited_output_is_noticed_or_harmless():
    x = torch.randn(4, 3, 6)
    y, _ = made()(x)
    y.mul_(2)  # as torch.nn's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    m = made("GRU")
    expected = torch.autograd.grad((2 * m(x)[0]).sum(), m.weight_hh_l0)
    y, h_n = m(x)
    h_n.zero_()
    same(torch.autograd.grad(y.mul_(2).sum(), m.weight_hh_l0), expected)


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
def test_saved_tensors_that_came_back_otherwise(memory, given):
    """Of kernels that read addresses alone."""
    m = made(num_layers=2, memory=memory)
    x, hx = torch.randn(4, 3, 6), states_of(m, 3) if given else None
    kept = {p.data_ptr() for p in (x, *m.parameters())}
    for broken in (lambda t: t[:1], lambda t: t.double(), lambda t: torch.cat([t, t])):
        hooks = (lambda t: t, lambda t: t if t.data_ptr() in kept else broken(t))  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y, _ = m(x, hx)
        with pytest.raises(RuntimeError, match="saved tensors came back with another shape"):
            y.sum().backward()
    with torch.autograd.graph.save_on_cpu():
        moved = outputs_and_gradients(m, x, hx)
    same(moved, outputs_and_gradients(m, x, hx))


def test_dropout_of_numbers_elsewhere_is_not_drawn_on_the_cpu(monkeypatch):
    monkeypatch.setattr(whole, "run", None)
    m = fastseq.LSTM(6, 8, num_layers=2, dropout=0.5, backend="eager", device="meta")
    stack = call_stack(m, torch.empty(4, 3, 6, device="meta"), None)
    assert run._in_one_call(stack, "cuda", load("cuda")) is None
