"""The word models: Kneser-Ney's numbers, and what the networks read."""

from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from scripts import example

import fastseq


@pytest.fixture(scope="module")
def lm():
    return example("word_lm")


def smoothed(text, n, V):
    """p(word, context) by dictionaries, as Chen and Goodman write it: h is a tuple of n - 1."""
    text = [0] * (n - 1) + text

    def grams(k):
        """The k-grams that end at a word of the text."""
        return [tuple(text[j - k + 1 : j + 1]) for j in range(n - 1, len(text))]

    def counts(k):
        if k == n:
            return Counter(grams(n))
        before = defaultdict(set)
        for gram in grams(k + 1):
            before[gram[1:]].add(gram[0])
        return {gram: len(words) for gram, words in before.items()}

    tables = {k: counts(k) for k in range(1, n + 1)}

    def discount(k, c):
        times = Counter(tables[k].values())
        if c == 0:
            return 0
        if not all(times[j] for j in (1, 2, 3, 4)):
            return 0.5
        j, Y = min(c, 3), times[1] / (times[1] + 2 * times[2])
        return min(max(j - (j + 1) * Y * times[j + 1] / times[j], 0), j)

    def p(word, context):
        k = len(context) + 1
        lower = p(word, context[1:]) if context else 1 / V
        follow = {gram[-1]: c for gram, c in tables[k].items() if gram[:-1] == context}
        if not follow:
            return lower
        c, total = follow.get(word, 0), sum(follow.values())
        gamma = sum(discount(k, other) for other in follow.values()) / total
        return (c - discount(k, c)) / total + gamma * lower

    return p


def test_kneser_ney_by_hand(lm):
    """Of eos a b a b b, so small that every discount is one half. Two different words come before
    a, two before b, none before eos:
        p(b) = (2 - 1/2) / 4 + (1/2 + 1/2) / 4 * 1/3
        p(b | a) = (2 - 1/2) / 2 + (1/2) / 2 * p(b)
    """
    model = lm.KneserNey(np.array([1, 2, 1, 2, 2]), 2, 3)
    b = 1.5 / 4 + 1 / 4 / 3
    found = model.probabilities(np.array([1, 2]))
    assert found[1] == pytest.approx(1.5 / 2 + 0.5 / 2 * b, abs=1e-15)
    unseen = model.probabilities(np.array([1, 0]))[1]
    assert unseen == pytest.approx(0.5 / 2 * (1 / 4 / 3), abs=1e-15)
    assert len(model) == 4 + 2


