"""What holds for every recurrent layer, whatever runs it: examples by hypothesis.

Wherever a property says that two ways of computing agree, each way is held against the float64
truth by the rule.
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import KINKED, NAMED, draw, gradients
from rules import check_all, same_bits
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq
from fastseq.backends.contract import Weights
from fastseq.cells import CELLS

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
TORCHS = ["rnn_tanh", "rnn_relu", "lstm", "gru"]
OTHERS = [name for name in NAMED if name != "torch"]

each_backend = pytest.mark.parametrize("backend", NAMED)
# torch.nn knows neither resets nor masks
our_backends = pytest.mark.parametrize("backend", OTHERS)


def cells_of(backend):
    return TORCHS if backend == "torch" else list(CELLS)


def drawn(data, backend, **fixed):
    """A layer of random kind and size.

    Short of float64 the rule compares two roundings, which takes more than a number or two; and in
    16 bits the gradient of a ReLU next to its kink is whichever side the rounding falls.
    """
    dtype = fixed.pop("dtype", None) or data.draw(st.sampled_from(DTYPES), "dtype")
    cells = fixed.pop("cells", cells_of(backend))
    if dtype is torch.bfloat16:
        cells = [cell for cell in cells if cell not in KINKED]
    cell = data.draw(st.sampled_from(cells), "cell")
    choices = {
        "T": st.integers(1, 6),
        "B": st.integers(1 if dtype is torch.float64 else 3, 4),
        "I": st.integers(1 if dtype is torch.float64 else 4, 5),
        "H": st.sampled_from([1, 3, 8, 17] if dtype is torch.float64 else [8, 17]),
        "layers": st.integers(1, 2),
        "directions": st.integers(1, 2),
        "bias": st.booleans(),
        "state": st.booleans(),
        "seed": st.integers(0, 2**16),
    }
    options = {name: data.draw(choices[name], name) for name in choices if name not in fixed}
    if cell == "lstm" and "P" not in fixed:
        H = options.get("H", fixed.get("H"))
        options["P"] = data.draw(st.none() | st.integers(1, max(1, H - 1)), "P")
        if options["P"] == H:
            options["P"] = None
    case = draw(cell, dtype=dtype, **options, **fixed)
    case.settle(backend)
    return case


def lengths_in(data, T, B, low=0):
    """One of them is T."""
    lengths = [data.draw(st.integers(low, T), "length") for _ in range(B)]
    lengths[data.draw(st.integers(0, B - 1), "longest")] = T
    return torch.tensor(lengths)


def judged(case, ways, leaves=None):
    """Each way's outputs and gradients, by the rule."""
    wide = case.to(torch.float64)
    exact = wide.independent()
    exact |= gradients(exact, wide.leaves())
    theirs = case.independent()
    theirs |= gradients(theirs, case.leaves())
    for name, way in ways.items():
        ours = way()
        ours |= gradients(ours, case.leaves())
        check_all(ours, theirs, exact, case.x.dtype, name)


def cat(parts, dim):
    return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


@each_backend
@given(data=st.data())
def test_time_may_be_split(backend, data):
    case = drawn(data, backend, directions=1)
    T = case.x.shape[0]
    cut = data.draw(st.integers(1, T), "cut")

    def split():
        first = replace(case, x=case.x[:cut]).run(backend)
        if cut == T:
            return first
        names = [f"{state}_n" for state in CELLS[case.cell].states]
        second = replace(case, x=case.x[cut:], states=[first[name] for name in names]).run(backend)
        return second | {"y": torch.cat([first["y"], second["y"]])}

    judged(case, {"whole": lambda: case.run(backend), "split": split})


@each_backend
@given(data=st.data())
def test_the_batch_may_be_permuted_and_split(backend, data):
    case = drawn(data, backend)
    B = case.x.shape[1]
    order = torch.tensor(data.draw(st.permutations(range(B)), "order"))
    cut = data.draw(st.integers(0, B), "cut")

    def of(some):
        return replace(case, x=case.x[:, some], states=[s[:, some] for s in case.states])

    def permuted():
        back = torch.argsort(order)
        return {name: value[:, back] for name, value in of(order).run(backend).items()}

    def split():
        every = torch.arange(B)
        parts = [of(some).run(backend) for some in (every[:cut], every[cut:]) if len(some)]
        return cat(parts, 1)

    judged(case, {"permuted": permuted, "split": split})


