"""Fused loops over time for the CPU in C++, from ``csrc/``: the extension module ``fastseq._cpu``.

It knows no torch but through DLPack's exchange interface. What stands here is the contract: 16-bit
types, which compute in float32, and layouts that the kernels do not read are copied at the door. Of
bfloat16 the extension is told, whose products it makes with the processor's dot product if it can.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cells import CELLS, Cell
from . import openmp
from .contract import (
    Abilities,
    Call,
    Given,
    Gradients,
    OutputGradients,
    Problem,
    Request,
    Result,
    Wanted,
    Weights,
    unflatten,
)
from .layout import as_made, declined, wide
from .layout import by_recurrence as saved_layout

FOLDER = Path(__file__).parents[1]
try:
    from .. import _cpu  # type: ignore[attr-defined]

    # an editable install's finder knows it, of a package in an archive too
    if not (FOLDER.is_dir() and FOLDER.samefile(Path(_cpu.__file__).parent)):
        raise ImportError(f"{_cpu.__file__} belongs to another fastseq")
except ImportError as error:
    note = FOLDER / "_cpu.txt"  # setup.py's
    why = note.read_text().strip() if note.exists() else error
    raise ImportError(f"fastseq was built without its C++ kernels: {why}") from error

__all__ = [
    "backward",
    "forward",
    "keep",
    "layers",
    "layers_backward",
    "saved_layout",
    "stacks",
    "stream",
    "stream_step",
    "supports",
    "unavailable",
]

ABILITIES = Abilities(deterministic=True, zoneout=True)

X, WEIGHTS = 1, 4  # where they stand in :func:`_arguments`
CHECKED = 3  # the order of a call's x; csrc/python/call.h says what it means
NUMBER = {row[0]: number for number, row in enumerate(_cpu.CELLS)}

_COMMON = (
    "cell, x, batch_sizes, states, weights, layers, reverse, order, reset, h_mask, dropout, kept,"
    " input_masks, stay, part, threads, deterministic, bf16"
)
_SCORES = "emissions, lengths, start, end, transitions"
#: What the extension's functions say of themselves. One that was built from other sources may take
#: and give something else, which nothing but this would tell before it crashes.
SIGNATURES = {
    "connect": "(capsule, tensor type, parameter type)",
    "use_pool": "(GOMP_parallel, omp_get_thread_num, omp_get_num_threads, omp_get_num_procs,"
    " quota)",
    "instruction_sets": "() -> [name]",
    "use_instruction_set": "(name) -> name before",
    "vocabulary": "(function, x, y)",
    "threads": "(threads, flops) -> threads",
    "plan": "(threads, batch, blocks, flops, bytes) -> (rows, units)",
    "forward": f"({_COMMON}, save, trajectory, known) -> (y, states, saved) | None",
    "backward": f"({_COMMON}, y, saved, dy, dstates, dtrajectory, wants_x, wants_weights,"
    " wants_states) -> [dx, *dstates, *dweights] | None",
    "keep": "(seed, sites, ids, steps, units, threshold, threads) -> kept | None",
    "stream": "(cell, weights, layers, h, others) -> stream | None",
    "stream_step": "(stream, x, out, threads) -> y | None",
    "crf": f"({_SCORES}, tags, save, threads) -> (value, u) | None",
    "crf_backward": f"({_SCORES}, tags, u, dvalue, wants_parameters, threads)"
    " -> [demissions, dstart, dend, dtransitions] | None",
    "crf_viterbi": f"({_SCORES}, n, threads) -> (scores, tags) | None",
}


def _other_build() -> str | None:
    """Why the extension is not the one that belongs to this file."""
    found = {name: getattr(getattr(_cpu, name, None), "__doc__", None) for name in SIGNATURES}
    others = [name for name, text in SIGNATURES.items() if found[name] != text]
    others += [name for name in NUMBER if name not in CELLS]
    if not others:
        return None
    return (
        "the C++ kernels were built from the sources of another version of fastseq, with another "
        f"{others[0]}; build them again: make build, or pip install ."
    )


def _connect() -> str | None:
    """Ready the extension for this process; or why it cannot be."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return "torch >= 2.10 is needed, whose tensors can be read through DLPack's C interface"
    try:
        _cpu.connect(capsule, Tensor, torch.nn.Parameter)
    except (ImportError, ValueError) as error:
        return str(error)
    _cpu.use_pool(*openmp.addresses(), openmp.quota() or 0)
    if hasattr(os, "register_at_fork"):  # a forked child has torch's pool, but none of its threads
        os.register_at_fork(after_in_child=lambda: _cpu.use_pool(0, 0, 0, 0, 0))
    return None


