"""What a model rank sees of an attention worker: the session that joins both."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from placement.serving.offload.orders import Geometry, StepOrder


@dataclass(slots=True, kw_only=True)
class WireCounts:
    """Counts the bytes of a session's layers and steps.

    Attributes:
        payload_out: bytes of queries, keys and values that were sent.
        payload_in: bytes of answers that were received.
        frame_out: all other bytes that were sent: headers, orders.
        frame_in: all other bytes that were received: headers, pulses.
    """

    payload_out: int = 0
    payload_in: int = 0
    frame_out: int = 0
    frame_in: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionResult:
    """The answer to the queries of an order in a layer. It is valid until the order's next one is asked for.

    Attributes:
        whole: the attention of the first rows, in the model's number type, [num_whole, H, D].
        parts: what the worker has of the attention of the other rows, in float32, [rest, H, D].
        mass: the log-sum-exp of their scores in float32, [rest, H]; -inf where a row sees nothing there.
    """

    whole: Tensor
    parts: Tensor
    mass: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """What an attention worker says where it takes a session.

    Attributes:
        resumed: whether the keys and values of before are still there.
        last_complete: the number of the last order that was carried out, with all before it; -1: none.
        names: for each named block of the replica its hash, and the number of the order in which it was told.
    """

    resumed: bool
    last_complete: int
    names: Mapping[int, tuple[bytes, int]]


class AttentionSession(Protocol):
    """A session with an attention worker, used by one thread. All but ``close`` raise AttentionLost."""

    @property
    def geometry(self) -> Geometry:
        """Returns the sizes of what its messages carry."""
        ...

    @property
    def counts(self) -> WireCounts:
        """Returns what it has sent and received."""
        ...

    @property
    def welcome(self) -> Welcome:
        """Returns what the worker said at the beginning."""
        ...

    def order(self, order: StepOrder) -> int:
        """Sends an order and returns its number. Several may be under way."""
        ...

    def send(self, number: int, layer: int, query: Tensor | None, keys: Tensor | None, values: Tensor | None) -> None:
        """Sends an order's rows of a layer, and never waits for the worker.

        Args:
            query: [n, H, D], the rows of the order's spans; None: they were sent, or are sent later.
            keys: [m, K, D], the rows of the order's slots; None as above.
            values: as ``keys``, together with which they go.
        """
        ...

    def result(self, number: int, layer: int) -> AttentionResult:
        """Waits for the answer to the queries of an order in a layer."""
        ...

    def flush(self) -> None:
        """Sends what is still queued."""
        ...

    def close(self) -> None:
        """Closes the connection. The worker keeps what it holds for a time."""
        ...
