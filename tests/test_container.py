"""fastseq.Stacked: layers of different kinds and widths, one on another, against the same composed
of torch.nn's layers by hand, sequence by sequence."""

import copy
import io
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from problems import full
from rules import check_alike, check_all
from spies import counted
from stacks import is_whole
from torch import nn
from torch.export import Dim
from torch.func import functional_call, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastseq

CONNECTIONS = ("plain", "residual", "highway")
DIRECTIONS = {"one way": False, "both at each layer": True, "joined at the end": "stacks"}
#: Neighbours of one kind and width, of another width, of another kind.
WIDTHS = (7, 7, 6, 5)
LENGTHS = (6, 2, 4, 0)
T, B, I = 6, 4, 7  # noqa: E741  (the field's letter)
TOL = {"rtol": 1e-4, "atol": 1e-6}


def made(connections="plain", bidirectional=False, dtype=torch.float32, **options):
    """Of torch.nn's kinds: LSTM, LSTM, GRU, RNN."""
    torch.manual_seed(3)
    kinds = (fastseq.LSTM, fastseq.LSTM, fastseq.GRU, fastseq.RNN)
    dropout = options.pop("dropout", 0.0)

    def layers():
        width, both = I, bidirectional is True
        for kind, H in zip(kinds, WIDTHS, strict=True):
            yield kind(width, H, bidirectional=both, dtype=dtype, **options)
            width = H * (1 + both)

    reverse = layers() if bidirectional == "stacks" else None
    return fastseq.Stacked(layers(), reverse=reverse, connections=connections, dropout=dropout)


def equal_layers(count=3, kind=fastseq.LSTM, **options):
    torch.manual_seed(3)
    stack = {k: options.pop(k) for k in ("dropout", "bidirectional") if k in options}
    return fastseq.Stacked.of(kind, I, [7] * count, **stack, **options)


def of_torch(stack):
    twin = copy.deepcopy(stack)
    fastseq.restore(twin)
    return twin


def by_hand(layers, connections, word, x):
    """One sequence (t, I), or (T, B, I), through torch.nn's layers; y and the final states."""
    states = []
    for k, layer in enumerate(layers):
        y, state = layer(x)
        states.append(state)
        own = {name: p for name, p in connections.named_parameters() if name[0] == str(k)}
        carried = x @ own[f"{k}.carry.weight"].t() if f"{k}.carry.weight" in own else x
        if word == "residual":
            y = y + carried
        elif word == "highway":
            gate = torch.sigmoid(x @ own[f"{k}.transform.weight"].t() + own[f"{k}.transform.bias"])
            y = gate * y + (1 - gate) * carried
        x = y
    return x, states


def truth(stack, word, x, lengths):
    """Outputs (T, B, W) with zeros behind the ends, by torch.nn's layers."""
    outputs = []
    for b, end in enumerate(lengths):
        y = x.new_zeros(0, stack.output_size)
        if end:
            y = of_equal_lengths(stack, word, x[:end, b])
        outputs.append(torch.cat([y, y.new_zeros(x.shape[0] - end, y.shape[1])]))
    return torch.stack(outputs, 1)


def of_equal_lengths(stack, word, x):
    y, _ = by_hand(stack.layers, stack.connections, word, x)
    if stack.reverse_layers is None:
        return y
    z, _ = by_hand(stack.reverse_layers, stack.reverse_connections, word, x.flip(0))
    return torch.cat([y, z.flip(0)], -1)


def called(stack, way, x):
    """y (T, B, W) of the stack, given x (T, B, I) in one of its ways."""
    if way == "dense":
        return stack(x)[0]
    if way == "lengths":
        return stack(x, lengths=LENGTHS)[0]
    if way == "unbatched":
        return torch.stack([stack(x[:, b])[0] for b in range(x.shape[1])], 1)
    ends = [max(end, 1) for end in LENGTHS]
    if way == "packed":
        packed = pack_padded_sequence(x, ends, enforce_sorted=False)
        return pad_packed_sequence(stack(packed)[0], total_length=T)[0]
    jagged = [x[:end, b] for b, end in enumerate(LENGTHS)]
    y, _ = stack(torch.nested.as_nested_tensor(jagged, layout=torch.jagged))
    return torch.nested.to_padded_tensor(y, 0.0, (B, T, y.shape[2])).transpose(0, 1)


WAYS = {
    "dense": [T] * B,
    "unbatched": [T] * B,
    "lengths": LENGTHS,
    "packed": [max(end, 1) for end in LENGTHS],
    "jagged": LENGTHS,
}


def values(y, x, stack, weight):
    leaves = {"x": x, **dict(stack.named_parameters())}
    found = torch.autograd.grad((y * weight).sum(), list(leaves.values()), allow_unused=True)
    named = dict(zip(leaves, found, strict=True))
    named = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in named.items()}
    return {"y": y, **{f"d{name}": g for name, g in named.items()}}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("word", CONNECTIONS)
