"""Between torch.nn's recurrent modules and fastseq's, sharing everything."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..backends.choice import as_order
from ..backends.contract import Backend, Memory
from . import compat as compat_classes
from . import flat_weights
from .asks import asked
from .cells import GRUCell, LSTMCell, RNNCell
from .counterparts import become, counterpart, own_methods, wrapped_by_torch
from .layers import GRU, LSTM, RNN
from .options import HasOptions, check_memory, check_model, options
from .recurrent import Recurrent

#: torch.nn's class -> fastseq's
COUNTERPARTS: dict[type[nn.Module], type[nn.Module]] = {
    ours._fastseq_torch: ours for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}
#: fastseq's main class -> that which is an instance of torch.nn's, too
COMPAT: dict[type[nn.Module], type[nn.Module]] = {
    ours: getattr(compat_classes, ours.__name__) for ours in COUNTERPARTS.values()
}
_NAMES = {theirs.__name__ for theirs in COUNTERPARTS}


@dataclass
class Report:
    """What :func:`replace` or :func:`restore` did; ``print`` it.

    swapped: name in the model -> the module as it is now. A module that stands at several places
        has several names.
    left: name -> why that recurrent module was left alone.
    notes: what else in the model's code may depend on the classes that were swapped.
    """

    swapped: dict[str, nn.Module] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, *_: Any, **__: Any) -> None:
        raise TypeError(
            "replace() and restore() change the model in place and return a report of it: call the "
            "model itself"
        )

    def __str__(self) -> str:
        lines = [f"swapped {len(self.swapped)}, left {len(self.left)}"]
        lines += [
            f"  {_place(name)}: now {_package(module)}.{module}"
            for name, module in self.swapped.items()
        ]
        lines += [f"  {_place(name)}: left, {reason}" for name, reason in self.left.items()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def _package(module: nn.Module) -> str:
    if type(module) in COMPAT.values():
        return "fastseq.compat"
    return "fastseq" if isinstance(module, HasOptions) else "torch.nn"


def _place(name: str) -> str:
    return name or "(the model itself)"


def replace(
    model: nn.Module, *, backend: Backend = None, memory: Memory = "full", compat: bool = False
) -> Report:
    """Turn every torch.nn.RNN, LSTM, GRU and cell in ``model`` into fastseq's, in place.

    Each module stays the same object and changes its class, so that parameters (tied and shared
    ones too), optimizers, buffers, hooks and their handles, train mode and every reference to it
    stay as they are; ``model`` may itself be such a module. Only torch.nn's exact types are
    swapped: a subclass may compute something else.

    Args:
        model: any module.
        backend, memory: the options of the layers that are swapped; cells have ``backend`` alone.
        compat: take the classes of :mod:`fastseq.compat`, for a model whose code asks
            ``isinstance(layer, nn.LSTM)``. Layers of fastseq's main classes then change into these
            too, and keep their options.

    Returns:
        A :class:`Report` of what was swapped, and of what was left and why.

    Raises:
        TypeError: ``model`` is no module.
        ValueError, TypeError: an unknown ``backend`` or ``memory``. Nothing is changed then.
    """
    check_model(model)
    if not isinstance(compat, bool):
        raise TypeError(f"compat: expected a bool, got {type(compat).__name__}")
    backend, memory = as_order(backend), check_memory(memory)
    report = Report()
    done: set[nn.Module] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module not in done:
            ours = COUNTERPARTS.get(type(module))
            reason = _reason_left(module)
            if ours is not None and reason is None:
                module.__class__ = COMPAT[ours] if compat else ours
                flat = module.__dict__.pop("_flat_weights", None)
                own: Any = options(module)
                own.backend = backend
                if isinstance(module, Recurrent):
                    own.memory = memory
                    flat_weights.adopt(module, flat)
                done.add(module)
            elif compat and type(module) in COMPAT and (beyond := module._fastseq_beyond):
                report.left[name] = f"{beyond}, of which it would be an instance"
            elif compat and type(module) in COMPAT and not own_methods(module):
                module.__class__ = COMPAT[type(module)]
                done.add(module)
            elif reason is not None:
                report.left[name] = reason
        if module in done:
            report.swapped[name] = module
    if not compat:
        report.notes += _notes(model, report.swapped)
    return report


def _reason_left(module: nn.Module) -> str | None:
    """Why a recurrent module is not swapped; None for what can be, and for other modules."""
    kind = type(module)
    if (
        isinstance(module, torch.jit.ScriptModule)
        and getattr(module, "original_name", None) in _NAMES
    ):
        return "it is scripted or traced; replace first, then script"
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "it is quantized; fastseq computes in floating point"
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if parametrize.is_parametrized(module):
        return (
            "it is parametrized; replace first and parametrize then, or remove the parametrizations"
        )
    if isinstance(module, HasOptions):
        return "it is fastseq's already"
    if wrapped_by_torch(kind):
        return f"torch.distributed made it a {kind.__name__}; replace first, and wrap it then"
    if kind in COUNTERPARTS:
        if names := own_methods(module):
            return (
                f"its {' and '.join(names)} was replaced on the instance, as a wrapper or a hook "
                "does; take that off, replace, and put it on again"
            )
        return None
    base = next(k for k in kind.__mro__ if k in COUNTERPARTS or k in (nn.RNNBase, nn.RNNCellBase))
    ours = _advised(module, base)
    return (
        f"{_named(kind)} is a subclass of torch.nn.{base.__name__} and may compute something "
        f"else; if it calls torch.nn's forward, derive it from {ours}, or call fastseq.install() "
        "before its module is imported"
    )


def _named(kind: type) -> str:
    """With its module where it can be found there: __module__ may be copied from another class."""
    name = kind.__qualname__
    found = getattr(sys.modules.get(kind.__module__), name, None) is kind
    return f"{kind.__module__}.{name}" if found else name


def _advised(module: Any, base: type[nn.Module]) -> str:
    """The class of fastseq to derive from in the place of ``base``."""
    name = base.__name__
    if base is nn.RNNBase:
        name = str(module.mode).partition("_")[0]
    return f"fastseq.{name}" if name in _NAMES else "fastseq's cell of that kind"


def _notes(model: nn.Module, swapped: dict[str, nn.Module]) -> Iterator[str]:
    """Where the code of the modules around the swapped layers asks for torch.nn's classes."""
    theirs = {ours: (kind, COMPAT[ours]) for kind, ours in COUNTERPARTS.items()}
    kinds: dict[type[nn.Module], set[type]] = {}
    for name, module in swapped.items():
        around = name
        while around:
            around = around.rpartition(".")[0]
            kinds.setdefault(type(model.get_submodule(around)), set()).update(theirs[type(module)])
    for kind, layers in kinds.items():
        found = dict.fromkeys(asked(kind, tuple(layers)))
        for layer in dict.fromkeys(layer for _, layer in found):
            methods = [method for method, of in found if of is layer]
            yield (
                f"isinstance(..., nn.{layer.__name__}) stands in {', '.join(methods)} and is false "
                "for the swapped layers; fastseq.replace(model, compat=True) keeps it true"
            )


