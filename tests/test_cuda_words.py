"""The words of csrc/cuda/words.h as the host means them, and the mistakes of a kernel that a launch
on the host finds.
"""

import os
import struct
import subprocess

import pytest
import torch

from tests.helpers.cuda_on_host import CUDA, WORDS, compiler, library_of_words

ALONE = WORDS.with_name("cuda_words_alone.cpp")


@pytest.fixture(scope="module")
def host():
    return library_of_words()


def launch(host, name, threads=32, ctas=1, shared=0, cluster=1, together=False, **values):
    """Fields that are left out are 0."""
    fields = [values.pop(field, 0) for field in host.fields().split()]
    assert not values
    words = [f.data_ptr() if isinstance(f, torch.Tensor) else f for f in fields]
    arguments = struct.pack(f"{len(words)}q", *words)
    host.launch(name, 0, 0, (ctas, 1, 1), threads, shared, arguments, cluster, together)


def fragments(matrix, each):
    """The words of each lane, of a (16, 8 * each) or of b (8, 8 * each): its column is a row here.

    From the tables of mma.m16n8k16 and mma.m16n8k8 in PTX's manual.
    """
    words = []
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for further in range(2):  # the inner index, 4 words on
            first = each * (place + 4 * further)
            words += [matrix[r, first : first + each] for r in range(group, len(matrix), 8)]
    return torch.stack(words)


@pytest.mark.parametrize("name", ["bf16", "f16", "tf32"])
def test_product(host, name):
    """Products are exact, and sums are of float32."""
    dtype, each = {
        "bf16": (torch.bfloat16, 2),
        "f16": (torch.float16, 2),
        "tf32": (torch.float32, 1),
    }[name]
    torch.manual_seed(3)
    a, b, d = torch.randn(16, 8 * each), torch.randn(8, 8 * each), torch.randn(16, 8)
    a, b = a.to(dtype), b.to(dtype)
    held = d.view(2, 8, 4, 2).permute(1, 2, 0, 3).contiguous()
    in_a, in_b = fragments(a, each), fragments(b, each)
    launch(host, f"product_{name}", w_hh=in_a, b_hh=in_b, y=held, T=3)
    ours = held.permute(2, 0, 1, 3).reshape(16, 8)
    if name == "tf32":
        a, b = ((m.view(torch.int32) & ~0x1FFF).view(torch.float32) for m in (a, b))
    truth = d.double() + 3 * a.double() @ b.double().T
    assert (ours - truth).abs().max() < 1e-5
    assert (ours - (d.double() + 2 * a.double() @ b.double().T)).abs().max() > 0.1


def test_sums_are_cut(host):
    """Terms of an instruction to 2^-24 of the largest, towards zero; so is the sum."""
    a, b = torch.full((16, 16), 1.5 * 2**-12).bfloat16(), torch.full((8, 16), 2**-12).bfloat16()
    for start in (1.0, -1.0):
        d = torch.full((32, 4), start)
        launch(host, "product_bf16", w_hh=fragments(a, 2), b_hh=fragments(b, 2), y=d, T=1)
        # of 16 terms of 1.5 * 2^-24 each leaves 2^-24
        assert torch.equal(d, torch.full((32, 4), start + 2**-20))
        d = torch.full((32, 4), start * 2**5)
        launch(host, "product_bf16", w_hh=fragments(a, 2), b_hh=fragments(b, 2), y=d, T=1)
        assert torch.equal(d, torch.full((32, 4), start * 2**5))


def bits_of(t):
    return t.view({2: torch.int16, 4: torch.int32}[t.element_size()])


def all_of_16_bits(dtype):
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_numbers_of_16_bits(host, name, dtype):
    """All of them, those between two of them, and just beside that; as torch rounds them."""
    every = all_of_16_bits(dtype)
    wide = torch.empty(len(every))
    launch(host, f"widen_{name}", h_0=every, y=wide, H=len(every))
    assert torch.equal(wide.isnan(), every.isnan())
    assert torch.equal(wide.nan_to_num(), every.float().nan_to_num())
    finite = every[every.isfinite()].float().sort().values
    between = finite[:-1] + (finite[1:] - finite[:-1]) / 2
    up, down = (torch.nextafter(between, torch.tensor(to)) for to in (torch.inf, -torch.inf))
    ends = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.99, 65520, 3e38, -3.4e38, 1e-45])
    given = torch.cat([finite, between, up, down, ends])
    ours = torch.empty(len(given), dtype=dtype)
    launch(host, f"narrow_{name}", h_0=given, y=ours, H=len(given))
    right = given.to(dtype)
    assert torch.equal(ours.isnan(), right.isnan())
    assert torch.equal(bits_of(ours)[~right.isnan()], bits_of(right)[~right.isnan()])


def test_numbers_of_tf32(host):
    given = torch.tensor([1.0, 1 + 2**-11, 1 + 2**-11 - 2**-23, -1 - 2**-11, torch.inf, torch.nan])
    ours = torch.empty(6)
    launch(host, "narrow_tf32", h_0=given, y=ours, H=6)
    assert ours[:5].tolist() == [1.0, 1 + 2**-10, 1.0, -1 - 2**-10, torch.inf] and ours[5].isnan()


