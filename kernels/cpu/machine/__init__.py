"""Compiles code at run time, and runs it on a team of threads."""