def test_a_composition_of_torchs_layers(word, directions, way):
    torch.manual_seed(0)
    x_64 = torch.randn(T, B, I, dtype=torch.float64)
    stack = made(word, DIRECTIONS[directions], torch.float64)
    weight = torch.randn(T, B, stack.output_size, dtype=torch.float64)

    def of(stack, run, dtype):
        x = x_64.to(dtype).requires_grad_()
        stack = copy.deepcopy(stack).to(dtype)
        return values(run(stack, x), x, stack, weight.to(dtype))

    def ours(stack, x):
        return called(stack, way, x)

    exact = of(of_torch(stack), lambda s, x: truth(s, word, x, WAYS[way]), torch.float64)
    check_all(of(stack, ours, torch.float64), None, exact, torch.float64)
    if way == "dense":  # the others' sums over sequences are in another order in torch's loop
        theirs = of(of_torch(stack), lambda s, x: of_equal_lengths(s, word, x), torch.float32)
        check_all(of(stack, ours, torch.float32), theirs, exact, torch.float32)


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_batch_first(directions):
    one, other = (made("highway", DIRECTIONS[directions], batch_first=f) for f in (False, True))
    x, reset = torch.randn(T, B, I), torch.rand(T, B) < 0.3
    for given in ({}, {"lengths": LENGTHS}, {"reset": reset}, {"lengths": LENGTHS, "reset": reset}):
        y, _ = one(x, **given)
        if "reset" in given:
            given = given | {"reset": reset.t()}
        check_alike(other(x.transpose(0, 1), **given)[0].transpose(0, 1), y)


@pytest.mark.parametrize("directions", DIRECTIONS)
@pytest.mark.parametrize("kind", ["dense", "lengths", "packed", "unbatched"])
def test_a_reset_parts_sequences(kind, directions):
    """What stands behind it is what the part would give by itself, from either end."""
    stack = made("residual", DIRECTIONS[directions], torch.float64)
    x = torch.randn(T, B, I, dtype=torch.float64)
    ends = [T] * B if kind in ("dense", "unbatched") else [6, 3, 5, 4]
    cuts = [2, 0, 4, 3]
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[cuts, range(B)] = True
    if kind == "packed":
        packed = pack_padded_sequence(x, ends, enforce_sorted=False)
        y = pad_packed_sequence(stack(packed, reset=reset)[0], total_length=T)[0]
    elif kind == "unbatched":
        y = torch.stack([stack(x[:, b], reset=reset[:, b])[0] for b in range(B)], 1)
    else:
        y, _ = stack(x, reset=reset, lengths=ends if kind == "lengths" else None)
    for b, (cut, end) in enumerate(zip(cuts, ends, strict=True)):
        for begin, stop in ((0, cut), (cut, end)):
            if begin < stop:
                check_alike(y[begin:stop, b], stack(x[begin:stop, b])[0])


def test_padding_goes_past_no_layer():
    for word in CONNECTIONS:
        stack, x = made(word, "stacks"), torch.randn(T, B, I)
        x = torch.where(
            torch.arange(T)[:, None, None] < torch.tensor(LENGTHS)[:, None], x, torch.nan
        )
        y, _ = stack(x, lengths=LENGTHS)
        assert not y[2:, 1].any() and not y[:, 3].any()
        y.sum().backward()
        for p in stack.parameters():
            assert p.grad.isfinite().all()


def leaves(states):
    if isinstance(states, torch.Tensor):
        return [states]
    return [t for state in states for t in leaves(state)]


@pytest.mark.parametrize("directions", DIRECTIONS)
def test_states_are_each_layers_own(directions):
    stack = made("residual", DIRECTIONS[directions])
    D = 1 + (directions == "both at each layer")
    _, states = stack(torch.randn(T, B, I))
    for own in states if directions == "joined at the end" else (states,):
        (h_0, c_0), (h_1, _), h_2, h_3 = own
        assert h_0.shape == c_0.shape == h_1.shape == (D, B, 7)
        assert h_2.shape == (D, B, 6) and h_3.shape == (D, B, 5)


def test_a_sequence_in_two_parts():
    for stack in (made("highway"), equal_layers(), equal_layers(kind=fastseq.GRU)):
        x = torch.randn(T, B, I)
        y, states = stack(x)
        first, begun = stack(x[:2])
        second, ended = stack(x[2:], begun)
        torch.testing.assert_close(torch.cat([first, second]), y, **TOL)
        torch.testing.assert_close(leaves(ended), leaves(states), **TOL)
        assert is_whole(stack(x[2:], [*begun])[0]) == (stack.layers[2].hidden_size == 7)
        # one layer goes on, the others begin
        mixed, _ = stack(x, (None, begun[1], *[None] * (len(begun) - 2)))
        assert mixed.shape == y.shape and not torch.equal(mixed, y)
        zeros = tuple(tuple(map(torch.zeros_like, leaves(s))) for s in begun)
        zeros = tuple(s if len(s) > 1 else s[0] for s in zeros)
        torch.testing.assert_close(stack(x, (None, *zeros[1:]))[0], y, **TOL)


