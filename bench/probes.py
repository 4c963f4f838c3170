"""One question a capability, put to torch.nn and to fastseq alike: see :mod:`bench.capabilities`.

A probe is a function of a :class:`Side`. It returns nothing where the capability is there, and
raises where it is not: what torch raises, or :class:`No`, :class:`Wrong` or :class:`Slow`. The
numbers are compared with :func:`loop`, the equations step by step in float64.

Sides differ only in how a thing is said, where torch.nn has another word for it (``lengths=`` and
packing) or none. This file imports no fastseq: what it adds to torch when it is imported, such as a
flop formula of oneDNN's LSTM, must not be seen on torch.nn's side.
"""

from __future__ import annotations

import copy
import importlib
import io
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

LAYERS = ("LSTM", "GRU", "RNN")
CELLS = ("LSTMCell", "GRUCell", "RNNCell")
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
#: So long that fastseq runs its kernels; SHORT where torch.nn is unrolled.
T, B, I, H = 40, 4, 5, 7  # noqa: E741  (the field's letter)
SHORT = 6
LENGTHS = (3, 6, 1, 4)
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-2,
}


class No(Exception):
    """Nothing was raised, and the capability is not there."""


class Wrong(Exception):
    """The numbers are not those of the loop."""


class Slow(Exception):
    """It works, and takes many times as long as doing without."""


@dataclass(frozen=True)
class Probe:
    name: str
    group: str
    ask: Callable[[Side], None]
    kinds: tuple[str, ...]
    seconds: float  # after which the answer is no


PROBES: dict[str, Probe] = {}


def probe(group: str, name: str, kinds: tuple[str, ...] = LAYERS, seconds: float = 60.0):
    def enter(ask: Callable[[Side], None]) -> Callable[[Side], None]:
        if name in PROBES:
            raise ValueError(f"two probes are named {name!r}")
        PROBES[name] = Probe(name, group, ask, kinds, seconds)
        return ask

    return enter


@dataclass(frozen=True)
class Side:
    """``library`` 'torch.nn' or 'fastseq', and which layer or cell of it."""

    library: str
    kind: str

    @property
    def constructor(self) -> Any:
        return getattr(importlib.import_module(self.library), self.kind)

    @property
    def base(self) -> str:
        return self.kind.removesuffix("Cell")

    def layer(self, *sizes: int, **options: Any) -> Any:
        torch.manual_seed(0)
        return self.constructor(*(sizes or (I, H)), **options)

    def padded(self, layer: Any, x: Tensor, lengths: Tensor, hx: Any = None) -> tuple[Any, Any]:
        """A padded batch in, a padded output, as each side says it."""
        if self.library == "fastseq":
            return layer(x, hx, lengths=lengths)
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        y, state = layer(packed, hx)
        return pad_packed_sequence(y, total_length=x.shape[0])[0], state

    def loop(self, layer: Any, x: Tensor, **options: Any) -> tuple[Tensor, Any, Tensor]:
        return loop(self.base, weights_of(layer), x, **options)


def weights_of(layer: Any, k: int = 0) -> list[Tensor]:
    """w_ih, w_hh, b_ih, b_hh as they are now, of a cell or of the k-th layer."""
    last = "" if hasattr(layer, "weight_ih") else f"_l{k}"
    return [
        getattr(layer, name + last) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    ]


def loop(
    kind: str,
    weights: Sequence[Tensor],
    x: Tensor,
    hx: Any = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Any, Tensor]:
    """y (T, B, H), the last state and c (T, B, H) of every step, in float64 and differentiable."""
    x = x.double()
    w_ih, w_hh, b_ih, b_hh = (w.double() for w in weights)
    size = w_hh.shape[1]
    given = hx if isinstance(hx, tuple) else (hx, None)
    h, c = (
        x.new_zeros(x.shape[1], size) if s is None else s.double().reshape(-1, size) for s in given
    )
    outputs, cells = [], []
    for t, x_t in enumerate(x.unbind(0)):
        if reset is not None:
            goes_on = ~reset[t][:, None]
            h, c = h * goes_on, c * goes_on
        a, s = x_t @ w_ih.t() + b_ih, h @ w_hh.t() + b_hh
        c_new = c
        if kind == "LSTM":
            i, f, g, o = (a + s).chunk(4, 1)
            c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_new = o.sigmoid() * c_new.tanh()
        elif kind == "GRU":
            (a_r, a_z, a_n), (s_r, s_z, s_n) = a.chunk(3, 1), s.chunk(3, 1)
            z = (a_z + s_z).sigmoid()
            h_new = (1 - z) * (a_n + (a_r + s_r).sigmoid() * s_n).tanh() + z * h
        else:
            h_new = (a + s).tanh()
        here = torch.ones_like(h, dtype=torch.bool)
        if lengths is not None:
            here = (t < lengths)[:, None].expand_as(h)
        h, c = torch.where(here, h_new, h), torch.where(here, c_new, c)
        outputs.append(torch.where(here, h_new, torch.zeros_like(h)))
        cells.append(c)
    state = (h[None], c[None]) if kind == "LSTM" else h[None]
    return torch.stack(outputs), state, torch.stack(cells)


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [t for part in value for t in flat(part)]


def an_input(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape or (T, B, I), generator=random, dtype=torch.float64).to(dtype)


def differs(found: Any, truth: Any, what: str = "values") -> None:
    """Raise Wrong where it does, by more than the type of ``found`` allows."""
    one, other = flat(found), flat(truth)
    if len(one) != len(other):
        raise Wrong(f"{len(one)} tensors where {len(other)} are due")
    for a, b in zip(one, other, strict=True):
        if a.numel() != b.numel():
            raise Wrong(f"shape {tuple(a.shape)} where {tuple(b.shape)} is due")
        tolerance = TOLERANCE[a.dtype]
        error = float((a.detach().double().reshape(b.shape) - b.detach()).abs().max())
        if not error <= tolerance * (1 + float(b.detach().abs().max())):
            zero = ", all zero" if not a.any() else ""
            raise Wrong(f"{what} off by {error:.1e}{zero}")


