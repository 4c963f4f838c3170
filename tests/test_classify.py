"""The parts of examples/classify.py: texts, batches, encoders, early stopping."""

import pytest
import torch
from scripts import example
from torch import nn

import fastseq

classify = example("classify")


def documents(*counts):
    """So many of each label: a, b, ..., each text once."""
    return [
        classify.Document(["word", label, f"n{k}"], label)
        for label, count in zip("abcdef", counts, strict=False)
        for k in range(count)
    ]


def test_docstrings_lose_their_packages_name():
    found = classify.docstrings(["json", "urllib"])
    assert {document.label for document in found} == {"json", "urllib"}
    for document in found:
        assert not any(document.label in word for word in document.words)
    text = [word for document in found if document.label == "urllib" for word in document.words]
    assert "http" in text and "url" in text, "other words stay"


def test_each_text_once_and_short_ones_never():
    given = [("a b c d", "x"), ("a b c e", "y"), ("a b", "x"), ("e f g", "y"), ("a b c d", "y")]
    found = classify.cleaned([classify.Document(t.split(), label) for t, label in given], 3)
    assert [(" ".join(d.words), d.label) for d in found] == [("a b c", "x"), ("e f g", "y")]


def test_the_three_parts_share_no_text_and_have_all_labels():
    corpus = classify.Corpus(documents(100, 40))
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.held_out)] == [114, 12, 14]
    for part in (corpus.train, corpus.valid, corpus.held_out):
        assert {label for _, label in part} == {0, 1}
    assert corpus.majority() == 10 / 14
    known = set(corpus.numbers)
    assert known == {"word", "a", "b", *(f"n{k}" for k in range(40))} & known
    assert {"word", "a", "b"} <= known and "n99" not in known, "what is there once is unknown"
    assert min(corpus.numbers.values()) > classify.UNKNOWN
    unknown = [words for words, _ in corpus.train if (words == classify.UNKNOWN).any()]
    assert unknown and max(int(words.max()) for words, _ in corpus.train) < corpus.vocabulary


def test_an_epoch_has_each_document_once_and_another_order_each_time():
    items = [(torch.arange(2, 12 + k % 7), k) for k in range(50)]
    generator = torch.Generator().manual_seed(0)
    orders, together = [], []
    for _ in range(2):
        batches = classify.epoch(items, 8, generator)
        orders.append(torch.cat([batch.labels for batch in batches]).tolist())
        assert sorted(orders[-1]) == list(range(50))
        together.append({frozenset(batch.labels.tolist()) for batch in batches})
        for batch in batches:
            assert batch.words.shape == (len(batch.labels), batch.lengths.max())
            for words, length, label in zip(*batch, strict=True):
                assert torch.equal(words[:length], items[label][0])
                assert (words[length:] == classify.PADDING).all()
    assert orders[0] != orders[1]
    assert together[0] != together[1], "other neighbours in a batch"


@pytest.mark.parametrize("name", classify.encoders(1, 1, None))
def test_padding_and_neighbours_change_no_answer(name):
    torch.manual_seed(0)
    model = classify.Classifier(classify.encoders(6, 5, None)[name](), 20, 6, 3).eval()
    texts = [(torch.randint(2, 20, (length,)), 0) for length in (1, 9, 2, 4)]
    batch = classify.batch_of(texts)
    together = model(batch.words, batch.lengths)
    for k, text in enumerate(texts):
        one = classify.batch_of([text])
        torch.testing.assert_close(model(one.words, one.lengths)[0], together[k])


def test_a_recurrent_encoder_gives_the_last_state_of_both_directions():
    layer = fastseq.LSTM(3, 4, bidirectional=True, batch_first=True)
    x = torch.randn(2, 5, 3)
    _, (h_n, _) = layer(x)
    found = classify.Recurrent(layer)(x, torch.tensor([5, 5]))
    torch.testing.assert_close(found, torch.cat([h_n[0], h_n[1]], 1))


def test_the_best_epoch_is_kept_and_idle_ones_end_it(monkeypatch):
    model = nn.Linear(1, 1, bias=False)
    known = iter([0.2, 0.5, 0.4, 0.5, 0.3])
    monkeypatch.setattr(classify, "answers", lambda *_: [])
    monkeypatch.setattr(classify, "accuracy", lambda *_: next(known))
    watch = classify.Watch(model, [], 1)
    idle = []
    for step in range(5):
        nn.init.constant_(model.weight, step)
        watch.look(step)
        idle.append(watch.idle)
    assert idle == [False, False, False, False, True], "as good as before is no better"
    assert watch.best["weight"].item() == 1


def test_the_most_frequent_mistakes():
    corpus = classify.Corpus(documents(100, 100))
    wrong = [1 - label if k < 12 else label for k, (_, label) in enumerate(corpus.held_out)]
    result = classify.Result("m", nn.Linear(1, 1), [1.0], [0.4], 1.0, wrong, 0.4)
    assert classify.confused(result, corpus) == "a taken for b (10), b taken for a (2)"


def test_a_table_of_texts(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"One, two!",good\n\nThree_4 é,bad\n', encoding="utf-8")
    assert classify.table_of_texts(path) == [
        (["one", ",", "two", "!"], "good"),
        (["three", "4", "é"], "bad"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\nonly one\n", r"row 2: expected text,label, got 1 fields"),
        ("one two three,a\n" * 30, r"at least 2 labels and 20 texts; there are 1 labels"),
    ],
)
def test_mistakes_in_a_table(text, message, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        classify.main(["--csv", str(path)])


def test_mistakes_on_the_command_line(capsys, tmp_path):
    with pytest.raises(SystemExit, match=r"--models: expected some of CBOW, .*; got 'SVM'"):
        classify.main(["--models", "SVM"])
    with pytest.raises(SystemExit, match=r"--csv .*nowhere.csv: .*No such file"):
        classify.main(["--csv", str(tmp_path / "nowhere.csv")])
    with pytest.raises(SystemExit):
        classify.main(["--packages", "no_such"])
    assert "--packages: the standard library has no package 'no_such'" in capsys.readouterr().err
