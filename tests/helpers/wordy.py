"""A cell of every word that no cell of the library's has, without a backward text: an LSTM whose
gates are exponential, held in range by their running maximum, and whose output is normalised.

Beyond the last unit, where all is 0, its output is 0 times infinity.
"""

# ruff: noqa: F821  (the free names of a text are bound by each backend)
from contextlib import contextmanager
from functools import cache

from fastseq.cells import Cell, Phase, register, unregister


def wordy_forward(a_i, a_f, a_z, c_prev, m_prev, u):
    before = logsigmoid(a_f) + m_prev
    m = maximum(before, a_i)
    i = exp(a_i - m)
    f = exp(before - m)
    z = tanh(a_z)
    c = f * c_prev + i * z
    size = sqrt(u * u + c * c)
    h = c * reciprocal(size)
    return h, c, m, i, f, z


@cache
def wordy() -> Cell:
    return Cell(
        name="wordy",
        gates=("i", "f", "z"),
        states=("h", "c", "m"),
        saved=("i", "f", "z", "a_i", "a_f"),
        phases=(Phase(wordy_forward, ("h", "c", "m", "i", "f", "z")),),
        unit_parameters=("u",),
        source="made up for the tests",
    )


@contextmanager
def registered():
    cell = register(wordy())
    try:
        yield cell
    finally:
        unregister("wordy")
