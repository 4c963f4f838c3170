"""The backends cuda and triton on a GPU: numbers against float64 and against cuDNN, and what only a
device shows. `make gpu` runs these; without a CUDA device they are skipped.

cuda's forms are named cta, in which one CTA owns some sequences for all of time, and team-cluster
and team-grid, in which several CTAs do: `-k cta` and `-k team` select their tests. They fail where
the backend is not available, and skip only what it declines.
"""

import copy
import gc
import struct
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import NamedTuple

import independent
import pytest
import tf32
import torch
from problems import KINKED, draw
from rules import check_alike, check_all, poisoned, same_bits

import fastseq
from fastseq.backends import choice, cuda_teams, load
from fastseq.backends.contract import Problem
from fastseq.backends.cuda_kernels import KERNELS, POINTWISE_CELLS, PRODUCT_CELLS, TEAMS, WAVE_CELLS
from fastseq.backends.cuda_plan import type_of
from fastseq.cells import CELLS, unregister
from fastseq.ops import masks, whole
from fastseq.ops.stack import problem

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
#: In training, of each state at a rate of its own, and in evaluation.
ZONED = {
    "zoneout": {"zoneout": (0.4, 0.2, 0.6), "directions": 2, "B": 20},
    "zoneout of others": {"zoneout": (0.0, 0.5, 0.0), "B": 20},
    "zoneout at once": {
        "lengths": [2, 0, 5],
        "reset": True,
        "h_mask": True,
        "directions": 2,
        "zoneout": 0.4,
    },
    "zoneout in evaluation": {
        "lengths": [5, 2, 3],
        "reset": True,
        "zoneout": 0.3,
        "evaluates": True,
    },
}
#: One size for each form of triton: a walk, a grid that reads its weights and one that holds them,
#: and steps.
OF_TRITON = [("walk", 64), ("grid", 200), ("grid", 256), ("step", 200)]
#: Of cuda with all weights in registers, and with some of an LSTM's in shared memory.
OF_CUDA = [("cta", 64), ("cta", 128)]
#: Of its teams with the last CTA's slice filled in part; and filled.
OF_TEAMS = [("team-cluster", 300), ("team-grid", 600)]
FULL_TEAMS = [("team-cluster", 512), ("team-grid", 1024)]
each_form = pytest.mark.parametrize("form, H", OF_TRITON + OF_CUDA + OF_TEAMS)
each_team = pytest.mark.parametrize("form, H", OF_TEAMS)
REGIMES = {"cta": "cta", "team-cluster": "cluster", "team-grid": "grid", "team-wave": "wave"}
CUDA_CELLS = (*PRODUCT_CELLS, *POINTWISE_CELLS)


def backend_of(form):
    return "cuda" if form in REGIMES else "triton"


def of_cuda():
    """The backend; where it is not available this fails."""
    module = load("cuda")
    assert not isinstance(module, str), module
    return module


@contextmanager
def as_form(form):
    """Layers of cuda take this one, and of triton those that no single program holds."""
    if form in REGIMES:
        with of_cuda().larger_as(REGIMES[form]):
            yield
    else:
        with load("triton").larger_as("grid" if form == "walk" else form):
            yield


def skip_if_declined(task):
    """Of a problem that cuda does not run, in the form that is asked for."""
    reason = choice.declines(of_cuda(), task._replace(device="cuda"))
    if reason is None and of_cuda()._asked in ("cluster", "grid"):
        reason = not_by_teams(task, of_cuda()._asked)
    if reason is not None:
        pytest.skip(reason)


def not_by_teams(task, regime):
    """Why no team of a regime runs a problem."""
    setting = torch.backends.cudnn.rnn.fp32_precision
    kind = type_of(task, "tf32" if task.tf32 or setting == "tf32" else "ieee")
    return cuda_teams.declined(task.cell, kind, regime, task.H, of_cuda().device_at_hand())


def skip_without_teams(form):
    """Of a form of cuda's that this device has not, as clusters before compute capability 9.0."""
    if form.startswith("team-"):
        reason = reason_against_teams(
            "lstm", "bfloat16", 1024 if "grid" in form else 512, REGIMES[form]
        )
        if reason is not None:
            pytest.skip(reason)


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


def check(case, what, backend="triton", **options):
    """Values and gradients by the rule; err(torch) is the independent writing's, on the CPU; in
    TF32 that of the writing whose products take rounded operands.

    In 16 bits and TF32 of ReLU's cells values alone: on which side of its kink a gradient is, the
    rounding decides.
    """
    trajectory = options.get("trajectory", False)
    coarse = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    wide, same = case.to(torch.float64), case.to(torch.float64 if coarse else case.x.dtype)
    exact = wide.independent(trajectory)
    exact |= gradients_of(exact, wide.leaves())
    with pytest.MonkeyPatch.context() as patch:
        if coarse:
            patch.setattr(independent, "affine", tf32.affine)
        theirs = same.independent(trajectory)
        theirs |= gradients_of(theirs, same.leaves())
    here = on_gpu(case)
    if backend == "cuda":
        skip_if_declined(problem(here.stack("cuda", **options)))
    ours = here.run(backend, **options)
    ours |= gradients_of(ours, here.leaves())
    if case.cell in KINKED and (coarse or case.x.dtype.itemsize == 2):
        exact = {name: value for name, value in exact.items() if not name.startswith("d")}
    check_all({n: ours[n].cpu() for n in exact}, theirs, exact, case.x.dtype, what)


class Layers(NamedTuple):
    """One layer by ours, by cuDNN, and by torch in float64 on the CPU."""

    ours: torch.nn.Module
    theirs: torch.nn.Module
    truth: torch.nn.Module


