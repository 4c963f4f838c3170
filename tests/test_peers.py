"""The other libraries of the benchmark: they compute what torch.nn computes, or are refused."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.peers import PEERS, Peer, check, expected, named
from bench.remote import Remote, Served
from bench.workloads import Workload, by_name

LAYERS = Workload(
    "both", "lstm", T=5, B=3, I=7, H=9, layers=2, bidirectional=True, source="", training=True
)
STREAM = Workload("stream", "gru", T=4, B=2, I=7, H=9, mode="streaming", source="", training=False)
SHAPES = [
    LAYERS,
    replace(LAYERS, cell="gru"),
    replace(LAYERS, cell="rnn", bidirectional=False),
    replace(LAYERS, proj=4),
    replace(STREAM, cell="lstm"),
    STREAM,
]
CASES = [
    pytest.param(w, way, id=f"{w.cell}{w.proj or ''}-{w.mode}-{way}")
    for w in SHAPES
    for way in ("forward", "training")
    if w.training or way == "forward"
]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

#: peer -> way, cell or 'proj' that it cannot run -> words of its reason
DECLINED = {
    "onnxruntime": {"training": "inference only", "proj": "no projection"},
    "openvino": {"training": "inference only", "proj": "no projection"},
    "jax": {},
    "onednn": {"proj": "not wrapped"},
    "torch-packed": {
        "training": "inference only",
        "gru": "plain LSTM",
        "rnn": "plain LSTM",
        "proj": "plain LSTM",
    },
    "numpy": {"training": "inference only"},
}


@pytest.fixture(scope="module", params=list(PEERS))
def remote(request):
    """A peer's own process: their thread pools stay out of the tests'."""
    reason = PEERS[request.param].available()
    if reason is not None:
        pytest.skip(reason)
    remote = Remote(request.param, 1)
    yield remote
    remote.close()


@pytest.mark.parametrize(("workload", "way"), CASES)
def test_a_peer_computes_what_torch_does_or_says_why_not(remote, workload, way):
    reasons = DECLINED[remote.name]
    keys = [way, workload.cell, "proj" if workload.proj else None]
    wanted = next((reasons[key] for key in keys if key in reasons), None)
    reason = remote.prepare(workload, way)  # raises where the numbers differ
    if wanted is None:
        assert reason is None
        assert remote.sample() > 0
    else:
        assert wanted in reason


def test_a_peer_takes_neither_ragged_batches_nor_other_types(remote):
    assert "float32" in remote.prepare(replace(LAYERS, dtype=torch.float64), "forward")
    ragged = replace(by_name("tiny-ragged"), cell="lstm")
    assert "packed form" in remote.prepare(ragged, "forward")


@LINUX
def test_a_peer_stands_still_between_its_turns(remote):
    assert remote.prepare(replace(STREAM, cell="lstm"), "forward") is None
    remote.sample()
    stat = Path(f"/proc/{remote._process.pid}/stat").read_text()
    assert stat.rpartition(")")[2].split()[0] == "T"


@LINUX
@pytest.mark.skipif(PEERS["jax"].available() is not None, reason="needs JAX")
@pytest.mark.parametrize("threads", [1, 2])
def test_xla_has_the_threads_that_were_asked_for(threads):
    remote = Remote("jax", threads)
    try:
        assert remote.prepare(STREAM, "forward") is None
        tasks = Path(f"/proc/{remote._process.pid}/task").iterdir()
        names = [(task / "comm").read_text() for task in tasks]
        assert sum("XLAEigen" in name for name in names) == threads
    finally:
        remote.close()


def test_numbers_that_differ_are_an_error():
    wanted = expected(LAYERS, training=True)
    assert len(wanted) == 2 + 4 * 4
    check([a.copy() for a in wanted], wanted)
    with pytest.raises(ArithmeticError, match=r"17 results where torch\.nn has 18"):
        check(wanted[1:], wanted)
    with pytest.raises(ArithmeticError, match="result 0: shape"):
        check([wanted[0].T, *wanted[1:]], wanted)
    rounded = torch.from_numpy(wanted[3]).bfloat16().float().numpy()
    with pytest.raises(ArithmeticError, match="result 3: off by"):
        check([*wanted[:3], rounded, *wanted[4:]], wanted)
    with pytest.raises(ArithmeticError, match="result 1: off by nan"):
        check([wanted[0], wanted[1] * np.nan, *wanted[2:]], wanted)


class Liar(Peer):
    name = "liar"

    def forward(self, workload):
        return lambda: [expected(workload, False)[0] * 1.01]


def test_a_peer_with_wrong_numbers_is_no_row():
    served = Served(Liar(1))
    fields = {"name": "w", "cell": "gru", "T": 2, "B": 1, "I": 3, "H": 4, "source": ""}
    answer = served.answer({"prepare": fields, "way": "forward"})
    assert "w, forward: ArithmeticError('result 0: off by" in answer["error"]
    assert served.call is None
    answer = served.answer({"prepare": {**fields, "H": 0}, "way": "forward"})
    assert "w, forward: ValueError" in answer["error"]
    assert "inference only" in served.answer({"prepare": fields, "way": "training"})["declined"]


def test_a_process_that_ends_says_what_it_said():
    with pytest.raises(RuntimeError, match=r"(?s)nobody: its process ended.*KeyError: 'nobody'"):
        PEERS["nobody"] = Liar
        try:
            Remote("nobody", 1)
        finally:
            del PEERS["nobody"]


def test_names():
    assert named(None) == named("") == []
    assert named("all") == list(PEERS)
    assert named("jax, numpy") == ["jax", "numpy"]
    with pytest.raises(ValueError, match="no peer is named 'nothing'; names: onnxruntime"):
        named("nothing")


def test_what_is_missing_comes_with_a_remedy(monkeypatch):
    monkeypatch.setattr(PEERS["jax"], "packages", ("json", "not_installed_anywhere"))
    said = PEERS["jax"].available()
    assert said == 'no not_installed_anywhere here; pip install ".[peers]"'
