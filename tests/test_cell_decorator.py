"""``@fastseq.cell``: forward equations become a layer, on every backend, called in every way.

Triton's part runs under its interpreter, in a process of its own.
"""

# ruff: noqa: F821, F841  (the words of the equations are the vocabulary's)
import copy
import importlib
import inspect
import io
import linecache
import math
import os
import pickle
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path

import independent
import pytest
import torch
from children import child
from independent import affine, blocks, masked, over_time
from pairwise import covering
from problems import against_the_independent, draw, full
from rules import check_close
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq.backends import load
from fastseq.cells import CELLS, arguments, register, unregister
from fastseq.cells.own import own_cell
from fastseq.cells.text import number_of, number_word
from fastseq.nn import OwnCell, OwnLayer

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ours_alone = pytest.mark.skipif(INTERPRETED, reason="Triton's cases alone")

I, H, T, B = 3, 5, 6, 4  # noqa: E741  (the field's letters)


@fastseq.cell(source="made up")
def Slow(a_f, x_n, x_z, c_prev, h_prev, m_prev, u):
    """Two phases, three states, a gate without a product, numbers and quotients."""
    f = sigmoid(a_f) / (2 + exp(-u))
    c = f * c_prev + (1 - f) * tanh(x_z)
    n = tanh(x_n + U_n(c) + maximum(x_z, 0.1))
    m = 0.9 * m_prev + c_prev * n / 8
    h = h_prev + f * (n - h_prev) + m
    return h, c, m


def slow(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """The same once more, in matrices."""
    W_f, W_n, W_z = blocks(w_ih, 3)
    b_f, b_n, b_z = blocks(b_ih, 3)
    U_f, U_n = blocks(w_hh, 2)
    p_f, p_n = blocks(b_hh, 2)
    (u,) = units

    def step(x_t, b, h, c, m):
        before = masked(h, h_mask, b)
        z = affine(W_z, x_t, b_z)
        f = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, before, p_f)) / (2 + torch.exp(-u))
        new = f * c + (1 - f) * torch.tanh(z)
        bent = torch.maximum(z, torch.full_like(z, 0.1))
        n = torch.tanh(affine(W_n, x_t, b_n) + affine(U_n, new, p_n) + bent)
        m = 0.9 * m + c * n / 8
        return f * n + (1 - f) * h + m, new, m

    return over_time(step, x, states, **time)


@fastseq.cell
def Scaled(a_i, a_f, a_g, a_o, c_prev):
    """An LSTM of one phase, which can be projected."""
    i = sigmoid(a_i)
    f = sigmoid(a_f + 1)
    c = f * c_prev + i * tanh(a_g)
    h = 2 * (sigmoid(a_o) - 0.5) * tanh(c / 3)
    return h, c


def scaled(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    W_i, W_f, W_g, W_o = blocks(w_ih, 4)
    U_i, U_f, U_g, U_o = blocks(w_hh, 4)
    b_i, b_f, b_g, b_o = blocks(b_ih, 4)
    p_i, p_f, p_g, p_o = blocks(b_hh, 4)

    def step(x_t, b, h, c):
        u = masked(h, h_mask, b)
        i = torch.sigmoid(affine(W_i, x_t, b_i) + affine(U_i, u, p_i))
        f = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, u, p_f) + 1)
        g = torch.tanh(affine(W_g, x_t, b_g) + affine(U_g, u, p_g))
        c = f * c + i * g
        o = torch.sigmoid(affine(W_o, x_t, b_o) + affine(U_o, u, p_o))
        h = (2 * o - 1) * torch.tanh(c / 3)
        return (h if w_hr is None else w_hr @ h), c

    return over_time(step, x, states, **time)


WRITINGS = {Slow: slow, Scaled: scaled}
each = pytest.mark.parametrize("kind", WRITINGS, ids=lambda kind: kind.__name__)
for kind in WRITINGS:  # other modules, which are read behind this one, have tests of all that are
    unregister(kind.definition.name)


@pytest.fixture(autouse=True, scope="module")
def registered():
    before = set(CELLS)
    names = {kind.definition.name: writing for kind, writing in WRITINGS.items()}
    independent.CELLS.update(names)
    for kind in WRITINGS:
        register(kind.definition)
    yield
    for name in set(CELLS) - before:
        unregister(name)
    for name in names:
        del independent.CELLS[name]


# --- values, on every backend

GIVEN = {"nothing": {}, "reset": {"reset": True}, "both": {"reset": True, "h_mask": True}}
AXES = {
    "backend": (None, "numba", "eager", "reference"),
    "dtype": (torch.float32, torch.bfloat16),
    "lengths": (None, (2, 0, 4)),
    "directions": (1, 2),
    "given": tuple(GIVEN),
    "memory": ("full", "lean"),
    "trajectory": (False, True),
}
ODD = {"dtype": (torch.float64, torch.float16)}


