"""Translates between a step's result, the replica's core and the sinks: what each of them learns of the step. Pure."""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from placement.errors import cause_of
from placement.serving.events import Advance, Ended, EndReason, Tell
from placement.serving.step_plan import StepPlan
from workers.engine.sequence import EngineSequence
from workers.engine.types import Output, Sink
from workers.sampling.sampling import SampledToken, SamplingFailed
from workers.step.types import StepResult

_NOTHING = Advance()


def advances(result: StepResult) -> tuple[Advance, ...]:
    """Returns how far a step advanced the sequence of each of its chunks, in the core's terms."""
    return tuple(_advance(token, index in result.complete) for index, token in enumerate(result.tokens))


def _advance(token: SampledToken | SamplingFailed | None, is_complete: bool) -> Advance:
    if token is None:
        return _NOTHING
    if isinstance(token, SamplingFailed):
        return Advance(failed=cause_of(token))
    return Advance(token_ids=(token.token_id,), is_complete=is_complete)


def step_outputs(
    commands: Seq[Tell | Ended],
    sequences: Mapping[int, EngineSequence],
    plan: StepPlan,
    result: StepResult,
    observers: Iterable[Sink] = (),
) -> dict[Sink, list[Output]]:
    """Returns what every sink receives of a step, in the order of its sequences; ``observers`` hear of every step.

    The scores of a prompt come before its answer.
    """
    outputs: dict[Sink, list[Output]] = {sink: [] for sink in observers}
    for place in sorted(result.scores):
        sequence = sequences.get(plan.chunks[place].sequence_id)
        if sequence is not None:  # else it has ended while the step was on its way
            score = Output(sequence_id=sequence.sequence_id, scores=result.scores[place])
            outputs.setdefault(sequence.sink, []).append(score)
    for command in commands:
        sequence = sequences[command.sequence_id]
        sink_outputs = outputs.setdefault(sequence.sink, [])
        if isinstance(command, Tell):
            sink_outputs.append(_token_output(sequence, command, result))
        else:
            _add_end(sink_outputs, sequence.sequence_id, command)
            if command.reason is EndReason.FAILED:
                problem = _grammar_problem(command, plan, result)
                sink_outputs[-1] = replace(sink_outputs[-1], grammar_problem=problem)
    if len({command.sequence_id for command in commands}) < len(plan.chunks):
        # A sink hears of every step that computed for it, also of one that gave its sequences nothing.
        for chunk in plan.chunks:
            if chunk.sequence_id in sequences:
                outputs.setdefault(sequences[chunk.sequence_id].sink, [])
    return outputs


def _grammar_problem(ended: Ended, plan: StepPlan, result: StepResult) -> str | None:
    """Returns what is wrong with the grammar of a sequence that failed; None where something else made it fail."""
    for chunk, token in zip(plan.chunks, result.tokens, strict=True):
        if chunk.sequence_id == ended.sequence_id and isinstance(token, SamplingFailed):
            return token.grammar_problem
    return None


def _token_output(sequence: EngineSequence, tell: Tell, result: StepResult) -> Output:
    assert len(tell.token_ids) == 1, "steps give one token"
    token = result.tokens[tell.place]
    assert isinstance(token, SampledToken), token
    return Output(
        sequence_id=sequence.sequence_id,
        index=tell.first_index,
        token=token,
        num_preemptions=tell.num_preemptions,
        queue_s=tell.queue_s,
        prefill_s=tell.prefill_s,
        cached_tokens=tell.cached_tokens,
        transfer=None if tell.queue_s is None else sequence.transfer,
    )


def _add_end(outputs: list[Output], sequence_id: int, ended: Ended) -> None:
    """Adds the end of a sequence to ``outputs``: to the last one where that is a token of the same sequence."""
    if outputs and outputs[-1].sequence_id == sequence_id and outputs[-1].token is not None:
        outputs[-1] = replace(outputs[-1], end=ended.reason, detail=ended.detail)
    else:
        outputs.append(end_output(sequence_id, ended))


def end_output(sequence_id: int, ended: Ended) -> Output:
    """Returns an output that ends a sequence and carries no token."""
    return Output(sequence_id=sequence_id, end=ended.reason, detail=ended.detail, num_preemptions=ended.num_preemptions)


def end_outputs(commands: Iterable[Ended], sequences: Mapping[int, EngineSequence]) -> dict[Sink, Seq[Output]]:
    """Returns what every sink receives of sequences that end without a step."""
    outputs: dict[Sink, list[Output]] = {}
    for ended in commands:
        sequence = sequences[ended.sequence_id]
        outputs.setdefault(sequence.sink, []).append(end_output(sequence.sequence_id, ended))
    return dict(outputs)
