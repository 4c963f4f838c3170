"""A decoder with attention, which trains step by step: ``python -m bench.decoder [--write]``.

Each step reads an embedding and, by dot-product attention (Luong et al. 2015, Effective Approaches
to Attention-based Neural Machine Translation), what the state before asks of 40 encoder states. The
cell, or the layer that is called with one step, is torch.nn's and fastseq's in turn.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastseq

from . import table
from .measure import ROUNDS, in_turn
from .pages import note, write

STEPS, ENCODED = 30, 40
SHAPES = (  # embedding, H, B
    (256, 512, 32),
    (256, 512, 64),
    (256, 256, 32),
    (64, 128, 16),
    (64, 128, 1),
)
HEADER = ["forward and backward", "torch.nn ms", "fastseq ms", "factor"]


class Decoder(nn.Module):
    """One of torch.nn's or fastseq's modules as the step of a decoder."""

    def __init__(self, library: Any, kind: str, embedding: int, H: int) -> None:
        super().__init__()
        self.query = nn.Linear(H, H)
        self.step = getattr(library, kind)(embedding + H, H)

    def forward(self, embedded: Tensor, encoded: Tensor) -> Tensor:
        """(T, B, H) of embedded (T, B, E) and encoded (B, S, H)."""
        h = encoded[:, -1]
        state: Any = (h, torch.zeros_like(h)) if "LSTM" in type(self.step).__name__ else h
        outputs = []
        for x in embedded:
            scores = torch.bmm(encoded, self.query(h).unsqueeze(2)).softmax(1)
            context = torch.bmm(scores.transpose(1, 2), encoded).squeeze(1)
            read = torch.cat([x, context], 1)
            if isinstance(self.step, nn.RNNCellBase):
                state = self.step(read, state)
                h = state[0] if isinstance(state, tuple) else state
            else:
                first = isinstance(state, tuple)
                given = tuple(s.unsqueeze(0) for s in state) if first else state.unsqueeze(0)
                y, last = self.step(read.unsqueeze(0), given)
                h = y.squeeze(0)
                state = tuple(s.squeeze(0) for s in last) if first else last.squeeze(0)
            outputs.append(h)
        return torch.stack(outputs)


def train(decoder: Decoder, embedded: Tensor, encoded: Tensor) -> None:
    decoder.zero_grad(set_to_none=True)
    decoder(embedded, encoded).square().mean().backward()


def row(kind: str, embedding: int, H: int, B: int, seconds: float) -> list[str]:
    theirs, ours = (Decoder(library, kind, embedding, H) for library in (nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    embedded, encoded = torch.randn(STEPS, B, embedding), torch.randn(B, ENCODED, H)
    calls = [partial(train, decoder, embedded, encoded) for decoder in (theirs, ours)]
    before, now = (1e3 * time for time in in_turn(calls, seconds))
    shape = f"{kind} T{STEPS} B{B} I{embedding + H} H{H}"
    return [shape, f"{before:.3g}", f"{now:.3g}", f"{before / now:.2f}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.decoder", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    rows = []
    for kind in ("LSTMCell", "GRUCell", "LSTM", "GRU"):
        for shape in SHAPES if "Cell" in kind else SHAPES[:1]:
            rows.append(row(kind, *shape, options.seconds))
            print("  ".join(rows[-1]), flush=True)
    how = f"Medians of at least {ROUNDS} rounds in turn, float32; attention and all else included."
    text = f"{table.markdown(HEADER, rows)}\n\n{note(how)}"
    return write("decoder", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
