"""Turns what a replica computes into the events that a client is sent."""
