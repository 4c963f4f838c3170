"""Make the environment that a make target needs. Quick when it is made already.

    python3 tools/prepare.py [--python]

An active virtual environment is used (VIRTUAL_ENV, or a conda environment other than base), else
.venv is made. A torch that is there is kept, else constraints.txt says which one is installed; then
fastseq itself, editable, with its extras; an editable install of this tree under another name is
removed. A stamp in the environment remembers what was done. The C++ kernels, and the CUDA kernels
where there is nvcc, are built where they are missing or older than their sources.
``--python`` prints the interpreter that is used and does nothing else.

This file parses on every Python, so that one that is too old is told so.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EXTRAS = "test,bench,demo,dev"
OLDEST = (3, 10)
OLDEST_TORCH = (2, 10)
LIBRARY = os.path.join(ROOT, "fastseq", "_cpu.abi3.so")
NOTE = os.path.join(ROOT, "fastseq", "_cpu.txt")  # setup.py's: why there is no library
CUDA_LIBRARY = os.path.join(ROOT, "fastseq", "_cuda.abi3.so")
CUDA_NOTE = os.path.join(ROOT, "fastseq", "_cuda.txt")
NEEDED = ("torch", "numpy", "numba", "pytest", "pytest_benchmark", "xdist", "matplotlib", "tqdm")

# Runs in the environment's own interpreter: version, prefix, whether it has pip, its torch, and
# which of the modules named are missing. Nothing is imported.
PROBE = """
import sys
from importlib.util import find_spec
from importlib import metadata
def torch():
    try:
        return metadata.version("torch") if find_spec("torch") else ""
    except metadata.PackageNotFoundError:
        return "unknown"
print("%d.%d" % sys.version_info[:2])
print(sys.prefix)
print(int(find_spec("pip") is not None))
print(torch())
print(",".join(name for name in sys.argv[1:] if find_spec(name) is None))
"""

# Runs there too: the names of the distributions that are editable installs of a tree.
EDITABLE = """
import json, pathlib, sys
from importlib import metadata
tree = pathlib.Path(sys.argv[1]).as_uri()
for found in metadata.distributions(path=[p for p in sys.path if p.startswith(sys.prefix)]):
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    if origin.get("url") == tree and origin.get("dir_info", {}).get("editable"):
        print(found.metadata["Name"])
