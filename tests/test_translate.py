"""Dates and tokens of examples/translate.py, and its models in a padded batch."""

import argparse
import datetime
import itertools
import re

import pytest
import torch
from scripts import example

translate = example("translate")
DAY = datetime.date(1999, 3, 3)


def value(words):
    """Of a number in words, by adding up."""
    units = {word: n for n, word in enumerate(translate.UNITS)}
    units |= {word: 10 * n for n, word in enumerate(translate.TENS, 2)}
    total = open_ = 0
    for word in re.findall("[a-z]+", words):
        if word in ("hundred", "thousand"):
            total, open_ = total + open_ * {"hundred": 100, "thousand": 1000}[word], 0
        elif word != "and":
            open_ += units[word]
    return total + open_


def test_numbers_in_words():
    assert translate.number_words(4007) == "four thousand and seven"
    assert translate.number_words(1999) == "one thousand nine hundred and ninety-nine"
    assert translate.number_words(2300) == "two thousand three hundred"
    assert all(value(translate.number_words(n)) == n for n in range(0, 10000, 7))


def test_ordinals_in_words():
    found = [translate.ordinal_words(n) for n in (1, 2, 3, 4, 5, 8, 9, 12, 13, 20, 21, 30, 32)]
    assert found == (
        "first second third fourth fifth eighth ninth twelfth thirteenth twentieth twenty-first "
        "thirtieth thirty-second"
    ).split(" ")
    shown = [f"{n}{translate.suffix(n)}" for n in (1, 2, 3, 4, 11, 12, 13, 21, 22, 23, 31)]
    assert shown == "1st 2nd 3rd 4th 11th 12th 13th 21st 22nd 23rd 31st".split(" ")


@pytest.mark.parametrize(
    "year, words",
    [
        (1999, "nineteen ninety-nine"),
        (1905, "nineteen oh five"),
        (1900, "nineteen hundred"),
        (2000, "two thousand"),
        (2009, "two thousand and nine"),
        (2010, "twenty ten"),
        (2049, "twenty forty-nine"),
    ],
)
def test_years_in_words(year, words):
    assert translate.year_words(year) == words


def test_a_date_in_each_style():
    assert translate.spoken(DAY) == [
        "03/03/99",
        "3.3.1999",
        "Wednesday, 3 March 1999",
        "March 3rd, 1999",
        "Wed 3 Mar '99",
        "the third of March, nineteen ninety-nine",
        "March the third, nineteen ninety-nine",
        "Wednesday the third of March 1999",
        "in one thousand nine hundred and ninety-nine, on the third of March",
        "the third day of March in the year one thousand nine hundred and ninety-nine",
    ]


def test_days_held_out_are_never_trained_on():
    days = {}
    for held_out in (False, True):
        pairs = list(itertools.islice(translate.date_pairs(3, held_out, 0), 400))
        days[held_out] = {day for _, target in pairs for day in target.split(";")}
        assert {target.count(";") for _, target in pairs} == {0, 1, 2}
    assert not days[True] & days[False]
    assert len(days[True]) > 300
    assert list(itertools.islice(translate.date_pairs(2, True, 1), 9)) == list(
        itertools.islice(translate.date_pairs(2, True, 1), 9)
    )


def test_tokens():
    words = translate.tokens("Wed 3 Mar '99; Été")
    assert words == ["wed", "3", "mar", "'", "9", "9", ";", "été"]
    assert translate.joined(translate.tokens("1999-03-03")) == "1999-03-03"
    assert translate.joined(words) == "wed 3 mar ' 9 9 ; été"
    assert translate.tokens("Ab c", characters=True) == ["A", "b", " ", "c"]


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "pairs.tsv"
    lines = [f"source {k % 20}\ttarget {k}\tleft out" for k in range(40)]
    path.write_text("\n".join([*lines, "", " \t "]))
    known, held_out = translate.file_pairs(path)
    assert sorted(held_out) == sorted((f"source {k % 20}", f"target {k}") for k in (9, 19, 29, 39))
    assert len(known) == 36 and not {a for a, _ in known} & {a for a, _ in held_out}


