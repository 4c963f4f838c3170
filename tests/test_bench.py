"""The machinery of the benchmarks, on workloads that take no time."""

import io
import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cuda_on_host
import pytest
import torch
from rules import check_close

import fastseq
from bench import (
    aims,
    bench_layers,
    compare,
    conftest,
    decoder,
    deterministic,
    lean,
    limit,
    measure,
    overhead,
    pages,
    ragged,
    table,
)
from bench.__main__ import arguments, as_arguments, result_path
from bench.limit import Rates
from bench.version import commit
from bench.workloads import PEER_WORKLOADS, WORKLOADS, Workload, by_name, matching
from fastseq.backends import load

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A real run of the tiny workloads, and of the peer that is always there."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench", "--workloads", "tiny-*", "--seconds", "0.05"]
    command += ["--rounds", "3", "--threads", "1", "--results", str(folder)]
    command += ["--peers", "numpy"]
    # pytest-benchmark declines to measure inside a worker of pytest-xdist, by these
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=outside)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*/*.json")
    return path, done.stdout


def test_a_run_leaves_its_record(results):
    path, _ = results
    record = json.loads(path.read_text())
    machine = record["machine_info"]
    assert machine["threads"] == 1
    assert machine["torch"] == torch.__version__
    assert machine["cpu_model"] and machine["cores"] and machine["sgemm_gflops"] > 0
    (rates,) = machine["limit"]
    assert rates["threads"] == 1 and rates["flops"] > 1e9
    assert record["peers"].keys() == {"numpy"} and record["wrong"] == {}
    assert "node" not in machine, "the name of the machine is nobody's business"
    assert {"id", "dirty"} <= record["commit_info"].keys()
    assert record["datetime"]
    cases = {(b["extra_info"]["workload"], b["extra_info"]["way"]) for b in record["benchmarks"]}
    assert cases == {
        ("tiny-layer", "forward"),
        ("tiny-layer", "training"),
        ("tiny-ragged", "forward"),
        ("tiny-ragged", "training"),
        ("tiny-float16", "forward"),
        ("tiny-float16", "training"),
        ("tiny-streaming", "forward"),
    }


def test_every_contender_ran_in_every_round(results):
    record = json.loads(results[0].read_text())
    for case in record["benchmarks"]:
        info = case["extra_info"]
        assert case["stats"]["rounds"] == info["rounds"] == 3
        assert {"torch.nn", "fastseq"} <= info["median_ms"].keys()
        others = set(info["median_ms"]) - {"torch.nn", "fastseq"}
        assert info["chosen"] not in others, "the chosen backend is not timed twice"
        plain = info["workload"] in ("tiny-layer", "tiny-streaming")
        steps = {"torch.nn cell", "fastseq.streaming"}
        assert steps & others == (steps if info["workload"] == "tiny-streaming" else set())
        numpy_runs = info["way"] == "forward" and plain
        assert ("numpy" in others) == numpy_runs == ("numpy" not in info["declined"])
        assert all(0 < info["fastest_ms"][k] <= v for k, v in info["median_ms"].items())
        assert (info["limit_ms"] is None) == info["shape"].endswith("float16")
        assert info["median_ms"]["fastseq"] == pytest.approx(
            case["stats"]["median"] * 1e3, abs=1e-4
        )
        if info["way"] == "training":
            assert info["saved_bytes"].keys() == info["median_ms"].keys() - {"numpy"}
            assert info["saved_bytes"]["torch.nn"] > 0


def test_the_tables_and_the_picture(results, tmp_path):
    path, printed = results
    record = table.read(path)
    full = table.full(record)
    assert full in printed
    assert "tiny-streaming" in full
    assert "numpy ms" in full and "limit ms" in full and "of sgemm" not in full
    assert "- numpy: " in full
    short = table.short(record, ["tiny-layer", "not-there"])
    assert short.count("\n") == 2 and "→" in short and short.count(" ms †") == 2
    assert full.count(" † ") == 7 and "| one step a call " in full and "torch.nn cell ms" in full
    said = table.provenance(record)
    assert "3 to 3 rounds; † fewer than 8, 7 of 7 cases." in said and said in printed
    assert measure.instructions() in said
    assert "None of the rows" in table.short(record, ["not-there"])

    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.insert(page, short)
    assert page.read_text() == f"before\n{table.BEGIN}\n{short}\n{table.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="expected one line"):
        table.insert(page, short)

    from bench import plot

    plot.draw(record, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_are_written_into_the_pages(results, tmp_path, monkeypatch):
    with_peers = results[0]
    kept = tmp_path / "kept" / "machine"
    kept.mkdir(parents=True)
    (kept / with_peers.name).write_bytes(with_peers.read_bytes())
    (kept / "2020-01-01-0000-abc.json").write_bytes(with_peers.read_bytes())
    (tmp_path / "docs").mkdir()
    marks = [(table.BEGIN, table.END), (table.PEERS_BEGIN, table.PEERS_END)]
    (tmp_path / "README.md").write_text(f"{table.BEGIN}\n{table.END}")
    page = tmp_path / "docs" / "performance.md"
    page.write_text("".join(f"{begin}\n{end}\n" for begin, end in marks))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "kept")
    assert table.main(["--write"]) == 0
    (_, plain), (_, beside) = (page.read_text().split(begin) for begin, _ in marks)
    assert "speed.png" in plain and "2020-01-01-0000-abc.json" in plain.split(table.END)[0]
    assert f"kept/machine/{with_peers.name}" in beside and "numpy ms" in beside
    assert "None of the rows" in (tmp_path / "README.md").read_text()


def test_the_pages_have_their_marks():
    for page in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        text = page.read_text()
        assert text.count(table.BEGIN) == text.count(table.END) == 1
    assert text.count(table.PEERS_BEGIN) == text.count(table.PEERS_END) == 1
    assert all(text.count(mark) == 1 for mark in pages.marks("aims"))


def test_rows_of_the_readme_are_workloads():
    assert all(by_name(name) for name in table.HEADLINES)


def test_saved_bytes_are_those_of_the_graph():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)
    # exp keeps its result; mm keeps x, which lives anyway, and the weight
    assert measure.saved_bytes(lambda: (x @ weight).exp(), [x, weight]) == 3 * 4 * 4


def planted(monkeypatch, plant):
    """fastseq's module is planted with a fault before it runs."""
    build = measure.Race._ours

    def ours(self, backend):
        module = build(self, backend)
        plant(module)
        return module

    monkeypatch.setattr(measure.Race, "_ours", ours)


def scaled(tensor):
    """The same numbers with a gradient of 1.01 times what it is."""
    tensor = tensor * 1
    if tensor.requires_grad:
        tensor.register_hook(lambda gradient: gradient * 1.01)
    return tensor


def wrong_parameter(name):
    return lambda module: getattr(module, name).register_hook(lambda g: g * 1.01)


def wrong_input(module):
    module.register_forward_pre_hook(lambda _, given: (scaled(given[0]), *given[1:]))


def wrong_state(module):
    def change(_, given):
        if len(given) == 1:
            return given
        h, *c = given[1] if isinstance(given[1], tuple) else (given[1],)
        return given[0], (scaled(h), *c) if c else scaled(h)

    module.register_forward_pre_hook(change)


def wrong_output(part):
    def change(_, given, found):
        y, last = found
        return (y * 1.01, last) if part == "output" else (y, last * 1.01)

    return lambda module: module.register_forward_hook(change)


FAULTS = {
    **{
        f"gradient of {name}": wrong_parameter(name)
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    },
    "gradient of input": wrong_input,
    "gradient of h_0": wrong_state,
    "output": wrong_output("output"),
    "h_n": wrong_output("h_n"),
}


@pytest.mark.parametrize("what", FAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_wrong_numbers_are_refused_before_any_clock(monkeypatch, what, dtype):
    workload = replace(by_name("tiny-layer"), dtype=dtype)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: 1 / 0)
    assert measure.Race(workload, "training", [], 60.0).chosen
    planted(monkeypatch, FAULTS[what])
    with pytest.raises(measure.WrongNumbers, match=rf"^fastseq, numbers: {what}, \w+ error"):
        measure.Race(workload, "training", [], 60.0)


def test_a_named_backend_with_wrong_numbers_leaves_the_others_their_figures(monkeypatch):
    workload = by_name("tiny-layer")
    results = measure.results

    def planted(module, *rest, **options):
        found = results(module, *rest, **options)
        own = getattr(module, "fastseq", None)
        factor = 1.01 if own is not None and own.backend == "eager" else 1
        return {name: value * factor for name, value in found.items()}

    monkeypatch.setattr(measure, "results", planted)
    race = measure.Race(workload, "training", ["eager", "reference"], 60.0)
    assert [c.label for c in race.contenders] == [measure.TORCH, measure.OURS, "reference"]
    assert list(race.wrong) == ["eager"] and race.wrong["eager"].startswith("eager, numbers: ")

    def pedantic(function, args, setup, rounds):
        setup()
        function(*args)

    options = {"--backends": "eager reference", "--rounds": 1, "--seconds": 0.0, "--limit": 60.0}
    request = SimpleNamespace(config=SimpleNamespace(getoption=options.get))
    benchmark = SimpleNamespace(pedantic=pedantic, enabled=False, extra_info={})
    monkeypatch.setattr(bench_layers, "possible", lambda threads: [])
    monkeypatch.setattr(bench_layers, "least_seconds", lambda *arguments: 1.0)
    with pytest.raises(measure.WrongNumbers, match=r"^eager, numbers: output"):
        bench_layers.test_speed(workload, "training", benchmark, request, [])
    assert set(benchmark.extra_info["median_ms"]) == {measure.TORCH, "reference"}


def test_wrong_steps_are_refused(monkeypatch):
    handle = type(fastseq.streaming(fastseq.GRU(1, 1)))
    step = handle.step
    monkeypatch.setattr(handle, "step", lambda self, x: step(self, x) * 1.01)
    with pytest.raises(measure.WrongNumbers, match=r"^fastseq\.streaming, numbers: output"):
        measure.Race(by_name("tiny-streaming"), "forward", [], 60.0)


def test_a_case_with_wrong_numbers_is_named_and_has_no_figure(monkeypatch):
    monkeypatch.setattr(conftest, "WRONG", {})
    item = SimpleNamespace(callspec=SimpleNamespace(id="w-training"))
    for error in (measure.WrongNumbers("fastseq, numbers: output"), AssertionError("other")):
        with pytest.raises(type(error)) as info:
            raise error
        report = conftest.pytest_runtest_makereport(item, SimpleNamespace(excinfo=info))
        next(report)
        answer = SimpleNamespace(skipped=False, failed=True)
        with pytest.raises(StopIteration):
            report.send(SimpleNamespace(get_result=lambda answer=answer: answer))
    assert conftest.WRONG == {"w-training": "fastseq, numbers: output"}
    record = {**table.read(table.newest()), "wrong": {}}
    assert "No figure" not in table.full(record)
    assert "\n- w-training: fastseq, numbers" in table.full({**record, "wrong": conftest.WRONG})


@pytest.mark.parametrize("training", [False, True])
def test_the_truth_is_the_same_in_pieces(monkeypatch, training):
    workload = replace(by_name("tiny-float16"), B=5)
    state = workload.module().state_dict()
    whole = measure.truth(workload, state, training)
    monkeypatch.setattr(measure, "free_memory", lambda: 3 * 2**10)
    pieces = measure.truth(workload, state, training)
    assert whole.keys() == pieces.keys() and ("gradient of c_0" in whole) == training
    for name, value in whole.items():
        check_close(pieces[name], None, value, torch.float64, name)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn"])
@pytest.mark.parametrize("mode", ["streaming", "cell"])
def test_one_step_a_call_in_every_form(cell, mode):
    """Cells and layers of both libraries, and the handle: the same numbers, twice."""
    workload = replace(by_name("tiny-streaming"), cell=cell, mode=mode, B=2)
    race = measure.Race(workload, "forward", [], 60.0)
    labels = [c.label for c in race.contenders]
    other = "torch.nn cell" if mode == "streaming" else "torch.nn layer"
    assert labels == ["torch.nn", "fastseq", other, "fastseq.streaming"]
    for contender in race.contenders:
        assert race.sample(contender) > 0
        again = contender.walk.outputs()  # a handle begins anew
        check_close(again, race.expected["output"], race.truth["output"], torch.float32, "again")


def test_a_factor_is_over_torchs_best_form():
    info = {"median_ms": {"torch.nn": 6.0, "torch.nn cell": 2.0, "fastseq": 1.0, "eager": 4.0}}
    assert table.speedup(info) == 2.0 and table.speedup(info, "eager") == 0.5
    assert table.columns(["b", "fastseq.streaming", "fastseq", "a", *info["median_ms"]], "b") == [
        *("torch.nn", "torch.nn cell", "fastseq", "fastseq.streaming", "a", "eager", "b")
    ]


def test_how_many_rounds_a_case_has():
    assert measure.planned_rounds(40, 1.5, 60.0, 0.001) == 40
    assert measure.planned_rounds(40, 1.5, 60.0, 0.1) == 15
    assert measure.planned_rounds(40, 1.5, 60.0, 1.0) == 8, "more than its seconds"
    assert measure.planned_rounds(40, 1.5, 60.0, 10.0) == 6, "no more than its limit"
    assert measure.planned_rounds(40, 1.5, 60.0, 50.0) == 3
    assert measure.planned_rounds(5, 1.5, 60.0, 1.0) == 5, "no more than was asked for"
    calls = []
    measure.in_turn([lambda: calls.append(0)], 0.0)
    assert len(calls) == 1 + measure.ROUNDS == 1 + table.ROUNDS


def test_what_is_to_be_measured_again(tmp_path, monkeypatch, capsys):
    record = json.loads(table.newest().read_text())
    record["machine_info"]["threads"] = 1
    kept = tmp_path / "kept" / "machine"
    kept.mkdir(parents=True)
    for k, case in enumerate(record["benchmarks"]):
        case["extra_info"]["rounds"] = 7 + k
    record["commit_info"] = {"id": "a" * 40, "dirty": False}
    (kept / "2026-01-01-x.json").write_text(json.dumps(record))
    name = record["benchmarks"][0]["extra_info"]
    (tmp_path / "docs").mkdir()
    blocks = {
        "ragged": "commit 1 with changes",
        "lean": "8 interleaved rounds",
        "deterministic": "",
    }
    blocks |= {"compile_time": "3 rounds", "aims": "with changes"}
    texts = ("\n".join([(m := pages.marks(n))[0], text, m[1]]) for n, text in blocks.items())
    (tmp_path / "docs" / "performance.md").write_text("\n".join(texts))
    monkeypatch.setattr(table, "ROOT", tmp_path)
    monkeypatch.setattr(table, "RESULTS", tmp_path / "kept")
    assert table.main(["--weak"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "2026-01-01-x.json",
        f"  7 rounds: {name['workload']} {name['way']}",
        "  make bench THREADS=1",
        "docs/performance.md, ragged: with changes",
        "  python -m bench.ragged --write",
        "docs/performance.md, compile_time: 3 rounds",
        "  python -m bench.compile_time --write",
    ]
    assert "commit aaaaaaa, " in table.provenance(record)
    record["commit_info"]["dirty"] = True
    assert "**commit aaaaaaa with changes**" in table.provenance(record)
    (kept / "2026-01-01-x.json").write_text(json.dumps(record))
    assert table.weak().startswith("2026-01-01-x.json, with changes\n")


def test_a_note_names_the_instructions_and_changes(monkeypatch):
    monkeypatch.setattr(pages, "commit", lambda: "abc-dirty")
    said = pages.note("How.")
    assert "**commit abc with changes**" in said and f", {measure.instructions()}, " in said
    native = SimpleNamespace(instruction_sets=lambda: ["avx512_bf16", "base"])
    monkeypatch.setattr(measure, "load", lambda name: native)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert measure.instructions() == "AVX-512 + bf16"
    native.instruction_sets = lambda: ["avx2"]
    assert measure.instructions() == "AVX2 (torch: AVX-512)"
    monkeypatch.setattr(measure, "load", lambda name: "not built")
    assert measure.instructions() == "AVX-512"


def test_a_processor_is_named_with_its_core(monkeypatch):
    facts = "processor : 0\nvendor_id : AuthenticAMD\ncpu family : {}\nmodel : {}\nmodel name : X\n"
    for family, model, core in (
        *((23, 0x01, "Zen"), (23, 0x31, "Zen 2"), (25, 0x01, "Zen 3"), (25, 0x21, "Zen 3")),
        *((25, 0x11, "Zen 4"), (25, 0x61, "Zen 4"), (25, 0xA0, "Zen 4"), (26, 0x02, "Zen 5")),
    ):
        text = facts.format(family, model)
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        assert measure.cpu_name() == f"X ({core})"
    monkeypatch.setattr(Path, "read_text", lambda self: facts.format(99, 1))
    assert measure.cpu_name() == "X"
    intel = facts.format(6, 0x11).replace("AuthenticAMD", "GenuineIntel")
    monkeypatch.setattr(Path, "read_text", lambda self: intel)
    assert measure.cpu_name() == "X"


def test_two_trees_are_judged_beyond_their_noise():
    quiet = [[1.0, 1.1, 9.0], [1.1, 1.0, 1.1]]
    assert compare.verdict(quiet * 2, 0.03) == (1.0, 0.0, "")
    slow = [[2 * t for t in times] for times in quiet]
    assert compare.verdict(slow + quiet, 0.03)[::2] == (2.0, "slower")
    assert compare.verdict(quiet + slow, 0.03)[::2] == (0.5, "faster")
    noisy = [[1.0] * 3, [2.5] * 3]
    assert compare.verdict(slow + noisy, 0.03)[1:] == (1.5, "")
    assert compare.verdict(noisy + quiet, 0.03)[0] == 1.75 / 1.1, "of both processes"


def test_a_tree_answers_with_the_time_of_a_call(monkeypatch, capsys):
    cases = [
        (name, way)
        for name in ("tiny-layer", "tiny-ragged", "tiny-streaming")
        for way in compare.ways(by_name(name))
    ]
    assert cases[-2:] == [("tiny-streaming", "call"), ("tiny-streaming", "handle")]
    monkeypatch.setattr(
        "sys.stdin", io.StringIO("".join(f"{json.dumps([*c, 0])}\n" for c in cases))
    )
    monkeypatch.setattr(compare.time, "perf_counter", itertools.count().__next__)
    compare.serve(torch.get_num_threads(), None)
    first, *answers = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"file": fastseq.__file__} and len(answers) == len(cases)
    calls = [3 if name == "tiny-streaming" else 1 for name, _ in cases]
    assert [answer["seconds"] for answer in answers] == [1 / count for count in calls]
    assert [answer["chosen"] is None for answer in answers] == [c[1] == "handle" for c in cases]


def test_a_tree_runs_the_backend_that_is_named(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO('["tiny-layer", "training", 0]\n'))
    compare.serve(torch.get_num_threads(), "eager")
    assert json.loads(capsys.readouterr().out.splitlines()[1])["chosen"] == "eager"


def test_a_tree_runs_the_host_s_part_of_cuda(monkeypatch, capsys):
    with cuda_on_host.use() as on_host:  # which notices a launch
        cuda = load("cuda")
        for name in ("DEVICES", "unavailable", "_queue"):
            monkeypatch.setattr(cuda, name, getattr(cuda, name))
        monkeypatch.setattr("sys.stdin", io.StringIO('["tiny-layer", "training", 0]\n'))
        compare.serve(torch.get_num_threads(), "cuda", unlaunched=True)
        assert on_host.launched == []
    assert json.loads(capsys.readouterr().out.splitlines()[1])["chosen"] == "cuda"


def test_a_slower_tree_is_marked_after_more_rounds(monkeypatch, capsys, tmp_path):
    """Processes that answer at once, the other tree's twice as fast."""
    (tmp_path / "fastseq").mkdir()
    (tmp_path / "fastseq" / "__init__.py").touch()
    monkeypatch.setattr(compare, "ROOT", Path(tmp_path, "this"))
    monkeypatch.setattr(compare, "commit", lambda tree: tree.name)
    monkeypatch.setattr(compare, "QUIET", 0)
    asked = []

    class Answers:
        process = SimpleNamespace(communicate=lambda: None)

        def __init__(self, tree, threads, backend, unlaunched):
            self.seconds = 2.0 if tree.name == "this" else 1.0

        def sample(self, *question):
            asked.append(question)
            return {"seconds": self.seconds, "chosen": "native" if self.seconds > 1 else "numba"}

    monkeypatch.setattr(compare, "Tree", Answers)
    command = [str(tmp_path), "--workloads", "tiny-streaming", "--rounds", "2"]
    assert compare.main(command) == 1
    printed = capsys.readouterr().out
    assert "native / numba" in printed and printed.count("  slower\n") == 2
    assert "Geometric mean 2.000; slower: 2 of 2." in printed
    assert len(asked) == 2 * 4 * (1 + 2 + 4)
    assert compare.main([*command, "--tolerance", "1.5"]) == 0
    with pytest.raises(SystemExit):
        compare.main([*command, "--unlaunched", "--backend", "numba"])
    assert "--unlaunched is of the backend cuda, not of numba" in capsys.readouterr().err
    (tmp_path / "fastseq" / "_cpu.abi3.so").touch()
    with pytest.raises(SystemExit):
        compare.main(command)
    assert "no C++ kernels in" in capsys.readouterr().err


def test_a_process_runs_the_tree_that_it_was_given(tmp_path):
    (tmp_path / "fastseq").mkdir()
    (tmp_path / "fastseq" / "__init__.py").write_text("__file__ = '/elsewhere/fastseq'")
    with pytest.raises(RuntimeError, match=r"the process imported .*elsewhere"):
        compare.Tree(tmp_path, 1, None, False)


def test_what_is_too_large_is_skipped_with_a_reason(monkeypatch):
    huge = Workload("huge", "lstm", T=10**6, B=10**4, I=64, H=64, source="")
    reason = measure.reason_to_skip(huge, "forward", [], 1e12)
    assert "GiB" in reason
    monkeypatch.setattr(measure, "free_memory", lambda: None)
    assert "would take about" in measure.reason_to_skip(huge, "forward", [], 1.0)
    tiny = by_name("tiny-streaming")
    assert measure.reason_to_skip(tiny, "forward", [], 30) is None
    assert measure.reason_to_skip(tiny, "training", [], 30) == "inference only"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workloads", "nothing"], "no workload matches 'nothing'"),
        (["--backends", "nothing"], "no backend is named 'nothing'"),
        (["--peers", "nothing"], "no peer is named 'nothing'"),
        (["--threads", "0"], "--threads: expected more than 0, got 0"),
        (["--threads", "1", "0"], "--threads: expected more than 0, got 0"),
    ],
)
def test_mistakes_on_the_command_line(argv, message, capsys):
    with pytest.raises(SystemExit):
        arguments(argv)
    assert message in capsys.readouterr().err


def test_the_name_of_a_result_says_machine_and_commit(tmp_path):
    path = result_path(tmp_path)
    assert path.parent.name.endswith("-threads")
    assert commit() in path.name


def test_what_runs_where_nothing_is_asked_for():
    plain, with_peers = arguments([]), arguments(["--peers", "numpy"])
    own = torch.get_num_threads()
    assert plain.threads == [own] and with_peers.threads == sorted({1, own})
    assert plain.workloads is plain.backends is None
    assert with_peers.workloads == PEER_WORKLOADS
    assert "eager" not in with_peers.backends.split() and "torch" in with_peers.backends.split()
    assert as_arguments(with_peers, "peers", "limit") == ["--peers=numpy", "--limit=60.0"]
    assert as_arguments(plain, "peers") == []


def test_results_from_before_there_were_limits_and_peers(results):
    old = json.loads(results[0].read_text())
    del old["peers"], old["machine_info"]["limit"]
    for case in old["benchmarks"]:
        del case["extra_info"]["limit_ms"]
        case["extra_info"]["median_ms"] = {"torch.nn": 31.4, "fastseq": 15.7}
    full = table.full(old)
    assert "of sgemm" in full and "limit" not in full and "Peers" not in full
    assert " 31.4 | 15.7 (2x) " in full


@pytest.mark.parametrize("path", sorted(table.RESULTS.glob("*/*.json")), ids=lambda p: p.name)
def test_results_that_are_kept_can_be_read(path):
    record = table.read(path)
    assert table.full(record).startswith("| forward") and table.note(record, path)


