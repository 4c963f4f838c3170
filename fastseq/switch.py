"""The switch of a whole process: fastseq's classes in the place of torch.nn's."""

from __future__ import annotations

import copyreg
import sys
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any

from torch import nn

from .nn.convert import COMPAT, COUNTERPARTS

_PLACES = (nn, nn.modules, nn.modules.rnn)
#: (module, name) -> the class that stood there before install().
_before: dict[tuple[ModuleType, str], Any] = {}


def install() -> None:
    """Put the classes of :mod:`fastseq.compat` in the place of torch.nn's, in this process.

    ``torch.nn.RNN``, ``LSTM``, ``GRU`` and the three cells are fastseq's from here on, in torch.nn
    and in torch.nn.modules.rnn: for code that makes layers itself, and for subclasses. Call it
    before the modules that use them are imported: what was imported with ``from torch.nn import
    LSTM``, derived or made earlier stays torch's, and :func:`fastseq.replace` turns it.
    A second call changes nothing; :func:`uninstall` undoes it.

    The new classes derive from torch.nn's, so ``isinstance`` holds for the layers made from here
    on, also where torch's class was imported before.

    Sets ``torch._dynamo.config.allow_rnn``, without which ``torch.compile`` breaks its graph at an
    instance of ``torch.nn.LSTM``, when torch._dynamo is loaded, which this call does not do: it
    takes a second or more.
    """
    for theirs, ours in COUNTERPARTS.items():
        for place in _PLACES:
            key, mine = (place, theirs.__name__), COMPAT[ours]
            if getattr(place, theirs.__name__) is not mine:
                _before[key] = getattr(place, theirs.__name__)
                setattr(place, theirs.__name__, mine)
        copyreg.pickle(theirs, _reduced)
    _dynamo.allow()


def uninstall() -> None:
    """Put back what stood in torch.nn before :func:`install`. Layers and subclasses made since stay
    fastseq's; :func:`fastseq.restore` turns the layers."""
    for (place, name), before in _before.items():
        if getattr(place, name) in COMPAT.values():  # else another tool put its own there since
            setattr(place, name, before)
    _before.clear()
    for theirs in COUNTERPARTS:
        copyreg.dispatch_table.pop(theirs, None)
    _dynamo.forbid()


def _reduced(layer: nn.Module) -> tuple[Any, ...]:
    """A layer that is torch.nn's still, for a pickle: the name of its class leads to ours."""
    reduced: Any = layer.__reduce_ex__(2)
    return (_made, (type(layer).__name__,), *reduced[2:])


def _made(name: str) -> nn.Module:
    kind = next(theirs for theirs in COUNTERPARTS if theirs.__name__ == name)
    return kind.__new__(kind)


class _Dynamo(MetaPathFinder):
    """Sets Dynamo's flag as soon as its configuration is there.

    It finds no module: Python asks it at every import, so also for the next one after
    torch._dynamo.config, which torch._dynamo loads before the rest.
    """

    was: bool | None = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.startswith("torch._dynamo."):
            self.allow()

    def allow(self) -> None:
        config: Any = sys.modules.get("torch._dynamo.config")
        if hasattr(config, "patch"):  # the last that it gets as it is loaded
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            if self.was is None:
                self.was, config.allow_rnn = config.allow_rnn, True
        elif self not in sys.meta_path:
            sys.meta_path.insert(0, self)

    def forbid(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        if self.was is not None:
            sys.modules["torch._dynamo.config"].allow_rnn = self.was  # type: ignore[attr-defined]
            self.was = None


_dynamo = _Dynamo()