def layers(kind, sizes, mode, backend="triton", **options):
    """mode: a type of 16 bits, or how float32's products are made."""
    given = {"device": "cuda", "dtype": DTYPES.get(mode, torch.float32), **options}
    torch.manual_seed(0)
    theirs = getattr(torch.nn, kind)(*sizes, **given)
    ours = getattr(fastseq, kind)(*sizes, backend=backend, **given)
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


#: A size for each form and precision; of the products of float32 parts no grid holds its weights,
#: and of float32 no CTA those of 128 units of an LSTM.
CORE = [
    (form, H, mode)
    for mode in ("bfloat16", "float16", "tf32", "ieee")
    for form, H in (*OF_CUDA, ("walk", 32 if mode == "ieee" else 64), *OF_TRITON[1:])
    if (mode, H) != ("ieee", 256) and (form, H, mode[-2:] == "16") != ("cta", 128, False)
]
CORE += [(form, H, mode) for mode in ("bfloat16", "float16", "tf32") for form, H in FULL_TEAMS]


@pytest.mark.core
@pytest.mark.parametrize("form, H, mode", CORE)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_each_form_in_short(kind, form, H, mode):
    """Numbers no further from float64 than twice cuDNN, the same bits again, and under a graph."""
    T, B, I = 9, 20, 32  # noqa: E741
    skip_without_teams(form)
    layer = layers(kind, (I, H), mode, backend_of(form))
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


#: Hidden units and layers that one cluster holds together, filled and not.
WAVES = [(256, 2), (160, 3), (33, 8)]


def skip_without_waves(cell, mode, H, count):
    device = of_cuda().device_at_hand()
    if reason := cuda_teams.declined(cell, mode, "wave", H, device, count):
        pytest.skip(reason)


@pytest.mark.core
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_team_wave_in_short(kind, mode):
    """Layers side by side in one cluster, checked as :func:`test_each_form_in_short` does."""
    H, count = WAVES[0]
    skip_without_waves({"RNN": "rnn_tanh"}.get(kind, kind.lower()), mode, H, count)
    layer = layers(kind, (32, H, count), mode, "cuda")
    x = torch.randn(9, 20, 32, generator=_random()).to(layer.ours.weight_hh_l0.dtype)
    with precision("tf32" if mode == "tf32" else "ieee"), as_form("team-wave"):
        cudnn, mine = values(layer.theirs, x.cuda()), values(layer.ours, x.cuda())
        exact = values(layer.truth, x.double())
        check_all(mine, measure(layer, cudnn, exact, x, mode), exact, x.dtype, f"{kind} {mode}")
        again = values(layer.ours, x.cuda())
        assert all(same_bits(mine[name], again[name]) for name in mine)
        records(layer.ours, x.cuda(), training=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("special", ["plain", "all at once", "bare", "T1 B1 H1", "many"])
@pytest.mark.parametrize("H, count", WAVES)
@pytest.mark.parametrize("cell", WAVE_CELLS)
def test_team_wave_against_float64(cell, H, count, special, dtype):
    skip_without_waves(cell, dtype, H, count)
    options = {"T": 40, "B": 200} if special == "many" else dict(SPECIAL[special])
    options |= {"H": H, "layers": count, "directions": 1}
    with as_form("team-wave"):
        case = draw(cell, dtype=DTYPES[dtype], **options)
        check(case, f"{cell} {special}", "cuda", trajectory=special == "all at once")


def test_team_wave_gives_the_same_bits_a_hundred_times():
    skip_without_waves("lstm", "bfloat16", 160, 3)
    lengths = [1 + b % 20 for b in range(37)]
    case = on_gpu(draw("lstm", T=20, B=37, H=160, layers=3, lengths=lengths, dtype=torch.bfloat16))
    with as_form("team-wave"):
        first = flat(case, "cuda")
        for _ in range(100):
            assert all(same_bits(a, b) for a, b in zip(first, flat(case, "cuda"), strict=True))


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


#: Of one CTA: the sizes around a warp's units and a CTA's classes and sequences, and one step.
SIZES = {
    "T1 B1 H1": {"T": 1, "B": 1, "H": 1, "I": 1, "seed": 11},
    "H1": {"H": 1, "B": 9},
    "H17": {"H": 17, "B": 7},
    "H32": {"H": 32, "B": 8, "directions": 2, "layers": 2},
    "H63": {"H": 63, "B": 9, "T": 7},
    "H64": {"H": 64, "B": 33, "T": 40, "directions": 2},
    "H65": {"H": 65, "B": 1, "T": 17},
    "H100": {"H": 100, "B": 9, "T": 7, "directions": 2},
    "H127": {"H": 127, "B": 8, "T": 3},
    "H128": {"H": 128, "B": 33, "T": 7, "directions": 2},
    "H192": {"H": 192, "B": 9, "T": 5, "directions": 2},
    "H256": {"H": 256, "B": 7, "T": 5},
    "one step": {"H": 64, "B": 20, "T": 1},
    # more than four sequences for each multiprocessor: eight to a CTA, in both loops
    "many rows H64": {"H": 64, "B": 1100, "T": 3},
    "many rows H40": {"H": 40, "B": 1100, "T": 3, "directions": 2},
    "many rows H128": {"H": 128, "B": 1100, "T": 3},
    "no state": {"H": 48, "B": 3, "bias": False, "state": False},
    "saturated": {"scale": 50.0, "H": 20},
    "reset": {"H": 40, "B": 9, "reset": True, "directions": 2},
    "h_mask": {"H": 128, "B": 9, "h_mask": True, "directions": 2},
    "ragged": {"H": 64, "T": 6, "B": 9, "lengths": [2, 6, 3, 1, 1, 5, 4, 6, 1], "directions": 2},
    "all at once": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "directions": 2},
    "all at once H128": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "H": 128},
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cell", CUDA_CELLS)
def test_cta_against_float64(cell, size, dtype):
    options = dict(SIZES[size])
    if size == "saturated" and DTYPES[dtype].itemsize == 2 and CELLS[cell].unit_parameters:
        options["scale"] = 10.0  # as above
    if size == "T1 B1 H1" and DTYPES[dtype].itemsize == 2:
        options |= {"H": 31, "I": 9}  # of one number that cancels in 16 bits nothing is left
    check(draw(cell, dtype=DTYPES[dtype], **options), f"{cell} {size}", "cuda")


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("cell", CUDA_CELLS)
def test_cta_each_cell_in_short(cell, dtype):
    """Ragged, in both directions, with resets; in 16 bits some weights stand in shared memory."""
    H = 32 if dtype == "float32" else 120
    case = draw(cell, T=5, B=10, H=H, I=8, lengths=[2, 0, 5, 1, 3] * 2, reset=True, directions=2)
    assert reason_against(cell, dtype, H) is None
    check(case.to(DTYPES[dtype]), f"{cell} in short", "cuda")


