"""The group of commands: fast help, lazy imports, and exit codes."""

import os
import subprocess
import sys
from importlib import import_module

import click
import pytest
from click.testing import CliRunner

import opnorm
from opnorm.cli import main
from opnorm.cli.main import COMMANDS
from opnorm.errors import CheckpointError


def _python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)])
def test_help_imports_no_torch(arguments: list[str]) -> None:
    done = _python(
        f"import sys; from opnorm.cli import main\n"
        f"try: main({arguments!r}, prog_name='opnorm')\n"
        f"except SystemExit: pass\n"
        f"print(sorted({{'torch', 'numpy', 'matplotlib', 'rich'}} & set(sys.modules)), file=sys.stderr)"
    )
    assert done.stderr.strip() == "[]"
    assert done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_of_the_table_is_there(name: str) -> None:
    module, function = COMMANDS[name][0].split(":")
    assert isinstance(getattr(import_module(module), function), click.Command)
    assert name in CliRunner().invoke(main, ["--help"]).stdout


def test_version() -> None:
    assert CliRunner().invoke(main, ["--version"]).stdout == f"opnorm {opnorm.__version__}\n"


def _raising(error: BaseException) -> click.Command:
    @click.command()
    def command() -> None:
        raise error

    return command


ERRORS = [
    (CheckpointError("x.pt: two\nlines \x1b[31m"), 2, "opnorm: x.pt: two lines \\x1b[31m\n"),
    (KeyboardInterrupt(), 130, "opnorm: interrupted; nothing was written\n"),
    (RuntimeError("oh"), 2, "this is a bug in opnorm"),
    (MemoryError(), 2, "this is a bug in opnorm"),
]


@pytest.mark.parametrize(("error", "code", "said"), ERRORS, ids=lambda value: type(value).__name__)
def test_a_failure_is_never_exit_code_one(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = import_module(COMMANDS["audit"][0].split(":")[0])
    monkeypatch.setattr(module, "audit", _raising(error))
    result = CliRunner().invoke(main, ["audit"])
    assert result.exit_code == code
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("arguments", [["nonsense"], ["audit"], ["audit", "x", "--top", "0"], ["audit", "--bogus"]])
def test_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2
