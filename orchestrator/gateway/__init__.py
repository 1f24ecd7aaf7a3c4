"""The front of the service. Admits requests, routes them, streams text and remembers what is unfinished."""
