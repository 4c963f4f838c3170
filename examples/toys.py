"""How long do cells remember? The toy problems of the literature, over longer and longer sequences.

Each problem needs something from the far past: two marked numbers to add, symbols to write down
after a long pause, the parity of all bits so far, the sign of a sum, the greater of two sums. Each
cell starts with the initial values that its literature recommends and goes on to longer sequences
as long as it learns, which is to get below a tenth of the loss of an answer that knows the problem
but not the sequence. Pictures show the loss against the steps, and how the gradient flows back
through time before any training. Where torch.nn has the cell, both take turns for the time a step.

Paper: Hochreiter and Schmidhuber 1997, Long Short-Term Memory (adding, and the problems' kind).
Paper: Le et al. 2015, A Simple Way to Initialize Recurrent Networks of Rectified Linear Units.
Paper: Arjovsky et al. 2016, Unitary Evolution Recurrent Neural Networks (copying).

    python examples/toys.py --tasks adding copying --lengths 20 50 100 200
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import common
import torch
from torch import Tensor, nn

import fastseq
from fastseq import init
from fastseq.training import gradient_flow, plot_gradient_flow

SYMBOLS, COPIED = 8, 10  # of copying: letters of its alphabet, and how many are to be written
LOOK = 50  # steps of training between two looks at sequences held out
HELD_OUT = 256  # sequences
LEARNED = 0.1  # of the baseline's loss

Batch = tuple[Tensor, Tensor]


# Problems: of T, B and a generator the inputs (T, B, I) and the targets (B,) or (T, B)


def adding(T: int, B: int, generator: torch.Generator) -> Batch:
    """Add two numbers in U(0, 1) that are marked, one in each half of the sequence."""
    values = torch.rand(T, B, generator=generator)
    first = torch.randint(T // 2, (B,), generator=generator)
    second = torch.randint(T // 2, T, (B,), generator=generator)
    marks = torch.zeros(T, B)
    marks[first, torch.arange(B)] = marks[second, torch.arange(B)] = 1
    return torch.stack([values, marks], -1), (values * marks).sum(0)


def copying(T: int, B: int, generator: torch.Generator) -> Batch:
    """Read ten symbols, wait, and write them down after a sign: T + 20 steps."""
    blank, sign = SYMBOLS, SYMBOLS + 1
    symbols = torch.randint(SYMBOLS, (COPIED, B), generator=generator)
    inputs = torch.full((T + 2 * COPIED, B), blank)
    targets = inputs.clone()
    inputs[:COPIED], inputs[-COPIED - 1], targets[-COPIED:] = symbols, sign, symbols
    return nn.functional.one_hot(inputs, SYMBOLS + 2).float(), targets


def parity(T: int, B: int, generator: torch.Generator) -> Batch:
    """Say at every step whether the number of ones so far is odd."""
    bits = torch.randint(2, (T, B), generator=generator)
    return nn.functional.one_hot(bits, 2).float(), bits.cumsum(0) % 2


def sign(T: int, B: int, generator: torch.Generator) -> Batch:
    """Say at the end whether the sum of numbers in N(0, 1) is above zero."""
    values = torch.randn(T, B, generator=generator)
    return values[..., None], (values.sum(0) > 0).long()


def compare(T: int, B: int, generator: torch.Generator) -> Batch:
    """Say at the end whether numbers in U(0, 1) have a greater sum in the second half."""
    values = torch.rand(T, B, generator=generator)
    half = torch.zeros(T, B)
    half[T // 2 :] = 1
    greater = values[T // 2 :].mean(0) > values[: T // 2].mean(0)
    return torch.stack([values, half], -1), greater.long()


class Task(NamedTuple):
    """``baseline``: the loss for T of the best answer that does not look at the sequence."""

    sample: Callable[[int, int, torch.Generator], Batch]
    inputs: int
    outputs: int
    every_step: bool
    baseline: Callable[[int], float]


TASKS = {
    "adding": Task(adding, 2, 1, False, lambda T: 1 / 6),  # the variance of the sum
    "copying": Task(
        copying,
        SYMBOLS + 2,
        SYMBOLS + 1,
        True,
        lambda T: COPIED * math.log(SYMBOLS) / (T + 2 * COPIED),
    ),
    "parity": Task(parity, 2, 2, True, lambda T: math.log(2)),
    "sign": Task(sign, 1, 2, False, lambda T: math.log(2)),
    "compare": Task(compare, 2, 2, False, lambda T: math.log(2)),
}


# Cells, and initial values of a layer that is to remember so many steps


def orthogonal(layer: nn.Module, steps: int) -> None:
    """Recurrent weights that keep lengths (Saxe et al. 2014)."""
    init.orthogonal_(layer)


def identity(layer: nn.Module, steps: int) -> None:
    """Of ReLU: recurrent weights that keep the state, and small input weights (Le et al. 2015)."""
    init.identity_(layer)
    nn.init.normal_(layer.weight_ih_l0, std=0.001)


def bounded(layer: nn.Module, steps: int) -> None:
    """Recurrent weights with which no unit grows to more than twice its value, and in the last
    layer none falls to less than half of it (Li et al. 2018)."""
    nn.init.uniform_(layer.weight_hh_l0, 0, 2 ** (1 / steps))
    nn.init.uniform_(layer.weight_hh_l1, 0.5 ** (1 / steps), 2 ** (1 / steps))


def chrono(layer: nn.Module, steps: int) -> None:
    """Gates that forget in 1 to so many steps (Tallec and Ollivier 2018)."""
    init.chrono_(layer, steps)


class CellKind(NamedTuple):
    """``state``: the one that is to remember."""

    layer: Callable[..., nn.Module]
    initial: Callable[[nn.Module, int], None]
    state: str = "h"


CELLS = {
    "Elman": CellKind(fastseq.RNN, orthogonal),
    "IRNN": CellKind(partial(fastseq.RNN, nonlinearity="relu"), identity),
    "IndRNN": CellKind(partial(fastseq.IndRNN, num_layers=2), bounded),
    "GRU": CellKind(fastseq.GRU, chrono),
    "MGU": CellKind(fastseq.MGU, chrono),
    "LSTM": CellKind(fastseq.LSTM, chrono, "c"),
    "CoupledLSTM": CellKind(fastseq.CoupledLSTM, chrono, "c"),
    "PeepholeLSTM": CellKind(fastseq.PeepholeLSTM, chrono, "c"),
}


class Reader(nn.Module):
    """A layer and a linear readout, of every step or of the last."""

    def __init__(self, layer: nn.Module, task: Task) -> None:
        super().__init__()
        self.layer, self.every_step = layer, task.every_step
        self.readout = nn.Linear(layer.hidden_size, task.outputs)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.layer(x)
        return self.readout(y if self.every_step else y[-1])


def loss(model: Reader, batch: Batch) -> Tensor:
    """Squared error of one output, and cross entropy of several."""
    x, target = batch
    given = model(x)
    if given.shape[-1] == 1:
        return nn.functional.mse_loss(given.squeeze(-1), target)
    return nn.functional.cross_entropy(given.flatten(0, -2), target.flatten())


def batches(task: Task, T: int, B: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield task.sample(T, B, generator)


# Training


@dataclass
class Run:
    """A cell on a problem of one length. Losses are those of sequences held out, over the
    baseline's."""

    task: str
    cell: str
    length: int
    looks: list[int] = field(default_factory=list)  # steps of training at each
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cut: bool = False  # its time was up before its steps

    @property
    def learned(self) -> bool:
        return self.losses[-1] < LEARNED

    @property
    def verdict(self) -> str:
        return "yes" if self.learned else "cut" if self.cut else "no"


