"""Attention and the decoder over it: beside a recursion in words of one sequence, in float64."""

import copy
import io
import math
import pickle

import pytest
import torch
from problems import full
from rules import check_close
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import fastseq
from fastseq import schedules
from fastseq.backends import choice
from fastseq.nn.attention import SCORES, Attention, PreparedKeys
from fastseq.nn.attention_decoder import AttentionDecoder
from fastseq.ops.attention import AttendFunction, plain_attend

U, S, B, I, H, K, V = 4, 5, 3, 2, 4, 4, 3  # noqa: E741  (the field's letter)
LENGTHS = [5, 0, 2]
double = {"dtype": torch.float64}


def score(attention, q, k):
    """Of one query and one key, as the paper has it."""
    if attention.score == "additive":
        w_q, w_k = attention.weight_query, attention.weight_key
        return attention.weight_score @ torch.tanh(w_q @ q + w_k @ k)
    if attention.score == "general":
        return q @ attention.weight_key @ k
    return q @ k / (math.sqrt(len(k)) if attention.score == "scaled_dot" else 1)


def looked(attention, q, keys, values):
    """Context and weights of one query over the keys that there are."""
    if not len(keys):
        return values.new_zeros(values.shape[-1]), values.new_zeros(0)
    e = torch.stack([score(attention, q, k) for k in keys]).exp()
    return (e / e.sum()) @ values, e / e.sum()


def expected(attention, queries, keys, values, seen):
    """Contexts (U, B, V) and weights (U, B, S); seen(u, b): the keys that a query sees."""
    contexts = queries.new_zeros(len(queries), queries.shape[1], values.shape[-1])
    weights = queries.new_zeros(len(queries), queries.shape[1], len(keys))
    for u in range(len(queries)):
        for b in range(queries.shape[1]):
            at = seen(u, b)
            found = looked(attention, queries[u, b], keys[at, b], values[at, b])
            contexts[u, b], weights[u, b, at] = found
    return contexts, weights


def close(ours, theirs, **bounds):
    torch.testing.assert_close(ours, theirs, **bounds)


