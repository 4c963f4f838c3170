r"""Pooling over time: one vector, or a few, of each sequence, whatever its length.

Every function takes sequences as the layers give them: x (T, B, F), (B, T, F) with
``batch_first``, (T, F) of one sequence, or a PackedSequence; and ``lengths`` (B,) integers of
padded ones. Nothing behind a sequence's end has an effect, NaN neither, or gets a gradient but
zero. A sequence of length 0 gives zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..backends.tracing import unrecorded
from ..ops.checks import check_integers, check_lengths, is_integral, positive
from ..ops.geometry import Dense
from ..ops.modes import in_transform

Lengths = Tensor | Sequence[int] | None


def max_pool(
    x: Tensor | PackedSequence, lengths: Lengths = None, *, batch_first: bool = False
) -> Tensor:
    r"""The greatest value of each feature.

    .. math::
        p_j = \max_{t < s} x_{t,j}

    with s the sequence's own length. Equal values share the gradient, as in ``torch.amax``.

    Args:
        x: (T, B, F), (B, T, F) with ``batch_first``, (T, F), or a PackedSequence; floating.
        lengths: (B,) integers from 0 to T, or None.
        batch_first: how x lies.

    Returns:
        (B, F), or (F,) of one sequence.

    Raises:
        TypeError, ValueError: x or lengths are none of these.

    Source: Collobert et al. 2011, Natural Language Processing (Almost) from Scratch.
    """
    steps = _Steps(x, lengths, batch_first)
    if steps.inside is None:
        return steps.vector(steps.x.amax(0))
    greatest = torch.where(steps.inside, steps.x, -torch.inf).amax(0)
    return steps.vector(torch.where(steps.lengths[:, None] > 0, greatest, 0.0))


def average_pool(
    x: Tensor | PackedSequence, lengths: Lengths = None, *, batch_first: bool = False
) -> Tensor:
    r"""The mean of each feature.

    .. math::
        p_j = \frac{1}{s} \sum_{t < s} x_{t,j}

    with s the sequence's own length.

    Args:
        x: (T, B, F), (B, T, F) with ``batch_first``, (T, F), or a PackedSequence; floating.
        lengths: (B,) integers from 0 to T, or None.
        batch_first: how x lies.

    Returns:
        (B, F), or (F,) of one sequence.

    Raises:
        TypeError, ValueError: x or lengths are none of these.

    Source: Iyyer et al. 2015, Deep Unordered Composition Rivals Syntactic Methods for Text
    Classification.
    """
    steps = _Steps(x, lengths, batch_first)
    if steps.inside is None:
        return steps.vector(steps.x.mean(0))
    total = torch.where(steps.inside, steps.x, 0.0).sum(0)
    return steps.vector(total / steps.lengths.clamp(min=1)[:, None])


def k_max_pool(
    x: Tensor | PackedSequence, k: int, lengths: Lengths = None, *, batch_first: bool = False
) -> Tensor:
    r"""The k greatest values of each feature, in their order of time.

    .. math::
        p_{1,j}, \dots, p_{k,j} = x_{t_1,j}, \dots, x_{t_k,j}, \quad t_1 < \dots < t_k

    with :math:`t_1, \dots, t_k` the times of the k greatest of :math:`x_{0,j}, \dots, x_{s-1,j}`,
    the earlier of equal ones first. Where a sequence has fewer steps than k, zeros stand behind
    all its values.

    Args:
        x: (T, B, F), (B, T, F) with ``batch_first``, (T, F), or a PackedSequence; floating.
        k: at least 1.
        lengths: (B,) integers from 0 to T, or None.
        batch_first: how x and the result lie.

    Returns:
        (k, B, F), (B, k, F) with ``batch_first``, or (k, F) of one sequence.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: Kalchbrenner, Grefenstette and Blunsom 2014, A Convolutional Neural Network for
    Modelling Sentences, section 3.2.
    """
    k = positive("k", k)
    steps = _Steps(x, lengths, batch_first)
    return steps.vectors(_greatest(steps, k))


def dynamic_k_max_pool(
    x: Tensor | PackedSequence,
    layer: int,
    num_layers: int,
    k_top: int,
    lengths: Lengths = None,
    *,
    s: Lengths = None,
    batch_first: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""k-max pooling between convolutions, with a k of each sequence's own.

    .. math::
        k_l = \max\left(k_{top}, \left\lceil \frac{L - l}{L} s \right\rceil\right)

    with l the number of the convolution behind which it stands, L how many there are, and s the
    length of the sentence that went into the first. It is :func:`k_max_pool` with that k.

    Args:
        x: (T, B, F), (B, T, F) with ``batch_first``, (T, F), or a PackedSequence; floating.
        layer: l, from 1 to ``num_layers``.
        num_layers: L, at least 1.
        k_top: the k of the last layer, at least 1.
        lengths: (B,) integers from 0 to T, or None.
        s: (B,) integers from 0 on; the lengths of x if None, as of a first convolution that keeps
            them.
        batch_first: how x and the result lie.

    Returns:
        ``pooled, lengths``: (K, B, F), (B, K, F) with ``batch_first``, or (K, F) of one sequence,
        with K the k of the longest that s may be, T or the greatest given; and how many values each
        sequence has there, the lesser of its k and its length, (B,) int64, behind which there are
        zeros. They are the ``lengths`` of the next layer.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: Kalchbrenner, Grefenstette and Blunsom 2014, A Convolutional Neural Network for
    Modelling Sentences, section 3.3.
    """
    num_layers = positive("num_layers", num_layers)
    layer = positive("layer", layer)
    k_top = positive("k_top", k_top)
    if layer > num_layers:
        raise ValueError(f"layer: expected at most num_layers = {num_layers}, got {layer}")
    steps = _Steps(x, lengths, batch_first)

    def share(s: Any) -> Any:
        """Rounded up, in integers: (L - l) / L of a length may not be a number of a float."""
        return -(-(num_layers - layer) * s // num_layers)

    sizes, longest = steps.lengths, steps.x.shape[0]
    if s is not None:
        sizes = check_integers("s", s, steps.x.shape[1]).to(steps.x.device)
        if len(sizes) and int(sizes.min()) < 0:
            raise ValueError(f"s: expected lengths from 0 on, got {int(sizes.min())}")
        longest = int(sizes.max()) if len(sizes) else 0
    counts = share(sizes).clamp(min=k_top).minimum(steps.lengths)
    pooled = steps.vectors(_greatest(steps, max(k_top, share(longest)), counts))
    return pooled, counts if steps.geometry.batched else counts[0]


def region_max_pool(
    x: Tensor | PackedSequence,
    regions: int | Tensor,
    lengths: Lengths = None,
    *,
    batch_first: bool = False,
) -> Tensor:
    r"""Dynamic pooling: each sequence is cut into r regions, and the maximum is taken of each.

    .. math::
        p_{q,j} = \max_{t < s,\; \rho(t) = q} x_{t,j}, \quad q = 0, \dots, r - 1

    With a number of regions they are as equal as can be, :math:`\rho(t) = \lfloor t r / s \rfloor`
    with s the sequence's own length (Johnson and Zhang). With a tensor of r - 1 cuts region q ends
    where a sequence has its cut q: :math:`\rho(t)` is the number of cuts at or before t, as between
    a trigger and an argument (Chen et al.). A region without a step gives zeros. Equal values share
    the gradient.

    Args:
        x: (T, B, F), (B, T, F) with ``batch_first``, (T, F), or a PackedSequence; floating.
        regions: r, at least 1; or (r - 1, B) integers from 0 to T, the first step behind each of a
            sequence's cuts, in any order; (r - 1,) of one sequence.
        lengths: (B,) integers from 0 to T, or None.
        batch_first: how x and the result lie, and not how the cuts do.

    Returns:
        (r, B, F), (B, r, F) with ``batch_first``, or (r, F) of one sequence.

    Raises:
        TypeError, ValueError: an argument is none of these.

    Source: Johnson and Zhang 2015, Effective Use of Word Order for Text Categorization with
    Convolutional Neural Networks; Chen et al. 2015, Event Extraction via Dynamic
    Multi-Pooling Convolutional Neural Networks, section 3.3.3.
    """
    if not isinstance(regions, Tensor):
        regions = positive("regions", regions)
    steps = _Steps(x, lengths, batch_first)
    T, B, F = steps.x.shape
    time = torch.arange(T, device=steps.x.device)[:, None]
    if isinstance(regions, Tensor):
        cuts = _checked_cuts(regions, steps)
        count, region = cuts.shape[0] + 1, (cuts[:, None] <= time).sum(0)
    else:
        count, region = regions, time * regions // steps.lengths.clamp(min=1)
    values = steps.x
    if steps.inside is not None:  # all padding is of one more region, which is thrown away
        values = torch.where(steps.inside, values, 0.0)
        region = torch.where(steps.inside[..., 0], region, count)
    pooled = values.new_zeros((count + 1, B, F)).scatter_reduce(
        0, region[..., None].expand(T, B, F), values, "amax", include_self=False
    )
    return steps.vectors(pooled[:count])


class Pooling(nn.Module):
    """One of the ways of pooling as a module, whose result has one size for all sequences.

    Args:
        kind: 'max', 'average', 'k_max' or 'region_max'.
        size: the k of 'k_max', or the number of regions; 1, as the other two have it, if left out.
        batch_first: how the sequences lie.

    Raises:
        TypeError, ValueError: no such kind or size.
    """

    def __init__(self, kind: str, size: int = 1, *, batch_first: bool = False) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(map(repr, KINDS))}, got {kind!r}")
        size = positive("size", size)
        if size > 1 and not KINDS[kind][1]:
            raise ValueError(f"size: {kind!r} gives one vector a sequence, got {size}")
        if not isinstance(batch_first, bool):
            raise TypeError(f"batch_first: expected a bool, got {type(batch_first).__name__}")
        self.kind, self.size, self.batch_first = kind, size, batch_first

    def extra_repr(self) -> str:
        size = f", {self.size}" if KINDS[self.kind][1] else ""
        return f"{self.kind!r}{size}" + (", batch_first=True" if self.batch_first else "")

    def forward(self, x: Tensor | PackedSequence, lengths: Lengths = None) -> Tensor:
        """Pool over time.

        Args:
            x, lengths: as the functions take them.

        Returns:
            (B, F) for 'max' and 'average', and (B, size * F) for the others, in the order of time.
        """
        pool, sized = KINDS[self.kind]
        if not sized:
            return pool(x, lengths, batch_first=self.batch_first)
        pooled = pool(x, self.size, lengths, batch_first=self.batch_first)
        if pooled.dim() == 3 and not self.batch_first:
            pooled = pooled.transpose(0, 1)
        return pooled.flatten(-2)


