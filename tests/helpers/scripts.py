"""The scripts of examples/ as modules."""

import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent.parent / "examples"


def example(name):
    """A module of the folder, loaded once. Its name is its own: the tests have modules of the same
    names, and only what examples share is found by a plain import."""
    known = name if name == "common" else f"example_{name}"
    if known in sys.modules:
        return sys.modules[known]
    if name != "common":
        example("common")
    spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[known] = module
    spec.loader.exec_module(module)
    return module
