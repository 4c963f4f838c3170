"""The C++ kernels beyond what every backend is tested for: instruction sets, threads, memory and
the sanitizers. Their texts, vocabulary, bits and random cases stand in files of their own.
"""

import copy
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from problems import draw, gradients
from rules import check_alike, check_all, same_bits

import fastseq
from fastseq.backends import load, openmp
from fastseq.backends.contract import Call, OutputGradients, Result, Wanted, Weights
from fastseq.cells import CELLS
from fastseq.ops import masks

HERE = Path(__file__).parent
ROOT = HERE.parent
full = pytest.mark.full
native = load("native")
if isinstance(native, str):
    pytest.skip(native, allow_module_level=True)

_cpu = native._cpu
SETS = _cpu.instruction_sets()


@pytest.fixture
def instruction_set(request):
    before = _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


# test_parity.py has the best instruction set; here are the others.

SPECIAL = {
    "dense": {"B": 9},
    "T1": {"T": 1},
    "H65": {"H": 65, "T": 3},
    "few rows, not packed": {"T": 2, "B": 1, "H": 35, "I": 19},
    "ragged reset": {"lengths": [2, 0, 5], "reset": True, "directions": 2},
    "h_mask": {"h_mask": True, "layers": 2},
    "wide input": {"I": 300, "H": 20, "scale": 0.3},  # more than a chain of a product is long
    "projected": {"P": 3, "directions": 2},
    "lean": {"lengths": [3, 0, 5]},
    "trajectory": {"directions": 2},
    "zoneout": {"zoneout": (0.4, 0.3), "H": 35, "lengths": [2, 0, 5], "reset": True},
    "zoneout in evaluation": {"zoneout": (0.4, 0.3), "evaluates": True, "directions": 2},
}
ONLY_LSTM = ("projected", "trajectory")
CASES = [
    (cell, special)
    for cell in CELLS
    for special in SPECIAL
    if cell == "lstm" or special not in ONLY_LSTM
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("cell", "special"), CASES)
@pytest.mark.parametrize("instruction_set", SETS[1:], indirect=True)
def test_parity_on_every_instruction_set(instruction_set, cell, special, dtype):
    options = {"memory": "lean"} if special == "lean" else {}
    options |= {"trajectory": True} if special == "trajectory" else {}
    case = draw(cell, dtype=dtype, **SPECIAL[special])
    trajectory = special == "trajectory"
    wide = case.to(torch.float64)
    exact = wide.independent(trajectory)
    exact |= gradients(exact, wide.leaves())
    theirs = case.independent(trajectory)
    theirs |= gradients(theirs, case.leaves())
    ours = case.run("native", **options)
    ours |= gradients(ours, case.leaves())
    check_all(ours, theirs, exact, dtype, f"{instruction_set}, {special}")
    with torch.no_grad():
        bare = case.run("native", **options)
    check_all(bare, theirs, {name: exact[name] for name in bare}, dtype, "no_grad")


@pytest.mark.parametrize("instruction_set", SETS, indirect=True)
def test_masks_on_every_instruction_set(instruction_set):
    """Many vectors and a rest of each row, on one thread and on two."""
    ids = torch.arange(700) * 2**40 // 7
    arguments = torch.tensor(-5), [3, 70], ids, ids.flip(0) % 2**32, 333, 2**31 + 12345
    expected = masks.by_operations(*arguments)
    before = torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        assert torch.equal(native.keep(*arguments), expected)
    torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_sums_over_many_rows(kind):
    """Of gradients that all point one way, in which a long chain of additions would lose digits."""
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(4, 8)
    ours = getattr(fastseq, kind)(4, 8, backend="native")
    ours.load_state_dict(theirs.state_dict())
    truth = copy.deepcopy(theirs).double()
    x = torch.randn(200, 64, 4)
    for module in (ours, theirs, truth):
        module(x.to(module.bias_ih_l0.dtype))[0].sum().backward()
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (ours, theirs, truth)]
    check_all(*grads, torch.float32)


def test_an_ensemble_of_any_size():
    """R is whatever torch.func asks for."""
    member = fastseq.GRU(3, 5, backend="native")
    many = 70
    given = {n: torch.stack([p.detach()] * many) for n, p in member.named_parameters()}
    for k in range(many):
        given["weight_hh_l0"][k] *= k / many
    x = torch.randn(4, 2, 3)

    def loss(parameters):
        return torch.func.functional_call(member, parameters, (x,))[0].square().sum()

    ours = torch.func.vmap(torch.func.grad(loss))(given)
    for k in (0, 64, many - 1):
        alone = torch.func.grad(loss)({name: p[k] for name, p in given.items()})
        for name, d in alone.items():
            check_alike(ours[name][k], d, name)


