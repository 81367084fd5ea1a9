"""Dividing every weight of a checkpoint by its norm."""

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opnorm._version import __version__
from opnorm.auditing.roles import Reading as Read
from opnorm.auditing.roles import Unread, parse_roles, read
from opnorm.auditing.run import Progress
from opnorm.certificate.format import Bounded, Certificate, Identity, Mode, Reading, Untouched, identify
from opnorm.checkpoint import Checkpoint, Entry, open_checkpoint, replacing, rewrite
from opnorm.checkpoint.names import canonical
from opnorm.checkpoint.reading import locate, open_stored
from opnorm.errors import ArgumentError, CheckpointError, OpnormError
from opnorm.rewrite.outcome import Changed, Kept, Outcome
from opnorm.rewrite.scaling import reading_of, scale

SUFFIX = ".certificate.json"


class _Claim(NamedTuple):
    """What will be claimed of a stored tensor: its identity when its bound was proved, and the reading."""

    proved: Identity
    reading: Reading


def normalize_checkpoint(
    source: str | PathLike[str],
    target: str | PathLike[str],
    *,
    lipschitz: float = 1.0,
    mode: Mode = "divide",
    certificate: str | PathLike[str] | None = None,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    roles: Iterable[str] = (),
    part: str = "",
    progress: Progress | None = None,
) -> Outcome:
    """Write a checkpoint whose every matrix and convolution kernel has norm at most K, with a certificate of that.

    What the audit measures is divided: matrices (embeddings among them), convolution kernels by the size-free norm,
    stacked projections and experts one by one. Biases, scales, running statistics, integers, quantised and ambiguous
    tensors are copied. A weight that is stored in parts (weight norm, spectral norm, pruning) is refused, because
    dividing what is stored does not divide what is used.

    Args:
        source: a path that `opnorm.checkpoint.open_checkpoint` reads.
        target: the file to write, in the same format; a folder where `source` is one.
        lipschitz: K > 0.
        mode: `divide` scales every weight to norm K, `clip` only those above it.
        certificate: where to write it; by default beside the target, with `.certificate.json` appended.
        only: patterns of names; what matches none is copied.
        skip: patterns of names that are copied.
        roles: how tensors are to be read, as "PATTERN=ROLE", where their names and shapes do not tell.
        part: of a nested torch file, such as "ema".
        progress: called before each tensor.

    Returns:
        What was divided, what was copied and why. The bounds hold for the bytes in the target, in exact arithmetic.

    Raises:
        CheckpointError: if a file cannot be read or written, a weight is stored in parts, or a pattern matches nothing.
        ArgumentError: if K, a mode or a role cannot be used, or a dtype cannot hold a weight of norm K.
        WeightError: if a weight is not finite.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file({"fc.weight": 3 * torch.eye(2)}, f"{folder}/in.safetensors")
        ...     outcome = normalize_checkpoint(f"{folder}/in.safetensors", f"{folder}/out.safetensors")
        ...     print(outcome.changed[0].before.upper, load_file(f"{folder}/out.safetensors")["fc.weight"])
        3... tensor([[1.0000, 0.0000],
                [0.0000, 1.0000]])
    """
    if mode not in ("divide", "clip"):
        raise ArgumentError(f"mode is 'divide' or 'clip', got {mode!r}")
    lipschitz = float(lipschitz)  # the certificate's hash tells 2 from 2.0
    if not 0.0 < lipschitz < math.inf:
        raise ArgumentError(f"lipschitz must be a positive finite number, got {lipschitz!r}")
    given = parse_roles(roles)
    checkpoint, stored = open_checkpoint(source, part), open_stored(locate(source), part)
    _check_patterns(checkpoint, (*only, *skip))
    shapes = {entry.name: entry.shape for entry in checkpoint.entries}
    plan = {entry.name: _reading(entry, shapes, given, only, skip) for entry in checkpoint.entries}
    _refuse_parts(checkpoint, plan)
    names = {entry.keys[0]: (entry.name, *entry.aliases) for entry in stored.entries}
    changed: list[Changed] = []
    claims: dict[str, _Claim] = {}
    done = 0

    @torch.no_grad()
    def transform(entry: Entry) -> Tensor | None:
        nonlocal done
        if progress is not None:
            progress(done, checkpoint.elements, entry.name)
        done += entry.elements
        read = plan[entry.name]
        if isinstance(read, str):
            return None
        row, new, reading = _divided(entry, read, lipschitz, mode)
        changed.append(row)
        claims.update((name, _Claim(identify(name, new), reading)) for name in names[entry.keys[0]])
        return new if row.action == "divided" else None

    rewrite(source, target, transform, part)
    goal = Path(target) / locate(source).name if Path(target).is_dir() else Path(target)
    kept = tuple(
        Kept(entry.name, entry.shape, entry.dtype, entry.elements, reason)
        for entry in checkpoint.entries
        if isinstance(reason := plan[entry.name], str)
    )
    claimed = _certificate(open_stored(goal, part), claims, kept, lipschitz, mode)
    beside = Path(certificate) if certificate is not None else Path(target).with_name(Path(target).name + SUFFIX)
    with replacing(beside) as file:
        file.write_text(claimed.to_json(), encoding="utf-8")
    return Outcome(Path(source), Path(target), beside, claimed, tuple(changed), kept, checkpoint.left)


