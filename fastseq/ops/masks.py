"""Masks that are a pure function of a seed and of the place that they mask.

Whether a unit is kept is one word of Philox4x32-10 (Salmon et al. 2011, Parallel Random Numbers: As
Easy as 1, 2, 3), whose key is the seed and whose counter names the unit: what is masked, in which
layer and direction, of which sequence, at which step. No state goes from one number to the next, so
a mask depends on no backend, no order of the batch and no split of it. A backend that draws does so
for plain tensors (:class:`..backends.contract.Draws`), torch's operations for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import choice
from ..backends.contract import Given, Request, ways
from ..backends.tracing import is_tracing, unrecorded
from . import modes
from .geometry import packed_positions
from .library import library, register_fake
from .stack import Stack, Zoneout, sizes_of

_WORD = 0xFFFFFFFF
#: Less 2^32: the product of a word with one of these fits into 64 bits with a sign.
_MULTIPLIERS = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
#: Counters at a time on the CPU. The 2^20 of a 4096 x 1024 mask take 145 ms all at once, which are
#: fresh pages for each of 120 operations, and 35 ms in parts of 2^16 or 2^17 (one core, AVX-512).
_AT_ONCE = 2**16

#: What is masked, a field of the counter. The states are zoned out by ZONEOUT, ZONEOUT + 1, ...
RECURRENT, INPUT, WEIGHT, ZONEOUT = range(4)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Four words from a counter of four and a key of two, int64 tensors of 32-bit values.

    With c (M - 2^32) in place of c M the low word is the same and the high word c less.
    """
    c_0, c_1, c_2, c_3 = counter
    k_0, k_1 = key
    for _ in range(_ROUNDS):
        p_0, p_1 = c_0 * _MULTIPLIERS[0], c_2 * _MULTIPLIERS[1]
        c_0, c_2 = (p_1 >> 32) + c_2 ^ c_1 ^ k_0, (p_0 >> 32) + c_0 ^ c_3 ^ k_1
        c_1, c_3 = p_1 & _WORD, p_0 & _WORD
        k_0, k_1 = (k_0 + _WEYL[0]) & _WORD, (k_1 + _WEYL[1]) & _WORD
    return c_0, c_1, c_2, c_3


def keep(
    seed: Tensor,
    sites: Sequence[int],
    ids: Tensor,
    steps: Tensor | None,
    units: int,
    p: float,
) -> Tensor:
    """(sites, rows, units) bool, each true with probability 1 - p.

    seed: int64, its 64 bits are the key. ids, steps: (rows,) int64. The counter of unit u is
    (u // 4, id, site + 2^16 (id // 2^32), step), and u % 4 chooses among its four words.
    """
    threshold, kept = int(p * 2.0**32), None
    if modes.is_ordinary(seed, ids, steps):
        drawing = choice.draws(ids.device.type)
        kept = drawing and drawing.keep(seed, sites, ids, steps, units, threshold)
    return by_operations(seed, sites, ids, steps, units, threshold) if kept is None else kept


