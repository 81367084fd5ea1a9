"""Single operations as models write them: exact or close above measured Jacobians, or refused with a reason."""

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opnorm
from opnorm.errors import ArgumentError, UnsupportedLayerError


class Weighted(nn.Module):
    """A forward with some stored tensors to use."""

    def __init__(self, function: Callable[["Weighted", Tensor], object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.w, self.v = nn.Parameter(torch.randn(5, 5)), nn.Parameter(torch.randn(3, 5))
        self.heads, self.b = nn.Parameter(torch.randn(2, 5, 5)), nn.Parameter(torch.randn(5))
        self.register_buffer("mask", torch.tensor([True, False, True, True, False]))
        self.register_buffer("index", torch.tensor([4, 0, 2, 2]))

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def written(change: Callable[["Weighted", Tensor, Tensor], object]) -> Callable[["Weighted", Tensor], Tensor]:
    """A forward that writes into `x @ w`."""

    def forward(s: Weighted, x: Tensor) -> Tensor:
        h = x @ s.w
        change(s, h, x)
        return h

    return forward


def into_zeros(s: Weighted, x: Tensor) -> Tensor:
    out = x.new_zeros(x.size(0), 7)
    out[:, 1:4] = 2 * x[:, :3]
    return out


def _set(target: Tensor, where: tuple[object, ...], value: object) -> None:
    target[where] = value  # type: ignore[index]


VECTOR, TOKENS, IMAGE = (5,), (4, 5), (2, 6, 6)
ROWS = slice(None)

# name: (forward, shape of a sample, how far above the measured norm the product may be)
EXACT: dict[str, tuple[Callable[[Weighted, Tensor], object], tuple[int, ...], float]] = {
    "einsum": (lambda s, x: torch.einsum("bni,ji->bnj", x, s.v), TOKENS, 1.0),
    "einsum from the left": (lambda s, x: torch.einsum("ni,bik->bnk", s.v, x.mT), TOKENS, 1.0),
    "einsum of heads": (lambda s, x: torch.einsum("hij,bni->bhnj", s.heads, x), TOKENS, 1.0),
    "einsum head by head": (
        lambda s, x: torch.einsum("bhni,hij->bhnj", torch.stack([x, 2 * x], 1), s.heads), TOKENS, 2.0
    ),
    "matmul with heads": (lambda s, x: x[:, None] @ s.heads, TOKENS, 1.0),
    "heads from the left": (lambda s, x: s.heads @ x[:, None].mT, TOKENS, 1.0),
    "matmul with a vector": (lambda s, x: x @ s.b, TOKENS, 1.0),
    "a vector from the left": (lambda s, x: torch.matmul(s.b, x.mT), TOKENS, 1.0),
    "bmm with an expanded weight": (lambda s, x: torch.bmm(x, s.w.expand(x.shape[0], 5, 5)), TOKENS, 1.0),
    "masked weight": (lambda s, x: F.linear(x, s.w * s.mask), VECTOR, 1.0),
    "times a mask": (lambda s, x: x * s.mask, VECTOR, 1.0),
    "where": (lambda s, x: torch.where(s.mask, x, 2 * x.flip(1)), VECTOR, 1.0),
    "masked_fill": (lambda s, x: (x @ s.w).masked_fill(s.mask, -1e9), VECTOR, 1.0),
    "masked_fill_": (lambda s, x: (x @ s.w).masked_fill_(s.mask, 0.0), VECTOR, 1.0),
    "triu": (lambda s, x: torch.triu(x) @ s.w, TOKENS, 1.1),
    "lerp": (lambda s, x: torch.lerp(x, 3 * x, 0.3), VECTOR, 1.0),
    "addcmul": (lambda s, x: torch.addcmul(x, x, s.b, value=0.5), VECTOR, 2.5),
    "index": (lambda s, x: x[:, s.index], VECTOR, 1.0),
    "boolean index": (lambda s, x: (x @ s.w)[:, s.mask], VECTOR, 1.2),
    "gather": (lambda s, x: x.gather(1, s.index[None].expand(x.shape[0], -1)), VECTOR, 1.0),
    "rot90": (lambda s, x: torch.rot90(x, 1, [1, 2]), TOKENS, 1.0),
    "dstack": (lambda s, x: torch.dstack([x, 2 * x]), TOKENS, 1.0),
    "column_stack": (lambda s, x: torch.column_stack([x, 2 * x]), VECTOR, 1.0),
    "write zero": (written(lambda s, h, x: _set(h, (ROWS, slice(2)), 0)), VECTOR, 1.2),
    "write a part": (written(lambda s, h, x: _set(h, (ROWS, slice(1, 3)), x[:, :2])), VECTOR, 1.5),
    "scale a column": (written(lambda s, h, x: h[:, 0].mul_(3)), VECTOR, 1.5),
    "write into zeros": (into_zeros, VECTOR, 1.0),
    "fill an empty one": (lambda s, x: torch.empty_like(x).copy_(2 * x), VECTOR, 1.0),
    "plus zeros_like": (lambda s, x: torch.maximum(x, torch.zeros_like(x)) * torch.full_like(x, 3.0), VECTOR, 1.0),
    "torch.max of two": (lambda s, x: torch.max(x, 0.1 * x), VECTOR, 1.01),
    "clip": (lambda s, x: torch.clip(x, -1, 1), VECTOR, 1.0),
    "threshold at its value": (lambda s, x: F.threshold(x, 0.2, 0.2), VECTOR, 1.0),
    "cumsum": (lambda s, x: torch.cumsum(x, 1), TOKENS, 1.0),
    "diff": (lambda s, x: torch.diff(x, dim=1), VECTOR, 1.1),
    "norm": (lambda s, x: x.norm(dim=1), VECTOR, 1.0),
    "norm, p = 1": (lambda s, x: x.norm(p=1, dim=1), VECTOR, 1.0),
    "norm, p = inf": (lambda s, x: x.norm(p=math.inf, dim=2), TOKENS, 1.0),
    "std": (lambda s, x: x.std(1), VECTOR, 1.0),
    "logsumexp": (lambda s, x: torch.logsumexp(x, 1), VECTOR, 1.6),
    "topk": (lambda s, x: torch.topk(x, 3, 1)[0], VECTOR, 1.0),
    "kthvalue": (lambda s, x: torch.kthvalue(x, 2, 1)[0], VECTOR, 1.0),
    "median": (lambda s, x: torch.median(x, 1)[0], VECTOR, 1.0),
    "cummax": (lambda s, x: torch.cummax(x - torch.arange(5.0), 1)[0], VECTOR, 1.0),
    "fold": (lambda s, x: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1), IMAGE, 1.0),
    "bicubic": (lambda s, x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE, 1.7),
    "bicubic, antialiased": (
        lambda s, x: F.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True), IMAGE, 1.4
    ),
    "bilinear, antialiased": (
        lambda s, x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), IMAGE, 1.1
    ),
    "nearest-exact": (lambda s, x: F.interpolate(x, scale_factor=2, mode="nearest-exact"), IMAGE, 1.0),
    "a number in float64": (lambda s, x: x * torch.linspace(-2, 1, 5, dtype=torch.float64), VECTOR, 1.0),
    "casts": (lambda s, x: x.half().float().double() * 2, VECTOR, 1.0),
    "outputs that are constant or None": (lambda s, x: (x @ s.w, s.b, None), VECTOR, 1.0),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[Weighted, Tensor], object], tuple[int, ...], str]] = {
    "comparison": (lambda s, x: torch.where(x > 0, x, 0.1 * x), VECTOR, "jumps.*relu, clamp or maximum"),
    "argmax": (lambda s, x: x.argmax(1).float(), VECTOR, "jumps"),
    "noise": (lambda s, x: x + torch.randn_like(x), VECTOR, "random.*no function.*noise as an input"),
    "noise of its own shape": (lambda s, x: x + torch.rand(5), VECTOR, "random"),
    "Fourier transform": (lambda s, x: torch.fft.rfft(x).abs(), VECTOR, "complex"),
    "to integers": (lambda s, x: x.int().float(), VECTOR, "jumps"),
    "constant": (lambda s, x: s.b.expand(x.shape[0], 5), VECTOR, "no output .* depends"),
    "norm of a batch": (lambda s, x: x / x.norm(), VECTOR, "mixes the samples"),
    "matrices of the samples": (lambda s, x: torch.bmm(x, x.mT).cumsum(0), TOKENS, "mixes the samples"),
    "unknown": (lambda s, x: torch.cdist(x, s.w), TOKENS, "cdist.*not known.*register_rule"),
}