def test_states_of_both_ways():
    stack = made("plain", "stacks")
    x = torch.randn(T, B, I)
    _, (forward, reverse) = stack(x)
    y, (_, after) = stack(x, (forward, reverse))
    one = fastseq.Stacked(stack.layers)
    torch.testing.assert_close(y[..., :5], one(x, forward)[0], **TOL)
    other = fastseq.Stacked(stack.reverse_layers)
    z, states = other(x.flip(0), reverse)
    torch.testing.assert_close(y[..., 5:], z.flip(0), **TOL)
    torch.testing.assert_close(leaves(after), leaves(states), **TOL)


# One call of the backend


def twin_of_many_layers(stack, kind, **options):
    """The one layer of several that has the weights of a stack's layers."""
    own, first = list(stack.layers), stack.layers[0]
    one = kind(
        first.input_size, first.hidden_size, len(own), bidirectional=first.bidirectional, **options
    )
    with torch.no_grad():
        for k, layer in enumerate(own):
            for name, p in layer.named_parameters():
                getattr(one, name.replace("_l0", f"_l{k}")).copy_(p)
    return one


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", [fastseq.LSTM, fastseq.GRU, fastseq.RNN, fastseq.PeepholeLSTM])
def test_equal_layers_are_one_call(kind, bidirectional):
    """The bits of the layer with num_layers, dropout too, in one call each way as that."""
    stack = equal_layers(kind=kind, dropout=0.4, bidirectional=bidirectional)
    one = twin_of_many_layers(stack, kind, dropout=0.4)
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, [2, 6, 4, 1], enforce_sorted=False)
    for input, given in ((x, {}), (packed, {}), (x, {"lengths": [6, 2, 4, 1]})):
        for training in (True, False):
            stack.train(training), one.train(training)
            torch.manual_seed(5)
            with counted() as count:
                y, states = stack(input, **given)
                y = y.data if isinstance(y, PackedSequence) else y
                y.sum().backward()
            assert count == {"forward": 1, "backward": 1}
            torch.manual_seed(5)
            z, final = one(input, **given)
            z = z.data if isinstance(z, PackedSequence) else z
            assert torch.equal(y, z)
            for k, parts in enumerate(zip(*[leaves(s) for s in states], strict=True)):
                assert torch.equal(torch.cat(parts), leaves(final)[k])
    assert is_whole(stack(x)[0])


def test_each_direction_is_one_call():
    stack = equal_layers(bidirectional="stacks", dropout=0.3)
    with counted() as count:
        stack(torch.randn(T, B, I))[0].sum().backward()
    assert count == {"forward": 2, "backward": 2}


def test_the_calls_of_a_mixed_stack():
    """The two LSTMs together, the others one each; with connections each layer by itself."""
    x = torch.randn(T, B, I)
    for word, calls in (("plain", 3), ("residual", 4), (["plain", "plain", "highway", "plain"], 3)):
        with counted() as count, torch.no_grad():
            made(word)(x)
        assert count["forward"] == calls


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_hook(lambda *_: None),
        lambda m: m.register_forward_pre_hook(lambda *_: None),
        lambda m: m.register_full_backward_hook(lambda *_: None),
        lambda m: m.__setattr__("forward", m.forward),
        lambda m: m.eval(),
        lambda m: m._flat_weights.__setitem__(0, m.weight_ih_l0 * 2),
        lambda m: m.fastseq.__setattr__("recurrent_dropout", 0.5),
        lambda m: m.fastseq.__setattr__("memory", "lean"),
        lambda m: m.fastseq.__setattr__("deterministic", True),
    ],
    ids=["hook", "pre-hook", "backward", "forward", "eval", "flat", "masks", "lean", "same bits"],
)
def test_what_is_a_layers_own_is_called_by_itself(change):
    stack = equal_layers()
    change(stack.layers[1])
    x = torch.randn(T, B, I)
    with torch.no_grad(), counted() as count:
        stack(x)
    assert count["forward"] == 3


def test_hooks_run():
    stack, seen = equal_layers(), []
    stack.layers[1].register_forward_hook(lambda m, args, out: seen.append(out[0].shape))
    stack(torch.randn(T, B, I))
    assert seen == [(T, B, 7)]
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(type(m)))
    try:
        equal_layers()(torch.randn(T, B, I))
    finally:
        handle.remove()
    assert seen.count(fastseq.LSTM) == 3


