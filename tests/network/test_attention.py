"""Attention on a region, in every form that models write it in, against measured Jacobians."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opnorm
from network.networks import Lambda
from opnorm.errors import UnsupportedLayerError
from opnorm.graph import export
from opnorm.graph.batch import evaluate
from opnorm.network import Ball, NormBall
from opnorm.network.attention.recognise import with_attention
from opnorm.network.spectral import spectral_up

MASK = torch.triu(torch.full((5, 5), -math.inf), 1)
KEEP = torch.tril(torch.ones(5, 5, dtype=torch.bool))


def heads(x: Tensor, qkv: nn.Module) -> tuple[Tensor, ...]:
    """As timm's vision transformers do."""
    b, n, c = x.shape
    return qkv(x).reshape(b, n, 3, 2, c // 2).permute(2, 0, 3, 1, 4).unbind(0)


def written(x: Tensor, qkv: nn.Module, masked: Callable[[Tensor], Tensor] = lambda s: s) -> Tensor:
    q, k, v = heads(x, qkv)
    return (masked(q @ k.transpose(-2, -1) * 0.5).softmax(-1) @ v).transpose(1, 2).reshape(x.shape)


def scaled_before(x: Tensor, qkv: nn.Module) -> Tensor:
    q, k, v = heads(x, qkv)
    return F.dropout(F.softmax(q * 0.5 @ k.mT, -1), 0.1, training=False) @ v


def bert(x: Tensor, *layers: nn.Module) -> Tensor:
    q, k, v = (f(x).view(x.shape[0], x.shape[1], 2, 4).permute(0, 2, 1, 3) for f in layers)
    weights = nn.functional.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(4), dim=-1)
    return torch.matmul(weights, v).permute(0, 2, 1, 3).contiguous().view(x.shape[0], x.shape[1], 8)


def by_einsum(x: Tensor, qkv: nn.Module) -> Tensor:
    q, k, v = heads(x, qkv)
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * 0.5
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def non_local(x: Tensor, *layers: nn.Module) -> Tensor:
    """BigGAN's and SAGAN's: tokens in columns."""
    theta, phi, g = (f(x).mT for f in layers)
    return torch.bmm(g, torch.softmax(torch.bmm(theta.mT, phi), -1).mT)


def keys_first(x: Tensor, *layers: nn.Module) -> Tensor:
    q, k, v = (f(x) for f in layers)
    return (k @ q.mT).softmax(1).mT @ v


def one_key_for_all_heads(x: Tensor, *layers: nn.Module) -> Tensor:
    q, k, v = (f(x) for f in layers)
    q = q.unflatten(-1, (2, 4)).transpose(1, 2)
    return (q @ k[:, None, :, :4].mT).softmax(-1) @ v[:, None, :, :4]


def with_temperatures(x: Tensor, qkv: nn.Module, cosine: nn.Module) -> Tensor:
    """Swin v2's: cosines, a learned temperature for each head, a position bias."""
    q, k, v = heads(x, qkv)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (scores * cosine.weight.view(2, 1, 1) + MASK.nan_to_num(neginf=-2.0)).softmax(-1) @ v


