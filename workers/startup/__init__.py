"""What a worker does before it serves: checks, reading the checkpoint, loading, warming up, measuring its speed."""
