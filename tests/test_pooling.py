"""Pooling over time, against loops over sequences and features written from the equations."""

import math
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

from fastseq import pooling

T, B, F = 7, 6, 3
LENGTHS = torch.tensor([7, 0, 1, 3, 6, 2])
CUTS = torch.tensor([[3, 0, 1, 2, 7, 1], [1, 2, 0, 2, 4, 1]])


def columns(x, lengths):
    """(sequence, feature, its values as a list)."""
    for b, s in enumerate(lengths.tolist()):
        for j in range(x.shape[2]):
            yield b, j, x[:s, b, j].tolist()


def greatest_in_order(values, k):
    places = sorted(range(len(values)), key=lambda t: (-values[t], t))[:k]
    return [values[t] for t in sorted(places)]


def filled(values, k):
    return [*values, *[0.0] * (k - len(values))]


def by_hand(kind, x, lengths):
    """(B, F, k)"""
    out = [[[] for _ in range(x.shape[2])] for _ in range(x.shape[1])]
    for b, j, values in columns(x, lengths):
        s = len(values)
        if kind == "max":
            found = [max(values, default=0.0)]
        elif kind == "average":
            found = [sum(values) / s if s else 0.0]
        elif kind == "k_max":
            found = filled(greatest_in_order(values, 3), 3)
        elif kind == "dynamic":
            k = max(2, math.ceil((3 - 1) / 3 * s))
            found = filled(greatest_in_order(values, k), math.ceil((3 - 1) / 3 * x.shape[0]))
        elif kind == "regions":
            parts = [[v for t, v in enumerate(values) if t * 3 // s == q] for q in range(3)]
            found = [max(part, default=0.0) for part in parts]
        else:
            first, second = sorted(CUTS[:, b].tolist())
            parts = values[:first], values[first:second], values[second:]
            found = [max(part, default=0.0) for part in parts]
        out[b][j] = found
    return torch.tensor(out, dtype=x.dtype)


POOLS = {
    "max": lambda x, *a, **k: pooling.max_pool(x, *a, **k),
    "average": lambda x, *a, **k: pooling.average_pool(x, *a, **k),
    "k_max": lambda x, *a, **k: pooling.k_max_pool(x, 3, *a, **k),
    "dynamic": lambda x, *a, **k: pooling.dynamic_k_max_pool(x, 1, 3, 2, *a, **k)[0],
    "regions": lambda x, *a, **k: pooling.region_max_pool(x, 3, *a, **k),
    "cuts": lambda x, *a, **k: pooling.region_max_pool(x, CUTS, *a, **k),
}
every = pytest.mark.parametrize("kind", POOLS)


def draw():
    return torch.randn(T, B, F, dtype=torch.float64)


def as_by_hand(pooled):
    """(B, F, k) from (B, F) or (k, B, F)."""
    return pooled[..., None] if pooled.dim() == 2 else pooled.permute(1, 2, 0)


@every
@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "ragged"])
def test_what_is_pooled(kind, lengths):
    x = draw().round(decimals=1)  # with equal values
    full = torch.full((B,), T) if lengths is None else lengths
    found = as_by_hand(POOLS[kind](x, lengths))
    torch.testing.assert_close(found, by_hand(kind, x, full), rtol=1e-12, atol=1e-12)


@every
def test_padding_has_no_part(kind):
    x = draw()
    for b, s in enumerate(LENGTHS.tolist()):
        x[s:, b] = torch.nan
    x.requires_grad_()
    pooled = POOLS[kind](x, LENGTHS)
    (dx,) = torch.autograd.grad(pooled.sum(), x)
    assert pooled.isfinite().all() and dx.isfinite().all()
    assert not as_by_hand(pooled)[1].any()  # of length 0
    inside = torch.arange(T)[:, None] < LENGTHS
    assert not dx[~inside].any() and dx[inside].any()


@every
def test_derivatives(kind):
    x = draw().requires_grad_()
    torch.autograd.gradcheck(lambda x: POOLS[kind](x, LENGTHS), x)
    torch.autograd.gradgradcheck(lambda x: POOLS[kind](x, LENGTHS), x)


@every
def test_every_form_of_input(kind):
    x = draw()
    lengths = LENGTHS.clamp(min=1)
    plain = POOLS[kind](x, lengths)
    turned = POOLS[kind](x.transpose(0, 1), lengths.tolist(), batch_first=True)
    torch.testing.assert_close(turned if turned.dim() == 2 else turned.transpose(0, 1), plain)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.testing.assert_close(POOLS[kind](packed), plain)
    if kind != "cuts":
        torch.testing.assert_close(
            POOLS[kind](x[:, 0], batch_first=True), POOLS[kind](x[:, :1]).squeeze(-2)
        )
    empty = POOLS[kind](x[:, :0]) if kind != "cuts" else pooling.max_pool(x[:, :0], [])
    assert empty.shape[-2:] == (0, F)


