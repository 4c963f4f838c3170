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

Form = Literal["walk", "step", "grid"]
Precision = Literal["ieee", "tf32", "tf32x3"]


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

    def pieces(self, P: int, H: int) -> tuple[int, int] | None:
        """In how many pieces the weights of P and of H are held."""
        return (-(-P // self.block_k), -(-H // self.block_k)) if self.resident else None

    def blocks(self) -> dict[str, int]:
        """What the kernels take as constants."""
        return {
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


def ahead_of(pieces: int) -> int:
    """How many pieces of an operand are on their way at once, where a grid holds its weights."""
    return pieces if pieces <= 4 else 2


def _held(widest: int, dtype: torch.dtype, device: Device) -> Tiling:
    """A grid whose programs hold their weights."""
    if not device.hopper:
        return Tiling("grid", LEAST, 32, 32, 64, 8, 1, 255, resident=True)
    block_k = 256 // dtype.itemsize
    num_warps = 4 if widest <= 4 * block_k else 8
    return Tiling("grid", LEAST, 32, 32, block_k, num_warps, 1, resident=True)


def held_bytes(cell: Cell, H: int, P: int | None, held: Tiling, itemsize: int) -> int:
    """What a program of a grid takes in shared memory: its columns of all weights, in backward, and
    the pieces of an operand that are on their way."""
    k = held.block_k
    inner = len(cell.recurrent_gates) * -(-H // k) + -(-(P or 0) // k)
    ahead = ahead_of(-(-max(H, P or 0) // k))
    return itemsize * k * (held.block_h * inner + held.block_b * ahead)


def _aligned(H: int, P: int | None) -> bool:
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
        held = _held(max(H, P or 0), dtype, device)
        fits = held_bytes(cell, H, P, held, dtype.itemsize) <= device.shared_memory
        small = dtype.itemsize == 2 or (precision == "tf32" and device.hopper)
        few_pieces = len(cell.phases) == 1 and max(H, P or 0) <= 4 * held.block_k
        if small and fits and _aligned(H, P) and (device.hopper or few_pieces):
            return held
        return replace(few, form="grid")
    # with 64 rows, where rows start anywhere, a loop around the steps leaves no registers
    if programs_of(found, 1) <= device.processors and (_aligned(H, P) or found.block_b == LEAST):
        return replace(found, form="grid")
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
    aligned = _aligned(H, P)
    if precision == "tf32x3":
        most = 32 if aligned else 16
    elif dtype.itemsize == 2:
        most = 128 if aligned else 64
    else:
        most = 64
    if amd:
        most = min(most, 64 if aligned else 32)
    if cores and widest <= most and resident + _SLACK <= device.shared_memory:
        # 16 x 64 gates: with 4 warps (of 32) a thread holds 8 of each, and spills
        return _walk(device, block_h, block_p, 4 if widest <= 32 or amd else 8)
    maxnreg = None if amd else 255
    if dtype is torch.float64:  # sums of outer products, in registers
        return Tiling("step", LEAST, 16, 16, 4, 4, 1, maxnreg)
    if not cores:
        return Tiling("step", LEAST, 16, 16, 8, 4, 1, maxnreg)
    threefold = precision == "tf32x3"  # the operands
    block_k = 16 if threefold or not aligned or (amd and dtype.itemsize == 4) else 32
    num_stages = 2 if threefold or amd else 3
    if few:
        wide = not aligned and (P is not None or dtype.itemsize == 4)
        num_warps = 8 if threefold or wide else 4
        return Tiling("step", LEAST, 32, 32, block_k, num_warps, num_stages, maxnreg)
    # only Hopper's products read both operands from shared memory
    if device.hopper:
        return Tiling("step", 64, 32, 32, block_k, 8, num_stages)
    return Tiling("step", 64, 16, 16, block_k, 8, num_stages, maxnreg if threefold else None)
