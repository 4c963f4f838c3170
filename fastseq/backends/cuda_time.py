"""What a step of a ``cuda`` kernel should take: a model, of which nothing was measured as a whole.

A CTA's step is a chain: the product, the text, h into shared memory, a barrier. Several CTAs of a
multiprocessor fill each other's gaps until a unit is busy all the time, so a step takes the longest
of the chain and of what each unit needs for all CTAs: tensor cores, shared memory, exponentials,
starting instructions, and the GPU's memory.

Each constant names its source. "table" is bench/results/nvidia-h100-80gb-hbm3/latency.csv: measured
on an H100 at 1.98 GHz, each part alone, kept here in clocks of a multiprocessor, so that a GPU of
another clock is scaled by it. Not in the model: the GEMMs around the loop, and the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from ..cells import Cell, bind
from .cuda_kernels import FRAGMENT, ITEMSIZE, PARTS, ROWS, Device, Kernel

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
#: Exponentials, reciprocals and the like that a multiprocessor makes a clock (CUDA programming
#: guide, throughput of special functions), and how many a sigmoid or tanh takes. Compiled: 40 MUFU
#: for the 20 words of an LSTM's thread.
SPECIAL_RATE, SPECIALS = 16, 2
#: Instructions of warps that a multiprocessor starts a clock.
ISSUE_RATE = 4
#: Instructions of a warp's step, fitted to what nvcc 13.0 made of 14 kernels for sm_90a: the loop
#: over time, with one way of copying a row, and without resets. For each sigmoid or tanh of a
#: thread, by the bytes of a number; for each fragment in parts of TF32; and for all else, forward
#: and backward, a base and so many for each gate, backward for the other state too. Each of the 14
#: is met to within 8%.
WORD_INSTRUCTIONS = {2: 13, 4: 22}
PART_INSTRUCTIONS = 15
FORWARD_INSTRUCTIONS, FORWARD_GATE = 210, 55
BACKWARD_INSTRUCTIONS, BACKWARD_GATE, BACKWARD_STATE = 420, 100, 150
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
    exponentials: float
    instructions: float


@dataclass(frozen=True)
class Cost:
    """What a step of one CTA is made of, and what it should take.

    mmas, instructions: of all warps, as in training. shared_read, shared_written: bytes, likewise.
    words: sigmoids, tanhs and the like.
    """

    mmas: int
    instructions: int
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
    if kernel.tiles == 1:
        return min(4, kernel.fragments)
    return kernel.tiles * (2 if kernel.tiles == 2 else 1)


def instructions(kernel: Kernel) -> int:
    """Of a warp's step, without its products."""
    cell = kernel.definition
    found = words(cell, kernel.way)[0] * 2 * kernel.each * WORD_INSTRUCTIONS[ITEMSIZE[kernel.type]]
    if PARTS[kernel.type] == 2:
        found += PART_INSTRUCTIONS * kernel.fragments
    if kernel.way == "forward":
        return found + FORWARD_INSTRUCTIONS + FORWARD_GATE * cell.G
    states = BACKWARD_STATE * len(cell.other_states)
    return found + BACKWARD_INSTRUCTIONS + BACKWARD_GATE * cell.G + states


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
        operand, row, back = cell.G_hh * h, kernel.row, gates
    operand *= has_product
    rest = kernel.rest * FRAGMENT * kernel.warps
    multiplied = rest + ROWS * operand * kernel.warps // kernel.split  # each warp reads its part
    by_text = ROWS * (row + operand + back)
    # a row comes into the ring; what the GEMMs or backward want is put out of it
    read = multiplied + ROWS * (row + back)
    written = ROWS * (operand + row + back)
    each_unit, depth = words(cell, kernel.way)
    called = each_unit * ROWS * kernel.HC
    beside = instructions(kernel) * kernel.warps
    clock = device.clock
    busy = Busy(
        mmas * device.mma_clocks / clock,
        (read + written) / SHARED_RATE / clock,
        called * SPECIALS / SPECIAL_RATE / clock,
        (mmas + beside) / ISSUE_RATE / clock,
    )
    chain = -(-each // sums(kernel)) * MMA_LATENCY / clock if each else 0.0
    times = Times(
        max(chain, busy.tensor_cores, multiplied / SHARED_RATE / clock),
        max(
            (TEXT + depth * WORD_LATENCY[itemsize]) / clock,
            busy.exponentials,
            beside / ISSUE_RATE / clock,
            by_text / SHARED_RATE / clock,
        ),
        EXCHANGE / clock if has_product else 0.0,
        (BARRIER + BARRIER_THREAD * kernel.threads) / clock,
    )
    return Cost(mmas, mmas + beside, read, written, called, times, busy)


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
        "exponentials": resident * found.busy.exponentials,
        "instructions": resident * found.busy.instructions,
        "the GPU's memory": moved / device.bandwidth,
        "reading ahead": MEMORY_LATENCY / (kernel.stages - 2),
    }
