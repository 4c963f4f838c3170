"""fastseq.training: gradient flow, truncated backpropagation and the regulariser against vanishing
gradients, each against an independent writing of its equations."""

import sys

import pytest
import torch
from torch import nn

import fastseq
from fastseq import training
from fastseq.training import detach, gradient_flow, plot_gradient_flow, tbptt

F64 = {"dtype": torch.float64}
T, B, I, H = 6, 3, 4, 5  # noqa: E741  (the field's letters)
LENGTHS = torch.tensor([6, 0, 3])


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


# Gradient flow


def lstm_step(w, x, h, c):
    i, f, g, o = (x @ w[0].T + w[2] + h @ w[1].T + w[3]).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def gru_step(w, x, h, _):
    r, z, n = (x @ w[0].T + w[2]).chunk(3, -1)
    u, v, m = (h @ w[1].T + w[3]).chunk(3, -1)
    r, z = (r + u).sigmoid(), (z + v).sigmoid()
    return (1 - z) * (n + r * m).tanh() + z * h, None


def rnn_step(w, x, h, _):
    return (x @ w[0].T + w[2] + h @ w[1].T + w[3]).tanh(), None


STEPS = {"LSTM": lstm_step, "GRU": gru_step, "RNN": rnn_step}


def unrolled(layer, x, lengths):
    """The output, the last layer's final states, and every h_t, by the equations."""
    step, D = STEPS[type(layer).__name__], 2 if layer.bidirectional else 1
    nodes, ends = [], []
    for k in range(layer.num_layers):
        sides = []
        for d in range(D):
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w = [getattr(layer, f"{n}_l{k}{'_reverse' * d}").detach() for n in names]
            h = torch.zeros(B, H, **F64, requires_grad=True)
            c = torch.zeros(B, H, **F64)
            row, y = [None] * T, [None] * T
            for t in range(T)[:: -1 if d else 1]:
                row[t], c_t = step(w, x[t], h, c)
                alive = (t < lengths)[:, None]
                y[t] = torch.where(alive, row[t], 0.0)
                h = torch.where(alive, row[t], h)
                c = c if c_t is None else torch.where(alive, c_t, c)
            nodes += row
            sides.append(torch.stack(y))
            ends.append(h)
        x = torch.cat(sides, -1)
    return x, ends[-D:], nodes


