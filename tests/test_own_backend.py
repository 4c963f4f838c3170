"""A backend in one file, this one: it is registered, named, asked, and run, with no other edit."""

import sys

import pytest
import torch
from problems import draw, gradients
from rules import same_bits

import fastseq
from fastseq.backends import choice, contract, imported, load, reference

NAME = "mine"
ABILITIES = contract.Abilities()
CALLS = []


def unavailable():
    return None


def supports(problem):
    return "mine multiplies no bfloat16" if problem.dtype is torch.bfloat16 else None


def saved_layout(call, rows, trajectory):
    return [((*rows, 1), torch.float64)]


def forward(call, save, trajectory):
    CALLS.append("forward")
    result = reference.forward(call, save, trajectory)
    if save:
        result.saved = [call.x.new_zeros((*call.x.shape[:-1], 1), dtype=torch.float64)]
    return result


def backward(call, result, grads, wanted):
    CALLS.append("backward")
    assert [(tuple(t.shape), t.dtype) for t in result.saved] == saved_layout(
        call, tuple(call.x.shape[:-1]), False
    )
    return reference.backward(call, result, grads, wanted)


@pytest.fixture
def registered():
    choice.register(NAME, "the reference once more", __name__)
    CALLS.clear()
    yield sys.modules[__name__]
    choice.unregister(NAME)


def test_it_stands_in_the_table(registered):
    table = fastseq.backends()
    assert table[NAME] == "available" and "the reference once more" in repr(table)
    assert load(NAME) is registered


@pytest.mark.parametrize("options", [{}, {"lengths": [2, 5, 0]}, {"reset": True, "h_mask": True}])
def test_it_runs_where_it_is_named(registered, options):
    case = draw("lstm", layers=2, directions=2, **options)
    ours, theirs = case.run(NAME, trajectory=True), case.run("reference", trajectory=True)
    assert CALLS == ["forward"] * 2
    found, expected = gradients(ours, case.leaves()), gradients(theirs, case.leaves())
    assert CALLS == ["forward"] * 2 + ["backward"] * 2
    for name, value in (theirs | expected).items():
        assert same_bits((ours | found)[name], value), name


def test_modules_take_it(registered, capsys):
    m = fastseq.GRU(4, 6, backend=("triton", NAME, "native"))
    x = torch.randn(5, 3, 4)
    assert fastseq.explain(m, x) == NAME
    m(x)[0].sum().backward()
    assert CALLS == ["forward", "backward"]
    fastseq.LSTMCell(4, 6, backend=NAME)(x[0])
    assert CALLS[2:] == ["forward"]


def test_it_explains_itself_where_it_runs(registered, monkeypatch, capsys):
    def explain(problem):
        return f"in tiles of {problem.H}\nmodelled: 3 us"

    monkeypatch.setattr(registered, "explain", explain, raising=False)
    m, x = fastseq.GRU(4, 6, backend=NAME), torch.randn(5, 3, 4)
    fastseq.explain(m, x)
    runs = f"  {NAME:<10} runs, layer by layer\n"
    assert f"{runs}{'':13}in tiles of 6\n{'':13}modelled: 3 us\n" in capsys.readouterr().out
    m.fastseq.backend = "eager"
    fastseq.explain(m, x)
    assert "in tiles" not in capsys.readouterr().out


def test_a_graph_holds_it(registered):
    m = fastseq.GRU(4, 6, backend=NAME)
    x = torch.randn(5, 3, 4)
    compiled = torch.compile(m, fullgraph=True, backend="aot_eager")
    y, _ = compiled(x)
    y.sum().backward()
    assert CALLS == ["forward", "backward"] and same_bits(y, m(x)[0])
    torch._dynamo.reset()


def test_vmap_calls_it(registered):
    """The members' sequences in one batch."""
    m = fastseq.GRU(4, 6, backend=NAME, dtype=torch.float64)
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    y = torch.func.vmap(lambda one: m(one)[0])(x)
    assert CALLS == ["forward"] and same_bits(y[1], m(x[1])[0])


def test_it_declines_in_its_own_words(registered):
    m = fastseq.GRU(4, 6, backend=NAME, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError) as caught:
        m(torch.randn(5, 3, 4, dtype=torch.bfloat16))
    assert str(caught.value) == (
        "backend='mine' cannot run this: mine: mine multiplies no bfloat16. "
        "backend=None always runs."
    )


@pytest.mark.parametrize(
    "change, words",
    [
        ({"ABILITIES": None}, "ABILITIES: expected contract.Abilities, got NoneType"),
        ({"backward": None}, "it has no function backward"),
        ({"saved_layout": 3}, "it has no function saved_layout"),
        (
            {"forward": lambda call, save: None},
            "forward takes (call, save), the contract asks for (call, save, trajectory)",
        ),
        (
            {"forward": lambda call, trajectory, save: None},
            "forward takes (call, trajectory, save), the contract asks for (call, save, ",
        ),
        ({"layers": lambda: None}, "it has no function stacks"),
        ({"layers_backward": lambda: None}, "layers_backward takes (), the contract asks for ("),
        ({"stream": lambda: None}, "it has no function streams"),
        ({"explain": "fast"}, "it has no function explain"),
        ({"explain": lambda: ""}, "explain takes (), the contract asks for (problem)"),
    ],
)
def test_what_the_contract_asks_is_checked_as_it_is_loaded(registered, monkeypatch, change, words):
    for name, value in change.items():
        monkeypatch.setattr(registered, name, value, raising=False)
    with pytest.raises(TypeError) as caught:
        imported(NAME)
    assert str(caught.value).startswith(f"backend 'mine' ({__name__}): {words}")


@pytest.mark.parametrize(
    "ability, change, words",
    [
        ("zoneout", {"zoneout": (0.1,)}, "its loop hands the states on by itself"),
        ("deterministic", {"deterministic": True}, "its bits may depend on the batch"),
        ("input_product", {"input_product": True}, "it makes the input product itself"),
        ("heads", {"heads": 4}, "it takes one matrix w_hh, not 4 blocks on its diagonal"),
    ],
)
def test_what_it_cannot_is_declined_for_it(registered, monkeypatch, ability, change, words):
    task = contract.Problem("gru", torch.float32, "cpu", 5, 3, 4, 6, 6)._replace(**change)
    assert choice.reason_against(NAME, task).startswith(words)
    can = contract.Abilities()._replace(**{ability: True})
    monkeypatch.setattr(registered, "ABILITIES", can)
    assert choice.reason_against(NAME, task) is None
    others = [name for name in ("native", "numba", "torch") if not isinstance(load(name), str)]
    if ability in ("input_product", "heads"):
        assert all(choice.reason_against(n, task).startswith(words) for n in (*others, "eager"))


def test_a_name_is_taken_once(registered):
    with pytest.raises(ValueError, match="name: there is a backend 'mine' already"):
        choice.register(NAME, "", __name__)


def test_what_cannot_be_imported_is_a_reason():
    choice.register("gone", "", "fastseq_of_nowhere", "pip install it")
    try:
        reason = "not available: No module named 'fastseq_of_nowhere'; pip install it"
        assert fastseq.backends()["gone"] == reason
    finally:
        choice.unregister("gone")
