"""What users' code does to a layer of torch.nn: the same on fastseq's, side by side."""

import copy
import inspect
import pickle
import warnings
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.ao.nn.quantized.reference as nnqr
import torch.nn.functional as F
import torch.nn.utils.prune
from torch import _VF, nn
from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
from torch.ao.quantization.quantize_fx import prepare_fx
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from twins import CELLS, KINDS, LAYERS, assert_same, copied, needs, pair, state_for, tensors

import fastseq
from fastseq.nn import short
from fastseq.nn.options import CellOptions, LayerOptions

T, B, I, H = 5, 3, 4, 6  # noqa: E741  (the field's letters)


@pytest.fixture(autouse=True)
def double():
    """In float64, where the rule has no part for torch's own rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def sample(kind):
    return torch.randn(T, B, I) if kind in LAYERS else torch.randn(B, I)


def same(kind, function, *args, **kwargs):
    """``function(module)`` of both, whose parameters are the same."""
    found = []
    for module in pair(kind, *(args or (I, H)), **kwargs):
        torch.manual_seed(1)
        found.append(function(module))
    assert_same(found[1], found[0])


# the list that torch.nn computes with


def tied(m, x):
    w = nn.Parameter(torch.randn_like(m.weight_hh_l0))
    m._flat_weights[1] = w
    y = m(x)[0]
    y.sum().backward()
    return y, w.grad, m(x)[0]


def several(m, x):
    m._flat_weights[:2] = [torch.ones_like(w) for w in m._flat_weights[:2]]
    return m(x)[0]


def set_whole(m, x):
    kept = m._flat_weights
    m._flat_weights = [w * 2 for w in kept]
    y = m(x)[0]
    m.flatten_parameters()
    again = m(x)[0]
    m._flat_weights = kept
    y.sum().backward()
    return y, again, m(x)[0], m.weight_hh_l0.grad


def drop_connect(m, x):
    kept = m._flat_weights
    names = zip(m._flat_weights_names, kept, strict=True)
    m._flat_weights = [F.dropout(w, 0.5) if "weight_hh" in n else w for n, w in names]
    try:
        return m(x)[0], m(x)[0]
    finally:
        m._flat_weights = kept


def until_an_attribute_is_replaced(m, x):
    m._flat_weights[1] = torch.ones_like(m._flat_weights[1])
    y = m(x)[0]
    m.weight_ih_l0 = nn.Parameter(m.weight_ih_l0.detach() * 2)
    return y, m(x)[0]


def until_it_is_moved(m, x):
    m._flat_weights[1] = torch.ones_like(m._flat_weights[1])
    return m(x)[0], m.float().double()(x)[0]


def beside_functional_call(m, x):
    m._flat_weights[1] = nn.Parameter(torch.ones_like(m._flat_weights[1]))
    twice = {name: p.detach() * 2 for name, p in m.named_parameters()}
    y = m(x)[0]
    return y, torch.func.functional_call(m, twice, (x,))[0], m(x)[0]


def weight_drop(m, x):
    raw = m.weight_hh_l0
    del m._parameters["weight_hh_l0"]
    m.register_parameter("weight_hh_l0_raw", raw)
    outputs = []
    for _ in range(2):
        setattr(m, "weight_hh_l0", F.dropout(raw, 0.5))  # noqa: B010  (as AWD-LSTM does)
        outputs.append(m(x)[0])
    sum(y.sum() for y in outputs).backward()
    return outputs, raw.grad, list(m._flat_weights)


def by_torchs_function(m, x):
    z = torch.zeros(m.num_layers, B, H)
    hx = (z, z) if m.mode == "LSTM" else z
    m.check_forward_args(x, hx, None)
    function = {"LSTM": _VF.lstm, "GRU": _VF.gru, "RNN_TANH": _VF.rnn_tanh}[m.mode]
    options = m.bias, m.num_layers, m.dropout, m.training, m.bidirectional, m.batch_first
    return function(x, hx, m._flat_weights, *options)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "use",
    [
        tied,
        several,
        set_whole,
        drop_connect,
        until_an_attribute_is_replaced,
        until_it_is_moved,
        beside_functional_call,
        weight_drop,
        by_torchs_function,
    ],
)
def test_flat_weights(kind, use):
    x = sample(kind)
    same(kind, lambda m: use(m, x), I, H, 2)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", ["native", "numba", "eager", "torch"])
def test_flat_weights_on_every_backend(kind, backend):
    needs(backend)
    x = sample(kind)
    same(kind, lambda m: tied(m, x), I, H, backend=backend)


@pytest.mark.parametrize("kind", LAYERS)
def test_flat_weights_reach_every_way_of_calling(kind):
    """lengths, reset, masks, packed, a stream, a compiled layer: what was put there is computed."""
    theirs, ours = pair(kind, I, H)
    for m in (theirs, ours):
        torch.manual_seed(2)
        for k, w in enumerate(m._flat_weights):
            m._flat_weights[k] = torch.randn_like(w)
    x = sample(kind)
    expected = theirs(x)[0]
    assert_same(ours(x, lengths=[T] * B)[0], expected)
    assert_same(ours(x, reset=torch.zeros(T, B, dtype=torch.bool))[0], expected)
    packed = pack_padded_sequence(x, torch.tensor([T] * B))
    assert_same(ours(packed)[0].data, theirs(packed)[0].data)
    ours.fastseq.recurrent_dropout = 0.5
    assert_same(ours.eval()(x)[0], expected)
    handle = fastseq.streaming(ours, B)
    assert_same(torch.stack([handle.step(row).clone() for row in x]), expected)
    ours.fastseq.recurrent_dropout = 0
    assert_same(torch.compile(ours, backend="eager", fullgraph=True)(x)[0], expected)
    assert_same(fastseq.replace(theirs).swapped[""](x)[0], expected)
    fastseq.restore(theirs)
    assert type(theirs) is getattr(nn, kind)
    assert_same(theirs(x)[0], expected)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_keeps_what_was_put_into_flat_weights(way):
    m = fastseq.LSTM(I, H)
    m._flat_weights[1] = nn.Parameter(torch.randn_like(m.weight_hh_l0))
    x = sample("LSTM")
    assert torch.equal(copied(m, way)(x)[0], m(x)[0])
    m._flat_weights = [m.get_parameter(name) for name in m._flat_weights_names]
    assert torch.equal(copied(m, way)(x)[0], m(x)[0])


def test_flat_weights_of_another_number():
    """Told by the call, as torch.nn does, so that a list may be filled bit by bit."""
    m, x = fastseq.GRU(I, H), torch.randn(5, 3, I)
    expected, weights = m(x), list(m._flat_weights)
    m._flat_weights = weights[:3]
    with pytest.raises(RuntimeError, match=r"expected 4 tensors, weight_ih_l0, .*, got 3"):
        m(x)
    m._flat_weights = []
    with pytest.raises(RuntimeError, match="got 0"):
        m(x)
    for w in weights:
        m._flat_weights.append(w)
    assert_same(m(x), expected)
    assert copy.deepcopy(m._flat_weights) is not m._flat_weights
    assert type(copy.copy(m._flat_weights)) is list


# names

NAMES = (
    "cell memory weights backend deterministic zoneout recurrent_dropout input_dropout "
    "weight_dropout torch_class rates options states step run call stack masks _rates _cell "
    "_states _mask _step _forward _call _weights _stack _options _backend _handle"
).split()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before", "after", "class", "method"])
def test_every_other_name_is_the_users(kind, when):
    """A subclass keeps what it likes under any name, and computes what torch.nn's does."""
    x = sample(kind)
    results = []
    for base in (getattr(nn, kind), getattr(fastseq, kind)):
        values = {name: float(k) for k, name in enumerate(NAMES)}
        body = {}
        if when == "class":
            body = dict(values)
        elif when == "method":
            body = {name: (lambda self, name=name: name) for name in NAMES}

        class Mine(base):
            locals().update(body)

            def __init__(self, values=values):
                if when == "before":
                    self.__dict__.update(values)
                super().__init__(I, H)
                if when == "after":
                    for name, value in values.items():
                        setattr(self, name, value)

        torch.manual_seed(0)
        m = Mine()
        results.append(m(x))
        for name in NAMES:
            found = getattr(m, name)
            assert found() == name if when == "method" else found == values[name]
    assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", KINDS)
