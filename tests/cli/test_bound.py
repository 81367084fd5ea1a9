"""`opnorm bound` and `opnorm verify` of what it writes, as a person or a pipeline runs them."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import opnorm
from cli import models
from cli.test_audit import on_terminal
from opnorm.cli import main


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def bound(factory: str, *arguments: object) -> Result:
    size = "2x4x4" if factory == "cnn" else "6"
    return run("bound", f"cli.models:{factory}", "--input", size, "--method", "fast", *arguments)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    save_file({k: 2 * v for k, v in models.mlp().state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_the_table_goes_to_stdout_and_nothing_else_does() -> None:
    result = bound("mlp")
    assert result.exit_code == 0
    assert "0: linear" in result.stdout
    assert "<= Lipschitz constant <=" in result.stdout
    assert result.stderr == "running the code of cli.models:mlp\n"


def test_weights_of_safetensors_and_torch_files_are_those_that_are_bounded(weights: Path, tmp_path: Path) -> None:
    state = {f"module.{k}": 2 * v for k, v in models.mlp().state_dict().items()}
    torch.save({"model": state, "epoch": 3}, tmp_path / "w.pt")
    uppers = []
    for arguments in ((), ("--weights", weights), ("--weights", tmp_path / "w.pt")):
        result = bound("mlp", *arguments, "--method", "naive", "--json", "-")
        assert result.exit_code == 0, result.stderr
        uppers.append(json.loads(result.stdout)["upper"])
    assert uppers[1] == uppers[2] == pytest.approx(4 * uppers[0], rel=1e-6)


@pytest.mark.parametrize("region", [("--norm-ball", 1), ("--box", -0.01, 0.01), ("--ball", 0.01, "--center", "c")])
def test_a_bound_on_a_region_is_no_worse(region: tuple[object, ...], tmp_path: Path) -> None:
    save_file({"x": torch.ones(6)}, tmp_path / "c")
    region = tuple(tmp_path / "c" if part == "c" else part for part in region)
    local, anywhere = (json.loads(bound("mlp", *more, "--json", "-").stdout) for more in (region, ()))
    assert 0 < local["lower"] <= local["upper"] <= anywhere["upper"]
    assert any("region" in remark for remark in local["remarks"])


def test_files_are_written_and_the_certificate_holds(weights: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("b.json", "b.html", "net.cert")}
    outputs = ("--json", files["b.json"], "--html", files["b.html"], "--certificate", files["net.cert"])
    result = bound("mlp", "--weights", weights, *outputs)
    assert result.exit_code == 0
    assert all(f"wrote {path}" in result.stderr for path in files.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.html", "b.json", "net.cert", "w.safetensors"]
    data = json.loads(files["b.json"].read_text())
    assert data["schema"] == "opnorm.bound/1"
    assert [node["kind"] for node in data["nodes"]] == ["input", "linear", "activation", "linear"]
    assert "0: linear" in files["b.html"].read_text()
    held = run("verify", files["net.cert"], "--weights", weights, "--steps")
    assert held.exit_code == 0
    assert held.stdout.startswith("holds: the Lipschitz constant is at most ")
    assert "step 2: relu with slopes in [0, 1] of 1 -> 8  (1: relu)" in held.stdout
    assert "taken on trust: the steps" in held.stdout
    compared = run("verify", files["net.cert"], "--weights", weights, "--model", "cli.models:mlp")
    assert (compared.exit_code, "taken on trust" in compared.stdout) == (0, False)


def test_what_does_not_hold_is_exit_code_one(weights: Path, tmp_path: Path) -> None:
    assert bound("mlp", "--weights", weights, "--certificate", tmp_path / "net.cert").exit_code == 0
    save_file(models.mlp().state_dict(), tmp_path / "other.safetensors")
    result = run("verify", tmp_path / "net.cert", "--weights", tmp_path / "other.safetensors")
    assert (result.exit_code, result.stdout.count("\n")) == (1, 1)
    assert result.stdout.startswith("does not hold: the weight '0.weight' is not the one")
    other = run("verify", tmp_path / "net.cert", "--weights", weights, "--model", "cli.models:gelu")
    assert (other.exit_code, "is not of this model" in other.stdout) == (1, True)


@pytest.mark.parametrize(
    ("region", "said"),
    [
        (
            ("--box", -0.01, 0.01),
            "inputs in the box that the certificate states (-0.01, -0.01, -0.01, -0.01, ...; shape 6",
        ),
        (
            ("--ball", 0.01, "--center", "c"),
            "inputs within 0.01 of the centre that the certificate states (1, 1, 1, 1, ",
        ),
        (("--norm-ball", 0.02), "inputs of norm at most 0.02"),
    ],
)
def test_a_certificate_on_a_region_says_which(region: tuple[object, ...], said: str, tmp_path: Path) -> None:
    save_file({"x": torch.ones(6)}, tmp_path / "c")
    region = tuple(tmp_path / "c" if part == "c" else part for part in region)
    assert bound("mlp", *region, "--certificate", tmp_path / "net.cert").exit_code == 0
    held = run("verify", tmp_path / "net.cert", "--model", "cli.models:mlp")
    assert held.exit_code == 0
    assert f"\nonly for {said}" in held.stdout


def test_the_weights_of_a_model_are_those_that_it_returns(weights: Path, tmp_path: Path) -> None:
    certificate = tmp_path / "net.cert"
    assert f"verify {certificate} --model cli.models:mlp\n" in bound("mlp", "--certificate", certificate).stderr
    held = run("verify", certificate, "--model", "cli.models:mlp")
    assert (held.exit_code, "taken on trust" in held.stdout) == (0, False)
    assert "taking the weights that cli.models:mlp returns" in held.stderr
    assert bound("mlp", "--weights", weights, "--certificate", certificate).exit_code == 0
    other = run("verify", certificate, "--model", "cli.models:mlp")
    assert (other.exit_code, "what cli.models:mlp returns; --weights gives others" in other.stdout) == (1, True)
    neither = run("verify", certificate)
    assert (neither.exit_code, "--model MODULE:FACTORY" in neither.stderr) == (2, True)


@pytest.mark.parametrize(("rule", "code"), [("upper>100", 0), ("upper>0.01", 1), ("gap>=0", 1), ("product<1e-9", 0)])
def test_rules_decide_the_exit_code(rule: str, code: int) -> None:
    result = bound("mlp", "--fail-on", rule)
    assert (result.exit_code, "violated: " in result.stderr) == (code, bool(code))


def test_progress_is_told_in_order_and_shown_on_a_terminal_only() -> None:
    told: list[tuple[int, int, str]] = []
    opnorm.lipschitz(models.mlp().eval(), torch.randn(2, 6), method="fast", progress=lambda *what: told.append(what))
    shares = [done / total for done, total, _ in told]
    assert shares == sorted(shares)
    assert 0 <= shares[0] < shares[-1] < 1
    assert any("proving stage" in what for _, _, what in told)
    seen = on_terminal(["bound", "cli.models:mlp", "--input", "6", "--method", "fast"], PYTHONPATH="src:tests")
    assert "reading the model" in seen
    assert "Lipschitz constant" in seen


BAD = {
    "no such module": (("bound", "nothing_here:make", "--input", "6"), "No module named"),
    "no such factory": (("bound", "cli.models:nothing", "--input", "6"), "has no attribute"),
    "no factory": (("bound", "cli.models", "--input", "6"), "MODULE:FACTORY"),
    "raises": (("bound", "cli.models:raises", "--input", "6"), "ValueError: two lines"),
    "leaves": (("bound", "cli.models:leaves", "--input", "6"), "SystemExit"),
    "no module": (("bound", "cli.models:no_module", "--input", "6"), "returned int"),
    "no shape": (("bound", "cli.models:mlp", "--input", "3xx"), "the shape of one sample"),
    "wrong shape": (("bound", "cli.models:mlp", "--input", "7"), "does not take the example input"),
    "NaN": (("bound", "cli.models:nan", "--input", "6"), "NaN"),
    "unknown operation": (("bound", "cli.models:Cumulative", "--input", "6"), "aten.cumprod.default"),
    "mixes samples": (("bound", "cli.models:Mixing", "--input", "6"), "samples"),
    "rule": (("bound", "cli.models:mlp", "--input", "6", "--fail-on", "share>1"), "upper, lower, product, gap"),
    "two regions": (("bound", "cli.models:mlp", "--input", "6", "--norm-ball", "1", "--box", "0", "1"), "one of them"),
    "no center": (("bound", "cli.models:mlp", "--input", "6", "--ball", "1"), "go together"),
    "empty box": (("bound", "cli.models:mlp", "--input", "6", "--box", "1", "0"), "the box is empty"),
    "method": (("bound", "cli.models:mlp", "--input", "6", "--method", "magic"), "is not one of"),
    "budget": (("bound", "cli.models:mlp", "--input", "6", "--time-budget", "0"), "time-budget"),
    "missing weights": (("bound", "cli.models:mlp", "--input", "6", "--weights", "none.pt"), "none.pt"),
    "unbounded": (("bound", "cli.models:Square", "--input", "6"), "the slope of x^2 is unbounded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    arguments, said = BAD[name]
    files = ("--json", tmp_path / "b.json", "--html", tmp_path / "b.html", "--certificate", tmp_path / "c")
    result = run(*arguments, *files)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in " ".join(result.stderr.split())
    assert sum(line.startswith(("opnorm: ", "Error: ")) for line in result.stderr.splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def _reshaped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"0.weight": state["0.weight"].reshape(6, 8).contiguous()}


WEIGHTS = {
    "one is missing": (lambda s: {k: v for k, v in s.items() if k != "2.bias"}, "has no weight '2.bias'"),
    "another shape": (_reshaped, "has shape (6, 8)"),
    "more digits": (lambda s: {k: v.double() + 1e-12 for k, v in s.items()}, "would round it"),
    "NaN": (lambda s: s | {"2.weight": torch.full((3, 8), float("nan"))}, "NaN"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name: str, tmp_path: Path) -> None:
    change, said = WEIGHTS[name]
    save_file(change(models.mlp().state_dict()), tmp_path / "w.safetensors")
    result = bound("mlp", "--weights", tmp_path / "w.safetensors", "--json", tmp_path / "b.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_a_model_that_does_nothing_has_the_constant_one() -> None:
    assert json.loads(bound("empty", "--json", "-").stdout)["upper"] == pytest.approx(1, rel=1e-8)


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    result = bound("mlp", "--html", tmp_path / "nowhere" / "b.html")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "running" not in result.stderr
