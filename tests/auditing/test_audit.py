"""Audits of files and models against dense oracles: the numbers, the sums, and everything that is not measured."""

import math
import os
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import opnorm
from opnorm.auditing import Report, measure
from opnorm.errors import ArgumentError, CheckpointError

FOLDER = Path(
    os.environ.get("OPNORM_CHECKPOINTS", Path(__file__).resolve().parents[2].parent / "shared" / "checkpoints")
)
FILES = {"ccexam_mnist.pth": (4, 421_642), "ccexam_svhn.pth": (8, 815_920), "silero_vad_16k.safetensors": (8, 309_633)}


def _saved(folder: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, folder / "x.safetensors")
    return folder / "x.safetensors"


def _norm(matrix: Tensor) -> float:
    return float(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[0])


def _adds_up(report: Report) -> bool:
    return report.measured_elements + report.skipped_elements == report.elements


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_matrices_against_the_svd(tmp_path: Path, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {
        "fc.weight": torch.randn(40, 30),
        "tok_embeddings.weight": torch.randn(60, 8),
        "row.weight": torch.ones(1, 9),
    }
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    report = opnorm.audit(_saved(tmp_path, tensors))
    assert _adds_up(report)
    assert {row.name for row in report.rows} == set(tensors)
    for row in report.rows:
        values = np.linalg.svd(tensors[row.name].double().numpy(), compute_uv=False)
        assert row.lower <= values[0] * (1 + 1e-13)
        assert row.upper >= values[0] * (1 - 1e-13)
        assert row.gap <= 1e-6
        assert row.frobenius == pytest.approx(math.sqrt((values**2).sum()), rel=1e-12)
        assert row.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-5)
        assert row.dtype == str(dtype).removeprefix("torch.")
    assert sum(row.share for row in report.rows) == pytest.approx(1.0)


def test_a_kernel_bounds_the_convolution_of_every_size_and_stride(tmp_path: Path) -> None:
    torch.manual_seed(0)
    kernel = torch.randn(4, 3, 3, 3)
    (row,) = opnorm.audit(_saved(tmp_path, {"conv.weight": kernel})).rows
    for stride, padding, size in [(1, 1, 5), (2, 1, 6), (1, 2, 4), (1, 0, 7)]:
        eye = torch.eye(3 * size * size, dtype=torch.float64).reshape(-1, 3, size, size)
        matrix = nn.functional.conv2d(eye, kernel.double(), stride=stride, padding=padding).flatten(1)
        assert _norm(matrix) <= row.upper
    assert row.gap < 0.01
    assert "reflect" in row.note


def test_stacked_projections_and_experts_are_measured_one_by_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stacked, experts = torch.randn(18, 6), torch.randn(3, 4, 5)
    report = opnorm.audit(_saved(tmp_path, {"attn.in_proj_weight": stacked, "experts.w": experts}))
    found = {row.name: row for row in report.rows}
    wanted = {f"attn.in_proj_weight[{label}]": stacked[6 * i : 6 * i + 6] for i, label in enumerate("qkv")}
    wanted |= {f"experts.w[{i}]": experts[i] for i in range(3)}
    assert set(found) == set(wanted)
    assert _adds_up(report)
    for name, matrix in wanted.items():
        assert found[name].upper == pytest.approx(_norm(matrix), rel=1e-5)
        assert found[name].elements == matrix.numel()


def test_a_three_axis_tensor_is_not_read_as_one_matrix(tmp_path: Path) -> None:
    # eye(2) as 2 x 2 x 1: slices have norm 1, the reshaped matrix sqrt 2.
    report = opnorm.audit(_saved(tmp_path, {"w": torch.eye(2).reshape(2, 2, 1)}))
    assert [(item.kind, item.name) for item in report.skipped] == [("ambiguous", "w")]
    report = opnorm.audit(_saved(tmp_path, {"w": torch.eye(2).reshape(2, 2, 1)}), roles=["w=slices"])
    assert [row.upper for row in report.rows] == pytest.approx([1.0, 1.0], rel=1e-6)


NOT_MEASURED = [
    ("nan", torch.tensor([[1.0, math.nan], [0.0, 1.0]]), "nonfinite", "1 NaN and 0 infinite"),
    ("inf", torch.tensor([[math.inf, -math.inf], [0.0, 1.0]]), "nonfinite", "0 NaN and 2 infinite"),
    ("nan in float64", torch.tensor([[math.nan]], dtype=torch.float64), "nonfinite", "1 NaN"),
    ("bfloat16 inf", torch.tensor([[math.inf]], dtype=torch.bfloat16), "nonfinite", "1 infinite"),
    ("integers", torch.ones(2, 2, dtype=torch.int32), "dtype", "integers"),
    ("fp8", torch.ones(2, 2).to(torch.float8_e4m3fn), "dtype", "low-precision"),
    ("mask", torch.ones(2, 2, dtype=torch.bool), "dtype", "mask"),
    ("zero size", torch.zeros(0, 5), "empty", "no elements"),
    ("zero-size integers", torch.zeros(0, 5, dtype=torch.int32), "empty", "no elements"),
    ("vector", torch.ones(5), "vector", "not a matrix"),
]


