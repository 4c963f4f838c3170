"""Native's calls beneath autograd, of some of a batch's sequences, and their bits compared."""

import pytest
import torch
from problems import draw
from rules import same_bits

from fastseq.backends import load
from fastseq.backends.contract import Call, OutputGradients, Wanted
from fastseq.cells import CELLS

native = load("native")

LENGTHS = [5, 5, 4, 3, 3, 1, 0]


def layer(*args, **options):
    return draw(*args, grad=False, **options)


def values(case, some=None, deterministic=True, memory="full"):
    """Of these sequences of a layer: outputs and gradients by name.

    What is side by side in time is padded with zeros, and every value but those of the weights has
    the sequences in dimension 1. ``case.lengths`` decrease, and those of ``some`` do.
    """
    T, B = case.x.shape[:2]
    some = list(range(B)) if some is None else some
    R, states = len(case.weights), len(CELLS[case.cell].states)
    random = torch.Generator().manual_seed(7)

    def gradient(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).to(case.x.dtype)[:, some]

    if case.lengths is None:
        batch_sizes = None

        def rows(padded):
            return padded.contiguous()

        padded = rows
    else:
        own = [int(case.lengths[b]) for b in some]
        steps = [[b for b, length in enumerate(own) if length > t] for t in range(max(own))]
        batch_sizes = torch.tensor([len(step) for step in steps], dtype=torch.int64)
        at = torch.tensor([(t, b) for t, step in enumerate(steps) for b in step]).T

        def rows(padded):
            return padded[at[0], at[1]]

        def padded(rows):
            out = rows.new_zeros(T, len(some), rows.shape[-1])
            out[at[0], at[1]] = rows
            return out

    mask, stay, part = case.h_mask, (), ()
    if case.seed is None:
        part = case.zoneout
    elif case.zoneout:
        stay = [
            s if s is None else torch.stack([rows(way[:, some]).flatten(0, -2) for way in s])
            for s in case.stay()
        ]
    call = Call(
        case.cell,
        rows(case.x[:, some]),
        batch_sizes,
        [s[:, some].contiguous() for s in case.states],
        case.weights,
        tuple(bool(r % 2) for r in range(R)),
        None if case.reset is None else torch.stack([rows(case.reset[:, some])] * R),
        None if mask is None else mask[:, some].contiguous(),
        memory,
        deterministic,
        stay,
        part,
    )
    result = native.forward(call, True, False)
    dy = rows(gradient(T, B, R * case.P))
    dstates = [gradient(R, B, size).contiguous() for size in (case.P, case.H)[:states]]
    wanted = Wanted(x=True, states=True, weights=True)
    d = native.backward(call, result, OutputGradients(dy, dstates, []), wanted)
    named = {"y": padded(result.y), "dx": padded(d.x)}
    named |= {f"state {k}": state for k, state in enumerate(result.states)}
    named |= {f"dstate {k}": state for k, state in enumerate(d.states)}
    flat = [w for weights in d.weights for w in weights.flat() if w is not None]
    return named, {f"dw {k}": w for k, w in enumerate(flat)}


def equal(ours, expected, what):
    __tracebackhide__ = True
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if not same_bits(ours[name], value):
            worst = float((ours[name] - value).abs().max())
            pytest.fail(f"{what}: {name} differs, by up to {worst:.3g}")


def check_splits(case, what, splits):
    """Each list of sequences, run alone, has the bits that it has in the whole."""
    __tracebackhide__ = True
    whole, _ = values(case)
    for some in splits:
        expected = {name: value[:, some] for name, value in whole.items()}
        equal(values(case, some)[0], expected, f"{what}, sequences {some}")
