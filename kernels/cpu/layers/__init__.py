"""Runs a decoder's layers as one compiled program."""
