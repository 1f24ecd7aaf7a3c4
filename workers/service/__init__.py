"""Serves a worker process over gRPC."""
