"""The command ``replay``: sends a recorded trace of requests to a service at the recorded times, and measures."""
