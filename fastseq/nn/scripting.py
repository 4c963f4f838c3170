"""torch.jit.ScriptModule, the way to TorchScript before torch.jit.script, compiles what it holds.

torch.jit.script asks each module which one it compiles (``__prepare_scriptable__``); a ScriptModule
asks none. So a module of ours becomes torch.nn's as it is registered in one.
"""

from __future__ import annotations

from weakref import WeakSet

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .counterparts import to_torch
from .options import HasOptions

#: What a ScriptModule holds, in which more may be registered before it is compiled.
_HELD: WeakSet[nn.Module] = WeakSet()


def prepared(parent: nn.Module, name: str, module: nn.Module | None) -> nn.Module | None:
    """torch.nn's module in place of ours; those inside of ``module`` are exchanged in place."""
    if not isinstance(parent, torch.jit.ScriptModule) and not (_HELD and parent in _HELD):
        return None
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return None
    inner = list(module.modules())
    twins: dict[nn.Module, nn.Module] = {m: to_torch(m) for m in inner if isinstance(m, HasOptions)}
    for holder in inner:
        for key, held in holder._modules.items():
            if held in twins:
                holder._modules[key] = twins[held]
    _HELD.update(inner)
    return twins.get(module)


register_module_module_registration_hook(prepared)  # type: ignore[arg-type]
