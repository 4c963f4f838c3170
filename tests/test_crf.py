"""fastseq.CRF: pytorch-crf's names and numbers, and what torch's users do with a module."""

import copy
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from chains import brute, draw, every_path
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

import fastseq
from fastseq.backends import crf as rooms
from fastseq.backends.crf import Chain
from fastseq.ops import crf as ops

torchcrf = pytest.importorskip("torchcrf")
ROOMS = ("native", "numba", "eager")


def need(name):
    if isinstance(rooms.load(name), str):
        pytest.skip(rooms.load(name))


def pair(K, **options):
    """pytorch-crf's and ours with the same parameters, of some size."""
    theirs = torchcrf.CRF(K, batch_first=options.get("batch_first", False)).double()
    torch.manual_seed(K)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_()
    ours = fastseq.CRF(K, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def masked(T, B, K, batch_first=False):
    """Emissions, tags, and a mask whose first step is on, as pytorch-crf needs it."""
    chain, tags = draw(T, B, K, seed=T)
    n = chain.lengths.clamp_min(1)
    mask = torch.arange(T)[:, None] < n
    given = chain.emissions.nan_to_num(0.5), tags.clamp_min(0), mask
    return tuple(t.transpose(0, 1) for t in given) if batch_first else given


@pytest.mark.filterwarnings("ignore:where received a uint8 condition tensor")  # pytorch-crf's own
@pytest.mark.parametrize("backend", [None, *ROOMS])
@pytest.mark.parametrize("batch_first", [False, True])
def test_pytorch_crf_gives_the_same(backend, batch_first):
    if backend:
        need(backend)
    theirs, ours = pair(20, batch_first=batch_first, backend=backend)
    emissions, tags, mask = masked(50, 9, 20, batch_first)
    found = []
    for crf in (theirs, ours):
        e = emissions.clone().requires_grad_()
        values = [crf(e, tags, mask, reduction=r) for r in ("sum", "mean", "token_mean")]
        each = crf(e, tags, mask, reduction="none")
        crf(e, tags).backward()
        values[2].backward()
        gradients = [e.grad, *(p.grad for p in crf.parameters())]
        found.append([*values, each, crf(e, tags), *gradients])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    assert torch.equal(ours(emissions, tags, mask.to(torch.uint8)), ours(emissions, tags, mask))
    assert ours.decode(emissions, mask) == theirs.decode(emissions, mask)
    assert ours.decode(emissions) == theirs.decode(emissions)


def test_the_state_dict_and_the_first_values_are_pytorch_crfs():
    torch.manual_seed(3)
    theirs = torchcrf.CRF(5)
    torch.manual_seed(3)
    ours = fastseq.CRF(5)
    mine, other = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert repr(ours) == repr(theirs) == "CRF(num_tags=5)"
    assert list(fastseq.CRF(5, forbidden=[(0, 1)]).state_dict()) == list(other)


def test_a_call_that_names_no_backend_takes_the_first():
    assert rooms.select(torch.float32, "cpu", 20, None) == (
        "numba" if isinstance(rooms.load("native"), str) else "native"
    )
    assert rooms.select(torch.float32, "mps", 20, None) == "eager"


@pytest.mark.parametrize("backend", ROOMS)
def test_a_length_of_none(backend):
    need(backend)
    crf = fastseq.CRF(3, backend=backend)
    e, tags = torch.randn(4, 3, 3, requires_grad=True), torch.zeros(4, 3, dtype=torch.long)
    lengths = [4, 0, 2]
    values = crf(e, tags, lengths=lengths, reduction="none")
    assert values[1] == 0 and (values[[0, 2]] < 0).all()
    values.sum().backward()
    assert not e.grad[:, 1].any() and not e.grad[2:, 2].any() and e.grad[:2, 2].all()
    assert [len(row) for row in crf.decode(e, lengths=lengths)] == lengths
    assert crf.decode(e, lengths=lengths, n_best=2)[1] == [[]]
    mask = torch.arange(4)[:, None] < torch.tensor(lengths)
    assert torch.equal(crf(e, tags, mask, reduction="none"), values)
    assert crf.marginals(e, lengths=lengths).sum(2).sum(0).tolist() == pytest.approx(lengths)


def as_scores(chain):
    return [t.clone().requires_grad_() for t in (chain.emissions, *chain[2:])]


@pytest.mark.parametrize("backend", ROOMS)
@pytest.mark.parametrize("lengths", [False, True])
def test_derivatives_of_every_order(backend, lengths):
    need(backend)
    chain, tags = draw(4, 3, 3, lengths=lengths)
    chain = chain._replace(emissions=chain.emissions.nan_to_num(0.0))

    def value(*scores):
        given = Chain(scores[0], chain.lengths, *scores[1:])
        return ops.log_likelihood(given, tags, backend)

    def probabilities(*scores):
        given = Chain(scores[0], chain.lengths, *scores[1:])
        return ops.marginals(given, backend)

    scores = as_scores(chain)
    assert gradcheck(value, scores, check_batched_grad=True)
    assert gradgradcheck(value, scores, check_batched_grad=True)
    assert gradcheck(probabilities, scores)
    tangents = tuple(torch.randn_like(s) for s in scores)
    _, forward = jvp(value, tuple(s.detach() for s in scores), tangents)
    reverse = torch.autograd.grad(value(*scores), scores, torch.ones(3, dtype=torch.float64))
    total = sum((g * t).sum() for g, t in zip(reverse, tangents, strict=True))
    torch.testing.assert_close(forward.sum(), total)


def test_marginals_are_the_share_of_the_paths():
    chain, _ = draw(4, 3, 3)
    crf = fastseq.CRF(3, dtype=torch.float64)
    with torch.no_grad():
        for p, q in zip(crf.parameters(), chain[2:], strict=True):
            p.copy_(q)
    found = crf.marginals(chain.emissions, lengths=chain.lengths)
    expected = torch.zeros_like(found)
    for b, paths in enumerate(every_path(chain)):
        for path, score in paths:
            chance = (score - torch.stack([s for _, s in paths]).logsumexp(0)).exp()
            for t, tag in enumerate(path):
                expected[t, b, tag] += chance
    torch.testing.assert_close(found, expected)
    turned = fastseq.CRF(3, batch_first=True, dtype=torch.float64)
    turned.load_state_dict(crf.state_dict())
    again = turned.marginals(chain.emissions.transpose(0, 1), lengths=chain.lengths)
    assert torch.equal(again.transpose(0, 1), found)
    torch.testing.assert_close(
        crf.log_partition(chain.emissions, lengths=chain.lengths), brute(chain)
    )


@pytest.mark.parametrize("backend", ROOMS)
def test_vmap(backend):
    """Members with sequences of their own, with parameters of their own, and gradients of each."""
    need(backend)
    crf = fastseq.CRF(3, dtype=torch.float64, backend=backend)
    parameters = dict(crf.named_parameters())
    many = {k: torch.stack([p, 2 * p, -p]).detach() for k, p in parameters.items()}
    e = torch.randn(3, 5, 2, 3, dtype=torch.float64)
    tags = torch.randint(3, (3, 5, 2))

    def loss(parameters, e, tags):
        return functional_call(crf, parameters, (e, tags))

    for dims, own in (((None, 0, 0), False), ((0, 0, None), True)):
        given = many if own else parameters

        def one(k, own=own, given=given):
            chosen = {n: p[k] for n, p in given.items()} if own else given
            return chosen, e[k], tags[0] if own else tags[k]

        y = tags[0] if own else tags
        found = vmap(loss, in_dims=dims)(given, e, y)
        torch.testing.assert_close(found, torch.stack([loss(*one(k)) for k in range(3)]))
        for argument in (0, 1):
            gradients = vmap(grad(loss, argument), in_dims=dims)(given, e, y)
            each = [grad(loss, argument)(*one(k)) for k in range(3)]
            if argument:
                torch.testing.assert_close(gradients, torch.stack(each))
            for name in () if argument else gradients:
                torch.testing.assert_close(gradients[name], torch.stack([g[name] for g in each]))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_compiled_without_a_break(backend):
    crf = fastseq.CRF(4, backend=backend)
    e, tags = torch.randn(6, 3, 4, requires_grad=True), torch.randint(4, (6, 3))
    mask = torch.arange(6)[:, None] < torch.tensor([6, 2, 4])
    torch._dynamo.reset()
    compiled = torch.compile(crf, fullgraph=True, backend="aot_eager")
    found = []
    for run in (crf, compiled):
        value = run(e, tags, mask, reduction="mean")
        found.append([value, *torch.autograd.grad(value, [e, *crf.parameters()])])
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want)
    best = torch.compile(crf.viterbi, fullgraph=True, backend="aot_eager")(e, mask, n_best=2)
    for got, want in zip(best, crf.viterbi(e, mask, n_best=2), strict=True):
        torch.testing.assert_close(got, want)
    hole = mask.clone()
    hole[1, 0] = False
    if backend is None:  # in the graph an operator looks at values
        with pytest.raises(ValueError, match="mask: "):
            compiled(e, tags, hole, reduction="mean")
        with pytest.raises(IndexError, match="tags: "):
            compiled(e, tags + 4, mask, reduction="mean")


