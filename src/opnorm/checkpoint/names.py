"""Canonical names: what a parameter is called in the model, without what wrappers add to it."""

import re
from collections import Counter
from collections.abc import Iterable

# DDP and DataParallel put `module.` in front; torch.compile, FSDP and activation checkpointing anywhere.
_PREFIXES = re.compile(r"^(?:module\.)+")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)\.")


def canonical(name: str) -> str:
    """Return `name` without the parts that wrappers add.

    Example:
        >>> canonical("module._orig_mod.layers.0._checkpoint_wrapped_module.fc.weight")
        'layers.0.fc.weight'
    """
    return _PREFIXES.sub("", _WRAPPERS.sub("", name)) or name


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Map every name to its canonical one; names that would collide stay as they are."""
    short = {name: canonical(name) for name in names}
    seen = Counter(short.values())
    return {name: short[name] if seen[short[name]] == 1 else name for name in short}