def test_a_file_has_no_source_in_both_parts(tmp_path):
    """What differs by its capitals alone is one source, unless characters are read."""
    path = tmp_path / "pairs.tsv"
    path.write_text("\n".join(f"{word} {k}\tx" for word in ("Word", "word") for k in range(10)))
    assert [a for a, _ in translate.file_pairs(path)[1]] == ["Word 9", "word 9"]
    path.write_text("\n".join(f"{word}\tx" for word in ("A", "a") * 10))
    with pytest.raises(SystemExit, match="got 1"):
        translate.file_pairs(path)
    with pytest.raises(SystemExit, match="got 2"):
        translate.file_pairs(path, True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("a\tb\nno tab", "line 2: expected a source, a tab and a target"),
        ("a\t", "line 1: expected a source, a tab and a target"),
        ("a\tb\na\tc", "expected at least 10 different sources, got 1"),
    ],
)
def test_a_file_without_pairs(text, words, tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text(text)
    with pytest.raises(SystemExit, match=re.escape(words)):
        translate.file_pairs(path)


def test_groups_by_length():
    assert translate.buckets([3, 1, 2, 9, 5, 7], 3) == [(1, 2), (3, 5), (6, 9)]
    assert translate.buckets([4, 4, 4, 4], 3) == [(4, 4)]
    assert translate.buckets([2], 8) == [(2, 2)]


def test_scores_by_length():
    pairs = [translate.Pair("", ["a"] * n, []) for n in (1, 2, 3, 4)]
    right = translate.Scores(0.0, [], [True, False, True, True], [], 0.0)
    assert right.by_length(pairs, [(1, 2), (3, 4)]) == [0.5, 1.0]


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("name", translate.DECODERS)
def test_a_batch_is_its_pairs(name, cell):
    """A padded batch has the loss and the outputs, also of a beam, that its pairs have alone."""
    options = argparse.Namespace(seed=0, embedding=5, hidden=6, cell=cell, backend=None)
    sizes = 9, 7
    model = translate.translator(name, options, sizes)
    torch.manual_seed(2)
    for parameter in model.parameters():  # far from zero, so that outputs differ
        torch.nn.init.normal_(parameter, std=1.0)
    with torch.no_grad():
        model.readout[2].bias[translate.END_CODE] -= 2
    source, target = (
        [translate.END, "", "<unk>", *"abcdef"],
        [translate.END, "", "<unk>", *"wxyz"],
    )
    numbered = translate.Numbered(source, target)
    pairs = [
        translate.Pair("", list("abcdef"), list("wx")),
        translate.Pair("", list("b"), list("zzyw")),
        translate.Pair("", list("fad"), list("x")),
    ]
    whole = numbered.batch(pairs)
    alone = [numbered.batch([pair]) for pair in pairs]
    counts = [len(pair.target) + 1 for pair in pairs]
    with torch.no_grad():
        losses = [model.loss(one).item() * n for one, n in zip(alone, counts, strict=True)]
        assert model.loss(whole).item() == pytest.approx(sum(losses) / sum(counts), rel=1e-5)
        for beam in (1, 3):
            together = model.decode(whole.source, whole.lengths, 5, beam)
            single = [model.decode(one.source, one.lengths, 5, beam)[0] for one in alone]
            assert [row.tolist() for row in together] == [row.tolist() for row in single]
        assert len({tuple(row.tolist()) for row in together}) > 1
        weights = model.weights(alone[0].source[:, 0], torch.tensor([3, 4]))
        assert weights.shape == (3, 6 if model.attends else 1)
        torch.testing.assert_close(weights.sum(1), torch.ones(3))


def test_sampling_grows():
    seen = []

    class Model(torch.nn.Module):
        def loss(self, batch, teacher_forcing):
            seen.append(teacher_forcing)

    loss = translate.Loss(sampling=0.5, steps=4)
    for _ in range(4):
        loss(Model(), None)
    assert seen == [1.0, 0.875, 0.75, 0.625]
