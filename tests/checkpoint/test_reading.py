"""What is read from well-formed files: names, shapes, dtypes, ties, and parts that were taken or left."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from opnorm.checkpoint import open_checkpoint
from opnorm.checkpoint.names import canonical
from opnorm.errors import CheckpointError

STATE = {"fc.weight": torch.arange(6.0).reshape(2, 3), "fc.bias": torch.ones(2)}


def _torch(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_files_of_both_formats(tmp_path: Path, legacy: bool) -> None:
    path = _torch(tmp_path / "x.pt", STATE, _use_new_zipfile_serialization=not legacy)
    checkpoint = open_checkpoint(path)
    assert checkpoint.format == ("torch (legacy)" if legacy else "torch")
    assert {entry.name: entry.shape for entry in checkpoint.entries} == {"fc.weight": (2, 3), "fc.bias": (2,)}
    assert all(torch.equal(entry.load(), STATE[entry.name]) for entry in checkpoint.entries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_every_dtype_is_read_exactly(tmp_path: Path, dtype: torch.dtype, suffix: str) -> None:
    weight = torch.randn(3, 4).to(dtype)
    path = tmp_path / f"x.{suffix}"
    save_file({"w": weight}, path) if suffix == "safetensors" else torch.save({"w": weight}, path)
    (entry,) = open_checkpoint(path).entries
    assert (entry.dtype, entry.unusable) == (str(dtype).removeprefix("torch."), "")
    assert torch.equal(entry.load(), weight)


UNUSABLE = [
    (torch.ones(2, 2, dtype=torch.int8), "int8: integers"),
    (torch.ones(2, 2, dtype=torch.uint8), "uint8: integers"),
    (torch.ones(2, 2, dtype=torch.int64), "int64: integers"),
    (torch.ones(2, 2, dtype=torch.bool), "bool: a mask"),
    (torch.ones(2, 2).to(torch.float8_e4m3fn), "float8_e4m3fn: low-precision codes"),
    (torch.ones(2, 2).to(torch.float8_e5m2), "float8_e5m2: low-precision codes"),
]


@pytest.mark.parametrize(("tensor", "reason"), UNUSABLE, ids=lambda value: str(getattr(value, "dtype", "")))
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_what_holds_no_weight_says_why(tmp_path: Path, tensor: Tensor, reason: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    save_file({"w": tensor}, path) if suffix == "safetensors" else torch.save({"w": tensor}, path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.entries[0].unusable.startswith(reason)
    assert checkpoint.elements == 4


def test_unusual_layouts_say_why_and_count_what_is_stored(tmp_path: Path) -> None:
    tensors = {
        "repeated": torch.zeros(1).expand(10**6, 10**6),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.empty(3, device="meta"),
    }
    checkpoint = open_checkpoint(_torch(tmp_path / "x.pt", tensors))
    assert {entry.name: (entry.elements, bool(entry.unusable)) for entry in checkpoint.entries} == {
        "repeated": (1, True),
        "sparse": (3, True),
        "meta": (0, True),
    }


def test_tied_weights_count_once(tmp_path: Path) -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    checkpoint = open_checkpoint(_torch(tmp_path / "x.pt", model.state_dict()))
    (entry,) = checkpoint.entries
    assert (entry.name, entry.aliases, checkpoint.elements) == ("embed.weight", ("head.weight",), 15)


def test_views_of_one_storage_that_do_not_overlap_are_not_tied(tmp_path: Path) -> None:
    flat = torch.arange(8.0)
    checkpoint = open_checkpoint(_torch(tmp_path / "x.pt", {"a": flat[:4].view(2, 2), "b": flat[4:].view(2, 2)}))
    assert [entry.aliases for entry in checkpoint.entries] == [(), ()]
    assert checkpoint.elements == 8


def test_tensors_stored_on_cuda_load_on_the_cpu(tmp_path: Path) -> None:
    # The location is a string in the pickle: a file as a GPU would have written it, without one.
    plain, stored = tmp_path / "cpu.pt", tmp_path / "cuda.pt"
    torch.save({"w": torch.eye(2)}, plain, _use_new_zipfile_serialization=False)
    stored.write_bytes(plain.read_bytes().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in stored.read_bytes()
    (entry,) = open_checkpoint(stored).entries
    assert entry.load().device.type == "cpu"
    assert torch.equal(entry.load(), torch.eye(2))


OPTIMIZER = {"state": {0: {"exp_avg": torch.zeros(2, 3)}}, "param_groups": [{"lr": 0.1}]}
NESTED = [
    ({"state_dict": STATE, "epoch": 3}, "state_dict", {"epoch": 0}),
    ({"model": STATE, "optimizer": OPTIMIZER}, "model", {"optimizer": 6}),
    ({"model_state_dict": STATE, "adam": OPTIMIZER}, "model_state_dict", {"adam": 6}),
    ({"model": STATE, "ema": {"fc.weight": torch.zeros(2, 3)}}, "model", {"ema": 6}),
    ({"ema": STATE, "optimizer": OPTIMIZER}, "ema", {"optimizer": 6}),
    ({"state": {"model": STATE, "rng_state": torch.zeros(5)}}, "state", {}),
    ({"generator": STATE, "lr_schedulers": [torch.zeros(2)]}, "", {"lr_schedulers": 2}),
    (STATE, "", {}),
]


@pytest.mark.parametrize(("content", "taken", "left"), NESTED)
def test_nested_files_are_searched_and_nothing_is_lost(
    tmp_path: Path, content: dict[str, object], taken: str, left: dict[str, int]
) -> None:
    checkpoint = open_checkpoint(_torch(tmp_path / "x.pt", content))
    assert checkpoint.taken == taken
    assert {part.name: part.elements for part in checkpoint.left} == left
    assert {"fc.weight", "fc.bias"} <= {
        entry.name.removeprefix("model.").removeprefix("generator.") for entry in checkpoint.entries
    }
    counted = sum(entry.elements for entry in checkpoint.entries) + sum(part.elements for part in checkpoint.left)
    assert counted == checkpoint.elements


def test_a_part_can_be_asked_for(tmp_path: Path) -> None:
    path = _torch(tmp_path / "x.pt", {"model": STATE, "v1.ema": {"w": torch.eye(3)}})
    checkpoint = open_checkpoint(path, "v1.ema")
    assert [entry.name for entry in checkpoint.entries] == ["w"]
    assert [(part.name, part.elements) for part in checkpoint.left] == [("model", 8)]
    with pytest.raises(CheckpointError, match=r"no part 'swa'; the file holds model, v1\.ema"):
        open_checkpoint(path, "swa")


def test_only_optimizer_state_is_an_error_that_lists_it(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds only optimizer state \(optimizer\)"):
        open_checkpoint(_torch(tmp_path / "x.pt", {"optimizer": OPTIMIZER}))


NAMES = [
    ("module.fc.weight", "fc.weight"),
    ("_orig_mod.fc.weight", "fc.weight"),
    ("module._orig_mod.blocks.0.fc.weight", "blocks.0.fc.weight"),
    ("blocks.0._orig_mod.fc.weight", "blocks.0.fc.weight"),
    ("_fsdp_wrapped_module.blocks.0._checkpoint_wrapped_module.fc.weight", "blocks.0.fc.weight"),
    ("encoder.module.weight", "encoder.module.weight"),
    ("module", "module"),
]


@pytest.mark.parametrize(("stored", "name"), NAMES)
def test_names_are_canonical(stored: str, name: str) -> None:
    assert canonical(stored) == name


def test_names_that_would_collide_stay(tmp_path: Path) -> None:
    save_file({"module.w": torch.ones(2), "w": torch.zeros(2)}, tmp_path / "x.safetensors")
    assert {entry.name for entry in open_checkpoint(tmp_path / "x.safetensors").entries} == {"module.w", "w"}


def _shards(folder: Path) -> Path:
    save_file({"a.weight": torch.eye(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b.weight": torch.eye(3), "stray": torch.ones(4)}, folder / "model-00002-of-00002.safetensors")
    index = {
        "metadata": {"total_size": 52},
        "weight_map": {"a.weight": "model-00001-of-00002.safetensors", "b.weight": "model-00002-of-00002.safetensors"},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_sharded_folder(tmp_path: Path) -> None:
    for path in (_shards(tmp_path), tmp_path / "model.safetensors.index.json"):
        checkpoint = open_checkpoint(path)
        assert [entry.name for entry in checkpoint.entries] == ["a.weight", "b.weight"]
        assert [(part.elements, part.reason) for part in checkpoint.left] == [(4, "in the shard but not in the index")]
        assert checkpoint.elements == 17


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    (_shards(tmp_path) / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing \(it holds b\.weight"):
        open_checkpoint(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    save_file({"other": torch.eye(2)}, _shards(tmp_path) / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.weight is missing from model-00001-of-00002\.safetensors"):
        open_checkpoint(tmp_path)


INDICES = [
    ('{"weight_map": {"a": "../secret.safetensors"}}', "not a file of its folder"),
    ('{"weight_map": {"a": "/etc/passwd"}}', "not a file of its folder"),
    ('{"weight_map": {"a": 3}}', "does not map names to names"),
    ('{"weight_map": {}}', "an index without tensors"),
    ('{"weight_map": []}', "not an index of shards"),
    ("{}", "not an index of shards"),
    ("[" * 100_000, "not an index of shards"),
    ("", "not an index of shards"),
]


@pytest.mark.parametrize(("text", "reason"), INDICES, ids=range(len(INDICES)))
def test_a_hostile_index_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path)


FOLDERS = [
    ([], "no checkpoint in this folder"),
    (["a.safetensors", "b.safetensors"], "several weight files and no index"),
    ([".metadata", "__0_0.distcp"], "dcp_to_torch_save"),
    (["x.safetensors.index.json", "y.safetensors.index.json"], "several checkpoints"),
]


@pytest.mark.parametrize(("names", "reason"), FOLDERS)
def test_folders_without_one_checkpoint(tmp_path: Path, names: list[str], reason: str) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path)


def test_a_folder_says_which_files_it_left(tmp_path: Path) -> None:
    save_file({"w": torch.eye(2)}, tmp_path / "best.safetensors")
    for name in ("epoch1.pth", "epoch2.pth"):
        _torch(tmp_path / name, {"w": torch.ones(2, 2)})
    (tmp_path / "config.json").write_text("{}")
    opened = open_checkpoint(tmp_path)
    assert [entry.name for entry in opened.entries] == ["w"] and opened.elements == 4
    assert [(part.name, part.elements) for part in opened.left] == [("epoch1.pth", 0), ("epoch2.pth", 0)]
    assert all("best.safetensors was taken" in part.reason for part in opened.left)
    assert open_checkpoint(tmp_path / "best.safetensors").left == ()


def test_a_folder_of_shards_leaves_only_what_is_no_shard(tmp_path: Path) -> None:
    _shards(tmp_path)
    _torch(tmp_path / "pytorch_model.bin", {"w": torch.ones(2, 2)})
    names = [part.name for part in open_checkpoint(tmp_path).left]
    assert "pytorch_model.bin" in names and not [
        name for name in names if name.startswith("model-") and ":" not in name
    ]


def test_two_tensors_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"two tensors are called 'a\.b'"):
        open_checkpoint(_torch(tmp_path / "x.pt", {"a.b": torch.ones(1), "a": {"b": torch.ones(2)}}))


def test_containers_that_refer_to_themselves_end(tmp_path: Path) -> None:
    loop: dict[str, object] = {"w": torch.eye(2)}
    loop["again"] = loop
    many: object = [torch.ones(2)]
    for _ in range(40):
        many = [many, many]
    for content in (loop, {"model": {"w": torch.eye(2)}, "bomb": many}):
        path = tmp_path / "x.pt"
        torch.save(content, path)
        assert sum(entry.elements for entry in open_checkpoint(path).entries) in {4, 6}


def test_pickles_are_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str, str]]:
            return (open, (str(marker), "w"))

    for legacy in (False, True):
        path = _torch(tmp_path / "x.pt", {"w": Hostile()}, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError, match=r"could run code .*open.*safetensors"):
            open_checkpoint(path)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Hostile(), protocol=2))
    with pytest.raises(CheckpointError, match="refused"):
        open_checkpoint(tmp_path / "plain.pkl")
    assert not marker.exists()
