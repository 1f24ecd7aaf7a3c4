"""The variants of the operations that are compiled for CPUs."""
