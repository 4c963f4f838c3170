"""torch.jit.trace and torch.onnx.export(dynamo=False): what a trace takes afterwards."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastseq

I, H = 4, 6  # noqa: E741  (the field's letters)

LAYERS = {
    "lstm": ("LSTM", {}),
    "lstm projected both ways": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "gru batch first": ("GRU", {"batch_first": True, "bias": False}),
    "gru deep": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "rnn": ("RNN", {"bidirectional": True, "nonlinearity": "relu"}),
}
SIZES = (7, 3), (5, 4), (1, 1), (12, 2)


def flat(value):
    if isinstance(value, PackedSequence):
        return [value.data, value.batch_sizes]
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


def ordered(layer, tensor):
    """(T, B, ...) as the layer has it."""
    return tensor.transpose(0, 1) if layer.batch_first else tensor


def states(layer, B):
    count = layer.num_layers * (1 + layer.bidirectional)
    h = torch.randn(count, B, layer.proj_size or H)
    return (h, torch.randn(count, B, H)) if layer.mode == "LSTM" else h


def lengths_of(T, B, empty=False):
    lengths = torch.randint(0 if empty else 1, T + 1, (B,))
    lengths[-1] = T
    return lengths


class Ways(nn.Module):
    """A layer, called in one of the ways that a trace records."""

    def __init__(self, layer, way):
        super().__init__()
        self.layer, self.way = layer, way

    def forward(self, x, *more):
        return getattr(self, self.way)(x, *more)

    def plain(self, x, hx=None):
        return self.layer(x, hx)

    def packed(self, x, lengths, hx=None):
        first = self.layer.batch_first
        rows = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        y, last = self.layer(rows, hx)
        return pad_packed_sequence(y, batch_first=first), last

    def lengths(self, x, lengths, hx=None):
        return self.layer(x, hx, lengths=lengths)

    def reset(self, x, reset, hx=None):
        return self.layer(x, hx, reset=reset)

    def reset_and_lengths(self, x, reset, lengths, hx=None):
        return self.layer(x, hx, reset=reset, lengths=lengths)

    def reset_in_packed(self, x, reset, lengths, hx=None):
        first = self.layer.batch_first
        rows = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        T = rows.batch_sizes.shape[0]
        reset = reset[:, :T] if first else reset[:T]
        y, last = self.layer(rows, hx, reset=reset)
        return y.data, last

    def example(self, T, B, given):
        x = ordered(self.layer, torch.randn(T, B, I))
        reset = ordered(self.layer, torch.rand(T, B) < 0.3)
        more = {
            "plain": [],
            "packed": [lengths_of(T, B)],
            "lengths": [lengths_of(T, B, empty=True)],
            "reset": [reset],
            "reset_and_lengths": [reset, lengths_of(T, B, empty=True)],
            "reset_in_packed": [reset, lengths_of(T, B)],
        }[self.way]
        return [x, *more, *([states(self.layer, B)] if given else [])]


WAYS = ("plain", "packed", "lengths", "reset", "reset_and_lengths", "reset_in_packed")


def trace(module, example, **options):
    """Without a word of sizes that would be baked in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own files torch says nothing, and neither may we
        warnings.filterwarnings("error", category=torch.jit.TracerWarning, module="fastseq")
        return torch.jit.trace(module, tuple(example), **options)


def check_same(found, expected):
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6, check_dtype=False)


CASES = [(name, way, given) for name in LAYERS for way in WAYS for given in (False, True)]


@pytest.mark.parametrize(
    "name, way, given",
    # 7 is prime to the numbers of layers, ways and states: a seventh of the cases has each of them
    [pytest.param(*c, marks=() if k % 7 == 0 else pytest.mark.full) for k, c in enumerate(CASES)],
)
def test_a_trace_serves_every_size(name, way, given):
    kind, options = LAYERS[name]
    module = Ways(getattr(fastseq, kind)(I, H, **options), way)
    traced = trace(module, module.example(7, 3, given))
    for T, B in SIZES:
        example = module.example(T, B, given)
        check_same(traced(*example), module(*example))


def test_no_sequence_is_as_long_as_the_input():
    module = Ways(fastseq.GRU(I, H, bidirectional=True), "reset_and_lengths")
    traced = trace(module, module.example(7, 3, True))
    x, reset, _, hx = module.example(9, 4, True)
    for lengths in ([3, 0, 1, 3], [0, 0, 0, 0]):
        example = x, reset, torch.tensor(lengths), hx
        check_same(traced(*example), module(*example))
    with pytest.raises(RuntimeError):
        traced(x, reset, torch.tensor([3, 10, 1, 3]), hx)
    with pytest.raises(RuntimeError, match="greater than 0"):
        traced(x, reset, torch.tensor([3, -1, 1, 3]), hx)


def test_gradients():
    """Of what is padding, whatever it holds, nothing reaches them."""
    module = Ways(fastseq.LSTM(I, H), "reset_and_lengths")
    traced = trace(module, module.example(7, 3, False))
    x, reset, lengths = module.example(5, 4, False)
    lengths[:2] = torch.tensor([0, 2])
    x[0, 0] = x[2, 1] = float("nan")
    weights = list(module.parameters())
    found, expected = (
        torch.autograd.grad(flat(run(x, reset, lengths))[0].square().sum(), weights)
        for run in (traced, module)
    )
    check_same(found, expected)


