"""Teams of CTAs that share a recurrence, without a GPU: clusters and grids, as ``cuda`` runs a
layer that no single CTA holds. Their kernels run as threads on tensors of the CPU
(tests/helpers/cuda_on_host.py), where what is handed on comes late at random.

Layers are small: a cluster's CTAs have 32 units each, a grid's 16, so that 33 to 70 are teams of
two or three, and of three to five.
"""

import dataclasses
import itertools
from contextlib import contextmanager

import cuda_on_host
import independent
import pytest
import tf32
import torch
from problems import KINKED, OF_FOUR_STEPS, against_the_independent, draw, full, gradients
from rules import check_all, same_bits

import fastseq
from fastseq.backends import choice, cuda_teams, faults, load
from fastseq.backends.contract import Problem
from fastseq.backends.cuda_kernels import H100, PRODUCT_CELLS, TEAMS, WAVE_CELLS

REGIMES = ("cluster", "grid")
TYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "tf32": torch.float32}
#: Made up: as many CTAs at once as the host has threads for.
DEVICE = dataclasses.replace(cuda_on_host.DEVICE, multiprocessors=24)
SPECIAL = {
    # several tiles of columns, the last of them with few
    "plain": {"B": 5, "H": 36},
    "B9": {"B": 9, "H": 40, "T": 2, "directions": 2},
    "B17": {"B": 17, "H": 33, "T": 2},
    "T1 B1 H1": {"T": 1, "B": 1, "H": 1, "I": 1, "seed": 3},
    "T1": {"T": 1, "B": 3, "H": 48},
    "H64": {"H": 64, "T": 3, "B": 3},  # whole slices, rows of whole vectors
    "H70": {"H": 70, "T": 3, "B": 2, "directions": 2},
    "ring": {"H": 35, "T": 11, "B": 2},  # goes round
    **{name: {"H": 34 + 2 * k, **given} for k, (name, given) in enumerate(OF_FOUR_STEPS.items())},
    "all at once B9": {
        "lengths": [4, 0, 2, 1, 4, 3, 2, 2, 1],
        "B": 9,
        "H": 37,
        "reset": True,
        "h_mask": True,
        "directions": 2,
    },
}
#: Zoneout is declined.
CASES = [name for name, options in SPECIAL.items() if "zoneout" not in options]
#: What an ordinary run takes in both regimes.
SHORT = ("ring", "H70", "all at once B9")


@pytest.fixture(scope="module")
def on_host():
    with cuda_on_host.use() as found:
        yield found


@pytest.fixture(autouse=True)
def cuda(monkeypatch, on_host):
    """The backend, on a device with room for teams; float32's products in TF32."""
    setting = torch.backends.cudnn.rnn
    monkeypatch.setattr(setting, "fp32_precision", "tf32")
    found = load("cuda")
    monkeypatch.setattr(found, "device_at_hand", lambda index=None: DEVICE)
    # a problem of the CPU does not know of TF32
    monkeypatch.setattr(found, "_precision", lambda tf32: "tf32")
    # what waits in vain fails within a minute
    monkeypatch.setattr(found, "_patience", {"cluster": 6000, "grid": 60000})
    cuda_on_host.forget()
    on_host.launched.clear()
    return found


def of_device(monkeypatch, **changed):
    device = dataclasses.replace(DEVICE, **changed)
    monkeypatch.setattr(load("cuda"), "device_at_hand", lambda index=None: device)
    cuda_on_host.forget()
    return device


def with_rounded_operands(W, v, b):
    product = tf32._Product.apply(v[None], W)[0]
    return product if b is None else product + b


