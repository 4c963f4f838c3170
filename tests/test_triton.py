"""The triton backend where there is no GPU: under Triton's interpreter, in a process of its own,
and what an ordinary process sees of it. test_triton_compile.py compiles its kernels."""

import ast
import itertools
import re
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from children import child

import fastseq
from fastseq.backends.contract import Problem
from fastseq.cells import CELLS, Cell, Phase, register, unregister

ROOT = Path(__file__).parents[1]
PLAIN = Problem("lstm", torch.float32, "cpu", 3, 2, 4, 5, 5)


@pytest.mark.longest
def test_under_the_interpreter(request):
    triton = pytest.importorskip("triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        pytest.skip("the interpreter of older Tritons fails on NumPy 2.4")
    command = [
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "tests/helpers/triton_cases.py",
    ]
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
    "reverse",
    [(), (False,), (True,), (False, True), (True, False), (False, True) * 3, (False, True, True)],
    ids=str,
)
def test_flags_are_not_kept(reverse):
    """Under a graph's warm-up they would lie in its memory, which its replays write over."""
    flags = pytest.importorskip("fastseq.backends.triton")._flags(reverse, torch.device("cpu"))
    assert flags.tolist() == list(reverse) and flags.dtype is torch.int32
    kept = weakref.ref(flags)
    del flags
    assert kept() is None


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"device": "mps"}, "CUDA and ROCm"),
        ({"dtype": torch.complex64}, "complex64"),
        ({"mode": "dual"}, "eager"),
        ({"mode": "trace"}, "records no custom kernel"),
        ({"cell": "gru", "projected": True, "P": 3}, "cannot be projected"),
    ],
)
def test_declines(changed, words):
    module = pytest.importorskip("fastseq.backends.triton")
    on_gpu = PLAIN._replace(device="cuda")
    assert module.supports(on_gpu) is None
    assert words in module.supports(on_gpu._replace(**changed))


def test_no_name_of_a_kernel_is_missed():
    """A cell's names and a kernel's stand side by side: all of the kernel's own are told, so that
    a cell that has one of them is declined."""
    source = pytest.importorskip("fastseq.backends.triton_source")
    from fastseq.backends.triton_text import MADE_NAMES, OWN_NAMES, Pieces, Zoned, taken_names

    widths = [f"{n}{w}" for n in ("", "2 * ", "3 * ", "4 * ") for w in "HP"]
    pieces = Pieces(tuple((width, 2) for width in widths), 1)
    for cell in CELLS.values():
        assert not taken_names(cell)
        values = {n for p in cell.phases for n in (*p.takes, *p.returns)} | set(cell.states)
        values |= {f"{state}_prev" for state in cell.states}
        values |= {f"d{name}" for name in values}
        ways = Zoned(), Zoned(cell.states), Zoned(cell.states, drawn=False)
        for kind, projected, zoned in itertools.product(source.TEXTS, (False, True), ways):
            if projected and not cell.can_project:
                continue
            parts = range(len(cell.phases) + projected)
            grid = "grid" in kind
            for k in (None, pieces) if grid else parts if "step" in kind else (False, True):
                tree = ast.walk(ast.parse(source.TEXTS[kind](cell, projected, k, zoned)))
                names = {n.id for n in tree if isinstance(n, ast.Name)} - values
                tiles = {n for n in names if re.fullmatch(r"[axs](_[a-z])+", n)}
                own = {n for n in names - tiles if not re.fullmatch(MADE_NAMES, n)}
                assert own <= OWN_NAMES, sorted(own - OWN_NAMES)


def _leak(x_p, rows, h_prev):
    h = x_p + rows * h_prev
    return h, x_p


def _leak_backward(dh, rows, h_prev):
    drows = dh * h_prev
    return dh, drows, dh * rows


def test_a_cell_with_a_kernels_name_is_declined():
    module = pytest.importorskip("fastseq.backends.triton")
    phase = Phase(_leak, ("h", "x_p"), _leak_backward, ("dx_p", "drows", "dh_prev"))
    register(Cell("leak", ("p",), ("h",), ("x_p",), (phase,), "nowhere", ("rows",)))
    try:
        reason = module.supports(PLAIN._replace(device="cuda", cell="leak"))
    finally:
        unregister("leak")
    assert "call something of their own rows, as leak does; rename it" in reason


def test_a_text_that_cannot_be_read_is_declined():
    module = pytest.importorskip("fastseq.backends.triton")
    read = {}
    exec("def text(dh, h):\n    da_h = dh * dtanh(h)\n    return (da_h,)", read)
    elman = CELLS["rnn_tanh"]
    phase = replace(elman.phases[0], backward=read["text"])
    reason = module._unspeakable(replace(elman, name="elman", phases=(phase,)))
    assert "that of text cannot be read; write it in a file" in reason


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

    device = Device(
        more.get("shared_memory", 232448),
        more.get("warp_size", 32),
        more.get("processors", 132),
        more.get("hopper", True),
    )
    sizes = (H, P, dtype, precision, B, more.get("R", 1))
    return tiling(CELLS[cell], *sizes, device, more.get("larger", "step"))


