"""Translate dates in words to ISO 8601, by an encoder and decoder with attention and without.

The default task is made here: one to three dates, each written in one of ten styles, such as "the
third of March, nineteen ninety-nine; 7 Jan '07", and in ISO's, "1999-03-03;2007-01-07". A tenth of
the days of a century are held out: no training sequence has them in any style. --file translates
pairs of your own, one a line, parted by a tab; a tenth of their sources is held out. Sequences are
read word by word and digit by digit, or character by character.

Three decoders read the same kind of encoder, a bidirectional GRU or LSTM. One has the encoder's
last state alone. One attends over all states of the encoder, beside a recurrent layer that runs
over all steps in one call (Luong). One attends at each step and feeds what it found to its cell
(Bahdanau). The last state must hold all that the output says, which grows harder with the length
of the input; exact matches of whole outputs are shown by length.

Paper: Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder for Statistical
Machine Translation; Sutskever, Vinyals and Le 2014, Sequence to Sequence Learning with Neural
Networks; Bahdanau, Cho and Bengio 2015, Neural Machine Translation by Jointly Learning to Align and
Translate; Luong, Pham and Manning 2015, Effective Approaches to Attention-based Neural Machine
Translation; Bengio et al. 2015, Scheduled Sampling for Sequence Prediction with Recurrent Neural
Networks (--sampling).

    python examples/translate.py --dates 4
    python examples/translate.py --file pairs.tsv --hidden 256 --sampling 0.3
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn

import fastseq
from fastseq.decoding import beam_search, greedy
from fastseq.nn.attention import PreparedKeys
from fastseq.schedules import linear

UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
MONTHS = (
    "January February March April May June July August September October November December"
).split()
WEEKDAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
#: Two digits say which year it is.
FIRST, LAST = datetime.date(1950, 1, 1), datetime.date(2049, 12, 31)

END, START, UNKNOWN = "<end>", "<start>", "<unk>"
END_CODE, START_CODE, UNKNOWN_CODE = range(3)
IGNORED = -100  # as a target: behind the end
#: The decoders, and what their attention scores by.
DECODERS = {"last state": None, "Luong": "general", "Bahdanau": "additive"}
KEYS = {name: name.lower().replace(" ", "_") for name in DECODERS}
COLOURS = common.TORCH, common.FASTSEQ, "#edae49"


class Pair(NamedTuple):
    text: str  # the source as it is written
    source: list[str]  # in tokens
    target: list[str]


# Dates


def number_words(n: int) -> str:
    """A number from 0 to 9999, as "four thousand and seven"."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f"-{UNITS[n % 10]}" if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    rest = n % size
    tail = f"{' and' * (rest < 100)} {number_words(rest)}" if rest else ""
    return f"{number_words(n // size)} {name}{tail}"


def ordinal_words(n: int) -> str:
    """The ordinal of a number from 1 to 99, as "twenty-first"."""
    head, dash, last = number_words(n).rpartition("-")
    last = ORDINALS.get(last) or (last[:-1] + "ieth" if last.endswith("y") else last + "th")
    return head + dash + last


def year_words(year: int) -> str:
    """A year as it is said: "nineteen ninety-nine", "two thousand and seven", "twenty ten"."""
    century, rest = divmod(year, 100)
    if century % 10 == 0 and rest < 10:
        return number_words(year)
    if not rest:
        return f"{number_words(century)} hundred"
    return f"{number_words(century)} {'oh ' * (rest < 10)}{number_words(rest)}"


def suffix(day: int) -> str:
    """st, nd, rd or th."""
    return "th" if 10 < day < 14 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def spoken(day: datetime.date) -> list[str]:
    """A date in each of the styles."""
    d, m, y = day.day, day.month, day.year
    month, weekday = MONTHS[m - 1], WEEKDAYS[day.weekday()]
    nth, said = ordinal_words(d), year_words(y)
    return [
        f"{d:02}/{m:02}/{y % 100:02}",
        f"{d}.{m}.{y}",
        f"{weekday}, {d} {month} {y}",
        f"{month} {d}{suffix(d)}, {y}",
        f"{weekday[:3]} {d} {month[:3]} '{y % 100:02}",
        f"the {nth} of {month}, {said}",
        f"{month} the {nth}, {said}",
        f"{weekday} the {nth} of {month} {y}",
        f"in {number_words(y)}, on the {nth} of {month}",
        f"the {nth} day of {month} in the year {number_words(y)}",
    ]


