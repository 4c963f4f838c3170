"""Floor 0: the equations, forward and backward of one time step, pointwise, in plain Python.

The letters, here and everywhere:

==  ===========================================================
T   time steps
B   batch: independent sequences
I   input size
H   hidden size
P   size of the hidden state: the projection's, else H
G   gates
D   directions
R   recurrences in one call (directions, members of an ensemble)
N   sum of the sequence lengths: rows of a packed sequence
==  ===========================================================
"""

from .declaration import Cell, Phase, arguments, bind, fingerprint
from .elman import INDRNN, RNN_RELU, RNN_TANH
from .gru import GRU, GRU_RESET_BEFORE
from .lstm import LSTM

CELLS: dict[str, Cell] = {
    cell.name: cell for cell in (RNN_TANH, RNN_RELU, LSTM, GRU, GRU_RESET_BEFORE, INDRNN)
}

__all__ = [
    "CELLS",
    "GRU",
    "GRU_RESET_BEFORE",
    "INDRNN",
    "LSTM",
    "RNN_RELU",
    "RNN_TANH",
    "Cell",
    "Phase",
    "arguments",
    "bind",
    "fingerprint",
]
