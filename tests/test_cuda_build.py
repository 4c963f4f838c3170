"""The extension of the CUDA kernels: how it is built, what is in it, and how it speaks to a driver.

What is in it is read where it was built (there is nvcc), without a GPU. A fake driver stands in for
NVIDIA's in processes of their own.
"""

import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import setuptools
from cuda_binary import Binary, cuobjdump, read, understood
from trees import FAKE, INPLACE, ROOT, copy_to, pythons, run, script, tool

from fastseq.backends import imported
from fastseq.backends.cuda_kernels import KERNELS, TEAMS

NOTE = ROOT / "fastseq" / "_cuda.txt"
LIBRARY = ROOT / "fastseq" / "_cuda.abi3.so"
#: Says its version and where its headers are; else as the C++ compiler's.
FAKE_NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88"; exit;;
  *--dryrun*) echo '#$ INCLUDES="-I/its headers"'; exit;;
esac
{then}
""".replace("{then}", FAKE.removeprefix("#!/bin/sh\n"))


@pytest.fixture
def tree(tmp_path):
    return copy_to(tmp_path / "tree")


def fake_compilers(tree, version="13.0"):
    """Environment, and where they take down what they compile."""
    logs = {name: tree / f"{name}.log" for name in ("CXX", "NVCC")}
    texts = {"CXX": FAKE, "NVCC": FAKE_NVCC}
    given = {
        name: script(tree / f"fake-{name}", texts[name].format(log=log, version=version))
        for name, log in logs.items()
    }
    return given, logs["CXX"], logs["NVCC"]


def note(tree):
    return (tree / "fastseq" / "_cuda.txt").read_text()


def library(tree):
    return tree / "fastseq" / "_cuda.abi3.so"


# How it is built, by compilers that compile nothing


def test_without_nvcc_the_rest_is_built_and_a_note_says_why(tree):
    given, *_ = fake_compilers(tree)
    library(tree).touch()
    run(*INPLACE, cwd=tree, CXX=given["CXX"], NVCC="/nonexistent/nvcc --flag")
    assert note(tree) == ("NVCC names the CUDA compiler /nonexistent/nvcc, which is not there\n")
    assert not library(tree).exists()
    assert (tree / "fastseq" / "_cpu.abi3.so").exists()


def test_nvcc_is_looked_for_on_the_path_and_where_it_is_usual(tree, tmp_path):
    given, *_ = fake_compilers(tree)
    on_path, usual = tmp_path / "bin", tmp_path / "usual" / "nvcc"
    on_path.mkdir(), usual.parent.mkdir()
    path = tree / "setup.py"
    text = path.read_text()
    assert text.count('"/usr/local/cuda/bin/nvcc"') == 1
    path.write_text(text.replace("/usr/local/cuda/bin/nvcc", str(usual)))
    given |= {"NVCC": "", "PATH": f"{on_path}:/bin:/usr/bin"}
    if shutil.which("nvcc", path="/bin:/usr/bin"):
        pytest.skip("nvcc is where the shell is")
    run(*INPLACE, cwd=tree, **given)
    assert note(tree) == f"no nvcc was found, neither on the PATH nor as {usual}\n"
    for place in (usual, on_path / "nvcc"):  # the second before the first
        shutil.copy(tree / "fake-NVCC", place)
        run(*INPLACE, cwd=tree, **given)
        assert library(tree).exists() and not (tree / "fastseq" / "_cuda.txt").exists()
    place.write_text("#!/bin/sh\nexit 1\n")
    run(*INPLACE, cwd=tree, **given)
    assert note(tree) == "nvcc could not say its version: exit status 1\n"


@pytest.mark.parametrize("version, built", [("12.4", False), ("12.8", True), ("13.1", True)])
def test_an_nvcc_that_does_not_know_sm_100_is_declined(tree, version, built):
    given, *_ = fake_compilers(tree, version)
    run(*INPLACE, cwd=tree, **given)
    assert library(tree).exists() is built
    if not built:
        assert note(tree) == (
            f"{given['NVCC']} is of CUDA 12.4, and the CUDA kernels need 12.8 or newer\n"
        )


def test_an_nvcc_that_fails_is_quoted_and_an_old_library_goes_away(tree):
    given, *_ = fake_compilers(tree)
    library(tree).touch()
    text = given["NVCC"].read_text()
    fail = 'echo "loop.h(3): warning: this"; echo "loop.h(4): error: no such thing" >&2; exit 1\n'
    head, _, _ = text.partition("esac\n")
    script(given["NVCC"], f"{head}esac\n{fail}")
    run(*INPLACE, cwd=tree, **given)
    assert re.fullmatch(
        rf"{given['NVCC']} could not compile csrc/cuda/kernels.cu of \w+: "
        r"loop\.h\(4\): error: no such thing\n",
        note(tree),
    )
    assert not library(tree).exists() and (tree / "fastseq" / "_cpu.abi3.so").exists()


def compiled_units(log):
    """unit -> the words nvcc was given for it."""
    lines = log.read_text().splitlines() if log.exists() else []
    return {re.search(r"-DFASTSEQ_UNIT=(\w+)", line)[1]: line.split() for line in lines}


def units_of_the_list():
    return re.findall(r"FASTSEQ_KERNELS_(\w+)\(", (ROOT / "csrc" / "cuda" / "list.h").read_text())


GENERATED = {
    "80": "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "90a": "-gencode=arch=compute_90a,code=sm_90a",
    "100": "-gencode=arch=compute_100,code=[sm_100,compute_100]",
}


@pytest.mark.parametrize(
    "command, architectures",
    [
        (INPLACE, "90a"),
        ([*INPLACE, "--cuda-architectures=80 90a"], "80 90a"),
        (["setup.py", "-q", "build"], "80 90a 100"),
        (["setup.py", "-q", "editable_wheel"], "90a"),
        (["setup.py", "-q", "bdist_wheel"], "80 90a 100"),
    ],
)
def test_units_are_compiled_each_once_for_the_architectures(tree, command, architectures):
    given, cxx, nvcc = fake_compilers(tree)
    run(*command, cwd=tree, **given)
    compiled = compiled_units(nvcc)
    assert list(compiled) and sorted(compiled) == sorted(units_of_the_list())
    assert len(nvcc.read_text().splitlines()) == len(compiled)
    for words in compiled.values():
        generated = [word for word in words if "arch" in word]
        assert generated == [GENERATED[name] for name in architectures.split()]
    (module,) = (line for line in cxx.read_text().splitlines() if "cuda_module.cpp" in line)
    assert "-isystem/its headers " in module
    assert f'-DFASTSEQ_ARCHITECTURES="{architectures}"' in module


def test_make_builds_again_what_is_older_than_its_sources(tree, monkeypatch, capsys):
    given, cxx, nvcc = fake_compilers(tree)
    for name, path in given.items():
        monkeypatch.setenv(name, str(path))
    prepare = tool(tree, "prepare")

    def built():
        """(sources of C++ that were compiled, whether units were compiled, all or none of them)"""
        cxx.write_text(""), nvcc.write_text("")
        prepare.build_kernels(sys.executable)
        units = compiled_units(nvcc)
        assert sorted(units) in ([], sorted(units_of_the_list()))
        return set(re.findall(r"-c \S*/(\w+\.cpp)", cxx.read_text())), bool(units)

    def age(seconds, paths):
        then = time.time() - seconds
        for path in paths:
            os.utime(path, (then, then))

    def edit(name):
        """All sources are old, what was made of them is newer, and one source newer still."""
        age(300, [tree / "setup.py", *(tree / "csrc").rglob("*.*")])
        made = [*(tree / "fastseq").glob("_c*.*"), *(tree / "build" / "objects").rglob("*.*")]
        age(200, made)
        age(100, [tree / name])

    cpu, module = {"module.cpp", "run.cpp", "kernels.cpp"}, {"cuda_module.cpp"}
    assert built() == (cpu | module, True)
    assert "building the CUDA kernels, for sm_90a alone" in capsys.readouterr().err
    assert built() == (set(), False)
    edit("csrc/cuda/words.h")
    assert built() == (module, True)
    assert "C++" not in capsys.readouterr().err
    edit("csrc/launch/driver.h")
    assert built() == (module, True)
    edit("csrc/cells/generated.h")
    assert built() == (cpu | module, True)
    edit("csrc/cpu/step.h")
    assert built() == (cpu | module, False)
    edit("csrc/cuda_module.cpp")
    assert built() == (module, False)
    library(tree).unlink()
    assert built() == (module, False)
    assert "going on without" not in capsys.readouterr().err


def test_make_says_nothing_of_an_nvcc_that_is_not_there(tree, monkeypatch, capsys):
    given, cxx, nvcc = fake_compilers(tree)
    monkeypatch.setenv("CXX", str(given["CXX"]))
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    prepare = tool(tree, "prepare")
    prepare.build_kernels(sys.executable)
    cxx.unlink()
    prepare.build_kernels(sys.executable)
    assert not cxx.exists(), "and does not try each time"
    assert "CUDA" not in capsys.readouterr().err
    monkeypatch.setenv("NVCC", str(given["NVCC"]))  # somebody installed it
    prepare.build_kernels(sys.executable)
    assert nvcc.exists() and library(tree).exists()
    script(given["NVCC"], "#!/bin/sh\nexit 1\n")
    later = time.time() + 100
    os.utime(tree / "csrc" / "cuda" / "list.h", (later, later))
    prepare.build_kernels(sys.executable)
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"make: going on without the CUDA kernels: {given['NVCC']} could not say its version: "
        "exit status 1"
    )


# What was built


@pytest.fixture(scope="module")
def cuda():
    """The extension of this tree, by itself: no torch is asked for."""
    if not LIBRARY.exists():
        pytest.skip(NOTE.read_text().strip() if NOTE.exists() else "no CUDA kernels were built")
    spec = importlib.util.spec_from_file_location("fastseq._cuda", LIBRARY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_nvcc_of_this_machine_compiled_the_kernels(monkeypatch):
    """make goes on without them, so that what is broken in them would pass unseen."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    found = runpy.run_path(str(ROOT / "setup.py"))
    try:
        found["compiler"](), found["cuda_compiler"](), found["include_flags"]()
    except found["CannotBuild"] as why:
        pytest.skip(str(why))
    assert LIBRARY.exists(), NOTE.read_text() if NOTE.exists() else "make build"


