"""One accepted request: what the replica says goes in, the client's events come out. Decides, sends nothing."""

import logging
from collections.abc import Iterable, Iterator, Sequence

from google.rpc import code_pb2

from orchestrator.brief import brief
from orchestrator.gateway.answer.choice import Choice, worker_lost
from orchestrator.gateway.answer.echo import Echo
from orchestrator.gateway.client import AnswerTimes, Delta, Echoed, Finished, FinishReason, Outcome
from orchestrator.gateway.errors import ReplicaFault, ReplicaUnavailable
from orchestrator.gateway.fleet.inbox import Loss, Lost, SequenceEvent
from orchestrator.gateway.fleet.journal import JournalError
from orchestrator.gateway.request.request import Request
from orchestrator.gateway.request.structured import cannot_be_followed
from orchestrator.telemetry.transfers import KvTransfer
from placement.errors import HeterodyneError
from protos.codec.log_record import said
from protos.heterodyne.worker.v1 import worker_pb2

logger = logging.getLogger(__name__)

# In one event. With 20 alternatives to each, its message takes some 200 kB, far below what a client takes.
MAX_DELTA_TOKENS = 1024
_NOT_NOW = (code_pb2.FAILED_PRECONDITION, code_pb2.UNAVAILABLE, code_pb2.RESOURCE_EXHAUSTED)


