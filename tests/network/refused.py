"""A certificate that is not accepted, neither as an object nor as a file."""

from pathlib import Path

import pytest
from torch import Tensor

import opnorm
from opnorm.certificate.network.file import NetworkCertificate
from opnorm.errors import CertificateError


def assert_refused(
    false: NetworkCertificate, weights: dict[str, Tensor], path: Path, *, written_is_false: bool = True
) -> None:
    """Verification fails; writing may fail too, with an error of its own."""
    with pytest.raises(CertificateError):
        opnorm.verify(false, weights)
    try:
        false.save(path)
    except (ValueError, TypeError):
        return
    if written_is_false:
        with pytest.raises(CertificateError):
            opnorm.verify(path, weights)