def test_neighbours(host):
    own = torch.randn(64)
    both = torch.empty(64, 2)
    launch(host, "sums", threads=64, h_0=own, y=both)
    assert torch.equal(both[:, 1], own)
    expected = own.view(2, 32).double().sum(1).repeat_interleave(32)
    assert (both[:, 0] - expected).abs().max() < 1e-5


MISTAKES = (
    "none no_wait no_barrier one_buffer unaligned outside beside other_word leaves source load"
).split()


def stream(host, mistake, T=4, ctas=3):
    given = torch.randn(ctas, T, 64)
    ours = torch.full((ctas, T, 64), torch.nan)
    values = {"h_0": given, "y": ours, "T": T, "save": MISTAKES.index(mistake)}
    launch(host, "stream", threads=64, ctas=ctas, shared=512, **values)
    return torch.equal(ours, given.flip(-1))


def test_copies_arrive(host):
    assert all(stream(host, "none") for _ in range(20))


def test_a_forgotten_wait_shows(host):
    assert not stream(host, "no_wait")


def test_a_forgotten_barrier_shows(host):
    """Soon: each time, one of 12 warps would have to be late."""
    assert not all(stream(host, "no_barrier") for _ in range(20))


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("one_buffer", "copy: written to before it arrived"),
        ("unaligned", "copy: an address is not aligned to 16"),
        ("outside", "copy: not in the CTA's shared memory"),
        ("beside", "written beside the shared memory"),
        ("other_word", "lanes of a warp are at different words"),
        ("leaves", "left the kernel"),
        ("source", "copy: its source changed on the way"),
        ("load", "load: an address is not aligned to 16"),
    ],
)
def test_mistakes_end_the_launch(host, mistake, words):
    with pytest.raises(RuntimeError, match=f"^stream: .*{words}"):
        stream(host, mistake)
    assert stream(host, "none")


def test_launches_that_cannot_be(host):
    for words, settings in (
        ("at most 64", {"threads": 96}),
        ("whole warps", {"threads": 33}),
        ("more shared memory", {"threads": 64, "shared": 1 << 20}),
        ("the grid is empty", {"threads": 64, "ctas": 0}),
        ("expected whole clusters of at most 16, got 2", {"threads": 64, "ctas": 3, "cluster": 2}),
        ("got 17", {"threads": 64, "ctas": 17, "cluster": 17}),
        ("got 0", {"threads": 64, "cluster": 0}),
        ("129 CTAs .* at most 8192", {"threads": 64, "ctas": 129, "together": True}),
    ):
        with pytest.raises(RuntimeError, match=words):
            launch(host, "stream", **settings)
    with pytest.raises(RuntimeError, match="no kernel is called strem"):
        launch(host, "strem")


def test_a_warp_meets(host):
    own = torch.randn(32)
    for _ in range(5):
        ours = torch.empty(32)
        launch(host, "beside", shared=128, h_0=own, y=ours)
        assert torch.equal(ours, own.view(16, 2).flip(1).flatten())
    with pytest.raises(RuntimeError, match="lanes of a warp are at different words"):
        launch(host, "beside", shared=128, h_0=own, y=ours, save=1)


# CTAs that share a recurrence

PUSHES = (
    "none no_wait one_buffer too_many too_few leaves not_open opened_twice expected_twice "
    "no_meeting unaligned outside no_rank written_over meets_alone under_way"
).split()
PACKETS = "none no_wait one_buffer flag beside plain unaligned never".split()
SEEDS = range(5)


def expected(h, steps):
    for _ in range(steps):
        weights = torch.arange(1.0, len(h) + 1)[:, None]
        h = ((weights * h).sum(0).flip(0) + torch.arange(float(len(h)))[:, None]) % 64
    return h


def pushes(host, mistake="none", team=3, teams=1, T=6, seed=1, patience=1000):
    """Whether the numbers are right and nobody waited in vain."""
    given = torch.randint(64, (teams, team, 64)).float()
    ours, fault = torch.full((teams, team, 64), torch.nan), torch.zeros(1, dtype=torch.int32)
    values = {"h_0": given, "y": ours, "T": T, "save": PUSHES.index(mistake)}
    values |= {"fault": fault, "code": 7, "patience": patience}
    host.seed(seed)
    shared = 256 + 512 * team + 16
    launch(host, "pushes", 64, team * teams, shared, cluster=team, **values)
    if fault.item():
        assert fault.item() == 7
        return False
    return all(torch.equal(y, expected(h, T)) for y, h in zip(ours, given, strict=True))


@pytest.mark.parametrize("team", [1, 2, 3, 4])
def test_what_is_pushed_comes(host, team):
    """In several clusters, one after another and side by side."""
    assert all(pushes(host, team=team, teams=3, seed=seed) for seed in SEEDS)


