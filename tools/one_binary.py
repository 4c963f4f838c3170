"""Is a wheel one binary for every Python and torch?

    python tools/one_binary.py dist/*.whl [PYTHON ...] [--torch 2.10.0]

Looks into the wheel: its tag, and what its library asks of the system, which is no symbol of torch.
Then native's tests of parity run on the wheel, away from the sources, in each Python that is named.
One that has torch and pytest lends them; for another they are installed beside it.
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
TORCH = re.compile(r"torch|c10|at::|aoti_")
WHERE = """
import sys, torch, fastseq
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, {fastseq.__file__}")
assert fastseq.backends()["native"] == "available", fastseq.backends()["native"]
"""


def needs(library: Path) -> tuple[list[str], dict[str, str]]:
    """What a library leaves undefined, and the newest version that it asks of each interface."""
    out = subprocess.run(["nm", "-D", "-C", library], capture_output=True, text=True, check=True)
    undefined = re.findall(r"^\s+[Uw] (.+)$", out.stdout, re.MULTILINE)
    newest: dict[str, str] = {}
    for name, version in re.findall(r"@([A-Z]+)_([\d.]+)$", "\n".join(undefined), re.MULTILINE):
        numbers = [int(n) for n in version.split(".")]
        if name not in newest or numbers > [int(n) for n in newest[name].split(".")]:
            newest[name] = version
    return undefined, newest


def look(wheel: Path) -> str:
    """One line on the wheel. Raises ValueError where it is not one binary."""
    if "-cp310-abi3-" not in wheel.name:
        raise ValueError(f"{wheel.name}: expected the tag cp310-abi3")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        if LIBRARY not in archive.namelist():
            note = LIBRARY.replace(".abi3.so", ".txt")
            raise ValueError(
                f"{wheel.name} has no C++ kernels: {archive.read(note).decode().strip()}"
            )
        undefined, newest = needs(Path(archive.extract(LIBRARY, folder)))
    of_torch = [name for name in undefined if TORCH.search(name)]
    if of_torch:
        raise ValueError(f"{LIBRARY} is bound to torch: {', '.join(of_torch)}")
    versions = ", ".join(f"{name} {version}" for name, version in sorted(newest.items()))
    return f"{wheel.name}: no symbol of torch; needs {versions}"


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
