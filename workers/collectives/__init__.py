"""Sums and exchanges of tensors among the ranks of a stage."""
