"""The eager form: torch operations step by step, which autograd sees through.

It serves what no kernel does: every device and dtype, every transform, every order of derivative.
It is also how the raw backends get their second derivatives.
"""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import _VF, Tensor

from ..cells import CELLS, Cell, arguments, bind
from ..cells.declaration import Phase
from ..cells.text import Text
from .contract import Abilities, Call, Problem, Result, Weights
from .layout import unprojected
from .tracing import is_tracing, loop, unrecorded

Phases = list[tuple[Phase, Text, tuple[int, int]]]
#: Where a state stays as it was, the part of it that does, or None where it never does.
Stay = Tensor | float | None

ABILITIES = Abilities(differentiable=True, zoneout=True)


def unavailable() -> str | None:
    return None


def supports(problem: Problem) -> str | None:
    cell = CELLS[problem.cell]
    reason = cell.beyond(autograd=True) or unprojected(problem)
    if reason is None:
        texts(cell)  # before a graph is traced
    return reason


def _maximum(a: Any, b: Any) -> Tensor:
    """Of a number, too, which torch.maximum does not take."""
    if not isinstance(b, Tensor):
        b = a.new_full((), b)
    elif not isinstance(a, Tensor):
        a = b.new_full((), a)
    return torch.maximum(a, b)


VOCABULARY = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "maximum": _maximum,
    "logsigmoid": torch.nn.functional.logsigmoid,
    "sqrt": torch.sqrt,
    "dsigmoid": lambda y: y * (1 - y),
    "dtanh": lambda y: 1 - y * y,
    "drelu": lambda y: torch.where(y <= 0, 0.0, 1.0).to(y.dtype),
    "dmaximum": lambda a, b: torch.where(a < b, 0.0, torch.where(a == b, 0.5, 1.0)).to(a.dtype),
    "dlogsigmoid": lambda y: -torch.expm1(y),
    "dsqrt": lambda y: 0.5 / y,
}


def _bound(cell: Cell) -> list[Text]:
    """The cell's texts, in a form that torch.compile can trace."""
    for owner in (cell, *cell.phases):
        for name, value in vars(type(owner)).items():
            if isinstance(value, cached_property):  # computing one takes a lock, before 3.12
                getattr(owner, name)
    found = [bind(phase.forward, "eager", **VOCABULARY) for phase in cell.phases]
    for text in found:
        text.__globals__["__builtins__"] = builtins  # Dynamo looks for it
    return found


#: By the cell's name. Made at import: torch.compile traces a look-up, and no binding.
TEXTS = {name: _bound(cell) for name, cell in CELLS.items()}


def texts(cell: Cell) -> list[Text]:
    """The forward texts of a cell's phases."""
    if cell.name not in TEXTS:  # of a user's own
        TEXTS[cell.name] = _bound(cell)
    return TEXTS[cell.name]


def forward(call: Call, save: bool = False, trajectory: bool = False) -> Result:
    """One layer. 16-bit types compute gates and carry states other than h in float32."""
    if is_tracing():
        return _in_a_trace(call, trajectory)
    if call.batch_sizes is not None and torch.compiler.is_compiling():
        return _of_dense_rows(call, trajectory)
    return _forward(call, trajectory)


def _forward(call: Call, trajectory: bool, alive: Tensor | None = None) -> Result:
    """alive: (T, B), where a step is one of a sequence's; it keeps its state in the others."""
    x = call.x
    wide = _wide(x)
    states = call.states or call.zero_states()
    if call.batch_sizes is None:
        T, B = x.shape[:2]
        sizes = [B] * T
        rows = x.reshape(T * B, x.shape[-1])
    else:
        sizes = call.batch_sizes.tolist()
        rows = x[: sum(sizes)]
    ys, finals, alongs = [], [], []
    for r, weights in enumerate(call.weights):
        reset = None if call.reset is None else call.reset[r, : rows.shape[0]]
        mask = None if call.h_mask is None else call.h_mask[r]
        start = [s[r] if k == 0 else s[r].to(wide) for k, s in enumerate(states)]
        outputs, final, along = _recurrence(
            call.definition,
            rows,
            sizes,
            start,
            weights,
            call.reverse[r],
            reset,
            mask,
            wide,
            _stay(call, r),
            alive,
        )
        ys.append(outputs)
        finals.append(final)
        alongs.append(along)

    def joined(parts: list[Tensor]) -> Tensor:
        value = torch.cat(parts, -1)
        if call.batch_sizes is None:
            return value.reshape(*x.shape[:2], value.shape[-1])
        padding = value.new_zeros((x.shape[0] - value.shape[0], value.shape[-1]))
        return torch.cat([value, padding]) if padding.shape[0] else value

    return Result(
        joined(ys),
        [torch.stack(s).to(x.dtype) for s in zip(*finals, strict=True)],
        [joined(list(s)).to(x.dtype) for s in zip(*alongs, strict=True)] if trajectory else [],
        [],
    )


