"""The naive rules once more, as a table of their own: what a certificate without multipliers is checked by.

Compositions multiply, sums add, what is joined is the root of the sum of squares. Every operation on numbers is
rounded upward.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch

from opnorm import _rounding as rounding
from opnorm.certificate.network.file import Run
from opnorm.certificate.network.maps import LinearMap, Weights
from opnorm.certificate.network.norms import attainable, fused, proves_run
from opnorm.certificate.network.program import Concat, Elementwise, Input, Linear, Opaque, Program, Step, Sum
from opnorm.errors import CertificateError

Progress = Callable[[int, int, str], None]


def composed(program: Program, norms: dict[Run, float]) -> float:
    """The bound of a program from the norms of its linear steps.

    Args:
        program: what the network computes.
        norms: of runs of linear steps; every linear step must be the last of one.

    Raises:
        CertificateError: naming a step that has no bound.
    """
    ending: dict[int, list[Run]] = {}
    for run in norms:
        ending.setdefault(run[-1], []).append(run)
    bounds: list[float] = []
    for position, step in enumerate(program.steps):
        if isinstance(step, Linear):
            runs = ending.get(position, [])
            starts = [bounds[program.steps[run[0]].sources[0]] for run in runs]
            bound = min((rounding.mul_up(norms[r], b) for r, b in zip(runs, starts, strict=True)), default=math.inf)
        else:
            bound = _bound(step, [bounds[i] for i in step.sources])
        if not bound < math.inf:
            reason = step.reason if isinstance(step, Opaque) else "no norm is stated for it"
            raise CertificateError(f"{step.label} has no bound: {reason}")
        bounds.append(bound)
    return _joined([bounds[i] for i in program.outputs])


def prove_norms(program: Program, weights: Weights, norms: dict[Run, float], progress: Progress | None = None) -> None:
    """Prove the norm of every run, equal ones once.

    Raises:
        CertificateError: naming the step.
    """
    known: set[tuple[tuple[LinearMap, ...], float]] = set()
    for number, (run, bound) in enumerate(norms.items()):
        maps = _maps(program, run)
        label = program.steps[run[-1]].label
        if progress is not None:
            progress(number, len(norms), label)
        if (maps, bound) in known:
            continue
        if not proves_run(maps, weights, bound):
            raise CertificateError(f"{label}: could not prove that its norm is at most {bound!r}")
        known.add((maps, bound))


def stated_norms(program: Program, weights: Weights, hints: tuple[float, ...]) -> dict[Run, float]:
    """Norms that can be proved for every linear step, and for pairs that are better taken together.

    Args:
        program: what the network computes.
        weights: by name, the program's constants among them.
        hints: bounds of each step on its own, which are taken where they can be proved.
    """
    found: dict[Run, float] = {}
    known: dict[tuple[LinearMap, ...], float] = {}
    for position, step in enumerate(program.steps):
        if not isinstance(step, Linear):
            continue
        source = program.steps[step.sources[0]]
        runs: list[Run] = [(position,)]
        if isinstance(source, Linear) and fused(source.map, step.map):
            runs.append((step.sources[0], position))
        for run in runs:
            maps = _maps(program, run)
            if maps not in known:
                known[maps] = attainable(maps, weights, hints[position] if len(run) == 1 else 0.0)
            found[run] = known[maps]
    return found


def _maps(program: Program, run: Run) -> tuple[LinearMap, ...]:
    if not 1 <= len(run) <= 2:
        raise CertificateError(f"a norm is stated for the steps {run}, not for one or two")
    maps: list[LinearMap] = []
    for number, position in enumerate(run):
        step = program.steps[position] if position < len(program.steps) else None
        if not isinstance(step, Linear) or (number and step.sources != (run[number - 1],)):
            raise CertificateError(f"the steps {run} are no run of linear maps")
        maps.append(step.map)
    if any(second.in_shape != first.out_shape for first, second in pairwise(maps)):
        raise CertificateError(f"the maps of the steps {run} do not fit")
    return tuple(maps)


def _bound(step: Step, sources: list[float]) -> float:
    if isinstance(step, Input):
        return 1.0
    if isinstance(step, Sum):
        terms = (rounding.mul_up(abs(c), k) for c, k in zip(step.coefficients, sources, strict=True))
        return rounding.add_up(*terms)
    if isinstance(step, Concat):
        return _joined(sources)
    if isinstance(step, Elementwise):
        return rounding.mul_up(float(torch.maximum(step.low.abs(), step.high.abs()).max()), _joined(sources))
    assert isinstance(step, Opaque)
    return rounding.mul_up(step.constant, _joined(sources))


def _joined(values: list[float]) -> float:
    if len(values) == 1:
        return values[0]
    scale = max(values)
    if scale == 0.0 or math.isinf(scale):
        return scale
    squares = (rounding.mul_up(ratio, ratio) for ratio in (rounding.div_up(v, scale) for v in values))
    return rounding.mul_up(scale, rounding.sqrt_up(rounding.add_up(*squares)))
