"""Calls of torch's layers as a GPU runs them, which tests make with a device and without."""

import re

import torch
from problems import draw
from rules import same_bits

from fastseq.backends import torch as backend
from fastseq.backends.contract import Call, OutputGradients, Wanted

CELLS = ("rnn_relu", "rnn_tanh", "lstm", "gru")
CASES = {
    "dense": {},
    "one": {"T": 1, "B": 1, "H": 1, "I": 1},
    "two ways": {"directions": 2},
    "two layers": {"layers": 2, "directions": 2},
    "bare": {"bias": False, "state": False, "directions": 2},
    "ragged": {"lengths": [2, 5, 3], "directions": 2},
    "empty sequences": {"lengths": [2, 0, 5], "directions": 2},
    "bare and ragged": {"bias": False, "state": False, "lengths": [2, 0, 5]},
}


def ragged_call(cell, sizes=(3, 2, 1, 0), rows=8):
    """Packed rows, some of them padding, of sequences some of which are empty, and strided."""
    case = draw(cell, B=4, directions=2, dtype=torch.float32, grad=False)
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(0))[:, ::2]
    weights = [w.map(lambda t: torch.repeat_interleave(t, 2, -1)[..., ::2]) for w in case.weights]
    return Call(cell, x, torch.tensor(sizes), case.states, weights, (False, True))


def flat(gradients):
    weights = [w for ws in gradients.weights for w in ws.flat() if w is not None]
    return [gradients.x, *gradients.states, *weights]


def check_repeats(call):
    """Weights stay in their storage, backward leaves what forward saved, what a call gives is
    memory of its own, and a second one gives the same bits. For ``ragged_call``, on any device."""
    given = [call.x, call.batch_sizes, *call.states, *(w for ws in call.weights for w in ws[:4])]
    before = [(t.clone(), t.untyped_storage().data_ptr(), t.stride()) for t in given]
    results = [backend.forward(call, True, False) for _ in range(2)]
    first = results[0]
    saved = [t.clone() for t in (first.y, *first.states, *first.saved)]
    dy = torch.randn(first.y.shape, generator=torch.Generator().manual_seed(1)).to(first.y)
    grads = OutputGradients(dy, [None, *map(torch.ones_like, first.states[1:])], [])
    wanted = Wanted(True, True, True)
    found = [flat(backend.backward(call, first, grads, wanted)) for _ in range(2)]
    outputs = [[r.y, *r.states] for r in results]
    kept = [*outputs[0], *first.saved]
    assert not first.y[6:].any() and not found[0][0][6:].any()
    assert torch.equal(first.states[0][:, 3:], call.states[0][:, 3:])
    for one, other in (outputs, found, (kept, saved)):
        for a, b in zip(one, other, strict=True):
            assert bool(a.isfinite().all()) and same_bits(a, b)
    for tensor, (value, storage, stride) in zip(given, before, strict=True):
        assert same_bits(tensor, value) and tensor.stride() == stride
        assert tensor.untyped_storage().data_ptr() == storage
    mine = [t.untyped_storage().data_ptr() for t in (*kept, *found[0]) if t.numel()]
    assert len(set(mine)) == len(mine)
    assert not set(mine) & {storage for _, storage, _ in before}


def operators(graph):
    """How many layers a graph holds as one operator, in its body and in those within."""
    bodies = [m for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
    targets = [str(n.target) for body in bodies for n in body.graph.nodes]
    return len([t for t in targets if re.search(r"fastseq\.recurrence\b", t)])
