"""How code is compiled, and run by a team of threads."""
