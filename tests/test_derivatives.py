"""Derivatives of every order and kind: by finite differences, and each against another."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from problems import CHOICES, DECLINES, NAMED, draw
from rules import check_alike, check_close
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint
from twins import needs

import fastseq
from fastseq.backends.contract import Weights
from fastseq.cells import CELLS

VARIANTS = {
    "dense": {},
    "bare": {"bias": False, "state": False},
    "ragged": {"lengths": [2, 0, 3], "B": 3},
    "two directions": {"directions": 2, "H": 2},
    "two layers": {"layers": 2, "H": 2},
    "reset": {"reset": True, "lengths": [3, 2]},
    "h_mask": {"h_mask": True, "directions": 2, "H": 2},
    "projected": {"P": 2},
    "trajectory": {"directions": 2, "H": 2},
    "lean": {"lengths": [3, 2], "reset": True},
}
SMALL = {"T": 3, "B": 2, "I": 2, "H": 3}


def setup(cell, variant, backend):
    """A case, and what it computes as a function of its leaves."""
    if variant in ("projected", "trajectory") and cell != "lstm":
        pytest.skip("only the LSTM has it")
    case = draw(cell, **(SMALL | VARIANTS[variant]))
    options = {"trajectory": True} if variant == "trajectory" else {}
    options |= {"memory": "lean"} if variant == "lean" else {}
    case.settle(backend, **options)
    leaves = case.leaves()

    def function(*values):
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
        return tuple(moved.run(backend, **options).values())

    return function, tuple(leaves.values())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", NAMED)
def test_gradcheck(backend, cell, variant, request):
    function, leaves = setup(cell, variant, backend)
    assert gradcheck(function, leaves, fast_mode=not request.config.getoption("--full"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", NAMED)
def test_gradgradcheck(backend, cell, variant, request):
    function, leaves = setup(cell, variant, backend)
    assert gradgradcheck(function, leaves, fast_mode=not request.config.getoption("--full"))


def checkpoint_carries_tangents():
    """torch.utils.checkpoint, in which the eager form is lean; up to torch 2.11 it refuses them."""
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(1, requires_grad=True), torch.ones(1))
        try:
            checkpoint(torch.sin, x, use_reentrant=False)
        except NotImplementedError:
            return False
    return True


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", [None, pytest.param("eager", marks=pytest.mark.full)], ids=str)
def test_gradcheck_in_forward_mode(backend, cell, variant, request):
    """Tangents of the outputs, and of the gradients; the other backends decline them."""
    if variant == "lean" and not checkpoint_carries_tangents():
        pytest.skip("this torch's checkpoint carries no tangents, and says so")
    function, leaves = setup(cell, variant, backend)
    fast = not request.config.getoption("--full")
    forward = {"check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(function, leaves, **forward, fast_mode=fast)
    both = {"check_fwd_over_rev": True, "check_rev_over_rev": False, "check_undefined_grad": False}
    assert gradgradcheck(function, leaves, **both, fast_mode=fast)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_third_derivative(backend, cell):
    """Along a line: the third derivative of the eager form, by whoever runs."""
    function, leaves = setup(cell, "dense", backend)
    truth, _ = setup(cell, "dense", "eager")

    def third(f):
        s = torch.zeros((), dtype=torch.float64, requires_grad=True)
        moved = [leaf.detach() * (1 + s) + s for leaf in leaves]
        value = sum(out.square().sum() for out in f(*moved))
        for _ in range(3):
            (value,) = torch.autograd.grad(value, s, create_graph=True)
        return value

    check_alike(third(function), third(truth))


@pytest.mark.parametrize("wanted", ["x", "weights", "x and states"])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("backend", NAMED)
def test_gradgradcheck_of_some_inputs(backend, cell, wanted):
    """Those that need no gradient are constants of both derivatives."""
    function, leaves = setup(cell, "dense", backend)
    count = 1 + len(CELLS[cell].states)
    chosen = {"x": [0], "weights": range(count, len(leaves)), "x and states": range(count)}[wanted]
    rest = [leaf.detach() for leaf in leaves]

    def some(*values):
        full = list(rest)
        for k, value in zip(chosen, values, strict=True):
            full[k] = value
        return function(*full)

    assert gradcheck(some, tuple(leaves[k] for k in chosen), fast_mode=True)
    assert gradgradcheck(some, tuple(leaves[k] for k in chosen), fast_mode=True)


MODULES = {
    "RNN": {},
    "RNN relu": {"nonlinearity": "relu"},
    "LSTM": {},
    "LSTM projected": {"proj_size": 2},
    "GRU": {},
}


def pair(kind, backend, dtype=torch.float64, **options):
    """Ours and torch's with the same parameters."""
    needs(backend)
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True} | MODULES[kind] | options
    name = kind.split()[0]
    theirs = getattr(torch.nn, name)(3, 4, **options).to(dtype)
    ours = getattr(fastseq, name)(3, 4, backend=backend, **options).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@contextmanager
