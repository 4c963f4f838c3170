"""Cells whose units see only their own past, so that a step has no product: IndRNN (Li et al. 2018)
with ReLU or tanh, and the leaky units of SCRN's context (Mikolov et al. 2014).
"""

# ruff: noqa: F821  (the free names are bound by each backend)
from .declaration import Cell, Phase


def indrnn_forward(x_h, u, h_prev):
    h = relu(x_h + u * h_prev)
    return (h,)


def indrnn_backward(dh, h, u, h_prev):
    dx_h = dh * drelu(h)
    du = dx_h * h_prev
    dh_prev = dx_h * u
    return dx_h, du, dh_prev


def indrnn_tanh_forward(x_h, u, h_prev):
    h = tanh(x_h + u * h_prev)
    return (h,)


def indrnn_tanh_backward(dh, h, u, h_prev):
    dx_h = dh * dtanh(h)
    du = dx_h * h_prev
    dh_prev = dx_h * u
    return dx_h, du, dh_prev


def leaky_integrator_forward(x_h, u, h_prev):
    v = h_prev - x_h
    h = x_h + u * v
    return h, v


def leaky_integrator_backward(dh, v, u):
    dh_prev = dh * u
    dx_h = dh - dh_prev
    du = dh * v
    return dx_h, du, dh_prev


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

INDRNN_TANH = Cell(
    name="indrnn_tanh",
    gates=("h",),
    states=("h",),
    saved=("h",),
    phases=(
        Phase(
            forward=indrnn_tanh_forward,
            returns=("h",),
            backward=indrnn_tanh_backward,
            gradients=("dx_h", "du", "dh_prev"),
        ),
    ),
    unit_parameters=("u",),
    source="Li et al. 2018, Independently Recurrent Neural Network (IndRNN)",
)

#: h_t = (1 - u) x_t + u h_{t-1}: x_t's exponentially weighted mean.
LEAKY_INTEGRATOR = Cell(
    name="leaky_integrator",
    gates=("h",),
    states=("h",),
    saved=("v",),
    phases=(
        Phase(
            forward=leaky_integrator_forward,
            returns=("h", "v"),
            backward=leaky_integrator_backward,
            gradients=("dx_h", "du", "dh_prev"),
        ),
    ),
    unit_parameters=("u",),
    scans=True,
    source="Mikolov et al. 2014, Learning Longer Memory in Recurrent Neural Networks, "
    "the context units",
)
