"""A replica of several ranks: who belongs to it, and who does what in a step."""
