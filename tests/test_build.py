"""How the C++ kernels are built: with a compiler, without one, and as one binary for all."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from trees import BROKEN, FAKE, INPLACE, NO_NVCC, ROOT, copy_to, pythons, run, script, tool

import fastseq

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF with binutils")


@pytest.fixture
def tree(tmp_path):
    return copy_to(tmp_path / "tree")


def note(tree):
    return (tree / "fastseq" / "_cpu.txt").read_text()


def library(tree):
    return tree / "fastseq" / "_cpu.abi3.so"


def test_the_compiler_of_this_machine_compiled_the_kernels():
    """make goes on without them, so that what is broken in them would pass unseen."""
    said = fastseq.backends()["native"]
    assert not re.search("could not (compile|link)", said), said


def test_without_a_compiler_the_package_works_and_says_why(tree):
    run(*INPLACE, cwd=tree, CXX="/nonexistent/c++ -pipe")
    why = "CXX names the C++ compiler /nonexistent/c++, which is not there"
    assert note(tree) == f"{why}\n"
    # and does not take those of another tree, which an editable install of that one would find
    code = "import fastseq; print(fastseq.__file__, fastseq.backends()['native'])"
    said = run("-c", code, cwd=tree, PYTHONPATH=tree).partition(" ")
    assert said[0] == str(tree / "fastseq" / "__init__.py")
    assert said[2].startswith(f"not available: fastseq was built without its C++ kernels: {why}; ")
    assert "install a C++ compiler" in said[2] and "pip install ." in said[2]


def test_kernels_of_another_tree_are_not_taken(tree):
    """As the finder of an editable install of that tree would."""
    code = (
        "import sys, types, fastseq; other = types.ModuleType('fastseq._cpu'); "
        f"other.__file__ = {__file__!r}; "
        "sys.modules['fastseq._cpu'] = fastseq._cpu = other; print(fastseq.backends()['native'])"
    )
    assert f"kernels: {__file__} belongs to another fastseq; " in run(
        "-c", code, cwd=tree, PYTHONPATH=tree
    )


def test_the_compiler_is_looked_for_on_the_path(tree, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    run(*INPLACE, cwd=tree, CXX="", PATH=empty)
    assert note(tree) == "no C++ compiler was found, neither c++ nor g++ nor clang++\n"
    script(empty / "clang++", BROKEN)
    run(*INPLACE, cwd=tree, CXX="", PATH=empty)
    assert note(tree).startswith("clang++ could not compile csrc/")


def test_without_headers_it_says_where_they_were_looked_for(tree):
    code = (
        "import runpy, sys, sysconfig; real = sysconfig.get_path; "
        "sysconfig.get_path = lambda name, *rest, **more: "
        "'/nowhere' if 'include' in name else real(name, *rest, **more); "
        f"sys.argv = {INPLACE}; runpy.run_path('setup.py', run_name='__main__')"
    )
    run("-c", code, cwd=tree, CXX=script(tree / "fake", FAKE.format(log=tree / "log")))
    assert note(tree).startswith("Python's headers are not in /nowhere (")


def test_a_compiler_that_fails_is_quoted_and_an_old_library_goes_away(tree):
    library(tree).touch()
    compiler = script(tree / "broken", BROKEN)
    run(*INPLACE, cwd=tree, CXX=compiler)
    quoted = re.fullmatch(r"(\S+) could not compile csrc/\S+: (.*)\n", note(tree))
    assert quoted.groups() == (str(compiler), "vocabulary.h:2: error: no such thing")
    assert not library(tree).exists()


def test_the_kernels_are_compiled_once_for_each_instruction_set(tree):
    log = tree / "log"
    run(*INPLACE, cwd=tree, CXX=script(tree / "fake", FAKE.format(log=log)))
    lines = log.read_text().splitlines()
    kernels = [line for line in lines if "kernels.cpp" in line]
    sets = {re.search(r"FASTSEQ_ISA=(\w+)", line)[1]: line for line in kernels}
    assert len(kernels) == len(sets)
    assert " -m" not in sets.pop("base")  # runs on every machine of its kind
    assert all(f"-m{name.replace('_', '')}" in line for name, line in sets.items())
    assert len(lines) == len(kernels) + 3  # the module, the loop, and the link
    objects = set(re.findall(r"-o (\S+\.o)", "\n".join(lines[:-1])))
    assert objects <= set(lines[-1].split()), "all of them are linked"
    assert library(tree).exists() and not (tree / "fastseq" / "_cpu.txt").exists()


def test_make_builds_again_what_is_older_than_its_sources(tree, monkeypatch, capsys):
    log = tree / "log"
    monkeypatch.setenv("CXX", str(script(tree / "fake", FAKE.format(log=log))))
    monkeypatch.setenv("NVCC", NO_NVCC)
    prepare = tool(tree, "prepare")

    def compiled():
        log.write_text("")
        prepare.build_kernels(sys.executable)
        return set(re.findall(r"-c \S*/(\w+\.cpp)", log.read_text())), bool(log.read_text())

    def age(seconds, paths):
        then = time.time() - seconds
        for path in paths:
            os.utime(path, (then, then))

    def edit(name):
        """All sources are old, what was made of them is newer, and one source newer still."""
        age(300, [tree / "setup.py", *(tree / "csrc").rglob("*.*")])
        age(200, [library(tree), *(tree / "build" / "objects").iterdir()])
        age(100, [tree / name])

    every = {"module.cpp", "run.cpp", "kernels.cpp"}
    assert compiled() == (every, True)
    assert compiled() == (set(), False)
    edit("csrc/module.cpp")
    assert compiled() == ({"module.cpp"}, True)
    edit("csrc/python/call.h")
    assert compiled() == (every, True)
    edit("csrc/cpu/step.h")
    assert compiled() == (every, True)
    library(tree).unlink()
    assert compiled() == (set(), True)
    assert "going on without" not in capsys.readouterr().err


def test_make_goes_on_without_a_compiler_and_says_so(tree, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nonexistent")
    monkeypatch.setenv("NVCC", NO_NVCC)
    tool(tree, "prepare").build_kernels(sys.executable)
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == (
        "make: going on without the C++ kernels: "
        "CXX names the C++ compiler /nonexistent, which is not there"
    )


def environment_that_borrows(folder):
    """An environment without packages of its own, which finds those of this one, pip included."""
    run("-m", "venv", "--without-pip", folder, cwd=folder.parent)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "borrowed.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    return folder / "bin" / "python", site


def test_make_removes_what_installed_the_tree_under_another_name(tree, tmp_path, capsys):
    python, site = environment_that_borrows(tmp_path / "environment")

    def install(name, origin):
        """As pip leaves an editable install there."""
        info = site / f"{name.replace('-', '_')}-0.dist-info"
        info.mkdir()
        (site / f"{name}.pth").write_text(f"{origin}\n")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (info / "INSTALLER").write_text("pip\n")
        said = {"url": origin.as_uri(), "dir_info": {"editable": True}}
        (info / "direct_url.json").write_text(json.dumps(said))
        files = ("METADATA", "INSTALLER", "direct_url.json", "RECORD")
        record = [f"{name}.pth", *(f"{info.name}/{file}" for file in files)]
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in record))

    prepare = tool(tree, "prepare")
    install(prepare.distribution(), tree)
    install("another-name", tree)
    install("another-tree", tmp_path)
    prepare.remove_other_names(str(python))
    assert "under another name: another-name\n" in capsys.readouterr().err
    kept = {path.stem for path in site.glob("*.pth")} - {"borrowed"}
    assert kept == {prepare.distribution(), "another-tree"}
    assert not list(site.glob("another_name*"))
    prepare.remove_other_names(str(python))
    assert not capsys.readouterr().err


def test_the_source_archive_holds_all_that_is_compiled(tree):
    run("setup.py", "-q", "sdist", cwd=tree)
    (path,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    headers = {p.relative_to(tree).as_posix() for p in (tree / "csrc").rglob("*.h")}
    sources = {"csrc/module.cpp", "csrc/cpu/run.cpp", "csrc/cpu/kernels.cpp"}
    sources |= {"csrc/cuda_module.cpp", "csrc/cuda/kernels.cu"}
    assert headers and headers | sources | {"setup.py", "fastseq/backends/native.py"} <= names


def wheel_of(path, *names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "no compiler")
    return path


def test_what_is_not_one_binary_is_refused(tmp_path):
    look = tool(ROOT, "one_binary").look
    with pytest.raises(ValueError, match="expected the tag cp310-abi3"):
        look(wheel_of(tmp_path / "fastseq_rnn-0-py3-none-any.whl", "fastseq/_cpu.abi3.so"))
    with pytest.raises(ValueError, match=r"has no C\+\+ kernels: no compiler"):
        look(wheel_of(tmp_path / "fastseq_rnn-0-cp310-abi3-linux_x86_64.whl", "fastseq/_cpu.txt"))


@linux
def test_a_library_that_is_bound_to_torch_is_refused(tmp_path):
    path = tmp_path / "fastseq_rnn-0-cp310-abi3-linux_x86_64.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(Path(torch.__file__).parent / "lib" / "libshm.so", "fastseq/_cpu.abi3.so")
    with pytest.raises(ValueError, match=r"is bound to torch: .*c10"):
        tool(ROOT, "one_binary").look(path)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(tree, wheel, the library in it), made with this machine's compiler."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("there is no C++ compiler")
    tree = copy_to(tmp_path_factory.mktemp("built"))
    command = ("pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run("-m", *command, "--wheel-dir", tree / "dist", tree, cwd=tree)
    (wheel,) = (tree / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        if "fastseq/_cpu.txt" in archive.namelist():
            pytest.fail(archive.read("fastseq/_cpu.txt").decode())
        made = Path(archive.extract("fastseq/_cpu.abi3.so", tree / "unpacked"))
    return tree, wheel, made


@pytest.mark.full
def test_the_wheel_holds_the_package_and_its_kernels(built):
    tree, wheel, _ = built
    assert "-cp310-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = [p for p in (tree / "fastseq").rglob("*") if p.suffix in (".py", ".typed")]
    built = {"fastseq/_cpu.abi3.so", "fastseq/_cuda.txt"}  # here without nvcc
    assert names == {p.relative_to(tree).as_posix() for p in package} | built


def asks_for_little(library):
    """No more of the machine than manylinux2014 has: libm's exp and log of today are newer."""
    _, newest = tool(ROOT, "one_binary").needs(library)
    manylinux2014 = {"GLIBC": [2, 17], "GLIBCXX": [3, 4, 19], "CXXABI": [1, 3, 7]}
    for name, most in manylinux2014.items():
        assert [int(n) for n in newest.get(name, "0").split(".")] <= most, name


