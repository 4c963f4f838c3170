"""Compiled and exported layers on a GPU: numbers against float64 by the rule, beside cuDNN's as
torch.nn calls it, and how many operators and graphs there are. Without a CUDA device they are
skipped; what can be shown without one is in test_cudnn.py and test_elsewhere.py."""

import copy
import io
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from graphs import FromParts
from layers_of_torch import CASES, CELLS, check_repeats, operators, ragged_call
from problems import cotangents, draw
from rules import check_alike, check_all, check_close
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import LAYERS, state_for

import fastseq
from fastseq.backends import cudnn
from fastseq.backends import torch as backend
from fastseq.backends.cudnn import without_cudnn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings(
        "ignore:TensorFloat32 tensor cores for float32 matrix",
        "ignore:The .grad attribute of a Tensor that is not a leaf",  # Dynamo's, of packed rows
    ),
]

I, H = 20, 40  # noqa: E741
SIZES = ((7, 5), (12, 9), (3, 2))
FORMS = ("dense", "packed", "lengths")
PLACES = (None, "triton", "cuda")
#: cuda's form names its tests, as in test_gpu.py.
each_place = pytest.mark.parametrize("place", PLACES, ids=["None", "triton", "cta"])
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def fresh():
    """No graph of another test, and float32 products that are no TF32."""
    torch._dynamo.reset()
    cudnn_options = torch.backends.cudnn
    # of all of cuDNN: where its layers alone differ, torch.export raises
    before, cudnn_options.allow_tf32 = cudnn_options.allow_tf32, False
    yield
    cudnn_options.allow_tf32 = before
    torch._dynamo.reset()