def alone(case, backend):
    """Each sequence of a ragged batch by itself, dense."""
    parts = []
    T, B = case.x.shape[:2]
    for b in range(B):
        L = int(case.lengths[b])
        x, states = case.x[:L, b : b + 1], [s[:, b : b + 1] for s in case.states]
        reset = None if case.reset is None else case.reset[:L, b : b + 1]
        if L == 0:
            zero = replace(case, x=case.x[:1, b : b + 1], states=states, lengths=None, reset=None)
            part = {name: value * 0 for name, value in zero.independent().items()}
            part |= {f"{n}_n": s for n, s in zip(CELLS[case.cell].states, states, strict=False)}
            part["y"] = part["y"][:0]
        else:
            part = replace(case, x=x, states=states, lengths=None, reset=reset).run(backend)
        part["y"] = torch.nn.functional.pad(part["y"], (0, 0, 0, 0, 0, T - L))
        parts.append(part)
    return cat(parts, 1)


@each_backend
@given(data=st.data())
def test_a_ragged_batch_is_its_sequences(backend, data):
    case = drawn(data, backend, layers=1)
    case.lengths = lengths_in(data, *case.x.shape[:2])
    judged(case, {"lengths": lambda: case.run(backend), "alone": lambda: alone(case, backend)})


@our_backends
@given(data=st.data())
def test_a_ragged_batch_with_resets_is_its_sequences(backend, data):
    """Also where the reset is True behind the end of a sequence."""
    case = drawn(data, backend, layers=1, reset=True)
    case.lengths = lengths_in(data, *case.x.shape[:2])
    judged(case, {"lengths": lambda: case.run(backend), "alone": lambda: alone(case, backend)})


@pytest.mark.parametrize("backend", NAMED)
@given(data=st.data())
def test_all_lengths_may_be_zero_or_short(backend, data):
    """The batch keeps its padded size whatever the longest sequence is."""
    case = drawn(data, backend)
    T, B = case.x.shape[:2]
    case.lengths = torch.tensor([data.draw(st.integers(0, max(0, T - 2)), "L") for _ in range(B)])
    judged(case, {"lengths": lambda: case.run(backend)})


MODULES = {"RNN": {}, "LSTM": {}, "GRU": {}, "LSTM projected": {"proj_size": 2}}


@each_backend
@given(data=st.data())
def test_packed_is_lengths(backend, data):
    """The same rows, so the same bits; sorted or not."""
    kind = data.draw(st.sampled_from(list(MODULES)), "module")
    T, B = data.draw(st.integers(1, 6), "T"), data.draw(st.integers(1, 5), "B")
    drawn(data, backend, cells=["gru"], T=1, B=1)  # is it here?
    torch.manual_seed(data.draw(st.integers(0, 99), "seed"))
    module = getattr(fastseq, kind.split()[0])(
        3,
        5,
        num_layers=data.draw(st.integers(1, 2), "layers"),
        bidirectional=data.draw(st.booleans(), "bidirectional"),
        backend=backend,
        **MODULES[kind],
    )
    # equal lengths would let the two sorts differ, and with them the order of the sums
    lengths = lengths_in(data, T, B, low=1)
    x = torch.randn(T, B, 3, requires_grad=True)
    y, state = module(x, lengths=lengths)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    if data.draw(st.booleans(), "sorted"):
        order = torch.sort(lengths, descending=True, stable=True).indices
        packed = pack_padded_sequence(x[:, order], lengths[order])
        other, their_state = module(packed)
        other, _ = pad_packed_sequence(other, total_length=T)
        back = torch.argsort(order)
        other = other[:, back]
        their_state = (
            tuple(s[:, back] for s in their_state)
            if isinstance(their_state, tuple)
            else their_state[:, back]
        )
    else:
        other, their_state = module(packed)
        other, _ = pad_packed_sequence(other, total_length=T)
    pairs = [(y, other)]
    pairs += (
        zip(state, their_state, strict=True) if isinstance(state, tuple) else [(state, their_state)]
    )
    for k, (mine, theirs) in enumerate(pairs):
        assert same_bits(mine, theirs), f"output {k}"
    d = torch.randn_like(y)
    parameters = [x, *module.parameters()]
    ours = torch.autograd.grad(y, parameters, d)
    truth = torch.autograd.grad(other, parameters, d)
    for k, (mine, theirs) in enumerate(zip(ours, truth, strict=True)):
        assert same_bits(mine, theirs), f"gradient {k}"


