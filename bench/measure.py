"""What a benchmark case is made of: contenders, estimates, interleaved rounds, saved bytes."""

from __future__ import annotations

import gc
import io
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.backends import BACKENDS

from .limit import as_record, possible
from .peers import output_gradient
from .remote import QUIET, Remote
from .workloads import Workload

Way = Literal["forward", "training"]
TORCH, OURS = "torch.nn", "fastseq"

#: rtol and atol of an output that is timed, beside torch.nn's, which rounds every step to the type
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-3, 1e-4),
    torch.float16: (1e-2, 5e-3),
    torch.bfloat16: (1e-2, 4e-2),
}

# Seconds per time step and layer beyond the products, for estimates alone: torch's composite loops
# and the eager backend on one core of a server, forward and training.
STEP_COST = {TORCH: (12e-6, 80e-6), "torch": (12e-6, 80e-6), "eager": (50e-6, 250e-6)}


@dataclass
class Contender:
    """One module under the clock. ``samples`` are seconds, one per round."""

    label: str
    module: nn.Module
    backend: str | None = None
    samples: list[float] = field(default_factory=list)


class Race:
    """All contenders of one workload, on the same input and the same parameters.

    A round times each of them once, in turn, so that whatever else the machine does slows all
    alike. What is timed is forward without autograd, or forward and backward together; gradients
    are cleared before the clock starts.

    peers: other libraries, in processes of their own. Where there are some, each contender's timed
    call follows an untimed one, since all threads have slept while the others ran.
    """

    def __init__(
        self,
        workload: Workload,
        way: Way,
        backends: list[str],
        limit: float,
        peers: Sequence[Remote] = (),
    ) -> None:
        self.workload, self.way = workload, way
        self.declined: dict[str, str] = {}
        training = way == "training"
        theirs = workload.module().train(training)
        self.x = workload.input()
        data = self.x.data if isinstance(self.x, PackedSequence) else self.x
        if training:
            data.requires_grad_()
        self.leaf = data
        self.contenders = [Contender(TORCH, theirs)]
        self.expected = self._call(theirs).detach()
        self.dy = output_gradient(workload)
        ours = self._ours(None)
        self._enter(Contender(OURS, ours, self._chosen(ours)))
        for name in backends:
            if name == self.contenders[1].backend:
                continue
            reason = self._too_slow(name, limit)
            if reason is None:
                try:
                    self._enter(Contender(name, self._ours(name), name))
                except (NotImplementedError, RuntimeError) as error:
                    if f"{name}: " not in str(error):
                        raise
                    reason = (
                        str(error)
                        .split(f"{name}: ", 1)[1]
                        .removesuffix(". backend=None always runs.")
                    )
            if reason is not None:
                self.declined[name] = reason
        self.peers = []
        for peer in peers:
            reason = peer.prepare(workload, way)
            if reason is None:
                self.peers.append(peer)
            else:
                self.declined[peer.name] = reason

    def _ours(self, backend: str | None) -> nn.Module:
        module = self.workload.module(fastseq, backend=backend)
        module.load_state_dict(self.contenders[0].module.state_dict())
        return module.train(self.way == "training")

    def _chosen(self, module: nn.Module) -> str | None:
        """The backend that fastseq chooses for one call."""
        x: Any = self.x
        if self.workload.mode != "layer":
            x = x[0] if self.workload.mode == "cell" else x[:1]
        with redirect_stdout(io.StringIO()), torch.set_grad_enabled(self.way == "training"):
            return fastseq.explain(module, x)

    def _too_slow(self, name: str, limit: float) -> str | None:
        seconds = estimate(self.workload, self.way, name)
        share = limit / 60
        if seconds <= share:
            return None
        return f"one call would take about {seconds:.1f} s, more than LIMIT / 60"

    def _enter(self, contender: Contender) -> None:
        """The first call: compiles, and shows that the numbers are torch.nn's."""
        y = self._call(contender.module)
        rtol, atol = TOLERANCE[self.workload.dtype]
        torch.testing.assert_close(y.detach(), self.expected, rtol=rtol, atol=atol)
        self.contenders.append(contender)

    def _call(self, module: nn.Module) -> Tensor:
        with torch.set_grad_enabled(self.way == "training"):
            return self.workload.run(module, self.x)

    def clear(self, contender: Contender) -> None:
        contender.module.zero_grad(set_to_none=True)
        self.leaf.grad = None

    def step(self, contender: Contender) -> None:
        """What the clock sees."""
        y = self._call(contender.module)
        if self.way == "training":
            y.backward(self.dy)

    def ready(self, contender: Contender) -> None:
        """What comes before the clock starts."""
        if self.peers:
            self.clear(contender)
            self.step(contender)
        self.clear(contender)

    def sample(self, contender: Contender) -> float:
        self.ready(contender)
        start = time.perf_counter()
        self.step(contender)
        return time.perf_counter() - start

    def sample_peers(self) -> list[float]:
        """One call of each, after the threads of this process have gone to sleep."""
        if self.peers:
            time.sleep(QUIET)
        return [peer.sample() for peer in self.peers]

    def warm_up(self) -> float:
        """A round, another where that is cheap; the seconds that it takes."""
        seconds = 0.0
        for _ in range(2):
            start = time.perf_counter()
            for contender in self.contenders:
                self.sample(contender)
            self.sample_peers()
            seconds = time.perf_counter() - start
            if seconds > 1:
                break
        return seconds

    def saved_bytes(self) -> dict[str, int]:
        """What each keeps between forward and backward, beside its input and parameters."""
        return {
            c.label: saved_bytes(partial(self._call, c.module), [self.leaf, *c.module.parameters()])
            for c in self.contenders
        }