def test_dropout_is_torchs():
    """Of torch.nn's layers in a stack: the bits of its layer with num_layers."""
    for kind in (nn.LSTM, nn.GRU):
        stack = equal_layers(kind=kind, dropout=0.5)
        one = twin_of_many_layers(stack, kind, dropout=0.5)
        x = torch.randn(T, B, I)
        for input in (x, pack_padded_sequence(x, [2, 6, 4, 1], enforce_sorted=False)):
            torch.manual_seed(1)
            y, _ = stack(input)
            torch.manual_seed(1)
            z, _ = one(input)
            y, z = (o.data if isinstance(o, PackedSequence) else o for o in (y, z))
            assert torch.equal(y, z)


@pytest.mark.parametrize("word", CONNECTIONS)
def test_a_connection_carries_what_is_not_dropped(word):
    """Where all is dropped, the layers see nothing and the connections all."""
    stack = made(word, dropout=1.0)
    with torch.no_grad():
        for name, p in stack.layers.named_parameters():
            if "bias" in name:
                p.zero_()
    x = torch.randn(T, B, I)
    y, _ = stack(x)
    assert bool(y.any()) == (word != "plain")
    assert stack.eval()(x)[0].any()


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_weights_that_are_no_parameters(lengths):
    """Of a layer that is parametrized, and of one whose weight a wrapper put there."""
    stack, x = equal_layers(), torch.randn(T, B, I)
    nn.utils.parametrizations.weight_norm(stack.layers[1], "weight_hh_l0")
    with torch.no_grad():
        stack.layers[1].parametrizations.weight_hh_l0.original0.mul_(0.5)
    dropped = stack.layers[2].weight_ih_l0.detach() * 2
    del stack.layers[2].weight_ih_l0
    stack.layers[2].weight_ih_l0 = dropped
    expected = x
    for layer in stack.layers:
        expected, _ = layer(expected, lengths=lengths)
    torch.testing.assert_close(stack(x, lengths=lengths)[0], expected, **TOL)


def test_masks_have_a_seed_of_their_own_for_each_layer():
    stack = equal_layers(kind=fastseq.GRU, recurrent_dropout=0.5)
    x = torch.randn(T, B, I)
    one, other = stack(x, seed=4)[0], stack(x, seed=4)[0]
    assert torch.equal(one, other) and not torch.equal(one, stack(x, seed=5)[0])
    ids = torch.arange(B).flip(0)
    torch.testing.assert_close(stack(x.flip(1), seed=4, row_ids=ids)[0].flip(1), one, **TOL)
    seeds = []
    for layer in stack.layers:
        layer.register_forward_pre_hook(
            lambda m, args, keywords: seeds.append(keywords["seed"]), with_kwargs=True
        )
    stack(x, seed=4)
    assert len({*seeds, 4}) == 4


# Modules of other kinds


def every_kind():
    torch.manual_seed(0)
    return [
        fastseq.PeepholeLSTM(I, 8),
        fastseq.SCRN(8, 6, context_size=2),
        fastseq.CoupledLSTM(8, 8, proj_size=5),
        fastseq.MGU(5, 8, learn_state=True),
        fastseq.IndRNN(8, 8, num_layers=2),
        fastseq.IndRNN(8, 8),
        fastseq.GRU(8, 8, reset_after=False),
        fastseq.RNN(8, 4, nonlinearity="sigmoid"),
    ]


@pytest.mark.parametrize("word", CONNECTIONS)
def test_every_kind_of_layer(word):
    stack = fastseq.Stacked(every_kind(), connections=word)
    x = torch.randn(T, B, I)
    y, states = stack(x)
    assert y.shape == (T, B, 4) and len(states) == 8
    assert [len(leaves(s)) for s in states] == [2, 2, 2, 1, 1, 1, 1, 1]
    assert states[4].shape == (2, B, 8)
    z = x
    for layer, connection in zip(stack.layers, stack.connections, strict=True):
        out, _ = layer(z)
        z = connection(z, out)
    torch.testing.assert_close(y, z, **TOL)
    y.sum().backward()
    assert all(p.grad is not None for p in stack.parameters())
    for t in (1, 3):
        torch.testing.assert_close(stack(x, lengths=[t] * B)[0][:t], stack(x[:t])[0], **TOL)


