"""The cells of courses and papers that torch.nn lacks, as layers and as single steps."""

from __future__ import annotations

from typing import Any

from ..backends.contract import Backend
from ..ops.functional import check_nonlinearity
from .declared import DeclaredCell, DeclaredLayer
from .options import Init


class _Projected(DeclaredLayer):
    """A layer whose hidden state may be projected, with torch.nn.LSTM's arguments."""

    _fastseq_editable = False

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
        **options: Any,
    ) -> None:
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*arguments, device, dtype, proj_size=proj_size, **options)


class PeepholeLSTM(_Projected):
    r"""Long short-term memory whose gates see the cell (Gers and Schmidhuber 2000).

    .. math::
        i_t &= \sigma(W_{ii} x_t + b_{ii} + W_{hi} h_{t-1} + b_{hi} + w_{ci} \odot c_{t-1}) \\
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf} + w_{cf} \odot c_{t-1}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        c_t &= f_t \odot c_{t-1} + i_t \odot g_t \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho} + w_{co} \odot c_t) \\
        h_t &= o_t \odot \tanh(c_t)

    Arguments, shapes, errors, ``proj_size`` and the options are :class:`fastseq.LSTM`'s.

    Parameters, for each layer k and direction: those of torch.nn.LSTM, gates in the order i, f, g,
    o, and ``weight_ci_l{k}``, ``weight_cf_l{k}`` and ``weight_co_l{k}``, (H,) each. All begin in
    U(-1/sqrt(H), 1/sqrt(H)).

    Source: Gers and Schmidhuber 2000, Recurrent Nets that Time and Count.
    """

    _fastseq_cell = "peephole_lstm"


class CoupledLSTM(_Projected):
    r"""Long short-term memory that admits as much as it forgets (Greff et al. 2017, CIFG).

    .. math::
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        g_t &= \tanh(W_{ig} x_t + b_{ig} + W_{hg} h_{t-1} + b_{hg}) \\
        o_t &= \sigma(W_{io} x_t + b_{io} + W_{ho} h_{t-1} + b_{ho}) \\
        c_t &= f_t \odot c_{t-1} + (1 - f_t) \odot g_t \\
        h_t &= o_t \odot \tanh(c_t)

    Arguments, shapes, errors, ``proj_size`` and the options are :class:`fastseq.LSTM`'s.

    Parameters: torch.nn.LSTM's, with three gates in the order f, g, o: ``weight_ih_l{k}`` is
    (3*H, I). All begin in U(-1/sqrt(H), 1/sqrt(H)).

    Source: Greff et al. 2017, LSTM: A Search Space Odyssey.
    """

    _fastseq_cell = "coupled_lstm"


class MGU(DeclaredLayer):
    r"""The minimal gated unit (Zhou et al. 2016): a GRU whose one gate resets and updates.

    .. math::
        f_t &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        n_t &= \tanh(W_{in} x_t + b_{in} + W_{hn} (f_t \odot h_{t-1}) + b_{hn}) \\
        h_t &= (1 - f_t) \odot h_{t-1} + f_t \odot n_t

    Arguments, shapes, errors and the options are :class:`fastseq.GRU`'s.

    Parameters: torch.nn.GRU's, with two gates in the order f, n: ``weight_ih_l{k}`` is (2*H, I).
    All begin in U(-1/sqrt(H), 1/sqrt(H)). ``recurrent_dropout`` masks :math:`h_{t-1}` in f alone.

    Source: Zhou et al. 2016, Minimal Gated Unit for Recurrent Neural Networks.
    """

    _fastseq_cell = "mgu"


