"""fastseq's own masks: Philox, what it is asked, and layers that use it, against a plain loop."""

import pickle
from copy import deepcopy
from types import SimpleNamespace

import independent
import pytest
import torch
from rules import check_alike, check_close
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint
from twins import compiles_cpp, needs

import fastseq
from fastseq.backends import choice, load
from fastseq.nn.recurrent import layer_weights
from fastseq.ops import masks

T, B, I, H, P = 6, 4, 5, 7, 3  # noqa: E741  (the field's letters)
SEED = 0x0123456789ABCDEF
WORD = 2**32
BACKENDS = (None, "eager", "numba", "native", "reference")
#: Those that draw masks on the CPU.
DRAWING = [name for name in choice.DRAWING["cpu"] if hasattr(load(name), "keep")]


# --- Philox in Python's own integers


def philox(counter, key):
    """One counter, after the paper: two multiplications and a change of places, ten times."""
    a, b, c, d = counter
    for k in range(10):
        u, v = ((key[i] + k * bump) % WORD for i, bump in ((0, 0x9E3779B9), (1, 0xBB67AE85)))
        high_a, low_a = divmod(a * 0xD2511F53, WORD)
        high_c, low_c = divmod(c * 0xCD9E8D57, WORD)
        a, b, c, d = high_c ^ b ^ u, low_c, high_a ^ d ^ v, low_a
    return a, b, c, d


