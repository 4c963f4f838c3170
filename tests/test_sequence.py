"""Encoder, Decoder and SequenceAutoencoder, against what they are made of, step by step."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastseq
from fastseq import pooling
from fastseq.nn.sequence import CELLS, Decoder, Encoder, SequenceAutoencoder

F64 = {"dtype": torch.float64}
T, B, I, H, V = 6, 4, 3, 5, 7  # noqa: E741  (the field's letters)
LENGTHS = torch.tensor([6, 0, 3, 1])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def more(cell):
    return {"context_size": 2} if cell == "scrn" else {}


def last_steps(y, lengths, H):
    """(B, D*H): of the forward direction at a sequence's end, of the reverse one at its start."""
    rows = []
    for b, s in enumerate(lengths.tolist()):
        ends = [y[s - 1, b, :H], *([y[0, b, H:]] if y.shape[2] > H else [])]
        rows.append(torch.cat(ends) if s else torch.zeros(y.shape[2], **F64))
    return torch.stack(rows)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", CELLS)
def test_the_vector_is_the_output_at_the_end(name, bidirectional):
    sizes = {"num_layers": 2, "bidirectional": bidirectional, **more(name), **F64}
    encoder = Encoder(I, H, cell=name, **sizes)
    assert type(encoder.layer) is CELLS[name]
    x = torch.randn(T, B, I, **F64)
    y, state = encoder.layer(x, lengths=LENGTHS)
    vector, final = encoder(x, lengths=LENGTHS)
    width = y.shape[2] // (2 if bidirectional else 1)
    close(vector, last_steps(y, LENGTHS, width))
    close(final, state)
    assert vector.shape == (B, encoder.output_size)


def test_a_pooled_vector():
    x = torch.randn(B, T, I, **F64)
    layer = fastseq.GRU(I, H, bidirectional=True, batch_first=True, **F64)
    y, _ = layer(x, lengths=LENGTHS)
    for pool, expected in (
        ("max", pooling.max_pool(y, LENGTHS, batch_first=True)),
        ("average", pooling.average_pool(y, LENGTHS, batch_first=True)),
        (
            pooling.Pooling("k_max", 2, batch_first=True),
            pooling.k_max_pool(y, 2, LENGTHS, batch_first=True).flatten(1),
        ),
    ):
        encoder = Encoder(cell=layer, pool=pool)
        vector, _ = encoder(x, lengths=LENGTHS)
        close(vector, expected)
        assert vector.shape == (B, encoder.output_size)
    packed = nn.utils.rnn.pack_padded_sequence(x[::2], LENGTHS[::2], True)
    close(
        Encoder(cell=layer, pool="max")(packed)[0],
        pooling.max_pool(y, LENGTHS, batch_first=True)[::2],
    )
    assert Encoder(cell=layer)(x[0])[0].shape == Encoder(cell=layer, pool="max")(x[0])[0].shape


def steps_by_hand(decoder, state, T, read, vector=None):
    """The outputs of a decoder, one call a step; ``read`` makes each input of the output before."""
    outputs, x = [], torch.zeros(B, decoder.input_size, **F64)
    for t in range(T):
        if decoder.feed == "input":
            x = torch.cat([x, vector], 1)
        y, state = decoder.layer(x[None], state)
        outputs.append(y[0] @ decoder.readout.weight.T + decoder.readout.bias)
        x = read(t, outputs[-1])
    return torch.stack(outputs), state