def gradients(outputs: Any, leaves: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    loss = sum(t.double().square().sum() for t in flat(outputs))
    return torch.autograd.grad(loss, leaves, **options)  # type: ignore[arg-type]


def check_training(side: Side, layer: Any, x: Tensor, run: Callable, **options: Any) -> None:
    """Outputs of ``run(x)`` and the gradients of x and all weights, against the loop's."""
    leaf = x.clone().requires_grad_()
    outputs = run(leaf)
    exact = x.double().requires_grad_()
    y, state, _ = side.loop(layer, exact, **options)
    leaves = weights_of(layer)
    truth = gradients((y, state), [exact, *leaves])
    found = gradients(outputs, [leaf, *leaves])
    differs(outputs, (y, state))
    differs(found, truth, "gradients")


def not_slower(
    function: Callable, baseline: Callable, than: str, times: float = 3.0, rounds: int = 9
) -> None:
    """Raise Slow where one takes many times the other's processor time: medians in turn."""
    samples: tuple[list[float], list[float]] = ([], [])
    for one in (function, baseline):
        one()
    for _ in range(rounds):
        for one, kept in zip((function, baseline), samples, strict=True):
            start = time.process_time()
            one()
            kept.append(time.process_time() - start)
    ratio = statistics.median(samples[0]) / statistics.median(samples[1])
    if ratio > times:
        raise Slow(f"×{ratio:.0f} {than}" if ratio >= 10 else f"×{ratio:.1f} {than}")


def answer(name: str, side: Side) -> str:
    """In this process: 'yes', 'no: ...', 'wrong: ...' or 'slow: ...'."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    try:
        PROBES[name].ask(side)
    except (No, Wrong, Slow) as error:
        return f"{type(error).__name__.lower()}: {error}"
    except Exception as error:
        return f"no: {type(error).__name__}: {first_words(error)}"
    return "yes"


def first_words(error: Exception, most: int = 70) -> str:
    plain = re.sub(r"\x1b\[\d*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    words = (lines or [""])[0]
    return words if len(words) <= most else words[:most].rsplit(" ", 1)[0] + " …"


# Calling

CALLING = "Calling"


@probe(CALLING, "padded batch in, padded output, last valid states")
def lengths(side: Side) -> None:
    layer, n = side.layer(), torch.tensor([9, T, 1, 25])
    check_training(side, layer, an_input(), lambda x: side.padded(layer, x, n), lengths=n)


@probe(CALLING, "lengths of 0")
def zero_lengths(side: Side) -> None:
    layer, n = side.layer(), torch.tensor([9, 0, 40, 0])
    hx = an_input(1, B, H)
    hx = (hx, hx.cos()) if side.kind == "LSTM" else hx
    check_training(
        side, layer, an_input(), lambda x: side.padded(layer, x, n, hx), lengths=n, hx=hx
    )


@probe(CALLING, "jagged NestedTensor")
def jagged(side: Side) -> None:
    layer, x = side.layer(batch_first=True), an_input(SHORT, B, I)
    parts = [x[:n, b] for b, n in enumerate(LENGTHS)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    y = layer(nested)[0]
    truth = side.loop(layer, x, lengths=torch.tensor(LENGTHS))[0]
    leaves = weights_of(layer)
    differs(list(y.unbind()), [truth[:n, b] for b, n in enumerate(LENGTHS)])
    differs(gradients(y.values(), leaves), gradients(truth, leaves), "gradients")


@probe(CALLING, "sequences that begin in mid-batch, at any step")
def reset(side: Side) -> None:
    layer = side.layer()
    begins = torch.rand(T, B, generator=torch.Generator().manual_seed(3)) < 0.3
    check_training(side, layer, an_input(), lambda x: layer(x, reset=begins), reset=begins)


@probe(CALLING, "cell state of every step, with gradients", ("LSTM",))
def all_states(side: Side) -> None:
    layer, x = side.layer(), an_input()
    _, _, along = layer(x, all_states=True)
    truth, leaves = side.loop(layer, x)[2], weights_of(layer)
    differs(along, truth)
    differs(gradients(along, leaves), gradients(truth, leaves), "gradients")


@probe(CALLING, "backward in eval mode")
def eval_mode(side: Side) -> None:
    layer = side.layer().eval()
    check_training(side, layer, an_input(), layer)


@probe(CALLING, "output edited in place before backward")
def edited(side: Side) -> None:
    layer, x = side.layer(), an_input()
    leaves = weights_of(layer)
    truth = gradients(side.loop(layer, x)[0] * 2, leaves)
    differs(gradients(layer(x)[0].mul_(2), leaves), truth, "gradients")


@probe(CALLING, "streams: the state carried, detached between windows")
def stream(side: Side) -> None:
    layer, x = side.layer(), an_input(100, B, I)
    truth = side.loop(layer, x)[0]
    state, outputs = None, []
    for window in x.split(40):
        y, state = layer(window, state)
        state = tuple(s.detach() for s in state) if side.kind == "LSTM" else state.detach()
        outputs.append(y)
    differs(torch.cat(outputs), truth)


def check_mask(side: Side, **options: Any) -> None:
    """A sequence keeps its mask whatever batch it stands in, and another seed gives another."""
    layer, x, ids = side.layer(**options), an_input(), torch.arange(B)
    whole = layer(x, row_ids=ids, seed=5)[0]
    parts = [layer(x[:, b : b + 1], row_ids=ids[b : b + 1], seed=5)[0] for b in range(B)]
    differs(torch.cat(parts, 1), whole.double())
    if torch.equal(whole, layer(x, row_ids=ids, seed=6)[0]):
        raise No("another seed, the same mask")


@probe(CALLING, "variational dropout, the same however the batch is split")
def variational(side: Side) -> None:
    check_mask(side, recurrent_dropout=0.5, input_dropout=0.3)


@probe(CALLING, "DropConnect of the recurrent weights")
def drop_connect(side: Side) -> None:
    check_mask(side, weight_dropout=0.5)


@probe(CALLING, "zoneout, the same however the batch is split")
def zoneout(side: Side) -> None:
    check_mask(side, zoneout=0.3)


@probe(CALLING, "more than 65,535 steps")
def long_sequence(side: Side) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, x = side.layer(2, 3).to(device), an_input(70_000, 1, 2).to(device)
    with torch.no_grad():
        differs(layer(x)[0][:100], side.loop(layer, x[:100])[0])


# Stacks

STACKS = "Stacks"


def stacked(side: Side, widths: tuple[int, ...] = (H, 6), **options: Any) -> Any:
    """Layers of these widths one on another."""
    torch.manual_seed(0)
    if side.library == "fastseq":
        container = importlib.import_module("fastseq").Stacked
        return container.of(side.constructor, I, widths, **options)
    if options:
        raise No("torch.nn has no such container")
    sizes = (I, *widths)
    return nn.Sequential(*[side.constructor(*pair) for pair in zip(sizes, widths, strict=False)])


def check_stack(side: Side, stack: Any, x: Tensor, connect: Callable) -> None:
    """connect: (number of the layer, its input, its output) -> the input of the next one."""
    y, truth = stack(x)[0], x.double()
    for k, layer in enumerate(stack.layers):
        truth = connect(k, truth, side.loop(layer, truth)[0])
    leaves = [w for layer in stack.layers for w in weights_of(layer)]
    differs(y, truth)
    differs(gradients(y, leaves), gradients(truth, leaves), "gradients")


@probe(STACKS, "layers of different widths, called as one")
def widths_differ(side: Side) -> None:
    check_stack(side, stacked(side), an_input(), lambda k, x, y: y)


@probe(STACKS, "residual connections between layers")
def residual(side: Side) -> None:
    stack = stacked(side, (I, I, I), connections="residual")
    check_stack(side, stack, an_input(), lambda k, x, y: x + y)


@probe(STACKS, "highway connections between layers")
def highway(side: Side) -> None:
    stack = stacked(side, (I, I), connections="highway")

    def connect(k: int, x: Tensor, y: Tensor) -> Tensor:
        own = stack.connections[k].transform
        gate = (x @ own.weight.double().t() + own.bias.double()).sigmoid()
        return gate * y + (1 - gate) * x

    check_stack(side, stack, an_input(), connect)


@probe(STACKS, "a stack for each direction of a ragged batch, joined at the end")
def two_stacks(side: Side) -> None:
    stack, x = stacked(side, bidirectional="stacks"), an_input(SHORT, B, I)
    y = stack(x, lengths=torch.tensor(LENGTHS))[0]
    for b, n in enumerate(LENGTHS):
        one, halves = x[:n, b : b + 1].double(), []
        for layers, truth in ((stack.layers, one), (stack.reverse_layers, one.flip(0))):
            for layer in layers:
                truth = side.loop(layer, truth)[0]
            halves.append(truth[:, 0])
        differs(y[:n, b], torch.cat([halves[0], halves[1].flip(0)], 1))
        if y[n:, b].any():
            raise Wrong("padding that is not zero")


# Types

TYPES = "Numbers"


def half_training(side: Side, dtype: torch.dtype) -> None:
    layer = side.layer(dtype=dtype)
    check_training(side, layer, an_input(dtype=dtype), layer)
    large = [side.layer(64, 64).to(kind) for kind in (dtype, torch.float32)]
    xs = [an_input(32, 8, 64, dtype=kind) for kind in (dtype, torch.float32)]
    steps = [partial(lambda m, x: m(x)[0].sum().backward(), *one) for one in zip(large, xs)]  # noqa: B905
    not_slower(*steps, "float32's time")


@probe(TYPES, "float16 training on CPU")
def float16(side: Side) -> None:
    half_training(side, torch.float16)


@probe(TYPES, "bfloat16 training on CPU")
def bfloat16(side: Side) -> None:
    half_training(side, torch.bfloat16)


def of_type(outputs: Any, dtype: torch.dtype) -> None:
    names = ("y", "h_n", "c_n") if len(flat(outputs)) == 3 else ("y", "h_n")
    found = {n: str(t.dtype).removeprefix("torch.") for n, t in zip(names, flat(outputs))}  # noqa: B905
    if {t.dtype for t in flat(outputs)} != {dtype}:
        raise No(", ".join(f"{name} {kind}" for name, kind in found.items()))


def autocast_layer(side: Side, packed: bool, state: torch.dtype | None = None) -> None:
    layer, x = side.layer(), an_input(SHORT, B, I) if packed else an_input()
    n = torch.tensor(LENGTHS) if packed else None
    hx: Any = None
    if state is not None:
        hx = an_input(1, B, H, dtype=state)
        hx = (hx, hx.cos()) if side.kind == "LSTM" else hx
    with torch.autocast("cpu", torch.bfloat16):
        given: Any = x
        if n is not None:
            given = pack_padded_sequence(x, n, enforce_sorted=False)
        y, last = layer(given, hx)
    if isinstance(y, PackedSequence):
        y = pad_packed_sequence(y)[0]
    of_type((y, last), torch.bfloat16)
    truth = side.loop(layer, x, lengths=n, hx=hx)[:2]
    differs((y, last), truth)
    leaves = weights_of(layer)
    found = [g.bfloat16() for g in gradients((y, last), leaves)]
    differs(found, gradients(truth, leaves), "gradients")


@probe(TYPES, "autocast, dense: all outputs in its type")
def autocast_dense(side: Side) -> None:
    autocast_layer(side, packed=False)


@probe(TYPES, "autocast, packed: all outputs in its type")
def autocast_packed(side: Side) -> None:
    autocast_layer(side, packed=True)


@probe(TYPES, "autocast: a state in float32")
def autocast_float32_state(side: Side) -> None:
    autocast_layer(side, packed=False, state=torch.float32)


@probe(TYPES, "autocast: a state in its type")
def autocast_low_state(side: Side) -> None:
    autocast_layer(side, packed=False, state=torch.bfloat16)


@probe(TYPES, "autocast of cells: all outputs in its type", CELLS)
def autocast_cells(side: Side) -> None:
    cell, x = side.layer(), an_input(B, I)
    with torch.autocast("cpu", torch.bfloat16):
        out = cell(x)
    of_type(out, torch.bfloat16)
    differs(out, side.loop(cell, x[None])[1])


@probe(TYPES, "bfloat16: c carried in float32", ("LSTM",))
def carried_cell_state(side: Side) -> None:
    """Steps so small that bfloat16 would round them away."""
    layer = side.layer(1, 1)
    with torch.no_grad():
        for w in weights_of(layer):
            w.zero_()
        # i = o = 1/2, f near 1, g = 0.01
        layer.bias_ih_l0.copy_(torch.tensor([0.0, 12.0, 0.01, 0.0]))
    layer = layer.bfloat16()
    x = torch.zeros(600, 1, 1, dtype=torch.bfloat16)
    with torch.no_grad():
        differs(layer(x)[1], side.loop(layer, x)[1])


# Autograd

AUTOGRAD = "Autograd"


@probe(AUTOGRAD, "double backward (gradient penalty)")
def double_backward(side: Side) -> None:
    layer = side.layer()

    def penalty(run: Callable, x: Tensor) -> tuple[Tensor, ...]:
        (slope,) = gradients(run(x), [x], create_graph=True)
        return gradients(slope, [x, *weights_of(layer)])

    found = penalty(lambda x: layer(x)[0], an_input().requires_grad_())
    truth = penalty(lambda x: side.loop(layer, x)[0], an_input().double().requires_grad_())
    differs(found, truth, "second derivatives")


@probe(AUTOGRAD, "gradcheck and gradgradcheck, forward mode too")
def checks(side: Side) -> None:
    layer = side.layer(2, 2).double()
    x = an_input(3, 2, 2, dtype=torch.float64).requires_grad_()

    def run(x: Tensor) -> Tensor:
        return torch.cat([t.flatten() for t in flat(layer(x))])

    torch.autograd.gradcheck(run, x, check_forward_ad=True, fast_mode=True)
    torch.autograd.gradgradcheck(run, x, fast_mode=True)


@probe(AUTOGRAD, "forward-mode AD (dual numbers)")
def dual_numbers(side: Side) -> None:
    layer, x = side.layer(), an_input()
    from torch.autograd import forward_ad

    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.cos()))[0]).tangent
    if tangent is None:
        raise Wrong("no tangent, and no error")
    exact = torch.autograd.functional.jvp(
        lambda x: side.loop(layer, x)[0], x.double(), x.double().cos()
    )[1]
    differs(tangent, exact, "tangents")


@probe(AUTOGRAD, "many cotangents at once (is_grads_batched)")
def batched_cotangents(side: Side) -> None:
    layer, many = side.layer(), an_input(3, T, B, H)
    results = []
    for run, cotangents in (
        (lambda x: layer(x)[0], many),
        (lambda x: side.loop(layer, x)[0], many.double()),
    ):
        x = an_input(dtype=cotangents.dtype).requires_grad_()
        results.append(torch.autograd.grad(run(x), x, cotangents, is_grads_batched=True))
    differs(*results, "gradients")


@probe(AUTOGRAD, "keep the output alone for backward (memory='lean')")
def lean(side: Side) -> None:
    layer = side.layer(memory="lean")
    check_training(side, layer, an_input(), layer)


@probe(AUTOGRAD, "activation checkpointing, both forms")
def checkpointing(side: Side) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = side.layer()
    check_training(side, layer, an_input(), lambda x: checkpoint(layer, x, use_reentrant=False))
    x = an_input().requires_grad_()
    checkpoint(lambda x: layer(x)[0], x, use_reentrant=True).square().sum().backward()
    truth = gradients(side.loop(layer, an_input())[0], weights_of(layer))
    differs([w.grad for w in weights_of(layer)], truth, "gradients")


@probe(AUTOGRAD, "saved tensors offloaded (save_on_cpu)")
def offloaded(side: Side) -> None:
    layer = side.layer()
    with torch.autograd.graph.save_on_cpu():
        check_training(side, layer, an_input(), layer)


# torch.func

FUNC = "torch.func"


def functions(side: Side, sizes: tuple[int, ...] = ()) -> tuple[Any, dict, Callable, Callable]:
    """A layer, its parameters, and its output as a function of (parameters, x), twice."""
    layer = side.layer(*sizes)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def run(parameters: dict, x: Tensor) -> Tensor:
        return functional_call(layer, parameters, (x,))[0]

    def exact(parameters: dict, x: Tensor) -> Tensor:
        return loop(side.kind, list(parameters.values()), x)[0]

    return layer, parameters, run, exact


def doubled(parameters: dict) -> dict:
    return {name: p.double() for name, p in parameters.items()}


def loss_of(run: Callable) -> Callable:
    return lambda parameters, x: run(parameters, x).square().sum()


def along(parameters: dict) -> dict:
    return {name: p.cos() for name, p in parameters.items()}


@probe(FUNC, "grad")
def func_grad(side: Side) -> None:
    _, p, run, exact = functions(side)
    x = an_input()
    found = torch.func.grad(loss_of(run), (0, 1))(p, x)
    truth = torch.func.grad(loss_of(exact), (0, 1))(doubled(p), x.double())
    differs([*found[0].values(), found[1]], [*truth[0].values(), truth[1]], "gradients")


@probe(FUNC, "vmap over inputs")
def vmap_inputs(side: Side) -> None:
    layer, p, run, exact = functions(side, (16, 32))
    many = an_input(16, 32, 2, 16)
    mapped = torch.func.vmap(run, (None, 0))
    differs(mapped(p, many), torch.stack([exact(p, x) for x in many]))
    with torch.no_grad():
        not_slower(
            lambda: mapped(p, many),
            lambda: torch.stack([layer(x)[0] for x in many]),
            "a loop's time",
        )


def ensemble(p: dict, members: int = 8) -> dict:
    factors = torch.linspace(0.5, 1.5, members)
    return {name: torch.stack([w * f for f in factors]) for name, w in p.items()}


def member(stacked: dict, k: int) -> dict:
    return {name: w[k] for name, w in stacked.items()}


def vmap_ensemble(side: Side, x: Tensor, dim: int | None) -> None:
    _, p, run, exact = functions(side, (16, 32))
    stacked = ensemble(p)
    mapped = torch.func.vmap(run, (0, dim))
    each = [x if dim is None else x[k] for k in range(8)]
    truth = [exact(member(stacked, k), each[k]) for k in range(8)]
    differs(mapped(stacked, x), torch.stack(truth))
    with torch.no_grad():
        not_slower(
            lambda: mapped(stacked, x),
            lambda: torch.stack([run(member(stacked, k), each[k]) for k in range(8)]),
            "a loop's time",
        )


@probe(FUNC, "vmap over parameters (an ensemble)")
def vmap_parameters(side: Side) -> None:
    vmap_ensemble(side, an_input(32, 2, 16), None)


@probe(FUNC, "vmap over parameters and inputs")
def vmap_both(side: Side) -> None:
    vmap_ensemble(side, an_input(8, 32, 2, 16), 0)


@probe(FUNC, "per-sample gradients: vmap of grad")
def per_sample(side: Side) -> None:
    _, p, run, exact = functions(side, (16, 32))
    many = an_input(16, 32, 1, 16)
    slope = torch.func.grad(loss_of(run))
    mapped = torch.func.vmap(slope, (None, 0))
    found = mapped(p, many)
    parts = [torch.func.grad(loss_of(exact))(doubled(p), x.double()) for x in many]
    for name in p:
        differs(found[name], torch.stack([part[name] for part in parts]), "gradients")
    not_slower(lambda: mapped(p, many), lambda: [slope(p, x) for x in many], "a loop's time")


@probe(FUNC, "gradients of an ensemble: vmap of grad")
def ensemble_gradients(side: Side) -> None:
    _, p, run, exact = functions(side)
    stacked, x = ensemble(p), an_input()
    found = torch.func.vmap(torch.func.grad(loss_of(run)), (0, None))(stacked, x)
    for k in range(8):
        truth = torch.func.grad(loss_of(exact))(doubled(member(stacked, k)), x.double())
        differs([g[k] for g in found.values()], list(truth.values()), "gradients")


def derivative(side: Side, transform: Callable, reduce: bool = False) -> None:
    """transform(function of x)(x), of a small output."""
    _, p, run, exact = functions(side, (2, 3))
    x = an_input(4, 1, 2)

    def of(run: Callable, p: dict) -> Callable:
        return lambda x: loss_of(run)(p, x) if reduce else run(p, x)

    found = transform(of(run, p))(x)
    differs(found, transform(of(exact, doubled(p)))(x.double()), "derivatives")


@probe(FUNC, "jacrev")
def jacrev(side: Side) -> None:
    derivative(side, torch.func.jacrev)


@probe(FUNC, "jacfwd")
def jacfwd(side: Side) -> None:
    derivative(side, torch.func.jacfwd)


@probe(FUNC, "hessian")
def hessian(side: Side) -> None:
    derivative(side, torch.func.hessian, reduce=True)


@probe(FUNC, "jvp, of x and of parameters")
def jvp(side: Side) -> None:
    _, p, run, exact = functions(side)
    x = an_input()
    found = torch.func.jvp(run, (p, x), (along(p), x.cos()))
    p, x = doubled(p), x.double()
    differs(found, torch.func.jvp(exact, (p, x), (along(p), x.cos())), "tangents")


@probe(FUNC, "vjp, and the tangent of a pullback")
def vjp(side: Side) -> None:
    _, p, run, exact = functions(side)
    results = []
    for function, q, x in ((run, p, an_input()), (exact, doubled(p), an_input().double())):
        y, pull = torch.func.vjp(partial(function, q), x)
        (slope,) = pull(y.cos())
        results.append((slope, torch.func.jvp(pull, (y.cos(),), (y.sin(),))[1][0]))
    differs(*results, "gradients")


@probe(FUNC, "linearize")
def linearize(side: Side) -> None:
    _, p, run, exact = functions(side)
    x = an_input()
    found = torch.func.linearize(partial(run, p), x)[1](x.cos())
    truth = torch.func.jvp(partial(exact, doubled(p)), (x.double(),), (x.double().cos(),))[1]
    differs(found, truth, "tangents")


# torch.compile

COMPILE = "torch.compile(fullgraph=True)"


def check_compiled(
    side: Side,
    backend: str = "aot_eager",
    training: bool = False,
    form: str = "dense",
    dynamic: bool | None = None,
) -> None:
    layer = side.layer()
    n = None if form == "dense" else torch.tensor(LENGTHS)
    x = an_input(SHORT, B, I)
    if form == "packed":
        packed = pack_padded_sequence(x, n, enforce_sorted=False)
        compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)

        def run(x: Tensor) -> Any:
            given = pack_padded_sequence(x, n, enforce_sorted=False) if training else packed
            y, state = compiled(given)
            return pad_packed_sequence(y)[0], state
    else:

        def plain(x: Tensor) -> Any:
            return layer(x) if n is None else side.padded(layer, x, n)

        run = torch.compile(plain, fullgraph=True, backend=backend, dynamic=dynamic)
    if training:
        check_training(side, layer, x, run, lengths=n)
    else:
        with torch.no_grad():
            differs(run(x), side.loop(layer, x, lengths=n)[:2])


@probe(COMPILE, "forward, dense")
def compile_forward(side: Side) -> None:
    check_compiled(side)


@probe(COMPILE, "forward and backward, dense")
def compile_training(side: Side) -> None:
    check_compiled(side, training=True)


@probe(COMPILE, "forward and backward, padded and lengths")
def compile_lengths(side: Side) -> None:
    check_compiled(side, training=True, form="lengths")


@probe(COMPILE, "forward and backward, a PackedSequence passed in")
def compile_packed(side: Side) -> None:
    check_compiled(side, training=True, form="packed")


@probe(COMPILE, "forward and backward by inductor", ("LSTM", "GRU"), seconds=300)
def compile_inductor(side: Side) -> None:
    check_compiled(side, backend="inductor", training=True)


def allow_rnn() -> None:
    torch._dynamo.config.allow_rnn = True


@probe(COMPILE, "allow_rnn: forward, dense")
def allowed_forward(side: Side) -> None:
    allow_rnn()
    check_compiled(side)


@probe(COMPILE, "allow_rnn: forward and backward, dense")
def allowed_training(side: Side) -> None:
    allow_rnn()
    check_compiled(side, training=True)


@probe(COMPILE, "allow_rnn: forward and backward by inductor", ("LSTM", "GRU"), seconds=300)
def allowed_inductor(side: Side) -> None:
    allow_rnn()
    check_compiled(side, backend="inductor", training=True)


@probe(COMPILE, "allow_rnn: the same of two layers", ("LSTM", "GRU"), seconds=300)
def allowed_two_layers(side: Side) -> None:
    allow_rnn()
    layer, x = side.layer(I, H, 2), an_input(SHORT, B, I)
    y = torch.compile(layer, fullgraph=True)(x)[0]
    weights = [weights_of(layer, k) for k in range(2)]
    truth = loop(side.kind, weights[1], loop(side.kind, weights[0], x)[0])[0]
    leaves = [w for one in weights for w in one]
    differs(y, truth)
    differs(gradients(y, leaves), gradients(truth, leaves), "gradients")


def check_one_graph(side: Side) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = side.layer()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    steps = (6, 9, 20)
    for T in steps:
        x = an_input(T, B, I)
        with torch.no_grad():
            differs(compiled(x), side.loop(layer, x)[:2])
    if counter.frame_count > 1:
        raise No(f"{counter.frame_count} graphs for {len(steps)} lengths in time")


@probe(COMPILE, "one graph for every T")
def one_graph(side: Side) -> None:
    check_one_graph(side)


@probe(COMPILE, "one graph for every T, B and lengths")
def one_padded_graph(side: Side) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    layer = side.layer()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(
        partial(side.padded, layer), fullgraph=True, dynamic=True, backend=counter
    )
    for T, B in ((6, 3), (9, 8), (20, 2)):
        x, n = an_input(T, B, I), torch.arange(B) % T
        n[0] = T
        with torch.no_grad():
            differs(compiled(x, n), side.loop(layer, x, lengths=n)[:2])
    if counter.frame_count > 1:
        raise No(f"{counter.frame_count} graphs for 3 sizes")


@probe(COMPILE, "pack_padded_sequence in the graph")
def compile_packing(side: Side) -> None:
    layer, n, x = side.layer(), torch.tensor(LENGTHS), an_input(SHORT, B, I)

    def run(x: Tensor) -> Tensor:
        return layer(pack_padded_sequence(x, n, enforce_sorted=False))[0].data

    torch.compile(run, fullgraph=True, backend="aot_eager")(x)


@probe(COMPILE, "allow_rnn: one graph for every T", seconds=120)
def allowed_one_graph(side: Side) -> None:
    allow_rnn()
    check_one_graph(side)


@probe(COMPILE, "outputs edited in the graph")
def compile_edited(side: Side) -> None:
    layer = side.layer()

    def run(x: Tensor) -> Any:
        y, state = layer(x)
        y.mul_(2)
        return y, state

    leaves, x = weights_of(layer), an_input(SHORT, B, I)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    y, state, _ = side.loop(layer, x)
    truth = gradients((2 * y, state), leaves)
    differs(gradients(compiled(x), leaves), truth, "gradients")


@probe(COMPILE, "cells, forward and backward", CELLS)
def compile_cells(side: Side) -> None:
    cell, x = side.layer(), an_input(B, I)
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    truth, leaves = side.loop(cell, x[None])[1], weights_of(cell)
    found = compiled(x)
    differs(found, truth)
    differs(gradients(found, leaves), gradients(truth, leaves), "gradients")


@probe(COMPILE, "inductor with implicit_fallbacks=False", ("LSTM", "GRU"), seconds=300)
def compile_no_fallbacks(side: Side) -> None:
    import torch._inductor.config

    torch._inductor.config.implicit_fallbacks = False
    check_compiled(side, backend="inductor", training=True)


@probe(COMPILE, "torch.func.grad of a layer in the graph")
def compile_func(side: Side) -> None:
    _, p, run, exact = functions(side)
    x = an_input(SHORT, B, I)
    compiled = torch.compile(torch.func.grad(loss_of(run), 1), fullgraph=True, backend="aot_eager")
    truth = torch.func.grad(loss_of(exact), 1)(doubled(p), x.double())
    differs(compiled(p, x), truth, "gradients")


@probe(COMPILE, "second derivatives through the graph")
def compile_twice(side: Side) -> None:
    layer = side.layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = an_input().requires_grad_()
    (slope,) = gradients(compiled(x)[0], [x], create_graph=True)
    gradients(slope, [x])


# Programs

EXPORT = "torch.export, ONNX and TorchScript"


def exported(side: Side, layer: Any, strict: bool) -> Any:
    steps, batch = torch.export.Dim("T", min=2), torch.export.Dim("B", min=2)
    return torch.export.export(
        layer.eval(), (an_input(),), dynamic_shapes=({0: steps, 1: batch},), strict=strict
    )


class Holder(nn.Module):
    """torch.nn's layers are scripted in a model alone: they overload their forward."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor):
        return self.layer(x)


def check_exported(side: Side, layer: Any, run: Callable) -> None:
    for T, B in ((3, 2), (11, 9)):
        x = an_input(T, B, I)
        with torch.no_grad():
            differs(run(x), side.loop(layer, x)[:2])


@probe(EXPORT, "export with any T and B, strict")
def export_strict(side: Side) -> None:
    layer = side.layer()
    check_exported(side, layer, exported(side, layer, strict=True).module())


@probe(EXPORT, "export with any T and B, not strict")
def export_not_strict(side: Side) -> None:
    layer = side.layer()
    check_exported(side, layer, exported(side, layer, strict=False).module())


@probe(EXPORT, "export of the T and B given, saved and loaded")
def export_saved(side: Side) -> None:
    layer, file = side.layer().eval(), io.BytesIO()
    torch.export.save(torch.export.export(layer, (an_input(),)), file)
    file.seek(0)
    found = torch.export.load(file).module()(an_input())
    differs(found, side.loop(layer, an_input())[:2])


@probe(EXPORT, "gradients through an exported program")
def export_trains(side: Side) -> None:
    layer = side.layer()
    program = torch.export.export(layer, (an_input(),)).module()
    x = an_input().requires_grad_()
    (found,) = gradients(program(x)[0], [x], allow_unused=True)
    if found is None:
        raise No("none, and torch warns of it")
    exact = an_input().double().requires_grad_()
    differs(found, gradients(side.loop(layer, exact)[0], [exact]), "gradients")


def onnx_model(layer: Any, sizes: Any = None) -> Any:
    program = torch.onnx.export(
        layer.eval(), (an_input(),), dynamo=True, dynamic_shapes=sizes, verbose=False
    )
    return program.model_proto  # type: ignore[union-attr]


@probe(EXPORT, "ONNX with any T and B, run by ONNX Runtime", seconds=120)
def onnx(side: Side) -> None:
    import onnxruntime

    layer = side.layer()
    dynamic = torch.export.Dim.DYNAMIC
    model = onnx_model(layer, ({0: dynamic, 1: dynamic},))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (name,) = (one.name for one in session.get_inputs())

    def run(x: Tensor) -> list[Tensor]:
        return [torch.from_numpy(a) for a in session.run(None, {name: x.numpy()})]

    check_exported(side, layer, run)


@probe(EXPORT, "ONNX: one standard operator, not a step at a time", seconds=120)
def onnx_operator(side: Side) -> None:
    nodes = [node.op_type for node in onnx_model(side.layer()).graph.node]
    if nodes.count(side.kind) != 1:
        raise No(f"{nodes.count(side.kind)} of {len(nodes)} operators")


@probe(EXPORT, "torch.jit.script")
def script(side: Side) -> None:
    model = Holder(side.layer()).eval()
    check_exported(side, model.layer, torch.jit.script(model))


@probe(EXPORT, "torch.jit.trace, then another T and B")
def trace(side: Side) -> None:
    layer = side.layer().eval()
    check_exported(side, layer, torch.jit.trace(layer, (an_input(),)))


class PackedModel(nn.Module):
    """pack, layer, pad."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
        return pad_packed_sequence(self.layer(packed)[0])[0]


@probe(EXPORT, "torch.jit.trace of pack, layer and pad, then another T, B and lengths")
def trace_packed(side: Side) -> None:
    model = PackedModel(side.layer()).eval()
    example = an_input(SHORT, B, I), torch.tensor(LENGTHS)
    traced = torch.jit.trace(model, example, check_trace=False)
    for steps, lengths in ((9, (9, 2)), (5, (1, 5, 3, 2, 4))):
        x, n = an_input(steps, len(lengths), I), torch.tensor(lengths)
        differs(traced(x, n), side.loop(model.layer, x, lengths=n)[0])


@probe(EXPORT, "a torch.jit.ScriptModule that holds the layer", (*LAYERS, *CELLS))
def script_module(side: Side) -> None:
    class Scripted(torch.jit.ScriptModule):
        def __init__(self, layer: Any) -> None:
            super().__init__()
            self.layer = layer

        @torch.jit.script_method
        def forward(self, x):
            return self.layer(x)

    layer = side.layer().eval()
    x = an_input() if side.kind in LAYERS else an_input(B, I)
    found = Scripted(layer)(x)
    if side.kind in LAYERS:
        differs(found, side.loop(layer, x)[:2])
    else:
        differs(found, side.loop(layer, x[None])[1])


@probe(EXPORT, "export with ATen operators only", seconds=120)
def export_aten(side: Side) -> None:
    """For runtimes that know torch's own operators alone."""
    options = {"backend": "eager"} if side.library == "fastseq" else {}
    layer, x = side.layer(**options).eval(), an_input(SHORT, B, I)
    program = torch.export.export(layer, (x,)).run_decompositions()
    others = {
        str(node.target)
        for node in program.graph.nodes
        if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)
        if node.target.namespace not in ("aten", "prims")
    }
    if others:
        raise No(f"it holds {', '.join(sorted(others))}")
    differs(program.module()(x), side.loop(layer, x)[:2])


