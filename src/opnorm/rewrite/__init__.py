"""A checkpoint -> the same checkpoint with every weight divided by its norm, and the certificate of it."""

from opnorm.rewrite.normalize import normalize_checkpoint
from opnorm.rewrite.outcome import Changed, Kept, Outcome
from opnorm.rewrite.verify import verify

__all__ = ["Changed", "Kept", "Outcome", "normalize_checkpoint", "verify"]