def listed():
    """The names of csrc/cuda/list.h."""
    text = (ROOT / "csrc" / "cuda" / "list.h").read_text()
    entries = re.findall(r"X\((\w+), (\w+), \w+, (\w+), (\w+)\)", text)
    return ["_".join(entry) for entry in entries]


def test_its_kernels_are_those_of_the_list(cuda):
    assert list(cuda.kernels()) == listed()
    names = set(KERNELS) | set(TEAMS)
    assert names < set(listed()) and len(set(listed())) == len(listed()) == len(names) + 3
    assert len(listed()) <= 300
    assert list(cuda.units()) == units_of_the_list()
    assert cuda.toolkit() >= 12080
    assert set(cuda.architectures().split()) <= set(GENERATED)


def test_its_arguments_are_those_of_the_header(cuda):
    text = (ROOT / "csrc" / "cuda" / "arguments.h").read_text()
    fields = re.findall(r"^  X\([^,]+, (\w+)\)", text, re.MULTILINE)
    assert cuda.fields().split() == fields and len(fields) > 20


class NoTruth:
    def __bool__(self):
        raise TypeError("neither true nor false")


def test_what_it_is_asked_wrongly_is_told(cuda):
    (name, *_), nothing = cuda.kernels(), bytes(8 * len(cuda.fields().split()))

    def launch(**other):
        asked = {
            "name": name,
            "device": 0,
            "stream": 0,
            "grid": (1, 1, 1),
            "threads": 32,
            "shared": 0,
            "arguments": nothing,
            "cluster": 1,
            "together": False,
        }
        cuda.launch(*(asked | other).values())

    with pytest.raises(ValueError, match=rf"no kernel '{name}0' was built; near it are .*{name}"):
        launch(name=f"{name}0")
    with pytest.raises(ValueError, match=rf"arguments: expected {len(nothing)} bytes, got 8"):
        launch(arguments=bytes(8))
    with pytest.raises(ValueError, match="grid: expected 1 to 65535, got 0"):
        launch(grid=(1, 0, 1))
    with pytest.raises(ValueError, match=r"grid: expected a tuple of three sizes, got \[1, 1, 1\]"):
        launch(grid=[1, 1, 1])
    with pytest.raises(ValueError, match="threads: expected 1 to 1024, got 1056"):
        launch(threads=1056)
    with pytest.raises(ValueError, match=r"shared: expected 0 to \d+, got -1"):
        launch(shared=-1)
    with pytest.raises(ValueError, match="device: expected 0 to 63, got 64"):
        launch(device=64)
    for size in (0, 17, -8):
        with pytest.raises(ValueError, match=f"cluster: expected 1 to 16, got {size}"):
            launch(cluster=size)
    for size in (0, 17):
        with pytest.raises(ValueError, match=f"size: expected 1 to 16, got {size}"):
            cuda.clusters(name, 0, size, 32, 0)
    with pytest.raises(ValueError, match="device: expected 0 to 63, got 64"):
        cuda.limits(64)
    with pytest.raises(TypeError):
        cuda.limits(None)
    for x in (1, 6, 10):
        with pytest.raises(ValueError, match=f"grid: {x} CTAs in x cannot be in clusters of 4"):
            launch(grid=(x, 4, 4), cluster=4)
    for wrong in (
        {"name": 1},
        {"stream": None},
        {"threads": "x"},
        {"arguments": "x"},
        {"cluster": None},
        {"together": NoTruth()},
    ):
        with pytest.raises(TypeError):
            launch(**wrong)
    with pytest.raises(TypeError, match="expected 9 arguments, got 0"):
        cuda.launch()
    with pytest.raises(TypeError, match="expected 5 arguments, got 0"):
        cuda.clusters()
    with pytest.raises(ValueError, match="no image of 'other' was built"):
        cuda.image("other")


