"""Tools for training: see :mod:`fastseq.nn.flow`."""

from .nn.flow import gradient_flow, plot_gradient_flow

__all__ = ["gradient_flow", "plot_gradient_flow"]
