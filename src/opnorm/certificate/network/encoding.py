"""A program as JSON and tensors, and back; what is read is taken apart field by field, and nothing is guessed."""

import dataclasses
import json
from typing import Any, NoReturn

import torch
from torch import Tensor

from opnorm.certificate.network import maps, program
from opnorm.certificate.network.program import Step
from opnorm.errors import CertificateFormatError

MOST_STEPS = 2**16

_KINDS = (
    program.Input, program.Linear, program.Sum, program.Concat, program.Shift, program.Elementwise, program.Opaque
)  # fmt: skip
_STEPS = {c.__name__: c for c in _KINDS}
_MAPS = {c.__name__: c for c in (maps.Matrix, maps.Convolution, maps.TransposedConvolution, maps.Scale, maps.Gather)}
_TEXTS = frozenset({"label", "kind", "weight", "reason", "variance", "index"})
_COUNTS = frozenset({"axis", "before", "after", "rounded", "groups"})
_NUMBERS = frozenset({"constant", "eps", "coefficient"})
_NUMBER_LISTS = frozenset({"coefficients", "parameters"})
_NESTED = frozenset({"shapes", "padding"})
_LARGEST = 2**48


def steps_as_json(steps: tuple[Step, ...]) -> str:
    """The steps, without their tensors."""
    return json.dumps([_plain(step) for step in steps])


def slopes_of(steps: tuple[Step, ...]) -> dict[str, Tensor]:
    """The tensors that the steps hold, by the names that they have in the file."""
    found: dict[str, Tensor] = {}
    for i, step in enumerate(steps):
        if isinstance(step, program.Elementwise):
            found |= {f"low.{i}": step.low.contiguous().clone(), f"high.{i}": step.high.contiguous().clone()}
    return found


def described(step: Step) -> str:
    """One line of what a step computes, by what is proved and not by its label."""
    what = type(step).__name__
    if isinstance(step, program.Linear):
        names = ", ".join(step.map.names)
        what = f"{type(step.map).__name__} {names}"
    elif isinstance(step, program.Elementwise):
        what = f"{step.kind or 'function'} with slopes in [{float(step.low.min()):.6g}, {float(step.high.max()):.6g}]"
    elif isinstance(step, program.Opaque):
        what = f"{step.constant:.6g}-Lipschitz function"
    elif isinstance(step, program.Shift):
        factor = "" if step.coefficient == 1 else f"{step.coefficient:g} times "
        what = f"shift by {factor}{step.weight or 'an unknown constant'}"
    elif isinstance(step, program.Sum):
        what = "sum with coefficients " + ", ".join(f"{c:g}" for c in step.coefficients)
    reads = " of " + ", ".join(map(str, step.sources)) if step.sources else ""
    return f"{what}{reads} -> {'x'.join(map(str, step.shape))}  ({step.label})"


def steps_from(text: str, tensors: dict[str, Tensor]) -> tuple[Step, ...]:
    """The steps that a text states.

    Raises:
        CertificateFormatError: if it states none.
    """
    entries = parsed(text)
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_STEPS:
        refuse("it has no list of steps")
    return tuple(_step(entry, i, tensors) for i, entry in enumerate(entries))


def first_difference(stated: program.Program, other: program.Program) -> str:
    """Where two programs differ, in words; empty where they state the same."""
    if len(stated.steps) != len(other.steps) or stated.outputs != other.outputs:
        return f"{len(stated.steps)} steps are stated, {len(other.steps)} are read from the model"
    for position, (left, right) in enumerate(zip(stated.steps, other.steps, strict=True)):
        if json.dumps(_plain(left)) != json.dumps(_plain(right)) or _differ(slopes_of((left,)), slopes_of((right,))):
            return f"step {position} is stated as {left.label!r}, and the model's {right.label!r} is another one"
    if _differ(stated.constants, other.constants):
        return "it states other tensors of its own"
    return ""


