"""fastseq's layers as instances of torch.nn's: see :mod:`fastseq.nn.compat`."""

from .nn.compat import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
