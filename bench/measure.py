"""What a benchmark case is made of: contenders, estimates, interleaved rounds, saved bytes."""

from __future__ import annotations

import gc
import io
import math
import os
import platform
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import fastseq
from fastseq.backends import BACKENDS, load

from .gpu.numbers import too_far
from .limit import as_record, possible
from .peers import output_gradient
from .remote import QUIET, Remote
from .workloads import Form, Walk, Workload, as_cell, as_layer

Way = Literal["forward", "training"]
TORCH, OURS = "torch.nn", "fastseq"
#: The other form of torch.nn where a call is one step, and the handle of fastseq.streaming.
OTHER_FORM: dict[Form, tuple[str, Form]] = {
    "layer": ("torch.nn cell", "cell"),
    "cell": ("torch.nn layer", "layer"),
}
HANDLE = "fastseq.streaming"
#: Rounds of a case at least, where its limit of time allows them.
ROUNDS = 8

# Seconds per time step and layer beyond the products, for estimates alone: torch's composite loops
# and the eager backend on one core of a server, forward and training.
STEP_COST = {TORCH: (12e-6, 80e-6), "torch": (12e-6, 80e-6), "eager": (50e-6, 250e-6)}


@dataclass
class Contender:
    """One module under the clock. ``samples`` are seconds, one per round.

    walk: what the clock sees where a call is one step.
    """

    label: str
    module: nn.Module
    backend: str | None = None
    samples: list[float] = field(default_factory=list)
    walk: Walk | None = None


class WrongNumbers(Exception):
    """A contender's numbers are not those of the layer: it gets no figure, and where it is fastseq
    as it chooses, nor does its case."""


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
        self.wrong: dict[str, str] = {}  # named backends whose numbers are
        training = way == "training"
        theirs = workload.module().train(training)
        self.x = workload.input()
        self.leaf = self.x.data if isinstance(self.x, PackedSequence) else self.x
        self.leaf.requires_grad_(training)
        self.dy = output_gradient(workload)
        self.contenders: list[Contender] = []
        self.expected = self._results(theirs, states=True)
        self.truth = truth(workload, theirs.state_dict(), training)
        self._enter(Contender(TORCH, theirs, walk=self._walk(theirs)))
        ours = self._ours(None)
        self._enter(Contender(OURS, ours, self._chosen(ours), walk=self._walk(ours)))
        if workload.mode != "layer":
            self._enter_other_forms()
        for name in backends:
            if name == self.chosen:
                continue
            reason = self._too_slow(name, limit)
            if reason is None:
                try:
                    module = self._ours(name)
                    self._enter(Contender(name, module, name, walk=self._walk(module)))
                except WrongNumbers as error:
                    self.wrong[name] = str(error)
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

    def _walk(self, called: Any, form: Form | None = None) -> Walk | None:
        workload = self.workload
        return None if workload.mode == "layer" else Walk(workload, called, form or workload.form)

    def _enter_other_forms(self) -> None:
        """torch.nn's best is a layer called with one step or a cell; ours has a handle besides."""
        state = self.contenders[0].module.state_dict()
        label, form = OTHER_FORM[self.workload.form]
        other = self.workload.module(form=form).eval()
        other.load_state_dict(as_cell(state) if form == "cell" else as_layer(state))
        self._enter(Contender(label, other, walk=self._walk(other, form)))
        layer = self.workload.module(fastseq, "layer").eval()
        layer.load_state_dict(as_layer(state))
        handle = fastseq.streaming(layer, self.workload.B)  # type: ignore[arg-type]
        self._enter(Contender(HANDLE, layer, walk=self._walk(handle, "handle")))

    @property
    def chosen(self) -> str | None:
        return next(c.backend for c in self.contenders if c.label == OURS)

    def _enter(self, contender: Contender) -> None:
        """The first calls: they compile, and show that the numbers are right, by the rule.

        One is as the clock sees it; another of a layer has a state, whose gradient is asked for.

        Raises WrongNumbers.
        """
        if contender.label == TORCH:  # what the others are held to
            self.contenders.append(contender)
            return
        if contender.walk is not None:
            with torch.inference_mode():
                found = [{"output": contender.walk.outputs()}]
        else:
            found = [self._results(contender.module, states) for states in (False, True)]
            self.clear(contender)
        for numbers in found:
            names = list(numbers)
            values, theirs, exact = (
                [which[name] for name in names] for which in (numbers, self.expected, self.truth)
            )
            wrong = too_far(values, theirs, exact, names)
            if wrong:
                raise WrongNumbers(f"{contender.label}, {wrong}")
        self.contenders.append(contender)

    def _results(self, module: nn.Module, states: bool) -> dict[str, Tensor]:
        if self.workload.mode != "layer":
            return {"output": self._call(module)}
        return results(module, self.x, self.dy if self.way == "training" else None, states)

    def _call(self, module: nn.Module) -> Tensor:
        with torch.set_grad_enabled(self.way == "training"):
            return self.workload.run(module, self.x)

    def clear(self, contender: Contender) -> None:
        contender.module.zero_grad(set_to_none=True)
        self.leaf.grad = None

    def step(self, contender: Contender) -> None:
        """What the clock sees."""
        if contender.walk is not None:
            with torch.inference_mode():
                contender.walk()
            return
        y = self._call(contender.module)
        if self.way == "training":
            y.backward(self.dy)

    def ready(self, contender: Contender) -> None:
        """What comes before the clock starts."""
        if self.peers:
            self.clear(contender)
            self.step(contender)
        self.clear(contender)
        if contender.walk is not None:
            contender.walk.begin()

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


