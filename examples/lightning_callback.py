"""Log spectral norms from a Lightning trainer: `Trainer(callbacks=[SpectralNorms(every=100)])`."""

from typing import Any

import lightning.pytorch as pl

import opnorm


class SpectralNorms(pl.Callback):
    """Logs the norm, the gap of the estimate and the stable rank of every weight."""

    def __init__(self, every: int = 100) -> None:
        self.every = every
        self.monitor: opnorm.Monitor | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.monitor = opnorm.Monitor(pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.monitor is not None and trainer.global_step % self.every == 0:
            pl_module.log_dict(self.monitor())
