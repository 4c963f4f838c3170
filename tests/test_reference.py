"""The reference against torch.nn in float64, and against the independent writing."""

import independent
import numpy as np
import pytest
import torch
from problems import cotangents, draw
from rules import DOUBLE
from torch.nn.utils.rnn import PackedSequence

from fastseq import reference
from fastseq.cells import CELLS

TORCH = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}
LENGTHS = {"dense": [5, 5, 5, 5], "ragged": [5, 3, 3, 1], "zeros": [4, 2, 0, 0], "T1": [1, 1, 1, 1]}


def rows_of(lengths):
    """(t, b) of each packed row, and the batch sizes; the lengths are sorted already."""
    T = max(lengths)
    rows = [(t, b) for t in range(T) for b in range(len(lengths)) if t < lengths[b]]
    return rows, np.array([sum(t < n for n in lengths) for t in range(T)])


def packed(padded, rows):
    return np.stack([padded[t, b] for t, b in rows])


def assert_near(ours, truth, what):
    truth = truth.detach().numpy()
    assert ours.shape == truth.shape, what
    scale = np.abs(truth).max() if truth.size else 0.0
    np.testing.assert_allclose(ours, truth, rtol=0, atol=DOUBLE * max(scale, 1e-300), err_msg=what)


def run_reference(case, lengths, reverse, dy, dstates, dalong, k=0):
    """Values and gradients of recurrence ``k`` of a one-layer case, by the names of its leaves."""
    cell = CELLS[case.cell]
    rows, sizes = rows_of(lengths)
    numpy = lambda t: None if t is None else t.detach().numpy()  # noqa: E731
    given = case.weights[k]
    weights = reference.Weights(*map(numpy, given[:5]), tuple(map(numpy, given.units)))
    states = tuple(numpy(s[k]) for s in case.states)
    mask = None if case.h_mask is None else numpy(case.h_mask[k])
    reset = None
    if case.reset is not None:
        reset = np.zeros(len(rows), bool)
        for row, (t, b) in enumerate(rows):
            begins = t + 1 if reverse else t
            reset[row] = begins < lengths[b] and bool(case.reset[begins, b])
    stay = [
        s if s is None or isinstance(s, float) else packed(numpy(s[k]), rows)
        for s in case.stay() or ()
    ]
    x = packed(numpy(case.x), rows)
    y, finals, tape = reference.forward(cell, x, sizes, states, weights, reverse, reset, mask, stay)
    gradients = reference.backward(
        cell,
        x,
        sizes,
        weights,
        tape,
        packed(numpy(dy), rows),
        tuple(numpy(d) for d in dstates),
        {s: packed(numpy(d), rows) for s, d in zip(cell.states[1:], dalong, strict=False)},
        reverse,
        mask,
        stay,
    )
    return rows, y, finals, tape, gradients


