"""Tables of layers and of adversarial weights, and the oracle that all tests of layers share.

The oracle is the module itself: in evaluation mode and float64 it is applied to unit vectors, its bias removed as
f(x) - f(0). Norms of the matrix are SciPy's dense singular values. LAPACK's largest singular value is off by a modest
multiple of u |A| (LAPACK Users' Guide, 4.9); `ORACLE` is far above that for matrices as small as these, and it is all
the slack that there is: what is enclosed is the exact norm, which lies within `ORACLE` of the oracle's value.
"""

import copy
import itertools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import scipy.linalg
import torch
from torch import Tensor, nn

ORACLE = 1e-12
Fill = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """A layer and the shape of one sample."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def build(self, fill: Fill | None = None) -> nn.Module:
        """The layer in evaluation mode, with random weights or with its weight filled."""
        torch.manual_seed(sum(map(ord, self.name)))
        module = self.make().eval()
        if fill is not None:
            with torch.no_grad():
                for name, weight in module.named_parameters():
                    if name.endswith("weight"):
                        weight.copy_(fill(weight))
        return module


def _case(module: Callable[..., nn.Module], shape: tuple[int, ...], *args: object, **options: object) -> Case:
    given = ",".join([*map(str, args), *(f"{key}={value}" for key, value in options.items())]).replace(" ", "")
    return Case(f"{module.__name__}({given})-{'x'.join(map(str, shape))}", lambda: module(*args, **options), shape)


def _with_statistics(module: Callable[..., nn.Module], channels: int, **options: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = module(channels, **options)
        with torch.no_grad():
            layer.running_var.uniform_(0.01, 3.0)
            layer.running_mean.normal_()
            if layer.weight is not None:
                layer.weight.normal_()
        return layer

    return make


DENSE = [
    _case(nn.Linear, (5,), 5, 3),
    _case(nn.Linear, (4,), 4, 6, bias=False),
    _case(nn.Linear, (1,), 1, 4),
    _case(nn.Linear, (4,), 4, 1),
    _case(nn.Identity, (2, 3)),
    _case(nn.Dropout, (2, 3), 0.3),
    _case(nn.Dropout2d, (2, 3, 2), 0.3),
]

CONV = [
    _case(nn.Conv1d, (2, 6), 2, 3, 3),
    _case(nn.Conv1d, (2, 7), 2, 3, 4, padding="same"),
    _case(nn.Conv1d, (2, 7), 2, 3, 4, padding="same", padding_mode="reflect"),
    _case(nn.Conv1d, (2, 7), 2, 3, 4, padding="same", padding_mode="circular", dilation=2),
    _case(nn.Conv1d, (1, 2), 1, 1, 3, padding=1),
    _case(nn.Conv1d, (1, 2), 1, 1, 1, padding=1, padding_mode="circular"),
    _case(nn.Conv1d, (1, 3), 1, 2, 9, padding=6),
    _case(nn.Conv1d, (1, 9), 1, 2, 3, stride=2, padding=1, padding_mode="circular"),
    _case(nn.Conv1d, (2, 8), 2, 2, 3, stride=3, dilation=2, padding=5),
    _case(nn.Conv2d, (2, 4, 5), 2, 3, 3, padding="valid"),
    _case(nn.Conv2d, (2, 4, 5), 2, 3, 3, padding=1),
    _case(nn.Conv2d, (2, 5, 4), 2, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    _case(nn.Conv2d, (2, 4, 5), 2, 2, 3, padding="same", dilation=(2, 1)),
    _case(nn.Conv2d, (4, 4, 3), 4, 6, 3, groups=2, padding=1),
    _case(nn.Conv2d, (3, 4, 4), 3, 3, 3, groups=3, padding=1, stride=2),
    _case(nn.Conv2d, (2, 4, 5), 2, 2, 3, padding=1, padding_mode="circular"),
    _case(nn.Conv2d, (2, 4, 6), 2, 2, 3, padding=1, padding_mode="circular", stride=2),
    _case(nn.Conv2d, (2, 3, 4), 2, 2, 3, padding=(2, 1), padding_mode="circular"),
    _case(nn.Conv2d, (2, 4, 5), 2, 2, 3, padding=1, padding_mode="reflect"),
    _case(nn.Conv2d, (2, 4, 3), 2, 2, 3, padding=2, padding_mode="replicate", stride=2),
    _case(nn.Conv2d, (2, 1, 2), 2, 3, 5, padding=2),
    _case(nn.Conv2d, (2, 3, 3), 2, 3, 1),
    _case(nn.Conv2d, (2, 3, 3), 2, 3, 1, padding_mode="reflect"),
    _case(nn.Conv2d, (1, 3, 4), 1, 3, (1, 4), padding=(0, 3), stride=(1, 5)),
    _case(nn.Conv3d, (2, 3, 2, 4), 2, 2, 2),
    _case(nn.Conv3d, (1, 3, 3, 2), 1, 2, 3, padding=1, stride=(1, 2, 1)),
    _case(nn.Conv3d, (1, 2, 3, 2), 1, 2, 3, padding=1, padding_mode="replicate"),
    _case(nn.Conv3d, (1, 2, 3, 3), 1, 2, 3, padding=1, padding_mode="circular"),
]

CONV_TRANSPOSE = [
    _case(nn.ConvTranspose1d, (2, 4), 2, 3, 3),
    _case(nn.ConvTranspose1d, (2, 4), 2, 3, 3, stride=2, padding=1, output_padding=1),
    _case(nn.ConvTranspose1d, (1, 1), 1, 2, 2, stride=3, output_padding=2),
    _case(nn.ConvTranspose2d, (2, 3, 2), 2, 3, 3, stride=2, padding=1),
    _case(nn.ConvTranspose2d, (2, 3, 2), 2, 3, 4, stride=2, padding=1, groups=1),
    _case(nn.ConvTranspose2d, (4, 2, 3), 4, 6, (3, 2), stride=(2, 1), groups=2, dilation=(1, 2)),
    _case(nn.ConvTranspose2d, (2, 2, 3), 2, 2, 3, stride=2, dilation=4, padding=1, output_padding=3),
    _case(nn.ConvTranspose2d, (2, 5, 5), 2, 2, 3, padding=3),
    _case(nn.ConvTranspose3d, (2, 2, 2, 1), 2, 1, 2, stride=2),
    _case(nn.ConvTranspose3d, (1, 2, 2, 2), 1, 2, 3, stride=2, padding=1, output_padding=1),
]

POOL = [
    _case(nn.AvgPool1d, (2, 6), 2),
    _case(nn.AvgPool1d, (1, 3), 2, stride=2, ceil_mode=True),
    _case(nn.AvgPool1d, (1, 7), 3, stride=2, padding=1, count_include_pad=False),
    _case(nn.AvgPool1d, (1, 7), 3, stride=2, padding=1),
    _case(nn.AvgPool1d, (1, 5), 2, stride=3, padding=1, ceil_mode=True),
    _case(nn.AvgPool1d, (1, 4), 3, stride=2, padding=1, ceil_mode=True),
    _case(nn.AvgPool2d, (2, 5, 4), 3, stride=1),
    _case(nn.AvgPool2d, (2, 5, 4), (3, 2), stride=(2, 1), padding=1, ceil_mode=True),
    _case(nn.AvgPool2d, (1, 5, 6), 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    _case(nn.AvgPool2d, (2, 5, 4), 3, stride=2, padding=1, divisor_override=5),
    _case(nn.AvgPool2d, (2, 5, 4), 3, stride=2, ceil_mode=True, divisor_override=2),
    _case(nn.AvgPool3d, (1, 3, 4, 3), 2, stride=1),
    _case(nn.AvgPool3d, (1, 3, 4, 5), (2, 3, 2), stride=2, padding=1, ceil_mode=True, count_include_pad=False),
    _case(nn.AdaptiveAvgPool1d, (2, 7), 3),
    _case(nn.AdaptiveAvgPool1d, (2, 3), 5),
    _case(nn.AdaptiveAvgPool2d, (2, 5, 7), (3, None)),
    _case(nn.AdaptiveAvgPool2d, (3, 4, 5), 1),
    _case(nn.AdaptiveAvgPool3d, (1, 5, 3, 4), (2, 2, 3)),
]

PAD = [
    _case(nn.ZeroPad1d, (2, 3), (1, 2)),
    _case(nn.ZeroPad2d, (2, 4, 3), (1, 0, -1, 2)),
    _case(nn.ZeroPad3d, (1, 2, 2, 3), 1),
    _case(nn.ConstantPad1d, (2, 3), 2, 1.5),
    _case(nn.ConstantPad2d, (1, 3, 2), (0, 2, 1, 0), -3.0),
    _case(nn.ReflectionPad1d, (2, 4), (3, 1)),
    _case(nn.ReflectionPad2d, (1, 4, 3), (2, 1, 0, 3)),
    _case(nn.ReflectionPad3d, (1, 2, 3, 4), (3, 0, 2, 1, 1, 1)),
    _case(nn.ReplicationPad1d, (2, 3), (5, 1)),
    _case(nn.ReplicationPad2d, (1, 2, 3), (2, 1, 0, 3)),
    _case(nn.ReplicationPad3d, (1, 2, 1, 3), 1),
    _case(nn.CircularPad1d, (2, 3), (3, 1)),
    _case(nn.CircularPad2d, (1, 4, 3), (2, 1, 0, 4)),
    _case(nn.CircularPad3d, (1, 2, 3, 2), (1, 0, 2, 1, 1, 2)),
]

SHAPE = [
    _case(nn.Flatten, (2, 3, 2)),
    _case(nn.Flatten, (2, 3, 2), 2, 3),
    _case(nn.Flatten, (2, 3, 2), 1, -2),
    _case(nn.Unflatten, (6, 2), 1, (2, -1)),
    _case(nn.Unflatten, (2, 6), -1, (3, 2)),
    _case(nn.PixelShuffle, (8, 2, 3), 2),
    _case(nn.PixelShuffle, (9, 1, 2), 3),
    _case(nn.PixelUnshuffle, (2, 4, 6), 2),
    _case(nn.PixelUnshuffle, (1, 3, 6), 3),
    _case(nn.ChannelShuffle, (6, 2, 2), 2),
    _case(nn.ChannelShuffle, (6, 1, 2), 3),
]

UPSAMPLE = [
    _case(nn.Upsample, (2, 3), scale_factor=2),
    _case(nn.Upsample, (1, 7), scale_factor=1.7),
    _case(nn.Upsample, (1, 5), size=13),
    _case(nn.Upsample, (1, 9), size=4, mode="nearest-exact"),
    _case(nn.Upsample, (1, 3, 4), scale_factor=(1.5, 3), mode="nearest"),
    _case(nn.Upsample, (1, 3, 4), scale_factor=2.3, mode="nearest-exact"),
    _case(nn.Upsample, (1, 2, 3, 2), scale_factor=2, mode="nearest"),
    _case(nn.Upsample, (2, 4), scale_factor=2, mode="linear"),
    _case(nn.Upsample, (1, 7), scale_factor=1.7, mode="linear"),
    _case(nn.Upsample, (1, 7), scale_factor=1.7, mode="linear", recompute_scale_factor=True),
    _case(nn.Upsample, (1, 10), scale_factor=1.05, mode="linear"),
    _case(nn.Upsample, (1, 7), scale_factor=0.4, mode="linear"),
    _case(nn.Upsample, (1, 5), size=9, mode="linear", align_corners=True),
    _case(nn.Upsample, (1, 5), size=1, mode="linear", align_corners=True),
    _case(nn.Upsample, (1, 1), size=4, mode="linear"),
    _case(nn.Upsample, (2, 3, 4), scale_factor=2, mode="bilinear"),
    _case(nn.Upsample, (1, 3, 4), scale_factor=(2.5, 1.3), mode="bilinear", align_corners=True),
    _case(nn.Upsample, (1, 4, 3), size=(6, 3), mode="bilinear"),
    _case(nn.Upsample, (1, 3, 2, 2), scale_factor=2, mode="trilinear"),
    _case(nn.Upsample, (1, 3, 4), scale_factor=2, mode="bicubic"),
    _case(nn.Upsample, (1, 5, 4), size=(3, 7), mode="bicubic", align_corners=True),
    _case(nn.Upsample, (1, 10, 3), scale_factor=1.05, mode="bicubic"),
    _case(nn.UpsamplingNearest2d, (1, 3, 2), scale_factor=2),
    _case(nn.UpsamplingBilinear2d, (1, 3, 2), size=(5, 4)),
]

NORM = [
    Case("BatchNorm1d", _with_statistics(nn.BatchNorm1d, 5), (5,)),
    Case("BatchNorm1d-long", _with_statistics(nn.BatchNorm1d, 3), (3, 4)),
    Case("BatchNorm2d", _with_statistics(nn.BatchNorm2d, 3, eps=0.5), (3, 2, 2)),
    Case("BatchNorm2d-plain", _with_statistics(nn.BatchNorm2d, 3, affine=False), (3, 2, 2)),
    Case("BatchNorm3d", _with_statistics(nn.BatchNorm3d, 2), (2, 2, 1, 2)),
    Case("SyncBatchNorm", _with_statistics(nn.SyncBatchNorm, 2), (2, 2, 2)),
    Case("InstanceNorm2d", _with_statistics(nn.InstanceNorm2d, 3, affine=True, track_running_stats=True), (3, 2, 2)),
]

COMPOSED = [
    Case("Sequential", nn.Sequential, (2, 3)),
    Case(
        "Sequential-conv-bn-pool-linear",
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            _with_statistics(nn.BatchNorm2d, 3)(),
            nn.AvgPool2d(3, stride=1, padding=1),
            nn.Flatten(),
            nn.Linear(36, 4),
        ),
        (2, 4, 3),
    ),
]

WEIGHTED = DENSE[:4] + CONV + CONV_TRANSPOSE
LAYERS = DENSE + CONV + CONV_TRANSPOSE + POOL + PAD + SHAPE + UPSAMPLE + NORM + COMPOSED


def _orthogonal(weight: Tensor) -> Tensor:
    return nn.init.orthogonal_(torch.empty(weight.shape[0], prod(weight.shape[1:]))).reshape(weight.shape)


def _hilbert(weight: Tensor) -> Tensor:
    rows, columns = weight.shape[0], prod(weight.shape[1:])
    return 1 / (1.0 + torch.arange(rows)[:, None] + torch.arange(columns)[None, :]).reshape(weight.shape)


def _rank_one(weight: Tensor) -> Tensor:
    return (torch.randn(weight.shape[0], 1) @ torch.randn(1, prod(weight.shape[1:]))).reshape(weight.shape)


def _delta(weight: Tensor) -> Tensor:
    filled = torch.zeros(weight.shape)
    filled.flatten(1)[:, 0] = 1.0
    return filled


def _sparse(weight: Tensor) -> Tensor:
    return torch.randn(weight.shape) * (torch.rand(weight.shape) < 0.2)


def _tie(weight: Tensor) -> Tensor:
    return _orthogonal(weight) * (1 + 1e-7 * torch.rand(weight.shape))


WEIGHTS: dict[str, Fill] = {
    "gaussian": lambda w: torch.randn(w.shape),
    "orthogonal": _orthogonal,
    "rank-one": _rank_one,
    "near-tie": _tie,
    "hilbert": _hilbert,
    "constant": torch.ones_like,
    "alternating": lambda w: torch.ones(w.numel()).index_fill(0, torch.arange(0, w.numel(), 2), -1.0).reshape(w.shape),
    "delta": _delta,
    "sparse": _sparse,
    "zero": torch.zeros_like,
    "tiny": lambda w: torch.randn(w.shape) * 1e-40,  # subnormal in float32
    "huge": lambda w: torch.randn(w.shape).clamp(-3, 3) * 1e38,
}


def matrix_of(function: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The matrix of a linear (or affine) function of batches, column by column; shape: (outputs, inputs)."""
    units = torch.eye(prod(shape), dtype=dtype).reshape(-1, *shape)
    with torch.no_grad():
        return (function(units) - function(torch.zeros_like(units))).flatten(1).mT.contiguous()


