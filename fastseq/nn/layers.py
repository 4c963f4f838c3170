"""The layers that take the place of torch.nn.RNN, LSTM and GRU."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..backends.contract import Backend, Memory
from ..ops.functional import check_nonlinearity
from .options import Init
from .recurrent import Recurrent

#: What torch.nn.RNN has, and what fastseq.RNN has.
TORCHS = ("tanh", "relu")
NONLINEARITIES = (*TORCHS, "sigmoid")

RESETS_AFTER = "torch.nn's GRU has the reset gate after the product alone (reset_after=True)"


def nonlinearities(module: Any) -> tuple[str, ...]:
    """Those that an RNN or RNNCell has: an instance of torch.nn's class, as fastseq.compat's are,
    has torch.nn's, for which it is taken."""
    return TORCHS if isinstance(module, module._fastseq_torch) else NONLINEARITIES


def check_reset_after(module: Any, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"reset_after should be of type bool, got: {type(value).__name__}")
    if not value and isinstance(module, module._fastseq_torch):
        raise ValueError(
            "reset_after=False: an instance of torch.nn's GRU is taken for one with the reset gate "
            "after the product; use fastseq's own class, which is none"
        )


class RNN(Recurrent, nn.RNNBase):
    r"""Elman's recurrent network (Elman 1990) in place of torch.nn.RNN.

    .. math::
        h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    ``nonlinearity`` names :math:`\phi`: 'tanh', 'relu' or, which torch.nn lacks, 'sigmoid', as in
    Elman's paper and the language model of Mikolov et al. 2010.

    Arguments, parameters, initial values, state_dict, shapes and errors are torch.nn.RNN's.
    The options from ``backend`` on are fastseq's, see :class:`fastseq.nn.recurrent.Recurrent`; so
    are the keywords of a call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        backend: Backend = None,
        memory: Memory = "full",
        deterministic: bool = False,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        init: Init = (),
        learn_state: bool = False,
        **unknown,
    ) -> None:
        _refuse_unknown("RNN", unknown)
        check_nonlinearity(nonlinearity, nonlinearities(self))
        self.nonlinearity: str = nonlinearity
        torchs = nonlinearity in TORCHS
        nn.RNNBase.__init__(
            self,
            f"RNN_{nonlinearity.upper()}" if torchs else "RNN_TANH",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        self.mode = f"RNN_{nonlinearity.upper()}"
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

    _fastseq_torch = nn.RNN

    @property
    def _fastseq_cell(self) -> str:  # type: ignore[override]
        return self.mode.lower()

    @property
    def _fastseq_beyond(self) -> str | None:
        if self.mode != "RNN_SIGMOID":
            return None
        return "torch.nn.RNN has no nonlinearity 'sigmoid'"

    def extra_repr(self) -> str:
        more = ", nonlinearity=sigmoid" if self.mode == "RNN_SIGMOID" else ""
        return super().extra_repr() + more


class LSTM(Recurrent, nn.RNNBase):
    r"""Long short-term memory (Hochreiter and Schmidhuber 1997), in place of torch.nn.LSTM.

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    With ``proj_size`` the hidden state is :math:`W_{hr} h_t` (Sak et al. 2014). Arguments,
    parameters, initial values, state_dict, shapes and errors are torch.nn.LSTM's. The options from
    ``backend`` on are fastseq's, see :class:`fastseq.nn.recurrent.Recurrent`; so are the keywords
    of a call.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
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
        nn.RNNBase.__init__(
            self,
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
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

    _fastseq_cell = "lstm"
    _fastseq_editable = False
    _fastseq_torch = nn.LSTM

    # torch.nn's own methods of an LSTM, for a subclass with a forward of its own
    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = nn.LSTM.permute_hidden  # type: ignore[assignment]


class GRU(Recurrent, nn.RNNBase):
    r"""Gated recurrent units (Cho et al. 2014) in place of torch.nn.GRU.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    With ``reset_after=False`` the reset gate stands before the product, as in the paper; torch.nn
    lacks it, and its parameters have the same names and shapes:

    .. math::
        n_t = \tanh(W_{in} x_t + b_{in} + W_{hn} (r_t \odot h_{t-1}) + b_{hn})

    :math:`z_t` is the part of :math:`h_{t-1}` that stays, as in Cho et al. 2014 and torch.nn. Where
    a text has :math:`h_t = (1 - z_t) \odot h_{t-1} + z_t \odot n_t` instead (Chung et al. 2014,
    many courses), its :math:`z_t` is one minus ours: :math:`1 - \sigma(a) = \sigma(-a)`, so its
    weights and biases of z, negated, are ours.

    Arguments, parameters, initial values, state_dict, shapes and errors are torch.nn.GRU's.
    The options from ``reset_after`` on are fastseq's, see :class:`fastseq.nn.recurrent.Recurrent`;
    so are the keywords of a call. ``recurrent_dropout`` masks :math:`h_{t-1}` where a weight
    multiplies it alone: with ``reset_after=False`` in r and z, and not in n.
    """

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
        reset_after: bool = True,
        backend: Backend = None,
        memory: Memory = "full",
        deterministic: bool = False,
        recurrent_dropout: float = 0.0,
        input_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        zoneout: float | tuple[float, ...] = 0.0,
        init: Init = (),
        learn_state: bool = False,
        **unknown,
    ) -> None:
        _refuse_unknown("GRU", unknown)
        check_reset_after(self, reset_after)
        nn.RNNBase.__init__(
            self,
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        if not reset_after:
            self.mode = "GRU_RESET_BEFORE"
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

    _fastseq_torch = nn.GRU

    @property
    def _fastseq_cell(self) -> str:  # type: ignore[override]
        return self.mode.lower()

    @property
    def _fastseq_beyond(self) -> str | None:
        return None if self.mode == "GRU" else RESETS_AFTER

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.mode == "GRU" else ", reset_after=False")


def _refuse_unknown(name: str, unknown: dict) -> None:
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for keyword in unknown:
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument '{keyword}'")
