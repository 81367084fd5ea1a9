"""Training divides by the quantity that evaluation divides by, whichever bound of a convolution is proved."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import nn

import opnorm


def attained_norm(layer, weight, in_shape):
    """The norm of a plain layer with another weight at an input size, by ARPACK on products in float64."""
    twin = type(layer)(
        layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        bias=False, padding_mode=layer.padding_mode,
    ).double()  # fmt: skip
    twin.weight = nn.Parameter(weight.detach().double(), requires_grad=False)

    def gram(x):
        y, pull = torch.func.vjp(twin, torch.from_numpy(x).reshape(1, *in_shape))
        return pull(y)[0].flatten().numpy()

    size = int(np.prod(in_shape))
    top = eigsh(
        LinearOperator((size, size), gram, dtype=float), 1, v0=np.ones(size), tol=1e-5, return_eigenvectors=False
    )
    return float(np.sqrt(top[0]))


def trained(layer, in_shape, steps):
    """After steps of Adam 2e-4 on new noise."""
    optimizer = torch.optim.Adam(layer.parameters(), 2e-4, betas=(0.5, 0.999))
    for _ in range(steps):
        loss = torch.relu(1 - layer(torch.randn(2, *in_shape) + 0.5)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return layer


def ratio(layer):
    """Of the norms of the weight in training and in evaluation."""
    there = layer.train().weight.detach().norm()
    return float(there / layer.eval().weight.detach().norm())


# By the map's own matrix: more than 4096 inputs, whose factorisation over image rows is cheap.
TIGHT = {
    "dilated": (lambda: nn.Conv2d(8, 8, 3, padding=2, dilation=2), (8, 24, 24)),
    "one axis": (lambda: nn.Conv1d(4, 4, 3, padding=137, dilation=137), (4, 1100)),
    "strided": (lambda: nn.Conv2d(3, 12, 5, stride=2, padding=4, dilation=2), (3, 38, 38)),
    "reflecting": (lambda: nn.Conv2d(2, 4, 5, padding=2, padding_mode="reflect"), (2, 48, 48)),
}
# By the symbol of another convolution, mostly far above the norm: the map's own matrix takes too long.
LOOSE = {
    "reflecting": (lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), (16, 40, 40)),
    "replicating": (lambda: nn.Conv2d(16, 12, 5, padding=2, padding_mode="replicate"), (16, 36, 36)),
    "replicating 1 x 1": (lambda: nn.Conv2d(64, 64, 1, padding=1, padding_mode="replicate"), (64, 24, 24)),
    "circular, odd stride": (lambda: nn.Conv2d(16, 24, 3, stride=2, padding=1, padding_mode="circular"), (16, 37, 37)),
    "circular, more than once around": (lambda: nn.Conv1d(48, 48, 4, padding=2, padding_mode="circular"), (48, 200)),
}


@pytest.mark.parametrize("iterations", [1, "adaptive"])
@pytest.mark.parametrize("case", TIGHT)
def test_a_tight_proof_meets_a_tight_estimate(case, iterations):
    torch.manual_seed(0)
    make, in_shape = TIGHT[case]
    plain = make()
    layer = trained(opnorm.spectral_norm(make(), input_shape=in_shape, n_power_iterations=iterations), in_shape, 10)
    assert attained_norm(plain, layer.weight, in_shape) == pytest.approx(1, abs=1e-3)
    assert ratio(layer) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("case", LOOSE)
def test_a_loose_proof_meets_the_same_loose_estimate(case):
    torch.manual_seed(0)
    make, in_shape = LOOSE[case]
    layer = trained(opnorm.spectral_norm(make(), input_shape=in_shape, n_power_iterations="adaptive"), in_shape, 5)
    rule, raw = layer.parametrizations.weight[0], layer.parametrizations.weight.original.detach()
    triple = rule.triple(raw)
    gain = (triple.left * (rule.view.matrices(raw) @ triple.right)).sum()
    assert float(gain) == pytest.approx(float(triple.sigma), rel=1e-5)  # so that the gradient is that of the divisor
    assert attained_norm(make(), layer.weight, in_shape) < 1.001
    assert ratio(layer) == pytest.approx(1, abs=2e-3)


def test_the_monitor_measures_what_is_attained():
    make, in_shape = LOOSE["reflecting"]
    torch.manual_seed(0)
    plain = make()
    layer = opnorm.spectral_norm(make(), input_shape=in_shape)
    for model in (plain, layer):
        truth = attained_norm(plain, model.weight, in_shape)
        measured = opnorm.Monitor(nn.Sequential(model), input_shapes={"0": in_shape})()["0.weight/norm"]
        assert measured == pytest.approx(truth, rel=2e-3), type(model).__name__
