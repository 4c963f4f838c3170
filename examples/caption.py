"""Describe small pictures in a sentence, with attention over places and without.

The pictures are drawn here: one to three shapes in the quarters of a square, with "a small red
circle above a large blue square" beneath. A small convolutional network reads them into a grid of
places. One LSTM begins with a vector of the whole picture and has nothing else (Karpathy and
Fei-Fei; Vinyals et al.). The other looks at the places before each word (Xu et al.). So small a
picture fits into one vector: attention gets there in fewer steps, and trained for long both do.

What is scored was not trained on: every tenth sentence is held out, and two pairs of a colour and a
shape are in no training picture at all, so that "green triangle" is to be put together from other
green shapes and other triangles. Beside the models stand the most frequent sentence, and the most
frequent word at each place of a sentence.

Paper: Karpathy and Fei-Fei 2015, Deep Visual-Semantic Alignments for Generating Image Descriptions;
Vinyals et al. 2015, Show and Tell: A Neural Image Caption Generator; Xu et al. 2015, Show, Attend
and Tell: Neural Image Caption Generation with Visual Attention; Liu et al. 2018, An Intriguing
Failing of Convolutional Neural Networks and the CoordConv Solution (the network sees where it is).

    python examples/caption.py --hidden 128 --steps 2000
"""

from __future__ import annotations

import argparse
import itertools
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from torch import Tensor, nn

import fastseq
from fastseq.decoding import greedy
from fastseq.nn.attention import PreparedKeys

SIZE, GRID = 24, 6  # pixels and places of a side
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.6, 0.25),
    "blue": (0.15, 0.3, 0.85),
    "yellow": (0.95, 0.8, 0.1),
}
SHAPES = "circle", "square", "triangle"
RADII = {"small": 3.0, "large": 5.2}
ROWS, COLUMNS = ("top", "bottom"), ("left", "right")
#: Colours and shapes that no training picture has together.
NEW = {("green", "triangle"), ("yellow", "circle")}

END, START = "<end>", "<start>"
WORDS = [
    *(END, START, "a", *RADII, *COLOURS, *SHAPES),
    *("above", "left", "of", "and", "at", "the", "top", "bottom", "right"),
]
CODES = {word: k for k, word in enumerate(WORDS)}
LONGEST = 16  # words of an output
IGNORED = -100  # as a target: behind the end
MODELS = {"whole picture": "pooled", "attention": "attention"}  # and names of their figures


# Pictures and sentences


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str
    row: int  # 0: top
    column: int  # 0: left

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


def sentence(things: Sequence[Thing]) -> str:
    """One sentence says what a picture of one to three things shows: the upper ones first, and of a
    row the left one."""
    first, *rest = sorted(things, key=lambda thing: (thing.row, thing.column))
    if not rest:
        return f"{first} at the {ROWS[first.row]} {COLUMNS[first.column]}"
    upper = [str(thing) for thing in (first, *rest) if thing.row == first.row]
    lower = [str(thing) for thing in rest if thing.row != first.row]
    if not lower:
        return " left of ".join(upper)
    return f"{' and '.join(upper)} above {' and '.join(lower)}"


def drawn(things: Sequence[Thing], rng: np.random.Generator) -> np.ndarray:
    """(3, SIZE, SIZE) from 0 to 1. Each thing is somewhere in its quarter of the picture."""
    picture = np.full((3, SIZE, SIZE), 0.95, np.float32)
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    quarter = SIZE / 2
    for thing in things:
        r = RADII[thing.size]
        spare = quarter / 2 - r
        down, right = rng.uniform(-spare, spare, 2)
        dy = y - (thing.row + 0.5) * quarter - down
        dx = x - (thing.column + 0.5) * quarter - right
        inside = {
            "circle": dx**2 + dy**2 <= r**2,
            "square": np.maximum(abs(dx), abs(dy)) <= 0.85 * r,
            "triangle": (2 * abs(dx) <= dy + r) & (dy <= r),
        }[thing.shape]
        colour = np.array(COLOURS[thing.colour]) + rng.normal(0, 0.04, 3)
        picture[:, inside] = colour[:, None]
    return np.clip(picture + rng.normal(0, 0.03, picture.shape), 0, 1).astype(np.float32)


def is_held_out(text: str) -> bool:
    """Every tenth sentence, about."""
    return zlib.crc32(text.encode()) % 10 == 9


