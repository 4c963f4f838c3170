"""The layers among torch's own tools: checkpointing, saved-tensor hooks, profiler, flop counter,
replicas, and streams in pieces."""

from functools import partial

import pytest
import torch
from rules import check_alike
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode
from twins import assert_same

import fastseq

CELLS = {"LSTM": 4, "GRU": 3, "RNN": 1}
#: Of our autograd, of torch's, and of torch's behind ours (an LSTM on oneDNN).
BACKENDS = ("numba", "eager", "torch")
T, B, I, H = 7, 5, 6, 8  # noqa: E741  (the field's letter)


def layer_of(cell, **options):
    torch.manual_seed(0)
    return getattr(fastseq, cell)(I, H, **options)


def an_input(steps=T, seed=1):
    x = torch.randn(steps, B, I, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def tensors(state):
    return state if isinstance(state, tuple) else (state,)


def gradients(layer, x, run):
    """Of a loss that reads output and final states, with respect to x and each parameter."""
    output, state = run(x)
    loss = output.square().mean() + sum(s.sin().sum() for s in tensors(state))
    return torch.autograd.grad(loss, [x, *layer.parameters()])


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def on_each_layer(function):
    function = pytest.mark.parametrize("backend", BACKENDS)(function)
    return pytest.mark.parametrize("cell", CELLS)(function)


# --- flop counter


def products(cell, rows, layers=1, directions=1, proj_size=0, width=I):
    """Of the equations: 2 flops a multiply-add of every weight matrix with every step."""
    P, total = proj_size or H, 0
    for _ in range(layers):
        per_row = CELLS[cell] * H * (width + P) + (P * H if proj_size else 0)
        total += 2 * rows * directions * per_row
        width = directions * P
    return total


def count(run):
    with FlopCounterMode(display=False) as counter:
        result = run()
    return counter.get_total_flops(), result


OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"bias": False, "batch_first": True}]
SHAPES = [(cell, options) for cell in CELLS for options in OPTIONS]
SHAPES += [("LSTM", {"proj_size": 3, "bidirectional": True})]


def analytic(cell, options, rows):
    directions = 2 if options.get("bidirectional") else 1
    return products(
        cell, rows, options.get("num_layers", 1), directions, options.get("proj_size", 0)
    )


@pytest.mark.parametrize("backend", ["numba", "torch", "reference", None])
@pytest.mark.parametrize("cell, options", SHAPES)
def test_flops_of_forward(cell, backend, options):
    layer, x = layer_of(cell, backend=backend, **options), an_input()
    expected = analytic(cell, options, T * B)
    assert count(lambda: layer(x))[0] == expected
    with torch.no_grad():
        assert count(lambda: layer(x))[0] == expected


@pytest.mark.parametrize("cell, options", SHAPES)
def test_flops_of_the_eager_form(cell, options):
    layer, x = layer_of(cell, backend="eager", **options), an_input()
    assert count(lambda: layer(x))[0] == analytic(cell, options, T * B)


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("cell, options", SHAPES)
def test_flops_of_backward(cell, memory, options):
    """As much again for the gradients through time and of the input, and for the weights'."""
    layer = layer_of(cell, backend="numba", memory=memory, **options)
    output, _ = layer(an_input())
    forward = analytic(cell, options, T * B)
    expected = 2 * forward
    if memory == "lean" and cell != "RNN":  # which keeps its output alone either way
        directions = 2 if options.get("bidirectional") else 1
        P = options.get("proj_size", 0)
        expected += forward - 2 * T * B * directions * P * H  # the gates alone are made again
    assert count(lambda: output.sum().backward())[0] == expected


@pytest.mark.parametrize("cell", CELLS)
def test_flops_count_what_is_wanted(cell):
    layer, G = layer_of(cell, backend="numba"), CELLS[cell]
    output, _ = layer(an_input().detach())
    assert count(lambda: output.sum().backward())[0] == 2 * T * B * G * H * (I + 2 * H)
    layer.requires_grad_(False)
    output, _ = layer(an_input())
    assert count(lambda: output.sum().backward())[0] == 2 * T * B * G * H * (I + H)


@pytest.mark.parametrize("cell", CELLS)
def test_flops_of_sequences_of_different_length(cell):
    layer, x = layer_of(cell, backend="numba"), an_input()
    lengths = torch.tensor([3, T, 0, 5, 1])
    rows = int(lengths.sum())
    found, (output, _) = count(lambda: layer(x, lengths=lengths))
    assert found == products(cell, rows)
    assert count(lambda: output.sum().backward())[0] == 2 * products(cell, rows)
    packed = pack_padded_sequence(x, lengths.clamp(min=1), enforce_sorted=False)
    assert count(lambda: layer(packed))[0] == products(cell, rows + 1)


