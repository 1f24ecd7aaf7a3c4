"""Reads calls of tools out of what models write, each family in its own form. Pure."""
