"""Reads the machine code of a compiled kernel: what a step of its loop over time does, in order.

A step is a text of letters, one for each instruction that matters:

    G  a load from global memory          W  a store to it
    ?  what follows a look at the count of arrivals: the first-level cache is emptied
    B  a barrier of the program's threads
    t  to shared memory                   l  from shared memory
    h  a product of the tensor cores      X  local memory: a register that did not fit
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LETTERS = {
    "LDG": "G",
    "STG": "W",
    "CCTL": "?",
    "BAR": "B",
    "STS": "t",
    "STSM": "t",
    "LDS": "l",
    "LDSM": "l",
    "HMMA": "h",
    "HGMMA": "H",
    "LDL": "X",
    "STL": "X",
}


@dataclass
class Code:
    """registers: of a thread. spilled: accesses to local memory, anywhere. step: the loop over time
    as letters; empty where there is no product in a loop."""

    registers: int
    spilled: int
    step: str


def _letter(instruction: str) -> str:
    return _LETTERS.get(instruction.split()[0].split(".")[0], "")


def read(cubin: bytes) -> Code:
    """By the cuobjdump inside Triton's package."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "-sass", "-res-usage", file.name]
        return understood(
            subprocess.run(command, capture_output=True, text=True, check=True).stdout
        )


def understood(text: str) -> Code:
    """What cuobjdump prints."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)
    code = [(int(address, 16), re.sub(r"^@!?U?P\w+\s+", "", what)) for address, what in found]
    return Code(
        registers=int(re.search(r"REG:(\d+)", text)[1]),
        # the kernels have no arrays of their own
        spilled=sum(what.startswith(("LDL", "STL")) for _, what in code),
        step=_step(code),
    )


def _step(code: list[tuple[int, str]]) -> str:
    """The innermost loop that holds all products. (A loop that looks for the other programs stands
    inside of it; the loop over tiles of the batch around it.)"""
    place = {address: k for k, (address, _) in enumerate(code)}
    products = [k for k, (_, what) in enumerate(code) if what.startswith(("HMMA", "HGMMA"))]
    loops = []
    for k, (address, what) in enumerate(code):
        jump = re.match(r"BRA\S*\s.*?(0x[0-9a-f]+)", what)
        if jump and int(jump[1], 16) < address and products:
            start = place[int(jump[1], 16)]
            if start <= products[0] and products[-1] <= k:
                loops.append((k - start, start, k))
    if not loops:
        return ""
    _, start, end = min(loops)
    return "".join(_letter(what) for _, what in code[start : end + 1])


def faults_of_a_grid(step: str) -> list[str]:
    """What is wrong with a step of a grid whose programs hold their weights."""
    found = []
    looks = re.search(r"G\?.*G\?|G\?", step)
    if not looks:
        return ["it waits for nobody"]
    before, after = step[: looks.start()], step[looks.end() :]
    asked = re.sub(r"[^GB]", "", before).strip("B")
    if "B" in asked:
        found.append(f"the next step's loads wait for one another: {asked}")
    first = re.sub(r"[^GBh]", "", after)
    first = first[: first.find("h")].strip("B")
    if "B" in first:
        found.append(f"the operand's pieces wait for one another: {first}")
    return found
