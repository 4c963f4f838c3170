"""What is said where a named backend does not run a call: the class and the whole sentence."""

import sys

import pytest
import torch
from twins import caught

import fastseq
from fastseq import backends
from fastseq.backends import BACKENDS, choice, imported, load
from fastseq.backends.contract import Problem

T, B, I, H = 5, 3, 4, 6  # noqa: E741  (the field's letter)
PLAIN = Problem("lstm", torch.float32, "cpu", T=T, B=B, I=I, H=H, P=H)
NAMED = ", ".join(BACKENDS)

KERNELS = {
    "complex": (
        {"dtype": torch.complex64},
        "{0}'s kernels take float16, bfloat16, float32 and float64, not torch.complex64",
    ),
    "integers": (
        {"dtype": torch.int32},
        "{0}'s kernels take float16, bfloat16, float32 and float64, not torch.int32",
    ),
    "dual": (
        {"mode": "dual"},
        "{0}'s kernels have no forward-mode derivative, and run no transform that is compiled; "
        "choose eager",
    ),
    "trace": ({"mode": "trace"}, "torch.jit.trace records no custom kernel"),
    "projected gru": (
        {"cell": "gru", "projected": True, "P": 2},
        "gru adds h_prev to gates of another size; it cannot be projected",
    ),
    "projected gru_reset_before": (
        {"cell": "gru_reset_before", "projected": True, "P": 2},
        "gru_reset_before adds h_prev to gates of another size; it cannot be projected",
    ),
    "projected indrnn": (
        {"cell": "indrnn", "projected": True, "P": 2},
        "indrnn adds h_prev to gates of another size; it cannot be projected",
    ),
    "projected lstm": ({"projected": True, "P": 2}, None),
    "projected rnn_tanh": ({"cell": "rnn_tanh", "projected": True, "P": 2}, None),
    "transform": ({"mode": "transform"}, None),
    "compile": ({"mode": "compile"}, None),
    "all its options": (
        {"reset": True, "h_mask": True, "trajectory": True, "memory": "lean", "training": True},
        None,
    ),
}
ON_CPU = {"cuda": ({"device": "cuda"}, "{0}'s kernels run on the CPU, not on cuda")}

#: backend -> what differs from PLAIN, and the reason, with the backend's name for {0}
REASONS = {
    "native": KERNELS | ON_CPU,
    "numba": KERNELS | ON_CPU,
    "triton": {name: (change | {"device": "cuda"}, why) for name, (change, why) in KERNELS.items()}
    | {
        "mps": (
            {"device": "mps"},
            "triton's kernels run on CUDA and ROCm devices, not on mps",
        )
    },
    "cuda": {
        "cpu": ({}, "cuda's kernels run on NVIDIA GPUs, not on cpu"),
        "plain": ({"device": "cuda"}, None),
        "float64": (
            {"device": "cuda", "dtype": torch.float64},
            "cuda's kernels take bfloat16, float16, float32, not float64; choose triton, whose "
            "kernels take float64 too",
        ),
        "projected lstm": (
            {"device": "cuda", "projected": True, "P": 2},
            "cuda's kernels project no h (proj_size=2); choose triton",
        ),
        "two phases": (
            {"device": "cuda", "cell": "gru_reset_before"},
            "gru_reset_before has 2 phases, and cuda's kernels run cells of one; choose triton",
        ),
        "trace": ({"device": "cuda", "mode": "trace"}, KERNELS["trace"][1]),
        "dual": ({"device": "cuda", "mode": "dual"}, KERNELS["dual"][1]),
        "compile": ({"device": "cuda", "mode": "compile"}, None),
        "all its options": (KERNELS["all its options"][0] | {"device": "cuda"}, None),
    },
    "torch": {
        "plain": ({}, None),
        "unknown cell": (
            {"cell": "indrnn"},
            "torch has no indrnn; its cells are lstm, gru, rnn_tanh, rnn_relu",
        ),
        "projected gru": (
            {"cell": "gru", "projected": True, "P": 2},
            "torch projects the hidden state of an LSTM only",
        ),
        "projected to H": (
            {"projected": True, "P": H},
            "torch projects to fewer features only",
        ),
        "no steps": ({"T": 0}, "torch takes no sequence of length 0"),
        "ensemble": ({"R": 3}, "torch runs one or two directions, not an ensemble"),
        "reset": (
            {"reset": True},
            "torch cannot reset single rows in mid-sequence (reset=)",
        ),
        "h_mask": (
            {"h_mask": True},
            "torch cannot mask the recurrent operand (h_mask, recurrent_dropout)",
        ),
        "trajectory": (
            {"trajectory": True},
            "torch gives no cell state but the last (all_states=True)",
        ),
        "lean": (
            {"memory": "lean", "training": True},
            "torch keeps all gates for backward, so memory='lean' cannot be had of it",
        ),
        "lean inference": ({"memory": "lean"}, None),
        "transform": (
            {"mode": "transform"},
            "torch's kernels have no rules for torch.func",
        ),
        "dual": (
            {"mode": "dual"},
            "torch's kernels have no forward-mode derivative",
        ),
        "compile": (
            {"mode": "compile"},
            "torch's recurrent layers break a compiled graph",
        ),
        "compile on cuda": ({"mode": "compile", "device": "cuda"}, None),
        "trace": ({"mode": "trace"}, None),
    },
    "reference": {
        "plain": ({}, None),
        "cuda": (
            {"device": "cuda"},
            "reference runs on the CPU, not on cuda; move the tensors there",
        ),
        "integers": ({"dtype": torch.int64}, "reference computes real numbers, not torch.int64"),
        "complex": (
            {"dtype": torch.complex64},
            "reference computes real numbers, not torch.complex64",
        ),
        "transform": (
            {"mode": "transform"},
            "reference runs in NumPy, which torch.func cannot see through; choose eager",
        ),
        "dual": ({"mode": "dual"}, "reference has no forward-mode derivative; choose eager"),
    },
    "eager": {
        mode: ({"mode": mode, "device": "mps", "dtype": torch.complex64, "reset": True}, None)
        for mode in ("eager", "compile", "trace", "transform", "dual")
    },
}


