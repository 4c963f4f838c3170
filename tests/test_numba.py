"""What is the Numba backend's own: threads, forks, concurrent callers, and the cache on disk."""

import ctypes
import os
import re
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq.backends import load, openmp
from fastseq.backends.numba_threads import row_ranges
from fastseq.cells import CELLS

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(isinstance(load("numba"), str), reason=str(load("numba")))


def python(script: str, **env: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def layer(name: str = "GRU", **options) -> torch.nn.Module:
    torch.manual_seed(0)
    return getattr(fastseq, name)(24, 40, backend="numba", **options)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [0, 1, 2, 5, 64])
@pytest.mark.parametrize("recurrences", [1, 2])
def test_row_ranges_cover_every_row_once(recurrences, rows, threads):
    ranges = row_ranges(recurrences, rows, 1000, 1e6, threads)
    for r in range(recurrences):
        seen = [b for which, first, last in ranges if which == r for b in range(first, last)]
        assert seen == list(range(rows))
    assert len(ranges) <= max(threads, recurrences)


def test_short_work_stays_on_the_caller():
    assert row_ranges(1, 8, 1, 1e3, 2) == [(0, 0, 8)]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("name", ["RNN", "LSTM", "GRU"])
def test_thread_count_does_not_change_the_output(name, zoneout, two_threads):
    m = layer(name, bidirectional=True, zoneout=zoneout)
    x = torch.randn(150, 33, 24, requires_grad=True)

    def call():
        y, _ = m(x, seed=5)
        return y.detach(), *torch.autograd.grad(y.square().sum(), x)

    of_two = call()
    torch.set_num_threads(1)
    for one, other in zip(call(), of_two, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("units", [1, 3, 4, 7, 31, 32, 33, 64, 257])
def test_masks_have_the_bits_of_torchs_operations(units, threads, two_threads, monkeypatch):
    """Seeds with their highest bit set, row ids of 48 bits; by threads, and whole."""
    from fastseq.backends import numba_masks
    from fastseq.ops import masks

    torch.set_num_threads(threads)
    monkeypatch.setattr(numba_masks, "_SHARE", 1)
    ids = torch.tensor([3, 2**32 + 5, 2**48 - 1, 17, 0])
    for seed in (0, -2, 0x0123456789ABCDEF):
        for steps in (None, torch.tensor([0, 2**31, 7, 2, 1])):
            for threshold in (0, 2**30, 2**32):
                for some in (slice(None), slice(0, 0), slice(None, None, 2)):
                    when = None if steps is None else steps[some]
                    given = torch.tensor(seed), [0, 65535, 37], ids[some], when, units, threshold
                    found = load("numba").keep(*given)
                    assert torch.equal(found, masks.by_operations(*given))


def test_masks_of_other_tensors_are_left_to_torch():
    keep, seed, ids = load("numba").keep, torch.tensor(1), torch.arange(3)
    assert keep(seed, [0], ids, None, 4, 5) is not None
    assert keep(seed, [0], ids.to("meta"), None, 4, 5) is None
    assert keep(seed, [0], ids.int(), None, 4, 5) is None
    assert keep(seed, [0], ids, ids.int(), 4, 5) is None


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_the_python_pool_gives_the_same_bits(name, two_threads, monkeypatch):
    """Where torch's own pool cannot be entered."""
    from fastseq.backends import numba_threads

    m = layer(name, bidirectional=True)
    x = torch.randn(150, 33, 24, requires_grad=True)

    def call():
        y, _ = m(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), [x, *m.parameters()])]

    expected = call()
    monkeypatch.setattr(openmp, "parallel", lambda: None)
    monkeypatch.setattr(numba_threads, "_pool", None)
    for one, other in zip(call(), expected, strict=True):
        assert torch.equal(one, other)
    assert numba_threads._pool is not None


def test_inside_another_parallel_region(two_threads):
    """There OpenMP gives no more threads: the caller runs all tasks."""

    gomp_parallel = openmp.parallel()
    if gomp_parallel is None:
        pytest.skip("torch's OpenMP runtime cannot be entered here")
    m = layer("GRU")
    x = torch.randn(80, 12, 24)
    expected = m(x)[0].detach()
    outputs = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_):
        with torch.no_grad():
            outputs.append(m(x)[0])

    gomp_parallel(ctypes.cast(body, ctypes.c_void_p), None, 2, 0)
    assert len(outputs) == 2
    assert all(torch.equal(y, expected) for y in outputs)


