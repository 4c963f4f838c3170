"""torch.compile in one graph, torch.export, and what both ask of the operators."""

import io

import pytest
import torch
from graphs import FromParts, H, I, call_of, compare, layer, plain
from pairwise import covering
from problems import draw
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.export import Dim
from torch.nn.utils.rnn import pack_sequence
from twins import (
    CELLS,
    LAYERS,
    assert_same,
    assert_same_bits,
    compiles_cpp,
    detached,
    state_for,
    tensors,
)

import fastseq
from fastseq.ops.library import make_call

BACKENDS = (
    "eager",
    "aot_eager",
    pytest.param("inductor", marks=[pytest.mark.full, compiles_cpp]),
)

AXES = {
    "kind": LAYERS,
    "form": ("dense", "lengths", "packed", "unsorted"),
    "shape": ("one", "stack", "projected"),
    "state": (False, True),
    "reset": (False, True),
    "all_states": (False, True),
    "batch_first": (False, True),
    "memory": ("full", "lean"),
}


def possible(row):
    only_lstm = row["all_states"] or row["shape"] == "projected"
    return row["kind"] == "LSTM" or not only_lstm


def named(row):
    return "-".join(str(v) if not isinstance(v, bool) else k for k, v in row.items() if v)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_at_several_sizes(row, backend, sizes=((7, 5), (9, 4), (3, 2))):
    """One graph for all sizes, with values and gradients of the layer that is not compiled.

    The first sizes differ from I, H and P: torch takes equal sizes for one symbol.
    """
    module = layer(row)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for k, (T, B) in enumerate(sizes):
        compare(compiled, module, *call_of(row, T, B, seed=k))
        frames.append(counter.frame_count)
    assert frames == frames[:1] * len(sizes)
    # with dynamic=True AOTAutograd makes the first graph twice if it holds a float, as dropout's
    assert frames[0] <= (2 if row["shape"] == "stack" else 1)


@pytest.mark.parametrize("row", covering(AXES, possible), ids=named)
def test_training(row):
    train_at_several_sizes(row, "aot_eager")


@pytest.mark.full
@pytest.mark.parametrize("row", covering(AXES, possible, strength=3), ids=named)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_training_in_every_triple(row, backend):
    train_at_several_sizes(row, backend)


@compiles_cpp
@pytest.mark.full
@pytest.mark.parametrize("row", covering(AXES, possible), ids=named)
def test_training_by_inductor(row):
    train_at_several_sizes(row, "inductor")


def test_packed_with_a_reset_that_is_batch_first():
    """No state and no order tell the batch, only the reset does, in its first dimension."""
    row = plain("GRU", "packed", reset=True, batch_first=True)
    train_at_several_sizes(row, "aot_eager")


@compiles_cpp
def test_inductor():
    """Packed rows; padded ones are in the model below."""
    from torch._inductor import config

    with config.patch(implicit_fallbacks=False):
        train_at_several_sizes(plain("LSTM", "packed"), "inductor")


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, I)
        self.layers = fastseq.LSTM(I, H, 2, dropout=0.5, batch_first=True, backend="numba")
        self.out = nn.Linear(H, 5)

    def forward(self, words, lengths):
        y, (h, _) = self.layers(self.embed(words), lengths=lengths)
        return self.out(torch.relu(y)), h


