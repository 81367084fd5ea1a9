"""A model as a typed graph of operations on one sample, with the names of its weights and its modules."""

from opnorm.graph.export import export
from opnorm.graph.types import Graph, Node, Ref, Weight

__all__ = ["Graph", "Node", "Ref", "Weight", "export"]