def reason_against(cell, mode, H, training=True):
    """Why cuda does not run a layer."""
    module = load("cuda")
    assert not isinstance(module, str), module
    dtype = DTYPES.get(mode, torch.float32)
    sizes = 5, 9, 16, H, H
    task = Problem(cell, dtype, "cuda", *sizes, training=training, tf32=mode == "tf32")
    return choice.declines(module, task)


def reason_against_teams(cell, mode, H, regime):
    """Why no team of a regime does."""
    dtype = DTYPES.get(mode, torch.float32)
    task = Problem(cell, dtype, "cuda", 5, 9, 16, H, H, training=True, tf32=mode == "tf32")
    return not_by_teams(task, regime)


#: By teams: the sizes around a CTA's slice and a cluster's, a tile's sequences, and one step.
TEAM_SIZES = {
    "cluster": {
        "H33 B1": {"H": 33, "B": 1, "T": 7},
        "H129 B1": {"H": 129, "B": 1, "T": 40},
        "H256 B16": {"H": 256, "B": 16, "directions": 2},
        "H300 B33": {"H": 300, "B": 33, "directions": 2, "layers": 2},
        "H512 B200": {"H": 512, "B": 200, "T": 3},
        "H200 B1100": {"H": 200, "B": 1100, "T": 3},
    },
    "grid": {
        "H129 B9": {"H": 129, "B": 9, "T": 7},
        "H256 B33": {"H": 256, "B": 33, "directions": 2, "T": 20},
        "H512 B200": {"H": 512, "B": 200, "T": 3, "directions": 2},
        "H768 B1": {"H": 768, "B": 1},
        "H777 B16": {"H": 777, "B": 16, "T": 3, "directions": 2},
        "H1024 B16": {"H": 1024, "B": 16, "T": 3},
        "H768 B64": {"H": 768, "B": 64, "T": 7},
        "H1000 B90": {"H": 1000, "B": 90, "T": 3, "directions": 2},
        "H2048 B33": {"H": 2048, "B": 33, "T": 3},
        "H300 B1100": {"H": 300, "B": 1100, "T": 3},
    },
}
#: In both regimes; their H is the one of OF_TEAMS.
TEAM_SPECIAL = {
    "one step": {"T": 1, "B": 20},
    "no state": {"B": 3, "bias": False, "state": False},
    "saturated": {"scale": 50.0},
    "reset": {"B": 9, "reset": True, "directions": 2},
    "h_mask": {"B": 9, "h_mask": True, "directions": 2},
    "ragged": {"T": 6, "B": 9, "lengths": [2, 6, 3, 1, 1, 5, 4, 6, 1], "directions": 2},
    "all at once": {"lengths": [2, 0, 5], "reset": True, "h_mask": True, "directions": 2},
    "all at once B33": {
        "B": 33,
        "lengths": [2, 0, 5] * 11,
        "reset": True,
        "h_mask": True,
    },
}
TEAM_CASES = [
    pytest.param(f"team-{regime}", special | options, id=f"team-{regime}-{name}")
    for regime, special in (("cluster", {"H": 300}), ("grid", {"H": 600}))
    for name, options in (TEAM_SIZES[regime] | TEAM_SPECIAL).items()
]


@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("form, options", TEAM_CASES)
@pytest.mark.parametrize("cell", PRODUCT_CELLS)
def test_against_float64_by_a(cell, form, options, mode):
    dtype = DTYPES.get(mode, torch.float32)
    with precision("tf32" if mode == "tf32" else "ieee"), as_form(form):
        check(draw(cell, dtype=dtype, **options), f"{cell} {form} {options}", "cuda")


@pytest.mark.core
@pytest.mark.parametrize("mode", ["bfloat16", "float16", "tf32"])
@each_team
@pytest.mark.parametrize("cell", PRODUCT_CELLS)
def test_each_cell_in_short_by_a(cell, form, H, mode):
    """Ragged, in both directions, with resets."""
    lengths = [2, 0, 5, 1, 3] * 2
    case = draw(cell, T=5, B=10, H=H, I=8, lengths=lengths, reset=True, directions=2)
    with precision("tf32" if mode == "tf32" else "ieee"), as_form(form):
        check(case.to(DTYPES.get(mode, torch.float32)), f"{cell} in short", "cuda")


@pytest.mark.core
@pytest.mark.parametrize("mode", ["bfloat16", "float16"])
@pytest.mark.parametrize("cell", WAVE_CELLS)
def test_large_batches_by_a_team_grid_of_wide_slices(cell, mode, monkeypatch):
    """Half of the weights in shared memory, two tiles of columns at once, and one more."""
    from fastseq.backends import cuda

    skip_without_teams("team-grid")
    names = []
    launch = cuda.launch

    def record(name, *rest):
        names.append(name)
        launch(name, *rest)

    def wide(way, cell, type, regime, H):
        return [TEAMS[f"{way}_{cell}_{type}_wide"]]

    monkeypatch.setattr(cuda, "launch", record)
    monkeypatch.setattr(cuda_teams, "kernels_of", wide)
    for H, B in ((1000, 37), (768, 90)):
        case = draw(cell, dtype=DTYPES[mode], T=5, B=B, H=H, lengths=([5, 0, 3, 1] * B)[:B])
        with as_form("team-grid"):
            check(case, f"{cell} H={H} B={B}", "cuda")
    assert {f"{way}_{cell}_{mode}_wide" for way in ("forward", "backward")} <= set(names)


