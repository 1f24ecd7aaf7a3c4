"""Computes the model: the decoder, its weights, its KV cache, and the protocol of ranks that compute it together."""
