"""Every Triton kernel compiles, and none spills: in a process of its own, without a GPU."""

import pytest
from test_triton import child


def test_kernels_compile_and_do_not_spill(request):
    triton = pytest.importorskip("triton")
    if not hasattr(triton.backends, "compiler"):
        pytest.skip("this Triton has no compiler for GPUs")
    printed = child(["tests/triton_compile.py"], TRITON_INTERPRET="0")
    for word in ("_forward_walk sm_90", "_backward_grid sm_80", "_backward_step_0 gfx942"):
        assert word in printed
    if request.config.getoption("--full"):  # a spread of the thousand cases: each takes 8 seconds
        spread = ["--full", "--every", "17"]
        printed += child(["tests/triton_compile.py", *spread], TRITON_INTERPRET="0")
    assert ", 0 kernels that spill" in printed and "BAD" not in printed
