"""Compiles the kernels without a GPU, in a process of its own, and prints what each one takes.

The host code runs on CPU tensors with its launches recorded, so that types, constants and absent
buffers are those of a real call; what was recorded is then compiled for each target, in parallel.

    python tests/helpers/triton_compile.py [--full [--every 13] | --sizes] [--jobs N]

``--sizes``: LSTM and GRU at every usual size, whose steps are read as machine code besides
(triton_sass.py).
"""

import argparse
import re
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch
import triton
import triton_sass
from problems import draw
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseq.backends import triton as backend
from fastseq.backends import triton_kernels, triton_masks, triton_source
from fastseq.backends.contract import Call, OutputGradients, Wanted
from fastseq.backends.triton_tiling import Device, Tiling, pieces_of, tiling
from fastseq.cells import CELLS

#: What a compiler and the tiling know of a device.
TARGETS = {
    "sm_90": (GPUTarget("cuda", 90, 32), Device(232448, processors=132, hopper=True)),
    "sm_80": (GPUTarget("cuda", 80, 32), Device(166912, processors=108)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), Device(65536, 64)),
}
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
#: float32's products, and each 16-bit type
KINDS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "float64": (torch.float64, "ieee"),
}


def kinds_of(target):
    """Three products in TF32 for one in float32 are not offered on AMD's."""
    return [kind for kind in KINDS if (target, kind) != ("gfx942", "tf32x3")]


#: The operand of a product: its inner length, and how many neighbours along it a thread holds.
TOO_WIDE = r"x(\d+)x\w+, #ttg.dot_op<{opIdx = 0, parent = #\w+, kWidth = (\d+)}>"


def cases(full):
    """(target, cell, kind, H, P, B, everything): one H of each class that the tilings tell apart;
    an odd one, with every option on, takes the most registers. everything: or "zoned", with zoneout
    besides."""
    if full:
        for target in TARGETS:
            for cell in CELLS:
                for kind in kinds_of(target):
                    for H in (15, 31, 63, 64, 127, 128):
                        yield target, cell, kind, H, None, 3, H % 2 == 1
                    for H, B in ((300, 3), (300, 2000), (512, 3), (512, 2000), (1024, 3)):
                        yield target, cell, kind, H, None, B, True
            for kind in kinds_of(target):
                yield from ((target, "lstm", kind, H, P, 3, True) for H, P in PAIRS)
                yield from ((target, cell, kind, H, None, 3, "zoned") for cell, H in ZONED)
        return
    yield from (("sm_90", cell, "bfloat16", H, None, 3, "zoned") for cell, H in ZONED)
    for cell in ("lstm", "gru_reset_before", "indrnn"):
        yield "sm_90", cell, "bfloat16", 63, None, 3, True
    for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh"):
        yield "sm_90", cell, "bfloat16", 300, None, 3, True
    yield "sm_90", "mgu", "bfloat16", 64, None, 3, True
    yield "sm_90", "peephole_lstm", "bfloat16", 300, None, 3, True
    for cell in ("lstm", "gru"):
        yield "sm_90", cell, "bfloat16", 512, None, 3, True
    yield "sm_90", "lstm", "bfloat16", 512, None, 2000, True
    yield "sm_90", "lstm", "bfloat16", 128, None, 3, True
    yield "sm_90", "lstm", "tf32", 64, None, 3, False
    yield "sm_90", "gru", "tf32x3", 64, None, 3, True
    yield "sm_90", "gru", "tf32", 300, None, 2000, True
    yield "sm_90", "lstm", "float64", 15, None, 3, True
    yield "sm_90", "lstm", "bfloat16", *PAIRS[0], 3, True
    yield "sm_90", "lstm", "bfloat16", *PAIRS[1], 3, True
    yield "sm_90", "gru", "float16", 768, None, 3, False
    yield "sm_90", "lstm", "bfloat16", 1024, None, 3, False
    yield "sm_80", "lstm", "bfloat16", 63, None, 3, True
    yield "sm_80", "gru", "bfloat16", 256, None, 3, True
    yield "gfx942", "lstm", "bfloat16", 63, None, 3, True
    yield "gfx942", "gru", "float32", 300, None, 3, True


PAIRS = ((63, 31), (300, 200))
#: A walk where rows start anywhere, and one that asks ahead; a grid, and steps; a grid that holds
#: its weights.
ZONED = (("lstm", 63), ("rnn_tanh", 64), ("gru_reset_before", 300), ("lstm", 512))


def cases_of_sizes():
    """What cuDNN is measured against; no option on, as in most calls. And what 3.6 refused, or put
    aside, where 3.9 did not."""
    yield "sm_80", "lstm", "float32", 127, None, 3, True
    yield "sm_80", "lstm", "float16", 300, None, 3, True
    for kind in ("bfloat16", "tf32"):
        for cell in ("lstm", "gru"):
            for H in (64, 128, 256, 512, 768, 1024):
                yield "sm_90", cell, kind, H, None, 3, False


