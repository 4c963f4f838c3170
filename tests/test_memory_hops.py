"""End-to-end memory networks: beside the equations word by word, in float64."""

import copy

import pytest
import torch
from problems import full
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from fastseq.nn.memory import MemoryHops

N, D, K, M, B, W = 9, 4, 3, 6, 3, 5
LENGTHS = [4, 0, 2]
OPTIONS = {
    "plain": {},
    "layer-wise": {"tying": "layer_wise"},
    "no position": {"position_encoding": False},
    "no time": {"temporal_encoding": False, "tying": "layer_wise"},
    "linear": {"linear_start": True},
    "padding": {"padding_idx": 3},
    "no padding": {"padding_idx": None},
}


def made(**options):
    model = MemoryHops(N, D, K, M, dtype=torch.float64, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    return model


@pytest.fixture
def story():
    sentences, question = torch.randint(N, (B, 4, W)), torch.randint(N, (B, 3))
    sentences[0, 1] = 0  # a sentence of no words
    return sentences, question


def bag(model, tokens, table):
    """Of one sentence, by the paper's formula."""
    words = [t for t in tokens.tolist() if t != model.padding_idx]
    J, total = len(words), table.new_zeros(D)
    for j, word in enumerate(words, 1):
        for k in range(1, D + 1):
            part = (1 - j / J) - (k / D) * (1 - 2 * j / J) if model.position_encoding else 1
            total[k - 1] += part * table[word, k - 1]
    return total


def answered(model, sentences, question):
    """Logits and weights (K, M) of one story."""
    adjacent = model.tying == "adjacent"
    u = bag(model, question, model.tables[0] if adjacent else model.table_question)
    weights = []
    for hop in range(K):
        a, c = (hop, hop + 1) if adjacent else (0, 1)
        memories = []
        for at in (a, c):
            rows = []
            for i, sentence in enumerate(sentences):
                row = bag(model, sentence, model.tables[at])
                if model.temporal_encoding:
                    row = row + model.times[at, len(sentences) - 1 - i]
                rows.append(row)
            memories.append(torch.stack(rows) if rows else u.new_zeros(0, D))
        p = memories[0] @ u
        p = p if model.linear_start else p.softmax(0)
        u = p @ memories[1] + (u if adjacent else model.weight_hop @ u)
        weights.append(p)
    answer = model.tables[-1] if adjacent else model.weight_answer
    return answer @ u, torch.stack(weights)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_hops_are_the_papers(options, story):
    model = made(**options)
    sentences, question = story
    for lengths in (LENGTHS, None):
        logits, weights = model(sentences, question, lengths)
        for b in range(B):
            n = sentences.shape[1] if lengths is None else lengths[b]
            theirs = answered(model, sentences[b, :n], question[b])
            torch.testing.assert_close((logits[b], weights[:, b, :n]), theirs)
            assert not weights[:, b, n:].any()
    features, _ = model.features(sentences, question)
    answer = model.tables[-1] if model.tying == "adjacent" else model.weight_answer
    torch.testing.assert_close(features @ answer.T, logits)


@pytest.mark.parametrize("options", [{}, {"tying": "layer_wise"}])
def test_derivatives_of_the_hops(options):
    model = MemoryHops(4, 2, 2, 3, dtype=torch.float64, **options)
    names = [n for n, _ in model.named_parameters()]
    sentences, question = torch.randint(4, (2, 3, 3)), torch.randint(4, (2, 2))

    def run(*weights):
        given = dict(zip(names, weights, strict=True))
        return functional_call(model, given, (sentences, question, [3, 0]))

    assert gradcheck(run, tuple(model.parameters()))
    assert gradgradcheck(run, tuple(model.parameters()), fast_mode=True)


def test_linear_start_ends(story):
    model = made(linear_start=True)
    model.linear_start = False
    assert torch.allclose(model(*story)[1].sum(-1), torch.ones((), dtype=torch.float64))


def test_types_copies_and_nothing(story):
    model = MemoryHops(N, D)
    theirs = model(*story)
    fresh = MemoryHops(N, D)
    fresh.load_state_dict(copy.deepcopy(model).state_dict())
    torch.testing.assert_close(fresh(*story), theirs)
    half = copy.deepcopy(model).bfloat16()(*story)[0]
    torch.testing.assert_close(half.float(), theirs[0], atol=0.05, rtol=0.05)
    sentences, question = story
    for given in (
        (sentences[:0], question[:0]),
        (sentences[:, :0], question),
        (sentences[..., :0], question[:, :0]),
    ):
        logits = model(*given)[0]
        assert logits.shape == (len(given[0]), N)
        logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


STORY = torch.zeros(2, 3, 4, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)
MISTAKES = {
    "hops: expected at least 1, got 0": lambda m, s, q: MemoryHops(N, D, 0),
    "tying: expected": lambda m, s, q: MemoryHops(N, D, tying="none"),
    "padding_idx: expected one of 9": lambda m, s, q: MemoryHops(N, D, padding_idx=9),
    "sentences: expected integers": lambda m, s, q: m(s.float(), q),
    "sentences: expected .B, M, W.": lambda m, s, q: m(q, q),
    "question: expected the batch": lambda m, s, q: m(s, q[:1]),
    "lengths: expected values from 0": lambda m, s, q: m(s, q, [4, 1]),
    "sentences: expected at most memory_size = 2": lambda m, s, q: MemoryHops(N, D, 1, 2)(s, q),
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes(words):
    with pytest.raises((ValueError, TypeError), match=words):
        MISTAKES[words](MemoryHops(N, D), *STORY)


@full
def test_compiled(story):
    model = made()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        logits, weights = run(*story, torch.tensor(LENGTHS))
        found.append((logits, weights, *torch.autograd.grad(logits.square().sum(), model.tables)))
    torch.testing.assert_close(*found)
