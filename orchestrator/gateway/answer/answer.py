"""One accepted request: replicas' events go in, the client's messages come out. Decides, sends nothing."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from google.rpc import code_pb2

from orchestrator.brief import brief
from orchestrator.gateway.answer.choice import Choice
from orchestrator.gateway.answer.echo import Echo
from orchestrator.gateway.errors import ReplicaFault, ReplicaUnavailable
from orchestrator.gateway.fleet.inbox import Lost, SequenceEvent
from orchestrator.gateway.fleet.journal import JournalError
from orchestrator.gateway.request.request import Request
from orchestrator.gateway.request.shown import shown
from orchestrator.gateway.status import code_of
from placement.errors import HeterodyneError, InvalidRequest
from protos.heterodyne.v1 import inference_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

# In one message: with 20 alternatives to each some 200 kB, far below what a client takes.
MAX_CHUNK_TOKENS = 1024
_NOT_NOW = (code_pb2.FAILED_PRECONDITION, code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerTimes:
    """Where the time of an answer went, in seconds since the request arrived. None means not reached.

    Attributes:
        queue_s: until the first choice was first scheduled.
        first_token_s: until the first token of any choice was there.
        per_token_s: mean time between the later tokens of a choice, over all choices.
    """

    queue_s: float | None
    first_token_s: float | None
    per_token_s: float | None


class Answer:
    """The state of one accepted request: its choices, and its echo where one was asked for.

    Attributes:
        choices: in order; the sequence of the first one judges the prompt for the echo.
        outcome: set when it has ended, by a finish reason or an error.
    """

    def __init__(self, *, request: Request, choices: Sequence[Choice], echo: Echo | None) -> None:
        self.request = request
        self.choices = tuple(choices)
        self.outcome: pb.FinishReason.ValueType | HeterodyneError | None = None
        self._by_sequence = {choice.entry.sequence_id: choice for choice in choices}
        self._replica = self.choices[0].entry.replica
        self._echo = echo
        self._num_going_on = len(self.choices)
        self._let_go: list[Choice] = []
        # Outputs of other choices that came before the echo was complete: no chunk precedes it.
        self._held: list[worker_pb2.SequenceOutput] = []

    def opening(self) -> Iterator[pb.GenerateResponse]:
        """What the client should see after acceptance, before a replica has said anything."""
        return iter(()) if self._echo is None else self._echo.opening()

    def take(self, events: Iterable[SequenceEvent], *, submitted_s: float, now_s: float) -> list[pb.GenerateResponse]:
        """Take what the replica said, or what ends the request; returns what the client should see of it.

        Args:
            submitted_s: when the sequences went to the replica, in seconds since the request arrived.
            now_s: the present, likewise.
        """
        responses: list[pb.GenerateResponse] = []
        outputs: list[worker_pb2.SequenceOutput] = []
        failures: list[worker_pb2.Rejected | Lost | HeterodyneError] = []
        for event in events:
            if isinstance(event, worker_pb2.SequenceOutput):
                outputs.append(event)
            else:
                failures.append(event)
        if self._echo is not None and not self._echo.done:
            outputs = self._take_echo(outputs, responses)
        for choice, run in self._runs(outputs):
            if self.outcome is not None or choice.over:
                continue
            response = choice.take(run, submitted_s=submitted_s, now_s=now_s)
            if response is not None:
                responses.append(response)
            if choice.end is not None or choice.failure is not None:
                self._note_end(choice)
        for failure in failures:
            self._take_failure(failure)
        return responses

    def _take_echo(
        self, outputs: list[worker_pb2.SequenceOutput], responses: list[pb.GenerateResponse]
    ) -> list[worker_pb2.SequenceOutput]:
        """Take the prompt's log-probabilities; returns the outputs whose turn it is now."""
        assert self._echo is not None
        first = self.choices[0].entry.sequence_id
        mine = [output for output in outputs if output.sequence_id == first]
        self._held += [output for output in outputs if output.sequence_id != first]
        try:
            for output in mine:
                if output.HasField("prompt"):
                    responses += self._echo.take(output.prompt)
        except JournalError as error:
            self.fail(ReplicaFault(str(error)))
        if self._echo.done:
            held, self._held = self._held, []
            return mine + held
        if any(output.HasField("index") for output in mine):
            self.fail(ReplicaFault("the answer began before the log-probabilities of the prompt were complete"))
        return mine

    def _runs(
        self, outputs: list[worker_pb2.SequenceOutput]
    ) -> Iterable[tuple[Choice, Sequence[worker_pb2.SequenceOutput]]]:
        """The outputs by choice, in order; each run is short enough for one message."""
        if len(self.choices) == 1 and len(outputs) <= MAX_CHUNK_TOKENS:
            return ((self.choices[0], outputs),) if outputs else ()
        runs: dict[int, list[worker_pb2.SequenceOutput]] = {}
        for output in outputs:
            runs.setdefault(output.sequence_id, []).append(output)
        return [
            (self._by_sequence[sequence_id], run[start : start + MAX_CHUNK_TOKENS])
            for sequence_id, run in runs.items()
            for start in range(0, len(run), MAX_CHUNK_TOKENS)
        ]

    def _note_end(self, choice: Choice) -> None:
        if choice.failure is not None:
            self.fail(choice.failure)
            return
        if choice.at_replica:
            self._let_go.append(choice)
        self._num_going_on -= 1
        if not self._num_going_on:
            self.outcome = self._finish_reason()

    def _finish_reason(self) -> pb.FinishReason.ValueType:
        reasons = {choice.end.finish_reason for choice in self.choices if choice.end is not None}
        return pb.FINISH_REASON_LENGTH if pb.FINISH_REASON_LENGTH in reasons else pb.FINISH_REASON_STOP

    def _take_failure(self, event: worker_pb2.Rejected | Lost | HeterodyneError) -> None:
        match event:
            case worker_pb2.Rejected():
                self._by_sequence[event.sequence_id].at_replica = False
                self.fail(self._refused(event))
            case Lost():
                # The cause names processes and addresses: it is in the log and the status.
                for choice in self.choices:
                    choice.at_replica = False
                self.fail(ReplicaUnavailable(f"{self._replica} was lost; the request may be sent again"))
            case _:
                self.fail(event)

    def _refused(self, event: worker_pb2.Rejected) -> HeterodyneError:
        """A refusal that another replica, or a later time, could mend is not the request's fault."""
        logger.warning('sequence_refused replica=%s message="%s"', self._replica, brief(event.message))
        if event.code in _NOT_NOW:
            return ReplicaUnavailable(f"{self._replica} takes no requests at present; send it again")
        grammar = self.request.grammar
        if grammar is not None and event.HasField("grammar_problem"):
            kind = grammar.WhichOneof("format")
            return InvalidRequest(
                field="structured_output",
                value=shown(getattr(grammar, kind)) if kind else "",
                problem=f"cannot be followed: {brief(event.grammar_problem)}",
                fix="Send a simpler or a corrected one.",
            )
        return ReplicaFault(f"{self._replica} refused the request")

    def fail(self, error: HeterodyneError) -> None:
        """End all of it, unless it has ended."""
        if self.outcome is None:
            self.outcome = error

    def let_go(self) -> list[int]:
        """Sequences that ended here while the replica goes on with them, each told once: to be cancelled."""
        choices, self._let_go = self._let_go, []
        for choice in choices:
            choice.at_replica = False
        return [choice.entry.sequence_id for choice in choices]

    @property
    def completion_tokens(self) -> int:
        """Of all choices."""
        return sum(len(choice.entry.emitted_ids) for choice in self.choices)

    def times(self) -> AnswerTimes:
        """Where the time went, so far."""
        clocks = [choice.clock for choice in self.choices]
        spans = [
            (choice.clock.last_token_s - choice.clock.first_token_s, len(choice.entry.emitted_ids) - 1)
            for choice in self.choices
            if choice.clock.first_token_s is not None and choice.clock.last_token_s is not None
        ]
        num_gaps = sum(count for _, count in spans)
        return AnswerTimes(
            queue_s=min((clock.queue_s for clock in clocks if clock.queue_s is not None), default=None),
            first_token_s=min(
                (clock.first_token_s for clock in clocks if clock.first_token_s is not None), default=None
            ),
            per_token_s=sum(span_s for span_s, _ in spans) / num_gaps if num_gaps else None,
        )

    def finished(self, total_s: float) -> pb.Finished:
        """The terminal message. Only once ``outcome`` is set."""
        assert self.outcome is not None
        times = self.times()
        message = pb.Finished(
            usage=pb.Usage(
                prompt_tokens=len(self.request.prompt_ids),
                completion_tokens=self.completion_tokens,
                cached_prompt_tokens=self.choices[0].cached_tokens,
            ),
            timings=pb.Timings(
                queue_s=times.queue_s,
                time_to_first_token_s=times.first_token_s,
                time_per_output_token_s=times.per_token_s,
                total_s=total_s,
            ),
            replica=self._replica,
        )
        if isinstance(self.outcome, HeterodyneError):
            message.error.CopyFrom(pb.Error(code=code_of(self.outcome), message=str(self.outcome)))
            return message
        message.finish_reason = self.outcome
        end = self.choices[0].end
        if len(self.choices) == 1 and end is not None and end.HasField("matched_stop"):
            message.matched_stop = end.matched_stop
        return message
