"""torch.nn's module in place of fastseq's."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from . import flat_weights
from .options import options

#: What torch.nn's modules have not.
OWN = ("_fastseq", "_fastseq_put")

#: The methods that make up a call of torch.nn's modules.
_METHODS = (
    "forward",
    "check_forward_args",
    "check_input",
    "check_hidden_size",
    "get_expected_hidden_size",
    "get_expected_cell_size",
    "permute_hidden",
)


def to_torch(module: nn.Module) -> nn.Module:
    """A torch.nn module of the same kind with the very parameters, hooks and mode of ``module``.

    ``torch.jit.script`` gets these. The hooks are shared, so that their handles serve both.

    Raises:
        TypeError: torch.nn has no counterpart that computes the same.
    """
    theirs = counterpart(module)
    if isinstance(theirs, str):
        raise TypeError(f"{type(module).__name__} has no counterpart in torch.nn: {theirs}")
    twin: Any = theirs.__new__(theirs)
    twin.__dict__.update(module.__dict__)
    for own in ("_parameters", "_buffers", "_modules"):
        twin.__dict__[own] = twin.__dict__[own].copy()
    # these hooks hold a weak reference to their module, which scripting lets go
    hooks: Any = module._load_state_dict_pre_hooks
    twin._load_state_dict_pre_hooks = OrderedDict(
        (key, hook if hook.module is None else type(hook)(hook.hook, twin))
        for key, hook in hooks.items()
    )
    become(twin, theirs)
    return twin


def own_methods(module: nn.Module) -> list[str]:
    """What was replaced on the instance of what a call runs.

    Such a function is mostly a closure around the bound method of the class that the module had,
    which would run on, or fail, after a change of class.
    """
    return [name for name in _METHODS if name in vars(module)]


def wrapped_by_torch(kind: type[nn.Module]) -> bool:
    """Whether torch.distributed gave a module this class, as fully_shard and replicate do."""
    places = ("torch.distributed.fsdp.", "torch.distributed._composable.")
    return any(base.__module__.startswith(places) for base in kind.__mro__)


def counterpart(module: nn.Module) -> type[nn.Module] | str:
    """torch.nn's class that computes what ``module`` does, or why there is none."""
    if parametrize.is_parametrized(module):
        return "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations first"
    if beyond := getattr(module, "_fastseq_beyond", None):
        return beyond
    ours: Any = next((k for k in type(module).__mro__ if "_fastseq_torch" in vars(k)), None)
    if ours is None:
        return f"it has no {type(module).__name__}"
    if names := own_methods(module):
        return f"its {' and '.join(names)} was replaced on the instance; take that off first"
    if wrapped_by_torch(type(module)):
        return f"torch.distributed made it a {type(module).__name__}"
    for name in ("forward", "__call__"):
        if getattr(type(module), name) is not getattr(ours, name):
            return f"{type(module).__qualname__} has a {name} of its own"
    if rates := getattr(options(module), "rates", None):
        masked = [name for name, rate in rates._asdict().items() if rate]
        remedy = ", ".join(f"layer.fastseq.{name} = 0" for name in masked)
        return f"torch.nn has no {', '.join(masked)}; set it to 0 first, {remedy}"
    if getattr(options(module), "learn_state", False):
        return "its initial state is learned (learn_state=True); torch.nn's layers begin with zeros"
    return vars(ours)["_fastseq_torch"]


def become(module: Any, theirs: type[nn.Module]) -> None:
    put = flat_weights.valid(module) if module.__dict__.get("_fastseq_put") else None
    module.__class__ = theirs
    for own in OWN:
        module.__dict__.pop(own, None)
    if isinstance(module, nn.RNNBase):
        module._init_flat_weights()  # a list that torch.nn keeps and fastseq does not
        if put is not None:
            module._flat_weights = list(put)
