"""Builds ``fastseq._cpu``, the C++ kernels of ``csrc/cpu/``, where there is a C++ compiler, and
``fastseq._cuda``, the CUDA kernels of ``csrc/cuda/``, where there is nvcc as well.

Both need Python's headers and no torch, so an isolated build makes them too. Where one cannot be
built the package installs all the same: ``fastseq/_cpu.txt`` or ``fastseq/_cuda.txt`` then says
why, and ``fastseq.backends()`` repeats it.
``CXX`` names the compiler, as everywhere; g++ 12 and clang++ 22 were tried. ``NVCC`` names nvcc.

The CUDA kernels are compiled for sm_80, sm_90a and sm_100, and to PTX for later devices; in place
(``make``, an editable install) for sm_90a alone, which is quicker.
``build_ext --cuda-architectures="80 90a 100"`` names others.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ("csrc/module.cpp", "csrc/cpu/run.cpp", "csrc/cpu/kernels.cpp")
CUDA_SOURCES = ("csrc/cuda_module.cpp", "csrc/cuda/kernels.cu")
CUDA_FOLDERS = ("cuda", "launch")  # of csrc/: no other source includes from there
NOT_FOR_NVCC = "csrc/cuda/words_host.h"  # what tests compile


def headers(of_cuda):
    """Of one of the extensions; both share csrc/cells."""
    found = [path.relative_to(ROOT) for path in sorted((ROOT / "csrc").rglob("*.h"))]
    if of_cuda:
        return [p.as_posix() for p in found if p.parts[1] in (*CUDA_FOLDERS, "cells")]
    return [p.as_posix() for p in found if p.parts[1] not in CUDA_FOLDERS]


HEADERS, CUDA_HEADERS = headers(False), headers(True)
FLAGS = (
    "-std=c++17 -O2 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno "
    "-fno-sized-deallocation -Wall -Wextra -Wno-psabi"  # sized: of GCC 5's libstdc++
).split()
# kernels.cpp is compiled once for each; which one runs is decided when it runs.
# Those in OPTIONAL are left out where the compiler does not know their flags.
INSTRUCTION_SETS, OPTIONAL = {"base": ()}, {"avx512_bf16"}
if platform.machine() in ("x86_64", "AMD64"):
    avx512 = "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mprefer-vector-width=512".split()
    INSTRUCTION_SETS |= {
        "avx2": ("-mavx2", "-mfma", "-mf16c"),
        "avx512": avx512,
        "avx512_bf16": (*avx512, "-mavx512bf16"),
    }
# Nothing but the module's entry is exported, so that no template of the standard library in it is
# merged with another library's. Python's own functions are found when the module is loaded.
LINK = ["-shared", "-Wl,--version-script={exports}"]
if sys.platform == "darwin":
    LINK = ["-bundle", "-undefined", "dynamic_lookup"]
EXPORTS = "{{ global: PyInit_{name}; local: *; }};\n"

NVCC_FLAGS = "-fatbin -std=c++17 -O3 --compress-mode=size -Xptxas=-v".split()
NVCC_USUAL = "/usr/local/cuda/bin/nvcc"  # where NVIDIA's installer puts it, and on no PATH
OLDEST_NVCC = (12, 8)  # the first to know sm_100
ARCHITECTURES = "80 90a 100"
ARCHITECTURES_IN_PLACE = "90a"


class CannotBuild(Exception):
    """Why, in one sentence."""


def compiler():
    """The words of the command that compiles C++."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    if named:
        raise CannotBuild(f"CXX names the C++ compiler {named[0]}, which is not there")
    raise CannotBuild("no C++ compiler was found, neither c++ nor g++ nor clang++")