@pytest.mark.parametrize("lengths", [False, True])
def test_opcheck(lengths):
    """Not test_autograd_registration: the operators have no autograd formula on purpose."""
    chain, tags = draw(4, 3, 3, lengths=lengths)
    backend = rooms.select(torch.float64, "cpu", 3, None)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    operators, scores = torch.ops.fastseq, (backend, *chain)
    for given in (tags, None):
        args = (*scores, given, True)  # what is kept beyond the lengths is no number
        found = checks[:2] if lengths else checks
        torch.library.opcheck(operators.crf.default, args, test_utils=found)
        value, u = operators.crf(*args)
        args = (*scores, given, u, value, given is None)
        torch.library.opcheck(operators.crf_backward.default, args, test_utils=checks)
    torch.library.opcheck(operators.crf_viterbi.default, (*scores, 2), test_utils=checks)
    mask = torch.arange(4)[:, None] < torch.tensor([4, 0, 2])
    torch.library.opcheck(operators.crf_lengths.default, (mask,), test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_computed_in_float32(dtype):
    crf = fastseq.CRF(5, dtype=dtype)
    e, tags = torch.randn(7, 3, 5).to(dtype).requires_grad_(), torch.randint(5, (7, 3))
    wide = copy.deepcopy(crf).float()
    value = crf(e, tags)
    assert value.dtype is torch.float32 and torch.equal(value, wide(e.float(), tags))
    value.backward()
    assert e.grad.dtype is dtype and crf.transitions.grad.dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide(e.bfloat16(), tags), wide(e.bfloat16().float(), tags))
    assert crf.decode(e) == wide.decode(e.float())


