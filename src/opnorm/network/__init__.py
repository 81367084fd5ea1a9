"""From layers to the network: naive rules, the covariance calculus, and their proofs."""

from opnorm.network.rules import Builder, register_rule

__all__ = ["Builder", "register_rule"]