@pytest.mark.parametrize(
    ("tensor", "kind", "reason"), [case[1:] for case in NOT_MEASURED], ids=[c[0] for c in NOT_MEASURED]
)
def test_what_is_not_measured_is_listed_with_its_reason(tmp_path: Path, tensor: Tensor, kind: str, reason: str) -> None:
    report = opnorm.audit(_saved(tmp_path, {"x.weight": tensor, "fc.weight": torch.eye(2)}), fail_on=["upper>5"])
    assert [row.name for row in report.rows] == ["fc.weight"]
    (item,) = report.skipped
    assert (item.kind, item.elements) == (kind, tensor.numel())
    assert reason in item.reason
    assert _adds_up(report)
    assert report.ok is (kind != "nonfinite")


@pytest.mark.parametrize("scale", [0.0, 1e-40, 1e-300, 1e300])
def test_extreme_scales(tmp_path: Path, scale: float) -> None:
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64) * scale
    (row,) = opnorm.audit(_saved(tmp_path, {"w": matrix})).rows
    assert row.upper == pytest.approx(3 * scale, rel=1e-6)
    assert row.frobenius == pytest.approx(math.sqrt(10) * scale, rel=1e-12)
    assert row.stable_rank == pytest.approx(10 / 9 if scale else 0.0, rel=1e-5)


def test_ties_and_optimizer_state_are_counted_once_and_left(tmp_path: Path) -> None:
    shared = torch.randn(6, 4)
    content = {"model": {"embed.weight": shared, "head.weight": shared}, "optimizer": {"m": torch.ones(7)}}
    torch.save(content, tmp_path / "x.pt")
    report = opnorm.audit(tmp_path / "x.pt")
    assert [(row.name, row.aliases) for row in report.rows] == [("embed.weight", ("head.weight",))]
    assert (report.elements, report.taken) == (31, "model")
    assert [(item.name, item.kind, item.elements) for item in report.skipped] == [("optimizer", "left", 7)]


def test_one_tensor_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Watches the real computation: every tensor that was loaded before is gone when the next one is measured.
    loaded: list[weakref.ref[Tensor]] = []
    real = measure.norm

    def watched(x: Tensor, **options: object) -> object:
        assert sum(ref() is not None for ref in loaded) == 0
        loaded.append(weakref.ref(x))
        return real(x, **options)

    monkeypatch.setattr(measure, "norm", watched)
    opnorm.audit(_saved(tmp_path, {f"{i}.weight": torch.eye(3) for i in range(4)}))
    assert len(loaded) == 4


def test_a_model_knows_its_strides_and_groups(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.Linear(3, 2))
    report = opnorm.audit(model)
    with torch.no_grad():
        eye = torch.eye(4 * 36).reshape(-1, 4, 6, 6)
        assert _norm(model[0](eye).flatten(1)) <= report.rows[0].upper
    # Read as one group, as from a file, the depthwise kernel has the norm of all its channels together.
    assert report.rows[0].upper < 0.95 * opnorm.audit(_saved(tmp_path, {"conv.weight": model[0].weight})).rows[0].upper
    assert report.format == "module"
    assert _adds_up(report)


def test_a_parametrized_model_is_measured_as_it_is_in_evaluation_mode() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(5, 5))
    (row,) = opnorm.audit(layer).rows
    assert row.upper == pytest.approx(1.0, rel=1e-5)


def test_a_layer_without_a_bound_for_every_size_is_listed() -> None:
    report = opnorm.audit(nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect", bias=False), fail_on=["upper>1e9"])
    assert [item.kind for item in report.skipped] == ["failed"]
    assert not report.ok


BAD = [
    ({"rtol": 0.0}, "rtol"),
    ({"rtol": math.nan}, "rtol"),
    ({"rtol": math.inf}, "rtol"),
    ({"guarantee": "sure"}, "guarantee is one of"),
    ({"fail_on": ["upper"]}, "FIELD SIGN NUMBER"),
    ({"roles": ["x"]}, "PATTERN=ROLE"),
]


@pytest.mark.parametrize(("options", "reason"), BAD)
def test_arguments_that_cannot_be_used(tmp_path: Path, options: dict[str, object], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        opnorm.audit(_saved(tmp_path, {"w": torch.eye(2)}), **options)


def test_other_sources_are_refused() -> None:
    with pytest.raises(ArgumentError, match="cannot audit a int"):
        opnorm.audit(3)
    with pytest.raises(CheckpointError, match="no such file"):
        opnorm.audit("nowhere.safetensors")


@pytest.mark.parametrize("guarantee", ["probable", "estimate"])
def test_other_guarantees(tmp_path: Path, guarantee: str) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(30, 20)
    (row,) = opnorm.audit(_saved(tmp_path, {"w": matrix}), guarantee=guarantee).rows
    assert row.lower <= _norm(matrix) * (1 + 1e-12)
    assert row.upper == pytest.approx(_norm(matrix), rel=1e-2)


@pytest.mark.data
@pytest.mark.parametrize("name", FILES)
def test_real_checkpoints(name: str) -> None:
    if not (FOLDER / name).exists():
        pytest.skip(f"no {name} in {FOLDER}; set OPNORM_CHECKPOINTS to the folder that has it")
    report = opnorm.audit(FOLDER / name)
    rows, elements = FILES[name]
    assert (len(report.rows), report.elements) == (rows, elements)
    assert _adds_up(report)
    assert {row.enclosure.guarantee for row in report.rows} == {"proved"}
    assert max(row.gap for row in report.rows) < 0.01
    assert not {"failed", "ambiguous", "nonfinite"} & set(report.kinds)
