"""The parts of examples/toys.py: problems, baselines, initial values, how far a cell goes."""

import argparse
import math

import pytest
import torch
from scripts import example
from torch import nn

toys = example("toys")


def sample(name, T, B, seed=0):
    return toys.TASKS[name].sample(T, B, torch.Generator().manual_seed(seed))


def answer(name, x):
    """The target by a plain loop over one sequence (T, I)."""
    if name == "adding":
        return sum(value for value, mark in x.tolist() if mark)
    if name == "parity":
        ones, found = 0, []
        for _, one in x.tolist():
            ones += one
            found.append(ones % 2)
        return found
    if name == "sign":
        return sum(x[:, 0].double().tolist()) > 0
    if name == "compare":
        halves = [[value for value, half in x.double().tolist() if half == k] for k in (0, 1)]
        first, second = (sum(half) / len(half) for half in halves)
        return second > first
    symbols = x.argmax(-1).tolist()
    return [toys.SYMBOLS] * (len(symbols) - toys.COPIED) + symbols[: toys.COPIED]


@pytest.mark.parametrize("name", toys.TASKS)
@pytest.mark.parametrize("T", [2, 7, 20])
def test_targets_are_what_a_plain_loop_finds(name, T):
    x, target = sample(name, T, 6)
    assert x.shape[1:] == (6, toys.TASKS[name].inputs)
    for k in range(6):
        wanted = torch.tensor(answer(name, x[:, k]), dtype=target.dtype)
        torch.testing.assert_close(target[..., k], wanted)


def test_one_mark_in_each_half():
    x, _ = sample("adding", 9, 50)
    assert (x[:4, :, 1].sum(0) == 1).all() and (x[4:, :, 1].sum(0) == 1).all()
    assert x[:, :, 1].sum(1).min() > 0, "at any place"


def test_copying_waits_and_is_told_when_to_write():
    x, target = sample("copying", 5, 3)
    symbols = x.argmax(-1)
    assert symbols.shape == target.shape == (25, 3)
    assert (symbols[10:14] == toys.SYMBOLS).all() and (symbols[15:] == toys.SYMBOLS).all()
    assert (symbols[14] == toys.SYMBOLS + 1).all(), "the sign, ten steps before the end"


@pytest.mark.parametrize("name", toys.TASKS)
def test_the_baseline_is_the_loss_of_an_answer_without_looking(name):
    x, target = sample(name, 20, 4000)
    task = toys.TASKS[name]
    if name == "adding":
        given = torch.ones(4000, 1)
    elif name == "copying":
        given = torch.full((40, 4000, 9), -math.inf)
        given[:30, :, toys.SYMBOLS] = 0.0
        given[30:, :, : toys.SYMBOLS] = 0.0
    else:
        given = torch.zeros(*target.shape, 2)
    found = toys.loss(lambda _: given, (x, target)).item()
    assert found == pytest.approx(task.baseline(20), rel=0.05)
    if task.outputs == 2:
        assert target.float().mean() == pytest.approx(0.5, abs=0.03), "no label is the better guess"


def options(**changed):
    given = {"hidden": 6, "seed": 0, "backend": None, "lengths": [2, 4, 8], "batch": 3}
    return argparse.Namespace(**given | changed)


@pytest.mark.parametrize("cell", toys.CELLS)
def test_each_cell_begins_as_its_literature_says(cell):
    task = toys.TASKS["adding"]
    layer = toys.model_of(task, cell, 50, options()).layer
    plain = toys.model_of(task, cell, 50, options(), initial=False).layer
    assert type(layer) is type(plain)
    w_hh = layer.weight_hh_l0.detach()
    if cell == "Elman":
        torch.testing.assert_close(w_hh @ w_hh.T, torch.eye(6))
    elif cell == "IRNN":
        assert layer.nonlinearity == "relu" and torch.equal(w_hh, torch.eye(6))
        assert layer.weight_ih_l0.abs().max() < 0.01
    elif cell == "IndRNN":
        assert 0 <= w_hh.min() and w_hh.max() <= 2 ** (1 / 50)
        last = layer.weight_hh_l1
        assert 0.5 ** (1 / 50) <= last.min() and last.max() <= 2 ** (1 / 50)
    else:
        assert torch.equal(w_hh, plain.weight_hh_l0), "chrono's are biases"
        assert layer.bias_ih_l0.abs().max() > 1 > plain.bias_ih_l0.abs().max()
        assert layer.bias_ih_l0.abs().max() < math.log(49) + 1e-4


def test_a_cell_goes_on_as_far_as_it_learns(monkeypatch):
    tried = []

    def trained(name, cell, T, seconds, _):
        tried.append((T, seconds))
        return toys.Run(name, cell, T, [10], [0.05 if T < 4 else 0.5], 2.0)

    monkeypatch.setattr(toys, "trained", trained)
    runs = toys.lengths_of("adding", "GRU", 10.0, options())
    assert tried == [(2, 10.0), (4, 8.0)], "each with the time that is left; nothing after a no"
    assert toys.farthest(runs, "adding", "GRU") == 2
    tried.clear()
    toys.lengths_of("adding", "GRU", -1.0, options())
    assert tried == [(2, -1.0)], "the shortest, so that there is something to show"
    assert toys.farthest(runs, "adding", "LSTM") == 0


def test_training_ends_when_the_loss_on_what_is_held_out_is_low(monkeypatch):
    losses = iter([1.0, 0.5, 0.05])

    def loss(model, batch):
        if torch.is_grad_enabled():
            return model.readout.weight.square().sum()
        return torch.tensor(next(losses) / 6)

    monkeypatch.setattr(toys, "loss", loss)
    given = options(steps=500, lr=0.01)
    run = toys.trained("adding", "GRU", 4, 1000.0, given)
    assert run.looks == [0, toys.LOOK, 2 * toys.LOOK] and run.verdict == "yes"
    assert run.losses == pytest.approx([1.0, 0.5, 0.05])


@pytest.mark.parametrize(("seconds", "verdict"), [(0.0, "cut"), (1000.0, "no")])
def test_a_cell_whose_time_was_up_is_not_said_to_have_failed(seconds, verdict):
    run = toys.trained("adding", "GRU", 4, seconds, options(steps=3, lr=1e-4))
    assert run.verdict == verdict


def test_the_gradient_goes_back_farther_with_the_literatures_values():
    given = options(tasks=["adding"], cells=["LSTM"], lengths=[30])
    with_theirs, with_torchs = (toys.flow(given, initial)["LSTM"] for initial in (True, False))
    assert with_theirs.max() == with_torchs.max() == 1
    assert with_theirs[0] > 100 * with_torchs[0]


def test_a_reader_answers_at_the_last_step_or_at_each():
    x = torch.randn(5, 2, 2)
    for name, shape in (("adding", (2, 1)), ("parity", (5, 2, 2))):
        model = toys.Reader(nn.GRU(2, 3), toys.TASKS[name])
        assert model(x).shape == shape
        torch.testing.assert_close(
            model(x)[-1] if name == "parity" else model(x), model.readout(model.layer(x)[0][-1])
        )


def test_mistakes_on_the_command_line(capsys):
    with pytest.raises(SystemExit):
        toys.main(["--lengths", "20", "1"])
    assert "--lengths: expected at least 2, got 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--backend torch, MGU: .* has no mgu"):
        toys.main(["--backend", "torch", "--cells", "GRU", "MGU"])