@pytest.mark.parametrize("name", REASONS)
def test_reasons(name):
    """Of the contract's ``supports``, whose word ends in the message below."""
    module = imported(name)
    if isinstance(module, str):
        pytest.skip(module)
    for case, (changes, reason) in REASONS[name].items():
        expected = None if reason is None else reason.format(name)
        assert module.supports(PLAIN._replace(**changes)) == expected, case


def test_triton_on_the_cpu():
    module = imported("triton")
    if isinstance(module, str) or module.INTERPRETED:
        pytest.skip("triton is not here, or interpreted")
    assert module.supports(PLAIN) == (
        "triton's kernels run on a GPU, not on cpu; TRITON_INTERPRET=1 in the environment runs "
        "them there in NumPy, for tests alone"
    )


# --- what a caller sees


def cannot(backend, *reasons, named=True):
    always = " backend=None always runs." if named else ""
    return f"backend={backend!r} cannot run this: {'; '.join(reasons)}.{always}"


def lstm(backend, training=True, **options):
    return fastseq.LSTM(I, H, backend=backend, **options).requires_grad_(training)


def an_input(dtype=torch.float32):
    return torch.ones(T, B, I, dtype=dtype)


ZONEOUT = "its loop hands the states on by itself, and zoneout blends them"
DETERMINISTIC = (
    "its bits may depend on the batch or the threads; deterministic=True takes native alone"
)
COMPLEX = "native's kernels take float16, bfloat16, float32 and float64, not torch.complex64"
LEAN = "torch keeps all gates for backward, so memory='lean' cannot be had of it"
RESET = torch.zeros(T, B, dtype=torch.bool)


def functional(backend, dtype=torch.float32, **options):
    weights = [torch.zeros(4 * H, n, dtype=dtype) for n in (I, H)]
    return fastseq.lstm(an_input(dtype), weights, backend=backend, **options)


def jvp(backend):
    m, x = lstm(backend), an_input()
    return torch.func.jvp(lambda x: m(x)[0], (x,), (x,))


def vmap(m, x):
    return torch.func.vmap(m)(x[None])


