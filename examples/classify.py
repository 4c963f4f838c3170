"""Tell from a docstring which package of the standard library it comes from, by ten models.

One task for the acceptors of the textbooks: the mean of the embeddings, a text CNN with each
pooling over time, and Elman, GRU, LSTM and BiLSTM layers, which read texts of different lengths in
one batch by ``lengths=``. All learn from scratch, embeddings too; each stops early by its accuracy
on validation texts, and is then asked about texts held out. These come from the same files, but no
text comes twice, and none holds the name of its package. With --csv the texts are your own.

Paper: Kim 2014, Convolutional Neural Networks for Sentence Classification.

    python examples/classify.py
    python examples/classify.py --csv reviews.csv
"""

from __future__ import annotations

import argparse
import csv
import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

import fastseq
from fastseq.pooling import Pooling

WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]")  # letters, numbers, and each sign by itself
#: Packages of the standard library with many docstrings. Not every Python has them all.
PACKAGES = (
    "asyncio",
    "distutils",
    "email",
    "http",
    "idlelib",
    "importlib",
    "logging",
    "multiprocessing",
    "tkinter",
    "unittest",
    "urllib",
    "xml",
)
PADDING, UNKNOWN = 0, 1  # numbers of no word


class Document(NamedTuple):
    words: list[str]
    label: str


#: The numbers of a text's words, and that of its label.
Numbered = tuple[Tensor, int]


class Batch(NamedTuple):
    """``words`` (B, T) numbers, padded; ``lengths`` and ``labels`` (B,)."""

    words: Tensor
    lengths: Tensor
    labels: Tensor


# Texts


def docstrings(packages: list[str]) -> list[Document]:
    """Those of each package, without its own name."""
    documents = []
    for package in packages:
        for path in sorted((common.STDLIB / package).rglob("*.py")):
            if common.APART.isdisjoint(path.parts[len(common.STDLIB.parts) :]):
                for found in common.docstrings(path):
                    words = WORD.findall(found.text.lower())
                    words = [word for word in words if package not in word]
                    documents.append(Document(words, package))
    return documents


