"""The arithmetic of examples/embeddings.py and examples/forecast.py, against plain loops."""

import math

import pytest
import torch
from scripts import example

words = example("embeddings")
forecast = example("forecast")


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# Word vectors


def test_identifiers_are_split_into_words():
    text = "class HTTPServer: max_lineLength2 = 'UTF8'"
    assert words.words_of(text) == "class http server max line length utf".split()


def test_a_vocabulary_is_frequent_words_and_a_stream_has_breaks():
    texts = [["a"] * 9 + ["rare"], ["b"] * 6 + ["a"], ["c"] * 7]
    vocabulary = words.Vocabulary(texts, 2)
    assert vocabulary.words == ["a", "c"] and vocabulary.counts.tolist() == [10, 7]
    assert vocabulary.stream(texts[1:]).tolist() == [0, words.BREAK, *[1] * 7, words.BREAK]
    assert words.Vocabulary(texts, 9).words == ["a", "c", "b"], "rare words have no vector"


@pytest.mark.parametrize("harmonic", [False, True])
def test_words_stand_together_within_the_window_and_the_file(harmonic):
    texts = [[0, 1, 2, 1, 1], [2, 0]]
    stream = torch.tensor([k for text in texts for k in [*text, words.BREAK]])
    expected = torch.zeros(3, 3)
    for text in texts:
        for i, a in enumerate(text):
            for j, b in enumerate(text):
                if 0 < abs(i - j) <= 2:
                    expected[a, b] += 1 / abs(i - j) if harmonic else 1
    torch.testing.assert_close(words.cooccurrence(stream, 3, 2, harmonic=harmonic), expected)


def test_mutual_information_by_hand():
    x = torch.tensor([[0.0, 3.0, 1.0], [3.0, 1.0, 0.0], [1.0, 0.0, 4.0]])
    rows, total = [4, 4, 5], 13
    smooth = [row**0.75 for row in rows]
    for a in range(3):
        for b in range(3):
            p, q = rows[a] / total, smooth[b] / sum(smooth)
            found = x[a, b].item() / total / (p * q)
            expected = math.log(found) if found else 0.0
            assert words.pmi(x)[a, b].item() == pytest.approx(expected, abs=1e-6)
    assert words.pmi(x)[1, 1] < 0 < words.pmi(x)[0, 1]


def test_singular_vectors_give_the_matrix_back():
    torch.manual_seed(0)
    half = torch.randn(12, 3)
    x = half @ half.t()
    found = words.svd_vectors(x, 3)
    torch.testing.assert_close(found @ found.t(), x, rtol=1e-4, atol=1e-4)


