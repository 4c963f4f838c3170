"""Layers with random numbers in them, run by any backend and by the independent writing."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import independent
import pytest
import torch
from rules import check_all

from fastseq.backends import choice, load
from fastseq.backends.contract import Problem, Request, Weights
from fastseq.cells import CELLS
from fastseq.ops import masks
from fastseq.ops.geometry import Dense, Padded
from fastseq.ops.run import run
from fastseq.ops.stack import Stack, Zoneout, problem

NAMED = ("eager", "torch", "native", "numba", "reference")
if os.environ.get("TRITON_INTERPRET") == "1":  # then it serves the CPU, slowly
    NAMED += ("triton",)
CHOICES = (*NAMED, None)

full = pytest.mark.full
#: In the ordinary run one type that torch's CPU kernels are made for and one of 16 bits.
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float64, id="float64", marks=full),
    pytest.param(torch.float16, id="float16", marks=full),
]

#: Cases for backends that run step by step where there is no GPU.
OF_FOUR_STEPS = {
    "two layers": {"layers": 2, "directions": 2},
    "bare": {"bias": False, "state": False},
    "saturated": {"scale": 50.0, "H": 20},
    "reset": {"reset": True, "directions": 2},
    "h_mask": {"h_mask": True, "directions": 2},
    "ragged": {"lengths": [2, 4, 3], "directions": 2},
    "zero lengths": {"lengths": [0, 4, 0], "directions": 2},
    "all at once": {"lengths": [2, 0, 4], "reset": True, "h_mask": True, "directions": 2},
    "zoneout": {"zoneout": (0.4, 0.0, 0.6), "directions": 2},
    "zoneout of others": {"zoneout": (0.0, 0.5, 0.0), "directions": 2},
    "zoneout in evaluation": {"zoneout": (0.1, 0.3, 0.2), "evaluates": True, "directions": 2},
}
#: Zoneout with everything else, and in evaluation.
ZONED_AT_ONCE = OF_FOUR_STEPS["all at once"] | {"zoneout": 0.4}
OF_FOUR_STEPS["zoneout at once"] = ZONED_AT_ONCE
OF_FOUR_STEPS["zoneout at once in evaluation"] = ZONED_AT_ONCE | {"evaluates": True}
#: Cells whose texts have a kink, on which side of which a gradient is the rounding decides.
KINKED = tuple(
    name
    for name, cell in CELLS.items()
    if any("relu" in phase.forward.__code__.co_names for phase in cell.phases)
)

#: What a backend may decline in float32 and float64 on the CPU. Anything else it must run.
DECLINES = {
    "eager": set(),
    "torch": {
        *(set(CELLS) - {"lstm", "gru", "rnn_tanh", "rnn_relu"}),
        "reset",
        "h_mask",
        "trajectory",
        "memory='lean' in training",
        "T=0",
        "transform",
        "dual",
        "projection to H",
        "zoneout",
    },
    "native": {"dual"},
    "numba": {"dual"},
    "triton": {"dual"},
    "reference": {"transform", "dual"},
    None: set(),
}

#: A layer that every backend with kernels takes; the rule of choice is asked about its variants.
PLAIN = Problem("gru", torch.float32, "cpu", T=100, B=4, I=16, H=64, P=64)


def features(task):
    """What of a problem a backend might decline, in the words of DECLINES."""
    named = {task.cell, task.mode}
    named |= {name for name in ("reset", "h_mask", "trajectory") if getattr(task, name)}
    if task.zoneout:
        named.add("zoneout")
    if task.memory == "lean" and task.training:
        named.add("memory='lean' in training")
    if task.T == 0:
        named.add("T=0")
    if task.projected and task.P >= task.H:
        named.add("projection to H")
    return named


def settle(backend, task):
    """Go on if the backend runs this; skip with its reason if it may decline, else fail."""
    verdict = choice.judge(task, backend)
    if verdict.chosen is None:
        pytest.skip(may_decline(backend, task, verdict))


def may_decline(backend, task, verdict):
    """The reason, where the backend may decline this; else a failure."""
    reason = "; ".join(f"{name}: {why}" for name, why in verdict.declined.items())
    if backend is not None and isinstance(load(backend), str):
        return reason
    sixteen = task.dtype not in (torch.float32, torch.float64)
    if features(task) & DECLINES[backend] or (sixteen and backend is not None):
        return reason
    pytest.fail(f"backend={backend!r} must run {task}, and declines: {reason}")


@dataclass
class Layers:
    """A stack of layers of one cell, and what it is given."""

    cell: str
    x: torch.Tensor
    states: list
    weights: list
    directions: int = 1
    lengths: torch.Tensor | None = None
    reset: torch.Tensor | None = None
    h_mask: torch.Tensor | None = None
    #: The rates of the states, or none, and what the masks are drawn from, None in evaluation.
    zoneout: tuple = ()
    seed: int | None = None
    options: dict = field(default_factory=dict)

    def to(self, dtype):
        """The same numbers in another type, as new leaves."""

        def move(tensor):
            if tensor is None:
                return None
            return tensor.detach().to(dtype, copy=True).requires_grad_(tensor.requires_grad)

        return replace(
            self,
            x=move(self.x),
            states=[move(s) for s in self.states],
            weights=[Weights(*map(move, w[:5]), tuple(map(move, w.units))) for w in self.weights],
            h_mask=move(self.h_mask),
        )

    def leaves(self):
        """Name -> tensor that has a gradient."""
        named = {"x": self.x}
        for name, state in zip(CELLS[self.cell].states, self.states, strict=False):
            named[f"{name}_0"] = state
        for k, weights in enumerate(self.weights):
            for name, tensor in zip(Weights._fields, weights[:5], strict=False):
                if tensor is not None:
                    named[f"{name}[{k}]"] = tensor
            for name, tensor in zip(CELLS[self.cell].unit_parameters, weights.units, strict=True):
                named[f"{name}[{k}]"] = tensor
        return named

    def stack(self, backend=None, trajectory=False, memory="full", deterministic=False):
        request = Request(
            self.cell,
            len(self.weights) // self.directions,
            self.directions,
            self.weights[0].b_ih is not None,
            self.weights[0].w_hr is not None,
            trajectory=trajectory,
            memory=memory,
            deterministic=deterministic,
            backend=backend,
            editable=False,
        )
        if self.lengths is None:
            geometry = Dense(self.x, False)
        else:
            geometry = Padded(self.x, False, self.lengths)
        weights = [w for way in self.weights for w in way.given()]
        given = self.x, list(self.states), weights, geometry
        zoneout = None
        if self.zoneout:
            seed = None if self.seed is None else torch.tensor(self.seed)
            ids = torch.arange(self.x.shape[1], device=self.x.device)
            zoneout = Zoneout(self.zoneout, seed, ids)
        return Stack(request, *given, self.reset, self.h_mask, zoneout=zoneout)

    def stay(self):
        """What of each state stays as it was: (layers * D, T, B, size) bool, a part, or None."""
        if not self.zoneout or self.seed is None:
            return list(self.zoneout) or None
        T, B = self.x.shape[:2]
        steps, ids = torch.arange(T).repeat_interleave(B), torch.arange(B).repeat(T)
        found = []
        for k, (rate, name) in enumerate(zip(self.zoneout, CELLS[self.cell].states, strict=True)):
            sites = [
                masks.site(masks.ZONEOUT + k, *divmod(way, self.directions))
                for way in range(len(self.weights))
            ]
            size = self.P if name == "h" else self.H
            kept = masks.keep(torch.tensor(self.seed), sites, ids, steps, size, rate)
            found.append(~kept.view(-1, T, B, size) if rate else None)
        return found

    def settle(self, backend, **options):
        settle(backend, problem(self.stack(backend, **options)))

    def run(self, backend=None, **options):
        """By a backend. Names: y, h_n, c_n, and c (the trajectory)."""
        y, finals, along = run(self.stack(backend, **options))
        return self._named(y, finals, along)

    def independent(self, trajectory=False):
        states = self.states
        if not states:
            sizes = [self.P] + [self.H] * (len(CELLS[self.cell].states) - 1)
            count, B = len(self.weights), self.x.shape[1]
            states = [self.x.new_zeros(count, B, size) for size in sizes]
        y, finals, along = independent.layers(
            self.cell,
            self.x,
            states,
            self.weights,
            self.directions,
            self.lengths,
            self.reset,
            self.h_mask,
            self.stay(),
        )
        return self._named(y, finals, along if trajectory else [])

    def _named(self, y, finals, along):
        names = CELLS[self.cell].states
        named = {"y": y} | {f"{n}_n": s for n, s in zip(names, finals, strict=True)}
        return named | dict(zip(names[1:], along, strict=False))

    @property
    def H(self):
        return self.weights[0].w_ih.shape[0] // CELLS[self.cell].G

    @property
    def P(self):
        w_hr = self.weights[0].w_hr
        return self.H if w_hr is None else w_hr.shape[0]


def draw(
    cell,
    T=5,
    B=3,
    I=4,  # noqa: E741
    H=6,
    P=None,
    layers=1,
    directions=1,
    bias=True,
    state=True,
    lengths=None,
    reset=False,
    h_mask=False,
    zoneout=(),
    evaluates=False,
    dtype=torch.float64,
    seed=0,
    scale=1.0,
    grad=True,
):
    """Random layers, with torch.nn's initial weights; those of the input times ``scale``.

    zoneout: a rate of every state, or one for each, of which the cell takes as many as it has.
    evaluates: zoneout takes its expectation.
    """
    random = torch.Generator().manual_seed(seed)
    definition = CELLS[cell]
    G, G_hh = definition.G, len(definition.recurrent_gates)

    def tensor(*shape, bound=None):
        value = torch.randn(shape, generator=random, dtype=torch.float64)
        if bound is not None:
            value = bound * (2 * torch.rand(shape, generator=random, dtype=torch.float64) - 1)
        return value.to(dtype).requires_grad_(grad)

    width, bound = I, 1 / H**0.5
    size = H if P is None else P
    weights = []
    for _ in range(layers):
        for _ in range(directions):
            weights.append(
                Weights(
                    tensor(G * H, width, bound=scale * bound),
                    tensor(G_hh * H, size, bound=bound) if G_hh else None,
                    tensor(G * H, bound=scale * bound) if bias else None,
                    tensor(G_hh * H, bound=bound) if bias and G_hh else None,
                    None if P is None else tensor(P, H, bound=bound),
                    tuple(tensor(H, bound=1.0) for _ in definition.unit_parameters),
                )
            )
        width = directions * size
    count = layers * directions
    states = []
    if state:
        states = [
            tensor(count, B, size if name == "h" else H, bound=1.0) for name in definition.states
        ]
    mask = None
    if h_mask:
        mask = (torch.rand(count, B, size, generator=random) > 0.3).to(dtype) * 1.5
    n = len(definition.states)
    rates = tuple(zoneout)[:n] if isinstance(zoneout, Sequence) else (zoneout,) * n
    return Layers(
        cell,
        tensor(T, B, I),
        states,
        weights,
        directions,
        None if lengths is None else torch.as_tensor(lengths),
        (torch.rand(T, B, generator=random) < 0.3) if reset else None,
        mask,
        rates if any(rates) else (),
        None if evaluates else seed,
    )


def cotangents(outputs, seed=1):
    """A random gradient for each output, the same numbers whatever the type."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=random, dtype=torch.float64)
        .to(torch.bfloat16)
        .to(value.dtype)
        for name, value in outputs.items()
    }


def gradients(outputs, leaves, seed=1, **options):
    """The gradient of every leaf; zeros where nothing depends on it."""
    given = cotangents(outputs, seed)
    live = [name for name, value in outputs.items() if value.requires_grad]
    grads = torch.autograd.grad(
        [outputs[name] for name in live],
        list(leaves.values()),
        [given[name] for name in live],
        allow_unused=True,
        materialize_grads=True,
        **options,
    )
    return {f"d{name}": g for name, g in zip(leaves, grads, strict=True)}


def against_the_independent(case, backend, what, **options):
    """Values and gradients of every dtype by the rule; err(torch) is the independent writing's."""
    case.settle(backend, **options)
    trajectory = options.get("trajectory", False)
    dtype = case.x.dtype
    wide = case.to(torch.float64)
    exact = wide.independent(trajectory)
    exact |= gradients(exact, wide.leaves())
    same = case.to(dtype)
    theirs = same.independent(trajectory)
    theirs |= gradients(theirs, same.leaves())
    ours = case.run(backend, **options)
    ours |= gradients(ours, case.leaves())
    check_all(ours, theirs, exact, dtype, what)