def table_of_texts(path: Path) -> list[Document]:
    """The rows text,label of a file; a first row of these very words is its header."""
    documents = []
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for number, row in enumerate(csv.reader(file), 1):
                if row and len(row) != 2:
                    common.stop(f"{path}, row {number}: expected text,label, got {len(row)} fields")
                if row and (number > 1 or row != ["text", "label"]):
                    documents.append(Document(WORD.findall(row[0].lower()), row[1].strip()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        common.stop(f"--csv {path}: {error}")
    return documents


def cleaned(documents: list[Document], longest: int) -> list[Document]:
    """Cut to the longest length; each text once, or it would be held out and trained on; texts
    of fewer than three words, of which nobody could tell, are left out."""
    seen: dict[tuple[str, ...], Document] = {}
    for document in documents:
        words = document.words[:longest]
        if len(words) >= 3:
            seen.setdefault(tuple(words), Document(words, document.label))
    return list(seen.values())


class Corpus:
    """Documents in three parts, as numbers: to train on, to validate on, and held out."""

    def __init__(self, documents: list[Document]) -> None:
        documents = sorted(documents, key=lambda document: document.label)  # each part has all
        rest, held_out = common.split(documents)
        train, valid = common.split(rest)
        self.labels = sorted({document.label for document in documents})
        counts = Counter(word for document in train for word in document.words)
        known = sorted(word for word, count in counts.items() if count > 1)
        self.numbers = {word: k for k, word in enumerate(known, UNKNOWN + 1)}
        self.vocabulary = len(known) + UNKNOWN + 1
        self.train, self.valid, self.held_out = map(self._numbered, (train, valid, held_out))

    def _numbered(self, documents: list[Document]) -> list[Numbered]:
        return [
            (
                torch.tensor([self.numbers.get(word, UNKNOWN) for word in document.words]),
                self.labels.index(document.label),
            )
            for document in documents
        ]

    def majority(self) -> float:
        """Accuracy of who always names the label that is most frequent in training."""
        most = Counter(label for _, label in self.train).most_common(1)[0][0]
        return sum(label == most for _, label in self.held_out) / len(self.held_out)


def batch_of(documents: list[Numbered]) -> Batch:
    words, labels = zip(*documents, strict=True)
    lengths = torch.tensor([len(one) for one in words])
    padded = nn.utils.rnn.pad_sequence(list(words), batch_first=True, padding_value=PADDING)
    return Batch(padded, lengths, torch.tensor(labels))


def in_order(documents: list[Numbered], size: int) -> Iterator[Batch]:
    for k in range(0, len(documents), size):
        yield batch_of(documents[k : k + size])


def epoch(documents: list[Numbered], size: int, generator: torch.Generator) -> list[Batch]:
    """All documents in a new order. Neighbours in a batch are of similar lengths, to a random
    extent: little is padded, and batches differ from epoch to epoch."""
    noise = torch.rand(len(documents), generator=generator).tolist()
    keys = [len(words) * (0.8 + 0.4 * noise[k]) for k, (words, _) in enumerate(documents)]
    order = sorted(range(len(documents)), key=keys.__getitem__)
    batches = list(in_order([documents[k] for k in order], size))
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


# Encoders: of (B, T, E) embeddings and their lengths (B, features)


class CBOW(nn.Module):
    """The mean of the embeddings, whatever their order.

    Source: Iyyer et al. 2015, Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pool = Pooling("average", batch_first=True)
        self.features = size

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return self.pool(x, lengths)


class TextCNN(nn.Module):
    """Filters over 2, 3 and 4 neighbours, of whose outputs over time a pooling keeps some.

    Source: Kim 2014, Convolutional Neural Networks for Sentence Classification.
    """

    WIDTHS = (2, 3, 4)

    def __init__(self, size: int, filters: int, pool: Pooling) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(size, filters, width, padding=width // 2) for width in self.WIDTHS
        )
        self.pool = pool
        self.features = filters * len(self.WIDTHS) * pool.size

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        channels, steps = x.transpose(1, 2), x.shape[1]
        found = torch.cat([convolve(channels)[..., :steps] for convolve in self.convolutions], 1)
        return self.pool(found.relu().transpose(1, 2), lengths)


class Recurrent(nn.Module):
    """A layer that reads the words in turn, and its last state, of both directions where it has
    two, or a pooling of its output."""

    def __init__(self, layer: nn.Module, pool: Pooling | None = None) -> None:
        super().__init__()
        self.layer, self.pool = layer, pool
        self.features = layer.hidden_size * (1 + layer.bidirectional)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y, state = common.ragged(self.layer, x, lengths)
        if self.pool is not None:
            return self.pool(y, lengths)
        h_n = state[0] if isinstance(state, tuple) else state
        return h_n.transpose(0, 1).flatten(1)


class Classifier(nn.Module):
    """Embedding, an encoder, and a linear readout, with dropout before and after the encoder."""

    def __init__(self, encoder: nn.Module, vocabulary: int, size: int, labels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size, padding_idx=PADDING)
        self.encoder = encoder
        self.dropout = nn.Dropout(0.3)
        self.readout = nn.Linear(encoder.features, labels)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        x = self.dropout(self.embedding(words))
        return self.readout(self.dropout(self.encoder(x, lengths)))


def encoders(size: int, hidden: int, backend: str | None) -> dict[str, Callable[[], nn.Module]]:
    rest = {"batch_first": True, "backend": backend}
    poolings = {
        "max": ("max", 1),
        "average": ("average", 1),
        "k-max": ("k_max", 3),
        "dynamic": ("region_max", 3),
    }

    def cnn(kind: str, kept: int) -> Callable[[], nn.Module]:
        return lambda: TextCNN(size, hidden, Pooling(kind, kept, batch_first=True))

    def bilstm() -> nn.Module:
        return fastseq.LSTM(size, hidden, bidirectional=True, **rest)

    return {
        "CBOW": lambda: CBOW(size),
        **{f"CNN {name}": cnn(*pooling) for name, pooling in poolings.items()},
        "Elman": lambda: Recurrent(fastseq.RNN(size, hidden, **rest)),
        "GRU": lambda: Recurrent(fastseq.GRU(size, hidden, **rest)),
        "LSTM": lambda: Recurrent(fastseq.LSTM(size, hidden, **rest)),
        "BiLSTM": lambda: Recurrent(bilstm()),
        "BiLSTM max": lambda: Recurrent(bilstm(), Pooling("max", batch_first=True)),
    }


# Training


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch.words, batch.lengths), batch.labels)


@torch.no_grad()
def answers(model: nn.Module, documents: list[Numbered], size: int) -> list[int]:
    """The label that a model gives to each document."""
    model.eval()
    found = [model(one.words, one.lengths).argmax(1) for one in in_order(documents, size)]
    model.train()
    return torch.cat(found).tolist()


def accuracy(given: list[int], documents: list[Numbered]) -> float:
    right = sum(label == answer for (_, label), answer in zip(documents, given, strict=True))
    return right / len(documents)


class Watch:
    """A model's accuracy on the validation texts, epoch after epoch, and its best parameters."""

    PATIENCE = 3  # epochs in a row that may bring nothing

    def __init__(self, model: nn.Module, documents: list[Numbered], size: int) -> None:
        self.model, self.documents, self.size = model, documents, size
        self.steps: list[int] = []  # of training, at each look
        self.accuracies: list[float] = []
        self.best: dict[str, Tensor] = {}

    def look(self, step: int) -> None:
        known = accuracy(answers(self.model, self.documents, self.size), self.documents)
        if not self.accuracies or known > max(self.accuracies):
            self.best = deepcopy(self.model.state_dict())
        self.steps.append(step)
        self.accuracies.append(known)

    @property
    def idle(self) -> bool:
        if not self.accuracies:
            return False
        best = self.accuracies.index(max(self.accuracies))
        return len(self.accuracies) - 1 - best >= self.PATIENCE


@dataclass
class Result:
    """What became of a model, with the parameters of its best epoch."""

    label: str
    model: nn.Module
    seconds: list[float]  # of training, at each look at the validation texts
    looks: list[float]  # accuracy on them
    speed: float  # documents a second in training
    answers: list[int]  # to what is held out
    accuracy: float
    beside: common.Speed | None = None  # a step with torch.nn's layer, and with fastseq's

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())


def trained(
    label: str, model: nn.Module, corpus: Corpus, options: argparse.Namespace, seconds: float
) -> Result:
    """Train until the time is up or some epochs in a row brought nothing; keep the best epoch."""
    generator = torch.Generator().manual_seed(options.seed)
    watch = Watch(model, corpus.valid, options.batch)
    read = [0]  # documents, step by step

    def batches() -> Iterator[Batch]:
        while not watch.idle:
            for batch in epoch(corpus.train, options.batch, generator):
                read.append(read[-1] + len(batch.labels))
                yield batch
            watch.look(len(read) - 1)

    most = options.epochs * -(-len(corpus.train) // options.batch)
    run = common.train(label, model, loss, batches(), steps=most, seconds=seconds, lr=options.lr)
    if len(run.losses) not in watch.steps:  # it ended within an epoch, or before the look
        watch.look(len(run.losses))
    model.load_state_dict(watch.best)
    given = answers(model, corpus.held_out, options.batch)
    return Result(
        label=label,
        model=model,
        seconds=[run.seconds[step - 1] for step in watch.steps],
        looks=watch.accuracies,
        speed=read[-1] / run.elapsed,
        answers=given,
        accuracy=accuracy(given, corpus.held_out),
    )


def best_of(results: list[Result]) -> Result:
    """By the validation texts: what is held out has no say in it."""
    return max(results, key=lambda result: max(result.looks))


def confused(result: Result, corpus: Corpus, most: int = 4) -> str:
    """The mistakes that a model makes most often."""
    pairs = Counter(
        (corpus.labels[label], corpus.labels[answer])
        for (_, label), answer in zip(corpus.held_out, result.answers, strict=True)
        if label != answer
    )
    return ", ".join(
        f"{label} taken for {answer} ({count})"
        for (label, answer), count in pairs.most_common(most)
    )


# What is shown


def plot(results: list[Result], majority: float, path: Path) -> None:
    """Accuracy on what is held out as bars, and on the validation texts against time."""
    figure, (bars, curves) = common.picture(2, height=4.4)
    upwards = results[::-1]
    for k, result in enumerate(upwards):
        colour = common.FASTSEQ if result.beside else "#8a8a8a"
        bars.barh(k, result.accuracy, color=colour)
        bars.text(0.02, k, f"{result.accuracy:.1%}", color="white", va="center", fontsize=8)
    bars.set_yticks(range(len(upwards)), [result.label for result in upwards])
    bars.axvline(majority, color="black", linewidth=1, linestyle=":")
    bars.set_xlabel("accuracy on texts held out")
    bars.set_title("blue: fastseq's layers; dotted: majority", fontsize=11, loc="left")
    bars.grid(visible=False, axis="y")
    counts = Counter()
    for result in results:
        line = "-o" if result.beside else "--o"
        colour = common.COLOURS[counts[line] % len(common.COLOURS)]
        counts[line] += 1
        curves.plot(
            result.seconds, result.looks, line, color=colour, markersize=3, label=result.label
        )
    curves.set_xlabel("seconds of training")
    curves.set_ylabel("accuracy on validation texts")
    curves.legend(frameon=False, fontsize=8)
    common.save(figure, path)


def figures(results: list[Result], majority: float) -> dict[str, float]:
    """What ``main`` returns: the accuracy of each model by its name, and of the best; and how many
    times as fast as torch.nn's the recurrent ones train."""
    found = {"majority": majority, "accuracy": best_of(results).accuracy}
    for result in results:
        name = re.sub(r"\W", "_", result.label.lower())
        found[name] = result.accuracy
        if result.beside:
            found[f"{name}_ratio"] = result.beside.ratio
    return found


def report(results: list[Result], majority: float) -> str:
    header = ["", "accuracy", "parameters", "seconds", "documents/s"]
    header += ["torch.nn ms", "fastseq ms", "times as fast"]
    rows = [["majority", f"{majority:.1%}", *[""] * 6]]
    for one in results:
        row = [one.label, f"{one.accuracy:.1%}", f"{one.parameters:,}"]
        row += [f"{one.seconds[-1]:.1f}", f"{one.speed:,.0f}"]
        if one.beside:
            row += one.beside.row("")[1:]
        rows.append(row + [""] * (len(header) - len(row)))
    return common.table(header, rows)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=150.0)
    parser.add_argument("--csv", type=Path, help="a file of rows text,label, not docstrings")
    parser.add_argument("--packages", nargs="+", help="of the standard library; the labels")
    parser.add_argument("--models", nargs="+", help="some of the models, by the table's names")
    parser.add_argument("--size", type=common.positive, default=64, help="of an embedding")
    parser.add_argument("--hidden", type=common.positive, default=64, help="units, or filters")
    parser.add_argument("--longest", type=common.positive, default=100, help="words of a text")
    parser.add_argument("--batch", type=common.positive, default=32)
    parser.add_argument("--epochs", type=common.positive, default=40, help="at most")
    parser.add_argument("--lr", type=common.above_zero, default=3e-3)
    options = common.parse(
        parser,
        argv,
        short={"seconds": 20.0, "size": 32, "hidden": 48, "longest": 32, "epochs": 4, "lr": 1e-2},
    )
    if options.packages is None:
        options.packages = [name for name in PACKAGES if (common.STDLIB / name).is_dir()]
    for name in options.packages:
        if not (common.STDLIB / name).is_dir():
            parser.error(f"argument --packages: the standard library has no package {name!r}")
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    made = encoders(options.size, options.hidden, options.backend)
    names = options.models or list(made)
    for name in names:
        if name not in made:
            common.stop(f"--models: expected some of {', '.join(made)}; got {name!r}")
    documents = table_of_texts(options.csv) if options.csv else docstrings(options.packages)
    corpus = Corpus(cleaned(documents, options.longest))
    if len(corpus.labels) < 2 or not corpus.valid:
        common.stop(
            f"expected at least 2 labels and 20 texts; there are {len(corpus.labels)} labels "
            f"and {len(corpus.train)} texts of at least three words, each once"
        )
    counts = Counter(corpus.labels[label] for _, label in corpus.train)
    print(
        f"{len(corpus.train):,} texts to train on, {len(corpus.valid)} to validate on, "
        f"{len(corpus.held_out)} held out; {corpus.vocabulary:,} words; "
        f"{len(corpus.labels)} labels:\n"
        + ", ".join(f"{label} {count}" for label, count in counts.most_common())
    )

    results: list[Result] = []
    for k, name in enumerate(names):
        left = options.seconds - sum(result.seconds[-1] for result in results)
        torch.manual_seed(options.seed)
        model = Classifier(made[name](), corpus.vocabulary, options.size, len(corpus.labels))
        result = trained(name, model, corpus, options, left / (len(names) - k))
        if isinstance(model.encoder, Recurrent):
            generator = torch.Generator().manual_seed(options.seed)
            batches = epoch(corpus.train, options.batch, generator)
            result.beside = common.speed(
                model, loss, batches, seconds=min(0.7, options.seconds), rounds=200
            )
        results.append(result)

    majority = corpus.majority()
    print(
        f"\n{report(results, majority)}\n(documents/s: in training; ms: a training step, in turn, "
        f"{common.threads()}; torch.nn's layers take packed sequences)"
    )
    plot(results, majority, options.out / "classify.png")
    best = best_of(results)
    if found := confused(best, corpus):
        print(f"Most frequent mistakes of {best.label}: {found}.")
    print(
        f"{best.label}, the best on validation texts, is right about {best.accuracy:.1%} of the\n"
        f"{len(corpus.held_out)} texts held out; always the most frequent label: {majority:.1%}."
    )
    return figures(results, majority)


if __name__ == "__main__":
    common.run(main)