class Sample(NamedTuple):
    picture: np.ndarray
    words: list[str]
    things: int


def samples(part: str, seed: int) -> Iterator[Sample]:
    """Without end: to "train" on, "held out" sentences, or pictures with a "new" pair of colour and
    shape."""
    rng = np.random.default_rng([seed, *part.encode()])
    quarters = [(row, column) for row in (0, 1) for column in (0, 1)]
    kinds = list(itertools.product(RADII, COLOURS, SHAPES))
    while True:
        places = rng.permutation(len(quarters))[: rng.integers(1, 4)]
        things = [Thing(*kinds[rng.integers(len(kinds))], *quarters[place]) for place in places]
        text = sentence(things)
        new = any((thing.colour, thing.shape) in NEW for thing in things)
        if part == ("new" if new else "held out" if is_held_out(text) else "train"):
            yield Sample(drawn(things, rng), text.split(), len(things))


class Batch(NamedTuple):
    pictures: Tensor  # (B, 3, SIZE, SIZE)
    inputs: Tensor  # (U, B): the start, and the words
    targets: Tensor  # (U, B): the words and their end; IGNORED behind it


def batch(some: Sequence[Sample]) -> Batch:
    codes = [[CODES[word] for word in sample.words] for sample in some]
    pad = nn.utils.rnn.pad_sequence
    return Batch(
        torch.from_numpy(np.stack([sample.picture for sample in some])),
        pad([torch.tensor([CODES[START], *row]) for row in codes]),
        pad([torch.tensor([*row, CODES[END]]) for row in codes], padding_value=IGNORED),
    )


def batches(some: Iterable[Sample], size: int) -> Iterator[Batch]:
    some = iter(some)
    while part := list(itertools.islice(some, size)):
        yield batch(part)


# The models


class Eyes(nn.Module):
    """Pictures (B, 3, SIZE, SIZE) to places (GRID^2, B, channels).

    The convolutions also read two coordinates of each pixel. They read darkness, so that the bare
    ground is near zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        sizes = (5, 16, 5, 2), (16, 32, 3, 2), (32, channels, 3, 1)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=False),
                    nn.BatchNorm2d(outputs),
                    nn.ReLU(),
                )
                for inputs, outputs, side, stride in sizes
            )
        )
        line = torch.linspace(-1, 1, SIZE)
        self.register_buffer("where", torch.stack(torch.meshgrid(line, line, indexing="ij")))

    def forward(self, pictures: Tensor) -> Tensor:
        where = self.where.expand(len(pictures), -1, -1, -1)
        return self.layers(torch.cat([1 - pictures, where], 1)).flatten(2).permute(2, 0, 1)


class Captioner(nn.Module):
    """Eyes, and a decoder whose state begins with tanh(W [all places]), normalised before tanh.

    Args:
        attends: whether the decoder's memory is the places; else it is the first state itself, one
            vector: attention over a single place always finds that place.
    """

    def __init__(
        self, decoder: fastseq.AttentionDecoder, attends: bool, channels: int, E: int
    ) -> None:
        super().__init__()
        H = decoder.recurrent.hidden_size
        self.eyes = Eyes(channels)
        self.first = nn.Sequential(
            nn.Linear(GRID**2 * channels, 2 * H, bias=False), nn.BatchNorm1d(2 * H)
        )
        self.embed = nn.Embedding(len(WORDS), E)
        self.decoder, self.attends = decoder, attends
        width = H + (channels if attends else H)
        self.readout = nn.Sequential(nn.Linear(width, H), nn.Tanh(), nn.Linear(H, len(WORDS)))

    def look(self, pictures: Tensor) -> tuple[PreparedKeys, tuple[Tensor, ...]]:
        """The decoder's memory and first state."""
        places = self.eyes(pictures)
        state = torch.tanh(self.first(places.transpose(0, 1).flatten(1))).chunk(2, 1)
        memory = self.decoder.prepare(places if self.attends else state[0][None])
        if not self.decoder.feed_context:  # a layer
            state = tuple(part[None].contiguous() for part in state)
        return memory, state

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (U, B, words), and weights (U, B, places)."""
        memory, state = self.look(batch.pictures)
        y, _, weights = self.decoder(self.embed(batch.inputs), memory, state)
        return self.readout(y), weights

    def describe(self, pictures: Tensor) -> list[list[str]]:
        """The likeliest word at each step."""
        memory, state = self.look(pictures)

        def step(words: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state, _ = self.decoder.step(self.embed(words), memory, state)
            return self.readout(y), state

        start = torch.full((len(pictures),), CODES[START])
        found = greedy(step, start, state, end=CODES[END], max_length=LONGEST)
        return [
            [WORDS[code] for code in row if code != CODES[END]] for row in found.tokens.tolist()
        ]


def captioner(name: str, options: argparse.Namespace) -> Captioner:
    """A model, its parameters from the seed."""
    torch.manual_seed(options.seed)
    E, H, C = options.embedding, options.hidden, options.channels
    if name == "attention":
        cell = fastseq.LSTMCell(E + C, H, backend=options.backend)
        return Captioner(fastseq.AttentionDecoder(cell, fastseq.Attention(H, C)), True, C, E)
    layer = fastseq.LSTM(E, H, backend=options.backend)
    decoder = fastseq.AttentionDecoder(layer, fastseq.Attention(H, H, "dot"), feed_context=False)
    return Captioner(decoder, False, C, E)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Nats a word."""
    logits = model(batch)[0]
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED
    )


