"""The training estimate: of the true operator, converged at registration, close while training, with its gradient."""

import copy
from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import opnorm
from parametrize.oracle import layer_norm, matrix_norm, symbol_norm

CONVS = [
    lambda: nn.Conv1d(8, 16, 5, dilation=2),
    lambda: nn.Conv2d(12, 10, 3, padding=1),
    lambda: nn.Conv2d(8, 12, 4, 2, 1),
    lambda: nn.Conv2d(3, 8, 7, padding=3),
    lambda: nn.Conv2d(8, 8, 3, groups=4),
    lambda: nn.Conv2d(4, 6, 3, stride=3),
    lambda: nn.Conv3d(2, 3, 3),
]


@pytest.mark.parametrize("number", range(len(CONVS)))
def test_registration_finds_the_supremum_over_frequencies(number):
    torch.manual_seed(number)
    layer = CONVS[number]()
    truth = symbol_norm(layer.weight, layer.stride, layer.dilation, layer.groups, 12 if number == 6 else 36)
    opnorm.spectral_norm(layer)
    estimate = float(layer.parametrizations.weight[0].triple(layer.parametrizations.weight.original).sigma)
    # The grid is a lower end of the supremum; between its points there is a little more.
    assert truth * (1 - 1e-4) <= estimate <= truth * 1.02


# Of a size there are some frequencies only. In each case another one than the best sees most with a vector held fixed.
SIZED = [
    (lambda: nn.Conv1d(8, 8, 4, padding="same", padding_mode="circular"), 40, 13),
    (lambda: nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), 15, 11),
    (lambda: nn.Conv2d(6, 7, 4, padding="same", padding_mode="circular"), 12, 5),
    (lambda: nn.Conv2d(6, 16, 3, 2, 1, groups=2, padding_mode="circular"), 16, 0),
]


@pytest.mark.parametrize("number", range(len(SIZED)))
def test_registration_finds_the_best_frequency_of_a_size(number):
    make, size, seed = SIZED[number]
    torch.manual_seed(seed)
    layer = make()
    truth = symbol_norm(layer.weight, layer.stride, layer.dilation, layer.groups, size)
    opnorm.spectral_norm(layer, input_shape=(layer.in_channels, *[size] * (layer.weight.ndim - 2)))
    estimate = float(layer.parametrizations.weight[0].triple(layer.parametrizations.weight.original).sigma)
    assert estimate == pytest.approx(truth, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), rank=st.integers(1, 5), seed=st.integers(0, 10**6))
def test_registration_converges_for_matrices(rows, columns, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(columns, rows)
    with torch.no_grad():
        layer.weight.copy_(
            torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
        )
    opnorm.spectral_norm(layer)
    assert matrix_norm(layer.weight) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
def test_with_an_input_size_it_estimates_the_map_at_that_size(padding_mode):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3, padding=1, padding_mode=padding_mode)
    layer = opnorm.spectral_norm(copy.deepcopy(plain), input_shape=(3, 6, 6))
    assert layer_norm(plain, layer.weight, (3, 6, 6)) == pytest.approx(1.0, rel=2e-3)


GRADIENTS = {
    "linear": (lambda: nn.Linear(6, 5), (6,), {}),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 5), {}),
    "strided": (lambda: nn.Conv2d(2, 4, 4, 2, 1), (2, 6, 6), {}),
    "grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2), (4, 5, 5), {}),
    "transposed": (lambda: nn.ConvTranspose2d(3, 2, 4, 2, 1), (3, 4, 4), {}),
    "at a size": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4), {"input_shape": (2, 4, 4)}),
    "reflect": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 4, 4), {"input_shape": (2, 4, 4)}),
    "reshaped": (lambda: nn.ConvTranspose2d(3, 2, 3), (3, 4, 4), {"norm": "reshaped"}),
    "clip": (lambda: nn.Linear(6, 5), (6,), {"mode": "clip", "lipschitz": 0.3}),
    "clip inactive": (lambda: nn.Linear(6, 5), (6,), {"mode": "clip", "lipschitz": 30.0}),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradient_is_that_of_dividing_by_the_true_norm(case):
    """Finite differences of the whole map, the norm found afresh at every point."""
    make, in_shape, options = GRADIENTS[case]
    torch.manual_seed(1)
    layer = opnorm.spectral_norm(make().double(), n_power_iterations=30, **options)
    raw = layer.parametrizations.weight.original
    x, probe = torch.randn(3, *in_shape, dtype=torch.double), torch.randn_like(raw)
    target = torch.randn_like(layer(x))

    def loss():
        for _ in range(10):
            opnorm.update(layer)
        return (layer(x) * target).sum()

    loss().backward()
    step = 1e-5
    with torch.no_grad():
        raw.add_(step * probe)
        above = loss()
        raw.sub_(2 * step * probe)
        below = loss()
    slope = float((raw.grad * probe).sum())
    assert float((above - below) / (2 * step)) == pytest.approx(slope, rel=2e-4, abs=1e-6)


