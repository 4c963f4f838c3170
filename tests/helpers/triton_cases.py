"""What Triton's interpreter runs (TRITON_INTERPRET=1), by test_triton.py, in a process of its own:
the kernels on CPU tensors, in NumPy, against the independent writing by the rule.

Each case is run by a quarter of the cells; the type goes round, and --full takes them all.
"""

import copy
import itertools
import re
from contextlib import suppress

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from problems import KINKED, OF_FOUR_STEPS, against_the_independent, draw, full, gradients
from rules import check_all, same_bits
from together import together
from vocabulary import ENDS, F32, F64, PAIRS, TRUTH, held_at_the_ends, samples, ulp_error
from wordy import registered

import fastseq
from fastseq.backends import faults, load, triton_kernels, triton_source, triton_text, triton_tiling
from fastseq.backends.contract import Call, OutputGradients, Wanted
from fastseq.cells import CELLS, WORDS
from fastseq.ops import masks, whole
from fastseq.ops.library import saved_layout

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
SPECIAL = {
    "plain": {},
    # of one number the rule is strict: by seed 0 it is a difference of mgu's that cancels
    "T1 B1 H1": {"T": 1, "B": 1, "H": 1, "I": 1, "seed": 1},
    "B17": {"B": 17, "T": 2},
    **OF_FOUR_STEPS,
}
ZONED = {name: SPECIAL.pop(name) for name in OF_FOUR_STEPS if name.startswith("zoneout")}
STATEFUL = OF_FOUR_STEPS["all at once"]


def in_turn(*axes):
    """All combinations; in the ordinary run a cell has every fourth of the values, its neighbour
    the next ones, and the type goes round. The others are marked full."""
    found = []
    for k, cell in enumerate(CELLS):
        for place, values in enumerate(axes[0]):
            for turn, dtype in enumerate(DTYPES):
                marks = () if (k + place) % (4 * len(DTYPES)) == 4 * turn else (full,)
                name = f"{cell}-{values}-{str(dtype)[6:]}"
                found.append(pytest.param(cell, values, dtype, marks=marks, id=name))
    return found


@pytest.fixture(params=["walk", "grid", pytest.param("step", marks=full)])
def form(request, monkeypatch):
    """The loop walks, or takes a launch for each step, or one whose programs meet; in several
    tiles. Resident: they hold their weights besides."""
    if request.param != "walk":
        tiling = triton_tiling.Tiling(request.param, 16, 16, 16, 16, 4, 1)
        if request.param == "resident":
            tiling = triton_tiling.Tiling("grid", 16, 16, 16, 32, 4, 1, resident=True)
        monkeypatch.setattr(load("triton"), "tiling", lambda *arguments: tiling)
    if request.param in ("grid", "resident"):
        monkeypatch.setattr(load("triton"), "_PATIENCE", 100_000)  # of an error beside them too
        together(monkeypatch)
    return request.param


#: A step's text is a grid's without the waiting.
in_parts = pytest.mark.parametrize(
    "form", ["grid", "resident", pytest.param("step", marks=full)], indirect=True
)


@pytest.mark.parametrize("cell, special, dtype", in_turn(SPECIAL))
def test_walk(cell, special, dtype):
    options = {"T": 4, **SPECIAL[special]}
    if special == "saturated" and dtype.itemsize == 2:
        # f (1 - f) of an f that is kept in 16 bits: of the gradients of w_hh and of a bias it is a
        # part, of a unit parameter's all
        if CELLS[cell].unit_parameters:
            options["scale"] = 10.0
        # with a kink the sign of a sum near zero, rounded, decides a gradient: fewer sums
        if cell in KINKED:
            options["H"] = 6
    case = draw(cell, dtype=dtype, **options)
    against_the_independent(case, "triton", special)


@in_parts
@pytest.mark.parametrize("cell, special, dtype", in_turn(["plain", "all at once", "bare"]))
def test_in_parts(cell, special, dtype, form):
    case = draw(cell, dtype=dtype, **{"T": 4, "H": 18, **SPECIAL[special]})
    against_the_independent(case, "triton", special)


