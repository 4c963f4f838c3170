"""fastseq.replace and its way back: what is swapped, what is kept, and what is left and why."""

import copy
import functools
import gc
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from twins import CELLS, KINDS, LAYERS, assert_same, tensors

import fastseq
from fastseq.nn import to_torch


class Tagger(nn.Module):
    def __init__(self, shared=None):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.encoder = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True, dropout=0.25)
        self.stages = nn.ModuleList([nn.GRU(12, 6), nn.RNN(6, 6, nonlinearity="relu")])
        self.again = self.stages[1]
        self.step = nn.LSTMCell(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, words):
        x, _ = self.encoder(self.embed(words))
        for stage in (*self.stages, self.again):
            x, _ = stage(x)
        return self.head(self.step(x[:, 0])[0])


class OwnLSTM(nn.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


def test_model():
    model = Tagger().eval()
    words = torch.randint(7, (2, 5))
    before, parameters = model(words), list(model.parameters())
    modules = list(model.modules())
    report = fastseq.replace(model)
    assert list(report.swapped) == ["encoder", "stages.0", "stages.1", "again", "step"]
    assert not report.left
    assert type(model.encoder) is fastseq.LSTM and type(model.step) is fastseq.LSTMCell
    assert type(model.stages[1]) is fastseq.RNN and model.again is model.stages[1]
    assert_same(model(words), before)
    assert not any(m.training for m in model.modules())
    for old, new in zip(modules, model.modules(), strict=True):
        assert old is new
    for old, new in zip(parameters, model.parameters(), strict=True):
        assert old is new
    model.train()
    model(words).sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    assert str(report).splitlines()[:2] == [
        "swapped 5, left 0",
        "  encoder: now fastseq.LSTM(4, 6, num_layers=2, batch_first=True, dropout=0.25, "
        "bidirectional=True)",
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_such_a_module(kind):
    module = getattr(nn, kind)(4, 6)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    before = module(x)
    report = fastseq.replace(module)
    assert type(module) is getattr(fastseq, kind) and report.swapped == {"": module}
    assert_same(module(x), before)
    assert "(the model itself): now fastseq." in str(report)
    assert copy.deepcopy(module).state_dict().keys() == module.state_dict().keys()
    fastseq.restore(module)
    assert type(module) is getattr(nn, kind) and "backend" not in module.__dict__
    for mine, yours in zip(tensors(module(x)), tensors(before), strict=True):
        assert torch.equal(mine, yours)


def test_options():
    model = Tagger()
    fastseq.replace(model, backend=("eager", "torch"), memory="full")
    assert model.encoder.fastseq.backend == model.step.fastseq.backend == ("eager", "torch")
    model = Tagger()
    fastseq.replace(model, memory="lean")
    assert model.encoder.fastseq.memory == "lean"
    assert repr(model.stages[0]) == "GRU(12, 6, memory='lean')"
    untouched = Tagger()
    with pytest.raises(ValueError, match="memory: expected 'full' or 'lean'"):
        fastseq.replace(untouched, memory="half")
    assert type(untouched.encoder) is nn.LSTM


def test_what_is_left_and_why():
    model = nn.ModuleDict(
        {
            "own": OwnLSTM(4, 6),
            "normed": parametrizations.weight_norm(nn.GRU(4, 6), "weight_hh_l0"),
            "scripted": torch.jit.script(CellNet(nn.LSTMCell(4, 6))).cell,
            "ours": fastseq.LSTM(4, 6, backend="eager"),
            "compat": fastseq.compat.LSTM(4, 6),
            "plain": nn.GRU(4, 6),
            "linear": nn.Linear(4, 4),
            "quantizable": torch.ao.nn.quantizable.LSTM(4, 6),
        }
    )
    kinds = {name: type(module) for name, module in model.items()}
    report = fastseq.replace(model)
    assert list(report.swapped) == ["plain"]
    left = {name: reason for name, reason in report.left.items() if "." not in name}
    assert list(left) == ["own", "normed", "scripted", "ours", "compat", "quantizable"]
    assert "OwnLSTM is a subclass of torch.nn.LSTM" in left["own"]
    assert "derive it from fastseq.LSTM, or call fastseq.install()" in left["own"]
    assert "parametrized" in left["normed"]
    assert "scripted" in left["scripted"]
    assert "already" in left["ours"] and "already" in left["compat"]
    assert "quantized" in left["quantizable"]
    assert all(type(m) is kinds[name] for name, m in model.items() if name != "plain")
    assert model["ours"].fastseq.backend == "eager"
    assert "  own: left, " in str(report)


def test_hooks_and_their_handles():
    """All kinds of hook run on the module as before, and go when their handles are removed."""
    module = nn.LSTM(4, 6)
    seen = []

    def note(what):
        return lambda *args, **kwargs: seen.append((what, args[0]))

    handles = [
        module.register_forward_pre_hook(note("pre")),
        module.register_forward_hook(note("forward")),
        module.register_full_backward_hook(note("backward")),
        module.register_full_backward_pre_hook(note("backward pre")),
        module.register_state_dict_pre_hook(note("state pre")),
        module.register_state_dict_post_hook(note("state post")),
        module.register_load_state_dict_pre_hook(note("load pre")),
        module.register_load_state_dict_post_hook(note("load post")),
    ]
    fastseq.replace(module)
    x = torch.randn(5, 3, 4, requires_grad=True)

    def use():
        module(x)[0].sum().backward()
        module.load_state_dict(module.state_dict())

    use()
    expected = ["pre", "forward", "backward pre", "backward"]
    expected += ["state pre", "state post", "load pre", "load post"]
    assert [what for what, _ in seen] == expected
    assert all(who is module for _, who in seen)
    for handle in handles:
        handle.remove()
    use()
    assert len(seen) == len(expected)


def test_modes_and_buffers():
    module = nn.GRU(4, 6, 2).eval()
    module.register_buffer("note", torch.arange(3))
    module.weight_hh_l0.requires_grad_(False)
    module.extra = "kept"
    fastseq.replace(module)
    assert not module.training and module.extra == "kept"
    assert torch.equal(module.note, torch.arange(3)) and "note" in module.state_dict()
    assert not module.weight_hh_l0.requires_grad and module.weight_ih_l0.requires_grad


def test_tied_parameters_and_optimizers():
    model = nn.ModuleList([nn.LSTM(6, 6), nn.LSTM(6, 6)])
    model[1].weight_hh_l0 = model[0].weight_hh_l0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fastseq.replace(model)
    assert model[1].weight_hh_l0 is model[0].weight_hh_l0
    before = model[0].weight_hh_l0.detach().clone()
    x = torch.randn(5, 3, 6)
    model[1](model[0](x)[0])[0].sum().backward()
    optimizer.step()
    assert not torch.equal(before, model[1].weight_hh_l0)


def test_old_weight_norm():
    """torch.nn.utils.weight_norm puts the weight before each call, by a hook."""
    module = nn.GRU(4, 6)
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(module, "weight_hh_l0")
    x = torch.randn(5, 3, 4)
    before = module(x)
    fastseq.replace(module)
    assert_same(module(x), before)
    with torch.no_grad():
        module.weight_hh_l0_g.mul_(2)
    assert not torch.allclose(module(x)[0], before[0])
    module(x)[0].sum().backward()
    assert module.weight_hh_l0_g.grad.any()


# -- a forward, or what it calls, that stands on the instance


def by_closure(module, method):
    old = getattr(module, method)
    return lambda *args, **kwargs: old(*args, **kwargs)


def by_partial(module, method):
    """As accelerate's hooks: the old one stays on the module."""
    module._old = getattr(module, method)
    return functools.partial(lambda m, *args, **kwargs: m._old(*args, **kwargs), module)


def by_bound_method(module, method):
    old = getattr(type(module), method)
    return types.MethodType(lambda m, *args, **kwargs: old(m, *args, **kwargs), module)


@pytest.mark.parametrize("wrap", [by_closure, by_partial, by_bound_method])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_of_the_instance(kind, wrap):
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    for place, turn, back in (
        (nn, fastseq.replace, fastseq.restore),
        (fastseq, fastseq.restore, fastseq.replace),
        (fastseq.compat, fastseq.restore, fastseq.replace),
    ):
        module = getattr(place, kind)(4, 6)
        before = module(x)
        module.forward = wrap(module, "forward")
        report = turn(module)
        assert not report.swapped and type(module) is getattr(place, kind)
        assert "its forward was replaced on the instance" in report.left[""]
        assert "take that off" in report.left[""]
        assert_same(module(x), before)
        del module.forward
        assert turn(module).swapped
        module.forward = wrap(module, "forward")
        assert_same(module(x), before)
        assert not back(module).swapped


def test_methods_that_torchs_forward_calls():
    """torch.nn's forward runs what stands there; fastseq's may not."""
    module = nn.LSTM(4, 6)
    module.permute_hidden = lambda hx, permutation: (hx[0] + 1, hx[1])
    x = torch.randn(5, 3, 4)
    before = module(x)
    assert "its permute_hidden was replaced" in fastseq.replace(module).left[""]
    assert_same(module(x), before)
    with pytest.raises(TypeError, match="forward was replaced on the instance"):
        layer = fastseq.GRU(4, 6)
        layer.forward = by_closure(layer, "forward")
        torch.jit.script(Net(layer))


def test_methods_that_compute_nothing_may_stand_on_the_instance():
    module = nn.GRU(4, 6)
    module.flatten_parameters = lambda: None
    module.train = lambda mode=True: module
    assert fastseq.replace(module).swapped
    assert fastseq.restore(module).swapped
    assert "train" in vars(module) and "flatten_parameters" in vars(module)


def test_wrapped_by_torch_distributed():
    """fully_shard and replicate give a module a class of theirs over its own."""

    class Sharded:
        __module__ = "torch.distributed.fsdp.somewhere"

    for base, turn in ((nn.LSTM, fastseq.replace), (fastseq.LSTM, fastseq.restore)):
        module = base(4, 6)
        module.__class__ = type("FSDPLSTM", (Sharded, base), {})
        report = turn(module)
        assert "torch.distributed made it a FSDPLSTM" in report.left[""]
        assert type(module).__name__ == "FSDPLSTM"


def test_compiled_layers_are_compiled_again():
    """Dynamo looks at the class; so a compiled model, or layer, runs what is there now."""
    torch._dynamo.reset()
    x, layer = torch.randn(5, 3, 4), nn.GRU(4, 6)
    layer.compile(backend="eager")
    model = torch.compile(nn.Sequential(layer), backend="eager")
    before = model(x)
    assert list(fastseq.replace(model).swapped) == ["_orig_mod.0"]
    assert_same(model(x), before)
    assert_same(layer(x), before)
    fastseq.restore(model)
    assert_same(model(x), before)


# -- what the report says


def copied_base(kind):
    """As torchrl's: torch's attributes, __module__ among them, on a base of its own."""

    class Base(nn.RNNBase):
        def __init__(self, *args, **kwargs):
            super().__init__(kind, *args, **kwargs)

    for name in vars(getattr(nn, kind)):
        if name != "__init__":
            setattr(Base, name, getattr(getattr(nn, kind), name))
    return type(kind, (Base,), {})


def test_the_report_names_classes_that_there_are():
    for kind in ("LSTM", "GRU"):
        left = fastseq.replace(copied_base(kind)(4, 6)).left[""]
        assert left.startswith(f"{kind} is a subclass of torch.nn.RNNBase")
        assert f"derive it from fastseq.{kind}, or call fastseq.install() before" in left
    left = fastseq.replace(OwnLSTM(4, 6)).left[""]
    assert left.startswith(f"{__name__}.OwnLSTM is a subclass of torch.nn.LSTM")
    cell = type("Cell", (nn.RNNCellBase,), {})(4, 6, True, 3)
    assert "torch.nn.RNNCellBase and may" in fastseq.replace(cell).left[""]


LAYER_CLASSES = (nn.LSTM, nn.GRU)


def packs(layer):
    return isinstance(layer, LAYER_CLASSES)


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(4, 6)
        self.step = nn.GRUCell(4, 6)

    def forward(self, x):
        return self.layer(x)[0] if isinstance(self.layer, nn.LSTM) else None


class AskingTuples(Asking):
    def forward(self, x):
        return all(isinstance(m, (nn.Linear, nn.LSTM)) for m in [self.layer])


class AskingElsewhere(Asking):
    @property
    def first(self):
        return packs(self.layer)

    def forward(self, x):
        return self.layer(x)[0]


class AskingDecorated(Asking):
    @torch.no_grad()
    def forward(self, x):
        return nn.LSTM is not None and isinstance(self.layer, nn.modules.rnn.LSTM)


class AskingOther(nn.Module):
    """Neither what it makes nor what it asks of others is a reason to warn."""

    def __init__(self, hx=()):
        super().__init__()
        self.layer = nn.LSTM(4, 6) if isinstance(hx, tuple) else nn.LSTM(4, 5)
        self.gru = nn.GRU(4, 6)

    def forward(self, x):
        made = nn.LSTM
        if isinstance(x, nn.utils.rnn.PackedSequence) or isinstance(self.step, nn.RNNCell):
            return isinstance(self.layer, nn.RNNBase), made
        return super().forward(x)


@pytest.mark.parametrize(
    "kind, method",
    [
        (Asking, "Asking.forward"),
        (AskingTuples, "AskingTuples.forward, Asking.forward"),
        (AskingElsewhere, "AskingElsewhere.first, Asking.forward"),
        (AskingDecorated, "AskingDecorated.forward, Asking.forward"),
        (AskingOther, None),
    ],
)
def test_a_note_where_the_model_asks_isinstance(kind, method):
    model = nn.Sequential(nn.ModuleDict({"inner": kind()}))
    notes = fastseq.replace(copy.deepcopy(model)).notes
    if method is None:
        assert not notes
        return
    assert len(notes) == 1
    assert notes[0].startswith(f"isinstance(..., nn.LSTM) stands in {method} and is false")
    assert "replace(model, compat=True)" in notes[0]
    report = fastseq.replace(model, compat=True)
    assert len(report.swapped) == 2 and not report.notes
    assert isinstance(model[0]["inner"].layer, nn.LSTM)


# -- misuse


@pytest.mark.parametrize("turn", [fastseq.replace, fastseq.restore])
@pytest.mark.parametrize(
    "model, words",
    [
        (nn.LSTM, "got the class LSTM; make an instance"),
        ([nn.LSTM(4, 6)], "got list; pass each of the modules, or an nn.ModuleList"),
        (nn.LSTM(4, 6).parameters(), "got generator; pass each"),
        (torch.optim.SGD(nn.LSTM(4, 6).parameters()), "got SGD; pass the model whose parameters"),
        ("model.pt", "got str; pass the model itself"),
        (nn.LSTM(4, 6).state_dict(), "got OrderedDict; load a state_dict into a model"),
        (nn.LSTM(4, 6).forward, "got method; pass the module that it calls"),
        (None, "got NoneType; pass the model itself"),
        (torch.zeros(3), "got Tensor; pass the model itself"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_model_that_is_no_module(turn, model, words):
    with pytest.raises(TypeError, match=f"model: expected a torch.nn.Module, {words}"):
        turn(model)


@pytest.mark.parametrize("backend", ["natve", ("torch", "natve"), (), 3])
def test_options_are_checked_before_anything_is_changed(backend):
    model = Tagger()
    with pytest.raises((TypeError, ValueError), match="backend: expected"):
        fastseq.replace(model, backend=backend)
    with pytest.raises(ValueError, match="memory: expected"):
        fastseq.replace(model, memory="leen")
    assert type(model.encoder) is nn.LSTM and "_fastseq" not in vars(model.encoder)


def test_nothing_to_do():
    report = fastseq.replace(nn.Linear(2, 2))
    assert str(report) == "swapped 0, left 0"


def test_restore():
    model = Tagger()
    words = torch.randint(7, (2, 5))
    model.eval()
    before = model(words)
    fastseq.replace(model, backend="eager")
    report = fastseq.restore(model)
    assert list(report.swapped) == ["encoder", "stages.0", "stages.1", "again", "step"]
    assert "now torch.nn.LSTM(" in str(report)
    assert type(model.encoder) is nn.LSTM and type(model.again) is nn.RNN
    assert torch.equal(model(words), before)
    assert all(
        a is b for a, b in zip(model.encoder._flat_weights, model.encoder.parameters(), strict=True)
    )
    compat = fastseq.compat.GRU(4, 6)
    fastseq.restore(compat)
    assert type(compat) is nn.GRU


class Doubled(fastseq.LSTM):
    def forward(self, input, hx=None):
        return super().forward(input * 2, hx)


class Named(fastseq.LSTM):
    """Computes what its parent does."""


def test_restore_leaves_what_computes_something_else():
    normed = parametrizations.weight_norm(fastseq.GRU(4, 6), "weight_hh_l0")
    model = nn.ModuleDict({"own": Doubled(4, 6), "named": Named(4, 6), "normed": normed})
    report = fastseq.restore(model)
    assert list(report.swapped) == ["named"] and list(report.left) == ["own", "normed"]
    assert "forward of its own" in report.left["own"]
    assert "remove_parametrizations" in report.left["normed"]
    for name in report.left:
        with pytest.raises(TypeError, match=r"has no counterpart in torch.nn"):
            to_torch(model[name])


@pytest.mark.parametrize("kind", KINDS)
def test_to_torch(kind):
    """A second module over the same parameters, the first as it was."""
    options = {"num_layers": 2, "batch_first": True} if kind in LAYERS else {"bias": False}
    module = getattr(fastseq, kind)(4, 6, **options, backend="eager").eval()
    module.register_buffer("note", torch.zeros(1))
    seen = []
    handle = module.register_forward_hook(lambda m, args, out: seen.append(m))
    module.register_load_state_dict_pre_hook(lambda m, *args: seen.append(m))
    twin = to_torch(module)
    assert type(twin) is getattr(nn, kind) and type(module) is getattr(fastseq, kind)
    assert not twin.training and module.fastseq.backend == "eager" and not hasattr(twin, "fastseq")
    for a, b in zip(module.parameters(), twin.parameters(), strict=True):
        assert a is b
    x = torch.randn(3, 5, 4) if kind in LAYERS else torch.randn(3, 4)
    assert_same(module(x), twin(x))
    assert seen == [module, twin]
    handle.remove()
    twin(x)
    assert len(seen) == 2
    seen.clear()
    module.load_state_dict(module.state_dict())
    twin.load_state_dict(module.state_dict())
    assert seen == [module, twin]
    if kind in LAYERS:
        assert all(a is b for a, b in zip(twin._flat_weights, twin.parameters(), strict=True))
    name = next(iter(dict(twin.named_parameters())))
    setattr(twin, name, nn.Parameter(torch.zeros_like(getattr(twin, name))))
    assert getattr(module, name).any()
    del module
    gc.collect()
    twin.load_state_dict(twin.state_dict())


# -- TorchScript, which takes torch.nn's modules in the place of ours


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.layer(x)[0])


class PackedNet(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x: nn.utils.rnn.PackedSequence):
        return self.layer(x)[0].data


class CellNet(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        return self.cell(x)


@pytest.mark.parametrize("room", ["nn", "compat"])
@pytest.mark.parametrize("kind", LAYERS)
def test_script(kind, room):
    """The model that was scripted holds torch.nn's layer then: torch.jit.script puts it there."""
    place = {"nn": fastseq, "compat": fastseq.compat}[room]
    model = Net(getattr(place, kind)(4, 6, 2, backend="eager"))
    x = torch.randn(5, 3, 4)
    before = model(x)
    layer = model.layer
    scripted = torch.jit.script(model)
    assert_same(scripted(x), before)
    assert type(model.layer) is getattr(nn, kind) and type(layer) is getattr(place, kind)
    assert_same(model(x), before)
    own = [*layer.parameters(), *model.head.parameters()]
    for a, b in zip(scripted.parameters(), own, strict=True):
        assert a.data_ptr() == b.data_ptr()
    kept = copy.deepcopy(Net(layer))
    torch.jit.script(copy.deepcopy(kept))
    assert type(kept.layer) is getattr(place, kind)


@pytest.mark.parametrize("room", ["nn", "compat"])
@pytest.mark.parametrize("kind", CELLS)
def test_script_of_cells(kind, room):
    place = {"nn": fastseq, "compat": fastseq.compat}[room]
    cell = getattr(place, kind)(4, 6)
    x = torch.randn(3, 4)
    assert_same(torch.jit.script(cell)(x), cell(x))
    model = CellNet(cell)
    expected = model(x)
    assert_same(torch.jit.script(model)(x), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_script_with_packed_sequences(kind):
    layer = getattr(fastseq, kind)(4, 6)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    expected = layer(packed)[0].data
    assert_same(torch.jit.script(PackedNet(layer))(packed), expected)


def test_script_refuses_what_torch_nn_does_not_compute():
    with pytest.raises(TypeError, match=r"Doubled has no counterpart in torch.nn"):
        torch.jit.script(Net(Doubled(4, 6)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, ("numba", "torch", "eager")])
def test_trace(kind, backend):
    """Serves other lengths and batches than those it was traced with, and says nothing."""
    module = getattr(fastseq, kind)(4, 6, backend=backend)
    model = Net(module) if kind in LAYERS else CellNet(module)
    shapes = [(5, 3, 4), (7, 2, 4)] if kind in LAYERS else [(3, 4), (2, 4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, torch.randn(shapes[0]))
    for shape in shapes:
        x = torch.randn(shape)
        assert_same(traced(x), model(x))
    out = tensors(traced(torch.randn(shapes[1])))[0]
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


# -- quantize_dynamic looks for exact types


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="no engine")
def test_quantize_dynamic():
    """It passes over our layers; restore first."""
    for place in (fastseq.compat, fastseq):
        model = nn.Sequential(place.LSTM(4, 6))
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
        assert type(quantized[0]) is place.LSTM
    x = torch.randn(5, 3, 4)
    expected = model(x)[0]
    assert_same(quantized(x)[0], expected)
    fastseq.restore(model)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM})
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert (quantized(x)[0] - expected).abs().max() < 0.1
    report = fastseq.replace(quantized)
    assert not report.swapped and "quantized" in report.left["0"]
