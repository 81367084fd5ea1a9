"""After the first hundred values vectors move at some values only; the estimate is of every value all the same."""

import pytest
import torch
from torch import nn

import opnorm
from opnorm.parametrize.blocks import Triple, look_in_turn
from parametrize.oracle import matrix_norm, symbol_norm

VALUES = 18


def weight(layer):
    return getattr(layer, next(iter(layer.parametrizations)))


def norm(layer):
    if layer.weight.ndim == 2:
        return matrix_norm(layer.weight)
    return symbol_norm(layer.weight, layer.stride, layer.dilation, layer.groups, 36)


def reshaped(layer):
    return matrix_norm(layer.weight.flatten(1))


def query_key_value(layer):
    """Of the three norms the one that is furthest from 1."""
    return max(map(matrix_norm, layer.in_proj_weight.chunk(3)), key=lambda found: abs(found - 1))


OLD = {
    "matrix": (lambda: nn.Linear(30, 24), norm, {}),
    "matrix, four iterations": (lambda: nn.Linear(30, 24), norm, {"n_power_iterations": 4}),
    "clip": (lambda: nn.Linear(30, 24), norm, {"mode": "clip", "lipschitz": 0.5}),
    "reshaped": (lambda: nn.Conv2d(6, 8, 3), reshaped, {"norm": "reshaped"}),
    "pointwise": (lambda: nn.Conv2d(20, 24, 1), norm, {}),
    "pointwise, grouped": (lambda: nn.Conv2d(40, 48, 1, groups=2), norm, {}),
    "attention": (lambda: nn.MultiheadAttention(20, 2), query_key_value, {"name": None}),
    "one axis": (lambda: nn.Conv1d(6, 8, 5, dilation=2), norm, {}),
    "convolution": (lambda: nn.Conv2d(6, 8, 3, padding=1), norm, {}),
    "convolution, two iterations": (lambda: nn.Conv2d(6, 8, 3, padding=1), norm, {"n_power_iterations": 2}),
    "strided": (lambda: nn.Conv2d(6, 8, 4, 2, 1), norm, {}),
    "grouped": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=4), norm, {}),
}


def aged(case):
    make, oracle, options = OLD[case]
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(make(), **options)
    for _ in range(101):
        opnorm.update(layer)
    return layer, next(iter(layer.parametrizations.values())).original, oracle, options.get("lipschitz", 1.0)


@pytest.mark.parametrize("case", OLD)
def test_every_value_is_divided_by_its_own_norm(case):
    layer, raw, oracle, lipschitz = aged(case)
    for done in range(VALUES):
        with torch.no_grad():
            raw.mul_(1.05)
        # A grid of frequencies is a lower end of the supremum.
        assert lipschitz * (1 - 5e-3) <= oracle(layer) <= lipschitz * (1 + 1e-4), done


@pytest.mark.parametrize("case", OLD)
def test_the_gradient_is_of_the_value_that_it_is_taken_at(case):
    """What does not depend on the scale of the weight has no slope along it."""
    layer, raw, _, _ = aged(case)
    target = torch.randn_like(raw)
    for done in range(VALUES):
        with torch.no_grad():
            raw.add_(torch.randn_like(raw), alpha=0.01)
        raw.grad = None
        (weight(layer) * target).sum().backward()
        assert abs(float((raw.grad * raw.detach()).sum())) <= 1e-5 * float(raw.grad.norm() * raw.detach().norm()), done


@pytest.mark.parametrize("case", OLD)
def test_a_weight_that_moves_is_followed(case):
    layer, raw, oracle, lipschitz = aged(case)
    torch.manual_seed(1)
    along = torch.randn(len(raw), 1) @ torch.randn(1, raw[0].numel())
    for done in range(40):
        with torch.no_grad():
            raw.add_(along.reshape(raw.shape), alpha=0.01 * float(raw.detach().norm() / along.norm()))
        # The gain that some vectors see is at most the norm.
        assert lipschitz * (1 - 1e-4) <= oracle(layer) * (1 + 5e-3) and oracle(layer) <= 1.04 * lipschitz, done


@pytest.mark.parametrize("case", ["matrix", "reshaped", "pointwise", "attention"])
def test_looks_at_an_old_matrix_are_a_power_iteration(case):
    """Of a weight that stays the gain grows from value to value, towards the norm."""
    layer, raw, oracle, _ = aged(case)
    torch.manual_seed(1)
    with torch.no_grad():
        raw.add_(torch.randn_like(raw), alpha=0.1 * float(raw.std()))
    found = []
    for _ in range(3):  # the hundred and fourth value, at which all vectors move, is the next
        found.append(oracle(layer))
        opnorm.update(layer)
    assert found[0] > found[1] > found[2] >= 1 - 1e-6


def test_the_vectors_move_on_from_where_looks_have_left_the_first():
    """Two moves of all vectors leave 2.5e-5 from where the first was at the move before."""
    torch.manual_seed(0)
    layer = opnorm.spectral_norm(nn.Linear(80, 80))
    for _ in range(101):
        opnorm.update(layer)
    torch.manual_seed(1)
    raw = layer.parametrizations.weight.original
    with torch.no_grad():
        raw.add_(torch.randn_like(raw), alpha=0.2 * float(raw.std()))
    for _ in range(7):
        opnorm.update(layer)
    assert norm(layer) <= 1 + 1e-5


def test_another_group_may_overtake_between_two_moves():
    layer, raw, oracle, _ = aged("pointwise, grouped")
    for group in (0, 1, 0):
        with torch.no_grad():
            raw.chunk(2)[group].mul_(1.2)
        assert oracle(layer) <= 1 + 1e-4


@pytest.mark.parametrize("back", [False, True])
def test_a_weight_of_zeros_moves_no_vector(back):
    left, right = torch.eye(3)[None, :, :1], torch.eye(4)[None, :, :1]
    found = look_in_turn(torch.zeros(1, 3, 4), Triple(torch.ones(1), left, right), back=back)
    assert found.sigma.tolist() == [0.0]
    assert torch.equal(found.left, left)
    assert torch.equal(found.right, right)
