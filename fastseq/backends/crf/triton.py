"""Chains by loops over time for GPUs, in Triton: :mod:`.triton_kernels`.

Totals over time are float64, and so are the gradients of parameters, which a fixed number of
programs add up. No atomics: two identical calls agree bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..triton import unavailable
from ..triton_kernels import INTERPRETED, Kernel
from . import OFTEN, Chain
from .triton_kernels import BACK, BACKWARD, FORWARD, VITERBI

__all__ = ["backward", "forward", "supports", "unavailable", "viterbi"]

#: Tags of which the tiles of backward, three of them, stay in registers.
MOST_TAGS = {torch.float32: 128, torch.float64: 64}
#: Programs of backward, whatever the device, and steps that they add up before they do in float64.
_PROGRAMS, _STEPS = 256, 32
_PATHS = 32


def supports(dtype: torch.dtype, device: str, K: int) -> str | None:
    if device != "cuda" and not (device == "cpu" and INTERPRETED):
        return (
            f"triton's kernels run on CUDA and ROCm devices, not on {device}; TRITON_INTERPRET=1 "
            "in the environment runs them on the CPU in NumPy, for tests alone"
        )
    if K > MOST_TAGS[dtype]:
        return f"triton's kernels hold up to {MOST_TAGS[dtype]} tags in {dtype}, not {K}"
    return None


def _block(K: int) -> int:
    """Tags and padding."""
    return max(16, 1 << (K - 1).bit_length())


class _Task:
    """A call, as the kernels take it."""

    def __init__(self, chain: Chain, tags: Tensor | None) -> None:
        e = chain.emissions
        self.T, self.B, self.K = e.shape
        self.e = e if e.stride(2) == 1 or self.K == 1 else e.contiguous()
        self.block = _block(self.K)
        # a thread holds 8 numbers of a tile, 32 from 64 tags on
        self.warps = {16: 1, 32: 4, 64: 8, 128: 16}[self.block] * (
            2 if e.dtype.itemsize == 8 else 1
        )
        self.values: dict[str, Any] = {
            "e_ptr": self.e,
            "e_t": self.e.stride(0),
            "e_b": self.e.stride(1),
            "lengths_ptr": None if chain.lengths is None else chain.lengths.contiguous(),
            "start_ptr": chain.start.contiguous(),
            "end_ptr": chain.end.contiguous(),
            "moves_ptr": chain.transitions,
            "i_stride": chain.transitions.stride(0),
            "j_stride": chain.transitions.stride(1),
            "tags_ptr": tags,
            "tags_t": 0 if tags is None else tags.stride(0),
            "tags_b": 0 if tags is None else tags.stride(1),
            "T": self.T,
            "B": self.B,
            "K": self.K,
            "BLOCK": self.block,
        }

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.e.dtype, device=self.e.device)

    def launch(self, kernel: Kernel, programs: int, **own: Any) -> None:
        options = {"num_warps": own.pop("warps", self.warps)}
        if programs == 0:
            return
        with torch.cuda.device(self.e.device if self.e.is_cuda else -1):
            kernel((programs,), self.values | own, options)


def forward(chain: Chain, tags: Tensor | None, save: bool) -> tuple[Tensor, Tensor | None]:
    task = _Task(chain, tags)
    value = task.new(task.B)
    u = task.new(task.T, task.B, task.K) if save else None
    task.launch(FORWARD, task.B, u_ptr=u, value_ptr=value)
    return value, u


def backward(
    chain: Chain, tags: Tensor | None, u: Tensor, dvalue: Tensor, wants_parameters: bool
) -> tuple[Tensor, ...]:
    task = _Task(chain, tags)
    T, B, K = task.T, task.B, task.K
    de = task.new(T, B, K)
    programs = min(B, _PROGRAMS)
    counts = None
    if wants_parameters:
        counts = torch.zeros((programs, K, K), dtype=torch.float64, device=de.device)
    given = {"u_ptr": u.contiguous(), "dvalue_ptr": dvalue.contiguous(), "de_ptr": de}
    task.launch(BACKWARD, programs, **given, counts_ptr=counts, STEPS=_STEPS)
    if counts is None:
        return (de,)
    if T == 0:
        return de, *(torch.zeros_like(p) for p in chain[2:])
    ends = de[-1]
    if chain.lengths is not None:
        at = (chain.lengths - 1).clamp_min(0)[None, :, None].expand(1, B, K)
        ends = de.gather(0, at)[0]  # of a sequence of length 0 it is 0
    wide = torch.float64
    found = (de[0].sum(0, dtype=wide), ends.sum(0, dtype=wide), counts.sum(0))
    return de, *(total.to(de.dtype) for total in found)


def viterbi(chain: Chain, n: int) -> tuple[Tensor, Tensor]:
    task = _Task(chain, None)
    T, B, K = task.T, task.B, task.K
    scores = task.new(B, n).fill_(-torch.inf)
    scores[:, 0] = 0  # of a sequence of length 0
    paths = task.new(B, n, T, dtype=torch.int64)
    places = task.new(B, n, dtype=torch.int32)
    came = task.new(T, B, n, K, dtype=torch.int16 if n * K < 2**15 else torch.int32)
    given = {
        "score_ptr": scores,
        "place_ptr": places,
        "came_ptr": came,
        "N": n,
        "ONE": n == 1,
        "OFTEN": OFTEN,
    }
    task.launch(VITERBI, B if T else 0, **given, v_ptr=task.new(2, B, n, K))
    task.values["BLOCK"] = _PATHS
    task.launch(BACK, -(-B * n // _PATHS) if T else 0, **given, paths_ptr=paths, warps=1)
    return scores, paths
