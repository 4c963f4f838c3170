"""Train a character language model twice, with torch.nn and with fastseq, and compare.

The text is the source of Python's own standard library, which every machine has. Both models start
from the same parameters and see the same batches; they take turns, some steps each, so that
whatever else the machine does slows both alike. At the end: both losses, characters per second,
bits per character on files that were not trained on, text that the model writes, at several
temperatures, and a picture of loss against time.

Paper: Graves 2013, Generating Sequences With Recurrent Neural Networks.

    python examples/char_lm.py --cell lstm --hidden 128 --steps 300
"""

from __future__ import annotations

import argparse
import math
import re
import time
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path

import common
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastseq

LAYERS = {"gru": "GRU", "lstm": "LSTM", "rnn": "RNN"}
ALPHABET = "\t\n" + "".join(map(chr, range(32, 127)))
TURN = 10  # steps that one model takes before the other's turn
VALID_STEPS = 20  # windows of validation text


class CharLM(nn.Module):
    """Embedding, recurrent layers, and a linear readout. Only ``layer`` differs between the two."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), layer.input_size)
        self.layer = layer
        self.readout = nn.Linear(layer.hidden_size, len(ALPHABET))

    def forward(self, characters: Tensor, state=None):
        """Logits (T, B, V) and the state after them, of characters (T, B)."""
        y, state = self.layer(self.embedding(characters), state)
        return self.readout(y), state


@dataclass
class Run:
    """One of the two models on its way."""

    label: str
    model: CharLM
    optimizer: torch.optim.Optimizer
    state: object = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of its own time, after each step

    @property
    def elapsed(self) -> float:
        return self.seconds[-1] if self.seconds else 0.0


def read_text(folder: Path, files: int | None = None) -> tuple[str, str]:
    """The modules in a folder: nine files in ten to train on, the tenth to validate on.

    Four blanks become a tab, so that indentation is one character a level.
    """
    other = re.compile(f"[^{re.escape(ALPHABET)}]")
    texts = (common.read(path).replace("    ", "\t") for path in common.modules(folder, files))
    train, valid = common.split([other.sub("", text) for text in texts])
    return "".join(train), "".join(valid)


def streams(text: str, batch: int, bptt: int) -> Tensor:
    """(rows, batch) character numbers: each column reads its own part of the text."""
    number = {c: k for k, c in enumerate(ALPHABET)}
    codes = torch.tensor([number[c] for c in text])
    return common.columns(codes, batch, bptt)


def train_step(run: Run, inputs: Tensor, targets: Tensor, fresh: bool, clip: float) -> float:
    """Truncated backpropagation through time: the state is carried on, its gradient is not."""
    state = None if fresh or run.state is None else common.detached(run.state)
    run.optimizer.zero_grad(set_to_none=True)
    logits, run.state = run.model(inputs, state)
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), clip)
    run.optimizer.step()
    return loss.item()


@torch.no_grad()
def validate(model: CharLM, data: Tensor, bptt: int) -> float:
    """Bits per character."""
    model.eval()
    losses, state = [], None
    for step, (inputs, targets, fresh) in enumerate(common.windows(data, bptt)):
        if step == VALID_STEPS or (step and fresh):
            break
        logits, state = model(inputs, state)
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item())
    model.train()
    return sum(losses) / len(losses) / math.log(2)


@torch.no_grad()
def sample(model: CharLM, prompt: str, length: int, temperature: float, seed: int) -> str:
    """Text after ``prompt``, one character a call, the state carried from call to call."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor([[ALPHABET.index(c)] for c in prompt])
    logits, state = model(codes)
    text = prompt
    for _ in range(length):
        chances = torch.softmax(logits[-1, 0] / temperature, 0)
        code = torch.multinomial(chances, 1, generator=generator)
        text += ALPHABET[code]
        logits, state = model(code[None], state)
    model.train()
    return text


def warm_up(runs: list[Run], inputs: Tensor, targets: Tensor) -> None:
    """A step of each on a throwaway copy: compiling and first allocations are not timed."""
    for run in runs:
        model = deepcopy(run.model)
        copy = Run(run.label, model, torch.optim.Adam(model.parameters()))
        for _ in range(2):
            train_step(copy, inputs, targets, True, 1.0)
        validate(model, torch.cat([inputs, targets[-1:]]), len(inputs))
        sample(model, "\n", 2, 1.0, 0)


def train(runs: list[Run], data: Tensor, options: argparse.Namespace) -> None:
    """Both models over the same windows, taking turns. Stops early when the time is up."""
    batches = common.windows(data, options.bptt)
    characters = options.batch * options.bptt
    bars = [
        tqdm(
            total=options.steps * characters,
            desc=f"{run.label:9}",
            position=k,
            unit=" char",
            unit_scale=True,
            disable=None,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}",
        )
        for k, run in enumerate(runs)
    ]
    done = 0
    while done < options.steps:
        turn = [next(batches) for _ in range(min(TURN, options.steps - done))]
        for run, bar in zip(runs, bars, strict=True):
            elapsed, start = run.elapsed, time.perf_counter()
            for inputs, targets, fresh in turn:
                run.losses.append(train_step(run, inputs, targets, fresh, options.clip))
                run.seconds.append(elapsed + time.perf_counter() - start)
            if not math.isfinite(run.losses[-1]):
                common.stop(f"the loss is {run.losses[-1]}; try a smaller --lr")
            speed = len(run.losses) * characters / run.elapsed
            bar.set_postfix_str(f"loss {run.losses[-1]:.3f}, {speed:,.0f} characters/s", False)
            bar.update(len(turn) * characters)
        done += len(turn)
        if sum(run.elapsed for run in runs) > options.seconds:
            break
    for bar in bars:
        bar.close()
    if done < options.steps:
        print(
            f"Stopped after {done} of {options.steps} steps: --seconds {options.seconds:g} is up."
        )


