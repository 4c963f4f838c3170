"""torch's GPU layer behind the contract, on the CPU: cuDNN's calls by a stand-in, and torch's loop;
alone, and as one operator of a compiled graph. Numbers on a device: test_gpu_compile.py."""

import contextlib

import pytest
import torch
from graphs import call_of, compare, plain
from layers_of_torch import CASES, CELLS, check_repeats, flat, operators, ragged_call
from problems import against_the_independent, draw, full, gradients
from rules import check_all, poisoned, same_bits
from standins import cudnn_on_cpu
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from twins import assert_same, compiles_cpp

import fastseq
from fastseq.backends import choice, cudnn, layout
from fastseq.backends import torch as backend
from fastseq.backends.contract import NOTHING, Call, OutputGradients, Request, Wanted
from fastseq.ops import library

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]


@pytest.fixture(params=["cudnn", "loop"])
def way(request, monkeypatch):
    """torch's layers on the CPU go the way that they go on a GPU, on cuDNN or without it; what
    cuDNN was asked for, or None."""
    torch._dynamo.reset()
    choice.judge.cache_clear()
    supports = backend.supports
    monkeypatch.setattr(
        backend, "supports", lambda problem: supports(problem._replace(device="cuda"))
    )
    monkeypatch.setattr(backend, "stacks", lambda problem: False)
    monkeypatch.setattr(layout, "on_onednn", lambda call: False)
    with contextlib.ExitStack() as stack:
        if request.param == "cudnn":
            monkeypatch.setattr(cudnn, "serves", lambda x, steps: True)
            yield stack.enter_context(cudnn_on_cpu()).calls
        else:
            yield None
    choice.judge.cache_clear()
    cudnn._places.cache_clear()
    torch._dynamo.reset()


def in_turn(cases):
    """Each cell with each case; the type goes round."""
    found = []
    for k, cell in enumerate(CELLS):
        for place, name in enumerate(cases):
            dtype = DTYPES[(k + place) % len(DTYPES)]
            found.append(pytest.param(cell, name, dtype, id=f"{cell}-{name}-{str(dtype)[6:]}"))
    return found


@pytest.mark.parametrize("cell, name, dtype", in_turn(CASES))
def test_against_the_independent(cell, name, dtype, way):
    against_the_independent(draw(cell, dtype=dtype, **CASES[name]), "torch", name)


@pytest.mark.parametrize("lengths", [None, [2, 0, 5]], ids=["dense", "ragged"])
@pytest.mark.parametrize("bias", [True, False], ids=["biased", "bare"])
@pytest.mark.parametrize("P", [2, 6, 9])
def test_projection(P, bias, lengths, way):
    """To fewer features, and to as many and to more, which torch's layers do not take."""
    case = draw("lstm", P=P, bias=bias, directions=2, lengths=lengths)
    truth, ours = case.independent(), _run(case)
    truth |= gradients(truth, case.leaves())
    ours |= gradients(ours, case.leaves())
    check_all(ours, None, truth, torch.float64)


