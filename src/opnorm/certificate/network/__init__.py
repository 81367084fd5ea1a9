"""The certificate of a network's Lipschitz bound: what the network is, what was chosen, and its proof."""
