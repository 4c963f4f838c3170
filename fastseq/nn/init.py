"""Initial values of recurrent layers and cells, in the manner of torch.nn.init.

Each function changes the parameters of one layer or cell in place, without a gradient, in all its
layers and directions, and returns the module. What is a gate's it reads off the cell's declaration,
so torch.nn's layers and cells are taken as well as fastseq's. ``init=`` of a layer or cell takes
these functions, and any other of the module, and runs them at the end of ``reset_parameters``.

A parametrized weight is set through its parametrization (``right_inverse``). On the meta device
nothing is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import reference
from ..cells import CELLS, Cell, arguments, bind

_OF_TORCH = {nn.LSTMCell: "lstm", nn.GRUCell: "gru"}


@torch.no_grad()
def gate_bias_(module: Any, gate: str, value: float = 0.0) -> Any:
    """Set the bias of one gate: that of the input to ``value``, and that of the state to zero.

    Args:
        module: a layer or cell with biases.
        gate: a letter of the equations, as 'z' of the GRU.
        value: the sum of both biases.

    Raises:
        ValueError: the cell has no such gate, or the module no biases.
        TypeError: the module is no recurrent one.
    """
    cell = _cell_of(module)
    if gate not in cell.gates:
        raise ValueError(f"{cell.called} has no gate {gate}; its gates are {', '.join(cell.gates)}")
    for names in _ways(module):
        _set_bias(module, cell, names, gate, value)
    return module


@torch.no_grad()
def forget_gate_bias_(module: Any, value: float = 1.0) -> Any:
    """Begin with a forget gate that is open, so that the state is kept at first.

    The bias of gate f becomes ``value``, that of the input; that of the state becomes zero.

    Args:
        module: a layer or cell with biases whose cell has a gate f.
        value: the sum of both biases.

    Raises:
        ValueError: the cell has no gate f, or one that drops the state where it is 1; the module
            has no biases.
        TypeError: the module is no recurrent one.

    Source: Jozefowicz et al. 2015, An Empirical Exploration of Recurrent Network Architectures;
        Gers et al. 2000, Learning to Forget.
    """
    cell = _cell_of(module)
    kept = keeping_gates(cell)
    remedy = "".join(
        f"; what keeps the state is gate_bias_(module, {gate!r}, {sign * value})"
        for gate, sign in kept.items()
    )
    if "f" not in cell.gates:
        raise ValueError(
            f"{cell.called} has no forget gate f; its gates are {', '.join(cell.gates)}{remedy}"
        )
    if kept.get("f") == -1:
        raise ValueError(f"{cell.called} drops the state where its gate f is 1{remedy}")
    return gate_bias_(module, "f", value)


@torch.no_grad()
def chrono_(module: Any, max_steps: float, generator: torch.Generator | None = None) -> Any:
    """Spread over the units how long they remember, up to ``max_steps`` steps.

    Of the gate that keeps the state (f of an LSTM, z of a GRU) the bias becomes log(u), with u
    drawn from U(1, max_steps - 1) for each unit, and that of an input gate i becomes -log(u). A
    gate that drops the state where it is 1 has -log(u).

    Args:
        module: a layer or cell with biases.
        max_steps: the longest dependency that is expected, 2 or more.
        generator: draws u; torch's default one if None.

    Raises:
        ValueError: no gate of the cell keeps its state; the module has no biases; max_steps < 2.
        TypeError: the module is no recurrent one.

    Source: Tallec and Ollivier 2018, Can recurrent neural networks warp time?
    """
    if max_steps < 2:
        raise ValueError(f"max_steps: expected 2 or more, got {max_steps}")
    cell = _cell_of(module)
    kept = keeping_gates(cell)
    if not kept:
        raise ValueError(f"{cell.called} has no gate that keeps its state")
    for names in _ways(module):
        for gate, sign in kept.items():
            weight = getattr(module, names["weight_ih"])
            size = len(weight) // cell.G
            u = torch.empty(size, dtype=_wide(weight), device=weight.device)
            remembered = u.uniform_(1, max_steps - 1, generator=generator).log_()
            _set_bias(module, cell, names, gate, sign * remembered)
            if "i" in cell.gates:
                _set_bias(module, cell, names, "i", -remembered)
    return module


@torch.no_grad()
def orthogonal_(module: Any, gain: float = 1.0, generator: torch.Generator | None = None) -> Any:
    """Make the recurrent weights of each gate an orthogonal matrix, by torch.nn.init.orthogonal_.

    With ``proj_size`` a gate's weights are (hidden_size, proj_size), and their columns become
    orthonormal. 16-bit weights are computed in float32.

    Args:
        module: a layer or cell whose recurrent weights are matrices.
        gain: factor on the matrices.
        generator: draws them; torch's default one if None.

    Raises:
        ValueError: the recurrent weights are no matrices.
        TypeError: the module is no recurrent one.

    Source: Saxe et al. 2014, Exact solutions to the nonlinear dynamics of learning in deep linear
        neural networks.
    """

    def change(block: Tensor) -> None:
        wide = torch.empty_like(block, dtype=_wide(block))
        block.copy_(nn.init.orthogonal_(wide, gain, generator))

    _set_recurrent(module, "orthogonal", change)
    return module


@torch.no_grad()
def identity_(module: Any, scale: float = 1.0) -> Any:
    """Make the recurrent weights of each gate ``scale`` times the identity, and all biases zero.

    An RNN with ReLU that begins so is the IRNN. With ``proj_size`` a gate's weights are
    (hidden_size, proj_size), and as torch.nn.init.eye_ makes them: ``scale`` on the diagonal.

    Args:
        module: a layer or cell whose recurrent weights are matrices.
        scale: what stands on the diagonal.

    Raises:
        ValueError: the recurrent weights are no matrices.
        TypeError: the module is no recurrent one.

    Source: Le et al. 2015, A Simple Way to Initialize Recurrent Networks of Rectified Linear Units.
    """
    _set_recurrent(module, "the identity", lambda block: nn.init.eye_(block).mul_(scale))
    for names in _ways(module):
        for kind in ("bias_ih", "bias_hh"):
            if kind in names:
                _write(module, names[kind], Tensor.zero_)
    return module


@lru_cache(maxsize=256)
def keeping_gates(cell: Cell) -> dict[str, int]:
    """The gates that say how much of a state is kept: 1 for one that keeps it all where it is 1 and
    nothing where it is 0, and -1 the other way round; read off the cell's equations."""
    found = {}
    for gate in cell.gates:
        kept = np.stack([_kept(cell, gate, a) for a in (-40.0, 40.0)], 1)  # (states, closed/open)
        for sign, wanted in ((1, (0, 1)), (-1, (1, 0))):
            if np.isclose(kept, wanted).all(1).any():
                found[gate] = sign
    return found


