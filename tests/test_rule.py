"""From a GPU's results to the choice of a backend: made-up results, and what follows from them.

No figure here was measured.
"""

import csv
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from math import inf
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastseq
from bench import cuda_results, cuda_rule, rule, table
from fastseq.backends import choice, cuda_kernels, cuda_plan, load, measured_cuda
from fastseq.backends import cuda_rule as chooser
from fastseq.backends.contract import Abilities, Problem
from fastseq.nn.recurrent import call_stack
from fastseq.ops import stack as ops_stack
from fastseq.ops.geometry import Padded

FORMS = {"triton": "walk", "cuda": "cta"}
H100, H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
TRITON, TORCH = ("triton", "torch", "eager"), ("torch", "eager")
AFTER_TORCH = ("torch", "triton", "eager")

POINT = {
    "name": "made-up",
    "shape": "LSTM T100 B16 I128 H128",
    "cell": "lstm",
    "T": 100,
    "B": 16,
    "I": 128,
    "H": 128,
    "layers": 1,
    "directions": 1,
    "ragged": "no",
    "type": "bfloat16",
    "way": "forward",
    "samples": 50,
    "device": H100,
    "capability": "9.0",
    "torch": "2.11.0+cu130",
    "triton": "3.6.0",
    "cudnn": "91002",
    "fastseq": "0.1.0",
    "commit": "abc1234",
    "date": "2026-01-02 03:04",
}
#: What a call of that point asks for.
LSTM = Problem("lstm", torch.bfloat16, "cuda", T=100, B=16, I=128, H=128, P=128, capability="9.0")


def timed(contender, how, ms, **more):
    """A row: ms, or the words of an error."""
    found = {"error": ms} if isinstance(ms, str) else {"ms": ms, "best_ms": ms}
    if contender in FORMS:
        found |= {"form": FORMS[contender], "tested": "yes"}
    return POINT | {"contender": contender, "how": how} | found | more


def point(cudnn=2.0, triton=1.0, cudnn_graph=2.0, triton_graph=1.0, **more):
    """The four rows of a point; a time of None leaves its row out."""
    theirs = {k: v for k, v in more.items() if k not in ("form", "tested")}
    rows = [
        timed("cudnn", "graph", cudnn_graph, **theirs),
        timed("cudnn", "calls", cudnn, **theirs),
        timed("triton", "graph", triton_graph, **more),
        timed("triton", "calls", triton, **more),
    ]
    return [row for row in rows if row.get("ms", row.get("error")) is not None]


def behind(**more):
    return point(cudnn=1.0, triton=2.0, **more)


def of_cuda(calls, graph=None, **more):
    """The two rows of cuda at that point."""
    return [
        timed("cuda", "graph", calls if graph is None else graph, **more),
        timed("cuda", "calls", calls, **more),
    ]