#: By kind: the function, and whether it takes a size.
KINDS: dict[str, tuple[Callable[..., Tensor], bool]] = {
    "max": (max_pool, False),
    "average": (average_pool, False),
    "k_max": (k_max_pool, True),
    "region_max": (region_max_pool, True),
}


class _Steps:
    """A caller's sequences as x (T, B, F), checked.

    lengths: (B,). inside: (T, B, 1), where a step is one of its sequence's; None where all are.
    """

    inside: Tensor | None = None

    def __init__(self, x: Any, lengths: Any, batch_first: bool) -> None:
        if isinstance(x, PackedSequence):
            if lengths is not None:
                raise ValueError("lengths: a PackedSequence has its own lengths; leave it out")
            x, lengths = pad_packed_sequence(x, batch_first)
        if not isinstance(x, Tensor) or x.is_nested:
            kind = "a NestedTensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x: expected a padded tensor or a PackedSequence, got {kind}")
        if not x.is_floating_point():
            raise TypeError(f"x: expected a floating type, got {x.dtype}")
        if x.dim() not in (2, 3):
            raise ValueError(f"x: expected (T, B, F), or (T, F) of one sequence, got {x.dim()}-D")
        self.geometry = Dense(x, batch_first)
        T, B = self.geometry.T, self.geometry.B
        if T == 0:
            raise ValueError("x: expected at least one step, got T = 0")
        lengths = check_lengths(lengths, T, B, False, self.geometry.batched)
        self.x = self.geometry.dense(x)
        if lengths is None:
            self.lengths = torch.full((B,), T, device=x.device)
        else:
            self.lengths = lengths.to(x.device)
            time = torch.arange(T, device=x.device)
            self.inside = (time[:, None] < self.lengths)[..., None]

    def vector(self, pooled: Tensor) -> Tensor:
        """(B, F) as the caller has it."""
        return pooled if self.geometry.batched else pooled.squeeze(0)

    def vectors(self, pooled: Tensor) -> Tensor:
        """(k, B, F) as the caller has it."""
        return self.geometry.undo(pooled)


