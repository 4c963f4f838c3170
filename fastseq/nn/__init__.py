"""Floor 4: modules. Layers, directions, packed sequences, dropout, streaming state."""

from . import scripting  # noqa: F401  (torch tells it of modules that are registered)
from .cells import GRUCell, LSTMCell, RNNCell
from .container import Stacked
from .convert import Report, replace, restore
from .counterparts import to_torch
from .crf import CRF
from .explain import explain
from .layers import GRU, LSTM, RNN
from .literature import (
    MGU,
    CoupledLSTM,
    CoupledLSTMCell,
    IndRNN,
    IndRNNCell,
    MGUCell,
    PeepholeLSTM,
    PeepholeLSTMCell,
)
from .options import CellOptions, LayerOptions, set_options
from .own import OwnCell, OwnLayer, cell
from .pooling import Pooling
from .recurrent import Recurrent
from .scrn import SCRN, SCRNCell
from .sequence import Decoder, Encoder, SequenceAutoencoder
from .streaming import StackedStreaming, Streaming, streaming

__all__ = [
    "CRF",
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SCRN",
    "CellOptions",
    "CoupledLSTM",
    "CoupledLSTMCell",
    "Decoder",
    "Encoder",
    "GRUCell",
    "IndRNN",
    "IndRNNCell",
    "LSTMCell",
    "LayerOptions",
    "MGUCell",
    "OwnCell",
    "OwnLayer",
    "PeepholeLSTM",
    "PeepholeLSTMCell",
    "Pooling",
    "RNNCell",
    "Recurrent",
    "Report",
    "SCRNCell",
    "SequenceAutoencoder",
    "Stacked",
    "StackedStreaming",
    "Streaming",
    "cell",
    "explain",
    "replace",
    "restore",
    "set_options",
    "streaming",
    "to_torch",
]
