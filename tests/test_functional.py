"""fastseq.lstm, gru and rnn: what goes in and comes out, every option, and every mistake."""

import ast
import inspect
import traceback

import numpy as np
import pytest
import torch
from pairwise import covering
from problems import draw, gradients
from rules import check_all
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from twins import caught, needs

import fastseq
from fastseq.ops import checks

T, B, I, H, P = 5, 3, 4, 6, 2  # noqa: E741  (the field's letter)
DOUBLE = torch.float64
LENGTHS = {"packed": [5, 4, 2], "unsorted": [2, 5, 4], "lengths": [3, 0, 5]}

# --- every option with every other


AXES = {
    "cell": ("lstm", "gru", "rnn_tanh", "rnn_relu"),
    "form": ("dense", "unbatched", "lengths", "packed", "unsorted"),
    "shape": ("one way", "two ways", "projected", "unbiased"),
    "state": (False, True),
    "reset": (False, True),
    "h_mask": (False, True),
    "all_states": (False, True),
    "memory": ("full", "lean"),
    "backend": ("native", "numba", "eager", None),
}


def possible(row):
    return row["cell"] == "lstm" or not (row["all_states"] or row["shape"] == "projected")


def named(row):
    return "-".join(str(v) if not isinstance(v, bool) else k for k, v in row.items() if v)


def call(case, row):
    """What a function of ours gives for a case, by name and padded, as the independent writing."""
    weights = [tuple(w for w in ways[:5] if w is not None) for ways in case.weights]
    x, states, reset, keywords = case.x, list(case.states), case.reset, {}
    form = row["form"]
    if form == "unbatched":
        x, states = x.squeeze(1), [s.squeeze(1) for s in states]
        reset = None if reset is None else reset.squeeze(1)
    if form in ("packed", "unsorted"):
        x = pack_padded_sequence(x, case.lengths, enforce_sorted=form == "packed")
    if form == "lengths":
        keywords["lengths"] = case.lengths
    if row["all_states"]:
        keywords["all_states"] = True
    name, *nonlinearity = case.cell.split("_")
    if nonlinearity:
        keywords["nonlinearity"] = nonlinearity[0]
    hx = None
    if states:
        hx = tuple(states) if name == "lstm" else states[0]
    y, finals, *along = getattr(fastseq, name)(
        x,
        weights if len(weights) > 1 else weights[0],
        hx,
        reset=reset,
        h_mask=case.h_mask,
        memory=row["memory"],
        backend=row["backend"],
        **keywords,
    )
    finals = finals if name == "lstm" else (finals,)
    values = {"y": y, "h_n": finals[0]}
    values |= {"c_n": finals[1]} if name == "lstm" else {}
    values |= {"c": along[0]} if row["all_states"] else {}

    def padded(value):
        if isinstance(value, PackedSequence):
            assert form in ("packed", "unsorted")
            return pad_packed_sequence(value, total_length=T)[0]
        return value.unsqueeze(1) if form == "unbatched" else value

    return {key: padded(value) for key, value in values.items()}


@pytest.mark.parametrize("row", covering(AXES, possible), ids=named)
def test_options(row):
    """Outputs and gradients. Rows of states, reset and h_mask are in the order of the user."""
    needs(row["backend"])
    case = draw(
        row["cell"],
        T,
        1 if row["form"] == "unbatched" else B,
        I,
        H,
        P if row["shape"] == "projected" else None,
        directions=2 if row["shape"] in ("two ways", "projected") else 1,
        bias=row["shape"] != "unbiased",
        state=row["state"],
        lengths=LENGTHS.get(row["form"]),
        reset=row["reset"],
        h_mask=row["h_mask"],
    )
    if case.h_mask is not None:  # no two rows alike
        case.h_mask *= torch.linspace(0.5, 1.5, case.h_mask.numel()).view_as(case.h_mask)
    found = []
    for run in (lambda: call(case, row), lambda: case.independent(row["all_states"])):
        outputs = run()
        found.append(outputs | gradients(outputs, case.leaves()))
    check_all(*[found[0], None, found[1]], DOUBLE, named(row))


