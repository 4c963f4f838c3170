"""bfloat16 on the CPU: products in pairs where the processor has them, and in float32 elsewhere."""

import pytest
import torch
from problems import KINKED, draw, gradients
from rules import check_all, same_bits
from splits import LENGTHS, check_splits, equal, layer, values

from fastseq.backends import load
from fastseq.backends.contract import Weights
from fastseq.cells import CELLS

native = load("native")
if isinstance(native, str):
    pytest.skip(native, allow_module_level=True)

BF16 = torch.bfloat16
PAIRS = "avx512_bf16"
SETS = native.instruction_sets()

needs_pairs = pytest.mark.skipif(PAIRS not in SETS, reason="no AVX512_BF16 here")
each_cell = pytest.mark.parametrize("cell", CELLS)


@pytest.fixture
def use():
    before = SETS[0]
    yield lambda name: native._cpu.use_instruction_set(name)
    native._cpu.use_instruction_set(before)


def everything(case, backend, memory="full"):
    outputs = case.run(backend, memory=memory)
    return outputs | gradients(outputs, case.leaves())


def check(case, what):
    """By the rule. On which side of a ReLU's kink a gradient is, the rounding decides."""
    has_kink = case.cell in KINKED

    def values(dtype, backend):
        named = everything(case.to(dtype), backend)
        return {k: v for k, v in named.items() if not (has_kink and k.startswith("d"))}

    truth, theirs = values(torch.float64, "reference"), values(BF16, "reference")
    check_all(values(BF16, "native"), theirs, truth, BF16, what)


OPTIONS = {
    "plain": {},
    "two layers, two directions": {"layers": 2, "directions": 2},
    "ragged": {"lengths": LENGTHS},
    "reset": {"reset": True},
    "h_mask": {"h_mask": True},
    "one sequence": {"B": 1, "T": 20, "H": 130},
    "one step of many": {"B": 41, "T": 1},
    "long chains": {"I": 1100, "H": 66},
    "projected": {"P": 34},
    "odd input": {"I": 17},
    "odd units": {"H": 65},
}


@pytest.mark.parametrize("instruction_set", [s for s in SETS if s.startswith("avx512")] or SETS[:1])
@pytest.mark.parametrize("option", OPTIONS)
@each_cell
def test_rule(cell, option, instruction_set, use):
    if option == "projected" and cell != "lstm":
        pytest.skip("only the LSTM is projected")
    use(instruction_set)
    case = draw(cell, **{"T": 5, "B": 7, "I": 18, "H": 98, "dtype": BF16} | OPTIONS[option])
    check(case, f"{cell}, {option}, {instruction_set}:")


@pytest.mark.parametrize("instruction_set", SETS[:1])
def test_rule_beyond_a_chunk(instruction_set, use):
    """More rows at a step, and more gates, than a product takes at once."""
    use(instruction_set)
    check(draw("gru", T=2, B=1101, I=6, H=8, dtype=BF16), "rows")
    check(draw("lstm", T=2, B=3, I=6, H=1040, dtype=BF16), "gates")


def numbers(cell, H, I=6):  # noqa: E741
    named, weights = values(layer(cell, T=6, B=5, I=I, H=H, dtype=BF16))
    return named | weights


@needs_pairs
@each_cell
def test_even_sizes_alone_go_in_pairs(cell, use):
    """In pairs the last bits differ; where a product would split a pair all are in float32."""
    for sizes, pairs in (((34, 6), True), ((33, 6), False), ((34, 7), False)):
        use(PAIRS)
        ours = numbers(cell, *sizes)
        use("avx512")
        others = numbers(cell, *sizes)
        assert all(same_bits(ours[name], others[name]) for name in ours) is not pairs, sizes


@each_cell
@pytest.mark.parametrize("option", ["plain", "ragged", "reset", "h_mask", "projected"])
def test_a_batch_may_be_split(cell, option):
    if option == "projected" and cell != "lstm":
        pytest.skip("only the LSTM is projected")
    drawn = {"T": 5, "B": 7, "H": 34, "I": 6, "dtype": BF16, "directions": 2} | OPTIONS[option]
    if "P" in drawn:
        drawn["P"] = 10
    check_splits(layer(cell, **drawn), option, [[1], [2, 6], [4, 3, 5], [1, 0, 2, 4, 3, 5]])


@each_cell
@pytest.mark.parametrize("sizes", [(24, 1, 8, 258), (9, 11, 8, 130)])
def test_any_number_of_threads(cell, sizes, threads):
    T, B, I, H = sizes  # noqa: E741
    case = layer(cell, T=T * (4 if CELLS[cell].G == 1 else 1), B=B, I=I, H=H, dtype=BF16)
    threads(1)
    alone, weights = values(case)
    again, weights_again = values(case)
    equal(again | weights_again, alone | weights, "again")
    for count in (2, 3):
        threads(count)
        equal(values(case)[0], alone, f"{count} threads")


@needs_pairs
@each_cell
def test_weights_may_stand_anywhere(cell):
    """Transposed, or at an address that no pair has, they are copied; the numbers are the same."""
    case = layer(cell, T=3, B=5, I=6, H=34, dtype=BF16)
    expected = values(case)

    def elsewhere(w, form):
        if w is None or w.dim() < 2:
            return w
        if form == "transposed":
            return w.T.contiguous().T
        return torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)

    weights = case.weights
    for form in ("transposed", "off the alignment"):
        case.weights = [
            Weights(*(elsewhere(t, form) for t in w[:5]), units=w.units) for w in weights
        ]
        for ours, theirs in zip(values(case), expected, strict=True):
            equal(ours, theirs, form)


@needs_pairs
@pytest.mark.parametrize("cell", ["gru", "gru_reset_before", "rnn_tanh"])
def test_the_state_handed_on_is_y(cell):
    """h is rounded at each step, so a sequence in two parts has the bits of the whole."""
    case = layer(cell, T=6, B=9, I=6, H=34, dtype=BF16)
    whole = case.run("native")
    x, states = case.x, case.states
    case.x = x[:2]
    first = case.run("native")
    case.x, case.states = x[2:], [first["h_n"]]
    second = case.run("native")
    case.x, case.states = x, states
    assert same_bits(torch.cat([first["y"], second["y"]]), whole["y"])
    assert same_bits(second["h_n"], whole["h_n"])


@needs_pairs
@each_cell
def test_gates_made_again_are_the_gates(cell):
    case = draw(cell, T=40, B=3, I=6, H=34, dtype=BF16)
    ours = everything(case, "native")
    equal(everything(case, "native", memory="lean"), ours, "lean")
