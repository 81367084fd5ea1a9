"""What a model in memory knows and a state dict does not: strides, groups, paddings, and how weights are made."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from opnorm.checkpoint import Entry
from opnorm.checkpoint.names import canonical
from opnorm.layers import read_weight, to_operator
from opnorm.operators import LinearOperator


@dataclass(frozen=True)
class Geometry:
    """The modules of a model by their canonical paths; none for a file."""

    modules: Mapping[str, nn.Module]

    @staticmethod
    def of(model: nn.Module) -> "Geometry":
        """Collect the modules of `model`, the model itself under an empty path."""
        return Geometry({canonical(f"{path}.").rstrip("."): module for path, module in model.named_modules()})

    def knows(self, entry: Entry) -> bool:
        """Whether the module that uses the entry is known."""
        return entry.name.rpartition(".")[0] in self.modules

    def operator(self, entry: Entry) -> LinearOperator | None:
        """Return what the entry's layer applies, for every input size; None where only the tensor is known.

        Raises:
            UnsupportedLayerError: if the layer changes what its class does.
            InputShapeError: if no bound holds for every input size, as with reflect padding.
        """
        path, _, leaf = entry.name.rpartition(".")
        module = self.modules.get(path)
        return to_operator(module) if module is not None and leaf == "weight" else None

    def weight(self, entry: Entry) -> Tensor:
        """Return the weight in use: computed by its module where that is known, else what is stored."""
        path, _, leaf = entry.name.rpartition(".")
        return read_weight(self.modules[path], leaf) if path in self.modules else entry.load()
