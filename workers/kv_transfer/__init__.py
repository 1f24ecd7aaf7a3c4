"""Sends keys and values to the ranks of other replicas, and receives them from there."""
