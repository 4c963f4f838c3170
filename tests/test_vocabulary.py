"""The words of the reference and of the eager form: at their ends, and beside torch's derivatives.
Those of the kernels have tests of their own, in ULP."""

import numpy as np
import pytest
import torch
from vocabulary import ENDS, F32, F64, PAIRS, TRUTH, held_at_the_ends

from fastseq import reference
from fastseq.backends import eager
from fastseq.cells import WORDS
from fastseq.cells.check import MEANING
from fastseq.cells.derive import SLOPES
from fastseq.cells.text import count_of


def by_reference(name, *given):
    with np.errstate(all="ignore"):
        return reference.VOCABULARY[name](*given)


def by_eager(name, *given):
    return eager.VOCABULARY[name](*map(torch.from_numpy, given)).numpy()


def test_every_vocabulary_has_every_word():
    for words in (reference.VOCABULARY, eager.VOCABULARY, MEANING):
        assert set(words) == set(WORDS)
    assert {word for word in WORDS if count_of(word) == 2} == set(PAIRS)
    assert set(SLOPES) == {word for word in WORDS if word[0] != "d"}


@pytest.mark.parametrize("apply, dtype", [(by_reference, F64), (by_eager, F32), (by_eager, F64)])
@pytest.mark.parametrize("name", [*ENDS, *PAIRS])
def test_ends(name, apply, dtype):
    held_at_the_ends(apply, name, dtype)


@pytest.mark.parametrize("apply", [by_reference, by_eager])
@pytest.mark.parametrize("name", sorted(set(WORDS) & set(TRUTH)))
def test_values(name, apply):
    positive = name in ("sqrt", "dsqrt")
    x = np.linspace(0.1 if positive else -8, -0.1 if name == "dlogsigmoid" else 8, 99)
    with np.errstate(all="ignore"):
        truth = TRUTH[name](x.astype(np.longdouble)).astype(F64)
    np.testing.assert_allclose(apply(name, x), truth, rtol=4e-15)


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_are_torchs(name):
    """Of the eager words, those of equal arguments and of NaN included."""
    a = torch.tensor([0.3, 0.7, 1.2, 1.2, float("nan")], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.5, 0.2, 1.2, 4.0, 1.0], dtype=torch.float64, requires_grad=True)
    given = (a, b)[: count_of(name)]
    y = eager.VOCABULARY[name](*given)
    expected = torch.autograd.grad(y.sum(), given)
    for slope, value in zip(SLOPES[name], expected, strict=True):
        made = eval(
            slope.format(a="a", b="b", y="y"), dict(eager.VOCABULARY), {"a": a, "b": b, "y": y}
        )
        torch.testing.assert_close(made, value, rtol=1e-14, atol=0, equal_nan=True)