def model_of(
    task: Task, cell: str, T: int, options: argparse.Namespace, initial: bool = True
) -> Reader:
    """With torch's initial values if not with those of the cell's literature."""
    torch.manual_seed(options.seed)
    kind = CELLS[cell]
    layer = kind.layer(task.inputs, options.hidden, backend=options.backend)
    if initial:
        kind.initial(layer, len(task.sample(T, 1, torch.Generator())[0]))
    return Reader(layer, task)


def check_backend(options: argparse.Namespace) -> None:
    """Not every backend has every cell."""
    for cell in options.cells:
        layer = CELLS[cell].layer(1, 1, backend=options.backend)
        try:
            layer(torch.zeros(2, 1, 1))[0].sum().backward()
        except (ValueError, RuntimeError) as error:
            common.stop(f"--backend {options.backend}, {cell}: {error}")


def trained(name: str, cell: str, T: int, seconds: float, options: argparse.Namespace) -> Run:
    """Train until the cell has learned the problem, or the steps or the seconds are over."""
    task, run = TASKS[name], Run(name, cell, T)
    model = model_of(task, cell, T, options)
    held_out = next(batches(task, T, HELD_OUT, options.seed + 1))

    @torch.no_grad()
    def look(step: int) -> None:
        run.looks.append(step)
        run.losses.append(loss(model, held_out).item() / task.baseline(T))

    def until_learned() -> Iterator[Batch]:
        for batch in batches(task, T, options.batch, options.seed + 2):
            if run.learned:
                return
            yield batch

    look(0)
    done = common.train(
        f"{name} {T} {cell}",
        model,
        loss,
        until_learned(),
        steps=options.steps,
        seconds=seconds,
        lr=options.lr,
        after=lambda step: step % LOOK or look(step),
    )
    if len(done.losses) > run.looks[-1]:
        look(len(done.losses))
    run.seconds = done.elapsed
    run.cut = not run.learned and run.looks[-1] < options.steps
    return run