def plot(runs: list[Run], title: str, path: Path) -> None:
    """Loss against each model's own time."""
    figure, axes = common.picture()
    for run, colour in zip(runs, (common.TORCH, common.FASTSEQ), strict=True):
        means = common.running_mean(run.losses, max(1, len(run.losses) // 100))
        label = f"{run.label}, {run.elapsed:.3g} s"
        axes.plot(run.seconds, means, color=colour, label=label, linewidth=1.8)
        axes.plot(run.seconds[-1], means[-1], "o", color=colour)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("loss (nats per character)")
    axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False)
    common.save(figure, path)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = common.parser(__doc__, seconds=140.0)
    parser.add_argument("--cell", choices=sorted(LAYERS), default="gru")
    parser.add_argument("--layers", type=common.positive, default=1)
    parser.add_argument("--hidden", type=common.positive, default=256)
    parser.add_argument(
        "--batch", type=common.positive, default=16, help="streams read side by side"
    )
    parser.add_argument(
        "--bptt", type=common.positive, default=100, help="steps between two updates"
    )
    parser.add_argument("--steps", type=common.positive, default=1500, help="updates of each model")
    parser.add_argument("--lr", type=common.above_zero, default=3e-3)
    parser.add_argument(
        "--clip", type=common.above_zero, default=1.0, help="greatest norm of the gradient"
    )
    parser.add_argument(
        "--sample", type=common.positive, default=1200, help="characters of a page it writes"
    )
    parser.add_argument(
        "--temperature",
        type=common.above_zero,
        nargs="+",
        default=[0.3, 0.6, 1.0],
        help="of each page: a low one repeats what is likely, a high one invents",
    )
    parser.add_argument(
        "--text",
        type=Path,
        default=common.STDLIB,
        help="a folder with .py files; the standard library if left out",
    )
    parser.add_argument(
        "--files", type=common.positive, help="read so many of them; all if left out"
    )
    short = {"hidden": 128, "steps": 400, "seconds": 20.0, "sample": 300}
    return common.parse(parser, argv, short)


def main(argv: list[str] | None = None) -> dict[str, float]:
    options = arguments(argv)
    train_text, valid_text = read_text(options.text, options.files)
    data = streams(train_text, options.batch, options.bptt)
    held_out = streams(valid_text, options.batch, options.bptt)

    runs = []
    name = LAYERS[options.cell]
    for label, library, extra in (
        ("torch.nn", nn, {}),
        ("fastseq", fastseq, {"backend": options.backend}),
    ):
        torch.manual_seed(options.seed)
        sizes = options.hidden, options.hidden, options.layers
        model = CharLM(getattr(library, name)(*sizes, **extra))
        runs.append(Run(label, model, torch.optim.Adam(model.parameters(), lr=options.lr)))
    theirs, ours = runs
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.equal(a, b), "the same seed gives the same parameters"

    title = (
        f"{name}, {options.layers} x {options.hidden} units, batch {options.batch}, "
        f"{options.bptt} steps, {common.threads()}"
    )
    print(f"{title}; {len(train_text):,} characters of Python's standard library")
    first = next(common.windows(data, options.bptt))
    try:
        warm_up(runs, *first[:2])
    except (ValueError, RuntimeError) as error:
        if options.backend is None:
            raise
        common.stop(f"--backend {options.backend}: {error}")
    train(runs, data, options)

    characters = options.batch * options.bptt * len(ours.losses)
    print(
        f"\n{'':9} {'time':>8} {'characters/s':>13} {'last loss':>10} {'valid bits/char':>16}",
        end="",
    )
    print(f" {'perplexity':>11} {'writes char/s':>14}")
    figures = {"steps": len(ours.losses), "ratio": theirs.elapsed / ours.elapsed}
    pages = {}
    for run, key in zip(runs, ("torch_bits", "fastseq_bits"), strict=True):
        bits = figures[key] = validate(run.model, held_out, options.bptt)
        start = time.perf_counter()
        pages = {
            heat: sample(run.model, "\nclass ", options.sample, heat, options.seed)
            for heat in options.temperature
        }
        writes = len(pages) * options.sample / (time.perf_counter() - start)
        print(
            f"{run.label:9} {run.elapsed:7.1f}s {characters / run.elapsed:13,.0f} "
            f"{run.losses[-1]:10.4f} {bits:16.4f} {2**bits:11.3f} {writes:14,.0f}"
        )
    gaps = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    early = min(50, len(gaps))
    print(
        f"\nfastseq trains {theirs.elapsed / ours.elapsed:.2f} times as fast. The losses differ by "
        f"at most {max(gaps[:early]):.1e} in the first {early} steps\nand {max(gaps):.1e} in all "
        "(training magnifies rounding)."
    )
    rule = "-" * 80
    for heat, page in pages.items():
        print(f"\nWritten by the model that fastseq trained, at temperature {heat:g}:")
        print(f"{rule}{page.expandtabs(4)}\n{rule}")
    plot(runs, title, options.out / f"char_lm_{options.cell}.png")
    figures["uniform_bits"] = math.log2(len(ALPHABET))
    print(
        f"On files that were not trained on: {figures['fastseq_bits']:.3f} bits per character; "
        f"an even guess costs {figures['uniform_bits']:.3f}, torch.nn's model "
        f"{figures['torch_bits']:.3f}."
    )
    return figures


if __name__ == "__main__":
    common.run(main)
