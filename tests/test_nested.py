"""Jagged NestedTensors in and out: what ``lengths=`` computes, at the cost of the tokens."""

from itertools import pairwise

import pytest
import torch
from rules import check_alike
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from twins import compiles_cpp, needs

import fastseq
from fastseq.nn.explain import explain

I, H = 4, 6  # noqa: E741  (the field's letters)
LENGTHS = ([3, 0, 5, 1], [0, 0], [2], [4, 4, 4], [1, 6, 2])
BACKENDS = (None, "eager", "torch", "numba", "native")


def nested(lengths, seed=0, dtype=torch.float64, width=I):
    random = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    values = torch.randn(sum(lengths), width, generator=random, dtype=torch.float64).to(dtype)
    return torch.nested.nested_tensor_from_jagged(values.requires_grad_(), offsets), values


def make(kind, backend=None, dtype=torch.float64, **options):
    needs(backend)
    torch.manual_seed(0)
    return getattr(fastseq, kind)(I, H, batch_first=True, dtype=dtype, backend=backend, **options)


def flat(state):
    return list(state) if isinstance(state, tuple) else [state]


def state_for(layer, batch, seed=1):
    random = torch.Generator().manual_seed(seed)
    count = layer.num_layers * (1 + layer.bidirectional)
    sizes = [layer.proj_size or H, H] if layer._fastseq_cell == "lstm" else [H]
    found = tuple(
        torch.randn(count, batch, size, generator=random, dtype=torch.float64).requires_grad_()
        for size in sizes
    )
    return found if len(found) > 1 else found[0]


def padded(nt):
    """(B, T, ...), and differentiable."""
    values, offsets = nt.values(), nt.offsets()
    rows = [values[a:b] for a, b in pairwise(offsets.tolist())]
    longest = max([1, *(len(r) for r in rows)])
    blank = values.new_zeros(longest, *values.shape[1:])
    return torch.stack([torch.cat([r, blank[len(r) :]]) for r in rows])


def gradients(outputs, leaves):
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=random, dtype=torch.float64) for o in outputs]
    live = [
        k for k, o in enumerate(outputs) if o.requires_grad
    ]  # no step, and a state may be zeros
    return torch.autograd.grad(
        [outputs[k] for k in live],
        leaves,
        [weights[k] for k in live],
        allow_unused=True,
        materialize_grads=True,
    )


def assert_same(mine, theirs):
    for a, b in zip(mine, theirs, strict=True):
        check_alike(a, b)


ROWS = {
    "lstm": ("LSTM", {}),
    "lstm deep": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "lstm projected": ("LSTM", {"proj_size": 3, "bidirectional": True}),
    "gru": ("GRU", {"bidirectional": True}),
    "gru deep": ("GRU", {"num_layers": 2}),
    "rnn": ("RNN", {"num_layers": 2, "bidirectional": True}),
}


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("stateful", [False, True], ids=["zero state", "state"])
def test_it_is_what_lengths_gives(row, backend, lengths, stateful):
    """Output, final states and every gradient, against the padded form."""
    kind, options = ROWS[row]
    layer = make(kind, backend, **options)
    nt, values = nested(lengths)
    hx = state_for(layer, len(lengths)) if stateful else None
    y, last = layer(nt, hx)
    y_padded, last_padded = layer(padded(nt), hx, lengths=lengths)
    assert y.layout is torch.jagged and y.offsets() is nt.offsets()
    assert_same([padded(y), *flat(last)], [y_padded, *flat(last_padded)])
    leaves = [values, *layer.parameters(), *(flat(hx) if stateful else [])]
    mine = gradients([padded(y), *flat(last)], leaves)
    assert_same(mine, gradients([y_padded, *flat(last_padded)], leaves))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ROWS)
def test_without_gradients(row, backend):
    """Inference may go another way."""
    kind, options = ROWS[row]
    layer = make(kind, backend, **options).eval()
    nt, _ = nested([3, 0, 5, 1])
    with torch.no_grad():
        y, last = layer(nt)
        expected, last_expected = layer(padded(nt), lengths=[3, 0, 5, 1])
    assert_same([padded(y), *flat(last)], [expected, *flat(last_expected)])


@pytest.mark.parametrize("batch_first", [False, True])
def test_batch_first_does_not_apply(batch_first):
    layer = make("GRU")
    layer.batch_first = batch_first
    nt, _ = nested([3, 1, 2])
    layer_first = make("GRU")
    assert torch.equal(layer(nt)[0].values(), layer_first(nt)[0].values())


def test_the_output_adds_to_what_came_in():
    """It has the input's own jagged size, which nested operations compare by identity."""
    nt, _ = nested([3, 0, 2], width=H)
    layer = fastseq.GRU(H, H, dtype=torch.float64)
    residual = layer(nt)[0] + nt
    assert residual.shape == nt.shape and torch.isfinite(residual.values()).all()


@pytest.mark.parametrize("kind", ["LSTM", "SCRN"])
def test_the_output_is_padded_as_the_input_is(kind):
    parts = [torch.randn(n, I) for n in (3, 0, 5, 1)]
    nt = torch.nested.as_nested_tensor(parts, layout=torch.jagged)
    layer = getattr(fastseq, kind)(I, H, **({"context_size": 2} if kind == "SCRN" else {}))
    assert torch.nested.to_padded_tensor(nt, 0.0).shape[:2] == (4, 5)
    assert torch.nested.to_padded_tensor(layer(nt)[0], 0.0).shape[:2] == (4, 5)


