"""Compiles the kernels without a GPU, in a process of its own, and prints what each one takes.

The host code runs on CPU tensors with its launches recorded, so that types, constants and absent
buffers are those of a real call; what was recorded is then compiled for each target, in parallel.

    python tests/triton_compile.py [--full [--every 13]] [--jobs N]
"""

import argparse
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
import triton
from problems import draw
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastseq.backends import triton as backend
from fastseq.backends import triton_kernels
from fastseq.backends.contract import Call, OutputGradients, Wanted
from fastseq.backends.triton_tiling import Device
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
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
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


def cases(full):
    """(target, cell, kind, H, P, B, everything): one H of each class that the tilings tell apart;
    an odd one, with every option on, takes the most registers."""
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
        return
    for cell in ("lstm", "gru_reset_before", "indrnn"):
        yield "sm_90", cell, "bfloat16", 63, None, 3, True
    for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh"):
        yield "sm_90", cell, "bfloat16", 300, None, 3, True
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
    yield "sm_80", "lstm", "bfloat16", 63, None, 3, True
    yield "sm_80", "gru", "bfloat16", 256, None, 3, True
    yield "gfx942", "lstm", "bfloat16", 63, None, 3, True
    yield "gfx942", "gru", "float32", 300, None, 3, True


PAIRS = ((63, 31), (300, 200))


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
    for form in ("grid", "step") if full or H == 300 else ("grid",):
        with backend.larger_as(form):
            result = backend.forward(call, True, everything)
            states = [s if everything else None for s in result.states]
            grads = OutputGradients(result.y, states, list(result.trajectory))
            backend.backward(call, result, grads, Wanted(True, True, True))
    if full or H < 100:
        call.memory = "lean"
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
    lines, seen = [], set()
    for kernel, values, options in recorded(*case, full):
        made = source(kernel, values)
        if made.hash() in seen:
            continue
        seen.add(made.hash())
        target, device = TARGETS[case[0]]
        out = triton.compile(made, target=target, options=options | {"enable_fp_fusion": True})
        taken = resources(out) | {"shared": out.metadata.shared}
        bad = taken["spilled"] or taken["shared"] > device.shared_memory
        name = f"{kernel.function.__name__} {' '.join(map(str, case))}"
        lines.append(f"{'BAD' if bad else 'ok'} {name} {taken}")
    return lines


def resources(out):
    if "cubin" not in out.asm:
        text = out.asm["amdgcn"]

        def count(name):
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        # scalar registers spill into lanes of vector registers: what reaches memory counts
        spilled = count("vgpr_spill_count") + count("private_segment_fixed_size")
        return {"registers": count("vgpr_count"), "spilled": spilled}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(out.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # a load or store of local memory is a spill: the kernels have no arrays of their own
    return {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spilled": len(re.findall(r"\b(?:STL|LDL)\b", text)),
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--every", type=int, default=1, help="take each n-th case alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    given = parser.parse_args()
    torch.set_num_threads(1)
    todo = [c for c in cases(given.full) if given.only in " ".join(map(str, c))][:: given.every]
    failed = 0
    with ProcessPoolExecutor(given.jobs) as pool:
        for lines in pool.map(partial(compiled, full=given.full), todo):
            print("\n".join(lines), flush=True)
            failed += sum(line.startswith("BAD") for line in lines)
    print(f"{len(todo)} cases, {failed} kernels that spill or do not fit")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