@ours_alone
@pytest.mark.parametrize(
    "row",
    [
        *covering(AXES),
        *(pytest.param(row, marks=full) for row in covering(AXES | ODD)),
    ],
    ids=lambda row: "-".join(str(v).removeprefix("torch.") for v in row.values()),
)
@each
def test_on_the_cpu(kind, row):
    row = dict(row)
    backend, memory, along = (row.pop(name) for name in ("backend", "memory", "trajectory"))
    name = kind.definition.name
    case = draw(name, T=4, I=3, H=18, **GIVEN[row.pop("given")], **row)
    against_the_independent(case, backend, name, memory=memory, trajectory=along)


@ours_alone
@pytest.mark.parametrize("backend", ["numba", "eager", "reference"])
def test_projected_on_the_cpu(backend):
    name = Scaled.definition.name
    case = draw(name, T=4, H=18, P=5, directions=2, lengths=(2, 0, 4))
    against_the_independent(case, backend, name)


if INTERPRETED:
    from triton_cases import form  # noqa: F401

ALL_AT_ONCE = {"lengths": (2, 0, 3), "directions": 2, "reset": True, "h_mask": True}


@pytest.mark.skipif(not INTERPRETED, reason="test_under_tritons_interpreter runs it")
@pytest.mark.parametrize(
    "form, dtype, options",
    [
        ("walk", torch.float64, {"memory": "full", "trajectory": True}),
        pytest.param("grid", torch.float32, {"memory": "full", "trajectory": True}, marks=full),
        pytest.param("walk", torch.float16, {"memory": "lean"}, marks=full),
        pytest.param("step", torch.float64, {"memory": "lean"}, marks=full),
    ],
    indirect=["form"],
    ids=str,
)
@each
def test_on_triton(kind, form, dtype, options):
    name = kind.definition.name
    case = draw(name, T=3, I=3, H=18, dtype=dtype, **ALL_AT_ONCE)
    against_the_independent(case, "triton", name, **options)


@ours_alone
def test_under_tritons_interpreter(request):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of older Tritons fails on NumPy 2.4")
    options = ["--full"] if request.config.getoption("--full") else []
    child(
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "on_triton", __file__, *options],
        TRITON_INTERPRET="1",
    )


# --- what is read off the equations


def peephole(a_i, a_f, a_g, a_o, c_prev, ci, cf, co):
    i = sigmoid(a_i + ci * c_prev)
    f = sigmoid(a_f + cf * c_prev)
    g = tanh(a_g)
    c = f * c_prev + i * g
    o = sigmoid(a_o + co * c)
    h = o * tanh(c)
    return h, c


def gru(a_r, a_z, x_n, s_n, h_prev):
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    n = tanh(x_n + r * s_n)
    h = n + z * (h_prev - n)
    return h


def gru_reset_before(a_r, a_z, x_n, h_prev):
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    n = tanh(x_n + U_n(r * h_prev))
    h = (1 - z) * n + z * h_prev
    return h


def mgu(a_f, x_n, h_prev):
    f = sigmoid(a_f)
    n = tanh(U_n(f * h_prev) + x_n)
    h = h_prev + f * (n - h_prev)
    return h


def rnn_tanh(a_h):
    h = tanh(a_h)
    return h


def indrnn(x_h, h_prev, u):
    h = relu(x_h + u * h_prev)
    return h


@ours_alone
@pytest.mark.parametrize(
    "text", [peephole, gru, gru_reset_before, mgu, rnn_tanh, indrnn], ids=lambda t: t.__name__
)
def test_it_is_the_librarys(text):
    """Gates, phases and as many saved values as in the declarations that were written by hand."""
    library = CELLS["peephole_lstm" if text is peephole else text.__name__]
    cell = own_cell(text)
    assert cell.called == text.__name__ != cell.name
    assert cell.recurrent_gates == library.recurrent_gates
    assert cell.apart_gates == library.apart_gates
    assert (cell.states, cell.G) == (library.states, library.G)
    assert len(cell.unit_parameters) == len(library.unit_parameters)
    assert len(cell.saved) == len(library.saved)
    assert cell.keeps_gates(False) == library.keeps_gates(False)
    assert list(map(cell.product_rows, cell.phases)) == list(
        map(library.product_rows, library.phases)
    )


def delayed(a_h, h_prev, c_prev):
    c = h_prev
    h = tanh(a_h) + c_prev
    return h, c


def two_products(x_a, x_b, h_prev):
    q = tanh(x_a + U_a(h_prev))
    h = 0.5 * (h_prev + tanh(x_b * q + U_b(q * h_prev)))
    return h


