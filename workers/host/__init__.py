"""Deals with the machine under a worker: its device and its cores."""
