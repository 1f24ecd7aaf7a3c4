"""Turns what a replica computes into the client's messages."""
