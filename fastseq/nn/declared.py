"""Layers and cells that torch.nn lacks, from the declaration of their cell alone.

A class of these says which cell it runs and where its parameters differ from torch.nn's custom; the
names and shapes of the parameters, the arguments, the mistakes and the calls are here and in
:mod:`.recurrent` and :mod:`.cells`, as torch.nn.LSTM and LSTMCell have them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..backends.contract import Backend, Memory
from ..cells import CELLS, Cell
from ..ops.checks import weight_shapes
from .cells import RecurrentCell, step
from .options import Init
from .recurrent import Recurrent

#: A module's names of the weights of a recurrence; a unit parameter ``v`` is ``weight_v``.
_NAMES = {
    "w_ih": "weight_ih",
    "w_hh": "weight_hh",
    "b_ih": "bias_ih",
    "b_hh": "bias_hh",
    "w_hr": "weight_hr",
}


def lacked(module: Any) -> str:
    """That torch.nn has none of the kind, in words."""
    return f"torch.nn has no {CELLS[module._fastseq_cell].called} among its cells"


def begin_layer(module: Any, mode: str, *arguments: Any) -> None:
    """Make a module a layer without parameters: ``arguments``, torch.nn.RNNBase's behind its mode,
    are checked as it checks them, and stand where it puts them."""
    plain = nn.RNNBase("RNN_TANH", *arguments, device="meta")  # type: ignore[misc]
    nn.Module.__init__(module)
    for name in nn.RNNBase.__constants__:
        setattr(module, name, getattr(plain, name))
    module.mode = mode


def register(
    module: Any, shapes: Mapping[str, tuple[int, ...]], place: str, kind: Any
) -> list[str]:
    """Give a module parameters; their names, which end in ``place``. kind: of device and dtype."""
    for name, shape in shapes.items():
        module.register_parameter(name + place, nn.Parameter(torch.empty(shape, **kind)))
    return [name + place for name in shapes]


def register_layers(
    module: Any, shapes: Callable[[int], Mapping[str, tuple[int, ...]]], width: int, kind: Any
) -> None:
    """The same for each layer and direction. shapes: of the size of a layer's input. width: of the
    output of one direction."""
    module._flat_weights_names, module._all_weights = [], []
    directions = ("", "_reverse")[: 2 if module.bidirectional else 1]
    size = module.input_size
    for layer in range(module.num_layers):
        for direction in directions:
            names = register(module, shapes(size), f"_l{layer}{direction}", kind)
            module._flat_weights_names += names
            module._all_weights.append(names)
        size = len(directions) * width
    module._init_flat_weights()


class Declared:
    """What the layers and cells share: how their parameters are called and begin."""

    #: unit parameters ``w_v`` of another name than ``weight_v``
    _fastseq_units: ClassVar[dict[str, str]] = {}

    hidden_size: int

    @classmethod
    def _fastseq_parameters(cls, cell: Cell, biased: bool, *sizes: int) -> dict[str, Any]:
        """Name -> shape, in the order in which a call takes them. sizes: I, H and proj_size."""
        shapes = weight_shapes(cell, biased, *sizes)
        units = {f"w_{v}": f"weight_{v}" for v in cell.unit_parameters}
        names = _NAMES | units | cls._fastseq_units
        return {names[name]: shape for name, shape in shapes.items()}

    def _fastseq_draw(self) -> None:
        """Draw all parameters from U(-1/sqrt(H), 1/sqrt(H)), in their order, as torch.nn does."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0.0
        for name, parameter in self.named_parameters():  # type: ignore[attr-defined]
            low, high = self._fastseq_range(name, bound)
            nn.init.uniform_(parameter, low, high)

    def _fastseq_range(self, name: str, bound: float) -> tuple[float, float]:
        """Between which numbers a parameter begins."""
        return -bound, bound

    @property
    def _fastseq_beyond(self) -> str | None:
        return lacked(self)


class DeclaredLayer(Declared, Recurrent, nn.RNNBase):
    """A layer of torch.nn's manner around a declared cell.

    A subclass sets ``_fastseq_cell``, and describes the cell: that is all that it needs.
    """

    _fastseq_torch = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        proj_size: int = 0,
        backend: Backend = None,
        memory: Memory = "full",
        deterministic: bool = False,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        init: Init = (),
        learn_state: bool = False,
    ) -> None:
        cell = CELLS[self._fastseq_cell]
        if proj_size:
            self._fastseq_check_projection(cell)
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        begin_layer(self, cell.called.upper(), *arguments, proj_size)

        def shapes(width: int) -> dict[str, Any]:
            return self._fastseq_parameters(cell, bias, width, hidden_size, proj_size)

        kind = {"device": device, "dtype": dtype}
        register_layers(self, shapes, proj_size or hidden_size, kind)
        self.reset_parameters()
        self._fastseq_begin(
            backend=backend,
            memory=memory,
            deterministic=deterministic,
            recurrent_dropout=recurrent_dropout,
            input_dropout=input_dropout,
            weight_dropout=weight_dropout,
            zoneout=zoneout,
            init=init,
            learn_state=learn_state,
        )

    def _fastseq_check_projection(self, cell: Cell) -> None:
        """Raise ValueError where h cannot be projected, which torch.nn has for the LSTM alone."""
        if not (cell.can_project and cell.other_states):
            name = type(self).__name__
            raise ValueError(f"proj_size argument is only supported for LSTM, not {name}")

    # torch.nn's own methods of an LSTM, for a subclass with a forward of its own
    get_expected_cell_size = nn.LSTM.get_expected_cell_size

    def check_forward_args(self, input: Tensor, hidden: Any, batch_sizes: Tensor | None) -> None:
        kind = nn.LSTM if isinstance(hidden, (tuple, list)) else nn.RNNBase
        kind.check_forward_args(self, input, hidden, batch_sizes)  # type: ignore[arg-type]

    def permute_hidden(self, hx: Any, permutation: Tensor | None) -> Any:
        kind = nn.LSTM if isinstance(hx, (tuple, list)) else nn.RNNBase
        return kind.permute_hidden(self, hx, permutation)  # type: ignore[arg-type]


class DeclaredCell(Declared, RecurrentCell, nn.RNNCellBase):
    """One step of a declared cell as a module, in torch.nn's manner; a subclass sets
    ``_fastseq_cell``."""

    _fastseq_torch = None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: Backend = None,
        init: Init = (),
    ) -> None:
        nn.Module.__init__(self)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        cell, sizes = CELLS[self._fastseq_cell], (input_size, hidden_size)
        given = self._fastseq_parameters(cell, bool(bias), *sizes)
        register(self, given, "", {"device": device, "dtype": dtype})
        for name in self._fastseq_parameters(cell, True, *sizes):
            if name not in given:
                self.register_parameter(name, None)
        self._fastseq_weights = {bool(bias): tuple(given)}
        self.reset_parameters()
        self._fastseq_begin(backend=backend, init=init)

    def forward(self, input: Tensor, hx: Any = None) -> Any:
        """The state after one step, h' or a pair (h', c'), of input (B, I) and the state before it,
        (B, H) each, or all without B; zeros if ``hx`` is None."""
        return step(self, DeclaredCell.forward, input, hx)
