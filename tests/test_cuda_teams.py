"""Teams of CTAs that share a recurrence, without a GPU: clusters and grids, as ``cuda`` runs a layer
that no single CTA holds. Their kernels run as threads on tensors of the CPU
(tests/helpers/cuda_on_host.py), where what is handed on comes late at random.

Layers are small: a cluster's CTAs have 32 units each, a grid's 16, so that 33 to 70 are teams of two
or three, and of three to five.
"""

import dataclasses

import cuda_on_host
import independent
import pytest
import tf32
import torch
from problems import (
    OF_FOUR_STEPS,
    against_the_independent,
    draw,
    full,
    gradients,
)
from rules import check_all, same_bits

import fastseq
from fastseq.backends import choice, cuda_teams, faults, load
from fastseq.backends.contract import Problem
from fastseq.backends.cuda_kernels import H100, PRODUCT_CELLS, TEAMS
from fastseq.cells import CELLS

REGIMES = ("cluster", "grid")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
#: Made up: as many CTAs at once as the host has threads for.
DEVICE = dataclasses.replace(cuda_on_host.DEVICE, multiprocessors=24)
SPECIAL = {
    # several tiles of columns, the last of them with few
    "plain": {"B": 5, "H": 36},
    "B9": {"B": 9, "H": 40, "T": 2, "directions": 2},
    "B17": {"B": 17, "H": 33, "T": 2},
    "T1 B1 H1": {"T": 1, "B": 1, "H": 1, "I": 1, "seed": 3},
    "T1": {"T": 1, "B": 3, "H": 48},
    "H64": {"H": 64, "T": 3, "B": 3},  # whole slices, rows of whole vectors
    "H70": {"H": 70, "T": 3, "B": 2, "directions": 2},
    "ring": {"H": 35, "T": 11, "B": 2},  # goes round
    **{name: {"H": 34 + 2 * k, **given} for k, (name, given) in enumerate(OF_FOUR_STEPS.items())},
    "all at once B9": {
        "lengths": [4, 0, 2, 1, 4, 3, 2, 2, 1],
        "B": 9,
        "H": 37,
        "reset": True,
        "h_mask": True,
        "directions": 2,
    },
}
#: Zoneout is declined.
CASES = [name for name, options in SPECIAL.items() if "zoneout" not in options]
#: What an ordinary run takes of each regime, whichever cell and type.
EVERY = len(CASES)


@pytest.fixture(scope="module")
def on_host():
    with cuda_on_host.use() as found:
        yield found


@pytest.fixture(autouse=True)
def cuda(monkeypatch, on_host):
    """The backend, on a device with room for teams; float32's products in TF32."""
    setting = torch.backends.cudnn.rnn
    monkeypatch.setattr(setting, "fp32_precision", "tf32")
    found = load("cuda")
    monkeypatch.setattr(found, "device_at_hand", lambda index=None: DEVICE)
    cuda_on_host.forget()
    on_host.launched.clear()
    return found


def of_device(monkeypatch, **changed):
    device = dataclasses.replace(DEVICE, **changed)
    monkeypatch.setattr(load("cuda"), "device_at_hand", lambda index=None: device)
    cuda_on_host.forget()
    return device


def with_rounded_operands(W, v, b):
    product = tf32._Product.apply(v[None], W)[0]
    return product if b is None else product + b


def compare(case, regime, what, **options):
    """Values and gradients by the rule. The measure of TF32 is the independent writing in float64,
    the operands of whose products are rounded."""
    with load("cuda").larger_as(regime):
        if case.x.dtype is not torch.float32:
            against_the_independent(case, "cuda", what, **options)
            return
        case.settle("cuda", **options)
        trajectory = options.get("trajectory", False)
        wide = case.to(torch.float64)

        def values():
            found = wide.independent(trajectory)
            return found | gradients(found, wide.leaves())

        exact = values()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(independent, "affine", with_rounded_operands)
            rounded = values()
        ours = case.run("cuda", **options)
        ours |= gradients(ours, case.leaves())
        check_all(ours, rounded, exact, torch.float32, what)


def launched(on_host, regime):
    """(way, grid) of the teams' launches; there are no other walks."""
    walks = [(n, grid) for n, grid, _ in on_host.launched if not n.startswith("previous")]
    assert walks and all(name.endswith(f"_{regime}") for name, _ in walks)
    return [(name.split("_")[0], grid) for name, grid in walks]


def in_turn():
    """All cells, cases, types and regimes; an ordinary run takes each case once in each regime, of
    cells and types that go round."""
    found = []
    for r, regime in enumerate(REGIMES):
        for place, special in enumerate(CASES):
            for k, cell in enumerate(PRODUCT_CELLS):
                for turn, type in enumerate(TYPES):
                    ordinary = (place + 3 * r) % len(PRODUCT_CELLS) == k
                    ordinary = ordinary and (place + place // len(PRODUCT_CELLS) + r) % 3 == turn
                    name = f"{regime}-{cell}-{special}-{type}"
                    marks = () if ordinary else full
                    found.append(pytest.param(regime, cell, special, type, marks=marks, id=name))
    return found


@pytest.mark.parametrize("regime, walked, special, type", in_turn())
def test_against_the_independent(regime, walked, special, type, on_host):
    options = {"T": 4, **SPECIAL[special]}
    if special == "saturated" and walked == "peephole_lstm":
        options["scale"] = 10.0
    case = draw(walked, dtype=TYPES[type], **options)
    compare(case, regime, special, trajectory=special == "all at once B9")
    assert launched(on_host, regime)
    assert any(f"_{type}_" in name for name, _, _ in on_host.launched)
