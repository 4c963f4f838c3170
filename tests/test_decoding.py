"""Decoding: beside an enumeration of all sequences, and over the states of every kind of layer."""

import itertools
import math
from collections import namedtuple

import numpy as np
import pytest
import torch

import fastseq
from fastseq.decoding import beam_search, greedy, nucleus, sample, take_rows
from fastseq.nn.attention import Attention
from fastseq.nn.attention_decoder import AttentionDecoder

END = 1
N, H = 4, 5  # vocabulary, units


@pytest.fixture
def model():
    """A step of a GRU, and what it takes: embedding, cell and readout."""
    embed = torch.nn.Embedding(N, 3).double()
    cell = fastseq.GRUCell(3, H, dtype=torch.float64)
    readout = torch.nn.Linear(H, N).double()
    with torch.no_grad():
        for module in (embed, cell, readout):
            for p in module.parameters():
                p.normal_()

    def step(tokens, state):
        state = cell(embed(tokens), state)
        return readout(state), state

    with torch.no_grad():
        yield step


def log_probability(step, start, state, sequence):
    """Of one sequence, token by token."""
    token, total = start.view(1), 0.0
    for chosen in sequence:
        logits, state = step(token, state)
        total += torch.log_softmax(logits, -1)[0, chosen].item()
        token = torch.tensor([chosen])
    return total


def all_sequences(length):
    """Those that end with END, and those of full length that do not."""
    others = [t for t in range(N) if t != END]
    for n in range(length):
        for begin in itertools.product(others, repeat=n):
            yield (*begin, END)
    yield from itertools.product(others, repeat=length)


def enumerated(step, start, state, length, alpha):
    """Score and tokens of all sequences, the best first."""
    found = []
    for sequence in all_sequences(length):
        score = log_probability(step, start, state, sequence)
        found.append((score / ((5 + len(sequence)) / 6) ** alpha, sequence))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("alpha", [0.0, 0.7, 3.0])
def test_a_wide_beam_is_exhaustive(model, alpha):
    start, state, length = torch.tensor([0, 2]), torch.randn(2, H).double(), 3
    width = (N - 1) ** length
    found = beam_search(
        model,
        start,
        state,
        beam_size=width,
        end=END,
        max_length=length,
        length_penalty=alpha,
        n_best=width,
    )
    for b in range(2):
        truth = enumerated(model, start[b], state[b : b + 1], length, alpha)
        for k, (score, sequence) in enumerate(truth[:width]):
            assert math.isclose(found.scores[b, k].item(), score, rel_tol=1e-9)
            n = found.lengths[b, k].item()
            assert tuple(found.tokens[b, k, :n].tolist()) == sequence
            assert (found.tokens[b, k, n:] == END).all()


def test_a_beam_that_is_too_wide_has_empty_places(model):
    """Of two tokens there are as many sequences as steps, and one of full length."""
    step = lambda tokens, state: (torch.zeros(len(tokens), 2), state)  # noqa: E731
    found = beam_search(step, torch.tensor([0]), beam_size=8, end=END, max_length=3, n_best=8)
    assert found.lengths[0].tolist() == [1, 2, 3, 3, 0, 0, 0, 0]
    assert found.scores[0, 4:].eq(-math.inf).all() and found.tokens[0, 4:].eq(END).all()
    step = lambda tokens, state: (torch.zeros(len(tokens), 1), state)  # noqa: E731
    found = beam_search(step, torch.tensor([0]), beam_size=3, end=0, max_length=3, n_best=2)
    assert found.lengths[0].tolist() == [1, 0]


@pytest.mark.parametrize("n_best", [1, 2])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_a_narrow_beam(alpha, n_best):
    """Beside a search in words: K open hypotheses, and finished ones apart, to the last step. Each
    of many sentences has probabilities of its own, of a token after another."""
    B, K, length = 30, 2, 6
    tables = torch.log_softmax(1.5 * torch.randn(B, N, N).double(), -1)
    start = torch.randint(N, (B,))

    def step(tokens, sentence):
        return tables[sentence, tokens], sentence

    given = {"beam_size": K, "end": END, "max_length": length, "n_best": n_best}
    given["length_penalty"] = alpha
    together = beam_search(step, start, torch.arange(B), **given)
    for b in range(B):
        alone = beam_search(step, start[b : b + 1], torch.arange(b, b + 1), **given)
        open_, finished = [(0.0, ())], []
        for n in range(1, length + 1):
            penalty = ((5 + n) / 6) ** alpha
            grown = [
                (total + tables[b, (start[b], *h)[-1], t].item(), (*h, t))
                for total, h in open_
                for t in range(N)
            ]
            grown = sorted(grown, reverse=True)[: 2 * K]
            finished += [(total / penalty, h) for total, h in grown if h[-1] == END]
            open_ = [(total, h) for total, h in grown if h[-1] != END][:K]
        finished += [(total / penalty, h) for total, h in open_]
        for k, (score, sequence) in enumerate(sorted(finished, reverse=True)[:n_best]):
            for found, at in ((together, b), (alone, 0)):  # which stops as soon as it may
                assert math.isclose(found.scores[at, k].item(), score, rel_tol=1e-9)
                n = found.lengths[at, k].item()
                assert tuple(found.tokens[at, k, :n].tolist()) == sequence


