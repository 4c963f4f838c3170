"""A batch of trees, and the order in which its nodes are computed.

Rows of the order: the inner nodes of all trees by depth, the roots first, then the leaves by depth.
So the leaves are one block, which needs nothing from anybody, and the inner nodes of one depth are
one block, whose children are all of the next depth: either is one product. A walk up takes the
blocks from the last to the first, a walk down the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

#: A node's parent, where it has none.
NONE = -1

_BOOLS = {bool, np.bool_}
_TOKEN = re.compile(r"[()]|[^\s()]+")


class Level(NamedTuple):
    """The inner nodes of one depth, rows ``first`` to ``last`` of the order.

    children: the rows of their children, siblings side by side, in their order.
    starts: where those of each node begin, as torch.nn.functional.embedding_bag takes it.
    leaves: of the leaves of the next depth, the first and the last among all leaves.
    """

    first: int
    last: int
    children: Tensor
    starts: Tensor
    leaves: tuple[int, int]


class Bracketed(NamedTuple):
    """What :meth:`Trees.from_brackets` reads: the trees, the label of every node, and the word of
    every leaf, in their order."""

    trees: Trees
    labels: list[str]
    words: list[str]


class Trees:
    r"""Trees of any shape, as a tree-structured network takes a batch of them.

    The nodes of all trees follow one another: node k of tree b is row
    ``sum(counts[:b]) + k`` of an input (N, I) and of an output (N, H). A tree has one root and one
    node at least; a forest is given as its trees.

    Make it with :meth:`from_parents`, :meth:`from_children`, :meth:`from_nested` or
    :meth:`from_brackets`, once for all calls with these trees. It is not changed afterwards.

    Attributes:
        counts: the number of nodes of each tree.
        num_nodes, num_leaves: of all trees, N and L.
        roots: (B,) int64, the root of each tree among the N nodes.
        leaves: (L,) int64, the leaves among the N nodes, in their order.
        height: the number of edges between a root and a leaf, at most.
        arity: the number of children of a node, at most.

    ``h.split(trees.counts)`` takes an output apart into that of each tree.
    """

    def __init__(self, parents: np.ndarray, counts: np.ndarray, turns: np.ndarray) -> None:
        """parents: (N,), each node's parent among the N nodes, a root's is itself; no cycles.
        turns: (N,), by which siblings are sorted."""
        N = len(parents)
        self.counts: list[int] = counts.tolist()
        nodes = np.arange(N)
        below = parents != nodes
        inner = np.zeros(N, dtype=bool)
        inner[parents[below]] = True
        depths = _depths(parents)
        self.height = int(depths.max(initial=0))

        # blocks: the depths of the inner nodes, then those of the leaves
        D = self.height + 1
        blocks = np.where(inner, depths, D + depths)
        order = np.argsort(blocks, kind="stable")
        ends = np.cumsum(np.bincount(blocks, minlength=2 * D)) if N else np.zeros(2 * D, np.int64)
        bounds = [0, *ends.tolist()]
        self.num_nodes, self.num_inner = N, bounds[D]
        self._bounds = bounds[: D + 1]
        self._leaf_bounds = [end - bounds[D] for end in bounds[D:]]
        rank = np.empty(N, np.int64)
        rank[order] = nodes

        parent = rank[parents[order]]
        edges = np.flatnonzero(below[order])
        edges = edges[np.lexsort((turns[order[edges]], parent[edges]))]
        degrees = np.bincount(parent[edges], minlength=self.num_inner)
        self.arity = int(degrees.max(initial=0))
        ends = np.cumsum(degrees)
        starts = ends - degrees
        # where the children of each block of inner nodes begin and end
        self._edges = np.concatenate(([0], ends))[self._bounds].tolist()
        position = np.zeros(N, np.int64)
        position[edges] = np.arange(len(edges)) - starts[parent[edges]]

        firsts = np.flatnonzero(~below)
        leaves = np.flatnonzero(~inner)
        place = np.cumsum(~inner) - 1
        self._tensors = {
            "order": order,
            "rank": rank,
            "parent": parent,
            "children": edges,
            "starts": starts,
            "position": position,
            "root_rows": rank[firsts],
            "roots": firsts,
            "leaves": leaves,
            "leaf_order": place[order[self.num_inner :]],
            "leaf_rank": rank[leaves] - self.num_inner,
        }
        self._tensors = {name: torch.from_numpy(a) for name, a in self._tensors.items()}

    @classmethod
    def from_parents(cls, parents: Sequence[Any]) -> Trees:
        """Of the parent of each node.

        Args:
            parents: a sequence of integers for each tree: for each of its nodes the number of the
                parent within the tree, and -1 for the root. Siblings are in the order of their
                numbers. Numbers need no order: a parent may stand before its children or behind.

        Raises:
            TypeError: what is given are not integers.
            ValueError: a number is no node of its tree, or a tree has no node, no root or several,
                or a cycle. The message names the tree and the node.
        """
        flat, counts = _flat("parents", parents)
        starts = np.cumsum(counts) - counts
        _check_range("parents", flat, counts, NONE)
        roots = np.add.reduceat(flat == NONE, starts) if len(counts) else counts
        for b in np.flatnonzero(roots != 1)[:1]:
            own = np.flatnonzero(flat[starts[b] : starts[b] + counts[b]] == NONE).tolist()
            raise ValueError(
                f"parents[{b}]: expected one root, whose parent is {NONE}, got "
                + (f"nodes {_listed(own)}; give each tree a sequence of its own" if own else "none")
            )
        return cls._of(flat, counts, np.arange(len(flat)), "parents")

    @classmethod
    def from_children(cls, children: Sequence[Sequence[Any]]) -> Trees:
        """Of the children of each node.

        Args:
            children: for each tree a sequence that has for each node the numbers of its children
                within the tree, in their order; an empty one for a leaf.

        Raises:
            TypeError: what is given are not integers.
            ValueError: a number is no node of its tree, a node has two parents, or a tree has no
                node, no root or several, or a cycle. The message names the tree and the node.
        """
        trees = [list(tree) for tree in children]
        counts = np.array([len(tree) for tree in trees], np.int64)
        flat, degrees = _flat("children", [node for tree in trees for node in tree], counts)
        _check_counts("children", counts)
        tree_of = np.repeat(np.arange(len(counts)), counts)
        starts = np.cumsum(counts) - counts
        above = np.repeat(np.arange(len(degrees)), degrees)
        parent, tree = above - starts[tree_of[above]], tree_of[above]
        for k in np.flatnonzero((flat < 0) | (flat >= counts[tree]))[:1]:
            raise ValueError(
                f"children[{tree[k]}][{parent[k]}]: expected nodes of the tree, 0 to "
                f"{counts[tree[k]] - 1}, got {flat[k]}"
            )
        child = flat + starts[tree]
        for node in np.flatnonzero(np.bincount(child, minlength=len(degrees)) > 1)[:1]:
            b = tree_of[node]
            raise ValueError(
                f"children[{b}]: node {node - starts[b]} has several parents, nodes "
                f"{_listed(parent[child == node].tolist())}"
            )
        found = np.full(len(degrees), NONE)
        found[child] = parent
        turns = np.zeros(len(degrees), np.int64)
        turns[child] = np.arange(len(child))
        roots = np.bincount(tree_of[found == NONE], minlength=len(counts))
        for b in np.flatnonzero(roots != 1)[:1]:
            own = np.flatnonzero(found[starts[b] : starts[b] + counts[b]] == NONE).tolist()
            raise ValueError(
                f"children[{b}]: expected one root, a node that is nobody's child, got "
                + (f"nodes {_listed(own)}; give each tree a sequence of its own" if own else "none")
            )
        return cls._of(found, counts, turns, "children")

    @classmethod
    def from_nested(cls, nested: Iterable[Any]) -> tuple[Trees, list[Any]]:
        """Of nested tuples or lists: ``(("the", "cat"), "sat")`` has five nodes, three of them
        leaves.

        Args:
            nested: a tree each: a tuple or list of subtrees, or a leaf, which is anything else.

        Returns:
            The trees, whose nodes are numbered as they are read, each before its children; and the
            leaves of all trees, in their order.

        Raises:
            ValueError: a tuple or list is empty, or holds itself.
        """
        _check_list("nested", nested)
        parents: list[list[int]] = []
        leaves: list[Any] = []
        for b, tree in enumerate(nested):
            own: list[int] = []
            parents.append(own)
            waiting: list[tuple[Any, int | None]] = [(tree, NONE)]
            above: dict[int, int] = {}  # the nodes that are being read, by identity
            while waiting:
                node, parent = waiting.pop()
                if parent is None:
                    del above[id(node)]
                    continue
                here = len(own)
                own.append(parent)
                if not isinstance(node, (tuple, list)):
                    leaves.append(node)
                elif len(node) == 0:
                    raise ValueError(f"nested[{b}]: node {here} is an empty {_kind(node)}")
                elif id(node) in above:
                    raise ValueError(f"nested[{b}]: node {above[id(node)]} holds itself")
                else:
                    above[id(node)] = here
                    waiting.append((node, None))
                    waiting += [(child, here) for child in reversed(node)]
        return cls.from_parents(parents), leaves

    @classmethod
    def from_brackets(cls, texts: Iterable[str]) -> Bracketed:
        """Of the bracket form of treebanks, ``(3 (2 It) (4 (4 's) (3 good)))``.

        Args:
            texts: a tree each. A node is its label, then its word if it is a leaf, else its
                children. A label may be left out before a child; it is then "".

        Returns:
            The trees, whose nodes are numbered as they are read, each before its children; the
            label of each node; the word of each leaf.

        Raises:
            ValueError: the brackets do not match, or a node has neither a word nor children, or
                both. The message names the tree and the character.
        """
        _check_list("texts", texts)
        parents: list[list[int]] = []
        labels: list[str] = []
        words: list[str] = []
        for b, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"texts[{b}]: expected a string, got {_kind(text)}")
            own: list[int] = []
            read = _Reader(f"texts[{b}]", own, labels, words)
            for token in _TOKEN.finditer(text):
                read.token(token.group(), token.start())
            read.end()
            parents.append(own)
        return Bracketed(cls.from_parents(parents), labels, words)

    @classmethod
    def _of(cls, local: np.ndarray, counts: np.ndarray, turns: np.ndarray, name: str) -> Trees:
        """local: parents within each tree, one root each."""
        starts = np.repeat(np.cumsum(counts) - counts, counts)
        for node in np.flatnonzero(local == np.arange(len(local)) - starts)[:1]:
            b = int(np.searchsorted(np.cumsum(counts), node, side="right"))
            raise ValueError(
                f"{name}[{b}]: node {local[node]} is its own parent; a root's is {NONE}"
                if name == "parents"
                else f"{name}[{b}]: node {local[node]} is its own child"
            )
        parents = np.where(local == NONE, np.arange(len(local)), local + starts)
        _check_cycles(name, parents, counts)
        return cls(parents, counts, turns)

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return (
            f"Trees({_count(len(self), 'tree', 'trees')}, "
            f"{_count(self.num_nodes, 'node', 'nodes')}, "
            f"{_count(self.num_leaves, 'leaf', 'leaves')}, "
            f"height={self.height}, arity={self.arity})"
        )

    @property
    def num_leaves(self) -> int:
        return self.num_nodes - self.num_inner

    @property
    def roots(self) -> Tensor:
        return self._tensors["roots"]

    @property
    def leaves(self) -> Tensor:
        return self._tensors["leaves"]

    @property
    def device(self) -> torch.device:
        return self.roots.device

    def to(self, device: torch.device | str | int) -> Trees:
        """The same trees, for inputs on another device."""
        if torch.device(device) == self.device:
            return self
        moved = object.__new__(Trees)
        moved.__dict__ |= {k: v for k, v in self.__dict__.items() if k not in _CACHED}
        moved._tensors = {name: tensor.to(device) for name, tensor in self._tensors.items()}
        return moved

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in _CACHED}

    def tensor(self, name: str) -> Tensor:
        """Of the order: *order* and *rank* (N,), the node of each row and the row of each node;
        *parent* (N,), the row of each row's parent, a root's own; *children* and *starts*, as of a
        :class:`Level`, of all inner rows; *position* (N,), the place among the siblings;
        *root_rows* (B,); *leaf_order* and *leaf_rank* (L,), as order and rank among the leaves."""
        return self._tensors[name]

    @cached_property
    def levels(self) -> list[Level]:
        """Of all depths that have inner nodes, the roots' first."""
        children, starts = self._tensors["children"], self._tensors["starts"]
        edges, leaf = self._edges, self._leaf_bounds
        return [
            Level(
                first,
                last,
                children[edges[d] : edges[d + 1]],
                starts[first:last] - edges[d],
                (leaf[d + 1], leaf[d + 2]),
            )
            for d, (first, last) in enumerate(pairwise(self._bounds))
            if last > first
        ]

    @cached_property
    def leaf_roots(self) -> tuple[int, int]:
        """The rows of the trees of a single node, which are the first of the leaves."""
        return self.num_inner, self.num_inner + self._leaf_bounds[1]

    def slots(self, arity: int) -> tuple[Tensor, Tensor]:
        """Children by their places, for a network that tells them apart.

        Returns:
            (n * arity,) the row of each inner row's child at each place, N where there is none; and
            (N,) for each row its place among these; a root's means nothing.
        """
        if arity not in self._slots:
            parent, position = self._tensors["parent"], self._tensors["position"]
            rows = self._tensors["children"]
            place = parent * arity + position
            child = parent.new_full((self.num_inner * arity,), self.num_nodes)
            child[place[rows]] = rows
            self._slots[arity] = child, place
        return self._slots[arity]

    @cached_property
    def _slots(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def check_arity(self, arity: int) -> None:
        """Raise ValueError where a node has more children than ``arity``."""
        if self.arity <= arity:
            return
        row = self._tensors["children"][
            self._tensors["position"][self._tensors["children"]] == arity
        ]
        node = int(self._tensors["order"][self._tensors["parent"][row[0]]])
        ends = np.cumsum(self.counts)
        b = int(np.searchsorted(ends, node, side="right"))
        raise ValueError(
            f"trees: expected at most arity = {arity} children of a node, but node "
            f"{node - (ends[b] - self.counts[b])} of tree {b} has more; make the network with "
            f"arity={self.arity}, or the trees binary"
        )


_CACHED = frozenset(("levels", "leaf_roots", "_slots"))


class _Reader:
    """One tree in brackets, token by token."""

    def __init__(self, name: str, own: list[int], labels: list[str], words: list[str]) -> None:
        self.name, self.own, self.labels, self.words = name, own, labels, words
        self.open: list[int] = []  # the nodes whose bracket is open
        self.filled: list[str] = []  # of each of these: "", "label", "word" or "children"

    def fail(self, what: str, at: int) -> None:
        raise ValueError(f"{self.name}: {what} at character {at}")

    def token(self, token: str, at: int) -> None:
        if token == "(":
            if self.open and self.filled[-1] == "word":
                self.fail("a child of a node that has a word", at)
            if self.own and not self.open:
                self.fail("expected one tree, got another", at)
            if self.open:
                self.filled[-1] = "children"
            self.own.append(self.open[-1] if self.open else NONE)
            self.open.append(len(self.own) - 1)
            self.filled.append("")
            self.labels.append("")
        elif not self.open:
            self.fail(f"expected a bracket that opens, got {token!r}", at)
        elif token == ")":
            if self.filled.pop() not in ("word", "children"):
                self.fail("a node with neither a word nor children ends", at)
            self.open.pop()
        elif self.filled[-1] == "":
            self.labels[-1] = token
            self.filled[-1] = "label"
        elif self.filled[-1] == "label":
            self.words.append(token)
            self.filled[-1] = "word"
        else:
            self.fail(f"expected a bracket, got the word {token!r}", at)

    def end(self) -> None:
        if not self.own:
            raise ValueError(f"{self.name}: expected a tree, got none")
        if self.open:
            raise ValueError(f"{self.name}: brackets that are not closed: {len(self.open)}")


def _check_list(name: str, trees: Any) -> None:
    if isinstance(trees, str):
        raise TypeError(f"{name}: expected a sequence of trees, got one string; put it in a list")


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _kind(value: Any) -> str:
    return type(value).__name__


def _listed(numbers: Sequence[int], most: int = 8) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown + (", ..." if len(numbers) > most else "")


def _flat(
    name: str, rows: Sequence[Any], inner: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All integers of ``rows`` in a row, and how many each has. inner: of a sequence of sequences
    that was taken apart, how many rows each has, by which a message names them."""

    def named(k: int) -> str:
        if inner is None:
            return f"{name}[{k}]"
        b = int(np.searchsorted(np.cumsum(inner), k, side="right"))
        return f"{name}[{b}][{k - int(inner[:b].sum())}]"

    rows = [row.tolist() if isinstance(row, (Tensor, np.ndarray)) else row for row in rows]
    for k, row in enumerate(rows):
        if not isinstance(row, Sequence) or isinstance(row, (str, bytes)):
            raise TypeError(f"{named(k)}: expected a sequence of integers, got {_kind(row)}")
    counts = np.fromiter(map(len, rows), np.int64, len(rows))
    if inner is None:
        _check_counts(name, counts)
    values = list(chain.from_iterable(rows))
    try:
        found = np.array(values) if values else np.zeros(0, np.int64)
    except ValueError:  # sequences of different lengths
        found = np.zeros(0)
    if found.dtype.kind not in "iu" or found.ndim != 1 or _BOOLS & set(map(type, values)):
        for k, row in enumerate(rows):
            for value in row:
                if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                    raise TypeError(f"{named(k)}: expected integers, got {value!r}")
    return found.astype(np.int64), counts


def _check_counts(name: str, counts: np.ndarray) -> None:
    for b in np.flatnonzero(counts == 0)[:1]:
        raise ValueError(f"{name}[{b}]: expected one node at least, got none")


def _check_range(name: str, flat: np.ndarray, counts: np.ndarray, low: int) -> None:
    tree = np.repeat(np.arange(len(counts)), counts)
    for k in np.flatnonzero((flat < low) | (flat >= counts[tree]))[:1]:
        b = tree[k]
        raise ValueError(
            f"{name}[{b}][{k - counts[:b].sum()}]: expected a node of the tree, 0 to "
            f"{counts[b] - 1}, or {NONE} for the root, got {flat[k]}"
        )


def _jumps(parents: np.ndarray, rounds: int) -> tuple[np.ndarray, np.ndarray]:
    """The ancestor 2**rounds above each node, or its root, and the edges up to there."""
    up, edges = parents, (parents != np.arange(len(parents))).astype(np.int64)
    for _ in range(rounds):
        further = edges[up]
        if not further.any():
            break
        edges, up = edges + further, up[up]
    return up, edges


def _depths(parents: np.ndarray) -> np.ndarray:
    """Each node's distance from its root, by doubling: as many rounds as the height has bits."""
    return _jumps(parents, len(parents).bit_length())[1]


def _check_cycles(name: str, parents: np.ndarray, counts: np.ndarray) -> None:
    most = int(counts.max(initial=0))
    up, _ = _jumps(parents, most.bit_length())
    lost = np.flatnonzero(parents[up] != up)  # still no root, higher up than any tree is
    for node in up[lost[:1]].tolist():
        b = int(np.searchsorted(np.cumsum(counts), node, side="right"))
        start = int(counts[:b].sum())
        circle = [node]
        while (node := int(parents[node])) != circle[0]:
            circle.append(node)
        first = circle.index(min(circle))
        circle = [k - start for k in circle[first:] + circle[: first + 1]]
        raise ValueError(
            f"{name}[{b}]: node {circle[0]} is its own ancestor, by a cycle of parents: "
            f"{_listed(circle)}"
        )
