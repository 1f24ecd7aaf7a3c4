"""The events that tests feed to a core most often."""

from dataclasses import replace

from placement.serving.admission import Limits
from placement.serving.events import Advance, Command, Run, SequenceSpec, StepDue, StepEnded, Submit
from placement.serving.replica import ReplicaCore
from placement.serving.settings import Checks, CoreSettings
from placement.serving.step_plan import SchedulerLimits, StepPlan

SETTINGS = CoreSettings(
    limits=Limits(max_context_tokens=64, vocab_size=7, block_size=4),
    steps=SchedulerLimits(token_budget=16, max_num_seqs=4),
    num_blocks=16,
    checks=Checks.ALWAYS,
)
PIPELINE = replace(SETTINGS, steps=SchedulerLimits(token_budget=16, max_num_seqs=4, num_batches=2))
PROMPT = (1, 2, 3, 4, 5)


def spec(prompt: tuple[int, ...] = PROMPT, **more: object) -> SequenceSpec:
    fields: dict[str, object] = {"prompt_ids": prompt, "max_tokens": 3} | more
    return SequenceSpec(**fields)  # type: ignore[arg-type]


def submit(core: ReplicaCore, sequence_id: int = 1, *, at_s: float = 0.0, **more: object) -> list[Command]:
    event = Submit(sequence_id=sequence_id, spec=spec(**more), submitted_s=at_s)  # type: ignore[arg-type]
    return core.handle(event, at_s)


def plan(core: ReplicaCore, now_s: float = 0.0) -> StepPlan:
    (run,) = core.handle(StepDue(), now_s)
    assert isinstance(run, Run)
    return run.plan


def end(core: ReplicaCore, step: int, *tokens: int, now_s: float = 0.0) -> list[Command]:
    advances = [Advance(token_ids=(token,)) if token >= 0 else Advance() for token in tokens]
    return core.handle(StepEnded(step=step, advances=advances), now_s)