def write(path, rows, columns=cuda_results.COLUMNS):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as sink:
        out = csv.DictWriter(sink, columns, restval="", extrasaction="ignore")
        out.writeheader()
        out.writerows(rows)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The rule and the docs in a folder of their own."""
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "performance.md").write_text(f"before\n{table.GPU_BEGIN}\n{table.GPU_END}\nafter\n")
    (tmp_path / "measured_cuda.py").write_text("")
    monkeypatch.setattr(cuda_rule, "DOCS", docs)
    monkeypatch.setattr(cuda_rule, "RULE", tmp_path / "measured_cuda.py")
    monkeypatch.setattr(cuda_rule, "committed", list)
    choice.judge.cache_clear()
    yield tmp_path
    choice.judge.cache_clear()


@pytest.fixture
def ruled(here, monkeypatch):
    """Lets the rule hold that follows from results, one file for each argument."""

    def follow(*files):
        paths = [write(here / str(k) / "gpu.csv", rows) for k, rows in enumerate(files)]
        source = cuda_rule.text(cuda_results.devices(paths))
        found = {}
        exec(compile(source, "measured_cuda.py", "exec"), found)
        names = "SOURCES MEASURED GREEN MEASURED_CUDA GREEN_CUDA MEASURED_REGIMES"
        for name in names.split():
            monkeypatch.setattr(measured_cuda, name, found[name])
        choice.judge.cache_clear()
        cuda_plan.regime_of.cache_clear()
        return source

    yield follow
    cuda_plan.regime_of.cache_clear()


def order(**changes):
    return choice.preferred(LSTM._replace(**changes))


# What is committed


def test_the_committed_rule_follows_from_the_committed_results():
    assert cuda_rule.main(["--check"]) == 0


@pytest.mark.parametrize(
    "expected, regime, cell, dtype, H, B",
    [
        ("cuda", "cta", "lstm", torch.bfloat16, 128, 1),
        ("cuda", "cluster", "lstm", torch.bfloat16, 256, 1),
        ("cuda", "cluster", "gru", torch.float16, 512, 16),
        ("cuda", "cluster", "lstm", torch.bfloat16, 512, 64),
        ("cuda", "grid", "lstm", torch.bfloat16, 768, 16),
        ("cuda", "grid", "lstm", torch.bfloat16, 1024, 64),
        ("cuda", "grid", "gru", torch.float16, 1024, 64),
        # where cuDNN keeps the weights on the chip
        ("torch", "grid", "lstm", torch.float16, 768, 16),
        # not measured
        ("torch", "grid", "lstm", torch.float16, 2048, 16),
        ("torch", "grid", "lstm", torch.float16, 1024, 256),
    ],
)
def test_what_the_committed_measurements_choose(expected, regime, cell, dtype, H, B):
    """Named, so that no kernel drops out of the choice unseen. Of calls without autograd."""
    if not cuda_results.committed():
        pytest.skip("no results beside the tests")
    asked = {"cell": cell, "dtype": dtype, "T": 1024, "B": B, "I": H, "H": H, "P": H}
    assert order(**asked)[0] == expected
    type = str(dtype).removeprefix("torch.")
    assert cuda_plan.regime_of(cell, type, H, B, 1, False, cuda_kernels.H200) == regime


def test_without_results_the_rule_is_empty():
    found = {}
    exec(compile(cuda_rule.text([]), "measured_cuda.py", "exec"), found)
    assert found["SOURCES"] == found["MEASURED"] == found["GREEN"] == {}
    assert found["MEASURED_REGIMES"] == {}
    assert "Not yet measured on a GPU" in cuda_rule.section([])
    if not cuda_results.committed():
        assert not measured_cuda.MEASURED and order() == TORCH


def test_a_rule_that_does_not_follow_is_found(here, capsys):
    files = [str(write(here / "gpu.csv", point()))]
    with pytest.raises(SystemExit):
        cuda_rule.main(["--check", *files])
    assert "measured_cuda.py, performance.md: not what gpu.csv give" in capsys.readouterr().err
    assert rule.main(["--gpu", *files]) == 0
    assert rule.main(["--gpu", "--check", *files]) == 0
    for name in ("measured_cuda.py", "docs/performance.md"):
        kept = (here / name).read_text()
        (here / name).write_text(kept.replace("2.0", "3.0").replace("2x", "3x"))
        with pytest.raises(SystemExit):
            rule.main(["--gpu", "--check", *files])
        (here / name).write_text(kept)
    with pytest.raises(SystemExit):
        rule.main(["--gpu", "--check"])
    assert "not what no results give" in capsys.readouterr().err


# The rule


def test_ahead(ruled):
    ruled(point())
    assert order() == TRITON
    assert order(T=1000, B=9, H=96) == TRITON, "of the same class"


NOT_AHEAD = {
    "behind": behind(),
    "ahead by too little": point(cudnn=1.049),
    "behind in a graph": point(triton_graph=2.1),
    "red": point(tested="no"),
    "not tested": point(tested=""),
    "triton failed": point(triton="CUDA error: made up"),
    "triton failed in a graph": point(triton_graph="CUDA error: made up"),
    "both failed": point(cudnn="out of memory", triton="out of memory"),
    "no time of cuDNN": point(cudnn=None),
    "no time of cuDNN in a graph": point(cudnn_graph=None),
    "no time of triton": point(triton=None),
    "no results": [],
    "a slow point of the class": point() + behind(name="other", B=32),
    "a slow replay of the class": point() + point(name="other", triton_graph=2.1),
    "a point that was not tested": point() + point(name="other", form="grid", tested=""),
    "a red one": point() + point(name="other", tested="no"),
}


@pytest.mark.parametrize("name", NOT_AHEAD)
def test_not_ahead(name, ruled):
    ruled(NOT_AHEAD[name])
    assert order()[0] == "torch"
    assert "torch stays" in choice.measured(LSTM) or choice.measured(LSTM).startswith("torch: ")


def test_cells_and_empty_batches_stay_with_torch(ruled):
    ruled(point(B=1, T=1, shape="LSTM T1 B1 I128 H128 cell"))
    assert order(B=1, T=1)[0] == "torch" and measured_cuda.MEASURED["9.0"] == {H100: {}}
    ruled(point(B=1))
    assert order(B=1) == TRITON and order(B=0)[0] == "torch"


def test_the_bounds(ruled):
    ruled(point(cudnn=1.05, cudnn_graph=1.0))
    assert order() == TRITON


OTHER = {
    "wider": {"H": 129},
    "narrower": {"H": 64},
    "16 does not divide it": {"H": 127},
    "larger batch": {"B": 33},
    "smaller batch": {"B": 8},
    "shorter": {"T": 99},
    "one step": {"T": 1},
    "longer than cuDNN takes": {"T": 65536},
    "no step": {"T": 0},
    "no sequence": {"B": 0},
    "layers": {"layers": 2},
    "directions": {"R": 2},
    "ragged": {"ragged": True},
    "projected": {"projected": True, "P": 64},
    "type": {"dtype": torch.float16},
    "float64": {"dtype": torch.float64},
    "training": {"training": True},
    "cell": {"cell": "gru"},
    "device": {"capability": "8.0"},
    "no device": {"capability": None},
    "AMD": {"device": "mps"},
}


@pytest.mark.parametrize("name", OTHER)
def test_another_class_stays_with_torch(name, ruled):
    ruled(point())
    assert order(**OTHER[name])[0] == "torch"
    if LSTM._replace(**OTHER[name]).device == "cuda":
        reason = choice.measured(LSTM._replace(**OTHER[name]))
        assert "not measured on this device" in reason or name == "no step"


@pytest.mark.parametrize(
    "results, asked",
    [
        ({"layers": 2, "shape": "LSTM T100 B16 I128 H128 x2"}, {"R": 2}),
        ({"ragged": "yes", "directions": 2}, {"ragged": True, "layers": 3}),
        ({"shape": "LSTM T100 B16 I128 H128 P64"}, {"projected": True, "P": 64}),
        ({"shape": "LSTM T100 B16 I128 H128 streaming"}, {"T": 1}),
        ({"T": 65536}, {"T": 70000}),
        ({"B": 129}, {"B": 512}),
        ({"B": 513}, {"B": 2048}),
        ({"H": 1500}, {"H": 1025}),
        ({"cell": "rnn"}, {"cell": "rnn_tanh"}),
        ({"way": "training"}, {"training": True}),
        ({"type": "float16"}, {"dtype": torch.float16}),
        ({"type": "tf32"}, {"dtype": torch.float32, "tf32": True}),
        ({"type": "float32"}, {"dtype": torch.float32}),
        ({"capability": "12.0"}, {"capability": "12.0"}),
    ],
)
def test_each_class_has_results_of_its_own(results, asked, ruled):
    ruled(point(**results))
    assert order(**asked) == TRITON
    assert order()[0] == "torch" and order(cell="rnn_relu", tf32=True)[0] == "torch"


def test_a_large_batch_says_nothing_of_a_larger():
    """Above 512 a CTA of cuda's has eight sequences in place of four."""
    assert chooser.size_of(128, 512, 100) != chooser.size_of(128, 513, 100)


