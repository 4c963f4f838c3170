"""The triton backend where there is no GPU: under Triton's interpreter, in a process of its own,
and what an ordinary process sees of it. test_triton_compile.py compiles its kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq.backends.contract import Problem
from fastseq.cells import CELLS

ROOT = Path(__file__).parents[1]
PLAIN = Problem("lstm", torch.float32, "cpu", 3, 2, 4, 5, 5)


def child(command, **environment):
    """A process of its own; its output is the message where it fails."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.fail(f"{' '.join(map(str, command))}:\n{done.stdout[-8000:]}\n{done.stderr[-4000:]}")
    return done.stdout


def test_under_the_interpreter(request):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of older Tritons fails on NumPy 2.4")
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/triton_cases.py"]
    if request.config.getoption("--full"):
        command.append("--full")
    printed = child(command, TRITON_INTERPRET="1")
    assert " passed" in printed and "skipped" not in printed, printed


def test_the_cpu_is_declined_with_the_remedy():
    module = pytest.importorskip("fastseq.backends.triton")
    if module.INTERPRETED:
        pytest.skip("the interpreter serves the CPU")
    assert "TRITON_INTERPRET=1" in module.supports(PLAIN)
    if not torch.cuda.is_available():
        assert "TRITON_INTERPRET=1" in fastseq.backends()["triton"]
        with pytest.raises(RuntimeError, match=r"triton: not available: .*TRITON_INTERPRET"):
            fastseq.LSTM(3, 4, backend="triton")(torch.randn(2, 1, 3))


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"device": "mps"}, "CUDA and ROCm"),
        ({"dtype": torch.complex64}, "complex64"),
        ({"mode": "dual"}, "eager"),
        ({"mode": "trace"}, "choose torch"),
        ({"cell": "gru", "projected": True, "P": 3}, "cannot be projected"),
    ],
)
def test_declines(changed, words):
    module = pytest.importorskip("fastseq.backends.triton")
    on_gpu = PLAIN._replace(device="cuda")
    assert module.supports(on_gpu) is None
    assert words in module.supports(on_gpu._replace(**changed))


WITHOUT = """
import sys
sys.modules["triton"] = None
import torch, fastseq
print(fastseq.backends()["triton"])
fastseq.GRU(3, 4)(torch.randn(2, 1, 3))
"""


def test_without_triton_the_table_gives_the_remedy():
    printed = child(["-c", WITHOUT])
    assert printed.startswith("not available: ") and "pip install triton" in printed


def tile(cell="lstm", H=64, P=None, dtype=torch.bfloat16, precision="ieee", B=4, **more):
    from fastseq.backends.triton_tiling import Device, tiling

    device = Device(more.pop("shared_memory", 232448), more.pop("warp_size", 32))
    return tiling(CELLS[cell], H, P, dtype, precision, B, device, more.pop("backward", False))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_what_fits_on_the_chip_walks(cell, backward):
    """In tiles that hold it; all else takes a launch for each step."""
    pytest.importorskip("triton")
    for H in (1, 15, 16, 17, 48, 63, 64, 80, 128):
        t = tile(cell, H, backward=backward)
        assert t.form == "walk"
        if cell != "indrnn":
            assert t.block_h // 2 < max(H, 9) <= t.block_h
    assert tile(cell, 64).maxnreg == 255 and tile(cell, 64, warp_size=64).maxnreg is None
    wide = {tile(cell, H, backward=backward).form for H in (127, 129, 4096)}
    assert wide == ({"walk"} if cell == "indrnn" else {"step"})


def test_tiling_knows_types_and_devices():
    pytest.importorskip("triton")
    tf32 = {"dtype": torch.float32, "precision": "tf32"}
    assert tile(H=64, **tf32).form == "walk"
    assert tile(H=128, **tf32).form == "step"
    assert tile(H=128, shared_memory=101376).form == "step"
    assert tile(H=32, dtype=torch.float32, precision="tf32x3").form == "walk"
    assert tile(H=33, dtype=torch.float32, precision="tf32x3").form == "step"
    assert tile(H=16, dtype=torch.float64).form == "step"
    assert tile(H=16, dtype=torch.float32).form == "step"
    assert tile(H=16, P=512).form == "step"
    assert tile(H=64, P=3).block_p == 16
    assert tile(H=64, shared_memory=65536, warp_size=64).num_warps == 4
    assert tile(H=63, shared_memory=65536, warp_size=64).form == "step"


def test_tiling_depends_on_the_batch_alone_in_whether_it_is_small():
    pytest.importorskip("triton")
    for H in (64, 512):
        found = {tile(H=H, B=B) for B in range(0, 4096, 7)}
        assert len(found) == (1 if H == 64 else 2)


def test_make_gpu_says_that_there_is_none():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        ["make", "gpu", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0 and "torch sees no CUDA device" in done.stdout


def test_the_points_that_a_gpu_measures():
    """cuDNN over the whole list first, then a sample of the grid, then the rest, each once."""
    from bench.gpu import TYPES, grid, points
    from bench.workloads import matching

    found = list(points(None))
    listed = sum(w.dtype is torch.float32 for w in matching(None)) * len(TYPES)
    assert [stage for stage, *_ in found[:listed]] == ["cudnn"] * listed
    assert all(stage == "both" for stage, *_ in found[listed:])
    assert len(grid()) * len(TYPES) == 3240 == len(found) - 2 * listed
    assert len({(stage, w.name, kind) for stage, w, kind in found}) == len(found)


@pytest.mark.parametrize("kind", ["forward_walk", "backward_step", "previous_h"])
def test_nothing_compiles_again_for_another_length_or_batch(kind):
    """What Triton keys a compiled kernel by, for a GPU that need not be there."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastseq.backends.triton_kernels import INTERPRETED, PREVIOUS_H, kernel

    if INTERPRETED:
        pytest.skip("nothing is compiled")
    run = PREVIOUS_H if kind == "previous_h" else kernel("lstm", kind, False)
    target = make_backend(GPUTarget("cuda", 90, 32))
    key_of = create_function_from_signature(run.function.signature, run.function.params, target)
    buffer = torch.zeros(64)

    def key(size, shift):
        values = {}
        for name in run.arguments:
            if name.endswith("_ptr"):
                # the tables of ragged sequences lie one behind the other
                values[name] = buffer[shift:] if name in ("lengths_ptr", "offsets_ptr") else buffer
            else:
                fixed = name in ("H", "P", "SAVE", "WIDE", "PRECISION") or name.startswith("BLOCK")
                values[name] = 64 if fixed else size
        return str(key_of(**values, num_warps=4)[1])

    assert len({key(size, shift) for size in (1, 2, 16, 17) for shift in (0, 1, 3)}) == 1