@pytest.mark.parametrize("cell", CELLS)
def test_flops_of_a_layer_as_torch_counts_its_loops(cell):
    """Its composite operations count by themselves, and make no gradient for the state before the
    first step; oneDNN's LSTM makes all."""
    theirs, x = getattr(nn, cell)(I, H), an_input()
    found, (output, _) = count(lambda: theirs(x))
    ours = layer_of(cell, backend="numba")
    assert found == count(lambda: ours(x))[0]
    ours_backward = count(lambda: ours(x)[0].sum().backward())[0] - found
    onednn = cell == "LSTM" and torch.backends.mkldnn.is_available()
    spared = 0 if onednn else 2 * B * CELLS[cell] * H * H
    assert count(lambda: output.sum().backward())[0] == ours_backward - spared


def test_flops_stand_under_the_module_they_belong_to():
    model = nn.ModuleDict({"body": layer_of("GRU", backend="numba"), "head": nn.Linear(H, 2)})

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = model["body"], model["head"]

        def forward(self, x):
            return self.head(self.body(x)[0])

    with FlopCounterMode(display=False) as counter:
        Model()(an_input())
    counts = counter.get_flop_counts()
    assert sum(counts["Model.body"].values()) == products("GRU", T * B)
    assert sum(counts["Model.head"].values()) == 2 * T * B * H * 2


def test_flops_without_numbers():
    """Shapes are enough: a model is counted before it has memory."""
    with torch.device("meta"):
        layer, x = layer_of("LSTM"), torch.empty(T, B, I)
    assert count(lambda: layer(x))[0] == products("LSTM", T * B)


# --- profiler


@pytest.mark.parametrize("cell", CELLS)
def test_a_profile_names_cell_and_backend(cell):
    layer, x = layer_of(cell, backend="numba"), an_input()
    with torch.profiler.profile() as profile:
        layer(x)[0].sum().backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    name = {"RNN": "rnn_tanh"}.get(cell, cell.lower())
    assert calls[f"fastseq::{name} numba"] == 1
    assert calls[f"fastseq::{name} backward numba"] == 1
    assert calls["fastseq::recurrence"] == calls["fastseq::recurrence_backward"] == 1


def test_no_range_is_made_without_a_profiler(monkeypatch):
    def fail(name):
        raise AssertionError(name)

    monkeypatch.setattr(torch.autograd.profiler, "record_function", fail)
    layer_of("LSTM", backend="numba")(an_input())[0].sum().backward()


# --- what autograd keeps


@pytest.mark.parametrize("use_reentrant", [False, True])
@on_each_layer
def test_checkpoint(cell, backend, use_reentrant):
    """Bitwise: the second forward is the first again."""
    layer, x = layer_of(cell, backend=backend, num_layers=2), an_input()

    def run(x):
        output, state = layer(x)
        return output, *tensors(state)

    def checkpointed(x):
        output, *state = checkpoint(run, x, use_reentrant=use_reentrant)
        return output, tuple(state)

    expected = gradients(layer, x, layer)
    if not use_reentrant:
        assert_same_bits(gradients(layer, x, checkpointed), expected)
        return
    output, state = checkpointed(x)  # the reentrant form knows backward() alone
    (output.square().mean() + sum(s.sin().sum() for s in state)).backward()
    assert_same_bits([x.grad, *(p.grad for p in layer.parameters())], expected)


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoint_repeats_dropout(cell):
    layer, x = layer_of(cell, num_layers=2, dropout=0.5), an_input()
    torch.manual_seed(3)
    expected = gradients(layer, x, layer)
    torch.manual_seed(3)
    found = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    assert_same_bits(found, expected)


@pytest.mark.parametrize("cell", CELLS)
def test_a_selective_checkpoint_may_keep_the_recurrence(cell):
    """Then its kernel runs once, and what is around it twice."""
    layer, head, x = layer_of(cell, backend="numba"), nn.Linear(H, 4), an_input()

    def policy(context, operator, *args, **kwargs):
        ours = operator is torch.ops.fastseq.recurrence.default
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def run(x):
        return head(layer(x)[0]).tanh()

    leaves = [x, *layer.parameters(), *head.parameters()]
    expected = torch.autograd.grad(run(x).square().sum(), leaves)
    contexts = partial(create_selective_checkpoint_contexts, policy)
    with torch.profiler.profile() as profile:
        y = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
        found = torch.autograd.grad(y.square().sum(), leaves)
    assert_same_bits(found, expected)
    calls = {event.key: event.count for event in profile.key_averages()}
    name = {"RNN": "rnn_tanh"}.get(cell, cell.lower())
    assert calls[f"fastseq::{name} numba"] == 1 and calls["aten::tanh"] > 1


