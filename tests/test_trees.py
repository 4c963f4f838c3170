"""Tree-structured networks beside a recursion from node to node, written from the papers."""

import copy
import io
import itertools
import pickle
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, jvp, vmap

from fastseq.backends import products
from fastseq.nn.trees import ChildSumTreeLSTM, NaryTreeLSTM, RecursiveNetwork
from fastseq.ops.tree_walks import KINDS as WALKS
from fastseq.ops.tree_walks import tree_recurrence
from fastseq.ops.trees import Trees

H, I = 4, 3  # noqa: E741  (the field's letters)
KINDS = {
    "child-sum": ChildSumTreeLSTM,
    "binary": NaryTreeLSTM,
    "ternary": lambda *a, **k: NaryTreeLSTM(*a, arity=3, **k),
    "recursive": RecursiveNetwork,
    "recursive relu": lambda *a, **k: RecursiveNetwork(*a, nonlinearity="relu", arity=3, **k),
}
#: Children come before their parent and behind it, leaves stand at several depths, one tree is a
#: single node, one a chain.
BINARY = [[-1, 0, 0, 1, 1], [-1], [1, 4, 1, 4, -1], [1, 2, 3, -1], [-1, 0, 0, 1, 3, 3, 1]]
TERNARY = [*BINARY, [-1, 0, 0, 0, 2, 2, 2, 1]]
ANY = [*TERNARY, [-1, 0, 0, 0, 0, 0, 3]]
SHAPES = dict(zip(KINDS, (ANY, BINARY, TERNARY, BINARY, TERNARY), strict=True))


def children_of(parents):
    return [[k for k, p in enumerate(parents) if p == node] for node in range(len(parents))]


def make(kind, **options):
    return KINDS[kind](I, H, dtype=torch.float64, **options)


def block(matrix, row, column=0):
    return matrix[row * H : (row + 1) * H, column * H : (column + 1) * H]


def child_sum_node(net, x, states):
    """Equations 2 to 8 of Tai et al. 2015."""
    W = dict(zip("ifuo", net.weight_ih.split(H), strict=True))
    U = dict(zip("ifuo", net.weight_hh.split(H), strict=True))
    b = dict(zip("ifuo", [0] * 4 if net.bias is None else net.bias.split(H), strict=True))
    h_sum = sum((h for h, _ in states), torch.zeros(H, dtype=x.dtype))
    i, u, o = (W[q] @ x + U[q] @ h_sum + b[q] for q in "iuo")
    c = torch.sigmoid(i) * torch.tanh(u)
    for h_k, c_k in states:
        c = c + torch.sigmoid(W["f"] @ x + U["f"] @ h_k + b["f"]) * c_k
    return torch.sigmoid(o) * torch.tanh(c), c


def nary_node(net, x, states):
    """Equations 9 to 14 of Tai et al. 2015."""
    N = net.arity
    W = dict(zip("ifuo", net.weight_ih.split(H), strict=True))
    b = dict(zip("ifuo", [0] * 4 if net.bias is None else net.bias.split(H), strict=True))

    def product(row):
        return sum(block(net.weight_hh, row, k) @ h for k, (h, _) in enumerate(states))

    i = torch.sigmoid(W["i"] @ x + product(0) + b["i"])
    u = torch.tanh(W["u"] @ x + product(N + 1) + b["u"])
    o = torch.sigmoid(W["o"] @ x + product(N + 2) + b["o"])
    c = i * u
    for k, (_, c_k) in enumerate(states):
        c = c + torch.sigmoid(W["f"] @ x + product(1 + k) + b["f"]) * c_k
    return o * torch.tanh(c), c


def recursive_node(net, x, states):
    a = net.weight_ih @ x + (0 if net.bias is None else net.bias)
    for k, (h,) in enumerate(states):
        a = a + block(net.weight_hh, 0, k) @ h
    return (torch.relu(a) if net.nonlinearity == "relu" else torch.tanh(a),)


NODES = {
    "child-sum": child_sum_node,
    "binary": nary_node,
    "ternary": nary_node,
    "recursive": recursive_node,
    "recursive relu": recursive_node,
}