@pytest.mark.parametrize("backend", ROOMS)
def test_what_is_forbidden_has_no_part(backend):
    need(backend)
    pairs = [("start", 1), (0, 2), (2, 2), (2, "end")]
    crf = fastseq.CRF(3, forbidden=pairs, backend=backend, dtype=torch.float64)
    plain = fastseq.CRF(3, backend="eager", dtype=torch.float64)
    plain.load_state_dict(crf.state_dict())
    e = torch.randn(5, 6, 3, dtype=torch.float64) * 3
    with torch.no_grad():
        plain.start_transitions[1] = plain.transitions[0, 2] = -torch.inf
        plain.transitions[2, 2] = plain.end_transitions[2] = -torch.inf
    torch.testing.assert_close(crf.log_partition(e), plain.log_partition(e))
    for path in crf.decode(e):
        moves = ["start", *path, "end"]
        assert not {*pairs} & {*pairwise(moves)}
    crf.log_partition(e).sum().backward()
    assert crf.transitions.grad[0, 2] == 0 and crf.transitions.grad.isfinite().all()
    tags = torch.zeros(5, 6, dtype=torch.long)
    tags[1] = 2
    assert (crf(e, tags, reduction="none") == -torch.inf).all()
    # which leaves no path of one step
    longer = fastseq.CRF(2, forbidden=[("start", 0), (1, "end"), (0, 1)], backend=backend)
    assert longer.decode(torch.zeros(1, 1, 2)) == [[]]
    assert longer.decode(torch.zeros(1, 1, 2), n_best=2) == [[]]
    assert longer.decode(torch.zeros(2, 1, 2)) == [[1, 0]]