def recorded(target, cell, kind, H, P, B, everything, full=True):
    """The launches of a forward and a backward: (kernel, values, options). full: in each form that
    the size can take, and in lean memory."""
    dtype, precision = KINDS[kind]
    launches: list = []

    def record(self, grid, values, options):
        launches.append((self, {n: values[n] for n in self.arguments}, options))

    triton_kernels.Kernel.__call__ = record
    backend._precision = lambda dtype, device: precision
    backend._properties = lambda device: TARGETS[target][1]
    options = {"h_mask": True, "directions": 2} if everything else {"state": False}
    case = draw(cell, T=2, B=B, H=H, P=P, I=1, dtype=dtype, grad=False, **options)
    sizes = torch.full((2,), B) if everything else None
    rows = 2 * B
    call = Call(
        cell,
        case.x.reshape(rows, 1) if everything else case.x,
        sizes,
        case.states,
        case.weights,
        (False, True)[: case.directions],
        torch.zeros(case.directions, rows, dtype=torch.bool) if everything else None,
        case.h_mask,
    )
    if everything == "zoned":
        sizes = [(s.shape[0], rows, s.shape[2]) for s in case.states]
        call.stay = [torch.zeros(size, dtype=torch.bool) for size in sizes]
    for form in ("grid", "step") if full or H == 300 else ("grid",):
        with backend.larger_as(form):
            result = backend.forward(call, True, everything)
            states = [s if everything else None for s in result.states]
            grads = OutputGradients(result.y, states, list(result.trajectory))
            backend.backward(call, result, grads, Wanted(True, True, True))
    if full or H < 100:
        call.memory, result.saved = "lean", []
        backend.backward(call, result, grads, Wanted(True, False, False))
    return launches


def source(kernel, values):
    """What Triton compiles for these values, as its launcher would say it."""
    signature, constants, attributes = {}, {}, {}
    fixed = [p.name for p in kernel.function.params if p.do_not_specialize]
    for place, (name, value) in enumerate(values.items()):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            aligned = name not in fixed  # torch's allocator aligns
        elif isinstance(value, int) and not kernel.function.params[place].is_constexpr:
            signature[name] = "i32"
            aligned = name not in fixed and value % 16 == 0
        else:
            signature[name] = "constexpr"
            constants[name] = value
            continue
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel.function, signature, constants, attributes)


def compiled(case, full=False):
    """A line for each kernel of a case: what it takes, and whether it spills."""
    warnings.simplefilter("ignore")
    target, device = TARGETS[case[0]]
    triton_kernels._ROUNDS.value = target.backend == "cuda"  # as that device's torch would have it
    lines, seen = [], set()
    for kernel, values, options in recorded(*case, full):
        made = source(kernel, values)
        if made.hash() in seen:
            continue
        seen.add(made.hash())
        kernel_name = kernel.function.__name__
        name = f"{kernel_name} {' '.join(map(str, case))}"
        try:
            out = triton.compile(made, target=target, options=options | {"enable_fp_fusion": True})
        except Exception as error:
            lines.append(f"BAD {name} {' '.join(str(error).split())[:200]}")
            continue
        taken = resources(out) | {"shared": out.metadata.shared}
        step = taken.pop("step", "")
        # around the steps, not in one, a grid may put registers aside: with every option on; two on
        # 3.6; and one kernel on 3.9, whose loads have the most addresses
        older = triton.__version__ < "3.9"
        around = 16 if case[-1] else 2 if older else 0
        if (kernel_name, case[2:4], older) == ("gru_backward_grid", ("tf32", 512), False):
            around = 8
        around *= "_grid" in kernel_name
        # rounding what is handed on, ptxas puts up to six aside for LSTM in TF32 on 3.6, and would
        # put more aside elsewhere if it were given more registers
        aside = case[2] == "tf32" and older and "_grid" in kernel_name
        in_a_step = "X" in step and not (aside and taken["spilled"] <= 6)
        wrong = ["it spills"] if in_a_step or taken["spilled"] > max(around, 6 * aside) else []
        if taken["shared"] > device.shared_memory:
            wrong.append("it does not fit")
        if case[0] == "sm_90":
            wrong += faults_of_a_step(case, kernel.function, step, out.metadata.num_warps)
        multiplies = "dot(" in getattr(kernel.function, "src", "")
        rounds = "cvt.rna.tf32" in out.asm.get("ptx", "") or target.backend != "cuda"
        if case[2] == "tf32" and multiplies and not rounds:
            wrong.append("its operands are cut to TF32, not rounded")
        # a mask loaded as bytes gave threads more neighbours than there are: wrong products
        if too_wide := re.findall(TOO_WIDE, out.asm["ttgir"]):
            held = {(inner, k) for inner, k in too_wide if 4 * int(k) > int(inner)}
            wrong += [f"{k} numbers to a thread of an inner length of {n}" for n, k in sorted(held)]
        lines.append(f"{'BAD' if wrong else 'ok'} {name} {taken} {'; '.join(wrong)}".rstrip())
    return lines


