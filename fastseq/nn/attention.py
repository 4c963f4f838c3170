"""Attention over a sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.attention import attend, seen_of
from ..ops.checks import check_lengths, positive

Score = Literal["additive", "dot", "general", "scaled_dot"]
SCORES = ("additive", "dot", "general", "scaled_dot")


class PreparedKeys(NamedTuple):
    """Keys that :meth:`Attention.prepare` has projected, for any number of calls.

    keys: (B, S, A), projected. values: (B, S, V). mask: (B, S) bool, true where there is a key; or
    None for all.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor | None

    def repeat(self, n: int) -> PreparedKeys:
        """The same with each sequence n times in a row, as the rows of a beam search stand."""
        keys = self.keys.repeat_interleave(n, 0)
        values = keys if self.values is self.keys else self.values.repeat_interleave(n, 0)
        return PreparedKeys(
            keys, values, None if self.mask is None else self.mask.repeat_interleave(n, 0)
        )


class Attention(nn.Module):
    r"""Attention of queries over the keys of a sequence.

    .. math::
        \alpha_{us} = \mathrm{softmax}_s(e(q_u, k_s)), \qquad c_u = \sum_s \alpha_{us} v_s

    =============  ==================================  ==========================================
    ``score``      :math:`e(q, k)`                     parameters
    =============  ==================================  ==========================================
    'additive'     :math:`v^\top \tanh(W q + U k)`     ``weight_query`` W (A, Q), ``weight_key``
                                                       U (A, K), ``weight_score`` v (A,)
    'dot'          :math:`q^\top k`                    none
    'general'      :math:`q^\top W k`                  ``weight_key`` W (Q, K)
    'scaled_dot'   :math:`q^\top k / \sqrt{K}`         none
    =============  ==================================  ==========================================

    Parameters begin in U(-1/sqrt(n), 1/sqrt(n)) with n their last size.

    Args:
        query_size: Q.
        key_size: K; of the two dot products the same as Q.
        score: which.
        attention_size: A, of 'additive' alone; Q if None.
        batch_first: whether queries, keys, values and what is returned have the batch first.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size below 1, an unknown score, sizes that do not go together. TypeError: a
            size that is no integer.

    Source: additive: Bahdanau, Cho and Bengio 2015; dot, general: Luong, Pham and Manning 2015;
    scaled_dot: Vaswani et al. 2017.
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        score: Score = "additive",
        attention_size: int | None = None,
        *,
        batch_first: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if score not in SCORES:
            raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
        if attention_size is not None and score != "additive":
            raise ValueError(
                f"attention_size: only the additive score has one; {score!r} has none: leave it out"
            )
        query_size = positive("query_size", query_size)
        key_size = positive("key_size", key_size)
        if attention_size is not None:
            attention_size = positive("attention_size", attention_size)
        if "dot" in score and query_size != key_size:
            raise ValueError(
                f"key_size: expected query_size = {query_size}, since score={score!r} multiplies "
                f"the two, got {key_size}; score='general' takes any"
            )
        self.query_size, self.key_size, self.score = query_size, key_size, score
        self.batch_first = batch_first
        self.attention_size = (attention_size or query_size) if score == "additive" else query_size
        A = self.attention_size
        shapes: dict[str, tuple[int, ...]] = {}
        if score == "additive":
            shapes |= {"weight_query": (A, query_size), "weight_key": (A, key_size)}
            shapes["weight_score"] = (A,)
        elif score == "general":
            shapes["weight_key"] = A, key_size
        for name in ("weight_query", "weight_key", "weight_score"):
            made = None
            if name in shapes:
                made = nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype))
            self.register_parameter(name, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            bound = 1 / math.sqrt(parameter.shape[-1])
            nn.init.uniform_(parameter, -bound, bound)

    def extra_repr(self) -> str:
        shown = f"{self.query_size}, {self.key_size}, score={self.score!r}"
        if self.score == "additive" and self.attention_size != self.query_size:
            shown += f", attention_size={self.attention_size}"
        return shown + (", batch_first=True" if self.batch_first else "")

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.key_size) if self.score == "scaled_dot" else 1.0

    def prepare(
        self,
        keys: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
    ) -> PreparedKeys:
        """Project the keys once, for many calls.

        Args:
            keys: (S, B, K), (B, S, K) with ``batch_first``.
            values: (S, B, V), (B, S, V) with ``batch_first``; the keys if None.
            lengths: (B,) integers from 0 to S, how many keys there are; all if None.
            mask: (B, S) bool, true where there is a key, instead of ``lengths``. The numbers behind
                a length, or where the mask is false, count for nothing and may be anything.

        Raises:
            ValueError: another shape, a length above S, both ``lengths`` and ``mask``.
            TypeError: lengths that are no integers, a mask that is not of bool.
        """
        self._check_sequence("keys", keys, self.key_size)
        if values is not None:
            self._check_sequence("values", values, None)
            if values.shape[:2] != keys.shape[:2]:
                raise ValueError(
                    f"values: expected one for each key, {tuple(keys.shape[:2])}, got "
                    f"{tuple(values.shape[:2])}"
                )
        S, B = keys.shape[:2] if not self.batch_first else (keys.shape[1], keys.shape[0])
        if lengths is not None and mask is not None:
            raise ValueError("mask: given beside lengths, which say the same; give one of them")
        if lengths is not None:
            ends = check_lengths(lengths, S, B, packed=False, batched=True)
            assert ends is not None
            steps = torch.arange(S, device=keys.device)
            mask = steps < ends.to(keys.device).unsqueeze(1)
        elif mask is not None:
            _check_mask(mask, (B, S))
        if not self.batch_first:
            keys = keys.transpose(0, 1)
            values = None if values is None else values.transpose(0, 1).contiguous()
        keys = keys.contiguous()
        if mask is not None:  # times a weight of 0, or a gradient of 0, NaN would be NaN
            beyond = ~mask.unsqueeze(2)
            keys = keys.masked_fill(beyond, 0.0)
            values = None if values is None else values.masked_fill(beyond, 0.0)
        weight: Any = self.weight_key
        projected = keys if weight is None else F.linear(keys, weight)
        return PreparedKeys(projected, keys if values is None else values, mask)

    def _check_sequence(self, name: str, x: Tensor, size: int | None) -> None:
        letters = "B, S" if self.batch_first else "S, B"
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor ({letters}, .), got {type(x).__name__}")
        if x.dim() != 3 or (size is not None and x.shape[2] != size):
            last = "V" if size is None else f"key_size = {size}"
            raise ValueError(f"{name}: expected ({letters}, {last}), got {tuple(x.shape)}")

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | PreparedKeys,
        values: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        mask: Tensor | None = None,
        causal: bool = False,
        need_weights: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Contexts of one query a sequence, or of many.

        Args:
            queries: (B, Q), or (U, B, Q), (B, U, Q) with ``batch_first``.
            keys: as :meth:`prepare` takes them, or what it returned; ``values``, ``lengths`` and
                ``mask`` go with the former alone.
            causal: whether query u sees the keys up to the u-th alone, as in self-attention, where
                the queries are the keys.
            need_weights: False returns None in place of the weights, and with 'scaled_dot' and many
                queries takes torch's own scaled_dot_product_attention, whose gradient has none of
                its own. On a core with AVX-512 it trains 3.6 times as fast with U = S = 300 B4 H64
                and 1.1 times with U = S = 100 B8. With one query it is slower, 0.8 times, so it is
                not asked.

        Returns:
            contexts (B, V) and weights (B, S); of many queries (U, B, V) and (U, B, S), or with
            ``batch_first`` (B, U, V) and (B, U, S). Both are zero where a query sees no key.

        Memory: 'additive' holds (B, U, S, A) for backward where no kernel is had for it.

        Raises:
            ValueError: another shape. TypeError: another type.
        """
        if isinstance(keys, PreparedKeys):
            if values is not None or lengths is not None or mask is not None:
                raise ValueError(
                    "keys: values, lengths and mask were given to prepare(), and are not given "
                    "beside what it returned"
                )
            prepared = keys
            self._check_queries(queries, prepared.keys.shape[0])
        else:
            self._check_queries(queries, None)
            prepared = self.prepare(keys, values, lengths=lengths, mask=mask)
            self._check_queries(queries, prepared.keys.shape[0])
        return self._attend(queries, prepared, causal, need_weights)

    def _check_queries(self, queries: Tensor, B: int | None) -> None:
        letters = "(B, U, Q)" if self.batch_first else "(U, B, Q)"
        if not isinstance(queries, Tensor):
            raise TypeError(
                f"queries: expected a tensor (B, Q) or {letters}, got {type(queries).__name__}"
            )
        if queries.dim() not in (2, 3) or queries.shape[-1] != self.query_size:
            raise ValueError(
                f"queries: expected (B, Q) or {letters} with Q = query_size = {self.query_size}, "
                f"got {tuple(queries.shape)}"
            )
        batch = queries.shape[0 if queries.dim() == 2 or self.batch_first else 1]
        if B is not None and batch != B:
            raise ValueError(f"queries: expected the batch of the keys, {B}, got {batch}")

    def _attend(
        self, queries: Tensor, prepared: PreparedKeys, causal: bool, need_weights: bool
    ) -> tuple[Tensor, Tensor | None]:
        one, turned = queries.dim() == 2, not self.batch_first
        q = queries.unsqueeze(1) if one else queries.transpose(0, 1) if turned else queries
        weight: Any = self.weight_query
        q = q if weight is None else F.linear(q, weight)
        keys, values, mask = prepared
        weights: Tensor | None = None
        if self.score == "scaled_dot" and not (one or need_weights):
            seen = seen_of(mask, causal, q.shape[1], keys.shape[1], q.device)
            context = F.scaled_dot_product_attention(q, keys, values, seen, scale=self.scale)
        else:
            v: Any = self.weight_score
            context, weights = attend(q, keys, values, mask, v, self.scale, causal)
        if one:
            context = context.squeeze(1)
            weights = None if weights is None else weights.squeeze(1)
        elif turned:
            context = context.transpose(0, 1)
            weights = None if weights is None else weights.transpose(0, 1)
        return context, weights if need_weights else None


def _check_mask(mask: Any, shape: tuple[int, int]) -> None:
    if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask: expected a bool tensor, got {got}; use mask.bool()")
    if tuple(mask.shape) != shape:
        raise ValueError(f"mask: expected (B, S) = {shape}, got {tuple(mask.shape)}")
