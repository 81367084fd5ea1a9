"""One class per kind of mistake. Every message names what is wrong, why, and the way out."""


class OpnormError(Exception):
    """The base of every error that opnorm raises on purpose; the command line turns it into exit code 2."""


class ArgumentError(OpnormError, ValueError):
    """An argument has a value that cannot be used: an unknown norm, a negative K, a shape that does not fit."""


class UnsupportedLayerError(OpnormError, TypeError):
    """There is no rule for this module or operation. opnorm never guesses a number for it."""


class NotLinearError(UnsupportedLayerError):
    """The module is not a linear map, so it has no operator norm (it may have a Lipschitz rule)."""


class SeveralMatricesError(UnsupportedLayerError):
    """The module holds several matrices; the message lists them so that one can be picked."""


class InputShapeError(ArgumentError):
    """The norm depends on the input's size and `input_shape` is missing or does not fit the layer."""


class WeightError(OpnormError, ValueError):
    """A weight holds NaN or infinite values, or has a dtype that no norm is defined for."""


class TooLargeError(OpnormError, MemoryError):
    """What was asked for does not fit into memory; the message says what does."""


class ArithmeticModeError(OpnormError, RuntimeError):
    """The machine's arithmetic voids the error bounds (flush-to-zero is on, say)."""


class CheckpointError(OpnormError, ValueError):
    """A checkpoint could not be read or written: truncated, refused, a missing shard or key."""


class CertificateError(OpnormError, ValueError):
    """A certificate does not hold for these weights; the message names the tensor and says why."""


class CertificateFormatError(CertificateError):
    """A certificate could not be read: it is malformed, of another version, or was changed after it was written."""
