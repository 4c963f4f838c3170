"""torch.jit.script and torch.jit.ScriptModule compile torch.nn's layers in place of ours."""

import io
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastseq

pytestmark = pytest.mark.filterwarnings("ignore")

SIZE = 5


def flat(value):
    return [value] if isinstance(value, Tensor) else [t for v in value for t in flat(v)]


def check_same(found, expected):
    for mine, theirs in zip(flat(found), flat(expected), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def held(place):
    """Layers and cells at the places where a module may hold them."""
    return SimpleNamespace(
        layer=place.LSTM(SIZE, SIZE, 2, bidirectional=True, proj_size=2),
        cell=place.LSTMCell(SIZE, SIZE),
        listed=nn.ModuleList([place.GRU(SIZE, SIZE), place.RNN(SIZE, SIZE)]),
        named=nn.ModuleDict({"a": nn.Sequential(place.GRU(SIZE, SIZE))}),
        appended=nn.ModuleList(),
        late=place.GRUCell(SIZE, SIZE),
    )


def put_into(module, parts):
    for name, part in vars(parts).items():
        setattr(module, name, part)
    module.appended.append(parts.late)
    module.same = module.cell


class Old(torch.jit.ScriptModule):
    """The way before torch.jit.script: a module is compiled as it is made."""

    def __init__(self, place):
        super().__init__()
        put_into(self, held(place))

    @torch.jit.script_method
    def forward(self, x):
        h = torch.zeros(x.size(1), x.size(2))
        c = h
        for t in range(x.size(0)):
            h, c = self.cell(x[t], (h, c))
            h, c = self.same(x[t], (h, c))
            for cell in self.appended:
                h = cell(x[t], h)
        y = self.layer(x)[0]
        for layer in self.listed:
            x = layer(x)[0]
        for layer in self.named.values():
            x = layer(x)[0]
        return y, x, h


class New(nn.Module):
    def __init__(self, place):
        super().__init__()
        put_into(self, held(place))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = torch.zeros(x.size(1), x.size(2))
        c = h
        for t in range(x.size(0)):
            h, c = self.cell(x[t], (h, c))
            h, c = self.same(x[t], (h, c))
            for cell in self.appended:
                h = cell(x[t], h)
        y = self.layer(x)[0]
        for layer in self.listed:
            x = layer(x)[0]
        for layer in self.named.values():
            x = layer(x)[0]
        return [y, x, h]

    @torch.jit.export
    def packed(self, x: Tensor, lengths: Tensor) -> Tensor:
        rows = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.layer(rows)[0])[0]


def made(kind, place):
    torch.manual_seed(3)
    return kind(place)


def test_a_script_module_holds_layers_and_cells():
    ours, theirs = made(Old, fastseq), made(Old, nn)
    x = torch.randn(3, 2, SIZE)
    check_same(ours(x), theirs(x))
    # its parameters are those of the layer that it was given
    layer = fastseq.GRU(SIZE, SIZE)

    class One(torch.jit.ScriptModule):
        def __init__(self):
            super().__init__()
            self.layer = layer

        @torch.jit.script_method
        def forward(self, x):
            return self.layer(x)

    one = One()
    for a, b in zip(one.parameters(), layer.parameters(), strict=True):
        assert a.data_ptr() == b.data_ptr()
    assert type(layer) is fastseq.GRU
    with pytest.raises(TypeError, match=r"torch.nn has no zoneout"):
        layer.fastseq.zoneout = 0.1
        One()


def test_script_of_what_holds_layers_and_cells():
    """Methods that are exported, too; saved, frozen, traced, and loaded with other numbers."""
    ours, theirs = made(New, fastseq), made(New, nn)
    x, lengths = torch.randn(4, 3, SIZE), torch.tensor([2, 4, 1])
    expected = theirs(x)
    check_same(ours(x), expected)
    scripted, file = torch.jit.script(ours), io.BytesIO()
    check_same(scripted(x), expected)
    check_same(scripted.packed(x, lengths), theirs.packed(x, lengths))
    assert list(scripted.state_dict()) == list(theirs.state_dict())
    torch.jit.save(scripted, file)
    loaded = torch.jit.load(io.BytesIO(file.getvalue()))
    frozen = torch.jit.freeze(torch.jit.load(io.BytesIO(file.getvalue())).eval())
    traced = torch.jit.trace(nn.Sequential(scripted), (x,))
    for run in (loaded, frozen, traced):
        check_same(run(x), expected)
    other = New(fastseq)
    loaded.load_state_dict(other.state_dict())
    check_same(loaded(x), other(x))


def test_script_of_a_traced_layer():
    layer = fastseq.GRU(SIZE, SIZE)
    model = nn.Sequential(torch.jit.trace(layer, (torch.randn(3, 2, SIZE),)))
    x = torch.randn(5, 4, SIZE)
    check_same(torch.jit.script(model)(x), layer(x))


def test_other_modules_stay_what_they_are():
    layer = fastseq.GRU(SIZE, SIZE)
    assert type(nn.Sequential(layer)[0]) is fastseq.GRU
    assert nn.ModuleList([layer]).append(layer)[1] is layer
