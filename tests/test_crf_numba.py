"""Chains in Numba, besides what test_crf_rooms.py holds all rooms to: bits, words, and what is
refused."""

import ctypes

import numba
import numpy as np
import pytest
import torch
from chains import draw, gradients
from vocabulary import ulp_error

from fastseq.backends import crf
from fastseq.backends.crf import Chain, eager
from fastseq.backends.crf import numba as room
from fastseq.backends.crf.numba_words import words
from fastseq.backends.numba_simd import JIT, simd
from fastseq.cells import bind


def everything(chain, tags):
    """Values, gradients and paths."""
    B = chain.emissions.shape[1]
    value, u = room.forward(chain, tags, True)
    dvalue = torch.linspace(-1, 2, B, dtype=value.dtype)
    return [value, *room.backward(chain, tags, u, dvalue, True), *room.viterbi(chain, 2)]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bits_do_not_depend_on_threads(threads, monkeypatch):
    """Of 9 groups, some of whose rows end early, in 9 parts."""
    chain, tags = draw(30, 70, 5)
    shared = []
    run = room.run
    monkeypatch.setattr(room, "run", lambda *given: (shared.append(given[-1]), run(*given)))
    monkeypatch.setattr(room, "_SHARE", 1)
    threads(1)
    alone = everything(chain, tags)
    threads(4)
    assert all(same(everything(chain, tags), alone) for _ in range(5))
    assert shared == [1] * 3 + [4] * 15


