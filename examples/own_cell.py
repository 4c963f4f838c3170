"""Train a recurrent cell of your own, written in seven lines, beside fastseq.GRU.

The task needs no data: of a sequence of random numbers two are marked, and the answer is their sum
(Hochreiter and Schmidhuber 1997). Three models take turns on the same batches: a layer of the cell,
the same cell as a loop over time in PyTorch, from the same parameters, and fastseq.GRU. At the end:
their losses and speeds.

    python examples/own_cell.py --hidden 64 --length 50 --steps 400
"""

# ruff: noqa: F821  (the words of the equations are fastseq's)
from __future__ import annotations

import argparse
import math
import time
from copy import deepcopy
from dataclasses import dataclass, field

import common
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import fastseq

TURN = 5  # steps that one model takes before the next one's turn


@fastseq.cell(source="Zhou et al. 2016")
def MinimalGated(a_f, x_n, h_prev):
    """The minimal gated unit: a GRU whose one gate resets and updates."""
    f = sigmoid(a_f)
    n = tanh(x_n + U_n(f * h_prev))
    h = (1 - f) * h_prev + f * n
    return h


def minimal_gated(input_size: int, hidden_size: int) -> nn.Module:
    """A layer of it, which at first keeps 0.88 of its state at each step."""
    layer = MinimalGated(input_size, hidden_size)
    return fastseq.init.gate_bias_(layer, "f", -2.0)


class Loop(nn.Module):
    """The same cell as one writes it in PyTorch: the input product of all steps at once, then step
    by step."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        for name, parameter in minimal_gated(input_size, hidden_size).named_parameters():
            self.register_parameter(name, parameter)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        H = self.hidden_size
        w, b = self.weight_hh_l0, self.bias_hh_l0
        h = x.new_zeros(x.shape[1], H)
        outputs = []
        for a in F.linear(x, self.weight_ih_l0, self.bias_ih_l0).unbind():
            f = torch.sigmoid(a[:, :H] + F.linear(h, w[:H], b[:H]))
            n = torch.tanh(a[:, H:] + F.linear(f * h, w[H:], b[H:]))
            h = (1 - f) * h + f * n
            outputs.append(h)
        return torch.stack(outputs), h[None]


class Model(nn.Module):
    """A layer, and a linear readout of its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The answers (B,) of x (T, B, 2)."""
        return self.readout(self.layer(x)[1][-1])[:, 0]


@dataclass
class Run:
    """One of the models on its way."""

    label: str
    model: Model
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)
    elapsed: float = 0.0


def batch(length: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers and marks (T, B, 2), and the sums of the marked ones (B,)."""
    numbers = torch.rand(length, count, generator=generator)
    marks = torch.zeros(length, count)
    half = length // 2
    for first, last in ((0, half), (half, length)):
        place = torch.randint(first, last, (1, count), generator=generator)
        marks.scatter_(0, place, 1.0)
    return torch.stack([numbers, marks], 2), (numbers * marks).sum(0)


def train_step(run: Run, x: Tensor, answer: Tensor) -> float:
    run.optimizer.zero_grad(set_to_none=True)
    loss = F.mse_loss(run.model(x), answer)
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    return loss.item()


def runs_of(options: argparse.Namespace) -> list[Run]:
    found = []
    for label, kind in (("own cell", minimal_gated), ("own loop", Loop), ("GRU", fastseq.GRU)):
        torch.manual_seed(options.seed)
        model = Model(kind(2, options.hidden))
        found.append(Run(label, model, torch.optim.Adam(model.parameters(), lr=options.lr)))
    return found


def train(runs: list[Run], options: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(options.seed)
    x, answer = batch(options.length, options.batch, generator)
    for run in runs:  # compiling is not timed: a step of a copy
        model = deepcopy(run.model)
        train_step(Run("", model, torch.optim.Adam(model.parameters())), x, answer)
    bars = [
        tqdm(
            total=options.steps,
            desc=f"{run.label:9}",
            position=k,
            disable=None,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}",
        )
        for k, run in enumerate(runs)
    ]
    for done in range(0, options.steps, TURN):
        count = min(TURN, options.steps - done)
        turn = [batch(options.length, options.batch, generator) for _ in range(count)]
        for run, bar in zip(runs, bars, strict=True):
            start = time.perf_counter()
            run.losses += [train_step(run, *given) for given in turn]
            run.elapsed += time.perf_counter() - start
            if not math.isfinite(run.losses[-1]):
                common.stop(f"the loss is {run.losses[-1]}; try a smaller --lr")
            speed = len(run.losses) / run.elapsed
            bar.set_postfix_str(f"loss {run.losses[-1]:.4f}, {speed:,.0f} steps/s", False)
            bar.update(count)
    for bar in bars:
        bar.close()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--hidden", type=common.positive, default=64)
    parser.add_argument("--length", type=common.positive, default=50, help="numbers of a sequence")
    parser.add_argument("--batch", type=common.positive, default=16)
    parser.add_argument("--steps", type=common.positive, default=400, help="updates of each model")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if options.length < 2:
        parser.error(f"argument --length: expected at least 2, got {options.length}")
    print(
        f"The sum of 2 of {options.length} numbers; {options.hidden} units, batch {options.batch}, "
        f"{options.steps} steps, {common.threads()}"
    )
    own, loop, _ = runs = runs_of(options)
    train(runs, options)
    print(f"\n{'':9} {'time':>8} {'steps/s':>9} {'mean of the last 20 losses':>27}")
    for run in runs:
        last = run.losses[-20:]
        print(
            f"{run.label:9} {run.elapsed:7.1f}s {len(run.losses) / run.elapsed:9,.0f} "
            f"{sum(last) / len(last):27.4f}"
        )
    gap = max(abs(a - b) for a, b in zip(own.losses[:20], loop.losses[:20], strict=True))
    print(
        f"\nThe layer of the cell trains {loop.elapsed / own.elapsed:.1f} times as fast as the "
        f"loop. Their losses differ by at\nmost {gap:.1e} in the first 20 steps."
    )


if __name__ == "__main__":
    common.run(main)
