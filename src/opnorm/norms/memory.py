"""What fits into memory, asked before it is taken."""

import os
from pathlib import Path

import torch

from opnorm.errors import TooLargeError

VECTORS = 'guarantee="probable" needs only vectors'
"""The way out for l2 norms."""

_MAPPED = (32 << 20) - 8192
"""The largest block, less its header, whose size glibc takes as the new measure."""


def available_bytes() -> int:
    """Return the memory that the kernel would give this process without swapping, within its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def require_memory(needed: float, what: str, way_out: str = VECTORS) -> None:
    """Refuse what does not fit.

    Raises:
        TooLargeError: naming `what`, and the way out.
    """
    if needed < 2**28:
        return
    free = available_bytes()
    if needed > free:
        raise TooLargeError(
            f"{what} needs about {needed / 2**30:.1f} GiB and {free / 2**30:.1f} GiB are free; {way_out}"
        )


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for the next tensor instead of handing every page back.

    glibc keeps as much as twice the largest block that was mapped and freed, up to 32 MiB. One block of that size,
    never touched, spares a loop over many tensors a page fault for every 4 KiB: a quarter of a small audit.
    """
    torch.empty(_MAPPED, dtype=torch.uint8)