def trio(kind, dtype=torch.float32, place=None, **options):
    """Ours and torch.nn's on the GPU, and torch.nn's in float64 on the CPU, of the same numbers."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(I, H, **options).to("cuda", dtype)
    ours = getattr(fastseq, kind)(I, H, **options, backend=place).to("cuda", dtype)
    ours.load_state_dict(theirs.state_dict())
    truth = getattr(nn, kind)(I, H, **options).double()
    truth.load_state_dict(theirs.state_dict())
    return ours, theirs, truth


def inputs(kind, T, B, dtype, ways, seed=0):
    """x, the initial states and lengths, on the CPU."""
    torch.manual_seed(seed)
    lengths = torch.randint(1, T + 1, (B,))
    lengths[B // 2] = T
    state = state_for(kind, ways, B, H)
    state = state if isinstance(state, tuple) else (state,)
    return torch.randn(T, B, I).to(dtype), [s.to(dtype) for s in state], lengths


def run(module, call, form, x, states, lengths, training=True):
    """y (padded), final states and gradients, on the CPU. call: the module, or it compiled."""
    weight = module.weight_ih_l0
    there = [t.detach().to(weight).requires_grad_(training) for t in (x, *states)]
    x, state = there[0], tuple(there[1:])
    hx = state if len(state) == 2 else state[0]
    ours = isinstance(module, fastseq.nn.Recurrent)
    if form == "dense":
        y, last = call(x, hx)
    elif form == "lengths" and ours:
        y, last = call(x, hx, lengths=lengths)
    else:
        y, last = call(pack_padded_sequence(x, lengths, enforce_sorted=False), hx)
        y, _ = pad_packed_sequence(y)
    last = last if isinstance(last, tuple) else (last,)
    found = {"y": y} | dict(zip(("h_n", "c_n"), last, strict=False))
    if training:
        names = ["x", "h_0", "c_0"][: len(there)] + [n for n, _ in module.named_parameters()]
        given = cotangents({n: v.cpu() for n, v in found.items()})
        grads = torch.autograd.grad(
            list(found.values()),
            [*there, *module.parameters()],
            [given[n].to(v) for n, v in found.items()],
        )
        found |= {f"d{name}": g for name, g in zip(names, grads, strict=True)}
    return {name: value.detach().cpu() for name, value in found.items()}


def agree(kind, form, place, compiler, dtype=torch.float32, training=True, sizes=SIZES, **options):
    """Numbers by the rule at several sizes; one graph, in which each layer is one operator."""
    ours, theirs, truth = trio(kind, dtype, place, **options)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=counter)
    layers = options.get("num_layers", 1)
    ways = layers * (1 + options.get("bidirectional", False))
    frames = []
    for seed, (T, B) in enumerate(sizes):
        x, states, lengths = inputs(kind, T, B, dtype, ways, seed)
        given = (form, x, states, lengths, training)
        with torch.set_grad_enabled(training):
            mine = run(ours, compiled, *given)
            other = run(theirs, theirs, *given)
            exact = run(truth, truth, form, x.double(), [s.double() for s in states], *given[3:])
        check_all(mine, other, exact, dtype, f"{kind} {form} {place} T={T} B={B}")
        frames.append(counter.frame_count)
    assert frames == frames[:1] * len(sizes) and frames[0] <= (1 if layers == 1 else 2)
    assert {operators(graph) for graph in counter.graphs} == {layers}
    return counter


@pytest.mark.parametrize("form", FORMS)
@each_place
@pytest.mark.parametrize("kind", LAYERS)
def test_training(kind, place, form):
    agree(kind, form, place, "aot_eager", num_layers=2, bidirectional=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_place
def test_types(place, dtype):
    if (place, dtype) == ("cuda", torch.float64):
        module = fastseq.LSTM(I, H, dtype=dtype, device="cuda", backend="cuda")
        with pytest.raises(NotImplementedError, match="not float64; choose triton"):
            module(torch.zeros(3, 2, I, dtype=dtype, device="cuda"))
        return
    agree("LSTM", "lengths", place, "aot_eager", dtype)


@pytest.mark.compiles
@pytest.mark.parametrize("form", FORMS)
@each_place
def test_inductor(place, form):
    agree("GRU", form, place, "inductor", torch.bfloat16, sizes=SIZES[:2])


@each_place
def test_inference(place):
    """Nothing is kept for a backward."""
    counter = agree("LSTM", "dense", place, "eager", training=False)
    (graph,) = counter.graphs
    (node,) = [n for n in graph.graph.nodes if "recurrence" in str(n.target)]
    assert node.args[1] == (place or "torch") and node.args[-2] is False


def test_projection():
    for place in (None, "triton"):
        ours, theirs, truth = trio("LSTM", place=place, proj_size=10, bidirectional=True)
        compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend="aot_eager")
        x, (h, c), lengths = inputs("LSTM", 7, 5, torch.float32, 2)
        given = (x, [h[..., :10].contiguous(), c], lengths)
        mine, other = (run(m, f, "packed", *given) for m, f in ((ours, compiled), (theirs, theirs)))
        exact = run(truth, truth, "packed", x.double(), [s.double() for s in given[1]], lengths)
        check_all(mine, other, exact, torch.float32, f"projected {place}")


@pytest.mark.parametrize("training", [False, True])
@each_place
def test_reduce_overhead(place, training):
    """A CUDA graph records what is compiled, but for training on cuDNN, whose reserve has a size
    that only cuDNN knows."""
    counters.clear()
    ours, theirs, truth = trio("LSTM", place=place)
    compiled = torch.compile(ours, fullgraph=True, mode="reduce-overhead")
    for seed in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x, states, lengths = inputs("LSTM", 7, 5, torch.float32, 1, seed)
        given = ("dense", x, states, lengths, training)
        with torch.set_grad_enabled(training):
            mine, other = run(ours, compiled, *given), run(theirs, theirs, *given)
            exact = run(truth, truth, "dense", x.double(), [s.double() for s in states], *given[3:])
        check_all(mine, other, exact, torch.float32, f"reduce-overhead {place} {seed}")
    if place is not None or not training:
        assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("form", FORMS)
@each_place
def test_export(place, form):
    """Exported with any T, B and lengths, saved, loaded, and run at other sizes."""
    ours, theirs, truth = trio("GRU", place=place, num_layers=2, bidirectional=True)
    T, B, N = (Dim(name, min=2) for name in "TBN")

    def arguments(x, lengths):
        if form == "packed":
            return tuple(t for t in pack_padded_sequence(x, lengths, enforce_sorted=False))
        return (x,)

    x, _, lengths = inputs("GRU", 7, 5, torch.float32, 4)
    dynamic = {
        "dense": {"input": {0: T, 1: B}},
        "lengths": {"input": {0: T, 1: B}, "lengths": {0: B}},
        "packed": {"parts": ({0: N}, {0: T}, {0: B}, {0: B})},
    }[form]
    keywords = {"lengths": lengths} if form == "lengths" else {}
    program = torch.export.export(
        FromParts(ours) if form == "packed" else ours,
        arguments(x.cuda(), lengths),
        keywords,
        dynamic_shapes=dynamic,
    )
    nodes = [n for n in program.graph.nodes if "recurrence" in str(n.target)]
    assert [n.args[1] for n in nodes] == [place or "torch"] * 2
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for seed, (T, B) in enumerate(SIZES):
        x, _, lengths = inputs("GRU", T, B, torch.float32, 4, seed)
        keywords = {"lengths": lengths} if form == "lengths" else {}
        with torch.no_grad():
            y, h_n = loaded(*arguments(x.cuda(), lengths), **keywords)
            if form == "packed":
                _, *parts = pack_padded_sequence(x, lengths, enforce_sorted=False)
                y, _ = pad_packed_sequence(PackedSequence(y.cpu(), *parts))
            start = [torch.zeros(4, B, H)]
            other = run(theirs, theirs, form, x, start, lengths, False)
            wide = (x.double(), [s.double() for s in start])
            exact = run(truth, truth, form, *wide, lengths, False)
        mine = {"y": y.cpu(), "h_n": h_n.cpu()}
        check_all(mine, other, exact, torch.float32, f"exported {place} {form} T={T} B={B}")


def on_gpu(case):
    """The same layers on the device, as new leaves."""

    def move(tensor):
        return None if tensor is None else tensor.detach().cuda().requires_grad_()

    return replace(
        case,
        x=move(case.x),
        states=[move(s) for s in case.states],
        weights=[w.map(move) for w in case.weights],
    )


def gradients(outputs, leaves):
    given = cotangents({name: value.cpu() for name, value in outputs.items()})
    found = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        [given[name].to(value) for name, value in outputs.items()],
    )
    return {f"d{name}": g for name, g in zip(leaves, found, strict=True)}


@pytest.mark.parametrize("serves", [True, False], ids=["cudnn", "loop"])
@pytest.mark.parametrize("name", [*CASES, "projected"])
@pytest.mark.parametrize("cell", CELLS)
def test_the_layer_itself(cell, name, serves, monkeypatch):
    """What the operator runs, without a graph; err(torch) is that of cuDNN as torch.nn calls it,
    and without cuDNN the independent writing's, on the CPU."""
    if name == "projected" and cell != "lstm":
        pytest.skip("torch projects an LSTM alone")
    options = CASES.get(name, {"P": 2, "bias": False, "directions": 2, "lengths": [2, 0, 5]})
    dtypes = DTYPES if serves else DTYPES[:1]
    for dtype in dtypes:
        case = draw(cell, dtype=dtype, **options)
        wide, same, here = case.to(torch.float64), case.to(dtype), on_gpu(case)
        exact, theirs = wide.independent(), here.run("torch") if serves else same.independent()
        exact |= gradients(exact, wide.leaves())
        theirs |= gradients(theirs, (here if serves else same).leaves())
        with monkeypatch.context() as patched:
            patched.setattr(backend, "stacks", lambda task: False)
            with nullcontext() if serves else without_cudnn():
                ours = here.run("torch")
                ours |= gradients(ours, here.leaves())
        ours, theirs = ({k: v.cpu() for k, v in found.items()} for found in (ours, theirs))
        check_all(ours, theirs, exact, dtype, f"{cell} {name} {dtype}")