# Threads


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # threads, batch, shares of units, flops of a row's step, bytes of its weights
        ((1, 8, 16, 1e6, 1e6), (1, 1)),
        ((2, 64, 16, 1e6, 1e6), (2, 1)),  # rows enough: nobody has to wait
        ((2, 1, 16, 1e6, 1e6), (1, 2)),  # one sequence: its units
        ((4, 2, 16, 1e6, 1e6), (1, 4)),  # too few rows
        ((4, 64, 16, 1e6, 4e6), (1, 4)),  # each thread keeps its own weights in its cache
        ((2, 6, 16, 1e6, 1e5), (1, 2)),  # so few rows that reading the weights is what takes time
        ((2, 7, 16, 1e6, 1e5), (2, 1)),
        ((2, 6, 16, 1e6, 5e4), (2, 1)),  # which are near
        ((8, 16, 16, 1e6, 1e5), (8, 1)),  # or near enough for so many to wait for each other
        ((8, 16, 16, 1e6, 3e5), (1, 8)),
        ((4, 64, 1, 1e6, 4e6), (4, 1)),  # a step that wants all units at once
        ((2, 1, 16, 1e4, 1e6), (1, 1)),  # a step shorter than a meeting
        ((4, 2, 16, 1e4, 1e6), (2, 1)),
        ((8, 1, 3, 1e6, 1e6), (1, 3)),
        ((2, 0, 16, 1e6, 1e6), (1, 1)),
    ],
)
def test_plan(given, expected):
    """A pure function of sizes: rows x units of a recurrence that threads share."""
    assert _cpu.plan(*given) == expected


def layer(cell="lstm", T=40, B=3, H=130):
    """Enough work for three threads."""
    return draw(cell, T=T, B=B, I=20, H=H, dtype=torch.float32)


def outcome(case):
    outputs = case.run("native")
    return outputs | gradients(outputs, case.leaves())


def check_same(ours, expected):
    __tracebackhide__ = True
    for name, value in expected.items():
        assert same_bits(ours[name], value), name


@pytest.mark.parametrize("B", [1, 16], ids=["units", "rows"])
def test_callers_side_by_side(B, threads):
    """Several threads of Python call at once, each with threads of its own."""
    threads(2)
    cases = [layer(cell, B=B) for cell in CELLS]
    alone = [outcome(case) for case in cases]

    def call(case):
        torch.set_num_threads(2)  # the setting is each thread's own
        return outcome(case)

    with ThreadPoolExecutor(len(cases)) as callers:
        for _ in range(2):
            for ours, expected in zip(callers.map(call, cases), alone, strict=True):
                check_same(ours, expected)


def test_within_another_parallel_region(threads):
    """There the runtime grants one thread where two are asked for."""
    parallel = openmp.parallel()
    if parallel is None:
        pytest.skip("torch's OpenMP runtime cannot be called here")
    threads(2)
    case = layer(B=1)
    with torch.no_grad():
        expected = case.run("native")
    found, lock = [], threading.Lock()

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def region(_):
        with lock, torch.no_grad():
            torch.set_num_threads(2)
            found.append(case.run("native"))

    parallel(ctypes.cast(region, ctypes.c_void_p), None, 2, 0)
    assert len(found) == 2
    for ours in found:
        check_same(ours, expected)
    threads(2)
    with torch.no_grad():
        check_same(case.run("native"), expected)


def python(code, arguments=(), **environment):
    """What a fresh interpreter prints."""
    prelude = f"import sys; sys.path[:0] = {[str(ROOT), str(HERE), str(HERE / 'helpers')]!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", prelude + code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


