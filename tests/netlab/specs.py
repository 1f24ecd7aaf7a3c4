"""What is asked of an emulated cluster: its hosts, and what the links between them are like."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_MOST_DELAY_S = 60.0
_TMP = Path("/tmp")


@dataclass(frozen=True, slots=True, kw_only=True)
class HostSpec:
    """A host.

    Attributes:
        name: lower-case letters, digits and hyphens; what its processes take for their hostname.
        cpu_share: of one core's time, that all its processes get together; 1.5 is one core and a half. None: any.
        core: the one that its processes run on. None: any.
        tmp: a directory that its processes find in place of /tmp, which is theirs alone. None: the machine's.
        kept: a directory of the machine that they find where it is, also if that is below /tmp, such as a checkout.
    """

    name: str
    cpu_share: float | None = None
    core: int | None = None
    tmp: Path | None = None
    kept: Path | None = None

    @property
    def kept_path(self) -> str:
        """Returns the path below /tmp of what is kept; empty where nothing of it would be hidden."""
        if self.tmp is None or self.kept is None or not self.kept.is_relative_to(_TMP):
            return ""
        return str(self.kept.relative_to(_TMP))

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"{self.name!r} is no name of a host")
        if self.cpu_share is not None and not 0.05 <= self.cpu_share <= 1024:
            raise ValueError(f"cpu_share={self.cpu_share} is not between 0.05 and 1024")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkConditions:
    """What a link does to the packets of one direction.

    Attributes:
        delay_s: one way; a round trip takes twice as long.
        rate_bits_per_s: None: as fast as the relay is.
        loss_fraction: of the packets, drawn by chance.
        is_partitioned: nothing arrives, not even what is on its way.
        blocked_ports: the TCP ports that no connection can be opened to, as behind a firewall that says nothing.
    """

    delay_s: float = 0.0
    rate_bits_per_s: float | None = None
    loss_fraction: float = 0.0
    is_partitioned: bool = False
    blocked_ports: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not 0.0 <= self.delay_s <= _MOST_DELAY_S:
            raise ValueError(f"delay_s={self.delay_s} is not between 0 and {_MOST_DELAY_S}")
        rate = self.rate_bits_per_s
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"rate_bits_per_s={rate} is not above 0")
        if not 0.0 <= self.loss_fraction <= 1.0:
            raise ValueError(f"loss_fraction={self.loss_fraction} is not between 0 and 1")