# Modules

MODULES = "Parameters and modules"


@probe(MODULES, "load_state_dict(assign=True)", (*LAYERS, *CELLS))
def assigned(side: Side) -> None:
    source = side.layer()
    with torch.device("meta"):
        layer = side.layer()
    layer.load_state_dict(source.state_dict(), assign=True)
    x = an_input() if side.kind in LAYERS else an_input(B, I)
    truth = side.loop(source, x.reshape(-1, *x.shape[-2:]))
    differs(layer(x), truth[:2] if side.kind in LAYERS else truth[1])


def normed(side: Side, norm: Callable) -> Any:
    """A layer whose recurrent weight is parametrized; a step of training reaches its output."""
    layer, x = side.layer(), an_input()
    norm(layer, "weight_hh_l0")
    layer.train()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    before = layer(x)[0]
    before.square().sum().backward()
    optimizer.step()
    layer.eval()  # spectral_norm moves in training
    after = layer(x)[0]
    if torch.equal(before, after):
        raise Wrong("the output after a step is the one before it")
    differs(after, side.loop(layer, x)[0])
    return layer


@probe(MODULES, "parametrizations.weight_norm, trained")
def weight_norm(side: Side) -> None:
    normed(side, torch.nn.utils.parametrizations.weight_norm)


@probe(MODULES, "parametrizations.spectral_norm, trained")
def spectral_norm(side: Side) -> None:
    normed(side, torch.nn.utils.parametrizations.spectral_norm)