@pytest.mark.skipif(not shutil.which("readelf"), reason="reads ELF with binutils")
def test_it_is_bound_to_nothing_of_cuda_or_torch(cuda):
    asked = subprocess.check_output(["readelf", "-d", LIBRARY], text=True)
    needed = re.findall(r"NEEDED.*\[(.+?)\]", asked)
    assert needed and not [n for n in needed if re.search("cuda|nv|torch|c10|python", n)]
    one_binary = tool(ROOT, "one_binary")
    undefined, newest = one_binary.needs(LIBRARY)
    for pattern in one_binary.OTHERS.values():
        assert not [name for name in undefined if pattern.search(name)]
    manylinux2014 = {"GLIBC": [2, 17], "GLIBCXX": [3, 4, 19], "CXXABI": [1, 3, 7]}
    for name, most in manylinux2014.items():
        assert one_binary.numbers(newest.get(name, "0")) <= most, name
    defined = subprocess.check_output(["nm", "-D", "--defined-only", LIBRARY], text=True)
    assert [line.split()[-1] for line in defined.splitlines()] == ["PyInit__cuda"]


def is_coded(name, full):
    """Whether the instructions of a kernel are read, which takes seconds for all of them."""
    chosen = (
        "ward_(lstm_(b?float16_128|tf32_64|float32_32|(bfloat16|tf32)_(cluster|grid|wide))|"
        "indrnn_b?float16)|previous"
    )
    return full or re.search(chosen, name)


@pytest.fixture(scope="module")
def binaries(cuda, request):
    """(kernel, architecture) -> its machine code."""
    if cuobjdump() is None:
        pytest.skip("there is no cuobjdump, neither CUDA's nor Triton's")
    full = request.config.getoption("--full")
    coded = [name for name in cuda.kernels() if is_coded(name, full)]
    return {
        (name, architecture): binary
        for unit in cuda.units()
        for architecture in cuda.architectures().split()
        for name, binary in read(
            cuda.image(unit), architecture, *(n for n in coded if f"_{unit}_" in f"_{n}")
        ).items()
    }