@linux
def test_the_library_that_is_there_asks_for_little():
    (found,) = [*(ROOT / "fastseq").glob("_cpu*.so")] or [None]
    if found is None:
        pytest.skip("native is not built here")
    asks_for_little(found)


@linux
@pytest.mark.full
def test_the_library_asks_for_little_and_gives_its_entry_alone(built):
    _, wheel, made = built
    assert "no symbol of torch" in tool(ROOT, "one_binary").look(wheel)
    asks_for_little(made)
    defined = subprocess.check_output(["nm", "-D", "--defined-only", made], text=True)
    assert [line.split()[-1] for line in defined.splitlines()] == ["PyInit__cpu"]


@linux
@pytest.mark.full
def test_instruction_sets_share_no_inline_function(built):
    """The linker keeps one of two functions of a name: AVX-512's would run on every machine."""
    objects = sorted((built[0] / "build" / "objects").glob("kernels-*.o"))
    assert objects
    for path in objects:
        own = f"fastseq::{path.stem.partition('-')[2]}::"
        symbols = subprocess.check_output(["nm", "-C", "--defined-only", path], text=True)
        weak = re.findall(r"^\S+ [WVuw] (.*)$", symbols, re.MULTILINE)
        assert not [name for name in weak if own not in name], path.name


@pytest.mark.full
def test_the_library_loads_in_every_python_and_without_torch(built):
    others = pythons()
    if not others:
        pytest.skip("there is no other Python here")
    code = (
        "import importlib.util as u, sys; "
        f"spec = u.spec_from_file_location('fastseq._cpu', {str(built[2])!r}); "
        "module = u.module_from_spec(spec); spec.loader.exec_module(module); "
        "assert 'torch' not in sys.modules; "
        "print([row[0] for row in module.CELLS], module.instruction_sets())"
    )
    here = run("-c", code, cwd=built[0])
    assert "'lstm'" in here and "'base'" in here
    for path in others.values():
        assert subprocess.check_output([path, "-I", "-c", code], text=True) == here


@pytest.mark.full
def test_an_editable_install_without_a_compiler(tree, tmp_path):
    python, _ = environment_that_borrows(tmp_path / "environment")
    nothing = {"PATH": str(python.parent), "HOME": os.environ["HOME"]}
    command = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps"]
    code = "import fastseq; print(fastseq.__file__, fastseq.backends()['native'])"
    for words in ([*command, "--no-index", "-e", tree], ["-c", code]):
        done = subprocess.run(
            [python, *words], capture_output=True, text=True, cwd=tmp_path, env=nothing
        )
        assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tree / "fastseq"))
    assert "no C++ compiler was found" in done.stdout
