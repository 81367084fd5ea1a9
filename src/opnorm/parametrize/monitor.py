"""Norms of all weights during training, at the cost of two products with a few vectors each."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from opnorm.errors import WeightError
from opnorm.parametrize import on_device
from opnorm.parametrize.blocks import multiply
from opnorm.parametrize.estimate import Iterations
from opnorm.parametrize.families import Norm, Shape
from opnorm.parametrize.sharding import gathered
from opnorm.parametrize.spectral import SpectralNormalization
from opnorm.parametrize.tracked import current, track


class Monitor:
    """Measures the weights of a model as they are used now; a call returns a flat dict of floats for any logger.

    For each weight: `NAME/norm`, the estimated operator norm (from below); `NAME/gap`, how far the estimate's vectors
    are from a singular pair, relative to the norm (some singular value lies within it; NaN where the norm is that of
    one small or reflecting input size); `NAME/stable_rank`, `|W|_F^2 / |W|^2` with the stored kernel's entries above
    and the operator's norm below: for a convolution it is the stable rank by position, which can be below 1. Of q, k
    and v in one weight the one with the largest norm counts. Weights of layers that opnorm does not know are left out.

    The numbers of all weights reach the host together, so that an accelerator is waited for once.

    The monitor owns its warm starts; the model is not touched, normalised or not.

    Args:
        model: any model.
        norm: "operator" or "reshaped".
        input_shapes: of one sample, by the name of the module, for layers whose norm depends on it.
        n_power_iterations: for each new value of a weight.
        skip: names of modules to leave out, with `*` for anything.

    Raises:
        ArgumentError: if there is nothing to measure, or a name or an option fits nothing.
        InputShapeError: if a layer's norm depends on an input size that is not given.

    Example:
        >>> import torch, opnorm
        >>> monitor = opnorm.Monitor(torch.nn.Sequential(torch.nn.Linear(4, 4)))
        >>> sorted(monitor())
        ['0.weight/gap', '0.weight/norm', '0.weight/stable_rank']
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Norm = "operator",
        input_shapes: Mapping[str, Shape] | None = None,
        n_power_iterations: Iterations = 1,
        skip: Iterable[str] = (),
    ) -> None:
        """Find the weights; nothing is computed yet."""
        self._tracked = track(
            model, lipschitz=1.0, mode="divide", norm=norm, iterations=n_power_iterations,
            input_shapes=input_shapes, skip=skip, attained=True,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return the current figures; NaN for a weight that holds NaN or infinite values."""
        found: dict[str, Tensor] = {}
        for label, (module, name, rule) in self._tracked.items():
            try:
                figures = _figures(rule, *current(module, name, rule.view.blocks))
            except WeightError:  # at the first value, or in evaluation
                figures = dict.fromkeys(("norm", "gap", "stable_rank"), torch.tensor(math.nan))
            found |= {f"{label}/{figure}": value for figure, value in figures.items()}
        return on_device.read(found)


def _figures(rule: SpectralNormalization, weight: Tensor, divided: Tensor | None) -> dict[str, Tensor]:
    triple = rule.triple(weight)
    matrices = rule.view.matrices(weight).to(triple.left.dtype)
    used = triple.sigma if divided is None else triple.sigma / divided
    # Of blocks with norms of their own the largest counts; where they share one, the vectors are of the largest.
    weighed = torch.linalg.vector_norm(triple.left, dim=(1, 2)) if rule.view.joint else used
    top = (weighed >= 0.999 * weighed.max()).int().argmax().reshape(1)  # of equals the first, whatever the rounding
    sigma = triple.sigma.max() if rule.view.joint else triple.sigma.index_select(0, top)[0]
    unit = torch.where(sigma > 0, sigma, torch.ones_like(sigma))
    lengths = gathered(torch.linalg.vector_norm(matrices, dim=(1, 2))) / unit
    rank = (lengths.square().sum() if rule.view.joint else lengths.square().index_select(0, top)[0]).to(sigma.dtype)
    nan = torch.full_like(sigma, float("nan"))
    gap = nan
    if triple.right is not None:
        residual = multiply(matrices, triple.right) - triple.sigma[:, None, None] * triple.left
        gap = torch.linalg.vector_norm(residual, dim=(1, 2)).index_select(0, top)[0].to(sigma.dtype) / unit
    return {"norm": torch.where(torch.isfinite(rank), used.max(), nan), "gap": gap, "stable_rank": rank}
