"""Each floor knows only the floors beneath it, and every backend is imported when asked for."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fastseq
from fastseq.backends import BACKENDS, load
from fastseq.backends.contract import fault

ROOT = Path(fastseq.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
BENCHMARKS = sorted((ROOT.parent / "bench").rglob("*.py"))  # none beside an installed package
COMPILED = ("_cpu", "_cuda")
FLOORS = {"cells": 0, "reference": 1, "backends": 2, "ops": 3, "nn": 4} | dict.fromkeys(COMPILED, 0)
TOP = 5
#: What a floor may import from outside, where it is kept plain.
PLAIN = {0: set(), 1: {"numpy"}}


def module_name(path):
    parts = ("fastseq", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(module):
    """Of a module's dotted name."""
    parts = module.split(".")
    return FLOORS.get(parts[1], TOP) if len(parts) > 1 else TOP


def imported(tree, package, exists):
    """(line, module) of each import anywhere in a file, in functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if exists(name) else base


def exists(name):
    parts = name.split(".")
    if parts[0] != "fastseq":
        return False
    path = ROOT.joinpath(*parts[1:])
    if len(parts) == 2 and parts[1] in COMPILED:
        return True
    return path.is_dir() or path.with_suffix(".py").is_file()


def climbs(source, module, is_package):
    """What a file imports that its floor may not."""
    package = module if is_package else module.rpartition(".")[0]
    mine = floor(module)
    for line, name in imported(ast.parse(source), package, exists):
        if name.split(".")[0] == "fastseq":
            if floor(name) > mine:
                yield f"line {line}: {module} (floor {mine}) imports {name} (floor {floor(name)})"
        elif mine in PLAIN:
            outside = name.split(".")[0]
            if outside not in sys.stdlib_module_names | PLAIN[mine]:
                yield f"line {line}: {module} (floor {mine}) imports {outside}"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_floor_reaches_up(path):
    source = path.read_text(encoding="utf-8")
    found = list(climbs(source, module_name(path), path.name == "__init__.py"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "source, module",
    [
        ("from ..ops import stack", "fastseq.backends.eager"),
        ("from .. import nn", "fastseq.ops.stack"),
        ("import fastseq.nn.layers", "fastseq.ops.stack"),
        ("def f():\n    from ..backends.contract import Call", "fastseq.cells.gru"),
        ("if TYPE_CHECKING:\n    from ..nn import LSTM", "fastseq.ops.checks"),
        ("from .. import __version__", "fastseq.nn.layers"),
        ("import fastseq", "fastseq.nn.layers"),
        ("import torch", "fastseq.reference"),
        ("import numpy", "fastseq.cells.lstm"),
    ],
)
def test_the_walk_sees_a_climb(source, module):
    assert list(climbs(source, module, False))


@pytest.mark.parametrize(
    "source, module",
    [
        ("from ..backends import choice, eager", "fastseq.ops.stack"),
        ("from .stack import run", "fastseq.ops.checks"),
        ("from .. import reference", "fastseq.backends.reference"),
        ("import torch", "fastseq.backends.torch"),
        ("import hashlib", "fastseq.cells.lstm"),
    ],
)
def test_the_walk_lets_down(source, module):
    assert not list(climbs(source, module, False))


def edges():
    """module -> the modules of the library that it imports, wherever in the file."""
    found = {}
    for path in FILES:
        module = module_name(path)
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = imported(ast.parse(path.read_text(encoding="utf-8")), package, exists)
        found[module] = {name for _, name in names if name.split(".")[0] == "fastseq"}
    return found


def circle(graph):
    """A list of modules each of which imports the next, and the last the first; empty if none."""
    done = set()

    def walk(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for name in sorted(graph.get(module, ())):
            if found := walk(name, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(graph) if (found := walk(module, []))), [])


def test_no_imports_go_in_a_circle():
    assert not circle(edges())


def test_a_circle_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert circle(graph) == ["b", "c", "b"]
    assert not circle({"a": {"b", "c"}, "b": {"c"}, "c": set()})


#: A backend's name that is also a device's, which the floors above may well ask for.
A_DEVICE_TOO = "cuda"


def backends_named(source, module):
    """Where a file above the backends names one: as a word, or by importing its room."""
    package = module.rpartition(".")[0] or module
    tree = ast.parse(source)
    rooms = {f"fastseq.backends.{name}" for name in BACKENDS}
    for line, name in imported(tree, package, exists):
        if name in rooms:
            yield f"line {line}: imports {name}"
    for node in ast.walk(tree):
        word = node.value if isinstance(node, ast.Constant) else None
        if word in BACKENDS and word != A_DEVICE_TOO:
            yield f"line {node.lineno}: {node.value!r}"


ABOVE = [path for path in FILES if floor(module_name(path)) > FLOORS["backends"]]


@pytest.mark.parametrize("path", ABOVE, ids=module_name)
def test_no_backend_is_named_above_the_backends(path):
    assert not list(backends_named(path.read_text(encoding="utf-8"), module_name(path)))


@pytest.mark.parametrize(
    "source",
    [
        'f = name == "native"',
        "from ..backends import eager",
        "from ..backends import cuda",
        "from ..backends.torch import stacks",
        "def f():\n    import fastseq.backends.numba",
    ],
)
def test_a_name_is_found(source):
    assert list(backends_named(source, "fastseq.ops.run"))


def names_used(source):
    """Every dotted name in a file, and what it imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_environment_variable_is_read(path):
    source = path.read_text(encoding="utf-8")
    reads = {"os.environ", "os.getenv", "os.environb", "os.putenv"}
    assert not reads & set(names_used(source))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_autograd_lives_in_ops(path):
    """The one place of an autograd formula."""
    if floor(module_name(path)) == FLOORS["ops"]:
        return
    formulas = {
        "torch.autograd.Function",
        "torch.library.register_autograd",
        "autograd.Function",
    }
    assert not formulas & set(names_used(path.read_text(encoding="utf-8")))


