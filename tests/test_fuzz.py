"""Random layers against the reference in float64, by the rule: always the same ones, and those that
a long run (``make fuzz``) found once."""

import json

import fuzz
import pytest
import torch
from fuzz import Fuzzed, check, found, fuzzed
from problems import DECLINES
from rules import check_alike, check_close

import fastseq
from fastseq.backends import load
from fastseq.cells import CELLS

OURS = ("native", "numba")
OTHERS = ("eager", "torch", "reference")


def check_seeds(backend, seeds):
    if isinstance(load(backend), str):
        pytest.skip(load(backend))
    cells = [cell for cell in CELLS if cell not in DECLINES[backend]]
    ran = [check(backend, fuzzed(seed, cells), f"seed {seed}") for seed in seeds]
    assert any(isinstance(share, float) for share in ran), "all were declined"


@pytest.mark.parametrize("first", range(0, 60, 20))
@pytest.mark.parametrize("backend", OURS)
def test_random_layers(backend, first):
    check_seeds(backend, range(first, first + 20))


@pytest.mark.parametrize("backend", OTHERS)
def test_random_layers_of_the_others(backend):
    check_seeds(backend, range(60, 75))


@pytest.mark.full
@pytest.mark.parametrize("first", range(75, 1000, 25))
@pytest.mark.parametrize("backend", (*OURS, *OTHERS))
def test_more_random_layers(backend, first):
    check_seeds(backend, range(first, first + 25))


@pytest.mark.parametrize(
    "backend, seed, problem",
    list(found()),
    ids=lambda v: str(v) if isinstance(v, str | int) else "",
)
def test_what_failed_once(backend, seed, problem):
    if isinstance(load(backend), str):
        pytest.skip(load(backend))
    assert isinstance(check(backend, problem, f"seed {seed}"), float)


EMPTY = {"cell": "lstm", "dtype": "float32", "T": 3, "B": 2, "I": 4, "H": 8, "lengths": [0, 0]}


@pytest.mark.parametrize("backend", (*OURS, "eager", "reference"))
def test_lean_memory_of_no_rows(backend):
    """Sequences that are all empty."""
    if isinstance(load(backend), str):
        pytest.skip(load(backend))
    assert isinstance(check(backend, Fuzzed(EMPTY, {"memory": "lean"})), float)


def test_a_failure_is_kept_once_and_read_again(monkeypatch, tmp_path):
    monkeypatch.setattr(fuzz, "FOUND", tmp_path / "found.jsonl")
    for seed in (5, 8, 5):
        fuzz.keep("eager", seed)
    assert list(found()) == [("eager", seed, fuzzed(seed)) for seed in (5, 8)]


def test_a_seed_is_one_problem_and_others_are_others():
    every = [json.dumps(fuzz.asdict(fuzzed(seed))) for seed in range(200)]
    assert every == [json.dumps(fuzz.asdict(fuzzed(seed))) for seed in range(200)]
    assert len(set(every)) == 200
    for name in ("reset", "h_mask", "lengths", "bias", "state", "P"):
        assert {bool(fuzzed(seed).drawn[name]) for seed in range(200)} == {True, False}, name
    zoned = {fuzzed(seed).drawn.get("evaluates") for seed in range(200)}
    assert zoned == {None, True, False}, "zoneout, in training and in evaluation"
    assert {fuzzed(seed).wanted for seed in range(200)} == set(fuzz.WANTED)
    forms = {form for seed in range(200) for form in fuzzed(seed).forms.values()}
    assert forms == set(fuzz.FORMS)


@pytest.mark.parametrize("of", ["x", "h_0", "weight"])
@pytest.mark.parametrize("backend", (*OURS, "eager", "torch"))
def test_a_view_that_is_negated_lazily(backend, of):
    """torch keeps a bit for it: what lies in memory is the negative of its numbers."""
    if isinstance(load(backend), str):
        pytest.skip(load(backend))
    layer = fastseq.GRU(4, 6, backend=backend, dtype=torch.float64)
    x, h_0 = torch.randn(5, 3, 4).double(), torch.randn(1, 3, 6).double()
    expected = layer(x, h_0)
    named = dict(layer.named_parameters())
    given = {"x": x, "h_0": h_0, "weight": named["weight_hh_l0"].detach()}
    negated = {**given, of: torch._neg_view(-given[of])}
    weights = named | {"weight_hh_l0": negated["weight"]}
    found = torch.func.functional_call(layer, weights, (negated["x"], negated["h_0"]))
    for ours, truth in zip(found, expected, strict=True):
        check_close(ours, None, truth, torch.float64, of)


@pytest.mark.parametrize("of", ["x", "h_0", "c_0", "dy", "weight"])
@pytest.mark.parametrize("backend", (None, *OURS))
@pytest.mark.parametrize("kind", ["cell", "layer", "reset"])
def test_what_is_negated_lazily_everywhere(kind, backend, of):
    """In the short way and the long one, of cells and layers, forward and backward."""
    if backend is not None and isinstance(load(backend), str):
        pytest.skip(load(backend))
    options = {"backend": backend, "dtype": torch.float64}
    m = fastseq.LSTMCell(4, 6, **options) if kind == "cell" else fastseq.LSTM(4, 6, 2, **options)
    lead, count = ((3,), ()) if kind == "cell" else ((5, 3), (2,))
    x, h, c = (torch.randn(*s).double() for s in ((*lead, 4), (*count, 3, 6), (*count, 3, 6)))
    given = {"x": x, "h_0": h, "c_0": c, "dy": torch.randn(*lead, 6).double()}
    name = "weight_hh" if kind == "cell" else "weight_hh_l1"
    given["weight"] = dict(m.named_parameters())[name].detach().clone()
    more = {"reset": torch.rand(5, 3) < 0.5} if kind == "reset" else {}

    def run(given):
        leaf = given["x"].detach().requires_grad_()
        arguments = (leaf, (given["h_0"], given["c_0"]))
        y, *_ = torch.func.functional_call(m, {name: given["weight"]}, arguments, more)
        y.backward(given["dy"])
        return [y.detach(), leaf.grad]

    negated = given | {of: torch._neg_view(-given[of])}
    for ours, truth in zip(run(negated), run(given), strict=True):
        check_close(ours, None, truth, torch.float64, of)


def test_steps_of_what_is_negated_lazily():
    m, x = fastseq.LSTM(4, 6), torch.randn(1, 4)
    expected = fastseq.streaming(m).step(x).clone()
    check_alike(fastseq.streaming(m).step(torch._neg_view(-x)), expected, "x")
