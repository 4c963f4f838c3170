"""The rule by which numbers are judged before their times are believed.

tests/helpers/rules.py has the same rule; a test holds the two to each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Further off than this part of the largest number, a time says nothing.
GROSS = 0.2
#: The grain of a number of TF32, which float32's products may be made of.
TF32 = 2.0**-10
#: Of the largest number in float64, where the truth is as rounded as what it judges.
DOUBLE = 1e-12


def errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(rms, max) of the difference."""
    difference = value.double() - truth.double()
    return float(difference.square().mean().sqrt()), float(difference.abs().max())


def wrong(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> str:
    """What is grossly wrong with our numbers; '' where nothing is."""
    for k, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.numel() == 0:
            continue
        bad = int((~torch.isfinite(mine)).sum())
        if bad:
            return f"numbers: {bad} of {mine.numel()} in output {k} are not finite"
        scale, off = float(other.abs().max()), errors(mine, other)[1]
        if off > GROSS * scale + 1e-3:
            return f"numbers: output {k} is off by {off:.2g}, where the largest is {scale:.2g}"
    return ""


def too_far(
    ours: Sequence[Tensor],
    theirs: Sequence[Tensor],
    truth: Sequence[Tensor],
    names: Sequence[str] = (),
    eps: float | None = None,
) -> str:
    """How our numbers are further from the truth than the rule allows, given theirs in the same
    type; '' where they are not. eps: of the products' operands, where they are coarser."""
    for k, (mine, other, exact) in enumerate(zip(ours, theirs, truth, strict=True)):
        name = names[k] if names else f"output {k}"
        if mine.shape != exact.shape:
            return f"numbers: {name}: shape {tuple(mine.shape)}, torch.nn's is {tuple(exact.shape)}"
        if mine.numel() == 0:
            continue
        scale = float(exact.abs().max())
        found, allowed = errors(mine, exact), [DOUBLE * scale] * 2
        if mine.dtype is not torch.float64:
            grain = 4 * (eps or torch.finfo(mine.dtype).eps) * scale
            allowed = [2 * e + grain for e in errors(other, exact)]
        for kind, got, limit in zip(("rms", "max"), found, allowed, strict=True):
            if not got <= limit:
                return f"numbers: {name}, {kind} error {got:.2g} where {limit:.2g} is allowed"
    return ""
