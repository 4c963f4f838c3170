"""A whole stack in one call of the C++ kernels, against its layers one by one: the same bits."""

import copy

import pytest
import torch
from rules import check_alike, check_close
from stacks import flat, is_whole, layer_by_layer, outputs_and_gradients, same, states_of
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq
from fastseq.backends import load
from fastseq.backends.contract import Request
from fastseq.ops import whole

pytestmark = pytest.mark.skipif(isinstance(load("native"), str), reason=str(load("native")))

LAYERS = {"LSTM": fastseq.LSTM, "GRU": fastseq.GRU, "RNN": fastseq.RNN}
OPTIONS = {
    "plain": {},
    "stack": {"num_layers": 3, "bidirectional": True},
    "dropout": {"num_layers": 3, "dropout": 0.4},
    "all dropped": {"num_layers": 2, "dropout": 1.0, "bidirectional": True},
    "batch first": {"num_layers": 2, "batch_first": True, "dropout": 0.2},
    "unbiased": {"num_layers": 2, "bias": False},
    "deterministic": {"num_layers": 2, "deterministic": True},
}
SHAPES = {"batch": (5, 3), "one sequence": (40, 1), "unbatched": (6,), "rows to spare": (9, 33)}


def made(kind, options, dtype=torch.float32):
    torch.manual_seed(2)
    return LAYERS[kind](6, 8, dtype=dtype, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_bits_of_layers_one_by_one(kind, options, shape):
    m = made(kind, OPTIONS[options])
    lead = SHAPES[shape]
    x = torch.randn(*reversed(lead) if m.batch_first else lead, 6, requires_grad=True)
    hx = states_of(m, lead[1:])
    assert is_whole(m(x)[0])
    for given in (None, hx):
        ours = outputs_and_gradients(m, x, given)
        same(ours, layer_by_layer(outputs_and_gradients, m, x, given))
        with torch.no_grad():
            torch.manual_seed(7)
            y, state = m(x, given)
            same([y, *flat(state)], ours[: 1 + len(flat(state))])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_projection(dtype):
    options = {"proj_size": 3, "num_layers": 2, "bidirectional": True, "dropout": 0.3}
    m = made("LSTM", options, dtype)
    x = torch.randn(7, 3, 6, dtype=dtype, requires_grad=True)
    hx = states_of(m, (3,), dtype)
    assert is_whole(m(x)[0])
    same(outputs_and_gradients(m, x, hx), layer_by_layer(outputs_and_gradients, m, x, hx))


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_and_lengths(kind):
    m = made(kind, OPTIONS["stack"] | {"dropout": 0.3})
    lengths = torch.tensor([2, 9, 5, 9])
    x = torch.randn(9, 4, 6, requires_grad=True)

    def packed(x, hx):
        return m(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)

    def padded(x, hx):
        return m(x, hx, lengths=lengths)

    hx = states_of(m, (4,))
    assert "StackFunction" in packed(x, None)[0].data.grad_fn.name()
    for run in (packed, padded):
        for given in (None, hx):
            ours = outputs_and_gradients(m, x, given, run)
            same(ours, layer_by_layer(outputs_and_gradients, m, x, given, run))


@pytest.mark.parametrize("kind", LAYERS)
def test_only_what_wants_a_gradient_has_one(kind):
    m = made(kind, OPTIONS["stack"])
    x = torch.randn(5, 3, 6)
    same(outputs_and_gradients(m, x, None), layer_by_layer(outputs_and_gradients, m, x, None))
    for p in m.parameters():
        p.requires_grad_(False)
    assert m(x)[0].grad_fn is None
    x.requires_grad_()
    same(outputs_and_gradients(m, x, None), layer_by_layer(outputs_and_gradients, m, x, None))
    m.weight_hh_l1.requires_grad_()
    same(outputs_and_gradients(m, x, None), layer_by_layer(outputs_and_gradients, m, x, None))


def test_gradients_from_one_output_alone_and_of_any_layout():
    m = made("LSTM", {"num_layers": 2, "batch_first": True}, torch.float64)
    x = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    weights = list(m.parameters())
    y, (h, c) = m(x)
    dense = torch.autograd.grad(y, [x, *weights], torch.ones_like(y), retain_graph=True)
    same(dense, torch.autograd.grad(y.sum(), [x, *weights], retain_graph=True))  # expanded
    negative = torch._neg_view(-torch.ones_like(y))
    same(dense, torch.autograd.grad(y, [x, *weights], negative, retain_graph=True))
    _, one_by_one = layer_by_layer(m, x)
    for output, other in zip((h, c), one_by_one, strict=True):
        found = torch.autograd.grad(output.sum(), [x, *weights], retain_graph=True)
        same(found, torch.autograd.grad(other.sum(), [x, *weights], retain_graph=True))


@pytest.mark.parametrize("options", ["dropout", "batch first"])
@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(kind, options):
    m = made(kind, OPTIONS[options] | {"num_layers": 2}, torch.float64)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in m.named_parameters()]

    def run(x, *weights):
        torch.manual_seed(3)  # the same numbers are dropped
        return torch.func.functional_call(m, dict(zip(names, weights, strict=True)), (x,))[0]

    weights = tuple(p.detach().requires_grad_() for p in m.parameters())
    y = run(x, *weights)
    assert is_whole(y)
    first, again = (
        torch.autograd.grad(y.square().sum(), (x, *weights), retain_graph=True, create_graph=graph)
        for graph in (False, True)
    )
    for plain, differentiable in zip(first, again, strict=True):
        check_alike(differentiable.detach(), plain)
    torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)
    torch.autograd.gradgradcheck(run, (x, *weights), fast_mode=True)