@pytest.mark.parametrize("feed", ["state", "input"])
@pytest.mark.parametrize("name", CELLS)
def test_a_decoder_runs_free_and_with_a_teacher(name, feed):
    decoder = Decoder(I, H, vector_size=V, feed=feed, cell=name, num_layers=2, **more(name), **F64)
    vector = torch.randn(B, V, **F64)
    state = None
    if feed == "state":
        made = torch.tanh(vector @ decoder.initial.weight.T + decoder.initial.bias)
        parts = made.split([2 * size for size in decoder._sizes], 1)
        state = tuple(torch.stack(part.chunk(2, 1)) for part in parts)
        state = state if len(state) > 1 else state[0]
    expected = steps_by_hand(decoder, state, T, lambda t, o: o, vector)
    close(decoder(vector, steps=T), expected)
    inputs = torch.randn(T, B, I, **F64)
    inputs[0] = 0
    taught = steps_by_hand(decoder, state, T, lambda t, o: inputs[min(t + 1, T - 1)], vector)
    close(decoder(vector, inputs), taught)


def test_a_decoder_with_tokens():
    """Another size out than in, a feedback, lengths, batch first, and no vector."""
    decoder = Decoder(I, H, 9, cell="gru", batch_first=True, **F64)
    table = nn.Embedding(9, I, **F64)
    h_0 = torch.randn(1, B, H, **F64)

    def feedback(o):
        return table(o.argmax(-1))

    y, h_n = decoder(hx=h_0, steps=T, feedback=feedback, lengths=LENGTHS)
    for b, s in enumerate(LENGTHS.tolist()):
        x, h = torch.zeros(1, 1, I, **F64), h_0[:, b : b + 1].contiguous()
        for t in range(s):
            o, h = decoder.layer(x, h)
            o = decoder.readout(o)
            close(y[b, t], o[0, 0])
            x = feedback(o[0])[None]
        close(h_n[:, b], h[:, 0])
        assert not y[b, s:].any()
    inputs = torch.randn(B, T, I, **F64)
    y, h = decoder(inputs=inputs, hx=h_0, lengths=LENGTHS)
    expected, expected_h = decoder.layer(inputs, h_0, lengths=LENGTHS)
    inside = torch.arange(T) < LENGTHS[:, None]
    close(y[inside], decoder.readout(expected)[inside])
    close(h, expected_h)
    assert not y[~inside].any()


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_autoencoder_is_its_parts_one_sequence_at_a_time(bidirectional, reverse, first):
    model = SequenceAutoencoder(
        I, H, cell="lstm", reverse=reverse, bidirectional=bidirectional, num_layers=2,
        batch_first=first, **F64,
    )  # fmt: skip
    x = torch.randn(B, T, I, **F64)
    for free in (False, True):
        given = x if first else x.transpose(0, 1)
        y, state = model(given, lengths=LENGTHS, free_running=free)
        close(state, model.encoder(given, lengths=LENGTHS)[1])
        y = y if first else y.transpose(0, 1)
        for b, s in enumerate(LENGTHS.tolist()):
            assert not y[b, s:].any()
            if s == 0:
                continue
            own = x[b : b + 1, :s] if first else x[b : b + 1, :s].transpose(0, 1)
            hx = model.encoder.layer(own)[1]
            if bidirectional:  # layer k is rows 2k and 2k + 1
                hx = tuple(s.reshape(2, 2, 1, H).transpose(1, 2).flatten(2) for s in hx)
            target = x[b, :s].flip(0) if reverse else x[b, :s]
            o, made = torch.zeros(I, **F64), []
            for t in range(s):
                h, hx = model.decoder.layer(o.reshape(1, 1, I), hx)
                made.append(model.decoder.readout(h)[0, 0])
                o = made[-1] if free else target[t]
            close(y[b, :s], torch.stack(made[::-1] if reverse else made))


def test_a_module_of_modules():
    """It trains, is copied, pickled and compiled, and has parameters of its own alone."""
    model = SequenceAutoencoder(I, H, cell="gru", bidirectional=True)
    x = torch.randn(T, B, I)
    y, _ = model(x, lengths=LENGTHS)
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x, lengths=LENGTHS)[0], y)
    again = SequenceAutoencoder(I, H, cell="gru", bidirectional=True)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x, lengths=LENGTHS)[0], y)
    assert model(x[:, :0])[0].shape == (T, 0, I)


