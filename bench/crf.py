"""Conditional random fields beside pytorch-crf: ``python -m bench.crf [--write]``.

The loss of a batch with the gradients of emissions and parameters, and decoding to Python's lists,
each by ``fastseq.CRF`` on every backend that this machine has. Both sides start from the same
parameters, and their losses are compared before the clock starts.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
import torchcrf
from torch import Tensor

import fastseq
from fastseq.backends import crf

from . import table
from .measure import ROUNDS, in_turn
from .pages import note, write

SHAPES = (  # T, B, K
    (100, 32, 20),
    (30, 1, 9),
    (50, 64, 50),
    (25, 16, 200),
    (1000, 8, 20),
)
WAYS = ("forward and backward", "decode")


def train(module: Any, emissions: Tensor, tags: Tensor) -> Tensor:
    emissions.grad = None
    module.zero_grad(set_to_none=True)
    loss = -module(emissions, tags)
    loss.backward()
    return loss


def decode(module: Any, emissions: Tensor) -> list[list[int]]:
    with torch.no_grad():
        return module.decode(emissions)


def rows(T: int, B: int, K: int, backends: list[str], seconds: float) -> list[list[str]]:
    emissions = torch.randn(T, B, K, requires_grad=True)
    tags = torch.randint(K, (T, B))
    theirs = torchcrf.CRF(K)
    modules = [theirs]
    for name in backends:
        modules.append(fastseq.CRF(K, backend=name))
        modules[-1].load_state_dict(theirs.state_dict())
    losses = [train(module, emissions, tags).item() for module in modules]
    worst = max(abs(loss / losses[0] - 1) for loss in losses)
    if worst > 1e-5:
        raise ValueError(f"T{T} B{B} K{K}: the losses differ by {worst:.2g} of them: {losses}")
    found = []
    for way in WAYS:
        calls: list[Any] = [partial(train, m, emissions, tags) for m in modules]
        if way == "decode":
            calls = [partial(decode, m, emissions.detach()) for m in modules]
        before, *times = in_turn(calls, seconds, warm=True)
        cells = [f"{1e3 * t:.3g} ({before / t:.3g}x)" for t in times]
        found.append([f"T{T} B{B} K{K} {way}", f"{1e3 * before:.3g}", *cells])
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.crf", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    parser.add_argument("--backends", nargs="*", help="all that this machine has")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    available = [name for name in crf.ORDER["cpu"] if not isinstance(crf.load(name), str)]
    backends = options.backends or available
    found = []
    for shape in SHAPES:
        for row in rows(*shape, backends, options.seconds):
            found.append(row)
            print("  ".join(row), flush=True)
    header = ["", "pytorch-crf ms", *(f"{name} ms" for name in backends)]
    how = f"Medians of at least {ROUNDS} rounds in turn, float32; autograd and lists included."
    text = f"{table.markdown(header, found)}\n\n{note(how)}"
    return write("crf", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