def test_batched_cotangents():
    m = made("GRU", OPTIONS["dropout"], torch.float64)
    x = torch.randn(4, 3, 6, dtype=torch.float64, requires_grad=True)
    y, _ = m(x)
    basis = torch.eye(y.numel(), dtype=y.dtype).view(-1, *y.shape)[:5]
    (batched,) = torch.autograd.grad(y, x, basis, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(y, x, v, retain_graph=True)[0] for v in basis]
    check_alike(batched, torch.stack(each))


def test_saved_tensors_can_live_elsewhere():
    m = made("LSTM", OPTIONS["dropout"])
    x = torch.randn(5, 3, 6, requires_grad=True)
    plain = outputs_and_gradients(m, x, None)
    with torch.autograd.graph.save_on_cpu():
        same(outputs_and_gradients(m, x, None), plain)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.numpy(), torch.from_numpy):
        same(outputs_and_gradients(m, x, None), plain)


def test_saved_tensors_that_came_back_otherwise():
    m = made("LSTM", {"num_layers": 2, "dropout": 0.5})
    x = torch.randn(5, 3, 6)
    given = {t.data_ptr() for t in (x, *m.parameters())}
    for broken in (
        lambda t: t[:0],
        lambda t: t.double(),
        lambda t: torch.cat([t, t]),
        lambda t: t[:2] if t.dtype is torch.bool else t,  # what was dropped, alone
    ):
        hooks = (lambda t: t, lambda t: t if t.data_ptr() in given else broken(t))  # noqa: B023
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            y, _ = m(x)
        with pytest.raises(RuntimeError, match="saved tensors came back with another shape"):
            y.sum().backward()


def test_an_edited_output_is_noticed_or_harmless():
    x = torch.randn(5, 3, 6)
    y, _ = made("LSTM", {})(x)
    y.mul_(2)  # as torch.nn's
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    for kind in ("GRU", "RNN"):
        m = made(kind, {})
        expected = torch.autograd.grad((2 * m(x)[0]).sum(), m.weight_hh_l0)
        same(torch.autograd.grad(m(x)[0].mul_(2).sum(), m.weight_hh_l0), expected)


