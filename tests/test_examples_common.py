"""What the examples share, and the tool that runs them and writes their page."""

import sys
from pathlib import Path

import pytest
import torch
from scripts import example
from torch import nn

import fastseq

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def common():
    return example("common")


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """tools/examples.py, whose files go into a folder of the test."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    monkeypatch.delitem(sys.modules, "examples", raising=False)
    import examples

    monkeypatch.delitem(sys.modules, "examples")
    monkeypatch.setattr(examples, "ROOT", tmp_path)
    monkeypatch.setattr(examples, "PAGE", tmp_path / "docs" / "examples.md")
    monkeypatch.setattr(examples, "PICTURES", tmp_path / "docs" / "examples")
    (tmp_path / "docs").mkdir()
    (tmp_path / "examples").mkdir()
    return examples


class Reader(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


def squares(model, x):
    return model(x).square().mean()


def parse(common, argv):
    parser = common.parser("What it shows.\n\nMore.", seconds=60.0)
    parser.add_argument("--hidden", type=common.positive, default=256)
    return common.parse(parser, argv, {"hidden": 32, "seconds": 9.0})


def test_short_replaces_the_defaults_but_not_what_is_named(common):
    assert parse(common, []).hidden == 256
    options = parse(common, ["--seconds", "5", "--short"])
    assert (options.hidden, options.seconds) == (32, 5.0)


def test_the_seed_is_set(common):
    parse(common, ["--seed", "7"])
    drawn = torch.rand(3)
    parse(common, ["--seed", "7"])
    assert torch.equal(drawn, torch.rand(3))


@pytest.mark.parametrize("argv", [["--seconds", "0"], ["--seconds", "nan"], ["--threads", "0"]])
def test_wrong_numbers_are_refused(common, argv, capsys):
    with pytest.raises(SystemExit):
        parse(common, argv)
    assert "expected more than 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_told_at_once(common, tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit, match=r"--out .*file: expected a folder to write to"):
        parse(common, ["--out", str(file)])
    parse(common, ["--out", str(tmp_path / "new" / "folder")])
    assert (tmp_path / "new" / "folder").is_dir()


def test_a_wrong_backend_is_named(common):
    with pytest.raises(SystemExit, match="--backend magic: backend: expected one of torch, native"):
        parse(common, ["--backend", "magic"])


def test_every_tenth_is_held_out(common):
    train, held_out = common.split(range(25))
    assert held_out == [9, 19] and sorted([*train, *held_out]) == list(range(25))


def test_the_standard_library_is_read(common):
    top, whole = common.modules(), common.modules(packages=True)
    assert set(top) < set(whole) and len(top) > 100
    assert not [path for path in whole if "test" in path.parts or "site-packages" in path.parts]
    few = common.modules(files=12)
    assert len(few) == 12 and set(few) < set(top) and few == sorted(few)
    assert any(kind == "function" for _, kind, _ in common.docstrings(Path(common.__file__)))


def test_docstrings_and_tokens_of_a_file(common, tmp_path):
    path = tmp_path / "m.py"
    path.write_text('"""M."""\nclass A:\n    """A\'s."""\n    async def f(self): "F\\d."\nx = 1\n')
    assert common.docstrings(path) == [
        ("", "module", "M."),
        ("A", "class", "A's."),
        ("A.f", "function", "F\\d."),
    ]
    assert [token.string for token in common.tokens(path)][-5:-2] == ["x", "=", "1"]


