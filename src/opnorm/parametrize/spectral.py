"""The parametrization `W -> K W / sigma(W)`: an estimate of the true norm in training, a proved one in evaluation."""

import json
from collections.abc import Callable
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from opnorm.errors import ArgumentError, WeightError
from opnorm.norms.casting import Mode
from opnorm.parametrize import buffers, compiled, estimate, sharding, values
from opnorm.parametrize.blocks import Triple
from opnorm.parametrize.deployed import Deployed, up_to_date
from opnorm.parametrize.divided import divided, divided_anywhere, division
from opnorm.parametrize.estimate import Estimate, Iterations, Method
from opnorm.parametrize.lazy import NormalizedWeight
from opnorm.parametrize.rule import Handed
from opnorm.parametrize.transforms import has_tangent
from opnorm.parametrize.views import View
from opnorm.parametrize.watched import watch

SCALE_START = 5.0
"""Of theta: a scale of 0.993 K."""

_HANDED_BY = frozenset({"training", "lipschitz", "scale"})
"""What decides, besides the weight, whether and which deployed weight is used."""


class SpectralNormalization(nn.Module):
    """Divides one weight; made by `opnorm.spectral_norm`.

    In training the divisor is an estimate, refreshed once for each new value of the weight. In evaluation it is a
    proved upper bound, and the result depends on the weight and nothing else. The buffers only warm-start the
    estimate: they may be lost, averaged or copied.

    Attributes:
        view: how the weight is read as a linear map.
        lipschitz: K.
        mode: "divide", or "clip": divide only what is larger than K.
        iterations: of the estimate, for each new value.
        label: the layer and the weight, for messages.
        ready: the deployed weight as `forward` hands it out; None after every switch between training and evaluation.
        order: the parameters of the layer before it was normalised, for putting them back in their places.
        scale: with `learn_scale`, the parameter theta of the scale `K sigmoid(theta)`.
    """

    y: Tensor
    omega: Tensor
    scouts: Tensor

    def __init__(
        self,
        view: View,
        lipschitz: float,
        mode: Mode,
        iterations: Iterations,
        label: str,
        *,
        learn_scale: bool,
        norm: str,
    ) -> None:
        """Hold what does not change; `triple` begins the estimate."""
        super().__init__()
        self.view, self.lipschitz, self.mode, self.iterations = view, lipschitz, mode, iterations
        self.label, self.norm = label, norm
        self.order: tuple[str, ...] = ()
        self.scale = nn.Parameter(torch.full((1,), SCALE_START)) if learn_scale else None
        for name in buffers.NAMES:
            self.register_buffer(name, None, persistent=False)
        self._number = compiled.enrol(self)
        self._epoch = 0
        self._estimate = Estimate()
        self._stored: Deployed | None = None
        self._verify = False
        self.ready: ref[Handed] | None = None
        self._sampler = values.Sampler()

    def __setattr__(self, name: str, value: Any) -> None:
        """As a module's. What was handed out was made with the old value; some set `training` without `train()`."""
        if name in _HANDED_BY and self.__dict__.get("ready") is not None:
            self.hand_out(None)
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes over: nothing that shows this weight's memory."""
        return {**self.__dict__, "ready": None, "_sampler": values.Sampler()}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Give a copy a number of its own."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._number = compiled.enrol(self)

    # ---------------------------------------------------------------- what `layer.weight` is

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalised weight; in eager mode it is computed when it is read."""
        if torch.compiler.is_compiling():
            return compiled.value(self, weight, self._number)
        if torch._C._is_tracing():
            raise ArgumentError(compiled.not_exported(self))
        if weight.is_meta or sharding.is_sharded(weight) or torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return self.value(weight)
        return NormalizedWeight(self, weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the raw weight that assigning to `layer.weight` sets: the value itself, to be divided again."""
        return weight.materialised().clone() if isinstance(weight, NormalizedWeight) else weight

    def value(self, weight: Tensor) -> Tensor:
        """Return the normalised weight as a plain tensor; on the meta device, where there are no values, its shape."""
        if weight.is_meta:
            return weight.clone()
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return self._transformed(weight)
        scale = self.bound()
        differentiable = torch.is_grad_enabled() and (weight.requires_grad or scale is not None)
        stored = None if self.training else self.deployed(weight, scale)
        if stored is not None and not differentiable and not has_tangent(weight):
            return stored
        return divided(weight, division(self, self.triple(weight)), scale, stored)

    def _transformed(self, weight: Tensor) -> Tensor:
        """Under vmap and other transforms: one more iteration from the buffers, which are not written."""
        if not self.training:
            raise ArgumentError(
                f"{self.label}: a proof needs a weight's values, which transforms of torch.func hide; stack "
                "[opnorm.fold(model) for model in models] instead"
            )
        self._estimate, triple = estimate.once_more(
            Method(self.view, self.iterations), weight, self._estimate, self._buffers
        )
        return divided_anywhere(weight, division(self, triple), self.bound())

    def bound(self) -> Tensor | None:
        """The scale that a learned one has now, at most K."""
        if self.scale is None:
            return None
        return self.lipschitz * torch.sigmoid(sharding.whole(self.scale).to(values.compute_dtype(self.scale)))

    # ---------------------------------------------------------------- by what it is divided

    def triple(self, weight: Tensor) -> Triple:
        """Return the estimate for this value of the weight, refreshed if the value is new.

        Raises:
            WeightError: if the first value holds NaN, infinite or huge values.
        """
        key = self._sampler.key(weight, self._epoch)
        before = self._estimate
        known = estimate.known(weight, key, before)
        if known is not None:
            return known
        found, block = estimate.refreshed(Method(self.view, self.iterations), weight, key, before, self._buffers)
        # Past the checks of `nn.Module.__setattr__`, which cost as much as a small product.
        self.__dict__["_estimate"] = found
        if block is not None:
            self._buffers.update(buffers.stored(block))
        if found.triple is None:
            raise WeightError(
                f"{self.label} holds NaN, infinite or huge values, so it has no norm of its dtype to divide by"
            )
        return found.triple

    def deployed(self, weight: Tensor, bound: Tensor | None = None) -> Tensor:
        """Return the proved weight, computed when the raw weight is new. Treat it as read-only.

        Raises:
            WeightError: if the weight holds NaN or infinite values, or the learned scale is NaN or 0.
        """
        lipschitz = self.lipschitz if bound is None else self._proved_bound(float(bound.detach()))
        if not sharding.several_processes():  # FSDP2 fills the parameters that it lends without counting
            watch(weight)
        found = up_to_date(
            self.view, weight, lipschitz, self.mode, self.label,
            key=self._sampler.key(weight, self._epoch), before=self._stored, verify=self._verify,
        )  # fmt: skip
        if found is not self._stored:
            self._stored, self._verify = found, False
        return found.value

    def _proved_bound(self, scale: float) -> float:
        """The learned scale, which single precision may have rounded above K."""
        if not scale > 0:
            raise WeightError(
                f"the learned scale of {self.label} is {scale:g}, and no weight has that norm; repair the scale "
                "parameter of its parametrization (reset_parameters() sets it to its start)"
            )
        return min(scale, self.lipschitz)

    # ---------------------------------------------------------------- when the weight is another

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpectralNormalization":
        """As a module's, but a learned scale stays real where the weight becomes complex.

        What takes the vectors' place may hold anything, as after `to_empty`: a fresh start.
        """
        before, scale = self._buffers["y"], self.scale
        kept = () if scale is None else (scale, scale.grad)

        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            return applied.real.clone() if applied.is_complex() and any(tensor is one for one in kept) else applied

        super()._apply(apply, recurse)  # type: ignore[no-untyped-call]
        if self._buffers["y"] is not before:
            self._estimate = self._estimate._replace(key=None)
        return self

    def train(self, mode: bool = True) -> "SpectralNormalization":
        """Switch; the first evaluation after it compares every bit of the weight with what the proof was made for."""
        self._verify = True
        return super().train(mode)

    def renew(self) -> None:
        """Make the next use refresh the estimate and compare the deployed weight in full."""
        self._epoch += 1
        self._verify = True
        self.hand_out(None)

    def spoilt(self) -> None:
        """Somebody wrote to the deployed weight: it is made anew."""
        self._stored = None
        self.hand_out(None)

    def hand_out(self, ready: Handed | None) -> None:
        """Know what is handed out without asking again; what was before it is over."""
        before = None if self.ready is None else self.ready()
        if before is not None:
            before.over()
        self.ready = None if ready is None else ref(ready)  # weak, as it holds this parametrization

    def reset_parameters(self) -> None:
        """Set the learned scale to its start, for models that are made on the meta device."""
        if self.scale is not None:
            nn.init.constant_(self.scale, SCALE_START)

    # ---------------------------------------------------------------- state dicts

    def get_extra_state(self) -> Tensor:
        """K, the mode and the norm, as a tensor that every checkpoint format holds: JSON in bytes."""
        text = json.dumps({"lipschitz": self.lipschitz, "mode": self.mode, "norm": self.norm})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Compare in full at the next use; `adopt_state` says where a checkpoint was normalised otherwise."""
        self.renew()

    def differing(self, state: Tensor) -> str:
        """In what K, mode and norm of a checkpoint differ from the layer's, which keeps its own; "" for nothing."""
        there = json.loads(bytes(state.tolist()).decode()) if state.numel() else {}
        here = {"lipschitz": self.lipschitz, "mode": self.mode, "norm": self.norm}
        return ", ".join(
            f"{name} {there[name]!r} (here {here[name]!r})"
            for name in here
            if there.get(name, here[name]) != here[name]
        )

    def extra_repr(self) -> str:
        """What is divided, and how."""
        text = f"lipschitz={self.lipschitz:g}, mode={self.mode}, norm={self.norm}, n_power_iterations={self.iterations}"
        return text if self.scale is None else f"{text}, learn_scale=True"
