"""Tensor maths: a plain torch reference for every operation, and fast variants beside it."""

__version__ = "0.0.0"
