"""Reports the keys and values that one replica computes and sends to another."""

from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.metrics import Meter

_BYTES = [float(4**i) for i in range(8, 20)]
_EXPOSED_S = [0.0005 * 2**i for i in range(16)]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTransfer:
    """What became of keys and values that another replica was to compute and send.

    Attributes:
        prefill: the replica that was to compute the prompt.
        num_tokens: tokens whose keys and values came; 0 where the prompt was computed after all where they did not.
        queue_s: at the other replica, until a step first computed the prompt.
        prefill_s: from then until all of it was computed.
        exposed_s: from then until the last byte had come: what computation did not hide.
        cached_tokens: tokens of the prompt that the other replica found in its prefix cache.
        by_layer: whether layers were sent as they were computed.
        problem: why none came; empty where they did. It is for the operator, and may name addresses.
    """

    prefill: str
    num_tokens: int
    num_bytes: int
    queue_s: float
    prefill_s: float
    exposed_s: float
    cached_tokens: int = 0
    by_layer: bool = False
    problem: str = ""

    def attributes(self) -> Mapping[str, str | int | float | bool]:
        """Returns the attributes of its span."""
        known: dict[str, str | int | float | bool] = {
            "heterodyne.kv_transfer.prefill": self.prefill,
            "heterodyne.kv_transfer.tokens": self.num_tokens,
            "heterodyne.kv_transfer.bytes": self.num_bytes,
            "heterodyne.kv_transfer.exposed_s": self.exposed_s,
            "heterodyne.kv_transfer.by_layer": self.by_layer,
        }
        return known | ({"heterodyne.kv_transfer.problem": self.problem} if self.problem else {})


class TransferMetrics:
    """Owns the instruments of transfers."""

    def __init__(self, meter: Meter) -> None:
        self._bytes = meter.create_histogram(
            "heterodyne.kv_transfer.size",
            unit="By",
            description="Bytes of keys and values that one replica sent to another for a request.",
            explicit_bucket_boundaries_advisory=_BYTES,
        )
        self._exposed = meter.create_histogram(
            "heterodyne.kv_transfer.exposed",
            unit="s",
            description="From the end of a prompt's computation until its last byte came: what it did not hide.",
            explicit_bucket_boundaries_advisory=_EXPOSED_S,
        )
        self._transfers = meter.create_counter(
            "heterodyne.kv_transfers",
            unit="{transfer}",
            description="Requests whose prompt another replica was to compute, by both and by whether the KV came.",
        )

    def ended(self, transfer: KvTransfer, replica: str) -> None:
        """Reports a transfer to ``replica``."""
        pair = {"prefill": transfer.prefill, "replica": replica}
        self._transfers.add(1, pair | {"outcome": "failed" if transfer.problem else "came"})
        if not transfer.problem:
            self._bytes.record(transfer.num_bytes, pair)
            self._exposed.record(transfer.exposed_s, pair)
