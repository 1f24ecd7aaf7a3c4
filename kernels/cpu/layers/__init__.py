"""A decoder's layers as one compiled program."""
