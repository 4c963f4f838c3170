"""cuda's waves on the host: layers of a stack side by side in a cluster, against the independent
writing by the rule of all tests, and when a stack is run so."""

from dataclasses import replace

import cuda_on_host
import pytest
import torch
from problems import KINKED, against_the_independent, draw, full, gradients
from rules import check_all, same_bits

import fastseq
from fastseq.backends import cuda_plan, cuda_teams, load
from fastseq.backends.contract import Call, Weights
from fastseq.backends.cuda_kernels import H100, TEAMS, WAVE_CELLS

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
#: A device for clusters of up to 12 CTAs.
DEVICE = replace(cuda_on_host.DEVICE, multiprocessors=12)
SPECIAL = {
    "two layers": {"B": 5},
    "three": {"layers": 3, "B": 9, "T": 3},
    "one CTA each": {"H": 17, "layers": 4, "B": 3},
    "one step": {"T": 1, "layers": 3, "H": 33},
    "no state": {"state": False, "bias": False, "H": 34},
    "ragged": {"lengths": [2, 0, 4, 3], "B": 4},
    "all at once": {
        "lengths": [4, 0, 2, 1, 4, 3, 2, 2, 1],
        "B": 9,
        "reset": True,
        "h_mask": True,
        "layers": 2,
    },
    "the ring goes round": {"T": 11, "B": 2},
    "three CTAs each": {"H": 70, "B": 2, "T": 3},
}


@pytest.fixture(scope="module")
def on_host():
    with cuda_on_host.use() as found:
        yield found


@pytest.fixture(autouse=True)
def wave(on_host, monkeypatch):
    """float32 in TF32; stacks go as waves."""
    cuda = load("cuda")
    monkeypatch.setattr(cuda, "device_at_hand", lambda index=None: DEVICE)
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    on_host.launched.clear()
    with cuda.larger_as("wave"):
        yield cuda


def walks(on_host):
    return [name for name, *_ in on_host.launched if not name.startswith("previous")]


def in_turn():
    """An ordinary run takes each case of an LSTM or a GRU in one type, which go round."""
    found = []
    for cell in WAVE_CELLS:
        for place, special in enumerate(SPECIAL):
            for turn, dtype in enumerate(DTYPES[:2]):
                ordinary = cell == ("lstm", "gru")[place % 2] and place // 2 % 2 == turn
                ordinary = ordinary and special != "three"  # six CTAs, 1,536 threads
                name = f"{cell}-{special}-{str(dtype)[6:]}"
                marks = () if ordinary else full
                found.append(pytest.param(cell, special, dtype, marks=marks, id=name))
    return found


@pytest.mark.parametrize("cell, special, dtype", in_turn())
def test_against_the_independent(cell, special, dtype, on_host):
    given = {"T": 4, "H": 40, "layers": 2} | SPECIAL[special]
    case = draw(cell, dtype=dtype, **given)
    trajectory = special in ("all at once", "ragged")
    if cell in KINKED:  # on which side of its kink a gradient is, the rounding decides
        values = [c.independent(trajectory) for c in (case, case.to(torch.float64))]
        check_all(case.run("cuda", trajectory=trajectory), *values, dtype, special)
        assert walks(on_host) == [f"forward_{cell}_{str(dtype)[6:]}_wave"]
        return
    against_the_independent(case, "cuda", special, trajectory=trajectory)
    name = f"{cell}_{str(dtype)[6:]}_wave"
    assert walks(on_host) == [f"forward_{name}", f"backward_{name}"]


@pytest.mark.parametrize("cell", ["lstm", pytest.param("gru", marks=full)])
def test_tf32(cell, on_host):
    """Layers side by side are as right as one after another."""
    case = draw(cell, T=4, B=5, H=40, layers=2, dtype=torch.float32)
    exact = case.to(torch.float64).run("reference")
    ours = case.run("cuda")
    assert walks(on_host) == [f"forward_{cell}_tf32_wave"]
    with load("cuda").larger_as("cluster"):
        theirs = case.run("cuda")
    for name, truth in exact.items():
        allowed = 2 * (theirs[name] - truth).abs().max() + 4 * 2**-23
        assert (ours[name] - truth).abs().max() <= allowed, name
    assert all(torch.isfinite(g).all() for g in gradients(case.run("cuda"), case.leaves()).values())


def test_the_same_bits_whatever_comes_late(on_host):
    case = draw("lstm", T=5, B=3, H=40, layers=2, dtype=torch.bfloat16)
    library = cuda_on_host.library_that_has("forward_lstm_bfloat16_wave")
    found = []
    for seed in (0, 1):
        library.seed(seed)
        outputs = case.run("cuda")
        found.append(outputs | gradients(outputs, case.leaves()))
    library.seed(1)
    for other in found[1:]:
        assert all(same_bits(found[0][name], other[name]) for name in found[0])