def test_every_kernel_is_there_for_every_architecture(cuda, binaries):
    assert set(binaries) == {(n, a) for n in cuda.kernels() for a in cuda.architectures().split()}
    assert all(binary.registers > 0 for binary in binaries.values())


def test_registers_and_shared_memory_are_those_that_the_planner_counts_with(binaries):
    for (name, architecture), binary in binaries.items():
        kernel = KERNELS.get(name) or TEAMS.get(name)
        if kernel is not None:
            assert binary.registers <= kernel.registers <= 255, (name, architecture)
        assert binary.shared <= 1024, (name, architecture)  # the planner's is asked at the launch


def test_no_register_is_spilled_and_no_stack_is_used(binaries):
    """A register that is spilled has its place in the stack frame."""
    spilled = {
        (name, architecture): binary
        for (name, architecture), binary in binaries.items()
        if binary.stack or binary.local or binary.spilled
    }
    assert not spilled, "\n".join(
        f"{name} sm_{architecture}: stack {b.stack}, local {b.local}, {b.spilled} accesses"
        for (name, architecture), b in spilled.items()
    )


#: The matrix instructions of a type. Those of float32 multiply parts of TF32.
PRODUCTS = {
    "bfloat16": r"HMMA\.16816\.F32\.BF16$",
    "float16": r"HMMA\.16816\.F32$",
    "tf32": r"HMMA\.1688\.F32\.TF32$",
    "float32": r"HMMA\.1688\.F32\.TF32$",
}


def products_that_are_meant(kernel):
    """Of one step: each fragment of the weights once, or four times where it is of two parts."""
    return kernel.fragments * (4 if kernel.type == "float32" else 1)


def test_the_products_are_those_of_the_type(cuda, binaries, request):
    full, seen = request.config.getoption("--full"), set()
    for (name, architecture), binary in binaries.items():
        if not is_coded(name, full):
            continue
        kernel = KERNELS.get(name)  # none where it walks nowhere
        if name in TEAMS:
            continue
        of_matrices = binary.count("[A-Z]{1,2}MMA")
        assert binary.code.total() > 100, name
        if kernel is None or not kernel.fragments:
            assert of_matrices == 0, (name, architecture)
            continue
        seen.add(kernel.type)
        meant = binary.count(PRODUCTS[kernel.type])
        assert meant == of_matrices, (name, architecture)
        # a kernel may have several loops over time; in one of them, what is left in shared memory
        # may be gone through in a loop of its own
        loops, left = divmod(meant, products_that_are_meant(kernel))
        assert meant > 0 and (kernel.rest or (loops <= 3 and left == 0)), (name, architecture)
    assert seen == set(PRODUCTS)


def products_of_teams(kernel):
    """As they stand in the code of a tile of columns: of all that registers hold, and of what rests
    in shared memory one turn of its loop, two pairs of each row tile or two row tiles; there are
    two for each pair."""
    if kernel.way == "forward":
        # of wide slices two tiles of columns at once, and what is left over alone
        columns = 3 if kernel.wide and kernel.tiles < 3 else 1
        rest = 2 * 2 * kernel.tiles * (columns + 1) // 2
        return 2 * kernel.held * kernel.tiles * columns, rest
    return 2 * kernel.held * kernel.pairs, 2 * 2 * kernel.pairs


def read_teams(binaries, request, regime):
    full = request.config.getoption("--full")
    found = {
        (TEAMS[name], architecture): binary
        for (name, architecture), binary in binaries.items()
        if name in TEAMS and is_coded(name, full) and TEAMS[name].regime == regime
    }
    assert len(found) >= 4
    return found


@pytest.mark.parametrize("regime", ["cluster", "grid"])
def test_the_products_of_teams(binaries, request, regime):
    for (kernel, architecture), binary in read_teams(binaries, request, regime).items():
        meant = binary.count(PRODUCTS[kernel.type])
        assert meant == binary.count("[A-Z]{1,2}MMA"), (kernel.name, architecture)
        held, rest = products_of_teams(kernel)
        # an odd pair of what rests is gone through alone
        assert held < meant <= held + 2 * rest, (kernel.name, architecture)


#: Instructions of the loop over time of an LSTM in 16 bits for sm_90a, as nvcc 13.0 makes it: of
#: all that a step may need, ragged rows, resets, masks and rows at places that 16 does not divide.
#: A step of full rows runs about half. In the first form, which made addresses anew at every use,
#: they were 745 and 1,326, 1,091 and 1,950, and a step took up to twice as long.
TEAM_LOOPS = {
    "forward_cluster": 630,
    "backward_cluster": 1141,
    "forward_grid": 939,
    "backward_grid": 1764,
    "forward_wide": 1145,
    "backward_wide": 1495,
}


def test_the_instructions_of_a_teams_step_are_those_that_were_measured(binaries):
    seen = set()
    for (name, architecture), binary in binaries.items():
        kernel = TEAMS.get(name)
        if kernel is None or kernel.cell != "lstm" or kernel.type == "tf32" or not binary.loop:
            continue
        planned = TEAM_LOOPS.get(f"{kernel.way}_{kernel.kind}")
        if planned is None:
            continue
        if architecture.strip("a") == "90":
            assert 0.9 * planned < binary.loop < 1.06 * planned, (name, binary.loop)
        assert binary.loop < 1.4 * planned, (name, architecture, binary.loop)
        seen.add(f"{kernel.way}_{kernel.kind}")
    assert seen == set(TEAM_LOOPS)


