"""Serves a call of another replica that has a prompt computed here, and its keys and values sent there."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator
from collections.abc import Sequence as Seq

from placement.errors import HeterodyneError, InvalidRequest
from placement.model.part import Span
from placement.model.specs import ModelSpec
from placement.serving.events import EndReason
from placement.serving.kv.peers import ReplicaRanks, differing
from placement.serving.kv.streaming import LEASE_S, QUEUE_S, SIGN_OF_LIFE_S, arrival_s, streams_by_layer
from protos.codec.replica_ranks import read_kv_format, read_ranks, read_transfer_id
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from workers.engine.engine import Engine
from workers.engine.types import Output, Shipping, StepStats, Submission
from workers.kv_transfer.sender import Target
from workers.replica.kv_leader import KvLeader
from workers.sampling.sampling import SamplingParams

_SEQUENCE_ID = 1  # each call is a sink of its own


class PrefillFailed(HeterodyneError):
    """The prompt was not computed, or its keys and values were not taken; the message says why."""


class PrefillCall:
    """Serves one call, as the sink of its one sequence. It lives on one event loop; ``step`` and ``refused`` do not."""

    def __init__(self, *, engine: Engine, leader: KvLeader, own: ReplicaRanks, model: ModelSpec) -> None:
        """Takes the leader's hold of all ranks of this replica, which ``own`` describes."""
        self._engine = engine
        self._leader = leader
        self._own = own
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Output | HeterodyneError | None] = asyncio.Queue()
        self._has_begun = False

    # -- called on the engine's thread ------------------------------------------------------------------------

    def step(self, stats: StepStats, outputs: Seq[Output]) -> None:
        """Hands what a step gave over to the event loop. It is called for every step that computes the prompt."""
        self._has_begun = True
        for output in outputs:
            self._post(output)

    def refused(self, sequence_id: int, error: HeterodyneError) -> None:
        """Hands a refusal over to the event loop."""
        self._post(error)

    def _post(self, event: Output | HeterodyneError) -> None:
        with contextlib.suppress(RuntimeError):  # a closed loop means that the process ends
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    # -- called on the loop -----------------------------------------------------------------------------------

    async def run(
        self, start: pb.PrefillStart, rest: AsyncIterator[pb.PrefillRequest]
    ) -> AsyncGenerator[pb.PrefillResponse, None]:
        """Computes and sends, and yields what the caller is told, until it has all keys and values.

        Args:
            rest: the requests after the first.

        Raises:
            InvalidRequest: the call asks for something impossible.
            PrefillFailed: the prompt could not be computed, or nobody took it.
            Draining: this replica takes no new prompts.
        """
        self._engine.admit()
        target, ship = self._read(start)
        opened = self._leader.open(target, on_drop=lambda problem: self._post(PrefillFailed(problem)))
        listening = asyncio.create_task(self._listen(rest))
        try:
            async with asyncio.timeout(LEASE_S):
                await asyncio.wrap_future(opened)
            self._engine.submit(self, _SEQUENCE_ID, _submission(start, ship))
            async for response in self._follow(ship, arrival_s(self._model, len(target.tokens))):
                yield response
        finally:
            listening.cancel()
            self._leader.close(target.transfer_id)  # before the engine gives its blocks to others
            self._engine.abandon(self)

    def _read(self, start: pb.PrefillStart) -> tuple[Target, Shipping]:
        """Reads what is asked for. Raises InvalidRequest and PrefillFailed."""
        ranks = read_ranks(start.target, self._model)
        topics = differing(self._own.facts, ranks.facts)
        if topics:
            raise PrefillFailed(f"this replica differs in {', '.join(topics)}")
        tokens = start.first_token, len(start.token_ids)
        if not 0 <= tokens[0] < tokens[1]:
            problem = f"leaves nothing of {tokens[1]} tokens to be sent"
            fix = "Ask for at least one token."
            raise InvalidRequest(field="first_token", value=tokens[0], problem=problem, fix=fix)
        transfer_id = read_transfer_id(start.transfer_id)
        target = Target(transfer_id=transfer_id, ranks=ranks, tokens=Span(*tokens), format=read_kv_format(start.format))
        by_layer = streams_by_layer(len(target.tokens))
        return target, Shipping(transfer_id=transfer_id, first_token=tokens[0], by_layer=by_layer)

    async def _listen(self, rest: AsyncIterator[pb.PrefillRequest]) -> None:
        """Waits for the caller to say that it has all, or to go."""
        async for request in rest:
            if request.HasField("arrived") and request.epoch == self._own.epoch:
                self._engine.kv_taken(self, _SEQUENCE_ID)
                return
        self._events.put_nowait(None)

    async def _follow(self, ship: Shipping, taken_s: float) -> AsyncIterator[pb.PrefillResponse]:
        """Yields signs of life, and the end of the computation, until the caller has all.

        Args:
            taken_s: how long the caller may take once all is computed.
        """
        lapses_s: float | None = None
        waits_until_s = self._loop.time() + QUEUE_S
        while True:
            try:
                async with asyncio.timeout(SIGN_OF_LIFE_S):
                    event = await self._events.get()
            except TimeoutError:
                if not self._has_begun and self._loop.time() >= waits_until_s:
                    raise PrefillFailed(f"the prompt waited for {QUEUE_S:g} s and was not begun") from None
                if lapses_s is not None and self._loop.time() >= lapses_s:
                    self._engine.kv_taken(self, _SEQUENCE_ID, lapsed=True)
                    lapses_s = None
                yield pb.PrefillResponse(progress=pb.PrefillProgress())
                continue
            if event is None:
                raise PrefillFailed("the caller ended the call")
            if isinstance(event, HeterodyneError):
                raise event
            if event.token is not None and lapses_s is None:
                lapses_s = self._loop.time() + taken_s
                yield pb.PrefillResponse(computed=_computed(event, ship))
            if event.end is EndReason.SHIPPED:
                return
            if event.end is not None:
                raise PrefillFailed(event.detail or "it was cancelled")


def _submission(start: pb.PrefillStart, ship: Shipping) -> Submission:
    """Returns the sequence that computes the prompt; the one token that it samples is of no use to anybody."""
    return Submission(
        prompt_ids=tuple(start.token_ids),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=1,
        stop_token_ids=frozenset(),
        priority=start.priority,
        cache_salt=start.cache_salt,
        ship=ship,
    )


def _computed(output: Output, ship: Shipping) -> pb.PrefillComputed:
    return pb.PrefillComputed(
        queue_s=output.queue_s or 0.0,
        prefill_s=output.prefill_s or 0.0,
        cached_tokens=output.cached_tokens or 0,
        by_layer=ship.by_layer,
    )
