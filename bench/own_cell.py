"""Cells made with ``@fastseq.cell``: ``python -m bench.own_cell [--write]``.

Each stands beside the same equations as a loop over time in PyTorch, and beside the library's own
cell of the same operations, both on numba's kernels. Then the seconds of a first call, which
compiles: in a process of its own, with Numba's cache empty, with the cache of another cell's
kernels, and with its own.
"""

# ruff: noqa: F821  (the words of the equations are the vocabulary's)
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastseq

from . import loops, pages, table
from .measure import ROUNDS, in_turn

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "own-cell.md"
T = 100
SHAPES = ((64, 1), (256, 16), (512, 64))  # H = I, and B
HEADER = ["", "way", "loop ms", "own ms", "faster", "library ms", "own / library"]
COMPILED = ["", "forward s", "training s"]


@fastseq.cell
def OwnLSTM(a_i, a_f, a_g, a_o, c_prev):
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    c = f * c_prev + i * tanh(a_g)
    h = sigmoid(a_o) * tanh(c)
    return h, c


@fastseq.cell
def OwnPeephole(a_i, a_f, a_g, a_o, c_prev, ci, cf, co):
    i = sigmoid(a_i + ci * c_prev)
    f = sigmoid(a_f + cf * c_prev)
    c = f * c_prev + i * tanh(a_g)
    h = sigmoid(a_o + co * c) * tanh(c)
    return h, c


@fastseq.cell
def OwnGRU(a_r, a_z, x_n, h_prev):
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    n = tanh(x_n + U_n(r * h_prev))
    h = (1 - z) * n + z * h_prev
    return h


@fastseq.cell(source="Zhou et al. 2016")
def MinimalGated(a_f, x_n, h_prev):
    f = sigmoid(a_f)
    n = tanh(x_n + U_n(f * h_prev))
    h = (1 - f) * h_prev + f * n
    return h


def lstm(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    h, c = states
    i, f, g, o = (a + loops.product(h, w)).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


class Own(NamedTuple):
    """A cell: its layer, the library's of the same operations, and the loop over time."""

    own: type[nn.Module]
    library: Callable[..., nn.Module]
    loop: Callable[[nn.Module, Tensor], Tensor]


CELLS = {
    "OwnLSTM": Own(OwnLSTM, fastseq.LSTM, partial(loops.loop, lstm, 2)),
    "OwnPeephole": Own(OwnPeephole, fastseq.PeepholeLSTM, partial(loops.loop, loops.peephole, 2)),
    "OwnGRU": Own(
        OwnGRU,
        partial(fastseq.GRU, reset_after=False),
        partial(loops.loop, loops.gru_reset_before, 1),
    ),
    "MinimalGated": Own(MinimalGated, fastseq.MGU, partial(loops.loop, loops.mgu, 1)),
}


def rows(name: str, H: int, B: int, seconds: float) -> list[list[str]]:
    """A line of each way. Raises ValueError where the three give different numbers."""
    cell = CELLS[name]
    torch.manual_seed(0)
    module = cell.own(H, H, backend="numba")
    library = cell.library(H, H, backend="numba")
    library.load_state_dict(module.state_dict())
    x = torch.randn(T, B, H)
    calls: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
        (module, partial(cell.loop, module)),
        (module, lambda x: module(x)[0]),
        (library, lambda x: library(x)[0]),
    ]
    found = [call(x) for _, call in calls]
    if not all(torch.allclose(y, found[1], rtol=1e-4, atol=1e-5) for y in found):
        raise ValueError(f"{name}: the loop or the library's cell computes something else")
    lines = []
    for way in ("forward", "training"):
        leaf = x.clone().requires_grad_(way == "training")
        timed = [
            partial(loops.forward, call, leaf)
            if way == "forward"
            else partial(loops.training, m, call, leaf)
            for m, call in calls
        ]
        slow, after = (1e3 * t for t in in_turn(timed[:2], seconds, warm=True))
        ours, plain = (1e3 * t for t in in_turn(timed[1:], seconds))
        line = [f"{name} T{T} B{B} H{H}", way, f"{slow:.3g}", f"{ours:.3g}", f"{slow / after:.1f}x"]
        lines.append([*line, f"{plain:.3g}", f"{ours / plain:.2f}"])
    return lines


def first_call(name: str, way: str) -> float:
    """Seconds of a layer's first call in this process."""
    torch.set_num_threads(1)
    module = CELLS[name].own(64, 64, backend="numba")
    x = torch.randn(T, 1, 64)
    call = lambda x: module(x)[0]  # noqa: E731
    start = time.perf_counter()
    if way == "forward":
        loops.forward(call, x)
    else:
        loops.training(module, call, x)
    return time.perf_counter() - start


def in_a_process(name: str, way: str, cache: str) -> float:
    command = [sys.executable, "-m", "bench.own_cell", "--first", name, way]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"NUMBA_CACHE_DIR": cache},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def compile_seconds(rounds: int) -> list[list[str]]:
    """A line of each state of the cache: medians of OwnLSTM's first calls."""
    states = ("nothing is cached", "another cell's kernels are", "its own are")
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(rounds):
        for way in ("forward", "training"):
            with tempfile.TemporaryDirectory() as cache:
                found.setdefault((states[0], way), []).append(in_a_process("OwnLSTM", way, cache))
                found.setdefault((states[2], way), []).append(in_a_process("OwnLSTM", way, cache))
            with tempfile.TemporaryDirectory() as cache:
                in_a_process("OwnGRU", way, cache)
                found.setdefault((states[1], way), []).append(in_a_process("OwnLSTM", way, cache))
    return [
        [state, *(f"{statistics.median(found[state, way]):.2g}" for way in ("forward", "training"))]
        for state in states
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.own_cell", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="what a row takes")
    parser.add_argument("--rounds", type=int, default=5, help="of first calls")
    parser.add_argument("--write", action="store_true", help="into docs/own-cell.md")
    parser.add_argument("--first", nargs=2, metavar=("CELL", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.first:
        print(first_call(*options.first))
        return 0
    torch.set_num_threads(options.threads)
    found = []
    for name in CELLS:
        for H, B in SHAPES:
            for line in rows(name, H, B, options.seconds):
                found.append(line)
                print("  ".join(line), flush=True)
    seconds = compile_seconds(options.rounds)
    for line in seconds:
        print("  ".join(line), flush=True)
    how = (
        f"Medians of at least {ROUNDS} rounds in turn, beside the loop each after an untimed call "
        f"of its own, of a first call's of {options.rounds} processes, float32, I = H."
    )
    text = "\n\n".join(
        [table.markdown(HEADER, found), table.markdown(COMPILED, seconds), pages.note(how)]
    )
    return pages.write("own_cell", text, PAGE) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
