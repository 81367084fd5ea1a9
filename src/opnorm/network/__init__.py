"""From layers to the network: naive rules, the covariance calculus, and their proofs."""

from opnorm.network.bound import NetworkBound, NodeBound, lipschitz
from opnorm.network.region import Ball, Box, NormBall
from opnorm.network.rules import Builder, register_rule

__all__ = ["Ball", "Box", "Builder", "NetworkBound", "NodeBound", "NormBall", "lipschitz", "register_rule"]