def _counterpart_of_all(module: nn.Module) -> type[nn.Module] | str:
    """torch.nn's class that is all that ``module`` is, or why there is none."""
    theirs, kind = counterpart(module), type(module)
    if isinstance(theirs, str):
        return theirs
    ours = (*COMPAT, *COMPAT.values())
    own = [n for k in kind.__mro__[: _first_of(kind, ours)] for n in vars(k) if n[:2] != "__"]
    if not own:
        return theirs
    return f"torch.nn.{theirs.__name__} has no {', '.join(own)}, which {kind.__qualname__} has"


def _first_of(kind: type, those: Sequence[type]) -> int:
    return next(k for k, base in enumerate(kind.__mro__) if base in those)


def restore(model: nn.Module) -> Report:
    """The way back: turn every fastseq module in ``model`` into torch.nn's, in place.

    For tools that look for torch.nn's exact types, as ``quantize_dynamic`` does. A module that
    torch.nn cannot stand in for is left, and the report says why.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model(model)
    report = Report()
    done: set[nn.Module] = set()
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.Module) and isinstance(module, HasOptions):
            theirs = _counterpart_of_all(module)
            if isinstance(theirs, str):
                report.left[name] = theirs
                continue
            if lost := options(module).given():
                report.notes.append(f"{_place(name)}: torch.nn has no {', '.join(lost)}")
            become(module, theirs)
            done.add(module)
        if module in done:
            report.swapped[name] = module
    return report
