"""What goes wrong between ranks."""

from placement.errors import HeterodyneError


class PeerFailed(HeterodyneError):
    """Another rank of the replica can no longer be worked with: the replica has failed.

    Attributes:
        rank: of that rank.
        cause: one line; its own words where it sent them.
    """

    def __init__(self, rank: int, cause: str) -> None:
        self.rank = rank
        self.cause = cause
        super().__init__(f"rank {rank}: {cause}")


class BadFrame(HeterodyneError):
    """What arrived is no frame of this replica's, or is damaged."""