#: 16 bytes that other CTAs see, as one; a store and a load.
PACKETS = r"STG\.E\.128\.STRONG\.GPU$", r"LDG\.E\.128\.STRONG\.GPU$"


def test_a_clusters_ctas_push_and_count_bytes(binaries, request):
    for (kernel, architecture), binary in read_teams(binaries, request, "cluster").items():
        at = kernel.name, architecture
        has = int(architecture.strip("a")) >= 90
        # st.async of 16 bytes; of an mbarrier making, expecting, looking; the cluster's barrier
        for word in (
            r"STAS\.128",
            r"SYNCS\.EXCH\.64",
            r"SYNCS\.ARRIVE\.TRANS64",
            r"SYNCS\.PHASECHK\.TRANS64",
            "UCGABAR_ARV",
            "UCGABAR_WAIT",
        ):
            assert (binary.count(word) > 0) == has, (word, *at)
        assert not binary.count("STAS(?!\\.128)"), at
        assert not any(map(binary.count, PACKETS)), at


def test_a_grids_ctas_store_and_load_packets_of_16_bytes(binaries, request):
    """Past the first-level cache, which is the multiprocessor's own."""
    for (kernel, architecture), binary in read_teams(binaries, request, "grid").items():
        at = kernel.name, architecture
        assert all(binary.count(word) > 0 for word in PACKETS), at
        assert not binary.count("STAS|SYNCS|UCGABAR"), at
        # nothing else is shared, and no cache that may be stale is asked
        strong = binary.count(r".*STRONG\.GPU")
        assert strong == sum(map(binary.count, PACKETS)), at
        assert not binary.count(r"LDG.*CONSTANT|LDG.*\.CI"), at
        if kernel.way == "backward":  # forward the weights come in vectors, before the first step
            assert not binary.count(r"LDG\.E\.128(?!\.STRONG)"), at


def test_what_cuobjdump_prints_is_understood():
    text = """
Resource usage:
 Common:
  GLOBAL:0
 Function forward_a:
  REG:40 STACK:8 SHARED:16 LOCAL:4 CONSTANT[0]:752 TEXTURE:0 SURFACE:0 SAMPLER:0
\t\tFunction : forward_a
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED"
        /*0000*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
        /*0010*/              @!P0 STL [R1], R2 ;            /* 0x0000000201007387 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0030*/               @P0 BRA 0x10 ;                /* 0xfffffffc00e00947 */
        /*0040*/                   BRA 0x40;
"""
    expected = Binary(registers=40, stack=8, shared=16, local=4, loop=3)
    expected.code.update(["LDC", "STL", "HMMA.16816.F32.BF16", "BRA", "BRA"])
    assert understood(text) == {"forward_a": expected}
    assert expected.spilled == 1 and expected.count("HMMA") == 1


# Without a driver, and with one that is played

ALONE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fastseq._cuda", {library!r})
_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_cuda)
assert "torch" not in sys.modules
ARGUMENTS = (77).to_bytes(8, "little") + bytes(8 * len(_cuda.fields().split()) - 8)
A, B, OTHER = {names}

def launch(
    name, device=0, shared=0, grid=(1, 2, 3), arguments=ARGUMENTS, cluster=1, together=False
):
    try:
        _cuda.launch(name, device, 7, grid, 128, shared, arguments, cluster, together)
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.full
def test_it_loads_in_every_python(cuda):
    others = pythons()
    if not others:
        pytest.skip("there is no other Python here")
    code = ALONE.format(library=str(LIBRARY), names=names(cuda)) + "print(_cuda.kernels())"
    for path in others.values():
        said = subprocess.check_output([path, "-I", "-c", code], text=True)
        assert said == f"{cuda.kernels()}\n"