def test_where_cudnn_cannot_run(ruled):
    assert "inf" in ruled(point("seq_len too long", 5.0, "seq_len too long", 5.0, T=65536))
    assert order(T=65536) == TRITON and order(T=100000) == TRITON
    assert order()[0] == "torch"
    assert "torch has no time here" in choice.measured(LSTM._replace(T=65536))
    assert measured_cuda.MEASURED["9.0"][H100]["lstm", "bfloat16", "forward"] == {
        "dense": {"H65-128 B9-32 T65536+": (inf, inf, 65536, True)}
    }


def test_the_shortest_sequence_that_was_measured(ruled):
    ruled(point(T=50) + point(T=400, name="longer"))
    assert order(T=50) == TRITON and order(T=49)[0] == "torch"


def test_ragged_sequences_need_no_graph_and_are_not_recorded(ruled):
    words = "left out: a CUDA graph cannot record sequences of different lengths"
    ruled(point(triton_graph=words, ragged="yes") + point(cudnn_graph=None, ragged="yes", B=1))
    ragged = LSTM._replace(ragged=True)
    assert choice.preferred(ragged) == choice.preferred(ragged._replace(B=1)) == TRITON
    assert choice.preferred(ragged._replace(recording=True)) == TORCH
    assert "cannot be recorded" in choice.measured(ragged._replace(recording=True))


# Rows


def test_the_form_counts_that_runs_where_none_is_asked_for(ruled):
    step = [row for row in behind(form="step") if row["contender"] == "triton"]
    ruled(point(form="grid") + step)
    assert order() == TRITON
    step = [row for row in point(form="step") if row["contender"] == "triton"]
    ruled(step + behind(form="grid-resident"))
    assert order()[0] == "torch"
    ruled(point(form="step"))
    assert order() == TRITON


def test_tests_that_ran_later_count_for_the_same_code_and_form(ruled):
    """Of the same device, commit, cell, type and way."""
    later = {"name": "other", "B": 1}
    ruled(point(tested="") + point(**later))
    assert order() == TRITON
    others = [{"commit": "def"}, {"cell": "gru"}, {"type": "tf32"}, {"way": "training"}]
    for other in (*others, {"form": "grid"}):
        ruled(point(tested="") + point(**later, **other))
        assert order()[0] == "torch", other
    ruled(point(tested=""), point(**later, device=H200))
    assert order()[0] == "torch"
    ruled(point(tested="yes") + point(**later, tested="no"))
    assert order()[0] == "torch"


def test_of_rows_that_measured_the_same_the_later_counts(ruled):
    ruled(behind(date="2026-01-01 00:00") + point())
    assert order() == TRITON
    ruled(point() + behind(date="2026-01-01 00:00"))
    assert order() == TRITON
    ruled(point(), behind(date="2026-01-03 00:00"))
    assert order()[0] == "torch", "in another file, of the same device"


def test_rounding_makes_nothing_ahead(ruled):
    ruled(point(cudnn=1.0499999))
    assert order()[0] == "torch"
    classes = measured_cuda.MEASURED["9.0"][H100]["lstm", "bfloat16", "forward"]
    assert classes == {"dense": {"H65-128 B9-32 T2+": (1.049, 2.0, 100, True)}}


# Devices


