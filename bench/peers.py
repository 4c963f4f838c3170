"""Other libraries on the same workloads: same weights, same input, same results, or an error.

A peer is built for a count of threads and gives calls without arguments, ``forward(workload)`` and
``training(workload)``, that compute what torch.nn computes and return the output, in training
followed by the gradients of the input and of every parameter in torch's order. What it cannot run
it declines by NotImplementedError, in words. :func:`check` compares with torch.nn before anything
is timed.

Each gets what serves it best in repeated calls: the model is compiled and the weights are packed
before the clock starts, input and output stand where the library reads and writes them. A process
holds one peer (`bench.remote`), because XLA, OpenMP and OpenBLAS take their count of threads from
the environment, once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import torch

from . import onednn
from .workloads import GATES, Workload

Call = Callable[[], list[Any]]
Array = np.ndarray

INSTALL = 'pip install ".[peers]"'


@dataclass
class Given:
    """What a workload computes on.

    x: (T, B, I). ways: the weights of each layer and direction, in torch's order. dy: the gradient
    of the output that training starts from.
    """

    x: Array
    ways: list[list[Array]]
    dy: Array


def given(workload: Workload) -> Given:
    module = workload.module()
    weights = [p.detach().numpy() for p in module.parameters()]
    x = workload.input()
    if not isinstance(x, torch.Tensor):
        raise NotImplementedError("ragged batches are given in packed form, which it does not take")
    size = len(weights) // (workload.layers * workload.D)
    ways = [weights[k : k + size] for k in range(0, len(weights), size)]
    return Given(x.numpy(), ways, output_gradient(workload).numpy())


def output_gradient(workload: Workload) -> torch.Tensor:
    """The gradient that training starts from: standard normal, seeded."""
    width = (workload.proj or workload.H) * workload.D
    rows = (workload.N,) if workload.lengths != "equal" else (workload.T, workload.B)
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*rows, width, generator=generator, dtype=workload.dtype)


def expected(workload: Workload, training: bool) -> list[Array]:
    """What torch.nn gives: the output, in training followed by all gradients."""
    module = workload.module()
    x = workload.input()
    with torch.set_grad_enabled(training):
        if not training:
            return [workload.run(module, x).numpy()]
        y = workload.run(module, x.requires_grad_())  # type: ignore[union-attr]
        y.backward(output_gradient(workload))
    gradients = [x.grad, *(p.grad for p in module.parameters())]  # type: ignore[union-attr]
    return [y.detach().numpy(), *(g.numpy() for g in gradients)]  # type: ignore[union-attr]


def check(found: list[Any], wanted: list[Array]) -> None:
    """Raises ArithmeticError where one of the results is not torch.nn's within rounding.

    3e-4 of the greatest value: float32 stays a hundred times below, bfloat16 and TF32 do not.
    """
    if len(found) != len(wanted):
        raise ArithmeticError(f"{len(found)} results where torch.nn has {len(wanted)}")
    for k, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        ours = np.asarray(ours)
        if ours.shape != theirs.shape:
            raise ArithmeticError(f"result {k}: shape {ours.shape}, torch.nn's is {theirs.shape}")
        error, scale = np.abs(ours - theirs).max(), np.abs(theirs).max()
        if not error <= 3e-4 * scale + 1e-6:
            raise ArithmeticError(
                f"result {k}: off by {error:.2g} where the greatest is {scale:.2g}"
            )


class Peer:
    """What all have in common."""

    name: ClassVar[str]
    #: distributions that it needs, the one that names the version first
    packages: ClassVar[tuple[str, ...]]

    def __init__(self, threads: int) -> None:
        self.threads = threads

    @classmethod
    def available(cls) -> str | None:
        """Why it cannot run here; None if it can."""
        missing = [name for name in cls.packages if find_spec(name) is None]
        return f"no {', '.join(missing)} here; {INSTALL}" if missing else None

    @classmethod
    def version(cls) -> str:
        return metadata.version(cls.packages[0])

    @classmethod
    def environment(cls, threads: int) -> dict[str, str]:
        """Variables that have to be set before the library is loaded."""
        return {}

    def forward(self, workload: Workload) -> Call:
        raise NotImplementedError(f"{self.name} runs no layer forward")

    def training(self, workload: Workload) -> Call:
        raise NotImplementedError(f"{self.name} runs inference only")


# ONNX has the gates i, o, f, g of an LSTM and z, r, n of a GRU; torch has i, f, g, o and r, z, n.
_ONNX_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


def onnx_model(workload: Workload, at: Given) -> bytes:
    """The layers as ONNX's operators LSTM, GRU and RNN: x to y.

    Where a workload calls step by step, the model is one step: x, h_0 (, c_0) to y, h_n (, c_n).
    """
    from onnx import TensorProto, helper, numpy_helper

    if workload.proj:
        raise NotImplementedError("ONNX's LSTM has no projection")
    T = workload.T if workload.mode == "layer" else 1
    B, H, D = workload.B, workload.H, workload.D
    order = _ONNX_GATES[workload.cell]
    nodes, constants = [], []

    def constant(name: str, value: Array) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def gates(weight: Array) -> Array:
        return weight.reshape(len(order), H, -1)[list(order)].reshape(weight.shape)

    states = ["h", "c"] if workload.cell == "lstm" else ["h"]
    given_states = [f"{s}_0" for s in states] if workload.mode != "layer" else []
    current = "x"
    for layer in range(workload.layers):
        ways = [[gates(w) for w in way] for way in at.ways[layer * D : (layer + 1) * D]]
        inputs = [
            current,
            constant(f"W{layer}", np.stack([way[0] for way in ways])),
            constant(f"R{layer}", np.stack([way[1] for way in ways])),
            constant(f"B{layer}", np.stack([np.concatenate(way[2:4]) for way in ways])),
            *([""] if given_states else []),
            *given_states,
        ]
        options = {"linear_before_reset": 1} if workload.cell == "gru" else {}
        direction = "bidirectional" if D == 2 else "forward"
        outputs = [f"Y{layer}", *([f"{s}_n" for s in states] if given_states else [])]
        nodes.append(
            helper.make_node(
                workload.cell.upper(),
                inputs,
                outputs,
                hidden_size=H,
                direction=direction,
                **options,
            )
        )
        last = layer == workload.layers - 1
        name = "y" if last else f"y{layer}"
        if D == 2:  # (T, D, B, H) to (T, B, D * H)
            nodes.append(
                helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=(0, 2, 1, 3))
            )
            shape = constant(f"shape{layer}", np.array([T, B, D * H], np.int64))
            nodes.append(helper.make_node("Reshape", [f"Z{layer}", shape], [name]))
        else:
            axis = constant(f"axis{layer}", np.array([1], np.int64))
            nodes.append(helper.make_node("Squeeze", [f"Y{layer}", axis], [name]))
        current = name

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        workload.name,
        [value("x", T, B, workload.I), *(value(name, D, B, H) for name in given_states)],
        [
            value("y", T, B, D * H),
            *(value(f"{s}_n", D, B, H) for s in states if given_states),
        ],
        constants,
    )
    opset = helper.make_opsetid("", 14)
    return helper.make_model(graph, opset_imports=[opset], ir_version=8).SerializeToString()


class OnnxRuntime(Peer):
    """ONNX Runtime's operators LSTM, GRU and RNN. It packs weights once; its threads spin."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx")

    def _session(self, workload: Workload, at: Given) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        model = onnx_model(workload, at)
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def forward(self, workload: Workload) -> Call:
        at = given(workload)
        session = self._session(workload, at)
        inputs = [value.name for value in session.get_inputs()]

        def bind(arrays: dict[str, Array]) -> Any:
            binding = session.io_binding()
            for name, array in arrays.items():
                bind = binding.bind_input if name in inputs else binding.bind_output
                bind(name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
            return binding

        width = workload.H * workload.D
        if workload.mode == "layer":
            y = np.empty((workload.T, workload.B, width), np.float32)
            return partial(self._run, session, [bind({"x": at.x, "y": y})], y, at)

        # a binding for each step: it reads the states that the one before wrote
        names = [name for name in inputs if name != "x"]
        states = [
            {name: np.zeros((1, workload.B, workload.H), np.float32) for name in names}
            for _ in range(workload.T + 1)
        ]
        ys = np.empty((workload.T, workload.B, width), np.float32)
        bindings = []
        for t in range(workload.T):
            after = {name.replace("_0", "_n"): a for name, a in states[t + 1].items()}
            bindings.append(bind({"x": at.x[t : t + 1], "y": ys[t : t + 1], **states[t], **after}))
        return partial(self._run, session, bindings, ys, at, states)

    @staticmethod
    def _run(session: Any, bindings: list[Any], y: Array, *alive: Any) -> list[Any]:
        """alive: what the bindings know by address alone."""
        for binding in bindings:
            session.run_with_iobinding(binding)
        return [y]


class OpenVino(Peer):
    """OpenVINO's LSTMSequence, GRUSequence and RNNSequence, converted from the ONNX model."""

    name = "openvino"
    packages = ("openvino", "onnx")

    def forward(self, workload: Workload) -> Call:
        import openvino

        at = given(workload)
        core = openvino.Core()
        options = {
            "INFERENCE_NUM_THREADS": self.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
        }
        model = core.read_model(onnx_model(workload, at), b"")
        request = core.compile_model(model, "CPU", options).create_infer_request()
        if workload.mode == "layer":
            request.set_tensor("x", openvino.Tensor(at.x, shared_memory=True))
            return partial(self._whole, request, at)
        x = [openvino.Tensor(at.x[t : t + 1], shared_memory=True) for t in range(workload.T)]
        return partial(self._steps, request, x, ["h", "c"][: 1 + (workload.cell == "lstm")], at)

    @staticmethod
    def _whole(request: Any, at: Given) -> list[Any]:
        request.infer(share_outputs=True)
        return [request.get_tensor("y").data]

    @staticmethod
    def _steps(request: Any, x: list[Any], states: list[str], at: Given) -> list[Any]:
        old = [request.get_tensor(f"{name}_0").data for name in states]
        new = [request.get_tensor(f"{name}_n").data for name in states]
        y, ys = request.get_tensor("y").data, []
        for state in old:
            state[:] = 0
        for x_t in x:
            request.set_tensor("x", x_t)
            request.infer(share_outputs=True)
            for before, after in zip(old, new, strict=True):
                before[:] = after
            ys.append(y.copy())
        return [np.concatenate(ys)]


class Jax(Peer):
    """lax.scan under jit on XLA's CPU backend, the input product of all steps in front of it."""

    name = "jax"
    packages = ("jax", "jaxlib")

    @classmethod
    def environment(cls, threads: int) -> dict[str, str]:
        # XLA makes as many threads as it sees processors, unless this says otherwise
        return {"NPROC": str(threads), "JAX_PLATFORMS": "cpu"}

    def _layers(self, workload: Workload) -> Callable[[Any, Any, Any], tuple[Any, Any]]:
        """(x, weights, states of each way or None) to (y, states)."""
        import jax
        import jax.numpy as jnp

        H, D = workload.H, workload.D
        size = 5 if workload.proj else 4

        def lstm(w_hh: Any, b_hh: Any, w_hr: Any, state: Any, a: Any) -> Any:
            h, c = state
            i, f, g, o = jnp.split(a + h @ w_hh, 4, -1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h if w_hr is None else h @ w_hr.T, c)

        def gru(w_hh: Any, b_hh: Any, w_hr: Any, state: Any, a: Any) -> Any:
            (h,) = state
            x_r, x_z, x_n = jnp.split(a, 3, -1)
            s_r, s_z, s_n = jnp.split(h @ w_hh + b_hh, 3, -1)
            r, z = jax.nn.sigmoid(x_r + s_r), jax.nn.sigmoid(x_z + s_z)
            n = jnp.tanh(x_n + r * s_n)
            return (n + z * (h - n),)

        def rnn(w_hh: Any, b_hh: Any, w_hr: Any, state: Any, a: Any) -> Any:
            return (jnp.tanh(a + state[0] @ w_hh),)

        cell = {"lstm": lstm, "gru": gru, "rnn": rnn}[workload.cell]

        def layers(x: Any, weights: list[Any], states: Any = None) -> tuple[Any, Any]:
            finals = []
            for layer in range(workload.layers):
                ys = []
                for way in range(layer * D, (layer + 1) * D):
                    w_ih, w_hh, b_ih, b_hh, *rest = weights[way * size : (way + 1) * size]
                    a = x @ w_ih.T + (b_ih if workload.cell == "gru" else b_ih + b_hh)
                    if states is None:
                        zeros = [jnp.zeros((x.shape[1], workload.proj or H), x.dtype)]
                        zeros += [jnp.zeros((x.shape[1], H), x.dtype)] * (workload.cell == "lstm")
                    state = tuple(zeros) if states is None else states[way]

                    def step(state: Any, a_t: Any, w: Any = (w_hh.T, b_hh, *rest, None)) -> Any:
                        state = cell(*w[:3], state, a_t)
                        return state, state[0]

                    state, y = jax.lax.scan(step, state, a, reverse=way % D == 1)
                    ys.append(y)
                    finals.append(state)
                x = ys[0] if D == 1 else jnp.concatenate(ys, -1)
            return x, finals

        return layers

    def forward(self, workload: Workload) -> Call:
        import jax
        import jax.numpy as jnp

        at = given(workload)
        run = jax.jit(self._layers(workload))
        weights = [jax.device_put(w) for way in at.ways for w in way]
        if workload.mode == "layer":
            x = jax.device_put(at.x)
            return lambda: [run(x, weights)[0].block_until_ready()]
        steps = [jax.device_put(at.x[t : t + 1]) for t in range(workload.T)]
        zeros = jnp.zeros((workload.B, workload.H), jnp.float32)
        first = [(zeros, zeros) if workload.cell == "lstm" else (zeros,)]

        def call() -> list[Any]:
            ys, states = [], first
            for step in steps:
                y, states = run(step, weights, states)
                ys.append(y.block_until_ready())  # the caller acts on each before the next
            return [np.concatenate([np.asarray(y) for y in ys])]

        return call

    def training(self, workload: Workload) -> Call:
        import jax

        at = given(workload)
        layers = self._layers(workload)

        @jax.jit
        def run(x: Any, weights: list[Any], dy: Any) -> Any:
            y, pull, _ = jax.vjp(layers, x, weights, has_aux=True)
            return y, *pull(dy)

        arguments = jax.device_put((at.x, [w for way in at.ways for w in way], at.dy))

        def call() -> list[Any]:
            y, dx, dweights = jax.block_until_ready(run(*arguments))
            return [y, dx, *dweights]

        return call


class OneDnn(Peer):
    """oneDNN through its own C API (`bench.onednn`), on weights that are packed once.

    In training the weights are new at every call, so there they are packed while the clock runs.
    """

    name = "onednn"
    packages = ("onednn-cpu-gomp",)

    @classmethod
    def available(cls) -> str | None:
        return None if onednn.PATH.exists() else f"no {onednn.PATH} here; {INSTALL}"

    @classmethod
    def version(cls) -> str:
        return onednn.Library().version

    def _layers(self, workload: Workload, at: Given, training: bool) -> list[list[onednn.Layer]]:
        if workload.proj:
            raise NotImplementedError("its LSTM with projection is not wrapped here")
        library, D = onednn.Library(), workload.D
        stepwise = workload.mode != "layer"
        x = np.zeros_like(at.x[:1]) if stepwise else at.x
        layers: list[list[onednn.Layer]] = []
        for k in range(0, len(at.ways), D):
            layers.append(
                [
                    onednn.Layer(library, workload.cell, x, way, d == 1, training, stepwise)
                    for d, way in enumerate(at.ways[k : k + D])
                ]
            )
            ways = layers[-1]
            x = ways[0].y if D == 1 else np.concatenate([way.y for way in ways], -1)
            for way in ways:
                way.pack()
        return layers

    def forward(self, workload: Workload) -> Call:
        at = given(workload)
        layers = self._layers(workload, at, training=False)
        if workload.mode == "layer":
            return lambda: [self._forward(layers)]
        ((layer,),) = layers

        def steps() -> list[Any]:
            ys = []
            for state in layer.state:
                state[:] = 0
            for x_t in at.x:
                layer.x[0] = x_t
                layer.forward()
                for old, new in zip(layer.state, layer.new_state, strict=True):
                    old[:] = new
                ys.append(layer.y.copy())
            return [np.concatenate(ys)]

        return steps

    @staticmethod
    def _forward(layers: list[list[onednn.Layer]]) -> Array:
        for ways, above in zip(layers, [*layers[1:], None], strict=True):
            for way in ways:
                way.forward()
            y = ways[0].y
            if len(ways) > 1:
                out = above[0].x if above else None
                y = np.concatenate([way.y for way in ways], -1, out=out)
        return y

    def training(self, workload: Workload) -> Call:
        at = given(workload)
        layers = self._layers(workload, at, training=True)

        def call() -> list[Any]:
            for ways in layers:
                for way in ways:
                    way.pack()
            y = self._forward(layers)
            dy, found = at.dy, []
            for ways in reversed(layers):
                for way, part in zip(ways, np.split(dy, len(ways), -1), strict=True):
                    way.dy[:] = part
                found = [g for way in ways for g in way.backward()] + found
                dy = ways[0].dx if len(ways) == 1 else ways[0].dx + ways[1].dx
            return [y, dy, *found]

        return call


class TorchPacked(Peer):
    """torch's own LSTM on oneDNN, on weights that are packed once.

    torch.nn's LSTM calls the same operator, which packs the weights at every call. It takes no
    other cell of oneDNN's.
    """

    name = "torch-packed"
    packages = ("torch",)

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        torch.set_num_threads(threads)

    @classmethod
    def available(cls) -> str | None:
        return None if torch.backends.mkldnn.is_available() else "this torch has no oneDNN"

    def forward(self, workload: Workload) -> Call:
        if workload.cell != "lstm" or workload.proj:
            raise NotImplementedError("torch packs the weights of a plain LSTM only")
        at = given(workload)
        x, H, D, B = torch.from_numpy(at.x), workload.H, workload.D, workload.B
        zeros = torch.zeros(B, H)
        pack = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight
        T = workload.T if workload.mode == "layer" else 1

        def layer(k: int) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]:
            w_ih, w_hh, *biases = (torch.from_numpy(w) for w in at.ways[k])
            packed = pack(w_ih, w_hh, H, k % D == 1, True, False, [T, B, w_ih.shape[1]])
            tail = (k % D == 1, [], 2, H, 1, True, False, False, False)  # 2: LSTM
            run = torch.ops.aten.mkldnn_rnn_layer

            def call(x: torch.Tensor, h: torch.Tensor, c: torch.Tensor) -> Any:
                return run(x, *packed, *biases, h, c, *tail)

            return call

        ways = [layer(k) for k in range(len(at.ways))]

        @torch.no_grad()
        def whole() -> list[Any]:
            y = x
            for k in range(0, len(ways), D):
                ys = [way(y, zeros, zeros)[0] for way in ways[k : k + D]]
                y = ys[0] if D == 1 else torch.cat(ys, -1)
            return [y]

        if workload.mode == "layer":
            return whole
        steps = [x[t : t + 1] for t in range(workload.T)]

        @torch.no_grad()
        def one_by_one() -> list[Any]:
            ys, h, c = [], zeros, zeros
            for step in steps:
                y, h, c, _ = ways[0](step, h, c)
                ys.append(y)
            return [torch.cat(ys)]

        return one_by_one