def _stay(call: Call, r: int) -> list[Stay] | None:
    """What of each state stays as it was, in one recurrence; None where nothing does."""
    if call.part:
        return list(call.part)
    return [None if s is None else s[r] for s in call.stay] or None


def _wide(x: Tensor) -> torch.dtype:
    """The type of gates and of carried states other than h."""
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _recurrence(
    cell: Cell,
    x: Tensor,
    sizes: list[int],
    states: list[Tensor],
    weights: Weights,
    reverse: bool,
    reset: Tensor | None,
    h_mask: Tensor | None,
    wide: torch.dtype,
    stay: Sequence[Stay] | None,
    alive: Tensor | None,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    H = weights.w_ih.shape[0] // cell.G
    phases = _phases(cell)
    gates = torch.nn.functional.linear(x, weights.w_ih, weights.b_ih)
    inputs = gates.to(wide).split(list(sizes))
    resets = None if reset is None else reset.split(sizes)
    stays = None
    if stay is not None:
        rows = x.shape[0]  # without padding
        stays = [s[:rows].split(sizes) if isinstance(s, Tensor) else [s] * len(sizes) for s in stay]
    outputs: list[Tensor] = []
    along: list[list[Tensor]] = []

    order = range(len(sizes))
    for t in reversed(order) if reverse else order:
        B_t = sizes[t]
        now = _step(
            cell,
            phases,
            H,
            inputs[t],
            [s[:B_t] for s in states],
            weights,
            None if resets is None else resets[t],
            None if h_mask is None else h_mask[:B_t],
            None if stays is None else [part[t] for part in stays],
        )
        if alive is not None:
            now = [torch.where(alive[t][:, None], *s) for s in zip(now, states, strict=True)]
        outputs.append(now[0])
        along.append(now[1:])
        states = [
            new if B_t == carried.shape[0] else torch.cat([new, carried[B_t:]])
            for new, carried in zip(now, states, strict=True)
        ]
    if not sizes:
        empty = x.new_zeros((0, states[0].shape[-1]))
        return empty, states, [x.new_zeros((0, H)) for _ in cell.other_states]
    if reverse:
        outputs.reverse()
        along.reverse()
    return torch.cat(outputs), states, [torch.cat(s) for s in zip(*along, strict=True)]


def _phases(cell: Cell) -> Phases:
    """Each with its text and the rows of its recurrent product."""
    rows = [cell.product_rows(phase) for phase in cell.phases]
    return list(zip(cell.phases, texts(cell), rows, strict=True))


def _step(
    cell: Cell,
    phases: Phases,
    H: int,
    gates: Tensor,
    states: Sequence[Tensor],
    weights: Weights,
    reset: Tensor | None,
    h_mask: Tensor | None,
    stay: Sequence[Stay] | None,
) -> list[Tensor]:
    """The states after a step. gates: the input product (B, G*H); reset: (B,); h_mask: (B, P)."""
    wide = gates.dtype
    now = {f"{name}_prev": value for name, value in zip(cell.states, states, strict=True)}
    if reset is not None:
        now = {name: value.masked_fill(reset[:, None], 0) for name, value in now.items()}
    h_prev = now["h_prev"]
    now["h_prev"] = h_prev.to(wide)
    now |= {name: u.to(wide) for name, u in zip(cell.unit_parameters, weights.units, strict=True)}
    for gate, value in zip(cell.gates, gates.split(H, -1), strict=True):
        now[f"x_{gate}"] = value
    for phase, text, (first, last) in phases:
        if last and weights.w_hh is not None:
            operand = h_prev if phase.operand == "h_prev" else now[phase.operand].to(h_prev.dtype)
            if h_mask is not None and phase.operand == "h_prev":
                operand = operand * h_mask
            rows = slice(first * H, last * H)
            bias = None if weights.b_hh is None else weights.b_hh[rows]
            product = torch.nn.functional.linear(operand, weights.w_hh[rows], bias).to(wide)
            for gate, value in zip(cell.product_gates(phase), product.split(H, -1), strict=True):
                now[f"s_{gate}"] = value
                if f"a_{gate}" in arguments(phase.forward):
                    now[f"a_{gate}"] = now[f"x_{gate}"] + value
        results = text(*(now[name] for name in arguments(phase.forward)))
        now |= dict(zip(phase.returns, results, strict=True))
    h = now["h"].to(h_prev.dtype)
    if weights.w_hr is not None:
        h = torch.nn.functional.linear(h, weights.w_hr)
    new = [h, *(now[name] for name in cell.other_states)]
    if stay is None:
        return new
    before = (h_prev, *(now[f"{name}_prev"] for name in cell.other_states))
    return [_zoned(*parts) for parts in zip(new, before, stay, strict=True)]


def _of_dense_rows(call: Call, trajectory: bool) -> Result:
    """:func:`forward` of packed rows for a graph, in which no shape depends on their lengths."""
    assert call.batch_sizes is not None
    x, sizes = call.x, call.batch_sizes.to(call.x.device)
    T, B, N = sizes.shape[0], call.B, x.shape[0]
    ends = sizes.cumsum(0)
    starts, sequence, row = (
        ends - sizes,
        torch.arange(B, device=x.device),
        torch.arange(N, device=x.device),
    )
    alive = sequence < sizes[:, None]
    places = (starts[:, None] + sequence).clamp(max=N - 1).reshape(-1)
    step = torch.searchsorted(ends, row, right=True).clamp(max=T - 1)
    back = step * B + (row - starts.index_select(0, step)).clamp(max=B - 1)

    def dense(rows: Tensor) -> Tensor:
        """(T*B, ...); whatever padding holds, it reaches no gradient."""
        return rows.index_select(0, places).masked_fill(~alive.reshape(-1, 1), 0)

    def packed(steps: Tensor) -> Tensor:
        rows = steps.reshape(T * B, steps.shape[-1]).index_select(0, back)
        return rows.masked_fill((row >= ends[-1])[:, None], 0)

    reset = call.reset
    stay = [None if s is None else torch.stack([dense(way) for way in s]) for s in call.stay]
    if reset is not None:
        reset = reset.index_select(1, places)
    x = dense(x).reshape(T, B, x.shape[-1])
    call = replace(call, x=x, batch_sizes=None, reset=reset, stay=stay)
    result = _forward(call, trajectory, alive)
    return Result(packed(result.y), result.states, [packed(c) for c in result.trajectory], [])


def _in_a_trace(call: Call, trajectory: bool) -> Result:
    """:func:`forward` for torch.jit.trace, which would write out the steps and the lengths of its
    example. Of dense rows: a sequence keeps its state outside of its steps."""
    cell, x, sizes = call.definition, call.x, call.batch_sizes
    H, wide = _units(call), _wide(x)
    alive: list[Tensor] = []
    lengths: Any = None
    if sizes is not None:
        _, lengths = _VF._pad_packed_sequence(x, sizes, False, 0.0, -1)
        steps = torch.arange(sizes.shape[0], device=x.device)
        alive = [steps[:, None] < lengths.to(x.device)]

    def dense(rows: Tensor) -> Tensor:
        """(T, B, ...) from packed rows, or from those of dense ones one behind the other."""
        if sizes is not None:
            return _VF._pad_packed_sequence(rows, sizes, False, 0.0, -1)[0]
        return rows.reshape(*x.shape[:2], *rows.shape[1:])

    def rows(steps: Tensor) -> Tensor:
        return steps if sizes is None else _VF._pack_padded_sequence(steps, lengths, False)[0]

    states = call.states or call.zero_states()
    phases, ys, finals, alongs = _phases(cell), [], [], []
    for r, weights in enumerate(call.weights):
        gates = torch.nn.functional.linear(x, weights.w_ih, weights.b_ih).to(wide)
        reset = [] if call.reset is None else [dense(call.reset[r])]
        stay = _stay(call, r)
        drawn = [dense(s) for s in stay or () if isinstance(s, Tensor)]
        mask = [] if call.h_mask is None else [call.h_mask[r]]
        recurrent = weights._replace(w_ih=None, b_ih=None)

        def step(
            *tensors: Tensor,
            resets=bool(reset),
            stay=stay,
            masked=bool(mask),
            recurrent=recurrent,
        ) -> Any:
            rest = iter(tensors)
            gates = next(rest)
            alive_t = next(rest) if alive else None
            reset_t = next(rest) if resets else None
            stay_t = stay and [next(rest) if isinstance(s, Tensor) else s for s in stay]
            old = [next(rest) for _ in cell.states]
            mask = next(rest) if masked else None
            own = recurrent.map(lambda _: next(rest))
            new = _step(cell, phases, H, gates, old, own, reset_t, mask, stay_t)
            if alive_t is not None:
                new = [torch.where(alive_t[:, None], *s) for s in zip(new, old, strict=True)]
            return tuple(new) if len(new) > 1 else new[0]

        inputs = [gates if sizes is None else dense(gates), *alive, *reset, *drawn]
        if call.reverse[r]:
            inputs = [i.flip(0) for i in inputs]
        start = [s[r] if k == 0 else s[r].to(wide) for k, s in enumerate(states)]
        along, final = loop(step, inputs, start, [*mask, *recurrent.given()])
        if call.reverse[r]:
            along = [s.flip(0) for s in along]
        ys.append(along[0])
        alongs.append(along[1:])
        finals.append(final)
    return Result(
        rows(torch.cat(ys, -1)),
        [torch.stack(s).to(x.dtype) for s in zip(*finals, strict=True)],
        [rows(torch.cat(s, -1)).to(x.dtype) for s in zip(*alongs, strict=True)]
        if trajectory
        else [],
        [],
    )


@unrecorded
def _units(call: Call) -> int:
    return call.H


def _zoned(new: Tensor, old: Tensor, stay: Stay) -> Tensor:
    """Zoneout (Krueger et al. 2017): a unit's state, or in expectation a part of it, stays."""
    if stay is None:
        return new
    return torch.where(stay, old, new) if isinstance(stay, Tensor) else new + stay * (old - new)