FORKED = """
import multiprocessing, torch
from rules import same_bits
from test_native import layer, outcome

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, k):
        with torch.no_grad():
            return case.run("native")["y"]

def child(queue):
    mine = outcome(case)
    # NumPy's: an operation of torch that wants threads would wait for them forever
    queue.put(all((mine[n].detach().numpy() == v.numpy()).all() for n, v in expected.items()))

torch.set_num_threads(2)
case = layer(B=1)
expected = {name: value.detach() for name, value in outcome(case).items()}  # the pool is awake
context = multiprocessing.get_context("fork")
queue = context.Queue()
worker = context.Process(target=child, args=(queue,))
worker.start()
print(bool(queue.get(timeout=60)))
worker.join()
loader = torch.utils.data.DataLoader(Items(), num_workers=2, multiprocessing_context="fork")
print(all(same_bits(y[0], expected["y"]) for y in loader))
again = outcome(case)  # and the parent still has its threads
print(all(same_bits(again[name].detach(), value) for name, value in expected.items()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_after_a_fork():
    """A child inherits the pool but none of its threads, so it runs on one."""
    assert python(FORKED).split() == ["True"] * 3


@pytest.mark.skipif(os.name == "nt", reason="no signal of this kind")
def test_an_interrupt_comes_after_the_call(threads, request):
    """Ctrl-C is raised when the kernels return, and the next call is right."""
    threads(2)
    # a shell starts what it puts in the background with the signal ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    case = layer(T=3000, B=2, H=128)
    with torch.no_grad():
        expected = case.run("native")
        for _ in range(2):
            timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            with pytest.raises(KeyboardInterrupt):
                end = time.monotonic() + 60
                while time.monotonic() < end:
                    case.run("native")
            timer.join()
            check_same(case.run("native"), expected)


# The extension itself

LOADED_ALONE = """
import importlib.util, torch
spec = importlib.util.spec_from_file_location("fastseq._cpu", sys.argv[1])
_cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cpu)
x = torch.zeros(3)
for name in ("forward", "backward", "stream", "stream_step", "vocabulary"):
    function = getattr(_cpu, name)
    count = 1 + function.__doc__.partition(")")[0].count(",")
    for arguments in ([x] * count, [None] * count, []):
        try:
            print(name, function(*arguments))
        except (RuntimeError, TypeError) as error:
            print(type(error).__name__)
try:
    _cpu.connect(x, x, x)
except ValueError:
    print(_cpu.plan(1, 1, 1, 1.0, 1.0), _cpu.instruction_sets(), _cpu.use_instruction_set("base"))
"""


def test_nothing_runs_before_it_is_connected():
    """Every function raises, whatever it is given; those that see no tensor work."""
    said = python(LOADED_ALONE, arguments=[_cpu.__file__]).splitlines()
    assert set(said[:-1]) == {"RuntimeError", "TypeError"}
    assert said.count("TypeError") == 2  # of those that count their arguments first
    assert said[-1] == f"(1, 1) {SETS} {SETS[0]}"


OTHER_BUILD = """
import torch, types
import fastseq._cpu as real
{edit}
import fastseq
print(fastseq.backends()["native"])
print(fastseq.LSTM(2, 3)(torch.zeros(4, 1, 2))[0].shape)
try:
    fastseq.LSTM(2, 3, backend="native")(torch.zeros(4, 1, 2))
except RuntimeError as error:
    print(error)
"""

#: what an older or a newer build of the extension looks like
EDITS = {
    "without a function": """
other = types.ModuleType("fastseq._cpu")
other.__dict__.update({k: v for k, v in vars(real).items() if k != "forward"})
""",
    "with other arguments": """
def backward(*arguments):
    "(cell, x) -> dx"
other = types.ModuleType("fastseq._cpu")
other.__dict__.update(vars(real), backward=backward)
""",
    "with another cell": """
other = types.ModuleType("fastseq._cpu")
other.__dict__.update(vars(real), CELLS=[*real.CELLS, ("none",)])
""",
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_build_of_other_sources_is_refused(edit):
    """With the reason and what to do, and everything else runs."""
    replaced = EDITS[edit] + "sys.modules['fastseq._cpu'] = sys.modules['fastseq']._cpu = other"
    reason, shape, raised = python(OTHER_BUILD.format(edit=replaced)).splitlines()
    what = {"without a function": "forward", "with other arguments": "backward"}.get(edit, "none")
    assert reason.startswith(
        "not available: the C++ kernels were built from the sources of another"
    )
    assert f"another {what}; build them again: make build" in reason
    assert shape == "torch.Size([4, 1, 3])"
    assert reason in raised


# Memory


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("cell", CELLS)
def test_what_training_keeps(cell, memory):
    """At most G + 2 numbers for each token and hidden unit, y with them; nothing but y if lean."""
    T, B, H = 20, 5, 64
    case = draw(cell, T=T, B=B, I=4, H=H, dtype=torch.float32)
    inputs = {t.data_ptr() for t in (case.x, *case.states, *case.leaves().values())}
    kept = {}

    def pack(tensor):
        states = tensor is not None and tensor.dim() == 3 and tensor.shape[:2] == (1, B)
        if tensor is not None and not states and tensor.data_ptr() not in inputs:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = case.run("native", memory=memory)
    assert outputs["y"].shape[:2] == (T, B)
    numbers = sum(kept.values()) / 4 / (T * B * H)
    definition = CELLS[cell]
    assert numbers <= (definition.G + 2 if memory == "full" else 1), kept
    assert numbers >= 1  # the hooks saw what was kept


OUT_OF_MEMORY = """
import gc, resource, torch
from fastseq.backends import load
from fastseq.backends.contract import NOTHING, Call, OutputGradients, Request, Wanted
from problems import draw