def test_a_beam_stops_when_nothing_can_enter():
    """The end is all but certain at the second step."""
    calls = []

    def step(tokens, state):
        calls.append(len(tokens))
        logits = torch.zeros(len(tokens), N)
        logits[:, END] = 50.0 if len(calls) == 2 else -50.0
        return logits, state

    found = beam_search(step, torch.tensor([0]), beam_size=2, end=END, max_length=50)
    assert calls == [2, 2] and found.lengths.item() == 2


def test_greedy_is_a_beam_of_one_without_ends(model):
    start, state = torch.tensor([0, 2, 3]), torch.randn(3, H).double()
    never = N - 1

    def step(tokens, state):
        logits, state = model(tokens, state)
        logits[:, never] = -math.inf
        return logits, state

    given = {"end": never, "max_length": 7}
    ours = greedy(step, start, state, **given)
    theirs = beam_search(step, start, state, beam_size=1, **given)
    assert ours.tokens.equal(theirs.tokens[:, 0]) and ours.lengths.tolist() == [7] * 3
    torch.testing.assert_close(ours.scores, theirs.scores[:, 0])


def test_greedy_ends(model):
    start, state = torch.arange(N), torch.randn(N, H).double()
    found = greedy(model, start, state, end=END, max_length=9)
    for b in range(N):
        n, tokens = found.lengths[b].item(), found.tokens[b].tolist()
        assert tokens.count(END) == 0 or tokens.index(END) == n - 1
        assert set(tokens[n:]) <= {END}
        truth = log_probability(model, start[b], state[b : b + 1], tokens[:n])
        assert math.isclose(found.scores[b].item(), truth, rel_tol=1e-9)
    assert len(set(found.lengths.tolist())) > 1  # some end before others


def drawn(logits, **options):
    """Shares of the first token, of 4000 draws."""
    step = lambda tokens, state: (logits.expand(len(tokens), -1), state)  # noqa: E731
    start = torch.zeros(4000, dtype=torch.int64)
    found = sample(step, start, end=END, max_length=1, **options)
    shares = (found.tokens == torch.arange(logits.shape[-1])).double().mean(0)
    truth = torch.log_softmax(logits, -1).expand(4000, -1).gather(1, found.tokens).squeeze(1)
    torch.testing.assert_close(found.scores, truth)
    return shares


def test_what_sample_draws():
    p = torch.tensor([0.4, 0.1, 0.3, 0.15, 0.05]).double()
    for options, kept, power in (
        ({}, [0, 1, 2, 3, 4], 1),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4], 2),
        ({"top_k": 2}, [0, 2], 1),
        ({"top_k": 9}, [0, 1, 2, 3, 4], 1),
        ({"top_p": 0.71}, [0, 2, 3], 1),
        ({"top_p": 0.01}, [0], 1),
        ({"top_p": 0.5, "temperature": 2.0}, [0, 2], 0.5),
        ({"top_k": 3, "top_p": 0.8}, [0, 2], 1),
    ):
        truth = torch.zeros(5).double()
        truth[kept] = p[kept] ** power
        shares = drawn(p.log(), **options)
        torch.testing.assert_close(shares, truth / truth.sum(), atol=0.04, rtol=0)
        assert set(shares.nonzero().flatten().tolist()) <= set(kept)


def test_a_nucleus_keeps_one_token_at_least():
    p = torch.tensor([[0.25, 0.25, 0.5], [1.0, 0.0, 0.0]])
    assert nucleus(p, 1e-30).tolist() == [[0, 0, 0.5], [1, 0, 0]]
    assert nucleus(p, 1.0).equal(p)


def test_sample_obeys_its_generator(model):
    start, state = torch.zeros(20, dtype=torch.int64), torch.randn(1, H).double().expand(20, -1)
    found = [
        sample(
            model,
            start,
            state,
            end=END,
            max_length=8,
            generator=torch.Generator().manual_seed(seed),
        )
        for seed in (3, 3, 4)
    ]
    assert found[0].tokens.equal(found[1].tokens)
    assert not torch.equal(found[0].tokens, found[2].tokens)


