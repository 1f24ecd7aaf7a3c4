"""The front of the service: admits requests, routes them, streams text, remembers what is unfinished."""