def test_two_devices_of_one_capability(ruled):
    ruled(point(cudnn=3.0, T=50), point(device=H200))
    assert order() == order(T=50) == TRITON
    assert "2.00 times as fast as torch here, or more (NVIDIA H200," in choice.measured(LSTM)
    ruled(point(), behind(device=H200))
    assert order()[0] == "torch"
    assert choice.measured(LSTM).startswith(
        "torch: 2.00 times as fast as triton here (NVIDIA H200,"
    )
    ruled(point(cudnn=1.5), point(triton_graph=4.0, device=H200))
    assert "in a CUDA graph (NVIDIA H200," in choice.measured(LSTM)
    ruled(point(T=50), behind(device=H200))
    assert order(T=60)[0] == "torch"
    ruled(point(), behind(device=H200, B=1))
    assert order() == TRITON and order(B=1)[0] == "torch"
    ruled(point(), behind(device="NVIDIA A100", capability="8.0"))
    assert order() == TRITON and order(capability="8.0")[0] == "torch"


def test_the_file_names_its_sources(ruled):
    source = ruled(point() + point(commit="def5678", date="2026-02-03 04:05"), point(device=H200))
    versions = "torch 2.11.0+cu130, Triton 3.6.0, cuDNN 91002"
    assert measured_cuda.SOURCES["9.0"] == {
        H100: (
            "gpu.csv",
            versions,
            "2 commits, the last def5678, 2026-01-02 to 2026-02-03",
        ),
        H200: ("gpu.csv", versions, "commit abc1234, 2026-01-02"),
    }
    assert all(len(line) <= 100 for line in source.splitlines())