@compiles_cpp
def test_model_by_inductor():
    """Fused with what stands around it; evaluation, then training, where dropout draws."""
    model = Tagger().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    words, lengths = torch.randint(11, (3, 5)), torch.tensor([2, 0, 5])
    assert_same_bits(compiled(words, lengths), model(words, lengths))
    model.train()
    logits, h = compiled(words, lengths)
    (logits.square().sum() + h.sum()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(logits, compiled(words, lengths)[0])


@pytest.mark.parametrize("kind", LAYERS)
def test_every_length_is_one_graph(kind):
    """No recompilation per T, and no node of the graph per step."""
    module = layer(plain(kind))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T, B in ((2, 2), (3, 5), (17, 4), (300, 2)):
        x = torch.randn(T, B, I)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        compare(compiled, module, (x,), {})
    assert counter.frame_count == 1
    assert counter.op_count < 40


def test_sizes_are_found_dynamic():
    """Without a word of the user's: one graph for the first size, one more for T, one for B."""
    module = layer(plain("GRU"))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T, B in ((5, 3), (6, 3), (9, 4), (2, 2), (50, 7)):
        x = torch.randn(T, B, I)
        assert_same_bits(compiled(x), module(x))
    assert counter.frame_count == 3


def test_same_graph_for_any_lengths():
    """No shape depends on their values."""
    module = layer(plain("GRU", shape="stack"))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    x = torch.randn(5, 3, I)
    compare(compiled, module, (x,), {"lengths": torch.tensor([5, 5, 5])})
    for lengths in ([1, 2, 3], [0, 0, 0], [0, 5, 0], [4, 4, 1]):
        compare(compiled, module, (x,), {"lengths": torch.tensor(lengths)})
    assert counter.frame_count == 1
    compare(compiled, module, (x,), {"lengths": [3, 1, 2]})


def test_unbatched():
    module = layer(plain("LSTM"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, I)
    compare(compiled, module, (x,), {})
    compare(compiled, module, (x, detached(state_for("LSTM", 1, H))), {})


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("backend", [None, "numba"])
def test_cells(kind, backend):
    cell = getattr(fastseq, kind)(I, H, backend=backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cell, fullgraph=True, dynamic=True, backend=counter)
    same = assert_same if backend is None else assert_same_bits  # native is in no graph
    for B in (3, 5, 2):
        compare(compiled, cell, (torch.randn(B, I), detached(state_for(kind, B, H))), {}, same)
    assert counter.frame_count == 1
    compare(compiled, cell, (torch.randn(I),), {}, same)


def test_loop_over_a_cell():
    cell = fastseq.GRUCell(I, H)

    def run(x):
        h = x.new_zeros(x.shape[1], H)
        for step in x.unbind(0):
            h = cell(step, h)
        return h

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 2, I)
    assert_same(compiled(x), run(x))


@pytest.mark.parametrize("form", ["dense", "packed"])
def test_functional(form):
    """The functions, with the mask that only they take."""
    row = plain("GRU", form)
    (given,), keywords = call_of(row, 5, 3)
    module = layer(row)
    h_mask = (torch.rand(1, 3, H) > 0.3).float()

    def run(given, h_mask, **keywords):
        return fastseq.gru(given, module.all_weights[0], h_mask=h_mask, **keywords)

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for mask in (h_mask, None):
        arguments = (given, mask)
        out, expected = compiled(*arguments, **keywords), run(*arguments, **keywords)
        assert_same_bits(out, expected)
        loss, other = (sum(t.square().sum() for t in tensors(o)) for o in (out, expected))
        weights = list(module.parameters())
        assert_same_bits(torch.autograd.grad(loss, weights), torch.autograd.grad(other, weights))


def test_dropout():
    """Between layers, in training, torch's own stream: the same as uncompiled in eager's graph."""
    module = fastseq.GRU(I, H, 2, dropout=0.5, backend="numba")
    x = torch.randn(5, 3, I)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        outputs = []
        for function in (compiled, module):
            torch.manual_seed(3)
            outputs.append(function(x))
        if backend == "eager":
            assert_same_bits(*outputs)
        assert not torch.equal(compiled(x)[0], compiled(x)[0])
        module.eval()
        assert_same_bits(compiled(x), module(x))
        module.train()


@pytest.mark.parametrize("used", ["y", "h", "c", "along"])
def test_unused_outputs(used):
    module = layer(plain("LSTM"))

    def run(x):
        y, (h, c), along = module(x, all_states=True)
        return {"y": y, "h": h, "c": c, "along": along}[used]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, I, requires_grad=True)
    leaves = [x, *module.parameters()]
    found = torch.autograd.grad(compiled(x).square().sum(), leaves)
    expected = torch.autograd.grad(run(x).square().sum(), leaves)
    assert_same_bits(found, expected)


def test_gradient_of_the_input_alone():
    module = layer(plain("GRU")).requires_grad_(False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, I, requires_grad=True)
    (found,) = torch.autograd.grad(compiled(x)[0].sum(), x)
    assert_same_bits(found, torch.autograd.grad(module(x)[0].sum(), x)[0])


