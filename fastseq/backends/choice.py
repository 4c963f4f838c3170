"""Which backend runs: by the caller's word, else by a measured rule."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..cells import CELLS
from . import BACKENDS, DIFFERENTIABLE, Entry, cuda_rule, imported, load
from .contract import Backend, Memory, Problem
from .torch import uses_onednn


def preferred(problem: Problem, native: bool = True) -> tuple[str, ...]:
    """The order in which backends are tried when the caller leaves the choice to us.

    native: whether the C++ kernels were built.

    Measured on two cores of an AMD EPYC (Zen 5, AVX-512) with torch 2.13, 2026-11-20, by
    ``python -m bench.rule``; times of torch.nn over ours, forward / training.

    native:

    - float32 and float64: 1.0 to 40 / 1.0 to 40, for all cells, T, B and H, on one thread and two;
      below 1 only where :func:`is_outer_product` says so (RNN 0.4 to 0.9, GRU 0.4 to 0.9). Cells,
      against torch's: 1.3 to 8 / 1.0 to 3.
    - bfloat16, for which both have the processor's dot product: LSTM 1.3 / 1.5 at B1 H64, 1.0 / 1.0
      at B16 H256, 1.0 / 1.4 at B64 H512, 1.1 / 2.2 at B32 H1024, 1.0 to 1.6 / 1.1 to 1.9 from one
      step on. GRU 14 / 11 at B1 H64, 2.2 / 2.4 at B16 H256, 1.4 / 1.2 at B64 H512; below 1 for one
      step, or in training four at H512, and for up to four of an RNN (0.8 / 1.1 at T4 B1 H64). Odd
      sizes compute in float32: LSTM 1.1 / 1.3 at B1 H64, 0.6 / 0.6 at B16 H256, GRU 0.7 / 0.7 at
      B64 H512.
    - float16 computes in float32: LSTM, GRU and RNN 0.8 to 9.8 / 1.0 to 10 at T4, 1.9 to 15 / 2.5
      to 17 at T16.

    numba, where native was not built:

    - GRU and RNN: 1.3 to 16 / 1.9 to 18 from 12 steps on, for all B and H to 256 and 1024. A call
      costs numba 60 us more than torch, which 8 (RNN: 12) steps forward repay, or 5 in training.
    - LSTM, which torch runs on oneDNN, from 32 steps on: 1.0 to 6 / 1.0 to 3 up to H = 256, and
      0.6 to 1.0 / 0.9 to 1.4 above. oneDNN shares the hidden units of one sequence among threads:
      at B = 1 it is ahead from H = 256 on (0.7 / 0.7 to 1.0), but not on one thread.
    - LSTM in bfloat16: 2.6 / 3.4 at B1 H64, 0.7 / 0.9 at B16 H256. GRU in bfloat16: 14 / 18 at B1
      H64, 0.9 / 0.8 at B64 H512.
    - Under torch.func, eager over numba at I32 H64, 10 members that share an input / 16 per-sample
      gradients: GRU 0.9 / 0.5 at T4, 1.5 / 0.8 at T8; RNN 1.0 / 0.5 at T8. GRU T100, 10 members of
      B1 / 32 per-sample gradients: 6.6 / 5. Our way there costs 0.4 ms a call.

    On CUDA :mod:`.cuda_rule` decides, from what was measured on each compute capability.
    """
    kernels = ("native", "numba") if native else ("numba",)
    ours, theirs = (*kernels, "torch", "eager"), ("torch", *kernels, "eager")
    if problem.deterministic:
        return ("native",)
    if problem.single:  # torch has cell functions, which cost the least of all but native's call
        order = preferred(problem._replace(single=False), native)
        plain = problem.mode == "plain" and problem.dtype in (torch.float32, torch.float64)
        return order if plain and order[0] == "native" else ("torch", *order)
    if problem.mode == "trace":
        return ("torch", "eager")
    if problem.mode == "dual":
        return (DIFFERENTIABLE,)
    T, B, H = problem.T, problem.B, problem.H
    if problem.mode == "transform":
        repaid = 12 if CELLS[problem.cell].G == 1 else 8
        pays = problem.device == "cpu" and T is not None and T >= repaid
        return (*kernels, "eager") if pays else ("eager",)
    if problem.device == "cuda":
        return cuda_rule.ruling(problem).order
    if problem.device != "cpu":
        return ("torch", "eager")
    if T is None or B is None or H is None:
        return ours
    sixteen = problem.dtype in (torch.bfloat16, torch.float16)
    one_gate = CELLS[problem.cell].G == 1
    if native and not sixteen:
        one_row = T * B == 1 and problem.training and is_outer_product(problem.cell, H)
        return theirs if one_row else ours
    half = problem.dtype is torch.float16
    if native and (half or all(size and size % 2 == 0 for size in (problem.I, H, problem.P))):
        if uses_onednn(problem) and not half:
            return ours
        return ours if T >= (8 if one_gate or H >= 512 else 4) else theirs
    if uses_onednn(problem):
        if sixteen:
            return ours if B * H <= 256 and T >= 32 else theirs
        if T < 32 and T * B * H < 65536:
            return theirs
        shared = (B == 1 and H >= 256) or (H >= 512 and not problem.training)
        return theirs if shared and problem.threads > 1 else ours
    if sixteen and H >= 512 and B >= 32:
        return theirs
    repaid = 12 if one_gate else 5 if problem.training else 8
    return ours if T >= repaid else theirs


def is_outer_product(cell: str, H: int) -> bool:
    """Of one step of one sequence that is trained: whether its time is that of the weights'
    gradients, an outer product, which torch's operations write faster."""
    return not CELLS[cell].other_states and H >= 256


