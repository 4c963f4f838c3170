"""Is a wheel one binary for every Python and torch?

    python tools/one_binary.py dist/*.whl [PYTHON ...] [--torch 2.10.0]

Looks into the wheel: its tag, its size, and what its libraries ask of the system, which is no
symbol of torch or CUDA. Then native's tests of parity run on the wheel, away from the sources, in
each Python that is named. One that has torch and pytest lends them; for another they are installed
beside it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = "fastseq/_cpu.abi3.so"
CUDA_LIBRARY = "fastseq/_cuda.abi3.so"
OTHERS = {"torch": re.compile(r"torch|c10|at::|aoti_"), "CUDA": re.compile(r"^(cu|cuda|nv)[A-Z]")}
MOST_MB = 20
WHERE = """
import sys, torch, fastseq
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {fastseq.__file__}")
assert fastseq.backends()["native"] == "available", fastseq.backends()["native"]
"""


def numbers(version: str) -> list[int]:
    return [int(n) for n in version.split(".")]


def needs(library: Path) -> tuple[list[str], dict[str, str]]:
    """What a library leaves undefined, and the newest version that it asks of each interface."""
    out = subprocess.run(["nm", "-D", "-C", library], capture_output=True, text=True, check=True)
    undefined = re.findall(r"^\s+[Uw] (.+)$", out.stdout, re.MULTILINE)
    newest: dict[str, str] = {}
    for name, version in re.findall(r"@([A-Z]+)_([\d.]+)$", "\n".join(undefined), re.MULTILINE):
        newest[name] = max(version, newest.get(name, version), key=numbers)
    return undefined, newest


def look(wheel: Path) -> str:
    """One line on the wheel. Raises ValueError where it is not one binary."""
    if "-cp310-abi3-" not in wheel.name:
        raise ValueError(f"{wheel.name}: expected the tag cp310-abi3")
    megabytes = wheel.stat().st_size / 1e6
    if megabytes > MOST_MB:
        raise ValueError(f"{wheel.name} has {megabytes:.1f} MB, and {MOST_MB} are the most")
    newest: dict[str, str] = {}
    said = f"{wheel.name}: {megabytes:.1f} MB, no symbol of torch"
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for library in (LIBRARY, CUDA_LIBRARY):
            if library not in archive.namelist():
                note = library.replace(".abi3.so", ".txt")
                why = archive.read(note).decode().strip()
                if library == LIBRARY:
                    raise ValueError(f"{wheel.name} has no C++ kernels: {why}")
                said += f"; no CUDA kernels: {why}"
                continue
            undefined, versions = needs(Path(archive.extract(library, folder)))
            for name, pattern in OTHERS.items():
                found = [symbol for symbol in undefined if pattern.search(symbol)]
                if found:
                    raise ValueError(f"{library} is bound to {name}: {', '.join(found)}")
            for name, version in versions.items():
                newest[name] = max(version, newest.get(name, version), key=numbers)
    return f"{said}; needs {', '.join(f'{n} {version}' for n, version in sorted(newest.items()))}"


def prove(wheel: Path, python: str, torch: str) -> None:
    """Run native's tests of parity on the wheel in another Python, which is left as it is."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def run(*command: str | Path) -> None:
            subprocess.run(command, cwd=folder, check=True)

        has = subprocess.run(
            [python, "-c", "import torch, pytest, hypothesis"], capture_output=True
        )
        if has.returncode:
            run(python, "-m", "venv", folder / "venv")
            python = str(folder / "venv" / "bin" / "python")
            run(python, "-m", "pip", "install", "--quiet", torch, "numba", "pytest", "hypothesis")
        # beside the tests, where pytest's setting of pythonpath finds it
        run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, wheel)
        shutil.copytree(ROOT / "tests", folder / "tests")
        shutil.copy(ROOT / "pyproject.toml", folder)
        run(python, "-c", WHERE)
        pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "native")
        run(python, *pytest, "tests/test_parity.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("pythons", nargs="*", metavar="PYTHON")
    parser.add_argument("--torch", help="of a Python that has none (else constraints.txt's)")
    chosen = parser.parse_args()
    wheel = chosen.wheel.resolve()
    try:
        print(look(wheel))
    except ValueError as error:
        sys.exit(f"one_binary: {error}")
    pinned = (ROOT / "constraints.txt").read_text().split("\n")
    torch = f"torch=={chosen.torch}" if chosen.torch else pinned[-2]
    for python in chosen.pythons:
        # absolute, because it is run from another folder; not resolved, which would leave its venv
        prove(wheel, os.path.abspath(shutil.which(python) or python), torch)


if __name__ == "__main__":
    main()
