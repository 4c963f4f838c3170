"""Which state of the code was measured."""

import subprocess
from pathlib import Path


def commit() -> str:
    """The short commit, with '-dirty' where files differ from it; 'unversioned' without git."""
    try:
        name = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=7"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unversioned"
    return name or "unversioned"
