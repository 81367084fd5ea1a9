"""What FSDP2 (`fully_shard`) does to a model: its records, the classes of its layers, and a copy without it."""

import copy
import gc
import sys
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from opnorm.errors import ArgumentError
from opnorm.parametrize.sharding import as_before, gathered

_ITS_OWN = "torch.distributed.fsdp"
_LEFT_BEHIND = "__composable_api", "_is_fsdp", "_fsdp"


def _mixin() -> Any:
    """What `fully_shard` mixes into the classes of modules; nobody has called it where its module is not imported."""
    return getattr(sys.modules.get(_ITS_OWN), "FSDPModule", None)


def shards(module: nn.Module) -> bool:
    """Whether `fully_shard` was called on a module."""
    mixin = _mixin()
    return mixin is not None and isinstance(module, mixin)


def managed(module: nn.Module) -> bool:
    """Whether `fully_shard` takes care of a module's parameters; one that is added later is another on each process."""
    return bool(getattr(module, "_is_fsdp_managed_module", False))


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that a forward has left: what is written to them is lost."""
    for module in model.modules():
        if shards(module):
            cast(Any, module).reshard()


def layer_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a layer has without what `fully_shard` has put on top of it."""
    return cls.__bases__[1] if _mixin() in cls.__bases__ else cls


def on_top(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """Put on top of another class what `fully_shard` has put on top of this one."""
    if layer_class(cls) is cls:
        return base
    return type(f"FSDP{base.__name__}", (_mixin(), base), {"__deepcopy__": vars(cls)["__deepcopy__"]})


def follow(parameter: Tensor, old: tuple[nn.Module, str], new: tuple[nn.Module, str]) -> None:
    """Tell FSDP2 that a parameter which it shards has moved from one module to another.

    Raises:
        ArgumentError: if this version of torch keeps its books in another way.
    """
    if _mixin() is None:
        return
    for keeper in gc.get_referrers(parameter):
        books = keeper if isinstance(keeper, dict) else getattr(keeper, "__dict__", {})
        if parameter is not books.get("sharded_param") and parameter is not books.get("_unsharded_param"):
            continue
        info: Any = books.get("_module_info")
        if not all(hasattr(info, name) for name in ("module", "param_name", "shared_modules", "shared_param_names")):
            raise ArgumentError("this version of torch cannot normalise what fully_shard has sharded; normalise first")
        if (info.module, info.param_name) == old:
            info.module, info.param_name = new
        for place, pair in enumerate(zip(info.shared_modules, info.shared_param_names, strict=True)):
            if pair == old:
                info.shared_modules[place], info.shared_param_names[place] = new


def whole_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy that FSDP2 does not shard; all processes gather its parameters together.

    They are whole, or as parallel as they were before `fully_shard`.
    """
    if not any(map(shards, model.modules())):
        return copy.deepcopy(model)
    dropped = object()
    memo: dict[int, Any] = {
        id(p): nn.Parameter(as_before(gathered(p).clone(), lent), p.requires_grad) for p, lent in _lent(model)
    }
    memo |= {id(hook): dropped for module in model.modules() for hooks in _hooks(module) for hook in hooks.values()
             if _of_fsdp(hook)}  # fmt: skip
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    memo |= {id(module._flat_weights): [] for module in recurrent}  # whole weights of the last forward, now freed
    copies = {m: object.__new__(_unsharded(type(m))) for m in model.modules() if shards(m)}
    memo |= {id(module): copied for module, copied in copies.items()}
    for module, copied in copies.items():
        kept = {name: value for name, value in vars(module).items() if not name.startswith(_LEFT_BEHIND)}
        copied.__dict__.update(copy.deepcopy(kept, memo))
    whole = copy.deepcopy(model, memo)
    for module in whole.modules():
        if isinstance(module, nn.RNNBase) and not is_parametrized(module):
            module._init_flat_weights()
        for name in [name for name in vars(module) if name.startswith(_LEFT_BEHIND)]:
            delattr(module, name)
        for hooks in _hooks(module):
            for number in [number for number, hook in hooks.items() if hook is dropped]:
                del hooks[number]
    return whole


def _lent(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Each parameter that FSDP2 shards, and what it lends for it, whose memory is freed: of use is how that lies."""
    reshard(model)
    sharded = list(model.parameters())
    for module in model.modules():
        if shards(module):
            cast(Any, module).unshard()
    lent = list(model.parameters())
    reshard(model)
    return [(own, other) for own, other in zip(sharded, lent, strict=True) if own is not other]


def _unsharded(cls: type[nn.Module]) -> type[nn.Module]:
    """The class of a layer without FSDP2's, which a parametrization may have covered."""
    if layer_class(cls) is not cls or not issubclass(cls, _mixin()):
        return layer_class(cls)
    bases = tuple(_unsharded(base) for base in cls.__bases__)
    return type(cls.__name__, bases, {k: v for k, v in vars(cls).items() if k not in {"__dict__", "__weakref__"}})


def _hooks(module: nn.Module) -> list[dict[int, Any]]:
    return [held for name, held in vars(module).items() if name.endswith("_hooks") and isinstance(held, dict)]


def _of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith(_ITS_OWN)
