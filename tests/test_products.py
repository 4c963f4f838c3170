"""Products outside of a loop over time: our own kernel's numbers are torch's."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastseq.backends import products
from fastseq.backends.products import product

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-13}


@pytest.fixture
def own(monkeypatch):
    """Every product is our own; how many there were."""
    kernel = products._own()
    if kernel is None:
        pytest.skip("numba is not installed")
    calls = []

    def spied(*args):
        calls.append(args)
        return kernel(*args)

    monkeypatch.setattr(products, "LEAST", 0)
    monkeypatch.setattr(products, "_own", lambda: spied)
    return calls


def matrix(rows, columns, dtype, transposed):
    return (
        torch.randn(columns, rows, dtype=dtype).t()
        if transposed
        else torch.randn(rows, columns, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("forms", ["nn", "nt", "tn", "tt"])
@pytest.mark.parametrize(  # the first is shared by threads
    "rows, inner, columns", [(300, 200, 150), (9, 700, 5), (3, 4, 5), (8, 0, 3)]
)
def test_the_numbers_are_those_of_torch(own, rows, inner, columns, forms, add, dtype, threads):
    threads(2)
    a = matrix(rows, inner, dtype, forms[0] == "t")
    b = matrix(inner, columns, dtype, forms[1] == "t")
    wide = torch.randn(rows, columns + 3, dtype=dtype)  # out is a part of its rows
    before, out = wide.clone(), wide[:, 2 : 2 + columns]
    expected = a.double() @ b.double() + (out.double() if add else 0)
    assert product(a, b, out, add) is out and len(own) == 1
    scale = max(1.0, inner) ** 0.5
    assert (out.double() - expected).abs().max() < TOLERANCE[dtype] * scale
    assert torch.equal(wide[:, :2], before[:, :2])
    assert torch.equal(wide[:, 2 + columns :], before[:, 2 + columns :])


def test_what_the_kernel_does_not_take_is_left_to_torch(own):
    a, b = torch.randn(20, 10), torch.randn(10, 12)
    negative = torch._neg_view(a)
    assert torch.equal(product(negative, b), -a @ b)
    assert torch.equal(product(a.bfloat16(), b.bfloat16()), a.bfloat16() @ b.bfloat16())
    assert product(a.to("meta"), b.to("meta")).shape == (20, 12)
    with FlopCounterMode(display=False) as counter:
        product(a, b)
    assert counter.get_total_flops() == 2 * 20 * 10 * 12
    assert not own


def test_a_small_product_is_left_to_torch(own, monkeypatch):
    a, b = torch.randn(20, 10), torch.randn(10, 12)
    monkeypatch.setattr(products, "LEAST", 2 * 20 * 10 * 12 + 1)
    assert torch.equal(product(a, b), a @ b) and not own
    monkeypatch.setattr(products, "LEAST", 2 * 20 * 10 * 12)
    assert torch.allclose(product(a, b), a @ b, atol=1e-5) and own


def test_without_the_kernel_torch_serves(own, monkeypatch):
    monkeypatch.setattr(products, "_own", lambda: None)
    a, b = torch.randn(20, 10), torch.randn(10, 12)
    assert torch.equal(product(a, b), a @ b)
    out = torch.ones(20, 12)
    assert torch.allclose(product(a, b, out, add=True), a @ b + 1, atol=1e-5)
