"""The launcher: joins or starts Ray, places ranks, and keeps each worker process under a small Ray actor."""
