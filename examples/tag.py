"""Find the parts of Python lines that are read aloud: a window, BiLSTMs, and each with a CRF.

Whoever dictates code says its words but no dots, brackets, commas or operators: "self stream write
data". Which words belong together, and as what? Here self.stream.write is called and data is read.
The text is the standard library's, and its syntax tree says what is right, as BIO tags: B-call
begins the name of something called, I-call goes on with it, O is outside. A conditional random
field weighs which tag follows which, and forbids what cannot. Any file in the columns of the CoNLL
tasks does as well, with named entities for example.

Paper: Collobert et al. 2011, Natural Language Processing (Almost) from Scratch (the window); Huang
et al. 2015, Bidirectional LSTM-CRF Models for Sequence Tagging; Lafferty et al. 2001, Conditional
Random Fields.

    python examples/tag.py --hidden 200 --steps 3000
    python examples/tag.py --file train.txt --held-out test.txt
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import itertools
import random
import re
import time
import tokenize
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

import fastseq

#: Where a word ends in the source: (line, column in bytes).
Place = tuple[int, int]

STARTS, ENDS = (
    {getattr(tokenize, f"{letter}STRING_{end}", None) for letter in "FT"} - {None}
    for end in ("START", "END")
)
READERS = {"window": 0, "BiLSTM": 1, "2 BiLSTMs": 2}  # layers
BUCKETS = 2**13  # rows of the table of hashed features
LINE = "<line>"


class Span(NamedTuple):
    """Words [first, last) are one part of that kind."""

    kind: str
    first: int
    last: int


class Sample(NamedTuple):
    words: list[str]
    tags: list[str]


#: Hashed features of the words (T, B, 4), the tags' numbers (T, B), -100 beyond the lengths (B,).
Batch = tuple[Tensor, Tensor, Tensor]


# Tags and spans


def spans(tags: Sequence[str]) -> list[Span]:
    """What tags say in any BIO scheme: I-X where no X goes on begins one, as in CoNLL's own."""
    found: list[Span] = []
    for k, tag in enumerate(tags):
        letter, _, kind = tag.partition("-")
        if letter == "I" and found and found[-1].last == k and found[-1].kind == kind:
            found[-1] = found[-1]._replace(last=k + 1)
        elif kind:
            found.append(Span(kind, k, k + 1))
    return found


def tags_of(parts: Sequence[Span], length: int) -> list[str]:
    """The tags in which every span begins with B."""
    tags = ["O"] * length
    for kind, first, last in parts:
        tags[first:last] = [f"B-{kind}"] + [f"I-{kind}"] * (last - first - 1)
    return tags


