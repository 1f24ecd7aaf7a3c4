"""The errors of attention workers."""

from workers.transport.errors import KvGone


class AttentionLost(KvGone):
    """An attention worker can no longer be worked with: what it holds cannot be attended to.

    Attributes:
        worker: the index of the attention worker in its replica.
        name: its name in the configuration, or its address.
        cause: one line that says why.
    """

    def __init__(self, worker: int, name: str, cause: str) -> None:
        self.worker = worker
        self.name = name
        self.cause = cause
        super().__init__(f"attention worker {name}: {cause}")


class AttentionRefused(AttentionLost):
    """An attention worker does not take a session, and would not take it again: a wrong secret, or an old epoch."""
