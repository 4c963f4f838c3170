"""Where cuda and triton run on a CUDA device when no backend is named: where they were measured to
be faster than cuDNN on a device of the same compute capability, and nowhere else; with zoneout,
which cuDNN and cuda have not, triton without a measurement.

``python -m bench.rule --gpu`` writes the measurements into :mod:`.measured_cuda`, in classes of
problems that both sides' kernels treat alike; this module reads them. A class is a :func:`kind_of`
and a :func:`size_of`. Its entry holds the least ratios of cuDNN's time to ours among its points on
a device, so one slow point is enough to leave the class to torch, and one slow device. Where both
of ours are ahead, the one whose least ratio is the greater comes first.

There are two ratios, because a layer is called in two ways: from Python, where a call costs what
the host takes to start it, and by replays of a CUDA graph, where the device's time alone counts.
Most code makes plain calls, so ours has to be ahead in those. In graphs it must not be behind, or
whoever records one would lose by the choice. The second ratio also carries the rule to longer
sequences: a time is a fixed cost and a cost a step, so as T grows the ratio of two times moves
towards that of the device's times a step. Hence a class counts from its shortest measured sequence
on.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from math import inf
from typing import Any, NamedTuple

import torch

from . import measured_cuda
from .contract import Problem
from .torch import supports as torch_supports
from .triton_tiling import LEAST, power_of_two

#: cuDNN's time over ours, at least: in plain calls, and in replays of a graph.
AHEAD, NOT_BEHIND = 1.05, 1.0
#: The last batch of each class but the last class. Above 512 cuda's CTAs have eight sequences, no
#: longer four.
BATCHES = (1, 8, 32, 128, 512)
#: The longest sequence that cuDNN takes.
LONGEST = 65535


class Entry(NamedTuple):
    """What a device measured of a class.

    calls, graph: the least ratio of cuDNN's time to ours; inf where cuDNN cannot run, 0 where ours
        cannot; graph is None where neither can be recorded, and of ragged sequences.
    T: the shortest sequence. green: whether our tests passed, in every form that ran.
    """

    calls: float
    graph: float | None
    T: int
    green: bool

    @property
    def ahead(self) -> bool:
        level = self.graph is None or self.graph >= NOT_BEHIND
        return self.green and self.calls >= AHEAD and level

    @property
    def least(self) -> float:
        return self.calls if self.graph is None else min(self.calls, self.graph)


def width_of(H: int) -> str:
    """'H65-128': the tiles of triton's kernels fit all of these, up to whether 16 divides H."""
    most = power_of_two(H)
    least = 1 if most == LEAST else most // 2 + 1
    return f"H{least}-{most}" + ("" if H % 16 == 0 else " unaligned")


def size_of(H: int, B: int, T: int) -> str:
    """'H65-128 B9-32 T2+'. One step a call is all fixed cost, and T65536+ is too long for cuDNN."""
    steps = "T1" if T == 1 else "T2+" if T <= LONGEST else f"T{LONGEST + 1}+"
    return f"{width_of(H)} {_batch_of(B)} {steps}"


def _batch_of(B: int) -> str:
    place = bisect_left(BATCHES, B)
    least = BATCHES[place - 1] + 1 if place else 1
    most = f"-{BATCHES[place]}" if place < len(BATCHES) else "+"
    return f"B{least}{most if place else ''}"


def team_size_of(H: int, B: int, R: int) -> str:
    """'H257-512 B9-32', and of several directions 'H257-512 B9-32 R2': what decides on the regime
    of cuda's teams."""
    return f"{width_of(H)} {_batch_of(B)}" + f" R{R}" * (R > 1)


def measured_regime(
    capability: str, cell: str, type: str, way: str, H: int, B: int, R: int
) -> str | None:
    """In which regime cuda's teams were measured to be faster; None where they were not."""
    measured = measured_cuda.MEASURED_REGIMES.get(capability, {}).get((cell, type, way), {})
    return measured.get(team_size_of(H, B, R))


