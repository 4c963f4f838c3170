"""Break the code in known ways, in a copy of the tree, and see the tests named for each go red.

    python tools/mutate.py [--list] [--check] [--python] [PATTERN ...]

``tools/mutations.py`` lists them. PATTERN chooses by name, as a shell does. ``--check`` only looks
whether each old text still stands exactly once in its file; ``--python`` leaves out those of csrc/,
for each of which one instruction set is compiled again. The tests are first run with nothing
broken. The exit status is 1 where a mutation survived, and 2 where one could not be tried.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 900  # seconds; tests that hang have noticed, too
FEW_LINES = 12


class CannotTry(Exception):
    """Why, in one sentence."""


def say(line):
    print(line, flush=True)


def broken(root, mutation):
    """The text of the mutation's file with the mutation in it."""
    path = root / mutation.file
    text = path.read_text() if path.exists() else ""
    count = text.count(mutation.old)
    if count != 1:
        raise CannotTry(f"{mutation.file} has its old text {count} times: {mutation.old!r}")
    if mutation.new == mutation.old:
        raise CannotTry("its new text is its old one")
    return text.replace(mutation.old, mutation.new)


def copy(root, to):
    """What git knows or would add, and what was built of it, with the times that caches go by."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=root, text=True).split("\0")
    found = {root / name for name in names if name}
    built = ("fastseq/_cpu*", "fastseq/_cuda*", "build/objects/*", "build/objects/cuda-*/*")
    for pattern in (*built, "fastseq/backends/__pycache__/*.nb?"):
        found.update(root.glob(pattern))
    for path in found:
        if path.is_file():
            copied = to / path.relative_to(root)
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copied)


def python(tree, *words, timeout=None):
    return subprocess.run(
        [sys.executable, *words],
        cwd=tree,
        env=os.environ | {"PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )


def tested(tree, tests):
    """(pytest's exit status, the end of its output); no status where it did not end in time."""
    words = ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    try:
        done = python(tree, *words, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, "\n".join(done.stdout.splitlines()[-FEW_LINES:])


def best_instruction_set(tree):
    """The one the kernels run on here: the only one worth compiling again."""
    asked = "from fastseq.backends import native; print(native.instruction_sets()[0])"
    done = python(tree, "-c", asked)
    if done.returncode:
        raise CannotTry("the C++ kernels are not built: make build")
    return done.stdout.split()[-1]


def rebuild(tree, changed):
    """Compile what the change reaches, for one instruction set, and link."""
    objects = tree / "build" / "objects"
    stale = objects / f"kernels-{best_instruction_set(tree)}.o"
    if changed.endswith("module.cpp") or changed.startswith("csrc/python/"):
        stale = objects / "module.o"
    elif changed.endswith("run.cpp"):
        stale = objects / "run.o"
    if not stale.exists():
        raise CannotTry("the C++ kernels' objects are not there: make build")
    stale.unlink()
    for made in (*objects.glob("*.o"), *objects.glob("cuda-*/*.fatbin")):  # the others count as new
        made.touch()
    done = python(tree, "setup.py", "-q", "build_ext", "--inplace")
    if done.returncode or "without its C++ kernels" in done.stdout:
        raise CannotTry(f"it does not compile:\n{done.stdout[-2000:]}")


@contextmanager
def mutated(tree, mutation):
    """The tree with one mutation in it; afterwards it is as it was."""
    path = tree / mutation.file
    text = broken(tree, mutation)
    kept = [path]
    if is_compiled(mutation):
        kept += [*(tree / "fastseq").glob("_cpu*"), *(tree / "build" / "objects").glob("*.o")]
    with tempfile.TemporaryDirectory() as aside:
        for place, one in enumerate(kept):
            shutil.copy2(one, Path(aside, str(place)))
        try:
            path.write_text(text)
            if is_compiled(mutation):
                rebuild(tree, mutation.file)
            yield
        finally:
            for place, one in enumerate(kept):
                shutil.copy2(Path(aside, str(place)), one)


def is_compiled(mutation):
    """Into the library that tests load; they compile the CUDA kernels for the host themselves."""
    return mutation.file.startswith("csrc/") and not mutation.file.startswith("csrc/cuda/")


def verdict(tree, mutation):
    """'killed' or 'survived', and what pytest said."""
    with mutated(tree, mutation):
        status, said = tested(tree, mutation.tests)
    if status in (0, 5):
        return "survived", said
    if status in (2, 3, 4):
        raise CannotTry(f"its tests cannot run:\n{said}")
    return "killed", said  # a crash and a hang were noticed


def try_all(root, mutations):
    """Try each in a copy of ``root``. Returns the exit status."""
    survived, untried = [], []
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        tree = Path(folder, root.name)
        copy(root, tree)
        tests = list(dict.fromkeys(test for m in mutations for test in m.tests))
        status, said = tested(tree, tests)
        if status != 0:
            say(f"mutate: the tests fail with nothing broken, or do not run:\n{said}")
            return 2
        for mutation in mutations:
            try:
                outcome, said = verdict(tree, mutation)
            except CannotTry as why:
                untried.append(mutation.name)
                say(f"ERROR     {mutation.name}: {why}")
                continue
            say(f"{outcome:<9} {mutation.name}")
            if outcome == "survived":
                survived.append(mutation.name)
                say(f"{mutation.file}: {mutation.old!r} -> {mutation.new!r}\n{said}")
    killed = len(mutations) - len(survived) - len(untried)
    say(f"mutate: {killed} killed, {len(survived)} survived, {len(untried)} not tried")
    return 2 if untried else 1 if survived else 0


def check(root, mutations):
    """Look for the old texts alone. Returns the exit status."""
    status = 0
    for mutation in mutations:
        try:
            broken(root, mutation)
        except CannotTry as why:
            say(f"ERROR     {mutation.name}: {why}")
            status = 2
    return status


def main(words):
    from mutations import MUTATIONS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("patterns", nargs="*", metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="their names")
    parser.add_argument("--check", action="store_true", help="whether all old texts stand once")
    parser.add_argument("--python", action="store_true", help="only those that compile nothing")
    asked = parser.parse_args(words)
    chosen = [
        m
        for m in MUTATIONS
        if any(fnmatchcase(m.name, p) for p in asked.patterns or ["*"])
        and not (asked.python and is_compiled(m))
    ]
    if not chosen:
        say(f"mutate: no mutation is called {asked.patterns}")
        return 2
    if asked.list:
        say("\n".join(m.name for m in chosen))
        return 0
    return check(ROOT, chosen) if asked.check else try_all(ROOT, chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
