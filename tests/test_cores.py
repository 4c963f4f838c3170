"""More threads than cores: a call takes no more threads than can run at a time, and its bits do not
depend on how many these are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import processors
from rules import same_bits

import fastseq
from fastseq.backends import load, openmp

ROOT = Path(__file__).resolve().parents[1]
native = load("native")
needs_native = pytest.mark.skipif(isinstance(native, str), reason=str(native))
MUCH = 1e12  # operations: work for any number of threads

V1 = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


def grouped(folder, membership, files):
    for name, text in files.items():
        path = folder / "mounted" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (folder / "cgroup").write_text(membership)
    return openmp.processors_time(folder / "cgroup", folder / "mounted")


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 2),  # a core and a half: two threads use it
        ("0::/\n", {"cpu.max": "1000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),  # the root of all groups has no limit
        ("", {"cpu.max": "200000 100000\n"}, None),
        # the least of all groups around it
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ("0::/a/b\n", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "400000 100000"}, 3),
        # a container that sees its own group as the root, and is called by the host's name
        ("0::/docker/1f\n", {"cpu.max": "500000 100000"}, 5),
        ("0::/../x\n", {"cpu.max": "500000 100000"}, 5),
        # version 1, alone and beside an empty version 2
        (
            "3:cpu,cpuacct:/docker/1f\n2:memory:/m\n0::/\n",
            {f"cpu,cpuacct/{V1[0]}": "400000", f"cpu,cpuacct/{V1[1]}": "100000"},
            4,
        ),
        ("1:cpu:/p\n", {f"cpu/p/{V1[0]}": "50000", f"cpu/p/{V1[1]}": "25000"}, 2),
        ("1:cpu:/\n", {f"cpu/{V1[0]}": "-1", f"cpu/{V1[1]}": "100000"}, None),
        ("1:cpuset:/\n", {f"cpu/{V1[0]}": "100000", f"cpu/{V1[1]}": "100000"}, None),
        ("nonsense\n\n", {"cpu.max": "nonsense\n"}, None),
    ],
)
def test_quota(tmp_path, membership, files, expected):
    assert grouped(tmp_path, membership, files) == expected


def test_quota_without_the_files(tmp_path):
    """As on any other system."""
    assert openmp.processors_time(tmp_path / "cgroup", tmp_path) is None


def test_cores_stay_within_the_quota(monkeypatch):
    monkeypatch.setattr(openmp, "processors", lambda: 4)
    for quota, cores in ((None, 4), (1, 1), (3, 3), (5, 4)):
        monkeypatch.setattr(openmp, "quota", lambda quota=quota: quota)
        assert openmp.cores() == cores


def test_without_the_runtime(monkeypatch):
    """As on any other system."""
    monkeypatch.setattr(openmp, "functions", lambda: None)
    assert openmp.addresses() == (0, 0, 0, 0)
    assert 1 <= processors() <= os.cpu_count()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert processors() == os.cpu_count()


@pytest.fixture
def limited():
    """Sets the quota that the kernels keep to, and whether they ask for processors, until the test
    ends."""

    def limit(quota, processors=True):
        addresses = openmp.addresses()
        native._cpu.use_pool(*addresses[:3], addresses[3] if processors else 0, quota)

    yield limit
    limit(0, False)  # as conftest.py has it


@needs_native
def test_threads_of_a_call(limited):
    limited(0, processors=False)
    assert native._cpu.threads(64, MUCH) == 64
    assert native._cpu.threads(64, 7.6e6) == 3  # the work alone decides
    assert native._cpu.threads(64, 1e5) == native._cpu.threads(1, MUCH) == 1
    limited(3, processors=False)
    assert native._cpu.threads(64, MUCH) == 3
    assert native._cpu.threads(2, MUCH) == 2
    if openmp.functions() is None:
        return
    limited(0)
    assert native._cpu.threads(4096, MUCH) == min(4096, openmp.functions()[3]())
    limited(1)
    assert native._cpu.threads(64, MUCH) == 1


AFFINITY = """
import os
import torch
from fastseq.backends import load, openmp
native = load("native")
quota = openmp.quota() or 1 << 30
def check():
    expected = min(64, quota, len(os.sched_getaffinity(0)))
    assert openmp.cores() == expected, (openmp.cores(), expected)
    assert isinstance(native, str) or native._cpu.threads(64, 1e12) == expected
check()
every = os.sched_getaffinity(0)
for cores in ({min(every)}, every):
    os.sched_setaffinity(0, cores)
    check()
"""


@pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity") or openmp.functions() is None, reason="of Linux"
)
def test_affinity_may_change():
    """A call takes as many threads as there are processors now. The process starts with the limit,
    which conftest.py lifts for the tests."""
    unbound = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", AFFINITY], cwd=ROOT, env=unbound, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


CALLS = [
    (fastseq.LSTM, {"B": 1}),  # its units are shared
    (fastseq.LSTM, {"B": 16}),  # its rows
    (fastseq.GRU, {"B": 1, "bidirectional": True}),
    (fastseq.RNN, {"B": 2, "num_layers": 2}),
]


@needs_native
@pytest.mark.parametrize(("kind", "options"), CALLS)
def test_bits_do_not_depend_on_it(kind, options, threads, limited):
    options = dict(options)
    x = torch.randn(40, options.pop("B"), 40)
    m = kind(40, 130, backend="native", deterministic=True, **options)

    def call():
        y, _ = m(x)
        return [y.detach(), *torch.autograd.grad(y.sum(), list(m.parameters()))]

    threads(1)
    alone = call()
    threads(8)
    for quota, asks in ((0, False), (3, False), (2, True)):
        limited(quota, asks)
        for ours, expected in zip(call(), alone, strict=True):
            assert same_bits(ours, expected)


@needs_native
def test_a_stream_keeps_to_it(threads, limited):
    m = fastseq.LSTM(128, 256)
    steps = torch.randn(3, 32, 128)

    def run():
        handle = fastseq.streaming(m, batch=32)
        return [handle.step(x).clone() for x in steps]

    threads(1)
    alone = run()
    threads(8)
    for quota in (0, 2):
        limited(quota, processors=False)
        for ours, expected in zip(run(), alone, strict=True):
            assert same_bits(ours, expected)
