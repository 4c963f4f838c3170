"""Between torch.nn's modules and fastseq's, sharing the parameters."""

from __future__ import annotations

from torch import nn


def to_torch(module: nn.Module) -> nn.Module:
    """The torch.nn module of the same kind, with the very parameters, hooks and mode of ``module``."""
    from . import cells, layers

    pairs = {
        layers.RNN: nn.RNN,
        layers.LSTM: nn.LSTM,
        layers.GRU: nn.GRU,
        cells.RNNCell: nn.RNNCell,
        cells.LSTMCell: nn.LSTMCell,
        cells.GRUCell: nn.GRUCell,
    }
    for ours, theirs in pairs.items():
        if isinstance(module, ours):
            twin = theirs.__new__(theirs)
            twin.__dict__.update(module.__dict__)
            for own in ("backend", "memory"):
                twin.__dict__.pop(own, None)
            return twin
    raise TypeError(f"to_torch: torch.nn has no counterpart of {type(module).__name__}")
