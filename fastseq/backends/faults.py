"""What goes wrong inside a launch on a GPU, and how the caller learns of it.

A launch cannot raise: the call that made it has long returned, and a CUDA graph replays it without
any call. A kernel that waited in vain leaves NaN in what it was to compute, and writes a code into
a number in the host's memory, one for each device. Reading that costs no synchronisation. The next
call of a backend whose kernels wait, forward or backward, raises what it finds there;
:func:`check` waits for the device first.
"""

from __future__ import annotations

import ctypes
from threading import Lock

import torch
from torch import Tensor

__all__ = ["check", "code", "flag", "raise_if_set"]

_lock = Lock()
#: device -> its flag, pinned, and the same number to read. A recorded graph writes there as long as
#: it lives, so neither is ever freed.
_flags: dict[torch.device, tuple[Tensor, ctypes.c_int32]] = {}
#: code - 1 -> kernel.
_kernels: list[str] = []


def flag(device: torch.device) -> Tensor:
    """(1,), int32, 0 where nothing went wrong: where kernels on a device write the code of a fault.

    Pinned, so that they reach it by its address; on the CPU, where they are interpreted, an
    ordinary tensor. A graph that is captured before there is one records nobody's number: memory
    of the host is not pinned during a capture.
    """
    found = _flags.get(device)
    if found is None and device.type == "cuda" and _capturing():
        return torch.zeros(1, dtype=torch.int32, device=device)
    if found is None:
        with _lock:
            found = _flags.get(device)
            if found is None:
                pinned = device.type == "cuda"
                made = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=pinned)
                # read so in any mode of torch: inference, tracing, functorch
                found = _flags[device] = made, ctypes.c_int32.from_address(made.data_ptr())
    return found[0]


def code(kernel: str) -> int:
    """What a kernel writes into the flag: the same number for the same name, and never 0."""
    if kernel not in _kernels:
        with _lock:
            if kernel not in _kernels:
                _kernels.append(kernel)
    return _kernels.index(kernel) + 1


def raise_if_set(device: torch.device) -> None:
    """Raise for a launch on a device whose fault is known by now, once.

    While a CUDA graph is captured nothing is raised, and the flag stays as it is.

    Raises:
        RuntimeError: names the kernel, what happened, and the remedy.
    """
    found = _flags.get(device)
    if found is not None and found[1].value and not _capturing():
        raise RuntimeError(_taken(device))


def check(device: torch.device | str | int | None = None) -> None:
    """Wait for a GPU, and raise if a kernel of fastseq's failed on it since the last look.

    Kernels whose CTAs (Triton's programs) wait for one another give up after some seconds, where
    the GPU is shared or a debugger stopped it: what they compute from there on is NaN. The next
    call or backward that runs on the same backend and device raises that by itself, unless the
    launch was still running then. Replaying a CUDA graph makes no call, so there this function
    alone tells: call it where you synchronise anyway.

    Args:
        device: None for all devices on which such kernels ran.

    Raises:
        RuntimeError: a kernel failed: its name, what happened, and the remedy. Each fault is raised
            once. Also while a CUDA graph is captured, which cannot wait for the device.
    """
    if _capturing():
        raise RuntimeError(
            "fastseq.check() waits for the device, which a CUDA graph cannot record; call it when "
            "the capture has ended"
        )
    chosen = None if device is None else _indexed(device)
    told = []
    for place in list(_flags):
        if chosen in (None, place):
            if place.type == "cuda":
                torch.cuda.synchronize(place)
            if _flags[place][1].value:
                told.append(_taken(place))
    if told:
        raise RuntimeError("\n".join(told))


def _indexed(device: torch.device | str | int) -> torch.device:
    """As tensors name theirs."""
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if place.type == "cuda" and place.index is None:
        place = torch.device("cuda", torch.cuda.current_device())
    return place


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _taken(device: torch.device) -> str:
    """What the flag of a device says; it is reset."""
    number = _flags[device][1]
    kernel = _kernels[number.value - 1]
    number.value = 0
    return (
        f"{kernel}, launched on {device} by an earlier call: its CTAs wait for one another, and"
        " one waited in vain, as where the GPU is shared or was stopped in a debugger. What that "
        "call returned, and gradients through it, hold NaN: run it again. backend='torch' or "
        "'eager' waits for nobody, nor does triton in a launch for each step: with "
        "fastseq.backends.triton.larger_as('step')"
    )
