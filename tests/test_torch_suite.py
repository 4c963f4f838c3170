"""torch's own table of inputs for these modules: what torch.nn passes, fastseq passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from twins import KINDS

pytest.importorskip("expecttest")

SUITE = Path(__file__).parent / "helpers" / "torch_suite.py"


def run(tmp_path, runs, every):
    """Name of a run -> what it wrote; two processes at a time."""
    waiting, results = dict(runs), {}
    while waiting:
        started = {}
        for name in list(waiting)[:2]:
            out = tmp_path / f"{name}.json"
            command = [sys.executable, str(SUITE), str(out), "--every", str(every)]
            started[name] = (
                out,
                subprocess.Popen(
                    [*command, *waiting.pop(name)],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                ),
            )
        for name, (out, process) in started.items():
            said, _ = process.communicate()
            assert process.returncode == 0, f"{name}: {process.returncode}\n{said}"
            results[name] = json.loads(out.read_text())
    return results


def check(tmp_path, backends, every):
    runs = {"torch.nn": ["--torch"]}
    for backend in backends:
        runs[str(backend)] = [] if backend is None else ["--backend", backend]
    results = run(tmp_path, runs, every)
    theirs = results.pop("torch.nn")
    passed = {name for name, outcome in theirs["tests"].items() if outcome == "passed"}
    assert len(passed) > 150
    for backend, ours in results.items():
        failed = {name: ours["tests"].get(name) for name in passed}
        failed = {name: outcome for name, outcome in failed.items() if outcome != "passed"}
        assert not failed, f"backend={backend}: {json.dumps(failed, indent=1)}"
        # every call went to fastseq's classes, as many as torch.nn's got
        assert set(ours["calls"]) == {f"fastseq.nn.compat.{kind}" for kind in KINDS}
        for path, count in theirs["calls"].items():
            kind = path.rsplit(".", 1)[-1]
            assert ours["calls"][f"fastseq.nn.compat.{kind}"] >= 0.9 * count > 0


def test_torchs_own_suite(tmp_path):
    check(tmp_path, [None], every=13)


@pytest.mark.full
def test_torchs_own_suite_on_every_backend(tmp_path):
    check(tmp_path, [None, "numba", "eager", "torch"], every=1)