def filled(module):
    """All parameters drawn anew, larger than they begin: no weight is near the others'."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


@pytest.fixture
def sequence():
    return torch.randn(U, B, H, **double), torch.randn(S, B, K, **double)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_attention_is_the_papers(name, batch_first, sequence):
    queries, keys = sequence
    values = torch.randn(S, B, V, **double)
    a = filled(Attention(H, K, name, batch_first=batch_first, **double))

    def turned(x):
        return x.transpose(0, 1) if batch_first else x

    theirs = expected(a, queries, keys, values, lambda u, b: list(range(LENGTHS[b])))
    given = [turned(x) for x in (queries, keys, values)]
    for ours in (
        a(*given, lengths=LENGTHS),
        a(*given, mask=torch.arange(S) < torch.tensor(LENGTHS)[:, None]),
        a(given[0], a.prepare(*given[1:], lengths=LENGTHS)),
    ):
        for mine, their in zip(ours, theirs, strict=True):
            close(turned(mine), their)
    context, weights = a(queries[0], *given[1:], lengths=LENGTHS)  # one query
    close(context, theirs[0][0])
    close(weights, theirs[1][0])
    context, weights = a(*given, lengths=LENGTHS, need_weights=False)
    close(turned(context), theirs[0])
    assert weights is None
    close(a(given[0], given[1]), a(given[0], given[1], given[1]))  # values are the keys


@pytest.mark.parametrize("name", SCORES)
def test_causal_self_attention(name):
    x = torch.randn(S, B, H, **double)
    a = filled(Attention(H, H, name, **double))
    theirs = expected(a, x, x, x, lambda u, b: [s for s in range(u + 1) if s < LENGTHS[b]])
    for need in (True, False):
        ours = a(x, x, lengths=LENGTHS, causal=True, need_weights=need)
        close(ours[0], theirs[0])
    close(a(x, x, lengths=LENGTHS, causal=True)[1], theirs[1])


@pytest.mark.parametrize("name", SCORES)
def test_derivatives_of_attention(name, sequence):
    """Of every order, with an empty sequence, which gets zeros and no NaN."""
    a = filled(Attention(2, 2, name, attention_size=3 if name == "additive" else None, **double))
    names = [n for n, _ in a.named_parameters()]
    x = [torch.randn(n, 2, 2, **double, requires_grad=True) for n in (2, 3, 3)]

    def run(queries, keys, values, *weights):
        given = dict(zip(names, weights, strict=True))
        return functional_call(a, given, (queries, keys, values), {"lengths": [2, 0]})

    inputs = (*x, *a.parameters())
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs, fast_mode=True)
    context, weights = run(*inputs)
    assert not context[:, 1].any() and not weights[:, 1].any()
    for need in (True, False):
        out = a(*x, lengths=[2, 0], need_weights=need)[0]
        for g in torch.autograd.grad(out.sum() + (out**2).sum(), inputs):
            assert torch.isfinite(g).all()


KERNELS = choice.attends("cpu")
kernels = pytest.mark.skipif(KERNELS is None, reason="the C++ kernels are not built here")


@pytest.fixture(params=KERNELS.instruction_sets() if KERNELS else [])
def instruction_set(request):
    before = KERNELS._cpu.use_instruction_set(request.param)
    yield
    KERNELS._cpu.use_instruction_set(before)


@kernels
@pytest.mark.parametrize("additive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels(dtype, additive, instruction_set, threads):
    """Beside torch's operations, with several queries, on any number of threads; what is masked is
    never read."""
    B, U, S, A, V = 5, 2, 7, 37, 18
    mask = torch.arange(S) < torch.tensor([7, 0, 3, 1, 6])[:, None]
    q, k, values = (torch.randn(B, n, size) for n, size in ((U, A), (S, A), (S, V)))
    v, scale = (torch.randn(A), 1.0) if additive else (None, 0.4)
    dcontext, dweights = torch.randn(B, U, V), torch.randn(B, U, S)

    def run(attend, dtype, poison):
        leaves = [None if t is None else t.to(dtype).requires_grad_() for t in (q, k, values, v)]
        given = list(leaves)
        if poison:
            given[1:3] = [t.masked_fill(~mask[..., None], math.nan) for t in given[1:3]]
        outputs = attend(*given[:3], mask, given[3], scale)
        there = [t for t in leaves if t is not None]
        found = torch.autograd.grad(
            outputs, there, (dcontext.to(dtype), dweights.to(dtype)), retain_graph=True
        )
        return [*outputs, *found]

    def by_kernels(queries, keys, values, mask, v, scale):
        return AttendFunction.apply(KERNELS, mask, scale, queries, keys, values, v)

    truth = run(plain_attend, torch.float64, False)
    theirs = run(plain_attend, dtype, False)
    for count in (1, 2, 3):
        threads(count)
        ours = run(by_kernels, dtype, True)
        for k_, (mine, their, true) in enumerate(zip(ours, theirs, truth, strict=True)):
            check_close(mine, their, true, dtype, f"{k_} of {count} threads")


@pytest.mark.parametrize("needed", [True, False])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_nan_beyond_a_length_has_no_part(name, many, needed):
    a = Attention(H, H if "dot" in name else K, name).double()
    queries = torch.randn(*(U, B, H)[0 if many else 1 :], dtype=torch.float64)
    keys = torch.randn(S, B, a.key_size, dtype=torch.float64)
    values = torch.randn(S, B, V, dtype=torch.float64)
    beyond = (torch.arange(S)[:, None] >= torch.tensor(LENGTHS))[..., None]
    found = []
    for filler in (7.0, math.nan):
        leaves = [t.masked_fill(beyond, filler).requires_grad_() for t in (keys, values)]
        context, weights = a(queries, *leaves, lengths=LENGTHS, need_weights=needed)
        loss = context.square().sum()
        gradients = torch.autograd.grad(loss, [*leaves, *a.parameters()])
        found.append([context, *([weights] if needed else []), *gradients])
    for one, other in zip(*found, strict=True):
        assert one.isfinite().all() and torch.equal(one, other)


@kernels
def test_kernels_decline_what_they_cannot_read():
    q, k, w, c = torch.randn(2, 3), torch.randn(2, 5, 3), torch.zeros(2, 5), torch.zeros(2, 3)
    given = [q, k, k, None, None, 1.0, w, c, 1]
    assert KERNELS.attend(*given) is True
    for place, wrong in (
        (0, q.double()),
        (0, torch.randn(2, 4)),
        (0, torch.randn(3, 2).t()),
        (1, torch.randn(5, 2, 3).transpose(0, 1)),
        (3, torch.randn(4)),
        (4, torch.ones(2, 4, dtype=torch.bool)),
        (6, torch.zeros(2, 6)),
        (7, torch.zeros(2, 4)),
    ):
        assert KERNELS.attend(*given[:place], wrong, *given[place + 1 :]) is None, place
    with pytest.raises(TypeError, match="expected 9 arguments"):
        KERNELS.attend(*given[:-1])


CELLS = {
    "LSTM": lambda n: fastseq.LSTMCell(n, H, **double),
    "GRU": lambda n: fastseq.GRUCell(n, H, **double),
    "RNN": lambda n: fastseq.RNNCell(n, H, **double),
    "MGU": lambda n: fastseq.MGUCell(n, H, **double),
    "SCRN": lambda n: fastseq.SCRNCell(n, H - 1, context_size=1, **double),
    "torch": lambda n: torch.nn.LSTMCell(n, H, **double),
    "layers": lambda n: fastseq.LSTM(n, H, num_layers=2, **double),
    "learned": lambda n: fastseq.GRU(n, H, learn_state=True, **double),
}


def outputs_of(module, state):
    parts = state if isinstance(state, tuple) else (state,)
    if isinstance(module, fastseq.SCRNCell):
        return torch.cat(parts, -1)
    return parts[0] if parts[0].dim() == 2 else parts[0][-1]


def fed(decoder, inputs, memory, state):
    """The recursion, sequence lengths LENGTHS."""
    module, found = decoder.recurrent, []
    for x in inputs:
        query = outputs_of(module, state)
        c, w = expected(
            decoder.attention, query[None], memory, memory, lambda u, b: [*range(LENGTHS[b])]
        )
        read = torch.cat([x, c[0]], 1)
        if decoder.recurrent.__class__.__name__.endswith("Cell"):
            state = module(read, state)
        else:
            state = module(read[None], state)[1]
        found.append((torch.cat([outputs_of(module, state), c[0]], 1), w[0]))
    outputs, weights = zip(*found, strict=True)
    return torch.stack(outputs), state, torch.stack(weights)


def initial(module):
    if isinstance(module, fastseq.SCRNCell):
        return torch.zeros(B, H - 1, **double), torch.zeros(B, 1, **double)
    if isinstance(module, fastseq.LSTM):
        return torch.zeros(2, B, H, **double), torch.zeros(2, B, H, **double)
    if isinstance(module, fastseq.GRU):
        return module.h_0.expand(-1, B, -1).contiguous()
    h = torch.zeros(B, H, **double)
    return (h, h) if isinstance(module, torch.nn.LSTMCell) or "LSTM" in type(module).__name__ else h


@pytest.mark.parametrize("name", ["additive", "general"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_context_is_fed(kind, name):
    decoder = filled(AttentionDecoder(CELLS[kind](I + K), Attention(H, K, name, **double)))
    inputs, memory = torch.randn(U, B, I, **double), torch.randn(S, B, K, **double)
    theirs = fed(decoder, inputs, memory, initial(decoder.recurrent))
    ours = decoder(inputs, memory, lengths=LENGTHS)
    close(ours, theirs)
    close(decoder(inputs, memory, initial(decoder.recurrent), lengths=LENGTHS), theirs)
    # in two calls, and step by step
    prepared = decoder.prepare(memory, lengths=LENGTHS)
    first = decoder(inputs[:1], prepared)
    close(decoder(inputs[1:], prepared, first[1])[1], theirs[1])
    state = None
    for u in range(U):
        y, state, w = decoder.step(inputs[u], prepared, state)
        close((y, w), (theirs[0][u], theirs[2][u]))
    # gradients of everything
    leaves = [inputs.requires_grad_(), memory.requires_grad_(), *decoder.parameters()]
    losses = []
    for outputs, state, weights in (
        decoder(inputs, memory, lengths=LENGTHS),
        fed(decoder, inputs, memory, initial(decoder.recurrent)),
    ):
        parts = state if isinstance(state, tuple) else (state,)
        losses.append(sum((p**2).sum() for p in (outputs, weights, *parts)))
    for mine, their in zip(*(torch.autograd.grad(loss, leaves) for loss in losses), strict=True):
        close(mine, their)


def fused_of(decoder, *given):
    """The decoder's outputs with the loop as one node, which has to be taken."""
    seen, own = [], decoder._fused

    def fused(*arguments):
        seen.append(own(*arguments))
        return seen[-1]

    decoder._fused = fused
    try:
        outputs = decoder(*given, lengths=LENGTHS)
    finally:
        del decoder._fused
    assert seen[0] is not None
    return outputs


