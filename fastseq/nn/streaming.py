"""Step by step, with the state and packed weights at hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..backends import choice
from ..cells import CELLS
from ..ops.checks import positive
from ..ops.modes import autocasts
from . import learned
from .container import Plain, Stacked
from .options import options
from .recurrent import Recurrent, call_request, call_weights
from .scrn import SCRN, SCRNCell


class Streaming:
    """A module run one step at a time, for inference: made by :func:`streaming`.

    A copy, and what pickle reads back, goes on from the same state by itself, on the copied module.
    """

    def __init__(self, module: Recurrent | SCRN, batch: int) -> None:
        _check_module(module)
        batch = positive("batch", batch)
        self.module = module
        self.batch = batch
        weight = next(iter(_weights(module)))
        with torch.inference_mode(False):  # so that they can be written to in either mode
            self._states = {
                name: torch.zeros(
                    (module.num_layers, batch, getattr(module, size)),
                    dtype=weight.dtype,
                    device=weight.device,
                )
                for name, size in _sizes(module).items()
            }
        if getattr(options(module), "learn_state", False):
            begin = zip(self._states.values(), learned.names(module), strict=True)
            with torch.no_grad():
                for state, name in begin:
                    state.copy_(getattr(module, name))
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Read the module's weights and options again, after they were changed. The state stays."""
        module = self.module
        weights = [w.detach().resolve_neg().contiguous() for w in _weights(module)]
        with torch.inference_mode(False):
            self._states = {name: s.to(weights[0]) for name, s in self._states.items()}
        h, *others = self._states.values()
        self._stream = None
        self._is_fresh = True
        self._kernels: Any = None
        if _runs_itself(module):
            return
        if isinstance(module, SCRN):
            backend = options(module).backend
            self._kernels = self._stream = module._fastseq_stream(h, others[0], backend)
            return
        self._kernels = self._backend(weights[0])
        if self._kernels is not None:
            self._stream = self._kernels.stream(call_request(module), weights, h, tuple(others))

    def _backend(self, weight: Tensor) -> Any:
        """The backend that runs single steps on packed weights of this module; else None."""
        module: Any = self.module
        kind = module._fastseq_cell, weight.dtype, weight.device.type
        return choice.streams(*kind, self.batch, options(module).backend)

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """One step of all layers.

        Args:
            x: (batch, input_size).
            out: (batch, hidden_size or proj_size), a buffer that the output is written to, or None.

        Returns:
            y, (batch, hidden_size or proj_size), without a gradient: ``out``, or a new tensor. It
            is the caller's; the handle neither reads it nor writes to it again.

        Raises:
            ValueError: another shape, dtype or device. Under autocast x may be of any floating
                type; the step is made in the weights' own.
        """
        if (
            self._stream is not None
            and type(x) is Tensor
            and not x.is_neg()
            and (out is None or (type(out) is Tensor and not (out.requires_grad or out.is_neg())))
        ):
            y = self._kernels.stream_step(self._stream, x, out, torch.get_num_threads())
            if y is not None:
                if out is not None and not out.is_inference():
                    torch.autograd.graph.increment_version(out)
                return y
        return self._checked_step(x, out)

    @torch.no_grad()
    def _checked_step(self, x: Tensor, out: Tensor | None) -> Tensor:
        if not self._is_fresh:
            self.refresh()
        h, *others = self._states.values()
        x = _like("x", x, (self.batch, self.module.input_size), "(batch, input_size)", h)
        if out is not None:
            width, words = _output(self.module)
            _check_out(out, (self.batch, width), f"(batch, {words})", h)
        if self._stream is None:
            y = self._step_of_module(x, (h, *others))
        else:
            x = x.resolve_neg().contiguous()
            y = self._kernels.stream_step(self._stream, x, None, torch.get_num_threads())
            if y is None:
                raise TypeError(
                    f"x: expected a plain tensor, got one of type {type(x).__name__} that has no "
                    "memory of its own; a handle keeps its state outside of torch.func's transforms"
                )
        return y if out is None else _written(out, y)

    def _step_of_module(self, x: Tensor, states: tuple[Tensor, ...]) -> Tensor:
        module = self.module
        training = module.training
        module.eval()
        try:
            sequence = x.unsqueeze(1 if module.batch_first else 0)
            with torch.autocast(x.device.type, enabled=False):
                found = module(sequence, states if len(states) > 1 else states[0])
        finally:
            module.train(training)
        try:
            y, finals = found
            finals = (finals,) if isinstance(finals, Tensor) else finals
            for state, final in zip(states, finals, strict=True):
                state.copy_(final)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"module: expected the forward of {type(module).__name__} to return (output, "
                f"state), as its base class does, got {type(found).__name__}"
            ) from error
        # nobody else may hold it, as a subclass's forward might
        return y.squeeze(1 if module.batch_first else 0).clone()

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and on the device of a step."""
        return next(iter(self._states.values()))

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        """A copy of the state as the module takes and returns it: h, or (h, c) of an LSTM.

        What is assigned is copied, too. Its shapes are (num_layers, batch, hidden_size or
        proj_size) and, of c, (num_layers, batch, hidden_size).
        """
        found: Any = tuple(s.clone() for s in self._states.values())
        return found if len(found) > 1 else found[0]

    @state.setter
    def state(self, value: Tensor | tuple[Tensor, Tensor]) -> None:
        own = self._states
        given: Any = (value,) if len(own) == 1 else value
        if not isinstance(given, (tuple, list)) or len(given) != len(own):
            what = f"{len(given)} values" if isinstance(given, (tuple, list)) else _kind(given)
            raise TypeError(f"state: expected a pair ({', '.join(own)}), got {what}")
        sizes = _sizes(self.module)
        for (name, mine), new in zip(own.items(), given, strict=True):
            words = f"(num_layers, batch, {sizes[name]})"
            _like(f"state: {name}", new, tuple(mine.shape), words, mine)
        with torch.no_grad():
            for mine, new in zip(own.values(), given, strict=True):
                mine.copy_(new)

    def reset(self, rows: Any = None) -> None:
        """Zero the state of ``rows`` or of all: new sequences begin, as behind a layer's ``reset``.

        Args:
            rows: indices from -batch to batch - 1, or a mask (batch,) of bools, as a tensor, list
                or array; all rows if None.

        Raises:
            IndexError: an index outside of the batch. ValueError: a mask of another shape.
                TypeError: neither integers nor bools.
        """
        with torch.no_grad():
            for state in self._states.values():
                state[:, slice(None) if rows is None else self._rows(rows, state.device)] = 0

    def _rows(self, rows: Any, device: torch.device) -> Tensor:
        try:
            where = torch.as_tensor(rows, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"rows: expected integers, or bools for a mask, got {rows!r}") from None
        if where.dtype is torch.bool:
            if tuple(where.shape) != (self.batch,):
                raise ValueError(
                    f"rows: expected a mask (batch,) = ({self.batch},), got {tuple(where.shape)}"
                )
        elif not where.numel():
            where = where.long()
        elif where.is_floating_point() or where.is_complex() or where.dtype is torch.uint8:
            raise TypeError(
                f"rows: expected integers, or bools for a mask, got {where.dtype}; convert them: "
                "rows.bool() or rows.long()"
            )
        else:
            least, most = int(where.min()), int(where.max())
            if least < -self.batch or most >= self.batch:
                wrong = least if least < -self.batch else most
                raise IndexError(
                    f"rows: expected indices from {-self.batch} to {self.batch - 1}, got {wrong}"
                )
            where = where.long()
        return where.to(device)

    def __getstate__(self) -> dict[str, Any]:
        """All but the packed weights. Of the state a copy, which torch.multiprocessing may move to
        memory that processes share."""
        own = {k: v for k, v in self.__dict__.items() if k not in ("_stream", "_kernels")}
        with torch.inference_mode(False):
            own["_states"] = {name: s.clone() for name, s in self._states.items()}
        return own

    def __setstate__(self, own: dict[str, Any]) -> None:
        """The weights are packed at the next step: a module that holds the handle may not have them
        yet."""
        self.__dict__.update(own)
        with torch.inference_mode(False):
            self._states = {name: s.clone() for name, s in self._states.items()}
        self._stream = self._kernels = None
        self._is_fresh = False


class StackedStreaming:
    """A :class:`fastseq.Stacked` run one step at a time, for inference: made by :func:`streaming`.

    ``layers`` holds a :class:`Streaming` of each layer. The connections' weights are read at each
    step.
    """

    def __init__(self, module: Stacked, batch: int) -> None:
        if module.reverse_layers is not None:
            raise ValueError(
                "module: a reverse stack needs the whole sequence, so it cannot be streamed"
            )
        own = type(module).forward is Stacked.forward and "forward" not in module.__dict__
        if not own or module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(
                "module: a handle runs the layers by themselves, without the hooks and without "
                "another forward of the stack; put them on a layer, or call the stack step by step"
            )
        self.module, self.batch = module, batch
        layers: Any = module.layers
        self.layers = [Streaming(layer, batch) for layer in layers]

    def refresh(self) -> None:
        """Read the weights and options of the layers again, after they were changed."""
        for handle in self.layers:
            handle.refresh()

    @torch.no_grad()
    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """One step of all layers, as :meth:`Streaming.step`: x (batch, input_size), y and ``out``
        (batch, output_size)."""
        module: Any = self.module
        if out is not None:
            words = "(batch, output_size)"
            _check_out(out, (self.batch, module.output_size), words, self.layers[0].like)
        for handle, connection in zip(self.layers, module.connections, strict=True):
            y = handle.step(x)
            if not isinstance(connection, Plain):
                with torch.autocast(y.device.type, enabled=False):
                    y = connection(x.to(y.dtype), y)
            x = y
        return x if out is None else _written(out, x)

    @property
    def state(self) -> tuple[Any, ...]:
        """A copy of the states as the stack takes and returns them, one for each layer; what is
        assigned is copied, too."""
        return tuple([handle.state for handle in self.layers])

    @state.setter
    def state(self, value: Any) -> None:
        if not isinstance(value, (tuple, list)) or len(value) != len(self.layers):
            what = f"{len(value)} values" if isinstance(value, (tuple, list)) else _kind(value)
            raise TypeError(
                f"state: expected a tuple of {len(self.layers)} states, one for each layer, got "
                f"{what}"
            )
        before = self.state
        try:
            for handle, state in zip(self.layers, value, strict=True):
                handle.state = state
        except (TypeError, ValueError):
            for handle, state in zip(self.layers, before, strict=True):
                handle.state = state
            raise

    def reset(self, rows: Any = None) -> None:
        """Zero the states of ``rows`` or of all, as :meth:`Streaming.reset`."""
        for handle in self.layers:
            handle.reset(rows)


def _check_out(out: Tensor, shape: tuple[int, ...], words: str, own: Tensor) -> None:
    _like("out", out, shape, words, own)
    if out.requires_grad:
        raise ValueError(
            "out: it requires a gradient, and a step of a handle has none; pass out.detach()"
        )


def _written(out: Tensor, y: Tensor) -> Tensor:
    with torch.inference_mode(out.is_inference()):  # which can be written to in its mode alone
        return out.copy_(y)


def _weights(module: Any) -> list[Tensor]:
    return list(module.parameters()) if isinstance(module, SCRN) else call_weights(module)


def _sizes(module: Any) -> dict[str, str]:
    """State -> the attribute that is its size."""
    if isinstance(module, SCRN):
        return {"h": "hidden_size", "s": "context_size"}
    first, *others = CELLS[module._fastseq_cell].states
    found = {first: "proj_size" if module.proj_size else "hidden_size"}
    return found | dict.fromkeys(others, "hidden_size")


def _output(module: Any) -> tuple[int, str]:
    """The output's size, and what it is."""
    if isinstance(module, SCRN):
        return module.hidden_size + module.context_size, "hidden_size + context_size"
    size = _sizes(module)["h"]
    return getattr(module, size), size


