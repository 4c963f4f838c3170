"""The cells that torch.nn lacks, beside a loop over time in PyTorch and beside fastseq's own LSTM:
``python -m bench.loops [--write]``.

The loop is what one writes by hand: the input product of all steps at once, then torch's operations
step by step. Beside the LSTM what counts is the cost per floating point operation of the products.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq

from . import table
from .measure import ROUNDS, in_turn
from .pages import note, write

T = 100
SHAPES = ((64, 1), (256, 16), (512, 64))  # H = I, and B
HEADER = ["", "way", "loop ms", "fastseq ms", "faster", "LSTM ms", "per FLOP of LSTM"]

#: A step of a loop: (input product of a step, states, parameters by name) -> states, h first.
Step = Callable[[Tensor, Any, dict[str, Tensor]], Any]


def product(h: Tensor, w: dict[str, Tensor]) -> Tensor:
    return F.linear(h, w["weight_hh_l0"], w["bias_hh_l0"])


def elman(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    return (torch.sigmoid(a + product(states[0], w)),)


def gru_reset_before(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    (h,), H = states, states[0].shape[1]
    weight, bias = w["weight_hh_l0"], w["bias_hh_l0"]
    r, z = torch.sigmoid(a[:, : 2 * H] + F.linear(h, weight[: 2 * H], bias[: 2 * H])).chunk(2, 1)
    n = torch.tanh(a[:, 2 * H :] + F.linear(r * h, weight[2 * H :], bias[2 * H :]))
    return (torch.lerp(n, h, z),)


def peephole(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    h, c = states
    a_i, a_f, a_g, a_o = (a + product(h, w)).chunk(4, 1)
    i = torch.sigmoid(a_i + w["weight_ci_l0"] * c)
    f = torch.sigmoid(a_f + w["weight_cf_l0"] * c)
    c = f * c + i * torch.tanh(a_g)
    return torch.sigmoid(a_o + w["weight_co_l0"] * c) * torch.tanh(c), c


def coupled(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    h, c = states
    a_f, a_g, a_o = (a + product(h, w)).chunk(3, 1)
    c = torch.lerp(torch.tanh(a_g), c, torch.sigmoid(a_f))
    return torch.sigmoid(a_o) * torch.tanh(c), c


def mgu(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    (h,), H = states, states[0].shape[1]
    weight, bias = w["weight_hh_l0"], w["bias_hh_l0"]
    f = torch.sigmoid(a[:, :H] + F.linear(h, weight[:H], bias[:H]))
    n = torch.tanh(a[:, H:] + F.linear(f * h, weight[H:], bias[H:]))
    return (torch.lerp(h, n, f),)


def indrnn(a: Tensor, states: Any, w: dict[str, Tensor]) -> Any:
    return (torch.relu(torch.addcmul(a, states[0], w["weight_hh_l0"])),)


def loop(step: Step, states: int, module: Any, x: Tensor) -> Tensor:
    """y (T, B, H), with the parameters of a module."""
    w = dict(module.named_parameters())
    a = F.linear(x, w["weight_ih_l0"], w["bias_ih_l0"])
    now: Any = tuple(x.new_zeros(x.shape[1], module.hidden_size) for _ in range(states))
    outputs = []
    for a_t in a.unbind():
        now = step(a_t, now, w)
        outputs.append(now[0])
    return torch.stack(outputs)


def scrn(module: Any, x: Tensor) -> Tensor:
    """The context units first, which need nothing of the hidden ones."""
    w, alpha = dict(module.named_parameters()), module.alpha
    s = x.new_zeros(x.shape[1], module.context_size)
    context = []
    for b_t in F.linear(x, w["weight_ic_l0"]).unbind():
        s = torch.lerp(b_t, s, alpha)
        context.append(s)
    both = torch.stack(context)
    a = F.linear(torch.cat([x, both], 2), w["weight_ih_l0"], w["bias_ih_l0"])
    h = x.new_zeros(x.shape[1], module.hidden_size)
    outputs = []
    for a_t in a.unbind():
        (h,) = elman(a_t, (h,), w)
        outputs.append(h)
    return torch.cat([torch.stack(outputs), both], 2)


def _scrn(I: int, H: int) -> nn.Module:  # noqa: E741  (the field's letter)
    return fastseq.SCRN(I, H, context_size=H // 4)


class Looped(NamedTuple):
    """A cell: its module of (I, H), how many operations its products take beside the LSTM's, and
    the loop over time."""

    make: Callable[[int, int], nn.Module]
    work: float
    loop: Callable[[nn.Module, Tensor], Tensor]


CELLS = {
    "GRU(reset_after=False)": Looped(
        partial(fastseq.GRU, reset_after=False), 6 / 8, partial(loop, gru_reset_before, 1)
    ),
    "RNN(sigmoid)": Looped(
        partial(fastseq.RNN, nonlinearity="sigmoid"), 2 / 8, partial(loop, elman, 1)
    ),
    "PeepholeLSTM": Looped(fastseq.PeepholeLSTM, 1, partial(loop, peephole, 2)),
    "CoupledLSTM": Looped(fastseq.CoupledLSTM, 6 / 8, partial(loop, coupled, 2)),
    "MGU": Looped(fastseq.MGU, 4 / 8, partial(loop, mgu, 1)),
    "IndRNN": Looped(fastseq.IndRNN, 1 / 8, partial(loop, indrnn, 1)),
    "SCRN(context_size=H/4)": Looped(_scrn, 2.5 / 8, scrn),
}


def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        call(x)


def training(module: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    module.zero_grad(set_to_none=True)
    x.grad = None
    call(x).sum().backward()


def rows(name: str, H: int, B: int, seconds: float) -> list[list[str]]:
    cell = CELLS[name]
    torch.manual_seed(0)
    module, lstm = cell.make(H, H), fastseq.LSTM(H, H)
    x = torch.randn(T, B, H)
    calls: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
        (module, partial(cell.loop, module)),
        (module, lambda x: module(x)[0]),
        (lstm, lambda x: lstm(x)[0]),
    ]
    found, theirs = calls[1][1](x), calls[0][1](x)
    if not torch.allclose(found, theirs, rtol=1e-4, atol=1e-5):
        raise ValueError(f"{name}: the loop computes something else")
    lines = []
    for way in ("forward", "training"):
        leaf = x.clone().requires_grad_(way == "training")
        timed = [
            partial(forward, call, leaf) if way == "forward" else partial(training, m, call, leaf)
            for m, call in calls
        ]
        # in pairs: what follows the loop finds its caches full of the loop's tensors
        slow, after = (1e3 * t for t in in_turn(timed[:2], seconds))
        ours, plain = (1e3 * t for t in in_turn(timed[1:], seconds))
        line = [f"{name} T{T} B{B} H{H}", way, f"{slow:.3g}", f"{ours:.3g}", f"{slow / after:.1f}x"]
        lines.append([*line, f"{plain:.3g}", f"{ours / plain / cell.work:.2f}"])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loops", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = []
    for name in CELLS:
        for H, B in SHAPES:
            for line in rows(name, H, B, options.seconds):
                found.append(line)
                print("  ".join(line), flush=True)
    how = f"Medians of at least {ROUNDS} rounds in turn, float32, I = H."
    text = f"{table.markdown(HEADER, found)}\n\n{note(how)}"
    return write("loops", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
