"""Modules are built as torch.nn's: arguments, mistakes, initial values, repr."""

import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from twins import CELLS, KINDS, LAYERS, caught

import fastseq

OPTIONS = {
    "num_layers": (1, 2),
    "bias": (True, False),
    "batch_first": (False, True),
    "bidirectional": (False, True),
}
COMBINATIONS = [
    dict(zip(OPTIONS, values, strict=True)) for values in itertools.product(*OPTIONS.values())
]


@pytest.mark.parametrize("kind", KINDS)
def test_own_options_are_keyword_only_and_last(kind):
    parameters = list(inspect.signature(getattr(fastseq, kind)).parameters.values())
    plain = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    own = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    expected = ["input_size", "hidden_size"]
    if kind in LAYERS:
        expected += ["num_layers"] + ["nonlinearity"] * (kind == "RNN")
        expected += ["bias", "batch_first", "dropout", "bidirectional"]
        expected += ["proj_size"] * (kind == "LSTM")
    else:
        expected += ["bias"] + ["nonlinearity"] * (kind == "RNNCell")
    assert plain == [*expected, "device", "dtype"]
    masks = ["recurrent_dropout", "input_dropout", "weight_dropout", "zoneout"]
    assert own == ["reset_after"] * kind.startswith("GRU") + (
        ["backend", "memory", "deterministic", *masks, "init", "learn_state"]
        if kind in LAYERS
        else ["backend", "init"]
    )


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("RNN", (3, 4, 2, "relu", False, True, 0.5, True)),
        ("LSTM", (3, 4, 2, False, True, 0.5, True, 2)),
        ("GRU", (3, 4, 2, False, True, 0.5, True)),
        ("RNNCell", (3, 4, False, "relu")),
        ("LSTMCell", (3, 4, False)),
        ("GRUCell", (3, 4, False)),
    ],
)
def test_positional_order(kind, arguments):
    theirs, ours = getattr(nn, kind)(*arguments), getattr(fastseq, kind)(*arguments)
    assert repr(ours) == repr(theirs)
    for name in getattr(theirs, "__constants__", ()):
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", COMBINATIONS, ids=str)
def test_same_seed_same_layer(kind, options):
    """Names, order, shapes, dtype, and the bits of every parameter; repr; the generator after."""
    extra = (
        [{}] + [{"proj_size": 2}] * (kind == "LSTM") + [{"nonlinearity": "relu"}] * (kind == "RNN")
    )
    for more in extra:
        torch.manual_seed(7)
        theirs = getattr(nn, kind)(3, 5, **options, **more)
        after = torch.rand(1)
        torch.manual_seed(7)
        ours = getattr(fastseq, kind)(3, 5, **options, **more)
        assert torch.equal(after, torch.rand(1))
        _assert_same_parameters(ours, theirs)
        assert repr(ours) == repr(theirs)
        assert ours.all_weights[0][0] is ours.weight_ih_l0


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("bias", [True, False])
def test_same_seed_same_cell(kind, bias):
    torch.manual_seed(7)
    theirs = getattr(nn, kind)(3, 5, bias)
    torch.manual_seed(7)
    ours = getattr(fastseq, kind)(3, 5, bias)
    _assert_same_parameters(ours, theirs)
    assert repr(ours) == repr(theirs)
    assert (ours.bias_ih is None) == (theirs.bias_ih is None)


def _assert_same_parameters(ours, theirs):
    mine, yours = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert list(mine) == list(yours)
    for name, parameter in yours.items():
        assert mine[name].dtype == parameter.dtype, name
        assert torch.equal(mine[name], parameter), name
    bound = 1 / ours.hidden_size**0.5
    assert all(p.abs().max() <= bound for p in mine.values())