def test_modules_parameters_and_buffers_of_the_users_names(kind):
    x = sample(kind)

    def use(m):
        m.input_dropout, m.cell = nn.Dropout(0.0), nn.Linear(H, H)
        m.memory = nn.Parameter(torch.ones(2))
        m.register_buffer("weights", torch.ones(3))
        m.cell.load_state_dict({"weight": torch.eye(H), "bias": torch.zeros(H)})
        assert m.memory.shape == (2,) and m.weights.shape == (3,)
        return m.cell(m.input_dropout(tensors(m(x))[0]))

    same(kind, use)


@pytest.mark.parametrize("kind", KINDS)
def test_replace_leaves_the_users_attributes(kind):
    m = getattr(nn, kind)(I, H)
    kept = {name: object() for name in NAMES}
    m.__dict__.update(kept)
    m.zoneout = nn.Dropout(0.5)
    for turn in (fastseq.replace, fastseq.restore, fastseq.replace):
        assert turn(m).swapped
        assert isinstance(m.zoneout, nn.Dropout)
        assert all(m.__dict__[name] is value for name, value in kept.items() if name != "zoneout")
    assert type(m) is getattr(fastseq, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_methods_of_torchs_modules(kind):
    """All that torch.nn's module has, with its arguments."""
    theirs, ours = getattr(nn, kind), getattr(fastseq, kind)
    assert not set(dir(theirs)) - set(dir(ours))
    assert not set(dir(theirs(I, H))) - set(dir(ours(I, H)))
    for name, function in inspect.getmembers(theirs, inspect.isfunction):
        if name.startswith("__"):
            continue
        expected = list(inspect.signature(function).parameters)
        assert list(inspect.signature(getattr(ours, name)).parameters)[: len(expected)] == expected
    added = {name for name in dir(ours(I, H)) if name not in dir(theirs(I, H))}
    own = {name for name in added if not name.startswith("_fastseq")}
    assert own == {"fastseq", "__prepare_scriptable__"}


@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_methods_give_what_torchs_give(kind):
    def use(m):
        z, x = torch.zeros(1, B, H), sample(kind)
        hx = (z, z + 1) if kind == "LSTM" else z
        turned = m.permute_hidden(hx, torch.tensor([2, 1, 0]))
        sizes = m.get_expected_hidden_size(x, None)
        if kind == "LSTM":
            sizes += m.get_expected_cell_size(x, None)
        m.check_forward_args(x, hx, None)
        with pytest.raises(RuntimeError, match="Expected hidden"):
            m.check_forward_args(x, (z[:, :1], z) if kind == "LSTM" else z[:, :1], None)
        return turned, torch.tensor(sizes)

    same(kind, use)


# options


def test_options_are_checked_when_they_are_set():
    m = fastseq.LSTM(I, H, zoneout=(0.1, 0.2), backend=["native", "eager"])
    assert m.fastseq.zoneout == (0.1, 0.2) and m.fastseq.backend == ("native", "eager")
    m.fastseq.zoneout = 0.3
    assert m.fastseq.zoneout == 0.3 and m.fastseq.rates.zoneout == (0.3, 0.3)
    assert repr(m.fastseq) == "LayerOptions(backend=('native', 'eager'), zoneout=0.3)"
    for name, value, error in (
        ("memory", "leen", ValueError),
        ("backend", "natve", ValueError),
        ("backend", 3, TypeError),
        ("backend", [], TypeError),
        ("deterministic", 1, TypeError),
        ("zoneout", (0.1, 0.2, 0.3), ValueError),
        ("recurrent_dropout", "0.1", ValueError),
        ("zone_out", 0.1, AttributeError),
    ):
        with pytest.raises(error, match=name):
            setattr(m.fastseq, name, value)
    with pytest.raises(AttributeError):
        m.fastseq = None
    with pytest.raises(AttributeError, match="memory: no option"):
        fastseq.GRUCell(I, H).fastseq.memory = "lean"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"backend": "natve"}, ValueError),
        ({"backend": 3}, TypeError),
        ({"memory": "leen"}, ValueError),
        ({"deterministic": "yes"}, TypeError),
    ],
)
def test_wrong_options_are_told_at_once(options, error):
    model = nn.Sequential(nn.LSTM(I, H), fastseq.GRU(H, H))
    with pytest.raises(error, match=next(iter(options))):
        fastseq.LSTM(I, H, **options)
    with pytest.raises(error, match=next(iter(options))):
        fastseq.set_options(model, **options)
    if "deterministic" not in options:
        with pytest.raises(error, match=next(iter(options))):
            fastseq.replace(model, **options)
    assert type(model[0]) is nn.LSTM


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_an_option_that_is_deleted_is_the_default(kind):
    m = getattr(fastseq, kind)(I, H, recurrent_dropout=0.5, zoneout=0.3, backend="eager")
    del m.fastseq.zoneout, m.fastseq.recurrent_dropout, m.fastseq.backend
    assert repr(m) == repr(getattr(fastseq, kind)(I, H))
    x = sample(kind)
    assert_same(m(x), m.eval()(x))
    for wrong in ("zoneot", "rates", "checks"):
        with pytest.raises(AttributeError, match="no option of fastseq's"):
            delattr(m.fastseq, wrong)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_has_options_of_its_own(kind, way):
    m = getattr(fastseq, kind)(I, H, backend="eager")
    twin = way(m)
    assert twin.fastseq.backend == "eager"
    twin.fastseq.backend = "torch"
    assert m.fastseq.backend == "eager"


