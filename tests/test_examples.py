"""The examples run, each where what it is an example for is installed."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import opnorm

FOLDER = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> ModuleType:
    spec = spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    # As a script, whose own folder comes first on the path.
    script = [sys.executable, str(FOLDER / "tensorboard_logging.py"), "3"]
    env = os.environ | {"PYTHONPATH": str(FOLDER.parent / "src")}
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    (events,) = tmp_path.glob("runs/*/events.out.tfevents.*")
    assert b"3.weight/norm" in events.read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    callback = loaded("lightning_callback").SpectralNorms(every=2)

    class Model(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(opnorm.spectral_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 1))

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 4)), 4)
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[callback], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(Model(), data)
    assert float(trainer.callback_metrics["net.0.weight/norm"]) == pytest.approx(1.0, rel=1e-2)
    assert float(trainer.callback_metrics["net.2.weight/stable_rank"]) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    cap = 0.2
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=32
    )
    model = transformers.BertForSequenceClassification(config)
    data = [{"input_ids": torch.arange(5) + i, "labels": torch.tensor(i % 2)} for i in range(16)]
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, logging_steps=1, report_to=[], use_cpu=True, save_strategy="no",
        per_device_train_batch_size=4, learning_rate=1e-3, disable_tqdm=True,
    )  # fmt: skip
    callback = loaded("transformers_callback").SpectralCap(model, cap)
    logged: list[dict[str, float]] = []

    class Seen(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_log(self, args: object, state: object, control: object, logs: dict[str, float], **_: object) -> None:
            logged.append(dict(logs))

    transformers.Trainer(model=model, args=options, train_dataset=data, callbacks=[callback, Seen()]).train()
    embedding = "norm/bert.embeddings.position_embeddings.weight"
    assert logged[0][embedding] > cap  # before the first division, which the logs are of
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            assert torch.linalg.matrix_norm(layer.weight, 2) <= cap * 1.05
