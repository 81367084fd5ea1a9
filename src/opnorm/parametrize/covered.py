"""Which parameters of a model are normalised, and why the others are not."""

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.parameter import UninitializedParameter

from opnorm.parametrize.chains import rule_of
from opnorm.parametrize.checks import uses_torch
from opnorm.parametrize.families import weights_of
from opnorm.parametrize.flow import Flow, run_once, sequence
from opnorm.parametrize.spectral import SpectralNormalization

Status = Literal["normalised", "bounded", "inert", "skipped"]

BATCH_NORMS = nn.modules.batchnorm._BatchNorm
INSTANCE_NORMS = nn.modules.instancenorm._InstanceNorm

_UNKNOWN = "no rule for"


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: as in `model.named_parameters()`.
        shape: of the parameter.
        status: "normalised"; "bounded": its effect on distances is bounded without; "inert": normalised, but a
            normalisation layer undoes any scale; "skipped".
        reason: in a sentence.
    """

    name: str
    shape: tuple[int, ...]
    status: Status
    reason: str


@dataclass(frozen=True)
class Coverage:
    """Every parameter of a model, once.

    Attributes:
        rows: in the order of `model.named_parameters()`.
    """

    rows: tuple[Row, ...]

    def where(self, status: Status) -> list[str]:
        """Return the names of the parameters of one status."""
        return [row.name for row in self.rows if row.status == status]

    def __str__(self) -> str:
        """A table, and how many there are of each status."""
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [f"{row.name:{width}}  {row.status:10}  {row.reason}" for row in self.rows]
        counts = Counter(row.status for row in self.rows)
        return "\n".join([*lines, ", ".join(f"{count} {status}" for status, count in counts.items())])


def coverage(model: nn.Module, example_input: Any = None) -> Coverage:
    """Say for every parameter of a model whether it is normalised, and why not.

    Args:
        model: a model, normalised or not; it is not changed.
        example_input: one batch, the tuple of the arguments, or a dict of the named ones; it tells which layer feeds a
            normalisation layer. Without it only `nn.Sequential` tells.

    Raises:
        ArgumentError: if the model does not take `example_input`.

    Example:
        >>> import torch, opnorm
        >>> model = torch.nn.Sequential(opnorm.spectral_norm(torch.nn.Linear(4, 4)), torch.nn.Linear(4, 2))
        >>> print(opnorm.coverage(model))
        0.bias                            bounded     a bias does not change distances
        0.parametrizations.weight.original  normalised  Linear.weight, operator norm 1
        1.weight                          skipped     not normalised
        1.bias                            bounded     a bias does not change distances
        2 bounded, 1 normalised, 1 skipped
    """
    flow = sequence(model) if example_input is None else run_once(model, example_input)
    rules = {
        id(parameter): (rule_of(module, name), module, chain[-1])
        for module in model.modules()
        for name, chain in getattr(module, "parametrizations", {}).items()
        for parameter in chain.parameters()
    }
    known = {id(getattr(o, n)) for m in model.modules() for o, n in weights_of(m) if n in o._parameters}
    rows = []
    for path, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            rows.append(Row(path, (), "skipped", "no shape before the first call"))
            continue
        owner = _owner(model, path)
        status, reason = _judged(owner, path.rpartition(".")[2], parameter, rules=rules, known=known, flow=flow)
        rows.append(Row(path, tuple(parameter.shape), status, reason))
    return Coverage(tuple(rows))


def unknown(model: nn.Module) -> dict[str, str]:
    """Return the parameters that may be a linear map's but that no rule of opnorm reads, each with the reason."""
    return {row.name: row.reason for row in coverage(model).rows if row.reason.startswith(_UNKNOWN) and _is_map(row)}


def _is_map(row: Row) -> bool:
    """Whether a parameter may be a matrix or a kernel, and not a vector or factors for channels."""
    return len(row.shape) == 2 or sum(size > 1 for size in row.shape) > 1


def _owner(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _judged(
    owner: nn.Module, name: str, parameter: nn.Parameter, *, rules: dict[int, Any], known: set[int], flow: Flow
) -> tuple[Status, str]:
    if id(parameter) in rules:
        rule, module, last = rules[id(parameter)]
        if rule is not None and last is not rule:
            return "skipped", f"{type(last).__name__} comes after the division and changes the weight of {rule.label}"
        return _of_rule(rule, module, parameter, flow)
    if uses_torch(owner, name.removesuffix("_orig")):
        return "skipped", "normalised by torch's spectral_norm, an estimate; opnorm.convert(model) proves it"
    if _is_added(owner, name, parameter):
        return "bounded", "a bias does not change distances"
    if isinstance(owner, BATCH_NORMS):
        return "skipped", f"{type(owner).__name__} scales by weight / sqrt(var + eps); fold_batch_norm=True folds it in"
    if isinstance(owner, nn.LayerNorm | nn.GroupNorm | INSTANCE_NORMS):
        return "skipped", f"{type(owner).__name__} has no Lipschitz bound over all inputs"
    if id(parameter) in known:
        return "skipped", "not normalised"
    return "skipped", f"{_UNKNOWN} {type(owner).__name__}.{name}"


def _is_added(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is one of torch's biases, added to the output of a linear map.

    Not those that attention appends to the sequence or adds within the softmax, nor those of unknown layers.
    """
    of_torch = any(
        kind is not nn.Module and kind.__module__.startswith("torch.nn.modules.") for kind in type(owner).__mro__
    )
    return of_torch and parameter.ndim == 1 and "bias" in name


def _of_rule(
    rule: SpectralNormalization | None, module: nn.Module, parameter: nn.Parameter, flow: Flow
) -> tuple[Status, str]:
    if rule is None:
        return "skipped", f"this weight of {type(module).__name__} has another parametrization"
    if parameter is rule.scale:
        return "bounded", f"the learned scale is at most {rule.lipschitz:g}"
    undone = undoing(module, flow)
    if undone is not None:
        return "inert", f"{type(undone).__name__} after it undoes any scale of {rule.label}"
    at_most = "at most " if rule.mode == "clip" or rule.scale is not None else ""
    return "normalised", f"{rule.label}, {rule.norm} norm {at_most}{rule.lipschitz:g}"


def undoing(module: nn.Module, flow: Flow) -> nn.Module | None:
    """Return the normalisation layer without running statistics that alone reads a layer's output, or None."""
    readers = flow.readers.get(module, [])
    if len(readers) != 1:
        return None
    reader = readers[0]
    free = isinstance(reader, nn.LayerNorm | nn.GroupNorm) or (
        isinstance(reader, BATCH_NORMS | INSTANCE_NORMS) and not reader.track_running_stats
    )
    return reader if free else None