@pytest.mark.core
def test_a_team_takes_what_it_was_built_for():
    """On devices with an H100's multiprocessors and shared memory."""
    device = of_cuda().device_at_hand()
    if device.multiprocessors < 128 or device.shared_memory < 227 << 10:
        pytest.skip("a smaller device than an H100")
    assert device.cooperative and not device.mps
    for cell in PRODUCT_CELLS:
        for mode, most in (("bfloat16", 2048), ("float16", 2048), ("tf32", 1024)):
            for H in (17, 256, 768, most - 1, most):
                assert reason_against_teams(cell, mode, H, "grid") is None, (cell, mode, H)
            if device.capability >= (9, 0):
                # a fourth gate and three peepholes in 32 bits take more room backward
                most = 384 if (cell, mode) == ("peephole_lstm", "tf32") else 512
                for H in (17, 129, 256, most - 1, most):
                    assert reason_against_teams(cell, mode, H, "cluster") is None, (cell, mode, H)
    for mode in ("bfloat16", "float16"):
        for H in (129, 256, 512, 768, 1024, 2048):
            assert reason_against("lstm", mode, H) is None


@pytest.mark.core
def test_a_teams_device_says_what_it_can():
    """Its clusters of each size at once, as the driver counts them."""
    cuda = of_cuda()
    found = cuda._cuda.limits(torch.cuda.current_device())
    assert set(found) == {"mps", "cooperative"} and set(found.values()) <= {0, 1}
    device = cuda.device_at_hand()
    if device.capability >= (9, 0) and device.clusters:
        assert len(device.clusters) == 17 and all(device.clusters[1:9])
        for size, count in enumerate(device.clusters):
            assert size * count <= device.multiprocessors


@pytest.mark.core
def test_cta_is_available_and_takes_what_it_was_built_for():
    """On devices with the shared memory of an A100 or more, and a GRU's largest with an H100's."""
    assert fastseq.backends()["cuda"] == "available"
    room = torch.cuda.get_device_properties(0).shared_memory_per_block_optin // 1024
    if room < 163:
        pytest.skip("a device with less shared memory than an A100")
    largest = {"bfloat16": 128, "float16": 128, "tf32": 64, "ieee": 64}
    wider = dict.fromkeys(("rnn_tanh", "rnn_relu", "rnn_sigmoid"), 128)
    wider["gru"] = 128 if room >= 227 else 64
    for cell in CUDA_CELLS:
        for mode, H in largest.items():
            most = max(H, wider.get(cell, 0)) if mode == "tf32" else H
            for size in {1, 17, 32, 63, 64, most - 1, most}:
                assert reason_against(cell, mode, size) is None, (cell, mode, size)
    for mode in ("bfloat16", "float16"):
        assert reason_against("rnn_tanh", mode, 256) is None
    for cell in POINTWISE_CELLS:
        assert reason_against(cell, "bfloat16", 5000) is None


@pytest.mark.core
@pytest.mark.parametrize("part", range(4))
def test_cta_no_kernel_spills(part):
    """As the device's driver has loaded them: registers, local memory, threads, and for what."""
    from fastseq.backends.cuda import _cuda

    torch.zeros(1, device="cuda")
    major = torch.cuda.get_device_capability()[0]
    assert set(KERNELS) <= set(_cuda.kernels())
    wrong = {}
    for name in sorted(set(_cuda.kernels()) - set(TEAMS))[part::4]:
        found = _cuda.attributes(name, 0)
        kernel = KERNELS.get(name)
        most, threads = (255, 256) if kernel is None else (kernel.registers, kernel.threads)
        fits = found["registers"] <= most and found["threads"] >= threads
        if found["local"] or not fits or found["binary"] // 10 > major:
            wrong[name] = found
    assert not wrong


@pytest.mark.core
@pytest.mark.parametrize("part", range(4))
def test_no_kernel_of_a_team_spills(part):
    from fastseq.backends.cuda import _cuda

    torch.zeros(1, device="cuda")
    major = torch.cuda.get_device_capability()[0]
    assert set(TEAMS) <= set(_cuda.kernels())
    wrong = {}
    for name, kernel in sorted(TEAMS.items())[part::4]:
        if kernel.regime != "grid" and major < 9:
            continue
        found = _cuda.attributes(name, 0)
        fits = found["registers"] <= kernel.registers and found["threads"] >= kernel.threads
        if found["local"] or not fits or found["binary"] // 10 > major:
            wrong[name] = found
    assert not wrong


@pytest.mark.core
def test_cta_a_launch_that_fails_names_its_kernel():
    """A CTA gets no 8 MB of shared memory; and the next launch runs."""
    from fastseq.backends import cuda

    name = "forward_lstm_bfloat16_64"
    x = torch.randn(3, 2, 8, device="cuda", dtype=torch.bfloat16)
    module = fastseq.LSTM(8, 64, device="cuda", dtype=torch.bfloat16, backend="cuda")
    with torch.no_grad():
        before = module(x)[0]
        queue = 0, torch.cuda.current_stream().cuda_stream
        arguments = struct.pack(f"<{len(cuda.FIELDS)}q", *[0] * len(cuda.FIELDS))
        sizes = (1, 1, 1), KERNELS[name].threads, 1 << 23
        plan = rf"on device 0, grid \(1, 1, 1\), {sizes[1]} threads, 8388608 bytes of shared memory"
        with pytest.raises(RuntimeError, match=f"{name} {plan}"):
            cuda._cuda.launch(name, *queue, *sizes, arguments, 1, False)
        torch.cuda.synchronize()
        assert same_bits(before, module(x)[0])


