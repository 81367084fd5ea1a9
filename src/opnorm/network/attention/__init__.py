"""Attention on a region: recognised in every form that models write it in, and bounded as a whole."""
