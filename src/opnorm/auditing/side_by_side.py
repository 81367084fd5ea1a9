"""Small tensors side by side, one thread each; large ones alone, with all threads."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from opnorm.auditing.roles import MATRIX
from opnorm.checkpoint import Entry

R = TypeVar("R")

_SMALL = 512
"""Up to so many columns a proof is too short for its work to be shared among threads, and takes a few megabytes."""


def side_by_side(run: Callable[[Entry], R], entries: Sequence[Entry], begin: Callable[[Entry], None]) -> list[R]:
    """Return what `run` makes of each entry, in their order.

    Matrices with a short side come first, the largest of them first, in as many threads as torch uses in this one.

    Args:
        run: called once for each entry.
        entries: of a checkpoint.
        begin: called in this thread before an entry is run or waited for.
    """
    threads = torch.get_num_threads()
    results: dict[str, R] = {}
    small = [entry for entry in entries if threads > 1 and _is_small(entry)]
    small.sort(key=lambda entry: entry.elements, reverse=True)
    if small:
        pool = ThreadPoolExecutor(min(threads, len(small)), initializer=torch.set_num_threads, initargs=(1,))
        try:
            started = [(entry, pool.submit(run, entry)) for entry in small]
            for entry, future in started:
                begin(entry)
                results[entry.name] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            # What a thread sets is also what later threads begin with.
            torch.set_num_threads(threads)
    for entry in entries:
        if entry.name not in results:
            begin(entry)
            results[entry.name] = run(entry)
    return [results[entry.name] for entry in entries]


def _is_small(entry: Entry) -> bool:
    return len(entry.shape) == MATRIX and min(entry.shape) <= _SMALL and not entry.remark
