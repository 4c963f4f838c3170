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
    names = {n for n in vars(cls) if not n.startswith("__")}
    assert not names, "no behaviour of its own"


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

    words = {"LSTM": "hx.*previously had type Tensor", "GRU": "Unsupported value kind: Tensor"}[
        kind
    ]
    with pytest.raises(RuntimeError, match=words):
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
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
        compiled(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        assert_same(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))
    torch._dynamo.reset()
    main = getattr(fastseq, kind)(4, 6)
    assert_same(torch.compile(main, fullgraph=True, backend="eager")(x), main(x))
