"""Decides who holds what."""
