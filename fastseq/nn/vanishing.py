"""The regulariser of Pascanu et al. 2013 against vanishing gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import check_lengths
from ..ops.geometry import Dense
from .flow import norm
from .layers import RNN
from .options import HasOptions, options

#: The derivative of each nonlinearity, of its value.
DERIVATIVES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": lambda h: 1 - h * h,
    "sigmoid": lambda h: h * (1 - h),
    "relu": lambda h: (h > 0).to(h.dtype),
}


def vanishing_gradient_regularizer(
    layer: nn.Module,
    outputs: tuple[Tensor, Tensor],
    loss: Tensor,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    full: bool = False,
) -> Tensor:
    r"""A term that keeps the norm of the gradient as it goes back through an Elman network.

    .. math::
        \Omega = \sum_t \Omega_t = \sum_t \left(
            \frac{\left\lVert \frac{\partial E}{\partial h_{t+1}}
                  \frac{\partial h_{t+1}}{\partial h_t} \right\rVert}
                 {\left\lVert \frac{\partial E}{\partial h_{t+1}} \right\rVert} - 1 \right)^2,
        \qquad
        \frac{\partial h_{t+1}}{\partial h_t} = \operatorname{diag}(\phi'(a_{t+1})) W_{hh}

    (equation 9, for :math:`h_t = \phi(a_t)`, which the paper's first footnote calls equivalent to
    its own form). The norms are those of each sequence, and of a batch Omega is the mean.

    Its gradient, as in the paper (equation 10), is the immediate one with regard to
    :math:`W_{hh}`: the states and :math:`\partial E / \partial h_{t+1}` count as constants, and no
    other parameter gets any. With ``full`` it is the whole one, with regard to all that the loss
    and the states depend on, by a second derivative of the loss::

        y, h_n = layer(x)
        loss = criterion(readout(y), targets)
        term = fastseq.training.vanishing_gradient_regularizer(layer, (y, h_n), loss)
        (loss + 2.0 * term).backward()

    Args:
        layer: fastseq.RNN or torch.nn.RNN of one layer and one direction.
        outputs: the output and the final state that ``layer`` returned, which ``loss`` was made of.
        loss: E, a tensor of one number. Its graph is kept, so that ``backward`` may follow.
        lengths: (B,) integers or None, those that the layer was given. Pairs of steps beyond a
            sequence's end do not count.
        full: whether the gradient is the whole one.

    Returns:
        Omega, a tensor of one number. Where the gradient at a step is zero, so is its part.

    Raises:
        TypeError, ValueError: an argument is none of these; a layer that masks its recurrent
            weights or its state.

    Source: Pascanu, Mikolov and Bengio 2013, On the Difficulty of Training Recurrent Neural
    Networks, section 3.3, equations 9 and 10.
    """
    dphi = DERIVATIVES[_nonlinearity(layer)]
    y, h_n = _checked_outputs(outputs)
    if not isinstance(full, bool):
        raise TypeError(f"full: expected a bool, got {type(full).__name__}")
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"loss: expected a tensor of one number, got {got}")
    if not loss.requires_grad:
        raise ValueError("loss: expected one made of the outputs, got one without a gradient")
    geometry = Dense(y, bool(layer.batch_first))
    lengths = check_lengths(lengths, geometry.T, geometry.B, False, geometry.batched)
    w_hh: Tensor = layer.weight_hh_l0  # type: ignore[assignment]

    dy, dh_n = torch.autograd.grad(
        loss, (y, h_n), create_graph=full, retain_graph=True, allow_unused=True
    )
    if dy is None and dh_n is None:
        raise ValueError("loss: it depends on neither of the outputs")
    h = geometry.dense(y)
    dy = torch.zeros_like(h) if dy is None else geometry.dense(dy)
    dh_n = torch.zeros_like(h[0]) if dh_n is None else geometry.state(dh_n)[0]
    T, B, _ = h.shape
    ends = torch.full((B,), T) if lengths is None else lengths
    time, ends = torch.arange(T, device=h.device)[:, None], ends.to(h.device)
    dy = torch.where((time < ends)[..., None], dy, 0.0)
    dy = dy + torch.where((time == ends - 1)[..., None], dh_n, 0.0)

    with torch.set_grad_enabled(full and torch.is_grad_enabled()):
        slope = dphi(h)
        dh = [dy[T - 1]]  # dE/dh_t, from the last step on
        for t in reversed(range(T - 1)):
            dh.append(dy[t] + (dh[-1] * slope[t + 1]) @ w_hh)
        after = torch.stack(dh[::-1])[1:]  # dE/dh_{t+1}
    # a step that no gradient reaches has no ratio: any other in its place, and no part in the sum
    reached = (after != 0).any(-1)
    after = torch.where(reached[..., None], after, 1.0)
    back = (after * slope[1:]) @ w_hh
    ratio = norm(back) / norm(after)
    return torch.where(reached, (ratio - 1) ** 2, 0.0).sum() / max(B, 1)


def _nonlinearity(layer: Any) -> str:
    if not isinstance(layer, (RNN, nn.RNN)):
        kind = type(layer).__name__
        raise TypeError(f"layer: expected fastseq.RNN or torch.nn.RNN, got {kind}")
    if layer.num_layers != 1 or layer.bidirectional:
        raise ValueError(
            "layer: expected one layer of one direction, whose states the output holds, got "
            f"num_layers={layer.num_layers}, bidirectional={layer.bidirectional}; make single "
            "layers, and add a term of each"
        )
    if isinstance(layer, HasOptions) and (rates := options(layer).rates):
        training = ("recurrent_dropout", "weight_dropout") if layer.training else ()
        for name in ("zoneout", *training):
            if getattr(rates, name):
                raise ValueError(
                    f"layer: with its {name} a step is not the equation above; set it to 0, "
                    f"layer.fastseq.{name} = 0"
                )
    return layer.nonlinearity


def _checked_outputs(outputs: Any) -> tuple[Tensor, Tensor]:
    pair = isinstance(outputs, (tuple, list)) and len(outputs) == 2
    if not pair or not all(isinstance(part, Tensor) for part in outputs):
        raise TypeError("outputs: expected the pair of tensors (y, h_n) that the layer returned")
    y, h_n = outputs
    if not y.requires_grad:
        raise ValueError(
            "outputs: expected those of a call that is differentiated, got no gradient"
        )
    return y, h_n
