"""The parametrization `W -> K W / sigma(W)`: an estimate of the true norm in training, a proved one in evaluation."""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from opnorm.errors import ArgumentError, WeightError
from opnorm.norms.casting import Mode
from opnorm.parametrize import blocks, compiled, convolved, frequencies, on_device, sampled, sharding, values
from opnorm.parametrize.blocks import Block, Triple
from opnorm.parametrize.deployed import deploy
from opnorm.parametrize.division import Divide, ScaledLinear, composed
from opnorm.parametrize.lazy import NormalizedWeight
from opnorm.parametrize.views import View
from opnorm.parametrize.watched import counted, watch

Iterations = int | Literal["adaptive"]

WIDTH = 4
"""Vectors in a block; a matrix with no more than `SMALL` rows or columns is held in full."""

SMALL = 16

SCOUT_WIDTH, ADAPTIVE_SCOUT_WIDTH = 2, 3
"""Vectors at every other frequency of a convolution: the second is there when it overtakes the first."""

NEW, YOUNG = 20, 100
"""Values of a weight, from registration or a fresh start, in which the estimate is made with more care: the first steps
of Adam add a large new direction, which one power iteration a step meets ten steps late."""

DEPTH = 2
"""Of the Krylov space for a new weight and in adaptive mode; afterwards it is one."""

WHOLE_EVERY, CONV_WHOLE_EVERY = 2, 6
"""Later, vectors other than the first, scouts and the frequency move at some values only."""

SCALE_START = 5.0
"""Of theta: a scale of 0.993 K."""

ADAPTIVE_TOLERANCE = 5e-5
ADAPTIVE_LEAST, ADAPTIVE_MOST = 6, 16


def _no_transforms() -> AbstractContextManager[object]:
    """Values are computed outside the transforms of torch.func, which would wrap them, if there are any."""
    return temporarily_clear_interpreter_stack() if torch._C._are_functorch_transforms_active() else nullcontext()


