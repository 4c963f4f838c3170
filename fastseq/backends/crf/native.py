"""Fused loops over time for the CPU in C++, from ``csrc/cpu/chains.h`` and ``viterbi.h``.

What ``forward`` saves is not u but the numbers that :func:`backward` reads: ``chains.h`` says which.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..native import _cpu, unavailable
from . import Chain

__all__ = ["CHECKS_TAGS", "backward", "forward", "supports", "unavailable", "viterbi"]

#: Tags and lengths are checked where they are read.
CHECKS_TAGS = True


def supports(dtype: torch.dtype, device: str, K: int) -> str | None:
    if device != "cpu":
        return f"native runs on the CPU alone, not on {device}"
    if dtype not in (torch.float32, torch.float64):
        return f"native computes in float32 and float64, not in {dtype}"
    return None


def _run(function: Any, chain: Chain, *others: Any) -> Any:
    """Call the extension; where it declines the layout, with copies."""
    threads = torch.get_num_threads()
    found = function(*chain, *others, threads)
    if found is None:
        copied = [t.contiguous() if isinstance(t, Tensor) else t for t in (*chain, *others)]
        found = function(*copied, threads)
    if found is None:
        given = [tuple(t.shape) if isinstance(t, Tensor) else t for t in (*chain, *others)]
        raise RuntimeError(f"chain: its sizes or types do not fit together: {given}")
    return found


def forward(chain: Chain, tags: Tensor | None, save: bool) -> tuple[Tensor, Tensor | None]:
    return _run(_cpu.crf, chain, tags, save)


def backward(
    chain: Chain,
    tags: Tensor | None,
    u: Tensor,
    dvalue: Tensor,
    wants_parameters: bool,
) -> tuple[Tensor, ...]:
    return tuple(_run(_cpu.crf_backward, chain, tags, u, dvalue, wants_parameters))


def viterbi(chain: Chain, n: int) -> tuple[Tensor, Tensor]:
    return _run(_cpu.crf_viterbi, chain, n)