def test_each_thread_has_a_room_of_its_own(threads, monkeypatch):
    """The fourth thread, alone, writes nothing where the others would."""
    chain, tags = draw(30, 70, 5)
    threads(1)
    alone = everything(chain, tags)
    rooms = []

    class Poisoned(room.Room):
        def __init__(self, count, dtype):
            super().__init__(count, dtype)
            self.numbers = self.tensor[(self.address - self.tensor.data_ptr()) // 8 :][:count]
            self.numbers.fill_(7.25)
            rooms.append(self.numbers.view(4, -1))

    def fourth(call, address, data, count):
        ctypes.c_int64.from_address(data + 16).value = 3
        call(data)

    monkeypatch.setattr(room, "Room", Poisoned)
    monkeypatch.setattr(room, "run", fourth)
    monkeypatch.setattr(room, "_SHARE", 1)
    threads(4)
    assert same(everything(chain, tags), alone)
    assert all((r[:3] == 7.25).all() and (r[3] != 7.25).any() for r in rooms) and len(rooms) == 3


def test_a_sequence_has_the_same_bits_in_any_batch():
    chain, tags = draw(9, 21, 5)
    whole = everything(chain, tags)
    for b in (0, 13):
        one = chain._replace(
            emissions=chain.emissions[:, b : b + 1], lengths=chain.lengths[b : b + 1]
        )
        value, u = room.forward(one, tags[:, b : b + 1], True)
        assert torch.equal(value, whole[0][b : b + 1])
        dvalue = torch.linspace(-1, 2, 21, dtype=torch.float64)[b : b + 1]
        (de,) = room.backward(one, tags[:, b : b + 1], u, dvalue, False)
        assert torch.equal(de[:, 0], whole[1][:, b])


@pytest.mark.parametrize("K", [8, 9, 31])
def test_whole_and_half_vectors(K):
    """Against torch operations, with more rows of counts than are multiplied at a time."""
    chain, tags = draw(23, 11, K)
    value, _ = room.forward(chain, tags, False)
    torch.testing.assert_close(value, eager.forward(chain, tags, False)[0])
    dvalue = torch.linspace(-1, 2, 11, dtype=torch.float64)
    ours, theirs = (gradients(r, chain, tags, dvalue) for r in (room, eager))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    if K == 9:
        for got, want in zip(room.viterbi(chain, 6), eager.viterbi(chain, 6), strict=True):
            torch.testing.assert_close(got, want)


def test_a_long_sequence_loses_nothing_in_float32():
    single, _ = draw(3000, 1, 4, lengths=False, dtype=torch.float32)
    exact = Chain(*(None if t is None else t.double() for t in single))
    found = []
    for chain in (single, exact):
        value, u = room.forward(chain, None, True)
        found.append([value, *room.backward(chain, None, u, torch.ones_like(value), True)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_what_backward_gets_may_have_any_strides():
    chain, tags = draw(6, 5, 3)
    _, u = room.forward(chain, tags, True)
    dvalue = torch.linspace(-1, 2, 10, dtype=torch.float64)[::2]
    assert same(
        room.backward(chain, tags, u.transpose(0, 2).contiguous().transpose(0, 2), dvalue, True),
        room.backward(chain, tags, u, dvalue.contiguous(), True),
    )


def test_where_every_path_is_forbidden():
    chain, _ = draw(4, 3, 3, lengths=False)
    chain.emissions[2, 1] = -torch.inf
    value, u = room.forward(chain, None, True)
    assert value.isneginf().tolist() == [False, True, False]
    found = room.backward(chain, None, u, torch.ones(3, dtype=torch.float64), True)
    assert all(gradient.isfinite().all() for gradient in found) and not found[0][:, 1].any()


def test_nan_is_told():
    chain, tags = draw(4, 3, 3, lengths=False)
    chain.emissions[1, 2, 0] = torch.nan
    value, u = room.forward(chain, tags, True)
    assert value.isnan().tolist() == [False, False, True]
    (de,) = room.backward(chain, tags, u, torch.ones(3, dtype=torch.float64), False)
    assert de[:, 2].isnan().any() and de[:, :2].isfinite().all()


def test_tags_and_lengths_are_checked_where_they_are_read():
    chain, tags = draw(8, 12, 4)
    tags[3, 7], tags[5, 0] = 4, -1
    chain.lengths[7] = 6
    with pytest.raises(IndexError, match="expected 0 to 3, got 4 at step 3 of sequence 7"):
        room.forward(chain, tags, False)
    chain.lengths[7] = 3  # beyond it, tags may be anything
    with pytest.raises(IndexError, match="got -1 at step 5 of sequence 0"):
        room.forward(chain, tags, False)
    for length in (9, -1):
        chain.lengths[2] = length
        with pytest.raises(ValueError, match=f"lengths: expected 0 to T = 8, got .*{length}"):
            room.forward(chain, None, False)


def test_other_devices_are_declined():
    with pytest.raises(NotImplementedError, match="numba's kernels run on the CPU, not on cuda"):
        crf.select(torch.float32, "cuda", 3, "numba")


def _apply(x, y, n):
    for i in range(0, n, LANES):  # noqa: F821  (bound below)
        store(y, i, word(load(x, i)))  # noqa: F821


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "name, domains, limit",
    [
        ("exp", {np.float32: (-87.3, 20.0), np.float64: (-708.3, 20.0)}, 1.5),
        ("log", {np.float32: (1e-30, 100.0), np.float64: (1e-300, 100.0)}, 2.0),
    ],
)
def test_the_error_of_a_word(name, domains, limit, dtype):
    s = simd(dtype)
    label = f"{name}_{s.fingerprint}"
    names = {"LANES": s.LANES, "load": s.load, "store": s.store, "range": range}
    apply = numba.njit(**JIT)(bind(_apply, label, **names, word=words(dtype, s.LANES)[name]))
    x = np.linspace(*domains[dtype], 2**14).astype(dtype)
    if name == "log":
        near = np.linspace(0.6, 1.6, 2**13)
        x = np.concatenate([np.geomspace(*domains[dtype], 2**13), near]).astype(dtype)
    y = np.zeros_like(x)
    apply(x.ctypes.data, y.ctypes.data, len(x))
    truth = getattr(np, name)(x.astype(np.float64 if dtype is np.float32 else np.longdouble))
    if dtype is np.float32 or np.finfo(np.longdouble).nmant > 52:
        assert ulp_error(y, truth).max() <= limit
    edges = np.full(s.LANES, np.nan, dtype)
    edges[0] = -np.inf if name == "exp" else 1
    apply(edges.ctypes.data, y.ctypes.data, s.LANES)
    assert y[0] == 0 and np.isnan(y[1])


@pytest.mark.parametrize("n", [1, 3])
def test_nan_gives_no_tag_that_there_is_not(n):
    """A lane behind the last tag would be read from what is behind the emissions."""
    chain, _ = draw(6, 2, 4, lengths=False)
    _, paths = room.viterbi(
        chain._replace(emissions=torch.full_like(chain.emissions, torch.nan)), n
    )
    assert ((paths >= -1) & (paths < 4)).all()