def test_gradients_of_gradients():
    torch.manual_seed(0)
    net = nn.Sequential(
        opnorm.spectral_norm(nn.Conv2d(3, 4, 3)), nn.Tanh(), nn.Flatten(), opnorm.spectral_norm(nn.Linear(16, 1))
    )
    net.double()
    opnorm.update(net)
    x = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)

    def penalty():
        return torch.autograd.grad(net(x).sum(), x, create_graph=True)[0].square().sum()

    penalty().backward()
    for layer in (net[0], net[3]):
        raw = layer.parametrizations.weight.original
        rule = layer.parametrizations.weight[0]
        triple = rule.triple(raw)
        probe, step = torch.randn_like(raw), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                raw.add_(sign * step * probe)
            # The direction is held, as in every implementation; sigma moves with the weight.
            gain = triple.left * (rule.view.matrices(raw.detach()) @ triple.right)
            _set(rule, raw, triple._replace(sigma=gain.sum((1, 2))))
            values.append(float(penalty().detach()))
            with torch.no_grad():
                raw.sub_(sign * step * probe)
        _set(rule, raw, triple)
        slope = float((raw.grad * probe).sum())
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(slope, rel=1e-4, abs=1e-7)


def _set(rule, raw, triple):
    from opnorm.parametrize import values

    rule._estimate = rule._estimate._replace(triple=triple, key=values.Sampler().key(raw, rule._epoch))


def discriminator(wrap, width=16):
    layers = []
    for c_in, c_out in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
        layers += [wrap(nn.Conv2d(c_in, c_out, 4, 2, 1)), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, wrap(nn.Conv2d(4 * width, 1, 4)))


def mlp(wrap):
    layers = [module for _ in range(3) for module in (wrap(nn.Linear(256, 256)), nn.ReLU())]
    return nn.Sequential(*layers, wrap(nn.Linear(256, 10)))


def symbol(kernel, stride, omega):
    """The matrix of a 2-d convolution at a frequency: its aliases side by side."""
    aliases = []
    for shift in np.ndindex(*stride):
        a, b = (w + 2 * np.pi * n / s for w, n, s in zip(omega, shift, stride, strict=True))
        phase = np.exp(1j * (a * np.arange(kernel.shape[2])[:, None] + b * np.arange(kernel.shape[3])))
        aliases.append((kernel * phase).sum((2, 3)))
    return np.concatenate(aliases, 1) / np.sqrt(len(aliases))


def true_norm(layer, count=10):
    """Of the raw weight, by SciPy: for a convolution the best of a grid of frequencies, each climbed to its top."""
    raw = layer.parametrizations.weight.original.detach()
    if raw.ndim == 2:
        return matrix_norm(raw)
    kernel = raw.double().numpy()

    def negative(omega):
        return -np.linalg.norm(symbol(kernel, layer.stride, omega), 2)

    # A real kernel is the same at minus the frequency.
    half = [(i, j) for i in range(count // 2 + 1) for j in range(count)]
    starts = [[2 * np.pi * n / (s * count) for n, s in zip(index, layer.stride, strict=True)] for index in half]
    best = sorted(starts, key=negative)[:5]
    return max(-scipy.optimize.minimize(negative, x, method="Nelder-Mead", options={"maxiter": 60}).fun for x in best)


AGREEMENT = {
    "discriminator": (discriminator, (3, 32, 32), 1, {10: 0.05, 100: 0.01}, 0),
    "discriminator, adaptive": (discriminator, (3, 32, 32), "adaptive", {14: 1e-3, 20: 1e-3}, 0),
    "discriminator, adaptive, seed 1": (discriminator, (3, 32, 32), "adaptive", {17: 1e-3}, 1),
    "narrow discriminator, adaptive": (partial(discriminator, width=8), (3, 32, 32), "adaptive", {18: 1e-3}, 2),
    "mlp": (mlp, (256,), 1, {5: 0.05, 10: 0.05, 20: 0.05, 100: 0.01}, 0),
    "mlp, adaptive": (mlp, (256,), "adaptive", {3: 1e-3, 10: 1e-3, 20: 1e-3}, 0),
    "mlp, adaptive, seed 1": (mlp, (256,), "adaptive", {3: 1e-3, 10: 1e-3, 20: 1e-3}, 1),
}


@pytest.mark.parametrize("case", AGREEMENT)
def test_training_divides_by_the_true_norm(case):
    """Adam 2e-4 on new noise in every step, as in a GAN: the first steps add a large new singular direction."""
    build, in_shape, iterations, allowed, seed = AGREEMENT[case]
    torch.manual_seed(seed)
    net = build(lambda layer: opnorm.spectral_norm(layer, n_power_iterations=iterations))
    optimizer = torch.optim.Adam(net.parameters(), 2e-4, betas=(0.5, 0.999))
    gaps = {}
    for step in range(1, max(allowed) + 1):
        real, fake = torch.randn(16, *in_shape) + 0.5, torch.randn(16, *in_shape)
        loss = torch.relu(1 - net(real)).mean() + torch.relu(1 + net(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in allowed:
            ratios = [
                float(layer.parametrizations.weight.original.detach().norm() / layer.weight.detach().norm())
                / true_norm(layer)
                for layer in net[::2]
            ]
            gaps[step] = max(abs(ratio - 1) for ratio in ratios)
    assert all(gaps[step] < limit for step, limit in allowed.items()), gaps


def test_folded_and_evaluated_weights_are_the_same():
    net = discriminator(opnorm.spectral_norm)
    net(torch.randn(2, 3, 32, 32)).mean().backward()
    torch.optim.Adam(net.parameters(), 2e-4).step()
    x = torch.randn(2, 3, 32, 32)
    plain = opnorm.fold(net)
    assert torch.equal(net.eval()(x), plain.eval()(x))
    assert all(torch.equal(a.weight.detach(), b.weight.detach()) for a, b in zip(net[::2], plain[::2], strict=True))
