"""Describes a model: its sizes and its tensors, and reads both from config.json."""
