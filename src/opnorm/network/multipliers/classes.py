"""Which steps of a program are to be measured in the same units: the unknowns of the rescaled product."""

from opnorm.certificate.network.maps import Convolution, Gather, LinearMap, Matrix, TransposedConvolution
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Sum, keeps_channels


def classes(program: Program) -> list[int | None]:
    """For each step the first step of its class; None where its units stay as they are.

    An activation keeps the units of what it reads, the terms of a sum have those of the sum, and so has what acts on
    each channel by itself. Inputs, outputs, and what is moved or joined stay in theirs.
    """
    steps = program.steps
    home = list(range(len(steps)))

    def find(position: int) -> int:
        while home[position] != position:
            home[position] = home[home[position]]
            position = home[position]
        return position

    fixed = set(program.outputs)
    for position, step in enumerate(steps):
        moved = isinstance(step, Linear) and isinstance(step.map, Gather | TransposedConvolution)
        if moved or isinstance(step, Concat | Input):
            fixed |= {position, *step.sources}
        elif isinstance(step, Opaque) and not keeps_channels(step):
            fixed.add(position)
        elif isinstance(step, Elementwise | Sum | Opaque) or (isinstance(step, Linear) and by_channel(step.map)):
            for source in step.sources:
                first, second = sorted((find(source), find(position)))
                home[second] = first
    still = {find(i) for i in fixed}
    for position, step in enumerate(steps):
        if step.shape[:1] != steps[find(position)].shape[:1] or not step.shape or step.shape[0] == 1:
            still.add(find(position))
    written = {i for i, step in enumerate(steps) if isinstance(step, Elementwise | Sum)}
    free = {find(i) for i in written} - still
    return [find(i) if find(i) in free else None for i in range(len(steps))]


def by_channel(linear: LinearMap) -> bool:
    """Whether a map does the same to every channel by itself, such as pooling or a mean."""
    if isinstance(linear, Convolution):
        return linear.groups == linear.in_shape[0] == linear.out_shape[0] > 1
    return isinstance(linear, Matrix) and linear.after == 1 and linear.before == linear.in_shape[0] > 1