def recursion(kind, net, x, parents, leaves_only=False):
    """All states, node by node; of each state (N, H)."""
    found, rows = [], iter(x)
    for tree in parents:
        children = children_of(tree)
        own = [next(rows) if not leaves_only or not c else x.new_zeros(I) for c in children]

        def state(node, own=own, children=children):
            return NODES[kind](net, own[node], [state(k, own, children) for k in children[node]])

        found += [state(node) for node in range(len(tree))]
    return [torch.stack(s) for s in zip(*found, strict=True)]


def outputs(net, x, trees):
    """h, h_n, c_n; and h, h_n of a recursive network."""
    h, roots = net(x, trees)
    return (h, *roots) if isinstance(roots, tuple) else (h, roots)


def expected(kind, net, x, parents, leaves_only=False):
    states = recursion(kind, net, x, parents, leaves_only)
    starts = itertools.accumulate((len(tree) for tree in parents), initial=0)
    roots = [start + tree.index(-1) for start, tree in zip(starts, parents, strict=False)]
    return (states[0], *(s[roots] for s in states))


def differences(found, theirs, leaves):
    """The greatest of outputs and gradients."""
    weights = [torch.randn_like(y) for y in theirs]
    ours = torch.autograd.grad(found, leaves, weights, allow_unused=True)
    plain = torch.autograd.grad(theirs, leaves, weights, allow_unused=True)
    pairs = [*zip(found, theirs, strict=True), *zip(ours, plain, strict=True)]
    return max(
        float((0 if a is None else a.detach()).sub(0 if b is None else b.detach()).abs().max())
        for a, b in pairs
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("leaves_only", [False, True], ids=["all nodes", "leaves only"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_as_node_by_node(kind, leaves_only, bias):
    parents, net = SHAPES[kind], make(kind, bias=bias)
    trees = Trees.from_parents(parents)
    rows = trees.num_leaves if leaves_only else trees.num_nodes
    x = torch.randn(rows, I, dtype=torch.float64, requires_grad=True)
    found = outputs(net, x, trees)
    theirs = expected(kind, net, x, parents, leaves_only)
    assert differences(found, theirs, [x, *net.parameters()]) < 1e-12


@pytest.mark.parametrize("leaves_only", [False, True], ids=["all nodes", "leaves only"])
@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind, leaves_only):
    net, trees = make(kind), Trees.from_parents([[-1, 0, 0, 1], [-1]])
    rows = trees.num_leaves if leaves_only else trees.num_nodes
    x = torch.randn(rows, I, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in net.named_parameters()]

    def function(x, *values):
        return functional_call(net, dict(zip(names, values, strict=True)), (x, trees))[0]

    leaves = (x, *(p.detach().requires_grad_() for p in net.parameters()))
    assert gradcheck(function, leaves, fast_mode=True)
    assert gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_every_derivative(kind):
    net, trees = make(kind), Trees.from_parents(BINARY[:3])
    x = torch.randn(trees.num_nodes, I, dtype=torch.float64, requires_grad=True)

    names = [name for name, _ in net.named_parameters()]

    def function(x, *values):
        h, roots = functional_call(net, dict(zip(names, values, strict=True)), (x, trees))
        return (h, *roots) if isinstance(roots, tuple) else (h, roots)

    leaves = (x, *(p.detach().requires_grad_() for p in net.parameters()))
    assert gradcheck(function, leaves, check_batched_grad=True, check_forward_ad=True)
    assert gradgradcheck(function, leaves)


@pytest.mark.parametrize("kind", ["child-sum", "binary", "recursive"])
def test_transforms(kind):
    net, trees = make(kind), Trees.from_parents(BINARY)
    x, v = torch.randn(2, 3, trees.num_nodes, I, dtype=torch.float64)
    together = vmap(lambda x: net(x, trees)[0])(x)
    assert torch.allclose(together, torch.stack([net(one, trees)[0] for one in x]))
    step = 1e-6
    _, tangent = jvp(lambda x: net(x, trees)[0], (x[0],), (v[0],))
    ahead, behind = (net(x[0] + s * v[0], trees)[0] for s in (step, -step))
    assert torch.allclose(tangent, (ahead - behind) / (2 * step), atol=1e-8)


def test_a_gradient_of_one_output_alone():
    """Neither h nor c, and each by itself."""
    net, trees = make("child-sum"), Trees.from_parents(ANY)
    x = torch.randn(trees.num_nodes, I, dtype=torch.float64, requires_grad=True)
    theirs = expected("child-sum", net, x, ANY)
    for k in range(3):
        (ours,) = torch.autograd.grad(outputs(net, x, trees)[k].sum(), x)
        (plain,) = torch.autograd.grad(theirs[k].sum(), x, retain_graph=True)
        assert torch.allclose(ours, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["child-sum", "binary", "recursive"])
@pytest.mark.parametrize("leaves_only", [False, True], ids=["all nodes", "leaves only"])
def test_with_our_own_products(kind, leaves_only, monkeypatch):
    """As in networks large enough for them."""
    monkeypatch.setattr(products, "LEAST", 0)
    trees = Trees.from_parents(BINARY * 5)
    net = KINDS[kind](19, 21, dtype=torch.float64)
    rows = trees.num_leaves if leaves_only else trees.num_nodes
    x = torch.randn(rows, 19, dtype=torch.float64, requires_grad=True)
    weights = net.weight_ih, net.weight_hh, net.bias
    plain = WALKS[net._fastseq_kind].equations(trees, x, *weights)
    walked = tree_recurrence(net._fastseq_kind, trees, x, *weights)
    assert differences(walked, plain, [x, *weights]) < 1e-12


def test_backward_twice_gives_the_same_bits():
    net, trees = make("binary"), Trees.from_parents(BINARY)
    x = torch.randn(trees.num_nodes, I, dtype=torch.float64, requires_grad=True)
    y = net(x, trees)[0].square().sum()
    first = torch.autograd.grad(y, [x, *net.parameters()], retain_graph=True)
    again = torch.autograd.grad(y, [x, *net.parameters()])
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("kind", ["child-sum", "unary"])
def test_a_chain_is_an_lstm(kind):
    T = 7
    net = make(kind) if kind in KINDS else NaryTreeLSTM(I, H, arity=1, dtype=torch.float64)
    lstm = nn.LSTM(I, H, dtype=torch.float64)
    with torch.no_grad():
        net.weight_ih.copy_(lstm.weight_ih_l0)
        net.weight_hh.copy_(lstm.weight_hh_l0)
        net.bias.copy_(lstm.bias_ih_l0 + lstm.bias_hh_l0)
    x = torch.randn(T, I, dtype=torch.float64)
    h, (h_n, c_n) = net(x, Trees.from_parents([[*range(1, T), -1]]))
    y, (h_T, c_T) = lstm(x)
    for ours, theirs in ((h, y), (h_n, h_T), (c_n, c_T)):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["child-sum", "binary", "recursive"])
def test_a_chain_of_more_than_a_thousand(kind):
    """Deeper than Python lets a recursion go."""
    T = 1500
    trees = Trees.from_parents([[*range(1, T), -1]])
    net = make(kind)
    x = torch.randn(T, I, dtype=torch.float64, requires_grad=True)
    h, _ = net(x, trees)
    h[-1].sum().backward()
    assert trees.height == T - 1 and h.shape == (T, H)
    assert x.grad[-1].abs().min() > 0 and x.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_no_trees_and_single_nodes(kind):
    net = make(kind)
    for parents in ([], [[-1]], [[-1]] * 3):
        x = torch.randn(len(parents), I, dtype=torch.float64, requires_grad=True)
        found = outputs(net, x, Trees.from_parents(parents))
        assert all(y.shape == (len(parents), H) for y in found)
        (dx, *_) = torch.autograd.grad(found[0].sum(), [x, *net.parameters()])
        assert dx.shape == x.shape
        if parents:
            theirs = expected(kind, net, x, parents)
            assert differences(outputs(net, x, Trees.from_parents(parents)), theirs, [x]) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_nodes_in_another_order(kind):
    parents, net = SHAPES[kind], make(kind)
    orders = [torch.randperm(len(tree)).tolist() for tree in parents]
    moved = []  # as lists of children, which keep the order of siblings
    for tree, order in zip(parents, orders, strict=True):
        place = {old: new for new, old in enumerate(order)}
        children = children_of(tree)
        moved.append([[place[k] for k in children[old]] for old in order])
    starts = [0, *itertools.accumulate(map(len, parents))]
    rows = [s + k for s, order in zip(starts, orders, strict=False) for k in order]
    x = torch.randn(starts[-1], I, dtype=torch.float64)
    h, h_n = outputs(net, x, Trees.from_parents(parents))[:2]
    again, again_n = outputs(net, x[rows], Trees.from_children(moved))[:2]
    assert torch.allclose(again, h[rows], rtol=0, atol=1e-12)
    assert torch.allclose(again_n, h_n, rtol=0, atol=1e-12)
    assert not torch.allclose(again, h)


def test_trees_do_not_see_one_another():
    net, trees = make("child-sum"), Trees.from_parents(ANY)
    x = torch.randn(trees.num_nodes, I, dtype=torch.float64)
    h, _ = net(x, trees)
    alone = [
        net(part, Trees.from_parents([tree]))[0]
        for tree, part in zip(ANY, x.split(trees.counts), strict=True)
    ]
    assert torch.allclose(torch.cat(alone), h, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["child-sum", "binary", "recursive"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(kind, dtype):
    net, trees = make(kind), Trees.from_parents(BINARY)
    x = torch.randn(trees.num_nodes, I, dtype=torch.float64)
    h, _ = net(x, trees)
    small = copy.deepcopy(net).to(dtype)
    found, _ = small(x.to(dtype).requires_grad_(), trees)
    found.sum().backward()
    bound = 1e-6 if dtype is torch.float32 else 0.05
    assert found.dtype is dtype and (found.double() - h).abs().max() < bound
    assert all(p.grad.isfinite().all() for p in small.parameters())


def test_autocast_leaves_states_as_they_are():
    net, trees = ChildSumTreeLSTM(I, H), Trees.from_parents(BINARY)
    x = torch.randn(trees.num_nodes, I)
    with torch.autocast("cpu", torch.bfloat16):
        h, _ = net(x.bfloat16(), trees)
    assert h.dtype is torch.float32
    assert torch.equal(h, net(x.bfloat16().float(), trees)[0])


@pytest.mark.parametrize("kind", ["child-sum", "binary", "recursive"])
def test_saved_and_copied(kind):
    net, trees = make(kind), Trees.from_parents(BINARY)
    x = torch.randn(trees.num_nodes, I, dtype=torch.float64)
    h, _ = net(x, trees)
    other = make(kind)
    other.load_state_dict(net.state_dict())
    file = io.BytesIO()
    torch.save(trees, file)
    file.seek(0)
    read = torch.load(file, weights_only=False)
    for again, with_trees in (
        (other, pickle.loads(pickle.dumps(trees))),
        (copy.deepcopy(net), copy.deepcopy(trees)),
        (pickle.loads(pickle.dumps(net)), read),
    ):
        assert torch.equal(again(x, with_trees)[0], h)


# torch's own guards ask every tensor between two graphs for its .grad
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor")
def test_compiled():
    """The graph breaks, and further batches of trees compile nothing."""
    net = ChildSumTreeLSTM(I, H)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def model(x, trees):
        h, (h_n, _) = net(x * 2, trees)
        return h + 1, h_n + 1

    for parents in (ANY, BINARY, BINARY[::-1], ANY[:3]):
        trees = Trees.from_parents(parents)
        x = torch.randn(trees.num_nodes, I)
        h, (h_n, _) = net(x * 2, trees)
        for found, plain in zip(model(x, trees), (h + 1, h_n + 1), strict=True):
            assert torch.allclose(found, plain)
    # before the network and behind it, of one size and of any
    assert len(graphs) <= 4


def test_what_trees_say():
    trees = Trees.from_parents([[1, -1, 1], [-1], [1, 2, -1]])
    assert len(trees) == 3 and trees.counts == [3, 1, 3]
    assert (trees.num_nodes, trees.num_leaves, trees.height, trees.arity) == (7, 4, 2, 2)
    assert trees.roots.tolist() == [1, 3, 6] and trees.leaves.tolist() == [0, 2, 3, 4]
    assert repr(trees) == "Trees(3 trees, 7 nodes, 4 leaves, height=2, arity=2)"
    one = Trees.from_parents([[-1]])
    assert repr(one) == "Trees(1 tree, 1 node, 1 leaf, height=0, arity=0)"
    assert trees.to("cpu") is trees
    moved = trees.to("meta")
    assert moved.device.type == "meta" and moved.levels[0].children.is_meta
    assert trees.device.type == "cpu" and moved.counts == trees.counts


@pytest.mark.parametrize("as_given", [list, tuple, np.array, torch.tensor])
def test_the_forms_of_parents_and_children(as_given):
    parents = [as_given(tree) for tree in ANY]
    by_parents = Trees.from_parents(parents)
    children = [[as_given(c) if c else [] for c in children_of(tree)] for tree in ANY]
    by_children = Trees.from_children(children)
    for name, tensor in by_parents._tensors.items():
        assert torch.equal(tensor, by_children._tensors[name]), name


def test_rows_of_the_order():
    """Inner nodes by depth, then leaves by depth; children of a level are all of the next depth."""
    trees = Trees.from_parents(ANY)
    depths = []
    for tree in ANY:
        for node in range(len(tree)):
            up = [node]
            while tree[up[-1]] >= 0:
                up.append(tree[up[-1]])
            depths.append(len(up) - 1)
    depth = [depths[k] for k in trees.tensor("order").tolist()]
    n = trees.num_inner
    assert depth[:n] == sorted(depth[:n]) and depth[n:] == sorted(depth[n:])
    for d, level in enumerate(trees.levels):
        assert {depth[k] for k in range(level.first, level.last)} == {d}
        assert {depth[k] for k in level.children.tolist()} == {d + 1}
        first, last = level.leaves
        assert [k for k in range(n, len(depth)) if depth[k] == d + 1] == [
            *range(n + first, n + last)
        ]
    assert sum(len(level.children) for level in trees.levels) == trees.num_nodes - len(trees)


def test_nested_and_brackets():
    trees, leaves = Trees.from_nested([(("the", "cat"), "sat"), "yes", ["a", ("b", "c", "d")]])
    same = Trees.from_parents([[-1, 0, 1, 1, 0], [-1], [-1, 0, 0, 2, 2, 2]])
    assert leaves == ["the", "cat", "sat", "yes", "a", "b", "c", "d"]
    assert torch.equal(trees.tensor("order"), same.tensor("order"))
    text = "(3 (2 It) (4 (4 's) (3 good)))", "(0 no)", "( (S (NP x) (VP y)))"
    trees, labels, words = Trees.from_brackets(text)
    assert labels == ["3", "2", "4", "4", "3", "0", "", "S", "NP", "VP"]
    assert words == ["It", "'s", "good", "no", "x", "y"]
    assert trees.counts == [5, 1, 4] and [labels[k] for k in trees.leaves] == [
        *("2", "4", "3", "0", "NP", "VP")
    ]


def test_a_list_that_holds_itself_is_refused():
    itself = ["a"]
    itself.append(("b", itself))
    with pytest.raises(ValueError, match=r"nested\[1\]: node 2 holds itself"):
        Trees.from_nested([("a", "b"), ("x", itself)])
    twice = ["a", "b"]  # which is no cycle
    assert Trees.from_nested([(twice, twice)])[0].num_nodes == 7


def test_deep_brackets():
    deep = "(1 " * 5000 + "x" + ")" * 5000
    assert Trees.from_brackets([deep]).trees.height == 4999
    nested = "x"
    for _ in range(5000):
        nested = (nested,)
    assert Trees.from_nested([nested])[0].height == 5000


WRONG = {
    "parents[1]: expected one node at least, got none": ("parents", [[-1], []]),
    "parents[0]: expected one root, whose parent is -1, got none": ("parents", [[0]]),
    "parents[1]: expected one root, whose parent is -1, got nodes 0, 2; give each tree": (
        "parents",
        [[-1], [-1, 0, -1]],
    ),
    "parents[1]: node 1 is its own ancestor, by a cycle of parents: 1, 3, 2, 1": (
        "parents",
        [[-1], [-1, 3, 1, 2, 1]],
    ),
    "parents[1][2]: expected a node of the tree, 0 to 2, or -1 for the root, got 3": (
        "parents",
        [[-1], [-1, 0, 3]],
    ),
    "parents[0][1]: expected a node of the tree, 0 to 1, or -1 for the root, got -2": (
        "parents",
        [[-1, -2]],
    ),
    "children[1]: expected one node at least, got none": ("children", [[[]], []]),
    "children[0]: expected one root, a node that is nobody's child, got none": (
        "children",
        [[[0]]],
    ),
    "children[1]: expected one root, a node that is nobody's child, got nodes 0, 1": (
        "children",
        [[[]], [[], []]],
    ),
    "children[1]: node 2 has several parents, nodes 0, 1": ("children", [[[]], [[2, 1], [2], []]]),
    "children[0]: node 1 has several parents, nodes 0, 0": ("children", [[[1, 1], []]]),
    "children[1]: node 1 is its own ancestor, by a cycle of parents: 1, 2, 1": (
        "children",
        [[[]], [[], [2], [1]]],
    ),
    "children[1][0]: expected nodes of the tree, 0 to 1, got 2": ("children", [[[]], [[2], []]]),
    "nested[1]: node 1 is an empty tuple": ("nested", ["a", ((), "b")]),
    "texts[1]: expected a tree, got none": ("brackets", ["(1 x)", " "]),
    "texts[0]: brackets that are not closed: 1": ("brackets", ["(1 (2 x)"]),
    "texts[0]: expected a bracket that opens, got ')' at character 5": ("brackets", ["(1 x))"]),
    "texts[0]: expected one tree, got another at character 6": ("brackets", ["(1 x) (2 y)"]),
    "texts[0]: a node with neither a word nor children ends at character 2": (
        "brackets",
        ["(1)"],
    ),
    "texts[0]: expected a bracket, got the word 'y' at character 5": ("brackets", ["(1 x y)"]),
    "texts[0]: a child of a node that has a word at character 5": ("brackets", ["(1 x (2 y))"]),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_trees_are_refused(message):
    form, given = WRONG[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(Trees, f"from_{form}")(given)


@pytest.mark.parametrize(
    "form, given, message",
    [
        ("parents", [[-1, 0.5]], "parents[0]: expected integers, got 0.5"),
        ("parents", [[-1, 0], [-1, False]], "parents[1]: expected integers, got False"),
        ("parents", [[-1, np.False_]], "parents[0]: expected integers, got "),
        ("children", [[[True], []]], "children[0][0]: expected integers, got True"),
        ("parents", [[-1], [-1, "0"]], "parents[1]: expected integers, got '0'"),
        ("parents", [-1], "parents[0]: expected a sequence of integers, got int"),
        ("parents", ["ab"], "parents[0]: expected a sequence of integers, got str"),
        ("children", [[[]], [[1], 0]], "children[1][1]: expected a sequence of integers, got int"),
        ("children", [[[1.0], []]], "children[0][0]: expected integers, got 1.0"),
    ],
)
def test_what_are_no_integers_is_refused(form, given, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        getattr(Trees, f"from_{form}")(given)


@pytest.mark.parametrize("kind", ["child-sum", "binary", "recursive"])
def test_wrong_calls_are_refused(kind):
    net, trees = make(kind), Trees.from_parents(BINARY)
    N, L = trees.num_nodes, trees.num_leaves
    x = torch.randn(N, I, dtype=torch.float64)
    sizes = re.escape(f"x: expected (N, input_size) = ({N}, {I}), a row for each node, or (L, ")
    for wrong in (x[1:], x[: L + 1], x[:, 1:], x[None], x[0]):
        with pytest.raises(ValueError, match=f"{sizes}.*got {re.escape(str(tuple(wrong.shape)))}"):
            net(wrong, trees)
    with pytest.raises(TypeError, match=r"trees: expected fastseq\.Trees, got list"):
        net(x, BINARY)
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        net(x.tolist(), trees)
    with pytest.raises(ValueError, match=r"dtype torch\.float64, got torch\.float32; use x\.to"):
        net(x.float(), trees)
    with pytest.raises(RuntimeError, match=r"x: .* device cpu, got meta; use x\.to\('cpu'\)"):
        net(x.to("meta"), trees)
    with pytest.raises(RuntimeError, match=r"trees: .* cpu, got meta; use trees\.to\('cpu'\)"):
        net(x, trees.to("meta"))


@pytest.mark.parametrize("network", [NaryTreeLSTM, RecursiveNetwork])
def test_too_many_children_are_refused(network):
    trees = Trees.from_parents(ANY)
    message = "arity = 2 children of a node, but node 0 of tree 5 has more; .* arity=5"
    with pytest.raises(ValueError, match=message):
        network(I, H)(torch.randn(trees.num_nodes, I), trees)


@pytest.mark.parametrize(
    "error, given",
    [
        (ValueError, {"hidden_size": 0}),
        (ValueError, {"input_size": -1}),
        (TypeError, {"hidden_size": 2.0}),
        (TypeError, {"input_size": True}),
        (TypeError, {"bias": 1}),
        (ValueError, {"arity": 0}),
        (TypeError, {"arity": "2"}),
        (ValueError, {"nonlinearity": "sigmoid"}),
        (TypeError, {"backend": None}),
    ],
)
def test_wrong_networks_are_refused(error, given):
    with pytest.raises(error, match=next(iter(given))):
        RecursiveNetwork(**({"input_size": I, "hidden_size": H} | given))


def test_parameters_and_repr():
    torch.manual_seed(0)
    shapes = {
        ChildSumTreeLSTM(I, H): ((4 * H, I), (4 * H, H), (4 * H,)),
        NaryTreeLSTM(I, H, arity=3): ((4 * H, I), (6 * H, 3 * H), (4 * H,)),
        RecursiveNetwork(I, H): ((H, I), (H, 2 * H), (H,)),
    }
    for net, expected_shapes in shapes.items():
        assert [n for n, _ in net.named_parameters()] == ["weight_ih", "weight_hh", "bias"]
        assert tuple(tuple(p.shape) for p in net.parameters()) == expected_shapes
        bound = H**-0.5
        assert all(0 < p.abs().max() <= bound for p in net.parameters())
    assert repr(ChildSumTreeLSTM(I, H, False)) == "ChildSumTreeLSTM(3, 4, bias=False)"
    assert repr(NaryTreeLSTM(I, H)) == "NaryTreeLSTM(3, 4, arity=2)"
    assert repr(RecursiveNetwork(I, H, nonlinearity="relu")) == (
        "RecursiveNetwork(3, 4, arity=2, nonlinearity='relu')"
    )


@pytest.mark.parametrize(
    "parents, words",
    [
        ([[-1, 1]], r"parents\[0\]: node 1 is its own parent; a root's is -1"),
        ([[-1], [-1, 0, 2]], r"parents\[1\]: node 2 is its own parent"),
    ],
)
def test_a_node_that_is_its_own_parent_is_refused(parents, words):
    with pytest.raises(ValueError, match=words):
        Trees.from_parents(parents)


def test_a_node_that_is_its_own_child_is_refused():
    with pytest.raises(ValueError, match=r"children\[0\]: node 1 is its own child"):
        Trees.from_children([[[], [1]]])


@pytest.mark.parametrize("network", [NaryTreeLSTM, RecursiveNetwork, ChildSumTreeLSTM])
def test_backward_under_autocast(network):
    trees, x = Trees.from_parents([[-1, 0, 0, 1, 1]]), torch.randn(5, 3)
    module, found = network(3, 4), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            h = module(x, trees)[0]
            found.append(torch.autograd.grad(h.sum(), [*module.parameters()]))
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("make", [Trees.from_brackets, Trees.from_nested])
def test_one_string_is_no_list_of_trees(make):
    with pytest.raises(TypeError, match="got one string; put it in a list"):
        make("(3 a)")


def test_a_text_is_a_string():
    with pytest.raises(TypeError, match=r"texts\[1\]: expected a string, got NoneType"):
        Trees.from_brackets(["(3 a)", None])
