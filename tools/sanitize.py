"""Build csrc/driver.cpp with a sanitizer and run it: the C++ kernels without Python and torch. And
csrc/cuda/host_driver.cpp: the CUDA kernels, whose threads are threads of the CPU there.

    python tools/sanitize.py [address | thread] ... [base | avx2 | avx512 | avx512_bf16] ... \\
                             [cuda] [base-few | cuda-few]

By default each of the two sanitizers, on every instruction set that this processor knows, and on
the CUDA kernels; ``base-few`` and ``cuda-few`` are a choice of these that is soon done.
``address`` comes with the checks of undefined behaviour, and with a write behind a piece of a
scratch block, which it has to report. What is built is kept in out/sanitize/. ``CXX`` names the
compiler.
"""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
SOURCES = ("driver.cpp", "cpu/run.cpp", "cpu/kernels.cpp")
CANNOT_RUN = 2  # the driver's status where the processor does not know the instruction set
SANITIZERS = {
    # without optimisation, which would take the compiler twice as long
    "address": ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
#: Checks of every pointer, for which the compiler takes as long as for all else: not in a choice.
OF_POINTERS = "-fno-sanitize=null,alignment,object-size,vptr,pointer-overflow"
AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma"]
INSTRUCTION_SETS = {"base": [], "base-few": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": AVX512,
        "avx512_bf16": [*AVX512, "-mavx512bf16"],
    }
FLAGS = (
    "-std=c++17 -DFASTSEQ_TRIAL -g1 -pthread -ffp-contract=off -fno-math-errno -Wno-psabi".split()
)
STOP_AT_A_RACE = {"TSAN_OPTIONS": "halt_on_error=1"}
CUDA_FLAGS = (
    "-std=c++20 -g1 -pthread -ffp-contract=off -fno-strict-aliasing -Wno-unknown-pragmas".split()
)
CUDA = {"cuda": [], "cuda-few": ["-DFASTSEQ_FEW"]}
TARGETS = [*INSTRUCTION_SETS, *CUDA]
ALL = [name for name in TARGETS if not name.endswith("-few")]


def newest(*folders):
    """When a source changed last."""
    sources = [p for folder in folders for p in folder.glob("*.*")]
    return max(p.stat().st_mtime for p in sources)


def build(sanitizer, target):
    """The driver's path; it is made again where any source is newer."""
    folder = ROOT / "out" / "sanitize" / f"{sanitizer}-{target}"
    driver = folder / "driver"
    own = CSRC / "cuda" if target in CUDA else CSRC
    changed = newest(CSRC / "cells", CSRC / "cpu", own)
    if driver.exists() and driver.stat().st_mtime > changed:
        return driver
    folder.mkdir(parents=True, exist_ok=True)
    command = [*shlex.split(os.environ.get("CXX", "c++")), *SANITIZERS[sanitizer]]
    if target in CUDA:
        words = [*CUDA_FLAGS, *CUDA[target], CSRC / "cuda" / "host_driver.cpp", "-o", driver]
        subprocess.run([*command, *words], check=True)
    else:
        compile_instruction_set([*command, *FLAGS], target, folder, driver)
    return driver


def compile_instruction_set(command, instruction_set, folder, driver):
    objects = []
    if instruction_set.endswith("-few"):
        command = [*command, "-DFASTSEQ_FEW", OF_POINTERS]
    for source in SOURCES:
        name = instruction_set.removesuffix("-few")
        flags = [f"-DFASTSEQ_ISA={name}", *INSTRUCTION_SETS[instruction_set]]
        objects.append(folder / Path(source).with_suffix(".o").name)
        own = flags if source == "cpu/kernels.cpp" else []
        subprocess.run([*command, *own, "-c", CSRC / source, "-o", objects[-1]], check=True)
    subprocess.run([*command, *objects, "-o", driver], check=True)


def check_overrun(command, size):
    """One number behind a piece of so many must be reported."""
    done = subprocess.run([*command, str(size)], capture_output=True, text=True)
    if done.returncode == 0 or "use-after-poison" not in done.stderr:
        sys.exit(f"sanitize: a write behind a piece of {size} numbers went unseen")


def main(names):
    unknown = [name for name in names if name not in (*SANITIZERS, *TARGETS)]
    if unknown:
        sys.exit(f"sanitize: expected {[*SANITIZERS, *TARGETS]}, got {unknown}")
    for sanitizer in [n for n in SANITIZERS if n in names] or SANITIZERS:
        for target in [n for n in TARGETS if n in names] or ALL:
            driver = build(sanitizer, target)
            print(f"{sanitizer}, {target}: ", end="", flush=True)
            words = [] if target in CUDA else [target.removesuffix("-few")]
            done = subprocess.run([driver, *words], env=os.environ | STOP_AT_A_RACE)
            if done.returncode not in (0, CANNOT_RUN):
                sys.exit(f"sanitize: {driver} ended with status {done.returncode}")
            if sanitizer == "address" and done.returncode == 0 and target not in CUDA:
                for size in (15, 16):  # into what it is rounded up to, and beyond that
                    check_overrun([driver, *words], size)


if __name__ == "__main__":
    main(sys.argv[1:])
