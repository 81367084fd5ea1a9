"""Normalising every linear layer of a model at once."""

import math
import warnings
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar

from torch import nn

from opnorm.errors import ArgumentError
from opnorm.norms.casting import Mode
from opnorm.parametrize.batchnorm import fold_batch_norms
from opnorm.parametrize.chains import normalised
from opnorm.parametrize.checks import Asked, check_options, checked_view, located
from opnorm.parametrize.chosen import left_message, to_normalise
from opnorm.parametrize.covered import undoing
from opnorm.parametrize.estimate import Iterations
from opnorm.parametrize.families import CONVOLUTIONS, TRANSPOSED, Norm, Shape
from opnorm.parametrize.flow import Flow, run_once, sequence
from opnorm.parametrize.register import attach

ModelT = TypeVar("ModelT", bound=nn.Module)


def normalize(
    model: ModelT,
    example_input: Any = None,
    *,
    lipschitz: float = 1.0,
    total: float | None = None,
    skip: Iterable[str] = (),
    mode: Mode = "divide",
    norm: Norm = "operator",
    n_power_iterations: Iterations = 1,
    learn_scale: bool = False,
    fold_batch_norm: bool = False,
) -> ModelT:
    """Apply `spectral_norm` to every matrix of every linear layer of a model.

    Args:
        model: changed in place, not at all where a layer is refused; weights that opnorm normalises already are left
            as they are.
        example_input: one batch, the tuple of the arguments, or a dict of the named ones. With it convolutions are
            normalised for the input sizes that they see in it; without it for every size.
        lipschitz: K of every weight.
        total: instead of `lipschitz`, the product of all K: each of the n weights gets the n-th root, of what those
            that opnorm normalises already leave. A layer counts as often as it is called with `example_input`, or
            without as often as it stands in the model. It is the bound of a chain; branches add, see
            `opnorm.lipschitz`.
        skip: names of modules to leave out, or of parameters that opnorm knows no rule for; `*` stands for anything,
            and a name stands for all below it.
        mode: "divide" or "clip".
        norm: "operator" or "reshaped".
        n_power_iterations: of each weight's estimate.
        learn_scale: train a scale for each weight.
        fold_batch_norm: first fold every BatchNorm into the layer before it, in its evaluation form; needs
            `example_input`, on which the model's output is compared before and after. A warning names each BatchNorm
            that stays, as no linear layer feeds it alone.

    Returns:
        The same model. A warning names the weights whose norm cannot matter, as a normalisation follows, and one the
        matrices of layers that opnorm does not know, which stay as they are.

    Raises:
        ArgumentError: if there is nothing to normalise or to fold, a name in `skip` matches nothing, the model does not
            take `example_input`, or both K's are given.
        InputShapeError: for a layer whose norm depends on its input's size, where that is not known.
        UnsupportedLayerError: for a linear layer whose `forward` is overridden.

    Example:
        >>> import torch, opnorm
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = opnorm.normalize(model, total=4.0).eval()
        >>> round(torch.linalg.matrix_norm(model[0].weight, 2).item(), 4)
        2.0
    """
    if total is not None and lipschitz != 1.0:
        raise ArgumentError("give lipschitz (of every weight) or total (their product), not both")
    if fold_batch_norm and example_input is None:
        raise ArgumentError("fold_batch_norm=True needs example_input, which tells the layer before each BatchNorm")
    flow = sequence(model) if example_input is None else run_once(model, example_input)
    found, left = to_normalise(model, [skip] if isinstance(skip, str) else list(skip))
    if not found:
        raise ArgumentError(
            f"this {type(model).__name__} has no linear layer left to normalise; opnorm.coverage says why"
        )
    each = lipschitz
    if total is not None:
        held = [(rule.lipschitz, _calls(flow, module)) for _, module, _, rule in normalised(model)]
        each = _root(total, sum(_calls(flow, module) for module, _ in found), held)
    paths = {module: path for path, module in model.named_modules()}
    asked = Asked(n_power_iterations, None, each, mode, norm, learn_scale)
    check_options(asked)
    shapes = flow.shapes if norm == "operator" else {}
    views = []
    for module, name in found:  # so that a refusal leaves the model as it was
        with located(paths[module], sizes="or normalize(model, example_input)"):
            views.append(checked_view(module, name, asked, _size(shapes, module)))
    if fold_batch_norm:
        fold_batch_norms(model, example_input)
        flow = run_once(model, example_input)
    for (module, name), view in zip(found, views, strict=True):
        attach(module, name, asked, view)
    inert = [
        path for path, module in model.named_modules() if any(m is module for m, _ in found) and undoing(module, flow)
    ]
    if inert:
        warnings.warn(
            f"normalising {', '.join(inert)} is inert: a normalisation without running statistics follows and undoes "
            "any scale; it bounds nothing",
            stacklevel=2,
        )
    if left:
        warnings.warn(left_message(left), stacklevel=2)
    return model


def _size(shapes: Mapping[nn.Module, Shape | None], module: nn.Module) -> Shape | None:
    return shapes.get(module) if isinstance(module, CONVOLUTIONS | TRANSPOSED) else None


def _calls(flow: Flow, module: nn.Module) -> int:
    return max(1, flow.calls[module])


def _root(total: float, count: int, held: list[tuple[float, int]]) -> float:
    """The largest number near the root whose power, times what other weights have already, is at most the total."""
    if not (math.isfinite(total) and total > 0):
        raise ArgumentError(f"total={total!r}: it is a positive number")
    rest = Fraction(total) / math.prod(Fraction(lipschitz) ** calls for lipschitz, calls in held)
    each: float = float(rest) ** (1 / count)
    while Fraction(each) ** count > rest:
        each = math.nextafter(each, 0.0)
    return each
