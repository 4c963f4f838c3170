"""The C++ kernels run wherever they are named, and wherever the rule gives them, and are counted:
nothing takes their place unseen. Beside them the numbers, so that a count is not all there is."""

import copy
import io
from functools import partial

import pytest
import torch
from problems import draw
from rules import check_all, same_bits
from spies import counted
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastseq
from fastseq.backends import load

pytestmark = pytest.mark.skipif(isinstance(load("native"), str), reason=str(load("native")))

KINDS = ("LSTM", "GRU", "RNN")
#: Named, and where the rule gives it: to transforms from 12 steps on.
BACKENDS = ("native", None)
V, T, B, I, H = 2, 12, 3, 4, 6  # noqa: E741  (the field's letter)
DOUBLE = torch.float64

each_kind = pytest.mark.parametrize("kind", KINDS)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=str)


def layer_of(kind, backend, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return getattr(fastseq, kind)(I, H, backend=backend, dtype=dtype, **options)


def an_input(*shape, dtype=torch.float32, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (T, B, I)), generator=random, dtype=dtype)


def tensors(state):
    return state if isinstance(state, tuple) else (state,)


def loss_of(outputs):
    y, state = outputs
    y = y.data if hasattr(y, "batch_sizes") else y
    return y.square().sum() + sum(s.sin().sum() for s in tensors(state))


def flat(outputs):
    return (outputs[0], *tensors(outputs[1]))


def gradients(layer, x, run=None):
    """Of x and each parameter, by name."""
    named = {"x": x.detach().requires_grad_()} | dict(layer.named_parameters())
    for p in layer.parameters():
        p.grad = None
    loss_of((layer if run is None else run)(named["x"])).backward()
    return {name: value.grad for name, value in named.items()}


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(found[name], value), name


# --- plain calls, which every other test here is held to


@each_backend
@each_kind
@pytest.mark.parametrize("form", ["dense", "lean", "packed", "lengths", "reset", "stack"])
def test_plain(kind, backend, form):
    options = {"stack": {"num_layers": 2, "bidirectional": True}, "lean": {"memory": "lean"}}
    layer = layer_of(kind, backend, **options.get(form, {}))
    x = an_input()
    keywords = {
        "lengths": {"lengths": [T, 3, 0]},
        "reset": {"reset": torch.arange(T)[:, None].expand(T, B) == 4},
    }.get(form, {})

    def run(x):
        if form == "packed":
            x = pack_padded_sequence(x, torch.tensor([3, T, 5]), enforce_sorted=False)
        return layer(x, **keywords)

    with counted() as calls:
        gradients(layer, x, run)
    assert calls == {"forward": 1, "backward": 1}
    with counted() as calls, torch.no_grad():
        run(x)
    assert calls == {"forward": 1, "backward": 0}


@each_backend
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_a_step(kind, backend):
    cell = getattr(fastseq, kind)(I, H, backend=backend)
    with counted() as calls:
        sum(s.sum() for s in tensors(cell(an_input(B, I)))).backward()
    assert calls == {"forward": 1, "backward": 1}
    if backend is None:
        return  # one step under torch.func is the eager form's
    with counted() as calls:
        vmap(grad(lambda x: sum(s.sum() for s in tensors(cell(x)))))(an_input(V, B, I))
    assert calls == {"forward": 1, "backward": 1}


def test_the_spy_sees_nothing_of_other_backends():
    for backend in ("eager", "torch"):
        with counted() as calls:
            gradients(layer_of("GRU", backend), an_input())
        assert calls == {"forward": 0, "backward": 0}, backend


# --- torch.func


def of_parameters(layer):
    def loss(parameters, x):
        return loss_of(functional_call(layer, parameters, (x,)))

    return loss


