"""One gradient of many, and the gradients of one output: what a caller does not want is not
computed, and what is left is right. Of every backend, and in lean memory, which makes all again."""

import pytest
import torch
from problems import NAMED, draw, gradients
from rules import check_all, same_bits
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from twins import needs

import fastseq

T, B, I, H = 5, 3, 4, 6  # noqa: E741  (the field's letter)
DOUBLE = torch.float64
FORMS = {
    "two ways": {"directions": 2},
    "ragged": {"lengths": [5, 0, 3], "layers": 2},
    "projected": {"P": 2, "lengths": [2, 5, 4]},
}

WAYS = [(name, memory) for name in NAMED for memory in ("full", "lean")]
WAYS.remove(("torch", "lean"))  # which torch declines

each_way = pytest.mark.parametrize("backend, memory", WAYS)
each_case = pytest.mark.parametrize(
    "cell, form",
    [
        ("lstm", "two ways"),
        ("lstm", "ragged"),
        ("lstm", "projected"),
        ("gru", "two ways"),
        ("gru", "ragged"),
        ("rnn_tanh", "ragged"),
    ],
)


def a_case(cell, form, backend, memory):
    case = draw(cell, T, B, I, H, **FORMS[form])
    case.settle(backend, memory=memory)
    return case


def only(case, *names):
    """The same numbers, of which these alone want a gradient."""
    moved = case.to(DOUBLE)
    leaves = moved.leaves()
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in names)
    return moved, {name: leaves[name] for name in names}


@each_case
@each_way
def test_one_leaf_alone(backend, memory, cell, form):
    """x; h_0; c_0; each of the weights of each layer and direction."""
    case = a_case(cell, form, backend, memory)
    truth = gradients(case.independent(), case.leaves())
    for name in case.leaves():
        one, leaf = only(case, name)
        outputs = one.run(backend, memory=memory)
        found = gradients(outputs, leaf)
        check_all(found, None, {f"d{name}": truth[f"d{name}"]}, DOUBLE, f"{name} alone:")


@each_case
@each_way
def test_one_output_alone(backend, memory, cell, form):
    """y; h_n; c_n: the others have no cotangent at all. Twice, with the same bits."""
    case = a_case(cell, form, backend, memory)
    leaves = case.leaves()
    outputs, exact = case.run(backend, memory=memory), case.independent()
    for name in exact:
        found = gradients({name: outputs[name]}, leaves, retain_graph=True)
        truth = gradients({name: exact[name]}, leaves, retain_graph=True)
        check_all(found, None, truth, DOUBLE, f"{name} alone:")
        again = gradients({name: outputs[name]}, leaves, retain_graph=True)
        assert all(same_bits(found[k], again[k]) for k in found), name
    states = [n for n in exact if n != "y"]
    found = gradients({n: outputs[n] for n in states}, leaves, retain_graph=True)
    truth = gradients({n: exact[n] for n in states}, leaves, retain_graph=True)
    check_all(found, None, truth, DOUBLE, "states alone:")


@each_way
@pytest.mark.parametrize("leaf", ["c_0", "h_0", "x", "w_hh[0]"])
@pytest.mark.parametrize("output", ["c_n", "h_n", "c"])
def test_one_leaf_of_one_output(backend, memory, leaf, output):
    """Of the LSTM, whose cell state and its trajectory go by ways of their own."""
    case = draw("lstm", T, B, I, H, directions=2, lengths=[5, 2, 4])
    case.settle(backend, memory=memory, trajectory=output == "c")
    truth = gradients({output: case.independent(True)[output]}, case.leaves())
    one, leaves = only(case, leaf)
    outputs = one.run(backend, trajectory=output == "c", memory=memory)
    found = gradients({output: outputs[output]}, leaves)
    check_all(found, None, {f"d{leaf}": truth[f"d{leaf}"]}, DOUBLE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["dense", "ragged", "two ways"])
@pytest.mark.parametrize("backend, memory", [way for way in WAYS if way[0] != "torch"])
def test_all_states_change_no_bit(backend, memory, form, dtype):
    """The cell state is carried in float32, of which a caller sees 16 bits of every step or of the
    last: what is carried, and what backward reads, is the same."""
    needs(backend)
    lengths = [5, 0, 3] if form == "ragged" else None
    directions = 2 if form == "two ways" else 1
    case = draw("lstm", T, B, 4, 6, lengths=lengths, directions=directions, dtype=dtype)
    found = []
    for trajectory in (False, True):
        outputs = case.run(backend, trajectory=trajectory, memory=memory)
        outputs = {name: outputs[name] for name in ("y", "h_n", "c_n")}
        found.append(outputs | gradients(outputs, case.leaves()))
    for name, value in found[0].items():
        assert same_bits(found[1][name], value), name


