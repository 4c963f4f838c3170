"""The machinery of the benchmarks, on workloads that take no time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import measure, table
from bench.__main__ import arguments, commit, result_path
from bench.workloads import Workload, by_name

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A real run of two tiny workloads in a process of its own."""
    folder = tmp_path_factory.mktemp("results")
    command = [sys.executable, "-m", "bench", "--workloads", "tiny-*", "--seconds", "0.05"]
    command += ["--rounds", "3", "--threads", "1", "--results", str(folder)]
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
    assert "node" not in machine, "the name of the machine is nobody's business"
    assert {"id", "dirty"} <= record["commit_info"].keys()
    assert record["datetime"]
    cases = {(b["extra_info"]["workload"], b["extra_info"]["way"]) for b in record["benchmarks"]}
    assert cases == {
        ("tiny-layer", "forward"),
        ("tiny-layer", "training"),
        ("tiny-ragged", "forward"),
        ("tiny-ragged", "training"),
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
        assert all(0 < info["fastest_ms"][k] <= v for k, v in info["median_ms"].items())
        assert info["median_ms"]["fastseq"] == pytest.approx(
            case["stats"]["median"] * 1e3, abs=1e-4
        )
        if info["way"] == "training":
            assert info["saved_bytes"].keys() == info["median_ms"].keys()
            assert info["saved_bytes"]["torch.nn"] > 0


def test_the_tables_and_the_picture(results, tmp_path):
    path, printed = results
    record = table.read(path)
    full = table.full(record)
    assert full in printed
    assert "tiny-streaming" in full
    short = table.short(record, ["tiny-layer", "not-there"])
    assert short.count("\n") == 2 and "→" in short
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


def test_the_pages_have_their_marks():
    for page in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        text = page.read_text()
        assert text.count(table.BEGIN) == text.count(table.END) == 1


def test_rows_of_the_readme_are_workloads():
    assert all(by_name(name) for name in table.HEADLINES)


def test_saved_bytes_are_those_of_the_graph():
    weight = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(3, 4)
    # exp keeps its result; mm keeps x, which lives anyway, and the weight
    assert measure.saved_bytes(lambda: (x @ weight).exp(), [x, weight]) == 3 * 4 * 4


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
        (["--threads", "0"], "--threads: expected more than 0, got 0"),
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