@pytest.mark.parametrize("kind", KINDS)
def test_reset_parameters(kind):
    theirs, ours = getattr(nn, kind)(3, 5), getattr(fastseq, kind)(3, 5)
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    _assert_same_parameters(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtype_and_device(kind, dtype):
    module = getattr(fastseq, kind)(3, 5, dtype=dtype, device="cpu")
    assert {p.dtype for p in module.parameters()} == {dtype}
    assert all(p.is_meta for p in getattr(fastseq, kind)(3, 5, device="meta").parameters())


MISTAKES = {
    "dropout below 0": {"dropout": -0.1},
    "dropout above 1": {"dropout": 1.5},
    "dropout a bool": {"dropout": True},
    "dropout a list": {"dropout": [0.5]},
    "input_size 0": {"input_size": 0},
    "input_size negative": {"input_size": -1},
    "input_size a float": {"input_size": 3.0},
    "input_size a string": {"input_size": "3"},
    "input_size of NumPy": {"input_size": np.int64(3)},
    "hidden_size 0": {"hidden_size": 0},
    "hidden_size a float": {"hidden_size": 4.0},
    "hidden_size of NumPy": {"hidden_size": np.int64(4)},
    "num_layers 0": {"num_layers": 0},
    "bias an int": {"bias": 1},
    "bias a string": {"bias": "True"},
    "batch_first an int": {"batch_first": 0},
    "unknown keyword": {"hidden": 4},
    "no sizes": None,
}
#: Of these torch 2.10 makes a layer.
LATER = (
    "input_size 0",
    "input_size of NumPy",
    "bias an int",
    "bias a string",
    "batch_first an int",
)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_construction(kind, mistake):
    if mistake in LATER and torch.__version__.startswith("2.10."):
        pytest.skip("torch 2.10 makes such a layer")
    given = MISTAKES[mistake]
    arguments = {} if given is None else {"input_size": 3, "hidden_size": 4, **given}
    _assert_same_error(
        lambda: getattr(fastseq, kind)(**arguments),
        lambda: getattr(nn, kind)(**arguments),
        words=mistake not in ("unknown keyword", "no sizes"),
    )


@pytest.mark.parametrize("value", [-1, 4, 5])
def test_mistakes_in_proj_size(value):
    _assert_same_error(
        lambda: fastseq.LSTM(3, 4, proj_size=value), lambda: nn.LSTM(3, 4, proj_size=value)
    )


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
@pytest.mark.parametrize("value", [0, 2])
def test_proj_size_is_for_the_lstm_alone(kind, value):
    _assert_same_error(
        lambda: getattr(fastseq, kind)(3, 4, proj_size=value),
        lambda: getattr(nn, kind)(3, 4, proj_size=value),
    )


def test_unknown_nonlinearity():
    mine = caught(lambda: fastseq.RNN(3, 4, nonlinearity="gelu"))
    yours = caught(lambda: nn.RNN(3, 4, nonlinearity="gelu"))
    assert type(mine) is type(yours)
    assert str(mine) == str(yours).replace("'tanh' or 'relu'", "'tanh', 'relu' or 'sigmoid'")
    x = torch.randn(2, 3)
    _assert_same_error(
        lambda: fastseq.RNNCell(3, 4, nonlinearity="gelu")(x),
        lambda: nn.RNNCell(3, 4, nonlinearity="gelu")(x),
    )


def test_unknown_memory():
    with pytest.raises(ValueError, match="memory: expected 'full' or 'lean', got 'half'"):
        fastseq.GRU(3, 4, memory="half")


def _assert_same_error(ours, theirs, words=True):
    mine, yours = caught(ours), caught(theirs)
    assert yours is not None
    assert type(mine) is type(yours), mine
    if words:
        assert str(mine) == str(yours)


@pytest.mark.parametrize("kind", LAYERS)
def test_warning_for_dropout_with_one_layer(kind):
    with pytest.warns(UserWarning, match="dropout option adds dropout") as ours:
        getattr(fastseq, kind)(3, 4, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout") as theirs:
        getattr(nn, kind)(3, 4, dropout=0.5)
    assert [str(w.message) for w in ours] == [str(w.message) for w in theirs]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        getattr(fastseq, kind)(3, 4, 2, dropout=0.5)


@pytest.mark.parametrize("kind", LAYERS)
def test_repr_names_own_options_when_they_are_set(kind):
    module = getattr(fastseq, kind)(3, 4, backend="eager", memory="lean")
    assert repr(module) == f"{kind}(3, 4, backend='eager', memory='lean')"
    assert repr(getattr(fastseq, kind)(3, 4)) == f"{kind}(3, 4)"


@pytest.mark.parametrize("kind", CELLS)
def test_repr_of_a_cell(kind):
    assert repr(getattr(fastseq, kind)(3, 4, backend="eager")) == f"{kind}(3, 4, backend='eager')"


@pytest.mark.parametrize("kind", KINDS)
def test_skip_init(kind):
    """Broken in torch.nn's layers, whose constructors hide their ``device`` argument."""
    state = torch.get_rng_state()
    module = nn.utils.skip_init(getattr(fastseq, kind), 3, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.device.type == "cpu" for p in module.parameters())
    module.reset_parameters()
    x = torch.randn(2, 3)
    module(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_kind_of_class(kind):
    """A subclass of nn.RNNBase, and not of nn.LSTM, which breaks a compiled graph."""
    assert issubclass(getattr(fastseq, kind), nn.RNNBase)
    assert not issubclass(getattr(fastseq, kind), getattr(nn, kind))
