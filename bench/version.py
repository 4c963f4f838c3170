"""Which state of the code was measured."""

import hashlib
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
#: Where a copy of the tree that has no .git says which commit it is.
FILE = ROOT / "out/commit"
#: The sources of fastseq's binaries for GPUs.
BINARIES = ("csrc/cuda", "csrc/launch", "csrc/cuda_module.cpp")
#: What a note says of a commit from which the tree differed.
CHANGED = "with changes"


def commit(tree: Path = ROOT) -> str:
    """The short commit, with '-dirty' where files differ from it; 'unversioned' without git.

    Where there is no git, the variable FASTSEQ_COMMIT names this tree's, or the file out/commit.
    """
    given = os.environ.get("FASTSEQ_COMMIT", "").strip() if tree == ROOT else ""
    if given:
        return given
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"],
            cwd=tree,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        name = ""
    if not name and tree == ROOT and FILE.exists():
        name = FILE.read_text().strip()
    return name or "unversioned"


def state() -> str:
    """The commit; where it does not say which code ran, a digest of the package beside it."""
    name = commit()
    if not name.endswith("-dirty") and name != "unversioned":
        return name
    digest = hashlib.sha256()
    sources = [*(ROOT / "fastseq").rglob("*.py"), *(ROOT / BINARIES[0]).rglob("*.*")]
    for file in sorted(sources):
        digest.update(file.read_bytes())
    return f"{name}.{digest.hexdigest()[:7]}"


def same_code(name: str, now: str) -> bool:
    """Whether the package of commit ``name`` is the present one, as far as git can tell, and so are
    the sources of its binaries for GPUs."""
    if name == now:
        return True
    if not name or "-dirty" in name + now or "unversioned" in name + now:
        return False
    command = ["git", "diff", "--quiet", name, now, "--", "fastseq", *BINARIES]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    except OSError:
        return False