def left_to_us(problem: Problem) -> tuple[str, ...]:
    """:func:`preferred` on this machine."""
    return preferred(problem, native=not isinstance(load("native"), str))


def measured(problem: Problem) -> str | None:
    """The measurement that decided, in words, where a table of them does."""
    if problem.device == "cuda" and problem.mode in ("plain", "compile"):
        return cuda_rule.ruling(problem).reason
    return None


class Verdict(NamedTuple):
    """What :func:`judge` found: the backend that runs, and why each other one tried does not."""

    chosen: str | None
    declined: dict[str, str]


def as_order(backend: Any) -> Backend:
    """What a caller gives as ``backend``, checked: None, a name, or names in order as a tuple.

    Raises:
        TypeError: neither of these.
        ValueError: there is no backend of that name.
    """
    if backend is None:
        return None
    found = (backend,) if isinstance(backend, str) else backend
    if not isinstance(found, (tuple, list)) or not found or not all(map(_is_name, found)):
        raise TypeError(
            "backend: expected None, a name, or a tuple of names in order of preference, "
            f"got {backend!r}"
        )
    for name in found:
        if name not in BACKENDS:
            raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return backend if isinstance(backend, str) else tuple(found)


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def names(backend: Backend) -> tuple[str, ...]:
    """The backends that a caller names, checked; none for None."""
    order = as_order(backend)
    return (order,) if isinstance(order, str) else order or ()


def is_elsewhere(device: str) -> bool:
    """Whether a problem is for another machine: this one has no such device, so that the tensors
    are fake, and what is traced with them runs where there is one."""
    return device == "cuda" and not torch.cuda.is_available()


def reason_against(name: str, problem: Problem) -> str | None:
    """Why a backend does not run a problem; None if it does."""
    module = imported(name) if is_elsewhere(problem.device) else load(name)
    return f"not available: {module}" if isinstance(module, str) else declines(module, problem)


def explained(name: str, problem: Problem) -> str | None:
    """How a backend will run a problem that it supports, in lines, where it says so."""
    module = imported(name) if is_elsewhere(problem.device) else load(name)
    hook = getattr(module, "explain", None)
    return None if hook is None else hook(problem)


def declines(module: Any, problem: Problem) -> str | None:
    """Why a backend's module does not run a problem, wherever it is; None if it does."""
    can = module.ABILITIES
    if problem.zoneout and not can.zoneout:
        return "its loop hands the states on by itself, and zoneout blends them"
    if problem.deterministic and not can.deterministic:
        return (
            "its bits may depend on the batch or the threads; deterministic=True takes native alone"
        )
    if problem.input_product and not can.input_product:
        return "it makes the input product itself, and takes none that is made already (w_ih=None)"
    if problem.heads > 1 and not can.heads:
        return f"it takes one matrix w_hh, not {problem.heads} blocks on its diagonal"
    return module.supports(problem)


@lru_cache(maxsize=4096)
def judge(problem: Problem, backend: Backend) -> Verdict:
    declined: dict[str, str] = {}
    for name in left_to_us(problem) if backend is None else names(backend):
        reason = reason_against(name, problem)
        if reason is None:
            return Verdict(name, declined)
        declined[name] = reason
    return Verdict(None, declined)


def select(problem: Problem, backend: Backend = None) -> str:
    """The backend that runs ``problem``.

    Raises ValueError for a name that does not exist, RuntimeError for a backend that is not
    available on this machine, NotImplementedError where every backend named declines.
    """
    verdict = judge(problem, backend)
    if verdict.chosen is not None:
        return verdict.chosen
    reasons = "; ".join(f"{name}: {reason}" for name, reason in verdict.declined.items())
    error = (
        RuntimeError
        if all(reason.startswith("not available") for reason in verdict.declined.values())
        else NotImplementedError
    )
    always = "" if backend is None else " backend=None always runs."
    raise error(f"backend={backend!r} cannot run this: {reasons}.{always}")


