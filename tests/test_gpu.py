"""The triton backend on a GPU: numbers against float64 and against cuDNN, and what only a device
shows. `make gpu` runs these; without a CUDA device they are skipped."""

import copy
import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import NamedTuple

import pytest
import tf32
import torch
from problems import KINKED, draw
from rules import check_alike, check_all, poisoned, same_bits

import fastseq
from fastseq.backends import load
from fastseq.cells import CELLS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
SPECIAL = {
    "plain": {},
    "T1 B1 H1": {"T": 1, "B": 1, "H": 1, "I": 1, "seed": 1},
    "H63": {"H": 63, "T": 7},
    "H64": {"H": 64, "T": 7, "I": 16, "B": 16, "directions": 2},
    "H65": {"H": 65, "T": 3, "directions": 2},
    "H127": {"H": 127, "T": 3, "B": 5},
    "H128": {"H": 128, "T": 7, "B": 33},
    "H256": {"H": 256, "T": 9, "B": 33, "directions": 2},
    "H300": {"H": 300, "T": 5, "B": 40},
    "H512": {"H": 512, "T": 3, "B": 20},
    "H1024": {"H": 1024, "T": 3, "B": 20},
    "bare": {"bias": False, "state": False, "H": 20},
    "saturated": {"scale": 50.0, "H": 20},
    "reset": {"reset": True, "directions": 2},
    "h_mask": {"h_mask": True, "directions": 2},
    "ragged": {"lengths": [2, 5, 3], "directions": 2},
    "all at once": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "directions": 2},
    "all at once H200": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "H": 200},
    "all at once H256": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "H": 256},
    "many rows H256": {"T": 4, "B": 2500, "H": 256},
    "H256 in steps": {"H": 256, "T": 5, "B": 40},
    "all at once H200 in steps": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "H": 200},
}
#: One size for each form: a walk, a grid that reads its weights and one that holds them, and steps.
FORMS = [("walk", 64), ("grid", 200), ("grid", 256), ("step", 200)]
each_form = pytest.mark.parametrize("form, H", FORMS)


def as_form(form):
    """Sizes that no single program holds take this one."""
    return nullcontext() if form == "walk" else load("triton").larger_as(form)


@pytest.fixture(autouse=True)
def products_are_ieee():
    """What the CPU's numbers are compared with; a test of TF32 sets it itself."""
    with precision("ieee"):
        yield


class precision:
    """torch's setting for the float32 products of recurrent layers."""

    def __init__(self, name):
        self.name = name

    def __enter__(self):
        self.before = torch.backends.cudnn.rnn.fp32_precision
        torch.backends.cudnn.rnn.fp32_precision = self.name

    def __exit__(self, *error):
        torch.backends.cudnn.rnn.fp32_precision = self.before


def on_gpu(case, device="cuda"):
    """The same layers on the device, as new leaves."""

    def move(tensor):
        if tensor is None:
            return None
        return tensor.detach().to(device).requires_grad_(tensor.requires_grad)

    return replace(
        case,
        x=move(case.x),
        states=[move(s) for s in case.states],
        weights=[w.map(move) for w in case.weights],
        reset=move(case.reset),
        h_mask=move(case.h_mask),
    )