@probe(MODULES, "deepcopy after a forward with weight_norm")
def deepcopy(side: Side) -> None:
    layer = normed(side, torch.nn.utils.parametrizations.weight_norm)
    twin = copy.deepcopy(layer)
    differs(twin(an_input()), side.loop(layer, an_input())[:2])


@probe(MODULES, "a recurrent weight replaced by a tensor (weight drop)")
def weight_drop(side: Side) -> None:
    layer, x = side.layer(), an_input()
    raw = nn.Parameter(layer.weight_hh_l0.detach().clone())
    del layer.weight_hh_l0
    for factor in (0.5, 0.25):
        layer.weight_hh_l0 = raw * factor
        y = layer(x)[0]
        truth = side.loop(layer, x)[0]
        differs(y, truth)
        found = gradients(y, [raw], retain_graph=True)
        differs(found, gradients(truth, [raw]), "gradients")


@probe(MODULES, "torch.nn.utils.skip_init", (*LAYERS, *CELLS))
def skip_init(side: Side) -> None:
    layer = torch.nn.utils.skip_init(side.constructor, I, H)
    layer.load_state_dict(side.layer().state_dict())
    layer(an_input(T, B, I) if side.kind in LAYERS else an_input(B, I))


@probe(MODULES, "share_memory, and training through it")
def share_memory(side: Side) -> None:
    layer = side.layer().share_memory()
    if not all(p.is_shared() for p in layer.parameters()):
        raise No("a parameter is not shared")
    check_training(side, layer, an_input(), layer)


