"""fastseq: fast recurrent layers that take the place of torch.nn's."""

from .nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell, replace, restore
from .ops.functional import gru, lstm, rnn

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "gru",
    "lstm",
    "replace",
    "restore",
    "rnn",
]
