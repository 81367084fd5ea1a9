"""`spectral_norm` and its removal: torch's call, the true operator's norm."""

from dataclasses import replace
from functools import partial
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from opnorm.errors import ArgumentError
from opnorm.norms.casting import Mode
from opnorm.parametrize.chains import chain_of, rule_of
from opnorm.parametrize.checks import Asked, checked_view
from opnorm.parametrize.estimate import Iterations
from opnorm.parametrize.families import Norm, Shape, weights_of
from opnorm.parametrize.forward import forward_directly
from opnorm.parametrize.fully_sharded import follow, layer_class, managed, on_top
from opnorm.parametrize.held_geometry import hold_geometry
from opnorm.parametrize.reading import read_directly
from opnorm.parametrize.sharding import PARALLELISED, ParallelizeFirst
from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.states import adopt_state
from opnorm.parametrize.views import View
from opnorm.parametrize.watched import unwatch, watch

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def spectral_norm(
    module: ModuleT,
    name: str | None = "weight",
    n_power_iterations: Iterations = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    lipschitz: float = 1.0,
    mode: Mode = "divide",
    norm: Norm = "operator",
    input_shape: Shape | None = None,
    learn_scale: bool = False,
) -> ModuleT:
    """Divide a layer's weight by its operator norm: `layer.weight` becomes `K W / sigma(W)`.

    In evaluation the divisor is a proved upper bound of the norm of the raw weight, and what is handed out is still
    within K after rounding to its dtype; it depends on the raw weight alone. In training the divisor is an estimate
    of the same norm, refreshed once for each new value of the weight, with the gradient through it.

    Args:
        module: a Linear, Embedding, convolution, MultiheadAttention or recurrent layer; changed in place.
        name: the weight; None for every matrix of the layer (q, k, v and out_proj, each by its own norm).
        n_power_iterations: block iterations for each new value of the weight; after the first hundred values a fourth
            as many, of a convolution an eighth: 1 is one at every fourth or eighth value, and in between the norm is
            what one of the vectors sees as it is. Or "adaptive": until it has settled.
        eps: accepted for compatibility and not needed: a zero weight stays zero.
        dim: the axis that becomes the rows with `norm="reshaped"`; the true operator does not depend on it.
        lipschitz: K > 0, the norm that the weight is given.
        mode: "divide", or "clip": `W / max(1, sigma / K)`.
        norm: "operator", the true one; or "reshaped", that of the kernel as a matrix, as in torch and Miyato et al.
        input_shape: of one sample, such as (3, 32, 32); None: valid for every input size.
        learn_scale: train a scale `s = K sigmoid(theta)` that takes the place of K, starting at 0.993 K.

    Returns:
        The same module.

    Guarantee:
        Proved in evaluation and after `opnorm.fold`; an estimate (from below, as torch's) in training.

    Raises:
        ArgumentError: if an argument does not fit, or the weight is already normalised.
        UnsupportedLayerError: if it is unknown which linear map the weight is.
        InputShapeError: if the norm depends on the input size and `input_shape` is missing or does not fit.
        WeightError: if the weight does not exist yet, is not finite, or is not a floating-point matrix or kernel.

    Source: Miyato et al., *Spectral Normalization for Generative Adversarial Networks*, ICLR 2018, for the idea.

    Example:
        >>> import torch, opnorm
        >>> layer = opnorm.spectral_norm(torch.nn.Conv2d(3, 8, 3, padding=1)).eval()
        >>> opnorm.norm(layer).upper <= 1.01 and opnorm.norm(opnorm.fold(layer)).lower <= 1.0
        True
    """
    if name is None:
        found = weights_of(module)
        if not found:
            raise ArgumentError(
                f"{type(module).__name__} has no weight that opnorm knows; opnorm.normalize(model) takes the layers of "
                "a model, and name=... with norm='reshaped' any weight of at least two axes"
            )
    else:
        found = [(module, name)]
    asked = Asked(n_power_iterations, dim, lipschitz, mode, norm, learn_scale)
    each = [asked if owner is module else replace(asked, dim=None) for owner, _ in found]
    # All of them first, so that a refusal leaves the layer as it was.
    views = [checked_view(*pair, options, input_shape) for pair, options in zip(found, each, strict=True)]
    for pair, options, view in zip(found, each, views, strict=True):
        attach(*pair, options, view)
    return module


