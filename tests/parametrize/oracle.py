"""True norms from elsewhere: the layer applied to every unit vector in float64, and SciPy's singular values."""

import copy

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn


def matrix_norm(weight: Tensor) -> float:
    """The spectral norm of a matrix."""
    dense = weight.detach().cpu()
    dense = dense.to(torch.complex128) if dense.is_complex() else dense.double()
    return float(scipy.linalg.svdvals(dense.numpy())[0])


def symbol_norm(weight: Tensor, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int, count: int) -> float:
    """The largest singular value over a grid of frequencies: stride-many aliases side by side, by NumPy and SciPy."""
    kernel = weight.detach().double().numpy()
    dims = kernel.ndim - 2
    best = 0.0
    for block in np.split(kernel, groups):
        for index in np.ndindex(*[count] * dims):
            omega = [2 * np.pi * i / count for i in index]
            aliases = []
            for shift in np.ndindex(*stride):
                phase = np.ones(kernel.shape[2:], complex)
                for axis in range(dims):
                    w = omega[axis] + 2 * np.pi * shift[axis] / stride[axis]
                    steps = np.exp(1j * w * dilation[axis] * np.arange(kernel.shape[2 + axis]))
                    phase = phase * steps.reshape([-1 if a == axis else 1 for a in range(dims)])
                aliases.append((block * phase).reshape(*block.shape[:2], -1).sum(-1))
            stacked = np.concatenate(aliases, 1) / np.sqrt(len(aliases))
            best = max(best, scipy.linalg.svdvals(stacked)[0])
    return best


def layer_norm(layer: nn.Module, weight: Tensor, in_shape: tuple[int, ...]) -> float:
    """The norm of a plain layer with another weight, as the map from one sample of a shape to its output."""
    twin = copy.deepcopy(layer).double()
    with torch.no_grad():
        twin.weight.copy_(weight.detach().double())
        twin.bias = None
        size = int(np.prod(in_shape))
        columns = twin(torch.eye(size, dtype=torch.float64).reshape(size, *in_shape)).flatten(1)
    return float(scipy.linalg.svdvals(columns.numpy())[0])


def gain(function: nn.Module, x: Tensor) -> float:
    """The largest gain of a linear map without bias over a few inputs: a witness from below."""
    with torch.no_grad():
        return float((function(x).flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).max())