@probe(MODULES, "pickle, deepcopy, torch.save")
def copies(side: Side) -> None:
    layer, file = side.layer(), io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer), loaded):
        differs(twin(an_input()), side.loop(layer, an_input())[:2])


@probe(MODULES, "replicas of DataParallel")
def replicas(side: Side) -> None:
    layer = side.layer()
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        replica._parameters.pop(name, None)
        setattr(replica, name, parameter.view_as(parameter))
    check_training(side, layer, an_input(), replica)


@probe(MODULES, "torch.ao.quantization.quantize_dynamic", ("LSTM", "GRU"))
def quantized(side: Side) -> None:
    model = nn.ModuleList([side.layer()])
    found = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM, nn.GRU})[0]
    if type(found) is side.constructor:
        raise No("the layer is left as it is")


@probe(MODULES, "isinstance(layer, torch.nn's class)")
def is_instance(side: Side) -> None:
    if not isinstance(side.layer(), getattr(nn, side.kind)):
        raise No("it derives from RNNBase")


# What users' code does to a layer

USERS = "What users' code does to a layer"
SOURCES = (*LAYERS, *CELLS)


def negated(*shape: int) -> Tensor:
    """A view whose numbers are minus its memory."""
    z = torch.complex(an_input(*shape), an_input(*shape, seed=2)).conj().imag
    assert z.is_neg()
    return z


