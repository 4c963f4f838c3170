"""The package as it ships: version, contents, and pages that are true."""

import ast
import re
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastseq

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(*names):
    return [
        pytest.param(match[1], id=f"{page.name}-{k}")
        for page in PAGES
        if page.name in names
        for k, match in enumerate(BLOCK.finditer(page.read_text()))
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing is left in the tree, and nothing old gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "fastseq").rglob("*"):
        if path.suffix in (".py", ".typed"):
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    command += ["--quiet", "--no-index", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_version_stands_once():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'version = { attr = "fastseq.__version__" }' in text
    assert not re.search(r'^version = "', text, re.MULTILINE)
    assert f"## [{fastseq.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_wheel_holds_the_package_and_no_more(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    files = [p for p in (ROOT / "fastseq").rglob("*") if p.suffix in (".py", ".typed")]
    assert names == {p.relative_to(ROOT).as_posix() for p in files}
    assert "fastseq/py.typed" in names


def test_the_wheel_says_what_it_is(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    text = wheel.read(name).decode()
    assert f"\nVersion: {fastseq.__version__}\n" in text
    assert "\nLicense-Expression: Apache-2.0\n" in text
    required = re.findall(r"^Requires-Dist: ([A-Za-z0-9_-]+)(?!.*extra ==).*$", text, re.MULTILINE)
    assert sorted(required) == ["numba", "numpy", "torch"]
    assert any(entry.endswith("licenses/LICENSE") for entry in wheel.namelist())


def test_the_distribution_has_a_name_of_its_own(wheel):
    """``fastseq`` on PyPI is another project."""
    (name,) = re.findall(r'^name = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    assert name != "fastseq" and f"\nName: {name}\n" in wheel.read(metadata).decode()
    assert Path(wheel.filename).name.startswith(f"{name.replace('-', '_')}-")
    assert f"`{name}`" in (ROOT / "README.md").read_text()


ANOTHER_PROJECT = re.compile(r"pip\d? (?:install|download)\b[^\n`]*?[\s\"']fastseq(?![-\w./])")


@pytest.mark.parametrize(
    "told, another",
    [
        ("pip install fastseq", True),
        ('pip install "fastseq[peers]"', True),
        ("pip3 install -U fastseq==0.1 torch", True),
        ("pip install fastseq-rnn", False),
        ("pip install dist/fastseq_rnn-0.1.0.whl", False),
        ("install a C++ compiler, and then fastseq again: pip install .", False),
    ],
)
def test_what_installs_another_project_is_found(told, another):
    assert bool(ANOTHER_PROJECT.search(told)) is another


def test_nothing_tells_to_install_another_project():
    folders = ("fastseq", "csrc", "bench", "examples", "tools", "docs", ".github")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    texts = {".cpp", ".h", ".md", ".py", ".toml", ".txt", ".yml"}
    files = [path for path in [*files, *ROOT.iterdir()] if path.suffix in texts]
    files += [ROOT / "Makefile"]
    assert len(files) > 100
    told = [str(path) for path in files if ANOTHER_PROJECT.search(path.read_text())]
    assert not told


@pytest.mark.parametrize("code", blocks("README.md", "switching.md"))
def test_the_code_of_the_pages_runs(code, tmp_path, cells_go_again):
    """From a file, since the equations of a cell are read."""
    (tmp_path / "page.py").write_text(code)
    runpy.run_path(str(tmp_path / "page.py"))


@pytest.mark.parametrize("code", blocks(*(page.name for page in PAGES)))
def test_the_code_of_the_pages_parses(code):
    ast.parse(code)


@pytest.mark.parametrize("name", fastseq.__all__)
def test_public_names_are_documented(name):
    value = getattr(fastseq, name)
    assert value.__doc__ and value.__doc__.strip(), "a docstring"
    pages = "".join(page.read_text() for page in PAGES)
    assert re.search(rf"\b{name}\b", pages), "a place in the docs"


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_between_the_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith("https://"):
            assert (page.parent / target).exists(), target


def test_the_equations_in_the_design_are_those_that_run():
    from fastseq.cells import lstm

    (shown,) = (
        block
        for block in BLOCK.findall((ROOT / "docs" / "design.md").read_text())
        if "def lstm" in block
    )
    assert shown in Path(lstm.__file__).read_text()