@pytest.mark.parametrize("cell", CELLS)
def test_a_call_changes_nothing_and_repeats_its_bits(cell):
    call = ragged_call(cell)
    call.x = call.x.cuda()
    call.states = [s.cuda() for s in call.states]
    call.weights = [w.map(torch.Tensor.cuda) for w in call.weights]
    check_repeats(call)


def test_cudnn_runs_where_torch_takes_it():
    """The loop has no reserve."""
    x, state = torch.randn(5, 3, 4, device="cuda"), torch.zeros(1, 3, 6, device="cuda")
    weights = [torch.randn(18, n, device="cuda") for n in (4, 6)] + [None] * 3
    arguments = (
        "gru",
        "torch",
        x,
        None,
        [state],
        weights,
        [False],
        None,
        None,
        [],
        [],
        "full",
        False,
    )
    *_, reserve = torch.ops.fastseq.recurrence(*arguments, True, False)
    assert bool(reserve.numel()) == cudnn.serves(x, 5) == torch.cudnn_is_acceptable(x)
    with without_cudnn():
        *_, reserve = torch.ops.fastseq.recurrence(*arguments, True, False)
    assert not reserve.numel()


def test_no_warning_of_weights_that_lie_apart():
    """torch's, at each call of a layer whose weights are not one buffer."""
    module = fastseq.LSTM(I, H, device="cuda")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, I, device="cuda")
    compiled(x)[0].sum().backward()
    addresses = [p.data_ptr() for p in module.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled(x)[0].sum().backward()
    assert addresses == [p.data_ptr() for p in module.parameters()]


def test_backward_in_evaluation():
    module = fastseq.GRU(I, H, device="cuda", dtype=torch.float64).eval()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, I, device="cuda", dtype=torch.float64)
    found = torch.autograd.grad(compiled(x)[0].sum(), list(module.parameters()))
    with without_cudnn():
        expected = torch.autograd.grad(module(x)[0].sum(), list(module.parameters()))
    for a, b in zip(found, expected, strict=True):
        check_alike(a, b)


