# ruff: noqa: F821  (the free names of the loops are bound by _kernel)
"""How fast a layer can be on a machine: the roofline that every figure is a fraction of.

What the machine can do is measured in the same run, by code that does nothing else: products,
reading of memory, the pointwise text of a cell, and meeting at a barrier. :func:`limit` puts these
rates together for a workload. ``python -m bench.limit`` prints both.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, Literal

import numba.extending
import numpy as np
import torch
from llvmlite import ir
from numba import types

from fastseq.backends.numba_loops import Kernel
from fastseq.backends.numba_products import product
from fastseq.backends.numba_simd import simd
from fastseq.cells import CELLS, Cell, arguments, bind

from .workloads import GATES, TEXTS, Workload, matching

Shares = Literal["rows", "units"]

#: bytes that one thread reads over and over: from L1 to beyond any cache
SIZES = tuple(sorted(base << k for k in range(13) for base in (16384, 24576)))


@dataclass(frozen=True)
class Rates:
    """What so many threads reach.

    flops: of a float32 product, per second, all threads together.
    bandwidth: (bytes that a thread reads over and over, bytes per second of each thread), all
        threads reading at once; what fits in less is no slower.
    gates: cell -> seconds of its pointwise text for one unit of one row, on one thread: forward,
        backward.
    barrier: seconds for all threads to meet.
    """

    threads: int
    flops: float
    bandwidth: tuple[tuple[int, float], ...]
    gates: dict[str, tuple[float, float]]
    barrier: float

    def reads(self, size: float) -> float:
        """Bytes per second and thread where ``size`` bytes are read over and over.

        By the size measured next below, so that a cache counts up to its last byte.
        """
        below = [speed for held, speed in self.bandwidth if held <= size]
        return below[-1] if below else self.bandwidth[0][1]


def limit(
    workload: Workload, training: bool, rates: Sequence[Rates], input_gradient: bool = True
) -> float:
    """Seconds below which no implementation of this kind can stay, with the best of ``rates``.

    The rates are those of float32, and so is the limit.

    A layer forward takes

        max(2 N G H (I + P) / flops, bytes read / bandwidth) + N H gates + T barriers,

    where a step reads all of W_hh again, because it needs the h of the step before, and a call
    reads W_ih once. Training adds backward's walk, max(2 N G H P / flops, the same bytes of W_hh)
    + its gates + its barriers, and the products over all steps, 2 N G H (I + P) for the weights
    and 2 N G H I for the input. Where products decide that is three times forward, or 3 - I/(I+P)
    if the input needs no gradient; where reading decides it is less, since the weights' gradients
    read W_hh no more.

    Threads share rows, if there are so many, and each reads all weights; or units, and each reads
    its part of the weights and waits for the others at every step. The smaller one counts.
    """
    ways: list[tuple[Rates, Shares]] = []
    for rate in rates:
        if workload.B * workload.D >= rate.threads:
            ways.append((rate, "rows"))
        if rate.threads > 1:
            ways.append((rate, "units"))
    return min(_seconds(workload, training, rate, way, input_gradient) for rate, way in ways)


def _seconds(
    workload: Workload, training: bool, rates: Rates, shares: Shares, input_gradient: bool
) -> float:
    G, H, D, P = GATES[workload.cell], workload.H, workload.D, workload.proj or workload.H
    calls = 1 if workload.mode == "layer" else workload.T
    T, N = workload.T // calls, workload.N // calls
    parts = rates.threads if shares == "units" else 1
    size = workload.dtype.itemsize
    forward_gates, backward_gates = rates.gates[workload.cell]
    waiting = T * rates.barrier if shares == "units" else 0.0
    total = 0.0
    for layer in range(workload.layers):
        width = workload.I if layer == 0 else P * D
        recurrent, given = G * H * P + workload.proj * H, G * H * width  # weights
        # what stays in cache: W_hh from step to step, all weights from call to call
        held = (recurrent if T > 1 else recurrent + given) * size / parts
        speed = rates.reads(held)

        def reading(weights: int, speed: float = speed) -> float:
            return weights * size / parts / speed

        def products(weights: int) -> float:
            return 2 * N * weights / rates.flops

        forward = max(products(recurrent + given), reading(T * recurrent + given))
        total += D * (forward + N * H * forward_gates / rates.threads) + waiting
        if training:
            walk = max(products(recurrent), reading(T * recurrent))
            total += D * (walk + N * H * backward_gates / rates.threads) + waiting
            wanted = given if layer or input_gradient else 0
            total += D * products(recurrent + given + wanted)
    return calls * total


@cache
def rates(threads: int) -> Rates:
    """Measured, in about two seconds."""
    time.sleep(0.02)  # threads of torch that wait for work do it running
    return Rates(
        threads,
        _product_flops(threads),
        _falling([(size, _bandwidth(size, threads)) for size in SIZES]),
        {name: _gates(CELLS[TEXTS.get(name, name)]) for name in GATES},
        _barrier(threads) if threads > 1 else 0.0,
    )


def possible(threads: int) -> list[Rates]:
    """Of one thread and of all that are set."""
    return [rates(count) for count in sorted({1, threads})]


def as_record(found: Sequence[Rates]) -> list[dict[str, Any]]:
    """For the JSON of the results."""
    return [asdict(rate) for rate in found]


def _falling(speeds: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """A smaller size is read at least as fast as each larger one."""
    return tuple(
        (size, max(speed for _, speed in speeds[k:])) for k, (size, _) in enumerate(speeds)
    )


def _best(call: Callable[[], object], seconds: float) -> float:
    call()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _product_flops(threads: int) -> float:
    """The better one of torch's product and ours, at the better one of two sizes."""
    best = 0.0
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for rows, inner, columns in ((960, 256, 256), (2048, 512, 512)):
            a, b = torch.randn(rows, inner), torch.randn(inner, columns)
            out = torch.empty(rows, columns)
            flops = 2 * rows * inner * columns
            for call in (partial(torch.mm, a, b, out=out), partial(product, a, b, threads, out)):
                best = max(best, flops / _best(call, 0.15))
    finally:
        torch.set_num_threads(before)
    return best


