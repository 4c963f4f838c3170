"""fastseq.init, the options ``init`` and ``learn_state``, and the learned state in every mode."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence
from twins import KINDS, LAYERS, tensors

import fastseq
from fastseq import init
from fastseq.cells import CELLS, Cell, Phase
from fastseq.nn.init import keeping_gates
from fastseq.nn.options import LayerOptions

DEEP = {"num_layers": 2, "bidirectional": True}
I, H = 3, 6  # noqa: E741  (the field's letters)


def modules():
    """Layers and cells of both libraries."""
    for library in (fastseq, nn):
        for kind in KINDS:
            options = DEEP if kind in LAYERS else {}
            yield getattr(library, kind)(I, H, **options)
    yield fastseq.LSTM(I, H, proj_size=4, **DEEP)


def named(module):
    return f"{type(module).__module__.partition('.')[0]}.{module}"


def parameters(module, kind):
    return [p for name, p in module.named_parameters() if name.startswith(kind)]


def blocks(module, kind):
    """Gate by gate, of each layer and direction."""
    gates = {"RNN": 1, "LSTM": 4, "GRU": 3}[type(module).__name__.removesuffix("Cell")]
    return [block for p in parameters(module, kind) for block in p.detach().chunk(gates)]


@pytest.mark.parametrize("module", list(modules()), ids=named)
def test_orthogonal(module):
    """By torch's own function, gate by gate."""
    others = [p.clone() for p in module.parameters()]
    generator = torch.Generator().manual_seed(3)
    assert init.orthogonal_(module, 0.5, generator) is module
    generator.manual_seed(3)
    for block in blocks(module, "weight_hh"):
        expected = nn.init.orthogonal_(torch.empty_like(block), 0.5, generator)
        assert torch.equal(block, expected)
        eye = 0.25 * torch.eye(block.shape[1])
        torch.testing.assert_close(block.t() @ block, eye, atol=1e-6, rtol=0)
    for (name, now), before in zip(module.named_parameters(), others, strict=True):
        assert name.startswith("weight_hh") != torch.equal(now, before)