def kept(kind, layer, direction, row, unit, p, step=0, seed=SEED):
    """Whether a unit is kept: the layout of the counter, a second time."""
    place = kind + 8 * direction + 16 * layer + (row // WORD) % 2**16 * 2**16
    words = philox((unit // 4, row % WORD, place, step), (seed % WORD, seed // WORD % WORD))
    return words[unit % 4] >= p * WORD


def mask(kind, layer, direction, rows, units, p, step=0, seed=SEED):
    """(rows, units) of 0 and 1 / (1 - p)."""
    scale = 0.0 if p == 1 else 1 / (1 - p)
    values = [
        [scale * kept(kind, layer, direction, row, u, p, step, seed) for u in range(units)]
        for row in rows
    ]
    return torch.tensor(values, dtype=torch.float64)


#: The known answers of Random123, the authors' library: counter, key, words.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([WORD - 1] * 4, [WORD - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN)
def test_philox_known_answers(counter, key, words):
    given = [[torch.tensor(v) for v in values] for values in (counter, key)]
    assert [int(w) for w in masks.philox(*given)] == words
    assert list(philox(counter, key)) == words  # and so does the second writing


def test_philox_of_many_counters():
    random = torch.Generator().manual_seed(0)
    counters = torch.randint(WORD, (50, 4), generator=random)
    keys = torch.randint(WORD, (50, 2), generator=random)
    found = torch.stack(masks.philox(counters.unbind(1), keys.unbind(1)), 1)
    expected = [philox(c, k) for c, k in zip(counters.tolist(), keys.tolist(), strict=True)]
    assert found.tolist() == [list(words) for words in expected]


@pytest.mark.parametrize("units", [1, 4, 7])
def test_a_mask_is_what_its_place_says(units):
    """Sites, row ids of up to 48 bits, steps, and a seed with its highest bit set."""
    ids, steps = [3, 0, WORD + 5, 2**48 - 1], [0, 1, 7, 2]
    places = [(0, 0, 0), (1, 3, 1), (4, 4095, 1)]
    for seed in (SEED, -2, 0):
        sites = [masks.site(*place) for place in places]
        tensors = torch.tensor(seed), sites, torch.tensor(ids), torch.tensor(steps)
        found = masks.keep(*tensors, units, 0.3)
        expected = [
            [
                [kept(*place, row, u, 0.3, step, seed % 2**64) for u in range(units)]
                for row, step in zip(ids, steps, strict=True)
            ]
            for place in places
        ]
        assert found.tolist() == expected


def test_the_operator_keeps_torchs_rules():
    ids, steps = torch.arange(3), torch.arange(3)
    torch.library.opcheck(
        torch.ops.fastseq.keep.default, (torch.tensor(SEED), [0, 3], ids, steps, 5, 0.3)
    )
    checks = ("test_schema", "test_faketensor")  # the others compare two draws
    torch.library.opcheck(torch.ops.fastseq.draw_seed.default, (ids,), test_utils=checks)


@pytest.mark.parametrize("steps", [None, torch.arange(1000) % 3], ids=["", "steps"])
def test_large_masks_are_made_in_parts(monkeypatch, steps):
    arguments = torch.tensor(SEED), [1, 2], torch.arange(1000), steps, 9, 2**31
    whole = masks.by_operations(*arguments)
    for at_once in (1, 64, 6000):
        monkeypatch.setattr(masks, "_AT_ONCE", at_once)
        assert torch.equal(masks.by_operations(*arguments), whole)


@pytest.mark.parametrize("units", [1, 7, 64, 300])
@pytest.mark.parametrize("threshold", [0, 1, 2**30, 2**32 - 1, 2**32])
@pytest.mark.parametrize("backend", DRAWING)
def test_a_backend_draws_the_bits_of_torchs_operations(backend, threshold, units):
    ids = torch.tensor([3, 0, WORD + 5, 2**48 - 1]).repeat(20)
    for seed in (torch.tensor(SEED), torch.tensor(-2)):
        for steps in (None, torch.arange(80) * 77):
            arguments = seed, [0, 19, 2**16 - 1], ids, steps, units, threshold
            found = load(backend).keep(*arguments)
            assert found.dtype == torch.bool
            assert torch.equal(found, masks.by_operations(*arguments))


@pytest.mark.parametrize("backend", DRAWING)
def test_a_word_that_is_the_threshold_is_kept(backend):
    words = philox((0, 3, 1, 0), (SEED % WORD, SEED // WORD))
    for unit, word in enumerate(words):
        for threshold in (word, word + 1):
            given = torch.tensor(SEED), [1], torch.tensor([3]), None, 4, threshold
            found = load(backend).keep(*given)[0, 0, unit]
            assert bool(found) == bool(masks.by_operations(*given)[0, 0, unit])
            assert bool(found) == (threshold == word)


@pytest.mark.parametrize("backend", DRAWING)
def test_what_a_backend_does_not_draw(backend):
    """Whatever it declines torch's operations draw."""
    ids = torch.arange(8)
    for odd in (ids[::2], ids.int()[:4], ids[:4].to("meta")):
        found = load(backend).keep(torch.tensor(SEED), [1], odd, None, 5, 2**31)
        assert found is None or torch.equal(
            found, masks.by_operations(torch.tensor(SEED), [1], odd.long(), None, 5, 2**31)
        )
    assert masks.keep(torch.tensor(SEED), [1], ids[::2], None, 5, 0.5).shape == (1, 4, 5)


@pytest.mark.parametrize("through", ["function", "operator", "vmap", "fake"])
def test_who_draws(monkeypatch, through):
    """A backend, of plain tensors alone; the operator's kernel is the same."""
    asked = []
    drawing = SimpleNamespace(keep=lambda *given: asked.append(given))
    monkeypatch.setattr(choice, "draws", lambda device: drawing)
    arguments = torch.tensor(SEED), [0], torch.arange(3), None, 5, 0.3
    if through == "function":
        masks.keep(*arguments)
    elif through == "operator":
        torch.ops.fastseq.keep(*arguments)
    elif through == "vmap":
        torch.func.vmap(lambda seed: masks.keep(seed, *arguments[1:]))(torch.tensor([1, 2]))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True):
            masks.keep(*arguments)
    assert len(asked) == (through in ("function", "operator"))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_rate(p):
    """Within 5 standard deviations of 400,000 draws; 0 keeps all, 1 none."""
    n = 400_000
    found = masks.keep(torch.tensor(SEED), [0], torch.arange(400), None, 1000, p)
    assert abs(int(found.sum()) - n * (1 - p)) <= 5 * (n * p * (1 - p)) ** 0.5


def test_no_two_places_share_a_mask():
    """Kinds, layers, directions, rows, steps and seeds."""
    seen = set()
    for seed in (0, 1, WORD):
        for step in (0, 1):
            sites = [masks.site(k, layer, d) for k in range(5) for layer in (0, 1) for d in (0, 1)]
            steps = torch.full((4,), step)
            ids = torch.tensor([0, 1, WORD, WORD + 1])
            found = masks.keep(torch.tensor(seed), sites, ids, steps, 64, 0.5)
            seen |= {tuple(row) for row in found.flatten(0, 1).tolist()}
    assert len(seen) == 3 * 2 * 20 * 4


# --- Layers against a plain loop

RATES = {
    "recurrent": {"recurrent_dropout": 0.4},
    "input": {"input_dropout": 0.3},
    "weight": {"weight_dropout": 0.5},
    "three": {"recurrent_dropout": 0.4, "input_dropout": 0.3, "weight_dropout": 0.5},
}
CELLS = {
    "lstm": ("LSTM", {}),
    "projected": ("LSTM", {"proj_size": P}),
    "gru": ("GRU", {}),
    "rnn": ("RNN", {}),
}
SHAPES = {
    "one": {},
    "deep": {"num_layers": 2, "bidirectional": True},
}
FORMS = ("dense", "lengths", "packed", "nested", "unbatched")
LENGTHS = {"lengths": [3, 6, 0, 1], "packed": [3, 6, 2, 6], "nested": [3, 6, 0, 1]}
IDS = [11, 2, WORD + 2, 5]


def make(kind, backend=None, dtype=torch.float64, **options):
    needs(backend)
    torch.manual_seed(0)
    return getattr(fastseq, kind)(I, H, dtype=dtype, backend=backend, **options)


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


def inputs(layer, batch=B, dtype=torch.float64):
    """x (T, B, I) and initial states, leaves of a graph."""
    random = torch.Generator().manual_seed(1)

    def leaf(*shape):
        value = torch.randn(shape, generator=random, dtype=torch.float64)
        return value.to(dtype).requires_grad_()

    count = layer.num_layers * (1 + layer.bidirectional)
    states = [leaf(count, batch, layer.proj_size or H)]
    if layer._fastseq_cell == "lstm":
        states.append(leaf(count, batch, H))
    return leaf(T, batch, I), states


def call(layer, form, x, states, row_ids=IDS, **keywords):
    """The layer's output (T, B, ...), zeros behind an end, and its final states."""
    hx = tuple(states) if len(states) > 1 else states[0]
    lengths = LENGTHS.get(form)
    keywords |= {"row_ids": row_ids, "seed": SEED}
    if form == "dense":
        y, last = layer(x, hx, **keywords)
    elif form == "lengths":
        y, last = layer(x, hx, lengths=lengths, **keywords)
    elif form == "packed":
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
        y, last = layer(packed, hx, **keywords)
        y, _ = pad_packed_sequence(y, total_length=T)
    elif form == "nested":
        values = torch.cat([x[:n, b] for b, n in enumerate(lengths)])
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        nt = torch.nested.nested_tensor_from_jagged(values, offsets)
        y, last = layer(nt, hx, **keywords)
        parts = y.values().split(lengths)
        y = torch.stack([torch.cat([p, p.new_zeros(T - len(p), p.shape[1])]) for p in parts], 1)
    else:
        one = tuple(s[:, 0] for s in states) if len(states) > 1 else states[0][:, 0]
        y, last = layer(x[:, 0], one, **keywords | {"row_ids": row_ids[:1]})
        y, last = y.unsqueeze(1), [s.unsqueeze(1) for s in flat(last)]
    return [y, *flat(last)]


def expected(layer, form, x, states, ids=IDS):
    """The same by a loop over layers, directions, sequences and steps."""
    lengths, D = LENGTHS.get(form), 1 + layer.bidirectional
    if form == "unbatched":
        x, states, ids = x[:, :1], [s[:, :1] for s in states], ids[:1]
    training, finals = layer.training, []
    size = layer.proj_size or H
    for n in range(layer.num_layers):
        if training and layer.fastseq.input_dropout:
            x = x * mask(1, n, 0, ids, x.shape[-1], layer.fastseq.input_dropout)
        ways = []
        for d in range(D):
            k = n * D + d
            named = layer_weights(layer)[k]
            w_hh, h_mask = named.w_hh, None
            if training and layer.fastseq.recurrent_dropout:
                h_mask = mask(0, n, d, ids, size, layer.fastseq.recurrent_dropout)
            if training and layer.fastseq.weight_dropout:
                rows, rate = range(w_hh.shape[0]), layer.fastseq.weight_dropout
                w_hh = w_hh * mask(2, n, d, rows, size, rate)
            weights = (named.w_ih, w_hh, *named[2:5])
            start = [s[k] for s in states]
            ways.append(walk(layer, x, start, weights, n, d, lengths, h_mask, ids))
        x = torch.cat([way[0] for way in ways], -1)
        finals += [way[1] for way in ways]
    return [x, *(torch.stack(s) for s in zip(*finals, strict=True))]


def walk(layer, x, states, weights, n, d, lengths, h_mask, ids):
    """One recurrence, a sequence and a step at a time, so that zoneout has a place between them."""
    rates = layer.fastseq.zoneout
    rates = rates if isinstance(rates, tuple) else (rates,) * len(states)
    rows, finals = [], []
    for b, row in enumerate(ids):
        length = x.shape[0] if lengths is None else lengths[b]
        now, along = [s[b : b + 1] for s in states], {}
        for t in reversed(range(length)) if d else range(length):
            one = None if h_mask is None else h_mask[b : b + 1]
            step = x[t : t + 1, b : b + 1]
            _, new, _ = independent.CELLS[layer._fastseq_cell](
                step, now, *weights, h_mask=one, reverse=False, lengths=None, reset=None
            )
            for k, p in enumerate(rates):
                if p and layer.training:
                    stays = mask(3 + k, n, d, [row], new[k].shape[-1], p, t) == 0
                    new[k] = torch.where(stays, now[k], new[k])
                elif p:
                    new[k] = p * now[k] + (1 - p) * new[k]
            now = new
            along[t] = now[0][0]
        blank = torch.zeros_like(now[0][0])
        rows.append(torch.stack([along.get(t, blank) for t in range(x.shape[0])]))
        finals.append([s[0] for s in now])
    return torch.stack(rows, 1), [torch.stack(s) for s in zip(*finals, strict=True)]


def check(layer, form, keywords=None):
    x, states = inputs(layer)
    leaves = [x, *states, *layer.parameters()]
    found = call(layer, form, x, states, **(keywords or {}))
    truth = expected(layer, form, x, states)
    random = torch.Generator().manual_seed(2)
    weights = [torch.randn(t.shape, generator=random, dtype=torch.float64) for t in truth]
    for ours, right in zip(found, truth, strict=True):
        check_alike(ours, right)
    ours = torch.autograd.grad(found, leaves, weights)
    for mine, right in zip(ours, torch.autograd.grad(truth, leaves, weights), strict=True):
        check_alike(mine, right)


@pytest.mark.parametrize("rates", RATES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cell", CELLS)
def test_it_is_what_the_loop_computes(cell, backend, rates):
    """Two layers, both ways: outputs, final states and every gradient, on every backend."""
    kind, options = CELLS[cell]
    check(make(kind, backend, **options, **SHAPES["deep"], **RATES[rates]), "dense")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_form_of_input(cell, shape, backend, form):
    """Masks go by the caller's order of the sequences, whatever order the kernels have them in."""
    kind, options = CELLS[cell]
    check(make(kind, backend, **options, **SHAPES[shape], **RATES["three"]), form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", [*BACKENDS, "torch"])
def test_an_input_that_is_masked_alone(backend, form):
    """Of one layer, which then goes in one call where its backend has one."""
    check(make("GRU", backend, input_dropout=0.3), form)


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_zoneout(backend, cell, form, memory, training):
    """Alone, and with the other masks; in evaluation by its expectation."""
    kind, options = CELLS[cell]
    rate = (0.1, 0.4) if kind == "LSTM" else 0.3
    for more in ({}, RATES["three"]) if backend is None else (RATES["three"],):
        layer = make(
            kind, backend, memory=memory, zoneout=rate, **options, **SHAPES["deep"], **more
        )
        check(layer.train(training), form)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_gradients_of_zoneout_by_differences(kind, backend):
    for training in (True, False):
        layer = make(kind, backend, zoneout=0.4, bidirectional=True).train(training)
        x, states = inputs(layer, batch=2)
        names, weights = zip(*layer.named_parameters(), strict=True)
        n = len(states)

        def outputs(x, *leaves, layer=layer, names=names, n=n):
            hx = leaves[:n] if n > 1 else leaves[0]
            given = dict(zip(names, leaves[n:], strict=True))
            y, last = torch.func.functional_call(layer, given, (x[:4], hx), {"seed": SEED})
            return (y, *flat(last))

        leaves = (x.detach().requires_grad_(), *states, *weights)
        assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "eager"])
def test_the_same_units_stay_on_every_backend(backend):
    """To the bit: where a unit stays, its output is that of the step before."""
    x = torch.randn(T, B, I)

    def moves(backend):
        layer = make("GRU", backend, dtype=torch.float32, zoneout=0.5, bidirectional=True)
        y, _ = layer(x, seed=SEED, row_ids=IDS)
        return y[1:] != y[:-1]

    found = moves(backend)
    assert torch.equal(found, moves("eager")) and 0.4 < found.float().mean() < 0.6


def test_zoneout_in_a_stream():
    """Step by step it takes the expectation too, whatever kernels serve a stream otherwise."""
    streaming = pytest.importorskip("fastseq.nn.streaming")
    layer = make("LSTM", zoneout=(0.1, 0.4), dtype=torch.float32).eval()
    x = torch.randn(T, B, I)
    with torch.no_grad():
        stream = streaming.Streaming(layer, B)
        found = torch.stack([stream.step(row).clone() for row in x])
        check_alike(found, layer(x)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_zoneout_keeps_a_state_that_was_reset(backend):
    """At p = 1 nothing moves: the initial state, and zeros from a reset on."""
    layer = make("GRU", backend, zoneout=1.0)
    x, (h_0,) = inputs(layer)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[3, 1] = True
    y, h_n = layer(x, h_0, reset=reset)
    assert torch.equal(y[2], h_0[0]) and torch.equal(h_n[0, 0], h_0[0, 0])
    assert not y[3:, 1].any() and not h_n[0, 1].any()


def test_torch_has_no_zoneout():
    layer = make("LSTM", "torch", zoneout=0.1)
    with pytest.raises(NotImplementedError, match="zoneout blends them"):
        layer(torch.randn(T, B, I, dtype=torch.float64))
    layer.fastseq.backend = None
    assert fastseq.explain(layer, torch.randn(T, B, I, dtype=torch.float64)) != "torch"


@pytest.mark.parametrize("rates", [*RATES, "zoneout"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_without_gradients(kind, rates):
    """Where inference may go another way, a layer in training masks all the same."""
    layer = make(kind, **SHAPES["deep"], **RATES.get(rates, {"zoneout": 0.3}))
    x, states = inputs(layer)
    expected = call(layer, "dense", x, states)
    with torch.no_grad():
        found = call(layer, "dense", x, states)
    for ours, right in zip(found, expected, strict=True):
        check_alike(ours, right)


# --- What the masks depend on


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batch_split_and_order_change_nothing(kind, backend):
    """With row ids a sequence has its masks wherever it stands; float64, up to rounding."""
    rates = {"recurrent_dropout": 0.5, "input_dropout": 0.5}
    layer = make(kind, backend, **SHAPES["deep"], **rates)
    x, states = inputs(layer)
    whole = call(layer, "dense", x, states)
    order = torch.tensor([2, 0, 3, 1])
    moved = call(
        layer, "dense", x[:, order], [s[:, order] for s in states], torch.tensor(IDS)[order]
    )
    for a, b in zip(whole, moved, strict=True):
        check_alike(a[:, order], b)
    for part in (slice(0, 1), slice(1, 4)):
        some = call(layer, "dense", x[:, part], [s[:, part] for s in states], IDS[part])
        for a, b in zip(whole, some, strict=True):
            check_alike(a[:, part], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zoneout_too(backend):
    layer = make("LSTM", backend, zoneout=0.5)
    x, states = inputs(layer)
    whole = call(layer, "dense", x, states)[0]
    part = call(layer, "dense", x[:, 1:3], [s[:, 1:3] for s in states], IDS[1:3])[0]
    check_alike(whole[:, 1:3], part)


def test_row_ids_are_places_if_not_given():
    layer = make("GRU", recurrent_dropout=0.5)
    x, _ = inputs(layer)
    by_place = layer(x, seed=SEED)[0]
    assert torch.equal(by_place, layer(x, seed=SEED, row_ids=range(B))[0])
    assert not torch.equal(by_place, layer(x, seed=SEED, row_ids=IDS)[0])
    same = layer(x[:, :1].expand(-1, B, -1), seed=SEED, row_ids=[7] * B)[0]
    check_alike(same, same[:, :1].expand_as(same))


def test_a_sequence_in_windows_keeps_its_mask():
    """The same seed and ids: truncated backpropagation drops the same units in every window."""
    layer = make("LSTM", recurrent_dropout=0.5, input_dropout=0.2, weight_dropout=0.3)
    x, states = inputs(layer)
    whole, _ = layer(x, tuple(states), seed=SEED)
    first, state = layer(x[:2], tuple(states), seed=SEED)
    check_alike(torch.cat([first, layer(x[2:], state, seed=SEED)[0]]), whole)


@pytest.mark.parametrize("rates", [*RATES, "zoneout"])
def test_the_seed_comes_from_torchs_generator(rates):
    layer = make("GRU", **RATES.get(rates, {"zoneout": 0.5}))
    x, _ = inputs(layer)
    torch.manual_seed(3)
    first, second = layer(x)[0], layer(x)[0]
    torch.manual_seed(3)
    assert torch.equal(layer(x)[0], first) and not torch.equal(first, second)
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, ())
    assert torch.equal(layer(x, seed=seed)[0], first)
    assert torch.equal(layer(x, seed=int(seed))[0], first)


@pytest.mark.parametrize("rates", [*RATES, "zoneout", "none"])
def test_no_number_is_drawn_where_none_is_needed(rates, capsys):
    """In evaluation, with a seed given, by explain, and of a layer that masks nothing."""
    layer = make("LSTM", **{"zoneout": {"zoneout": 0.5}, "none": {}, **RATES}[rates])
    x, _ = inputs(layer)
    before = torch.get_rng_state()
    layer(x, seed=1)
    fastseq.explain(layer, x)
    layer.eval()(x)
    if rates == "none":
        layer.train()(x)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("backend", [None, "eager", "torch", "numba"])
def test_evaluation_masks_nothing(backend):
    """The bits of a layer without the options; row ids and a seed are taken all the same."""
    plain = make("LSTM", backend, **SHAPES["deep"])
    layer = make("LSTM", backend, **SHAPES["deep"], **RATES["three"]).eval()
    x, _ = inputs(layer)
    assert torch.equal(layer(x, row_ids=IDS, seed=3)[0], plain(x)[0])


def test_checkpointing_draws_the_same_masks():
    layer = make("GRU", **RATES["three"], num_layers=2)
    x, _ = inputs(layer)

    def gradient(run):
        torch.manual_seed(5)
        return torch.autograd.grad(run(x).square().sum(), [x, *layer.parameters()])

    plain = gradient(lambda v: layer(v)[0])
    for reentrant in (True, False):

        def again(v, reentrant=reentrant):
            return checkpoint(lambda u: layer(u)[0], v, use_reentrant=reentrant)

        torch.manual_seed(5)
        leaves = [x, *layer.parameters()]
        for leaf in leaves:
            leaf.grad = None
        again(x).square().sum().backward()
        assert all(torch.equal(a.grad, b) for a, b in zip(leaves, plain, strict=True))


def test_dropout_between_layers_is_still_torchs():
    layer = make("GRU", num_layers=2, dropout=0.5, input_dropout=0.5)
    x, _ = inputs(layer)
    torch.manual_seed(1)
    found = layer(x, seed=SEED)[0]
    torch.manual_seed(1)
    one, two = layer_weights(layer)
    y, _ = fastseq.gru(x * mask(1, 0, 0, range(B), I, 0.5), one[:4])
    y, _ = fastseq.gru(torch.dropout(y, 0.5, True) * mask(1, 1, 0, range(B), H, 0.5), two[:4])
    check_alike(found, y)


@pytest.mark.parametrize("backend", [None, "eager", "numba"])
def test_autocast_and_16_bits(backend):
    for dtype, cast in ((torch.float32, True), (torch.bfloat16, False)):
        layer = make("LSTM", backend, dtype=dtype, **RATES["three"], **SHAPES["deep"])
        x, _ = inputs(layer, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            y, (h, c) = layer(x, seed=SEED)
        assert y.dtype == h.dtype == c.dtype == torch.bfloat16
        wide = make("LSTM", dtype=torch.float64, **RATES["three"], **SHAPES["deep"])
        other = "numba" if backend == "eager" else "eager"
        narrow = make("LSTM", other, torch.bfloat16, **RATES["three"], **SHAPES["deep"])
        for module in (wide, narrow):
            module.load_state_dict(layer.state_dict())
        exact, theirs = (m(x.to(m.weight_ih_l0), seed=SEED)[0] for m in (wide, narrow))
        check_close(y, theirs, exact, torch.bfloat16, "y")


# --- Among torch's tools


@compiles_cpp
@pytest.mark.parametrize(
    "kind, dynamic",
    [
        ("LSTM", None),
        pytest.param("LSTM", True, marks=pytest.mark.full),
        pytest.param("GRU", None, marks=pytest.mark.full),
        pytest.param("GRU", True, marks=pytest.mark.full),
    ],
)
def test_compiled_bit_for_bit(kind, dynamic):
    """One graph, and the numbers of the layer as it is: the seed is torch's own, not inductor's."""
    torch._dynamo.reset()
    layer = make(kind, "numba", torch.float32, **RATES["three"], **SHAPES["deep"])
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    for T_, B_ in ((7, 3), (9, 4)):
        x = torch.randn(T_, B_, I)
        results = []
        for run in (layer, compiled):
            torch.manual_seed(5)
            y, _ = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))])
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_compiled_with_lengths_and_ids():
    torch._dynamo.reset()
    layer = make("GRU", "numba", torch.float32, **RATES["three"])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for B_ in (3, 5):
        x, lengths = torch.randn(T, B_, I), torch.arange(B_)
        keywords = {"lengths": lengths, "row_ids": lengths + 4, "seed": torch.tensor(7)}
        assert torch.equal(compiled(x, **keywords)[0], layer(x, **keywords)[0])


def test_zoneout_compiled():
    torch._dynamo.reset()
    layer = make("LSTM", dtype=torch.float32, zoneout=(0.1, 0.3))
    x = torch.randn(4, B, I)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, seed=3)[0]
    check_alike(found, layer(x, seed=3)[0])


def test_functional_transforms():
    """A seed that is shared: every member of a vmap has the masks of its place in its own batch."""
    layer = make("GRU", "numba", **RATES["three"])
    x, _ = inputs(layer)

    def run(v):
        return layer(v[:, None], seed=SEED)[0][:, 0]

    found = torch.func.vmap(run, in_dims=1, out_dims=1)(x)
    one_by_one = layer(x, seed=SEED, row_ids=[0] * B)[0]
    check_alike(found, one_by_one)
    with pytest.raises(RuntimeError, match="random"):  # torch's own rule, of a seed that is drawn
        torch.func.vmap(lambda v: layer(v[:, None])[0], in_dims=1)(x)
    torch.manual_seed(3)
    drawn = torch.func.vmap(lambda v: layer(v[:, None])[0], in_dims=1, randomness="same")(x)
    torch.manual_seed(3)
    expected = layer(x, row_ids=[0] * B)[0]
    check_alike(drawn[:, :, 0].movedim(0, 1), expected)
    parameters = dict(layer.named_parameters())
    gradients = torch.func.grad(
        lambda p: torch.func.functional_call(layer, p, (x,), {"seed": SEED})[0].sum()
    )(parameters)
    layer(x, seed=SEED)[0].sum().backward()
    for name, p in parameters.items():
        check_alike(gradients[name], p.grad)


def test_second_derivatives():
    layer = make("GRU", "numba", **RATES["three"])
    x, (h_0,) = inputs(layer, batch=1)
    torch.autograd.gradgradcheck(lambda v, h: layer(v[:2], h, seed=SEED)[0], (x, h_0))


def test_nothing_is_added_to_the_state():
    plain, layer = make("LSTM"), make("LSTM", **RATES["three"], zoneout=0.1)
    assert layer.state_dict().keys() == plain.state_dict().keys()
    layer.load_state_dict(nn.LSTM(I, H, dtype=torch.float64).state_dict())
    x, _ = inputs(layer)
    for copy in (deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(copy(x, seed=1)[0], layer(x, seed=1)[0])


def test_the_options_show_and_change():
    layer = make("LSTM", recurrent_dropout=0.25, zoneout=(0.05, 0.5))
    assert repr(layer) == "LSTM(5, 7, recurrent_dropout=0.25, zoneout=(0.05, 0.5))"
    layer.fastseq.recurrent_dropout, layer.fastseq.zoneout = 0, 0
    assert repr(layer) == repr(make("LSTM"))
    assert layer.fastseq.zoneout == 0 and layer.fastseq.rates is None
    x, _ = inputs(layer)
    assert torch.equal(layer(x)[0], make("LSTM")(x)[0])
    layer.fastseq.input_dropout = 0.5
    assert (layer.fastseq.input_dropout, layer.fastseq.zoneout) == (0.5, 0)
    assert not torch.equal(layer(x)[0], make("LSTM")(x)[0])


NAMES = ("recurrent_dropout", "input_dropout", "weight_dropout", "zoneout")


@pytest.mark.parametrize("value", [-0.1, 1.5, True, "0.5", float("nan")])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_probability(name, value):
    """The class and the words of torch.nn's dropout, at construction and later."""
    words = f"{name} should be a number in range \\[0, 1\\]"
    with pytest.raises(ValueError, match=words):
        make("GRU", **{name: value})
    with pytest.raises(ValueError, match=words):
        setattr(make("GRU").fastseq, name, value)


MISTAKES = {
    "row_ids of the wrong size": (
        {"row_ids": [1, 2]},
        ValueError,
        r"row_ids: .*\(4,\), got \(2,\)",
    ),
    "row_ids that are floats": (
        {"row_ids": torch.zeros(B)},
        TypeError,
        "row_ids: expected integers",
    ),
    "seed that is a float": ({"seed": 1.5}, TypeError, "seed: expected an int or a tensor"),
    "seed that is a bool": ({"seed": True}, TypeError, "seed: expected an int or a tensor"),
    "seed of many": ({"seed": torch.zeros(2, dtype=torch.int64)}, TypeError, "of no dimension"),
    "seed too large": ({"seed": 2**64}, ValueError, "seed: expected 64 bits"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rate", [0.1, 0.0])
def test_mistakes(name, rate, training):
    """They are told whether or not the layer has masks that would read them."""
    keywords, error, words = MISTAKES[name]
    layer = make("GRU", recurrent_dropout=rate).train(training)
    with pytest.raises(error, match=words):
        layer(inputs(layer)[0], **keywords)


def test_one_zoneout_for_each_state():
    with pytest.raises(ValueError, match="one for each of h, c, got"):
        make("LSTM", zoneout=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="one for each of h, got"):
        make("GRU", zoneout=(0.1, 0.2))


def test_torch_nn_cannot_stand_in():
    """Turning a layer back, and scripting it, name what would be lost."""
    model = nn.Sequential(make("LSTM", recurrent_dropout=0.5))
    report = fastseq.restore(model)
    assert type(model[0]) is fastseq.LSTM
    words = "torch.nn has no recurrent_dropout; set it to 0 first, "
    assert report.left == {"0": words + "layer.fastseq.recurrent_dropout = 0"}
    with pytest.raises(TypeError, match=r"torch\.nn has no recurrent_dropout"):
        torch.jit.script(model)
    model[0].fastseq.recurrent_dropout = 0
    fastseq.restore(model)
    assert type(model[0]) is nn.LSTM and not hasattr(model[0], "fastseq")


def test_packed_in_order_takes_ids_in_order():
    """A sequence that is packed as it stands."""
    layer = make("GRU", recurrent_dropout=0.5)
    x, _ = inputs(layer)
    packed = pack_sequence([x[:, 0], x[:3, 1]])
    y, _ = pad_packed_sequence(layer(packed, row_ids=IDS[:2], seed=SEED)[0])
    dense = layer(x, row_ids=IDS, seed=SEED)[0]
    check_alike(y[:, 0], dense[:, 0])
    check_alike(y[:3, 1], dense[:3, 1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("first", [False, True], ids=["time first", "batch first"])
@pytest.mark.parametrize("rates", [*RATES, "zoneout"])
def test_without_a_seed_a_layer_masks_as_with_the_one_it_draws(rates, first, training):
    """A plain call goes the short way, one with a seed the long one; and where the short way is
    found closed, as by a lazy negation, nothing was drawn."""
    torch.manual_seed(0)
    options = RATES.get(rates, {"zoneout": (0.3, 0.2)})
    layer = fastseq.LSTM(I, H, num_layers=2, bidirectional=True, batch_first=first, **options)
    layer.train(training)
    x = torch.randn(T, B, I)
    torch.manual_seed(SEED)
    seed = torch.randint(2**63 - 1, ())
    long = layer(x, seed=seed)
    for given in (x, torch._neg_view(-x)):
        torch.manual_seed(SEED)
        y, (h, c) = layer(given)
        for ours, theirs in ((y, long[0]), (h, long[1][0]), (c, long[1][1])):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["native", "numba", "eager"])
@pytest.mark.parametrize("rates", [*RATES, "zoneout"])
def test_a_batch_of_none(rates, backend):
    if isinstance(load(backend), str):
        pytest.skip(load(backend))
    layer = fastseq.GRU(I, H, backend=backend, **RATES.get(rates, {"zoneout": 0.3}))
    x = torch.randn(T, 0, I, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert y.shape == (T, 0, H) and x.grad.shape == x.shape
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("shape", [(5,), (), (15, 4, 1), (15, 4)])
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0"])
@pytest.mark.parametrize("rates", [*RATES, "zoneout", "reset"])
def test_weights_of_other_shapes_are_named(rates, name, shape):
    """By the layer's own words, with whatever is asked for, and nothing is drawn."""
    options = {"reset": {}, "zoneout": {"zoneout": 0.3}} | RATES
    layer = fastseq.GRU(7, 5, **options[rates])
    setattr(layer, name, torch.nn.Parameter(torch.zeros(shape)))
    given = {"reset": torch.zeros(T, B, dtype=torch.bool)} if rates == "reset" else {}
    before = torch.get_rng_state()
    x = torch.zeros(T, B, 7)
    with pytest.raises(RuntimeError, match=f"{name}: expected .* got "):
        layer(x, **given)
    assert torch.equal(before, torch.get_rng_state())