@pytest.mark.parametrize("library", [fastseq, nn], ids=["fastseq", "torch.nn"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", STEPS)
def test_the_norms_are_those_of_an_unrolled_network(library, kind, bidirectional):
    layer = getattr(library, kind)(I, H, 2, bidirectional=bidirectional, **F64)
    x = torch.randn(T, B, I, **F64)
    D = 2 if bidirectional else 1
    weights = torch.randn(T, B, D * H, **F64)
    for lengths in (None, LENGTHS) if library is fastseq else (None,):
        y, ends, nodes = unrolled(layer, x, torch.full((B,), T) if lengths is None else lengths)
        for loss_fn, loss in (
            (None, torch.stack(ends).sum()),
            (lambda y, state: (y * weights).sum(), (y * weights).sum()),
        ):
            found = torch.autograd.grad(
                loss, nodes, allow_unused=True, materialize_grads=True, retain_graph=True
            )
            expected = torch.stack(found).reshape(2 * D, T, B, H).norm(dim=-1)
            norms = gradient_flow(layer, x, loss_fn, lengths=lengths, per_sequence=True)
            close(norms, expected)
            close(gradient_flow(layer, x, loss_fn, lengths=lengths), expected.norm(dim=-1))
    assert all(p.grad is None for p in layer.parameters())


def by_splitting(layer, x, loss_fn, k):
    """|dL/ds_t| of state k, each from a call of its own that begins with s_t. (T, B)"""
    norms = []
    for t in range(T):
        y, states = layer(x[: t + 1])
        states = [s.detach() for s in (states if type(states) is tuple else [states])]
        states[k].requires_grad_()
        if isinstance(layer, fastseq.SCRN):
            if k == 1:
                states[0] = hidden_of_scrn(layer, x[t], layer(x[:t])[1][0] if t else 0, states)
            h_t = torch.cat([s[0] for s in states], -1)
        else:
            h_t = states[0][0]
        given = tuple(states) if len(states) > 1 else states[0]
        rest, final = layer(x[t + 1 :], given) if t + 1 < T else (y[:0], given)
        loss = loss_fn(torch.cat([y[:t], h_t[None], rest]), final)
        (found,) = torch.autograd.grad(loss, states[k], allow_unused=True, materialize_grads=True)
        norms.append(found[0].norm(dim=-1))
    return torch.stack(norms)


def hidden_of_scrn(layer, x_t, h_prev, states):
    """h_t of s_t, which it reads; both and h_prev (1, B, size)."""
    inner = torch.cat([x_t[None], states[1]], -1) @ layer.weight_ih_l0.T + layer.bias_ih_l0
    if torch.is_tensor(h_prev):
        inner = inner + h_prev @ layer.weight_hh_l0.T
    return (inner + layer.bias_hh_l0).sigmoid()


LAYERS = {
    "lstm": lambda: fastseq.LSTM(I, H, **F64),
    "by torch": lambda: fastseq.LSTM(I, H, backend="torch", **F64),
    "projected": lambda: fastseq.LSTM(I, H, proj_size=3, **F64),
    "zoneout": lambda: fastseq.LSTM(I, H, zoneout=(0.3, 0.2), dtype=torch.float64),
    "reset before": lambda: fastseq.GRU(I, H, reset_after=False, **F64),
    "peephole": lambda: fastseq.PeepholeLSTM(I, H, **F64),
    "coupled": lambda: fastseq.CoupledLSTM(I, H, **F64),
    "mgu": lambda: fastseq.MGU(I, H, bias=False, **F64),
    "indrnn": lambda: fastseq.IndRNN(I, H, **F64),
    "scrn": lambda: fastseq.SCRN(I, H, context_size=2, learn_alpha=True, **F64),
}


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_and_state(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(T, B, I, **F64)
    w = torch.randn_like(layer(x)[0])

    def loss_fn(y, state):
        h = state[0] if isinstance(state, tuple) else state
        return (w * y).sum() + (h**2).sum()

    layer.train()
    for k, state in enumerate(layer._fastseq_states):
        norms = gradient_flow(layer, x, loss_fn, state=state, per_sequence=True)
        assert layer.training
        layer.eval()
        close(norms[0], by_splitting(layer, x, loss_fn, k))
        layer.train()


def test_a_cell_of_ones_own(cells_go_again):
    @fastseq.cell
    def Leaky(a_h, h_prev, d):
        h = d * h_prev + tanh(a_h)  # noqa: F821
        return h

    layer, x = Leaky(I, H, backend="eager", **F64), torch.randn(T, B, I, **F64)
    norms = gradient_flow(layer, x, lambda y, _: (y**2).sum(), per_sequence=True)
    close(norms[0], by_splitting(layer, x, lambda y, _: (y**2).sum(), 0))


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "ragged"])
@pytest.mark.parametrize("first", [False, True])
def test_the_loss_sees_what_the_layer_returns(first, lengths):
    torch.manual_seed(1)
    options = {"batch_first": first, **F64}
    layers = [
        fastseq.GRU(I, H, 2, bidirectional=True, dropout=0.5, learn_state=True, **options),
        fastseq.SCRN(I, H, 2, bidirectional=True, context_size=2, bias=False, **options),
        fastseq.Stacked(
            [fastseq.LSTM(I, H, **options), nn.GRU(H, H, **options)],
            reverse=[fastseq.GRU(I, H, **options), fastseq.IndRNN(H, H, **options)],
            connections=["highway", "residual"],
        ),
    ]
    x = torch.randn(B, T, I, **F64) if first else torch.randn(T, B, I, **F64)
    if lengths is not None:
        fastseq.replace(layers[2])
    for layer in layers:
        layer.eval()

        def loss_fn(y, state, layer=layer):
            expected = layer(x, lengths=lengths)
            torch.testing.assert_close((y, state), expected, rtol=1e-9, atol=1e-11)
            return y.sum()

        norms = gradient_flow(layer, x, loss_fn, lengths=lengths, per_sequence=True)
        assert norms.shape == (4, T, B)
        if lengths is not None:
            behind = torch.arange(T)[:, None] >= lengths
            assert not norms[:, behind].any() and norms[:, ~behind].all()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["dense", "ragged"])
