"""Pooling over time: see :mod:`fastseq.nn.pooling`."""

from .nn.pooling import (
    Pooling,
    average_pool,
    dynamic_k_max_pool,
    k_max_pool,
    max_pool,
    region_max_pool,
)

__all__ = [
    "Pooling",
    "average_pool",
    "dynamic_k_max_pool",
    "k_max_pool",
    "max_pool",
    "region_max_pool",
]