def _run(case):
    """By the torch backend, which in eager code declines to project to H features or more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "supports", lambda problem: None)
        choice.judge.cache_clear()
        return case.run("torch")


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_asked_for(cell, way):
    """Only some gradients, and a loss on one output alone."""
    for wanted in ("x", "h_0", "w_hh[0]"):
        case = draw(cell, lengths=[2, 3, 0])
        truth = gradients({"h_n": case.independent()["h_n"]}, {wanted: case.leaves()[wanted]})
        for name, leaf in case.leaves().items():
            leaf.requires_grad_(name == wanted)
        ours = gradients({"h_n": case.run("torch")["h_n"]}, {wanted: case.leaves()[wanted]})
        check_all(ours, None, truth, torch.float64)


@pytest.mark.parametrize("cell", CELLS)
def test_a_call_changes_nothing_and_repeats_its_bits(cell, way):
    with poisoned():
        check_repeats(ragged_call(cell))


@pytest.mark.parametrize("sizes", [(0, 0), ()], ids=["steps", "none"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_sequence_has_a_step(cell, sizes, way):
    call = ragged_call(cell, sizes)
    result = backend.forward(call, True, False)
    assert result.y.shape == (8, 12) and not result.y.any()
    assert all(same_bits(a, b) for a, b in zip(result.states, call.states, strict=True))
    ones = [torch.ones_like(s) for s in result.states]
    grads = OutputGradients(torch.ones_like(result.y), [*ones[:-1], None], [])
    found = backend.backward(call, result, grads, Wanted(True, True, True))
    assert all(torch.equal(d, one) for d, one in zip(found.states[:-1], ones, strict=False))
    assert not any(d.any() for d in (found.x, found.states[-1], *flat(found)[1 + len(ones) :]))
    assert found.x.shape == call.x.shape


@pytest.mark.parametrize("T, B", [(0, 3), (4, 0)])
def test_empty(T, B, way):
    case = draw("gru", T=max(T, 1), B=B, grad=False)
    call = Call("gru", case.x[:T], None, case.states, case.weights, (False,))
    result = backend.forward(call, True, False)
    assert result.y.shape == (T, B, 6) and torch.equal(result.states[0], case.states[0])
    grads = OutputGradients(torch.ones_like(result.y), [None], [])
    found = flat(backend.backward(call, result, grads, Wanted(True, True, True)))
    assert [d.shape for d in found] == [call.x.shape, case.states[0].shape] + [
        w.shape for w in case.weights[0].flat() if w is not None
    ]
    assert not any(d.any() for d in found)


def test_more_steps_than_cudnn_takes(way, monkeypatch):
    """cuDNN is switched off for the call that torch would send there, and on again behind it."""
    seen = []
    real = torch._VF.gru

    def gru(*arguments):
        seen.append(torch.backends.cudnn.enabled)
        return real(*arguments)

    monkeypatch.setattr(cudnn, "serves", lambda x, steps: steps <= cudnn._LONGEST)
    monkeypatch.setattr(cudnn, "_LONGEST", 3)
    monkeypatch.setattr(torch._VF, "gru", gru, raising=False)
    against_the_independent(draw("gru", T=4), "torch", "long")
    assert seen and not any(seen[:2])
    assert torch.backends.cudnn.enabled


def test_where_cudnn_serves(monkeypatch):
    """As torch decides, but for the length, which torch does not look at."""
    monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda x: x.numel() > 0)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    for dtype in DTYPES:
        assert cudnn.serves(torch.ones(2, dtype=dtype), 65535)
    assert not cudnn.serves(torch.ones(2), 65536)
    assert not cudnn.serves(torch.ones(0), 1)
    assert not cudnn.serves(torch.ones(2, dtype=torch.int8), 1)
    sixteen = torch.ones(2, dtype=torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not cudnn.serves(sixteen, 1) and cudnn.serves(sixteen.half(), 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    assert not cudnn.serves(sixteen, 1)


def test_without_cudnn_none_is_asked():
    assert not cudnn.serves(torch.ones(2), 1)


def layer_of(row, **options):
    shape = row["shape"]
    if shape == "stack":
        options |= {"num_layers": 2, "bidirectional": True}
    if shape == "projected":
        options |= {"proj_size": 3}
    options |= {"batch_first": row["batch_first"]}
    return getattr(fastseq, row["kind"])(4, 6, backend="torch", **options)


ROWS = {
    "dense": plain("LSTM", state=True),
    "lengths": plain("RNN", "lengths", state=True),
    "packed": plain("GRU", "packed", shape="stack"),
    "stack": plain("GRU", shape="stack", batch_first=True),
    "projected": plain("LSTM", "lengths", shape="projected"),
    "unsorted": plain("LSTM", "unsorted", state=True),
}


def in_part(ordinary):
    """Each row both ways; those that are not in ``ordinary`` are marked full."""
    every = [(name, way) for name in ROWS for way in ("cudnn", "loop")]
    return [pytest.param(*row, marks=() if row in ordinary else full) for row in every]


def train(name, compiler, sizes=((7, 5), (9, 4), (3, 2)), training=True):
    """Values and gradients as uncompiled; one graph for all sizes, in which each layer is one
    operator."""
    row = ROWS[name]
    module = layer_of(row).train(training)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for k, (T, B) in enumerate(sizes):
        compare(compiled, module, *call_of(row, T, B, seed=k))
        frames.append(counter.frame_count)
    stacked = row["shape"] == "stack"
    # AOTAutograd makes the first graph twice where it holds a float, the rate of dropout
    assert frames == frames[:1] * len(sizes) and frames[0] <= 1 + stacked
    assert {operators(graph) for graph in counter.graphs} == {1 + stacked}


@pytest.mark.parametrize(
    "name, way",
    in_part([("dense", "cudnn"), ("packed", "cudnn"), ("lengths", "loop")]),
    indirect=["way"],
)
def test_compiled(name, way):
    """Forward and training, for every T, B and length."""
    train(name, "aot_eager")


@compiles_cpp
@full
@pytest.mark.parametrize("name", ROWS)
def test_compiled_by_inductor(name, way):
    """The reserve goes from one graph to the other with a size that neither knows."""
    train(name, "inductor")


@compiles_cpp
@pytest.mark.parametrize("way", ["cudnn"], indirect=True)
def test_inductor(way):
    train("dense", "inductor", sizes=((7, 5), (3, 2)))


def test_backward_in_evaluation(way):
    """cuDNN refuses it of a layer that ran in evaluation."""
    train("dense", "aot_eager", sizes=((7, 5),), training=False)
    assert way in (None, ["training", "backward"] * 2)


@pytest.mark.parametrize("device, expected", [("meta", True), ("cpu", False)])
def test_the_layer_keeps_what_backward_wants_in_evaluation(device, expected, monkeypatch):
    """torch.nn's cuDNN layer keeps it in training alone, and its backward raises after eval()."""
    asked = []

    def gru(x, hx, weights, biased, layers, dropout, training, both, first):
        asked.append(training)
        return x, hx

    monkeypatch.setattr(torch._VF, "gru", gru, raising=False)
    x = torch.zeros(3, 2, 4, device=device)
    weights = [w.to(device) for w in torch.nn.GRU(4, 5)._flat_weights]
    states = [torch.zeros(1, 2, 5, device=device)]
    backend.layers(Request("gru"), x, None, states, weights, NOTHING, False)
    backend.layers(Request("gru", training=True), x, None, states, weights, NOTHING, False)
    with torch.no_grad():
        backend.layers(Request("gru"), x, None, states, weights, NOTHING, False)
    assert asked == [expected, True, False]


