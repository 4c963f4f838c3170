"""Each room of the conditional random field against every path, one by one, and against float64."""

import os

import pytest
import torch
from chains import brute, draw, every_path, gradients, lengths_of, score_of

from fastseq.backends import crf
from fastseq.backends.crf import Chain, eager

#: Under Triton's interpreter, of which test_crf_triton.py starts a process, its room alone.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = ("triton",) if INTERPRETED else ("native", "numba", "eager")
SMALL = [  # T, B, K, lengths, forbidden
    (1, 2, 1, False, 0.0),
    (4, 3, 3, True, 0.0),
    (5, 5, 2, True, 0.3),
    (3, 9, 4, False, 0.2),
]


def room_named(name):
    found = crf.load(name)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture(params=CPU)
def room(request):
    return room_named(request.param)


def expected_gradients(chain, tags, dvalue):
    """From every path; zeros beyond the lengths."""
    leaves = [t.clone().requires_grad_() for t in (chain.emissions, *chain[2:])]
    value = brute(Chain(leaves[0], chain.lengths, *leaves[1:]), tags)
    found = torch.autograd.grad(value, leaves, dvalue, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, found, strict=True)]


@pytest.mark.parametrize("tagged", [False, True])
@pytest.mark.parametrize("T, B, K, lengths, forbidden", SMALL)
def test_a_chain_sums_over_every_path(room, T, B, K, lengths, forbidden, tagged):
    chain, tags = draw(T, B, K, seed=T + K, lengths=lengths, forbidden=forbidden)
    tags = tags if tagged else None
    truth = brute(chain, tags)
    value, _ = room.forward(chain, tags, False)
    torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-12)
    possible = truth.isfinite()
    if tagged:  # a forbidden path has no gradient worth the name
        chain = chain._replace(
            emissions=chain.emissions[:, possible],
            lengths=None if chain.lengths is None else chain.lengths[possible],
        )
        tags = tags[:, possible]
    dvalue = torch.linspace(-1, 2, int(possible.sum()) if tagged else B, dtype=torch.float64)
    found = gradients(room, chain, tags, dvalue)
    for got, want in zip(found, expected_gradients(chain, tags, dvalue), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_tag_may_be_impossible_at_a_step(room):
    chain, _ = draw(4, 2, 3, lengths=False)
    chain.emissions[1, 0, 2] = chain.emissions[2, :, 0] = chain.emissions[3, 1, :2] = -torch.inf
    torch.testing.assert_close(room.forward(chain, None, False)[0], brute(chain))
    ones = torch.ones(2, dtype=torch.float64)
    for got, want in zip(
        gradients(room, chain, None, ones), expected_gradients(chain, None, ones), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("T, B, K, lengths, forbidden", SMALL)
def test_the_best_paths_are_those_of_all(room, T, B, K, lengths, forbidden, n):
    chain, _ = draw(T, B, K, seed=T * K, lengths=lengths, forbidden=forbidden)
    scores, paths = room.viterbi(chain, n)
    assert scores.shape == (B, n) and paths.shape == (B, n, T) and paths.dtype is torch.int64
    for b, every in enumerate(every_path(chain)):
        length = lengths_of(chain)[b]
        every = sorted((s.item() for _, s in every if s > -torch.inf), reverse=True)
        expected = (every + [-torch.inf] * n)[:n]
        torch.testing.assert_close(
            scores[b], torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
        )
        found = [tuple(path) for path in paths[b, : len(every), :length].tolist()]
        assert len(set(found)) == len(found)
        for path, score in zip(found, scores[b].tolist(), strict=False):
            assert score_of(chain, b, path).item() == pytest.approx(score, rel=1e-12, abs=1e-12)
        assert (paths[b, :, length:] == -1).all() and (paths[b, len(every) :] == -1).all()


def test_paths_of_one_score_are_all_found(room):
    """Each once: all 8 paths, which score alike, and the 12 best of 27."""
    same = torch.zeros(3, 1, 2, dtype=torch.float64)
    best = torch.tensor([[[1.0, 1, 0]], [[0, 0, 0]], [[2, 2, 1]]], dtype=torch.float64)
    for e, n, score in ((same, 8, 0.0), (best, 12, 3.0)):
        K = e.shape[2]
        scores, paths = room.viterbi(
            Chain(e, None, e.new_zeros(K), e.new_zeros(K), e.new_zeros(K, K)), n
        )
        assert scores.tolist() == [[score] * n] and len({*map(tuple, paths[0].tolist())}) == n


@pytest.mark.parametrize("T, B, K", [(40, 7, 20), (13, 33, 5), (25, 2, 67)])
def test_float32_is_close_to_float64(room, T, B, K):
    """Within twice the error of the plain form in float32, as everywhere."""
    exact, tags = draw(T, B, K, seed=K, scale=2.0)
    single = Chain(*(t if t is None or not t.is_floating_point() else t.float() for t in exact))
    exact = Chain(*(t if t is None or not t.is_floating_point() else t.double() for t in single))
    dvalue = torch.linspace(-1, 2, B, dtype=torch.float64)
    truth = [eager.forward(exact, tags, False)[0], *gradients(eager, exact, tags, dvalue)]
    plain = [eager.forward(single, tags, False)[0]]
    plain += gradients(eager, single, tags, dvalue.float())
    found = [room.forward(single, tags, False)[0], *gradients(room, single, tags, dvalue.float())]
    for got, other, want in zip(found, plain, truth, strict=True):
        assert got.dtype is torch.float32

        def errors(a, want=want):
            gap = (a.double() - want).abs()
            return torch.stack([gap.square().mean().sqrt(), gap.max()])

        slack = 4 * torch.finfo(torch.float32).eps * want.abs().max()
        assert (errors(got) <= 2 * errors(other) + slack).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_far_apart_lose_nothing(room, dtype):
    """exp of a score underflows where another tag is e^200 ahead, and then that tag ends."""
    K, far = 3, 200.0 if dtype is torch.float32 else 2000.0
    chain, tags = draw(6, 4, K, lengths=False, dtype=dtype)
    chain.emissions[2, :, 0] += far
    chain.emissions[3, :, 1:] -= 2 * far
    chain.transitions[
        0
    ] = -torch.inf  # nothing follows tag 0: what was e^200 behind is all there is
    chain.transitions[1, 2] = -far
    tags[:] = 1
    exact = Chain(*(None if t is None else t.double() for t in chain))
    value, _ = room.forward(chain, tags, False)
    truth = brute(exact, tags)
    assert truth.isfinite().all()
    close = {"rtol": 1e-5, "atol": 2e-4} if dtype is torch.float32 else {"rtol": 0, "atol": 1e-9}
    torch.testing.assert_close(value.double(), truth, **close)
    ones = torch.ones(4, dtype=dtype)
    for got, want in zip(
        gradients(room, chain, tags, ones),
        expected_gradients(exact, tags, ones.double()),
        strict=True,
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("T, B", [(0, 3), (4, 0), (0, 0)])
def test_nothing_gives_nothing(room, T, B):
    chain, tags = draw(T, B, 3, lengths=False)
    assert room.forward(chain, tags, False)[0].tolist() == [0.0] * B
    scores, paths = room.viterbi(chain, 2)
    assert paths.shape == (B, 2, T)
    assert T or scores.tolist() == [[0.0, -torch.inf]] * B
    for gradient in gradients(room, chain, tags, torch.ones(B, dtype=torch.float64)):
        assert not gradient.any()


def test_layouts_and_inputs_are_left_alone(room):
    """Any strides are read, and nothing is written to what is given."""
    chain, tags = draw(5, 4, 3)
    wide = torch.full((4, 5, 8), torch.nan, dtype=torch.float64)
    wide[:, :, 2:5] = chain.emissions.transpose(0, 1)
    of_tags = wide.permute(2, 0, 1).contiguous().permute(1, 2, 0)  # a tag's numbers together
    for layout in (wide, of_tags):
        read_alike(room, chain, tags, layout[:, :, 2:5].transpose(0, 1))


def read_alike(room, chain, tags, emissions):
    strided = chain._replace(
        emissions=emissions, transitions=chain.transitions.t().contiguous().t()
    )
    copies = [t.clone() for t in (*strided, tags)]
    dvalue = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(
        room.forward(strided, tags.t().contiguous().t(), False)[0], brute(chain, tags)
    )
    for got, want in zip(
        gradients(room, strided, tags, dvalue), gradients(room, chain, tags, dvalue), strict=True
    ):
        assert torch.equal(got, want)
    assert torch.equal(room.viterbi(strided, 2)[1], room.viterbi(chain, 2)[1])
    for tensor, copy in zip((*strided, tags), copies, strict=True):
        assert torch.equal(tensor.nan_to_num(7), copy.nan_to_num(7))


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("where", ["emissions", "start", "end", "transitions"])
def test_a_sequence_that_reads_a_nan_has_one_path_of_no_score(room, where, n):
    chain, _ = draw(20, 6, 3, seed=n)
    chain.lengths[2] = 1
    getattr(chain, where)[(17, 0, 1) if where == "emissions" else 1] = torch.nan
    scores, paths = room.viterbi(chain, n)
    least = {"emissions": 18, "transitions": 2}.get(where, 1)
    for b, length in enumerate(chain.lengths.tolist()):
        odd = length >= least and (where != "emissions" or b == 0)
        assert scores[b, 0].isnan() == odd
        assert (paths[b, :, length:] == -1).all() and (paths[b, 0, :length] >= 0).all()
        if odd:
            assert not paths[b, 0, :length].any()
            assert (scores[b, 1:] == -torch.inf).all() and (paths[b, 1:] == -1).all()


def test_no_step_loses_precision_in_float32(room):
    """However many: probabilities sum to 1, and values and scores are totals of float64."""
    T = 100 if INTERPRETED else 3000
    chain, _ = draw(T, 2, 5, lengths=False, scale=2.0, dtype=torch.float32)
    exact = Chain(*(t if t is None else t.double() for t in chain))
    truth = eager.forward(exact, None, False)[0]
    torch.testing.assert_close(
        room.forward(chain, None, False)[0].double(), truth, rtol=1e-6, atol=0
    )
    ones = torch.ones(2)
    of_emissions, *_, of_moves = gradients(room, chain, None, ones)
    want, *_, moves_want = gradients(eager, exact, None, ones.double())
    assert (of_emissions.double().sum(2) - 1).abs().max() < 8e-6
    assert (of_emissions - want).abs().max() < 8e-6
    torch.testing.assert_close(of_moves.double(), moves_want, rtol=1e-5, atol=1e-5)
    for n in (1, 2):
        scores, paths = room.viterbi(chain, n)
        expected = eager.viterbi(exact, n)[0]
        torch.testing.assert_close(scores.double(), expected, rtol=1e-6, atol=0)
        of_paths = eager.score(exact, paths.permute(2, 0, 1))
        torch.testing.assert_close(of_paths, expected, rtol=1e-7, atol=0)


def test_the_best_of_many_close_paths_is_found_in_float32(room):
    """Scores that differ by 1e-3, on totals of which that is about the last place."""
    T, each = (200, 60) if INTERPRETED else (3000, 8)
    chain, _ = draw(T, 2, 5, lengths=False, scale=2e-3, dtype=torch.float32)
    chain = chain._replace(emissions=chain.emissions + each)
    exact = Chain(*(t if t is None else t.double() for t in chain))
    for n in (1, 2):
        paths = room.viterbi(chain, n)[1].permute(2, 0, 1)
        lost = eager.viterbi(exact, n)[0] - eager.score(exact, paths)
        assert lost.abs().max() < 1e-3
