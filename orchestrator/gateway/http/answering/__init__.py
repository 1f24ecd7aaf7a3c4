"""Writes the events of an answer as the objects of the OpenAI API. Pure."""