# Scores


def words_right(found: Sequence[str], expected: Sequence[str]) -> float:
    """The share of the expected words that stand in their places."""
    return sum(a == b for a, b in zip(found, expected, strict=False)) / len(expected)


def majorities(known: Sequence[list[str]]) -> tuple[list[str], list[str]]:
    """The most frequent sentence, and the most frequent word at each place, as far as any sentence
    reaches."""
    whole = Counter(map(tuple, known)).most_common(1)[0][0]
    columns = (filter(None, column) for column in itertools.zip_longest(*known))
    return list(whole), [Counter(column).most_common(1)[0][0] for column in columns]


class Scores(NamedTuple):
    exact: float  # whole sentences
    words: float  # of the words of the expected sentences
    by_things: list[float]  # exact, of pictures with 1, 2 and 3 things
    new: float  # exact, of pictures with new pairs of colour and shape


def scores(outputs: dict[str, list[list[str]]], tests: dict[str, list[Sample]]) -> Scores:
    """Of an output for each sample of the parts "held out" and "new"."""
    exact = {
        part: [found == sample.words for found, sample in zip(outputs[part], some, strict=True)]
        for part, some in tests.items()
    }
    held_out = tests["held out"]
    pairs = zip(outputs["held out"], held_out, strict=True)
    by_things = [
        fmean(
            right
            for right, sample in zip(exact["held out"], held_out, strict=True)
            if sample.things == n
        )
        for n in (1, 2, 3)
    ]
    words = fmean(words_right(found, sample.words) for found, sample in pairs)
    return Scores(fmean(exact["held out"]), words, by_things, fmean(exact["new"]))


@torch.no_grad()
def outputs(model: Captioner, tests: dict[str, list[Sample]]) -> dict[str, list[list[str]]]:
    model.eval()
    found = {
        part: [words for group in batches(some, 100) for words in model.describe(group.pictures)]
        for part, some in tests.items()
    }
    model.train()
    return found