def gradients_of(outputs, leaves):
    """As problems.gradients, with the cotangents on the outputs' device."""
    given = {n: torch.randn(v.shape, generator=_random()).to(v) for n, v in outputs.items()}
    grads = torch.autograd.grad(list(outputs.values()), list(leaves.values()), list(given.values()))
    return {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def _random(seed=1):
    return torch.Generator().manual_seed(seed)


def check(case, what, **options):
    """Values and gradients by the rule; err(torch) is the independent writing's, on the CPU.

    In 16 bits of ReLU's cells values alone: on which side of its kink a gradient is, the rounding
    decides.
    """
    trajectory = options.get("trajectory", False)
    wide, same = case.to(torch.float64), case.to(case.x.dtype)
    exact, theirs = wide.independent(trajectory), same.independent(trajectory)
    exact |= gradients_of(exact, wide.leaves())
    theirs |= gradients_of(theirs, same.leaves())
    here = on_gpu(case)
    ours = here.run("triton", **options)
    ours |= gradients_of(ours, here.leaves())
    if case.cell in KINKED and case.x.dtype.itemsize == 2:
        exact = {name: value for name, value in exact.items() if not name.startswith("d")}
    check_all({n: ours[n].cpu() for n in exact}, theirs, exact, case.x.dtype, what)


class Layers(NamedTuple):
    """One layer by triton, by cuDNN, and by torch in float64 on the CPU."""

    ours: torch.nn.Module
    theirs: torch.nn.Module
    truth: torch.nn.Module


def layers(kind, sizes, mode, **options):
    """mode: a type of 16 bits, or how float32's products are made."""
    given = {"device": "cuda", "dtype": DTYPES.get(mode, torch.float32), **options}
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(*sizes, **given)
    ours = getattr(fastseq, kind)(*sizes, backend="triton", **given)
    truth = getattr(torch.nn, kind)(*sizes, **options).double()
    ours.load_state_dict(theirs.state_dict())
    truth.load_state_dict(theirs.state_dict())
    return Layers(ours, theirs, truth)


def values(module, x, call=None):
    """Name -> outputs and gradients, on the CPU. call: instead of the module's own."""
    x = x.clone().requires_grad_()
    y, state = module(x) if call is None else call(module, x)
    state = state if isinstance(state, tuple) else (state,)
    found = {"y": y} | dict(zip(("h_n", "c_n"), state, strict=False))
    found |= gradients_of(found, {"x": x} | dict(module.named_parameters()))
    return {name: value.cpu() for name, value in found.items()}


def measure(layer, cudnn, exact, x, mode):
    """The numbers whose error is the measure of ours."""
    if mode != "tf32":
        return cudnn
    return tf32.worse(cudnn, values(layer.truth, x.double(), tf32.layer), exact)


#: A size for each form and precision; of the products of float32 parts no grid holds its weights.
CORE = [
    (form, H, mode)
    for mode in ("bfloat16", "float16", "tf32", "ieee")
    for form, H in (("walk", 32 if mode == "ieee" else 64), *FORMS[1:])
    if (mode, H) != ("ieee", 256)
]


@pytest.mark.core
@pytest.mark.parametrize("form, H, mode", CORE)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_each_form_in_short(kind, form, H, mode):
    """Numbers no further from float64 than twice cuDNN, the same bits again, and under a graph."""
    T, B, I = 9, 20, 32  # noqa: E741
    layer = layers(kind, (I, H), mode)
    x = torch.randn(T, B, I, generator=_random()).to(layer.ours.weight_hh_l0.dtype)
    with precision(mode if mode in ("tf32", "ieee") else "ieee"), as_form(form):
        cudnn, mine = values(layer.theirs, x.cuda()), values(layer.ours, x.cuda())
        exact = values(layer.truth, x.double())
        check_all(
            mine, measure(layer, cudnn, exact, x, mode), exact, x.dtype, f"{kind} {form} {mode}"
        )
        again = values(layer.ours, x.cuda())
        assert all(same_bits(mine[name], again[name]) for name in mine)
        records(layer.ours, x.cuda(), training=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", SPECIAL)
@pytest.mark.parametrize("cell", CELLS)
def test_against_float64(cell, special, dtype):
    options = dict(SPECIAL[special])
    if special == "many rows H256" and cell not in ("lstm", "gru", "gru_reset_before"):
        pytest.skip("the reference takes half a minute, and the others' tiles are these")
    if special == "saturated" and DTYPES[dtype].itemsize == 2 and CELLS[cell].unit_parameters:
        options["scale"] = 10.0  # as under the interpreter (triton_cases.py)
    with as_form("step" if "in steps" in special else "walk"):
        check(draw(cell, dtype=DTYPES[dtype], **options), f"{cell} {special}")


@each_form
def test_the_form_is_the_one_that_was_asked_for(form, H, monkeypatch):
    """One launch forward, where it is not a step's."""
    from fastseq.backends.triton_kernels import Kernel

    launches = []
    launch = Kernel.__call__

    def record(self, grid, values, options):
        launches.append((self.function.__name__, options.get("launch_cooperative_grid", False)))
        launch(self, grid, values, options)

    monkeypatch.setattr(Kernel, "__call__", record)
    module = fastseq.LSTM(8, H, device="cuda", dtype=torch.bfloat16, backend="triton")
    with as_form(form), torch.no_grad():
        module(torch.randn(6, 3, 8, device="cuda", dtype=torch.bfloat16))
    name = f"lstm_forward_{form}" + ("_0" if form == "step" else "")
    assert launches == [(name, form == "grid")] * (6 if form == "step" else 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("cell", CELLS)
def test_memory_and_trajectory(cell, memory, dtype):
    case = draw(cell, dtype=DTYPES[dtype], lengths=[3, 0, 5], directions=2, reset=True)
    check(case, memory, memory=memory, trajectory=cell == "lstm")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, P", [(20, 3), (64, 64), (300, 100)])
def test_projection(H, P, dtype):
    check(draw("lstm", H=H, P=P, directions=2, dtype=DTYPES[dtype]), f"H={H} P={P}")


SHAPES = [(64, 16, 40, 64), (33, 5, 20, 100), (20, 64, 128, 128), (16, 48, 100, 300)]


@pytest.mark.parametrize("mode", ["tf32", "ieee", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_against_cudnn(kind, shape, mode):
    """No further from float64 than twice cuDNN, in the same precision on both sides; in TF32 than
    twice the rounding of all operands, where cuDNN does not round."""
    T, B, I, H = shape  # noqa: E741
    layer = layers(kind, (I, H, 2), mode, bidirectional=True)
    x = torch.randn(T, B, I, generator=_random()).to(layer.ours.weight_hh_l0.dtype)
    with precision(mode if mode in ("tf32", "ieee") else "ieee"):
        mine, cudnn = values(layer.ours, x.cuda()), values(layer.theirs, x.cuda())
    exact = values(layer.truth, x.double())
    theirs = measure(layer, cudnn, exact, x, mode)
    check_all(mine, theirs, exact, x.dtype, f"{kind} {shape} {mode}")


def flat(case, **options):
    """Outputs and gradients, in one list."""
    outputs = case.run("triton", **options)
    return [*outputs.values(), *gradients_of(outputs, case.leaves()).values()]


@each_form
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "indrnn"])
def test_a_hundred_runs_give_the_same_bits(cell, form, H):
    lengths = [1 + b % 20 for b in range(37)]
    case = draw(cell, T=20, B=37, H=H, directions=2, lengths=lengths, dtype=torch.bfloat16)
    case = on_gpu(case)
    with as_form(form):
        first = flat(case)
        for _ in range(100):
            assert all(same_bits(a, b) for a, b in zip(first, flat(case), strict=True))


@each_form
def test_streams_do_not_disturb_each_other(form, H):
    """Grids too: each waits for its own programs, and none for another's."""
    cases = [
        on_gpu(draw("lstm", T=40, B=20, H=H, dtype=torch.bfloat16, seed=seed)) for seed in range(4)
    ]
    streams = [torch.cuda.Stream() for _ in cases]
    with as_form(form):
        alone = [flat(case) for case in cases]
        torch.cuda.synchronize()
        for _ in range(5):
            together = []
            for stream, case in zip(streams, cases, strict=True):
                with torch.cuda.stream(stream):
                    together.append(flat(case))
            torch.cuda.synchronize()
            for one, other in zip(alone, together, strict=True):
                assert all(same_bits(a, b) for a, b in zip(one, other, strict=True))


@each_form
def test_a_busy_gpu_changes_nothing(form, H):
    """Products that fill the device run on another stream meanwhile."""
    case = on_gpu(draw("lstm", T=100, B=20, H=H, dtype=torch.bfloat16))
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with as_form(form):
        alone = flat(case)
        torch.cuda.synchronize()
        for _ in range(5):
            with torch.cuda.stream(side):
                for _ in range(40):
                    a @ a
            busy = flat(case)
            torch.cuda.synchronize()
            assert all(same_bits(x, y) for x, y in zip(alone, busy, strict=True))


@pytest.mark.parametrize("training", [False, True])
@each_form
def test_a_cuda_graph_records_it(form, H, training):
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.GRU(32, H, 2, bidirectional=True, backend="triton", **options)
    with as_form(form):
        records(module, torch.randn(12, 5, 32, **options), training)


def records(module, x, training):
    """A graph of the call, replayed on other numbers, gives what the call gives.

    Of a copy: while a result of the module itself lives, its parameters' gradients belong to the
    stream on which that was made, and torch makes a capture on another wait for it, which is an
    error.
    """
    module = copy.deepcopy(module)
    x = x.detach().clone().requires_grad_(training)

    def step():
        with torch.set_grad_enabled(training):
            y = module(x)[0]
            return (
                y,
                *(torch.autograd.grad(y.sum(), [x, *module.parameters()]) if training else ()),
            )

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # where x and the weights are made
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for seed in range(3):
        with torch.no_grad():
            x.copy_(torch.randn(x.shape, generator=_random(seed)))
        graph.replay()
        found = [t.clone() for t in recorded]
        assert all(same_bits(a, b) for a, b in zip(found, step(), strict=True))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's, as the capture ends
def test_a_graph_of_ragged_sequences_is_refused_with_the_reason():
    module = fastseq.GRU(3, 4, device="cuda", backend="triton")
    x = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 3, device="cuda") for n in (3, 2)])
    with torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        with pytest.raises(RuntimeError, match="batch_sizes lives on the CPU"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                module(x)


@each_form
def test_another_device(form, H):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device alone")
    case = draw("lstm", T=5, H=H, directions=2, dtype=torch.bfloat16)
    with as_form(form):
        one, other = flat(on_gpu(case, "cuda:0")), flat(on_gpu(case, "cuda:1"))
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))
    assert all(t.device == torch.device("cuda:1") for t in other)