def lengths_of(name: str, cell: str, seconds: float, options: argparse.Namespace) -> list[Run]:
    """From the shortest length on, as far as the cell learns and the seconds allow."""
    runs: list[Run] = []
    for T in options.lengths:
        left = seconds - sum(run.seconds for run in runs)
        if not runs or (left > 0 and runs[-1].learned):
            runs.append(trained(name, cell, T, left, options))
    return runs


def beside_torch(options: argparse.Namespace) -> dict[str, common.Speed]:
    """The time of a step on the first problem's longest sequences, of cells that torch.nn has."""
    task, T = TASKS[options.tasks[0]], options.lengths[-1]
    found = {}
    for cell in options.cells:
        model = model_of(task, cell, T, options)
        if isinstance(model.layer, fastseq.RNN | fastseq.GRU | fastseq.LSTM):
            given = batches(task, T, options.batch, options.seed)
            found[cell] = common.speed(model, loss, given, seconds=0.7, rounds=100)
    return found


def flow(options: argparse.Namespace, initial: bool) -> dict[str, Tensor]:
    """Of each cell the norms, over time, of the gradient of its last output with regard to the
    state that is to remember, over the greatest of them."""
    task, T = TASKS[options.tasks[0]], options.lengths[-1]
    x, _ = next(batches(task, T, options.batch, options.seed))
    found = {}
    for cell in options.cells:
        layer = model_of(task, cell, T, options, initial).layer
        norms = gradient_flow(layer, x, state=CELLS[cell].state)[-1]
        found[cell] = norms / norms.max()
    return found


# What is shown


def farthest(runs: list[Run], task: str, cell: str) -> int:
    """The greatest length that a cell learned, or 0."""
    return max(
        (r.length for r in runs if (r.task, r.cell) == (task, cell) and r.learned), default=0
    )


def report(runs: list[Run], options: argparse.Namespace) -> str:
    """A row for each problem and length, and a column for each cell."""
    by_name = {(run.task, run.length, run.cell): run for run in runs}
    header = ["problem", "T", "baseline", *options.cells]
    rows = []
    for task in options.tasks:
        for T in options.lengths:
            row = [task, T, f"{TASKS[task].baseline(T):.3f}"]
            for cell in options.cells:
                run = by_name.get((task, T, cell))
                row.append(f"{run.losses[-1]:.2f} {run.verdict}" if run else "-")
            rows.append(row)
    return common.table(header, rows)


def by_cell(flows: list[dict[str, Tensor]], speeds: dict[str, common.Speed]) -> str:
    """How much of the gradient comes to the first step, and the time a step where torch.nn has
    the cell."""
    rows = []
    for cell in flows[0]:
        row = [cell, *(f"{norms[cell][0]:.1e}" for norms in flows), "-", "-", "-"]
        if cell in speeds:
            row[-3:] = speeds[cell].row(cell)[1:]
        rows.append(row)
    header = ["cell", "gradient", "torch's init", "torch.nn ms", "fastseq ms", "times as fast"]
    return common.table(header, rows)


