"""What listeners are told of a step, and that every end has a message."""

from placement.serving.events import Ended, EndReason, Tell
from placement.serving.step_plan import Chunk, StepPlan
from tests.support.engine import BLOCK_SIZE, Listener, submission
from workers.engine.answers import step_outputs
from workers.engine.sequence import begin
from workers.sampling.sampling import SampledToken, SamplingFailed
from workers.service.messages import _END, sequence_output
from workers.step.types import StepResult


def test_a_sink_hears_of_a_step_that_gave_its_sequence_nothing_beside_one_that_ended() -> None:
    ends, goes_on = Listener(), Listener()
    sequences = {core_id: begin(sink, 7, submission([3]), BLOCK_SIZE) for core_id, sink in enumerate((ends, goes_on))}
    chunks = tuple(Chunk(sequence_id=i, start=0, num_tokens=1, samples=i == 0) for i in range(2))
    commands = [
        Tell(sequence_id=0, place=0, first_index=0, token_ids=(1,)),
        Ended(sequence_id=0, reason=EndReason.LENGTH),
    ]
    result = StepResult(tokens=(SampledToken(token_id=1), None))
    outputs = step_outputs(commands, sequences, StepPlan(step=1, chunks=chunks, preempted=()), result)
    assert outputs.keys() == {ends, goes_on} and outputs[goes_on] == []
    (output,) = outputs[ends]
    assert (output.index, output.end) == (0, EndReason.LENGTH)


def test_a_failure_by_a_grammar_says_so_and_others_do_not() -> None:
    sink = Listener()
    sequences = {core_id: begin(sink, 7 + core_id, submission([3]), BLOCK_SIZE) for core_id in range(2)}
    chunks = tuple(Chunk(sequence_id=i, start=0, num_tokens=1, samples=True) for i in range(2))
    failures = tuple(
        SamplingFailed(row=row, value=0, problem="cannot", fix="Do.", grammar_problem=problem)
        for row, problem in enumerate((None, "it is too deep"))
    )
    commands = [Ended(sequence_id=i, reason=EndReason.FAILED, detail="on fire") for i in range(2)]
    plan = StepPlan(step=1, chunks=chunks, preempted=())
    outputs = step_outputs(commands, sequences, plan, StepResult(tokens=failures))[sink]
    ends = [sequence_output(output).end for output in outputs]
    assert [(end.detail, end.HasField("grammar_problem")) for end in ends] == [("on fire", False), ("on fire", True)]
    assert ends[1].grammar_problem == "it is too deep"


def test_every_end_has_a_message() -> None:
    assert _END.keys() == set(EndReason)