def _differ(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() != right.keys() or any(not torch.equal(left[k].double(), right[k].double()) for k in left)


def parsed(text: Any) -> Any:
    """JSON without duplicate keys, NaN or infinity.

    Raises:
        CertificateFormatError: if it is none.
    """
    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=_no_duplicates)
    except (ValueError, TypeError, RecursionError) as problem:
        raise CertificateFormatError(f"not a valid certificate: {problem}") from problem


def number(value: Any, where: str) -> float:
    """A float that was written as hexadecimal text."""
    if not isinstance(value, str):
        refuse(f"{where} holds {value!r}")
    try:
        return float.fromhex(value)
    except (ValueError, OverflowError):
        refuse(f"{where} holds {value!r}")


def counts(value: Any, where: str) -> tuple[int, ...]:
    """A list of non-negative integers."""
    if not isinstance(value, list):
        refuse(f"{where} is not a list")
    return tuple(_count(v, where) for v in value)


def refuse(reason: str) -> NoReturn:
    """Say that a file is no certificate."""
    raise CertificateFormatError(f"not a valid certificate: {reason}")


def _plain(item: Step | maps.LinearMap) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": type(item).__name__}
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if isinstance(value, maps.LinearMap):
            entry[field.name] = _plain(value)
        elif field.name in _NUMBERS:
            entry[field.name] = float(value).hex()
        elif field.name in _NUMBER_LISTS:
            entry[field.name] = [float(v).hex() for v in value]
        elif not isinstance(value, Tensor):
            entry[field.name] = value
    return entry


def _step(entry: Any, position: int, tensors: dict[str, Tensor]) -> Step:
    kind = _class(entry, _STEPS, f"step {position}")
    values: dict[str, Any] = {}
    if kind is program.Elementwise:
        for end in ("low", "high"):
            if f"{end}.{position}" not in tensors:
                refuse(f"step {position} has no slopes")
            values[end] = tensors[f"{end}.{position}"]
    for name in _names(entry, kind, f"step {position}", values.keys()):
        where = f"{name} of step {position}"
        if name == "map":
            linear = _class(entry[name], _MAPS, where)
            parts = _names(entry[name], linear, where)
            values[name] = linear(**{n: _value(n, entry[name][n], f"{n} of the {where}") for n in parts})
        else:
            values[name] = _value(name, entry[name], where)
    step: Step = kind(**values)
    return step


def _class(entry: Any, table: dict[str, Any], where: str) -> Any:
    name = entry.get("type") if isinstance(entry, dict) else None
    if not isinstance(name, str) or name not in table:
        refuse(f"{where} is of the type {name!r}, not one of {', '.join(table)}")
    return table[name]


def _names(entry: dict[str, Any], kind: Any, where: str, known: Any = ()) -> list[str]:
    wanted = {field.name for field in dataclasses.fields(kind)} - set(known)
    if entry.keys() - {"type"} != wanted:
        refuse(f"{where} must have exactly the keys {', '.join(sorted(wanted))}")
    return sorted(wanted)


def _value(name: str, value: Any, where: str) -> Any:
    if name in _TEXTS:
        return value if isinstance(value, str) else refuse(f"{where} is not a text")
    if name == "circular":
        return value if isinstance(value, bool) else refuse(f"{where} is {value!r}")
    if name in _COUNTS:
        return _count(value, where)
    if name in _NUMBERS:
        return number(value, where)
    if name in _NUMBER_LISTS:
        return tuple(number(v, where) for v in _list(value, where))
    if name in _NESTED and all(isinstance(v, list) for v in _list(value, where)):
        return tuple(counts(v, where) for v in value)
    return counts(value, where)


def _list(value: Any, where: str) -> list[Any]:
    return value if isinstance(value, list) else refuse(f"{where} is not a list")


def _count(value: Any, where: str) -> int:
    return value if type(value) is int and 0 <= value <= _LARGEST else refuse(f"{where} holds {value!r}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        refuse("a key stands twice in one object")
    return dict(pairs)
