"""Counts what a replica has to do, and what it has done."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from placement.serving.events import LoadSnapshot
from placement.serving.kv.blocks import BlockPool
from placement.serving.live import LiveSequence
from placement.serving.scheduling import Scheduler
from placement.serving.sequence import Phase
from placement.serving.step_plan import StepPlan


@dataclass(slots=True, kw_only=True)
class TokenTotals:
    """Counts the tokens so far: those of answers, and of the prompts of sequences that were given a first token."""

    prompt: int = 0
    output: int = 0


def num_moving(live: Iterable[LiveSequence], num_unsent: int) -> int:
    """Counts the sequences whose keys and values are on the way.

    Args:
        num_unsent: sequences that are SHIPPING, and whose last step is on its way: they do not move before it ends.
    """
    return sum(it.sequence.phase in (Phase.AWAITS_KV, Phase.SHIPPING) for it in live) - num_unsent


def num_dispatched(in_flight: Iterable[StepPlan], *, is_pipeline: bool) -> int:
    """Counts the tokens of steps on their way that the scheduler takes to be computed.

    In a pipeline it takes those that sample to be computed only when their step has ended.
    """
    return sum(it.num_tokens for plan in in_flight for it in plan.chunks if not (is_pipeline and it.samples))


def snapshot(
    scheduler: Scheduler,
    pool: BlockPool,
    *,
    live: Collection[LiveSequence],
    num_dispatched: int,
    num_moving: int,
    num_steps: int,
    totals: TokenTotals,
) -> LoadSnapshot:
    """Returns the figures of a moment, when ``num_dispatched`` tokens are in steps on their way.

    A sequence in a dispatched step counts as running, and its tokens as pending, until that step has ended, even
    where the scheduler has forgotten it.
    """
    return LoadSnapshot(
        steps=num_steps,
        num_running=len(live) - scheduler.num_waiting - num_moving,
        num_moving=num_moving,
        num_waiting=scheduler.num_waiting,
        free_blocks=pool.num_free,
        total_blocks=pool.num_total,
        num_preemptions=scheduler.num_preemptions,
        pending_tokens=scheduler.pending_tokens + num_dispatched,
        prompt_tokens=totals.prompt,
        output_tokens=totals.output,
        prefix_queries=scheduler.num_prefix_queries,
        prefix_hits=scheduler.num_prefix_hits,
    )