def test_what_trains_on_cudnn_stays_out_of_cuda_graphs():
    """inductor takes an operator with this tag, and what it returns, into none."""
    layout = library.Layout("gru", "torch", (False,), "full", False, False, 0, 5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        here, there = torch.empty(3, 2, 4), torch.empty(3, 2, 4, device="cuda")
    for packet in (torch.ops.fastseq.recurrence, torch.ops.fastseq.recurrence_backward):
        chosen = library.overload(packet, layout, there)
        assert torch.Tag.cudagraph_unsafe in chosen.tags
        for other, x in (
            (layout._replace(save=False), there),
            (layout._replace(backend="triton"), there),
            (layout, here),
        ):
            assert torch.Tag.cudagraph_unsafe not in library.overload(packet, other, x).tags
        names = [argument.name for argument in packet.default._schema.arguments]
        assert [argument.name for argument in chosen._schema.arguments] == names


def test_a_graph_that_holds_a_backward(way):
    """As compiled autograd makes them: where it runs, torch's own autograd is off."""
    call = ragged_call("lstm")
    weights = [w for ws in call.weights for w in ws.flat()]
    layer = ("lstm", "torch", call.x, call.batch_sizes, call.states, weights, [False, True])
    layer = (*layer, None, None, [], [], "full", False)
    outputs = torch.ops.fastseq.recurrence(*layer, True, False)
    dy = torch.ones_like(outputs[0])

    def gradients(outputs, dy):
        given = (outputs, dy, [None, None], [], False, [True, True, True])
        return torch.ops.fastseq.recurrence_backward(*layer, *given)

    compiled = torch.compile(gradients, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(outputs, dy), gradients(outputs, dy))


def test_the_operator_has_no_gradient(way):
    """As an exported program holds it: torch's functions in it are not followed."""
    call = ragged_call("gru", (3, 2, 1))
    weights = [w.requires_grad_() if w is not None else w for w in call.weights[0].flat()]
    states = [call.states[0][:1, :3]]
    found = torch.ops.fastseq.recurrence(
        "gru", "torch", call.x, call.batch_sizes, states, weights, [False], None, None, [], [],
        "full", False, False, False,
    )  # fmt: skip
    assert not any(t.requires_grad for t in found)
    assert way in (None, ["inference"])


def test_inference_keeps_nothing(way):
    row = ROWS["dense"]
    module = layer_of(row)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    with torch.inference_mode():
        arguments, keywords = call_of(row, 5, 3)
        assert_same(compiled(*arguments, **keywords), module(*arguments, **keywords))
    (node,) = [n for n in counter.graphs[0].graph.nodes if "recurrence" in str(n.target)]
    assert node.args[1] == "torch" and node.args[-2] is False


def test_trained_by_a_step(way):
    """What an optimizer writes to the weights is what the next call reads."""
    module = fastseq.GRU(4, 6, backend="torch")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.SGD(module.parameters(), 0.5)
    x = torch.randn(5, 3, 4)
    for _ in range(2):
        optimizer.zero_grad()
        compiled(x)[0].square().sum().backward()
        optimizer.step()
        assert_same(compiled(x), module(x))


def test_exported_and_run_on_the_cpu():
    """A program for a GPU whose parameters were moved: torch's loop runs it."""
    module = fastseq.GRU(4, 6, 2, bidirectional=True)
    x = torch.randn(5, 3, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "supports", lambda problem: None)
        choice.judge.cache_clear()
        module.fastseq.backend = "torch"
        program = torch.export.export(module, (x,))
    choice.judge.cache_clear()
    assert [n.args[1] for n in program.graph.nodes if "recurrence" in str(n.target)] == [
        "torch"
    ] * 2
    assert_same(program.module()(x), module(x))
