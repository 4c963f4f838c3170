"""The picture of docs/training.md: how a gradient flows back through 100 steps of an Elman network,
a GRU and an LSTM as they begin: ``python -m bench.gradient_flow --out docs/gradient-flow.png``.

``--time`` measures instead what ``gradient_flow`` takes against a step of training.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastseq
from fastseq.training import gradient_flow, plot_gradient_flow

from .measure import in_turn

STEPS, BATCH, SIZE = 100, 16, 64
SHAPES = ((8, 64), (32, 128), (32, 256))  # B and H of what is timed


def layers() -> dict[str, nn.Module]:
    """As they begin, and an LSTM whose forget gates begin open."""
    torch.manual_seed(0)
    bias = partial(fastseq.init.forget_gate_bias_, value=3.0)
    return {
        "Elman, tanh": fastseq.RNN(SIZE, SIZE),
        "GRU": fastseq.GRU(SIZE, SIZE),
        "LSTM": fastseq.LSTM(SIZE, SIZE),
        "LSTM, forget gate bias 3": fastseq.LSTM(SIZE, SIZE, init=bias),
    }


def train(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad(set_to_none=True)
    layer(x)[0][-1].sum().backward()


def times(seconds: float) -> None:
    for kind in ("RNN", "GRU", "LSTM"):
        for B, H in SHAPES:
            layer, x = getattr(fastseq, kind)(H, H), torch.randn(STEPS, B, H)
            calls = [partial(train, layer, x), partial(gradient_flow, layer, x)]
            step, flow = (1e3 * time for time in in_turn(calls, seconds))
            print(
                f"{kind} T{STEPS} B{B} H{H}: a step of training {step:.3g} ms, gradient_flow "
                f"{flow:.3g} ms, {flow / step:.2f} times as long"
            )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("out/gradient-flow.png"))
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each pair that is timed")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.time:
        times(options.seconds)
        return 0
    x = torch.randn(STEPS, BATCH, SIZE, generator=torch.Generator().manual_seed(0))
    norms = {name: gradient_flow(layer, x) for name, layer in layers().items()}
    title = f"The gradient of the last step's output, {STEPS} steps, {SIZE} units, untrained"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plot_gradient_flow(norms, title=title).savefig(options.out, dpi=110)
    for name, value in norms.items():
        print(f"{name:26} step {STEPS - 1}: {value[0, -1]:.1e}, step 0: {value[0, 0]:.1e}")
    print(f"Picture: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