TRANSFORMS = {
    "grad": (lambda loss, p, x: grad(loss, (0, 1))(p, x[0]), 1, 1),
    "vmap": (lambda loss, p, x: vmap(loss, (None, 0))(p, x), 1, 0),
    "per-sample gradients": (lambda loss, p, x: vmap(grad(loss), (None, 0))(p, x), 1, V),
    "slopes": (lambda loss, p, x: vmap(grad(loss, 1), (None, 0))(p, x), 1, 1),
    "jacrev": (lambda loss, p, x: jacrev(loss, (0, 1))(p, x[0]), 1, 1),
    "jacrev of a row": (
        lambda loss, p, x: jacrev(lambda x: torch.stack([loss(p, x), loss(p, 2 * x)]))(x[0]),
        2,
        2,
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@each_backend
@each_kind
def test_transforms(kind, backend, transform):
    run, forward, backward = TRANSFORMS[transform]
    x = an_input(V, T, B, I, dtype=DOUBLE)
    found = []
    for name in (backend, "eager"):
        layer = layer_of(kind, name, DOUBLE)
        parameters = {k: p.detach() for k, p in layer.named_parameters()}
        with counted() as calls:
            out = run(of_parameters(layer), parameters, x)
        leaves = torch.utils._pytree.tree_leaves(out)
        found.append({str(k): value for k, value in enumerate(leaves)})
        if name != "eager":
            assert calls == {"forward": forward, "backward": backward}
    check_all(found[0], None, found[1], DOUBLE, transform)


# --- graphs


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@each_backend
@pytest.mark.parametrize("graph", ["eager", "aot_eager"])
def test_compile(backend, graph, fresh):
    layer, x = layer_of("GRU", backend), an_input()
    compiled = torch.compile(layer, fullgraph=True, backend=graph)
    gradients(layer, x, compiled)  # traced here
    with counted() as calls:
        found = gradients(layer, x, compiled)
    assert calls == {"forward": 1, "backward": 1}
    assert_same_bits(found, gradients(layer, x))


@each_backend
@each_kind
def test_export(kind, backend):
    """What a graph holds after it was saved and loaded."""
    layer, x = layer_of(kind, backend, num_layers=2).eval(), an_input()
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x,)), file)
    file.seek(0)
    program = torch.export.load(file).module()
    with counted() as calls, torch.no_grad():
        y, state = program(x)
    assert calls == {"forward": 2, "backward": 0}
    with torch.no_grad():
        expected, states = layer(x)
    for a, b in zip(flat((y, state)), flat((expected, states)), strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize(
    "sample, memory",
    [
        ({"cell": "lstm", "P": 3}, "full"),
        ({"cell": "gru", "directions": 2, "reset": True, "h_mask": True}, "lean"),
    ],
    ids=["projected", "options"],
)
def test_opcheck(sample, memory):
    """The schemas and the fakes are right of native, too, whose kernels ran while it was asked."""
    case = draw(**sample, dtype=torch.float32, grad=False)
    D, n = case.directions, len(case.states)
    reset = None if case.reset is None else case.reset.reshape(1, -1).expand(D, -1)
    weights = [w for ways in case.weights for w in ways.flat()]
    given = (case.cell, "native", case.x, None, case.states, weights, [False, True][:D], reset)
    given = (*given, case.h_mask, [], [], memory, False)
    operators = torch.ops.fastseq
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    trajectory = case.cell == "lstm"
    forward = (*given, True, trajectory)
    with counted() as calls:
        torch.library.opcheck(operators.recurrence.default, forward, test_utils=checks)
        assert calls["forward"] >= len(checks) and not calls["backward"]
        outputs = operators.recurrence(*forward)
        m = 1 + n + trajectory
        grads = [torch.ones_like(o) for o in outputs[:m]]
        backward = (*given, outputs, grads[0], grads[1 : 1 + n], grads[1 + n :], trajectory)
        backward = (*backward, [True, True, True])
        torch.library.opcheck(operators.recurrence_backward.default, backward, test_utils=checks)
        assert calls["backward"] >= len(checks)


# --- torch's tools


@pytest.mark.parametrize("use_reentrant", [False, True])
@each_backend
@each_kind
def test_checkpoint(kind, backend, use_reentrant):
    layer, x = layer_of(kind, backend), an_input()
    expected = gradients(layer, x)
    x.requires_grad_()
    for p in layer.parameters():
        p.grad = None
    with counted() as calls:
        # the reentrant form sees the tensors of a flat tuple alone
        y, *state = checkpoint(lambda x: flat(layer(x)), x, use_reentrant=use_reentrant)
        loss_of((y, tuple(state))).backward()
    assert calls == {"forward": 2, "backward": 1}
    found = {"x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    assert_same_bits(found, expected)


HOOKS = {
    "save_on_cpu": torch.autograd.graph.save_on_cpu,
    "clones": partial(torch.autograd.graph.saved_tensors_hooks, torch.clone, torch.clone),
}


@pytest.mark.parametrize("hooks", HOOKS)
@each_backend
@each_kind
def test_saved_tensors(kind, backend, hooks):
    layer, x = layer_of(kind, backend, num_layers=2), an_input()
    expected = gradients(layer, x)
    with counted() as calls, HOOKS[hooks]():
        found = gradients(layer, x)
    assert calls == {"forward": 1, "backward": 1}
    assert_same_bits(found, expected)


@each_backend
@each_kind
def test_replicas(kind, backend):
    """A deep copy, and what DataParallel makes: tensors in the place of parameters."""
    layer, x = layer_of(kind, backend), an_input()
    expected = gradients(layer, x)
    twin = copy.deepcopy(layer)
    with counted() as calls:
        found = gradients(twin, x)
    assert calls == {"forward": 1, "backward": 1}
    assert_same_bits(found, expected)

    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        replica._parameters.pop(name, None)
        setattr(replica, name, parameter.view_as(parameter))
    with counted() as calls:
        found = gradients(layer, x, replica)
    assert calls == {"forward": 1, "backward": 1}
    assert_same_bits(found, expected)


@each_backend
@each_kind
def test_flop_counter(kind, backend):
    """It counts our operators by a formula, so that a count alone does not say who ran."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    layer, x = layer_of(kind, backend), an_input()
    expected = gradients(layer, x)
    with counted() as calls, FlopCounterMode(display=False) as counter:
        found = gradients(layer, x)
    assert calls == {"forward": 1, "backward": 1}
    assert counter.get_total_flops() == 3 * 2 * T * B * gates * H * (I + H)
    assert_same_bits(found, expected)


@each_backend
@each_kind
def test_profiler(kind, backend):
    """The operator and its range of a name that says cell and backend."""
    layer, x = layer_of(kind, backend, num_layers=2), an_input()
    expected = gradients(layer, x)
    with counted() as calls, torch.profiler.profile() as profile:
        found = gradients(layer, x)
    assert calls == {"forward": 2, "backward": 2}
    seen = {event.key: event.count for event in profile.key_averages()}
    name = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    for key in (
        "fastseq::recurrence",
        "fastseq::recurrence_backward",
        f"fastseq::{name} native",
        f"fastseq::{name} backward native",
    ):
        assert seen.get(key) == 2, f"{key} in {[k for k in seen if 'fastseq' in k]}"
    assert_same_bits(found, expected)


@pytest.mark.parametrize(
    "dtype, enabled, calls",
    [(torch.float32, True, 1), (torch.bfloat16, True, 1), (torch.bfloat16, False, 0)],
    ids=str,
)
def test_a_cell_under_autocast(dtype, enabled, calls):
    """Its gates are in float32, which torch's cell function in bfloat16 does not give; outside, a
    cell whose weights are in bfloat16 is torch's."""
    cell = fastseq.LSTMCell(I, H, dtype=dtype)
    with counted() as count, torch.autocast("cpu", enabled=enabled):
        h, c = cell(an_input(B, I, dtype=dtype))
    assert count["forward"] == calls and h.dtype is c.dtype is torch.bfloat16


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_a_subclass_in_a_checkpoint(kind):
    """What is run again takes the same way, though a view of the input is a plain tensor."""

    class Own(torch.Tensor):
        pass

    m = getattr(fastseq, kind)(I, H)
    x = an_input(B, I).as_subclass(Own).requires_grad_()
    y = checkpoint(m, x, use_reentrant=False)
    (y[0] if kind == "LSTM" else y).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_of_another_size_is_told(kind, dtype):
    m = getattr(fastseq, kind)(I, H, dtype=dtype)
    name = "weight_hh_l0" if kind == "GRU" else "weight_hh"
    delattr(m, name)
    setattr(m, name, torch.ones(3 * H, H - 1, dtype=dtype))
    m.fastseq.backend = "native"
    with pytest.raises(RuntimeError, match=rf"{name}: expected \(18, 6\), got \(18, 5\)"):
        m(an_input(*((T, B, I) if kind == "GRU" else (B, I)), dtype=dtype))