def test_inference_saves_nothing():
    module = layer(plain("LSTM"))
    graphs = CompileCounterWithBackend("eager")
    with torch.no_grad():
        x = torch.randn(5, 3, I)
        assert_same_bits(torch.compile(module, fullgraph=True, backend=graphs)(x), module(x))
    (operator,) = [n for n in graphs.graphs[0].graph.nodes if "recurrence" in str(n.target)]
    assert operator.args[-2] is False


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_edited_in_the_graph(kind, backend):
    """Backward reads y and the states; what edits them in the graph must not reach it."""
    module = layer(plain(kind))

    def run(x, double):
        y, state = module(x)
        if double:
            y.mul_(2)
            for s in tensors(state):
                s.mul_(3)
            return y, state
        return y * 2, [s * 3 for s in tensors(state)]

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    x = torch.randn(5, 3, I)
    found, expected = tensors(compiled(x, True)), tensors(run(x, False))
    assert_same_bits(found, expected)
    leaves = list(module.parameters())
    grads = [torch.autograd.grad(sum(t.sum() for t in o), leaves) for o in (found, expected)]
    assert_same_bits(*grads)


@compiles_cpp
def test_outputs_edited_behind_the_graph():
    """As uncompiled, or torch's error; never a wrong gradient.

    Inductor takes out the copy that protects what backward reads.
    """
    module = layer(plain("GRU"))
    x = torch.randn(5, 3, I)
    leaves = list(module.parameters())
    expected = torch.autograd.grad(2 * module(x)[0].sum(), leaves)
    for backend in ("eager", "aot_eager"):
        y = torch.compile(module, fullgraph=True, backend=backend)(x)[0]
        y.mul_(2)
        assert_same_bits(torch.autograd.grad(y.sum(), leaves), expected)
    y = torch.compile(module, fullgraph=True)(x)[0]
    y.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", [*LAYERS, "LSTMCell"])
