"""Which weights of a layer can be normalised, and how each is read as a linear map."""

from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from opnorm.errors import ArgumentError, UnsupportedLayerError, WeightError
from opnorm.layers import to_operator
from opnorm.norms.select import select
from opnorm.operators import Conv, ConvTranspose
from opnorm.parametrize.deployed import CONV_RTOL
from opnorm.parametrize.fully_sharded import layer_class
from opnorm.parametrize.views import View, conv_view, is_loose, matrix_view

Norm = Literal["operator", "reshaped"]
Shape = tuple[int, ...]

CONVOLUTIONS = nn.Conv1d | nn.Conv2d | nn.Conv3d
TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
LOOKUPS = nn.Embedding | nn.EmbeddingBag
RECURRENT = nn.RNNBase | nn.RNNCellBase


def weights_of(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return the weights of a layer that act as linear maps, each with the module that holds it; [] for none."""
    if isinstance(module, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
        here = [(module, name) for name in names if getattr(module, name, None) is not None]
        return [*here, (module.out_proj, "weight")]
    if isinstance(module, RECURRENT):
        held = {*module._parameters, *getattr(module, "parametrizations", {})}
        return [(module, name) for name in _ordered(module, held) if name.startswith("weight_")]
    if isinstance(module, nn.Linear | CONVOLUTIONS | TRANSPOSED | LOOKUPS):
        return [(module, "weight")]
    return []


def _ordered(module: nn.Module, held: set[str]) -> list[str]:
    names = getattr(module, "_flat_weights_names", None) or sorted(held)
    return [name for name in names if name in held]


def view_of(
    module: nn.Module, name: str, norm: Norm, dim: int | None, input_shape: Shape | None, *, attained: bool = False
) -> View:
    """Return how a weight is read as a linear map: for the bound that is deployed, or for the norm that is `attained`.

    Raises:
        ArgumentError: if the layer has no such weight, or an argument does not fit.
        UnsupportedLayerError: if there is no rule for the true operator of this layer.
        WeightError: if the weight has not been created yet, is empty, or has fewer than two axes.
    """
    weight = getattr(module, name, None)
    label = f"{type(module).__name__}.{name}"
    if not isinstance(weight, Tensor):
        raise ArgumentError(f"{label} is not a tensor; this layer has {_choices(module)}")
    if is_lazy(weight):
        raise WeightError(f"{label} has no values before the first call; call the model once on an input, then wrap it")
    if not (weight.is_floating_point() or weight.is_complex()):
        raise WeightError(f"{label} has the dtype {weight.dtype}, which cannot be divided; normalise the float layer")
    if weight.ndim < 2:
        raise WeightError(f"{label} has shape {tuple(weight.shape)}; a vector has no operator norm to divide by")
    if not weight.numel():
        raise WeightError(f"{label} has shape {tuple(weight.shape)}: no entries to divide; leave the layer out")
    usual = 1 if isinstance(module, TRANSPOSED) else 0
    if norm == "reshaped":
        if dim is not None and not -weight.ndim <= dim < weight.ndim:
            raise ArgumentError(f"dim={dim}: {label} has {weight.ndim} axes")
        axis = usual if dim is None else dim % weight.ndim
        return matrix_view(weight.shape[axis], weight.numel() // weight.shape[axis], axis=axis)
    if dim not in {None, usual}:
        raise ArgumentError(
            f"dim={dim}: the norm of the true operator does not depend on how {label} is reshaped; leave dim out, or "
            'pass norm="reshaped"'
        )
    return _operator_view(module, name, weight, input_shape, attained)


def _operator_view(module: nn.Module, name: str, weight: Tensor, input_shape: Shape | None, attained: bool) -> View:
    if isinstance(module, nn.MultiheadAttention | RECURRENT | LOOKUPS) and weight.ndim == 2:
        stacked = 3 if name == "in_proj_weight" else 1  # q, k and v, each divided by its own norm
        return matrix_view(weight.shape[0] // stacked, weight.shape[1], blocks=stacked, joint=stacked == 1)
    if not any((module, name) == pair for pair in weights_of(module)):
        raise UnsupportedLayerError(
            f"opnorm does not know which linear map {type(module).__name__}.{name} is; use a layer that it knows "
            '(Linear, Embedding, convolutions, attention, recurrent), or norm="reshaped" for the norm of the matrix'
        )
    operator = to_operator(_bare(module), input_shape)
    if not isinstance(operator, Conv | ConvTranspose):
        return matrix_view(*weight.shape)
    return conv_view(operator, sampled=_border_matters(operator) or (attained and is_loose(operator)))


def _bare(module: nn.Module) -> nn.Module:
    """A layer of the same geometry without hooks, parametrizations and values."""
    cls = layer_class(type(module))
    cls = cls.__bases__[0] if parametrize.is_parametrized(module) else cls
    other: nn.Module = object.__new__(cls)
    other.__dict__ = {
        **module.__dict__,
        "_parameters": {},
        "_modules": {},
        "_forward_hooks": {},
        "_forward_pre_hooks": {},
    }
    weight: Tensor = module.weight  # type: ignore[assignment]
    zero = torch.zeros((), dtype=weight.dtype, device="cpu").expand(weight.shape)  # also where all else is meta
    other._parameters.update(weight=nn.Parameter(zero, requires_grad=False), bias=None)
    return other


def _border_matters(operator: Conv | ConvTranspose) -> bool:
    """Whether the proof goes by the operator's own matrix, so that the estimate has to be of the same."""
    conv = operator.conv if isinstance(operator, ConvTranspose) else operator
    if operator.spatial is None or (
        prod(conv.kernel) == 1 and max(conv.stride) == 1 and not any(map(any, conv.padding))
    ):
        return False
    return select(operator, rtol=CONV_RTOL).method != "torus"


def _choices(module: nn.Module) -> str:
    found = [name if owner is module else f"out_proj.{name}" for owner, name in weights_of(module)]
    return (
        f"{', '.join(found)} (name=None takes them all)"
        if found
        else "no weight that opnorm knows; opnorm.normalize(model) takes all the layers of a model"
    )