@torch.no_grad()
def plot(model: Captioner, shown: list[Sample], title: str, path: Path) -> None:
    """Pictures, and where the decoder looks for the words of its sentences: bright places."""
    from matplotlib.figure import Figure

    model.eval()
    told = model.describe(batch(shown).pictures)
    kept = [[k for k, word in enumerate(words) if word not in ("a", "the")] for words in told]
    columns = 1 + max(map(len, kept))
    figure = Figure(figsize=(11, 1.25 * len(shown) + 0.4), layout="constrained")
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    grid = figure.subplots(len(shown), columns, squeeze=False, subplot_kw=bare)
    for row, sample, words, places in zip(grid, shown, told, kept, strict=True):
        weights = model(batch([sample._replace(words=words)]))[1][:, 0].view(-1, GRID, GRID)
        image = sample.picture.transpose(1, 2, 0)
        row[0].imshow(image)
        row[0].set_title("right" if words == sample.words else "wrong", fontsize=8)
        for axes, place in zip(row[1:], places, strict=False):
            heat = nn.functional.interpolate(
                weights[None, place : place + 1], size=(SIZE, SIZE), mode="bilinear"
            )[0, 0]
            light = (0.15 + 0.85 * heat / heat.max().clamp(min=1e-6)).numpy()
            axes.imshow((image * light[:, :, None]).clip(0, 1))
            axes.set_title(words[place], fontsize=8)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    model.train()
    common.save(figure, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=200.0)
    add = parser.add_argument
    add("--embedding", type=common.positive, default=32)
    add("--hidden", type=common.positive, default=128)
    add("--channels", type=common.positive, default=64, help="numbers of each place")
    add("--batch", type=common.positive, default=64)
    add("--steps", type=common.positive, default=1000, help="updates of each model")
    add("--lr", type=common.above_zero, default=3e-3)
    add("--held-out", type=common.positive, default=1000, help="pictures of each test, at least 30")
    add("--race", type=common.above_zero, default=5.0, help="seconds beside each of torch.nn's")
    short = {
        "hidden": 64,
        "channels": 48,
        "steps": 300,
        "lr": 6e-3,
        "held_out": 300,
        "race": 1.0,
        "seconds": 60.0,
    }
    options = common.parse(parser, argv, short)
    if options.held_out < 30:
        parser.error(f"argument --held-out: expected at least 30, got {options.held_out}")
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    tests = {
        part: list(itertools.islice(samples(part, options.seed), options.held_out))
        for part in ("held out", "new")
    }
    known = [sample.words for sample in itertools.islice(samples("train", options.seed), 2000)]
    title = f"LSTM, {options.hidden} units, {GRID} x {GRID} places"
    new = ", ".join(" ".join(pair) for pair in sorted(NEW))
    print(f"{title}, {common.threads()}. No training picture has: {new}.")

    found: dict[str, Scores] = {}
    seconds, models, told = {}, {}, {}
    for name, words in zip(("frequent sentence", "frequent words"), majorities(known), strict=True):
        found[name] = scores({part: [words] * len(some) for part, some in tests.items()}, tests)
    for name in MODELS:
        model = models[name] = captioner(name, options)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
        falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / options.steps)
        training = common.train(
            name,
            model,
            loss,
            batches(samples("train", options.seed), options.batch),
            steps=options.steps,
            seconds=options.seconds / len(MODELS),
            optimizer=optimizer,
            after=lambda _, falls=falls: falls.step(),
        )
        told[name] = outputs(model, tests)
        found[name], seconds[name] = scores(told[name], tests), f"{training.elapsed:.1f}"
    rows = [
        (
            name,
            *(f"{value:.1%}" for value in (score.words, score.exact, *score.by_things, score.new)),
            seconds.get(name, ""),
        )
        for name, score in found.items()
    ]
    header = "", "words", "sentences", "1 thing", "2 things", "3 things", "new pairs", "trains s"
    print(f"\n{common.table(header, rows)}")
    print("(Shares that are right: of words, and of whole sentences.)")

    for place, sample in enumerate(tests["held out"][:3]):
        print(f"\n{' '.join(sample.words)}")
        for name in MODELS:
            words = told[name]["held out"][place]
            print(f"  {name:14} {'the same' if words == sample.words else ' '.join(words)}")

    figures: dict[str, float] = {
        "majority": found["frequent sentence"].exact,
        "majority_words": found["frequent words"].words,
    }
    rows = []
    for name, key in MODELS.items():
        figures |= {key: found[name].exact, f"{key}_words": found[name].words}
        figures[f"{key}_new"] = found[name].new
        again = batches(samples("train", options.seed), options.batch)
        race = common.speed(models[name], loss, again, seconds=options.race)
        figures[f"{key}_ratio"] = race.ratio
        rows.append(race.row(name))
    print(f"\n{common.table(common.SPEEDS, rows)}")
    print("(The LSTM is each library's own; convolutions and attention are the same.)\n")

    shown = [
        next(s for s in tests[part] if s.things == n)
        for part, n in (("held out", 2), ("new", 2), ("held out", 3), ("new", 3))
    ]
    named = "Where the decoder looks before each word; the second and the last have a new pair"
    plot(models["attention"], shown, named, options.out / "caption.png")
    print(
        f"Whole sentences right that were not trained on: {figures['attention']:.1%} with "
        f"attention, {figures['pooled']:.1%} without,\n{figures['majority']:.1%} by the most "
        f"frequent one; words {figures['attention_words']:.1%}, {figures['pooled_words']:.1%} and "
        f"{figures['majority_words']:.1%} (by place)."
    )
    return figures


if __name__ == "__main__":
    common.run(main)
