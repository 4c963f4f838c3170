"""What it costs the programs of a grid to meet, with nothing between."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from fastseq.backends.triton_kernels import Kernel, arrive, wait

from . import timing
from .crew import doing
from .forms import PATIENCE, Kinds

#: Meetings in a launch. The difference of two launches is without what a launch costs.
FEW, MANY = 100, 2100


@triton.jit(do_not_specialize=["meetings", "programs", "patience"])
def meet_kernel(counter_ptr, met_ptr, meetings, programs, patience):
    """met (programs,): not 0 where all came to every meeting."""
    for k in range(meetings):
        arrive(counter_ptr)
        patience = wait(counter_ptr, (k + 1) * programs, patience)
    tl.store(met_ptr + tl.program_id(0), patience)


MEET = Kernel(meet_kernel, tuple(meet_kernel.arg_names))


def counts(kinds: Kinds) -> list[int]:
    """Of programs: powers of two, and as many as are on the chip at once."""
    most = kinds.device.processors
    return [n for n in (2, 4, 8, 16, 32, 64, 128) if n < most] + [most] * (most > 0)


def meet(programs: int, meetings: int) -> torch.Tensor:
    counter = torch.zeros(16, dtype=torch.int64, device="cuda")
    met = torch.zeros(programs, dtype=torch.int32, device="cuda")
    values = {"counter_ptr": counter, "met_ptr": met, "meetings": meetings}
    values |= {"programs": programs, "patience": PATIENCE}
    MEET((programs, 1, 1), values, {"num_warps": 4, "launch_cooperative_grid": True})
    return met


def microseconds(programs: int, silence: float) -> Iterator[float]:
    """Of one meeting."""
    doing(f"barrier of {programs} programs", silence)
    if not bool(meet(programs, MANY).all()):
        raise RuntimeError("some programs did not come to a meeting")
    few, many = (
        min(timing.sample(lambda n=n: meet(programs, n), 1) for _ in range(7)) for n in (FEW, MANY)
    )
    yield (many - few) / (MANY - FEW) * 1e3
