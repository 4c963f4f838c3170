"""Decoding: sequences of tokens from a model that predicts the next one.

All functions take a callable ``step(tokens, state) -> (logits, state)``: tokens (N,) int64, logits
(N, V), which may be log-probabilities, and a state that is handed from step to step as it is. It is
a tensor, or any nest of tuples, lists and dicts of tensors; other values in it are passed on.
Gradients flow to the scores where autograd is on; ``torch.no_grad()`` saves their memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.checks import positive

#: (tokens (N,), state) -> (logits (N, V), state)
Step = Callable[[Tensor, Any], tuple[Tensor, Any]]


class Decoded(NamedTuple):
    """Tokens that were chosen.

    tokens: (B, L) int64, without the first token that was given; behind the end token it stands
    again. lengths: (B,) int64, how many tokens there are, the end token among them. scores: (B,),
    the log-probability of the tokens, and of :func:`beam_search` what it ranks by. The tensors of
    :func:`beam_search` have a dimension n_best behind the first, the best first.
    """

    tokens: Tensor
    lengths: Tensor
    scores: Tensor


def greedy(step: Step, start: Tensor, state: Any = None, *, end: int, max_length: int) -> Decoded:
    """The likeliest token at each step.

    Args:
        step: see above, called with N = B.
        start: (B,) int64, the token that each sequence begins with.
        state: the first one.
        end: the token that ends a sequence.
        max_length: how many tokens a sequence has at most.

    Raises:
        ValueError, TypeError: another shape or type, an ``end`` below 0, a ``max_length`` below 1.
    """
    end, max_length = _check(start, end, max_length)
    return _walk(step, start, state, end, max_length, lambda logits: logits.argmax(-1))


def sample(
    step: Step,
    start: Tensor,
    state: Any = None,
    *,
    end: int,
    max_length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Decoded:
    r"""Tokens drawn from :math:`\mathrm{softmax}(\mathrm{logits} / \tau)`.

    Args:
        step, start, state, end, max_length: as :func:`greedy`.
        temperature: tau > 0. The scores are those of temperature 1 and of all tokens.
        top_k: draw from the k likeliest tokens.
        top_p: draw from the smallest set of likeliest tokens whose probabilities, after
            ``temperature`` and ``top_k``, sum to at least p; 0 < p <= 1.
        generator: of the draws, on the device of the logits.

    Raises:
        ValueError, TypeError: as :func:`greedy`; a number out of its range.

    Source: top_p: Holtzman et al. 2020, The Curious Case of Neural Text Degeneration.
    """
    end, max_length = _check(start, end, max_length)
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(
            f"temperature: expected a finite number above 0, got {temperature}; greedy() is the "
            "limit at 0"
        )
    if top_k is not None:
        top_k = positive("top_k", top_k)
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number above 0 and at most 1, got {top_p}")

    def draw(logits: Tensor) -> Tensor:
        logits = logits.detach()
        # relative to the greatest, whose quotient cannot overflow
        least = torch.finfo(logits.dtype).tiny  # what is below is 0 in that type
        logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, least)
        if top_k is not None and top_k < logits.shape[-1]:
            kept = logits.topk(top_k, -1)
            logits = torch.full_like(logits, -math.inf).scatter(-1, kept.indices, kept.values)
        probabilities = logits.softmax(-1)
        if top_p is not None:
            probabilities = nucleus(probabilities, top_p)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    return _walk(step, start, state, end, max_length, draw)


def nucleus(probabilities: Tensor, p: float) -> Tensor:
    """``probabilities`` (N, V) with zeros for all but the smallest set of likeliest tokens whose
    sum is at least p."""
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = (before < p).index_fill(-1, torch.zeros(1, dtype=torch.int64, device=order.device), True)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)


def _walk(
    step: Step,
    start: Tensor,
    state: Any,
    end: int,
    max_length: int,
    choose: Callable[[Tensor], Tensor],
) -> Decoded:
    """One sequence for each of ``start``."""
    tokens, found = start, []
    B = start.shape[0]
    scores: Any = 0.0
    lengths = torch.zeros_like(start)
    going = torch.ones(B, dtype=torch.bool, device=start.device)
    for _ in range(max_length):
        logits, state = step(tokens, state)
        _check_logits(logits, B, end)
        chosen = choose(logits)
        logp = _log_softmax(logits).gather(-1, chosen.unsqueeze(-1)).squeeze(-1)
        scores = scores + torch.where(going, logp, 0.0)
        lengths = lengths + going
        tokens = torch.where(going, chosen, end)
        found.append(tokens)
        going = going & (tokens != end)
        if not bool(going.any()):
            break
    return Decoded(torch.stack(found, 1), lengths, scores)


def beam_search(
    step: Step,
    start: Tensor,
    state: Any = None,
    *,
    beam_size: int,
    end: int,
    max_length: int,
    length_penalty: float = 0.0,
    n_best: int = 1,
    batch_dim: Any = 0,
    reorder: Callable[[Any, Tensor], Any] | None = None,
) -> Decoded:
    r"""The best sequences that a beam finds, ranked by

    .. math::
        \frac{\log P(y)}{((5 + |y|) / 6)^\alpha}

    Each sentence has ``beam_size`` open hypotheses, the likeliest of their length, and a list of
    finished ones, the best so far, which stay finished. The search of a sentence ends when no open
    hypothesis can still enter the first ``n_best`` of its list, or at ``max_length``, where open
    hypotheses count as they are. A beam that holds all hypotheses of a length finds what a search
    of all sequences finds; places for which there is no hypothesis yet are empty.

    Args:
        step: see above, called with N = B * beam_size; the hypotheses of a sentence stand side by
            side. What it reads of each sentence besides the state must have so many rows, too:
            ``prepared.repeat(beam_size)`` for an :class:`fastseq.AttentionDecoder`.
        start, end, max_length: as :func:`greedy`.
        state: the first one, for a batch of B.
        beam_size: how many open hypotheses a sentence has.
        length_penalty: alpha >= 0; 0 ranks by the log-probability alone.
        n_best: how many sequences are returned, at most ``beam_size``. Where there are fewer, the
            others have length 0 and score -inf.
        batch_dim: which dimension of the state's tensors is the batch: 0 for the states of cells, 1
            for those of layers and of :func:`fastseq.streaming`; or a nest like the state's own, or
            the beginning of one, with None for what stays as it is, as torch.func.vmap's in_dims.
        reorder: instead of ``batch_dim``, a function (state, rows) -> state that takes rows (N,)
            int64 of the batch.

    Returns:
        tokens (B, n_best, L), lengths (B, n_best), scores (B, n_best), the best first.

    Raises:
        ValueError, TypeError: as :func:`greedy`; a size or number out of its range.

    Source: length normalisation: Wu et al. 2016, Google's Neural Machine Translation System.
    """
    end, max_length = _check(start, end, max_length)
    beam_size, n_best = positive("beam_size", beam_size), positive("n_best", n_best)
    if n_best > beam_size:
        raise ValueError(f"n_best: expected at most beam_size = {beam_size}, got {n_best}")
    if not (length_penalty >= 0 and math.isfinite(length_penalty)):
        raise ValueError(f"length_penalty: expected at least 0, got {length_penalty}")
    if reorder is None:

        def reorder(state: Any, rows: Tensor) -> Any:
            return take_rows(state, rows, batch_dim, count)

    B, K, device = start.shape[0], beam_size, start.device
    count = B  # of the state's rows
    first = torch.arange(B, device=device).unsqueeze(1) * K  # row of a sentence
    state = reorder(state, (first // K).expand(B, K).reshape(-1))
    count = B * K
    last = start.repeat_interleave(K)
    history = start.new_zeros((B, K, 0))
    pool: _Pool | None = None
    logp: Tensor | None = None
    for length in range(1, max_length + 1):
        logits, state = step(last, state)
        _check_logits(logits, B * K, end)
        V = logits.shape[-1]
        found = _log_softmax(logits).view(B, K, V)
        if logp is None or pool is None:  # one hypothesis, in the first place
            logp = found.new_full((B, K), -math.inf)
            logp[:, 0] = 0
            pool = _Pool.empty(B, K, max_length, end, logp)
        joint = (logp.unsqueeze(2) + found).view(B, K * V)
        # each hypothesis has one end, so that twice as many hold K that go on
        best, places = joint.topk(min(2 * K, K * V), -1)
        parents, tokens = places // V, places % V
        ended = tokens == end
        grown = torch.cat([_rows(history, parents), tokens.unsqueeze(2)], 2)
        penalty = _penalty(length, length_penalty)
        pool = pool.with_(grown, best.masked_fill(~ended, -math.inf) / penalty, length)
        logp, kept = best.masked_fill(ended, -math.inf).topk(min(K, best.shape[1]), -1)
        if kept.shape[1] < K:  # of a vocabulary of one token
            missing = K - kept.shape[1]
            kept = torch.nn.functional.pad(kept, (0, missing))
            logp = torch.nn.functional.pad(logp, (0, missing), value=-math.inf)
        history = _rows(grown, kept)
        if length == max_length:
            pool = pool.with_(history, logp / penalty, length)
            break
        # a log-probability only falls, and counts the less the longer its sequence gets
        hope = logp[:, 0] / _penalty(max_length, length_penalty)
        if bool((pool.scores[:, n_best - 1] >= hope).all()):
            break
        last = history[:, :, -1].reshape(-1)
        state = reorder(state, (first + parents.gather(1, kept)).reshape(-1))
    assert pool is not None
    lengths, scores = pool.lengths[:, :n_best], pool.scores[:, :n_best]
    tokens = pool.tokens[:, :n_best].masked_fill(lengths.unsqueeze(2) == 0, end)
    longest = int(lengths.max()) if lengths.numel() else 0
    return Decoded(tokens[:, :, :longest], lengths, scores)


class _Pool(NamedTuple):
    """The best finished hypotheses of each sentence, the best first."""

    tokens: Tensor  # (B, K, max_length), filled up with the end token
    lengths: Tensor  # (B, K)
    scores: Tensor  # (B, K); -inf: there is none
    end: int

    @staticmethod
    def empty(B: int, K: int, max_length: int, end: int, like: Tensor) -> _Pool:
        tokens = torch.full((B, K, max_length), end, dtype=torch.int64, device=like.device)
        return _Pool(tokens, tokens.new_zeros((B, K)), like.new_full((B, K), -math.inf), end)

    def with_(self, tokens: Tensor, scores: Tensor, length: int) -> _Pool:
        """The best of these and of others (B, n, length), which score -inf where there is none."""
        K, filled = self.scores.shape[1], self.tokens.shape[2] - length
        tokens = torch.nn.functional.pad(tokens, (0, filled), value=self.end)
        lengths = torch.full_like(scores, length, dtype=torch.int64)
        lengths = lengths.masked_fill(scores == -math.inf, 0)
        best, places = torch.cat([self.scores, scores], 1).topk(K, -1)
        return _Pool(
            _rows(torch.cat([self.tokens, tokens], 1), places),
            torch.cat([self.lengths, lengths], 1).gather(1, places),
            best,
            self.end,
        )


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x (B, n, L) at places (B, m): (B, m, L)."""
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))


