"""fastseq.compat: instances of torch.nn's classes with fastseq's behaviour."""

import copy
import pickle

import pytest
import torch
from torch import nn
from twins import CELLS, KINDS, LAYERS, assert_same, tensors

import fastseq
from fastseq import compat


@pytest.mark.parametrize("kind", KINDS)
def test_is_both(kind):
    cls = getattr(compat, kind)
    module = cls(4, 6)
    assert isinstance(module, getattr(nn, kind)) and isinstance(module, getattr(fastseq, kind))
    assert cls.forward is getattr(fastseq, kind).forward
    assert cls.__init__ is getattr(fastseq, kind).__init__
    assert repr(module) == repr(getattr(nn, kind)(4, 6))
    listed = {name: value for name, value in vars(cls).items() if not name.startswith("__")}
    inherited = {name: getattr(super(cls, module), name).__func__ for name in listed}
    assert listed == inherited, "no behaviour of its own"
    theirs = {name for name in vars(getattr(nn, kind)) if not name.startswith("__")}
    assert theirs <= listed.keys(), "a client may copy the dictionary"


@pytest.mark.parametrize("kind", KINDS)
def test_replace_takes_them(kind):
    """On request, and for the main classes too, which keep their options."""
    model = nn.ModuleDict({"theirs": getattr(nn, kind)(4, 6), "ours": getattr(fastseq, kind)(4, 6)})
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    before = [layer(x) for layer in model.values()]
    model["ours"].fastseq.backend = "eager"
    report = fastseq.replace(model, compat=True, backend=("torch", "eager"))
    assert list(report.swapped) == ["theirs", "ours"] and not report.left
    assert f"theirs: now fastseq.compat.{kind}(4, 6" in str(report)
    assert all(type(layer) is getattr(compat, kind) for layer in model.values())
    assert all(isinstance(layer, getattr(nn, kind)) for layer in model.values())
    assert model["theirs"].fastseq.backend == ("torch", "eager")
    assert model["ours"].fastseq.backend == "eager"
    for layer, expected in zip(model.values(), before, strict=True):
        assert_same(layer(x), expected)
    assert "already" in fastseq.replace(model).left["ours"]
    fastseq.restore(model)
    assert all(type(layer) is getattr(nn, kind) for layer in model.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", [None, "eager", "torch"])
def test_behaves_as_fastseq(kind, backend):
    options = {"num_layers": 2, "bidirectional": True} if kind in LAYERS else {}
    torch.manual_seed(0)
    ours = getattr(fastseq, kind)(4, 6, **options, backend=backend)
    torch.manual_seed(0)
    module = getattr(compat, kind)(4, 6, **options, backend=backend)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    out = module(x)
    for a, b in zip(tensors(out), tensors(ours(x)), strict=True):
        assert torch.equal(a, b)
    tensors(out)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    if kind in LAYERS:
        assert_same(module(x, lengths=[1, 5, 0]), ours(x, lengths=[1, 5, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_state_dicts(kind):
    module = getattr(compat, kind)(4, 6)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    for twin in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(twin) is type(module)
        assert_same(twin(x), module(x))
    theirs = getattr(nn, kind)(4, 6)
    theirs.load_state_dict(module.state_dict())
    assert_same(module(x), theirs(x))


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_a_plain_subclass_cannot_be_scripted(kind):
    """What __prepare_scriptable__ saves these classes from; scripting them: test_replace.py."""

    class Plain(getattr(nn, kind)):
        pass

    words = {"LSTM": "Variable 'hx' previously had type Tensor", "GRU": "Unsupported value kind"}
    with pytest.raises(RuntimeError, match=words[kind]):
        torch.jit.script(nn.Sequential(Plain(4, 6)))


@pytest.mark.full
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_dynamo(kind):
    """The layers break its graph unless allow_rnn is set, as nn.LSTM does; the cells do not."""
    module = getattr(compat, kind)(4, 6)
    x = torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    if kind in CELLS:
        assert_same(compiled(x), module(x))
        return
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN, GRU, or LSTM"):
        compiled(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_same(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))
    torch._dynamo.reset()
    main = getattr(fastseq, kind)(4, 6)
    assert_same(torch.compile(main, fullgraph=True, backend="eager")(x), main(x))