"""


def stop(sentence):
    sys.stderr.write("make: " + sentence + "\n")
    sys.exit(1)


def active_environment():
    """The folder of the environment that is active, or None."""
    if os.environ.get("VIRTUAL_ENV"):
        return os.environ["VIRTUAL_ENV"]
    conda = os.environ.get("CONDA_PREFIX")
    if conda and os.environ.get("CONDA_DEFAULT_ENV") != "base":
        return conda
    return None


def interpreter():
    return os.path.join(active_environment() or os.path.join(ROOT, ".venv"), "bin", "python")


def probe(python):
    """(version, prefix, has pip, torch's version or '', missing modules) of an interpreter."""
    command = [python, "-c", PROBE] + list(NEEDED)
    try:
        out = subprocess.check_output(command, cwd=os.path.join(ROOT, "tools"))
    except (OSError, subprocess.CalledProcessError):
        return None
    version, prefix, pip, torch, missing = out.decode().split("\n")[:5]
    return tuple(int(n) for n in version.split(".")), prefix, pip == "1", torch, missing


def make_environment():
    """.venv of the Python that runs this file, which may lend it its torch."""
    if sys.version_info < OLDEST:
        stop(
            "fastseq needs Python 3.10 or newer, and %s is Python %d.%d. Name another one: "
            "make PYTHON=python3.11 ..." % ((sys.executable,) + sys.version_info[:2])
        )
    try:
        import ensurepip
        import venv  # noqa: F401

        del ensurepip
    except ImportError:
        stop(
            "%s has no venv module, which makes the environment. On Debian and Ubuntu: "
            "apt install python%d.%d-venv. Or activate an environment of your own first."
            % ((sys.executable,) + sys.version_info[:2])
        )
    command = [sys.executable, "-m", "venv", "--clear"]
    torch = probe(sys.executable)[3]
    if torch and not too_old(torch):
        say("%s has torch %s, which is kept" % (sys.executable, torch))
        command.append("--system-site-packages")
    say("making .venv with %s" % sys.executable)
    run(command + [os.path.join(ROOT, ".venv")])


def too_old(torch):
    try:
        return tuple(int(n) for n in torch.split(".")[:2]) < OLDEST_TORCH
    except ValueError:
        return False


def say(sentence):
    sys.stderr.write("make: " + sentence + "\n")
    sys.stderr.flush()


def run(command):
    code = subprocess.call(command, cwd=ROOT)
    if code:
        stop("this command failed with status %d: %s" % (code, " ".join(command)))


def newest(of_cuda):
    """When a source of the CUDA kernels, or of the C++ kernels, changed; setup.py is of both."""
    csrc = os.path.join(ROOT, "csrc")
    times = [os.path.getmtime(os.path.join(ROOT, "setup.py"))]
    for folder, _, names in os.walk(csrc):
        first = os.path.relpath(folder, csrc).split(os.sep)[0]
        for name in names:
            cuda = first in ("cuda", "launch") or name == "cuda_module.cpp"
            if name == "words_host.h" or name.startswith("host"):  # for tests
                continue
            if first == "cells" or cuda == of_cuda:
                times.append(os.path.getmtime(os.path.join(folder, name)))
    return max(times)


def is_newer(path, time):
    return os.path.exists(path) and os.path.getmtime(path) >= time


def nvcc_is_there():
    """By the names that setup.py tries."""
    named = os.environ.get("NVCC", "").split()[:1]
    return any(map(shutil.which, named or ["nvcc", "/usr/local/cuda/bin/nvcc"]))


def text_of(note):
    """What setup.py left there, or nothing."""
    if not os.path.exists(note):
        return ""
    with open(note) as file:
        return file.read().strip()


def build_kernels(python):
    """Again where a source is newer. Where that cannot be, fastseq works without and says so; where
    there is no nvcc it says nothing, since most machines have none."""
    old = not is_newer(LIBRARY, newest(False))
    changed = newest(True)
    had_none = re.match("no nvcc|NVCC names", text_of(CUDA_NOTE)) is not None
    cuda = nvcc_is_there()
    cuda_is_old = not is_newer(CUDA_LIBRARY, changed) and (
        not is_newer(CUDA_NOTE, changed) or (cuda and had_none)
    )
    if old:
        say("building the C++ kernels, which takes up to a minute")
    if cuda_is_old and cuda:
        say("building the CUDA kernels, for sm_90a alone, which takes some minutes")
    if old or cuda_is_old:
        command = [python, "setup.py", "--quiet", "build_ext", "--inplace"]
        with open(os.devnull, "w") as nowhere:
            code = subprocess.call(command, cwd=ROOT, stdout=nowhere)
        if code:
            stop("this command failed with status %d: %s" % (code, " ".join(command)))
    if cuda and text_of(CUDA_NOTE) and not text_of(NOTE):
        say("going on without the CUDA kernels: " + text_of(CUDA_NOTE))
    if text_of(NOTE):
        say("going on without the C++ kernels: " + text_of(NOTE))


def distribution():
    """The name under which pip knows this tree."""
    with open(os.path.join(ROOT, "pyproject.toml")) as file:
        return re.search(r'^name = "(.+)"$', file.read(), re.MULTILINE).group(1)


def remove_other_names(python):
    """They would keep fastseq importable when pip has uninstalled the distribution."""
    command = [python, "-c", EDITABLE, ROOT]
    names = subprocess.check_output(command, cwd=os.path.join(ROOT, "tools")).decode().split()
    other = sorted(set(names) - {distribution()})
    if other:
        say("removing what installed this tree under another name: " + ", ".join(other))
        run([python, "-m", "pip", "uninstall", "--quiet", "--yes"] + other)


def wanted():
    """What the stamp holds when nothing is to be done."""
    digest = hashlib.sha256()
    for name in ("pyproject.toml", "constraints.txt", os.path.join("tools", "prepare.py")):
        with open(os.path.join(ROOT, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest() + "\n" + ROOT + "\n"


def main():
    if sys.argv[1:] == ["--python"]:
        print(interpreter())
        return
    python = interpreter()
    if active_environment() is None:
        found = probe(python) if os.path.exists(python) else None
        if found is None or found[0] < OLDEST:
            make_environment()
    elif not os.path.exists(python):
        stop("%s is active but holds no bin/python; deactivate it" % active_environment())
    found = probe(python)
    if found is None:
        stop("%s does not run; deactivate its environment or remove .venv" % python)
    version, prefix, pip, torch, missing = found
    if version < OLDEST:
        stop(
            "fastseq needs Python 3.10 or newer, and the active environment %s has Python %d.%d. "
            "Deactivate it, or activate another one." % ((prefix,) + version)
        )
    if torch and too_old(torch):
        stop(
            "fastseq needs torch 2.10 or newer, and %s has torch %s. Upgrade it, or deactivate the "
            "environment so that make builds one of its own." % (prefix, torch)
        )
    stamp = os.path.join(prefix, ".fastseq-stamp")
    stamp_text = wanted()
    if not missing and os.path.exists(stamp):
        with open(stamp) as file:
            if file.read() == stamp_text:
                build_kernels(python)
                return
    if not pip:
        run([python, "-m", "ensurepip", "--default-pip"])
    say("installing into %s; the first time takes some minutes" % prefix)
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(install + ["setuptools>=77", "wheel"])
    if not torch:
        run(install + ["-c", os.path.join(ROOT, "constraints.txt"), "torch"])
        torch = probe(python)[3]
    keep = [] if torch == "unknown" else ["torch==" + torch]
    run(install + ["--no-build-isolation", "-e", "%s[%s]" % (ROOT, EXTRAS)] + keep)
    remove_other_names(python)
    build_kernels(python)
    with open(stamp, "w") as file:
        file.write(stamp_text)


if __name__ == "__main__":
    main()