@in_parts
@pytest.mark.parametrize(
    "cell, dtype",
    [("lstm", torch.float32), pytest.param("gru_reset_before", torch.float64, marks=full)],
)
def test_in_several_pieces(cell, dtype, form, monkeypatch):
    """A program walks one tile of the batch after another, and its operands come in parts."""
    found = []

    def programs(tiles, *sizes):
        found.append((tiles, triton_tiling.programs(tiles, *sizes)))
        return found[-1][1]

    monkeypatch.setattr(load("triton"), "programs", programs)
    monkeypatch.setattr(triton_tiling, "_ON_THEIR_WAY", 2)
    stateful = {"reset": True, "h_mask": True, "directions": 2}
    lengths = [3 - b // 9 for b in range(20)]
    case = draw(cell, T=3, B=20, H=18, lengths=lengths, dtype=dtype, **stateful)
    against_the_independent(case, "triton", "two tiles")
    assert form == "step" or (found and all(tiles == 2 > one for tiles, one in found)), found


@pytest.mark.parametrize("cell, layout, dtype", in_turn(["dense", "ragged"]))
def test_lean(cell, layout, dtype):
    options = {"dense": {"directions": 2, "h_mask": True}, "ragged": STATEFUL}[layout]
    case = draw(cell, T=4, dtype=dtype, **options)
    against_the_independent(case, "triton", layout, memory="lean")


@in_parts
def test_lean_in_parts(form):
    case = draw("gru_reset_before", T=4, H=18, dtype=torch.float32, **STATEFUL)
    against_the_independent(case, "triton", "lean in steps", memory="lean")


@pytest.mark.parametrize("memory", ["full", "lean"])
@pytest.mark.parametrize("dtype, P", [(torch.float32, 3), (torch.bfloat16, 6), (torch.float64, 1)])
def test_projection(form, memory, dtype, P):
    case = draw("lstm", T=4, H=6, P=P, directions=2, lengths=[1, 4, 3], dtype=dtype)
    against_the_independent(case, "triton", f"P={P}", memory=memory, trajectory=P == 3)


def test_projected_elman(form):
    """Another cell than PyTorch projects; its gates are kept, since y does not hold them."""
    case = draw("rnn_tanh", T=4, H=6, P=3, directions=2, reset=True)
    truth, ours = case.run("eager"), case.run("triton")
    truth |= gradients(truth, case.leaves())
    ours |= gradients(ours, case.leaves())
    check_all(ours, None, truth, torch.float64)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_words_beyond_the_last_unit(form):
    """Where a tile has no unit, 0 times infinity stays out of the products; the backward text is
    derived."""
    with registered():
        case = draw("wordy", T=3, H=6, lengths=[2, 0, 3], reset=True, dtype=torch.float32)
        wide = case.to(torch.float64)
        truth, theirs, ours = wide.run("eager"), case.run("eager"), case.run("triton")
        truth |= gradients(truth, wide.leaves())
        theirs |= gradients(theirs, case.leaves())
        ours |= gradients(ours, case.leaves())
        check_all(ours, theirs, truth, torch.float32)


#: In the ordinary run few, which between them have all that zoneout has in each form.
OF_ZONEOUT = [
    ("walk", "lstm", "zoneout", torch.float16),
    ("walk", "rnn_tanh", "zoneout at once", torch.bfloat16),
    ("walk", "indrnn", "zoneout in evaluation", torch.float64),
    ("grid", "lstm", "zoneout of others", torch.float64),
    ("grid", "gru_reset_before", "zoneout at once", torch.float32),
    ("resident", "lstm", "zoneout at once in evaluation", torch.bfloat16),
    ("step", "peephole_lstm", "zoneout at once", torch.float32),
]


def cases_of_zoneout():
    """And of each form and cell one, in which the kinds and the types go round."""
    found = dict.fromkeys(OF_ZONEOUT, ())
    every = itertools.product(("walk", "grid", "resident", "step"), CELLS)
    for at, (form, cell) in enumerate(every):
        special, dtype = [*ZONED][at % len(ZONED)], DTYPES[at // 2 % len(DTYPES)]
        if any(draw(cell, T=1, B=1, H=1, **ZONED[special]).zoneout):  # of a state that it has
            found.setdefault((form, cell, special, dtype), (full,))
    return [
        pytest.param(*case, marks=marks, id="-".join(map(str, case)))
        for case, marks in found.items()
    ]


@pytest.mark.parametrize("form, cell, special, dtype", cases_of_zoneout(), indirect=["form"])
def test_zoneout(form, cell, special, dtype):
    case = draw(cell, T=4, H=18, dtype=dtype, **ZONED[special])
    against_the_independent(case, "triton", special, trajectory=True)


@pytest.mark.parametrize(
    "form, cell, P, memory, evaluates",
    [
        ("walk", "lstm", 5, "full", False),
        ("grid", "lstm", 5, "full", True),
        ("walk", "rnn_tanh", None, "lean", False),
        ("walk", "lstm", None, "lean", True),
        pytest.param("step", "lstm", 5, "lean", False, marks=full),
        pytest.param("grid", "mgu", None, "lean", False, marks=full),
    ],
    indirect=["form"],
)
def test_zoneout_of_what_is_projected_or_made_again(form, cell, P, memory, evaluates):
    zoned = ZONED["zoneout at once"] | {"evaluates": evaluates}
    case = draw(cell, T=4, H=18, P=P, dtype=torch.bfloat16, **zoned)
    against_the_independent(case, "triton", f"P={P}", memory=memory)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("layout", ["dense", "ragged"])
def test_trajectory(form, dtype, layout):
    """The cell state at every step, and the gradient that flows through it."""
    options = {"dense": {}, "ragged": {"lengths": [1, 0, 4], "reset": True}}[layout]
    case = draw("lstm", T=4, directions=2, dtype=dtype, **options)
    against_the_independent(case, "triton", layout, trajectory=True)
    with torch.no_grad():
        alone = case.run("triton", trajectory=True)
    exact = case.to(torch.float64).independent(trajectory=True)
    check_all(alone, case.independent(trajectory=True), exact, dtype)


@pytest.mark.parametrize(
    "cell, H, dtype",
    [
        ("lstm", 63, torch.float32),
        ("gru", 64, torch.bfloat16),
        ("lstm", 65, torch.float32),
        ("gru", 127, torch.float16),
        ("indrnn", 127, torch.float32),
        ("gru_reset_before", 65, torch.float32),
    ],
)
def test_sizes(cell, H, dtype):
    """Each class of H, with the tiling that it has."""
    case = draw(cell, T=2, H=H, I=3, dtype=dtype)
    against_the_independent(case, "triton", f"H={H}")


@pytest.mark.parametrize("cell", CELLS)
def test_what_is_not_asked_for(cell, form):
    """Only some gradients, and a loss on one output alone."""
    case = draw(cell, T=3, lengths=[2, 3, 1])
    truth = {"h_n": case.independent()["h_n"]}
    truth = gradients(truth, {"x": case.x})
    for name, leaf in case.leaves().items():
        leaf.requires_grad_(name == "x")
    ours = gradients({"h_n": case.run("triton")["h_n"]}, {"x": case.x})
    check_all(ours, None, truth, torch.float64)


def _call(cell, **options):
    """A call of the backend as it is, beneath autograd: packed rows, two of them padding."""
    case = draw(cell, T=3, directions=2, dtype=torch.float32, grad=False)
    sizes = torch.tensor([3, 2, 1])
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    states = [s.contiguous() for s in case.states]
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, 1] = True
    call = Call(cell, x, sizes, states, case.weights, (False, True), reset=reset)
    if options.get("zoned"):
        random = torch.Generator().manual_seed(2)
        call.stay = [torch.rand(2, 8, s.shape[-1], generator=random) < 0.5 for s in states]
    return copy.copy(call)


def test_zoneout_of_rows_with_padding(form):
    """Where a mask lies depends on all rows, and is read of those before the padding."""
    call = _call("lstm", zoned=True)
    truth, ours = (load(name).forward(call, False, True) for name in ("eager", "triton"))
    for a, b in zip((ours.y, *ours.states), (truth.y, *truth.states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", [*CELLS, "lstm with zoneout"])
def test_a_call_changes_nothing_and_repeats_its_bits(cell, form, monkeypatch):
    """NaN in all memory that is handed out shows in no output; rows of padding are zero; inputs
    and what was saved stay as they are; a second forward and backward give the same bits."""
    backend = load("triton")
    monkeypatch.setattr(torch, "empty", _full_of_nan(torch.empty))
    cell, _, zoned = cell.partition(" with ")
    call = _call(cell, zoned=bool(zoned))
    given = [call.x, *call.states, *(w for ws in call.weights for w in ws.flat() if w is not None)]
    given += call.stay
    before = [t.clone() for t in given]
    results = [backend.forward(call, True, True) for _ in range(2)]
    first = results[0]
    assert not first.y[6:].any() and all(not c[6:].any() for c in first.trajectory)
    saved = [t.clone() for t in (*first.saved, first.y, *first.trajectory)]
    random = torch.Generator().manual_seed(1)
    grads = OutputGradients(
        torch.randn(first.y.shape, generator=random),
        [None for _ in first.states],
        [torch.randn(c.shape, generator=random) for c in first.trajectory],
    )
    found = [backend.backward(call, first, grads, Wanted(True, True, True)) for _ in range(2)]
    flat = [
        [g.x, *g.states, *(w for ws in g.weights for w in ws.flat() if w is not None)]
        for g in found
    ]
    outputs = [[r.y, *r.states, *r.trajectory] for r in results]
    assert not flat[0][0][6:].any()
    for one, other in (outputs, flat):
        for a, b in zip(one, other, strict=True):
            assert bool(torch.isfinite(a).all()) and same_bits(a, b)
    pairs = [*zip(given, before, strict=True)]
    pairs += zip((*first.saved, first.y, *first.trajectory), saved, strict=True)
    for now, then in pairs:
        assert same_bits(now, then)
    layout = saved_layout("triton", call, (8,), True)
    assert [(tuple(t.shape), t.dtype) for t in first.saved] == layout
    storages = {t.untyped_storage().data_ptr() for t in given}
    for tensor in (*outputs[0], *flat[0], *first.saved):
        assert tensor.untyped_storage().data_ptr() not in storages


def _full_of_nan(empty):
    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return poisoned


@pytest.mark.parametrize("cell", CELLS)
def test_strides_do_not_matter(cell):
    case = draw(cell, T=3, directions=2, h_mask=True)

    def spread(tensor):
        """The same numbers, every other one of a wider tensor."""
        if tensor is None:
            return None
        wide = torch.repeat_interleave(tensor.detach(), 2, -1)[..., ::2]
        return wide.requires_grad_(tensor.requires_grad)

    strided = copy.copy(case)
    strided.x, strided.h_mask = spread(case.x), spread(case.h_mask)
    strided.states = [spread(s) for s in case.states]
    strided.weights = [w.map(spread) for w in case.weights]
    ours, truth = strided.run("triton"), case.independent()
    ours |= gradients(ours, strided.leaves())
    truth |= gradients(truth, case.leaves())
    check_all(ours, None, truth, torch.float64)


@pytest.mark.parametrize("T, B", [(3, 0), (0, 2)])
@pytest.mark.parametrize("cell", CELLS)
def test_empty(cell, T, B, form):
    case = draw(cell, T=max(T, 1), B=B, directions=2, dtype=torch.float32)
    x = case.x.detach()[:T].requires_grad_()
    call = Call(cell, x.detach(), None, [s.detach() for s in case.states], case.weights, (0, 1))
    call.weights = [w.map(torch.Tensor.detach) for w in case.weights]
    backend = load("triton")
    result = backend.forward(call, True, False)
    assert result.y.shape == (T, B, 12)
    for final, start in zip(result.states, call.states, strict=True):
        assert torch.equal(final, start)
    ones = [torch.ones_like(s) for s in result.states]
    grads = OutputGradients(None, ones, [None] * (len(ones) - 1))
    found = backend.backward(call, result, grads, Wanted(True, True, True))
    assert found.x.shape == x.shape
    assert all(torch.equal(d, one) for d, one in zip(found.states, ones, strict=True))
    for weights, d in zip(call.weights, found.weights, strict=True):
        for w, dw in zip(weights.flat(), d.flat(), strict=True):
            assert (w is None) == (dw is None)
            assert dw is None or (dw.shape == w.shape and not dw.any())


#: Of every inner length that a product has.
PIECES = triton_text.Pieces(
    tuple((f"{n}{w}", 2) for n in ("", "2 * ", "3 * ", "4 * ") for w in "HP"), 1
)
GRIDS = [
    (cell, projected, backward, pieces, zoned)
    for cell in CELLS
    for projected in (False, True)
    for backward in ("forward", "backward")
    for pieces in (None, PIECES)
    for zoned in (triton_text.UNZONED, triton_text.Zoned(CELLS[cell].states))
    if not projected or cell in ("lstm", "rnn_tanh")
]


@pytest.mark.parametrize("product", ["handed_ptr", "dgates_ptr"])  # in TF32, and else
@pytest.mark.parametrize("cell, projected, backward, pieces, zoned", GRIDS)
def test_what_programs_hand_over_is_read_after_a_meeting(
    cell, projected, backward, pieces, zoned, product
):
    """In the text of a grid's step, twice over: no load of a buffer that it writes goes by the
    first-level cache. What others read (at ``inner``) was stored before its program arrived, and
    is read after the next wait; what a program stored itself, after one of its barriers. The input
    products alone are read before: by the program that will write there."""
    text = triton_source.TEXTS[f"{backward}_grid"](CELLS[cell], projected, pieces, zoned)
    step = text[text.index("for step in") :].splitlines()
    step = [line for line in step[1:] if line.startswith(" " * 12)]
    step = [line.replace("dproduct_ptr", "dgates_ptr") for line in step]  # often one buffer
    step = [re.sub(r"\bproduct_ptr", product, line) for line in step]
    stored = {name for line in step for name in re.findall(r"tl\.store\((\w+)_ptr", line)}
    handed = {
        name for line in step for name in re.findall(r"shared\((\w+)_ptr", line) if "inner" in line
    }
    waits, unseen, unjoined = 0, set(), set()  # stores since the last arrival, or barrier
    arrived = False
    for line in [*step, *step]:
        if "arrive(" in line:
            arrived, unjoined = True, set()
            unseen = set()
        elif "wait(" in line:
            waits, arrived, unjoined = waits + 1, False, set()
        for how, name in re.findall(r"([\w.]+)\((\w+)_ptr(?:,| \+)", line):
            if how == "tl.store":
                assert not (arrived and name in handed), line
                unseen.add(name)
                unjoined.add(name)
            elif name in stored and how == "ahead":
                # the program's own rows, of this step or the next, into which it has not yet stored
                assert name == "gates" and backward == "forward", line
                assert ("at_next" in line) == (pieces is not None), line
            elif name in stored:
                assert how == "shared", line
                assert name not in unjoined, line
                assert "inner" not in line or name not in unseen, line
    assert waits and (handed & stored or not CELLS[cell].products)
    if pieces:  # once before the loop, once in it
        assert text.count("ahead(") == 2 * len(set(re.findall(r"(\w+_ahead) = ", text)))


@pytest.fixture(params=[False, True], ids=["read", "held"])
def in_vain(request, monkeypatch):
    """The interpreter runs one program after another: the first never meets the second. An LSTM
    whose weights are read in each step, or held."""
    tiling = triton_tiling.Tiling("grid", 16, 16, 16, 16, 4, 1)
    if request.param:
        tiling = triton_tiling.Tiling("grid", 16, 16, 16, 32, 4, 1, resident=True)
    monkeypatch.setattr(load("triton"), "tiling", lambda *arguments: tiling)
    monkeypatch.setattr(load("triton"), "_PATIENCE", 3)
    yield draw("lstm", T=3, H=18, dtype=torch.float32)
    with suppress(RuntimeError):
        fastseq.check()


def test_a_program_that_waits_in_vain_ends_with_nan(in_vain):
    found = in_vain.run("triton")
    assert found["y"][1:, :, :16].isnan().all() and found["c_n"][..., :16].isnan().all()


def test_the_next_call_tells_that_one_waited_in_vain(in_vain):
    """Once; then it runs again, and waits in vain again."""
    found = in_vain.run("triton")
    with pytest.raises(RuntimeError, match=r"kernel lstm_forward_grid, launched on cpu .* in vain"):
        in_vain.run("triton")
    again = in_vain.run("triton")
    assert all(torch.equal(found[name].isnan(), again[name].isnan()) for name in found)


def test_check_tells_once_that_one_waited_in_vain(in_vain):
    in_vain.run("triton")
    with pytest.raises(RuntimeError, match=r"lstm_forward_grid"):
        fastseq.check()
    fastseq.check()
    in_vain.run("triton")


def test_backward_tells_that_one_waited_in_vain(in_vain):
    """Of forward's programs; of its own, the next call."""
    y = in_vain.run("triton")["y"]
    with pytest.raises(RuntimeError, match="lstm_forward_grid"):
        torch.autograd.grad(y.sum(), in_vain.x)
    y = in_vain.run("triton")["y"]
    with suppress(RuntimeError):
        fastseq.check()
    (dx,) = torch.autograd.grad(y.sum(), in_vain.x)
    assert dx.isnan().any()
    with pytest.raises(RuntimeError, match="lstm_backward_grid"):
        in_vain.run("triton")


def test_whoever_waits_long_enough_tells_nothing(monkeypatch):
    tiling = triton_tiling.Tiling("grid", 16, 16, 16, 16, 4, 1)
    monkeypatch.setattr(load("triton"), "tiling", lambda *arguments: tiling)
    monkeypatch.setattr(load("triton"), "_PATIENCE", 100_000)
    together(monkeypatch)
    case = draw("lstm", T=3, H=18, dtype=torch.float32)
    torch.autograd.grad(case.run("triton")["y"].sum(), case.x)
    fastseq.check()
    assert faults.flag(case.x.device).tolist() == [0]


def test_where_not_all_programs_can_start_steps_take_their_place(monkeypatch):
    """The driver refuses a cooperative launch on a part of a GPU."""
    case = draw("lstm", T=3, H=18, dtype=torch.float32)
    backend = load("triton")

    def only(form, *arguments):
        return triton_tiling.Tiling(arguments[-1], 16, 16, 16, 16, 4, 1)

    def refuse(self, grid, values, options):
        if options.get("launch_cooperative_grid"):
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        launch(self, grid, values, options)

    launch = triton_kernels.Kernel.__call__
    monkeypatch.setattr(backend, "tiling", only)
    monkeypatch.setattr(triton_kernels.Kernel, "__call__", refuse)
    against_the_independent(case, "triton", "refused")


def test_splitting_time_gives_the_same():
    """The state carried from one call to the next."""
    case = draw("lstm", T=4, grad=False)
    whole = case.run("triton")
    first, second = copy.copy(case), copy.copy(case)
    first.x, second.x = case.x[:2], case.x[2:]
    one = first.run("triton")
    second.states = [one["h_n"], one["c_n"]]
    two = second.run("triton")
    check_all(
        {"y": torch.cat([one["y"], two["y"]]), "h_n": two["h_n"], "c_n": two["c_n"]},
        None,
        whole,
        torch.float64,
    )


def test_a_reset_whose_directions_lie_side_by_side():
    """A backend reads it wherever its numbers lie."""
    backend, call = load("triton"), _call("gru")
    expected = backend.forward(call, False, False).y
    call.reset = call.reset.t().contiguous().t()
    assert not call.reset.is_contiguous() and call.reset.any()
    assert same_bits(backend.forward(call, False, False).y, expected)


def test_an_ensemble_is_one_launch(monkeypatch):
    """Recurrences run side by side: the launches do not grow with their number."""
    launches = []
    launch = triton_kernels.Kernel.__call__

    def count(self, grid, *rest):
        launches.append(grid)
        launch(self, grid, *rest)

    monkeypatch.setattr(triton_kernels.Kernel, "__call__", count)
    draw("gru", T=3, directions=2, grad=False, dtype=torch.float32).run("triton")
    assert launches == [(1, 2, 1)]


@triton.jit
def apply_kernel(x_ptr, y_ptr, n, function: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < n, other=0.0)
    tl.store(y_ptr + place, function(x), mask=place < n)


# Greatest error in ULP, that of NumPy's exp included. Below its domain sigmoid's result would be
# denormal.
ERRORS = [
    ("sigmoid", F32, (-87.3, np.inf), (-87.3, 20.0), 3.0),
    ("tanh", F32, (-np.inf, np.inf), (-10.0, 10.0), 2.5),
    ("relu", F32, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("drelu", F32, (-np.inf, np.inf), (-1.0, 1.0), 0.0),
    ("dsigmoid", F32, (0.0, 1.0), (0.0, 1.0), 1.51),
    ("dtanh", F32, (-1.0, 1.0), (-1.0, 1.0), 1.51),
    ("sigmoid", F64, (-708.3, np.inf), (-708.3, 40.0), 2.5),
    ("tanh", F64, (-np.inf, np.inf), (-20.0, 20.0), 2.5),
    ("exp", F32, (-np.inf, np.inf), (-104.0, 89.0), 2.6),
    ("exp", F64, (-np.inf, np.inf), (-746.0, 710.0), 1.0),
    ("reciprocal", F32, (-np.inf, np.inf), (-4.0, 4.0), 0.5),
    ("logsigmoid", F32, (-np.inf, np.inf), (-20.0, 20.0), 3.5),
    ("sqrt", F32, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("dlogsigmoid", F32, (-np.inf, 0.0), (-10.0, 0.0), 4.0),
    ("dsqrt", F32, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("reciprocal", F64, (-np.inf, np.inf), (-4.0, 4.0), 0.5),
    ("logsigmoid", F64, (-np.inf, np.inf), (-20.0, 20.0), 3.0),
    ("sqrt", F64, (0.0, np.inf), (0.0, 4.0), 0.5),
    ("dlogsigmoid", F64, (-np.inf, 0.0), (-10.0, 0.0), 4.0),
    ("dsqrt", F64, (0.0, np.inf), (0.0, 4.0), 0.5),
]


@pytest.mark.parametrize(("name", "dtype", "domain", "curved", "limit"), ERRORS)
def test_vocabulary_error_in_ulp(name, dtype, domain, curved, limit):
    if dtype is F64 and np.finfo(np.longdouble).nmant <= np.finfo(F64).nmant:
        pytest.skip("this platform's long double is no more exact than float64")
    x = samples(dtype, domain, curved)[-(2**18) :]
    y = torch.empty(len(x), dtype=torch.from_numpy(x).dtype)
    function = triton_kernels.VOCABULARY[name]
    with np.errstate(all="ignore"):
        grid = (triton.cdiv(len(x), 65536),)
        apply_kernel[grid](torch.from_numpy(x), y, len(x), function, 65536)
        truth = TRUTH[name](x.astype(F64 if dtype is F32 else np.longdouble))
        assert ulp_error(y.numpy(), truth).max() <= limit


@triton.jit
def pair_kernel(a_ptr, b_ptr, y_ptr, n, function: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + place, mask=place < n, other=0.0)
    b = tl.load(b_ptr + place, mask=place < n, other=0.0)
    tl.store(y_ptr + place, function(a, b), mask=place < n)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", [*ENDS, *PAIRS])
def test_vocabulary_at_the_ends(name, dtype):
    def run(name, *given):
        tensors = [torch.from_numpy(x) for x in given]
        y = torch.full_like(tensors[0], 7)
        kernel = apply_kernel if len(given) == 1 else pair_kernel
        with np.errstate(all="ignore"):
            kernel[(1,)](*tensors, y, len(y), triton_kernels.VOCABULARY[name], 16)
        return y.numpy()

    held_at_the_ends(run, name, dtype)


def test_vocabulary_has_every_word():
    assert set(triton_kernels.VOCABULARY) == set(WORDS)


def test_vocabulary_passes_nan():
    x = torch.full((1,), float("nan"))
    for name in ("sigmoid", "tanh", "relu", "dsigmoid", "dtanh"):
        y = torch.zeros(1)
        apply_kernel[(1,)](x, y, 1, triton_kernels.VOCABULARY[name], 16)
        assert y.isnan().all(), name


OWN = {"zoneout": 0.4, "recurrent_dropout": 0.3}


@pytest.mark.parametrize(
    "kind, own, dtype",
    [
        ("LSTM", {}, torch.float32),
        ("GRU", {}, torch.float32),
        ("LSTM", OWN, torch.bfloat16),
        pytest.param("LSTM", OWN, torch.float32, marks=full),
    ],
)
def test_a_stack_is_one_call(kind, own, dtype, monkeypatch):
    """With the bits of its layers one by one, and with what is a layer's own: resets and all states
    besides its masks. tests/test_stacked.py has more, of cuda."""
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "bidirectional": True, "dtype": dtype}
    m = getattr(fastseq, kind)(3, 5, **sizes, **own, backend="triton")
    x = torch.randn(3, 2, 3, dtype=dtype, requires_grad=True)
    reset = torch.tensor([[False, False], [True, False], [False, True]])
    asked = {"reset": reset, "seed": 5, "all_states": True} if own else {}

    def found():
        y, state, *along = m(x, **asked)
        outputs = [y, *(state if isinstance(state, tuple) else (state,)), *along]
        return outputs, torch.autograd.grad([o.sum() for o in outputs], [x, *m.parameters()])

    outputs, grads = found()
    assert "StackFunction" in outputs[0].grad_fn.name()
    monkeypatch.setattr(whole, "run", lambda *call, **given: None)
    outputs_too, grads_too = found()
    assert "StackFunction" not in outputs_too[0].grad_fn.name()
    ours, theirs = [*outputs, *grads], [*outputs_too, *grads_too]
    assert len(ours) == len(theirs) and all(map(same_bits, ours, theirs))


# Masks


def test_a_mask_has_the_known_answer():
    """Of Random123, the authors' library: the words of counter 0 and key 0."""
    zero = torch.zeros(1, dtype=torch.int64)
    for unit, word in enumerate((0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        for threshold, kept in ((word, True), (word + 1, False)):
            found = load("triton").keep(zero[0], [0], zero, None, 4, threshold)
            assert found.shape == (1, 1, 4) and found[0, 0, unit] == kept


@pytest.mark.parametrize(
    "seed, units, sites",
    [
        (0, 130, [3]),
        (-1, 5, [3, 11, 19]),
        (0x0123456789ABCDEF, 8, [0, 5]),
        (-(2**63), 1, [77, 0, 1]),
    ],
    ids=str,
)
def test_masks_have_the_bits_of_torch_operations(seed, units, sites):
    """Of sites in a row or not, ids of 48 bits, and signed words of the key."""
    ids = torch.tensor([0, 1, 2**31, 2**32 - 1, 2**47 + 5, -3, *range(12)])
    when = torch.arange(len(ids)) * 2**26
    for steps, threshold in ((None, 2**31), (when, 2**31 - 1), (when, 15 * 2**28), (None, 2**32)):
        given = torch.tensor(seed), sites, ids, steps, units, threshold
        found = load("triton").keep(*given)
        assert found.dtype is torch.bool
        assert torch.equal(found, masks.by_operations(*given)), threshold
    assert load("triton").keep(torch.tensor(seed), sites, ids[:0], None, 4, 7).shape[1:] == (0, 4)


def test_masks_that_are_elsewhere_are_left_alone():
    here = torch.zeros(2, dtype=torch.int64)
    there = here.to("meta")
    assert load("triton").keep(here[0], [0], there, None, 4, 7) is None
    assert load("triton").keep(there[0], [0], here, None, 4, 7) is None