def test_wrong_files_end_in_one_line(common, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:\n    '''")
    for ask, message in [
        (lambda: common.modules(tmp_path / "no"), "there is no such folder"),
        (lambda: common.modules(tmp_path), "expected at least 10 .py files, got 1"),
        (lambda: common.read(tmp_path / "no.txt"), "No such file"),
        (lambda: common.docstrings(broken), "broken.py: not this Python's syntax"),
        (lambda: common.tokens(broken), "broken.py: not this Python's syntax"),
        (lambda: common.columns(torch.arange(9), 3, 3), "the text has 9 items, too few for"),
    ]:
        with pytest.raises(SystemExit, match=message) as stopped:
            ask()
        assert "\n" not in str(stopped.value)


def test_training_ends_with_the_steps_or_the_seconds(common, capsys):
    def batches():
        while True:
            yield torch.randn(4, 2, 3)

    model = Reader(fastseq.GRU(3, 5))
    seen = []
    done = common.train("g", model, squares, batches(), steps=30, seconds=60, after=seen.append)
    assert seen == list(range(1, 31)) and len(done.losses) == len(done.seconds) == 30
    assert done.losses[-1] < done.losses[0] and done.mean(2) == pytest.approx(
        sum(done.losses[-2:]) / 2
    )
    assert not capsys.readouterr().out
    done = common.train("g", model, squares, batches(), steps=30, seconds=1e-9)
    assert len(done.losses) == 1 and "g: stopped after 1 of 30 steps" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="the loss is nan; try a smaller learning rate"):
        common.train("g", model, squares, [torch.full((4, 2, 3), torch.nan)], steps=3, seconds=9)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_ragged_is_the_same_for_both_libraries(common, kind, first):
    ours = getattr(fastseq, kind)(3, 4, bidirectional=True, batch_first=first)
    theirs = common.with_torch(Reader(ours)).layer
    assert type(theirs) is getattr(nn, kind)
    x, lengths = torch.randn(*((4, 7) if first else (7, 4)), 3), torch.tensor([2, 5, 1, 5])
    (y, state), (y_torch, state_torch) = (common.ragged(m, x, lengths) for m in (ours, theirs))
    torch.testing.assert_close(y, y_torch)
    torch.testing.assert_close(state, state_torch)


def test_speed_takes_turns_and_leaves_the_model_alone(common):
    model = Reader(fastseq.LSTM(3, 4, num_layers=2, dropout=0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    turns = []

    def loss(model, x):
        turns.append(type(model.layer).__module__.split(".")[0])
        return squares(model, x)

    found = common.speed(model, loss, [torch.randn(5, 2, 3)], rounds=4, seconds=60)
    assert found.rounds == 4 and found.ratio == found.torch_ms / found.fastseq_ms
    assert turns == ["fastseq", "torch", "torch", "fastseq"] * 3
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "medians of 4 steps each" in str(found) and found.row("x")[0] == "x"


def test_speed_of_what_is_not_the_same_is_refused(common):
    model = Reader(fastseq.GRU(3, 4))
    x = [torch.randn(5, 2, 3)]
    with pytest.raises(ValueError, match="not the same model"):
        common.speed(model, squares, x, theirs=Reader(nn.GRU(3, 4)))
    with pytest.raises(ValueError, match=r"expected layers that torch\.nn has as well"):
        common.speed(Reader(fastseq.MGU(3, 4)), squares, x)


def test_a_table_and_a_running_mean(common):
    text = common.table(("a", "bb"), [("long", 1), ("x",)])
    assert text.splitlines() == ["a     bb", "long   1", "x"]
    assert common.running_mean([1, 2, 6, 4], 2) == [1, 1.5, 4, 5]


SCRIPT = '''"""Show ``x``.

Paper: nobody.

    python examples/{name}.py --more
"""
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
(out / "one.png").write_bytes(b"{name}")
print("## no heading\\nPicture: one.png\\n{name} learned 7")
'''


def test_the_page_is_written_and_kept(tool, monkeypatch, capsys):
    for name in ("a", "b"):
        (tool.ROOT / "examples" / f"{name}.py").write_text(SCRIPT.format(name=name))
    monkeypatch.setattr(sys, "argv", ["examples.py", "--write"])
    assert tool.main() == 0
    assert "s: b learned 7" in capsys.readouterr().out
    page = tool.PAGE.read_text()
    assert list(tool.sections(page)) == ["a", "b"]
    part = tool.sections(page)["a"]
    assert part.startswith(
        "## a\n\nShow `x`.\n\nPaper: nobody.\n\n```sh\npython examples/a.py --short"
    )
    assert "```\n## no heading\na learned 7\n```\n\n![a](examples/a_one.png)" in part
    assert (tool.PICTURES / "a_one.png").read_bytes() == b"a"

    (tool.ROOT / "examples" / "a.py").write_text(SCRIPT.format(name="a").replace("7", "8"))
    monkeypatch.setattr(sys, "argv", ["examples.py", "--write", "--only", "a"])
    assert tool.main() == 0
    again = tool.sections(tool.PAGE.read_text())
    assert again["b"] == tool.sections(page)["b"] and "a learned 8" in again["a"]

    (tool.ROOT / "examples" / "b.py").write_text("raise SystemExit('b.py: no')")
    monkeypatch.setattr(sys, "argv", ["examples.py", "--write"])
    assert tool.main() == 1
    assert "failed: b" in capsys.readouterr().err
    assert "a learned 8" in tool.PAGE.read_text(), "a page is written when all ran"
