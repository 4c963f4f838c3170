"""What is the C++ room's own: bits, instruction sets, edges of vectors, wrong input, ties, long
walks."""

import itertools

import numpy as np
import pytest
import torch
from chains import draw, lengths_of, score_of

from fastseq.backends import crf
from fastseq.backends.crf import Chain, eager

room = crf.load("native")
if isinstance(room, str):
    pytest.skip(room, allow_module_level=True)

_cpu = room._cpu
EDGES = (1, 3, 15, 16, 17, 33, 50, 66, 130)  # of vectors, of panels of them, and of tiles of counts


@pytest.fixture(params=_cpu.instruction_sets())
def instruction_set(request):
    before = _cpu.use_instruction_set(request.param)
    yield request.param
    _cpu.use_instruction_set(before)


@pytest.fixture
def threads(monkeypatch):
    """Sets how many threads a call may take, whatever it is worth."""

    def use(count):
        monkeypatch.setattr(torch, "get_num_threads", lambda: count)

    return use


def typed(chain, dtype):
    return Chain(*(t.to(dtype) if t is not None and t.is_floating_point() else t for t in chain))


def everything(chain, tags, n=1):
    """Value, gradients of emissions, start, end and transitions, scores and paths."""
    value, u = room.forward(chain, tags, True)
    dvalue = torch.linspace(-1, 2, len(value), dtype=value.dtype)
    return [value, *room.backward(chain, tags, u, dvalue, True), *room.viterbi(chain, n)]


def expected(chain, tags):
    """The first five of these, in torch operations."""
    leaves = [t.clone().requires_grad_() for t in (chain.emissions, *chain[2:])]
    value, _ = eager.forward(Chain(leaves[0], chain.lengths, *leaves[1:]), tags, True)
    dvalue = torch.linspace(-1, 2, len(value), dtype=value.dtype)
    return [value.detach(), *torch.autograd.grad(value, leaves, dvalue)]


@pytest.mark.parametrize("K", EDGES)
def test_edges_of_vectors_on_each_instruction_set(instruction_set, K):
    chain, tags = draw(6, 11, K, seed=K, scale=1.5)
    found = everything(chain, tags, 2)
    for got, want in zip(found, expected(chain, tags), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    scores, paths = eager.viterbi(chain, 2)
    torch.testing.assert_close(found[5], scores, rtol=1e-12, atol=1e-12)
    assert torch.equal(found[6], paths)
    single = everything(typed(chain, torch.float32), tags)
    for got, want in zip(single, found, strict=False):
        scale = want[want.isfinite()].abs().amax().item()
        if got.dtype is torch.float32 and got.shape == want.shape:
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=4e-6 * (1 + scale))
    torch.testing.assert_close(single[5].double(), scores[:, :1], rtol=1e-5, atol=1e-5)