def by_operations(
    seed: Tensor,
    sites: Sequence[int],
    ids: Tensor,
    steps: Tensor | None,
    units: int,
    threshold: int,
) -> Tensor:
    """:func:`keep` by torch's operations, on every device and in every mode."""
    on, blocks = ids.device, (units + 3) // 4
    at_once = max(1, _AT_ONCE // (len(sites) * max(blocks, 1)))
    if on.type == "cpu" and not is_tracing() and ids.shape[0] > at_once:
        parts = ids.split(at_once)
        when = [None] * len(parts) if steps is None else steps.split(at_once)
        drawn = [
            by_operations(seed, sites, *part, units, threshold)
            for part in zip(parts, when, strict=True)
        ]
        return torch.cat(drawn, 1)
    seed, ids = seed.to(on), ids[:, None]
    site = _constants(sites, on)[:, None, None]
    step = torch.zeros_like(ids) if steps is None else steps[:, None]
    block = torch.arange(blocks, device=on)
    counter = block, ids & _WORD, site | (ids >> 32 & 0xFFFF) << 16, step
    words = torch.stack(philox(counter, (seed & _WORD, seed >> 32 & _WORD)), -1)
    return words.flatten(-2)[..., :units] >= threshold


@unrecorded
def _constants(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def draw_seed(like: Tensor) -> Tensor:
    """63 bits from torch's default generator; ``like`` is any tensor, for the dispatcher."""
    return torch.randint(2**63 - 1, (), device="cpu")


# A graph holds both as they are: inductor would draw another seed, and write out the ten rounds.
library.define(
    "keep(Tensor seed, int[] sites, Tensor ids, Tensor? steps, SymInt units, float p) -> Tensor"
)
library.impl("keep", keep, "CompositeExplicitAutograd")
library.define("draw_seed(Tensor like) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
library.impl("draw_seed", draw_seed, "CompositeExplicitAutograd")


@register_fake("keep")
def _keep_fake(seed, sites, ids, steps, units, p):
    return ids.new_empty((len(sites), ids.shape[0], units), dtype=torch.bool)


@register_fake("draw_seed")
def _draw_seed_fake(like):
    return torch.empty((), dtype=torch.int64, device="cpu")


class Rates(NamedTuple):
    """The probabilities with which a layer masks; of ``zoneout`` one for each state of the cell."""

    recurrent_dropout: float = 0.0
    input_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: tuple[float, ...] = ()

    @property
    def drop(self) -> bool:
        """Whether any of the dropouts does."""
        return any(self[:3])


class Zoned(NamedTuple):
    """States that stay at one rate and have one size, and the sites of their masks."""

    states: tuple[int, ...]
    sites: tuple[int, ...]
    size: int
    rate: float


def _zoned(
    rates: Sequence[float], layers: Sequence[int], directions: int, sizes: Sequence[int]
) -> list[Zoned]:
    places = [(layer, d) for layer in layers for d in range(directions)]
    found = []
    for size, rate in sorted(set(zip(sizes, rates, strict=True))):
        states = [k for k, of in enumerate(zip(sizes, rates, strict=True)) if of == (size, rate)]
        sites = [site(ZONEOUT + k, *place) for k in states for place in places]
        if rate:
            found.append(Zoned(tuple(states), tuple(sites), size, rate))
    return found


_known_zoned = lru_cache(maxsize=256)(_zoned)


def stays(
    zoneout: Zoneout | None,
    layers: Sequence[int],
    directions: int,
    x: Tensor,
    batch_sizes: Tensor | None,
    sizes: Sequence[int],
) -> tuple[list[Tensor | None], tuple[float, ...]]:
    """``stay`` and ``part`` of a call of these layers, for the rows of x. sizes: of the states."""
    if zoneout is None:
        return [], ()
    if zoneout.seed is None:
        return [], zoneout.rates
    ids, zoned = zoneout.ids, _zoned
    B = x.shape[1] if ids is None else ids.shape[0]
    if batch_sizes is not None:
        step, sequence = (p.to(x.device) for p in packed_positions(batch_sizes, x.shape[0], B))
    elif x.is_cpu and x.shape[0] * B <= _KEPT and modes.is_ordinary(x, zoneout.seed):
        step, sequence = _kept_positions(x.shape[0], B)
        zoned = _known_zoned
    else:
        step, sequence = _positions(x.shape[0], B, x.device)
    rows = sequence if ids is None else ids.index_select(0, sequence)
    stay: list[Tensor | None] = [None] * len(sizes)
    for states, sites, size, rate in zoned(zoneout.rates, layers, directions, sizes):
        kept = _keep(zoneout.seed, sites, rows, step, size, rate)
        for k, one in zip(states, kept.bitwise_not_().chunk(len(states)), strict=True):
            stay[k] = one
    return stay, ()


#: Of so many rows their places are kept for the next call, which takes 20 us to make them.
_KEPT = 2**16


def _positions(T: int, B: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The step and the sequence of each row of a dense input."""
    step = torch.arange(T, device=device).repeat_interleave(B)
    return step, torch.arange(B, device=device).repeat(T)


@lru_cache(maxsize=8)
def _kept_positions(T: int, B: int) -> tuple[Tensor, Tensor]:
    return _positions(T, B, "cpu")


def _in_order(count: int, like: Tensor) -> Tensor:
    """The names of so many rows, that are plainly numbered."""
    if like.is_cpu and count <= _KEPT and modes.is_ordinary(like):
        return _kept_positions(1, count)[1]
    return torch.arange(count, device=like.device)


def site(kind: int, layer: int, direction: int = 0) -> int:
    """The counter's word for what is masked, 16 bits."""
    return kind | direction << 3 | layer << 4


def _sites(kind: int, layers: int, directions: int) -> list[int]:
    """Of all layers and directions."""
    return [site(kind, layer, d) for layer in range(layers) for d in range(directions)]


def seed_of_call(training: bool, seed: Tensor | int | None, like: Tensor) -> Tensor | None:
    """The seed that is given, or a new one; None outside of training. like: see ``draw_seed``."""
    if not training:
        return None
    if seed is None:
        return _draw_seed(like)
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, device="cpu")


def of_part(seed: Tensor | None, part: int) -> Tensor | None:
    """The seed of a part that is a stack of its own, another for each; no caller's small number."""
    return None if seed is None else seed ^ (part + 1 << 48)


def of_input(
    seed: Tensor, layer: int, ids: Tensor, width: int, p: float, dtype: torch.dtype
) -> Tensor:
    """(B, width), of a layer's input."""
    return _scaled(_keep(seed, [site(INPUT, layer)], ids, None, width, p), p, dtype)[0]


def apply(stack: Stack, rates: Rates, seed: Tensor | int | None, ids: Tensor) -> None:
    """Give a stack its masks. ids: (B,), in the order of the caller's batch."""
    request = stack.request
    seed = seed_of_call(request.training, seed, ids)
    if rates.zoneout:
        stack.zoneout = Zoneout(rates.zoneout, seed, ids)
    if seed is not None:
        dtype = stack.data.dtype
        stack.h_mask, stack.input_masks, stack.weights = _drawn(
            request, rates, seed, ids, stack.weights, stack.P, dtype
        )


def given_plainly(
    request: Request, rates: Rates, x: Tensor, weights: tuple[Tensor, ...]
) -> tuple[Given, tuple[Tensor, ...]]:
    """What a plain call of x (T, B, I) is given, and its weights: as :func:`apply` masks a stack,
    with a seed of the call."""
    _, H, P = sizes_of(weights, request.definition)
    seed = seed_of_call(request.training, None, x)
    h_mask, input_masks, masked = None, None, weights
    if seed is not None and rates.drop:
        ids = _in_order(x.shape[1], x)
        h_mask, input_masks, own = _drawn(request, rates, seed, ids, weights, P, x.dtype)
        masked = tuple(own)
    if not rates.zoneout:
        return Given((), tuple(input_masks or ()), None, h_mask), masked
    zoneout = Zoneout(rates.zoneout, seed, None)
    sizes = (P, *(H,) * len(request.definition.other_states))
    stay, part = stays(zoneout, range(request.layers), request.directions, x, None, sizes)
    return Given((), tuple(input_masks or ()), None, h_mask, tuple(stay), part), masked


def _drawn(
    request: Request,
    rates: Rates,
    seed: Tensor,
    ids: Tensor,
    weights: Sequence[Tensor],
    P: int,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Sequence[Tensor] | None, Sequence[Tensor]]:
    """The mask of h and those of the layers' inputs, where there are, and the weights, masked."""
    h_mask, input_masks = None, None
    if p := rates.recurrent_dropout:
        sites = _sites(RECURRENT, request.layers, request.directions)
        h_mask = _scaled(_keep(seed, sites, ids, None, P, p), p, dtype)
    if p := rates.input_dropout:
        input_masks = [
            of_input(seed, layer, ids, width, p, dtype)
            for layer, width in enumerate(_input_widths(request, weights))
        ]
    if p := rates.weight_dropout:
        given = ways(request, weights)
        sites = _sites(WEIGHT, request.layers, request.directions)
        w_hh: list[Any] = [way.w_hh for way in given]
        rows = torch.arange(w_hh[0].shape[0], device=ids.device)
        masks = _scaled(_keep(seed, sites, rows, None, P, p), p, w_hh[0].dtype)
        masked = [
            way._replace(w_hh=w * mask)
            for way, w, mask in zip(given, w_hh, masks.unbind(0), strict=True)
        ]
        weights = [w for way in masked for w in way.given()]
    return h_mask, input_masks, weights


@unrecorded
def _input_widths(request: Request, weights: Sequence[Tensor]) -> list[int]:
    """Of each layer."""
    return [way.w_ih.shape[1] for way in ways(request, weights)[:: request.directions]]


def mask_input(x: Tensor, mask: Tensor, batch_sizes: Tensor | None) -> Tensor:
    """x with the same units of a sequence dropped at every step. mask: (B, I)."""
    mask = mask.to(x.dtype)
    if batch_sizes is None:
        return x * mask
    _, sequence = packed_positions(batch_sizes, x.shape[0], mask.shape[0])
    return x * mask.index_select(0, sequence.to(x.device))


def _keep(seed, sites, ids, steps, units, p) -> Tensor:
    function = torch.ops.fastseq.keep if torch.compiler.is_compiling() else keep
    return function(seed, sites, ids, steps, units, p)


def _draw_seed(like: Tensor) -> Tensor:
    return (torch.ops.fastseq.draw_seed if torch.compiler.is_compiling() else draw_seed)(like)


def _scaled(kept: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """What is kept, times 1 / (1 - p)."""
    return kept.to(dtype).mul_(1 / (1 - p) if p < 1 else 0.0)
