"""What each backend keeps for backward, and what our CPU kernels share besides.

Nothing here asks what the machine has, and no backend is imported: a graph can be traced for
another machine.
"""

from __future__ import annotations

import torch

from ..cells import CELLS
from .contract import Call, Layout, Problem, Shape

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that the kernels compute in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def declined(name: str, problem: Problem) -> str | None:
    """Why the kernels called ``name``, which run on the CPU, decline a problem; None if they run
    it."""
    if problem.device not in ("cpu", "meta"):
        return f"{name}'s kernels run on the CPU, not on {problem.device}"
    return declined_anywhere(name, problem)


def declined_anywhere(name: str, problem: Problem) -> str | None:
    """The same, whatever the device."""
    if problem.dtype not in _DTYPES:
        return f"{name}'s kernels take float16, bfloat16, float32 and float64, not {problem.dtype}"
    if problem.mode == "dual":
        return (
            f"{name}'s kernels have no forward-mode derivative, and run no transform that is "
            "compiled; choose eager"
        )
    if problem.mode == "trace":
        return "torch.jit.trace records no custom kernel"
    return CELLS[problem.cell].beyond() or unprojected(problem)


def unprojected(problem: Problem) -> str | None:
    """Why a problem's h cannot be projected, if it is."""
    return CELLS[problem.cell].unprojectable if problem.projected else None


def by_recurrence(call: Call, rows: Shape, trajectory: bool) -> Layout:
    """Of each recurrence the gates, the extras, h as the text gave it, where :func:`as_made` asks
    for it or it is projected, and so the other states; then the other states as they were carried,
    unless the trajectory holds them in the same type."""
    if call.memory == "lean":
        return []
    cell, H, R, dtype = call.definition, call.H, len(call.weights), wide(call.x.dtype)
    N = rows[0] * rows[1] if len(rows) == 2 else rows[0]
    projected = call.weights[0].w_hr is not None
    h, *others = as_made(call)
    one: Layout = [((N, cell.G * H), dtype)] if cell.keeps_gates(projected) else []
    one += [((N, H), dtype)] * (len(cell.extras) + (projected or h) + sum(others))
    return one * R + _other_states(call, rows, trajectory)


def zoned(call: Call) -> list[bool]:
    """Of each state whether it stays as it was somewhere, or a part of it does."""
    if call.part:
        return [part != 0 for part in call.part]
    return [s is not None for s in call.stay] or [False] * len(call.definition.states)


def as_made(call: Call) -> list[bool]:
    """Of each state whether backward wants it as the text gave it, besides what was carried: where
    it is zoned, and a backward text takes it."""
    return [z and t for z, t in zip(zoned(call), call.definition.taken_back, strict=True)]


def side_by_side(call: Call, rows: Shape, trajectory: bool) -> Layout:
    """The same, with the columns of all recurrences side by side: gates, extras, h and the other
    states as the text gave them; then the other states as they were carried."""
    if call.memory == "lean":
        return []
    cell, dtype, width = call.definition, call.x.dtype, len(call.weights) * call.H
    projected = call.weights[0].w_hr is not None
    layout: Layout = []
    if cell.keeps_gates(projected):
        layout.append(((*rows, cell.G * width), dtype))
    if cell.extras:
        layout.append(((*rows, len(cell.extras) * width), dtype))
    h, *others = as_made(call)
    if projected or h:
        layout.append(((*rows, width), dtype))
    layout += [((*rows, width), wide(dtype))] * sum(others)
    return layout + _other_states(call, rows, trajectory)


def _other_states(call: Call, rows: Shape, trajectory: bool) -> Layout:
    dtype = wide(call.x.dtype)
    if trajectory and call.x.dtype is dtype:
        return []
    others = call.definition.other_states
    return [((*rows, len(call.weights) * call.H), dtype)] * len(others)


def opaque(call: Call, rows: Shape, trajectory: bool) -> Layout:
    """Bytes, as many as the library knows alone: oneDNN's workspaces, or cuDNN's reserve."""
    return [((None,), torch.uint8)] * (len(call.weights) if on_onednn(call) else 1)


def on_onednn(call: Call) -> bool:
    """Whether torch trains the layer on oneDNN, a recurrence at a time."""
    return call.x.device.type == "cpu"


def nothing(call: Call, rows: Shape, trajectory: bool) -> Layout:
    """Backward runs forward again."""
    return []
