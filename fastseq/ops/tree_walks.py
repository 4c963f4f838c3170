"""Recurrences up trees: for each kind the equations in torch's operations, which autograd sees
through, and a Function that walks all trees at once, in place, and makes each gradient of a weight
in one product.

Rows are in the order of :class:`.trees.Trees`: n inner nodes by depth, then the leaves. Inputs and
outputs are in the caller's order. Where only the leaves have an input, x is (L, I), and an inner
node has the bias alone.

On the way down a node takes its gradients from its parent's row, so no two rows write to one place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..backends.products import product
from .autograd import gradients_again
from .library import as_given
from .modes import foreign, in_transform
from .trees import Level, Trees

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input
relu_backward = torch.ops.aten.threshold_backward.grad_input

#: i, g and o of some rows, (rows, H) each.
Gates = Sequence[Tensor]


def tree_recurrence(
    kind: str, trees: Trees, x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """The states of all nodes, (N, H) each, with gradients of every order.

    kind: of :data:`KINDS`. x: (N, I), or (L, I) of the leaves.
    """
    walk = KINDS[kind]
    dual = torch.autograd.forward_ad._current_level >= 0
    if in_transform() or dual or foreign((x, w_ih, w_hh, bias)):
        return walk.equations(trees, x, w_ih, w_hh, bias)
    return walk.apply(trees, x, w_ih, w_hh, bias)


def _in_order(trees: Trees, x: Tensor) -> tuple[Tensor, bool]:
    """x by rows, and whether it is of the leaves alone."""
    alone = len(x) != trees.num_nodes
    return x.index_select(0, trees.tensor("leaf_order" if alone else "order")), alone


# The equations


def _parts(trees: Trees, x: Tensor, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """w x + b of the inner rows and of the leaves."""
    n = trees.num_inner
    rows, alone = _in_order(trees, x)
    a = linear(rows, w, b)
    if not alone:
        return a[:n], a[n:]
    none = a.new_zeros(n, len(w))
    return none if b is None else none + b, a


def _climb(
    trees: Trees,
    leaves: tuple[Tensor, ...],
    step: Callable[..., tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """The states of all nodes, in the caller's order.

    leaves: the states of the leaves. step: (level, rows, states) -> the states of the level's
    nodes, where rows are the children's in the order, and states theirs.
    """
    n = trees.num_inner
    found = [leaves]  # of the leaves, then of the levels from the deepest
    below: tuple[Tensor, ...] | None = None
    for d in range(len(trees.levels) - 1, -1, -1):
        level = trees.levels[d]
        first, last = level.leaves
        states = tuple(leaf[first:last] for leaf in leaves)
        rows = torch.arange(n + first, n + last, device=trees.device)
        if below is not None:
            states = tuple(torch.cat(pair) for pair in zip(below, states, strict=True))
            inner = trees.levels[d + 1]
            rows = torch.cat((torch.arange(inner.first, inner.last, device=trees.device), rows))
        below = step(level, rows, states)
        found.append(below)
    rank = trees.tensor("rank")
    columns = zip(*reversed(found), strict=True)
    return tuple(torch.cat(parts).index_select(0, rank) for parts in columns)


def child_sum_equations(
    trees: Trees, x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Equations 2 to 8 of Tai et al. 2015, with the gates i, f, g, o in this order."""
    a, a_leaf = _parts(trees, x, w_ih, bias)
    H = w_hh.shape[1]
    w_f = w_hh[H : 2 * H]
    w_igo = torch.cat((w_hh[:H], w_hh[2 * H :]))

    def output(a_i: Tensor, a_g: Tensor, a_o: Tensor, c: Tensor | None) -> tuple[Tensor, ...]:
        new = torch.sigmoid(a_i) * torch.tanh(a_g)
        c = new if c is None else new + c
        return torch.sigmoid(a_o) * torch.tanh(c), c

    def step(level: Level, rows: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        h, c = states
        own = a[level.first : level.last]
        above = trees.tensor("parent")[rows] - level.first
        zeros = own.new_zeros(len(own), H)
        f = torch.sigmoid(own[:, H : 2 * H].index_select(0, above) + linear(h, w_f))
        s_i, s_g, s_o = linear(zeros.index_add(0, above, h), w_igo).chunk(3, 1)
        a_i, _, a_g, a_o = own.chunk(4, 1)
        return output(a_i + s_i, a_g + s_g, a_o + s_o, zeros.index_add(0, above, f * c))

    i, _, g, o = a_leaf.chunk(4, 1)
    return _climb(trees, output(i, g, o, None), step)


def nary_equations(
    trees: Trees, x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """Equations 9 to 14 of Tai et al. 2015, with the gates i, f_1 to f_N, g, o in this order."""
    a, a_leaf = _parts(trees, x, w_ih, bias)
    H = len(w_ih) // 4
    arity = w_hh.shape[1] // H
    _, place = trees.slots(arity)

    def step(level: Level, rows: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        n = level.last - level.first
        at = place[rows] - level.first * arity
        h, c = (s.new_zeros(n * arity, H).index_add(0, at, s) for s in states)
        a_i, a_f, a_g, a_o = a[level.first : level.last].chunk(4, 1)
        s = linear(h.view(n, arity * H), w_hh)
        s_i, s_f, s_g, s_o = s.split((H, arity * H, H, H), 1)
        f = torch.sigmoid(a_f.unsqueeze(1) + s_f.view(n, arity, H))
        new = torch.sigmoid(a_i + s_i) * torch.tanh(a_g + s_g)
        c = new + (f * c.view(n, arity, H)).sum(1)
        return torch.sigmoid(a_o + s_o) * torch.tanh(c), c

    i, _, g, o = a_leaf.chunk(4, 1)
    c = torch.sigmoid(i) * torch.tanh(g)
    return _climb(trees, (torch.sigmoid(o) * torch.tanh(c), c), step)


def _recursive_equations(activation: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def equations(
        trees: Trees, x: Tensor, w_ih: Tensor, w_hh: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """h = f(W x + U [h_1; ...; h_N] + b)."""
        a, a_leaf = _parts(trees, x, w_ih, bias)
        H = len(w_ih)
        arity = w_hh.shape[1] // H
        _, place = trees.slots(arity)

        def step(level: Level, rows: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            n = level.last - level.first
            at = place[rows] - level.first * arity
            h = states[0].new_zeros(n * arity, H).index_add(0, at, states[0])
            own = a[level.first : level.last]
            return (activation(own + linear(h.view(n, arity * H), w_hh)),)

        return _climb(trees, (activation(a_leaf),), step)

    return equations


# Walks in place


class Walk(torch.autograd.Function):
    """(trees, x, w_ih, w_hh, bias) -> the states of all nodes"""

    @staticmethod
    def equations(trees: Trees, *inputs: Any) -> tuple[Tensor, ...]:
        raise NotImplementedError

    @staticmethod
    def up(trees: Trees, x: Tensor, alone: bool, *weights: Any) -> tuple[Sequence[Tensor], Any]:
        """The states by rows, and what :meth:`down` wants besides. x: by rows."""
        raise NotImplementedError

    @staticmethod
    def down(
        trees: Trees,
        x: Tensor,
        alone: bool,
        weights: Any,
        saved: Any,
        grads: Sequence[Tensor | None],
        wants_x: bool,
    ) -> tuple[Tensor | None, ...]:
        """The gradients of x by rows, w_ih, w_hh and bias; of the bias whether there is one or not.
        grads: of the states by rows, for down to write to."""
        raise NotImplementedError

    @classmethod
    def forward(cls, ctx: Any, trees: Trees, x: Tensor, *weights: Any) -> Any:
        rows, alone = _in_order(trees, x)
        states, saved = cls.up(trees, rows, alone, *weights)
        ctx.trees, ctx.alone, ctx.count = trees, alone, len(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *weights, rows, *saved)
        rank = trees.tensor("rank")
        return tuple(s.index_select(0, rank) for s in states)

    @classmethod
    def backward(cls, ctx: Any, *grads: Tensor | None) -> Any:
        trees, need = ctx.trees, ctx.needs_input_grad
        inputs = ctx.saved_tensors[: 1 + ctx.count]
        if all(g is None for g in grads):
            return (None,) * len(need)
        if torch.is_grad_enabled() or _unusual(grads):

            def outputs_of(values: Sequence[Any]) -> tuple[Tensor, ...]:
                return cls.equations(trees, *values)

            return None, *gradients_again(outputs_of, inputs, need[1:], grads)
        x, *saved = ctx.saved_tensors[1 + ctx.count :]
        order = trees.tensor("order")
        down = [None if g is None else g.index_select(0, order) for g in grads]
        with as_given():  # backward may be called under autocast
            dx, *dweights = cls.down(trees, x, ctx.alone, inputs[1:], saved, down, need[1])
        if dx is not None:
            dx = dx.index_select(0, trees.tensor("leaf_rank" if ctx.alone else "rank"))
        return None, dx, *(g if n else None for g, n in zip(dweights, need[2:], strict=True))


def _unusual(grads: Sequence[Tensor | None]) -> bool:
    """Whether a gradient stands for many (is_grads_batched) or has a tangent."""
    return torch.autograd.forward_ad._current_level >= 0 or any(
        g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in grads
    )


def _igo(w: Tensor) -> Tensor:
    """Rows i, g, o of i, f, g, o."""
    H = len(w) // 4
    return torch.cat((w[:H], w[2 * H :]))


def _fill(b: Tensor | None, out: Tensor) -> None:
    out.zero_() if b is None else out.copy_(b)


def _affine(x: Tensor, w: Tensor, b: Tensor | None, out: Tensor) -> None:
    """out = x w^T + b"""
    if b is not None:
        out.copy_(b)
    product(x, w.t(), out, add=b is not None)


def _lstm_up(gates: Gates, before: Tensor | None, c: Tensor, tanh_c: Tensor, h: Tensor) -> None:
    """The gates i, g, o of some rows from their pre-activations, and c, tanh c and h of these.

    before: what the children add to c."""
    i, g, o = gates
    torch.sigmoid_(i)
    torch.tanh_(g)
    torch.sigmoid_(o)
    if before is None:
        torch.mul(i, g, out=c)
    else:
        torch.addcmul(before, i, g, out=c)
    torch.tanh(c, out=tanh_c)
    torch.mul(o, tanh_c, out=h)


def _lstm_down(gates: Gates, tanh_c: Tensor, dh: Tensor, dc: Tensor, dgates: Gates) -> None:
    """The gates' gradients of dh and dc, to which what comes through h is added."""
    (i, g, o), (di, dg, do) = gates, dgates
    torch.mul(dh, tanh_c, out=do)
    sigmoid_backward(do, o, grad_input=do)
    through = dh * o
    tanh_backward(through, tanh_c, grad_input=through)
    dc += through
    torch.mul(dc, g, out=di)
    sigmoid_backward(di, i, grad_input=di)
    torch.mul(dc, i, out=dg)
    tanh_backward(dg, g, grad_input=dg)


class ChildSum(Walk):
    equations = staticmethod(child_sum_equations)

    @staticmethod
    def up(trees, x, alone, w_ih, w_hh, bias):
        n, N, H = trees.num_inner, trees.num_nodes, w_hh.shape[1]
        u_f, u_igo = w_hh[H : 2 * H].t(), _igo(w_hh).t()
        b_igo = b_f = None
        if bias is not None:
            b_igo, b_f = _igo(bias), bias[H : 2 * H]
        G = x.new_empty(N, 3 * H)
        # the gate f of a node's way to its parent stands in the node's row
        F, h, c, tanh_c, kept = (x.new_empty(N, H) for _ in range(5))
        _affine(x, _igo(w_ih), b_igo, G[n:] if alone else G)
        if alone:
            _fill(b_igo, G[:n])
            _fill(b_f, F)
        elif n:
            above = x.new_empty(n, H)
            _affine(x[:n], w_ih[H : 2 * H], b_f, above)
            parent = trees.tensor("parent").clamp(max=n - 1)  # a single node is its own
            torch.index_select(above, 0, parent, out=F)

        def give(first: int, last: int) -> None:
            """What rows add to their parents' c."""
            f = F[first:last]
            torch.sigmoid_(product(h[first:last], u_f, f, add=True))
            torch.mul(f, c[first:last], out=kept[first:last])

        _lstm_up(G[n:].chunk(3, 1), None, c[n:], tanh_c[n:], h[n:])
        if n:
            give(n, N)
        sums = []
        for first, last, children, starts, _ in reversed(trees.levels):
            s = torch.embedding_bag(h, children, starts)[0]
            sums.append(s)
            own = product(s, u_igo, G[first:last], add=True)
            before = torch.embedding_bag(kept, children, starts)[0]
            _lstm_up(own.chunk(3, 1), before, c[first:last], tanh_c[first:last], h[first:last])
            if first:
                give(first, last)
        s = torch.cat(sums[::-1]) if sums else x.new_empty(0, H)
        return (h, c), (G, F, h, c, tanh_c, s)

    @staticmethod
    def down(trees, x, alone, weights, saved, grads, wants_x):
        w_ih, w_hh, _ = weights
        G, F, h, c, tanh_c, s = saved
        n, N, H = trees.num_inner, trees.num_nodes, w_hh.shape[1]
        u_f, u_igo = w_hh[H : 2 * H], _igo(w_hh)
        dh, dc = (torch.zeros_like(h) if g is None else g for g in grads)
        dG, dF, ds = torch.empty_like(G), torch.empty_like(F), x.new_empty(n, H)
        parent = trees.tensor("parent")

        def take(first: int, last: int) -> None:
            """From the parents."""
            above, f = parent[first:last], F[first:last]
            dc_above, df = dc.index_select(0, above), dF[first:last]
            torch.mul(dc_above, c[first:last], out=df)
            sigmoid_backward(df, f, grad_input=df)
            dc[first:last].addcmul_(dc_above, f)
            product(df, u_f, dh[first:last].add_(ds.index_select(0, above)), add=True)

        for first, last, *_ in trees.levels:
            if first:
                take(first, last)
            rows = slice(first, last)
            gates, dgates = G[rows].chunk(3, 1), dG[rows].chunk(3, 1)
            _lstm_down(gates, tanh_c[rows], dh[rows], dc[rows], dgates)
            product(dG[rows], u_igo, out=ds[rows])
        single = trees.leaf_roots[1]
        if single < N:
            take(single, N)
        _lstm_down(G[n:].chunk(3, 1), tanh_c[n:], dh[n:], dc[n:], dG[n:].chunk(3, 1))
        dF.index_fill_(0, trees.tensor("root_rows"), 0)

        dw_ih, dw_hh = torch.empty_like(w_ih), torch.empty_like(w_hh)
        db = x.new_empty(4 * H)
        f = slice(H, 2 * H)
        di, dgo = dG[:, :H], dG[:, H:]
        for d, rows in ((di, slice(0, H)), (dgo, slice(2 * H, 4 * H))):
            torch.sum(d, 0, out=db[rows])
            product(d[n:].t() if alone else d.t(), x, out=dw_ih[rows])
            product(d[:n].t(), s, out=dw_hh[rows])
        torch.sum(dF, 0, out=db[f])
        product(dF.t(), h, out=dw_hh[f])
        dx = product(dG[n:] if alone else dG, _igo(w_ih)) if wants_x else None
        if alone or n == 0:
            dw_ih[f] = 0
        else:
            above = torch.embedding_bag(dF, trees.tensor("children"), trees.tensor("starts"))[0]
            product(above.t(), x[:n], out=dw_ih[f])
            if dx is not None:
                product(above, w_ih[f], dx[:n], add=True)
        return dx, dw_ih, dw_hh, db


def _take_places(trees: Trees, h: Tensor, level: Level, arity: int, out: Tensor) -> None:
    """The children's rows of h side by side. h: (N + 1, H), with zeros for those not there."""
    child, _ = trees.slots(arity)
    rows = child[level.first * arity : level.last * arity]
    torch.index_select(h, 0, rows, out=out[level.first : level.last].view(len(rows), -1))


class NAry(Walk):
    equations = staticmethod(nary_equations)

    @staticmethod
    def gates(P: Tensor, H: int) -> tuple[Gates, Tensor]:
        """i, g, o and all f of (rows, (3 + arity) * H)."""
        width = P.shape[1]
        g, o = P[:, width - 2 * H :].chunk(2, 1)
        f = P[:, H : width - 2 * H].unflatten(1, (width // H - 3, H))
        return (P[:, :H], g, o), f

    @staticmethod
    def up(trees, x, alone, w_ih, w_hh, bias):
        n, N, H = trees.num_inner, trees.num_nodes, len(w_ih) // 4
        arity = w_hh.shape[1] // H
        u = w_hh.t()
        P, G = x.new_empty(n, (3 + arity) * H), x.new_empty(N - n, 3 * H)
        # a row more, of zeros, stands for the children that are not there
        h, c = x.new_empty(N + 1, H), x.new_empty(N + 1, H)
        h[N], c[N] = 0, 0
        tanh_c = x.new_empty(N, H)
        h_below, c_below = x.new_empty(n, arity * H), x.new_empty(n, arity * H)
        _affine(x if alone else x[n:], _igo(w_ih), None if bias is None else _igo(bias), G)
        (i, g, o), f = NAry.gates(P, H)
        for k, a in enumerate((i, f[:, 0], g, o)):
            rows = slice(k * H, (k + 1) * H)
            b = None if bias is None else bias[rows]
            _fill(b, a) if alone else _affine(x[:n], w_ih[rows], b, a)
        f[:, 1:] = f[:, :1]

        _lstm_up(G.chunk(3, 1), None, c[n:N], tanh_c[n:], h[n:N])
        for level in reversed(trees.levels):
            rows = slice(level.first, level.last)
            _take_places(trees, h, level, arity, h_below)
            _take_places(trees, c, level, arity, c_below)
            own, f = NAry.gates(product(h_below[rows], u, P[rows], add=True), H)
            torch.sigmoid_(f)
            before = (f * c_below[rows].view_as(f)).sum(1)
            _lstm_up(own, before, c[rows], tanh_c[rows], h[rows])
        return (h[:N], c[:N]), (P, G, tanh_c, h_below, c_below)

    @staticmethod
    def down(trees, x, alone, weights, saved, grads, wants_x):
        w_ih, w_hh, _ = weights
        P, G, tanh_c, h_below, c_below = saved
        (N, H), n = tanh_c.shape, trees.num_inner
        arity = w_hh.shape[1] // H
        dh, dc = (torch.zeros_like(tanh_c) if g is None else g for g in grads)
        dP, dG = torch.empty_like(P), torch.empty_like(G)
        dh_below, dc_below = torch.empty_like(h_below), torch.empty_like(c_below)
        _, place = trees.slots(arity)

        def take(first: int, last: int) -> None:
            """From the parents."""
            at = place[first:last]
            dh[first:last] += dh_below.view(-1, H).index_select(0, at)
            dc[first:last] += dc_below.view(-1, H).index_select(0, at)

        for first, last, *_ in trees.levels:
            if first:
                take(first, last)
            rows = slice(first, last)
            (gates, f), (dgates, df) = NAry.gates(P[rows], H), NAry.gates(dP[rows], H)
            _lstm_down(gates, tanh_c[rows], dh[rows], dc[rows], dgates)
            above = dc[rows].unsqueeze(1)
            torch.mul(above, c_below[rows].view_as(f), out=df)
            sigmoid_backward(df, f, grad_input=df)
            torch.mul(above, f, out=dc_below[rows].view_as(f))
            product(dP[rows], w_hh, out=dh_below[rows])
        single = trees.leaf_roots[1]
        if single < N:
            take(single, N)
        _lstm_down(G.chunk(3, 1), tanh_c[n:], dh[n:], dc[n:], dG.chunk(3, 1))

        (di, dg, do), df = NAry.gates(dP, H)
        da = torch.cat((di, df.sum(1), dg, do), 1)
        x_leaf = x if alone else x[n:]
        dw_ih = torch.zeros_like(w_ih) if alone else product(da.t(), x[:n])
        db = da.sum(0)
        for d, rows in ((dG[:, :H], slice(0, H)), (dG[:, H:], slice(2 * H, 4 * H))):
            product(d.t(), x_leaf, dw_ih[rows], add=True)
            db[rows] += d.sum(0)
        dx = None
        if wants_x:
            dx = torch.empty_like(x)
            product(dG, _igo(w_ih), out=dx if alone else dx[n:])
            if not alone:
                product(da, w_ih, out=dx[:n])
        return dx, dw_ih, product(dP.t(), h_below), db


class Recursive(Walk):
    activate: Callable[[Tensor], Tensor]
    #: (gradient of h, h, where the gradient of the pre-activation goes)
    differentiate: Callable[[Tensor, Tensor, Tensor], Any]

    @classmethod
    def up(cls, trees, x, alone, w_ih, w_hh, bias):
        n, N, H = trees.num_inner, trees.num_nodes, len(w_ih)
        arity = w_hh.shape[1] // H
        h = x.new_empty(N + 1, H)
        h[N] = 0
        below = x.new_empty(n, arity * H)
        _affine(x, w_ih, bias, h[n:N] if alone else h[:N])
        if alone:
            _fill(bias, h[:n])
        cls.activate(h[n:N])
        for level in reversed(trees.levels):
            _take_places(trees, h, level, arity, below)
            rows = slice(level.first, level.last)
            cls.activate(product(below[rows], w_hh.t(), h[rows], add=True))
        return (h[:N],), (h[:N], below)

    @classmethod
    def down(cls, trees, x, alone, weights, saved, grads, wants_x):
        w_ih, w_hh, _ = weights
        h, below = saved
        (N, H), n = h.shape, trees.num_inner
        (dh,) = grads
        dbelow = torch.empty_like(below)
        _, place = trees.slots(w_hh.shape[1] // H)

        def take(first: int, last: int) -> None:
            """From the parents."""
            dh[first:last] += dbelow.view(-1, H).index_select(0, place[first:last])

        for first, last, *_ in trees.levels:
            if first:
                take(first, last)
            cls.differentiate(dh[first:last], h[first:last], dh[first:last])
            product(dh[first:last], w_hh, out=dbelow[first:last])
        single = trees.leaf_roots[1]
        if single < N:
            take(single, N)
        cls.differentiate(dh[n:], h[n:], dh[n:])
        own = dh[n:] if alone else dh
        dx = product(own, w_ih) if wants_x else None
        return dx, product(own.t(), x), product(dh[:n].t(), below), dh.sum(0)


class RecursiveTanh(Recursive):
    equations = staticmethod(_recursive_equations(torch.tanh))
    activate = staticmethod(torch.tanh_)

    @staticmethod
    def differentiate(dh: Tensor, h: Tensor, out: Tensor) -> None:
        tanh_backward(dh, h, grad_input=out)


class RecursiveRelu(Recursive):
    equations = staticmethod(_recursive_equations(torch.relu))
    activate = staticmethod(torch.relu_)

    @staticmethod
    def differentiate(dh: Tensor, h: Tensor, out: Tensor) -> None:
        relu_backward(dh, h, 0, grad_input=out)


KINDS: dict[str, type[Walk]] = {
    "child_sum": ChildSum,
    "nary": NAry,
    "recursive_tanh": RecursiveTanh,
    "recursive_relu": RecursiveRelu,
}