@kernels
@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "MGU"])
def test_the_loop_as_one_node(kind, name, monkeypatch):
    """Beside the loop of modules: values, gradients of everything, twice with the same bits."""
    decoder = filled(AttentionDecoder(CELLS[kind](I + K), Attention(H, K, name, **double)))
    inputs = torch.randn(U, B, I, **double, requires_grad=True)
    memory = torch.randn(S, B, K, **double, requires_grad=True)
    h = torch.randn(B, H, **double, requires_grad=True)
    state = (h, h * 2) if kind == "LSTM" else h
    leaves = [inputs, memory, h, *decoder.parameters()]

    def gradients(found, of=slice(None)):
        outputs, last, weights = found
        parts = [outputs, weights, *(last if isinstance(last, tuple) else (last,))][of]
        return torch.autograd.grad(
            sum((p**2).sum() for p in parts), leaves, retain_graph=True, allow_unused=True
        )

    ours = fused_of(decoder, inputs, memory, state)
    monkeypatch.setattr(decoder, "_fused", lambda *_: None)
    theirs = decoder(inputs, memory, state, lengths=LENGTHS)
    close(ours, theirs)
    for of in (slice(None), slice(0, 1), slice(1, 2), slice(2, None)):
        found = gradients(ours, of)
        for mine, their in zip(found, gradients(theirs, of), strict=True):
            close(mine, torch.zeros_like(mine) if their is None else their)
        for mine, again in zip(found, gradients(ours, of), strict=True):
            assert mine.equal(again)
    monkeypatch.undo()
    with torch.no_grad():
        close(fused_of(decoder, inputs, memory, state), theirs)


