"""Copies of the sources, built as a user would, with the compilers of this machine or fakes."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
INPLACE = ["setup.py", "-q", "build_ext", "--inplace"]
#: Takes its options down, and makes an empty file of what is asked for.
FAKE = """#!/bin/sh
echo "$@" >> {log}
while [ "$1" != -o ]; do shift; done
: > "$2"
"""
BROKEN = """#!/bin/sh
echo "vocabulary.h:1: note: not this line" >&2
echo "vocabulary.h:2: error: no such thing" >&2
exit 1
"""

NO_NVCC = "/nonexistent/nvcc"  # of tests that build no CUDA kernels


def tool(root, name):
    """tools/<name>.py of a tree, as a module."""
    spec = importlib.util.spec_from_file_location(name, root / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def copy_to(root):
    """The sources, and nothing that was built of them."""
    files = [ROOT / name for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE")]
    files += [*(ROOT / "tools").glob("*.py"), *(ROOT / "csrc").rglob("*.*")]
    files += [path for path in (ROOT / "fastseq").rglob("*") if path.suffix in (".py", ".typed")]
    for path in files:
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copy)
    return root


def script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(*command, cwd, **environment):
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ
        | {"NVCC": NO_NVCC}
        | {name: str(value) for name, value in environment.items()},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def pythons():
    """Other Pythons from 3.10 that run here."""
    found = {}
    names = [f"python3.{minor}" for minor in range(10, 16)]
    for path in [*names, *sorted(Path.home().glob(".pyenv/versions/3.1?.*/bin/python"))]:
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        try:
            version = subprocess.check_output(
                [path, "-c", code], text=True, stderr=subprocess.DEVNULL
            ).strip()
        except (OSError, subprocess.CalledProcessError):
            continue
        found[version] = path
    found.pop("{}.{}".format(*sys.version_info), None)
    return found
