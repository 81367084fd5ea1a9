"""Rewriting: same format, dtypes, metadata and ties; what is not replaced is copied; an interrupt changes nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from opnorm.checkpoint import Entry, open_checkpoint, replacing, rewrite
from opnorm.errors import ArgumentError, CheckpointError

STATE = {
    "a.weight": torch.randn(4, 3).to(torch.bfloat16),
    "b.weight": torch.randn(2, 4),
    "b.bias": torch.ones(2),
    "empty": torch.zeros(0, 3),
    "steps": torch.tensor(7),
}


def _halved(entry: Entry) -> Tensor | None:
    return entry.load() / 2 if entry.name.endswith("weight") and not entry.derived else None


def _check_halved(path: Path) -> None:
    found = {entry.name: entry.load() for entry in open_checkpoint(path).entries}
    assert set(found) == set(STATE)
    for name, tensor in STATE.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor / 2 if name.endswith("weight") else tensor)


def test_safetensors_keep_header_and_metadata(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "in.safetensors", metadata={"format": "pt", "who": "me"})
    rewrite(tmp_path / "in.safetensors", tmp_path / "out.safetensors", _halved)
    _check_halved(tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "who": "me"}
    assert (tmp_path / "in.safetensors").stat().st_size == (tmp_path / "out.safetensors").stat().st_size


def test_a_file_can_be_rewritten_in_place(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "x.safetensors")
    rewrite(tmp_path / "x.safetensors", tmp_path / "x.safetensors", _halved)
    _check_halved(tmp_path / "x.safetensors")


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_keep_structure_and_ties(tmp_path: Path, legacy: bool) -> None:
    tied = torch.randn(3, 3)
    content = {"model": {"x.weight": tied, "y.weight": tied}, "epoch": 3, "opt": [{"m": torch.ones(2)}, "text"]}
    torch.save(content, tmp_path / "in.pt", _use_new_zipfile_serialization=not legacy)
    before = (tmp_path / "in.pt").read_bytes()
    rewrite(tmp_path / "in.pt", tmp_path / "out.pt", _halved)
    assert (tmp_path / "in.pt").read_bytes() == before
    assert open_checkpoint(tmp_path / "out.pt").format == open_checkpoint(tmp_path / "in.pt").format
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(found["model"]["x.weight"], tied / 2)
    assert found["model"]["x.weight"].data_ptr() == found["model"]["y.weight"].data_ptr()
    assert (found["epoch"], found["opt"][1]) == (3, "text")
    assert torch.equal(found["opt"][0]["m"], torch.ones(2))


def test_a_state_dict_loads_back_into_its_model(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    torch.save(model.state_dict(), tmp_path / "in.pt")
    rewrite(tmp_path / "in.pt", tmp_path / "out.pt", _halved)
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    other.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert torch.equal(other[0].weight * 2, model[0].weight)


def test_sharded_folders_keep_their_other_files(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    names = list(STATE)
    homes = {name: f"model-0000{1 + (i > 1)}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(homes.values())):
        save_file({name: STATE[name] for name in names if homes[name] == shard}, source / shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    rewrite(source, tmp_path / "out", _halved)
    _check_halved(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *homes.values(),
        "model.safetensors.index.json",
        "config.json",
    }
    with pytest.raises(CheckpointError, match="not an empty folder"):
        rewrite(source, tmp_path / "out", _halved)


REFUSED = [
    (lambda entry: entry.load().double(), "cannot become"),
    (lambda entry: entry.load()[:1], "cannot become"),
]


@pytest.mark.parametrize(("transform", "reason"), REFUSED)
def test_other_shapes_and_dtypes_are_refused_and_the_old_file_stays(tmp_path: Path, transform, reason: str) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").write_text("old")
    with pytest.raises(ArgumentError, match=reason):
        rewrite(tmp_path / "in.safetensors", tmp_path / "out.safetensors", transform)
    assert (tmp_path / "out.safetensors").read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "out.safetensors"]


def test_weights_stored_in_parts_are_not_replaced(tmp_path: Path) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    torch.save(layer.state_dict(), tmp_path / "in.pt")
    with pytest.raises(ArgumentError, match=r"stored in parts.*fold"):
        rewrite(tmp_path / "in.pt", tmp_path / "out.pt", lambda entry: entry.load())


def test_an_interrupt_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "x") as path:
        path.write_text("half")
        raise KeyboardInterrupt
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize("target", ["nowhere/x", "."])
def test_places_that_cannot_be_written(tmp_path: Path, target: str) -> None:
    with pytest.raises(CheckpointError), replacing(tmp_path / target) as path:
        path.write_text("new")
