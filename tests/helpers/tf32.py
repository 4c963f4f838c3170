"""A layer of torch.nn whose products round their operands to TF32, in float64 otherwise.

On a GPU cuDNN makes some products of a float32 layer exactly where TF32 is allowed; which, it does
not say. So for kernels that make all of them in TF32 the measure is the worse of cuDNN and this.
"""

import torch
from rules import error


def rounded(x):
    """To the nearest number of TF32, ten bits behind the point, ties away from zero."""
    bits = x.float().contiguous().view(torch.int32)
    nearest = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    return torch.where(torch.isfinite(x), nearest.to(x.dtype), x)


class _Product(torch.autograd.Function):
    """x W^T, and its gradients, of rounded operands."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return rounded(x) @ rounded(w).t()

    @staticmethod
    def backward(ctx, d):
        x, w = ctx.saved_tensors
        return rounded(d) @ rounded(w), rounded(d).t() @ rounded(x)


def affine(W, v, b):
    """As the independent writing's (independent.py): W v + b, of a sequence or of several."""
    columns = v if v.dim() == 2 else v[:, None]
    found = _Product.apply(columns.t(), W).t().reshape(-1, *v.shape[1:])
    return found if b is None else found + b


def layer(module, x):
    """y and the final states of a float64 torch.nn.RNN (tanh), LSTM or GRU without projection, of
    x (T, B, I) and zero states."""
    T, B, _ = x.shape
    kind, H, D = module.mode, module.hidden_size, 1 + module.bidirectional
    finals = []
    for k in range(module.num_layers):
        outputs = []
        ways = module.all_weights[k * D : (k + 1) * D]
        for reverse, (w_ih, w_hh, b_ih, b_hh) in enumerate(ways):
            given = _Product.apply(x.flatten(0, 1), w_ih).view(T, B, -1) + b_ih
            h, c, y = x.new_zeros(B, H), x.new_zeros(B, H), [None] * T
            for t in reversed(range(T)) if reverse else range(T):
                s = _Product.apply(h, w_hh) + b_hh
                if kind == "LSTM":
                    i, f, g, o = (given[t] + s).chunk(4, 1)
                    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                    h = o.sigmoid() * c.tanh()
                elif kind == "GRU":
                    (x_r, x_z, x_n), (s_r, s_z, s_n) = given[t].chunk(3, 1), s.chunk(3, 1)
                    z, n = (x_z + s_z).sigmoid(), (x_n + (x_r + s_r).sigmoid() * s_n).tanh()
                    h = n + z * (h - n)
                else:
                    h = (given[t] + s).tanh()
                y[t] = h
            outputs.append(torch.stack(y))
            finals.append((h, c))
        x = torch.cat(outputs, 2)
    h_n, c_n = (torch.stack(each) for each in zip(*finals, strict=True))
    return x, (h_n, c_n) if kind == "LSTM" else h_n


def worse(some, others, truth):
    """Of two mappings' values, by name, those further from the truth."""
    return {
        name: max(some[name], others[name], key=lambda value: error(value, truth[name]))
        for name in truth
    }
