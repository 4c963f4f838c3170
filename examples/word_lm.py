"""Predict the next word: n-grams, a feed-forward network, and an RNN, GRU and LSTM, on one text.

The text is the prose of Python's standard library, its docstrings and comments, or a file of yours.
All models predict the same words of files that were not trained on, one by one, and perplexity says
how many words they hesitate between: n-grams with Kneser-Ney smoothing (modified, interpolated), a
network that reads a window of words, and fastseq's recurrent layers, which read all words so far.
Words beyond the vocabulary are one word, ``<unk>``, and numbers are another.

Paper: Chen and Goodman 1998, An Empirical Study of Smoothing Techniques for Language Modeling;
Bengio et al. 2003, A Neural Probabilistic Language Model; Mikolov et al. 2010, Recurrent Neural
Network Based Language Model; Zaremba et al. 2014, Recurrent Neural Network Regularization (where
the dropout is); Press and Wolf 2017, Using the Output Embedding to Improve Language Models (--tie).

    python examples/word_lm.py --hidden 300 --dropout 0.4 --tie
    python examples/word_lm.py --text novel.txt --vocabulary 10000
"""

from __future__ import annotations

import argparse
import itertools
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import common
import numpy as np
import torch
from torch import Tensor, nn

import fastseq

EOS, UNKNOWN, NUMBER = "<eos>", "<unk>", "<num>"
#: A word, a number, or the end of a sentence: a full stop before a blank, or an empty line.
WORD = re.compile(r"[^\W\d]\w*(?:'[^\W\d]\w*)?|(\d+)|([.!?](?=\s|$)|\n\s*\n)")
COMMENT = re.compile(r"^[ \t]*#+ ?(.*)$", re.MULTILINE)
DOCTEST = re.compile(r"^[ \t]*(?:>>>|\.\.\.).*$", re.MULTILINE)
NETWORKS = ("feed-forward", "RNN", "GRU", "LSTM")
CHUNK = 512  # words of a call that reads the held-out text

#: Words, the words after them, and whether they begin at the top of the text again.
Batch = tuple[Tensor, Tensor, bool]


# Text


def words(text: str) -> list[str]:
    """Lower-case words with <eos> behind each sentence."""
    found: list[str] = []
    for match in WORD.finditer(text.lower()):
        number, end = match.groups()
        if not end:
            found.append(NUMBER if number else match.group())
        elif found and found[-1] != EOS:
            found.append(EOS)
    return found if not found or found[-1] == EOS else [*found, EOS]


def prose(path: Path) -> str:
    """The docstrings of a file, without their examples, and the lines that are comments."""
    parts = [DOCTEST.sub("", docstring.text) for docstring in common.docstrings(path)]
    return "\n\n".join([*parts, "\n".join(COMMENT.findall(common.read(path)))])


