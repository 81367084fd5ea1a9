"""From layers to the network: naive rules, the covariance calculus, and their proofs."""

from opnorm.network.bound import NetworkBound, NodeBound, lipschitz
from opnorm.network.rules import Builder, register_rule

__all__ = ["Builder", "NetworkBound", "NodeBound", "lipschitz", "register_rule"]
