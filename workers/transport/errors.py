"""The errors of connections between ranks, and the texts that several modules raise alike."""

from placement.errors import HeterodyneError


class PeerFailed(HeterodyneError):
    """Another rank can no longer be worked with, so the replica has failed.

    Attributes:
        rank: the rank in the replica that failed.
        cause: one line that says why; it is in that rank's own words where it sent them.
    """

    def __init__(self, rank: int, cause: str) -> None:
        self.rank = rank
        self.cause = cause
        super().__init__(f"rank {rank}: {cause}")

    @classmethod
    def closed(cls, rank: int) -> "PeerFailed":
        """Returns the error for a connection that the other rank closed."""
        return cls(rank, "closed its connection")

    @classmethod
    def ended_here(cls, rank: int) -> "PeerFailed":
        """Returns the error for a connection that this process closed."""
        return cls(rank, "the connection with it was ended here")

    @classmethod
    def timed_out(cls, rank: int) -> "PeerFailed":
        """Returns the error for a rank that was waited for until the deadline."""
        return cls(rank, "did not answer in time")


class KvGone(HeterodyneError):
    """A step cannot be computed, as keys and values are gone, with whoever held them.

    The rank itself is well: once it has recovered, everything can be computed again.
    """


class BadFrame(HeterodyneError):
    """The received bytes are not a frame of this replica, or they are damaged."""

    @classmethod
    def unexpected(cls, came: str, due: str) -> "BadFrame":
        """Returns the error for a frame of kind ``came`` where one of kind ``due`` was next."""
        return cls(f"a {came} frame came where a {due} was due")


class FencedFrame(BadFrame):
    """The frame is of another epoch than this replica's."""
