"""Parameters live in these modules as in torch.nn's: saved, copied, moved, tied, replaced."""

import copy
import io

import pytest
import torch
from rules import check_alike
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from twins import KINDS, LAYERS, assert_same, assert_same_gradients, caught, copied, pair, tensors

import fastseq

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def build(kind, **kwargs):
    """A module with more than one of each thing it can have."""
    return getattr(fastseq, kind)(4, 6, **_options(kind), **kwargs)


def twin(kind, **kwargs):
    return pair(kind, 4, 6, **_options(kind), **kwargs)


def _options(kind):
    if kind not in LAYERS:
        return {}
    proj = {"proj_size": 3} if kind == "LSTM" else {}
    return {"num_layers": 2, "bidirectional": True, **proj}


def sample(kind):
    return torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)


@pytest.fixture
def double():
    """In float64, where the rule has no part for torch's own rounding."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


in_double = pytest.mark.usefixtures("double")


def weight_name(kind):
    """A weight that has a gradient: a cell's first state is zero."""
    return "weight_hh_l0" if kind in LAYERS else "weight_ih"


def assert_equal(a, b):
    for mine, yours in zip(tensors(a), tensors(b), strict=True):
        assert torch.equal(mine, yours)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_both_ways(kind):
    theirs, ours = getattr(nn, kind)(4, 6, **_options(kind)), build(kind)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = sample(kind)
    ours.load_state_dict(theirs.state_dict())
    assert_same(ours(x), theirs(x))
    back = getattr(nn, kind)(4, 6, **_options(kind))
    back.load_state_dict(build(kind, backend="eager").state_dict())
    back.load_state_dict(ours.state_dict())
    assert_equal(back(x), theirs(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        getattr(fastseq, kind)(5, 6, **_options(kind)).load_state_dict(theirs.state_dict())


@pytest.mark.parametrize("kind", KINDS)
def test_load_state_dict_assign(kind):
    theirs = getattr(nn, kind)(4, 6, **_options(kind))
    ours = build(kind, device="meta")
    ours.load_state_dict(theirs.state_dict(), assign=True)
    assert {p.data_ptr() for p in ours.parameters()} == {p.data_ptr() for p in theirs.parameters()}
    x = sample(kind)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies(kind, way):
    ours = build(kind, backend="eager")
    ours.eval()
    x = sample(kind)
    before = ours(x)
    again = copied(ours, way)
    assert type(again) is type(ours) and not again.training and again.fastseq.backend == "eager"
    assert_equal(again(x), before)
    with torch.no_grad():
        for p in again.parameters():
            p.zero_()
    assert_equal(ours(x), before)
    assert all(not t.any() for t in tensors(again(x)))


@pytest.mark.parametrize("kind", KINDS)
def test_safe_load_of_a_state_dict(kind):
    file = io.BytesIO()
    torch.save(build(kind).state_dict(), file)
    file.seek(0)
    build(kind).load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("kind", KINDS)
def test_meta_and_to_empty(kind):
    theirs, _ = twin(kind)
    ours = build(kind, device="meta")
    out = tensors(ours(sample(kind).to("meta")))
    expected = tensors(theirs(sample(kind)))
    assert [o.shape for o in out] == [e.shape for e in expected]
    assert all(o.is_meta for o in out)
    ours.to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict())
    x = sample(kind)
    assert_same(ours(x), theirs(x))


@pytest.mark.parametrize("kind", KINDS)
def test_to_another_dtype(kind):
    theirs, ours = twin(kind)
    x = sample(kind).double()
    assert_same(ours.double()(x), theirs.double()(x))
    kept = list(ours.parameters())
    ours.to(torch.bfloat16)
    assert all(a is b for a, b in zip(kept, ours.parameters(), strict=True))
    assert {t.dtype for t in tensors(ours(x.bfloat16()))} == {torch.bfloat16}


@pytest.mark.parametrize("kind", LAYERS)
def test_pickles_of_before_proj_size(kind):
    """Modules of torch before 1.8 have no ``proj_size``."""
    ours = getattr(fastseq, kind)(4, 6)
    x = sample(kind)
    before = ours(x)
    state = ours.__getstate__()
    del state["proj_size"]
    old = type(ours).__new__(type(ours))
    old.__setstate__(state)
    assert old.proj_size == 0
    assert_equal(old(x), before)
    # older still: _all_weights holds tensors instead of names
    state = ours.__getstate__()
    state["_all_weights"] = [list(ours._flat_weights)]
    old = type(ours).__new__(type(ours))
    old.__setstate__(state)
    assert_equal(old(x), before)


@pytest.mark.parametrize("kind", LAYERS)
def test_lists_of_weights(kind):
    theirs, ours = twin(kind)
    assert ours._flat_weights_names == theirs._flat_weights_names
    assert [len(ws) for ws in ours.all_weights] == [len(ws) for ws in theirs.all_weights]
    flat = [w for ws in ours.all_weights for w in ws]
    for listed in (ours._flat_weights, list(ours.parameters())):
        assert all(a is b for a, b in zip(flat, listed, strict=True))
    assert ours.flatten_parameters() is None
    ours.weight_hh_l0 = nn.Parameter(torch.zeros_like(ours.weight_hh_l0))
    assert ours._flat_weights[1] is ours.weight_hh_l0


#: Ways to change a list, after which it holds the weights that are due, or raises in a call.
CHANGES = {
    "slice": lambda ws, due: ws.__setitem__(slice(None), due),
    "clear, extend": lambda ws, due: (ws.clear(), ws.extend(due)),
    "pop, append": lambda ws, due: [(ws.pop(0), ws.append(w)) for w in due],
    "del, insert": lambda ws, due: [
        (ws.__delitem__(k), ws.insert(k, w)) for k, w in enumerate(due)
    ],
    "remove, +=": lambda ws, due: [(ws.remove(ws[0]), ws.__iadd__([w])) for w in due],
    "reverse": lambda ws, due: (ws.__setitem__(slice(None), due[::-1]), ws.reverse()),
    "sort": lambda ws, due: (ws.__setitem__(slice(None), due), ws.sort(key=lambda w: 0)),
    "one more": lambda ws, due: ws.append(due[0]),
    "one less": lambda ws, due: ws.pop(),
    "another order": lambda ws, due: ws.reverse(),
    "None": lambda ws, due: ws.__setitem__(1, None),
    "an array": lambda ws, due: ws.__setitem__(1, due[1].detach().numpy()),
}


@in_double
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_list_of_weights_that_changes(kind, change):
    """As torch.nn's does, and a call raises what torch.nn's call raises."""
    theirs, ours = pair(kind, 4, 6)
    due = [torch.randn_like(p) for p in theirs.parameters()]
    results = []
    for module in (theirs, ours):
        x = torch.ones(5, 3, 4)
        CHANGES[change](module._flat_weights, due)
        error = caught(lambda m=module, x=x: results.append(m(x)))
        if error is not None:
            results.append(type(error))
    if isinstance(results[0], type):
        assert results[1] is results[0]
    else:
        assert_same(results[1], results[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_tied_weights(kind):
    """One parameter at several places of a stack gets the sum of the gradients."""
    theirs, ours = pair(kind, 6, 6, num_layers=2)
    for module in (theirs, ours):
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{name}_l1", getattr(module, f"{name}_l0"))
    x = torch.randn(5, 3, 6)
    assert len(list(ours.parameters())) == 4
    a, b = ours(x), theirs(x)
    assert_same(a, b)
    a[0].sum().backward()
    b[0].sum().backward()
    assert_same_gradients(ours, theirs)


@in_double
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
def test_parametrizations(kind, norm):
    """Training moves the original tensors, and so the output; a copy after a forward works."""
    ours = build(kind)
    name = weight_name(kind)
    x = sample(kind)
    torch.manual_seed(0)
    getattr(parametrizations, norm)(ours, name)
    first = tensors(ours(x))[0]
    copied = copy.deepcopy(ours)
    originals = list(ours.parametrizations[name].parameters())
    before = [p.detach().clone() for p in originals]
    optimizer = torch.optim.SGD(ours.parameters(), lr=1.0)
    first.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in originals)
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, originals, strict=True))
    ours.eval()
    copied.eval()
    after = tensors(ours(x))[0]
    assert not torch.allclose(after, first)
    # the output is that of torch.nn's module with the weights as they are now
    plain = getattr(nn, kind)(4, 6, **_options(kind))
    with torch.no_grad():
        for own, parameter in plain.named_parameters():
            parameter.copy_(getattr(ours, own))
    assert_same(ours(x), plain(x))
    copied(x)
    parametrize.remove_parametrizations(ours, name)
    assert type(ours) is getattr(fastseq, kind)
    assert_same(ours(x), plain(x))