def test_a_call_that_is_declined_has_drawn_nothing():
    m = made("LSTM", {"num_layers": 2, "dropout": 0.5})
    x = torch.randn(5, 3, 12)[..., ::2]  # strides that the kernels do not read
    request = Request("lstm", 2, dropout=0.5, training=True)
    weights = tuple(m.parameters())
    before = torch.get_rng_state()
    assert whole.run(("native", load("native")), request, x, None, (), weights) is None
    with torch.no_grad():
        assert whole.run(("native", load("native")), request, x, None, (), weights) is None
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    y, _ = m(x)
    torch.manual_seed(1)
    assert torch.equal(m(x.contiguous())[0], y)


def test_the_numbers_dropped_are_those_of_torch_nn():
    ours = made("LSTM", OPTIONS["dropout"])
    theirs = torch.nn.LSTM(6, 8, 3, dropout=0.4)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 6)
    torch.manual_seed(5)
    y, _ = ours(x)
    torch.manual_seed(5)
    expected, _ = theirs(x)
    check_alike(y, expected)


MASKING = {
    "zoneout": {"zoneout": 0.3},
    "recurrent": {"recurrent_dropout": 0.4},
    "input": {"input_dropout": 0.3},
    "weight": {"weight_dropout": 0.5},
    "reset": {},
    "all_states": {},
}
MASKING["all"] = {name: rate for own in MASKING.values() for name, rate in own.items()}
LAYOUTS = {
    "plain": {},
    "batch first": {"batch_first": True, "dropout": 0.4},
    "projected": {"proj_size": 3},
}


def asked(option, kind, x):
    """What a call is given besides."""
    given = {"seed": 5}
    if option in ("reset", "all"):
        given["reset"] = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(4)) < 0.3
    if option in ("all_states", "all") and kind == "LSTM":
        given["all_states"] = True
    return given


def runs(m, given):
    """m as :func:`outputs_and_gradients` calls it: the trajectory with the final states."""

    def run(x, hx):
        y, state, *along = m(x, hx, **given)
        return y, (*flat(state), *along)

    return run


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("option", MASKING)
@pytest.mark.parametrize("kind", LAYERS)
def test_options_in_one_call(kind, option, layout, training):
    """Each alone, and all together: the bits of the layers one by one."""
    if layout == "projected" and kind != "LSTM":
        pytest.skip("only the LSTM is projected")
    layers = {"num_layers": 2, "bidirectional": True, "backend": "native"}
    m = made(kind, layers | LAYOUTS[layout] | MASKING[option]).train(training)
    x = torch.randn(*((3, 5) if m.batch_first else (5, 3)), 6, requires_grad=True)
    given, hx = asked(option, kind, x), states_of(m, (3,))
    assert is_whole(m(x, hx, **given)[0])
    for more in ({}, {"lengths": torch.tensor([3, 5, 2])}):
        run = runs(m, given | more)
        ours = outputs_and_gradients(m, x, hx, run)
        same(ours, layer_by_layer(outputs_and_gradients, m, x, hx, run))
        with torch.no_grad():
            torch.manual_seed(7)
            y, state = run(x, hx)
        same([y, *state], ours[: 1 + len(state)])


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_second_derivatives_with_options(kind):
    options = MASKING["all"] | {"num_layers": 2, "dropout": 0.4, "backend": "native"}
    m = made(kind, options, torch.float64)
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    given = asked("all", kind, x)

    def run(x):
        torch.manual_seed(3)
        y, _, *along = m(x, **given)
        return (y, *along)

    assert is_whole(run(x)[0])
    cotangents = [torch.randn_like(o) for o in run(x)]
    leaves = [x, *m.parameters()]
    first, again = (
        torch.autograd.grad(run(x), leaves, cotangents, create_graph=graph)
        for graph in (False, True)
    )
    for plain, differentiable in zip(first, again, strict=True):
        check_alike(differentiable.detach(), plain)
    torch.autograd.gradgradcheck(run, (x,), fast_mode=True)