def test_gloves_objective_is_the_papers_sum(monkeypatch):
    monkeypatch.setattr(words, "X_MAX", 4.0)
    torch.manual_seed(0)
    x = torch.tensor([[0.0, 8.0, 1.0], [8.0, 0.0, 0.5], [1.0, 0.5, 2.0]])
    model = words.GloVe(x, 2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    rows = torch.tensor([2, 0])
    expected = 0.0
    for a in rows.tolist():
        for b in range(3):
            if x[a, b] > 0:
                weight = min(1.0, x[a, b].item() / 4) ** 0.75
                guess = model.w[a] @ model.c[b] + model.b[a, 0] + model.d[b]
                expected = expected + 0.5 * weight * (guess - math.log(x[a, b])) ** 2
    expected = expected / 2
    torch.testing.assert_close(words.glove_loss(model, rows), expected)
    ours = torch.autograd.grad(words.glove_loss(model, rows), list(model.parameters()))
    plain = torch.autograd.grad(expected, list(model.parameters()))
    torch.testing.assert_close(ours, plain)


def test_gloves_batches_are_all_rows_in_turn(monkeypatch):
    monkeypatch.setattr(words, "ROWS", 3)
    batches = words.rows_in_turn(7)
    for _ in range(2):
        seen = torch.cat([next(batches) for _ in range(3)])
        assert sorted(seen.tolist()) == list(range(7))


def test_words_are_drawn_by_three_quarter_powers_and_frequent_ones_thinned_out():
    counts = torch.tensor([81.0, 16.0, 3.0])
    powers = [81**0.75, 16**0.75, 3**0.75]
    expected = torch.tensor([power / sum(powers) for power in powers])
    torch.testing.assert_close(words.noise(counts), expected)
    kept = words.keep_chance(counts, 0.09)
    torch.testing.assert_close(kept, torch.tensor([(0.09 / 0.81) ** 0.5, 0.75, 1.0]))

    torch.manual_seed(0)
    stream = torch.tensor([0] * 8100 + [1] * 1600 + [2] * 300)
    stream = stream[torch.randperm(len(stream))]
    batches = words.position_batches(stream, counts, 1, 0.09)
    epoch = 8100 / 3 + 1600 * 0.75 + 300
    seen, drawn = [], []
    while sum(map(len, seen)) < epoch * 0.97:
        word, _, noise = next(batches)
        seen.append(word)
        drawn.append(noise)
    share = torch.bincount(torch.cat(seen)) / sum(map(len, seen))
    torch.testing.assert_close(
        share, torch.tensor([2700.0, 1200.0, 300.0]) / epoch, rtol=0, atol=0.03
    )
    share = torch.bincount(torch.cat(drawn)) / sum(map(len, drawn))
    torch.testing.assert_close(share, expected, rtol=0, atol=0.06)


def test_what_stands_around_a_word():
    torch.manual_seed(0)
    stream = torch.tensor([0, 1, 2, 3, words.BREAK, 4, 5, words.BREAK, 6, words.BREAK])
    texts = [[0, 1, 2, 3], [4, 5], [6]]
    reached = set()
    for _ in range(30):
        centres, around = words.positions(stream, 2)
        assert centres.tolist() == [0, 1, 2, 3, 4, 5], "6 stands alone"
        for centre, row in zip(centres.tolist(), around.tolist(), strict=True):
            text = next(text for text in texts if centre in text)
            near = {k for k in text if abs(k - centre) == 1}
            far = {k for k in text if abs(k - centre) == 2}
            found = {k for k in row if k != words.BREAK}
            assert found in (near, near | far)
            reached.add((centre, found == near | far))
    assert {(1, True), (1, False)} <= reached, "how far a window reaches is drawn"


@pytest.mark.parametrize("kind", ["skip_gram", "cbow"])
def test_word2vecs_losses_are_the_papers_sums(kind):
    torch.manual_seed(0)
    model = words.Word2Vec(6, 3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    off = words.BREAK
    centres = torch.tensor([0, 3])
    around = torch.tensor([[1, 2, off, 4], [off, 5, off, off]])
    drawn = torch.tensor([2, 2, 5])
    total, count = 0.0, 0
    for word, row in zip(centres.tolist(), around.tolist(), strict=True):
        row = [k for k in row if k != off]
        if kind == "skip_gram":
            pairs = [(model.v[word], c) for c in row]
        else:
            pairs = [(sum(model.v[c] for c in row) / len(row), word)]
        for v, predicted in pairs:
            total -= math.log(sigmoid((v @ model.u[predicted]).item()))
            for n in drawn.tolist():
                wrong = math.log(sigmoid(-(v @ model.u[n]).item()))
                total -= words.NEGATIVES * wrong / len(drawn)
            count += 1
    loss = getattr(words, f"{kind}_loss")(model, (centres, around, drawn))
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_scores_count_what_is_right():
    # On a circle, by degrees: b - a turns c as far as it turns a. Ten more words lie far away.
    degrees = torch.tensor([0.0, 10.0, 50.0, 60.0, *range(180, 190)])
    turn = degrees * math.pi / 180
    vectors = torch.stack([turn.cos(), turn.sin()], 1) * torch.arange(1.0, 15)[:, None]
    assert words.nearest(vectors, vectors[[0]], torch.tensor([[0]]), 2).tolist() == [[1, 2]]
    questions = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]])
    assert words.analogies_solved(vectors, questions) == 0.5
    assert words.analogies_solved(vectors, questions[:0]) == 0.0, "no question has its words"
    pairs = torch.tensor([[0, 1], [2, 3], [0, 4]])  # 4 is opposite 0, farther than ten others
    assert words.forms_found(vectors, pairs) == pytest.approx(2 / 3)


def test_plurals_and_past_tenses_of_words_seen_often():
    often = ["file", "files", "use", "used", "call", "called", "is", "iss", "note"]
    texts = [often * words.SEEN + ["notes"] * (words.SEEN - 1)]
    vocabulary = words.Vocabulary(texts, 100)
    found = {tuple(vocabulary.words[k] for k in pair) for pair in words.form_pairs(vocabulary)}
    assert found == {("file", "files"), ("use", "used"), ("call", "called")}


