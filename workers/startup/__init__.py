"""Prepares a worker to serve: it checks the load, reads the checkpoint, warms up, and measures the device."""
