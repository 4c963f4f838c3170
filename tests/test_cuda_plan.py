"""The planner of ``cuda``: what it promises holds for every size, on every device, with no GPU."""

import ast
import csv
import dataclasses
import itertools
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastseq.backends import cuda_kernels, cuda_plan, cuda_teams, cuda_time
from fastseq.backends.contract import Problem
from fastseq.backends.cuda_kernels import POINTWISE_CELLS, PRODUCT_CELLS, TEAMS
from fastseq.backends.cuda_plan import A100, H100, H200, KERNELS, LAPTOP, Plan, decline, plan
from fastseq.cells import CELLS
from tests.helpers import cuda_on_host

DEVICES = (H100, H200, A100, LAPTOP)
SIZES = (*range(1, 301, 23), 32, 33, 64, 65, 128, 129, 192, 193, 256, 257, 300, 512, 1024)
#: (dtype, precision) -> the type's name and bytes of a number
TYPES = {
    (torch.bfloat16, "ieee"): ("bfloat16", 2),
    (torch.float16, "tf32"): ("float16", 2),
    (torch.float32, "tf32"): ("tf32", 4),
    (torch.float32, "ieee"): ("float32", 4),
}
#: cell -> rows of H numbers that a step moves: gates; those kept for backward; extras; whether
#: backward reads h; states in float32; gates whose recurrent part has a gradient of its own.
#: Written from the equations.
ROWS = {
    "rnn_tanh": (1, 0, 0, True, 0, 0),
    "rnn_relu": (1, 0, 0, True, 0, 0),
    "rnn_sigmoid": (1, 0, 0, True, 0, 0),
    "lstm": (4, 4, 0, False, 1, 0),
    "peephole_lstm": (4, 4, 0, False, 1, 0),
    "coupled_lstm": (3, 3, 0, False, 1, 0),
    "gru": (3, 3, 1, True, 0, 3),
    "indrnn": (1, 0, 0, True, 0, 0),
    "indrnn_tanh": (1, 0, 0, True, 0, 0),
    "leaky_integrator": (1, 1, 0, True, 0, 0),
}
#: Gates with a recurrent product.
GATES = {
    **dict.fromkeys(("rnn_tanh", "rnn_relu", "rnn_sigmoid"), 1),
    **{"lstm": 4, "peephole_lstm": 4, "coupled_lstm": 3, "gru": 3},
    **dict.fromkeys(("indrnn", "indrnn_tanh", "leaky_integrator"), 0),
}