@each_form
def test_memory_at_the_end_is_memory_at_the_start(form, H):
    case = on_gpu(draw("lstm", T=10, B=9, H=H, directions=2, dtype=torch.bfloat16))
    with as_form(form):
        flat(case)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(10):
            flat(case)
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


def test_more_steps_than_cudnn_takes():
    """70,000, in one call and in two with the state carried."""
    module = fastseq.GRU(8, 16, device="cuda", backend="triton")
    x = torch.randn(70_000, 2, 8, device="cuda")
    with torch.no_grad():
        whole, last = module(x)
        first, state = module(x[:30_000])
        second, final = module(x[30_000:], state)
    # the input product of another number of rows may be another kernel of cuBLAS
    check_alike(torch.cat([first, second]), whole)
    check_alike(final, last)


@each_form
def test_nothing_compiles_again_for_another_length_or_batch(form, H, monkeypatch):
    from fastseq.backends.triton_kernels import Kernel

    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(16, H, backend="triton", **options)
    functions = {}
    launch = Kernel.__call__

    def record(self, *arguments):
        functions[self.function.__name__] = self.function
        launch(self, *arguments)

    monkeypatch.setattr(Kernel, "__call__", record)

    def run(T, B):
        x = torch.randn(T, B, 16, **options)
        for lengths in (None, torch.arange(B) % T + 1):
            module(x, lengths=lengths)[0].sum().backward()

    def compiled():
        caches = [c[0] for f in functions.values() for c in f.device_caches.values()]
        return len(functions), sum(map(len, caches))

    with as_form(form):
        run(4, 3)
        before = compiled()
        for T, B in ((1, 1), (16, 16), (17, 2), (5, 31)):
            run(T, B)
    assert compiled() == before and before[1] >= before[0] == 3  # forward, backward, previous_h


@each_form
@pytest.mark.parametrize("cell", CELLS)
def test_nothing_is_read_before_it_is_written(cell, form, H):
    options = {"directions": 2, "lengths": [0, 5, 3], "reset": True}
    case = draw(cell, T=5, B=3, H=H, dtype=torch.bfloat16, **options)
    with poisoned(), as_form(form):
        check(case, "poisoned")


def test_none_stays_with_torch():
    """Until a measurement says otherwise."""
    module = fastseq.LSTM(8, 16, device="cuda")
    assert fastseq.explain(module, torch.randn(3, 2, 8, device="cuda")) == "torch"
