"""torch.fx: in a graph that it traces a layer or cell is one node, as torch.nn's are."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Proxy
from torch.fx.proxy import TraceError

_PLAIN = frozenset((Tensor, bool, type(None)))


def _first(values: Any) -> Proxy | None:
    """One that stands for a tensor, among values and those in their tuples and lists."""
    for value in values:
        if type(value) in _PLAIN:  # 1 us less
            continue
        if isinstance(value, Proxy):
            return value
        if isinstance(value, (tuple, list)) and (found := _first(value)) is not None:
            return found
    return None


def leaf(module: Any, forward: Any, input: Any, hx: Any = None, **given: Any) -> Proxy | None:
    """The node of a call whose arguments stand for tensors; None where none does.

    forward: the one that makes a call a single node. A subclass with another one is traced.
    """
    found = _first((input, hx, *given.values()))
    if found is None or type(module).forward is not forward:
        return None
    arguments = (input,) if hx is None else (input, hx)
    keywords = {n: v for n, v in given.items() if v is not None and v is not False}
    tracer: Any = found.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise TraceError(
            f"torch.fx takes a {type(module).__name__} as a leaf; trace a module that holds it"
        )
    # A hook ran on what stands for tensors, or will: the graph would hold what it does, and the
    # module do it again. Those of torch.nn.utils make weights of the module's own.
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    if any(not type(hook).__module__.startswith("torch.nn.utils") for hook in hooks):
        raise TraceError(
            f"{path}: torch.fx would record the hooks of a {type(module).__name__} and the module "
            "would run them again; remove them, trace, and register them then"
        )
    return tracer.create_proxy("call_module", path, arguments, keywords)