def padded(way, cell, HC, size):
    """Numbers of a product's weights as warps hold them. Up to 64 units a thread has one: forward
    it takes gates in pairs, backward two warps take 64 bytes of the inner length in turn."""
    gates, inner = GATES[cell], HC
    if way == "backward":
        gates, inner = 1, gates * HC
    if HC <= 64:
        if way == "forward":
            gates += gates % 2
        else:
            inner += -inner % (128 // size)
    return gates * HC * inner


def problem(cell="lstm", dtype=torch.bfloat16, T=32, B=8, H=64, **options):
    return Problem(cell, dtype, "cuda", T, B, 16, H, H, **options)


# The list of kernels


def test_the_list():
    assert 160 < len(KERNELS) <= 180
    assert len(TEAMS) == (7 * 2 + 4) * 3 * 2 + 4 * 2 * 2  # cells by regimes, types, ways; wide
    for name, kernel in KERNELS.items():
        assert name == f"{kernel.way}_{kernel.cell}_{kernel.type}_{kernel.HC}"
        other = {"forward": "backward", "backward": "forward"}[kernel.way]
        assert name.replace(kernel.way, other, 1) in KERNELS
    for name, kernel in TEAMS.items():
        assert name == f"{kernel.way}_{kernel.cell}_{kernel.type}_{kernel.kind}"


def test_the_cells_are_those_of_one_phase():
    one = [
        name
        for name, cell in CELLS.items()
        if len(cell.phases) == 1 and len(cell.other_states) <= 1 and cell.beyond() is None
    ]
    assert [n for n in one if CELLS[n].recurrent_gates] == list(PRODUCT_CELLS)
    assert [n for n in one if not CELLS[n].recurrent_gates] == list(POINTWISE_CELLS)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_every_kernel_fits_a_device(kernel):
    assert kernel.shared <= 227 * 1024
    # a thread has two columns, and of these one unit up to 64, else two
    assert kernel.threads == 8 * kernel.HC // (2 if kernel.HC <= 64 else 4) <= 512
    assert kernel.stages in (3, 4, 6, 8)
    # every fragment stands in one place, and they are the weights
    parts = 2 if kernel.type == "float32" else 1
    size = 2 if "16" in kernel.type else 4
    weights = padded(kernel.way, kernel.cell, kernel.HC, size) * size
    assert (kernel.held + kernel.rest) * kernel.warps * 512 == weights
    assert kernel.held >= 0 and kernel.rest >= 0
    assert kernel.weight_registers == 4 * parts * kernel.held
    budget = 24 if kernel.threads == 512 else 96 if parts == 2 else 128
    assert kernel.weight_registers <= budget
    if kernel.rest:  # registers first: there is no room for another pair of every row tile
        assert kernel.weight_registers + 8 * parts * kernel.tiles > budget
    # its launch bounds leave room for the weights, and the registers are there
    assert kernel.weight_registers + 60 <= kernel.registers <= 255
    assert kernel.ctas * kernel.threads * kernel.registers <= 65536


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_shared_memory_by_its_pieces(kernel):
    """The weights' rest, two operands of 8 rows, the sums that pairs of warps exchange, and the
    steps of a ring, 8 rows of pieces, which stand 16 bytes apart."""
    gates, _, extras, reads_h, states, _ = ROWS[kernel.cell]
    size = 2 if "16" in kernel.type else 4
    row = kernel.HC * size
    ring, inner = gates * row, row
    if kernel.way == "backward":
        ring += (extras + 1 + reads_h) * row + states * 2 * kernel.HC * 4
        inner = GATES[kernel.cell] * row
    expected = kernel.rest * 512 * kernel.warps
    if GATES[kernel.cell]:
        pitch = inner + 64 * (inner % 128 == 0)
        expected += 2 * (8 * pitch + 4 * 8 * size)
        if kernel.way == "backward" and kernel.HC <= 64:
            expected += kernel.threads * 2 * 4
    assert kernel.shared == expected + kernel.stages * 8 * (ring + 16)


def test_shared_memory_by_hand():
    assert KERNELS["forward_lstm_bfloat16_128"].shared == 2 * (8 * 320 + 64) + 6 * 8 * 1040
    # gates 1024, dy 256, c and dc 512 each
    assert KERNELS["backward_lstm_bfloat16_128"].shared == 2 * 8768 + 4 * 8 * (2304 + 16)
    # two warps share 384 bytes, 24 weights in registers a thread; gates 384, n 128, dy and h 128
    assert KERNELS["backward_gru_float16_64"].shared == 2 * 3648 + 2048 + 6 * 8 * (768 + 16)


#: What the planner and the kernels both count, as tile.h names it.
CONSTANTS = {
    "THREADS": lambda k: k.threads,
    "EACH": lambda k: k.each,
    "INNER": lambda k: k.inner,
    "TILES": lambda k: k.tiles,
    "SPLIT": lambda k: k.split,
    "PAIRS * T::TILES * 2 * T::MULTIPLIES": lambda k: k.fragments,
    "HELD * T::TILES * 2 * T::MULTIPLIES": lambda k: k.held,
    "REST * T::TILES * 2 * T::MULTIPLIES": lambda k: k.rest,
    "ROOM": lambda k: k.room,
    "OPERAND": lambda k: k.operand,
    "ROW": lambda k: k.row,
    "STAGES": lambda k: k.stages,
    "BYTES": lambda k: k.shared,
    "CTAS": lambda k: k.ctas,
    "CHAINS": cuda_time.chains,
}


#: Of a team's kernel, as team.h names it: of both ways, of each, and of what is known at a launch.
OF_SLICES = {
    "THREADS": lambda k: k.threads,
    "UNITS": lambda k: k.units,
    "ROWS": lambda k: k.rows,
    "STAGES": lambda k: k.stages,
    "ROOM": lambda k: k.room,
}
OF_A_WAY = {
    "forward": {
        "TILES": lambda k: k.tiles,
        "SPLIT": lambda k: k.split,
        "BLOCK": lambda k: k.block,
        "HELD": lambda k: k.held,
        "ROW": lambda k: k.row,
    },
    "backward": {
        "INNER": lambda k: k.inner,
        "PAIRS": lambda k: k.pairs,
        "HELD_TILES": lambda k: k.held,
        "ROW_BACK": lambda k: k.row,
    },
}
OF_ROOMS = {
    "bytes": lambda k, H, n: k.shared(H, n),
    "weights": lambda k, H, n: k.weights(H)[1],
    "operand": lambda k, H, n: k.operand(H, n),
    "walked": lambda k, H, n: k.walked(H),
}
#: Hidden units and sequences; a grid's may be more than a cluster's.
ROOMS = [(1, 1), (16, 8), (33, 9), (128, 17), (300, 3), (512, 24)]
OF_GRIDS = [(1000, 9), (1024, 1)]


def test_sizes_are_those_of_the_kernels(tmp_path):
    """Compiled from csrc/cuda: each constant of each kernel of the list."""
    if not cuda_on_host.CUDA.is_dir():
        pytest.skip("no csrc/ beside the tests")
    source, program = tmp_path / "sizes.cpp", tmp_path / "sizes"

    def printed(*values):
        return " ".join(f'std::printf(" %d", int({value}));' for value in values)

    ways = [printed(*(f"S::{n}" for n in OF_A_WAY[way])) for way in ("forward", "backward")]
    rooms = [
        " ".join(
            f"{{ const Room r = {way}_room<S>(({H} + S::UNITS - 1) / S::UNITS, {n});"
            f" {printed('r.bytes', 'r.weights * (S::WAVE + 1)', 'r.operand', f'r.{walked}')} }}"
            for H, n in ROOMS + OF_GRIDS
        )
        for way, walked in (("forward", "pairs"), ("backward", "tiles"))
    ]
    alone = printed(*(f"{'Weights<T>' if n == 'CHAINS' else 'T'}::{n}" for n in CONSTANTS))
    source.write_text(
        f"""
        #include <cstdio>
        #include "team.h"
        #include "list.h"
        using namespace fastseq::cuda;
        constexpr bool forward = false, backward = true;
        template <class Cell, class Type, int HC, bool way> void print(const char* name) {{
          std::printf("%s", name);
          if constexpr (HC > 0) {{
            using T = Tile<Cell, Type, HC, way>;
            {alone}
          }} else {{
            using S = Slice<Cell, Type, typename OfKind<HC>::By>;
            {printed(*(f"S::{n}" for n in OF_SLICES))}
            if (way == forward) {{
              {ways[0]} {rooms[0]}
            }} else {{
              {ways[1]} {rooms[1]}
            }}
          }}
          std::printf("\\n");
        }}
        #define PRINT(way, cell, Cell, type, HC) \\
          print<Cell, type, HC, way>(#way "_" #cell "_" #type "_" #HC);
        int main() {{
          {" ".join(f"FASTSEQ_KERNELS_{cell}(PRINT)" for cell in ROWS)}
        }}
        """
    )
    flags = "-std=c++20", "-O0", "-pthread", "-Wno-unknown-pragmas", f"-I{cuda_on_host.CUDA}"
    compiled = subprocess.run(
        [*cuda_on_host.compiler(), *flags, str(source), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    assert compiled.returncode == 0, compiled.stderr[-4000:]
    said = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    found = {name: list(map(int, v)) for name, *v in map(str.split, said.splitlines())}
    assert found.keys() == KERNELS.keys() | TEAMS.keys()
    for name, kernel in KERNELS.items():
        expected = {constant: of(kernel) for constant, of in CONSTANTS.items()}
        assert dict(zip(CONSTANTS, found[name], strict=True)) == expected, name
    for name, kernel in TEAMS.items():
        constants = OF_SLICES | OF_A_WAY[kernel.way]
        expected = {constant: of(kernel) for constant, of in constants.items()}
        rooms = [of(kernel, H, n) for H, n in ROOMS + OF_GRIDS for of in OF_ROOMS.values()]
        values = found[name]
        assert dict(zip(constants, values, strict=False)) == expected, name
        assert values[len(constants) :] == rooms, name


@pytest.mark.parametrize("kernel", TEAMS.values(), ids=TEAMS)
def test_every_slice_of_weights_stands_in_one_place(kernel):
    """A CTA has all rows of w_hh of its units, of a wave those of w_ih too, and no others."""
    size = 2 if "16" in kernel.type else 4
    gates, units = GATES[kernel.cell], 16 if kernel.kind == "grid" else 32
    if kernel.regime == "wave":
        gates *= 2
    assert kernel.threads == 256 and kernel.units == units
    for H in (1, 33, 128, 300, 512):
        held, rest = kernel.weights(H)
        assert held + rest >= gates * units * H * size
        # what is walked beyond them are zeros, of less than a block of the longest
        slices = -(-H // units) * units
        beyond = 8 * 64 // size if kernel.way == "forward" else 16 * 16
        assert held + rest <= gates * units * (slices + beyond) * size + 64 * 16 * 16 * 8
        assert held <= 128 * 4 * 256 and (rest == 0 or held > 0)
        # of packets a page of 32 elements of h has five or eight; of sums each lane has one
        if kernel.regime == "grid":
            team, way, of_tile = -(-H // units), kernel.way, units // 16
            each = {2: 5, 4: 8}[size] if way == "forward" else 32 * of_tile * team
            for B, pages, columns in ((1, 1, 1), (3, 2, 1), (8, 4, 1), (9, 5, 2)):
                count = (B if of_tile > 1 else pages) if way == "forward" else columns
                assert kernel.packets(H, B) == 2 * 16 * team * each * count
        else:
            assert kernel.packets(H, 8) == 0
    assert kernel.registers == 255


# Plans over the grid of sizes


def check(found, task, device, type, itemsize):
    """What holds for every plan."""
    cell, B, T, R, H = task.cell, task.B, task.T, task.R, task.H
    pointwise = cell in POINTWISE_CELLS
    assert found.regime == "cta" and found.type == type and found.H == H
    smaller = [n for n in (32, 64, 128, 192, 256) if f"forward_{cell}_{type}_{n}" in KERNELS]
    assert found.HC == (64 if pointwise else min(n for n in smaller if n >= H))
    gates, kept, extras, reads_h, states, apart = ROWS[cell]
    x, y, z = found.grid
    rows = found.rows
    assert rows * x >= B > rows * (x - 1) and y == R
    assert z * found.HC >= H > (z - 1) * found.HC
    # four sequences where each of those CTAs has a multiprocessor of its own
    assert (rows == 4) == (-(-B // 4) * y * z <= device.multiprocessors) and rows in (4, 8)
    save = task.training and task.memory == "full"
    written = {
        "forward": (1 + save * (kept + extras)) * H * itemsize
        + states * 4 * H * (save or task.trajectory),
        "backward": (gates + apart) * H * itemsize,
    }
    read = {
        "forward": gates * H * itemsize,
        "backward": (kept + extras + 1 + reads_h) * H * itemsize
        + states * 4 * H * (1 + task.trajectory),
    }
    for way, walk in (("forward", found.forward), ("backward", found.backward)):
        if walk is None:
            assert way == "backward" and not task.training
            continue
        assert KERNELS[f"{way}_{cell}_{type}_{found.HC}"] is walk.kernel
        assert walk.shared <= device.shared_memory
        fit = walk.per_multiprocessor
        assert fit >= 1 and fit * (walk.shared + 1024) <= device.shared_memory_total
        assert fit * found.threads <= device.threads and fit <= device.ctas
        assert fit * found.threads * walk.registers <= device.registers
        parts = 2 if type == "float32" else 1
        # a number that is two operands is both in registers, itself in shared memory
        weights = padded(way, cell, found.HC, itemsize) * itemsize
        assert walk.weights_in_registers // parts + walk.weights_in_shared == weights
        assert walk.weights_in_registers == walk.kernel.weight_registers * 4 * found.threads
        assert walk.waves == -(-x * y * z // (fit * device.multiprocessors))
        assert (walk.row_read, walk.row_written) == (read[way] + task.reset, written[way])
        assert walk.row_flops == 2 * GATES[cell] * H * H
        # 4096 operations an mma of 16 bits, half in TF32, of which there are 3 in float32
        products = 3 if type == "float32" else 1
        flops = 2 * padded(way, cell, found.HC, itemsize) * 8 * products
        assert walk.cost.mmas * (4096 if itemsize == 2 else 2048) == flops
        assert walk.cost.shared_read >= walk.weights_in_shared
        assert 0 < walk.alone <= walk.step
        assert walk.total == pytest.approx(cuda_time.LAUNCH + T * walk.step)


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
def test_every_plan_holds_what_it_promises(device):
    options = itertools.cycle(
        [
            {"training": True},
            {"R": 2},
            {"training": True, "memory": "lean", "R": 2},
            {"trajectory": True, "reset": True},
            {"training": True, "trajectory": True},
        ]
    )
    batches, lengths = itertools.cycle((1, 8, 9, 32, 513)), itertools.cycle((1, 32, 2048))
    planned = by_teams = 0
    for cell, (dtype, precision), H in itertools.product(ROWS, TYPES, SIZES):
        type, itemsize = TYPES[dtype, precision]
        if cell in POINTWISE_CELLS and type == "tf32":
            type = "float32"
        for B in (next(batches), next(batches)):
            task = problem(cell, dtype, next(lengths), B, H, **next(options))
            found = plan(task, device, precision)
            if isinstance(found, Plan):
                planned += 1
                check(found, task, device, type, itemsize)
            elif isinstance(found, cuda_teams.TeamPlan):
                by_teams += 1
                check_teams(found, task, device, type, itemsize)
            else:
                refused(found, task, device, precision)
    assert planned > 800 and by_teams > 200


def check_teams(found, task, device, type, itemsize):
    """What holds for every plan of teams."""
    cell, B, T, R, H = task.cell, task.B, task.T, task.R, task.H
    assert cell in PRODUCT_CELLS and found.type == type != "float32" and found.H == H
    most = cuda_plan.largest(cell, type, task.training, device)
    assert H > most
    assert H <= (512 if found.regime == "cluster" else 4096 // itemsize)
    for way, walk in (("forward", found.forward), ("backward", found.backward)):
        teams = walk.teams
        kind = found.regime
        if kind == "grid" and teams.kernel.wide:
            kind = "wide"
            assert H <= 1024 and itemsize == 2
        assert teams.kernel is TEAMS[f"{way}_{cell}_{type}_{kind}"]
        team = -(-H // (16 if kind == "grid" else 32))
        assert teams.team == team and teams.H == H
        assert teams.sequences * R * H < 2**31
        assert teams.shared == teams.kernel.shared(H, teams.sequences) <= device.shared_memory
        assert teams.at_once >= 1
        if found.regime == "cluster":
            assert device.capability >= (9, 0) and team <= 16 and teams.cluster == team
            assert not teams.together and len(teams.launches) == 1
        else:
            assert device.cooperative and not device.mps
            assert teams.together and teams.cluster == 1
        covered = []
        for one in teams.launches:
            if found.regime == "grid":
                assert team * one.tiles * one.recurrences <= device.multiprocessors
            assert one.first % teams.sequences == 0 and one.tiles >= 1 <= one.recurrences
            tiles = range(one.tiles)
            covered += [
                (r, b)
                for r in range(one.start, one.start + one.recurrences)
                for tile in tiles
                for b in range(
                    one.first + tile * teams.sequences,
                    min(B, one.first + (tile + 1) * teams.sequences),
                )
            ]
            # each team has a sequence, unless there are none
            assert B == 0 or one.first + (one.tiles - 1) * teams.sequences < B
        assert len(covered) == B * R and set(covered) == set(itertools.product(range(R), range(B)))
        assert teams.tiles == -(-max(B, 1) // teams.sequences)
        assert all(value > 0 for value in teams.times)
        assert walk.step >= teams.step
        assert walk.total == pytest.approx(len(teams.launches) * cuda_time.LAUNCH + T * walk.step)
    printed = str(found)
    team = found.forward.teams.team
    assert f"regime {found.regime}: teams of {team} CTAs" in printed and device.name in printed
    for walk in (found.forward, found.backward):
        assert f"{walk.teams.kernel.name}: {walk.teams.tiles} x {R} teams" in printed


def refused(words, task, device, precision):
    """A size too large: the text has it, and what no team holds has a reason for each regime."""
    assert task.cell in PRODUCT_CELLS
    assert f"H={task.H}" in words and "choose triton" in words and device.name in words
    most = int(words.split("up to H=")[1].split()[0])
    assert 32 <= most < task.H
    type = cuda_plan.type_of(task, precision)
    reasons = [cuda_teams.declined(task.cell, type, r, task.H, device) for r in TEAMS_OF]
    assert None not in reasons
    if type != "float32" and "shared memory, and a CTA" not in words.split(";")[0]:
        assert all(reason in words for reason in reasons)
    assert isinstance(plan(task._replace(H=most), device, precision), Plan)
    if type == "float32":
        assert isinstance(plan(task._replace(H=most + 1), device, precision), str)


#: The regimes of teams.
TEAMS_OF = ("cluster", "grid")


def totals(task, device, precision, **sizes):
    """Modelled us of CTAs alone, forward and backward, at each value of one size; infinite where
    they hold no such layer."""
    ((name, values),) = sizes.items()
    found = [plan(task._replace(**{name: value}), device, precision) for value in values]
    walks = [(p.forward, p.backward) if isinstance(p, Plan) else (None, None) for p in found]
    return [
        [float("inf") if w is None else w.total for w in way] for way in zip(*walks, strict=True)
    ]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name)
@pytest.mark.parametrize("cell", ROWS)
def test_more_work_never_takes_less_time(device, cell):
    for (dtype, precision), training in itertools.product(TYPES, (False, True)):
        task = problem(cell, dtype, 100, 9, 32, training=training)
        few = 4 * device.multiprocessors  # one more, and a CTA has 8 sequences instead of 4
        batches = sorted((0, 1, 4, 5, 8, 64, 65, few, few + 1, 5000, 50000, 200000))
        found = [
            *totals(task, device, precision, B=batches),
            *totals(task, device, precision, T=(1, 2, 100, 100000)),
            *totals(task._replace(B=20000), device, precision, R=(1, 2, 3)),
        ]
        for times in found:
            assert times == sorted(times) and times[0] < times[-1] < float("inf")
        sizes = (1, 16, 32, 33, 64, 65, 128, 192, 256)
        for times in totals(task, device, precision, H=sizes):
            # from 64 to 65 a thread has two units, not one: there backward of the plainest cells
            # is 1% cheaper, as two warps no longer exchange their sums
            assert times[5] > 0.985 * times[4]
            assert times[:5] == sorted(times[:5]) and times[5:] == sorted(times[5:])
            assert times[4] <= times[6]
        # more CTAs than are there at once: a wave that is hardly filled may cost a little more
        for B in (1000, 20000):
            for times in totals(task._replace(B=B), device, precision, H=sizes):
                assert all(later >= 0.85 * t for t, later in itertools.pairwise(times))


@pytest.mark.parametrize("regime", TEAMS_OF)
@pytest.mark.parametrize("cell", PRODUCT_CELLS)
def test_more_work_takes_teams_hardly_less_time(cell, regime):
    """How sequences are shared out may be luckier with a few more."""
    for dtype, precision in ((torch.bfloat16, "ieee"), (torch.float32, "tf32")):
        task = problem(cell, dtype, 100, 9, 300, training=True)
        for name, values in (
            ("T", (1, 2, 100, 100000)),
            ("B", (1, 4, 8, 9, 33, 64, 500, 513, 5000)),
            ("R", (1, 2, 3, 20)),
            # a peephole LSTM's clusters hold less in 32 bits
            ("H", (1, 32, 100, 129, 256, 384 if cell == "peephole_lstm" else 512)),
        ):
            asked = [task._replace(**{name: value}) for value in values]
            found = [plan(one, H100, precision, regime=regime) for one in asked]
            for way in ("forward", "backward"):
                times = [getattr(one, way).total for one in found]
                assert times[0] < times[-1]
                assert all(later >= 0.8 * t for t, later in itertools.pairwise(times)), name


def test_which_regime():
    """One CTA where it holds a layer, however slow that is; else what is modelled to be faster."""

    def regime(H, B=8, device=H100, **options):
        return plan(problem(H=H, B=B, **options), device).regime

    assert [regime(H) for H in (128, 129, 512, 513, 2048)] == [
        *("cta", "cluster", "cluster", "grid", "grid")
    ]
    assert regime(129, device=A100) == regime(384, device=LAPTOP) == "grid"
    assert regime(512, device=dataclasses.replace(H100, cooperative=False)) == "cluster"
    assert regime(768, device=LAPTOP) == regime(384, device=LAPTOP, cell="peephole_lstm") == "grid"
    for most, cell in ((768, "lstm"), (384, "peephole_lstm")):  # one of them has wide slices
        assert isinstance(plan(problem(H=most + 1, cell=cell), LAPTOP), str)
    tasks = [problem(cell="gru", H=H, B=B) for H in (256, 400, 512) for B in (1, 64, 512)]
    for task in tasks:
        both = [plan(task, H100, regime=r) for r in TEAMS_OF]
        sums = [p.forward.teams.step + p.backward.teams.step for p in both]
        assert plan(task, H100) == both[sums.index(min(sums))]


@pytest.mark.parametrize(
    "change",
    [
        {"multiprocessors": 19},
        {"multiprocessors": 40, "shared_memory": 60000},
        {"clusters": (0, 132, 60, 40, 30, 24, 20, 16, 14, 3, 3, 2, 2, 1, 1, 1, 1)},
        {"mps": True},
        {"cooperative": False},
        {"capability": (8, 0)},
        {"shared_memory": 99 << 10, "shared_memory_total": 100 << 10},
    ],
    ids=str,
)
def test_teams_on_made_up_devices(change):
    device = dataclasses.replace(H100, **change)
    planned = 0
    batches = itertools.cycle((1, 8, 9, 100, 1025))
    sizes = (129, 300, 512, 700, 2000)
    for cell, (dtype, precision), H in itertools.product(PRODUCT_CELLS, TYPES, sizes):
        type, itemsize = TYPES[dtype, precision]
        task = problem(cell, dtype, 32, next(batches), H, R=next(batches) % 3 + 1, training=True)
        found = plan(task, device, precision)
        if isinstance(found, cuda_teams.TeamPlan):
            planned += 1
            check_teams(found, task, device, type, itemsize)
        elif isinstance(found, str):
            refused(found, task, device, precision)
    assert planned > 20


@pytest.mark.parametrize("regime", TEAMS_OF)
def test_a_plan_of_teams_answers_for_what_is_known(regime):
    task = problem(H=300, training=True)
    traced = plan(task._replace(T=None, B=None), H100, regime=regime)
    known = plan(task, H100, regime=regime)
    assert traced.forward.total is None and traced.forward.step == known.forward.step
    assert "a step and sequence: " in str(traced) and "us in all" not in str(traced)
    assert "us in all, without the GEMMs" in str(known)
    teams = plan(task._replace(B=0), H100, regime=regime).forward.teams
    assert teams.tiles == 1 and teams.sequences == 1
    assert known == plan(task, dataclasses.replace(H100), regime=regime)
    assert plan(problem("indrnn", H=300), H100, regime=regime) == (
        f"cuda's {regime}s have no kernel of indrnn in bfloat16"
    )


def test_what_explain_prints_of_teams():
    printed = str(plan(problem(B=32, H=300, T=512, R=2, training=True), H100, regime="cluster"))
    assert "regime cluster: teams of 10 CTAs, each a cluster, own up to" in printed
    assert "H=300 in slices of 32, bfloat16, sm_90a on NVIDIA H100" in printed
    # 128 rows of w_hh, of 320 units, whose 640 bytes are rounded up to 1024
    assert "of a CTA: weights 131,072 bytes in registers, 0 in shared memory" in printed
    assert printed.count("modelled, not measured: ") == 2 and printed.count("in 1 launch,") == 2
    printed = str(plan(problem(B=2, H=1000, R=1), H100, regime="grid"))
    assert "regime grid: teams of 63 CTAs, each part of a grid" in printed
    assert "backward_lstm_bfloat16_grid: " in printed and "bytes of sums" in printed


def test_a_teams_elements_are_counted_by_an_int():
    kernel = TEAMS["forward_lstm_bfloat16_cluster"]
    for R, most in ((1, 64), (500_000, 16), (1_000_000, 8)):
        found = cuda_teams.arrange(kernel, 256, 64, R, H100).sequences
        assert 1 <= found <= most and found * R * 256 < 2**31


def test_large_batches_have_slices_of_twice_the_width():
    """Of the cells and types that have them, and layers that fit."""

    def kinds(cell, B, H, precision="ieee", device=H100, **options):
        asked = problem(cell, B=B, H=H, training=True, **options)
        found = plan(asked, device, precision, regime="grid")
        return found.forward.teams.kernel.kind, found.backward.teams.kernel.kind

    for H in (768, 1024):
        assert kinds("lstm", 1, H) == kinds("lstm", 16, H) == ("grid", "grid")
        assert kinds("lstm", 64, H) == kinds("gru", 64, H) == ("wide", "wide")
        assert kinds("peephole_lstm", 64, H) == ("grid", "grid")
        assert kinds("lstm", 64, H, "tf32", dtype=torch.float32) == ("grid", "grid")
    assert kinds("lstm", 64, 1025) == kinds("lstm", 64, 2048) == ("grid", "grid")
    # an A100 has less shared memory: no room for h of all units beside half of the weights
    assert kinds("lstm", 64, 1024, device=A100) == ("grid", "wide")
    # few multiprocessors: no team of 48 CTAs, but one of 24
    assert kinds("lstm", 1, 384, device=LAPTOP) == ("grid", "grid")
    assert kinds("gru", 1, 768, device=LAPTOP) == ("wide", "wide")
    for cell, H in (("peephole_lstm", 400), ("gru", 784)):
        reason = cuda_teams.declined(cell, "bfloat16", "grid", H, LAPTOP)
        assert f"a grid of {H // 16} CTAs" in reason and "24 multiprocessors" in reason


def test_a_plan_is_frozen_and_one_value():
    found = plan(problem(training=True), H100)
    again = plan(problem(training=True), dataclasses.replace(H100))
    assert found == again and hash(found) == hash(again) and len({found, again}) == 1
    assert found != plan(problem(training=True), H200)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.HC = 32


def test_it_answers_for_what_is_known():
    """While a graph is traced neither T nor B is, under torch.compile not even H."""
    traced = plan(problem(T=None, B=None, training=True), H100)
    known = plan(problem(B=600, training=True), H100)  # 75 CTAs: 8 sequences each
    assert (traced.rows, known.rows) == (8, 8)
    assert traced.grid is None and traced.HC == known.HC == 64
    for way in ("forward", "backward"):
        walk, full = getattr(traced, way), getattr(known, way)
        assert walk.step is None and walk.total is None and walk.waves is None
        assert dataclasses.replace(walk, step=full.step, total=full.total, waves=1) == full
    assert plan(problem(T=None, B=600, training=True), H100).forward.step == known.forward.step
    assert plan(problem(T=None), H100).forward.total is None
    unsized = problem(T=None, B=None, H=None)
    assert decline(unsized, H100) is None
    assert "H is not known" in plan(unsized, H100)
    assert "float64" in decline(unsized._replace(dtype=torch.float64), H100)


def test_no_sequences():
    found = plan(problem(B=0), H100)
    assert found.grid == (0, 1, 1) and found.forward.waves == 0 and found.forward.step == 0


def test_registers_as_the_compiler_counts_them():
    name = "forward_lstm_bfloat16_32"
    task = problem(H=32)
    assert plan(task, H100).forward.per_multiprocessor == KERNELS[name].ctas == 4
    counted = plan(task, H100, registers={name: 100}).forward
    assert counted.registers == 100
    assert counted.per_multiprocessor == 65536 // (128 * 104)  # a warp's are given in 256


def test_it_asks_no_gpu():
    for module in (cuda_kernels, cuda_plan, cuda_teams, cuda_time):
        tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
        names = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        assert not [n for n in names if n.startswith(("torch.cuda", "torch.backends", "os."))]


# What it declines


def needs(way):
    """Bytes of the LSTM's kernel at H = 128."""
    return KERNELS[f"{way}_lstm_bfloat16_128"].shared


#: With room for its forward alone, or for neither, and without teams.
SMALL = dataclasses.replace(H100, name="small", capability=(8, 0), cooperative=False)
FORWARD_ONLY = dataclasses.replace(SMALL, shared_memory=needs("backward") - 1)
NEITHER = dataclasses.replace(SMALL, shared_memory=needs("forward") - 1)
NO_TEAMS = (
    "small has no clusters, which need compute capability 9.0; small starts no grid all at once; "
    "choose triton"
)
ON_H100 = f"on {H100.name}"


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"H": 2049},
            f"H=2049: one CTA holds up to H=128 in bfloat16 of lstm {ON_H100}; H=2049: a cluster "
            "holds up to H=512 in bfloat16; H=2049: a grid holds up to H=2048 in bfloat16; "
            "choose triton",
        ),
        (
            {"H": 600, "cell": "rnn_tanh", "device": dataclasses.replace(H100, mps=True)},
            f"H=600: one CTA holds up to H=256 in bfloat16 of rnn_tanh {ON_H100}; H=600: a cluster "
            f"holds up to H=512 in bfloat16; {H100.name} is shared by processes through MPS, where "
            "CTAs of a grid may wait for others that have no place; choose triton",
        ),
        (
            {"H": 400, "cell": "peephole_lstm", "device": LAPTOP},
            "H=400: one CTA holds up to H=128 in bfloat16 of peephole_lstm on "
            f"{LAPTOP.name}; {LAPTOP.name} has no clusters, which need compute capability 9.0; "
            f"H=400: a grid of 25 CTAs that wait for one another, and {LAPTOP.name} has 24 "
            "multiprocessors; choose triton",
        ),
        (
            {"H": 300, "device": dataclasses.replace(H100, clusters=(0,) + 8 * (9,), mps=True)},
            f"H=300: one CTA holds up to H=128 in bfloat16 of lstm {ON_H100}; H=300: {H100.name} "
            f"has no room for a cluster of 10 CTAs; {H100.name} is shared by processes through "
            "MPS, where CTAs of a grid may wait for others that have no place; choose triton",
        ),
        (
            {"H": 300, "device": dataclasses.replace(H100, shared_memory=20000)},
            f"H=300: one CTA holds up to H=32 in bfloat16 of lstm {ON_H100}; H=300 in bfloat16 of "
            f"lstm: forward takes {TEAMS['forward_lstm_bfloat16_cluster'].shared(300, 8):,} bytes "
            f"of shared memory in a cluster, and a CTA of {H100.name} has 20,000; H=300 in "
            "bfloat16 of lstm: forward takes "
            f"{TEAMS['forward_lstm_bfloat16_grid'].shared(300, 8):,} bytes of shared memory in a "
            f"grid, and a CTA of {H100.name} has 20,000; choose triton",
        ),
        (
            {"H": 100, "dtype": torch.float32, "cell": "rnn_tanh"},
            f"H=100: one CTA holds up to H=64 in float32 of rnn_tanh {ON_H100}; clusters and grids "
            "multiply in TF32 or 16 bits; allow TF32 (torch.backends.cudnn.rnn.fp32_precision = "
            "'tf32'), or choose triton",
        ),
        (
            {"device": FORWARD_ONLY, "H": 100, "training": True},
            f"H=100 in bfloat16 of lstm: backward takes {needs('backward'):,} bytes of shared "
            f"memory, and a CTA of small has {needs('backward') - 1:,}; up to H=64 fits in "
            "training; choose triton",
        ),
        (
            {"device": FORWARD_ONLY, "H": 200, "training": True},
            f"H=200: one CTA holds up to H=64 in bfloat16 of lstm in training on small; {NO_TEAMS}",
        ),
        (
            {"device": FORWARD_ONLY, "H": 200},
            f"H=200: one CTA holds up to H=128 in bfloat16 of lstm on small; {NO_TEAMS}",
        ),
        (
            {"device": NEITHER, "H": 65},
            f"H=65 in bfloat16 of lstm: forward takes {needs('forward'):,} bytes of shared "
            f"memory, and a CTA of small has {needs('forward') - 1:,}; up to H=64 fits; "
            "choose triton",
        ),
        (
            {"device": dataclasses.replace(SMALL, name="tiny", shared_memory=4096), "H": 128},
            f"H=128 in bfloat16 of lstm: forward takes {needs('forward'):,} bytes of shared "
            "memory, and a CTA of tiny has 4,096; no H fits; choose triton",
        ),
        (
            {"device": dataclasses.replace(LAPTOP, capability=(7, 5))},
            "cuda's kernels need compute capability 8.0, and NVIDIA GeForce RTX 4060 Laptop GPU "
            "has 7.5; choose triton or torch",
        ),
        (
            {"dtype": torch.float64},
            "cuda's kernels take bfloat16, float16, float32, not float64; choose triton, whose "
            "kernels take float64 too",
        ),
        (
            {"cell": "gru_reset_before"},
            "gru_reset_before has 2 phases, and cuda's kernels run cells of one; choose triton",
        ),
        ({"projected": True, "P": 16}, "cuda's kernels project no h (proj_size=16); choose triton"),
        ({"zoneout": (0.1, 0.1)}, "cuda's kernels have no zoneout"),
        (
            {"heads": 4},
            "cuda's kernels take one matrix w_hh, not 4 blocks on its diagonal; choose eager",
        ),
        (
            {"input_product": True},
            "cuda makes the input product itself, and takes none made already; choose eager",
        ),
        (
            {"R": 70000},
            "70000 recurrences in one call: a launch holds up to 65535; choose eager",
        ),
        (
            {"cell": "indrnn", "H": 5000000},
            "H=5000000: a launch holds up to H=4194240 of indrnn; choose triton",
        ),
        (
            {"B": 1 << 40},
            "B=1099511627776: a launch holds up to 17179869176 sequences; split the batch",
        ),
    ],
)
def test_declines(change, words):
    device = change.get("device", H100)
    task = problem()._replace(**{k: v for k, v in change.items() if k != "device"})
    assert plan(task, device) == decline(task, device) == words


def test_inference_where_backward_has_no_room():
    found = plan(problem(H=128), FORWARD_ONLY)
    assert found.HC == 128 and found.backward is None
    assert "forward_lstm" in str(found) and "backward_lstm" not in str(found)
    assert plan(problem(H=64, training=True), FORWARD_ONLY).backward is not None


def test_cells_of_ones_own(monkeypatch):
    mine = dataclasses.replace(CELLS["lstm"], name="mine")
    monkeypatch.setitem(CELLS, "mine", mine)
    words = "cuda's binary has no kernel of mine, a cell of your own; choose triton"
    assert plan(problem("mine"), H100) == words


# Devices


@pytest.mark.parametrize(
    "capability, found",
    [
        ((7, 5), None),
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((12, 0), "PTX of compute_100"),
    ],
)
def test_what_a_device_runs(capability, found):
    assert cuda_plan.binary(capability) == found


def test_a_device_from_what_torch_says_of_it():
    said = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3",
        **{"major": 9, "minor": 0, "multi_processor_count": 132},
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        **{"clock_rate": 1980000, "memory_clock_rate": 2619000, "memory_bus_width": 5120},
    )
    found = cuda_plan.device_of(said)
    assert found.bandwidth == pytest.approx(H100.bandwidth, rel=1e-3)
    assert dataclasses.replace(found, bandwidth=H100.bandwidth) == H100
    said.major, said.minor, said.name = 8, 9, LAPTOP.name
    assert cuda_plan.device_of(said).mma_clocks == LAPTOP.mma_clocks
    assert cuda_plan.device_of(said).ctas == LAPTOP.ctas


# The model of the time


def test_the_constants_are_those_of_the_table():
    table = Path(__file__).parents[1] / "bench/results/nvidia-h100-80gb-hbm3/latency.csv"
    if not table.is_file():
        pytest.skip("no bench/ beside the tests")
    lines = [line for line in table.read_text().splitlines() if not line.startswith("#")]
    rows = {(r["name"], int(r["bytes"])): float(r["ns"] or "nan") for r in csv.DictReader(lines)}
    clock = H100.clock

    def near(clocks, ns, off=0.03):
        assert clocks / clock == pytest.approx(ns, rel=off)

    near(cuda_time.MMA_LATENCY, rows["mma-registers-1", 2048])
    near(128 * H100.mma_clocks, rows["mma-registers-16", 65536])
    for threads in (128, 256, 512, 1024):
        clocks = cuda_time.BARRIER + cuda_time.BARRIER_THREAD * threads
        near(clocks, rows["block-barrier", threads])
    near(cuda_time.WORD_LATENCY[1], rows["tanh-fast-divide", 0])
    near(cuda_time.WORD_LATENCY[2], rows["tanh-exp", 0])
    assert cuda_time.LAUNCH * 1000 == pytest.approx(rows["launch-stream", 0], rel=0.01)


@pytest.mark.parametrize(
    "cell, forward, backward",
    [
        ("rnn_tanh", (1, 1), (0, 0)),
        ("rnn_relu", (0, 0), (0, 0)),
        ("lstm", (5, 2), (1, 1)),
        ("peephole_lstm", (5, 2), (1, 1)),
        ("coupled_lstm", (4, 2), (1, 1)),
        ("gru", (3, 2), (0, 0)),
        ("indrnn_tanh", (1, 1), (0, 0)),
        ("leaky_integrator", (0, 0), (0, 0)),
    ],
)
def test_words_of_a_text(cell, forward, backward):
    assert cuda_time.words(CELLS[cell], "forward") == forward
    assert cuda_time.words(CELLS[cell], "backward") == backward


def test_a_step_by_hand():
    """LSTM, H = 128, bfloat16, one sequence on an H100."""
    walk = plan(problem(B=1, H=128, T=1000), H100).forward
    product, text, exchange, barrier, rest = walk.cost.times
    assert walk.cost.mmas == 4 * 128 * 128 // (16 * 16) == 256
    assert product == pytest.approx(256 * 2 / 1.98)  # longer than 8 in a chain: 33 * 8 / 1.98
    # one column: 5 words for 2 elements of a thread, of two MUFU, for which 8 warps wait 2 clocks
    # each; 4 of them start an instruction a clock
    assert text == pytest.approx((10 * 10 * 8 / 4 + 10 * 2 * 2 * 8) / 1.98)
    assert walk.cost.busy.exponentials == pytest.approx(5 * 128 * 4 * 2 / 16 / 1.98)
    assert rest == pytest.approx((110 + 128 * 2 / 50) / 1.98)  # y
    parts = product, text, exchange, barrier, rest
    assert walk.step == walk.alone == pytest.approx(sum(parts) / 1000)
    assert walk.total == pytest.approx(3.7 + 1000 * walk.step)
    assert walk.bound == "the chain of a step"
    # a CTA with eight sequences has them in both columns
    both = plan(problem(B=600, H=128, T=1000), H100).forward
    assert both.cost.times.text == pytest.approx(2 * text)
    assert both.cost.words == 2 * walk.cost.words == 5 * 128 * 8


@pytest.mark.parametrize(
    "name, counted",
    [
        ("forward_lstm_float16_32", 306),
        ("forward_lstm_float16_64", 311),
        ("forward_lstm_float16_128", 482),
        ("forward_lstm_tf32_32", 301),
        ("forward_lstm_tf32_64", 310),
        ("forward_lstm_float32_64", 802),
        ("backward_lstm_float16_32", 539),
        ("backward_lstm_float16_64", 614),
        ("backward_lstm_float16_128", 868),
        ("backward_lstm_tf32_32", 576),
        ("backward_lstm_tf32_64", 567),
        ("backward_lstm_float32_64", 954),
        ("forward_gru_float16_32", 251),
        ("forward_gru_float16_64", 252),
        ("forward_gru_float16_128", 369),
        ("forward_gru_tf32_32", 253),
        ("forward_gru_tf32_64", 271),
        ("forward_gru_tf32_128", 376),
        ("forward_gru_float32_64", 686),
        ("backward_gru_float16_32", 428),
        ("backward_gru_float16_64", 502),
        ("backward_gru_float16_128", 672),
        ("backward_gru_tf32_32", 439),
        ("backward_gru_tf32_64", 518),
        ("backward_gru_tf32_128", 727),
        ("backward_gru_float32_64", 697),
        ("forward_rnn_tanh_float16_32", 136),
        ("forward_rnn_tanh_float16_64", 144),
        ("forward_rnn_tanh_float16_128", 195),
        ("forward_rnn_tanh_tf32_32", 150),
        ("forward_rnn_tanh_tf32_64", 156),
        ("forward_rnn_tanh_tf32_128", 213),
        ("forward_rnn_tanh_float32_64", 321),
        ("backward_rnn_tanh_float16_32", 226),
        ("backward_rnn_tanh_float16_64", 223),
        ("backward_rnn_tanh_float16_128", 358),
        ("backward_rnn_tanh_tf32_32", 220),
        ("backward_rnn_tanh_tf32_64", 227),
        ("backward_rnn_tanh_tf32_128", 322),
        ("backward_rnn_tanh_float32_64", 372),
    ],
)
def test_instructions_are_near_those_of_the_compiler(name, counted):
    """Of the loop over time on sm_90a: nvcc 13.0, sequences of one length. It has the text twice,
    for one column and for two. Counted before backward lost some of its integer instructions."""
    kernel = KERNELS[name]
    beside, text = cuda_time.instructions(kernel, 3)
    products = kernel.fragments * (3 if kernel.type == "float32" else 1)
    assert beside + text + products == pytest.approx(counted, rel=0.15)


def test_a_crowd_is_bound_by_a_unit():
    found = plan(problem(H=32, B=8 * 132 * 4, training=True), H100).forward
    assert found.waves == 1 and found.per_multiprocessor == 4
    assert found.step == pytest.approx(
        max(4 * max(found.cost.busy), 132 * 32 * (found.row_read + found.row_written) / 3350) / 1000
    )
    assert found.bound == "the GPU's memory"


def test_what_explain_prints():
    printed = str(plan(problem(B=32, H=100, T=512, R=2, training=True), H100))
    assert "regime cta: one CTA owns 4 sequences" in printed and "H=100 in CTAs of 128" in printed
    assert "bfloat16_128: 8 x 2 x 1 CTAs of 256 threads with 2 hidden units each" in printed
    assert "backward_lstm_bfloat16_128" in printed
    assert "weights 131,072 bytes in registers, 0 in shared memory" in printed
    assert "shared memory 55,168 of 232,448 bytes, 6 steps in its ring" in printed
    assert f"{800 * 64:,} bytes read, {(800 + 200 + 400) * 64:,} written, 5,120,000 FLOP" in printed
    assert printed.count("modelled, not measured: ") == 2
    crowded = str(plan(problem(B=600), H100))
    assert "one CTA owns 8 sequences" in crowded and "75 x 1 x 1 CTAs" in crowded
    traced = str(plan(problem(B=None, T=None), H100))
    assert "a step and sequence: 512 bytes read" in traced and "us in all" not in traced


#: us of whole forward calls of T = 512 in a CUDA graph on an H200, in bfloat16, by (cell, H): at
#: each of BATCHES.
BATCHES = (1, 8, 128, 512)
MEASURED = {
    ("lstm", 32): (208.8, 213.6, 215.7, 276.5),
    ("lstm", 64): (226.7, 230.1, 243.9, 285.6),
    ("lstm", 128): (367.7, 379.0, 405.7, 479.4),
    ("gru", 32): (187.1, 183.5, 208.6, 232.4),
    ("gru", 64): (210.4, 205.8, 242.0, 261.8),
    ("gru", 128): (276.5, 274.7, 303.8, 388.1),
}


def of_measured():
    """(cell, H) -> at each of BATCHES, us a step: measured, modelled."""
    found = {}
    for (cell, H), calls in MEASURED.items():
        tasks = [problem(cell, T=512, B=B, H=H) for B in BATCHES]
        steps = [plan(task, H200).forward.step for task in tasks]
        found[cell, H] = [(us / 512, step) for us, step in zip(calls, steps, strict=True)]
    return found


def test_the_model_is_near_what_an_h200_measured():
    """The calls have GEMMs, which the model has not: few with few sequences."""
    found = of_measured().values()
    few = sorted(abs(step / us - 1) for points in found for us, step in points[:2])
    assert few[len(few) // 2] < 0.15 and few[-1] < 0.22
    assert all(0.6 < step / us < 1 for points in found for us, step in points)


def test_the_page_has_what_the_model_says():
    page = Path(__file__).parents[1] / "docs/design.md"
    if not page.is_file():
        pytest.skip("no docs/ beside the tests")
    rows = []
    for cell in ("lstm", "gru", "rnn_tanh"):
        for way in ("forward", "backward"):
            steps = [
                getattr(plan(problem(cell, B=1, H=H, training=True), H100), way).step
                for H in (32, 64, 128)
            ]
            rows.append(f"| {cell}, {way} | {' | '.join(f'{step:.2f}' for step in steps)} |")
    measured = [
        f"| {cell} | {H} | {' | '.join(f'{us:.2f}, {step:.2f}' for us, step in points)} |"
        for (cell, H), points in of_measured().items()
    ]
    teams = []
    for H in (256, 512, 768, 1024, 2048):
        found = [plan(problem(B=B, H=H, T=1024, training=True), H100) for B in (1, 16, 64)]
        steps = [f"{p.forward.step:.2f}, {p.backward.step:.2f}" for p in found]
        teams.append(f"| {H}, {found[0].regime} | {' | '.join(steps)} |")
    for table in ("\n".join(rows), "\n".join(measured), "\n".join(teams)):
        assert table in page.read_text(encoding="utf-8"), f"docs/design.md: write it anew\n{table}"