def test_hooks_of_saved_tensors_may_bring_copies(on_host):
    """The kernels take layers one behind another in memory; what comes back elsewhere is copied."""
    torch.manual_seed(0)
    m = fastseq.LSTM(8, 40, num_layers=2, backend="cuda", dtype=torch.bfloat16)
    x = torch.randn(3, 5, 8, dtype=torch.bfloat16)

    def grads():
        return torch.autograd.grad(m(x)[0].float().square().sum(), list(m.parameters()))

    plain = grads()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.clone()):
        copied = grads()
    assert all(same_bits(a, b) for a, b in zip(plain, copied, strict=True))
    assert walks(on_host) == ["forward_lstm_bfloat16_wave", "backward_lstm_bfloat16_wave"] * 2


@pytest.mark.parametrize(
    "lengths", [None, pytest.param([4, 2], marks=full)], ids=["dense", "ragged"]
)
def test_inference_keeps_the_last_layer_alone(lengths, on_host):
    """Its y and its other state at every step, in memory of their own."""
    m = fastseq.LSTM(8, 40, num_layers=2, backend="cuda", dtype=torch.bfloat16)
    x = torch.randn(4, 2, 8, dtype=torch.bfloat16)
    given = {} if lengths is None else {"lengths": torch.tensor(lengths)}
    y, (h, c), along = m(x, all_states=True, **given)
    with torch.no_grad():
        again, state, others = m(x, all_states=True, **given)
    assert same_bits(y, again) and all(map(same_bits, (h, c), state))
    assert all(map(same_bits, along, others))
    if lengths is None:
        assert again.untyped_storage().nbytes() == again.nbytes
    assert walks(on_host) == ["forward_lstm_bfloat16_wave"] * 2


@pytest.mark.parametrize(
    "options",
    [
        {"bidirectional": True},
        {"dropout": 0.5},
        {"memory": "lean"},
    ],
    ids=lambda o: next(iter(o)),
)
def test_what_goes_layer_by_layer(options, on_host):
    m = fastseq.LSTM(8, 40, num_layers=2, backend="cuda", dtype=torch.bfloat16, **options)
    m(torch.randn(3, 2, 8, dtype=torch.bfloat16))[0].float().sum().backward()
    assert walks(on_host) and not any("wave" in name for name in walks(on_host))


def test_a_cell_without_a_wave_goes_layer_by_layer(on_host):
    case = draw("peephole_lstm", T=3, B=2, H=40, layers=2, dtype=torch.bfloat16)
    case.run("cuda")
    assert walks(on_host) == ["forward_peephole_lstm_bfloat16_64"] * 2


def test_too_many_layers_for_a_cluster_go_one_by_one(on_host):
    case = draw("lstm", T=3, B=2, H=70, layers=5, dtype=torch.bfloat16)  # 15 CTAs, room for 12
    case.run("cuda")
    assert len(walks(on_host)) == 5 and not any("wave" in name for name in walks(on_host))


def test_rows_of_all_layers_are_counted_as_int(wave):
    """More go layer by layer; nothing is launched here."""
    w = Weights(torch.zeros(160, 8), torch.zeros(160, 40), None, None, None)

    def walks_as_wave(T):
        x = torch.zeros(1, 1, 8).expand(T, 2**10, 8)
        return wave._walks_as_wave([Call("lstm", x, None, [], [w], (False,))] * 2, False)

    assert walks_as_wave(2**19) and not walks_as_wave(2**20)


def faster(cell="lstm", type="bfloat16", H=256, layers=2, B=16, T=512, device=H100):
    return cuda_plan.is_wave_faster(cell, type, H, layers, B, T, True, device)


def test_when_a_wave_is_modelled_to_be_faster():
    assert faster() and faster(H=160, layers=3) and faster(cell="gru")
    # one step has nothing to overlap with
    assert not faster(T=1)
    # clusters of 16 hold fewer sequences at once than twice clusters of 8
    assert not faster(B=2048)


def test_a_wave_fits_the_cluster_and_its_memory():
    """Of all sizes that are not declined."""
    planned = 0
    for cell in WAVE_CELLS:
        for type in ("bfloat16", "float16", "tf32"):
            for H in (1, 32, 33, 128, 200, 256):
                for layers in range(2, 9):
                    if cuda_teams.declined(cell, type, "wave", H, H100, layers):
                        assert -(-H // 32) * layers > 16
                        continue
                    for way in ("forward", "backward"):
                        kernel = TEAMS[f"{way}_{cell}_{type}_wave"]
                        found = cuda_teams.arrange(kernel, H, 40, 1, H100, layers)
                        assert found.cluster == found.team * layers <= 16
                        assert found.shared <= H100.shared_memory
                        assert found.sequences * found.tiles >= 40
                        planned += 1
    assert planned > 300
    assert "up to H=256" in cuda_teams.declined("lstm", "bfloat16", "wave", 257, H100, 2)


def test_the_kernels():
    """None drops out unseen."""
    names = {
        f"{w}_{c}_{t}_wave"
        for w in ("forward", "backward")
        for c in WAVE_CELLS
        for t in ("bfloat16", "float16", "tf32")
    }
    assert names == {name for name in TEAMS if name.endswith("_wave")}
