"""torch.fx: in a graph that it traces a layer or cell is one node, as torch.nn's are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.fx import Proxy


def proxies(value: Any) -> Iterator[Proxy]:
    if isinstance(value, Proxy):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from proxies(item)


def leaf(module: Any, forward: Any, input: Any, hx: Any = None, **given: Any) -> Proxy | None:
    """The node of a call whose arguments stand for tensors; None where none does.

    forward: the one that makes a call a single node. A subclass with another one is traced.
    """
    found = next(proxies((input, hx, *given.values())), None)
    if found is None or type(module).forward is not forward:
        return None
    arguments = (input,) if hx is None else (input, hx)
    keywords = {n: v for n, v in given.items() if v is not None and v is not False}
    tracer: Any = found.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, keywords)