@pytest.mark.parametrize("training", [False, True])
def test_cta_is_one_launch_of_both_directions(training, monkeypatch):
    from fastseq.backends import cuda

    launches = []
    launch = cuda.launch

    def record(name, device, grid, *rest):
        launches.append((name, grid))
        launch(name, device, grid, *rest)

    monkeypatch.setattr(cuda, "launch", record)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(8, 64, bidirectional=True, backend="cuda", **options)
    with torch.set_grad_enabled(training):
        y = module(torch.randn(6, 9, 8, **options))[0]
    expected = [("forward_lstm_bfloat16_64", (3, 2, 1))]  # four sequences to a CTA, of nine
    if training:
        y.sum().backward()
        expected.append(("backward_lstm_bfloat16_64", (3, 2, 1)))
    assert launches == expected


@each_team
@pytest.mark.parametrize("training", [False, True])
def test_both_directions_are_one_launch_of_a(form, H, training, monkeypatch):
    """Their teams stand beside each other, each of all CTAs of a recurrence."""
    from fastseq.backends import cuda

    launches = []
    launch = cuda.launch

    def record(name, device, grid, *rest):
        launches.append((name, grid, *rest[-2:]))
        launch(name, device, grid, *rest)

    skip_without_teams(form)
    monkeypatch.setattr(cuda, "launch", record)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(8, H, bidirectional=True, backend="cuda", **options)
    regime = REGIMES[form]
    expected = []
    with as_form(form), torch.set_grad_enabled(training):
        y = module(torch.randn(6, 9, 8, **options))[0]
        if training:
            y.sum().backward()
    for way in ("forward", "backward") if training else ("forward",):
        device = cuda.device_at_hand()
        teams = cuda_teams.arranged(way, "lstm", "bfloat16", regime, H, 9, 2, device)
        assert len(teams.launches) == 1, "the device holds them all"
        grid = teams.team * teams.tiles, 2, 1
        expected.append((teams.kernel.name, grid, teams.cluster, regime == "grid"))
    assert launches == expected


@each_team
def test_a_stack_has_the_bits_of_its_layers_by_a(form, H, monkeypatch):
    skip_without_teams(form)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.GRU(8, H, 3, bidirectional=True, backend="cuda", **options)
    x = torch.randn(6, 9, 8, requires_grad=True, **options)

    def found():
        y, h = module(x)
        return [y, h, *torch.autograd.grad((y.sum() + h.sum()), [x, *module.parameters()])]

    with as_form(form):
        stack = found()
        assert "StackFunction" in stack[0].grad_fn.name()
        monkeypatch.setattr(whole, "run", lambda *call, **given: None)
        assert all(map(same_bits, stack, found()))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_cta_a_stack_has_the_bits_of_its_layers(backend, monkeypatch):
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.GRU(8, 64, 3, bidirectional=True, backend=backend, **options)
    x = torch.randn(6, 9, 8, requires_grad=True, **options)

    def found():
        y, h = module(x)
        return [y, h, *torch.autograd.grad((y.sum() + h.sum()), [x, *module.parameters()])]

    stack = found()
    assert "StackFunction" in stack[0].grad_fn.name()
    monkeypatch.setattr(whole, "run", lambda *call, **given: None)
    layers = found()
    assert "StackFunction" not in layers[0].grad_fn.name()
    assert all(map(same_bits, stack, layers))
    before = torch.get_rng_state()
    module.dropout = 0.5
    assert not same_bits(found()[0], stack[0]) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("form, H", OF_TRITON)
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("cell", CUDA_CELLS)
def test_cta_memory_and_trajectory(cell, memory, dtype):
    case = draw(cell, H=40, dtype=DTYPES[dtype], lengths=[3, 0, 5], directions=2, reset=True)
    trajectory = bool(CELLS[cell].other_states)
    check(case, memory, "cuda", memory=memory, trajectory=trajectory)


@pytest.mark.parametrize("memory", ["full", "lean"])
@each_team
@pytest.mark.parametrize("cell", PRODUCT_CELLS)
def test_memory_and_trajectory_by_a(cell, form, H, memory):
    case = draw(cell, H=H, dtype=torch.bfloat16, lengths=[3, 0, 5], directions=2, reset=True)
    trajectory = bool(CELLS[cell].other_states)
    with as_form(form):
        check(case, memory, "cuda", memory=memory, trajectory=trajectory)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("H, P", [(20, 3), (64, 64), (300, 100)])
def test_projection(H, P, dtype):
    check(draw("lstm", H=H, P=P, directions=2, dtype=DTYPES[dtype]), f"H={H} P={P}")


SHAPES = [(64, 16, 40, 64), (33, 5, 20, 100), (20, 64, 128, 128), (16, 48, 100, 300)]


