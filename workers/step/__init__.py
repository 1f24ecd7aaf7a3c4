"""Defines a step: what it computes, how it is laid out and sent, and how it is run."""