def test_discounts_by_hand(lm):
    counts = np.array([1] * 4 + [2] * 2 + [3] + [4] + [9] * 3)  # Y = 4 / (4 + 2 * 2) = 1/2
    assert lm.discounts(counts).tolist() == [0, 1 - 2 / 2 * 2 / 4, 2 - 3 / 2 / 2, 3 - 4 / 2]
    assert lm.discounts(np.array([1, 1, 2])).tolist() == [0, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_kneser_ney_is_the_papers_and_sums_to_one(lm, n):
    random = np.random.default_rng(n)
    V = 15
    text = (random.geometric(0.2, 300) - 1).clip(max=V - 2)  # the last word is never met
    model = lm.KneserNey(text, n, V)
    assert any(np.ptp(order.kept % 1) > 0 for order in model.orders), "discounts that are no half"
    p = smoothed(text.tolist(), n, V)
    for context in random.integers(0, V, (25, n - 1)):
        found = [model.probabilities(np.append(context, word))[-1] for word in range(V)]
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert found == pytest.approx([p(w, tuple(context.tolist())) for w in range(V)], rel=1e-12)


def test_more_words_than_keys_are_refused(lm, capsys):
    with pytest.raises(ValueError, match="vocabulary: expected at most 55108 words for n = 4"):
        lm.KneserNey(np.arange(9), 4, 60_000)
    with pytest.raises(SystemExit):
        lm.main(["--vocabulary", "60000"])
    assert "--vocabulary: expected at most 55,108, got 60000" in capsys.readouterr().err


def test_words(lm):
    text = "It's 3.5 kB, isn't it?  Yes!\n\nNo full stop\n\n\n  os.path_x is `one`."
    found = "it's <num> <num> kb isn't it <eos> yes <eos> no full stop <eos> os path_x is one <eos>"
    assert lm.words(text) == found.split()
    assert lm.words("...") == []


def test_prose_is_docstrings_and_comments(lm, tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Doc.\n\n>>> 1 + 1\n2\n"""\n# A comment\n# goes on.\nx = "# no"  # nor this\n'
    )
    assert lm.prose(path) == "Doc.\n\n\n2\n\nA comment\ngoes on."


def test_a_text_of_ones_own_is_split_at_its_last_tenth(lm, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"w{k}" for k in range(99)))
    options = lm.arguments(["--text", str(path)])
    train, held_out = lm.read(options)
    assert train == [f"w{k}" for k in range(90)] and held_out[-2:] == ["w98", "<eos>"]
    with pytest.raises(SystemExit, match=r"the text has 90 items, too few for --batch 20"):
        lm.main(["--text", str(path)])
    with pytest.raises(SystemExit, match="No such file"):
        lm.main(["--text", str(tmp_path / "nowhere.txt")])


def test_the_vocabulary_is_of_the_most_frequent(lm):
    numbers = lm.vocabulary("b <eos> a b c b a <eos>".split(), 4)
    assert numbers == {"<eos>": 0, "<unk>": 1, "b": 2, "a": 3}
    assert lm.numbered("c b <eos>".split(), numbers).tolist() == [1, 2, 0]


def test_a_window_reads_the_words_before_across_calls(lm):
    window = lm.Window(3, 5, words=3)
    x = torch.randn(7, 2, 3)
    y, _ = window(x)
    assert torch.allclose(y[4], torch.tanh(window.hidden(torch.cat([x[2], x[3], x[4]], 1))))
    first, state = window(x[:1])
    rest, _ = window(x[1:], state)
    assert torch.allclose(torch.cat([first, rest]), y)


@pytest.mark.parametrize("layer", ["Window", "LSTM"])
def test_a_network_is_asked_the_same_words_as_an_n_gram(lm, layer, monkeypatch):
    """Each word after all before it, <eos> first, and chunks leave no seam."""
    made = lm.Window(4, 4, 3) if layer == "Window" else fastseq.LSTM(4, 4)
    model = lm.WordLM(made, 6, 0.5, tie=True)
    assert model.readout.weight is model.embedding.weight
    codes = np.arange(20) % 6
    whole = lm.probabilities(model, codes)
    monkeypatch.setattr(lm, "CHUNK", 7)
    assert lm.probabilities(model, codes) == pytest.approx(whole, rel=1e-5)
    model.eval()
    logits, _ = model(torch.from_numpy(np.append(0, codes))[:-1, None])
    rows = logits.log_softmax(2)[:, 0].detach().numpy()
    assert np.log(whole) == pytest.approx(rows[np.arange(20), codes], rel=1e-4)
    assert lm.perplexity(np.array([0.5, 0.125])) == pytest.approx(4)


def test_the_state_is_carried_and_its_gradient_is_not(lm):
    model = lm.WordLM(fastseq.GRU(4, 4), 6, 0.0, tie=False)
    text = torch.arange(9)[:, None] % 6
    batches = [(text[:4], text[1:5], True), (text[4:8], text[5:9], False)]
    loss = lm.Carried()
    losses = [loss(model, batch) for batch in batches]
    whole = lm.alone(model, (text[:8], text[1:9], True))
    assert torch.allclose(sum(losses) / 2, whole)
    assert not torch.allclose(lm.alone(model, batches[1]), losses[1])
    losses[1].backward()
    losses[0].backward()  # its graph is still there