native = load("native")

def address_space():
    return int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()

def call(T, I, H):
    case = draw("lstm", T=T, B=1, I=I, H=H, dtype=torch.float32, grad=False)
    return Call("lstm", case.x, None, case.states, case.weights, (False,))

small, long, wide = call(3, 2, 4), call(30000, 256, 64), call(20, 4, 2100)
expected = native.forward(small, True, False).y
kept, kept_wide = native.forward(long, True, False), native.forward(wide, True, False)
grads = OutputGradients(torch.ones_like(kept.y), [None, None], [])
grads_wide = OutputGradients(torch.ones_like(kept_wide.y), [None, None], [])
h, c = torch.zeros(1, 4, 2100), torch.zeros(1, 4, 2100)

def layers(call, save):
    weights = tuple(w for w in call.weights[0].flat() if w is not None)
    return native.layers(Request("lstm"), call.x, None, (), weights, NOTHING, save)

def stream():
    return native.stream(Request("lstm"), wide_weights, h, (c,))

wide_weights = tuple(wide.weights[0].flat()[:4])
references = sys.getrefcount(wide_weights), sys.getrefcount(h)
for attempt in (
    lambda: native.forward(wide, False, False),  # 71 MB of scratch, more than is ever kept
    lambda: layers(wide, False),
    lambda: layers(wide, True),
    stream,
    lambda: native.backward(wide, kept_wide, grads_wide, Wanted(True, True, False)),
    lambda: native.forward(long, True, False),  # 31 MB of gates
    lambda: native.backward(long, kept, grads, Wanted(True, True, True)),  # 31 MB of dx
):
    for k in range(4):
        room = address_space() + (20 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (room, resource.getrlimit(resource.RLIMIT_AS)[1]))
        try:
            attempt()
        except (MemoryError, RuntimeError) as error:
            print(type(error).__name__)
            del error
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        gc.collect()
        assert torch.equal(native.forward(small, True, False).y, expected)
        if k == 0:
            before = address_space()
    assert address_space() - before < (16 << 20), (before, address_space())
assert (sys.getrefcount(wide_weights), sys.getrefcount(h)) == references
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_out_of_memory():
    """Raised by us or by torch's allocator; what was made is freed; the next call is right."""
    # a fixed threshold, so that what was freed is not kept for the next attempt
    fixed = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    raised = python(OUT_OF_MEMORY, **fixed).split()
    assert raised == ["MemoryError"] * 20 + ["RuntimeError"] * 8


@full
@pytest.mark.skipif(sys.platform != "linux", reason="of zero pages, which Linux shares")
def test_offsets_beyond_31_bits():
    """Rows of x that stand 2^29 numbers apart: the last is 2^33 bytes behind the first."""
    apart, T, B, I, H = 1 << 29, 3, 2, 5, 9  # noqa: E741
    storage = torch.empty((T * B - 1) * apart + I)  # never touched but for the rows
    x = storage.as_strided((T, B, I), (B * apart, apart, 1))
    case = draw("gru", T=T, B=B, I=I, H=H, dtype=torch.float32)
    with torch.no_grad():
        x.copy_(case.x)
        expected = case.run("native")["y"]
        case.x = x
        assert case.x.stride() == (B * apart, apart, 1)
        assert same_bits(case.run("native")["y"], expected)


