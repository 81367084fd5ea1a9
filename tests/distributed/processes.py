"""Run scenarios in several processes on this machine, and look at what they hold together."""

import os
import socket
import warnings

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def run(rank, world, port, scenarios):
    warnings.filterwarnings("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    for scenario, arguments in scenarios:
        try:
            scenario(*arguments)
        except Exception as error:
            error.add_note(f"in {scenario.__name__}{arguments}")
            raise
        dist.barrier()
    dist.destroy_process_group()


def spawn(world, scenarios):
    """Run each (function, arguments) in `world` processes; the first failure of one is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run, (world, port, scenarios), world)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def bit_identical(tensor):
    """Whether all processes hold the same bits."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return all(torch.equal(other, tensor) for other in found)


class Collectives(TorchDispatchMode):
    """The name of each collective, and the largest number of entries that it got."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "full_tensor") for kind in types):
            return NotImplemented
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if "c10d" in str(func):
            self.found.append((str(func), max(tensor.numel() for tensor in tensors)))
        return func(*args, **(kwargs or {}))