@on_each_layer
def test_second_derivatives_inside_a_checkpoint(cell, backend):
    layer, x = layer_of(cell, backend=backend).double(), an_input().detach().double()
    x.requires_grad_()

    def penalty(run):
        (slope,) = torch.autograd.grad(run(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [x, *layer.parameters()])

    expected = penalty(layer)
    found = penalty(lambda x: checkpoint(layer, x, use_reentrant=False))
    for a, b in zip(found, expected, strict=True):
        check_alike(a, b)


@on_each_layer
def test_save_on_cpu(cell, backend):
    layer, x = layer_of(cell, backend=backend), an_input()
    expected = gradients(layer, x, layer)
    with torch.autograd.graph.save_on_cpu():
        found = gradients(layer, x, layer)
    assert_same_bits(found, expected)


@on_each_layer
def test_saved_tensors_hooks(cell, backend):
    """All that backward reads passes the hooks, and what they give back is what it reads."""
    layer, x = layer_of(cell, backend=backend), an_input()
    expected = gradients(layer, x, layer)
    kept = []

    def pack(tensor):
        kept.append(tensor.detach().clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda k: kept[k]):
        output, state = layer(x)
        loss = output.square().mean() + sum(s.sin().sum() for s in tensors(state))
    assert len(kept) > 4
    assert_same_bits(torch.autograd.grad(loss, [x, *layer.parameters()]), expected)


@pytest.mark.parametrize("cell", CELLS)
def test_hooks_may_forbid_saving(cell):
    layer, x = layer_of(cell, backend="numba"), an_input()
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        layer(x)[0].sum().backward()
    assert x.grad is not None


@on_each_layer
def test_replicas(cell, backend):
    """What DataParallel makes of a module: plain tensors in place of parameters, in threads."""
    layer, x = layer_of(cell, backend=backend), an_input()
    expected = gradients(layer, x, layer)
    replicas = []
    for _ in range(2):
        replica = layer._replicate_for_data_parallel()
        for name, parameter in layer.named_parameters():
            replica._parameters.pop(name, None)
            setattr(replica, name, parameter.view_as(parameter))
        replicas.append(replica)

    def run(x):
        halves = [part.contiguous() for part in x.split([2, B - 2], 1)]
        outputs = [replica(half) for replica, half in zip(replicas, halves, strict=True)]
        states = zip(*(tensors(state) for _, state in outputs), strict=True)
        return torch.cat([y for y, _ in outputs], 1), tuple(torch.cat(s, 1) for s in states)

    for a, b in zip(gradients(layer, x, run), expected, strict=True):
        check_alike(a, b)


def test_data_parallel_on_the_cpu():
    """Without a device it calls the module."""
    layer, x = layer_of("GRU"), an_input()
    assert torch.equal(nn.DataParallel(layer, dim=1)(x)[0], layer(x)[0])


# --- streams


def detached(state):
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


@on_each_layer
def test_a_stream_step_by_step(cell, backend):
    """One step a call with the state carried gives what one call gives, gradients too."""
    layer, x = layer_of(cell, backend=backend, num_layers=2), an_input()

    def step_by_step(x):
        state, outputs = None, []
        for t in range(T):
            output, state = layer(x[t : t + 1], state)
            outputs.append(output)
        return torch.cat(outputs), state

    found, expected = gradients(layer, x, step_by_step), gradients(layer, x, layer)
    for a, b in zip(found, expected, strict=True):
        check_alike(a, b)


@on_each_layer
def test_a_stream_in_windows(cell, backend):
    """Truncated backpropagation: the states go on, gradients stop where they are detached."""
    layer, x = layer_of(cell, backend=backend), an_input(steps=12)
    whole, last = layer(x)
    state, outputs = None, []
    for window in x.split(4):
        output, state = layer(window, None if state is None else detached(state))
        outputs.append(output)
    check_alike(torch.cat(outputs), whole)
    for a, b in zip(tensors(state), tensors(last), strict=True):
        check_alike(a, b)
    (dx,) = torch.autograd.grad(outputs[-1].sum(), x)
    assert not dx[:8].any() and dx[8:].all()


@pytest.mark.parametrize("backend", ["numba", "eager", None])
@pytest.mark.parametrize("cell", CELLS)
def test_a_stream_whose_rows_begin_anew(cell, backend):
    """In the middle of a window one row starts over; the others do not feel it."""
    layer, x = layer_of(cell, backend=backend), an_input()
    _, before = layer(an_input(seed=2))
    before = detached(before)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 1] = reset[0, 4] = True
    output, state = layer(x, before, reset=reset)

    untouched, last = layer(x, before)
    rows = [0, 2, 3]
    check_alike(output[:, rows], untouched[:, rows])
    check_alike(output[:3, 1], untouched[:3, 1])
    anew, end = layer(x[3:, 1:2])
    check_alike(output[3:, 1:2], anew)
    check_alike(output[:, 4:], layer(x[:, 4:])[0])
    for s, e, u in zip(tensors(state), tensors(end), tensors(last), strict=True):
        check_alike(s[:, 1:2], e)
        check_alike(s[:, rows], u[:, rows])
    (dx,) = torch.autograd.grad(output[3:, 1].sum(), x)
    assert not dx[:3].any() and dx[3:, 1].any()


@pytest.mark.parametrize("backend", ["numba", "eager", None])
def test_a_stream_goes_on_from_any_step(backend):
    """The cell state of every step is where another call can begin."""
    layer, x = layer_of("LSTM", backend=backend), an_input()
    output, (h_n, c_n), c = layer(x, all_states=True)
    for t in (0, 3, T - 1):
        assert_same(layer(x[: t + 1])[1], (output[t][None], c[t][None]))
    rest, (h, c_end) = layer(x[4:], (output[3][None], c[3][None]))
    check_alike(rest, output[4:])
    assert_same((h, c_end), (h_n, c_n))