class Counted(nn.Module):
    """A parametrization as random as dropout, which knows how often it was asked."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def forward(self, weight):
        self.reads += 1
        return nn.functional.dropout(weight, 0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_call_reads_a_parametrized_weight_once(kind):
    """Where it draws a mask, a cell has torch.nn's numbers under the same seed."""
    theirs, ours = pair(kind, 4, 6)
    names = [name for name, _ in ours.named_parameters() if name.startswith("weight")]
    for name in names:
        parametrize.register_parametrization(ours, name, Counted())
        parametrize.register_parametrization(theirs, name, Counted())
    for more in [{}, {"lengths": [5, 2, 0]}] if kind in LAYERS else [{}]:
        for chain in ours.parametrizations.values():
            chain[0].reads = 0
        ours(sample(kind), **more)
        assert [chain[0].reads for chain in ours.parametrizations.values()] == [1] * len(names)
    if kind not in LAYERS:
        for seed in range(3):
            x = sample(kind)
            torch.manual_seed(seed)
            found = ours(x)
            torch.manual_seed(seed)
            assert_same(found, theirs(x))


@in_double
@pytest.mark.parametrize("kind", KINDS)
def test_prune(kind):
    theirs, ours = twin(kind)
    name = weight_name(kind)
    x = sample(kind)
    for module in (theirs, ours):
        prune.l1_unstructured(module, name, amount=0.5)
    a, b = ours(x), theirs(x)
    assert_same(a, b)
    tensors(a)[0].sum().backward()
    tensors(b)[0].sum().backward()
    assert_same_gradients(ours, theirs)
    gradient = getattr(ours, f"{name}_orig").grad
    assert not gradient[getattr(ours, f"{name}_mask") == 0].any()
    prune.remove(ours, name)
    assert_same(ours(x), b)


