"""tools/mutate.py, which breaks the code in known ways: it tells a mutation that the tests notice
from one that survives, and the tests notice a sample of the real ones."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

SAMPLE = (
    "reset: the reverse direction takes forward's",
    "lengths: the states are not put back in order",
    "cells: the LSTM's gates trade places",
    "layers: the short way takes no heed of the backend named",
)


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mutate(*words):
    command = [sys.executable, str(ROOT / "tools" / "mutate.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def test_every_old_text_stands_once():
    status, said = mutate("--check")
    assert status == 0, said


def test_names_are_told_apart():
    names = [m.name for m in tool("mutations").MUTATIONS]
    assert len(names) == len(set(names)) and set(SAMPLE) <= set(names)


@pytest.mark.full
def test_the_tests_notice_a_sample():
    status, said = mutate(*SAMPLE)
    assert status == 0, said
    assert f"{len(SAMPLE)} killed, 0 survived, 0 not tried" in said


@pytest.fixture
def toy(tmp_path):
    """A tree of one function, whose test looks at one of its two branches."""
    tree = tmp_path / "toy"
    (tree / "tests").mkdir(parents=True)
    (tree / "size.py").write_text("def size(x):\n    return 1 if x > 0 else -1\n")
    (tree / "tests" / "test_size.py").write_text(
        "from size import size\n\n\ndef test_above():\n    assert size(2) == 1\n"
    )
    subprocess.run(["git", "init", "-q"], cwd=tree, check=True)
    return tree


def mutation(name, old, new, test="tests/test_size.py"):
    return tool("mutations").Mutation(name, "size.py", old, new, (test,))


@pytest.mark.full
def test_a_verdict_on_each(toy, capsys):
    before = (toy / "size.py").read_text()
    given = [
        mutation("noticed", "return 1", "return 2"),
        mutation("unseen", "else -1", "else 7"),
        mutation("noticed too", "x > 0", "x < 0"),  # nothing of the ones before is left
    ]
    assert tool("mutate").try_all(toy, given) == 1
    said = capsys.readouterr().out
    assert "killed    noticed\n" in said and "killed    noticed too\n" in said
    assert "survived  unseen\n" in said and "2 killed, 1 survived, 0 not tried" in said
    assert (toy / "size.py").read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("gone", "x", "has its old text 0 times: 'gone'"),
        ("1", "2", "has its old text 2 times: '1'"),
        ("x > 0", "x > 0", "its new text is its old one"),
    ],
)
@pytest.mark.full
def test_an_old_text_that_does_not_stand_once(toy, capsys, old, new, words):
    mutate = tool("mutate")
    for run in (mutate.try_all, mutate.check):
        assert run(toy, [mutation("stale", old, new)]) == 2
        assert words in capsys.readouterr().out


@pytest.mark.full
def test_tests_that_are_not_there_notice_nothing(toy, capsys):
    given = [mutation("no test", "return 1", "return 2", "tests/test_gone.py")]
    assert tool("mutate").try_all(toy, given) == 2
    assert "the tests fail with nothing broken, or do not run" in capsys.readouterr().out
