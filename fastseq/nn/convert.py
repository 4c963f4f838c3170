"""Between torch.nn's recurrent modules and fastseq's, sharing everything."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from ..backends.choice import as_order
from ..backends.contract import Backend, Memory
from . import flat_weights
from .cells import GRUCell, LSTMCell, RecurrentCell, RNNCell
from .counterparts import become, counterpart
from .layers import GRU, LSTM, RNN
from .options import check_memory, options
from .recurrent import Recurrent

#: torch.nn's class -> fastseq's
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    ours._fastseq_torch: ours for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
_NAMES = {theirs.__name__ for theirs in COUNTERPARTS}


@dataclass
class Report:
    """What :func:`replace` or :func:`restore` did; ``print`` it.

    swapped: name in the model -> the module as it is now. A module that stands at several places
        has several names.
    left: name -> why that recurrent module was left alone.
    """

    swapped: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        lines += [
            f"  {_place(name)}: now {_package(module)}.{module}"
            for name, module in self.swapped.items()
        ]
        lines += [f"  {_place(name)}: left, {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def _package(module: nn.Module) -> str:
    return "fastseq" if isinstance(module, (Recurrent, RecurrentCell)) else "torch.nn"


def _place(name: str) -> str:
    return name or "(the model itself)"


def replace(model: nn.Module, *, backend: Backend = None, memory: Memory = "full") -> Report:
    """Turn every torch.nn.RNN, LSTM, GRU and cell in ``model`` into fastseq's, in place.

    Each module stays the same object and changes its class, so that parameters (tied and shared
    ones too), optimizers, buffers, hooks and their handles, train mode and every reference to it
    stay as they are; ``model`` may itself be such a module. Only torch.nn's exact types are
    swapped: a subclass may compute something else.

    Args:
        model: any module.
        backend, memory: the options of the layers that are swapped; cells have ``backend`` alone.

    Returns:
        A :class:`Report` of what was swapped, and of what was left and why.

    Raises:
        ValueError, TypeError: an unknown ``backend`` or ``memory``; nothing is changed then.
    """
    backend, memory = as_order(backend), check_memory(memory)
    report = Report()
    done: set[nn.Module] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        ours = COUNTERPARTS.get(type(module))
        if ours is not None:
            module.__class__ = ours
            flat = module.__dict__.pop("_flat_weights", None)
            own: Any = options(module)
            own.backend = backend
            if isinstance(module, Recurrent):
                own.memory = memory
                flat_weights.adopt(module, flat)
            done.add(module)
        if module in done:
            report.swapped[name] = module
        elif (reason := _reason_left(module)) is not None:
            report.left[name] = reason
    return report


def _reason_left(module: nn.Module) -> str | None:
    """Why a recurrent module is not swapped; None for modules that are none."""
    kind = type(module)
    if getattr(module, "original_name", None) in _NAMES:
        return "it is scripted or traced; replace first, then script"
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "it is quantized; fastseq computes in floating point"
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if parametrize.is_parametrized(module):
        return (
            "it is parametrized; replace first and parametrize then, or remove the parametrizations"
        )
    if isinstance(module, (Recurrent, RecurrentCell)):
        return "it is fastseq's already"
    base = next(theirs for theirs in kind.__mro__ if theirs.__module__ == "torch.nn.modules.rnn")
    ours = getattr(COUNTERPARTS.get(base), "__name__", "RNN, LSTM or GRU")
    return (
        f"{kind.__qualname__} is a subclass of torch.nn.{base.__name__} and may compute something "
        f"else; derive it from fastseq.{ours}"
    )


def restore(model: nn.Module) -> Report:
    """The way back: turn every fastseq module in ``model`` into torch.nn's, in place.

    For tools that look for torch.nn's exact types, as ``quantize_dynamic`` does. A module that
    torch.nn cannot stand in for is left, and the report says why.
    """
    report = Report()
    done: set[nn.Module] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (Recurrent, RecurrentCell)):
            theirs = counterpart(module)
            if isinstance(theirs, str):
                report.left[name] = theirs
                continue
            become(module, theirs)
            done.add(module)
        if module in done:
            report.swapped[name] = module
    return report