def test_scores_have_gradients():
    logits = torch.randn(1, N, requires_grad=True)
    step = lambda tokens, state: (logits.expand(len(tokens), -1), state)  # noqa: E731
    found = sample(step, torch.zeros(3, dtype=torch.int64), end=END, max_length=4)
    (gradient,) = torch.autograd.grad(found.scores.sum(), logits)
    counts = torch.zeros(N)
    for row, n in zip(found.tokens, found.lengths, strict=True):
        counts += torch.bincount(row[:n], minlength=N)
    torch.testing.assert_close(gradient[0], counts - counts.sum() * logits[0].softmax(-1).detach())


Pair = namedtuple("Pair", "h c")


def test_rows_of_any_nest():
    x, y = torch.arange(6).view(2, 3), torch.arange(12).view(3, 2, 2)
    rows = torch.tensor([1, 0, 1])
    found = take_rows({"a": (x, None, 7), "b": [Pair(y, x)]}, rows, {"a": 0, "b": [(1, None)]}, 2)
    assert found["a"][0].equal(x[rows]) and found["a"][1:] == (None, 7)
    assert type(found["b"][0]) is Pair
    assert found["b"][0].h.equal(y[:, rows]) and found["b"][0].c is x
    for dims in ((0, 0), {"a": 0}):
        with pytest.raises(ValueError, match="batch_dim"):
            take_rows({"a": x, "b": x} if isinstance(dims, dict) else (x,), rows, dims, 2)
    for dim in (2, -3, "0", True):
        with pytest.raises(ValueError, match="batch_dim"):
            take_rows(x, rows, dim, 2)
    with pytest.raises(ValueError, match=r"batch of 3 in dimension 0, got .* \(2, 3\); batch_dim="):
        take_rows(x, rows, 0, 3)


def test_the_states_of_a_layer_say_where_their_batch_is():
    layer = fastseq.LSTM(3, H)

    def step(tokens, state):
        y, state = layer(torch.zeros(1, len(tokens), 3), state)
        return y[0], state

    start = torch.zeros(2, dtype=torch.int64)
    given = {"beam_size": 2, "end": 1, "max_length": 3}
    state = torch.zeros(1, 2, H), torch.zeros(1, 2, H)
    assert beam_search(step, start, state, batch_dim=1, **given).tokens.shape[:2] == (2, 1)
    with pytest.raises(ValueError, match=r"state: expected a batch of 2 in dimension 0, .* layers"):
        beam_search(step, start, state, **given)


def test_numpy_counts_as_well():
    step = lambda tokens, state: (torch.arange(4.0).expand(len(tokens), 4), state)  # noqa: E731
    start = torch.zeros(2, dtype=torch.int64)
    for run, own in ((greedy, {}), (sample, {"top_k": 1}), (beam_search, {"beam_size": 2})):
        plain = {**own, "end": 3, "max_length": 2}
        found = run(step, start, **{k: np.int64(v) for k, v in plain.items()})
        assert torch.equal(found.tokens, run(step, start, **plain).tokens)


