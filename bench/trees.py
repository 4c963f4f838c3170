"""Tree-structured networks beside a recursion node by node: ``python -m bench.trees [--write]``.

The recursion is what one writes from the paper, a few of torch's operations for each node. Between
the two stands the same network level by level in torch's operations, on the levels that fastseq
finds. The trees are binary, split at random places.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastseq.nn.trees import ChildSumTreeLSTM, NaryTreeLSTM, RecursiveNetwork
from fastseq.ops.tree_walks import KINDS
from fastseq.ops.trees import Trees

from . import table
from .measure import ROUNDS, in_turn
from .pages import note, write

PAGE = Path(__file__).parent.parent / "docs" / "trees.md"
SHAPES = ((32, 20, 300, 150), (1, 20, 300, 150), (8, 20, 64, 64), (100, 20, 128, 128))
HEADER = ["", "way", "nodes ms", "levels ms", "fastseq ms", "of nodes", "of levels", "plan ms"]

States = list[tuple[Tensor, ...]]
#: (network, input of a node, states of its children) -> its states, h first
Node = Callable[[Any, Tensor, States], tuple[Tensor, ...]]


def child_sum(net: Any, x: Tensor, children: States) -> tuple[Tensor, ...]:
    a_i, a_f, a_g, a_o = F.linear(x, net.weight_ih, net.bias).chunk(4)
    u_i, u_f, u_g, u_o = net.weight_hh.chunk(4)
    if not children:
        c = torch.sigmoid(a_i) * torch.tanh(a_g)
        return torch.sigmoid(a_o) * torch.tanh(c), c
    h = torch.stack([h for h, _ in children])
    total = h.sum(0)
    f = torch.sigmoid(a_f + F.linear(h, u_f))
    c = torch.sigmoid(a_i + F.linear(total, u_i)) * torch.tanh(a_g + F.linear(total, u_g))
    c = c + (f * torch.stack([c for _, c in children])).sum(0)
    return torch.sigmoid(a_o + F.linear(total, u_o)) * torch.tanh(c), c


def binary(net: Any, x: Tensor, children: States) -> tuple[Tensor, ...]:
    a_i, a_f, a_g, a_o = F.linear(x, net.weight_ih, net.bias).chunk(4)
    if not children:
        c = torch.sigmoid(a_i) * torch.tanh(a_g)
        return torch.sigmoid(a_o) * torch.tanh(c), c
    (h_l, c_l), (h_r, c_r) = children
    s_i, s_l, s_r, s_g, s_o = F.linear(torch.cat((h_l, h_r)), net.weight_hh).chunk(5)
    c = torch.sigmoid(a_i + s_i) * torch.tanh(a_g + s_g)
    c = c + torch.sigmoid(a_f + s_l) * c_l + torch.sigmoid(a_f + s_r) * c_r
    return torch.sigmoid(a_o + s_o) * torch.tanh(c), c


def recursive(net: Any, x: Tensor, children: States) -> tuple[Tensor, ...]:
    a = F.linear(x, net.weight_ih, net.bias)
    if children:
        a = a + F.linear(torch.cat([h for (h,) in children]), net.weight_hh)
    return (torch.tanh(a),)


class Network(NamedTuple):
    make: Callable[[int, int], Any]
    node: Node


NETWORKS = {
    "ChildSumTreeLSTM": Network(ChildSumTreeLSTM, child_sum),
    "NaryTreeLSTM": Network(NaryTreeLSTM, binary),
    "RecursiveNetwork": Network(RecursiveNetwork, recursive),
}


def draw(draws: random.Random, leaves: int) -> list[int]:
    """The parents of a binary tree, each node before its children."""
    parents, waiting = [], [(leaves, -1)]
    while waiting:
        count, parent = waiting.pop()
        here = len(parents)
        parents.append(parent)
        if count > 1:
            left = draws.randint(1, count - 1)
            waiting += [(count - left, here), (left, here)]
    return parents


def by_node(net: Any, node: Node, parents: list[list[int]], x: Tensor) -> Tensor:
    """h (N, H)."""
    found = []
    for tree, rows in zip(parents, x.split([len(tree) for tree in parents]), strict=True):
        children: list[list[int]] = [[] for _ in tree]
        for k, parent in enumerate(tree):
            if parent >= 0:
                children[parent].append(k)

        def state(k: int, rows: Tensor = rows, below: Any = children, out: Any = None) -> Any:
            out[k] = node(net, rows[k], [state(c, rows, below, out) for c in below[k]])
            return out[k]

        out: list[Any] = [None] * len(tree)
        state(tree.index(-1), out=out)
        found += [h for h, *_ in out]
    return torch.stack(found)


def forward(call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    with torch.no_grad():
        call(x)


def training(net: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> None:
    net.zero_grad(set_to_none=True)
    x.grad = None
    call(x).sum().backward()


def planning(parents: list[list[int]]) -> float:
    """Seconds to make the batch and its levels."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        _ = Trees.from_parents(parents).levels
        times.append(time.perf_counter() - start)
    return median(times)


def rows(name: str, shape: tuple[int, int, int, int], seconds: float) -> list[list[str]]:
    B, leaves, I, H = shape  # noqa: E741
    torch.manual_seed(0)
    draws = random.Random(0)
    parents = [draw(draws, leaves) for _ in range(B)]
    trees = Trees.from_parents(parents)
    net = NETWORKS[name].make(I, H)
    x = torch.randn(trees.num_nodes, I)
    equations = KINDS[net._fastseq_kind].equations
    weights = net.weight_ih, net.weight_hh, net.bias
    calls: list[Callable[[Tensor], Tensor]] = [
        lambda x: by_node(net, NETWORKS[name].node, parents, x),
        lambda x: equations(trees, x, *weights)[0],
        lambda x: net(x, trees)[0],
    ]
    theirs, levels, ours = (call(x) for call in calls)
    if not (torch.allclose(theirs, ours, atol=1e-5) and torch.allclose(levels, ours, atol=1e-5)):
        raise ValueError(f"{name}: the recursion computes something else")
    plan = f"{1e3 * planning(parents):.2g}"
    count = f"{B} tree" + "s" * (B > 1)
    lines = []
    for way in ("forward", "training"):
        leaf = x.clone().requires_grad_(way == "training")
        timed = [
            partial(forward, call, leaf) if way == "forward" else partial(training, net, call, leaf)
            for call in calls
        ]
        # in pairs: what follows the recursion finds its caches full of the recursion's tensors
        nodes, after = (1e3 * t for t in in_turn([timed[0], timed[2]], seconds))
        level, ours_ms = (1e3 * t for t in in_turn(timed[1:], seconds))
        label = f"{name} {count} of {leaves} leaves, I{I} H{H}"
        line = [label, way, *map(table.milliseconds, (nodes, level, ours_ms))]
        lines.append([*line, f"{nodes / after:.1f}x", f"{level / ours_ms:.1f}x", plan])
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.trees", description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=2.0, help="what a row takes")
    parser.add_argument("--only", help="a network by its name")
    parser.add_argument("--write", action="store_true", help="into docs/trees.md")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    found = []
    for name in NETWORKS:
        if options.only in (None, name):
            for shape in SHAPES:
                for line in rows(name, shape, options.seconds):
                    found.append(line)
                    print("  ".join(line), flush=True)
    how = f"Medians of at least {ROUNDS} rounds in turn, float32, an input at every node."
    text = f"{table.markdown(HEADER, found)}\n\n{note(how)}"
    return write("trees", text, PAGE) if options.write else 0


if __name__ == "__main__":
    sys.exit(main())
