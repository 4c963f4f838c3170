"""Graphs for a GPU that are traced where there is none, with fake tensors, and what is chosen for
them."""

import importlib.util
from contextlib import nullcontext

import pytest
import torch
from graphs import FromParts
from problems import PLAIN, full
from standins import cuda_for_fakes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from twins import LAYERS

import fastseq
from fastseq.backends import BACKENDS, DIFFERENTIABLE, choice, imported, load
from fastseq.ops import library

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
no_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

FORMS = ("dense", "packed", "lengths")
PLACES = (None, pytest.param("triton", marks=no_triton))


def on_cuda(module):
    """Its parameters, as fake ones on a GPU."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                there = torch.empty(value.shape, dtype=value.dtype, device="cuda")
                part._parameters[name] = nn.Parameter(there)
    return module


def given(form):
    """Arguments, keywords and dynamic shapes: every size of them but the features' is any."""
    T, B, N = (Dim(name, min=2) for name in "TBN")
    x = torch.empty(5, 3, 4, device="cuda")
    if form == "dense":
        return (x,), {}, {"input": {0: T, 1: B}}
    if form == "lengths":
        keywords = {"lengths": torch.empty(3, dtype=torch.int64)}
        return (x,), keywords, {"input": {0: T, 1: B}, "lengths": {0: B}}
    parts = (torch.empty(11, 4, device="cuda"), torch.empty(5, dtype=torch.int64))
    return parts, {}, {"parts": ({0: N}, {0: T})}


def exported(module, form, strict=False):
    """The operators of the program, which holds nothing else of a layer."""
    # indexing and copying a fake CUDA tensor, torch does in its builds for CUDA alone
    with cuda_for_fakes() if form == "lengths" else nullcontext():
        with FakeTensorMode():
            module = on_cuda(module.eval())
            module = FromParts(module) if form == "packed" else module
            arguments, keywords, dynamic = given(form)
        program = torch.export.export(
            module, arguments, keywords, dynamic_shapes=dynamic, strict=strict
        )
    y = next(n for n in program.graph.nodes if n.op == "output").args[0][0].meta["val"]
    assert y.device.type == "cuda"
    assert all(isinstance(size, torch.SymInt) for size in y.shape[:-1])
    return [n for n in program.graph.nodes if "recurrence" in str(n.target)]


@full
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize("kind", LAYERS)
def test_export(kind, backend, form, strict):
    """One operator a layer, for every T, B and length."""
    module = getattr(fastseq, kind)(4, 6, 2, bidirectional=True, backend=backend)
    nodes = exported(module, form, strict)
    assert [n.args[1] for n in nodes] == [backend or "torch"] * 2
    assert not any(n.args[-2] for n in nodes)  # inference: nothing is kept for a backward


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize("kind, form", list(zip(LAYERS, FORMS, strict=True)))
def test_export_in_part(kind, form, backend):
    test_export(kind, backend, form, False)


@no_triton
def test_export_of_what_torch_does_not_run():
    """Triton's kernels run it where they are named: by themselves not before their tests were green
    on a device of that kind."""

    class Cells(nn.Module):
        def __init__(self, backend):
            super().__init__()
            self.layer = fastseq.LSTM(4, 6, backend=backend)

        def forward(self, input):
            return self.layer(input, all_states=True)[2]

    assert [n.args[1] for n in exported(Cells("triton"), "dense")] == ["triton"]
    task = PLAIN._replace(device="cuda", mode="compile", trajectory=True)
    assert choice.preferred(task) == ("torch", "eager")


@no_triton
def test_a_problem_for_another_machine():
    """What this one has does not count; what a backend supports does."""
    for mode in ("compile", "eager"):
        there = PLAIN._replace(device="cuda", mode=mode)
        assert choice.select(there, "triton") == "triton"
        with pytest.raises(NotImplementedError, match="numba's kernels run on the CPU"):
            choice.select(there, "numba")
    with pytest.raises(NotImplementedError, match="forward-mode"):
        choice.select(there._replace(mode="dual"), "triton")
    if isinstance(load("triton"), str):  # the interpreter is not on
        with pytest.raises(RuntimeError, match="triton: not available: torch sees no CUDA"):
            choice.select(PLAIN, "triton")
        assert fastseq.backends()["triton"].startswith("not available")


def test_the_order_of_a_graph_for_a_gpu():
    task = PLAIN._replace(device="cuda", mode="compile", T=None, B=None, I=None, H=None, P=None)
    assert choice.preferred(task) == ("torch", "eager")
    assert choice.preferred(task._replace(mode="plain")) == ("torch", "eager")
    assert choice.judge(task, None).chosen == "torch"


@pytest.mark.skipif(not isinstance(load("triton"), str), reason="triton serves here")
def test_a_program_whose_backend_is_not_here_says_so():
    x, state = torch.randn(5, 3, 4), torch.zeros(1, 3, 6)
    weights = [torch.randn(18, 4), torch.randn(18, 6), None, None, None]
    arguments = (
        "gru",
        "triton",
        x,
        None,
        [state],
        weights,
        [False],
        None,
        None,
        [],
        [],
        "full",
        False,
    )
    with pytest.raises(RuntimeError, match="backend 'triton' is not available: "):
        torch.ops.fastseq.recurrence(*arguments, False, False)


def test_what_is_saved_is_known_of_every_backend():
    """Without one of them: from the declaration of a cell, its sizes and its type."""
    x, state = torch.empty(5, 3, 4, dtype=torch.bfloat16), torch.empty(2, 3, 6)
    weights = [torch.empty(24, 4), torch.empty(24, 6), None, None, None] * 2
    call = library.make_call(
        "lstm", x, None, [state, state], weights, [False, True], None, None, [], [], "full"
    )
    names = [n for n in BACKENDS if n != DIFFERENTIABLE and not isinstance(imported(n), str)]
    found = {name: library.saved_layout(name, call, (5, 3), False) for name in names}
    wide, narrow = torch.float32, torch.bfloat16
    gates = [((15, 24), wide)] * 2
    assert found["native"] == found["numba"] == [*gates, ((5, 3, 12), wide)]
    assert found["triton"] == [((5, 3, 48), narrow), ((5, 3, 12), wide)]
    assert found["torch"] == [((None,), torch.uint8)] * 2
    assert found["reference"] == []
    there = library.make_call(
        "lstm",
        x.to("meta"),
        None,
        [state, state],
        weights,
        [False, True],
        None,
        None,
        [],
        [],
        "full",
    )
    assert library.saved_layout("torch", there, (5, 3), False) == [((None,), torch.uint8)]
