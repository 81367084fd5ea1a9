"""`opnorm.verify`: a certificate and weights, each as a path or in memory."""

from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from opnorm.certificate.format import LARGEST, Certificate
from opnorm.certificate.verify import Verification, Weights, verify_weights
from opnorm.checkpoint.reading import locate, open_stored
from opnorm.errors import CertificateFormatError


def verify(
    certificate: str | PathLike[str] | Certificate,
    weights: str | PathLike[str] | nn.Module | Weights,
    *,
    part: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> Verification:
    """Prove again everything that a certificate claims of some weights.

    Nothing that computed the bounds is used: the verifier forms its own products and factorises them, and what it
    shares with the search is the lemma on Cholesky factorisations.

    Args:
        certificate: its path, or as parsed.
        weights: the path of a checkpoint, a model, a state dict, or pairs of name and tensor.
        part: of a nested torch file, such as "ema".
        progress: called before each tensor with the elements done, all elements, and its name.

    Returns:
        What was proved. The call returns only if all of it holds.

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
    claimed = certificate if isinstance(certificate, Certificate) else _read(Path(certificate))
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if isinstance(weights, str | PathLike):
        weights = _stored(weights, part)
    return verify_weights(claimed, weights, progress)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(LARGEST + 1)
    except OSError as error:
        raise CertificateFormatError(f"{path}: cannot be read ({error.strerror})") from error


def _stored(path: str | PathLike[str], part: str) -> Iterator[tuple[str, Tensor]]:
    for entry in open_stored(locate(path), part).entries:
        for name in (entry.name, *entry.aliases):
            yield name, entry.load()