@probe(USERS, "lazy negation of input, states and weights")
def negation(side: Side) -> None:
    for shape in ((T, B, I), (T, B, 1)):
        layer, x = side.layer(shape[-1], H), negated(*shape)
        differs(layer(x), side.loop(layer, x)[:2])
        h = negated(1, B, H)
        hx = (h, h) if side.kind == "LSTM" else h
        differs(layer(x, hx), side.loop(layer, x, hx=hx)[:2])
    raw = nn.Parameter(layer.weight_hh_l0.detach().clone())
    del layer.weight_hh_l0
    layer.weight_hh_l0 = torch.complex(raw, raw).conj().imag
    truth, y = side.loop(layer, x)[0], layer(x)[0]
    differs(y, truth)
    found = gradients(y, [raw], retain_graph=True)
    differs(found, gradients(truth, [raw]), "gradients")


def with_weights(side: Side, layer: Any, weights: Sequence[Tensor]) -> None:
    """The layer computes with these, and gradients reach them."""
    x = an_input()
    truth, y = loop(side.base, weights, x)[0], layer(x)[0]
    differs(y, truth)
    differs(gradients(y, weights), gradients(truth, weights), "gradients")


def other_weights(layer: Any) -> list[Tensor]:
    return [(w.detach() * 0.7).requires_grad_() for w in weights_of(layer)]


