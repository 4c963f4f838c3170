"""oneDNN's recurrent primitives through the library's own C API.

Letters and layouts of the library: t time, n batch, c channels, l layer, d direction, g gate, i
input, o output. Its GRU in this form is torch's (``lbr``: the reset gate after the product); its
gates are u, r, o for torch's z, r, n, and a fourth bias is the recurrent part of the candidate.
Handles live until the process ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray
Step = Callable[[], None]

#: where the wheels onednn-cpu-gomp and onednn put it
PATH = Path(sys.prefix) / "lib" / "libdnnl.so.3"

# Numbers of dnnl_types.h and dnnl_common_types.h, version 3
_F32, _CPU, _ANY = 3, 1, 1
_TRAINING, _INFERENCE, _BACKWARD = 64, 96, 128
_TANH = 0x21
_WORKSPACE_MD, _ARGUMENT_MD = 135, 255
_DIMENSIONS = 12
X, H_0, C_0, Y, H_N, C_N = 1, 2, 3, 17, 18, 19
W_IH, W_HH, BIAS, WORKSPACE = 33, 34, 41, 64
DX, DY, DW_IH, DW_HH, DBIAS = 129, 145, 161, 162, 169

_CELLS = {"lstm": "lstm", "gru": "lbr_gru", "rnn": "vanilla_rnn"}
_GATE_ORDER = {"lstm": (0, 1, 2, 3), "gru": (1, 0, 2), "rnn": (0,)}


class _Argument(Structure):
    _fields_ = (("index", c_int), ("memory", c_void_p))


class Library:
    """The functions that are needed; a status other than success raises RuntimeError."""

    def __init__(self, path: Path = PATH) -> None:
        self.dll = CDLL(str(path))
        self.dll.dnnl_primitive_desc_query_md.restype = c_void_p
        self.dll.dnnl_memory_desc_get_size.restype = c_size_t
        self.engine = self.create("engine", _CPU, c_size_t(0))
        self.stream = self.create("stream", self.engine, 1)  # 1: in order

    @property
    def version(self) -> str:
        class Version(Structure):
            _fields_ = tuple((name, c_int) for name in ("major", "minor", "patch"))

        self.dll.dnnl_version.restype = POINTER(Version)
        found = self.dll.dnnl_version().contents
        return f"{found.major}.{found.minor}.{found.patch}"

    def _check(self, name: str, status: int) -> None:
        if status != 0:
            raise RuntimeError(f"oneDNN: {name} returned status {status}")

    def create(self, kind: str, *arguments: Any) -> c_void_p:
        handle = c_void_p()
        name = f"dnnl_{kind}_create"
        self._check(name, getattr(self.dll, name)(byref(handle), *arguments))
        return handle

    def layout(self, shape: Sequence[int], strides: Sequence[int] | None = None) -> c_void_p:
        """A description of float32 in memory; without strides the library chooses."""
        sizes = (c_int64 * _DIMENSIONS)(*shape)
        handle = c_void_p()
        if strides is None:
            create = self.dll.dnnl_memory_desc_create_with_tag
            status = create(byref(handle), len(shape), sizes, _F32, _ANY)
        else:
            steps = (c_int64 * _DIMENSIONS)(*strides)
            create = self.dll.dnnl_memory_desc_create_with_strides
            status = create(byref(handle), len(shape), sizes, _F32, steps)
        self._check("dnnl_memory_desc_create", status)
        return handle

    def plain(self, *shape: int) -> c_void_p:
        strides = [int(np.prod(shape[k + 1 :])) for k in range(len(shape))]
        return self.layout(shape, strides)

    def chosen(self, description: c_void_p, argument: int) -> c_void_p:
        """The layout of an argument of a primitive; the workspace has a question of its own."""
        what = (_WORKSPACE_MD, 0) if argument == WORKSPACE else (_ARGUMENT_MD, argument)
        return c_void_p(self.dll.dnnl_primitive_desc_query_md(description, *what))

    def room(self, layout: c_void_p) -> Array:
        return np.zeros(max(1, self.dll.dnnl_memory_desc_get_size(layout)), np.uint8)

    def memory(self, layout: c_void_p, array: Array) -> c_void_p:
        return self.create("memory", layout, self.engine, c_void_p(array.ctypes.data))

    def step(self, description: c_void_p, arguments: dict[int, c_void_p]) -> Step:
        """A call that executes the primitive on these."""
        primitive = self.create("primitive", description)
        given = (_Argument * len(arguments))(*arguments.items())
        execute, wait, stream = (
            self.dll.dnnl_primitive_execute,
            self.dll.dnnl_stream_wait,
            self.stream,
        )
        count = len(arguments)

        def call() -> None:
            self._check("dnnl_primitive_execute", execute(primitive, stream, count, given))
            wait(stream)

        return call

    def reorder(self, source: c_void_p, a: c_void_p, target: c_void_p, b: c_void_p) -> Step:
        """Copies a, laid out as source, to b, laid out as target."""
        description = self.create(
            "reorder_primitive_desc", source, self.engine, target, self.engine, None
        )
        return self.step(description, {1: a, 17: b})


class Layer:
    """One layer in one direction: ``pack()`` takes the weights in, ``forward()`` and, where it
    trains, ``backward()`` run, on arrays that stay where they are.

    weights: w_ih, w_hh, b_ih, b_hh in torch's layout. x (T, B, I), y (T, B, H).
    states: whether the states are given and returned, as ``state`` and ``new_state``.
    dweights, dx, dy: the gradients, where it trains.
    """

    def __init__(
        self,
        library: Library,
        cell: str,
        x: Array,
        weights: list[Array],
        reverse: bool = False,
        training: bool = False,
        states: bool = False,
    ) -> None:
        self.library, self.cell, self.weights = library, cell, weights
        states = states or training  # without them dW_hh of LSTM and RNN comes out wrong (3.2)
        T, B, I = x.shape  # noqa: E741
        G, H = len(_GATE_ORDER[cell]), weights[1].shape[1]
        biases = G + (cell == "gru")
        self.x, self.y = x, np.zeros((T, B, H), np.float32)
        self.bias = np.zeros((biases, H), np.float32)
        self.in_order = _GATE_ORDER[cell] == tuple(range(G))
        self.ordered = weights[:2] if self.in_order else [np.zeros_like(w) for w in weights[:2]]
        count = (2 if cell == "lstm" else 1) * states
        self.state = [np.zeros((B, H), np.float32) for _ in range(count)]
        self.new_state = [np.zeros((B, H), np.float32) for _ in range(count)]

        def matrix(inner: int) -> c_void_p:  # (l, d, i, g, o) as (g, o, i) lies in memory
            return library.layout(
                (1, 1, inner, G, H), (G * H * inner, G * H * inner, 1, H * inner, inner)
            )

        state = library.plain(1, 1, B, H) if states else None
        given = [state] * (2 if cell == "lstm" else 1)
        outer = {W_IH: matrix(I), W_HH: matrix(H)}
        free = [library.layout((1, 1, inner, G, H)) for inner in (I, H)]
        bias = library.plain(1, 1, biases, H)
        x_layout, y_layout = library.plain(T, B, I), library.plain(T, B, H)
        extra = [None, None] if cell == "lstm" else []  # no peepholes, no projection
        inputs = [x_layout, *given, *free, *extra, bias]
        outputs = [y_layout, *given]
        kind, direction = _CELLS[cell], 2 if reverse else 1
        activation = [_TANH] if cell == "rnn" else []
        slope = [c_float(0), c_float(0)] if cell == "rnn" else []
        description = library.create(
            f"{kind}_forward_primitive_desc",
            library.engine,
            _TRAINING if training else _INFERENCE,
            *activation,
            direction,
            *inputs,
            *outputs,
            0,
            *slope,
            None,
        )
        self.packs: list[Step] = []
        self.alive: list[Any] = []

        def held(layout: c_void_p, array: Array | None = None) -> c_void_p:
            array = library.room(layout) if array is None else array
            self.alive.append(array)
            return library.memory(layout, array)

        def packed(description: c_void_p) -> dict[int, c_void_p]:
            found = {}
            for argument, source in zip((W_IH, W_HH), self.ordered, strict=True):
                layout = library.chosen(description, argument)
                found[argument] = held(layout)
                mine = held(outer[argument], source)
                self.packs.append(library.reorder(outer[argument], mine, layout, found[argument]))
            return found

        arguments = {X: held(x_layout, x), BIAS: held(bias, self.bias), Y: held(y_layout, self.y)}
        for k in range(count):
            arguments[H_0 + k] = held(state, self.state[k])  # type: ignore[arg-type]
            arguments[H_N + k] = held(state, self.new_state[k])  # type: ignore[arg-type]
        forward = {**arguments, **packed(description)}
        if training:
            layout = library.chosen(description, WORKSPACE)
            forward[WORKSPACE] = arguments[WORKSPACE] = held(layout)
        self.forward = library.step(description, forward)
        if not training:
            return

        back = library.create(
            f"{kind}_backward_primitive_desc",
            library.engine,
            _BACKWARD,
            *activation,
            direction,
            *inputs,
            *outputs,
            *inputs,
            *outputs,
            1,  # gradients of weights are written, not added up
            *slope,
            description,
            None,
        )
        self.dx, self.dy = np.zeros_like(x), np.zeros_like(self.y)
        self.dbias = np.zeros_like(self.bias)
        arguments |= packed(back)
        arguments |= {
            DX: held(x_layout, self.dx),
            DY: held(y_layout, self.dy),
            DBIAS: held(bias, self.dbias),
        }
        for k in range(count):  # the final states' gradients are zero, the first ones' unwanted
            arguments[DX + 1 + k] = held(state, np.zeros_like(self.state[k]))  # type: ignore[arg-type]
            arguments[DY + 1 + k] = held(state, np.zeros_like(self.state[k]))  # type: ignore[arg-type]
        self.unpacks: list[Step] = []
        self.found = [np.zeros_like(w) for w in weights[:2]]
        for argument, inside, array in zip((DW_IH, DW_HH), (W_IH, W_HH), self.found, strict=True):
            layout = library.chosen(back, argument)
            arguments[argument] = held(layout)
            mine = held(outer[inside], array)
            self.unpacks.append(library.reorder(layout, arguments[argument], outer[inside], mine))
        self._backward = library.step(back, arguments)

    def pack(self) -> None:
        """The weights as they are now, in the library's layouts."""
        G, order = len(_GATE_ORDER[self.cell]), list(_GATE_ORDER[self.cell])
        if not self.in_order:
            for ours, theirs in zip(self.ordered, self.weights[:2], strict=True):
                shape = (G, -1, theirs.shape[1])
                np.take(theirs.reshape(shape), order, 0, ours.reshape(shape), "clip")
        b_ih, b_hh = (b.reshape(G, -1)[order] for b in self.weights[2:])
        self.bias[:G] = b_ih + b_hh
        if self.cell == "gru":
            self.bias[2], self.bias[3] = b_ih[2], b_hh[2]
        for step in self.packs:
            step()

    def backward(self) -> list[Array]:
        """Gradients of the four weights, in torch's layout."""
        self._backward()
        for step in self.unpacks:
            step()
        G, order = len(_GATE_ORDER[self.cell]), np.argsort(_GATE_ORDER[self.cell])
        dw = self.found
        if not self.in_order:
            dw = [w.reshape(G, -1, w.shape[1])[order].reshape(w.shape) for w in self.found]
        db_ih = self.dbias[:G][order].reshape(-1)
        db_hh = self.dbias[[0, 1, 3]][order].reshape(-1) if self.cell == "gru" else db_ih
        return [*dw, db_ih, db_hh]