class _Diagonal:
    """What IndRNN and IndRNNCell share."""

    _fastseq_units = {"w_u": "weight_hh"}  # noqa: RUF012

    nonlinearity: str

    @property
    def _fastseq_cell(self) -> str:
        if self.nonlinearity not in ("relu", "tanh"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return "indrnn" if self.nonlinearity == "relu" else "indrnn_tanh"

    def _fastseq_range(self, name: str, bound: float) -> tuple[float, float]:
        return (0.0, 1.0) if name.startswith("weight_hh") else (-bound, bound)


class IndRNN(_Diagonal, DeclaredLayer):  # type: ignore[override]
    r"""The independently recurrent network (Li et al. 2018): each unit sees its own past alone.

    .. math::
        h_t = \phi(W_{ih} x_t + b_{ih} + w_{hh} \odot h_{t-1})

    ``nonlinearity`` names :math:`\phi`, 'relu' or 'tanh'. A step has no product, and costs what its
    bytes cost.

    Arguments, shapes, errors and the options are :class:`fastseq.RNN`'s, but for
    ``recurrent_dropout`` and ``weight_dropout``, which mask a product.

    Parameters, for each layer k and direction: ``weight_ih_l{k}`` (H, I), ``bias_ih_l{k}`` (H,) and
    ``weight_hh_l{k}`` (H,); no ``bias_hh``. ``weight_hh`` begins in U(0, 1), as in the paper's
    code, so that a unit remembers for anything between one step and many; the others in
    U(-1/sqrt(H), 1/sqrt(H)). Over T steps a unit of ReLU grows by :math:`w_{hh}^T`: the paper keeps
    :math:`|w_{hh}| \le 2^{1/T}`, by clipping after each update.

    Source: Li et al. 2018, Independently Recurrent Neural Network (IndRNN): Building A Longer and
    Deeper RNN.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "relu",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        **options: Any,
    ) -> None:
        check_nonlinearity(nonlinearity, ("relu", "tanh"))
        self.nonlinearity = nonlinearity
        arguments = (input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional)
        super().__init__(*arguments, device, dtype, **options)

    def extra_repr(self) -> str:
        more = "" if self.nonlinearity == "relu" else f", nonlinearity={self.nonlinearity}"
        return super().extra_repr() + more


class PeepholeLSTMCell(DeclaredCell):
    """One step of :class:`fastseq.PeepholeLSTM`.

    Arguments, shapes and errors are :class:`fastseq.LSTMCell`'s. Parameters: ``weight_ih`` (4*H,
    I), ``weight_hh`` (4*H, H), ``bias_ih`` and ``bias_hh`` (4*H,), ``weight_ci``, ``weight_cf`` and
    ``weight_co`` (H,).
    """

    _fastseq_cell = "peephole_lstm"


class CoupledLSTMCell(DeclaredCell):
    """One step of :class:`fastseq.CoupledLSTM`.

    Arguments, shapes and errors are :class:`fastseq.LSTMCell`'s. Parameters: those of torch.nn's,
    with 3*H rows.
    """

    _fastseq_cell = "coupled_lstm"


class MGUCell(DeclaredCell):
    """One step of :class:`fastseq.MGU`.

    Arguments, shapes and errors are :class:`fastseq.GRUCell`'s. Parameters: those of torch.nn's,
    with 2*H rows.
    """

    _fastseq_cell = "mgu"


class IndRNNCell(_Diagonal, DeclaredCell):  # type: ignore[override]
    """One step of :class:`fastseq.IndRNN`.

    Arguments, shapes and errors are :class:`fastseq.RNNCell`'s; ``nonlinearity`` is 'relu' or
    'tanh'. Parameters: ``weight_ih`` (H, I), ``bias_ih`` (H,) and ``weight_hh`` (H,).
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "relu",
        device=None,
        dtype=None,
        *,
        backend: Backend = None,
        init: Init = (),
    ) -> None:
        check_nonlinearity(nonlinearity, ("relu", "tanh"))
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, bias, device, dtype, backend=backend, init=init)

    def extra_repr(self) -> str:  # torch.nn's leaves out 'tanh', its default
        shown = super().extra_repr()
        return (
            shown.replace(", nonlinearity=relu", "")
            if self.nonlinearity == "relu"
            else (f"{shown}, nonlinearity={self.nonlinearity}")
        )
