"""What is asked of the triton backend beside its layers: its forms, and what it launches.

All that is known here of that backend's insides stands in this file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch

from fastseq.backends import triton as backend
from fastseq.backends.triton_tiling import Device, Form, Precision, Tiling, pieces_of, tiling
from fastseq.cells import CELLS

from ..workloads import TEXTS, Workload

#: How often a program of a grid looks for the others: about a second, where its default is ten.
PATIENCE = 1 << 20
#: What form the sizes that no single program holds are asked to take.
ASKED: dict[str, Form] = {"walk": "grid", "grid": "grid", "grid-resident": "grid", "step": "step"}
FORMS = tuple(ASKED)


class Kinds(NamedTuple):
    """Of a device, what decides on forms. float32: how its products are made."""

    device: Device
    float32: Precision


def kinds() -> Kinds:
    """Of the current device, which this touches."""
    device = torch.device("cuda", torch.cuda.current_device())
    with precision("float32"):
        return Kinds(backend._properties(device), backend._precision(torch.float32, device))


def name(plan: Tiling) -> str:
    return "grid-resident" if plan.form == "grid" and plan.resident else plan.form


def forms(workload: Workload, kind: str, kinds: Kinds) -> list[str]:
    """The forms that triton can take: two where no single program holds a recurrence."""
    products: Precision = {"tf32": "tf32", "float32": kinds.float32}.get(kind, "ieee")  # type: ignore[assignment]
    cell = CELLS[TEXTS.get(workload.cell, workload.cell)]
    sizes = (workload.H, workload.proj or None, workload.dtype, products, workload.B, workload.D)
    larger: tuple[Form, ...] = ("grid", "step")
    return list(dict.fromkeys(name(tiling(cell, *sizes, kinds.device, form)) for form in larger))


def kernels(workload: Workload, kind: str, kinds: Kinds) -> tuple[Any, ...]:
    """Workloads for which this is the same share their compiled kernels, as far as is known."""
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
    return backend.larger_as(ASKED[form])


def short_patience() -> AbstractContextManager[None]:
    return backend.patience(PATIENCE)


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


Listener = Callable[[Launch, bool], None]


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Each launch is told to the listener before it is made: (launch, False). (launch, True) says
    that the driver refused so many programs after all; any other error is what it did."""
    launch = backend._Task.launch

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
    try:
        yield
    finally:
        backend._Task.launch = launch  # type: ignore[method-assign]


def needed(row: dict[str, Any]) -> list[Launch]:
    """The loops whose tests must be green before a row's time is believed."""
    cell = TEXTS.get(row["cell"], row["cell"])
    if " P" in row["shape"]:
        cell += " projected"
    ways = ("forward", "backward") if row["way"] == "training" else ("forward",)
    return [Launch(cell, way, row["form"], row["type"]) for way in ways]
