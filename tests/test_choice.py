"""Which backend runs: the rule, the caller's word, and what users are told."""

from types import SimpleNamespace

import pytest
import torch
from problems import PLAIN

import fastseq
from fastseq.backends import BACKENDS, choice, cuda_rule, load
from fastseq.backends.contract import ONE_STEP, Problem, Request
from fastseq.ops.geometry import Dense
from fastseq.ops.stack import Stack, problem


def test_what_a_backend_is_chosen_by_stands_in_its_place(monkeypatch):
    """Each field of a problem, told by a value that no other has."""
    request = Request(
        cell="lstm",
        layers=3,
        directions=2,
        biased="biased",
        projected="projected",
        deterministic="deterministic",
        trajectory="trajectory",
        memory="memory",
    )
    w_ih, w_hh = torch.empty(4 * 6, 4), torch.empty(4 * 6, 5)
    geometry = Dense(torch.empty(7, 8, 4), False)
    geometry.batch_sizes = torch.ones(7)
    stack = Stack(request, torch.empty(7, 8, 4), [], [w_ih, w_hh], geometry, reset=w_ih)
    device = SimpleNamespace(type="cuda")
    stack.data = SimpleNamespace(dtype="dtype", device=device, is_cpu=False)
    stack.zoneout = SimpleNamespace(rates="zoneout")
    monkeypatch.setattr(Stack, "needs_grad", lambda self: "training")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 9)
    monkeypatch.setattr(cuda_rule, "capability", lambda device: "capability")
    monkeypatch.setattr(cuda_rule, "uses_tf32", lambda dtype: "tf32")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: "recording")
    told = "dtype zoneout trajectory memory deterministic training capability tf32 recording"
    sizes = {"T": 7, "B": 8, "I": 4, "H": 6, "P": 5, "R": 2, "layers": 3, "threads": 9}
    words = {name: name for name in told.split()}
    flags = {"ragged": True, "single": False, "reset": True, "h_mask": False}
    assert problem(stack) == Problem(
        cell="lstm", device="cuda", bias="biased", projected="projected", **sizes, **flags, **words
    )
    stack.reset, stack.h_mask = None, w_hh
    found = problem(stack)
    assert (found.reset, found.h_mask, found.single) == (False, True, False)
    stack.request = request._replace(order=ONE_STEP)
    assert problem(stack).single


def first(native=False, **changes) -> str:
    return choice.preferred(PLAIN._replace(**changes), native)[0]


def test_the_rule_with_native_kernels():
    for cell in ("lstm", "gru", "rnn_tanh"):
        for T in (1, 6, 100):
            assert first(native=True, cell=cell, T=T) == "native"
            assert first(native=True, cell=cell, T=T, H=1024, P=1024, threads=2) == "native"
    assert first(native=True, cell="rnn_tanh", training=True, T=1) == "native"
    assert first(native=True, device="cuda") == "torch"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rule_with_native_kernels_in_16_bits(dtype):
    sixteen = {"native": True, "dtype": dtype}
    assert first(**sixteen) == first(**sixteen, B=64, H=512) == "native"
    assert first(**sixteen, T=4) == first(**sixteen, T=8, H=512) == "native"
    assert first(**sixteen, T=3) == first(**sixteen, T=7, H=512) == "torch"
    assert first(**sixteen, cell="rnn_tanh", T=8) == "native"
    assert first(**sixteen, cell="rnn_tanh", T=7) == "torch"
    assert first(**sixteen, cell="lstm", B=32, H=512) == "native"


def test_the_rule_in_bfloat16_by_sizes():
    """An odd size cannot go in pairs."""
    sixteen = {"native": True, "dtype": torch.bfloat16}
    odd = {"B": 64, "H": 513, "P": 513}
    assert first(**sixteen, **odd) == first(**sixteen, **odd, cell="lstm") == "torch"
    assert first(**sixteen, I=17) == "native"
    if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert first(**sixteen, cell="lstm", T=1) == "native"
        assert first(**sixteen, cell="lstm", T=100, I=17, B=16) == "torch"


def test_the_rule_prefers_kernels_where_they_were_measured_to_be_faster():
    assert first() == "numba"
    assert first(T=1) == "torch"
    assert first(T=4) == "torch"
    assert first(T=6) == "torch"
    assert first(T=6, training=True) == "numba"
    assert first(cell="rnn_tanh", T=11) == "torch"
    assert first(cell="rnn_tanh", T=12) == "numba"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_the_rule_against_onednn(monkeypatch):
    lstm = {"cell": "lstm", "threads": 2}
    assert first(**lstm) == "numba"
    assert first(**lstm, T=16) == "torch"
    assert first(**lstm, H=1024, P=1024) == "torch"
    assert first(cell="lstm", threads=1, H=1024, P=1024) == "numba"
    assert first(**lstm, H=1024, P=1024, training=True) == "numba"
    assert first(**lstm, B=1, H=256, P=256) == "torch"
    assert first(**lstm, B=1, H=256, P=256, training=True) == "torch"
    assert first(cell="lstm", threads=1, B=1, H=256, P=256) == "numba"
    assert first(**lstm, H=1024, P=1024, ragged=True) == "numba"
    assert first(**lstm, H=1024, P=1024, dtype=torch.float64) == "numba"
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert first(**lstm, H=1024, P=1024) == "numba"


def test_the_rule_off_the_cpu_and_under_tracers():
    assert first(device="cuda") == "torch"
    assert first(device="mps") == "torch"
    assert first(mode="trace") == "torch"
    assert first(mode="transform", native=True) == "native"
    assert first(mode="transform") == "numba"
    assert first(mode="transform", T=4) == "eager"
    assert first(mode="transform", device="cuda") == "eager"
    assert first(mode="dual") == "eager"
    assert first(mode="compile", T=None, B=None, I=None, H=None, P=None) == "numba"


