"""What nvcc made of the kernels of csrc/cuda, read by cuobjdump. As a program it prints a table.

python tests/helpers/cuda_binary.py [PATTERN ...]
"""

import fnmatch
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*)")
SIZE = 16  # bytes of an instruction


@dataclass
class Binary:
    """A kernel's machine code: bytes of a thread's stack frame and local memory and of a CTA's
    static shared memory, how often each instruction stands in it, as HMMA.16816.F32.BF16, and how
    many stand in its longest loop, which is that over time."""

    registers: int
    stack: int
    shared: int
    local: int
    code: Counter = field(default_factory=Counter)
    loop: int = 0

    def count(self, pattern: str) -> int:
        """Of the instructions that match from their start."""
        return sum(n for name, n in self.code.items() if re.match(pattern, name))

    @property
    def spilled(self) -> int:
        """Accesses to local memory. The kernels have no arrays there of their own."""
        return self.count("LDL|STL")


def cuobjdump() -> str | None:
    """CUDA's, or the one inside Triton's package."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    return found


def read(image: bytes, architecture: str, *coded: str) -> dict[str, Binary]:
    """Each kernel in a fat binary, for one of its architectures. coded: whose code is read too."""
    with tempfile.NamedTemporaryFile(suffix=".fatbin") as file:
        file.write(image)
        file.flush()
        command = [cuobjdump(), "-arch", f"sm_{architecture}", file.name]
        asked = [["-res-usage"]]
        if coded:  # looking for many by name takes it longer than printing all
            asked.append(["-sass"] if len(coded) > 6 else ["-sass", "-fun", ",".join(coded)])
        done = [
            subprocess.run([*command, *words], capture_output=True, text=True, check=True)
            for words in asked
        ]
    return understood("".join(one.stdout for one in done))


def understood(text: str) -> dict[str, Binary]:
    """What cuobjdump prints."""
    found: dict[str, Binary] = {}
    kernel = ""
    for line in text.splitlines():
        word = INSTRUCTION.match(line)
        if word:
            at, name, operands = int(word[1], 16), word[2], word[3]
            found[kernel].code[name] += 1
            target = re.search(r"0x([0-9a-f]+)\s*$", operands) if name == "BRA" else None
            if target:
                length = (at - int(target[1], 16)) // SIZE + 1
                found[kernel].loop = max(found[kernel].loop, length)
        elif "Function" in line:
            kernel = re.match(r"\s*Function\s*:?\s*(\w+)", line)[1]
        elif "REG:" in line:
            used = dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line))
            numbers = (int(used[name]) for name in ("REG", "STACK", "SHARED", "LOCAL"))
            found[kernel] = Binary(*numbers)
    return found


def main(patterns: list[str]) -> None:
    from fastseq import _cuda

    chosen = [
        name
        for name in _cuda.kernels()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns or ["*"])
    ]
    print("kernel architecture registers shared stack spilled instructions loop products")
    for unit in _cuda.units():
        for architecture in _cuda.architectures().split():
            for name, b in read(_cuda.image(unit), architecture, *chosen).items():
                if name in chosen:
                    numbers = (b.registers, b.shared, b.stack + b.local, b.spilled)
                    counts = b.code.total(), b.loop, b.count("HMMA")
                    print(name, f"sm_{architecture}", *numbers, *counts)


if __name__ == "__main__":
    main(sys.argv[1:])
