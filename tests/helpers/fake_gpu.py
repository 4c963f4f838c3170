"""A device that is not there, for rehearsals: python3 -m bench.gpu --preload tests.helpers.fake_gpu

Imported first in every process of a run, it makes the CPU answer to 'cuda'. Launches are heard and
not made: the backends' host code runs as it is, up to the launch, and the numbers it would have got
are those of the CPU's kernels. A module stands in for fastseq._cuda, built or not. Events read the
host's clock, a graph replays what torch dispatched. So numbers and the way through the program are
real; times, and whether a kernel works, are not.

FAKE_GPU in the environment plants faults, as JSON: a pattern of launches, 'cell way form type' (and
' build' behind them while kernels are only compiled), to what happens there. 'hang' sleeps in C
without Python's lock, 'held' with it; 'sticky' is a CUDA error, after which every call of that
process fails; 'lost' ends the process; 'wrong' makes numbers wrong.

With FAKE_GPU_JIT set, Triton compiles each kernel for sm_90, with a driver that loads and launches
nothing.
"""

import ctypes
import json
import os
import signal
import sys
import time
import types
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from multiprocessing import parent_process
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastseq
from bench import workloads
from bench.gpu import barrier, crew, smoke
from fastseq.backends import cuda_kernels, imported, native, triton_kernels
from fastseq.backends import triton as backend
from fastseq.backends.contract import Wanted
from fastseq.backends.crf import native as chains_in_cpp
from fastseq.backends.crf import triton as chains_on_triton
from fastseq.backends.stacked import in_one_call
from fastseq.backends.triton_tiling import Device
from fastseq.ops import modes

NAME = "Fake H100"
FAULTS = json.loads(os.environ.get("FAKE_GPU", "{}"))
STICKY = "CUDA error: an illegal memory access was encountered"
LAUNCHES = []
_broken = False

torch.set_num_threads(1)

#: Short, of a size that takes a grid or steps.
workloads.WORKLOADS += (
    workloads.Workload("fake-wide", "lstm", T=3, B=2, I=8, H=256, source="a rehearsal"),
)
smoke.T, smoke.B = 3, 2
_meet = barrier.meet
barrier.meet = lambda programs, meetings: _meet(programs, meetings).fill_(1)  # all came
smoke.SIZES = {
    "cta": (128, 64),
    "team-cluster": (160,),
    "team-grid": (272,),
    "team-wave": (160,),
    "walk": (32,),
    "grid-resident": (256,),
    "grid": (200,),
    "step": (200,),
}


#: The process of a run that others are forked from must not touch the device.
_main = sys.argv[0].endswith("bench/gpu/__main__.py") and parent_process() is None
_parent = os.getpid() if _main else None


def alive():
    """As every call: none of the parent, nor of a process whose device failed."""
    if os.getpid() == _parent and "--exercise" not in sys.argv:
        raise AssertionError("the parent touched the device")
    if _broken:
        raise RuntimeError(STICKY)


