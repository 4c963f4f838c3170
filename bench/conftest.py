"""Options of the benchmarks, and what they record beside the times. See bench/__main__.py."""

from __future__ import annotations

import datetime

import pytest

torch = pytest.importorskip("torch")

from bench import limit, measure  # noqa: E402
from bench.peers import PEERS, named  # noqa: E402
from bench.remote import Remote  # noqa: E402
from bench.workloads import matching  # noqa: E402

SKIPPED: dict[str, str] = {}
WRONG: dict[str, str] = {}
VERSIONS: dict[str, str] = {}


def pytest_addoption(parser):
    group = parser.getgroup("fastseq")
    group.addoption("--workloads", default=None, help="patterns of names, separated by blanks")
    group.addoption("--backends", default=None, help="backends to time beside the chosen one")
    group.addoption("--peers", default=None, help="other libraries to time on the same workloads")
    group.addoption("--threads", type=int, default=None, help="threads of torch")
    group.addoption("--rounds", type=int, default=40, help="rounds of a case at most")
    group.addoption("--seconds", type=float, default=1.5, help="what a case may take in rounds")
    group.addoption("--limit", type=float, default=60.0, help="cases above this many s are skipped")


def pytest_configure(config):
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))


def pytest_generate_tests(metafunc):
    if {"workload", "way"} <= set(metafunc.fixturenames):
        cases = [
            pytest.param(workload, way, id=f"{workload.name}-{way}")
            for workload in matching(metafunc.config.getoption("--workloads"))
            for way in ("forward", "training")
            if workload.training or way == "forward"
        ]
        metafunc.parametrize(("workload", "way"), cases)


@pytest.fixture(scope="session")
def peers(request):
    """The processes of the peers that are installed."""
    limit.possible(torch.get_num_threads())  # before there are any
    found = []
    for name in named(request.config.getoption("--peers")):
        reason = PEERS[name].available()
        if reason is None:
            found.append(Remote(name, torch.get_num_threads()))
            VERSIONS[name] = found[-1].version
        else:
            VERSIONS[name] = f"not available: {reason}"
    yield found
    for peer in found:
        peer.close()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.skipped and isinstance(report.longrepr, tuple):
        SKIPPED[item.callspec.id] = report.longrepr[2].removeprefix("Skipped: ")
    if call.excinfo is not None and call.excinfo.errisinstance(measure.WrongNumbers):
        WRONG[item.callspec.id] = str(call.excinfo.value)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)
    machine_info.pop("cpu", None)
    machine_info.update(measure.machine())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["datetime"] = datetime.datetime.now(datetime.timezone.utc).isoformat()
    output_json["skipped"] = dict(SKIPPED)
    output_json["wrong"] = dict(WRONG)
    output_json["peers"] = dict(VERSIONS)
    output_json["settings"] = {
        name: config.getoption(f"--{name}") for name in ("rounds", "seconds", "limit")
    }