@pytest.mark.parametrize("backend", ROOMS)
def test_nan_is_decoded_to_as_many_tags_as_there_are_steps(backend):
    need(backend)
    crf, e = fastseq.CRF(3, backend=backend), torch.zeros(4, 3, 3)
    e[:, 0] = e[1, 1, 2] = torch.nan
    lengths = [4, 2, 3]
    found = crf.decode(e, lengths=lengths)
    assert found[:2] == [[0] * 4, [0] * 2] and len(found[2]) == 3
    several = crf.decode(e, lengths=lengths, n_best=2)
    assert several[:2] == [[[0] * 4], [[0] * 2]] and len(several[2]) == 2
    assert crf.viterbi(e, lengths=lengths)[0].isnan().tolist() == [[True], [True], [False]]


def test_a_scheme_forbids_what_breaks_a_span():
    labels = ["O", "B-P", "I-P", "B-L", "I-L"]
    assert set(fastseq.CRF.forbidden_by(labels)) == {
        ("start", 2), ("start", 4), (0, 2), (0, 4), (1, 4), (2, 4), (3, 2), (4, 2),
    }  # fmt: skip
    found = set(fastseq.CRF.forbidden_by(["O", "B-P", "I-P", "L-P", "U-P"], "BILOU"))
    allowed = {
        *((0, j) for j in (0, 1, 4)), *((i, j) for i in (1, 2) for j in (2, 3)),
        *((i, j) for i in (3, 4) for j in (0, 1, 4)),
        *(("start", j) for j in (0, 1, 4)), *((i, "end") for i in (0, 3, 4)),
    }  # fmt: skip
    every = {(i, j) for i in (*range(5), "start") for j in (*range(5), "end")} - {("start", "end")}
    assert found == every - allowed
    with pytest.raises(ValueError, match="'X-P'"):
        fastseq.CRF.forbidden_by(["O", "X-P"])
    with pytest.raises(ValueError, match="'BIO2'"):
        fastseq.CRF.forbidden_by(labels, "BIO2")


def test_n_best_of_a_module():
    _, crf = pair(3)
    e = torch.randn(4, 2, 3, dtype=torch.float64)
    best = crf.decode(e, n_best=4)
    assert [len(rows) for rows in best] == [4, 4]
    assert [rows[0] for rows in best] == crf.decode(e)
    values = [crf(e[:, [b]], torch.tensor(row)[:, None]) for b in range(2) for row in best[b]]
    expected = crf.viterbi(e, n_best=4)[0] - crf.log_partition(e)[:, None]
    torch.testing.assert_close(torch.stack(values), expected.flatten())


def test_copies_and_pickles():
    crf = fastseq.CRF(3, batch_first=True, forbidden=[(0, 1)])
    e, tags = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.long)
    for other in (copy.deepcopy(crf), pickle.loads(pickle.dumps(crf))):
        assert torch.equal(other(e, tags), crf(e, tags))


E, TAGS = torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.long)
HOLE = torch.tensor([[1, 1], [0, 1], [1, 1], [0, 0]], dtype=torch.bool)


def bad(tag):
    tags = TAGS.clone()
    tags[2, 1] = tag
    return tags


