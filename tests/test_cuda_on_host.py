"""The CUDA kernels on the CPU, each thread of a CTA a thread: under the sanitizers."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.cuda_on_host import compiler

ROOT = Path(__file__).parents[1]


def sanitized(*names):
    compiler()
    command = [sys.executable, str(ROOT / "tools" / "sanitize.py"), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    cases, failures = re.search(r"(\d+) cases, (\d+) failures", done.stdout).groups()
    assert int(cases) > 0 and int(failures) == 0


@pytest.mark.parametrize("sanitizer", ["address", pytest.param("thread", marks=pytest.mark.full)])
def test_a_few_under(sanitizer):
    """An LSTM and a cell without a product; ``make sanitize`` runs more."""
    sanitized(sanitizer, "cuda-few")


@pytest.mark.full
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_all_under(sanitizer):
    sanitized(sanitizer, "cuda")