def early_h(a_h, x_c, c_prev):
    """h is known before the last product."""
    h = tanh(a_h)
    c = c_prev * sigmoid(x_c + U_c(h))
    return h, c


def of_a_state(x_a, c_prev, h_prev, p):
    """A product of a state before the step; a state that a later phase reads as it was."""
    n = tanh(x_a + U_a(c_prev) + p)
    c = sigmoid(p) * c_prev + h_prev
    h = n * c_prev + c
    return h, c


def a_part_in_two_phases(a_r, x_r2, x_n, h_prev):
    """x_r2 enters before the product and behind it; a_r is a state as it came."""
    m = x_r2 * h_prev
    n = tanh(x_n + U_n(m)) * x_r2
    k = a_r
    h = n + sigmoid(a_r) * h_prev
    return h, k


def three_phases(a_r, x_n, x_k, h_prev, k_prev):
    r = sigmoid(a_r)
    n = logsigmoid(x_n + U_n(r * h_prev))
    k = k_prev * r + n
    w = tanh(x_k + U_k(n * k)) * k_prev
    h = sqrt(1.5 + tanh(w)) * r - reciprocal(2 + r) / (w * w + 1)
    return h, k


def words_of_numbers(a_h, h_prev):
    half = 1 / 2
    k = -half
    h = tanh(a_h) * exp(half) - k * h_prev + maximum(0.0, a_h) + 1e-3
    return h


def inverse(a_h):
    h = 1 / (2 + tanh(a_h))
    return h


STRANGE = [
    *(delayed, two_products, early_h, of_a_state, a_part_in_two_phases, three_phases),
    words_of_numbers,
]