def resources(out):
    if "cubin" in out.asm:
        code = triton_sass.read(out.asm["cubin"])
        return {"registers": code.registers, "spilled": code.spilled, "step": code.step}
    text = out.asm["amdgcn"]

    def count(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    # scalar registers spill into lanes of vector registers: what reaches memory counts
    spilled = count("vgpr_spill_count") + count("private_segment_fixed_size")
    return {"registers": count("vgpr_count"), "spilled": spilled}


def faults_of_a_step(case, function, step, num_warps):
    """Of a walk at a usual size, and of a grid whose programs hold their weights."""
    target, cell, kind, H, P, B, everything = case
    name, (dtype, precision) = function.__name__, KINDS[kind]
    walks, held = name.endswith("_walk"), "operand_0 = " in function.src
    if everything or not (held or (walks and H in (64, 128) and "h" in step)):
        return []
    device, backward = TARGETS[target][1], "backward" in name
    t = tiling(CELLS[cell], H, P, dtype, precision, B, 1, device, "grid")
    made, needed = step.count("h") * num_warps, products(CELLS[cell], H, P, t, dtype, backward)
    found = [] if made == needed else [f"{made} products of the tensor cores where {needed} do"]
    if held:
        found += triton_sass.faults_of_a_grid(step)
    # seven in and around a wait, in TF32 eight, of which a grid has one for each phase; most of the
    # rest for changes of layout
    waits = sum(bool(CELLS[cell].product_gates(phase)) for phase in CELLS[cell].phases)
    most = 17 + 7 * waits if backward else 13 + (8 if kind == "tf32" else 7) * waits
    most = 28 if walks else most
    barriers = step.count("B")
    return found + ([f"{barriers} barriers in a step"] if barriers > most else [])


def products(cell, H, P, t: Tiling, dtype, backward):
    """How many m16n8k16 (TF32: m16n8k8) a step takes, on whole tiles."""
    inner = 32 // dtype.itemsize
    if t.form == "walk":
        gates = len(cell.recurrent_gates) * t.block_h * t.block_p
        return (gates + (0 if P is None else t.block_h * t.block_p)) // (8 * inner)
    pieces = pieces_of(cell, H, P, t, dtype.itemsize, backward, TARGETS["sm_90"][1])
    terms = triton_source.terms_of(cell, P is not None, backward)
    columns = sum(term.n * t.block_h * pieces.of(term.width) for term in terms)
    return columns * t.block_k // (8 * inner)


def compiled_masks():
    """The kernel that draws masks: of a seed on the CPU, with steps, and of one on the device."""
    lines, rows = [], torch.zeros(3, dtype=torch.int64)
    numbers = dict.fromkeys(("low", "high", "site", "stride", "threshold", "rows"), 3)
    sizes = {"ROWS": triton_masks.ROWS, "COUNTERS": triton_masks.COUNTERS}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    for seed, steps, units in ((None, rows, 64), (rows[:1], None, 7)):
        given = {"seed_ptr": seed, "ids_ptr": rows, "steps_ptr": steps, "units": units}
        given |= numbers | sizes | {"out_ptr": torch.zeros(3, dtype=torch.uint8)}
        kernel = triton_masks.KEEP
        made = source(kernel, {name: given[name] for name in kernel.arguments})
        for target in TARGETS:
            out = triton.compile(made, target=TARGETS[target][0], options=options)
            taken = resources(out)
            taken.pop("step", None)
            lines.append(f"{'BAD' if taken['spilled'] else 'ok'} keep_kernel {target} {taken}")
    return lines


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="take each n-th case alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    todo = cases_of_sizes() if given.sizes else cases(given.full)
    todo = [c for c in todo if given.only in " ".join(map(str, c))][:: given.every]
    failed = 0
    if not given.sizes and given.only in "keep_kernel":
        print("\n".join(found := compiled_masks()))
        failed += sum(line.startswith("BAD") for line in found)
    with ProcessPoolExecutor(given.jobs) as pool:
        for lines in pool.map(partial(compiled, full=given.full), todo):
            print("\n".join(lines), flush=True)
            failed += sum(line.startswith("BAD") for line in lines)
    version = triton.__version__
    print(f"Triton {version}: {len(todo)} cases, {failed} kernels that spill or do not fit")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
