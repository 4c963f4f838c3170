"""A decoder that is fed its context, beside loops in plain PyTorch: ``python -m bench.attention
[--write]``.

Additive attention and an LSTM cell, all steps with given inputs. *torch* is torch.nn.LSTMCell and
torch's operations; *cell* is fastseq.LSTMCell in the same loop; *fused* is
:class:`fastseq.AttentionDecoder`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastseq
from fastseq.nn.attention import Attention
from fastseq.nn.attention_decoder import AttentionDecoder

from . import table
from .measure import in_turn
from .pages import note, write

PAGE = Path(__file__).parent.parent / "docs" / "attention.md"

STEPS, KEYS = 30, 30
SHAPES = ((256, 32), (256, 1), (64, 16), (64, 1))  # I = K = H, and B
HEADER = ["", "way", "torch ms", "cell ms", "fused ms", "over torch", "over cell"]


class Loop(nn.Module):
    """The same decoder, as one writes it by hand."""

    def __init__(self, cell: nn.Module, ours: AttentionDecoder) -> None:
        super().__init__()
        cell.load_state_dict(ours.recurrent.state_dict())
        self.cell, self.attention = cell, ours.attention

    def forward(self, inputs: Tensor, memory: Tensor) -> Tensor:
        a, H = self.attention, self.cell.hidden_size
        values = memory.transpose(0, 1).contiguous()
        keys = values @ a.weight_key.t()
        h = c = inputs.new_zeros(inputs.shape[1], H)
        outputs = []
        for x in inputs.unbind():
            query = (h @ a.weight_query.t()).unsqueeze(1)
            weights = (torch.tanh(keys + query) @ a.weight_score).softmax(1)
            context = torch.bmm(weights.unsqueeze(1), values).squeeze(1)
            h, c = self.cell(torch.cat([x, context], 1), (h, c))
            outputs.append(torch.cat([h, context], 1))
        return torch.stack(outputs)


def forward(module: Callable[..., Any], x: Tensor, memory: Tensor) -> None:
    with torch.no_grad():
        module(x, memory)


def train(module: Any, x: Tensor, memory: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = memory.grad = None
    found = module(x, memory)
    outputs = found[0] if isinstance(found, tuple) else found
    outputs.square().mean().backward()


def rows(H: int, B: int, seconds: float) -> list[list[str]]:
    torch.manual_seed(0)
    ours = AttentionDecoder(fastseq.LSTMCell(2 * H, H), Attention(H, H))
    loops = [Loop(kind(2 * H, H), ours) for kind in (nn.LSTMCell, fastseq.LSTMCell)]
    x, memory = torch.randn(STEPS, B, H), torch.randn(KEYS, B, H)
    if not torch.allclose(ours(x, memory)[0], loops[0](x, memory), rtol=1e-4, atol=1e-5):
        raise ValueError("the loop computes something else")
    found = []
    for way in (forward, train):
        given = [t.clone().requires_grad_(way is train) for t in (x, memory)]
        calls = [partial(way, module, *given) for module in (*loops, ours)]
        torchs, cells, fused = (1e3 * t for t in in_turn(calls, seconds))
        line = [f"U{STEPS} S{KEYS} B{B} H{H}", "forward" if way is forward else "training"]
        line += [f"{t:.3g}" for t in (torchs, cells, fused)]
        found.append([*line, f"{torchs / fused:.2f}x", f"{cells / fused:.2f}x"])
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/attention.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = []
    for shape in SHAPES:
        for line in rows(*shape, options.seconds):
            found.append(line)
            print("  ".join(line), flush=True)
    how = "Medians of runs in turn, float32, an LSTM with additive attention."
    text = f"{table.markdown(HEADER, found)}\n\n{note(how)}"
    return write("attention", text, PAGE) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
