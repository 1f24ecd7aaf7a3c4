"""Between a step's result, the replica's core and the listeners: what each is told of the step. Pure."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from placement.errors import cause_of
from placement.serving.events import Advance, Ended, Tell
from placement.serving.step_plan import StepPlan
from workers.engine.types import Output, Sink
from workers.engine.work import Work
from workers.sampling.sampling import SampledToken, SamplingFailed
from workers.step.types import StepResult

_NOTHING = Advance()


def advances(result: StepResult) -> tuple[Advance, ...]:
    """What a step gave each of its chunks, as the core takes it."""
    return tuple(_advance(token, index in result.complete) for index, token in enumerate(result.tokens))


def _advance(token: SampledToken | SamplingFailed | None, is_complete: bool) -> Advance:
    if token is None:
        return _NOTHING
    if isinstance(token, SamplingFailed):
        return Advance(failed=cause_of(token))
    return Advance(token_ids=(token.token_id,), is_complete=is_complete)


def outputs(
    commands: Seq[Tell | Ended], works: Mapping[int, Work], plan: StepPlan, result: StepResult
) -> dict[Sink, list[Output]]:
    """What every sink is told of a step, in the order of its sequences. Scores of a prompt come before its answer."""
    told: dict[Sink, list[Output]] = {}
    for place in sorted(result.scores):
        work = works.get(plan.chunks[place].sequence_id)
        if work is not None:  # else it has ended while the step was on its way
            score = Output(sequence_id=work.sequence_id, scores=result.scores[place])
            told.setdefault(work.sink, []).append(score)
    for command in commands:
        work = works[command.sequence_id]
        said = told.setdefault(work.sink, [])
        if isinstance(command, Tell):
            said.append(_token(work.sequence_id, command, result))
        else:
            _say_end(said, work.sequence_id, command)
    if len({command.sequence_id for command in commands}) < len(plan.chunks):
        # A sink hears of every step that computed for it, also of one that gave its sequences nothing.
        for chunk in plan.chunks:
            if chunk.sequence_id in works:
                told.setdefault(works[chunk.sequence_id].sink, [])
    return told


def _token(sequence_id: int, tell: Tell, result: StepResult) -> Output:
    assert tell.place is not None and len(tell.token_ids) == 1, (
        "steps give one token, and no tokens come from elsewhere"
    )
    token = result.tokens[tell.place]
    assert isinstance(token, SampledToken), token
    return Output(
        sequence_id=sequence_id,
        index=tell.first_index,
        token=token,
        num_preemptions=tell.num_preemptions,
        queue_s=tell.queue_s,
        prefill_s=tell.prefill_s,
        cached_tokens=tell.cached_tokens,
    )


def _say_end(said: list[Output], sequence_id: int, ended: Ended) -> None:
    """Adds the end of a sequence to its last token, where that was just said."""
    if said and said[-1].sequence_id == sequence_id and said[-1].token is not None:
        said[-1] = replace(said[-1], end=ended.reason, detail=ended.detail)
    else:
        said.append(end_output(sequence_id, ended))


def end_output(sequence_id: int, ended: Ended) -> Output:
    """The end of a sequence, with no token."""
    return Output(sequence_id=sequence_id, end=ended.reason, detail=ended.detail, num_preemptions=ended.num_preemptions)


def ends(commands: Iterable[Ended], works: Mapping[int, Work]) -> dict[Sink, Seq[Output]]:
    """What every sink is told of sequences that end without a step."""
    told: dict[Sink, list[Output]] = {}
    for ended in commands:
        work = works[ended.sequence_id]
        told.setdefault(work.sink, []).append(end_output(work.sequence_id, ended))
    return dict(told)