def test_options_of_a_whole_model():
    model = nn.ModuleDict({"a": fastseq.LSTM(I, H), "b": fastseq.GRUCell(I, H), "c": nn.GRU(I, H)})
    fastseq.set_options(model, backend="eager", memory="lean")
    assert model["a"].fastseq.backend == model["b"].fastseq.backend == "eager"
    assert model["a"].fastseq.memory == "lean"
    with pytest.raises(ValueError, match="one for each of h, c"):
        fastseq.set_options(model, backend=None, zoneout=(0.1, 0.2, 0.3))
    assert model["a"].fastseq.backend == "eager"
    with pytest.raises(TypeError, match="zone_out: no option"):
        fastseq.set_options(model, zone_out=0.1)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got list"):
        fastseq.set_options([model], backend=None)


def test_a_class_that_is_changed_by_hand():
    m, x = nn.LSTM(I, H), sample("LSTM")
    expected = m(x)
    m.__class__ = fastseq.compat.LSTM
    assert_same(m(x), expected)
    m.fastseq.memory = "lean"
    assert_same(m(x), expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_pickles_from_before_the_namespace(kind):
    """Their options stand among the attributes."""
    m = getattr(fastseq, kind)(I, H)
    state = {name: value for name, value in m.__getstate__().items() if name != "_fastseq"}
    state["backend"] = "eager"
    if kind == "LSTM":
        rates = fastseq.ops.masks.Rates(recurrent_dropout=0.25, zoneout=(0.1, 0.2))
        state |= {"memory": "lean", "deterministic": False, "_rates": rates}
    old = type(m).__new__(type(m))
    old.__setstate__(state)
    assert "backend" not in old.__dict__ and old.fastseq.backend == "eager"
    if kind == "LSTM":
        assert old.fastseq.memory == "lean" and old.fastseq.recurrent_dropout == 0.25
        assert old.fastseq.zoneout == (0.1, 0.2) and "_rates" not in old.__dict__
    x = sample(kind)
    m.fastseq.backend = "eager"
    assert_same(old.eval()(x), copied(old, "pickle")(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_a_pickle_of_torch_nn_with_a_backend_of_the_users(kind):
    """As it is read after ``fastseq.install()``, where the name of its class leads to ours."""
    m = getattr(nn, kind)(I, H)
    m.backend, m.memory = "gloo", [1]
    state = m.__getstate__() if kind == "LSTM" else dict(m.__dict__)
    ours = getattr(fastseq.compat, kind).__new__(getattr(fastseq.compat, kind))
    ours.__setstate__(state)
    assert (ours.backend, ours.memory) == ("gloo", [1]) and ours.fastseq.backend is None
    x = sample(kind)
    assert_same(ours(x), m(x))


# final states


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", [None, "native", "numba", "eager", "torch"])
@pytest.mark.parametrize(
    "way", ["plain", "lean", "bfloat16", "autocast", "expanded", "device", "lengths", "packed"]
)
def test_final_states_edited_before_backward(kind, backend, way):
    """As resets of ended episodes do it: torch.nn allows it in every mode."""
    needs(backend)
    m = getattr(fastseq, kind)(I, H, backend=backend, memory="lean" if way == "lean" else "full")
    m, x, hx = m.float(), sample(kind).float().requires_grad_(), None
    keywords = {"lengths": [T, 2, 1]} if way == "lengths" else {}
    if way == "bfloat16":
        m, x = m.bfloat16(), x.detach().bfloat16().requires_grad_()
    if way == "packed":
        x = pack_padded_sequence(x.detach(), torch.tensor([T, 2, 1]))
    if way == "expanded":
        one = torch.zeros(1, 1, H, dtype=torch.float32).expand(1, B, H)
        hx = (one, one) if kind == "LSTM" else one
    grads = []
    for edited in (False, True):
        m.zero_grad()
        try:
            with (
                torch.autocast("cpu", enabled=way == "autocast"),
                torch.device("cpu" if way == "device" else torch.get_default_device()),
            ):
                y, states = m(x, hx, **keywords)
        except NotImplementedError:
            pytest.skip("declined")
        loss = sum(t.float().square().sum() for t in tensors((y,)))
        loss = loss + sum(t.float().sum() for t in tensors((states,)))
        if edited:
            for state in tensors((states,)):
                state.detach().fill_(float("nan"))
                with torch.no_grad():
                    state[:, 1] = 0
        loss.backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("kind", LAYERS)
def test_final_states_edited_behind_a_compiled_layer(kind):
    m, x = getattr(fastseq, kind)(I, H), sample(kind)
    compiled = torch.compile(m, backend="aot_eager", fullgraph=True)
    y, states = compiled(x)
    with torch.no_grad():
        for state in tensors((states,)):
            state[:, 1] = 0
    y.sum().backward()
    found = [p.grad for p in m.parameters()]
    m.zero_grad(set_to_none=True)
    m(x)[0].sum().backward()
    assert_same(found, [p.grad for p in m.parameters()])


# tensor subclasses


class Named(torch.Tensor):
    """As fastai's TensorBase: whatever torch's functions make of it is one, too."""


class Counting(torch.Tensor):
    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(getattr(function, "__name__", str(function)))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["input", "state", "both"])
def test_tensor_subclasses(kind, what):
    x, lead = sample(kind), ((1, B) if kind in LAYERS else (B,))
    hx = state_for(kind, *lead, H)

    def use(m, sort=Named):
        state = hx
        if what != "input":
            state = tuple(s.as_subclass(sort) for s in hx) if m_is_pair else hx.as_subclass(sort)
        out = m(x if what == "state" else x.as_subclass(sort), state)
        return out, [torch.tensor(float(type(t) is sort)) for t in tensors(out)]

    m_is_pair = kind.startswith("LSTM")
    same(kind, use)
    counts = []
    for m in pair(kind, I, H):
        Counting.seen.clear()
        use(m, Counting)
        function, cell = kind.removesuffix("Cell").lower(), kind in CELLS
        counts.append(
            sum(n.startswith(function) and n.endswith("cell") is cell for n in Counting.seen)
        )
    assert counts[0] == counts[1] == 1


def test_a_packed_sequence_of_a_tensor_subclass():
    packed = pack_padded_sequence(sample("GRU"), torch.tensor([5, 3, 1]))
    packed = PackedSequence(packed.data.as_subclass(Named), *packed[1:])
    same("GRU", lambda m: m(packed))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
@pytest.mark.parametrize("batch_first", [True, False])
def test_per_sample_gradients_by_expanded_weights(kind, options, batch_first):
    x = sample(kind).transpose(0, 1) if batch_first else sample(kind)

    def use(m):
        call = call_for_per_sample_grads(m, batch_size=B, batch_first=batch_first)
        call(x)[0].sum().backward()
        return [p.grad_sample for p in m.parameters()]

    same(kind, use, I, H, batch_first=batch_first, **options)


def test_a_subclass_with_our_own_options():
    """They run on our kernels, whose outputs are plain tensors or of the subclass."""
    m, x = fastseq.LSTM(I, H), sample("LSTM")
    reset = torch.zeros(T, B, dtype=torch.bool)
    assert_same(m(x.as_subclass(Named), reset=reset), m(x))
    m.fastseq.backend = "eager"
    assert_same(m(x.as_subclass(Named)), m(x))


# torch.fx


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["input", "state"])
@pytest.mark.parametrize("module", [fastseq, fastseq.compat])
def test_symbolic_trace(kind, given, module):
    """A layer or cell is one node of the graph."""
    x, hx = sample(kind), state_for(kind, *((1, B) if kind in LAYERS else (B,)), H)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleList([getattr(module, kind)(I, H)])

        def forward(self, x, hx):
            if given == "input":
                return self.inner[0](x * 2)
            return self.inner[0](x, (hx[0], hx[1]) if kind.startswith("LSTM") else hx)

    net = Net()
    graph = torch.fx.symbolic_trace(net)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["inner.0"]
    assert_same(graph(x, hx), net(x, hx))
    assert fastseq.restore(graph).swapped


def test_symbolic_trace_of_lengths_and_reset():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = fastseq.GRU(I, H)

        def forward(self, x, lengths, reset):
            return self.rnn(x, lengths=lengths)[0] + self.rnn(x, reset=reset)[0]

    net, x = Net(), sample("GRU")
    given = x, torch.tensor([5, 3, 1]), torch.rand(T, B) > 0.5
    assert_same(torch.fx.symbolic_trace(net)(*given), net(*given))


def test_prepare_fx_and_shape_propagation():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.rnn, self.cell = (
                nn.Linear(I, I),
                fastseq.LSTM(I, H),
                fastseq.GRUCell(H, H),
            )

        def forward(self, x):
            y, (h, _) = self.rnn(self.fc(x))
            return self.cell(y[-1], h[0])

    net, x = Net().eval(), sample("LSTM")
    mapping = QConfigMapping().set_object_type(nn.Linear, default_dynamic_qconfig)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare_fx(net, mapping, (x,))
    assert_same(prepared(x), net(x))
    graph = torch.fx.symbolic_trace(net)
    torch.fx.passes.shape_prop.ShapeProp(graph).propagate(x)
    assert next(iter(reversed(graph.graph.nodes))).meta["tensor_meta"].shape == (B, H)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pre", [True, False])
def test_symbolic_trace_of_a_layer_with_hooks(kind, pre):
    """They would act twice, so it is told; hooks that make weights are the module's own."""
    holder, x = nn.Sequential(getattr(fastseq, kind)(I, H)), sample(kind)
    name = "weight_hh_l0" if kind in LAYERS else "weight_hh"
    torch.nn.utils.prune.random_unstructured(holder[0], name, 0.5)
    assert_same(torch.fx.symbolic_trace(holder)(x), holder(x))
    register = holder[0].register_forward_pre_hook if pre else holder[0].register_forward_hook
    handle = register(lambda module, *values: None)
    with pytest.raises(torch.fx.proxy.TraceError, match="would record the hooks"):
        torch.fx.symbolic_trace(holder)
    handle.remove()
    assert_same(torch.fx.symbolic_trace(holder)(x), holder(x))


@pytest.mark.parametrize("kind", KINDS)
def test_symbolic_trace_of_the_layer_itself(kind):
    for module in pair(kind, I, H):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(module)


def test_symbolic_trace_of_a_subclass_with_its_own_forward():
    """It is no leaf, as torch.nn's is none, and what it adds is not done twice."""

    class Twice(fastseq.GRU):
        def forward(self, x):
            return super().forward(x)[0] * 2

    with pytest.raises(TypeError, match="input: expected a Tensor"):
        torch.fx.symbolic_trace(nn.Sequential(Twice(I, H)))


# default devices


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", [None, "native", "numba", "eager", "torch", "reference"])
def test_a_default_device_changes_nothing(kind, device, backend):
    """Our own tensors are where the caller's are, and the calls go the short way."""
    needs(backend)
    m, x = getattr(fastseq, kind)(I, H, backend=backend), sample(kind)
    hx = state_for(kind, *((1, B) if kind in LAYERS else (B,)), H)
    calls = [((x,), {}), ((x, hx), {})]
    if kind in LAYERS:
        calls += [((pack_padded_sequence(x, torch.tensor([5, 3, 1])),), {})]
        calls += [((x,), {"lengths": [5, 3, 1]})]
        if backend != "torch":
            calls += [((x,), {"reset": torch.rand(T, B) > 0.5})]
    for args, keywords in calls:
        expected = m(*args, **keywords)
        with torch.device(device):
            found = m(*args, **keywords)
        assert_same(found, expected)
        sum(t.sum() for t in tensors(found)).backward()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_default_device_and_masks(device):
    options = {"recurrent_dropout": 0.3, "input_dropout": 0.3, "weight_dropout": 0.3}
    for extra in ({}, {"zoneout": 0.2}, {"num_layers": 2, "dropout": 0.4}):
        m, x = fastseq.LSTM(I, H, **options, **extra), sample("LSTM")
        for seed in (3, None):
            torch.manual_seed(5)
            expected = m(x, seed=seed, row_ids=[4, 2, 9])
            torch.manual_seed(5)
            with torch.device(device):
                assert_same(m(x, seed=seed, row_ids=[4, 2, 9]), expected)
    m = fastseq.LSTM(I, H, 2, dropout=0.4)
    torch.manual_seed(5)
    expected = m(x)
    torch.manual_seed(5)
    with torch.device(device):
        assert_same(m(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_default_device_leaves_the_short_way_open(kind, monkeypatch):
    needs("native")
    found, run = [], short._run
    monkeypatch.setattr(short, "_run", lambda *args: found.append(run(*args)) or found[-1])
    m, x = getattr(fastseq, kind)(I, H, backend="native"), sample(kind)
    with torch.device("cpu"), torch.device("meta"), torch.no_grad():
        m(x)
    assert len(found) == 1 and found[0] is not None


# quantization

QPARAMS = {"qscheme": torch.per_tensor_affine, "dtype": torch.quint8, "scale": 2.0, "zero_point": 5}


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "RNN"])
def test_reference_quantized_modules(kind):
    x = sample(kind).float()

    def use(m):
        names = m._flat_weights_names if kind in LAYERS else ("weight_ih", "weight_hh")
        qparams = {name: QPARAMS for name in names if "weight" in name} | {"is_decomposed": False}
        return getattr(nnqr, kind).from_float(m.float(), qparams)(x)

    same(kind, use)


# misuse


WRONG = [("weight_ih", (1, 9)), ("weight_hh", (3, H)), ("bias_hh", (3,)), ("weight_ih", (0, I))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, "native", "numba", "eager", "torch", "reference"])
def test_weights_of_another_size(kind, backend):
    """Kernels read them by the module's sizes."""
    needs(backend)
    for name, shape in WRONG:
        m = getattr(fastseq, kind)(I, H, backend=backend)
        name += "_l0" if kind in LAYERS else ""
        setattr(m, name, nn.Parameter(torch.zeros(shape)))
        with pytest.raises(
            RuntimeError, match=r"weight_ih|weight_hh|bias_hh|expanded size|expected 9"
        ):
            m(sample(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_states_that_are_no_tensors(kind):
    m, x = getattr(fastseq, kind)(I, H), sample(kind)
    array = np.zeros((1, B, H) if kind in LAYERS else (B, H))
    hx = (array, array) if kind.startswith("LSTM") else array
    with pytest.raises(AttributeError, match=r"hx: .*ndarray"):
        m(x, hx)
    for wrong in ("zeros", {"h": 1}, [1, 2, 3]):
        with pytest.raises((AttributeError, RuntimeError), match=r"hx: |should be a pair"):
            m(x, wrong)


@pytest.mark.parametrize("kind", CELLS)
def test_an_input_of_a_cell_that_is_no_tensor(kind):
    with pytest.raises(AttributeError, match="input: expected a Tensor, got ndarray"):
        getattr(fastseq, kind)(I, H)(np.zeros((B, I)))


def test_flags_that_are_no_bool():
    with pytest.raises(TypeError, match="all_states: expected a bool, got str"):
        fastseq.LSTM(I, H)(sample("LSTM"), all_states="no")
    with pytest.raises(TypeError, match="compat: expected a bool, got str"):
        fastseq.replace(nn.LSTM(I, H), compat="yes")


def test_restore_keeps_what_a_subclass_has():
    class Mine(fastseq.LSTM):
        def zero_state(self, batch):
            return torch.zeros(1, batch, H)

    model = nn.ModuleDict({"mine": Mine(I, H), "lean": fastseq.GRU(I, H, memory="lean")})
    report = fastseq.restore(model)
    assert report.left == {
        "mine": f"torch.nn.LSTM has no zero_state, which {Mine.__qualname__} has"
    }
    assert model["mine"].zero_state(2).shape == (1, 2, H)
    assert report.notes == ["lean: torch.nn has no memory='lean'"]
    assert type(model["lean"]) is nn.GRU


def test_a_report_that_is_called():
    """``model = fastseq.replace(model)`` is a mistake that is easily made."""
    with pytest.raises(TypeError, match="change the model in place and return a report"):
        fastseq.replace(nn.LSTM(I, H))(sample("LSTM"))


def test_every_option_has_a_default_and_a_check():
    for kind in (LayerOptions, CellOptions):
        for name in kind.checks:
            setattr(kind(), name, getattr(kind, name))
