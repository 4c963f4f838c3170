"""Guess the first word of a function's name from its syntax tree: Tree-LSTM and LSTM side by side.

The functions are those of Python's own standard library, with names like ``get_data``, ``set`` or
``__init__``. A model sees the kinds of a function's syntax nodes, Python's built-in names and the
types of constants; every other name is hidden, and so is the docstring. One model is a child-sum
Tree-LSTM over the tree, the other an LSTM over the same nodes in the order in which one reads them.
At the end: the accuracy of both on functions that were not trained on, beside that of the commonest
word, seconds for each epoch, how much faster all trees of a batch are level by level than node by
node, and a picture of accuracy against time.

``--file`` takes trees in brackets instead, one a line, with a label at every node, as the Stanford
Sentiment Treebank has them, ``(3 (2 It) (4 (4 's) (3 good)))``: the models read the words and guess
the label of the root.

Paper: Tai, Socher, Manning 2015, Improved Semantic Representations From Tree-Structured Long
Short-Term Memory Networks.

    python examples/trees.py --epochs 12
    python examples/trees.py --file train.txt
"""

from __future__ import annotations

import argparse
import ast
import builtins
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

import fastseq
from fastseq.nn.trees import ChildSumTreeLSTM
from fastseq.ops.trees import Trees

SMALLEST, LARGEST = 12, 150  # nodes of a function
KNOWN = {*dir(builtins), "self", "cls", "super"}
UNKNOWN = "<unknown>"


class Item(NamedTuple):
    """A tree: the parent of each node, symbols of all nodes or of the leaves alone, and a label."""

    parents: list[int]
    symbols: list[str]
    label: str


class Batch(NamedTuple):
    """rows: (N,) or (L,), the symbols of all trees in a row. lengths: symbols of each tree."""

    trees: Trees
    rows: Tensor
    lengths: Tensor
    labels: Tensor
    parents: list[list[int]]


# Trees


def first_word(name: str) -> str:
    """``get`` of ``get_data`` and of ``getData``, ``__init__`` of itself."""
    if re.fullmatch(r"__\w+__", name):
        return name
    found = re.match(r"_*([a-z]+|[A-Z]+)", name)
    return found.group(1).lower() if found else ""


def symbol(node: ast.AST) -> str:
    """What a model sees of a node."""
    kind = type(node).__name__
    if isinstance(node, ast.Constant):
        named = node.value if node.value in (None, True, False, ...) else type(node.value).__name__
        return f"{kind} {named}"
    if isinstance(node, ast.Name) and node.id in KNOWN:
        return f"{kind} {node.id}"
    return kind


def without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        if isinstance(first.value.value, str):
            function.body = function.body[1:] or [ast.Pass()]


def item_of(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Item:
    """The nodes as one reads them, each before its children."""
    without_docstring(function)
    parents: list[int] = []
    symbols: list[str] = []
    waiting: list[tuple[ast.AST, int]] = [(function, -1)]
    while waiting:
        node, parent = waiting.pop()
        here = len(parents)
        parents.append(parent)
        symbols.append(symbol(node))
        below = [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.expr_context)]
        waiting += [(child, here) for child in reversed(below)]
    return Item(parents, symbols, first_word(function.name))