class Handed(Protocol):
    """A deployed weight that is used without asking."""

    def over(self) -> None:
        """Let nobody use it again."""


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
        """Hold what does not change; `follow` sets the estimate."""
        super().__init__()
        self.view, self.lipschitz, self.mode, self.iterations = view, lipschitz, mode, iterations
        self.label, self.norm = label, norm
        self.order: tuple[str, ...] = ()
        self.scale = nn.Parameter(torch.tensor(SCALE_START)) if learn_scale else None
        for name in ("y", "omega", "scouts"):
            self.register_buffer(name, None, persistent=False)
        self._number = compiled.enrol(self)
        self._forget()

    def _forget(self) -> None:
        self._epoch = self._turn = self._age = 0
        self._key: values.Key | None = None
        self._triple: Triple | None = None
        self._stored: tuple[values.Key, tuple[int, ...], float, Tensor] | None = None
        self._verify = False
        self.ready: Handed | None = None
        self._sampler = values.Sampler()

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
            return self._in_graph(weight)
        if torch._C._is_tracing():
            raise self._not_exported()
        if weight.is_meta or sharding.is_sharded(weight) or torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return self.value(weight)
        return NormalizedWeight(self, weight)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the raw weight that assigning to `layer.weight` sets: the value itself, to be divided again."""
        return weight.materialised() if isinstance(weight, NormalizedWeight) else weight

    def value(self, weight: Tensor) -> Tensor:
        """Return the normalised weight as a plain tensor; on the meta device, where there are no values, its shape."""
        if weight.is_meta:
            return weight.clone()
        if torch._C._functorch.is_functorch_wrapped_tensor(weight):
            return self._transformed(weight)
        differentiable = torch.is_grad_enabled() and (weight.requires_grad or self.scale is not None)
        stored = None if self.training else self.deployed(weight, self.bound())
        if stored is not None and not differentiable:
            return stored
        triple = self.triple(weight)
        if sharding.is_sharded(weight):
            return self._composed(weight, sharding.spread(triple, weight), stored)
        if weight.is_complex() or torch._C._are_functorch_transforms_active() or self.view.axis:
            return self._composed(weight, triple, stored)
        matrices = self.view.matrices(weight)
        held = None if stored is None else self.view.matrices(stored)
        divided: Tensor = Divide.apply(matrices, triple, self._divided_to, self.mode == "clip", held)  # type: ignore[no-untyped-call]
        return self._scaled(self.view.weight(divided, weight.shape), stored)

    def linear(self, x: object, weight: NormalizedWeight, bias: Tensor | None) -> Tensor | None:
        """Return `F.linear(x, layer.weight, bias)` without computing the weight, or None where that is not possible."""
        raw, view = weight._raw, self.view
        if not self._direct(x, weight) or view.frequencies or view.sampled or view.blocks > 1 or raw.ndim != 2:
            return None
        assert isinstance(x, Tensor)
        flat = x.reshape(-1, x.shape[-1])
        out: Tensor = ScaledLinear.apply(flat, raw, bias, self.triple(raw), self.lipschitz, self.mode == "clip")  # type: ignore[no-untyped-call]
        return out.reshape(*x.shape[:-1], len(raw))

    def convolved(
        self, x: object, weight: NormalizedWeight, bias: Tensor | None, shape: convolved.Geometry | None
    ) -> Tensor | None:
        """Return a convolution by `layer.weight`, or None where the weight has to be computed first."""
        raw = weight._raw
        if shape is None or not self.view.joint or not self._direct(x, weight):
            return None
        assert isinstance(x, Tensor)
        if x.ndim != raw.ndim:
            return None
        division = convolved.Division(self.view, self.triple(raw), self.lipschitz, self.mode == "clip")
        out: Tensor = convolved.ScaledConv.apply(x, raw, bias, division, shape)  # type: ignore[no-untyped-call]
        return out

    def _direct(self, x: object, weight: NormalizedWeight) -> bool:
        """Whether an input can meet the raw weight: in training, in full precision, and outside transforms."""
        raw = weight._raw
        if not self.training or self.scale is not None or self.view.axis or weight._value is not None:
            return False
        if not isinstance(x, Tensor) or x.dtype != raw.dtype or raw.dtype != values.compute_dtype(raw):
            return False
        return not (raw.is_complex() or on_device.autocasting(raw) or torch._C._are_functorch_transforms_active())

    @property
    def _divided_to(self) -> float:
        return 1.0 if self.scale is not None else self.lipschitz

    def bound(self) -> Tensor | None:
        """The scale that a learned one has now, at most K."""
        return None if self.scale is None else self.lipschitz * torch.sigmoid(self.scale)

    def _scaled(self, weight: Tensor, stored: Tensor | None) -> Tensor:
        bound = self.bound()
        if bound is None:
            return weight
        return weight * (bound if stored is None else bound / bound.detach()).to(weight.dtype)

    def _composed(self, weight: Tensor, triple: Triple, stored: Tensor | None) -> Tensor:
        matrices = self.view.matrices(weight)
        value = composed(matrices, triple, self._divided_to, self.mode == "clip").to(weight.dtype)
        plain = self.view.weight(value, weight.shape)
        if stored is not None:  # the proved value, with the gradient of the estimate
            bound = self.bound()
            plain = plain if bound is None else plain * bound.detach().to(plain.dtype)
            plain = stored + (plain - plain.detach())
        return self._scaled(plain, stored)

    def _in_graph(self, weight: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise self._not_exported()
        if not self.training:
            bound = self.bound()
            stored: Tensor | None = compiled.deployed(
                weight.detach(), self._number, None if bound is None else bound.detach()
            )
            if stored is not None and not (torch.is_grad_enabled() and weight.requires_grad):
                return stored
        else:
            stored = None
        sigma, left, right = compiled.triple(weight.detach(), self._number)
        return self._composed(weight, Triple(sigma, left, None if self.view.sampled else right), stored)

    def _not_exported(self) -> ArgumentError:
        return ArgumentError(
            f"{self.label} is normalised: export or trace opnorm.fold(model), whose weights are plain and proved"
        )

    def _transformed(self, weight: Tensor) -> Tensor:
        """Under vmap and other transforms: one more iteration from the buffers, which are not written."""
        if not self.training:
            raise ArgumentError(
                f"{self.label}: a proof needs a weight's values, which transforms of torch.func hide; stack "
                "[opnorm.fold(model) for model in models] instead"
            )
        dtype = values.compute_dtype(weight)
        with torch.no_grad():
            _, triple = self._step(weight.detach().to(dtype), self._block(dtype))
        return self._composed(weight, self._joined(triple), None)

    # ---------------------------------------------------------------- the estimate

    def triple(self, weight: Tensor) -> Triple:
        """Return the estimate for this value of the weight, refreshed if the value is new."""
        key = self._sampler.key(weight, self._epoch)
        unchanged = self._key is not None and values.same(self._key, key)
        if self._triple is not None and not sharding.agreed(weight, not unchanged):
            return self._triple
        dtype = values.compute_dtype(weight)
        before = self._triple
        elsewhere = before is not None and before.sigma.device != weight.device
        lost = before is None or self._key is None or elsewhere or values.far(self._key, key)
        afresh = sharding.agreed(weight, lost)
        broken = False
        try:
            with counted(), torch.no_grad(), on_device.without_autocast(weight), _no_transforms():
                raw = weight.detach().to(dtype)
                self._age = 0 if afresh else self._age
                block, found = self._converged(raw) if afresh else self._advanced(raw, dtype)
                triple = self._joined(found)
                if afresh or before is None or not on_device.host_waits(raw):
                    broken = not all(map(math.isfinite, triple.sigma.tolist()))
                else:
                    finite = torch.isfinite(triple.sigma).all()
                    block = on_device.chosen(finite, block, self._block(dtype))
                    triple = on_device.chosen(finite, triple, before)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            broken = True
        if broken:
            self._key = None  # nothing is learned from a broken weight, and the next value starts afresh
            if self._triple is None:
                raise WeightError(
                    f"{self.label} holds NaN, infinite or huge values, so it has no norm of its dtype to divide by"
                )
            return self._triple
        self._store(block)
        self._key, self._triple = key, triple
        return self._triple

    def _converged(self, raw: Tensor) -> tuple[Block, Triple]:
        tame, exponent = values.tamed(raw)
        block, triple = self._begun(tame)
        if exponent:
            triple = triple._replace(sigma=torch.ldexp(triple.sigma, torch.tensor(exponent)))
        return block, triple

    def _begun(self, raw: Tensor) -> tuple[Block, Triple]:
        if self.view.sampled:
            block = sampled.start(self.view, raw, WIDTH)
            return blocks.iterate(
                lambda block: self._step(raw, block), block, tolerance=ADAPTIVE_TOLERANCE, most=100, least=8
            )
        matrices = self.view.matrices(raw)
        if self.view.frequencies:
            held = ADAPTIVE_SCOUT_WIDTH if self.iterations == "adaptive" else SCOUT_WIDTH
            return frequencies.converge(self.view, matrices, WIDTH, held)
        return blocks.converge(matrices, SMALL if min(matrices.shape[1:]) <= SMALL else WIDTH)

    def _advanced(self, raw: Tensor, dtype: torch.dtype) -> tuple[Block, Triple]:
        block = self._block(dtype)
        if self.view.frequencies:
            block = frequencies.home(self.view, block)
        if self.iterations == "adaptive":
            # Whether it has settled is a decision of the host.
            least = ADAPTIVE_MOST if on_device.host_waits(raw) else ADAPTIVE_LEAST
            return blocks.iterate(
                lambda block: self._step(raw, block),
                block,
                tolerance=ADAPTIVE_TOLERANCE,
                most=ADAPTIVE_MOST,
                least=least,
            )
        self._age += 1
        # A count on the host, which no graph sees: nothing waits for it, and nothing compiles anew.
        for _ in range(self.iterations):
            block, triple = self._step(raw, block)
        return block, triple

    def _step(self, raw: Tensor, block: Block) -> tuple[Block, Triple]:
        adaptive, old = self.iterations == "adaptive", self._age > YOUNG
        if self.view.sampled:
            return sampled.step(self.view, raw, block, 1 if old else DEPTH)
        matrices = self.view.matrices(raw)
        if adaptive and self.view.frequencies:
            return frequencies.sweep(self.view, matrices, block, DEPTH)
        self._turn += 1
        every = CONV_WHOLE_EVERY if self.view.frequencies else WHOLE_EVERY
        turn, rest = divmod(self._turn, every) if old else (self._turn, 0)
        depth = DEPTH if adaptive or self._age <= NEW else 1
        if not self.view.frequencies:
            return blocks.follow(matrices, block) if rest else blocks.step(matrices, block, depth)
        if rest:
            return frequencies.follow(self.view, matrices, block)
        block = frequencies.scouted(self.view, matrices, block, turn, depth)
        return frequencies.step(self.view, matrices, block, depth)

    def _joined(self, triple: Triple) -> Triple:
        """Where the norm is the largest of the blocks', only the largest block's triple counts."""
        if not self.view.joint or self.view.blocks == 1 or self.view.sampled:
            return triple
        top = triple.sigma.argmax()
        which = (torch.arange(self.view.blocks, device=top.device) == top).to(triple.left.dtype)
        return Triple(triple.sigma.amax().expand(1), triple.left * which[:, None, None], triple.right)

    def _block(self, dtype: torch.dtype) -> Block:
        real = dtype.to_real()
        parts = [part.to(real) for part in (self.y, self.omega, self.scouts)]
        wide = dtype.is_complex or bool(self.view.frequencies)
        y, scouts = (torch.view_as_complex(part) if wide else part for part in (parts[0], parts[2]))
        return Block(y, parts[1], scouts)

    def _store(self, block: Block) -> None:
        # As pairs of real numbers: casting a model to bfloat16 drops the imaginary part of a complex buffer.
        y, scouts = (torch.view_as_real(part) if part.is_complex() else part for part in (block.y, block.scouts))
        # Past the checks of `nn.Module.__setattr__`, which cost as much as a small product.
        self._buffers.update(y=y.contiguous(), omega=block.omega, scouts=scouts.contiguous())

    # ---------------------------------------------------------------- the deployed weight

    def deployed(self, weight: Tensor, bound: Tensor | None = None) -> Tensor:
        """Return the proved weight, computed when the raw weight is new. Treat it as read-only.

        Raises:
            WeightError: if the weight holds NaN or infinite values.
        """
        lipschitz = self.lipschitz if bound is None else float(bound.detach())
        if not sharding.several_processes():  # FSDP2 fills the parameters that it lends without counting
            watch(weight)
        key = self._sampler.key(weight, self._epoch)
        if self._stored is not None and self._stored[2] == lipschitz:
            if not sharding.agreed(weight, self._verify or not key.watched or key != self._stored[0]):
                return self._stored[3]
            same = self._stored[3].device == weight.device and values.fingerprint(weight) == self._stored[1]
            if not sharding.agreed(weight, not same):
                self._stored, self._verify = (key, *self._stored[1:]), False
                return self._stored[3]
        with counted(), torch.no_grad(), on_device.without_autocast(weight), _no_transforms():
            whole = deploy(self.view, sharding.gathered(weight), lipschitz, self.mode, self.label)
            result = sharding.as_before(whole, weight)
        self._stored, self._verify = (key, values.fingerprint(weight), lipschitz, result), False
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SpectralNormalization":
        """As a module's. What takes the vectors' place may hold anything, as after `to_empty`: a fresh start."""
        before = self._buffers["y"]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._buffers["y"] is not before:
            self._key = None
        return self

    def train(self, mode: bool = True) -> "SpectralNormalization":
        """Switch; the first evaluation after it compares every bit of the weight with what the proof was made for."""
        self._verify = True
        self.hand_out(None)
        return super().train(mode)

    def renew(self) -> None:
        """Make the next use refresh the estimate and compare the deployed weight in full."""
        self._epoch += 1
        self._verify = True
        self.hand_out(None)

    def hand_out(self, ready: Handed | None) -> None:
        """Keep what is handed out without asking again; what was before it is over."""
        if self.ready is not None:
            self.ready.over()
        self.ready = ready

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