def cuda_compiler():
    """The words of the command that compiles CUDA C++, for a version that is new enough."""
    if sys.platform != "linux":
        raise CannotBuild(f"the CUDA kernels are built on Linux alone, and this is {sys.platform}")
    named = shlex.split(os.environ.get("NVCC", ""))
    for command in [named] if named else [["nvcc"], [NVCC_USUAL]]:
        if shutil.which(command[0]):
            break
    else:
        if named:
            raise CannotBuild(f"NVCC names the CUDA compiler {named[0]}, which is not there")
        raise CannotBuild(f"no nvcc was found, neither on the PATH nor as {NVCC_USUAL}")
    said = ask([*command, "--version"], "say its version")
    version = re.search(r"release (\d+)\.(\d+)", said)
    if not version or tuple(map(int, version.groups())) < OLDEST_NVCC:
        found = version.group(0) if version else "an unknown one"
        raise CannotBuild(
            f"{command[0]} is of CUDA {found.removeprefix('release ')}, and the CUDA kernels need "
            f"{'.'.join(map(str, OLDEST_NVCC))} or newer"
        )
    return command


def include_flags():
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        version = "{}.{}".format(*sys.version_info)
        raise CannotBuild(
            f"Python's headers are not in {sysconfig.get_path('include')} (on Debian and Ubuntu: "
            f"apt install python{version}-dev)"
        )
    return [f"-I{folder}" for folder in sorted(folders)]


def cuda_include_flags(nvcc):
    """Where nvcc has its headers, as it says itself: what is on the PATH may be a script."""
    said = ask([*nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], "be asked")
    found = re.search(r"^#\$ INCLUDES=(.*)$", said, re.MULTILINE)
    return [f"-isystem{word.removeprefix('-I')}" for word in shlex.split(found[1])] if found else []


def ask(command, what):
    """What a command prints, on both of its streams; `what` it is said to be unable to do."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = done.stdout.splitlines() or [f"exit status {done.returncode}"]
        why = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{command[0]} could not {what}: {why.strip()}")
    return done.stdout


def run(command, what):
    """Run a command of the compiler, which is said to be unable to do `what` where it fails."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        why = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{shlex.join(compiler())} could not {what}: {why.strip()}")


def is_current(made, sources):
    """Whether it is newer than its sources and this file."""
    inputs = [ROOT / name for name in sources] + [Path(__file__)]
    return made.exists() and made.stat().st_mtime >= max(p.stat().st_mtime for p in inputs)


def compile_object(command, source, made):
    """Compile where the source, a header or this file is newer than what was made of it."""
    if not is_current(made, (source, *HEADERS)):
        run([*command, "-c", str(ROOT / source), "-o", str(made)], f"compile {source}")


def link(objects, library, folder):
    """Link a module, whose entry alone is seen from outside."""
    name = library.name.partition(".")[0]
    exports = folder / f"exports{name}.txt"
    exports.write_text(EXPORTS.format(name=name))
    flags = [flag.format(exports=exports) for flag in LINK]
    run([*compiler(), *flags, *objects, "-o", str(library)], f"link fastseq.{name}")


def build(library, folder):
    """Compile the objects side by side into ``folder``, and link the library."""
    command = [*compiler(), *FLAGS]
    include = include_flags()
    module, loop, kernels = SOURCES
    jobs = [
        ([*command, *include], module, folder / "module.o"),
        (command, loop, folder / "run.o"),
    ]
    for name, flags in reversed(INSTRUCTION_SETS.items()):
        flags = [*command, f"-DFASTSEQ_ISA={name}", *flags]
        jobs.append((flags, kernels, folder / f"kernels-{name}.o"))
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [pool.submit(compile_object, *job) for job in jobs]
    objects = []
    for (_, _, target), result in zip(jobs, made, strict=True):
        try:
            result.result()
            objects.append(str(target))
        except CannotBuild:
            if target.stem.removeprefix("kernels-") not in OPTIONAL:
                raise
    link(objects, library, folder)


def generate_flags(architectures):
    """nvcc's, of machine code for each, and of PTX for those that later devices can translate."""
    for name in architectures:
        codes = f"sm_{name}" if name.endswith("a") else f"[sm_{name},compute_{name}]"
        yield f"-gencode=arch=compute_{name},code={codes}"


def units():
    """Of csrc/cuda/list.h: what is compiled each on its own."""
    text = (ROOT / "csrc" / "cuda" / "list.h").read_text()
    return re.findall(r"^  X\((\w+)\)", text, re.MULTILINE)