def test_a_reverse_stack_is_in_the_order_of_time(lengths):
    """As the reverse direction of a bidirectional layer with the same weights."""
    both = fastseq.LSTM(I, H, bidirectional=True, **F64)
    ways = fastseq.LSTM(I, H, **F64), fastseq.LSTM(I, H, **F64)
    for d, way in enumerate(ways):
        own = {
            n.removesuffix("_reverse"): p
            for n, p in both.state_dict().items()
            if n.endswith("e") == d
        }
        way.load_state_dict(own)
    stack = fastseq.Stacked([ways[0]], reverse=[ways[1]])
    x = torch.randn(T, B, I, **F64)
    for state in "hc":
        given = {"lengths": lengths, "state": state, "per_sequence": True}
        close(gradient_flow(stack, x, **given), gradient_flow(both, x, **given))


def test_padding_has_no_part():
    layer, x = fastseq.LSTM(I, H, bidirectional=True, **F64), torch.randn(T, B, I, **F64)
    expected = gradient_flow(layer, x, lengths=LENGTHS)
    x[torch.arange(T)[:, None] >= LENGTHS] = torch.nan
    close(gradient_flow(layer, x, lengths=LENGTHS), expected)


def test_one_sequence_empty_batch_and_no_grad_mode():
    layer, x = fastseq.GRU(I, H, **F64), torch.randn(T, 1, I, **F64)
    norms = gradient_flow(layer, x, per_sequence=True)
    with torch.no_grad():
        close(gradient_flow(layer, x[:, 0], hx=torch.zeros(1, H, **F64)), norms[..., 0])
    assert gradient_flow(layer, x[:, :0]).tolist() == [[0.0] * T]


@pytest.mark.parametrize("cell", [fastseq.GRU, fastseq.LSTM])
def test_under_inference_mode_too(cell):
    layer, x = cell(I, H, **F64), torch.randn(T, B, I, **F64)
    norms, lengths = gradient_flow(layer, x), torch.full((B,), T)
    with torch.inference_mode():
        inputs, state = x.clone(), layer(x)[1]
        assert torch.equal(gradient_flow(layer, inputs), norms)
    zeros = tuple(map(torch.zeros_like, state)) if cell is fastseq.LSTM else torch.zeros_like(state)
    assert torch.equal(gradient_flow(layer, inputs, hx=zeros, lengths=lengths), norms)


def test_a_gradient_too_small_to_be_squared():
    layer = fastseq.RNN(I, 64, nonlinearity="relu")
    with torch.no_grad():
        layer.weight_hh_l0.copy_(1e-6 * torch.eye(64))
        layer.bias_ih_l0.fill_(9.0)
    norms = gradient_flow(layer, torch.zeros(T, 4, I))
    torch.testing.assert_close(
        norms[0], 16 * 1e-6 ** torch.arange(T - 1.0, -1, -1), atol=0, rtol=1e-5
    )


