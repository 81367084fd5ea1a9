"""Every form of the proof against the quadratic form that it stands for, in python-flint's ball arithmetic.

With the multipliers fixed, `|dx|^2 - sum_j T_j ((r_j dy_j)^2 - (dv_j - m_j dy_j)^2)` is a quadratic form K in the
inputs and in all results of the non-linear steps at once, and the bound is the root of lambda_max(O K^{-1} O^T) for
the rows O of the outputs. Neither covers nor Woodbury's identity are used: nothing is shared with the code.
"""

from collections.abc import Callable

import flint
import pytest
import torch
from torch import Tensor, nn

from network.networks import Lambda, MaxMin, residual
from opnorm.certificate.network.activations import FIXED
from opnorm.certificate.network.check import chain_of
from opnorm.certificate.network.proof import prove
from opnorm.graph import export
from opnorm.network.multipliers.afp import adjoint_fixed_point
from opnorm.network.multipliers.fast import fast
from opnorm.network.rules import program_of

Rows = flint.arb_mat


def ball(matrix: Tensor) -> Rows:
    return flint.arb_mat([[flint.arb(v) for v in row] for row in matrix.double().tolist()])


class Form:
    """The quadratic form, written down as a network is followed."""

    def __init__(self, inputs: int, steps: list[int]) -> None:
        self.size = inputs + sum(steps)
        self.start = inputs
        self.x = self.variables(0, inputs)
        self.k = self.x.transpose() * self.x

    def variables(self, start: int, count: int) -> Rows:
        return ball(torch.eye(self.size)[start : start + count])

    def step(self, y: Rows, low: float, high: float, multiplier: Tensor) -> Rows:
        """An elementwise function of slopes in [low, high], with a multiplier for each element."""
        count = len(multiplier)
        v = self.variables(self.start, count)
        self.start += count
        middle, radius = (flint.arb(low) + flint.arb(high)) / 2, (flint.arb(high) - flint.arb(low)) / 2
        t = flint.arb_mat(count, count, [1 / flint.arb(float(multiplier[i])) if i == j else 0 for i in range(count) for j in range(count)])  # fmt: skip # noqa: E501
        away, reach = v - y * middle, y * radius
        self.k = self.k - reach.transpose() * t * reach + away.transpose() * t * away
        return v

    def bound(self, out: Rows) -> flint.arb:
        assert definite(self.k)
        gram = out * self.k.inv() * out.transpose()
        values = flint.acb_mat(gram).eig(multiple=True, algorithm="rump")
        return max((v.real for v in values), key=lambda v: float(v.mid())).sqrt()


def definite(matrix: Rows) -> bool:
    """Whether all pivots of Gauss's elimination are certainly positive."""
    rows = [[matrix[i, j] for j in range(matrix.ncols())] for i in range(matrix.nrows())]
    for i, row in enumerate(rows):
        if not row[i] > 0:
            return False
        for below in rows[i + 1 :]:
            factor = below[i] / row[i]
            for j in range(i, len(row)):
                below[j] -= factor * row[j]
    return True


def general(model: nn.Sequential, s: list[Tensor]) -> flint.arb:
    form = Form(3, [4, 3])
    h = form.step(ball(model[0].weight) * form.x, *FIXED["gelu"], s[0])
    h = form.step(ball(model[2].weight) * h, 0.25, 1.0, s[1])
    return form.bound(ball(model[4].weight) * h)


def joint(model: nn.Module, s: list[Tensor]) -> flint.arb:
    a, b, c, d, last = (ball(layer.weight) for layer in model.layers)
    form = Form(3, [4, 5])
    x = form.x + b * form.step(a * form.x, 0.0, 1.0, s[0])
    return form.bound(last * (x + d * form.step(c * x, 0.0, 1.0, s[1])))


def opaque(model: nn.Sequential, s: list[Tensor]) -> flint.arb:
    form = Form(3, [4])
    (one,) = s
    h = form.step(ball(model[0].weight) * form.x, -1.0, 1.0, one.expand(4))
    return form.bound(ball(model[2].weight) * h)


def fourier(model: nn.Sequential, s: list[Tensor]) -> flint.arb:
    """Circular convolutions as matrices, each channel's multiplier at every position."""
    form = Form(9, [18, 9])
    h = form.step(circulant(model[0], 1) * form.x, 0.0, 1.0, s[0].repeat_interleave(9))
    h = form.step(circulant(model[2], 2) * h, -0.5, 1.5, s[1].repeat_interleave(9))
    return form.bound(ball(model[5].weight) * h)


def circulant(layer: nn.Module, channels: int) -> Rows:
    basis = torch.eye(9 * channels, dtype=torch.float64).reshape(-1, channels, 3, 3)
    padded = nn.functional.pad(basis, (1, 1, 1, 1), mode="circular")
    return ball(nn.functional.conv2d(padded, layer.weight.double()).flatten(1).mT)


def circular(i: int, o: int) -> nn.Module:
    return nn.Conv2d(i, o, 3, padding=1, padding_mode="circular")


FORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, Callable[..., flint.arb]]] = {
    "general": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3), nn.LeakyReLU(0.25), nn.Linear(3, 2)),
        (3,), "dense", general,
    ),
    "joint": (
        lambda: Lambda(residual, *(nn.Linear(a, b) for a, b in [(3, 4), (4, 3), (3, 5), (5, 3)]), nn.Linear(3, 2)),
        (3,), "dense", joint,
    ),
    "opaque": (lambda: nn.Sequential(nn.Linear(3, 4), MaxMin(), nn.Linear(4, 2)), (3,), "dense", opaque),
    "Fourier": (
        lambda: nn.Sequential(circular(1, 2), nn.ReLU(), circular(2, 1), nn.Hardswish(), nn.Flatten(), nn.Linear(9, 2)),
        (1, 3, 3), "fourier", fourier,
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", FORMS)
def test_the_proved_bound_is_above_the_exact_one_and_close(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    flint.ctx.prec = 200
    make, shape, calculus, exactly = FORMS[name]
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)
    graph = export(model, torch.randn(2, *shape))
    chain = chain_of(program_of(graph), graph.weights, calculus)
    with torch.no_grad():
        found = adjoint_fixed_point(chain, fast(chain), 6)
        exact = exactly(model, [s.detach() for s in found.multipliers])
    proved = prove(chain, found.multipliers).upper
    assert flint.arb(proved) > exact
    assert proved <= float(exact.mid()) * (1 + 1e-6)
