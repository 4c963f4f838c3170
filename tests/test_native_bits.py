"""Bit for bit the same: however a batch is split, permuted or padded, on any number of threads.

With ``deterministic``, of y, the final states and the gradients of x and the initial states. The
gradients of weights are sums over all rows, which every split adds up in other pieces: in them two
identical calls agree, with ``deterministic`` or without.
"""

import pytest
import torch
from splits import LENGTHS, check_splits, equal, layer, values

from fastseq.backends import load
from fastseq.cells import CELLS

full = pytest.mark.full
native = load("native")
if isinstance(native, str):
    pytest.skip(native, allow_module_level=True)

each_cell = pytest.mark.parametrize("cell", CELLS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
SIZES = [1, 17, 63, 64, 65, 130, 257]


def splits_of(B):
    ways = [[b] for b in {0, B // 2, B - 1}]
    ways += [list(range(B // 3)), list(range(B // 3, B)), list(reversed(range(B)))]
    return [way for way in ways if way]


@each_dtype
@pytest.mark.parametrize("H", SIZES)
@each_cell
def test_a_batch_may_be_split_and_permuted(cell, H, dtype):
    """B = 11 is two tiles of rows and a rest on every instruction set."""
    case = layer(cell, T=3, B=11, I=5, H=H, dtype=dtype, directions=2 if H < 64 else 1)
    check_splits(case, f"H={H}", splits_of(11))


def of_every_cell(options):
    """Cell and option; only the LSTM is projected."""
    return [(c, o) for c in CELLS for o in options if o != "projected" or c == "lstm"]


OPTIONS = {
    "ragged": {"lengths": LENGTHS},
    "reset": {"reset": True},
    "ragged reset": {"reset": True, "lengths": LENGTHS},
    "h_mask": {"h_mask": True},
    "wide input": {"I": 300},
    "no state, no bias": {"state": False, "bias": False},
    "projected": {"P": 9},
    "zoneout": {"zoneout": 0.3, "lengths": LENGTHS},
    "zoneout in evaluation": {"zoneout": 0.3, "evaluates": True},
}


@each_dtype
@pytest.mark.parametrize(("cell", "option"), of_every_cell(OPTIONS))
def test_so_it_may_with_every_option(cell, option, dtype):
    case = layer(cell, T=5, B=7, H=33, dtype=dtype, directions=2, **OPTIONS[option])
    check_splits(case, option, [[1], [2, 6], [1, 0, 3, 6], [4, 3, 5], [1, 0, 2, 4, 3, 5]])


@each_dtype
@each_cell
def test_ragged_is_each_sequence_alone(cell, dtype):
    """Packed and not: the same rows by another layout."""
    lengths = [6, 4, 4, 1]
    case = layer(cell, T=6, B=4, H=65, dtype=dtype, lengths=lengths, directions=2)
    whole, _ = values(case)
    equal_steps = layer(cell, T=6, B=4, H=65, dtype=dtype, lengths=[6] * 4, directions=2)
    dense = layer(cell, T=6, B=4, H=65, dtype=dtype, directions=2)
    equal(values(equal_steps)[0], values(dense)[0], "all of one length")
    equal(
        {name: v[:, :1] for name, v in whole.items()},
        values(dense, [0])[0],
        "the longest alone",
    )
    check_splits(case, "ragged", [[b] for b in range(4)])


#: T, B, I, H: enough work for three threads, whose rows or hidden units are shared out
SHARED = {
    "units": (16, 1, 8, 257),
    "units of few rows": (12, 2, 70, 130),
    "rows": (9, 11, 8, 130),
    "many rows": (4, 130, 6, 65),
}


@each_dtype
@pytest.mark.parametrize("shared", SHARED)
@each_cell
def test_any_number_of_threads(cell, shared, dtype, threads):
    T, B, I, H = SHARED[shared]  # noqa: E741
    more = 4 if CELLS[cell].G == 1 else 1  # the lighter cells: a longer sequence
    case = layer(cell, T=T * more, B=B, I=I, H=H, dtype=dtype)
    threads(1)
    alone, _ = values(case)
    for count in (2, 3):
        threads(count)
        equal(values(case)[0], alone, f"{count} threads")


CALLS = {
    "plain": {},
    "few rows": {"T": 2},
    "reset": {"reset": True, "lengths": [12, 9, 7]},
    "projected": {"P": 20},
    "directions": {"directions": 2, "B": 1},
    "zoneout": {"zoneout": 0.3},
    "zoneout of one": {"zoneout": 0.3, "B": 1},
}


@each_dtype
@pytest.mark.parametrize("evaluates", [False, True], ids=["training", "evaluation"])
@each_cell
def test_zoneout_on_threads_and_from_the_output_alone(cell, evaluates, dtype, threads):
    """Threads that share hidden units, or rows; and what lean backward makes again."""
    given = {"zoneout": 0.3, "evaluates": evaluates, "dtype": dtype}
    for B in (1, 5):
        case = layer(cell, T=9, B=B, H=260, reset=True, **given)
        threads(1)
        alone, _ = values(case, deterministic=True)
        threads(2)
        equal(values(case, deterministic=True)[0], alone, f"B={B}, two threads")
        lean, _ = values(case, deterministic=True, memory="lean")
        equal(lean, alone, f"B={B}, lean")


@each_dtype
@pytest.mark.parametrize("count", [1, 2, pytest.param(3, marks=full)])
@pytest.mark.parametrize(("cell", "option"), of_every_cell(CALLS))
def test_two_identical_calls_agree_in_everything(cell, option, count, dtype, threads):
    threads(count)
    case = layer(cell, **{"T": 12, "B": 3, "H": 130, "dtype": dtype} | CALLS[option])
    for deterministic in (True, False):
        named, weights = values(case, deterministic=deterministic)
        again, weights_again = values(case, deterministic=deterministic)
        equal(again | weights_again, named | weights, f"{count} threads, {deterministic}")


@full
@each_dtype
@pytest.mark.parametrize("H", SIZES)
@pytest.mark.parametrize("B", [1, 2, 13, 64])
@each_cell
def test_splits_on_threads(cell, B, H, dtype, threads):
    """Splitting the batch changes how threads share the work, and still no bit."""
    case = layer(cell, T=14, B=B, I=7, H=H, dtype=dtype)
    threads(1)
    alone, _ = values(case)
    for count in (1, 2, 3):
        threads(count)
        equal(values(case)[0], alone, f"{count} threads")
        check_splits(case, f"{count} threads", splits_of(B))