def compare(case, lengths, reverse, y, finals, along, with_along):
    """The reference against given outputs and their gradients by autograd (recurrence 0)."""
    cell = CELLS[case.cell]
    outputs = {"y": y} | {f"{n}_n": s for n, s in zip(cell.states, finals, strict=True)}
    if with_along:
        outputs |= dict(zip(cell.states[1:], along, strict=True))
    d = cotangents(outputs)
    leaves = case.leaves()
    truth = torch.autograd.grad(
        list(outputs.values()),
        list(leaves.values()),
        list(d.values()),
        allow_unused=True,
        materialize_grads=True,
    )
    truth = dict(zip(leaves, truth, strict=True))
    dalong = [d[name] for name in cell.states[1:]] if with_along else []
    dstates = [d[f"{name}_n"] for name in cell.states]
    rows, values, ends, tape, gradients = run_reference(
        case, lengths, reverse, d["y"], dstates, dalong
    )
    select = tuple(np.array(rows).T)
    assert_near(values, y[select], "y")
    for name, ours, final in zip(cell.states, ends, finals, strict=True):
        assert_near(ours, final, f"{name}_n")
    for name, value in zip(cell.states[1:], along, strict=False):
        assert_near(tape.after[name], value[select], name)
    assert_near(gradients.x, truth["x"][select], "dx")
    for name, ours in zip(cell.states, gradients.states, strict=True):
        assert_near(ours, truth[f"{name}_0"][0], f"d{name}_0")
    ours = {
        f"{n}[0]": w
        for n, w in zip(reference.Weights._fields[:5], gradients.weights[:5], strict=True)
    }
    ours |= {
        f"{n}[0]": u for n, u in zip(cell.unit_parameters, gradients.weights.units, strict=True)
    }
    for name, value in ours.items():
        assert (value is None) == (name not in truth), name
        if value is not None:
            assert_near(value, truth[name], f"d{name}")


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "bare"])
@pytest.mark.parametrize("cell, P", [*((cell, None) for cell in TORCH), ("lstm", 3)])
def test_against_torch(cell, P, bias, reverse, lengths):
    """The reverse direction is the second half of a bidirectional layer."""
    sizes = LENGTHS[lengths]
    case = draw(cell, max(sizes), len(sizes), H=5, P=P, bias=bias, lengths=sizes)
    options = {"nonlinearity": cell[4:]} if cell.startswith("rnn") else {}
    options |= {"proj_size": P} if P else {}
    module = getattr(torch.nn, TORCH[cell])(
        4, 5, bias=bias, bidirectional=reverse, dtype=torch.float64, **options
    )
    suffix = "_reverse" if reverse else ""
    names = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0", "weight_hr_l0"]
    given = {
        name + suffix: w
        for name, w in zip(names, case.weights[0][:5], strict=True)
        if w is not None
    }
    # torch takes no sequence of length 0: they keep their state
    alive = sum(n > 0 for n in sizes)
    rows, batch_sizes = rows_of(sizes)
    select = tuple(np.array(rows).T)
    ways = 2 if reverse else 1
    start = [torch.cat([s[:, :alive]] * ways) for s in case.states]
    out, ends = torch.func.functional_call(
        module,
        given,
        (
            PackedSequence(case.x[select], torch.from_numpy(batch_sizes)),
            tuple(start) if cell == "lstm" else start[0],
        ),
    )
    ends = ends if cell == "lstm" else (ends,)
    width = P or 5
    values = out.data[:, -width:]
    index = torch.from_numpy(np.array([t * len(sizes) + b for t, b in rows]))
    flat = torch.zeros(max(sizes) * len(sizes), width, dtype=torch.float64)
    y = flat.index_copy(0, index, values).view(max(sizes), len(sizes), width)
    finals = [torch.cat([e[-1], s[0, alive:]]) for e, s in zip(ends, case.states, strict=True)]
    compare(case, sizes, reverse, y, finals, [], False)


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    "extra", ["plain", "reset", "h_mask", "both", "zoneout", "evaluation", "all"]
)
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("cell, P", [*((cell, None) for cell in CELLS), ("lstm", 3)])
def test_against_the_independent_writing(cell, P, reverse, extra, lengths):
    """Every cell; resets, masks, and the gradient of the trajectory."""
    sizes = LENGTHS[lengths]
    options = {
        "reset": extra in ("reset", "both", "all"),
        "h_mask": extra in ("h_mask", "both", "all"),
        "zoneout": (0.5, 0.3) if extra in ("zoneout", "evaluation", "all") else (),
        "evaluates": extra == "evaluation",
    }
    case = draw(cell, max(sizes), len(sizes), H=5, P=P, lengths=sizes, **options)
    mask, stay = None if case.h_mask is None else case.h_mask[0], case.stay()
    y, finals, along = independent.recurrence(
        cell,
        case.x,
        [s[0] for s in case.states],
        case.weights[0],
        reverse,
        case.lengths,
        case.reset,
        mask,
        stay and [s[0] if torch.is_tensor(s) else s for s in stay],
    )
    compare(case, sizes, reverse, y, finals, along, True)


@pytest.mark.parametrize("cell", CELLS)
def test_backward_writes_to_nothing(cell):
    case = draw(cell, reset=True, h_mask=True)
    d = [torch.ones_like(s[0]) for s in case.states]
    sizes = [5, 5, 5]
    definition = CELLS[cell]
    rows, batch_sizes = rows_of(sizes)
    x = packed(case.x.detach().numpy(), rows)
    states = tuple(s[0].detach().numpy() for s in case.states)
    weights = reference.Weights(
        *(None if w is None else w.detach().numpy() for w in case.weights[0][:5]),
        tuple(u.detach().numpy() for u in case.weights[0].units),
    )
    y, finals, tape = reference.forward(definition, x, batch_sizes, states, weights)
    given = [x, y, *states, *finals, *tape.values.values(), *tape.previous.values()]
    before = [array.copy() for array in given]
    grads = [tuple(value.numpy() for value in d)] * 2
    first, second = (
        reference.backward(definition, x, batch_sizes, weights, tape, y, g) for g in grads
    )
    for old, new in zip(before, given, strict=True):
        np.testing.assert_array_equal(old, new)
    np.testing.assert_array_equal(first.x, second.x)
    np.testing.assert_array_equal(first.weights.w_ih, second.weights.w_ih)


def test_states_are_not_views_of_the_given():
    case = draw("lstm")
    states = tuple(s[0].detach().numpy().copy() for s in case.states)
    before = [s.copy() for s in states]
    rows, batch_sizes = rows_of([2, 1, 0])
    weights = reference.Weights(*(w.detach().numpy() for w in case.weights[0][:4]))
    x = packed(case.x.detach().numpy(), rows)
    _, finals, _ = reference.forward(CELLS["lstm"], x, batch_sizes, states, weights)
    for old, new, final in zip(before, states, finals, strict=True):
        np.testing.assert_array_equal(old, new)
        assert not np.shares_memory(new, final)
