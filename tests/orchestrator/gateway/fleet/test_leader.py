"""The gateway's end of the leader stream, against a real server that says what the test wants."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from orchestrator.gateway.fleet.inbox import Inbox, Loss, Lost, SequenceEvent
from orchestrator.gateway.fleet.leader import Leader, LeaderLimits, StepHook
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc
from tests.support.clocks import PATIENCE_S, LoopClock, until

EPOCH = 9
LOAD = pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(total_blocks=8, free_blocks=8, pending_tokens=5))


@dataclass
class Script(worker_pb2_grpc.WorkerServicer):
    """Says what is put in ``say``, keeps what it hears; None ends the stream."""

    say: asyncio.Queue[pb.LeadResponse | None] = field(default_factory=asyncio.Queue)
    heard: asyncio.Queue[pb.LeadRequest] = field(default_factory=asyncio.Queue)

    async def Lead(self, request_iterator: Any, context: Any) -> AsyncIterator[pb.LeadResponse]:
        async def listen() -> None:
            async for request in request_iterator:
                self.heard.put_nowait(request)

        listening = asyncio.create_task(listen())
        while (message := await self.say.get()) is not None:
            yield message
        listening.cancel()


@asynccontextmanager
async def connected(
    heartbeat_timeout_s: float = 5.0, stall_timeout_s: float = 60.0, on_step: StepHook | None = None
) -> AsyncIterator[tuple[Leader, Script]]:
    script = Script()
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    limits = LeaderLimits(heartbeat_timeout_s=heartbeat_timeout_s, stall_timeout_s=stall_timeout_s)
    leader = Leader(name="replica-0", epoch=EPOCH, address=f"127.0.0.1:{port}", limits=limits, on_step=on_step)
    task = asyncio.create_task(leader.run(lambda: None))
    script.say.put_nowait(LOAD)
    try:
        await until(lambda: leader.accepting)
        yield leader, script
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0.0)


def token(index: int, *, epoch: int = EPOCH, sequence_id: int = 1) -> pb.LeadResponse:
    output = pb.SequenceOutput(sequence_id=sequence_id, index=index, token_id=7)
    return pb.LeadResponse(epoch=epoch, step=pb.StepOutput(step=index + 1, sequences=[output]))


def submit(leader: Leader, *sequence_ids: int, num_prompt_tokens: int = 3) -> Inbox:
    inbox = Inbox()
    forks = [pb.Fork(sequence_id=sequence_id) for sequence_id in sequence_ids]
    leader.submit(pb.Submit(forks=forks, prompt_ids=[1] * num_prompt_tokens), inbox)
    return inbox


async def taken(inbox: Inbox) -> list[SequenceEvent]:
    return await asyncio.wait_for(inbox.take(), PATIENCE_S)


async def ticks(clock: LoopClock, count: int, *, of: float) -> None:
    """So many tenths of a limit go by, as the leader counts them."""
    for _ in range(count):
        await clock.advance(of / 10)


async def said(leader: Leader, script: Script, *messages: pb.LeadResponse) -> None:
    """Says them, a load report the last of them, and waits until it was heard."""
    before = leader.load
    for message in messages:
        script.say.put_nowait(message)
    await until(lambda: leader.load is not before)


async def test_commands_carry_the_epoch_and_outputs_reach_their_inbox() -> None:
    async with connected() as (leader, script):
        inbox = submit(leader, 1)
        heard = await asyncio.wait_for(script.heard.get(), PATIENCE_S)
        assert (heard.epoch, heard.submit.forks[0].sequence_id) == (EPOCH, 1)
        script.say.put_nowait(token(0))
        (output,) = await taken(inbox)
        assert isinstance(output, pb.SequenceOutput) and output.index == 0
        leader.release(1, cancel=True)
        heard = await asyncio.wait_for(script.heard.get(), PATIENCE_S)
        assert (heard.epoch, heard.cancel.sequence_id) == (EPOCH, 1)


async def test_a_late_message_of_an_old_epoch_is_refused_and_counted() -> None:
    async with connected() as (leader, script):
        inbox = submit(leader, 1)
        script.say.put_nowait(token(0, epoch=EPOCH - 1))
        script.say.put_nowait(token(0))
        assert await taken(inbox) == list(token(0).step.sequences)
        assert leader.fenced_messages == 1


async def test_silence_is_a_loss_that_every_sequence_hears_of(clock: LoopClock) -> None:
    async with connected(heartbeat_timeout_s=0.3) as (leader, _):
        inboxes = [submit(leader, number) for number in range(3)]
        await ticks(clock, 9, of=0.3)
        assert leader.accepting
        await ticks(clock, 2, of=0.3)
        for inbox in inboxes:
            (event,) = await taken(inbox)
            assert event == Lost(cause="no heartbeat for 0.3 s", kind=Loss.NO_HEARTBEAT)
        assert not leader.accepting
        late = submit(leader, 9)
        (event,) = await taken(late)
        assert isinstance(event, Lost)


async def test_heartbeats_alone_keep_it(clock: LoopClock) -> None:
    async with connected(heartbeat_timeout_s=0.3) as (leader, script):
        for _ in range(4):
            await ticks(clock, 9, of=0.3)
            await said(leader, script, LOAD)
        assert leader.accepting


async def test_a_stream_that_ends_is_a_loss() -> None:
    async with connected() as (leader, script):
        script.say.put_nowait(None)
        await until(lambda: leader.lost is not None)
        assert leader.lost is not None and "ended the stream" in leader.lost.cause
        assert leader.lost.kind is Loss.STREAM_BROKEN


async def test_what_was_submitted_since_the_last_report_counts_as_pending() -> None:
    async with connected() as (leader, script):
        assert leader.replica_load().pending_tokens == 5
        submit(leader, 1, num_prompt_tokens=40)
        assert leader.replica_load().pending_tokens == 45
        await said(leader, script, LOAD)
        assert leader.replica_load().pending_tokens == 45, "the report may be older than the submission"
        script.say.put_nowait(LOAD)
        await until(lambda: leader.replica_load().pending_tokens == 5)


async def test_heartbeats_without_steps_are_a_loss_while_sequences_run_and_none_while_idle(clock: LoopClock) -> None:
    running = pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(steps=7, num_running=1))
    nothing = pb.LeadResponse(epoch=EPOCH, step=pb.StepOutput())
    async with connected(stall_timeout_s=0.5) as (leader, script):
        for _ in range(20):
            await ticks(clock, 1, of=0.5)
            await said(leader, script, LOAD)
        assert leader.accepting, "idle is no stall"
        for _ in range(10):
            await said(leader, script, nothing, running)
            assert leader.accepting, "not yet"
            await ticks(clock, 1, of=0.5)
        await ticks(clock, 1, of=0.5)
        await until(lambda: leader.lost is not None)
        assert leader.lost == Lost(cause="no step finished for 0.5 s", kind=Loss.STALLED)


async def test_a_pause_of_this_process_is_not_blamed_on_the_leader(clock: LoopClock) -> None:
    async with connected(heartbeat_timeout_s=0.5) as (leader, script):
        await clock.advance(1.5)
        assert leader.accepting
        await said(leader, script, LOAD)
        assert leader.accepting


async def test_sequences_of_one_request_share_an_inbox_and_hear_of_a_loss_once() -> None:
    async with connected() as (leader, script):
        inbox = submit(leader, 1, 2, num_prompt_tokens=40)
        assert leader.replica_load().pending_tokens == 85, "each sequence counts, as in the replica's own report"
        script.say.put_nowait(pb.LeadResponse(epoch=EPOCH, rejected=pb.Rejected(sequence_id=2, message="no")))
        (refused,) = await taken(inbox)
        assert isinstance(refused, pb.Rejected) and refused.sequence_id == 2
        leader.release(2, cancel=False)
        script.say.put_nowait(token(0, sequence_id=2))
        script.say.put_nowait(token(0, sequence_id=1))
        (output,) = await taken(inbox)
        assert isinstance(output, pb.SequenceOutput) and output.sequence_id == 1, "what was released is not heard"
        script.say.put_nowait(None)
        assert [type(event) for event in await taken(inbox)] == [Lost]


async def test_every_step_that_computed_is_told_of_with_or_without_tokens_and_none_of_another_epoch() -> None:
    steps: list[tuple[str, pb.StepOutput]] = []
    async with connected(on_step=lambda name, step: steps.append((name, step))) as (_, script):
        script.say.put_nowait(token(7, epoch=EPOCH - 1))
        script.say.put_nowait(pb.LeadResponse(epoch=EPOCH, step=pb.StepOutput(step=5, duration_s=0.5, num_tokens=64)))
        script.say.put_nowait(pb.LeadResponse(epoch=EPOCH, step=pb.StepOutput(step=6)))
        last = pb.StepOutput(step=7, num_tokens=1, sequences=token(6).step.sequences)
        script.say.put_nowait(pb.LeadResponse(epoch=EPOCH, step=last))
        await until(lambda: len(steps) == 2)
        assert steps[0] == ("replica-0", pb.StepOutput(step=5, duration_s=0.5, num_tokens=64))
        assert steps[1] == ("replica-0", last), "a step of nothing is none"


async def test_a_prefill_of_many_steps_is_no_stall(clock: LoopClock) -> None:
    running = pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(steps=7, num_running=1))
    prefill = pb.LeadResponse(epoch=EPOCH, step=pb.StepOutput(num_tokens=64))
    async with connected(stall_timeout_s=0.5) as (leader, script):
        for _ in range(4):
            await said(leader, script, prefill, running)
            await ticks(clock, 9, of=0.5)
        assert leader.accepting


def running(steps: int, *, expected_s: float = 0.0) -> pb.LeadResponse:
    budget = pb.StepBudget(token_budget=64, expected_s=expected_s)
    return pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(steps=steps, num_running=1, budget=budget))


def computed(duration_s: float) -> pb.LeadResponse:
    return pb.LeadResponse(epoch=EPOCH, step=pb.StepOutput(num_tokens=64, duration_s=duration_s))


async def test_a_replica_whose_steps_are_slow_is_not_lost_and_one_that_hangs_is_at_ten_of_its_steps(
    clock: LoopClock,
) -> None:
    async with connected(stall_timeout_s=0.5) as (leader, script):
        await said(leader, script, computed(0.2), running(1))
        for step in range(2, 5):
            await ticks(clock, 39, of=0.5)
            assert leader.accepting, "1.95 s of the 2 s that its steps of 0.2 s allow"
            await said(leader, script, computed(0.2), running(step))
        await ticks(clock, 39, of=0.5)
        assert leader.accepting
        await ticks(clock, 2, of=0.5)
        await until(lambda: leader.lost is not None)
        cause = "no step finished for 2 s, where the longest of late took 0.2 s"
        assert leader.lost == Lost(cause=cause, kind=Loss.STALLED)


async def test_the_first_step_may_take_ten_times_what_the_replica_expects(clock: LoopClock) -> None:
    async with connected(stall_timeout_s=0.5) as (leader, script):
        await said(leader, script, running(0, expected_s=0.1))
        await ticks(clock, 19, of=0.5)
        assert leader.accepting
        await ticks(clock, 2, of=0.5)
        await until(lambda: leader.lost is not None)
        assert leader.lost is not None
        assert leader.lost.cause == "no step finished for 1 s, where the longest was expected to take 0.1 s"


async def test_silence_ends_a_replica_as_soon_as_ever_however_slow_its_steps_are(clock: LoopClock) -> None:
    async with connected(heartbeat_timeout_s=0.3, stall_timeout_s=0.5) as (leader, script):
        await said(leader, script, computed(60.0), running(1, expected_s=60.0))
        await ticks(clock, 11, of=0.3)
        await until(lambda: leader.lost is not None)
        assert leader.lost == Lost(cause="no heartbeat for 0.3 s", kind=Loss.NO_HEARTBEAT)


async def test_a_replica_whose_sequences_all_wait_for_keys_and_values_is_not_stalled(clock: LoopClock) -> None:
    moving = pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(steps=7, num_moving=2))
    async with connected(stall_timeout_s=0.5) as (leader, script):
        for _ in range(30):
            await said(leader, script, moving)
            await ticks(clock, 1, of=0.5)
        assert leader.accepting
