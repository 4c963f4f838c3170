"""The demo and the example of a cell of one's own, with settings that take seconds."""

import pytest
import torch
from scripts import example


@pytest.fixture(scope="module")
def demo():
    return example("char_lm")


TINY = "--hidden 16 --batch 4 --bptt 8 --steps 13 --sample 40".split()


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_it_trains_both_and_says_so(demo, cell, tmp_path, capsys):
    demo.main([*TINY, "--cell", cell, "--layers", "2", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert "times as fast" in out
    assert "class " in out, "a page of text"
    picture = tmp_path / f"char_lm_{cell}.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in out.splitlines() if line.startswith(("torch.nn", "fastseq"))]
    assert [row[0] for row in rows][:2] == ["torch.nn", "fastseq"]
    losses = [float(row[3]) for row in rows[:2]]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_both_runs_do_the_same_steps_in_turn(demo, tmp_path, monkeypatch):
    order = []
    step = demo.train_step

    def noted(run, inputs, targets, fresh, clip):
        order.append(run.label)
        return step(run, inputs, targets, fresh, clip)

    monkeypatch.setattr(demo, "train_step", noted)
    monkeypatch.setattr(demo, "warm_up", lambda *_: None)
    demo.main([*TINY, "--out", str(tmp_path)])
    turn = demo.TURN
    assert order == (
        ["torch.nn"] * turn
        + ["fastseq"] * turn
        + ["torch.nn"] * (13 - turn)
        + ["fastseq"] * (13 - turn)
    )


def test_it_stops_when_its_time_is_up(demo, tmp_path, capsys):
    argv = [*TINY, "--steps", "1000", "--seconds", "0.001", "--out", str(tmp_path)]
    demo.main(argv)
    assert f"Stopped after {demo.TURN} of 1000 steps" in capsys.readouterr().out


def test_the_split_is_by_file(demo, tmp_path):
    for k in range(10):
        (tmp_path / f"m{k}.py").write_text(f"    # file {k}é\n")
    train, valid = demo.read_text(tmp_path)
    assert valid == "\t# file 9\n"
    assert train == "".join(f"\t# file {k}\n" for k in range(9))


def test_streams_and_windows(demo):
    text = "".join(demo.ALPHABET[k] for k in range(20))
    data = demo.streams(text, 2, 3)
    assert data[:, 0].tolist() == list(range(10)) and data[:, 1].tolist() == list(range(10, 20))
    batches = demo.common.windows(data, 3)
    inputs, targets, fresh = next(batches)
    assert fresh and torch.equal(inputs[1:], targets[:-1])
    seen = [next(batches)[2] for _ in range(3)]
    assert seen == [False, False, True], "the top again after the last whole window"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cell", "transformer"], "invalid choice"),
        (["--steps", "0"], "expected more than 0, got 0"),
        (["--lr", "-1"], "--lr: expected more than 0"),
    ],
)
def test_mistakes_on_the_command_line(demo, argv, message, capsys):
    with pytest.raises(SystemExit):
        demo.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--text", "/nowhere"], "/nowhere: expected a folder with .py files"),
        (["--batch", "1000000"], "too few for --batch 1000000"),
        (["--backend", "magic"], "--backend magic: backend: expected one of"),
    ],
)
def test_mistakes_found_on_the_way(demo, argv, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        demo.main([*TINY, *argv, "--out", str(tmp_path)])


def test_a_cell_of_ones_own_trains_beside_its_loop_and_a_gru(capsys, cells_go_again):
    module = example("own_cell")
    module.main("--hidden 16 --length 6 --batch 4 --steps 7".split())
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("own ", "GRU "))]
    assert [row[:-3] for row in rows] == [["own", "cell"], ["own", "loop"], ["GRU"]]
    losses = [float(row[-1]) for row in rows]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) != losses[2]
    assert "times as fast as the loop" in " ".join(out.split())
    with pytest.raises(SystemExit):
        module.main(["--steps", "0"])
    assert "expected more than 0, got 0" in capsys.readouterr().err
