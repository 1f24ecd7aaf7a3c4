"""Converts messages to the types of placement and back, for both ends of a wire."""