def without_onednn():
    """Its LSTM has no second derivative. (``mkldnn.flags`` warns where there is no Intel GPU.)"""
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_gradient_penalty(backend, kind, dtype):
    """One step of training with a penalty on the gradient of the input."""
    ours, theirs = pair(kind, backend, dtype)
    truth = copy.deepcopy(theirs).double()
    data = torch.randn(5, 3, 3).to(dtype)

    def step(module):
        x = data.to(next(module.parameters()).dtype, copy=True).requires_grad_()
        y, _ = module(x)
        loss = y.square().sum()
        (slope,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + (slope.norm() - 1).square()).backward()
        return {"x": x.grad} | {n: p.grad for n, p in module.named_parameters()}

    with without_onednn():
        theirs, exact = step(theirs), step(truth)
    for name, value in step(ours).items():
        check_close(value, theirs[name], exact[name], dtype, name)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_retain_graph_and_accumulation(backend, kind):
    ours, _ = pair(kind, backend)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    y, _ = ours(x)
    y.sum().backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in ours.named_parameters()}
    y.sum().backward()
    for name, p in ours.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


WORDS = {"dual": "no forward-mode derivative", "transform": r"torch\.func"}


def declined(backend, mode, function):
    """The value; None where the backend is one that declines this mode, and says so."""
    if mode not in DECLINES[backend]:
        return function()
    with pytest.raises(NotImplementedError, match=f"{backend}: .*{WORDS[mode]}"):
        function()
    return None


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_many_cotangents_at_once(backend, kind):
    """is_grads_batched, and once more where the gradients are differentiated again."""
    ours, theirs = pair(kind, backend)
    data = torch.randn(4, 2, 3, dtype=torch.float64)
    found = []
    for module in (ours, theirs):
        x = data.clone().requires_grad_()
        y, _ = module(x)
        many = torch.linspace(-1, 1, 3 * y.numel(), dtype=y.dtype).view(3, *y.shape)
        leaves = [x, *module.parameters()]
        if module is ours:
            batched = {"create_graph": True, "is_grads_batched": True}
            slopes = torch.autograd.grad(y, leaves, many, **batched)
        else:
            each = [torch.autograd.grad(y, leaves, one, create_graph=True) for one in many]
            slopes = [torch.stack(parts) for parts in zip(*each, strict=True)]
        curves = torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)
        found.append([*slopes, *curves])
    for k, (got, truth) in enumerate(zip(*found, strict=True)):
        check_close(got, None, truth, torch.float64, f"gradient {k}")


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("way", ["jvp", "dual"])
@pytest.mark.parametrize("of", ["x", "parameters", "state"])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_forward_mode(backend, kind, of, way):
    """A tangent through the module is the finite difference; or a clear no, never zero."""
    ours, theirs = pair(kind, backend)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}
    widths = [MODULES[kind].get("proj_size", 4), 4] if kind.startswith("LSTM") else [4]
    states = [torch.randn(4, 2, width, dtype=torch.float64) for width in widths]
    moved = {"x": {"x": x}, "parameters": parameters, "state": dict(enumerate(states))}[of]
    tangents = {name: torch.randn_like(value) for name, value in moved.items()}

    def run(module, values):
        hx = [values.get(k, s) for k, s in enumerate(states)]
        hx = tuple(hx) if len(hx) > 1 else hx[0]
        weights = {name: values.get(name, p) for name, p in parameters.items()}
        y, state = functional_call(module, weights, (values.get("x", x), hx))
        return torch.cat([y.flatten(), *(s.flatten() for s in _tuple(state))])

    def tangent():
        if way == "jvp":
            return jvp(lambda values: run(ours, values), (moved,), (tangents,))[1]
        with forward_ad.dual_level():
            dual = {n: forward_ad.make_dual(v, tangents[n]) for n, v in moved.items()}
            return forward_ad.unpack_dual(run(ours, dual)).tangent

    got = declined(backend, "dual", tangent)
    if got is None:
        return
    h = 1e-5  # the bound is that of a finite difference, about h squared, and no rounding
    ahead, behind = (
        run(theirs, {name: value + sign * h * tangents[name] for name, value in moved.items()})
        for sign in (1, -1)
    )
    truth = (ahead - behind).detach() / (2 * h)
    assert bool(got.any())
    assert relative(got, truth) < 1e-8


