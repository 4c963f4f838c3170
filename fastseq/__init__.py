"""fastseq: fast recurrent layers that take the place of torch.nn's."""

from . import compat, init
from .backends.choice import backends
from .backends.faults import check
from .nn import (
    GRU,
    LSTM,
    MGU,
    RNN,
    SCRN,
    CoupledLSTM,
    CoupledLSTMCell,
    GRUCell,
    IndRNN,
    IndRNNCell,
    LSTMCell,
    MGUCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
    RNNCell,
    SCRNCell,
    Stacked,
    cell,
    explain,
    replace,
    restore,
    set_options,
    streaming,
)
from .ops.functional import coupled_lstm, gru, indrnn, lstm, mgu, peephole_lstm, rnn, scrn
from .switch import install, uninstall

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SCRN",
    "CoupledLSTM",
    "CoupledLSTMCell",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "MGUCell",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "RNNCell",
    "SCRNCell",
    "Stacked",
    "backends",
    "cell",
    "check",
    "compat",
    "coupled_lstm",
    "explain",
    "gru",
    "indrnn",
    "init",
    "install",
    "lstm",
    "mgu",
    "peephole_lstm",
    "replace",
    "restore",
    "rnn",
    "scrn",
    "set_options",
    "streaming",
    "uninstall",
]