def read(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Words to train on, and words that are held out: every tenth file, or a text's last tenth."""
    if options.text:
        found = words(common.read(options.text))
        cut = len(found) * 9 // 10
        return found[:cut], found[cut:]
    paths = common.modules(files=options.files, packages=options.packages)
    parts = common.split([words(prose(path)) for path in paths])
    train, held_out = ([word for part in some for word in part] for some in parts)
    return train, held_out


def vocabulary(train: list[str], size: int) -> dict[str, int]:
    """The most frequent words, numbered; <eos> is 0 and <unk> is 1."""
    counts = Counter(train)
    del counts[EOS]
    return {word: k for k, word in enumerate([EOS, UNKNOWN, *dict(counts.most_common(size - 2))])}


def numbered(text: list[str], numbers: dict[str, int]) -> np.ndarray:
    return np.array([numbers.get(word, numbers[UNKNOWN]) for word in text], dtype=np.int64)


# n-grams


def discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken off a count of 0, 1, 2, and 3 or more: 0, D_1, D_2, D_3+.

    With n_k n-grams that occur k times, Y = n_1 / (n_1 + 2 n_2), it is D_k = k - (k + 1) Y
    n_{k+1} / n_k (Chen and Goodman 1998, equation 26). Where a text is too small to have them, one
    half.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(float)
    if not n[1:5].all():
        return np.array([0, 0.5, 0.5, 0.5])
    k = np.arange(1, 4)
    found = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[2:5] / n[1:4]
    return np.array([0, *found.clip(0, k)])


class Order(NamedTuple):
    """The n-grams of one length. A key has the words' numbers as digits, the last one lowest."""

    grams: np.ndarray  # sorted keys
    kept: np.ndarray  # the count of each, less its discount
    contexts: np.ndarray  # sorted keys of all words but the last
    total: np.ndarray  # counts of each context, summed over last words
    spare: np.ndarray  # gamma: the part of the total that the discounts took

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, vocabulary: int) -> Order:
        taken = discounts(counts)[np.minimum(counts, 3)]
        contexts, which = np.unique(grams // vocabulary, return_inverse=True)
        total = np.bincount(which, counts)
        return cls(grams, counts - taken, contexts, total, np.bincount(which, taken) / total)


def at(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each wanted key stands among sorted keys, and whether it does."""
    place = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return place, keys[place] == wanted


class KneserNey:
    """Interpolated modified Kneser-Ney smoothing.

        p(w | h) = (c(h w) - D(c(h w))) / c(h .) + gamma(h) p(w | h')
        gamma(h) = sum over w of D(c(h w)) / c(h .)

    h' is h without its first word. c counts occurrences of the longest n-grams; of shorter ones it
    counts the different words before them. Beneath the single words all are equally likely.

    Args:
        codes: numbers of words, below ``vocabulary``, in their order. 0 stands before the first.
        n: the length of the longest n-grams.

    Source: Chen and Goodman 1998, section 3.
    """

    def __init__(self, codes: np.ndarray, n: int, vocabulary: int) -> None:
        if vocabulary**n > np.iinfo(np.int64).max:
            raise ValueError(
                f"vocabulary: expected at most {int(2 ** (63 / n))} words for n = {n}, got "
                f"{vocabulary}"
            )
        self.n, self.vocabulary = n, vocabulary
        grams, counts = np.unique(self.keys(codes, n), return_counts=True)
        orders = [Order.of(grams, counts, vocabulary)]
        for k in range(n - 1, 0, -1):
            # each different n-gram counts once for what follows its first word
            grams, counts = np.unique(grams % vocabulary**k, return_counts=True)
            orders.insert(0, Order.of(grams, counts, vocabulary))
            grams = np.unique(self.keys(codes, k))
        self.orders = orders

    def keys(self, codes: np.ndarray, k: int) -> np.ndarray:
        """Of the k-gram that ends at each word."""
        padded = np.concatenate([np.zeros(k - 1, np.int64), codes])
        found = np.zeros(len(codes), np.int64)
        for j in range(k):
            found = found * self.vocabulary + padded[j : j + len(codes)]
        return found

    def __len__(self) -> int:
        """How many n-grams of all lengths it holds."""
        return sum(len(order.grams) for order in self.orders)

    def probabilities(self, codes: np.ndarray) -> np.ndarray:
        """Of each word of a text, after those before it."""
        p = np.full(len(codes), 1 / self.vocabulary)
        for k, order in enumerate(self.orders, 1):
            keys = self.keys(codes, k)
            place, known = at(order.contexts, keys // self.vocabulary)
            gram, counted = at(order.grams, keys)
            kept = np.where(counted, order.kept[gram], 0)
            p = np.where(known, kept / order.total[place] + order.spare[place] * p, p)
        return p


def perplexity(probabilities: np.ndarray) -> float:
    """Of a text whose words had these probabilities."""
    return float(np.exp(-np.log(probabilities).mean()))


# Networks


class Window(nn.Module):
    """A hidden layer over the last few words, called as a recurrent layer is."""

    def __init__(self, input_size: int, hidden_size: int, words: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.words = input_size, hidden_size, words
        self.hidden = nn.Linear(words * input_size, hidden_size)

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, B, H) of x (T, B, E); the state is the words before, zeros if left out."""
        T, B, E = x.shape
        before = x.new_zeros(self.words - 1, B, E) if state is None else state
        x = torch.cat([before, x])
        windows = torch.cat([x[j : j + T] for j in range(self.words)], 2)
        return torch.tanh(self.hidden(windows)), x[T:]


class WordLM(nn.Module):
    """Embedding, a layer that reads, and a linear readout, with dropout between them.

    tie: the readout's weight is the embedding.
    """

    def __init__(self, layer: nn.Module, vocabulary: int, dropout: float, tie: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, layer.input_size)
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, vocabulary)
        self.dropout = nn.Dropout(dropout)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        nn.init.zeros_(self.readout.bias)
        if tie:
            self.readout.weight = self.embedding.weight

    def forward(self, codes: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits (T, B, V) of the next words and the state, of words (T, B)."""
        y, state = self.layer(self.dropout(self.embedding(codes)), state)
        return self.readout(self.dropout(y)), state


class Carried:
    """The loss of a window of text; the state goes on to the next one, its gradient does not."""

    state: Any = None

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets, fresh = batch
        state = None if fresh or self.state is None else common.detached(self.state)
        logits, self.state = model(inputs, state)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def alone(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a window from a state of zeros."""
    return Carried()(model, batch)


def layer_alone(model: nn.Module, x: Tensor) -> Tensor:
    """A loss without embedding and readout, to see what the layer itself takes."""
    return model[0](x)[0].square().mean()


@torch.no_grad()
def probabilities(model: WordLM, codes: np.ndarray) -> np.ndarray:
    """Of each word of a text, after those before it, as an n-gram's: <eos> stands before it."""
    model.eval()
    text = torch.from_numpy(np.concatenate([[0], codes]))[:, None]
    parts, state = [], None
    for start in range(0, len(codes), CHUNK):
        inputs, targets = text[start : start + CHUNK], text[start + 1 : start + CHUNK + 1]
        logits, state = model(inputs[: len(targets)], state)
        parts.append(logits.double().softmax(2).gather(2, targets[:, :, None]).flatten())
    model.train()
    return torch.cat(parts).numpy()


def network(name: str, options: argparse.Namespace, vocabulary: int) -> WordLM:
    """A model, its parameters from the seed."""
    torch.manual_seed(options.seed)
    H, layers = options.hidden, options.layers
    if name == "feed-forward":
        return WordLM(Window(H, H, options.window), vocabulary, options.dropout, options.tie)
    between = options.dropout if layers > 1 else 0.0
    layer = getattr(fastseq, name)(H, H, layers, dropout=between, backend=options.backend)
    return WordLM(layer, vocabulary, options.dropout, options.tie)


class Result(NamedTuple):
    p: np.ndarray  # probability of each word of the held-out text
    size: int  # parameters, or n-grams
    seconds: float
    words: int  # that were read in these seconds
    curve: list[tuple[int, float]]  # held-out perplexity after so many words

    @property
    def perplexity(self) -> float:
        return perplexity(self.p)


def trained(
    name: str, model: WordLM, data: Tensor, held_out: np.ndarray, options: argparse.Namespace
) -> Result:
    """Adam at a rate that falls to zero. Perplexity on the way is for the picture alone."""
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    falls = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 - done / options.steps)
    window = options.batch * options.bptt
    every = max(1, options.steps // options.points)
    curve = []

    def after(done: int) -> None:
        falls.step()
        if done % every == 0 and done < options.steps:
            curve.append((done * window, perplexity(probabilities(model, held_out))))

    done = common.train(
        name,
        model,
        Carried(),
        common.windows(data, options.bptt),
        steps=options.steps,
        seconds=options.seconds / len(options.networks),
        optimizer=optimizer,
        after=after,
    )
    read = len(done.losses) * window
    p = probabilities(model, held_out)
    size = sum(parameter.numel() for parameter in model.parameters())
    return Result(p, size, done.elapsed, read, [*curve, (read, perplexity(p))])


# The comparison


def counted(codes: np.ndarray, held_out: np.ndarray, n: int, vocabulary: int) -> Result:
    start = time.perf_counter()
    model = KneserNey(codes, n, vocabulary)
    seconds = time.perf_counter() - start
    return Result(model.probabilities(held_out), len(model), seconds, len(codes), [])


def plot(results: dict[str, Result], title: str, path: Path) -> None:
    """Held-out perplexity against words read; a dashed line for what only counts."""
    figure, axes = common.picture()
    curves = {name: result.curve for name, result in results.items() if result.curve}
    for (name, curve), colour in zip(curves.items(), common.COLOURS, strict=False):
        label = f"{name}, {curve[-1][1]:.1f}"
        axes.plot(*zip(*curve, strict=True), "o-", color=colour, label=label, markersize=4)
    for (name, result), dash in zip(
        ((n, r) for n, r in results.items() if not r.curve), (":", "-.", "--"), strict=False
    ):
        label = f"{name}, {result.perplexity:.1f}"
        axes.axhline(result.perplexity, color="#555555", linestyle=dash, label=label)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("words read in training")
    axes.set_ylabel("perplexity on held-out text")
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False)
    common.save(figure, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=400.0)
    add = parser.add_argument
    add("--text", type=Path, help="a text file; the standard library if left out")
    add("--files", type=common.positive, help="read so many modules; all if left out")
    add(
        "--packages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read the library's packages too",
    )
    add("--vocabulary", type=common.positive, default=5000, help="words, at most")
    add("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--hidden", type=common.positive, default=150, help="of embedding and layer")
    add("--layers", type=common.positive, default=1, help="of the recurrent networks")
    add("--window", type=common.positive, default=4, help="words the feed-forward one reads")
    add("--dropout", type=float, default=0.2)
    add("--tie", action="store_true", help="one matrix embeds words and predicts them")
    add("--batch", type=common.positive, default=20, help="streams read side by side")
    add("--bptt", type=common.positive, default=35, help="steps between two updates")
    add("--steps", type=common.positive, default=2000, help="updates of each network")
    add("--lr", type=common.above_zero, default=1e-2)
    add("--race", type=common.above_zero, default=5.0, help="seconds beside each of torch.nn's")
    add("--points", type=common.positive, default=8, help="of each curve in the picture")
    short = {
        "packages": False,
        "vocabulary": 2000,
        "hidden": 100,
        "dropout": 0.1,
        "bptt": 20,
        "steps": 400,
        "race": 1.0,
        "points": 4,
        "seconds": 40.0,
    }
    options = common.parse(parser, argv, short)
    if not 0 <= options.dropout < 1:
        parser.error(f"argument --dropout: expected at least 0, below 1, got {options.dropout:g}")
    if options.vocabulary**4 > np.iinfo(np.int64).max:  # the key of a 4-gram
        parser.error(f"argument --vocabulary: expected at most 55,108, got {options.vocabulary}")
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    train, held_out = read(options)
    numbers = vocabulary(train, options.vocabulary)
    V = len(numbers)
    codes, held_codes = numbered(train, numbers), numbered(held_out, numbers)
    data = common.columns(torch.from_numpy(codes), options.batch, options.bptt)
    unknown = float((held_codes == numbers[UNKNOWN]).mean())
    print(
        f"{len(codes):,} words to train on, {len(held_codes):,} held out, vocabulary {V:,} "
        f"({unknown:.1%} of the words held out are {UNKNOWN})"
    )

    results = {f"{n}-gram": counted(codes, held_codes, n, V) for n in (2, 3, 4)}
    models = {name: network(name, options, V) for name in options.networks}
    for name, model in models.items():
        results[name] = trained(name, model, data, held_codes, options)
    rows = [
        (
            name,
            f"{r.perplexity:.1f}",
            f"{r.size:,}",
            f"{r.seconds:.1f}",
            f"{r.words / r.seconds:,.0f}",
        )
        for name, r in results.items()
    ]
    best, grams = (
        min(names, key=lambda name: results[name].perplexity)
        for names in (options.networks, [name for name in results if name not in models])
    )
    both = perplexity((results[best].p + results[grams].p) / 2)
    rows.append((f"{best} + {grams}", f"{both:.1f}"))
    header = ("", "perplexity", "parameters", "seconds", "words/s")
    print(f"\n{common.table(header, rows)}")
    print("(An n-gram's parameters are the n-grams it has met; the last row is the mean of two.)\n")

    figures = {
        re.sub(r"(\d)-gram", r"kneser_ney_\1", name).lower().replace("-", "_"): result.perplexity
        for name, result in results.items()
    }
    figures["both"] = both
    rows = []
    for name in options.networks:
        if name == "feed-forward":
            continue
        windows = common.windows(data, options.bptt)
        model = models[name]
        x = model.embedding(next(windows)[0]).detach().requires_grad_()
        whole = common.speed(model, alone, windows, seconds=options.race)
        layer = common.speed(
            nn.Sequential(model.layer), layer_alone, itertools.repeat(x), seconds=options.race / 2
        )
        figures |= {
            f"{name.lower()}_ratio": whole.ratio,
            f"{name.lower()}_layer_ratio": layer.ratio,
        }
        rows += [whole.row(name), layer.row(f"{name}, the layer alone")]
    if rows:
        print(f"{common.table(common.SPEEDS, rows)}\n")
    title = f"{options.hidden} units, vocabulary {V:,}, dropout {options.dropout:g}"
    plot(results, title, options.out / "word_lm.png")
    print(
        f"Held-out perplexity: {results[best].perplexity:.1f} by the {best}, "
        f"{results[grams].perplexity:.1f} by the {grams} (Kneser-Ney), {both:.1f} by their mean."
    )
    return figures


if __name__ == "__main__":
    common.run(main)
