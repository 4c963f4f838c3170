"""What the CPU kernels keep for backward, and the type they compute in."""

from __future__ import annotations

import torch

from ..cells import CELLS, Cell, arguments
from .contract import Call, Shape


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernels compute in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def keeps_gates(cell: Cell, projected: bool) -> bool:
    """Elman's cells need their output alone, and y holds it."""
    return projected or cell.saved != cell.states[:1]


def reads_h(name: str) -> bool:
    """Whether a text of the cell adds h_prev, which must then have the size of the gates."""
    return any("h_prev" in arguments(phase.forward) for phase in CELLS[name].phases)


def saved_layout(call: Call, rows: Shape, trajectory: bool) -> list[tuple[Shape, torch.dtype]]:
    """Per recurrence the gates, the extras and the unprojected h; then the other states, unless
    the trajectory holds them in the same type."""
    if call.memory == "lean":
        return []
    cell, H = call.definition, call.H
    N = rows[0] * rows[1] if len(rows) == 2 else rows[0]
    projected = call.weights[0].w_hr is not None
    one: list[Shape] = [(N, cell.G * H)] if keeps_gates(cell, projected) else []
    one += [(N, H)] * (len(cell.extras) + projected)
    shapes = one * len(call.weights)
    if not trajectory or call.x.dtype is not wide(call.x.dtype):
        shapes += [(*rows, len(call.weights) * H)] * (len(cell.states) - 1)
    return [(shape, wide(call.x.dtype)) for shape in shapes]