def test_one_layer_at_two_places():
    layer = fastseq.GRU(I, I)
    stack = fastseq.Stacked([layer, layer])
    x = torch.randn(T, B, I)
    y, _ = stack(x)
    torch.testing.assert_close(y, layer(layer(x)[0])[0], **TOL)
    ours = torch.autograd.grad(y.sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(layer(layer(x)[0])[0].sum(), list(layer.parameters()))
    torch.testing.assert_close(ours, theirs, **TOL)


def test_initial_values():
    stack = made("highway")
    assert all((c.transform.bias == -1).all() for c in stack.connections)
    assert stack.connections[0].carry.state_dict() == {}
    assert stack.connections[2].carry.weight.shape == (6, 7)
    torch.manual_seed(1)
    stack.reset_parameters()
    first = copy.deepcopy(stack.state_dict())
    torch.manual_seed(1)
    stack.reset_parameters()
    assert all(torch.equal(v, first[k]) for k, v in stack.state_dict().items())
    assert not torch.equal(first["layers.1.weight_hh_l0"], first["layers.0.weight_hh_l0"])


# Among the library's functions


def test_replace_and_restore():
    torch.manual_seed(0)
    stack = fastseq.Stacked(
        [nn.LSTM(I, 7), nn.LSTM(7, 7), nn.GRU(7, 6)], connections="residual", dropout=0.2
    )
    x = torch.randn(T, B, I)
    with pytest.raises(TypeError, match=r"lengths: layers\[0\] is torch.nn's LSTM.*replace"):
        stack(x, lengths=LENGTHS)
    theirs = stack.eval()(x)[0]
    report = fastseq.replace(stack)
    assert list(report.swapped) == ["layers.0", "layers.1", "layers.2"]
    torch.testing.assert_close(stack(x)[0], theirs, **TOL)
    assert not stack(x, lengths=LENGTHS)[0][2:, 1].any()
    fastseq.set_options(stack, backend="eager", memory="lean")
    assert {layer.fastseq.backend for layer in stack.layers} == {"eager"}
    torch.testing.assert_close(stack(x)[0], theirs, **TOL)
    fastseq.restore(stack)
    assert [type(layer) for layer in stack.layers] == [nn.LSTM, nn.LSTM, nn.GRU]
    assert torch.equal(stack(x)[0], theirs)


def test_explain(capsys):
    fastseq.explain(made("plain", "stacks"), torch.randn(T, B, I))
    said = capsys.readouterr().out
    for name in ("layers[0] to layers[1]:", "layers[2]:", "reverse_layers[3]:"):
        assert f"{name}\n" in said
    assert "LSTM T=6 B=4 I=7 H=7 layers=2" in said and "all layers in one call" in said
    fastseq.explain(fastseq.Stacked([nn.GRU(I, 7)]), torch.randn(T, B, I))
    assert "torch.nn's own GRU" in capsys.readouterr().out


@pytest.mark.parametrize("word", CONNECTIONS)
def test_streaming(word):
    stack = fastseq.Stacked(every_kind(), connections=word, dropout=0.3)
    x = torch.randn(T, B, I)
    y, states = stack.eval()(x)
    handle = fastseq.streaming(stack.train(), B)
    for t in range(2):
        torch.testing.assert_close(handle.step(x[t]), y[t], **TOL)
    kept = handle.state
    others = [copy.deepcopy(handle), pickle.loads(pickle.dumps(handle))]
    out = torch.empty(B, 4)
    for one in (handle, *others):
        for t in range(2, T):
            assert one.step(x[t], out) is out
            torch.testing.assert_close(out, y[t], **TOL)
        torch.testing.assert_close(leaves(one.state), leaves(states), **TOL)
    handle.state = kept
    torch.testing.assert_close(handle.step(x[2]), y[2], **TOL)
    handle.reset([1])
    assert not any(s[:, 1].any() for s in leaves(handle.state))
    with torch.no_grad():
        for p in stack.parameters():
            p.mul_(1.1)
    handle.refresh()
    handle.state = kept
    torch.testing.assert_close(handle.step(x[2]), stack.eval()(x[2:3], kept)[0][0], **TOL)


def test_a_wrong_state_leaves_a_handle_as_it_was():
    handle = fastseq.streaming(equal_layers(2, fastseq.GRU), 2)
    handle.step(torch.randn(2, I))
    before = handle.state
    with pytest.raises(TypeError, match="state: expected a tuple of 2 states"):
        handle.state = before[0]
    with pytest.raises(ValueError, match="state: h"):
        handle.state = (torch.zeros(1, 2, 7), torch.zeros(1, 3, 7))
    assert all(torch.equal(a, b) for a, b in zip(handle.state, before, strict=True))
    with pytest.raises(ValueError, match=r"out: expected \(batch, output_size\) = \(2, 7\)"):
        handle.step(torch.randn(2, I), torch.empty(2, 8))
    assert all(torch.equal(a, b) for a, b in zip(handle.state, before, strict=True))


def test_what_is_not_streamed():
    with pytest.raises(ValueError, match="module: a reverse stack needs the whole sequence"):
        fastseq.streaming(made("plain", "stacks"))
    with pytest.raises(ValueError, match="bidirectional layer needs the whole sequence"):
        fastseq.streaming(made("plain", True))
    with pytest.raises(TypeError, match=r"LSTM of torch.nn; call fastseq.replace"):
        fastseq.streaming(fastseq.Stacked([nn.LSTM(I, 7)]))
    hooked = made()
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="module: a handle runs the layers by themselves"):
        fastseq.streaming(hooked)


