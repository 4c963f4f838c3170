"""Options, and what every test starts from."""

import random
import zlib

import pytest
import torch
from hypothesis import HealthCheck, settings

from fastseq.backends import load, openmp
from fastseq.cells import CELLS, unregister

processors = openmp.processors  # as it is outside of the tests

_CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
_COMMON = {
    "deadline": None,
    "suppress_health_check": _CHECKS,
    "database": None,
}
settings.register_profile("ordinary", max_examples=8, derandomize=True, **_COMMON)
# Free to find what no run has met. A failure prints the decorator that repeats it; the seed of a
# whole run is printed at its end, and --hypothesis-seed takes it.
settings.register_profile("full", max_examples=80, derandomize=False, print_blob=True, **_COMMON)


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="every combination, where a run takes a sample else"
    )


@pytest.hookimpl(tryfirst=True)  # before Hypothesis reads its seed
def pytest_configure(config):
    settings.load_profile("full" if config.getoption("--full") else "ordinary")
    if config.getoption("--full") and config.getoption("--hypothesis-seed") is None:
        # xdist hands its options on, so all processes of a run have one seed
        config.option.hypothesis_seed = str(random.SystemRandom().randrange(2**32))
    # torch says so once in a process, of its own layer too
    config.addinivalue_line(
        "filterwarnings", "ignore:LSTM with projections is not supported with oneDNN"
    )
    torch.set_num_threads(1)  # the tests run in several processes
    share_among_any_number()


def share_among_any_number():
    """Have the kernels take as many threads as torch has, on a machine of fewer cores, too."""
    openmp.processors = lambda: 4096
    native = load("native")
    if not isinstance(native, str):
        native._cpu.use_pool(*openmp.addresses()[:3], 0, 0)


@pytest.fixture
def cells_go_again():
    """Cells that a test defines are gone behind it: other tests ask all that there are."""
    before = set(CELLS)
    yield
    for name in set(CELLS) - before:
        unregister(name)


def pytest_runtest_setup(item):
    """A test draws the same numbers alone and in any order."""
    torch.manual_seed(zlib.crc32(item.nodeid.encode()))


@pytest.fixture
def threads():
    """Sets how many threads torch has, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--full"):
        seed = config.getoption("--hypothesis-seed")
        terminalreporter.write_line(f"Hypothesis drew by --hypothesis-seed={seed}")


#: The cells of which an ordinary run takes every case: torch.nn's, and one of each kind of loop
#: that torch.nn's do not go through.
EVERY = ("rnn_tanh", "rnn_relu", "lstm", "gru", "gru_reset_before", "indrnn")
#: Of the library's other cells, one case in so many of a test that takes cells in turn: they go the
#: same ways, and nothing names them.
SAMPLE = 5


def is_long(item):
    """Whether a test is of the long form alone."""
    if "full" in item.keywords:
        return True
    cell = item.callspec.params.get("cell") if hasattr(item, "callspec") else None
    rare = isinstance(cell, str) and cell in CELLS and cell not in EVERY
    return rare and zlib.crc32(item.nodeid.encode()) % SAMPLE != 0


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        long = [item for item in items if is_long(item)]
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if not is_long(item)]
    items.sort(key=lambda item: "longest" not in item.keywords)  # xdist deals out from the front
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # a keyword is the checkout's name too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