@pytest.mark.parametrize("mode", ["tf32", "ieee", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_against_cudnn(kind, shape, mode):
    beside_cudnn(kind, shape, mode, "triton")


OF_A_CTA = [(64, 16, 40, 64), (33, 5, 20, 100), (20, 64, 128, 128), (9, 1, 7, 17), (1, 9, 16, 63)]
OF_A_CTA += [(12, 300, 64, 64), (7, 9, 64, 192), (7, 9, 64, 256), (300, 8, 32, 48)]


@pytest.mark.parametrize("mode", ["tf32", "ieee", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", OF_A_CTA, ids=str)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_cta_against_cudnn(kind, shape, mode):
    cell = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    if reason := reason_against(cell, mode, shape[3]):
        pytest.skip(reason)
    beside_cudnn(kind, shape, mode, "cuda")


#: T, B, I, H, layers and directions of each form.
OF_A_TEAM = [("team-cluster", *shape) for shape in ((9, 16, 40, 129, 2, 2), (40, 1, 64, 256, 1, 1))]
OF_A_TEAM += [("team-cluster", 5, 200, 32, 300, 1, 2), ("team-cluster", 9, 33, 64, 512, 2, 1)]
OF_A_TEAM += [("team-grid", *shape) for shape in ((9, 33, 64, 256, 2, 2), (40, 1, 64, 768, 1, 1))]
OF_A_TEAM += [("team-grid", 5, 16, 64, 1024, 1, 2), ("team-grid", 3, 200, 64, 600, 2, 1)]
OF_A_TEAM += [("team-grid", 5, 33, 64, 2048, 1, 1)]


@pytest.mark.parametrize("mode", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", OF_A_TEAM, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_beside_cudnn_by_a(kind, shape, mode):
    form, T, B, I, H, count, directions = shape  # noqa: E741
    cell = {"RNN": "rnn_tanh"}.get(kind, kind.lower())
    if reason := reason_against_teams(cell, mode, H, REGIMES[form]):
        pytest.skip(reason)
    with as_form(form):
        beside_cudnn(kind, (T, B, I, H), mode, "cuda", count, directions == 2)


def beside_cudnn(kind, shape, mode, backend, count=2, both=True):
    """No further from float64 than twice cuDNN, in the same precision on both sides; in TF32 than
    twice the rounding of all operands, where cuDNN does not round."""
    T, B, I, H = shape  # noqa: E741
    layer = layers(kind, (I, H, count), mode, backend, bidirectional=both)
    x = torch.randn(T, B, I, generator=_random()).to(layer.ours.weight_hh_l0.dtype)
    with precision(mode if mode in ("tf32", "ieee") else "ieee"):
        mine, cudnn = values(layer.ours, x.cuda()), values(layer.theirs, x.cuda())
    exact = values(layer.truth, x.double())
    theirs = measure(layer, cudnn, exact, x, mode)
    check_all(mine, theirs, exact, x.dtype, f"{kind} {shape} {mode}")


def flat(case, backend):
    """Outputs and gradients, in one list."""
    if backend == "cuda":
        skip_if_declined(problem(case.stack(backend)))
    outputs = case.run(backend)
    return [*outputs.values(), *gradients_of(outputs, case.leaves()).values()]


@each_form
@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "indrnn"])
def test_a_hundred_runs_give_the_same_bits(cell, form, H):
    lengths = [1 + b % 20 for b in range(37)]
    case = draw(cell, T=20, B=37, H=H, directions=2, lengths=lengths, dtype=torch.bfloat16)
    case, backend = on_gpu(case), backend_of(form)
    with as_form(form):
        first = flat(case, backend)
        for _ in range(100):
            assert all(same_bits(a, b) for a, b in zip(first, flat(case, backend), strict=True))


@each_form
def test_streams_do_not_disturb_each_other(form, H):
    """Grids too: each waits for its own programs, and none for another's."""
    cases = [
        on_gpu(draw("lstm", T=40, B=20, H=H, dtype=torch.bfloat16, seed=seed)) for seed in range(4)
    ]
    streams = [torch.cuda.Stream() for _ in cases]
    with as_form(form):
        alone = [flat(case, backend_of(form)) for case in cases]
        torch.cuda.synchronize()
        for _ in range(5):
            together = []
            for stream, case in zip(streams, cases, strict=True):
                with torch.cuda.stream(stream):
                    together.append(flat(case, backend_of(form)))
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
        alone = flat(case, backend_of(form))
        torch.cuda.synchronize()
        for _ in range(5):
            with torch.cuda.stream(side):
                for _ in range(40):
                    a @ a
            busy = flat(case, backend_of(form))
            torch.cuda.synchronize()
            assert all(same_bits(x, y) for x, y in zip(alone, busy, strict=True))


@pytest.mark.core
def test_teams_that_fill_the_gpu_wait_for_each_other():
    """Grids of nearly all multiprocessors on several streams, and products that hold some: none may
    be on the GPU in part."""
    if torch.cuda.get_device_name().startswith("Fake"):
        pytest.skip("in a rehearsal nobody waits")
    skip_without_teams("team-grid")
    cases = [
        on_gpu(draw("lstm", T=30, B=4, H=H, dtype=torch.bfloat16, seed=H))
        for H in (2048, 1500, 900)
    ]
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    streams = [torch.cuda.Stream() for _ in cases]
    side = torch.cuda.Stream()
    with as_form("team-grid"):
        alone = [flat(case, "cuda") for case in cases]
        torch.cuda.synchronize()
        for _ in range(3):
            with torch.cuda.stream(side):
                for _ in range(100):
                    a @ a
            together = []
            for stream, case in zip(streams, cases, strict=True):
                with torch.cuda.stream(stream):
                    together.append(flat(case, "cuda"))
            torch.cuda.synchronize()
            fastseq.check()
            for one, other in zip(alone, together, strict=True):
                assert all(map(same_bits, one, other))


@pytest.mark.parametrize("training", [False, True])
@each_form
def test_a_cuda_graph_records_it(form, H, training):
    skip_without_teams(form)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.GRU(32, H, 2, bidirectional=True, backend=backend_of(form), **options)
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


@pytest.fixture
def in_vain():
    """What makes the programs of a grid give up at once; nobody is told of it later."""
    if torch.cuda.get_device_name().startswith("Fake"):
        pytest.skip("in a rehearsal nobody waits")

    @contextmanager
    def at_once():
        cuda = load("cuda")
        with load("triton").patience(0):
            if isinstance(cuda, str):
                yield
            else:
                with cuda.patience(0):
                    yield

    yield at_once
    with suppress(RuntimeError):
        fastseq.check()


def told_once(kernel, tell):
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match=f"kernel {kernel}, launched on cuda:0 .* in vain"):
        tell()
    fastseq.check()


@pytest.mark.core
@pytest.mark.parametrize("H", [200, 256])
def test_a_grid_that_waited_in_vain_is_told(H, in_vain):
    """By the next call, backward and check(); then all is as before."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(32, H, backend="triton", **options)
    x = torch.randn(12, 5, 32, **options)

    def gradient(y):
        return torch.autograd.grad(y.sum(), module.weight_hh_l0)[0]

    with as_form("grid"):
        y = module(x)[0]
        right = [y.detach().clone(), gradient(y)]
        fastseq.check()
        for tell in (lambda y: module(x), gradient, lambda y: fastseq.check()):
            with in_vain():
                y = module(x)[0]
            told_once("lstm_forward_grid", lambda tell=tell, y=y: tell(y))
            assert y.isnan().any()
        y = module(x)[0]
        with in_vain():
            assert gradient(y).isnan().any()
        told_once("lstm_backward_grid", lambda: module(x))
        y = module(x)[0]
        assert same_bits(y, right[0]) and same_bits(gradient(y), right[1])
        fastseq.check()


@pytest.mark.core
@each_team
def test_waiting_in_vain_is_told_by_a(form, H, in_vain):
    """As of triton's grids; NaN reaches the end of every sequence."""
    skip_without_teams(form)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(32, H, backend="cuda", **options)
    x = torch.randn(12, 5, 32, **options)
    kernel = f"{{}}_lstm_bfloat16_{REGIMES[form]}".format

    def gradient(y):
        return torch.autograd.grad(y.sum(), module.weight_hh_l0)[0]

    with as_form(form):
        y = module(x)[0]
        right = [y.detach().clone(), gradient(y)]
        fastseq.check()
        for tell in (lambda y: module(x), gradient, lambda y: fastseq.check()):
            with in_vain():
                y = module(x)[0]
            told_once(kernel("forward"), lambda tell=tell, y=y: tell(y))
            assert y[-1].isnan().any(1).all()
        y = module(x)[0]
        with in_vain():
            assert gradient(y).isnan().any()
        told_once(kernel("backward"), lambda: module(x))
        y = module(x)[0]
        assert same_bits(y, right[0]) and same_bits(gradient(y), right[1])
        fastseq.check()


@pytest.mark.core
@pytest.mark.parametrize(
    "form, H, kernel",
    [
        ("grid", 256, "lstm_forward_grid"),
        ("team-cluster", 300, "forward_lstm_bfloat16_cluster"),
        ("team-grid", 600, "forward_lstm_bfloat16_grid"),
    ],
)
def test_of_a_graph_that_waits_in_vain_check_tells(form, H, kernel, in_vain):
    skip_without_teams(form)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(32, H, backend=backend_of(form), **options)
    x = torch.randn(12, 5, 32, **options)
    graph = torch.cuda.CUDAGraph()
    with as_form(form), torch.no_grad():
        module(x)
        torch.cuda.synchronize()
        with in_vain(), torch.cuda.graph(graph):
            y = module(x)[0]
        fastseq.check()  # recorded, not run
        for _ in range(2):
            graph.replay()
            told_once(kernel, fastseq.check)
            assert y.isnan().any()
        assert not module(x)[0].isnan().any()


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
        one, other = (
            flat(on_gpu(case, device), backend_of(form)) for device in ("cuda:0", "cuda:1")
        )
    assert all(same_bits(a.cpu(), b.cpu()) for a, b in zip(one, other, strict=True))
    assert all(t.device == torch.device("cuda:1") for t in other)


@each_form
def test_memory_at_the_end_is_memory_at_the_start(form, H):
    case = on_gpu(draw("lstm", T=10, B=9, H=H, directions=2, dtype=torch.bfloat16))
    with as_form(form):
        flat(case, backend_of(form))
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(10):
            flat(case, backend_of(form))
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    "form, H", [("walk", 16), ("cta", 16), ("team-cluster", 48), ("team-grid", 48)]
)
def test_more_steps_than_cudnn_takes(form, H):
    """70,000, in one call and in two with the state carried."""
    skip_without_teams(form)
    # of float32 a team makes no products but in TF32
    given = {"device": "cuda", "dtype": torch.bfloat16 if "team" in form else torch.float32}
    module = fastseq.GRU(8, H, backend=backend_of(form), **given)
    x = torch.randn(70_000, 2, 8, **given)
    with torch.no_grad(), as_form(form):
        whole, last = module(x)
        first, state = module(x[:30_000])
        second, final = module(x[30_000:], state)
    # the input product of another number of rows may be another kernel of cuBLAS
    check_alike(torch.cat([first, second]), whole)
    check_alike(final, last)


@pytest.mark.parametrize("form, H", OF_TRITON)
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
        check(case, "poisoned", backend_of(form))


# Zoneout, which triton alone has


@pytest.mark.core
@pytest.mark.parametrize("form, H", OF_TRITON)
@pytest.mark.parametrize(
    "cell, special",
    [("lstm", "zoneout at once"), ("gru_reset_before", "zoneout in evaluation")],
)
def test_zoneout_in_short(cell, special, form, H):
    case = draw(cell, T=5, H=H, dtype=torch.bfloat16, **ZONED[special])
    with as_form(form):
        check(case, f"{cell} {special}", trajectory=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form, H", OF_TRITON)
@pytest.mark.parametrize("special", ZONED)
@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_against_float64(cell, special, form, H, dtype):
    case = draw(cell, T=5, H=H, dtype=DTYPES[dtype], **ZONED[special])
    with as_form(form):
        check(case, f"{cell} {special}")


@pytest.mark.parametrize("special", ["zoneout at once", "zoneout in evaluation"])
@pytest.mark.parametrize("cell", CELLS)
def test_zoneout_in_lean_memory(cell, special):
    check(draw(cell, H=20, dtype=torch.float32, **ZONED[special]), special, memory="lean")


@pytest.mark.parametrize("H, P", [(20, 3), (64, 64), (300, 100)])
@pytest.mark.parametrize("special", ["zoneout at once", "zoneout in evaluation"])
def test_zoneout_of_a_projected_h(special, H, P):
    check(draw("lstm", H=H, P=P, dtype=torch.bfloat16, **ZONED[special]), f"{special} {H} {P}")


@pytest.mark.parametrize("form, H", OF_TRITON)
def test_zoneout_gives_the_same_bits_again_and_in_a_stack(form, H, monkeypatch):
    given = {"device": "cuda", "dtype": torch.bfloat16}
    module = fastseq.LSTM(8, H, 2, zoneout=(0.3, 0.1), backend="triton", **given)
    x = torch.randn(6, 9, 8, requires_grad=True, **given)

    def found():
        y, (h, c), along = module(x, seed=3, all_states=True)
        outputs = [y, h, c, *along]
        loss = sum(o.sum() for o in outputs)
        return [*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])]

    with as_form(form):
        stack = found()
        assert "StackFunction" in stack[0].grad_fn.name()
        assert all(map(same_bits, stack, found()))
        monkeypatch.setattr(whole, "run", lambda *call, **given: None)
        assert all(map(same_bits, stack, found()))


