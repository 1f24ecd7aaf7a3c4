"""Defines the settings of a replica's core."""

from dataclasses import dataclass
from enum import Enum

from placement.planning.residency import Residency
from placement.serving.admission import Limits
from placement.serving.step_plan import SchedulerLimits


class Checks(Enum):
    """The times when a core asserts its own state."""

    NEVER = "never"
    AT_IDLE = "at idle"
    ALWAYS = "always"


@dataclass(frozen=True, slots=True, kw_only=True)
class CoreSettings:
    """The settings that a core is made with.

    Attributes:
        limits: what one sequence may ask for.
        steps: the bounds of a step. With several batches the replica is a pipeline.
        num_blocks: how many KV blocks there are.
        residency: who holds which of them; None: the replica's own ranks hold all.
        prefix_cache: whether computed blocks are kept for sequences to come.
        checks: when the core asserts its own state.
    """

    limits: Limits
    steps: SchedulerLimits
    num_blocks: int
    residency: Residency | None = None
    prefix_cache: bool = True
    checks: Checks = Checks.NEVER