@pytest.mark.parametrize("mode", ["plain", "compile", "trace", "transform", "dual"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "mps", "meta"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu", "indrnn", "gru_reset_before"])
def test_left_to_us_something_always_runs(cell, device, mode):
    for options in ({}, {"reset": True}, {"h_mask": True}, {"memory": "lean", "training": True}):
        task = PLAIN._replace(cell=cell, device=device, mode=mode, **options)
        assert choice.judge(task, None).chosen is not None


@pytest.mark.parametrize("mode", ["plain", "compile"])
def test_left_to_us_zoneout_runs_on_triton_where_it_serves(mode):
    """Of a GPU that this machine may not have."""
    pytest.importorskip("triton")
    task = PLAIN._replace(device="cuda", zoneout=(0.1,), mode=mode)
    assert choice.judge(task, None).chosen == "triton"
    assert choice.judge(task._replace(dtype=torch.complex64), None).chosen == "eager"


def test_a_name_that_does_not_exist():
    words = r"backend: expected one of torch, native, numba.*, got 'cudnn'"
    with pytest.raises(ValueError, match=words):
        fastseq.GRU(3, 4, backend="cudnn")(torch.randn(2, 1, 3))
    with pytest.raises(TypeError, match="backend: expected None, a name, or a tuple"):
        fastseq.GRU(3, 4, backend=7)(torch.randn(2, 1, 3))
    with pytest.raises(TypeError, match="backend: expected None, a name, or a tuple"):
        choice.select(PLAIN, ())


def test_a_backend_that_declines_says_why_and_what_helps():
    m = fastseq.GRU(3, 4, backend="torch")
    reset = torch.zeros(2, 1, dtype=torch.bool)
    with pytest.raises(NotImplementedError, match="torch cannot reset single rows in mid-sequence"):
        m(torch.randn(2, 1, 3), reset=reset)
    m.fastseq.backend = ("torch", "eager")
    m(torch.randn(2, 1, 3), reset=reset)


def test_a_backend_that_is_not_available(monkeypatch):
    gone = "No module named 'numba'; pip install numba"

    def fake(name):
        return gone if name in ("numba", "native") else load(name)

    monkeypatch.setattr(choice, "load", fake)
    choice.judge.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"numba: not available: .*pip install numba"):
            choice.select(PLAIN, "numba")
        assert choice.select(PLAIN, None) == "torch"
        assert fastseq.backends()["numba"] == f"not available: {gone}"
    finally:
        choice.judge.cache_clear()


def test_backends_table():
    table = fastseq.backends()
    assert set(table) == set(BACKENDS)
    assert table["reference"] == "available"
    assert len(str(table).splitlines()) == len(BACKENDS)


def test_explain(capsys):
    m = fastseq.LSTM(8, 16, batch_first=True)
    with torch.no_grad():
        chosen = fastseq.explain(m, torch.randn(3, 50, 8), reset=torch.zeros(3, 50).bool())
    printed = capsys.readouterr().out
    kernels = "numba" if isinstance(load("native"), str) else "native"
    assert chosen == kernels
    assert "LSTM T=50 B=3 I=8 H=16" in printed
    assert "inference" in printed
    assert "torch      declines: torch cannot reset" in printed
    how = "layer by layer" if kernels == "numba" else "all layers in one call"
    assert f"{kernels:<10} runs, {how}" in printed
    m.fastseq.memory = "lean"
    fastseq.explain(m, torch.randn(3, 50, 8))
    assert f"{kernels:<10} runs, layer by layer" in capsys.readouterr().out


def test_explain_names_the_backend_that_runs():
    for T in (1, 6, 50):
        for cell in (fastseq.GRU(8, 16), fastseq.LSTM(8, 16), fastseq.RNN(8, 16)):
            x = torch.randn(T, 2, 8)
            name = fastseq.explain(cell, x)
            y, _ = cell(x)
            ours = ("Recurrence", "StackFunction", "Clone")
            assert any(n in y.grad_fn.name() for n in ours) == (
                name in ("native", "numba")
                or (name == "torch" and isinstance(cell, fastseq.LSTM) and T > 1)
            )


@pytest.mark.skipif(isinstance(load("native"), str), reason=str(load("native")))
def test_explain_of_cells():
    def runs(cell, *shape, **kind):
        x = torch.randn(*shape, **kind)
        state = cell(x)
        h = state[0] if isinstance(state, tuple) else state
        ours = "StackFunction" in h.grad_fn.name()
        assert fastseq.explain(cell, x) == ("native" if ours else "torch")
        return ours

    for kind in (fastseq.LSTMCell, fastseq.GRUCell, fastseq.RNNCell):
        assert runs(kind(8, 16), 2, 8)
        assert runs(kind(8, 16, dtype=torch.float64), 1, 8, dtype=torch.float64)
        assert not runs(kind(8, 16, dtype=torch.bfloat16), 2, 8, dtype=torch.bfloat16)
        assert runs(kind(8, 256), 2, 8)
        assert runs(kind(8, 256), 1, 8) == (kind is fastseq.LSTMCell)
        with torch.no_grad():
            assert fastseq.explain(kind(8, 256), torch.randn(1, 8)) == "native"


def test_explain_of_what_is_not_ours():
    with pytest.raises(TypeError, match=r"expected a layer or cell of fastseq, got GRU"):
        fastseq.explain(torch.nn.GRU(3, 4), torch.randn(2, 1, 3))