MISTAKES = {
    "emissions must have dimension of 3, got 2": (ValueError, lambda c: c(E[0], TAGS)),
    "expected last dimension of emissions is 3, got 2": (
        ValueError,
        lambda c: c(E[..., :2], TAGS),
    ),
    "emissions and tags must match, got (4, 2) and (3, 2)": (
        ValueError,
        lambda c: c(E, TAGS[:3]),
    ),
    "emissions and mask must match": (ValueError, lambda c: c(E, TAGS, HOLE[:2])),
    "invalid reduction: max": (ValueError, lambda c: c(E, TAGS, None, "max")),
    "sequence 0 is off at step 1 and on at step 2": (ValueError, lambda c: c(E, TAGS, HOLE)),
    "sequence 0 is off at step 1": (ValueError, lambda c: c.decode(E, HOLE)),
    "give one of the two": (ValueError, lambda c: c(E, TAGS, HOLE, lengths=[1, 2])),
    "lengths: expected values from 0 to T = 4, got 1 to 5": (
        ValueError,
        lambda c: c(E, TAGS, lengths=[1, 5]),
    ),
    "lengths: ": (ValueError, lambda c: c.decode(E, lengths=[1, 2, 3])),
    "tags: expected 0 to 2, got 3 at step 2 of sequence 1": (
        IndexError,
        lambda c: c(E, bad(3)),
    ),
    "tags: expected 0 to 2, got -1 at step 2 of sequence 1": (
        IndexError,
        lambda c: c(E, bad(-1)),
    ),
    "tags: expected integers, got torch.float32": (TypeError, lambda c: c(E, TAGS.float())),
    "mask: expected integers, got torch.float32": (
        TypeError,
        lambda c: c(E, TAGS, HOLE.float()),
    ),
    "floating-point scores, got torch.int64": (TypeError, lambda c: c(E.long(), TAGS)),
    "emissions at meta and transitions at cpu": (
        RuntimeError,
        lambda c: c(E.to("meta"), TAGS),
    ),
    "tags: expected the device of emissions, cpu, got meta": (
        RuntimeError,
        lambda c: c(E, TAGS.to("meta")),
    ),
    "n_best: expected at least 1, got 0": (ValueError, lambda c: c.decode(E, n_best=0)),
    "n_best: expected an int, got float": (TypeError, lambda c: c.viterbi(E, n_best=1.5)),
    "forbidden: expected some path": (
        ValueError,  # 0 begins, goes nowhere, and does not end
        lambda _: fastseq.CRF(2, forbidden=[("start", 1), (0, 0), (0, 1), (0, "end")]),
    ),
    "invalid number of tags: 0": (ValueError, lambda _: fastseq.CRF(0)),
    "invalid number of tags: 2.5": (ValueError, lambda _: fastseq.CRF(2.5)),
    "emissions: expected a tensor, got ndarray": (TypeError, lambda c: c(E.numpy(), TAGS)),
    "mask: expected a tensor, got list": (TypeError, lambda c: c(E, TAGS, HOLE.tolist())),
    "backend: expected one of native": (ValueError, lambda _: fastseq.CRF(3, backend="cuda")),
    "got (0, 3)": (ValueError, lambda _: fastseq.CRF(3, forbidden=[(0, 3)])),
    "got ('start', 'end')": (
        ValueError,
        lambda _: fastseq.CRF(3, forbidden=[("start", "end")]),
    ),
    "got 'ab'": (ValueError, lambda _: fastseq.CRF(3, forbidden=["ab"])),
}


@pytest.mark.parametrize("words", MISTAKES)
@pytest.mark.parametrize("backend", [None, "numba", "eager"])
def test_a_mistake_is_told(words, backend):
    if backend:
        need(backend)
    error, call = MISTAKES[words]
    crf = fastseq.CRF(3, backend=backend)
    with pytest.raises(error) as caught:
        call(crf)
    assert words in str(caught.value)


def test_numpy_counts_the_tags_as_well():
    crf = fastseq.CRF(np.int64(3))
    assert type(crf.num_tags) is int and crf.transitions.shape == (3, 3)
    e = torch.randn(4, 2, 3)
    assert crf.decode(e, n_best=np.int64(2)) == crf.decode(e, n_best=2)


def test_tags_beyond_a_length_may_be_anything():
    crf = fastseq.CRF(3)
    assert torch.equal(crf(E, bad(-100), lengths=[4, 2]), crf(E, TAGS, lengths=[4, 2]))
