"""How a problem is cut into programs: a pure function of sizes, types and the device.

Nothing here depends on T, and on B only in whether its rows are few, so one compiled kernel serves
every length and batch of a cell, type and class of H (the power of two that holds it, and whether
16 divides it; in a grid that holds its weights, the pieces that cover it).

Registers and shared memory are what the compiler reports for sm_90 (tests/test_triton_compile.py
asserts that nothing spills). No time stands behind any number here: none was measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from ..cells import Cell
from .gpu_layer import Precision
from .triton_source import terms_of
from .triton_text import Pieces

Form = Literal["walk", "step", "grid"]


class Device(NamedTuple):
    """shared_memory: bytes that one program may have. warp_size: 64 on AMD's.

    processors: how many programs are on the chip at once for certain, one on each multiprocessor; 0
        where programs cannot wait for one another. hopper: compute capability 9.
    """

    shared_memory: int
    warp_size: int = 32
    processors: int = 0
    hopper: bool = False


@dataclass(frozen=True)
class Tiling:
    """form: one launch that walks all of time, one for each step, or one whose programs meet.

    A program has block_b sequences and block_h hidden units. block_p is the width of h in a walk,
    where it is projected; block_k how much of a product's inner length is on the chip at once in a
    step, or, in a grid whose programs hold their weights (resident), is one of their pieces.
    maxnreg: how many registers a thread may have.
    """

    form: Form
    block_b: int
    block_h: int
    block_p: int
    block_k: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None
    resident: bool = False

    def options(self) -> dict[str, int | bool]:
        """Of the compiler and the launch."""
        found: dict[str, int | bool] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.maxnreg is not None:
            found["maxnreg"] = self.maxnreg
        if self.form == "grid":  # the driver starts all programs, or refuses
            found["launch_cooperative_grid"] = True
        return found

    @property
    def paired(self) -> bool:
        """Whether the warps side by side are more than the columns of one gate."""
        return self.block_b == LEAST and 8 * self.num_warps > self.block_h

    def blocks(self) -> dict[str, int | bool]:
        """What the kernels take as constants."""
        return {
            "PAIRED": self.paired,
            "BLOCK_B": self.block_b,
            "BLOCK_H": self.block_h,
            "BLOCK_P": self.block_p,
            "BLOCK_K": self.block_k,
        }


#: tl.dot wants at least 16 in every dimension. A walk takes no more rows than that: more programs
#: run side by side, and the weights' registers are not shared with a larger tile of gates.
LEAST = 16
#: up to this batch a step's programs have 16 rows as well
FEW_ROWS = 32
#: what a walk needs in shared memory beside the weights, for exchanging h between warps
_SLACK = 10240


def power_of_two(n: int) -> int:
    """The least power of two that is a tile and holds n."""
    return max(LEAST, 1 << max(n - 1, 0).bit_length())


def resident_bytes(cell: Cell, H: int, P: int | None, itemsize: int) -> int:
    """What the weights of all products take on the chip, padded to tiles. P: None or projected."""
    block_h = power_of_two(H)
    block_p = block_h if P is None else power_of_two(P)
    inner = sum(
        len(cell.product_gates(phase)) * (block_p if phase.operand == "h_prev" else block_h)
        for phase in cell.phases
    )
    return itemsize * block_h * (inner + (0 if P is None else block_p))


def _held(block_h: int, dtype: torch.dtype) -> Tiling:
    """A grid whose programs hold their weights. With more warps each would read all of the operand
    from shared memory once more; told how many registers it may take, ptxas spills some."""
    sizes = (LEAST, block_h, block_h, 256 // dtype.itemsize, 4, 1)
    return Tiling("grid", *sizes, resident=True)


#: Pieces of an operand on their way at once; each takes 8 registers of a thread.
_ON_THEIR_WAY = 12


def pieces_of(
    cell: Cell, H: int, P: int | None, held: Tiling, itemsize: int, backward: bool, device: Device
) -> Pieces | None:
    """How the programs of a grid hold their weights; None where they do not fit."""
    piece = held.block_k * itemsize
    counts, taken = {}, 0
    for term in terms_of(cell, P is not None, backward):
        gates, _, size = term.width.rpartition(" * ")
        width = int(gates or 1) * {"H": H, "P": P or H}[size]
        counts[term.width] = -(-width // held.block_k)
        taken += counts[term.width] * piece * term.n * held.block_h
    room = (device.shared_memory - taken) // (piece * held.block_b)
    most = max(counts.values(), default=1)
    if room < min(2, most):
        return None
    return Pieces(tuple(counts.items()), min(most, room, _ON_THEIR_WAY))


def aligned(H: int, P: int | None) -> bool:
    """Every row starts where 16 numbers can be loaded at once."""
    return H % 16 == 0 and (P is None or P % 16 == 0)


def _walk(device: Device, block_h: int, block_p: int, num_warps: int) -> Tiling:
    """ptxas may use all registers: left alone it spills a few, to fit more programs on a
    multiprocessor than its shared memory holds. (AMD's compiler has no such option.)"""
    maxnreg = None if device.warp_size == 64 else 255
    return Tiling("walk", LEAST, block_h, block_p, LEAST, num_warps, 1, maxnreg)


def pointwise_tiling(H: int, dtype: torch.dtype, device: Device) -> Tiling:
    """A walk without products: units see nobody, so any tile of them walks alone."""
    block_h = min(power_of_two(H), 32 if dtype is torch.float64 else 64)
    return _walk(device, block_h, block_h, 4)


def programs(tiles: int, columns: int, processors: int) -> int:
    """How many programs share the tiles of the batch, where ``columns`` of them must meet."""
    return max(1, min(tiles, processors // max(columns, 1)))


def tiling(
    cell: Cell,
    H: int,
    P: int | None,
    dtype: torch.dtype,
    precision: Precision,
    B: int,
    R: int,
    device: Device,
    larger: Form,
) -> Tiling:
    """How one layer's loop over time runs.

    P: the projected size, or None. precision: of float32's products. larger: the form of what no
    single program holds; "step" takes the place of "grid" where its programs are too many.
    """

    def programs_of(t: Tiling, tiles: int) -> int:
        return tiles * R * -(-max(H, P or 0) // t.block_h)

    found = _tiling(cell, H, P, dtype, precision, B <= FEW_ROWS, device)
    if found.form == "walk" or larger == "step":
        return found
    few = _tiling(cell, H, P, dtype, precision, True, device)
    if programs_of(few, -(-B // LEAST)) <= device.processors:  # all of the batch at once
        small = dtype.itemsize == 2 or (precision == "tf32" and device.hopper)
        # sixteen units where 32 do not fit; and in TF32, whose transposed weights take an address
        # register each, since ldmatrix transposes 16 bits alone
        blocks = (32, 16) if dtype.itemsize == 2 else (16, 32)
        for block_h in blocks if small and aligned(H, P) else ():
            held = _held(block_h, dtype)
            sizes = (cell, H, P, held, dtype.itemsize)
            fits = all(pieces_of(*sizes, backward, device) for backward in (False, True))
            # narrower than the warps' columns, each warp would make all of a product
            wide = min(t.n for t in terms_of(cell, P is not None, False)) * block_h >= 32
            if fits and wide and programs_of(held, -(-B // LEAST)) <= device.processors:
                return held
        return replace(few, form="grid")
    # with 64 rows, where rows start anywhere, a loop around the steps leaves no registers
    if programs_of(found, 1) <= device.processors and (aligned(H, P) or found.block_b == LEAST):
        # one program on a multiprocessor has all of its registers; ptxas foresees two
        ampere = not device.hopper and device.warp_size == 32
        return replace(found, form="grid", maxnreg=255 if ampere else found.maxnreg)
    return found


def _tiling(
    cell: Cell,
    H: int,
    P: int | None,
    dtype: torch.dtype,
    precision: Precision,
    few: bool,
    device: Device,
) -> Tiling:
    if not cell.recurrent_gates and P is None:
        return pointwise_tiling(H, dtype, device)
    block_h = power_of_two(H)
    block_p = block_h if P is None else power_of_two(P)
    widest = max(block_h, block_p)
    # Without tensor cores a product keeps whole rows and columns in registers: at H = 32 they fit,
    # but Triton 3.9's compiler crashes on the backward walk.
    cores = dtype.itemsize == 2 or precision != "ieee"
    amd = device.warp_size == 64
    resident = resident_bytes(cell, H, P, dtype.itemsize)
    if precision == "tf32x3":
        resident *= 2  # both parts of every weight
    # The widest tiles leave no registers for the addresses of rows that start anywhere.
    even = aligned(H, P)
    if precision == "tf32x3":
        most = 32 if even else 16
    elif dtype.itemsize == 2:
        most = 128 if even else 64
    else:
        most = 64
    if amd:
        most = min(most, 64 if even else 32)
    if cores and widest <= most and resident + _SLACK <= device.shared_memory:
        # 16 x 64 gates: with 4 warps (of 32) a thread holds 8 of each, and spills
        return _walk(device, block_h, block_p, 4 if widest <= 32 or amd else 8)
    maxnreg = None if amd else 255
    if dtype is torch.float64:  # sums of outer products, in registers
        return Tiling("step", LEAST, 16, 16, 1, 4, 1, maxnreg)
    if not cores:
        # Triton multiplies no less than 16 at once before 3.9
        return Tiling("step", LEAST, 16, 16, LEAST, 4, 1, maxnreg)
    threefold = precision == "tf32x3"  # the operands
    block_k = 16 if threefold or not even or (amd and dtype.itemsize == 4) else 32
    num_stages = 2 if threefold or amd else 3
    if few:
        ampere = not (device.hopper or amd)
        wide = not even and (P is not None or dtype.itemsize == 4 or ampere)
        num_warps = 8 if threefold or wide else 4
        return Tiling("step", LEAST, 32, 32, block_k, num_warps, num_stages, maxnreg)
    # only Hopper's products read both operands from shared memory; where rows start anywhere, their
    # addresses leave no registers for 32 units of them
    if device.hopper:
        units = 32 if even else 16
        return Tiling("step", 64, units, units, block_k, 8, num_stages)
    return Tiling("step", 64, 16, 16, block_k, 8, num_stages, maxnreg if threefold else None)
