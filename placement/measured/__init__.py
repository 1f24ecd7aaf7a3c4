"""Holds what was measured of devices and links, and makes decisions that follow from it alone."""
