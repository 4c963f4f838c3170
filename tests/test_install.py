"""fastseq.install: torch.nn's names hold fastseq's classes, for clients that are imported later."""

import copy
import pickle
import subprocess
import sys
from abc import ABC, abstractmethod
from textwrap import dedent

import pytest
import torch
from torch import _VF, nn
from twins import KINDS, LAYERS, assert_same, tensors

import fastseq

THEIRS = {kind: getattr(nn, kind) for kind in KINDS}
PLACES = (nn, nn.modules, nn.modules.rnn)


@pytest.fixture
def installed():
    fastseq.install()
    yield
    fastseq.uninstall()


def twin(module):
    """torch's own module with the same parameters."""
    theirs = THEIRS[type(module).__name__](4, 6)
    theirs.load_state_dict(module.state_dict())
    return theirs


def sample(kind):
    return torch.randn(5, 3, 4) if kind in LAYERS else torch.randn(3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_names(kind):
    """In each place, once and for all calls, and back."""
    fastseq.install()
    try:
        fastseq.install()
        assert all(getattr(place, kind) is getattr(fastseq.compat, kind) for place in PLACES)
        module, x = getattr(nn, kind)(4, 6), sample(kind)
        assert isinstance(module, getattr(nn, kind)) and isinstance(module, THEIRS[kind])
        assert_same(module(x), twin(module)(x))
    finally:
        fastseq.uninstall()
    assert all(getattr(place, kind) is THEIRS[kind] for place in PLACES)
    fastseq.uninstall()
    assert getattr(nn, kind) is THEIRS[kind] and isinstance(module, getattr(nn, kind))
    fastseq.restore(module)
    assert type(module) is THEIRS[kind]


def test_classes_that_others_put_there():
    """What stood there before comes back; what another put there since stays."""

    class Theirs(nn.LSTM):
        pass

    class Later(nn.GRU):
        pass

    gru, lstm = nn.GRU, nn.LSTM
    nn.LSTM = Theirs
    try:
        fastseq.install()
        assert nn.LSTM is fastseq.compat.LSTM
        nn.GRU = Later
        fastseq.uninstall()
        assert nn.LSTM is Theirs and nn.GRU is Later
        assert nn.modules.rnn.LSTM is lstm and nn.modules.rnn.GRU is gru
    finally:
        nn.LSTM, nn.GRU = lstm, gru


# -- what clients do


def test_a_subclass_derives_from_fastseqs(installed):
    class Doubled(nn.LSTM):
        def __init__(self, *args, scale=2.0, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = scale

        def forward(self, input, hx=None, **options):
            return super().forward(input * self.scale, hx, **options)

    module, x = Doubled(4, 6), sample("LSTM")
    theirs = THEIRS["LSTM"](4, 6)
    theirs.load_state_dict(module.state_dict())
    assert isinstance(module, fastseq.LSTM)
    assert_same(module(x), theirs(2 * x))
    assert not module(x, lengths=[5, 3, 0])[0][3:, 1:].any()


def test_a_subclass_with_a_forward_around_torchs_function(installed):
    class Masked(nn.LSTM):
        def forward(self, x, hx=None):
            if hx is None:
                zeros = x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)
                hx = (zeros, zeros)
            self.check_forward_args(x, hx, None)
            options = (self.bias, self.num_layers, self.dropout, self.training)
            flags = (*options, self.bidirectional, self.batch_first)
            y, h, c = _VF.lstm(x, hx, [w * 0.5 for w in self._flat_weights], *flags)
            return y, self.permute_hidden((h, c), torch.tensor([2, 1, 0]))

    module, x = Masked(4, 6), sample("LSTM")
    theirs = THEIRS["LSTM"](4, 6)
    theirs.load_state_dict({name: w * 0.5 for name, w in module.state_dict().items()})
    (y, (h, c)), (y_, (h_, c_)) = module(x), theirs(x)
    assert_same((y, h, c), (y_, h_.flip(1), c_.flip(1)))


def test_an_abstract_base_between(installed):
    """As pytorch-forecasting's wrappers: (ABC, nn.RNNBase), then (that, nn.GRU)."""

    class Flexible(ABC, nn.RNNBase):
        @abstractmethod
        def fill(self): ...

        def forward(self, x, hx=None, lengths=None):
            output, state = super().forward(x, hx)
            return output, state + self.fill()

    class Filled(Flexible, nn.GRU):
        def fill(self):
            return 1

    module, x = Filled(4, 6), sample("GRU")
    theirs = THEIRS["GRU"](4, 6)
    theirs.load_state_dict(module.state_dict())
    (output, state), (output_, state_) = module(x), theirs(x)
    assert_same((output, state), (output_, state_ + 1))


def test_attributes_that_are_copied_to_a_base(installed):
    """As torchrl makes the base of its own LSTM."""

    class Base(nn.RNNBase):
        def __init__(self, *args, **kwargs):
            super().__init__("LSTM", *args, **kwargs)

    for name in nn.LSTM.__dict__:
        if name != "__init__":
            setattr(Base, name, getattr(nn.LSTM, name))

    class Own(Base):
        def forward(self, input, hx):
            self.check_forward_args(input, hx, None)
            return input, self.permute_hidden(hx, None)

    x, state = sample("LSTM"), (torch.zeros(1, 3, 6), torch.ones(1, 3, 6))
    assert_same(Own(4, 6)(x, state), (x, state))
    assert Own(4, 6).get_expected_cell_size(x, None) == (1, 3, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_pickles_and_copies(kind):
    """A pickle of before loads with the class that its name leads to; one of since names
    fastseq's. A layer that is torch.nn's still stays so."""
    x, theirs = sample(kind), THEIRS[kind](4, 6)
    before = pickle.dumps(theirs)
    fastseq.install()
    try:
        loaded = pickle.loads(before)
        assert type(loaded) is getattr(fastseq.compat, kind)
        made = getattr(nn, kind)(4, 6)
        assert type(copy.deepcopy(made)) is type(made)
        assert type(copy.deepcopy(theirs)) is THEIRS[kind]
        since, kept = pickle.dumps(made), pickle.dumps(theirs)
    finally:
        fastseq.uninstall()
    assert pickle.dumps(theirs) == before
    assert_same(loaded(x), theirs(x))
    assert type(pickle.loads(kept)) is THEIRS[kind]
    assert_same(pickle.loads(kept)(x), theirs(x))
    again = pickle.loads(since)
    assert type(again) is getattr(fastseq.compat, kind)
    assert_same(again(x), made(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.cell = nn.LSTM(4, 6), nn.GRUCell(6, 6)

    def forward(self, x):
        return self.cell(self.layer(x)[0][-1])


def test_torchscript(installed):
    model, x = Net(), sample("LSTM")
    expected = model(x)
    assert type(model.layer) is fastseq.compat.LSTM
    assert_same(torch.jit.script(copy.deepcopy(model))(x), expected)
    assert_same(torch.jit.trace(model, x)(x), expected)


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = THEIRS["LSTM"](4, 6)

    def forward(self, x):
        return isinstance(self.layer, nn.LSTM)


def test_replace_and_restore(installed):
    """What was made before is torch's, and replace turns it."""
    old = THEIRS["GRU"](4, 6)
    (note,) = fastseq.replace(Asking()).notes
    assert note.startswith("isinstance(..., nn.LSTM) stands in Asking.forward")
    model = nn.Sequential(nn.LSTM(4, 4), old)
    report = fastseq.replace(model, compat=True)
    assert list(report.swapped) == ["1"] and "already" in report.left["0"]
    assert isinstance(old, nn.GRU)
    fastseq.restore(model)
    assert [type(layer) for layer in model] == [THEIRS["LSTM"], THEIRS["GRU"]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:must run observer before calling calculate_qparams")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.skipif(not torch.backends.quantized.supported_engines, reason="no engine")
def test_quantize_dynamic():
    """Its tables hold torch's classes, which the names do not: uninstall, restore, quantize."""
    quantization = torch.ao.quantization
    fastseq.install()
    try:
        model, x = Net(), sample("LSTM")
        expected = model(x)
        assert type(quantization.quantize_dynamic(model).layer) is fastseq.compat.LSTM
    finally:
        fastseq.uninstall()
    fastseq.restore(model)
    quantized = quantization.quantize_dynamic(model)
    assert type(quantized.layer) is torch.ao.nn.quantized.dynamic.LSTM
    assert type(quantized.cell) is torch.ao.nn.quantized.dynamic.GRUCell
    assert (quantized(x) - expected).abs().max() < 0.1


# -- torch.compile breaks its graph at what torch.nn.LSTM names, unless a flag is set


def run(code):
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_dynamos_flag_is_set_when_dynamo_is_loaded():
    """Loading it takes a second or more, so install() waits until someone else does."""
    run(
        """
        import sys
        import torch, fastseq
        finders = list(sys.meta_path)
        fastseq.install()
        fastseq.install()
        assert "torch._dynamo" not in sys.modules and len(sys.meta_path) == len(finders) + 1
        import torch._dynamo
        assert torch._dynamo.config.allow_rnn and sys.meta_path == finders
        fastseq.uninstall()
        assert not torch._dynamo.config.allow_rnn
        fastseq.install()  # loaded already
        assert torch._dynamo.config.allow_rnn and sys.meta_path == finders
        fastseq.uninstall()
        assert not torch._dynamo.config.allow_rnn
        torch._dynamo.config.allow_rnn = True  # the user's own choice stays
        fastseq.install()
        fastseq.uninstall()
        assert torch._dynamo.config.allow_rnn
        """
    )


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "LSTM" else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS],
)
def test_compiles_whole(installed, kind):
    torch._dynamo.reset()
    module, x = getattr(nn, kind)(4, 6), sample(kind)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert_same(compiled(x), module(x))
    tensors(compiled(x))[0].sum().backward()
    assert next(module.parameters()).grad.any()