class Answer:
    """Holds the state of one accepted request: its choices, and its echo where one was asked for.

    Attributes:
        choices: in order; the sequence of the first one judges the prompt for the echo.
        outcome: set when the request has ended.
    """

    def __init__(
        self, *, request: Request, choices: Sequence[Choice], echo: Echo | None, prefill_replica: str | None = None
    ) -> None:
        """``prefill_replica`` is the one that is to compute the prompt, where that is another than the choices'."""
        self.request = request
        self.choices = tuple(choices)
        self.outcome: Outcome | None = None
        self._by_sequence = {choice.entry.sequence_id: choice for choice in choices}
        self._prefill_replica = prefill_replica
        self._replica = self.choices[0].entry.replica
        self._echo = echo
        self._num_going_on = len(self.choices)
        self._released: list[Choice] = []
        # Outputs of other choices that came before the echo was complete: no delta precedes it.
        self._held: list[worker_pb2.SequenceOutput] = []

    def opening(self) -> Iterator[Echoed]:
        """Yields what the client is sent after acceptance, before a replica has said anything."""
        return iter(()) if self._echo is None else self._echo.opening()

    def take(self, said: Iterable[SequenceEvent], *, submitted_s: float, now_s: float) -> list[Echoed | Delta]:
        """Takes what the replica said, or what ends the request; returns what the client is sent of it.

        Args:
            submitted_s: when the sequences went to the replica, in seconds since the request arrived.
            now_s: the present, likewise.
        """
        events: list[Echoed | Delta] = []
        outputs: list[worker_pb2.SequenceOutput] = []
        failures: list[worker_pb2.Rejected | Lost | HeterodyneError] = []
        for item in said:
            if isinstance(item, worker_pb2.SequenceOutput):
                outputs.append(item)
            else:
                failures.append(item)
        if self._echo is not None and not self._echo.done:
            outputs = self._take_echo(outputs, events)
        for choice, run in self._runs(outputs):
            if self.outcome is not None or choice.over:
                continue
            delta = choice.take(run, submitted_s=submitted_s, now_s=now_s)
            if delta is not None:
                events.append(delta)
            if choice.end is not None or choice.failure is not None:
                self._note_end(choice)
        for failure in failures:
            self._take_failure(failure)
        return events

    def _take_echo(
        self, outputs: list[worker_pb2.SequenceOutput], events: list[Echoed | Delta]
    ) -> list[worker_pb2.SequenceOutput]:
        """Takes the prompt's log-probabilities; returns the outputs whose turn it is now."""
        assert self._echo is not None
        first = self.choices[0].entry.sequence_id
        mine = [output for output in outputs if output.sequence_id == first]
        self._held += [output for output in outputs if output.sequence_id != first]
        try:
            for output in mine:
                if output.HasField("prompt"):
                    events += self._echo.take(output.prompt)
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
        """Returns the outputs by choice, in order; each run is short enough for one event."""
        if len(self.choices) == 1 and len(outputs) <= MAX_DELTA_TOKENS:
            return ((self.choices[0], outputs),) if outputs else ()
        runs: dict[int, list[worker_pb2.SequenceOutput]] = {}
        for output in outputs:
            runs.setdefault(output.sequence_id, []).append(output)
        return [
            (self._by_sequence[sequence_id], run[start : start + MAX_DELTA_TOKENS])
            for sequence_id, run in runs.items()
            for start in range(0, len(run), MAX_DELTA_TOKENS)
        ]

    def _note_end(self, choice: Choice) -> None:
        if choice.failure is not None:
            self.fail(choice.failure)
            return
        if choice.at_replica:
            self._released.append(choice)
        self._num_going_on -= 1
        if not self._num_going_on:
            self.outcome = self._finish_reason()

    def _finish_reason(self) -> FinishReason:
        reasons = {choice.end.finish_reason for choice in self.choices if choice.end is not None}
        return FinishReason.LENGTH if FinishReason.LENGTH in reasons else FinishReason.STOP

    def _take_failure(self, event: worker_pb2.Rejected | Lost | HeterodyneError) -> None:
        match event:
            case worker_pb2.Rejected():
                self._by_sequence[event.sequence_id].at_replica = False
                self.fail(self._refused(event))
            case Lost(kind=kind):
                # The cause names processes and addresses: it is in the log and the status.
                for choice in self.choices:
                    choice.at_replica = False
                if kind is Loss.STOPPED:
                    self.fail(ReplicaUnavailable("the service was stopped before the answer was complete"))
                else:
                    self.fail(worker_lost(self._replica))
            case _:
                self.fail(event)

    def _refused(self, event: worker_pb2.Rejected) -> HeterodyneError:
        """Returns the error for a refusal. What another replica, or a later time, could mend is not the request's."""
        message = brief(event.message)
        extra = said("sequence_refused", replica=self._replica, message=message)
        logger.warning("%s refused a sequence: %s", self._replica, message, extra=extra)
        if event.code in _NOT_NOW:
            return ReplicaUnavailable(f"{self._replica} takes no requests at present; send it again")
        grammar = self.request.grammar
        if grammar is not None and event.HasField("grammar_problem"):
            return cannot_be_followed(grammar, event.grammar_problem)
        return ReplicaFault(f"{self._replica} refused the request")

    def fail(self, error: HeterodyneError) -> None:
        """Ends the whole request, unless it has ended."""
        if self.outcome is None:
            self.outcome = error

    def take_released(self) -> list[int]:
        """Returns, once each, the sequences that ended here while the replica goes on with them: to be cancelled."""
        choices, self._released = self._released, []
        for choice in choices:
            choice.at_replica = False
        return [choice.entry.sequence_id for choice in choices]

    @property
    def completion_tokens(self) -> int:
        """Counts the tokens of all choices."""
        return sum(len(choice.entry.emitted_ids) for choice in self.choices)

    @property
    def transfer(self) -> KvTransfer | None:
        """Returns what became of the keys and values that another replica was to send; None before that is known."""
        message = next((choice.transfer for choice in self.choices if choice.transfer is not None), None)
        if message is None or self._prefill_replica is None:
            return None
        return KvTransfer(
            prefill=self._prefill_replica,
            num_tokens=message.num_tokens,
            num_bytes=message.num_bytes,
            queue_s=message.queue_s,
            prefill_s=message.prefill_s,
            exposed_s=message.exposed_s,
            cached_tokens=message.cached_tokens,
            by_layer=message.by_layer,
            problem=message.problem,
        )

    def times(self) -> AnswerTimes:
        """Says where the time went, so far."""
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

    def finished(self, total_s: float) -> Finished:
        """Returns the last event. Called only once ``outcome`` is set."""
        assert self.outcome is not None
        end = self.choices[0].end
        ended_well = isinstance(self.outcome, FinishReason)
        return Finished(
            outcome=self.outcome,
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=self.completion_tokens,
            cached_prompt_tokens=self.choices[0].cached_tokens,
            times=self.times(),
            total_s=total_s,
            matched_stop=end.matched_stop if ended_well and len(self.choices) == 1 and end is not None else None,
            replica=self._replica,
            transfer=self.transfer,
        )
