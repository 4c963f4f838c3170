"""How often the C++ kernels ran, and whether it was they."""

from contextlib import contextmanager

import pytest

from fastseq.backends import load

#: The entries of the backend, one layer or a whole stack a call, by the direction they go.
ENTRIES = {
    "forward": "forward",
    "layers": "forward",
    "backward": "backward",
    "layers_backward": "backward",
}


@contextmanager
def counted(name="native"):
    """Counts the calls of a backend's entries that it did not decline, by direction."""
    backend = load(name)
    count = {"forward": 0, "backward": 0}
    with pytest.MonkeyPatch.context() as patch:
        for entry, way in ENTRIES.items():
            before = getattr(backend, entry, None)
            if before is None:
                continue

            def spy(*arguments, before=before, way=way, **keywords):
                found = before(*arguments, **keywords)
                count[way] += found is not None
                return found

            patch.setattr(backend, entry, spy)
        yield count
