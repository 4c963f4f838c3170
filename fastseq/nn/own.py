"""Your own cell: the equations of one step become a layer on every backend that takes a cell's
declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, overload

from ..cells import CELLS, register
from ..cells import Cell as Definition
from ..cells.own import own_cell
from .declared import DeclaredCell, DeclaredLayer


class OwnCell(DeclaredCell):
    """One step of a cell that :func:`cell` was given, in the manner of torch.nn.LSTMCell."""

    #: the declaration
    definition: ClassVar[Definition]


class OwnLayer(DeclaredLayer):
    """A layer of a cell that :func:`cell` was given.

    Arguments, shapes, errors and the options are :class:`fastseq.LSTM`'s; ``proj_size`` is
    keyword-only, and for cells whose h nothing but products takes.

    Parameters, for each layer k and direction: ``weight_ih_l{k}`` (G*H, I), ``weight_hh_l{k}``
    (G_hh*H, H) of the gates that have a product, ``bias_ih_l{k}`` and ``bias_hh_l{k}``, gates in
    the order of the arguments, and ``weight_{name}_l{k}`` (H,) for each unit parameter. All begin
    in U(-1/sqrt(H), 1/sqrt(H)).
    """

    #: the declaration
    definition: ClassVar[Definition]
    #: one step as a module
    Cell: ClassVar[type[OwnCell]]

    def _fastseq_check_projection(self, cell: Definition) -> None:
        if cell.unprojectable:
            raise ValueError(f"proj_size: {cell.unprojectable}")


@overload
def cell(text: Callable[..., Any], /) -> type[OwnLayer]: ...
@overload
def cell(*, source: str = "") -> Callable[[Callable[..., Any]], type[OwnLayer]]: ...
def cell(text: Callable[..., Any] | None = None, /, *, source: str = "") -> Any:
    """Make a layer class of the forward equations of one step, pointwise over hidden units.

    ::

        @fastseq.cell(source="Zhou et al. 2016")
        def MinimalGated(a_f, x_n, h_prev):
            f = sigmoid(a_f)
            n = tanh(x_n + U_n(f * h_prev))
            h = h_prev + f * (n - h_prev)
            return h

        layer = MinimalGated(64, 128, bidirectional=True)
        step = MinimalGated.Cell(64, 128)

    Args:
        text: a function whose arguments say by their names what they are. ``a_g``: the sum that
            enters gate g, of input and state. ``x_g`` and ``s_g``: its input part and its recurrent
            part, where they enter apart. ``c_prev``: state c before the step. Each other one: a
            parameter for each hidden unit. It assigns a value to each name once, and returns the
            states, h first. In it stand numbers, ``+ - * /``, sigmoid, tanh, relu, exp,
            reciprocal, maximum, logsigmoid, sqrt, and ``U_g(v)``, the recurrent product of gate g
            with v, a value of the same step, which takes the place of ``s_g``.
        source: the paper.

    Returns:
        A subclass of :class:`fastseq.nn.OwnLayer`. ``.Cell`` is a module of one step and
        ``.definition`` the declaration, with the phases, saved values and backward texts that were
        read off the equations.

    Raises:
        TypeError: ``text`` is no function.
        ValueError: the equations are no cell's: the line and the reason.
    """
    if text is None:
        return lambda text: cell(text, source=source)  # type: ignore[call-overload]
    made = own_cell(text, source)
    definition = CELLS.get(made.name) or register(made)
    common = {
        "__module__": text.__module__,
        "_fastseq_cell": definition.name,
        "definition": definition,
    }
    name, qualname = text.__name__, text.__qualname__
    step = type(
        f"{name}Cell",
        (OwnCell,),
        common | {"__qualname__": f"{qualname}.Cell", "__doc__": f"One step of :class:`{name}`."},
    )
    described = text.__doc__ or f"A layer of the cell {name}{f' ({source})' if source else ''}."
    return type(
        name,
        (OwnLayer,),
        common
        | {
            "__qualname__": qualname,
            "__doc__": f"{described}\n\n    {OwnLayer.__doc__}",
            "_fastseq_editable": not definition.other_states,
            "Cell": step,
        },
    )