def select_constant(backend: Backend, *problem: Any) -> str:
    """:func:`select` for a graph that is traced, in arguments that Dynamo takes for constants."""
    return select(Problem(*problem), backend)


# What torch.compiler.assume_constant_result does, without importing Dynamo for it: the choice
# depends on no tensor, and a graph has nothing to record of it.
select_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def sees_through(name: str) -> bool:
    """Whether autograd sees through a backend's forward."""
    return imported(name).ABILITIES.differentiable


sees_through._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_one_call(name: str, problem: Problem) -> Any | None:
    """The module of a backend where it runs all layers of a problem in one call, else None."""
    module = load(name)
    stacks = getattr(module, "stacks", None)
    return module if stacks is not None and stacks(problem) else None


def in_one_call_constant(name: str, *problem: Any) -> bool:
    """Whether :func:`in_one_call` finds a module, for a graph that is traced."""
    return in_one_call(name, Problem(*problem)) is not None


in_one_call_constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=4096)
def short_way(
    cell: str,
    dtype: torch.dtype,
    device: str,
    backend: Backend,
    lean: bool,
    single: bool,
    masked: bool = False,
    zoneout: tuple[float, ...] = (),
    reset: bool = False,
    all_states: bool = False,
) -> tuple[str, Any] | None:
    """Name and module of the backend that runs plain calls of these in one call whatever their
    sizes, or None where the sizes, or more than these, decide.

    The modules ask before they look at anything else. A plain call has nothing but an input, a
    state and weights, in plain code, without lengths. masked, zoneout: what a layer's own options
    ask for. reset, all_states: what a call is given, and gives.
    """
    T = 1 if single else None
    memory: Memory = "lean" if lean else "full"
    problem = Problem(cell, dtype, device, T, None, None, None, None, single=single, memory=memory)
    problem = problem._replace(h_mask=masked, zoneout=zoneout, reset=reset, trajectory=all_states)
    found = []
    for training in (False, True):
        chosen = judge(problem._replace(training=training), backend).chosen
        if chosen is None:
            return None
        module = in_one_call(chosen, problem._replace(training=training))
        if module is None:
            return None
        found.append((chosen, module))
    return found[0] if found[0] == found[1] else None


def streams(cell: str, dtype: torch.dtype, device: str, batch: int, backend: Backend) -> Any | None:
    """The module of the backend that runs single steps on packed weights, or None."""
    problem = Problem(cell, dtype, device, 1, batch, None, None, None)
    for name in left_to_us(problem) if backend is None else names(backend):
        module = load(name)
        if hasattr(module, "stream") and module.streams(problem):
            return module
    return None


#: The backends that may draw masks on a kind of device, the fastest first.
DRAWING = {"cpu": ("native", "numba"), "cuda": ("triton",)}


def draws(device: str) -> Any | None:
    """The module of the first backend of this machine that draws masks there, or None."""
    modules = map(load, DRAWING.get(device, ()))
    return next((module for module in modules if hasattr(module, "keep")), None)


#: The backends that may have kernels of attention on a kind of device.
ATTENDING = {"cpu": ("native",)}


def attends(device: str) -> Any | None:
    """The module of the first backend of this machine that has them there, or None."""
    modules = map(load, ATTENDING.get(device, ()))
    return next((module for module in modules if hasattr(module, "attend")), None)


class Table(dict[str, str]):
    """name -> 'available', or why not and the remedy; prints as a table."""

    def __repr__(self) -> str:
        rows = [f"{name:<10} {BACKENDS[name].what:<64} {state}" for name, state in self.items()]
        return "\n".join(rows)


def backends() -> Table:
    """The backends of the library: what is available on this machine, and what is not and why."""
    table = Table()
    for name in BACKENDS:
        module = load(name)
        table[name] = f"not available: {module}" if isinstance(module, str) else "available"
    return table


def register(name: str, what: str, module: str, remedy: str = "") -> None:
    """Add a backend, which then runs wherever it is named.

    Args:
        name: as ``backend=`` takes it; a name that is free.
        what: what it is, for :func:`fastseq.backends`.
        module: where to import it from, 'package.module'; what it has, :mod:`.contract` says. It is
            imported when the backend is first asked for.
        remedy: how to get what it needs, for where it cannot be imported.
    """
    if name in BACKENDS:
        raise ValueError(f"name: there is a backend {name!r} already, {BACKENDS[name].module}")
    BACKENDS[name] = Entry(what, remedy, module)


def unregister(name: str) -> None:
    """Take out what :func:`register` added."""
    del BACKENDS[name]
    for found in (imported, load, judge, short_way):
        found.cache_clear()