def test_deterministic():
    """Which takes native alone: a row's bits are those of the row alone."""
    needs("native")
    case = draw("lstm", T, 7, I, H, dtype=torch.float32)
    weights = [w for w in case.weights[0][:4]]
    run = {True: {}, False: {}}
    for deterministic, by_rows in run.items():
        for rows in (slice(None), slice(2, 3)):
            states = [s[:, rows].contiguous() for s in case.states]
            x = case.x[:, rows].contiguous()
            y, _ = fastseq.lstm(x, weights, states, deterministic=deterministic)
            by_rows[str(rows)] = y[:, 2] if rows.start is None else y[:, 0]
    assert torch.equal(*run[True].values())
    error = caught(lambda: fastseq.lstm(case.x, weights, deterministic=True, backend="eager"))
    assert type(error) is NotImplementedError


@pytest.mark.parametrize("name, gates", [("lstm", 4), ("gru", 3), ("rnn", 1)])
def test_options_that_show_in_no_number_reach_the_choice(name, gates):
    x = torch.zeros(T, B, I, requires_grad=True)
    w = weights((gates * H, I), (gates * H, H), (gates * H,), (gates * H,))

    def declined(**options):
        error = caught(lambda: getattr(fastseq, name)(x, w, **options))
        return f"{type(error).__name__}: {error}"

    assert "NotImplementedError: backend='torch' cannot run this: torch: torch keeps all" in (
        declined(memory="lean", backend="torch")
    )
    assert "NotImplementedError: backend='eager' cannot run this: eager: its bits may" in (
        declined(deterministic=True, backend="eager")
    )
    assert "ValueError: backend: expected one of" in declined(backend="cobol")


