"""Checks what a client asks for."""
