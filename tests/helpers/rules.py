"""The rule by which every test judges numbers, and allocations that cannot be trusted.

    err(a) = (rms(a - truth), max|a - truth|)
    pass  <=>  finite  and  err(ours) <= 2 * err(torch, same dtype) + 4 * eps(dtype) * max|truth|

For float64 the truth is as rounded as what it judges, and the rule is 1e-12 of max|truth|. The
numbers are never loosened.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch

DOUBLE = 1e-12
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def error(value, truth):
    """(rms, max) of the difference; (0, 0) for nothing."""
    if truth.numel() == 0:
        return 0.0, 0.0
    difference = value.detach().double() - truth.detach().double()
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def check_close(ours, torchs, truth, dtype, what):
    """``ours`` is as near to ``truth`` as the rule asks, given the same numbers from torch.

    truth: in float64. torchs: the same from torch in ``dtype``; for float64 it may be None.
    Returns the error as a share of what is allowed.
    """
    __tracebackhide__ = True
    if ours is None or truth is None:
        pytest.fail(f"{what}: got {type(ours).__name__}, truth {type(truth).__name__}")
    if ours.dtype != dtype:
        pytest.fail(f"{what}: expected {dtype}, got {ours.dtype}")
    if ours.shape != truth.shape:
        pytest.fail(f"{what}: expected shape {tuple(truth.shape)}, got {tuple(ours.shape)}")
    if not bool(torch.isfinite(ours).all()):
        bad = int((~torch.isfinite(ours)).sum())
        pytest.fail(f"{what}: {bad} of {ours.numel()} values are not finite, {dtype}")
    scale = float(truth.detach().abs().max()) if truth.numel() else 0.0
    mine = error(ours, truth)
    if dtype is torch.float64:
        theirs = (0.0, 0.0)
        allowed = (DOUBLE * scale, DOUBLE * scale)
    else:
        theirs = error(torchs, truth)
        grain = 4 * torch.finfo(dtype).eps * scale
        allowed = tuple(2 * e + grain for e in theirs)
    share = 0.0
    for kind, got, their, limit in zip(("rms", "max"), mine, theirs, allowed, strict=True):
        share = max(share, got / limit if limit else 0.0)
        if not got <= limit:
            ours, truth = ours.detach(), truth.detach()
            worst = int((ours.double() - truth.double()).abs().argmax())
            place = tuple(int(k) for k in np.unravel_index(worst, truth.shape))
            pytest.fail(
                f"{what}: {kind} error {got:.3e} > {limit:.3e} allowed (torch's {their:.3e}, "
                f"max|truth| {scale:.3e}, {dtype}); worst at {place}: "
                f"{float(ours.flatten()[worst])!r}, truth {float(truth.flatten()[worst])!r}"
            )
    return share


def check_all(ours, torchs, truth, dtype, what=""):
    """``check_close`` on each of three mappings' values; a None must be None in all. Returns the
    greatest share of what is allowed."""
    __tracebackhide__ = True
    share = 0.0
    assert ours.keys() == truth.keys(), f"{what}: {sorted(ours)} against {sorted(truth)}"
    for name, value in truth.items():
        if value is None and ours[name] is None:
            continue
        theirs = None if torchs is None else torchs[name]
        share = max(share, check_close(ours[name], theirs, value, dtype, f"{what} {name}".strip()))
    return share


def check_alike(ours, other, what=""):
    """Two ways to one number in one type: the other way stands for torch and for the truth, so what
    the rule leaves is 4 eps of the largest; in float64 1e-12 of it."""
    __tracebackhide__ = True
    if other.dtype not in _FLOATS:
        assert torch.equal(ours, other), what
        return
    check_close(ours, other, other.double(), other.dtype, what)


def same_bits(a, b):
    """NaN equals NaN, and 0 is not -0."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = kinds[a.element_size()]
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.detach().contiguous().view(kind), b.detach().contiguous().view(kind))
    )


@contextmanager
def poisoned():
    """Memory that torch and NumPy hand out uninitialised is full of NaN (integers: their maximum).

    Buffers that compiled code takes by itself are out of reach.
    """

    def poison(function):
        def allocate(*args, **kwargs):
            array = function(*args, **kwargs)
            if array.dtype.kind == "f":
                array.fill(np.nan)
            elif array.dtype.kind in "iu":
                array.fill(np.iinfo(array.dtype).max)
            return array

        return allocate

    before = torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    with pytest.MonkeyPatch.context() as patch:
        for name in ("empty", "empty_like"):
            patch.setattr(np, name, poison(getattr(np, name)))
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            torch.utils.deterministic.fill_uninitialized_memory = fills
