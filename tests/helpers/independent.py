"""The cells written a second time: matrix notation from the papers, one sequence and one step at a
time, gradients by torch's autograd.

Nothing here knows fastseq, and that is its use: texts that are shared share their mistakes.

A recurrence takes

==========  ======================================================================================
x           (T, B, I), padded
states      h_0 (B, P) and, for the LSTM, c_0 (B, H)
weights     w_ih, w_hh, b_ih, b_hh, w_hr, units, as torch.nn has them; None where there is none
reverse     whether time runs backwards
lengths     (B,) or None; a sequence of length 0 keeps its state, y is zero behind the end
reset       (T, B) bool or None; True where a step begins a new sequence: the state is zeroed
            between that step and the one before it in time, whichever way time runs
h_mask      (B, P) or None; multiplies h_{t-1} where W_hh multiplies it
stay        None, or of each state what of it stays as it was before the step (Krueger et al. 2017,
            zoneout): (T, B, size) bool, a number, which is the part of it that does, or None
==========  ======================================================================================

and returns y (T, B, P), the final states, and every further state at every step, (T, B, H) each.
"""

import torch


def zoned(new, old, stay):
    """d * s_{t-1} + (1 - d) * s_t, of a mask d or of its expectation."""
    if stay is None:
        return new
    return torch.where(stay, old, new) if torch.is_tensor(stay) else stay * old + (1 - stay) * new


def over_time(step, x, states, reverse, lengths, reset, stay=None):
    """Walk each sequence alone; ``step(x_t, b, *states)`` returns the new states."""
    T, B = x.shape[:2]
    sequences, finals = [], []
    for b in range(B):
        length = T if lengths is None else int(lengths[b])
        state = tuple(s[b] for s in states)
        along = [tuple(torch.zeros_like(s) for s in state)] * T
        for k in range(length):
            t = length - 1 - k if reverse else k
            begins = t + 1 if reverse else t  # the boundary that is crossed on entering step t
            if reset is not None and begins < length and reset[begins, b]:
                state = tuple(torch.zeros_like(s) for s in state)
            new = step(x[t, b], b, *state)
            if stay is not None:
                here = [s[t, b] if torch.is_tensor(s) else s for s in stay]
                new = tuple(zoned(*parts) for parts in zip(new, state, here, strict=True))
            state = along[t] = new
        sequences.append([torch.stack(values) for values in zip(*along, strict=True)])
        finals.append(state)
    y, *others = (torch.stack(values, 1) for values in zip(*sequences, strict=True))
    return y, [torch.stack(values) for values in zip(*finals, strict=True)], others


def affine(W, v, b):
    return W @ v if b is None else W @ v + b


def blocks(matrix, count):
    """The gates' blocks of a stacked matrix or vector."""
    return [None] * count if matrix is None else list(matrix.chunk(count))


def masked(h, h_mask, b):
    return h if h_mask is None else h * h_mask[b]


def elman(phi):
    """h_t = phi(W x_t + U h_{t-1} + b)."""

    def run(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
        def step(x_t, b, h):
            return (phi(affine(w_ih, x_t, b_ih) + affine(w_hh, masked(h, h_mask, b), b_hh)),)

        return over_time(step, x, states, **time)

    return run


def lstm(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """Gers et al. 2000; the projection of Sak et al. 2014, r_t = W_rm m_t, takes h's place."""
    W_i, W_f, W_c, W_o = blocks(w_ih, 4)
    U_i, U_f, U_c, U_o = blocks(w_hh, 4)
    b_i, b_f, b_c, b_o = blocks(b_ih, 4)
    p_i, p_f, p_c, p_o = blocks(b_hh, 4)

    def step(x_t, b, h, c):
        h = masked(h, h_mask, b)
        forget = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, h, p_f))
        admit = torch.sigmoid(affine(W_i, x_t, b_i) + affine(U_i, h, p_i))
        emit = torch.sigmoid(affine(W_o, x_t, b_o) + affine(U_o, h, p_o))
        candidate = torch.tanh(affine(W_c, x_t, b_c) + affine(U_c, h, p_c))
        c = admit * candidate + forget * c
        m = emit * torch.tanh(c)
        return (m if w_hr is None else w_hr @ m), c

    return over_time(step, x, states, **time)


