"""What our CPU kernels share: what they run, keep for backward, and compute in."""

from __future__ import annotations

import torch

from ..cells import CELLS, Cell, arguments
from .contract import Call, Problem, Shape

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernels compute in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def keeps_gates(cell: Cell, projected: bool) -> bool:
    """Elman's cells need their output alone, and y holds it."""
    return projected or cell.saved != cell.states[:1]


def reads_h(name: str) -> bool:
    """Whether a text of the cell adds h_prev, which must then have the size of the gates."""
    return any("h_prev" in arguments(phase.forward) for phase in CELLS[name].phases)


def declined(name: str, problem: Problem) -> str | None:
    """Why the kernels called ``name`` decline a problem; None if they run it."""
    if problem.device not in ("cpu", "meta"):
        return f"{name}'s kernels run on the CPU, not on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"{name}'s kernels take float16, bfloat16, float32 and float64, not {problem.dtype}"
    if problem.mode == "dual":
        return (
            f"{name}'s kernels have no forward-mode derivative, and run no transform that is "
            "compiled; choose eager"
        )
    if problem.mode == "trace":
        return "torch.jit.trace records no custom kernel; choose torch"
    if problem.projected and reads_h(problem.cell):
        return f"{problem.cell} adds h_prev to gates of another size; it cannot be projected"
    return None


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
