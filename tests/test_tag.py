"""What examples/tag.py counts and reads: spans, their score, roles of names, files in columns."""

import argparse

import pytest
import torch
from scripts import example

tag = example("tag")

TAGS = ["B-a", "I-a", "O", "I-b", "B-b", "I-a", "I-a", "O"]
SPANS = [("a", 0, 2), ("b", 3, 4), ("b", 4, 5), ("a", 5, 7)]


def test_spans_as_conll_counts_them():
    assert tag.spans(TAGS) == SPANS
    assert tag.spans([]) == tag.spans(["O"]) == []
    clean = ["B-a", "I-a", "O", "B-b", "B-b", "B-a", "I-a", "O"]
    assert tag.tags_of(tag.spans(TAGS), 8) == clean and tag.spans(clean) == SPANS


def test_a_score_counts_whole_spans():
    truth = [["B-a", "I-a", "O", "B-b"], ["O", "B-a"]]
    given = [["B-a", "O", "O", "B-b"], ["O", "B-b"]]
    score = tag.Score.of(given, truth)
    assert score.accuracy == pytest.approx(4 / 6)
    assert score.f1 == pytest.approx(2 * 1 / (3 + 3))  # of three on both sides one is the same
    assert tag.Score.of(truth, truth) == (1, 1)
    assert tag.Score.of([["O"]], [["O"]]).f1 == 0


CODE = '''\
from os.path import join as glue
import a.b
@tool.wraps(f)
async def read(self, n: int = 3, *rest):
    """Text."""
    self.é.size, x = glue(n)(f"{n} {self.x}").strip(sep=n)
    return None
class Deep: pass
'''
ALOUD = """\
from [os path]import import [join]import as [glue]store <line>
import [a b]import <line>
[tool wraps]call [f]read <line>
async def [read]def [self]parameter [n]parameter [int]read <num> \
[rest]parameter <line>
<str> <line>
[self é size]store [x]store [glue]call [n]read <str> [strip]call [sep]keyword [n]read <line>
return None <line>
class [Deep]class pass <line>"""


def test_python_is_read_aloud(tmp_path):
    path = tmp_path / "code.py"
    path.write_text(CODE, encoding="utf-8")
    (sample,) = tag.aloud(path, 1000)
    found = tag.bracketed(*sample).replace("<line> ", "<line>\n")
    assert found == ALOUD
    pieces = tag.aloud(path, 12)  # of which the lines with more words are left out
    assert all(len(piece.words) <= 12 for piece in pieces)
    assert [word for piece in pieces for word in piece.words][:6] == sample.words[:6]


def test_sentences_in_columns(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("-DOCSTART- -X- O O\n\n" + "EU NNP I-ORG\nin IN O\nJ. N I-PER\n\n" * 10)
    found = tag.columns(path)
    assert found == [(["EU", "in", "J."], ["B-ORG", "O", "B-PER"])] * 10
    options = argparse.Namespace(file=path, held_out=None)
    train, held_out = tag.read(options)
    assert (len(train), len(held_out)) == (9, 1)


@pytest.mark.parametrize(
    "text, words",
    [
        ("EU B-ORG\nin\n", "line 2: expected a word and its tag, got 'in'"),
        ("EU NNP\n", "line 1: expected a tag as O, B-PER or I-PER in the last column, got 'NNP'"),
        ("EU B-ORG\n", "expected at least 10 sentences in columns, got 1"),
        (None, "name a text file that can be read"),
    ],
)
def test_a_wrong_file_is_told_in_a_sentence(tmp_path, text, words):
    path = tmp_path / "wrong.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=words):
        tag.main(["--file", str(path), "--out", str(tmp_path)])


def test_held_out_wants_a_file_beside_it(tmp_path):
    with pytest.raises(SystemExit, match="--held-out: expected --file beside it"):
        tag.main(["--held-out", str(tmp_path / "test.txt")])


def test_the_most_frequent_tag():
    train = [tag.Sample(["a", "b", "a"], ["O", "B-x", "B-x"]), tag.Sample(["a"], ["O"])]
    assert tag.most_frequent(train, [tag.Sample(["b", "a", "new"], [])]) == [["B-x", "O", "O"]]


def test_a_window_sees_its_neighbours_alone():
    torch.manual_seed(0)
    window, x = tag.Window(3, 4), torch.randn(9, 2, 3)
    y, changed = window(x), x.clone()
    changed[4, 1] += 1
    differs = (window(changed) != y).any(2)
    assert differs[:, 1].tolist() == [2 <= t <= 6 for t in range(9)] and not differs[:, 0].any()
    alone = torch.cat([torch.zeros(6), x[:3, 0].flatten()])  # of the first word
    torch.testing.assert_close(y[0, 0], torch.tanh(window.hidden(alone)))


def test_what_a_batch_has_beyond_the_lengths_counts_for_nothing():
    torch.manual_seed(0)
    labels = ["B-x", "I-x", "O"]
    options = argparse.Namespace(hidden=4, dropout=0.0, backend=None)
    samples = [tag.Sample(["a", "b", "c"], ["B-x", "I-x", "O"]), tag.Sample(["d"], ["O"])]
    pairs = tag.encoded(samples, labels)
    for layers in tag.READERS.values():
        for crf in (False, True):
            model = tag.Tagger(labels, layers, crf, options)
            single = [tag.loss(model, tag.collated([pair])) for pair in pairs]
            both = tag.loss(model, tag.collated(pairs))
            torch.testing.assert_close(both, (3 * single[0] + single[1]) / 4)
            assert [len(tags) for tags in tag.tagged(model, pairs, labels)] == [3, 1]