def test_the_file_is_as_ruff_leaves_it(ruled, here):
    ruff = shutil.which("ruff", path=str(cuda_rule.Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    wide = {
        "shape": "LSTM T70000 B64 I4096 H4001 P512 x2",
        "layers": 2,
        "ragged": "yes",
        "H": 4001,
        "B": 64,
        "T": 70000,
    }
    path = here / "rule.py"
    path.write_text(ruled(point("none", 1.0, "none", 1.0, **wide) + point(), point(device=H200)))
    project = str(cuda_rule.ROOT / "pyproject.toml")
    for command in (["check"], ["format", "--check"]):
        command = [ruff, *command, "--no-cache", "--config", project, str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def gpus(monkeypatch):
    """Two GPUs of different kinds, for tensors that are fake."""
    monkeypatch.setattr(chooser, "_capability", ["8.6", "9.0"].__getitem__)


def test_the_capability_of_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(8, 6), (12, 0)].__getitem__)
    names = ("cuda:0", "cuda:1", "cuda", "cpu", "meta")
    chooser._capability.cache_clear()
    try:
        found = [chooser.capability(torch.device(name)) for name in names]
        assert found == ["8.6", "12.0", "12.0", None, None]
        chooser._capability.cache_clear()
        monkeypatch.setattr(torch.version, "hip", "7.0")
        assert chooser.capability(torch.device("cuda:1")) is None
    finally:
        chooser._capability.cache_clear()


@pytest.fixture
def fake(monkeypatch):
    """A function that makes a layer of that point and its input on a device; call both within."""
    # else a torch that is built for CUDA asks where the weights lie, which no fake tensor knows
    monkeypatch.setattr(torch.backends.cudnn, "is_acceptable", lambda tensor: False)

    def make(device, dtype=torch.bfloat16):
        module = fastseq.LSTM(128, 128, device="meta", dtype=dtype)
        for name, weight in module.named_parameters():
            moved = torch.empty(weight.shape, device=device, dtype=dtype)
            setattr(module, name, torch.nn.Parameter(moved))
        return module, torch.empty(100, 16, 128, device=device, dtype=dtype)

    with FakeTensorMode(), torch.no_grad():
        yield make


def problem(module, x):
    return ops_stack.problem(call_stack(module, x, None))


def test_two_gpus_of_one_process_have_their_own_rules(gpus, fake, ruled, monkeypatch):
    ruled(point())
    here, there = (problem(*fake(device)) for device in ("cuda:1", "cuda:0"))
    assert here == LSTM._replace(threads=here.threads) and there.capability == "8.6"
    stand_in = SimpleNamespace(supports=lambda problem: None, ABILITIES=Abilities())
    monkeypatch.setattr(choice, "load", lambda name: stand_in if name == "triton" else load(name))
    for _ in range(2):
        assert choice.select(here) == "triton" and choice.select(there) == "torch"


@pytest.mark.filterwarnings("ignore:PyTorch was compiled without cuDNN")
def test_tf32_is_as_torch_is_told(gpus, fake, monkeypatch):
    setting = SimpleNamespace(fp32_precision="tf32")
    monkeypatch.setattr(torch.backends.cudnn, "rnn", setting)
    full, half = fake("cuda:0", torch.float32), fake("cuda:0", torch.float16)
    assert chooser.type_of(problem(*full)) == "tf32" and not problem(*half).tf32
    setting.fp32_precision = "ieee"
    assert chooser.type_of(problem(*full)) == "float32"


def test_a_ragged_call_knows_whether_it_is_recorded(gpus, fake, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    module, x = fake("cuda:0")
    assert not problem(module, x).recording
    stack = call_stack(module, x, None)
    stack.geometry = Padded(x, False, torch.empty(16, dtype=torch.int64))
    assert ops_stack.problem(stack).recording


def test_the_cpu_is_not_asked(monkeypatch):
    def never(*arguments):
        raise AssertionError("a question about GPUs")

    for name in ("capability", "uses_tf32", "ruling"):
        monkeypatch.setattr(chooser, name, never)
    module = fastseq.GRU(3, 4, memory="lean")
    assert fastseq.explain(module, torch.randn(5, 2, 3)) not in (None, "triton")
    module(torch.randn(5, 2, 3), reset=torch.zeros(5, 2, dtype=torch.bool))


def test_dynamo_takes_the_device_for_a_constant(monkeypatch):
    def known(index):
        torch._dynamo.graph_break()  # as what torch asks the driver, it cannot be traced
        return ["8.6", "9.0"][index]

    monkeypatch.setattr(chooser, "_capability", known)

    def named(x):
        found = chooser.capability(x.device) == "9.0" and not chooser.uses_tf32(x.dtype)
        return x + (1 if found else 2)

    torch._dynamo.reset()
    with FakeTensorMode():
        x = torch.zeros(3, device="cuda:1", dtype=torch.float16)
        compiled = torch.compile(named, fullgraph=True, backend="eager")
        assert compiled(x).shape == x.shape
    assert torch.equal(compiled(torch.zeros(3)), torch.full((3,), 2.0))
    torch._dynamo.reset()


# Where torch cannot serve


SPECIAL = {
    "reset": {"reset": True},
    "h_mask": {"h_mask": True},
    "all_states": {"trajectory": True},
    "lean": {"memory": "lean", "training": True},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_torch_cannot_run_takes_green_kernels_before_the_eager_form(name, ruled):
    asked = SPECIAL[name]
    ruled(behind())
    assert order(**asked) == AFTER_TORCH
    assert "it goes before eager" in choice.measured(LSTM._replace(**asked))
    assert order(**asked, H=96, T=1, B=500, ragged=True) == AFTER_TORCH
    for other in ({"H": 256}, {"H": 127}, {"cell": "gru"}, {"dtype": torch.float16}, {"T": 0}):
        assert order(**(asked | other)) == TORCH, other
    assert order(**asked, capability="8.0") == TORCH
    step = timed("triton", "calls", 1.0, form="step", tested="")
    for spoilt in (step, step | {"tested": "no"}, step | {"tested": "yes", "error": "CUDA error"}):
        ruled([*behind(), spoilt])
        assert order(**asked) == TORCH, spoilt
        assert "eager stays" in choice.measured(LSTM._replace(**asked))
    ruled([*behind(), step | {"tested": "yes", "error": "left out: more than 4096 launches"}])
    assert order(**asked) == AFTER_TORCH
    ruled(behind(), behind(device=H200, tested="no"))
    assert order(**asked) == TORCH


@pytest.mark.parametrize("asked", [{}, {"cell": "gru"}, {"H": 300}, {"capability": "8.0"}], ids=str)
def test_zoneout_runs_on_triton_unmeasured(asked, ruled):
    """Whatever was measured of plain layers, and on every device."""
    zoned = asked | {"zoneout": (0.1, 0.0), "training": True}
    for results in (behind(), [*point(), *of_cuda(0.5)]):
        ruled(results)
        assert order(**zoned) == ("triton", "eager")
        reason = choice.measured(LSTM._replace(**zoned))
        assert reason.startswith("not measured: cuDNN and cuda's kernels have no zoneout")
    assert order(**zoned, ragged=True, recording=True) == TORCH


def test_ahead_is_no_word_for_what_torch_cannot_run(ruled):
    ruled([*point(), timed("triton", "calls", 1.0, form="step", tested="no")])
    assert order() == TRITON and order(reset=True) == TORCH


# cuda beside triton


def test_the_backend_with_the_greater_least_ratio_comes_first(ruled):
    ruled(point() + of_cuda(0.5))
    assert order() == ("cuda", "triton", "torch", "eager")
    assert choice.measured(LSTM).startswith("cuda: 4.00 times as fast as torch here, or more (NV")
    ruled(point() + of_cuda(1.2))
    assert order() == ("triton", "cuda", "torch", "eager")
    assert choice.measured(LSTM).startswith("triton: 2.00 times")
    ruled(point() + of_cuda(0.5, 1.5))
    assert order()[0] == "triton", "the ratio in a graph counts too"
    both = point(name="other", B=10) + of_cuda(1.9, name="other", B=10)
    ruled(point() + of_cuda(0.5) + both)
    assert order()[:2] == ("triton", "cuda"), "one slow point is enough"
    ruled(point() + of_cuda(0.5), point(device=H200) + of_cuda(1.5, device=H200))
    assert order()[:2] == ("triton", "cuda"), "or one slow device"


@pytest.mark.parametrize("name", ["behind", "in a graph", "red", "not tested", "failed"])
def test_cuda_that_is_not_ahead(name, ruled):
    rows = {
        "behind": of_cuda(1.95),
        "in a graph": of_cuda(0.5, 2.1),
        "red": of_cuda(0.5, tested="no"),
        "not tested": of_cuda(0.5, tested=""),
        "failed": of_cuda("CUDA error: made up"),
    }[name]
    ruled(point() + rows)
    assert order() == TRITON


def test_cuda_alone_is_ahead(ruled):
    ruled(behind() + of_cuda(0.5))
    assert order() == ("cuda", "torch", "eager")
    ruled([row for row in point() if row["contender"] == "cudnn"] + of_cuda(0.5))
    assert order() == ("cuda", "torch", "eager") and order(B=1)[0] == "torch"


def test_results_of_triton_alone_say_nothing_of_cuda(ruled):
    ruled(point())
    assert order() == TRITON
    assert measured_cuda.MEASURED_CUDA == {"9.0": {H100: {}}}
    assert measured_cuda.GREEN_CUDA == {"9.0": {}}


def test_what_torch_cannot_run_takes_both(ruled):
    ruled(point() + of_cuda(0.5))
    assert order(reset=True) == ("torch", "cuda", "triton", "eager")
    reason = choice.measured(LSTM._replace(reset=True))
    assert reason.startswith("cuda's and triton's tests were green here for lstm in bfloat16; they")
    ruled(point() + of_cuda(1.5))
    assert order(reset=True) == ("torch", "triton", "cuda", "eager")
    ruled(point() + of_cuda(0.5, tested="no"))
    assert order(reset=True) == AFTER_TORCH


WIDE = {"H": 512, "I": 512, "shape": "LSTM T100 B16 I512 H512"}


def of_teams(cluster=None, grid=None, **more):
    """The rows of a point that both regimes hold, cuDNN's of 2 ms among them."""
    given = WIDE | more
    theirs = {k: v for k, v in given.items() if k != "tested"}
    rows = [timed("cudnn", how, 2.0, **theirs) for how in ("graph", "calls")]
    for regime, ms in (("cluster", cluster), ("grid", grid)):
        if ms is not None:
            rows += of_cuda(ms, form=f"team-{regime}", **given)
    return rows


def wide(H=512, B=16, R=1, training=False):
    """The regime that is planned for an LSTM, and what is chosen."""
    regime = cuda_plan.regime_of("lstm", "bfloat16", H, B, R, training, cuda_plan.H100)
    return regime, order(H=H, I=H, P=H, B=B, R=R, training=training)[0]


def test_nothing_of_teams_is_chosen_unmeasured(ruled):
    ruled(point() + of_cuda(0.1))
    assert wide() == ("cluster", "torch") and wide(H=1024) == ("grid", "torch")
    assert wide(training=True)[1] == "torch"


def test_the_regime_that_was_measured_to_be_faster_is_planned_and_counts(ruled):
    ruled(of_teams(cluster=1.5, grid=1.0))
    assert wide() == ("grid", "cuda") and choice.measured(
        LSTM._replace(H=512, I=512, P=512)
    ).startswith("cuda: 2.00 times")
    assert measured_cuda.MEASURED_REGIMES == {
        "9.0": {("lstm", "bfloat16", "forward"): {"H257-512 B9-32": "grid"}}
    }
    # another class, direction or way was not measured
    assert wide(H=256) == wide(B=8) == ("cluster", "torch")
    assert wide(R=2)[1] == wide(training=True)[1] == "torch"
    ruled(of_teams(cluster=1.0, grid=1.5))
    assert wide() == ("cluster", "cuda")
    # what only a grid holds
    larger = {"H": 1024, "I": 1024, "name": "other"}
    ruled(of_teams(grid=1.0, **larger))
    assert wide(H=1024) == ("grid", "cuda") and wide() == ("cluster", "torch")


def test_the_entry_of_a_class_is_of_one_regime(ruled):
    """By the mean over its points, of all devices; a point at which that one is slow counts."""
    other = {"name": "other", "B": 10}
    ruled(of_teams(cluster=1.0, grid=1.5) + of_teams(cluster=2.5, grid=1.9, **other))
    assert wide() == ("cluster", "torch")
    ruled(of_teams(cluster=1.0, grid=1.5), of_teams(cluster=1.9, grid=1.0, device=H200))
    assert wide() == ("grid", "cuda")
    source = ruled(of_teams(cluster=1.0, grid=1.5), of_teams(cluster=1.9, grid=0.5, device=H200))
    assert '"H257-512 B9-32": "grid"' in source and "(1.333, 1.333, 100, True)" in source


def test_a_regime_that_failed_or_is_not_tested_gives_way(ruled):
    red = [row | {"tested": "no"} if row.get("form") == "team-cluster" else row
           for row in of_teams(cluster=0.5, grid=1.0)]  # fmt: skip
    ruled(red)
    assert wide() == ("grid", "cuda")
    ruled(of_teams(cluster="CUDA error: made up", grid=1.0))
    assert wide() == ("grid", "cuda")
    ruled(of_teams(cluster=0.5, grid=1.0, tested=""))
    assert wide() == ("cluster", "torch"), "none is tested"
    # each kernel has its own tests: what a grid alone holds stays green
    larger = {"H": 1024, "I": 1024, "name": "other"}
    ruled(red + of_teams(grid=1.0, **larger))
    assert measured_cuda.GREEN_CUDA["9.0"] == {("lstm", "bfloat16"): ("H513-1024",)}


def test_a_point_counts_in_the_regime_that_runs(ruled):
    """And not where that one was not measured, though the device holds it."""
    other = {"name": "other", "B": 10}
    ruled(of_teams(cluster=1.0, grid=1.5) + of_teams(grid=0.1, **other))
    key = "lstm", "bfloat16", "forward"
    entry = (2.0, 2.0, 100, True)
    assert measured_cuda.MEASURED_CUDA["9.0"][H100][key] == {"dense": {"H257-512 B9-32 T2+": entry}}
    # what one CTA holds is a class of its own
    ruled(of_teams(cluster=1.0) + point(triton=None, triton_graph=None) + of_cuda(4.0))
    assert wide() == ("cluster", "cuda") and order()[0] == "torch"


def test_a_graph_for_all_sizes_holds_no_cuda(ruled):
    """It runs up to some H alone, which is not known while a graph is traced."""
    ruled(point() + of_cuda(0.5))
    assert order(**UNKNOWN, mode="compile") == TRITON
    assert order(**UNKNOWN, mode="compile", reset=True) == AFTER_TORCH
    ruled(behind() + of_cuda(0.5))
    assert order(**UNKNOWN, mode="compile") == AFTER_TORCH


# Sizes that are not known


UNKNOWN = dict.fromkeys("TBIHP")


def test_without_sizes_every_class_has_to_be_ahead(ruled):
    unknown = UNKNOWN | {"mode": "compile"}
    ruled(point() + point(name="other", H=512, ragged="yes") + behind(cell="gru"))
    assert order(**unknown) == order(**unknown, ragged=True) == TRITON
    assert "ahead in all 2 classes" in choice.measured(LSTM._replace(**unknown))
    assert order(**unknown, layers=2)[0] == order(**unknown, training=True)[0] == "torch"
    assert order(**unknown, capability="8.0") == TORCH
    ruled(point() + behind(name="other", H=512))
    assert order(**unknown)[0] == "torch"
    reason = choice.measured(LSTM._replace(**unknown))
    assert "not ahead in 1 of 2 classes measured here, such as dense H257-512 B9-32 T2+" in reason
    assert order(**unknown, reset=True) == AFTER_TORCH
    ruled(point() + point(name="other", H=512, tested="no", form="grid"))
    assert order(**unknown) == order(**unknown, reset=True) == TORCH


@pytest.mark.parametrize("mode", ["trace", "transform", "dual"])
def test_tracers_and_transforms_are_left_alone(mode, ruled):
    ruled(point())
    assert "triton" not in order(mode=mode)
    assert choice.measured(LSTM._replace(mode=mode)) is None


# What users see


def test_explain_says_what_was_measured(gpus, fake, ruled, capsys):
    def said(device):
        module, x = fake(device)
        fastseq.explain(module, x)
        module.fastseq.backend = "torch"
        fastseq.explain(module, x)
        printed = capsys.readouterr().out
        (line,) = [line for line in printed.splitlines() if line.startswith("measured: ")]
        return line.removeprefix("measured: ")

    ruled(behind())
    where = "(NVIDIA H100 80GB HBM3, lstm in bfloat16, forward, dense H65-128 B9-32 T2+)"
    assert said("cuda:1") == f"torch: 2.00 times as fast as triton here {where}"
    assert said("cuda:0") == "not measured on this device; torch stays"
    ruled(point(cudnn=1.5))
    assert said("cuda:1") == f"triton: 1.50 times as fast as torch here, or more {where}"
    ruled(point(triton_graph=4.0))
    assert said("cuda:1") == f"torch: 2.00 times as fast as triton here in a CUDA graph {where}"
    ruled(point(cudnn=1.03))
    assert "only 1.03 times as fast" in said("cuda:1")


def test_tables_and_pictures(here):
    ragged = {
        "ragged": "yes",
        "name": "tagger-lstm",
        "shape": "LSTM T50 B32 ragged",
        "way": "training",
    }
    rows = [
        *point(cudnn=2.5, name="speaker-encoder"),
        *point(cudnn=7.5, name="ptb-medium", tested="no", form="grid"),
        *point(triton_graph="left out: lengths", **ragged),
        *point(name="grid-lstm-t32", cudnn=0.5, triton=1.0, T=32),
    ]
    path = write(here / "gpu.csv", rows)
    assert cuda_rule.main([str(path)]) == 0
    page = (here / "docs" / "performance.md").read_text()
    assert page.startswith(f"before\n{table.GPU_BEGIN}\n\n### {H100}\n")
    assert page.endswith(f"\n{table.GPU_END}\nafter\n")
    cells = {
        line.split(" (")[0]: [cell.strip() for cell in line.split("|")[2:-1]]
        for line in page.splitlines()
        if line.startswith(("| speaker", "| ptb", "| tagger"))
    }
    assert cells == {
        "| speaker-encoder": ["bfloat16", "forward", "walk", "2.5", "1", "2.5x", "2x"],
        "| ptb-medium": ["bfloat16", "forward", "grid", "7.5", "1", "not tested", "not tested"],
        "| tagger-lstm": ["bfloat16", "training", "walk", "2", "1", "2x", ""],
    }
    assert "7.5x" not in page
    assert "- tagger-lstm, bfloat16, training, triton, graph: left out: lengths" in page
    assert "commit abc1234, 2026-01-02. From `gpu.csv`." in page
    assert "torch 2.11.0+cu130, Triton 3.6.0, cuDNN 91002" in page
    assert "| 1 of 2 | 1.1x |" in re.sub(" +", " ", page), "without the red form"
    assert "ragged H65-128 B9-32 T2+" in page.split("### Where triton runs")[1]
    (drawn,) = (here / "docs").glob("*.png")
    assert drawn.name == "speed-nvidia-h100-80gb-hbm3.png" and drawn.name in page
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_the_page_says_where_triton_runs(here):
    files = {"a": behind(), "b": point(device=H200) + point(name="other", B=1, device=H200)}
    paths = [write(here / name / "gpu.csv", rows) for name, rows in files.items()]
    said = cuda_rule.section(cuda_results.devices(paths)).split("### Where triton runs")[1]
    assert said.endswith("- 9.0, lstm in bfloat16, forward: 1 of 2 classes: dense H65-128 B1 T2+")
    paths = paths[:1]
    said = cuda_rule.section(cuda_results.devices(paths)).split("### Where triton runs")[1]
    assert said.endswith("- 9.0, lstm in bfloat16, forward: 0 of 1 classes")


def test_the_page_says_where_cuda_runs(here):
    rows = point(name="small-b1-h128-lstm") + of_cuda(0.25, name="small-b1-h128-lstm")
    given = cuda_results.devices([write(here / "gpu.csv", rows)])
    page = cuda_rule.section(given)
    head, of_triton, of_ours = re.split("### Where triton runs|### Where cuda runs", page)
    assert "triton ms" in head and "cuda ms" in head and "| cta |" in re.sub(" +", " ", head)
    for said in (of_triton, of_ours):
        assert "1 of 1 classes: dense H65-128 B9-32 T2+" in said
    assert "cuda runs the classes in which it is ahead" in of_ours and "8x" in head
    assert cuda_rule.main([str(here / "gpu.csv")]) == 0


def test_rows_of_the_table_are_workloads():
    from bench.workloads import by_name

    assert all(by_name(name) for name in table.GPU_HEADLINES)


# Results that are none


def spoilt(**changes):
    return [*point(), timed("triton", "calls", 1.0) | changes]


BROKEN = {
    "contender: expected one of cudnn, triton, cuda, got 'ours'": spoilt(contender="ours"),
    "form: expected one of walk, grid-resident, grid, step, got ''": spoilt(form=""),
    "type: expected one of tf32, float32, .*got 'float64'": spoilt(type="float64"),
    "tested: expected one of yes, no, .*got 'maybe'": spoilt(tested="maybe"),
    "ragged: expected yes or no, got 'spread'": spoilt(ragged="spread"),
    "capability: expected a number such as 9.0, got 'sm_90'": spoilt(capability="sm_90"),
    "B: expected a whole number from 1 on, got '0'": spoilt(B=0),
    "T: expected a whole number from 1 on, got '1e3'": spoilt(T="1e3"),
    "ms: expected a time, or a reason under error, got ''": spoilt(ms=""),
    "ms: expected a time, .*got 'nan'": spoilt(ms="nan"),
    "ms: expected a time, .*got '-1'": spoilt(ms=-1),
}


@pytest.mark.parametrize("words", BROKEN)
def test_a_broken_row_is_named(words, tmp_path):
    path = write(tmp_path / "gpu.csv", BROKEN[words])
    with pytest.raises(ValueError, match=f"gpu.csv, line 6: {words}"):
        cuda_results.read(path)


def test_a_broken_file_is_named(tmp_path, here, capsys):
    path = write(tmp_path / "gpu.csv", point(), [c for c in cuda_results.COLUMNS if c != "tested"])
    with pytest.raises(ValueError, match=r"gpu.csv: no column tested; found name, shape"):
        cuda_results.read(path)
    whole = write(path, point()).read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=r"line 5: \d+ values for 28 columns; was it cut off"):
        cuda_results.read(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"gpu.csv: empty"):
        cuda_results.read(path)
    path.write_bytes(whole + b"\xff\xfe")
    with pytest.raises(ValueError, match=r"gpu.csv: not a text file in UTF-8"):
        cuda_results.read(path)
    path.write_bytes(whole + b'made-up,"never closed\n')
    with pytest.raises(ValueError, match=r"gpu.csv, line \d: "):
        cuda_results.read(path)
    for name in (path, tmp_path / "none.csv"):
        with pytest.raises(SystemExit):
            cuda_rule.main([str(name)])
        printed = capsys.readouterr().err
        assert printed.startswith("python -m bench.rule --gpu: ") and name.name in printed
    assert (here / "measured_cuda.py").read_text() == "", "nothing was written"


def test_a_file_of_column_names_alone_says_nothing(tmp_path):
    assert cuda_rule.text(cuda_results.devices([write(tmp_path / "gpu.csv", [])])) == (
        cuda_rule.text([])
    )


def test_rows_are_frozen(tmp_path):
    (row, *_) = cuda_results.read(write(tmp_path / "gpu.csv", point()))
    assert replace(row, shape="LSTM T1 P64 cell").projected
    assert replace(row, shape="LSTM T1 P64 cell").mode == "cell" and row.mode == "layer"