def _check_patterns(checkpoint: Checkpoint, patterns: Iterable[str]) -> None:
    names = [name for entry in checkpoint.entries for name in (entry.name, *entry.aliases)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(f"{checkpoint.path}: no tensor is called {pattern!r}; `opnorm audit` lists the names")


def _refuse_parts(checkpoint: Checkpoint, plan: Mapping[str, Read | str]) -> None:
    for entry in checkpoint.entries:
        if entry.derived and not isinstance(plan[entry.name], str):
            raise CheckpointError(
                f"{checkpoint.path}: {entry.name} is stored in parts ({entry.derived}), and dividing what is stored "
                "does not divide what is used; remove the parametrization in torch (remove_parametrizations, "
                "remove_spectral_norm, remove_weight_norm, prune.remove) and save again, or leave it out with "
                f"--skip '{entry.name}'"
            )


def _reading(
    entry: Entry,
    shapes: Mapping[str, tuple[int, ...]],
    given: Iterable[tuple[str, str]],
    only: Sequence[str],
    skip: Sequence[str],
) -> Read | str:
    """How an entry is read, or why it is copied."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatchcase(name, pattern) for name in (entry.name, *entry.aliases) for pattern in patterns)

    if entry.unusable or entry.remark:
        return entry.unusable or entry.remark
    found = read(entry.name, entry.shape, shapes, given)
    if isinstance(found, Unread):
        return found.reason
    if only and not matches(only):
        return "not among those asked for (--only)"
    return "left on request (--skip)" if matches(skip) else found


def _divided(entry: Entry, how: Read, lipschitz: float, mode: Mode) -> tuple[Changed, Tensor, Reading]:
    weight = entry.load()
    reading = reading_of(entry.shape, how)
    try:
        new, before = scale(weight, reading, lipschitz, mode)
    except OpnormError as error:
        raise type(error)(f"{entry.name}: {error}") from error
    return (
        Changed(
            name=entry.name,
            aliases=entry.aliases,
            shape=entry.shape,
            dtype=entry.dtype,
            role=how.role,
            before=before,
            bound=lipschitz,
            action="unchanged" if new is weight else "divided",
        ),
        new,
        reading,
    )


def _certificate(
    written: Checkpoint, claims: Mapping[str, _Claim], kept: Iterable[Kept], lipschitz: float, mode: Mode
) -> Certificate:
    """Certify what lies on disk: the bounds of tensors whose bytes are those that were proved, and all other bytes."""
    reasons = {item.name: item.reason for item in kept}
    tensors, untouched = [], []
    for entry in written.entries:
        for name in (entry.name, *entry.aliases):
            found = identify(name, entry.load())
            claim = claims.get(name)
            if claim is None:
                untouched.append(Untouched(**vars(found), reason=reasons.get(canonical(name), "copied")))
            elif found != claim.proved:
                raise CheckpointError(f"{written.path}: {name!r} was not written as it was proved; do not use the file")
            else:
                tensors.append(Bounded(**vars(found), reading=claim.reading, bound=lipschitz))
    return Certificate(lipschitz, mode, tuple(tensors), tuple(untouched), __version__)
