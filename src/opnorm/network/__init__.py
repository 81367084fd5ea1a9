"""From layers to the network: naive rules, the covariance calculus, and their proofs."""
