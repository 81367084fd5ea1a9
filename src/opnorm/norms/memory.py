"""What fits into memory, asked before it is taken."""

import os
from pathlib import Path

from opnorm.errors import TooLargeError


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


def require_memory(needed: float, what: str, way_out: str = 'guarantee="probable" needs only vectors') -> None:
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