def _greatest(steps: _Steps, k: int, counts: Tensor | None = None) -> Tensor:
    """(k, B, F): of each sequence the k greatest, or as many of them as ``counts`` (B,) says."""
    x, T = steps.x, steps.x.shape[0]
    ranked = x if steps.inside is None else torch.where(steps.inside, x, -torch.inf)
    # stable: of equal values the earlier ones, and of what is -inf the steps before the padding
    order = ranked.detach().sort(dim=0, descending=True, stable=True).indices[:k]
    kept = steps.lengths if counts is None else counts
    rank = torch.arange(order.shape[0], device=x.device)[:, None, None]
    inside = rank < kept[:, None]
    time = torch.where(inside, order, T).sort(0).values
    found = x.gather(0, time.clamp(max=T - 1))
    found = torch.where(inside, found, 0.0)
    return nn.functional.pad(found, (0, 0, 0, 0, 0, k - order.shape[0]))


def _checked_cuts(cuts: Tensor, steps: _Steps) -> Tensor:
    """(r - 1, B)."""
    batched, B = steps.geometry.batched, steps.geometry.B
    if not is_integral(cuts):
        raise TypeError(f"regions: expected integers, got {cuts.dtype}")
    if cuts.dim() != (2 if batched else 1) or (batched and cuts.shape[1] != B):
        expected = f"(r - 1, B) = (r - 1, {B})" if batched else "(r - 1,)"
        raise ValueError(f"regions: expected cuts {expected}, got {tuple(cuts.shape)}")
    cuts = cuts if batched else cuts[:, None]
    _check_range(cuts, steps.x.shape[0])
    return cuts.to(steps.x.device)


@unrecorded
def _check_range(cuts: Tensor, T: int) -> None:
    """On a GPU the device asserts it, and nobody waits for it."""
    within = ((cuts >= 0) & (cuts <= T)).all()
    if torch.compiler.is_compiling() or cuts.is_cuda:
        torch._assert_async(within, "regions: expected cuts from 0 to T")
    elif not in_transform() and not cuts.is_meta and not within:
        raise ValueError(
            f"regions: expected cuts from 0 to T = {T}, got {int(cuts.min())} to {int(cuts.max())}"
        )