def test_concurrent_callers_agree(two_threads):
    m = layer("LSTM", bidirectional=True)
    inputs = [torch.randn(60, 16, 24, requires_grad=True) for _ in range(6)]

    def call(x):
        y, _ = m(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    alone = [call(x) for x in inputs]
    with ThreadPoolExecutor(6) as callers:
        for _ in range(3):
            for (y, dx), (y1, dx1) in zip(alone, callers.map(call, inputs), strict=True):
                assert torch.equal(y, y1)
                assert torch.equal(dx, dx1)


class Recurrent(torch.utils.data.Dataset):
    """Runs a layer for each item, in the worker process."""

    def __init__(self, m, x):
        self.m, self.x = m, x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, k):
        with torch.no_grad():
            return self.m(self.x[k])[0]


FORKED = """
    import torch, fastseq
    from torch.utils.data import DataLoader
    from tests.test_numba import Recurrent, layer
    torch.set_num_threads(2)
    m = layer("GRU")
    x = torch.randn(4, 100, 16, 24)
    with torch.no_grad():
        m(x[0])  # torch's pool lives in the parent
        expected = torch.stack([m(item)[0] for item in x])
        loader = DataLoader(Recurrent(m, x), batch_size=2, num_workers=2,
                            multiprocessing_context="fork")
        got = torch.cat(list(loader))
        assert torch.equal(got, expected)
        assert torch.equal(m(x[1])[0], expected[1])  # and still works afterwards
    print("same")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_data_loader_after_fork():
    assert python(FORKED) == "same"


FORKED_WITH_THREADS = """
    import os, torch, fastseq
    from tests.test_numba import layer
    torch.set_num_threads(2)
    m = layer("GRU")
    x = torch.randn(60, 16, 24)  # too small for torch to share its own operations out
    with torch.no_grad():
        expected = m(x)[0]
        from fastseq.backends import numba_threads
        child = os.fork()
        if child == 0:
            same = (m(x)[0].numpy() == expected.numpy()).all()
            os._exit(0 if same and numba_threads._pool is not None else 1)
        _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_makes_a_pool_of_its_own():
    assert python(FORKED_WITH_THREADS) == "0"


# Numba's disk cache knows a function by file, name and bytecode, not by what its globals mean.

CACHED = """
    import numpy, numba
    from numba import njit
    from fastseq.backends import numba_loops, numba_simd
    from fastseq.cells import CELLS, bind
    import fastseq.cells.elman as elman
    import torch

    {edit}
    x = torch.tensor([[[1.0]]])
    one = torch.ones(1, 1)
    y, _ = __import__("fastseq").rnn(x, (3 * one, one), backend="numba")
    kernel = numba_loops.forward_kernel(CELLS["rnn_tanh"], numpy.float32, None)
    print(f"{{y.item():.4f}}", kernel.compiled.cache_hits)
"""

EDITED_VOCABULARY = """
    original = numba_loops.simd
    def simd(dtype):
        names = original(dtype)
        return type(names)(**{**vars(names), "tanh": names.sigmoid})
    numba_loops.simd = simd
"""

EDITED_TEXT = """
    import dataclasses
    def rnn_tanh_forward(a_h):
        h = tanh(a_h + a_h)
        return (h,)
    def rnn_tanh_backward(dh, h):
        d = dh * dtanh(h)
        return (d + d,)
    cell = CELLS["rnn_tanh"]
    phase = dataclasses.replace(
        cell.phases[0], forward=rnn_tanh_forward, backward=rnn_tanh_backward
    )
    CELLS["rnn_tanh"] = dataclasses.replace(cell, phases=(phase,))
"""


def test_disk_cache_tells_vocabularies_and_edited_texts_apart(tmp_path):
    def fresh(edit):
        return python(
            textwrap.dedent(CACHED).format(edit=textwrap.dedent(edit)),
            NUMBA_CACHE_DIR=str(tmp_path),
        ).split()

    assert fresh("") == ["0.9951", "0"]
    assert fresh("") == ["0.9951", "1"]
    assert fresh(EDITED_VOCABULARY) == ["0.9526", "0"]
    assert fresh(EDITED_TEXT) == ["1.0000", "0"]
    assert fresh("") == ["0.9951", "1"]


NOWHERE = """
    import numba.core.caching, torch, fastseq
    numba.core.caching.CacheImpl._locator_classes = []
    y, _ = fastseq.GRU(3, 4, backend="numba")(torch.randn(5, 2, 3))
    print(y.shape[0])
"""


def test_without_a_folder_for_the_cache():
    """A read-only installation and no home: kernels are compiled in each process."""
    assert python(NOWHERE) == "5"


def test_every_cell_has_its_kernels():
    from fastseq.backends.numba_loops import Zone, backward_source, forward_source

    zones = [Zone(kind, projected) for kind in ("stay", "part") for projected in (False, True)]
    for cell in CELLS.values():
        for zone in (None, *(z for z in zones if cell.can_project or not z.projected)):
            for source in (forward_source(cell, zone), backward_source(cell, zone)):
                compile(source, cell.name, "exec")
                assert zone or not re.search("stay|part_[0-9]|made", source), "a plain kernel"