def _tuple(state):
    return state if isinstance(state, tuple) else (state,)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_func_grad(backend, kind):
    """torch.func.grad of parameters is autograd's; or a clear no."""
    ours, theirs = pair(kind, backend)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(values, x):
        return functional_call(ours, values, (x,))[0].square().sum()

    got = declined(backend, "transform", lambda: grad(loss)(parameters, x))
    if got is None:
        return
    theirs(x)[0].square().sum().backward()
    for name, parameter in theirs.named_parameters():
        check_close(got[name], None, parameter.grad, torch.float64, name)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_per_sample_gradients(backend, kind):
    """vmap(grad) over the batch is a loop over it; or a clear no."""
    ours, theirs = pair(kind, backend)
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(values, x):
        return functional_call(ours, values, (x,))[0].square().sum()

    got = declined(backend, "transform", lambda: vmap(grad(loss), in_dims=(None, 1))(parameters, x))
    if got is None:
        return
    for b in range(3):
        theirs.zero_grad()
        theirs(x[:, b])[0].square().sum().backward()
        for name, parameter in theirs.named_parameters():
            check_close(got[name][b], None, parameter.grad, torch.float64, f"{name}[{b}]")


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_ensemble(backend, kind):
    """vmap over stacked parameters, with and without a gradient; or a clear no."""
    members = [pair(kind, backend)[0] for _ in range(3)]
    with torch.no_grad():
        for k, member in enumerate(members):
            for p in member.parameters():
                p.mul_(1 + k)
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in members])
        for name, _ in members[0].named_parameters()
    }
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(values, x):
        return functional_call(members[0], values, (x,))[0]

    got = declined(backend, "transform", lambda: vmap(run, in_dims=(0, None))(stacked, x))
    slopes = declined(
        backend,
        "transform",
        lambda: vmap(grad(lambda v, x: run(v, x).square().sum(), argnums=1), in_dims=(0, None))(
            stacked, x
        ),
    )
    for k, member in enumerate(members):
        leaf = x.clone().requires_grad_()
        y, _ = member(leaf)
        if got is not None:
            check_close(got[k], None, y.detach(), torch.float64, f"member {k}")
        if slopes is not None:
            (slope,) = torch.autograd.grad(y.square().sum(), leaf)
            check_close(slopes[k], None, slope, torch.float64, f"gradient of member {k}")


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("backend", CHOICES, ids=str)
def test_jacobians(backend, kind):
    """jacrev, jacfwd, vjp and the Hessian agree with autograd's; or a clear no."""
    ours, theirs = pair(kind, backend, num_layers=1, bidirectional=False)
    x = torch.randn(3, 1, 3, dtype=torch.float64)
    truth = torch.autograd.functional.jacobian(lambda x: theirs(x)[0], x)
    curve = torch.autograd.functional.hessian(lambda x: theirs(x)[0].square().sum(), x)
    for transform, mode in ((jacrev, "transform"), (jacfwd, "dual")):
        got = declined(backend, mode, lambda t=transform: t(lambda x: ours(x)[0])(x))
        if got is not None:
            check_close(got, None, truth, torch.float64, transform.__name__)
    got = declined(backend, "dual", lambda: hessian(lambda x: ours(x)[0].square().sum())(x))
    if got is not None:
        check_close(got, None, curve, torch.float64, "hessian")
    cotangent = torch.randn_like(theirs(x)[0])
    got = declined(backend, "transform", lambda: vjp(lambda x: ours(x)[0], x)[1](cotangent)[0])
    if got is not None:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(theirs(leaf)[0], leaf, cotangent)
        check_close(got, None, slope, torch.float64, "vjp")


@pytest.mark.parametrize("variant", ["ragged", "reset", "h_mask", "projected", "trajectory"])
@pytest.mark.parametrize("cell", CELLS)
def test_forward_over_reverse(cell, variant):
    """With options that torch.nn has not, where backend=None chooses: H v by two ways."""
    function, leaves = setup(cell, variant, None)
    constants = tuple(leaf.detach() for leaf in leaves)
    random = torch.Generator().manual_seed(2)
    tangents = tuple(torch.randn(c.shape, generator=random, dtype=torch.float64) for c in constants)

    def loss(*values):
        return sum(out.square().sum() for out in function(*values))

    every = tuple(range(len(constants)))
    _, forward = jvp(grad(loss, argnums=every), constants, tangents)
    slopes = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    along = sum((slope * t).sum() for slope, t in zip(slopes, tangents, strict=True))
    backward = torch.autograd.grad(along, leaves, allow_unused=True, materialize_grads=True)
    for name, (one, other) in enumerate(zip(forward, backward, strict=True)):
        check_close(one, None, other, torch.float64, f"input {name}")
