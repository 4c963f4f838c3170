"""fastseq.Stacked beside torch.nn's layers composed by hand, and equal layers beside the one layer
with ``num_layers``: ``python -m bench.stacked [--write]``.

By hand is what one writes with torch.nn: a layer, then the connection; of a reverse stack the
flipped input, and the flipped output at the end.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastseq

from . import table
from .loops import forward, training
from .measure import ROUNDS, in_turn
from .pages import note, write

LAYERS = 3
SHAPES = ((64, 1, 512), (256, 16, 128), (512, 64, 50))  # H = I, B and T
KINDS = {"GRU": fastseq.GRU, "LSTM": fastseq.LSTM}
#: What is put together: its connections, and whether a reverse stack stands beside it.
FORMS = {
    "plain": ("plain", False),
    "residual": ("residual", False),
    "highway": ("highway", False),
    "two stacks": ("plain", True),
}
HEADER = ["", "way", "by hand ms", "Stacked ms", "faster", "num_layers ms", "Stacked over it"]


def composed(layers: Sequence[nn.Module], connections: Sequence[Any], x: Tensor) -> Tensor:
    """One stack of torch.nn's layers."""
    for layer, connection in zip(layers, connections, strict=True):
        y, _ = layer(x)
        if hasattr(connection, "transform"):
            y = torch.lerp(x, y, torch.sigmoid(connection.transform(x)))
        elif hasattr(connection, "carry"):
            y = y + x
        x = y
    return x


def by_hand(stack: Any, x: Tensor) -> Tensor:
    """What a stack gives, of torch.nn's layers with its parameters."""
    y = composed(stack.layers, stack.connections, x)
    if stack.reverse_layers is None:
        return y
    z = composed(stack.reverse_layers, stack.reverse_connections, x.flip(0)).flip(0)
    return torch.cat([y, z], -1)


def with_num_layers(stack: Any, kind: Callable[..., nn.Module]) -> nn.Module:
    """The one layer of fastseq that has the weights of a plain stack's."""
    first = stack.layers[0]
    one = kind(first.input_size, first.hidden_size, len(stack.layers))
    weights = [p for layer in stack.layers for p in layer.parameters()]
    with torch.no_grad():
        for mine, its in zip(one.parameters(), weights, strict=True):
            mine.copy_(its)
    return one


def rows(name: str, form: str, H: int, B: int, T: int, seconds: float) -> list[list[str]]:
    torch.manual_seed(0)
    kind = KINDS[name]
    connections, both = FORMS[form]
    bidirectional = "stacks" if both else False
    stack = fastseq.Stacked.of(
        kind, H, [H] * LAYERS, connections=connections, bidirectional=bidirectional
    )
    theirs = copy.deepcopy(stack)
    fastseq.restore(theirs)
    x = torch.randn(T, B, H)
    calls: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
        (theirs, partial(by_hand, theirs)),
        (stack, lambda x: stack(x)[0]),
    ]
    if form == "plain":
        one = with_num_layers(stack, kind)
        calls.append((one, lambda x: one(x)[0]))
    found = [call(x) for _, call in calls]
    if not all(torch.allclose(y, found[0], rtol=1e-4, atol=1e-5) for y in found):
        raise ValueError(f"{name}, {form}: they compute something else")
    lines = []
    for way in ("forward", "training"):
        leaf = x.clone().requires_grad_(way == "training")
        timed = [
            partial(forward, call, leaf) if way == "forward" else partial(training, m, call, leaf)
            for m, call in calls
        ]
        slow, ours = (1e3 * t for t in in_turn(timed[:2], seconds))
        title = f"{name} x{LAYERS} {form} T{T} B{B} H{H}"
        line = [title, way, f"{slow:.3g}", f"{ours:.3g}", f"{slow / ours:.1f}x", "", ""]
        if len(timed) > 2:
            ours, plain = (1e3 * t for t in in_turn(timed[1:], seconds))
            line[5:] = [f"{plain:.3g}", f"{ours / plain:.2f}"]
        lines.append(line)
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.stacked", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = []
    for name in KINDS:
        for form in FORMS:
            for shape in SHAPES:
                for line in rows(name, form, *shape, options.seconds):
                    found.append(line)
                    print("  ".join(line), flush=True)
    how = f"Medians of at least {ROUNDS} rounds in turn, float32, I = H."
    text = f"{table.markdown(HEADER, found)}\n\n{note(how)}"
    return write("stacked", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
