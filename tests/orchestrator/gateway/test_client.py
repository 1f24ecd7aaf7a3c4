"""The seam of surfaces: what a request's client is sent, without any gRPC between, and how gRPC writes it."""

import asyncio
from dataclasses import dataclass, field

import pytest

from orchestrator.gateway.client import (
    Accepted,
    AnswerTimes,
    ChoiceEnd,
    Client,
    Delta,
    Echoed,
    Event,
    Finished,
    FinishReason,
    TokenScore,
)
from orchestrator.gateway.errors import ClientTooSlow, DeadlineExceeded, Overloaded, QueueTimeout, ReplicaFault
from orchestrator.gateway.grpc_client import response_of
from orchestrator.gateway.request.request import Request
from protos.heterodyne.worker.v1 import worker_pb2
from tests.support.clocks import PATIENCE_S
from tests.support.gateway.stub_gateway import served_model, stub_gateway

REQUEST = Request(
    request_id="r",
    prompt_ids=(0, 1),
    sampling=worker_pb2.Sampling(top_p=1.0, repetition_penalty=1.0),
    seed=7,
    max_tokens=4,
    stop=(),
    stop_token_ids=(),
    logprobs=None,
    priority=0,
)


@dataclass
class Listener:
    """Notes what it is sent; reads while ``reads`` is set."""

    events: list[Event] = field(default_factory=list)
    reads: asyncio.Event = field(default_factory=asyncio.Event)

    async def send(self, event: Event) -> None:
        self.events.append(event)
        await self.reads.wait()

    def client(self, timeout_s: float = PATIENCE_S, *, has_deadline: bool = False) -> Client:
        self.reads.set()
        return Client(timeout_s=timeout_s, has_deadline=has_deadline, trace={}, send=self.send)


async def test_a_client_of_any_surface_is_sent_what_happens() -> None:
    async with stub_gateway(served_model()) as gateway:
        listener = Listener()
        answering = asyncio.create_task(gateway.generator.generate(REQUEST, listener.client()))
        (fork,) = (await asyncio.wait_for(gateway.worker.submits.get(), PATIENCE_S)).forks
        output = worker_pb2.SequenceOutput(sequence_id=fork.sequence_id, index=0, token_id=3, cached_tokens=1)
        output.end.reason = worker_pb2.END_REASON_STOP
        gateway.worker.step(output)
        assert await answering is FinishReason.STOP
        accepted, delta, finished = listener.events
        assert accepted == Accepted(request_id="r", model="letters", prompt_tokens=2, seed=7)
        end = ChoiceEnd(finish_reason=FinishReason.STOP, matched_stop=None, completion_tokens=1)
        assert delta == Delta(choice=0, first_index=0, token_ids=[3], scores={}, text="d", end=end)
        assert isinstance(finished, Finished) and finished.outcome is FinishReason.STOP
        assert (finished.prompt_tokens, finished.completion_tokens, finished.cached_prompt_tokens) == (2, 1, 1)
        assert gateway.admission.in_flight == 0 and len(gateway.generator.journal) == 0


@pytest.mark.parametrize(
    ("has_deadline", "said"),
    [(True, "the deadline passed before the answer"), (False, "longer than gateway.request_timeout_s = 0.2 allows")],
)
async def test_a_client_whose_time_is_up_is_told_so_last_and_whose_limit_it_was(has_deadline: bool, said: str) -> None:
    async with stub_gateway(served_model()) as gateway:
        listener = Listener()
        outcome = await asyncio.wait_for(
            gateway.generator.generate(REQUEST, listener.client(0.2, has_deadline=has_deadline)), PATIENCE_S
        )
        assert isinstance(outcome, DeadlineExceeded) and said in str(outcome)
        assert [type(event) for event in listener.events] == [Accepted, Finished]
        await asyncio.wait_for(gateway.worker.cancels.get(), PATIENCE_S)


async def test_a_client_that_does_not_take_an_event_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.gateway.generate.MAX_WAITING", 3)
    async with stub_gateway(served_model()) as gateway:
        listener = Listener()
        client = listener.client()
        listener.reads.clear()
        answering = asyncio.create_task(gateway.generator.generate(REQUEST, client))
        (fork,) = (await asyncio.wait_for(gateway.worker.submits.get(), PATIENCE_S)).forks
        for index in range(4):
            output = worker_pb2.SequenceOutput(sequence_id=fork.sequence_id, index=index, token_id=3)
            gateway.worker.step(output)
        assert isinstance(await asyncio.wait_for(answering, PATIENCE_S), ClientTooSlow)
        assert [type(event) for event in listener.events] == [Accepted]


async def test_a_client_that_is_not_admitted_is_sent_nothing() -> None:
    async with stub_gateway(served_model()) as gateway:
        listener = Listener()
        async with gateway.admission.slot(weight=64):
            with pytest.raises(QueueTimeout):
                await gateway.generator.generate(REQUEST, listener.client(0.1))
            gateway.admission.max_queued = 0
            with pytest.raises(Overloaded):
                await gateway.generator.generate(REQUEST, listener.client())
        assert listener.events == []


TIMES = AnswerTimes(queue_s=1.0, first_token_s=None, per_token_s=None)
SCORES = {1: TokenScore(logprob=-0.5, top=((3, -0.5), (4, -1.25)))}


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Accepted(request_id="r", model="letters", prompt_tokens=3, seed=7), "0a100a017212076c65747465727318032007"),
        (
            Delta(choice=1, first_index=2, token_ids=[8, 9], scores=SCORES, text="ij", end=None),
            "1227080212020808" + "12190809" + "15000000bf1a07080315000000bf1a070804150000a0bf1a02696a2001",
        ),
        (
            Delta(
                choice=0,
                first_index=0,
                token_ids=[],
                scores={},
                text="",
                end=ChoiceEnd(finish_reason=FinishReason.STOP, matched_stop="xy", completion_tokens=3),
            ),
            "120a2a080801120278791803",
        ),
        (Echoed(first_index=0, token_ids=(0, 1), scores={}, text="ab"), "220a120012020801" + "1a026162"),
        (
            Finished(
                outcome=FinishReason.LENGTH,
                prompt_tokens=3,
                completion_tokens=0,
                cached_prompt_tokens=0,
                times=TIMES,
                total_s=1.0,
                matched_stop="xy",
                replica="a",
            ),
            "1a23" + "08021a0408031800" + "221209000000000000f03f21000000000000f03f" + "2a027879" + "320161",
        ),
        (
            Finished(
                outcome=ReplicaFault("no"),
                prompt_tokens=3,
                completion_tokens=0,
                cached_prompt_tokens=None,
                times=TIMES,
                total_s=1.0,
                matched_stop=None,
                replica="a",
            ),
            "1a23" + "1206080d12026e6f" + "1a020803" + "221209000000000000f03f21000000000000f03f" + "320161",
        ),
    ],
)
def test_grpc_writes_events_byte_for_byte(event: Event, message: str) -> None:
    assert response_of(event).SerializeToString(deterministic=True).hex() == message
