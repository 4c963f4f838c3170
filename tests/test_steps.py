"""Cells and layers that are called step by step in training, beside torch.nn's."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from twins import CELLS, LAYERS, assert_same, assert_same_gradients, needs, pair, tensors

import fastseq
from fastseq.ops import steps

T, B, I, H = 7, 3, 4, 6  # noqa: E741  (the field's letters)


@pytest.fixture(autouse=True)
def double(monkeypatch):
    """In float64, where the rule has no part for torch's own rounding, and whatever the sizes."""
    needs("native")
    monkeypatch.setattr(steps, "LEAST", 0)
    monkeypatch.setattr(steps, "LEAST_EACH", 0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def products(monkeypatch):
    """Counts the products of many steps: a test that meets none tests nothing."""
    found, multiply = [], steps.multiply

    def counted(*args):
        found.append(len(args[-1]))
        return multiply(*args)

    monkeypatch.setattr(steps, "multiply", counted)
    return found


def loop(m, x, state=None):
    """All outputs, each step's of the state before; a decoder that attends reads what it gave."""
    outputs = []
    for row in x:
        if isinstance(m, nn.RNNCellBase):
            state = m(row, state)
            h = state[0] if isinstance(state, tuple) else state
        else:
            y, state = m(row.unsqueeze(1 if m.batch_first else 0), state)
            h = y.squeeze(1 if m.batch_first else 0)
        outputs.append(h)
    return torch.stack(outputs), state


def both(kind, function, **options):
    """``function(module)`` of torch.nn's and ours, and the gradients of the parameters."""
    theirs, ours = pair(kind, I, H, **options)
    seed = torch.initial_seed()
    found = []
    for m in (theirs, ours):
        torch.manual_seed(seed)
        found.append(function(m))
    assert_same(found[1], found[0])
    assert_same_gradients(ours, theirs)
    return ours


def leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


MODULES = [(kind, {}) for kind in CELLS]
MODULES += [(kind, {"bias": False}) for kind in CELLS]
MODULES += [(kind, options) for kind in LAYERS for options in ({}, {"batch_first": True})]


@pytest.mark.parametrize(("kind", "options"), MODULES)
@pytest.mark.parametrize("rows", [steps.ROWS, 1, 6])
def test_a_loop(kind, options, rows, products, monkeypatch):
    """The steps but the first leave their rows, and one product, or some, are made of them."""
    monkeypatch.setattr(steps, "ROWS", rows)

    def train(m):
        x = leaf(T, B, I)
        y, state = loop(m, x)
        (y.square().sum() + tensors((state,))[-1].sum()).backward()
        return y, x.grad

    both(kind, train, **options)
    expected = {steps.ROWS: [T - 1], 1: [1] * (T - 1), 6: [2] * ((T - 1) // 2)}
    assert products == expected[rows]


@pytest.mark.parametrize("kind", CELLS)
def test_calls_of_backward(kind, products):
    """Twice through one graph, two graphs, and gradients that add up."""

    def train(m):
        y, _ = loop(m, leaf(T, B, I))
        y.sum().backward(retain_graph=True)
        y[2].sum().backward()
        z, _ = loop(m, leaf(T, 1, I))
        z.sum().backward()
        return y, z

    both(kind, train)
    assert products == [T - 1] * 3


@pytest.mark.parametrize("kind", CELLS)
def test_gradients_of_some(kind, products):
    """What is not asked for is not computed, and nothing of it is left to the next call."""

    def train(m):
        x = leaf(T, B, I)
        y, _ = loop(m, x)
        first = torch.autograd.grad(y.sum(), [x], retain_graph=True)
        second = torch.autograd.grad(y[-1].sum(), [m.weight_hh], retain_graph=True)
        y.sum().backward()
        return y, first, second

    both(kind, train)
    assert products == [T - 1, T - 1]


@pytest.mark.parametrize("kind", CELLS)
def test_frozen_weights(kind, products):
    def train(m):
        m.weight_ih.requires_grad_(False)
        y, _ = loop(m, leaf(T, B, I))
        y.sum().backward()
        m.weight_ih.requires_grad_(True)
        m.bias_hh.requires_grad_(False)
        y, _ = loop(m, leaf(T, B, I))
        y.sum().backward()
        m.requires_grad_(False)
        y, _ = loop(m, leaf(T, B, I))
        y.sum().backward()
        m.requires_grad_(True)
        return y

    both(kind, train)
    assert products == [T - 1] * 2


@pytest.mark.parametrize("kind", CELLS)
def test_training_steps(kind, products):
    """The optimizer writes to the weights, the type changes, a parameter is replaced."""

    def train(m):
        x, losses = torch.randn(T, B, I), []
        for turn in range(4):
            if turn == 2:
                m.float().double()
            if turn == 3:
                m.weight_hh = nn.Parameter(m.weight_hh.detach() * 0.5)
            optimizer = torch.optim.Adam(m.parameters(), lr=0.01)
            optimizer.zero_grad()
            loss = loop(m, x)[0].square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return losses

    both(kind, train)
    assert products == [T - 1] * 4


def test_another_type_in_between():
    """Of the token of other days the gradients would have another type."""
    m = fastseq.LSTMCell(I, H)
    loop(m, torch.randn(T, B, I))[0].sum().backward()
    m.zero_grad(set_to_none=True)
    m.float()
    loop(m, torch.randn(T, B, I, dtype=torch.float32))[0].sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in m.parameters())


@pytest.mark.parametrize("kind", CELLS)
def test_weights_written_to_before_backward(kind):
    """As with torch.nn, it is told."""
    for m in pair(kind, I, H):
        y, _ = loop(m, leaf(T, B, I))
        with torch.no_grad():
            m.weight_hh.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("kind", CELLS)
def test_a_backward_that_fails(kind):
    """What it had gathered is not taken for the next one's."""

    def train(m):
        y, _ = loop(m, leaf(T, B, I))

        def fail(gradient):
            raise ValueError("no")

        x = leaf(T, B, I)
        broken = x * 1
        broken.register_hook(fail)
        z, _ = loop(m, broken)
        with pytest.raises(ValueError, match="no"):
            z.sum().backward()
        m.zero_grad()
        y.sum().backward()
        return y

    both(kind, train)


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints(kind, reentrant):
    def train(m):
        x = leaf(T, B, I)
        state, outputs = None, []
        for part in (x[:3], x[3:]):
            given = () if state is None else (state,)
            y, state = checkpoint(loop, m, part, *given, use_reentrant=reentrant)
            outputs.append(y)
        torch.cat(outputs).square().sum().backward()
        return *outputs, x.grad

    both(kind, train)


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives(kind):
    def train(m):
        x = leaf(T, B, I)
        y, _ = loop(m, x)
        grads = torch.autograd.grad(y.square().sum(), [x, *m.parameters()], create_graph=True)
        sum(g.square().sum() for g in grads).backward()
        return x.grad, grads

    both(kind, train)


@pytest.mark.parametrize("kind", CELLS)
def test_states_of_another_graph(kind, products):
    """An encoder gives the first state, and rows come and go."""

    def train(m):
        encoder = leaf(5, H)
        state = (encoder * 2, encoder * 3) if kind == "LSTMCell" else encoder * 2
        y, last = loop(m, torch.randn(2, 5, I), state)
        fewer = tuple(s[:B] for s in last) if kind == "LSTMCell" else last[:B]
        z, _ = loop(m, leaf(T, B, I), fewer)
        (y.sum() + z.square().sum()).backward()
        return y, z, encoder.grad

    both(kind, train)
    assert products == [T + 2]


def test_a_gradient_of_c_alone(products):
    def train(m):
        x = leaf(T, B, I)
        _, (_, c) = loop(m, x)
        c.sum().backward()
        return x.grad

    both("LSTMCell", train)
    assert products == [T - 1]


@pytest.mark.parametrize("kind", CELLS)
def test_hooks_of_parameters(kind):
    """They see one gradient, that of all steps."""

    def train(m):
        seen = []
        for p in m.parameters():
            p.register_hook(lambda g: seen.append(g) or g * 2)
            p.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        loop(m, leaf(T, B, I))[0].sum().backward()
        assert len(seen) == 8
        return sorted((g.sum() for g in seen), key=float)

    both(kind, train)


@pytest.mark.parametrize("kind", CELLS)
def test_copies_after_a_loop(kind):
    m = getattr(fastseq, kind)(I, H)
    loop(m, leaf(T, B, I))[0].sum().backward()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        twin.zero_grad()
        x = leaf(T, B, I)
        loop(twin, x)[0].sum().backward()
        m.zero_grad()
        loop(m, x)[0].sum().backward()
        assert_same([p.grad for p in twin.parameters()], [p.grad for p in m.parameters()])


def test_a_gradient_that_is_edited(products):
    """A residual gives a step and its neighbour one gradient tensor, which a hook clamps."""

    def train(m):
        total, h = 0, None
        for row in leaf(T, B, H):
            skip = row * 2
            skip.register_hook(lambda g: g.clamp_(-0.1, 0.1))
            h = m(row, h)
            total = total + ((h + skip) * torch.randn(B, H)).sum()
        total.backward()
        return total

    theirs, ours = (library.GRUCell(H, H) for library in (nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    for m in (theirs, ours):
        torch.manual_seed(1)
        train(m)
    assert_same_gradients(ours, theirs)
    assert products == [T - 1]


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("edit", ["zero", "free"])
def test_an_input_that_is_written_to_or_freed_in_backward(kind, edit, products):
    """As reversible networks and offloading do it, once its own gradient is there."""

    def clear(data):
        data.zero_() if edit == "zero" else data.untyped_storage().resize_(0)

    def train(m):
        for _ in range(2):
            m.zero_grad()
            state, inputs = None, leaf(T, B, I)
            for row in inputs:
                x = row * 2
                data = x.detach()
                x.register_hook(lambda g, data=data: clear(data))
                state = m(x, state)
            (state[0] if kind == "LSTMCell" else state).sum().backward()
        return inputs.grad

    both(kind, train)
    assert products == [T - 1] * 2


@pytest.mark.parametrize("kind", CELLS)
def test_nothing_is_kept_beyond_the_graph(kind):
    """Neither by a backward that fails, nor of weights that were replaced."""
    m = getattr(fastseq, kind)(I, H)
    x = leaf(T, B, I)
    alive = []

    def fail(gradient):
        raise ValueError("no")

    for _ in range(3):
        broken = x * 1
        broken.register_hook(fail)
        y = loop(m, broken)[0]
        alive.append(weakref.ref(y))
        with pytest.raises(ValueError, match="no"):
            y.sum().backward()
        del y, broken
    alive.append(weakref.ref(m.weight_hh))
    gc.collect()  # the exceptions' frames
    assert id(m.weight_hh) not in steps._LIVE
    m.weight_hh = nn.Parameter(m.weight_hh.detach() * 2)
    assert [ref() for ref in alive] == [None] * 4
    assert set(vars(m)) == set(vars(getattr(fastseq, kind)(I, H)))


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_parameters_that_grow_or_are_swapped(kind, swap):
    def train(m):
        loop(m, torch.randn(T, B, I))[0].sum().backward()
        m.zero_grad()
        if swap:
            m.float().double()
            return loop(m, torch.randn(T, B, I))[0]
        m.weight_ih.data = torch.cat([m.weight_ih.data] * 2, 1)
        m.input_size = 2 * I
        y, _ = loop(m, torch.randn(T, B, 2 * I))
        y.sum().backward()
        return y, m.weight_ih.grad

    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        both(kind, train)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@pytest.mark.parametrize("kind", CELLS)
def test_hooks_of_states(kind):
    """One that nothing uses is not called, and the others see their gradient."""

    def train(m):
        x, state, seen = leaf(T, B, I), None, []
        for row in x:
            state = m(row, state)
            for s in tensors((state,)):
                s.register_hook(lambda g: seen.append(1) or g.clamp(-0.5, 0.5))
        h = state[0] if kind == "LSTMCell" else state
        h.sum().backward()
        return x.grad, torch.tensor(len(seen))

    if kind == "LSTMCell":  # torch's c has the gradient by way of its h besides
        m, calls = fastseq.LSTMCell(I, H), []
        h, c = m(leaf(B, I))
        c.register_hook(calls.append)
        h.sum().backward()
        assert not calls
    else:
        both(kind, train)


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_of_states_of_one_step(kind):
    """The output is used, and the states are not."""
    for m in pair(kind, I, H):
        y, states = m(leaf(1, B, I))
        for s in tensors((states,)):
            s.register_hook(lambda g: g.clamp_(-1, 1))
        y.sum().backward()


@pytest.mark.parametrize("kind", CELLS)
def test_another_type_while_a_graph_lives(kind, products):
    """A loss that is kept keeps its token."""

    def train(m):
        kept = loop(m, leaf(T, B, I))[0].sum()
        m.float()
        loop(m, torch.randn(T, B, I, dtype=torch.float32))[0].sum().backward()
        assert {p.grad.dtype for p in m.parameters()} == {torch.float32}
        m.zero_grad()
        m.double()
        y, _ = loop(m, leaf(T, B, I))
        y.sum().backward()
        return y, kept

    for m in pair(kind, I, H):
        train(m)
    assert products == [T - 1] * 2


@pytest.mark.parametrize("kind", CELLS)
def test_no_features(kind, products):
    """torch.nn's cells take inputs of no size."""

    def train(m):
        y, _ = loop(m, torch.randn(T, B, 0))
        y.sum().backward()
        return y

    theirs, ours = (getattr(library, kind)(0, H) for library in (nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    assert_same(train(ours), train(theirs))
    assert_same(ours.weight_hh.grad, theirs.weight_hh.grad)


def test_another_nonlinearity_in_between(products):
    def train(m):
        h, outputs = None, []
        for k, row in enumerate(leaf(T, B, I)):
            m.nonlinearity = "tanh" if k < 3 else "relu"
            h = m(row, h)
            outputs.append(h)
        torch.stack(outputs).square().sum().backward()
        return outputs

    both("RNNCell", train)
    assert products == [T - 3, 2]


def test_several_threads():
    """Each backward gathers its own."""
    m = fastseq.GRUCell(I, H)
    x = [torch.randn(T, B, I) for _ in range(4)]
    losses = [loop(m, one)[0].square().sum() for one in x]
    expected = [
        torch.autograd.grad(loss, list(m.parameters()), retain_graph=True) for loss in losses
    ]
    found = [None] * len(x)

    def work(k):
        for _ in range(20):
            found[k] = torch.autograd.grad(losses[k], list(m.parameters()), retain_graph=True)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_same(found, expected)


def test_a_layer_whose_list_was_set(products):
    """What stands in ``_flat_weights`` gets the gradient."""

    def train(m):
        w = nn.Parameter(torch.randn_like(m.weight_hh_l0))
        m._flat_weights[1] = w
        loop(m, leaf(T, B, I))[0].sum().backward()
        return w.grad

    both("GRU", train)
    assert products == [T - 1]


@pytest.mark.parametrize("kind", CELLS)
def test_parameters_that_are_given(kind):
    """functional_call, with leaves and with what follows from them (MAML)."""

    def train(m):
        x, names = leaf(T, B, I), [name for name, _ in m.named_parameters()]
        mine = {name: p.detach().clone().requires_grad_() for name, p in m.named_parameters()}

        class Loop(nn.Module):
            def __init__(self):
                super().__init__()
                self.cell = m

            def forward(self, x):
                return loop(self.cell, x)[0]

        wrapped = Loop()

        def run(parameters):
            given = {f"cell.{name}": p for name, p in parameters.items()}
            return torch.func.functional_call(wrapped, given, (x,))

        grads = torch.autograd.grad(run(mine).sum(), list(mine.values()), create_graph=True)
        adapted = {n: p - 0.1 * g for (n, p), g in zip(mine.items(), grads, strict=True)}
        run(adapted).square().sum().backward()
        wrapped(x).sum().backward()
        return grads, [mine[name].grad for name in names]

    both(kind, train)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::UserWarning")  # Dynamo's
def test_compiled_autograd():
    """Which runs a backward without torch's engine."""

    def train(m):
        x = leaf(3, B, I)
        y, _ = loop(m, x)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
            y.sum().backward()
        return y, x.grad

    both("LSTMCell", train)


def test_one_step_alone_makes_no_token():
    """It would cost more than it spares."""
    m = fastseq.LSTMCell(I, H)
    m(leaf(B, I))[0].sum().backward()
    m(leaf(B, I), (torch.randn(B, H), torch.randn(B, H)))[0].sum().backward()
    assert id(m.weight_hh) not in steps._LIVE


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bidirectional": True}, {"proj_size": 3}])
def test_other_layers_take_the_other_way(options, products):
    def train(m):
        y, _ = loop(m, leaf(T, B, I))
        y.sum().backward()
        return y

    both("LSTM", train, **options)
    assert not products


def test_where_it_pays(products, monkeypatch):
    """Large weights and few rows; a step at the least sizes for which it was measured."""
    monkeypatch.undo()
    monkeypatch.setattr(
        steps, "multiply", lambda *args, f=steps.multiply: products.append(1) or f(*args)
    )
    torch.set_default_dtype(torch.float32)
    for hidden, rows, expected in ((512, 8, 1), (512, 512, 0), (64, 1, 0)):
        cell = fastseq.GRUCell(hidden, hidden)
        h = cell(leaf(rows, hidden))
        cell(leaf(rows, hidden), h).sum().backward()
        assert len(products) == expected
        products.clear()