@ours_alone
@pytest.mark.parametrize("text", STRANGE, ids=lambda t: t.__name__)
@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_strange_ones(text, backend):
    """Kernels, which run the derived backward, beside torch's derivatives of the eager form."""
    layer = fastseq.cell(text)(I, H, bidirectional=True, dtype=torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    given = {"lengths": [6, 2, 0, 5], "reset": torch.rand(T, B) < 0.3}
    outputs = []
    for name in (backend, "eager"):
        layer.fastseq.backend = name
        found = flat(layer(x, **given))
        # cubes: no direction has a gradient of zero
        total = sum((t + 0.1).pow(3).sum() for t in found)
        outputs.append([*found, *torch.autograd.grad(total, [x, *layer.parameters()])])
    check(*outputs)


@ours_alone
def test_what_is_cheap_to_make_again_is_not_handed_on():
    assert own_cell(gru_reset_before).handed_on == ("z", "t0")
    assert own_cell(mgu).handed_on == ("f", "t0")
    assert "number_1_0() *" not in inspect.getsource(own_cell(inverse).phases[0].forward)


@pytest.mark.parametrize("value", [0.5, 2.0, -3.25, 1e-5, 1.5e20, 1e16, 123.25, 1 / 3, 5e-324])
def test_a_number_is_a_word(value):
    word = number_word(value)
    assert word.isidentifier() and number_of(word) == value
    assert number_of(f"{word}_") is None


@ours_alone
@pytest.mark.parametrize("backend", ["numba", "eager"])
def test_a_number_is_of_the_values_type(backend):
    """Bit for bit: 0.1 in float64 times a float32, rounded, is another number."""

    @fastseq.cell
    def tenth(x_h):
        h = 0.1 * x_h
        return h

    module = tenth(1, 1, bias=False, backend=backend)
    nn.init.ones_(module.weight_ih_l0)
    x = torch.rand(99, 1, 1)
    assert torch.equal(module(x)[0], x * torch.tensor(0.1))
    assert not torch.equal(x * torch.tensor(0.1), (0.1 * x.double()).float())


# --- what a layer of fastseq's does


def flat(out):
    return [out] if isinstance(out, torch.Tensor) else [t for value in out for t in flat(value)]


def check(ours, theirs):
    for k, (mine, truth) in enumerate(zip(flat(ours), flat(theirs), strict=True)):
        check_close(mine, None, truth, torch.float64, f"output {k}")


def layer(kind, **options):
    return kind(I, H, **({"dtype": torch.float64} | options))


def drawn(*shape):
    return torch.randn(*(shape or (T, B, I)), dtype=torch.float64)


@ours_alone
@each
def test_names(kind):
    module = layer(kind, num_layers=2, bidirectional=True, memory="lean")
    name = kind.__name__
    assert issubclass(kind, OwnLayer) and issubclass(kind.Cell, OwnCell)
    assert repr(module) == f"{name}(3, 5, num_layers=2, bidirectional=True, memory='lean')"
    assert repr(kind.Cell(I, H)) == f"{name}Cell(3, 5)"
    assert kind.__module__ == __name__ and kind.__qualname__ == name
    assert kind.definition.called == name and CELLS[kind.definition.name] is kind.definition
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"]
    names += [f"weight_{u}" for u in kind.definition.unit_parameters]
    places = ["l0", "l0_reverse", "l1", "l1_reverse"]
    assert list(module.state_dict()) == [f"{n}_{p}" for p in places for n in names]
    assert list(kind.Cell(I, H).state_dict()) == names
    assert list(kind(I, H, bias=False).state_dict()) == [
        f"{n}_l0" for n in names if "bias" not in n
    ]
    assert "Two phases" in Slow.__doc__ and Slow.definition.source == "made up"


@ours_alone
@each
def test_forms_of_a_call(kind):
    module = layer(kind, bidirectional=True)
    x, n = drawn(), len(kind.definition.states)
    states = tuple(drawn(2, B, H) for _ in range(n))
    y, last = module(x, states)
    first = layer(kind, bidirectional=True, batch_first=True)
    first.load_state_dict(module.state_dict())
    check(first(x.transpose(0, 1), states), (y.transpose(0, 1), last))
    check(module(x[:, 1], tuple(s[:, 1] for s in states)), (y[:, 1], [s[:, 1] for s in last]))
    lengths = torch.tensor([6, 2, 1, 5])
    rows, last = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    check((pad_packed_sequence(rows)[0], last), module(x, lengths=lengths))
    y, last, along = module(x, all_states=True)
    along = flat(along)
    assert len(along) == n - 1
    for k, states in enumerate(along):
        check(states[-1, :, :H], last[1 + k][0])
    if n == 3:
        with pytest.raises(RuntimeError, match=r"hx should be 3 tensors \(h_0, c_0, m_0\) of 3-D"):
            module(x, (states, states))


@ours_alone
@pytest.mark.parametrize("text", [rnn_tanh, peephole])
def test_an_output_edited_in_place(text):
    """As of torch.nn: where h is the one state, backward reads a copy."""
    module = fastseq.cell(text)(I, H)
    y = module(torch.randn(T, B, I))[0]
    y.mul_(2)
    refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
    with nullcontext() if text is rnn_tanh else refused:
        y.sum().backward()


@ours_alone
@each
def test_a_loop_over_the_cell_is_the_layer(kind):
    module, one = layer(kind), kind.Cell(I, H, dtype=torch.float64)
    one.load_state_dict({n.removesuffix("_l0"): w for n, w in module.state_dict().items()})
    x, hx, hs = drawn(), None, []
    y, _ = module(x)
    for x_t in x:
        hx = one(x_t, hx)
        hs.append(flat(hx)[0])
    check(torch.stack(hs), y)
    check(
        torch.autograd.grad(torch.stack(hs).square().sum(), list(one.parameters())),
        torch.autograd.grad(y.square().sum(), list(module.parameters())),
    )


@ours_alone
@each
@pytest.mark.parametrize(
    "option",
    ["recurrent_dropout", "input_dropout", "weight_dropout", "zoneout", "dropout", "learn_state"],
)
def test_options(kind, option):
    """The same masks on numba, or the eager form where it has none of them, as on eager."""
    module = layer(kind, num_layers=2, **{option: True if option == "learn_state" else 0.5})
    x, found = drawn(), []
    for backend in (None, "eager"):
        fastseq.set_options(module, backend=backend)
        torch.manual_seed(0)
        y, last = module(x, seed=3)
        found.append([y, last, torch.autograd.grad(y.square().sum(), list(module.parameters()))])
    check(*found)
    if option != "learn_state":
        assert not torch.equal(y, module.eval()(x)[0])


@ours_alone
@pytest.mark.parametrize("backend", ["numba", "eager"])
@each
def test_streaming(kind, backend):
    if isinstance(load(backend), str):
        pytest.skip(load(backend))
    module = layer(kind, num_layers=2, backend=backend)
    x, handle = drawn(), fastseq.streaming(module, batch=B)
    with torch.no_grad():
        y, last = module(x)
    check(torch.stack([handle.step(x_t) for x_t in x]), y)
    check(handle.state, last)


@ours_alone
@each
def test_transforms(kind):
    """An ensemble of parameters, gradients by functional transforms, a second derivative."""
    module, x = layer(kind), drawn()
    own = {name: p.detach() for name, p in module.named_parameters()}
    many = {name: torch.stack([p, 2 * p]) for name, p in own.items()}

    def run(parameters, x):
        return torch.func.functional_call(module, parameters, (x,))[0]

    check(torch.func.vmap(run, (0, None))(many, x)[0], module(x)[0])
    grads = torch.func.grad(lambda p, x: run(p, x).sum())(own, x)
    check(list(grads.values()), torch.autograd.grad(module(x)[0].sum(), list(module.parameters())))
    found = []
    for backend in (None, "eager"):
        module.fastseq.backend = backend
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(g.square().sum(), leaf))
    check(*found)


