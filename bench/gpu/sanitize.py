"""The stage ``sanitize``: small shapes of each form under compute-sanitizer's tools, side by side.

A finding fails the stage, but for a race within a kernel of cuBLAS: what its shared memory holds is
no work of ours. What does not end, or does not work here, is said and left out.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from .budget import Clock
from .machine import tool
from .points import CLUSTER, CONTENDERS, CTA, GRID, TEAMS, WAVE, contender
from .testing import ROOT, _apart, _end, environment

#: How compute-sanitizer ends where it found something.
FOUND = 9


class Check(NamedTuple):
    """tool: of compute-sanitizer. form: what runs under it."""

    tool: str
    form: str

    @property
    def exercise(self) -> str:
        return self.form + (ODD if self.tool == "initcheck" else "")


CHECKS = [
    *(Check(name, form) for form in TEAMS for name in ("memcheck", "racecheck")),
    *(Check(name, form) for form in TEAMS for name in ("synccheck", "initcheck")),
    *(Check(name, "cta") for name in ("memcheck", "racecheck", "synccheck", "initcheck")),
    *(Check("memcheck", form) for form in ("walk", "grid-resident", "grid", "step")),
    *(Check("racecheck", form) for form in ("walk", "grid-resident")),
    Check("synccheck", "grid-resident"),
    Check("initcheck", "walk"),
]
#: The kernels that a report names, and those of them that are cuBLAS'.
PLACES = re.compile(r"\bat (.+?)\+0x[0-9a-f]+")
CUBLAS = re.compile("nvjet_|cublas|cutlass")
#: The hidden size that takes a form.
SIZES = {
    "cta": 64,
    CLUSTER: 160,
    GRID: 272,
    WAVE: 160,
    "walk": 64,
    "grid-resident": 256,
    "grid": 200,
    "step": 200,
}
#: What an odd size is named. Where eight divides the widths, cuBLAS writes a product in 16 bits by
#: TMA, of which initcheck knows nothing: it takes the product for memory that nobody wrote, in
#: torch's own layers too.
ODD = "-odd"
EXERCISES = [form + odd for form in SIZES for odd in ("", ODD)]


class Case(NamedTuple):
    """A layer and a batch of it. B: more than a multiprocessor's share, where it is large."""

    cell: str
    type: str
    H: int
    B: int = 5
    zoneout: float = 0.0
    directions: int = 1
    layers: int = 1


def cases(form: str, less: int = 0) -> list[Case]:
    """What runs under the sanitizer. less: of units."""
    H = SIZES[form] - less
    found = [Case("LSTM", "bfloat16", H), Case("GRU", "bfloat16", H), Case("LSTM", "float32", H)]
    if form == WAVE:
        return [case._replace(layers=2) for case in (*found, Case("RNN", "float16", H, 33))]
    if form in TEAMS:
        # a team of several tiles of sequences, and teams of both directions beside each other
        found += [Case("RNN", "float16", H, 33), Case("LSTM", "bfloat16", 129, directions=2)]
        return found
    if form == CTA:
        many = [Case("RNN", "float16", 128 - less, 512), Case("LSTM", "float16", 32 - less, 512)]
        return found + many
    return [*found, Case("LSTM", "bfloat16", H, zoneout=0.2)]


def exercise(name: str) -> None:
    """Of a form's cases forward and backward, on sequences of one length and of several; float32 in
    TF32. name: a form, or one with :data:`ODD` behind."""
    import torch

    import fastseq

    from . import forms

    form, less = name.removesuffix(ODD), int(name.endswith(ODD))
    for case in cases(form, less):
        with forms.precision("tf32"), forms.as_form(form), forms.short_patience():
            torch.manual_seed(0)
            given = {"device": "cuda", "dtype": getattr(torch, case.type)}
            options = {"backend": contender(form), "zoneout": case.zoneout}
            options["bidirectional"] = case.directions == 2
            options["num_layers"] = case.layers
            layer = getattr(fastseq, case.cell)(24 + less, case.H, **given, **options)
            x = torch.randn(4, case.B, 24 + less, requires_grad=True, **given)
            for lengths in (None, torch.arange(case.B) * 3 % 4 + 1):
                y = layer(x, lengths=lengths)[0]
                y.float().sum().backward()
        torch.cuda.synchronize()
        fastseq.check()  # of kernels that waited in vain
        print(f"{case} {form}: ran", flush=True)


