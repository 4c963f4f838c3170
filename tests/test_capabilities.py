"""docs/capabilities.md says what the probes see."""

import os
import signal
from pathlib import Path

import pytest
import torch

from bench import capabilities, probes
from bench.probes import PROBES, Side

PAGE = (Path(__file__).parent.parent / "docs" / "capabilities.md").read_text()
SEEN_WITH = torch.__version__ if f"torch {torch.__version__}," in PAGE else "another torch"

#: Fast, and of every answer there is: yes, no, wrong; torch's word and fastseq's.
SAMPLE = (
    "lengths of 0",
    "autocast, packed: all outputs in its type",
    "bfloat16: c carried in float32",
    "jacfwd",
    "isinstance(layer, torch.nn's class)",
    "FlopCounterMode counts forward and backward",
)


def cells(name):
    """What the page says of a probe: torch.nn's cell, and fastseq's."""
    start = f"| {capabilities.escaped(name)} | "
    (row,) = (line for line in PAGE.splitlines() if line.startswith(start))
    return row.removeprefix(start).removesuffix(" |").split(" | ")


@pytest.mark.parametrize("name", PROBES)
def test_the_page_has_a_row(name):
    assert len(cells(name)) == 2
    assert f"\n## {PROBES[name].group}\n" in PAGE


def test_the_page_has_no_other_row():
    rows = [
        line for line in PAGE.splitlines() if line.startswith("| ") and "torch.nn |" not in line
    ]
    assert len(rows) == len(PROBES)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_row_is_seen_again(name):
    """fastseq's cell with any torch, torch.nn's with the one that the page names."""
    theirs, ours = capabilities.rows([PROBES[name]])[0][1]
    assert capabilities.escaped(ours) == cells(name)[1]
    if SEEN_WITH == torch.__version__:
        assert capabilities.escaped(theirs) == cells(name)[0]


#: Of users' code, where torch.nn is to say yes as well: but what needs a clock, or takes seconds.
AS_TORCH = [
    name
    for name, one in PROBES.items()
    if one.group == probes.USERS
    and "fastseq" not in name
    and not any(word in name for word in ("threads", "byte code", "default_device"))
]


@pytest.mark.parametrize("name", AS_TORCH)
@pytest.mark.parametrize("library", capabilities.SIDES)
def test_users_code_works_on_both_sides(name, library):
    kind = "GRU" if "ExpandedWeights" in name else PROBES[name].kinds[0]
    assert probes.answer(name, Side(library, kind)) == "yes"


def test_a_crash_and_the_clock_are_answers(monkeypatch):
    """Each ends one process; the layers that are left are asked in another."""

    def crash_or_sleep(side):
        if side.kind == "LSTM":
            os.kill(os.getpid(), signal.SIGKILL)  # an abort would print a trace
        if side.kind == "GRU":
            import time

            time.sleep(60)

    one = probes.Probe("a crash", "none", crash_or_sleep, ("LSTM", "GRU", "RNN"), 4.0)
    monkeypatch.setitem(PROBES, one.name, one)
    monkeypatch.setattr(capabilities, "START", "fork")  # the children know the probe then
    assert capabilities.ask(one, "torch.nn") == {
        "LSTM": "no: the process ended by SIGKILL",
        "GRU": "no: not done after 4 s",
        "RNN": "yes",
    }


@pytest.mark.parametrize(
    ("raised", "answer"),
    [
        (None, "yes"),
        (probes.No("y float32"), "no: y float32"),
        (probes.Slow("×7"), "slow: ×7"),
        (ValueError("\n\nsome words\nand more"), "no: ValueError: some words"),
        (KeyError(), "no: KeyError: "),
    ],
)
def test_words_of_an_answer(monkeypatch, raised, answer):
    def raise_it(side):
        if raised is not None:
            raise raised

    monkeypatch.setitem(PROBES, "raise", probes.Probe("raise", "none", raise_it, ("RNN",), 1.0))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    assert probes.answer("raise", Side("torch.nn", "RNN")) == answer


def test_wrong_numbers_are_seen():
    """Of values, of a gradient, of a tangent that is silently zero."""
    layer = Side("torch.nn", "GRU").layer()
    side, x = Side("torch.nn", "GRU"), probes.an_input()
    probes.check_training(side, layer, x, layer)
    with pytest.raises(probes.Wrong, match="values off by"):
        probes.check_training(side, layer, x, lambda x: layer(x * 1.01))
    with pytest.raises(probes.Wrong, match="gradients off by"):
        probes.check_training(side, layer, x, lambda x: layer(x.detach() + 0 * x))
    with pytest.raises(probes.Wrong, match="all zero"):
        probes.differs(torch.zeros(3), torch.ones(3, dtype=torch.float64))
    with pytest.raises(probes.Wrong, match="shape"):
        probes.differs(torch.zeros(3), torch.ones(4))


@pytest.mark.parametrize("kind", probes.LAYERS)
def test_the_loop_is_the_layer(kind):
    """In float64, whatever fastseq says."""
    side = Side("torch.nn", kind)
    layer, x = side.layer().double(), probes.an_input(dtype=torch.float64)
    probes.differs(layer(x), side.loop(layer, x)[:2])


def test_cells_stand_together():
    same = {"LSTM": "no: TypeError: lstm words", "GRU": "no: TypeError: gru words"}
    assert capabilities.cell(same) == "no: TypeError: lstm words"
    assert capabilities.cell(same | {"RNN": "yes"}) == (
        "LSTM, GRU no: TypeError: lstm words; RNN yes"
    )
    assert capabilities.cell({"LSTM": "slow: ×3", "GRU": "slow: ×9"}) == (
        "LSTM slow: ×3; GRU slow: ×9"
    )