@pytest.fixture(scope="module")
def play(cuda, tmp_path_factory):
    """Runs code with the fake driver; gives what it printed, and the driver's lines."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler")
    source = ROOT / "tests" / "helpers" / "fake_libcuda.c"
    made = {}

    def driver(*flags):
        if flags not in made:
            folder = tmp_path_factory.mktemp("driver")
            command = [compiler, "-shared", "-fPIC", *flags, source, "-o", folder / "libcuda.so.1"]
            subprocess.run(command, check=True)
            made[flags] = folder
        return made[flags]

    def run_with_it(code, *flags, folder=None, **environment):
        log = tmp_path_factory.mktemp("log") / "log"
        done = subprocess.run(
            [sys.executable, "-c", ALONE.format(library=str(LIBRARY), names=names(cuda)) + code],
            capture_output=True,
            text=True,
            env=os.environ
            | {"LD_LIBRARY_PATH": str(folder or driver(*flags)), "FAKE_LOG": str(log)}
            | environment,
        )
        assert done.returncode == 0, done.stderr
        calls = log.read_text().splitlines() if log.exists() else []
        return done.stdout.splitlines(), calls

    return run_with_it


def names(cuda):
    """Two kernels of a unit, and one of another."""
    a, b = [name for name in cuda.kernels() if name.startswith("forward_lstm_bfloat16")][:2]
    return a, b, next(name for name in cuda.kernels() if "_gru_" in name)


def launched(name, shared=0, x=1, more=""):
    return (
        f"cuLaunchKernelEx {name} grid {x} 2 3 block 128 1 1 shared {shared} stream 0x7 first 77"
        f"{more}"
    )


def allowed(name, shared, device=0):
    return f"cuKernelSetAttribute 8 = {shared} of {name} on {device}"


def allowed_large(name, device=0):
    """Clusters of more than eight."""
    return f"cuKernelSetAttribute 14 = 1 of {name} on {device}"


def readied(name):
    return [
        f"cuLibraryGetKernel {name}",
        f"cuKernelGetFunction {name}, mode 2",
        f"cuFuncLoad {name}, mode 2",
    ]


IMAGE = ["cuInit 0", "cuLibraryLoadData magic ba55ed50, preserved 1, mode 2"]


def test_without_a_driver_it_says_so_and_what_it_holds(play, tmp_path):
    if "libcuda.so.1" in subprocess.getoutput("ldconfig -p"):
        pytest.skip("there is a driver")
    code = "print(_cuda.driver()); launch(A); print(len(_cuda.kernels()) > 0)"
    (said, again, there), _ = play(code, folder=tmp_path)
    assert said == again and there == "True"
    assert re.fullmatch(r"there is no NVIDIA driver \(libcuda\.so\.1: cannot open .*\)", said)


def test_a_driver_that_is_too_old_is_named(play):
    (said, again), _ = play("print(_cuda.driver()); launch(A)", "-DOLD")
    assert said == again
    assert said == "the NVIDIA driver is too old, it has no cuLibraryLoadData"


def test_the_drivers_version(play):
    said, calls = play("print(repr(_cuda.driver()))", FAKE_VERSION="12040")
    assert said == ["12040"] and not calls


def test_an_image_is_loaded_once_and_a_kernel_made_ready_once(cuda, play):
    a, b, other = names(cuda)
    said, calls = play("launch(A); launch(A); launch(B); launch(OTHER); launch(A)")
    assert not said
    assert calls == [
        *IMAGE, *readied(a), launched(a), launched(a),
        *readied(b), launched(b),
        *IMAGE, *readied(other), launched(other),
        launched(a),
    ]  # fmt: skip


def test_shared_memory_is_asked_for_where_it_grows(cuda, play):
    a, *_ = names(cuda)
    given = (1024, 1024, 512, 90000, 1024)
    _, calls = play(f"for shared in {given}: launch(A, shared=shared)")
    assert calls == [
        *IMAGE, *readied(a), allowed(a, 1024), launched(a, 1024),
        launched(a, 1024), launched(a, 512),
        allowed(a, 90000), launched(a, 90000), launched(a, 1024),
    ]  # fmt: skip


def test_clusters_and_all_at_once_are_asked_for_where_they_are_wanted(cuda, play):
    a, *_ = names(cuda)
    said, calls = play(
        "launch(A, grid=(8, 2, 3), cluster=4)\n"
        "launch(A, grid=(8, 2, 3), cluster=8)\n"
        "launch(A, together=True)\n"
        "launch(A, together=1)\n"
        "launch(A, grid=(8, 2, 3), cluster=2, together=True)\n"
        "launch(A, together=0)\n"
    )
    assert not said
    assert calls == [
        *IMAGE, *readied(a),
        launched(a, x=8, more=" cluster 4 1 1"),
        launched(a, x=8, more=" cluster 8 1 1"),
        launched(a, more=" cooperative 1"),
        launched(a, more=" cooperative 1"),
        launched(a, x=8, more=" cluster 2 1 1 cooperative 1"),
        launched(a),
    ]  # fmt: skip


def test_large_clusters_are_allowed_once_on_each_device(cuda, play):
    a, b, _ = names(cuda)
    said, calls = play(
        "import os\n"
        "def large(name, size=16, **how): launch(name, grid=(size, 2, 3), cluster=size, **how)\n"
        "launch(A, shared=9); large(A, shared=5); large(A, 9); large(A, shared=20)\n"
        "launch(A, shared=15); large(A); large(B, shared=9); large(B)\n"
        "os.environ['FAKE_CONTEXT'] = '1'; large(A, device=1); large(A, device=1)"
    )
    assert not said

    def large(name, shared=0, size=16):
        return launched(name, shared, size, f" cluster {size} 1 1")

    assert calls == [
        *IMAGE, *readied(a), allowed(a, 9), launched(a, 9),
        allowed_large(a), large(a, 5), large(a, size=9),
        allowed(a, 20), large(a, 20),
        launched(a, 15), large(a),
        *readied(b), allowed(b, 9), allowed_large(b), large(b, 9), large(b),
        *readied(a)[1:], allowed_large(a, 1), large(a), large(a),
    ]  # fmt: skip


def test_each_device_is_made_ready_and_shares_the_image(cuda, play):
    a, *_ = names(cuda)
    code = "launch(A, shared=9); os.environ['FAKE_CONTEXT'] = '1'; launch(A, 1, shared=9)"
    _, calls = play(f"import os; {code}")
    assert calls == [
        *IMAGE, *readied(a), allowed(a, 9), launched(a, 9),
        *readied(a)[1:], allowed(a, 9, device=1), launched(a, 9),
    ]  # fmt: skip


def test_the_context_is_the_devices(cuda, play):
    a, *_ = names(cuda)
    said, calls = play("launch(A)", FAKE_CONTEXT="none")
    assert not calls and said == [
        "no CUDA context is current, and device 0 has none: torch makes it with its first tensor "
        "there"
    ]
    said, calls = play("launch(A)", FAKE_CONTEXT="1")
    assert not calls and said == [
        "the current CUDA context is of device 1, expected one of device 0: call within "
        "torch.cuda.device(0)"
    ]
    # a thread that torch has not been in, as autograd's are at their start
    said, calls = play("launch(A)", FAKE_CONTEXT="primary")
    assert not said
    assert calls[:2] == ["cuDevicePrimaryCtxRetain 0", "cuCtxSetCurrent 0"]
    assert calls[-1] == launched(a)


def test_capture_is_in_its_own_mode_again_after_loading(play):
    """The fake takes down a thread's mode where it loads: relaxed there, and global after it."""
    code = """
import ctypes
mode = ctypes.c_int(1)
exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
exchange(ctypes.byref(mode))  # thread-local, from now on
for way in (lambda name: _cuda.attributes(name, 0), launch):
    for name in (A, B, OTHER):
        way(name)
launch(_cuda.kernels()[-1])
exchange(ctypes.byref(mode))
print(mode.value)
"""
    said, calls = play(code, FAKE_FAIL="cuFuncLoad=0")
    assert said == ["1"]
    assert all(line.endswith("mode 2") for line in calls if "mode" in line)
    said, _ = play(code, FAKE_FAIL="cuFuncLoad=1")
    assert said[-1] == "1"