def _here(value):
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class OnTheCPU(TorchFunctionMode):
    """'cuda' is the CPU in every call of torch."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            alive()
            return args[0]
        if str(function).startswith("fastseq"):  # a backend has that name too
            return function(*args, **kwargs)
        if "device" in kwargs or any(_here(a) is not a for a in args):
            alive()
        args = [_here(a) for a in args]
        return function(*args, **{k: _here(v) for k, v in kwargs.items()})


# who sees what this one does, as of torch.set_default_device: calls of a whole stack stay plain
modes.only_default_devices = lambda: all(
    type(torch._C._get_function_stack_at(k)) is OnTheCPU
    for k in range(torch._C._len_torch_function_stack())
)


class Event:
    def __init__(self, enable_timing=False):
        self.at = 0.0

    def record(self, stream=None):
        alive()
        self.at = time.perf_counter()

    def synchronize(self):
        alive()

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


class Stream:
    cuda_stream = 0

    def wait_stream(self, other):
        alive()


class Graph:
    """What torch dispatched while it was recorded; a replay dispatches it again, into the same
    tensors."""

    def __init__(self):
        self.calls = []
        self.form, self.regime = backend._larger, compiled._asked

    def replay(self):
        alive()
        with (
            torch.no_grad(),
            backend.larger_as(self.form),
            compiled.larger_as(self.regime),
        ):
            for function, args, kwargs, before in self.calls:
                for old, new in zip(before, tree_leaves(function(*args, **kwargs)), strict=True):
                    both = isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor)
                    if both and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.graph.calls.append((function, args, kwargs or {}, tree_leaves(result)))
        return result


_recording = False


@contextmanager
def recorded(graph):
    global _recording
    alive()
    _recording = True
    try:
        with Recorder(graph):
            yield
    finally:
        _recording = False


@contextmanager
def _nothing(*args):
    yield


cuda = torch.cuda


def _says(value):
    def answer(*arguments):
        alive()
        return value

    return answer


cuda.is_available, cuda.device_count = _says(True), _says(1)
cuda.is_initialized = lambda: True
cuda.current_device, cuda.get_device_name = _says(0), _says(NAME)
cuda.get_device_capability = _says((9, 0))
cuda.get_device_properties = _says(types.SimpleNamespace(shared_memory_per_block_optin=232448))
cuda.mem_get_info = _says((80 * 2**30, 80 * 2**30))
cuda.memory_allocated = _says(0)
cuda.empty_cache = cuda.synchronize = _says(None)
cuda.current_stream = lambda *device: Stream()
cuda.is_current_stream_capturing = lambda: _recording
cuda.Event, cuda.Stream, cuda.CUDAGraph = Event, Stream, Graph
cuda.stream, cuda.graph = _nothing, recorded


def _kinds(dtype, device):
    if dtype is not torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "tf32x3"


# The extension module of cuda

#: What a CTA of the device may have of shared memory.
SHARED = 232448


class Extension(types.ModuleType):
    """What fastseq._cuda offers."""

    def __init__(self):
        super().__init__("fastseq._cuda")
        self.__file__ = str(Path(fastseq.__file__).with_name("_cuda.abi3.so"))

    def driver(self):
        return 13000

    toolkit = driver

    def architectures(self):
        return "90a"

    def fields(self):
        return " ".join(compiled.FIELDS)

    def kernels(self):
        others = ("_".join(map(str, p)) for p in cuda_kernels.PREVIOUS)
        return (*cuda_kernels.KERNELS, *cuda_kernels.TEAMS, *others)

    def launch(self, name, device, stream, grid, threads, shared, arguments, cluster, together):
        alive()
        if name not in self.kernels():
            raise ValueError(f"name: no kernel {name!r} was built")
        if shared > SHARED:
            raise RuntimeError(
                f"{name} on device {device}, grid {grid}, {threads} threads, {shared} bytes of "
                "shared memory: CUDA_ERROR_INVALID_VALUE (1)"
            )
        assert min(grid) > 0 and len(arguments) == 8 * len(compiled.FIELDS)
        assert 1 <= cluster <= 16 and grid[0] % cluster == 0
        assert not together or grid[0] * grid[1] * grid[2] <= 132
        LAUNCHES.append((name, grid))

    def occupancy(self, name, device, threads, shared):
        alive()
        return 1

    def clusters(self, name, device, size, threads, shared):
        alive()
        return 132 // size

    def limits(self, device):
        alive()
        return {"mps": 0, "cooperative": 1}

    def attributes(self, name, device):
        kernel = (cuda_kernels.KERNELS | cuda_kernels.TEAMS).get(name)
        sizes = (64, 256) if kernel is None else (kernel.registers, kernel.threads)
        return dict(registers=sizes[0], local=0, shared=0, threads=sizes[1], binary=90)


fastseq._cuda = sys.modules["fastseq._cuda"] = Extension()
compiled = imported("cuda")
for _name, _text in compiled.SIGNATURES.items():
    getattr(Extension, _name).__doc__ = _text
compiled.DEVICES = ("cuda", "cpu", "meta")
compiled.device_at_hand = lambda index=None: cuda_kernels.H100
compiled._queue = lambda device: (0, 0)
_supports = compiled.supports
compiled.supports = lambda problem: _supports(
    problem._replace(tf32=problem.tf32 or _kinds(problem.dtype, None) == "tf32")
)

from bench.gpu import forms  # noqa: E402  (it hears what stands above)

backend.INTERPRETED = True  # then it takes tensors of the CPU
backend._properties = lambda device: Device(232448, processors=132, hopper=True)
backend._precision = _kinds

# Launches


def _make(kernel, grid, values, options):
    LAUNCHES.append((kernel.function.__name__, grid))


if os.environ.get("FAKE_GPU_JIT"):
    from tests.helpers import fake_driver

    fake_driver.activate()
else:
    triton_kernels.Kernel.__call__ = _make


def _fault(launch):
    """What is planted there; 'wrong' is found where the numbers are made."""
    global _broken
    alive()
    building = crew._progress is not None and b"compiling" in crew._progress.text
    name = " ".join(launch) + " build" * building
    kinds = [kind for pattern, kind in FAULTS.items() if fnmatchcase(name, pattern)]
    if "hang" in kinds:
        ctypes.CDLL(None).sleep(10**6)
    if "held" in kinds:
        ctypes.PyDLL(None).sleep(10**6)
    if "lost" in kinds:
        os.kill(os.getpid(), signal.SIGKILL)
    if "sticky" in kinds:
        _broken = True
        alive()
    return "wrong" in kinds


_wrong = False


def _heard(launch, refused):
    global _wrong
    _wrong = _fault(launch) or _wrong


def _with_numbers(module, together=None):
    """The host's code for the launches and the layout of what it gives; the CPU's kernels for the
    numbers. together: what runs all layers of a stack at once, forward and backward."""
    host_forward, host_backward = module.forward, module.backward

    def numbers(call, result, trajectory):
        right = native.forward(replace(call, memory="full"), False, trajectory)
        for ours, theirs in zip(
            (result.y, *result.states, *result.trajectory),
            (right.y, *right.states, *right.trajectory),
            strict=True,
        ):
            ours.copy_(theirs + 1 if _wrong else theirs)
        return right.y

    def gradients(call, grads, wanted):
        call = replace(call, memory="full")
        trajectory = bool(grads.trajectory)
        found = native.backward(call, native.forward(call, True, trajectory), grads, wanted)
        if _wrong and found.x is not None:
            found.x += 1
        return found

    def forward(call, save, trajectory):
        global _wrong
        _wrong = False
        result = host_forward(call, save, trajectory)
        numbers(call, result, trajectory)
        return result

    def backward(call, result, grads, wanted):
        global _wrong
        _wrong = False
        host_backward(call, result, grads, wanted)
        return gradients(call, grads, wanted)

    def all_forward(calls, save, trajectory):
        global _wrong
        _wrong = False
        results = together[0](calls, save, trajectory)
        x = calls[0].x
        for call, result in zip(calls, results or [], strict=bool(results)):
            x = numbers(replace(call, x=x), result, bool(result.trajectory))
        return results

    def all_backward(calls, results, grads, wanted):
        global _wrong
        _wrong = False
        if together[1](calls, results, grads, wanted) is None:
            return None
        found = []
        for call, given in zip(calls[::-1], grads[::-1], strict=True):
            if found:
                given.y = found[-1].x
            needs = Wanted(wanted.x or call is not calls[0], wanted.states, wanted.weights)
            found.append(gradients(call, given, needs))
        return found[::-1]

    module.forward, module.backward = forward, backward
    module.stacks, module.layers, module.layers_backward = in_one_call(
        forward, backward, together and (all_forward, all_backward)
    )


def _with_numbers_of_chains(room, right):
    """The same of the conditional random fields' rooms."""
    host_forward, host_backward, host_viterbi = room.forward, room.backward, room.viterbi

    def copied(ours, theirs):
        for mine, other in zip(ours, theirs, strict=True):
            if mine is not None:
                mine.copy_(other)
        return ours

    def forward(chain, tags, save):
        return copied(host_forward(chain, tags, save), right.forward(chain, tags, save))

    def backward(chain, tags, u, dvalue, wants_parameters):
        found = host_backward(chain, tags, u, dvalue, wants_parameters)
        u = right.forward(chain, tags, True)[1]
        return copied(found, right.backward(chain, tags, u, dvalue, wants_parameters))

    def viterbi(chain, n):
        return copied(host_viterbi(chain, n), right.viterbi(chain, n))

    room.forward, room.backward, room.viterbi = forward, backward, viterbi


_with_numbers_of_chains(chains_on_triton, chains_in_cpp)
_with_numbers(backend)
_with_numbers(compiled, (compiled._wave_forward, compiled._wave_backward))
OnTheCPU().__enter__()
# the first listener of launches: whoever listens as well has heard of them before a fault comes
_listening = forms.heard(_heard)
_listening.__enter__()