@ours_alone
@each
def test_compile(kind):
    module, x = layer(kind, dtype=None), torch.randn(T, B, I)
    found = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(found(x)), flat(module(x)))
    a, b = (torch.autograd.grad(f(x)[0].sum(), list(module.parameters())) for f in (found, module))
    torch.testing.assert_close(a, b)
    one = kind.Cell(I, H)
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(compiled(x[0])), flat(one(x[0])))


@ours_alone
@each
def test_copies(kind):
    x = torch.randn(T, I)
    for module in (kind(I, H), kind.Cell(I, H)):
        expected = module(x)
        stored = io.BytesIO()
        torch.save(module, stored)
        stored.seek(0)
        read = torch.load(stored, weights_only=False)
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), read):
            assert repr(other) == repr(module)
            for mine, theirs in zip(flat(other(x)), flat(expected), strict=True):
                assert torch.equal(mine, theirs)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert {t.dtype for t in flat(module(x))} == {torch.bfloat16}
    assert pickle.loads(pickle.dumps(kind.Cell)) is kind.Cell
    assert all(p.is_meta for p in kind(I, H, device="meta").parameters())


class _Through(torch.utils.data.Dataset):
    def __init__(self, module, x):
        self.module, self.x = module, x

    def __len__(self):
        return self.x.shape[1]

    def __getitem__(self, k):
        with torch.no_grad():
            return self.module(self.x[:, k])[0]


@ours_alone
@pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"
)
def test_in_forked_workers():
    module, x = Slow(I, H), torch.randn(T, B, I)
    loader = torch.utils.data.DataLoader(
        _Through(module, x), batch_size=B, num_workers=1, multiprocessing_context="fork"
    )
    (y,) = loader
    torch.testing.assert_close(y.transpose(0, 1), module(x)[0].detach())


@ours_alone
def test_initial_values():
    module = fastseq.init.forget_gate_bias_(Scaled(I, H, init=fastseq.init.orthogonal_), 2.0)
    assert torch.equal(module.bias_ih_l0[H : 2 * H], torch.full((H,), 2.0))
    block = module.weight_hh_l0[:H].detach()
    torch.testing.assert_close(block @ block.T, torch.eye(H))
    with pytest.raises(ValueError, match=r"^Slow has no gate k; its gates are f, n, z"):
        fastseq.init.gate_bias_(Slow(I, H), "k", 1.0)


@ours_alone
def test_users_are_told_the_plain_name(capsys):
    module, x = Slow(I, H, backend="native"), torch.randn(T, B, I)
    with pytest.raises(NotImplementedError, match="native: native has no kernel of Slow, only of"):
        module(x)
    fastseq.set_options(module, backend=None)
    assert fastseq.explain(module, x) == ("eager" if isinstance(load("numba"), str) else "numba")
    assert fastseq.explain(Slow.Cell(I, H), x[0]) is not None
    shown = capsys.readouterr().out
    assert "torch has no Slow; its cells are" in shown and Slow.definition.name not in shown
    with pytest.raises(ValueError, match=r"^proj_size: Slow adds h_prev to gates of another size"):
        Slow(I, H, proj_size=2)
    for backend in ("numba", "eager", "reference"):
        assert Scaled(I, H, proj_size=2, backend=backend)(x)[0].shape == (T, B, 2)
    one = fastseq.cell(rnn_tanh)
    assert one(I, H, proj_size=2, backend="numba")(x)[0].shape == (T, B, 2)
    with pytest.raises(TypeError, match=r"no counterpart in torch.nn: torch.nn has no Slow among"):
        torch.jit.script(nn.Sequential(Slow(I, H)))


# --- where a name means two things

FIRST = """
import fastseq

@fastseq.cell
def Same(a_h):
    h = tanh(a_h)  # {note}
    return h
"""
SECOND = FIRST.replace("tanh(a_h)", "0.25 * tanh(a_h)")


def value_of(kind, backend):
    module = kind(1, 1, backend=backend, bias=False)
    for parameter in module.parameters():
        nn.init.ones_(parameter)
    return module(torch.ones(1, 1, 1))[0].item()


