"""bench.gpu where there is no GPU: its plan as pure functions, children that hang or are lost, and
a rehearsal on a device that is not there (fake_gpu.py), with faults planted."""

import csv
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import rules
import tf32
import torch

from bench import version
from bench.workloads import by_name, matching

pytest.importorskip("triton")

from bench.gpu import (
    budget,
    build,
    crew,
    forms,
    junit,
    numbers,
    points,
    results,
    sanitize,
    summary,
    testing,
    timings,
)
from bench.gpu.__main__ import DEFAULT_STAGES, main
from bench.gpu.budget import Clock
from bench.gpu.junit import Case
from bench.gpu.points import FIELDS, Point, Unit
from bench.gpu.suspects import Suspects
from fastseq.backends import cuda_plan
from fastseq.backends.triton_tiling import Device

ROOT = Path(__file__).parents[1]
KINDS = forms.Kinds(Device(232448, processors=132, hopper=True), "tf32x3", cuda_plan.H100)
#: Where cuda is not available.
TRITON = KINDS._replace(cuda=None)
COLUMNS = {"device": "A GPU", "capability": "9.0", "torch": "2", "triton": "3"}
COLUMNS |= {"cudnn": "9", "fastseq": "0", "commit": "abc1234"}


def outside(**more):
    """The environment of a run of its own, which a make around this one tells nothing."""
    ours = ("PYTEST_", "MAKE", "MFLAGS", "ARGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(ours) and k != "OUT"}
    return kept | {"OMP_NUM_THREADS": "1"} | more


# The plan


def test_the_minutes_are_split_and_handed_on():
    stages = DEFAULT_STAGES.split()
    left, given = 600.0, []
    for place, stage in enumerate(stages):
        given.append(budget.share(stage, stages[place + 1 :], left))
        left -= given[-1]
    assert sum(given) == pytest.approx(600) and min(given) > 30
    # what smoke does not spend, all that follow it get
    unspent = budget.share("bench", ["sanitize"], 500)
    assert unspent > budget.share("bench", ["sanitize"], 400) > budget.share("bench", ["test"], 400)
    assert budget.share("bench", [], 123.0) == 123.0, "the last stage has all that is left"
    assert budget.share("smoke", [], 10_000) == budget.MOST["smoke"]
    assert budget.share("test", ["bench"], -3.0) == 0.0


def test_the_order_of_the_points():
    """The headline in the types that say most; float32 and the longest late; the grid last."""
    found = list(points.points(None))
    names = [p.workload.name for p in found]
    assert len({p.key for p in found}) == len(found), "nothing is measured twice"
    first = [(p.workload.name, p.type, p.way) for p in found[:7]]
    assert first[:2] == [("flashrnn-point", "bfloat16", way) for way in ("forward", "training")]
    assert [kind for _, kind, way in first if way == "forward"][:3] == list(points.FIRST_TYPES)
    headline = {w.name for w in matching(points.HEADLINE)}
    assert set(names[: 6 * len(headline)]) == headline
    of_cta = [p for p in found if p.workload.name.startswith("cta-")]
    of_team = [p for p in found if p.workload.name.startswith("team-")]
    at = 6 * len(headline)
    teams = [p for p in of_team if p.workload.T == 1024 and p.type != "tf32"]
    assert found[at : at + len(teams)] == teams == of_team[: len(teams)]
    at += len(teams)
    early = of_cta[:68]
    assert found[at : at + 68] == early
    assert {(p.workload.T, p.workload.H) for p in early} == {(512, 128)}
    assert [p.workload.B for p in early[:10]] == [B for B in (1, 8, 32, 128, 512) for _ in "ab"]
    assert names[at + 68].startswith("peers-")
    sizes = [p for p in found if p.workload.name.startswith("grid-")]
    later = [*of_team[len(teams) :], *of_cta[68:]]
    end = len(found) - len(sizes)
    assert found[end - len(later) : end] == later, "the rest of cuda's just before the grid"
    found = [p for p in found if p not in of_cta and p not in of_team]
    listed = found[: len(found) - len(sizes)]
    assert found[len(listed) :] == sizes
    assert {p.workload for p in listed} == {w for w in matching(None) if w.dtype is torch.float32}
    wide = [k for k, p in enumerate(listed) if p.type == "float32"]
    long = [k for k, p in enumerate(listed) if p.workload.T == 65536]
    assert long == list(range(long[0], len(listed))), "the longest come last"
    others = [k for k in wide if k not in long]
    assert others == list(range(others[0], long[0])), "float32 just before"
    assert len(found) - len(listed) == 2 * 3240
    sample = {(p.workload.name, p.type) for p in found[len(listed) : len(listed) + 160]}
    assert len(sample) == 80 and len({name[:9] for name, _ in sample}) > 2
    assert {p.workload for p in points.points("headline")} == set(matching(points.HEADLINE))
    some = list(points.points("rl-* tiny-layer"))
    assert len(some) == 4 * 4 * 2, "patterns leave the grid out"
    assert list(points.points("rl-* tiny-layer", "tf32 float32")) == [
        p for p in some if p.type in ("tf32", "float32")
    ]


def test_the_points_of_cuda():
    """Every size of its target that a CTA holds, in three types, forward and training."""
    found = list(points.points("cta-*"))
    assert len({p.key for p in found}) == len(found) == 788
    assert all(forms.forms(p.typed, p.type, KINDS)[0] == "cta" for p in found)
    lstm = {(p.workload.H, p.type) for p in found if p.workload.cell == "lstm"}
    assert lstm == {(H, kind) for H in (32, 64, 128) for kind in points.FIRST_TYPES} - {
        (128, "tf32")
    }
    gru = {(w.H, w.B, w.T) for p in found if (w := p.workload).cell == "gru" and p.type == "tf32"}
    assert len(gru) == 3 * 5 * 4
    assert [p.workload.name for p in points.points("cta-gru-h64-b8-t32", "tf32")] == [
        "cta-gru-h64-b8-t32"
    ] * 2


def test_the_points_of_teams():
    """Every size in each type that a team holds; the most telling first."""
    found = list(points.points("team-*"))
    assert len({p.key for p in found}) == len(found) == 552
    for p in found:
        ours = [f for f in forms.forms(p.typed, p.type, KINDS) if points.contender(f) == "cuda"]
        wave = ["team-wave"] * (p.workload.layers > 1 and p.workload.H <= 256)
        assert sorted(ours) == ["team-cluster", "team-grid"][p.workload.H > 512 :] + wave
    at = {p.key: k for k, p in enumerate(found)}
    first = [p.workload.name for p in found]
    assert list(dict.fromkeys(first))[:7:2] == [
        f"team-lstm-{sizes}-t1024" for sizes in ("h512-b16", "h256-b1", "h768-b16", "h1024-b64")
    ]
    kinds = [("bfloat16", 1024), ("tf32", 1024), ("bfloat16", 64)]
    places = [
        [k for key, k in at.items() if key[1] == kind and f"-t{T}" in key[0]] for kind, T in kinds
    ]
    assert max(places[0]) < min(places[1]) and max(places[1]) < min(places[2])
    tf32 = {p.workload.H for p in found if p.type == "tf32"}
    assert tf32 == {256, 512, 768, 1024}, "what a grid holds of float32"
    others = {p.workload.name for p in found if "-x2" in p.workload.name or "-both" in p.key[0]}
    assert len(others) == 6 * 2 and sum("-rnn-" in name for name in set(first)) == 3 * 2


def test_cudnns_persistent_window():
    def inside(cell, H, kind, way, **more):
        given = {"cell": cell, "H": str(H), "type": kind, "way": way, "ragged": "no", "shape": ""}
        given |= {"I": "100", "B": "16", "layers": "1", "directions": "1"}
        return points.is_persistent(given | more)

    assert inside("lstm", 192, "float16", "forward") and inside("gru", 128, "tf32", "training")
    assert not inside("lstm", 193, "float16", "forward")
    assert not inside("gru", 129, "tf32", "training")
    assert inside("rnn", 384, "float16", "forward") and inside("rnn", 256, "float16", "training")
    assert not inside("rnn", 257, "float16", "training")
    assert not inside("lstm", 64, "bfloat16", "forward")
    assert not inside("lstm", 64, "float16", "forward", ragged="yes")
    assert not inside("lstm", 64, "float16", "forward", shape="LSTM T1 B1 I1 H64 P32")
    # in float16, of larger ones
    fits = {"I": "256", "B": "128"}
    assert inside("lstm", 1024, "float16", "training", **fits)
    assert inside("rnn", 1024, "float16", "forward", **fits | {"B": "88"})
    for other in ({"B": "136"}, {"B": "12"}, {"I": "100"}, {"layers": "2"}, {"directions": "2"}):
        assert not inside("lstm", 1024, "float16", "training", **fits | other)
    for cell, H, kind in (
        *(("lstm", 1152, "float16"), ("lstm", 1000, "float16"), ("gru", 1024, "float16")),
        *(("lstm", 1024, "tf32"), ("lstm", 1024, "bfloat16"), ("rnn", 1024, "float16")),
    ):
        assert not inside(cell, H, kind, "training", **fits)


def test_the_units_of_a_point_and_what_is_left_out():
    point = Point(by_name("small-b4-h256-lstm"), "bfloat16", "forward")
    forms_of = forms.forms(point.typed, point.type, KINDS)
    assert forms_of == ["team-cluster", "team-grid", "grid-resident", "step"]
    units = points.units(point, forms_of)
    assert units[0] == Unit("cudnn", "", "graph") and len(units) == 10
    assert units[2] == Unit("cuda", "team-cluster", "graph")
    assert not any(points.left_out(point, unit) for unit in units)
    ragged = Point(by_name("tagger-lstm"), "bfloat16", "forward")
    assert forms.forms(ragged.typed, "bfloat16", TRITON) == ["walk"]
    one = Point(by_name("small-b1-h128-lstm"), "bfloat16", "forward")
    assert points.units(one, forms.forms(one.typed, one.type, KINDS)) == [
        Unit(*who, how)
        for who in (("cudnn", ""), ("cuda", "cta"), ("triton", "walk"))
        for how in points.HOWS
    ]
    for unit in (Unit("triton", "walk", "graph"), Unit("cuda", "cta", "graph")):
        assert "different lengths" in points.left_out(ragged, unit)
    assert not points.left_out(ragged, Unit("triton", "walk", "calls"))
    assert not points.left_out(ragged, Unit("cudnn", "", "graph"))
    long = Point(replace(point.workload, T=5000), "bfloat16", "forward")
    assert "launches" in points.left_out(long, Unit("triton", "step", "calls"))
    assert not points.left_out(long, Unit("triton", "grid-resident", "calls"))


@pytest.mark.parametrize(
    "name, kind, expected",
    [
        ("flashrnn-point", "float16", ["team-grid", "grid-resident", "step"]),
        ("ptb-large", "bfloat16", ["team-grid", "grid", "step"]),
        ("ptb-large", "float32", ["grid", "step"]),
        ("small-b1-h128-gru", "bfloat16", ["cta", "walk"]),
        ("small-b1-h128-gru", "tf32", ["cta", "grid-resident", "step"]),
        ("small-b1-h128-lstm", "tf32", ["team-cluster", "team-grid", "grid-resident", "step"]),
        ("small-b1-h64-gru", "float32", ["cta", "grid", "step"]),
        ("types-proj-b1-h64-lstm", "float16", ["walk"]),
    ],
)
def test_the_forms_that_a_point_takes(name, kind, expected):
    point = Point(by_name(name), kind, "forward")
    assert forms.forms(point.typed, kind, KINDS) == expected
    ours = {
        name: [f for f in expected if points.contender(f) == name] for name in ("cuda", "triton")
    }
    assert forms.forms(point.typed, kind, TRITON) == ours["triton"]
    one = KINDS._replace(contenders=("cuda",))
    assert forms.forms(point.typed, kind, one) == ours["cuda"]


def test_the_planned_form_comes_first():
    """And is the one that a row's sizes say."""
    for point in points.points("team-* cta-*-h128-b8-t512"):
        unit = points.units(point, forms.forms(point.typed, point.type, KINDS))[2]
        row = {k: str(v) for k, v in point.fields().items()}
        assert forms.planned(row | {"way": "training"}, KINDS.cuda) == unit.form


def test_a_point_that_none_of_ours_runs_is_not_measured():
    point = Point(by_name("flashrnn-point"), "float32", "forward")
    assert timings._open(point, {}, KINDS._replace(contenders=("cuda",))) is None
    assert timings._open(point, {}, KINDS) is not None


@pytest.mark.parametrize(
    "kernel, expected",
    [
        ("forward_lstm_bfloat16_128", "lstm / forward / cta / bfloat16"),
        ("backward_rnn_tanh_tf32_64", "rnn_tanh / backward / cta / tf32"),
        ("forward_rnn_tanh_float16_cluster", "rnn_tanh / forward / team-cluster / float16"),
        ("backward_lstm_tf32_grid", "lstm / backward / team-grid / tf32"),
        ("previous_rows_float16_256", "None"),
    ],
)
def test_what_a_kernel_of_cuda_is_called(kernel, expected):
    assert str(forms._launch_of_cuda(kernel)) == expected


def test_kernels_are_compiled_once_for_a_class():
    built = build.Built(KINDS, 1, 1.0, "", Suspects())
    one = Point(by_name("small-b1-h64-gru"), "bfloat16", "forward")
    built.classes.add(built._class(one))
    for same in ("small-b4-h64-gru", "peers-t200-b16-i64-h64-gru", "rl-policy-b2048-h64"):
        assert replace(one, workload=by_name(same), way="training") in built
    for other in ("small-b1-h64-lstm", "small-b1-h128-gru", "streaming-h128-gru"):
        assert replace(one, workload=by_name(other)) not in built
    assert replace(one, type="float16") not in built
    every = list(points.points(None))
    assert len({built._class(p) for p in every}) < len(every) / 10


def test_a_form_that_fails_too_often_is_left_alone():
    suspects = Suspects()
    point = Point(by_name("tiny-layer"), "bfloat16", "forward")
    suspects.blame(point, "walk", "hang: no sign for 12 s")
    assert not suspects.reason(point, "walk")
    suspects.blame(replace(point, way="training"), "walk", "hang: no sign for 12 s")
    assert "gru walk bfloat16 failed too often, first at tiny-layer: hang" in suspects.reason(
        point, "walk"
    )
    assert not suspects.reason(replace(point, type="tf32"), "walk")
    assert not suspects.reason(point, "step")
    for _ in range(3):
        assert not suspects.reason(point, "grid")
        suspects.blame(point, "grid", "RuntimeError: out of memory")
    suspects.blame(point, "grid", "RuntimeError: out of memory")
    assert suspects.reason(point, "grid")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("off", [0.0, 0.5, 1.0, 1.9, 2.5, 4.0, 30.0])
def test_the_rule_is_that_of_the_tests(dtype, off):
    random = torch.Generator().manual_seed(0)
    truth = torch.randn(50, generator=random, dtype=torch.float64)
    noise = 20 * torch.finfo(dtype).eps * torch.randn(50, generator=random, dtype=torch.float64)
    theirs, ours = (truth + noise).to(dtype), (truth + off * noise).to(dtype)
    try:
        rules.check_close(ours, theirs, truth, dtype, "")
        allowed = True
    except pytest.fail.Exception:
        allowed = False
    assert (numbers.too_far([ours], [theirs], [truth]) == "") == allowed == (off < 2.5)


def test_products_in_tf32_are_as_coarse_as_their_operands():
    truth = torch.linspace(-1, 1, 50, dtype=torch.float64)
    ours = (truth + 3 * numbers.TF32).float()
    assert numbers.too_far([ours], [truth.float()], [truth])
    assert not numbers.too_far([ours], [truth.float()], [truth], eps=numbers.TF32)
    assert numbers.too_far([ours + 2 * numbers.TF32], [ours * 0 + truth], [truth], eps=numbers.TF32)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_the_measure_of_tf32(kind, monkeypatch):
    """It is torch.nn's layer but for the rounding of what products take, gradients' too."""
    torch.manual_seed(0)
    module = getattr(torch.nn, kind)(5, 6, 2, bidirectional=True).double()
    x = torch.randn(7, 3, 5, dtype=torch.float64)

    def values(call):
        inputs = [x.clone().requires_grad_(), *module.parameters()]
        y, state = call(inputs[0])
        outputs = [y, *(state if isinstance(state, tuple) else (state,))]
        grads = torch.autograd.grad([o.square().sum() for o in outputs], inputs)
        return [t.detach() for t in (*outputs, *grads)]

    truth = values(module)
    for found, exact in zip(values(lambda x: tf32.layer(module, x)), truth, strict=True):
        off = float((found - exact).abs().max() / exact.abs().max())
        assert 1e-6 < off < 4 * numbers.TF32
    monkeypatch.setattr(tf32, "rounded", lambda x: x)
    for found, exact in zip(values(lambda x: tf32.layer(module, x)), truth, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-12, atol=1e-12)
    some = torch.tensor([1.0, 1.0 + 2**-10, 1.0 + 2**-11, 1.0 + 2**-12, -torch.inf])
    monkeypatch.undo()
    assert tf32.rounded(some).tolist() == [1.0, 1.0 + 2**-10, 1.0 + 2**-10, 1.0, -torch.inf]


def test_numbers_that_say_nothing():
    x = torch.linspace(-1, 1, 5)
    assert numbers.wrong([x], [x]) == "" == numbers.wrong([x + 0.1], [x])
    assert "off by 1" in numbers.wrong([x, x + 1], [x, x])
    assert "h_n: shape (5, 1), torch.nn's is (5,)" in numbers.too_far(
        [x[:, None]], [x], [x], ["h_n"]
    )
    assert "1 of 5 in output 0 are not finite" in numbers.wrong([x / x.where(x != 0, 0)], [x])
    assert numbers.wrong([x[:0]], [x[:0]]) == "" == numbers.too_far([x[:0]], [x[:0]], [x[:0]])


# Results


def row(
    name="tiny-layer", kind="bfloat16", way="forward", unit=("triton", "walk", "calls"), **more
):
    point, unit = Point(by_name(name), kind, way), Unit(*unit)
    found = dict.fromkeys(FIELDS, "") | point.fields() | unit._asdict() | COLUMNS | more
    return {k: str(v) for k, v in found.items()}


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(results, "same_code", lambda name, now: name == now)
    return tmp_path


def results_in(folder, columns=COLUMNS, again=False):
    return results.Results(folder, columns, folder.parent / "copies", again)


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_was_measured_is_not_measured_again(folders):
    """By an earlier command, by the files that are kept, or half of a point; of this code alone."""
    first = results_in(folders / "one")
    first.add(row(ms="1.0"))
    first.add(row(unit=("cudnn", "", "graph"), ms="2.0"))
    first.set_cases([Case("tests/test_gpu.py::test_a", "passed", 1.0)])
    assert list(read(folders / "one/gpu.csv")[0]) == FIELDS
    (folders / "kept/a-gpu").mkdir(parents=True)
    kept = folders / "kept/a-gpu/gpu.csv"
    results._append(kept, [row(way="training", ms="3.0"), row("tiny-ragged", commit="older00")])
    with kept.open("a") as file:
        file.write("half a row")

    second = results_in(folders / "two")  # the first's folder is not there any more
    assert second.carried == (3, 1)
    key = ("tiny-layer", "bfloat16", "forward")
    known = second.measured()
    assert known[key] == {Unit("triton", "walk", "calls"), Unit("cudnn", "", "graph")}
    assert (*key[:2], "training") in known and ("tiny-ragged", *key[1:]) not in known
    assert len(read(folders / "two/gpu.csv")) == 3, "the new folder is complete"
    assert len(results._read(kept)) == 2, "half a row is none"
    assert results_in(folders / "two", COLUMNS | {"commit": "other00"}).carried == (0, 0)
    assert results_in(folders / "two", again=True).carried == (0, 0)
    assert results_in(folders / "two", COLUMNS | {"device": "Another"}).carried == (0, 0)
    broken = folders / "three"
    broken.mkdir()
    (broken / "gpu.csv").write_text("name,ms\nx,1\n")
    (broken / "tests.xml").write_text("<half")
    assert results_in(broken).carried == (3, 1)


def test_a_time_is_tested_where_the_loops_it_needs_are_green(folders):
    def case(outcome, *launched, name="t"):
        return Case(f"tests/test_gpu.py::{name}", outcome, 1.0, "why\nE  wrong", list(launched))

    forward, backward = (f"gru / {way} / walk / bfloat16" for way in ("forward", "backward"))
    found = results_in(folders / "out")
    for way in ("forward", "training"):
        found.add(row(way=way, ms="1"))
    found.add(row(unit=("cudnn", "", "calls"), ms="2"))
    assert [r["tested"] for r in found.rows] == ["", "", ""]
    found.set_cases([case("passed", forward)])
    found.write_rows()
    assert [r["tested"] for r in read(folders / "out/gpu.csv")] == ["yes", "", ""]
    found.set_cases([case("passed", forward, backward, name="u")])
    found.write_rows()
    assert [r["tested"] for r in found.rows] == ["yes", "yes", ""]
    found.set_cases([case("lost", forward, backward, name="v")])
    found.write_rows()
    assert [r["tested"] for r in found.rows] == ["no", "no", ""], "one red test is enough"
    # a file tells the same
    cases, properties = junit.read(folders / "out/tests.xml")
    assert properties["commit"] == "abc1234"
    assert [c.outcome for c in cases] == ["passed", "passed", "lost"]
    assert junit.verdicts(cases) == found.verdicts() == {forward: "no", backward: "no"}
    assert cases[2].nodeid == "tests/test_gpu.py::v" and cases[2].launched == [forward, backward]
    assert junit.tested([forward], {}) == "" and junit.tested([], {}) == "yes"


def test_no_speed_is_said_without_a_green_test(folders):
    found = results_in(folders / "out")
    loops = [f"{cell} / forward / walk / bfloat16" for cell in ("gru", "lstm")]
    found.set_cases([Case("a::b", "passed", launched=loops[:1])])
    for name, more in (("tiny-layer", {}), ("tiny-ragged", {})):
        found.add(row(name, unit=("cudnn", "", "calls"), ms="3.0"))
        found.add(row(name, ms="2.0", **more))
    text = summary.speed_ups(found.rows, found)
    green, unknown = text.splitlines()[2:]
    assert green.endswith("| 3 | 2 | 1.50x |") and unknown.endswith("| 3 | 2 | not tested |")
    found.set_cases([Case("a::c", "failed", launched=loops)])
    assert "x |" not in summary.speed_ups(found.rows, found)
    assert "tests red" in summary.speed_ups(found.rows, found)
    found.cases = {"a::b": found.cases["a::b"]}
    found.rows[1]["error"] = "numbers: off"
    assert "numbers off" in summary.speed_ups(found.rows, found)
    assert summary.faults(found.rows) == ["tiny-layer bfloat16 forward walk calls: numbers: off"]
    found.rows[0]["error"], found.rows[1]["error"] = "out of memory", "left out: no memory"
    assert not summary.faults(found.rows)


def test_the_summary_of_cuda(folders):
    """The geometric mean of green times alone, in and out of cuDNN's window."""
    found = results_in(folders / "out")
    ways = [f"{cell} / forward / cta / {kind}" for cell, kind in (("lstm", "float16"),)]
    ways += ["lstm / forward / cta / bfloat16"]
    found.set_cases([Case("a::b", "passed", launched=ways)])
    every = {p.key: p for p in points.points("cta-lstm-h128-* cta-gru-h128-*")}

    def add(name, kind, theirs, ours, **more):
        point = every[name, kind, "forward"]
        for unit, ms in ((("cudnn", "", "graph"), theirs), (("cuda", "cta", "graph"), ours)):
            fields = dict.fromkeys(FIELDS, "") | point.fields() | Unit(*unit)._asdict() | COLUMNS
            fields |= {"ms": ms} | (more if unit[0] == "cuda" else {})
            found.add({k: str(v) for k, v in fields.items()})

    add("cta-lstm-h128-b1-t512", "bfloat16", 2.048, 0.256)
    add("cta-lstm-h128-b8-t512", "bfloat16", 1.0, 0.5)
    add("cta-lstm-h128-b1-t512", "float16", 0.9, 1.0)
    add("cta-lstm-h128-b1-t2048", "bfloat16", 9.0, 0.8, error="numbers: off")
    add("cta-gru-h128-b1-t512", "bfloat16", 9.0, 0.512)
    text = summary.of_cta(found.rows, found)
    head, _, outside, inside, *_ = text.splitlines()
    assert "geometric mean" in head
    expected = "| forward | graph | outside | 4.00x | 2.00x | lstm-h128-b8-t512 bfloat16 | 2 of 2 |"
    assert outside == expected
    assert "| inside | 0.90x | 0.90x | lstm-h128-b1-t512 float16 | 0 of 1 |" in inside
    assert "lstm bfloat16 0.500 us (T = 512); lstm float16 1.953 us" in text
    assert "2 times are not counted" in text
    assert "cta" in summary.page(summary.Run(found, {}))
    assert summary.of_cta(found.rows[:1], found) == ""


def test_the_summary_of_teams(folders):
    """As planned, then by form; both count where the device holds both."""
    found = results_in(folders / "out")
    launched = [
        f"lstm / {way} / {form} / {kind}"
        for way in ("forward", "backward")
        for form in points.TEAMS
        for kind in ("bfloat16", "float16")
    ]
    found.set_cases([Case("a::b", "passed", launched=launched)])
    every = {p.key: p for p in points.points("team-*")}

    def add(name, kind, way, **ms):
        for who, taken in ms.items():
            form = "" if who == "cudnn" else f"team-{who}"
            point = every[name, kind, way]
            unit = Unit("cuda" if form else "cudnn", form, "graph")
            fields = dict.fromkeys(FIELDS, "") | point.fields() | unit._asdict() | COLUMNS
            found.add({k: str(v) for k, v in (fields | {"ms": taken}).items()})

    add("team-lstm-h256-b1-t1024", "bfloat16", "training", cudnn=8, cluster=1.024, grid=2)
    add("team-lstm-h512-b16-t1024", "bfloat16", "training", cudnn=1, cluster=2, grid=1)
    add("team-lstm-h512-b16-t1024", "float16", "training", cudnn=1, cluster=2)
    add("team-lstm-h768-b16-t1024", "bfloat16", "forward", cudnn=4, grid=2.048)
    add("team-gru-h768-b16-t1024", "bfloat16", "forward", cudnn=4, grid=2.048)
    text = summary.of_teams(found.rows, found, KINDS.cuda)
    worst = "lstm-h512-b16-t1024"
    assert f"| as planned | training | graph | outside | 1.98x | 0.50x | {worst} bfloat16" in text
    assert f"| team-cluster | training | graph | inside | 0.50x | 0.50x | {worst} float16" in text
    assert "| team-grid | training | graph | outside | 2.00x | 1.00x |" in text
    assert "T = 1024, B = 16, H = 768, in a graph: lstm bfloat16 team-grid forward 2.00" in text
    assert "lstm bfloat16 team-cluster training 1.00; lstm bfloat16 team-grid training 1.95" in text
    assert "1 times are not counted" in text
    assert "## cuda beside cuDNN, by teams" in summary.page(summary.Run(found, {}))
    assert summary.of_teams(found.rows[:1], found, KINDS.cuda) == ""


def test_which_code_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTSEQ_COMMIT", "given00")
    assert version.commit() == version.state() == "given00"
    monkeypatch.delenv("FASTSEQ_COMMIT")
    monkeypatch.setattr(version.subprocess, "run", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        version.commit()

    def no_git(*command, **options):
        raise FileNotFoundError("git")

    monkeypatch.setattr(version.subprocess, "run", no_git)
    monkeypatch.setattr(version, "FILE", tmp_path / "commit")
    assert version.commit() == "unversioned"
    assert version.state().startswith("unversioned.") and not version.same_code("a", "b")
    (tmp_path / "commit").write_text("file000\n")
    assert version.commit() == version.state() == "file000"


# Children


def trouble(task):
    """A task is what it does to its process."""
    yield f"begins {task}"
    crew.doing(f"{task} now", 0.7)
    if task == "hang":
        ctypes.CDLL(None).sleep(60)
    if task == "held":  # as a driver's call that keeps Python's lock
        ctypes.PyDLL(None).sleep(60)
    if task == "lost":
        os.kill(os.getpid(), signal.SIGKILL)
    if task == "raise":
        raise ValueError("of its own")
    if task == "leave":
        raise crew.Leave
    yield f"ends {task} in {os.getpid()}"


def test_a_task_may_end_or_stop_its_child():
    tasks = ["good", "hang", "held", "lost", "raise", "leave", "good", "good"]
    waiting = iter(tasks)
    events = list(crew.crew(lambda: next(waiting, None), trouble, Clock(60), silence=20))
    ended = [e for e in events if e.kind != "told"]
    kinds = ["done", "lost", "lost", "lost", "failed", "done", "done", "done"]
    assert [e.kind for e in ended] == kinds and [e.task for e in ended] == tasks
    assert [e.message for e in events if e.kind == "told" and "begins" in e.message] == [
        f"begins {task}" for task in tasks
    ], "what was told before stays"
    assert ended[1].text == ended[2].text == "hang: no sign for 1 s"
    assert "SIGKILL" in ended[3].text and ended[4].text == "ValueError: of its own"
    assert [e.doing for e in ended[1:5]] == ["hang now", "held now", "lost now", "raise now"]
    where = [e.message.split()[-1] for e in events if e.kind == "told" and "ends" in e.message]
    assert len(where) == 3 and where[1] == where[2] != where[0], "a good child is used again"


def test_the_time_ends_for_all_children():
    waiting = iter(["sleep"] * 5)

    def work(task):
        crew.doing(task, 60)
        time.sleep(60)
        yield

    found = list(crew.crew(lambda: next(waiting, None), work, Clock(0.5), processes=2))
    assert [e.kind for e in found] == ["stopped"] * 2


def test_a_task_that_goes_on_and_on_is_stopped():
    waiting = iter(["slow"])

    def work(task):
        for _ in range(600):
            crew.tick()
            time.sleep(0.1)
        yield

    (event,) = crew.crew(lambda: next(waiting, None), work, Clock(60), limit=0.5)
    assert event.kind == "lost" and event.text == "hang: not ended after 0 s"


def unlucky(task):
    """A child of bench.gpu.timings: it tells cuDNN's time, and hangs at the first of ours."""
    ours = [u for u in task.todo if u.contender == "triton"]
    yield "provisional", Unit("cudnn", "", "graph"), {"ms": "1.0"}
    if ours:
        crew.doing(f"triton {ours[0].form} {ours[0].how} samples", 0.5)
        ctypes.CDLL(None).sleep(60)
    if task.silence:  # the last of the tasks ends with the time
        crew.doing("cudnn - graph samples", 60)
        ctypes.CDLL(None).sleep(60)


def test_what_a_child_told_stays_when_it_is_lost(monkeypatch):
    """A hang is blamed on what the child was at; when the time ends cuDNN's first time stands."""
    monkeypatch.setattr(timings, "measure", unlucky)
    monkeypatch.setattr(timings, "LEAST", 0.0)
    suspects = Suspects()
    built = build.Built(TRITON, 1, 1.0, "", suspects)
    point = Point(by_name("small-b4-h256-lstm"), "bfloat16", "forward")
    some = [timings._open(replace(point, type=kind), {}, TRITON) for kind in ("bfloat16", "tf32")]
    kept = []
    ended = timings.measured(
        some,
        built,
        Clock(3),
        timings.Options(silence=9),
        lambda point, unit, fields: kept.append((point.type, unit, fields)),
    )
    assert ended == 0 and {kind for kind, *_ in kept} == {"bfloat16"}
    assert kept[-1] == ("bfloat16", Unit("cudnn", "", "graph"), {"ms": "1.0"})
    hung = [unit for _, unit, fields in kept if "hang: no sign" in fields.get("error", "")]
    larger = ["grid-resident", "step"]
    assert hung == [u for u in points.units(point, larger) if u.form]
    assert suspects.weights == {("lstm", form, "bfloat16"): 4 for form in ("grid-resident", "step")}
    assert timings._open(point, {point.key: {u for _, u, _ in kept}}, TRITON).todo == [
        Unit("cudnn", "", "calls")
    ]


# Tests that are lost

HEAD = '''
import ctypes, os, signal
import pytest

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def launches(request):
    """As the plugin hears them; a walk in every test, and what the test is named for. No test runs
    in a process that met a CUDA error."""
    assert "BROKEN" not in os.environ
    recorder = request.config.pluginmanager.get_plugin("fastseq-gpu-recorder")
    recorder.heard("walk", False)
    recorder.heard(request.node.name.partition("[")[0].removeprefix("test_"), False)


@pytest.mark.parametrize("k", range(6))
def test_good(k):
    pass


@pytest.mark.core
def test_core():
    pass
'''
LOST = """

def test_hang():
    ctypes.CDLL(None).sleep(60)


def test_held():
    ctypes.PyDLL(None).sleep(60)


def test_killed():
    os.kill(os.getpid(), signal.SIGKILL)
"""
FAILED = """

def test_sticky():
    os.environ["BROKEN"] = "yes"
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_red():
    assert 1 + 1 == 3


@pytest.mark.skip(reason="not here")
def test_skipped():
    pass
"""
FATES = {
    "core": "passed",
    "hang": "lost",
    "held": "lost",
    "sticky": "failed",
    "red": "failed",
    "killed": "lost",
    "skipped": "skipped",
}
FATES |= {f"good[{k}]": "passed" for k in range(6)}


@pytest.fixture
def troubled(tmp_path):
    file = tmp_path / "test_trouble.py"
    file.write_text(HEAD + LOST + FAILED)
    return testing.Options("gpu", (str(file),), processes=2, limit=1.0)


def run_tests(options, tmp_path, known=(), seconds=100):
    said, kept = [], []
    cases, left = testing.run(
        options, Clock(seconds), known, said.append, tmp_path / "log.txt", kept.append
    )
    return {c.nodeid.partition("::test_")[2]: c for c in cases}, left, said, kept


def test_red_and_lost_tests_stop_no_other(troubled, tmp_path, monkeypatch):
    pytest.importorskip("xdist")
    monkeypatch.setattr(testing, "ENOUGH", 99)
    cases, left, said, kept = run_tests(troubled, tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert {name: case.outcome for name, case in cases.items()} == FATES, log
    assert not left and kept
    assert "it ran past its limit" in cases["hang"].text and "test_hang" in cases["hang"].text
    assert "it ran past its limit" in cases["held"].text
    assert "its process ended" in cases["killed"].text
    assert "assert (1 + 1) == 3" in cases["red"].text
    assert sum("LOST" in line for line in said) == 3
    assert cases["hang"].launched == ["walk", "hang"] and cases["core"].launched == ["walk", "core"]
    found = junit.verdicts(cases.values())
    assert found["good"] == "yes" and found["walk"] == found["killed"] == "no"


def test_a_process_that_met_a_cuda_error_runs_no_other_test(troubled, tmp_path):
    pytest.importorskip("xdist")
    Path(troubled.files[0]).write_text(HEAD + FAILED)
    cases, left, _, _ = run_tests(replace(troubled, processes=1), tmp_path)
    assert {name: case.outcome for name, case in cases.items()} == {
        name: fate for name, fate in FATES.items() if fate != "lost"
    }
    assert "assert (1 + 1) == 3" in cases["red"].text and not left


@pytest.mark.full
def test_without_xdist_one_after_another(troubled, tmp_path, monkeypatch):
    """What is known already is not run; what too many lost tests launched is launched no more."""
    monkeypatch.setattr(testing, "find_spec", lambda name: None if name == "xdist" else True)
    monkeypatch.setattr(testing, "ENOUGH", 2)
    core, left, _, _ = run_tests(replace(troubled, mark="core"), tmp_path)
    assert core.keys() == {"core"} and not left
    known = [case.nodeid for case in core.values()]
    cases, left, said, _ = run_tests(troubled, tmp_path, known)
    assert not left and "pytest-xdist is missing" in said[0]
    assert cases.keys() == FATES.keys() - {"core"}
    assert cases["hang"].outcome == cases["held"].outcome == "lost"
    late = cases["red"], cases["sticky"], cases["killed"]
    assert all("not launched: walk" in case.text for case in late)
    assert sum("go on in another" in line for line in said) == 2


@pytest.mark.full
def test_the_time_ends_for_tests(troubled, tmp_path):
    options = replace(troubled, limit=60)
    cases, left, _, _ = run_tests(options, tmp_path, seconds=4)
    assert "hang" not in cases and any(name.endswith("test_hang") for name in left)


# The whole


def rehearse(folder, *arguments, faults=None, timeout=100, **environment):
    command = [sys.executable, "-m", "bench.gpu", "--preload", "tests.helpers.fake_gpu", *arguments]
    command += [
        "--out",
        str(folder),
        "--keep",
        str(folder),
        "--processes",
        "2",
        "--seconds",
        "0.002",
    ]
    given = outside(
        FAKE_GPU=json.dumps(faults or {}), FASTSEQ_COMMIT=f"{folder.name}", **environment
    )
    done = subprocess.run(
        command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=timeout
    )
    return done, done.stdout + done.stderr


def test_a_rehearsal(tmp_path):
    """A hang, a CUDA error that stays, a lost child and wrong numbers: every other row is there."""
    cases = [
        Case("t::a", "passed", launched=["lstm / forward / step / bfloat16"]),
        Case("t::b", "failed", launched=["lstm / forward / step / float16"]),
    ]
    junit.write(
        tmp_path / "tests.xml", cases, COLUMNS | {"device": "Fake H100", "commit": tmp_path.name}
    )
    faults = {
        "lstm backward grid-resident bfloat16": "held",
        "lstm forward grid-resident float16": "sticky",
        "lstm backward step float16": "lost",
        "lstm forward grid-resident tf32": "wrong",
    }
    arguments = ("--stages", "bench", "--workloads", "fake-wide", "--hang", "3")
    arguments += ("--contenders", "triton")
    done, text = rehearse(tmp_path, *arguments, "--minutes", "1.3", faults=faults)
    assert done.returncode == 1, text
    rows = {tuple(r[k] for k in results.KEYS[1:]): r for r in read(tmp_path / "gpu.csv")}
    assert list(next(iter(rows.values()))) == FIELDS
    expected = {
        (kind, way, contender, form, how)
        for kind, larger in zip(points.TYPES, ["grid-resident"] * 3 + ["grid"], strict=True)
        for way in ("forward", "training")
        for contender, form in (("cudnn", ""), ("triton", larger), ("triton", "step"))
        for how in points.HOWS
    }
    assert rows.keys() == expected, text
    for (kind, way, _, form, how), found in rows.items():
        where = f"{kind} {way} {form} {how}: {found['error']}"
        if form == "grid-resident" and (kind, way) != ("bfloat16", "forward"):
            words = {"bfloat16": "hang: no sign", "float16": "CUDA error", "tf32": "numbers: "}
            assert words[kind] in found["error"] and not found["ms"], where
        elif (kind, way, form) == ("float16", "training", "step"):
            assert "SIGKILL" in found["error"], where
        else:
            assert float(found["ms"]) > 0 and not found["error"], where
    assert rows["bfloat16", "forward", "triton", "step", "calls"]["tested"] == "yes"
    assert rows["bfloat16", "training", "triton", "step", "calls"]["tested"] == ""
    assert rows["float16", "forward", "triton", "step", "calls"]["tested"] == "no"
    page = (tmp_path / "summary.md").read_text()
    assert page in done.stdout and "FAILED" in page
    speeds = [line for line in page.splitlines() if line.startswith("| fake-wide")]
    assert len(speeds) == 16
    said = [line for line in speeds if "x |" in line]
    assert len(said) == 1 and "| bfloat16 | forward | triton step |" in said[0]
    assert "hang: no sign" in page and "sys.path" not in page


def test_the_sanitizer_finds_something_or_does_not_work(tmp_path, monkeypatch):
    """A tool in its place, which answers by what it is asked for."""
    said = []
    log = tmp_path / "sanitize.log"
    fake = tmp_path / "compute-sanitizer"
    monkeypatch.setattr(sanitize, "tool", lambda name: None)
    passed, text = sanitize.run(Clock(20), log, 9, None, said.append)
    assert passed and text == "left out: no compute-sanitizer on this machine"
    monkeypatch.setattr(sanitize, "tool", lambda name: str(fake))

    def answers(script):
        fake.write_text("#!/bin/sh\necho checked $*\n" + script)
        fake.chmod(0o755)
        return sanitize.run(Clock(20), log, 2, "tests.helpers.fake_gpu", said.append)

    passed, text = answers("exit 3")
    assert passed and "a probe ended with status 3" in text
    passed, text = answers('case "$*" in *racecheck*step*|*racecheck*walk*) exit 9;; esac')
    assert not passed and text == "23 clean; found something: racecheck walk"
    assert "sanitize: racecheck walk: FOUND something" in said
    text = log.read_text()
    assert "memcheck --error-exitcode 9" in text and "--exercise cta --preload" in text
    assert "--exercise grid-resident --preload tests.helpers.fake_gpu" in text
    odd = [line for line in text.splitlines() if "initcheck" in line and "checked" in line]
    assert len(odd) == 5 and all("-odd --preload" in line for line in odd)
    race = "echo 'Error: Race reported between Read access at {}+0xaf0'\n"
    race += "echo '    and Write access at {}+0x29b0 [16 hazards]'\n"
    for kernels, right in ((("nvjet_sm90_h",) * 2, True), (("nvjet_sm90_h", "lstm_walk"), False)):
        script = 'case "$*" in *racecheck*cta*)\n' + race.format(*kernels) + "exit 9;; esac"
        passed, text = answers(script)
        assert passed is right and ("found something: racecheck cta" in text) is not right
        assert answers(script.replace("racecheck", "initcheck"))[0] is False
    passed, text = answers('case "$*" in *initcheck*) sleep 60;; *synccheck*) exit 5;; esac')
    teams = [f"{tool} {form}" for form in points.TEAMS for tool in ("synccheck", "initcheck")]
    names = "synccheck cta, initcheck cta, synccheck grid-resident, initcheck walk"
    assert passed and text == f"14 clean; without a verdict: {', '.join(teams)}, {names}"
    said.clear()
    sanitize.run(Clock(20), log, 2, "tests.helpers.fake_gpu", said.append, ["cuda"])
    assert len(said) == 16 and sum(" cta: " in line for line in said) == 4
    assert sum(" team-" in line for line in said) == 12


@pytest.mark.full
def test_a_rehearsal_of_everything(tmp_path):
    """The core of the GPU's own tests, and what follows from them, with faults."""
    faults = {
        "gru forward walk bfloat16": "held",
        "lstm forward step float16": "sticky",
        "rnn_tanh backward grid tf32": "lost",
        "rnn_tanh forward walk float32": "wrong",
        "gru backward cta float16": "wrong",
        "lstm backward team-grid tf32": "wrong",
    }
    tool = tmp_path / "bin/compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\nwhile [ "${1##*/}" != "${PY##*/}" ]; do shift; done\nexec "$@"\n')
    tool.chmod(0o755)
    path = os.pathsep.join([str(tool.parent), os.environ["PATH"]])
    workloads = "fake-wide tiny-layer cta-*-h128-b1-t32"
    arguments = ["--stages", "smoke core bench sanitize", "--workloads", workloads]
    arguments += ["--minutes", "20", "--hang", "8", "--test-limit", "40"]
    done, text = rehearse(
        tmp_path, *arguments, faults=faults, timeout=1200, PATH=path, PY=sys.executable
    )
    assert done.returncode == 1, text
    cases = junit.read(tmp_path / "tests.xml")[0]
    assert len(cases) == 214, text
    red = {case.nodeid.partition("[")[2][:-1] for case in cases if case.red}
    expected = {"GRU-walk-64-bfloat16", "LSTM-step-200-float16", "RNN-walk-32-ieee"}
    expected |= {"GRU-cta-64-float16", "GRU-cta-128-float16", "gru-float16"}
    expected |= {"LSTM-team-grid-1024-tf32", "lstm-team-grid-600-tf32"}
    assert red == expected | {"RNN-grid-200-tf32"}, text
    rows = [r for r in read(tmp_path / "gpu.csv") if r["contender"] == "triton"]
    bad = {(r["cell"], r["form"], r["type"]) for r in rows if r["tested"] == "no"}
    assert bad == {("gru", "walk", "bfloat16"), ("lstm", "step", "float16")}
    assert {r["tested"] for r in rows if (r["cell"], r["type"]) == ("gru", "float16")} == {"yes"}
    cuda = [r for r in read(tmp_path / "gpu.csv") if r["contender"] == "cuda"]
    red = {(r["cell"], r["form"], r["type"]) for r in cuda if r["tested"] == "no"}
    assert red == {("gru", "cta", "float16"), ("lstm", "team-grid", "tf32")}
    assert {r["form"] for r in cuda} == {"cta", points.CLUSTER, points.GRID}
    wrong = [r for r in cuda if r["error"]]
    assert all(r["error"].startswith(("numbers: ", "left out: ")) for r in wrong) and wrong
    assert "cuda beside cuDNN, where one CTA holds a layer" in text and "| outside | " in text
    smoke = read(tmp_path / "smoke.csv")
    assert {r["form"] for r in smoke} == {"", *forms.FORMS}
    assert sum(r["name"].startswith("barrier-") for r in smoke) == 8
    words = "sanitize: 21 clean; without a verdict: memcheck walk, racecheck walk, initcheck walk"
    assert words in text, "which launch what hangs"
    names = {path.name for path in tmp_path.iterdir() if path.is_file()}
    expected = "gpu.csv smoke.csv tests.xml log.txt summary.md sanitize.log"
    assert names == set(expected.split())


@pytest.mark.full
def test_a_rehearsal_with_the_compiler(tmp_path):
    """Triton's own just-in-time compiler makes each form's kernels for sm_90; children that are not
    forked."""
    environment = {"FAKE_GPU_JIT": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    arguments = ["--stages", "smoke", "--minutes", "4", "--hang", "30", "--start", "spawn"]
    done, text = rehearse(tmp_path, *arguments, timeout=400, **environment)
    assert done.returncode == 0, text
    smoke = read(tmp_path / "smoke.csv")
    assert {r["form"] for r in smoke} == {"", *forms.FORMS}
    assert not any(r["error"] for r in smoke)
    names = {file.stem for file in (tmp_path / "cache").rglob("*.cubin")}
    kinds = ("walk", "grid", "step_0")
    expected = {f"{c}_forward_{kind}" for c in ("lstm", "gru") for kind in kinds}
    assert names >= expected | {"meet_kernel"}


def test_make_gpu_says_that_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}", "MINUTES=1", "STAGES=smoke", f"OUT={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=outside(),
    )
    assert done.returncode != 0 and "torch sees no CUDA device" in done.stdout


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--stages", "smoke nothing"], "--stages: expected some of smoke build core"),
        (["--minutes", "0"], "--minutes: expected more than 0, got 0"),
        (["--workloads", "nothing"], "no workload matches 'nothing'"),
        (["--types", "tf16"], "got 'tf16'"),
        (["--contenders", "cudnn"], "--contenders: expected some of cuda triton, got 'cudnn'"),
        (["--processes", "0"], "--processes: expected 1 or more"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2 and message in capsys.readouterr().err