@pytest.mark.parametrize("kind", KINDS)
def test_share_memory(kind):
    ours = build(kind)
    x = sample(kind)
    before = ours(x)
    assert ours.share_memory() is ours
    assert all(p.is_shared() for p in ours.parameters())
    assert_equal(ours(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks(kind):
    ours = build(kind)
    seen = []
    ours.register_forward_pre_hook(lambda m, args: seen.append("pre"))
    handle = ours.register_forward_hook(lambda m, args, out: seen.append("forward"))
    ours.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    ours._parameters[next(iter(ours._parameters))].register_hook(lambda g: seen.append("tensor"))
    tensors(ours(sample(kind).requires_grad_()))[0].sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "tensor"]
    handle.remove()
    ours(sample(kind))
    assert seen.count("forward") == 1


class WeightDrop(nn.Module):
    """Drops recurrent weights: the parameter moves aside, a plain tensor takes its place."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name
        raw = layer._parameters.pop(name)
        self.register_parameter("raw", nn.Parameter(raw.detach().clone()))

    def forward(self, x):
        setattr(self.layer, self.name, nn.functional.dropout(self.raw, 0.5, self.training))
        return self.layer(x)


@in_double
@pytest.mark.parametrize("kind", KINDS)
def test_weight_drop(kind):
    theirs, ours = twin(kind)
    name = weight_name(kind)
    theirs, ours = WeightDrop(theirs, name), WeightDrop(ours, name)
    x = sample(kind)
    for _ in range(2):  # the second call replaces the tensor of the first
        theirs.zero_grad()
        ours.zero_grad()
        torch.manual_seed(5)
        a = ours(x)
        torch.manual_seed(5)
        b = theirs(x)
        assert_same(a, b)
        tensors(a)[0].sum().backward()
        tensors(b)[0].sum().backward()
        assert_same_gradients(ours, theirs)
        assert ours.raw.grad.any()


@in_double
@pytest.mark.parametrize("kind", KINDS)
def test_functional_call(kind):
    """Other tensors for one call; the module keeps its own."""
    theirs, ours = twin(kind)
    x = sample(kind)
    before = ours(x)
    other = {k: torch.randn_like(v).requires_grad_() for k, v in ours.named_parameters()}
    out = torch.func.functional_call(ours, other, (x,))
    assert_same(out, torch.func.functional_call(theirs, other, (x,)))
    gradients = torch.autograd.grad(tensors(out)[0].sum(), other.values(), allow_unused=True)
    assert gradients[0].any()
    assert_equal(ours(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_of_data_parallel(kind):
    """A replica has its tensors as plain attributes; each sees its own."""
    ours = build(kind)
    x = sample(kind)
    before = ours(x)
    replica = ours._replicate_for_data_parallel()
    for name, parameter in ours.named_parameters():
        setattr(replica, name, parameter * 0)
    assert all(not t.any() for t in tensors(replica(x)))
    assert_equal(ours(x), before)
    assert_equal(nn.DataParallel(ours)(x), before)


@in_double
@pytest.mark.parametrize("kind", KINDS)
def test_requires_grad_is_obeyed(kind):
    theirs, ours = twin(kind)
    x = sample(kind)
    for module in (theirs, ours):
        module.requires_grad_(False)
    assert not tensors(ours(x))[0].requires_grad
    name = weight_name(kind)
    for module in (theirs, ours):
        getattr(module, name).requires_grad_()
        tensors(module(x))[0].sum().backward()
    assert_same_gradients(ours, theirs)
    assert [n for n, p in ours.named_parameters() if p.grad is not None] == [name]


@in_double
@pytest.mark.parametrize("kind", KINDS)
def test_optimizer_steps(kind):
    """Three steps of training end at torch.nn's parameters."""
    theirs, ours = twin(kind)
    x = sample(kind)
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            sum(t.square().mean() for t in tensors(module(x))).backward()
            optimizer.step()
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        check_alike(mine, yours)