@kernels
def test_whatever_watches_a_module_is_called():
    decoder = AttentionDecoder(fastseq.GRUCell(I + K, H), Attention(H, K))
    inputs, memory = torch.randn(U, B, I), torch.randn(S, B, K)
    fused_of(decoder, inputs, memory)
    for module in (decoder.recurrent, decoder.attention):
        calls = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        decoder(inputs, memory)
        handle.remove()
        assert len(calls) == U
    own = decoder.recurrent.forward
    decoder.recurrent.forward = lambda *given: calls.append(1) or own(*given)
    decoder(inputs, memory)
    assert len(calls) == 2 * U


def test_without_kernels(monkeypatch):
    decoder = AttentionDecoder(fastseq.LSTMCell(I + K, H, **double), Attention(H, K, **double))
    inputs, memory = torch.randn(U, B, I, **double), torch.randn(S, B, K, **double)
    ours = decoder(inputs, memory, lengths=LENGTHS)
    monkeypatch.setattr(choice, "attends", lambda device: None)
    close(decoder(inputs, memory, lengths=LENGTHS), ours)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda: fastseq.LSTM(I, H, num_layers=2, **double),
        lambda: fastseq.GRU(I, H, **double),
        lambda: fastseq.SCRN(I, 3, context_size=1, **double),
        lambda: torch.nn.RNN(I, H, **double),
    ],
)
def test_no_context_is_fed(make, batch_first):
    a = Attention(H, K, batch_first=batch_first, **double)
    decoder = filled(AttentionDecoder(make(), a, feed_context=False))
    inputs, memory = torch.randn(U, B, I, **double), torch.randn(S, B, K, **double)
    h, last = decoder.recurrent(inputs)
    c, w = expected(a, h, memory, memory, lambda u, b: [*range(LENGTHS[b])])

    def turned(x):
        return x.transpose(0, 1) if batch_first else x

    outputs, state, weights = decoder(turned(inputs), turned(memory), lengths=LENGTHS)
    close(turned(outputs), torch.cat([h, c], 2))
    close(turned(weights), w)
    close(state, last)
    prepared, state = decoder.prepare(turned(memory), lengths=LENGTHS), None
    for u in range(U):
        y, state, w_u = decoder.step(inputs[u], prepared, state)
        close((y, w_u), (torch.cat([h[u], c[u]], 1), w[u]))


