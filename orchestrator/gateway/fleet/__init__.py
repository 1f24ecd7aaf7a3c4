"""Keeps the replicas: their leaders' streams, the journal of requests, and admission."""