@contextmanager
def walked_by(kind):
    """A regime, and of a grid's slices those of that width, whatever the model says."""

    def kernels_of(way, cell, type, regime, H):
        return [TEAMS[f"{way}_{cell}_{type}_{kind}"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_teams, "kernels_of", kernels_of)
        with load("cuda").larger_as("grid" if kind == "wide" else kind):
            yield


def compare(case, kind, what, **options):
    """Values and gradients by the rule. The measure of TF32 is the independent writing in float64,
    the operands of whose products are rounded."""
    with walked_by(kind):
        if case.x.dtype is not torch.float32:
            against_the_independent(case, "cuda", what, **options)
            return
        case.settle("cuda", **options)
        trajectory = options.get("trajectory", False)
        wide = case.to(torch.float64)

        def values():
            found = wide.independent(trajectory)
            return found | gradients(found, wide.leaves())

        exact = values()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(independent, "affine", with_rounded_operands)
            rounded = values()
        ours = case.run("cuda", **options)
        ours |= gradients(ours, case.leaves())
        if case.H == 1:  # of a single number the measure is chance
            for name, value in exact.items():
                assert torch.allclose(ours[name].double(), value, rtol=2**-9, atol=2**-12), name
            return
        check_all(ours, rounded, exact, torch.float32, what)


def launched(on_host, kind):
    """(way, grid) of the teams' launches; there are no other walks."""
    walks = [(n, grid) for n, grid, _ in on_host.launched if not n.startswith("previous")]
    assert walks and all(name.endswith(f"_{kind}") for name, _ in walks)
    return [(name.split("_")[0], grid) for name, grid in walks]


#: Whose cases an ordinary run takes: each library of a cell and regime takes seconds to compile.
ORDINARY = {
    "cluster": ("lstm", "gru", "rnn_relu"),
    "grid": ("lstm", "gru", "peephole_lstm"),
}
#: Two tiles of columns at once and one more; slices that are not whole; all that there is.
WIDE = (
    ("B9", "gru", "float16"),
    ("B17", "lstm", "bfloat16"),
    ("H70", "lstm", "bfloat16"),
    ("all at once B9", "lstm", "bfloat16"),
)


def in_turn():
    """All cells, cases and regimes, in TF32 and in one of the types of 16 bits, which take turns
    (one kernel, but for products and rounding); wide slices with one of their cells a case. An
    ordinary run takes each case in one regime, the short ones in both, of some cells and all types.
    """
    found = []
    for r, regime in enumerate(REGIMES):
        for place, special in enumerate(CASES):
            turns = ORDINARY[regime]
            for c, cell in enumerate(PRODUCT_CELLS):
                for turn, type in enumerate(TYPES):
                    ordinary = special in SHORT or place % len(REGIMES) == r
                    ordinary = ordinary and turns[(place + r) % len(turns)] == cell
                    ordinary = ordinary and (place + place // len(turns) + r) % 3 == turn
                    if not ordinary and turn == (place + c + r) % 2:
                        continue
                    name = f"{regime}-{cell}-{special}-{type}"
                    marks = () if ordinary else full
                    found.append(pytest.param(regime, cell, special, type, marks=marks, id=name))
    of_wide = list(itertools.product(WAVE_CELLS, ("bfloat16", "float16")))
    for place, special in enumerate(CASES):
        for turn, (cell, type) in enumerate(of_wide):
            ordinary = (special, cell, type) in WIDE
            if not ordinary and turn != place % len(of_wide):
                continue
            name = f"wide-{cell}-{special}-{type}"
            marks = () if ordinary else full
            found.append(pytest.param("wide", cell, special, type, marks=marks, id=name))
    return found


@pytest.mark.parametrize("regime, walked, special, type", in_turn())
def test_against_the_independent(regime, walked, special, type, monkeypatch, on_host):
    options = {"T": 4, **SPECIAL[special]}
    if regime == "wide" and special in ("B9", "B17"):
        # one team at once, which has several tiles of columns, and rows in whole vectors
        options["H"] = 40
        of_device(monkeypatch, multiprocessors=-(-options["H"] // 16))
    if walked in KINKED and special in ("B9", "B17"):
        options["seed"] = 5
    if special == "saturated" and walked == "peephole_lstm":
        options["scale"] = 10.0
    case = draw(walked, dtype=TYPES[type], **options)
    compare(case, regime, special, trajectory=special == "all at once B9")
    assert launched(on_host, regime)
    assert any(f"_{type}_" in name for name, _, _ in on_host.launched)


both = pytest.mark.parametrize("regime", REGIMES)


@pytest.mark.parametrize(
    "regime, walked, type, H",
    [
        ("cluster", "gru", "tf32", 260),
        *(
            pytest.param(regime, walked, type, H, marks=full)
            for regime, walked, type, H in [
                ("cluster", "lstm", "tf32", 300),
                ("cluster", "peephole_lstm", "tf32", 330),
                ("cluster", "coupled_lstm", "float16", 400),
                ("grid", "gru", "tf32", 250),
                ("grid", "lstm", "bfloat16", 270),
                ("wide", "lstm", "bfloat16", 520),
            ]
        ),
    ],
)
def test_larger(regime, walked, type, H, monkeypatch):
    """Part of a cluster's weights in shared memory. The host has not the time for more CTAs."""
    # one team at once, of two tiles of columns
    device = of_device(monkeypatch, multiprocessors=33 if regime == "wide" else 132)
    ways = [TEAMS[f"{way}_{walked}_{type}_{regime}"] for way in ("forward", "backward")]
    assert all(way.shared(H, 8) <= device.shared_memory for way in ways)
    if regime == "cluster" and type == "tf32":
        assert all(min(way.weights(H)) > 0 for way in ways)
    B = 9 if regime == "wide" else 1  # two tiles of columns
    compare(draw(walked, T=2, B=B, H=H, dtype=TYPES[type]), regime, f"H={H}")


@both
@pytest.mark.parametrize("type", ["bfloat16", "tf32"])
@full
def test_longer_than_a_sum(regime, type):
    """Of float32 gates' gradients are summed 32 steps at a time."""
    compare(draw("rnn_tanh", T=35, B=2, H=33, dtype=TYPES[type]), regime, "T=37")


@both
@pytest.mark.parametrize("walked", ["gru", "lstm"])
@full
def test_lean(regime, walked):
    case = draw(walked, T=4, H=36, dtype=torch.bfloat16, **OF_FOUR_STEPS["all at once"])
    compare(case, regime, "lean", memory="lean")


@both
@pytest.mark.parametrize("walked", ["lstm", pytest.param("gru", marks=full)])
def test_the_same_bits_again_whatever_comes_late(regime, walked):
    case = draw(walked, T=5, B=3, H=40, dtype=torch.bfloat16)
    library = cuda_on_host.library_of(walked, regime)
    found = []
    try:
        for seed in (1, 0, 1, 2):
            library.seed(seed)
            with load("cuda").larger_as(regime):
                found.append(case.run("cuda"))
                found[-1] |= gradients(found[-1], case.leaves())
    finally:
        library.seed(1)
    first, *others = found
    for other in others:
        assert all(same_bits(first[name], other[name]) for name in first)


def test_tensors_that_start_anywhere():
    """Rows whose places 16 does not divide."""
    for regime in REGIMES:
        with load("cuda").larger_as(regime):
            m = fastseq.GRU(40, 40, backend="cuda", dtype=torch.float16)
            x = torch.randn(4 * 3 * 40 + 1).half()[1:].view(4, 3, 40)
            h = torch.randn(3 * 40 + 1).half()[1:].view(1, 3, 40)
            w = torch.nn.Parameter(torch.empty(120 * 40 + 1).half()[1:].view(120, 40))
            w.data.copy_(m.weight_hh_l0)
            m.weight_hh_l0 = w
            y, h_n = m(x, h)
            wide = torch.nn.GRU(40, 40).double()
            wide.load_state_dict(m.state_dict())
            expected, h_exact = wide(x.double(), h.double())
            assert torch.allclose(y.double(), expected, atol=4e-3)
            assert torch.allclose(h_n.double(), h_exact, atol=4e-3)


@both
@pytest.mark.parametrize("T, B, lengths", [(0, 3, None), (3, 0, None), (2, 2, [0, 0])])
def test_nothing_to_do(regime, T, B, lengths):
    case = draw("lstm", T=T, B=B, H=34, lengths=lengths, dtype=torch.float32)
    with load("cuda").larger_as(regime):
        ours, theirs = case.run("cuda"), case.run("reference")
        ours |= gradients(ours, case.leaves())
    theirs |= gradients(theirs, case.leaves())
    for name, value in theirs.items():
        assert torch.allclose(ours[name].double(), value.double(), atol=1e-6), name


#: A CTA has room for eight sequences of a team of five, and no more.
FEW = {way: TEAMS[f"{way}_gru_tf32_grid"].shared(70, 9) - 1 for way in ("forward", "backward")}


@pytest.mark.parametrize(
    "multiprocessors, forward",
    [
        # one team at once, of five: a launch for each tile and direction
        (9, [(5, 1)] * 6),
        # both directions together
        pytest.param(10, [(5, 2)] * 3, marks=full),
        pytest.param(19, [(5, 2)] * 3, marks=full),
        # and two tiles of three, of which the last is alone
        pytest.param(20, [(10, 2), (5, 2)], marks=full),
        pytest.param(30, [(15, 2)], marks=full),
    ],
)
def test_launches_in_parts(multiprocessors, forward, monkeypatch, on_host):
    few = min(FEW.values())
    device = of_device(monkeypatch, multiprocessors=multiprocessors, shared_memory=few)
    case = draw("gru", T=2, B=19, H=70, dtype=torch.float32, directions=2, lengths=None)
    compare(case, "grid", f"{multiprocessors} multiprocessors")
    walks = launched(on_host, "grid")
    assert [grid[:2] for way, grid in walks if way == "forward"] == forward
    assert [grid[:2] for way, grid in walks if way == "backward"] == forward
    for way in ("forward", "backward"):
        teams = cuda_teams.arrange(TEAMS[f"{way}_gru_tf32_grid"], 70, 19, 2, device)
        assert (teams.sequences, teams.tiles) == (7, 3)


def test_a_launch_in_parts_of_ragged_sequences(monkeypatch, on_host):
    """A launch for each tile of them. Those of the last tile are short, or empty."""
    of_device(monkeypatch, multiprocessors=9, shared_memory=min(FEW.values()))
    lengths = [3, 3, 2, 0, 1, 3, 2, 0, 0]
    case = draw("gru", T=3, B=9, H=70, dtype=torch.float32, lengths=lengths, reset=True)
    compare(case, "grid", "ragged")
    assert len(launched(on_host, "grid")) == 4


def test_clusters_wait_for_their_turn(monkeypatch, on_host):
    """All in one launch, whose CTAs the host runs one cluster after another."""
    kernels = [TEAMS[f"{way}_gru_float16_cluster"] for way in ("forward", "backward")]
    few = min(kernel.shared(40, 9) for kernel in kernels) - 1
    of_device(monkeypatch, shared_memory=few)
    case = draw("gru", T=2, B=19, H=40, dtype=torch.float16, directions=2)
    compare(case, "cluster", "three tiles")
    assert launched(on_host, "cluster") == [("forward", (6, 2, 1)), ("backward", (6, 2, 1))]


@both
def test_directions_in_one_launch(regime, on_host):
    with load("cuda").larger_as(regime):
        m = fastseq.GRU(8, 33, num_layers=2, bidirectional=True, backend="cuda")
        m(torch.randn(2, 3, 8))[0].sum().backward()
    CTAs = {"cluster": 2, "grid": 3}[regime]
    walks = launched(on_host, regime)
    assert [way for way, _ in walks] == ["forward"] * 2 + ["backward"] * 2
    assert all(grid == (CTAs, 2, 1) for _, grid in walks)


@pytest.mark.parametrize("widths", [("grid", "wide"), ("wide", "grid")], ids="-".join)
def test_each_way_of_a_grid_has_slices_of_its_own_width(widths, monkeypatch, on_host):
    """As on an A100, where forward at H = 1024 has no room for wide ones."""

    def kernels_of(way, cell, type, regime, H):
        return [TEAMS[f"{way}_{cell}_{type}_{widths[way == 'backward']}"]]

    monkeypatch.setattr(cuda_teams, "kernels_of", kernels_of)
    with load("cuda").larger_as("grid"):
        case = draw("lstm", T=4, B=9, H=40, dtype=torch.bfloat16, directions=2)
        against_the_independent(case, "cuda", "-".join(widths))
    names = [name for name, *_ in on_host.launched if not name.startswith("previous")]
    ways = zip(("forward", "backward"), widths, strict=True)
    assert sorted(set(names)) == sorted(f"{way}_lstm_bfloat16_{width}" for way, width in ways)


def test_a_layer_runs_as_planned(monkeypatch, on_host):
    """One CTA where it fits; a cluster, or a grid where there are none, whose slices are wide where
    there is no multiprocessor for each of nine."""
    for H, capability, multiprocessors, size in (
        (64, (9, 0), 24, "64"),
        (129, (9, 0), 24, "cluster"),
        (129, (8, 0), 24, "grid"),
        (129, (8, 0), 8, "wide"),
    ):
        of_device(monkeypatch, capability=capability, multiprocessors=multiprocessors)
        on_host.launched.clear()
        fastseq.LSTM(4, H, backend="cuda", dtype=torch.bfloat16)(torch.randn(1, 1, 4).bfloat16())
        assert [name for name, *_ in on_host.launched] == [f"forward_lstm_bfloat16_{size}"]


# What it declines, and what not


def problem(cell="lstm", type="bfloat16", H=16, **change):
    given = {"T": 4, "B": 3, "I": 8, "P": None, "tf32": True} | change
    return Problem(cell, TYPES[type], "cpu", H=H, **given)


@pytest.mark.parametrize("walked", PRODUCT_CELLS)
@pytest.mark.parametrize("type", TYPES)
def test_what_must_not_be_declined(walked, type, monkeypatch):
    """So that no kernel drops out unseen: on an H100 by clusters up to 512 units, by grids as many
    as a row of h has room for and there are multiprocessors."""
    of_device(monkeypatch, **dataclasses.asdict(H100))
    grids = {"bfloat16": 2048, "float16": 2048, "tf32": 1024}[type]
    # of its backward in float32 a CTA holds fewer weights in registers
    most = 384 if (walked, type) == ("peephole_lstm", "tf32") else 512
    for H in (1, 31, 32, 33, 129, 256, 300, most - 1, most):
        assert cuda_teams.declined(walked, type, "cluster", H, H100) is None, H
    for H in (1, 16, 129, 512, 700, 1000, grids):
        assert cuda_teams.declined(walked, type, "grid", H, H100) is None, H
    for H in (1, 128, 129, 512, 513, 1000, grids):
        for options in ({}, {"training": True, "ragged": True, "reset": True}):
            asked = problem(walked, type, H, **options)
            assert choice.reason_against("cuda", asked) is None, H
    reason = choice.reason_against("cuda", problem(walked, type, grids + 1))
    assert f"a grid holds up to H={grids}" in reason and "a cluster holds up to H=512" in reason
    if most < 512:
        words = cuda_teams.declined(walked, type, "cluster", most + 1, H100)
        assert "backward takes" in words and "shared memory" in words


def test_what_no_team_holds_raises_in_words(capsys):
    lstm, indrnn = (getattr(fastseq, n)(4, 140, backend="cuda") for n in ("LSTM", "IndRNN"))
    for regime, layer, device, words in (
        (
            "cluster",
            lstm,
            {"clusters": (0, 1, 1)},
            "H=140: a made-up GPU has no room for a cluster",
        ),
        ("grid", lstm, {"cooperative": False}, "a made-up GPU starts no grid all at once"),
        ("cluster", indrnn, {}, "cuda's clusters have no kernel of indrnn in float32"),
    ):
        with load("cuda").larger_as(regime), pytest.MonkeyPatch.context() as patch:
            of_device(patch, **device)
            with pytest.raises(NotImplementedError, match=words):
                layer(torch.randn(1, 1, 4))
            fastseq.explain(layer, torch.randn(1, 1, 4))
            assert words in capsys.readouterr().out


@both
def test_explain_prints_the_plan(regime, capsys):
    with load("cuda").larger_as(regime):
        fastseq.explain(fastseq.LSTM(8, 40, backend="cuda"), torch.randn(3, 2, 8))
    said = capsys.readouterr().out
    assert f"regime {regime}" in said and f"forward_lstm_tf32_{regime}" in said
    assert "registers" in said and "shared memory" in said and "launch" in said


# What waits in vain


@pytest.fixture
def odd(monkeypatch, on_host):
    """What makes all launches those of teams of which one CTA is odd
    (tests/helpers/cuda_odd_teams.cpp)."""
    source = cuda_on_host.WORDS.with_name("cuda_odd_teams.cpp")
    library = cuda_on_host.Library(cuda_on_host.build("odd_teams", source))
    library.seed(0)  # it keeps no pushes back, which would be missed in the end
    monkeypatch.setattr(faults, "_flags", {})

    def become(how):
        launch = library.launch
        monkeypatch.setattr(on_host, "launch", lambda name, *given: launch(f"{how}_{name}", *given))

    yield become
    library.seed(1)


@both
def test_a_slow_cta_finds_nothing_written_over(regime, odd):
    case = draw("lstm", T=4, B=9, H=33, dtype=torch.bfloat16)
    found = []
    with load("cuda").larger_as(regime):
        for how in (None, "slow"):
            if how:
                odd(how)
            found.append(case.run("cuda"))
            found[-1] |= gradients(found[-1], case.leaves())
    assert all(same_bits(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.parametrize("regime", ["cluster", pytest.param("grid", marks=full)])
@pytest.mark.parametrize("tell", ["check", pytest.param("the next call", marks=full)])
def test_a_launch_ends_where_a_cta_waits_in_vain(regime, tell, odd, cuda):
    m = fastseq.LSTM(8, 70, backend="cuda", dtype=torch.bfloat16)
    x = torch.randn(9, 3, 8).bfloat16().requires_grad_()
    with cuda.larger_as(regime):
        truth, _ = m(x)
    odd("mute")
    # looks of the host are of 5 ms, but in a grid each packet that anybody puts ends one: of a step
    # and the next 200
    with cuda.larger_as(regime), cuda.patience({"cluster": 60, "grid": 400}[regime]):
        y, (h_n, _) = m(x)
        # handed on are h of the first steps: of the fourth the product is not to be had
        assert same_bits(y[:3], truth[:3]) and bool(y[3:].isnan().all())
        assert bool(h_n.isnan().all())
        with pytest.raises(RuntimeError, match=f"forward_lstm_bfloat16_{regime}, .* in vain"):
            fastseq.check() if tell == "check" else m(x)
        (truth * torch.randn(9, 3, 70)).sum().backward()
    assert bool(x.grad[:6].isnan().all())
    if regime == "cluster":
        assert bool(x.grad[6:].isfinite().all())
    with pytest.raises(RuntimeError, match=f"backward_lstm_bfloat16_{regime}, "):
        fastseq.check()
    fastseq.check()
