"""Builds ``fastseq._cpu``, the C++ kernels of ``csrc/``, where there is a C++ compiler.

They need Python's headers and no torch, so an isolated build makes them too. Where they cannot be
built the package installs all the same: ``fastseq/_cpu.txt`` then says why, and
``fastseq.backends()`` repeats it.
``CXX`` names the compiler, as everywhere; g++ 12 and clang++ 22 were tried.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
SOURCES = ("csrc/module.cpp", "csrc/cpu/run.cpp", "csrc/cpu/kernels.cpp")
HEADERS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*.h"))
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
EXPORTS = "{ global: PyInit__cpu; local: *; };\n"


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


def include_flags():
    folders = {sysconfig.get_path("include"), sysconfig.get_path("platinclude")}
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        version = "{}.{}".format(*sys.version_info)
        raise CannotBuild(
            f"Python's headers are not in {sysconfig.get_path('include')} (on Debian and Ubuntu: "
            f"apt install python{version}-dev)"
        )
    return [f"-I{folder}" for folder in sorted(folders)]


def run(command, what):
    """Run a command of the compiler, which is said to be unable to do `what` where it fails."""
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    sys.stderr.write(done.stderr)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit status {done.returncode}"]
        why = next((line for line in lines if "error" in line), lines[-1])
        raise CannotBuild(f"{shlex.join(compiler())} could not {what}: {why.strip()}")


def compile_object(command, source, made):
    """Compile where the source, a header or this file is newer than what was made of it."""
    inputs = [ROOT / name for name in (source, *HEADERS)] + [Path(__file__)]
    if made.exists() and made.stat().st_mtime >= max(p.stat().st_mtime for p in inputs):
        return
    run([*command, "-c", str(ROOT / source), "-o", str(made)], f"compile {source}")


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
    exports = folder / "exports.txt"
    exports.write_text(EXPORTS)
    link = [flag.format(exports=exports) for flag in LINK]
    run([*compiler(), *link, *objects, "-o", str(library)], "link fastseq._cpu")


class BuildKernels(build_ext):
    """setuptools' own compiles each source once, one after the other, with Python's own flags."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")  # kept, for an editable install too

    def paths(self, ext):
        library = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
        return library, library.with_name("_cpu.txt")

    def build_extension(self, ext):
        library, note = self.paths(ext)
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        try:
            build(library, Path(self.build_temp))
        except CannotBuild as why:
            note.write_text(f"{why}\n")
            print(f"fastseq is built without its C++ kernels: {why}")

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
            "fastseq._cpu",
            sources=list(SOURCES),
            depends=HEADERS,
            py_limited_api=LIMITED,
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED else {},
)