@pytest.fixture
def modules(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        linecache.checkcache()
        importlib.invalidate_caches()
        if name in sys.modules:
            return importlib.reload(sys.modules[name])
        return importlib.import_module(name)

    before = set(sys.modules)
    yield write
    for name in set(sys.modules) - before:
        del sys.modules[name]


@ours_alone
@pytest.mark.parametrize("backend", ["numba", "eager", "reference"])
def test_one_name_in_two_modules(modules, backend):
    """Other equations are another cell; the same, with another comment, are the same one."""
    one = modules("cells_of_one", FIRST.format(note="the one"))
    other = modules("cells_of_another", SECOND.format(note=""))
    third = modules("cells_of_a_third", FIRST.format(note="the same"))
    assert one.Same.definition is third.Same.definition is not other.Same.definition
    assert value_of(one.Same, backend) == pytest.approx(math.tanh(1))
    assert value_of(other.Same, backend) == pytest.approx(0.25 * math.tanh(1))
    assert value_of(third.Same, backend) == pytest.approx(math.tanh(1))


@ours_alone
@pytest.mark.parametrize("backend", ["numba", "eager"])
def test_a_notebook(backend):
    """Cells of a notebook, as IPython runs them: defined again, a cell is the new one, and a layer
    of the old one stays what it was."""
    space = {"__name__": "__main__"}

    def run(number, text):
        file = f"<ipython-input-{number}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec"), space)
        return space["Same"]

    first = run(1, FIRST)
    old = first(1, 1, backend=backend)
    y = old(torch.ones(1, 1, 1))[0]
    second = run(2, SECOND)
    assert value_of(second, backend) == pytest.approx(0.25 * math.tanh(1))
    assert torch.equal(old(torch.ones(1, 1, 1))[0], y)
    again = copy.deepcopy(old)
    assert type(again) is first and torch.equal(again(torch.ones(1, 1, 1))[0], y)
    with pytest.raises(ValueError, match="Same, line 6: 'x': x is no argument"):
        run(3, FIRST.replace("tanh(a_h)", "tanh(a_h) + x"))


RUN = """
import sys
sys.path.insert(0, {folder!r})
import torch, same
module = same.Same(1, 1, backend="numba", bias=False)
for parameter in module.parameters():
    torch.nn.init.ones_(parameter)
print(module(torch.ones(1, 1, 1))[0].item())
"""


@ours_alone
def test_kernels_on_disk_are_of_one_cell(tmp_path):
    """The same file with other equations, and Numba's cache of the process before."""
    if isinstance(load("numba"), str):
        pytest.skip(load("numba"))
    program = RUN.format(folder=str(tmp_path))
    for text, expected in ((FIRST, 1.0), (SECOND, 0.25)):
        (tmp_path / "same.py").write_text(text)
        found = child(["-B", "-c", program], NUMBA_CACHE_DIR=str(tmp_path / "cache"))
        assert float(found) == pytest.approx(expected * math.tanh(1))


EXPORTED = """
import sys
sys.path.insert(0, {folder!r})
import torch, fastseq
program = torch.export.load({file!r}).module()
x = torch.ones(4, 2, 1)
try:
    program(x)
except LookupError as error:
    print(error)
import cells_of_one
print(program(x)[0].sum().item())
"""


@ours_alone
def test_an_exported_program_names_the_cell(modules, tmp_path):
    """It runs where the definition was imported, and says so where it was not."""
    kind = modules("cells_of_one", FIRST).Same
    module, x = kind(1, 1), torch.ones(6, 2, 1)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.testing.assert_close(flat(program.module()(x[:4])), flat(module(x[:4])))
    torch.export.save(program, tmp_path / "program.pt2")
    said, found = child(
        ["-c", EXPORTED.format(folder=str(tmp_path), file=str(tmp_path / "program.pt2"))]
    ).splitlines()
    assert said.strip("'\"") == (
        f"cell '{kind.definition.name}': not defined in this process; import the module whose "
        "@fastseq.cell defines Same, with the same equations"
    )
    assert float(found) == pytest.approx(module(x[:4])[0].sum().item(), rel=1e-5)


USER = """
import fastseq
import torch

@fastseq.cell(source="me")
def Mine(a_h, c_prev):
    c = c_prev + tanh(a_h)
    h = tanh(c)
    return h, c

@fastseq.cell
def Plain(a_h):
    h = tanh(a_h)
    return h

layer = Mine(3, 5, num_layers=2, backend="numba")
y, (h, c) = layer(torch.randn(2, 3))
name: str = Mine.definition.name
step = Plain.Cell(3, 5)
state: torch.Tensor = step(torch.randn(2, 3))
Mine(3)  # type: ignore[call-arg]
"""


@ours_alone
@full
def test_mypy_takes_what_users_write(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER)
    child(["-m", "mypy", "--warn-unused-ignores", str(tmp_path / "user.py")])


# --- refusals

outside = 2.0


def loop(a_h, h_prev):
    for _ in range(3):
        h = tanh(a_h)
    return h


def while_loop(a_h, h_prev):
    while a_h:
        h = tanh(a_h)
    return h


def branch(a_h, h_prev):
    if a_h:
        h = a_h
    return h


def conditional(a_h, h_prev):
    h = a_h if h_prev else h_prev
    return h


def comparison(a_h, h_prev):
    h = a_h * (h_prev > 0)
    return h


