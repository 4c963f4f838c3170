"""Chains in torch operations, step by step: every device, and every transform of torch's.

Autograd sees through :func:`forward`, so derivatives of every order come from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import OFTEN, Chain


def unavailable() -> str | None:
    return None


def supports(dtype: torch.dtype, device: str, K: int) -> str | None:
    return None


def alive(chain: Chain) -> Tensor | None:
    """(T, B): whether a step is within its sequence; None where all are."""
    if chain.lengths is None:
        return None
    steps = torch.arange(chain.emissions.shape[0], device=chain.emissions.device)
    return steps[:, None] < chain.lengths


def forward(chain: Chain, tags: Tensor | None, save: bool) -> tuple[Tensor, None]:
    log_z = log_partition(chain)
    value = log_z if tags is None else score(chain, tags[..., None])[:, 0] - log_z
    return value.to(chain.emissions.dtype), None


def wide(device: torch.device) -> torch.dtype:
    """The type of totals over time."""
    return torch.float32 if device.type == "mps" else torch.float64


def log_partition(chain: Chain) -> Tensor:
    """log Z, (B,), in the type of totals."""
    emissions, within = chain.emissions, alive(chain)
    dtype = wide(emissions.device)
    if emissions.shape[0] == 0:
        return emissions.sum((0, 2), dtype=dtype)
    if within is not None:  # what is beyond a length may be NaN, whose zero gradient is NaN too
        emissions = emissions.masked_fill(~within[..., None], 0)
    u = chain.start + emissions[0]
    total = emissions.new_zeros(emissions.shape[1], dtype=dtype)
    for t in range(1, len(emissions)):
        if t % OFTEN == 0:
            top = _finite(u.detach().amax(1))
            u, total = u - top[:, None], total + top
        after = emissions[t] + _log_sum_exp(u[:, :, None] + chain.transitions, 1)
        u = after if within is None else torch.where(within[t, :, None], after, u)
    log_z = total + _log_sum_exp(u + chain.end, 1)
    return log_z if within is None else torch.where(within[0], log_z, 0)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """As torch.logsumexp, whose gradient is NaN where all terms are -inf. Here it is 0."""
    top = _finite(x.detach().amax(dim, keepdim=True))
    total = (x - top).exp().sum(dim)
    none = total == 0
    logarithm = torch.where(none, 1, total).log() + top.squeeze(dim)
    return torch.where(none, -torch.inf, logarithm)


def _finite(top: Tensor) -> Tensor:
    """0 in place of -inf, which nothing is taken from."""
    return torch.where(top == -torch.inf, 0, top)


def score(chain: Chain, tags: Tensor) -> Tensor:
    """Of n paths ``tags`` (T, B, n) a sequence: (B, n), in the type of totals."""
    emissions, within = chain.emissions, alive(chain)
    dtype = wide(emissions.device)
    if emissions.shape[0] == 0:
        return emissions.new_zeros(tags.shape[1:], dtype=dtype)
    if within is not None:
        within = within[..., None]
        tags = torch.where(within, tags, 0)
    steps = emissions.gather(2, tags)
    moves = chain.transitions[tags[:-1], tags[1:]]
    last = tags[-1]
    if chain.lengths is not None and within is not None:
        steps, moves = torch.where(within, steps, 0), torch.where(within[1:], moves, 0)
        ends = (chain.lengths - 1).clamp_min(0)[None, :, None].expand(1, *tags.shape[1:])
        last = tags.gather(0, ends)[0]
    ends = chain.start[tags[0]].to(dtype) + chain.end[last]
    total = ends + steps.sum(0, dtype=dtype) + moves.sum(0, dtype=dtype)
    return total if within is None else torch.where(within[0], total, 0)


def viterbi(chain: Chain, n: int) -> tuple[Tensor, Tensor]:
    emissions, within = chain.emissions, alive(chain)
    T, B, K = emissions.shape
    device = emissions.device
    best = emissions.new_full((B, n), -torch.inf)
    paths = torch.full((B, n, T), -1, device=device)
    empty = torch.ones(B, dtype=torch.bool, device=device) if T == 0 else None
    if T:
        # v (B, K * n): the n best paths that end in tag j, at j * n and after it
        v = emissions.new_full((B, K, n), -torch.inf)
        v[:, :, 0] = chain.start + emissions[0]
        v = v.reshape(B, K * n)
        moves = chain.transitions.repeat_interleave(n, 0)  # (K * n, K)
        stays = torch.arange(K * n, device=device).expand(B, K * n)
        came_from = []
        for t in range(1, T):
            if t % OFTEN == 0:
                v = v - _finite(v.amax(1, keepdim=True))
            candidates = v[:, :, None] + moves
            values, places = _largest(candidates, n)  # (B, n, K)
            after = (values + emissions[t][:, None]).transpose(1, 2).reshape(B, K * n)
            places = places.transpose(1, 2).reshape(B, K * n)
            if within is not None:
                after = torch.where(within[t, :, None], after, v)
                places = torch.where(within[t, :, None], places, stays)
            v = after
            came_from.append(places)
        best, place = _largest(v + chain.end.repeat_interleave(n), n)
        paths[:, :, -1] = place // n
        for t in range(T - 2, -1, -1):
            place = came_from[t].gather(1, place)
            paths[:, :, t] = place // n
        odd = best[:, :1].isnan()
        best[:, 1:].masked_fill_(odd, -torch.inf)
        paths[:, 0].masked_fill_(odd, 0)
        if within is not None:
            paths.masked_fill_(~within.t()[:, None], -1)
            empty = ~within[0]
        total = score(chain, paths.permute(2, 0, 1).clamp_min(0)).to(best.dtype)
        best = torch.where(best.isfinite(), total, best)
    if empty is not None:
        best.masked_fill_(empty[:, None], -torch.inf)
        best[:, :1].masked_fill_(empty[:, None], 0)
    return best, paths.masked_fill_((best == -torch.inf)[..., None], -1)


def _largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest along dim 1, and where they stand, in one order on every device."""
    if n == 1:
        return values.max(1, keepdim=True)
    found = values.sort(dim=1, descending=True, stable=True)
    return found.values[:, :n], found.indices[:, :n]
