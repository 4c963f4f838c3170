"""The layers that torch.nn lacks: modules, cells and functions beside the writings from the papers,
and what the ways to torch.nn say of them."""

import copy
import io
import pickle

import independent
import pytest
import torch
from rules import check_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq import compat
from fastseq.backends import load
from fastseq.backends.contract import ways
from fastseq.cells import CELLS
from fastseq.nn.recurrent import call_request, layer_weights
from fastseq.ops import masks

I, H, C, T, B = 3, 5, 2, 6, 4  # noqa: E741  (the field's letters)
LENGTHS = (6, 2, 0, 5)

#: name -> layer, function, and what tells the cell
KINDS = {
    "rnn_sigmoid": ("RNN", "rnn", {"nonlinearity": "sigmoid"}),
    "gru_reset_before": ("GRU", "gru", {"reset_after": False}),
    "mgu": ("MGU", "mgu", {}),
    "peephole_lstm": ("PeepholeLSTM", "peephole_lstm", {}),
    "coupled_lstm": ("CoupledLSTM", "coupled_lstm", {}),
    "indrnn": ("IndRNN", "indrnn", {}),
    "indrnn_tanh": ("IndRNN", "indrnn", {"nonlinearity": "tanh"}),
}
each = pytest.mark.parametrize("cell", KINDS)
pairs = pytest.mark.parametrize("cell", ["peephole_lstm", "coupled_lstm"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def layer(cell, **options):
    kind, _, own = KINDS[cell]
    return getattr(fastseq, kind)(I, H, **own, **({"dtype": torch.float64} | options))


def step(cell, **options):
    kind, _, own = KINDS[cell]
    return getattr(fastseq, f"{kind}Cell")(I, H, **own, **({"dtype": torch.float64} | options))


def drawn(module, batch=B):
    """Initial states."""
    L = module.num_layers * (1 + module.bidirectional)
    sizes = [module.proj_size or H] + [H] * len(CELLS[module._fastseq_cell].other_states)
    return [torch.randn(L, batch, size, dtype=torch.float64) for size in sizes]


def given(states):
    return tuple(states) if len(states) > 1 else states[0]


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [t for value in out for t in flat(value)]


def check(ours, theirs):
    for k, (mine, truth) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
        check_close(mine, None, truth, torch.float64, f"output {k}")


def independently(module, x, states, **time):
    D = 1 + module.bidirectional
    y, finals, _ = independent.layers(
        module._fastseq_cell, x, states, layer_weights(module), D, **time
    )
    return y, finals


# --- values


@each
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_layer_is_the_papers(cell, bias, backend):
    """Two layers both ways, with lengths, resets and a state; values and every gradient."""
    module = layer(cell, num_layers=2, bidirectional=True, bias=bias, backend=backend)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    states, reset = drawn(module), torch.rand(T, B) < 0.3
    time = {"lengths": torch.tensor(LENGTHS), "reset": reset}
    leaves = [x, *module.parameters()]
    outputs = [
        module(x, given(states), **time),
        independently(module, x, states, **time),
    ]
    check(*outputs)
    weights = [torch.randn_like(t) for t in flat(outputs[0])]
    mine, truth = (torch.autograd.grad(flat(out), leaves, weights) for out in outputs)
    check(mine, truth)


@each
def test_forms_of_a_call(cell):
    """batch_first, packed and unbatched are the dense call; so is the function, of both ways."""
    module = layer(cell, bidirectional=True)
    x, states = torch.randn(T, B, I, dtype=torch.float64), drawn(module)
    y, last = module(x, given(states))
    first = layer(cell, bidirectional=True, batch_first=True)
    first.load_state_dict(module.state_dict())
    check(first(x.transpose(0, 1), given(states)), (y.transpose(0, 1), last))
    one = given([s[:, 1] for s in states])
    check(module(x[:, 1], one), (y[:, 1], given([s[:, 1] for s in flat(last)])))
    function, own = getattr(fastseq, KINDS[cell][1]), KINDS[cell][2]
    check(function(x, module.all_weights, given(states), **own), (y, last))
    lengths = torch.tensor([6, 2, 1, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    rows, last = module(packed, given(states))
    check((pad_packed_sequence(rows)[0], last), module(x, given(states), lengths=lengths))


@pairs
def test_projected(cell):
    module = layer(cell, proj_size=2, num_layers=2, bidirectional=True)
    x, states = torch.randn(T, B, I, dtype=torch.float64), drawn(module)
    check(module(x, states), independently(module, x, states))
    _, last, c = module(x, states, all_states=True)
    assert c.shape == (T, B, 2 * H)
    check(c[-1, :, :H], last[1][2])


@each
@pytest.mark.parametrize("bias", [True, False])
def test_a_loop_over_the_cell_is_the_layer(cell, bias):
    """With the layer's parameters by name; values and gradients, batched and not."""
    module, one = layer(cell, bias=bias), step(cell, bias=bias)
    named = {name.removesuffix("_l0"): w for name, w in module.state_dict().items()}
    one.load_state_dict(named)
    assert list(named) == [name for name, _ in one.named_parameters()]
    x = torch.randn(T, B, I, dtype=torch.float64)
    y, _ = module(x)
    hx, hs = None, []
    for x_t in x:
        hx = one(x_t, hx)
        hs.append(hx[0] if isinstance(hx, tuple) else hx)
    check(torch.stack(hs), y)
    check(
        torch.autograd.grad(torch.stack(hs).square().sum(), list(one.parameters())),
        torch.autograd.grad(y.square().sum(), list(module.parameters())),
    )
    check(one(x[0, 0]), [s[0] for s in flat(one(x[0]))])


# --- what a module of torch.nn's does


@each
def test_parameters_are_called_as_torchs(cell):
    definition = CELLS[cell]
    module = layer(cell, num_layers=2, bidirectional=True)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    if "indrnn" in cell:
        names = ["weight_ih", "bias_ih", "weight_hh"]
    names += [f"weight_{u}" for u in definition.unit_parameters if u != "u"]
    places = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert list(module.state_dict()) == [f"{n}_{p}" for p in places for n in names]
    assert module.weight_ih_l1.shape == (definition.G * H, 2 * H)
    assert module._flat_weights == [w for way in module.all_weights for w in way]
    assert [w is v for w, v in zip(module._flat_weights, module.parameters(), strict=True)]
    found = ways(call_request(module), list(module.parameters()))[0]
    assert found.given()[0] is module.weight_ih_l0
    for name, parameter in module.named_parameters():
        low = 0.0 if "indrnn" in cell and name.startswith("weight_hh") else -(H**-0.5)
        assert parameter.min() >= low and parameter.max() <= (1.0 if low == 0.0 else H**-0.5)
    before = module.weight_ih_l0.clone()
    module.reset_parameters()
    assert not torch.equal(before, module.weight_ih_l0)


@each
@pytest.mark.parametrize("make", [layer, step])
def test_copies_casts_and_the_meta_device(cell, make):
    module = make(cell, dtype=None)
    x = torch.randn(T, I)
    expected = module(x)
    stored = io.BytesIO()
    torch.save(module, stored)
    stored.seek(0)
    read = torch.load(stored, weights_only=False)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), read):
        assert repr(other) == repr(module)
        for mine, theirs in zip(flat(other(x)), flat(expected), strict=True):
            assert torch.equal(mine, theirs)
    meta = make(cell, dtype=None, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    assert next(torch.nn.utils.skip_init(type(module), I, H).parameters()).shape[1] == I
    wide = module.double()
    assert flat(wide(x.double()))[0].dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {t.dtype for t in flat(module.float()(x))} == {torch.bfloat16}


@each
def test_options_and_repr(cell):
    kind, _, own = KINDS[cell]
    module = layer(cell, num_layers=2, backend="eager", memory="lean", zoneout=0.1)
    shown = {"relu": "", "sigmoid": ", nonlinearity=sigmoid", "tanh": ", nonlinearity=tanh"}
    more = shown[own.get("nonlinearity", "relu")]
    more += ", reset_after=False" if "reset_after" in own else ""
    assert sorted(repr(module)[len(kind) + 1 : -1].split(", ")) == sorted(
        f"{I}, {H}, num_layers=2, backend='eager', memory='lean', zoneout=0.1{more}".split(", ")
    )
    fastseq.set_options(module, backend=None, zoneout=0.0)
    x = torch.randn(T, B, I, dtype=torch.float64)
    assert fastseq.explain(module, x) in ("native", "numba")
    assert fastseq.explain(step(cell), x[0]) is not None


@each
def test_streaming(cell):
    module = layer(cell, num_layers=2)
    x = torch.randn(T, B, I, dtype=torch.float64)
    handle = fastseq.streaming(module, batch=B)
    with torch.no_grad():
        y, last = module(x)
    check(torch.stack([handle.step(x_t) for x_t in x]), y)
    check(handle.state, last)


@each
def test_masks(cell):
    """Where the cell has what they mask; else the option says so."""
    x = torch.randn(T, B, I, dtype=torch.float64)
    for name in ("recurrent_dropout", "input_dropout", "weight_dropout", "zoneout"):
        if "indrnn" in cell and name in ("recurrent_dropout", "weight_dropout"):
            with pytest.raises(ValueError, match=f"{name}: indrnn.* has no recurrent product"):
                layer(cell, **{name: 0.5})
            continue
        module = layer(cell, **{name: 0.5})
        once, again = (module(x, seed=3)[0] for _ in range(2))
        assert torch.equal(once, again)
        assert not torch.equal(once, module(x, seed=4)[0])


@each
def test_functional_call_and_vmap(cell):
    """An ensemble of parameters, and a gradient of each sample."""
    module = layer(cell)
    x = torch.randn(T, B, I, dtype=torch.float64)
    own = {name: p.detach() for name, p in module.named_parameters()}
    many = {name: torch.stack([p, 2 * p]) for name, p in own.items()}

    def run(parameters, x):
        return torch.func.functional_call(module, parameters, (x,))[0]

    check(torch.func.vmap(run, (0, None))(many, x)[0], module(x)[0])
    grads = torch.func.grad(lambda p, x: run(p, x).sum())(own, x)
    check(list(grads.values()), torch.autograd.grad(module(x)[0].sum(), list(module.parameters())))


@each
def test_a_second_derivative(cell):
    module, x = layer(cell), torch.randn(3, 2, I, dtype=torch.float64, requires_grad=True)

    def penalty(run):
        (g,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)

    zero = [s.zero_() for s in drawn(module, 2)]
    check(penalty(lambda x: module(x)[0]), penalty(lambda x: independently(module, x, zero)[0]))


@pytest.mark.parametrize("cell", ["gru_reset_before", "peephole_lstm", "indrnn"])
def test_compile_and_export(cell):
    module, x = layer(cell, dtype=None), torch.randn(T, B, I)
    expected = module(x)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(flat(found), flat(expected))
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(flat(program.module()(x[:4])), flat(module(x[:4])))


def test_a_tensor_of_a_subclass_sees_torchs_functions():
    class Seen(torch.Tensor):
        pass

    x = torch.randn(T, B, I)
    for cell in KINDS:
        for module, input in ((layer(cell, dtype=None), x), (step(cell, dtype=None), x[0])):
            found = flat(module(input.as_subclass(Seen)))[0]
            assert type(found) is Seen
            torch.testing.assert_close(found.as_subclass(torch.Tensor), flat(module(input))[0])


# --- mistakes


def test_mistakes_are_told_as_torchs():
    for kind in ("PeepholeLSTM", "MGU", "IndRNN"):
        make = getattr(fastseq, kind)
        for arguments in ((0, 4), (3, 0), (3.0, 4), (3, 4, 0)):
            with pytest.raises((TypeError, ValueError)) as mine:
                make(*arguments)
            with pytest.raises((TypeError, ValueError)) as theirs:
                nn.GRU(*arguments)
            assert type(mine.value) is type(theirs.value) and str(mine.value) == str(theirs.value)
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not MGU"):
        fastseq.MGU(3, 4, proj_size=2)
    with pytest.raises(ValueError, match=r"Unknown nonlinearity 'sigmoid'. Select from 'relu' or"):
        fastseq.IndRNN(3, 4, nonlinearity="sigmoid")
    with pytest.raises(TypeError, match="reset_after should be of type bool, got: int"):
        fastseq.GRU(3, 4, reset_after=0)
    with pytest.raises(RuntimeError, match=r"weight_hh_l0: expected .5,., got .5, 5."):
        module = layer("indrnn")
        module.weight_hh_l0 = nn.Parameter(torch.zeros(5, 5, dtype=torch.float64))
        module(torch.randn(T, B, I, dtype=torch.float64))
    x = torch.randn(T, B, I)
    with pytest.raises(ValueError, match=r"expected 5 to 8 tensors .w_ih, w_hh.*w_ci, w_cf, w_co"):
        fastseq.peephole_lstm(x, fastseq.LSTM(I, H).all_weights[0])
    with pytest.raises(ValueError, match=r"w_ci: expected .5,., got .4,."):
        weights = list(fastseq.PeepholeLSTM(I, H).all_weights[0])
        fastseq.peephole_lstm(x, [*weights[:4], torch.zeros(4), *weights[5:]])


# --- SCRN


def scrn(**options):
    return fastseq.SCRN(I, H, context_size=C, **({"dtype": torch.float64} | options))


def scrn_states(module):
    L = module.num_layers * (1 + module.bidirectional)
    return [torch.randn(L, B, size, dtype=torch.float64) for size in (H, C)]


def scrn_independently(module, x, states, stay=(0.0, 0.0), h_mask=None, lengths=None, reset=None):
    """Mikolov et al. 2014, equations 5 to 7, in matrices. stay: the part of h and of s that stays
    as it was. h_mask: (D, B, H) of one layer."""
    D, finals = 1 + module.bidirectional, []
    for first in range(0, len(module._all_weights), D):
        outputs = []
        for d in range(D):
            names = module._all_weights[first + d]
            w = {name.rpartition("_l")[0]: getattr(module, name) for name in names}
            A, P = w["weight_ih"].split([w["weight_ih"].shape[1] - C, C], 1)
            alpha = torch.sigmoid(w["alpha_logit"]) if "alpha_logit" in w else module.alpha

            def one(x_t, b, h, s, w=w, A=A, P=P, alpha=alpha, d=d):
                new = (1 - alpha) * (w["weight_ic"] @ x_t) + alpha * s
                s = stay[1] * s + (1 - stay[1]) * new
                seen = h if h_mask is None else h * h_mask[d, b]
                a = A @ x_t + P @ s + w["weight_hh"] @ seen
                new = torch.sigmoid(a + w["bias_ih"] + w["bias_hh"])
                return stay[0] * h + (1 - stay[0]) * new, s

            start = tuple(state[first + d] for state in states)
            h, last, (s,) = independent.over_time(one, x, start, d == 1, lengths, reset)
            outputs.append(torch.cat([h, s], -1))
            finals.append(last)
        x = torch.cat(outputs, -1)
    return x, [torch.stack(values) for values in zip(*finals, strict=True)]


@pytest.mark.parametrize("learn_alpha", [True, False])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_scrn_is_the_papers(learn_alpha, backend):
    module = scrn(
        num_layers=2, bidirectional=True, learn_alpha=learn_alpha, alpha=0.8, backend=backend
    )
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    states, reset = scrn_states(module), torch.rand(T, B) < 0.3
    time = {"lengths": torch.tensor(LENGTHS), "reset": reset}
    outputs = [module(x, states, **time), scrn_independently(module, x, states, **time)]
    check(*outputs)
    weights = [torch.randn_like(t) for t in flat(outputs[0])]
    leaves = [x, *module.parameters()]
    check(*(torch.autograd.grad(flat(out), leaves, weights) for out in outputs))


@pytest.mark.parametrize("zoneout", [0.25, (0.5, 0.0), (0.0, 0.75)])
def test_zoneout_of_scrn_in_evaluation(zoneout):
    """The part of a state that stays; s feeds h as it is after that."""
    module = scrn(num_layers=2, bidirectional=True, zoneout=zoneout).eval()
    x, states = torch.randn(T, B, I, dtype=torch.float64), scrn_states(module)
    stay = zoneout if isinstance(zoneout, tuple) else (zoneout, zoneout)
    check(module(x, states), scrn_independently(module, x, states, stay))
    one = scrn(num_layers=2, zoneout=zoneout).eval()
    handle = fastseq.streaming(one, batch=B)
    check(torch.stack([handle.step(x_t) for x_t in x]), one(x)[0])


RATES = {"recurrent_dropout": 0.4, "input_dropout": 0.3, "weight_dropout": 0.5, "zoneout": 0.2}


@pytest.mark.parametrize("name", RATES)
def test_masks_of_scrn(name):
    """They are of the seed, the sequences' ids and the place alone: of no order of the batch, no
    backend and no form of the call; another in each layer and part."""
    module = scrn(num_layers=2, bidirectional=True, **{name: RATES[name]})
    x, ids = torch.randn(T, B, I, dtype=torch.float64), torch.arange(B)
    y, last = module(x, seed=7)
    assert not torch.equal(module(x, seed=8)[0], y) and not torch.equal(module(x)[0], y)
    torch.manual_seed(3)
    drawn = module(x)[0]
    torch.manual_seed(3)
    assert torch.equal(module(x)[0], drawn)
    turn = torch.tensor([2, 0, 3, 1])
    check(module(x[:, turn], seed=7, row_ids=ids[turn]), (y[:, turn], [s[:, turn] for s in last]))
    packed = pack_padded_sequence(x[:, turn], torch.full((B,), T), enforce_sorted=False)
    rows, _ = module(packed, seed=7, row_ids=ids[turn])
    check(pad_packed_sequence(rows)[0], y[:, turn])
    nested = torch.nested.nested_tensor(list(x.transpose(0, 1)), layout=torch.jagged)
    check(torch.stack(list(module(nested, seed=7)[0].unbind()), 1), y)
    module.fastseq.backend = "eager"
    check(module(x, seed=7), (y, last))
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(x, seed=7)
    check(found, (y, last))
    plain = scrn(num_layers=2, bidirectional=True)
    plain.load_state_dict(module.state_dict())
    if name != "zoneout":
        check(module.eval()(x), plain(x))


def test_what_masks_of_scrn_mask():
    x = torch.randn(T, B, I, dtype=torch.float64)
    module = scrn(bidirectional=True)
    dropped = copy.deepcopy(module)
    with torch.no_grad():
        for name in ("weight_hh_l0", "weight_hh_l0_reverse"):
            getattr(dropped, name).zero_()
    for name, other, given in (
        ("recurrent_dropout", dropped, x),
        ("weight_dropout", dropped, x),
        ("input_dropout", module, torch.zeros_like(x)),
    ):
        setattr(module.fastseq, name, 1.0)
        masked = module(x)
        setattr(module.fastseq, name, 0.0)
        check(masked, other(given))
    states = scrn_states(module)
    module.fastseq.zoneout = (0.0, 1.0)
    stays = torch.cat([s.expand(T, B, C) for s in states[1]], -1)
    y = module(x, states)[0]
    check(torch.cat([y[..., H : H + C], y[..., -C:]], -1), stays)
    module.fastseq.zoneout = (1.0, 0.0)
    y = module(x, states)[0]
    check(y[..., :H], states[0][0].expand(T, B, H))
    h_mask = torch.randint(3, (2, B, H)).double()
    module.fastseq.zoneout = 0.0
    ways = [[getattr(module, name) for name in names] for names in module._all_weights]
    found = fastseq.scrn(x, ways, states, h_mask=h_mask)
    check(found, scrn_independently(module, x, states, h_mask=h_mask))


def test_no_two_masks_of_scrn_are_the_same(monkeypatch):
    """Each layer and part has a seed of its own, and none that of the call; the input's is one."""
    seeds, layers = [], []
    apply, of_input = masks.apply, masks.of_input
    monkeypatch.setattr(masks, "apply", lambda *a: (seeds.append(int(a[2])), apply(*a)))
    monkeypatch.setattr(masks, "of_input", lambda *a: layers.append(a[:2]) or of_input(*a))
    scrn(num_layers=2, zoneout=0.1, input_dropout=0.1)(torch.randn(T, B, I).double(), seed=5)
    assert len({5, *seeds}) == 5
    assert layers == [(torch.tensor(5), layer) for layer in (0, 0, 1, 1)]


def test_scrn_takes_a_nested_tensor():
    lengths = torch.tensor([3, 0, T, 1])
    module = scrn(num_layers=2, bidirectional=True, learn_state=True)
    with torch.no_grad():
        for name in ("h_0", "s_0"):
            getattr(module, name).normal_()
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    y, last = module(x, lengths=lengths)
    parts = [x[:n, b] for b, n in enumerate(lengths)]
    nested = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    found, final = module(nested)
    check((torch.nested.to_padded_tensor(found, 0.0), final), (y.transpose(0, 1), last))
    leaves = [x, *module.parameters()]
    once = torch.autograd.grad(found.values().square().sum() + final[0].sum(), leaves)
    check(once, torch.autograd.grad(y.square().sum() + last[0].sum(), leaves))
    with pytest.raises(ValueError, match="lengths: not taken with a NestedTensor"):
        module(nested, lengths=lengths)


def test_a_learned_state_of_scrn():
    module = scrn(num_layers=2, bidirectional=True, learn_state=True)
    assert list(module.state_dict())[-2:] == ["h_0", "s_0"]
    assert [tuple(p.shape) for p in (module.h_0, module.s_0)] == [(4, 1, H), (4, 1, C)]
    x = torch.randn(T, B, I, dtype=torch.float64)
    plain = scrn(num_layers=2, bidirectional=True)
    plain.load_state_dict(module.state_dict(), strict=False)
    check(module(x), plain(x))
    with torch.no_grad():
        for name in ("h_0", "s_0"):
            getattr(module, name).normal_()
    states = [p.expand(-1, B, -1) for p in (module.h_0, module.s_0)]
    check(module(x), plain(x, states))
    check(module(x[:, 0]), plain(x[:, 0], [s[:, 0] for s in states]))
    packed = pack_padded_sequence(x, [T, T, 3, 2])
    check(module(packed)[0].data, plain(packed, states)[0].data)
    check(module(x, [s.zero_() for s in scrn_states(module)]), plain(x))
    assert all(p.grad is None for p in module.parameters())
    module(x)[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in (module.h_0, module.s_0))
    module.reset_parameters()
    assert not module.h_0.any() and not module.s_0.any()
    one = scrn(learn_state=True)
    with torch.no_grad():
        one.s_0.normal_()
    check(fastseq.streaming(one, batch=B).step(x[0]), one(x[:1])[0][0])


def test_forms_of_scrn():
    module = scrn(bidirectional=True, learn_alpha=True)
    x, states = torch.randn(T, B, I, dtype=torch.float64), scrn_states(module)
    y, last = module(x, states)
    first = scrn(bidirectional=True, learn_alpha=True, batch_first=True)
    first.load_state_dict(module.state_dict())
    check(first(x.transpose(0, 1), states), (y.transpose(0, 1), last))
    check(module(x[:, 1], [s[:, 1] for s in states]), (y[:, 1], [s[:, 1] for s in last]))
    lengths = torch.tensor([6, 2, 1, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    rows, last = module(packed, states)
    check((pad_packed_sequence(rows)[0], last), module(x, states, lengths=lengths))
    one = scrn(learn_alpha=True)
    cell = fastseq.SCRNCell(I, H, context_size=C, learn_alpha=True, dtype=torch.float64)
    cell.load_state_dict({n.removesuffix("_l0"): w for n, w in one.state_dict().items()})
    hx, ys = None, []
    for x_t in x:
        hx = cell(x_t, hx)
        ys.append(torch.cat(hx, -1))
    check(torch.stack(ys), one(x)[0])
    check(cell(x[0, 0]), [s[0] for s in cell(x[0])])


def test_scrn_as_a_module():
    module, x = scrn(dtype=None, num_layers=2, dropout=0.5), torch.randn(T, B, I)
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_ic"]
    assert list(module.state_dict()) == [f"{n}_l{k}" for k in range(2) for n in names]
    assert repr(module) == "SCRN(3, 5, num_layers=2, dropout=0.5, context_size=2)"
    assert not torch.equal(module(x)[0], module(x)[0])  # dropout between the layers
    module.eval()
    expected = module(x)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(flat(other(x)), flat(expected), rtol=0, atol=0)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(flat(found), flat(expected))
    assert torch.fx.symbolic_trace(nn.Sequential(module))(x)[0].shape == expected[0].shape
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {t.dtype for t in flat(module(x))} == {torch.bfloat16}
    fastseq.set_options(module, backend="eager", memory="lean", zoneout=0.0)
    assert module.fastseq.backend == "eager" and module.fastseq.memory == "lean"
    torch.testing.assert_close(flat(module(x)), flat(expected))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "batch_first": True}])
def test_scrn_explained(options, capsys):
    module, x = scrn(**options), torch.randn(T, T, I, dtype=torch.float64)
    reset = torch.zeros(T, T, dtype=torch.bool)
    assert fastseq.explain(module, x, reset=reset) in ("native", "numba")
    printed = capsys.readouterr().out
    width = I + C * (1 + module.bidirectional)
    assert f"SCRN, leaky_integrator T={T} B={T} I={I} H={C}" in printed
    assert f"SCRN, rnn_sigmoid T={T} B={T} I={width} H={H}" in printed
    cell = fastseq.SCRNCell(I, H, context_size=C, backend="eager", dtype=torch.float64)
    assert fastseq.explain(cell, x[0]) == "eager"


def test_mistakes_with_scrn():
    for options, error, words in (
        ({"context_size": 0}, ValueError, "context_size must be greater than zero"),
        ({"context_size": 2.0}, TypeError, "context_size should be of type int, got: float"),
        ({"context_size": 2, "alpha": 1.0}, ValueError, "alpha should be a number between 0 and 1"),
        ({"context_size": 2, "zoneout": (0.1, 0.2, 0.3)}, ValueError, "one for each of h, s"),
        ({"context_size": 2, "learn_state": 1}, TypeError, "learn_state: expected a bool"),
    ):
        with pytest.raises(error, match=words):
            fastseq.SCRN(I, H, **options)
    module, x = scrn(), torch.randn(T, B, I, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"takes a pair \(h, s\) as its state, got a tensor"):
        module(x, torch.zeros(1, B, H))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(1, ...\), got \[2"):
        module(x, (x.new_zeros(1, B, H), x.new_zeros(2, B, C)))
    with pytest.raises(RuntimeError, match=r"input.size"):
        module(x[..., :2])
    with pytest.raises(TypeError, match="input: expected a Tensor or PackedSequence, got list"):
        module(x.tolist())
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 4D"):
        module(x[None])
    nested = torch.nested.nested_tensor([x[:, 0], x[:2, 1]], layout=torch.jagged)
    with pytest.raises(TypeError, match="got a NestedTensor, which the layers take; pass"):
        fastseq.scrn(nested, [p for _, p in module.named_parameters()])
    module.fastseq.zoneout = 0.1
    for given, error in (({"seed": 0.5}, TypeError), ({"row_ids": [0, 1]}, ValueError)):
        with pytest.raises(error, match=next(iter(given))):
            module(x, **given)


@pytest.mark.parametrize("learn_alpha", [False, True])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_streaming_of_an_scrn(backend, learn_alpha):
    """On packed weights, and without: by the module's own steps."""
    module = scrn(num_layers=2, learn_alpha=learn_alpha)
    module.fastseq.backend = backend
    x = torch.randn(T, B, I, dtype=torch.float64)
    handle = fastseq.streaming(module, batch=B)
    assert (handle._stream is None) == (backend is not None or isinstance(load("native"), str))
    with torch.no_grad():
        y, last = module(x)
    check(torch.stack([handle.step(x_t) for x_t in x]), y)
    for state, expected in zip(handle.state, last, strict=True):
        check(state, expected)
    other = copy.deepcopy(handle)
    out = torch.empty(B, H + C, dtype=torch.float64)
    check(handle.step(x[0], out=out), other.step(x[0]))
    handle.reset([0])
    assert not any(state[:, 0].any() for state in handle.state)
    assert all(state[:, 1:].any() for state in handle.state)
    handle.state = other.state
    check(handle.step(x[1]), other.step(x[1]))
    with torch.no_grad():
        module.weight_ic_l0.neg_()
        handle.refresh()
        y, _ = module(x[:1], tuple(torch.zeros_like(s) for s in last))
    handle.reset()
    check(handle.step(x[0]), y[0])
    with pytest.raises(ValueError, match=r"out: expected \(batch, hidden_size \+ context_size\)"):
        handle.step(x[0], out=out[:, :H])
    with pytest.raises(TypeError, match=r"expected a pair \(h, s\), got Tensor"):
        handle.state = out


# --- no way hands torch.nn a cell that it lacks

LACKED = [*KINDS, "scrn"]
each_lacked = pytest.mark.parametrize("cell", LACKED)


def lacked(cell, single=False):
    if cell == "scrn":
        return (fastseq.SCRNCell if single else fastseq.SCRN)(I, H, context_size=C)
    return (step if single else layer)(cell, dtype=None)


@each_lacked
@pytest.mark.parametrize("single", [False, True])
def test_restore_leaves_them_with_the_reason(cell, single):
    module = lacked(cell, single)
    model = nn.ModuleDict({"a": module, "b": fastseq.LSTM(I, H)})
    report = fastseq.restore(model)
    assert report.left["a"].startswith("torch.nn") and type(model["b"]) is nn.LSTM
    assert model["a"] is module and type(module).__module__.startswith("fastseq.")


@each_lacked
@pytest.mark.parametrize("single", [False, True])
def test_torchscript_refuses_them_with_words(cell, single):
    module = lacked(cell, single)

    class Holder(torch.jit.ScriptModule):
        def __init__(self):
            super().__init__()
            self.inner = module

    for way in (lambda: torch.jit.script(nn.Sequential(module)), Holder):
        with pytest.raises(TypeError, match=r"has no counterpart in torch.nn: torch.nn"):
            way()


@each_lacked
@pytest.mark.filterwarnings("default")
def test_a_trace_computes_the_same_of_any_length(cell):
    module, x = lacked(cell), torch.randn(T, B, I)
    traced = torch.jit.trace(module, (x,))
    stored = io.BytesIO()
    torch.jit.save(traced, stored)
    stored.seek(0)
    read = torch.jit.load(stored)
    for other in (x, torch.randn(T + 3, 2, I)):
        for mine, theirs in zip(flat(read(other)), flat(module(other)), strict=True):
            torch.testing.assert_close(mine, theirs)


@each_lacked
@pytest.mark.filterwarnings("default")
def test_quantize_dynamic_leaves_them_alone(cell):
    model = nn.ModuleDict({"a": lacked(cell), "b": lacked(cell, True)})
    fastseq.restore(model)
    kinds = {nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell}
    found = torch.ao.quantization.quantize_dynamic(model, kinds, dtype=torch.qint8)
    x = torch.randn(T, B, I)
    for mine, theirs in zip(found.values(), model.values(), strict=True):
        assert type(mine) is type(theirs)
        given = x[0] if "Cell" in type(mine).__name__ else x
        torch.testing.assert_close(flat(mine(given)), flat(theirs(given)))


@each_lacked
def test_replace_with_compat_leaves_them(cell):
    """An instance of torch.nn.GRU would be taken for one with the reset gate after the product."""
    for single in (False, True):
        module = lacked(cell, single)
        kind = type(module)
        report = fastseq.replace(nn.Sequential(module), compat=True)
        assert type(module) is kind and not report.swapped
        assert "0" in report.left or not isinstance(module, (nn.RNNBase, nn.RNNCellBase))


def test_compats_classes_are_torchs_cells_alone():
    for kind, name in ((compat.GRU, "GRU"), (compat.GRUCell, "GRUCell")):
        with pytest.raises(ValueError, match=r"an instance of torch.nn's GRU is taken for"):
            kind(I, H, reset_after=False)
        assert "reset_after" not in repr(getattr(compat, name)(I, H))
    with pytest.raises(ValueError, match="Select from 'tanh' or 'relu'"):
        compat.RNN(I, H, nonlinearity="sigmoid")
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: sigmoid"):
        compat.RNNCell(I, H, nonlinearity="sigmoid")(torch.randn(2, I))
    fastseq.install()
    try:
        with pytest.raises(ValueError, match=r"an instance of torch.nn's GRU"):
            nn.GRU(I, H, reset_after=False)
        assert fastseq.GRU(I, H, reset_after=False)._fastseq_cell == "gru_reset_before"
        assert fastseq.MGU(I, H).mode == "MGU"
    finally:
        fastseq.uninstall()


@pytest.mark.parametrize("cell", ["indrnn", "scrn"])
def test_onnx_refuses_what_it_has_no_operator_for(cell):
    pytest.importorskip("onnxscript")
    with pytest.raises(Exception, match=r"ONNX has no operator for (indrnn|leaky_integrator)"):
        torch.onnx.export(lacked(cell).eval(), (torch.randn(T, B, I),), dynamo=True, verbose=False)
