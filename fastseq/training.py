"""Tools for training: see :mod:`fastseq.nn.truncated`, :mod:`fastseq.nn.flow` and
:mod:`fastseq.nn.vanishing`."""

from .nn.flow import gradient_flow, plot_gradient_flow
from .nn.truncated import Window, Windows, detach, tbptt
from .nn.vanishing import vanishing_gradient_regularizer

__all__ = [
    "Window",
    "Windows",
    "detach",
    "gradient_flow",
    "plot_gradient_flow",
    "tbptt",
    "vanishing_gradient_regularizer",
]