def episodes(case, backend):
    """Each sequence cut where a new one begins, each piece by itself."""
    T, B = case.x.shape[:2]
    D, names = case.directions, CELLS[case.cell].states
    count = len(case.weights)
    backwards = torch.tensor([k % D == 1 for k in range(count)])[:, None, None]
    sequences = []
    for b in range(B):
        starts = [0] + [t for t in range(1, T) if case.reset[t, b]]
        stops = [*starts[1:], T]
        parts = []
        for k, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            states = []
            for state in case.states:
                enters = torch.where(backwards, k == len(starts) - 1, k == 0)
                if case.reset[0, b]:
                    enters = enters & backwards
                states.append(torch.where(enters, state[:, b : b + 1], 0.0))
            piece = replace(case, x=case.x[start:stop, b : b + 1], states=states, reset=None)
            parts.append(piece.run(backend))
        whole = {"y": torch.cat([part["y"] for part in parts])}
        for name in names:
            whole[f"{name}_n"] = torch.where(
                backwards, parts[0][f"{name}_n"], parts[-1][f"{name}_n"]
            )
        sequences.append(whole)
    return cat(sequences, 1)


@our_backends
@given(data=st.data())
def test_reset_is_splitting_into_episodes(backend, data):
    case = drawn(data, backend, reset=True)
    judged(case, {"reset": lambda: case.run(backend), "episodes": lambda: episodes(case, backend)})


@our_backends
@given(data=st.data())
def test_a_mask_is_a_scaled_w_hh(backend, data):
    """For one sequence: W (m h) = (W diag m) h, for cells that multiply h itself."""
    cells = [
        c
        for c in cells_of(backend)
        if CELLS[c].products and all(p.operand == "h_prev" for p in CELLS[c].products)
    ]
    # in 16 bits the product m W would be rounded
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]), "dtype")
    case = drawn(data, backend, cells=cells, B=1, h_mask=True, dtype=dtype)

    def scaled():
        weights = [
            Weights(w.w_ih, w.w_hh * case.h_mask[k], *w[2:]) for k, w in enumerate(case.weights)
        ]
        return replace(case, weights=weights, h_mask=None).run(backend)

    judged(case, {"mask": lambda: case.run(backend), "scaled": scaled})


def some_layout(data, case):
    if data.draw(st.booleans(), "ragged"):
        case.lengths = lengths_in(data, *case.x.shape[:2])
    return case


@pytest.mark.parametrize("threads", [1, 2])
@each_backend
@given(data=st.data())
def test_two_calls_give_the_same_bits(backend, threads, data):
    case = some_layout(data, drawn(data, backend, reset=backend != "torch"))
    torch.set_num_threads(threads)
    try:
        once, again = (values(case, backend) for _ in range(2))
    finally:
        torch.set_num_threads(1)
    for name, value in once.items():
        assert same_bits(value, again[name]), name


@pytest.mark.parametrize("cell", CELLS)
@each_backend
def test_two_threads_are_within_the_rule(backend, cell):
    """At a size that is worth two threads."""
    case = draw(cell, T=6, B=24, I=64, H=96, lengths=[6, 3] * 12, dtype=torch.float32)
    case.settle(backend)
    torch.set_num_threads(2)
    try:
        case.settle(backend)
        judged(case, {"two threads": lambda: case.run(backend)})
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("cell", ["peephole_lstm", "indrnn"])
@pytest.mark.parametrize("backend", sorted({"native", "numba"} & set(NAMED)))
def test_sums_over_many_rows_of_units(backend, cell):
    """A step of many sequences is summed as a tree by torch, whose error is the yardstick of all
    else: here the bound is that of a sum of sums of sums."""
    case = draw(cell, T=20, B=1000, I=1, H=8, dtype=torch.float32, state=False)
    wide = case.to(torch.float64)
    truth, ours = (
        torch.autograd.grad(given.run(name)["y"].sum(), given.weights[0].units)
        for given, name in ((wide, "eager"), (case, backend))
    )
    for name, d, exact in zip(CELLS[cell].unit_parameters, ours, truth, strict=True):
        error = (d - exact).abs().max() / exact.abs().max() / torch.finfo(torch.float32).eps
        assert error < 2, f"d{name}: {error:.1f} eps"


def values(case, backend, **options):
    outputs = case.run(backend, **options)
    return outputs | gradients(outputs, case.leaves())