def is_held_out(day: datetime.date) -> bool:
    """Each tenth day."""
    return day.toordinal() % 10 == 9


def date_pairs(dates: int, held_out: bool, seed: int) -> Iterator[tuple[str, str]]:
    """One to ``dates`` dates and their ISO form, without end: of days that are held out, or not."""
    rng = random.Random(f"{seed} {held_out}")
    days = range(FIRST.toordinal(), LAST.toordinal() + 1)
    while True:
        chosen = []
        for _ in range(rng.randint(1, dates)):
            day = datetime.date.fromordinal(rng.choice(days))
            while is_held_out(day) != held_out:
                day = datetime.date.fromordinal(rng.choice(days))
            chosen.append(day)
        source = "; ".join(rng.choice(spoken(day)) for day in chosen)
        yield source, ";".join(day.isoformat() for day in chosen)


# Tokens


def tokens(text: str, characters: bool = False) -> list[str]:
    """Words, single digits and single marks, in lower case; or characters."""
    return list(text) if characters else re.findall(r"[^\W\d]+|\d|[^\w\s]", text.lower())


def joined(found: Sequence[str]) -> str:
    """Tokens as a text: with blanks if there are words."""
    return (" " if any(len(token) > 1 for token in found) else "").join(found)


class Data(NamedTuple):
    train: Iterable[Pair]  # without end
    held_out: list[Pair]
    source: list[str]  # the vocabulary; three marks come first
    target: list[str]


