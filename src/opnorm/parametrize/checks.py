"""What `spectral_norm` refuses, found out before anything is changed."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from opnorm.errors import ArgumentError, InputShapeError, OpnormError, WeightError
from opnorm.norms.casting import Mode
from opnorm.parametrize.chains import chain_of, is_stored, rule_of
from opnorm.parametrize.estimate import Iterations
from opnorm.parametrize.families import Norm, Shape, view_of
from opnorm.parametrize.fully_sharded import managed
from opnorm.parametrize.sharding import local
from opnorm.parametrize.views import View


@dataclass(frozen=True)
class Asked:
    """The arguments of `spectral_norm` that are the same for every weight."""

    iterations: Iterations = 1
    dim: int | None = None
    lipschitz: float = 1.0
    mode: Mode = "divide"
    norm: Norm = "operator"
    learn_scale: bool = False


def check_options(asked: Asked) -> None:
    """Raise ArgumentError for what no weight can be normalised with."""
    try:
        lipschitz = float(asked.lipschitz)
    except (TypeError, ValueError):
        lipschitz = math.nan
    if not 0 < lipschitz < math.inf:
        raise ArgumentError(f"lipschitz={asked.lipschitz!r}: it is a positive number")
    if asked.mode not in {"divide", "clip"}:
        raise ArgumentError(f"mode={asked.mode!r}: it is 'divide' or 'clip'")
    if asked.norm not in {"operator", "reshaped"}:
        raise ArgumentError(f"norm={asked.norm!r}: it is 'operator', or 'reshaped' for torch's convention")
    steps: object = asked.iterations
    if steps != "adaptive" and not (isinstance(steps, int) and steps >= 1):
        raise ArgumentError(f"n_power_iterations={asked.iterations!r}: it is a positive integer, or 'adaptive'")
    if asked.learn_scale and asked.mode == "clip":
        raise ArgumentError("learn_scale=True needs mode='divide': a clipped weight may be smaller than any scale")


def checked_view(
    module: nn.Module, name: str, asked: Asked, input_shape: Shape | None, *, replacing: bool = False
) -> View:
    """Return how a weight is read as a linear map; `replacing` where torch's normalisation will be taken off first.

    Raises:
        ArgumentError: if the weight is normalised already, or an argument does not fit.
        WeightError: if it holds NaN or infinite values; for the rest see `view_of`.
    """
    check_options(asked)
    label = f"{type(module).__name__}.{name}"
    if rule_of(module, name) is not None:
        raise ArgumentError(
            f"{label} is already normalised by opnorm; call opnorm.remove_spectral_norm first to change it"
        )
    if uses_torch(module, name) and not replacing:
        raise ArgumentError(
            f"{label} is normalised by torch's spectral_norm; opnorm.convert(model) turns it into opnorm's"
        )
    if not replacing:
        _check_place(module, name, label)
    if asked.learn_scale and managed(module):
        raise ArgumentError(
            f"{label} is sharded by fully_shard, which would not know the learned scale; normalise first, then "
            "fully_shard"
        )
    view = view_of(module, name, asked.norm, asked.dim, input_shape)
    raw: Tensor = _raw(module, name) if replacing else getattr(module, name)
    if raw.device.type != "meta" and not bool(torch.isfinite(local(raw)).all()):
        raise WeightError(f"{label} holds NaN or infinite values; repair it before normalising it")
    return view


def _check_place(module: nn.Module, name: str, label: str) -> None:
    """Refuse a weight that is computed from others, that the layer writes to, or whose gradient cannot be sparse."""
    if getattr(module, "max_norm", None) is not None:
        raise ArgumentError(
            f"{label} has max_norm={module.max_norm:g}: the layer writes to its weight whenever it is read, which a "
            "weight that is computed cannot take; make the layer with max_norm=None, as no row is longer than the norm"
        )
    if getattr(module, "sparse", False):
        raise ArgumentError(
            f"{label} is asked for sparse gradients, but that of a normalised weight has no zero rows, as the norm "
            "depends on all of them; make the layer with sparse=False"
        )
    if parametrize.is_parametrized(module, name):
        if not hasattr(chain_of(module, name), "original"):
            kinds = ", ".join(type(rule).__name__.lstrip("_") for rule in chain_of(module, name))
            raise ArgumentError(
                f"{label} is stored in several parts, by {kinds}; call "
                f"torch.nn.utils.parametrize.remove_parametrizations(layer, {name!r}) first"
            )
    elif isinstance(getattr(module, name, None), Tensor) and not is_stored(module, name):
        parts = ", ".join(other for other in {**module._parameters, **module._buffers} if other.startswith(f"{name}_"))
        raise ArgumentError(
            f"{label} is no parameter but computed from others ({parts or 'unknown'}), as by weight norm or pruning; "
            "make it one first: torch.nn.utils.remove_weight_norm(layer), torch.nn.utils.prune.remove(layer, name)"
        )


def _raw(module: nn.Module, name: str) -> Tensor:
    """What torch's spectral norm divides, in either form."""
    if parametrize.is_parametrized(module, name):
        return chain_of(module, name).original
    return cast(Tensor, module._parameters[f"{name}_orig"])


def uses_torch(module: nn.Module, name: str) -> bool:
    """Whether one of torch's two functions normalises this weight."""
    if any(isinstance(hook, SpectralNorm) and hook.name == name for hook in module._forward_pre_hooks.values()):
        return True
    chain = chain_of(module, name) if parametrize.is_parametrized(module, name) else ()
    return any(isinstance(rule, _SpectralNorm) for rule in chain)


@contextmanager
def located(path: str, *, sizes: str, skip: bool = True) -> Iterator[None]:
    """Refuse with the layer's name in the model and the ways out: where sizes come from, and `skip`."""
    try:
        yield
    except OpnormError as error:
        outs = [sizes] if isinstance(error, InputShapeError) else []
        outs += [f"skip={[path]} leaves it out"] if skip and path else []
        raise type(error)("; ".join([f"{path}: {error}" if path else str(error), *outs])) from None