CALLS = {
    "dtype": (
        lambda: functional("native", torch.complex64),
        cannot(
            "native",
            f"native: {COMPLEX}",
        ),
    ),
    "tangents": (
        lambda: jvp("native"),
        cannot(
            "native",
            "native: native's kernels have no forward-mode derivative, and run no transform that "
            "is compiled; choose eager",
        ),
    ),
    "trace": (
        lambda: torch.jit.trace(lstm("native"), (an_input(),)),
        cannot("native", "native: torch.jit.trace records no custom kernel"),
    ),
    "transform": (
        lambda: vmap(lstm("torch"), an_input()),
        cannot(
            "torch",
            "torch: torch's kernels have no rules for torch.func",
        ),
    ),
    "lean": (
        lambda: lstm("torch", memory="lean")(an_input()),
        cannot("torch", f"torch: {LEAN}"),
    ),
    "zoneout": (
        lambda: lstm("torch", zoneout=0.1)(an_input()),
        cannot("torch", f"torch: {ZONEOUT}"),
    ),
    "trajectory": (
        lambda: lstm("torch")(an_input(), all_states=True),
        cannot(
            "torch",
            "torch: torch gives no cell state but the last (all_states=True)",
        ),
    ),
    "reset": (
        lambda: lstm("torch")(an_input(), reset=RESET),
        cannot(
            "torch",
            "torch: torch cannot reset single rows in mid-sequence (reset=)",
        ),
    ),
    "h_mask": (
        lambda: functional("torch", h_mask=torch.ones(1, B, H)),
        cannot(
            "torch",
            "torch: torch cannot mask the recurrent operand (h_mask, recurrent_dropout)",
        ),
    ),
    "recurrent dropout": (
        lambda: lstm("torch", recurrent_dropout=0.5)(an_input()),
        cannot(
            "torch",
            "torch: torch cannot mask the recurrent operand (h_mask, recurrent_dropout)",
        ),
    ),
    **{
        f"deterministic {name}": (
            lambda name=name: lstm(name, deterministic=True)(an_input()),
            cannot(name, f"{name}: {DETERMINISTIC}"),
        )
        for name in ("numba", "eager", "torch", "reference")
    },
    "every name of several": (
        lambda: lstm(("torch", "eager"), memory="lean", deterministic=True)(an_input()),
        cannot(("torch", "eager"), f"torch: {DETERMINISTIC}", f"eager: {DETERMINISTIC}"),
    ),
    "several reasons": (
        lambda: lstm(("numba", "torch"), deterministic=True, zoneout=0.1)(an_input()),
        cannot(("numba", "torch"), f"numba: {DETERMINISTIC}", f"torch: {ZONEOUT}"),
    ),
    "two reasons": (
        lambda: functional(("native", "torch"), torch.complex64, reset=RESET),
        cannot(
            ("native", "torch"),
            f"native: {COMPLEX}",
            "torch: torch cannot reset single rows in mid-sequence (reset=)",
        ),
    ),
    # what backend=None would have to run, and nothing can: the last sentence would be a lie
    "left to us": (
        lambda: functional(None, torch.complex64, deterministic=True),
        cannot(None, f"native: {COMPLEX}", named=False),
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call(case):
    call, text = CALLS[case]
    if "native: " in text and isinstance(load("native"), str):
        pytest.skip(load("native"))
    error = caught(call)
    assert type(error) is NotImplementedError
    assert str(error) == text


def test_a_step_of_a_cell():
    """Which asks no more than a layer, but by a way of its own."""
    cell = fastseq.GRUCell(I, H, backend="torch")
    error = caught(lambda: vmap(cell, torch.ones(B, I)))
    assert type(error) is NotImplementedError
    assert str(error) == cannot("torch", "torch: torch's kernels have no rules for torch.func")


def test_in_a_graph():
    """Dynamo has a class of its own for what its constants raise; the words are ours."""
    torch._dynamo.reset()
    error = caught(lambda: torch.compile(lstm("torch"), backend="eager")(an_input()))
    torch._dynamo.reset()
    words = cannot("torch", "torch: torch's recurrent layers break a compiled graph")
    assert f"NotImplementedError: {words}\n" in f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("make", [lstm, lambda b: fastseq.GRUCell(I, H, backend=b)])
@pytest.mark.parametrize(
    "backend, error, text",
    [
        ("cobol", ValueError, f"backend: expected one of {NAMED}, got 'cobol'"),
        ("Native", ValueError, f"backend: expected one of {NAMED}, got 'Native'"),
        (("eager", "cobol"), ValueError, f"backend: expected one of {NAMED}, got 'cobol'"),
        *(
            (
                wrong,
                TypeError,
                "backend: expected None, a name, or a tuple of names in order of preference, got "
                f"{wrong!r}",
            )
            for wrong in (3, (), ("eager", 3), True)
        ),
    ],
    ids=str,
)
def test_no_backend(make, backend, error, text):
    """It is told when the layer is made."""
    found = caught(lambda: make(backend))
    assert type(found) is error
    assert str(found) == text


@pytest.fixture
def without_numba(monkeypatch):
    """As on a machine where nobody installed it."""
    caches = (imported, load, choice.judge)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setitem(sys.modules, "numba", None)
    for name in [n for n in sys.modules if n.startswith("fastseq.backends.numba")]:
        monkeypatch.delitem(sys.modules, name)
    kept = {n: value for n, value in vars(backends).items() if n.startswith("numba")}
    yield "import of numba halted; None in sys.modules; pip install numba"
    monkeypatch.undo()
    vars(backends).update(kept)
    for cache in caches:
        cache.cache_clear()


def test_a_backend_that_is_missing(without_numba):
    """RuntimeError: the machine lacks it, and the remedy stands beside it."""
    assert fastseq.backends()["numba"] == f"not available: {without_numba}"
    error = caught(lambda: lstm("numba")(an_input()))
    assert type(error) is RuntimeError
    assert str(error) == cannot("numba", f"numba: not available: {without_numba}")
    # one that is there declines as well: then no installation helps
    error = caught(lambda: lstm(("numba", "torch"), memory="lean")(an_input()))
    assert type(error) is NotImplementedError
    assert str(error) == cannot(
        ("numba", "torch"), f"numba: not available: {without_numba}", f"torch: {LEAN}"
    )
    assert lstm(("numba", "eager"))(an_input())[0].shape == (T, B, H)


@pytest.mark.skipif(not isinstance(load("triton"), str), reason="triton runs here")
def test_a_gpu_that_is_missing():
    if isinstance(imported("triton"), str):
        pytest.skip(imported("triton"))
    error = caught(lambda: lstm("triton")(an_input()))
    assert type(error) is RuntimeError
    assert str(error) == cannot(
        "triton",
        "triton: not available: torch sees no CUDA or ROCm device; TRITON_INTERPRET=1 runs the "
        "kernels in NumPy on the CPU, for tests alone",
    )