@pytest.mark.parametrize("name", ["additive", "dot"])
def test_derivatives_of_the_decoder(name, pytestconfig):
    decoder = AttentionDecoder(fastseq.GRUCell(3, 2, **double), Attention(2, 2, name, **double))
    filled(decoder)
    names = [n for n, _ in decoder.named_parameters()]
    x, memory = torch.randn(2, 2, 1, **double), torch.randn(2, 2, 2, **double)
    state = torch.randn(2, 2, **double)

    def run(x, memory, state, *weights):
        given = dict(zip(names, weights, strict=True))
        return functional_call(decoder, given, (x, memory, state), {"lengths": [2, 0]})

    inputs = (*(t.requires_grad_() for t in (x, memory, state)), *decoder.parameters())
    assert gradcheck(run, inputs, fast_mode=not pytestconfig.getoption("--full"))
    if pytestconfig.getoption("--full"):
        assert gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("feed", [True, False])
def test_types_copies_and_batches(feed):
    recurrent = fastseq.LSTMCell(I + K, H) if feed else fastseq.LSTM(I, H)
    decoder = AttentionDecoder(recurrent, Attention(H, K, "general"), feed_context=feed)
    inputs, memory = torch.randn(U, B, I), torch.randn(S, B, K)
    theirs = decoder(inputs, memory, lengths=LENGTHS)
    for other in (copy.deepcopy(decoder), pickle.loads(pickle.dumps(decoder))):
        close(other(inputs, memory, lengths=LENGTHS), theirs)
    buffer = io.BytesIO()
    torch.save(decoder.state_dict(), buffer)
    buffer.seek(0)
    fresh = AttentionDecoder(
        copy.deepcopy(recurrent), Attention(H, K, "general"), feed_context=feed
    )
    fresh.load_state_dict(torch.load(buffer))
    close(fresh(inputs, memory, lengths=LENGTHS), theirs)
    outputs, _, weights = decoder(inputs[:, :0], memory[:, :0])
    assert outputs.shape == (U, 0, H + K) and weights.shape == (U, 0, S)
    outputs.sum().backward()
    half = copy.deepcopy(decoder).bfloat16()
    outputs = half(inputs.bfloat16(), memory.bfloat16(), lengths=LENGTHS)[0]
    close(outputs.float(), theirs[0], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("name", SCORES)
def test_no_key_at_all(name):
    a = Attention(H, K, name)
    queries = torch.randn(U, B, H, requires_grad=True)
    context, weights = a(queries, torch.randn(0, B, K))
    assert weights.shape == (U, B, 0) and not context.any()
    context.sum().backward()
    assert torch.isfinite(queries.grad).all()


def test_scheduled_sampling():
    embed, readout = torch.nn.Embedding(7, I), torch.nn.Linear(H + K, 7)
    decoder = AttentionDecoder(fastseq.LSTMCell(I + K, H), Attention(H, K))
    filled(decoder)
    tokens, memory = torch.randint(7, (U, B)), torch.randn(S, B, K)
    logits, fed_tokens, state, weights = decoder.forward_sampling(tokens, embed, readout, memory)
    theirs = decoder(embed(tokens), memory)
    close((readout(theirs[0]), theirs[1], theirs[2]), (logits, state, weights))
    assert fed_tokens.equal(tokens)

    found = decoder.forward_sampling(tokens, embed, readout, memory, teacher_forcing=0.0)
    assert found.tokens[0].equal(tokens[0])
    assert found.tokens[1:].equal(found.logits[:-1].argmax(-1))
    close(readout(decoder(embed(found.tokens), memory)[0]), found.logits)
    found.logits.sum().backward()

    # a rate for each step, each sequence by itself
    rates = torch.tensor([1.0, 0.0, 1.0, 0.5])
    many = tokens[:, :1].expand(U, 400)
    logits, fed_tokens, *_ = decoder.forward_sampling(
        many, embed, readout, memory[:, :1].expand(S, 400, K), teacher_forcing=rates
    )
    own = logits[:-1].argmax(-1)
    assert fed_tokens[1].equal(own[0]) and fed_tokens[2].equal(many[2])
    forced = (fed_tokens[3] == many[3]) & (own[2] != many[3])
    differs = own[2] != many[3]
    assert differs.all() and 140 < int(forced.sum()) < 260

    # drawn from the softmax of the logits, by the generator alone
    draws = [
        decoder.forward_sampling(
            many,
            embed,
            readout,
            memory[:, :1].expand(S, 400, K),
            teacher_forcing=0.0,
            choice="sample",
            generator=torch.Generator().manual_seed(k),
        )
        for k in (0, 0, 1)
    ]
    assert draws[0].tokens.equal(draws[1].tokens) and not draws[0].tokens.equal(draws[2].tokens)
    share = (draws[0].tokens[1][:, None] == torch.arange(7)).float().mean(0)
    close(share, draws[0].logits[0, 0].softmax(-1).detach(), atol=0.1, rtol=0)


def test_schedules():
    assert [schedules.linear(i, 0.25, 0.9, 0.1) for i in (0, 2, 10)] == [0.9, 0.4, 0.1]
    assert schedules.exponential(3, 0.5) == 0.125
    k = 10.0
    for i in (0.0, 5.0, k * math.log(k)):
        assert math.isclose(schedules.inverse_sigmoid(i, k), k / (k + math.exp(i / k)))
    assert schedules.inverse_sigmoid(1e6, 2) == 0
    for wrong in (
        lambda: schedules.linear(0, -1),
        lambda: schedules.linear(0, 1, 0.5, 0.6),
        lambda: schedules.exponential(0, 1.0),
        lambda: schedules.inverse_sigmoid(0, 0.5),
        lambda: schedules.inverse_sigmoid(-1, 2),
        lambda: schedules.inverse_sigmoid(0, math.inf),
        lambda: schedules.linear(0, math.nan),
        lambda: schedules.linear(math.inf, 0.0),
        lambda: schedules.exponential(math.nan, 0.5),
    ):
        with pytest.raises(ValueError, match="expected"):
            wrong()


ATTENTION_MISTAKES = {
    "score: expected one of additive, dot": lambda: Attention(H, K, "cosine"),
    "query_size: expected at least 1, got 0": lambda: Attention(0, K),
    "key_size: expected an int, got float": lambda: Attention(H, 2.0),
    "key_size: expected query_size = 4": lambda: Attention(4, 5, "dot"),
    "attention_size: only the additive": lambda: Attention(4, 4, "dot", attention_size=3),
    "queries: expected .B, Q. or .U, B, Q. with Q": lambda a, q, k: a(q[..., :2], k),
    "queries: expected the batch of the keys, 3": lambda a, q, k: a(q[:, :2], k),
    "keys: expected .S, B, key_size = 4": lambda a, q, k: a(q, k[0]),
    "values: expected one for each key": lambda a, q, k: a(q, k, k[:2]),
    "lengths: expected values from 0 to T = 5": lambda a, q, k: a(q, k, lengths=[6, 1, 1]),
    "lengths: expected one a sequence": lambda a, q, k: a(q, k, lengths=[1, 1]),
    "mask: expected a bool tensor": lambda a, q, k: a(q, k, mask=torch.ones(B, S)),
    "mask: expected .B, S. = .3, 5.": lambda a, q, k: a(q, k, mask=torch.ones(S, B).bool()),
    "mask: given beside lengths": lambda a, q, k: a(
        q, k, lengths=[1, 1, 1], mask=torch.ones(B, S).bool()
    ),
    "keys: values, lengths and mask were given": lambda a, q, k: a(
        q, a.prepare(k), lengths=[1, 1, 1]
    ),
}


@pytest.mark.parametrize("words", ATTENTION_MISTAKES)
def test_mistakes_with_attention(words):
    wrong = ATTENTION_MISTAKES[words]
    given = (Attention(H, K), torch.randn(U, B, H), torch.randn(S, B, K))
    with pytest.raises((ValueError, TypeError), match=words):
        wrong(*given) if wrong.__code__.co_argcount else wrong()


def decoder_of(recurrent, **options):
    return AttentionDecoder(recurrent, Attention(H, K), **options)


DECODER_MISTAKES = {
    "recurrent: expected a cell or layer": lambda: decoder_of(torch.nn.Linear(2, 2)),
    "recurrent: feed_context=False": lambda: decoder_of(fastseq.LSTMCell(I, H), feed_context=False),
    "recurrent: expected a layer of one direction": lambda: decoder_of(
        fastseq.LSTM(I, H, bidirectional=True)
    ),
    "attention: expected query_size = 7": lambda: decoder_of(fastseq.LSTMCell(I, 7)),
    "attention: expected a fastseq.Attention": lambda: AttentionDecoder(
        fastseq.LSTMCell(I, H), None
    ),
    "inputs: expected .U, B, I., got .4, 3.": lambda d, x, m: d(x[..., 0], m),
    "inputs: expected a last size of 2": lambda d, x, m: d(x[..., :1], m),
    "memory: expected values of a size up to the input_size = 3": lambda d, x, m: decoder_of(
        fastseq.LSTMCell(K - 1, H)
    )(x, m),
    "inputs: expected the batch of the memory": lambda d, x, m: d(x[:, :2], m),
    "Expected sequence length to be larger than 0": lambda d, x, m: d(x[:0], m),
    "input: expected one step": lambda d, x, m: d.step(x, m),
    "memory: values, lengths and mask": lambda d, x, m: d(x, d.prepare(m), lengths=[1, 1, 1]),
    "teacher_forcing: expected probabilities": lambda d, x, m: sampled(d, m, teacher_forcing=1.5),
    "teacher_forcing: expected a number or .U,. = .4,.": lambda d, x, m: sampled(
        d, m, teacher_forcing=torch.ones(2)
    ),
    "choice: expected": lambda d, x, m: sampled(d, m, choice="best"),
    "tokens: expected integers": lambda d, x, m: d.forward_sampling(x, None, None, m),
}


def sampled(decoder, memory, **options):
    tokens = torch.zeros(U, B, dtype=torch.int64)
    return decoder.forward_sampling(tokens, None, None, memory, **options)


@pytest.mark.parametrize("words", DECODER_MISTAKES)
def test_mistakes_with_the_decoder(words):
    wrong = DECODER_MISTAKES[words]
    given = decoder_of(fastseq.LSTMCell(I + K, H)), torch.randn(U, B, I), torch.randn(S, B, K)
    with pytest.raises((ValueError, TypeError, RuntimeError), match=words):
        wrong(*given) if wrong.__code__.co_argcount else wrong()


def test_keys_repeat():
    prepared = PreparedKeys(torch.randn(2, S, K), torch.randn(2, S, V), torch.rand(2, S) < 0.5)
    for mine, one in zip(prepared.repeat(3), prepared, strict=True):
        assert mine.equal(torch.stack([one[0]] * 3 + [one[1]] * 3))


@full
@pytest.mark.parametrize("feed", [True, False])
@pytest.mark.parametrize("name", SCORES)
def test_compiled(name, feed):
    """Forward and backward as one graph each."""
    recurrent = fastseq.GRUCell(I + K, H) if feed else fastseq.GRU(I, H)
    decoder = AttentionDecoder(recurrent, Attention(H, K, name), feed_context=feed)
    inputs, memory = torch.randn(U, B, I), torch.randn(S, B, K, requires_grad=True)
    lengths = torch.tensor(LENGTHS)
    found = []
    for run in (decoder, torch.compile(decoder, fullgraph=True, backend="aot_eager")):
        outputs = run(inputs, memory, lengths=lengths)[0]
        found.append((outputs, *torch.autograd.grad(outputs.square().sum(), memory)))
    close(*found)
