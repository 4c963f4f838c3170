"""torch.func on the kernels: every transform against loops over torch.autograd."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from pairwise import covering
from problems import draw, full
from rules import check_alike, check_close
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_flatten, tree_map
from twins import needs

import fastseq
from fastseq.backends import load
from fastseq.backends.contract import Weights
from fastseq.cells import CELLS

V, T, B, I, H = 3, 4, 2, 3, 4  # noqa: E741


class Plain:
    """The same words as torch.func, by loops and torch.autograd."""

    @staticmethod
    def vmap(function, in_dims):
        def looped(*arguments):
            def member(v):
                return (
                    a if d is None else tree_map(lambda t, d=d: t.select(d, v), a)
                    for a, d in zip(arguments, in_dims, strict=True)
                )

            results = [function(*member(v)) for v in range(V)]
            flat = [tree_flatten(r)[0] for r in results]
            spec = tree_flatten(results[0])[1]
            return spec.unflatten([torch.stack(parts) for parts in zip(*flat, strict=True)])

        return looped

    @staticmethod
    def grad(function, argnums=0):
        def slope(*arguments):
            moved = argnums if isinstance(argnums, tuple) else (argnums,)
            full = list(arguments)
            for k in moved:
                full[k] = tree_map(lambda t: t.detach().clone().requires_grad_(), full[k])
            leaves, spec = tree_flatten([full[k] for k in moved])
            found = torch.autograd.grad(function(*full), leaves)
            tree = spec.unflatten(list(found))
            return tuple(tree) if isinstance(argnums, tuple) else tree[0]

        return slope

    @staticmethod
    def jacrev(function, argnums=0):
        def jacobian(*arguments):
            count = function(*arguments).numel()
            rows = [
                Plain.grad(lambda *a, k=k: function(*a)[k], argnums)(*arguments)
                for k in range(count)
            ]
            flat = [tree_flatten(r)[0] for r in rows]
            stacked = [torch.stack(parts) for parts in zip(*flat, strict=True)]
            return tree_flatten(rows[0])[1].unflatten(stacked)

        return jacobian


#: Of (parameters, x, hx): what each transform makes of ``run`` (a vector) and ``loss`` (a number).
#: The letters say which of the three have members in front.
TRANSFORMS = {
    "grad": ("", lambda F, run, loss: F.grad(loss, (0, 1, 2))),
    "inputs": ("x", lambda F, run, loss: F.vmap(run, (None, 0, None))),
    "states": ("h", lambda F, run, loss: F.vmap(run, (None, None, 0))),
    "inputs and states": ("xh", lambda F, run, loss: F.vmap(run, (None, 0, 0))),
    "per-sample gradients": ("x", lambda F, run, loss: F.vmap(F.grad(loss), (None, 0, None))),
    "per-sample, all": ("xh", lambda F, run, loss: F.vmap(F.grad(loss, (0, 1, 2)), (None, 0, 0))),
    "slopes of inputs": ("x", lambda F, run, loss: F.vmap(F.grad(loss, (1, 2)), (None, 0, None))),
    "ensemble, shared input": ("p", lambda F, run, loss: F.vmap(run, (0, None, None))),
    "ensemble, own input": ("px", lambda F, run, loss: F.vmap(run, (0, 0, None))),
    "ensemble, own states": ("ph", lambda F, run, loss: F.vmap(run, (0, None, 0))),
    "ensemble, gradients": ("p", lambda F, run, loss: F.vmap(F.grad(loss), (0, None, None))),
    "ensemble, all gradients": (
        "ph",
        lambda F, run, loss: F.vmap(F.grad(loss, (0, 1, 2)), (0, None, 0)),
    ),
    "ensemble, all its own": ("pxh", lambda F, run, loss: F.vmap(F.grad(loss, (0, 1)), (0, 0, 0))),
    "gradient of vmap": (
        "x",
        lambda F, run, loss: F.grad(lambda *a: F.vmap(loss, (None, 0, None))(*a).sum(), (0, 1, 2)),
    ),
    "gradient of an ensemble": (
        "p",
        lambda F, run, loss: F.grad(lambda *a: F.vmap(loss, (0, None, None))(*a).sum(), (0, 1, 2)),
    ),
    "vmap of vmap": (
        "px",
        lambda F, run, loss: F.vmap(
            lambda p, x, h: F.vmap(run, (None, 0, None))(p, x, h), (0, None, None)
        ),
    ),
    "vmap of vmap of gradients": (
        "px",
        lambda F, run, loss: F.vmap(
            lambda p, x, h: F.vmap(F.grad(loss, (0, 1)), (None, 0, None))(p, x, h), (0, None, None)
        ),
    ),
    "jacobian of x": ("", lambda F, run, loss: F.jacrev(run, 1)),
    "jacobian of parameters": ("", lambda F, run, loss: F.jacrev(run, 0)),
    "jacobians of inputs": ("x", lambda F, run, loss: F.vmap(F.jacrev(run, 1), (None, 0, None))),
    "jacobians of an ensemble": (
        "p",
        lambda F, run, loss: F.vmap(F.jacrev(run, 0), (0, None, None)),
    ),
}
CHEAP = [name for name in TRANSFORMS if "jacobian" not in name and "of vmap of" not in name]

KINDS = {
    "RNN": (fastseq.RNN, {}),
    "RNN relu both ways": (fastseq.RNN, {"nonlinearity": "relu", "bidirectional": True}),
    "LSTM": (fastseq.LSTM, {}),
    "LSTM projected both ways": (fastseq.LSTM, {"proj_size": 2, "bidirectional": True}),
    "LSTM two layers": (fastseq.LSTM, {"num_layers": 2, "bias": False}),
    "GRU": (fastseq.GRU, {}),
    "GRU two layers both ways": (fastseq.GRU, {"num_layers": 2, "bidirectional": True}),
    "RNNCell": (fastseq.RNNCell, {}),
    "LSTMCell": (fastseq.LSTMCell, {}),
    "GRUCell": (fastseq.GRUCell, {}),
}


def module(kind, backend, dtype=torch.float64):
    """Ours, and torch.nn's with the same parameters."""
    torch.manual_seed(0)
    constructor, options = KINDS[kind]
    ours = constructor(I, H, **options, backend=backend).to(dtype)
    theirs = getattr(torch.nn, constructor.__name__)(I, H, **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def arguments(owner, members, dtype=torch.float64):
    """(parameters, x, hx), with members in front of those named; random, whatever the type."""
    random = torch.Generator().manual_seed(1)

    def tensor(letter, *shape):
        shape = (V, *shape) if letter in members else shape
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    parameters = {}
    for name, p in owner.named_parameters():
        parameters[name] = 0.5 * tensor("p", *p.shape)
    names = CELLS[owner._fastseq_cell].states
    if isinstance(owner, torch.nn.RNNCellBase):
        x, states = tensor("x", B, I), [tensor("h", B, H) for _ in names]
    else:
        count = owner.num_layers * (2 if owner.bidirectional else 1)
        widths = [owner.proj_size or H, H]
        x = tensor("x", T, B, I)
        states = [tensor("h", count, B, w) for _, w in zip(names, widths, strict=False)]
    return parameters, x, tuple(states) if len(states) > 1 else states[0]


def functions(owner, lengths=None):
    """run and loss of a module, ours or torch.nn's."""

    def run(parameters, x, hx):
        options = {}
        if lengths is not None and isinstance(owner, fastseq.nn.recurrent.Recurrent):
            options = {"lengths": lengths}
        elif lengths is not None:
            x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        outputs = functional_call(owner, parameters, (x, hx), options)
        flat = []
        for value in outputs if isinstance(outputs, tuple) else (outputs,):
            if isinstance(value, PackedSequence):
                value = pad_packed_sequence(value, total_length=T)[0]
            flat += value if isinstance(value, tuple) else [value]
        return torch.cat([value.flatten() for value in flat])

    return run, lambda *a: run(*a).square().sum()


def compare(transform, kind, backend, dtype=torch.float64, lengths=None):
    members, make = TRANSFORMS[transform]
    ours, theirs = module(kind, backend, dtype)
    given = arguments(ours, members, dtype)
    got = make(torch.func, *functions(ours, lengths))(*given)
    truth = make(Plain, *functions(copy.deepcopy(theirs).double(), lengths))(
        *tree_map(torch.Tensor.double, given)
    )
    same = truth
    if dtype is not torch.float64:
        same = make(Plain, *functions(theirs, lengths))(*given)
    flat = [tree_flatten(tree)[0] for tree in (got, same, truth)]
    for k, (value, their, exact) in enumerate(zip(*flat, strict=True)):
        assert bool(value.any()), f"{transform}, value {k} is zero"
        check_close(value, their, exact, dtype, f"{transform}, value {k}")


def combinations(kinds):
    """(transform, kind); the Jacobians of what has many parameters only in the full run."""

    def parameter(transform, kind):
        long = "jacobian" in transform and "two layers" in kind
        return pytest.param(transform, kind, marks=pytest.mark.full if long else ())

    return [parameter(transform, kind) for transform in TRANSFORMS for kind in kinds]


@pytest.mark.parametrize("transform, kind", combinations(KINDS))
def test_against_torch(transform, kind):
    compare(transform, kind, "numba")


@pytest.mark.parametrize("kind", ["LSTM", "GRU two layers both ways", "RNNCell", "LSTMCell"])
@pytest.mark.parametrize("transform", CHEAP)
def test_left_to_us(transform, kind):
    compare(transform, kind, None)


@pytest.mark.parametrize("kind", ["LSTM projected both ways", "GRU two layers both ways"])
@pytest.mark.parametrize("transform", CHEAP)
@pytest.mark.parametrize("backend", ["numba", "eager"])
def test_in_float32(backend, transform, kind):
    compare(transform, kind, backend, torch.float32)


@pytest.mark.parametrize(
    "transform, kind", combinations(["LSTM", "GRU two layers both ways", "RNN"])
)
def test_lengths(transform, kind):
    """The same for all members."""
    compare(transform, kind, "numba", lengths=torch.tensor([2, 4]))


def test_members_with_their_own_lengths_are_told():
    m = fastseq.GRU(I, H)
    x = torch.randn(V, T, B, I)
    lengths = torch.tensor([[1, 2], [3, 4], [4, 4]])
    with pytest.raises(NotImplementedError, match="lengths: all members of a vmap have the same"):
        torch.func.vmap(lambda x, n: m(x, lengths=n)[0])(x, lengths)


# What torch.nn has not: against the eager form.

VARIANTS = {
    "reset": {"reset": True, "directions": 2},
    "ragged reset": {"reset": True, "lengths": [2, 0, 3], "B": 3},
    "h_mask": {"h_mask": True, "directions": 2},
    "trajectory": {"directions": 2, "layers": 2},
    "lean": {"lengths": [3, 2], "reset": True},
    "bare": {"bias": False, "state": False},
}


@pytest.mark.parametrize("of", ["x", "weights", "x and weights"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
def test_options(cell, variant, of):
    if variant == "trajectory" and cell != "lstm":
        pytest.skip("only the LSTM has it")
    case = draw(cell, **({"T": 3, "B": 2, "I": 2, "H": 3} | VARIANTS[variant]), grad=False)
    leaves = case.leaves()
    options = {"trajectory": variant == "trajectory"}
    options |= {"memory": "lean"} if variant == "lean" else {}

    def loss(backend):
        def value(*values):
            named = dict(zip(leaves, values, strict=True))
            weights = [
                Weights(
                    *(named.get(f"{name}[{k}]") for name in Weights._fields[:5]),
                    tuple(named[f"{name}[{k}]"] for name in CELLS[cell].unit_parameters),
                )
                for k in range(len(case.weights))
            ]
            states = [named[f"{s}_0"] for s in CELLS[cell].states if f"{s}_0" in named]
            moved = replace(case, x=named["x"], states=states, weights=weights)
            outputs = moved.run(backend, **options).values()
            return sum(out.square().sum() for out in outputs)

        return value

    dims = [0 if ("x" in of if name == "x" else "weights" in of) else None for name in leaves]
    factors = torch.linspace(0.5, 1.5, V, dtype=torch.float64)
    values = [
        t if d is None else torch.stack([t * f for f in factors])
        for t, d in zip(leaves.values(), dims, strict=True)
    ]
    for argnums in (tuple(range(len(leaves))), tuple(range(1, len(leaves)))):
        got, truth = (
            F.vmap(F.grad(loss(backend), argnums), tuple(dims))(*values)
            for F, backend in ((torch.func, "numba"), (Plain, "eager"))
        )
        for k, ours, exact in zip(argnums, got, truth, strict=True):
            check_close(ours, None, exact, torch.float64, list(leaves)[k])


#: What has members in front of x, weights, h_mask and reset.
MEMBERS = {
    "h_mask": (None, None, 0, None),
    "reset": (None, None, None, 0),
    "h_mask, reset": (None, None, 0, 0),
    "h_mask, reset, last": (None, None, -1, -1),
    "x, h_mask, reset": (0, None, 0, 0),
    "weights, h_mask, reset": (None, 0, 0, 0),
    "x, weights, h_mask, reset": (0, 0, 0, 0),
}


MASKED = {
    "backend": ("native", "numba", "eager", None),
    "cell": ("lstm", "gru", "rnn_tanh"),
    "of": tuple(MEMBERS),
    "lengths": (None, [12, 0, 7]),
}
SOME = covering(MASKED)


@pytest.mark.parametrize(
    "backend, cell, of, lengths",
    [
        pytest.param(*row, marks=() if dict(zip(MASKED, row, strict=True)) in SOME else full)
        for row in itertools.product(*MASKED.values())
    ],
)
def test_members_with_their_own_masks(backend, cell, of, lengths):
    """Of h_mask and of reset, outputs and gradients, in one call or in a loop of calls: the rule
    gives kernels from 12 steps on."""
    if isinstance(backend, str) and isinstance(load(backend), str):
        pytest.skip(load(backend))
    dims = MEMBERS[of]
    case = draw(cell, 12, 3, I, H, directions=2, lengths=lengths, grad=False)
    random = torch.Generator().manual_seed(3)
    masks = (torch.rand(V, 2, 3, H, generator=random) > 0.4).double() * 2
    resets = torch.rand(V, 12, 3, generator=random) < 0.3
    flat = [w for ways in case.weights for w in ways[:4]]
    factors = torch.linspace(0.5, 1.5, V, dtype=torch.float64)

    def members(t, d):
        return t if d is None else torch.stack([t * f for f in factors])

    def along(many, d):
        return many[0] if d is None else many.movedim(0, d)

    values = (
        members(case.x, dims[0]),
        tuple(members(w, dims[1]) for w in flat),
        along(masks, dims[2]),
        along(resets, dims[3]),
    )

    def loss(backend):
        def value(x, weights, h_mask, reset):
            name = cell.split("_")[0]
            hx = tuple(case.states) if cell == "lstm" else case.states[0]
            y, state = getattr(fastseq, name)(
                x,
                (weights[:4], weights[4:]),
                hx,
                h_mask=h_mask,
                reset=reset,
                lengths=case.lengths,
                backend=backend,
            )
            return y.square().sum() + sum(s.sin().sum() for s in tree_flatten(state)[0])

        return value

    for transform in (lambda F, f: f, lambda F, f: F.grad(f, (0, 1))):
        got, truth = (
            tree_flatten(F.vmap(transform(F, loss(name)), dims)(*values))[0]
            for F, name in ((torch.func, backend), (Plain, "eager"))
        )
        for k, (ours, exact) in enumerate(zip(got, truth, strict=True)):
            check_close(ours, None, exact, torch.float64, f"{of}, value {k}")


# How many calls it takes.


@pytest.fixture
def calls(monkeypatch):
    """How often kernels are asked, by direction of time."""
    count = {"forward": 0, "backward": 0}
    backends = [b for b in map(load, ("native", "numba")) if not isinstance(b, str)]
    for backend, name in itertools.product(backends, count):
        before = getattr(backend, name)

        def counted(*arguments, name=name, before=before):
            count[name] += 1
            return before(*arguments)

        monkeypatch.setattr(backend, name, counted)
    return count


@pytest.mark.parametrize(
    "transform, layers, forward, backward",
    [
        ("inputs", 2, 2, 0),
        ("gradient of vmap", 2, 2, 2),
        ("slopes of inputs", 2, 2, 2),
        ("jacobian of x", 1, 1, 1),
        ("per-sample gradients", 1, 1, V),
        ("ensemble, shared input", 1, 1, 0),
        ("ensemble, gradients", 1, 1, 1),
        ("gradient of an ensemble", 1, 1, 1),
        ("ensemble, shared input", 2, 1 + V, 0),
    ],
)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", [fastseq.LSTM, fastseq.GRU, fastseq.RNN])
def test_calls_of_the_kernels(cell, directions, transform, layers, forward, backward, calls):
    m = cell(I, H, layers, bidirectional=directions == 2, backend="numba").double()
    members, make = TRANSFORMS[transform]
    make(torch.func, *functions(m))(*arguments(m, members))
    assert calls == {"forward": forward, "backward": backward}


def test_left_to_us_the_kernels_run(calls):
    """Under a transform, and with nothing kept where nothing is differentiated."""
    m = fastseq.LSTM(I, H)
    x = torch.randn(V, 10, B, I)
    torch.func.vmap(m)(x)
    with torch.no_grad():
        torch.func.vmap(m)(x)
    assert calls == {"forward": 2, "backward": 0}


# Nothing may be silently wrong.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["numba", None], ids=str)
def test_plain_backward_through_vmap(backend, kind):
    """Parameters that torch.autograd follows, not torch.func."""
    ours, _ = module(kind, backend)
    given = arguments(ours, "x")
    leaves = tree_map(lambda t: t.clone().requires_grad_(), given)
    run, _ = functions(ours)
    out = torch.func.vmap(run, (None, 0, None))(*leaves)
    assert out.requires_grad
    flat = tree_flatten(leaves)[0]
    got = torch.autograd.grad(out.square().sum(), flat)
    truth = torch.autograd.grad(Plain.vmap(run, (None, 0, None))(*leaves).square().sum(), flat)
    for value, exact in zip(got, truth, strict=True):
        check_close(value, None, exact, torch.float64, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["numba", None], ids=str)
def test_second_derivatives(backend, kind):
    """grad(grad), vmap(grad(grad)) and the tangent of a pullback."""
    ours, _ = module(kind, backend)
    reference, _ = module(kind, "eager")
    run, loss = functions(ours)
    parameters, x, hx = arguments(ours, "")
    many = arguments(ours, "x")[1]
    direction = torch.randn_like(x)

    def curve(loss):
        def slope(x):
            return (torch.func.grad(loss, 1)(parameters, x, hx) * direction).sum()

        return torch.func.grad(slope)

    for transform, value in ((curve, x), (lambda f: torch.func.vmap(curve(f)), many)):
        got, truth = transform(loss)(value), transform(functions(reference)[1])(value)
        check_close(got, None, truth, torch.float64, kind)

    tangents = []
    for owner in (ours, reference):
        _, pull = torch.func.vjp(lambda x, o=owner: functions(o)[0](parameters, x, hx), x)
        cotangent = torch.linspace(-1, 1, run(parameters, x, hx).numel(), dtype=x.dtype)
        tangents.append(torch.func.jvp(pull, (cotangent,), (cotangent.cos(),))[1][0])
    assert bool(tangents[1].any())
    check_close(tangents[0], None, tangents[1], torch.float64, "tangent of the pullback")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("again", [False, True])
def test_tangent_of_a_plain_backward(kind, again):
    """A dual number enters backward, after a forward on the kernels without one."""
    ours, _ = module(kind, "numba")
    reference, _ = module(kind, "eager")
    found = []
    for owner in (ours, reference):
        parameters, x, hx = arguments(owner, "")
        x.requires_grad_()
        out = functions(owner)[0](parameters, x, hx)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=x.dtype)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(cotangent, cotangent.cos())
            (slope,) = torch.autograd.grad(out, x, dual, create_graph=again)
            found += forward_ad.unpack_dual(slope)
    for got, truth in zip(found[:2], found[2:], strict=True):
        assert bool(truth.any())
        check_close(got, None, truth, torch.float64, kind)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's linearize
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["jvp", "vmap of jvp", "linearize", "jacfwd"])
def test_forward_mode_runs_the_eager_form(kind, of, request):
    if of == "linearize" and kind not in ("LSTM", "GRU", "RNNCell"):
        if not request.config.getoption("--full"):
            pytest.skip("it traces every step: only with --full")
    ours, theirs = module(kind, None)
    run, _ = functions(ours)
    parameters, x, hx = arguments(ours, "")
    along = torch.randn_like(x)

    def function(x):
        return run(parameters, x, hx)

    if of == "jvp":
        got = torch.func.jvp(function, (x,), (along,))[1]
    elif of == "vmap of jvp":
        many = torch.stack([along, 2 * along])
        got = torch.func.vmap(lambda v: torch.func.jvp(function, (x,), (v,))[1])(many)[1] / 2
    elif of == "linearize":
        got = torch.func.linearize(function, x)[1](along)
    else:
        got = (torch.func.jacfwd(function)(x) * along).flatten(1).sum(1)
    exact = functions(theirs)[0]
    jacobian = torch.autograd.functional.jacobian(lambda x: exact(parameters, x, hx), x)
    check_close(got, None, (jacobian * along).flatten(1).sum(1), torch.float64, of)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", ["native", "numba"])
@pytest.mark.parametrize("way", ["grad", "vmap of grad", "grad of vmap", "grad of grad"])
def test_outputs_edited_in_place(kind, backend, way):
    """The states of all, and the output of all but the LSTM, whose own raises."""
    needs(backend)
    m, _ = module(kind, backend)
    x = torch.randn(2, T, B, I, dtype=torch.float64)
    # an edit of the very bits is none for the truth
    factor = torch.ones((), dtype=torch.float64)

    def loss(x, edit, output=kind != "LSTM"):
        y, state = m(x)
        states = state if isinstance(state, tuple) else (state,)
        total = sum(s.clone().sin().sum() for s in states)
        if edit:
            for s in states:
                s[:, 1] = 0
            y = y.mul_(factor) if output else y
        return total + y.square().sum()

    def gradients(*how):
        grad, vmap = torch.func.grad, torch.func.vmap
        one = grad(loss)
        if way == "grad":
            return one(x[0], *how)
        if way == "vmap of grad":
            return vmap(lambda x: one(x, *how))(x)
        if way == "grad of vmap":
            return grad(lambda x: vmap(lambda x: loss(x, *how))(x).sum())(x)
        return grad(lambda x: one(x, *how).square().sum())(x[0])

    check_close(gradients(True), None, gradients(False), torch.float64, kind)
    if kind == "LSTM" and way == "grad":
        with pytest.raises(RuntimeError, match="inplace operation"):
            gradients(True, True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_sixteen_bits(kind, dtype):
    """Members of a vmap get what each gets alone, in weights of 16 bits and under autocast."""
    m, _ = module(kind, "numba", dtype)
    for transform in ("ensemble, all gradients", "per-sample gradients", "inputs"):
        members, make = TRANSFORMS[transform]
        given = arguments(m, members, dtype)
        got, truth = (make(F, *functions(m))(*given) for F in (torch.func, Plain))
        for a, b in zip(tree_flatten(got)[0], tree_flatten(truth)[0], strict=True):
            check_alike(a, b)
    m = m.float()
    x = torch.randn(V, T, B, I)
    with torch.autocast("cpu", dtype=dtype):
        got = torch.func.vmap(lambda x: m(x)[0])(x)
        assert got.dtype is dtype
        check_alike(got, torch.stack([m(one)[0] for one in x]))


COMPILED = {
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "vmap": lambda f: torch.func.vmap(f),
    "per-sample": lambda f: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum())),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "jacrev": lambda f: torch.func.jacrev(f),
}


