"""Masks by the counter that names each unit, drawn on the device in one launch.

The words are those of :func:`fastseq.ops.masks.philox`: the key is the seed, the counter (u // 4,
id, site + 2^16 (id // 2^32), step), and u % 4 chooses among its four words. A unit takes 10 rounds
of two 32-bit products for four of them, and writes a byte, so the launch costs about what writing
the mask does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_kernels import INTERPRETED, Kernel

#: Rows and counters of a program: a thread has four counters, each of four units side by side.
ROWS, COUNTERS = 16, 32
_WORD = 0xFFFFFFFF


@triton.jit(do_not_specialize=["low", "high", "site", "stride", "threshold", "rows"])
def keep_kernel(
    seed_ptr, ids_ptr, steps_ptr, out_ptr, low, high, site, stride, threshold, rows, units,
    ROWS: tl.constexpr, COUNTERS: tl.constexpr
):  # fmt: skip
    """out (sites, rows, units): whether a unit's word is at least the threshold.

    A program owns a tile of the rows and of the counters of one site. low, high: of the key, where
    the seed is not on the device. These and the threshold are words, as signed numbers.
    """
    of_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    block = tl.program_id(2) * COUNTERS + tl.arange(0, COUNTERS)[None, :]
    is_row = of_row < rows
    id = tl.load(ids_ptr + of_row, mask=is_row, other=0)
    place = site + tl.program_id(1) * stride
    c_2 = ((id >> 32 & 0xFFFF) << 16 | place).to(tl.uint32)
    c_3 = tl.zeros_like(c_2)
    if steps_ptr is not None:
        c_3 = tl.load(steps_ptr + of_row, mask=is_row, other=0).to(tl.uint32)
    if seed_ptr is not None:
        key = tl.load(seed_ptr)
    else:
        key = high.to(tl.int64) << 32 | low.to(tl.int64) & 0xFFFFFFFF
    none = tl.zeros((ROWS, COUNTERS), tl.uint32)
    a, b, c, d = tl.philox(
        key, none + block.to(tl.uint32), none + id.to(tl.uint32), none + c_2, none + c_3
    )
    words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(ROWS, 4 * COUNTERS)
    unit = (tl.program_id(2) * COUNTERS * 4 + tl.arange(0, 4 * COUNTERS))[None, :]
    kept = words >= threshold.to(tl.uint32, bitcast=True)
    at = (tl.program_id(1).to(tl.int64) * rows + of_row) * units + unit
    tl.store(out_ptr + at, kept.to(tl.uint8), mask=is_row & (unit < units))


KEEP = Kernel(keep_kernel, tuple(keep_kernel.arg_names))


def keep(
    seed: Tensor,
    sites: Sequence[int],
    ids: Tensor,
    steps: Tensor | None,
    units: int,
    threshold: int,
) -> Tensor | None:
    """(sites, rows, units) bool, as :class:`.contract.Draws` says; None for tensors elsewhere."""
    on, rows = ids.device, ids.shape[0]
    here = on.type == "cuda" or (INTERPRETED and on.type == "cpu")
    if not here or seed.device not in (on, torch.device("cpu")):
        return None
    out = torch.empty((len(sites), rows, units), dtype=torch.bool, device=on)
    if threshold > _WORD:
        return out.fill_(False)
    if out.numel() == 0:
        return out
    # a seed on the device is read there: nobody waits for it
    there = seed.device == on and on.type == "cuda"
    key = 0 if there else int(seed)
    values = {
        "seed_ptr": seed if there else None,
        "ids_ptr": ids.contiguous(),
        "steps_ptr": None if steps is None else steps.contiguous(),
        "low": _signed(key & _WORD),
        "high": _signed(key >> 32 & _WORD),
        "threshold": _signed(threshold),
        "rows": rows,
        "units": units,
        "ROWS": ROWS,
        "COUNTERS": COUNTERS,
    }
    tiles = -(-rows // ROWS), -(-units // (4 * COUNTERS))
    with torch.cuda.device(on if on.type == "cuda" else -1):
        for first, run, stride in _progressions(sites):
            part = out[first : first + run].view(torch.uint8)
            given = {"out_ptr": part, "site": sites[first], "stride": stride}
            KEEP((tiles[0], run, tiles[1]), values | given, {"num_warps": 4})
    return out


def _signed(word: int) -> int:
    """The same bits as a signed number: a larger one is of another type, and compiles anew."""
    return word - (1 << 32) if word >> 31 else word


def _progressions(sites: Sequence[int]) -> list[tuple[int, int, int]]:
    """(place of the first, count, stride): one for the layers and directions of a stack, else each
    alone."""
    stride = sites[1] - sites[0] if len(sites) > 1 else 0
    if all(site == sites[0] + k * stride for k, site in enumerate(sites)):
        return [(0, len(sites), stride)]
    return [(k, 1, 0) for k in range(len(sites))]
