"""What this machine is: asked of a child, so that the parent stays without a device."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import fastseq

from . import crew, forms
from .budget import Clock

CORES = os.cpu_count() or 1
#: Side by side, on one GPU: a core is left to what watches them.
PROCESSES = max(1, min(14, CORES - 2))


def probe(task: Any) -> Iterator[dict[str, Any]]:
    """In a child: a row's columns, and what decides on forms; or why there is nothing to run."""
    if not torch.cuda.is_available():
        yield {
            "missing": "torch sees no CUDA device on this machine; there is nothing to run it on"
        }
        return
    verdict = fastseq.backends()["triton"]
    if verdict != "available":
        yield {"missing": f"triton is {verdict}"}
        return
    import triton

    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    torch.zeros(1, device="cuda").add_(1).cpu()  # a device that does not answer is known at once
    columns = {
        "device": torch.cuda.get_device_name(),
        "capability": capability,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "fastseq": fastseq.__version__,
    }
    free, total = torch.cuda.mem_get_info()
    yield {
        "columns": columns,
        "kinds": forms.kinds(),
        "backend": fastseq.backends()["cuda"],
        "memory": f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
        "cuda": torch.version.cuda or torch.version.hip or "none",
    }


def ask(log: str, limit: float) -> dict[str, Any]:
    """What :func:`probe` found; 'missing' says why there is nothing to run.

    Where a forked child gets no answer, as when a library has touched the device in this process,
    children are started anew from here on.
    """
    found = _asked(log, limit)
    if "missing" in found and found["missing"].startswith(SILENT) and crew.start == "fork":
        crew.start = "spawn"
        found = _asked(log, limit)
    return found


SILENT = "the device did not answer"


def _asked(log: str, limit: float) -> dict[str, Any]:
    tasks = iter(["probe"])
    found: dict[str, Any] = {"missing": SILENT}
    for event in crew.crew(lambda: next(tasks, None), probe, Clock(limit), silence=limit, log=log):
        if event.kind == "told":
            found = event.message
        elif event.kind != "done":
            found = {"missing": f"{SILENT}: {event.text}"}
    return found


def tools() -> dict[str, str]:
    """What else a run meets: the driver, compilers, checkers; '' for what is not there."""
    found = {"python": sys.version.split()[0], "cores": str(CORES)}
    query = "driver_version,clocks.sm,clocks.max.sm,temperature.gpu,power.draw"
    found["driver, clocks, temperature, power"] = _output(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    )
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), "")
    found["C compiler, for Triton's launchers"] = compiler
    for name in ("nvcc", "compute-sanitizer", "ncu"):
        found[name] = tool(name) or ""
    return found


def tool(name: str) -> str | None:
    """Where one of CUDA's programs is."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join(done.stdout.split()) if done.returncode == 0 else ""