@pytest.mark.parametrize("inside", [True, False])
def test_autocast(kind, inside):
    module = getattr(fastseq, kind)(I, H, backend="numba")
    x = torch.randn(3, I) if kind in CELLS else torch.randn(5, 3, I)

    def run(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    if inside:
        out = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    else:
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = compiled(x)
    expected = run(x)
    assert {t.dtype for t in tensors(out)} == {torch.bfloat16}
    assert_same_bits(out, expected)
    for o in (out, expected):
        sum(t.float().square().sum() for t in tensors(o)).backward()
        if o is out:
            first = [p.grad for p in module.parameters()]
            module.zero_grad()
    for a, p in zip(first, module.parameters(), strict=True):
        assert a.dtype is torch.float32
        assert_same_bits(a, p.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_checked_when_the_graph_runs(backend):
    """What no trace can know would reach a kernel that trusts it."""
    module = layer(plain("GRU"))
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    x = torch.randn(5, 3, I)
    with torch.no_grad():
        compiled(x, lengths=torch.tensor([1, 5, 2]))
        for wrong in ([1, 6, 2], [1, -1, 2]):
            with pytest.raises(RuntimeError, match="lengths: expected values from 0 to T"):
                compiled(x, lengths=torch.tensor(wrong))
        packed = pack_sequence([torch.randn(4, I), torch.randn(2, I)])
        compiled(packed, torch.randn(1, 2, H))
        with pytest.raises(RuntimeError, match="batch_sizes: expected the batch of the states"):
            compiled(packed, torch.randn(1, 3, H))


def test_mistakes_keep_their_words():
    module = layer(plain("GRU"))
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"input\.size\(-1\) must be equal to input_size"):
        compiled(torch.randn(5, 3, I + 1))
    with pytest.raises(Exception, match=r"break a compiled graph\. backend=None always runs"):
        torch.compile(fastseq.GRU(I, H, backend="torch"), fullgraph=True)(torch.randn(5, 3, I))


def test_second_derivatives_are_refused():
    """By torch: no graph of AOTAutograd is differentiated twice."""
    module = layer(plain("GRU"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 3, I, requires_grad=True)
    (dx,) = torch.autograd.grad(compiled(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        dx.sum().backward()


@pytest.mark.filterwarnings(  # Dynamo's, of the code behind a break
    "ignore:Dynamo detected a call to a `functools.lru_cache`",
    "ignore:The .grad attribute of a Tensor that is not a leaf",
)
@pytest.mark.parametrize("kind", LAYERS)
def test_dual_numbers(kind):
    """They break the graph at the layer: in it, tangents would be zero without a word."""
    module = getattr(fastseq, kind)(I, H)
    x = torch.randn(40, 3, I)

    def tangent(function):
        with forward_ad.dual_level():
            y = function(forward_ad.make_dual(x, x.cos()))[0]
            return forward_ad.unpack_dual(y).tangent

    compiled = torch.compile(module, backend="eager")
    compiled(x)  # the graph that is there already is not taken
    assert_same_bits(tangent(compiled), tangent(module))
    assert tangent(module).any()
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"run torch\.func's transforms"):
        tangent(torch.compile(module, backend="eager", fullgraph=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_eager_form(kind):
    """Where no kernel of ours runs: it is unrolled, a graph for each T."""
    module = getattr(fastseq, kind)(I, H, backend="eager")
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for T in (2, 3):
        compare(compiled, module, (torch.randn(T, 3, I),), {})
    assert counter.frame_count == 2


T_, B_ = Dim("T", min=2), Dim("B", min=2)
EXPORTS = {
    "plain": (plain("LSTM"), {"input": {0: T_, 1: B_}}),
    "states": (plain("LSTM", state=True), {"input": {0: T_, 1: B_}, "hx": ({1: B_}, {1: B_})}),
    "projected": (plain("LSTM", shape="projected"), {"input": {0: T_, 1: B_}}),
    "stack": (plain("GRU", shape="stack"), {"input": {0: T_, 1: B_}}),
    "batch first": (plain("RNN", batch_first=True), {"input": {1: T_, 0: B_}}),
    "lengths": (plain("GRU", "lengths"), {"input": {0: T_, 1: B_}, "lengths": {0: B_}}),
    "reset": (
        plain("LSTM", shape="stack", reset=True),
        {"input": {0: T_, 1: B_}, "reset": {0: T_, 1: B_}},
    ),
    "all states": (
        plain("LSTM", all_states=True),
        {"input": {0: T_, 1: B_}, "all_states": None},
    ),
}


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("name", EXPORTS)
def test_export(name, strict):
    """Exported with any T and B, saved, loaded, and run at another size."""
    row, dynamic = EXPORTS[name]
    module = layer(row).eval()
    arguments, keywords = call_of(row, 5, 3)
    program = torch.export.export(
        module, arguments, keywords, dynamic_shapes=dynamic, strict=strict
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for k, (T, B) in enumerate(((9, 7), (2, 2), (33, 4))):
        arguments, keywords = call_of(row, T, B, seed=k)
        with torch.no_grad():
            assert_same_bits(loaded(*arguments, **keywords), module(*arguments, **keywords))
    saves = [n.args[-2] for n in program.graph.nodes if "recurrence" in str(n.target)]
    assert saves and not any(saves)  # inference: nothing is kept for a backward


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("form", ["packed", "unsorted"])
def test_export_of_packed(form, strict):
    row = plain("GRU", form, shape="stack")
    module = FromParts(layer(row)).eval()

    def parts(T, B):
        return tuple(part for part in call_of(row, T, B)[0][0] if part is not None)

    sizes = tuple({0: Dim(name, min=2)} for name in ("N", "T"))
    sizes += ({0: B_}, {0: B_}) if form == "unsorted" else ()
    program = torch.export.export(
        module, parts(5, 3), dynamic_shapes={"parts": sizes}, strict=strict
    )
    for T, B in ((9, 7), (3, 2)):
        with torch.no_grad():
            assert_same_bits(program.module()(*parts(T, B)), module(*parts(T, B)))


def test_exported_program_has_no_gradient():
    """It holds the operator alone, and says so at backward."""
    x = torch.randn(5, 3, I)
    y, _ = torch.export.export(layer(plain("GRU")), (x,)).module()(x)
    assert not y.requires_grad


def test_exported_program_has_no_tangent():
    """An error, never a tangent of zero."""
    x = torch.randn(5, 3, I)
    program = torch.export.export(layer(plain("GRU")).requires_grad_(False), (x,)).module()
    with pytest.raises(NotImplementedError, match="the operator has no forward-mode derivative"):
        torch.func.jvp(lambda x: program(x)[0], (x,), (x.cos(),))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="call the layer itself"):
        program(forward_ad.make_dual(x, x.cos()))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("kind", CELLS)
def test_export_of_cells(kind, strict):
    cell = getattr(fastseq, kind)(I, H)
    program = torch.export.export(
        cell, (torch.randn(3, I),), dynamic_shapes={"input": {0: B_}}, strict=strict
    )
    x = torch.randn(5, I)
    assert_same(program.module()(x), cell(x))


SAMPLES = {
    "lstm": ({"cell": "lstm"}, "full"),
    "two ways": ({"cell": "gru", "directions": 2, "reset": True, "h_mask": True}, "full"),
    "projected": ({"cell": "lstm", "P": 3, "bias": False}, "lean"),
    "zero states": ({"cell": "rnn_tanh", "state": False}, "full"),
    "bfloat16": ({"cell": "gru", "dtype": torch.bfloat16}, "lean"),
}


def operator_arguments(sample, memory, packed):
    """Arguments of both operators, without gradients."""
    layers = draw(**{"dtype": torch.float32, "grad": False} | sample)
    D = layers.directions
    x, batch_sizes = layers.x, None
    reset = None if layers.reset is None else layers.reset.reshape(1, -1).expand(D, -1)
    if packed:
        x, batch_sizes = x.reshape(-1, x.shape[-1])[:13], torch.tensor([3, 3, 3, 3, 1])
        reset = None if reset is None else reset[:, :13]
    weights = [w for ways in layers.weights for w in ways.flat()]
    reverse = [False, True][:D]
    given = (layers.cell, "numba", x, batch_sizes, layers.states, weights, reverse, reset)
    return *given, layers.h_mask, [], [], memory, False


# Not test_autograd_registration: the operators have no autograd formula on purpose. Ours is a
# Function around them (fastseq/ops/autograd.py), which a dispatcher key does not show.
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(("sample", "memory"), SAMPLES.values(), ids=SAMPLES)
def test_opcheck(sample, memory, packed):
    given = operator_arguments(sample, memory, packed)
    trajectory = sample["cell"] == "lstm"
    forward = (*given, True, trajectory)
    operators = torch.ops.fastseq
    checks = CHECKS
    if packed and not sample.get("state", True):
        checks = CHECKS[:1]  # the batch is a value, and opcheck's shapes are all known
    torch.library.opcheck(operators.recurrence.default, forward, test_utils=checks)

    outputs = operators.recurrence(*forward)
    call = make_call(*given[:1], *given[2:])
    states = len(call.definition.states)
    n = 1 + states + (states - 1 if trajectory else 0)
    grads = [torch.randn_like(o) for o in outputs[:n]]
    backward = (
        *given,
        outputs,
        grads[0],
        grads[1 : 1 + states],
        grads[1 + states :],
        trajectory,
        [True, True, True],
    )
    torch.library.opcheck(operators.recurrence_backward.default, backward, test_utils=CHECKS)


def test_every_operator_is_checked():
    """Those of the masks: keep in tests/test_masks.py, and the one that draws, here. Those of
    chains: in tests/test_crf.py."""
    torch.library.opcheck(torch.ops.fastseq.copies.default, ([torch.ones(2)],), test_utils=CHECKS)
    torch.library.opcheck(
        torch.ops.fastseq.draw_seed.default, (torch.ones(2),), test_utils=CHECKS[:2]
    )
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastseq::")}
    checked = {"recurrence", "recurrence_backward", "keep", "draw_seed", "copies"}
    checked |= {"recurrence.unsized", "recurrence_backward.unsized"}  # the same kernels
    checked |= {"crf", "crf_backward", "crf_viterbi", "crf_lengths"}
    assert names == {f"fastseq::{name}" for name in checked}


@pytest.mark.parametrize("form", ["lengths", pytest.param("packed", marks=pytest.mark.full)])
def test_the_eager_form_of_ragged_rows(form):
    """Zoneout runs in it alone: packed rows, whose lengths no graph knows, with reset= and NaN in
    what is padding."""
    module = fastseq.RNN(I, H, bidirectional=True, zoneout=0.3)
    x, seed, reset = torch.randn(4, 3, I), torch.tensor(7), torch.rand(4, 3) < 0.4
    x[3, 0] = x[0, 1] = float("nan")
    keywords = {"lengths": torch.tensor([3, 0, 2]), "reset": reset}
    if form == "packed":
        x = pack_sequence([torch.randn(4, I), torch.randn(3, I), torch.randn(1, I)])
        keywords = {"reset": reset}

    def run(layer):
        y, last = layer(x, seed=seed, **keywords)
        outputs = [y if form == "lengths" else y.data, last]
        total = sum(o.square().sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(total, list(module.parameters()))]

    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled), run(module), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's, of its own tree of arguments
@pytest.mark.parametrize(
    "lengths", [pytest.param(False, marks=pytest.mark.full), True], ids=["dense", "lengths"]
)
def test_what_is_exported_for_others_holds_aten_alone(lengths):
    """For consumers that know no operator of ours: any batch, one number of steps."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cell = fastseq.LSTM(I, H, proj_size=3), fastseq.GRUCell(3, H)

        def forward(self, x, lengths=None):
            y, last = self.layer(x, lengths=lengths)
            return [y, *last, self.cell(y[0])]

    model = Model().eval()
    fastseq.set_options(model, backend="eager")

    def example(B):
        return torch.randn(3, B, I), *([torch.arange(B) % 4] if lengths else [])

    sizes = ({1: Dim.DYNAMIC}, {0: Dim.DYNAMIC} if lengths else None)
    with torch.no_grad():
        program = torch.export.export(model, example(4), dynamic_shapes=sizes[: 1 + lengths])
        for found in (program, program.run_decompositions()):
            operators = [n.target for n in found.graph.nodes if n.op == "call_function"]
            spaces = {o.namespace for o in operators if isinstance(o, torch._ops.OpOverload)}
            assert spaces == {"aten"}
            for B in (4, 2):
                given = example(B)
                assert_same(found.module()(*given), model(*given))


def test_every_operator_has_a_fallback():
    """Inductor knows those that it meets, so that it need not make a fallback unasked."""
    from torch._inductor.lowering import lowerings

    given = operator_arguments({"cell": "lstm"}, "full", packed=False)
    operators = torch.ops.fastseq
    meta = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), given)
    outputs = operators.recurrence(*meta, True, False)
    wanted = [True, True, True]
    given_back = (*meta, outputs, outputs[0], outputs[1:3], [], False, wanted)
    operators.recurrence_backward(*given_back)
    operators.recurrence.unsized(*meta, True, False)
    operators.recurrence_backward.unsized(*given_back)
    ids = torch.empty(2, dtype=torch.int64, device="meta")
    operators.keep(operators.draw_seed(ids), [1], ids, None, 3, 0.5)
    operators.copies([ids])
    e, k, kk = (torch.empty(shape, device="meta") for shape in ((4, 2, 3), (3,), (3, 3)))
    value, u = operators.crf("eager", e, None, k, k, kk, None, True)
    operators.crf_backward("eager", e, None, k, k, kk, None, u, value, True)
    operators.crf_viterbi("eager", e, None, k, k, kk, 1)
    operators.crf_lengths(torch.empty(4, 2, dtype=torch.bool, device="meta"))
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith("fastseq::")}
    for name in names:
        packet, _, overload = name.removeprefix("fastseq::").partition(".")
        operator = getattr(getattr(operators, packet), overload or "default")
        assert operator in lowerings, name


def test_fake_of_packed_rows_without_states():
    """The batch of the outputs is a size that nobody knows."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    given = operator_arguments({"cell": "lstm", "state": False}, "full", packed=True)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, given)
        y, h, c = torch.ops.fastseq.recurrence(*fake, False, False)
    assert tuple(y.shape) == (13, H)
    assert isinstance(h.shape[1], torch.SymInt) and h.shape[1].node.expr == c.shape[1].node.expr
