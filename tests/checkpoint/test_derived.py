"""Weights stored in parts: what is measured is what the module uses in evaluation mode."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from opnorm.checkpoint import open_checkpoint
from opnorm.layers import read_weight


def _old(name: str) -> Callable[..., nn.Module]:
    def wrap(*args: object, **options: object) -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(nn.utils, name)(*args, **options)

    return wrap


weight_norm, spectral_norm = _old("weight_norm"), _old("spectral_norm")
MANY = {"n_power_iterations": 50}

CASES: list[tuple[str, Callable[[], nn.Module], str]] = [
    ("weight norm", lambda: weight_norm(nn.Conv1d(2, 3, 5)), "weight norm"),
    ("weight norm of a transposed layer", lambda: weight_norm(nn.ConvTranspose1d(2, 3, 5), dim=1), "weight norm"),
    ("weight norm of the whole", lambda: weight_norm(nn.Linear(3, 4), dim=None), "weight norm"),
    ("weight norm, one output", lambda: weight_norm(nn.Linear(3, 1)), "weight norm"),
    ("weight norm, parametrization", lambda: parametrizations.weight_norm(nn.Linear(3, 4)), "weight norm"),
    ("spectral norm", lambda: spectral_norm(nn.Linear(3, 4)), "spectral norm"),
    ("spectral norm, square conv", lambda: spectral_norm(nn.Conv2d(4, 4, 3), **MANY), "spectral norm"),
    ("spectral norm, transposed", lambda: spectral_norm(nn.ConvTranspose2d(4, 4, 3), **MANY), "spectral norm"),
    ("spectral norm, parametrization", lambda: parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), "spectral norm"),
    ("pruned", lambda: prune.random_unstructured(nn.Linear(3, 4), "weight", amount=0.5), "pruned"),
]


@pytest.mark.parametrize(("make", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_weight_in_use_is_put_together(tmp_path: Path, make: Callable[[], nn.Module], said: str) -> None:
    torch.manual_seed(1)
    layer = make()
    for _ in range(20):
        layer(torch.randn(1, *_sample(layer)))
    layer.eval()
    torch.save({"net": layer.state_dict()}, tmp_path / "x.pt")
    checkpoint = open_checkpoint(tmp_path / "x.pt")
    entries = {entry.name: entry for entry in checkpoint.entries}
    assert said in entries["weight"].derived
    torch.testing.assert_close(entries["weight"].load(), read_weight(layer).detach(), rtol=1e-6, atol=1e-7)
    assert sum(entry.elements for entry in entries.values()) == checkpoint.elements
    parts = set(entries) - {"weight", "bias"}
    assert parts
    assert all(entries[name].unusable.endswith("of weight") for name in parts)


def _sample(layer: nn.Module) -> tuple[int, ...]:
    if isinstance(layer, nn.Linear):
        return (layer.in_features,)
    return (layer.in_channels, *[6] * (layer.weight.dim() - 2))


def test_a_spectral_norm_whose_axes_cannot_be_told_is_not_divided(tmp_path: Path) -> None:
    # Fresh vectors fit neither reading of a square kernel.
    torch.manual_seed(0)
    layer = spectral_norm(nn.Conv2d(4, 4, 3))
    torch.save(layer.state_dict(), tmp_path / "x.pt")
    entry = next(entry for entry in open_checkpoint(tmp_path / "x.pt").entries if entry.name == "weight")
    assert "starts from" in entry.remark
    assert torch.equal(entry.load(), layer.weight_orig)


def test_an_unknown_parametrization_is_said(tmp_path: Path) -> None:
    layer = parametrizations.orthogonal(nn.Linear(3, 3))
    torch.save(layer.state_dict(), tmp_path / "x.pt")
    entry = next(entry for entry in open_checkpoint(tmp_path / "x.pt").entries if entry.name == "weight")
    assert "starts from" in entry.remark


def test_weight_v_alone_is_no_spectral_norm(tmp_path: Path) -> None:
    torch.save({"weight_v": torch.eye(3), "weight": torch.eye(2)}, tmp_path / "x.pt")
    entries = open_checkpoint(tmp_path / "x.pt").entries
    assert [(entry.name, entry.derived, entry.unusable) for entry in entries] == [
        ("weight_v", "", ""),
        ("weight", "", ""),
    ]
