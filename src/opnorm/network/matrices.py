"""Products of two varying matrices on a region."""

import math

import torch

from opnorm.certificate.network.program import Opaque, Step, Sum
from opnorm.certificate.network.region import norm_up
from opnorm.network.centre import relative
from opnorm.network.distance import Distance
from opnorm.network.read import Read
from opnorm.network.spectral import spectral_up


def product_on_region(step: Opaque, reads: list[Read], *, start: int) -> tuple[list[Step], None, Distance | None]:
    """`d(A B) = dA B + A dB`: one function of each factor and their sum; how far each result can be, and the rounding.

    A factor that is used c times, because its leading axes are enlarged, counts sqrt(c) times.
    """
    inner = int(step.parameters[0])
    columns = step.shape[-1]
    count = step.size // (step.shape[-2] * columns)
    left, right = reads[0].value.reshape(-1, step.shape[-2], inner), reads[1].value.reshape(-1, inner, columns)
    if count % len(left) or count % len(right):
        return [step], None, None
    constants = []
    for own, other, read in ((left, right, reads[1]), (right, left, reads[0])):
        largest = torch.maximum(read.low.abs(), read.high.abs()).reshape(len(other), -1).norm(dim=1)
        most = torch.minimum(spectral_up(other) + read.off_together, largest).amax() * (1 + 1e-9) + 1e-150
        constant = float(most) * math.sqrt(count / len(own)) * (1 + 1e-9)
        constants.append(constant if math.isfinite(constant) else math.inf)
    steps: list[Step] = [
        Opaque(
            (source,), step.shape, f"{step.label} ({name})", constant, f"a product of matrices: what moves the {name}"
        )
        for source, name, constant in zip(step.sources, ("left", "right"), constants, strict=True)
    ]
    steps.append(Sum((start, start + 1), step.shape, step.label, (1.0, 1.0)))
    sizes = [math.sqrt(count / len(x)) * norm_up(x.abs().reshape(-1)) for x in (left, right)]
    lost = relative(inner) * math.prod(sizes) * (1 + 1e-9) + 1e-150
    return steps, None, Distance.of(torch.full((step.size,), lost, dtype=torch.float64), lost)
