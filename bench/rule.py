"""The measurements behind the choice of a backend: ``python -m bench.rule``.

torch.nn against the kernels (``--backend native`` or ``numba``) over a grid of sizes, interleaved,
medians; a ratio above 1 says that the kernels are faster. ``fastseq.backends.choice.preferred``
states the rule that follows.

``python -m bench.rule --gpu`` measures nothing: it writes the rule for GPUs, and their tables, from
what ``make gpu`` measured (bench/cuda_rule.py).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

import fastseq

from .measure import machine
from .version import commit

GRID = {
    "LSTM": ((1, 2, 4, 8, 16, 32, 64, 256), (32, 64, 128, 256, 512, 1024)),
    "GRU": ((1, 4, 16, 64, 256), (32, 64, 256, 512, 1024)),
    "RNN": ((1, 4, 16, 64, 256), (32, 64, 256, 512, 1024)),
}


def steps(B: int, H: int) -> int:
    """T such that a call is about 1 GFLOP, from 8 to 256 steps."""
    return max(8, min(256, int(1e9 / (16 * B * H * H))))


def ratio(
    backend: str,
    name: str,
    dtype: torch.dtype,
    T: int,
    B: int,
    H: int,
    training: bool,
    seconds: float,
) -> float:
    """Median time of torch.nn over that of a backend."""
    torch.manual_seed(0)
    theirs = getattr(nn, name)(H, H, dtype=dtype)
    ours = getattr(fastseq, name)(H, H, dtype=dtype, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(T, B, H, dtype=dtype, requires_grad=training)
    dy = torch.randn(T, B, H, dtype=dtype)

    def call(module: nn.Module) -> None:
        with torch.set_grad_enabled(training):
            y, _ = module(x)
            if training:
                y.backward(dy)

    samples: dict[nn.Module, list[float]] = {theirs: [], ours: []}
    for module in samples:
        call(module)
        call(module)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(samples[ours]) < 5:
        for module, times in samples.items():
            module.zero_grad(set_to_none=True)
            x.grad = None
            before = time.perf_counter()
            call(module)
            times.append(time.perf_counter() - before)
    return statistics.median(samples[theirs]) / statistics.median(samples[ours])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "--gpu" in argv:
        from . import cuda_rule

        return cuda_rule.main([word for word in argv if word != "--gpu"])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="the rule for GPUs; see --gpu --help")
    parser.add_argument("--backend", default="native", choices=("native", "numba"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.4)
    parser.add_argument("--cells", default="LSTM GRU RNN")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float64", "bfloat16"))
    parser.add_argument("--out", type=Path, help="a JSON file of the same figures")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    rows = []
    for name in options.cells.split():
        for B, H in itertools.product(*GRID[name]):
            T = steps(B, H)
            sizes = (T, B, H)
            found = [
                ratio(options.backend, name, dtype, *sizes, way, options.seconds)
                for way in (False, True)
            ]
            rows.append([name, options.dtype, T, B, H, *(round(r, 3) for r in found)])
            forward, training = (f"{value:6.2f}" for value in found)
            print(f"{name:4} T{T:<4} B{B:<4} H{H:<5} forward {forward}  training {training}")
            sys.stdout.flush()
    if options.out:
        record = {"machine": machine(), "commit": commit(), "threads": options.threads}
        record["backend"] = options.backend
        options.out.write_text(json.dumps({**record, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