def indexing(a_h, h_prev):
    h = a_h + h_prev[1]
    return h


def unknown_word(a_h, h_prev):
    h = a_h + erf(h_prev)
    return h


def attribute(a_h, h_prev):
    h = a_h + torch.tanh(h_prev)
    return h


def power(a_h, h_prev):
    h = a_h**2 + h_prev
    return h


def reassigned(a_h, h_prev):
    k = a_h + h_prev
    k = tanh(k)
    h = k
    return h


def in_place(a_h, h_prev):
    h = a_h
    h += h_prev
    return h


def a_word(a_h, h_prev):
    exp = a_h + h_prev
    h = exp
    return h


def a_word_taken(a_h, tanh):
    h = a_h + tanh
    return h


def uncalled(a_h, h_prev):
    h = a_h + tanh
    return h


def global_read(a_h, h_prev):
    h = a_h + outside * h_prev
    return h


def unassigned(a_h, h_prev):
    h = a_h + k
    return h


def not_returned(a_h, c_prev):
    h = a_h + c_prev
    return h


def another_first(a_h, h_prev):
    h = a_h + h_prev
    c = tanh(h)
    return c, h


def expression_returned(a_h, h_prev):
    h = a_h + h_prev
    return tanh(h)


def argument_returned(a_h, h_prev):
    return h_prev


def no_return(a_h, h_prev):
    h = a_h + h_prev


def bare_return(a_h, h_prev):
    h = a_h + h_prev
    return


def number_returned(a_h):
    h = 2.0
    return h


def twice(a_h):
    h = tanh(a_h)
    return h, h


def default(a_h, u=None):
    h = a_h + u
    return h


def every(*a_h):
    h = a_h
    return h


def no_gate(h_prev):
    h = tanh(h_prev)
    return h


def unused_argument(a_h, h_prev, u):
    h = a_h + h_prev
    return h


def unused_value(a_h, h_prev):
    k = tanh(h_prev)
    h = a_h + h_prev
    return h


def other_gate(a_h, h_prev):
    h = a_h + U_k(h_prev)
    return h


def second_product(x_n, h_prev):
    q = tanh(x_n + U_n(h_prev))
    h = q + U_n(q)
    return h


def summed_already(a_n, h_prev):
    h = tanh(a_n + U_n(h_prev))
    return h


def product_of_a_number(x_n, h_prev):
    h = tanh(x_n + U_n(1.0)) + h_prev
    return h


def product_of_two(x_n, h_prev):
    h = tanh(x_n + U_n(h_prev, h_prev))
    return h


def circle(x_n, h_prev):
    q = tanh(x_n) * h_prev
    h = tanh(x_n + U_n(q))
    return h


def not_neighbours(a_f, x_n, a_o, h_prev):
    h = sigmoid(a_o) * tanh(x_n + U_n(sigmoid(a_f) * h_prev))
    return h


def state_part_alone(s_h, h_prev):
    h = tanh(s_h) + h_prev
    return h


def by_zero(a_h):
    h = a_h / (1 - 1)
    return h


def infinite(a_h):
    h = a_h * 1e400
    return h


def a_string(a_h):
    h = a_h * "2"
    return h


def two_targets(a_h):
    h = c = tanh(a_h)
    return h


def nested(a_h):
    def f(x):
        return x

    h = a_h
    return h


def gradient_name(a_h, h_prev, c_prev):
    dt = sigmoid(a_h)
    t = tanh(a_h)
    h = dt * t * h_prev
    c = t * c_prev + dt
    return h, c


