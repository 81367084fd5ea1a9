"""The open table from module classes to rules, and the checks that a rule may be applied at all."""

from collections.abc import Callable, Mapping
from functools import singledispatch
from typing import TypeVar
from weakref import WeakSet

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from opnorm.errors import InputShapeError, UnsupportedLayerError
from opnorm.layers.weights import WEIGHT_HOOKS
from opnorm.operators import LinearOperator

Shape = tuple[int, ...]
RuleT = TypeVar("RuleT", bound=Callable[..., LinearOperator])
MethodT = TypeVar("MethodT", bound=Callable[..., object])

_OVERRIDES = ("forward", "_conv_forward", "__call__")
_SAME: "WeakSet[object]" = WeakSet()


@singledispatch
def _rule(module: object, input_shape: Shape | None) -> LinearOperator:
    name = type(module).__name__
    wrapped = next((part for part in ("_orig_mod", "module") if isinstance(getattr(module, part, None), nn.Module)), "")
    hint = f"measure the wrapped module, .{wrapped}, or " if wrapped else ""
    raise UnsupportedLayerError(
        f"there is no rule for {name}: {hint}register one with opnorm.layers.register_layer({name})"
    )


def register_layer(cls: type[nn.Module]) -> Callable[[RuleT], RuleT]:
    """Register the decorated function as the rule for `cls` and for subclasses that keep its `forward`.

    The rule gets the module and `input_shape` (the shape of one sample without the batch, or None for "valid for
    every input size") and returns the operator that the module applies in evaluation mode, without its bias. Check
    it with `opnorm.testing.check_layer`.

    Example:
        >>> import torch
        >>> from opnorm.layers import register_layer, to_operator
        >>> from opnorm.operators import Dense
        >>> class Twice(torch.nn.Module):
        ...     def forward(self, x):
        ...         return 2 * x
        >>> @register_layer(Twice)
        ... def twice(module, input_shape):
        ...     return Dense(2 * torch.eye(*input_shape))
        >>> to_operator(Twice(), (3,)).out_shape
        (3,)
    """

    def register(rule: RuleT) -> RuleT:
        _rule.register(cls, rule)
        return rule

    return register


def to_operator(module: nn.Module, input_shape: Shape | None = None) -> LinearOperator:
    """Return the linear map that a module applies in evaluation mode, without its bias.

    Args:
        module: a layer with a rule, or of a subclass that does not override `forward` (parametrized layers too).
        input_shape: the shape of one sample without the batch, such as (3, 32, 32). None asks for an operator that
            is valid for every input size.

    Returns:
        The operator. Its weight is a detached view or a fresh tensor; the module is not changed.

    Raises:
        UnsupportedLayerError: if there is no rule, or the module changes what the rule describes: an overridden
            `forward`, forward hooks, quantised or lazy weights.
        NotLinearError: if the layer is not a linear map.
        SeveralMatricesError: if the layer holds several matrices.
        InputShapeError: if `input_shape` is needed and missing, or does not fit.
        WeightError: if a weight holds NaN or infinite values or has a dtype without a norm.

    Example:
        >>> import torch
        >>> from opnorm.layers import to_operator
        >>> to_operator(torch.nn.Conv2d(3, 8, 3, padding=1), (3, 32, 32)).out_shape
        (8, 32, 32)
    """
    _check_unchanged(module)
    if isinstance(input_shape, int):
        raise InputShapeError(f"input_shape={input_shape} is a number; one axis is written ({input_shape},)")
    return _rule(module, None if input_shape is None else tuple(int(n) for n in input_shape))


def comes_to_the_same(method: MethodT) -> MethodT:
    """Say of a method that it takes the place of a layer's own and computes the same, so that the rule still holds."""
    _SAME.add(method)
    return method


def _check_unchanged(module: nn.Module) -> None:
    """Refuse a module that does something else than the class whose rule would be applied."""
    cls = type(module)
    name = cls.__name__
    way_out = f"register a rule for it with opnorm.layers.register_layer({name}), or measure its weight as a matrix"
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise UnsupportedLayerError(f"{name} has no weights before its first call; call it once on an input")
    origin = f"{cls.__module__}."
    if origin.startswith("torch.") and any(part in origin for part in (".quantized.", ".qat.", ".quantizable.")):
        raise UnsupportedLayerError(
            f"{name} is a quantised layer, which rounds its weights or activations; measure the float layer it was "
            "made from, or its dequantised weight as a matrix"
        )
    own = next((base for base in cls.__mro__ if base in _rule.registry), object)
    if own is object:
        return
    for base in cls.__mro__[: cls.__mro__.index(own)]:
        changed = _changed(vars(base))
        if changed:
            raise UnsupportedLayerError(
                f"{base.__name__} overrides {own.__name__}.{changed}, so the rule for {own.__name__} may be false "
                f"for it; {way_out}"
            )
    changed = _changed(vars(module))
    if changed:
        raise UnsupportedLayerError(f"this {name} has its own {changed}, set on the instance; {way_out}")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    foreign = [hook for hook in hooks if not _keeps_the_map(hook)]
    if foreign:
        raise UnsupportedLayerError(
            f"this {name} has forward hooks ({', '.join(map(_hook_name, foreign))}), which may change what it "
            "computes; remove them while measuring, or measure its weight as a matrix"
        )


def _changed(names: Mapping[str, object]) -> str | None:
    return next((method for method in _OVERRIDES if method in names and names[method] not in _SAME), None)


def _keeps_the_map(hook: object) -> bool:
    """Whether a hook is torch's own and only brings the weight into place."""
    return isinstance(hook, WEIGHT_HOOKS) or str(hook.__module__).startswith("torch.distributed.fsdp")


def _hook_name(hook: object) -> str:
    return getattr(hook, "__qualname__", type(hook).__name__)
