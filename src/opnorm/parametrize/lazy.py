"""What `layer.weight` returns in eager mode: a normalised weight that is computed when it is read.

It lets `F.linear` skip the division, and writes such as `torch.nn.init.normal_(layer.weight)` reach the raw weight.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled
from torch.utils._pytree import tree_map_only

from opnorm.errors import ArgumentError
from opnorm.parametrize.convolved import FUNCTIONS, geometry
from opnorm.parametrize.direct import convolution, linear
from opnorm.parametrize.rule import Rule

_DESCRIBE = frozenset(
    {
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_quantized", "is_meta", "is_nested", "grad")),
        *(getattr(Tensor, name).__get__ for name in ("is_cpu", "is_cuda", "is_mps", "is_xpu")),
        *(getattr(Tensor, name) for name in ("size", "dim", "numel", "nelement", "stride", "is_floating_point")),
        *(getattr(Tensor, name) for name in ("is_complex", "__len__", "__hash__", "element_size", "ndimension")),
        *(getattr(Tensor, name) for name in ("is_contiguous", "is_inference")),
    }
)
_OVERWRITE = frozenset(
    [
        "bernoulli_",
        "cauchy_",
        "copy_",
        "exponential_",
        "fill_",
        "geometric_",
        "log_normal_",
        "normal_",
        "random_",
        "requires_grad_",
        "uniform_",
        "zero_",
    ]
)
_DIRECT = frozenset([F.linear, *FUNCTIONS])
_GIVES_MEMORY = frozenset(
    {"numpy", "__array__", "__dlpack__", "__reduce_ex__", "data_ptr", "storage", "untyped_storage"}
)
"""What gives away the memory of a tensor in another way than by a tensor that it returns."""
_VIEWS = frozenset({"view", "view_as", "reshape", "flatten", "t", "transpose", "permute", "__getitem__", "detach"})


class NormalizedWeight(Tensor):
    """A tensor without storage; reading it computes the normalised weight, overwriting it writes the raw weight."""

    _owner: Rule
    _raw: Tensor
    _root: "NormalizedWeight"
    _path: tuple[tuple[Any, tuple[Any, ...], dict[str, Any]], ...]
    _detached: bool
    _value: Tensor | None
    _separate: bool
    _written: bool

    @staticmethod
    def __new__(cls, owner: Rule, raw: Tensor, root: "NormalizedWeight | None" = None) -> "NormalizedWeight":
        """Wrap the raw weight of a parametrization, or a view of it."""
        grad = raw.requires_grad and torch.is_grad_enabled()
        self: NormalizedWeight = torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), dtype=raw.dtype, device=raw.device, requires_grad=grad
        )
        self._owner, self._raw, self._root = owner, raw, self if root is None else root
        self._path, self._detached, self._value, self._separate, self._written = (), False, None, False, False
        return self

    @property
    def _is_param(self) -> bool:
        """What `nn.Parameter(tensor)` sets on a tensor of another class than torch's own: it would not be one here."""
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        raise ArgumentError(
            "a normalised weight is computed from the raw one and cannot be a parameter; make one of "
            "layer.weight.detach().clone()"
        )

    def materialised(self) -> Tensor:
        """Return the normalised weight as a plain tensor, computed once for each access to `layer.weight`.

        In evaluation it may be what is deployed: nobody may write to it.
        """
        root = self._root
        value = root._value
        unrecorded = value is not None and is_grad_enabled() and root._raw.requires_grad and not value.requires_grad
        if value is None or unrecorded:
            root._value = value = root._owner.value(root._raw)
            root._separate = root._owner.training or value.is_inference()
        for func, args, kwargs in self._path:
            value = func(value, *args, **kwargs)
        return value.detach() if self._detached else value

    def separate(self) -> None:
        """Compute the weight of this access to `layer.weight` elsewhere than where the deployed one lies."""
        value = self.materialised()
        if not self._separate:
            self._value, self._separate = value.clone(), True

    def written(self) -> Tensor:
        """Return the raw weight, which somebody writes to: what was computed from it is over."""
        root = self._root
        root._written, root._value = True, None
        root._owner.renew()
        return self._raw

    def viewed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "NormalizedWeight":
        """Return a view, through which an initialisation can still write."""
        other = NormalizedWeight(self._owner, func(self._raw.detach(), *args, **kwargs), self._root)
        other._path, other._detached = (*self._path, (func, args, kwargs)), True
        return other

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Describe without computing, write to the raw weight, and compute the value for everything else."""
        kwargs = kwargs or {}
        if func in _DIRECT and len(args) > 1 and isinstance(args[1], NormalizedWeight):
            weight = args[1]
            unread = weight._owner.training and weight is weight._root and weight._value is None
            fast = _direct(func, args, kwargs) if unread else None
            return func(args[0], weight.materialised(), *args[2:], **kwargs) if fast is None else fast
        if func in _DESCRIBE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        first = args[0] if args and isinstance(args[0], NormalizedWeight) else None
        if first is not None:
            if func is Tensor.__deepcopy__:  # recurrent layers keep a list of their weights
                return first.materialised().detach().clone()
            if func == Tensor.data.__get__:  # type: ignore[attr-defined]
                return first.viewed(Tensor.detach, (), {})
            if func == Tensor.data.__set__:  # type: ignore[attr-defined]
                return _write(first, Tensor.copy_, args[1:], {})
            if name in _VIEWS and (name == "detach" or not torch.is_grad_enabled()):
                return first.viewed(func, args[1:], kwargs)
            if _writes(name):
                return _write(first, func, args[1:], kwargs)
        if getattr(func, "__module__", "") == "torch.nn.init" or isinstance(kwargs.get("out"), NormalizedWeight):
            args, kwargs = tree_map_only(NormalizedWeight, NormalizedWeight.written, (args, kwargs))
            with torch.no_grad():
                return func(*args, **kwargs)
        return _read(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Refuse what went past `__torch_function__`: it would lose the gradient of the raw weight.

        Raises:
            ArgumentError: always.
        """
        if func is torch.ops.aten.set_.source_Tensor:
            raise ArgumentError(
                f"{args[1]._owner.label} is divided by an estimate while it trains; opnorm.remove_spectral_norm(layer) "
                "leaves the proved weight, torch's remove_parametrizations would not"
            )
        raise ArgumentError(
            f"{func} got a normalised weight in a way that opnorm cannot follow; pass layer.weight.clone() instead"
        )