REFUSED = [
    (loop, 1, "a step has no loops; the loop over time is fastseq's"),
    (while_loop, 1, "a step has no loops"),
    (branch, 1, "a step has no branches; relu and maximum choose"),
    (conditional, 1, "a step has no branches"),
    (comparison, 1, "'h_prev > 0': a step has no branches"),
    (indexing, 1, "'h_prev[1]': a unit sees no other unit; only products mix them"),
    (unknown_word, 1, "'erf(h_prev)': erf is none of the words sigmoid, tanh"),
    (attribute, 1, "a text is made of + - * and the words sigmoid, tanh"),
    (power, 1, "'a_h ** 2': there are no powers; write the product"),
    (reassigned, 2, "k has a value already; take another name"),
    (in_place, 2, "a name has one value; take another name"),
    (a_word, 1, "exp is a word of the vocabulary; take another name"),
    (a_word_taken, 0, "'tanh': tanh is a word of the vocabulary; take another name"),
    (uncalled, 1, "'tanh': tanh is a word; call it"),
    (global_read, 1, "'outside': outside is read from outside of the equations; write the number"),
    (unassigned, 1, "'k': k is no argument, and has no value before"),
    (not_returned, 2, "c_prev is a state before the step, and c is not returned"),
    (another_first, 3, "the first state returned is h, which the next layer reads"),
    (expression_returned, 2, "return the states by their names, h first"),
    (argument_returned, 1, "h_prev is no value of the step; assign each state a name"),
    (no_return, 1, "the equations end with a return of the states, h first"),
    (bare_return, 2, "return the states by their names, h first"),
    (number_returned, 2, "h is a number, and no state"),
    (twice, 2, "h is returned twice"),
    (default, 0, "a cell takes plain positional arguments alone, without defaults"),
    (every, 0, "a cell takes plain positional arguments alone, without defaults"),
    (no_gate, 0, "no argument is a gate's; take a_g for each gate g, or x_g"),
    (unused_argument, 0, "'u': u leads to no state that is returned; take it out"),
    (unused_value, 1, "'tanh(h_prev)': leads to no state that is returned; take it out"),
    (other_gate, 1, "U_k is a product of gate k; take x_k"),
    (second_product, 2, "gate n has one product, of h_prev; take another gate for another product"),
    (summed_already, 1, "U_n is a product of gate n; take x_n"),
    (product_of_a_number, 1, "a product takes a value of each unit"),
    (product_of_two, 1, "U_n takes one value"),
    (circle, 1, "the product of gate n multiplies it, and x_n enters it before"),
    (not_neighbours, None, "order the arguments so that gates with one operand are neighbours"),
    (state_part_alone, 0, "'s_h': s_h is a part of gate h; take x_h, too"),
    (by_zero, 1, "a division by zero"),
    (infinite, 1, "the number is not finite"),
    (a_string, 1, "a literal is a real number"),
    (two_targets, 1, "assign one name a line"),
    (nested, 1, "a text is assignments, and a return at its end"),
    (gradient_name, None, "['dt'] would be read as gradients, of ['t']; rename the values"),
]


@ours_alone
@pytest.mark.parametrize("text, line, why", REFUSED, ids=lambda v: getattr(v, "__name__", None))
def test_refused(text, line, why):
    """With the line of this file, counted from the def, and the reason."""
    before = set(CELLS)
    with pytest.raises(ValueError) as caught:
        fastseq.cell(text)
    said = str(caught.value)
    place = "" if line is None else f", line {text.__code__.co_firstlineno + line}"
    assert said.startswith(f"{text.__name__}{place}: ") and why in said, said
    assert set(CELLS) == before


@ours_alone
def test_the_page_says_what_is_refused():
    """docs/own-cell.md quotes the messages."""
    page = (Path(__file__).parent.parent / "docs" / "own-cell.md").read_text()
    table = page.split("## What is refused")[1].split("##")[0]
    quoted = [line.split(" | ")[-1].rstrip(" |") for line in table.splitlines() if "| `" in line]
    assert len(quoted) > 10
    whys = [*(why for _, _, why in REFUSED), "cannot be read; define it in a file or a notebook"]
    missing = [words for words in quoted if not any(words in why for why in whys)]
    assert not missing


@ours_alone
def test_closures_are_refused():
    leak = 0.5

    def closed(a_h, h_prev):
        h = a_h + leak * h_prev
        return h

    with pytest.raises(ValueError, match=r"closed, line \d+: 'leak': leak is read from outside"):
        fastseq.cell(closed)


@ours_alone
def test_what_is_no_function_is_refused():
    for given in (lambda a_h: a_h, 3, Slow):
        with pytest.raises(TypeError, match="cell: expected a function with the equations"):
            fastseq.cell(given)


@ours_alone
def test_equations_without_source_are_refused():
    space = {}
    exec("def hidden(a_h):\n    h = tanh(a_h)\n    return h", space)
    with pytest.raises(ValueError, match="hidden: the source of hidden cannot be read; define it"):
        fastseq.cell(space["hidden"])


@ours_alone
def test_a_wrong_derivative_is_refused(monkeypatch):
    """By the complex step, whatever the rules of differentiation say."""
    from fastseq.cells import derive

    def wrong(a_h):
        h = logsigmoid(a_h) * 0.75
        return h

    monkeypatch.setitem(derive.SLOPES, "logsigmoid", ("dsigmoid({y})",))
    with pytest.raises(ValueError, match=r"wrong: wrong_backward gives da_h = .* derivative"):
        fastseq.cell(wrong)


@ours_alone
def test_the_texts_can_be_read():
    """By whoever looks at what was inferred, and by Triton."""
    first, second = Slow.definition.phases
    assert second.operand in first.returns
    assert arguments(first.forward) == ("a_f", "x_z", "u", "c_prev")
    assert textwrap.dedent(inspect.getsource(second.forward)).startswith("def Slow_1_forward(a_n")
    for phase in Slow.definition.phases:
        assert "number_" in inspect.getsource(phase.forward)
        assert inspect.getsource(phase.backward)