# Among torch's tools


def test_copies():
    stack = made("highway", "stacks")
    x = torch.randn(T, B, I)
    y, _ = stack(x)
    saved = io.BytesIO()
    torch.save(stack, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(stack),
        pickle.loads(pickle.dumps(stack)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(x)[0], y)
    fresh = made("highway", "stacks")
    fresh.reset_parameters()
    fresh.load_state_dict(stack.state_dict())
    assert torch.equal(fresh(x)[0], y)
    empty = fastseq.Stacked.of(fastseq.GRU, 4, [5, 6], connections="highway", device="meta")
    assert all(p.is_meta for p in empty.parameters())


@pytest.mark.parametrize("given", ["dense", "lengths", "packed"])
@pytest.mark.parametrize(
    "word, bidirectional",
    [
        ("highway", "stacks"),
        pytest.param("plain", False, marks=full),
        pytest.param("residual", True, marks=full),
    ],
)
def test_compile(word, bidirectional, given):
    torch._dynamo.reset()
    options = {"connections": word, "bidirectional": bidirectional, "dropout": 0.0}
    stack = fastseq.Stacked.of(fastseq.GRU, I, [7, 6], **options)
    graph = torch.compile(stack, fullgraph=True, backend="aot_eager")
    x, lengths = torch.randn(T, B, I), torch.tensor([6, 2, 4, 1])
    if given == "packed":
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
    found = [run(x, lengths=lengths if given == "lengths" else None)[0] for run in (graph, stack)]
    found = [y.data if isinstance(y, PackedSequence) else y for y in found]
    torch.testing.assert_close(*found, **TOL)
    if given == "lengths":
        grads = [torch.autograd.grad(y.square().sum(), list(stack.parameters())) for y in found]
        torch.testing.assert_close(*grads, **TOL)


def test_a_compiled_packed_scrn():
    """The output is a PackedSequence that can be read."""
    torch._dynamo.reset()
    layer = fastseq.SCRN(I, 5, context_size=2)
    packed = pack_padded_sequence(torch.randn(T, B, I), [6, 2, 4, 1], enforce_sorted=False)
    y, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(packed)
    torch.testing.assert_close(y.data, layer(packed)[0].data, **TOL)


class WithLengths(nn.Module):
    def __init__(self, stack):
        super().__init__()
        self.stack = stack

    def forward(self, x, lengths):
        return self.stack(x, lengths=lengths)[0]


def test_export():
    time, batch = Dim("T", min=2), Dim("B", min=2)
    for word, bidirectional in (("plain", False), ("residual", "stacks")):
        stack = made(word, bidirectional).eval()
        example = torch.randn(T, B, I), torch.tensor([6, 2, 4, 1])
        sizes = {0: time, 1: batch}, {0: batch}
        program = torch.export.export(WithLengths(stack), example, dynamic_shapes=sizes)
        x, lengths = torch.randn(9, 5, I), torch.tensor([9, 0, 3, 5, 1])
        y = stack(x, lengths=lengths)[0]
        torch.testing.assert_close(program.module()(x, lengths), y, **TOL)


def test_trace():
    stack = made("highway", "stacks").eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        traced = torch.jit.trace(stack, torch.randn(T, B, I))
    x = torch.randn(9, 2, I)
    torch.testing.assert_close(traced(x)[0], stack(x)[0], **TOL)


def test_fx_takes_a_stack_as_a_leaf():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stack = made("residual")

        def forward(self, x):
            return self.stack(x)[0] * 2

    model, x = Model(), torch.randn(T, B, I)
    graph = torch.fx.symbolic_trace(model)
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["stack"]
    assert torch.equal(graph(x), model(x))


def test_script_says_what_to_do():
    with pytest.raises(TypeError, match=r"torch\.jit\.script: .*torch\.jit\.trace"):
        torch.jit.script(made())


@pytest.mark.parametrize("bidirectional", [False, "stacks"])
def test_second_derivatives(bidirectional):
    torch.manual_seed(0)
    options = {"bidirectional": bidirectional, "dtype": torch.float64}
    for word in ("plain", "highway"):
        stack = fastseq.Stacked.of(fastseq.GRU, 2, [2, 2], connections=word, **options)
        x = torch.randn(3, 1, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, stack=stack: stack(x)[0], (x,))


def test_an_ensemble():
    stack = made("highway", "stacks")
    own = dict(stack.named_parameters())
    members = {name: torch.stack([p, 2 * p]) for name, p in own.items()}
    x = torch.randn(T, B, I)
    both = vmap(lambda p: functional_call(stack, p, (x,))[0])(members)
    twice = functional_call(stack, {name: 2 * p for name, p in own.items()}, (x,))[0]
    torch.testing.assert_close(both[0], stack(x)[0], **TOL)
    torch.testing.assert_close(both[1], twice, **TOL)
    plain = equal_layers()
    doubled = {name: 2 * p for name, p in plain.named_parameters()}
    assert not torch.equal(functional_call(plain, doubled, (x,))[0], plain(x)[0])


@pytest.mark.parametrize("word", CONNECTIONS)
def test_autocast(word):
    stack, x = made(word), torch.randn(T, B, I)
    with torch.autocast("cpu", torch.bfloat16):
        y, states = stack(x)
    assert {t.dtype for t in (y, *leaves(states))} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), stack(x)[0], rtol=0.1, atol=0.05)


