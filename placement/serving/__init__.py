"""Decides what a replica does next, and where a request goes."""
