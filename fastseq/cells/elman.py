"""The simple recurrent network (Elman 1990) with tanh, ReLU or the logistic function."""

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


def rnn_sigmoid_forward(a_h):
    h = sigmoid(a_h)
    return (h,)


def rnn_sigmoid_backward(dh, h):
    da_h = dh * dsigmoid(h)
    return (da_h,)


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

RNN_SIGMOID = Cell(
    name="rnn_sigmoid",
    gates=("h",),
    states=("h",),
    saved=("h",),
    phases=(
        Phase(
            forward=rnn_sigmoid_forward,
            returns=("h",),
            backward=rnn_sigmoid_backward,
            gradients=("da_h",),
        ),
    ),
    source="Elman 1990, Finding Structure in Time; Mikolov et al. 2010, Recurrent Neural Network "
    "Based Language Model",
)
