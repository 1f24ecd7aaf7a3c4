"""The gateway's end of the leader stream, against a real server that says what the test wants."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from orchestrator.gateway.leader import Leader, LeaderLimits, Lost
from protos.heterodyne.worker.v1 import worker_pb2 as pb
from protos.heterodyne.worker.v1 import worker_pb2_grpc

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
    heartbeat_timeout_s: float = 5.0, stall_timeout_s: float = 60.0
) -> AsyncIterator[tuple[Leader, Script]]:
    script = Script()
    server = grpc.aio.server()
    worker_pb2_grpc.add_WorkerServicer_to_server(script, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    limits = LeaderLimits(heartbeat_timeout_s=heartbeat_timeout_s, stall_timeout_s=stall_timeout_s)
    leader = Leader(name="replica-0", epoch=EPOCH, address=f"127.0.0.1:{port}", limits=limits)
    task = asyncio.create_task(leader.run(lambda: None))
    script.say.put_nowait(LOAD)
    try:
        await until(lambda: leader.accepting)
        yield leader, script
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await server.stop(0.0)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not true():
            await asyncio.sleep(0.01)


def token(index: int, *, epoch: int = EPOCH, sequence_id: int = 1) -> pb.LeadResponse:
    output = pb.SequenceOutput(sequence_id=sequence_id, index=index, token_id=7)
    return pb.LeadResponse(epoch=epoch, step=pb.StepOutput(step=index + 1, sequences=[output]))


async def test_commands_carry_the_epoch_and_outputs_reach_their_inbox() -> None:
    async with connected() as (leader, script):
        inbox = leader.submit(pb.Submit(sequence_id=1, prompt_ids=[1, 2, 3]))
        heard = await asyncio.wait_for(script.heard.get(), 5.0)
        assert (heard.epoch, heard.submit.sequence_id) == (EPOCH, 1)
        script.say.put_nowait(token(0))
        output = await asyncio.wait_for(inbox.get(), 5.0)
        assert isinstance(output, pb.SequenceOutput) and output.index == 0
        leader.release(1, cancel=True)
        heard = await asyncio.wait_for(script.heard.get(), 5.0)
        assert (heard.epoch, heard.cancel.sequence_id) == (EPOCH, 1)


async def test_a_late_message_of_an_old_epoch_is_refused_and_counted() -> None:
    async with connected() as (leader, script):
        inbox = leader.submit(pb.Submit(sequence_id=1))
        script.say.put_nowait(token(0, epoch=EPOCH - 1))
        script.say.put_nowait(token(0))
        assert (await asyncio.wait_for(inbox.get(), 5.0)) == token(0).step.sequences[0]
        assert inbox.empty()
        assert leader.fenced_messages == 1


async def test_silence_is_a_loss_that_every_sequence_hears_of() -> None:
    async with connected(heartbeat_timeout_s=0.3) as (leader, _):
        inboxes = [leader.submit(pb.Submit(sequence_id=number)) for number in range(3)]
        for inbox in inboxes:
            event = await asyncio.wait_for(inbox.get(), 5.0)
            assert isinstance(event, Lost) and event.cause == "no heartbeat for 0.3 s"
        assert not leader.accepting
        late = leader.submit(pb.Submit(sequence_id=9))
        assert isinstance(late.get_nowait(), Lost)


async def test_heartbeats_alone_keep_it() -> None:
    async with connected(heartbeat_timeout_s=0.4) as (leader, script):
        for _ in range(8):
            await asyncio.sleep(0.1)
            script.say.put_nowait(LOAD)
        assert leader.accepting


async def test_a_stream_that_ends_is_a_loss() -> None:
    async with connected() as (leader, script):
        script.say.put_nowait(None)
        await until(lambda: leader.lost is not None)
        assert leader.lost is not None and "ended the stream" in leader.lost.cause


async def test_what_was_submitted_since_the_last_report_counts_as_pending() -> None:
    async with connected() as (leader, script):
        assert leader.replica_load().pending_tokens == 5
        leader.submit(pb.Submit(sequence_id=1, prompt_ids=[1] * 40))
        assert leader.replica_load().pending_tokens == 45
        script.say.put_nowait(LOAD)
        await asyncio.sleep(0.1)
        assert leader.replica_load().pending_tokens == 45, "the report may be older than the submission"
        script.say.put_nowait(LOAD)
        await until(lambda: leader.replica_load().pending_tokens == 5)


async def test_heartbeats_without_steps_are_a_loss_while_sequences_run_and_none_while_idle() -> None:
    running = pb.LeadResponse(epoch=EPOCH, load=pb.LoadReport(steps=7, num_running=1))
    async with connected(stall_timeout_s=0.5) as (leader, script):
        for _ in range(10):
            script.say.put_nowait(LOAD)
            await asyncio.sleep(0.1)
        assert leader.accepting, "idle is no stall"
        for _ in range(10):
            script.say.put_nowait(running)
            await asyncio.sleep(0.1)
        assert leader.lost is not None and leader.lost.cause == "no step finished for 0.5 s"


async def test_a_pause_of_this_process_is_not_blamed_on_the_leader() -> None:
    async with connected(heartbeat_timeout_s=0.5) as (leader, script):
        script.say.put_nowait(LOAD)
        time.sleep(1.5)  # holds the loop up, which is the point
        script.say.put_nowait(LOAD)
        await asyncio.sleep(0.3)
        assert leader.accepting