def test_training_without_cudnn():
    """torch's loop runs again in backward, within autograd's own thread of the device."""
    with without_cudnn():
        agree("LSTM", "lengths", None, "aot_eager", bidirectional=True)


def test_more_steps_than_cudnn_takes():
    module = fastseq.GRU(4, 6, device="cuda", dtype=torch.float64)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    x = torch.randn(65_537, 2, 4, device="cuda", dtype=torch.float64)
    with torch.no_grad():
        whole, last = compiled(x)
        first, state = compiled(x[:40_000])
        second, final = compiled(x[40_000:], state)
    check_alike(whole, torch.cat([first, second]))
    check_alike(last, final)
    assert torch.backends.cudnn.enabled


@each_place
def test_autocast(place):
    module = fastseq.LSTM(I, H, device="cuda", backend=place)

    def forward(x):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return module(x)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, I, device="cuda")
    y, (h, c) = compiled(x)
    assert {t.dtype for t in (y, h, c)} == {torch.bfloat16}
    expected = forward(x)[0]
    check_alike(y, expected)
    y.float().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype is p.dtype for p in module.parameters())


@pytest.mark.parametrize("place", ["triton", "cuda"], ids=["triton", "cta"])
@pytest.mark.parametrize("feature", ["reset", "all_states", "memory"])
def test_what_torch_does_not_run(feature, place):
    """Kernels of ours, where they are named, are one operator too."""
    memory = "lean" if feature == "memory" else "full"
    double = {"device": "cuda", "dtype": torch.float64 if place == "triton" else torch.float32}
    module = fastseq.LSTM(I, H, memory=memory, backend=place, **double)
    wide = copy.deepcopy(module).double()
    wide.fastseq.backend = "eager"
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    for T, B in SIZES:
        keywords = {}
        if feature == "reset":
            keywords["reset"] = torch.rand(T, B, device="cuda") < 0.3
        if feature == "all_states":
            keywords["all_states"] = True
        x = torch.randn(T, B, I, **double)
        y = compiled(x, **keywords)[0]
        module.fastseq.backend = "eager"
        theirs, exact = module(x, **keywords)[0], wide(x.double(), **keywords)[0]
        check_close(y.cpu(), theirs.cpu(), exact.cpu(), x.dtype, f"{feature} {place}")
        module.fastseq.backend = place
        y.sum().backward()
    assert {operators(graph) for graph in counter.graphs} == {1}