class Rest(nn.Module):
    """What a trace records besides: cells, functions, unbatched input, masks of a seed."""

    def __init__(self):
        super().__init__()
        options = {"recurrent_dropout": 0.4, "input_dropout": 0.3, "weight_dropout": 0.2}
        self.masked = fastseq.LSTM(I, H, 2, bidirectional=True, **options)
        self.zoned = fastseq.GRU(I, H, zoneout=0.4)
        self.lean = fastseq.RNN(I, H, memory="lean")
        self.cells = nn.ModuleList([fastseq.LSTMCell(I, H), fastseq.GRUCell(I, H)])

    def forward(self, x, lengths, row_ids, seed, mask):
        found = [self.masked(x, seed=seed), self.lean(x), self.lean(x[:, 0])]
        found += [self.zoned(x, lengths=lengths, row_ids=row_ids, seed=seed)]
        found += [cell(rows) for cell in self.cells for rows in (x[0], x[0, 0])]
        weights = list(self.lean.parameters())
        found += [fastseq.rnn(x, weights), fastseq.rnn(x, weights, h_mask=mask, lengths=lengths)]
        found += [fastseq.lstm(x, self.masked.all_weights[0], all_states=True)]
        return flat(found)

    def example(self, T, B):
        seed, mask = torch.tensor(T), (torch.rand(1, B, H) < 0.5).float()
        return torch.randn(T, B, I), lengths_of(T, B, True), torch.arange(B) + T, seed, mask


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_everything_else_and_what_becomes_of_a_trace():
    """Saved, loaded, frozen and optimized, it serves every size still."""
    module, file = Rest(), io.BytesIO()
    traced = trace(module, module.example(7, 3))
    torch.jit.save(traced, file)

    def loaded():
        return torch.jit.load(io.BytesIO(file.getvalue()))

    frozen = torch.jit.freeze(loaded().eval())
    optimized = torch.jit.optimize_for_inference(loaded().eval())
    for T, B in SIZES[1:]:
        example = module.example(T, B)
        with torch.no_grad():
            expected = module(*example)
            for run in (traced, loaded(), frozen, optimized):
                check_same(run(*example), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "error::torch.jit.TracerWarning:fastseq")
def test_trace_module_records_several_methods():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.cell = fastseq.GRU(I, H), fastseq.GRUCell(I, H)

        def forward(self, x):
            return self.layer(x)[0]

        def step(self, x, h):
            return self.cell(x, h)

    module = Model()
    examples = {"forward": torch.randn(5, 3, I), "step": (torch.randn(3, I), torch.randn(3, H))}
    traced = torch.jit.trace_module(module, examples)
    x, h = torch.randn(8, 2, I), torch.randn(2, H)
    check_same(traced(x), module(x))
    check_same(traced.step(x[0], h), module.step(x[0], h))


@pytest.mark.parametrize("sizes", [(I + 1, 3, H), (I, 2, H), (I, 3, H + 1)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wrong_sizes_are_refused_by_a_trace_as_by_torch(sizes):
    """And by the layer, while it is traced, in its own words."""
    width, B, units = sizes
    wrong, words = (torch.randn(5, 3, width), torch.randn(1, B, units)), set()
    for place in (nn, fastseq):
        traced = trace(place.GRU(I, H), (torch.randn(5, 3, I), torch.randn(1, 3, H)))
        with pytest.raises(RuntimeError) as caught:
            traced(*wrong)
        words.add(str(caught.value).strip().splitlines()[-1])
    assert len(words) == 1
    layer = fastseq.GRU(I, H)
    with pytest.raises(RuntimeError) as traced:
        trace(layer, wrong)
    with pytest.raises(RuntimeError) as told:
        layer(*wrong)
    assert str(traced.value) == str(told.value)


@pytest.mark.parametrize("way", ["packed", "lengths", "reset"])
@pytest.mark.parametrize("name", ["lstm", pytest.param("gru deep", marks=pytest.mark.full)])
@pytest.mark.filterwarnings("ignore", "error:::fastseq")
def test_onnx_by_torchscript(name, way):
    """torch.onnx.export(dynamo=False): one file serves every size."""
    onnxruntime = pytest.importorskip("onnxruntime")
    kind, options = LAYERS[name]
    module = Ways(getattr(fastseq, kind)(I, H, **options), way).eval()
    example, file = module.example(7, 3, False), io.BytesIO()
    names, axes = ["x", "more"], {0: "T", 1: "B"}
    more = axes if way == "reset" else {0: "B"}
    torch.onnx.export(
        module,
        tuple(example),
        file,
        dynamo=False,
        input_names=names,
        dynamic_axes=dict(zip(names, (axes, more), strict=True)),
    )
    session = onnxruntime.InferenceSession(file.getvalue())
    for T, B in SIZES:
        example = module.example(T, B, False)
        if way == "lengths":
            example[1].clamp_(max=max(T - 1, 1))  # no sequence is as long as the input
        given = dict(zip(names, (t.numpy() for t in example), strict=True))
        with torch.no_grad():
            expected = module(*example)
        check_same([torch.from_numpy(y) for y in session.run(None, given)], expected)
