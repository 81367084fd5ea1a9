"""A certificate proves its claim from the weights alone, and nothing else passes."""

import dataclasses
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import nn

import opnorm
from network.networks import DENSE, IMAGES, Lambda
from opnorm.certificate.network.check import verify_network
from opnorm.certificate.network.file import NetworkCertificate
from opnorm.certificate.network.maps import Convolution, LinearMap, Matrix, Scale, TransposedConvolution
from opnorm.certificate.network.norms import attainable, proves_run
from opnorm.certificate.network.program import Elementwise
from opnorm.errors import CertificateError

NETS = {n.name: n for n in DENSE + IMAGES}


def certified(name: str, method: str = "fast") -> tuple[nn.Module, NetworkCertificate]:
    net = NETS[name]
    model = net.build()
    return model, opnorm.lipschitz(model, torch.randn(4, *net.shape), method=method).certificate()


DENSE_NAMES = ["mlp", "residual", "maxmin", "resnet", "activation 3", "transposed", "avg pool edges"]


@pytest.mark.parametrize(("name", "method"), [*((name, "fast") for name in DENSE_NAMES), ("resnet", "fourier")])
def test_saved_and_loaded_it_proves_its_claim(name: str, method: str, tmp_path: Path) -> None:
    model, certificate = certified(name, method)
    certificate.save(tmp_path / "net.cert")
    again = NetworkCertificate.load(tmp_path / "net.cert")
    verified = verify_network(again, model.state_dict())
    assert verified.upper == certificate.upper
    assert verified.proved <= certificate.upper


NAIVE = ["mlp", "dead", "concat", "layer norm", "same twice", "resnet", "transposed", "upsample", "groups", "circular"]


@pytest.mark.parametrize("name", NAIVE)
def test_the_naive_rules_have_a_certificate_of_their_own(name: str, tmp_path: Path) -> None:
    net = NETS[name]
    model = net.build()
    bound = opnorm.lipschitz(model, torch.randn(4, *net.shape), method="naive")
    certificate = bound.certificate()
    assert (certificate.calculus, certificate.multipliers) == ("naive", ())
    certificate.save(tmp_path / "net.cert")
    assert opnorm.verify(tmp_path / "net.cert", model).upper == certificate.upper
    assert bound.lower <= certificate.upper <= bound.product * (1 + 1e-6)


