"""How to choose the multipliers: each choice is feasible, and the best one is kept."""