LAYERS = {
    "LSTM": lambda: fastseq.LSTM(3, H, num_layers=2, dtype=torch.float64),
    "GRU": lambda: fastseq.GRU(3, H, dtype=torch.float64),
    "IndRNN": lambda: fastseq.IndRNN(3, H, dtype=torch.float64),
    "SCRN": lambda: fastseq.SCRN(3, H - 2, context_size=2, dtype=torch.float64),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_beam_over_a_layer_and_its_handle(kind):
    layer, embed = LAYERS[kind](), torch.nn.Embedding(N, 3).double()
    readout = torch.nn.Linear(H, N).double()
    with torch.no_grad():
        for p in (*layer.parameters(), *readout.parameters()):
            p.normal_()
    K, B = 3, 2
    handle = fastseq.streaming(layer, batch=B * K)

    def by_layer(tokens, state):
        y, state = layer(embed(tokens).unsqueeze(0), state)
        return readout(y[0]), state

    def by_handle(tokens, state):
        handle.state = state
        return readout(handle.step(embed(tokens))), handle.state

    state = layer(torch.randn(4, B, 3).double())[1]
    given = {"beam_size": K, "end": END, "max_length": 6, "n_best": K, "batch_dim": 1}
    with torch.no_grad():
        one, other = (
            beam_search(step, torch.tensor([0, 2]), state, **given)
            for step in (by_layer, by_handle)
        )
        assert one.tokens.equal(other.tokens) and one.lengths.equal(other.lengths)
        torch.testing.assert_close(one.scores, other.scores)
        # each sentence as if it were alone, whose scores are those of its tokens
        for b in range(2):
            of = lambda s, b=b: s[:, b : b + 1]  # noqa: E731
            own = tuple(map(of, state)) if isinstance(state, tuple) else of(state)
            alone = beam_search(by_layer, torch.tensor([0, 2])[b : b + 1], own, **given)
            n = alone.tokens.shape[2]
            assert alone.tokens[0].equal(one.tokens[b, :, :n])
            length = one.lengths[b, 0].item()
            truth = log_probability(
                by_layer, torch.tensor([0, 2])[b], own, one.tokens[b, 0, :length].tolist()
            )
            assert math.isclose(one.scores[b, 0].item(), truth, rel_tol=1e-9)


def test_a_beam_over_a_decoder():
    decoder = AttentionDecoder(
        fastseq.LSTMCell(3 + 2, H, dtype=torch.float64), Attention(H, 2, dtype=torch.float64)
    )
    embed, readout = torch.nn.Embedding(N, 3).double(), torch.nn.Linear(H + 2, N).double()
    with torch.no_grad():
        for p in (*decoder.parameters(), *readout.parameters()):
            p.normal_()
    memory, lengths, K = torch.randn(4, 2, 2).double(), [4, 2], 3

    def over(prepared):
        def step(tokens, state):
            y, state, _ = decoder.step(embed(tokens), prepared, state)
            return readout(y), state

        return step

    start = torch.tensor([0, 2])
    with torch.no_grad():
        found = beam_search(
            over(decoder.prepare(memory, lengths=lengths).repeat(K)),
            start,
            beam_size=K,
            end=END,
            max_length=5,
        )
        for b in range(2):
            one = over(decoder.prepare(memory[:, b : b + 1], lengths=lengths[b : b + 1]))
            tokens = found.tokens[b, 0, : found.lengths[b, 0]].tolist()
            truth = log_probability(one, start[b], None, tokens)
            assert math.isclose(found.scores[b, 0].item(), truth, rel_tol=1e-9)


def test_reorder_instead_of_a_dimension(model):
    start, state = torch.tensor([0, 2]), torch.randn(2, H).double()
    given = {"beam_size": 3, "end": END, "max_length": 5}
    wrapped = lambda tokens, s: (lambda y: (y[0], [y[1]]))(model(tokens, s[0]))  # noqa: E731
    ours = beam_search(wrapped, start, [state], reorder=lambda s, rows: [s[0][rows]], **given)
    assert ours.tokens.equal(beam_search(model, start, state, **given).tokens)


def test_no_sequences(model):
    none, state = torch.zeros(0, dtype=torch.int64), torch.zeros(0, H).double()
    assert greedy(model, none, state, end=END, max_length=3).tokens.shape[0] == 0
    found = beam_search(model, none, state, beam_size=2, end=END, max_length=3, n_best=2)
    assert found.scores.shape == (0, 2)


START = torch.tensor([0])
MISTAKES = {
    "start: expected an int64": lambda s: greedy(s, START.float(), end=END, max_length=3),
    "end: expected at least 0": lambda s: greedy(s, START, end=-1, max_length=3),
    "end: expected one of 4 tokens": lambda s: greedy(s, START, end=4, max_length=3),
    "max_length: expected": lambda s: greedy(s, START, end=END, max_length=0),
    "step: expected it to return logits": lambda s: greedy(
        lambda t, state: (torch.zeros(3, 4), state), START, end=END, max_length=1
    ),
    "temperature: expected a finite number above 0, got 0": lambda s: sample(
        s, START, end=END, max_length=1, temperature=0.0
    ),
    "top_k: expected": lambda s: sample(s, START, end=END, max_length=1, top_k=0),
    "top_p: expected": lambda s: sample(s, START, end=END, max_length=1, top_p=0.0),
    "beam_size: expected": lambda s: beam_search(s, START, beam_size=0, end=END, max_length=1),
    "n_best: expected at most beam_size = 2": lambda s: beam_search(
        s, START, beam_size=2, n_best=3, end=END, max_length=1
    ),
    "length_penalty: expected": lambda s: beam_search(
        s, START, beam_size=2, length_penalty=-1.0, end=END, max_length=1
    ),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words):
    step = lambda tokens, state: (torch.zeros(len(tokens), N), state)  # noqa: E731
    with pytest.raises((ValueError, TypeError), match=words):
        MISTAKES[words](step)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30])
def test_the_least_temperature_takes_the_likeliest(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0, -torch.inf]]).expand(2, 4)
    found = sample(
        lambda tokens, state: (logits, state),
        torch.zeros(2, dtype=torch.int64),
        end=3,
        max_length=3,
        temperature=temperature,
    )
    assert (found.tokens == 1).all()