def functions(files: int | None, words: int) -> list[Item]:
    """The functions of the standard library whose first words are the commonest."""
    found = []
    for path in common.modules(files=files, packages=True):
        for node in ast.walk(common.syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                item = item_of(node)
                if SMALLEST <= len(item.parents) <= LARGEST:
                    found.append(item)
    commonest = [w for w, _ in Counter(item.label for item in found).most_common(words)]
    # of functions with the same tree, mostly copies, one: none is trained on and held out as well
    kept = {(*item.symbols, *item.parents): item for item in found if item.label in commonest}
    return list(kept.values())


def bracketed(path: Path) -> list[Item]:
    """The trees of a file, with the words at the leaves."""
    items = []
    for number, line in enumerate(common.read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            trees, labels, words = Trees.from_brackets([line])
        except ValueError as error:
            common.stop(f"{path}, line {number}: {error}")
        order = trees.tensor("order")
        parent = order[trees.tensor("parent")]
        parents = torch.empty_like(order)
        parents[order] = torch.where(parent == order, -1, parent)
        items.append(Item(parents.tolist(), [w.lower() for w in words], labels[0]))
    if len({item.label for item in items}) < 2:
        common.stop(f"{path}: expected trees with at least two different labels at their roots")
    return items


class Numbers:
    """Numbers for symbols and labels, of the training items."""

    def __init__(self, items: Sequence[Item]) -> None:
        seen = Counter(s for item in items for s in item.symbols)
        known = [UNKNOWN, *(s for s, count in seen.items() if count > 1)]
        self.symbols = {s: k for k, s in enumerate(known)}
        self.labels = {label: k for k, label in enumerate(sorted({i.label for i in items}))}

    def batch(self, items: Sequence[Item]) -> Batch:
        parents = [item.parents for item in items]
        rows = [self.symbols.get(s, 0) for item in items for s in item.symbols]
        return Batch(
            Trees.from_parents(parents),
            torch.tensor(rows),
            torch.tensor([len(item.symbols) for item in items]),
            torch.tensor([self.labels[item.label] for item in items]),
            parents,
        )


# Models


class OfTrees(nn.Module):
    """A Tree-LSTM, whose state at the root tells the label."""

    def __init__(self, numbers: Numbers, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(numbers.symbols), width)
        self.layer = ChildSumTreeLSTM(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Linear(hidden, len(numbers.labels))

    def forward(self, batch: Batch) -> Tensor:
        _, (h_n, _) = self.layer(self.dropout(self.embedding(batch.rows)), batch.trees)
        return self.readout(self.dropout(h_n))


class OfSequences(nn.Module):
    """An LSTM over the same symbols in their order, whose last state tells the label."""

    def __init__(
        self, numbers: Numbers, width: int, hidden: int, dropout: float, backend: str | None
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(numbers.symbols), width)
        self.layer = fastseq.LSTM(width, hidden, backend=backend)
        self.dropout = nn.Dropout(dropout)
        self.readout = nn.Linear(hidden, len(numbers.labels))

    def forward(self, batch: Batch) -> Tensor:
        padded = pad_sequence(batch.rows.split(batch.lengths.tolist()))
        embedded = self.dropout(self.embedding(padded))
        _, (h_n, _) = self.layer(embedded, lengths=batch.lengths)
        return self.readout(self.dropout(h_n[0]))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch), batch.labels)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
    model.eval()
    right = sum(int((model(batch).argmax(1) == batch.labels).sum()) for batch in batches)
    model.train()
    return right / sum(len(batch.labels) for batch in batches)


@dataclass
class Curve:
    """Accuracy on held-out items along a training, and what an epoch takes."""

    accuracies: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    epoch: float = 0.0


def train(
    label: str,
    model: nn.Module,
    numbers: Numbers,
    items: Sequence[Item],
    held_out: Sequence[Batch],
    options: argparse.Namespace,
    seconds: float,
) -> Curve:
    """Train for some epochs, and look after each."""
    draws = random.Random(options.seed)
    per_epoch = max(1, len(items) // options.batch)
    curve = Curve([accuracy(model, held_out)], [0.0])
    elapsed: list[float] = []

    def batches() -> Iterator[Batch]:
        """The trees of every batch are planned anew, which counts."""
        while True:
            mixed = draws.sample(items, len(items))
            for k in range(per_epoch):
                start = time.perf_counter()
                batch = numbers.batch(mixed[k * options.batch : (k + 1) * options.batch])
                elapsed.append(time.perf_counter() - start)
                yield batch

    def after(step: int) -> None:
        if step % per_epoch == 0:
            curve.accuracies.append(accuracy(model, held_out))
            looks.append(step)

    looks: list[int] = []  # the steps behind which we looked
    # on a throwaway copy: loading kernels and first allocations do not count
    loss(deepcopy(model), numbers.batch(items[: options.batch])).backward()
    run = common.train(
        label,
        model,
        loss,
        batches(),
        steps=options.epochs * per_epoch,
        seconds=seconds,
        lr=options.lr,
        after=after,
    )
    steps = len(run.losses)
    if steps % per_epoch:
        curve.accuracies.append(accuracy(model, held_out))
        looks.append(steps)
    planned = [*accumulate(elapsed)]
    curve.seconds += [run.seconds[step - 1] + planned[step - 1] for step in looks]
    curve.epoch = curve.seconds[-1] / steps * per_epoch
    return curve


# Node by node


def node_by_node(layer: ChildSumTreeLSTM, x: Tensor, batch: Batch) -> Tensor:
    """h of the roots, as one writes the equations down. x: a row for each symbol."""
    H = layer.hidden_size
    u_i, u_f, u_g, u_o = layer.weight_hh.split(H)
    roots, rows = [], iter(x)
    for parents in batch.parents:
        children: list[list[int]] = [[] for _ in parents]
        for node, parent in enumerate(parents):
            if parent >= 0:
                children[parent].append(node)
        all_nodes = batch.trees.num_nodes == len(x)
        own = [next(rows) if all_nodes or not c else x.new_zeros(x.shape[1]) for c in children]
        states: dict[int, tuple[Tensor, Tensor]] = {}
        for node in reversed(range(len(parents))):  # each stands before its children
            a = nn.functional.linear(own[node], layer.weight_ih, layer.bias)
            a_i, a_f, a_g, a_o = a.chunk(4)
            below = [states[k] for k in children[node]]
            h = sum((h for h, _ in below), x.new_zeros(H))
            c = torch.sigmoid(a_i + u_i @ h) * torch.tanh(a_g + u_g @ h)
            for h_k, c_k in below:
                c = c + torch.sigmoid(a_f + u_f @ h_k) * c_k
            states[node] = torch.sigmoid(a_o + u_o @ h) * torch.tanh(c), c
        roots.append(states[0][0])
    return torch.stack(roots)


def speed(model: OfTrees, batch: Batch, rounds: int) -> tuple[float, float]:
    """Seconds of forward and backward of the Tree-LSTM, node by node and as fastseq does it."""
    x = model.embedding(batch.rows).detach().requires_grad_()
    calls: list[Callable[[], Tensor]] = [
        lambda: node_by_node(model.layer, x, batch),
        lambda: model.layer(x, batch.trees)[1][0],
    ]
    if not torch.allclose(calls[0](), calls[1](), atol=1e-4):
        raise ValueError("node by node: the states of the roots are others")
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call().sum().backward()
            if turn:
                own.append(time.perf_counter() - start)
    model.zero_grad(set_to_none=True)
    return median(times[0]), median(times[1])


# The whole


def draw(curves: dict[str, Curve], majority: float, path: Path) -> None:
    figure, axes = common.picture()
    for (label, curve), colour in zip(curves.items(), common.COLOURS, strict=False):
        axes.plot(curve.seconds, curve.accuracies, "o-", markersize=3, color=colour, label=label)
    axes.axhline(majority, color="#888888", linestyle="--", label="commonest label")
    axes.set(xlabel="seconds of training", ylabel="accuracy on held-out trees")
    axes.legend(frameon=False)
    common.save(figure, path)


def main(argv: list[str] | None = None) -> dict[str, float]:
    made = common.parser(__doc__, seconds=120)
    made.add_argument("--file", type=Path, help="trees in brackets, one a line")
    made.add_argument("--files", type=common.positive, help="modules of the standard library")
    made.add_argument("--words", type=common.positive, default=12, help="how many first words")
    made.add_argument("--width", type=common.positive, default=64, help="of the embedding")
    made.add_argument("--hidden", type=common.positive, default=128)
    made.add_argument("--batch", type=common.positive, default=32)
    made.add_argument("--epochs", type=common.positive, default=12)
    made.add_argument("--lr", type=common.above_zero, default=3e-3)
    made.add_argument("--dropout", type=float, default=0.3)
    short = {"files": 260, "words": 8, "epochs": 6, "seconds": 12.0, "hidden": 96, "threads": 1}
    options = common.parse(made, argv, short)

    items = bracketed(options.file) if options.file else functions(options.files, options.words)
    random.Random(0).shuffle(items)
    training, rest = common.split(items)
    numbers = Numbers(training)
    rest = [item for item in rest if item.label in numbers.labels]
    if len(training) < options.batch or not rest:
        common.stop(f"expected more trees than a batch of {options.batch}, got {len(items)}")
    held_out = [numbers.batch(rest[k : k + 64]) for k in range(0, len(rest), 64)]
    commonest = Counter(item.label for item in training).most_common(1)[0][0]
    majority = sum(item.label == commonest for item in rest) / len(rest)
    nodes = sum(len(item.parents) for item in items) / len(items)
    print(
        f"{len(training)} trees to train on and {len(rest)} held out, of {nodes:.0f} nodes on "
        f"average;\n{len(numbers.labels)} labels: {', '.join(numbers.labels)}"
    )

    sizes = numbers, options.width, options.hidden, options.dropout
    models = {"Tree-LSTM": OfTrees(*sizes), "LSTM": OfSequences(*sizes, options.backend)}
    curves = {
        label: train(label, model, numbers, training, held_out, options, options.seconds / 2)
        for label, model in models.items()
    }
    nodes_s, levels_s = speed(models["Tree-LSTM"], numbers.batch(training[: options.batch]), 3)

    lines = [
        [label, f"{curve.accuracies[-1]:.1%}", f"{curve.epoch:.2f}", len(curve.seconds) - 1]
        for label, curve in curves.items()
    ]
    lines.append([f"always {commonest!r}", f"{majority:.1%}", "", ""])
    print(common.table(["", "accuracy", "s an epoch", "epochs"], lines))
    draw(curves, majority, options.out / "trees.png")
    print(
        f"A batch of {options.batch} trees, forward and backward, takes {1e3 * nodes_s:.0f} ms "
        f"node by node and {1e3 * levels_s:.1f} ms\nlevel by level, {nodes_s / levels_s:.0f} times "
        f"as fast."
    )
    found = {label: curve.accuracies[-1] for label, curve in curves.items()}
    print(
        f"Held-out accuracy: {found['Tree-LSTM']:.1%} with the Tree-LSTM, {found['LSTM']:.1%} with "
        f"the LSTM, {majority:.1%} by the commonest label."
    )
    return {
        "tree_accuracy": found["Tree-LSTM"],
        "sequence_accuracy": found["LSTM"],
        "majority": majority,
        "tree_epoch_s": curves["Tree-LSTM"].epoch,
        "sequence_epoch_s": curves["LSTM"].epoch,
        "node_by_node_ms": 1e3 * nodes_s,
        "levels_ms": 1e3 * levels_s,
    }


if __name__ == "__main__":
    common.run(main)