def module_matrix(module: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """The matrix that the module itself applies, in float64 (complex128 for complex weights)."""
    is_complex = any(w.is_complex() for w in module.parameters())
    dtype = torch.complex128 if is_complex else torch.float64
    twin = converted(copy.deepcopy(module), dtype)
    with torch.no_grad(), warnings.catch_warnings():
        for name, parameter in twin.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()  # f(x) - f(0) alone would lose small weights beside a bias
        warnings.simplefilter("ignore", UserWarning)  # torch warns of a copy that padding="same" makes
        return matrix_of(twin, shape, dtype)


def converted(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in another dtype, and without torch's warning that complex modules are new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return module.to(dtype)


def largest_singular_value(matrix: Tensor) -> float:
    """The oracle's norm; scaled first, so that no scale of the weights spoils it."""
    largest = matrix.abs().max().item() if matrix.numel() else 0.0
    if largest == 0.0:
        return 0.0
    return float(scipy.linalg.svdvals((matrix / largest).numpy(), check_finite=False)[0]) * largest


def assert_encloses(lower: float, upper: float, matrix: Tensor) -> None:
    """Fail unless the enclosure may hold the exact norm, which lies within `ORACLE` of the oracle's value."""
    truth = largest_singular_value(matrix)
    assert lower <= truth * (1 + ORACLE), f"the lower end {lower!r} is above the norm {truth!r}"
    assert upper >= truth * (1 - ORACLE), f"the upper end {upper!r} is below the norm {truth!r}"


def assert_same_map(found: Tensor, wanted: Tensor, majorant: Tensor) -> None:
    """Fail unless two matrices agree up to what float64 rounds, relative to the largest majorant of each row."""
    assert found.shape == wanted.shape
    slack = 1e-12 * majorant.amax(1, keepdim=True)
    worst = ((found - wanted).abs() - slack).max().item() if found.numel() else 0.0
    assert worst <= 0, f"entries differ by {worst:.3e} more than rounding explains"


def by_name(cases: list[Case]) -> dict[str, list[object]]:
    """Arguments for `pytest.mark.parametrize`."""
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), [n for n, group in itertools.groupby(sorted(names)) if len(list(group)) > 1]
    return {"argvalues": cases, "ids": names}
