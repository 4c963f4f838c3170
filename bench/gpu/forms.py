"""What is asked of the backends cuda and triton beside their layers: their forms, and what they
launch.

All that is known here of those backends' insides stands in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from fastseq.backends import cuda_kernels, cuda_plan, cuda_teams, imported, load
from fastseq.backends import triton as backend
from fastseq.backends.contract import Problem
from fastseq.backends.layout import declined_anywhere
from fastseq.backends.triton_tiling import Device, Form, Precision, Tiling, pieces_of, tiling
from fastseq.cells import CELLS

from ..workloads import TEXTS, Workload
from .points import CLUSTER, CONTENDERS, CTA, GRID, WAVE

#: How often a program of a grid looks for the others: about a second, where its default is ten.
PATIENCE = 1 << 20
#: What form the sizes that no single program holds are asked to take.
ASKED: dict[str, Form] = {"walk": "grid", "grid": "grid", "grid-resident": "grid", "step": "step"}
#: In which regime cuda runs in a form.
REGIMES: dict[str, cuda_kernels.Regime] = {
    CTA: "cta",
    CLUSTER: "cluster",
    GRID: "grid",
    WAVE: "wave",
}
FORMS = (*REGIMES, *ASKED)


class Kinds(NamedTuple):
    """Of a device, what decides on forms.

    float32: how triton's products of it are made. cuda: what the backend cuda plans for; None where
    it is not available. contenders: the backends that are asked for.
    """

    device: Device
    float32: Precision
    cuda: cuda_kernels.Device | None = None
    contenders: tuple[str, ...] = CONTENDERS


def kinds() -> Kinds:
    """Of the current device, which this touches."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = load("cuda")
    cuda = None if isinstance(found, str) else found.device_at_hand()
    with precision("float32"):
        return Kinds(backend._properties(device), backend._precision(torch.float32, device), cuda)


def name(plan: Tiling) -> str:
    return "grid-resident" if plan.form == "grid" and plan.resident else plan.form


def problem(workload: Workload, kind: str, training: bool) -> Problem:
    """As the choice of a backend sees a workload's layer on a GPU."""
    w = workload
    return Problem(
        TEXTS.get(w.cell, w.cell),
        w.dtype,
        "cuda",
        w.T if w.mode == "layer" else 1,
        w.B,
        w.I,
        w.H,
        w.proj or w.H,
        R=w.D,
        layers=w.layers,
        projected=bool(w.proj),
        ragged=w.lengths != "equal",
        single=w.mode == "cell",
        training=training,
        tf32=kind == "tf32",
    )


def declined(workload: Workload, kind: str, device: cuda_kernels.Device) -> str | None:
    """Why cuda does not run a workload, forward and backward; no device is touched."""
    given = problem(workload, kind, True)
    return declined_anywhere("cuda", given) or cuda_plan.decline(
        given, device, "tf32" if kind == "tf32" else "ieee"
    )


def forms(workload: Workload, kind: str, kinds: Kinds) -> list[str]:
    """In which ours run: cuda's, where it supports the workload, in teams each that holds it; and
    those that triton can take, two where no single program holds a recurrence."""
    found = []
    if "cuda" in kinds.contenders and kinds.cuda is not None:
        found += _of_cuda(workload, kind, kinds.cuda)
    return found + (_of_triton(workload, kind, kinds) if "triton" in kinds.contenders else [])


def _of_cuda(workload: Workload, kind: str, device: cuda_kernels.Device) -> list[str]:
    """The planned one first."""
    if declined(workload, kind, device) is not None:
        return []
    cell, H = TEXTS.get(workload.cell, workload.cell), workload.H
    fields = {
        **{"cell": workload.cell, "type": kind, "H": H, "B": workload.B, "T": workload.T},
        **{"layers": workload.layers, "directions": workload.D, "way": "training"},
        "shape": " P" if workload.proj else "",
    }
    first = planned(fields, device)
    found = [first] if first == CTA else [CLUSTER, GRID]
    if _side_by_side(fields):
        found.append(WAVE)
    layers = {WAVE: workload.layers}
    held = [
        form
        for form in found
        if form == CTA
        or cuda_teams.declined(cell, kind, REGIMES[form], H, device, layers.get(form, 1)) is None
    ]
    return sorted(held, key=lambda form: form != first)


def _side_by_side(row: dict[str, Any]) -> bool:
    """Whether a row is of a stack whose layers might walk so."""
    return int(row["layers"]) > 1 and int(row["directions"]) == 1 and " P" not in row["shape"]


def planned(row: dict[str, Any], device: cuda_kernels.Device) -> str:
    """The form in which cuda runs the layer of a row where nobody asks for another."""
    cell, training = TEXTS.get(row["cell"], row["cell"]), row["way"] == "training"
    H, B, R, layers = (int(row[column]) for column in ("H", "B", "directions", "layers"))
    regime = cuda_plan.regime_of(cell, row["type"], H, B, R, training, device)
    sizes = (cell, row["type"], H, layers, B, int(row["T"]), training, device)
    if _side_by_side(row):
        holds = cuda_teams.declined(cell, row["type"], "wave", H, device, layers) is None
        regime = "wave" if holds and cuda_plan.is_wave_faster(*sizes) else regime
    return next(form for form, of in REGIMES.items() if of == regime)


