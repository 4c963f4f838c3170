"""Chains in Triton where there is no GPU: under the interpreter and compiled, in processes of their
own, and what an ordinary process sees. test_gpu_crf.py runs them on a GPU."""

import pytest
import torch
from children import child

from fastseq.backends import crf

triton = pytest.importorskip("triton")

#: What an ordinary run takes of the cases that every room is held to.
FEW = "4-3-3 and (every_path or best_paths and 0.0-3) or nothing and 0-3"


def test_under_the_interpreter(request):
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of older Tritons fails on NumPy 2.4")
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_crf_rooms.py"]
    # NumPy says so of log 0, which is -inf here
    command += ["-W", "ignore::RuntimeWarning"]
    if not request.config.getoption("--full"):
        command += ["-k", FEW]
    printed = child(command, TRITON_INTERPRET="1")
    assert " passed" in printed and "skipped" not in printed, printed


@pytest.mark.full
def test_kernels_compile_and_do_not_spill():
    if not hasattr(triton.backends, "compiler"):
        pytest.skip("this Triton has no compiler for GPUs")
    printed = child(["tests/helpers/crf_triton_compile.py", "--full"], TRITON_INTERPRET="0")
    lines = printed.splitlines()
    assert len(lines) == 28 and all(line.startswith("ok ") for line in lines), printed


def test_what_is_declined():
    room = pytest.importorskip("fastseq.backends.crf.triton")
    if room.INTERPRETED:
        pytest.skip("the interpreter serves the CPU")
    assert "TRITON_INTERPRET=1" in room.supports(torch.float32, "cpu", 3)
    for dtype, most in ((torch.float32, 128), (torch.float64, 64)):
        assert room.supports(dtype, "cuda", most) is None
        assert f"up to {most} tags" in room.supports(dtype, "cuda", most + 1)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"triton: not available: .*TRITON_INTERPRET"):
            crf.select(torch.float32, "cuda", 3, "triton")
