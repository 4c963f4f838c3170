"""Chains in torch operations, step by step: every device, and every transform of torch's.

Autograd sees through :func:`forward`, so derivatives of every order come from here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import Chain


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
    return (log_z if tags is None else score(chain, tags) - log_z), None


def log_partition(chain: Chain) -> Tensor:
    """log Z, (B,)."""
    emissions, within = chain.emissions, alive(chain)
    if emissions.shape[0] == 0:
        return emissions.sum((0, 2))
    if within is not None:  # what is beyond a length may be NaN, whose zero gradient is NaN too
        emissions = emissions.masked_fill(~within[..., None], 0)
    u = chain.start + emissions[0]
    for t in range(1, len(emissions)):
        after = emissions[t] + _log_sum_exp(u[:, :, None] + chain.transitions, 1)
        u = after if within is None else torch.where(within[t, :, None], after, u)
    log_z = _log_sum_exp(u + chain.end, 1)
    return log_z if within is None else torch.where(within[0], log_z, 0)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """As torch.logsumexp, whose gradient is NaN where all terms are -inf. Here it is 0."""
    top = x.detach().amax(dim, keepdim=True)
    top = torch.where(top == -torch.inf, 0, top)
    total = (x - top).exp().sum(dim)
    none = total == 0
    logarithm = torch.where(none, 1, total).log() + top.squeeze(dim)
    return torch.where(none, -torch.inf, logarithm)


def score(chain: Chain, tags: Tensor) -> Tensor:
    """Of the path ``tags`` (T, B): (B,)."""
    emissions, within = chain.emissions, alive(chain)
    if emissions.shape[0] == 0:
        return emissions.sum((0, 2))
    if within is not None:
        tags = torch.where(within, tags, 0)
    steps = emissions.gather(2, tags[..., None])[..., 0]
    moves = chain.transitions[tags[:-1], tags[1:]]
    last = tags[-1]
    if chain.lengths is not None and within is not None:
        steps, moves = torch.where(within, steps, 0), torch.where(within[1:], moves, 0)
        last = tags.gather(0, (chain.lengths - 1).clamp_min(0)[None])[0]
    total = chain.start[tags[0]] + steps.sum(0) + moves.sum(0) + chain.end[last]
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
        if within is not None:
            paths.masked_fill_(~within.t()[:, None], -1)
            empty = ~within[0]
    if empty is not None:
        best[empty] = -torch.inf
        best[empty, :1] = 0
    return best, paths.masked_fill_((best == -torch.inf)[..., None], -1)


def _largest(values: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n largest along dim 1, and where they stand, in one order on every device."""
    if n == 1:
        return values.max(1, keepdim=True)
    found = values.sort(dim=1, descending=True, stable=True)
    return found.values[:, :n], found.indices[:, :n]