def test_the_gradient_reaches_a_nested_leaf():
    xs = [torch.randn(n, I, dtype=torch.float64) for n in (3, 0, 2)]
    nt = torch.nested.nested_tensor(xs, layout=torch.jagged, requires_grad=True)
    make("LSTM")(nt)[0].values().square().sum().backward()
    assert nt.grad.shape == nt.shape and nt.grad.values().any()


def test_all_states():
    layer = make("LSTM", num_layers=2, bidirectional=True)
    nt, values = nested([3, 0, 5])
    y, (h, c), along = layer(nt, all_states=True)
    theirs, (h2, c2), along2 = layer(padded(nt), lengths=[3, 0, 5], all_states=True)
    assert_same([padded(y), h, c, padded(along)], [theirs, h2, c2, along2])
    (gradient,) = torch.autograd.grad(along.values().sum(), values)
    (expected,) = torch.autograd.grad(along2.sum(), values)
    assert_same([gradient], [expected])


def test_the_padding_is_not_computed():
    """One long sequence among empty ones: the product has as many rows as there are tokens."""
    lengths = [40, *[1] * 9]
    nt, _ = nested(lengths)
    layer = make("GRU", "numba")
    with FlopCounterMode(display=False) as counter:
        layer(nt)
    assert counter.get_total_flops() == 2 * sum(lengths) * 3 * H * (I + H)


def test_autocast():
    layer = make("LSTM", dtype=torch.float32)
    nt, _ = nested([3, 0, 2], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, (h, c) = layer(nt)
    assert y.dtype == h.dtype == c.dtype == torch.bfloat16


# torch says these of its own class
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:NestedTensor does not implement _stable_hash:UserWarning")
@compiles_cpp
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_compiled_in_one_graph(kind):
    """Forward and training, any batch, lengths of 0 too; the second graph is for any size."""
    torch._dynamo.reset()
    layer = make(kind, dtype=torch.float32)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for seed, lengths in enumerate(([3, 0, 5], [2, 2], [7, 1, 1, 9], [0, 30])):
        (nt, values), leaves = nested(lengths, seed, torch.float32), list(layer.parameters())
        found = [
            torch.autograd.grad(y.values().square().sum() + flat(last)[0].sum(), [values, *leaves])
            for y, last in (compiled(nt), layer(nt))
        ]
        for mine, theirs in zip(*found, strict=True):
            check_alike(mine, theirs)
    assert counter.frame_count <= 2


def test_explain(capsys):
    nt, _ = nested([30, 2])
    assert explain(make("GRU", "numba"), nt) == "numba"
    assert "T=30 B=2" in capsys.readouterr().out


def mistakes():
    nt, _ = nested([3, 0, 2])
    dense = torch.randn(3, 6, I, dtype=torch.float64)
    starts, sizes = torch.tensor([0, 0, 1]), torch.tensor([2, 3, 4])
    holes = torch.nested.narrow(dense, 1, starts, sizes, layout=torch.jagged)
    flat_jagged = torch.nested.nested_tensor_from_jagged(torch.randn(5), nt.offsets())
    wide, _ = nested([3, 0, 2], width=I + 1)
    single, _ = nested([3, 0, 2], dtype=torch.float32)
    reset = torch.zeros(3, 3, dtype=torch.bool)
    bad_state = torch.zeros(1, 2, H, dtype=torch.float64)
    return {
        "holes": (holes, {}, ValueError, "contiguous"),
        "transposed": (nt.transpose(1, 2), {}, ValueError, "transpose it back"),
        "rank": (flat_jagged, {}, ValueError, "Expected a NestedTensor input to be 3D, got 2D"),
        "features": (wide, {}, RuntimeError, "input.size\\(-1\\) must be equal to input_size"),
        "dtype": (single, {}, ValueError, "RNN input dtype"),
        "lengths": (nt, {"lengths": [3, 0, 2]}, ValueError, "lengths: not taken"),
        "reset": (nt, {"reset": reset}, ValueError, "reset: not taken"),
        "state": (nt, {"hx": bad_state}, RuntimeError, "Expected hidden size \\(1, 3, 6\\)"),
    }


@pytest.mark.parametrize("name", mistakes())
def test_mistakes(name):
    nt, keywords, error, words = mistakes()[name]
    with pytest.raises(error, match=words):
        make("GRU")(nt, **keywords)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_strided_is_refused():
    nt = torch.nested.nested_tensor([torch.randn(2, I)], layout=torch.strided)
    with pytest.raises(TypeError, match=r"layout torch\.jagged, got torch\.strided"):
        make("GRU")(nt)


def test_holes_filled_as_the_error_says():
    dense = torch.randn(2, 6, I, dtype=torch.float64)
    starts, sizes = torch.tensor([1, 0]), torch.tensor([2, 3])
    holes = torch.nested.narrow(dense, 1, starts, sizes, layout=torch.jagged)
    layer = make("GRU")
    y, _ = layer(holes.contiguous())
    assert_same([y.values()[:2]], [layer(dense[:1, 1:3])[0][0]])


def test_the_functions_point_to_the_layers():
    nt, _ = nested([3, 1])
    with pytest.raises(TypeError, match="the layers take"):
        fastseq.gru(nt, make("GRU").all_weights[0])