def compile_unit(command, source, unit, made):
    """Compile a unit's fat binary, and leave beside it what ptxas says of each kernel."""
    if is_current(made, (source, *(name for name in CUDA_HEADERS if name != NOT_FOR_NVCC))):
        return
    print(f"{shlex.join(command)} -DFASTSEQ_UNIT={unit} {source}", flush=True)
    new = made.with_suffix(".new")
    said = ask(
        [*command, f"-DFASTSEQ_UNIT={unit}", str(ROOT / source), "-o", str(new)],
        f"compile {source} of {unit}",
    )
    made.with_suffix(".txt").write_text(said)
    new.replace(made)


def build_cuda(library, folder, architectures):
    """Compile the units side by side, and the module, which takes them in as they are."""
    nvcc, cxx = cuda_compiler(), compiler()
    module, kernels = CUDA_SOURCES
    include = [*include_flags(), *cuda_include_flags(nvcc)]
    images = folder / "-".join(("cuda", *architectures))
    images.mkdir(parents=True, exist_ok=True)
    command = [*nvcc, *NVCC_FLAGS, *generate_flags(architectures)]
    if len(cxx) == 1:
        command += ["-ccbin", shutil.which(cxx[0]), "-allow-unsupported-compiler"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [
            pool.submit(compile_unit, command, kernels, unit, images / f"{unit}.fatbin")
            for unit in units()
        ]
    for result in made:
        result.result()
    made_module = folder / "cuda_module.o"
    defined = [
        f'-DFASTSEQ_IMAGES="{images}"',
        f'-DFASTSEQ_ARCHITECTURES="{" ".join(architectures)}"',
    ]
    command = [*cxx, *FLAGS, *include, *defined, "-c", str(ROOT / module), "-o", str(made_module)]
    run(command, f"compile {module}")
    link([str(made_module)], library, folder)


class BuildKernels(build_ext):
    """setuptools' own compiles each source once, one after the other, with Python's own flags."""

    user_options: ClassVar = [
        *build_ext.user_options,
        (
            "cuda-architectures=",
            None,
            f"what the CUDA kernels are compiled for (default: {ARCHITECTURES_IN_PLACE} in place, "
            f"else {ARCHITECTURES})",
        ),
    ]

    def initialize_options(self):
        super().initialize_options()
        self.cuda_architectures = None

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")  # kept, for an editable install too
        if self.cuda_architectures is None:
            self.cuda_architectures = ARCHITECTURES_IN_PLACE if self.inplace else ARCHITECTURES

    def paths(self, ext):
        library = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
        return library, library.with_name(f"{library.name.partition('.')[0]}.txt")

    def build_extension(self, ext):
        library, note = self.paths(ext)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            if ext.name == "fastseq._cuda":
                build_cuda(library, Path(self.build_temp), self.cuda_architectures.split())
            else:
                build(library, Path(self.build_temp))
        except CannotBuild as why:
            note.write_text(f"{why}\n")
            kind = "CUDA" if ext.name == "fastseq._cuda" else "C++"
            print(f"fastseq is built without its {kind} kernels: {why}")

    def copy_extensions_to_source(self):
        """As they were made: an old library that can no longer be built goes away."""
        for ext in self.extensions:
            for made in self.paths(ext):
                kept = ROOT / "fastseq" / made.name
                if made.exists():
                    # in one step: the old one may be loaded, and others may be loading it
                    beside = kept.with_name(f"{made.name}.new")
                    shutil.copy(made, beside)
                    beside.replace(kept)
                else:
                    kept.unlink(missing_ok=True)


# A free-threaded Python has no limited API; the compiler says so, and numba serves.
LIMITED = not sysconfig.get_config_var("Py_GIL_DISABLED")

setup(
    ext_modules=[
        Extension(
            name,
            sources=list(sources),
            depends=depends,
            py_limited_api=LIMITED,
            optional=True,
        )
        for name, sources, depends in (
            ("fastseq._cpu", SOURCES, HEADERS),
            ("fastseq._cuda", CUDA_SOURCES, CUDA_HEADERS),
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