@pytest.mark.parametrize(
    "layer, call, error, words",
    [
        (nn.Linear(3, 3), {}, TypeError, "layer: expected a recurrent layer .* got Linear"),
        (fastseq.GRU, {}, TypeError, "layer: .* got the class GRU"),
        (fastseq.GRU(I, H), {"state": "c"}, ValueError, "state: expected one of h, got 'c'"),
        (fastseq.GRU(I, H), {"lengths": [9] * B}, ValueError, "lengths: .* T = 6, got 9 to 9"),
        (fastseq.GRU(I, H), {"loss_fn": 1}, TypeError, "loss_fn: expected a function, got int"),
        (fastseq.GRU(I, H), {"loss_fn": lambda y, _: y}, ValueError, "loss_fn: .* one number"),
        (fastseq.GRU(I, H), {"loss_fn": lambda y, _: 1.0}, TypeError, "loss_fn: .* got float"),
        (
            fastseq.GRU(I, H),
            {"loss_fn": lambda y, _: torch.ones(())},
            ValueError,
            "loss_fn: .* neither the output nor the state",
        ),
        (type("Own", (fastseq.GRU,), {"forward": None})(I, H), {}, TypeError, "forward of its own"),
        (
            nn.utils.parametrizations.weight_norm(nn.GRU(I, H), "weight_hh_l0"),
            {},
            TypeError,
            "layer: expected a recurrent layer",
        ),
    ],
)
def test_what_gradient_flow_refuses(layer, call, error, words):
    with pytest.raises(error, match=words):
        gradient_flow(layer, torch.randn(T, B, I), **call)


def test_the_picture(monkeypatch):
    norms = torch.tensor([[0.0, 1e-9, 1.0], [1e-3, 1e-2, 1e-1]])
    figure = plot_gradient_flow({"LSTM": norms, "GRU": norms[0]}, title="Two layers")
    (axes,) = figure.axes
    assert axes.get_yscale() == "log" and axes.get_title(loc="left") == "Two layers"
    assert [line.get_label() for line in axes.lines] == ["LSTM, layer 0", "LSTM, layer 1", "GRU"]
    assert axes.lines[1].get_ydata().tolist() == norms[1].double().tolist()
    (axes,) = plot_gradient_flow(norms, bidirectional=True).axes
    assert [line.get_label() for line in axes.lines] == ["layer 0", "layer 0, reverse"]
    with pytest.raises(ValueError, match=r"norms\['a'\]: .* got \(3, 1, 1\)"):
        plot_gradient_flow({"a": torch.ones(3, 1, 1)})
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_gradient_flow(norms)


@pytest.mark.full
def test_the_picture_of_the_page(tmp_path, threads):
    from bench import gradient_flow as command

    command.main(["--out", str(tmp_path / "new" / "flow.png")])
    assert (tmp_path / "new" / "flow.png").read_bytes().startswith(b"\x89PNG")


# Truncated backpropagation through time


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer, self.readout = layer, nn.Linear(H, 2, **F64)

    def forward(self, x, state=None, **given):
        y, state = self.layer(x, state, **given)
        return self.readout(y), state


def stream(steps=10):
    return torch.randn(steps, B, I, **F64), torch.randn(steps, B, 2, **F64)


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def learn(model, loss):
    """A step of gradient descent."""
    with torch.no_grad():
        for p, g in zip(model.parameters(), gradients(model, loss), strict=True):
            p -= 0.1 * g


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_training_as_it_is_written_by_hand(kind):
    model, again = (Model(getattr(fastseq, kind)(I, H, **F64)) for _ in range(2))
    again.load_state_dict(model.state_dict())
    x, target = stream()
    state = None
    for first in range(0, 10, 4):
        y, state = again(x[first : first + 4], state)
        learn(again, nn.functional.mse_loss(y, target[first : first + 4]))
        state = tuple(s.detach() for s in state) if kind == "LSTM" else state.detach()
    windows = tbptt(model, x, target, window=4)
    assert len(windows) == 3
    seen = []
    for window in windows:
        learn(model, nn.functional.mse_loss(window.output, window.targets))
        seen.append((window.start, window.stop, len(window.inputs), window.lengths))
    assert seen == [(0, 4, 4, None), (4, 8, 4, None), (8, 10, 2, None)]
    close(list(model.parameters()), list(again.parameters()))
    close(windows.state, state)
    assert not any(s.requires_grad for s in torch.utils._pytree.tree_leaves(windows.state))


