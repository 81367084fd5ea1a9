"""The division as a step after `optimizer.step()`, for loops that want no parametrization."""

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from opnorm.errors import ArgumentError, WeightError
from opnorm.norms.casting import Mode
from opnorm.parametrize import on_device
from opnorm.parametrize.chains import is_stored, rule_of
from opnorm.parametrize.deployed import deploy
from opnorm.parametrize.division import divisor
from opnorm.parametrize.estimate import Iterations
from opnorm.parametrize.families import Norm, Shape
from opnorm.parametrize.fully_sharded import reshard
from opnorm.parametrize.sharding import as_before, beside, gathered, placed
from opnorm.parametrize.tracked import track


class Projector:
    """Divides every linear weight of a plain model in place, by a warm-started estimate of its norm.

    Call `step_()` after `optimizer.step()`; with mode "clip" only weights above K are divided, a spectral cap. The
    estimate is from below, so that norms can exceed K a little; `step_(proved=True)` divides by proved norms instead,
    for the end of training or before a checkpoint.

    Args:
        model: a model without parametrizations by opnorm.
        lipschitz: K.
        mode: "divide" or "clip".
        norm: "operator" or "reshaped".
        input_shapes: of one sample, by the name of the module, for layers whose norm depends on it.
        n_power_iterations: for each step.
        skip: names of modules to leave out, with `*` for anything.

    Raises:
        ArgumentError: if there is nothing to project, a weight is normalised by opnorm already or computed from
            others, or a name or an option fits nothing.
        InputShapeError: if a layer's norm depends on an input size that is not given.

    Example:
        >>> import torch, opnorm
        >>> model = torch.nn.Linear(4, 4)
        >>> norms = opnorm.Projector(model, 0.5).step_(proved=True)
        >>> round(torch.linalg.matrix_norm(model.weight, 2).item(), 5)
        0.5
    """

    def __init__(
        self,
        model: nn.Module,
        lipschitz: float = 1.0,
        *,
        mode: Mode = "divide",
        norm: Norm = "operator",
        input_shapes: Mapping[str, Shape] | None = None,
        n_power_iterations: Iterations = 1,
        skip: Iterable[str] = (),
    ) -> None:
        """Find the weights; nothing is computed or changed yet."""
        self._model = model
        self._tracked = track(
            model, lipschitz=lipschitz, mode=mode, norm=norm, iterations=n_power_iterations,
            input_shapes=input_shapes, skip=skip,
        )  # fmt: skip
        seen: set[int] = set()
        for label, (module, name, _) in list(self._tracked.items()):
            if rule_of(module, name) is not None:
                raise ArgumentError(f"{label} is normalised by opnorm.spectral_norm; a projector is for plain weights")
            if not is_stored(module, name):
                raise ArgumentError(
                    f"{label} is computed from other tensors, by a parametrization, weight norm or pruning, and what "
                    f"is written to it would be lost; take that off first, or skip={[label.rpartition('.')[0]]}"
                )
            if id(getattr(module, name)) in seen:  # tied to one before, with which it is divided
                del self._tracked[label]
            seen.add(id(getattr(module, name)))

    @torch.no_grad()
    def step_(self, *, proved: bool = False) -> dict[str, float]:
        """Divide every weight in place.

        Args:
            proved: divide by proved norms, so that the stored weights are within K.

        Returns:
            The estimated norm that each weight had before, by name.

        Raises:
            WeightError: if a weight holds NaN or infinite values; then none was divided.
        """
        reshard(self._model)
        weights = {label: getattr(module, name) for label, (module, name, _) in self._tracked.items()}
        triples = {label: rule.triple(weights[label]) for label, (*_, rule) in self._tracked.items()}
        finite = on_device.read({label: gathered(torch.isfinite(w).all()) for label, w in weights.items()})
        broken = [label for label, good in finite.items() if not good]
        if broken:
            raise WeightError(f"{', '.join(broken)} holds NaN or infinite values; no weight was divided in this step")
        for label, (*_, rule) in self._tracked.items():
            weight, triple = weights[label], triples[label]
            if proved:
                whole = deploy(rule.view, gathered(weight), rule.lipschitz, rule.mode, label)
                weight.copy_(as_before(whole, weight))
                continue
            divided = divisor(triple.sigma, rule.lipschitz, rule.mode == "clip")
            divided = beside(divided, weight)
            matrices = rule.view.matrices(weight)
            weight.copy_(placed(rule.view.weight(matrices / divided[:, None, None], weight.shape), weight))
        return on_device.read({label: triple.sigma.max() for label, triple in triples.items()})