def test_any_strides_of_a_single_tag():
    chain, tags = draw(4, 3, 1)
    strided = chain._replace(emissions=chain.emissions.expand(4, 3, 2)[..., ::2])
    for got, want in zip(everything(strided, tags), everything(chain, tags), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", [20, 70])
def test_bits_do_not_depend_on_threads(threads, K, dtype):
    chain, tags = draw(90, 37, K, dtype=dtype)
    results = []
    for count in (1, 2, 3, 5):
        threads(count)
        results.append(everything(chain, tags, 1) + everything(chain, None, 3))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("K", [5, 20, 70])
def test_bits_do_not_depend_on_sequences_beside(K):
    chain, tags = draw(30, 23, K, dtype=torch.float32)
    value, u = room.forward(chain, tags, True)
    dvalue = torch.linspace(-1, 2, 23)
    (de,) = room.backward(chain, tags, u, dvalue, False)
    scores, paths = room.viterbi(chain, 1)
    for some in ([4], [22, 0, 7], range(3, 20)):
        some = list(some)
        part = chain._replace(
            emissions=chain.emissions[:, some].contiguous(), lengths=chain.lengths[some]
        )
        alone, u = room.forward(part, tags[:, some], True)
        assert torch.equal(alone, value[some])
        (found,) = room.backward(part, tags[:, some], u, dvalue[some], False)
        assert torch.equal(found, de[:, some])
        best, path = room.viterbi(part, 1)
        assert torch.equal(best, scores[some]) and torch.equal(path, paths[some])


def test_nothing_is_lost_in_a_long_walk(instruction_set):
    """float32 beside float64: log Z to a last digit, probabilities and counts to a few."""
    single, _ = draw(5000, 2, 9, lengths=False, dtype=torch.float32, scale=2.0)
    single.emissions[:, :, 3] += 3.0  # sums of terms of one sign, and of no size that fits all
    double = typed(single, torch.float64)
    value, u = room.forward(single, None, True)
    truth, u_double = room.forward(double, None, True)
    torch.testing.assert_close(value.double(), truth, rtol=1.5e-7, atol=0)
    ones = torch.ones(2)
    found = room.backward(single, None, u, ones, True)
    for got, want in zip(
        found, room.backward(double, None, u_double, ones.double(), True), strict=True
    ):
        gap = (got.double() - want).abs() / want.abs().clamp_min(1e-3)
        assert gap.max() < 2e-5
    assert (found[0].double().sum(2) - 1).abs().max() < 1e-6  # no drift
    torch.testing.assert_close(
        found[3].double().sum(), torch.tensor(9998.0).double(), rtol=2e-7, atol=0
    )
    scores, paths = room.viterbi(single, 1)
    best, _ = room.viterbi(double, 1)
    for b in range(2):
        own = score_of(double, b, paths[b, 0].tolist())
        assert own == pytest.approx(best[b].item(), rel=1e-8)
        assert scores[b].item() == pytest.approx(own.item(), rel=1e-7)


def test_equal_terms_add_up():
    """What rounds the same way at every step shows what a sum loses."""
    single, _ = draw(20000, 2, 3, lengths=False, dtype=torch.float32)
    single.emissions.zero_()
    found = []
    for chain in (single, typed(single, torch.float64)):
        _, u = room.forward(chain, None, True)
        ones = torch.ones(2, dtype=u.dtype)
        found.append(room.backward(chain, None, u, ones, True)[3].double())
    assert (found[0] / found[1] - 1).abs().max() < 1e-6


def test_long_paths_whose_steps_are_far_from_the_best():
    """A tag that is 50 ahead at every step, but as good as never reached."""
    single, _ = draw(5000, 2, 9, lengths=False, dtype=torch.float32)
    single.transitions[:, [0, 8]] = -1000.0
    single.transitions[8, 0] = 0.0
    single.emissions[:, :, 0] += 50.0
    double = typed(single, torch.float64)
    _, paths = room.viterbi(single, 1)
    best, _ = room.viterbi(double, 1)
    for b in range(2):
        own = score_of(double, b, paths[b, 0].tolist()).item()
        assert own == pytest.approx(best[b].item(), abs=1e-4)


def expect_exact(chain, tags, rtol=1e-9):
    for got, want in zip(everything(chain, tags), expected(chain, tags), strict=False):
        torch.testing.assert_close(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("far", [-10000.0, -800.0, -torch.inf])
def test_what_is_forbidden_has_no_say(far):
    """A tag that nothing leads to, another that leads nowhere, and one that cannot be first: as
    -inf, and as the scores in its place that float64's exp holds no more."""
    chain, tags = draw(9, 6, 6, seed=1)
    chain.transitions[:, 1] = far
    chain.transitions[2] = far
    chain.start[3] = far
    tags[tags == 1] = 0
    tags[tags == 2] = 4
    tags[0, tags[0] == 3] = 5
    if far == -800.0:  # where paths must go all the same: nothing else may be last
        chain.end[[0, 2, 3, 4, 5]] = -2500.0
    expect_exact(chain, tags)


@pytest.mark.parametrize("dtype, reach", [(torch.float32, 100), (torch.float64, 745)])
def test_what_is_just_within_reach(dtype, reach):
    """Tag 0 is ahead by what a type's exp holds, more or less, and leads nowhere. What leads there
    from tag 1 is e^-10 of what would lead there from tag 2, which is as good as not there."""
    exact, _ = draw(3, 60, 3, lengths=False)
    exact.emissions[0, :, 0] += torch.linspace(0.3 * reach, 1.1 * reach, 60)
    exact.emissions[0, :, 2] -= 2 * reach
    exact.transitions[0] = -torch.inf
    exact.transitions[2] += 10.0
    chain = typed(exact, dtype)
    close = 2e-5 if dtype is torch.float32 else 1e-11
    found, truth = everything(chain, None), expected(typed(chain, torch.float64), None)
    for got, want in zip(found, truth, strict=False):
        torch.testing.assert_close(got.double(), want, rtol=close, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [0.0, -10000.0, -torch.inf])
def test_forbidden_tags_take_no_other_walk(dtype, far):
    """Numbers above 0 at step 0 are of the walk that takes one exp a tag (csrc/cpu/chains.h)."""
    chain, _ = draw(30, 9, 21, lengths=False, scale=3.0, dtype=dtype)
    chain.transitions[:, 1] += far
    chain.transitions[2] += far
    chain.start[3] += far
    _, u = room.forward(chain, None, True)
    most = u.amax(2)
    assert (most >= 1).all() and (most < 2).all()


def test_states_that_are_reached_late():
    """Left to right: tag j cannot be before step j, so that sums over what is before are empty."""
    chain, tags = draw(8, 5, 5, lengths=False)
    chain.transitions[torch.ones(5, 5).tril(-1).bool()] = -torch.inf
    chain.transitions[torch.ones(5, 5).triu(2).bool()] = -torch.inf
    chain.start[1:] = -torch.inf
    tags = torch.tensor([0, 0, 1, 1, 2, 3, 3, 4])[:, None].expand(8, 5)
    expect_exact(chain, tags)


def test_no_path_at_all():
    chain, _ = draw(4, 3, 3, lengths=False)
    chain.emissions[2, 1] = -torch.inf
    value, u = room.forward(chain, None, True)
    assert value.isinf().tolist() == [False, True, False] and value[1] < 0
    found = room.backward(chain, None, u, torch.ones(3, dtype=torch.float64), True)
    assert all(t.isfinite().all() for t in found) and not found[0][:, 1].any()
    scores, paths = room.viterbi(chain, 1)
    assert scores[1] == -torch.inf and (paths[1] == -1).all() and (paths[0] >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 5])
def test_nan_stays_in_its_sequence(n):
    chain, tags = draw(6, 9, 20, lengths=False)
    chain.emissions[2, 4, 7] = torch.nan
    value, u = room.forward(chain, tags, True)
    others = torch.arange(9) != 4
    assert value[4].isnan() and value[others].isfinite().all()
    (de,) = room.backward(chain, tags, u, torch.ones(9, dtype=torch.float64), False)
    assert de[:, 4].isnan().any() and de[:, others].isfinite().all()
    _, paths = room.viterbi(chain, n)
    assert (paths[others] >= 0).all() and (paths < 20).all() and (paths >= -1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 3, 6, 40])