def saved_bytes(forward: Callable[[], Tensor], live: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves during ``forward``, but for ``live``."""
    sizes: dict[int, int] = {}
    kept = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    for tensor in live:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def available_backends(names: str | None) -> list[str]:
    """The backends to time beside the one that fastseq chooses; all but the slow truth if None."""
    if names is None:
        return [name for name in BACKENDS if name != "reference"]
    wanted = names.replace(",", " ").split()
    for name in wanted:
        if name not in BACKENDS:
            raise ValueError(f"no backend is named {name!r}; names: {', '.join(BACKENDS)}")
    return wanted


@cache
def sgemm_gflops() -> float:
    """What torch's float32 product reaches here, with the threads that are set: best of many."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    out = torch.empty(1024, 1024)
    best, deadline = float("inf"), time.perf_counter() + 0.5
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * 1024**3 / best / 1e9


def estimate(workload: Workload, way: Way, label: str) -> float:
    """Seconds that one call may take: the products at half the GEMM's speed, and the steps."""
    training = way == "training"
    products = workload.flops(training) / (0.5e9 * sgemm_gflops())
    per_step = STEP_COST.get(label, (2e-6, 8e-6))[training]
    return products + workload.T * workload.layers * workload.D * per_step


def reason_to_skip(workload: Workload, way: Way, backends: list[str], limit: float) -> str | None:
    """Why a case does not run on this machine; None if it does."""
    if way == "training" and not workload.training:
        return "inference only"
    needed = workload.bytes(way == "training") * 2
    free = free_memory()
    if free is not None and needed > 0.7 * free:
        return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
    seconds = 5 * (estimate(workload, way, TORCH) + estimate(workload, way, OURS))
    if seconds > limit:
        remedy = f"LIMIT={seconds * 1.5:.0f} runs it"
        return f"would take about {seconds:.0f} s, more than {limit:.0f}; {remedy}"
    return None


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, object]:
    """What a figure depends on beside the code."""
    return {
        "cpu_model": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fastseq": fastseq.__version__,
        "sgemm_gflops": round(sgemm_gflops(), 1),
        "limit": as_record(possible(torch.get_num_threads())),
    }


class quiet_collector:
    """The garbage collector runs before, and not during."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        gc.enable()


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float) -> list[float]:
    """Median seconds of each call, one after the other for so long, and once at least."""
    samples: list[list[float]] = [[] for _ in calls]
    with quiet_collector():
        for call in calls:
            call()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or not samples[0]:
            for call, times in zip(calls, samples, strict=True):
                before = time.perf_counter()
                call()
                times.append(time.perf_counter() - before)
    return [median(times) for times in samples]