def attach(module: nn.Module, name: str, asked: Asked, view: View) -> None:
    """Normalise a weight that was checked."""
    label = f"{type(module).__name__}.{name}"
    raw: Tensor = getattr(module, name)
    rule = SpectralNormalization(
        view, float(asked.lipschitz), asked.mode, asked.iterations, label, learn_scale=asked.learn_scale,
        norm=asked.norm,
    ).to(raw.device)  # fmt: skip
    rule.order = tuple(module._parameters)
    rule.train(module.training)
    parametrize.register_parametrization(module, name, rule, unsafe=True)
    read_directly(module, name)
    forward_directly(module, name)
    hold_geometry(module, name, view)
    setattr(type(module), PARALLELISED, ParallelizeFirst(label))  # a class of this layer's own, by torch
    chain = chain_of(module, name)
    follow(chain.original, (module, name), (chain, "original"))
    if not managed(module):  # FSDP2 fills what it lends without counting, and takes its memory back
        watch(chain.original)
    if raw.device.type != "meta":
        rule.triple(chain.original)
    module._register_load_state_dict_pre_hook(partial(adopt_state, name), with_module=True)  # type: ignore[no-untyped-call]


def remove_spectral_norm(module: ModuleT, name: str | None = "weight") -> ModuleT:
    """Make the weight that evaluation uses a plain parameter again; nothing of opnorm is left on the layer.

    Args:
        module: a layer that `spectral_norm` was applied to; changed in place. The raw parameter stays the same object,
            so that what is tied to it changes with it; `opnorm.fold` unties where it has to.
        name: the weight; None for every one that is normalised.

    Raises:
        ArgumentError: if that weight is not normalised by opnorm, or is parametrized by something else too.
        WeightError: if the weight holds NaN or infinite values.

    Example:
        >>> import torch, opnorm
        >>> layer = opnorm.spectral_norm(torch.nn.Linear(4, 4))
        >>> type(opnorm.remove_spectral_norm(layer)).__name__, "weight" in dict(layer.named_parameters())
        ('Linear', True)
    """
    if name is None:
        pairs = weights_of(module) or [(module, other) for other in getattr(module, "parametrizations", {})]
        found = [(owner, other) for owner, other in pairs if rule_of(owner, other) is not None]
        if not found:
            raise ArgumentError(f"{type(module).__name__} has no weight that opnorm normalises")
        for owner, other in found:
            remove_spectral_norm(owner, other)
        return module
    settle(module, name, proved_value(module, name))
    return module


def proved_value(module: nn.Module, name: str) -> Tensor:
    """Return the weight that evaluation uses, of a weight that may be settled."""
    rule = rule_of(module, name)
    if rule is None:
        raise ArgumentError(f"{type(module).__name__}.{name} is not normalised by opnorm.spectral_norm")
    chain = chain_of(module, name)
    if len(chain) > 1:
        raise ArgumentError(f"{rule.label} has other parametrizations besides opnorm's; remove those first")
    return rule.deployed(chain.original, rule.bound()).clone()


def settle(module: nn.Module, name: str, value: Tensor) -> None:
    """Write a value to the raw weight and make that a plain parameter, without anything of opnorm."""
    rule = cast(SpectralNormalization, rule_of(module, name))
    raw: Tensor = chain_of(module, name).original
    detach_parametrization(module, name)
    places = {other: place for place, other in enumerate(rule.order)}
    held = sorted(module._parameters.items(), key=lambda item: places.get(item[0], -1))
    module._parameters.clear()
    module._parameters.update(held)
    with torch.no_grad():
        raw.copy_(value)
    hooks = module._load_state_dict_pre_hooks
    for number, hook in list(hooks.items()):
        inner = getattr(hook, "hook", hook)
        if isinstance(inner, partial) and inner.func is adopt_state and inner.args == (name,):
            del hooks[number]


def detach_parametrization(module: nn.Module, name: str) -> None:
    """Make the raw tensor of a parametrized weight a plain parameter of the layer again.

    `torch.nn.utils.parametrize.remove_parametrizations` deletes the property from the layer's class, which a deep
    copy of the layer shares: removing it from a copy would break the original.
    """
    top, cls = type(module), layer_class(type(module))
    chain = chain_of(module, name)
    raw: Tensor = chain.original
    unwatch(raw)
    rule = rule_of(module, name)
    if rule is not None:
        rule.hand_out(None)
    chains = cast(nn.ModuleDict, module.parametrizations)
    del chains[name]
    if len(chains):
        dropped = {name, "__dict__", "__weakref__"} | ({"forward", "__setattr__"} if name == "weight" else set())
        if all(rule_of(module, other) is None for other in chains):
            dropped.add(PARALLELISED)
        kept = {key: value for key, value in vars(cls).items() if key not in dropped}
        module.__class__ = on_top(top, type(cls.__name__, cls.__bases__, kept))
    else:
        del module.parametrizations
        module.__class__ = on_top(top, cls.__bases__[0])
    if isinstance(raw, nn.Parameter):
        module.register_parameter(name, raw)
    else:
        module.register_buffer(name, raw)
    follow(raw, (chain, "original"), (module, name))
    if isinstance(module, nn.RNNBase) and not parametrize.is_parametrized(module):
        module._init_flat_weights()  # it keeps a list of its weights