# A user's own cell, and stacks


@pytest.fixture(scope="module")
def own():
    """Two phases, two states, a gate without a product, numbers, quotients and a unit parameter."""

    @fastseq.cell
    def OnDevice(a_f, x_n, x_z, c_prev, h_prev, u):
        f = sigmoid(a_f) / (2 + exp(-u))  # noqa: F821
        c = f * c_prev + (1 - f) * tanh(x_z)  # noqa: F821
        n = tanh(x_n + U_n(c) + maximum(x_z, 0.1))  # noqa: F821
        h = h_prev + f * (n - h_prev)
        return h, c

    yield OnDevice
    unregister(OnDevice.definition.name)


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form, H", OF_TRITON)
def test_a_users_cell(own, form, H, dtype):
    """Against the same equations in float64, as operations of torch on the CPU."""
    if torch.cuda.get_device_name().startswith("Fake"):
        pytest.skip("a rehearsal knows the library's cells")
    torch.manual_seed(0)
    same = own(16, H, backend="eager", dtype=DTYPES[dtype])
    given = {"lengths": torch.tensor([6, 1, 4, 0, 6]), "reset": torch.rand(6, 5) < 0.3}
    truth = copy.deepcopy(same).double()
    ours = own(16, H, backend="triton", dtype=DTYPES[dtype], device="cuda")
    ours.load_state_dict(same.state_dict())
    x = torch.randn(6, 5, 16, generator=_random()).to(DTYPES[dtype])

    def call(module, x):
        return module(x, **{name: value.to(x.device) for name, value in given.items()})

    with as_form(form):
        mine = values(ours, x.cuda(), call)
    exact = values(truth, x.double(), call)
    check_all(mine, values(same, x, call), exact, x.dtype, f"own cell {form}")