def results(
    module: nn.Module, x: Any, dy: Tensor | None, states: bool = False
) -> dict[str, Tensor]:
    """The output and the last states of a layer; with ``dy`` the gradients of x and parameters.

    states: begin with zeros that are given, whose gradients are asked for too.
    """
    leaf = x.data if isinstance(x, PackedSequence) else x
    leaves = {"input": leaf, **dict(module.named_parameters())}
    names = "hc" if isinstance(module, (nn.LSTM, fastseq.LSTM)) else "h"
    given: list[Any] = []
    if states:
        batch = int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else x.size(1)
        ways = module.num_layers * (2 if module.bidirectional else 1)
        sizes = {"h": module.proj_size or module.hidden_size, "c": module.hidden_size}
        zeros = {f"{s}_0": leaf.new_zeros(ways, batch, sizes[s]) for s in names}
        for zero in zeros.values():
            zero.requires_grad_(dy is not None)
        leaves |= zeros
        given.append(tuple(zeros.values()) if len(names) > 1 else zeros["h_0"])
    for value in leaves.values():
        value.grad = None
    with torch.set_grad_enabled(dy is not None):
        y, last = module(x, *given)
        y = y.data if isinstance(y, PackedSequence) else y
    found = {"output": y.detach()}
    for name, value in zip(names, last if len(names) > 1 else (last,), strict=True):
        found[f"{name}_n"] = value.detach()
    if dy is not None:
        y.backward(dy)
        for name, value in leaves.items():
            found[f"gradient of {name}"] = (
                torch.full_like(value, torch.nan) if value.grad is None else value.grad
            )
    return found


#: What stands for one sequence each, along dimension 1; everything else is a sum over them.
ROWS = ("output", "h_n", "c_n", *(f"gradient of {name}" for name in ("input", "h_0", "c_0")))


def truth(workload: Workload, state: dict[str, Tensor], training: bool) -> dict[str, Tensor]:
    """What torch.nn gives in float64 for the same numbers, in as many pieces of the batch as
    memory asks for."""
    double = replace(workload, dtype=torch.float64)
    module = double.module()
    module.load_state_dict(state)
    x: Any = workload.input().to(torch.float64)
    dy = output_gradient(workload).to(torch.float64) if training else None
    if workload.mode != "layer":
        with torch.no_grad():
            return {"output": workload.run(module, x)}
    if isinstance(x, PackedSequence):
        x.data.requires_grad_(training)
        return results(module, x, dy, states=True)
    free = free_memory()
    pieces = 1 if free is None else math.ceil(2 * double.bytes(training) / (0.3 * free))
    xs = x.chunk(pieces, 1)
    dys = [None] * len(xs) if dy is None else dy.chunk(pieces, 1)
    parts = []
    for piece, gradient in zip(xs, dys, strict=True):
        leaf = piece.contiguous().requires_grad_(training)
        parts.append(results(module, leaf, gradient, states=True))
    return {
        name: torch.cat([part[name] for part in parts], 1)
        if name in ROWS
        else torch.stack([part[name] for part in parts]).sum(0)
        for name in parts[0]
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
    """What the processor calls itself. AMD's have their core behind it: a virtual machine's says
    "AMD EPYC" and no more, and Zen 5 multiplies twice as fast as Zen 4."""
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    core = None
    if facts.get("vendor_id") == "AuthenticAMD":
        core = zen(int(facts["cpu family"]), int(facts["model"]))
    return f"{name} ({core})" if core else name


def zen(family: int, model: int) -> str | None:
    """The generation of AMD's cores, as CPUID's family and model tell it."""
    if family == 23:
        return "Zen 2" if model >= 0x30 else "Zen"
    if family == 25:
        is_third = model < 0x10 or 0x20 <= model < 0x60
        return "Zen 3" if is_third else "Zen 4"
    return "Zen 5" if family == 26 else None


SETS = {"avx512_bf16": "AVX-512 + bf16", "avx512": "AVX-512", "avx2": "AVX2", "base": "base"}


def instructions() -> str:
    """The set that the kernels run; torch's besides, where that is another."""
    theirs = torch.backends.cpu.get_cpu_capability().replace("AVX512", "AVX-512")
    native: Any = load("native")
    if isinstance(native, str):
        return theirs
    ours = SETS.get(name := native.instruction_sets()[0], name)
    return ours if ours.startswith(theirs) else f"{ours} (torch: {theirs})"


def machine() -> dict[str, object]:
    """What a figure depends on beside the code."""
    return {
        "cpu_model": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": instructions(),
        "torch": torch.__version__,
        "fastseq": fastseq.__version__,
        "sgemm_gflops": round(sgemm_gflops(), 1),
        "limit": as_record(possible(torch.get_num_threads())),
    }


def planned_rounds(most: int, seconds: float, limit: float, a_round: float) -> int:
    """As many as fit into ``seconds``, but ROUNDS where they fit into ``limit``, and 3 at least."""
    least = max(3, min(ROUNDS, int(limit / a_round)))
    return min(max(int(seconds / a_round), least), max(most, 3))


class quiet_collector:
    """The garbage collector runs before, and not during."""

    def __enter__(self) -> None:
        gc.collect()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        gc.enable()


def in_turn(calls: Sequence[Callable[[], Any]], seconds: float, warm: bool = False) -> list[float]:
    """Median seconds of each call, one after the other for so long, and ROUNDS times at least.

    warm: each timed call follows an untimed one. What one of many operations leaves behind, in the
    caches and with the allocator, is else the next one's to clear away.
    """
    samples: list[list[float]] = [[] for _ in calls]
    with quiet_collector():
        for call in calls:
            call()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples[0]) < ROUNDS:
            for call, times in zip(calls, samples, strict=True):
                if warm:
                    call()
                before = time.perf_counter()
                call()
                times.append(time.perf_counter() - before)
    return [median(times) for times in samples]
