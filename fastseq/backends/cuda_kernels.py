"""The kernels of ``cuda``, and what each takes of a multiprocessor: pure functions of sizes.

One CTA owns 8 sequences of a recurrence for all of time, or 4 of them where there are
multiprocessors enough. 8 is the N of ``mma``, whose operand A are the weights and whose B is h. A
warp owns 16 hidden units, or 8 where there would be few warps. The weights stand in fragments, 16
rows x 32 bytes of the inner length, 4 registers of each lane:

- forward: a warp multiplies row tiles, 16 units of one gate each or 8 of two; the inner length is
  HC
- backward: one row tile, 16 units of h_{t-1}; the inner length is G_hh * HC, which two warps share
  where each owns 8

As many as the budget of registers allows stay there, the rest stands in shared memory. ``float32``
is four products of TF32 parts, and a fragment of it two: its high and its low part.

A cell without a product has no weights; its CTA owns 64 of the units, which see nobody.

csrc/cuda has the same byte counts in C++; a test compares them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

from ..cells import CELLS, Cell

Way = Literal["forward", "backward"]
WAYS: tuple[Way, ...] = ("forward", "backward")
#: Of a kernel's numbers. tf32: float32 in memory, multiplied in TF32; float32: in four products.
Type = Literal["bfloat16", "float16", "tf32", "float32"]

ITEMSIZE: dict[str, int] = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
#: How many operands of mma a number becomes.
PARTS: dict[str, int] = {"bfloat16": 1, "float16": 1, "tf32": 1, "float32": 2}

#: Sequences of a CTA: N of mma.
ROWS = 8
#: And where there are multiprocessors enough for all: half of the columns stay empty, and half of
#: the text is run.
FEW_ROWS = 4
#: Of a fragment in shared memory: 16 bytes a lane.
FRAGMENT = 512
#: Units of a CTA where there is no product.
POINTWISE_UNITS = 64
#: Registers of a thread beside the weights: sums, gates, states, addresses; of operands of one part
#: and two.
WORKING_REGISTERS = (100, 130)
#: What a thread can address.
MOST_REGISTERS = 255
#: Apart from other rows in shared memory, so that neighbours use other banks.
_ROW_PAD, _OPERAND_PAD = 16, 64


@dataclass(frozen=True)
class Device:
    """What the planner knows of a GPU.

    shared_memory: bytes that one CTA may have (opt-in); shared_memory_total: of a multiprocessor.
    clock: in GHz, at most. bandwidth: of its memory, GB/s. threads, ctas: that a multiprocessor can
    hold. mma_clocks: that it takes for one mma (m16n8k16 in 16 bits, m16n8k8 in TF32) when all its
    tensor cores are busy. clusters: how many clusters of so many CTAs, a multiprocessor to each,
    are on it at once; () where the driver was not asked. mps: whether other processes share it, by
    NVIDIA's MPS. cooperative: whether a whole grid can be started at once.
    """

    name: str
    multiprocessors: int
    shared_memory: int
    shared_memory_total: int
    registers: int
    clock: float
    capability: tuple[int, int]
    bandwidth: float
    threads: int = 2048
    ctas: int = 32
    mma_clocks: float = 2.0
    clusters: tuple[int, ...] = ()
    mps: bool = False
    cooperative: bool = True

    def at_once(self, size: int) -> int:
        """Clusters of so many CTAs at once. Where the driver was not asked, as an H100 answered: 7
        of 16, since a cluster stays within one part of the GPU, of 16 or 18 multiprocessors."""
        if self.capability < (9, 0) or size > MOST_OF_A_CLUSTER:
            return 0
        if self.clusters:
            return self.clusters[size] if size < len(self.clusters) else 0
        return self.multiprocessors // (size if size <= 8 else size + 2)


def device_of(properties: Any) -> Device:
    """From what torch.cuda.get_device_properties gives."""
    capability = (properties.major, properties.minor)
    # NVIDIA's CUDA programming guide, technical specifications by compute capability
    ctas = {(8, 0): 32, (8, 9): 24, (9, 0): 32, (10, 0): 32, (10, 3): 32, (12, 0): 24}
    # which torch has what varies with its version and with CUDA's
    clock = getattr(properties, "clock_rate", 0) or 1_500_000  # kHz
    memory = getattr(properties, "memory_clock_rate", 0) * getattr(
        properties, "memory_bus_width", 0
    )
    data_centre = capability in ((8, 0), (9, 0)) or capability[0] == 10
    return Device(
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,
        shared_memory_total=properties.shared_memory_per_multiprocessor,
        registers=getattr(properties, "regs_per_multiprocessor", 65536),
        clock=clock / 1e6,
        capability=capability,
        bandwidth=2 * memory / 8e6 or 1000,
        threads=properties.max_threads_per_multi_processor,
        ctas=ctas.get(capability, 16),
        # GeForce's tensor cores sum in float32 at half of their rate
        mma_clocks=2.0 if data_centre else 8.0 if "GeForce" in properties.name else 4.0,
    )


H100 = Device("NVIDIA H100 80GB HBM3", 132, 227 << 10, 228 << 10, 65536, 1.98, (9, 0), 3350)
H200 = Device("NVIDIA H200", 132, 227 << 10, 228 << 10, 65536, 1.98, (9, 0), 4800)
A100 = Device("NVIDIA A100-SXM4-80GB", 108, 163 << 10, 164 << 10, 65536, 1.41, (8, 0), 2039)
LAPTOP = Device(
    *("NVIDIA GeForce RTX 4060 Laptop GPU", 24, 99 << 10, 100 << 10, 65536, 2.37, (8, 9), 256),
    threads=1536,
    ctas=24,
    mma_clocks=8.0,
)
#: The shared memory of a CTA on the devices that have least and most of it.
LEAST_SHARED_MEMORY, MOST_SHARED_MEMORY = LAPTOP.shared_memory, H100.shared_memory


def reads_y(cell: Cell) -> bool:
    """Whether backward reads h at every step."""
    return cell.reads_h or not cell.keeps_gates(False)


def rows_of_a_cta(B: int, others: int, multiprocessors: int) -> int:
    """How many sequences a CTA has; others: CTAs beside each other for one tile of the batch."""
    return FEW_ROWS if -(-B // FEW_ROWS) * others <= multiprocessors else ROWS


@dataclass(frozen=True)
class Kernel:
    """One instantiation: a way through time of a cell, in a type, for H up to HC."""

    way: Way
    cell: str
    type: Type
    HC: int

    @cached_property
    def name(self) -> str:
        return f"{self.way}_{self.cell}_{self.type}_{self.HC}"

    @property
    def definition(self) -> Cell:
        return CELLS[self.cell]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.type]

    @property
    def each(self) -> int:
        """Hidden units of a thread: one where there are few warps, else two."""
        return 1 if self.HC <= 64 else 2

    @property
    def warps(self) -> int:
        return self.HC // (8 * self.each)

    @cached_property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def inner(self) -> int:
        """Bytes of a product's inner length."""
        gates = self.definition.G_hh if self.way == "backward" else 1
        return gates * self.HC * self.itemsize

    @property
    def tiles(self) -> int:
        """Row tiles of a warp, of 16 rows each: gates, or pairs of gates where a thread has one
        unit. Backward it is one."""
        gates = self.definition.G_hh
        if self.way == "backward" or not gates:
            return 1
        return gates if self.each == 2 else (gates + 1) // 2

    @property
    def split(self) -> int:
        """How many warps share the inner length of a row tile."""
        return 2 if self.way == "backward" and self.each == 1 else 1

    @cached_property
    def fragments(self) -> int:
        """Of the weights of a warp; they come in pairs, 64 bytes of the inner length."""
        if not self.definition.recurrent_gates:
            return 0
        return 2 * self.tiles * -(-(self.inner // 64) // self.split)

    @property
    def room(self) -> int:
        """How many registers of a thread may hold weights: as many as leave the compiler enough."""
        if self.threads > 256:
            return 24 if self.threads > 384 else 64
        return 96 if PARTS[self.type] == 2 else 128

    @cached_property
    def held(self) -> int:
        """The fragments of a warp that stay in registers, pairs of all its row tiles."""
        pair = 2 * self.tiles
        return min(self.fragments, self.room // (4 * PARTS[self.type] * pair) * pair)

    @property
    def rest(self) -> int:
        """The fragments of a warp that stand in shared memory, as memory has them."""
        return self.fragments - self.held

    @property
    def weight_registers(self) -> int:
        """Of a thread, for weights."""
        return 4 * PARTS[self.type] * self.held

    @property
    def operand(self) -> int:
        """Bytes of what a product multiplies, 8 rows of the inner length: pairs of rows start half
        the banks apart, and are shifted by the eight numbers of them that a warp stores."""
        if not self.definition.recurrent_gates:
            return 0
        pitch = self.inner + (_OPERAND_PAD if self.inner % 128 == 0 else 0)
        return ROWS * (pitch + 4 * self.itemsize)

    @property
    def row(self) -> int:
        """Bytes of a step of a sequence in the ring: the gates, and backward extras, dy, h, the
        other states and the gradients of their trajectory."""
        cell, unit = self.definition, self.HC * self.itemsize
        pieces = cell.G
        if self.way == "forward":
            return pieces * unit + _ROW_PAD
        pieces += len(cell.extras) + 1 + reads_y(cell)
        return pieces * unit + 2 * len(cell.other_states) * self.HC * 4 + _ROW_PAD

    @cached_property
    def stages(self) -> int:
        """Steps in the ring of what is read ahead: eight of few gates, else six or four, where
        every device has that much shared memory; else as many as fit."""
        found = 8 if self.definition.G < 3 else 6
        while found > 4 and self._shared(found) > LEAST_SHARED_MEMORY:
            found -= 2
        return 3 if self._shared(found) > MOST_SHARED_MEMORY else found

    @cached_property
    def shared(self) -> int:
        """Bytes of shared memory that a CTA takes."""
        return self._shared(self.stages)

    def _shared(self, stages: int) -> int:
        """The weights' rest, two operands, the sums that warps exchange, and the ring."""
        sums = 8 * self.threads if self.split == 2 and self.fragments else 0
        weights = self.rest * FRAGMENT * self.warps
        return weights + 2 * self.operand + sums + stages * ROWS * self.row

    @cached_property
    def ctas(self) -> int:
        """How many CTAs its registers let on a multiprocessor, for its launch bounds."""
        wanted = min(
            MOST_REGISTERS + 1, self.weight_registers + WORKING_REGISTERS[PARTS[self.type] - 1]
        )
        return max(1, min(16, 65536 // (self.threads * wanted)))

    @property
    def registers(self) -> int:
        """How many a thread may have under these launch bounds; given in eights."""
        return min(MOST_REGISTERS, 65536 // (self.threads * self.ctas) // 8 * 8)


#: In the order of the list; every one has one phase, and up to one state beside h.
PRODUCT_CELLS = (
    *("rnn_tanh", "rnn_relu", "rnn_sigmoid"),
    *("lstm", "peephole_lstm", "coupled_lstm", "gru"),
)
POINTWISE_CELLS = ("indrnn", "indrnn_tanh", "leaky_integrator")
#: The classes of H for which each type is built, and beyond them those of single cells.
CLASSES: dict[Type, tuple[int, ...]] = {
    "bfloat16": (32, 64, 128),
    "float16": (32, 64, 128),
    "tf32": (32, 64),
    "float32": (32, 64),
}
#: With part of the weights in shared memory. An LSTM of more would spill, or find no room.
WIDER: dict[tuple[str, str], tuple[int, ...]] = {
    **{(cell, "tf32"): (128,) for cell in ("rnn_tanh", "rnn_relu", "rnn_sigmoid", "gru")},
    **{("rnn_tanh", type): (256,) for type in ("bfloat16", "float16")},
}


Regime = Literal["cta", "cluster", "grid", "wave"]


@dataclass(frozen=True)
class TeamKernel:
    """One instantiation of a team's: several CTAs share a recurrence over a tile of the batch, each
    with a slice of the hidden units. Sizes that only take room are arguments of its functions.

    The numbers are those of csrc/cuda/team.h, Slice and Room; a test compares them.
    """

    way: Way
    cell: str
    type: Type
    regime: Regime
    #: A grid's slices of twice the hidden units: half as many CTAs take in, or give, as much.
    wide: bool = False

    #: Of a CTA, whatever the cell.
    warps = 8
    threads = 256
    stages = 4
    #: The launch bounds allow all that a thread can address.
    registers = MOST_REGISTERS

    @cached_property
    def name(self) -> str:
        return f"{self.way}_{self.cell}_{self.type}_{self.kind}"

    @property
    def kind(self) -> str:
        """In place of hidden units in the list of kernels."""
        return "wide" if self.wide else self.regime

    @property
    def definition(self) -> Cell:
        return CELLS[self.cell]

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.type]

    @property
    def units(self) -> int:
        """Hidden units of a slice."""
        return SLICE[self.kind]

    @property
    def matrices(self) -> int:
        """Whose rows a CTA holds: a wave's has those of w_ih as well."""
        return 2 if self.regime == "wave" else 1

    @property
    def room(self) -> int:
        """Registers of a thread that hold weights of a matrix."""
        return 128 // self.matrices

    @property
    def most(self) -> int:
        """The hidden units of the largest layer."""
        of_grid = (2048 if self.wide else 4096) // self.itemsize
        return {"cluster": 512, "wave": 256}.get(self.regime, of_grid)

    def team(self, H: int) -> int:
        """CTAs that share a recurrence of H units."""
        return -(-H // self.units)

    @cached_property
    def rows(self) -> int:
        """Of a slice's part of w_hh."""
        return self.definition.G_hh * self.units

    @cached_property
    def tiles(self) -> int:
        """Forward: row tiles of a warp."""
        count = self.rows // 16
        return 3 if count % 3 == 0 else 2 if count >= 4 else 1

    @cached_property
    def split(self) -> int:
        """Forward: warps that share the inner length of a row tile."""
        return self.warps * self.tiles // (self.rows // 16)

    @property
    def block(self) -> int:
        """Forward: pairs of fragments whose operand is loaded at once."""
        return 2 if self.wide else max(2, 8 // self.split)

    @cached_property
    def held(self) -> int:
        """What of a warp's weights is in registers: forward pairs of each row tile, backward row
        tiles."""
        if self.way == "forward":
            most = self.most * self.itemsize // 64 // self.split
            taken = 16 if self.definition.unit_parameters and self.regime == "grid" else 0
            return min(most, (self.room - taken) // (8 * self.tiles) // self.block * self.block)
        fit = self.room_back // (8 * self.pairs) // self.together * self.together
        return min(self.most // 16 // self.warps, fit)

    @property
    def room_back(self) -> int:
        """Backward: registers that hold weights. Sums of unit parameters take some of their own."""
        taken = self.itemsize == 4 or self.regime == "grid"
        return self.room - 32 * (bool(self.definition.unit_parameters) and taken)

    @property
    def together(self) -> int:
        """Backward: row tiles whose products are made side by side."""
        return 1 if self.room_back < 16 * self.pairs else 2

    @property
    def inner(self) -> int:
        """Backward: bytes of a product's inner length, the slice's gates."""
        return _up_to(self.rows * self.itemsize, 64)

    @property
    def pairs(self) -> int:
        """Backward: of fragments, of a row tile."""
        return self.inner // 64

    def walked(self, H: int) -> int:
        """Of a warp: forward pairs of the inner length, backward row tiles."""
        team = self.team(H)
        if self.way == "forward":
            inner = _up_to(team * self.units * self.itemsize, 64 * self.split * self.block)
            return inner // 64 // self.split
        return _up_to(-(-team * (self.units // 16) // self.warps), self.together)

    def weights(self, H: int) -> tuple[int, int]:
        """Bytes of a CTA's weights: in registers and in shared memory."""
        walked = self.walked(H)
        each = (self.tiles if self.way == "forward" else self.pairs) * 32 * self.threads
        each *= self.matrices
        return min(walked, self.held) * each, max(0, walked - self.held) * each

    @property
    def row(self) -> int:
        """Bytes of a step of a sequence in the ring, as of :class:`Kernel`."""
        cell, unit = self.definition, self.units * self.itemsize
        if self.way == "forward":
            return cell.G * unit + _ROW_PAD
        pieces = cell.G + len(cell.extras) + 1 + reads_y(cell)
        return pieces * unit + 2 * len(cell.other_states) * self.units * 4 + _ROW_PAD

    def operand(self, H: int, sequences: int) -> int:
        """Bytes of one operand: forward h of all units, backward a slice's gates' gradients."""
        inner = self.walked(H) * 64 * self.split if self.way == "forward" else self.inner
        return _up_to(sequences, 8) * (inner if inner % 128 else inner + _OPERAND_PAD)

    def shared(self, H: int, sequences: int) -> int:
        """Bytes of shared memory that a CTA takes, for so many sequences of a team."""
        columns = _up_to(sequences, 8)
        elements = columns * self.units * 4
        found, matrices = 128 + self.weights(H)[1], self.matrices
        if self.way == "forward":
            found += (1 if self.regime == "grid" else 2) * matrices * self.operand(H, sequences)
            found += matrices * columns * (self.split * self.rows + 4) * 4
            found += (1 + len(self.definition.other_states)) * elements
            found += self.warps * 32 * self.itemsize
        else:
            places = self.warps if self.regime == "grid" else 2 * self.team(H)
            found += matrices * (self.operand(H, sequences) + places * elements) + 5 * elements
        found = _up_to(found + columns * 4 + 2 * columns, 16)
        if self.regime == "wave":
            found += 2 * 16 * self.team(H)
        return found + self.stages * columns * self.row

    def packets(self, H: int, sequences: int) -> int:
        """Bytes of global memory through which a grid's team hands on, both places; 0 of a
        cluster's."""
        if self.regime != "grid":
            return 0
        team = self.team(H)
        if self.way == "forward":
            pages = -(-sequences * self.units // 32)
            return 2 * 16 * pages * team * (5 if self.itemsize == 2 else 8)
        return 2 * 16 * _up_to(sequences, 8) * self.units // 4 * team * team

    def handed(self, H: int, sequences: int) -> int:
        """Bytes that a CTA takes in at a step, without what packets add. Sums go in pairs of
        columns. A wave's CTA is given as much by a neighbouring layer, but at the ends."""
        units = self.matrices * self.team(H) * self.units
        if self.way == "forward":
            return units * sequences * self.itemsize
        return units * _up_to(sequences, 2) * 4


def _up_to(n: int, to: int) -> int:
    return -(-n // to) * to


#: Hidden units of a CTA of a team.
SLICE: dict[str, int] = {"cluster": 32, "grid": 16, "wide": 32, "wave": 32}
#: A cluster has no more CTAs than this.
MOST_OF_A_CLUSTER = 16


def _all() -> list[Kernel]:
    sizes: list[tuple[str, Type, int]] = []
    for cell in PRODUCT_CELLS:
        for type, classes in CLASSES.items():
            wider = WIDER.get((cell, type), ())
            sizes += [(cell, type, HC) for HC in (*classes, *wider)]
    for cell in POINTWISE_CELLS:
        sizes += [(cell, type, POINTWISE_UNITS) for type in CLASSES if type != "tf32"]
    return [Kernel(way, *size) for size in sizes for way in WAYS]


#: Every kernel that is built, by name.
KERNELS: dict[str, Kernel] = {kernel.name: kernel for kernel in _all()}

#: float32's own products, four of TF32 parts each, are one CTA's alone.
TEAM_TYPES: tuple[Type, ...] = ("bfloat16", "float16", "tf32")
#: Of the cells that are usual, in stacks and in large batches.
WAVE_CELLS = ("rnn_tanh", "rnn_relu", "lstm", "gru")
TEAMS: dict[str, TeamKernel] = {
    kernel.name: kernel
    for cell in PRODUCT_CELLS
    for type in TEAM_TYPES
    for regime in (("cluster", "grid", "wave") if cell in WAVE_CELLS else ("cluster", "grid"))
    for kernel in (
        TeamKernel("forward", cell, type, regime),
        TeamKernel("backward", cell, type, regime),
    )
}
#: Wide slices hold too little in 32 bits.
TEAMS |= {
    kernel.name: kernel
    for cell in WAVE_CELLS
    for type in TEAM_TYPES[:2]
    for kernel in (
        TeamKernel("forward", cell, type, "grid", wide=True),
        TeamKernel("backward", cell, type, "grid", wide=True),
    )
}

#: Beside these: what w_hh multiplied at every row, by so many threads, which is no cell's.
PREVIOUS_THREADS = 256
PREVIOUS = tuple(
    ("previous", "rows", type, PREVIOUS_THREADS) for type in ("bfloat16", "float16", "float32")
)


@lru_cache(maxsize=256)
def classes(cell: str, type: str) -> tuple[int, ...]:
    """The classes of H that are built, in increasing order."""
    return tuple(sorted({k.HC for k in KERNELS.values() if (k.cell, k.type) == (cell, type)}))


def unit_tiles(cell: Cell, H: int) -> int:
    """CTAs that share the hidden units: where they see nobody, any tile of them walks alone."""
    return 1 if cell.recurrent_gates else -(-H // POINTWISE_UNITS)


@lru_cache(maxsize=256)
def kernel_of(way: Way, cell: str, type: str, H: int) -> Kernel:
    """The one that walks a layer of H units: of the least class that has room for them."""
    units = H if CELLS[cell].recurrent_gates else min(H, POINTWISE_UNITS)
    return KERNELS[f"{way}_{cell}_{type}_{next(n for n in classes(cell, type) if n >= units)}"]
