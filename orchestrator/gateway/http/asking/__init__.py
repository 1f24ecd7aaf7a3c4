"""Reads the bodies of HTTP requests and makes requests of the public gRPC service of them. Pure."""
