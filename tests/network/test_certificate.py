"""A certificate proves its claim from the weights alone, and nothing else passes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import opnorm
from network.networks import DENSE, IMAGES
from opnorm.certificate.network.check import verify_network
from opnorm.certificate.network.file import NetworkCertificate
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


def test_a_bound_on_a_region_has_none() -> None:
    model = NETS["mlp"].build()
    bound = opnorm.lipschitz(model, torch.randn(2, 6), region=opnorm.network.Ball(torch.zeros(6), 0.1))
    with pytest.raises(CertificateError, match="region"):
        bound.certificate()