def _kernel(loop_text: Any, **names: Any) -> Kernel:
    vocabulary = {**vars(simd(np.float32)), "range": range, **names}
    used = {n: vocabulary[n] for n in loop_text.__code__.co_names if n in vocabulary}
    loop = bind(loop_text, simd(np.float32).fingerprint, **used)
    loop.__module__ = "bench.limit"
    return Kernel(loop)


def _aligned(count: int) -> np.ndarray:
    """Normal numbers in float32 at an address that is a multiple of 64."""
    room = np.empty(count + 16, np.float32)
    first = -(room.ctypes.data // 4) % 16
    found = room[first : first + count]
    piece = np.random.default_rng(0).standard_normal(min(count, 4096), np.float32)
    found[:] = np.resize(piece, count)
    return found


def _read_loop(data):
    address, count, repeats = load_int(data, 0), load_int(data, 1), load_int(data, 2)
    a = b = c = d = e = f = g = h = load(address, 0)
    for _ in range(repeats):
        for j in range(0, count, 8 * LANES):
            a = a + load(address, j)
            b = b + load(address, j + LANES)
            c = c + load(address, j + 2 * LANES)
            d = d + load(address, j + 3 * LANES)
            e = e + load(address, j + 4 * LANES)
            f = f + load(address, j + 5 * LANES)
            g = g + load(address, j + 6 * LANES)
            h = h + load(address, j + 7 * LANES)
    store(load_int(data, 3), 0, (a + b) + (c + d) + ((e + f) + (g + h)))


def _row_loop(data):
    """One row times a matrix of ``count`` weights: reads them as a step at B = 1 does."""
    address, count, repeats = load_int(data, 0), load_int(data, 1), load_int(data, 2)
    for _ in range(repeats):
        gemm(address, 0, 0, address, load_int(data, 3), 0, 1, count // 512, 512, False)


@cache
def _readers() -> list[Kernel]:
    return [_kernel(_read_loop), _kernel(_row_loop)]


def _together(kernel: Kernel, lists: Sequence[np.ndarray]) -> list[float]:
    """The seconds of threads that begin together, each with its own list of arguments."""
    times: list[float] = []
    gate = threading.Barrier(len(lists))

    def one(data: np.ndarray) -> None:
        gate.wait()
        start = time.perf_counter()
        kernel.call(data.ctypes.data)
        times.append(time.perf_counter() - start)

    workers = [threading.Thread(target=one, args=(data,)) for data in lists[1:]]
    for worker in workers:
        worker.start()
    one(lists[0])
    for worker in workers:
        worker.join()
    return times


def _bandwidth(size: int, threads: int) -> float:
    """The better one of two ways to read ``size`` bytes a thread, in bytes per second."""
    repeats = max(1, 2**25 // size)
    buffers = [(_aligned(size // 4), _aligned(512)) for _ in range(threads)]
    lists = [
        np.array([held.ctypes.data, size // 4, repeats, out.ctypes.data]) for held, out in buffers
    ]
    best = min(max(_together(kernel, lists)) for kernel in _readers() for _ in range(5))
    return size * repeats / best


def _gates(cell: Cell, H: int = 256) -> tuple[float, float]:
    """Seconds a unit of the cell's texts, forward and backward, on vectors in L1."""
    found = []
    for way in ("forward", "backward"):
        seconds = 0.0
        for k, phase in enumerate(cell.phases):
            text = getattr(phase, way)
            taken = arguments(text)
            given = phase.returns if way == "forward" else phase.gradients
            vocabulary = vars(simd(np.float32))
            used = {n: vocabulary[n] for n in text.__code__.co_names if n in vocabulary}
            bound = numba.njit(forceinline=True, error_model="numpy")(
                bind(text, f"{simd(np.float32).fingerprint}_limit", **used)
            )
            scope: dict[str, Any] = {}
            source = _gates_source(f"{cell.name}_{way}_{k}_loop", len(taken), len(given))
            exec(compile(source, __file__, "exec"), scope)
            kernel = _kernel(scope[f"{cell.name}_{way}_{k}_loop"], text=bound)
            held = _aligned((len(taken) + len(given)) * H)
            repeats = 400
            data = np.array([held.ctypes.data, H, repeats])
            seconds += min(_together(kernel, [data])[0] for _ in range(10)) / (H * repeats)
        found.append(seconds)
    return found[0], found[1]


def _gates_source(name: str, taken: int, given: int) -> str:
    """A loop that reads every argument of ``text`` and writes every result."""
    lines = [f"a{k} = load(address, {k} * H + j)" for k in range(taken)]
    values = ", ".join(f"a{k}" for k in range(taken))
    results = ", ".join(f"r{k}" for k in range(given)) + ("," if given == 1 else "")
    lines.append(f"{results} = text({values})")
    lines += [f"store(address, {taken + k} * H + j, r{k})" for k in range(given)]
    body = "\n".join(" " * 12 + line for line in lines)
    return f"""\
def {name}(data):
    address, H, repeats = load_int(data, 0), load_int(data, 1), load_int(data, 2)
    for _ in range(repeats):
        for j in range(0, H, LANES):
{body}
"""


@numba.extending.intrinsic
def _load_atomic(typingctx: Any, ptr: types.Type) -> Any:
    def lower(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), lower


def _barrier_loop(data):
    """Counts up, then waits until all threads have, ``rounds`` times; gives up if they are late."""
    counter, threads, rounds = load_int(data, 0), load_int(data, 1), load_int(data, 2)
    patience = 10_000_000
    for step in range(rounds):
        take(counter)
        while load_atomic(counter) < (step + 1) * threads and patience > 0:
            patience -= 1


def _barrier(threads: int, rounds: int = 50) -> float:
    kernel = _kernel(_barrier_loop, load_atomic=_load_atomic)
    best = float("inf")
    for _ in range(200):
        counter = np.zeros(16, np.int64)
        lists = [np.array([counter.ctypes.data, threads, rounds]) for _ in range(threads)]
        best = min(best, *_together(kernel, lists))  # the last to come waited for nobody
    return best / rounds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.limit", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--workloads", help="patterns of names; default all")
    options = parser.parse_args(argv)
    found = possible(options.threads)
    for rate in found:
        print(f"{rate.threads} thread(s): {rate.flops / 1e9:.0f} GFLOP/s, barrier", end=" ")
        print(f"{rate.barrier * 1e9:.0f} ns, GB/s a thread by KiB:", end=" ")
        print(", ".join(f"{size // 1024}: {speed / 1e9:.0f}" for size, speed in rate.bandwidth))
        for name, (forward, backward) in rate.gates.items():
            print(f"  {name} gates: {forward * 1e9:.3f} ns a unit, backward {backward * 1e9:.3f}")
    for workload in matching(options.workloads):
        if workload.dtype is not torch.float32:
            continue
        for training in (False, True)[: 1 + workload.training]:
            seconds = limit(workload, training, found)
            print(f"{workload.name:28} {'training' if training else 'forward':8}", end=" ")
            print(f"{seconds * 1e3:10.4f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
