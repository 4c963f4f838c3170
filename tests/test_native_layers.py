"""The extension's two entries, forward and backward, of layers by recurrences in one call.

A stack gives, bit for bit, what its layers give one by one, however its weights are laid out; what
it has no meaning for is declined.
"""

import pytest
import torch
from problems import draw
from rules import same_bits

from fastseq.backends import load
from fastseq.backends.contract import Call, OutputGradients, Request, Wanted
from fastseq.cells import CELLS

native = load("native")
if isinstance(native, str):
    pytest.skip(native, allow_module_level=True)

TIME_FIRST = 0
FORMS = {
    "dense": {},
    "ragged, no bias": {"bias": False},
    "projected": {"P": 3},
    "few rows, no state": {"B": 1, "T": 2, "state": False},
}
CASES = [(cell, form) for cell in CELLS for form in FORMS if form != "projected" or cell == "lstm"]


def stack(cell, form, layers=2, directions=2):
    """A case and its batch_sizes."""
    sizes = {"T": 4, "B": 3, "I": 5, "H": 18} | FORMS[form]
    case = draw(
        cell, layers=layers, directions=directions, dtype=torch.float64, grad=False, **sizes
    )
    if not form.startswith("ragged"):
        return case, None
    batch_sizes = torch.tensor([3, 3, 1, 1])
    case.x = torch.cat([case.x[t, :n] for t, n in enumerate(batch_sizes)])
    return case, batch_sizes


def in_slots(weights):
    return [w for own in weights for w in own.flat()]


def compact(weights):
    return [w for w in in_slots(weights) if w is not None]


def arguments(case, batch_sizes, weights, **others):
    D = case.directions
    named = {
        "cell": native.NUMBER[case.cell],
        "x": case.x,
        "batch_sizes": batch_sizes,
        "states": tuple(case.states),
        "weights": tuple(weights),
        "layers": len(case.weights) // D,
        "reverse": (False, True)[:D],
        "order": TIME_FIRST,
        "reset": None,
        "h_mask": None,
        "dropout": (),
        "kept": 1.0,
        "input_masks": (),
        "stay": (),
        "part": (),
        "threads": 1,
        "deterministic": False,
        "bf16": False,
    }
    assert others.keys() <= named.keys()
    return [*(named | others).values()]


def drawn_like(tensors):
    random = torch.Generator().manual_seed(3)
    return [torch.randn(t.shape, generator=random, dtype=t.dtype) for t in tensors]


def at_once(case, batch_sizes, weights):
    """y, final states, dx, their gradients and the weights' of one call."""
    given = arguments(case, batch_sizes, weights)
    y, states, saved = native._cpu.forward(*given, True, False, None)
    dy, *dstates = drawn_like([y, *states])
    d = native._cpu.backward(*given, y, tuple(saved), dy, tuple(dstates), (), True, True, True)
    return [y, *states, *d]


def one_by_one(case, batch_sizes):
    D, cell = case.directions, CELLS[case.cell]
    layers = [case.weights[k : k + D] for k in range(0, len(case.weights), D)]
    x, calls, results = case.x, [], []
    for k, weights in enumerate(layers):
        states = [s[k * D : (k + 1) * D] for s in case.states]
        call = Call(case.cell, x, batch_sizes, states, weights, (False, True)[:D])
        calls.append(call)
        results.append(native.forward(call, True, False))
        x = results[-1].y
    finals = [torch.cat(s) for s in zip(*(r.states for r in results), strict=True)]
    dy, *dstates = drawn_like([x, *finals])
    dweights, dinitial = [], []
    for k, (call, result) in reversed([*enumerate(zip(calls, results, strict=True))]):
        own = [s[k * D : (k + 1) * D] for s in dstates]
        d = native.backward(call, result, OutputGradients(dy, own, []), Wanted(True, True, True))
        dy, dinitial = d.x, [d.states, *dinitial]
        dweights = compact(d.weights) + dweights
    initial = [torch.cat(s) for s in zip(*dinitial, strict=True)]
    assert len(initial) == len(cell.states)
    return [x, *finals, dy, *initial, *dweights]


@pytest.mark.parametrize(("cell", "form"), CASES)
def test_a_stack_is_its_layers(cell, form):
    case, batch_sizes = stack(cell, form)
    expected = one_by_one(case, batch_sizes)
    for weights in (compact(case.weights), in_slots(case.weights)):
        ours = at_once(case, batch_sizes, weights)
        assert len(ours) == len(expected)
        for k, (a, b) in enumerate(zip(ours, expected, strict=True)):
            assert same_bits(a, b), k


@pytest.mark.parametrize("cell", CELLS)
def test_steps_of_a_stream(cell):
    """A handle takes the weights of every cell, its unit parameters with them."""
    case = draw(cell, T=3, B=2, I=5, H=18, layers=2, dtype=torch.float64, grad=False)
    given = arguments(case, None, compact(case.weights), deterministic=True)
    expected = native._cpu.forward(*given, False, False, None)[0]
    h = case.states[0].clone()
    others = tuple(s.clone() for s in case.states[1:])
    weights = tuple(compact(case.weights))
    handle = native.stream(Request(cell, 2), weights, h, others)
    for t in range(3):
        assert same_bits(native.stream_step(handle, case.x[t], None, 1), expected[t])


def lacks_a_weight(case):
    return {"weights": compact(case.weights)[:-1]}


def lacks_a_state(case):
    return {"states": tuple(case.states[:1])}


def wrong_states(case):
    return {"states": tuple(s[:1] for s in case.states)}


def a_subclass(case):
    return {"x": case.x.as_subclass(type("Own", (torch.Tensor,), {}))}


DECLINED = {
    "another number of weights": lacks_a_weight,
    "a state is missing": lacks_a_state,
    "states of one layer": wrong_states,
    "a cell that is not there": lambda case: {"cell": len(native._cpu.CELLS)},
    "reset of another size": lambda case: {"reset": torch.zeros(2, 4, 3, dtype=torch.bool)},
    "h_mask of one layer": lambda case: {"h_mask": torch.ones_like(case.states[0][:1])},
    "a weight of another shape": lambda case: {
        "weights": [compact(case.weights)[0].T.contiguous(), *compact(case.weights)[1:]]
    },
    "dropout of another size": lambda case: {"dropout": (torch.ones(3, dtype=torch.bool),)},
    "an input mask of another size": lambda case: {"input_masks": (torch.ones_like(case.x),) * 2},
    "stay of one layer": lambda case: {"stay": (torch.ones(1, 12, 18, dtype=torch.bool), None)},
    "stay of one state": lambda case: {"stay": (torch.ones(2, 12, 18, dtype=torch.bool),)},
    "part of one state": lambda case: {"part": (0.5,)},
    "x of a subclass": a_subclass,
}


@pytest.mark.parametrize("what", DECLINED)
def test_declined(what):
    """With None: nothing is read beyond what was given."""
    case, batch_sizes = stack("lstm", "dense", directions=1)
    plain = {"weights": compact(case.weights)}
    for others, declined in (({}, False), (DECLINED[what](case), True)):
        given = arguments(case, batch_sizes, **(plain | others))
        assert (native._cpu.forward(*given, False, False, None) is None) is declined


def test_a_known_output_is_of_one_layer():
    case, batch_sizes = stack("lstm", "dense", directions=1)
    given = arguments(case, batch_sizes, compact(case.weights))
    y = native._cpu.forward(*given, False, False, None)[0]
    assert native._cpu.forward(*given, False, False, y) is None
