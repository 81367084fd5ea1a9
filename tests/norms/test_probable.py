"""Random starts: the stated probability, the formula behind it, and what is still proved (the lower end)."""

import math

import pytest
import torch
from mpmath import mp, mpf
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import svds
from torch import nn

import opnorm
from cases import ORACLE, assert_encloses, largest_singular_value, module_matrix
from opnorm.layers import to_operator
from opnorm.norms import select
from opnorm.norms.probable import epsilon, probable_norm, steps_needed
from opnorm.operators import Dense


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1, 50), (50, 1), (3, 3)])
def test_both_ends_hold_and_meet_the_target(shape, dtype):
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = opnorm.norm(weight, guarantee="probable")
    wide = weight.to(torch.complex128 if dtype.is_complex else torch.float64)
    assert_encloses(found.lower, found.upper, wide)
    assert found.guarantee == "probable" and found.failure_probability == 1e-12 and found.met and found.rtol == 1e-3


@pytest.mark.parametrize("n, k, p", [(10, 30, 1e-12), (4096, 360, 1e-12), (10**6, 100, 1e-6), (1, 20, 0.5)])
def test_the_formula(n, k, p):
    """1.596 sqrt(n) exp(-sqrt(eps) (2k - 1)) <= p, in 50 digits, and hardly less than p."""
    mp.dps = 50
    eps = mpf(epsilon(n, k, p))
    chance = mpf("1.596") * mp.sqrt(n) * mp.exp(-mp.sqrt(eps) * (2 * k - 1))
    assert chance <= p and chance > p * 0.999
    # the bound that it simplifies, from the density of one coordinate of a random unit vector
    assert mp.sqrt(2 * n / mp.pi) / mp.cosh((2 * k - 1) * mp.atanh(min(mp.sqrt(eps), 1 - mpf(10) ** -20))) <= p


@pytest.mark.parametrize("n", [1, 100, 10**6])
@pytest.mark.parametrize("rtol", [1e-6, 1e-3, 0.1, 3.0, 1e6])
def test_enough_steps_are_taken(n, rtol):
    eps = epsilon(n, steps_needed(n, rtol, 1e-12), 1e-12)
    assert 0 < eps < 1 and 1 / math.sqrt(1 - eps) <= 1 + max(rtol, 0)


def test_the_chance_is_real():
    """With a chance of one half and no gap in the spectrum, failures are seen, but not more often than stated."""
    values = torch.linspace(1.0, 0.0, 200, dtype=torch.float64).sqrt()
    operator, failures = Dense(torch.diag(values)), 0
    for _ in range(100):
        found = probable_norm(operator, rtol=0.3, failure_probability=0.5)
        assert found.lower <= 1.0
        failures += found.upper < 1.0
    assert failures <= 70  # 100 draws of a chance of 1/2 exceed this once in 60,000


def test_starts_are_fresh():
    weight = torch.randn(60, 60, generator=torch.Generator().manual_seed(2))
    draws = {opnorm.norm(weight, guarantee="probable", rtol=0.1, failure_probability=1e-3).upper for _ in range(4)}
    assert len(draws) > 1


def test_a_convolution_too_large_for_its_matrix_agrees_with_arpack():
    torch.manual_seed(4)
    layer = nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False).double()
    shape = (8, 32, 32)
    operator = to_operator(layer, shape)

    def on_vectors(f, shape):
        return lambda v: f(torch.from_numpy(v.reshape(1, *shape).copy())).flatten().numpy()

    pair = ScipyOperator(
        (operator.out_size, operator.in_size),
        matvec=on_vectors(lambda x: torch.nn.functional.conv2d(x, layer.weight.detach(), None, 2, 1), shape),
        rmatvec=on_vectors(
            lambda y: torch.nn.functional.conv_transpose2d(y, layer.weight.detach(), None, 2, 1, 1), operator.out_shape
        ),
        dtype="float64",
    )
    truth = float(svds(pair, k=1, tol=1e-13, return_singular_vectors=False, random_state=0)[0])
    for options in ({"guarantee": "probable"}, {"method": "torus"}, {"method": "banded"}, {}):
        found = opnorm.norm(layer, input_shape=shape, **options)
        assert found.lower <= truth * (1 + 1e-9) and truth * (1 - 1e-9) <= found.upper


def test_estimates_promise_only_the_lower_end():
    weight = torch.randn(300, 250, generator=torch.Generator().manual_seed(6))
    found, truth = opnorm.norm(weight, guarantee="estimate"), largest_singular_value(weight.double())
    assert found.guarantee == "estimate" and found.lower <= truth * (1 + ORACLE)
    assert found.upper == pytest.approx(truth, rel=1e-2) and found.failure_probability == 0.0
    assert select(Dense(weight), guarantee="estimate").method == "lanczos"


def test_every_size_is_proved_whatever_is_asked():
    assert opnorm.norm(nn.Conv1d(1, 1, 3), guarantee="probable").guarantee == "proved"


def test_compositions_add_their_chances():
    model = nn.Sequential(nn.Linear(20, 30, bias=False), nn.Linear(30, 10, bias=False))
    found = opnorm.norm(model, input_shape=(20,), guarantee="probable")
    assert found.guarantee == "probable" and 2e-12 <= found.failure_probability < 2.01e-12
    assert_encloses(found.lower, found.upper, module_matrix(model, (20,)))
