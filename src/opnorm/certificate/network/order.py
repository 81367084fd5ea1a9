"""The order of a program's steps in which less has to stay live."""

from dataclasses import replace

from opnorm.certificate.network.program import Elementwise, Opaque, Program, Step


def hoisted(program: Program) -> tuple[Program, tuple[int, ...]]:
    """The same steps in an order that does affine ones early where they make a base smaller, and where each was.

    A strided shortcut that a model computes after its branch is such a case: its result is smaller than the image that
    would wait for it. Steps that are not affine keep their order.
    """
    steps = program.steps
    waiting = [len(readers) + (i in program.outputs) for i, readers in enumerate(program.readers())]
    order: list[int] = []
    done: set[int] = set()

    def emit(position: int) -> None:
        order.append(position)
        done.add(position)
        for source in set(steps[position].sources):
            waiting[source] -= 1

    def shrinks(position: int) -> bool:
        sources = set(steps[position].sources)
        freed = sum(steps[i].size for i in sources if waiting[i] == 1)
        return sources <= done and 0 < steps[position].size <= freed

    for position, step in enumerate(steps):
        if position in done:
            continue
        if isinstance(step, Elementwise | Opaque):
            ahead = [i for i in range(position, len(steps)) if i not in done and _affine(steps[i])]
            while early := next((i for i in ahead if i not in done and shrinks(i)), None):
                emit(early)
        emit(position)
    if order == sorted(order):
        return program, tuple(order)
    place = {old: new for new, old in enumerate(order)}
    moved = tuple(replace(steps[i], sources=tuple(place[s] for s in steps[i].sources)) for i in order)
    origins = tuple(program.origins[i] for i in order) if program.origins else ()
    return replace(program, steps=moved, outputs=tuple(place[i] for i in program.outputs), origins=origins), tuple(
        order
    )


def _affine(step: Step) -> bool:
    return bool(step.sources) and not isinstance(step, Elementwise | Opaque)