def command(sanitizer: str, check: Check, preload: str | None) -> list[str]:
    found = [sanitizer, "--tool", check.tool, "--error-exitcode", str(FOUND), sys.executable]
    found += ["-m", "bench.gpu", "--exercise", check.exercise]
    return found + (["--preload", preload] if preload else [])


def run(
    clock: Clock,
    log: Path,
    limit: float,
    preload: str | None,
    say: Callable[[str], None],
    contenders: Sequence[str] = CONTENDERS,
) -> tuple[bool, str]:
    """Whether nothing was found, and what to say of it. limit: seconds for each check."""
    sanitizer = tool("compute-sanitizer")
    if sanitizer is None:
        return True, "left out: no compute-sanitizer on this machine"
    probe = f"import {preload or 'torch'}, torch; torch.zeros(1, device='cuda').add_(1).cpu()"
    given = [sanitizer, "--error-exitcode", str(FOUND), sys.executable, "-c", probe]
    patience = min(clock.left / 3, 60)
    works = _all([("probe", given)], Clock(patience), log)["probe"].code
    if works is None:
        return True, f"left out: a probe took more than the {patience:.0f} s that were there for it"
    if works != 0:
        reason = f"ended with status {works}"
        return True, f"left out: compute-sanitizer does not work here; a probe {reason}"
    checks = [check for check in CHECKS if contender(check.form) in contenders]
    commands = [(" ".join(check), command(sanitizer, check, preload)) for check in checks]
    ended = _all(commands, Clock(min(clock.left, limit)), log)
    codes = {name: end.code for name, end in ended.items()}
    for name in codes:
        if codes[name] == FOUND and name.startswith("racecheck") and ended[name].of_cublas:
            say(f"sanitize: {name}: races within kernels of cuBLAS, and no others")
            codes[name] = 0
        say(f"sanitize: {name}: {_said(codes[name])}")
    bad = [name for name, code in codes.items() if code == FOUND]
    open_ = [name for name, code in codes.items() if code not in (0, FOUND)]
    text = f"{len(codes) - len(bad) - len(open_)} clean"
    text += f"; found something: {', '.join(bad)}" if bad else ""
    text += f"; without a verdict: {', '.join(open_)}" if open_ else ""
    return not bad, text


def _said(code: int | None) -> str:
    named = {None: "did not end in its time", 0: "clean", FOUND: "FOUND something"}
    return named.get(code, f"ended with status {code}")


class Ended(NamedTuple):
    """code: None where it did not end in time. text: what it said."""

    code: int | None
    text: str

    @property
    def of_cublas(self) -> bool:
        """Whether its report names kernels, and cuBLAS' alone."""
        places = PLACES.findall(self.text)
        return bool(places) and all(map(CUBLAS.search, places))


def _all(commands: list[tuple[str, list[str]]], clock: Clock, log: Path) -> dict[str, Ended]:
    """Run them side by side; how each ended. The log gets what they said, one after another."""
    running = {}
    with TemporaryDirectory() as folder:
        said = {name: Path(folder, str(place)) for place, (name, _) in enumerate(commands)}
        for name, given in commands:
            with said[name].open("wb") as sink:
                running[name] = subprocess.Popen(
                    given,
                    cwd=ROOT,
                    # each tensor with memory of its own, so that what lies beside it is nobody's
                    env=environment() | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    preexec_fn=_apart,
                )
        try:
            while clock.left > 0 and any(process.poll() is None for process in running.values()):
                time.sleep(0.1)
            codes = {name: process.poll() for name, process in running.items()}
        finally:
            for process in running.values():
                _end(process)
            texts = {name: path.read_text(errors="replace") for name, path in said.items()}
            with log.open("a") as sink:
                sink.writelines(f"--- {name}\n{text}" for name, text in texts.items())
    return {name: Ended(codes[name], texts[name]) for name in codes}