_reason = _other_build() or _connect()


def unavailable() -> str | None:
    return _reason


def row_of(cell: Cell) -> tuple[Any, ...]:
    """What a cell declares, as the extension's table of cells has it."""
    rows = [cell.product_rows(phase) for phase in cell.phases]
    return (
        cell.name,
        *map(" ".join, (cell.gates, cell.states, cell.extras, cell.unit_parameters)),
        (rows[0][0], *(last for _, last in rows)),
        len(cell.apart_gates),
        cell.keeps_gates(False),
        cell.taken_back,
    )


@functools.cache
def _not_compiled(cell: Cell) -> str | None:
    """Why the extension cannot run a cell: it has those alone whose declaration it was built of."""
    if cell.name not in NUMBER:
        return f"native has no kernel of {cell.called}, only of {', '.join(NUMBER)}"
    ours, compiled = row_of(cell), _cpu.CELLS[NUMBER[cell.name]]
    what = (
        "name",
        "gates",
        "states",
        "extras",
        "unit parameters",
        "recurrent gates of its phases",
        "gates whose parts stand apart",
        "keeping of gates",
        "states that backward takes",
    )
    for name, own, other in zip(what, ours, compiled, strict=True):
        if own != other:
            return (
                f"native's kernel of {cell.name} was compiled for another declaration, with "
                f"{name} {other!r} where this cell has {own!r}"
            )
    return None


def supports(problem: Problem) -> str | None:
    return _not_compiled(CELLS[problem.cell]) or declined("native", problem)


def stacks(problem: Problem) -> bool:
    """Whether the layers go in one call: not where a layer's forward runs again, in lean memory."""
    lean = problem.training and problem.memory == "lean"
    plain = problem.mode == "plain" and problem.dtype in (torch.float32, torch.float64)
    return plain and not lean


def streams(problem: Problem) -> bool:
    """Whether single steps on packed weights are had."""
    return problem.dtype in (torch.float32, torch.float64) and supports(problem) is None


def _arguments(call: Call) -> list[Any]:
    """What the extension's functions are all given, as it is."""
    return [
        NUMBER[call.cell],
        call.x,
        call.batch_sizes,
        tuple(call.states),
        tuple(w for weights in call.weights for w in weights.flat()),
        1,
        call.reverse,
        CHECKED,
        call.reset,
        call.h_mask,
        (),
        1.0,
        (),
        tuple(call.stay),
        call.part,
        torch.get_num_threads(),
        call.deterministic,
        call.x.dtype is torch.bfloat16,
    ]


