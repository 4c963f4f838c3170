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

from .declaration import Cell, Phase
from .elman import RNN_RELU, RNN_SIGMOID, RNN_TANH
from .gru import GRU, GRU_RESET_BEFORE, MGU
from .indrnn import INDRNN, INDRNN_TANH, LEAKY_INTEGRATOR
from .lstm import COUPLED_LSTM, LSTM, PEEPHOLE_LSTM
from .text import WORDS, arguments, bind, fingerprint

CELLS: dict[str, Cell] = {
    cell.name: cell
    for cell in (
        *(RNN_TANH, RNN_RELU, RNN_SIGMOID),
        *(LSTM, PEEPHOLE_LSTM, COUPLED_LSTM),
        *(GRU, GRU_RESET_BEFORE, MGU),
        *(INDRNN, INDRNN_TANH, LEAKY_INTEGRATOR),
    )
}

#: What each name has stood for in this process. Kernels and choices are kept by name.
_named = dict(CELLS)
_LIBRARY = frozenset(CELLS)


def register(cell: Cell) -> Cell:
    """Let the backends run a cell of your own, by its name; the cell.

    The kernels of Numba and Triton are made from its declaration, and so are the reference and the
    eager form. Raises ValueError where the name is taken.
    """
    if cell.name in CELLS:
        raise ValueError(f"cell {cell.name!r}: there is one of this name; choose another")
    if _named.setdefault(cell.name, cell) != cell:
        raise ValueError(
            f"cell {cell.name!r}: the name stood for another cell in this process, whose kernels "
            "are kept by name; choose another"
        )
    CELLS[cell.name] = cell
    return cell


def named(name: str) -> Cell:
    """The cell of a name, which an operator of a program that was exported may give.

    Raises LookupError where there is none.
    """
    if name not in CELLS:
        raise LookupError(
            f"cell {name!r}: not defined in this process; import the module whose "
            f"@fastseq.cell defines {name.rpartition('_')[0] or name}, with the same equations"
        )
    return CELLS[name]


def unregister(name: str) -> None:
    """Take a cell of your own out again. Raises ValueError for any other."""
    if name not in CELLS or name in _LIBRARY:
        raise ValueError(f"cell {name!r}: expected the name of a cell that register() was given")
    del CELLS[name]


__all__ = [
    "CELLS",
    "COUPLED_LSTM",
    "GRU",
    "GRU_RESET_BEFORE",
    "INDRNN",
    "INDRNN_TANH",
    "LEAKY_INTEGRATOR",
    "LSTM",
    "MGU",
    "PEEPHOLE_LSTM",
    "RNN_RELU",
    "RNN_SIGMOID",
    "RNN_TANH",
    "WORDS",
    "Cell",
    "Phase",
    "arguments",
    "bind",
    "fingerprint",
    "named",
    "register",
    "unregister",
]