def _penalty(length: int, alpha: float) -> float:
    return ((5 + length) / 6) ** alpha


def take_rows(state: Any, rows: Tensor, batch_dim: Any, count: int) -> Any:
    """A state with the ``rows`` (N,) of its batch of ``count``; ``batch_dim`` as
    :func:`beam_search` says."""
    if isinstance(state, Tensor):
        if batch_dim is None:
            return state
        if isinstance(batch_dim, bool) or not isinstance(batch_dim, int):
            raise ValueError(f"batch_dim: expected an int or None for a tensor, got {batch_dim!r}")
        if not -state.dim() <= batch_dim < state.dim():
            raise ValueError(
                f"batch_dim: expected a dimension of a tensor of shape {tuple(state.shape)}, got "
                f"{batch_dim}"
            )
        if state.shape[batch_dim] != count:
            raise ValueError(
                f"state: expected a batch of {count} in dimension {batch_dim}, got a tensor of "
                f"shape {tuple(state.shape)}; batch_dim= says which dimension is the batch, 1 in "
                "the states of layers"
            )
        return state.index_select(batch_dim, rows.to(state.device))
    if isinstance(state, dict):
        dims = batch_dim if isinstance(batch_dim, dict) else dict.fromkeys(state, batch_dim)
        if dims.keys() != state.keys():
            raise ValueError(f"batch_dim: expected the keys {[*state]}, got {[*dims]}")
        return type(state)({k: take_rows(v, rows, dims[k], count) for k, v in state.items()})
    if isinstance(state, (tuple, list)):
        nested = isinstance(batch_dim, (tuple, list))
        each = batch_dim if nested else (batch_dim,) * len(state)
        if len(each) != len(state):
            raise ValueError(f"batch_dim: expected {len(state)} entries, got {len(each)}")
        parts = [take_rows(part, rows, dim, count) for part, dim in zip(state, each, strict=True)]
        return type(state)(*parts) if hasattr(state, "_fields") else type(state)(parts)
    return state


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.log_softmax(logits, -1, dtype=wide)


def _check(start: Any, end: Any, max_length: Any) -> tuple[int, int]:
    if not isinstance(start, Tensor) or start.dtype is not torch.int64 or start.dim() != 1:
        got = f"{start.dtype} {tuple(start.shape)}" if isinstance(start, Tensor) else repr(start)
        raise TypeError(f"start: expected an int64 tensor (B,), got {got}")
    return positive("end", end, 0), positive("max_length", max_length)


def _check_logits(logits: Any, N: int, end: int) -> None:
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[0] != N:
        raise ValueError(f"step: expected it to return logits (N, V) with N = {N}, got {shape}")
    if end >= logits.shape[1]:
        raise ValueError(f"end: expected one of {logits.shape[1]} tokens, got {end}")
