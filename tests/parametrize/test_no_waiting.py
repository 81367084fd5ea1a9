"""No step of training makes the host wait for an accelerator: there is none here, so the layers are on `meta`.

A tensor without values refuses to tell one to the host; what an accelerator would refuse to do without waiting, such as
an eigendecomposition, is refused by a mode.
"""

import pytest
import scipy.linalg
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import opnorm
from opnorm.parametrize.blocks import Triple
from opnorm.parametrize.chains import normalised
from opnorm.parametrize.on_device import chosen, leading_rotation

WAIT = {
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2", "bincount",
    "_linalg_check_errors", "_linalg_eigh", "_linalg_svd", "_linalg_eigvals", "linalg_eig", "linalg_cholesky",
}  # fmt: skip
"""Operations of ATen that read a number from the device, torch.linalg's by their documentation."""


class Forbid(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        assert name not in WAIT, f"{name} makes the host wait"
        return func(*args, **(kwargs or {}))


def on_meta(model):
    """The model as it is after its first use on an accelerator: what is found once is there."""
    model.to("meta")
    for _, module, name, rule in normalised(model):
        raw = module.parametrizations[name].original
        triple = Triple(*(part if part is None else part.to("meta") for part in rule._estimate.triple))
        key = rule._sampler.key(raw, rule._epoch)
        rule._estimate = rule._estimate._replace(triple=triple, key=key, last={False: key})
    return model


LAYERS = {
    "linear": (lambda: nn.Linear(24, 16), (24,), {}),
    "conv1d": (lambda: nn.Conv1d(3, 5, 5, padding=2), (3, 14), {}),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7), {}),
    "conv2d stride": (lambda: nn.Conv2d(4, 6, 4, 2, 1), (4, 8, 8), {}),
    "conv2d groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 8, 8), {}),
    "conv2d at a size": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 7, 7), {"input_shape": (4, 7, 7)}),
    "conv2d, large": (lambda: nn.Conv2d(4, 6, 3, padding=1), (4, 64, 64), {"input_shape": (4, 64, 64)}),
    "reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 7, 7), {"input_shape": (4, 7, 7)},
    ),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 4, 4, 4), {}),
    "transposed": (lambda: nn.ConvTranspose2d(4, 3, 3, 2, 1), (4, 4, 4), {}),
    "recurrent": (lambda: nn.LSTM(6, 5), (3, 6), {"name": None}),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True), (3, 8), {}),
}  # fmt: skip
OPTIONS = {
    "default": {},
    "adaptive": {"n_power_iterations": "adaptive"},
    "clip": {"mode": "clip"},
    "learned": {"learn_scale": True},
    "reshaped": {"norm": "reshaped"},
}
CASES = [
    *((layer, "default") for layer in LAYERS),
    *((layer, "adaptive") for layer in ("linear", "conv1d", "reflect")),
    *((layer, option) for layer in ("linear", "conv2d") for option in ("clip", "learned", "reshaped")),
]


def normalised_layer(layer, option):
    make, shape, given = LAYERS[layer]
    torch.manual_seed(0)
    model = make()
    options = {**given, **OPTIONS[option]}
    if options.get("norm") == "reshaped":
        options.pop("input_shape", None)
    wrapped = opnorm.normalize(model, **options) if layer == "attention" else opnorm.spectral_norm(model, **options)
    return wrapped, shape


@pytest.mark.parametrize(("layer", "option"), CASES)
def test_a_training_step_reads_nothing_from_the_device(layer, option):
    model, shape = normalised_layer(layer, option)
    on_meta(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with Forbid():
        for _ in range(2):
            out = model(torch.randn(2, *shape, device="meta"))
            (out[0] if isinstance(out, tuple) else out).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            opnorm.update(model)
    ages = [rule._estimate.age for *_, rule in normalised(model)]
    assert option == "adaptive" or min(ages) > 1  # the estimate did advance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.99, 1.0])
def test_the_leading_rotation_has_the_leading_eigenvector_first(dtype, ratio):
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(3, 8, 8, dtype=dtype))[0]
    values = torch.tensor([1.0, ratio, *(ratio / 2**n for n in range(1, 7))]).to(dtype) * 1e-3
    gram = (basis * values) @ basis.mH
    rotation = leading_rotation(gram)
    eye = torch.eye(8, dtype=dtype).expand(3, 8, 8)
    torch.testing.assert_close(rotation.mH @ rotation, eye, rtol=0, atol=2e-6)
    for matrix, vector in zip(gram.numpy(), rotation[..., 0].numpy(), strict=True):
        gain = (vector.conj() @ matrix @ vector).real
        assert gain == pytest.approx(scipy.linalg.eigvalsh(matrix)[-1], rel=1e-5)
    assert torch.equal(leading_rotation(torch.zeros(1, 4, 4, dtype=dtype)).abs(), torch.eye(4)[None].to(dtype).abs())


def test_what_is_not_finite_is_replaced_by_what_was():
    new, old = (Triple(torch.full((1,), v), torch.full((1, 2, 1), v), None) for v in (float("nan"), 2.0))
    assert chosen(torch.tensor(False), new, old).left.eq(2).all() and chosen(torch.tensor(True), new, old).sigma.isnan()