UNBOUNDED: dict[str, tuple[Callable[[Weighted, Tensor], object], str]] = {
    "floor": (lambda s, x: torch.floor(x), "jump"),
    "remainder": (lambda s, x: x % 1, "jump"),
    "sinh": (lambda s, x: torch.sinh(x), "unbounded"),
    "tan": (lambda s, x: torch.tan(x), "poles"),
    "variance": (lambda s, x: x.var(1), "unbounded"),
    "product of all": (lambda s, x: x.prod(1), "unbounded"),
    "threshold elsewhere": (lambda s, x: F.threshold(x, 0.1, 0.2), "jumps"),
    "norm, p = 1/2": (lambda s, x: x.norm(p=0.5, dim=1), "unbounded"),
    "norm without eps": (lambda s, x: x / x.norm(dim=1, keepdim=True), "unbounded"),
}


def measured(model: nn.Module, points: Tensor) -> float:
    """The largest Jacobian norm at the points, in float64."""

    def flat(x: Tensor) -> Tensor:
        out = model(x[None])
        parts = out if isinstance(out, tuple) else (out,)
        return torch.cat([p.reshape(-1) for p in parts if p is not None and p.requires_grad])

    jacobians = [torch.autograd.functional.jacobian(flat, x).reshape(-1, x.numel()) for x in points.double()]
    return max(float(torch.linalg.matrix_norm(j, 2)) for j in jacobians)


