"""End-to-end memory networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import masked_softmax
from ..ops.bag import Words, bag
from ..ops.checks import check_lengths, is_integral, positive

Tying = Literal["adjacent", "layer_wise"]


class MemoryHops(nn.Module):
    r"""An end-to-end memory network: a question that looks into a list of sentences several times.

    A sentence or question of J words is a bag of embeddings, with ``position_encoding``

    .. math::
        \mathrm{bag}_A(x)_k = \sum_j l_{kj} A_{x_j k}, \qquad
        l_{kj} = (1 - j / J) - (k / d) (1 - 2 j / J)

    and l = 1 without. From u = bag_B(question), hop k = 1, 2, ... is

    .. math::
        m_i = \mathrm{bag}_{A^k}(x_i) + T_A^k(i), \quad
        n_i = \mathrm{bag}_{C^k}(x_i) + T_C^k(i), \quad
        p = \mathrm{softmax}(u^\top m), \quad
        o = \sum_i p_i n_i

    with T only with ``temporal_encoding``, i the distance to the last sentence. Adjacent tying: u
    becomes u + o, A of a hop is C of the one before, B = A^1, and the logits are C^K u. Layer-wise
    tying, as of a recurrent network: u becomes H u + o, all hops share A, C and H, and the logits
    are W u.

    Since l is a sum of two products, (1 - k/d) 1 + (2k/d - 1) (j/J), so is a bag: two weighted sums
    of rows of the table, with no tensor of all words.

    Parameters begin as normal numbers of deviation 0.1: ``tables`` (K + 1, N, d) and ``times``
    (K + 1, M, d); of layer-wise tying A and C are in (2, ...), and there are ``table_question``
    (N, d), ``weight_hop`` (d, d) and ``weight_answer`` (N, d) besides.

    Args:
        vocabulary_size: N.
        embedding_size: d.
        hops: K.
        memory_size: M, how many sentences there are at most, for ``temporal_encoding``.
        tying: 'adjacent' or 'layer_wise'.
        position_encoding, temporal_encoding: see above.
        linear_start: whether the softmax of the hops is left out, as in the first epochs of
            training. The attribute of this name may be set at any time.
        padding_idx: the token that stands for no word, or None.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1, an unknown tying, a padding_idx outside of the vocabulary.

    Source: Sukhbaatar, Szlam, Weston and Fergus 2015, End-To-End Memory Networks.
    """

    def __init__(
        self,
        vocabulary_size: int,
        embedding_size: int,
        hops: int = 3,
        memory_size: int = 50,
        *,
        tying: Tying = "adjacent",
        position_encoding: bool = True,
        temporal_encoding: bool = True,
        linear_start: bool = False,
        padding_idx: int | None = 0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        vocabulary_size = positive("vocabulary_size", vocabulary_size)
        embedding_size = positive("embedding_size", embedding_size)
        hops, memory_size = positive("hops", hops), positive("memory_size", memory_size)
        if tying not in ("adjacent", "layer_wise"):
            raise ValueError(f"tying: expected 'adjacent' or 'layer_wise', got {tying!r}")
        if padding_idx is not None and not 0 <= padding_idx < vocabulary_size:
            raise ValueError(
                f"padding_idx: expected one of {vocabulary_size} tokens or None, got {padding_idx}"
            )
        self.vocabulary_size, self.embedding_size = vocabulary_size, embedding_size
        self.hops, self.memory_size, self.tying = hops, memory_size, tying
        self.position_encoding, self.temporal_encoding = position_encoding, temporal_encoding
        self.linear_start, self.padding_idx = linear_start, padding_idx

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        N, d, count = vocabulary_size, embedding_size, hops + 1 if tying == "adjacent" else 2
        self.tables = parameter(count, N, d)
        self.times = parameter(count, memory_size, d) if temporal_encoding else None
        layer_wise = tying == "layer_wise"
        self.table_question = parameter(N, d) if layer_wise else None
        self.weight_hop = parameter(d, d) if layer_wise else None
        self.weight_answer = parameter(N, d) if layer_wise else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.1)

    def extra_repr(self) -> str:
        shown = (
            f"{self.vocabulary_size}, {self.embedding_size}, hops={self.hops}, "
            f"memory_size={self.memory_size}, tying={self.tying!r}"
        )
        for name in ("position_encoding", "temporal_encoding"):
            shown += "" if getattr(self, name) else f", {name}=False"
        if self.linear_start:
            shown += ", linear_start=True"
        return shown if self.padding_idx == 0 else f"{shown}, padding_idx={self.padding_idx}"

    def forward(
        self,
        sentences: Tensor,
        question: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logits of the answers.

        Args:
            sentences: (B, M', W) integers, the last one the latest; M' at most ``memory_size`` with
                ``temporal_encoding``. Words may be ``padding_idx`` anywhere.
            question: (B, W') integers.
            lengths: (B,) from 0 to M', how many sentences there are; all if None.

        Returns:
            logits (B, N), and the weights p of each hop (K, B, M'), zero behind ``lengths``.

        Raises:
            ValueError: another shape, a length above M'. TypeError: what are no integers.
        """
        features, weights = self.features(sentences, question, lengths)
        answer: Any = self.tables[-1] if self.weight_answer is None else self.weight_answer
        return F.linear(features, answer), weights

    def features(
        self,
        sentences: Tensor,
        question: Tensor,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """u after the last hop (B, d), before it meets the table of answers, and the weights."""
        _check_tokens("sentences", sentences, "(B, M, W)", 3)
        _check_tokens("question", question, "(B, W)", 2)
        B, M, W = sentences.shape
        if question.shape[0] != B:
            raise ValueError(
                f"question: expected the batch of the sentences, {B}, got {question.shape[0]}"
            )
        if self.times is not None and M > self.memory_size:
            raise ValueError(
                f"sentences: expected at most memory_size = {self.memory_size}, got {M}; give the "
                f"latest: sentences[:, -{self.memory_size}:]"
            )
        ends = check_lengths(lengths, M, B, packed=False, batched=True)
        place = torch.arange(M, device=sentences.device)
        seen = distance = None
        if ends is not None:
            ends = ends.to(sentences.device).unsqueeze(1)
            seen = place < ends
            distance = (ends - 1 - place).clamp(min=0)

        asked = Words(question, self.vocabulary_size)
        first: Any = self.tables[0] if self.table_question is None else self.table_question
        u = self._bags(asked, self._parts(question, first), first)
        words = Words(sentences.reshape(B * M, W), self.vocabulary_size)
        parts = self._parts(words.tokens, self.tables)
        memories = [
            self._bags(words, parts, table).view(B, M, self.embedding_size)
            for table in self.tables.unbind()
        ]
        if self.times is not None:
            times = self.times.unbind()
            at = torch.flip(place, (0,)) if distance is None else distance
            memories = [m + F.embedding(at, t) for m, t in zip(memories, times, strict=True)]
        weights = []
        for hop in range(self.hops):
            asks, gives = memories[hop : hop + 2] if self.tying == "adjacent" else memories
            p = (asks @ u.unsqueeze(2)).squeeze(2)
            if not self.linear_start:
                p = masked_softmax(p, seen)
            elif seen is not None:
                p = p.masked_fill(~seen, 0.0)
            o = (p.unsqueeze(1).to(gives.dtype) @ gives).squeeze(1)
            hopped: Any = self.weight_hop
            u = o + (u if hopped is None else F.linear(u, hopped))
            weights.append(p)
        return u, torch.stack(weights)

    def _parts(self, tokens: Tensor, like: Tensor) -> tuple[Tensor, ...]:
        """For each word (N, W) 1 and j/J, or zeros for padding."""
        ones = torch.ones_like(tokens) if self.padding_idx is None else tokens != self.padding_idx
        there = ones.to(like.dtype)
        if not self.position_encoding:
            return (there,)
        place = torch.cumsum(there, 1)
        return there, there * place / place[:, -1:].clamp(min=1)

    def _bags(self, words: Words, parts: tuple[Tensor, ...], table: Tensor) -> Tensor:
        """(N, d)"""
        if len(parts) == 1:
            return bag(words, table, parts[0])
        d = self.embedding_size
        share = torch.arange(1, d + 1, device=table.device).to(table.dtype) / d
        return bag(words, table, parts[0]) * (1 - share) + bag(words, table, parts[1]) * (
            2 * share - 1
        )


def _check_tokens(name: str, tokens: Any, shape: str, rank: int) -> None:
    if not isinstance(tokens, Tensor) or not is_integral(tokens):
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"{name}: expected integers {shape}, got {got}")
    if tokens.dim() != rank:
        raise ValueError(f"{name}: expected {shape}, got {tuple(tokens.shape)}")