@pytest.mark.parametrize("mistake", ["no_wait", "one_buffer"])
def test_pushes_without_order_show(host, mistake):
    """By wrong numbers; or the host sees what is written over while it is under way."""
    try:
        shown = not all(pushes(host, mistake, T=20, seed=seed, patience=50) for seed in SEEDS)
    except RuntimeError as error:
        shown = str(error) == "pushes: push: written to before it has come"
    assert shown


def test_what_does_not_come_is_not_waited_for(host):
    assert not pushes(host, "too_few", patience=5)


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("too_many", "more bytes have come than were expected|before what was pushed"),
        ("leaves", "left the kernel|more bytes have come than were expected"),
        ("not_open", "Box: not open"),
        ("opened_twice", "Box: opened twice"),
        ("expected_twice", r"Box: expect\(\) twice in a phase"),
        ("unaligned", "push: an address is not aligned to 16"),
        ("outside", "push: not in the CTA's shared memory"),
        ("no_rank", "push: the cluster has no CTA 3"),
        ("written_over", "Box: written over"),
        ("meets_alone", "left the kernel"),
        ("under_way", "push: written to before it has come"),
    ],
)
def test_mistakes_of_pushes_end_the_launch(host, mistake, words):
    with pytest.raises(RuntimeError, match=f"^pushes: .*({words})"):
        for seed in SEEDS:
            pushes(host, mistake, seed=seed, patience=20)
    assert pushes(host)


def packets(host, mistake="none", team=3, T=4, seed=1, first=0, memory=None, **options):
    """As ``pushes``. ``memory``: of the packets of launches one after another."""
    given = torch.randint(64, (team, 64)).float()
    ours, fault = torch.full((team, 64), torch.nan), torch.zeros(1, dtype=torch.int32)
    if memory is None:
        memory = torch.zeros(2 * team, 64, 4, dtype=torch.int32)
    if mistake == "flag":
        memory = torch.zeros(4 * team, 64, 4, dtype=torch.int32)
    values = {"h_0": given, "y": ours, "T": T, "save": PACKETS.index(mistake), "team": team}
    values |= {"packets": memory, "first": first, "fault": fault, "code": 7}
    values["patience"] = options.pop("patience", 1000)
    values["c_all"] = torch.zeros(2 * team, 64)
    host.seed(seed)
    launch(host, "packets", 64, team, **{"together": True} | options, **values)
    if fault.item():
        assert fault.item() == 7
        return False
    return torch.equal(ours, expected(given, T))


def test_packets_come(host):
    """Also in the memory of a launch before, by numbers of steps that go on."""
    memory = torch.zeros(6, 64, 4, dtype=torch.int32)
    for seed in SEEDS:
        assert packets(host, seed=seed)
        assert packets(host, seed=seed, first=4 * seed, memory=memory)


def test_packets_of_a_launch_before_are_not_taken(host):
    """By numbers that start again they are."""
    memory = torch.zeros(6, 64, 4, dtype=torch.int32)
    results = [packets(host, T=2, seed=seed, memory=memory) for seed in SEEDS]
    assert results[0] and not all(results)


@pytest.mark.parametrize("mistake", ["no_wait", "one_buffer", "flag"])
def test_packets_without_order_show(host, mistake):
    assert not all(packets(host, mistake, T=40, seed=seed, patience=10) for seed in SEEDS)


def test_packets_that_never_come(host):
    assert not packets(host, "never", patience=5)


def test_a_grid_is_there_at_once(host):
    """Five CTAs have more threads than the host runs side by side where it may choose."""
    assert packets(host, team=5)
    assert not packets(host, team=5, together=False, patience=5)


def test_packets_are_aligned(host):
    with pytest.raises(RuntimeError, match="packet: an address is not aligned to 16"):
        packets(host, "unaligned")


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    """Runs pushes or packets under ThreadSanitizer, and says what it printed."""
    program = tmp_path_factory.mktemp("words") / "alone"
    flags = "-std=c++20 -O1 -g1 -pthread -fsanitize=thread -fno-strict-aliasing".split()
    flags += ["-Wno-unknown-pragmas", f"-I{CUDA}", f'-DFASTSEQ_HOST_KERNELS="{WORDS}"']
    subprocess.run([*compiler(), *flags, str(ALONE), "-o", str(program)], check=True)

    def run(kernel, mistake, ctas=3, seeds=SEEDS):
        number = {"pushes": PUSHES, "packets": PACKETS}[kernel].index(mistake)
        words = [kernel, ctas, number, *seeds]
        settings = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
        command = [str(program), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=settings)
        return done.stdout + done.stderr

    return run


@pytest.mark.parametrize("kernel", ["pushes", "packets"])
def test_no_race_is_seen(watched, kernel):
    assert watched(kernel, "none") == "right\n" * len(SEEDS)


@pytest.mark.parametrize(
    "kernel, mistake",
    [
        ("pushes", "no_wait"),
        ("pushes", "one_buffer"),
        ("pushes", "no_meeting"),
        ("packets", "beside"),
        ("packets", "plain"),
    ],
)
def test_a_race_is_seen(watched, kernel, mistake):
    """One buffer, where nothing is kept back: what reads late meets what is pushed early."""
    assert "data race" in watched(kernel, mistake)
