"""docs/recipes.md and the pages of parts: every block runs, and where torch.nn can run it, both
give the same numbers. docs/own-cell.md: all blocks run, in the page's order."""

import re
import runpy
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parent.parent / "docs"
OWN_CELL = (DOCS / "own-cell.md").read_text()
#: heading or block, in the page's order. "later" marks one that fails until its subject is there.
PARTS = re.compile(r"^###? ([^\n]+)$|^```python( later)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CLASS = re.compile(r"\bfastseq\.((?:LSTM|GRU|RNN)(?:Cell)?)\b")
#: What torch.nn lacks, does not do right, or draws other random numbers for.
ALONE = re.compile(
    r"\b(lengths|reset|weight_dropout|zoneout|memory|learn_state)=|\bvmap\(|register_parametriz"
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded, use of fork:DeprecationWarning",
    "ignore:.torch.jit.freeze. is deprecated:DeprecationWarning",
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:torch.quantize_per_tensor.*deprecated:UserWarning",
)


def recipes(page):
    heading, found, k = "", [], 0
    for match in PARTS.finditer((DOCS / page).read_text()):
        if match[1]:
            heading, k = match[1], 0
        else:
            later = pytest.mark.xfail(reason="its subject is not there yet") if match[2] else ()
            found.append(pytest.param(match[3], id=f"{heading} {k}", marks=later))
            k += 1
    return found


def of_torch(code):
    """The same block on torch.nn; None where it needs what fastseq alone has."""
    theirs = CLASS.sub(r"torch.nn.\1", code.replace("import fastseq\n", ""))
    return None if "fastseq" in theirs or ALONE.search(theirs) else theirs


def run(code, folder):
    """From a file, since TorchScript reads the source. What the block leaves behind."""
    path = folder / "recipe.py"
    path.write_text(code)
    torch.manual_seed(0)
    return {k: v for k, v in runpy.run_path(str(path)).items() if not k.startswith("__")}


def numbers(value):
    """The tensors in what a block leaves behind, gradients of parameters too."""
    if isinstance(value, torch.Tensor):
        return [value, value.grad] if value.is_leaf and value.grad is not None else [value]
    if isinstance(value, torch.nn.Module):
        return [t for p in value.parameters() for t in numbers(p)]
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in numbers(part)]
    return [t for part in value.values() for t in numbers(part)] if type(value) is dict else []


#: Pages of a part of the library each.
PAGES = (
    "crf.md",
    "pooling.md",
    "stacks.md",
    "training.md",
)
RECIPES = recipes("recipes.md")
EVERY = RECIPES + [one for page in PAGES for one in recipes(page)]
PAIRS = [one for one in EVERY if of_torch(one.values[0]) and not one.marks]


@pytest.mark.parametrize("code", [one for one in EVERY if one not in PAIRS])
def test_a_recipe_runs(code, tmp_path):
    run(code, tmp_path)


@pytest.mark.parametrize("code", PAIRS)
def test_a_recipe_gives_torchs_numbers(code, tmp_path):
    ours, theirs = run(code, tmp_path), run(of_torch(code), tmp_path)
    assert ours.keys() - theirs.keys() == {"fastseq"}
    compared = 0
    bounds = {"rtol": 0.05, "atol": 0.05} if "bfloat16" in code else {"rtol": 1e-4, "atol": 1e-5}
    for name, value in theirs.items():
        for mine, their in zip(numbers(ours[name]), numbers(value), strict=True):
            torch.testing.assert_close(mine, their, **bounds)
            compared += 1
    assert compared


def test_wrong_numbers_are_seen(tmp_path):
    """Of a step that is too long on the one side."""
    (code,) = (p.values[0] for p in PAIRS if p.id == "Truncated backpropagation 0")
    wrong = code.replace("lr=0.1", "lr=0.1 if 'torch' in type(layer).__module__ else 0.2")
    assert wrong != code
    test_a_recipe_gives_torchs_numbers(code, tmp_path)
    with pytest.raises(AssertionError, match="not close"):
        test_a_recipe_gives_torchs_numbers(wrong, tmp_path)


def test_the_page_of_ones_own_cell_runs(tmp_path, cells_go_again):
    """As one program."""
    found = run("\n".join(match[3] for match in PARTS.finditer(OWN_CELL) if match[3]), tmp_path)
    assert {"MinimalGated", "Peephole"} <= set(found)


def test_many_recipes_are_held_against_torch():
    assert len([one for one in RECIPES if one in PAIRS]) > len(RECIPES) / 2
    assert all(recipes(page) for page in PAGES)
