"""Truncated backpropagation through time: windows of a sequence, and the state between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from ..ops.checks import check_lengths, positive
from .options import HasOptions


def detach(state: Any) -> Any:
    """The state without what it was computed from: its gradient ends here.

    Args:
        state: a tensor, or any nest of tuples, named tuples, lists and dicts of tensors; whatever
            is no tensor, None too, stays as it is.

    Returns:
        The same nest, with each tensor detached, which shares its memory.
    """
    return tree_map_only(Tensor, torch.detach, state)


class Window(NamedTuple):
    """Some steps of a sequence, as :func:`tbptt` has run the model over them.

    inputs, targets: of these steps, cut from the whole; targets None where none were given.
    output: what the model returned for these steps.
    start, stop: the steps are start, ..., stop - 1 of the sequence.
    lengths: (B,), how many of these steps are each sequence's own; None where no lengths were
        given.
    """

    inputs: Any
    targets: Any
    output: Any
    start: int
    stop: int
    lengths: Tensor | None


def tbptt(
    model: Callable[..., Any],
    inputs: Any,
    targets: Any = None,
    *,
    window: int,
    back: int | None = None,
    state: Any = None,
    lengths: Tensor | Sequence[int] | None = None,
    reset: Tensor | None = None,
    batch_first: bool = False,
) -> Windows:
    r"""Truncated backpropagation through time: a model over a long sequence, window by window.

    A window's loss and optimizer stay with the caller::

        windows = fastseq.training.tbptt(model, inputs, targets, window=100)
        for window in windows:
            loss = loss_fn(window.output, window.targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    The state behind a window is carried to the next, its gradient is not. The last window has the
    steps that are left. ``windows.state`` is the state behind the last step that was yielded,
    detached; given as ``state`` it is carried into another sequence or epoch.

    With ``back`` the gradient of a window's loss goes back over the ``back - window`` steps in
    front of it, too:

    .. math::
        \frac{\partial}{\partial \theta} \sum_{t = t' - k_1 + 1}^{t'} L_t
        \quad \text{with } h_{t' - k_2} \text{ constant}

    with :math:`t'` the window's last step, :math:`k_1` ``window`` and :math:`k_2` ``back``. The
    model runs once more over the :math:`k_2 - k_1` steps in front of a window, as the parameters
    are now, so that a step costs :math:`k_2 / k_1` times what it does without.

    Args:
        model: ``output, state = model(inputs, state)``, as a layer, or a module around one. Where
            ``lengths`` or ``reset`` are given, it takes those of the window as keywords.
        inputs: a tensor (T, B, ...) or (B, T, ...) with ``batch_first``, or a nest of them; token
            numbers, too.
        targets: alike, or None.
        window: k_1, the steps between two updates, at least 1.
        back: k_2, the steps over which a gradient goes back, at least ``window``, which it is if
            None.
        state: the state in front of the first step, whatever the model takes; its gradient is not
            cut off. None: the model's own.
        lengths: (B,) integers from 0 to T, or None. Windows end with the longest sequence.
        reset: (T, B) bool, (B, T) with ``batch_first``, or None: True where a new sequence begins
            in mid-stream, so that no state crosses from the step before.
        batch_first: how inputs, targets, the model's output and reset lie.

    Returns:
        An iterable of :class:`Window`, of which each iteration begins again at the first step with
        ``state``. The model is called when its window is asked for, in the grad mode of the
        caller.

    Raises:
        TypeError, ValueError: an argument is none of these; a bidirectional layer, whose state
            would come from the steps ahead.

    Source: Williams and Peng 1990, An Efficient Gradient-Based Algorithm for On-Line Training of
    Recurrent Network Trajectories (their h' is k_1 and h is k_2); Sutskever 2013, Training
    Recurrent Neural Networks, section 2.8.6.
    """
    if not callable(model):
        raise TypeError(f"model: expected a module or function, got {type(model).__name__}")
    if isinstance(model, nn.RNNBase) and model.bidirectional:
        raise ValueError(
            "model: a bidirectional layer reads from the end too, which a window does not have; "
            "make it with bidirectional=False"
        )
    if isinstance(model, nn.RNNBase) and not isinstance(model, HasOptions):
        for name, value in (("lengths", lengths), ("reset", reset)):
            if value is not None:
                raise TypeError(
                    f"{name}: torch.nn's {type(model).__name__} takes none; fastseq.replace(layer) "
                    "makes it fastseq's"
                )
    window = positive("window", window)
    back = window if back is None else back
    back = positive("back", back)
    if back < window:
        raise ValueError(f"back: expected at least window = {window}, got {back}")
    if not isinstance(batch_first, bool):
        raise TypeError(f"batch_first: expected a bool, got {type(batch_first).__name__}")
    own = getattr(model, "batch_first", batch_first)
    if isinstance(own, bool) and own != batch_first:
        raise ValueError(f"batch_first: expected the model's own, {own}, got {batch_first}")
    time = 1 if batch_first else 0
    T = _steps("inputs", inputs, time)
    if targets is not None and (steps := _steps("targets", targets, time)) != T:
        raise ValueError(f"targets: expected T = {T} steps, as the inputs have, got {steps}")
    shape = tree_leaves(inputs)[0].shape
    B = shape[1 - time] if len(shape) > 1 else 1
    if lengths is not None:
        lengths = check_lengths(lengths, T, B, False, True)
    if reset is not None:
        if not isinstance(reset, Tensor) or reset.dtype is not torch.bool:
            got = reset.dtype if isinstance(reset, Tensor) else type(reset).__name__
            raise TypeError(f"reset: expected a bool tensor, got {got}")
        expected = (B, T) if batch_first else (T, B)
        if tuple(reset.shape) != expected:
            raise ValueError(f"reset: expected {expected}, got {tuple(reset.shape)}")
    return Windows(model, inputs, targets, window, back, state, lengths, reset, time, T)


class Windows:
    """What :func:`tbptt` returns.

    state: behind the last step that was yielded, detached.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        inputs: Any,
        targets: Any,
        window: int,
        back: int,
        state: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        time: int,
        T: int,
    ) -> None:
        self._model, self._inputs, self._targets = model, inputs, targets
        self._window, self._back = window, back
        self._lengths, self._reset, self._time = lengths, reset, time
        self._steps = T if lengths is None or not len(lengths) else int(lengths.max())
        self._first = state
        self.state = detach(state)

    def __len__(self) -> int:
        return -(-self._steps // self._window)

    def __iter__(self) -> Iterator[Window]:
        window, overlap = self._window, self._back - self._window
        begin, state = 0, self._first  # of the steps that the next gradient goes back over
        self.state = detach(state)
        for start in range(0, self._steps, window):
            stop = min(start + window, self._steps)
            # The next window's gradient begins at step `ahead`: the state in front of it is kept.
            ahead = max(stop - overlap, 0)
            parts = []
            for first, last in ((begin, ahead), (ahead, stop)):
                if first < last:
                    output, state = self._run(first, last, state)
                    parts.append(output)
                if last == ahead:
                    kept = state
            output = parts[0] if len(parts) == 1 else self._joined(*parts)
            if begin < start:
                output = self._cut(output, start - begin, stop - begin)
            self.state = detach(state)
            begin, state = ahead, detach(kept) if ahead else kept
            yield Window(
                self._cut(self._inputs, start, stop),
                self._cut(self._targets, start, stop),
                output,
                start,
                stop,
                self._own(start, stop),
            )

    def _run(self, start: int, stop: int, state: Any) -> tuple[Any, Any]:
        given: dict[str, Any] = {}
        if self._lengths is not None:
            given["lengths"] = self._own(start, stop)
        if self._reset is not None:
            given["reset"] = self._cut(self._reset, start, stop)
        returned = self._model(self._cut(self._inputs, start, stop), state, **given)
        if not isinstance(returned, tuple) or len(returned) != 2:
            got = type(returned).__name__
            if isinstance(returned, tuple):
                got = f"{len(returned)} values"
            raise TypeError(f"model: expected it to return (output, state), got {got}")
        return returned

    def _own(self, start: int, stop: int) -> Tensor | None:
        return None if self._lengths is None else (self._lengths - start).clamp(0, stop - start)

    def _cut(self, nest: Any, start: int, stop: int) -> Any:
        return tree_map_only(Tensor, lambda x: x.narrow(self._time, start, stop - start), nest)

    def _joined(self, *nests: Any) -> Any:
        def cat(*parts: Any) -> Any:
            return torch.cat(parts, self._time) if isinstance(parts[0], Tensor) else parts[0]

        return tree_map(cat, *nests)


def _steps(name: str, nest: Any, time: int) -> int:
    """T, of all tensors of a nest."""
    leaves = tree_leaves(nest)
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        got = ", ".join(sorted({type(leaf).__name__ for leaf in leaves})) or "none"
        raise TypeError(f"{name}: expected a tensor, or a nest of tensors, got {got}")
    for leaf in leaves:
        if leaf.dim() <= time:
            raise ValueError(f"{name}: expected time as dimension {time}, got {leaf.dim()}-D")
    steps = {leaf.shape[time] for leaf in leaves}
    if len(steps) > 1:
        raise ValueError(f"{name}: expected the same T in all tensors, got {sorted(steps)}")
    (T,) = steps
    if T == 0:
        raise ValueError(f"{name}: expected at least one step, got T = 0")
    return T