def gru(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """h_t = (1 - z) n + z h_{t-1}, n = tanh(W x_t + b + r (U h_{t-1} + p))."""
    W_r, W_z, W_n = blocks(w_ih, 3)
    U_r, U_z, U_n = blocks(w_hh, 3)
    b_r, b_z, b_n = blocks(b_ih, 3)
    p_r, p_z, p_n = blocks(b_hh, 3)

    def step(x_t, b, h):
        v = masked(h, h_mask, b)
        r = torch.sigmoid(affine(W_r, x_t, b_r) + affine(U_r, v, p_r))
        z = torch.sigmoid(affine(W_z, x_t, b_z) + affine(U_z, v, p_z))
        n = torch.tanh(affine(W_n, x_t, b_n) + r * affine(U_n, v, p_n))
        return ((1 - z) * n + z * h,)

    return over_time(step, x, states, **time)


def gru_reset_before(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """Cho et al. 2014, equations 5 to 8: n = tanh(W x_t + U (r h_{t-1}))."""
    W_r, W_z, W_n = blocks(w_ih, 3)
    U_r, U_z, U_n = blocks(w_hh, 3)
    b_r, b_z, b_n = blocks(b_ih, 3)
    p_r, p_z, p_n = blocks(b_hh, 3)

    def step(x_t, b, h):
        v = masked(h, h_mask, b)
        r = torch.sigmoid(affine(W_r, x_t, b_r) + affine(U_r, v, p_r))
        z = torch.sigmoid(affine(W_z, x_t, b_z) + affine(U_z, v, p_z))
        n = torch.tanh(affine(W_n, x_t, b_n) + affine(U_n, r * h, p_n))
        return ((1 - z) * n + z * h,)

    return over_time(step, x, states, **time)


def peephole_lstm(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """Gers and Schmidhuber 2000, with diagonal matrices P: the gates of input and forget see the
    cell before the step, that of the output the cell after it."""
    W_i, W_f, W_c, W_o = blocks(w_ih, 4)
    U_i, U_f, U_c, U_o = blocks(w_hh, 4)
    b_i, b_f, b_c, b_o = blocks(b_ih, 4)
    p_i, p_f, p_c, p_o = blocks(b_hh, 4)
    P_i, P_f, P_o = map(torch.diag, units)

    def step(x_t, b, h, c):
        h = masked(h, h_mask, b)
        admit = torch.sigmoid(affine(W_i, x_t, b_i) + affine(U_i, h, p_i) + P_i @ c)
        forget = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, h, p_f) + P_f @ c)
        c = admit * torch.tanh(affine(W_c, x_t, b_c) + affine(U_c, h, p_c)) + forget * c
        emit = torch.sigmoid(affine(W_o, x_t, b_o) + affine(U_o, h, p_o) + P_o @ c)
        m = emit * torch.tanh(c)
        return (m if w_hr is None else w_hr @ m), c

    return over_time(step, x, states, **time)


def coupled_lstm(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """Greff et al. 2017, CIFG: what is admitted is 1 - f."""
    W_f, W_c, W_o = blocks(w_ih, 3)
    U_f, U_c, U_o = blocks(w_hh, 3)
    b_f, b_c, b_o = blocks(b_ih, 3)
    p_f, p_c, p_o = blocks(b_hh, 3)

    def step(x_t, b, h, c):
        h = masked(h, h_mask, b)
        forget = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, h, p_f))
        emit = torch.sigmoid(affine(W_o, x_t, b_o) + affine(U_o, h, p_o))
        candidate = torch.tanh(affine(W_c, x_t, b_c) + affine(U_c, h, p_c))
        c = (1 - forget) * candidate + forget * c
        m = emit * torch.tanh(c)
        return (m if w_hr is None else w_hr @ m), c

    return over_time(step, x, states, **time)


def mgu(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """Zhou et al. 2016, equations 5: h_t = (1 - f) h_{t-1} + f tanh(W x_t + U (f h_{t-1}))."""
    W_f, W_n = blocks(w_ih, 2)
    U_f, U_n = blocks(w_hh, 2)
    b_f, b_n = blocks(b_ih, 2)
    p_f, p_n = blocks(b_hh, 2)

    def step(x_t, b, h):
        f = torch.sigmoid(affine(W_f, x_t, b_f) + affine(U_f, masked(h, h_mask, b), p_f))
        n = torch.tanh(affine(W_n, x_t, b_n) + affine(U_n, f * h, p_n))
        return ((1 - f) * h + f * n,)

    return over_time(step, x, states, **time)


def indrnn(phi):
    """Li et al. 2018, equation 2: h_t = phi(W x_t + u * h_{t-1} + b)."""

    def run(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
        (u,) = units

        def step(x_t, b, h):
            return (phi(affine(w_ih, x_t, b_ih) + u * h),)

        return over_time(step, x, states, **time)

    return run


def leaky_integrator(x, states, w_ih, w_hh, b_ih, b_hh, w_hr=None, units=(), h_mask=None, **time):
    """Mikolov et al. 2014, equation 5: s_t = (1 - alpha) B x_t + alpha s_{t-1}."""
    (alpha,) = units

    def step(x_t, b, s):
        return ((1 - alpha) * affine(w_ih, x_t, b_ih) + alpha * s,)

    return over_time(step, x, states, **time)


CELLS = {
    "rnn_tanh": elman(torch.tanh),
    "rnn_relu": elman(torch.relu),
    "rnn_sigmoid": elman(torch.sigmoid),
    "lstm": lstm,
    "peephole_lstm": peephole_lstm,
    "coupled_lstm": coupled_lstm,
    "gru": gru,
    "gru_reset_before": gru_reset_before,
    "mgu": mgu,
    "indrnn": indrnn(torch.relu),
    "indrnn_tanh": indrnn(torch.tanh),
    "leaky_integrator": leaky_integrator,
}


def recurrence(
    cell, x, states, weights, reverse=False, lengths=None, reset=None, h_mask=None, stay=None
):
    """One cell over one input, in one direction."""
    time = {"reverse": reverse, "lengths": lengths, "reset": reset, "stay": stay}
    return CELLS[cell](x, states, *weights, h_mask=h_mask, **time)


def layers(
    cell, x, states, weights, directions=1, lengths=None, reset=None, h_mask=None, stay=None
):
    """Layers by directions; states and masks have a leading dimension of layers * directions.

    The further states at every step are the last layer's, the directions side by side.
    """
    finals, others = [], []
    for first in range(0, len(weights), directions):
        ways = []
        for d in range(directions):
            k = first + d
            mask = None if h_mask is None else h_mask[k]
            zone = stay and [s[k] if torch.is_tensor(s) else s for s in stay]
            start = [s[k] for s in states]
            time = d == 1, lengths, reset, mask, zone
            ways.append(recurrence(cell, x, start, weights[k], *time))
        x = torch.cat([way[0] for way in ways], -1)
        finals += [way[1] for way in ways]
        others = [torch.cat(values, -1) for values in zip(*(way[2] for way in ways), strict=True)]
    return x, [torch.stack(values) for values in zip(*finals, strict=True)], others