@pytest.mark.parametrize("connections", ["plain", "residual", "highway"])
def test_a_stack_of_kinds(connections):
    """By the kernels of the device, against float64 on the CPU."""
    torch.manual_seed(0)
    layers = [fastseq.LSTM(16, 64), fastseq.LSTM(64, 64), fastseq.GRU(64, 200)]
    reverse = [fastseq.GRU(16, 64), fastseq.RNN(64, 64), fastseq.RNN(64, 64)]
    same = fastseq.Stacked(layers, reverse=reverse, connections=connections).bfloat16()
    truth, ours = copy.deepcopy(same).double(), copy.deepcopy(same).cuda()
    lengths = torch.tensor([6, 1, 4, 0, 6])
    x = torch.randn(6, 5, 16, generator=_random()).bfloat16()
    found = []
    for module, given in ((ours, x.cuda()), (same, x), (truth, x.double())):
        y, *_ = module(given.requires_grad_(), lengths=lengths)
        parameters = dict(module.named_parameters())
        grads = torch.autograd.grad(y.sum(), [given, *parameters.values()])
        named = zip(("y", "dx", *parameters), (y, *grads), strict=True)
        found.append({name: value.detach().cpu() for name, value in named})
    check_all(*found, x.dtype, f"stack, {connections}")


def test_left_to_us_zoneout_runs_on_triton():
    module = fastseq.LSTM(8, 16, device="cuda", zoneout=0.1)
    assert fastseq.explain(module, torch.randn(3, 2, 8, device="cuda")) == "triton"


@pytest.mark.core
@pytest.mark.parametrize("there", [False, True], ids=["seed on the CPU", "seed on the device"])
def test_masks_have_the_bits_of_the_cpu_and_wait_for_nobody(there):
    if torch.cuda.get_device_name().startswith("Fake"):
        pytest.skip("a rehearsal launches nothing")
    sites, ids, steps = [3, 11, 19], torch.arange(1000) * 2**37 // 3, torch.arange(1000) * 7
    seed = torch.tensor(0x0123456789ABCDEF)
    key, *rows = (t.cuda() for t in (seed, ids, steps))

    def drawn(units, when):
        rows_too = rows[1] if when else None
        return load("triton").keep(key if there else seed, sites, rows[0], rows_too, units, 2**30)

    asked = [(130, True), (7, False), (256, True)]
    for each in asked:
        drawn(*each)  # compiled
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [drawn(*each) for each in asked]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mask, (units, when) in zip(found, asked, strict=True):
        expected = masks.by_operations(seed, sites, ids, steps if when else None, units, 2**30)
        assert torch.equal(mask.cpu(), expected)


def test_none_stays_with_torch():
    """Until a measurement says otherwise."""
    module = fastseq.LSTM(8, 16, device="cuda")
    assert fastseq.explain(module, torch.randn(3, 2, 8, device="cuda")) == "torch"
