"""Without sources, as in a frozen application: in byte code alone, and in an archive."""

import compileall
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastseq

#: {backends} run a layer each; what tells of backends tells why one is not there.
PROGRAM = """
import contextlib, io
import torch
from torch import nn
import fastseq


def check(holds, *words):  # an assert is not in optimized code
    if not holds:
        raise SystemExit(" ".join(map(str, words)))


check(fastseq.__file__.endswith(".pyc"), fastseq.__file__)
x = torch.randn(5, 3, 4)
reasons = dict(fastseq.backends())
if "No module named" not in reasons["triton"]:
    why = "ValueError: @jit functions should be defined in a Python file"
    check(why in reasons["triton"], reasons)
    with contextlib.redirect_stdout(io.StringIO()) as told:
        fastseq.explain(fastseq.GRU(4, 6), x)
    check(why in told.getvalue(), told.getvalue())
for name in {backends}:
    check(reasons[name] == "available", reasons[name])
    ours, theirs = fastseq.GRU(4, 6, backend=name), nn.GRU(4, 6)
    ours.load_state_dict(theirs.state_dict())
    for layer in (ours, theirs):
        layer(x)[0].square().sum().backward()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.cell = fastseq.LSTM(4, 6, backend="eager"), fastseq.LSTMCell(4, 6)

    def forward(self, x, reset):
        return self.layer(x, reset=reset)[0], *self.cell(x[0])


model, reset = Model(), torch.zeros(5, 3, dtype=torch.bool)
torch.testing.assert_close(torch.jit.trace(model, (x, reset))(x, reset), model(x, reset))
fastseq.replace(nn.GRU(4, 6))
torch.jit.script(nn.Sequential(fastseq.GRU(4, 6)))(x)
fastseq.streaming(fastseq.GRU(4, 6)).step(x[0, :1])
"""


def byte_code(folder):
    """The package without its sources."""
    package = folder / "fastseq"
    here = Path(fastseq.__file__).parent
    shutil.copytree(here, package, ignore=shutil.ignore_patterns("__pycache__"))
    assert compileall.compile_dir(package, legacy=True, quiet=2)
    for source in package.rglob("*.py"):
        source.unlink()
    return package


def run_with(path, backends, *flags):
    done = subprocess.run(
        [sys.executable, *flags, "-c", PROGRAM.format(backends=backends)],
        env=os.environ | {"PYTHONPATH": str(path), "OMP_NUM_THREADS": "1"},
        cwd=path if path.is_dir() else path.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_byte_code_alone(tmp_path):
    built = fastseq.backends()["native"] == "available"
    byte_code(tmp_path)
    run_with(tmp_path, ("native",) * built + ("eager", "reference", "torch"))


@pytest.mark.full
def test_archive(tmp_path):
    """Of byte code, where Numba's kernels find neither their sources nor a folder of their own."""
    pytest.importorskip("numba")
    package = byte_code(tmp_path / "from")
    with zipfile.ZipFile(tmp_path / "fastseq.zip", "w") as archive:
        for file in package.rglob("*.pyc"):
            archive.write(file, file.relative_to(package.parent))
    run_with(tmp_path / "fastseq.zip", ("numba", "eager"), "-OO")


def test_a_backend_that_cannot_be_imported_says_why(tmp_path, monkeypatch):
    """Whatever its import raises."""
    from fastseq.backends import choice

    (tmp_path / "breaks.py").write_text("raise OSError('no such driver')")
    monkeypatch.syspath_prepend(tmp_path)
    choice.register("breaking", "a backend", "breaks")
    try:
        assert fastseq.backends()["breaking"] == "not available: OSError: no such driver"
        with pytest.raises(RuntimeError, match="OSError: no such driver"):
            choice.select(choice.Problem("gru", None, "cpu", 5, 3, 4, 6, 6), "breaking")
    finally:
        choice.unregister("breaking")
