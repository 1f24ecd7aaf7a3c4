"""Runs a deployment: reads its configuration, checks it, launches workers, supervises them, serves clients.

Owns everything that touches the outside: files, sockets, Ray, the terminal. Never imports torch.
"""
