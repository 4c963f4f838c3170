"""What .github runs is there to be run, and its matrix is what pyproject.toml promises."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
ON = True  # how YAML 1.1 reads the key `on`

each = pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)


def load(path):
    return yaml.safe_load(path.read_text())


def workflow(name):
    return load(ROOT / ".github" / "workflows" / f"{name}.yml")


def steps(path):
    """(job, step) of a workflow."""
    for job in load(path)["jobs"].values():
        yield from ((job, step) for step in job["steps"])


def scripts(path):
    return [step["run"] for _, step in steps(path) if "run" in step]


def test_there_are_workflows():
    assert [path.stem for path in WORKFLOWS] == ["ci", "gpu"]


@each
def test_it_can_only_read_and_ends(path):
    given = load(path)
    assert given["permissions"] == {"contents": "read"}
    assert given["concurrency"]["group"]
    for name, job in given["jobs"].items():
        assert "permissions" not in job and job["timeout-minutes"] <= 120, name
    for _, step in steps(path):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


@each
def test_actions_are_the_official_ones_at_a_major_version(path):
    used = [step["uses"] for _, step in steps(path) if "uses" in step]
    assert used
    for action in used:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", action), action


@each
def test_no_script_holds_an_expression(path):
    """What stands in one becomes part of the script; a variable of the environment does not."""
    for script in scripts(path):
        assert "${{" not in script


@each
def test_no_address_is_named(path):
    assert "://" not in path.read_text()


@each
def test_what_it_runs_is_there(path):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = "\n".join(scripts(path))
    called = re.findall(r"^ *make ([a-z-]+)", text, re.MULTILINE)
    assert called and set(called) <= targets
    for name in re.findall(r"\b(?:bench|examples|tests|tools)/[\w/.]+", text):
        assert (ROOT / name).exists(), name
    for _, step in steps(path):
        for name in step.get("with", {}).get("cache-dependency-path", "").split():
            assert (ROOT / name).exists(), name


def test_the_matrix_is_what_the_package_promises():
    jobs = workflow("ci")["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    classified = re.findall(r"Python :: (3\.\d+)\"", PYPROJECT)
    (oldest,) = re.findall(r'^requires-python = ">=(3\.\d+)"', PYPROJECT, re.MULTILINE)
    assert matrix["python"] == classified and classified[0] == oldest
    (torch,) = re.findall(r'"torch>=([\d.]+)"', PYPROJECT)
    assert matrix["torch"] == [f"torch=={torch}.0", "torch"]
    without = [row["python"] for row in matrix["include"] if row["kernels"] == "without"]
    ends = [classified[0], classified[-1]]
    assert without == jobs["installed"]["strategy"]["matrix"]["python"] == ends


def test_the_readme_runs_in_ci():
    ran = "\n".join(scripts(ROOT / ".github" / "workflows" / "ci.yml"))
    assert re.search(r"^make test +# the tests$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert "make test" in ran.split("\n")
    assert "make lint" in ran.split("\n")


def test_no_pull_request_reaches_the_gpu():
    """One from a fork would run its author's code on the machine of whoever owns the GPU."""
    given = workflow("gpu")
    assert set(given[ON]) == {"workflow_dispatch", "schedule"}
    for job in given["jobs"].values():
        assert {"self-hosted", "gpu"} <= set(job["runs-on"])
    for job in workflow("ci")["jobs"].values():
        assert "self-hosted" not in job["runs-on"]


MAKE = """#!/bin/sh
printf '%s\\n' "$@" > made
"""


@pytest.fixture
def make_gpu(tmp_path):
    """Runs the job's own script, with a make that writes its arguments down."""
    make = tmp_path / "bin" / "make"
    make.parent.mkdir()
    make.write_text(MAKE)
    make.chmod(0o755)
    (script,) = (s for s in scripts(ROOT / ".github" / "workflows" / "gpu.yml") if "make gpu" in s)

    def run(**inputs):
        environment = os.environ | {"PATH": f"{make.parent}:{os.environ['PATH']}"} | inputs
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        made = tmp_path / "made"
        return done, made.read_text().splitlines() if made.exists() else None

    return run


bash = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash, as the runner does")


@bash
def test_the_inputs_arrive_word_for_word(make_gpu):
    done, made = make_gpu(STAGES="smoke test", MINUTES="7.5", WORKLOADS="small-b1-h128* rl-?, *")
    assert done.returncode == 0, done.stderr
    expected = ["gpu", "STAGES=smoke test", "MINUTES=7.5", "WORKLOADS=small-b1-h128* rl-?, *"]
    assert made == expected


@bash
@pytest.mark.parametrize("name", ["STAGES", "MINUTES", "WORKLOADS"])
@pytest.mark.parametrize(
    "given", ['"; id; "', "$(shell id)", "`id`", "a\nid", "a\\", "a#", "a&b", "a/b", "'"]
)
def test_an_input_that_a_shell_would_expand_is_refused(make_gpu, name, given):
    inputs = {"STAGES": "smoke test", "MINUTES": "15", "WORKLOADS": ""} | {name: given}
    done, made = make_gpu(**inputs)
    assert done.returncode == 2 and made is None
    assert "expected letters, digits" in done.stderr


def test_the_inputs_have_the_defaults_of_the_schedule():
    """A scheduled run has no inputs."""
    given = workflow("gpu")
    inputs = given[ON]["workflow_dispatch"]["inputs"]
    made = (step.get("env", {}) for step in given["jobs"]["gpu"]["steps"])
    (environment,) = (names for names in made if "STAGES" in names)
    for name, row in inputs.items():
        default = f" || '{row['default']}'" if row["default"] else ""
        assert environment[name.upper()] == f"${{{{ inputs.{name}{default} }}}}"


def test_the_page_tells_what_the_job_does():
    page = (ROOT / "docs" / "gpu.md").read_text()
    given = workflow("gpu")
    defaults = {k: row["default"] for k, row in given[ON]["workflow_dispatch"]["inputs"].items()}
    assert f'make gpu STAGES="{defaults["stages"]}" MINUTES={defaults["minutes"]}' in page
    assert f"after {given['jobs']['gpu']['timeout-minutes']} minutes" in page.replace("\n", " ")


@pytest.mark.skipif(shutil.which("actionlint") is None, reason="actionlint is not on the PATH")
def test_actionlint_finds_nothing():
    done = subprocess.run(["actionlint"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