def multi(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def three() -> list[nn.Module]:
    return [nn.Linear(8, 8) for _ in range(3)]


def fused() -> nn.Module:
    return nn.Linear(8, 24)


def turned(x: Tensor, layer: nn.Module, **options: Any) -> Tensor:
    return layer(*[x.transpose(0, 1)] * 3, **options)[0].transpose(0, 1)


FORMS: dict[str, Callable[[], nn.Module]] = {
    "built in": lambda: Lambda(lambda x, a: F.scaled_dot_product_attention(*heads(x, a)), fused()),
    "built in, causal": lambda: Lambda(
        lambda x, a: F.scaled_dot_product_attention(*heads(x, a), is_causal=True, scale=0.7), fused()
    ),
    "built in, masked": lambda: Lambda(
        lambda x, a: F.scaled_dot_product_attention(*heads(x, a), attn_mask=KEEP), fused()
    ),
    "multi-head": lambda: Lambda(lambda x, a: a(x, x, x, need_weights=False)[0], multi()),
    "multi-head with weights": lambda: Lambda(lambda x, a: a(x, x, x)[0], multi()),
    "multi-head, masked, with weights": lambda: Lambda(lambda x, a: a(x, x, x, attn_mask=MASK.to(x))[0], multi()),
    "multi-head, more keys": lambda: Lambda(lambda x, a: a(x, x, x, need_weights=False)[0], multi(add_bias_kv=True)),
    "sequence first": lambda: Lambda(lambda x, a: turned(x, a, need_weights=False), nn.MultiheadAttention(8, 2)),
    "sequence first with weights": lambda: Lambda(turned, nn.MultiheadAttention(8, 2)),
    "written": lambda: Lambda(written, fused()),
    "written, added mask": lambda: Lambda(lambda x, a: written(x, a, lambda s: s + MASK), fused()),
    "written, filled mask": lambda: Lambda(
        lambda x, a: written(x, a, lambda s: s.masked_fill(~KEEP, -math.inf)), fused()
    ),
    "written, large mask": lambda: Lambda(lambda x, a: written(x, a, lambda s: torch.where(KEEP, s, -1e9)), fused()),
    "written, constants for scores": lambda: Lambda(lambda x, a: written(x, a, lambda s: s.where(KEEP, 0.3)), fused()),
    "scaled before": lambda: Lambda(scaled_before, fused()),
    "bert": lambda: Lambda(bert, *three()),
    "einsum": lambda: Lambda(by_einsum, fused()),
    "non-local": lambda: Lambda(non_local, *three()),
    "keys first": lambda: Lambda(keys_first, *three()),
    "one key for all heads": lambda: Lambda(one_key_for_all_heads, *three()),
    "temperatures": lambda: Lambda(with_temperatures, fused(), nn.Linear(2, 1)),
}  # fmt: skip


def talking(x: Tensor, qkv: nn.Module, mix: nn.Module) -> Tensor:
    q, k, v = heads(x, qkv)
    weights = (q @ k.mT).softmax(-1).permute(0, 2, 3, 1)
    return mix(weights).permute(0, 3, 1, 2) @ v


# Products around a softmax that are no attention: bounded by the rules of their operations.
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "the weights as well": lambda: Lambda(lambda x, a: torch.cat([t.flatten(1) for t in a(x, x, x)], 1), multi()),
    "linear attention": lambda: Lambda(lambda x, q, k, v: q(x) @ (k(x).mT @ v(x)), *three()),
    "over the queries": lambda: Lambda(lambda x, q, k, v: (q(x) @ k(x).mT).softmax(1) @ v(x), *three()),
    "another order": lambda: Lambda(lambda x, q, k, v: (q(x) @ k(x).mT).softmax(-1).mT @ v(x), *three()),
    "heads that are mixed": lambda: Lambda(talking, fused(), nn.Linear(2, 2)),
    "scaled by key": lambda: Lambda(
        lambda x, q, k, v: (q(x) @ k(x).mT * torch.arange(1.0, 6.0)).softmax(-1) @ v(x), *three()
    ),
}  # fmt: skip


def steepest(model: nn.Module, points: Tensor) -> float:
    found = 0.0
    for point in points:
        jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0].reshape(-1), point)
        found = max(found, float(torch.linalg.matrix_norm(jacobian.reshape(-1, point.numel()), 2)))
    return found * (1 - 1e-9)


def inside(center: Tensor, radius: float, count: int = 4) -> Tensor:
    offsets = torch.randn(count, *center.shape, dtype=torch.float64)
    return center + offsets / offsets.flatten(1).norm(dim=1)[:, None, None] * radius * (1 - 1e-9)


@pytest.mark.parametrize("name", FORMS | OTHERS)
def test_bounds_hold_where_they_are_stated(name: str) -> None:
    torch.manual_seed(0)
    model = (FORMS | OTHERS)[name]().double().eval()
    for parameter in model.parameters():
        parameter.data.mul_(2.0)
    center = torch.randn(5, 8, dtype=torch.float64)
    slack = 12 if name in FORMS else 100
    for radius, ratio in ((1e-3, slack), (0.3, math.inf)):
        bound = opnorm.lipschitz(model, center[None], region=Ball(center, radius), method="naive", time_budget=0.2)
        assert steepest(model, inside(center, radius)) <= bound.upper < math.inf
        assert bound.upper < ratio * steepest(model, center[None])
    whole = opnorm.lipschitz(model, center[None], region=NormBall(20.0), method="naive", time_budget=0.2)
    points = torch.cat([inside(center * s, 1.0, 2) for s in (0.01, 0.5, 1.5)])
    assert steepest(model, points) <= whole.upper < math.inf


