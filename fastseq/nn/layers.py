"""The layers that take the place of torch.nn.RNN, LSTM and GRU."""

from __future__ import annotations

from torch import nn

from ..backends.contract import Backend, Memory
from .options import Init
from .recurrent import Recurrent


class RNN(Recurrent, nn.RNNBase):
    r"""Elman's recurrent network (Elman 1990) with tanh or ReLU, in place of torch.nn.RNN.

    .. math::
        h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

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
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'."
            )
        self.nonlinearity = nonlinearity
        nn.RNNBase.__init__(
            self,
            f"RNN_{nonlinearity.upper()}",
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
    r"""Gated recurrent units (Cho et al. 2014, reset gate after the product), for torch.nn.GRU.

    .. math::
        r_t &= \sigma(W_{ir} x_t + b_{ir} + W_{hr} h_{t-1} + b_{hr}) \\
        z_t &= \sigma(W_{iz} x_t + b_{iz} + W_{hz} h_{t-1} + b_{hz}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + r_t \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1}

    Arguments, parameters, initial values, state_dict, shapes and errors are torch.nn.GRU's.
    The options from ``backend`` on are fastseq's, see :class:`fastseq.nn.recurrent.Recurrent`; so
    are the keywords of a call.
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

    _fastseq_cell = "gru"
    _fastseq_torch = nn.GRU


def _refuse_unknown(name: str, unknown: dict) -> None:
    if "proj_size" in unknown:
        raise ValueError("proj_size argument is only supported for LSTM, not RNN or GRU")
    for keyword in unknown:
        raise TypeError(f"{name}.__init__() got an unexpected keyword argument '{keyword}'")
