"""Chains by fused loops over time for the CPU, compiled by Numba: :mod:`.numba_loops`.

Totals over time and gradients of parameters are added up in double. The bits do not depend on the
number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import openmp
from ..numba_products import NUMPY, Room
from ..numba_simd import simd
from ..numba_threads import run
from . import Chain
from .numba_loops import FLUSH, ROWS, backward_loop, forward_loop, kernel, viterbi_loop

#: Tags are checked where they are read.
CHECKS_TAGS = True
#: A sum over pairs of tags at so many steps takes a core 80 us: less is not worth waking a thread.
_SHARE = 3_000_000
#: Parts of a batch, each with gradients of the parameters of its own, which take so many numbers.
_PARTS, _NUMBERS = 64, 2**21


def unavailable() -> str | None:
    return None


def supports(dtype: torch.dtype, device: str, K: int) -> str | None:
    return None if device == "cpu" else f"numba's kernels run on the CPU, not on {device}"


class _Task:
    """A call, as the kernels take it."""

    def __init__(self, chain: Chain, tags: Tensor | None) -> None:
        e = chain.emissions
        self.T, self.B, self.K = e.shape
        self.dtype = NUMPY[e.dtype]
        lanes = simd(self.dtype).LANES
        self.W = -(-self.K // lanes) * lanes
        self.e = e if e.stride(2) == 1 or self.K == 1 else e.contiguous()
        self.start, self.end = chain.start.contiguous(), chain.end.contiguous()
        self.moves, self.tags = chain.transitions, tags
        if chain.lengths is None:
            self.lengths = np.full(self.B, self.T)
            self.order = np.arange(self.B)
        else:
            lengths = chain.lengths.numpy()
            self.order = np.argsort(-lengths, kind="stable")
            self.lengths = lengths[self.order]
            if self.B and not 0 <= self.lengths[-1] <= self.lengths[0] <= self.T:
                low, high = self.lengths[-1], self.lengths[0]
                raise ValueError(f"lengths: expected 0 to T = {self.T}, got {low} to {high}")
        work = self.T * self.B * self.K * (self.K + 60)
        most = max(1, work // _SHARE)
        self.threads = min(torch.get_num_threads(), openmp.cores(), most)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.e.dtype, device="cpu")

    def run(self, text: Any, tasks: int, size: int, *own: int) -> None:
        """Tasks of a kernel, in rooms of ``size`` numbers; own: the arguments that are its own."""
        threads = min(self.threads, tasks)
        size = -(-size // 16) * 16
        room = Room(threads * size, self.e.dtype)
        tags, e = self.tags, self.e
        data = np.array(
            [
                *(0, tasks, 0),  # taken; threads that came
                *(self.T, self.B, self.K, self.W),
                *(self.order.ctypes.data, self.lengths.ctypes.data),
                *(e.data_ptr(), *e.stride()[:2]),
                *(self.moves.data_ptr(), *self.moves.stride()),
                *(self.start.data_ptr(), self.end.data_ptr()),
                *((0, 0, 0) if tags is None else (tags.data_ptr(), *tags.stride())),
                *(room.address, size * self.e.element_size(), *own),
            ],
            np.int64,
        )
        loop = kernel(text, self.dtype)
        run(loop.call, loop.address, data.ctypes.data, threads)


def forward(chain: Chain, tags: Tensor | None, save: bool) -> tuple[Tensor, Tensor | None]:
    task = _Task(chain, tags)
    T, B, K = task.T, task.B, task.K
    value = task.new(B)
    u = task.new(T, B, K) if save else None
    if B:
        faults = np.zeros(-(-B // ROWS), np.int64)
        size = (3 * K + 4 + 4 * ROWS) * task.W + 64
        u_ptr = 0 if u is None else u.data_ptr()
        task.run(forward_loop, len(faults), size, u_ptr, value.data_ptr(), faults.ctypes.data)
        if tags is not None and faults.any():
            t, b = divmod(int(faults[faults > 0].min()) - 1, B)
            tag = int(tags[t, b])
            raise IndexError(f"tags: expected 0 to {K - 1}, got {tag} at step {t} of sequence {b}")
    return value, u


def backward(
    chain: Chain, tags: Tensor | None, u: Tensor, dvalue: Tensor, wants_parameters: bool
) -> tuple[Tensor, ...]:
    task = _Task(chain, tags)
    T, B, K, W = task.T, task.B, task.K, task.W
    de, dvalue, u = task.new(T, B, K), dvalue.contiguous(), u.contiguous()
    groups = -(-B // ROWS)
    parts = min(groups, max(8, min(_PARTS, _NUMBERS // (K * W))))
    wanted = torch.zeros((parts, K + 2, W), dtype=torch.float64) if wants_parameters else None
    size = (3 * K + 4 + 4 * ROWS + 2 * FLUSH + K + 8) * W
    if B and T:
        address = 0 if wanted is None else wanted.data_ptr()
        own = (u.data_ptr(), dvalue.data_ptr(), de.data_ptr(), address)
        task.run(backward_loop, parts, size, *own)
    if wanted is None:
        return (de,)
    total = wanted.sum(0)[:, :K].to(de.dtype)
    return de, total[K].clone(), total[K + 1].clone(), total[:K].clone()


def viterbi(chain: Chain, n: int) -> tuple[Tensor, Tensor]:
    task = _Task(chain, None)
    T, B, K, W = task.T, task.B, task.K, task.W
    if chain.lengths is not None:
        task.lengths = chain.lengths.contiguous().numpy()
    scores = task.new(B, n)
    paths = torch.empty((B, n, T), dtype=torch.int64, device="cpu")
    if B:
        size = (2 * K + 2 + n + T * n) * W + n * K * simd(task.dtype).LANES + T
        task.run(viterbi_loop, B, size, scores.data_ptr(), paths.data_ptr(), n)
    return scores, paths
