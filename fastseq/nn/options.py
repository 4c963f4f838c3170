"""fastseq's own options of a layer or cell, apart from the names that a subclass may want."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn

from ..backends.choice import as_order
from ..backends.contract import Backend, Memory
from ..cells import Cell
from ..ops import masks


def check_memory(memory: Any) -> Memory:
    if memory not in ("full", "lean"):
        raise ValueError(f"memory: expected 'full' or 'lean', got {memory!r}")
    return memory


def check_deterministic(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"deterministic: expected a bool, got {type(value).__name__}")
    return value


def check_rate(name: str, value: Any) -> float:
    """A probability, as torch.nn asks of its ``dropout``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) <= 1:
        raise ValueError(
            f"{name} should be a number in range [0, 1] representing the probability of an "
            f"element being zeroed, got {value!r}"
        )
    return float(value)


def check_recurrent_rate(name: str, value: Any, diagonal: str | None) -> float:
    """The same of a mask of the recurrent product or its weights, which a cell may lack."""
    rate = check_rate(name, value)
    if rate and diagonal is not None:
        raise ValueError(f"{name}: {diagonal} has no recurrent product, in which it could drop any")
    return rate


def check_zoneout(states: tuple[str, ...], value: Any) -> float | tuple[float, ...]:
    """A rate for all states of the cell, or one for each."""
    rates = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(rates) not in (1, len(states)):
        raise ValueError(
            f"zoneout: expected a number, or one for each of {', '.join(states)}, got {value!r}"
        )
    checked = tuple(check_rate("zoneout", rate) for rate in rates)
    return checked[0] if len(set(checked)) == 1 else checked


class Functions(tuple[Callable[[Any], Any], ...]):
    """Functions of a module, in order; shown by their names."""

    def __repr__(self) -> str:
        shown = [_shown(function) for function in self]
        return shown[0] if len(shown) == 1 else f"({', '.join(shown)})"


def _shown(function: Any) -> str:
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"partial({', '.join([_shown(function.func), *given])})"
    return getattr(function, "__name__", None) or repr(function)


#: One function of a module, or several in order.
Init = Callable[[Any], Any] | Sequence[Callable[[Any], Any]]


def check_init(value: Any) -> Functions:
    functions = value if isinstance(value, (tuple, list)) else (value,)
    for function in functions:
        if not callable(function) or isinstance(function, nn.Module):
            got = repr(function) if isinstance(function, str) else type(function).__name__
            raise TypeError(
                "init: expected a function of the module, as fastseq.init.orthogonal_, or several "
                f"in order, got {got}"
            )
    return Functions(functions)


def check_learn_state(now: bool, value: Any) -> bool:
    """It decides which parameters a layer has, so it stays as it was when the layer was made."""
    if not isinstance(value, bool):
        raise TypeError(f"learn_state: expected a bool, got {type(value).__name__}")
    if value != now:
        raise ValueError(
            f"learn_state: the layer was made with {now}, and its parameters are those of that; "
            f"make another layer, with learn_state={value}"
        )
    return value


class Options:
    """What fastseq lets one choose, as attributes that are checked when they are set."""

    backend: Backend = None
    init: Functions = Functions()

    #: how each option is checked, of the options and the value; an option that stands here exists
    checks: ClassVar[dict[str, Callable[[Any, Any], Any]]] = {
        "backend": lambda self, value: as_order(value),
        "init": lambda self, value: check_init(value),
    }

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self.checks:
            raise AttributeError(
                f"{name}: no option of fastseq's; there are {', '.join(self.checks)}"
            )
        self.__dict__[name] = self.checks[name](self, value)

    def __delattr__(self, name: str) -> None:
        setattr(self, name, getattr(type(self), name, None))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self.given())})"

    def given(self) -> list[str]:
        """Those that are not the default, as a ``repr`` shows them."""
        own = ((name, getattr(self, name)) for name in self.checks)
        return [f"{name}={value!r}" for name, value in own if value != getattr(type(self), name)]


class CellOptions(Options):
    """The options of a cell, which it has as ``cell.fastseq``.

    backend: None chooses; else a name of :func:`fastseq.backends`, or several in order.
    init: a function of the cell, or several in order, that ``reset_parameters`` ends with; see
        :mod:`fastseq.init`.
    """