@pytest.mark.full
def test_compiled_in_one_graph():
    model, x = SequenceAutoencoder(I, H, bidirectional=True), torch.randn(T, B, I)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, lengths=LENGTHS)[0], model(x, lengths=LENGTHS)[0])


@pytest.mark.full
def test_derivatives():
    model = SequenceAutoencoder(2, 3, cell="rnn", **F64)
    x = torch.randn(3, 2, 2, **F64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: model(x, lengths=[3, 1])[0], x)
    torch.autograd.gradgradcheck(lambda x: model(x, lengths=[3, 1])[0], x)


X, VECTOR = torch.randn(T, B, I), torch.randn(B, V)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: Encoder(I, H, cell="transformer"), ValueError, "cell: expected one of 'rnn'"),
        (lambda: Encoder(I, H, cell=nn.LSTM), TypeError, "cell: expected a name, .* got LSTM"),
        (lambda: Encoder(I), TypeError, "hidden_size: expected the layer's, got None"),
        (lambda: Encoder(I, cell=fastseq.GRU(I, H)), TypeError, "input_size: cell is a layer"),
        (lambda: Encoder(I, H, pool="first"), ValueError, "pool: expected 'last', .* got 'first'"),
        (lambda: Encoder(I, H, pool=3), TypeError, "pool: expected a str or a Pooling, got int"),
        (
            lambda: Encoder(I, H, pool=pooling.Pooling("max"), batch_first=True),
            ValueError,
            "pool: expected batch_first=True",
        ),
        (lambda: Decoder(I, H, feed="both"), ValueError, "feed: expected 'state' or 'input'"),
        (lambda: Decoder(I, H, feed="input"), ValueError, "vector_size: .* got None"),
        (lambda: Decoder(I, H, 0), ValueError, "output_size: expected at least 1, got 0"),
        (lambda: Decoder(I, H, bidirectional=True), ValueError, "bidirectional: a decoder has no"),
        (lambda: Decoder(I, H, cell=fastseq.GRU(I, H)), TypeError, "cell: .* give its class"),
        (lambda: Decoder(I, H, vector_size=V)(steps=2), ValueError, r"vector: expected \(B, 7\)"),
        (lambda: Decoder(I, H)(VECTOR, X), ValueError, "vector: expected None"),
        (lambda: Decoder(I, H)(steps=3), ValueError, "hx: expected the initial state"),
        (lambda: Decoder(I, H, vector_size=V)(X[0], X), ValueError, r"vector: .* got \(4, 3\)"),
        (lambda: Decoder(I, H, vector_size=V)(VECTOR), ValueError, "steps: without inputs"),
        (lambda: Decoder(I, H, vector_size=V)(VECTOR, X, steps=2), ValueError, "steps: .* given"),
        (
            lambda: Decoder(I, H, vector_size=V)(VECTOR[:2], X),
            ValueError,
            "one number of sequences, got 2 of vector, 4 of inputs",
        ),
        (
            lambda: Decoder(I, H, 9, vector_size=V)(VECTOR, steps=2),
            ValueError,
            "feedback: an output of 9 is no input of 3",
        ),
        (
            lambda: Decoder(I, H, vector_size=V)(VECTOR, X, lengths=[7] * B),
            ValueError,
            "lengths: .* T = 6",
        ),
        (lambda: SequenceAutoencoder(I, H)(X[0]), TypeError, "input: .* got 2-D"),
        (lambda: SequenceAutoencoder(I, H, reverse=1), TypeError, "reverse: expected a bool"),
        (
            lambda: SequenceAutoencoder(I, H, proj_size=2, bidirectional=True),
            ValueError,
            "bidirectional: not with proj_size",
        ),
        (
            lambda: SequenceAutoencoder(I, H)(X, feedback=lambda o: o),
            ValueError,
            "feedback: with free_running=True alone",
        ),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