@pytest.mark.parametrize("cell", CELLS)
def test_what_fits_on_the_chip_walks(cell):
    """In tiles that hold it; all else takes a launch for each step."""
    pytest.importorskip("triton")
    for H in (1, 15, 16, 17, 48, 63, 64, 80, 128):
        t = tile(cell, H)
        assert t.form == "walk"
        if CELLS[cell].products:
            assert t.block_h // 2 < max(H, 9) <= t.block_h
    assert tile(cell, 64).maxnreg == 255 and tile(cell, 64, warp_size=64).maxnreg is None
    wide = {tile(cell, H).form for H in (127, 129, 4096)}
    assert wide == ({"walk"} if not CELLS[cell].products else {"step"})


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
    for H in (64, 512, 2048):
        for larger in ("step", "grid"):
            found = {tile(H=H, B=B, larger=larger) for B in range(0, 4096, 7)}
            assert len(found) == (1 if H == 64 else 2)


def test_programs_that_wait_for_one_another_are_never_more_than_processors():
    from fastseq.backends.triton_tiling import programs

    for processors in (1, 7, 108, 132):
        for columns in (1, 3, 16, 132):
            for tiles in (1, 2, 9, 400):
                found = programs(tiles, columns, processors)
                assert 1 <= found <= tiles
                assert found * columns <= processors or (found == 1 and columns > processors)
    grid = {"larger": "grid"}
    for options in ({"H": 200}, {"H": 512}, {"H": 4096}, {"H": 512, "dtype": torch.float64}):
        for R, processors in itertools.product((1, 2, 4), (0, 1, 14, 108, 132)):
            t = tile(R=R, processors=processors, **options, **grid)
            columns = R * -(-options["H"] // t.block_h)
            assert t.form == ("grid" if columns <= processors else "step")
    assert tile(H=512, **grid).form == "grid" and tile(H=512).form == "step"
    assert tile(H=64, **grid).form == "walk"
    assert tile(H=512, warp_size=64, processors=0, **grid).form == "step"


def test_a_grid_holds_its_weights_where_they_fit():
    """Then each program has 16 sequences; a batch of more than the chip takes reads them."""
    pytest.importorskip("triton")
    from fastseq.backends.triton_tiling import Device, pieces_of

    grid = {"larger": "grid"}
    held = tile(H=512, **grid)
    assert held.resident and held.block_b == 16 and held.block_h == 32
    assert tile(H=512, B=128, **grid).resident and not tile(H=512, B=129, **grid).resident
    assert not tile(H=512, B=128, R=2, **grid).resident
    assert tile(H=768, **grid).resident
    assert tile("gru", H=1024, **grid).block_h == 32 and tile("gru", H=1024, **grid).resident
    assert not tile(H=768, shared_memory=166912, processors=40, **grid).resident
    assert not tile(H=300, **grid).resident  # its rows start anywhere
    assert not tile(H=512, dtype=torch.float64, **grid).resident

    def pieces(cell, H, backward, shared_memory=232448):
        device = Device(shared_memory, processors=132, hopper=True)
        return pieces_of(CELLS[cell], H, None, tile(cell, H, **grid), 2, backward, device)

    assert pieces("lstm", 512, False).counts == (("P", 4),)
    assert pieces("lstm", 512, True).counts == (("4 * H", 16),)
    assert pieces("gru", 528, True).counts == (("3 * H", 13),)
    assert pieces("lstm", 512, True).ahead == 12 and pieces("lstm", 768, True).ahead == 8
    assert pieces("lstm", 512, False, shared_memory=131072) is None


def test_a_grid_takes_sixteen_units_where_that_makes_its_weights_fit():
    """As many programs again; and where a gate's product alone is not narrower than the warps."""
    pytest.importorskip("triton")
    grid = {"larger": "grid"}
    held = tile(H=1024, **grid)
    assert held.resident and held.block_h == 16 and held.paired
    assert tile(H=1024, B=32, **grid).resident and not tile(H=1024, B=33, **grid).resident
    assert not tile("gru", H=2048, **grid).resident
    tf32 = {"dtype": torch.float32, "precision": "tf32"}
    assert tile(H=256, **tf32, **grid).block_h == 16 and tile(H=768, **tf32, **grid).block_h == 16
    assert tile("gru", H=256, **tf32, **grid).block_h == 32
    assert not tile(H=512, **grid).paired and not tile(H=128).paired and tile(H=16).paired


@pytest.mark.parametrize(
    "kind, k",
    [
        ("forward_walk", None),
        ("backward_step", 0),
        ("forward_grid", None),
        ("backward_grid", "held"),
        ("previous_h", None),
    ],
)
def test_nothing_compiles_again_for_another_length_or_batch(kind, k):
    """What Triton keys a compiled kernel by, for a GPU that need not be there."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from fastseq.backends.triton_kernels import INTERPRETED, PREVIOUS_H, kernel
    from fastseq.backends.triton_text import Pieces

    if INTERPRETED:
        pytest.skip("nothing is compiled")
    if k == "held":
        k = Pieces((("4 * H", 2),), 2)
    run = PREVIOUS_H if kind == "previous_h" else kernel(CELLS["lstm"], kind, False, k)
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
                fixed = name in ("H", "P") or (name.isupper() and len(name) > 1)
                values[name] = 64 if fixed else size
        return str(key_of(**values, num_warps=4)[1])

    assert len({key(size, shift) for size in (1, 2, 16, 17) for shift in (0, 1, 3)}) == 1
