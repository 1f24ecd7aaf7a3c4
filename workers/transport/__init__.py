"""Bytes between the ranks of a replica: framed TCP, checked and fenced, with a deadline on every wait."""
