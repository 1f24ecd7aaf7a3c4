"""Connections between the ranks of a replica: frames, links, the mesh and the pulse."""