def kind_of(recurrences: int, ragged: bool, projected: bool) -> str:
    """'dense', 'ragged stack', ...: a stack has several layers or directions."""
    words = ["ragged" if ragged else "dense"]
    words += ["stack"] * (recurrences > 1) + ["projected"] * projected
    return " ".join(words)


def type_of(problem: Problem) -> str:
    if problem.dtype is torch.float32:
        return "tf32" if problem.tf32 else "float32"
    return str(problem.dtype).removeprefix("torch.")


def capability(device: torch.device) -> str | None:
    """'9.0' for an H100; None for what is no device of NVIDIA's on this machine."""
    if device.type != "cuda":
        return None
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=64)
def _capability(index: int) -> str | None:
    # AMD's numbers look alike: an MI250 is 9.0 as well
    if torch.version.hip is not None or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return f"{major}.{minor}"


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether a recurrent layer on CUDA multiplies in TF32."""
    setting = torch.backends.cudnn.rnn
    return dtype is torch.float32 and setting.fp32_precision == "tf32"  # type: ignore[attr-defined]


# A graph that is traced takes both for constants, as it does the choice itself (choice.py).
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]
uses_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Ruling(NamedTuple):
    """The order in which backends are tried, and the measurement behind it."""

    order: tuple[str, ...]
    reason: str


class Finding(NamedTuple):
    """What was measured of a backend for a problem. measured: whether anything was; least: the
    lowest ratio, of the device on which it is the lowest."""

    backend: str
    ahead: bool
    measured: bool
    least: float
    reason: str


_ZONEOUT = (
    "not measured: cuDNN and cuda's kernels have no zoneout, so triton's loop over time runs in "
    "place of eager's operations at each step"
)


def _tables() -> dict[str, tuple[Any, Any]]:
    """Of each backend of ours what MEASURED and GREEN are of triton."""
    return {
        "cuda": (measured_cuda.MEASURED_CUDA, measured_cuda.GREEN_CUDA),
        "triton": (measured_cuda.MEASURED, measured_cuda.GREEN),
    }


def ruling(problem: Problem) -> Ruling:
    """Of a problem on CUDA that no tracer or transform runs."""
    if problem.recording:
        reason = "triton's call cannot be recorded, as it reads batch_sizes on the CPU; torch stays"
        return Ruling(("torch", "eager"), reason)
    if problem.zoneout:
        return Ruling(("triton", "eager"), _ZONEOUT)
    found = sorted((_finding(name, problem) for name in _tables()), key=lambda f: -f.least)
    ahead = [finding for finding in found if finding.ahead]
    green = tuple(f.backend for f in found if _is_green(f.backend, problem))
    refused = torch_supports(problem._replace(mode="plain"))
    if refused is None and ahead:
        return Ruling((*(f.backend for f in ahead), "torch", "eager"), ahead[0].reason)
    if refused is not None:
        where = f"{problem.cell} in {type_of(problem)}"
        if green:
            goes = "they go" if len(green) > 1 else "it goes"
            tests = " and ".join(f"{name}'s" for name in green)
            reason = f"{tests} tests were green here for {where}; {goes} before eager"
        else:
            reason = f"triton's tests were not seen green on this device for {where}; eager stays"
    else:
        seen = [finding for finding in found if finding.measured]
        reason = (seen or [f for f in found if f.backend == "triton"])[0].reason
    return Ruling(("torch", *green, "eager"), reason)


def _is_green(backend: str, problem: Problem) -> bool:
    """Whether every form of the kernels passed its tests, for this cell and type and, where H is
    known, on a point with kernels of the same width. No test has T = 0 on a GPU."""
    greens = _tables()[backend][1].get(problem.capability or "", {})
    widths = greens.get((problem.cell, type_of(problem)), ())
    if problem.H is None:
        return bool(widths) and not _needs_h(backend)
    return width_of(problem.H) in widths and problem.T != 0 and problem.B != 0


def _needs_h(backend: str) -> bool:
    """Whether a graph for all sizes cannot hold a backend: cuda runs up to some H alone."""
    return backend == "cuda"


def _finding(backend: str, problem: Problem) -> Finding:
    """Whether a backend was measured to be faster, in words that also say where."""
    devices = _tables()[backend][0].get(problem.capability or "")
    if devices is None:
        return Finding(backend, False, False, 0.0, "not measured on this device; torch stays")
    way = "training" if problem.training else "forward"
    key = problem.cell, type_of(problem), way
    what = f"{problem.cell} in {type_of(problem)}, {way}"
    found = {name: classes.get(key, {}) for name, classes in devices.items()}
    kind = kind_of(problem.layers * problem.R, problem.ragged, problem.projected)
    T, B, H = problem.T, problem.B, problem.H
    if T is None or B is None or H is None:
        return _ahead_in_all(backend, kind, found, what)
    size = size_of(H, B, T)
    entries = {
        name: Entry(*kinds[kind][size])
        for name, kinds in found.items()
        if size in kinds.get(kind, {})
    }
    if not entries or B == 0:
        reason = f"not measured on this device: {what}, {kind} {size}; torch stays"
        return Finding(backend, False, False, 0.0, reason)
    shortest = min(entry.T for entry in entries.values())
    if T < shortest:
        what = f"{what}, {kind} {size} of fewer than {shortest} steps"
        reason = f"not measured on this device: {what}; torch stays"
        return Finding(backend, False, False, 0.0, reason)
    name = min(entries, key=lambda name: (entries[name].ahead, entries[name].calls))
    ahead, words = _compared(backend, entries[name])
    least = min(entry.least for entry in entries.values())
    return Finding(backend, ahead, True, least, f"{words} ({name}, {what}, {kind} {size})")


def _compared(backend: str, entry: Entry) -> tuple[bool, str]:
    if not entry.green:
        return False, f"torch: {backend}'s tests were not green here"
    if entry.ahead:
        if entry.calls == inf:
            return True, f"{backend}: torch has no time here"
        return True, f"{backend}: {entry.calls:.2f} times as fast as torch here, or more"
    if entry.calls < AHEAD:
        return False, f"torch: {_behind(backend, entry.calls)}"
    return False, f"torch: {_behind(backend, entry.graph or 0)} in a CUDA graph"


def _behind(backend: str, ratio: float) -> str:
    if ratio == 0:
        return f"{backend} has no time here"
    if ratio > 1:
        return f"{backend} is only {ratio:.2f} times as fast here"
    return f"{1 / ratio:.2f} times as fast as {backend} here"


def _ahead_in_all(
    backend: str, kind: str, found: dict[str, measured_cuda.Kinds], what: str
) -> Finding:
    """A graph is made for all sizes, so a backend has to run, and be ahead, at every one that was
    measured."""
    if _needs_h(backend) or not any(kind in kinds for kinds in found.values()):
        reason = f"not measured on this device: {what}, {kind}, of any size; torch stays"
        return Finding(backend, False, False, 0.0, reason)
    every = {
        f"{k} {size}, {name}": Entry(*numbers)
        for name, kinds in found.items()
        for k, sizes in kinds.items()
        for size, numbers in sizes.items()
    }
    least = min(entry.least for entry in every.values())
    behind = [name for name, entry in every.items() if not entry.ahead]
    if behind:
        reason = (
            f"torch: sizes are not known in a graph, and {backend} is not ahead in {len(behind)} "
            f"of {len(every)} classes measured here, such as {behind[0]} ({what})"
        )
        return Finding(backend, False, True, least, reason)
    reason = f"{backend}: ahead in all {len(every)} classes measured here ({what})"
    return Finding(backend, True, True, least, reason)