def test_a_comparison_with_peers_is_not_the_newest_run(tmp_path):
    names = ["a/2026-01-01-x.json", "a/2026-01-03-x-peers.json", "b/2026-01-02-x.json"]
    names += ["a/2026-01-02-x-peers.json", "b/2026-01-01-x-peers.json"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert table.newest(tmp_path) == tmp_path / "b/2026-01-02-x.json"
    assert set(table.newest_with_peers(tmp_path)) == {
        tmp_path / "a/2026-01-03-x-peers.json",
        tmp_path / "b/2026-01-01-x-peers.json",
    }
    assert result_path(tmp_path, peers=True).name.endswith("-peers.json")


def made_up(*cases, **more):
    """Results: (workload, way, median milliseconds by name, limit)."""
    infos = [
        {"workload": name, "way": way, "median_ms": times, "limit_ms": least}
        for name, way, times, least in cases
    ]
    return {"benchmarks": [{"extra_info": info} for info in infos], **more}


def case(name, torch_ms, ours_ms=1.0, way="forward", least=None, **others):
    return name, way, {"torch.nn": torch_ms, "fastseq": ours_ms, **others}, least


def test_a_layer_belongs_to_the_group_of_its_shape_and_type():
    groups = {
        "small-b4-h256-lstm": aims.FEW_LSTM,
        "awd-lstm-first": aims.PRODUCTS_LSTM,
        "ptb-medium": aims.REST_LSTM,  # B = 20
        "forecaster-lstm": aims.REST_LSTM,  # H = 64
        "long-rnn": aims.FEW,
        "rl-policy-b2048-h64": aims.REST,
        "tagger-dense-gru": aims.REST,
        "elmo": aims.PROJECTED,
        "types-proj-b1-h64-lstm": aims.PROJECTED,
        "types-float64-b16-h128-lstm": "LSTM and GRU in float64",
        "types-bfloat16-b1-h64-gru": "GRU in bfloat16",
        "tagger-lstm": None,
        "vad-streaming": None,
        "tts-decoder": None,
    }
    assert {name: aims.group(by_name(name)) for name in groups} == groups
    few = by_name("small-b4-h256-lstm")
    assert aims.group(replace(few, H=513)) == aims.REST_LSTM
    assert aims.group(replace(few, B=32)) == aims.PRODUCTS_LSTM
    trained = {aims.group(w) for w in WORKLOADS if w.training}
    assert trained >= aims.AIMS.keys(), "every group is measured both ways"


def test_a_group_is_its_geometric_mean_and_its_least():
    results = made_up(
        case("small-b1-h32-gru", 2.0),
        case("long-rnn", 36.0, 2.0),
        case("long-rnn", 50.0, way="training"),
        case("ptb-medium", 3.0),
        case("streaming-h128-gru", 100.0),
        case("tagger-gru", 100.0),
    )
    forward = aims.factors(results, "forward")
    assert forward[aims.FEW] == [2.0, 18.0] and forward[aims.REST_LSTM] == [3.0]
    assert sum(map(len, forward.values())) == 3, "neither streaming nor ragged"
    assert aims.factors(results, "training")[aims.FEW] == [50.0]
    assert aims.mean_and_least([2.0, 18.0], aims.Aim(6)) == "6.00, least 2.00"
    assert aims.mean_and_least([2.0, 18.0], aims.Aim(6.5, 2.0)) == "**6.00**, least 2.00"
    assert aims.mean_and_least([0.5, 338.0], aims.Aim(6, 1.0)) == "13.0, least **0.500**"
    assert aims.mean_and_least([], aims.Aim(6)) == "not measured"


def test_the_cost_of_a_ragged_token():
    ragged, dense = by_name("tagger-lstm"), by_name("tagger-dense-lstm")
    assert aims.dense_twin(ragged) == dense and dense.N == 50 * 32 > ragged.N
    assert aims.dense_twin(by_name("tagger-gru")) == by_name("tagger-dense-gru")
    results = made_up(
        case("tagger-lstm", 1.0, 1.2 * ragged.N),
        case("tagger-dense-lstm", 1.0, 1.0 * dense.N),
        case("tagger-gru", 1.0, 1.0),
    )
    found = aims.ragged_costs(results, "forward")
    assert found == {"lstm": pytest.approx(1.2)}, "of gru there is no dense twin"
    assert aims.costs({**found, "gru": 1.1}) == "LSTM **1.20**, GRU 1.10"
    assert aims.costs({}) == "not measured"


def test_the_fraction_of_the_limit_is_a_median_over_layers():
    results = made_up(
        case("ptb-medium", 1.0, 2.0, least=1.0),
        case("tagger-gru", 1.0, 4.0, least=1.0),
        case("long-gru", 1.0, 4.0, least=3.6),
        case("types-float64-b1-h64-gru", 1.0, 1.0),
        case("streaming-h128-gru", 1.0, 100.0, least=1.0),
    )
    found = aims.fractions(results, "forward")
    assert found == [0.5, 0.25, 0.9]
    assert aims.middle(found) == "**0.500**" and aims.middle([0.6]) == "0.600"


def test_the_best_other_library_and_the_limit():
    results = made_up(
        case("ptb-medium", 1.0, 10.0, least=8.0, a=9.8, b=20.0, numba=1.0),
        case("long-gru", 1.0, 10.0, least=8.0, b=10.1, native=1.0),
        case("long-lstm", 1.0, 10.0, least=1.0, a=40.0, b=30.0),
        case("long-rnn", 1.0, 10.0, least=1.0),
        case("streaming-h128-gru", 1.0, 10.0, least=1.0, a=1.0),
        peers={"a": "1.0", "b": "2.0", "c": "not available: none"},
        machine_info={"threads": 2, "cpu_model": "X"},
    )
    near, elsewhere = aims.beside_others(results, "forward")
    assert near == [pytest.approx(0.98)] and elsewhere == pytest.approx([1.01, 3.0])
    assert aims.near_and_elsewhere(near, elsewhere) == "1.44, least 1.01, near the limit 0.980"
    assert aims.near_and_elsewhere([0.94], [0.99]) == (
        "**0.965**, least **0.990**, near the limit **0.940**"
    )
    assert aims.near_and_elsewhere([], []) == "not measured"
    name, aim, *_ = aims.rows(results, [results])[-1]
    assert name == "the best other library, 2 threads, X"
    assert aim == "1.2, each 1.0, near the limit 0.95"


def test_the_aims_are_written_into_the_page(results, tmp_path, monkeypatch, capsys):
    path = str(results[0])
    assert aims.main([path, path]) == 0
    printed = capsys.readouterr().out
    for name in (aims.FEW, "LSTM and GRU in float16"):
        (line,) = (line for line in printed.splitlines() if line.startswith(f"| {name} "))
        assert line.count("least") == 2
    assert "| the best other library, 1 thread, " in printed
    assert printed.count(results[0].name) == 2
    page = tmp_path / "page.md"
    begin, end = pages.marks("aims")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    monkeypatch.setattr(pages.write, "__defaults__", (page,))
    assert aims.main(["--write", path, path]) == 0
    assert page.read_text() == f"before\n{begin}\n\n{printed.strip()}\n\n{end}\nafter\n"
    with pytest.raises(SystemExit):
        aims.main([str(tmp_path / "nothing.json")])
    assert "nothing.json" in capsys.readouterr().err


# Rates that make the sums plain: 1 GFLOP/s, 1 GB/s, gates and barriers for nothing.
FREE = {"lstm": (0.0, 0.0), "gru": (0.0, 0.0), "rnn": (0.0, 0.0)}
ONE = Rates(1, 1e9, ((1, 1e9),), FREE, 0.0)
T, B, I, H = 10, 8, 30, 20  # noqa: E741
LAYER = Workload("w", "gru", T=T, B=B, I=I, H=H, source="")
ALL, RECURRENT = 3 * H * (I + H), 3 * H * H  # weights


def test_where_products_decide_training_is_three_times_forward():
    fast_memory = replace(ONE, bandwidth=((1, 1e15),))
    forward = limit.limit(LAYER, False, [fast_memory])
    assert forward == pytest.approx(2 * T * B * ALL / 1e9)
    assert limit.limit(LAYER, True, [fast_memory]) == pytest.approx(3 * forward)
    no_dx = limit.limit(LAYER, True, [fast_memory], input_gradient=False)
    assert no_dx == pytest.approx((3 - I / (I + H)) * forward)


def test_where_reading_decides_each_step_reads_the_recurrent_weights():
    fast_products = replace(ONE, flops=1e15)
    read = 4 * (T * RECURRENT + 3 * H * I) / 1e9
    assert limit.limit(LAYER, False, [fast_products]) == pytest.approx(read)
    # backward's walk reads them again; the weights' gradients are products over all steps
    again = 4 * T * RECURRENT / 1e9
    assert limit.limit(LAYER, True, [fast_products]) == pytest.approx(read + again, rel=1e-3)
    streaming = replace(LAYER, mode="streaming")
    assert limit.limit(streaming, False, [fast_products]) == pytest.approx(4 * T * ALL / 1e9)


def test_gates_and_layers_and_directions_add_up():
    gates = replace(ONE, flops=1e18, bandwidth=((1, 1e18),), gates={**FREE, "gru": (1e-9, 3e-9)})
    assert limit.limit(LAYER, False, [gates]) == pytest.approx(T * B * H * 1e-9, rel=1e-3)
    assert limit.limit(LAYER, True, [gates]) == pytest.approx(T * B * H * 4e-9, rel=1e-3)
    twice = replace(LAYER, layers=2, bidirectional=True)
    assert limit.limit(twice, False, [gates]) == pytest.approx(4 * T * B * H * 1e-9, rel=1e-3)
    projected = replace(LAYER, cell="lstm", proj=5)
    products = 4 * H * (I + 5) + 5 * H
    compute = replace(ONE, bandwidth=((1, 1e15),))
    assert limit.limit(projected, False, [compute]) == pytest.approx(2 * T * B * products / 1e9)


def test_threads_share_rows_or_units_or_nothing():
    reading = replace(ONE, flops=1e18)
    alone = limit.limit(LAYER, False, [reading])
    two = replace(reading, threads=2, barrier=1e-6)
    # by rows each reads all, which is no gain; by units each reads half and waits at every step
    assert limit.limit(LAYER, False, [reading, two]) == pytest.approx(alone / 2 + T * 1e-6)
    late = replace(two, barrier=1.0)
    assert limit.limit(LAYER, False, [reading, late]) == pytest.approx(alone)
    single = replace(LAYER, B=1)  # no rows to share: with two threads alone they have to wait
    assert limit.limit(single, False, [late]) > T * 1.0


def test_weights_are_read_from_the_cache_that_holds_them():
    steps = replace(ONE, bandwidth=((1, 9.0), (1000, 5.0), (2000, 2.0)))
    assert [steps.reads(size) for size in (0.5, 999, 1000, 1999, 5000)] == [9, 9, 5, 5, 2]
    assert limit._falling([(1, 3.0), (2, 4.0), (3, 1.0)]) == ((1, 4.0), (2, 4.0), (3, 1.0))


def test_rates_are_measured():
    found = limit.rates(1)
    assert found.threads == 1 and found.barrier == 0
    assert found.flops > 1e9 and found.reads(2**14) >= found.reads(2**26) > 1e8
    assert all(0 < seconds < 1e-7 for both in found.gates.values() for seconds in both)
    assert limit._barrier(2) > 0


def test_overhead_counts_calls(capsys):
    command = ["--workloads", "tiny-streaming", "--peers", "", "--seconds", "0.01"]
    assert overhead.main([*command, "--backends", "eager"]) == 0
    printed = capsys.readouterr().out
    assert "torch.nn cell" in printed and "fastseq.streaming" in printed and "8 inter" in printed
    assert "| LSTM H4 " in printed and "eager" in printed and "numba" not in printed
    with pytest.raises(SystemExit):
        overhead.main(["--workloads", "tiny-layer"])
    assert "names of streaming workloads" in capsys.readouterr().err
    assert all(w.mode == "streaming" and not w.training for w in matching("streaming-*"))


def test_what_small_pages_are_made_of():
    """A row each of the pages about memory='lean' and deterministic=True."""
    (workload,) = matching("small-b1-h32-gru")
    line = lean.row(workload, 0.01, 3)
    assert len(line) == len(lean.HEADER) and float(line[3]) > 0
    assert float(line[6]) < float(line[5]) < float(line[7])  # what lean, full and torch.nn keep
    if not isinstance(load("native"), str):
        line = deterministic.row("GRU", 1, 1, 8, 0.01)
        assert len(line) == len(deterministic.HEADER) and float(line[3]) > 0


@pytest.mark.parametrize("kind", ["LSTMCell", "GRU"])
def test_decoders_that_compute_the_same(kind):
    line = decoder.row(kind, 4, 6, 3, 0.01)
    assert len(line) == len(decoder.HEADER) and float(line[3]) > 0
    theirs, ours = (decoder.Decoder(library, kind, 4, 6) for library in (torch.nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    embedded, encoded = torch.randn(decoder.STEPS, 3, 4), torch.randn(3, decoder.ENCODED, 6)
    for model in (theirs, ours):
        decoder.train(model, embedded, encoded)
    for mine, yours in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine.grad, yours.grad, atol=1e-6)


def test_ragged_beside_its_dense_twin():
    (dense, all_tokens), (packed, tokens), (padded, same) = ragged.calls("gru", training=True)
    assert all_tokens == 50 * 32 and tokens == same < all_tokens
    for run in (dense, packed, padded):
        run()
    name, *ratios = ragged.row("lstm", training=False, seconds=0.02)
    assert name == "LSTM, forward" and all(0.2 < float(r) < 20 for r in ratios)
