"""The gRPC service of a worker process."""
