"""Folding BatchNorm, in its evaluation form, into the layer before it."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from opnorm.errors import ArgumentError
from opnorm.parametrize.covered import BATCH_NORMS
from opnorm.parametrize.example import run_on
from opnorm.parametrize.families import CONVOLUTIONS, TRANSPOSED
from opnorm.parametrize.flow import run_once

TOLERANCE = 1e-4


def fold_batch_norms(model: nn.Module, example_input: Any) -> None:
    """Replace every BatchNorm that alone reads a linear layer's output by that layer with other weights, in place.

    A warning names those that stay.

    Raises:
        ArgumentError: if there is none, or if that changes the model's output on `example_input`, as where a layer's
            output is used elsewhere too; the model is left as it was.
    """
    twin = copy.deepcopy(model)
    if not _fold_all(twin, example_input):
        raise ArgumentError(
            "fold_batch_norm=True folds nothing: no BatchNorm of this model is the only one to read the output of a "
            "plain linear layer; leave it out"
        )
    before, after = _output(model, example_input), _output(twin, example_input)
    if not torch.allclose(before, after, rtol=TOLERANCE, atol=TOLERANCE * float(before.abs().max())):
        raise ArgumentError(
            "folding BatchNorm changes the model's output on example_input: the output of a layer before one is used "
            "elsewhere too; leave fold_batch_norm out"
        )
    _fold_all(model, example_input)
    left = [path for path, module in model.named_modules() if isinstance(module, BATCH_NORMS)]
    if left:
        warnings.warn(
            f"{', '.join(left)} not folded: only a BatchNorm with running statistics that alone reads a plain linear "
            "layer's output is; it scales by weight / sqrt(var + eps) on top of the bound",
            stacklevel=3,
        )


def _fold_all(model: nn.Module, example_input: Any) -> int:
    """Return how many were folded."""
    count = 0
    flow = run_once(model, example_input)
    paths = {module: path for path, module in model.named_modules()}
    for layer, readers in flow.readers.items():
        norm = readers[0]
        plain = isinstance(layer, nn.Linear | CONVOLUTIONS | TRANSPOSED) and "weight" in layer._parameters
        if plain and len(readers) == 1 and isinstance(norm, BATCH_NORMS) and norm.track_running_stats:
            _fold(layer, norm)
            parent, _, name = paths[norm].rpartition(".")
            setattr(model.get_submodule(parent), name, nn.Identity())
            count += 1
    return count


def _fold(layer: Any, norm: Any) -> None:  # the classes were checked
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    if isinstance(layer, nn.Linear):
        weight, bias = fuse_linear_bn_weights(layer.weight, layer.bias, *statistics)
    else:
        transposed = isinstance(layer, TRANSPOSED)
        weight, bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics, transpose=transposed)
    layer.weight, layer.bias = weight, bias


def _output(model: nn.Module, example_input: Any) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            found = run_on(model, example_input)
    finally:
        for module, training in modes:
            module.training = training
    if not isinstance(found, Tensor):
        raise ArgumentError(
            f"fold_batch_norm compares the model's outputs, which must be one tensor, not {type(found).__name__}"
        )
    return found
