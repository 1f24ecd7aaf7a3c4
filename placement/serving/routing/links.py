"""Learns what it costs to send keys and values from one replica to another, from the transfers that there were."""

from dataclasses import dataclass, field, replace

from placement.serving.routing.speed import LineFit

_ASSUMED_BYTES_PER_S = 1e9
_ASSUMED_FIXED_S = 0.005
_PRIOR_BYTES = 64 << 20
_NEW_SHARE = 0.5
"""The weight of the last transfer in the share of those that failed: two in a row make a pair unattractive."""
_FORGETS = 0.99
"""What is left of that share after each prompt that is sent another way, so that the pair is tried again."""


def _prior() -> LineFit:
    """Returns what is assumed of a pair, which counts as much as two transfers: nothing is hidden by computation."""
    sent_s = _ASSUMED_FIXED_S + _PRIOR_BYTES / _ASSUMED_BYTES_PER_S
    return LineFit().after(0, _ASSUMED_FIXED_S).after(_PRIOR_BYTES, sent_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpeed:
    """Holds what is known of transfers from one replica to another.

    Attributes:
        exposed: the seconds of a transfer that computation did not hide, by its bytes.
        failed_share: the share of transfers that failed, the last ones counted most.
    """

    exposed: LineFit = field(default_factory=_prior)
    failed_share: float = 0.0

    def exposed_s(self, num_bytes: int) -> float:
        """Returns the seconds by which so many bytes are expected to delay the first token."""
        return self.exposed.at(num_bytes)

    def after(self, num_bytes: int, exposed_s: float) -> "LinkSpeed":
        """Returns the speed after one more transfer that came."""
        return LinkSpeed(
            exposed=self.exposed.after(num_bytes, max(0.0, exposed_s)),
            failed_share=(1.0 - _NEW_SHARE) * self.failed_share,
        )

    def after_failure(self) -> "LinkSpeed":
        """Returns the speed after one that did not come, so that its prompt was computed twice."""
        return replace(self, failed_share=_NEW_SHARE + (1.0 - _NEW_SHARE) * self.failed_share)

    def passed_over(self) -> "LinkSpeed":
        """Returns the speed after a prompt was sent another way."""
        return replace(self, failed_share=_FORGETS * self.failed_share) if self.failed_share else self