def test_agreement_is_spearmans_rank_correlation():
    torch.manual_seed(0)
    x = 20 * torch.rand(12, 12)
    x = x + x.t()
    x[0, 1] = x[1, 0] = words.RARE - 0.1  # too rare to count
    vectors = torch.randn(12, 4)
    pairs = [(a, b) for a in range(12) for b in range(a + 1, 12) if x[a, b] >= words.RARE]
    assert 20 < len(pairs) < 66
    cosine = [torch.cosine_similarity(vectors[a], vectors[b], 0).item() for a, b in pairs]
    mutual = [words.pmi(x)[a, b].item() for a, b in pairs]
    apart = [
        sorted(cosine).index(c) - sorted(mutual).index(m)
        for c, m in zip(cosine, mutual, strict=True)
    ]
    n = len(pairs)
    expected = 1 - 6 * sum(d * d for d in apart) / (n * (n * n - 1))
    assert words.held_out_agreement(vectors, x) == pytest.approx(expected)


def test_held_out_loss_is_the_mean_over_passages():
    torch.manual_seed(0)
    stream = torch.randint(7, (70 * (words.BPTT + 1) + 5,))
    stream[40] = words.BREAK
    cut = words.passages(stream)
    assert cut.shape == (70, words.BPTT + 1)
    assert cut.flatten().tolist() == stream[stream != words.BREAK][: cut.numel()].tolist()
    model = words.WordLM(torch.randn(7, 3), 4, None)
    each = [words.lm_loss(model, passage[:, None]).item() for passage in cut]
    assert words.held_out_loss(model, cut) == pytest.approx(sum(each) / 70, rel=1e-5)


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("word " * 5, [], "the text has 5 words; expected at least 1000"),
        ("word " * 1000, [], "1 words occur 5 times or more; expected more than 64 for --d"),
    ],
)
def test_a_text_that_is_too_short(text, argv, message, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        words.main(["--text", str(path), "--out", str(tmp_path), *argv])
    assert list(tmp_path.iterdir()) == [path], "nothing was computed"


# Forecasts


def csv_file(folder, *lines):
    path = folder / "series.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_columns_of_a_csv_file(tmp_path):
    path = csv_file(tmp_path, "\ufeffload,day,wind", '1,a,"2"', "", "3e1,b,-4.5")
    assert forecast.read_csv(path, ["wind", "load"]).tolist() == [[2, 1], [-4.5, 30]]


@pytest.mark.parametrize(
    ("lines", "argv", "message"),
    [
        (["a,b", "1,2"], ["--column", "c"], "no column 'c'; expected one of a, b"),
        ([], ["--column", "c"], "expected a header with the columns' names, got an empty"),
        (["a", *"12345", "six"], ["--column", "a"], "line 7, column 'a': .* got 'six'"),
        (["a,b", "1,2", "3"], ["--column", "a", "b"], "line 3, column 'b': .* got ''"),
        (["a", "inf"], ["--column", "a"], "line 2, column 'a': .* got 'inf'"),
        (["a", *"1234"], ["--column", "a"], "the series has 4 values; expected at least 180"),
        (["a", *["7"] * 200], ["--column", "a"], "column 1 of the series: expected values that d"),
        (["a", *"12" * 200], ["--column", "a", "--period", "200"], "--period 200: expected at mo"),
    ],
)
def test_a_wrong_csv_file_is_told_in_a_sentence(lines, argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(forecast, "Forecaster", None)
    path = csv_file(tmp_path, *lines)
    with pytest.raises(SystemExit, match=message):
        forecast.main(["--csv", str(path), *argv])


@pytest.mark.parametrize("argv", [["--csv", "x.csv"], ["--column", "a"], ["--window", "8"]])
def test_options_that_lack_another(argv, capsys):
    with pytest.raises(SystemExit):
        forecast.main(argv)
    assert argv[0] in capsys.readouterr().err


def test_the_scaler_sees_the_training_part_alone():
    torch.manual_seed(0)
    series = torch.randn(200, 2, dtype=torch.float64)
    parts = forecast.parts_of(series, 20, 5)
    other = series.clone()
    other[parts.train :] *= 100
    changed = forecast.parts_of(other, 20, 5)
    assert torch.equal(parts.x[: parts.train], changed.x[: parts.train])
    known = parts.x[: parts.train]
    torch.testing.assert_close(known.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(known.std(0), torch.ones(2))


def test_what_is_forecast_lies_in_its_part():
    parts = forecast.Parts(torch.arange(100.0)[:, None], 60, 70)
    for part, first, last in (("valid", 60, 69), ("test", 70, 99)):
        seen = forecast.future(parts.x, parts.origins(part, 4), 4)
        assert seen.shape[1:] == (4, 1) and (seen.min(), seen.max()) == (first, last)
        assert (seen[:, 0, 0] == parts.origins(part, 4) + 1).all()


def forecasters():
    """By name: a function of a series (T, C), origins and a horizon."""
    torch.manual_seed(0)
    model = forecast.Forecaster(forecast.fastseq.GRU(2, 3), 5)
    weights = torch.tensor([[0.5, 0.3, 0.1], [0.2, -0.3, 0.0]])
    return {
        "naive": forecast.naive,
        "seasonal": lambda x, at, h: forecast.seasonal_naive(x, at, h, 3),
        "linear": lambda x, at, h: forecast.linear(x, at, h, weights),
        "gru": lambda x, at, h: model.forecasts(x, at),
    }


@pytest.mark.parametrize("name", ["naive", "seasonal", "linear", "gru"])
def test_no_forecast_knows_what_comes_after_its_origin(name):
    torch.manual_seed(0)
    x, origins = torch.randn(30, 2), torch.arange(10, 20)
    found = forecasters()[name](x, origins, 5)
    assert found.shape == (10, 5, 2)
    for k, origin in enumerate(origins.tolist()):
        later = x.clone()
        later[origin + 1 :] += 7
        torch.testing.assert_close(forecasters()[name](later, origins, 5)[k], found[k])
        before = x.clone()
        before[: origin + 1] += 7
        again = forecasters()[name](before, origins, 5)[k]
        assert not torch.allclose(again, found[k]), "and each knows what comes before"


def test_simple_forecasts_by_hand():
    x, origins = torch.arange(20.0)[:, None], torch.tensor([9])
    assert forecast.naive(x, origins, 3)[0, :, 0].tolist() == [9, 9, 9]
    assert forecast.seasonal_naive(x, origins, 5, 2)[0, :, 0].tolist() == [8, 9, 8, 9, 8]
    line = torch.tensor([[2.0, -1.0, 0.0]])  # twice the last less the one before: a straight line
    assert forecast.linear(x, origins, 3, line)[0, :, 0].tolist() == [10, 11, 12]


def test_the_autoregression_finds_the_recursion_that_made_a_series():
    weights = torch.tensor([[1.5, -0.9, 0.25], [0.3, 0.6, -0.5]])
    x = torch.tensor([[1.0, 2.0], [0.5, -1.0]])
    for _ in range(40):
        following = (weights[:, :2] * x[-2:].flip(0).t()).sum(1) + weights[:, 2]
        x = torch.cat([x, following[None]])
    torch.testing.assert_close(forecast.fit_linear(x, 2), weights, rtol=1e-3, atol=1e-4)


def test_the_period_is_found():
    steps = torch.arange(240.0)
    wave = torch.stack([(steps * 2 * math.pi / 24).sin(), (steps * 2 * math.pi / 24).cos()], 1)
    torch.manual_seed(0)
    assert forecast.period_of(wave + 0.3 * torch.randn_like(wave)) in (23, 24, 25)
    assert forecast.period_of(steps[:, None]) < 80, "a line has none: a lag, and no error"


def test_errors_are_scaled_by_the_naive_ones():
    truth = torch.zeros(2, 2, 2)
    forecasts = torch.tensor([[[1.0, 4.0], [2.0, 0.0]], [[-3.0, 0.0], [0.0, 0.0]]])
    mase, rmse = forecast.errors(forecasts, truth, torch.tensor([2.0, 4.0]))
    assert mase.tolist() == [(2 / 2 + 2 / 4) / 2, (1 / 2 + 0) / 2]
    expected = [(5**0.5 + 8**0.5) / 2, (2**0.5 + 0) / 2]
    assert rmse.tolist() == pytest.approx(expected)