def _kept(cell: Cell, gate: str, pre_activation: float) -> np.ndarray:
    """The part of each state that a step keeps, with one gate held open or closed, and all that
    enters the others held at zero."""

    def step(k: int, before: float) -> float:
        """State k after the step."""
        known = {f"{cell.states[k]}_prev": before, f"a_{gate}": pre_activation}
        known[f"x_{gate}"] = pre_activation
        for phase in cell.phases:
            text = bind(phase.forward, "init", **reference.VOCABULARY)
            given = [np.float64(known.get(name, 0.0)) for name in arguments(phase.forward)]
            known |= dict(zip(phase.returns, text(*given), strict=True))
        return known[cell.states[k]]

    return np.array([step(k, 1.0) - step(k, 0.0) for k in range(len(cell.states))])


def _cell_of(module: Any) -> Cell:
    """The declaration of what a module computes."""
    name = getattr(module, "_fastseq_hidden", None) or getattr(module, "_fastseq_cell", None)
    if name is None and isinstance(module, nn.RNNBase):
        name = module.mode.lower()
    elif name is None and isinstance(module, nn.RNNCell):
        name = f"rnn_{module.nonlinearity}"
    elif name is None:
        name = next((n for kind, n in _OF_TORCH.items() if isinstance(module, kind)), None)
    if name not in CELLS:
        raise TypeError(
            "module: expected a recurrent layer or cell of fastseq or torch.nn, got "
            f"{type(module).__name__}; a model's are among its modules()"
        )
    return CELLS[name]


def _ways(module: Any) -> Iterator[dict[str, str]]:
    """Of each layer and direction the attributes that hold its weights and biases, by kind."""
    if isinstance(module, nn.RNNCellBase) or not hasattr(module, "_all_weights"):
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        yield {kind: kind for kind in kinds if getattr(module, kind, None) is not None}
    else:
        for names in module._all_weights:
            yield {name.rpartition("_l")[0]: name for name in names}


def _set_bias(
    module: Any, cell: Cell, names: dict[str, str], gate: str, value: Tensor | float
) -> None:
    """A gate's bias of the input in one layer and direction; that of the state becomes zero."""
    if "bias_ih" not in names:
        raise ValueError(
            f"module: expected one with biases, got {type(module).__name__} with bias=False"
        )

    def change(block: Tensor) -> None:
        block[:] = value

    places = {"bias_ih": (cell.gates, change), "bias_hh": (cell.recurrent_gates, Tensor.zero_)}
    for kind, (gates, function) in places.items():
        if kind in names and gate in gates:
            _write(module, names[kind], function, len(gates), gates.index(gate))


def _set_recurrent(module: Any, what: str, change: Callable[[Tensor], Any]) -> None:
    """Change the recurrent matrix of each gate."""
    cell = _cell_of(module)
    if not cell.recurrent_gates:
        raise ValueError(
            f"{cell.called} has no recurrent matrix that could be {what}: its recurrent weights "
            "are one number a unit; set these with torch.nn.init"
        )
    for names in _ways(module):
        _write(module, names["weight_hh"], change, len(cell.recurrent_gates))


def _write(
    module: Any,
    name: str,
    change: Callable[[Tensor], Any],
    gates: int = 1,
    place: int | None = None,
) -> None:
    """Change a parameter gate by gate, or the block of the gate in one ``place``."""
    own = module._parameters.get(name)
    parametrized = parametrize.is_parametrized(module, name)
    if own is None and not parametrized:
        raise ValueError(
            f"{name}: expected a parameter, got a tensor that is put there anew before each call; "
            "set initial values before that"
        )
    value = getattr(module, name).detach().clone() if parametrized else own
    blocks = value.chunk(gates)
    for block in blocks if place is None else blocks[place : place + 1]:
        change(block)
    if parametrized:
        setattr(module, name, value)


def _wide(tensor: Tensor) -> torch.dtype:
    """The type that the values of a tensor are computed in."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype
