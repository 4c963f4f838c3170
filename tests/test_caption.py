"""Pictures and sentences of examples/caption.py, their scores, and its models in a batch."""

import argparse
import itertools

import numpy as np
import pytest
import torch
from scripts import example

caption = example("caption")
Thing = caption.Thing
RED = Thing("small", "red", "circle", 0, 0)
BLUE = Thing("large", "blue", "square", 1, 0)
GREEN = Thing("large", "green", "circle", 1, 1)
FIRST, SECOND, THIRD = map(str, (RED, BLUE, GREEN))


@pytest.mark.parametrize(
    "things, text",
    [
        ([RED], "a small red circle at the top left"),
        ([GREEN], "a large green circle at the bottom right"),
        ([BLUE, RED], "a small red circle above a large blue square"),
        ([GREEN, RED], f"{FIRST} above {THIRD}"),
        ([GREEN, BLUE], f"{SECOND} left of {THIRD}"),
        ([GREEN, RED, BLUE], f"{FIRST} above {SECOND} and {THIRD}"),
        ([GREEN._replace(row=0), RED, BLUE], f"{FIRST} and {THIRD} above {SECOND}"),
    ],
)
def test_a_sentence_says_what_is_where(things, text):
    assert caption.sentence(things) == text
    assert set(text.split()) <= set(caption.WORDS)


def test_a_thing_is_drawn_in_its_quarter():
    half, areas = caption.SIZE // 2, {}
    for size, shape in itertools.product(caption.RADII, caption.SHAPES):
        for seed in range(5):
            thing = Thing(size, "blue", shape, 1, 0)
            picture = caption.drawn([thing], np.random.default_rng(seed))
            blue = picture[2] - picture[0] > 0.4
            assert blue.any() and not blue[:half].any() and not blue[:, half:].any()
            areas[size, shape] = blue.sum()
    for size in caption.RADII:  # of the square around them: 0.72, pi / 4, a half
        assert areas[size, "circle"] > areas[size, "square"] > areas[size, "triangle"]
    for shape in caption.SHAPES:
        assert areas["large", shape] > 2 * areas["small", shape]


def test_what_is_scored_is_never_trained_on():
    texts = {}
    for part in ("train", "held out", "new"):
        some = list(itertools.islice(caption.samples(part, 0), 200))
        assert {sample.things for sample in some} == {1, 2, 3}
        texts[part] = {" ".join(sample.words) for sample in some}
    assert not texts["train"] & texts["held out"]
    new = [f"{colour} {shape}" for colour, shape in caption.NEW]
    assert not any(pair in text for text in texts["train"] | texts["held out"] for pair in new)
    assert all(any(pair in text for pair in new) for text in texts["new"])
    again = next(caption.samples("train", 0))
    assert np.array_equal(again.picture, next(caption.samples("train", 0)).picture)


def test_scores():
    known = ["a b", "a b", "a c d", "e c d"]
    whole, words = caption.majorities([text.split() for text in known])
    assert whole == ["a", "b"] and words[0] == "a" and words[2:] == ["d"]
    assert caption.words_right(["a", "b", "c"], ["a", "c", "c", "d"]) == 0.5
    assert caption.words_right(["a", "b"], ["a"]) == 1.0
    picture = np.zeros(1)
    tests = {
        "held out": [caption.Sample(picture, ["a", "b"], n) for n in (1, 2, 3, 3)],
        "new": [caption.Sample(picture, ["a"], 1), caption.Sample(picture, ["b"], 1)],
    }
    outputs = {"held out": [["a", "b"], ["a"], ["a", "c"], ["a", "b"]], "new": [["a"], ["a"]]}
    found = caption.scores(outputs, tests)
    assert found == caption.Scores(0.5, 0.75, [1.0, 0.0, 0.5], 0.5)


@pytest.mark.parametrize("name", caption.MODELS)
def test_a_batch_is_its_pictures(name):
    """A padded batch has the loss and the sentences that its pictures have alone."""
    options = argparse.Namespace(seed=3, embedding=5, hidden=6, channels=4, backend=None)
    model = caption.captioner(name, options).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from zero, so that sentences differ
            parameter *= 4
    some = list(itertools.islice(caption.samples("train", 0), 4))
    whole, alone = caption.batch(some), [caption.batch([sample]) for sample in some]
    counts = [len(sample.words) + 1 for sample in some]
    assert len(set(counts)) > 1
    with torch.no_grad():
        losses = [caption.loss(model, one).item() * n for one, n in zip(alone, counts, strict=True)]
        expected = sum(losses) / sum(counts)
        assert caption.loss(model, whole).item() == pytest.approx(expected, rel=1e-5)
        together = model.describe(whole.pictures)
        assert together == [model.describe(one.pictures)[0] for one in alone]
        assert len(set(map(tuple, together))) > 1
        weights = model(whole)[1]
        assert weights.shape == (max(counts), 4, caption.GRID**2 if model.attends else 1)
        torch.testing.assert_close(weights.sum(2), torch.ones(max(counts), 4))