@pytest.mark.parametrize("name", FORMS | OTHERS)
def test_attention_is_recognised_and_computes_the_same(name: str) -> None:
    torch.manual_seed(0)
    model, x = (FORMS | OTHERS)[name]().double().eval(), torch.randn(2, 5, 8, dtype=torch.float64)
    graph = export(model, x)
    changed = with_attention(graph)
    found = sum(node.op.startswith("opnorm.attention") for node in changed.nodes)
    assert found == (name in FORMS or name == "the weights as well")
    with torch.no_grad():
        expected, values = model(x), evaluate(changed, (x,))[changed.outputs[0]]
    assert torch.allclose(values, expected, rtol=1e-12, atol=1e-12)


class Parts(nn.Module):
    """Attention with its queries, keys and values as inputs, and a bias of each."""

    def __init__(self, queries: float, keys: float, values: float) -> None:
        super().__init__()
        self.biases = (queries, keys, values)

    def forward(self, x: Tensor) -> Tensor:
        parts = [part + bias for part, bias in zip(x.chunk(3, -1), self.biases, strict=True)]
        return F.scaled_dot_product_attention(*parts)


@pytest.mark.parametrize("biases", [(0.0, 0.0, 0.0), (10.0, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, 10.0)])
@pytest.mark.parametrize("tokens", [2, 7])
def test_each_part_of_attention_has_its_own_constant(biases: tuple[float, ...], tokens: int) -> None:
    torch.manual_seed(tokens)
    model, center = Parts(*biases), torch.randn(tokens, 6, dtype=torch.float64)
    bound = opnorm.lipschitz(model, center[None], region=Ball(center, 1e-3), method="naive", time_budget=0.2)
    constants = [n.constant for n in bound.nodes if n.place.endswith(("(queries)", "(keys)", "(values)"))]
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v[None])[0], center)
    measured = [
        float(torch.linalg.matrix_norm(block.reshape(2 * tokens, -1), 2)) for block in jacobian.split(2, dim=-1)
    ]
    for constant, found, loose in zip(constants, measured, (2.0, 4.0, 1.1), strict=True):
        assert found * (1 - 1e-9) <= constant < loose * found
    shifted = opnorm.lipschitz(Parts(biases[0], biases[1] + 7, biases[2] + 7), center[None], region=Ball(center, 1e-3),
                               method="naive", time_budget=0.2)  # fmt: skip
    assert shifted.upper == pytest.approx(bound.upper, rel=1e-6)


def test_a_mask_of_all_keys_gives_zeros() -> None:
    mask = torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    model = Lambda(lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask))
    center = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bound = opnorm.lipschitz(model, center[None], region=Ball(center, 0.01), time_budget=0.2)
    assert steepest(model, inside(center, 0.01)) <= bound.upper < math.inf


@pytest.mark.parametrize("weights", [True, False])
def test_a_layer_that_reads_time_first_is_refused_with_the_way_out(weights: bool) -> None:
    model = Lambda(lambda x, a: a(x, x, x, need_weights=weights)[0], nn.MultiheadAttention(8, 2)).eval()
    with pytest.raises(UnsupportedLayerError, match="batch_first=True"):
        opnorm.lipschitz(model, torch.randn(3, 5, 8))


@pytest.mark.parametrize(("norm_first", "most"), [(False, 60.0), (True, 50.0)])
def test_an_encoder_on_a_small_ball_is_bounded_usefully(norm_first: bool, most: float) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).double().eval()
    center = torch.randn(8, 32, dtype=torch.float64)
    bound = opnorm.lipschitz(model, center[None], region=Ball(center, 1e-3), method="naive", time_budget=0.5)
    assert steepest(model, inside(center, 1e-3, 2)) <= bound.upper < most


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (40, 7), (64, 64)])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e150, 0.0])
def test_bounds_of_singular_values_are_above_them_and_close(shape: tuple[int, int], scale: float) -> None:
    matrices = torch.randn(6, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    matrices[0] = scale  # of rank 1
    exact, found = torch.linalg.matrix_norm(matrices, 2), spectral_up(matrices)
    assert bool((found >= exact * (1 - 1e-13)).all())
    assert bool((found <= exact * min(shape) ** (1 / 64) * (1 + 1e-8)).all())
