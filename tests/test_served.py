"""A backend that a call names is the one that runs, forward and backward; and one that this machine
can have is there: what skips where it is not would pass unseen."""

import runpy
from pathlib import Path

import pytest
import setuptools
import torch
from torch.nn.utils.rnn import pack_sequence

import fastseq
from fastseq import reference
from fastseq.backends import imported, load

KINDS = ("RNN", "LSTM", "GRU")
BACKENDS = ("native", "numba", "reference", "eager", "torch")


class Heard:
    """A module whose functions are heard when they are called."""

    def __init__(self, module, hear):
        self._module, self._hear = module, hear

    def __getattr__(self, name):
        value = getattr(self._module, name)
        return self._hear(name, value) if callable(value) else value


class HeardKernel:
    def __init__(self, kernel, hear):
        self.run = hear(kernel.run)


@pytest.fixture
def launched(monkeypatch):
    """The launches made, as sets of words: at the last call that is still Python's."""
    heard = set()

    def spy(words, function):
        def launch(*args, **kwargs):
            heard.add(words)
            return function(*args, **kwargs)

        return launch

    def patch(module, name, words):
        monkeypatch.setattr(module, name, spy(words, getattr(module, name)))

    native = load("native")
    if not isinstance(native, str):
        kernels = Heard(native._cpu, lambda name, function: spy(f"native {name}", function))
        monkeypatch.setattr(native, "_cpu", kernels)
        for name in ("layers", "layers_backward"):  # which call the same two of the extension's
            patch(native, name, f"native {name}")
    numba = load("numba")
    if not isinstance(numba, str):
        for way in ("forward", "backward"):
            kernel_of = getattr(numba, f"{way}_kernel")

            def kernel(*which, kernel_of=kernel_of, way=way):
                return HeardKernel(kernel_of(*which), lambda run: spy(f"numba {way}", run))

            monkeypatch.setattr(numba, f"{way}_kernel", kernel)
    for way in ("forward", "backward"):
        patch(reference, way, f"reference {way}")
    patch(imported("eager"), "_recurrence", "eager forward")
    theirs = imported("torch")
    monkeypatch.setattr(
        theirs, "_VF", Heard(theirs._VF, lambda name, function: spy("torch forward", function))
    )
    steps = {name: spy("torch forward", function) for name, function in theirs._STEPS.items()}
    monkeypatch.setattr(theirs, "_STEPS", steps)
    patch(torch.ops.aten, "mkldnn_rnn_layer", "torch forward")
    return heard


def settle(backend):
    if isinstance(load(backend), str):
        pytest.skip(load(backend))


def expected(backend, whole):
    """whole: the call is one for native's kernels of whole stacks. Autograd of the last two is
    torch's."""
    if backend == "native" and whole:
        ways = ("layers", "layers_backward", "forward", "backward")
        return {f"native {way}" for way in ways}
    ways = ("forward",) if backend in ("eager", "torch") else ("forward", "backward")
    return {f"{backend} {way}" for way in ways}


def train(outputs):
    y = outputs[0] if isinstance(outputs, tuple) else outputs
    (y.data if hasattr(y, "batch_sizes") else y).sum().backward()


def layer(kind, backend, **options):
    return getattr(fastseq, kind)(4, 6, 2, bidirectional=True, backend=backend, **options)


LAYERS = {
    "dense": lambda m: m(torch.randn(3, 2, 4)),
    "packed": lambda m: m(pack_sequence([torch.randn(3, 4), torch.randn(2, 4)])),
    "one step": lambda m: m(torch.randn(1, 2, 4)),
    "lengths": lambda m: m(torch.randn(3, 2, 4), lengths=[3, 1]),
    "reset": lambda m: m(torch.randn(3, 2, 4), reset=torch.tensor([[False, True]] * 3)),
}


@pytest.mark.parametrize("way", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_runs_on_what_it_names(launched, backend, kind, way):
    settle(backend)
    if (backend, way) == ("torch", "reset"):
        pytest.skip("torch cannot reset a row")
    module = layer(kind, backend)
    train(LAYERS[way](module))
    assert launched == expected(backend, True)
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lean_memory_runs_on_what_is_named(launched, backend, kind):
    settle(backend)
    if backend == "torch":
        pytest.skip("torch keeps all gates")
    train(layer(kind, backend, memory="lean")(torch.randn(3, 2, 4)))
    assert launched == expected(backend, False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_without_gradients_runs_on_what_it_names(launched, backend, kind):
    settle(backend)
    with torch.no_grad():
        layer(kind, backend)(torch.randn(3, 2, 4))
    assert launched == {name for name in expected(backend, True) if "backward" not in name}


@pytest.mark.parametrize("shape", [(2, 4), (4,)], ids=["batch", "one sequence"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_cell_runs_on_what_it_names(launched, backend, kind, shape):
    settle(backend)
    cell = getattr(fastseq, f"{kind}Cell")(4, 6, backend=backend)
    train(cell(torch.randn(shape)))
    assert launched == expected(backend, True)


def test_native_serves_where_there_is_a_compiler(monkeypatch):
    """Refused, or not built, it would make its own tests skip and no other fail."""
    script = Path(__file__).parents[1] / "setup.py"
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    found = runpy.run_path(str(script))
    try:
        found["compiler"](), found["include_flags"]()
    except found["CannotBuild"] as why:
        pytest.skip(str(why))
    assert fastseq.backends()["native"] == "available"