@pytest.mark.parametrize("window, back", [(2, 2), (2, 5), (3, 4), (1, 10), (4, 30)])
def test_how_far_a_gradient_goes_back(window, back):
    """h at ``overlap`` steps before the window is constant, and nothing after it is."""
    model, (x, target) = Model(fastseq.LSTM(I, H, **F64)), stream()
    for part in tbptt(model, x, target, window=window, back=back):
        begin = max(part.start - (back - window), 0)
        with torch.no_grad():
            state = model(x[:begin])[1] if begin else None
        y, _ = model(x[begin : part.stop], state)
        expected = (y[part.start - begin :] - target[part.start : part.stop]).square().sum()
        loss = (part.output - part.targets).square().sum()
        close(gradients(model, loss), gradients(model, expected))


def test_all_the_way_back_is_the_whole_gradient():
    model, (x, _) = Model(fastseq.GRU(I, H, **F64)), stream()
    sums = [torch.zeros_like(p) for p in model.parameters()]
    for part in tbptt(model, x, window=3, back=12):
        for total, g in zip(sums, gradients(model, part.output.square().sum()), strict=True):
            total += g
    close(sums, list(gradients(model, model(x)[0].square().sum())))


def test_lengths_resets_and_batch_first():
    layer, (x, _) = fastseq.LSTM(I, H, batch_first=True, **F64), stream()
    x = x.transpose(0, 1)
    lengths, reset = torch.tensor([7, 0, 5]), torch.rand(B, 10) < 0.3
    y, state = layer(x, lengths=lengths, reset=reset)
    for back in (2, 5):
        windows = tbptt(
            layer, x, window=2, back=back, lengths=lengths, reset=reset, batch_first=True
        )
        parts = list(windows)
        assert len(parts) == len(windows) == 4  # up to the longest
        assert [part.lengths.tolist() for part in parts][2:] == [[2, 0, 1], [1, 0, 0]]
        close(torch.cat([part.output for part in parts], 1), y[:, :7])
        close(windows.state, state)


def test_a_state_goes_on_and_its_gradient_does_not():
    layer, (x, _) = fastseq.GRU(I, H, **F64), stream()
    h_0 = torch.randn(1, B, H, **F64, requires_grad=True)
    windows = tbptt(layer, x, window=5, state=h_0)
    for _ in range(2):  # each time from h_0 on
        first, second = (part.output for part in windows)
        assert torch.autograd.grad(first.sum(), h_0)[0].any()
        assert torch.autograd.grad(second.sum(), h_0, allow_unused=True) == (None,)
        close(windows.state, layer(x, h_0)[1].detach())
    first, second = (part.output for part in tbptt(layer, x, window=5, back=10, state=h_0))
    assert torch.autograd.grad(second.sum(), h_0)[0].any()
    carried = tbptt(layer, x, window=5, state=windows.state)
    close(next(iter(carried)).output, layer(x[:5], windows.state)[0])


def test_nests():
    """Of inputs, targets, outputs and states."""
    layer = fastseq.LSTM(I, H, **F64)

    def model(inputs, state):
        y, (h, c) = layer(inputs["a"] + inputs["b"][0], state and (state["h"], state["c"][0]))
        return {"y": y, "note": "kept"}, {"h": h, "c": [c, None]}

    x, target = stream()
    inputs = {"a": x, "b": (2 * x,)}
    for back in (4, 6):
        windows = tbptt(model, inputs, (target, [target]), window=4, back=back)
        parts = list(windows)
        close(torch.cat([part.output["y"] for part in parts]), layer(3 * x)[0])
        assert torch.equal(parts[1].targets[1][0], target[4:8])
        assert parts[1].output["note"] == "kept" and windows.state["c"][1] is None


