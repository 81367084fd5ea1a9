"""The Python of the README and of the guides runs as it stands, page by page, each block after those before it."""

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SEVERAL_PROCESSES = ROOT / "docs" / "guides" / "distributed.md"
PAGES = [
    path
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if BLOCK.search(path.read_text()) and path != SEVERAL_PROCESSES
]

READER_HAS = """
import opnorm, torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

torch.manual_seed(0)
model = nn.Sequential()
model.add_module("body", nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten()))
model.add_module("head", nn.Linear(144, 10))
model.eval()
x = example_input = torch.randn(16, 1, 8, 8)
y = torch.arange(16) % 10
optimizer = torch.optim.Adam(model.parameters())
save_file(model.state_dict(), "model.safetensors")
"""
"""What a guide takes for granted, so that its blocks are as short as a reader's own lines."""


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    if page.parent.name == "guides":
        exec(READER_HAS, names)
        if page.stem == "migration":
            exec("nn.utils.parametrizations.spectral_norm(model.head)", names)
    for block in BLOCK.findall(page.read_text()):
        if block.startswith(">>>"):
            lines = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), 0)
            assert doctest.DocTestRunner(verbose=False).run(lines).failed == 0
        else:
            exec(compile(block, page.name, "exec"), names)


def test_the_script_for_several_processes_runs(tmp_path: Path) -> None:
    page = SEVERAL_PROCESSES.read_text()
    (told,) = re.findall(r"`torchrun (.*) script\.py`", page)
    (tmp_path / "script.py").write_text("\n".join(BLOCK.findall(page)))
    command = [sys.executable, "-m", "torch.distributed.run", *told.split(), "script.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("down.weight/norm") == 4, done.stdout
