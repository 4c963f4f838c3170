"""csrc/cuda compiled with the machine's C++ compiler, in which a CTA's threads are threads of the
machine (csrc/cuda/words_host.h).

``OnHost`` takes the place of the extension module ``fastseq._cuda``, and ``use`` puts it there: the
whole backend then runs on tensors of the CPU, planned for ``DEVICE``, which is made up. A kernel is
compiled when it is first launched, with those of the same cell and size, and kept in build/host/.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import fastseq
from fastseq.backends import choice, imported, load
from fastseq.backends.cuda_kernels import Device

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
WORDS = ROOT / "tests" / "helpers" / "cuda_words.cpp"
BUILT = ROOT / "build" / "host"
FLAGS = "-std=c++20 -O0 -fPIC -shared -pthread -ffp-contract=off -fno-strict-aliasing".split()
FLAGS += ["-Wno-unknown-pragmas", f"-I{CUDA}"]
#: Made up: no more than the planner and the kernels need.
DEVICE = Device("a made-up GPU", 4, 227 << 10, 228 << 10, 65536, 1.0, (9, 0), 100, threads=256)


def compiler() -> list[str]:
    words = shlex.split(os.environ.get("CXX", "c++"))
    if sys.platform == "win32" or shutil.which(words[0]) is None:
        pytest.skip("no C++ compiler")
    return words


@cache
def sources() -> bytes:
    digest = hashlib.sha256()
    for path in sorted([*CUDA.iterdir(), *(ROOT / "csrc" / "cells").iterdir()]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def build(name: str, source: Path, *defines: str) -> Path:
    """The library of the kernels that a source defines; made where there is none of its text."""
    defines = (f'FASTSEQ_HOST_KERNELS="{source}"', *defines)
    command = [*compiler(), *FLAGS, *(f"-D{define}" for define in defines)]
    command += [str(CUDA / "host.cpp"), "-o"]
    digest = hashlib.sha256(repr(command).encode() + sources() + source.read_bytes())
    library = BUILT / f"{name}-{digest.hexdigest()[:16]}.so"
    BUILT.mkdir(parents=True, exist_ok=True)
    with (BUILT / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests in other processes wait for this one's
        if not library.exists():
            for old in BUILT.glob(f"{name}-*.so"):
                old.unlink()
            partial = library.with_suffix(".part")
            done = subprocess.run([*command, str(partial)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-4000:]
            partial.replace(library)
    return library


class Library:
    def __init__(self, path: Path) -> None:
        self._loaded = loaded = ctypes.CDLL(str(path))
        for function in ("kernels", "fields", "message"):
            getattr(loaded, f"fastseq_host_{function}").restype = ctypes.c_char_p
        n, text = ctypes.c_int64, ctypes.c_char_p
        i = ctypes.c_int
        loaded.fastseq_host_launch.argtypes = [text, n, n, n, i, n, i, i, text, n]
        loaded.fastseq_host_seed.argtypes, loaded.fastseq_host_seed.restype = [n], None

    def _said(self, function: str) -> str:
        return getattr(self._loaded, f"fastseq_host_{function}")().decode()

    def fields(self) -> str:
        return self._said("fields")

    def kernels(self) -> dict[str, int]:
        """And how many threads each may have."""
        words = self._said("kernels").split()
        return {name: int(threads) for name, threads in zip(words[::2], words[1::2], strict=True)}

    def seed(self, seed: int) -> None:
        """Of what launches keep back, at random; from 0 nothing."""
        self._loaded.fastseq_host_seed(seed)

    def launch(
        self,
        name: str,
        device: int,
        stream: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: bytes,
        cluster: int = 1,
        together: bool = False,
    ) -> None:
        failed = self._loaded.fastseq_host_launch(
            name.encode(), *grid, threads, shared, cluster, together, arguments, len(arguments)
        )
        if failed:
            raise RuntimeError(f"{name}: {self._said('message')}")


def library_of_words() -> Library:
    """Of kernels that try the words alone."""
    return Library(build("words", WORDS))


@cache
def listed() -> dict[str, tuple[str, str, str, str, str]]:
    """Of each kernel of list.h: way, cell, struct of the cell, type, size."""
    found = re.findall(r"X\((\w+), (\w+), (\w+), (\w+), (\w+)\)", (CUDA / "list.h").read_text())
    return {
        f"{way}_{cell}_{type}_{HC}": (way, cell, s, type, HC) for way, cell, s, type, HC in found
    }


@cache
def library_of(cell: str, HC: str) -> Library:
    """All types and ways: most of the time goes into what kernels share."""
    chosen = (f"X({', '.join(k)})" for k in listed().values() if (k[1], k[4]) == (cell, HC))
    defines = "FASTSEQ_UNIT=host", f"FASTSEQ_KERNELS_host(X)={' '.join(chosen)}"
    return Library(build(f"{cell}_{HC}", CUDA / "kernels.cu", *defines))


def library_that_has(kernel: str) -> Library:
    _, cell, _, _, HC = listed()[kernel]
    return library_of(cell, HC)


class OnHost:
    """What ``fastseq._cuda`` offers, of kernels that run on the host."""

    __file__ = str(ROOT / "fastseq" / "_cuda.py")

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, int, int], int]] = []  # name, grid, threads
        self.clusters_at_once = 4

    def driver(self) -> int:
        return 13000

    def toolkit(self) -> int:
        return 13000

    def architectures(self) -> str:
        return "host"

    def fields(self) -> str:
        return library_that_has("previous_rows_float32_256").fields()

    def kernels(self) -> tuple[str, ...]:
        return tuple(listed())

    def launch(
        self,
        name: str,
        device: int,
        stream: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        arguments: bytes,
        cluster: int,
        together: bool,
    ) -> None:
        self.launched.append((name, grid, threads))
        library_that_has(name).launch(
            name, device, stream, grid, threads, shared, arguments, cluster, together
        )

    def attributes(self, name: str, device: int) -> dict[str, int]:
        threads = library_that_has(name).kernels()[name]
        return {"registers": 255, "local": 0, "shared": 0, "threads": threads, "binary": 0}

    def occupancy(self, name: str, device: int, threads: int, shared: int) -> int:
        return 1

    def clusters(self, name: str, device: int, size: int, threads: int, shared: int) -> int:
        """How many of that size can be there at once."""
        return self.clusters_at_once

    def limits(self, device: int) -> dict[str, int]:
        return {"mps": 0, "cooperative": 1}


def forget() -> None:
    """What was asked before of backends and of choices among them."""
    for asked in (imported, load, choice.judge, choice.short_way):
        asked.cache_clear()


@contextlib.contextmanager
def use() -> Iterator[OnHost]:
    """``backend="cuda"`` takes tensors of the CPU, and its kernels run on the host."""
    compiler()
    name, on_host = "fastseq.backends.cuda", OnHost()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "fastseq._cuda", on_host)
        patch.setattr(fastseq, "_cuda", on_host, raising=False)
        patch.setitem(sys.modules, name, None)  # the one that may be there comes back
        del sys.modules[name]
        patch.setattr(sys.modules["fastseq.backends"], "cuda", None, raising=False)
        cuda = importlib.import_module(name)
        patch.setattr(cuda, "DEVICES", ("cpu",))
        patch.setattr(cuda, "unavailable", lambda: None)
        patch.setattr(cuda, "device_at_hand", lambda index=None: DEVICE)
        patch.setattr(cuda, "_queue", lambda device: (0, 0))
        forget()
        yield on_host
    forget()