class LayerOptions(Options):
    """The options of a layer, which it has as ``layer.fastseq``: what fastseq.LSTM takes as
    keywords, and what ``layer.fastseq.zoneout = 0.1`` sets later.

    backend, memory, deterministic, recurrent_dropout, input_dropout, weight_dropout, zoneout, init,
    learn_state (which stays as it was when the layer was made): see :class:`fastseq.nn.Recurrent`.

    Raises, when one is set:
        ValueError, TypeError: no such value.
        AttributeError: no such option.
    """

    memory: Memory = "full"
    deterministic: bool = False
    recurrent_dropout: float = 0.0
    input_dropout: float = 0.0
    weight_dropout: float = 0.0
    zoneout: float | tuple[float, ...] = 0.0
    learn_state: bool = False
    #: the states of the cell, for each of which zoneout may be given
    states: tuple[str, ...] = ("h",)
    #: the name of a cell that has no recurrent product, and so nothing that these could mask
    diagonal: str | None = None
    #: None where nothing is masked: torch.compile need not look at numbers that may change.
    rates: masks.Rates | None = None
    #: Whether nothing is masked and no state is learned: the one question of a short call.
    plain: bool = False

    checks: ClassVar[dict[str, Callable[[Any, Any], Any]]] = {
        "backend": Options.checks["backend"],
        "memory": lambda self, value: check_memory(value),
        "deterministic": lambda self, value: check_deterministic(value),
        "recurrent_dropout": lambda self, value: check_recurrent_rate(
            "recurrent_dropout", value, self.diagonal
        ),
        "input_dropout": lambda self, value: check_rate("input_dropout", value),
        "weight_dropout": lambda self, value: check_recurrent_rate(
            "weight_dropout", value, self.diagonal
        ),
        "zoneout": lambda self, value: check_zoneout(self.states, value),
        "init": Options.checks["init"],
        "learn_state": lambda self, value: check_learn_state(self.learn_state, value),
    }

    def __init__(self, cell: Cell | None = None, learn_state: bool = False, **values: Any) -> None:
        now = bool(learn_state)
        self.__dict__.update(learn_state=check_learn_state(now, learn_state))
        if cell is not None:
            self.__dict__["states"] = cell.states
            self.__dict__["diagonal"] = None if cell.products else cell.called
        self.__dict__["plain"] = not learn_state
        super().__init__(**values)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in masks.Rates._fields:
            zoneout = self.zoneout if isinstance(self.zoneout, tuple) else (self.zoneout,)
            if len(zoneout) == 1:
                zoneout *= len(self.states)
            rates = masks.Rates(
                self.recurrent_dropout,
                self.input_dropout,
                self.weight_dropout,
                zoneout if any(zoneout) else (),
            )
            self.__dict__["rates"] = rates if any(rates) else None
            self.__dict__["plain"] = self.rates is None and not self.learn_state


def check_model(model: Any) -> None:
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        got, remedy = f"the class {model.__name__}", "make an instance of it first"
    elif isinstance(model, torch.optim.Optimizer):
        got, remedy = type(model).__name__, "pass the model whose parameters it holds"
    elif isinstance(model, dict):
        got, remedy = type(model).__name__, "load a state_dict into a model, and pass that"
    elif isinstance(model, Iterable) and not isinstance(model, (str, torch.Tensor)):
        got, remedy = type(model).__name__, "pass each of the modules, or an nn.ModuleList of them"
    elif callable(model):
        got, remedy = type(model).__name__, "pass the module that it calls"
    else:
        got, remedy = type(model).__name__, "pass the model itself"
    raise TypeError(f"model: expected a torch.nn.Module, got {got}; {remedy}")


def set_options(model: nn.Module, **options: Any) -> None:
    """Set options of every layer and cell of fastseq in ``model``, as ``backend="eager"``.

    Args:
        model: any module.
        options: names and values, as the layers take them. Cells have ``backend`` and ``init``
            alone. What ``init`` says is done by the next ``reset_parameters``.

    Raises:
        TypeError, ValueError: no module, no such option or value; nothing is changed then.
    """
    check_model(model)
    for name in options:
        if name not in LayerOptions.checks:
            raise TypeError(
                f"{name}: no option of fastseq's; there are {', '.join(LayerOptions.checks)}"
            )
    found = [m.fastseq for m in model.modules() if isinstance(m, HasOptions)]
    ready = [
        (own, {name: own.checks[name](own, v) for name, v in options.items() if name in own.checks})
        for own in found
    ]
    for own, values in ready:
        for name, value in values.items():
            setattr(own, name, value)


class HasOptions:
    """A module with options. Besides torch.nn's attributes a layer or cell of fastseq has
    ``fastseq``, and names that begin with ``_fastseq``: all others are the user's."""

    _fastseq: Any = None

    @property
    def fastseq(self) -> Any:
        """fastseq's own options of this module: :class:`LayerOptions` or :class:`CellOptions`."""
        return options(self)

    def _fastseq_options(self, **given: Any) -> Options:
        """The options of such a module, all but ``given`` as they are before any was set."""
        raise NotImplementedError

    def _fastseq_draw(self) -> None:
        """Draw the initial values that there are without options: torch.nn's."""
        super().reset_parameters()  # type: ignore[misc]

    def _fastseq_begin(self, **given: Any) -> None:
        """The end of every constructor: the options, and the initial values that they ask for."""
        self._fastseq = self._fastseq_options(**given)
        initialize(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy begins with: options of its own, a shallow copy's too."""
        above = getattr(super(), "__getstate__", None)  # Python 3.10 has none of objects
        state = self.__dict__ if above is None else above()
        return {**state, "_fastseq": copy.copy(options(self))}


def initialize(module: Any) -> None:
    """Run the functions of the option ``init``, where the options were set already."""
    if module._fastseq is not None:
        for function in module._fastseq.init:
            function(module)


def options(module: Any) -> Any:
    """The options of a module; made where its class was changed by hand."""
    found = module._fastseq
    if found is None:
        found = module.__dict__["_fastseq"] = module._fastseq_options()
    return found


def of_today(module: Any, state: dict[str, Any]) -> dict[str, Any]:
    """A pickled module's attributes. In older pickles the options stand among them; what would be
    none, as another ``backend`` of a module that torch.nn pickled, is the user's."""
    if "_fastseq" in state or "backend" not in state:
        return state
    own, given = module._fastseq_options(), state
    state = dict(state)
    rates = state.pop("_rates", None) or masks.Rates()
    former = {name: state.pop(name) for name in own.checks if name in state}
    if isinstance(own, LayerOptions):
        former |= {name: value for name, value in rates._asdict().items() if value}
    try:
        for name, value in former.items():
            setattr(own, name, value)
    except (TypeError, ValueError):
        return given
    return state | {"_fastseq": own}