@pytest.mark.full
@every
def test_compiled_in_one_graph(kind):
    x = draw()
    compiled = torch.compile(lambda x: POOLS[kind](x, LENGTHS), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), POOLS[kind](x, LENGTHS))


def test_of_many_equal_values_the_earlier_stand():
    x = torch.randint(3, (200, 2, F)).double()
    expected = [
        greatest_in_order(values, 90) for _, _, values in columns(x, torch.tensor([200] * 2))
    ]
    assert pooling.k_max_pool(x, 90).permute(1, 2, 0).flatten(0, 1).tolist() == expected


def test_more_than_there_is():
    x = draw()
    pooled = pooling.k_max_pool(x, 9)
    assert torch.equal(pooled[:T], x) and not pooled[T:].any() and pooled.shape == (9, B, F)


def test_values_that_are_minus_infinity_stand_before_padding():
    x = torch.tensor([[[-torch.inf]], [[1.0]], [[5.0]]])
    assert pooling.k_max_pool(x, 2, [2]).flatten().tolist() == [-torch.inf, 1.0]


def test_how_many_a_dynamic_pool_keeps():
    """A sentence of 10 words: 7 of it behind the first of three layers, 4, and k_top at the end."""
    x, lengths = torch.randn(12, 2, F), torch.tensor([10, 1])
    kept = []
    s = lengths
    for layer in (1, 2, 3):
        x, lengths = pooling.dynamic_k_max_pool(x, layer, 3, 3, lengths, s=s)
        kept.append((x.shape[0], lengths.tolist()))
    assert kept == [(7, [7, 1]), (4, [4, 1]), (3, [3, 1])]


def test_the_share_of_a_dynamic_pool_is_exact():
    """In floats (11 - 2) / 11 * 77 is rounded past a whole number."""
    assert math.ceil((11 - 2) / 11 * 77) == 64
    _, k = pooling.dynamic_k_max_pool(torch.zeros(77, 1), 2, 11, 1)
    assert k == 63


def test_the_module():
    x = draw()
    assert torch.equal(pooling.Pooling("max")(x, LENGTHS), pooling.max_pool(x, LENGTHS))
    for first in (False, True):
        pool = pooling.Pooling("k_max", 2, batch_first=first)
        y = pool(x.transpose(0, 1) if first else x, LENGTHS)
        parts = pooling.k_max_pool(x, 2, LENGTHS)
        assert torch.equal(y, torch.cat([parts[0], parts[1]], 1))
        assert pool(x[:, 0]).shape == (2 * F,)
    again = pickle.loads(pickle.dumps(pool))
    assert repr(again) == repr(pool) == "Pooling('k_max', 2, batch_first=True)"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda x: pooling.max_pool(x, [1]), ValueError, r"lengths: .*\(6,\), got \(1,\)"),
        (lambda x: pooling.max_pool(x, [8] * B), ValueError, "lengths: .* T = 7, got 8 to 8"),
        (lambda x: pooling.max_pool(x.int()), TypeError, "x: expected a floating type"),
        (lambda x: pooling.max_pool(x[0, 0]), ValueError, "x: expected .T, B, F., .* got 1-D"),
        (lambda x: pooling.average_pool(x[:0]), ValueError, "x: .* at least one step, got T = 0"),
        (lambda x: pooling.average_pool([1.0]), TypeError, "x: .* got list"),
        (lambda x: pooling.k_max_pool(x, 0), ValueError, "k: expected at least 1, got 0"),
        (lambda x: pooling.k_max_pool(x, 2.0), TypeError, "k: expected an int, got float"),
        (lambda x: pooling.dynamic_k_max_pool(x, 4, 3, 1), ValueError, "layer: .* 3, got 4"),
        (lambda x: pooling.dynamic_k_max_pool(x, 1, 3, 1, s=[-1] * B), ValueError, "s: .* got -1"),
        (lambda x: pooling.region_max_pool(x, True), TypeError, "regions: expected an int"),
        (lambda x: pooling.region_max_pool(x, CUTS[0]), ValueError, r"regions: .*\(r - 1, 6\)"),
        (lambda x: pooling.region_max_pool(x, CUTS / 2), TypeError, "regions: expected integers"),
        (lambda x: pooling.region_max_pool(x, CUTS - 9), ValueError, "regions: .* 0 to T = 7, got"),
        (lambda x: pooling.region_max_pool(x, CUTS + 8), ValueError, "regions: .* 0 to T = 7, got"),
        (lambda x: pooling.Pooling("mean"), ValueError, "kind: expected one of 'max'"),
        (lambda x: pooling.Pooling("max", 2), ValueError, "size: 'max' gives one vector"),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call(draw())


def test_numpy_counts_as_well():
    x = torch.randn(5, 2, 3)
    assert torch.equal(pooling.k_max_pool(x, np.int64(2)), pooling.k_max_pool(x, 2))
