"""The version of Heterodyne. It is part of the code, as what is installed need not be the code that runs."""

VERSION = "0.1.0"
"""The version in ``pyproject.toml``, which a test compares with this one."""
