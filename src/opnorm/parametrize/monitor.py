"""Norms of all weights during training, at the cost of two products with a few vectors each."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from opnorm.parametrize.blocks import multiply
from opnorm.parametrize.families import Norm, Shape
from opnorm.parametrize.spectral import Iterations
from opnorm.parametrize.tracked import current, track


class Monitor:
    """Measures the weights of a model as they are used now; a call returns a flat dict of floats for any logger.

    For each weight: `NAME/norm`, the estimated operator norm (from below); `NAME/gap`, how far the estimate's vectors
    are from a singular pair, relative to the norm (some singular value lies within it); `NAME/stable_rank`,
    `|W|_F^2 / |W|^2` of the stored weight. Weights of layers that opnorm does not know are left out.

    The monitor owns its warm starts; the model is not touched, normalised or not.

    Args:
        model: any model.
        norm: "operator" or "reshaped".
        input_shapes: of one sample, by the name of the module, for layers whose norm depends on it.
        n_power_iterations: for each new value of a weight.
        skip: names of modules to leave out, with `*` for anything.

    Raises:
        ArgumentError: if there is nothing to measure.
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
            input_shapes=input_shapes, skip=skip,
        )  # fmt: skip

    def __call__(self) -> dict[str, float]:
        """Return the current figures."""
        found: dict[str, float] = {}
        for label, (module, name, rule) in self._tracked.items():
            weight = current(module, name)
            triple = rule.triple(weight)
            matrices = rule.view.matrices(weight).to(triple.left.dtype)
            sigma = float(triple.sigma.max())
            if triple.right is None:
                gap = float("nan")
            else:
                residual = multiply(matrices, triple.right) - triple.sigma[:, None, None] * triple.left
                top = int(torch.linalg.vector_norm(triple.left, dim=(1, 2)).argmax()) if rule.view.joint else 0
                gap = float(torch.linalg.vector_norm(residual[top])) / sigma if sigma else 0.0
            energy = float(torch.linalg.vector_norm(matrices)) ** 2
            found[f"{label}/norm"] = sigma
            found[f"{label}/gap"] = gap
            found[f"{label}/stable_rank"] = energy / sigma**2 if sigma else 0.0
        return found
