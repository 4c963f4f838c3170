"""Chains in Triton on a GPU: numbers against float64, and the same bits twice. Without a CUDA
device they are skipped; test_crf_triton.py has what can be shown without one."""

import pytest
import torch
from chains import draw, gradients

from fastseq.backends import crf
from fastseq.backends.crf import Chain, eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SINGLE, DOUBLE = torch.float32, torch.float64
SIZES = [  # T, B, K, lengths, forbidden
    (1, 2, 1, False, 0.0),
    (40, 300, 9, True, 0.2),
    pytest.param(100, 33, 20, True, 0.0, marks=pytest.mark.core),
    (70, 5, 33, True, 0.1),
    (70, 7, 64, False, 0.0),
]


def room():
    found = crf.load("triton")
    assert not isinstance(found, str), found
    return found


def both(T, B, K, lengths, forbidden, dtype):
    """A chain on the GPU, its tags, and the same numbers in float64 on the CPU."""
    chain, tags = draw(T, B, K, seed=T + K, lengths=lengths, forbidden=forbidden, dtype=dtype)
    exact = Chain(*(t if t is None or t.dtype is torch.int64 else t.double() for t in chain))
    return Chain(*(None if t is None else t.cuda() for t in chain)), tags, exact


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE], ids=["float32", "float64"])
@pytest.mark.parametrize("T, B, K, lengths, forbidden", SIZES)
def test_triton_sums_over_every_path(T, B, K, lengths, forbidden, dtype):
    chain, tags, exact = both(T, B, K, lengths, forbidden, dtype)
    close = {"rtol": 1e-4, "atol": 1e-3} if dtype is SINGLE else {"rtol": 1e-10, "atol": 1e-10}
    for given in (None,) if forbidden else (None, tags):
        on_gpu = None if given is None else given.cuda()
        value, u = room().forward(chain, on_gpu, True)
        truth, _ = eager.forward(exact, given, False)
        torch.testing.assert_close(value.cpu().double(), truth, **close)
        dvalue = torch.linspace(-1, 2, B, dtype=dtype)
        found = room().backward(chain, on_gpu, u, dvalue.cuda(), True)
        again = room().backward(chain, on_gpu, u, dvalue.cuda(), True)
        assert all(map(torch.equal, found, again))
        for got, want in zip(found, gradients(eager, exact, given, dvalue.double()), strict=True):
            torch.testing.assert_close(got.cpu().double(), want, **close)


@pytest.mark.parametrize(
    "n", [pytest.param(1, marks=pytest.mark.core), 5], ids=["the best", "five best"]
)
@pytest.mark.parametrize("T, B, K, lengths, forbidden", [SIZES[0], SIZES[1], SIZES[3], SIZES[4]])
def test_triton_finds_the_best_paths(T, B, K, lengths, forbidden, n):
    chain, _, exact = both(T, B, K, lengths, forbidden, DOUBLE)
    found, truth = room().viterbi(chain, n), eager.viterbi(exact, n)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got.cpu(), want)


@pytest.mark.parametrize("n", [1, 3])
def test_triton_tells_nan(n):
    chain, _, exact = both(40, 300, 9, True, 0.0, DOUBLE)
    for given in (chain, exact):
        given.emissions[3, ::7, 2] = torch.nan
    found, truth = room().viterbi(chain, n), eager.viterbi(exact, n)
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got.cpu(), want, equal_nan=True)


@pytest.mark.parametrize("K", [128])
def test_triton_at_its_most_tags(K):
    """Of which some registers lie in local memory."""
    chain, tags, exact = both(20, 3, K, True, 0.0, SINGLE)
    value, u = room().forward(chain, tags.cuda(), True)
    torch.testing.assert_close(
        value.cpu().double(), eager.forward(exact, tags, False)[0], rtol=1e-4, atol=1e-3
    )
    ones = torch.ones(3)
    found = room().backward(chain, tags.cuda(), u, ones.cuda(), True)
    for got, want in zip(found, gradients(eager, exact, tags, ones.double()), strict=True):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-4, atol=1e-3)
