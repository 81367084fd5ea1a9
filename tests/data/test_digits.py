import hashlib

import torch

from opnorm.data import digits


def test_the_split_is_fixed_and_complete():
    data = digits()
    assert data.train_images.shape == (1437, 1, 8, 8)
    assert data.test_images.shape == (360, 1, 8, 8)
    assert data.train_images.dtype == torch.float32 and data.train_labels.dtype == torch.int64
    labels = torch.cat([data.train_labels, data.test_labels])
    # The counts that the data set's own documentation gives.
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    pixels = torch.cat([data.train_images, data.test_images])
    assert pixels.min() == 0.0 and pixels.max() == 1.0
    packed = (pixels * 16).to(torch.uint8).numpy().tobytes() + labels.to(torch.uint8).numpy().tobytes()
    assert hashlib.sha256(packed).hexdigest() == "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


def test_every_call_gives_tensors_of_its_own():
    digits().train_images.zero_()
    assert digits().train_images.any()
