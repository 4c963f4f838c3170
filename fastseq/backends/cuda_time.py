"""What a step of a ``cuda`` kernel should take: a model, fitted to calls measured on an H200.

A CTA's step is a chain: the product, beside which rows are copied, the text, h or the gates'
gradients into shared memory, a barrier, and a rest. Several CTAs of a multiprocessor fill each
other's gaps until a unit is busy all the time, so a step takes the longest of the chain and of what
each unit needs for all CTAs: tensor cores, shared memory, exponentials, starting instructions, and
the GPU's memory. Only the chain was fitted; all measured CTAs had a multiprocessor to themselves.

Each constant names its source. "table" is bench/results/nvidia-h100-80gb-hbm3/latency.csv: measured
on an H100 at 1.98 GHz, each part alone, kept here in clocks of a multiprocessor, so that a GPU of
another clock is scaled by it. "compiled": counted in what nvcc 13.0 made of the kernels for sm_90a,
before backward lost some of its integer instructions. Not in the model: the GEMMs around the loop,
the host, and the loop of problems with lengths, resets, a mask or an H below the kernel's, which
has more instructions.
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
#: One sigmoid or tanh behind another, by the parts of a number. Table: tanh by __expf and a fast
#: division (one part), 41.5 ns; by a true division (two), 60.8.
WORD_LATENCY = {1: 82, 2: 120}
#: What a step waits for beside all this: clocks, and bytes that a CTA puts into the GPU's memory a
#: clock. Fitted to whole calls of up to 8 sequences in CUDA graphs on an H200, less 20 us forward
#: and 42 in training for launches and GEMMs; no source explains them.
WAIT = {"forward": 110, "backward": 240}
PUT_RATE = {"forward": 50.0, "backward": 12.0}
#: Exponentials, reciprocals and the like that a multiprocessor makes a clock (CUDA programming
#: guide, throughput of special functions), and how many a sigmoid or tanh takes. Compiled: 60 MUFU
#: for the 30 words of an LSTM's thread, of three columns.
SPECIAL_RATE, SPECIALS = 16, 2
#: Instructions of warps that a multiprocessor starts a clock.
ISSUE_RATE = 4
#: Instructions of a warp's step without its products. Compiled, fitted to 40 kernels, the loop for
#: sequences of one length, which has the text for one column and again for two; half are met to
#: within 5%, all to within 15%. Beside the text, and there for each gate; in the text, for each
#: unit and column of a thread: forward for each sigmoid or tanh, by the parts of a number, backward
#: for each gate. With two parts also for each fragment of weights.
BESIDE = {"forward": 101, "backward": 120}
BESIDE_GATE = {"forward": 13, "backward": 35}
WORD_INSTRUCTIONS = {1: 10, 2: 17}
GATE_INSTRUCTIONS = 25
PART_INSTRUCTIONS = 20
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
    """Nanoseconds of the parts of a CTA's step, one behind another; rest: what was fitted."""

    product: float
    text: float
    exchange: float
    barrier: float
    rest: float


class Busy(NamedTuple):
    """Nanoseconds for which a CTA's step keeps each unit of a multiprocessor busy."""

    tensor_cores: float
    shared_memory: float
    exponentials: float
    instructions: float


@dataclass(frozen=True)
class Cost:
    """What a step of one CTA is made of, and what it should take.

    mmas, instructions: of all warps, as in training; with up to four sequences the text's are half.
    shared_read, shared_written: bytes, as in training. words: sigmoids, tanhs and the like.
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


def chains(kernel: Kernel) -> int:
    """Sums that a warp adds to in turn, of each row tile; csrc/cuda/tile.h, Weights::CHAINS."""
    return {1: 4, 2: 2}.get(kernel.tiles, 1)


def instructions(kernel: Kernel, columns: int) -> tuple[int, int]:
    """Of a warp's step without its products: beside the text, and of the text."""
    cell, way, parts = kernel.definition, kernel.way, PARTS[kernel.type]
    beside = BESIDE[way] + BESIDE_GATE[way] * cell.G
    if parts == 2:
        beside += PART_INSTRUCTIONS * kernel.fragments
    text = words(cell, way)[0] * WORD_INSTRUCTIONS[parts]
    if way == "backward":
        text = GATE_INSTRUCTIONS * cell.G
    return beside, text * kernel.each * columns


@lru_cache(maxsize=4096)
def cost(kernel: Kernel, device: Device, columns: int = 2, put: int = 0) -> Cost:
    """columns: of a thread that have a sequence; with up to four sequences, one. put: bytes that a
    step of the CTA writes to the GPU's memory."""
    cell, itemsize, parts = kernel.definition, ITEMSIZE[kernel.type], PARTS[kernel.type]
    has_product = bool(cell.recurrent_gates)
    each = kernel.fragments * (3 if parts == 2 else 1)  # of a warp
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
    # a row comes into the ring; what the GEMMs or backward want is put out of it
    read = multiplied + ROWS * (row + back)
    written = ROWS * (operand + row + back)
    each_unit, depth = words(cell, kernel.way)
    called = each_unit * kernel.each * columns  # of a thread
    beside, text = instructions(kernel, columns)
    clock, warps = device.clock, kernel.warps
    special = called * SPECIALS * 32 / SPECIAL_RATE  # clocks of a warp
    busy = Busy(
        mmas * device.mma_clocks / clock,
        (read + written) / SHARED_RATE / clock,
        special * warps / clock,
        (mmas + (beside + text) * warps) / ISSUE_RATE / clock,
    )
    chain = -(-each // (kernel.tiles * chains(kernel))) * MMA_LATENCY / clock
    times = Times(
        max(
            chain,
            busy.tensor_cores,
            multiplied / SHARED_RATE / clock,
            beside * warps / ISSUE_RATE / clock,
        ),
        max(
            depth * WORD_LATENCY[parts] + text + special * ISSUE_RATE,
            (text * warps) / ISSUE_RATE + special * warps,
        )
        / clock,
        EXCHANGE * kernel.split / clock if has_product else 0.0,
        (BARRIER + BARRIER_THREAD * kernel.threads) / clock,
        (WAIT[kernel.way] + put / PUT_RATE[kernel.way]) / clock,
    )
    total = mmas + (beside + text) * warps
    return Cost(mmas, total, read, written, called * kernel.threads, times, busy)


def limits(
    kernel: Kernel, device: Device, resident: int, moved: int, columns: int = 2, put: int = 0
) -> dict[str, float]:
    """Nanoseconds that a step takes at least, for each reason.

    resident: CTAs that share a multiprocessor; moved: bytes from and to the GPU's memory, of all
    CTAs that run at once.
    """
    found = cost(kernel, device, columns, put)
    return {
        "the chain of a step": found.alone,
        "tensor cores": resident * found.busy.tensor_cores,
        "shared memory": resident * found.busy.shared_memory,
        "exponentials": resident * found.busy.exponentials,
        "instructions": resident * found.busy.instructions,
        "the GPU's memory": moved / device.bandwidth,
        "reading ahead": MEMORY_LATENCY / (kernel.stages - 2),
    }