# What is wrong, in words


def gru(*sizes, **options):
    return fastseq.GRU(*sizes, **options)


WRONG = {
    "empty": (lambda: fastseq.Stacked([]), ValueError, "layers: expected at least one layer"),
    "a layer": (
        lambda: fastseq.Stacked(gru(3, 4)),
        TypeError,
        "expected a list of layers, got a GRU",
    ),
    "no list": (
        lambda: fastseq.Stacked(4),
        TypeError,
        "layers: expected a list of layers, got int",
    ),
    "no module": (lambda: fastseq.Stacked([gru(3, 4), 5]), TypeError, r"layers\[1\]: .* got int"),
    "linear": (lambda: fastseq.Stacked([nn.Linear(3, 4)]), TypeError, r"layers\[0\]: .* Linear"),
    "a class": (lambda: fastseq.Stacked([fastseq.GRU]), TypeError, "make an instance of it first"),
    "a cell": (lambda: fastseq.Stacked([fastseq.GRUCell(3, 4)]), TypeError, "which is one step"),
    "a stack": (
        lambda: fastseq.Stacked([fastseq.Stacked([gru(3, 4)])]),
        TypeError,
        r"list\(stack.layers\)",
    ),
    "widths": (
        lambda: fastseq.Stacked([gru(3, 4, bidirectional=True), gru(4, 4)]),
        ValueError,
        r"layers\[1\]: expected input_size 8, the width of the output of layers\[0\], got 4",
    ),
    "batch_first": (
        lambda: fastseq.Stacked([gru(3, 4, batch_first=True), gru(4, 4)]),
        ValueError,
        r"layers\[1\]: expected batch_first=True, as layers\[0\] has it, got False",
    ),
    "dtype": (
        lambda: fastseq.Stacked([gru(3, 4), gru(4, 4, dtype=torch.float64)]),
        ValueError,
        r"layers\[1\]: expected parameters of torch.float32 on cpu.* got torch.float64 on cpu",
    ),
    "device": (
        lambda: fastseq.Stacked([gru(3, 4), gru(4, 4, device="meta")]),
        ValueError,
        "on cpu, as .* on meta",
    ),
    "own dropout": (
        lambda: fastseq.Stacked([gru(3, 4, 2, dropout=0.5)]),
        ValueError,
        r"layers\[0\]: has dropout=0.5 between layers of its own",
    ),
    "word": (
        lambda: fastseq.Stacked([gru(3, 4)], connections="dense"),
        ValueError,
        "connections: expected one of 'plain', 'residual', 'highway', got 'dense'",
    ),
    "words": (
        lambda: fastseq.Stacked([gru(3, 4)], connections=["plain", "residual"]),
        ValueError,
        "connections: expected one for each of 1 layers, got 2",
    ),
    "no word": (
        lambda: fastseq.Stacked([gru(3, 4)], connections=3),
        TypeError,
        "connections: .* int",
    ),
    "rate": (lambda: fastseq.Stacked([gru(3, 4)], dropout=2), ValueError, "dropout should be"),
    "bias": (
        lambda: fastseq.Stacked([gru(3, 4)], transform_bias="low"),
        TypeError,
        "transform_bias: expected a number",
    ),
    "both ways": (
        lambda: fastseq.Stacked([gru(3, 4, bidirectional=True)], reverse=[gru(3, 4)]),
        ValueError,
        r"layers\[0\]: a bidirectional layer reads both ways",
    ),
    "reverse both ways": (
        lambda: fastseq.Stacked([gru(3, 4)], reverse=[gru(3, 4, bidirectional=True)]),
        ValueError,
        r"reverse\[0\]: a bidirectional layer reads both ways",
    ),
    "reverse count": (
        lambda: fastseq.Stacked([gru(3, 4)], reverse=[gru(3, 4), gru(4, 4)]),
        ValueError,
        "reverse: expected 1 layers",
    ),
    "reverse input": (
        lambda: fastseq.Stacked([gru(3, 4)], reverse=[gru(2, 4)]),
        ValueError,
        r"reverse\[0\]: expected input_size 3",
    ),
    "reverse batch_first": (
        lambda: fastseq.Stacked([gru(3, 4)], reverse=[gru(3, 4, batch_first=True)]),
        ValueError,
        r"reverse\[0\]: expected batch_first=False",
    ),
    "the kind": (lambda: fastseq.Stacked.of("GRU", 3, [4]), TypeError, "kind: expected a class"),
    "no widths": (lambda: fastseq.Stacked.of(fastseq.GRU, 3, []), ValueError, "widths: expected"),
    "a width": (lambda: fastseq.Stacked.of(fastseq.GRU, 3, 4), ValueError, "widths: .* got 4"),
    "num_layers": (
        lambda: fastseq.Stacked.of(fastseq.GRU, 3, [4], num_layers=2),
        TypeError,
        "num_layers: there is one layer for each of widths",
    ),
    "bidirectional": (
        lambda: fastseq.Stacked.of(fastseq.GRU, 3, [4], bidirectional="both"),
        ValueError,
        "bidirectional: expected a bool or 'stacks', got 'both'",
    ),
}