#: Dynamo looks at .grad of every tensor it meets, and hides only the printing of the warning.
quiet = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@quiet
@pytest.mark.parametrize("outside", [True, False], ids=["compile outside", "compile inside"])
@pytest.mark.parametrize("transform", [pytest.param(t, marks=pytest.mark.full) for t in COMPILED])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_compiled(kind, transform, outside):
    """The right numbers, never the zeros of an operator without a derivative."""
    compiled_and_plain(kind, transform, outside)


@quiet
def test_compiled_gradient():
    compiled_and_plain("GRU", "grad", True, fullgraph=False)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"run torch\.func's transforms"):
        compiled_and_plain("GRU", "grad", True, fullgraph=True)


def compiled_and_plain(kind, transform, outside, **options):
    torch._dynamo.reset()
    m, _ = module(kind, None, torch.float32)
    shape = (V, I) if kind.endswith("Cell") else (V, T, I)
    x = torch.randn(shape if transform in ("vmap", "per-sample") else shape[1:])

    def function(m):
        def run(x):
            y = m(x)
            return y[0] if isinstance(y, tuple) else y

        return COMPILED[transform](run)

    truth = function(m)(x)
    if outside:
        got = torch.compile(function(m), backend="aot_eager", **options)(x)
    else:
        got = function(torch.compile(m, backend="aot_eager", **options))(x)
    assert bool(got.any())
    check_alike(got, truth)