def test_threads_load_an_image_once(play):
    code = """
from threading import Barrier, Thread
barrier = Barrier(8)
def work():
    barrier.wait()
    for name in (A, B, OTHER):
        launch(name)
threads = [Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    said, calls = play(code, FAKE_SLOW="2000")
    counted = [line.partition(" ")[0] for line in calls]
    assert not said and counted.count("cuLibraryLoadData") == 2
    assert counted.count("cuFuncLoad") == counted.count("cuLibraryGetKernel") == 3
    assert counted.count("cuLaunchKernelEx") == 8 * 3


def test_threads_that_want_more_and_less_shared_memory_leave_the_most(play):
    code = """
from threading import Barrier, Thread
barrier = Barrier(8)
def work(k):
    barrier.wait()
    launch(A, shared=1000 * (k + 1))
threads = [Thread(target=work, args=(k,)) for k in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    for _ in range(3):
        said, calls = play(code, FAKE_SLOW="2000")
        allowed = [int(line.split()[3]) for line in calls if "cuKernelSetAttribute" in line]
        assert not said and allowed == sorted(set(allowed)) and allowed[-1] == 8000


def test_threads_that_want_large_clusters_and_shared_memory_get_both_once(cuda, play):
    """Whichever comes first, neither takes back what the other was allowed."""
    a, *_ = names(cuda)
    code = """
from threading import Barrier, Thread
barrier = Barrier(8)
def work(k):
    barrier.wait()
    launch(A, shared=5000 * (k % 2), grid=(16, 2, 3), cluster=16 if k < 4 else 4)
threads = [Thread(target=work, args=(k,)) for k in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    for _ in range(3):
        said, calls = play(code, FAKE_SLOW="2000")
        assert not said
        set_ = [line for line in calls if line.startswith("cuKernelSetAttribute")]
        assert sorted(set_) == sorted([allowed(a, 5000), allowed_large(a)])
        launches = [line for line in calls if line.startswith("cuLaunchKernelEx")]
        assert len(launches) == 8 and sum("cluster 16" in line for line in launches) == 4
        first = next(k for k, line in enumerate(calls) if "cluster 16" in line)
        assert calls.index(allowed_large(a)) < first


@pytest.mark.parametrize(
    "function",
    ["cuInit", "cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuFuncLoad",
     "cuKernelSetAttribute", "cuLaunchKernelEx"],
)  # fmt: skip
def test_an_error_says_what_was_launched_how(cuda, play, function):
    a, *_ = names(cuda)
    said, calls = play("launch(A, shared=4096); launch(A, shared=4096)", FAKE_FAIL=f"{function}=1")
    sentence = (
        f"{a} on device 0, grid (1, 2, 3), 128 threads, 4096 bytes of shared memory: {function}: "
        "CUDA_ERROR_INVALID_VALUE (1), invalid argument"
    )
    assert said == [sentence, sentence], "and it is tried again"
    assert sum(line.startswith(function) for line in calls) == 2


def test_an_error_says_how_ctas_were_to_be_together(cuda, play):
    a, *_ = names(cuda)
    code = (
        "launch(A, grid=(16, 2, 3), cluster=16)\n"
        "launch(A, together=True)\n"
        "launch(A, grid=(8, 2, 3), shared=9, cluster=4, together=True)\n"
    )

    def sentences(function):
        why = f"{function}: CUDA_ERROR_INVALID_VALUE (1), invalid argument"
        threads = "128 threads, {} bytes of shared memory".format
        return [
            f"{a} on device 0, grid (16, 2, 3) in clusters of 16, {threads(0)}: {why}",
            f"{a} on device 0, grid (1, 2, 3), {threads(0)}, all at once: {why}",
            f"{a} on device 0, grid (8, 2, 3) in clusters of 4, {threads(9)}, all at once: {why}",
        ]

    said, _ = play(code, FAKE_FAIL="cuLaunchKernelEx=1")
    assert said == sentences("cuLaunchKernelEx")
    said, calls = play(code, FAKE_FAIL="cuKernelSetAttribute=1")
    first, _, last = sentences("cuKernelSetAttribute")
    assert said == [first, last]
    assert calls[-2:] == [launched(a, more=" cooperative 1"), allowed(a, 9)]


def test_a_device_for_which_nothing_was_built_is_told_for_what_it_was(cuda, play):
    (said,), _ = play("launch(A)", FAKE_FAIL="cuFuncLoad=209")
    assert said.endswith(
        "cuFuncLoad: CUDA_ERROR_NO_BINARY_FOR_GPU (209), no kernel image is available; "
        f"built for the architectures {cuda.architectures()}"
    )
    (said,), _ = play("launch(A)", FAKE_FAIL="cuLaunchKernelEx=999")
    assert said.endswith("cuLaunchKernelEx: an unknown error (999)")


def test_arguments_are_any_bytes(cuda, play):
    a, *_ = names(cuda)
    code = "[launch(A, arguments=kind(ARGUMENTS)) for kind in (bytes, bytearray, memoryview)]"
    said, calls = play(code)
    assert not said and calls[-3:] == [launched(a)] * 3


def test_attributes_and_occupancy(cuda, play):
    a, *_ = names(cuda)
    said, calls = play(
        "print(_cuda.attributes(A, 2)); print(_cuda.occupancy(A, 0, 256, 60000))\n"
        "try: _cuda.occupancy(A, 0, 256, 60001)\n"
        "except RuntimeError as error: print(error)",
        FAKE_FAIL="cuKernelSetAttribute=0",
    )
    found = {"registers": 204, "local": 203, "shared": 201, "threads": 200, "binary": 206}
    assert said == [str(found), "3"]
    assert f"cuKernelSetAttribute 8 = 60000 of {a} on 0" in calls
    said, _ = play("print(_cuda.attributes(A, 2))", FAKE_FAIL="cuInit=0")
    assert said == [str(found)]


def test_how_many_clusters_a_device_has_at_once(cuda, play):
    a, *_ = names(cuda)
    said, calls = play("for size in (1, 4, 16, 16): print(_cuda.clusters(A, 0, size, 256, 60000))")
    assert said == ["32", "8", "2", "2"]

    def asked(size):
        return (
            f"cuOccupancyMaxActiveClusters {a} grid {size} 1 1 block 256 1 1 shared 60000 "
            f"cluster {size} 1 1"
        )

    assert calls == [
        *IMAGE, *readied(a), allowed(a, 60000), asked(1), asked(4),
        allowed_large(a), asked(16), asked(16),
    ]  # fmt: skip
    for function in ("cuFuncLoad", "cuKernelSetAttribute", "cuOccupancyMaxActiveClusters"):
        said, _ = play(
            "try: _cuda.clusters(A, 0, 16, 256, 9)\nexcept RuntimeError as error: print(error)",
            FAKE_FAIL=f"{function}=1",
        )
        assert said == [
            f"{a} on device 0, clusters of 16, 256 threads, 9 bytes of shared memory: {function}: "
            "CUDA_ERROR_INVALID_VALUE (1), invalid argument"
        ]


def test_whether_a_device_is_shared_and_starts_grids_all_at_once(play):
    code = "print(_cuda.limits(0)); print(_cuda.limits(1))"
    said, calls = play(code)
    assert said == ["{'mps': 0, 'cooperative': 1}", "{'mps': 1, 'cooperative': 1}"]
    asked = [f"cuDeviceGetAttribute {attribute} of {k}" for k in (0, 1) for attribute in (133, 95)]
    assert [line for line in calls if line != "cuInit 0"] == asked
    # what a driver does not know it does not have
    said, _ = play(code, FAKE_UNKNOWN="133")
    assert said == ["{'mps': 0, 'cooperative': 1}"] * 2
    said, _ = play(code, FAKE_FAIL="cuDeviceGetAttribute=1")
    assert said == ["{'mps': 0, 'cooperative': 0}"] * 2


# A build that is not the tree's


def test_the_build_of_the_tree_is_told_from_others(cuda, monkeypatch):
    backend = imported("cuda")
    if isinstance(backend, str):
        pytest.skip(backend)
    assert {name: getattr(cuda, name).__doc__ for name in backend.SIGNATURES} == backend.SIGNATURES

    class Other:
        """As the extension, and without one function, or with other arguments of it."""

        def __init__(self, name, text):
            self._name, self._text = name, text

        def __getattr__(self, name):
            if name != self._name:
                return getattr(cuda, name)
            if self._text is None:
                raise AttributeError(name)
            return SimpleNamespace(__doc__=self._text)

    class OtherFields(Other):
        def fields(self):
            return cuda.fields().replace("packets", "parcels")

    reason = (
        "the CUDA kernels were built from the sources of another version of fastseq; build them"
        " again: make build, or pip install ."
    )
    older = "(name, device, stream, (x, y, z), threads, shared, arguments)"
    others = Other("launch", older), Other("limits", None), OtherFields("", "")
    for other in others:
        monkeypatch.setattr(backend, "_cuda", other)
        assert backend.unavailable() == reason
    monkeypatch.setattr(backend, "_cuda", Other("", ""))
    assert backend.unavailable() != reason