class NumPy(Peer):
    """A loop over time in plain NumPy: what a first draft costs. Small workloads alone."""

    name = "numpy"
    packages = ("numpy",)

    @classmethod
    def environment(cls, threads: int) -> dict[str, str]:
        return {"OPENBLAS_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def forward(self, workload: Workload) -> Call:
        if workload.flops(False) > 2e9 or workload.T * len(given(workload).ways) > 2048:
            raise NotImplementedError("too large to wait for")
        at = given(workload)
        return partial(self._layers, workload, at)

    def _layers(self, workload: Workload, at: Given) -> list[Any]:
        x, D = at.x, workload.D
        for k in range(0, len(at.ways), D):
            ys = [self._layer(workload, x, *at.ways[k + d], reverse=d == 1) for d in range(D)]
            x = ys[0] if D == 1 else np.concatenate(ys, -1)
        return [x]

    def _layer(
        self,
        workload: Workload,
        x: Array,
        w_ih: Array,
        w_hh: Array,
        b_ih: Array,
        b_hh: Array,
        w_hr: Array | None = None,
        reverse: bool = False,
    ) -> Array:
        def sigmoid(a: Array) -> Array:
            return 1 / (1 + np.exp(-a))

        T, B, G = len(x), x.shape[1], GATES[workload.cell]
        h = np.zeros((B, w_hh.shape[1]), np.float32)
        c = np.zeros((B, workload.H), np.float32)
        y = np.empty((T, B, w_hh.shape[1]), np.float32)
        every = x @ w_ih.T + b_ih if workload.mode == "layer" else None
        for t in reversed(range(T)) if reverse else range(T):
            a = every[t] if every is not None else x[t] @ w_ih.T + b_ih
            s = h @ w_hh.T + b_hh
            if workload.cell == "gru":
                (x_r, x_z, x_n), (s_r, s_z, s_n) = np.split(a, G, -1), np.split(s, G, -1)
                r, z = sigmoid(x_r + s_r), sigmoid(x_z + s_z)
                n = np.tanh(x_n + r * s_n)
                h = n + z * (h - n)
            elif workload.cell == "lstm":
                i, f, g, o = np.split(a + s, G, -1)
                c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(c)
                h = h if w_hr is None else h @ w_hr.T
            else:
                h = np.tanh(a + s)
            y[t] = h
        return y


PEERS: dict[str, type[Peer]] = {
    peer.name: peer for peer in (OnnxRuntime, OpenVino, Jax, OneDnn, TorchPacked, NumPy)
}


def named(names: str | None) -> list[str]:
    """The peers of a list of names, 'all' of them, or none; ValueError for an unknown one."""
    if not names:
        return []
    wanted = list(PEERS) if names.strip() == "all" else names.replace(",", " ").split()
    for name in wanted:
        if name not in PEERS:
            raise ValueError(f"no peer is named {name!r}; names: {', '.join(PEERS)}, or all")
    return wanted


def environment(name: str, threads: int) -> dict[str, str]:
    """What a peer's process is started with."""
    common = {"OMP_NUM_THREADS": str(threads)}
    return {**os.environ, **common, **PEERS[name].environment(threads)}