Read = Callable[[NormalizedWeight], Tensor]


def _direct(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The layer's output without its weight, or None where the weight has to be computed first."""
    x, weight, *rest = args
    bias = rest.pop(0) if rest else kwargs.get("bias")
    if func is F.linear:
        return linear(weight._owner, x, weight._raw, bias)
    named = {name: value for name, value in kwargs.items() if name != "bias"}
    shape = geometry(FUNCTIONS[func], *rest, **named)
    return convolution(weight._owner, x, weight._raw, bias, shape)


def _read(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call with the computed weights; what is deployed is neither written to nor given away to be written to."""
    gives_memory = getattr(func, "__name__", "") in _GIVES_MEMORY
    found: dict[int, tuple[NormalizedWeight, Tensor, int | None]] = {}

    def read(weight: NormalizedWeight) -> Tensor:
        root = weight._root
        if id(root) not in found:
            if gives_memory:
                root.separate()
            value = root.materialised()
            found[id(root)] = root, value, None if root._separate else value._version
        return weight.materialised()

    result = _called(func, args, kwargs, read)
    again = False
    for root, value, version in found.values():
        if version is None:
            continue
        if value._version != version:  # as `relu(weight, inplace=True)`, of which nothing tells before
            root._owner.spoilt()
            root._value = None
        elif not any(_shares_memory(part, value) for part in _parts(result)):
            continue
        root.separate()
        again = True
    return _called(func, args, kwargs, NormalizedWeight.materialised) if again else result


def _parts(nested: object) -> Iterator[object]:
    """As torch's `tree_leaves`, in a third of the time."""
    if isinstance(nested, list | tuple):
        for part in nested:
            yield from _parts(part)
    elif isinstance(nested, dict):
        yield from _parts(tuple(nested.values()))
    else:
        yield nested


def _called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], read: Read) -> Any:
    return func(*_plain(args, read), **dict(zip(kwargs, _plain(tuple(kwargs.values()), read), strict=True)))


def _shares_memory(result: object, value: Tensor) -> bool:
    if not isinstance(result, Tensor) or result.layout != torch.strided:
        return False
    core: Any = torch._C
    return not core._functorch.is_functorch_wrapped_tensor(result) and bool(core._is_alias_of(result, value))


def _plain(values: tuple[Any, ...], read: Read) -> tuple[Any, ...]:
    """The arguments with normalised weights read; lists and tuples of tensors are searched too."""
    found = []
    for value in values:
        if isinstance(value, NormalizedWeight):
            found.append(read(value))
        elif isinstance(value, list | tuple | dict):
            found.append(tree_map_only(NormalizedWeight, read, value))
        else:
            found.append(value)
    return tuple(found)


def _writes(name: str) -> bool:
    return (
        name in {"__setitem__", "__set__"}
        or (name.endswith("_") and not name.endswith("__"))
        or (
            name.startswith("__i")
            and name in {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__imatmul__"}
        )
    )


def _write(weight: NormalizedWeight, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    name = func.__name__
    if name not in _OVERWRITE and func is not Tensor.copy_ and not weight._root._written:
        raise ArgumentError(
            f"{name} on a normalised weight would be lost, as the weight is computed from the raw one; assign "
            "layer.weight = value, or write to layer.parametrizations.weight.original and call opnorm.update(layer)"
        )
    args, kwargs = tree_map_only(NormalizedWeight, NormalizedWeight.materialised, (args, kwargs))
    if name == "requires_grad_":
        weight._raw.requires_grad_(*args, **kwargs)
        return weight
    with torch.no_grad():
        func(weight._raw.detach(), *args, **kwargs)
    weight.written()
    return weight
