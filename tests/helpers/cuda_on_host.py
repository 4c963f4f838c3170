"""csrc/cuda compiled with the machine's C++ compiler, in which a CTA's threads are threads of the
machine (csrc/cuda/words_host.h). ``OnHost`` takes the place of the extension module
``fastseq._cuda``: its kernels run on tensors of the CPU, on a device that is made up.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
WORDS = ROOT / "tests" / "helpers" / "cuda_words.cpp"
BUILT = ROOT / "build" / "host"
FLAGS = "-std=c++20 -O1 -fPIC -shared -pthread -ffp-contract=off -fno-strict-aliasing".split()


def compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform == "win32" or shutil.which(words[0]) is None:
        pytest.skip("no C++ compiler")
    return words


def build(source: Path = CUDA / "kernels.cu", defines: tuple[str, ...] = ()) -> Path:
    """The library of the kernels that ``source`` defines; made where none is of these sources."""
    command = [*compiler(), *FLAGS, f"-I{CUDA}", *(f"-D{define}" for define in defines)]
    command += [f'-DFASTSEQ_HOST_KERNELS="{source}"', str(CUDA / "host.cpp"), "-o"]
    digest = hashlib.sha256(repr(command).encode())
    for path in sorted([source, *(ROOT / "csrc").rglob("*.h"), *CUDA.glob("*.c*")]):
        digest.update(path.read_bytes())
    library = BUILT / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{source.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in other processes wait for this one's
        if not library.exists():
            partial = library.with_suffix(".part")
            done = subprocess.run([*command, str(partial)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            partial.replace(library)
    return library


class OnHost:
    """What ``fastseq._cuda`` offers, of kernels that run on the host."""

    def __init__(self, library: Path) -> None:
        loaded = ctypes.CDLL(str(library))
        for function in ("kernels", "fields", "message"):
            getattr(loaded, f"fastseq_host_{function}").restype = ctypes.c_char_p
        n, text = ctypes.c_int64, ctypes.c_char_p
        loaded.fastseq_host_launch.argtypes = [text, n, n, n, ctypes.c_int, n, text, n]
        self._loaded = loaded
        self.launched: list[str] = []  # names of kernels

    def _said(self, function: str) -> str:
        return getattr(self._loaded, f"fastseq_host_{function}")().decode()

    def fields(self) -> str:
        return self._said("fields")

    def kernels(self) -> list[str]:
        return self._said("kernels").split()[::2]

    def launch(
        self,
        name: str,
        device: int,
        stream: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: bytes,
    ) -> None:
        self.launched.append(name)
        failed = self._loaded.fastseq_host_launch(
            name.encode(), *grid, threads, shared, arguments, len(arguments)
        )
        if failed:
            raise RuntimeError(f"{name}: {self._said('message')}")
