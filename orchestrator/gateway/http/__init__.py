"""Serves the OpenAI-compatible HTTP API over the same requests, generator and limits as the gRPC service."""