# --- rows in the order of the user


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("backend", NAMED)
def test_batch_first_with_lengths(backend, kind):
    """Each sequence as torch.nn runs it alone, and nothing of the padding."""
    needs(backend)
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dtype": DOUBLE}
    theirs = getattr(nn, kind)(I, H, **options)
    ours = getattr(fastseq, kind)(I, H, backend=backend, **options)
    ours.load_state_dict(theirs.state_dict())
    lengths = [3, 5, 1]
    x = torch.randn(B, T, I, dtype=DOUBLE, requires_grad=True)
    state = [torch.randn(4, B, H, dtype=DOUBLE, requires_grad=True) for _ in range(2)]
    state = state if kind == "LSTM" else state[:1]

    def hx(part):
        values = tuple(s[:, part].contiguous() for s in state)
        return values if kind == "LSTM" else values[0]

    def values(y, finals):
        finals = finals if isinstance(finals, tuple) else (finals,)
        return {"y": y} | {str(k): s for k, s in enumerate(finals)}

    alone = []
    for b, n in enumerate(lengths):
        one = values(*theirs(x[b : b + 1, :n], hx(slice(b, b + 1))))
        one["y"] = nn.functional.pad(one["y"], (0, 0, 0, T - n))
        alone.append(one)
    truth = {k: torch.cat([one[k] for one in alone], 0 if k == "y" else 1) for k in alone[0]}
    found = values(*ours(x, hx(slice(None)), lengths=lengths))
    inputs = {"x": x} | {f"{k}_0": s for k, s in enumerate(state)}
    for outputs, layer in ((found, ours), (truth, theirs)):
        outputs |= gradients(outputs, inputs | dict(layer.named_parameters()))
    check_all(found, None, truth, DOUBLE)
    behind = torch.arange(T) >= torch.tensor(lengths)[:, None]
    assert not found["y"][behind].any() and not found["dx"][behind].any()


MASKS = {
    "zoneout": ({"zoneout": 0.4}, ("eager", None)),
    "zoneout in evaluation": ({"zoneout": 0.4}, ("eager", None)),
    "recurrent dropout": ({"recurrent_dropout": 0.4}, ("eager", "numba", "native", None)),
    "input dropout": ({"input_dropout": 0.4}, ("eager", "numba", "native", None)),
}


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize(
    "mask, backend", [(m, b) for m, (_, backends) in MASKS.items() for b in backends]
)
def test_unsorted_packed_rows_with_reset_and_masks(kind, mask, backend):
    """Row ids, reset, states and masks all belong to the user's rows: each is as it is alone."""
    needs(backend)
    torch.manual_seed(0)
    options = {"num_layers": 2, "bidirectional": True, "dtype": DOUBLE, "backend": backend}
    layer = getattr(fastseq, kind)(I, H, **options, **MASKS[mask][0])
    layer.train("evaluation" not in mask)
    lengths, ids = [2, 5, 4], [70, 3, 11]
    x = torch.randn(T, B, I, dtype=DOUBLE)
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[1, 0] = reset[3, 1] = reset[2, 2] = reset[4, 1] = True
    h, c = torch.randn(2, 4, B, H, dtype=DOUBLE)

    def hx(part):
        return (h[:, part], c[:, part]) if kind == "LSTM" else h[:, part]

    def values(y, finals):
        finals = finals if isinstance(finals, tuple) else (finals,)
        return {"y": y} | {str(k): s for k, s in enumerate(finals)}

    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    assert packed.sorted_indices.tolist() == [1, 2, 0]
    y, finals = layer(packed, hx(slice(None)), reset=reset, row_ids=ids, seed=5)
    found = values(pad_packed_sequence(y)[0], finals)
    for b, n in enumerate(lengths):
        row = slice(b, b + 1)
        keywords = {"reset": reset[:n, row], "row_ids": ids[row], "seed": 5}
        truth = values(*layer(x[:n, row].contiguous(), hx(row), **keywords))
        mine = {k: v[:n, row] if k == "y" else v[:, row] for k, v in found.items()}
        check_all(mine, None, truth, DOUBLE, f"row {b}")