def _largest(linear: LinearMap, after: LinearMap | None, weights: dict[str, torch.Tensor]) -> float:
    """By ARPACK on the map itself, in float64."""

    def whole(x: torch.Tensor) -> torch.Tensor:
        y = linear.apply(x, weights)
        return y if after is None else after.apply(y, weights)

    out, pull = torch.func.vjp(whole, torch.zeros(1, *linear.in_shape, dtype=torch.float64))

    def forward(x: np.ndarray) -> np.ndarray:
        return whole(torch.from_numpy(x).reshape(1, *linear.in_shape)).reshape(-1).numpy()

    def backward(y: np.ndarray) -> np.ndarray:
        return pull(torch.from_numpy(y).reshape(out.shape))[0].reshape(-1).numpy()

    shape = (out.numel(), prod(linear.in_shape))
    operator = LinearOperator(shape, matvec=forward, rmatvec=backward, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(min(shape))
    return float(svds(operator, k=1, tol=1e-12, v0=start, return_singular_vectors=False)[0])


ONE, TWO, PAD, WIDE = (1, 1), (2, 2), ((1, 1), (1, 1)), ((2, 2), (2, 2))
RUNS: dict[str, tuple[LinearMap, LinearMap | None, tuple[int, ...], float]] = {
    "matrix": (Matrix((9,), (5,), "w"), None, (5, 9), 1e-6),
    "matrix on tokens": (Matrix((3, 9), (3, 5), "w", 3), Scale((3, 5), (3, 5), "s", 1), (5, 9), 1e-6),
    "matrix across tokens": (Matrix((9, 4), (5, 4), "w", 1, 4), None, (5, 9), 1e-6),
    "small": (Convolution((2, 5, 5), (3, 5, 5), "w", (3, 3), ONE, PAD, ONE), None, (3, 2, 3, 3), 1e-6),
    "convolution": (Convolution((2, 24, 24), (3, 24, 24), "w", (3, 3), ONE, PAD, ONE), None, (3, 2, 3, 3), 0.02),
    "with BatchNorm": (
        Convolution((2, 24, 24), (5, 24, 24), "w", (3, 3), ONE, PAD, ONE),
        Scale((5, 24, 24), (5, 24, 24), "s", 0, "v", 1e-5),
        (5, 2, 3, 3),
        0.02,
    ),
    "stride": (Convolution((2, 24, 24), (4, 12, 12), "w", (4, 4), TWO, PAD, ONE), None, (4, 2, 4, 4), 0.05),
    "groups": (Convolution((4, 20, 20), (4, 20, 20), "w", (3, 3), ONE, WIDE, TWO, 2), None, (4, 2, 3, 3), 0.05),
    "transposed": (
        TransposedConvolution((4, 12, 12), (2, 24, 24), "w", TWO, ONE, (0, 0), ONE), None, (4, 2, 4, 4), 0.05
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_norms_of_the_verifier_against_arpack(name: str) -> None:
    linear, after, shape, tight = RUNS[name]
    torch.manual_seed(0)
    weights = {"w": torch.randn(shape), "s": torch.rand(5) + 0.1, "v": torch.rand(5)}
    run = [linear] if after is None else [linear, after]
    truth = _largest(linear, after, weights)
    stated = attainable(run, weights, 0.0)
    assert proves_run(run, weights, stated)
    assert truth * (1 - 1e-9) <= stated <= truth * (1 + tight)
    assert not proves_run(run, weights, truth * (1 - 1e-9))


def test_an_unbounded_network_has_no_certificate() -> None:
    square = Lambda(lambda x, a: a(x) ** 2, nn.Linear(3, 3))
    with pytest.raises(CertificateError, match="the slope of x"):
        opnorm.lipschitz(square, torch.randn(2, 3)).certificate()


def test_an_estimate_has_no_certificate() -> None:
    bound = opnorm.lipschitz(NETS["mlp"].build(), torch.randn(2, 6), method="fast", guarantee="estimate")
    with pytest.raises(CertificateError, match="estimate"):
        bound.certificate()


def test_other_weights_do_not_pass() -> None:
    model, certificate = certified("mlp")
    model[0].weight.data[0, 0] += 1e-6
    with pytest.raises(CertificateError, match="not the one"):
        verify_network(certificate, model.state_dict())
    with pytest.raises(CertificateError, match="missing"):
        verify_network(certificate, {})


def test_a_smaller_claim_does_not_pass() -> None:
    model, certificate = certified("mlp")
    smaller = dataclasses.replace(certificate, upper=certificate.upper * 0.999)
    with pytest.raises(CertificateError, match="only"):
        verify_network(smaller, model.state_dict())


@pytest.mark.parametrize("factor", [0.4, -1.0, float("nan")])
def test_infeasible_multipliers_do_not_pass(factor: float) -> None:
    model, certificate = certified("mlp")
    wrong = dataclasses.replace(certificate, multipliers=tuple(s * factor for s in certificate.multipliers))
    with pytest.raises(CertificateError):
        verify_network(wrong, model.state_dict())


def test_narrower_slopes_do_not_pass() -> None:
    model, certificate = certified("mlp")
    steps = tuple(
        dataclasses.replace(s, high=s.high * 0.5) if isinstance(s, Elementwise) else s
        for s in certificate.program.steps
    )
    wrong = dataclasses.replace(certificate, program=dataclasses.replace(certificate.program, steps=steps))
    with pytest.raises(CertificateError, match="narrower"):
        verify_network(wrong, model.state_dict())


def test_what_is_taken_on_trust_is_said() -> None:
    _, certificate = certified("maxmin")
    assert any("1-Lipschitz" in line for line in certificate.assumptions)
    assert not certified("mlp")[1].assumptions


def test_a_file_that_is_no_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(CertificateError, match="too short"):
        NetworkCertificate.load(tmp_path / "x")
