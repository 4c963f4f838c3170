"""fastseq's layers as instances of torch.nn's, for code that asks ``isinstance(m, nn.LSTM)``.

``fastseq.replace(model, compat=True)`` and ``fastseq.install()`` put them in place. They behave as
fastseq.RNN, LSTM, GRU and the cells in every call; parameters, pickles of a state_dict and options
are the same. What the main classes do better, and why these stand apart:

- ``torch.compile`` breaks the graph at an instance of nn.RNN, LSTM or GRU, subclasses too, unless
  ``torch._dynamo.config.allow_rnn`` is set. The main classes, and the cells here, compile whole.
- Libraries that know nn.LSTM may treat such an instance as torch's own: initialise it, count it,
  convert it. That is what these classes are for; tools that compare exact types
  (``quantize_dynamic``) take neither these nor the main classes, see :func:`fastseq.restore`.

They are cells of torch.nn's alone: ``nonlinearity="sigmoid"`` and ``reset_after=False`` are
refused, as what asks ``isinstance`` would take such a layer for torch's.

``torch.jit.script`` takes them as it takes the main classes, although a plain subclass of nn.LSTM
or nn.GRU cannot be scripted.
"""

from __future__ import annotations

from torch import nn

from . import cells, layers

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]


class RNN(layers.RNN, nn.RNN):
    """:class:`fastseq.RNN` that is an instance of torch.nn.RNN."""


class LSTM(layers.LSTM, nn.LSTM):
    """:class:`fastseq.LSTM` that is an instance of torch.nn.LSTM."""


class GRU(layers.GRU, nn.GRU):
    """:class:`fastseq.GRU` that is an instance of torch.nn.GRU."""


class RNNCell(cells.RNNCell, nn.RNNCell):
    """:class:`fastseq.RNNCell` that is an instance of torch.nn.RNNCell."""


class LSTMCell(cells.LSTMCell, nn.LSTMCell):
    """:class:`fastseq.LSTMCell` that is an instance of torch.nn.LSTMCell."""


class GRUCell(cells.GRUCell, nn.GRUCell):
    """:class:`fastseq.GRUCell` that is an instance of torch.nn.GRUCell."""


def _list_methods(ours: type[nn.Module], theirs: type[nn.Module]) -> None:
    """What torch.nn's class defines itself stands in the dictionary of ours, too: under
    ``fastseq.install()``, code that copies ``nn.LSTM.__dict__`` to a base of its own finds it."""
    for name in vars(theirs).keys() - vars(ours).keys():
        if not name.startswith("__"):
            setattr(ours, name, getattr(ours, name))


for _ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell):
    _list_methods(_ours, _ours.__bases__[1])
