"""A checkpoint -> the same checkpoint with every weight divided by its norm, and the certificate of it."""

from opnorm.rewrite.check import verify
from opnorm.rewrite.normalize import normalize_checkpoint
from opnorm.rewrite.outcome import Changed, Kept, Outcome

__all__ = ["Changed", "Kept", "Outcome", "normalize_checkpoint", "verify"]
