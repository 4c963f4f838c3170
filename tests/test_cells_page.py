"""docs/cells.md is what the declarations and the backends say, and its example runs."""

# ruff: noqa: F821  (the free names of a text are bound by each backend)
import re
import runpy

import pytest
from torch import nn

import fastseq
from bench import cells
from fastseq.cells import CELLS, Cell, Phase

TEXT = cells.PAGE.read_text()
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_page_is_what_is_written_again():
    try:
        again = cells.page()
    except cells.Missing as missing:
        pytest.skip(str(missing))
    assert again + cells.by_hand(TEXT) == TEXT, "python -m bench.cells --write"


#: Modules that are no layer of one cell.
ABOVE = {
    "Attention",
    "AttentionDecoder",
    "CRF",
    "ChildSumTreeLSTM",
    "Decoder",
    "Encoder",
    "MemoryHops",
    "NaryTreeLSTM",
    "Pooling",
    "RecursiveNetwork",
    "SequenceAutoencoder",
    "Stacked",
}


def test_every_cell_has_its_public_names():
    """And every public module is a cell's."""
    assert cells.PUBLIC.keys() == {cell.name for cell in cells.library()}
    named = {name for public in cells.COMPOSED for name in (public.layer, public.cell)}
    for name, public in cells.PUBLIC.items():
        if public is not None:
            assert cells.module(public)._fastseq_cell == name
            assert cells.module(public, "cell")._fastseq_cell == name
            assert callable(getattr(fastseq, public.function))
            named |= {public.layer, public.cell}
    classes = {n for n in fastseq.__all__ if isinstance(getattr(fastseq, n), type)}
    named |= ABOVE
    assert named == {n for n in classes if issubclass(getattr(fastseq, n), nn.Module)}


def lines(text):
    """The equations of a text in LaTeX, without what lays them out."""
    return [re.sub(r"\s|&|\\\\$", "", line) for line in text.splitlines() if "&=" in line]


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_the_equations_are_those_of_the_docstrings(name):
    """But for the GRU's last, which the docstring has in the form of the paper."""
    found = lines(cells.equations(CELLS[name]))
    expected = lines(getattr(fastseq, name.upper()).__doc__)
    assert len(found) == len(expected) > 3
    assert found[:-1] == expected[:-1]
    assert (found == expected) == (name == "lstm")


def made_up_forward(a_f, x_n, s_n, w_c, alpha, h_prev, tanh_c_prev):
    f = sigmoid(a_f)
    tanh_c = (f - h_prev) * (x_n - (f - s_n)) - (f + alpha * tanh_c_prev)
    h = f - w_c * tanh_c + relu(h_prev)
    return h, tanh_c, f


def test_sums_and_products_hold_together():
    phase = Phase(forward=made_up_forward, returns=("h", "tanh_c", "f"))
    options = {"unit_parameters": ("w_c", "alpha"), "source": "made up for this test"}
    cell = Cell("made_up", ("f", "n"), ("h", "tanh_c"), ("f", "h"), (phase,), **options)
    assert lines(cells.equations(cell)) == [
        r"f_t=\sigma(W_{if}x_t+b_{if}+W_{hf}h_{t-1}+b_{hf})",
        r"\mathit{tanh}_{c,t}=(f_t-h_{t-1})\odot(W_{in}x_t+b_{in}-(f_t-(W_{hn}h_{t-1}+b_{hn})))"
        r"-(f_t+\alpha\odot\mathit{tanh}_{c,t-1})",
        r"h_t=f_t-w_c\odot\mathit{tanh}_{c,t}+\mathrm{relu}(h_{t-1})",
    ]


def test_the_cell_of_ones_own_runs(tmp_path):
    """In the page's order, as one program; in a file, since its texts are read."""
    program = tmp_path / "own_cell.py"
    program.write_text("\n".join(BLOCK.findall(TEXT)))
    runpy.run_path(str(program))
    assert "qrnn" not in CELLS


def test_another_answer_is_seen(monkeypatch):
    from fastseq.backends import choice

    before = choice.declines
    monkeypatch.setattr(
        choice,
        "declines",
        lambda module, problem: "it is late" if problem.reset else before(module, problem),
    )
    try:
        table = cells.table()
    except cells.Missing as missing:
        pytest.skip(str(missing))
    assert "| `reset=` | no | no |" in table and "it is late" in table
