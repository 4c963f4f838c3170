"""The backend cuda without a GPU: its kernels, compiled for the host, run as threads on tensors of
the CPU (tests/helpers/cuda_on_host.py), against the independent writing by the rule of all tests.

A CTA has its threads, its shared memory and its barriers; copies arrive when they are waited for,
and no sooner. What this cannot show stands in docs/design.md. T is short, but for one case in which
the ring of stages goes round.
"""

from collections import namedtuple
from contextlib import contextmanager
from types import SimpleNamespace

import cuda_on_host
import pytest
import tf32
import torch
from problems import KINKED, OF_FOUR_STEPS, against_the_independent, draw, full, gradients
from rules import check_all, same_bits

import fastseq
from fastseq.backends import choice, gpu_layer, load
from fastseq.backends.contract import Problem
from fastseq.backends.cuda_kernels import KERNELS, POINTWISE_CELLS, PRODUCT_CELLS, TEAMS
from fastseq.cells import CELLS

CELLS_OF_CUDA = (*PRODUCT_CELLS, *POINTWISE_CELLS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECIAL = {
    "plain": {"B": 5},  # more sequences than stand in the even columns
    "T1 B1 H1": {"T": 1, "B": 1, "H": 1, "I": 1, "seed": 3},
    # rows of whole vectors, the loop of plain problems: CTAs of eight sequences, and of four
    "H32": {"H": 32, "T": 3, "B": 9, "directions": 2},
    "H32 B3": {"H": 32, "T": 3, "B": 3, "directions": 2},
    "ring": {"H": 32, "T": 11, "B": 2},  # goes round
    "H31": {"H": 31, "T": 3, "B": 9},
    **OF_FOUR_STEPS,
    "all at once B9": {
        "lengths": [4, 0, 2, 1, 4, 3, 2, 2, 1],
        "B": 9,
        "H": 18,
        "reset": True,
        "h_mask": True,
        "directions": 2,
    },
}
#: Zoneout it declines.
CASES = [name for name, options in SPECIAL.items() if "zoneout" not in options]
#: What an ordinary run takes of each cell, beside its turn in the types.
SHORT = ("H32", "all at once B9")


@pytest.fixture(scope="module")
def on_host():
    with cuda_on_host.use() as found:
        yield found


@pytest.fixture(autouse=True)
def products(request, on_host):
    """float32's in four products of parts, but where a test asks for TF32."""
    setting = torch.backends.cudnn.rnn
    before, setting.fp32_precision = setting.fp32_precision, getattr(request, "param", "ieee")
    yield
    setting.fp32_precision = before


in_tf32 = pytest.mark.parametrize("products", ["tf32"], indirect=True)


def in_turn():
    """All cells, cases and types; an ordinary run takes the short cases, and of the others one a
    cell, in one type each, which goes round."""
    found = []
    for k, cell in enumerate(CELLS_OF_CUDA):
        for place, special in enumerate(CASES):
            for turn, dtype in enumerate(DTYPES):
                ordinary = special in SHORT or (place - k) % len(CASES) == 0
                ordinary = ordinary and (k + place) % len(DTYPES) == turn
                name = f"{cell}-{special}-{str(dtype)[6:]}"
                marks = () if ordinary else full
                found.append(pytest.param(cell, special, dtype, marks=marks, id=name))
    return found


@pytest.mark.parametrize("cell, special, dtype", in_turn())
def test_against_the_independent(cell, special, dtype):
    options = {"T": 4, **SPECIAL[special]}
    if special == "saturated" and dtype.itemsize == 2:  # as under Triton's interpreter
        if CELLS[cell].unit_parameters:
            options["scale"] = 10.0
        if cell in KINKED:
            options["H"] = 6
    case = draw(cell, dtype=dtype, **options)
    against_the_independent(case, "cuda", special, trajectory=special == "all at once B9")


@pytest.mark.parametrize(
    "cell, dtype, H",
    [
        ("lstm", torch.float32, 64),  # part of the weights in shared memory
        pytest.param("gru", torch.bfloat16, 64, marks=full),
        pytest.param("lstm", torch.float16, 64, marks=full),
        pytest.param("rnn_tanh", torch.float32, 64, marks=full),
        pytest.param("lstm", torch.bfloat16, 128, marks=full),
        pytest.param("gru", torch.float16, 100, marks=full),
        ("indrnn", torch.float32, 70),  # two tiles of units, whose pieces stand anywhere
    ],
)
def test_larger(cell, dtype, H):
    case = draw(cell, T=2, B=5, H=H, dtype=dtype, directions=2)
    against_the_independent(case, "cuda", f"H={H}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_longer_than_a_sum(dtype):
    """Of float32 gates' gradients are summed 32 steps at a time."""
    case = draw("lstm", T=70, B=2, H=8, dtype=dtype)
    against_the_independent(case, "cuda", "T=70")


@pytest.mark.parametrize("directions, B, rows", [(1, 9, 4), (2, 9, 8), (1, 17, 8), (2, 8, 4)])
def test_sequences_of_a_cta(directions, B, rows, on_host):
    """Four where each CTA then has one of the four multiprocessors, else eight."""
    on_host.launched.clear()
    case = draw("gru", T=2, B=B, H=32, dtype=torch.float32, directions=directions)
    case.run("cuda")
    assert [grid for _, grid, _ in on_host.launched] == [(-(-B // rows), directions, 1)]


@in_tf32
@pytest.mark.parametrize("kind", ["LSTM", "GRU", pytest.param("RNN", marks=full)])
@pytest.mark.parametrize("H", [32, pytest.param(64, marks=full)])
def test_tf32(kind, H, on_host):
    """No further from float64 than twice a layer that rounds all operands."""
    torch.manual_seed(0)
    ours = getattr(fastseq, kind)(16, H, backend="cuda")
    truth = getattr(torch.nn, kind)(16, H).double()
    truth.load_state_dict(ours.state_dict())
    x = torch.randn(4, 9, 16)

    def values(module, x, call=None):
        x = x.clone().requires_grad_()
        y, state = module(x) if call is None else call(module, x)
        found = {"y": y} | dict(
            zip("hc", state if isinstance(state, tuple) else (state,), strict=False)
        )
        return found | gradients(found, {"x": x} | dict(module.named_parameters()))

    exact = values(truth, x.double())
    check_all(values(ours, x), values(truth, x.double(), tf32.layer), exact, x.dtype, kind)
    assert any("_tf32_" in name for name, _, _ in on_host.launched)


@pytest.mark.parametrize("cell", ["lstm", "gru", pytest.param("peephole_lstm", marks=full)])
def test_lean(cell):
    case = draw(cell, T=4, dtype=torch.bfloat16, **SPECIAL["all at once"])
    against_the_independent(case, "cuda", "lean", memory="lean")


@pytest.mark.parametrize("cell", ["lstm", "gru", "peephole_lstm"])
def test_the_same_bits_again(cell):
    case = draw(cell, T=4, B=5, dtype=torch.float32, directions=2)
    first = case.run("cuda")
    once, again = (gradients(first, case.leaves(), retain_graph=True) for _ in range(2))
    second = case.run("cuda")
    assert all(same_bits(once[name], again[name]) for name in once)
    assert all(same_bits(first[name], second[name]) for name in first)


def test_kernels_take_nothing_that_forward_saved(on_host):
    """With retain_graph a second backward sees the same saved tensors."""
    m = fastseq.LSTM(8, 32, backend="cuda")
    y, _ = m(torch.randn(3, 5, 8))

    def saved():
        return [t for t in y.grad_fn.saved_tensors if t is not None]

    before = [t.clone() for t in saved()]
    y.sum().backward(retain_graph=True)
    assert before and all(same_bits(a, b) for a, b in zip(before, saved(), strict=True))


@pytest.mark.parametrize("T, B, lengths", [(0, 3, None), (3, 0, None), (2, 2, [0, 0])])
def test_nothing_to_do(T, B, lengths):
    case = draw("lstm", T=T, B=B, lengths=lengths, dtype=torch.float32)
    ours, theirs = case.run("cuda"), case.run("reference")
    ours |= gradients(ours, case.leaves())
    theirs |= gradients(theirs, case.leaves())
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), atol=1e-6), name


def test_tensors_that_start_anywhere():
    """Rows whose places 16 does not divide."""
    m = fastseq.LSTM(32, 32, backend="cuda")
    x = torch.randn(4 * 3 * 32 + 1)[1:].view(4, 3, 32)
    h = torch.randn(3 * 32 + 1)[1:].view(1, 3, 32)
    y, (h_n, _) = m(x, (h, h))
    m.fastseq.backend = "reference"
    expected, (h_exact, _) = m(x, (h, h))
    assert torch.allclose(y, expected, atol=1e-5) and torch.allclose(h_n, h_exact, atol=1e-5)


def test_one_launch_a_walk(on_host):
    m = fastseq.GRU(8, 20, num_layers=2, bidirectional=True, backend="cuda")
    on_host.launched.clear()
    m(torch.randn(3, 17, 8))[0].sum().backward()
    walks = [(name.split("_")[0], grid) for name, grid, _ in on_host.launched]
    ways = [way for way, _ in walks if way != "previous"]
    assert ways == ["forward"] * 2 + ["backward"] * 2
    assert all(grid == (3, 2, 1) for way, grid in walks if way != "previous")


def problem(cell="lstm", dtype=torch.float32, H=16, **change):
    given = {"T": 4, "B": 3, "I": 8, "P": None} | change
    return Problem(cell, dtype, "cpu", H=H, **given)


@pytest.mark.parametrize("cell", CELLS_OF_CUDA)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_must_not_be_declined(cell, dtype):
    """So that no kernel drops out unseen."""
    most = 64 if dtype is torch.float32 else 128
    for H in (1, 17, 32, 33, 64, most):
        for training in (False, True):
            asked = problem(cell, dtype, H, training=training, ragged=True, reset=True)
            assert choice.reason_against("cuda", asked) is None, (cell, dtype, H)


@pytest.mark.parametrize(
    "asked, words",
    [
        (problem(H=129), ["H=129", "up to H=64", "triton"]),
        (problem(dtype=torch.bfloat16, H=300), ["H=300", "cluster", "up to H=128"]),
        (problem(dtype=torch.float64), ["float64", "triton"]),
        (problem("gru_reset_before"), ["2 phases", "triton"]),
        (problem(projected=True, P=4), ["proj", "triton"]),
        (problem(zoneout=(0.1, 0.1)), ["zoneout"]),
        (problem(mode="trace"), ["jit.trace"]),
        (problem(T=2**20, B=2**12), ["T=1048576", "4,294,967,296 rows", "split"]),
    ],
)
def test_what_is_declined_in_words(asked, words):
    reason = choice.reason_against("cuda", asked)
    assert reason is not None and all(word in reason for word in words), reason


def test_the_launch_list_is_the_planners(on_host):
    assert KERNELS.keys() | TEAMS.keys() <= set(on_host.kernels())
    assert len(on_host.kernels()) <= 300


def test_what_a_device_can_is_asked_in_its_context(on_host, monkeypatch):
    """Which may not be there yet, and then the driver counts no clusters."""
    cuda, entered = load("cuda"), []
    properties = SimpleNamespace(
        name="A GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        max_threads_per_multi_processor=2048,
    )

    @contextmanager
    def current(index):
        entered.append(index)
        yield
        entered.clear()

    def clusters(name, device, size, threads, shared):
        assert entered == [1, "a tensor"] and (device, shared) == (1, 232448)
        if size > 8:
            raise RuntimeError("refused")
        return 132 // size

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "device", current)
    monkeypatch.setattr(torch, "empty", lambda *size, device: entered.append("a tensor"))
    monkeypatch.setattr(on_host, "clusters", clusters)
    monkeypatch.setattr(on_host, "limits", lambda index: {"mps": index, "cooperative": 1})
    try:
        found = cuda._device(1)
    finally:
        cuda._device.cache_clear()
    assert found.clusters == (0, *(132 // n for n in range(1, 9)), *[0] * 8)
    assert found.mps and found.cooperative


def test_a_failed_launch_names_its_kernel(monkeypatch):
    cuda = load("cuda")

    def refuse(name, *rest):
        raise RuntimeError(f"{name}: refused")

    monkeypatch.setattr(cuda._cuda, "launch", refuse)
    with pytest.raises(RuntimeError, match="forward_lstm_float32_32: refused"):
        fastseq.LSTM(4, 8, backend="cuda")(torch.randn(2, 3, 4))


def test_explain_prints_the_plan(capsys):
    assert fastseq.explain(fastseq.LSTM(8, 16, backend="cuda"), torch.randn(3, 2, 8)) == "cuda"
    said = capsys.readouterr().out
    assert "forward_lstm_float32_32" in said and "registers" in said and "shared memory" in said


def test_gates_that_join_in_runs():
    def of(gates, recurrent, apart=""):
        Gates = namedtuple("Gates", "gates recurrent_gates apart_gates")
        return gpu_layer._joint_gates(Gates(gates, recurrent, apart))

    assert of("ifgo", "ifgo") == ((0, 0, 4),)
    assert of("rzn", "rzn", "n") == ((0, 0, 2),)
    assert of("ifg", "fgi") == ((1, 0, 2), (0, 2, 1))
    assert of("abs", "asb", "s") == ((0, 0, 1), (1, 2, 1)), "no neighbours in w_hh"
    assert of("asb", "ab") == ((0, 0, 1), (2, 1, 1)), "no neighbours in w_ih"
    assert of("abc", "") == ()


def test_directions_are_bits_of_one_number(on_host):
    bits = load("cuda")._bits
    assert [bits(d) for d in ((), (True,), (False, True))] == [0, 1, 2]
    assert bits((True, False) * 40) == 0x55555555
    for lengths in (33, 64, 70):
        with pytest.raises(NotImplementedError, match=f"{lengths} recurrences .* triton"):
            bits((False,) * (lengths - 1) + (True,))
