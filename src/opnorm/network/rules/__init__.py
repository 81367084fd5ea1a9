"""One rule for each operation of an exported graph: how it becomes steps of a program."""

from opnorm.network.rules import (  # noqa: F401 - importing a family registers its rules
    activation,
    attention,
    linear,
    normalization,
    pooling,
    products,
    reductions,
    refused,
    shape,
    sums,
)
from opnorm.network.rules.registry import Builder, Rule, program_of, register_rule

__all__ = ["Builder", "Rule", "program_of", "register_rule"]