def test_detach():
    a = torch.ones(2, requires_grad=True) * 2
    nest = {"a": (a, [a, None, 3]), "b": torch.ones(1)}
    found = detach(nest)
    assert found["a"][0].data_ptr() == a.data_ptr() and not found["a"][1][0].requires_grad
    assert found["a"][1][1:] == [None, 3] and a.requires_grad
    assert detach(None) is None and not detach(a).requires_grad


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"window": 0}, ValueError, "window: expected at least 1, got 0"),
        ({"window": 2.0}, TypeError, "window: expected an int, got float"),
        ({"back": 2}, ValueError, "back: expected at least window = 3, got 2"),
        ({"model": 3}, TypeError, "model: expected a module or function, got int"),
        ({"model": fastseq.GRU(I, H, bidirectional=True)}, ValueError, "model: a bidirectional"),
        ({"model": nn.GRU(I, H), "lengths": [1] * B}, TypeError, "lengths: torch.nn's GRU takes"),
        ({"inputs": "abc"}, TypeError, "inputs: expected a tensor, .* got str"),
        ({"inputs": torch.ones(0, B, I)}, ValueError, "inputs: .* got T = 0"),
        ({"targets": torch.ones(9, B)}, ValueError, "targets: expected T = 10 .* got 9"),
        ({"lengths": [11] * B}, ValueError, "lengths: .* T = 10"),
        ({"reset": torch.ones(10, B)}, TypeError, "reset: .* got torch.float32"),
        (
            {"reset": torch.ones(9, B).bool()},
            ValueError,
            r"reset: expected \(10, 3\), got \(9, 3\)",
        ),
        ({"batch_first": 1}, TypeError, "batch_first: expected a bool, got int"),
    ],
)
def test_what_tbptt_refuses(change, error, words):
    x, target = stream()
    given = {"model": fastseq.GRU(I, H), "inputs": x, "targets": target, "window": 3, **change}
    with pytest.raises(error, match=words):
        tbptt(given.pop("model"), given.pop("inputs"), given.pop("targets"), **given)


def test_a_model_without_a_state_is_told():
    x, _ = stream()
    with pytest.raises(
        TypeError, match=r"model: expected it to return \(output, state\), got Tensor"
    ):
        next(iter(tbptt(lambda x, state: x, x, window=3)))


# The vanishing-gradient regulariser

PHI = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}


def slow_term(w_hh, x, bias, phi, target, lengths, frozen=None):
    """Omega by Jacobians, one sequence and step at a time. frozen: whose states and gradients stand
    in the place of w_hh's own."""
    other = w_hh if frozen is None else frozen
    parts = []
    for b, s in enumerate(lengths.tolist()):
        hs = [torch.zeros(H, **F64)]
        for t in range(s):
            hs.append(phi(x[t, b] + bias + other @ hs[-1]))
        error = sum(((h - target[b]) ** 2).sum() for h in hs[1:]) + (3 * hs[-1]).sum()
        for t in range(1, s):
            (dh,) = torch.autograd.grad(error, hs[t + 1], create_graph=True)
            a = x[t, b] + bias + other @ hs[t]
            (slope,) = torch.autograd.grad(phi(a).sum(), a, create_graph=True)
            if frozen is not None:
                dh, slope = dh.detach(), slope.detach()
            if dh.any():
                parts.append(((dh @ (slope[:, None] * w_hh)).norm() / dh.norm() - 1) ** 2)
    return sum(parts) / len(lengths)


@pytest.mark.parametrize(
    "library, phi, lengths",
    [(nn, "tanh", None), *((fastseq, phi, some) for phi in PHI for some in (None, LENGTHS))],
)
def test_omega_and_its_gradients(library, phi, lengths):
    layer = library.RNN(I, H, nonlinearity=phi, **F64)
    x, target = torch.randn(T, B, I, **F64), torch.randn(B, H, **F64)
    own = torch.full((B,), T) if lengths is None else lengths
    given = {} if lengths is None else {"lengths": lengths}
    y, h_n = layer(x, **given)
    inside = (torch.arange(T)[:, None] < own)[..., None]
    error = (inside * (y - target) ** 2).sum() + (3 * h_n).sum()

    def term(full):
        return training.vanishing_gradient_regularizer(layer, (y, h_n), error, full=full, **given)

    w, z = layer.weight_hh_l0, x @ layer.weight_ih_l0.T + layer.bias_ih_l0
    for full in (False, True):
        expected = slow_term(
            w,
            z,
            layer.bias_hh_l0,
            PHI[phi],
            target,
            own,
            None if full else w.detach().clone().requires_grad_(),
        )
        close(term(full), expected)
        everything = list(layer.parameters()) if full else [w]
        found = torch.autograd.grad(term(full), everything, retain_graph=True)
        close(found, torch.autograd.grad(expected, everything, retain_graph=True))
    rest = [p for p in layer.parameters() if p is not w]
    assert not any(torch.autograd.grad(term(False), rest, allow_unused=True))
    error.backward()  # its graph is still there