@probe(USERS, "_flat_weights set whole (DropConnect, quantizers)")
def flat_weights_whole(side: Side) -> None:
    layer = side.layer()
    kept, others = layer._flat_weights, other_weights(layer)
    layer._flat_weights = others
    with_weights(side, layer, others)
    layer._flat_weights = kept
    with_weights(side, layer, weights_of(layer))


@probe(USERS, "_flat_weights set item by item (tied weights)")
def flat_weights_items(side: Side) -> None:
    layer = side.layer()
    others = other_weights(layer)
    for k, w in enumerate(others):
        layer._flat_weights[k] = w
    with_weights(side, layer, others)


#: Attributes that recurrent layers and models that hold them go by.
NAMES = (
    *("cell", "memory", "weights", "backend", "states", "zoneout", "reset", "lengths", "step"),
    *("recurrent_dropout", "input_dropout", "weight_dropout", "deterministic", "seed", "options"),
)


@probe(USERS, "a subclass's own attributes, of any name", SOURCES)
def own_names(side: Side) -> None:
    x = an_input() if side.kind in LAYERS else an_input(B, I)
    truth = side.layer()(x)
    for value in (0.3, nn.Linear(2, 2), torch.ones(3)):
        for name in NAMES:
            mine = type("Mine", (side.constructor,), {})
            torch.manual_seed(0)
            module = mine(I, H)
            setattr(module, name, value)
            if getattr(module, name) is not value:
                raise No(f"{name} is not what was set")
            differs(module(x), [t.double() for t in flat(truth)])


def edit_states(side: Side, layer: Any, x: Tensor, hx: Any = None) -> None:
    """Zeroed before backward, as where an episode ends: the output's gradients do not change."""
    y, state = layer(x, hx)
    with torch.no_grad():
        for s in flat(state):
            s[:, 1] = 0
    truth = side.loop(layer, x, hx=hx)[0]
    leaves = weights_of(layer)
    found = [g.to(x.dtype) for g in gradients(y, leaves)]
    differs(y, truth)
    differs(found, gradients(truth, leaves), "gradients")


@probe(USERS, "states edited in place before backward")
def states_edited(side: Side) -> None:
    h = an_input(1, 1, H).expand(1, B, H)
    for hx in (None, (h, h.cos()) if side.kind == "LSTM" else h):
        for steps in (1, T):
            edit_states(side, side.layer(), an_input(steps, B, I), hx)


@probe(USERS, "states edited in place before backward, in bfloat16")
def low_states_edited(side: Side) -> None:
    for steps in (1, T):
        x = an_input(steps, B, I, dtype=torch.bfloat16)
        edit_states(side, side.layer(dtype=torch.bfloat16), x)


@probe(USERS, "per-sample gradients by ExpandedWeights")
def expanded_weights(side: Side) -> None:
    from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

    layer, x = side.layer(batch_first=True), an_input(B, SHORT, I)
    y = call_for_per_sample_grads(layer, batch_size=B)(x)[0]
    y.square().sum().backward()
    leaves = weights_of(layer)
    each = [gradients(side.loop(layer, one[:, None])[0], leaves) for one in x]
    found: list[Any] = [w.grad_sample for w in leaves]
    differs(found, [torch.stack(one) for one in zip(*each, strict=True)], "gradients")


@probe(USERS, "a tensor subclass as input keeps its class", SOURCES)
def tensor_subclass(side: Side) -> None:
    class Marked(torch.Tensor):
        pass

    x = an_input() if side.kind in LAYERS else an_input(B, I)
    module = side.layer()
    found = flat(module(x.as_subclass(Marked)))
    if not all(isinstance(t, Marked) for t in found):
        raise No("the outputs are plain tensors")
    differs([t.as_subclass(Tensor) for t in found], [t.double() for t in flat(module(x))])


def modelled(side: Side) -> tuple[Any, Tensor]:
    model = Holder(side.layer()).eval()
    return model, an_input() if side.kind in LAYERS else an_input(B, I)


@probe(USERS, "torch.fx.symbolic_trace", SOURCES)
def symbolic_trace(side: Side) -> None:
    model, x = modelled(side)
    graph = torch.fx.symbolic_trace(model)
    if "call_module" not in [node.op for node in graph.graph.nodes]:
        raise No("the layer is no node of the graph")
    differs(graph(x), [t.double() for t in flat(model(x))])


@probe(USERS, "torch.ao.quantization.quantize_fx.prepare_fx", SOURCES)
def prepare_fx(side: Side) -> None:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    model, x = modelled(side)
    mapping = QConfigMapping().set_object_type(nn.Linear, default_dynamic_qconfig)
    prepared = prepare_fx(model, mapping, (x,))
    differs(prepared(x), [t.double() for t in flat(model(x))])


@probe(USERS, "the methods of torch.nn's modules", SOURCES)
def methods(side: Side) -> None:
    theirs, ours = getattr(nn, side.kind), side.constructor
    for name in dir(theirs):
        if not name.startswith("__") and not hasattr(ours, name):
            raise No(f"{name} is missing")
    if side.kind in LAYERS:
        layer, h = side.layer(), torch.zeros(1, B, H)
        hx = (h, h) if side.kind == "LSTM" else h
        order = torch.arange(B).flip(0)
        layer.check_forward_args(an_input(), hx, None)
        differs(layer.permute_hidden(hx, order), [t.double() for t in flat(hx)])
        sizes = [layer.get_expected_hidden_size(an_input(), None)]
        if side.kind == "LSTM":
            sizes.append(layer.get_expected_cell_size(an_input(), None))
        if set(sizes) != {(1, B, H)}:
            raise Wrong(f"sizes {sizes}")