class Score(NamedTuple):
    accuracy: float  # of single tags
    f1: float  # of spans: right are those of the right kind, first and last word

    @classmethod
    def of(cls, given: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> Score:
        words = hits = found = right = there = 0
        for ours, theirs in zip(given, truth, strict=True):
            words += len(theirs)
            hits += sum(a == b for a, b in zip(ours, theirs, strict=True))
            a, b = set(spans(ours)), set(spans(theirs))
            found, right, there = found + len(a), right + len(a & b), there + len(b)
        return cls(hits / words, 2 * right / max(1, found + there))


# Python read aloud


def chain(node: ast.AST) -> tuple[list[Place], ast.AST | None]:
    """Where each name of a.b.c ends, and what stands before its first dot where that is no name, as
    the call in f(x).a."""
    ends: list[Place] = []
    while isinstance(node, ast.Attribute):
        ends.insert(0, (node.end_lineno, node.end_col_offset))
        node = node.value
    if isinstance(node, ast.Name):
        return [(node.end_lineno, node.end_col_offset), *ends], None
    return ends, node


def roles(tree: ast.AST) -> dict[Place, tuple[str, int]]:
    """Where a name ends -> its role, and the number of the span that it is part of."""
    found: dict[Place, tuple[str, int]] = {}

    def mark(role: str, ends: Sequence[Place]) -> None:
        number = len(found)
        found.update((end, (role, number)) for end in ends)

    def written(role: str, node: ast.AST, before: int, name: str) -> None:
        """A dotted name that begins so many bytes into a node, as code is usually laid out."""
        column, ends = node.col_offset + before, []
        for part in name.split("."):
            ends.append((node.lineno, column + len(part.encode())))
            column = ends[-1][1] + 1
        mark(role, ends)

    def visit(node: ast.AST, role: str = "read") -> None:
        match node:
            case ast.JoinedStr():  # Python 3.11 takes it for one string
                return
            case ast.Name() | ast.Attribute():
                ends, rest = chain(node)
                mark(role if isinstance(node.ctx, ast.Load) else "store", ends)
                if rest is not None:
                    visit(rest)
                return
            case ast.Call():
                visit(node.func, "call")
                for argument in (*node.args, *node.keywords):
                    visit(argument)
                return
            case ast.keyword(arg=str(name)):
                written("keyword", node, 0, name)
            case ast.arg(arg=name):
                written("parameter", node, 0, name)
            case ast.FunctionDef(name=name):
                written("def", node, len("def "), name)
            case ast.AsyncFunctionDef(name=name):
                written("def", node, len("async def "), name)
            case ast.ClassDef(name=name):
                written("class", node, len("class "), name)
            case ast.ImportFrom(module=str(name), level=level):
                written("import", node, len("from ") + level, name)
            case ast.alias(name=name, asname=alias):
                written("import", node, 0, name)
                if alias:
                    mark("store", [(node.end_lineno, node.end_col_offset)])
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def spoken(path: Path) -> Iterator[list[tuple[str, Place | None]]]:
    """The words of each logical line, and where those end that are names or keywords."""
    text = common.read(path).split("\n")
    line: list[tuple[str, Place | None]] = []
    depth = 0  # of f-strings, which are tokens of their own from Python 3.12 on
    for token in common.tokens(path):
        if depth == 0 and token.type in {tokenize.STRING, *STARTS}:
            line.append(("<str>", None))
        depth += (token.type in STARTS) - (token.type in ENDS)
        if depth:
            continue
        if token.type == tokenize.NUMBER:
            line.append(("<num>", None))
        elif token.type == tokenize.NAME:
            row, column = token.end
            line.append((token.string, (row, len(text[row - 1][:column].encode()))))
        elif token.type == tokenize.NEWLINE:
            yield line
            line = []


def aloud(path: Path, longest: int) -> list[Sample]:
    """A file in pieces: as many lines together as have no more than ``longest`` words."""
    known = roles(common.syntax(path))
    samples = []
    words: list[str] = []
    tags: list[str] = []
    for line in spoken(path):
        parts: list[Span] = []
        before = -1
        for k, (_, end) in enumerate(line):
            role, number = known.get(end, ("", -1)) if end else ("", -1)
            if role and number == before:
                parts[-1] = parts[-1]._replace(last=k + 1)
            elif role:
                parts.append(Span(role, k, k + 1))
            before = number
        if words and len(words) + len(line) >= longest:
            samples.append(Sample(words, tags))
            words, tags = [], []
        if len(line) < longest:
            words += [*(word for word, _ in line), LINE]
            tags += [*tags_of(parts, len(line)), "O"]
    return [*samples, Sample(words, tags)] if words else samples


# Columns


def columns(path: Path) -> list[Sample]:
    """The sentences of a file in columns: the word first, its tag last, empty lines between."""
    samples = []
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*common.read(path).split("\n"), ""], 1):
        fields = line.split()
        if not fields or fields[0] == "-DOCSTART-":
            if words:
                # also of the older scheme, in which B stands only between two spans of a kind
                samples.append(Sample(words, tags_of(spans(tags), len(tags))))
            words, tags = [], []
            continue
        if len(fields) < 2:
            common.stop(f"{path}, line {number}: expected a word and its tag, got {line.strip()!r}")
        if fields[-1] != "O" and fields[-1][:2] not in ("B-", "I-"):
            common.stop(
                f"{path}, line {number}: expected a tag as O, B-PER or I-PER in the last column, "
                f"got {fields[-1]!r}"
            )
        words.append(fields[0])
        tags.append(fields[-1])
    if len(samples) < 10:
        common.stop(f"{path}: expected at least 10 sentences in columns, got {len(samples)}")
    return samples


