"""Gated recurrent units: PyTorch's and cuDNN's form, with the reset gate after the product, and
the form of the paper (Cho et al. 2014), with the reset gate before it; and the minimal gated unit
(Zhou et al. 2016), whose one gate does the work of both.
"""

# ruff: noqa: F821  (the free names are bound by each backend)
from .declaration import Cell, Phase


def gru_forward(a_r, a_z, x_n, s_n, h_prev):
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    n = tanh(x_n + r * s_n)
    h = n + z * (h_prev - n)
    return h, r, z, n


def gru_backward(dh, r, z, n, s_n, h_prev):
    dx_n = (dh - dh * z) * dtanh(n)
    ds_n = dx_n * r
    da_r = dx_n * s_n * dsigmoid(r)
    da_z = dh * (h_prev - n) * dsigmoid(z)
    dh_prev = dh * z
    return da_r, da_z, dx_n, ds_n, dh_prev


def gru_reset_before_gates_forward(a_r, a_z, h_prev):
    r = sigmoid(a_r)
    z = sigmoid(a_z)
    q = r * h_prev
    return q, r, z


def gru_reset_before_gates_backward(dq, dz, r, z, h_prev):
    da_r = dq * h_prev * dsigmoid(r)
    da_z = dz * dsigmoid(z)
    dh_prev = dq * r
    return da_r, da_z, dh_prev


def gru_reset_before_candidate_forward(a_n, z, h_prev):
    n = tanh(a_n)
    h = n + z * (h_prev - n)
    return h, n


def gru_reset_before_candidate_backward(dh, z, n, h_prev):
    da_n = (dh - dh * z) * dtanh(n)
    dz = dh * (h_prev - n)
    dh_prev = dh * z
    return da_n, dz, dh_prev


def mgu_gate_forward(a_f, h_prev):
    f = sigmoid(a_f)
    q = f * h_prev
    return q, f


def mgu_gate_backward(dq, df, f, h_prev):
    da_f = (df + dq * h_prev) * dsigmoid(f)
    dh_prev = dq * f
    return da_f, dh_prev


def mgu_candidate_forward(a_n, f, h_prev):
    n = tanh(a_n)
    h = h_prev + f * (n - h_prev)
    return h, n


def mgu_candidate_backward(dh, f, n, h_prev):
    dn = dh * f
    da_n = dn * dtanh(n)
    df = dh * (n - h_prev)
    dh_prev = dh - dn
    return da_n, df, dh_prev


GRU = Cell(
    name="gru",
    gates=("r", "z", "n"),
    states=("h",),
    saved=("r", "z", "n", "s_n"),
    phases=(
        Phase(
            forward=gru_forward,
            returns=("h", "r", "z", "n"),
            backward=gru_backward,
            gradients=("da_r", "da_z", "dx_n", "ds_n", "dh_prev"),
        ),
    ),
    source="Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder, "
    "with the reset gate after the product as in cuDNN",
)

GRU_RESET_BEFORE = Cell(
    name="gru_reset_before",
    gates=("r", "z", "n"),
    states=("h",),
    saved=("r", "z", "n", "q"),
    phases=(
        Phase(
            forward=gru_reset_before_gates_forward,
            returns=("q", "r", "z"),
            backward=gru_reset_before_gates_backward,
            gradients=("da_r", "da_z", "dh_prev"),
        ),
        Phase(
            operand="q",
            forward=gru_reset_before_candidate_forward,
            returns=("h", "n"),
            backward=gru_reset_before_candidate_backward,
            gradients=("da_n", "dz", "dh_prev"),
        ),
    ),
    source="Cho et al. 2014, Learning Phrase Representations using RNN Encoder-Decoder",
)

MGU = Cell(
    name="mgu",
    gates=("f", "n"),
    states=("h",),
    saved=("f", "n", "q"),
    phases=(
        Phase(
            forward=mgu_gate_forward,
            returns=("q", "f"),
            backward=mgu_gate_backward,
            gradients=("da_f", "dh_prev"),
        ),
        Phase(
            operand="q",
            forward=mgu_candidate_forward,
            returns=("h", "n"),
            backward=mgu_candidate_backward,
            gradients=("da_n", "df", "dh_prev"),
        ),
    ),
    source="Zhou et al. 2016, Minimal Gated Unit for Recurrent Neural Networks",
)
