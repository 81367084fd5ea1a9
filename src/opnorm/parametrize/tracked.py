"""The linear weights of a model, each with an estimate of its norm that warm-starts itself."""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from opnorm.errors import ArgumentError
from opnorm.norms.casting import Mode
from opnorm.parametrize.chains import chain_of, rule_of
from opnorm.parametrize.checks import Asked, check_options, located
from opnorm.parametrize.chosen import matching
from opnorm.parametrize.division import divisor
from opnorm.parametrize.estimate import Iterations
from opnorm.parametrize.families import Norm, Shape, view_of, weights_of
from opnorm.parametrize.spectral import SpectralNormalization

Tracked = dict[str, tuple[nn.Module, str, SpectralNormalization]]


def track(
    model: nn.Module,
    *,
    lipschitz: float,
    mode: Mode,
    norm: Norm,
    iterations: Iterations,
    input_shapes: Mapping[str, Shape] | None,
    skip: Iterable[str],
    attained: bool = False,
) -> Tracked:
    """Return every linear weight of a model by name, with a tracker that is not attached to it.

    Of the norm that is `attained`, or of the bound that evaluation would divide by.

    Raises:
        ArgumentError: if there is none, if `input_shapes` or `skip` names a module that is not there, or if an option
            has no such value.
    """
    check_options(Asked(iterations, None, lipschitz, mode, norm))
    shapes, left_out = dict(input_shapes or {}), [skip] if isinstance(skip, str) else list(skip)
    unused = set(left_out)
    found: Tracked = {}
    held: set[tuple[int, str]] = set()
    for path, module in model.named_modules():
        shape = shapes.pop(path, None)
        skipped_by = matching(path, left_out)
        unused -= skipped_by
        if skipped_by:
            continue
        for owner, name in weights_of(module):
            if (id(owner), name) in held:
                continue
            held.add((id(owner), name))
            where = path if owner is module else f"{path}.out_proj".lstrip(".")
            with located(path, sizes=f"as input_shapes={{{path!r}: ...}}"):
                view = view_of(owner, name, norm, None, shape, attained=attained)
            rule = SpectralNormalization(
                view, lipschitz, mode, iterations, f"{where}.{name}", learn_scale=False, norm=norm
            )
            found[f"{where}.{name}".lstrip(".")] = (owner, name, rule)
    if shapes:
        raise ArgumentError(f"input_shapes names {sorted(shapes)}, which are no modules of the model")
    if unused:
        raise ArgumentError(f"skip={sorted(unused)} matches nothing; the names are those of model.named_modules()")
    if not found:
        raise ArgumentError(f"this {type(model).__name__} has no linear layer that opnorm knows")
    return found


def current(module: nn.Module, name: str, blocks: int) -> tuple[Tensor, Tensor | None]:
    """Return a weight, detached, and by what it is divided before it is used: one number, or one for each block.

    In training a normalised weight is not computed for it, and the layer's next forward uses the estimate that is
    made here. None stands for a weight that is returned as it is used.
    """
    rule = rule_of(module, name)
    if rule is not None and rule.training and len(chain_of(module, name)) == 1:
        raw = chain_of(module, name).original.detach()
        bound = rule.bound()
        divided = divisor(rule.triple(raw).sigma, rule.lipschitz if bound is None else bound, rule.mode == "clip")
        if len(divided) in {1, blocks}:
            return raw, divided
    value: Tensor = getattr(module, name)
    return (value.clone() if hasattr(module, "parametrizations") else value.detach()), None
