"""Every Triton kernel compiles, and none spills: in a process of its own, without a GPU. What a
step does is read off the machine code (triton_sass.py)."""

import os
import subprocess
import sys

import pytest
import triton_sass
from children import child
from problems import full


def compiled(*options, **environment):
    """What triton_compile.py prints, of which nothing may be wrong."""
    printed = child(
        ["tests/helpers/triton_compile.py", *options], TRITON_INTERPRET="0", **environment
    )
    assert ", 0 kernels that spill" in printed and "BAD" not in printed
    return printed


@pytest.fixture(scope="module", autouse=True)
def compiler():
    triton = pytest.importorskip("triton")
    if not hasattr(triton.backends, "compiler"):
        pytest.skip("this Triton has no compiler for GPUs")


@pytest.mark.longest
def test_kernels_compile_and_do_not_spill(request):
    printed = compiled()
    for word in ("_forward_walk sm_90", "_backward_grid sm_80", "_backward_step_0 gfx942"):
        assert word in printed
    zoned = [line for line in printed.splitlines() if "sm_90" in line and " zoned " in line]
    for form in ("walk", "grid", "step_1"):
        assert any(f"_forward_{form} " in line for line in zoned), form
        assert any(f"_backward_{form} " in line for line in zoned), form
    assert "ok keep_kernel sm_90" in printed
    if request.config.getoption("--full"):  # a spread of two thousand cases: each takes seconds
        compiled("--full", "--every", "17")


@full
@pytest.mark.longest
@pytest.mark.parametrize("version", ["3.9.0", "3.6.0"])
def test_every_usual_size(version, tmp_path):
    """LSTM and GRU at H = 64 to 1024, in 16 bits and TF32: no spill, no product too many, loads
    side by side. 3.6 is what torch 2.11 brings."""
    import triton

    if triton.__version__ == version:
        assert f"Triton {version}: 26 cases" in compiled("--sizes")
        return
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--target", str(tmp_path), f"triton=={version}"]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip(f"pip cannot bring Triton {version} here")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    assert f"Triton {version}: 26 cases" in compiled("--sizes", PYTHONPATH=path)


# In the letters of triton_sass: what is asked for ahead, the wait, the pieces of h, the products.
RIGHT = "BtBlBGGlG?BtBlBG?tBlBGGGGttttBlhlhlhBtlWBWB"


@pytest.mark.parametrize(
    "step, words",
    [
        (RIGHT, None),
        (RIGHT.replace("BGGlG?B", "BGtBlGtBlG?B", 1), "the next step's loads wait"),
        (RIGHT.replace("GGGGtttt", "GGttBlGGtt"), "the operand's pieces wait"),
        (RIGHT.replace("?", ""), "waits for nobody"),
    ],
)
def test_what_is_read_off_a_step(step, words):
    found = triton_sass.faults_of_a_grid(step)
    assert found == [] if words is None else any(words in fault for fault in found)


SASS = """
 Function f:
  REG:40 STACK:0
        /*0000*/                   STL [R1], R2 ;
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64.STRONG.GPU R8, desc[UR4][R6.64] ;
        /*0028*/                   CCTL.IVALL ;
        /*0030*/              @!P0 BRA 0x20 ;
        /*0040*/                   HMMA.16816.F32.BF16 R12, R8, R4, R12 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P1 BRA 0x10 ;
        /*0070*/                   STG.E desc[UR4][R2.64], R12 ;
"""


def test_the_loop_over_time_is_the_innermost_that_holds_all_products():
    code = triton_sass.understood(SASS)
    assert (code.registers, code.spilled, code.step) == (40, 1, "GG?hB")
