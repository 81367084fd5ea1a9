"""`opnorm audit` as a person or a pipeline runs it: streams, exit codes, files."""

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

from opnorm.cli import main

HOSTILE = "evil\x1b[2J<script>alert(1)</script>.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"fc.weight": 3 * torch.eye(4), "fc.bias": torch.ones(4), HOSTILE: torch.eye(2)}
    save_file(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def _audit(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["audit", *map(str, arguments)])


def test_the_table_goes_to_stdout_and_nothing_else_does(checkpoint: Path) -> None:
    result = _audit(checkpoint)
    assert result.exit_code == 0
    assert "fc.weight" in result.stdout
    assert "a bias: not a matrix" in result.stdout
    assert "2 weights measured" in result.stdout.splitlines()[-1]
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


RULES = [(["upper>10"], 0), (["upper>2"], 1), (["upper>10", "gap>1e-3"], 0), (["upper>10", "stable_rank>1"], 1)]


@pytest.mark.parametrize(("rules", "code"), RULES)
def test_rules_decide_the_exit_code(checkpoint: Path, rules: list[str], code: int) -> None:
    result = _audit(checkpoint, *(part for rule in rules for part in ("--fail-on", rule)))
    assert result.exit_code == code
    assert ("violated: " in result.stderr) is bool(code)


@pytest.mark.parametrize("arguments", [["--fail-on", "upper"], ["--rtol", "-1"], ["--role", "x"], ["--part", "ema"]])
def test_options_that_cannot_be_used(checkpoint: Path, arguments: list[str]) -> None:
    result = _audit(checkpoint, *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("opnorm: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_files_that_cannot_be_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    result = _audit(tmp_path / "x.pt")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_json_on_stdout_is_all_of_stdout(checkpoint: Path) -> None:
    result = _audit(checkpoint, "--json", "-", "--fail-on", "upper>2")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["schema"], data["ok"]) == (1, "opnorm.audit/1", False)
    assert data["measured_elements"] + data["skipped_elements"] == data["elements"] == 24
    assert "2 weights measured" in result.stderr


def test_json_and_html_files(checkpoint: Path, tmp_path: Path) -> None:
    result = _audit(checkpoint, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert result.exit_code == 0
    assert {row["name"] for row in json.loads((tmp_path / "r.json").read_text())["rows"]} == {"fc.weight", HOSTILE}
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page
    assert "fc.weight" in page.replace("<wbr>", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "x.safetensors"]


def test_an_output_that_cannot_be_written_is_refused_first(checkpoint: Path, tmp_path: Path) -> None:
    result = _audit(checkpoint, "--html", tmp_path / "nowhere" / "r.html")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no such folder" in result.stderr


def test_a_part_and_a_role(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.eye(2)}, "ema": {"ups": torch.ones(2, 3, 4)}}, tmp_path / "x.pt")
    result = _audit(tmp_path / "x.pt", "--part", "ema", "--role", "ups=conv")
    assert result.exit_code == 0
    assert "taken: ema" in result.stdout
    assert "conv1d" in result.stdout


def on_terminal(arguments: list[str], **environment: str) -> str:
    """Run with stdout and stderr on a pseudo-terminal and return what appeared on it."""
    leader, follower = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
    with subprocess.Popen([sys.executable, "-m", "opnorm", *arguments], stdout=follower, stderr=follower, env=env):
        os.close(follower)
        seen = b""
        while True:
            try:
                piece = os.read(leader, 65536)
            except OSError:  # how Linux says that the other end is closed
                break
            if not piece:
                break
            seen += piece
    os.close(leader)
    return seen.decode()


def test_a_terminal_gets_progress_and_colours_unless_refused(checkpoint: Path) -> None:
    arguments = ["audit", str(checkpoint), "--fail-on", "upper>2"]
    plain, colourful = on_terminal(arguments, NO_COLOR="1"), on_terminal(arguments)
    assert "\x1b[31m" in colourful
    assert "\x1b[31m" not in plain
    assert "opening" in colourful
    assert "\x1b[2J" not in colourful
