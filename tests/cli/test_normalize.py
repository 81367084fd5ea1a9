"""What `opnorm normalize` says of its work."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

from opnorm.cli import main


def _run(*arguments: Path | str) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


@pytest.mark.parametrize(("count", "said"), [(1, "1 weight divided;"), (2, "2 weights divided;")])
def test_the_summary_counts(tmp_path: Path, count: int, said: str) -> None:
    save_file({f"l{i}.weight": 2 * torch.eye(3) for i in range(count)}, tmp_path / "m.safetensors")
    assert said in _run("normalize", tmp_path / "m.safetensors", "-o", tmp_path / "d.safetensors")
    assert said.replace("divided;", "measured") in _run("audit", tmp_path / "m.safetensors")
    checked = _run("verify", tmp_path / "d.safetensors.certificate.json", "--weights", tmp_path / "d.safetensors")
    assert said.replace("divided;", "proved") in checked


def test_a_folder_says_which_files_it_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    save_file({"w": 2 * torch.eye(3)}, folder / "best.safetensors")
    for name in ("epoch1.pth", "epoch2.pth"):
        torch.save({"w": torch.eye(3)}, folder / name)
    audited = _run("audit", folder)
    assert "best.safetensors was taken" in audited and "epoch1.pth" in audited and "epoch2.pth" in audited
    assert "best.safetensors was taken" in _run("normalize", folder, "-o", tmp_path / "new.safetensors")
