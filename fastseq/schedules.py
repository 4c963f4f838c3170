"""How the probability of teacher forcing falls while one trains, by the step of training.

Source: Bengio, Vinyals, Jaitly and Shazeer 2015, Scheduled Sampling for Sequence Prediction with
Recurrent Neural Networks, section 2.4.
"""

from __future__ import annotations

import math


def linear(step: float, slope: float, start: float = 1.0, least: float = 0.0) -> float:
    r""":math:`\max(\epsilon, k - c\,i)`, with k ``start``, c ``slope`` and epsilon ``least``."""
    _check_step(step)
    if not 0 <= slope < math.inf:
        raise ValueError(f"slope: expected a finite number of at least 0, got {slope}")
    if not 0 <= least <= start <= 1:
        raise ValueError(f"start: expected 0 <= least <= start <= 1, got {least} and {start}")
    return max(least, start - slope * step)


def exponential(step: float, k: float) -> float:
    r""":math:`k^i` with 0 < k < 1."""
    _check_step(step)
    if not 0 < k < 1:
        raise ValueError(f"k: expected a number between 0 and 1, got {k}")
    return k**step


def inverse_sigmoid(step: float, k: float) -> float:
    r""":math:`k / (k + \exp(i / k))` with k >= 1: about 1 at first, and one half at
    :math:`i = k \ln k`."""
    _check_step(step)
    if not 1 <= k < math.inf:
        raise ValueError(f"k: expected a finite number of at least 1, got {k}")
    small = math.exp(-step / k)  # which cannot overflow
    return k * small / (k * small + 1)


def _check_step(step: float) -> None:
    if not 0 <= step < math.inf:
        raise ValueError(f"step: expected a finite number of at least 0, got {step}")