@pytest.mark.parametrize("memory", ["full", "lean"])
@each_backend
@given(data=st.data())
def test_a_second_backward_gives_the_same_bits(backend, memory, data):
    """And so does a third: backward writes to nothing that forward kept."""
    if memory == "lean" and backend == "torch":
        pytest.skip("keeps what autograd keeps")
    case = some_layout(data, drawn(data, backend))
    outputs = case.run(backend, memory=memory)
    before = {name: value.detach().clone() for name, value in outputs.items()}
    leaves = case.leaves()
    first = gradients(outputs, leaves, retain_graph=True)
    gradients(outputs, leaves, seed=2, retain_graph=True)  # other gradients in between
    third = gradients(outputs, leaves)
    for name, value in first.items():
        assert same_bits(value, third[name]), name
    for name, value in before.items():
        assert same_bits(value, outputs[name]), name


@each_backend
@given(data=st.data())
def test_inputs_are_never_written_to(backend, data):
    ours = backend != "torch"
    case = some_layout(data, drawn(data, backend, reset=ours, h_mask=ours))
    given = case.leaves() | {
        name: tensor
        for name in ("lengths", "reset", "h_mask")
        if (tensor := getattr(case, name)) is not None
    }
    before = {name: tensor.detach().clone() for name, tensor in given.items()}
    outputs = case.run(backend)
    ones = [torch.ones_like(value) for value in outputs.values()]
    torch.autograd.grad(list(outputs.values()), list(case.leaves().values()), ones)
    assert all(bool((one == 1).all()) for one in ones)
    for name, tensor in given.items():
        same = torch.equal(tensor, before[name])
        assert same, f"{name} has changed"


@our_backends
@given(data=st.data())
def test_outputs_share_no_memory(backend, data):
    """With each other or with what was given: a caller may write to one. (torch\'s own do.)"""
    case = some_layout(data, drawn(data, backend, grad=False))
    with torch.no_grad():
        outputs = case.run(backend)
    given = case.leaves()
    for name, value in outputs.items():
        for other, tensor in (given | outputs).items():
            if name != other and value.numel():
                shared = value.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
                assert not shared, f"{name} is a view of {other}"


@our_backends
@given(data=st.data())
def test_lean_is_full(backend, data):
    case = some_layout(data, drawn(data, backend, reset=True, h_mask=True))
    case.settle(backend, memory="lean")
    judged(
        case,
        {
            "full": lambda: case.run(backend, memory="full"),
            "lean": lambda: case.run(backend, memory="lean"),
        },
    )


@each_backend
@given(data=st.data())
def test_gradients_need_no_training_mode_and_leave_values_alone(backend, data):
    """The values are the rule's with and without gradients."""
    case = some_layout(data, drawn(data, backend))
    wide = case.to(torch.float64)
    with torch.no_grad():
        exact, theirs, ours = wide.independent(), case.independent(), case.run(backend)
    assert not any(value.requires_grad for value in ours.values())
    check_all(ours, theirs, exact, case.x.dtype, "no_grad")
    with torch.inference_mode():
        check_all(case.run(backend), theirs, exact, case.x.dtype, "inference_mode")


@pytest.mark.parametrize("sizes", [(1000, 100), (1, 100_000), (100_000, 1)], ids=str)
@pytest.mark.parametrize("backend", [name for name in NAMED if name in ("native", "numba")])
def test_a_gradient_is_no_long_chain_of_additions(backend, sizes):
    """IndRNN's, over 100,000 rows of one value, where such a chain loses four digits."""
    T, B = sizes
    case = draw("indrnn", T=T, B=B, I=2, H=37, dtype=torch.float32)
    case.settle(backend)
    with torch.no_grad():
        case.x.fill_(0.7), case.states[0].fill_(0.3)
        for w in case.weights[0].flat():
            if w is not None:
                w.abs_().clamp_(max=0.5)

    def values(case):
        leaves = case.leaves()
        named = [name for name in leaves if "[" in name]
        y = case.run(backend)["y"]
        grads = torch.autograd.grad(y.sum(), [leaves[name] for name in named])
        return dict(zip(named, grads, strict=True))

    truth = values(case.to(torch.float64))
    for name, d in values(case).items():
        error = (d.double() - truth[name]).abs() / truth[name].abs()
        # no rule: torch's own would take 100,000 steps, and a sum may lose a digit or two
        assert float(error.max()) < 1e-5, name
