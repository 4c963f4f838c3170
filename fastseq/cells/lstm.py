"""Long short-term memory (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al.
2000), in PyTorch's gate order i, f, g, o; its gates with peepholes (Gers and Schmidhuber 2000), and
with the input gate coupled to the forget gate (Greff et al. 2017).
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


def peephole_lstm_forward(a_i, a_f, a_g, a_o, ci, cf, co, c_prev):
    i = sigmoid(a_i + ci * c_prev)
    f = sigmoid(a_f + cf * c_prev)
    g = tanh(a_g)
    c = f * c_prev + i * g
    o = sigmoid(a_o + co * c)
    h = o * tanh(c)
    return h, c, i, f, g, o


def peephole_lstm_backward(dh, dc, i, f, g, o, c, ci, cf, co, c_prev):
    tanh_c = tanh(c)
    da_o = dh * tanh_c * dsigmoid(o)
    dc_total = dc + dh * o * dtanh(tanh_c) + da_o * co
    da_i = dc_total * g * dsigmoid(i)
    da_f = dc_total * c_prev * dsigmoid(f)
    da_g = dc_total * i * dtanh(g)
    dci = da_i * c_prev
    dcf = da_f * c_prev
    dco = da_o * c
    dc_prev = dc_total * f + da_i * ci + da_f * cf
    return da_i, da_f, da_g, da_o, dci, dcf, dco, dc_prev


def coupled_lstm_forward(a_f, a_g, a_o, c_prev):
    f = sigmoid(a_f)
    g = tanh(a_g)
    o = sigmoid(a_o)
    c = g + f * (c_prev - g)
    h = o * tanh(c)
    return h, c, f, g, o


def coupled_lstm_backward(dh, dc, f, g, o, c, c_prev):
    tanh_c = tanh(c)
    dc_total = dc + dh * o * dtanh(tanh_c)
    dc_prev = dc_total * f
    da_f = dc_total * (c_prev - g) * dsigmoid(f)
    da_g = (dc_total - dc_prev) * dtanh(g)
    da_o = dh * tanh_c * dsigmoid(o)
    return da_f, da_g, da_o, dc_prev


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

PEEPHOLE_LSTM = Cell(
    name="peephole_lstm",
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    saved=("i", "f", "g", "o"),
    phases=(
        Phase(
            forward=peephole_lstm_forward,
            returns=("h", "c", "i", "f", "g", "o"),
            backward=peephole_lstm_backward,
            gradients=("da_i", "da_f", "da_g", "da_o", "dci", "dcf", "dco", "dc_prev"),
        ),
    ),
    unit_parameters=("ci", "cf", "co"),
    source="Gers and Schmidhuber 2000, Recurrent Nets that Time and Count",
)

COUPLED_LSTM = Cell(
    name="coupled_lstm",
    gates=("f", "g", "o"),
    states=("h", "c"),
    saved=("f", "g", "o"),
    phases=(
        Phase(
            forward=coupled_lstm_forward,
            returns=("h", "c", "f", "g", "o"),
            backward=coupled_lstm_backward,
            gradients=("da_f", "da_g", "da_o", "dc_prev"),
        ),
    ),
    source="Greff et al. 2017, LSTM: A Search Space Odyssey",
)
