"""Tree-structured recurrent networks: the state of a node is made of its children's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.checks import positive
from ..ops.modes import outside_graphs
from ..ops.tree_walks import tree_recurrence
from ..ops.trees import Trees


class _TreeNetwork(nn.Module):
    """What the networks share."""

    _fastseq_kind: str  # of ops.tree_walks
    bias: Tensor | None

    def __init__(self, input_size: int, hidden_size: int, bias: bool) -> None:
        super().__init__()
        self.input_size = positive("input_size", input_size)
        self.hidden_size = positive("hidden_size", hidden_size)
        if not isinstance(bias, bool):
            raise TypeError(f"bias should be of type bool, got: {type(bias).__name__}")

    def _register(self, rows: int, w_hh: tuple[int, int], bias: bool, **kind: Any) -> None:
        """rows: of weight_ih."""
        self.weight_ih = nn.Parameter(torch.empty(rows, self.input_size, **kind))
        self.weight_hh = nn.Parameter(torch.empty(w_hh, **kind))
        self.register_parameter("bias", nn.Parameter(torch.empty(rows, **kind)) if bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all parameters from U(-1/sqrt(H), 1/sqrt(H)), as torch.nn's recurrent layers do."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    # a graph would hold for one batch of trees, so that every batch would compile another
    @outside_graphs
    def _states(self, x: Tensor, trees: Trees) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Of all nodes, and of the roots."""
        self._check(x, trees)
        weight = self.weight_ih
        # autocast ends here: states are of the parameters' type
        with torch.autocast(x.device.type, enabled=False):
            states = tree_recurrence(
                self._fastseq_kind, trees, x.to(weight.dtype), weight, self.weight_hh, self.bias
            )
        return states, tuple(s.index_select(0, trees.roots) for s in states)

    def _check(self, x: Tensor, trees: Trees) -> None:
        if not isinstance(trees, Trees):
            raise TypeError(f"trees: expected fastseq.Trees, got {type(trees).__name__}")
        if not isinstance(x, Tensor):
            raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
        N, L, I = trees.num_nodes, trees.num_leaves, self.input_size  # noqa: E741
        if x.dim() != 2 or x.shape[0] not in (N, L) or x.shape[1] != I:
            raise ValueError(
                f"x: expected (N, input_size) = ({N}, {I}), a row for each node, or "
                f"(L, input_size) = ({L}, {I}), a row for each leaf, got {tuple(x.shape)}"
            )
        device, dtype = self.weight_ih.device, self.weight_ih.dtype
        if x.device != device:
            raise RuntimeError(
                f"x: expected it on the parameters' device {device}, got {x.device}; use "
                f"x.to({str(device)!r})"
            )
        if trees.device != device:
            raise RuntimeError(
                f"trees: expected them on the parameters' device {device}, got {trees.device}; "
                f"use trees.to({str(device)!r})"
            )
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(
                f"x: expected the parameters' dtype {dtype}, got {x.dtype}; use x.to({dtype})"
            )

    def extra_repr(self) -> str:
        shown = f"{self.input_size}, {self.hidden_size}"
        return shown if self.bias is not None else f"{shown}, bias=False"