def _of_triton(workload: Workload, kind: str, kinds: Kinds) -> list[str]:
    products: Precision = {"tf32": "tf32", "float32": kinds.float32}.get(kind, "ieee")  # type: ignore[assignment]
    cell = CELLS[TEXTS.get(workload.cell, workload.cell)]
    sizes = (workload.H, workload.proj or None, workload.dtype, products, workload.B, workload.D)
    larger: tuple[Form, ...] = ("grid", "step")
    return list(dict.fromkeys(name(tiling(cell, *sizes, kinds.device, form)) for form in larger))


def kernels(workload: Workload, kind: str, kinds: Kinds) -> tuple[Any, ...]:
    """Workloads for which this is the same share their compiled kernels of triton, as far as is
    known."""
    products: Precision = {"tf32": "tf32", "float32": kinds.float32}.get(kind, "ieee")  # type: ignore[assignment]
    cell = CELLS[TEXTS.get(workload.cell, workload.cell)]
    H, P = workload.H, workload.proj or None
    sizes = (H, P, workload.dtype, products, workload.B, workload.D)
    plans = [tiling(cell, *sizes, kinds.device, form) for form in ("grid", "step")]
    size = workload.dtype.itemsize
    pieces = [
        pieces_of(cell, H, P, plan, size, backward, kinds.device)
        for plan in plans
        for backward in (False, True)
        if plan.resident
    ]
    aligned = (H % 16 == 0, None if P is None else P % 16 == 0, H == 1)
    return cell.name, kind, aligned, workload.lengths, *plans, *pieces


def as_form(form: str) -> AbstractContextManager[None]:
    if form not in REGIMES:
        return backend.larger_as(ASKED[form])
    cuda = load("cuda")
    assert not isinstance(cuda, str), cuda
    return cuda.larger_as(REGIMES[form])


@contextmanager
def short_patience() -> Iterator[None]:
    cuda = imported("cuda")
    ours = nullcontext() if isinstance(cuda, str) else cuda.patience(PATIENCE)
    with backend.patience(PATIENCE), ours:
        yield


@contextmanager
def precision(kind: str) -> Iterator[None]:
    """float32's products, on both sides and in all of torch: in TF32 for 'tf32' alone."""
    of = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [place.fp32_precision for place in of]  # type: ignore[attr-defined]
    for place in of:
        place.fp32_precision = "tf32" if kind == "tf32" else "ieee"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for place, value in zip(of, before, strict=True):
            place.fp32_precision = value  # type: ignore[attr-defined]


class Launch(NamedTuple):
    """A loop over time that is launched: 'lstm', 'forward', 'grid-resident', 'bfloat16'."""

    cell: str
    way: str
    form: str
    type: str

    def __str__(self) -> str:
        return " / ".join(self)


def _launch(task: Any, kind: str) -> Launch:
    way, form = kind.split("_")
    if form == "grid" and task.tiling.resident:
        form = "grid-resident"
    name = str(task.dtype).removeprefix("torch.")
    if task.precision == "tf32":
        name = "tf32"
    return Launch(task.cell.name + (" projected" if task.projected else ""), way, form, name)


def _launch_of_cuda(name: str) -> Launch | None:
    """Of a kernel's name, 'forward_lstm_bfloat16_128', or with a team's regime behind it; None
    where it is no loop over time."""
    way, _, rest = name.partition("_")
    if way == "previous":
        return None
    cell, kind, last = rest.rsplit("_", 2)
    regime = "grid" if last == "wide" else last  # of slices of twice the width
    form = next((form for form, of in REGIMES.items() if of == regime), CTA)
    return Launch(cell, way, form, kind)


Listener = Callable[[Launch, bool], None]


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Each launch is told to the listener before it is made: (launch, False). (launch, True) says
    that the driver refused so many programs after all; any other error is what it did."""
    launch = backend._Task.launch
    cuda = imported("cuda")

    def told(task: Any, kind: str, grid: tuple[int, int, int], *rest: Any, **values: Any) -> None:
        described = _launch(task, kind)
        listener(described, False)
        try:
            launch(task, kind, grid, *rest, **values)
        except RuntimeError as error:
            if "cooperative" in str(error):
                listener(described, True)
            raise

    backend._Task.launch = told  # type: ignore[method-assign]
    of_cuda = None if isinstance(cuda, str) else cuda.launch

    def told_of_cuda(name: str, *rest: Any, **values: Any) -> None:
        described = _launch_of_cuda(name)
        if described is not None:
            listener(described, False)
        of_cuda(name, *rest, **values)  # type: ignore[misc]

    if of_cuda is not None:
        cuda.launch = told_of_cuda
    try:
        yield
    finally:
        backend._Task.launch = launch  # type: ignore[method-assign]
        if of_cuda is not None:
            cuda.launch = of_cuda


def needed(row: dict[str, Any]) -> list[Launch]:
    """The loops whose tests must be green before a row's time is believed."""
    cell = TEXTS.get(row["cell"], row["cell"])
    if " P" in row["shape"]:
        cell += " projected"
    ways = ("forward", "backward") if row["way"] == "training" else ("forward",)
    return [Launch(cell, way, row["form"], row["type"]) for way in ways]