def hidden(source):
    """The names of comprehensions that are names of the file as well."""
    tree = ast.parse(source)
    of_file = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            of_file |= {alias.asname or alias.name for alias in node.names}
    targets = [n.target for n in ast.walk(tree) if isinstance(n, ast.comprehension)]
    names = (n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))
    return [f"line {n.lineno}: {n.id}" for n in names if n.id in of_file]


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=lambda path: path.stem)
def test_no_comprehension_hides_a_name_of_its_file(path):
    """Python 3.12.1 takes the hidden name for the comprehension's own in all comprehensions of that
    function, and raises UnboundLocalError."""
    assert not hidden(path.read_text(encoding="utf-8"))


def test_a_hidden_name_is_found():
    source = (
        "from a import load\ndef f(xs):\n    return [load for load in xs], [load(x) for x in xs]"
    )
    assert hidden(source) == ["line 3: load"]


def run(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
import torch
import fastseq
from fastseq.backends import BACKENDS, load
for name in BACKENDS:
    loaded = load(name)
    print(name, "|", loaded if isinstance(loaded, str) else "here")
layer = fastseq.LSTM(3, 4)
y, _ = layer(torch.ones(2, 1, 3))
y.sum().backward()
try:
    fastseq.LSTM(3, 4, backend="numba")(torch.ones(2, 1, 3))
except RuntimeError as error:
    print("named |", error)
"""


def test_without_numba_all_else_runs():
    lines = run(WITHOUT.format(blocked=("numba", "llvmlite", "scipy", "triton"))).splitlines()
    table = dict(line.split(" | ", 1) for line in lines)
    assert "No module named 'numba'" in table["numba"], table["numba"]
    assert "pip install numba" in table["numba"]
    assert table["torch"] == table["eager"] == table["reference"] == "here"
    assert "numba" in table["named"] and "pip install numba" in table["named"]


def test_import_is_light():
    """A backend's dependencies come with its first use. (torch's flop counter imports Triton.)"""
    heavy = run(
        "import torch.utils.flop_counter, sys; before = set(sys.modules); import fastseq; "
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    ).split()
    assert not {"numba", "llvmlite", "scipy", "triton", "mpmath"} & set(heavy)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_what_the_contract_asks(name):
    module = load(name)
    if isinstance(module, str):
        assert len(module) > 10, "say why, and the remedy"
        pytest.skip(module)
    assert fault(module) is None


def test_numba_serves_where_it_is_installed():
    if importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    assert not isinstance(load("numba"), str), load("numba")


@pytest.mark.parametrize("name", ["", "cudnn", "Eager"])
def test_load_names_the_backends(name):
    with pytest.raises(ValueError, match="eager") as caught:
        load(name)
    assert repr(name) in str(caught.value)


def borrowed(source, stem):
    """Test files that a test file imports, in the code of a child process too."""
    named = re.findall(r"^\s*(?:from|import)\s+(?:tests\.)?(test_\w+)", source, re.MULTILINE)
    return {name for name in named if name != stem}


def test_no_test_file_imports_another():
    """What tests share stands in tests/helpers: an import would carry fixtures along, and run twice
    what a file does when it is imported."""
    here = Path(__file__).parent
    files = [*here.glob("*.py"), *(here / "helpers").glob("*.py")]
    assert len(files) > 40
    found = {path.name: borrowed(path.read_text(), path.stem) for path in files}
    assert not {name: others for name, others in found.items() if others}


@pytest.mark.parametrize(
    "source, found",
    [
        ("from test_parity import draw", {"test_parity"}),
        ("def f():\n    import tests.test_parity", {"test_parity"}),
        ('CODE = """\nfrom test_parity import draw\n"""', {"test_parity"}),
        ("from test_this import layer", set()),
        ("from problems import draw", set()),
    ],
)
def test_an_import_of_another_test_file_is_found(source, found):
    assert borrowed(source, "test_this") == found
