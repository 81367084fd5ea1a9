"""Cap and log spectral norms in a transformers Trainer: `Trainer(callbacks=[SpectralCap(model, 4.0)])`."""

from typing import Any

from torch import nn
from transformers import TrainerCallback

import opnorm


class SpectralCap(TrainerCallback):
    """Divides every weight whose norm is above a cap, after each optimizer step, and logs the norms before that."""

    def __init__(self, model: nn.Module, cap: float) -> None:
        self.projector = opnorm.Projector(model, cap, mode="clip")
        self.norms: dict[str, float] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.norms = self.projector.step_()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None:
            logs.update({f"norm/{name}": value for name, value in self.norms.items()})
