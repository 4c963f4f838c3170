"""What a step of a ``cuda`` kernel should take: a model, of which nothing was measured as a whole.

A CTA's step is a chain: the product, the text, h into shared memory, a barrier. Several CTAs of a
multiprocessor fill each other's gaps until a unit is busy all the time, so a step takes the longest
of the chain and of what each unit needs for all CTAs: tensor cores, shared memory, the units of
the text, and the GPU's memory.

Each constant names its source. "table" is bench/results/nvidia-h100-80gb-hbm3/latency.csv: measured
on an H100 at 1.98 GHz, each part alone, kept here in clocks of a multiprocessor, so that a GPU of
another clock is scaled by it. Not in the model: the GEMMs around the loop, and the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..cells import Cell, bind
from .cuda_kernels import FRAGMENT, ITEMSIZE, PARTS, ROWS, Device, Kernel, backward_row

#: From one mma to one that adds to its sum. Table, mma-registers-1: 16.9 ns.
MMA_LATENCY = 33
#: __syncthreads: this and that for each thread. Table, block-barrier: 13.4 ns of 128 threads, 17.4
#: of 256, 25.6 of 512, 42.1 of 1024.
BARRIER, BARRIER_THREAD = 18.4, 0.0635
#: Bytes of shared memory a clock. NVIDIA's CUDA programming guide: 32 banks of 4 bytes.
SHARED_RATE = 128
#: h written to shared memory, and its first fragment read. Assumed: 30 each.
EXCHANGE = 60
#: One sigmoid or tanh behind another. Table: tanh by __expf and a fast division (16 bits), 41.5 ns;
#: by a true division (float32), 60.8.
WORD_LATENCY = {2: 82, 4: 120}
#: A text's sums and products. Assumed: ten behind one another, four clocks each.
TEXT = 40
#: Clocks of a multiprocessor for each sigmoid or tanh when it has nothing else to do. 16 bits: an
#: exponential and a reciprocal, 16 results a clock (CUDA programming guide, throughput of special
#: functions). float32: some 30 instructions, of which a clock has 128. Assumed, not compiled.
WORD_CLOCKS = {2: 2 / 16, 4: 30 / 128}
#: From the GPU's memory to a multiprocessor, ns. Assumed.
MEMORY_LATENCY = 600
#: A launch in a stream, us. Table, launch-stream: 3.7.
LAUNCH = 3.7

#: Words whose cost is that of an exponential or a division; the others are a few instructions.
_DEAR = ("sigmoid", "tanh", "exp", "reciprocal", "logsigmoid", "sqrt")


class _Count:
    """A value of a text that knows how many dear words stand behind one another on its way."""

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth

    def _with(self, other: _Count) -> _Count:
        return _Count(max(self.depth, other.depth))

    __add__ = __sub__ = __mul__ = __radd__ = __rsub__ = __rmul__ = _with

    def __neg__(self) -> _Count:
        return self


@lru_cache(maxsize=64)
def words(cell: Cell, way: str) -> tuple[int, int]:
    """How many dear words the texts of a way call for each hidden unit, and how many of them stand
    behind one another."""
    called, deepest = 0, 0

    def dear(value: _Count) -> _Count:
        nonlocal called
        called += 1
        return _Count(value.depth + 1)

    def cheap(*values: _Count) -> _Count:
        return _Count(max(v.depth for v in values))

    for phase in cell.phases:
        text = phase.forward if way == "forward" else phase.backward
        assert text is not None
        names = text.__code__.co_names
        bound = bind(text, "count", **{n: dear if n in _DEAR else cheap for n in names})
        found = bound(*[_Count()] * text.__code__.co_argcount)
        deepest += max(v.depth for v in (found if isinstance(found, tuple) else (found,)))
    return called, deepest


class Times(NamedTuple):
    """Nanoseconds of the parts of a CTA's step, one behind another."""

    product: float
    text: float
    exchange: float
    barrier: float


class Busy(NamedTuple):
    """Nanoseconds for which a CTA's step keeps each unit of a multiprocessor busy."""

    tensor_cores: float
    shared_memory: float
    text: float


@dataclass(frozen=True)
class Cost:
    """What a step of one CTA is made of, and what it should take.

    mmas: by all warps. shared_read, shared_written: bytes, as in training. words: sigmoids, tanhs
    and the like.
    """

    mmas: int
    shared_read: int
    shared_written: int
    words: int
    times: Times
    busy: Busy

    @property
    def alone(self) -> float:
        """Nanoseconds of a step where nobody else is on the multiprocessor."""
        return sum(self.times)


def sums(kernel: Kernel) -> int:
    """How many sums a warp has on their way at once; csrc/cuda/tile.h, Weights::CHAINS."""
    tiles = kernel.definition.G_hh if kernel.way == "forward" else 1
    if tiles == 1:
        return min(4, kernel.fragments)
    return tiles * (2 if tiles == 2 else 1)


@lru_cache(maxsize=4096)
def cost(kernel: Kernel, device: Device) -> Cost:
    cell, itemsize = kernel.definition, ITEMSIZE[kernel.type]
    products = 3 if PARTS[kernel.type] == 2 else 1
    has_product = bool(cell.recurrent_gates)
    each = kernel.fragments * products if has_product else 0  # of a warp
    mmas = each * kernel.warps
    h = kernel.HC * itemsize
    gates = cell.G * h
    if kernel.way == "forward":
        operand, row, back = h, gates, gates * cell.keeps_gates(False)
    else:
        operand, row, back = cell.G_hh * h, sum(backward_row(cell, itemsize, kernel.HC)), gates
    operand *= has_product
    rest = kernel.rest * FRAGMENT * kernel.warps
    multiplied = rest + ROWS * operand * kernel.warps  # every warp reads all of the operand
    by_text = ROWS * (row + operand + back)
    # a row comes into the ring; what the GEMMs or backward want is put out of it
    read = multiplied + ROWS * (row + back)
    written = ROWS * (operand + row + back)
    each_unit, depth = words(cell, kernel.way)
    called = each_unit * ROWS * kernel.HC
    clock = device.clock
    busy = Busy(
        mmas * device.mma_clocks / clock,
        (read + written) / SHARED_RATE / clock,
        called * WORD_CLOCKS[itemsize] / clock,
    )
    chain = -(-each // sums(kernel)) * MMA_LATENCY / clock if each else 0.0
    times = Times(
        max(chain, busy.tensor_cores, multiplied / SHARED_RATE / clock),
        max(
            (TEXT + depth * WORD_LATENCY[itemsize]) / clock,
            busy.text,
            by_text / SHARED_RATE / clock,
        ),
        EXCHANGE / clock if has_product else 0.0,
        (BARRIER + BARRIER_THREAD * kernel.threads) / clock,
    )
    return Cost(mmas, read, written, called, times, busy)


def limits(kernel: Kernel, device: Device, resident: int, moved: int) -> dict[str, float]:
    """Nanoseconds that a step takes at least, for each reason.

    resident: CTAs that share a multiprocessor; moved: bytes from and to the GPU's memory, of all
    CTAs that run at once.
    """
    found = cost(kernel, device)
    return {
        "the chain of a step": found.alone,
        "tensor cores": resident * found.busy.tensor_cores,
        "shared memory": resident * found.busy.shared_memory,
        "the text": resident * found.busy.text,
        "the GPU's memory": moved / device.bandwidth,
        "reading ahead": MEMORY_LATENCY / (kernel.stages - 2),
    }