def read(options: argparse.Namespace) -> tuple[list[Sample], list[Sample]]:
    """To train on, and held out: another file, or every tenth sentence or module."""
    if options.held_out and not options.file:
        common.stop("--held-out: expected --file beside it, the sentences to train on")
    if options.file:
        found = columns(options.file)
        return (found, columns(options.held_out)) if options.held_out else common.split(found)
    paths = common.modules(files=options.files)
    parts = common.split([aloud(path, options.longest) for path in paths])
    train, held_out = ([sample for part in some for sample in part] for some in parts)
    return train, held_out


# Features and batches


@functools.cache
def features(word: str) -> tuple[int, ...]:
    """Hashes of a word, of its first and last letters, and of its shape: Xx_x of Some_name."""
    shape = "".join(
        "X" if c.isupper() else "9" if c.isdigit() else c if c in "_<>-." else "x" for c in word
    )
    short = re.sub(r"(.)\1+", r"\1", shape)
    parts = f"w{word.lower()}", f"p{word[:3].lower()}", f"s{word[-3:].lower()}", f"h{short}"
    return tuple(zlib.crc32(part.encode()) % BUCKETS for part in parts)


def encoded(samples: Sequence[Sample], labels: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Of each sample the features (T, 4) and the tags' numbers (T,)."""
    numbers = {label: k for k, label in enumerate(labels)}
    return [
        (
            torch.tensor([features(word) for word in sample.words]),
            torch.tensor([numbers[tag] for tag in sample.tags]),
        )
        for sample in samples
    ]


def collated(pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
    words, tags = zip(*pairs, strict=True)
    lengths = torch.tensor([len(one) for one in tags])
    pad = nn.utils.rnn.pad_sequence
    return pad(words), pad(tags, padding_value=-100), lengths


def batches(pairs: Sequence[tuple[Tensor, Tensor]], size: int, seed: int) -> Iterator[Batch]:
    """Without end, each time in another order."""
    order = random.Random(seed)
    while True:
        mixed = order.sample(pairs, len(pairs))
        for start in range(0, len(mixed), size):
            yield collated(mixed[start : start + size])


# Models


class Window(nn.Module):
    """A hidden layer over each word and its neighbours, zeros beyond the ends."""

    def __init__(self, input_size: int, hidden_size: int, words: int = 5) -> None:
        super().__init__()
        self.words = words
        self.hidden = nn.Linear(words * input_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """(T, B, H) of x (T, B, E)."""
        T, around = len(x), self.words // 2
        x = nn.functional.pad(x, (0, 0, 0, 0, around, around))
        return torch.tanh(self.hidden(torch.cat([x[k : k + T] for k in range(self.words)], 2)))


class Tagger(nn.Module):
    """Features, a layer that reads them, and a score for each tag; by a CRF the tags are weighed
    together, without one each alone."""

    def __init__(
        self, labels: Sequence[str], layers: int, crf: bool, options: argparse.Namespace
    ) -> None:
        super().__init__()
        H, K = options.hidden, len(labels)
        self.embedding = nn.Embedding(BUCKETS, H)
        self.dropout = nn.Dropout(options.dropout)
        if layers:
            self.reader = fastseq.LSTM(H, H, layers, bidirectional=True, backend=options.backend)
        else:
            self.reader = Window(H, 2 * H)
        self.readout = nn.Linear(2 * H, K)
        nn.init.normal_(self.embedding.weight, std=0.3)
        # what the scheme forbids, such as I- behind O, has probability 0
        self.crf = fastseq.CRF(K, forbidden=fastseq.CRF.forbidden_by(labels)) if crf else None

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        """(T, B, K)"""
        x = self.dropout(self.embedding(words).sum(2))
        if isinstance(self.reader, Window):
            alive = torch.arange(len(x))[:, None] < lengths
            y = self.reader(x * alive[:, :, None])
        else:
            y = common.ragged(self.reader, x, lengths)[0]
        return self.readout(self.dropout(y))

    def decode(self, words: Tensor, lengths: Tensor) -> list[list[int]]:
        scores = self(words, lengths)
        if self.crf is not None:
            return self.crf.decode(scores, lengths=lengths)
        found = scores.argmax(2).t().tolist()
        return [tags[:length] for tags, length in zip(found, lengths.tolist(), strict=True)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Per word: -log p(tags), of a sequence or of single tags."""
    words, tags, lengths = batch
    scores = model(words, lengths)
    if model.crf is not None:
        return -model.crf(scores, tags, lengths=lengths, reduction="token_mean")
    return nn.functional.cross_entropy(scores.flatten(0, 1), tags.flatten(), ignore_index=-100)


@torch.no_grad()
def tagged(
    model: Tagger, pairs: Sequence[tuple[Tensor, Tensor]], labels: Sequence[str]
) -> list[list[str]]:
    model.eval()
    found: list[list[str]] = []
    for start in range(0, len(pairs), 64):
        words, _, lengths = collated(pairs[start : start + 64])
        found += [[labels[k] for k in tags] for tags in model.decode(words, lengths)]
    model.train()
    return found


def most_frequent(train: Sequence[Sample], samples: Sequence[Sample]) -> list[list[str]]:
    """Each word's most frequent tag, and of words never met the most frequent of all."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in train:
        for word, tag in zip(*sample, strict=True):
            counts[word][tag] += 1
    usual = sum(counts.values(), Counter()).most_common(1)[0][0]
    best = {word: found.most_common(1)[0][0] for word, found in counts.items()}
    return [[best.get(word, usual) for word in sample.words] for sample in samples]


# What is shown


def bracketed(words: Sequence[str], tags: Sequence[str]) -> str:
    """[self stream write]call [data]read"""
    ends = {span.last: span for span in spans(tags)}
    begins = {span.first for span in spans(tags)}
    found = []
    for k, word in enumerate(words):
        closing = f"]{ends[k + 1].kind}" if k + 1 in ends else ""
        found.append(f"{'[' * (k in begins)}{word}{closing}")
    return " ".join(found)


def beside_torchcrf(labels: Sequence[str], batch: Batch, seconds: float) -> float | None:
    """How many times as fast as pytorch-crf a CRF is, forward and backward, of the same numbers."""
    if importlib.util.find_spec("torchcrf") is None:
        return None
    import torchcrf

    _, tags, lengths = batch
    K = len(labels)
    both = [torchcrf.CRF(K), fastseq.CRF(K)]
    both[1].load_state_dict(both[0].state_dict())
    mask = torch.arange(len(tags))[:, None] < lengths
    tags = tags.clamp_min(0)
    emissions = torch.randn(*tags.shape, K, requires_grad=True)
    times: tuple[list[float], list[float]] = ([], [])
    start, values = time.perf_counter(), [0.0, 0.0]
    while len(times[0]) < 3 or time.perf_counter() - start < seconds:
        for which, crf in enumerate(both):
            began = time.perf_counter()
            value = crf(emissions, tags, mask=mask)
            value.backward()
            times[which].append(time.perf_counter() - began)
            values[which] = value.item()
    if abs(values[0] - values[1]) > 1e-3 * abs(values[0]):
        raise ValueError(f"the log-likelihoods differ: {values}")
    return median(times[0][1:]) / median(times[1][1:])


def plot(scores: dict[str, Score], baseline: Score, title: str, path: Path) -> None:
    """Bars of span F1 without and with a CRF; a dashed line for the most frequent tag."""
    figure, axes = common.picture()
    for k, name in enumerate(READERS):
        for which, colour in enumerate((common.TORCH, common.FASTSEQ)):
            score = scores[name + " + CRF" * which].f1
            label = ("each tag alone", "CRF")[which] if k == 0 else None
            bar = axes.bar(k + 0.4 * which - 0.2, score, 0.38, color=colour, label=label)
            axes.bar_label(bar, fmt="{:.3f}", padding=2)
    axes.axhline(baseline.f1, color="#555555", linestyle="--", label="the word's most frequent tag")
    axes.set_xticks(range(len(READERS)), READERS)
    axes.set_ylim(0, 1.15)
    axes.set_ylabel("F1 of spans, held out")
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False, ncols=3, loc="upper left")
    common.save(figure, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=300.0)
    add = parser.add_argument
    add("--file", type=Path, help="sentences in columns; the standard library if left out")
    add("--held-out", type=Path, help="others to test on; every tenth of --file if left out")
    add("--files", type=common.positive, help="read so many modules; all if left out")
    add("--longest", type=common.positive, default=60, help="words of a sample of the library")
    add("--hidden", type=common.positive, default=128, help="of features and of each direction")
    add("--dropout", type=float, default=0.3)
    add("--batch", type=common.positive, default=32)
    add("--steps", type=common.positive, default=1200, help="updates of each model")
    add("--lr", type=common.above_zero, default=3e-3)
    add("--race", type=common.above_zero, default=5.0, help="seconds beside each of torch.nn's")
    short = {
        "files": 60,
        "hidden": 64,
        "batch": 16,
        "steps": 240,
        "lr": 1e-2,
        "race": 1.0,
        "seconds": 30.0,
    }
    options = common.parse(parser, argv, short)
    if not 0 <= options.dropout < 1:
        parser.error(f"argument --dropout: expected at least 0, below 1, got {options.dropout:g}")
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    train, held_out = read(options)
    labels = sorted({tag for sample in [*train, *held_out] for tag in sample.tags} | {"O"})
    pairs, held_pairs = encoded(train, labels), encoded(held_out, labels)
    truth = [sample.tags for sample in held_out]
    counts = [sum(len(sample.words) for sample in some) for some in (train, held_out)]
    print(f"{counts[0]:,} words to train on, {counts[1]:,} held out, {len(labels)} tags")

    usual = most_frequent(train, held_out)
    baseline = Score.of(usual, truth)
    rows = [("most frequent tag", f"{baseline.accuracy:.4f}", f"{baseline.f1:.4f}")]
    figures = {"baseline_accuracy": baseline.accuracy, "baseline_f1": baseline.f1}
    scores: dict[str, Score] = {}
    models: dict[str, Tagger] = {}
    for (name, layers), crf in itertools.product(READERS.items(), (False, True)):
        torch.manual_seed(options.seed)
        label = name + " + CRF" * crf
        models[label] = model = Tagger(labels, layers, crf, options)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.lr, fused=True)
        falls = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda k: max(0.0, 1 - k / options.steps)
        )
        done = common.train(
            label,
            model,
            loss,
            batches(pairs, options.batch, options.seed),
            steps=options.steps,
            seconds=options.seconds / 6,
            optimizer=optimizer,
            after=lambda _, falls=falls: falls.step(),
        )
        found = tagged(model, held_pairs, labels)
        scores[label] = score = Score.of(found, truth)
        key = {"window": "window", "BiLSTM": "bilstm", "2 BiLSTMs": "stack"}[name] + "_crf" * crf
        figures |= {f"{key}_accuracy": score.accuracy, f"{key}_f1": score.f1}
        rows.append((label, f"{score.accuracy:.4f}", f"{score.f1:.4f}", f"{done.elapsed:.1f}"))
    print(f"\n{common.table(('', 'accuracy', 'F1 of spans', 'seconds'), rows)}\n")
    shown = max(range(len(truth)), key=lambda k: sum(tag[0] == "I" for tag in truth[k][:16]))
    for name, tags in (("Held out", truth[shown]), ("Found", found[shown])):
        print(f"{name + ':':10} {bracketed(held_out[shown].words[:16], tags[:16])}")
    print()

    rows = []
    for name in ("BiLSTM + CRF", "2 BiLSTMs + CRF"):
        given = batches(pairs, options.batch, options.seed + 1)
        speed = common.speed(models[name], loss, given, seconds=options.race)
        rows.append(speed.row(name))
        figures[f"{'bilstm' if name[0] == 'B' else 'stack'}_ratio"] = speed.ratio
    words = 1e3 * counts[0] / len(pairs) * options.batch
    print(
        f"{common.table(common.SPEEDS, rows)}\n"
        f"(Words a second by 2 BiLSTMs + CRF: {words / speed.torch_ms:,.0f} and "
        f"{words / speed.fastseq_ms:,.0f}.)"
    )
    batch = next(batches(pairs, options.batch, options.seed + 1))
    ratio = beside_torchcrf(labels, batch, options.race / 2)
    if ratio is not None:
        figures["crf_ratio"] = ratio
        print(f"The CRF alone, forward and backward: {ratio:.0f} times as fast as pytorch-crf.")
    print()
    plot(scores, baseline, f"{options.hidden} units, {len(labels)} tags", options.out / "tag.png")
    best = max(scores, key=lambda name: scores[name].f1)
    print(
        f"F1 of spans that were held out: {scores[best].f1:.3f} by {best}, {baseline.f1:.3f} by "
        f"each word's most frequent tag."
    )
    return figures


if __name__ == "__main__":
    common.run(main)
