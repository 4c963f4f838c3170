"""What several examples share: options, text, training under a bar, speed, tables, pictures.

Examples run as ``python examples/name.py``, so that ``import common`` finds this file beside them.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import sys
import sysconfig
import tempfile
import time
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastseq

STDLIB = Path(sysconfig.get_path("stdlib"))
#: Folders of it that are no text like the rest: tests, what pip installed, Python 2's grammar.
APART = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}

TORCH, FASTSEQ = "#d1495b", "#1f5a92"  # the colours of the two wherever both are drawn
COLOURS = (FASTSEQ, TORCH, "#edae49", "#00798c", "#7d5ba6", "#66a182", "#8d6a4f", "#555555")

Batch = TypeVar("Batch")
#: The loss of a model on a batch, to be differentiated.
Loss = Callable[[nn.Module, Batch], Tensor]


def stop(message: str) -> NoReturn:
    """End the script with one line that says what is wrong and what to do."""
    raise SystemExit(f"{Path(sys.argv[0]).name}: {message}")


# Options


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {value}")
    return value


def above_zero(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected more than 0, got {value:g}")
    return value


def parser(doc: str, seconds: float) -> argparse.ArgumentParser:
    """A parser with the options that all examples have.

    Args:
        doc: the module's docstring, whose first paragraph the help shows.
        seconds: of training, at most, unless ``--seconds`` says otherwise.
    """
    made = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    made.add_argument("--short", action="store_true", help="smaller settings: some 20 s in all")
    made.add_argument(
        "--seconds", type=above_zero, default=seconds, help="train for at most so long"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=positive, help="threads of torch")
    made.add_argument("--backend", help="fastseq's backend; it chooses if left out")
    made.add_argument("--out", type=Path, default=Path("out"), help="folder of the picture")
    return made


def parse(
    made: argparse.ArgumentParser, argv: list[str] | None, short: dict[str, Any]
) -> argparse.Namespace:
    """The options, checked; torch has its threads and seed after it.

    Args:
        short: what ``--short`` has in place of the defaults. An option that is named still counts.
    """
    options = made.parse_args(argv)
    if options.short:
        made.set_defaults(**short)
        options = made.parse_args(argv)
    if options.backend is not None:
        found = fastseq.backends().get(options.backend)
        if found is None:
            known = ", ".join(fastseq.backends())
            stop(f"--backend {options.backend}: backend: expected one of {known}")
        if found != "available":
            stop(f"--backend {options.backend}: {found}")
    try:  # now, and not when all is trained
        options.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=options.out):
            pass
    except OSError as error:
        stop(f"--out {options.out}: expected a folder to write to: {error.strerror or error}")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return options


# Text


def split(items: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Nine in ten to train on, and every tenth, which is held out."""
    held_out = list(items[9::10])
    return [item for k, item in enumerate(items) if k % 10 != 9], held_out


