"""What the benchmark of offloaded attention tells the process that measures, and what that answers."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to decode.

    Attributes:
        name: of the arm.
        shape: of the model.
        host, port: where the attention worker listens; an empty host: the process attends itself.
        threads: of the process.
        epoch: of the session: a later arm takes over from an earlier one.
        num_blocks: KV blocks.
    """

    name: str
    shape: str
    threads: int
    num_blocks: int
    host: str = ""
    port: int = 0
    epoch: int = 1
    q_first: bool = False
    staggered: bool = True

    @property
    def is_offloaded(self) -> bool:
        """Tells whether an attention worker holds the keys and values."""
        return bool(self.host)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A sample that is asked for: decodes of a batch, each of its sequences with so many tokens before.

    Attributes:
        arm: the name of the arm.
    """

    arm: str
    batch: int
    context: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What was measured.

    Attributes:
        step_s: the median of the steps.
        payload_bytes, frame_bytes: of all steps, both ways.
        rows: tokens times layers that were attended to elsewhere.
    """

    ask: Ask
    step_s: float
    payload_bytes: int = 0
    frame_bytes: int = 0
    rows: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Returns the tokens a second of all sequences."""
        return self.ask.batch / self.step_s

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "Sample":
        """Returns what was written as JSON."""
        return cls(**dict(told) | {"ask": Ask(**told["ask"])})
