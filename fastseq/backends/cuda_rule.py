"""Where triton runs on a CUDA device when no backend is named: where it was measured to be faster
than cuDNN on a device of the same compute capability, and nowhere else.

``python -m bench.rule --gpu`` writes the measurements into :mod:`.measured_cuda`, in classes of
problems that both sides' kernels treat alike; this module reads them. A class is a :func:`kind_of`
and a :func:`size_of`. Its entry holds the least ratios of cuDNN's time to triton's among its
points on a device, so one slow point is enough to leave the class to torch, and one slow device.

There are two ratios, because a layer is called in two ways: from Python, where a call costs what
the host takes to start it, and by replays of a CUDA graph, where the device's time alone counts.
Most code makes plain calls, so triton has to be ahead in those. In graphs it must not be behind, or
whoever records one would lose by the choice. The second ratio also carries the rule to longer
sequences: a time is a fixed cost and a cost a step, so as T grows the ratio of two times moves
towards that of the device's times a step. Hence a class counts from its shortest measured sequence
on.
"""

from __future__ import annotations

from bisect import bisect_left
from functools import lru_cache
from math import inf
from typing import NamedTuple

import torch

from . import measured_cuda
from .contract import Problem
from .torch import supports as torch_supports
from .triton_tiling import LEAST, power_of_two

#: cuDNN's time over triton's, at least: in plain calls, and in replays of a graph.
AHEAD, NOT_BEHIND = 1.05, 1.0
#: The last batch of each class but the last class.
BATCHES = (1, 8, 32, 128)
#: The longest sequence that cuDNN takes.
LONGEST = 65535


class Entry(NamedTuple):
    """What a device measured of a class.

    calls, graph: the least ratio of cuDNN's time to triton's; inf where cuDNN cannot run, 0 where
        triton cannot; graph is None where neither can be recorded, and of ragged sequences.
    T: the shortest sequence. green: whether triton's tests passed, in every form that ran.
    """

    calls: float
    graph: float | None
    T: int
    green: bool

    @property
    def ahead(self) -> bool:
        level = self.graph is None or self.graph >= NOT_BEHIND
        return self.green and self.calls >= AHEAD and level


def width_of(H: int) -> str:
    """'H65-128': the tiles of triton's kernels fit all of these, up to whether 16 divides H."""
    most = power_of_two(H)
    least = 1 if most == LEAST else most // 2 + 1
    return f"H{least}-{most}" + ("" if H % 16 == 0 else " unaligned")


def size_of(H: int, B: int, T: int) -> str:
    """'H65-128 B9-32 T2+'. One step a call is all fixed cost, and T65536+ is too long for cuDNN."""
    place = bisect_left(BATCHES, B)
    least = BATCHES[place - 1] + 1 if place else 1
    most = f"-{BATCHES[place]}" if place < len(BATCHES) else "+"
    steps = "T1" if T == 1 else "T2+" if T <= LONGEST else f"T{LONGEST + 1}+"
    return f"{width_of(H)} B{least}{most if place else ''} {steps}"


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


def ruling(problem: Problem) -> Ruling:
    """Of a problem on CUDA that no tracer or transform runs."""
    if problem.recording:
        reason = "triton's call cannot be recorded, as it reads batch_sizes on the CPU; torch stays"
        return Ruling(("torch", "eager"), reason)
    ahead, reason = _ahead(problem)
    refused = torch_supports(problem._replace(mode="plain"))
    green = _is_green(problem)
    if refused is None and ahead:
        return Ruling(("triton", "torch", "eager"), reason)
    if refused is not None:
        where = f"{problem.cell} in {type_of(problem)}"
        reason = f"triton's tests were green here for {where}; it goes before eager"
        if not green:
            reason = f"triton's tests were not seen green on this device for {where}; eager stays"
    return Ruling(("torch", "triton", "eager") if green else ("torch", "eager"), reason)


def _is_green(problem: Problem) -> bool:
    """Whether every form of the kernels passed its tests, for this cell and type and, where H is
    known, on a point with kernels of the same width. No test has T = 0 on a GPU."""
    greens = measured_cuda.GREEN.get(problem.capability or "", {})
    widths = greens.get((problem.cell, type_of(problem)), ())
    if problem.H is None:
        return bool(widths)
    return width_of(problem.H) in widths and problem.T != 0 and problem.B != 0


def _ahead(problem: Problem) -> tuple[bool, str]:
    """Whether triton was measured to be faster, in words that also say where."""
    devices = measured_cuda.MEASURED.get(problem.capability or "")
    if devices is None:
        return False, "not measured on this device; torch stays"
    way = "training" if problem.training else "forward"
    key = problem.cell, type_of(problem), way
    what = f"{problem.cell} in {type_of(problem)}, {way}"
    found = {name: classes.get(key, {}) for name, classes in devices.items()}
    kind = kind_of(problem.layers * problem.R, problem.ragged, problem.projected)
    T, B, H = problem.T, problem.B, problem.H
    if T is None or B is None or H is None:
        return _ahead_in_all(kind, found, what)
    size = size_of(H, B, T)
    entries = {
        name: Entry(*kinds[kind][size])
        for name, kinds in found.items()
        if size in kinds.get(kind, {})
    }
    if not entries or B == 0:
        return False, f"not measured on this device: {what}, {kind} {size}; torch stays"
    shortest = min(entry.T for entry in entries.values())
    if T < shortest:
        what = f"{what}, {kind} {size} of fewer than {shortest} steps"
        return False, f"not measured on this device: {what}; torch stays"
    name = min(entries, key=lambda name: (entries[name].ahead, entries[name].calls))
    ahead, words = _compared(entries[name])
    return ahead, f"{words} ({name}, {what}, {kind} {size})"


def _compared(entry: Entry) -> tuple[bool, str]:
    if not entry.green:
        return False, "torch: triton's tests were not green here"
    if entry.ahead:
        if entry.calls == inf:
            return True, "triton: torch has no time here"
        return True, f"triton: {entry.calls:.2f} times as fast as torch here, or more"
    if entry.calls < AHEAD:
        return False, f"torch: {_behind(entry.calls)}"
    return False, f"torch: {_behind(entry.graph or 0)} in a CUDA graph"


def _behind(ratio: float) -> str:
    if ratio == 0:
        return "triton has no time here"
    if ratio > 1:
        return f"triton is only {ratio:.2f} times as fast here"
    return f"{1 / ratio:.2f} times as fast as triton here"


def _ahead_in_all(kind: str, found: dict[str, measured_cuda.Kinds], what: str) -> tuple[bool, str]:
    """A graph is made for all sizes, so triton has to be ahead at every one that was measured."""
    if not any(kind in kinds for kinds in found.values()):
        return False, f"not measured on this device: {what}, {kind}, of any size; torch stays"
    every = {
        f"{k} {size}, {name}": Entry(*numbers)
        for name, kinds in found.items()
        for k, sizes in kinds.items()
        for size, numbers in sizes.items()
    }
    behind = [name for name, entry in every.items() if not entry.ahead]
    if behind:
        return False, (
            f"torch: sizes are not known in a graph, and triton is not ahead in {len(behind)} of "
            f"{len(every)} classes measured here, such as {behind[0]} ({what})"
        )
    return True, f"triton: ahead in all {len(every)} classes measured here ({what})"
