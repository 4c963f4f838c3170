"""Random chains for the tests of conditional random fields, and the truth from every path."""

import itertools

import torch

from fastseq.backends.crf import Chain, eager


def draw(T, B, K, seed=0, lengths=True, forbidden=0.0, scale=1.0, dtype=torch.float64):
    """A chain and tags. Lengths from 0 to T; what is beyond them is NaN, and its tags are -100."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return scale * torch.randn(*shape, generator=g, dtype=torch.float64)

    e, start, end, transitions = normal(T, B, K), normal(K), normal(K), normal(K, K)
    transitions[torch.rand(K, K, generator=g) < forbidden] = -torch.inf
    tags = torch.randint(K, (T, B), generator=g)
    n = None
    if lengths:
        n = torch.randint(T + 1, (B,), generator=g)
        n[: min(B, 2)] = torch.tensor([T, 0])[: min(B, 2)]
        beyond = torch.arange(T)[:, None] >= n
        e[beyond] = torch.nan
        tags[beyond] = -100
    return Chain(e.to(dtype), n, *(p.to(dtype) for p in (start, end, transitions))), tags


def lengths_of(chain):
    T, B, _ = chain.emissions.shape
    return [T] * B if chain.lengths is None else chain.lengths.tolist()


def score_of(chain, b, path):
    """As the paper writes it, differentiable, a number after another."""
    if not path:
        return chain.start.new_zeros(())
    total = chain.start[path[0]] + chain.end[path[-1]]
    for t, tag in enumerate(path):
        total = total + chain.emissions[t, b, tag]
    for before, after in itertools.pairwise(path):
        total = total + chain.transitions[before, after]
    return total


def every_path(chain):
    """For each sequence [(path, score)] of all paths."""
    K = chain.emissions.shape[2]
    return [
        [(path, score_of(chain, b, path)) for path in itertools.product(range(K), repeat=n)]
        for b, n in enumerate(lengths_of(chain))
    ]


def brute(chain, tags=None):
    """log Z, or score(tags) - log Z: (B,), from every path, differentiable."""
    values = []
    for b, paths in enumerate(every_path(chain)):
        value = torch.stack([score for _, score in paths]).logsumexp(0)
        if tags is not None:
            value = score_of(chain, b, tags[: lengths_of(chain)[b], b].tolist()) - value
        values.append(value if lengths_of(chain)[b] else 0 * chain.start[0])
    return torch.stack(values) if values else chain.start.new_zeros(0)


def gradients(room, chain, tags, dvalue):
    """Those of emissions, start, end and transitions."""
    if room is not eager:
        _, u = room.forward(chain, tags, True)
        return room.backward(chain, tags, u, dvalue, True)
    leaves = [t.clone().requires_grad_() for t in (chain.emissions, *chain[2:])]
    value, _ = room.forward(Chain(leaves[0], chain.lengths, *leaves[1:]), tags, True)
    found = torch.autograd.grad(value, leaves, dvalue, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]