def test_ties_give_different_paths(instruction_set, n, dtype):
    """Whole numbers, of which many sums are equal, and so exact: with each tie every path is found
    once."""
    g = torch.Generator().manual_seed(n)
    T, B, K = 3, 4, 3

    def whole(*shape):
        return torch.randint(-1, 2, shape, generator=g).to(dtype)

    chain = Chain(whole(T, B, K), None, whole(K), whole(K), whole(K, K))
    scores, paths = room.viterbi(chain, n)
    for b in range(B):
        every = sorted(score_of(chain, b, p).item() for p in itertools.product(range(K), repeat=T))
        count = min(n, K**T)
        assert scores[b, :count].tolist() == every[::-1][:count]
        found = {tuple(path) for path in paths[b, :count].tolist()}
        assert len(found) == count
        own = [score_of(chain, b, path).item() for path in paths[b, :count].tolist()]
        assert own == scores[b, :count].tolist()


def test_n_best_of_more_tags_than_a_vector(instruction_set):
    chain, _ = draw(9, 7, 21, dtype=torch.float64)
    for n in (2, 4, 7):
        scores, paths = room.viterbi(chain, n)
        best, theirs = eager.viterbi(chain, n)
        torch.testing.assert_close(scores, best, rtol=1e-12, atol=1e-12)
        assert torch.equal(paths, theirs)