@pytest.mark.parametrize("module", list(modules()), ids=named)
def test_identity(module):
    assert init.identity_(module, 0.5) is module
    for block in blocks(module, "weight_hh"):
        assert torch.equal(block, 0.5 * torch.eye(*block.shape))
    assert not any(p.any() for p in parameters(module, "bias"))
    assert all(p.any() and p.requires_grad for p in parameters(module, "weight_ih"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("library", [fastseq, nn], ids=["fastseq", "torch"])
def test_bias_of_a_gate(kind, library):
    """Of one gate alone."""
    gates = {"RNN": "h", "LSTM": "ifgo", "GRU": "rzn"}[kind.removesuffix("Cell")]
    for k, gate in enumerate(gates):
        module = getattr(library, kind)(I, H, **(DEEP if kind in LAYERS else {}))
        before = copy.deepcopy(module)
        if gate == "f":
            assert init.forget_gate_bias_(module, 2.5) is module
        else:
            assert init.gate_bias_(module, gate, 2.5) is module
        for ih, hh in zip(blocks(module, "bias_ih")[k :: len(gates)],
                          blocks(module, "bias_hh")[k :: len(gates)], strict=True):  # fmt: skip
            assert torch.equal(ih, torch.full((H,), 2.5)) and not hh.any()
        for name in ("bias_ih", "bias_hh"):
            pairs = enumerate(zip(blocks(module, name), blocks(before, name), strict=True))
            assert all(torch.equal(*pair) for j, pair in pairs if j % len(gates) != k)
        for now, then in zip(*(parameters(m, "weight") for m in (module, before)), strict=True):
            assert torch.equal(now, then)


def test_forget_gate_bias_begins_with_one():
    cell = init.forget_gate_bias_(nn.LSTMCell(I, H))
    assert torch.equal((cell.bias_ih + cell.bias_hh).chunk(4)[1], torch.ones(H))


def test_chrono():
    lstm = init.chrono_(fastseq.LSTM(I, 500, **DEEP), 40, torch.Generator().manual_seed(1))
    i, f = (
        torch.stack([(ih + hh).chunk(4)[k] for ih, hh in _biases(lstm)]).detach() for k in (0, 1)
    )
    assert torch.equal(i, -f) and len(f.unique()) > 1900
    steps = f.exp()
    assert 1 <= steps.min() and steps.max() <= 39 and abs(steps.mean() - 20) < 1
    gru = init.chrono_(nn.GRU(I, H), 2)
    assert not gru.bias_ih_l0.chunk(3)[1].any() and gru.bias_ih_l0.chunk(3)[0].any()


def _biases(layer):
    return zip(parameters(layer, "bias_ih"), parameters(layer, "bias_hh"), strict=True)


def replaces_forward(a_f, x_n, h_prev):
    f = sigmoid(a_f)  # noqa: F821  (a word)
    n = tanh(x_n)  # noqa: F821
    h = h_prev + f * (n - h_prev)
    return h, f, n


REPLACES = Cell(
    name="replaces",
    gates=("f", "n"),
    states=("h",),
    saved=("f", "n"),
    phases=(Phase(forward=replaces_forward, returns=("h", "f", "n")),),
    source="made up for this test: its f is 1 where the state is dropped, as the MGU's",
)


def test_which_gate_keeps_the_state(monkeypatch):
    """Read off the equations: a gate f does not always keep where it is 1."""
    assert keeping_gates(CELLS["lstm"]) == {"f": 1}
    assert keeping_gates(CELLS["gru"]) == keeping_gates(CELLS["gru_reset_before"]) == {"z": 1}
    assert keeping_gates(CELLS["rnn_tanh"]) == keeping_gates(CELLS["indrnn"]) == {}
    assert keeping_gates(REPLACES) == {"f": -1}
    monkeypatch.setitem(CELLS, "replaces", REPLACES)
    cell = nn.LSTMCell(I, 2 * H)  # as many rows as four gates of half the size
    cell._fastseq_cell = "replaces"
    with pytest.raises(ValueError, match=r"drops the state where its gate f is 1; .*'f', -1.0\)"):
        init.forget_gate_bias_(cell)


@pytest.mark.parametrize(
    "function, module, error, words",
    [
        (init.forget_gate_bias_, nn.GRU(I, H), ValueError,
         r"gru has no forget gate f; its gates are r, z, n; .*gate_bias_\(module, 'z', 1.0\)"),
        (init.forget_gate_bias_, fastseq.RNNCell(I, H), ValueError, "no forget gate f; .* are h"),
        (init.forget_gate_bias_, fastseq.LSTM(I, H, bias=False), ValueError, "biases.* bias=False"),
        (partial(init.gate_bias_, gate="f"), fastseq.GRU(I, H), ValueError, "gru has no gate f"),
        (partial(init.chrono_, max_steps=9), fastseq.RNN(I, H), ValueError, "no gate that keeps"),
        (partial(init.chrono_, max_steps=1), fastseq.LSTM(I, H), ValueError, "max_steps: .* got 1"),
        (init.orthogonal_, nn.Sequential(nn.LSTM(I, H)), TypeError, "got Sequential; .*modules()"),
        (init.identity_, nn.Linear(I, H), TypeError, "module: expected a recurrent layer or cell"),
    ],
)  # fmt: skip
def test_what_cannot_be(function, module, error, words):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(error, match=words):
        function(module)
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_weights_of_one_number_a_unit_are_refused():
    cell = fastseq.RNNCell(I, H)
    cell.__class__ = type("Diagonal", (fastseq.RNNCell,), {"_fastseq_cell": "indrnn"})
    for function, word in ((init.orthogonal_, "orthogonal"), (init.identity_, "the identity")):
        with pytest.raises(ValueError, match=f"no recurrent matrix that could be {word}"):
            function(cell)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits(dtype):
    layer = fastseq.LSTM(
        I, H, dtype=dtype, init=(init.orthogonal_, partial(init.chrono_, max_steps=9))
    )
    for block in blocks(layer, "weight_hh"):
        assert block.dtype is dtype
        square = block.float() @ block.float().t()
        torch.testing.assert_close(square, torch.eye(H), atol=0.02, rtol=0)
    assert init.identity_(layer).weight_hh_l0.trace() == H


def test_parametrized_weights():
    """They are set through the parametrization; what a hook puts there cannot be."""
    layer = fastseq.LSTM(I, H)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    init.orthogonal_(layer)
    for block in layer.weight_hh_l0.detach().chunk(4):
        torch.testing.assert_close(block @ block.t(), torch.eye(H))
    raw = layer._parameters.pop("bias_ih_l0")
    layer.bias_ih_l0 = raw.detach() * 2
    with pytest.raises(ValueError, match="bias_ih_l0: expected a parameter"):
        init.forget_gate_bias_(layer)


# The option init


@pytest.mark.parametrize("kind", KINDS)
def test_the_option_is_what_reset_parameters_ends_with(kind):
    functions = (init.orthogonal_, partial(init.gate_bias_, gate="h" if "RNN" in kind else "z"))
    functions = (init.orthogonal_, init.forget_gate_bias_) if "LSTM" in kind else functions
    for library in (fastseq, fastseq.compat):
        torch.manual_seed(5)
        layer = getattr(library, kind)(I, H, init=functions)
        torch.manual_seed(5)
        plain = getattr(nn, kind)(I, H)
        for function in functions:
            function(plain)
        with torch.no_grad():
            again = copy.deepcopy(layer)
            for p in again.parameters():
                p.fill_(9)
        torch.manual_seed(5)
        again.reset_parameters()
        for other in (layer, again):
            for p, q in zip(plain.parameters(), other.parameters(), strict=True):
                assert torch.equal(p, q)


def test_the_option_is_checked_shown_and_copied():
    layer = fastseq.LSTM(I, H, init=[init.orthogonal_, partial(init.forget_gate_bias_, value=2.0)])
    words = "init=(orthogonal_, partial(forget_gate_bias_, value=2.0))"
    for same in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert repr(same) == f"LSTM(3, 6, {words})"
    cell = fastseq.GRUCell(I, H, init=init.identity_)
    assert repr(cell) == "GRUCell(3, 6, init=identity_)"
    for wrong in ("orthogonal", None, layer, [3]):
        with pytest.raises(TypeError, match="init: expected a function of the module, as fastseq"):
            fastseq.GRU(I, H, init=wrong)
    with pytest.raises(ValueError, match="gru has no forget gate"):
        fastseq.GRU(I, H, init=init.forget_gate_bias_)
    model = nn.Sequential(layer, cell)
    fastseq.set_options(model, init=init.identity_)
    for module in (layer, cell):
        module.reset_parameters()
        assert all(torch.equal(b, torch.eye(H)) for b in blocks(module, "weight_hh"))
    del layer.fastseq.init
    assert repr(layer) == "LSTM(3, 6)"


def test_meta_device():
    layer = fastseq.LSTM(
        I, H, device="meta", learn_state=True,
        init=(init.orthogonal_, init.identity_, partial(init.chrono_, max_steps=4)),
    )  # fmt: skip
    assert all(p.is_meta for p in layer.parameters())
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.equal(layer.weight_hh_l0[:H], torch.eye(H)) and not layer.h_0.any()


# The learned state


def learned(kind, **options):
    """A layer with a state that is not zero."""
    layer = getattr(fastseq, kind)(I, H, learn_state=True, **options)
    with torch.no_grad():
        for name in names(layer):
            getattr(layer, name).uniform_(-1, 1)
    return layer


def names(layer):
    return [f"{state}_0" for state in CELLS[layer._fastseq_cell].states]


def given(layer, B, unbatched=False):
    """The same state as a caller passes it."""
    states = [getattr(layer, name).expand(-1, B, -1) for name in names(layer)]
    states = [s[:, 0] for s in states] if unbatched else states
    return tuple(states) if len(states) > 1 else states[0]


def values_and_gradients(layer, outputs):
    """Of all that there is, and of the gradient's own gradient."""
    flat = tensors(outputs)
    loss = sum((t.square() * (k + 1)).sum() for k, t in enumerate(flat))
    wanted = [getattr(layer, name) for name in names(layer)] + [layer.weight_hh_l0]
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
    return [*flat, *first, *second]


FORMS = ("dense", "batch_first", "unbatched", "one step", "packed", "lengths", "jagged", "reset")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", [None, "eager", "torch"])
def test_it_is_the_state_where_none_is_given(kind, form, backend):
    if form == "reset" and backend == "torch":
        pytest.skip("torch has no reset")
    options = {"batch_first": form in ("batch_first", "jagged"), "num_layers": 2}
    options |= {"proj_size": 4} if kind == "LSTM" and form == "dense" else {}
    layer = learned(kind, bidirectional=True, backend=backend, dtype=torch.float64, **options)
    x, B, keywords = torch.randn(4, 3, I, dtype=torch.float64), 3, {}
    if form == "batch_first":
        B = 4
    elif form == "one step":
        x = x[:1]
    elif form == "unbatched":
        x, B = x[:, 0], 1
    elif form == "packed":
        x = pack_sequence([x[:2, 0], x[:, 1], x[:1, 2]], enforce_sorted=False)
    elif form == "jagged":
        x = torch.nested.nested_tensor([x[:2, 0], x[:, 1], x[:1, 2]], layout=torch.jagged)
    elif form == "lengths":
        keywords["lengths"] = torch.tensor([2, 4, 0])
    elif form == "reset":
        keywords["reset"] = torch.zeros(4, 3, dtype=torch.bool)
        keywords["reset"][2, 1] = keywords["reset"][0, 2] = True
    expected = layer(x, given(layer, B, form == "unbatched"), **keywords)
    found = layer(x, **keywords)
    if form == "jagged":  # torch has no second derivative of it
        expected, found = (tensors([o[0].values(), *o[1:]]) for o in (expected, found))
        torch.testing.assert_close(found, expected)
        return
    for a, b in zip(*(values_and_gradients(layer, o) for o in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_behind_a_reset_the_state_is_zero():
    layer, x = learned("LSTM"), torch.randn(4, 2, I)
    plain = fastseq.LSTM(I, H)
    plain.load_state_dict(layer.state_dict(), strict=False)
    begins = torch.zeros(4, 2, dtype=torch.bool)
    begins[2, 0] = begins[0, 1] = True
    y, _ = layer(x, reset=begins)
    torch.testing.assert_close(y[:2, 0], layer(x[:2, :1])[0][:, 0])
    torch.testing.assert_close(y[2:, 0], plain(x[2:, :1])[0][:, 0])
    torch.testing.assert_close(y[:, 1], plain(x[:, 1:])[0][:, 0])


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_stream_begins_with_it(backend):
    layer, x = learned("LSTM", num_layers=2, backend=backend), torch.randn(3, 2, I)
    handle = fastseq.streaming(layer, batch=2)
    y = torch.stack([handle.step(step) for step in x])
    torch.testing.assert_close(y, layer(x)[0].detach())
    handle.reset([1])
    assert not handle.state[0][:, 1].any()


@pytest.mark.filterwarnings("ignore:The tensor attributes", "ignore:.*torch.jit.trace")
def test_modes():
    """compile, export, trace, autocast, functional_call, vmap, masks, lean memory."""
    x = torch.randn(4, 3, I)
    layer = learned("GRU")
    expected = layer(x, given(layer, 3))
    _same(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    batch = torch.export.Dim("B", min=2)
    program = torch.export.export(layer.eval(), (x,), dynamic_shapes={"input": {1: batch}})
    _same(program.module()(x[:, :2]), layer(x[:, :2], given(layer, 2)))
    traced = torch.jit.trace(layer, (x,))
    _same(traced(x[:, :2]), layer(x[:, :2], given(layer, 2)))
    with torch.autocast("cpu", torch.bfloat16):
        _same(layer(x), layer(x, given(layer, 3)))
    own = {name: torch.stack([p, p + 1]).detach() for name, p in layer.named_parameters()}

    def call(parameters):
        return torch.func.functional_call(layer, parameters, (x,))

    one = [call({name: p[k] for name, p in own.items()}) for k in (0, 1)]
    _same(torch.func.vmap(call)(own), [torch.stack(parts) for parts in zip(*one, strict=True)])
    masked = learned("GRU", recurrent_dropout=0.3, memory="lean")
    _same(masked(x, seed=3), masked(x, given(masked, 3), seed=3))
    masked.fastseq.recurrent_dropout = 0
    _same(masked(x), masked(x, given(masked, 3)))


def test_one_graph_for_packed_rows():
    layer = learned("LSTM")
    x = pack_sequence([torch.randn(3, I), torch.randn(2, I)])
    _same(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x, given(layer, 2)))


def _same(found, expected):
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_parameters_of_the_state():
    torch.manual_seed(2)
    plain = nn.LSTM(I, H, proj_size=4, **DEEP)
    after = torch.rand(1)
    torch.manual_seed(2)
    layer = fastseq.LSTM(I, H, proj_size=4, learn_state=True, **DEEP)
    assert torch.equal(after, torch.rand(1))
    added = layer.state_dict().keys() - plain.state_dict().keys()
    assert added == {"h_0", "c_0"} and len(layer._flat_weights) == len(plain._flat_weights)
    assert layer.h_0.shape == (4, 1, 4) and layer.c_0.shape == (4, 1, H)
    x = torch.randn(4, 2, I)
    torch.testing.assert_close(layer(x)[0], plain(x)[0])
    with torch.no_grad():
        layer.c_0.fill_(1)
    torch.manual_seed(2)
    layer.reset_parameters()
    assert torch.equal(after, torch.rand(1)) and not layer.c_0.any()
    assert torch.equal(layer.weight_hr_l1, plain.weight_hr_l1)
    file = io.BytesIO()
    torch.save(learned("GRU"), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.h_0.any() and repr(loaded) == "GRU(3, 6, learn_state=True)"
    _same(loaded(x), loaded(x, given(loaded, 2)))


def test_a_users_own_names_stay_the_users():
    class Own(fastseq.GRU):
        def __init__(self):
            super().__init__(I, H)
            self.h_0 = nn.Parameter(torch.full((1,), 9.0))

    layer = Own()
    _same(layer(torch.ones(2, 1, I)), layer(torch.ones(2, 1, I), torch.zeros(1, 1, H)))
    layer.reset_parameters()
    assert layer.h_0.any()


def test_torchs_layers_have_no_such_state():
    model = nn.Sequential(learned("LSTM"))
    report = fastseq.restore(model)
    assert report.left.keys() == {"0"} and "learned (learn_state=True)" in report.left["0"]
    with pytest.raises(TypeError, match=r"no counterpart in .*: its initial state is learned"):
        torch.jit.script(model)
    layer = fastseq.GRU(I, H)
    for change in (lambda: setattr(layer.fastseq, "learn_state", True),
                   lambda: fastseq.set_options(layer, learn_state=True)):  # fmt: skip
        with pytest.raises(ValueError, match="learn_state: the layer was made with False"):
            change()
    with pytest.raises(TypeError, match="learn_state: expected a bool, got int"):
        fastseq.GRU(I, H, learn_state=1)
    with pytest.raises(TypeError):
        fastseq.GRUCell(I, H, learn_state=True)


def test_a_short_call_asks_no_more_than_before():
    """One question, of options that an older pickle has not made, too."""
    assert LayerOptions().plain and not LayerOptions(zoneout=0.1).plain
    assert not LayerOptions(learn_state=True).plain
    old = LayerOptions.__new__(LayerOptions)
    old.__dict__.update({"states": ("h",), "backend": None})
    layer = fastseq.GRU(I, H)
    layer._fastseq = old
    assert not old.plain and not old.learn_state
    _same(layer(torch.ones(2, 1, I)), layer(torch.ones(2, 1, I), torch.zeros(1, 1, H)))
    old.zoneout = 0.5
    old.zoneout = 0
    assert old.plain


@pytest.mark.parametrize(
    "kind, options",
    [("PeepholeLSTM", {}), ("CoupledLSTM", {}), ("MGU", {}), ("SCRN", {"context_size": 4})],
)
def test_cells_that_torch_lacks(kind, options):
    """Layers and cells take the options, and begin again with them."""
    for name, more in ((kind, DEEP), (f"{kind}Cell", {})):
        module = getattr(fastseq, name)(I, H, init=init.orthogonal_, **options, **more)
        with torch.no_grad():
            for p in module.parameters():
                p.fill_(9)
        module.reset_parameters()
        for p in parameters(module, "weight_hh"):
            for block in p.detach().split(H):
                torch.testing.assert_close(block @ block.t(), torch.eye(H))
        init.identity_(module)
        assert all(not p.any() for p in parameters(module, "bias"))


@pytest.mark.parametrize("kind", ["PeepholeLSTM", "CoupledLSTM", "MGU", "IndRNN"])
def test_their_learned_state(kind):
    layer, x = learned(kind, **DEEP), torch.randn(4, 3, I)
    _same(layer(x), layer(x, given(layer, 3)))
    assert repr(layer).endswith("learn_state=True)")
    layer.reset_parameters()
    assert not layer.h_0.any() and parameters(layer, "weight_hh")[0].any()


def test_forget_gates_of_cells_that_torch_lacks():
    for kind in ("PeepholeLSTM", "CoupledLSTM"):
        layer = getattr(fastseq, kind)(I, H, init=init.forget_gate_bias_)
        k = CELLS[layer._fastseq_cell].gates.index("f")
        assert torch.equal(layer.bias_ih_l0[k * H : (k + 1) * H], torch.ones(H))
    with pytest.raises(ValueError, match="mgu drops the state where its gate f is 1"):
        fastseq.MGU(I, H, init=init.forget_gate_bias_)
