"""The controller: a pure state machine (``state``) inside a Ray actor (``actor``) that others watch (``control``)."""
