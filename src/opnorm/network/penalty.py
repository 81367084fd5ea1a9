"""The bound of a network as a regulariser: a number that can be differentiated in the weights."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from opnorm.certificate.network.check import chain_of, weights_in_use
from opnorm.certificate.network.file import read_names
from opnorm.certificate.network.program import Program
from opnorm.certificate.network.stages import Chain
from opnorm.errors import ArgumentError, CertificateError, TooLargeError, UnsupportedLayerError
from opnorm.graph import Graph, export
from opnorm.graph.export import Example
from opnorm.network.covariance import Chooser, bound_squared, fixed, forward
from opnorm.network.folded import folded
from opnorm.network.live import require_bounded, require_live, with_slopes
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import closed_form, fast
from opnorm.network.opaque_value import enrol, penalised
from opnorm.network.rules import program_of
from opnorm.parametrize.sharding import is_sharded

Method = Literal["fast", "afp"]

_DENSE_FIRST = 300
_ROOM = 1.01
"""Less than the search leaves: what it found is not scaled again, which would put its gradient down to rounding."""


class LipschitzPenalty:
    """An upper estimate of a network's Lipschitz constant, as a scalar that gradients flow through.

    A call computes the bound of the covariance calculus from the weights as they are now. It is an upper bound up to
    the rounding of the computation (float64), of the network in evaluation mode: an estimate, nothing is proved. Add
    it, or its logarithm, to a loss. `opnorm.lipschitz` proves the bound of what was trained.

    * `fast`: multipliers in closed form, one number a layer. As a function of the weights it is smooth wherever the
      largest eigenvalues are simple.
    * `afp`: multipliers by the adjoint fixed point, found without gradients, kept for `refresh` calls, and
      scaled up where the weights have moved so far that they no longer suffice. At the optimum the gradient with S
      fixed is the gradient of the minimum over S (envelope theorem).

    The graph is read once: shapes and structure must not change. Value and gradient are computed together, on the CPU,
    as one opaque operation: `torch.compile(fullgraph=True)` keeps it whole, and second derivatives are not available.
    Statistics of BatchNorm count as constants. Weights of parametrized layers are read through the parametrization. Of
    a model that is sharded later each call gathers the weights that it reads.

    Args:
        model: whose weights are trained; only `folded` copies of it are set to evaluation mode.
        example_input: a batch, or a tuple of batches, for the shapes.
        method: "fast" or "afp".
        refresh: calls between two searches for multipliers.
        iterations: of a search.

    Raises:
        ArgumentError: for an unknown method, where no weight takes part, or if the model is sharded already.
        UnsupportedLayerError: for an operation without a rule, one that is unbounded, or one whose constant is
            computed from trained weights in a way that cannot be followed.
        TooLargeError: if the calculus does not fit.

    Source: ECLipsE-Fast (Xu and Sivaranjani, NeurIPS 2024) and LipSDP (Fazlyab et al., NeurIPS 2019) with S fixed.

    Example:
        >>> import torch, opnorm
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> penalty = opnorm.LipschitzPenalty(net, torch.randn(2, 4))
        >>> penalty().backward()
        >>> net[0].weight.grad.shape
        torch.Size([8, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        example_input: Example,
        *,
        method: Method = "fast",
        refresh: int = 50,
        iterations: int = 10,
    ) -> None:
        """Read the graph; nothing is computed yet."""
        if method not in get_args(Method):
            raise ArgumentError(f"method={method!r}: a penalty is 'fast' or 'afp'")
        if refresh < 1:
            raise ArgumentError(f"refresh={refresh!r}: it is at least 1")
        if any(is_sharded(parameter) for parameter in model.parameters()):
            raise ArgumentError(
                "this model is sharded, and a sharded model has no graph to read: make the penalty first, then call "
                "fully_shard or parallelize_module; the penalty reads the weights where they are then"
            )
        graph = _graph_in_evaluation(model, example_input)
        self.program = program_of(graph)
        require_bounded(self.program)
        require_live(self.program, graph)
        self.names = read_names(self.program)
        self._model = model
        if not self.names:
            raise ArgumentError("no weight of the model takes part in its Lipschitz bound")
        self.method, self.refresh, self.iterations = method, refresh, iterations
        self.calculus = _fitting(self.program, graph)
        self._multipliers: list[Tensor] = []
        self._calls = 0
        self._number = enrol(self)

    def __call__(self) -> Tensor:
        """Return the estimate, a scalar in the dtype and on the device of the first weight."""
        found = weights_in_use(self._model, self.names)
        weights = [_whole(found[name]) for name in self.names]
        value: Tensor = penalised(weights, self._number)[0]
        return value

    def value_and_gradient(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The estimate and its gradient in all weights, flattened, in float64 on the CPU."""
        leaves = [w.detach().to("cpu", torch.float64).requires_grad_() for w in weights]
        with torch.enable_grad():
            chain = self._chain(dict(zip(self.names, leaves, strict=True)))
            value = bound_squared(forward(chain, self._chooser(chain))).clamp_min(0).sqrt()
            gradients = torch.autograd.grad(value, leaves, materialize_grads=True)
        return value.detach(), torch.cat([g.reshape(-1) for g in gradients])

    def _chain(self, live: dict[str, Tensor]) -> Chain:
        return chain_of(with_slopes(self.program, live), live, self.calculus)

    def _chooser(self, chain: Chain) -> Chooser:
        if self.method == "fast":
            return closed_form
        if self._calls % self.refresh == 0:
            with torch.no_grad():
                self._multipliers = adjoint_fixed_point(chain, fast(chain), self.iterations).multipliers
        self._calls += 1
        return fixed(self._multipliers, _ROOM)


def _graph_in_evaluation(model: nn.Module, example_input: Example) -> Graph:
    """The graph of the folded model in evaluation mode; every module of the model keeps its own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        return export(folded(model), example_input)
    finally:
        for module, training in modes:
            module.training = training


def _whole(weight: Tensor) -> Tensor:
    return weight.full_tensor() if is_sharded(weight) else weight  # type: ignore[attr-defined]


def _fitting(program: Program, graph: Graph) -> str:
    """The first form of the calculus that the network fits.

    Raises:
        TooLargeError: or UnsupportedLayerError, with the reason of each form, if it fits none.
    """
    problems: list[Exception] = []
    largest = max(step.size for step in program.steps)
    for calculus in ("dense", "fourier") if largest <= _DENSE_FIRST else ("fourier", "dense"):
        try:
            chain = chain_of(program, graph.weights, calculus)
            with torch.no_grad():
                fast(chain, slim=True)
        except (TooLargeError, UnsupportedLayerError, CertificateError, LinAlgError) as problem:
            problems.append(problem)
            continue
        return calculus
    reasons = "; ".join(str(p) for p in problems)
    kind = TooLargeError if any(isinstance(p, TooLargeError) for p in problems) else UnsupportedLayerError
    raise kind(f"the calculus does not fit this network: {reasons}")
