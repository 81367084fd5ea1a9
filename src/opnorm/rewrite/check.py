"""`opnorm.verify`: a certificate of weights or of a network, and weights, each as a path or in memory."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import nn

from opnorm.certificate.format import LARGEST, Certificate
from opnorm.certificate.network.check import Verified, verify_network
from opnorm.certificate.network.encoding import first_difference
from opnorm.certificate.network.file import NetworkCertificate, is_network_certificate
from opnorm.certificate.verify import Verification, Weights, verify_weights
from opnorm.checkpoint import stored_tensors
from opnorm.errors import CertificateError, CertificateFormatError, UnsupportedLayerError
from opnorm.network.certified import program_of_model


def verify(
    certificate: str | PathLike[str] | Certificate | NetworkCertificate,
    weights: str | PathLike[str] | nn.Module | Weights,
    *,
    part: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> Verification | Verified:
    """Prove again everything that a certificate claims of some weights, or of a network with them.

    Nothing that computed the bounds is used: the verifier forms its own products and factorises them, and what it
    shares with the search is the lemma on Cholesky factorisations.

    Args:
        certificate: its path, or as parsed: JSON of `normalize_checkpoint`, or the file of `NetworkBound.certificate`.
        weights: the path of a checkpoint, a model, a state dict, or pairs of name and tensor. A network's certificate
            is compared with a model as well: its steps must be those that the rules read from the model.
        part: of a nested torch file, such as "ema".
        progress: called before each tensor or stage with how much is done, of how much, and its name.

    Returns:
        What was proved: a `Verification` of weights, or a `Verified` bound of a network, with the assumptions that it
        rests on. The call returns only if all of it holds.

    Raises:
        CertificateFormatError: if the certificate cannot be read.
        CheckpointError: if the checkpoint cannot be read.
        CertificateError: if it does not hold for these weights; the message names the tensor and says why.

    Example:
        >>> import tempfile, torch, opnorm
        >>> from safetensors.torch import save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": 3 * torch.eye(2)}, f"{folder}/in.safetensors")
        ...     outcome = opnorm.normalize_checkpoint(f"{folder}/in.safetensors", f"{folder}/out.safetensors")
        ...     opnorm.verify(outcome.certificate_path, f"{folder}/out.safetensors").proved
        ('fc.weight',)
    """
    if isinstance(certificate, str | PathLike) and is_network_certificate(Path(certificate)):
        certificate = NetworkCertificate.load(Path(certificate))
    model = weights if isinstance(weights, nn.Module) else None
    if isinstance(certificate, NetworkCertificate) and model is not None:
        found = verify_network(certificate, model, progress)
        return replace(found, assumptions=_compared(certificate, model))
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, str | PathLike):
        weights = stored_tensors(weights, part)
    if isinstance(certificate, NetworkCertificate):
        return verify_network(certificate, weights if isinstance(weights, Mapping) else dict(weights), progress)
    claimed = certificate if isinstance(certificate, Certificate) else _read(Path(certificate))
    return verify_weights(claimed, weights, progress)


def _compared(certificate: NetworkCertificate, model: nn.Module) -> tuple[str, ...]:
    """The assumptions that are left once the rules have read the same steps from the model.

    Raises:
        CertificateError: if they read others.
    """
    program = certificate.program
    dtype = next((p.dtype for p in model.parameters()), torch.get_default_dtype())
    example = tuple(torch.zeros(2, *program.steps[i].shape, dtype=dtype) for i in program.inputs)
    try:
        own = program_of_model(model, example, on_region=certificate.on is not None)
    except UnsupportedLayerError as problem:
        raise CertificateError(f"the steps could not be compared with the model: {problem}") from problem
    difference = first_difference(program, own)
    if difference:
        raise CertificateError(f"the certificate is not of this model: {difference}")
    return certificate.assumptions


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(min(path.stat().st_size, LARGEST) + 1)
    except OSError as error:
        raise CertificateFormatError(f"{path}: cannot be read ({error.strerror})") from error