def _copied(arguments: Sequence[Any], dtype: torch.dtype, but: int) -> list[Any]:
    """All but one in the kernels' own type and layout: contiguous, batch_sizes in int64."""

    def plain(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return tuple(map(plain, value))
        if not isinstance(value, Tensor):
            return value
        if value.dtype is torch.bool:
            return value.contiguous()
        if not value.is_floating_point():
            return value.to(torch.int64).contiguous()
        return value.to(dtype).contiguous()

    return [value if k == but else plain(value) for k, value in enumerate(arguments)]


def _run(function: Any, arguments: list[Any], dtype: torch.dtype) -> Any:
    """Call the extension; where it declines the layout, with copies.

    The copies of conjugate-like views and of 16-bit types are made before: it cannot see these. But
    it packs matrices of bfloat16 as they are, where its products are made of them.
    """
    own = wide(dtype)
    if dtype is own:
        out = function(*arguments)
        if out is not None:
            return out
    x, weights = arguments[X], arguments[WEIGHTS]
    copied = _copied(arguments, own, but=WEIGHTS)
    few = x.numel() <= 8 * x.shape[-1]  # rows, whose products forward makes in float32
    for matrices in (dtype, own) if dtype is torch.bfloat16 and not few else (own,):
        copied[WEIGHTS] = tuple(
            None if w is None else w.to(matrices if w.dim() == 2 else own).contiguous()
            for w in weights
        )
        out = function(*copied)
        if out is not None:
            return out
    given = [None if w is None else tuple(w.shape) for w in weights]
    raise RuntimeError(
        f"weights: their sizes do not fit together, or not an input {tuple(x.shape)}: {given}"
    )


def forward(call: Call, save: bool, trajectory: bool) -> Result:
    dtype = call.x.dtype
    full = save and call.memory == "full"
    y, states, saved = _run(_cpu.forward, [*_arguments(call), full, trajectory, None], dtype)
    n = len(call.definition.states)
    result = Result(y, list(states[:n]), list(states[n:]), saved)
    if dtype is wide(dtype):
        del saved[len(saved) - len(result.trajectory) :]  # the trajectory holds them
    else:  # backward needs the other states as they were carried
        result.y = result.y.to(dtype)
        result.states = [s.to(dtype) for s in result.states]
        result.trajectory = [c.to(dtype) for c in result.trajectory]
    return result


def backward(call: Call, result: Result, grads: OutputGradients, wanted: Wanted) -> Gradients:
    dtype = call.x.dtype
    cell = call.definition
    others = len(cell.states) - 1
    saved, y = list(result.saved), result.y
    projected = call.weights[0].w_hr is not None
    keeps = others or cell.keeps_gates(projected) or any(as_made(call))
    if call.memory == "lean" and keeps:
        saved = _run(_cpu.forward, [*_arguments(call), True, False, y], dtype)[2]
    elif dtype is wide(dtype):
        saved += result.trajectory
    arguments = [
        *_arguments(call),
        y,
        tuple(saved),
        grads.y,
        tuple(grads.states),
        tuple(grads.trajectory),
        wanted.x,
        wanted.weights,
        wanted.states,
    ]
    out = _run(_cpu.backward, arguments, dtype)
    if dtype is not wide(dtype):
        out = [None if g is None else g.to(dtype) for g in out]
    dx, dstates, flat = out[0], out[1 : 2 + others], out[2 + others :]
    dweights: list[Weights] | None = None
    if wanted.weights:
        given = [w for weights in call.weights for w in weights.flat()]
        gradients = iter(flat)
        dweights = unflatten(cell, [None if w is None else next(gradients) for w in given])
    return Gradients(dx, dstates if wanted.states else None, dweights)


_REVERSE = ((), (False,), (False, True))  # by the number of directions


def layers(
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    given: Given,
    save: bool,
) -> tuple[Tensor, Sequence[Tensor], Sequence[Tensor]] | None:
    """All layers, where the extension takes the tensors as they are. All sequences are tuples."""
    return _cpu.forward(
        NUMBER[request.cell],
        x,
        batch_sizes,
        states,
        weights,
        request.layers,
        _REVERSE[request.directions],
        request.order,
        given.reset,
        given.h_mask,
        given.dropout,
        1.0 - request.dropout,
        given.input_masks,
        given.stay,
        given.part,
        torch.get_num_threads(),
        request.deterministic,
        False,
        save,
        request.trajectory,
        None,
    )


def layers_backward(
    request: Request,
    x: Tensor,
    batch_sizes: Tensor | None,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    given: Given,
    y: Tensor,
    saved: Sequence[Tensor],
    dy: Tensor | None,
    dstates: Sequence[Tensor | None],
    wanted: Wanted,
) -> Sequence[Tensor | None] | None:
    n = len(request.definition.states)
    return _cpu.backward(
        NUMBER[request.cell],
        x,
        batch_sizes,
        states,
        weights,
        request.layers,
        _REVERSE[request.directions],
        request.order,
        given.reset,
        given.h_mask,
        given.dropout,
        1.0 - request.dropout,
        given.input_masks,
        given.stay,
        given.part,
        torch.get_num_threads(),
        request.deterministic,
        False,
        y,
        saved,
        dy,
        dstates[:n],
        dstates[n:],
        wanted.x,
        wanted.weights,
        wanted.states,
    )


def keep(
    seed: Tensor,
    sites: Sequence[int],
    ids: Tensor,
    steps: Tensor | None,
    units: int,
    threshold: int,
) -> Tensor | None:
    return _cpu.keep(seed, tuple(sites), ids, steps, units, threshold, torch.get_num_threads())


def stream(
    request: Request,
    weights: Sequence[Tensor],
    h: Tensor,
    others: Sequence[Tensor],
) -> Any:
    return _cpu.stream(NUMBER[request.cell], tuple(weights), request.layers, h, tuple(others))


stream_step = getattr(_cpu, "stream_step", None)  # another build may have none


def instruction_sets() -> list[str]:
    """Those of the extension that this machine can run, the best first."""
    return _cpu.instruction_sets()