def _check_module(module: Any) -> None:
    if not isinstance(module, (Recurrent, SCRN)):
        remedy = ""
        if isinstance(module, (nn.RNNCellBase, SCRNCell)):
            remedy = ", which makes single steps itself"
        elif isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
            remedy = " of torch.nn; call fastseq.replace(model) first"
        raise TypeError(f"module: expected a layer of fastseq, got {_kind(module)}{remedy}")
    if module.bidirectional:
        raise ValueError(
            "module: a bidirectional layer needs the whole sequence, so it cannot be streamed"
        )


def _runs_itself(module: Any) -> bool:
    """Whether a step is more than the kernels on the module's weights: a forward of a subclass or
    of the user's, hooks, or zoneout, whose kernels hand the state on by themselves."""
    own = SCRN if isinstance(module, SCRN) else Recurrent
    return bool(
        type(module).forward is not own.forward
        or "forward" in module.__dict__
        or module._forward_hooks
        or module._forward_pre_hooks
        or getattr(options(module), "zoneout", 0.0)
    )


def _like(name: str, given: Any, shape: tuple[int, ...], words: str, own: Tensor) -> Any:
    """``given``, which must have this shape, and dtype and device of ``own``. Under autocast x may
    have another dtype, and is converted."""
    if not isinstance(given, Tensor) or tuple(given.shape) != shape:
        got = tuple(given.shape) if isinstance(given, Tensor) else _kind(given)
        raise ValueError(f"{name}: expected {words} = {shape}, got {got}")
    if name == "x" and given.device == own.device and autocasts(given):
        return given.to(own.dtype)
    if given.dtype != own.dtype or given.device != own.device:
        raise ValueError(
            f"{name}: expected {own.dtype} on {own.device}, got {given.dtype} on {given.device}"
        )
    return given