@pytest.mark.parametrize("wrong", [20, -1, -100, 2**40])
def test_tags_out_of_range(wrong):
    chain, tags = draw(6, 9, 20)
    step, b = 2, 0  # of all steps
    tags[step, b] = wrong
    _, u = room.forward(chain, None, True)
    message = f"tags: expected 0 to 19, got {wrong} at step 2 of sequence 0"
    for call in (
        lambda: room.forward(chain, tags, False),
        lambda: room.backward(chain, tags, u, torch.ones(9, dtype=torch.float64), True),
    ):
        with pytest.raises(IndexError, match=message):
            call()


@pytest.mark.parametrize("wrong", [7, -1])
def test_lengths_out_of_range(wrong):
    chain, _ = draw(6, 9, 4)
    lengths = chain.lengths.clone()
    lengths[5] = wrong
    with pytest.raises(
        ValueError, match=f"lengths: expected 0 to T = 6, got {wrong} of sequence 5"
    ):
        room.viterbi(chain._replace(lengths=lengths), 1)


def test_sizes_that_do_not_fit():
    chain, tags = draw(4, 3, 5)
    for wrong in (
        chain._replace(start=chain.start[:4]),
        chain._replace(transitions=chain.transitions[:4]),
        chain._replace(lengths=chain.lengths[:2]),
        chain._replace(end=chain.end.float()),
    ):
        with pytest.raises(RuntimeError, match="do not fit together"):
            room.forward(wrong, None, False)
    with pytest.raises(RuntimeError, match="do not fit together"):
        room.forward(chain, tags[:3], False)


def test_one_gradient_for_all():
    """As a sum's backward gives it: expanded."""
    chain, tags = draw(7, 9, 5)
    _, u = room.forward(chain, tags, True)
    one = torch.tensor(1.5, dtype=torch.float64).expand(9)
    found = room.backward(chain, tags, u, one, True)
    assert all(map(torch.equal, found, room.backward(chain, tags, u, one.contiguous(), True)))


def test_backward_twice_gives_the_same():
    chain, tags = draw(20, 13, 20, dtype=torch.float32)
    _, u = room.forward(chain, tags, True)
    kept, dvalue = u.clone(), torch.randn(13)
    first = room.backward(chain, tags, u, dvalue, True)
    second = room.backward(chain, tags, u, dvalue, True)
    assert all(map(torch.equal, first, second)) and np.array_equal(u, kept, equal_nan=True)


def test_many_lengths(threads):
    """More sequences than a tile, of every length, which leave it one by one."""
    T, B, K = 40, 41, 18
    chain, tags = draw(T, B, K)
    chain = chain._replace(lengths=torch.arange(B) % (T + 1))
    beyond = torch.arange(T)[:, None] >= chain.lengths
    g = torch.Generator().manual_seed(3)
    emissions = torch.randn(T, B, K, generator=g, dtype=torch.float64)
    emissions[beyond] = torch.nan
    tags = torch.randint(K, (T, B), generator=g).masked_fill(beyond, 2**50)
    chain = chain._replace(emissions=emissions)
    threads(2)
    found = everything(chain, tags, 1)
    for got, want in zip(found, expected(chain, tags), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    assert not found[1][beyond].any()
    for b, n in enumerate(lengths_of(chain)):
        path = found[6][b, 0]
        assert (path[n:] == -1).all() and (path[:n] >= 0).all()
        assert score_of(chain, b, path[:n].tolist()).item() == pytest.approx(found[5][b].item())
