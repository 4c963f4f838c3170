"""Random layers, always the same ones, against the reference backend by the rule."""

import random
from dataclasses import replace

import pytest
import torch
from problems import cotangents, draw
from rules import check_all, same_bits

from fastseq.backends import load
from fastseq.cells import CELLS

if isinstance(load("native"), str):
    pytest.skip(load("native"), allow_module_level=True)

DTYPES = [torch.float32, torch.float64, torch.float32, torch.float64, torch.bfloat16, torch.float16]

FORMS = {
    "plain": lambda t: t,
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: torch.repeat_interleave(t, 2, -1)[..., ::2],
    "middle of a wider": lambda t: torch.nn.functional.pad(t, (3, 2))[..., 3:-2],
    "features first": lambda t: t.movedim(-1, 0).contiguous().movedim(0, -1),
    "rows apart": lambda t: torch.repeat_interleave(t, 3, 0)[1::3],
    "off the alignment": lambda t: torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape),
}


def options_of(seed):
    """Everything about one case; small ones in float64 alone, where the rule needs no averages."""
    pick = random.Random(seed)

    def maybe(p):
        return pick.random() < p

    dtype = DTYPES[seed % len(DTYPES)]
    double = dtype is torch.float64
    cells = list(CELLS)
    if not double:  # next to a ReLU's kink the gradient is whichever side the rounding falls
        cells = [cell for cell in cells if cell not in ("rnn_relu", "indrnn")]
    cell = pick.choice(cells)
    T = pick.choice([1, 1, 2, 3, 5, 9])
    B = pick.choice([1, 2, 3, 5, 7, 11, 17, 33] if double else [3, 5, 7, 11, 17, 33])
    H = pick.choice([1, 2, 7, 8, 15, 16, 17, 31, 33, 40] if double else [8, 15, 16, 17, 33, 40])
    drawn = {
        "cell": cell,
        "dtype": dtype,
        "T": T,
        "B": B,
        "I": pick.choice([1, 2, 5, 16, 37] if double else [4, 5, 16, 37]),
        "H": H,
        "P": pick.choice([1, H // 2 + 1, H]) if cell == "lstm" and double and maybe(0.3) else None,
        "layers": pick.choice([1, 1, 2]),
        "directions": pick.choice([1, 2]),
        "bias": maybe(0.7),
        "state": maybe(0.7),
        "reset": maybe(0.3),
        "h_mask": maybe(0.3),
        "lengths": [pick.randint(0, T) for _ in range(B)] if maybe(0.5) else None,
        "seed": seed,
    }
    run = {
        "trajectory": cell == "lstm" and maybe(0.4),
        "memory": pick.choice(["full", "full", "lean"]),
    }
    forms = [pick.choice(list(FORMS)) if maybe(0.5) else "plain" for _ in range(2)]
    wanted = pick.choice(["all", "all", "x", "states", "weights", "one"])
    return drawn, run, forms, wanted, pick.choice([1, 1, 2, 3])


def values(case, backend, run, names, form):
    outputs = case.run(backend, **run)
    leaves = {name: leaf for name, leaf in case.leaves().items() if name in names}
    given = {name: FORMS[form](d) for name, d in cotangents(outputs).items()}
    live = [name for name, value in outputs.items() if value.requires_grad]
    grads = torch.autograd.grad(
        [outputs[name] for name in live],
        list(leaves.values()),
        [given[name] for name in live],
        allow_unused=True,
        materialize_grads=True,
    )
    return outputs | {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def names_wanted(case, wanted):
    """Leaves that have a gradient; the others ask for none."""
    every = list(case.leaves())
    groups = {
        "all": every,
        "x": ["x"],
        "states": [name for name in every if name.endswith("_0")] or ["x"],
        "weights": [name for name in every if "[" in name],
        "one": every[-1:],
    }
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name in groups[wanted])
    return groups[wanted]


def check(seed):
    drawn, run, (form, gradient_form), wanted, threads = options_of(seed)
    case = draw(**drawn)
    names = names_wanted(case, wanted)
    dtype = drawn["dtype"]
    truth = values(case.to(torch.float64), "reference", run, names, "plain")
    theirs = values(case.to(dtype), "eager", run, names, "plain")  # torch's operations, in dtype
    strided = replace(case, x=FORMS[form](case.x.detach()).requires_grad_(case.x.requires_grad))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = values(strided, "native", run, names, gradient_form)
        with torch.no_grad():
            bare = strided.run("native", **run)
    finally:
        torch.set_num_threads(before)
    what = f"seed {seed}: {drawn | run}, {form}, {gradient_form}, {wanted}, {threads} threads:"
    check_all(ours, theirs, truth, dtype, what)
    for name, value in bare.items():
        assert same_bits(value, ours[name]), f"{what} {name} without gradients"


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_random_layers(first):
    for seed in range(first, first + 10):
        check(seed)


def test_lean_memory_of_no_rows():
    """One of the random layers, whose sequences are all empty."""
    check(387)


@pytest.mark.full
@pytest.mark.parametrize("first", range(60, 1000, 47))
def test_more_random_layers(first):
    for seed in range(first, min(first + 47, 1000)):
        check(seed)