def _kind(value: Any) -> str:
    return type(value).__name__


def streaming(module: Recurrent | SCRN | Stacked, batch: int = 1) -> Streaming | StackedStreaming:
    """A handle that runs ``module`` step by step and keeps its state, for inference.

    It begins with zeros, or with the state that a layer made with ``learn_state=True`` has learned.
    It owns the state and a packed copy of the weights, which makes a step of one layer cost
    microseconds. The copy is made now, and again by ``handle.refresh()``: call it after the weights
    (by ``load_state_dict``, say) or the options of the module were changed.

    Args:
        module: a layer of fastseq that is not bidirectional, or a :class:`fastseq.Stacked` of such,
            whose handle has a state for each layer. Dropout between layers is off.
        batch: how many sequences run side by side.

    Returns:
        A handle with ``step(x, out=None)``, ``reset(rows)``, ``refresh()`` and ``state``.

    Numerics: as the module's own step, up to rounding: the packed product sums in another order.
    The step is made in the weights' type, under autocast too.

    Memory: the weights once more.

    Example::

        handle = fastseq.streaming(layer, batch=8)
        for x in frames:            # (8, input_size)
            y = handle.step(x)      # (8, hidden_size), a tensor of its own
            handle.reset(ended)     # rows whose sequence has ended
    """
    kind = StackedStreaming if isinstance(module, Stacked) else Streaming
    return kind(module, batch)  # type: ignore[arg-type]