def test_the_first_three_arguments_alone_have_places():
    for name in ("lstm", "gru", "rnn", "peephole_lstm", "coupled_lstm", "mgu", "indrnn"):
        parameters = inspect.signature(getattr(fastseq, name)).parameters
        places = [k for k, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        assert places == ["input", "weights", "hx"]
        words = {k for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        own = {"all_states"} if "lstm" in name else set()
        own |= {"nonlinearity"} if "rnn" in name else set()
        own |= {"reset_after"} if name == "gru" else set()
        own |= {"h_mask"} if name != "indrnn" else set()
        assert words == own | {"lengths", "reset", "memory", "deterministic", "backend"}
        defaults = {k: parameters[k].default for k in words}
        assert defaults["memory"] == "full" and defaults["deterministic"] is False
        assert all(defaults[k] is None for k in words & {"lengths", "reset", "h_mask", "backend"})


# --- every mistake


def weights(w_ih=(4 * H, I), w_hh=(4 * H, H), b_ih=(4 * H,), b_hh=(4 * H,), w_hr=None, moved=None):
    """Zeros of these shapes. moved: (name, where to), of one of them."""
    shapes = {"w_ih": w_ih, "w_hh": w_hh, "b_ih": b_ih, "b_hh": b_hh, "w_hr": w_hr}
    made = {name: torch.zeros(shape) for name, shape in shapes.items() if shape is not None}
    if moved is not None:
        made[moved[0]] = made[moved[0]].to(moved[1])
    return tuple(made.values())


def lstm(x=None, w=None, hx=None, **keywords):
    x = torch.zeros(T, B, I) if x is None else x
    return fastseq.lstm(x, weights() if w is None else w, hx, **keywords)


def packed(sizes, rows=6, **kind):
    return PackedSequence(torch.zeros(rows, I), torch.tensor(sizes, **kind))


def states(h=(1, B, H), c=(1, B, H), **kind):
    return torch.zeros(h, **kind), torch.zeros(c, **kind)


def layer(**keywords):
    return fastseq.LSTM(I, H, recurrent_dropout=0.5)(torch.zeros(T, B, I), **keywords)


def in_place_of_a_weight(tensor):
    m = fastseq.LSTM(I, H)
    m.weight_hh_l0 = torch.nn.Parameter(tensor)
    return m(torch.zeros(T, B, I))


def wrong_dtype(name):
    return (
        f"RNN input dtype (torch.float32) does not match weight dtype (torch.float64) of {name}. "
        "Convert input: input.to(torch.float64), or convert model: model.to(torch.float32)"
    )


def wrong_device(name):
    return (
        "Input and parameter tensors are not at the same device, found input tensor at cpu and "
        f"{name} at meta"
    )


TUPLE = "hx: expected a tuple of tensors (h_0, c_0), got "
NOT_SIZES = (
    "batch_sizes: expected a 1-D int64 tensor on the CPU, as pack_padded_sequence makes it, got "
)
ROWS = torch.zeros(T, B, dtype=torch.bool)

#: name -> (call, class, the whole text)
MISTAKES = {
    "memory": (
        lambda: lstm(memory="slim"),
        ValueError,
        "memory: expected 'full' or 'lean', got 'slim'",
    ),
    "all_states": (
        lambda: lstm(all_states=1),
        TypeError,
        "all_states: expected a bool, got int",
    ),
    "w_ih": (
        lambda: lstm(w=weights(w_ih=(4 * H + 1, I))),
        ValueError,
        "w_ih: expected (4*H, input_size), got (25, 4)",
    ),
    "w_ih, rank": (
        lambda: lstm(w=weights(w_ih=(4 * H,))),
        ValueError,
        "w_ih: expected (4*H, input_size), got (24,)",
    ),
    "w_hr": (
        lambda: lstm(w=weights(w_hh=(4 * H, P), w_hr=(P, H - 1))),
        ValueError,
        "w_hr: expected (proj_size, 6), got (2, 5)",
    ),
    "w_hr, rank": (
        lambda: lstm(w=weights(w_hh=(4 * H, P), w_hr=(H,))),
        ValueError,
        "w_hr: expected (proj_size, 6), got (6,)",
    ),
    "w_hh": (
        lambda: lstm(w=weights(w_hh=(4 * H, H - 1))),
        ValueError,
        "w_hh: expected (24, 6), got (24, 5)",
    ),
    "w_hh, projected": (
        lambda: lstm(w=weights(w_hr=(P, H))),
        ValueError,
        "w_hh: expected (24, 2), got (24, 6)",
    ),
    "b_ih": (
        lambda: lstm(w=weights(b_ih=(H,))),
        ValueError,
        "b_ih: expected (24,), got (6,)",
    ),
    "b_hh": (
        lambda: lstm(w=weights(b_hh=(1, 4 * H))),
        ValueError,
        "b_hh: expected (24,), got (1, 24)",
    ),
    **{
        f"dtype of {name}": (
            lambda name=name: lstm(w=weights(w_hh=(24, P), w_hr=(P, H), moved=(name, DOUBLE))),
            ValueError,
            wrong_dtype(name),
        )
        for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    },
    **{
        f"device of {name}": (
            lambda name=name: lstm(w=weights(w_hh=(24, P), w_hr=(P, H), moved=(name, "meta"))),
            RuntimeError,
            wrong_device(name),
        )
        for name in ("w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    },
    "a projection in one direction": (
        lambda: lstm(w=(weights(), weights(w_hh=(24, P), w_hr=(P, H)))),
        ValueError,
        "weights: both directions must have the same sizes",
    ),
    "directions that differ": (
        lambda: lstm(w=(weights(), weights((20, I), (20, 5), (20,), (20,)))),
        ValueError,
        "weights: both directions must have the same sizes",
    ),
    "projections that differ": (
        lambda: lstm(w=[weights(w_hh=(24, p), w_hr=(p, H)) for p in (2, 3)]),
        ValueError,
        "weights: both directions must have the same sizes",
    ),
    "feature size": (
        lambda: lstm(torch.zeros(T, B, 7)),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 4, got 7",
    ),
    "feature size of the second direction": (
        lambda: lstm(w=(weights(), weights(w_ih=(24, 5)))),
        RuntimeError,
        "input.size(-1) must be equal to input_size. Expected 5, got 4",
    ),
    "no steps": (
        lambda: lstm(torch.zeros(0, B, I)),
        RuntimeError,
        "Expected sequence length to be larger than 0 in RNN",
    ),
    "batch_sizes, dtype": (
        lambda: lstm(packed([3, 3], dtype=torch.int32)),
        RuntimeError,
        NOT_SIZES + "1-D torch.int32 on cpu",
    ),
    "batch_sizes, rank": (
        lambda: lstm(packed([[3, 3]])),
        RuntimeError,
        NOT_SIZES + "2-D torch.int64 on cpu",
    ),
    "batch_sizes that grow": (
        lambda: lstm(packed([2, 4])),
        RuntimeError,
        "batch_sizes: expected sizes that do not increase, got [2, 4]",
    ),
    "batch_sizes below zero": (
        lambda: lstm(packed([4, 3, -1])),
        RuntimeError,
        "batch_sizes: expected sizes that do not increase, got [4, 3, -1]",
    ),
    "batch_sizes, sum": (
        lambda: lstm(packed([3, 2])),
        RuntimeError,
        "batch_sizes: expected a sum of 6, the rows of the packed input, got 5",
    ),
    "one state": (
        lambda: lstm(hx=states()[0]),
        ValueError,
        "hx: expected 2 states (h, c), got 1",
    ),
    "three states": (
        lambda: lstm(hx=(*states(), states()[0])),
        ValueError,
        "hx: expected 2 states (h, c), got 3",
    ),
    "h_0": (
        lambda: lstm(hx=states(h=(2, B, H))),
        RuntimeError,
        "Expected hidden[0] size (1, 3, 6), got [2, 3, 6]; it is (num_layers * num_directions, "
        "batch, proj_size or hidden_size)",
    ),
    "c_0": (
        lambda: lstm(hx=states(c=(1, B, P))),
        RuntimeError,
        "Expected hidden[1] size (1, 3, 6), got [1, 3, 2]; it is (num_layers * num_directions, "
        "batch, hidden_size)",
    ),
    "h_0 of a packed batch": (
        lambda: lstm(packed([4, 2]), hx=states()),
        RuntimeError,
        "Expected hidden[0] size (1, 4, 6), got [1, 3, 6]; it is (num_layers * num_directions, "
        "batch, proj_size or hidden_size)",
    ),
    "h_0 and c_0 in the other order": (
        lambda: lstm(w=weights(w_hh=(24, P), w_hr=(P, H)), hx=states(c=(1, B, P))),
        RuntimeError,
        "Expected hidden[0] size (1, 3, 2), got [1, 3, 6]; it is (num_layers * num_directions, "
        "batch, proj_size or hidden_size)",
    ),
    "h_0 of a gru": (
        lambda: fastseq.gru(
            torch.zeros(T, B, I), weights((18, I), (18, H), (18,), (18,)), torch.zeros(1, B, 5)
        ),
        RuntimeError,
        "Expected hidden size (1, 3, 6), got [1, 3, 5]; it is (num_layers * num_directions, "
        "batch, proj_size or hidden_size)",
    ),
    "state, device": (
        lambda: lstm(hx=states(device="meta")),
        RuntimeError,
        "Input and hidden tensors are not at the same device, found input tensor at cpu and hidden "
        "tensor at meta",
    ),
    "state, dtype": (
        lambda: lstm(hx=(states()[0], states(dtype=DOUBLE)[1])),
        RuntimeError,
        "Expected hidden state of dtype torch.float32, the input's, got torch.float64; convert "
        "it: c_0.to(torch.float32)",
    ),
    "lengths of a packed input": (
        lambda: lstm(packed([4, 2]), lengths=[2, 2, 1, 1]),
        ValueError,
        "lengths: a PackedSequence has its own lengths; pass the padded tensor",
    ),
    "lengths of one sequence": (
        lambda: lstm(torch.zeros(T, I), lengths=[2]),
        ValueError,
        "lengths: expected a batched 3-D input, got an unbatched 2-D one",
    ),
    "lengths, dtype": (
        lambda: lstm(lengths=torch.ones(B)),
        TypeError,
        "lengths: expected integers, got torch.float32",
    ),
    "lengths, shape": (
        lambda: lstm(lengths=[2, 2]),
        ValueError,
        "lengths: expected one a sequence, (3,), got (2,)",
    ),
    "lengths, too long": (
        lambda: lstm(lengths=[2, 6, 1]),
        ValueError,
        "lengths: expected values from 0 to T = 5, got 1 to 6",
    ),
    "lengths below zero": (
        lambda: lstm(lengths=[2, -1, 5]),
        ValueError,
        "lengths: expected values from 0 to T = 5, got -1 to 5",
    ),
    "reset, a list": (
        lambda: lstm(reset=ROWS.tolist()),
        TypeError,
        "reset: expected a bool tensor, got list",
    ),
    "reset, dtype": (
        lambda: lstm(reset=ROWS.int()),
        TypeError,
        "reset: expected torch.bool, got torch.int32; use reset.bool()",
    ),
    "reset, shape": (
        lambda: lstm(reset=ROWS.T),
        ValueError,
        "reset: expected (T, B) = (5, 3), got (3, 5)",
    ),
    "reset of one sequence": (
        lambda: lstm(torch.zeros(T, I), reset=ROWS[:4, 0]),
        ValueError,
        "reset: expected (T, B) = (5, 1), got (4, 1)",
    ),
    "reset, device": (
        lambda: lstm(reset=ROWS.to("meta")),
        RuntimeError,
        "reset: expected it on the input's device cpu, got meta",
    ),
    "row_ids, dtype": (
        lambda: layer(row_ids=torch.ones(B)),
        TypeError,
        "row_ids: expected integers, got torch.float32",
    ),
    "a weight of another size": (
        lambda: in_place_of_a_weight(torch.ones(4 * H, H + 1)),
        RuntimeError,
        "weight_hh_l0: expected (24, 6), got (24, 7)",
    ),
    "lengths, of a vmap": (
        lambda: torch.func.vmap(lambda n: lstm(lengths=n)[0])(torch.ones(2, B, dtype=torch.int64)),
        NotImplementedError,
        "lengths: all members of a vmap have the same; got some for each",
    ),
    "row_ids, text": (
        lambda: layer(row_ids="abc"),
        TypeError,
        "row_ids: expected a tensor or a sequence of integers, got str",
    ),
    "lengths, texts": (
        lambda: lstm(lengths=["a", "b", "c"]),
        TypeError,
        "lengths: expected integers, got ['a', 'b', 'c']",
    ),
    "row_ids, range": (
        lambda: layer(row_ids=[-1, 2**50, 3]),
        ValueError,
        f"row_ids: expected values from 0 to 2**48 - 1, got -1 to {2**50}",
    ),
    "row_ids, shape": (
        lambda: layer(row_ids=[1, 2]),
        ValueError,
        "row_ids: expected one a sequence, (3,), got (2,)",
    ),
    "seed, a float tensor": (
        lambda: layer(seed=torch.ones(2)),
        TypeError,
        "seed: expected an int or an int64 tensor of no dimension, got 1-D torch.float32",
    ),
    "seed, a bool": (
        lambda: layer(seed=True),
        TypeError,
        "seed: expected an int or a tensor, got bool",
    ),
    "seed, too large": (
        lambda: layer(seed=2**63),
        ValueError,
        f"seed: expected 64 bits, from -2**63 to 2**63 - 1, got {2**63}",
    ),
    "state, a number": (lambda: lstm(hx=3), TypeError, TUPLE + "int of 3"),
    "states, numbers": (lambda: lstm(hx=(3, 4)), TypeError, TUPLE + "tuple of ['int', 'int']"),
    "a tuple as the state of a gru": (
        lambda: fastseq.gru(
            torch.zeros(T, B, I), weights((18, I), (18, H), (18,), (18,)), (torch.zeros(1, B, H),)
        ),
        TypeError,
        "hx: expected a tensor h_0, got tuple of ['Tensor']",
    ),
    "lengths, a number": (
        lambda: lstm(lengths=3),
        TypeError,
        "lengths: expected a tensor or a sequence of integers, got int",
    ),
    "lengths, complex": (
        lambda: lstm(lengths=torch.ones(B, dtype=torch.complex128)),
        TypeError,
        "lengths: expected integers, got torch.complex128",
    ),
    "deterministic, a word": (
        lambda: lstm(deterministic="no"),
        TypeError,
        "deterministic: expected a bool, got str",
    ),
    "h_mask, a list": (
        lambda: lstm(h_mask=[1]),
        TypeError,
        "h_mask: expected a tensor, got list",
    ),
    "h_mask, device": (
        lambda: lstm(h_mask=torch.ones(1, B, H, device="meta")),
        RuntimeError,
        "h_mask: expected it on the input's device cpu, got meta",
    ),
    "h_mask, shape": (
        lambda: lstm(h_mask=torch.ones(1, B, P)),
        ValueError,
        "h_mask: expected (1, 3, 6), got (1, 3, 2)",
    ),
    "h_mask, without directions": (
        lambda: lstm(h_mask=torch.ones(B, H)),
        ValueError,
        "h_mask: expected (1, 3, 6), got (3, 6)",
    ),
    "h_mask, gradient": (
        lambda: lstm(h_mask=torch.ones(1, B, H, requires_grad=True)),
        ValueError,
        "h_mask: gets no gradient; pass h_mask.detach()",
    ),
    "h_mask, dtype": (
        lambda: lstm(h_mask=torch.ones(1, B, H, dtype=torch.bool)),
        ValueError,
        "h_mask: expected the input's dtype torch.float32, got torch.bool",
    ),
}
#: Of a call that is no layer's.
ARGUMENTS = {
    "nonlinearity": (
        lambda: fastseq.rnn(torch.zeros(T, B, I), weights(), nonlinearity="sine"),
        ValueError,
        "Unknown nonlinearity 'sine'. Select from 'tanh', 'relu' or 'sigmoid'.",
    ),
    "one weight": (
        lambda: lstm(w=weights()[0]),
        TypeError,
        "weights: expected a sequence (w_ih, w_hh[, b_ih, b_hh][, w_hr]), or a pair of them, got "
        "Tensor",
    ),
    "no weights": (
        lambda: lstm(w=()),
        TypeError,
        "weights: expected a sequence (w_ih, w_hh[, b_ih, b_hh][, w_hr]), or a pair of them, got "
        "tuple",
    ),
    "three directions": (
        lambda: lstm(w=[weights()] * 3),
        ValueError,
        "weights: expected one or two directions, got 3",
    ),
    "six weights": (
        lambda: lstm(w=(*weights(), *weights()[:2])),
        ValueError,
        "weights: expected 2 to 5 tensors (w_ih, w_hh[, b_ih, b_hh][, w_hr]) a direction, got 6 of "
        f"{['Tensor'] * 6}",
    ),
    "a weight that is none": (
        lambda: lstm(w=[*weights()[:2], None, None]),
        ValueError,
        "weights: expected 2 to 5 tensors (w_ih, w_hh[, b_ih, b_hh][, w_hr]) a direction, got 4 of "
        "['Tensor', 'Tensor', 'NoneType', 'NoneType']",
    ),
    "a projected gru": (
        lambda: fastseq.gru(torch.zeros(T, B, I), weights(w_hr=(P, H))),
        ValueError,
        "weights: a projection w_hr is for lstm only",
    ),
    "input, a list": (
        lambda: fastseq.lstm([0.0], weights()),
        TypeError,
        "input: expected a Tensor or PackedSequence, got list",
    ),
    "input, rank 1": (
        lambda: lstm(torch.zeros(I)),
        ValueError,
        "lstm: Expected input to be 2D or 3D, got 1D instead",
    ),
    "input, rank 4": (
        lambda: fastseq.gru(torch.zeros(1, T, B, I), weights()),
        ValueError,
        "gru: Expected input to be 2D or 3D, got 4D instead",
    ),
    "a count, a word": (
        lambda: checks.positive("k", "two"),
        TypeError,
        "k: expected an int, got str",
    ),
    "a count of none": (
        lambda: checks.positive("k", 0),
        ValueError,
        "k: expected at least 1, got 0",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES | ARGUMENTS)
def test_mistakes(mistake):
    function, error, text = (MISTAKES | ARGUMENTS)[mistake]
    found = caught(function)
    assert type(found) is error, repr(found)
    assert str(found) == text


def test_every_check_is_failed_once():
    """Each raise among the checks is reached by one of the mistakes above."""
    source = ast.parse(inspect.getsource(checks))
    raises = {n.lineno: n.end_lineno for n in ast.walk(source) if isinstance(n, ast.Raise)}
    reached = set()
    for function, *_ in (MISTAKES | ARGUMENTS).values():
        last = traceback.extract_tb(caught(function).__traceback__)[-1]
        if last.filename == checks.__file__:
            reached |= {k for k, end in raises.items() if k <= last.lineno <= end}
    assert len(raises) > 20
    assert reached == set(raises), f"no mistake reaches lines {sorted(set(raises) - reached)}"


def test_a_direction_without_biases_beside_one_that_has_them():
    whole = [torch.randn(w.shape) for w in weights()]
    bare, zeros = [torch.randn(w.shape) for w in whole[:2]], [torch.zeros(4 * H)] * 2
    x = torch.randn(T, B, I)
    for given, same in (
        ((bare, whole), ((*bare, *zeros), whole)),
        ((whole, bare), (whole, (*bare, *zeros))),
    ):
        ours, expected = (flat(fastseq.lstm(x, w)) for w in (given, same))
        assert all(map(torch.equal, ours, expected))


def flat(value):
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


def test_lengths_of_numpy():
    x, w = torch.randn(T, B, I), weights()
    y, _ = fastseq.lstm(x, w, lengths=np.array([5, 2, 3]))
    assert torch.equal(y, fastseq.lstm(x, w, lengths=[5, 2, 3])[0])
