"""A linear-chain conditional random field, with the names and the call of pytorch-crf."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.crf import Chain, as_order
from ..ops import crf
from ..ops.checks import check_lengths, positive

REDUCTIONS = ("none", "sum", "mean", "token_mean")


class CRF(nn.Module):
    """Conditional random field over sequences of tags, as the last layer of a tagger.

    Equations, for emissions e of one sequence and tags y:
        score(y) = start_transitions[y_0] + end_transitions[y_last]
                   + sum_t e_t[y_t] + sum_t transitions[y_{t-1}, y_t]
        log Z    = log sum over all y of exp(score(y))
        log p(y) = score(y) - log Z

    All in one kernel, forward, backward and Viterbi, in time proportional to the tokens. Sums over
    time are kept relative to their greatest term and totals in float64: float32 loses no more on a
    long sequence than on a short one.

    Args:
        num_tags: K, the number of tags.
        batch_first: whether emissions are (B, T, K) instead of (T, B, K), and tags and masks alike.
        forbidden: pairs (i, j) of tags of which j never follows i. ("start", j) says that no
            sequence begins with j, (i, "end") that none ends with i. Paths with such a pair have
            probability 0, and some path must be left. :meth:`forbidden_by` makes them from the
            labels of a tagging scheme.
        backend: None to choose, or 'native', 'numba', 'triton' or 'eager'.
        device, dtype: of the parameters. Scores of 16 bits are computed, and log-likelihoods
            returned, in float32.

    Attributes:
        start_transitions, end_transitions: (K,). transitions: (K, K), from a tag (row) to the next.
            They and the state dict are pytorch-crf's, and so are the initial values, uniform in
            -0.1 to 0.1.

    Example::

        layer = fastseq.LSTM(64, 128, bidirectional=True)
        readout, crf = nn.Linear(256, 9), fastseq.CRF(9)
        loss = -crf(readout(layer(x, lengths=lengths)[0]), tags, lengths=lengths, reduction="mean")
        best = crf.decode(readout(layer(x, lengths=lengths)[0]), lengths=lengths)

    Source: Lafferty, McCallum and Pereira, "Conditional random fields", 2001; over a bidirectional
    LSTM: Huang, Xu and Yu, "Bidirectional LSTM-CRF models for sequence tagging", 2015.
    """

    def __init__(
        self,
        num_tags: int,
        batch_first: bool = False,
        *,
        forbidden: Iterable[tuple[int | str, int | str]] = (),
        backend: str | Sequence[str] | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        try:
            num_tags = operator.index(num_tags)  # as NumPy's integers
        except TypeError:
            raise ValueError(f"invalid number of tags: {num_tags}") from None
        if num_tags <= 0:
            raise ValueError(f"invalid number of tags: {num_tags}")
        super().__init__()
        self.num_tags = num_tags
        self.batch_first = batch_first
        self.backend = as_order(backend)
        made = {"device": device, "dtype": dtype}
        self.start_transitions = nn.Parameter(torch.empty(num_tags, **made))
        self.end_transitions = nn.Parameter(torch.empty(num_tags, **made))
        self.transitions = nn.Parameter(torch.empty(num_tags, num_tags, **made))
        masks = _forbidden(list(forbidden), num_tags)
        for name, mask in zip(("start", "end", "moves"), masks, strict=True):
            kept = None if mask is None else mask.to(device)
            self.register_buffer(f"_forbidden_{name}", kept, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.1, 0.1)

    def extra_repr(self) -> str:
        first = ", batch_first=True" if self.batch_first else ""
        return f"num_tags={self.num_tags}{first}"

    def forward(
        self,
        emissions: Tensor,
        tags: Tensor,
        mask: Tensor | None = None,
        reduction: str = "sum",
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The log-likelihood of tags, to be made large.

        Args:
            emissions: (T, B, K), or (B, T, K) with ``batch_first``.
            tags: (T, B), or (B, T), integers from 0 to K - 1. Beyond a sequence's length they may
                be anything.
            mask: (T, B), or (B, T), bool or integers: on for the steps of a sequence, and then off.
            reduction: 'sum' over the batch, 'mean' over it, 'token_mean' (the sum by the number of
                steps that are on), or 'none'.
            lengths: (B,) integers, in place of a mask. A sequence of length 0 has log-likelihood 0.

        Returns:
            () or, with ``reduction='none'``, (B,). -inf for tags that are forbidden.

        Raises:
            ValueError: sizes that do not fit, a mask with a hole, lengths out of range.
            IndexError: tags out of range within the lengths.
        """
        chain = self._chain(emissions, mask, lengths, tags)
        if reduction not in REDUCTIONS:
            raise ValueError(f"invalid reduction: {reduction}")
        tags = self._time_first(tags).to(torch.int64)
        values = crf.log_likelihood(chain, tags, self.backend)
        if reduction == "none":
            return values
        if reduction == "token_mean":
            T, B = tags.shape
            return values.sum() / (T * B if chain.lengths is None else chain.lengths.sum())
        return values.sum() if reduction == "sum" else values.mean()

    def log_partition(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """log Z, (B,); 0 for a sequence of length 0."""
        return crf.log_likelihood(self._chain(emissions, mask, lengths), None, self.backend)

    def marginals(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """The probability of each tag at each step, as emissions are laid out; zero beyond the
        lengths. It can be differentiated."""
        found = crf.marginals(self._chain(emissions, mask, lengths), self.backend)
        return self._time_first(found)

    def viterbi(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        n_best: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """The best paths as tensors.

        Returns:
            scores (B, n_best), the best first, and tags (B, n_best, T) int64, -1 beyond the length.
            Where a sequence has fewer paths, the scores that are left are -inf and their tags -1.
            Where a score of a sequence is NaN, it has one path, of score NaN, with any tags.

        Raises:
            TypeError, ValueError: ``n_best`` is no integer of at least 1.
        """
        n_best = positive("n_best", n_best)
        return crf.viterbi(self._chain(emissions, mask, lengths), n_best, self.backend)

    def decode(
        self,
        emissions: Tensor,
        mask: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        n_best: int | None = None,
    ) -> list[Any]:
        """The best tags of each sequence as a list of numbers, by Viterbi's algorithm.

        Args:
            emissions, mask, lengths: as the call takes them.
            n_best: for each sequence up to so many lists in place of one, the best first. Where
                every path is forbidden there is none, or with ``n_best=None`` an empty one.

        Raises:
            TypeError, ValueError: ``n_best`` is no integer of at least 1.
        """
        chain = self._chain(emissions, mask, lengths)
        n = 1 if n_best is None else positive("n_best", n_best)
        scores, paths = crf.viterbi(chain, n, self.backend)
        ends = [len(chain.emissions)] * len(paths)
        if chain.lengths is not None:
            ends = chain.lengths.tolist()
        if n_best is None:
            listed = paths[:, 0].cpu().numpy().tolist()
            found = [row[:end] for row, end in zip(listed, ends, strict=True)]
            return [[] if row[:1] == [-1] else row for row in found]
        possible = (scores != -torch.inf).sum(1).tolist()
        return [
            [row[:end] for row in rows[:count]]
            for rows, end, count in zip(paths.tolist(), ends, possible, strict=True)
        ]

    @staticmethod
    def forbidden_by(
        labels: Sequence[str], scheme: str = "BIO"
    ) -> list[tuple[int | str, int | str]]:
        """The pairs that a tagging scheme forbids, for ``CRF(forbidden=)``.

        Args:
            labels: of each tag, such as ['O', 'B-PER', 'I-PER', 'B-LOC', 'I-LOC'].
            scheme: 'BIO' (also called IOB2): I-X follows B-X or I-X alone. 'BIOES': B- and I- are
                followed by I- or E- of the same type, and a span of one token is S-. 'BILOU' is
                the same with L- for E- and U- for S-.

        Raises:
            ValueError: an unknown scheme, or a label that has no place in it.
        """
        letters = {"BIO": "BI", "BIOES": "BIES", "BILOU": "BILU"}
        if scheme not in letters:
            raise ValueError(f"scheme: expected one of {', '.join(letters)}, got {scheme!r}")
        spans: list[tuple[str, str]] = []
        for label in labels:
            letter, _, kind = label.partition("-")
            if label != "O" and (len(letter) != 1 or letter not in letters[scheme] or not kind):
                raise ValueError(
                    f"labels: expected 'O' or a letter of {scheme} and -TYPE, got {label!r}"
                )
            spans.append((letter.replace("L", "E").replace("U", "S"), kind))
        open_ended = scheme == "BIO"

        def allows(before: tuple[str, str], after: tuple[str, str]) -> bool:
            within = before[0] in "BI"  # a span that may, or has to, go on
            continues = after[0] in "IE"
            if continues:
                return within and before[1] == after[1]
            return open_ended or not within

        outside = ("O", "")
        found: list[tuple[int | str, int | str]] = []
        for i, before in enumerate(spans):
            if not allows(outside, before):
                found.append(("start", i))
            if not allows(before, outside):
                found.append((i, "end"))
            found += [(i, j) for j, after in enumerate(spans) if not allows(before, after)]
        return found

    def _time_first(self, tensor: Tensor) -> Tensor:
        """And back, which is the same."""
        return tensor.transpose(0, 1) if self.batch_first else tensor

    def _chain(
        self,
        emissions: Tensor,
        mask: Tensor | None,
        lengths: Tensor | Sequence[int] | None,
        tags: Tensor | None = None,
    ) -> Chain:
        """What is asked, checked, time first. Where pytorch-crf raises for the same mistake, the
        class and the leading words are its own."""
        if not isinstance(emissions, Tensor):
            raise TypeError(f"emissions: expected a tensor, got {type(emissions).__name__}")
        if emissions.dim() != 3:
            raise ValueError(f"emissions must have dimension of 3, got {emissions.dim()}")
        if not emissions.is_floating_point():
            raise TypeError(f"emissions: expected floating-point scores, got {emissions.dtype}")
        if emissions.shape[2] != self.num_tags:
            raise ValueError(
                f"expected last dimension of emissions is {self.num_tags}, got {emissions.shape[2]}"
            )
        if emissions.device != self.transitions.device:
            raise RuntimeError(
                "Input and parameter tensors are not at the same device, found emissions at "
                f"{emissions.device} and transitions at {self.transitions.device}"
            )
        for name, given in (("tags", tags), ("mask", mask)):
            if given is None:
                continue
            if not isinstance(given, Tensor):
                raise TypeError(f"{name}: expected a tensor, got {type(given).__name__}")
            if given.shape != emissions.shape[:2]:
                raise ValueError(
                    f"the first two dimensions of emissions and {name} must match, "
                    f"got {tuple(emissions.shape[:2])} and {tuple(given.shape)}"
                )
            if given.is_floating_point() or given.is_complex():
                raise TypeError(f"{name}: expected integers, got {given.dtype}")
            if given.device != emissions.device:
                raise RuntimeError(
                    f"{name}: expected the device of emissions, {emissions.device}, "
                    f"got {given.device}"
                )
        emissions = self._time_first(emissions)
        T, B = emissions.shape[:2]
        if mask is not None:
            if lengths is not None:
                raise ValueError("lengths: a mask says where sequences end; give one of the two")
            lengths = crf.lengths_of(self._time_first(mask))
        else:
            lengths = check_lengths(lengths, T, B, False, True)
        return Chain(
            emissions,
            lengths,
            _without(self.start_transitions, self._forbidden_start),
            _without(self.end_transitions, self._forbidden_end),
            _without(self.transitions, self._forbidden_moves),
        )


def _without(scores: Tensor, forbidden: Any) -> Tensor:
    return scores if forbidden is None else scores.masked_fill(forbidden, -torch.inf)


def _forbidden(pairs: Sequence[Any], K: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Masks of start (K,), end (K,) and moves (K, K); None where nothing is forbidden."""
    start, end, moves = torch.zeros(K), torch.zeros(K), torch.zeros(K, K)
    for pair in pairs:
        expected = (
            f"forbidden: expected pairs of tags from 0 to {K - 1}, ('start', tag) or (tag, 'end'), "
            f"got {pair!r}"
        )
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            raise ValueError(expected)
        before, after = pair
        tags = [tag for tag, end_of in ((before, "start"), (after, "end")) if tag != end_of]
        if not tags or not all(type(tag) is int and 0 <= tag < K for tag in tags):
            raise ValueError(expected)
        if before == "start":
            start[after] = 1
        elif after == "end":
            end[before] = 1
        else:
            moves[before, after] = 1
    within = start == 0  # the tags of which a path from the start is left
    for _ in range(K):
        within |= (moves[within] == 0).any(0)
    if not (within & (end == 0)).any():
        raise ValueError("forbidden: expected some path from start to end to be left, got none")
    return _some(start), _some(end), _some(moves)


def _some(mask: Tensor) -> Tensor | None:
    return mask.bool() if mask.any() else None