class ChildSumTreeLSTM(_TreeNetwork):
    r"""The child-sum Tree-LSTM (Tai et al. 2015): any number of children, in no order.

    .. math::
        \tilde h_j &= \sum_{k \in C(j)} h_k \\
        i_j &= \sigma(W_i x_j + U_i \tilde h_j + b_i) \\
        f_{jk} &= \sigma(W_f x_j + U_f h_k + b_f) \\
        g_j &= \tanh(W_g x_j + U_g \tilde h_j + b_g) \\
        o_j &= \sigma(W_o x_j + U_o \tilde h_j + b_o) \\
        c_j &= i_j \odot g_j + \sum_{k \in C(j)} f_{jk} \odot c_k \\
        h_j &= o_j \odot \tanh(c_j)

    The paper's u is g here, as in torch.nn.LSTM. A tree that is a chain is an LSTM over its nodes
    from the leaf to the root, with torch.nn.LSTM's weights and the sum of its biases.

    Args:
        input_size, hidden_size: I and H.
        bias: False leaves b out.
        device, dtype: of the parameters.

    Parameters: ``weight_ih`` (4H, I), ``weight_hh`` (4H, H) and ``bias`` (4H,), each with the rows
    of i, f, g, o in this order.

    Source: Tai, Socher, Manning 2015, Improved Semantic Representations From Tree-Structured Long
    Short-Term Memory Networks, equations 2 to 8.
    """

    _fastseq_kind = "child_sum"

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device=None, dtype=None
    ) -> None:
        super().__init__(input_size, hidden_size, bias)
        H = hidden_size
        self._register(4 * H, (4 * H, H), bias, device=device, dtype=dtype)

    def forward(self, x: Tensor, trees: Trees) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The state of every node, and those of the roots.

        Args:
            x: (N, I), a row for each node of all trees, in their order; or (L, I), a row for each
                leaf alone. An inner node then has no input: W x is zero there.
            trees: on the parameters' device.

        Returns:
            h (N, H); and (h_n, c_n) of the roots, (B, H) each, with B trees.
        """
        (h, _), (h_n, c_n) = self._states(x, trees)
        return h, (h_n, c_n)


class NaryTreeLSTM(_TreeNetwork):
    r"""The N-ary Tree-LSTM (Tai et al. 2015): up to N children, each with weights of its place.

    .. math::
        i_j &= \sigma(W_i x_j + \sum_l U_{i,l} h_{jl} + b_i) \\
        f_{jk} &= \sigma(W_f x_j + \sum_l U_{f,kl} h_{jl} + b_f) \\
        g_j &= \tanh(W_g x_j + \sum_l U_{g,l} h_{jl} + b_g) \\
        o_j &= \sigma(W_o x_j + \sum_l U_{o,l} h_{jl} + b_o) \\
        c_j &= i_j \odot g_j + \sum_l f_{jl} \odot c_{jl} \\
        h_j &= o_j \odot \tanh(c_j)

    Every child has a forget gate, and every forget gate sees all children. h and c of a child that
    is not there are zero. With ``arity=2`` this is the Tree-LSTM of binary constituency trees, with
    ``arity=1`` an LSTM.

    Args:
        input_size, hidden_size: I and H.
        bias: False leaves b out.
        device, dtype: of the parameters.
        arity: N, the number of children of a node at most.

    Parameters: ``weight_ih`` (4H, I) and ``bias`` (4H,), with the rows of i, f, g, o in this order;
    ``weight_hh`` ((3 + N) H, N H), with the rows of i, f_1 to f_N, g, o, and the columns of the
    children 1 to N.

    Source: Tai, Socher, Manning 2015, Improved Semantic Representations From Tree-Structured Long
    Short-Term Memory Networks, equations 9 to 14.
    """

    _fastseq_kind = "nary"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        arity: int = 2,
    ) -> None:
        super().__init__(input_size, hidden_size, bias)
        H, N = hidden_size, positive("arity", arity)
        self.arity = N
        self._register(4 * H, ((3 + N) * H, N * H), bias, device=device, dtype=dtype)

    def _check(self, x: Tensor, trees: Trees) -> None:
        super()._check(x, trees)
        trees.check_arity(self.arity)

    def forward(self, x: Tensor, trees: Trees) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The state of every node, and those of the roots.

        Args:
            x: (N, I), a row for each node of all trees, in their order; or (L, I), a row for each
                leaf alone. An inner node then has no input: W x is zero there.
            trees: on the parameters' device, with no more children of a node than ``arity``.

        Returns:
            h (N, H); and (h_n, c_n) of the roots, (B, H) each, with B trees.
        """
        (h, _), (h_n, c_n) = self._states(x, trees)
        return h, (h_n, c_n)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, arity={self.arity}"


class RecursiveNetwork(_TreeNetwork):
    r"""The recursive neural network (Socher et al. 2011): a node is a layer over its children.

    .. math::
        h_j = f(W x_j + U [h_{j1}; \dots; h_{jN}] + b)

    with tanh or relu for f, and zeros for a child that is not there. Given the inputs of the leaves
    alone, a leaf is :math:`f(W x_j + b)` and a node above :math:`f(U [h_{j1}; h_{j2}] + b)`, the
    paper's equations but for b, of which the paper has one for either.

    Args:
        input_size, hidden_size: I and H.
        bias: False leaves b out.
        device, dtype: of the parameters.
        arity: N, the number of children of a node at most.
        nonlinearity: 'tanh' or 'relu'.

    Parameters: ``weight_ih`` (H, I), ``weight_hh`` (H, N H), with the columns of the children 1 to
    N, and ``bias`` (H,).

    Source: Socher, Lin, Ng, Manning 2011, Parsing Natural Scenes and Natural Language with
    Recursive Neural Networks.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        arity: int = 2,
        nonlinearity: str = "tanh",
    ) -> None:
        super().__init__(input_size, hidden_size, bias)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity: expected 'tanh' or 'relu', got {nonlinearity!r}")
        self.arity, self.nonlinearity = positive("arity", arity), nonlinearity
        H = hidden_size
        self._register(H, (H, arity * H), bias, device=device, dtype=dtype)

    @property
    def _fastseq_kind(self) -> str:  # type: ignore[override]
        return f"recursive_{self.nonlinearity}"

    def _check(self, x: Tensor, trees: Trees) -> None:
        super()._check(x, trees)
        trees.check_arity(self.arity)

    def forward(self, x: Tensor, trees: Trees) -> tuple[Tensor, Tensor]:
        """The state of every node, and those of the roots.

        Args:
            x: (N, I), a row for each node of all trees, in their order; or (L, I), a row for each
                leaf alone. An inner node then has no input: W x is zero there.
            trees: on the parameters' device, with no more children of a node than ``arity``.

        Returns:
            h (N, H), and h_n (B, H) of the roots, with B trees.
        """
        (h,), (h_n,) = self._states(x, trees)
        return h, h_n

    def extra_repr(self) -> str:
        more = "" if self.nonlinearity == "tanh" else f", nonlinearity={self.nonlinearity!r}"
        return f"{super().extra_repr()}, arity={self.arity}{more}"
