"""A stack in one call of a backend that runs a layer a call (backends/stacked.py), against its
layers one by one: the same bits. It is cuda's, whose kernels run on the host here;
tests/helpers/triton_cases.py has triton's."""

import cuda_on_host
import pytest
import torch
from spies import counted
from stacks import flat, is_whole, layer_by_layer, outputs_and_gradients, same, states_of
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils._pytree import tree_map

import fastseq
from fastseq.backends import choice
from fastseq.backends.contract import Problem
from fastseq.nn.recurrent import call_request
from fastseq.ops import whole

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


def made(kind="LSTM", **options):
    torch.manual_seed(2)
    return LAYERS[kind](6, 8, backend="cuda", **options)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bits_of_layers_one_by_one(kind, options):
    m = made(kind, **OPTIONS[options])
    x = torch.randn(*((3, 4) if m.batch_first else (4, 3)), 6, requires_grad=True)
    assert is_whole(m(x)[0])
    for hx in (None, states_of(m, (3,))):
        ours = outputs_and_gradients(m, x, hx)
        same(ours, layer_by_layer(outputs_and_gradients, m, x, hx))
        with torch.no_grad(), counted("cuda") as count:
            y, state = m(x, hx)
            same([y, *flat(state)], ours[: 1 + len(flat(state))])
        assert count == {"forward": 1, "backward": 0}


def test_packed():
    m = made(num_layers=2, bidirectional=True)
    x = torch.randn(4, 3, 6)
    packed = pack_padded_sequence(x, [2, 4, 1], enforce_sorted=False)
    assert "StackFunction" in m(packed)[0].data.grad_fn.name()
    for hx in (None, states_of(m, (3,))):
        same(
            outputs_and_gradients(m, packed, hx),
            layer_by_layer(outputs_and_gradients, m, packed, hx),
        )


def test_one_output_alone():
    m = made(num_layers=2)
    x = torch.randn(4, 3, 6, requires_grad=True)
    (y, (h, c)), (y_too, (h_too, c_too)) = m(x), layer_by_layer(m, x)
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
        assert choice.in_one_call("cuda", problem._replace(**{own: True}))
    zoned = problem._replace(zoneout=(0.1, 0.1))
    assert "zoneout" in choice.declines(choice.load("cuda"), zoned)
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
    x, hx = torch.randn(4, 3, 6), states_of(m, (3,)) if given else None
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


def test_dropout_of_numbers_elsewhere_is_not_drawn_on_the_cpu():
    m = made(num_layers=2, dropout=0.5)
    request, weights, before = call_request(m), tuple(m.parameters()), torch.get_rng_state()
    x = torch.empty(4, 3, 6, device="meta")
    assert request.dropout and whole.run(("cuda", None), request, x, None, (), weights) is None
    assert torch.equal(torch.get_rng_state(), before)


class Wrapped(torch.Tensor):
    """Another tensor's numbers, which only what is dispatched finds: it has no memory."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda a: a.inner if isinstance(a, cls) else a, (args, kwargs))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "change", [Wrapped, lambda t: torch._neg_view(-t)], ids=["wrapped", "negated"]
)
@pytest.mark.parametrize("what", ["state", "weight"])
def test_what_is_more_than_memory(what, change):
    m, x, h = made("GRU"), torch.randn(4, 3, 6), torch.randn(1, 3, 8)
    with torch.no_grad():
        expected = m(x, h)[0]
        if what == "state":
            found = m(x, change(h))[0]
        else:
            weights = {"bias_hh_l0": change(m.bias_hh_l0.detach())}  # nobody copies it
            found = torch.func.functional_call(m, weights, (x, h))[0]
    same([found], [expected])


@pytest.mark.parametrize("kind", LAYERS)
def test_a_gradient_is_nobody_else_s_memory(kind):
    m = made(kind, bidirectional=True)
    x = torch.randn(4, 3, 6, requires_grad=True)
    grads = torch.autograd.grad(m(x)[0].sum(), [x, *m.parameters()])
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)
