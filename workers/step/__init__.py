"""A step: what it computes, how it is laid out, sent, and run."""