@pytest.mark.parametrize("name", EXACT)
def test_close_above_the_measured_norm(name: str) -> None:
    function, shape, room = EXACT[name]
    model, x = Weighted(function), torch.randn(6, *shape)
    bound = opnorm.lipschitz(model, x, method="fast", time_budget=0.3)
    truth = 2.0 if name == "casts" else measured(model.double(), torch.cat([x, 0.01 * x, 10 * x]))
    assert truth * (1 - 1e-9) <= bound.upper <= truth * room * (1 + 2e-3)
    assert 0.5 * truth <= bound.lower <= bound.upper


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    function, shape, reason = REFUSED[name]
    with pytest.raises(UnsupportedLayerError, match=reason):
        opnorm.lipschitz(Weighted(function), torch.randn(2, *shape), method="naive")


@pytest.mark.parametrize("name", UNBOUNDED)
def test_unbounded_with_a_reason(name: str) -> None:
    function, reason = UNBOUNDED[name]
    bound = opnorm.lipschitz(Weighted(function), torch.randn(2, 5), method="naive", time_budget=0.2)
    assert bound.upper == math.inf
    assert any(re.search(reason, node.note) for node in bound.nodes if math.isinf(node.constant))


def test_a_label_cannot_choose_elements() -> None:
    class Chosen(nn.Module):
        def forward(self, x: Tensor, label: Tensor) -> Tensor:
            return x.gather(1, label[:, None])

    with pytest.raises(UnsupportedLayerError, match="indices depend on the inputs"):
        opnorm.lipschitz(Chosen(), (torch.randn(2, 3), torch.tensor([0, 2])), method="naive")


POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "overlapping": (nn.MaxPool2d(3, 1), (1, 5, 5)),
    "a stride of 2": (nn.MaxPool2d(3, 2, 1), (1, 7, 7)),
    "dilated": (nn.MaxPool2d(2, 1, dilation=2), (1, 5, 5)),
    "ceil_mode": (nn.MaxPool1d(3, 2, ceil_mode=True), (1, 8)),
    "three axes": (nn.MaxPool3d(2, 1), (1, 3, 3, 3)),
    "apart": (nn.MaxPool2d(2), (1, 4, 4)),
    "adaptive": (nn.AdaptiveMaxPool2d(3), (1, 4, 5)),
}


@pytest.mark.parametrize("name", POOLS)
def test_max_pooling_reaches_its_constant_at_a_spike(name: str) -> None:
    pool, shape = POOLS[name]
    bound = opnorm.lipschitz(pool, torch.randn(2, *shape), method="naive", time_budget=0.2)
    spikes = torch.eye(math.prod(shape)).reshape(-1, *shape)  # a spike is the largest of every window that it is in
    truth = measured(pool, spikes)
    assert truth * (1 - 1e-12) <= bound.upper <= truth * (1 + 1e-12)


