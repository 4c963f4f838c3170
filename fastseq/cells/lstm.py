"""Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al.
2000), in PyTorch's gate order i, f, g, o.
"""

# ruff: noqa: F821  (the free names are bound by each backend)
from .declaration import Cell, Phase


def lstm_forward(a_i, a_f, a_g, a_o, c_prev):
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    g = tanh(a_g)
    o = sigmoid(a_o)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return h, c, i, f, g, o


def lstm_backward(dh, dc, i, f, g, o, c, c_prev):
    tanh_c = tanh(c)
    dc_total = dc + dh * o * dtanh(tanh_c)
    da_i = dc_total * g * dsigmoid(i)
    da_f = dc_total * c_prev * dsigmoid(f)
    da_g = dc_total * i * dtanh(g)
    da_o = dh * tanh_c * dsigmoid(o)
    dc_prev = dc_total * f
    return da_i, da_f, da_g, da_o, dc_prev


LSTM = Cell(
    name="lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    saved=("i", "f", "g", "o"),
    phases=(
        Phase(
            forward=lstm_forward,
            returns=("h", "c", "i", "f", "g", "o"),
            backward=lstm_backward,
            gradients=("da_i", "da_f", "da_g", "da_o", "dc_prev"),
        ),
    ),
    source="Hochreiter and Schmidhuber 1997, Long Short-Term Memory; Gers et al. 2000",
)