def step_time(side: Side, default: str | None) -> Callable[[], Any]:
    layer, x = side.layer(64, 64), an_input(1, 1, 64)

    def steps() -> None:
        torch.set_default_device(default)
        try:
            with torch.no_grad():
                for _ in range(200):
                    layer(x)
        finally:
            torch.set_default_device(None)

    return steps


@probe(USERS, "torch.set_default_device costs a step nothing to speak of")
def default_device(side: Side) -> None:
    than = "the time without it"
    not_slower(step_time(side, "cpu"), step_time(side, None), than, times=2.0, rounds=15)


@probe(USERS, "more threads than cores")
def oversubscribed(side: Side) -> None:
    """The threads are the machine's to share: the time that passes is measured."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    layer, x = side.layer(256, 256), an_input(100, 1, 256)
    try:
        best = []
        for threads in (cores or 1, 8 * (cores or 1)):
            torch.set_num_threads(threads)
            samples = []
            for _ in range(12):
                start = time.perf_counter()
                with torch.no_grad():
                    layer(x)
                samples.append(time.perf_counter() - start)
            best.append(min(samples))
    finally:
        torch.set_num_threads(1)
    if best[1] > 3 * best[0]:
        raise Slow(f"×{best[1] / best[0]:.0f} the time of one thread a core")


@probe(USERS, "deepcopy and torch.save of a model with a stream", seconds=60)
def copied_stream(side: Side) -> None:
    """torch.nn's stream is a state that the model keeps; fastseq's is a handle."""

    def begin(layer: Any) -> Any:
        if side.library == "fastseq":
            return importlib.import_module("fastseq").streaming(layer, batch=B)
        return [None]

    def step(model: Any, x: Tensor) -> Tensor:
        if side.library == "fastseq":
            return model.stream.step(x)
        with torch.no_grad():
            y, model.stream[0] = model.layer(x[None], model.stream[0])
        return y[0]

    model, x = Holder(side.layer()), an_input()
    model.stream = begin(model.layer)
    for x_t in x[:5]:
        step(model, x_t)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    truth = side.loop(model.layer, x)[0]
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False), model):
        differs([step(twin, x_t) for x_t in x[5:8]], list(truth[5:8]))


def replaced(side: Side, model: nn.Module, **options: Any) -> nn.Module:
    if side.library == "fastseq":
        importlib.import_module("fastseq").replace(model, **options)
    return model


@probe(USERS, "isinstance(layer, nn.LSTM) in a model, after replace(compat=True)", SOURCES)
def is_instance_after_replace(side: Side) -> None:
    theirs = getattr(nn, side.kind)
    model = replaced(side, nn.ModuleList([theirs(I, H)]), compat=True)
    if not isinstance(model[0], theirs):  # type: ignore[index]
        raise No(f"it is {type(model[0]).__name__}")  # type: ignore[index]
    if side.library == "fastseq" and type(model[0]) is theirs:  # type: ignore[index]
        raise No("the layer was left")


@probe(USERS, "layers that a library makes itself are fastseq's (fastseq.install)", SOURCES)
def installed(side: Side) -> None:
    if side.library != "fastseq":
        raise No("there is no such switch")
    fastseq = importlib.import_module("fastseq")
    before = getattr(nn, side.kind)
    fastseq.install()
    try:
        made = getattr(nn, side.kind)(I, H)
        derived = type("Derived", (getattr(nn, side.kind),), {})(I, H)
    finally:
        fastseq.uninstall()
    for module in (made, derived):
        if not isinstance(module, before) or not hasattr(module, "fastseq"):
            raise No(f"{type(module).__name__} is torch.nn's")
    if getattr(nn, side.kind) is not before:
        raise No("uninstall leaves it")


@probe(USERS, "byte code only (frozen applications)", ("LSTM",), seconds=120)
def byte_code(side: Side) -> None:
    import compileall
    import pathlib
    import shutil
    import subprocess

    call = f"{side.library}.LSTM(4, 6)(torch.randn(5, 3, 4))[0].sum().backward()"
    told = "; fastseq.backends()" if side.library == "fastseq" else ""
    code = f"import torch, {side.library}; {call}{told}"
    with tempfile.TemporaryDirectory() as folder:
        if side.library == "fastseq":
            source = pathlib.Path(str(importlib.import_module("fastseq").__file__)).parent
            package = pathlib.Path(folder, "fastseq")
            shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
            compileall.compile_dir(package, legacy=True, quiet=2)
            for path in package.rglob("*.py"):
                path.unlink()
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": folder},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise No(done.stderr.strip().splitlines()[-1][:100])


# Tools

TOOLS = "Tools"


@probe(TOOLS, "FlopCounterMode counts forward and backward")
def flops(side: Side) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = side.layer(), an_input().requires_grad_()
    due = 2 * T * B * GATES[side.kind] * H * (I + H)
    with FlopCounterMode(display=False) as counter:
        y = layer(x)[0]
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    backward = counter.get_total_flops()
    spared = 2 * B * GATES[side.kind] * H * H  # nobody asked for the gradient of the first state
    if forward != due or backward not in (2 * due, 2 * due - spared):
        raise No(f"{forward} and {backward} of {due} and {2 * due}")


@probe(TOOLS, "a profile names the layer, forward and backward")
def profiled(side: Side) -> None:
    layer, x = side.layer(), an_input().requires_grad_()
    with torch.profiler.profile() as profile:
        layer(x)[0].sum().backward()
    names = [event.key.lower() for event in profile.key_averages()]
    words = (side.kind.lower(), "rnn_layer")
    ours = [name for name in names if any(word in name for word in words)]
    for way, found in (
        ("forward", [n for n in ours if "backward" not in n]),
        ("backward", [n for n in ours if "backward" in n]),
    ):
        if not found:
            raise No(f"{way} has no name of its own")


# Several processes

SCALE = "Several processes"
STEPS = 3


class LastStep(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0][-1]


def descend(model: Callable, parameters: Sequence[Tensor], rows: slice) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    for k in range(STEPS):
        x = an_input(T, B, I, seed=k, dtype=torch.float64)
        optimizer.zero_grad()
        model(x[:, rows]).square().mean().backward()
        optimizer.step()


def one_of_two(rank: int, side: Side, way: str, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model: Any = LastStep(side.layer().double())
    if way == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    descend(model, list(model.parameters()), slice(rank * B // 2, (rank + 1) * B // 2))
    found = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    if rank == 0:
        torch.save([p.detach() for p in found], f"{folder}/found")
    dist.barrier()
    dist.destroy_process_group()


def distributed(side: Side, way: str) -> None:
    """Two processes end where the loop ends on the whole batch."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(one_of_two, (side, way, folder), nprocs=2, start_method="fork")
        found = torch.load(f"{folder}/found")
    weights = [p.detach().requires_grad_() for p in weights_of(side.layer().double())]
    descend(lambda x: loop(side.kind, weights, x)[0][-1], weights, slice(None))
    differs(found, weights, "parameters")


@probe(SCALE, "DistributedDataParallel")
def ddp(side: Side) -> None:
    distributed(side, "ddp")


@probe(SCALE, "FSDP2 (fully_shard)")
def fsdp(side: Side) -> None:
    distributed(side, "fsdp")
