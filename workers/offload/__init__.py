"""Computes the layers of a model rank whose keys and values attention workers hold."""