@pytest.mark.parametrize("make, kind, words", WRONG.values(), ids=WRONG)
def test_a_wrong_stack(make, kind, words):
    with pytest.raises(kind, match=words):
        make()


def test_one_layer_in_both_stacks():
    layer = gru(3, 4)
    with pytest.raises(ValueError, match=r"reverse\[0\]: stands in the forward stack, too"):
        fastseq.Stacked([layer], reverse=[layer])


def test_dropout_of_one_layer_warns():
    with pytest.warns(UserWarning, match="it does nothing with one layer, got dropout=0.5"):
        fastseq.Stacked([gru(3, 4)], dropout=0.5)


CALLS = {
    "a state": (lambda x: {"hx": torch.zeros(1, B, 7)}, RuntimeError, "hx: expected a tuple of 3"),
    "two states": (lambda x: {"hx": (None, None)}, RuntimeError, "of 3 states.* got 2 values"),
    "its shape": (
        lambda x: {"hx": (torch.zeros(1, B + 1, 7),) * 3},
        RuntimeError,
        r"Expected hidden size \(1, 4, 7\), got \[1, 5, 7\]",
    ),
    "its kind": (
        lambda x: {"hx": ((torch.zeros(1, B, 7),) * 2,) * 3},
        AttributeError,
        "GRU takes one tensor h_0",
    ),
    "its dtype": (
        lambda x: {"hx": (torch.zeros(1, B, 7, dtype=torch.float64),) * 3},
        RuntimeError,
        "Expected hidden state of dtype torch.float32",
    ),
    "width": (lambda x: {"input": x[..., 1:]}, RuntimeError, "Expected 7, got 6"),
    "rank": (lambda x: {"input": x[0, 0]}, ValueError, "Stacked: Expected input to be 2D or 3D"),
    "array": (lambda x: {"input": x.numpy()}, TypeError, "input: expected a Tensor"),
    "dtype": (lambda x: {"input": x.double()}, ValueError, "RNN input dtype"),
    "lengths": (lambda x: {"lengths": [9, 1, 1, 1]}, ValueError, "lengths: .* from 0 to T = 6"),
    "reset": (lambda x: {"reset": torch.zeros(2, 2) > 0}, ValueError, r"reset: expected \(T, B\)"),
    "seed": (lambda x: {"seed": "a"}, TypeError, "seed: expected an int"),
    "row_ids": (lambda x: {"row_ids": [1, 2]}, ValueError, "row_ids: expected one a sequence"),
}


@pytest.mark.parametrize("change, kind, words", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("word", ["plain", "residual"])
def test_a_wrong_call(word, change, kind, words):
    stack = fastseq.Stacked.of(fastseq.GRU, I, [7, 7, 7], connections=word)
    x = torch.randn(T, B, I)
    with pytest.raises(kind, match=words):
        stack(**{"input": x} | change(x))


def test_wrong_states_of_both_ways():
    stack, x = equal_layers(kind=fastseq.GRU, bidirectional="stacks"), torch.randn(T, B, I)
    with pytest.raises(RuntimeError, match="hx: expected a pair of tuples"):
        stack(x, (None,) * 3)
    with pytest.raises(RuntimeError, match=r"hx\[1\]: expected a tuple of 3 states"):
        stack(x, ((None,) * 3, (None,)))


def test_widths_meet():
    stack = fastseq.Stacked.of(fastseq.LSTM, 4, [6, 5], proj_size=3, bidirectional=True)
    assert (stack.input_size, stack.output_size) == (4, 6)
    for one, other in pairwise(stack.layers):
        assert other.input_size == 2 * one.proj_size
