"""The simple recurrent network (Elman 1990) with tanh or ReLU, and its diagonal relative IndRNN
(Li et al. 2018), whose units see only their own past.
"""

# ruff: noqa: F821  (the free names are bound by each backend)
from .declaration import Cell, Phase


def rnn_tanh_forward(a_h):
    h = tanh(a_h)
    return (h,)


def rnn_tanh_backward(dh, h):
    da_h = dh * dtanh(h)
    return (da_h,)


def rnn_relu_forward(a_h):
    h = relu(a_h)
    return (h,)


def rnn_relu_backward(dh, h):
    da_h = dh * drelu(h)
    return (da_h,)


def indrnn_forward(x_h, u, h_prev):
    h = relu(x_h + u * h_prev)
    return (h,)


def indrnn_backward(dh, h, u, h_prev):
    dx_h = dh * drelu(h)
    du = dx_h * h_prev
    dh_prev = dx_h * u
    return dx_h, du, dh_prev


RNN_TANH = Cell(
    name="rnn_tanh",
    gates=("h",),
    states=("h",),
    saved=("h",),
    phases=(
        Phase(
            forward=rnn_tanh_forward,
            returns=("h",),
            backward=rnn_tanh_backward,
            gradients=("da_h",),
        ),
    ),
    source="Elman 1990, Finding Structure in Time",
)

RNN_RELU = Cell(
    name="rnn_relu",
    gates=("h",),
    states=("h",),
    saved=("h",),
    phases=(
        Phase(
            forward=rnn_relu_forward,
            returns=("h",),
            backward=rnn_relu_backward,
            gradients=("da_h",),
        ),
    ),
    source="Elman 1990, Finding Structure in Time; Le et al. 2015 for ReLU",
)

INDRNN = Cell(
    name="indrnn",
    gates=("h",),
    states=("h",),
    saved=("h",),
    phases=(
        Phase(
            forward=indrnn_forward,
            returns=("h",),
            backward=indrnn_backward,
            gradients=("dx_h", "du", "dh_prev"),
        ),
    ),
    unit_parameters=("u",),
    source="Li et al. 2018, Independently Recurrent Neural Network (IndRNN)",
)