@pytest.mark.parametrize(
    ("model", "example", "reason"),
    [
        (nn.Linear(4, 4), {"x": torch.randn(2, 4)}, "tuple of tensors"),
        (nn.Linear(4, 4), [[1.0, 2.0, 3.0, 4.0]], "tuple of tensors"),
        (nn.Linear(4, 4), torch.randn(2, 5), "does not take the example"),
        (nn.Linear(4, 4), torch.randn(2, 4).double(), "does not take the example.*dtype"),
        (nn.Linear(4, 4), torch.randn(4), "first axis must be the batch"),
        (nn.Linear(4, 4), torch.randn(2, 4).to(torch.complex64), "complex"),
        (torch.relu, torch.randn(2, 4), "a torch.nn.Module"),
    ],
)
def test_what_cannot_be_read_is_an_argument_error(model: nn.Module, example: Tensor, reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        opnorm.lipschitz(model, example)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_wrappers_are_looked_through() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    plain = opnorm.lipschitz(net, torch.randn(2, 3), method="naive", time_budget=0.2)
    for wrapped in (nn.DataParallel(net), torch.compile(net)):
        assert opnorm.lipschitz(wrapped, torch.randn(2, 3), method="naive", time_budget=0.2).upper == plain.upper


def test_tokens_are_not_varied() -> None:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    with pytest.raises(UnsupportedLayerError, match="from their embeddings on"):
        opnorm.lipschitz(model, torch.tensor([[0, 4]]))


def test_several_inputs_and_outputs_are_one_map() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x: Tensor, y: Tensor, label: Tensor) -> dict[str, Tensor]:
            h = torch.relu(self.a(x)) + self.b(y)
            return {"h": h, "sum": 2 * h.sum(-1), "label": label}

    torch.manual_seed(0)
    model = Two()
    bound = opnorm.lipschitz(model, (torch.randn(3, 4), torch.randn(3, 5), torch.arange(3)), time_budget=0.5)
    a, b = model.a.weight.detach().double(), model.b.weight.detach().double()
    both = torch.cat([a, b], 1)  # where every neuron of the first is on
    truth = float(torch.linalg.matrix_norm(torch.cat([both, 2 * both.sum(0, keepdim=True)]), 2))
    assert truth * (1 - 1e-9) <= bound.upper <= truth * 1.1
    assert bound.pairwise is not None
    assert bound.pairwise.shape == (4, 4)
    assert 0.9 * bound.lower <= bound.upper


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.ConvTranspose1d(2, 4, 3, 2, 1, 1, groups=2), (2, 5)),
        (nn.ConvTranspose2d(2, 3, 3, (1, 2), dilation=2), (2, 3, 4)),
        (nn.ConvTranspose3d(1, 2, 2, 2), (1, 2, 3, 2)),
        (nn.Conv3d(1, 2, 2, padding=1, padding_mode="replicate"), (1, 2, 3, 2)),
    ],
    ids=["1d", "2d", "3d", "3d, padded"],
)
def test_convolutions_of_every_dimension(layer: nn.Module, shape: tuple[int, ...]) -> None:
    bound = opnorm.lipschitz(layer, torch.randn(2, *shape), method="fast", time_budget=0.3)
    truth = measured(layer.double(), torch.zeros(1, *shape))
    assert truth * (1 - 1e-9) <= bound.upper <= truth * (1 + 1e-3)


def test_nodes_say_where_they_are_what_they_stretch_and_what_they_add() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.relu(self.inner(x))

    model = nn.Sequential(Block(), nn.MaxPool1d(3, 1, 1))
    model[0].inner.weight.data = torch.diag(torch.tensor([3.0, 0.5]))
    nodes = opnorm.lipschitz(model, torch.randn(2, 1, 2), method="naive", time_budget=0.2).nodes
    assert [n.place for n in nodes][1:] == ["0.inner: linear", "0: relu", "0: add", "1: max_pool1d"]
    assert [n.kind for n in nodes] == ["input", "linear", "activation", "join", "opaque"]
    assert [n.sources for n in nodes] == [(), (0,), (1,), (0, 2), (3,)]
    expected = [(1, 1, 1), (3, 3, 3), (1, 1, 3), (1, 4 / 3, 4), (2**0.5, 2**0.5, 4 * 2**0.5)]
    for node, numbers in zip(nodes, expected, strict=True):
        assert (node.constant, node.contribution, node.bound) == pytest.approx(numbers, rel=1e-2)
    assert "windows" in nodes[-1].note
