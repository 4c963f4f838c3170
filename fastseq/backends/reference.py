"""The reference as a backend: float64 inside, whatever the input's type."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..cells import CELLS
from .contract import Abilities, Call, Gradients, OutputGradients, Problem, Result, Wanted, Weights
from .layout import nothing as saved_layout
from .layout import unprojected

__all__ = ["backward", "forward", "saved_layout", "supports", "unavailable"]

ABILITIES = Abilities(zoneout=True)


def unavailable() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    if problem.device not in ("cpu", "meta"):
        return f"reference runs on the CPU, not on {problem.device}; move the tensors there"
    if not problem.dtype.is_floating_point:
        return f"reference computes real numbers, not {problem.dtype}"
    if problem.mode == "transform":
        return "reference runs in NumPy, which torch.func cannot see through; choose eager"
    if problem.mode == "dual":
        return "reference has no forward-mode derivative; choose eager"
    return CELLS[problem.cell].beyond() or unprojected(problem)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().to(torch.float64).numpy()


def _weights(weights: Weights) -> reference.Weights:
    _, w_hh, b_ih, b_hh, w_hr = (None if w is None else _array(w) for w in weights.flat()[:5])
    units = tuple(_array(u) for u in weights.units)
    return reference.Weights(_array(weights.w_ih), w_hh, b_ih, b_hh, w_hr, units)


def _tensors(weights: reference.Weights, dtype: torch.dtype) -> Weights:
    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array).to(dtype)

    return Weights(
        torch.from_numpy(weights.w_ih).to(dtype),
        tensor(weights.w_hh),
        tensor(weights.b_ih),
        tensor(weights.b_hh),
        tensor(weights.w_hr),
        tuple(torch.from_numpy(u).to(dtype) for u in weights.units),
    )


def _rows(call: Call) -> tuple[np.ndarray, np.ndarray]:
    """The input as packed rows (N, I), and the batch sizes."""
    if call.batch_sizes is None:
        T, B, I = call.x.shape  # noqa: E741
        return _array(call.x).reshape(T * B, I), np.full(T, B)
    sizes = call.batch_sizes.numpy()
    return _array(call.x)[: int(sizes.sum())], sizes


def _states(call: Call, r: int) -> tuple[np.ndarray, ...]:
    return tuple(_array(s[r]) for s in (call.states or call.zero_states()))


def _options(call: Call, r: int, N: int) -> dict[str, Any]:
    return {
        "reverse": call.reverse[r],
        "h_mask": None if call.h_mask is None else _array(call.h_mask[r]),
        "reset": None if call.reset is None else call.reset[r, :N].numpy(),
        "stay": call.part or [None if s is None else s[r, :N].numpy() for s in call.stay],
    }


def forward(call: Call, save: bool, trajectory: bool) -> Result:
    """Nothing is saved: backward computes the forward again."""
    x, sizes = _rows(call)
    R, H, P, N = len(call.weights), call.H, call.P, len(x)
    lead = call.x.shape[:-1]
    y = call.x.new_zeros((*lead, R * P))
    others = call.definition.other_states
    along = [call.x.new_zeros((*lead, R * H)) for _ in others] if trajectory else []
    finals = []
    for r, weights in enumerate(call.weights):
        y_r, final, tape = reference.forward(
            call.definition, x, sizes, _states(call, r), _weights(weights), **_options(call, r, N)
        )
        y.view(-1, R * P)[:N, r * P : (r + 1) * P] = torch.from_numpy(y_r)
        for tensor, state in zip(along, others, strict=False):
            value = tape.after.get(state)
            if value is not None:
                tensor.view(-1, R * H)[:N, r * H : (r + 1) * H] = torch.from_numpy(value)
        finals.append([torch.from_numpy(s).to(call.x.dtype) for s in final])
    return Result(y, [torch.stack(s) for s in zip(*finals, strict=True)], along, [])


def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    x, sizes = _rows(call)
    R, H, P, N = len(call.weights), call.H, call.P, len(x)
    dtype = call.x.dtype

    def columns(grad: Tensor | None, r: int, width: int) -> np.ndarray:
        if grad is None:
            return np.zeros((N, width))
        return _array(grad).reshape(-1, R * width)[:N, r * width : (r + 1) * width]

    dx = torch.zeros(call.x.shape, dtype=torch.float64, device="cpu")
    dstates, dweights = [], []
    for r, weights in enumerate(call.weights):
        options = _options(call, r, N)
        states = _states(call, r)
        _, final, tape = reference.forward(
            call.definition, x, sizes, states, _weights(weights), **options
        )
        options.pop("reset")
        gradients = reference.backward(
            call.definition,
            x,
            sizes,
            _weights(weights),
            tape,
            columns(grads.y, r, P),
            tuple(
                np.zeros_like(s) if g is None else _array(g[r])
                for s, g in zip(final, grads.states, strict=True)
            ),
            {
                state: columns(g, r, H)
                for state, g in zip(call.definition.other_states, grads.trajectory, strict=False)
            },
            **options,
        )
        dx.view(-1, call.x.shape[-1])[:N] += torch.from_numpy(gradients.x)
        dstates.append([torch.from_numpy(s).to(dtype) for s in gradients.states])
        dweights.append(_tensors(gradients.weights, dtype))
    return Gradients(
        dx.to(dtype) if wanted.x else None,
        [torch.stack(s) for s in zip(*dstates, strict=True)] if wanted.states else None,
        dweights if wanted.weights else None,
    )
