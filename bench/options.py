"""What a layer's options cost beside the plain layer: ``python -m bench.options [--write]``.

A training step, forward and backward, of layers of the same weights, in turn: one without options,
one with each, one with all. The masks are drawn anew at every call. With ``--device cuda`` the
layers are triton's in bfloat16, and what is timed are replays of CUDA graphs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastseq

from . import table
from .gpu import timing
from .measure import ROUNDS, in_turn
from .pages import note, write

SHAPES = ((64, 1, 512), (256, 16, 128), (512, 64, 50))  # H = I, B and T
KINDS = ("LSTM", "GRU")
HEADER = ["", "backend", "plain ms"]


class Option(NamedTuple):
    """layer: what the layer is made with. reset, all_states: what a call is given."""

    layer: Mapping[str, float] = MappingProxyType({})
    reset: bool = False
    all_states: bool = False


OPTIONS = {
    "zoneout": Option({"zoneout": 0.1}),
    "recurrent dropout": Option({"recurrent_dropout": 0.25}),
    "input dropout": Option({"input_dropout": 0.25}),
    "weight dropout": Option({"weight_dropout": 0.5}),
    "reset": Option(reset=True),
    "all states": Option(all_states=True),
}
OPTIONS["all"] = Option(
    {name: rate for option in OPTIONS.values() for name, rate in option.layer.items()}, True, True
)


def begins(x: Tensor) -> Tensor:
    """(T, B): every 16th step begins a new sequence."""
    steps = torch.arange(x.shape[0], device=x.device)
    return (steps % 16 == 15)[:, None].repeat(1, x.shape[1])


def call(layer: nn.Module, option: Option, x: Tensor, reset: Tensor, **given: Any) -> list[Tensor]:
    """y, and with ``all_states`` the cell states."""
    if option.reset:
        given["reset"] = reset
    if option.all_states and isinstance(layer, fastseq.LSTM):
        y, _, c = layer(x, all_states=True, **given)
        return [y, c]
    return [layer(x, **given)[0]]


def training(layer: nn.Module, option: Option, x: Tensor, reset: Tensor, gradient: Tensor) -> None:
    outputs = call(layer, option, x, reset)
    torch.autograd.grad(outputs, [x, *layer.parameters()], [gradient] * len(outputs))


def in_turn_as_graphs(calls: list[Callable[[], None]], seconds: float) -> list[float]:
    """Medians, in seconds, as :func:`bench.measure.in_turn` on a GPU."""
    recorded = dict(enumerate(timing.recorded(timing.warmed(each)) for each in calls))
    samples = timing.in_turn(recorded, seconds / len(calls), lambda key: None)
    return [median(samples[key]) / 1e3 for key in recorded]


def row(kind: str, backend: str, device: str, H: int, B: int, T: int, seconds: float) -> list[str]:
    torch.manual_seed(0)
    on_gpu = device == "cuda"
    given = {"device": device, "dtype": torch.bfloat16 if on_gpu else torch.float32}
    near = {"rtol": 0.05, "atol": 0.05} if on_gpu else {"rtol": 1e-4, "atol": 1e-5}
    x, gradient = torch.randn(T, B, H, requires_grad=True, **given), torch.randn(T, B, H, **given)
    make: Callable[..., nn.Module] = partial(getattr(fastseq, kind), **given)
    plain, reset = make(H, H, backend=backend), begins(x)
    timed = [partial(training, plain, Option(), x, reset, gradient)]
    for name, option in OPTIONS.items():
        layer, truth = (make(H, H, backend=way, **option.layer) for way in (backend, "eager"))
        for module in (layer, truth):
            module.load_state_dict(plain.state_dict())
        few = x[:4], begins(x[:4])
        with torch.no_grad():  # a graph is recorded where no gradient has a stream yet
            found = zip(*(call(m, option, *few, seed=1) for m in (layer, truth)), strict=True)
        if not all(torch.allclose(*pair, **near) for pair in found):
            raise ValueError(f"{name}: {kind} of {backend} computes something else")
        timed.append(partial(training, layer, option, x, reset, gradient))
    base, *times = (in_turn_as_graphs if on_gpu else in_turn)(timed, seconds)
    line = [f"{kind} T{T} B{B} H{H}", backend, f"{1e3 * base:.3g}"]
    return [*line, *(f"{t / base:.2f}" for t in times)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.options", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--backends", help="default: native numba; on a GPU: triton")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="what a row takes")
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    on_gpu = options.device == "cuda"
    backends = (options.backends or ("triton" if on_gpu else "native numba")).split()
    found = []
    for kind in KINDS:
        for shape in SHAPES:
            for backend in backends:
                found.append(row(kind, backend, options.device, *shape, options.seconds))
                print("  ".join(found[-1]), flush=True)
    how = (
        f"Medians of at least {ROUNDS} rounds in turn, float32, I = H; times over the plain one's."
    )
    text = f"{table.markdown([*HEADER, *OPTIONS], found)}\n\n{note(how)}"
    return write("options", text) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
