"""The packaged 8 x 8 digits (UCI, CC BY 4.0; see NOTICE.md)."""

import gzip
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TEST_IMAGES = 360


class Digits(NamedTuple):
    """Images of shape (n, 1, 8, 8), float32 in [0, 1], and labels of shape (n,), int64, for training and testing."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def digits() -> Digits:
    """Read the packaged digits with a fixed split: the first 1,437 images train, the last 360 test.

    The order is the file's own: neighbouring images tend to be by one writer, and shuffling them across the split
    would flatter the accuracy.

    Returns:
        The four tensors, new on every call.

    Source:
        E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning Repository, 1998.

    Example:
        >>> from opnorm.data import digits
        >>> data = digits()
        >>> tuple(data.train_images.shape), tuple(data.test_images.shape), int(data.test_labels[-1])
        ((1437, 1, 8, 8), (360, 1, 8, 8), 8)
    """
    packed = resources.files("opnorm.data").joinpath("digits.csv.gz").read_bytes()
    table = np.array([line.split(b",") for line in gzip.decompress(packed).splitlines()], dtype=np.int64)
    images = torch.from_numpy(table[:, :64]).to(torch.float32).div(16).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, 64].copy())
    cut = len(labels) - TEST_IMAGES
    return Digits(images[:cut].clone(), labels[:cut].clone(), images[cut:].clone(), labels[cut:].clone())