def test_edits_before_backward_of_what_a_call_was_given_are_noticed():
    m = made("LSTM", {"backend": "native", "num_layers": 2})
    x, reset = torch.randn(5, 3, 6), torch.zeros(5, 3, dtype=torch.bool)
    _, _, c = m(x, all_states=True, reset=reset)
    c.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        c.sum().backward()


CELLS = {"LSTM": fastseq.LSTMCell, "GRU": fastseq.GRUCell, "RNN": fastseq.RNNCell}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_a_step_of_a_cell(kind, bias, dtype):
    """Against torch.nn's, with and without a state; every derivative of the second order too."""
    torch.manual_seed(1)
    ours = CELLS[kind](6, 8, bias, dtype=dtype)
    theirs = getattr(torch.nn, f"{kind}Cell")(6, 8, bias, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 6, dtype=dtype, requires_grad=True)
    h, c = (torch.randn(3, 8, dtype=dtype, requires_grad=True) for _ in range(2))
    truth = copy.deepcopy(theirs).double()
    for hx in (None, (h, c) if kind == "LSTM" else h):
        for k, state in enumerate(flat(ours(x, hx))):  # c by a node of its own
            node = state.grad_fn.next_functions[0][0] if k else state.grad_fn
            assert "StackFunction" in node.name()
        found = []
        for m in (ours, theirs, truth):
            own = [x, *([] if hx is None else flat(hx))]
            if m is truth:
                own = [t.detach().double().requires_grad_() for t in own]
            given = (own[0], None if hx is None else tuple(own[1:]) if kind == "LSTM" else own[1])
            state = flat(m(*given))
            wanted = [*own, *m.parameters()]
            first = torch.autograd.grad(sum(s.pow(2).sum() for s in state), wanted)
            twice = torch.autograd.grad(
                sum(s.pow(2).sum() for s in flat(m(*given))), wanted, create_graph=True
            )
            second = torch.autograd.grad(sum(g.pow(2).sum() for g in twice), wanted)
            with torch.no_grad():
                bare = flat(m(*given))
            found.append([*state, *bare, *first, *twice, *second])
        for a, b, exact in zip(*found, strict=True):
            check_close(a, b, exact, dtype, kind)
    sum(s.mul_(2).sum() for s in flat(ours(x))).backward()  # may be edited, as torch.nn's


@pytest.mark.parametrize("kind", CELLS)
def test_what_a_cell_is_not_given_plainly(kind):
    cell = CELLS[kind](6, 8)
    x, h = torch.randn(2, 6), torch.zeros(2, 8)
    pair = kind == "LSTM"
    expected = flat(cell(x, (h, h) if pair else h))
    rows = torch.randn(2, 12)[:, ::2].copy_(x)
    columns = torch.zeros(8, 2).t()
    for got in (cell(rows), cell(x, (columns, columns) if pair else columns), cell(x)):
        for a, b in zip(flat(got), expected, strict=True):
            check_alike(a, b)
    for a, b in zip(flat(cell(x[0])), expected, strict=True):  # without a batch
        check_alike(a, b[0])
    empty = flat(cell(x[:0]))
    assert empty[0].shape == (0, 8)
    with pytest.raises(RuntimeError, match="inconsistent hidden_size"):
        cell(x, (h[:, :7], h[:, :7]) if pair else h[:, :7])


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 0)])
def test_what_a_stack_keeps(kind, gates):
    """G + 2 numbers for each token, hidden unit and layer, and a byte of what is dropped."""
    T, B, H, layers = 12, 7, 64, 3
    m = LAYERS[kind](8, H, layers, dropout=0.5)
    x = torch.randn(T, B, 8)
    given = {t.data_ptr() for t in (x, *m.parameters())}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in given:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        m(x)
    numbers = sum(kept.values()) / 4 / (T * B * H)
    assert layers <= numbers <= layers * (gates + 2) + (layers - 1) / 4