def modules(folder: Path = STDLIB, files: int | None = None, packages: bool = False) -> list[Path]:
    """The .py files of a folder by name, the standard library's if left out.

    Args:
        files: so many at most, spread over the alphabet.
        packages: those of its packages too, but for tests and what pip installed.
    """
    if not folder.is_dir():
        stop(f"{folder}: expected a folder with .py files; there is no such folder")
    found = sorted(folder.rglob("*.py") if packages else folder.glob("*.py"))
    found = [path for path in found if not APART.intersection(path.relative_to(folder).parts)]
    if len(found) < 10:
        stop(f"{folder}: expected at least 10 .py files, got {len(found)}")
    if files is not None and files < len(found):
        found = [found[k * len(found) // files] for k in range(max(files, 10))]
    return found


def read(path: Path) -> str:
    """The text of a file in UTF-8; bytes that are none become U+FFFD."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        stop(f"{path}: {error.strerror or error}; name a text file that can be read")


def syntax(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a backslash in someone's string
            return ast.parse(read(path))
    except (SyntaxError, ValueError) as error:
        stop(f"{path}: not this Python's syntax: {error}")


class Docstring(NamedTuple):
    """``name`` is qualified within the file and empty for the module's own."""

    name: str
    kind: str  # module, class or function
    text: str


def docstrings(path: Path) -> list[Docstring]:
    """The docstrings of a file, from top to bottom, without their indentation."""
    found = []

    def visit(node: ast.AST, name: str) -> None:
        kinds = {ast.Module: "module", ast.ClassDef: "class"}
        text = ast.get_docstring(node)
        if text:
            found.append(Docstring(name, kinds.get(type(node), "function"), text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                visit(child, f"{name}.{child.name}".lstrip("."))

    visit(syntax(path), "")
    return found


def tokens(path: Path) -> list[tokenize.TokenInfo]:
    """Python's tokens of a file. What an f-string is made of differs from Python 3.12 on."""
    try:
        return list(tokenize.generate_tokens(io.StringIO(read(path)).readline))
    except (tokenize.TokenError, SyntaxError) as error:
        stop(f"{path}: not this Python's syntax: {error}")


def columns(codes: Tensor, batch: int, bptt: int) -> Tensor:
    """(rows, batch) of a text of numbers: each column reads its own part of it."""
    rows = len(codes) // batch
    if rows < bptt + 1:
        stop(
            f"the text has {len(codes)} items, too few for --batch {batch} times --bptt {bptt}; "
            "make one of them smaller"
        )
    return codes[: rows * batch].view(batch, rows).t().contiguous()


def windows(data: Tensor, bptt: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """(inputs, targets, fresh) without end; ``fresh`` where reading begins at the top again."""
    while True:
        for t in range(0, len(data) - bptt, bptt):
            yield data[t : t + bptt], data[t + 1 : t + bptt + 1], t == 0


# Training


@dataclass
class Training:
    """The losses of a training, and its seconds after each."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def elapsed(self) -> float:
        return self.seconds[-1] if self.seconds else 0.0

    def mean(self, last: int = 20) -> float:
        """Of the last losses."""
        return sum(self.losses[-last:]) / len(self.losses[-last:])


def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Loss, batch: Batch, clip: float
) -> float:
    """One step of training, and its loss."""
    optimizer.zero_grad(set_to_none=True)
    value = loss(model, batch)
    value.backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return value.item()


def train(
    label: str,
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    *,
    steps: int,
    seconds: float,
    lr: float = 3e-3,
    clip: float = 1.0,
    optimizer: torch.optim.Optimizer | None = None,
    after: Callable[[int], None] | None = None,
) -> Training:
    """Train under a bar until the batches, the steps or the seconds are over.

    Args:
        optimizer: Adam with ``lr`` if left out.
        after: called after each step with how many were done; its time does not count.
    """
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=lr)
    done = Training()
    model.train()
    bar = tqdm(
        total=steps,
        desc=f"{label:12}",
        disable=None,
        leave=False,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {postfix}",
    )
    for batch in batches:
        start = time.perf_counter()
        done.losses.append(update(model, optimizer, loss, batch, clip))
        done.seconds.append(done.elapsed + time.perf_counter() - start)
        if not math.isfinite(done.losses[-1]):
            stop(f"the loss is {done.losses[-1]}; try a smaller learning rate")
        bar.set_postfix_str(f"loss {done.mean():.3f}, {done.elapsed:.0f} s", False)
        bar.update()
        if after:
            after(len(done.losses))
        if len(done.losses) >= steps or done.elapsed >= seconds:
            break
    bar.close()
    if len(done.losses) < steps and done.elapsed >= seconds:
        print(f"{label}: stopped after {len(done.losses)} of {steps} steps: its time is up.")
    return done


def detached(state: Any) -> Any:
    """A state whose gradient ends here."""
    return tuple(map(detached, state)) if isinstance(state, tuple) else state.detach()


# torch.nn's layers beside fastseq's


def threads() -> str:
    """How many torch has, in words."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count > 1)}"


def ragged(layer: nn.Module, x: Tensor, lengths: Tensor) -> tuple[Tensor, Any]:
    """Output, padded with zeros, and last states of a padded batch: by ``lengths=`` of fastseq's
    layers, by packing for torch.nn's."""
    if type(layer).__module__.startswith("fastseq."):
        return layer(x, lengths=lengths)
    first = layer.batch_first
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), first, enforce_sorted=False)
    y, state = layer(packed)
    steps = x.shape[1 if first else 0]
    return nn.utils.rnn.pad_packed_sequence(y, first, total_length=steps)[0], state


def with_torch(model: nn.Module) -> nn.Module:
    """A copy of a model that has torch.nn's layers in place of fastseq's, parameters and all."""
    copy = deepcopy(model)
    report = fastseq.restore(copy)
    if report.left or not report.swapped:
        raise ValueError(f"model: expected layers that torch.nn has as well, got\n{report}")
    return copy


class Speed(NamedTuple):
    """Milliseconds of a training step: medians of ``rounds`` steps of each, in turn."""

    torch_ms: float
    fastseq_ms: float
    rounds: int

    @property
    def ratio(self) -> float:
        return self.torch_ms / self.fastseq_ms

    def row(self, label: str) -> tuple[str, ...]:
        """Of a table under :data:`SPEEDS`."""
        return label, f"{self.torch_ms:.3g}", f"{self.fastseq_ms:.3g}", f"{self.ratio:.2f}"

    def __str__(self) -> str:
        return (
            f"A training step takes {self.torch_ms:.3g} ms with torch.nn and {self.fastseq_ms:.3g} "
            f"ms with fastseq, {self.ratio:.2f} times\nas fast (medians of {self.rounds} steps "
            f"each, in turn, the same batches; {threads()})."
        )


#: Over rows of :meth:`Speed.row`.
SPEEDS = ("ms a training step", "torch.nn", "fastseq", "times as fast")


def speed(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Batch],
    *,
    seconds: float = 4.0,
    rounds: int = 50,
    theirs: nn.Module | None = None,
) -> Speed:
    """How long a training step takes with torch.nn's layers and with fastseq's.

    Copies of the model start from its parameters and take turns on the same batches, so that
    whatever else the machine does slows both alike. The model itself stays as it is.

    Args:
        loss: as :func:`train` takes it; it must not keep a state from batch to batch.
        seconds: stop after so long, but not before two rounds.
        theirs: the same model with torch.nn's layers; :func:`with_torch` makes it if left out.
    """
    given = batches if isinstance(batches, Iterator) else iter(list(batches) * (rounds + 2))
    both = [theirs if theirs is not None else with_torch(model), deepcopy(model)]
    optimizers = [torch.optim.Adam(one.train().parameters(), lr=1e-4) for one in both]
    samples: tuple[list[float], list[float]] = ([], [])
    start = 0.0
    for turn in range(-2, rounds):  # two first that do not count: compiling, first allocations
        if turn == 0:
            start = time.perf_counter()
        if turn > 1 and time.perf_counter() - start > seconds:
            break
        batch = next(given, None)
        if batch is None:
            break
        losses = {}
        for which in (0, 1) if turn % 2 else (1, 0):
            with torch.random.fork_rng(devices=[]):  # the same dropout for both
                began = time.perf_counter()
                losses[which] = update(both[which], optimizers[which], loss, batch, 1.0)
                if turn >= 0:
                    samples[which].append(time.perf_counter() - began)
        if turn == -2 and not math.isclose(losses[0], losses[1], rel_tol=1e-3, abs_tol=1e-5):
            raise ValueError(
                f"model: its first loss is {losses[0]:.6g} with torch.nn's layers and "
                f"{losses[1]:.6g} with fastseq's: not the same model"
            )
    if not samples[0]:
        raise ValueError("batches: expected at least 3")
    theirs_ms, ours_ms = (1e3 * median(times) for times in samples)
    return Speed(theirs_ms, ours_ms, len(samples[0]))


# What is shown


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows under a header; the first column to the left, the others to the right. A row may be
    shorter."""
    lines = [[str(word) for word in row] for row in (header, *rows)]
    lines = [[*line, *[""] * (len(header) - len(line))] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            word.rjust(width) if k else word.ljust(width)
            for k, (word, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def picture(columns: int = 1, *, height: float = 4.5) -> tuple[Any, Any]:
    """matplotlib's Figure and its axes (an array for more than one column), in the style of all
    examples: 8 inches wide, no spines above and to the right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for one in [axes] if columns == 1 else axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(color="#dddddd", linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def save(figure: Any, path: Path) -> Path:
    """Write a picture as PNG, and say so."""
    figure.savefig(path, dpi=150)
    print(f"Picture: {path}")
    return path


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Of the last ``width`` values at each place, or the noise hides a curve."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [
        (sums[k + 1] - sums[max(0, k + 1 - width)]) / min(width, k + 1) for k in range(len(values))
    ]


def run(main: Callable[[], object]) -> NoReturn:
    """As a script: an interrupt ends it quietly."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