def plot(runs: list[Run], task: str, options: argparse.Namespace) -> None:
    """The losses at the first length that parts the cells, or at the longest."""
    tried = [run for run in runs if run.task == task]
    failed = [run.length for run in tried if not run.learned]
    T = min(failed, default=max(run.length for run in tried))
    figure, axes = common.picture()
    for k, cell in enumerate(options.cells):
        for run in tried:
            if (run.cell, run.length) == (cell, T):
                colour = common.COLOURS[k % len(common.COLOURS)]
                axes.plot(run.looks, run.losses, color=colour, label=cell)
                axes.plot(run.looks[-1], run.losses[-1], "ox"[not run.learned], color=colour)
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    axes.axhline(LEARNED, color="black", linewidth=1, linestyle=":")
    axes.set_yscale("log")
    axes.set_ylim(top=3)  # before training it may be a thousand
    axes.set_xlabel("steps of training")
    axes.set_ylabel("loss over the baseline's")
    axes.set_title(f"{task}, T = {T}", fontsize=11, loc="left")
    axes.legend(frameon=False)
    common.save(figure, options.out / f"toys_{task}.png")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=400.0)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--cells", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--lengths", nargs="+", type=common.positive, default=[10, 50, 100])
    parser.add_argument("--hidden", type=common.positive, default=128)
    parser.add_argument("--batch", type=common.positive, default=64)
    parser.add_argument("--steps", type=common.positive, default=2500, help="at most, for each T")
    parser.add_argument("--lr", type=common.above_zero, default=1e-2)
    short = {
        "seconds": 20.0,
        "tasks": ["adding", "parity"],
        "cells": ["Elman", "IndRNN", "GRU", "LSTM"],
        "lengths": [10, 50],
        "hidden": 64,
        "steps": 1200,
    }
    options = common.parse(parser, argv, short)
    options.lengths = sorted(set(options.lengths))
    if options.lengths[0] < 2:
        parser.error(f"argument --lengths: expected at least 2, got {options.lengths[0]}")
    return options


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    if options.backend is not None:
        check_backend(options)
    print(
        f"{options.hidden} units, batches of {options.batch}, at most {options.steps} steps; "
        "loss over the baseline's on sequences held out"
    )
    runs: list[Run] = []
    pairs = [(task, cell) for task in options.tasks for cell in options.cells]
    for k, (task, cell) in enumerate(pairs):
        left = options.seconds - sum(run.seconds for run in runs)
        runs += lengths_of(task, cell, left / (len(pairs) - k), options)
    print(
        f"\n{report(runs, options)}\n(yes: below {LEARNED:g}; cut: its time was up; "
        "-: not tried where a shorter one was not learned)"
    )
    figures = {}
    for run in runs:
        figures[f"{run.task}_{run.length}_{run.cell.lower()}"] = run.losses[-1]
    for task in options.tasks:
        plot(runs, task, options)

    where = f"{options.tasks[0]}, T = {options.lengths[-1]}"
    flows = []
    for words, file, initial in (
        ("initial values of the literature", "toys_gradient.png", True),
        ("torch's initial values", "toys_gradient_default.png", False),
    ):
        flows.append(flow(options, initial))
        states = {f"{cell}, {CELLS[cell].state}": norms for cell, norms in flows[-1].items()}
        title = f"{where}: gradient over its greatest norm, {words}"
        common.save(plot_gradient_flow(states, title=title), options.out / file)
    speeds = beside_torch(options)
    print(f"\n{by_cell(flows, speeds)}")
    print(
        f"({where}; gradient: its norm at the first step over the greatest, before training, with\n"
        f"the literature's initial values and with torch's; ms: a training step, in turn, "
        f"{common.threads()})\n"
    )
    figures |= {f"{cell.lower()}_ratio": one.ratio for cell, one in speeds.items()}
    figures |= {f"{cell.lower()}_gradient": norms[0].item() for cell, norms in flows[0].items()}
    for task in options.tasks:
        reach = {cell: farthest(runs, task, cell) for cell in options.cells}
        figures[f"{task}_learned"] = max(reach.values())
        groups = [
            (f"T = {T}" if T else "none") + " by " + ", ".join(c for c in reach if reach[c] == T)
            for T in sorted(set(reach.values()), reverse=True)
        ]
        T = options.lengths[-1]
        baseline = TASKS[task].baseline(T)
        print(f"{task}, baseline {baseline:.3f} at T = {T}; learned: {'; '.join(groups)}")
    return figures


if __name__ == "__main__":
    common.run(main)