def test_it_pulls_the_ratio_to_one():
    torch.manual_seed(0)
    layer = fastseq.RNN(I, 8, batch_first=True)
    x = torch.randn(4, 12, I)

    def ratio():
        norms = gradient_flow(layer, x, per_sequence=True)[0]
        return (norms[:-1] / norms[1:]).mean().item()

    before, terms = ratio(), []
    for _ in range(80):
        y, h_n = layer(x)
        term = training.vanishing_gradient_regularizer(layer, (y, h_n), h_n.sum())
        (dw,) = torch.autograd.grad(term, layer.weight_hh_l0)
        layer.weight_hh_l0.data -= 0.02 * dw
        terms.append(term.item())
    assert before < 0.6 and abs(ratio() - 1) < 0.1, (before, ratio())
    assert terms[-1] < terms[0] / 4


def test_where_no_gradient_arrives():
    """A loss of the first step alone, and a dead relu: no NaN."""
    layer = fastseq.RNN(I, H, nonlinearity="relu")
    layer.bias_hh_l0.data.fill_(-99.0)
    for full in (False, True):
        y, h_n = layer(torch.randn(T, B, I))
        for loss in (y[0].sum(), y.sum()):
            term = training.vanishing_gradient_regularizer(layer, (y, h_n), loss, full=full)
            (dw,) = torch.autograd.grad(term, layer.weight_hh_l0, retain_graph=True)
            assert term.isfinite() and not dw.any()


def test_what_the_regulariser_refuses():
    term = training.vanishing_gradient_regularizer
    layer, x = fastseq.RNN(I, H), torch.randn(T, B, I)
    y, h_n = layer(x)
    with pytest.raises(
        TypeError, match=r"layer: expected fastseq\.RNN or torch\.nn\.RNN, got LSTM"
    ):
        term(fastseq.LSTM(I, H), (y, h_n), y.sum())
    with pytest.raises(ValueError, match="layer: expected one layer of one direction"):
        term(fastseq.RNN(I, H, 2), (y, h_n), y.sum())
    with pytest.raises(ValueError, match=r"layer: with its zoneout .* layer\.fastseq\.zoneout = 0"):
        term(fastseq.RNN(I, H, zoneout=0.1), (y, h_n), y.sum())
    with pytest.raises(TypeError, match="outputs: expected the pair"):
        term(layer, y, y.sum())
    with pytest.raises(ValueError, match="loss: expected a tensor of one number"):
        term(layer, (y, h_n), y)
    with pytest.raises(ValueError, match="loss: it depends on neither"):
        term(layer, (y, h_n), layer(x)[0].sum())
    with pytest.raises(TypeError, match="full: expected a bool"):
        term(layer, (y, h_n), y.sum(), full=1)


def test_windows_are_cut_where_the_model_has_its_time():
    layer = fastseq.LSTM(4, 5, batch_first=True)
    x = torch.randn(6, 8, 4)
    with pytest.raises(ValueError, match="batch_first: expected the model's own, True, got False"):
        next(iter(tbptt(layer, x, window=3)))
    found = [window.output for window in tbptt(layer, x, window=3, batch_first=True)]
    torch.testing.assert_close(torch.cat(found, 1), layer(x)[0])