@full
@pytest.mark.skipif(sys.platform != "linux", reason="of zero pages, which Linux shares")
def test_weights_of_more_than_31_bits():
    """G * H * P > 2^31: nothing but two rows is there, and the last one counts."""
    H, G = 23200, 4
    w_hh = torch.from_numpy(np.zeros((G * H, H), np.float32))  # one page of zeros, many times
    assert w_hh.numel() > 1 << 31
    w_ih = torch.zeros(G * H, 1)
    h_0, c_0 = torch.zeros(1, 1, H), torch.zeros(1, 1, H)
    w_hh[2 * H, 0] = w_hh[-1, -1] = 1.0  # of g of the first unit and of o of the last one
    h_0[0, 0, 0] = h_0[0, 0, -1] = c_0[0, 0, -1] = 2.0
    weights = [Weights(w_ih, w_hh, None, None, None)]
    call = Call("lstm", torch.zeros(1, 1, 1), None, [h_0, c_0], weights, (False,))
    y, states = (result := native.forward(call, False, False)).y[0, 0], result.states
    expected = torch.zeros(H)
    expected[0] = 0.5 * torch.tanh(0.5 * torch.tanh(torch.tensor(2.0)))
    expected[-1] = torch.sigmoid(torch.tensor(2.0)) * torch.tanh(torch.tensor(1.0))
    check_alike(y, expected)
    assert states[1][0, 0, -1] == 1.0


def need_memory(gigabytes):
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    if free < gigabytes << 20:
        pytest.skip(f"needs {gigabytes} GB of memory that is free")


@full
@pytest.mark.skipif(sys.platform != "linux", reason="asks how much memory is free")
def test_outputs_of_more_than_31_bits(threads):
    """T * B * H > 2^31, forward and backward: the last sequences are what they are alone."""
    need_memory(12)
    threads(2)
    T, B, H = 1025, 1 << 15, 64
    case = draw("rnn_tanh", T=1, B=1, I=1, H=H, dtype=torch.float32, state=False, grad=False)
    x = torch.randn(T, B, 1, generator=torch.Generator().manual_seed(1))
    dh = torch.ones(1, B, H)

    def values(some):
        call = Call("rnn_tanh", x[:, some], None, [], case.weights, (False,), deterministic=True)
        result = native.forward(call, True, False)
        grads = OutputGradients(None, [dh[:, some].contiguous()], [])
        d = native.backward(call, result, grads, Wanted(True, True, False))
        return result.y[:, -3:].clone(), result.states[0][:, -3:], d.x[:, -3:].clone()

    whole, alone = values(slice(None)), values(slice(B - 3, None))
    for ours, expected in zip(whole, alone, strict=True):
        assert same_bits(ours, expected)


@full
@pytest.mark.skipif(sys.platform != "linux", reason="of zero pages, which Linux shares")
def test_saved_gates_of_more_than_31_bits(threads):
    """T * B * G * H > 2^31: saved are zeros, which no gradient passes, but for the last step."""
    need_memory(6)
    threads(2)
    T, B, H = 8200, 1 << 10, 64

    def zeros(*shape):
        return torch.from_numpy(np.zeros(shape, np.float32))  # one page, many times

    case = draw("lstm", T=1, B=B, I=1, H=H, dtype=torch.float32, state=False, grad=False)
    states = [torch.zeros(1, B, H)] * 2

    def call(x):
        return Call("lstm", x, None, states, case.weights, (False,))

    grads = OutputGradients(None, [torch.ones(1, B, H), torch.ones(1, B, H)], [])
    wanted = Wanted(True, True, True)
    step = native.forward(call(case.x), True, False)
    expected = native.backward(call(case.x), step, grads, wanted)
    x, y = zeros(T, B, 1), zeros(T, B, H)
    gates, c = zeros(T * B, 4 * H), zeros(T, B, H)
    assert gates.numel() > 1 << 31
    x[-1], y[-1], gates[-B:], c[-1] = case.x[0], step.y[0], step.saved[0], step.saved[1][0]
    ours = native.backward(call(x), Result(y, step.states, [], [gates, c]), grads, wanted)
    assert same_bits(ours.x[-1], expected.x[0]) and not ours.x[:-1].any()
    for d, given in zip(ours.weights[0].given(), expected.weights[0].given(), strict=True):
        check_alike(d, given)


# The sanitizers


def sanitized(*names):
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    command = [sys.executable, str(ROOT / "tools" / "sanitize.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_address_sanitizer():
    """Of the least instruction set a choice; ``make sanitize`` runs all of them."""
    assert "0 failures" in sanitized("address", "base-few")


@full
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
@pytest.mark.parametrize("name", SETS)
def test_sanitizers(sanitizer, name):
    assert "0 failures" in sanitized(sanitizer, name)