def file_pairs(
    path: Path, characters: bool = False
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """To train on, and held out: none of these has the source, in tokens, of one of those."""
    pairs = []
    for number, line in enumerate(common.read(path).splitlines(), 1):
        columns = [part.strip() for part in line.split("\t")]
        if not any(columns):
            continue
        if len(columns) < 2 or not (columns[0] and columns[1]):
            common.stop(f"{path}, line {number}: expected a source, a tab and a target")
        pairs.append((columns[0], columns[1]))
    sources = [tuple(tokens(source, characters)) for source, _ in pairs]
    different = list(dict.fromkeys(sources))
    if len(different) < 10:
        common.stop(f"{path}: expected at least 10 different sources, got {len(different)}")
    held_out = set(common.split(different)[1])
    parts: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for pair, source in zip(pairs, sources, strict=True):
        parts[source in held_out].append(pair)
    return parts


def shuffled(pairs: list[tuple[str, str]], seed: int) -> Iterator[tuple[str, str]]:
    """Without end, each pair once a round."""
    rng, order = random.Random(seed), list(pairs)
    while True:
        rng.shuffle(order)
        yield from order


def vocabulary(sequences: Iterable[list[str]], size: int) -> list[str]:
    """The most frequent tokens, behind the three marks."""
    counts = Counter(itertools.chain.from_iterable(sequences))
    return [END, START, UNKNOWN, *dict(counts.most_common(max(0, size - 3)))]


class Pairs:
    """Pairs in tokens, from the beginning at each iteration, so that models read the same ones."""

    def __init__(self, texts: Callable[[], Iterable[tuple[str, str]]], characters: bool) -> None:
        self.texts, self.characters = texts, characters

    def __iter__(self) -> Iterator[Pair]:
        for source, target in self.texts():
            yield Pair(source, *(tokens(text, self.characters) for text in (source, target)))


def data(options: argparse.Namespace) -> Data:
    if options.file:
        known, rest = file_pairs(options.file, options.characters)
        train, many = partial(shuffled, known, options.seed), len(known)
        held_out = partial(iter, rest)
    else:
        train, held_out = (
            partial(date_pairs, options.dates, which, options.seed) for which in (False, True)
        )
        many = 2000
    pairs = Pairs(train, options.characters)
    some = list(itertools.islice(pairs, many))
    return Data(
        pairs,
        list(itertools.islice(Pairs(held_out, options.characters), options.held_out)),
        vocabulary((pair.source for pair in some), options.vocabulary),
        vocabulary((pair.target for pair in some), options.vocabulary),
    )


class Batch(NamedTuple):
    source: Tensor  # (S, B)
    lengths: Tensor  # (B,) of the source
    inputs: Tensor  # (U, B): the start, and the target
    targets: Tensor  # (U, B): the target and its end; IGNORED behind it


class Numbered:
    """Pairs as numbers."""

    def __init__(self, source: list[str], target: list[str]) -> None:
        self.source = {token: k for k, token in enumerate(source)}
        self.target = {token: k for k, token in enumerate(target)}

    def batch(self, pairs: Sequence[Pair]) -> Batch:
        pad = nn.utils.rnn.pad_sequence
        sources = [self._codes(self.source, pair.source) for pair in pairs]
        targets = [self._codes(self.target, pair.target) for pair in pairs]
        start, end = torch.tensor([START_CODE]), torch.tensor([END_CODE])
        return Batch(
            pad(sources),
            torch.tensor([len(source) for source in sources]),
            pad([torch.cat([start, target]) for target in targets]),
            pad([torch.cat([target, end]) for target in targets], padding_value=IGNORED),
        )

    def batches(self, pairs: Iterable[Pair], size: int) -> Iterator[Batch]:
        pairs = iter(pairs)
        while some := list(itertools.islice(pairs, size)):
            yield self.batch(some)

    def _codes(self, numbers: dict[str, int], found: list[str]) -> Tensor:
        return torch.tensor([numbers.get(token, UNKNOWN_CODE) for token in found])


# The model


class Translator(nn.Module):
    """A bidirectional encoder, and a decoder that begins with tanh(W [its two last states]).

    Args:
        attends: whether the decoder's memory is all outputs of the encoder (S, B, 2 H); else it is
            what the decoder begins with, one vector (1, B, H), as in the RNN encoder-decoder of Cho
            et al.: attention over a single place always finds that place.
        states: of the decoder: h of a GRU, h and c of an LSTM.
        sizes: of the vocabularies.
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: fastseq.AttentionDecoder,
        attends: bool,
        states: int,
        sizes: tuple[int, int],
    ) -> None:
        super().__init__()
        H, E = encoder.hidden_size, encoder.input_size
        self.encoder, self.decoder, self.attends, self.states = encoder, decoder, attends, states
        self.read = nn.Embedding(sizes[0], E)
        self.embed = nn.Embedding(sizes[1], E)
        self.bridge = nn.Linear(2 * H, states * H)
        width = H + (2 * H if attends else H)
        self.readout = nn.Sequential(nn.Linear(width, H), nn.Tanh(), nn.Linear(H, sizes[1]))

    def encode(self, source: Tensor, lengths: Tensor) -> tuple[PreparedKeys, Any]:
        """The decoder's memory and first state, of sources (S, B)."""
        y, last = common.ragged(self.encoder, self.read(source), lengths)
        h = last[0] if isinstance(last, tuple) else last
        first = torch.tanh(self.bridge(torch.cat([h[0], h[1]], 1)))
        state = first.chunk(self.states, 1)
        memory = (
            self.decoder.prepare(y, lengths=lengths)
            if self.attends
            else self.decoder.prepare(state[0][None])
        )
        if self.batch_dim:
            state = tuple(part[None].contiguous() for part in state)
        return memory, state if self.states > 1 else state[0]

    @property
    def batch_dim(self) -> int:
        """Of the decoder's state: 0 for a cell, 1 for a layer."""
        return 0 if self.decoder.feed_context else 1

    def loss(self, batch: Batch, teacher_forcing: float = 1.0) -> Tensor:
        """Nats a token."""
        memory, state = self.encode(batch.source, batch.lengths)
        found = self.decoder.forward_sampling(
            batch.inputs, self.embed, self.readout, memory, state, teacher_forcing=teacher_forcing
        )
        return nn.functional.cross_entropy(
            found.logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED
        )

    def decode(self, source: Tensor, lengths: Tensor, max_length: int, beam: int) -> list[Tensor]:
        """The output for each source, without its end: greedily if the beam is 1."""
        memory, state = self.encode(source, lengths)
        memory = memory.repeat(beam)

        def step(tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
            y, state, _ = self.decoder.step(self.embed(tokens), memory, state)
            return self.readout(y), state

        start = torch.full_like(lengths, START_CODE)
        ends = {"end": END_CODE, "max_length": max_length}
        if beam == 1:
            found = greedy(step, start, state, **ends)
            outputs, lengths = found.tokens, found.lengths
        else:
            dims = self.batch_dim
            found = beam_search(step, start, state, beam_size=beam, batch_dim=dims, **ends)
            outputs, lengths = found.tokens[:, 0], found.lengths[:, 0]
        rows = (output[:length] for output, length in zip(outputs, lengths, strict=True))
        return [row[row != END_CODE] for row in rows]

    def weights(self, source: Tensor, output: Tensor) -> Tensor:
        """(U, S): where the decoder looks in one source (S,) for each token of an output, and for
        its end."""
        memory, state = self.encode(source[:, None], torch.tensor([len(source)]))
        inputs = torch.cat([torch.tensor([START_CODE]), output])[:, None]
        return self.decoder(self.embed(inputs), memory, state)[2][:, 0]


def translator(name: str, options: argparse.Namespace, sizes: tuple[int, int]) -> Translator:
    """A model, its parameters from the seed."""
    torch.manual_seed(options.seed)
    E, H, kind = options.embedding, options.hidden, options.cell.upper()
    layer, cell = getattr(fastseq, kind), getattr(fastseq, f"{kind}Cell")
    encoder = layer(E, H, bidirectional=True, backend=options.backend)
    score = DECODERS[name]
    if score is None:
        recurrent, attention = layer(E, H, backend=options.backend), fastseq.Attention(H, H, "dot")
    elif name == "Luong":
        recurrent, attention = (
            layer(E, H, backend=options.backend),
            fastseq.Attention(H, 2 * H, score),
        )
    else:
        recurrent = cell(E + 2 * H, H, backend=options.backend)
        attention = fastseq.Attention(H, 2 * H, score)
    decoder = fastseq.AttentionDecoder(recurrent, attention, feed_context=name == "Bahdanau")
    return Translator(encoder, decoder, score is not None, 2 if kind == "LSTM" else 1, sizes)


# Training and scores


class Loss:
    """Of a model on a batch. The decoder reads the more of its own choices the longer it trains."""

    def __init__(self, sampling: float = 0.0, steps: int = 1) -> None:
        self.slope, self.done = sampling / steps, 0

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        self.done += 1
        return model.loss(batch, linear(self.done - 1, self.slope))


def buckets(lengths: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Shortest and longest of ``count`` groups of about the same size; fewer groups where lengths
    are few."""
    ordered = sorted(lengths)
    last = sorted({ordered[-(-len(ordered) * k // count) - 1] for k in range(1, count + 1)})
    return list(zip([ordered[0], *(top + 1 for top in last[:-1])], last, strict=True))


class Scores(NamedTuple):
    loss: float  # nats a token
    outputs: list[list[str]]  # greedy
    greedy: list[bool]  # whether the whole output is right
    beam: list[bool]
    seconds: float

    def by_length(self, pairs: list[Pair], groups: list[tuple[int, int]]) -> list[float]:
        """The share of right outputs in each group."""
        lengths = [len(pair.source) for pair in pairs]
        return [
            fmean(right for right, n in zip(self.greedy, lengths, strict=True) if low <= n <= high)
            for low, high in groups
        ]


@torch.no_grad()
def evaluate(
    model: Translator, pairs: list[Pair], numbered: Numbered, names: list[str], beam: int
) -> Scores:
    """On pairs that were not trained on; the seconds are those of both ways to decode."""
    model.eval()
    limit = max(len(pair.target) for pair in pairs) + 4
    total, count, seconds = 0.0, 0, 0.0
    found: tuple[list[list[str]], list[list[str]]] = ([], [])
    for batch in numbered.batches(pairs, 100):
        targets = int((batch.targets != IGNORED).sum())
        total += model.loss(batch).item() * targets
        count += targets
        start = time.perf_counter()
        for size, outputs in zip((1, beam), found, strict=True):
            decoded = model.decode(batch.source, batch.lengths, limit, size)
            outputs += [[names[code] for code in output.tolist()] for output in decoded]
        seconds += time.perf_counter() - start
    right = [
        [output == pair.target for output, pair in zip(outputs, pairs, strict=True)]
        for outputs in found
    ]
    model.train()
    return Scores(total / count, found[0], *right, seconds)


# Pictures


def plot_lengths(scores: dict[str, Scores], pairs: list[Pair], title: str, path: Path) -> None:
    """The share of right outputs against the length of the source."""
    figure, axes = common.picture(height=3.6)
    groups = buckets([len(pair.source) for pair in pairs], 8)
    middles = [(low + high) / 2 for low, high in groups]
    for (name, score), colour, mark in zip(scores.items(), COLOURS, "os^", strict=False):
        shares = score.by_length(pairs, groups)
        label = f"{name}, {fmean(score.greedy):.1%}"
        axes.plot(middles, shares, f"{mark}-", color=colour, label=label, markersize=5)
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("tokens of the source")
    axes.set_ylabel("whole outputs that are right")
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False)
    common.save(figure, path)


def shown(pairs: list[Pair]) -> list[Pair]:
    """Two to draw: shorter than the middle, and longer."""
    middle = sorted(len(pair.source) for pair in pairs)[len(pairs) // 2]
    wanted = (middle * 2 / 3, middle * 4 / 3)
    return [min(pairs, key=lambda pair, n=n: abs(len(pair.source) - n)) for n in wanted]


@torch.no_grad()
def plot_attention(
    model: Translator, pairs: list[Pair], numbered: Numbered, title: str, path: Path
) -> None:
    """Where the decoder looks for each token of its own output."""
    figure, axes = common.picture(columns=len(pairs), height=4.8)
    names = list(numbered.target)
    model.eval()
    for one, pair in zip(axes, pairs, strict=True):
        batch = numbered.batch([pair])
        output = model.decode(batch.source, batch.lengths, len(pair.target) + 4, 1)[0]
        labels = [names[code] for code in output.tolist()]
        weights = model.weights(batch.source[:, 0], output)
        one.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        size = 8 if len(pair.source) < 25 else 6
        one.set_xticks(range(len(pair.source)), pair.source, rotation=90, fontsize=size)
        one.set_yticks(range(len(labels) + 1), [*labels, END], fontsize=size)
        one.grid(False)
        wrong = "" if labels == pair.target else f" (it is {joined(pair.target)})"
        one.set_xlabel("source")
        one.set_title(f"{joined(labels)}{wrong}", fontsize=9, loc="left")
    axes[0].set_ylabel("output")
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    model.train()
    common.save(figure, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=300.0)
    add = parser.add_argument
    add("--file", type=Path, help="pairs of your own: source, tab, target; dates if left out")
    add("--dates", type=common.positive, default=3, help="in a sequence, at most")
    add("--characters", action="store_true", help="read and write character by character")
    add("--vocabulary", type=common.positive, default=8000, help="tokens of each side, at most")
    add("--held-out", type=common.positive, default=1000, help="pairs to test on, at most")
    add("--decoders", nargs="+", choices=DECODERS, default=list(DECODERS))
    add("--cell", choices=["gru", "lstm"], default="gru")
    add("--embedding", type=common.positive, default=64)
    add("--hidden", type=common.positive, default=128)
    add("--batch", type=common.positive, default=64)
    add("--steps", type=common.positive, default=1000, help="updates of each model")
    add("--lr", type=common.above_zero, default=3e-3)
    add("--beam", type=common.positive, default=5, help="open hypotheses of the beam search")
    add("--sampling", type=float, default=0.0, help="own choices that are fed, at the last step")
    add("--race", type=common.above_zero, default=5.0, help="seconds beside each of torch.nn's")
    short = {
        "dates": 2,
        "hidden": 64,
        "embedding": 32,
        "steps": 240,
        "lr": 1e-2,
        "held_out": 200,
        "race": 1.0,
        "seconds": 60.0,
    }
    options = common.parse(parser, argv, short)
    if not 0 <= options.sampling <= 1:
        parser.error(f"argument --sampling: expected 0 to 1, got {options.sampling:g}")
    return options


def trained(
    name: str, model: Translator, batches: Iterable[Batch], options: argparse.Namespace
) -> common.Training:
    """Adam at a rate that falls to zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / options.steps)
    return common.train(
        name,
        model,
        Loss(options.sampling, options.steps),
        batches,
        steps=options.steps,
        seconds=options.seconds / len(options.decoders),
        optimizer=optimizer,
        after=lambda _: falls.step(),
    )


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    made = data(options)
    numbered, pairs = Numbered(made.source, made.target), made.held_out
    sizes = len(made.source), len(made.target)
    title = f"{options.cell.upper()}, {options.hidden} units"
    print(
        f"{len(pairs)} pairs are held out. The source has {sizes[0]} different tokens, the target "
        f"{sizes[1]}. {title}, {common.threads()}."
    )

    groups = buckets([len(pair.source) for pair in pairs], 3)
    models: dict[str, Translator] = {}
    scores: dict[str, Scores] = {}
    figures: dict[str, float] = {}
    rows = []
    for name in options.decoders:
        model = models[name] = translator(name, options, sizes)
        training = trained(name, model, numbered.batches(made.train, options.batch), options)
        score = scores[name] = evaluate(model, pairs, numbered, made.target, options.beam)
        lengths = score.by_length(pairs, groups)
        exact, beam = fmean(score.greedy), fmean(score.beam)
        figures |= {KEYS[name]: exact, f"{KEYS[name]}_beam": beam}
        figures |= {f"{KEYS[name]}_longest": lengths[-1], f"{KEYS[name]}_loss": score.loss}
        shares = (f"{value:.1%}" for value in (exact, beam, *lengths))
        seconds = f"{training.elapsed:.1f}", f"{score.seconds:.1f}"
        rows.append((name, f"{score.loss:.3f}", *shares, *seconds))
    spans = (f"{low} to {high}" for low, high in groups)
    header = "", "loss", "greedy", f"beam of {options.beam}", *spans, "trains s", "decodes s"
    print(f"\n{common.table(header, rows)}")
    print("(Shares of whole outputs that are right; the greedy ones by tokens of the source, too.)")

    for place, pair in enumerate(pairs[:4]):
        print(f"\n{pair.text}")
        for name, score in scores.items():
            wrong = "" if score.greedy[place] else f"  (it is {joined(pair.target)})"
            print(f"  {name:11} {joined(score.outputs[place])}{wrong}")

    rows = []
    for name, model in models.items():
        batches = numbered.batches(made.train, options.batch)
        found = common.speed(model, Loss(), batches, seconds=options.race)
        figures[f"{KEYS[name]}_ratio"] = found.ratio
        rows.append(found.row(name))
    print(f"\n{common.table(common.SPEEDS, rows)}")
    print("(Encoder and recurrent part of the decoder are each library's own, attention is one.)\n")

    plot_lengths(scores, pairs, title, options.out / "translate.png")
    attending = [name for name in scores if models[name].attends]
    if attending:
        best = max(attending, key=lambda name: fmean(scores[name].greedy))
        path = options.out / "translate_attention.png"
        named = f"Where {best}'s decoder looks; {title}"
        plot_attention(models[best], shown(pairs), numbered, named, path)
    right = ", ".join(f"{fmean(score.greedy):.1%} ({name})" for name, score in scores.items())
    low, high = groups[-1]
    longest = ", ".join(f"{figures[f'{KEYS[name]}_longest']:.1%}" for name in scores)
    print(f"Whole outputs right: {right}; of sources with {low} to {high} tokens {longest}.")
    return figures


if __name__ == "__main__":
    common.run(main)
